"""Text files: formats, encodings, layouts, bad input."""

import codecs
import csv
import gzip
import json
import os
from collections import Counter

import pytest

from fastbert.data.shards import prepare
from fastbert.data.text import expand, read_documents

DOCUMENTS = [["Erste Zeile, mit Umlaut: ü", "second line"], ["日本語 one"], ["third document", "a", "b"]]


def write_as(path, documents, column="text", encoding="utf-8"):
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
    data = text.encode(encoding)
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


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.csv.gz"])
@pytest.mark.parametrize(
    "encoding", ["utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "utf-32-be"]
)
def test_encodings_are_detected(encoding, name, tmp_path):
    path = write_as(tmp_path / name, DOCUMENTS, encoding=encoding)
    stats = Counter()
    assert list(read_documents(expand([path]), stats=stats)) == DOCUMENTS
    assert not stats["skipped_lines"]


@pytest.mark.parametrize(
    "text",
    ["Это текст на русском языке, и в нём есть пробелы.\n" * 3, "\u4e00 one two \u3000 three\n", "ab\n"],
    ids=["Russian", "low bytes of NUL", "short"],
)
@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-16"])
def test_encodings_of_other_scripts_are_detected(encoding, text, tmp_path):
    (tmp_path / "a.txt").write_bytes(text.encode(encoding))
    documents = list(read_documents(expand([tmp_path / "a.txt"]), layout="blank-line"))
    assert documents == [[line.strip() for line in text.splitlines()]]


def test_invalid_lines_of_utf_16_are_skipped(tmp_path):
    data = "one\n\ud800 half a pair\ntwo\n".encode("utf-16-le", "surrogatepass")
    (tmp_path / "a.txt").write_bytes(codecs.BOM_UTF16_LE + data)
    stats = Counter()
    assert list(read_documents([str(tmp_path / "a.txt")], stats=stats)) == [["one"], ["two"]]
    assert stats["skipped_lines"] == 1


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
    for name in ("b/2.txt", "b/1.jsonl", "b/c/3.csv", "b/notes.pdf", "b/.hidden.txt", "b/blank.txt", "a.txt", "z.txt",
                 "b/.git/4.txt", "b/c/.ipynb_checkpoints/3.csv", "b/run/vocab.txt", "b/run/metrics.jsonl",
                 "b/run/tokenizer.json"):  # fmt: skip
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(" \n\n" if "blank" in name else "text\nmore\n")
    os.symlink(tmp_path / "a.txt", tmp_path / "b" / "link.txt")
    os.symlink(tmp_path / "nowhere.txt", tmp_path / "b" / "dangling.txt")
    # opening this would wait for a writer
    os.mkfifo(tmp_path / "b" / "pipe.txt")

    def names(*paths):
        return [os.path.relpath(file, tmp_path) for file in expand([str(tmp_path / path) for path in paths])]

    assert names("z.txt", "a.txt") == ["z.txt", "a.txt"]
    assert names("b/run/vocab.txt") == ["b/run/vocab.txt"]
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
    assert stats["skipped_lines"] == 2 + 4 + 3 and stats["no_text"] == 2 + 1
    manifest = prepare(files, tokenizer, tmp_path / "out", progress=False)
    assert manifest["skipped_lines"] == 9 and manifest["documents"] == 5


def test_rows_with_surplus_commas_lose_no_text(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text('id,text\n1,"Hello, world"\n2,fine,,\n')
    assert list(read_documents([str(path)])) == [["Hello, world"], ["fine"]]
    path.write_text("id,text\n1,fine\n2,Hello, world\n")
    with pytest.raises(ValueError, match="a.csv line 3 has 3 fields, the header has 2: text with commas needs quotes"):
        list(read_documents([str(path)]))


@pytest.mark.parametrize("rest", ["second,2\nthird,3\n", 'second,"x"\n', "2\n" * 1000])
def test_a_quote_that_is_never_closed_swallows_no_rows(rest, tmp_path):
    (tmp_path / "a.csv").write_text(f'text,label\nfirst,1\n"never closed,1\n{rest}')
    with pytest.raises(ValueError, match="a.csv line 3 is not CSV, or a quote is never closed"):
        list(read_documents([str(tmp_path / "a.csv")]))


def test_faults_in_parquet(tmp_path):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    path = str(tmp_path / "a.parquet")
    invalid = pa.array([b"good", b"\xff\xfe", b"also good"], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"text": invalid}), path)
    stats = Counter()
    assert list(read_documents([path], stats=stats)) == [["good"], ["also good"]]
    assert (stats["skipped_lines"], stats["no_text"]) == (1, 0)
    pq.write_table(pa.table({"text": pa.array([None, "x", None], pa.string())}), path)
    stats = Counter()
    assert list(read_documents([path], stats=stats)) == [["x"]] and stats["no_text"] == 2
    pq.write_table(pa.table([["a"], ["b"]], names=["text", "text"]), path)
    with pytest.raises(ValueError, match="a.parquet has 2 columns named 'text': expected one"):
        list(read_documents([path]))


