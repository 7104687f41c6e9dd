"""Add residual credit: what each matrix that writes to the residual stream needs for its update.

    before                          after
    f = linear(x, w, b)             f = linear(x, w, b)
    h1 = add(h, f)                  h1 = add(h, f)
    …                               …
    s = head(norm(h1), …)           s, d_head = head_credit(norm(h1), …)
    return s, weights               d = norm_backward(d_head, h1, …)
                                    return s, weights, x, d, matmul(dᵀ, matmul(x, sketch)), sum(d)

The cotangents of the loss are carried from its end towards the inputs, exactly, through every operation but one kind:
at a product whose result reaches the stream, and whose inputs come from the stream, they stop. The product's weight is
a *writer*; ``d`` is the cotangent of its result. So the stream is found by data flow: a sum is part of it if one term
is an ancestor of another term's product.

Products after the stream (a pooler, a classifier) are writers, too, and the cotangents go on through them.
See :mod:`zowrap.step.credit` for what is done with the outputs.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import fx

import zowrap.ops.all  # noqa: F401 (registers torch.ops.zowrap)
from zowrap.compiler.inductor import symbolic_sizes
from zowrap.compiler.program import Program
from zowrap.errors import Option, ZOError, ZOInternalError
from zowrap.passes.adjoint import Adjoint
from zowrap.passes.fuse_head import LEAST_CLASSES
from zowrap.passes.graph import product_with, reached
from zowrap.passes.manager import Pass
from zowrap.step.credit import SKETCHES, Piece, Use
from zowrap.step.job import Job

aten = torch.ops.aten
# What leaves a term of a sum what it is: the stream is recognised through it.
_TURNED = {aten.t.default, aten.numpy_T.default, aten.transpose.int, aten.permute.default}
_TRANSPARENT = {
    *_TURNED,
    aten.to.dtype,
    aten._to_copy.default,
    aten.view.default,
    aten.reshape.default,
    aten._unsafe_view.default,
    aten.clone.default,
    aten.contiguous.default,
    aten.unsqueeze.default,
    aten.squeeze.dim,
}
# By name: transformers registers the first, where torch's own does not fit.
_GROUPED = {"transformers.grouped_mm_fallback.default", "aten._grouped_mm.default"}
_PRODUCTS_OF_ACTIVATIONS = {
    aten.bmm.default,
    aten.matmul.default,
    aten.mm.default,
    aten.baddbmm.default,
    aten.einsum.default,
    aten.scaled_dot_product_attention.default,
}


@dataclass
class Writer:
    """A product with a matrix: ``node`` = ``x`` · ``weight`` + ``bias``; index of each in the job, None if it stays.

    Attributes:
        ends: of a product with the matrices of several experts: where the tokens of each end, which are in order.
        experts: or the number of each token's expert, and then ``weights`` are the indices of theirs.
    """

    node: fx.Node
    x: fx.Node
    weight: int | None
    bias: int | None
    transposed: bool
    ends: fx.Node | None = None
    experts: fx.Node | None = None
    weights: tuple[int | None, ...] = ()

    @property
    def moves(self) -> bool:
        return self.weight is not None or self.bias is not None or any(i is not None for i in self.weights)


@dataclass
class BlockEnd:
    """A product that ends a block: the sum that it is first a term of, and whether it writes to the stream at all."""

    sum: fx.Node
    writes: bool


class AssignCredit(Pass):
    """Add the outputs; see the module docstring."""

    name = "residual"

    def __init__(self, job: Job) -> None:
        self.job = job

    def call(self, program: Program) -> str:
        _complete_values(program)
        _fuse_heads(program)
        products = _find_products(program, self.job)
        graph = program.graph
        ends = _find_block_ends(graph, products)
        for product in [node for node, end in ends.items() if not end.writes]:
            products[product] = replace(products[product], weight=None, bias=None, weights=())
        if not ends:
            raise ZOError(_NO_STREAM, Option("estimator", "central"), " or ", Option("estimator", "population"))
        sweep = _Sweep(program, products, ends, _find_scales(program, self.job))
        found = sweep.run()
        if not found:
            raise ZOError(_NOTHING_MOVES if sweep.reached else _NO_DERIVATIVE, Option("estimator", "population"))
        outputs = _Outputs(program, self.job, sweep.adjoint, [products[node] for node, _ in found if node in products])
        share = _Shares({node: end for node, end in ends.items() if node in sweep.reached}, products)
        for node, cotangent in found:
            if node in products:
                outputs.add(products[node], cotangent, share.of(node))
            else:
                outputs.add_vector(sweep.scales[node], cotangent, share.of_scale(node))
        outputs.finish()
        stream = sum(node in ends for node, _ in found)
        return f"{stream} products write to the stream, {len(found) - stream} follow it"

    def ensures(self, program: Program) -> None:
        if not program.credit:
            raise ZOInternalError("nothing gets credit")


def take_part(program: Program, part: str) -> Program:
    """Leave a part of a finished program.

    Args:
        part: ``"all"``; ``"without inputs"``, the losses and everything but the inputs of products; or ``"inputs"``,
            those alone, in the order of :attr:`Program.credit`, for a second forward.
    """
    outputs: Any = program.graph.output_node().args[0]
    inputs = {use.outputs[0] for use in program.credit if use.matrix}
    if part == "without inputs":
        program.graph.output_node().args = (tuple(o for i, o in enumerate(outputs) if i not in inputs),)
    if part == "inputs":
        program.graph.output_node().args = (tuple(outputs[i] for i in sorted(inputs)),)
        sketch = program.placeholder("added", "sketch")
        program.finish(part)
        if sketch is not None:
            program.inputs = [given for given in program.inputs if given.target != "sketch"]
            program.graph.erase_node(sketch)
    program.finish(part)
    return program


def sketch_inputs(program: Program) -> int:
    """Return the number of rows of the sketch that a program takes."""
    sketch = program.placeholder("added", "sketch")
    assert sketch is not None
    return sketch.meta["val"].shape[0]


def collect_pieces(uses: Sequence[Use], outputs: Sequence[Any], with_inputs: bool) -> list[Piece]:
    """Sort the outputs after the weights into pieces.

    Args:
        with_inputs: of the whole program; otherwise of the part ``"without inputs"``.
    """
    pieces, left = [], iter(outputs)
    for use in uses:
        if use.matrix:
            x = next(left) if with_inputs else None
            pieces.append(Piece(use, x, d=next(left), sketch=next(left)))
            if len(use.outputs) > 3:
                pieces[-1].experts = next(left)
        else:
            pieces.append(Piece(use, vector=next(left)))
    return pieces


_NO_STREAM = (
    "residual credit needs a stream that the blocks of the model add to, up to its head, and this model has none; what "
    "works with any model is "
)
_NO_DERIVATIVE = (
    "residual credit starts from the derivative of the loss by the last hidden states, and this loss has none; what "
    "needs only its values is "
)
_NOTHING_MOVES = (
    "none of the weights that move writes to the residual stream (the output projections of attention and of the "
    "feed-forward layers do, and adapters on them); what moves any weights is "
)


def _find_products(program: Program, job: Job) -> dict[fx.Node, Writer]:
    """Find the products with a matrix of the model, whether it moves or not, by their node."""
    moving = {f"model.{name}": i for i, p in enumerate(job.parameters) for name in p.names}
    index: dict[fx.Node, int | None] = {}
    for given, node in zip(program.inputs, program.graph.find_nodes(op="placeholder"), strict=True):
        if given.kind in ("parameter", "buffer", "constant"):
            index[node] = moving.get(given.target) if given.kind == "parameter" else None
    found: dict[fx.Node, Writer] = {}
    batch = {given.node for given in program.inputs if given.kind == "batch"}
    of_batch = reached(program.graph, {n for n in program.graph.find_nodes(op="placeholder") if n.name in batch})
    for weight, number in index.items():
        value = weight.meta["val"]
        if not isinstance(value, torch.Tensor) or value.ndim < 2:
            continue
        if _is_vocabulary(weight):
            number = None
        for use, through in _uses(weight):
            product = product_with(use, through)
            if use not in of_batch:
                continue  # a product of weights
            if product is not None:
                turns = _turns(weight, through)
                moves = number if turns is not None and value.is_floating_point() else None
                product = product._replace(transposed=product.transposed != bool(turns))
                bias = index.get(product.bias) if product.bias is not None else None
                found[use] = Writer(use, product.x, moves, bias, product.transposed)
            elif str(use.target) in _GROUPED and use.args[1] is through:
                found[use] = _experts_product(use, through, weight, number)
            elif use.target is torch.ops.zowrap.expert_products.default:
                weights: Any = use.args[1]
                own = tuple(index.get(each) for each in weights)
                x, _, experts = cast("tuple[fx.Node, Any, fx.Node]", use.args)
                found[use] = Writer(use, x, None, None, False, experts=experts, weights=own)
            elif use.op == "call_function" and _multiplies(use, through):
                x = next(n for n in use.all_input_nodes if n is not through)
                found[use] = Writer(use, x, None, None, False)
    return found


def _experts_product(use: fx.Node, through: fx.Node, weight: fx.Node, number: int | None) -> Writer:
    """A product of tokens in the order of their experts; it reads ``[experts, inputs, outputs]``."""
    x: Any = use.args[0]
    ends: Any = use.args[2]
    turned = through.target is aten.transpose.int and through.args[0] is weight
    moves = number if turned or through is weight else None
    return Writer(use, x, moves, None, transposed=not turned, ends=ends)


def _find_scales(program: Program, job: Job) -> dict[fx.Node, int]:
    """Find the scales of quantised weights that move, and their indices in the job."""
    moving = {
        f"model.{n}": i for i, p in enumerate(job.parameters) if p.scale is not None and not p.codes for n in p.names
    }
    nodes = zip(program.inputs, program.graph.find_nodes(op="placeholder"), strict=True)
    return {node: moving[given.target] for given, node in nodes if given.kind == "parameter" and given.target in moving}


def _is_vocabulary(weight: fx.Node) -> bool:
    """Return whether a matrix is an embedding, or a head with as many outputs for each token.

    A head that is tied to the embedding would get half of its gradient, and the cotangents of logits are large.
    """
    for use in weight.users:
        if use.target in (aten.embedding.default, torch.ops.zowrap.rows.default):
            return True
        product = product_with(use, weight)
        many = product is not None and use.meta["val"].ndim > 2 and isinstance(_width(use), int)
        if many and _width(use) >= LEAST_CLASSES and _width(use) > 4 * product.x.meta["val"].shape[-1]:  # type: ignore[union-attr]
            return True
    return False


def _turns(weight: fx.Node, through: fx.Node) -> int | None:
    """Return how often a matrix is transposed on the way to its use, modulo 2; None if it is more than transposed."""
    turns, node = 0, through
    while node is not weight:
        if node.target not in _TURNED or node.meta["val"].ndim != 2:
            return None
        turns, node = turns + 1, node.args[0]  # type: ignore[assignment]
    return turns % 2


def _uses(weight: fx.Node) -> Iterator[tuple[fx.Node, fx.Node]]:
    """Yield ``(use, weight)`` for each use of a weight, also of its views and casts."""
    for use in weight.users:
        if use.target in _TRANSPARENT or use.target in (aten.select.int, aten.slice.Tensor):
            yield from _uses(use)
        yield use, weight


def _multiplies(use: fx.Node, weight: fx.Node) -> bool:
    """Return whether a use is a product that is no writer, but may end a block: int8, convolution, experts."""
    name = str(use.target)
    known = ("int8_linear", "conv", "expert_products", "grouped_mm", "bmm", "matmul", "mm", "linear", "einsum")
    others = [n for n in use.all_input_nodes if n is not weight]
    return bool(others) and any(part in name for part in known)


def _find_block_ends(graph: fx.Graph, products: dict[fx.Node, Writer]) -> dict[fx.Node, BlockEnd]:
    """Find the products that end a block: a term of a sum comes from them, and their inputs from another term of it.

    A router of experts is one that does not write to the stream: its results only weigh others.
    """
    bit = {node: 1 << i for i, node in enumerate(graph.nodes)}
    ancestors: dict[fx.Node, int] = {}
    for node in graph.nodes:
        ancestors[node] = bit[node]
        for given in node.all_input_nodes:
            ancestors[node] |= ancestors[given]
    ends: dict[fx.Node, BlockEnd] = {}
    for node in graph.nodes:
        if node.target is not aten.add.Tensor or not _is_stream_like(node):
            continue
        terms = list(_terms(node))
        for term in terms:
            for product in _products_before(term, products):
                comes_from = ancestors[products[product].x]
                if any(other is not term and comes_from & bit[other] for other in terms):
                    end = ends.setdefault(product, BlockEnd(node, False))
                    end.writes = end.writes or _fits(product, node)
    return ends


class _Shares:
    """The shares of their credit that parameters take, see :attr:`zowrap.step.credit.Use.share`."""

    def __init__(self, ends: dict[fx.Node, BlockEnd], products: dict[fx.Node, Writer]) -> None:
        self.ends, self.products = ends, products
        self._sums = list(dict.fromkeys(end.sum for end in ends.values()))  # in the order of the stream

    def of(self, product: fx.Node) -> float:
        if product not in self.ends:
            return 1.0
        return (self._sums.index(self.ends[product].sum) + 1) / len(self._sums)

    def of_scale(self, scale: fx.Node) -> float:
        """Of the scales of a quantised weight: that of the first product that reads them."""
        left, seen = [scale], {scale}
        while left:
            node = left.pop(0)
            if node in self.products:
                return self.of(node)
            left += [user for user in node.users if user not in seen]
            seen.update(node.users)
        return 1.0


def _fits(product: fx.Node, stream: fx.Node) -> bool:
    """Return whether a product has the stream's width, which is last or, in convolutional models, in another place."""
    return str(_width(product)) in [str(size) for size in stream.meta["val"].shape[1:]]


