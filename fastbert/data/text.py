"""Raw text files to documents. A document is a list of non-empty lines. Nothing larger is in memory.

    .txt      documents with blank lines between them, or one document per line
    .jsonl    one JSON object per line
    .csv      with a header line
    .parquet  as .jsonl and .csv: one document per row, in a text column
    .gz       of .txt, .jsonl and .csv

A line or document of more than MAX_SIZE bytes or characters is cut there, and the rest is another document: memory
stays bounded. Lines that are not UTF-8 and rows without text are counted and skipped.
"""

import csv
import glob
import gzip
import json
import os
import zlib
from collections import Counter

MAX_SIZE = 1 << 24
KINDS = (".txt", ".jsonl", ".csv", ".parquet")
LAYOUTS = ("auto", "blank-line", "line")


def _kind(path):
    """The file's type, one of KINDS, without .gz; None for other types."""
    stem, suffix = os.path.splitext(path.lower())
    if suffix == ".gz":
        suffix = os.path.splitext(stem)[1]
        return suffix if suffix in KINDS[:3] else None
    return suffix if suffix in KINDS else None


def expand(paths):
    """The text files of `paths` (files, folders with their subfolders, globs), each once, folders in sorted order.

    Raises FileNotFoundError for a path that does not exist, ValueError for a named file that is empty, has only blank
    lines or is of an unknown type. In folders and globs such files are skipped; at least one file must have text.
    """
    if isinstance(paths, (str, os.PathLike)):
        paths = [paths]
    files = []
    for path in map(os.path.expanduser, map(os.fspath, paths)):
        if os.path.isfile(path):
            if _kind(path) is None:
                raise ValueError(f"{path} has an unknown type: expected {', '.join(KINDS)} (or .gz of the first three)")
            stats = Counter()
            if not _has_text(path, stats):
                bad = stats["skipped_lines"]
                why = f"{bad} lines are not UTF-8" if bad else "it is empty or has only blank lines"
                raise ValueError(f"{path} holds no text: {why}")
            files.append(path)
            continue
        if os.path.isdir(path):
            found, what = _below(path), "folder"
        elif glob.has_magic(path):
            found, what = sorted(glob.glob(path, recursive=True)), "pattern"
            found = [file for match in found for file in (_below(match) if os.path.isdir(match) else [match])]
            if not found:
                raise FileNotFoundError(f"no file matches {path}")
        else:
            raise FileNotFoundError(f"no such file or folder: {path}")
        found = [file for file in found if _kind(file) and _has_text(file, Counter())]
        if not found:
            raise ValueError(f"the {what} {path} has no file with text ({', '.join(KINDS)}, or .gz of the first three)")
        files += found
    if not files:
        raise ValueError("no text files were named")
    # two patterns, or a link, may lead to the same file
    once = {}
    for file in files:
        once.setdefault(os.path.realpath(file), file)
    return list(once.values())


def _below(folder):
    return [
        os.path.join(root, name)
        for root, folders, names in os.walk(folder)
        # os.walk descends in the order of the list that is sorted in place
        for name in (folders.sort() or sorted(names))
        if not name.startswith(".")
    ]


def _has_text(path, stats):
    if _kind(path) == ".parquet":
        return os.path.getsize(path) > 0
    return any(line.strip() for line in _lines(path, stats))


