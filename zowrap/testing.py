"""Check the properties that every update rule must have, in the tests of your own rule:

    from zowrap.testing import check_rule

    def test_my_rule():
        check_rule(my_rule())

Each check wraps a small model, feeds it losses drawn with a fixed seed (without a forward: a rule never sees the model)
and inspects weights and state. zowrap's own rules are tested by the same functions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from zowrap.model.zo_model import ZOModel
from zowrap.names import ENGINES
from zowrap.rules.base import Rule
from zowrap.rules.registry import REGISTRY
from zowrap.wrap import zo_wrap

STEPS = 30
LR, EPS = 0.05, 1e-3
# How far apart the engines may end, relative to the distance moved: they round 30 float32 steps in different orders.
SAME = 1e-5


class Layers(nn.Module):
    """Two numbered layers of odd shapes, 32 weights from −4 to 4."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(3, 5), nn.Linear(5, 2)])
        with torch.no_grad():
            for i, p in enumerate(self.parameters()):
                p.copy_(torch.linspace(-1, 1, p.numel()).reshape(p.shape) * (i + 1))


def wrap(rule: str | Rule, engine: str = "eager", dtype: torch.dtype = torch.float32, **options: Any) -> ZOModel:
    """Wrap a small model, whose loss is never evaluated, with ``rule`` and options of :func:`zowrap.zo_wrap`."""
    options = {"lr": LR, "eps": EPS, "seed": 3, "loss_fn": lambda model, batch: model.layers[0].bias.sum(), **options}
    return zo_wrap(Layers().to(torch.bfloat16).to(dtype), rule, engine=engine, **options)


def draw_losses(zm: ZOModel, steps: int = STEPS, seed: int = 0) -> list[Tensor]:
    """Draw losses, float32 ``[points]`` for each step, whose projected gradients span four orders of magnitude."""
    draw = torch.Generator().manual_seed(seed)
    scales = 10 ** (4 * torch.rand(steps, generator=draw) - 2)
    return [EPS * scale * torch.randn(zm.inspect().forwards, generator=draw) for scale in scales]


# --- the properties ------------------------------------------------------------------------------------------------


def follows_the_eager_engine(rule: Rule, engine: str) -> None:
    """With the same losses, weights and state equal the eager engine's, up to 1e-5 of the distance moved."""
    for blocks in (None, "layer"):
        one, other = wrap(rule, engine, blocks=blocks), wrap(rule, blocks=blocks)
        start = _weights(other)
        for losses in draw_losses(other):
            one.update(losses=losses)
            other.update(losses=losses)
        if one.inspect().engine != engine:
            _fail(rule, f"the {one.inspect().engine} engine ran instead of the {engine} engine")
        moved, apart = _distance(_weights(other), start), _distance(_weights(one), _weights(other))
        if not 0 < moved < float("inf"):
            _fail(rule, f"the weights moved by {moved} in {STEPS} steps")
        if not apart <= SAME * moved:
            _fail(rule, f"{engine} and eager end {apart:.2e} apart after moving {moved:.2e} (blocks={blocks!r})")
        theirs = _state(other)
        for name, tensor in _state(one).items():
            if not torch.allclose(tensor, theirs[name], rtol=1e-4, atol=1e-6 * float(theirs[name].abs().max())):
                _fail(rule, f"{name} differs between {engine} and eager (blocks={blocks!r})")


def keeps_the_shape_of_its_state(rule: Rule, engine: str) -> None:
    """After 30 steps the state has the same names and shapes as at first, and is still float32."""
    zm = wrap(rule, engine)
    before = {name: tensor.shape for name, tensor in _state(zm).items()}
    for losses in draw_losses(zm):
        zm.update(losses=losses)
    if {name: tensor.shape for name, tensor in _state(zm).items()} != before:
        _fail(rule, "the names or shapes of its state change between steps")
    _check_float32(rule, zm)


def resumes_bitwise(rule: Rule, engine: str) -> None:
    """Saved after 11 steps and loaded into a new model, a run continues bit for bit as if it had not stopped."""
    for blocks in (None, "layer"):
        whole, half = wrap(rule, engine, blocks=blocks), wrap(rule, engine, blocks=blocks)
        losses = draw_losses(whole)
        for given in losses:
            whole.update(losses=given)
        for given in losses[:11]:
            half.update(losses=given)
        resumed = wrap(rule, engine, blocks=blocks)
        resumed.model.load_state_dict(half.model.state_dict())
        resumed.load_state_dict(half.state_dict())
        for given in losses[11:]:
            resumed.update(losses=given)
        _check_same(rule, resumed, _snapshot(whole), f"differs once resumed (blocks={blocks!r})")


