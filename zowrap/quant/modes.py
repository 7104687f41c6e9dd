"""The ways in which quantised weights move, and which one a model gets.

    scales      the scale of each row moves, by its logarithm: W = codes · scale · exp(s) / 127       codes stay
    codes       the integer codes move, by stochastic rounding (:mod:`zowrap.numerics.codes`)      scales stay
    adapters    LoRA on the quantised base moves (:mod:`zowrap.quant.adapters`)                       both stay

*Scales* is QZO (2505.13430) in relative form: the probe scale · exp(±εz) and the update scale · exp(−η·clip(g, ±C)·z)
keep every scale positive. The paper's own form, scale ± εz, does not. s is a tunable parameter like any other, so every
rule applies. *Codes* is after QuZO (2502.12346).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from zowrap.errors import ZOError, ZOWarning, nearest
from zowrap.names import WAYS
from zowrap.numerics.codes import LARGEST
from zowrap.numerics.noise import parameter_id
from zowrap.ops.scratch import chunks
from zowrap.quant import adapters
from zowrap.quant.layers import Int8Linear, Lowered, TorchaoLinear
from zowrap.quant.lowering import fresh_weights, kinds, lower
from zowrap.step.job import Way
from zowrap.step.parameters import Parameter, TrainableSpec, canonical_name, check_patterns, matches, select

if TYPE_CHECKING:
    from zowrap.rules.base import Rule
    from zowrap.rules.estimators import Estimator
    from zowrap.step.directions import Direction

# A row has one code of ±127 when it is freshly quantised; with this share of them beside it there is no room left.
SATURATED = 0.02


def saturated_rows(codes: Tensor) -> int:
    """Rows of which at least :data:`SATURATED` of the codes stand at ±127, the first one aside: updates end there.

    Rows are looked at a few at a time, so that what is held beside the codes is small.
    """
    outputs, columns = codes.shape
    full = 0
    for first, last in chunks(outputs, columns):
        rows = codes[first:last]
        ends = (rows == LARGEST).sum(dim=1) + (rows == -LARGEST).sum(dim=1)
        full += int((ends - 1 >= SATURATED * columns).sum())
    return full


# On TREC with MiniLM (docs/quantized.md): scales gain seven times what they gain with a tenth of this. Of the other two
# differences of losses are four to five times the rounding of 8-bit activations, and signs agree with those at a
# neighbouring ε on 11 of 12 directions; a larger ε meets curvature, a smaller one the rounding.
EPS = {"scales": 1e-1, "codes": 3e-3, "adapters": 3e-2}
EPS_PLAIN = 1e-3  # in units of the weights: the field's choice for full tuning in float32
# Of scales, where the rounding of 8-bit activations is as large as the slope's part, on MiniLM with a batch of 16; of
# the other two a third of the default, below which signs agree on half of the directions to two thirds.
EPS_FLOOR = {"scales": 2e-2, "codes": 1e-3, "adapters": 1e-2}
CLIP = 100.0  # C of the paper
CODE_QUERIES = 64  # from here on a quadratic descends in codes nearly as in exact arithmetic; with 8 it does not


def choose(model: nn.Module, asked: str | None) -> Way | None:
    """The way for a model; None where nothing in it is quantised.

    Raises:
        ZOError: the way is unknown or not possible for the model's scheme, or the scheme is not supported. Nothing of
            the model is changed either way.
    """
    if asked is not None and (not isinstance(asked, str) or asked not in WAYS):
        raise ZOError(f"unknown quantized {asked!r}{nearest(str(asked), WAYS)}")
    found = kinds(model)
    if not found:
        if asked is not None:
            raise ZOError(
                f"quantized={asked!r} says how quantised weights move, and this model has none: load it with "
                "quantization_config=BitsAndBytesConfig(load_in_8bit=True), or leave quantized out"
            )
        return None
    rounds = any(issubclass(kind, Int8Linear) for kind in found)
    fixed = sorted({kind.scheme for kind in found if not hasattr(kind, "free_scales")})
    adapted = adapters.present(model)
    if asked is None:
        if adapted:
            return Way("adapters", "the model has adapters", rounds)
        if fixed:
            return Way("adapters", f"the scales of {fixed[0]} weights are themselves rounded, and cannot move", rounds)
        why = "the default of 8-bit weights: one number per row moves, and the codes stay as they are"
        return Way("scales", why, rounds, CLIP)
    if adapted and asked != "adapters":
        raise ZOError(
            f"quantized={asked!r} on a model with adapters would be lost: it is saved as its adapters alone. Use "
            "quantized='adapters', or load the model without them"
        )
    if asked == "scales" and fixed:
        raise ZOError(
            f"quantized='scales' needs exact scales, and those of {fixed[0]} weights are rounded to 8 or 16 bit when "
            "saved or computed with: use quantized='adapters'"
        )
    if asked == "codes" and any(issubclass(kind, TorchaoLinear) for kind in found):
        raise ZOError(
            "quantized='codes' writes the codes of bitsandbytes 8-bit weights, and these are torchao's: use "
            "quantized='scales' or 'adapters', or load the model with BitsAndBytesConfig(load_in_8bit=True)"
        )
    if asked == "codes" and not all(issubclass(kind, Int8Linear) for kind in found):
        raise ZOError(
            "quantized='codes' is for bitsandbytes 8-bit weights: one step of a 4-bit code is up to a quarter of the "
            "largest weight of its block, and rounding to it drowns any update; use quantized='adapters'"
        )
    return Way(asked, "as asked", rounds, CLIP if asked == "scales" else None)


def parameters(model: nn.Module, way: Way, trainable: TrainableSpec, seed: int = 0) -> list[Parameter]:
    """What moves, in state-dict order; the model's quantised layers are lowered.

    Without ``trainable``: the scales, codes or adapters, and what its checkpoint did not have, such as a fresh head.
    Where adapters are to move and there are none, fresh ones are put on the model, drawn by ``seed``. A pattern that
    names a quantised weight means its scales or codes; unquantised weights move along where named.

    Raises:
        ZOError: nothing is left to tune, or it has no place in what is saved.
    """
    layers = lower(model)
    if way.name == "adapters":
        tuned = {name: getattr(layer, "log_scale", None) for name, layer in layers.items()}
        for name, log_scale in tuned.items():
            if log_scale is not None and bool(log_scale.any()):
                raise ZOError(
                    f"the scales of {name} were tuned, and adapters are saved without what they stand on: save the "
                    "model and load that, then put adapters on it"
                )
        if not adapters.present(model):
            adapters.attach(model, seed=seed)
        return adapters.parameters(model, trainable)
    if way.name == "scales":
        freed = {f"{name}.log_scale": (name, layer.free_scales()) for name, layer in layers.items()}  # type: ignore[operator]
        chosen = _chooser(model, layers, trainable)
        found = select(model, lambda name, tensor: tensor.is_floating_point() and chosen(name))
        scales = {id(tensor): layers[name].get_buffer("SCB" if isinstance(layers[name], Int8Linear) else "row_scale")
                  for name, tensor in freed.values()}  # fmt: skip
        return [Parameter(p.name, p.names, p.tensor, p.id, scales.get(id(p.tensor))) for p in found]
    for layer in layers.values():
        layer.fix_scales()  # type: ignore[operator]
    chosen, moving = _chooser(model, layers, trainable), []
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


def from_options(model: nn.Module, options: Mapping[str, Any], seed: int) -> Way | None:
    """The way that the options of a command ask for; fresh adapters are on the model where these are to move.

    Raises:
        ZOError: see :func:`choose` and :func:`zowrap.quant.adapters.attach`.
    """
    asked = options.get("quantized")
    if options.get("use_peft") and asked is None and kinds(model):
        asked = "adapters"
    way = choose(model, asked)
    if options.get("use_peft") or (way is not None and way.name == "adapters" and not adapters.present(model)):
        rank, alpha, targets = (options.get(f"lora_{name}") for name in ("r", "alpha", "target_modules"))
        adapters.attach(model, rank or adapters.RANK, alpha or adapters.ALPHA, targets, seed)
    return way


def _select_or_none(model: nn.Module, predicate: Callable[[str, Tensor], bool]) -> list[Parameter]:
    if not any(predicate(canonical_name(name), tensor) for name, tensor in model.named_parameters()):
        return []
    return select(model, predicate)


def _chooser(model: nn.Module, layers: dict[str, Lowered], trainable: TrainableSpec) -> Callable[[str], bool]:
    """Whether a parameter of that canonical name moves; ``log_scale`` answers to ``weight`` as well.

    Raises:
        ZOError: a pattern matches nothing.
    """
    quantized = {canonical_name(f"{name}.{kind}") for name in layers for kind in ("weight", "log_scale")}
    tensors = {canonical_name(name): tensor for name, tensor in model.named_parameters(remove_duplicate=False)}
    fresh = fresh_weights(model)
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


def check(way: Way, rule: Rule, law: Direction, estimator: Estimator, queries: int, eps: float) -> None:
    """Raise :class:`ZOError` for what a way cannot do; warn of an ε or a write that rounding drowns."""
    if way.name == "codes":
        if law.lowrank is not None or estimator.per_example:
            raise ZOError(f"quantized='codes' moves along directions of full rank: {law.name} is not one of them")
        if rule.refresh is not None:
            raise ZOError(f"quantized='codes' has no weights in floating point, which {rule.name} looks at")
        if estimator.exact:
            raise ZOError(f"integer codes have no derivative: estimator {estimator.name!r} does not apply")
        if queries < CODE_QUERIES:
            warnings.warn(
                f"quantized='codes' rounds every write, and with queries={queries} the rounding outgrows the progress: "
                f"take fewer, better steps, queries={CODE_QUERIES} or more (docs/quantized.md)",
                ZOWarning,
                stacklevel=4,
            )
    floor = EPS_FLOOR[way.name]
    if way.rounds and eps < floor:
        warnings.warn(
            f"eps={eps:g} with quantized={way.name!r} is below {floor:g}, where the rounding of 8-bit activations "
            "hides what the loss does: zowrap.quant.noise_floor (zowrap inspect --data FILE) measures it",
            ZOWarning,
            stacklevel=4,
        )


def explain(way: Way, moving: Sequence[Parameter]) -> str:
    """One sentence for ``inspect``: what moves, and why so."""
    return f"{way.name} move ({way.why})" + ("; experimental" if any(p.codes for p in moving) else "")


def full_rows(moving: Sequence[Parameter]) -> tuple[int, int] | None:
    """Of moving codes, rows that have no room left, and all rows; None where no codes move or none are at hand."""
    matrices = [p.tensor for p in moving if p.codes and not p.tensor.is_meta]
    if not matrices:
        return None
    return sum(map(saturated_rows, matrices)), sum(map(len, matrices))
