"""Models on disk: what is written loads again bit for bit, says where it comes from, and is never a pickle."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, BertConfig, BertModel, GPT2Config, GPT2LMHeadModel

import zowrap
from tests.support.tiny_run import tiny_llama, trainer_in
from zowrap.errors import ZOError
from zowrap.storage import save
from zowrap.storage.export import export_run
from zowrap.storage.pickles import convert_pickle
from zowrap.storage.safetensors import add_metadata, read_metadata, require_safetensors
from zowrap.storage.save import save_model


def tiny_bert() -> BertModel:
    torch.manual_seed(0)
    return BertModel(BertConfig(vocab_size=32, hidden_size=16, num_hidden_layers=1, num_attention_heads=2))


def same(one: nn.Module, other: nn.Module) -> bool:
    first, second = one.state_dict(), other.state_dict()
    return first.keys() == second.keys() and all(first[n].equal(second[n]) for n in first)


@pytest.mark.parametrize("tied", [False, True])
def test_a_transformers_model_loads_again_bit_for_bit(tmp_path, tied):
    model = tiny_llama(tie_word_embeddings=tied)
    save_model(model, tmp_path / "out", {"rule": "meazo", "steps": "3"})
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert same(model, loaded)
    names = load_file(tmp_path / "out" / "model.safetensors")
    assert ("lm_head.weight" in names) != tied
    facts = read_metadata(tmp_path / "out" / "model.safetensors")
    assert facts["rule"] == "meazo" and facts["format"] == "pt" and facts["zowrap"] == zowrap.__version__


def test_what_save_pretrained_of_a_wrapped_model_says(tmp_path):
    zm = zowrap.zo_wrap(tiny_llama(), seed=5, engine="eager")
    zm.step(input_ids=torch.ones(2, 4, dtype=torch.long), labels=torch.ones(2, 4, dtype=torch.long))
    zm.save_pretrained(str(tmp_path), metadata={"base_model": "llama-tiny"})
    facts = read_metadata(tmp_path / "model.safetensors")
    assert facts["seed"] == "5" and facts["steps"] == "1" and facts["base_model"] == "llama-tiny"
    assert facts["rule"].startswith("meazo(")
    assert same(zm.model, AutoModelForCausalLM.from_pretrained(tmp_path))


def test_a_large_model_is_split_and_a_smaller_one_leaves_no_shard_behind(tmp_path):
    model = tiny_llama()
    save_model(model, tmp_path, max_shard_size=4000)
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 1 and (tmp_path / "model.safetensors.index.json").is_file()
    assert all(read_metadata(shard)["zowrap"] == zowrap.__version__ for shard in shards)
    assert same(model, AutoModelForCausalLM.from_pretrained(tmp_path))
    save_model(model, tmp_path)
    assert not list(tmp_path.glob("model-*")) and not (tmp_path / "model.safetensors.index.json").exists()
    assert same(model, AutoModelForCausalLM.from_pretrained(tmp_path))


class Task(nn.Module):
    """A task around an encoder: no tensor of its own."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder
        self.loss = nn.CrossEntropyLoss()

    def forward(self, **batch):
        return self.encoder(**batch)


def test_a_module_that_only_wraps_a_model_is_saved_as_that_model(tmp_path):
    model = Task(tiny_bert())
    save_model(model, tmp_path)
    assert same(model.encoder, BertModel.from_pretrained(tmp_path))


def test_a_module_with_tensors_of_its_own_is_saved_whole(tmp_path):
    model = Task(tiny_bert())
    model.head = nn.Linear(16, 2)
    save_model(model, tmp_path)
    assert "head.weight" in load_file(tmp_path / "model.safetensors")


def test_a_plain_module_with_tied_weights(tmp_path):
    from safetensors.torch import load_model

    def make():
        torch.manual_seed(1)
        model = nn.ModuleDict({"embed": nn.Embedding(8, 4), "head": nn.Linear(4, 8, bias=False)})
        model["head"].weight = model["embed"].weight
        return model

    model, other = make(), make()
    with torch.no_grad():
        model["head"].weight.add_(1)
    save_model(model, tmp_path, {"rule": "x"})
    load_model(other, tmp_path / "model.safetensors")
    assert same(model, other)


def test_the_tokenizer_is_written_beside(tmp_path):
    from transformers import AutoTokenizer

    from tests.training.test_trainer import tiny_bert_tokenizer

    save_model(tiny_llama(), tmp_path, tokenizer=tiny_bert_tokenizer())
    assert AutoTokenizer.from_pretrained(tmp_path)("good film")["input_ids"] == [2, 4]


def test_metadata_leaves_the_tensors_as_they_are(tmp_path):
    save_model(tiny_llama(), tmp_path)
    file = tmp_path / "model.safetensors"
    before = load_file(file)
    for length in range(1, 12):
        add_metadata(file, {"note": "é" * length})
        assert read_metadata(file)["note"] == "é" * length
    after = load_file(file)
    assert all(after[name].equal(before[name]) for name in before)