def _width(node: fx.Node) -> Any:
    return node.meta["val"].shape[-1]


def _is_stream_like(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.is_floating_point() and value.ndim >= 2


def _terms(node: fx.Node) -> Iterator[fx.Node]:
    """Yield the terms of a sum, also of the sums among them; each without casts and views around it."""
    while _is_transparent(node):
        node = node.args[0]  # type: ignore[assignment]
    yield node
    if node.target is aten.add.Tensor and _is_stream_like(node):
        for given in node.args[:2]:
            if isinstance(given, fx.Node):
                yield from _terms(given)


def _is_transparent(node: fx.Node) -> bool:
    if node.target in (aten.mul.Tensor, aten.div.Tensor, aten.mul.Scalar, aten.div.Scalar):
        return not isinstance(node.args[1], fx.Node) and isinstance(node.args[0], fx.Node)
    return node.target in _TRANSPARENT


def _products_before(term: fx.Node, products: dict[fx.Node, Writer]) -> list[fx.Node]:
    """Find the products that a term comes from by small maps: elementwise ones, norms and views."""
    found, seen, left = [], set(), [term]
    while left:
        node = left.pop()
        if node in seen or node.op != "call_function":
            continue
        seen.add(node)
        if node in products:
            found.append(node)
        elif node.target not in _PRODUCTS_OF_ACTIVATIONS:
            left += node.all_input_nodes
    return found


class _Outputs:
    """Adds what writers need to the outputs of a program."""

    def __init__(self, program: Program, job: Job, adjoint: Adjoint, writers: Sequence[Writer]) -> None:
        self.program, self.job, self.adjoint = program, job, adjoint
        self.nodes: list[Any] = list(program.graph.output_node().args[0])  # type: ignore[arg-type]
        # The signs of the inputs come first, then those of experts.
        self._widest = max(map(self._columns, writers), default=1)
        most = max(map(self._count_experts, writers), default=0)
        self.sketch = program.add_input("sketch", torch.zeros(self._widest + most, SKETCHES, device=job.device))

    def add(self, writer: Writer, d: fx.Node, share: float) -> None:
        """Add what a writer needs; ``d`` is the cotangent of its result."""
        call = self.adjoint.call
        rows = call(aten.reshape.default, d, [-1, d.meta["val"].shape[-1]])
        if writer.bias is not None:
            self._add(writer.bias, [call(aten.sum.dim_IntList, rows, [0], dtype=torch.float32)], share)
        weights = [(writer.weight, None)] if writer.weight is not None else []
        weights += [(i, number) for number, i in enumerate(writer.weights) if i is not None]  # type: ignore[misc]
        if not weights:
            return
        experts = writer.experts
        if writer.ends is not None:
            order = call(aten.arange.default, self.adjoint.sizes(rows)[0], device=rows.meta["val"].device)
            experts = call(aten.searchsorted.Tensor, writer.ends, order, right=True)
        sketch = self._sketch(writer, rows, experts)
        for index, expert in weights:
            nodes = [writer.x, d, sketch] + ([] if experts is None else [experts])
            self._add(cast("int", index), nodes, share, writer.transposed, expert)
            sketch = call(aten.zeros_like.default, sketch) if experts is not None else sketch

    def add_vector(self, index: int, gradient: fx.Node, share: float) -> None:
        """Add the gradient of a parameter that is no matrix."""
        self._add(index, [self.adjoint.to(gradient, torch.float32)], share)

    def finish(self) -> None:
        self.program.graph.output_node().args = (tuple(self.nodes),)

    def _add(
        self, index: int, nodes: list[fx.Node], share: float, transposed: bool = False, expert: int | None = None
    ) -> None:
        places = tuple(range(len(self.nodes), len(self.nodes) + len(nodes)))
        self.nodes += nodes
        self.program.credit.append(Use(index, places, transposed, expert, share))

    def _sketch(self, writer: Writer, rows: fx.Node, experts: fx.Node | None) -> fx.Node:
        """dᵀ (x r), float32 ``[outputs, SKETCHES]``."""
        call = self.adjoint.call
        signs = call(aten.slice.Tensor, self.sketch, 0, 0, self._columns(writer))
        dtype = writer.x.meta["val"].dtype
        wide = torch.float32 if dtype == torch.float16 else dtype  # whose sums may be out of its range
        thin = call(aten.matmul.default, self.adjoint.to(writer.x, wide), self.adjoint.to(signs, wide))
        thin.meta["nn_module_stack"] = writer.node.meta.get("nn_module_stack")
        thin = self.adjoint.to(call(aten.reshape.default, thin, [-1, SKETCHES]), torch.float32)
        if experts is not None:
            own = call(aten.add.Tensor, experts, self._widest)
            thin = call(aten.mul.Tensor, thin, call(aten.index_select.default, self.sketch, 0, own))
        return call(aten.mm.default, call(aten.t.default, self.adjoint.to(rows, torch.float32)), thin)

    def _columns(self, writer: Writer) -> int:
        """The number of inputs of a product, as its weight says; that of ``x`` may be a symbol."""
        index = writer.weight if writer.weight is not None else next((i for i in writer.weights if i is not None), None)
        if index is None:
            return 1
        shape = self.job.parameters[index].tensor.shape
        return shape[-2] if writer.transposed else shape[-1]

    def _count_experts(self, writer: Writer) -> int:
        if writer.ends is not None and writer.weight is not None:
            return self.job.parameters[writer.weight].tensor.shape[0]
        return len(writer.weights)


class _Sweep:
    """Carries cotangents from the loss towards the inputs.

    Attributes:
        reached: the ends of blocks that a cotangent came to: those of an encoder's stream get none in a decoder's.
    """

    def __init__(
        self,
        program: Program,
        products: dict[fx.Node, Writer],
        ends: Collection[fx.Node],
        scales: dict[fx.Node, int],
    ) -> None:
        self.graph, self.products, self.ends, self.scales = program.graph, products, ends, scales
        self.adjoint = Adjoint(program)
        self.reached: set[fx.Node] = set()
        self._needs: set[fx.Node] = set()
        for node in self.graph.nodes:
            moves = node in scales or (node in products and products[node].moves)
            inside = node not in ends and any(given in self._needs for given in node.all_input_nodes)
            if (moves or node in ends or inside) and _is_float(node):
                self._needs.add(node)

    def run(self) -> list[tuple[fx.Node, fx.Node]]:
        """Return ``(product, cotangent of its result)`` for each product whose weight or bias moves."""
        outputs: Any = self.graph.output_node().args[0]
        sums: fx.Node = outputs[0]
        order = list(self.graph.nodes)
        cotangents: dict[fx.Node, Any] = {sums: self.adjoint.call(aten.ones_like.default, sums)}
        found = []
        for node in reversed(order):
            cotangent = cotangents.pop(node, None)
            if cotangent is None:
                continue
            writer = self.products.get(node)
            if writer is not None and writer.moves:
                found.append((node, cotangent))
            if node in self.scales:
                found.append((node, cotangent))
            if node in self.ends:
                self.reached.add(node)
            # A block's end passes nothing on to its inputs, but to the scales of its own rows.
            wanted = [given for given in node.all_input_nodes if given in self._needs]
            if node in self.ends:
                wanted = [given for given in wanted if given is not self.products[node].x]
            if not wanted:
                continue
            if node.target is operator.getitem:
                several, number = node.args
                assert isinstance(several, fx.Node)
                self._add(cotangents.setdefault(several, {}), number, cotangent)
                continue
            for given, made in zip(wanted, self.adjoint.pull_back(node, cotangent, wanted), strict=True):
                self._add(cotangents, given, made)
        return found[::-1]

    def _add(self, cotangents: dict[Any, Any], key: Any, made: fx.Node) -> None:
        cotangents[key] = made if key not in cotangents else self.adjoint.add(cotangents[key], made)


def _is_float(node: fx.Node) -> bool:
    value = node.meta.get("val")
    if isinstance(value, tuple | list):
        return any(isinstance(each, torch.Tensor) and each.is_floating_point() for each in value)
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def _complete_values(program: Program) -> None:
    """Give a fake value to the nodes that passes have added without one."""
    with torch.no_grad(), symbolic_sizes(program.fake_mode):
        for node in program.graph.nodes:
            if node.op == "call_function" and "val" not in node.meta:
                args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])  # type: ignore[misc]
                node.meta["val"] = node.target(*args, **kwargs)


def _fuse_heads(program: Program) -> None:
    """Let each fused head return its derivative by the hidden states as well."""
    for node in program.graph.find_nodes(op="call_function", target=torch.ops.zowrap.head.default):
        x, w, bias, thin, left, labels = node.args
        if thin is not None or left is not None:
            raise ZOInternalError("residual credit is for unperturbed programs")
        with program.graph.inserting_before(node):
            both = program.graph.call_function(torch.ops.zowrap.head_credit.default, (x, w, bias, labels))
            sums = program.graph.call_function(operator.getitem, (both, 0))
        hidden: Any = x
        both.meta = {**node.meta, "val": (node.meta["val"], hidden.meta["val"])}
        sums.meta = dict(node.meta)
        node.replace_all_uses_with(sums)
        program.graph.erase_node(node)
