"""Every kind of label that transformers' heads take gives the model's own loss; others are refused in a sentence."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as T
from torch import Tensor, nn

import zowrap
from zowrap.errors import ZOError
from zowrap.loss.module import LossModule

SMALL = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}


def ids(rows: int, length: int = 6, low: int = 5) -> Tensor:
    return torch.randint(low, 40, (rows, length), generator=torch.Generator().manual_seed(1))


def bert(classes: int, problem: str | None = None, **options: Any) -> Any:
    torch.manual_seed(0)
    config = T.BertConfig(**SMALL, num_labels=classes, problem_type=problem, **options)
    return T.BertForSequenceClassification(config).eval()


def own(model: Any, **batch: Any) -> float:
    with torch.no_grad():
        output = model(**batch)
    return float(output["loss"] if isinstance(output, dict) else output[0])


def ours(model: nn.Module, **batch: Any) -> float:
    return float(zowrap.zo_wrap(model, engine="eager").loss(**batch))


HOT = [[1, 0, 1], [0, 1, 1], [1, 1, 0]]


@pytest.mark.parametrize(
    ("classes", "problem", "labels", "as_theirs"),
    [
        (3, None, torch.tensor([0, 2, 1]), None),
        (3, None, torch.tensor([[0], [2], [1]]), None),
        (3, None, torch.tensor([0, 2, 1], dtype=torch.int8), torch.int64),
        (3, None, torch.tensor([0, 2, 1], dtype=torch.uint8), torch.int64),
        (2, None, torch.tensor([True, False, True]), torch.int64),
        (3, "multi_label_classification", torch.tensor(HOT), torch.float32),
        (3, None, torch.tensor(HOT).bool(), torch.float32),
        (3, None, torch.tensor(HOT).float(), None),
        (1, None, torch.tensor([0.5, 2.0, -1.0]), None),
        (1, None, torch.tensor([[0.5], [2.0], [-1.0]]), None),
        (1, None, torch.tensor([5, 2, 1]), torch.float32),
        (3, "regression", torch.tensor(HOT), torch.float32),
        (3, "regression", torch.tensor(HOT) / 3, None),
    ],
)
def test_labels_of_a_classifier(classes: int, problem: str | None, labels: Tensor, as_theirs: Any) -> None:
    batch = {"input_ids": ids(3), "labels": labels}
    want = own(bert(classes, problem), **{**batch, "labels": labels if as_theirs is None else labels.to(as_theirs)})
    zm = zowrap.zo_wrap(bert(classes, problem), "zo_sgd", engine="eager")
    assert float(zm.loss(**batch)) == pytest.approx(want, rel=1e-5)
    assert zm.job.loss.form == "classes"


@pytest.mark.parametrize(
    ("classes", "problem", "labels", "said"),
    [
        (2, None, torch.tensor([0.0, 1.0]), r"labels are float32 \[2\], but this model has 2 classes"),
        (3, None, torch.tensor([[0, 1], [1, 0]]), r"int64 \[2, 2\], .* one of 3 classes"),
        (3, "multi_label_classification", torch.tensor([0, 2]), r"must be \[rows, 3\]"),
    ],
)
def test_labels_that_are_refused(classes: int, problem: str | None, labels: Tensor, said: str) -> None:
    with pytest.raises(ZOError, match=said):
        ours(bert(classes, problem), input_ids=ids(2), labels=labels)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16])
def test_token_labels_of_other_integers(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = T.LlamaForCausalLM(T.LlamaConfig(**SMALL, num_key_value_heads=2)).eval()
    labels = ids(3).masked_fill(ids(3) < 12, -100)
    want = own(model, input_ids=ids(3), labels=labels)
    assert ours(model, input_ids=ids(3), labels=labels.to(dtype)) == pytest.approx(want, rel=1e-5)


@pytest.mark.parametrize("head", ["BertForSequenceClassification", "BertForTokenClassification"])
def test_models_that_return_tuples(head: str) -> None:
    torch.manual_seed(0)
    kind = getattr(T, head)
    config = T.BertConfig(**SMALL, num_labels=3, return_dict=False)
    labels = torch.tensor([0, 2, 1]) if "Sequence" in head else ids(3, low=0) % 3
    model, batch = kind(config).eval(), {"input_ids": ids(3), "labels": labels}
    assert ours(model, **batch) == pytest.approx(own(model, **batch), rel=1e-5)


class Returning(nn.Module):
    """Returns its loss in one of the forms that the Trainer reads."""

    def __init__(self, form: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.form = nn.Linear(4, 3), form

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Any:
        logits = self.layer(x)
        return (logits,) if labels is None else self.form(nn.functional.cross_entropy(logits, labels), logits)


@pytest.mark.parametrize(
    "form",
    [lambda loss, logits: (loss, logits), lambda loss, logits: [loss], lambda loss, logits: {"loss": loss}],
    ids=["tuple", "list", "dictionary"],
)
@pytest.mark.parametrize("engine", ["eager", "compiled"])
def test_modules_that_return_their_loss(form: Any, engine: str) -> None:
    model, batch = Returning(form), {"x": torch.randn(5, 4), "labels": torch.tensor([0, 1, 2, 0, 1])}
    want = nn.functional.cross_entropy(model.layer(batch["x"]), batch["labels"]).item()
    assert float(zowrap.zo_wrap(model, engine=engine).loss(**batch)) == pytest.approx(want, rel=1e-5)


def test_a_tuple_without_a_loss_is_not_trained_on() -> None:
    with pytest.raises(ZOError, match="returned no loss"):
        ours(Returning(None), x=torch.randn(5, 4))


def encoder_decoder(name: str) -> Any:
    common = {"vocab_size": 40, "d_model": 16, "num_labels": 3, "eos_token_id": 2, "pad_token_id": 1}
    layers = {f"{side}_{what}": n for side in ("encoder", "decoder") for what, n in _LAYER.items()}
    torch.manual_seed(0)
    if name == "T5":
        config = T.T5Config(
            **{**common, "pad_token_id": 0}, d_kv=8, d_ff=32, num_layers=1, num_heads=2, decoder_start_token_id=0
        )
    else:
        config = getattr(T, f"{name}Config")(**common, **layers, max_position_embeddings=64)
    return getattr(T, f"{name}ForSequenceClassification")(config).eval()


_LAYER = {"layers": 1, "attention_heads": 2, "ffn_dim": 32}


@pytest.mark.parametrize("name", ["Bart", "MBart", "T5"])
@pytest.mark.parametrize("labels", [torch.tensor([0, 2, 1]), torch.tensor(HOT)], ids=["classes", "several"])
def test_encoder_decoders_with_a_head_of_classes(name: str, labels: Tensor) -> None:
    """The labels are no text, and the model makes its decoder's inputs of the text."""
    x = ids(3)
    x[:, -1] = 2
    want = own(encoder_decoder(name), input_ids=x, labels=labels.float() if labels.ndim > 1 else labels)
    zm = zowrap.zo_wrap(encoder_decoder(name), "zo_sgd", eps=1e-5, engine="eager")
    assert float(zm.loss(input_ids=x, labels=labels)) == pytest.approx(want, rel=1e-5)
    assert float(zm.step(input_ids=x, labels=labels).loss) == pytest.approx(want, rel=1e-3)


