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
import re
from collections import Counter
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from ..files import inside, lock, read_json, sha256, write
from .text import LAYOUTS, check_columns, expand, read_documents
from .threads import ordered_map
from .tokenizer import load_tokenizer, save_tokenizer, special_ids, tokenizer_hash

FORMAT = 1
PARTS = ("tokens", "sentences", "documents")
# a rough rule is enough: these borders only say where a pair of segments may be split
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+")


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
):
    """Tokenise text files into shards of about `shard_tokens` tokens under `output_dir`; returns the manifest, a dict.

    files: files, folders or globs. text_column, layout: as in `read_documents`. num_workers: threads that tokenise, by
    default one per available core; the tokenizers library releases Python's lock. The shards do not depend on it.

    The same call continues after an interruption, and returns at once after a finished one. Words like [MASK] in the
    text never become special tokens.

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
    stat = [os.stat(file) for file in files]
    work = {
        "format": FORMAT,
        "tokenizer": tokenizer_hash(tokenizer),
        "files": [[os.path.realpath(file), s.st_size, s.st_mtime_ns] for file, s in zip(files, stat, strict=True)],
        "text_column": text_column,
        "layout": layout,
        "shard_tokens": shard_tokens,
    }
    with lock(directory):
        manifest = _started(directory, work)
        if manifest is None:
            _write_json(directory / "work.json", work)
            save_tokenizer(tokenizer, directory)
            manifest = _prepare(files, tokenizer, directory, work, num_workers, progress)
            _write_json(directory / "manifest.json", manifest)
        for leftover in (*directory.glob("shard-*.json"), *directory.glob("*.tmp"), directory / "work.json"):
            leftover.unlink(missing_ok=True)
    return manifest


def _started(directory, work):
    """The manifest if `work` is already done, None if not."""
    for name in ("manifest.json", "work.json"):
        if (directory / name).exists():
            there = read_json(directory / name)
            other = [key for key in work if there.get(key) != work[key]]
            if other and name == "work.json" and not any(directory.glob("shard-*.json")):
                # the other preparation has no shard yet
                return None
            if other:
                raise ValueError(
                    f"{directory} holds another preparation (different: {', '.join(other)}): "
                    "choose another directory or delete this one"
                )
            return there if name == "manifest.json" else None
    if (directory / "tokenizer.json").exists() and tokenizer_hash(load_tokenizer(directory)) != work["tokenizer"]:
        raise ValueError(f"{directory} holds another tokenizer: choose another directory")
    return None


def _prepare(files, tokenizer, directory, work, num_workers, progress):
    encoder = _Encoder(tokenizer)
    if num_workers is None:
        num_workers = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    stats = Counter()
    documents = read_documents(files, text_column=work["text_column"], layout=work["layout"], stats=stats)
    # a unit is the text of about 2^18 letters, less for small shards: a shard consists of whole units
    units = _units(documents, min(1 << 18, 4 * work["shard_tokens"]))

    shards = _finished_shards(directory)
    skipped = shards[-1]["units"] if shards else 0
    tokens = sum(shard["tokens"] for shard in shards)
    total = sum(size for _, size, _ in work["files"])
    with _without_more_threads(), _progress_bar(total, progress) as update:
        for _ in itertools.islice(units, skipped):
            update(stats["bytes"], tokens)
        encoded, done, open_tokens = [], skipped, 0
        for unit in ordered_map(encoder, units, num_workers):
            encoded.append(unit)
            done += 1
            open_tokens += len(unit[0])
            if open_tokens >= work["shard_tokens"]:
                shards.append(_write_shard(directory, len(shards), encoded, done))
                tokens, encoded, open_tokens = tokens + open_tokens, [], 0
            update(stats["bytes"], tokens + open_tokens)
        if open_tokens:
            shards.append(_write_shard(directory, len(shards), encoded, done))
    if not shards:
        skipped_lines = f": {stats['skipped_lines']} lines are not UTF-8 text" if stats["skipped_lines"] else ""
        raise ValueError(f"{files[0]}{' and the other files' if len(files) > 1 else ''} gave no tokens{skipped_lines}")
    counts = {part: sum(shard[part] for shard in shards) for part in ("documents", "sentences", "tokens")}
    for shard in shards:
        del shard["units"]
    return {
        **work,
        **counts,
        "skipped_lines": stats["skipped_lines"],
        "vocab_size": tokenizer.get_vocab_size(),
        "dtype": encoder.dtype.name,
        "shards": shards,
    }


class _Encoder:
    """Tokenises a unit (a list of documents, each a list of lines) into arrays. Safe to call from many threads."""

    def __init__(self, tokenizer):
        # a copy: the caller's tokenizer keeps its settings
        self.tokenizer = Tokenizer.from_str(tokenizer.to_str())
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        # "[MASK]" in a text is split like any other word; this setting is not part of the JSON
        self.tokenizer.encode_special_tokens = True
        self.dtype = np.dtype(np.uint16 if tokenizer.get_vocab_size() <= 1 << 16 else np.uint32)

    def __call__(self, unit):
        """(tokens, tokens per sentence, sentences per document), without empty ones."""
        sentences = [[s for line in document for s in _SENTENCE_END.split(line)] for document in unit]
        encodings = self.tokenizer.encode_batch_fast(list(itertools.chain(*sentences)), add_special_tokens=False)
        ids = [encoding.ids for encoding in encodings]
        lengths = np.fromiter(map(len, ids), np.int64, len(ids))
        tokens = np.fromiter(itertools.chain.from_iterable(ids), self.dtype, lengths.sum())
        document = np.repeat(np.arange(len(unit)), [len(s) for s in sentences])[lengths > 0]
        counts = np.bincount(document, minlength=len(unit))
        return tokens, lengths[lengths > 0], counts[counts > 0]


def _units(documents, letters):
    unit, size = [], 0
    for document in documents:
        unit.append(document)
        size += sum(map(len, document))
        if size >= letters:
            yield unit
            unit, size = [], 0
    if unit:
        yield unit


@contextlib.contextmanager
def _without_more_threads():
    """Our threads use all cores already: the tokenizers library must not start more in each of them."""
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ["TOKENIZERS_PARALLELISM"]
        else:
            os.environ["TOKENIZERS_PARALLELISM"] = before


@contextlib.contextmanager
def _progress_bar(total, show):
    """Yields update(bytes, tokens)."""
    if not show:
        yield lambda done, tokens: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (
        TextColumn("tokenising"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TextColumn("{task.fields[tokens]:,} tokens"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("", total=total, tokens=0)
        yield lambda done, tokens: bar.update(task, completed=done, tokens=tokens)


def _write_shard(directory, number, encoded, units):
    tokens, sentences, documents = (np.concatenate(arrays) for arrays in zip(*encoded, strict=True))
    record = {
        "name": f"shard-{number:05d}",
        "documents": len(documents),
        "sentences": len(sentences),
        "tokens": len(tokens),
        "sha256": {},
        "units": units,
    }
    starts = [np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]) for lengths in (sentences, documents)]
    for part, array in zip(PARTS, (tokens, *starts), strict=True):
        file = io.BytesIO()
        np.save(file, array)
        record["sha256"][part] = hashlib.sha256(file.getbuffer()).hexdigest()
        write(_part(directory, record, part), file.getbuffer())
    # the record marks the shard as complete, so it comes last
    _write_json(directory / f"{record['name']}.json", record)
    return record


def _finished_shards(directory):
    """The records of the complete shards of an interrupted call, up to the first that is incomplete."""
    records = []
    while (path := directory / f"shard-{len(records):05d}.json").exists():
        try:
            record = read_json(path)
            for part in PARTS:
                _check_sha256(directory, record, part)
        except (ValueError, KeyError):
            break
        records.append(record)
    return records


def _part(directory, record, part):
    return inside(directory, f"{record['name']}.{part}.npy")


def _check_sha256(directory, record, part):
    path = _part(directory, record, part)
    try:
        found = sha256(path)
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    if found != record["sha256"][part]:
        raise ValueError(f"{path} is damaged: its sha256 differs from the manifest; prepare the data again")


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

    @classmethod
    def open(cls, directory, verify=False):
        """Open what `prepare` wrote. verify=True compares every file with its sha256.

        Raises FileNotFoundError without a manifest (not finished, or another directory), ValueError for damaged or
        missing shards or for a tokenizer that the shards were not made with.
        """
        directory = Path(directory)
        if not (directory / "manifest.json").is_file():
            raise FileNotFoundError(f"{directory} holds no finished shards: there is no manifest.json (run prepare)")
        manifest = read_json(directory / "manifest.json")
        if manifest.get("format") != FORMAT:
            raise ValueError(f"{directory / 'manifest.json'} has format {manifest.get('format')}: expected {FORMAT}")
        try:
            parts = [[cls._open(directory, record, part, verify) for record in manifest["shards"]] for part in PARTS]
            tokenizer = load_tokenizer(directory)
            if tokenizer_hash(tokenizer) != manifest["tokenizer"]:
                raise ValueError(f"{directory} holds another tokenizer than the one its shards were made with")
        except KeyError as error:
            raise ValueError(f"{directory / 'manifest.json'} has no {error}: it is damaged") from None
        return cls(directory, manifest, tokenizer, parts)

    @staticmethod
    def _open(directory, record, part, verify):
        path = _part(directory, record, part)
        if verify:
            _check_sha256(directory, record, part)
        try:
            array = np.load(path, mmap_mode="r")
        except (OSError, ValueError, EOFError) as error:
            raise ValueError(f"{path} is missing or damaged: {error}") from None
        if len(array) != record[part] + (part != "tokens"):
            raise ValueError(f"{path} has {len(array)} entries, not as many as the manifest says: it is damaged")
        return array

    def document_starts(self):
        """int64 [documents + 1]: the index of each document's first token, and the end."""
        starts = [
            first + np.asarray(sentences)[documents[:-1]]
            for first, sentences, documents in zip(self.first_token, self.sentences, self.documents, strict=False)
        ]
        return np.concatenate([*starts, self.first_token[-1:]])
