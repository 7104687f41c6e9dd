"""Every family is captured; the passes keep its losses; sizes stay free."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import zowrap
from tests.support.families import FAMILIES, LLAMA, batch, make
from tests.support.programs import close, evaluate, moved_losses, noise_directions
from tests.support.slow import slow_except
from tests.support.uncompiled import compile_nothing
from zowrap.compiler.capture import canonical_batch, capture
from zowrap.loss.evaluation_mode import evaluation_mode
from zowrap.loss.module import LossModule


@torch.no_grad()
def loss_at_the_weights(zm, inputs) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums and weights of the rows, by the model's own modules."""
    with evaluation_mode(zm.loss_module):
        return zm.loss_module(inputs)


@pytest.mark.parametrize("name", slow_except(["llama", "gpt2", "bert"], FAMILIES))
def test_captured_and_split_losses_equal_the_oracle(name, monkeypatch) -> None:
    """Uncompiled: the program after all passes, node by node, against perturbed copies of the model."""
    compile_nothing(monkeypatch)
    zm = zowrap.zo_wrap(make(name), "zo_sgd", engine="compiled")
    first = batch(name, 8, 16)
    zm.loss_module.settle(first)
    captured = capture(zm.loss_module, canonical_batch(first, zm.model))
    split = zm.engine.program(first, 0, 2)
    coefficients = torch.tensor([1e-2, -1e-2])
    for rows, length in [(8, 16), (3, 7), (1, 6)]:
        inputs = batch(name, rows, length, seed=rows)
        *sums, weights = evaluate(split, zm, inputs, coefficients=coefficients)
        expected = moved_losses(zm, inputs, noise_directions(zm), coefficients)
        assert torch.allclose(torch.stack(sums), torch.stack(expected), rtol=1e-5, atol=1e-5)
        plain, plain_weights = evaluate(captured, zm, inputs)
        own, own_weights = loss_at_the_weights(zm, inputs)
        assert torch.allclose(plain, own, rtol=1e-5, atol=1e-5)
        assert torch.equal(weights, own_weights) and torch.equal(plain_weights, own_weights)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_loss_is_the_models_own(name) -> None:
    model = make(name).eval()
    zm = zowrap.zo_wrap(model, engine="eager")
    inputs = batch(name, 4, 9)
    own = model(**inputs).loss.detach()
    assert torch.allclose(zm.loss(**inputs), own, rtol=1e-5)


def test_a_model_with_its_own_idea_of_a_loss_keeps_it() -> None:
    class Doubled(type(make("llama"))):
        def forward(self, *args, **kwargs):
            output = super().forward(*args, **kwargs)
            if output.loss is not None:
                output.loss = output.loss * 2
            return output

    model = make("llama")
    model.__class__ = Doubled
    inputs = batch("llama", 4, 9)
    zm = zowrap.zo_wrap(model, engine="eager")
    assert torch.allclose(zm.loss(**inputs), model.eval()(**inputs).loss.detach(), rtol=1e-5)


def test_a_first_batch_that_is_wrong_leaves_the_choice_of_the_loss_open() -> None:
    """What it would have shown is looked for again on the next one."""
    from transformers import AutoModelForCausalLM, MixtralConfig

    torch.manual_seed(0)
    options = {"num_local_experts": 4, "num_experts_per_tok": 2, "output_router_logits": True}
    zm = zowrap.zo_wrap(AutoModelForCausalLM.from_config(MixtralConfig(**LLAMA, **options)), engine="eager")
    inputs = batch("mixtral", 4, 9)
    with pytest.raises(IndexError):
        zm.step(**{**inputs, "input_ids": inputs["input_ids"] + 10_000})
    zm.step(**inputs)
    assert zm.state_dict()["loss"] == "own"


def test_a_small_difference_keeps_the_models_own_loss() -> None:
    """An untrained mixture's router loss changes the total by less than a thousandth."""
    from transformers import AutoModelForCausalLM, MixtralConfig

    torch.manual_seed(0)
    options = {"num_local_experts": 4, "num_experts_per_tok": 2, "output_router_logits": True}
    model = AutoModelForCausalLM.from_config(MixtralConfig(**LLAMA, **options)).eval()
    inputs = batch("mixtral", 4, 9)
    zm = zowrap.zo_wrap(model, engine="eager")
    assert torch.allclose(zm.loss(**inputs), model(**inputs).loss.detach(), rtol=1e-6)
    assert zm.state_dict()["loss"] == "own"


def test_sixteen_bit_logits_give_a_float32_loss() -> None:
    zm = zowrap.zo_wrap(make("llama", torch.bfloat16), engine="eager")
    loss = zm.loss(**batch("llama", 4, 9))
    assert loss.dtype == torch.float32
    assert loss != loss.bfloat16().float()  # finer than a bfloat16 step


