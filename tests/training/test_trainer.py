"""The trainer: the Trainer's own scripts run with it, and what it adds holds."""

from __future__ import annotations

import functools
import json
import math
import warnings
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import TrainerCallback, TrainingArguments

from tests.support.crash import CrashAfter
from tests.support.tiny_run import collate, rows, tiny_llama, trainer_in, weights_of
from zowrap.errors import ZOError, ZOWarning
from zowrap.loss.evaluation import evaluate
from zowrap.training.config import ZOConfig
from zowrap.training.run_folder import Run
from zowrap.training.trainer import ZOTrainer

QUIET = {"engine": "eager", "report_to": "none", "disable_tqdm": True}


def journal(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "journal.jsonl").read_text().splitlines()[1:]]


def logs_of(trainer: ZOTrainer) -> list[dict]:
    return [entry for entry in trainer.state.log_history if "loss" in entry]


# --- a script as in the transformers documentation ----------------------------------------------------------------


def tiny_bert_tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["[PAD]", "[UNK]", "good", "bad", "film", "plot", "a", "the", "very"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]")


def test_a_documentation_script_runs_with_the_two_names_swapped(tmp_path):
    datasets = pytest.importorskip("datasets")
    from transformers import AutoModelForSequenceClassification, AutoTokenizer, BertConfig, DataCollatorWithPadding

    texts = [f"{'good' if i % 2 else 'bad'} {'very ' * (i % 3)}{'film' if i % 5 else 'plot'}" for i in range(48)]
    dataset = datasets.Dataset.from_dict({"text": texts, "label": [i % 2 for i in range(48)]})
    dataset = dataset.train_test_split(test_size=0.25, seed=0)
    tokenizer = tiny_bert_tokenizer()
    tokenized = dataset.map(lambda batch: tokenizer(batch["text"], truncation=True), batched=True)
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(
        BertConfig(vocab_size=16, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
    )

    def compute_metrics(eval_pred):
        predictions, labels = eval_pred
        assert predictions.shape == (12, 2)
        return {"accuracy": float((np.argmax(predictions, axis=1) == labels).mean())}

    class Events(TrainerCallback):
        seen: ClassVar[list[str]] = []

        def on_step_end(self, args, state, control, **kwargs):
            self.seen.append("step")

        def on_evaluate(self, args, state, control, metrics=None, **kwargs):
            self.seen.append("evaluate")
            assert 0 <= metrics["eval_accuracy"] <= 1 and metrics["eval_loss"] > 0

        def on_log(self, args, state, control, logs=None, **kwargs):
            self.seen.append("log")

    training_args = ZOConfig(
        output_dir=str(tmp_path / "my_awesome_model"),
        learning_rate=2e-2,
        per_device_train_batch_size=12,
        per_device_eval_batch_size=5,
        num_train_epochs=25,
        weight_decay=0.01,
        eval_strategy="epoch",
        save_strategy="epoch",
        load_best_model_at_end=True,
        **QUIET,
    )
    trainer = ZOTrainer(
        model=model,
        args=training_args,
        train_dataset=tokenized["train"],
        eval_dataset=tokenized["test"],
        processing_class=tokenizer,
        data_collator=DataCollatorWithPadding(tokenizer=tokenizer),
        compute_metrics=compute_metrics,
        callbacks=[Events()],
    )
    output = trainer.train()
    assert output.global_step == 75 and Events.seen.count("step") == 75 and Events.seen.count("evaluate") == 25 + 1
    assert "log" in Events.seen
    losses = [record["losses"] for record in journal(tmp_path / "my_awesome_model")]
    assert np.mean(losses[-10:]) < np.mean(losses[:10])
    metrics = trainer.evaluate()
    assert metrics["eval_accuracy"] == 1.0 and metrics["eval_loss"] == trainer.best_metric

    reloaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "my_awesome_model")
    texts = AutoTokenizer.from_pretrained(tmp_path / "my_awesome_model")(list(dataset["test"]["text"]), padding=True)
    inputs = {name: torch.tensor(texts[name]) for name in ("input_ids", "attention_mask")}
    predicted = reloaded(**inputs).logits.argmax(-1)
    assert (predicted == torch.tensor(dataset["test"]["label"])).float().mean() == metrics["eval_accuracy"]
    predictions = trainer.predict(tokenized["test"])
    assert predictions.predictions.shape == (12, 2) and predictions.metrics["test_accuracy"] == 1.0


# --- a step ---------------------------------------------------------------------------------------------------------


class InOrder(ZOTrainer):
    """Rows in the order of the data set, so that batches can be compared."""

    def _get_train_sampler(self, train_dataset=None):
        return torch.utils.data.SequentialSampler(self.train_dataset)


def one_step(folder, size: int, accumulated: int, **options):
    args = ZOConfig(
        output_dir=str(folder),
        max_steps=2,
        per_device_train_batch_size=size,
        gradient_accumulation_steps=accumulated,
        save_strategy="no",
        learning_rate=1e-3,
        **QUIET,
        **options,
    )
    trainer = InOrder(tiny_llama(), args, collate, rows(32))
    trainer.train()
    return trainer


@pytest.mark.parametrize("estimator", ["central", "forward"])
def test_four_times_four_rows_of_unequal_length_are_sixteen(tmp_path, estimator):
    one_step(tmp_path / "a", 16, 1, estimator=estimator)
    one_step(tmp_path / "b", 4, 4, estimator=estimator)
    first, second = journal(tmp_path / "a")[0], journal(tmp_path / "b")[0]
    for whole, summed in zip(first["losses"], second["losses"], strict=True):
        assert summed == pytest.approx(whole, rel=1e-5)
    lengths = [len(row["input_ids"]) for row in rows(32)]
    assert len(set(lengths[:16])) > 3


