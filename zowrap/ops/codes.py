"""Products with perturbed integer codes, and the epilogue's update of codes.

``perturb_codes``  a placeholder for perturbed codes between two passes; it cannot be run
``codes_points``   x_p · (W + c_p · z)ᵀ for all points: one integer product, and one of the stacked inputs with z
``update_codes_``  the rule's update of one parameter: row chunks are dequantised to float32 in a scratch buffer

The whole W never exists in floating point.
"""

from __future__ import annotations

import torch
from torch import Tensor

from zowrap.custom_op import Cost, PersistentBuffers, Traits, operator
from zowrap.numerics import codes as integer
from zowrap.numerics import noise
from zowrap.ops import kernels
from zowrap.ops.arguments import DrawnDirections, NoiseArgs, UpdateArgs
from zowrap.ops.int8 import product_flops, products, rounding_scratch, rows_of
from zowrap.ops.points import at_point, empty_products
from zowrap.ops.scratch import buffers, chunks, longest


@operator("perturb_codes", traits=Traits(perturbs="codes", all_points=True), cost=Cost())
def perturb_codes(
    codes: Tensor,
    slots: list[Tensor],
    key: Tensor,
    scale: Tensor,
    scalars: list[Tensor],
    coefficients: Tensor,
    kernel_key: str,
) -> list[Tensor]:
    """Represent the codes at every point until a pass replaces their products; see the module docstring."""
    raise NotImplementedError("perturbed codes have no integer value: a pass replaces their products")


@perturb_codes.register_fake
def _(codes, slots, key, scale, scalars, coefficients, kernel_key):
    return [torch.empty_like(codes) for _ in range(coefficients.shape[0])]


def _chunk_bytes(codes: Tensor) -> int:
    """Return the bytes of a matrix's longest chunk in float32."""
    return 4 * longest(*codes.shape) * codes.shape[1]


def _points_scratch(x: list[Tensor], codes: Tensor, coefficients: Tensor) -> int:
    outputs, points, rows = codes.shape[0], coefficients.shape[0], [rows_of(each) for each in x]
    plain = sum(rows) * outputs * x[0].element_size()
    rounding = rounding_scratch(x, outputs, len(x))
    rounding -= (points - len(x)) * max(rows) * outputs * x[0].element_size()  # results that do not exist yet
    floats = 4 * sum(t.numel() for t in x) * ((len(x) > 1) + (x[0].dtype != torch.float32))
    return plain + max(rounding, floats + 4 * outputs * (sum(rows) + max(rows)))


def _points_buffers(codes: Tensor) -> PersistentBuffers:
    return {(name, torch.float32, 1): _chunk_bytes(codes) for name in ("zeros", "direction")}


@operator(
    "codes_points",
    traits=Traits(all_points=True),
    cost=Cost(
        flops=lambda x, codes: 2 * product_flops(x, codes.shape[0]),
        noise=lambda codes: codes.numel(),
        scratch=_points_scratch,
        buffers=_points_buffers,
    ),
)
def codes_points(
    x: list[Tensor],
    codes: Tensor,
    row_scale: Tensor,
    bias: list[Tensor],
    threshold: float,
    slots: list[Tensor],
    key: Tensor,
    scale: Tensor,
    scalars: list[Tensor],
    coefficients: Tensor,
    kernel_key: str,
) -> list[Tensor]:
    """Compute ``[x[p] · (W + coefficients[p] · z)ᵀ + bias[p] for p]``.

    Args:
        x: ``[..., inputs]`` for each point, or a single tensor that all points share.
        codes: int8 ``[outputs, inputs]``; together with ``row_scale`` they represent W.
        row_scale: float32 ``[outputs]``.
        bias: one for each point, a single one that all points share, or none.
        slots, key, scale, scalars: determine z, see :class:`zowrap.ops.arguments.NoiseArgs`.
    """
    perturbation, noise = kernels.get(kernel_key).perturbation, NoiseArgs(slots, key, scale, scalars).flat()
    plain = products(x, codes, [row_scale], bias, threshold)
    rows = [t.reshape(-1, t.shape[-1]).float() for t in x]
    stacked = rows[0] if len(rows) == 1 else torch.cat(rows)
    outputs, columns = codes.shape
    most = longest(outputs, columns) * columns
    zeros, z = (buffers(name, torch.float32, codes.device, 1, most)[0] for name in ("zeros", "direction"))
    one = torch.ones(1, device=codes.device)
    change = torch.empty((stacked.shape[0], outputs), device=codes.device)
    for first, last in chunks(outputs, columns):
        start, end = first * columns, last * columns
        size = end - start
        perturbation.write(zeros[:size], noise.part(start, end), one, [z[:size]], start)
        torch.mm(stacked, z[:size].view(-1, columns).t(), out=change[:, first:last])
    changes = change.split([r.shape[0] for r in rows])
    out = []
    for p, coefficient in enumerate(coefficients):
        y = at_point(plain, p)
        along = at_point(changes, p) * coefficient
        out.append((y.float() + along.view(y.shape)).to(y.dtype))
    return out