def test_text_that_is_truncated_while_it_is_read(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("a line of text\n" * 100_000)
    documents = read_documents([str(path)], layout="line")
    next(documents)
    os.truncate(path, 500_000)
    with pytest.raises(ValueError, match="a.txt changed while it was read: from 1,500,000 to 500,000 bytes"):
        list(documents)


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


@pytest.mark.parametrize("name", ["a.txt", "a.parquet"])
def test_a_long_line_is_cut_before_a_blank(name, tmp_path, monkeypatch):
    monkeypatch.setattr("fastbert.data.text.MAX_SIZE", 100)
    line = "One sentence. " + " ".join(f"word{i}  two" for i in range(40)) + " \u65e5" + "\u672c" * 150
    documents = list(read_documents([str(write_as(tmp_path / name, [[line]]))], layout="line"))
    assert "".join(part for document in documents for part in document) == line
    assert all(len(part) <= 100 for document in documents for part in document)
    _, *rest = (part for document in documents for part in document)
    assert {part[0] for part in rest} == {" ", "\u672c"} and all(part[1:2] != " " for part in rest)


@pytest.mark.parametrize("name, where", [("a.txt", "line 4"), ("a.jsonl", "line 2"), ("a.parquet", "row 2")])
def test_a_word_above_a_megabyte_is_an_error(name, where, tmp_path):
    most = 1 << 20
    for letters in (most, most + 1):
        path = write_as(tmp_path / name, [["short"], ["ba " + "w" * letters + " bo"]])
        if letters == most:
            assert sum(map(len, list(read_documents([str(path)]))[1])) == most + 6
            continue
        with pytest.raises(ValueError, match=f"{name} {where} has a word of more than 1,048,576 letters"):
            list(read_documents([str(path)]))
    # ideographs are words
    (tmp_path / "b.txt").write_text("\u65e5" * (most + 1))
    assert len(list(read_documents([str(tmp_path / "b.txt")]))) == 1


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.csv", "a.parquet"])
def test_a_row_above_the_limit_is_an_error(name, tmp_path, monkeypatch):
    """The limit bounds memory: a row is read as a whole."""
    monkeypatch.setattr("fastbert.data.text.MAX_ROW", 1000)
    path = write_as(tmp_path / name, [["ba bo"], ["ba " * 300], ["ki"]])
    assert len(list(read_documents([str(path)]))) == 3
    for letters in (1100, 40_000):
        path = write_as(tmp_path / name, [["ba bo"], ["ba " * (letters // 3)], ["ki"]])
        with pytest.raises(ValueError, match=rf"{name} (line \d|row 2|has rows of).*: expected at most [\d,]+ letters"):
            list(read_documents([str(path)]))


@pytest.mark.parametrize("kind", ["string", "dictionary"])
def test_a_long_row_among_short_ones_is_refused_before_it_is_decoded(kind, tmp_path, monkeypatch):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    monkeypatch.setattr("fastbert.data.text.MAX_ROW", 1000)
    texts = pa.array([*(f"ba {i}" for i in range(500)), None, "ki " * 2000])
    texts = texts.dictionary_encode() if kind == "dictionary" else texts
    pq.write_table(pa.table({"text": texts}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="a.parquet row 502 has 6,000 bytes: expected at most"):
        list(read_documents([str(tmp_path / "a.parquet")]))


def gzip_cut_short(path):
    path.write_bytes(gzip.compress(os.urandom(1000).hex().encode())[:500])


def parquet_with(kind, values):
    def write(path):
        pa = pytest.importorskip("pyarrow")
        import pyarrow.parquet as pq

        pq.write_table(pa.table({"text": pa.array(values, kind)}), path)

    return write


# file name, contents (text, bytes or a function that writes it), what the one line says
BAD_INPUT = [
    ("none.txt", None, "no such file or folder: .*none.txt"),
    ("no*.txt", None, r"no file matches .*no\*.txt"),
    ("folder", "folder", "folder has no file with text"),
    ("empty.txt", "", "empty.txt holds no text: it is empty or has only blank lines"),
    ("blank.txt", "\n \n\t\n\n", "blank.txt holds no text: it is empty or has only blank lines"),
    ("blank.txt.gz", gzip.compress(b"\n\n"), "blank.txt.gz holds no text"),
    ("what.pdf", "text", "what.pdf has an unknown type: expected .txt, .jsonl, .csv, .parquet"),
    (
        "latin.txt",
        "Über\nKöln\nist\nschön\n".encode("latin-1"),
        "latin.txt is not UTF-8: 3 of its first 4 lines are not",
    ),
    ("binary.txt", b"\xff\xff\x80\n\xff\xff\n", "binary.txt holds no text: 2 lines are not valid text"),
    ("zeros.txt", b"\0" * 200 + b"text\n", "zeros.txt is not text: 98% of its first bytes are NUL"),
    ("odd.txt", b"\xff\xfea\0b", "odd.txt line 1 is not UTF-16: truncated data"),
    ("null.parquet", parquet_with("null", [None, None]), "column 'text' holds no text: all its values are null"),
    ("nulls.parquet", parquet_with("string", [None, None]), "nulls.parquet gave no tokens: 2 rows have no text"),
    ("control.txt", "\x01\x02\n\u200b\n", "control.txt gave no tokens"),
    ("false.txt.gz", "plain text", "false.txt.gz is not a whole gzip file"),
    ("cut.txt.gz", gzip_cut_short, "cut.txt.gz is not a whole gzip file"),
    ("a.jsonl", '{"body": "x", "title": "y"}\n', "a.jsonl has no column 'text': it has 'body', 'title'"),
    ("a.jsonl", '["x"]\n', "a.jsonl does not begin with a JSON object"),
    ("a.jsonl", "plain text\n", "a.jsonl does not begin with a JSON object on one line: 'plain text'"),
    ("a.csv", "id,body\n1,x\n", "a.csv has no column 'text': it has 'id', 'body'"),
    ("a.parquet", b"PAR1 no it is not", "a.parquet is not a whole parquet file"),
    ("a.parquet", parquet_with("int64", [1, 2]), "a.parquet: column 'text' holds int64: expected text"),
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
