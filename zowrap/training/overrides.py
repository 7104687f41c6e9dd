"""The table of the Trainer's methods: which of them a subclass of ``ZOTrainer`` may override, and how.

A script that overrides a method asks for another training. Either that training is made, or one sentence names the
method: an override is never accepted and then ignored. Each method of ``transformers.Trainer`` is in the table once:

=============  ====================================================================================================
``Use.CALLED`` the override is called where the Trainer calls it
``Use.LOSS``   the loss that trains and evaluates is then computed through the Trainer's ``compute_loss``
``Use.PASSES`` the override is called, and must pass on to ``super()``, which makes the step or keeps the run
``Use.NEVER``  nothing calls it here, which a warning says
``Use.NOT``    refused; the table says what to do instead
=============  ====================================================================================================
"""

from __future__ import annotations

import enum
import inspect
import warnings
from collections.abc import Iterable, Iterator
from types import CodeType, FunctionType
from typing import Any, NamedTuple

from zowrap.errors import ZOError, ZOWarning


class Use(enum.Enum):
    """What becomes of a method that a subclass overrides."""

    CALLED = "called"
    LOSS = "loss"
    PASSES = "passes"
    NEVER = "never"
    NOT = "not"


class Hook(NamedTuple):
    """A method of the Trainer.

    Attributes:
        use: what becomes of an override.
        reason: of ``Use.NEVER``, why nothing calls it; of ``Use.NOT`` and ``Use.PASSES``, what to do instead.
    """

    use: Use
    reason: str = ""


def _all(names: Iterable[str], use: Use, reason: str = "") -> dict[str, Hook]:
    return {name: Hook(use, reason) for name in names}


_RULE = "the update is the rule's: give rule= and rule_options="
_ONE_PROCESS = "it is for several processes, and a run has one"
_SEARCH = "hyperparameter_search is not supported"
_PICKLE = "checkpoints are written as safetensors and JSON, and hold the rule's state"
_UPLOAD = "nothing is uploaded during a run"

# Method of the Trainer → what becomes of an override of it.
HOOKS: dict[str, Hook] = {
    # The loss.
    **_all(("compute_loss", "compute_loss_context_manager", "autocast_smart_context_manager"), Use.LOSS),
    "_get_num_items_in_batch": Hook(Use.CALLED),
    # The step and the loop around it.
    "training_step": Hook(
        Use.PASSES, "the step is the rule's: call super().training_step(...), or override compute_loss"
    ),
    **_all(
        ("_inner_training_loop", "_run_epoch", "_prepare_for_training", "_init_training_state", "_finalize_training"),
        Use.PASSES,
        "the loop writes the run's files: call super()'s",
    ),
    "_maybe_log_save_evaluate": Hook(Use.PASSES, "it keeps the run's history: call super()'s"),
    "train": Hook(Use.PASSES, "it opens the run's folder: call super().train(...)"),
    "set_initial_training_values": Hook(Use.NOT, "give max_steps= or num_train_epochs="),
    **_all(("get_batch_samples", "_track_num_input_tokens", "floating_point_ops", "store_flos"), Use.CALLED),
    **_all(("_prepare_input", "_prepare_inputs", "get_total_train_batch_size", "_get_learning_rate"), Use.CALLED),
    # The update.
    **_all(("create_optimizer", "get_optimizer_cls_and_kwargs"), Use.NOT, _RULE),
    "create_optimizer_and_scheduler": Hook(
        Use.NOT, "the update is the rule's (rule=), the schedule is lr_scheduler_type or create_scheduler"
    ),
    "create_scheduler": Hook(Use.CALLED),
    "get_decay_parameter_names": Hook(
        Use.NOT, "weight decay is the rule's: give weight_decay=, which leaves out vectors"
    ),
    **_all(
        ("_clip_grad_norm", "_get_grad_norm", "_mixed_mesh_grad_norm", "_has_mixed_mesh_grads"),
        Use.NOT,
        "there is no gradient: its estimate is in the log as projected_grad",
    ),
    # Data.
    **_all(("get_train_dataloader", "get_eval_dataloader", "get_test_dataloader", "_get_dataloader"), Use.CALLED),
    **_all(("_get_train_sampler", "_get_eval_sampler", "num_examples"), Use.CALLED),
    **_all(("_set_signature_columns_if_needed", "_remove_unused_columns"), Use.CALLED),
    "_get_collator_with_removed_columns": Hook(Use.CALLED),
    # Evaluation and logs.
    **_all(("evaluate", "evaluation_loop", "predict", "prediction_step", "_evaluate", "log", "end"), Use.CALLED),
    **_all(("log_metrics", "metrics_format", "save_metrics", "save_state"), Use.CALLED),
    **_all(("get_learning_rates", "get_num_trainable_parameters", "get_optimizer_group"), Use.CALLED),
    "_determine_best_metric": Hook(Use.NOT, "give metric_for_best_model= and greater_is_better="),
    # Saving and loading.
    **_all(("save_model", "_save", "_load_best_model"), Use.CALLED),
    "_save_checkpoint": Hook(
        Use.PASSES, "it writes what a run goes on from: call super()'s, or override save_model to write more"
    ),
    **_all(
        ("_load_from_checkpoint", "_load_optimizer_and_scheduler", "_load_rng_state"),
        Use.NOT,
        "a run goes on from its own checkpoint and journal: bring the model to other weights before train()",
    ),
    "_load_callback_state": Hook(Use.CALLED),
    **_all(("_save_rng_state", "_save_optimizer_and_scheduler", "_save_scaler", "_load_scaler"), Use.NEVER, _PICKLE),
    "_issue_warnings_after_load": Hook(Use.NEVER, "weights that do not fit are an error"),
    "_get_output_dir": Hook(Use.NOT, "a run has one folder: give output_dir="),
    **_all(("create_model_card", "push_to_hub"), Use.CALLED),
    **_all(("init_hf_repo", "_push_from_checkpoint", "_finish_current_push"), Use.NEVER, _UPLOAD),
    # The model, the device and the rest of the construction.
    **_all(("_validate_args", "_build_accelerator_args", "create_accelerator_and_postprocess"), Use.CALLED),
    **_all(("_move_model_to_device", "call_model_init"), Use.CALLED),
    "_wrap_model": Hook(Use.NOT, "the model is used in place: wrap it before it is given to the trainer"),
    **_all(("add_callback", "pop_callback", "remove_callback"), Use.CALLED),
    **_all(("is_local_process_zero", "is_world_process_zero"), Use.CALLED),
    # What is not supported.
    **_all(("get_sp_size", "get_cp_size", "get_tp_size"), Use.CALLED),
    **_all(
        ("_prepare_context_parallel_inputs", "_defer_fsdp_gradient_reduction", "_sync_replicated_trainable_parameters"),
        Use.NEVER,
        _ONE_PROCESS,
    ),
    "_update_auto_batch_size": Hook(Use.NEVER, "auto_find_batch_size is not supported"),
    "hyperparameter_search": Hook(Use.CALLED),
    **_all(("_hp_search_setup", "_report_to_hp_search", "_tune_save_checkpoint"), Use.NEVER, _SEARCH),
}
# Of a class that stands behind ZOTrainer in ``class Mine(ZOTrainer, Theirs)``: what ZOTrainer itself does without
# calling super(), so that Python finds no way to the override.
HIDDEN = ("training_step", "save_model", "_save", "_save_checkpoint", "_load_best_model", "hyperparameter_search")


