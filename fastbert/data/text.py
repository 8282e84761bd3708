"""Raw text files to documents. A document is a list of non-empty lines. Nothing larger is in memory.

    .txt      documents with blank lines between them, or one document per line
    .jsonl    one JSON object per line
    .csv      with a header line
    .parquet  as .jsonl and .csv: one document per row, in a text column
    .gz       of .txt, .jsonl and .csv

Text is UTF-8, or UTF-16 or UTF-32 where a byte-order mark or the NULs between its letters show it. Lines that are not
valid and rows without text are counted and skipped; a file that is not valid in most of its first lines is refused.
A document of more than MAX_SIZE letters is cut at a blank, and the rest, which begins with this blank, is another
document: memory stays bounded. A row of a table may have MAX_ROW letters.
"""

import codecs
import contextlib
import csv
import glob
import gzip
import io
import json
import os
import re
import zlib
from collections import Counter

# letters of a document, of a line of a table, and of a word
MAX_SIZE, MAX_ROW = 1 << 22, 1 << 24
MAX_WORD = 1 << 20
_SHORTER = f"expected at most {MAX_ROW:,} letters; lines of a .txt file may be longer"
KINDS = (".txt", ".jsonl", ".csv", ".parquet")
LAYOUTS = ("auto", "blank-line", "line")
_OF_MODELS = ("vocab.txt", "merges.txt", "metrics.jsonl")

# what separates words for every tokenizer: some remove other blanks, which joins the words beside them; and letters
# each of which is a word
BLANKS, IDEOGRAPHS = " \t\r\u00a0\u3000", "\u3400-\u9fff\uf900-\ufaff"
# each ends, being greedy, at the last place of its kind: a single blank within a sentence, any blank, ideographs
_CUTS = [
    re.compile(rf"(?s).*[^{BLANKS}.!?](?=[{BLANKS}][^{BLANKS}])"),
    re.compile(rf"(?s).*[^{BLANKS}](?=[{BLANKS}])"),
    re.compile(rf"(?s).*[{IDEOGRAPHS}](?=[{IDEOGRAPHS}])"),
]
_WORD_END = re.compile(rf"(?s).*[{BLANKS}{IDEOGRAPHS}]")
# UTF-32's mark begins with UTF-16's
_MARKS = [
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
]


class Part(str):
    """A part of a line of more than MAX_SIZE letters."""

    # whether it continues the part before, whether the next one continues it, and the line's file and number
    follows, goes_on, place = False, False, ""

    @classmethod
    def of(cls, text, **facts):
        part = cls(text)
        vars(part).update(facts)
        return part


def _kind(path):
    """The file's type, one of KINDS, without .gz; None for other types."""
    stem, suffix = os.path.splitext(path.lower())
    if suffix == ".gz":
        suffix = os.path.splitext(stem)[1]
        return suffix if suffix in KINDS[:3] else None
    return suffix if suffix in KINDS else None