def keeps_the_dtype_of_the_weights(rule: Rule, engine: str) -> None:
    """bfloat16 weights move and stay bfloat16; the state stays float32."""
    zm = wrap(rule, engine, dtype=torch.bfloat16)
    start = _weights(zm)
    for losses in draw_losses(zm):
        zm.update(losses=losses)
    if any(p.tensor.dtype != torch.bfloat16 for p in zm.parameters):
        _fail(rule, "bfloat16 weights change their dtype")
    if not 0 < _distance(_weights(zm), start) < float("inf"):
        _fail(rule, "bfloat16 weights do not move, or not to finite values")
    _check_float32(rule, zm)


def skips_what_is_not_finite(rule: Rule, engine: str) -> None:
    """A step whose last loss is NaN changes neither weights nor state, bit for bit."""
    zm = wrap(rule, engine)
    *good, bad = draw_losses(zm, 4)
    for losses in good:
        zm.update(losses=losses)
    before = _snapshot(zm)
    bad[-1] = float("nan")
    if not zm.update(losses=bad).skipped:
        _fail(rule, "a step with a loss that is not finite is not skipped")
    _check_same(rule, zm, before, "changes in a step that is skipped")


def stops_at_a_learning_rate_of_zero(rule: Rule, engine: str) -> None:
    """With ``hyper["lr"]`` at 0 the weights do not move: the current η counts, not the one the rule was built with."""
    zm = wrap(rule, engine)
    *some, last = draw_losses(zm, 4)
    for losses in some:
        zm.update(losses=losses)
    zm.lr = 0.0
    before = _weights(zm)
    zm.update(losses=last)
    if not torch.equal(_weights(zm), before):
        _fail(rule, 'the weights move although lr is 0: a step is hyper["lr"] times something')


def sees_the_scale_of_the_loss_as_registered(rule: Rule, engine: str) -> None:
    """The rule is registered with the right ``scale_free``: whether a loss times 1024 gives the same weights."""
    entry = REGISTRY.get(rule.name)
    if entry is None or rule.hyper != entry.constructor().hyper:
        return
    ends = []
    for scale in (1.0, 1024.0):
        zm = wrap(rule, engine)
        start = _weights(zm)
        for losses in draw_losses(zm):
            zm.update(losses=scale * losses)
        ends.append(_weights(zm))
    apart = _distance(*ends) / _distance(ends[0], start)
    if (apart < 1e-2) != entry.scale_free:  # the ζ that keeps quotients finite has an effect, but a smaller one
        told = "scale_free=True, but" if entry.scale_free else "scale_free=False, but"
        _fail(rule, f"registered with {told} with a loss times 1024 it ends {apart:.1e} of the distance apart")


PROPERTIES: dict[str, Callable[[Rule, str], None]] = {
    check.__name__: check
    for check in (
        follows_the_eager_engine,
        keeps_the_shape_of_its_state,
        resumes_bitwise,
        keeps_the_dtype_of_the_weights,
        skips_what_is_not_finite,
        stops_at_a_learning_rate_of_zero,
        sees_the_scale_of_the_loss_as_registered,
    )
}


def check_rule(rule: Rule, engines: Sequence[str] = ENGINES) -> None:
    """Check every property of :data:`PROPERTIES` under each engine; compiling takes 10 to 30 seconds.

    Args:
        rule: as its constructor returns it; call this once for each set of hyper-parameters that you want to test.

    Raises:
        AssertionError: names the first property that does not hold.
    """
    for engine in engines:
        for name, check in PROPERTIES.items():
            try:
                check(rule, engine)
            except AssertionError:
                raise
            except Exception as error:
                _fail(rule, f"{name} under the {engine} engine fails with {type(error).__name__}: {error}", error)


# --- inspecting weights and state ----------------------------------------------------------------------------------


def _weights(zm: ZOModel) -> Tensor:
    return torch.cat([p.tensor.detach().double().reshape(-1) for p in zm.parameters])


def _state(zm: ZOModel) -> dict[str, Tensor]:
    return {name: value for name, value in zm.state_dict().items() if isinstance(value, Tensor)}


def _distance(one: Tensor, other: Tensor) -> float:
    return float((one - other).norm())


def _snapshot(zm: ZOModel) -> dict[str, Tensor]:
    return {**_state(zm), "the weights": _weights(zm)}


def _check_same(rule: Rule, zm: ZOModel, expected: dict[str, Tensor], what: str) -> None:
    for name, value in _snapshot(zm).items():
        if not torch.equal(value, expected[name]):
            _fail(rule, f"{name} {what}")


def _check_float32(rule: Rule, zm: ZOModel) -> None:
    for name, tensor in _state(zm).items():
        if tensor.dtype != torch.float32:
            _fail(rule, f"{name} becomes {tensor.dtype}: state is float32 whatever the weights are")


def _fail(rule: Rule, sentence: str, cause: Exception | None = None) -> NoReturn:
    raise AssertionError(f"{rule.describe()}: {sentence}") from cause