@pytest.mark.parametrize("learned", ["some", "all"])
def test_virtual_tokens_before_the_text(learned: str) -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    base = T.LlamaForCausalLM(T.LlamaConfig(**SMALL, num_key_value_heads=2))
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    model: Any = peft.get_peft_model(base, config).eval()
    labels = ids(3) if learned == "all" else ids(3).masked_fill(ids(3) < 20, -100)
    mask = torch.ones_like(labels)
    mask[1, -2:] = 0
    batch = {"input_ids": ids(3), "attention_mask": mask, "labels": labels}
    loss = LossModule(model)
    loss.settle(batch)
    sums, weights = loss(batch)
    assert loss.form == "causal"
    assert weights.tolist() == (labels != -100).sum(-1).tolist()  # the last virtual token predicts the first label
    assert (sums.sum() / weights.sum()).item() == pytest.approx(own(model, **batch), rel=1e-5)


def test_micro_batches_of_speech_and_pictures_weigh_what_their_losses_average() -> None:
    """A CTC loss is a mean over rows, a map of classes has labels of its own that do not count."""
    torch.manual_seed(0)
    speech = T.Wav2Vec2ForCTC(
        T.Wav2Vec2Config(
            vocab_size=12,
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=16,
            conv_dim=(8,),
            conv_stride=(4,),
            conv_kernel=(8,),
            num_feat_extract_layers=1,
            num_conv_pos_embeddings=4,
            num_conv_pos_embedding_groups=2,
            ctc_loss_reduction="mean",
            mask_time_prob=0.0,
        )
    ).eval()
    labels = torch.tensor([[1, 2, 3, 4], [5, -100, -100, -100], [6, 7, -100, -100]])
    _check_union(speech, {"input_values": torch.randn(3, 200), "labels": labels})
    maps = T.SegformerForSemanticSegmentation(
        T.SegformerConfig(
            num_encoder_blocks=1,
            depths=[1],
            sr_ratios=[1],
            hidden_sizes=[8],
            patch_sizes=[3],
            strides=[2],
            num_attention_heads=[1],
            mlp_ratios=[1],
            decoder_hidden_size=8,
            num_labels=3,
            image_size=16,
        )
    ).eval()
    labels = torch.randint(0, 3, (3, 16, 16), generator=torch.Generator().manual_seed(0))
    labels[0, :12] = 255
    _check_union(maps, {"pixel_values": torch.randn(3, 3, 16, 16), "labels": labels})


def _check_union(model: nn.Module, batch: dict[str, Tensor]) -> None:
    """The losses of single rows add up to that of all."""
    loss = LossModule(model)
    loss.settle(batch)
    with torch.no_grad():
        parts = [loss({name: v[i : i + 1] for name, v in batch.items()}) for i in range(3)]
    total = sum(float(sums.sum()) for sums, _ in parts) / sum(float(weights.sum()) for _, weights in parts)
    assert total == pytest.approx(own(model, **batch), rel=1e-5)
