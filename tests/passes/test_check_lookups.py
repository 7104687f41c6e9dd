"""Every index that comes from the batch is checked before it is used, and no other index is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.support.programs import after, captured, change, close, equal, evaluate, operators, printed, tokens, wrap
from zowrap.errors import ZOInternalError
from zowrap.passes.check_lookups import CheckLookups
from zowrap.passes.strip_training import StripTraining

BEFORE = """
def forward(table, a_weight, b_weight, b_bias, batch_ids, batch_labels):
    embedding = aten.embedding(a_weight, batch_ids)
    index = aten.index.Tensor(table, [batch_ids])
    add = aten.add.Tensor(embedding, index)
    linear = aten.linear(add, b_weight, b_bias)
    mean = aten.mean.dim(linear, [1])
    select = aten.select.int(batch_labels, 1, 0)
    cross_entropy_loss = aten.cross_entropy_loss(mean, select, None, 0)
    to = aten.to.dtype(cross_entropy_loss, torch.float32)
    ones_like = aten.ones_like(to, pin_memory = False)
    return (to, ones_like)
"""

AFTER = """
def forward(table, a_weight, b_weight, b_bias, batch_ids, batch_labels):
    embedding = zowrap.rows(a_weight, batch_ids)
    index_error = zowrap.index_error(batch_ids, 9, True, None)
    add_tensor = aten.add.Tensor(batch_ids, index_error)
    index = aten.index.Tensor(table, [add_tensor])
    add = aten.add.Tensor(embedding, index)
    linear = aten.linear(add, b_weight, b_bias)
    mean = aten.mean.dim(linear, [1])
    select = aten.select.int(batch_labels, 1, 0)
    index_error_1 = zowrap.index_error(select, 6, False, -100)
    add_tensor_1 = aten.add.Tensor(select, index_error_1)
    cross_entropy_loss = aten.cross_entropy_loss(mean, add_tensor_1, None, 0)
    to = aten.to.dtype(cross_entropy_loss, torch.float32)
    ones_like = aten.ones_like(to, pin_memory = False)
    return (to, ones_like)
"""

ROWS, CLASSES = 9, 6


class Lookups(nn.Module):
    """A model that reads an embedding and a table by the same ids, then predicts classes."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.table, self.b = nn.Embedding(ROWS, 4), nn.Parameter(torch.zeros(ROWS, 4)), nn.Linear(4, CLASSES)

    def forward(self, ids: Tensor) -> Tensor:
        return self.b(self.a(ids) + self.table[ids])


