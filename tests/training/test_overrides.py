"""What a subclass overrides is made, or one sentence names it: no override of the Trainer's methods is ignored."""

from __future__ import annotations

import contextlib
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

from tests.support.slow import slow_except
from tests.support.tiny_run import collate, rows, same_weights, tiny_llama
from zowrap.errors import ZOError, ZOWarning
from zowrap.training.config import ZOConfig
from zowrap.training.overrides import HIDDEN, HOOKS, Use
from zowrap.training.trainer import ZOTrainer

QUIET: dict[str, Any] = {"report_to": "none", "disable_tqdm": True, "log_level": "error"}
STILL = {"learning_rate": 1e-12, "eps": 1e-4, "rule": "zo_sgd", "logging_steps": 1, "max_steps": 3}


def config(folder: Path, **options: Any) -> ZOConfig:
    return ZOConfig(output_dir=str(folder), **{**QUIET, "engine": "eager", **options})


def reference(folder: Path, **options: Any) -> TrainingArguments:
    options = {name: value for name, value in options.items() if name not in ("eps", "rule", "engine")}
    return TrainingArguments(output_dir=str(folder), save_strategy="no", use_cpu=True, **{**QUIET, **options})


def classifier(**options: Any) -> BertForSequenceClassification:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "initializer_range": 0.5}
    return BertForSequenceClassification(BertConfig(vocab_size=32, num_labels=3, **{**sizes, **dropout, **options}))


def labelled(count: int = 12) -> list[dict[str, Any]]:
    return [{"input_ids": [1, 2, 3, 4 + i], "attention_mask": [1] * 4, "labels": i % 3} for i in range(count)]


def losses(trainer: Trainer) -> list[float]:
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


# --- the table ------------------------------------------------------------------------------------------------------


def test_the_table_has_every_method_of_the_trainer_and_no_other() -> None:
    methods = {
        name
        for name, value in vars(Trainer).items()
        if callable(getattr(value, "__func__", value)) and not (name.startswith("__") and name.endswith("__"))
    }
    assert methods - HOOKS.keys() == set(), "transformers has new methods: put them into the table"
    # A version of transformers may lack one that another has.
    assert {name for name in HOOKS.keys() - methods if hasattr(ZOTrainer, name)} == set()
    assert set(HIDDEN) <= HOOKS.keys()


def made(kind: type[ZOTrainer], folder: Path, **options: Any) -> ZOTrainer:
    return kind(tiny_llama(), config(folder / "run", **options), collate, rows())


