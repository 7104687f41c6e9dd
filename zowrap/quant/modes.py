"""Choose how the quantised weights of a model move, and select the parameters that do.

    scales      the scale of each row moves, by its logarithm: W = codes · scale · exp(s) / 127       codes stay
    codes       the integer codes move, by stochastic rounding (:mod:`zowrap.numerics.codes`)      scales stay
    adapters    LoRA on the quantised base moves (:mod:`zowrap.quant.adapters`)                       both stay

*Scales* is QZO (2505.13430) in relative form: the probe scale · exp(±εz) and the update scale · exp(−η·clip(g, ±C)·z)
keep every scale positive, which the paper's own form, scale ± εz, does not. s is a tunable parameter like any other, so
every rule applies. *Codes* follows QuZO (2502.12346).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from zowrap.errors import Option, ZOError, ZOWarning, nearest
from zowrap.names import QUANT_MODES
from zowrap.numerics.codes import LARGEST
from zowrap.numerics.noise import parameter_id
from zowrap.ops.scratch import chunks
from zowrap.quant import adapters
from zowrap.quant.layers import Int8Linear, Lowered, TorchaoLinear
from zowrap.quant.lowering import fresh_weights, lower, quantized_kinds
from zowrap.quant.schemes import find_other_scheme
from zowrap.step.job import QuantMode
from zowrap.step.parameters import Parameter, TrainableSpec, canonical_name, check_patterns, matches, select
from zowrap.step.pretrained import has_adapters
from zowrap.step.selections import expand

if TYPE_CHECKING:
    from zowrap.rules.base import Rule
    from zowrap.rules.estimators import Estimator
    from zowrap.step.directions import Direction

# A freshly quantised row has one code at ±127. With this share of its other codes there too, a row counts as full.
SATURATED = 0.02


def count_saturated_rows(codes: Tensor) -> int:
    """Count the rows of ``codes`` (int8 ``[rows, columns]``) with at least :data:`SATURATED` of them at ±127, beyond
    the first one. Updates are cut off there.

    It reads a few rows at a time, to keep temporary memory small.
    """
    outputs, columns = codes.shape
    full = 0
    for first, last in chunks(outputs, columns):
        rows = codes[first:last]
        ends = (rows == LARGEST).sum(dim=1) + (rows == -LARGEST).sum(dim=1)
        full += int((ends - 1 >= SATURATED * columns).sum())
    return full


# Measured on TREC with MiniLM (docs/quantized.md). Scales gain seven times as much as with a tenth of this ε. For codes
# and adapters, the loss differences are four to five times the rounding of 8-bit activations, and their signs agree
# with those at a neighbouring ε on 11 of 12 directions; a larger ε meets curvature, a smaller one rounding.
EPS = {"scales": 1e-1, "codes": 3e-3, "adapters": 3e-2}
EPS_PLAIN = 1e-3  # in units of the weights: the field's choice for full tuning in float32
# Scales: where the rounding of 8-bit activations is as large as the effect of the slope, on MiniLM with a batch of 16.
# Codes and adapters: a third of the default, below which signs agree on only half to two thirds of the directions.
EPS_FLOOR = {"scales": 2e-2, "codes": 1e-3, "adapters": 1e-2}
CLIP = 100.0  # C of the paper
CODE_QUERIES = 64  # with this many, codes descend a quadratic nearly as exact arithmetic does; with 8 they do not


def choose_mode(model: nn.Module, asked: str | None) -> QuantMode | None:
    """Choose the mode for a model, without changing it; None if nothing in it is quantised.

    Args:
        asked: the ``quantized`` option; None chooses by the model's scheme.

    Raises:
        ZOError: the mode is unknown or impossible for the model's scheme, or the scheme is not supported.
    """
    if asked is not None and (not isinstance(asked, str) or asked not in QUANT_MODES):
        raise ZOError(f"unknown quantized {asked!r}{nearest(str(asked), QUANT_MODES)}")
    adapted = has_adapters(model)
    forward_only = adapted or asked == "adapters"
    found = quantized_kinds(model, forward_only)
    other = find_other_scheme(model) if forward_only else None
    if other is not None and asked in (None, "adapters"):
        why = f"weights quantised by {other[0]} cannot move, and run forward alone" if adapted else "as asked"
        return QuantMode("adapters", why, any(issubclass(kind, Int8Linear) for kind in found))
    if not found:
        if asked is not None:
            raise ZOError(
                Option("quantized", asked),
                " is for quantised weights, and this model has none: load it with ",
                Option("load_in_8bit", True, python="quantization_config=BitsAndBytesConfig(load_in_8bit=True)"),
                ", or leave quantized out",
            )
        return None
    rounds = any(issubclass(kind, Int8Linear) for kind in found)
    fixed = sorted({kind.scheme for kind in found if not hasattr(kind, "free_scales")})
    if asked is None:
        if adapted:
            return QuantMode("adapters", "the model has adapters", rounds)
        if fixed:
            return QuantMode(
                "adapters", f"the scales of {fixed[0]} weights are themselves rounded, and cannot move", rounds
            )
        why = "the default for 8-bit weights: one number per row moves, and the codes stay as they are"
        return QuantMode("scales", why, rounds, CLIP)
    if adapted and asked != "adapters":
        raise ZOError(
            Option("quantized", asked),
            " would be lost on a model with adapters, because only its adapters are saved: use ",
            Option("quantized", "adapters"),
            ", or load the model without them",
        )
    if asked == "scales" and fixed:
        raise ZOError(
            Option("quantized", "scales"),
            f" needs exact scales, and those of {fixed[0]} weights are rounded to 8 or 16 bits: use ",
            Option("quantized", "adapters"),
        )
    if asked == "codes" and any(issubclass(kind, TorchaoLinear) for kind in found):
        raise ZOError(
            Option("quantized", "codes"),
            " needs bitsandbytes 8-bit weights, and these are torchao's: use ",
            Option("quantized", "scales"),
            " or 'adapters', or load the model with ",
            Option("load_in_8bit", True, python="BitsAndBytesConfig(load_in_8bit=True)"),
        )
    if asked == "codes" and not all(issubclass(kind, Int8Linear) for kind in found):
        raise ZOError(
            Option("quantized", "codes"),
            " is for bitsandbytes 8-bit weights: one step of a 4-bit code is up to a quarter of the largest "
            "weight of its block, so rounding would drown any update; use ",
            Option("quantized", "adapters"),
        )
    return QuantMode(asked, "as asked", rounds, CLIP if asked == "scales" else None)


def select_parameters(model: nn.Module, mode: QuantMode, trainable: TrainableSpec, seed: int = 0) -> list[Parameter]:
    """Lower the model's quantised layers and select the parameters that move, in state-dict order.

    Without ``trainable``, these are the scales, codes or adapters and the weights missing from the checkpoint, such as
    a new head. In mode ``adapters``, a model without adapters gets new ones, drawn with ``seed``. A pattern that names
    a quantised weight selects its scales or codes; it may name unquantised weights too.

    Raises:
        ZOError: nothing is left to tune, or a parameter that moves cannot be saved.
    """
    layers = lower(model, forward_only=mode.name == "adapters")
    if mode.name == "adapters":
        tuned = {name: getattr(layer, "log_scale", None) for name, layer in layers.items()}
        for name, log_scale in tuned.items():
            if log_scale is not None and bool(log_scale.any()):
                raise ZOError(
                    f"the scales of {name} were tuned, and saving adapters does not save them: save the model, load "
                    "that, then attach adapters to it"
                )
        if not has_adapters(model):
            adapters.attach(model, seed=seed)
        return adapters.select_parameters(model, trainable)
    if mode.name == "scales":
        freed = {f"{name}.log_scale": (name, layer.free_scales()) for name, layer in layers.items()}  # type: ignore[operator]
        chosen = _selector(model, layers, trainable)
        found = select(model, lambda name, tensor: tensor.is_floating_point() and chosen(name))
        scales = {id(tensor): layers[name].get_buffer("SCB" if isinstance(layers[name], Int8Linear) else "row_scale")
                  for name, tensor in freed.values()}  # fmt: skip
        return [Parameter(p.name, p.names, p.tensor, p.id, scales.get(id(p.tensor))) for p in found]
    for layer in layers.values():
        layer.fix_scales()  # type: ignore[operator]
    chosen, moving = _selector(model, layers, trainable), []
    for name, layer in layers.items():
        full = canonical_name(f"{name}.weight")
        if chosen(full):
            names = tuple(f"{n}.weight" for n, m in model.named_modules(remove_duplicate=False) if m is layer)
            moving.append(Parameter(full, names, layer.weight, parameter_id(full), layer.get_buffer("SCB")))  # type: ignore[arg-type]
    floats = _select_or_none(model, lambda name, tensor: tensor.is_floating_point() and chosen(name))
    if not moving and not floats:
        raise ZOError("nothing is left to tune: trainable matches none of the model's parameters")
    order = {name: i for i, (name, _) in enumerate(model.named_parameters(remove_duplicate=False))}
    return sorted([*moving, *floats], key=lambda p: order[p.names[0]])


def choose_from_options(model: nn.Module, options: Mapping[str, Any], seed: int) -> QuantMode | None:
    """Choose the mode by the options of a command, and attach new adapters to the model if they are to move.

    Raises:
        ZOError: see :func:`choose_mode` and :func:`zowrap.quant.adapters.attach`.
    """
    asked = options.get("quantized")
    if (
        options.get("use_peft")
        and asked is None
        and (quantized_kinds(model, forward_only=True) or find_other_scheme(model) is not None)
    ):
        asked = "adapters"
    mode = choose_mode(model, asked)
    if options.get("use_peft") or (mode is not None and mode.name == "adapters" and not has_adapters(model)):
        rank, alpha, targets = (options.get(f"lora_{name}") for name in ("r", "alpha", "target_modules"))
        adapters.attach(model, rank or adapters.RANK, alpha or adapters.ALPHA, targets, seed)
    return mode


def _select_or_none(model: nn.Module, predicate: Callable[[str, Tensor], bool]) -> list[Parameter]:
    if not any(predicate(canonical_name(name), tensor) for name, tensor in model.named_parameters()):
        return []
    return select(model, predicate)


def _selector(model: nn.Module, layers: dict[str, Lowered], trainable: TrainableSpec) -> Callable[[str], bool]:
    """Build the predicate that tells by canonical name whether a parameter moves; ``weight`` also names ``log_scale``.

    Raises:
        ZOError: a pattern matches nothing.
    """
    quantized = {canonical_name(f"{name}.{kind}") for name in layers for kind in ("weight", "log_scale")}
    tensors = {canonical_name(name): tensor for name, tensor in model.named_parameters(remove_duplicate=False)}
    fresh = fresh_weights(model)
    trainable = expand(model, trainable)
    check_patterns(trainable, list(tensors))

    def chosen(name: str) -> bool:
        known = [name, name.replace(".log_scale", ".weight")] if name in quantized else [name]
        if trainable is None:
            return name in quantized or name in fresh
        if callable(trainable):
            return any(bool(trainable(n, tensors[n])) for n in known)
        patterns = [trainable] if isinstance(trainable, str) else trainable
        return any(matches(pattern, n) for n in known for pattern in patterns)

    return chosen


def check_mode(mode: QuantMode, rule: Rule, law: Direction, estimator: Estimator, queries: int, eps: float) -> None:
    """Check the options against the mode, and warn if rounding would drown the probes or the updates.

    Raises:
        ZOError: the mode does not support an option.
    """
    if mode.name == "codes":
        if estimator.credit:
            raise ZOError(
                Option("quantized", "codes"),
                " moves along noise; with ",
                Option("estimator", "residual"),
                " use ",
                Option("quantized", "scales"),
                " or ",
                Option("quantized", "adapters"),
            )
        if law.lowrank is not None or estimator.per_example:
            raise ZOError(
                Option("quantized", "codes"), f" needs directions of full rank, and {law.name} is not one of them"
            )
        if rule.refresh is not None:
            raise ZOError(
                f"{rule.name} reads weights in floating point, and ",
                Option("quantized", "codes"),
                " has none: use another rule or direction",
            )
        if estimator.exact:
            raise ZOError(
                f"integer codes have no derivative: use an estimator other than {estimator.name!r} with ",
                Option("quantized", "codes"),
            )
        if queries < CODE_QUERIES:
            warnings.warn(
                f"quantized='codes' rounds every update, and with queries={queries} rounding outweighs progress: use "
                f"queries={CODE_QUERIES} or more, and fewer steps (docs/quantized.md)",
                ZOWarning,
                stacklevel=4,
            )
    floor = EPS_FLOOR[mode.name]
    if mode.rounds and eps < floor and not estimator.credit:
        warnings.warn(
            f"eps={eps:g} with quantized={mode.name!r} is below {floor:g}, where the rounding of 8-bit activations "
            "hides changes of the loss: measure it with zowrap.quant.noise_floor (zowrap inspect --data FILE)",
            ZOWarning,
            stacklevel=4,
        )


def explain(mode: QuantMode, moving: Sequence[Parameter]) -> str:
    """One sentence for ``inspect`` that says what moves, and why."""
    if mode.name != "adapters" and all(p.scale is None for p in moving):
        return f"no {mode.name} move: trainable selects unquantised weights alone"
    return f"{mode.name} move ({mode.why})" + ("; experimental" if any(p.codes for p in moving) else "")


def count_full_rows(moving: Sequence[Parameter]) -> tuple[int, int] | None:
    """Count the full rows and all rows of the codes that move; None if no codes move, or the model has no weights."""
    matrices = [p.tensor for p in moving if p.codes and not p.tensor.is_meta]
    if not matrices:
        return None
    return sum(map(count_saturated_rows, matrices)), sum(map(len, matrices))
