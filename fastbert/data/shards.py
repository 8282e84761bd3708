"""Text to token shards: numpy memory maps and a manifest. Text and tokens may be far larger than memory.

A directory of shards has three .npy files per shard

    shard-00000.tokens.npy      uint16 or uint32: the tokens of all documents, without special tokens
    shard-00000.sentences.npy   int64: index of each sentence's first token, and the end
    shard-00000.documents.npy   int64: index of each document's first sentence, and the end

besides manifest.json (counts, sha256 of every file, the tokenizer's hash, the text files) and the tokenizer.
"""

import contextlib
import hashlib
import io
import itertools
import json
import os
import warnings
from collections import Counter
from pathlib import Path

import numpy as np

from ..files import is_sha256, lock, read_json, sha256, write
from .encoding import dtype_of, encoded_units
from .text import LAYOUTS, check_columns, expand, read_documents, why_skipped
from .threads import ordered_map
from .tokenizer import load_tokenizer, save_tokenizer, special_ids, tokenizer_hash, vocabulary_size

FORMAT = 1
PARTS = ("tokens", "sentences", "documents")


def prepare(
    files,
    tokenizer,
    output_dir,
    *,
    text_column="text",
    layout="auto",
    shard_tokens=1 << 24,
    num_workers=None,
    progress=True,
    verify=True,
):
    """Tokenise text files into shards of about `shard_tokens` tokens under `output_dir`; returns the manifest, a dict.

    files: files, folders or globs. text_column, layout: as in `read_documents`. num_workers: threads that tokenise, by
    default one per available core; the tokenizers library releases Python's lock. The shards do not depend on it.
    verify: compare finished shards with their sha256.

    The same call continues after an interruption. After a finished one it makes damaged and missing shards again, with
    a warning that names them. Words like [MASK] in the text never become special tokens.

    Raises ValueError if the directory holds another preparation or another process writes to it, if the text gives no
    tokens, and what `read_documents` raises. Raises OSError if the directory cannot be written.
    """
    files = expand(files)
    if layout not in LAYOUTS:
        raise ValueError(f"layout is {layout!r}: expected one of {', '.join(LAYOUTS)}")
    if shard_tokens < 1:
        raise ValueError(f"shard_tokens is {shard_tokens}: expected at least 1")
    special_ids(tokenizer)
    check_columns(files, text_column)
    directory = Path(output_dir)
    work = {
        "format": FORMAT,
        "tokenizer": tokenizer_hash(tokenizer),
        "files": [_identity(file) for file in files],
        "text_column": text_column,
        "layout": layout,
        "shard_tokens": shard_tokens,
    }
    with lock(directory):
        there = _started(directory, work)
        records = _records(directory, there)
        is_whole = [True] * len(records)
        if verify or "shards" not in there:
            is_whole = [not fault for fault in _faults(directory, records, progress)]
        if "shards" in there and all(is_whole):
            manifest = there
            if not _holds_tokenizer(directory, work["tokenizer"]):
                save_tokenizer(tokenizer, directory)
        else:
            damaged = [record["name"] for record, whole in zip(records, is_whole, strict=True) if not whole]
            if damaged:
                warnings.warn(f"{directory}: damaged or missing, made again: {', '.join(damaged)}", stacklevel=2)
            if there and len(there["files"]) != len(files):
                raise ValueError(f"{directory}: some of the text is gone, so {damaged[0]} cannot be made again")
            if there:
                work["files"] = there["files"]
            else:
                # before they are read, so that a change is noticed
                digests = _digests([row[0] for row in work["files"]], "hashing", progress)
                work["files"] = [[*row, digest] for row, digest in zip(work["files"], digests, strict=True)]
            _write_json(directory / "work.json", work)
            save_tokenizer(tokenizer, directory)
            # earlier versions left the units out of a manifest: then everything is made again
            if not all("units" in record for record in records):
                records = []
            manifest = _prepare(files, tokenizer, directory, work, records, is_whole, num_workers, progress)
            if manifest["shards"][: len(records)] != records:
                # a record was wrong, so what the others say is in doubt
                manifest = _prepare(files, tokenizer, directory, work, [], [], num_workers, progress)
            _write_json(directory / "manifest.json", manifest)
        for leftover in (*directory.glob("shard-*.json"), *directory.glob("*.tmp"), directory / "work.json"):
            leftover.unlink(missing_ok=True)
    return manifest