@pytest.mark.parametrize("name", [name for name, hook in HOOKS.items() if hook.use is Use.NOT])
def test_a_refused_override_is_named_with_what_to_do_instead(name: str, tmp_path: Path) -> None:
    kind = type("Mine", (ZOTrainer,), {name: lambda self, *args, **kwargs: None})
    with pytest.raises(ZOError) as error:
        made(kind, tmp_path)
    assert str(error.value).startswith(f"Mine overrides {name}, ") and HOOKS[name].reason in str(error.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", [name for name, hook in HOOKS.items() if hook.use is Use.NEVER])
def test_an_override_that_nothing_calls_is_told(name: str, tmp_path: Path) -> None:
    kind = type("Mine", (ZOTrainer,), {name: lambda self, *args, **kwargs: None})
    with pytest.warns(ZOWarning, match=f"Mine overrides {name}, which is never called"):
        made(kind, tmp_path)


@pytest.mark.parametrize("name", [name for name, hook in HOOKS.items() if hook.use is Use.PASSES])
def test_an_override_that_must_pass_on_is_called_or_refused(name: str, tmp_path: Path) -> None:
    alone = type("Mine", (ZOTrainer,), {name: lambda self, *args, **kwargs: None})
    with pytest.raises(ZOError, match=f"Mine overrides {name} and does not pass on"):
        made(alone, tmp_path)
    called = []
    # Written as text, as a function that names the method has it in its code.
    space: dict[str, Any] = {"ZOTrainer": ZOTrainer, "called": called}
    exec(f"def {name}(self, *a, **k):\n    called.append(1)\n    return ZOTrainer.{name}(self, *a, **k)", space)
    passing = type("Mine", (ZOTrainer,), {name: space[name]})
    with warnings.catch_warnings():
        warnings.simplefilter("error", ZOWarning)
        trainer = made(passing, tmp_path, max_steps=2, save_steps=1)
    trainer.train()
    assert called and trainer.state.global_step == 2


CALLED = sorted(name for name, hook in HOOKS.items() if hook.use is Use.CALLED)
# What a training of two steps with an evaluation has no reason to call.
NOT_IN_A_RUN = {
    *("get_test_dataloader", "predict", "create_model_card", "push_to_hub", "end", "pop_callback", "remove_callback"),
    *("hyperparameter_search", "call_model_init", "_load_callback_state", "_load_best_model", "save_model", "_save"),
    *("get_cp_size", "get_tp_size", "get_sp_size", "_build_accelerator_args", "num_examples", "_get_learning_rate"),
    *("_get_collator_with_removed_columns", "_get_num_items_in_batch", "_remove_unused_columns"),
    *("get_learning_rates", "get_num_trainable_parameters", "get_optimizer_group"),
    *("log_metrics", "metrics_format", "save_metrics", "save_state"),
}


def test_overrides_are_called_where_the_trainer_calls_them(tmp_path: Path) -> None:
    called: set[str] = set()

    def override(name: str) -> Any:
        def method(self: Any, *args: Any, **kwargs: Any) -> Any:
            called.add(name)
            return getattr(super(kind, self), name)(*args, **kwargs)

        return method

    kind = type("Mine", (ZOTrainer,), {name: override(name) for name in CALLED})
    with warnings.catch_warnings():
        warnings.simplefilter("error", ZOWarning)
        trainer = kind(tiny_llama(), config(tmp_path, max_steps=2), collate, rows(), eval_dataset=rows()[:4])
    trainer.train()
    assert set(CALLED) - called <= NOT_IN_A_RUN


def test_a_class_behind_the_trainer_whose_method_nothing_could_reach_is_refused(tmp_path: Path) -> None:
    for name in HIDDEN:
        theirs = type("Theirs", (Trainer,), {name: lambda self, *args, **kwargs: None})
        with pytest.raises(ZOError, match=f"Theirs overrides {name}, but ZOTrainer stands before it"):
            made(type("Mine", (ZOTrainer, theirs), {}), tmp_path)


# --- the loss -------------------------------------------------------------------------------------------------------


class Weighted:
    """Classes with weights, as scripts write it."""

    weight = torch.tensor([1.0, 20.0, 3.0])

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        loss = nn.functional.cross_entropy(outputs.logits, labels, weight=self.weight)
        return (loss, outputs) if return_outputs else loss


class Penalised:
    """The Trainer's loss, and something on top."""

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)  # type: ignore[misc]
        loss = loss + 0.01 * model.classifier.weight.square().sum()
        return (loss, outputs) if return_outputs else loss


def summed(outputs: Any, labels: Any, num_items_in_batch: Any = None) -> Any:
    """A loss as compute_loss_func has it."""
    return nn.functional.cross_entropy(outputs["logits"], labels, reduction="sum") * 2 / num_items_in_batch


