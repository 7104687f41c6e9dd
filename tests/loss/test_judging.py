"""A model's own loss is kept wherever ours from the logits is not the same function, whatever the first rows are."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertForTokenClassification,
    LlamaConfig,
    LlamaForCausalLM,
)

from zowrap.loss.judging import make_probes
from zowrap.loss.module import LossModule

SMALL = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}


class Classes(BertForSequenceClassification):
    """A classifier whose loss is computed by ``own``."""

    own: Any = None

    def forward(self, labels=None, **inputs):  # type: ignore[override]
        outputs = super().forward(**inputs)
        if labels is not None:
            outputs.loss = type(self).own(outputs.logits, labels)
        return outputs


def classifier(own: Any, classes: int = 2, head: float = 30.0) -> Classes:
    torch.manual_seed(0)
    kind = type("Kind", (Classes,), {"own": staticmethod(own)})
    model = kind(BertConfig(**SMALL, num_labels=classes)).eval()
    with torch.no_grad():
        model.classifier.weight.mul_(head)
    return model


def weighted(*weights: float) -> Any:
    return lambda logits, labels: F.cross_entropy(logits, labels, weight=torch.tensor(weights))


def ids(rows: int, length: int = 6) -> Tensor:
    return torch.randint(5, 40, (rows, length), generator=torch.Generator().manual_seed(1))


def form_after(model: torch.nn.Module, labels: Tensor) -> str:
    """Which loss stands after a first batch with these labels."""
    loss = LossModule(model)
    loss.settle({"input_ids": ids(len(labels)), "labels": labels})
    return loss.form


@pytest.mark.parametrize("first", [[0], [1], [0, 0, 0], [1, 1], [0, 1], [0, 0, 1, 1]])
def test_class_weights_show_whatever_the_first_labels_are(first: list[int]) -> None:
    assert form_after(classifier(weighted(1.0, 10.0)), torch.tensor(first)) == "own"


@pytest.mark.parametrize("odd_one", [1, 9, 19])
def test_a_single_weighted_class_of_many_shows_though_no_row_has_it(odd_one: int) -> None:
    weights = [3.0 if i == odd_one else 1.0 for i in range(20)]
    assert form_after(classifier(weighted(*weights), classes=20), torch.tensor([0, 2])) == "own"


@pytest.mark.parametrize(
    "own",
    [
        lambda logits, labels: F.cross_entropy(logits, labels, label_smoothing=0.1),
        lambda logits, labels: ((1 - logits.softmax(-1).gather(1, labels[:, None])[:, 0]) ** 2).mean(),
        lambda logits, labels: F.cross_entropy(logits, labels) + 1e-3 * logits.square().mean(),
    ],
    ids=["smoothed", "brier", "penalty"],
)
def test_other_losses_of_a_classifier_are_kept(own: Any) -> None:
    assert form_after(classifier(own), torch.tensor([1, 1])) == "own"


def test_the_plain_loss_of_a_subclass_is_taken_as_plain() -> None:
    assert form_after(classifier(F.cross_entropy, classes=20), torch.tensor([3])) == "classes"


def test_where_no_label_can_tell_the_models_own_loss_stays() -> None:
    # A head of zeros gives every class the same loss, and any weighted mean of them is the plain one.
    assert form_after(classifier(weighted(1.0, 10.0), head=0.0), torch.tensor([0, 1])) == "own"


def test_transformers_own_classes_need_no_probe_unless_something_is_put_in_their_place() -> None:
    torch.manual_seed(0)
    model = BertForSequenceClassification(BertConfig(**SMALL, num_labels=2)).eval()
    with torch.no_grad():
        model.classifier.weight.zero_()
    assert form_after(model, torch.tensor([0, 0])) == "classes"
    model.loss_function = lambda *args, **kwargs: torch.zeros(())
    assert form_after(model, torch.tensor([0, 0])) == "own"


def test_a_weighted_token_of_a_language_model_shows() -> None:
    class Weighted(LlamaForCausalLM):
        def forward(self, labels=None, **inputs):  # type: ignore[override]
            outputs = super().forward(**inputs)
            if labels is not None:
                weight = torch.ones(40)
                weight[self.config.eos_token_id] = self.extra
                logits = outputs.logits[:, :-1].flatten(0, 1)
                given = None if self.extra == 1 else weight
                outputs.loss = F.cross_entropy(logits, labels[:, 1:].flatten(), weight=given)
            return outputs

    torch.manual_seed(0)
    model = Weighted(LlamaConfig(**SMALL, num_key_value_heads=2, eos_token_id=2)).eval()
    with torch.no_grad():
        model.lm_head.weight.mul_(20)
    for extra, form in ((1.0, "causal"), (5.0, "own")):
        model.extra = extra
        loss = LossModule(model)
        loss.settle({"input_ids": ids(3), "labels": ids(3)})  # no row ends in the token with the weight
        assert loss.form == form


def test_a_weighted_class_of_tokens_shows() -> None:
    class Weighted(BertForTokenClassification):
        def forward(self, labels=None, **inputs):  # type: ignore[override]
            outputs = super().forward(**inputs)
            if labels is not None:
                weight = torch.tensor([1.0, 1.0, 4.0])
                outputs.loss = F.cross_entropy(outputs.logits.flatten(0, 1), labels.flatten(), weight=weight)
            return outputs

    torch.manual_seed(0)
    model = Weighted(BertConfig(**SMALL, num_labels=3)).eval()
    assert form_after(model, torch.zeros(2, 6, dtype=torch.int64)) == "own"


def test_probes_show_every_class_beside_the_first() -> None:
    class Config:
        num_labels = 20

    batch = {"input_ids": ids(3), "labels": torch.tensor([0, 0, 0])}
    found = [probe["labels"].tolist() for probe in make_probes(batch, Config(), labels_are_tokens=False)]
    assert all(labels[0] == 0 for labels in found)
    assert {label for labels in found for label in labels} == set(range(20))
    odd = {**batch, "pixels": torch.zeros(7, 2)}  # of no row in particular: what belongs to a row is not known
    assert not list(make_probes(odd, Config(), labels_are_tokens=False))


def test_a_batch_without_a_label_to_learn_from_settles_nothing() -> None:
    model = classifier(weighted(1.0, 10.0))
    loss = LossModule(model)
    loss.settle({"input_ids": ids(2), "labels": torch.tensor([-100, -100])})
    assert loss.form == "unsettled"
    loss.settle({"input_ids": ids(2), "labels": torch.tensor([0, 0])})
    assert loss.form == "own"


def test_what_else_a_model_reads_may_be_in_its_loss() -> None:
    class PerRow(BertForSequenceClassification):
        def forward(self, labels=None, row_weight=None, **inputs):  # type: ignore[override]
            outputs = super().forward(**inputs)
            if labels is not None:
                outputs.loss = (F.cross_entropy(outputs.logits, labels, reduction="none") * row_weight).mean()
            return outputs

    torch.manual_seed(0)
    model = PerRow(BertConfig(**SMALL, num_labels=2)).eval()
    with torch.no_grad():
        model.classifier.weight.mul_(30)
    loss = LossModule(model)
    loss.settle({"input_ids": ids(3), "labels": torch.tensor([0, 1, 0]), "row_weight": torch.ones(3)})
    assert loss.form == "own"


def test_a_term_too_small_to_be_a_number_apart_is_kept_all_the_same() -> None:
    """What is added is seen as an addition, and not by how much it changes the loss of one batch."""
    assert (
        form_after(classifier(lambda logits, labels: F.cross_entropy(logits, labels) + 1e-9), torch.tensor([0, 1]))
        == "own"
    )
    assert form_after(
        classifier(lambda logits, labels: F.cross_entropy(logits, labels).float()), torch.tensor([0, 1])
    ) == ("classes")


def test_a_mixture_of_experts_with_a_tiny_router_loss_keeps_it() -> None:
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    sizes = {**SMALL, "num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2}
    for coefficient, routed, form in ((1e-6, True, "own"), (1e-6, False, "causal")):
        config = MixtralConfig(**sizes, output_router_logits=routed, router_aux_loss_coef=coefficient)
        loss = LossModule(MixtralForCausalLM(config).eval())
        loss.settle({"input_ids": ids(3), "labels": ids(3)})
        assert loss.form == form


def test_a_loss_that_masks_labels_by_their_values_is_kept_though_no_first_row_has_one() -> None:
    class Masking(LlamaForCausalLM):
        def forward(self, labels=None, **inputs):  # type: ignore[override]
            if labels is not None:
                labels = labels.masked_fill(labels == self.config.pad_token_id, -100)
            return super().forward(labels=labels, **inputs)

    torch.manual_seed(0)
    model = Masking(LlamaConfig(**SMALL, num_key_value_heads=2, pad_token_id=3)).eval()
    with torch.no_grad():
        model.lm_head.weight.mul_(20)
    loss = LossModule(model)
    loss.settle({"input_ids": ids(12), "labels": ids(12)})
    assert loss.form == "own"


def test_a_constant_that_changes_the_loss_is_judged_when_it_comes() -> None:
    class Either(BertForSequenceClassification):
        def forward(self, labels=None, smooth=False, **inputs):  # type: ignore[override]
            outputs = super().forward(**inputs)
            if labels is not None:
                outputs.loss = F.cross_entropy(outputs.logits, labels, label_smoothing=0.5 if smooth else 0.0)
            return outputs

    torch.manual_seed(0)
    model = Either(BertConfig(**SMALL, num_labels=2)).eval()
    with torch.no_grad():
        model.classifier.weight.mul_(30)
    loss, batch = LossModule(model), {"input_ids": ids(4), "labels": torch.tensor([0, 1, 0, 1])}
    loss.settle(batch)
    assert loss.form == "classes"
    loss.settle({**batch, "smooth": True})
    assert loss.form == "own"


def test_a_first_batch_with_a_wrong_label_settles_nothing() -> None:
    loss = LossModule(classifier(weighted(1.0, 10.0)))
    loss.settle({"input_ids": ids(2), "labels": torch.tensor([0, 7])})
    assert loss.form == "unsettled"
    loss.settle({"input_ids": ids(2), "labels": torch.tensor([0, 1])})
    assert loss.form == "own"


def test_labels_given_shifted_are_the_models_own_matter() -> None:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SMALL, num_key_value_heads=2)).eval()
    x = ids(3)
    shifted = F.pad(x, (0, 1), value=-100)[:, 1:]
    loss = LossModule(model)
    loss.settle({"input_ids": x, "labels": x, "shift_labels": shifted})
    assert loss.form == "own"  # which those of the next batch need not be shifted alike


@pytest.mark.parametrize("rows", [1, 3, 4])
def test_patches_that_are_no_rows_leave_the_loss_of_the_text(rows: int) -> None:
    """Four patches for each row; with four rows of one patch each both numbers are the same."""

    class Patched(LlamaForCausalLM):
        def forward(self, input_ids=None, pixel_values=None, **inputs):  # type: ignore[override]
            assert len(pixel_values) == 4 * len(input_ids) or len(pixel_values) == len(input_ids)
            seen = pixel_values.reshape(len(input_ids), -1).mean(-1)[:, None, None]
            return super().forward(inputs_embeds=self.get_input_embeddings()(input_ids) + seen, **inputs)

    torch.manual_seed(0)
    model = Patched(LlamaConfig(**SMALL, num_key_value_heads=2)).eval()
    Patched.__module__ = Patched.forward.__module__ = "transformers.models.patched"  # as if it were their own
    loss = LossModule(model)
    batch = {"input_ids": ids(rows), "labels": ids(rows), "pixel_values": torch.randn(4 * rows, 2)}
    loss.settle(batch)
    assert loss.form == "causal"
    sums, weights = loss(batch)
    with torch.no_grad():
        assert torch.allclose(sums.sum() / weights.sum(), model(**batch).loss, rtol=1e-5)