def expand(paths):
    """The text files of `paths` (files, folders with their subfolders, globs), each once, folders in sorted order.

    In folders and globs, files without text or of an unknown type, hidden ones, dangling links, and the vocabulary and
    log beside a tokenizer.json are skipped; at least one file must have text. Raises FileNotFoundError for a path that
    does not exist, ValueError for a named file that is empty, has only blank lines or is of an unknown type.
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
                raise ValueError(f"{path} holds no text: {why_skipped(stats) or 'it is empty or has only blank lines'}")
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
        found = [file for file in found if _kind(file) and os.path.isfile(file) and not _is_of_a_model(file)]
        found = [file for file in found if _has_text(file, Counter())]
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
    found = []
    for root, folders, names in os.walk(folder):
        # os.walk descends into what is left in this list, in its order
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        found += [os.path.join(root, name) for name in sorted(names) if not name.startswith(".")]
    return found


def _is_of_a_model(path):
    """Whether a file is a vocabulary or a log in the directory of a tokenizer, a model or a run."""
    folder, name = os.path.split(path)
    return name in _OF_MODELS and os.path.exists(os.path.join(folder, "tokenizer.json"))


def _has_text(path, stats):
    if _kind(path) == ".parquet":
        return os.path.getsize(path) > 0
    return any(line.strip() for _, line in numbered_lines(path, stats))


def why_skipped(stats):
    """What the counters of `read_documents` say was skipped, in words; empty if nothing was."""
    without = stats["no_text"]
    counts = {"lines are not valid text": stats["skipped_lines"] - without, "rows have no text": without}
    return ", ".join(f"{count:,} {what}" for what, count in counts.items() if count)


def read_documents(files, *, text_column="text", layout="auto", stats=None):
    """Iterate over the documents of `files` (from `expand`), each a list of stripped, non-empty lines.

    layout, for .txt files: "blank-line" (blank lines between documents), "line" (one document per line), or "auto":
    blank-line if the file has a blank line between two lines of text, else line. stats: a collections.Counter;
    "skipped_lines" counts invalid lines and rows without text, "no_text" the latter alone, "bytes" the bytes read.

    Raises ValueError, with file and line, for a missing text column, a damaged file, a file that changes while it is
    read, a first row that is not text, a CSV row with more fields than the header, or a word of more than MAX_WORD
    letters.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout is {layout!r}: expected one of {', '.join(LAYOUTS)}")
    stats = Counter() if stats is None else stats
    done = 0
    for path in files:
        kind, size = _kind(path), os.path.getsize(path)
        if kind == ".txt":
            yield from _grouped(numbered_lines(path, stats, done), _detect_layout(path) if layout == "auto" else layout)
        else:
            rows = {".jsonl": _rows_of_jsonl, ".csv": _rows_of_csv, ".parquet": _rows_of_parquet}[kind]
            for number, text in rows(path, text_column, stats, done):
                # JSON can hold half a surrogate pair, which is no character and breaks tokenizers
                text = text.encode("utf-8", "replace").decode("utf-8")
                lines = ((n, part) for n, line in enumerate(text.split("\n")) for part in _parts(path, number, line))
                yield from _grouped(lines, "row")
        if os.path.getsize(path) != size:
            raise ValueError(f"{path} changed while it was read: from {size:,} to {os.path.getsize(path):,} bytes")
        done += size
        stats["bytes"] = done


def check_columns(files, text_column):
    """Read the first row of every table, so that a wrong column raises before any work."""
    for path in files:
        if _kind(path) != ".txt":
            next(read_documents([path], text_column=text_column), None)


def _encoding(path):
    """(encoding, how it treats errors) of a text file. An invalid line then has half a surrogate pair."""
    with _opened(path) as (_, file):
        start = file.read(1 << 12)
    mark = next((name for mark, name in _MARKS if start.startswith(mark)), None)
    if mark or 0 not in start:
        # the last line may be cut
        lines = [line for line in start.split(b"\n")[:-1] if not line.isascii()]
        wrong = sum(not _is_valid(line.decode("utf-8", "surrogateescape")) for line in lines)
        if not mark and 2 * wrong > start.count(b"\n") > wrong:
            raise ValueError(
                f"{path} is not UTF-8: {wrong} of its first {start.count(10)} lines are not. Expected UTF-8, UTF-16 or "
                "UTF-32; iconv converts others, such as Latin-1"
            )
        return (mark, "surrogatepass") if mark else ("utf-8-sig", "surrogateescape")
    # the share of NULs at every fourth byte; in UTF-16 a letter's low byte is rarely NUL, its high byte often
    zeros = [start[i::4].count(0) / len(start[i::4] or b"1") for i in range(4)]
    for name, high, low in (
        ("utf-32-le", min(zeros[2:]), max(zeros[:1])),
        ("utf-32-be", min(zeros[:2]), max(zeros[3:])),
        ("utf-16-le", min(zeros[1::2]), max(zeros[0::2])),
        ("utf-16-be", min(zeros[0::2]), max(zeros[1::2])),
    ):
        if high > (0.9 if "32" in name else 0.05) and low < high / 2:
            return name, "surrogatepass"
    if max(zeros) > 0.1:
        raise ValueError(f"{path} is not text: {start.count(0) / len(start):.0%} of its first bytes are NUL")
    return "utf-8", "surrogateescape"


