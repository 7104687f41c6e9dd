"""``ZOConfig``: the Trainer's arguments, with defaults that fit training without gradients."""

from __future__ import annotations

import json
import warnings
from dataclasses import dataclass, field, fields
from typing import Any

from transformers import TrainingArguments
from transformers.trainer_utils import IntervalStrategy
from transformers.training_args import OptimizerNames

from zowrap import rules
from zowrap.errors import ZOError, ZOWarning
from zowrap.step.options import ENTRIES, StepOptions, check_values
from zowrap.storage.lock import check_one_process

# Evaluate and save ten times in a run, log a hundred times (the Trainer takes a fraction of max_steps).
TENTH, HUNDREDTH = 0.1, 0.01


@dataclass
class ZOConfig(StepOptions, TrainingArguments):
    """Arguments of :class:`zowrap.ZOTrainer`: ``transformers.TrainingArguments`` and the options of ``zo_wrap``.

    The options of a step are those of :class:`zowrap.step.options.StepOptions`; ``blocks`` may also be ``"layer"`` and
    ``trainable`` a predicate ``(name, tensor) -> bool``.

    The Trainer's defaults are made for backpropagation. Left unset, these follow the rule instead:

    ===========================  ==================================  ========================================
    argument                     the Trainer's default               here
    ===========================  ==================================  ========================================
    learning_rate                5e-5                                the rule's own; ``"auto"`` chooses it
    lr_scheduler_type            linear                              constant, after ``warmup_steps`` if given;
                                                                     linear with residual credit
    max_grad_norm                1.0                                 0: there is no gradient to clip
    eval_strategy, eval_steps    never                               before the first step and ten times,
                                                                     if there is an eval_dataset
    save_steps                   500                                 a tenth of the run; the journal holds
                                                                     every step between checkpoints
    save_total_limit             no limit                            1, and the best model in ``output_dir``
                                                                     itself; 0 keeps all
    logging_steps                500                                 a hundredth of the run
    logging_nan_inf_filter       True (waits for every loss)         False: skipped steps are counted
    ===========================  ==================================  ========================================

    Options that have no meaning without a backward pass are ignored with one warning each
    (``gradient_checkpointing``, ``max_grad_norm``, …); those that would make it another training than the one asked
    for are refused (another ``optim``, ``fp16``, ``deepspeed`` …).

    Args:
        rule_options: hyper-parameters of the rule, ``{"beta": 0.99}``, or the same as JSON.
        engine: as in :func:`zowrap.zo_wrap`; left open, a run of few steps is eager where compiling would take longer
            than it saves (:mod:`zowrap.model.choice`). A resumed run keeps the engine it began with.
        memory: as in :func:`zowrap.zo_wrap`; a resumed run keeps what ``"auto"`` chose, and may be given another.
        lr: another name for ``learning_rate``. ``"auto"`` has :func:`zowrap.tune_lr` choose it from training batches
            before the first step; a resumed run keeps the choice.
        save_every: another name for ``save_steps``.
        max_skipped: this many steps in a row with a loss that is not finite end the run.
        overwrite: allow a training from the start in an ``output_dir`` that holds another's steps; they are removed.

    Raises:
        ZOError: an option that is refused, unknown or out of range.
    """

    rule_options: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Hyper-parameters of the rule, by name; as JSON on a command line."}
    )
    # As the Trainer's: ``zo_wrap`` has 0, but users of the Trainer expect its data order.
    seed: int = field(default=42, metadata={"help": "Of the noise, the data order and a fresh head."})
    # Text or a number: HfArgumentParser, which knows no union, makes text of what stands on a command line.
    lr: str | None = field(  # type: ignore[assignment]
        default=None, metadata={"help": "Another name for learning_rate; 'auto' chooses it."}
    )
    save_every: int | None = field(default=None, metadata={"help": "Another name for save_steps."})
    # Twenty skips in a row are no accident of the directions: their chance halves with each for a run that can go on.
    max_skipped: int = field(default=20, metadata={"help": "Skipped steps in a row that end the run."})
    overwrite: bool = field(default=False, metadata={"help": "Remove what an earlier run left in output_dir."})

    # The Trainer's own, unset by default: None means "as it fits the rule".
    learning_rate: float | None = field(  # type: ignore[assignment]
        default=None, metadata={"help": "Learning rate; by default the rule's."}
    )
    lr_scheduler_type: str | None = field(  # type: ignore[assignment]
        default=None, metadata={"help": "Schedule of the learning rate; by default constant, or linear with residual."}
    )
    max_grad_norm: float | None = field(  # type: ignore[assignment]
        default=None, metadata={"help": "Ignored: there is no gradient to clip."}
    )
    optim: str | None = field(  # type: ignore[assignment]
        default=None, metadata={"help": "Not used: the rule takes the optimiser's place."}
    )
    eval_strategy: str | None = field(  # type: ignore[assignment]
        default=None, metadata={"help": "no, steps or epoch; by default steps if there is an eval_dataset."}
    )
    eval_steps: float | None = field(
        default=None, metadata={"help": "Steps between evaluations; by default a tenth of the run."}
    )
    eval_on_start: bool | None = field(  # type: ignore[assignment]
        default=None, metadata={"help": "Evaluate before the first step; by default if evaluating at all."}
    )
    save_steps: float | None = field(  # type: ignore[assignment]
        default=None, metadata={"help": "Steps between checkpoints; by default a tenth of the run."}
    )
    save_total_limit: int | None = field(
        default=None, metadata={"help": "Checkpoints kept; by default 1. 0 keeps all."}
    )
    logging_steps: float | None = field(  # type: ignore[assignment]
        default=None, metadata={"help": "Steps between logs; by default a hundredth of the run."}
    )
    logging_nan_inf_filter: bool | None = field(  # type: ignore[assignment]
        default=None, metadata={"help": "By default off: it waits for every loss."}
    )
    remove_unused_columns: bool | None = field(  # type: ignore[assignment]
        default=None, metadata={"help": "By default on, unless a loss_fn is given."}
    )

    def __post_init__(self) -> None:
        if isinstance(self.rule_options, str):
            self.rule_options = _from_json(self.rule_options)
        if self.blocks == ["layer"]:  # as it comes from a command line, which knows no union
            self.blocks = "layer"  # type: ignore[assignment]
        _ignore_and_refuse(self)
        self.auto_lr = _settle_lr(self)
        _settle_schedule(self)
        self.unset = {name for name in _FILLED if getattr(self, name) is None}
        _check_numbers(self)
        if self.learning_rate is None:
            self.learning_rate = self.rule_object().lr  # type: ignore[override]
        if self.save_every is not None:
            if self.save_steps not in (None, self.save_every):
                raise ZOError("save_every and save_steps are two names of one option: give one")
            self.save_steps = self.save_every  # type: ignore[override]
        evaluates = self.eval_strategy is not None or self.load_best_model_at_end or self.eval_steps is not None
        for name, value in _FILLED.items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        if evaluates and "eval_strategy" in self.unset:
            self.eval_strategy = "steps"
        if self.eval_on_start is None:
            self.eval_on_start = False  # until the trainer knows whether there is an eval_dataset
            self.unset.add("eval_on_start")
        check_one_process()  # before transformers asks: on a machine without a GPU it says 1 whatever was started
        super().__post_init__()
        if self.device.type == "cpu":
            self.dataloader_pin_memory = False  # there is no other memory to copy to; torch warns of it
        if self.data_seed is None:
            self.unset.add("data_seed")
        self.settle_data_seed()
        if self.world_size > 1:  # started by something that sets no variable
            raise ZOError("several processes (torchrun, accelerate launch) are not supported: start one")
        if self.n_gpu > 1:
            warnings.warn(
                f"{self.n_gpu} GPUs are visible, one is used ({self.device}): set CUDA_VISIBLE_DEVICES to choose which",
                ZOWarning,
                stacklevel=3,
            )
            self._n_gpu = 1

    def rule_object(self, steps: int | None = None) -> rules.Rule:
        """The rule with its hyper-parameters and the learning rate, if one is set.

        Args:
            steps: those planned: a rule that can warm up does so over them, unless ``warmup`` is given.
        """
        options: dict[str, Any] = {**self.rule_options} if isinstance(self.rule_options, dict) else {}
        if "learning_rate" not in self.unset:
            options["lr"] = self.learning_rate
        rule = rules.get(self.rule, **options)
        if steps and "warmup" not in options and rule.hyper.get("warmup") is False:
            rule = rules.get(self.rule, **options, warmup=steps)
        return rule

    def settle_data_seed(self) -> None:
        """Let the data's order follow from the seed, as it is now, and not from the generator's past."""
        if "data_seed" in self.unset:
            self.data_seed = self.seed

    def evaluates(self, has_eval_dataset: bool) -> None:
        """Settle what depends on the data: whether to evaluate at all, and before the first step."""
        if "eval_strategy" in self.unset:
            self.eval_strategy = IntervalStrategy("steps" if has_eval_dataset else "no")  # type: ignore[override]
            self.do_eval = has_eval_dataset
        if "eval_on_start" in self.unset:
            self.eval_on_start = has_eval_dataset and self.eval_strategy != "no"  # type: ignore[override]