class Counting(nn.Module):
    """A forward that writes to a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 2)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return self.layer(x)


def test_writes_to_buffers_are_dropped_and_said() -> None:
    zm = zowrap.zo_wrap(Counting(), loss_fn=lambda m, b: m(b["x"]).square().mean(-1), engine="compiled")
    with pytest.warns(UserWarning, match="updates its buffers"):
        zm.step(x=torch.randn(4, 4))
    assert zm.model.calls == 0


def test_equal_sizes_by_accident_are_not_taken_for_one_size() -> None:
    """Rows = length = feature count in the first batch; later batches differ."""

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Embedding(9, 4), nn.Embedding(9, 4)

        def forward(self, x, y):
            return self.a(x).mean(1) * self.b(y).mean(1)

    def loss(m, b):
        return m(b["x"], b["y"]).square().mean(-1)

    compiled = zowrap.zo_wrap(Two(), loss_fn=loss, engine="compiled")
    compiled.step(x=torch.ones(4, 4, dtype=torch.long), y=torch.ones(4, 4, dtype=torch.long))
    inputs = {"x": torch.randint(0, 9, (3, 5)), "y": torch.randint(0, 9, (3, 2))}
    assert torch.allclose(compiled.loss(**inputs), loss(compiled.model, inputs).mean().detach(), rtol=1e-5)
    assert compiled.inspect().compile_count == 2


def test_inputs_of_any_name_may_have_to_match_in_size() -> None:
    """The labels are as long as the tokens, which only the model knows."""

    def loss(model: nn.Module, inputs: dict) -> torch.Tensor:
        logits = model(inputs["tokens"]).log_softmax(-1)
        return -logits.gather(-1, inputs["targets"].unsqueeze(-1)).mean((1, 2))

    model = nn.Sequential(nn.Embedding(20, 8), nn.Linear(8, 20))
    zm = zowrap.zo_wrap(model, "zo_sgd", loss_fn=loss, engine="compiled")
    for rows, length in [(4, 9), (2, 5), (7, 30)]:
        ids = torch.randint(0, 20, (rows, length))
        given = {"tokens": ids, "targets": ids.roll(1, 1)}
        assert torch.allclose(zm.loss(**given), loss(model, given).mean(), rtol=1e-5)
    assert len(zm.engine.executables) == 1


def test_a_loss_module_needs_a_loss() -> None:
    model = make("llama")
    with pytest.raises(zowrap.ZOError, match="no loss"):
        LossModule(model)({"input_ids": torch.ones(2, 3, dtype=torch.long)})


@pytest.mark.parametrize("window", [8, 47, 48, 49])
def test_a_window_as_short_as_the_canonical_length(window) -> None:
    """The captured sizes stay free whatever the model's window."""
    import transformers

    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=160, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=window,
    )  # fmt: skip
    zm = zowrap.zo_wrap(transformers.BertForSequenceClassification(config), "zo_sgd", engine="compiled")
    first = batch("bert", 4, 6)
    zm.loss_module.settle(first)
    captured = capture(zm.loss_module, canonical_batch(first, zm.model))
    for rows, length in [(4, window), (3, 5), (1, 2)]:
        inputs = batch("bert", rows, length)
        inputs["labels"] = inputs["labels"] % 2
        assert close(evaluate(captured, zm, inputs), loss_at_the_weights(zm, inputs))
        assert captured.accepts(inputs)
    assert all(
        isinstance(size, torch.SymInt)
        for node, given in zip(captured.graph.find_nodes(op="placeholder"), captured.inputs, strict=True)
        if given.kind == "batch"
        for size in node.meta["val"].shape
    )


def test_a_short_window_is_seen_where_it_stands() -> None:
    """In a configuration inside of the model's."""
    import transformers

    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**sizes, "vocab_size": 160, "max_position_embeddings": 20}
    config = transformers.CLIPConfig(text_config=text, vision_config={**sizes, "image_size": 16, "patch_size": 8})
    model = transformers.CLIPModel(config)
    given = {"input_ids": torch.ones(3, 12, dtype=torch.long), "pixel_values": torch.ones(3, 3, 16, 16)}
    canonical = canonical_batch(given, model)
    assert canonical["input_ids"].shape[1] < 20 and canonical["pixel_values"].shape[2:] == (16, 16)
    assert canonical_batch(given, model, lengths=False)["input_ids"].shape == (8, 12)


def test_pairs_of_texts_and_pictures_are_one_program_for_every_size(monkeypatch) -> None:
    """Their loss counts the rows with ``len``, of which Python makes a number."""
    import transformers

    compile_nothing(monkeypatch)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**sizes, "vocab_size": 60, "max_position_embeddings": 64, "eos_token_id": 2, "bos_token_id": 1}
    config = transformers.CLIPConfig(text_config=text, vision_config={**sizes, "image_size": 16, "patch_size": 8})
    torch.manual_seed(0)
    model = transformers.CLIPModel(config)
    zm = zowrap.zo_wrap(model, "zo_sgd", engine="compiled")
    for rows, length in [(3, 11), (2, 17), (4, 5)]:
        ids = torch.randint(5, 60, (rows, length))
        ids[:, -1] = 2
        given = {"input_ids": ids, "pixel_values": torch.randn(rows, 3, 16, 16), "return_loss": True}
        assert torch.allclose(zm.loss(**given), model.eval()(**given).loss.detach(), rtol=1e-5)
    assert [len(programs) for programs in zm.engine.captures.by_kind.values()] == [1]
    assert "len" not in vars(transformers.models.clip.modeling_clip)
