"""Tables: rows of .csv, .tsv, .jsonl, .json and .parquet files, one at a time.

    .csv       quoted, with a header line
    .tsv       split at tabs, with a header line; quoted only where the whole file parses so
    .jsonl     one JSON object per line; .json the same, or one array of objects
    .parquet   as .jsonl
    .gz        of all but .parquet

Text is read as in text.py: UTF-8 with or without a mark, UTF-16 or UTF-32; lines end at \\n or \\r\\n alone. A value of
.csv and .tsv is text, whatever it looks like.
"""

import csv
import functools
import itertools
import json
import os
from collections import Counter

from .text import MAX_SIZE, numbered_lines

KINDS = (".csv", ".tsv", ".jsonl", ".json", ".parquet")


def kind(path):
    """The file's type, its suffix without .gz."""
    stem, suffix = os.path.splitext(os.fspath(path).lower())
    return os.path.splitext(stem)[1] if suffix == ".gz" else suffix


def lines(path):
    """(number from 1, line without its end) of a text file. Raises ValueError for a line that is not valid text."""
    stats, last = Counter(), 0
    for number, line in numbered_lines(os.fspath(path), stats):
        if stats["skipped_lines"]:
            raise ValueError(f"{path} line {last + 1} is not valid text: expected UTF-8")
        last = number
        yield number, line.removesuffix("\n").removesuffix("\r")
    if stats["skipped_lines"]:
        raise ValueError(f"{path} line {last + 1} is not valid text: expected UTF-8")


def columns(path):
    """The names of the columns; of a .jsonl those of the first row. Raises ValueError for a file without a row."""
    if kind(path) in (".csv", ".tsv"):
        return _header(path, _records(path, is_quoted(path)))
    row = next(rows(path), None)
    if row is None:
        raise ValueError(f"{path} has no rows")
    return [*row[1]]


def rows(path, skip=None, *, names=None, quoted=None):
    """Yields (line, {column: value}) for each row; in a .parquet or an array the number of the row, from 1.

    skip: called with (line, why) for each row with too few or too many columns; without it such a row is an error.
    names: the columns of a .tsv that has no header line. quoted: whether quotes around a cell of .csv or .tsv are no
    part of it, see `is_quoted`. Raises ValueError with file and line for what cannot be read.
    """
    path, what = os.fspath(path), kind(path)
    if what in (".csv", ".tsv"):
        yield from _cells(path, skip, names, is_quoted(path) if quoted is None else quoted)
    elif what in (".jsonl", ".json"):
        yield from _objects(path)
    elif what == ".parquet":
        yield from _parquet(path)
    else:
        raise ValueError(f"{path} has an unknown type: expected {', '.join(KINDS)} (or .gz of all but the last)")


def is_quoted(path):
    """Whether quotes around a cell are no part of it: always in a .csv, never in a .tsv unless all its rows say so."""
    if kind(path) == ".csv":
        return True
    stat = os.stat(path)
    return _is_quoted(os.fspath(path), stat.st_size, stat.st_mtime_ns)


# a run asks several times, and it takes a reading of the whole file; `size` and `time` tell whether it changed
@functools.lru_cache(64)
def _is_quoted(path, size, time):
    # a quote inside a cell is a letter for either way of reading
    if not any(line[0] == '"' or '\t"' in line for _, line in lines(path) if line):
        return False
    try:
        records = _records(path, True)
        width = len(_header(path, records))
        return all(len(cells) == width for _, cells in records)
    except ValueError:
        return False


def _cells(path, skip, names, quoted):
    records = _records(path, quoted)
    header = names or _header(path, records)
    if names is None and (twice := [name for name in header if header.count(name) > 1]):
        raise ValueError(f"{path} has two columns named {twice[0]!r}")
    for number, cells in records:
        if len(cells) == len(header):
            yield number, dict(zip(header, cells, strict=True))
            continue
        why = f"{len(cells)} columns, the header has {len(header)}"
        if skip is None or kind(path) == ".csv" and len(cells) > len(header):
            hint = ": text with commas needs quotes around it" if kind(path) == ".csv" else ""
            raise ValueError(f"{path} line {number} has {why}{hint}")
        skip(number, why)


def _header(path, records):
    _, cells = next(records, (0, None))
    if cells is None:
        raise ValueError(f"{path} is empty")
    return cells


def _records(path, quoted):
    """(line, cells) of each row, the header first. Blank lines are left out."""
    split = "," if kind(path) == ".csv" else "\t"
    number = 0
    if not quoted:
        for number, line in lines(path):
            if line:
                yield number, line.split(split)
        return

    def source():
        nonlocal number
        for number, line in numbered_lines(os.fspath(path), stats):
            if stats["skipped_lines"]:
                raise ValueError(f"{path} line {number - 1} is not valid text: expected UTF-8")
            yield line

    stats, start = Counter(), 1
    # the default of 128 KB is less than a long article
    csv.field_size_limit(MAX_SIZE)
    # strict: a quote that is never closed is an error, not a field with the rest of the file
    reader = csv.reader(source(), delimiter=split, strict=True)
    try:
        for cells in reader:
            if cells:
                yield start, cells
            start = number + 1
    except csv.Error as error:
        raise ValueError(f"{path} line {start} is not CSV, or a quote is never closed: {error}") from None


def _objects(path):
    source = lines(path)
    if kind(path) == ".json":
        first = next(((number, line) for number, line in source if line.strip()), (1, ""))
        if first[1].lstrip().startswith("["):
            text = "\n".join(line for _, line in itertools.chain([first], source))
            yield from enumerate(_list(path, text), 1)
            return
        source = itertools.chain([first], source)
    for number, line in source:
        if line.strip():
            yield number, _object(path, number, line)


def _object(path, number, line):
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        row = None
    if not isinstance(row, dict):
        raise ValueError(f"{path} line {number} is not a JSON object on one line: {line.strip()[:40]!r}")
    return row


def _list(path, text):
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {str(error).partition(chr(10))[0]}") from None
    if not all(isinstance(row, dict) for row in found):
        raise ValueError(f"{path} is not an array of JSON objects")
    return found


def _parquet(path):
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise ValueError(f"{path}: reading .parquet needs pyarrow (pip install pyarrow)") from None
    try:
        with pq.ParquetFile(path, buffer_size=1 << 20) as file:
            names = file.schema_arrow.names
            if twice := [name for name in names if names.count(name) > 1]:
                raise ValueError(f"{path} has two columns named {twice[0]!r}")
            found = (row for batch in file.iter_batches(batch_size=1024) for row in batch.to_pylist())
            yield from enumerate(found, 1)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{path} is not a whole parquet file: {reason}") from None
