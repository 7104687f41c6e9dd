"""``zo_wrap``: any torch model with a loss becomes a forward-only training step.

    model ── capture ──► Program ── passes ──► Program ── compile ──► step(batch)

:func:`zo_wrap` checks the options, selects the weights that move and gives both to an engine. Capture, passes and
compilation happen at the first step (:mod:`zowrap.engines.compiled`); the step itself is
:class:`zowrap.model.zo_model.ZOModel`.
"""

from __future__ import annotations

import dataclasses
import inspect
import warnings
from collections.abc import Callable
from typing import NamedTuple, Unpack

from torch import nn

from zowrap.engines import build_engine
from zowrap.errors import Option, ZOError, ZOWarning
from zowrap.loss.module import LossFn, LossModule
from zowrap.model.schedule import Schedule
from zowrap.model.zo_model import ZOModel
from zowrap.numerics.dtypes import is_16_bit
from zowrap.quant import adapters, modes
from zowrap.rules.base import Rule
from zowrap.step import blocks as block_lib
from zowrap.step import selections
from zowrap.step.blocks import Block
from zowrap.step.job import Job, QuantMode
from zowrap.step.method import Method, choose_method
from zowrap.step.options import DEFAULTS, StepKeywords, StepOptions, build_options
from zowrap.step.parameters import Parameter, select
from zowrap.step.pretrained import has_adapters


def zo_wrap(
    model: nn.Module, rule: str | Rule = "meazo", *, loss_fn: LossFn | None = None, **given: Unpack[StepKeywords]
) -> ZOModel:
    """Wrap ``model`` so that ``step(**batch)`` trains it with forward passes alone.

    ``model`` is used in place: its own tensors are the ones that move, and it is never copied.

    Args:
        model: a ``transformers`` model, a PEFT model (adapters move, the base stays), or any module with ``loss_fn``.
        rule: an update rule by name (``zowrap rules`` lists them) or from its constructor, ``rules.meazo(beta=0.9)``.
        loss_fn: ``loss_fn(model, batch)``, 0-d or ``[batch]``; by default the model's own loss. The compiled engine
            takes the Python values that it or the model reads (numbers, flags, which tensor a name stands for) at the
            first call of each program, and keeps them; a tensor that is changed in place is followed.
        lr: learning rate η; by default the rule's own. ``"auto"`` leaves it open: no step is made until
            :func:`zowrap.tune_lr` has chosen it, which needs data and the number of steps planned.
        eps: perturbation size ε, by default 1e-3 in units of the weights, the field's choice for full tuning in
            float32; for quantised models that of the way they move, :data:`zowrap.quant.modes.EPS`.
        seed: of all noise; 0 is a seed like any other.
        direction: law of the directions, see :mod:`zowrap.step.directions`; by default the rule's own, mostly gaussian.
        queries: directions per step, averaged (n-SPSA); by default the rule's own, mostly 1: most steps per forward.
        estimator: ``"central"`` (two forwards per direction), ``"forward"`` (one, and one shared), ``"population"``
            (two, every example along its own low-rank direction; each tensor of the batch has a row for each example,
            or one row that all share), ``"grzo"`` (the same, projected gradients over their spread in the batch),
            ``"residual"`` (one and a half, without directions: the matrices that write to the model's residual stream
            get an estimate of their gradients, :mod:`zowrap.step.credit`) or ``"forward_gradient"`` (exact, a
            reference); by default the rule's own, mostly central. See :mod:`zowrap.rules.estimators`.
        check_every: with ``"residual"``, steps between checks that a step descends, by default 32, 0 for none: they
            lower a rate that goes too far (:mod:`zowrap.model.descent`).
        blocks: ``None``, ``"layer"`` or name patterns: one block is perturbed and updated per step.
        block_order: see :data:`zowrap.names.BLOCK_ORDERS`.
        trainable: name patterns, named selections (``"norms"``, ``"last:2"`` …, :mod:`zowrap.step.selections`) or a
            predicate; by default what has ``requires_grad``.
        engine: ``"compiled"``, ``"eager"``, or None: compiled where possible, else eager with one warning.
        weight_decay: decoupled, on matrices only. 0: zeroth-order runs are short and start from trained weights.
        quantized: how quantised weights move: ``"scales"``, ``"codes"`` or ``"adapters"``
            (:mod:`zowrap.quant.modes`); by default the first for 8-bit weights, the last for others and where the model
            has adapters. The model's quantised layers are lowered in place; :func:`zowrap.quant.raise_back` undoes it.
        memory: ``"paired"`` evaluates both sides of a direction in one program, ``"sequential"`` one after the other
            (activations of one side at a time, noise drawn twice). ``"auto"`` chooses at the first step, and again
            where a batch is larger than any before: paired, which is faster, unless only sequential fits into the free
            memory; ``inspect()`` says which, and why. The eager engine evaluates each point by itself.
        masters: keep a float32 copy of the 16-bit weights that move, as state of the rule: updates go into it, and
            the weights are its nearest 16-bit numbers. By default they are rounded stochastically, without a copy.
            Other weights that move beside them need none.
        along: the direction that updates of 16-bit weights go along: the one ``"drawn"``, or the one ``"evaluated"``,
            the difference of its rounded points (:func:`zowrap.step.arithmetic.evaluated_direction`).

    Raises:
        ZOError: an option out of range or unknown, or nothing left to tune.
    """
    options = build_options(rule, given)
    _check_model(model, loss_fn)
    method = choose_method(options)
    mode = modes.choose_mode(model, options.quantized)
    options = _fill_in(options, method, mode)
    moving = _select(model, options, method, mode)
    loss = LossModule(model, loss_fn, method.estimator.per_example)
    job = Job.of(loss, method, options, moving.parameters, moving.blocks, mode)
    engine = build_engine("eager" if method.estimator.exact else options.engine, job, len(job.points))
    return ZOModel(job, engine, options, Schedule(options.memory))