@contextlib.contextmanager
def _opened(path):
    """(the file, its unpacked content), both binary."""
    try:
        with open(path, "rb") as raw:
            yield raw, gzip.GzipFile(fileobj=raw) if path.lower().endswith(".gz") else raw
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path} is not a whole gzip file: {error}") from None


def numbered_lines(path, stats, done=0):
    """(number, line with its end) of a text file, without invalid lines, which are counted.

    A line of a .txt file of more than MAX_SIZE letters comes in parts, which share its number.
    """
    parts, limit = (_parts, MAX_SIZE) if _kind(path) == ".txt" else (_whole, MAX_ROW)
    short = min(MAX_WORD, limit)
    encoding, errors = _encoding(path)
    with _opened(path) as (raw, file):
        text = io.TextIOWrapper(file, encoding, errors, newline="\n")
        number, line = 1, ""
        while True:
            try:
                more = text.readline(MAX_WORD)
            except UnicodeDecodeError as error:
                raise ValueError(f"{path} line {number} is not {encoding.upper()}: {error.reason}") from None
            stats["bytes"] = done + raw.tell()
            line += more
            at_end = not more or more.endswith("\n")
            if not at_end and len(line) <= limit:
                continue
            ready = [line] if len(line) <= short else list(parts(path, number, line))
            line = "" if at_end else ready.pop()
            for part in ready:
                if _is_valid(part):
                    yield number, part
                else:
                    stats["skipped_lines"] += 1
            if not more:
                return
            number += at_end


def _is_valid(line):
    try:
        return line.isascii() or bool(line.encode())
    except UnicodeEncodeError:
        return False


def _whole(path, number, line):
    if len(line) > MAX_ROW:
        raise ValueError(f"{path} line {number} has more than {MAX_ROW:,} letters: {_SHORTER}")
    return [line]


def _parts(path, number, line):
    """The parts of a line that documents may have. Raises ValueError for a word that is too long."""
    place = f"{path} {'row' if _kind(path) == '.parquet' else 'line'} {number}"
    if _has_long_word(line):
        raise ValueError(f"{place} has a word of more than {MAX_WORD:,} letters: expected blanks")
    *parts, last = cut_line(line, MAX_SIZE)
    return [*(Part.of(part, goes_on=True, place=place) for part in parts), last]


def _has_long_word(line):
    start = 0
    while len(line) - start > MAX_WORD:
        # the last end of a word among as many letters as a word may have, and one more
        found = _WORD_END.match(line, start, start + MAX_WORD + 1)
        if not found:
            return True
        start = found.end()
    return False


def cut_line(line, size):
    """Yields parts of a line of at most `size` letters, each but the first with the blank it begins with."""
    start = 0
    while len(line) - start > size:
        found = (cut.match(line, start, start + size) for cut in _CUTS)
        end = next((match.end() for match in found if match), start + size)
        yield line[start:end]
        start = end
    yield line[start:]


def _grouped(lines, layout):
    """Documents of (number, line). layout "row": all lines are one document, as far as MAX_SIZE allows."""
    document, size, before = [], 0, None
    for number, line in lines:
        part = line if isinstance(line, Part) else Part()
        follows = number == before
        # where a line was cut it keeps its blanks
        line = line if follows else line.lstrip()
        line = line if part.goes_on else line.rstrip()
        if follows or part.goes_on:
            line = Part.of(line, follows=follows, goes_on=part.goes_on, place=part.place)
        if line.strip():
            before = number
            document.append(line)
            size += len(line)
        if document and (layout == "line" or size >= MAX_SIZE or (not line and not follows and layout == "blank-line")):
            yield document
            document, size = [], 0
    if document:
        yield document


def _detect_layout(path):
    text, blank = False, False
    for _, line in numbered_lines(path, Counter()):
        if line.strip():
            if blank:
                return "blank-line"
            text = True
        else:
            blank = text
    return "line"


def _missing(path, column, columns):
    if column in columns:
        return ValueError(f"{path} has {columns.count(column)} columns named {column!r}: expected one")
    return ValueError(f"{path} has no column {column!r}: it has {', '.join(map(repr, columns)) or 'none'}")