# What an unset argument becomes. save_total_limit 1: a resumed run needs one snapshot, the best model lies beside it.
_FILLED: dict[str, Any] = {
    "learning_rate": None,  # the rule's
    "lr_scheduler_type": "constant",
    "max_grad_norm": 0.0,
    "optim": "adamw_torch",  # never built
    "eval_strategy": "no",
    "eval_steps": TENTH,
    "save_steps": TENTH,
    "save_total_limit": 1,
    "logging_steps": HUNDREDTH,
    "logging_nan_inf_filter": False,
    "remove_unused_columns": True,
}

# name → what it does elsewhere. Ignoring these leaves the training that was asked for as it is.
_IGNORED = {
    "max_grad_norm": "clips gradients, and there are none",
    "gradient_checkpointing": "saves activations for a backward pass, and there is none",
    "activation_checkpointing": "saves activations for a backward pass, and there is none",
    "torch_compile": "asks for what the engine does anyway: it compiles the step",
    "torch_compile_backend": "chooses a compiler, and the engine has its own",
    "torch_compile_mode": "chooses how to compile, and the engine has its own way",
    "use_liger_kernel": "replaces kernels that the engine compiles itself",
    "push_to_hub": "would upload during the run: upload output_dir afterwards instead",
    "logging_nan_inf_filter": "asks for what is done anyway: losses that are not finite are left out, and counted",
}
# name → what to do instead. Ignoring these would give another training than the one asked for.
_REFUSED = {
    "fp16": "load the model in 16 bit instead (dtype=torch.float16): there is no gradient to scale",
    "bf16": "load the model in 16 bit instead (dtype=torch.bfloat16): updates are then rounded stochastically",
    "fp16_full_eval": "load the model with dtype=torch.float16 instead",
    "bf16_full_eval": "load the model with dtype=torch.bfloat16 instead",
    "deepspeed": "it shards gradients and optimiser state, and there are none: start without it",
    "fsdp": "it shards gradients and optimiser state, and there are none: start without it",
    "neftune_noise_alpha": "its noise would differ between the two sides of a step: leave it out",
    "auto_find_batch_size": "a run whose batch size changes cannot be repeated: set per_device_train_batch_size",
    "optim_args": "give hyper-parameters to the rule: rule_options={'beta': ...}",
    "debug": "losses and weights that are not finite are found and told anyway: leave it out",
    "parallelism_config": "it is for several processes, and a run has one: start without it",
    "ddp_backend": "it is for several processes, and a run has one: start without it",
    "optim_target_modules": "name what moves instead: trainable=['*q_proj*', ...]",
}
# Hyper-parameters of an optimiser that is never made: their defaults ask for nothing.
_OF_ADAM = ("adam_beta1", "adam_beta2", "adam_epsilon")
# Schedules of transformers without a warm-up.
_WITHOUT_WARMUP = ("constant", "reduce_lr_on_plateau")


