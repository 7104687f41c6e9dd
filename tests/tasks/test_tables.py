"""Tables: quotation marks, doubled columns, separators and byte-order marks; no row is lost in silence."""

from __future__ import annotations

import csv
import io
import logging

import pytest

from zowrap.errors import ZOError
from zowrap.tasks.tables import Table


def read(text: str, tabs: bool = False) -> list[dict[str, str]]:
    return [values for values, _ in Table(text, "t", tabs).rows()]


@pytest.fixture
def told(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> pytest.LogCaptureFixture:
    monkeypatch.setattr(logging.getLogger("zowrap"), "propagate", True)
    caplog.set_level(logging.INFO)
    return caplog


@pytest.mark.parametrize(
    "text",
    [
        'text,label\n"a warm, funny film",x\n"dull,\nand long",y\n"he said ""well""",x\n',
        'text,label\r\n"one\r\ntwo",x\r\nplain,y\r\n',
        'text,label\n"",x\n"a ""b""\n\nc",y\n',
        'text,label\nmid "quote" here,x\n\nnext,y\n',
        'label,text\nx,"ends with a quote """\n',
    ],
)
def test_balanced_quotes_are_those_of_the_csv_module(text: str) -> None:
    want = list(csv.DictReader(io.StringIO(text, newline="")))
    assert read(text) == want
    tabbed = text.replace(",", "\t").replace('film"', 'film"')
    assert read(tabbed, tabs=True) == list(csv.DictReader(io.StringIO(tabbed, newline=""), delimiter="\t"))


@pytest.mark.parametrize(
    ("cells", "plain"),
    [
        (['"great fun from start', "a bore", 'loved it"', "dull"], 1),  # swallowed up to the next one by csv
        (['"great fun', 'loved it"', "dull"], 1),
        (['"great" fun', "dull", '"quoted"'], 1),
        (["a bore", '"never closed', "dull"], 1),
        (['"one', '"two', '"three'], 3),
    ],
)
def test_stray_quotes_of_a_tsv_are_text_and_counted(
    told: pytest.LogCaptureFixture, cells: list[str], plain: int
) -> None:
    rows = read("text\tlabel\n" + "".join(f"{cell}\tx\n" for cell in cells), tabs=True)
    assert [row["text"] for row in rows] == [cell if cell != '"quoted"' else "quoted" for cell in cells]
    assert f"t: {plain} row" in told.text and "is read as text" in told.text


def test_a_cell_of_a_csv_that_could_be_several_rows_is_told(told: pytest.LogCaptureFixture) -> None:
    rows = read('text,label\n"great fun,x\na bore,y\nloved it",x\ndull,y\n')
    assert len(rows) == 2 and "1 quoted cell runs over several lines" in told.text and "lines 2 to 4" in told.text
    told.clear()
    assert len(read('text,label\n"a poem\nof three\nlines",x\ndull,y\n')) == 2 and told.text == ""


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ('text,label\nfine,x\n"never closed,y\nlast,x\n', "t line 3 is not valid CSV: a quotation mark opens a cell"),
        ('text,label\n"a" b,x\n', "t line 2 is not valid CSV: .*is written twice"),
        ("text,label,label\na,b,c\n", "t line 1 names the column 'label' twice .2 and 3.: rename one"),
        ("text,label,text \na,b,c\n", "names the column 'text' twice"),
        ("text,label\na,b\ntext,label\nc,d\n", "t line 3 repeats the header"),
        ("text,label\na\n", "t line 2 has 1 cells where the header has 2"),
        ('text,label\n"a\nb",x\nc\n', "t line 4 has 1 cells"),
    ],
)
def test_what_cannot_be_read_is_refused_by_line(text: str, sentence: str) -> None:
    with pytest.raises(ZOError, match=sentence):
        read(text)


@pytest.mark.parametrize(("tabs", "separator"), [(False, ";"), (False, "\t"), (True, ","), (True, ";")])
def test_another_separator_is_known_by_the_header(told: pytest.LogCaptureFixture, tabs: bool, separator: str) -> None:
    assert read(f"text{separator}label\na b{separator}x\n", tabs) == [{"text": "a b", "label": "x"}]
    assert "cells separated by" in told.text


def test_marks_within_and_unnamed_columns_are_passed_over() -> None:
    assert read("text,label\na,x\n\ufeffb,y\n")[1] == {"text": "b", "label": "y"}
    assert read(",text,label,\n0,a,x,\n")[0]["text"] == "a"