def _identity(file):
    """[path, size, time of its last change] of a text file."""
    stat = os.stat(file)
    return [os.path.realpath(file), stat.st_size, stat.st_mtime_ns]


def _same_text(recorded, files, finished):
    """Whether text files hold what others held; when `finished`, without those of the others that no longer exist.

    recorded: [path, size, time, sha256] each; earlier versions wrote no sha256.
    """

    def same(old, new):
        return old[:3] == new or (old[1] == new[1] and old[3:] == [sha256(new[0])])

    if finished and len(recorded) != len(files):
        recorded = [row for row in recorded if os.path.exists(row[0])]
    return len(recorded) == len(files) and all(map(same, recorded, files))


def _started(directory, work):
    """manifest.json if `work` is done, work.json if it was begun, {} if not."""
    for name in ("manifest.json", "work.json"):
        path = directory / name
        if not path.exists():
            continue
        there = {}
        try:
            there = read_json(path)
            (_check_manifest if name == "manifest.json" else _check_files)(path, there)
        except ValueError:
            # damaged, but ours
            if there.get("format", FORMAT) == FORMAT and any(directory.glob("shard-*.tokens.npy")):
                continue
            raise
        same = {key: there.get(key) == value for key, value in work.items()}
        same["files"] = _same_text(there["files"], work["files"], name == "manifest.json")
        other = [key for key in work if not same[key]]
        if not other:
            return there
        # another preparation that has no shard yet may go
        if name == "manifest.json" or any(directory.glob("shard-*.json")):
            raise ValueError(
                f"{directory} holds another preparation (different: {', '.join(other)}): "
                "choose another directory or delete this one"
            )
        return {}
    if (directory / "tokenizer.json").exists() and not _holds_tokenizer(directory, work["tokenizer"]):
        raise ValueError(f"{directory} holds another tokenizer: choose another directory")
    return {}


def _holds_tokenizer(directory, expected):
    try:
        return tokenizer_hash(load_tokenizer(directory / "tokenizer.json", as_saved=True)) == expected
    except (ValueError, OSError):
        return False


def _records(directory, there):
    """The records of the shards that were written, from the manifest or, after an interruption, from their files.

    Each has its number of units, without which a shard cannot be made again alone.
    """
    if "shards" in there:
        return there["shards"]
    records = []
    while there and (path := directory / f"shard-{len(records):05d}.json").exists():
        try:
            record = read_json(path)
            _check_record(path, record, len(records))
            _check_units(path, [*records, record])
        except ValueError:
            break
        records.append(record)
    return records


