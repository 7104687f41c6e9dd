"""Tasks: what a row becomes, and that each form computes what it says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from tests.conftest import make_model, make_tokenizer, reviews
from zowrap.errors import ZOError
from zowrap.tasks.batches import Collator, even_lengths, truncate
from zowrap.tasks.lm import LanguageModelling
from zowrap.tasks.loading import Source, open_source
from zowrap.tasks.resolve import resolve, restore_task
from zowrap.tasks.rows import Row


def rows_of(values: list[dict[str, Any]]) -> list[Row]:
    return [Row(value, f"row {i}") for i, value in enumerate(values, 1)]


def build(models: dict[str, Path], kind: str, **options: Any) -> tuple[Any, Any, Any, Any]:
    """(task, source, model, batch of all rows)."""
    source = open_source(str(models[kind]))
    rows = rows_of(reviews(7))
    task, _ = resolve("classification", rows, source, **options)
    model = task.build(source, torch.float32)
    return task, source, model, task.collator(source)(task.examples(rows, source).items)


# --- the forms ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "form"), [("sequence", "sequence"), ("causal", "words"), ("encoder", "sentence")])
def test_the_form_follows_from_the_checkpoint(models: dict[str, Path], kind: str, form: str) -> None:
    source = open_source(str(models[kind]))
    task, why = resolve("classification", rows_of(reviews(4)), source)
    assert task.form == form
    assert source.architectures[0] in why
    assert restore_task(task.record()) == task


@pytest.mark.parametrize("kind", ["sequence", "causal", "encoder"])
def test_a_form_does_not_depend_on_its_batch(models: dict[str, Path], kind: str) -> None:
    task, source, model, batch = build(models, kind)
    whole = model(**batch)
    assert whole.logits.shape == (7, 2) and whole.logits.dtype == torch.float32
    assert torch.allclose(whole.loss, F.cross_entropy(whole.logits, batch["labels"]))
    alone = [task.collator(source)([item]) for item in task.examples(rows_of(reviews(7)), source).items]
    logits = torch.cat([model(**one).logits for one in alone])
    assert torch.allclose(logits, whole.logits, atol=1e-5)


@pytest.mark.parametrize("labels", [["bad", "good"], ["very bad", "good"]])
def test_words_score_the_likelihood_of_the_labels_tokens(models: dict[str, Path], labels: list[str]) -> None:
    source = open_source(str(models["causal"]))
    rows = rows_of([{"text": "the movie was very", "label": labels[0]}, {"text": "a plot", "label": labels[1]}])
    task, _ = resolve("classification", rows, source)
    model = task.build(source, torch.float32)
    logits = model(**task.collator(source)(task.examples(rows, source).items)).logits
    for row, scores in zip(rows, logits, strict=True):
        for label, score in zip(task.labels, scores, strict=True):
            prompt = source.tokenizer(f"{row.values['text']}\nLabel:")["input_ids"]
            words = source.tokenizer(label, add_special_tokens=False)["input_ids"]
            out = model.module(torch.tensor([prompt + words])).logits[0].log_softmax(-1)
            expected = sum(out[len(prompt) - 1 + i, word] for i, word in enumerate(words))
            assert torch.allclose(score, expected, atol=1e-5)


def test_a_label_that_begins_another_is_closed() -> None:
    from zowrap.tasks.classification import _tokenize_continuations

    tokenizer = make_tokenizer("causal")
    rows = _tokenize_continuations(tokenizer, ["good", "good movie"])
    assert [row[-1] for row in rows] == [tokenizer.eos_token_id] * 2
    assert all(tokenizer.eos_token_id not in row for row in _tokenize_continuations(tokenizer, ["good", "bad movie"]))


def test_sentences_are_compared_with_the_names_of_labels(models: dict[str, Path]) -> None:
    task, source, model, batch = build(models, "encoder")

    def embed(text: str) -> torch.Tensor:
        inputs = source.tokenizer(text, return_tensors="pt")
        hidden = model.module(inputs["input_ids"], inputs["attention_mask"]).last_hidden_state[0]
        return F.normalize(hidden.mean(0), dim=-1)

    texts = torch.stack([embed(row["text"]) for row in reviews(7)])
    names = torch.stack([embed(name) for name in task.labels])
    assert torch.allclose(model(**batch).logits, 20 * texts @ names.T, atol=1e-4)


@pytest.mark.parametrize("kind", ["sequence", "causal", "encoder"])
def test_forms_can_be_captured_with_any_batch_and_length(models: dict[str, Path], kind: str) -> None:
    _task, _source, model, batch = build(models, kind)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    rows, length = torch.export.Dim("rows", min=2, max=64), torch.export.Dim("length", min=2, max=24)
    program = torch.export.export(
        model, (), inputs, dynamic_shapes={name: {0: rows, 1: length} for name in inputs}, strict=False
    )
    other = {name: value[:3, -4:] for name, value in inputs.items()}
    assert torch.allclose(program.module()(**other).logits, model(**other).logits, atol=1e-5)


@pytest.mark.parametrize("kind", ["sequence", "causal", "encoder"])
def test_what_is_saved_is_the_model_inside(models: dict[str, Path], kind: str, tmp_path: Path) -> None:
    from zowrap.step.parameters import select
    from zowrap.storage.save import save_model

    _, source, model, _batch = build(models, kind)
    save_model(model, tmp_path / "saved", tokenizer=source.tokenizer)
    again = type(model.module).from_pretrained(tmp_path / "saved")
    for (name, saved), (_, tensor) in zip(again.state_dict().items(), model.module.state_dict().items(), strict=True):
        assert torch.equal(saved, tensor), name
    # Noise and journal are those of the bare model.
    assert [p.id for p in select(model)] == [p.id for p in select(model.module)]


def test_a_fresh_head_is_told_and_follows_the_seed(
    models: dict[str, Path], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    import logging

    monkeypatch.setattr(logging.getLogger("zowrap"), "propagate", True)
    rows = rows_of([{"text": "good", "label": str(i % 3)} for i in range(6)])
    source = open_source(str(models["sequence"]))
    task, _ = resolve("classification", rows, source)
    heads = [task.build(source, torch.float32, seed).module.classifier.weight for seed in (1, 1, 2)]
    assert "2 labels and the data has 3" in caplog.text and "freshly initialised" in caplog.text
    assert torch.equal(heads[0], heads[1]) and not torch.equal(heads[0], heads[2])


def test_the_checkpoints_own_order_of_labels_is_kept(tmp_path: Path) -> None:
    names = {0: "POS", 1: "NEG"}
    source = open_source(str(make_model("sequence", tmp_path, id2label=names, label2id={"POS": 0, "NEG": 1})))
    for labels, order in ((["neg", "pos"], ["pos", "neg"]), (["NEG"], ["POS", "NEG"]), ([0, 1], ["POS", "NEG"])):
        rows = rows_of([{"text": "good", "label": label} for label in labels])
        task, _ = resolve("classification", rows, source)
        assert task.labels == order
        task.check(rows)


def test_templates_name_columns(models: dict[str, Path]) -> None:
    rows = rows_of([{"premise": "the movie", "text": "was good", "label": x} for x in ("bad", "good")])
    source = open_source(str(models["causal"]))
    task, _ = resolve("classification", rows, source, template="{premise} {text} {{very}}: {label}")
    assert task.text(rows[0]) == "the movie was good {very}: "
    for template, message in (
        ("{text}", "must end with {label}"),
        ("{label} {text}", "must end with {label}"),
        ("{label}", "no field for the text"),
        ("{text", "malformed"),
        ("{} {label}", "a field must be a column's name"),
    ):
        with pytest.raises(ZOError, match=message):
            resolve("classification", rows, source, template=template)
    with pytest.raises(ZOError, match="no column 'summary'"):
        resolve("classification", rows, source, template="{summary} {label}")[0].check(rows)


def test_the_end_of_a_long_prompt_is_what_stays(models: dict[str, Path]) -> None:
    source = open_source(str(models["causal"]))
    rows = rows_of([{"text": "movie " * 100 + "bad", "label": x} for x in ("bad", "good")])
    task, _ = resolve("classification", rows, source, max_length=10)
    examples = task.examples(rows, source)
    assert examples.truncated == 2 and examples.lengths == [9, 9]
    tokens = source.tokenizer.convert_ids_to_tokens(examples.items[0]["input_ids"])
    assert tokens[0] == "<s>" and tokens[-3] == "bad" and tokens[-1] == ":"


# --- language modelling -------------------------------------------------------------------------------------------


def lm(
    values: list[dict[str, Any]], max_length: int = 64, chat: str | None = None, end_of_text: bool = False
) -> tuple[Any, Any]:
    tokenizer = make_tokenizer("causal")
    tokenizer.chat_template = chat
    source = Source("tiny", None, tokenizer)
    layout = "messages" if "messages" in values[0] else "prompt" if "prompt" in values[0] else "text"
    column = "messages" if layout == "messages" else "text"
    return LanguageModelling(layout, column, max_length, end_of_text).examples(rows_of(values), source), tokenizer


def learned(item: dict[str, Any], tokenizer: Any) -> list[str]:
    return tokenizer.convert_ids_to_tokens([label for label in item["labels"] if label != -100])


def test_the_end_is_a_label_even_where_it_is_the_padding() -> None:
    texts = [{"text": "good movie"}, {"text": "the plot was very bad"}]
    examples, tokenizer = lm(texts)
    assert learned(examples.items[0], tokenizer) == ["<s>", "good", "movie"]  # plain text may go on
    examples, tokenizer = lm(texts, end_of_text=True)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    batch = Collator(tokenizer.pad_token_id)(examples.items)
    assert batch["input_ids"].shape == (2, 7)
    for row, length in zip(range(2), examples.lengths, strict=True):
        assert batch["labels"][row, length - 1] == tokenizer.eos_token_id
        assert (batch["labels"][row, length:] == -100).all()
        assert batch["attention_mask"][row].sum() == length


@pytest.mark.parametrize(("longest", "count"), [(1, 8), (7, 8), (8, 8), (9, 8), (100, 8), (513, 3)])
def test_lengths_are_few_and_even(longest: int, count: int) -> None:
    lengths = even_lengths(longest, count)
    steps = [b - a for a, b in zip((0, *lengths), lengths, strict=False)]
    assert len(lengths) <= count and lengths[-1] == longest
    assert set(steps[:-1]) <= {steps[0]} and 0 < steps[-1] <= steps[0]


@pytest.mark.parametrize("side", ("left", "right"))
def test_batches_are_padded_to_the_next_of_the_lengths(side: str) -> None:
    collator = Collator(9, side, lengths=(2, 5))
    for rows, length in (([[1]], 2), ([[1, 2], [3]], 2), ([[1, 2, 3]], 5), ([[1] * 7], 7)):
        batch = collator([{"input_ids": row, "labels": row} for row in rows])
        assert {tuple(tensor.shape) for tensor in batch.values()} == {(len(rows), length)}
        for i, row in enumerate(rows):
            held = batch["attention_mask"][i].bool()
            assert held.tolist() == sorted(held.tolist(), reverse=side == "right")
            assert batch["input_ids"][i][held].tolist() == batch["labels"][i][held].tolist() == row
            assert (batch["labels"][i][~held] == -100).all()


def test_a_prompt_is_masked_and_cut_first() -> None:
    row = {"prompt": "the movie was very very very", "completion": " good film"}
    examples, tokenizer = lm([row])
    assert learned(examples.items[0], tokenizer) == ["good", "film", "</s>"]
    examples, tokenizer = lm([row], max_length=6)
    assert examples.truncated == 1
    assert tokenizer.convert_ids_to_tokens(examples.items[0]["input_ids"]) == [
        "<s>",
        "very",
        "very",
        "good",
        "film",
        "</s>",
    ]
    assert learned(examples.items[0], tokenizer) == ["good", "film", "</s>"]


def test_rows_with_nothing_to_learn_are_dropped_and_counted() -> None:
    examples, _ = lm([{"prompt": "the", "completion": ""}, {"prompt": "the", "completion": " plot"}])
    assert len(examples) == 1 and examples.dropped == 1


def test_fit_cuts_the_prompt_then_the_end() -> None:
    ids, labels = [1, 2, 3, 4, 5], [-100, -100, 3, 4, 5]
    assert truncate(ids, labels, 5, 1) == (ids, labels)
    assert truncate(ids, labels, 4, 1) == ([1, 3, 4, 5], [-100, 3, 4, 5])
    assert truncate(ids, labels, 4) == ([2, 3, 4, 5], [-100, 3, 4, 5])
    assert truncate(ids, labels, 2) == ([3, 4], [3, 4])
    assert truncate(ids, ids, 2, 1) == ([1, 2], [1, 2])


CHAT = (
    "{% for m in messages %}{{ m.role + ' : ' + m.content }}{% if m.role == 'assistant' %}{{ eos_token }}{% endif %} "
    "{% endfor %}{% if add_generation_prompt %}assistant : {% endif %}"
)


def test_the_assistants_turns_are_learned() -> None:
    turns = [("user", "good movie"), ("assistant", "very good"), ("user", "plot"), ("assistant", "bad plot")]
    messages = [{"role": role, "content": content} for role, content in turns]
    examples, tokenizer = lm([{"messages": messages}], chat=CHAT)
    assert learned(examples.items[0], tokenizer) == ["very", "good", "</s>", "bad", "plot", "</s>"]
    with pytest.raises(ZOError, match="no chat template"):
        lm([{"messages": messages}])
    for bad, message in ((None, "not a list of messages"), ([{"role": "user"}], "content of a message")):
        with pytest.raises(ZOError, match=message):
            lm([{"messages": bad}], chat=CHAT)


# --- opening models -----------------------------------------------------------------------------------------------


def test_the_window_is_the_least_that_is_said(models: dict[str, Path]) -> None:
    assert open_source(str(models["encoder"])).window == 32
    assert open_source(str(models["causal"])).window == 64


def test_directories_that_are_no_model(tmp_path: Path, models: dict[str, Path]) -> None:
    with pytest.raises(ZOError, match="no such model directory"):
        open_source("./nowhere")
    with pytest.raises(ZOError, match=r"no config\.json"):
        open_source(str(tmp_path))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ZOError, match="holds no weights"):
        open_source(str(tmp_path))


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError("You are trying to access a gated repo."), "gated or private.*HF_TOKEN"),
        (OSError("We couldn't connect to the hub"), "could not be loaded from the hub.*HF_TOKEN"),
        (ValueError("Please pass the argument `trust_remote_code=True`"), "--trust-remote-code"),
    ],
)
def test_hub_failures_are_one_sentence(monkeypatch: pytest.MonkeyPatch, error: Exception, message: str) -> None:
    import transformers

    def refuse(*args: Any, **options: Any) -> None:
        raise error

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", refuse)
    with pytest.raises(ZOError, match=message) as caught:
        open_source("someone/model")
    assert "\n" not in str(caught.value)


@pytest.mark.slow  # three compilations
@pytest.mark.parametrize("kind", ["sequence", "causal", "encoder"])
def test_forms_compile_to_the_same_losses(models: dict[str, Path], kind: str) -> None:
    import zowrap

    results = []
    for engine in ("eager", "compiled"):
        task, _, model, batch = build(models, kind)
        zm = zowrap.zo_wrap(model, loss_fn=task.loss_fn, engine=engine, trainable=task.default_trainable(model))
        results.append([zm.step(**batch).losses, zm.step(**{n: v[:5] for n, v in batch.items()}).losses])
    for eager, compiled in zip(*results, strict=True):
        assert torch.allclose(eager, compiled, rtol=1e-5)


def test_float32_is_taken_where_it_fits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoModel

    from zowrap.tasks import loading
    from zowrap.tasks.loading import choose_dtype

    make_model("encoder", tmp_path)
    AutoModel.from_pretrained(tmp_path, dtype=torch.bfloat16).save_pretrained(tmp_path)
    source = open_source(str(tmp_path))
    assert choose_dtype(None, source)[0] is torch.float32
    assert choose_dtype("auto", source)[0] is torch.bfloat16
    assert choose_dtype("float16", source)[0] is torch.float16
    monkeypatch.setattr(loading, "free_memory", lambda: 1000)
    dtype, why = choose_dtype(None, source)
    assert dtype is torch.bfloat16 and "the checkpoint's" in why
    with pytest.raises(ZOError, match="did you mean 'float32'"):
        choose_dtype("float23", source)


# --- label vectors ---------------------------------------------------------------------------------------------------


def vector_run(zowrap_cli, models, data, out, *more):
    command = ("tune", models["encoder"], "--head", "vectors", "--data", data["train"], "--eval-data", data["test"])
    return zowrap_cli(*command, "--steps", 12, "--batch-size", 8, "--queries", 4, "--lr", "2e-2", "--engine", "eager",
                      "--out", out, "--json", *more)  # fmt: skip


def test_label_vectors_begin_as_the_names_and_alone_move(zowrap_cli, models, data, tmp_path) -> None:
    from safetensors.torch import load_file

    names = zowrap_cli("eval", models["encoder"], "--data", data["test"], "--head", "sentence", "--json").json
    vectors = zowrap_cli("eval", models["encoder"], "--data", data["test"], "--head", "vectors", "--json").json
    assert vectors["loss"] == pytest.approx(names["loss"], rel=1e-5) and vectors["accuracy"] == names["accuracy"]

    run = tmp_path / "run"
    tuned = vector_run(zowrap_cli, models, data, run)
    assert tuned.code == 0, tuned.err
    assert tuned.json["loss"] < tuned.json["loss_before"] == pytest.approx(names["loss"], rel=1e-5)
    base, after = load_file(models["encoder"] / "model.safetensors"), load_file(run / "model.safetensors")
    assert base.keys() == after.keys() and all(base[name].equal(after[name]) for name in base)
    assert load_file(run / "label_vectors.safetensors")["weight"].shape == (2, 16)
    again = zowrap_cli("eval", run, "--data", data["test"], "--json").json
    assert again["loss"] == pytest.approx(tuned.json["loss"], rel=1e-5)


def test_label_vectors_are_exported_replayed_and_go_on(zowrap_cli, models, data, tmp_path) -> None:
    from safetensors.torch import load_file

    run, whole = tmp_path / "run", tmp_path / "whole"
    assert vector_run(zowrap_cli, models, data, whole, "--test-data", data["test"]).code == 0
    assert vector_run(zowrap_cli, models, data, run).code == 0
    for command in (
        ("export", run, "--to", tmp_path / "to"),
        ("replay", models["encoder"], run, "--to", tmp_path / "re"),
    ):
        assert zowrap_cli(*command).code == 0
    last = load_file(run / "checkpoint-12" / "zo_state.safetensors")
    made = load_file(tmp_path / "re" / "label_vectors.safetensors")["weight"]
    kept = last.get("weights/vectors.weight", load_file(run / "checkpoint-12" / "label_vectors.safetensors")["weight"])
    assert made.equal(kept)
    best = load_file(run / "label_vectors.safetensors")["weight"]
    assert load_file(tmp_path / "to" / "label_vectors.safetensors")["weight"].equal(best)
    assert load_file(whole / "label_vectors.safetensors")["weight"].equal(best)
    # An exported folder says by itself what it holds.
    told = zowrap_cli("eval", tmp_path / "to", "--data", data["test"], "--json").json
    assert told["loss"] == pytest.approx(zowrap_cli("eval", run, "--data", data["test"], "--json").json["loss"])
    # From an exported folder a new run goes on with the vectors, whatever the order of the labels.
    for labels in ("bad,good", "good,bad"):
        told = zowrap_cli(
            "eval", tmp_path / "to", "--head", "vectors", "--labels", labels, "--data", data["test"], "--json"
        )
        assert told.json["loss"] == pytest.approx(
            zowrap_cli("eval", run, "--data", data["test"], "--json").json["loss"]
        )
    told = zowrap_cli("eval", tmp_path / "to", "--head", "vectors", "--labels", "good,awful", "--data", data["test"])
    assert told.code == 2 and told.err.count("error: ") == 1


@pytest.mark.parametrize("option", ["--use-peft", "--load-in-8bit", "--load-in-4bit"])
def test_label_vectors_go_with_plain_weights_alone(option, zowrap_cli, models, data, tmp_path) -> None:
    told = vector_run(zowrap_cli, models, data, tmp_path / "run", option)
    assert told.code == 2 and "--head vectors" in told.json["error"] and not (tmp_path / "run").exists()


def test_label_vectors_are_replayed_from_what_the_run_began_with(
    zowrap_cli, models, data, tmp_path, monkeypatch
) -> None:
    """On another machine the names' embeddings have other last bits."""
    from safetensors.torch import load_file

    from zowrap.tasks.forms import SentenceForm

    run, made = tmp_path / "run", SentenceForm.embed
    assert vector_run(zowrap_cli, models, data, run).code == 0
    monkeypatch.setattr(SentenceForm, "embed", lambda self, *given: made(self, *given) * (1 + 1e-6))
    assert zowrap_cli("replay", models["encoder"], run, "--to", tmp_path / "to").code == 0
    last = load_file(run / "checkpoint-12" / "label_vectors.safetensors")["weight"]
    assert load_file(tmp_path / "to" / "label_vectors.safetensors")["weight"].equal(last)
