"""The options of a step, in one table: :class:`StepOptions`.

A field holds an option's default and the reason for it, the help text, the check of its value, and whether it is part
of a run's identity. ``zo_wrap``, ``ZOConfig``, the command line, ``--config`` files, the journal, saved states, replays
and ``inspect`` all read this table: an option that is added here is known to each of them.

Torch is not imported here, so that the command line can refuse a wrong value at once.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, TypedDict

from zowrap import names
from zowrap.checks import check_count, check_flag, check_name, check_positive, is_whole
from zowrap.errors import Option, ZOError, nearest

if TYPE_CHECKING:
    from zowrap.rules.base import Rule
    from zowrap.step.directions import Direction
    from zowrap.step.parameters import TrainableSpec

Check = Callable[[str, Any], None]
PROBING, MODEL, TRAINING = "Zeroth order", "Model", "Training"  # headings of the help


@dataclass(frozen=True)
class Entry:
    """An option's line of the table, beside its default.

    Attributes:
        help: one line, for the command line.
        group: the heading that it stands under in the help.
        identity: whether it is part of what a run is. It is then written into the journal's header and into saved
            states, and a run or a state is only gone on with under the same value.
        costs: whether it changes what moves or what a step costs, so that ``zowrap inspect`` takes it.
        check: ``check(name, value)`` raises :class:`ZOError` for a value that no model could take.
    """

    help: str
    group: str
    identity: bool
    costs: bool
    check: Check | None


def option(
    default: Any,
    help: str,
    *,
    group: str = PROBING,
    identity: bool = False,
    costs: bool = True,
    check: Check | None = None,
) -> Any:
    """Make a field of the table, see :class:`Entry`."""
    entry = Entry(help, group, identity, costs, check)
    return dataclasses.field(default=default, metadata={"help": help, "entry": entry})


def _one_of(choices: Sequence[str]) -> Check:
    return lambda name, value: check_name(name, value, choices)


def _positive(name: str, value: Any) -> None:
    check_positive("", **{name: value})


def _count(name: str, value: Any) -> None:
    check_count("", **{name: value})


def _flag(name: str, value: Any) -> None:
    check_flag("", **{name: value})


def _whole(name: str, value: Any) -> None:
    if not is_whole(value):
        raise ZOError(Option(name), f" must be a whole number, got {value!r}")


def _whole_from_zero(name: str, value: Any) -> None:
    if not is_whole(value) or value < 0:
        raise ZOError(Option(name), f" must be a whole number from 0, got {value!r}")


def _from_zero(name: str, value: Any) -> None:
    if not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
        raise ZOError(Option(name), f" must be a finite number from 0, got {value!r}")


def _rate(name: str, value: Any) -> None:
    if isinstance(value, str):
        if value != "auto":
            raise ZOError(Option(name), f" must be a positive finite number or 'auto', got {value!r}")
    else:
        check_positive("", **{name: value})


def _patterns_or_layer(name: str, value: Any) -> None:
    if isinstance(value, str) and value != "layer":
        raise ZOError("unknown ", Option(name), f" {value!r}: use 'layer' or a list of name patterns")
    if not isinstance(value, Sequence):
        raise ZOError(Option(name), f" is 'layer' or a list of name patterns, not {value!r}")
    if not value:
        raise ZOError(Option(name), " is empty: give 'layer', a list of name patterns, or None for all at once")


@dataclass
class StepOptions:
    """The options of a step. None stands for a default that depends on the rule or the model.

    The types are those that a command line or a configuration file can hold; from Python ``rule`` and ``direction`` may
    also be objects, ``lr`` a number and ``trainable`` a predicate (:class:`StepKeywords`).
    """

    rule: str = option("meazo", "Update rule (zowrap rules lists them).", identity=True)
    # None: the rule's own, for its papers' or our own measurements say how far a step may go.
    lr: float | str | None = option(
        None,
        "Learning rate; auto chooses it from a few forward passes before step 1.",
        costs=False,
        check=_rate,
    )
    # None: 1e-3, the field's choice for full tuning in float32; of quantised weights, that of the way they move.
    eps: float | None = option(
        None, "Size of the perturbation; by default 1e-3, or quantised weights' own.", check=_positive
    )
    # 0 is a seed like any other: two runs are the same unless they are asked to differ.
    seed: int = option(
        0,
        "Of the noise, the data order and a fresh head.",
        group=TRAINING,
        identity=True,
        costs=False,
        check=_whole,
    )
    # None of these three: the rule's own. All but FZOO want gaussian directions, one a step, central differences.
    direction: str | None = option(
        None,
        "gaussian, sphere, unit_sphere, rademacher, lowrank(r), sparse(s), cone; by default the rule's own.",
        identity=True,
    )
    queries: int | None = option(
        None, "Directions per step, averaged; by default the rule's own.", identity=True, check=_count
    )
    estimator: str | None = option(
        None,
        "central, forward, population, grzo or residual; by default the rule's own.",
        identity=True,
        check=_one_of(names.ESTIMATORS),
    )
    # None: 32 with residual credit, which alone is checked, and whose steps may go too far (zowrap.model.descent).
    check_every: int | None = option(
        None,
        "Steps between checks that residual credit descends (default 32); 0 makes none.",
        identity=True,
        costs=False,
        check=_whole_from_zero,
    )
    # None: all at once, which every rule but MeZO-BCD means.
    blocks: list[str] | None = option(
        None,
        "'layer', or name patterns: one block moves per step. Repeatable.",
        identity=True,
        check=_patterns_or_layer,
    )
    # Every layer once per sweep, in the order of a forward pass.
    block_order: str = option("ascending", "Order of the blocks.", identity=True, check=_one_of(names.BLOCK_ORDERS))
    # None: what has requires_grad. Not part of the identity: the names of what moves are, and say it exactly.
    trainable: list[str] | None = option(
        None, f"Weights that move: a name pattern, or {', '.join(names.SELECTIONS)}. Repeatable."
    )
    # 0: zeroth-order runs are short and start from trained weights.
    weight_decay: float = option(0.0, "Decoupled, on matrices only.", check=_from_zero)
    # None: compiled, which is several times faster, and eager where a model cannot be compiled or a run is short.
    engine: str | None = option(
        None, "compiled or eager. Default: compiled where possible and worth it.", check=_one_of(names.ENGINES)
    )
    # auto: paired is faster, sequential needs less; which one fits is known at the first batch. The eager engine takes
    # any of them, so that a compiled run can be repeated on it: it evaluates one point at a time and needs the least.
    memory: str = option(
        "auto",
        "Of the compiled engine: paired, sequential or auto (the faster one that fits).",
        check=_one_of(names.MEMORY),
    )
    # None: scales for 8-bit weights, which are one number per row; adapters for others.
    quantized: str | None = option(
        None,
        "How quantised weights move: scales, codes or adapters.",
        group=MODEL,
        identity=True,
        check=_one_of(names.QUANT_MODES),
    )
    # False: stochastic rounding is unbiased without a copy of the weights.
    masters: bool = option(
        False, "Round 16-bit weights from float32 ones kept beside them.", group=MODEL, identity=True, check=_flag
    )
    # drawn: nothing is computed again for it.
    along: str = option(
        "drawn",
        "What 16-bit weights move along: the direction drawn, or evaluated.",
        group=MODEL,
        identity=True,
        check=_one_of(names.ALONG),
    )


class StepKeywords(TypedDict, total=False):
    """The keywords of ``zo_wrap`` for type checkers: the fields of :class:`StepOptions` with what Python may give."""

    lr: float | str | None
    eps: float | None
    seed: int
    direction: str | Direction | None
    queries: int | None
    estimator: str | None
    check_every: int | None
    blocks: str | Sequence[str] | None
    block_order: str
    trainable: TrainableSpec
    engine: str | None
    weight_decay: float
    memory: str
    quantized: str | None
    masters: bool
    along: str


ENTRIES: dict[str, Entry] = {field.name: field.metadata["entry"] for field in dataclasses.fields(StepOptions)}
DEFAULTS: dict[str, Any] = {field.name: field.default for field in dataclasses.fields(StepOptions)}
for field in dataclasses.fields(StepOptions):  # transformers' HfArgumentParser hands all metadata on to argparse
    field.metadata = MappingProxyType({"help": field.metadata["help"]})
# What a journal and a saved state say of a run, and what going on with it must have in common with it.
IDENTITY = tuple(name for name, entry in ENTRIES.items() if entry.identity)


def build_options(rule: str | Rule, given: Mapping[str, Any]) -> StepOptions:
    """Make the options of a call of ``zo_wrap``, each value checked.

    Raises:
        TypeError: there is no such option.
        ZOError: a value is out of range or unknown.
    """
    for name in given:
        if name not in ENTRIES:
            raise TypeError(f"zo_wrap() has no option {name!r}{nearest(name, ENTRIES)}")
    options = StepOptions(rule=rule, **given)  # type: ignore[arg-type]
    check_values(options)
    return options


def hyper_of(options: StepOptions) -> dict[str, float]:
    """The numbers that may change from step to step, of options that are filled in; ``lr`` is NaN while it is open."""
    assert options.eps is not None
    lr = options.lr if isinstance(options.lr, int | float) else math.nan
    return {"lr": float(lr), "eps": float(options.eps), "weight_decay": float(options.weight_decay)}


def values_of(holder: Any) -> dict[str, Any]:
    """The options that an object holds as attributes: a :class:`StepOptions`, or what takes its fields from it."""
    return {name: getattr(holder, name) for name in ENTRIES}


def check_values(holder: Any, names: Sequence[str] = tuple(ENTRIES)) -> None:
    """Raise :class:`ZOError` for the first of these options whose value no model could take; None is a default."""
    for name in names:
        check, value = ENTRIES[name].check, getattr(holder, name)
        if check is not None and not (value is None and DEFAULTS[name] is None):
            check(name, value)
