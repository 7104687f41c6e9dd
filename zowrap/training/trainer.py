"""``ZOTrainer``: ``transformers.Trainer`` with the zeroth-order step in place of backward and optimiser.

The loop is the Trainer's own: its data order, schedules, logging, evaluation, callbacks and trackers work as usual. A
step of one micro-batch is :meth:`zowrap.ZOModel.step`, which a GPU replays as one CUDA graph. A step of several calls
:meth:`zowrap.ZOModel.accumulate` for each, and :meth:`zowrap.ZOModel.update` as the optimiser's step.
The files are other ones, see :mod:`zowrap.training.run_folder`. The other modules of this room know nothing of the
trainer: they are given the model, the options and the folder.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor, nn
from transformers import Trainer
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import EvalLoopOutput, TrainOutput

from zowrap.errors import ZOError
from zowrap.loss import evaluation
from zowrap.loss.module import count_rows, find_invalid_labels
from zowrap.model.choice import Planned
from zowrap.model.zo_model import StepResult, ZOModel
from zowrap.quant import lowering
from zowrap.step.finite import warn_about
from zowrap.step.options import values_of
from zowrap.step.pretrained import model_name
from zowrap.storage.lock import lock_folder
from zowrap.storage.save import save_model
from zowrap.training.auto_lr import settle_lr
from zowrap.training.callback import WriterCallback
from zowrap.training.checkpoint import load_weights
from zowrap.training.config import ZOConfig
from zowrap.training.loop import make_first_state
from zowrap.training.messages import say
from zowrap.training.resume import Start, find_start
from zowrap.training.run_folder import Run
from zowrap.training.signals import Interrupted, catch_stop_signals
from zowrap.training.weight_check import WeightCheck
from zowrap.training.writer import RunWriter
from zowrap.wrap import zo_wrap

if TYPE_CHECKING:
    from zowrap.loss.module import LossFn

__all__ = ["ZOConfig", "ZOTrainer"]


class ZOStep(torch.optim.Optimizer):
    """Stands in for the Trainer's optimiser: ``step`` applies the rule, at the schedule's learning rate.

    Args:
        zm: the wrapped model.
        lr: η before any schedule.
        done: called with each step's result.
    """

    def __init__(self, zm: ZOModel, lr: float, done: Callable[[StepResult], None]) -> None:
        super().__init__([parameter.tensor for parameter in zm.parameters], {"lr": lr})
        self.zm = zm
        self.done = done

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        if self.zm.accumulated:  # else make_whole made the step
            self.zm.lr = float(self.param_groups[0]["lr"])
            self.done(self.zm.update())

    def make_whole(self, batch: dict[str, Any]) -> Tensor:
        """Make the step on its only micro-batch in one call: only such a step can be replayed as a CUDA graph.

        Returns:
            0-d float32 loss, the mean over the step's evaluations.
        """
        self.zm.lr = float(self.param_groups[0]["lr"])
        result = self.zm.step(**batch)
        self.done(result)
        return result.loss


class ZOTrainer(Trainer):
    """Train with forward passes alone. It takes the arguments of ``transformers.Trainer``, except the optimiser.

    Args:
        model: a ``transformers`` model, a PEFT model, or any module with ``loss_fn``. Its tensors move in place.
        args: a :class:`ZOConfig`. Plain ``TrainingArguments`` are refused: their defaults are for backpropagation.
        loss_fn: ``loss_fn(model, batch)``, 0-d or one loss per example; by default the model's own loss.
        batch_metrics: ``batch_metrics(model_output, batch) -> {name: (sum, count)}``, summed batch by batch.
        compute_metrics: as in the Trainer. It is given all predictions at once, so all logits of the evaluation set
            are held in memory; ``batch_metrics`` is not.
        base_model: the base model's name for the journal and the headers of the weight files.
        config: the content of ``zowrap.json``, ``{"model": …, "options": {…}, "task": {…}}``; by default ``args``.

    Attributes:
        zm: the wrapped model.
        run: the folder of the run.
        resumed_from: the step that the last :meth:`train` went on from, 0 for a start.
        interrupted: the last :meth:`train` was stopped by a signal.
        best_step, best_metric: of the model in ``output_dir``; ``None`` when nothing was evaluated.

    Raises:
        ZOError: an argument that has no meaning here.
    """

    args: ZOConfig  # type: ignore[assignment]

    def __init__(
        self,
        model: nn.Module | None = None,
        args: ZOConfig | None = None,
        *positional: Any,
        loss_fn: LossFn | None = None,
        batch_metrics: evaluation.BatchMetrics | None = None,
        base_model: str | None = None,
        config: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        _check_arguments(model, args, kwargs)
        _check_overrides(self)
        if batch_metrics is not None and _find_override(self, "prediction_step"):
            raise ZOError("prediction_step is overridden, and batch_metrics= takes its place: give one of them")
        assert model is not None
        args = args or ZOConfig(output_dir="tmp_trainer")
        if loss_fn is not None and "remove_unused_columns" in args.unset:
            args.remove_unused_columns = False  # what the loss reads need not be what the model's forward takes
        # eval_dataset is the fifth argument of the Trainer, the third after (model, args).
        eval_dataset = kwargs.get("eval_dataset", positional[2] if len(positional) > 2 else None)
        args.evaluates(eval_dataset is not None)
        self._made_folder = not Path(str(args.output_dir)).exists()  # the Trainer makes it
        with lowering.hide_quantization(model):
            super().__init__(model, args, *positional, **kwargs)
        self.batch_metrics = batch_metrics
        self.run = Run(str(args.output_dir))
        self._bare, self._loss_fn = model, loss_fn
        self._rule = args.rule_object()
        try:
            self.wrap(args.engine)
        except ZOError:
            if self._made_folder:  # it is empty and will stay so
                with contextlib.suppress(OSError):  # another process may have begun to use it
                    Path(str(args.output_dir)).rmdir()
            raise
        self._base_model, self._config = base_model or model_name(model), config
        self._writer: RunWriter | None = None  # of the last training
        self._callback = WriterCallback(self._get_evaluation)
        self.add_callback(self._callback)
        self.resumed_from = 0
        self.interrupted = False
        self._resuming: Start | None = None
        self._sums = evaluation.Evaluation()
        self._sums_of = "eval"
        self._wrong_labels: Tensor | None = None  # 0-d bool, on an accelerator: a label of a step named no class

    def wrap(self, engine: str | None) -> None:
        """Wrap the model, with the rule at its first step: ``zm`` is then another."""
        options = values_of(self.args)
        lr = "auto" if self.args.auto_lr else self.args.learning_rate
        options |= {"rule": self._rule, "lr": lr, "engine": engine}
        self.zm: ZOModel = zo_wrap(self._bare, loss_fn=self._loss_fn, **options)
        self._loss = self.zm.loss_module

    def wrap_for(self, steps: int | None) -> None:
        """Wrap again where the rule is another for a run of so many steps (a warm-up)."""
        rule = self.args.rule_object(steps)
        if rule.describe() != self._rule.describe() and not self.zm.step_count:
            self._rule = rule
            self.wrap(self.args.engine)

    def _wrap_with(self, steps: int, engine: str | None) -> ZOModel:
        """Wrap the model as :func:`zowrap.training.resume.find_start` asks for."""
        self.wrap_for(steps)
        if engine is not None:
            self.wrap(engine)
        return self.zm

    def _let_batch_choose_engine(self, steps: int) -> None:
        """Let the first batch choose the engine for so many steps, where it is left open."""
        if steps and self.args.engine is None:
            self.zm.planned = Planned(steps, steps * self.args.gradient_accumulation_steps)

    # --- a step ------------------------------------------------------------------------------------------------

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """Evaluate one micro-batch at both sides of the step's direction.

        The weights move here where the step has no other micro-batch, else in the optimiser's step.

        Returns:
            0-d loss for the Trainer's running mean: finite, and divided by the micro-batches of the step.
        """
        batch = self.prepare_batch(inputs)
        alone = self.args.gradient_accumulation_steps == 1
        loss = self._step.make_whole(batch) if alone else self.zm.accumulate(**batch)
        return torch.nan_to_num(loss, nan=0.0, posinf=0.0, neginf=0.0) / self.current_gradient_accumulation_steps

    def prepare_batch(self, inputs: dict[str, Any], what: str = "training") -> dict[str, Any]:
        """Move a batch to the device and check its labels: one that names no class would make the loss NaN.

        On an accelerator the answer is read together with the steps' results (:meth:`refuse_wrong_labels`), so that no
        step waits for it.

        Raises:
            ZOError: a label names no class.
        """
        batch = self._prepare_inputs(inputs)
        labels = batch.get("labels")
        if not isinstance(labels, Tensor) or labels.is_floating_point() or labels.dtype == torch.bool:
            return batch
        waits = labels.device.type == "cpu" or what != "training" or not self._loss.settled
        if labels.device.type == "cpu":
            self._loss.settle(batch)  # the model's own loss may know other labels
        classes = self._loss.classes
        if classes is None:
            return batch
        # Before that is known, an accelerator is kept from labels that are too large, which would end the process.
        wrong = find_invalid_labels(labels, classes) if self._loss.settled else labels >= classes
        if not waits:
            any_wrong = wrong.any()
            self._wrong_labels = any_wrong if self._wrong_labels is None else self._wrong_labels | any_wrong
        elif bool(wrong.any()):
            self._refuse_label(int(labels[wrong][0]), classes, what)
        return batch

    def refuse_wrong_labels(self) -> None:
        """Raise :class:`ZOError` if a label of the steps so far named no class."""
        wrong, self._wrong_labels = self._wrong_labels, None
        if wrong is not None and bool(wrong) and self._loss.classes is not None:
            self._refuse_label(None, self._loss.classes, "training")

    def _refuse_label(self, label: int | None, classes: int, what: str) -> NoReturn:
        row, found = _find_wrong_label(self.train_dataset if what == "training" else self.eval_dataset, classes)
        label = found if row is not None else label
        name = "a label" if label is None else f"label {label}"
        where = "" if row is None else f", in row {row} (counted from 0)"
        if self.zm.step_count == 0:
            self.mark_start_failed()
        raise ZOError(
            f"{name} of the {what} data names no class{where}: the model has {classes}, numbered from 0 to "
            f"{classes - 1} (-100 leaves a label out)"
        )

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            self._step = ZOStep(self.zm, self.args.learning_rate, self._add_step)  # type: ignore[arg-type]
            self.optimizer = self._step
        return self.optimizer

    def _add_step(self, result: StepResult) -> None:
        assert self._writer is not None
        self._writer.add_step(result)

    # --- the run -----------------------------------------------------------------------------------------------

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
        **kwargs: Any,
    ) -> TrainOutput:
        """Train to ``max_steps``.

        A SIGINT or SIGTERM ends the run after the current step with a checkpoint: ``interrupted`` is then True. A
        second one stops at once, and loses at most that step.

        A resumed run is bitwise the uninterrupted one if the batches are: a collator or data set that draws random
        numbers draws others after the batches that are skipped.

        Args:
            resume_from_checkpoint: True goes on from the newest checkpoint in ``output_dir`` and replays the journal
                after it, bitwise as if the run had not stopped; a path goes on from that checkpoint.

        Raises:
            ZOError: the model's weights are not finite, ``output_dir`` holds another run, another process trains into
                it, the loss is not finite from the start, for ``max_skipped`` steps in a row or at the end, a label
                names no class, or the disk is full. What was good before stays: the journal, an earlier checkpoint,
                the best model.
        """
        _check_overrides(self)
        with lock_folder(self.run.path, self._made_folder):
            return self._train(resume_from_checkpoint, trial, ignore_keys_for_eval, kwargs)

    def _train(
        self, resume: str | bool | None, trial: Any, ignore_keys_for_eval: list[str] | None, kwargs: dict[str, Any]
    ) -> TrainOutput:
        """Train, as the one process that writes into the folder."""
        self.interrupted = False
        broken = warn_about(self.zm.model)
        weights = WeightCheck(self.zm.parameters)  # before a checkpoint is loaded, which may be of a run that broke
        first = make_first_state(self.args, self.get_train_dataloader)
        start = find_start(self.run, self.args, self._wrap_with, first, resume, self._base_model)
        if not start.step:
            self._let_batch_choose_engine(start.plan["steps"])
        self.resumed_from = start.step
        self._writer = self._callback.writer = writer = self._make_writer(start, weights)
        writer.open()
        for name in ("logging_steps", "eval_steps", "save_steps"):  # fractions of the run, now that its length is known
            setattr(self.args, name, getattr(start.state, name))
        began = time.time()
        if start.step >= start.state.max_steps:
            return self._end_finished(start, writer)
        evaluates_first = self.args.eval_on_start
        try:
            with catch_stop_signals() as self._callback.signal, tempfile.TemporaryDirectory() as folder:
                self.state = start.state
                if start.step:
                    start.state.save_to_json(str(Path(folder) / "trainer_state.json"))
                    self.args.eval_on_start = False
                    self._resuming = start
                    kwargs["resume_from_checkpoint"] = folder
                try:
                    self._settle_lr(start, writer)
                    output = super().train(trial=trial, ignore_keys_for_eval=ignore_keys_for_eval, **kwargs)
                except Interrupted:
                    self.is_in_train = False
                    output = TrainOutput(self.state.global_step, 0.0, {"train_runtime": time.time() - began})
                self.interrupted = self._callback.signal.stopped and self.state.global_step < self.state.max_steps
                writer.close(self.interrupted)
        except BaseException as error:
            self.is_in_train = False
            self.zm.discard()
            writer.abandon()
            if broken and isinstance(error, ZOError) and writer.start_failed:
                raise ZOError(f"{error}; {broken}") from error
            raise
        finally:
            self.args.eval_on_start = evaluates_first
            self._resuming = None
        if self.args.load_best_model_at_end and self.best_step is not None:
            self._load_best_model()
        metrics = {**output.metrics, "skipped_steps": writer.log.skipped}
        return output._replace(training_loss=writer.log.mean_loss(), metrics=metrics)

    def _make_writer(self, start: Start, weights: WeightCheck) -> RunWriter:
        options = {k: v for k, v in self.args.to_dict().items() if not k.startswith(("hub_", "push_"))}
        return RunWriter(
            self.run,
            self.zm,
            start,
            self.args,
            config={"model": self._base_model, **(self._config or {"options": options})},
            weights=weights,
            facts=self._facts(),
            tokenizer=self.tokenizer(),
            check_labels=self.refuse_wrong_labels,
        )

    def _settle_lr(self, start: Start, writer: RunWriter) -> None:
        """Settle the learning rate, and give it to the schedule and to the first step."""
        args = self.args
        try:
            settled = settle_lr(
                self.zm, args, start.plan, start.state.max_steps, self._read_first_steps(), self._watch_choice
            )
        except ZOError:
            writer.mark_start_failed()
            raise
        writer.add_to_plan(**settled)
        args.learning_rate = settled["learning_rate"]
        if not start.step:
            self.zm.lr = float(settled["learning_rate"])

    def _read_first_steps(self) -> Iterator[list[dict[str, Any]]]:
        """Yield the micro-batches of the first steps, past the wrapper that counts batches for the training loop."""
        loader: Any = self.get_train_dataloader()
        batches = iter(getattr(loader, "base_dataloader", loader))
        while group := list(itertools.islice(batches, self.args.gradient_accumulation_steps)):
            yield [self.prepare_batch(batch) for batch in group]

    def _watch_choice(self, done: int, most: int) -> None:
        """Tell the callbacks that the choice of a learning rate made ``done`` of at most ``most`` evaluations."""
        if self._callback.signal.stopped:
            raise Interrupted
        for callback in self.callback_handler.callbacks:
            if hasattr(callback, "on_choose_lr"):
                callback.on_choose_lr(done, most)

    def _end_finished(self, start: Start, writer: RunWriter) -> TrainOutput:
        """End a run with no step left; where a kill came after the last one, the end is still to be written."""
        say(f"{self.run.path} is finished: {start.step} steps are done")
        self.state = start.state
        if not start.finished:
            try:
                writer.close(interrupted=False)
            except ZOError:
                writer.abandon()
                raise
        metrics = {"train_runtime": 0.0, "skipped_steps": writer.log.skipped}
        return TrainOutput(start.step, writer.log.mean_loss(), metrics)

    @property
    def skipped_steps(self) -> int:
        """Steps of the run that were skipped, those of earlier starts included."""
        return 0 if self._writer is None else self._writer.log.skipped

    def mark_start_failed(self) -> None:
        """For a callback that is about to raise before the first step: leave the folder as it was before."""
        if self._writer is not None:
            self._writer.mark_start_failed()

    @property
    def lr_choice(self) -> dict[str, Any] | None:
        """The record of the choice that ``lr="auto"`` made for this run (:class:`zowrap.LearningRate`), if it did."""
        return None if self._writer is None else self._writer.plan.get("choice")

    @property
    def best_step(self) -> int | None:
        return None if self._writer is None else self._writer.best.step

    @property
    def best_metric(self) -> float | None:
        return None if self._writer is None else self._writer.best.value

    # --- saving and loading: safetensors and JSON in place of pickles ------------------------------------------

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the present model and the tokenizer, for ``from_pretrained``."""
        self._save(output_dir)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        metadata = {**self.zm.facts(), **self._facts()}
        save_model(self.zm.model, output_dir or str(self.args.output_dir), metadata, tokenizer=self.tokenizer())

    def _facts(self) -> dict[str, str]:
        """What the headers of weight files say besides :meth:`zowrap.ZOModel.facts`."""
        return {"base_model": self._base_model} if self._base_model else {}

    def tokenizer(self) -> Any:
        """The tokenizer or processor that is written beside the model, if there is one."""
        found = self.processing_class or getattr(self.data_collator, "tokenizer", None)
        return found if hasattr(found, "save_pretrained") else None

    def _save_checkpoint(self, model: nn.Module, trial: Any = None) -> None:
        assert self._writer is not None
        for callback in [*self.callback_handler.callbacks, self.control]:
            if isinstance(callback, ExportableState):
                self.state.stateful_callbacks[type(callback).__name__] = callback.state()  # type: ignore[index,call-overload]
        self._writer.save_checkpoint(dataclasses.asdict(self.state))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Do nothing: the weights are already those of the step that the run goes on from."""

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Bring the schedule to the step that the run goes on from: it is a function of the steps (and metrics)."""
        scheduler: Any = self.lr_scheduler
        if self._resuming is None:
            return
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # "lr_scheduler.step() before optimizer.step()"
            for metric in self._resuming.scheduler_steps(scheduler):
                scheduler.step(*metric)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Do nothing: no step draws from the global generators."""

    def _load_best_model(self) -> None:
        load_weights(self.run.path, self.zm)
        self.state.best_model_checkpoint = str(self.run.path)

    # --- evaluation and logs -----------------------------------------------------------------------------------

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Sum loss and metrics batch by batch, unless ``compute_metrics`` asks for all predictions at once."""
        if self._writer is not None:
            self._writer.flush()
        self._sums = sums = evaluation.Evaluation()
        self._sums_of = metric_key_prefix
        whole = self.compute_metrics is not None or _find_override(self, "prediction_step")
        if description != "Evaluation" or (whole and self.batch_metrics is None):
            output = super().evaluation_loop(
                dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
            )
            # The Trainer's loss is a mean of the batches' means; this one gives every token or example the same weight.
            ours = {f"{metric_key_prefix}_loss": loss for loss in sums.means().values()}
            return output._replace(metrics={**(output.metrics or {}), **ours})
        self.callback_handler.eval_dataloader = dataloader
        for inputs in dataloader:
            inputs = self.prepare_batch(inputs, "evaluation")
            evaluation.add_batch(sums, self._loss, inputs, self.batch_metrics, self.args.device)
            self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)
        if not sums.examples:
            raise ZOError("there is nothing to evaluate on: the evaluation set is empty")
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in sums.means().items()}
        return EvalLoopOutput(None, None, metrics, sums.examples)  # type: ignore[arg-type]

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Compute the loss of one batch at the present weights; only evaluations ask for it."""
        sums, weights, outputs = evaluation.evaluate_batch(self._loss, inputs, outputs=True)
        rows = count_rows(inputs)
        self._sums.examples += rows
        self._sums.add_loss(sums, weights, rows, self.args.device)
        loss = (sums.sum() / weights.sum()).float()
        return (loss, outputs if isinstance(outputs, dict) else (loss, *outputs)) if return_outputs else loss

    def _get_evaluation(self) -> tuple[evaluation.Evaluation, str] | None:
        """Return the sums of the latest evaluation and the prefix of its metrics' names; None outside of a training."""
        return (self._sums, self._sums_of) if self.is_in_train else None

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log the steps' own mean loss and ``|projected gradient|`` in place of the Trainer's."""
        if "loss" in logs and self._writer is not None:
            logs.pop("grad_norm", None)
            logs.update(self._writer.take_log())
        super().log(logs, start_time)


# Methods of the Trainer that a zeroth-order step does not call → what to use in their place.
_NOT_OVERRIDDEN = {
    "compute_loss": "give the loss as loss_fn=(lambda model, batch: ...)",
    "training_step": "the step is the rule's: give rule=, and the loss as loss_fn=(lambda model, batch: ...)",
    "create_optimizer": "the update is the rule's: give rule= and rule_options=",
    "create_optimizer_and_scheduler": "the update is the rule's (rule=), the schedule is lr_scheduler_type",
    "get_optimizer_cls_and_kwargs": "the update is the rule's: give rule= and rule_options=",
    "get_decay_parameter_names": "weight decay is the rule's: give weight_decay=, which leaves out vectors",
}


def _find_override(trainer: ZOTrainer, name: str) -> str | None:
    """Return the class (or ``"this trainer"``) that overrides that method of the Trainer or of ours, if one does."""
    if name in vars(trainer):
        return "this trainer"
    others = (each for each in type(trainer).__mro__ if not issubclass(ZOTrainer, each))
    return next((each.__name__ for each in others if name in vars(each)), None)


def _check_overrides(trainer: ZOTrainer) -> None:
    """Refuse methods that would never be called, or that would make another step than the rule's."""
    for name, instead in _NOT_OVERRIDDEN.items():
        where = _find_override(trainer, name)
        if where is not None:
            raise ZOError(f"{where} overrides {name}, which a zeroth-order trainer does not use: {instead}")


