"""Residual credit is the gradient that autograd gives where the inputs of every block are held fixed."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import zowrap
from tests.support.families import batch, make
from tests.support.programs import after, captured, operators
from tests.support.quantized_models import quantized
from tests.support.slow import slow_except
from zowrap.compiler.program import Program
from zowrap.errors import ZOError
from zowrap.passes.check_lookups import CheckLookups
from zowrap.passes.fuse_head import FuseHead
from zowrap.passes.residual import AssignCredit, collect_pieces, take_part
from zowrap.passes.strip_training import StripTraining
from zowrap.step.credit import Credit, draw_sketch, factors
from zowrap.step.credit import gradient as taken

# By family: what ends the names of the matrices that write to the stream, and of those that follow it.
WRITERS = {
    "opt": ("out_proj", "fc2"),
    "llama": ("o_proj", "down_proj"),
    "qwen3": ("o_proj", "down_proj"),
    "gemma": ("o_proj", "down_proj"),
    "phi": ("dense", "fc2"),  # both read one norm of the stream
    "mixtral": ("o_proj", "experts"),  # the down projections, and no router
    "gpt2": ("attn.c_proj", "mlp.c_proj"),  # stored as [inputs, outputs]
    "bert": ("attention.output.dense", "output.dense", "pooler.dense", "classifier"),
    "roberta": ("attention.output.dense", "output.dense", "classifier.dense", "classifier.out_proj"),
    "distilbert": ("out_lin", "lin2", "pre_classifier", "classifier"),
    "t5": ("SelfAttention.o", "EncDecAttention.o", "DenseReluDense.wo"),  # of the decoder
}


def wrap(model: nn.Module, **options: Any) -> zowrap.ZOModel:
    return zowrap.zo_wrap(model.eval(), "zo_sgd", estimator="residual", engine="compiled", **options)


def inputs(zm: zowrap.ZOModel, program: Program, given: dict[str, Any]) -> list[Any]:
    named = dict(zm.job.loss.named_parameters(remove_duplicate=False))
    named.update(zm.job.loss.named_buffers(remove_duplicate=False))
    values = []
    for each, fake in zip(program.inputs, program.fakes(), strict=True):
        if each.kind == "batch":
            values.append(given[each.target])
        elif each.kind == "added":
            values.append(draw_sketch(fake.shape[0], 0, 0, torch.device("cpu")))
        else:
            values.append(named[each.target] if each.target in named else program.constants[each.target])
    return values


def credit_of(zm: zowrap.ZOModel, given: dict[str, Any]) -> tuple[Program, list[Any], Credit]:
    zm.job.loss.settle(given)
    program = captured(zm, given, StripTraining(), CheckLookups(), FuseHead(), AssignCredit(zm.job))
    outputs = program(inputs(zm, program, given))
    return program, outputs, Credit(collect_pieces(program.credit, outputs[2:], with_inputs=True))


def gradient(zm: zowrap.ZOModel, credit: Credit, index: int) -> Tensor:
    """The whole credit of a parameter, before its uses take their shares."""
    pieces = [replace(piece, use=replace(piece.use, share=1.0)) for piece in credit.of(index)]
    return taken(pieces, torch.ones(()), zm.parameters[index].tensor.shape)


def differentiate(zm: zowrap.ZOModel, given: dict[str, Any], names: tuple[str, ...], all_of: bool) -> list[Tensor]:
    """Autograd's gradients of the loss's sum; without ``all_of``, the inputs of modules with these names are fixed."""
    hooks = []
    if not all_of:
        for name, module in zm.model.named_modules():
            if any(name.endswith(end) for end in names):
                hooks.append(module.register_forward_pre_hook(lambda _, args: tuple(a.detach() for a in args)))
    for parameter in zm.model.parameters():
        parameter.requires_grad_(True)
    try:
        sums, _ = zm.loss_module(given)
        tensors = [parameter.tensor for parameter in zm.parameters]
        return list(torch.autograd.grad(sums.sum(), tensors, allow_unused=True))
    finally:
        for hook in hooks:
            hook.remove()


def blocks_of(name: str) -> tuple[str, ...]:
    """Those of the writers that end a block: in front of them the stream is held fixed."""
    if name == "mixtral":
        return ("o_proj", "mlp")
    return tuple(end for end in WRITERS[name] if "pooler" not in end and "classifier" not in end)


@pytest.mark.parametrize("name", slow_except(("gpt2", "bert", "mixtral"), WRITERS))
def test_it_is_the_gradient_with_the_inputs_of_blocks_held_fixed(name: str) -> None:
    zm, given = wrap(make(name)), batch(name, 3, 9)
    _, outputs, credit = credit_of(zm, given)
    expected = differentiate(zm, given, blocks_of(name), all_of=False)
    sums, weights = zm.loss_module(given)
    assert torch.allclose(outputs[0], sums, rtol=1e-5) and torch.equal(outputs[1], weights)
    found = {zm.parameters[i].name for i in credit.parameters}
    assert all(any(f"{end}." in each for end in WRITERS[name]) for each in found), found
    modules = {each.rpartition(".")[0] for each in found}
    for end in WRITERS[name]:
        assert any(each.endswith(end) for each in modules), end
    for i in credit.parameters:
        difference = (gradient(zm, credit, i) - expected[i]).norm() / expected[i].norm()
        assert difference < 1e-5, (zm.parameters[i].name, float(difference))


@pytest.mark.parametrize("name", slow_except(("llama", "bert"), WRITERS))
def test_it_is_exact_for_what_writes_last_and_what_follows(name: str) -> None:
    zm, given = wrap(make(name)), batch(name, 3, 9)
    _, _, credit = credit_of(zm, given)
    true = differentiate(zm, given, (), all_of=True)
    last = max(i for i in credit.parameters if zm.parameters[i].tensor.ndim > 1)
    exact = [last, *(i for i in credit.parameters if "classifier" in zm.parameters[i].name)]
    for i in exact:
        assert (gradient(zm, credit, i) - true[i]).norm() < 1e-5 * true[i].norm(), zm.parameters[i].name
    cosines = [
        torch.nn.functional.cosine_similarity(gradient(zm, credit, i).flatten(), true[i].flatten(), dim=0)
        for i in credit.parameters
    ]
    assert min(cosines) > 0.2  # two layers at random weights; a direction drawn would have 0 ± 0.03


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (
            "llama",
            {"0.self_attn.o_proj": 1 / 4, "0.mlp.down_proj": 2 / 4, "1.self_attn.o_proj": 3 / 4, "1.mlp.down": 1},
        ),
        ("bert", {"0.attention.output": 1 / 4, "1.output.dense": 1, "pooler": 1, "classifier": 1}),
        # The encoder's stream gets none.
        ("t5", {"block.0.layer.0.SelfA": 1 / 6, "block.0.layer.1.Enc": 2 / 6, "block.1.layer.2": 1}),
        ("mixtral", {"0.self_attn.o_proj": 1 / 4, "0.mlp.experts": 2 / 4, "1.mlp.experts": 1}),
    ],
)
def test_lower_blocks_take_a_smaller_share(name: str, expected: dict[str, float]) -> None:
    zm = wrap(make(name))
    credit = credit_of(zm, batch(name, 3, 9))[2]
    for part, share in expected.items():
        found = [i for i in credit.parameters if part in zm.parameters[i].name]
        assert found
        for i in found:
            assert {piece.use.share for piece in credit.of(i)} == {share}, zm.parameters[i].name
            update = taken(credit.of(i), torch.ones(()), zm.parameters[i].tensor.shape)
            assert torch.allclose(update, share * gradient(zm, credit, i), rtol=1e-5, atol=1e-6)


def test_a_quantised_weight_has_the_share_of_its_product() -> None:
    zm = wrap(quantized("llama"), quantized="scales")
    credit = credit_of(zm, batch("llama", 3, 9))[2]
    shares = {zm.parameters[i].name: {piece.use.share for piece in credit.of(i)} for i in credit.parameters}
    down = [share for name, share in shares.items() if "down_proj" in name]
    attention = [share for name, share in shares.items() if "o_proj" in name]
    assert down == [{2 / 4}, {1.0}] and attention == [{1 / 4}, {3 / 4}]


def test_the_size_is_estimated_from_the_sketches() -> None:
    zm, given = wrap(make("opt")), batch("opt", 3, 9)
    program = credit_of(zm, given)[0]
    sizes, estimates = [], []
    for step in range(40):
        values = inputs(zm, program, given)
        place = next(i for i, each in enumerate(program.inputs) if each.target == "sketch")
        values[place] = draw_sketch(values[place].shape[0], 0, step, torch.device("cpu"))
        credit = Credit(collect_pieces(program.credit, program(values)[2:], with_inputs=True))
        estimates.append(float(credit.squared_norm()))
        whole = [taken(credit.of(i), torch.ones(()), zm.parameters[i].tensor.shape) for i in credit.parameters]
        sizes.append(float(sum(each.square().sum() for each in whole)))
    ratios = torch.tensor(estimates) / torch.tensor(sizes)
    assert abs(float(ratios.mean()) - 1) < 0.05 and float(ratios.std()) < 0.3 and float(ratios.std()) > 0


def test_its_parts_are_the_whole() -> None:
    zm, given = wrap(make("bert")), batch("bert", 3, 9)
    program, _, credit = credit_of(zm, given)
    first = take_part(after(program), "without inputs")
    second = take_part(after(program), "inputs")
    pieces = collect_pieces(program.credit, first(inputs(zm, first, given))[2:], with_inputs=False)
    made = second(inputs(zm, second, given))
    matrices = [piece for piece in pieces if piece.use.matrix]
    for piece, x in zip(matrices, made, strict=True):
        assert piece.x is None
        piece.x = x
    for mine, other in zip(pieces, credit.pieces, strict=True):
        for name in ("x", "d", "sketch", "vector"):
            value = getattr(other, name)
            assert value is None or torch.equal(getattr(mine, name), value), (mine.use, name)
    assert "sketch" not in [each.target for each in second.inputs]
    assert len(second.graph.nodes) < len(first.graph.nodes) <= len(program.graph.nodes)


def test_a_fused_head_gives_its_derivative() -> None:
    zm, given = wrap(make("llama")), batch("llama", 3, 9)
    program = credit_of(zm, given)[0]
    assert operators(program)["zowrap.head_credit"] == 1
    assert "zowrap.head" not in operators(program)


class Plain(nn.Module):
    """No block adds to anything."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(self.a(x)))


