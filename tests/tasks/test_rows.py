"""Reading data: every format gives the same rows, and every complaint names the place."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path

import pytest

from zowrap.errors import ZOError
from zowrap.tasks.labels import collect_labels, read_label
from zowrap.tasks.rows import Row, Rows, read_rows, read_text, sample

ROWS = [{"text": "a, b\nc", "label": "x"}, {"text": "naïve “quotes”\u2028here", "label": "y"}]


def write(path: Path, rows: list[dict]) -> Path:
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows), encoding="utf-8")
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows), encoding="utf-8")
    elif path.suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        with path.open("w", newline="", encoding="utf-8-sig") as file:
            writer = csv.DictWriter(file, rows[0].keys(), delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
    return path


@pytest.mark.parametrize("ending", ["jsonl", "json", "csv", "tsv", "parquet"])
def test_every_format_gives_the_same_rows(tmp_path: Path, ending: str) -> None:
    rows = read_rows(str(write(tmp_path / f"data.{ending}", ROWS)))
    assert [row.values for row in rows] == ROWS


def test_an_unknown_ending_is_read_by_its_content(tmp_path: Path) -> None:
    path = write(tmp_path / "data.jsonl", ROWS).rename(tmp_path / "data.txt")
    assert [row.values for row in read_rows(str(path))] == ROWS
    path.write_text("just text")
    with pytest.raises(ZOError, match=r"\.jsonl, \.csv"):
        read_rows(str(path))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "x"}\n\n{"text": }\n', r"a\.jsonl line 3 is not valid JSON"),
        ("a.jsonl", b'{"text": "x"}\n[1]\n', r"a\.jsonl line 2 is a list, not an object"),
        ("a.jsonl", b'{"text": "x"}\n{"text": "\xff"}\n', r"a\.jsonl line 2 is not valid UTF-8 \(byte 0xff\)"),
        ("a.jsonl", b"", "is empty"),
        ("a.jsonl", b"\n \n", "is empty"),
        ("a.json", b'[{"text": "x"},\n{]', r"a\.json line 2 is not valid JSON"),
        ("a.csv", b"text,label\nx,y\nz\n", r"a\.csv line 3 has 1 cells where the header has 2"),
        ("a.csv", b'text,label\n"x,y\n', r"a\.csv line 2 is not valid CSV"),
        ("a.csv", b"text,label\nx,\xe9\n", r"a\.csv line 2 is not valid UTF-8"),
        ("a.csv", b"text,label\n", "is empty"),
        ("a.parquet", b"no parquet", "not readable as Parquet"),
        ("a.jsonl", b'{"text": "x", "label": 1, "label": 2}\n', r"a\.jsonl line 1 names 'label' twice"),
        ("a.json", b'[{"text": "x", "text": "y"}]', r"a\.json names 'text' twice"),
        ("a.csv", "text,label\na,x\n".encode("utf-16-le"), "line 1 holds a zero byte"),
        ("a.csv", b"\xff\xfet\x00\n\x00x", r"a\.csv line 2 is not valid UTF-16"),
    ],
)
def test_malformed_files_are_told_with_their_line(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ZOError, match=message):
        read_rows(str(path))


def test_missing_file_and_directory(tmp_path: Path) -> None:
    for source in (tmp_path / "no.jsonl", "./nowhere", "nowhere.csv"):
        with pytest.raises(ZOError, match="no such file"):
            read_rows(str(source))
    with pytest.raises(ZOError, match="is a directory"):
        read_rows(str(tmp_path))


def test_half_a_surrogate_pair_is_no_text(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "fine \\ud83d\\ude00", "label": "x"}\n{"text": "a\\ud83d", "label": "\\ude00"}\n')
    whole, half = read_rows(str(path))
    assert read_text(whole, "text") == "fine \U0001f600" and read_label(whole, "label") == "x"
    with pytest.raises(ZOError, match=r"a\.jsonl line 2: column 'text' holds \\ud83d, half of a surrogate pair"):
        read_text(half, "text")
    with pytest.raises(ZOError, match=r"a\.jsonl line 2: label 'label' holds \\ude00"):
        read_label(half, "label")


def test_rows_know_their_number(tmp_path: Path) -> None:
    rows = read_rows(str(write(tmp_path / "data.csv", ROWS * 10)))
    assert [row.index for row in rows] == list(range(20))
    assert [row.values["label"] for row in sample(rows, 5)] == [ROWS[row.index % 2]["label"] for row in sample(rows, 5)]


def test_text_must_be_there_and_be_text() -> None:
    row = Row({"text": None, "n": 3, "label": "x"}, "f line 7")
    for column, message in (
        ("text", "f line 7: column 'text' is null"),
        ("n", "number 3"),
        ("no", "has no column 'no'"),
    ):
        with pytest.raises(ZOError, match=message):
            read_text(row, column)


def test_a_sample_is_fixed_and_in_order() -> None:
    rows = [Row({"i": i}, "") for i in range(100)]
    picked = sample(rows, 10)
    assert picked == sample(rows, 10) and len(picked) == 10
    assert [r.values["i"] for r in picked] == sorted(r.values["i"] for r in picked)
    assert sample(rows, None) == rows


def test_hub_data_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    table = datasets.Dataset.from_dict({"text": ["a", "b"], "label": [1, 0]}).cast_column(
        "label", datasets.ClassLabel(names=["no", "yes"])
    )
    asked = []

    def load(name: str, split: str) -> datasets.Dataset:
        asked.append((name, split))
        if name == "nobody/nothing":
            raise ConnectionError("no route")
        return table

    monkeypatch.setattr(datasets, "load_dataset", load)
    rows = read_rows("someone/reviews:dev")
    assert [r.values["label"] for r in rows] == ["yes", "no"] and rows[0].where == "someone/reviews:dev row 1"
    read_rows("reviews", default_split="test")
    assert asked == [("someone/reviews", "dev"), ("reviews", "test")]
    with pytest.raises(ZOError, match=r"no route.*HF_TOKEN"):
        read_rows("nobody/nothing")


@pytest.mark.parametrize(("package", "source"), [("pyarrow.parquet", "a.parquet"), ("datasets", "someone/reviews")])
def test_what_is_not_installed_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str, source: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)  # type: ignore[arg-type]
    if source.endswith(".parquet"):
        (tmp_path / source).write_bytes(b"PAR1")
        source = str(tmp_path / source)
    with pytest.raises(ZOError, match="pip install 'zowrap\\[data\\]'"):
        read_rows(source)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("ending", ["jsonl", "csv", "tsv", "json", "txt"])
def test_the_encoding_is_that_of_the_byte_order_mark(tmp_path: Path, encoding: str, ending: str) -> None:
    path = write(tmp_path / f"a.{ending if ending != 'txt' else 'jsonl'}", ROWS)
    path.write_bytes(path.read_bytes().decode("utf-8-sig").encode(encoding))
    if ending == "txt":
        path = path.rename(tmp_path / "a.txt")
    assert [row.values for row in read_rows(str(path))] == ROWS


def test_files_put_together_keep_their_marks_out(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", ROWS)
    path.write_bytes(path.read_bytes() + b"\xef\xbb\xbf" + path.read_bytes())
    assert [row.values for row in read_rows(str(path))] == ROWS * 2


def test_a_parquet_file_of_datasets_names_its_classes(tmp_path: Path) -> None:
    import datasets

    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["z", "a", "m"])}
    )
    values = {"text": ["one", "two", "three"], "label": [2, 0, -1]}
    datasets.Dataset.from_dict(values, features=features).to_parquet(str(tmp_path / "a.parquet"))
    rows = read_rows(str(tmp_path / "a.parquet"))
    assert [row.values["label"] for row in rows] == ["m", "z", -1] and rows.classes == {"label": ["z", "a", "m"]}
    assert collect_labels(Rows(rows[:2], rows.classes), "label") == ["z", "a", "m"]
    assert sample(rows, 2).classes == rows.classes


def test_metadata_of_others_is_no_class_names(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.Table.from_pylist([{"text": "x", "label": 1}])
    for text in (b"", b"{", b"[]", b'{"info": {"features": []}}', b'{"info": {"features": {"label": {"names": [1]}}}}'):
        pyarrow.parquet.write_table(table.replace_schema_metadata({b"huggingface": text}), tmp_path / "a.parquet")
        rows = read_rows(str(tmp_path / "a.parquet"))
        assert rows.classes == {} and rows[0].values["label"] == 1


def test_a_parquet_file_with_two_columns_of_one_name_is_refused(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.table([["x"], ["a"], ["b"]], names=["text", "label", "label"])
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(ZOError, match="has two columns named 'label'"):
        read_rows(str(tmp_path / "a.parquet"))
