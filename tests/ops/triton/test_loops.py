"""Generated Triton loops equal the functions that they were generated from, bit for bit."""

from __future__ import annotations

import runpy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import zowrap
from tests.support import rule_cases
from zowrap import rules
from zowrap.compiler.inductor import Compiled, compile_function
from zowrap.errors import ZOCaptureError, ZOInternalError
from zowrap.numerics import noise
from zowrap.ops import kernels, update_kernels
from zowrap.ops import loops as plain_loops
from zowrap.ops.arguments import DrawnDirections, NoiseArgs, UpdateArgs
from zowrap.ops.codes import _write
from zowrap.ops.triton import loops
from zowrap.rules import REGISTRY, Rule

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
DIRECTIONS = ("rademacher", "sphere", "cone", "sparse(0.5)", "lowrank(1)")
CASES = [
    *((rule, None, dtype) for rule in REGISTRY for dtype in DTYPES[:2]),
    *((rule, None, dtype) for rule in ("zo_sgd", "meazo") for dtype in DTYPES[2:]),
    *((rule, direction, torch.bfloat16) for rule in ("zo_sgd", "zo_adam") for direction in DIRECTIONS),
]


class RoundedRoots(TorchDispatchMode):
    """Rounds eager square roots correctly, as compiled code does; torch's library is sometimes off by one bit."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.sqrt.default and not args[0].is_cuda:
            return torch.from_numpy(np.sqrt(args[0].numpy()))
        return func(*args, **(kwargs or {}))


def same(one: Tensor, other: Tensor) -> bool:
    """Return whether two tensors are equal bit for bit, NaN included."""
    return one.dtype == other.dtype and torch.equal(one.flatten().view(torch.uint8), other.flatten().view(torch.uint8))


@pytest.fixture
def checked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Run every kernel twice, as Triton and as the plain function; return the names of the compared kernels."""
    names: list[str] = []

    def compile_both(function: Callable[..., Any], examples: Sequence[Tensor], dynamic: Sequence[int]) -> Compiled:
        loop = loops.compile_loop(function, examples, dynamic)

        def call(*inputs: Tensor) -> Sequence[Tensor]:
            copies = [t.clone() if i in dynamic else t for i, t in enumerate(inputs)]
            returned = loop(*inputs)
            with RoundedRoots():
                expected = function(*copies)
            assert all(map(same, inputs, copies)) and all(map(same, returned, expected))
            assert len(returned) == len(expected)
            names.append(function.__qualname__)
            return returned

        return Compiled(call, 0.0, False)

    monkeypatch.setattr(plain_loops, "compile_loop", compile_both)
    monkeypatch.setattr(kernels, "_registry", {})
    monkeypatch.setattr(loops, "BLOCK", 256)
    return names


def kernels_of(
    rule: str | Rule, direction: str | None, dtype: torch.dtype, device: torch.device, **options: Any
) -> Any:
    """Return a wrapped layer that holds the kernels; skip if the rule does not support the direction."""
    options = {"loss_fn": lambda m, b: m(b["x"]).sum(-1), "weight_decay": 0.1, **options}
    layer = torch.nn.Linear(5, 3).to(device, dtype)
    try:
        return zowrap.zo_wrap(layer, rule, lr=1e-2, direction=direction, **options)
    except zowrap.ZOError as error:
        pytest.skip(f"refused: {error}")


@pytest.mark.parametrize(("rule", "direction", "dtype"), CASES, ids=str)
def test_every_rule_perturbs_and_updates_as_the_reference(
    rule: str, direction: str | None, dtype: torch.dtype, checked: list[str], device: torch.device
) -> None:
    exercise(kernels_of(rule, direction, dtype, device), dtype, checked, device)


@pytest.mark.parametrize("case", [case for case in rule_cases.CASES if case[1]], ids=rule_cases.name_of)
def test_every_option_of_a_rule_updates_as_the_reference(case: tuple, checked: list[str], device: torch.device) -> None:
    exercise(kernels_of(rules.get(case[0], **case[1]), None, torch.float32, device), torch.float32, checked, device)


def test_the_example_of_a_rule_updates_as_the_reference(
    checked: list[str], device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rules, "register", lambda *_, **__: None)  # the example must not stay registered
    names = runpy.run_path(str(Path(__file__).parents[3] / "examples" / "my_rule.py"))
    exercise(kernels_of(names["zo_lion"](), None, torch.float32, device), torch.float32, checked, device)