def _prepare(files, tokenizer, directory, work, records, is_whole, num_workers, progress):
    if num_workers is None:
        num_workers = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    stats = Counter()
    documents = read_documents(files, text_column=work["text_column"], layout=work["layout"], stats=stats)
    units = encoded_units(
        documents,
        tokenizer,
        # small shards consist of small units
        unit_letters=min(1 << 18, 4 * work["shard_tokens"]),
        skips=_skips(records, is_whole),
        num_workers=num_workers,
    )
    shards, encoded, tokens, number = [], [], 0, 0
    with _progress_bar("tokenising", progress, sum(row[1] for row in work["files"])) as update:
        for number, unit in enumerate(units, 1):
            if unit is not None:
                encoded.append(unit)
                tokens += len(unit[0])
            size = sum(len(part[0]) for part in encoded)
            if len(shards) < len(records):
                # a wrong record must not make a shard without end
                is_end = number == records[len(shards)]["units"] or size > records[len(shards)]["tokens"]
            else:
                is_end = size >= work["shard_tokens"]
            if is_end:
                shards.append(
                    _write_shard(directory, len(shards), encoded, number) if encoded else records[len(shards)]
                )
                encoded = []
            update(stats["bytes"], f"{tokens:,} tokens")
        if any(len(part[0]) for part in encoded):
            shards.append(_write_shard(directory, len(shards), encoded, number))
    for row in work["files"]:
        if os.path.exists(row[0]) and _identity(row[0]) != row[:3] and len(row) > 3 and sha256(row[0]) != row[3]:
            raise ValueError(f"{row[0]} changed while it was read: prepare it again")
    if not shards:
        why = why_skipped(stats)
        raise ValueError(
            f"{files[0]}{' and the other files' if len(files) > 1 else ''} gave no tokens{why and f': {why}'}"
        )
    counts = {part: sum(shard[part] for shard in shards) for part in ("documents", "sentences", "tokens")}
    return {
        **work,
        **counts,
        "skipped_lines": stats["skipped_lines"],
        "vocab_size": vocabulary_size(tokenizer),
        "dtype": dtype_of(tokenizer).name,
        "shards": shards,
    }


def _skips(records, is_whole):
    """For each unit of the text whether it is in a whole shard."""
    first = 0
    for record, whole in zip(records, is_whole, strict=False):
        yield from itertools.repeat(whole, record["units"] - first)
        first = record["units"]
    yield from itertools.repeat(False)