@codes_points.register_fake
def _(x, codes, row_scale, bias, threshold, slots, key, scale, scalars, coefficients, kernel_key):
    return empty_products(x, codes.shape[0], coefficients.shape[0])


def _update_buffers(codes: Tensor, keys: list[Tensor], kernel_key: str) -> PersistentBuffers:
    size = _chunk_bytes(codes)
    kept = {(name, torch.float32, 1): size for name in ("old weights", "new weights")}
    return kept | kernels.get(kernel_key).update.persistent_buffers(size // 4, len(keys))


@operator(
    "update_codes_",
    traits=Traits(writes="codes"),
    cost=Cost(noise=lambda codes, keys: len(keys) * codes.numel(), buffers=_update_buffers),
    mutates=("codes", "slots"),
)
def update_codes_(
    codes: Tensor,
    row_scale: Tensor,
    slots: list[Tensor],
    keys: list[Tensor],
    scales: list[Tensor],
    scalars: list[Tensor],
    rounding_key: Tensor,
    coefficients: list[Tensor],
    hyper: list[Tensor],
    apply: Tensor,
    decay: bool,
    kernel_key: str,
) -> None:
    """Apply the rule's update to one matrix of codes, in place; see :class:`zowrap.ops.arguments.UpdateArgs`."""
    kernel, unit = kernels.get(kernel_key), integer.unit_of(row_scale)
    args = UpdateArgs(slots, rounding_key, coefficients, hyper, apply, decay).flat()
    along = DrawnDirections(keys, scales, scalars)
    outputs, columns = codes.shape
    most = longest(outputs, columns) * columns
    old, new = (buffers(name, torch.float32, codes.device, 1, most)[0] for name in ("old weights", "new weights"))
    for first, last in chunks(outputs, columns):
        start, end = first * columns, last * columns
        size = end - start
        old[:size].copy_(integer.dequantize(codes[first:last], unit[first:last]).view(-1))
        new[:size].copy_(old[:size])
        kernel.update.write(new[:size], args.part(start, end), along, start)
        shape = (last - first, columns)
        _write(
            kernel, codes[first:last], old[:size].view(shape), new[:size].view(shape), unit, first, rounding_key, apply
        )


@update_codes_.register_fake
def _(codes, row_scale, slots, keys, scales, scalars, rounding_key, coefficients, hyper, apply, decay, kernel_key):
    return None


def warm(kernel: kernels.Kernels, device: torch.device, columns: int) -> None:
    """Compile the kernels that write codes by running them on dummies, so that no update fails half-way.

    Args:
        columns: length of a dummy row, see :func:`zowrap.ops.loops.alike`.
    """
    key = torch.zeros(2, dtype=torch.int32, device=device)
    for rows in (16, 1):  # an ordinary chunk, and the last one
        matrix, ones = torch.zeros(rows, columns, device=device), torch.ones(rows, device=device)
        _write(kernel, matrix.to(torch.int8), matrix, matrix, ones, 0, key, ones[0] > 0)


def _write(
    kernel: kernels.Kernels,
    codes: Tensor,
    old: Tensor,
    new: Tensor,
    unit: Tensor,
    first: int,
    key: Tensor,
    apply: Tensor,
) -> None:
    """Add ``new − old``, rounded, to ``codes``, which are the matrix's rows from number ``first`` on, in one loop."""
    rows = torch.arange(first, first + codes.shape[0], device=codes.device)

    def write(*inputs: Tensor) -> tuple:
        codes, old, new, rows, unit, key, apply = inputs
        columns = torch.arange(codes.shape[1], dtype=torch.int64, device=codes.device)
        bits = noise.hash_bits(*noise.split_index(rows.unsqueeze(1) * codes.shape[1] + columns), key)
        codes.copy_(integer.add_change(codes, new - old, unit, bits, apply))
        return ()

    arrays = [codes, old, new, rows, unit[first : first + codes.shape[0]]]
    kernel.loops.run(("codes",), write, arrays, [key, apply])