def test_a_full_disk_leaves_what_was_there(tmp_path, monkeypatch):
    out = tmp_path / "out"
    save_model(tiny_llama(), out)
    before = {p: p.read_bytes() for p in out.iterdir()}

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(save, "add_metadata", full)
    with pytest.raises(ZOError, match=r"disk is full: .*out was not written"):
        save_model(tiny_llama(seed=3), out)
    assert {p: p.read_bytes() for p in out.iterdir()} == before
    with pytest.raises(ZOError, match="disk is full"):
        save_model(tiny_llama(), tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_file_in_the_way_is_told(tmp_path):
    (tmp_path / "out").write_text("")
    with pytest.raises(ZOError, match="is a file"):
        save_model(tiny_llama(), tmp_path / "out")


# --- copies of a run ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    trainer_in(folder, max_steps=4).train()
    return folder


def test_an_exported_run_holds_the_model_and_nothing_of_the_run(run, tmp_path):
    written = export_run(run, tmp_path / "out", metadata={"note": "mine"})
    names = {path.name for path in written}
    assert {"model.safetensors", "config.json", "generation_config.json"} <= names
    assert (
        not names & {"journal.jsonl", "metrics.jsonl", "zowrap.json"} and not (tmp_path / "out/checkpoint-4").exists()
    )
    assert same(AutoModelForCausalLM.from_pretrained(run), AutoModelForCausalLM.from_pretrained(tmp_path / "out"))
    facts = read_metadata(tmp_path / "out" / "model.safetensors")
    assert facts["note"] == "mine" and facts["seed"] == "7" and facts["rule"].startswith("meazo")


def test_export_in_another_dtype_and_in_parts(run, tmp_path):
    export_run(run, tmp_path / "out", dtype="bfloat16", max_shard_size=3000)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert loaded.dtype == torch.bfloat16
    assert same(loaded, AutoModelForCausalLM.from_pretrained(run).to(torch.bfloat16))
    assert len(list((tmp_path / "out").glob("model-*"))) > 1


def test_what_cannot_be_exported_is_told(run, tmp_path):
    with pytest.raises(ZOError, match="did you mean 'bfloat16'"):
        export_run(run, tmp_path / "out", dtype="bfloat")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a").write_text("")
    with pytest.raises(ZOError, match="not empty"):
        export_run(run, tmp_path / "full")
    with pytest.raises(ZOError, match="folder to copy from"):
        export_run(run, run)
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "zowrap.json").write_text("{}")
    with pytest.raises(ZOError, match="no finished model"):
        export_run(tmp_path / "begun", tmp_path / "out")
    assert not (tmp_path / "out").exists()


# --- pickles --------------------------------------------------------------------------------------------------------


def pickled(folder: Path, model: nn.Module) -> Path:
    save_model(model, folder)
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    return folder


def test_a_pickled_model_is_refused_with_the_command_that_converts_it(tmp_path):
    folder = pickled(tmp_path / "old", tiny_llama())
    torch.save({}, folder / "training_args.bin")
    with pytest.raises(ZOError, match=rf"zowrap export {folder} --to DIR --allow-pickle"):
        require_safetensors(folder)


def test_a_folder_without_weights_is_told(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    torch.save({}, tmp_path / "optimizer.pt")
    with pytest.raises(ZOError, match="no weights"):
        require_safetensors(tmp_path)
    with pytest.raises(ZOError, match="not a folder"):
        require_safetensors(tmp_path / "nowhere")


@pytest.mark.parametrize("tied", [False, True])
def test_a_converted_pickle_loads_as_the_same_model(tmp_path, tied):
    torch.manual_seed(0)
    sizes = {"vocab_size": 32, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 16}
    model = GPT2LMHeadModel(GPT2Config(**sizes, tie_word_embeddings=tied))
    convert_pickle(pickled(tmp_path / "old", model), tmp_path / "new")
    require_safetensors(tmp_path / "new")
    assert same(model, AutoModelForCausalLM.from_pretrained(tmp_path / "new"))
    assert not list((tmp_path / "new").glob("*.bin"))


class Evil:
    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self):
        return (open, (str(self.file), "w"))


def test_a_pickle_that_would_run_code_is_refused_and_does_not(tmp_path):
    folder = pickled(tmp_path / "old", tiny_llama())
    torch.save({"a": Evil(tmp_path / "never")}, folder / "pytorch_model.bin")
    with pytest.raises(ZOError, match="could run code"):
        convert_pickle(folder, tmp_path / "new")
    assert not (tmp_path / "new").exists() and not (tmp_path / "never").exists()


def test_a_pickle_that_is_no_state_dict_or_broken_is_told(tmp_path):
    folder = pickled(tmp_path / "old", tiny_llama())
    torch.save({"epoch": 3}, folder / "pytorch_model.bin")
    with pytest.raises(ZOError, match="not a state dict"):
        convert_pickle(folder, tmp_path / "new")
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x02garbage")
    with pytest.raises(ZOError, match=r"pytorch_model\.bin"):
        convert_pickle(folder, tmp_path / "new")


@pytest.mark.parametrize("kept", [0, 5, 200, -10])
def test_weights_that_are_cut_off_are_told(tmp_path, kept):
    save_model(tiny_llama(), tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    for use in (require_safetensors, read_metadata, lambda _: export_run(tmp_path / "model", tmp_path / "out")):
        with pytest.raises(ZOError, match=r"model\.safetensors is not a complete safetensors file \("):
            use(file if use is read_metadata else file.parent)
    assert not (tmp_path / "out").exists()


def test_a_missing_shard_is_told(tmp_path):
    save_model(tiny_llama(), tmp_path, max_shard_size=4000)
    gone = sorted(tmp_path.glob("model-*.safetensors"))[0]
    gone.unlink()
    with pytest.raises(ZOError, match=gone.name):
        require_safetensors(tmp_path)


def test_what_is_written_describes_itself_in_json(run):
    config = json.loads((run / "zowrap.json").read_text())
    assert config["options"]["rule"] == "meazo" and config["status"]["state"] == "finished"