def first_label(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    return nn.functional.cross_entropy(model(batch["ids"]).mean(1), batch["labels"][:, 0], reduction="none")


def labelled(rows: int = 5) -> dict[str, Tensor]:
    batch = tokens(rows, vocabulary=CLASSES)
    batch["labels"][0, 0] = -100  # ignored, not an error
    return batch


@pytest.fixture
def zm():
    return wrap(Lookups(), first_label)


@pytest.fixture
def program(zm):
    return captured(zm, labelled(), StripTraining())


def test_the_text_of_two_layers(zm, program) -> None:
    assert printed(program, zm) == BEFORE.strip()
    assert printed(after(program, CheckLookups()), zm) == AFTER.strip()


def test_embeddings_become_rows_and_other_indices_get_a_check(program) -> None:
    checked = after(program, CheckLookups())
    assert change(operators(program), operators(checked)) == {
        "aten.add.Tensor": 2,
        "aten.embedding": -1,
        "zowrap.index_error": 2,
        "zowrap.rows": 1,
    }
    assert checked.notes["check_lookups"].startswith("1 embeddings, 2 other indices")


def test_no_number_changes(zm, program) -> None:
    checked = after(program, CheckLookups())
    for rows in (5, 3):
        assert equal(evaluate(checked, zm, labelled(rows)), evaluate(program, zm, labelled(rows)))


def test_an_index_out_of_range_raises(zm, program) -> None:
    checked = after(program, CheckLookups())
    for name, value in (("ids", ROWS), ("ids", -1), ("labels", CLASSES), ("labels", -7)):
        batch = labelled()
        batch[name][1, 0] = value
        with pytest.raises(IndexError):
            evaluate(checked, zm, batch)


def test_indices_from_the_end_and_ignored_labels_are_no_mistake() -> None:
    def by_table(model: nn.Module, batch: dict[str, Any]) -> Tensor:
        logits = model.b(model.table[batch["ids"]]).mean(1)
        return nn.functional.cross_entropy(logits, batch["labels"][:, 0], reduction="none")

    zm = wrap(Lookups(), by_table)
    program = captured(zm, labelled(), StripTraining())
    checked, batch = after(program, CheckLookups()), labelled()
    batch["ids"][1, 0] = -ROWS
    assert equal(evaluate(checked, zm, batch), evaluate(program, zm, batch))
    batch["ids"][1, 0] = -ROWS - 1
    with pytest.raises(IndexError, match=f"index {-ROWS - 1} is out of range: there are {ROWS} entries"):
        evaluate(checked, zm, batch)


def test_a_second_time_no_number_changes_and_no_embedding_comes_back(zm, program) -> None:
    once, twice = after(program, CheckLookups()), after(program, CheckLookups(), CheckLookups())
    assert operators(twice)["zowrap.rows"] == 1 and operators(twice)["aten.embedding"] == 0
    assert equal(evaluate(twice, zm, labelled()), evaluate(once, zm, labelled()))


def test_one_index_is_checked_once_for_tables_of_one_length_and_positions_not_at_all() -> None:
    class Tables(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = (nn.Parameter(torch.randn(50, 4)) for _ in range(2))
            self.c = nn.Parameter(torch.randn(60, 4))

        def forward(self, ids: Tensor) -> Tensor:
            rows = torch.arange(ids.shape[0], device=ids.device)
            return (self.a[ids] + self.b[ids] + self.c[ids])[rows]

    zm = wrap(Tables(), lambda m, b: m(b["ids"]).mean((1, 2)))
    checked = captured(zm, {"ids": tokens()["ids"]}, StripTraining(), CheckLookups())
    assert operators(checked)["aten.index.Tensor"] == 4
    assert operators(checked)["zowrap.index_error"] == 2  # one for 50 entries, one for 60


def test_positions_in_a_table_that_may_be_too_short_are_checked() -> None:
    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.randn(20, 4))

        def forward(self, ids: Tensor) -> Tensor:
            return self.table[torch.arange(ids.shape[1], device=ids.device)] + 0 * ids.unsqueeze(-1)

    checked = captured(
        wrap(Positions(), lambda m, b: m(b["ids"]).mean((1, 2))), {"ids": tokens()["ids"]}, CheckLookups()
    )
    assert operators(checked)["zowrap.index_error"] == 1


def test_gathers_and_index_selects_are_checked_and_masks_are_not() -> None:
    class Picks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(3, 6)

        def forward(self, x: Tensor, ids: Tensor) -> Tensor:
            y = self.a(x)
            y = torch.where(y > 0, y, 0.0) + y.index_select(1, ids[0, :6])
            return y.gather(1, ids[:, :2])

    batch = {"x": torch.randn(5, 3), "ids": tokens(vocabulary=6)["ids"]}
    zm = wrap(Picks(), lambda m, b: m(b["x"], b["ids"]).mean(1))
    program = captured(zm, batch, StripTraining())
    checked = after(program, CheckLookups())
    assert operators(checked)["zowrap.index_error"] == 2
    assert close(evaluate(checked, zm, batch), evaluate(program, zm, batch))


def test_probabilities_in_place_of_labels_are_no_index() -> None:
    def soft(model: nn.Module, batch: dict[str, Any]) -> Tensor:
        return nn.functional.cross_entropy(model(batch["ids"]).mean(1), batch["soft"], reduction="none")

    batch = {"ids": tokens()["ids"], "soft": torch.rand(5, CLASSES)}
    checked = captured(wrap(Lookups(), soft), batch, StripTraining(), CheckLookups())
    assert operators(checked)["zowrap.index_error"] == 1  # the ids


def test_an_embedding_that_was_left_breaks_the_promise(program) -> None:
    class Forgetful(CheckLookups):
        def call(self, program) -> str:
            return "nothing done"

    with pytest.raises(ZOInternalError, match="an unchecked embedding is left"):
        after(program, Forgetful())