@pytest.mark.parametrize("dtype", DTYPES[1:3], ids=str)
@pytest.mark.parametrize("along", ("drawn", "evaluated"))
@pytest.mark.parametrize("masters", (False, True))
def test_sixteen_bit_weights_are_written_as_the_reference_writes_them(
    masters: bool, along: str, dtype: torch.dtype, checked: list[str], device: torch.device
) -> None:
    exercise(kernels_of("zo_adam", None, dtype, device, masters=masters, along=along), dtype, checked, device)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_many_directions_are_summed_up_as_the_reference_sums_them(
    dtype: torch.dtype, checked: list[str], device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(update_kernels, "MOST_DIRECTIONS", 2)
    exercise(kernels_of("zo_adam", None, dtype, device, queries=5), dtype, checked, device)
    assert sum("_add_directions" in name for name in checked) == 6  # two, two and one, applied and left out


def exercise(
    zm: Any, dtype: torch.dtype, checked: list[str], device: torch.device, count: int = 1003, columns: int = 17
) -> None:
    """Run every kernel of a model on numbers of all kinds."""
    kernel, job = zm.engine.kernels, zm.job
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int, of: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, of)

    key = torch.tensor([123456789, -987654321], dtype=torch.int32, device=device)
    shapes = {name: tuple(shape) for name, shape in kernel.update.coefficient_shapes.items()}
    hyper = [torch.tensor(v, device=device) for v in (1e-2, 1e-3, 0.1)]
    names = kernel.rule.slot_names("element")
    # Start in the middle of a parameter with more than 2³² elements.
    w, start = random(count, of=dtype), (1 << 32) + 77
    slots = [random(count).abs() for _ in names]
    scalars = [random().abs() for _ in kernel.perturbation.scalar_names]
    for apply in (torch.tensor(True, device=device), torch.tensor(False, device=device)):
        if job.direction.lowrank is not None:
            coefficients = [random(*shape).abs() for name, shape in shapes.items() if name != "g"]
            args = UpdateArgs(slots, key, coefficients, hyper, apply, True)
            kernel.update.write(w, args, random(count), start)
            continue
        seen = [slots[names.index(name)] for name in kernel.perturbation.slot_names]
        points, noise = random(3), NoiseArgs(seen, key, hyper[0], scalars)
        kernel.perturbation.write(w, noise, points, [torch.empty_like(w) for _ in range(3)], start)
        ids = torch.tensor([7, 0, 4_000_000_000], device=device)
        table = [t[: 3 * columns].view(3, columns) for t in (w, *seen)]
        kernel.perturbation.rows(table[0], noise._replace(slots=table[1:]), points, ids)
        if job.direction.needs_norm:
            kernel.perturbation.squared_norm(w, key)
        named = [random(*shape).abs() for shape in shapes.values()]
        keys = [key + i for i in range(job.queries)]
        directions = DrawnDirections(keys, [hyper[0]] * job.queries, scalars)
        kernel.update.write(w, UpdateArgs(slots, key, named, hyper, apply, True), directions, start)
    written = 2 if job.direction.lowrank is not None else 6
    assert len(checked) >= written and torch.isfinite(w).all()


def test_codes_are_written_as_the_reference_writes_them(checked: list[str], device: torch.device) -> None:
    zm = kernels_of("zo_sgd", None, torch.float32, device)
    codes = torch.randint(-127, 128, (6, 33), dtype=torch.int8, device=device)
    before, old = codes.clone(), torch.randn(6, 33, device=device)
    unit = torch.rand(6, device=device)
    unit[2] = 0
    key = torch.tensor([1, 2], dtype=torch.int32, device=device)
    args = (old, old + 0.3 * torch.randn_like(old), unit, 0, key)
    _write(zm.engine.kernels, codes, *args, torch.tensor(False, device=device))
    assert torch.equal(codes, before)
    _write(zm.engine.kernels, codes, *args, torch.tensor(True, device=device))
    assert len(checked) == 2 and not torch.equal(codes, before) and torch.equal(codes[2], before[2])


@pytest.mark.parametrize("law", noise.LAWS)
def test_noise_has_the_bits_of_the_reference(law: str, device: torch.device) -> None:
    def draw(out: Tensor, key: Tensor, table: Tensor) -> tuple:
        index = torch.arange(out.shape[0], dtype=torch.int32, device=out.device)
        out.copy_(noise.LAWS[law](noise.hash_bits(index, 0, key), table))
        return ()

    key = torch.tensor([-5, 77], dtype=torch.int32, device=device)
    out = torch.empty(5000, device=device)
    table = noise.gaussian_table(device)
    loops.compile_loop(draw, [torch.empty(64, device=device), key, table], [0])(out, key, table)
    assert torch.equal(out.cpu(), noise.draw(law, key.cpu(), (5000,)))


def test_nothing_beyond_the_end_is_touched(device: torch.device) -> None:
    def fill(out: Tensor) -> tuple:
        out.copy_(torch.arange(out.shape[0], dtype=torch.int32, device=out.device).to(torch.float32))
        return ()

    room = torch.full((3000,), -1.0, device=device)
    loops.compile_loop(fill, [torch.empty(64, device=device)], [0])(room[:1500])
    assert torch.equal(room[:1500], torch.arange(1500.0, device=device)) and bool((room[1500:] == -1).all())


def test_an_empty_array_is_left_alone(device: torch.device) -> None:
    def double(x: Tensor) -> tuple:
        return (x * 2,)

    (out,) = loops.compile_loop(double, [torch.empty(64, device=device)], [0])(torch.empty(0, device=device))
    assert out.shape == (0,)