def _find_wrong_label(dataset: Any, classes: int) -> tuple[int | None, int | None]:
    """Find the first row of a data set with a label that names no class: (row, label), or Nones if it is not found."""
    with contextlib.suppress(Exception):  # this only words an error, which no odd data set may replace by another
        for row in range(len(dataset)):
            item = dataset[row]
            labels = torch.as_tensor(item["labels"] if "labels" in item else item["label"])
            wrong = find_invalid_labels(labels, classes)
            if bool(wrong.any()):
                return row, int(labels[wrong][0])
    return None, None


def _check_arguments(model: Any, args: Any, kwargs: dict[str, Any]) -> None:
    if model is None or kwargs.get("model_init") is not None:
        raise ZOError("ZOTrainer takes model=..., and no model_init")
    if args is not None and not isinstance(args, ZOConfig):
        raise ZOError(f"args must be a ZOConfig, not {type(args).__name__}, whose defaults are for backpropagation")
    for name in ("optimizer_cls_and_kwargs", "compute_loss_func"):
        if kwargs.get(name) is not None:
            instead = "rule=" if name.startswith("optimizer") else "loss_fn=(lambda model, batch: ...)"
            raise ZOError(f"{name} has no meaning here: give {instead}")
    if any(each is not None for each in kwargs.get("optimizers") or ()):
        raise ZOError("optimizers has no meaning here: the update is the rule's, the schedule is lr_scheduler_type")