def read_documents(files, *, text_column="text", layout="auto", stats=None):
    """Iterate over the documents of `files` (from `expand`), each a list of stripped, non-empty lines.

    layout, for .txt files: "blank-line" (blank lines between documents), "line" (one document per line), or "auto":
    blank-line if the file has a blank line between two lines of text, else line. stats: a collections.Counter;
    "skipped_lines" counts lines that are not UTF-8 and rows without text, "bytes" the bytes read.

    Raises ValueError for a missing text column, a damaged file, or a first row that is not text.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout is {layout!r}: expected one of {', '.join(LAYOUTS)}")
    stats = Counter() if stats is None else stats
    done = 0
    for path in files:
        kind = _kind(path)
        if kind == ".txt":
            yield from _documents_of_txt(path, layout, stats, done)
        else:
            rows = {".jsonl": _rows_of_jsonl, ".csv": _rows_of_csv, ".parquet": _rows_of_parquet}[kind]
            for text in rows(path, text_column, stats, done):
                # JSON can hold half a surrogate pair, which is no character and breaks tokenizers
                text = text.encode("utf-8", "replace").decode("utf-8")
                for first in range(0, len(text), MAX_SIZE):
                    lines = (line.strip() for line in text[first : first + MAX_SIZE].split("\n"))
                    document = [line for line in lines if line]
                    if document:
                        yield document
        done += os.path.getsize(path)
        stats["bytes"] = done


def check_columns(files, text_column):
    """Read the first row of every table, so that a wrong column raises before any work."""
    for path in files:
        if _kind(path) != ".txt":
            next(read_documents([path], text_column=text_column), None)


def _lines(path, stats, done=0):
    """The lines of a file as str with their line ends. Lines that are not UTF-8 are counted and skipped."""
    with open(path, "rb") as raw:
        file = gzip.open(raw) if path.lower().endswith(".gz") else raw  # noqa: SIM115
        try:
            first = True
            while line := file.readline(MAX_SIZE):
                # a long line is not cut within a character
                if len(line) == MAX_SIZE:
                    while len(line) < MAX_SIZE + 3 and b"\x80" <= file.peek(1)[:1] < b"\xc0":
                        line += file.read(1)
                stats["bytes"] = done + raw.tell()
                try:
                    text = line.decode("utf-8-sig" if first else "utf-8")
                except UnicodeDecodeError:
                    stats["skipped_lines"] += 1
                    continue
                finally:
                    first = False
                yield text
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise ValueError(f"{path} is not a whole gzip file: {error}") from None


def _documents_of_txt(path, layout, stats, done):
    if layout == "auto":
        layout = _detect_layout(path)
    document, size = [], 0
    for line in _lines(path, stats, done):
        line = line.strip()
        if line:
            document.append(line)
            size += len(line)
        if document and (layout == "line" or not line or size >= MAX_SIZE):
            yield document
            document, size = [], 0
    if document:
        yield document


def _detect_layout(path):
    text, blank = False, False
    for line in _lines(path, Counter()):
        if line.strip():
            if blank:
                return "blank-line"
            text = True
        else:
            blank = text
    return "line"


def _missing(path, column, columns):
    return ValueError(f"{path} has no column {column!r}: it has {', '.join(map(repr, columns)) or 'none'}")


def _rows_of_jsonl(path, column, stats, done):
    first = True
    for line in _lines(path, stats, done):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if first:
            if not isinstance(row, dict):
                raise ValueError(f"{path} does not begin with a JSON object on one line: {line.strip()[:40]!r}")
            if column not in row:
                raise _missing(path, column, row)
            first = False
        text = row.get(column) if isinstance(row, dict) else None
        if isinstance(text, str):
            yield text
        else:
            stats["skipped_lines"] += 1


def _rows_of_csv(path, column, stats, done):
    # the default of 128 KB is less than a long article
    csv.field_size_limit(MAX_SIZE)
    rows = csv.DictReader(_lines(path, stats, done))
    try:
        if column not in (rows.fieldnames or ()):
            raise _missing(path, column, rows.fieldnames or ())
        for row in rows:
            # a row with too few fields
            if row[column] is None:
                stats["skipped_lines"] += 1
            else:
                yield row[column]
    except csv.Error as error:
        raise ValueError(f"{path} line {rows.line_num} is not CSV: {error}") from None


def _rows_of_parquet(path, column, stats, done):
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise ValueError(f"{path}: reading .parquet needs pyarrow (pip install pyarrow)") from None
    try:
        with pq.ParquetFile(path) as file:
            names = file.schema_arrow.names
            if column not in names:
                raise _missing(path, column, names)
            kind = file.schema_arrow.field(column).type
            kind = kind.value_type if pa.types.is_dictionary(kind) else kind
            if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)):
                raise ValueError(f"{path}: column {column!r} holds {kind}: expected text")
            read, size = 0, os.path.getsize(path)
            for batch in file.iter_batches(batch_size=256, columns=[column]):
                read += batch.num_rows
                stats["bytes"] = done + size * read // file.metadata.num_rows
                for text in batch.column(0):
                    if text.is_valid:
                        yield text.as_py()
                    else:
                        stats["skipped_lines"] += 1
    except (pa.ArrowInvalid, OSError) as error:
        raise ValueError(f"{path} is not a whole parquet file: {str(error).splitlines()[0]}") from None