def _rows_of_jsonl(path, column, stats, done):
    first = True
    for number, line in numbered_lines(path, stats, done):
        if not line.strip():
            continue
        try:
            # Python refuses an int of thousands of digits
            row = json.loads(line, parse_int=float)
        except (ValueError, RecursionError):
            row = None
        if first:
            if not isinstance(row, dict):
                raise ValueError(f"{path} does not begin with a JSON object on one line: {line.strip()[:40]!r}")
            if column not in row:
                raise _missing(path, column, list(row))
            first = False
        text = row.get(column) if isinstance(row, dict) else None
        if isinstance(text, str):
            yield number, text
        else:
            # a row without text, or an invalid line
            stats["skipped_lines"] += 1
            stats["no_text"] += isinstance(row, dict)


def _rows_of_csv(path, column, stats, done):
    # the default of 128 KB is less than a long article
    csv.field_size_limit(MAX_ROW)
    number = 0

    def lines():
        nonlocal number
        for number, line in numbered_lines(path, stats, done):  # noqa: B007
            yield line

    # strict: a quote that is never closed is an error, not a field with the rest of the file
    rows = csv.reader(lines(), strict=True)
    start = 1
    try:
        header = next(rows, [])
        if header.count(column) != 1:
            raise _missing(path, column, header)
        place = header.index(column)
        start = number + 1
        for row in rows:
            if any(row[len(header) :]):
                raise ValueError(
                    f"{path} line {start} has {len(row)} fields, the header has {len(header)}: "
                    "text with commas needs quotes around it"
                )
            if len(row) > place:
                yield start, row[place]
            elif row:
                stats["skipped_lines"] += 1
                stats["no_text"] += 1
            start = number + 1
    except csv.Error as error:
        raise ValueError(f"{path} line {start} is not CSV, or a quote is never closed: {error}") from None


def _rows_of_parquet(path, column, stats, done):
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise ValueError(f"{path}: reading .parquet needs pyarrow (pip install pyarrow)") from None
    try:
        # buffered: column chunks may be larger than memory
        with pq.ParquetFile(path, buffer_size=1 << 20) as file:
            names = file.schema_arrow.names
            if names.count(column) != 1:
                raise _missing(path, column, names)
            kind = file.schema_arrow.field(column).type
            kind = kind.value_type if pa.types.is_dictionary(kind) else kind
            if pa.types.is_null(kind):
                raise ValueError(f"{path}: column {column!r} holds no text: all its values are null")
            if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)):
                raise ValueError(f"{path}: column {column!r} holds {kind}: expected text")
            read, size = 0, os.path.getsize(path)
            # a row comes into memory as a whole, and the file says how large a row of each group is on average
            groups = map(file.metadata.row_group, range(file.metadata.num_row_groups))
            columns = ((group.num_rows, group.column(i)) for group in groups for i in range(group.num_columns))
            mean = max(
                (c.total_uncompressed_size / max(n, 1) for n, c in columns if c.path_in_schema == column), default=0
            )
            if mean > 4 * MAX_ROW:
                raise ValueError(f"{path} has rows of {mean:,.0f} bytes: {_SHORTER}")
            rows = int(min(max(MAX_SIZE / (mean + 1), 1), 64))
            for batch in file.iter_batches(batch_size=rows, columns=[column]):
                is_large = batch.nbytes > MAX_ROW
                for number, text in enumerate(batch.column(0), read + 1):
                    # before it is a str, where every letter may take the 4 bytes of the longest
                    stored = getattr(text, "value", text).as_buffer() if is_large and text.is_valid else b""
                    if len(stored) > 4 * MAX_ROW:
                        raise ValueError(f"{path} row {number} has {len(stored):,} bytes: {_SHORTER}")
                    try:
                        text = text.as_py()
                    except UnicodeDecodeError:
                        stats["skipped_lines"] += 1
                        continue
                    if text is None:
                        stats["skipped_lines"] += 1
                        stats["no_text"] += 1
                    elif len(text) > MAX_ROW:
                        raise ValueError(f"{path} row {number} has {len(text):,} letters: {_SHORTER}")
                    else:
                        yield number, text
                read += batch.num_rows
                stats["bytes"] = done + size * read // file.metadata.num_rows
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{path} is not a whole parquet file: {reason}") from None
