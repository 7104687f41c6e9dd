"""Sentence encoders: vectors, windows and prompts are those of sentence-transformers, before and after tuning."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.conftest import make_model, reviews, write_rows
from tests.support.sentence_encoders import TEXTS, change, encode, make_encoder
from tests.support.slow import slow_except
from zowrap.errors import ZOError
from zowrap.tasks.encoder import Encoder, kind_of_encoder, read_encoder
from zowrap.tasks.encoder_modules import POOLINGS
from zowrap.tasks.loading import open_source
from zowrap.tasks.resolve import resolve
from zowrap.tasks.rows import Row

WIDTH = 16
LABELS = ["bad", "good"]


@torch.no_grad()
def ours(folder: Path | str, texts: list[str] = TEXTS, **options: Any) -> Tensor:
    """The unit vectors that the form for sentences computes, all texts in one padded batch."""
    source = open_source(str(folder))
    rows = [Row({"text": text, "label": LABELS[i % 2]}, f"row {i}") for i, text in enumerate(texts)]
    task, _ = resolve("classification", rows, source, **options)
    assert task.form == "sentence"
    batch = task.collator(source)(task.examples(rows, source).items)
    return task.build(source, torch.float32).embed(batch["input_ids"], batch["attention_mask"])


def same(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.allclose(one, other, atol=1e-5)


@pytest.fixture(scope="module")
def pooled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An encoder with nothing but a pooling, by mean."""
    return make_encoder(tmp_path_factory.mktemp("pooled") / "encoder", lambda models: [models.Pooling(WIDTH)])