class Override(NamedTuple):
    """A method of the Trainer that somebody overrides.

    Attributes:
        where: the class, or ``"this trainer"`` for a method that was put on the object.
        function: what is called.
        behind: the class comes after ``ZOTrainer`` in the order in which Python looks methods up.
    """

    where: str
    function: Any
    behind: bool


def find_override(trainer: object, ours: type, name: str) -> Override | None:
    """Find who overrides a method of the Trainer: an object, a subclass of ``ours``, or a class mixed in.

    Args:
        trainer: whose class is looked at.
        ours: ``ZOTrainer``, whose own methods are no overrides.
        name: of the method.
    """
    if name in vars(trainer):
        return Override("this trainer", vars(trainer)[name], behind=False)
    order = type(trainer).__mro__
    for place, each in enumerate(order):
        if name in vars(each) and not issubclass(ours, each):
            return Override(each.__name__, vars(each)[name], behind=place > order.index(ours))
    return None


def check_overrides(trainer: object, ours: type) -> None:
    """Refuse overrides that would never be called or would make another step, and warn of those without effect.

    Raises:
        ZOError: the first of them, with what to do instead.
    """
    for name, hook in HOOKS.items():
        found = find_override(trainer, ours, name)
        if found is None:
            continue
        if hook.use is Use.NOT:
            raise ZOError(f"{found.where} overrides {name}, which a zeroth-order trainer does not use: {hook.reason}")
        if found.behind and name in HIDDEN:
            raise ZOError(
                f"{found.where} overrides {name}, but ZOTrainer stands before it and has its own: name "
                f"{found.where} first, or override {name} in {type(trainer).__name__} itself"
            )
        if hook.use is Use.PASSES and not mentions(trainer, found, name):
            raise ZOError(f"{found.where} overrides {name} and does not pass on to the trainer's: {hook.reason}")
        if hook.use is Use.LOSS and name == "compute_loss":
            _check_signature(found)
        if hook.use is Use.NEVER:
            warnings.warn(
                f"{found.where} overrides {name}, which is never called: {hook.reason}", ZOWarning, stacklevel=4
            )


def _check_signature(found: Override) -> None:
    """Refuse a ``compute_loss`` that cannot be called as the Trainer calls it."""
    try:
        taken = inspect.signature(found.function).parameters
    except (TypeError, ValueError):
        return
    keywords = any(each.kind is inspect.Parameter.VAR_KEYWORD for each in taken.values())
    for name in ("return_outputs", "num_items_in_batch"):
        if name not in taken and not keywords:
            raise ZOError(
                f"compute_loss of {found.where} does not take {name}: write it as compute_loss(self, model, inputs, "
                "return_outputs=False, num_items_in_batch=None)"
            )


def mentions(trainer: object, found: Override, *names: str) -> bool:
    """Whether an override may use one of these attributes: Python code that never names one surely does not.

    The other methods of its class, which it may call, count as well.
    """
    code = getattr(getattr(found.function, "__func__", found.function), "__code__", None)
    if code is None:  # a functools.partial, a mock: it holds what it calls
        return True
    classes = (each for each in type(trainer).__mro__ if each.__name__ == found.where)
    helpers = (each.__code__ for kind in classes for each in vars(kind).values() if isinstance(each, FunctionType))
    return any(name in names for each in (code, *helpers) for name in _names(each))


def _names(code: CodeType) -> Iterator[str]:
    """Yield the names that code refers to, that of the functions inside it included."""
    yield from code.co_names
    yield from code.co_freevars
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            yield from _names(inner)
