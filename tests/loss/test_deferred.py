"""A loss that depends on values stays out of the program: its forward passes are captured, for every size."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as T
from torch import Tensor, nn

import zowrap
from tests.support.uncompiled import compile_nothing
from zowrap.errors import ZOCaptureError
from zowrap.loss.deferred import DeferredLoss
from zowrap.loss.module import LossModule
from zowrap.loss.nested import flatten_batch


def speech(kind: str = "Wav2Vec2", **options: Any) -> Any:
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 12, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16,
        "conv_dim": (8,), "conv_stride": (4,), "conv_kernel": (8,), "num_feat_extract_layers": 1,
        "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "ctc_zero_infinity": True,
        "mask_time_prob": 0.0, "pad_token_id": 0,
    }  # fmt: skip
    return getattr(T, f"{kind}ForCTC")(getattr(T, f"{kind}Config")(**{**sizes, **options}))


def sounds(rows: int, length: int, words: int = 5) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(rows * length)
    labels = torch.randint(1, 12, (rows, words), generator=draw)
    labels[0, 2:] = -100
    return {"input_values": torch.randn(rows, length, generator=draw), "labels": labels}


def detector() -> Any:
    torch.manual_seed(0)
    return T.YolosForObjectDetection(
        T.YolosConfig(
            hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=[16, 16],
            patch_size=8, num_detection_tokens=4, num_labels=3,
        )
    )  # fmt: skip


def pictures(rows: int, most: int, size: int = 16) -> dict[str, Any]:
    draw = torch.Generator().manual_seed(rows)
    labels = [
        {
            "class_labels": torch.randint(0, 3, (i % (most + 1),), generator=draw),
            "boxes": torch.rand(i % (most + 1), 4, generator=draw) * 0.4 + 0.2,
            "image_id": torch.tensor([i]),
        }
        for i in range(1, rows + 1)
    ]
    return {"pixel_values": torch.randn(rows, 3, size, size, generator=draw), "labels": labels}


def agree(make: Any, batches: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> zowrap.ZOModel:
    """Both engines give the same losses; the compiled one, whose programs run uncompiled here, is returned."""
    compile_nothing(monkeypatch)
    eager, zm = (zowrap.zo_wrap(make(), "zo_sgd", eps=1e-2, engine=engine) for engine in ("eager", "compiled"))
    for batch in batches:
        for each in (eager, zm):
            each.discard()
            each.accumulate(**batch)
        assert torch.allclose(zm.peek()[0], eager.peek()[0], rtol=1e-5)
        assert torch.allclose(zm.loss(**batch), eager.model.eval()(**batch).loss.detach(), rtol=1e-5)
    return zm


@pytest.mark.parametrize("kind", ["Wav2Vec2", "Hubert"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_speech_with_a_ctc_loss(kind: str, reduction: str, monkeypatch: pytest.MonkeyPatch) -> None:
    batches = [sounds(3, 200), sounds(2, 240), sounds(1, 200, words=3)]
    zm = agree(lambda: speech(kind, ctc_loss_reduction=reduction), batches, monkeypatch)
    (program,) = [program for programs in zm.engine.captures.by_kind.values() for program in programs]
    assert program.graph.find_nodes(op="call_function", target=torch.ops.zowrap.deferred_loss.default)


def test_detection_with_lists_of_dictionaries(monkeypatch: pytest.MonkeyPatch) -> None:
    """One program, whatever the number of pictures and of the boxes in each; none in some of them."""
    zm = agree(detector, [pictures(3, 2), pictures(2, 1), pictures(4, 3)], monkeypatch)
    assert sum(map(len, zm.engine.captures.by_kind.values())) == 1


def test_a_label_beyond_the_vocabulary_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    compile_nothing(monkeypatch)
    zm = zowrap.zo_wrap(speech(), "zo_sgd", engine="compiled")
    zm.step(**sounds(2, 200))
    wrong = sounds(2, 200)
    wrong["labels"][1, 0] = 12
    with pytest.raises(ValueError, match="12"):
        zm.step(**wrong)


def test_the_models_loss_function_is_put_back() -> None:
    model = speech().eval()
    loss = LossModule(model)
    batch = sounds(2, 200)
    loss.settle(batch)
    before = model.loss_function
    with loss.deferring(batch):
        pass
    assert model.loss_function is before and "_loss_function" not in vars(model)


def test_a_model_without_such_a_function_is_told_so() -> None:
    class Plain(nn.Module):
        def forward(self, labels: Tensor) -> dict[str, Tensor]:
            return {"loss": labels.float().mean()}

    with pytest.raises(ZOCaptureError, match="depends on values"):
        DeferredLoss(Plain(), lambda batch: Plain()(**batch), flatten_batch({"labels": torch.ones(2)}))