def _settle_schedule(config: ZOConfig) -> None:
    """Choose the schedule that was left open: constant, after a warm-up if one is asked for.

    With residual credit it falls to 0: its first steps can be large, and at a constant rate the loss rises again. Of a
    story model on SST-2's sentences it was 3.35 after 24 steps and 3.54 after 48; falling within 24 steps, 3.25.

    Raises:
        ZOError: the schedule that was asked for has none.
    """
    asked = getattr(config.lr_scheduler_type, "value", config.lr_scheduler_type)
    if config.warmup_steps and asked in _WITHOUT_WARMUP:
        raise ZOError(
            f"warmup_steps does nothing with lr_scheduler_type={asked!r}: leave one of them out, or take "
            "'constant_with_warmup'"
        )
    if asked is None and config.estimator == "residual":
        config.lr_scheduler_type = "linear"
    elif config.warmup_steps and asked is None:
        config.lr_scheduler_type = "constant_with_warmup"


def _settle_lr(config: ZOConfig) -> bool:
    """Make one learning rate of the option's two names; returns whether it is to be chosen (``"auto"``)."""
    given: list[Any] = [value for value in (config.lr, config.learning_rate) if value is not None]
    rates = {value if value == "auto" else _number(value) for value in given}
    if len(rates) > 1:
        raise ZOError("lr and learning_rate are two names of one option: give one")
    auto = rates == {"auto"}
    config.lr = "auto" if auto else None
    config.learning_rate = None if auto or not rates else rates.pop()
    return auto