def test_equal_projected_gradients_give_bitwise_equal_weights(tmp_path):
    trainers = []
    for size, accumulated in ((16, 1), (4, 4)):
        folder = tmp_path / str(size)
        trainer = trainer_in(folder, eval_dataset=None, save_strategy="no", per_device_train_batch_size=size)
        trainer.args.gradient_accumulation_steps = accumulated
        update = trainer.zm.update
        trainer.zm.update = lambda update=update: update(projected_grad=torch.tensor(0.25))
        trainer.train()
        trainers.append(folder)
    first, second = (weights_of(folder) for folder in trainers)
    assert all(first[name].equal(second[name]) for name in first)


def test_a_run_is_the_same_as_stepping_by_hand(tmp_path):
    import zowrap

    trainer = one_step(tmp_path, 16, 1)
    zm = zowrap.zo_wrap(tiny_llama(), lr=1e-3, seed=42, engine="eager")
    for start in (0, 16):
        zm.step(**collate(rows(32)[start : start + 16]))
    for mine, theirs in zip(zm.parameters, trainer.zm.parameters, strict=True):
        assert mine.tensor.equal(theirs.tensor)


def test_no_gradient_and_no_training_mode(tmp_path):
    model = tiny_llama(attention_dropout=0.5)
    trainer = trainer_in(tmp_path, model, max_steps=3)
    trainer.train()
    assert all(parameter.grad is None for parameter in model.parameters())
    batch = collate(rows()[:4])
    assert trainer.zm.loss(**batch) == trainer.zm.loss(**batch)


@pytest.mark.parametrize("name", ["linear", "cosine", "constant_with_warmup"])
def test_the_schedule_drives_the_learning_rate(tmp_path, name):
    trainer = trainer_in(tmp_path, lr_scheduler_type=name, warmup_steps=4, max_steps=12, eval_dataset=None)
    trainer.train()
    used = [record["lr"] for record in journal(tmp_path)]
    from transformers import get_scheduler

    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1e-3)
    schedule = get_scheduler(name, optimizer, num_warmup_steps=4, num_training_steps=12)
    for lr in used:
        assert lr == optimizer.param_groups[0]["lr"]
        optimizer.step()
        schedule.step()
    assert used[0] == 0 and max(used) == 1e-3


def test_a_callback_may_set_the_learning_rate(tmp_path):
    class Half(TrainerCallback):
        def on_step_begin(self, args, state, control, optimizer=None, **kwargs):
            for group in optimizer.param_groups:
                group["lr"] = 1e-3 / (1 + state.global_step)

    trainer_in(tmp_path, max_steps=3, callbacks=[Half()], eval_dataset=None).train()
    assert [record["lr"] for record in journal(tmp_path)] == [1e-3, 1e-3 / 2, 1e-3 / 3]


def test_a_plateau_schedule_follows_the_evaluations(tmp_path):
    options = {
        "lr_scheduler_type": "reduce_lr_on_plateau",
        "lr_scheduler_kwargs": {"patience": 0, "mode": "min", "threshold": 10.0, "threshold_mode": "abs"},
        "eval_strategy": "steps",
        "eval_steps": 2,
        "save_steps": 4,
    }
    trainer_in(tmp_path / "a", max_steps=8, **options).train()
    used = [record["lr"] for record in journal(tmp_path / "a")]
    assert used[0] == 1e-3 and used[-1] < used[4] < 1e-3


def test_any_module_trains_with_a_loss_function(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
    x = torch.randn(64, 4)
    data = [{"x": row, "y": row.sum().reshape(1)} for row in x]
    args = ZOConfig(output_dir=str(tmp_path), max_steps=100, learning_rate=2e-2, **QUIET)
    trainer = ZOTrainer(
        model,
        args,
        train_dataset=data,
        eval_dataset=data,
        loss_fn=lambda model, batch: (model(batch["x"]) - batch["y"]).square().mean(-1),
        batch_metrics=lambda output, batch: {"sign": (((output > 0) == (batch["y"] > 0)).sum(), len(output))},
    )
    trainer.train()
    first = next(entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry)
    last = trainer.evaluate()
    assert last["eval_loss"] < 0.5 * first and 0.8 < last["eval_sign"] <= 1
    from safetensors.torch import load_model

    fresh = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
    load_model(fresh, Run(tmp_path).checkpoint(100) / "model.safetensors")
    assert fresh(x).equal(model(x))


# --- evaluation -----------------------------------------------------------------------------------------------------


def test_the_evaluated_loss_weighs_every_token_alike(tmp_path):
    trainer = trainer_in(tmp_path, per_device_eval_batch_size=3)
    by_batches = trainer.evaluate()["eval_loss"]
    model = trainer.model
    sums = counts = 0.0
    for row in rows()[:8]:
        tokens = len(row["input_ids"]) - 1
        with torch.no_grad():
            sums += model(**collate([row])).loss.item() * tokens
        counts += tokens
    assert by_batches == pytest.approx(sums / counts, rel=1e-5)


def test_metrics_of_either_kind_agree_and_only_one_keeps_logits(tmp_path):
    def by_batch(output, batch):
        hits = (output.logits[:, :-1].argmax(-1) == batch["labels"][:, 1:]) & (batch["labels"][:, 1:] != -100)
        return {"hits": (hits.sum(), (batch["labels"][:, 1:] != -100).sum())}

    def at_once(prediction):
        logits, labels = prediction
        counted = labels[:, 1:] != -100
        return {"hits": float(((logits[:, :-1].argmax(-1) == labels[:, 1:]) & counted).sum() / counted.sum())}

    one = trainer_in(tmp_path / "a", batch_metrics=by_batch, per_device_eval_batch_size=3).evaluate()
    two = trainer_in(tmp_path / "b", compute_metrics=at_once, per_device_eval_batch_size=3).evaluate()
    assert one["eval_hits"] == pytest.approx(two["eval_hits"])
    assert one["eval_loss"] == pytest.approx(two["eval_loss"], rel=1e-6)


def test_evaluation_keeps_nothing_of_earlier_batches(tmp_path):
    import weakref

    alive: list[weakref.ref] = []

    def count(output, batch):
        assert sum(ref() is not None for ref in alive) == 0
        alive.append(weakref.ref(output.logits))
        return {"rows": (len(output.logits), 1)}

    trainer_in(tmp_path, batch_metrics=count, per_device_eval_batch_size=1).evaluate()
    assert len(alive) == 8


def test_several_evaluation_sets_and_a_named_metric(tmp_path):
    sets = {"dev": rows()[:4], "test": rows()[4:8]}
    trainer = trainer_in(tmp_path, eval_dataset=sets, metric_for_best_model="eval_dev_loss", max_steps=4)
    trainer.train()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    values = {line["step"]: line["eval_dev_loss"] for line in lines if "eval_dev_loss" in line}
    assert trainer.best_metric == min(values.values()) == values[trainer.best_step]
    assert any("eval_test_loss" in line for line in lines)


def test_evaluation_before_the_first_step_and_ten_times_by_default(tmp_path):
    trainer_in(tmp_path, max_steps=40).train()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "eval_loss" in line] == [0, *range(4, 41, 4)]
    steps = [line for line in lines if "projected_grad" in line]
    assert [line["step"] for line in steps] == list(range(1, 41))
    assert {"step", "loss", "projected_grad", "lr", "seconds"} <= steps[0].keys()