# All operations that a rule may use: of one operand, of two, of three.
OPERATIONS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "sign": lambda a, b, c: a.sign(),
    "reciprocal": lambda a, b, c: 1 / a,
    "rsqrt": lambda a, b, c: a.rsqrt(),
    **{f"power {n}": lambda a, b, c, n=n: a**n for n in (-2, 0, 0.5, 1, 2, 3, 7)},
    "square": lambda a, b, c: a.square(),
    "floor": lambda a, b, c: a.floor(),
    "round": lambda a, b, c: a.round(),
    "add": lambda a, b, c: torch.add(a, b, alpha=0.3),
    "subtract": lambda a, b, c: torch.sub(a, b, alpha=0.3),
    **{f"lerp {w}": lambda a, b, c, w=w: a.lerp(b, w) for w in (0.1, 0.9)},
    "lerp": lambda a, b, c: a.lerp(b, c),
    "addcmul": lambda a, b, c: a.addcmul(b, c, value=0.3),
    "addcdiv": lambda a, b, c: a.addcdiv(b, c, value=-0.3),
    "clamp": lambda a, b, c: a.clamp(-0.1, 0.3),
    "clamp from below": lambda a, b, c: a.clamp(min=0.1),
    "clamp from above": lambda a, b, c: a.clamp(max=0.1),
    "clamp between": lambda a, b, c: a.clamp(b, c),
    "clamp from above by": lambda a, b, c: a.clamp(max=b),
    "clamp_min": lambda a, b, c: a.clamp_min(0.1),
    "clamp_max": lambda a, b, c: a.clamp_max(0.1),
    "clamp by nothing": lambda a, b, c: a.clamp(min=torch.nan),
    "is": lambda a, b, c: torch.where(a.isnan() | torch.logical_or(b.isinf(), c > 0), 0.1, a),
    "masked_fill": lambda a, b, c: a.masked_fill(b > 0, 0.7),
    "like": lambda a, b, c: torch.where(a > 0, torch.zeros_like(a), torch.full_like(a, 0.3)) + torch.ones_like(a),
    "clone": lambda a, b, c: a.clone(),
}


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=str)
def test_operations_have_the_bits_of_a_cpu(dtype: torch.dtype, device: torch.device) -> None:
    """Compare on numbers of all sizes, with NaN, infinities, zeros and subnormals."""

    def function(a: Tensor, b: Tensor, c: Tensor) -> tuple:
        return tuple(operation(a, b, c) for operation in OPERATIONS.values())

    draw = torch.Generator().manual_seed(0)
    special = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0, -0.0, 1e-40, -1e-40, 1, -1, 0.5, -0.5, 3e38])
    given = []
    for _ in range(3):
        x = torch.randn(3003, generator=draw) * torch.exp(4 * torch.randn(3003, generator=draw))
        among = special[torch.randint(len(special), x.shape, generator=draw)]
        given.append(torch.where(torch.rand(x.shape, generator=draw) < 0.3, among, x).to(dtype))
    examples = [torch.empty(64, dtype=dtype) for _ in given]
    expected = compile_function(function, examples, range(3))(*given)
    loop = loops.compile_loop(function, [t.to(device) for t in examples], range(3))
    for name, found, wanted in zip(OPERATIONS, loop(*(t.to(device) for t in given)), expected, strict=True):
        found = found.cpu()
        nothing = found.isnan() & wanted.isnan()  # NaNs may have different bits
        assert same(found.masked_fill(nothing, 0), wanted.masked_fill(nothing, 0)), name


def test_numbers_are_counted_from_the_end_too(device: torch.device) -> None:
    few = torch.tensor([1.0, 2.0, 3.0], device=device)
    loop = loops.compile_loop(lambda x, few: (x * few[-1],), [torch.empty(64, device=device), few], [0])
    (out,) = loop(torch.ones(5, device=device), few)
    assert out.tolist() == [3.0] * 5


REFUSED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "exp": lambda x, few: x.exp(),
    "tanh": lambda x, few: x.tanh(),
    "log": lambda x, few: x.abs().log(),
    "pow": lambda x, few: x**0.3,
    "sum": lambda x, few: x / x.sum(),
    "mean": lambda x, few: x - x.mean(),
    "select": lambda x, few: x * x[0],
    "sum.default": lambda x, few: x * few.sum(),
    "few": lambda x, few: x[:3] * few,
    "mul_": lambda x, few: x.clone().mul_(2),
    "constant": lambda x, few: x * torch.tensor(0.5),
    "alpha": lambda x, few: torch.rsub(x, x, alpha=2),
    "float8": lambda x, few: x.to(torch.float8_e4m3fn).float(),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_written_says_so(name: str, device: torch.device) -> None:
    """It must neither give different results nor end in an error of Triton's."""
    examples = [torch.empty(64, device=device), torch.ones(3, device=device)]
    with pytest.raises(ZOCaptureError, match=r"aten\.\w+.*engine='eager' runs"):
        loops.compile_loop(lambda x, few: (REFUSED[name](x, few),), examples, [0])


def test_arrays_with_gaps_are_an_error_of_ours(device: torch.device) -> None:
    double = loops.compile_loop(lambda x: (x * 2,), [torch.empty(64, device=device)], [0])
    with pytest.raises(ZOInternalError, match="contiguous"):
        double(torch.empty(8, device=device)[::2])