@pytest.mark.parametrize(
    "given",
    slow_except([Weighted, summed, 0.3], [Weighted, Penalised, summed, 0.3]),
    ids=["weighted", "super", "function", "smoothed"],
)
@pytest.mark.parametrize("order", ["before", "behind"])
def test_the_loss_that_is_given_trains_and_evaluates(tmp_path: Path, given: Any, order: str) -> None:
    theirs, ours = Trainer, ZOTrainer
    arguments: dict[str, Any] = {}
    options: dict[str, Any] = {**STILL, "per_device_train_batch_size": 4, "per_device_eval_batch_size": 6}
    if isinstance(given, type):
        theirs = type("Theirs", (given, Trainer), {})
        ours = type("Ours", (given, ZOTrainer) if order == "before" else (ZOTrainer, theirs), {})
    elif order == "behind":
        pytest.skip("an argument stands nowhere")
    elif callable(given):
        arguments["compute_loss_func"] = given
    else:
        options["label_smoothing_factor"] = given
    data = labelled()
    want = losses(theirs(classifier(), reference(tmp_path / "a", **options), train_dataset=data, **arguments))
    got = losses(ours(classifier(), config(tmp_path / "b", **options), train_dataset=data, **arguments))
    assert got == pytest.approx(want, rel=1e-3)
    want = theirs(classifier(), reference(tmp_path / "a", **options), eval_dataset=data, **arguments).evaluate()
    for number, metrics in enumerate((None, lambda prediction: {"rows": len(prediction.predictions)})):
        trainer = ours(
            classifier(), config(tmp_path / f"c{number}", **options), eval_dataset=data, compute_metrics=metrics,
            **arguments,
        )  # fmt: skip
        found = trainer.evaluate()
        assert found["eval_loss"] == pytest.approx(want["eval_loss"], rel=1e-4)
        assert metrics is None or found["eval_rows"] == 12


@pytest.mark.slow
def test_the_given_loss_is_compiled_where_it_is_asked_for_and_agrees(tmp_path: Path) -> None:
    data = labelled()
    options = {**STILL, "learning_rate": 1e-2, "per_device_train_batch_size": 4}
    weighted = type("Ours", (Weighted, ZOTrainer), {})
    for number, (kind, more) in enumerate(((weighted, {}), (ZOTrainer, {"label_smoothing_factor": 0.2}))):
        found = []
        for engine in ("eager", "compiled"):
            args = config(tmp_path / f"{engine}{number}", **{**options, **more, "engine": engine})
            trainer = kind(classifier(), args, train_dataset=data)
            found.append(losses(trainer))
            assert trainer.zm.inspect().engine == engine
        assert found[1] == pytest.approx(found[0], rel=1e-4)


def test_an_overridden_loss_runs_eagerly_unless_asked_otherwise_and_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class Growing(ZOTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):  # type: ignore[no-untyped-def]
            return (1 + self.state.global_step) * super().compute_loss(model, inputs)

    trainer = Growing(classifier(), config(tmp_path, **{**STILL, "engine": None}), train_dataset=labelled())
    first, second, third = losses(trainer)
    assert second / first == pytest.approx(2, rel=0.5) and third > second > first
    assert capsys.readouterr().err.count("compute_loss of Growing gives the loss and runs eagerly") == 1


def test_micro_batches_of_a_given_loss_count_by_their_label_tokens(tmp_path: Path) -> None:
    class Own(ZOTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):  # type: ignore[no-untyped-def]
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    found = []
    for kind, size, accumulated in ((ZOTrainer, 16, 1), (Own, 16, 1), (Own, 4, 4)):
        folder = tmp_path / f"{kind.__name__}{size}"
        options = {**STILL, "max_steps": 1, "gradient_accumulation_steps": accumulated}
        args = config(folder, **options, per_device_train_batch_size=size)
        trainer = kind(tiny_llama(), args, collate, rows(16))
        found.append(losses(trainer)[0])
        record = json.loads((folder / "journal.jsonl").read_text().splitlines()[1])
        found[-1] = record["loss"]
    assert found[1:] == pytest.approx([found[0]] * 2, rel=1e-5)


def test_a_context_around_the_loss_is_entered(tmp_path: Path) -> None:
    class Mine(ZOTrainer):
        entered = 0

        def compute_loss_context_manager(self) -> Any:
            Mine.entered += 1
            return contextlib.nullcontext()

    Mine(classifier(), config(tmp_path, **STILL), train_dataset=labelled()).train()
    assert Mine.entered >= 6  # two points for each of three steps


def test_a_loss_that_cannot_be_called_as_the_trainer_calls_it_is_refused(tmp_path: Path) -> None:
    kind = type("Mine", (ZOTrainer,), {"compute_loss": lambda self, model, inputs, return_outputs=False: None})
    with pytest.raises(ZOError, match="compute_loss of Mine does not take num_items_in_batch"):
        made(kind, tmp_path)