@contextlib.contextmanager
def _progress_bar(what, show, total):
    """Yields update(bytes done, text)."""
    if not show or not total:
        yield lambda *_: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    console, passes = Console(stderr=True), what != "tokenising"
    # a bar that goes away when it is done leaves an empty line in a log
    if passes and not console.is_terminal:
        yield lambda *_: None
        return
    columns = (
        TextColumn(what),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TextColumn("{task.fields[text]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=passes) as bar:
        task = bar.add_task("", total=total, text="")
        yield lambda done, text: bar.update(task, completed=done, text=text)


def _write_shard(directory, number, encoded, units):
    tokens, sentences, documents = zip(*encoded, strict=True)
    record = {
        "name": f"shard-{number:05d}",
        "documents": sum(map(len, documents)),
        "sentences": sum(map(len, sentences)),
        "tokens": sum(map(len, tokens)),
        "sha256": {},
        "units": units,
    }
    starts = [[np.cumsum(np.concatenate([[0], *lengths]), dtype=np.int64)] for lengths in (sentences, documents)]
    for part, arrays in zip(PARTS, (tokens, *starts), strict=True):
        # as np.save does, without two copies of the arrays
        header, size = io.BytesIO(), sum(map(len, arrays))
        np.lib.format.write_array_header_1_0(
            header, {"descr": arrays[0].dtype.str, "fortran_order": False, "shape": (size,)}
        )
        pieces = [header.getbuffer(), *arrays]
        digest = hashlib.sha256()
        for piece in pieces:
            digest.update(piece)
        record["sha256"][part] = digest.hexdigest()
        write(_path(directory, record, part), pieces)
    # the record marks the shard as complete, so it comes last
    _write_json(directory / f"{record['name']}.json", record)
    return record


def _path(directory, record, part):
    return directory / f"{record['name']}.{part}.npy"


def _digests(paths, what, progress):
    """The sha256 of files, which threads read; None for a file that cannot be read."""
    sizes = [os.path.getsize(path) if os.path.isfile(path) else 0 for path in paths]

    def digest(path):
        try:
            return sha256(path)
        except OSError:
            return None

    found, done = [], 0
    with _progress_bar(what, progress, sum(sizes)) as update:
        for size, value in zip(sizes, ordered_map(digest, paths, min(8, os.cpu_count()))):
            found.append(value)
            done += size
            update(done, f"{len(found)} of {len(paths)} files")
    return found


def _faults(directory, records, progress):
    """What is wrong with each shard's files: one line, or "" for a whole shard."""
    paths = [_path(directory, record, part) for record in records for part in PARTS]
    expected = [record["sha256"][part] for record in records for part in PARTS]
    faults = []
    for path, digest, found in zip(paths, expected, _digests(paths, "verifying", progress), strict=True):
        damage = "is damaged: its sha256 differs from the manifest" if found else "is missing or cannot be read"
        faults.append("" if found == digest else f"{path} {damage}")
    return [next(filter(None, faults[i : i + len(PARTS)]), "") for i in range(0, len(faults), len(PARTS))]


def _check_record(path, record, number):
    """Raises ValueError unless a shard's record, read from `path`, is whole."""
    if not isinstance(record, dict):
        raise ValueError(f"{path} is damaged: the record of shard {number} is no object")
    name = f"shard-{number:05d}"
    # a name that leads out of the directory is not this one either
    if record.get("name") != name:
        raise ValueError(f"{path} names the shard {record.get('name')!r}: expected {name!r}")
    for key in (*PARTS, *({"units"} & record.keys())):
        _check_count(path, record, key)
    digests = record.get("sha256")
    if not isinstance(digests, dict) or not all(is_sha256(digests.get(part)) for part in PARTS):
        raise ValueError(f"{path} is damaged: {name} has no sha256 of its {', '.join(PARTS)}")


def _check_units(path, records):
    """Raises ValueError unless each shard has a unit; earlier versions did not count them."""
    units = [0, *(record["units"] for record in records if "units" in record)]
    if any(end <= start for start, end in itertools.pairwise(units)):
        raise ValueError(f"{path} is damaged: the shards' units are {units[1:]}, expected growing counts")


def _check_count(path, values, key):
    if type(values.get(key)) is not int or not 0 <= values[key] < 1 << 62:
        raise ValueError(f"{path} is damaged: {key} is {values.get(key)!r}, expected a count")


def _check_manifest(path, manifest):
    """Raises ValueError unless a manifest, read from `path`, is whole."""
    if manifest.get("format") != FORMAT:
        raise ValueError(f"{path} has format {manifest.get('format')!r}: expected {FORMAT}")
    _check_files(path, manifest)
    shards = manifest.get("shards")
    if not isinstance(shards, list) or not shards:
        raise ValueError(f"{path} is damaged: it names no shards")
    for number, record in enumerate(shards):
        _check_record(path, record, number)
    _check_units(path, shards)
    for key in (*PARTS, "skipped_lines", "vocab_size", "shard_tokens"):
        _check_count(path, manifest, key)
    for part in PARTS:
        if manifest[part] != (count := sum(record[part] for record in shards)):
            raise ValueError(f"{path} is damaged: {part} is {manifest[part]}, its shards have {count}")
    if not is_sha256(manifest.get("tokenizer")):
        raise ValueError(f"{path} is damaged: tokenizer is {manifest.get('tokenizer')!r}, expected a sha256")


def _check_files(path, values):
    kinds, files = ((str, int, int), (str, int, int, str)), values.get("files")
    if not isinstance(files, list) or not all(
        isinstance(row, list) and tuple(map(type, row)) in kinds for row in files
    ):
        raise ValueError(f"{path} is damaged: files is no list of text files")


def _write_json(path, value):
    write(path, json.dumps(value, indent=1) + "\n")


class Shards:
    """Prepared text, memory-mapped.

    manifest: dict. tokenizer: tokenizers.Tokenizer. tokens, sentences, documents: lists of arrays, one per shard, see
    the module's docstring. Documents and tokens are numbered across all shards: token g is
    `tokens[s][g - first_token[s]]` in its shard s.
    """

    def __init__(self, directory, manifest, tokenizer, parts):
        self.directory, self.manifest, self.tokenizer = directory, manifest, tokenizer
        self.tokens, self.sentences, self.documents = parts
        self.first_token = np.cumsum([0, *map(len, self.tokens)])
        self.vocab_size = vocabulary_size(tokenizer)

    @classmethod
    def open(cls, directory, verify=False, progress=False):
        """Open what `prepare` wrote. verify=True compares every file with its sha256.

        Raises FileNotFoundError without a manifest (not finished, or another directory), ValueError for damaged or
        missing shards or for a tokenizer that the shards were not made with.
        """
        directory = Path(directory)
        path = directory / "manifest.json"
        if not path.is_file():
            raise FileNotFoundError(f"{directory} holds no finished shards: there is no manifest.json (run prepare)")
        manifest = read_json(path)
        _check_manifest(path, manifest)
        if verify:
            fault = next(filter(None, _faults(directory, manifest["shards"], progress)), None)
            if fault:
                raise ValueError(f"{fault}; prepare the data again")
        parts = list(zip(*(cls._open(directory, record) for record in manifest["shards"]), strict=True))
        tokenizer = load_tokenizer(directory, as_saved=True)
        if tokenizer_hash(tokenizer) != manifest["tokenizer"]:
            raise ValueError(f"{directory} holds another tokenizer than the one its shards were made with")
        return cls(directory, manifest, tokenizer, parts)

    @staticmethod
    def _open(directory, record):
        """The three arrays of a shard."""
        arrays = []
        for part in PARTS:
            path = _path(directory, record, part)
            try:
                array = np.lib.format.open_memmap(path, mode="r")
            # NumPy reads the header as Python, whose tokenizer and parser raise errors of their own
            except Exception as error:
                raise ValueError(f"{path} is missing or damaged: {error}") from None
            dtypes = ("uint16", "uint32") if part == "tokens" else ("int64",)
            size = record[part] + (part != "tokens")
            # one bit turns the header's "<u2" into ">u2"
            if array.dtype.name not in dtypes or not array.dtype.isnative or array.shape != (size,):
                raise ValueError(
                    f"{path} has {array.dtype} {array.shape}: the manifest says {size} entries; it is damaged"
                )
            arrays.append(array)
        tokens, sentences, documents = arrays
        for name, starts, end in (("sentences", sentences, len(tokens)), ("documents", documents, len(sentences) - 1)):
            if (starts[0], starts[-1]) != (0, end):
                raise ValueError(f"{_path(directory, record, name)} is damaged: it does not end where the shard does")
        return arrays

    def document_starts(self):
        """int64 [documents + 1]: the index of each document's first token, and the end.

        Raises ValueError for damaged shards, as `tokens_at` does: those that were not verified.
        """
        starts = []
        for s, (sentences, documents) in enumerate(zip(self.sentences, self.documents, strict=True)):
            if not (documents[1:] > documents[:-1]).all():
                raise self.damage(s, "documents", "a document begins before the one that it follows")
            first = np.asarray(sentences)[documents]
            if not (first[1:] > first[:-1]).all():
                raise self.damage(s, "sentences", "a document begins before the one that it follows")
            starts.append(self.first_token[s] + first[:-1])
        return np.concatenate([*starts, self.first_token[-1:]])

    def tokens_at(self, s, places):
        """int64: tokens of shard s."""
        tokens = self.tokens[s][places].astype(np.int64)
        if len(tokens) and tokens.max() >= self.vocab_size:
            raise self.damage(s, "tokens", f"it has a token {tokens.max()}, the vocabulary has {self.vocab_size}")
        return tokens

    def damage(self, s, part, what):
        """The error to raise for shard s."""
        path = _path(self.directory, self.manifest["shards"][s], part)
        return ValueError(f"{path} is damaged: {what}; prepare the data again")
