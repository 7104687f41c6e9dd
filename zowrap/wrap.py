"""``zo_wrap``: any torch model with a loss becomes a forward-only training step.

    model ── capture ──► Program ── passes ──► Program ── compile ──► step(batch)

:func:`zo_wrap` checks what is asked, selects what moves and gives both to an engine. Capture, passes and compilation
happen at the first step (:mod:`zowrap.engines.compiled`); the step itself is :class:`zowrap.model.zo_model.ZOModel`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from zowrap import rules
from zowrap.checks import check_positive
from zowrap.errors import ZOError, nearest
from zowrap.loss.module import LossFn, LossModule
from zowrap.model.schedule import Schedule
from zowrap.model.zo_model import ZOModel
from zowrap.names import ALONG, ENGINES
from zowrap.numerics.dtypes import is_16_bit
from zowrap.quant import adapters, modes
from zowrap.rules import estimators
from zowrap.rules.base import MASTER, Rule, with_masters
from zowrap.step import blocks as block_lib
from zowrap.step import directions
from zowrap.step.job import Job
from zowrap.step.lowrank import matrix_shape
from zowrap.step.parameters import Parameter, TrainableSpec, select


def zo_wrap(
    model: nn.Module,
    rule: str | Rule = "meazo",
    *,
    lr: float | str | None = None,
    eps: float | None = None,
    seed: int = 0,
    direction: str | directions.Direction | None = None,
    queries: int | None = None,
    estimator: str | None = None,
    blocks: str | Sequence[str] | None = None,
    block_order: str = "ascending",
    trainable: TrainableSpec = None,
    loss_fn: LossFn | None = None,
    engine: str | None = None,
    weight_decay: float = 0.0,
    quantized: str | None = None,
    memory: str = "auto",
    masters: bool = False,
    along: str = "drawn",
) -> ZOModel:
    """Wrap ``model`` so that ``step(**batch)`` trains it with forward passes alone.

    ``model`` is used in place: its own tensors are the ones that move, and it is never copied.

    Args:
        model: a ``transformers`` model, a PEFT model (adapters move, the base stays), or any module with ``loss_fn``.
        rule: an update rule by name (``zowrap rules`` lists them) or from its constructor, ``rules.meazo(beta=0.9)``.
        lr: learning rate η; by default the rule's own. ``"auto"`` leaves it open: no step is made until
            :func:`zowrap.tune_lr` has chosen it, which needs data and the number of steps planned.
        eps: perturbation size ε, by default 1e-3 in units of the weights, the field's choice for full tuning in
            float32; for quantised models that of the way they move, :data:`zowrap.quant.modes.EPS`.
        seed: of all noise; 0 is a seed like any other.
        direction: law of the directions, see :mod:`zowrap.step.directions`; by default the rule's own, mostly gaussian.
        queries: directions per step, averaged (n-SPSA); by default the rule's own, mostly 1: most steps per forward.
        estimator: ``"central"`` (two forwards per direction), ``"forward"`` (one, and one shared), ``"population"``
            (two, every example along its own low-rank direction; each tensor of the batch has a row for each example,
            or one row that all share) or ``"forward_gradient"`` (exact, a reference); by default the rule's own,
            mostly central. See :mod:`zowrap.rules.estimators`.
        blocks: ``None``, ``"layer"`` or name patterns: one block is perturbed and updated per step.
        block_order: see :data:`zowrap.step.blocks.ORDERS`.
        trainable: name patterns or a predicate; by default what has ``requires_grad``.
        loss_fn: ``loss_fn(model, batch)``, 0-d or ``[batch]``; by default the model's own loss. The compiled engine
            takes the Python values that it or the model reads (numbers, flags, which tensor a name stands for) at the
            first call of each program, and keeps them; a tensor that is changed in place is followed.
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
        along: what the updates of 16-bit weights go along: the direction ``"drawn"``, or the one ``"evaluated"``, the
            difference of its rounded points (:func:`zowrap.step.arithmetic.taken`). One of :data:`zowrap.names.ALONG`.

    Raises:
        ZOError: an option out of range or unknown, or nothing left to tune.
    """
    if not isinstance(model, nn.Module):
        raise ZOError(f"model must be a torch module, for example from from_pretrained, not {type(model).__name__}")
    auto = isinstance(lr, str)
    if auto and lr != "auto":
        raise ZOError(f"lr must be a positive finite number or 'auto', got {lr!r}")
    value = None if lr is None or isinstance(lr, str) else lr
    rule = rules.get(rule, **({"lr": value} if value is not None and not isinstance(rule, Rule) else {}))
    value = rule.lr if value is None else value
    mode = modes.choose_mode(model, quantized)
    if eps is None:
        eps = modes.EPS_PLAIN if mode is None else modes.EPS[mode.name]
    check_positive("zo_wrap", lr=value, eps=eps)
    queries = rule.defaults.queries if queries is None else queries
    if not isinstance(queries, int) or isinstance(queries, bool) or queries < 1:
        raise ZOError(f"queries must be a whole number from 1, got {queries!r}")
    if not isinstance(seed, int) or isinstance(seed, bool):
        raise ZOError(f"seed must be a whole number, got {seed!r}")
    if not isinstance(weight_decay, int | float) or not math.isfinite(weight_decay) or weight_decay < 0:
        raise ZOError(f"weight_decay must be a finite number from 0, got {weight_decay!r}")
    if loss_fn is not None and not callable(loss_fn):
        raise ZOError(f"loss_fn is a function of (model, batch), not {type(loss_fn).__name__}")
    schedule = Schedule(memory)
    if engine is not None and engine not in ENGINES:
        raise ZOError(f"unknown engine {engine!r}{nearest(engine, ENGINES)}")
    probing = estimators.get_estimator(rule.defaults.estimator if estimator is None else estimator)
    if direction is None:
        direction = "lowrank(1)" if probing.per_example else rule.defaults.direction
    law = directions.get(direction)
    if law.shape is not None:
        rule = law.shape(rule)
    if mode is not None:
        parameters = modes.select_parameters(model, mode, trainable, seed)
    else:
        parameters = (
            adapters.select_parameters(model, trainable) if adapters.has_adapters(model) else select(model, trainable)
        )
    device = parameters[0].tensor.device
    partition = block_lib.partition(parameters, blocks)
    moving = sorted(i for block in partition for i in block.indices)
    if len(moving) < len(parameters):  # what no block holds stays as it is
        parameters = [parameters[i] for i in moving]
        partition = block_lib.partition(parameters, blocks)
    rule.check(rules.Choice(law.name, probing.name, queries, len(partition)))
    if law.lowrank is not None and rule.shapes_directions:
        raise ZOError(f"{rule.name} works on each element of a direction: {law.name} would lose its low rank")
    engine = _check_estimator(rule, law, probing, queries, engine)
    project = rule.project or probing.project
    _check_sixteen_bit(parameters, masters, along)
    if masters:
        rule = with_masters(rule)
    if mode is not None:
        modes.check_mode(mode, rule, law, probing, queries, eps)
        project = modes.clip_projection(project) if mode.name == "scales" else project
    hyper = {"lr": math.nan if auto else float(value), "eps": float(eps), "weight_decay": float(weight_decay)}
    job = Job(
        loss=LossModule(model, loss_fn, probing.per_example),
        parameters=parameters,
        rule=rule,
        estimator=probing,
        project=project,
        direction=law,
        queries=queries,
        blocks=partition,
        states=[{name: torch.tensor(v, device=device) for name, v in rule.state.items()} for _ in partition],
        slots={name: [_new_slot(rule, law, name, p) for p in parameters] for name in rule.slots},
        hyper={name: torch.tensor(value, device=device) for name, value in hyper.items()},
        decays=weight_decay > 0,
        device=device,
        quant_mode=mode,
        other=_other_point(along, rule, probing, law, queries),
    )
    return ZOModel(model, job, hyper, seed, probing, block_lib.check_order(block_order), engine, schedule)


def _check_estimator(
    rule: Rule, law: directions.Direction, estimator: estimators.Estimator, queries: int, engine: str | None
) -> str | None:
    """The engine that can run the estimator."""
    if rule.points is not None and (estimator.per_example or estimator.exact):
        raise ZOError(f"{rule.name} evaluates points of its own: estimator {estimator.name!r} does not apply")
    if estimator.per_example and law.lowrank is None:
        raise ZOError(
            f"a population gives every example a direction of its own, which only low-rank ones can be: "
            f"direction='lowrank(1)' in place of {law.name!r}"
        )
    if estimator.per_example and queries > 1:
        raise ZOError(f"a population has one direction per example: queries must be 1, got {queries}")
    if estimator.exact and engine == "compiled":
        raise ZOError(f"estimator {estimator.name!r} is a reference: it runs with engine='eager' alone")
    return "eager" if estimator.exact else engine


def _check_sixteen_bit(parameters: Sequence[Parameter], masters: bool, along: str) -> None:
    """Refuse what only 16-bit weights have where none of them moves; beside others, those keep to what they do."""
    asked = "masters=True" if masters else f"along={along!r}" if along == "evaluated" else None
    if asked is None or any(is_16_bit(parameter.tensor) for parameter in parameters):
        return
    dtypes = sorted({str(parameter.tensor.dtype).removeprefix("torch.") for parameter in parameters})
    raise ZOError(f"{asked} is for 16-bit weights, and what moves here is {' and '.join(dtypes)}: leave it out")


def _other_point(
    along: str, rule: Rule, estimator: estimators.Estimator, law: directions.Direction, queries: int
) -> float | None:
    """Between which coefficient and 1 the evaluated direction lies; None for the direction drawn."""
    if along not in ALONG:
        raise ZOError(f"unknown along {along!r}{nearest(str(along), ALONG)}")
    if along == "drawn":
        return None
    if law.lowrank is not None or estimator.exact:
        what = law.name if law.lowrank is not None else f"estimator {estimator.name!r}"
        raise ZOError(f"along='evaluated' takes the differences of perturbed weights: {what} has no such differences")
    return min(point.coefficient for point in (rule.points or estimator.points)(queries))


def _new_slot(rule: Rule, law: directions.Direction, name: str, parameter: Parameter) -> Tensor:
    slot, w = rule.slots[name], parameter.tensor
    if name == MASTER:
        return w.detach().to(torch.float32, copy=True) if is_16_bit(w) else torch.empty(0, device=w.device)
    if slot.kind == "parameter":
        first = rule.refresh(w.detach(), 0) if rule.refresh is not None else None
        value = slot.initial if first is None else first[name]
        return torch.as_tensor(value, dtype=torch.float32, device=w.device).clone()
    if slot.kind == "left":
        if law.lowrank is None or law.lowrank.nu is None:
            raise ZOError(f"{rule.name} keeps state in the shape of a low-rank direction's factor: {law.name} has none")
        rows, _, rank = matrix_shape(w, law.lowrank.rank)
        return torch.full((rows, rank), slot.initial, dtype=torch.float32, device=w.device)
    return torch.full(w.shape, slot.initial, dtype=torch.float32, device=w.device)
