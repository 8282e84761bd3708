"""Tables: cells stay text, lines end where they should, every fault names its line; GLUE's files by their names."""

import gzip
import json

import pytest

from fastbert.data import glue, tables


def test_cells_stay_as_they_are(tmp_path):
    cells = ["NA", "null", "None", "nan", "1.0", "007", "true", "", "a\u00a0b", "c\u2028d", "e\x85f", "  spaced  "]
    path = tmp_path / "a.csv"
    path.write_bytes(b"\xef\xbb\xbf" + b"text,n\r\n" + "".join(f"{cell},1\r\n" for cell in cells).encode())
    assert [row["text"] for _, row in tables.rows(path)] == cells
    assert [number for number, _ in tables.rows(path)] == list(range(2, len(cells) + 2))


def test_quotes_of_a_csv(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text('text,label\n"He said ""no"", twice",a\n"two\nlines",b\nplain,c\n')
    assert [(number, row["text"]) for number, row in tables.rows(path)] == [
        (2, 'He said "no", twice'), (3, "two\nlines"), (5, "plain")
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("cell", "expected"),
    [('"whole"', "whole"), ('"half', '"half'), ('mid"dle', 'mid"dle')],
    ids=["all", "not", "inside"],
)
def test_a_tsv_is_quoted_only_if_all_of_it_is(cell, expected, tmp_path):
    path = tmp_path / "a.tsv"
    path.write_text(f"text\tlabel\n{cell}\t1\nother\t0\n")
    assert [row["text"] for _, row in tables.rows(path)] == [expected, "other"]


def test_all_types_give_the_same_rows(tmp_path):
    rows = [{"text": "a b", "label": "x"}, {"text": 'say "c"', "label": "y"}]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "a.jsonl").write_text("\ufeff" + lines)
    (tmp_path / "a.json").write_text(json.dumps(rows))
    (tmp_path / "b.json").write_text(lines)
    (tmp_path / "a.csv").write_text('text,label\na b,x\n"say ""c""",y\n')
    (tmp_path / "a.tsv").write_text('text\tlabel\na b\tx\nsay "c"\ty\n')
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    (tmp_path / "u.csv").write_text('text,label\na b,x\n"say ""c""",y\n', encoding="utf-16")
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    for path in tmp_path.iterdir():
        assert [row for _, row in tables.rows(path)] == rows, path.name
        assert tables.columns(path) == ["text", "label"], path.name


@pytest.mark.parametrize(
    ("name", "content", "error"),
    [
        ("a.csv", b"text,label\na,b\na,b,c\n", "line 3 has 3 columns, the header has 2: text with commas needs quotes"),
        ("a.csv", b'text,label\n"a,b\n', "line 2 is not CSV, or a quote is never closed"),
        ("a.csv", b"text,text\na,b\n", "has two columns named 'text'"),
        ("a.csv", b"", "is empty"),
        ("a.csv", b"text,label\na,b\nc\xff,d\n", "line 3 is not valid text"),
        ("a.tsv", b"text\tlabel\na\n", "line 2 has 1 columns, the header has 2"),
        ("a.jsonl", b'{"text": "a"}\n[1]\n', "line 2 is not a JSON object on one line"),
        ("a.jsonl", b'{"text": "a"}\n{"text": \n', "line 2 is not a JSON object on one line"),
        ("a.json", b'[{"text": 1}, 2]', "is not an array of JSON objects"),
        ("a.json", b"[{]", "is not JSON"),
        ("a.parquet", b"PAR1", "is not a whole parquet file"),
        ("a.xlsx", b"", "has an unknown type"),
    ],
)  # fmt: skip
def test_a_fault_names_its_line(name, content, error, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"{name} .*{error}|{name}.*{error}"):
        list(tables.rows(tmp_path / name))


def test_two_columns_of_one_name_in_parquet(tmp_path):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    pq.write_table(pa.table([["a"], ["b"]], names=["text", "text"]), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="a.parquet has two columns named 'text'"):
        list(tables.rows(tmp_path / "a.parquet"))


def test_short_rows_can_be_skipped(tmp_path):
    (tmp_path / "a.tsv").write_text("id\ttext\tlabel\n1\ta\t0\n2\tbroken\nrow\t1\n3\tb\t1\n")
    skipped = []
    rows = list(tables.rows(tmp_path / "a.tsv", lambda *fault: skipped.append(fault)))
    assert [number for number, _ in rows] == [2, 5]
    assert skipped == [(3, "2 columns, the header has 3"), (4, "2 columns, the header has 3")]


@pytest.mark.parametrize(
    ("folder", "header", "texts", "label"),
    [
        ("CoLA", ["gj04", "1", "", "It."], ("sentence",), "label"),
        ("glue_CoLA", ["index", "sentence"], ("sentence",), "label"),
        ("SST-2", ["sentence", "label"], ("sentence",), "label"),
        ("MRPC", ["Quality", "#1 ID", "#2 ID", "#1 String", "#2 String"], ("#1 String", "#2 String"), "Quality"),
        ("STS-B", ["index", "sentence1", "sentence2", "score"], ("sentence1", "sentence2"), "score"),
        ("MNLI", ["index", "sentence1", "sentence2", "label1", "gold_label"], ("sentence1", "sentence2"), "gold_label"),
        ("my-qnli", ["index", "question", "sentence", "label"], ("question", "sentence"), "label"),
    ],
)  # fmt: skip
def test_glue_is_known_by_its_folder(folder, header, texts, label, tmp_path):
    layout = glue.layout_of(tmp_path / folder / "train.tsv", header)
    assert (layout.texts, layout.label) == (texts, label)
    assert (layout.names is not None) == (folder == "CoLA")
    assert glue.layout_of(tmp_path / folder / "train.csv", header) is None


def test_other_folders_are_not_glue(tmp_path):
    assert glue.layout_of(tmp_path / "mine" / "train.tsv", ["sentence", "label"]) is None
    assert glue.layout_of(tmp_path / "RTE" / "train.tsv", ["text", "label"]) is None