def test_the_function_of_the_command_line_gives_the_same_numbers(tmp_path):
    trainer = trainer_in(tmp_path, per_device_eval_batch_size=3)
    found = evaluate(trainer.model, [collate(rows()[:8][i : i + 3]) for i in (0, 3, 6)])
    assert found["loss"] == trainer.evaluate()["eval_loss"] and found["examples"] == 8


# --- losses that are not finite -------------------------------------------------------------------------------------


def not_finite_from(trainer: ZOTrainer, steps) -> None:
    accumulate = trainer.zm.accumulate

    def broken(**batch):
        loss = accumulate(**batch)
        if trainer.zm.step_count + 1 in steps:
            trainer.zm.accumulator.sums = trainer.zm.accumulator.sums * math.nan
            return loss * math.nan
        return loss

    trainer.zm.accumulate = broken


def test_a_loss_that_is_nan_from_the_start_is_told_at_once(tmp_path):
    trainer = trainer_in(tmp_path)
    not_finite_from(trainer, {1})
    with pytest.raises(ZOError, match="not finite from the start"):
        trainer.train()
    assert Run(tmp_path).recorded_steps() == 0


def test_a_start_that_comes_to_nothing_leaves_nothing_behind(tmp_path):
    for folder in (tmp_path / "new", tmp_path / "kept"):
        if folder.name == "kept":
            (folder / "notes").mkdir(parents=True)
            (folder / "notes" / "mine.txt").write_text("mine")
        trainer = trainer_in(folder)  # evaluates first: the untuned model is then the best one
        not_finite_from(trainer, {1})
        with pytest.raises(ZOError, match="not finite from the start"):
            trainer.train()
        left = [path.name for path in folder.rglob("*")]
        assert sorted(left) == ([] if folder.name == "new" else ["mine.txt", "notes"])
        assert folder.exists() == (folder.name == "kept")
        trainer_in(folder, max_steps=1).train()


def test_skipped_steps_are_counted_left_out_of_the_log_and_change_nothing(tmp_path):
    trainer = trainer_in(tmp_path, logging_steps=8, eval_dataset=None)
    not_finite_from(trainer, {3, 4, 10})
    output = trainer.train()
    records = journal(tmp_path)
    assert [r["step"] + 1 for r in records if r["skipped"]] == [3, 4, 10]
    assert all(math.isfinite(entry["loss"]) for entry in logs_of(trainer)) and math.isfinite(output.training_loss)
    finite = [np.mean(r["losses"]) for r in records[:8] if not r["skipped"]]
    assert logs_of(trainer)[0]["loss"] == pytest.approx(np.mean(finite))
    assert [entry["skipped_steps"] for entry in logs_of(trainer)] == [2, 3, 3]
    assert output.metrics["skipped_steps"] == trainer.skipped_steps == 3


def test_the_first_skipped_step_is_told_and_none_is_counted_where_there_is_none(tmp_path):
    trainer = trainer_in(tmp_path / "a", logging_steps=8, eval_dataset=None)
    not_finite_from(trainer, {3, 4})
    with pytest.warns(ZOWarning, match=r"step 3 was skipped.*a smaller lr or eps") as caught:
        trainer.train()
    assert len([each for each in caught if "skipped" in str(each.message)]) == 1
    quiet = trainer_in(tmp_path / "b", max_steps=4, eval_dataset=None)
    assert quiet.train().metrics["skipped_steps"] == 0
    assert not any("skipped_steps" in entry for entry in quiet.state.log_history)


def test_a_resumed_run_counts_the_skipped_steps_of_the_whole_run(tmp_path):
    trainer = trainer_in(tmp_path, callbacks=[CrashAfter(12)])
    not_finite_from(trainer, {3, 4, 10})
    with pytest.raises(RuntimeError):
        trainer.train()
    again = trainer_in(tmp_path)
    not_finite_from(again, {15})
    assert again.train(resume_from_checkpoint=True).metrics["skipped_steps"] == 4
    finished = trainer_in(tmp_path)
    assert finished.train(resume_from_checkpoint=True).metrics["skipped_steps"] == 4


def test_a_run_whose_last_steps_were_all_skipped_has_failed(tmp_path):
    trainer = trainer_in(tmp_path, eval_dataset=None, save_steps=8)
    not_finite_from(trainer, range(20, 25))
    with pytest.raises(ZOError, match=r"the run failed: the last 5 steps were all skipped, up to step 24.*smaller lr"):
        trainer.train()
    status = Run(tmp_path).status()
    assert status["state"] == "failed" and "the last 5 steps" in status["reason"] and status["step"] == 24
    assert Run(tmp_path).recorded_steps() == 24 and not list(tmp_path.glob("*.safetensors"))
    again = trainer_in(tmp_path, eval_dataset=None, save_steps=8)
    not_finite_from(again, range(20, 25))
    with pytest.raises(ZOError, match="the last 5 steps were all skipped"):
        again.train(resume_from_checkpoint=True)
    few = trainer_in(tmp_path / "few", eval_dataset=None)
    not_finite_from(few, range(21, 25))
    few.train()
    assert Run(tmp_path / "few").status()["state"] == "finished"