def copied(folder: Path, to: Path, pooling: dict[str, Any]) -> Path:
    """A copy of an encoder with another pooling."""
    shutil.copytree(folder, to)
    (to / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    return to


# --- pooling --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", POOLINGS)
def test_every_pooling_is_that_of_sentence_transformers(mode: str, pooled: Path, tmp_path: Path) -> None:
    folder = copied(pooled, tmp_path / mode, {"embedding_dimension": WIDTH, "pooling_mode": mode})
    assert same(ours(folder), encode(folder))
    assert mode.startswith("mean") or not same(ours(folder), ours(pooled))


@pytest.mark.parametrize(
    "flag", ["cls_token", "mean_tokens", "max_tokens", "mean_sqrt_len_tokens", "weightedmean_tokens", "lasttoken"]
)
def test_the_older_spelling_means_the_same(flag: str, pooled: Path, tmp_path: Path) -> None:
    folder = copied(pooled, tmp_path / flag, {"word_embedding_dimension": WIDTH, f"pooling_mode_{flag}": True})
    assert same(ours(folder), encode(folder))


@pytest.mark.parametrize(
    "pooling",
    [
        {"word_embedding_dimension": WIDTH, "pooling_mode_mean_tokens": True, "pooling_mode_cls_token": True},
        {"embedding_dimension": WIDTH, "pooling_mode": ["max", "cls"]},
        {"word_embedding_dimension": WIDTH, "pooling_mode_mean_tokens": False},  # none: by mean
        {"embedding_dimension": WIDTH},
    ],
)
def test_several_poolings_are_joined_in_the_same_order(pooling, pooled: Path, tmp_path: Path) -> None:
    folder = copied(pooled, tmp_path / "joined", pooling)
    assert same(ours(folder), encode(folder))


def test_a_text_alone_and_in_a_padded_batch_has_one_vector(pooled: Path, tmp_path: Path) -> None:
    for mode in POOLINGS:
        folder = copied(pooled, tmp_path / mode, {"embedding_dimension": WIDTH, "pooling_mode": mode})
        two = [ours(folder, [text, text])[0] for text in TEXTS]
        assert same(torch.stack(two), ours(folder))


# --- what follows the pooling ---------------------------------------------------------------------------------------

CHAINS = {
    "dense": lambda models: [models.Pooling(WIDTH, "cls"), models.Dense(WIDTH, 8)],
    "dense without bias": lambda models: [
        models.Pooling(WIDTH),
        models.Dense(WIDTH, 8, bias=False, activation_function=nn.Identity()),
    ],
    "dense, residual": lambda models: [
        models.Pooling(WIDTH),
        models.Dense(WIDTH, 8, activation_function=nn.ReLU(), use_residual=True),
        models.Dense(8, 8, activation_function=nn.GELU(), use_residual=True),
    ],
    "dense of the tokens": lambda models: [
        models.Dense(WIDTH, 8, module_input_name="token_embeddings"),
        models.Pooling(8, "max"),
    ],
    "norms": lambda models: [models.Pooling(WIDTH), models.Dropout(0.5), models.LayerNorm(WIDTH), models.Normalize()],
}


@pytest.mark.parametrize("name", CHAINS)
def test_modules_after_the_transformer_are_followed(name: str, tmp_path: Path) -> None:
    folder = make_encoder(tmp_path / "encoder", CHAINS[name])
    assert same(ours(folder), encode(folder))


def test_a_dimension_to_cut_to_is_followed(tmp_path: Path) -> None:
    folder = make_encoder(tmp_path / "encoder", lambda models: [models.Pooling(WIDTH)])
    whole = ours(folder)
    change(folder / "config_sentence_transformers.json", truncate_dim=5)
    assert ours(folder).shape[1] == 5 and whole.shape[1] == WIDTH
    assert same(ours(folder), encode(folder))


# --- prompts, window, case ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["mean", "cls", "weightedmean", "lasttoken"])
@pytest.mark.parametrize("included", [True, False])
def test_the_default_prompt_stands_before_every_text(mode: str, included: bool, pooled: Path, tmp_path: Path) -> None:
    pooling = {"embedding_dimension": WIDTH, "pooling_mode": mode, "include_prompt": included}
    folder = copied(pooled, tmp_path / "prompted", pooling)
    plain = ours(folder)
    prompts = {"query": "question : ", "document": "very "}
    change(folder / "config_sentence_transformers.json", prompts=prompts, default_prompt_name="query")
    assert same(ours(folder), encode(folder)) and not same(ours(folder), plain)


def test_prompts_that_are_no_default_are_not_used_and_told(pooled: Path, tmp_path: Path) -> None:
    folder = tmp_path / "prompted"
    shutil.copytree(pooled, folder)
    change(folder / "config_sentence_transformers.json", prompts={"query": "question : ", "document": ""})
    assert same(ours(folder), ours(pooled)) and same(ours(folder), encode(folder))
    rows = [Row({"text": "good", "label": label}, "row") for label in LABELS]
    assert "none of its prompts (query)" in resolve("classification", rows, open_source(str(folder)))[1]


def test_names_of_labels_get_the_prompt_too(pooled: Path, tmp_path: Path) -> None:
    folder = tmp_path / "prompted"
    shutil.copytree(pooled, folder)
    change(folder / "config_sentence_transformers.json", prompts={"a": "question : "}, default_prompt_name="a")
    source = open_source(str(folder))
    rows = [Row({"text": text, "label": LABELS[i % 2]}, f"row {i}") for i, text in enumerate(TEXTS)]
    task, _ = resolve("classification", rows, source)
    batch = task.collator(source)(task.examples(rows, source).items)
    logits = task.build(source, torch.float32)(**batch).logits
    assert torch.allclose(logits, 20 * encode(folder) @ encode(folder, LABELS).T, atol=1e-3)


@pytest.mark.parametrize("window", [4, 8])
def test_the_encoders_own_window_counts(window: int, pooled: Path, tmp_path: Path) -> None:
    folder = tmp_path / "short"
    shutil.copytree(pooled, folder)
    change(folder / "sentence_bert_config.json", max_seq_length=window)
    assert same(ours(folder), encode(folder)) and not same(ours(folder), ours(pooled))
    rows = [Row({"text": "good", "label": label}, "row") for label in LABELS]
    task, _ = resolve("classification", rows, open_source(str(folder)))
    assert task.max_length == window
    assert resolve("classification", rows, open_source(str(folder)), head="sequence")[0].max_length == 32


def test_lower_case_is_followed(pooled: Path, tmp_path: Path) -> None:
    folder, loud = tmp_path / "lower", [text.upper() for text in TEXTS]
    shutil.copytree(pooled, folder)
    change(folder / "sentence_bert_config.json", do_lower_case=True)
    assert same(ours(folder, loud), encode(folder, loud))
    assert same(ours(folder, loud), ours(folder)) and not same(ours(pooled, loud), ours(pooled))


@pytest.mark.parametrize("file", ["sentence_roberta_config.json", "sentence_xlnet_config.json"])
def test_the_settings_may_have_an_older_name(file: str, pooled: Path, tmp_path: Path) -> None:
    folder = tmp_path / "older"
    shutil.copytree(pooled, folder)
    (folder / "sentence_bert_config.json").unlink()
    (folder / file).write_text(json.dumps({"max_seq_length": 4, "do_lower_case": False}))
    assert same(ours(folder), encode(folder)) and not same(ours(folder), ours(pooled))


# --- other transformers ---------------------------------------------------------------------------------------------


def test_a_causal_model_that_pools_its_last_token_is_an_encoder(tmp_path: Path) -> None:
    """Its architecture is that of a language model, whose labels are scored as words otherwise."""
    folder = make_encoder(tmp_path / "encoder", lambda models: [models.Pooling(WIDTH, "lasttoken")], kind="causal")
    change(folder / "config.json", architectures=["LlamaForCausalLM"])
    assert same(ours(folder), encode(folder))


def test_a_causal_model_without_modules_pools_as_sentence_transformers_does(tmp_path: Path) -> None:
    pytest.importorskip("sentence_transformers")
    folder = make_model("causal", tmp_path / "model", initializer_range=0.4)
    assert same(ours(folder, head="sentence"), encode(folder))


def test_the_encoder_of_an_encoder_decoder_is_one(tmp_path: Path) -> None:
    pytest.importorskip("sentence_transformers")
    import transformers
    from sentence_transformers import SentenceTransformer, models

    from tests.conftest import make_tokenizer

    tokenizer = make_tokenizer("bert")
    sizes = {"d_model": WIDTH, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
    torch.manual_seed(0)
    model = transformers.T5ForConditionalGeneration(transformers.T5Config(vocab_size=len(tokenizer), **sizes))
    model.save_pretrained(tmp_path / "t5")
    tokenizer.save_pretrained(tmp_path / "t5")
    modules = [models.Transformer(str(tmp_path / "t5")), models.Pooling(WIDTH)]
    SentenceTransformer(modules=modules, device="cpu").save(str(tmp_path / "encoder"), create_model_card=False)
    assert same(ours(tmp_path / "encoder"), encode(tmp_path / "encoder"))


def test_a_cross_encoder_keeps_its_head(models: dict[str, Path], tmp_path: Path) -> None:
    transformers = pytest.importorskip("sentence_transformers")
    transformers.CrossEncoder(str(models["sequence"]), device="cpu").save_pretrained(str(tmp_path / "cross"))
    assert kind_of_encoder(str(tmp_path / "cross")) in (None, "CrossEncoder")
    rows = [Row({"text": "good", "label": label}, "row") for label in LABELS]
    assert resolve("classification", rows, open_source(str(tmp_path / "cross")))[0].form == "sequence"


def test_an_encoder_in_the_cache_of_the_hub_is_read_by_its_name(
    pooled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    folder = copied(pooled, tmp_path / "cls", {"embedding_dimension": WIDTH, "pooling_mode": "cls"})
    home = tmp_path / "hub" / "models--some--encoder"
    shutil.copytree(folder, home / "snapshots" / ("0" * 40))
    (home / "refs").mkdir()
    (home / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    found = read_encoder("some/encoder")
    assert isinstance(found, Encoder) and found.modes == ["cls"]
    (home / "snapshots" / ("0" * 40) / "1_Pooling" / "config.json").unlink()
    with pytest.raises(ZOError, match=r"1_Pooling/config\.json is not in the cache"):
        read_encoder("some/encoder")


# --- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "entry, word",
    [
        ({"path": "1_CNN", "type": "sentence_transformers.models.CNN"}, "CNN"),
        ({"path": "1_WeightedLayerPooling", "type": "sentence_transformers.models.WeightedLayerPooling"}, "Weighted"),
        ({"path": "1_Mine", "type": "mine.Mine"}, "mine.Mine of its own"),
        ({"path": "../outside", "type": "sentence_transformers.models.Normalize"}, "not inside"),
        ({"path": "/etc", "type": "sentence_transformers.models.Normalize"}, "not inside"),
        ({"type": "sentence_transformers.models.Normalize"}, "damaged"),
    ],
)
def test_unknown_modules_are_refused_by_name(entry: dict[str, Any], word: str, pooled: Path, tmp_path: Path) -> None:
    folder = tmp_path / "other"
    shutil.copytree(pooled, folder)
    modules = json.loads((folder / "modules.json").read_text())
    (folder / "modules.json").write_text(json.dumps([modules[0], {"idx": 1, "name": "1", **entry}]))
    with pytest.raises(ZOError, match=word):
        read_encoder(str(folder))


@pytest.mark.parametrize(
    "file, values, word",
    [
        ("1_Pooling/config.json", {"pooling_mode": "median"}, "median"),
        ("1_Pooling/config.json", {"pooling_mode_attention": True}, "pooling_mode_attention"),
        ("sentence_bert_config.json", {"transformer_task": "fill-mask"}, "transformer_task"),
        ("sentence_bert_config.json", {"config_args": {"rope": 2}}, "rope"),
        ("sentence_bert_config.json", {"max_seq_length": "long"}, "max_seq_length"),
        ("sentence_bert_config.json", {"processing_kwargs": {"text": {"max_length": 3}}}, "processing_kwargs"),
        ("config_sentence_transformers.json", {"default_prompt_name": "none"}, "'none'"),
        ("config_sentence_transformers.json", {"model_type": "SparseEncoder"}, "SparseEncoder"),
        ("config_sentence_transformers.json", {"truncate_dim": -1}, "truncate_dim"),
    ],
)
def test_settings_that_would_change_vectors_are_refused_by_name(file, values, word, pooled, tmp_path: Path) -> None:
    folder = tmp_path / "other"
    shutil.copytree(pooled, folder)
    change(folder / file, **values)
    with pytest.raises(ZOError, match=word):
        read_encoder(str(folder))


def test_settings_that_change_no_vector_are_accepted(pooled: Path, tmp_path: Path) -> None:
    folder = tmp_path / "other"
    shutil.copytree(pooled, folder)
    arguments = {"trust_remote_code": True, "add_pooling_layer": False}
    change(folder / "sentence_bert_config.json", model_args=arguments, unpad_inputs=False, query_length=8)
    assert same(ours(folder), ours(pooled))


def test_a_missing_pooling_is_no_mean(pooled: Path, tmp_path: Path) -> None:
    folder = tmp_path / "other"
    shutil.copytree(pooled, folder)
    (folder / "1_Pooling" / "config.json").unlink()
    with pytest.raises(ZOError, match=r"1_Pooling/config\.json is missing"):
        read_encoder(str(folder))


def test_activations_are_those_of_torch_alone(tmp_path: Path) -> None:
    folder = make_encoder(tmp_path / "encoder", CHAINS["dense"])
    for name in ("os.system", "torch.nn.Linear", "torch.load", "torch.nn.modules.activation.MultiheadAttention"):
        change(folder / "2_Dense" / "config.json", activation_function=name)
        with pytest.raises(ZOError, match=name.replace(".", r"\.")):
            read_encoder(str(folder))


def test_pickled_weights_of_a_module_are_converted_by_export(tmp_path: Path, zowrap_cli) -> None:
    from safetensors.torch import load_file

    folder = make_encoder(tmp_path / "encoder", CHAINS["dense"])
    want = ours(folder)
    torch.save(load_file(folder / "2_Dense" / "model.safetensors"), folder / "2_Dense" / "pytorch_model.bin")
    (folder / "2_Dense" / "model.safetensors").unlink()
    with pytest.raises(ZOError, match="--allow-pickle"):
        ours(folder)
    assert zowrap_cli("export", folder, "--to", tmp_path / "converted", "--allow-pickle").code == 0
    assert same(ours(tmp_path / "converted"), want)


# --- after tuning ---------------------------------------------------------------------------------------------------


def tune(zowrap_cli, model: Path, data: Path, out: Path, *more: Any) -> Any:
    told = zowrap_cli(
        "tune", model, "--data", data, "--out", out, "--steps", 2, "--lr", 1e-2, "--batch-size", 4, "--engine", "eager",
        "--json", *more,
    )  # fmt: skip
    assert told.code == 0, told.err
    return told


@pytest.mark.parametrize("adapted", [False, True])
def test_a_run_and_its_export_are_encoders_of_sentence_transformers(
    adapted: bool, tmp_path: Path, zowrap_cli, data: dict[str, Path]
) -> None:
    if adapted:
        pytest.importorskip("peft")
    folder = make_encoder(tmp_path / "encoder", CHAINS["dense"])
    change(folder / "sentence_bert_config.json", max_seq_length=6)
    change(folder / "config_sentence_transformers.json", prompts={"a": "question : "}, default_prompt_name="a")
    tune(zowrap_cli, folder, data["train"], tmp_path / "run", *(["--use-peft"] if adapted else []))
    tuned = ours(tmp_path / "run")
    assert not same(tuned, ours(folder))
    assert same(encode(tmp_path / "run"), tuned)
    forms = ("same", "adapters", "merged", "fp32") if adapted else ("same", "fp32")
    for form in forms:
        told = zowrap_cli("export", tmp_path / "run", "--to", tmp_path / form, "--format", form)
        assert told.code == 0, told.err
        if form != "adapters":  # which has no tokenizer
            assert same(ours(tmp_path / form), tuned) and same(encode(tmp_path / form), tuned)
        assert (tmp_path / form / "2_Dense" / "model.safetensors").is_file()
    tune(zowrap_cli, tmp_path / ("merged" if adapted else "run"), data["train"], tmp_path / "second")
    assert same(encode(tmp_path / "second"), ours(tmp_path / "second"))


def test_every_checkpoint_is_an_encoder_too(pooled: Path, tmp_path: Path, zowrap_cli, data: dict[str, Path]) -> None:
    folder = copied(pooled, tmp_path / "max", {"embedding_dimension": WIDTH, "pooling_mode": "max"})
    tune(zowrap_cli, folder, data["train"], tmp_path / "run")
    (checkpoint,) = (tmp_path / "run").glob("checkpoint-*")
    assert kind_of_encoder(str(checkpoint)) == "SentenceTransformer"
    assert same(ours(tmp_path / "run"), encode(tmp_path / "run"))


def test_a_shorter_length_that_was_asked_for_is_the_runs_window(pooled, tmp_path: Path, zowrap_cli, data) -> None:
    tune(zowrap_cli, pooled, data["train"], tmp_path / "run", "--max-length", 5)
    assert same(encode(tmp_path / "run"), ours(tmp_path / "run"))
    assert json.loads((tmp_path / "run" / "sentence_bert_config.json").read_text())["max_seq_length"] == 5


def test_a_run_of_a_causal_model_says_how_it_pools(tmp_path: Path, zowrap_cli, data: dict[str, Path]) -> None:
    pytest.importorskip("sentence_transformers")
    folder = make_model("causal", tmp_path / "model", initializer_range=0.4)
    tune(zowrap_cli, folder, data["train"], tmp_path / "run", "--head", "sentence")
    assert same(encode(tmp_path / "run"), ours(tmp_path / "run"))


def test_label_vectors_stand_on_the_encoders_own_vectors(tmp_path: Path, zowrap_cli) -> None:
    folder = make_encoder(tmp_path / "encoder", CHAINS["dense"])
    rows = reviews(10)
    file = write_rows(tmp_path / "rows.jsonl", rows)
    loss = [
        zowrap_cli("eval", folder, "--data", file, "--head", head, "--json").json["loss"]
        for head in ("sentence", "vectors")
    ]
    assert loss[0] == pytest.approx(loss[1], abs=1e-5)
    tune(zowrap_cli, folder, file, tmp_path / "run", "--head", "vectors")
    assert zowrap_cli("eval", tmp_path / "run", "--data", file).code == 0
    assert same(encode(tmp_path / "run"), encode(folder))  # the encoder does not move


def test_dense_layers_stay_unless_they_are_named(tmp_path: Path, zowrap_cli, data: dict[str, Path]) -> None:
    from safetensors.torch import load_file

    folder = make_encoder(tmp_path / "encoder", CHAINS["dense"])
    before = load_file(folder / "2_Dense" / "model.safetensors")["linear.weight"]
    for out, moves in (("stay", []), ("move", ["--trainable", "after.*linear*"])):
        tune(zowrap_cli, folder, data["train"], tmp_path / out, *moves)
        after = load_file(tmp_path / out / "2_Dense" / "model.safetensors")["linear.weight"]
        assert torch.equal(before, after) == (not moves)
        assert same(encode(tmp_path / out), ours(tmp_path / out))


def test_losses_of_sentence_transformers_train_its_models(pooled: Path, tmp_path: Path) -> None:
    """As docs/encoders.md has it: the model is theirs, the loss too, and so is what is saved."""
    sentence_transformers = pytest.importorskip("sentence_transformers")
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

    import zowrap

    model = sentence_transformers.SentenceTransformer(str(pooled), device="cpu")
    ranking = MultipleNegativesRankingLoss(model)
    sides = [model.preprocess(texts) for texts in (["good movie", "bad plot"], ["great film", "awful the plot"])]
    batch = {f"{name}_{i}": side[name] for i, side in enumerate(sides) for name in ("input_ids", "attention_mask")}

    def loss(model: Any, batch: dict[str, Tensor]) -> Tensor:
        pairs = [{name: batch[f"{name}_{i}"] for name in ("input_ids", "attention_mask")} for i in (0, 1)]
        return ranking(pairs, labels=None)

    with torch.no_grad():
        want = float(ranking([dict(side) for side in sides], labels=None))
    zm = zowrap.zo_wrap(model, "zo_sgd", loss_fn=loss, lr=1e-2, engine="eager")
    assert zm.loss(**batch).item() == pytest.approx(want, abs=1e-5)
    zm.step(**batch)
    zm.save_pretrained(str(tmp_path / "saved"))
    tuned = model.encode(TEXTS, normalize_embeddings=True, convert_to_tensor=True).float()
    assert same(encode(tmp_path / "saved"), tuned) and not same(tuned, encode(pooled))


def test_a_model_of_sentence_transformers_without_a_loss_is_refused(pooled: Path) -> None:
    sentence_transformers = pytest.importorskip("sentence_transformers")
    import zowrap

    model = sentence_transformers.SentenceTransformer(str(pooled), device="cpu")
    batch = {name: model.preprocess(TEXTS)[name] for name in ("input_ids", "attention_mask")}
    with pytest.raises(ZOError, match=r"cannot be called with this batch.*loss_fn"):
        zowrap.zo_wrap(model, "zo_sgd", engine="eager").step(**batch)


# --- captured, without weights, from the cache ----------------------------------------------------------------------


@pytest.mark.parametrize("mode", slow_except(["mean", "lasttoken", "dense"], [*POOLINGS, "dense"]))
def test_every_chain_is_captured_with_any_batch_and_length(mode: str, pooled: Path, tmp_path: Path) -> None:
    if mode == "dense":
        folder = make_encoder(tmp_path / "encoder", CHAINS["dense, residual"])
    else:
        folder = copied(pooled, tmp_path / mode, {"embedding_dimension": WIDTH, "pooling_mode": mode})
    source = open_source(str(folder))
    rows = [Row({"text": row["text"], "label": row["label"]}, "row") for row in reviews(6)]
    task, _ = resolve("classification", rows, source)
    batch, model = task.collator(source)(task.examples(rows, source).items), task.build(source, torch.float32)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    many, length = torch.export.Dim("rows", min=2, max=64), torch.export.Dim("length", min=2, max=24)
    shapes = {name: {0: many, 1: length} for name in inputs}
    program = torch.export.export(model, (), inputs, dynamic_shapes=shapes, strict=False).module()
    other = {name: value[:3, :4] for name, value in inputs.items()}
    assert torch.allclose(program(**other).logits, model(**other).logits, atol=1e-4)


@pytest.mark.slow
def test_a_compiled_step_equals_an_eager_one(tmp_path: Path) -> None:
    import zowrap

    folder = make_encoder(
        tmp_path / "encoder", lambda models: [models.Pooling(WIDTH, "lasttoken"), models.Dense(WIDTH, 8)]
    )
    source = open_source(str(folder))
    rows = [Row({"text": row["text"], "label": row["label"]}, "row") for row in reviews(6)]
    task, _ = resolve("classification", rows, source)
    batch = task.collator(source)(task.examples(rows, source).items)
    losses = []
    for engine in ("eager", "compiled"):
        model = task.build(source, torch.float32)
        moves = task.default_trainable(model)
        zm = zowrap.zo_wrap(model, "zo_sgd", loss_fn=task.loss_fn, lr=1e-3, trainable=moves, engine=engine)
        losses.append(zm.step(**batch).losses)
        assert zm.inspect().engine == engine
    assert torch.allclose(*losses, rtol=2e-5, atol=0)


def test_an_encoder_is_inspected_without_its_weights(tmp_path: Path, zowrap_cli) -> None:
    folder = make_encoder(tmp_path / "encoder", CHAINS["dense"])
    for file in folder.rglob("*.safetensors"):
        file.unlink()
    told = zowrap_cli(
        "inspect", folder, "--task", "classification", "--labels", "bad,good", "--engine", "eager", "--json"
    )
    assert told.code == 0, told.err
    assert not any("linear" in move["name"] for move in told.json["moves"])


def test_an_encoder_of_the_hub_is_exported_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    from zowrap.tasks.loading import fetch

    folder, asked = make_encoder(tmp_path / "encoder", CHAINS["dense"]), []

    def snapshot_download(name: str, allow_patterns: list[str], ignore_patterns: list[str] | None) -> str:
        asked.extend(allow_patterns if ignore_patterns is None else [])
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert fetch("some/encoder") == folder
    assert {"1_Pooling/config.json", "2_Dense/config.json", "2_Dense/model.safetensors"} <= set(asked)
    assert not any(name.endswith((".bin", ".py")) for name in asked)


def test_a_run_from_before_pools_as_it_was_tuned(models: dict[str, Path]) -> None:
    """Its folder has no modules.json, and the task that it keeps says how it pools."""
    from zowrap.tasks.resolve import restore_task

    source = open_source(str(models["encoder"]))
    rows = [Row({"text": text, "label": LABELS[i % 2]}, "row") for i, text in enumerate(TEXTS)]
    task, _ = resolve("classification", rows, source)
    batch = task.collator(source)(task.examples(rows, source).items)
    model = restore_task({**task.record(), "pooling": "cls"}).build(source, torch.float32)
    hidden = model.module(batch["input_ids"], batch["attention_mask"]).last_hidden_state[:, 0]
    assert same(model.embed(batch["input_ids"], batch["attention_mask"]), nn.functional.normalize(hidden, dim=-1))