def test_two_losses_for_one_training_are_refused(tmp_path: Path) -> None:
    def loss_fn(model: Any, batch: Any) -> Any:
        return model(**batch).loss

    weighted = type("Mine", (Weighted, ZOTrainer), {})
    for kind, options, arguments, named in (
        (ZOTrainer, {"label_smoothing_factor": 0.1}, {"loss_fn": loss_fn}, "loss_fn= and label_smoothing_factor="),
        (ZOTrainer, {}, {"loss_fn": loss_fn, "compute_loss_func": summed}, "loss_fn= and compute_loss_func="),
        (weighted, {}, {"loss_fn": loss_fn}, "loss_fn= and compute_loss of Weighted"),
        (weighted, {"label_smoothing_factor": 0.1}, {}, "label_smoothing_factor= and compute_loss of Weighted"),
    ):
        with pytest.raises(ZOError, match=named):
            kind(classifier(), config(tmp_path, **options), train_dataset=labelled(), **arguments)
    penalised = type("Mine", (Penalised, ZOTrainer), {})  # calls super(), which smooths
    penalised(classifier(), config(tmp_path, label_smoothing_factor=0.1), train_dataset=labelled())


def test_a_label_that_names_no_class_is_refused_under_smoothing_too(tmp_path: Path) -> None:
    bad = [*labelled()[:5], {**labelled()[5], "labels": 3}]
    trainer = ZOTrainer(classifier(), config(tmp_path, **STILL, label_smoothing_factor=0.1), train_dataset=bad)
    with pytest.raises(ZOError, match="label 3 of the training data names no class, in row 5"):
        trainer.train()