class Breaks(TrainerCallback):
    """Makes a weight infinite after a step, without a loss that shows it."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            with torch.no_grad():
                kwargs["model"].unused.fill_(math.inf)


def test_weights_that_are_not_finite_are_never_written_as_a_result(tmp_path):
    def trainer_of(folder, step, **options):
        model = tiny_llama()
        model.unused = nn.Parameter(torch.ones(3))
        return trainer_in(folder, model, callbacks=[Breaks(step)], save_steps=8, **options)

    trainer = trainer_of(tmp_path / "a", 10)
    with pytest.raises(ZOError, match=r"after step 1[0-6] the weights are not finite \(unused\).*the model of step"):
        trainer.train()
    run = Run(tmp_path / "a")
    assert run.checkpoints() == [8] and run.status()["state"] == "failed"
    assert all(bool(tensor.isfinite().all()) for tensor in weights_of(run.path).values())
    last = trainer_of(tmp_path / "b", 24, eval_dataset=None, save_strategy="no")
    with pytest.raises(ZOError, match="after step 24 the weights are not finite"):
        last.train()
    assert not list((tmp_path / "b").glob("*.safetensors"))


def test_a_model_that_is_not_finite_is_refused_before_anything_is_written(tmp_path):
    model = tiny_llama()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 2] = math.nan
    model.model.layers[1].mlp.up_proj.weight.requires_grad_(False)  # what does not move counts as well
    trainer = trainer_in(tmp_path / "run", model)
    with (
        pytest.warns(ZOWarning, match=r"up_proj\.weight holds 1 values"),
        pytest.raises(ZOError, match=r"not finite.*; the model.s own model\.layers\.1\.mlp\.up_proj"),
    ):
        trainer.train()
    assert not (tmp_path / "run").exists()


def test_a_row_without_a_loss_is_told_before_the_first_step(tmp_path):
    data = [{"x": torch.full((4,), float(i))} for i in range(1, 9)]
    dev = [*data[:2], {"x": torch.full((4,), math.nan)}, *data]

    def loss_fn(model, batch):
        return model(batch["x"]).square().mean(-1)

    args = ZOConfig(output_dir=str(tmp_path / "run"), max_steps=4, learning_rate=1e-3, **QUIET)
    trainer = ZOTrainer(nn.Linear(4, 1), args, train_dataset=data, eval_dataset=dev, loss_fn=loss_fn)
    with pytest.raises(ZOError, match="before the first step gives a loss that is not finite, first in row 2 of"):
        trainer.train()
    assert not (tmp_path / "run").exists()


def test_an_evaluation_that_ends_without_a_loss_has_failed(tmp_path):
    seen = []

    def loss_fn(model, batch):
        seen.append(0)
        loss = model(batch["x"]).square().mean(-1)
        return loss if len(batch["x"]) != 7 or len(seen) == 1 else loss / 0

    data = [{"x": torch.full((4,), float(i))} for i in range(1, 8)]
    options = {"per_device_train_batch_size": 2, "per_device_eval_batch_size": 7, "eval_steps": 4}
    args = ZOConfig(output_dir=str(tmp_path), max_steps=4, learning_rate=1e-3, **options, **QUIET)
    trainer = ZOTrainer(nn.Linear(4, 1), args, train_dataset=data, eval_dataset=data, loss_fn=loss_fn)
    with pytest.raises(
        ZOError, match=r"the evaluation at step 4 gave a loss that is not finite.*model of step 0 is kept"
    ):
        trainer.train()
    assert weights_of(tmp_path)


@pytest.mark.parametrize("lr", [1e-3, "auto"])
def test_labels_that_name_no_class_are_refused_by_row(tmp_path, lr):
    from transformers import BertConfig, BertForSequenceClassification

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    good = [{"input_ids": [1, 2, 3, 4 + i], "attention_mask": [1] * 4, "labels": i % 2} for i in range(8)]
    bad = [*good[:5], {**good[5], "labels": 2}, *good[6:]]

    def trainer_of(train, dev=None):
        model = BertForSequenceClassification(BertConfig(vocab_size=32, num_labels=2, **sizes))
        args = ZOConfig(output_dir=str(tmp_path / "run"), max_steps=4, learning_rate=lr, **QUIET)
        return ZOTrainer(model, args, train_dataset=train, eval_dataset=dev)

    for train, dev, what in ((bad, None, "training"), (good, bad, "evaluation")):
        with pytest.raises(
            ZOError, match=f"label 2 of the {what} data names no class, in row 5 .*has 2, numbered from 0"
        ):
            trainer_of(train, dev).train()
        assert not (tmp_path / "run").exists()
    ignored = [*good[:5], {**good[5], "labels": -100}, *good[6:]]
    trainer = trainer_of(ignored)
    trainer.train()
    trainer.refuse_wrong_labels()
    trainer.train_dataset, trainer._wrong_labels = bad, torch.tensor(True)  # as an accelerator leaves it
    with pytest.raises(ZOError, match="label 2 of the training data names no class, in row 5"):
        trainer._writer.flush()


def test_each_evaluation_is_compared_row_by_row_with_the_first(tmp_path):
    trainer_in(tmp_path, max_steps=20, learning_rate=1e-2).train()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    first, *later = [line["eval_rows"]["loss"] for line in lines if "eval_loss" in line]
    assert first["rows"] == 8 and first["better"] == first["worse"] == 0
    assert all(each["better"] + each["worse"] <= 8 for each in later) and any(each["better"] for each in later)
    means = [line["eval_loss"] for line in lines if "eval_loss" in line]
    assert all(
        each["interval"][0] < mean < each["interval"][1] for each, mean in zip([first, *later], means, strict=True)
    )
    kept = Run(tmp_path).before()["eval"]["rows"]["loss"]
    assert len(kept["sums"]) == 8 and sum(kept["sums"]) / sum(kept["counts"]) == pytest.approx(means[0])


def test_metrics_by_row_are_summed_and_others_with_axes_refused(tmp_path):
    def by_row(output, batch):
        hits = (output.logits[:, :-1].argmax(-1) == batch["labels"][:, 1:]) & (batch["labels"][:, 1:] != -100)
        counted = batch["labels"][:, 1:] != -100
        return {"hits": (hits.sum(-1), counted.sum(-1))}

    def summed(output, batch):
        (hits, counted) = by_row(output, batch)["hits"]
        return {"hits": (hits.sum(), counted.sum())}

    one = trainer_in(tmp_path / "a", batch_metrics=by_row, per_device_eval_batch_size=3).evaluate()
    two = trainer_in(tmp_path / "b", batch_metrics=summed, per_device_eval_batch_size=3).evaluate()
    assert one["eval_hits"] == two["eval_hits"]
    with pytest.raises(ZOError, match="an entry per row"):
        trainer_in(tmp_path / "c", batch_metrics=lambda output, batch: {"hits": (torch.ones(3, 2), 1)}).evaluate()


def test_too_many_skipped_steps_in_a_row_end_the_run(tmp_path):
    trainer = trainer_in(tmp_path, max_skipped=5)
    not_finite_from(trainer, {3, *range(6, 25)})
    with pytest.raises(ZOError, match=r"5 steps in a row.*up to step 10"):
        trainer.train()
    assert Run(tmp_path).recorded_steps() == 10
    again = trainer_in(tmp_path, max_skipped=20)
    again.train(resume_from_checkpoint=True)
    assert again.resumed_from > 0 and again.state.global_step == 24


# --- options --------------------------------------------------------------------------------------------------------


def test_what_is_unset_follows_the_rule():
    config = ZOConfig(output_dir="x", rule="zo_sgd", report_to="none")
    assert config.learning_rate == config.rule_object().lr
    assert config.lr_scheduler_type == "constant" and config.max_grad_norm == 0 and config.save_total_limit == 1
    assert config.eval_strategy == "no"
    assert ZOConfig(output_dir="x", seed=0).data_seed == 0


def parsed(*arguments: str) -> ZOConfig:
    from transformers import HfArgumentParser

    always = ("--output_dir", "x", "--report_to", "none")
    (config,) = HfArgumentParser(ZOConfig).parse_args_into_dataclasses([*always, *arguments])
    return config


def test_the_options_can_be_parsed_from_a_command_line():
    config = parsed()
    for name in ("blocks", "trainable", "rule_options", "direction", "queries", "estimator", "engine"):
        assert getattr(config, name) is None
    config = parsed("--blocks", "layer", "--rule_options", '{"beta": 0.5}', "--trainable", "*q_proj*", "*v_proj*")
    assert config.blocks == "layer" and config.trainable == ["*q_proj*", "*v_proj*"]
    assert config.rule_options == {"beta": 0.5} and config.rule_object().hyper["beta"] == 0.5
    config = parsed("--blocks", "layers.0", "layers.1", "--queries", "3", "--save_steps", "5", "--overwrite")
    assert config.blocks == ["layers.0", "layers.1"] and config.queries == 3
    assert config.save_steps == 5 and config.overwrite
    for wrong in ("beta=0.5", "[1]"):
        with pytest.raises(ZOError, match="rule_options must be a dictionary"):
            parsed("--rule_options", wrong)


def test_a_rule_without_further_options_probes_as_it_wants_to(tmp_path):
    trainer = trainer_in(tmp_path, rule="fzoo", max_steps=2, eval_dataset=None)
    trainer.train()
    header = json.loads((tmp_path / "journal.jsonl").read_text().splitlines()[0])
    default = trainer.args.rule_object().defaults
    assert (header["direction"], header["estimator"]) == (default.direction, default.estimator)
    assert header["queries"] == default.queries and default.estimator == "forward"


def test_a_warm_up_is_made_whatever_the_schedule_that_is_left_open(tmp_path):
    """The Trainer's own default has one, and the constant schedule that takes its place has none."""
    trainer = trainer_in(tmp_path, warmup_steps=4, max_steps=6, eval_dataset=None)
    trainer.train()
    rates = [record["lr"] for record in journal(tmp_path)]
    assert rates == pytest.approx([trainer.args.learning_rate * share for share in (0, 0.25, 0.5, 0.75, 1, 1)])