class _Moving(NamedTuple):
    parameters: list[Parameter]
    blocks: list[Block]


def _check_model(model: object, loss_fn: object) -> None:
    if not isinstance(model, nn.Module):
        raise ZOError(f"model must be a torch module, for example from from_pretrained, not {type(model).__name__}")
    if loss_fn is not None and not callable(loss_fn):
        raise ZOError(f"loss_fn is a function of (model, batch), not {type(loss_fn).__name__}")


def _fill_in(options: StepOptions, method: Method, mode: QuantMode | None) -> StepOptions:
    """The options with a value for everything that was left open; ``engine`` and ``memory`` choose at the first batch.

    The rule is the one that was asked for, before the direction shaped it: the same options make the same method again.
    """
    eps = modes.EPS_PLAIN if mode is None else modes.EPS[mode.name]
    return dataclasses.replace(
        options,
        rule=method.asked_rule,  # type: ignore[arg-type]
        lr="auto" if method.lr is None else method.lr,
        eps=float(eps if options.eps is None else options.eps),
        direction=method.direction,  # type: ignore[arg-type]
        queries=method.queries,
        estimator=method.estimator.name,
        quantized=None if mode is None else mode.name,
    )


def _select(model: nn.Module, options: StepOptions, method: Method, mode: QuantMode | None) -> _Moving:
    """The parameters that move and their blocks; quantised layers are lowered, and given adapters where these move."""
    if mode is not None:
        assert options.eps is not None
        modes.check_mode(mode, method.rule, method.direction, method.estimator, method.queries, options.eps)
        parameters = modes.select_parameters(model, mode, options.trainable, options.seed)
    elif has_adapters(model):
        parameters = adapters.select_parameters(model, options.trainable)
    else:
        parameters = select(model, selections.expand(model, options.trainable))
    blocks = block_lib.partition(parameters, options.blocks)
    held = sorted(i for block in blocks for i in block.indices)
    if len(held) < len(parameters):  # what no block holds stays as it is
        parameters = [parameters[i] for i in held]
        blocks = block_lib.partition(parameters, options.blocks)
    method.check_blocks(len(blocks))
    _check_sixteen_bit(parameters, options)
    if options.weight_decay and not any(each.decays for each in parameters):
        warnings.warn("weight_decay does nothing: it is for matrices, and none of what moves is one", ZOWarning, 4)
    return _Moving(parameters, blocks)


def _check_sixteen_bit(parameters: list[Parameter], options: StepOptions) -> None:
    """Refuse an option that is for 16-bit weights where none of them moves; other weights beside them ignore it."""
    asked = Option("masters", True) if options.masters else Option("along", options.along)
    if not (options.masters or options.along == "evaluated") or any(is_16_bit(each.tensor) for each in parameters):
        return
    dtypes = sorted({str(parameter.tensor.dtype).removeprefix("torch.") for parameter in parameters})
    raise ZOError(asked, f" is for 16-bit weights, and what moves here is {' and '.join(dtypes)}: leave it out")


def _with_signature(function: Callable[..., ZOModel]) -> None:
    """Show the table's options and defaults in ``help(zo_wrap)`` and to whatever else reads signatures."""
    shown = inspect.signature(function)
    fixed = [each for each in shown.parameters.values() if each.kind is not inspect.Parameter.VAR_KEYWORD]
    options = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default)
        for name, default in DEFAULTS.items()
        if name != "rule"
    ]
    function.__signature__ = shown.replace(parameters=[*fixed, *options])  # type: ignore[attr-defined]


_with_signature(zo_wrap)
