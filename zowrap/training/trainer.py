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
import inspect
import itertools
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from accelerate.utils.memory import clear_device_cache
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, ProcessorMixin, Trainer, set_seed
from transformers.trainer import align_special_tokens, logger
from transformers.trainer_utils import EvalLoopOutput, TrainOutput, denumpify_detensorize

from zowrap.errors import ZOError, ZOWarning
from zowrap.loss import evaluation
from zowrap.loss.module import LossModule, count_rows, find_invalid_labels
from zowrap.model.choice import Planned
from zowrap.model.zo_model import StepResult, ZOModel
from zowrap.quant import lowering
from zowrap.step.finite import warn_about
from zowrap.step.options import check_values, values_of
from zowrap.step.pretrained import model_name
from zowrap.storage.lock import lock_folder
from zowrap.storage.save import save_model
from zowrap.training.auto_lr import settle_lr
from zowrap.training.callback import RunEvents, WriterCallback
from zowrap.training.callback_states import collect_states, restore_states
from zowrap.training.checkpoint import load_weights
from zowrap.training.config import ZOConfig
from zowrap.training.loop import make_first_state
from zowrap.training.messages import say
from zowrap.training.overrides import HOOKS, Use, check_overrides, find_override, mentions
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

    It has the Trainer's two groups, the tensors with weight decay and those without. A schedule or a callback may set
    the learning rate of both, and the weight decay of the first.

    Args:
        zm: the wrapped model.
        lr: η before any schedule.
        done: called with each step's result.
    """

    def __init__(self, zm: ZOModel, lr: float, done: Callable[[StepResult], None]) -> None:
        groups = [
            {"params": [each.tensor for each in zm.parameters if each.decays == decays], "weight_decay": decay}
            for decays, decay in ((True, zm.hyper["weight_decay"]), (False, 0.0))
        ]
        super().__init__(groups, {"lr": lr})
        self.zm = zm
        self.done = done
        self._made = False  # make_whole made the step

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        if self.zm.accumulated:
            self._follow_groups()
            self.done(self.zm.update())
        elif not self._made:
            raise ZOError(
                "no step was made: training_step is overridden and did not call super().training_step(...), which "
                "evaluates the batch"
            )
        self._made = False
        name = next((each.name for each in self.zm.parameters if each.tensor.grad is not None), None)
        if name is not None:
            raise ZOError(
                f"{name} has a gradient, which a zeroth-order step does not use: leave out the backward pass, and put "
                "its loss into compute_loss or loss_fn="
            )

    def make_whole(self, batch: dict[str, Any]) -> Tensor:
        """Make the step on its only micro-batch in one call: only such a step can be replayed as a CUDA graph.

        Returns:
            0-d float32 loss, the mean over the step's evaluations.
        """
        self._follow_groups()
        result = self.zm.step(**batch)
        self._made = True
        self.done(result)
        return result.loss

    def _follow_groups(self) -> None:
        """Take the learning rate and the weight decay that the groups have now.

        Raises:
            ZOError: the groups ask for what one rule for all tensors cannot do.
        """
        rates = {float(group["lr"]) for group in self.param_groups if group["params"]}
        if len(rates) > 1:
            raise ZOError(
                f"the optimizer's groups have the learning rates {' and '.join(f'{each:g}' for each in sorted(rates))}"
                ", and a rule has one for all tensors: set the same for every group of optimizer.param_groups"
            )
        self.zm.lr = rates.pop()
        decay, of_vectors = (float(group["weight_decay"]) for group in self.param_groups)
        if of_vectors or (decay > 0) != self.zm.job.decays:
            raise ZOError(
                "the optimizer's weight decay was changed to what the rule does not do: give weight_decay= to begin "
                "with one, which moves matrices and never vectors"
            )
        self.zm.set_hyper(weight_decay=decay)


class ZOTrainer(Trainer):
    """Train with forward passes alone. It takes the arguments of ``transformers.Trainer``, except the optimiser.

    A subclass may override the Trainer's methods: :mod:`zowrap.training.overrides` has the table of what becomes of
    each. ``compute_loss``, ``compute_loss_func`` and ``label_smoothing_factor`` give the loss that trains and
    evaluates. They get one micro-batch at a time, with its own number of label tokens as ``num_items_in_batch``, and
    micro-batches count by these. An overridden ``compute_loss`` may read anything at each step, so it runs eagerly
    unless ``engine="compiled"`` is asked for, which keeps the Python values of the first call.

    Args:
        model: a ``transformers`` model, a PEFT model, or any module with ``loss_fn``. Its tensors move in place: those
            that have ``requires_grad`` when the first step is made.
        args: a :class:`ZOConfig`. Plain ``TrainingArguments`` are refused: their defaults are for backpropagation.
        loss_fn: ``loss_fn(model, batch)``, 0-d or one loss per example; by default the model's own loss.
        model_init: makes the model in place of ``model``, anew for each :meth:`train`.
        compute_loss_func: ``compute_loss_func(outputs, labels, num_items_in_batch=...)``, as in the Trainer.
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
        named = {**dict(zip(_POSITIONAL, positional, strict=False)), **kwargs}
        _check_arguments(model, args, named)
        check_overrides(self, ZOTrainer)
        if batch_metrics is not None and self._is_overridden("prediction_step"):
            raise ZOError("prediction_step is overridden, and batch_metrics= takes its place: give one of them")
        args = args or ZOConfig(output_dir="tmp_trainer")
        _check_losses(self, args, loss_fn, named.get("compute_loss_func"))
        if loss_fn is not None and "remove_unused_columns" in args.unset:
            args.remove_unused_columns = False  # what the loss reads need not be what the model's forward takes
        args.evaluates(named.get("eval_dataset") is not None)
        self._made_folder = not Path(str(args.output_dir)).exists()  # the Trainer makes it
        model_init = named.pop("model_init", None)
        if model_init is not None:
            self.model_init, self.args = model_init, args
            model = self._make_model(None)
        assert model is not None
        with lowering.hide_quantization(model):
            super().__init__(model, args, **named)
        for callback in self.callback_handler.callbacks:
            if type(callback).__name__ == "JITCheckpointCallback":
                # A SIGTERM ends every training in a checkpoint (catch_stop_signals), at once and not only the first.
                callback.on_train_end(args, self.state, self.control)  # which gives back the handler it replaced
        self.model_init = model_init
        self.batch_metrics = batch_metrics
        self.run = Run(str(args.output_dir))
        self._bare, self._loss_fn = model, loss_fn
        self._loss_source: str | None = None
        self._told_of_loss = False
        self._optimizer_step: ZOStep | None = None
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
        self.callback_handler = RunEvents(self.callback_handler, self._callback)
        self.resumed_from = 0
        self.interrupted = False
        self._resuming: Start | None = None
        self._sums = evaluation.Evaluation()
        self._sums_of = "eval"
        self._wrong_labels: Tensor | None = None  # 0-d bool, on an accelerator: a label of a step named no class

    def wrap(self, engine: str | None) -> None:
        """Wrap the model, with the rule at its first step: ``zm`` is then another."""
        self._wrapped_with = options = values_of(self.args)
        lr = "auto" if self.args.auto_lr else self.args.learning_rate
        self._engine_asked = engine
        self._loss_source = self._find_loss_source()
        loss_fn = self._loss_fn if self._loss_source is None else self._compute_given_loss
        if self._loss_source not in (None, *_LOSS_ARGUMENTS) and engine is None:
            engine = "eager"
            if not self._told_of_loss:
                self._told_of_loss = True
                say(
                    f"{self._loss_source} gives the loss and runs eagerly, as it may read other values at each step: "
                    "engine='compiled' compiles it with the values of the first"
                )
        given = {"rule": self._rule, "lr": lr, "engine": engine}
        self.zm: ZOModel = zo_wrap(self._bare, loss_fn=loss_fn, **options | given)
        self._loss = self.zm.loss_module
        if self._optimizer_step is not None:
            self._optimizer_step.zm = self.zm
        # A smoothed loss takes the labels of the model's own.
        self._labelled = LossModule(self._bare) if self._loss_source == "label_smoothing_factor" else self._loss
        self._watched = [(name, each, each.requires_grad) for name, each in self._bare.named_parameters()]

    # --- what may change before the first step -----------------------------------------------------------------

    def _is_overridden(self, name: str) -> bool:
        return find_override(self, ZOTrainer, name) is not None

    def _find_loss_source(self) -> str | None:
        """Name what makes the loss another than the model's own or ``loss_fn``, if something does."""
        for name in (name for name, hook in HOOKS.items() if hook.use is Use.LOSS):
            found = find_override(self, ZOTrainer, name)
            if found is not None:
                return f"{name} of {found.where}"
        if self.compute_loss_func is not None:
            return "compute_loss_func"
        return "label_smoothing_factor" if self.label_smoother is not None else None

    def _compute_given_loss(self, model: nn.Module, batch: dict[str, Any]) -> Tensor:
        """Compute the loss of a batch as the Trainer would, through every override of it: 0-d, or ``[batch]``."""
        items = self._get_num_items_in_batch([batch], self.args.device)
        with self.compute_loss_context_manager():
            return self.compute_loss(model, dict(batch), num_items_in_batch=items)

    def _follow_loss(self) -> None:
        """Wrap again where the loss is another than it was: a method may be put on the trainer itself.

        Raises:
            ZOError: the model has moved by the earlier loss.
        """
        found = self._find_loss_source()
        if found == self._loss_source:
            return
        if self.zm.step_count:
            raise ZOError(f"{found or 'the loss'} was changed after the first step: make a new trainer with it")
        _check_losses(self, self.args, self._loss_fn, self.compute_loss_func)
        self.wrap(self._engine_asked)

    def _follow_options(self) -> None:
        """Wrap again where an option of a step was changed on ``args`` before the first step.

        Raises:
            ZOError: it was changed later.
        """
        now = values_of(self.args)
        changed = [name for name, value in now.items() if value != self._wrapped_with[name]]
        if not changed:
            return
        if self.zm.step_count:
            raise ZOError(
                f"{changed[0]} was changed after step {self.zm.step_count}, and a run keeps its options: make a new "
                "trainer with it"
            )
        check_values(self.args, changed)
        self._rule = self.args.rule_object()
        self.wrap(self.args.engine)

    def _follow_frozen(self) -> None:
        """Wrap again where weights were frozen or unfrozen before the first step.

        Raises:
            ZOError: they were so later, or although ``trainable`` says what moves.
        """
        if all(each.requires_grad == before for _, each, before in self._watched):
            return
        changed = {name: each for name, each, before in self._watched if each.requires_grad != before}
        if self.args.trainable is not None:
            moving = {id(parameter.tensor) for parameter in self.zm.parameters}
            changed = {name: each for name, each in changed.items() if id(each) in moving and not each.requires_grad}
            if not changed:
                return
        name, first = next(iter(changed.items()))
        if self.args.trainable is not None or self.zm.step_count or self.zm.accumulated or self.args.auto_lr:
            if self.zm.step_count == 0:
                self.mark_start_failed()
            what = "unfrozen" if first.requires_grad else "frozen"
            when = f"after step {self.zm.step_count}" if self.zm.step_count else "after the trainer was made"
            named = self.args.trainable is not None
            instead = "leave it out of trainable=" if named else "set requires_grad before train(), or give trainable="
            raise ZOError(
                f"{name} was {what} {when} (requires_grad), and a run moves the same weights from its first step to "
                f"its last: {instead}"
            )
        planned = self.zm.planned
        self.wrap(self._engine_asked)
        self.zm.planned = planned
        if self.is_in_train and self._writer is not None:
            self._writer.change_model(self.zm)

    def _make_model(self, trial: Any) -> nn.Module:
        """Call ``model_init``, from the same seed each time."""
        set_seed(self.args.seed)
        return self.call_model_init(trial)

    def _make_ready(self, resume: str | bool | None, trial: Any) -> None:
        """Before a training: wrap the model that it begins with, as options, overrides and frozen weights are now.

        Raises:
            ZOError: the steps of the training before would be lost.
        """
        if str(self.run.path) != str(Path(str(self.args.output_dir))):
            self.run = Run(str(self.args.output_dir))
        self.args.settle_data_seed()
        self.accelerator.dataloader_config.data_seed = self.args.data_seed
        trained = self._writer is not None
        if trained:
            self.optimizer = self.lr_scheduler = self._optimizer_step = None  # type: ignore[assignment]
        if trained and self.model_init is not None:
            self._bare = self.model = self.model_wrapped = self._make_model(trial)
            if self.place_model_on_device:
                self._move_model_to_device(self._bare, self.args.device)
        elif trained and self.zm.step_count and not resume:
            if self.run.exists() and not self.args.overwrite:
                raise ZOError(
                    f"{self.run.path} holds the steps of the training before: overwrite=True replaces them and goes on "
                    "from the present weights, and resume_from_checkpoint=True goes on to a larger max_steps"
                )
        else:
            self._follow_loss()
            self._follow_options()
            if not self.zm.step_count:
                self._follow_frozen()
            return
        self._rule = self.args.rule_object()
        self.wrap(self.args.engine)

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
        self._follow_frozen()
        batch = self.prepare_batch(inputs)
        step = self._optimizer_step  # None outside of a training: then nothing moves
        alone = step is not None and self.args.gradient_accumulation_steps == 1
        loss = step.make_whole(batch) if step is not None and alone else self.zm.accumulate(**batch)
        if step is None:
            self.zm.discard()
        every = self.args.torch_empty_cache_steps
        if every is not None and self.state.global_step % every == 0:
            clear_device_cache()
        batches = getattr(self, "current_gradient_accumulation_steps", self.args.gradient_accumulation_steps)
        return torch.nan_to_num(loss, nan=0.0, posinf=0.0, neginf=0.0) / batches

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
        waits = labels.device.type == "cpu" or what != "training" or not self._labelled.settled
        if labels.device.type == "cpu":
            self._labelled.settle(batch)  # the model's own loss may know other labels
        classes = self._labelled.classes
        if classes is None:
            return batch
        # Before that is known, an accelerator is kept from labels that are too large, which would end the process.
        wrong = find_invalid_labels(labels, classes) if self._labelled.settled else labels >= classes
        if not waits:
            any_wrong = wrong.any()
            self._wrong_labels = any_wrong if self._wrong_labels is None else self._wrong_labels | any_wrong
        elif bool(wrong.any()):
            self._refuse_label(int(labels[wrong][0]), classes, what)
        return batch

    def refuse_wrong_labels(self) -> None:
        """Raise :class:`ZOError` if a label of the steps so far named no class."""
        wrong, self._wrong_labels = self._wrong_labels, None
        if wrong is not None and bool(wrong) and self._labelled.classes is not None:
            self._refuse_label(None, self._labelled.classes, "training")

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
        given = getattr(self.optimizer, "optimizer", self.optimizer)
        if given is not None and given is not self._optimizer_step:
            raise ZOError("an optimizer was set on the trainer, and would be ignored: the update is the rule's (rule=)")
        if self.optimizer is None:
            self.optimizer = self._optimizer_step = ZOStep(self.zm, self.args.learning_rate, self._add_step)  # type: ignore[arg-type]
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
        check_overrides(self, ZOTrainer)
        self._make_ready(resume_from_checkpoint, trial)
        given = {name: getattr(self.args, name) for name in _INTERVALS}
        try:
            with lock_folder(self.run.path, self._made_folder):
                return self._train(resume_from_checkpoint, trial, ignore_keys_for_eval, kwargs)
        finally:
            for name, value in given.items():  # fractions of a run, which may be longer the next time
                setattr(self.args, name, value)

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
        for name in _INTERVALS:  # fractions of the run, now that its length is known
            setattr(self.args, name, getattr(start.state, name))
        began = time.time()
        if start.step >= start.state.max_steps:
            return self._end_finished(start, writer)
        evaluates_first, model_init = self.args.eval_on_start, self.model_init
        try:
            with catch_stop_signals() as self._callback.signal, tempfile.TemporaryDirectory() as folder:
                self.state = start.state
                if start.step:
                    recorded = dataclasses.replace(start.state, **start.intervals)
                    recorded.save_to_json(str(Path(folder) / "trainer_state.json"))
                    self.args.eval_on_start = False
                    self._resuming = start
                    kwargs["resume_from_checkpoint"] = folder
                self.model_init = None  # type: ignore[assignment]  # the model is made
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
            self.args.eval_on_start, self.model_init = evaluates_first, model_init
            self._resuming = None
        if self.args.load_best_model_at_end and self.best_step is not None:
            self._load_best_model()
        self._tell_skipped(writer)
        metrics = {**output.metrics, "skipped_steps": writer.log.skipped}
        return output._replace(training_loss=writer.log.mean_loss(), metrics=metrics)

    def _tell_skipped(self, writer: RunWriter) -> None:
        """Say at the end how many steps of the run were skipped, if any was."""
        skipped = writer.log.skipped
        if skipped:
            were, their = ("was", "its") if skipped == 1 else ("were", "their")
            say(f"{skipped} of {self.zm.step_count} steps {were} skipped: {their} loss was not finite")

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
            write_model=self._write_model if any(map(self._is_overridden, ("save_model", "_save"))) else None,
            check_labels=self.refuse_wrong_labels,
        )

    def _write_model(self, folder: Path) -> None:
        """Write the model as a subclass writes it."""
        self.save_model(str(folder), _internal_call=True)

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
        self._load_callback_state()
        writer.tell_best(self.state)
        # What a training does before its first step, and every later start as well.
        self.args.learning_rate = start.plan.get("learning_rate", self.args.learning_rate)
        tokenizer = self.processing_class
        if isinstance(tokenizer, PreTrainedTokenizerBase | ProcessorMixin) and hasattr(self._bare, "config"):
            align_special_tokens(self._bare, tokenizer)
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
        self._save(output_dir or str(self.args.output_dir))

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
        self.store_flos()
        states = collect_states([*self.callback_handler.callbacks, self.control])
        self.state.stateful_callbacks = states  # type: ignore[assignment]
        self._writer.save_checkpoint(dataclasses.asdict(self.state))

    def _load_callback_state(self) -> None:
        """Give the callbacks the states that they had: the run goes on as the one that it would have been."""
        states: Any = self.state.stateful_callbacks or {}
        asked = self.args.restore_callback_states_from_checkpoint
        callbacks = [*self.callback_handler.callbacks, *([self.control] if asked else [])]
        gone = restore_states(callbacks, states, arguments=asked)
        if gone:
            logger.warning(f"The run had callbacks with a state that this trainer does not have: {', '.join(gone)}")

    def _init_training_state(self, *args: Any, **kwargs: Any) -> Any:
        """Restore the state as the Trainer does, which warns of other intervals than the run had; these count now."""
        found = super()._init_training_state(*args, **kwargs)
        if self._resuming is not None:
            for name in _INTERVALS:
                setattr(self.state, name, getattr(self._resuming.state, name))
        return found

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        """Do what is due after a step, then keep the states of the callbacks."""
        super()._maybe_log_save_evaluate(*args, **kwargs)
        self.run.history.add_states(collect_states(self.callback_handler.callbacks), self.state)

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
        self._follow_loss()
        overridden = any(map(self._is_overridden, ("prediction_step", "evaluation_loop")))
        whole = self.compute_metrics is not None or overridden
        if description != "Evaluation" or (whole and self.batch_metrics is None):
            output = super().evaluation_loop(
                dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
            )
            # The Trainer's loss is a mean of the batches' means; this one gives every token or example the same weight.
            ours = {f"{metric_key_prefix}_loss": loss for loss in sums.means().values()}
            ours.update(self._tell_broken_rows(sums, metric_key_prefix))
            return output._replace(metrics={**(output.metrics or {}), **ours})
        self.callback_handler.eval_dataloader = dataloader
        for inputs in dataloader:
            inputs = self.prepare_batch(inputs, "evaluation")
            evaluation.add_batch(sums, self._loss, inputs, self.batch_metrics, self.args.device)
            self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)
        if not sums.examples:
            raise ZOError("there is nothing to evaluate on: the evaluation set is empty")
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in sums.means().items()}
        metrics.update(self._tell_broken_rows(sums, metric_key_prefix))
        return EvalLoopOutput(None, None, metrics, sums.examples)  # type: ignore[arg-type]

    def _tell_broken_rows(self, sums: evaluation.Evaluation, prefix: str) -> dict[str, float]:
        """Warn of the rows of an evaluation without a finite loss, and return their number as a metric, if any."""
        broken = sums.find_broken_rows()
        if not broken:
            return {}
        which = f"row {broken[0]} has" if len(broken) == 1 else f"{len(broken)} rows have"
        first = "" if len(broken) == 1 else f", the first is row {broken[0]}"
        warnings.warn(
            f"{which} no finite loss in the evaluation {prefix!r}{first} (counted from 0), nor has their mean",
            ZOWarning,
            stacklevel=4,
        )
        return {f"{prefix}_rows_without_loss": float(len(broken))}

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Compute the loss of one batch at the present weights; only evaluations and overrides ask for it."""
        if self._loss_source is not None:
            return super().compute_loss(
                model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch
            )
        sums, weights, outputs = evaluation.evaluate_batch(self._loss, inputs, outputs=True)
        rows = count_rows(inputs)
        self._sums.examples += rows
        self._sums.add_loss(sums, weights, rows, self.args.device)
        loss = (sums.sum() / weights.sum()).float()
        if not isinstance(outputs, dict) and self._loss.form != "own":  # which is a tuple with its loss already
            outputs = (loss, *outputs)
        return (loss, outputs) if return_outputs else loss

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor | None, Any, Any]:
        """Evaluate a batch as the Trainer does, and keep its loss with the weight of its tokens or examples."""
        inputs = self.prepare_batch(inputs, "evaluation")
        before = self._sums.examples
        loss, logits, labels = super().prediction_step(model, inputs, prediction_loss_only, ignore_keys, **kwargs)
        if loss is not None and self._sums.examples == before:
            rows = count_rows(inputs)
            self._sums.examples += rows
            self._sums.add_loss(*self._loss.weigh(loss, inputs), rows, self.args.device)
        return loss, logits, labels

    def _evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Evaluate, and keep what an override of ``evaluate`` returns beside what it tells the callbacks."""
        metrics = super()._evaluate(*args, **kwargs)
        self._keep_returned(metrics)
        return metrics

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """Compare as the Trainer does; an override of ``_evaluate`` need not have passed on to this class."""
        self._keep_returned(metrics)
        return super()._determine_best_metric(metrics, trial)

    def _keep_returned(self, metrics: dict[str, float]) -> None:
        if self.is_in_train and self._writer is not None:
            self._writer.add_returned_metrics(denumpify_detensorize(metrics), self.state.global_step)

    def hyperparameter_search(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refuse: a search trains many times, each time into a folder of its own.

        Raises:
            ZOError: always.
        """
        raise ZOError(
            "hyperparameter_search is not supported: make a ZOTrainer with its own output_dir for each trial, or let "
            "lr='auto' choose the learning rate"
        )

    def _get_evaluation(self) -> tuple[evaluation.Evaluation, str] | None:
        """Return the sums of the latest evaluation and the prefix of its metrics' names; None outside of a training."""
        return (self._sums, self._sums_of) if self.is_in_train else None

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log the steps' own mean loss and ``|projected gradient|`` in place of the Trainer's."""
        if "loss" in logs and self._writer is not None:
            logs.pop("grad_norm", None)
            logs.update(self._writer.take_log())
        super().log(logs, start_time)
        if self.is_in_train and self._writer is not None:
            self.run.history.add_log(self.state.log_history[-1], self.state.global_step)


# The Trainer's arguments after (model, args), in its order.
_POSITIONAL = tuple(inspect.signature(Trainer.__init__).parameters)[3:]
# Arguments that give the loss as a function of outputs and labels, which is compiled like any other.
_LOSS_ARGUMENTS = ("compute_loss_func", "label_smoothing_factor")
_INTERVALS = ("logging_steps", "eval_steps", "save_steps")


def _check_losses(trainer: ZOTrainer, args: ZOConfig, loss_fn: Any, compute_loss_func: Any) -> None:
    """Refuse two losses for one training, of which one would be ignored."""
    arguments = {
        "loss_fn=": loss_fn is not None,
        "compute_loss_func=": compute_loss_func is not None,
        "label_smoothing_factor=": bool(args.label_smoothing_factor),
    }
    given = [name for name, is_given in arguments.items() if is_given]
    override = find_override(trainer, ZOTrainer, "compute_loss")
    if override is not None:
        reads = {"compute_loss_func=": "compute_loss_func", "label_smoothing_factor=": "label_smoother"}
        given = [
            name for name in given if name not in reads or not mentions(trainer, override, reads[name], "compute_loss")
        ]
        given += [f"compute_loss of {override.where}"] if given else []
    if len(given) > 1:
        raise ZOError(f"{given[0]} and {given[1]} each give a loss, and a training has one: leave one of them out")


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
    if (model is None) == (kwargs.get("model_init") is None):
        raise ZOError("ZOTrainer takes model=... or model_init=..., and one of them")
    if args is not None and not isinstance(args, ZOConfig):
        raise ZOError(f"args must be a ZOConfig, not {type(args).__name__}, whose defaults are for backpropagation")
    if kwargs.get("optimizer_cls_and_kwargs") is not None:
        raise ZOError("optimizer_cls_and_kwargs has no meaning here: the update is the rule's (rule=)")
    if any(each is not None for each in kwargs.get("optimizers") or ()):
        raise ZOError("optimizers has no meaning here: the update is the rule's, the schedule is lr_scheduler_type")