def test_what_is_set_stays_even_if_it_is_the_trainers_default():
    config = ZOConfig(output_dir="x", learning_rate=5e-5, lr_scheduler_type="linear", logging_steps=500, save_steps=500)
    assert (config.learning_rate, config.lr_scheduler_type) == (5e-5, "linear")
    assert (config.logging_steps, config.save_steps) == (500, 500)


@pytest.mark.parametrize(
    "option",
    [
        {"max_grad_norm": 1.0},
        {"gradient_checkpointing": True},
        {"torch_compile": True},
        {"torch_compile_mode": "reduce-overhead"},
        {"torch_compile_backend": "eager"},
        {"optim": "adamw_torch"},
        {"use_liger_kernel": True},
        {"push_to_hub": True},
    ],
)
def test_options_without_meaning_are_ignored_with_one_sentence(option):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        config = ZOConfig(output_dir="x", report_to="none", **option)
    name = next(iter(option))
    assert [str(w.message).split(" is ignored")[0] for w in caught if "is ignored" in str(w.message)] == [name]
    assert name == "optim" or not getattr(config, name)


@pytest.mark.parametrize(
    ("option", "named"),
    [
        ({"optim": "adafactor"}, "optim='adafactor'"),
        ({"adam_beta1": 0.5}, "adam_beta1"),
        ({"adam_epsilon": 1e-3}, "adam_epsilon"),
        ({"debug": "underflow_overflow"}, "debug"),
        ({"ddp_backend": "gloo"}, "ddp_backend"),
        ({"lr_scheduler_type": "constant", "warmup_steps": 5}, "constant_with_warmup"),
        ({"lr_scheduler_type": "reduce_lr_on_plateau", "warmup_steps": 0.1}, "warmup_steps"),
        ({"fp16": True}, "fp16"),
        ({"bf16": True}, "bfloat16"),
        ({"deepspeed": {"a": 1}}, "deepspeed"),
        ({"fsdp": "full_shard"}, "fsdp"),
        ({"auto_find_batch_size": True}, "per_device_train_batch_size"),
        ({"rule": "meazzo"}, "did you mean 'meazo'"),
        ({"rule_options": {"betta": 1}}, "did you mean 'beta'"),
        ({"engine": "eagre"}, "did you mean 'eager'"),
        ({"eps": 0.0}, "eps"),
        ({"eps": math.nan}, "eps"),
        ({"learning_rate": -1.0}, "lr"),
        ({"learning_rate": math.inf}, "lr"),
        ({"max_skipped": 0}, "max_skipped"),
        ({"save_every": 5, "save_steps": 6}, "save_every"),
    ],
)
def test_options_that_would_make_it_another_training_are_refused(option, named):
    with pytest.raises(ZOError) as error:
        ZOConfig(output_dir="x", **option)
    assert named in str(error.value)


