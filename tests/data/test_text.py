"""Text files: formats, layouts, bad input."""

import csv
import gzip
import json
import os
from collections import Counter

import pytest

from fastbert.data.shards import prepare
from fastbert.data.text import expand, read_documents

DOCUMENTS = [["Erste Zeile, mit Umlaut: ü", "second line"], ["日本語 one"], ["third document", "a", "b"]]


def write_as(path, documents, column="text"):
    """`documents` in the format that the path's name tells."""
    texts = ["\n".join(document) for document in documents]
    if path.name.endswith(".parquet"):
        pa = pytest.importorskip("pyarrow")
        import pyarrow.parquet as pq

        pq.write_table(pa.table({"id": range(len(texts)), column: texts}), path)
        return path
    if ".jsonl" in path.name:
        text = "".join(json.dumps({"id": i, column: t}, ensure_ascii=i % 2) + "\n" for i, t in enumerate(texts))
    elif ".csv" in path.name:
        with open(path.with_suffix(".tmp"), "w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([["id", column], *enumerate(texts)])
        text = path.with_suffix(".tmp").read_bytes().decode()
    else:
        text = "\n\n\n".join(texts)
    data = text.encode()
    path.write_bytes(gzip.compress(data) if path.name.endswith(".gz") else data)
    return path


@pytest.mark.parametrize(
    "name", ["a.txt", "a.txt.gz", "a.jsonl", "a.jsonl.gz", "a.csv", "a.csv.gz", "a.parquet", "A.TXT"]
)
def test_every_format_gives_the_same_documents(name, tmp_path):
    path = write_as(tmp_path / name, DOCUMENTS, column="body")
    stats = Counter()
    assert list(read_documents(expand([path]), text_column="body", stats=stats)) == DOCUMENTS
    assert stats["bytes"] == path.stat().st_size and stats["skipped_lines"] == 0


@pytest.mark.parametrize(
    "text, layout, expected",
    [
        ("a\nb\n\nc\n", "auto", [["a", "b"], ["c"]]),
        ("\n\na\nb\nc\n\n\n", "auto", [["a"], ["b"], ["c"]]),
        ("a\n \t\nb", "auto", [["a"], ["b"]]),
        ("a\nb\n\nc\n", "line", [["a"], ["b"], ["c"]]),
        ("a\nb\nc\n", "blank-line", [["a", "b", "c"]]),
        ("\ufeffa\r\nb\r\n\r\nc", "auto", [["a", "b"], ["c"]]),
        ("a\x85b\u2028c\x0cd", "auto", [["a\x85b\u2028c\x0cd"]]),
    ],
    ids=["blank lines", "blank ends", "spaces", "forced line", "forced blank-line", "bom and crlf", "odd separators"],
)
def test_layouts_of_txt(text, layout, expected, tmp_path):
    (tmp_path / "a.txt").write_bytes(text.encode())
    assert list(read_documents([str(tmp_path / "a.txt")], layout=layout)) == expected


def test_expand_files_folders_and_globs(tmp_path):
    for name in ("b/2.txt", "b/1.jsonl", "b/c/3.csv", "b/notes.pdf", "b/.hidden.txt", "b/blank.txt", "a.txt", "z.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(" \n\n" if "blank" in name else "text\nmore\n")
    os.symlink(tmp_path / "a.txt", tmp_path / "b" / "link.txt")

    def names(*paths):
        return [os.path.relpath(file, tmp_path) for file in expand([str(tmp_path / path) for path in paths])]

    assert names("z.txt", "a.txt") == ["z.txt", "a.txt"]
    assert names("b") == ["b/1.jsonl", "b/2.txt", "b/link.txt", "b/c/3.csv"]
    assert names("*.txt", "b/**/*.csv") == ["a.txt", "z.txt", "b/c/3.csv"]
    # each file once, wherever it is met first
    assert names("a.txt", "b", "*.txt") == ["a.txt", "b/1.jsonl", "b/2.txt", "b/c/3.csv", "z.txt"]
    assert expand(str(tmp_path / "a.txt")) == [str(tmp_path / "a.txt")]


def test_unreadable_lines_are_counted_and_skipped(tmp_path, tokenizer):
    (tmp_path / "a.txt").write_bytes(b"good\n\xff\xfe bad\nalso good\n\xc3\n")
    (tmp_path / "b.jsonl").write_bytes(b'{"text": "fine"}\n{"text": "\xff"}\nnot json\n{"other": 1}\n{"text": null}\n')
    (tmp_path / "c.csv").write_bytes(b'id,text\n1,"one, two"\n2,\xe4\n3\n4,half \xed\xa0\x80\n5,last\n')
    stats = Counter()
    files = expand([tmp_path])
    assert list(read_documents(files, stats=stats)) == [["good"], ["also good"], ["fine"], ["one, two"], ["last"]]
    assert stats["skipped_lines"] == 2 + 4 + 3
    manifest = prepare(files, tokenizer, tmp_path / "out", progress=False)
    assert manifest["skipped_lines"] == 9 and manifest["documents"] == 5


def test_half_a_surrogate_pair_in_json(tmp_path, tokenizer):
    (tmp_path / "a.jsonl").write_text('{"text": "ba \\ud800 bo"}\n')
    assert list(read_documents([str(tmp_path / "a.jsonl")])) == [["ba ? bo"]]


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz"])
def test_lines_and_documents_longer_than_the_limit_are_cut(name, tmp_path, monkeypatch):
    monkeypatch.setattr("fastbert.data.text.MAX_SIZE", 10)
    text = "aé" * 20 + "\n" + "\n".join("日本" * 2 for _ in range(5)) + "\n\nshort\n"
    path = write_as(tmp_path / name, [[text]])
    documents = list(read_documents([str(path)], layout="blank-line"))
    assert "".join(line for document in documents for line in document) == "".join(text.split("\n"))
    assert max(sum(map(len, document)) for document in documents) < 20 and documents[-1] == ["short"]


def gzip_cut_short(path):
    path.write_bytes(gzip.compress(os.urandom(1000).hex().encode())[:500])


def parquet_with_numbers(path):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"text": [1, 2]}), path)