class Residual(nn.Module):
    """Two blocks and a head, ``[rows, 4]`` to ``[rows, 2]``; the second has a gate and a norm behind its product."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.first = nn.Linear(4, 6), nn.Linear(6, 4)
        self.gate, self.second, self.norm = nn.Linear(4, 1), nn.Linear(4, 4), nn.LayerNorm(4)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = x + self.first(torch.tanh(self.inner(x)))
        h = h + self.norm(self.second(torch.sin(h))) * self.gate(h).sigmoid()
        return self.head(h)


def mean_square(model: nn.Module, given: dict[str, Tensor]) -> Tensor:
    return model(given["x"]).square().mean(-1)


def right_answers(model: nn.Module, given: dict[str, Tensor]) -> Tensor:
    return (model(given["x"]).argmax(-1) == 0).float()


def test_maps_between_a_product_and_the_stream_are_passed_exactly() -> None:
    torch.manual_seed(0)
    zm, given = wrap(Residual(), loss_fn=mean_square), {"x": torch.randn(5, 4)}
    _, _, credit = credit_of(zm, given)
    assert [zm.parameters[i].name for i in credit.parameters] == [
        *("first.weight", "first.bias", "second.weight", "second.bias", "head.weight", "head.bias")
    ]
    expected = differentiate(zm, given, ("first", "second", "gate"), all_of=False)
    for i in credit.parameters:
        assert torch.allclose(gradient(zm, credit, i), expected[i], atol=1e-6), zm.parameters[i].name


@pytest.mark.parametrize(
    ("model", "loss", "options", "words"),
    [
        (Plain, mean_square, {}, "this model has none"),
        (Residual, right_answers, {}, "this loss has none"),
        (
            Residual,
            mean_square,
            {"trainable": ["inner", "gate"]},
            "none of the weights that move writes",
        ),
    ],
)
def test_what_cannot_get_credit_is_refused(model: Any, loss: Any, options: dict[str, Any], words: str) -> None:
    zm = wrap(model(), loss_fn=loss, **options)
    with pytest.raises(ZOError, match=words) as refused:
        zm.step(x=torch.randn(5, 4 if model is Residual else 3))
    assert "population" in str(refused.value)


def test_a_matrix_that_is_used_twice_gets_the_credit_of_both() -> None:
    class Shared(Residual):
        def forward(self, x: Tensor) -> Tensor:
            for _ in range(2):
                x = x + self.first(torch.tanh(self.inner(x)))
            return self.head(x)

    torch.manual_seed(0)
    zm, given = wrap(Shared(), loss_fn=mean_square, trainable=["first"]), {"x": torch.randn(5, 4)}
    _, _, credit = credit_of(zm, given)
    assert [len(credit.of(i)) for i in credit.parameters] == [2, 2]
    expected = differentiate(zm, given, ("first",), all_of=False)
    for i in credit.parameters:
        assert torch.allclose(gradient(zm, credit, i), expected[i], atol=1e-6)


def test_tokens_without_a_label_are_left_out() -> None:
    zm, given = wrap(make("gpt2")), batch("gpt2", 3, 9)
    given["labels"] = given["labels"].clone()
    given["labels"][:, 3:] = -100
    _, _, credit = credit_of(zm, given)
    i = next(i for i in credit.parameters if zm.parameters[i].tensor.ndim > 1)
    left, right = factors(credit.of(i), torch.ones(()))
    tokens = given["labels"].numel()
    assert right is not None and left.shape[1] == right.shape[1] < tokens
    expected = differentiate(zm, given, blocks_of("gpt2"), all_of=False)
    assert (gradient(zm, credit, i) - expected[i]).norm() < 1e-5 * expected[i].norm()


class Head(Residual):
    """With a biased head for each token: what follows the stream has three dimensions."""

    def forward(self, x: Tensor) -> Tensor:
        h = x + self.first(torch.tanh(self.inner(x)))
        return self.head(torch.tanh(h + self.second(torch.sin(h))))


@pytest.mark.parametrize("rows", [2, 5])
def test_a_head_of_every_token_serves_all_sizes(rows: int) -> None:
    torch.manual_seed(0)
    zm = zowrap.zo_wrap(Head(), "zo_sgd", estimator="residual", engine="eager", loss_fn=mean_square_of_tokens)
    for length in (3, 6):
        given = {"x": torch.randn(rows, length, 4)}
        zm.accumulate(**given)
        found = zm.accumulator.credit
        expected = differentiate(zm, given, ("first", "second"), all_of=False)
        for i in found.parameters:
            assert torch.allclose(gradient(zm, found, i), expected[i], atol=1e-5), zm.parameters[i].name
        zm.discard()
    assert sum(map(len, zm.engine._captured_programs().by_kind.values())) == 1


def mean_square_of_tokens(model: nn.Module, given: dict[str, Tensor]) -> Tensor:
    return model(given["x"]).square().mean((-2, -1))


@pytest.mark.parametrize("turned", ["x @ W.T", "x @ W.t()", "x.matmul(W.transpose(0, 1))", "x @ W.t().t()"])
def test_a_matrix_may_be_used_transposed(turned: str) -> None:
    class Turned(Residual):
        def forward(self, x: Tensor) -> Tensor:
            return self.head(x + eval(turned, {"x": torch.tanh(x), "W": self.second.weight}))

    torch.manual_seed(0)
    zm, given = wrap(Turned(), loss_fn=mean_square), {"x": torch.randn(5, 4)}
    _, _, found = credit_of(zm, given)
    assert "second.weight" in {zm.parameters[i].name for i in found.parameters}
    true = differentiate(zm, given, (), all_of=True)
    for i in found.parameters:
        assert torch.allclose(gradient(zm, found, i), true[i], atol=1e-6), zm.parameters[i].name


def test_a_product_of_weights_is_no_writer() -> None:
    class Normed(Residual):
        """As DoRA's: the norm of a sum of weights scales a product."""

        def forward(self, x: Tensor) -> Tensor:
            norm = (self.second.weight + self.first.weight @ self.inner.weight).norm(dim=1).detach()
            return self.head(x + self.first(self.inner(torch.tanh(x))) / norm)

    torch.manual_seed(0)
    zm, given = wrap(Normed(), loss_fn=mean_square), {"x": torch.randn(5, 4)}
    _, _, found = credit_of(zm, given)
    assert {zm.parameters[i].name.partition(".")[0] for i in found.parameters} == {"first", "head"}
    true = differentiate(zm, given, (), all_of=True)
    for i in found.parameters:
        assert torch.allclose(gradient(zm, found, i), true[i], atol=1e-6), zm.parameters[i].name


def test_an_embedding_that_is_the_head_stays() -> None:
    zm, given = wrap(make("gemma")), batch("gemma", 3, 9)
    zm.model.config.final_logit_softcapping = 30.0
    _, _, found = credit_of(zm, given)
    assert not any("embed" in zm.parameters[i].name for i in found.parameters)