def test_plain_training_arguments_and_optimisers_are_refused(tmp_path):
    with pytest.raises(ZOError, match="ZOConfig"):
        ZOTrainer(tiny_llama(), TrainingArguments(output_dir=str(tmp_path)))
    with pytest.raises(ZOError, match="optimizers"):
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))])
        ZOTrainer(tiny_llama(), ZOConfig(output_dir=str(tmp_path)), optimizers=(optimizer, None))
    with pytest.raises(ZOError, match="nothing is left to tune"):
        ZOTrainer(tiny_llama(), ZOConfig(output_dir=str(tmp_path), trainable=["*nothing*"]))


def test_several_visible_gpus_one_is_used_and_said(monkeypatch):
    own = TrainingArguments.__dict__["_setup_devices"]

    def four(self):
        device = own.func(self)
        self._n_gpu = 4
        return device

    patched = functools.cached_property(four)
    patched.__set_name__(TrainingArguments, "_setup_devices")
    monkeypatch.setattr(TrainingArguments, "_setup_devices", patched)
    with pytest.warns(ZOWarning, match="4 GPUs are visible, one is used"):
        config = ZOConfig(output_dir="x", report_to="none")
    assert config.n_gpu == 1 and config.train_batch_size == config.per_device_train_batch_size


def test_trackers_are_fed(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trainer = trainer_in(tmp_path, report_to="tensorboard", max_steps=4, logging_steps=1)
    trainer.train()
    (events,) = {path.parent for path in tmp_path.rglob("events.out*")}
    found = EventAccumulator(str(events)).Reload().Tags()["scalars"]
    assert {"train/loss", "train/projected_grad", "train/learning_rate", "eval/loss"} <= set(found)


# --- methods of the Trainer that a subclass overrides ----------------------------------------------------------------


def test_an_overridden_prediction_step_evaluates(tmp_path: Path) -> None:
    class Mine(ZOTrainer):
        called = 0

        def prediction_step(self, *args, **kwargs):  # type: ignore[no-untyped-def]
            Mine.called += 1
            return super().prediction_step(*args, **kwargs)

    args = ZOConfig(output_dir=str(tmp_path), per_device_eval_batch_size=4, **QUIET)
    mine = Mine(tiny_llama(), args, collate, rows(), eval_dataset=rows()[:8]).evaluate()["eval_loss"]
    assert Mine.called == 2
    assert mine == pytest.approx(trainer_in(tmp_path, per_device_eval_batch_size=4).evaluate()["eval_loss"], rel=1e-6)
    with pytest.raises(ZOError, match=r"prediction_step .* batch_metrics="):
        Mine(tiny_llama(), args, collate, batch_metrics=lambda output, batch: {})


def test_the_models_own_folder_is_not_trained_into(tmp_path: Path) -> None:
    model = tiny_llama()
    model.save_pretrained(tmp_path / "base")
    loaded = type(model).from_pretrained(tmp_path / "base")
    (tmp_path / "alias").symlink_to(tmp_path / "base", target_is_directory=True)
    with pytest.raises(ZOError, match="the model's own folder"):
        trainer_in(tmp_path / "alias", loaded, overwrite=True).train()


def test_steps_with_the_same_accuracy_are_told_apart_by_the_loss(tmp_path: Path) -> None:
    def metrics(output, batch):
        return {"accuracy": (torch.ones(len(batch["labels"])), torch.ones(len(batch["labels"])))}

    trainer = trainer_in(tmp_path, batch_metrics=metrics, learning_rate=3e-3)
    trainer.train()
    lines = [line for _, _, line in trainer.run.metrics.read() if "eval_loss" in line]
    assert len({line["eval_accuracy"] for line in lines}) == 1
    assert trainer.best_step == min(lines, key=lambda line: line["eval_loss"])["step"] > 0


def test_a_checkpoint_whose_weights_broke_is_not_taken_for_a_broken_base_model(tmp_path: Path) -> None:
    trainer_in(tmp_path, eval_dataset=None, max_steps=8).train()
    file = Run(tmp_path).checkpoint(8) / "model.safetensors"
    tensors = load_file(file)
    next(iter(tensors.values())).view(-1)[0] = math.nan
    save_file(tensors, file, metadata={"format": "pt"})
    again = trainer_in(tmp_path, eval_dataset=None, max_steps=16, save_strategy="no")
    with pytest.raises(ZOError, match="the weights are not finite"):
        again.train(resume_from_checkpoint=True)


# --- what a training may find changed ------------------------------------------------------------------------------


def test_weights_frozen_after_the_trainer_was_made_stay(tmp_path: Path) -> None:
    class Freeze(TrainerCallback):
        def on_train_begin(self, args, state, control, model=None, **kwargs):
            model.model.requires_grad_(False)

    for when in ("made", "begins"):
        model = tiny_llama(tie_word_embeddings=False)
        callbacks = [Freeze()] if when == "begins" else []
        trainer = trainer_in(tmp_path / when, model, callbacks=callbacks, max_steps=4, eval_steps=2)
        if when == "made":
            model.model.requires_grad_(False)
        body = {name: tensor.clone() for name, tensor in model.model.state_dict().items()}
        head = model.lm_head.weight.clone()
        trainer.train()
        assert all(tensor.equal(body[name]) for name, tensor in model.model.state_dict().items())
        assert not model.lm_head.weight.equal(head)
        header = json.loads((tmp_path / when / "journal.jsonl").read_text().splitlines()[0])
        assert header["parameters"] == ["lm_head.weight"]
        assert trainer.zm.step_count == trainer.run.recorded_steps() == 4


def test_weights_unfrozen_before_the_training_move(tmp_path: Path) -> None:
    model = tiny_llama(tie_word_embeddings=False)
    model.model.requires_grad_(False)
    trainer = trainer_in(tmp_path, model, max_steps=2, eval_dataset=None)
    model.model.norm.requires_grad_(True)
    before = model.model.norm.weight.clone()
    trainer.train()
    assert not model.model.norm.weight.equal(before)


def test_weights_frozen_in_the_middle_are_refused_by_name(tmp_path: Path) -> None:
    class Freeze(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            if state.global_step == 2:
                model.model.norm.requires_grad_(False)

    trainer = trainer_in(tmp_path / "a", callbacks=[Freeze()], max_steps=4)
    with pytest.raises(ZOError, match=r"model\.norm\.weight was frozen after step 2"):
        trainer.train()
    model = tiny_llama()
    trainer = trainer_in(tmp_path / "b", model, max_steps=4, trainable=["*norm*"])
    model.lm_head.requires_grad_(False)  # does not move anyway
    model.model.norm.requires_grad_(False)
    with pytest.raises(ZOError, match=r"model\.norm\.weight was frozen after the trainer was made.*trainable="):
        trainer.train()


@pytest.mark.parametrize("how", ["same folder", "other folder", "epochs"])
def test_a_finished_run_goes_on_to_more_steps(tmp_path: Path, how: str) -> None:
    def options(steps, epochs):
        return {"max_steps": -1, "num_train_epochs": epochs} if how == "epochs" else {"max_steps": steps}

    first = trainer_in(tmp_path / "a", **options(10, 1), save_steps=5)
    assert first.train().global_step == 10
    folder = tmp_path / ("b" if how == "other folder" else "a")
    again = trainer_in(folder, **options(20, 2), save_steps=5)
    resume = str(tmp_path / "a" / "checkpoint-10") if how == "other folder" else True
    assert again.train(resume_from_checkpoint=resume).global_step == 20
    assert Run(folder).status()["max_steps"] == 20 and Run(folder).status()["state"] == "finished"
    whole = trainer_in(tmp_path / "whole", **options(20, 2), save_steps=5)
    whole.train()
    assert all(
        mine.tensor.equal(theirs.tensor) for mine, theirs in zip(again.zm.parameters, whole.zm.parameters, strict=True)
    )
    steps = [entry["step"] for entry in again.state.log_history if "loss" in entry]
    assert steps == sorted(set(steps)) and steps[-1] == 20


def test_a_second_training_goes_on_from_the_present_weights_or_asks(tmp_path: Path) -> None:
    model = tiny_llama()
    trainer = trainer_in(tmp_path / "a", model, max_steps=4, eval_steps=0.5)
    trainer.train()
    with pytest.raises(ZOError, match="holds the steps of the training before: overwrite=True"):
        trainer.train()
    assert trainer.run.recorded_steps() == 4 and trainer.zm.step_count == 4
    trainer.args.overwrite = True
    between = model.lm_head.weight.clone()
    first = [record["losses"] for record in journal(tmp_path / "a")]
    assert trainer.train().global_step == 4 and trainer.zm.step_count == 4
    assert not model.lm_head.weight.equal(between)
    assert [record["losses"] for record in journal(tmp_path / "a")] != first
    fresh = tiny_llama()
    fresh.load_state_dict(model.state_dict())  # the weights after both
    torch.manual_seed(0)
    other = trainer_in(tmp_path / "b", tiny_llama(), max_steps=4)
    other.train()
    assert [record["losses"] for record in journal(tmp_path / "b")] == first


def test_a_second_training_into_another_folder_and_of_another_length(tmp_path: Path) -> None:
    trainer = trainer_in(tmp_path / "a", max_steps=10)
    trainer.train()
    trainer.args.output_dir, trainer.args.max_steps = str(tmp_path / "b"), 30
    assert trainer.train().global_step == 30
    assert Run(tmp_path / "a").recorded_steps() == 10 and Run(tmp_path / "b").recorded_steps() == 30
    evaluated = [entry["step"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert evaluated == list(range(0, 31, 3))  # a tenth of the second run


def test_model_init_makes_the_model_anew_for_each_training(tmp_path: Path) -> None:
    made = []

    def make():
        made.append(1)
        return tiny_llama(int(torch.randint(100, (1,))))

    options = {"max_steps": 4, "learning_rate": 1e-3, "seed": 7, "overwrite": True, **QUIET}
    arguments = {"data_collator": collate, "train_dataset": rows()}
    trainer = ZOTrainer(None, ZOConfig(output_dir=str(tmp_path / "a"), **options), model_init=make, **arguments)
    trainer.train()
    first = journal(tmp_path / "a")
    weights = weights_of(tmp_path / "a")
    trainer.train()
    assert journal(tmp_path / "a") == first and len(made) == 2
    assert all(tensor.equal(weights[name]) for name, tensor in weights_of(tmp_path / "a").items())
    torch.manual_seed(7)
    plain = ZOTrainer(make(), ZOConfig(output_dir=str(tmp_path / "b"), **options), **arguments)
    plain.train()
    assert journal(tmp_path / "b") == first
    stopped = ZOTrainer(None, ZOConfig(output_dir=str(tmp_path / "a"), **options | {"max_steps": 6}), model_init=make,
                        **arguments)  # fmt: skip
    assert stopped.train(resume_from_checkpoint=True).global_step == 6
    for both in ({}, {"model": tiny_llama(), "model_init": make}):
        with pytest.raises(ZOError, match=r"model=\.\.\. or model_init="):
            ZOTrainer(args=ZOConfig(output_dir=str(tmp_path / "c"), **QUIET), **both)


def test_checkpoints_of_the_model_alone_hold_no_state_and_the_journal_goes_on(tmp_path: Path) -> None:
    options = {"max_steps": 6, "save_steps": 2, "save_only_model": True, "eval_dataset": None}
    trainer_in(tmp_path / "a", **options).train()
    left = sorted(path.name for path in (tmp_path / "a").iterdir() if path.is_dir())
    assert left == ["checkpoint-6"]  # the limit of one holds for them as well
    files = {path.name for path in (tmp_path / "a" / "checkpoint-6").iterdir()}
    assert {"model.safetensors", "config.json", "trainer_state.json"} <= files
    assert not files & {"zo_state.json", "zo_state.safetensors"}
    with pytest.raises(ZOError, match=r"checkpoint-6 holds a model alone.*save_only_model"):
        trainer_in(tmp_path / "b", **options).train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-6"))
    again = trainer_in(tmp_path / "a", **options | {"max_steps": 8})  # its journal holds every step
    assert again.train(resume_from_checkpoint=True).global_step == 8 and again.resumed_from == 5


def test_the_tokenizer_is_in_every_checkpoint(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = tiny_bert_tokenizer()
    options = {"max_steps": 2, "save_steps": 1, "save_total_limit": 0, "processing_class": tokenizer}
    for name, more in (("a", {}), ("b", {"save_only_model": True})):
        trainer_in(tmp_path / name, **options, **more).train()
        for step in (1, 2):
            found = AutoTokenizer.from_pretrained(tmp_path / name / f"checkpoint-{step}")
            assert found("a good film")["input_ids"] == tokenizer("a good film")["input_ids"]


def test_skipped_steps_are_told_at_the_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trainer = trainer_in(tmp_path, eval_dataset=None, max_steps=12)
    not_finite_from(trainer, {3, 4})
    trainer.train()
    assert "2 of 12 steps were skipped: their loss was not finite" in capsys.readouterr().err


@pytest.mark.parametrize("form", ["tuple", "dictionary", "loss alone"])
def test_a_module_that_returns_a_tuple_or_a_dictionary_is_evaluated_as_the_trainer_does(
    tmp_path: Path, form: str
) -> None:
    from transformers import Trainer

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.head = nn.Linear(3, 2)

        def forward(self, x, labels=None):
            logits = self.head(x)
            if labels is None:
                return (logits,)
            loss = nn.functional.cross_entropy(logits, labels)
            return {"dictionary": {"loss": loss, "logits": logits}, "tuple": (loss, logits), "loss alone": (loss,)}[
                form
            ]

    data = [{"x": torch.randn(3), "labels": torch.tensor(i % 2)} for i in range(6)]
    args = TrainingArguments(output_dir=str(tmp_path / "a"), report_to="none", use_cpu=True)
    theirs = Trainer(Net(), args, train_dataset=data, eval_dataset=data)
    ours = ZOTrainer(Net(), ZOConfig(output_dir=str(tmp_path / "b"), max_steps=2, **QUIET), train_dataset=data,
                     eval_dataset=data)  # fmt: skip
    if form != "loss alone":  # where the Trainer takes the loss for the logits
        want, got = theirs.predict(data), ours.predict(data)
        assert np.allclose(got.predictions, want.predictions) and got.predictions.shape == want.predictions.shape
        assert got.metrics["test_loss"] == pytest.approx(want.metrics["test_loss"], rel=1e-5)
    assert ours.evaluate()["eval_loss"] == pytest.approx(theirs.evaluate()["eval_loss"], rel=1e-5)
    assert ours.train().global_step == 2


def test_a_run_killed_between_its_last_checkpoint_and_its_end_ends_as_it_would_have(tmp_path: Path) -> None:
    class Fails(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            if state.global_step == 4:
                raise RuntimeError("the machine went down")

    options = {"max_steps": 4, "processing_class": tiny_bert_tokenizer(), "lr": "auto", "learning_rate": None}
    whole = trainer_in(tmp_path / "a", **options)
    whole.train()
    with pytest.raises(RuntimeError):
        trainer_in(tmp_path / "b", callbacks=[Fails()], **options).train()
    again = trainer_in(tmp_path / "b", **options)
    assert again.train(resume_from_checkpoint=True).global_step == 4 and again.resumed_from == 4
    assert again.args.learning_rate == whole.args.learning_rate
    for name in ("config.json", "generation_config.json", "tokenizer_config.json"):
        assert (tmp_path / "a" / name).read_text() == (tmp_path / "b" / name).read_text()
    assert "pad_token_id" in (tmp_path / "b" / "generation_config.json").read_text()


def test_rows_without_a_loss_are_counted_in_the_metrics(tmp_path: Path) -> None:
    data = [{"x": torch.full((4,), math.nan if i in (2, 5) else float(i))} for i in range(8)]

    def loss_fn(model, batch):
        return model(batch["x"]).square().mean(-1)

    args = ZOConfig(output_dir=str(tmp_path), per_device_eval_batch_size=3, **QUIET)
    trainer = ZOTrainer(nn.Linear(4, 1), args, eval_dataset=data, loss_fn=loss_fn)
    with pytest.warns(ZOWarning, match="2 rows have no finite loss in the evaluation 'eval', the first is row 2"):
        assert trainer.evaluate()["eval_rows_without_loss"] == 2
    sound = ZOTrainer(nn.Linear(4, 1), args, eval_dataset=data[:2], loss_fn=loss_fn)
    assert "eval_rows_without_loss" not in sound.evaluate()