# file name, contents (text, bytes or a function that writes it), what the one line says
BAD_INPUT = [
    ("none.txt", None, "no such file or folder: .*none.txt"),
    ("no*.txt", None, r"no file matches .*no\*.txt"),
    ("folder", "folder", "folder has no file with text"),
    ("empty.txt", "", "empty.txt holds no text: it is empty or has only blank lines"),
    ("blank.txt", "\n \n\t\n\n", "blank.txt holds no text: it is empty or has only blank lines"),
    ("blank.txt.gz", gzip.compress(b"\n\n"), "blank.txt.gz holds no text"),
    ("what.pdf", "text", "what.pdf has an unknown type: expected .txt, .jsonl, .csv, .parquet"),
    ("binary.txt", b"\xff\xfe\x80\n\xff\xff\n", "binary.txt holds no text: 2 lines are not UTF-8"),
    ("control.txt", "\x01\x02\n\u200b\n", "control.txt gave no tokens"),
    ("false.txt.gz", "plain text", "false.txt.gz is not a whole gzip file"),
    ("cut.txt.gz", gzip_cut_short, "cut.txt.gz is not a whole gzip file"),
    ("a.jsonl", '{"body": "x", "title": "y"}\n', "a.jsonl has no column 'text': it has 'body', 'title'"),
    ("a.jsonl", '["x"]\n', "a.jsonl does not begin with a JSON object"),
    ("a.jsonl", "plain text\n", "a.jsonl does not begin with a JSON object on one line: 'plain text'"),
    ("a.csv", "id,body\n1,x\n", "a.csv has no column 'text': it has 'id', 'body'"),
    ("a.parquet", b"PAR1 no it is not", "a.parquet is not a whole parquet file"),
    ("a.parquet", parquet_with_numbers, "a.parquet: column 'text' holds int64: expected text"),
]


@pytest.mark.parametrize("name, contents, message", BAD_INPUT, ids=[f"{i} {row[0]}" for i, row in enumerate(BAD_INPUT)])
def test_bad_input_is_one_clear_line(name, contents, message, tmp_path, tokenizer):
    path = tmp_path / name
    if contents == "folder":
        path.mkdir()
    elif callable(contents):
        contents(path)
    elif contents is not None:
        path.write_bytes(contents if isinstance(contents, bytes) else contents.encode())
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        prepare([str(path)], tokenizer, tmp_path / "out", progress=False)
    assert "\n" not in str(caught.value)


def test_a_wrong_column_shows_before_any_work(tmp_path, tokenizer):
    write_as(tmp_path / "1.txt", DOCUMENTS)
    write_as(tmp_path / "2.jsonl", DOCUMENTS, column="body")
    with pytest.raises(ValueError, match="2.jsonl has no column 'text'"):
        prepare([tmp_path], tokenizer, tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()