def test_a_loss_put_on_the_trainer_itself_trains_and_evaluates_too(tmp_path: Path) -> None:
    def ten(model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
        outputs = model(**inputs)
        return (10 * outputs.loss, outputs) if return_outputs else 10 * outputs.loss

    plain = ZOTrainer(classifier(), config(tmp_path / "a", **STILL), train_dataset=labelled(), eval_dataset=labelled())
    mine = ZOTrainer(classifier(), config(tmp_path / "b", **STILL), train_dataset=labelled(), eval_dataset=labelled())
    mine.compute_loss = ten  # type: ignore[method-assign]
    assert mine.evaluate()["eval_loss"] == pytest.approx(10 * plain.evaluate()["eval_loss"], rel=1e-5)
    assert losses(mine) == pytest.approx([10 * each for each in losses(plain)], rel=1e-3)
    plain.compute_loss = ten  # type: ignore[method-assign]
    with pytest.raises(ZOError, match=r"compute_loss of this trainer was changed after the first step"):
        plain.evaluate()


# --- the step -------------------------------------------------------------------------------------------------------


def test_a_step_that_passes_on_only_seemingly_makes_no_silent_training(tmp_path: Path) -> None:
    class Mine(ZOTrainer):
        def training_step(self, model, inputs, num_items_in_batch=None):  # type: ignore[no-untyped-def]
            if self.state.global_step > 99:
                return super().training_step(model, inputs, num_items_in_batch)
            return torch.zeros(())

    with pytest.raises(ZOError, match="no step was made: training_step is overridden"):
        made(Mine, tmp_path).train()


def test_a_backward_pass_beside_the_step_is_refused(tmp_path: Path) -> None:
    class Mine(ZOTrainer):
        def training_step(self, model, inputs, num_items_in_batch=None):  # type: ignore[no-untyped-def]
            model(**self._prepare_inputs(inputs)).loss.backward()
            return super().training_step(model, inputs, num_items_in_batch)

    with pytest.raises(ZOError, match="has a gradient, which a zeroth-order step does not use"):
        made(Mine, tmp_path).train()


# --- other hooks ----------------------------------------------------------------------------------------------------


def test_what_a_subclass_writes_is_in_every_checkpoint_and_a_run_goes_on_from_it(tmp_path: Path) -> None:
    class Notes(ZOTrainer):
        def save_model(self, output_dir=None, _internal_call=False):  # type: ignore[no-untyped-def]
            super().save_model(output_dir, _internal_call)
            (Path(output_dir) / "notes.txt").write_text("mine")

    class Elsewhere(ZOTrainer):
        def _save(self, output_dir=None, state_dict=None):  # type: ignore[no-untyped-def]
            torch.save(self.model.state_dict(), f"{output_dir}/mine.bin")

    for kind, file in ((Notes, "notes.txt"), (Elsewhere, "mine.bin")):
        options = {"max_steps": 6, "save_steps": 3, "save_total_limit": 0, "learning_rate": 1e-3}
        folder = tmp_path / kind.__name__
        kind(tiny_llama(), config(folder, **options), collate, rows()).train()
        assert all((folder / place / file).is_file() for place in (".", "checkpoint-3", "checkpoint-6"))
        other = kind(tiny_llama(), config(tmp_path / f"{kind.__name__}2", **options), collate, rows())
        other.train(resume_from_checkpoint=str(folder / "checkpoint-3"))
        whole = kind(tiny_llama(), config(tmp_path / f"{kind.__name__}3", **options), collate, rows())
        whole.train()
        assert all(
            mine.tensor.equal(theirs.tensor)
            for mine, theirs in zip(other.zm.parameters, whole.zm.parameters, strict=True)
        )
    assert same_weights(tmp_path / "Notes" / "checkpoint-6", tmp_path / "Notes2" / "checkpoint-6")


def test_a_schedule_of_ones_own_drives_the_learning_rate(tmp_path: Path) -> None:
    class Mine(ZOTrainer):
        def create_scheduler(self, num_training_steps, optimizer=None):  # type: ignore[no-untyped-def]
            optimizer = self.optimizer if optimizer is None else optimizer
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
            self._created_lr_scheduler = True
            return self.lr_scheduler

    Mine(tiny_llama(), config(tmp_path, max_steps=3, learning_rate=1e-3), collate, rows()).train()
    records = [json.loads(line) for line in (tmp_path / "journal.jsonl").read_text().splitlines()[1:]]
    assert [record["lr"] for record in records] == pytest.approx([1e-3, 1e-3 / 2, 1e-3 / 3])


def test_an_evaluation_of_a_class_behind_is_called(tmp_path: Path) -> None:
    class Theirs(Trainer):
        steps = loops = 0

        def prediction_step(self, *args, **kwargs):  # type: ignore[no-untyped-def]
            Theirs.steps += 1
            return super().prediction_step(*args, **kwargs)

        def evaluation_loop(self, *args, **kwargs):  # type: ignore[no-untyped-def]
            Theirs.loops += 1
            return super().evaluation_loop(*args, **kwargs)

    mixed = type("Mine", (ZOTrainer, Theirs), {})
    args = config(tmp_path, per_device_eval_batch_size=4)
    got = mixed(tiny_llama(), args, collate, eval_dataset=rows()[:8]).evaluate()["eval_loss"]
    want = ZOTrainer(tiny_llama(), args, collate, eval_dataset=rows()[:8]).evaluate()["eval_loss"]
    assert (Theirs.steps, Theirs.loops) == (2, 1) and got == pytest.approx(want, rel=1e-6)


def test_a_search_for_hyper_parameters_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ZOError, match="hyperparameter_search is not supported"):
        made(ZOTrainer, tmp_path).hyperparameter_search()


def test_an_optimizer_set_on_the_trainer_is_refused(tmp_path: Path) -> None:
    trainer = made(ZOTrainer, tmp_path)
    trainer.optimizer = torch.optim.SGD(trainer.model.parameters(), lr=1.0)
    with pytest.raises(ZOError, match="an optimizer was set on the trainer"):
        trainer.train()
    early = made(ZOTrainer, tmp_path, max_steps=2)
    early.create_optimizer_and_scheduler(2)  # the trainer's own, made early
    assert early.train().global_step == 2


def test_a_step_outside_of_a_training_moves_nothing(tmp_path: Path) -> None:
    trainer = made(ZOTrainer, tmp_path)
    before = trainer.model.lm_head.weight.clone()
    assert trainer.training_step(trainer.model, collate(rows()[:4])) > 0
    assert trainer.model.lm_head.weight.equal(before) and trainer.zm.step_count == 0