def _number(value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        raise ZOError(f"lr must be a positive finite number or 'auto', got {value!r}") from None


def _ignore_and_refuse(config: ZOConfig) -> None:
    default_optim = {None, *(name.value for name in OptimizerNames if name.value.startswith("adamw_torch"))}
    if str(getattr(config.optim, "value", config.optim)) not in {str(name) for name in default_optim}:
        raise ZOError(f"optim={config.optim!r} has no meaning here: the update is the rule's (rule={config.rule!r})")
    if config.optim is not None:
        _warn("optim", "chooses an optimiser, and the update is the rule's")
    for name, instead in _REFUSED.items():
        if getattr(config, name, None):
            raise ZOError(f"{name} is not supported: {instead}")
    defaults = {each.name: each.default for each in fields(TrainingArguments)} | _FILLED
    for name in _OF_ADAM:
        if getattr(config, name) != defaults[name]:
            raise ZOError(
                f"{name} has no meaning here: the update is the rule's, whose hyper-parameters are its own "
                "(rule_options={'beta1': ...} for rule='zo_adam')"
            )
    for name, why in _IGNORED.items():
        if getattr(config, name, None):
            if not (name == "gradient_checkpointing" and getattr(config, "activation_checkpointing", None)):
                _warn(name, why)
            setattr(config, name, defaults[name])


def _from_json(text: str) -> dict[str, Any]:
    """``'{"beta": 0.9}'``, as it comes from a command line."""
    try:
        options = json.loads(text)
    except ValueError:
        options = None
    if not isinstance(options, dict):
        raise ZOError(f"rule_options must be a dictionary, or one in JSON such as '{{\"beta\": 0.9}}', got {text!r}")
    return options


def _warn(name: str, why: str) -> None:
    warnings.warn(f"{name} is ignored: it {why}", ZOWarning, stacklevel=5)


def _check_numbers(config: ZOConfig) -> None:
    if not isinstance(config.rule_options, dict | None):
        raise ZOError(f"rule_options must be a dictionary, got {config.rule_options!r}")
    if not isinstance(config.max_skipped, int) or config.max_skipped < 1:
        raise ZOError(f"max_skipped must be a whole number from 1, got {config.max_skipped!r}")
    check_values(config, [name for name in ENTRIES if name != "lr"])  # of which there are two names
    config.rule_object()
