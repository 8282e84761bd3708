"""What all tasks share: examples, their windows of tokens, packed batches, predictions in the order of the file.

A task is a module with five functions and a constant; see classify.py.

    head(spec)                       (class of the model, fields of its EncoderConfig)
    read(path, spec, notes)          yields the Examples of a file
    encode(examples, pieces, spec)   for each example its Windows
    decode(example, windows, logits, spec)     the prediction: a dict of JSON values
    score(examples, predictions, spec)         figures
    SCORES                           {figure: +1 if higher is better, -1 if lower}, the main one first

Letters: E examples, B windows, T packed tokens, K labels.
"""

import contextlib
import dataclasses
import gc
import json
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Encoding, Tokenizer

from .. import files
from ..data.tokenizer import special_ids
from ..packing import Batch
from .words import Tokens, Words

SPEC = "task.json"
# examples that are read, sorted by length and predicted at a time
CHUNK = 4096


@dataclass(slots=True)
class Example:
    """A row of a file.

    number: its line, or row in a .parquet, from 1. texts: the text, or the pair. gold: what is right, None if unknown.
    more: what else the task needs.
    """

    number: int
    texts: tuple[str, ...]
    gold: Any = None
    id: Any = None
    group: Any = None
    more: dict = field(default_factory=dict)


@dataclass(slots=True)
class Window:
    """A sequence of tokens: a text, a pair, or a part of one that is too long.

    ids, types: token ids, special tokens included, and token types. label: of the sequence: an int, a float, a list of
    floats, a pair of ints. labels: of each token, -100 for none. weight: of its loss. more: what `decode` needs.
    """

    ids: list[int]
    types: list[int]
    label: Any = None
    labels: list[int] | None = None
    weight: float = 1.0
    more: Any = None


@dataclass
class Spec:
    """What a model's directory remembers of its task, in task.json.

    labels: sorted, from the training file alone; None while it is read, () for a task without. columns: the names that
    the task reads. metric: the main score. settings: the task's own, such as thresholds.
    """

    task: str
    labels: tuple[str, ...] | None = None
    columns: dict = field(default_factory=dict)
    max_length: int = 128
    stride: int = 32
    truncate: bool = False
    metric: str | None = None
    settings: dict = field(default_factory=dict)

    @cached_property
    def index(self) -> dict[str, int]:
        return {name: i for i, name in enumerate(self.labels)}

    @cached_property
    def _folded(self):
        folded = {}
        for name in self.labels:
            folded.setdefault(name.casefold(), []).append(name)
        return {key: names[0] for key, names in folded.items() if len(names) == 1}

    def alike(self) -> list[str]:
        """The labels that differ from another in case alone."""
        folded = [name.casefold() for name in self.labels]
        return [name for name, one in zip(self.labels, folded) if folded.count(one) > 1] if len(folded) < 1000 else []

    def known(self, name: str) -> str | None:
        """The label called `name`, upper and lower case being the same where no two labels differ in it alone."""
        return name if name in self.index else self._folded.get(name.casefold())

    def save(self, directory) -> None:
        files.write(Path(directory) / SPEC, json.dumps(dataclasses.asdict(self), indent=2, ensure_ascii=False) + "\n")

    @classmethod
    def load(cls, directory) -> "Spec | None":
        """That of a directory, None if it has no task.json. Raises ValueError for a damaged one."""
        path = Path(directory) / SPEC
        if not path.is_file():
            return None
        values = files.read_json(path)
        names = {one.name for one in dataclasses.fields(cls)}
        if not values.keys() <= names or not isinstance(values.get("task"), str):
            raise ValueError(f"{path} cannot be read: expected {', '.join(sorted(names))}")
        if values.get("labels") is not None:
            values["labels"] = tuple(values["labels"])
        return cls(**values)


class Notes:
    """What is wrong with a file: faults, which end the run in one line, and rows that are left out.

    remarks: what else there is to know, with details. labels: the names of all labels seen.
    """

    def __init__(self, path):
        self.path = path
        self.faults, self.skipped, self.remarks, self.labels = [], [], {}, set()

    def bad(self, number, text):
        self.faults.append((number, text))

    def skip(self, number, text):
        self.skipped.append((number, text))

    def remark(self, text, detail=None):
        """Something to know about the file, or about a row that stays: `detail` then says which."""
        self.remarks.setdefault(text, []).append(detail)

    def label(self, name: str, number: int, spec: Spec) -> str | None:
        """The label `name` as the model spells it; None, and a fault, if the model does not know it."""
        self.labels.add(name)
        found = name if spec.labels is None else spec.known(name)
        if found is None:
            shown = ", ".join(map(repr, spec.labels[:8])) + (", ..." if len(spec.labels) > 8 else "")
            self.bad(number, f"the label {name!r} is not one of the model's {len(spec.labels)}: {shown}")
        return found

    def known(self, name: str, number: int, spec: Spec) -> bool:
        return self.label(name, number, spec) is not None

    def check(self):
        """Raises ValueError with the first fault and the number of the others."""
        if self.faults:
            number, text = self.faults[0]
            rest = len(self.faults) - 1
            more = f" (and {rest:,} more bad row{'s' if rest > 1 else ''})" if rest else ""
            raise ValueError(f"{self.path} line {number}: {text}{more}")

    def said(self) -> str | None:
        """The rows that were left out, and remarks, in a line; None if there are none."""
        found = []
        if self.skipped:
            listed = ", ".join(f"{number} ({why})" for number, why in self.skipped[:5])
            more = ", ..." if len(self.skipped) > 5 else ""
            found.append(f"{len(self.skipped):,} rows skipped, lines {listed}{more}")
        for text, details in self.remarks.items():
            shown = ", ".join(details[:3] + ["..."] * (len(details) > 3)) if details[0] else ""
            found.append(f"{text}: {len(details):,}, {shown}" if shown else text)
        return f"{self.path}: {'; '.join(found)}" if found else None


class Pieces:
    """Texts to windows of at most max_length tokens.

    tokenizer: a tokenizers.Tokenizer. stride: tokens that neighbouring windows share. truncate: keep the first window
    of a text alone. truncated, windowed: how many texts were cut, and how many have several windows. lengths:
    {tokens: how many texts or pairs have so many, before any cut}.
    """

    def __init__(self, tokenizer: Tokenizer, spec: Spec):
        # a copy: the caller's tokenizer keeps its settings
        self.tokenizer = Tokenizer.from_str(tokenizer.to_str())
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        # "[SEP]" in a text is split like any other word
        self.tokenizer.encode_special_tokens = True
        self.max_length, self.stride, self.truncate = spec.max_length, spec.stride, spec.truncate
        self.words = Words(self.tokenizer) if Words.fits(self.tokenizer) else None
        self.pad = special_ids(tokenizer).pad
        self.truncated = self.windowed = 0
        self.lengths = Counter()
        room = self.max_length - self.tokenizer.num_special_tokens_to_add(False)
        if not 0 <= self.stride < room:
            raise ValueError(f"--stride is {self.stride}: expected less than a window's {room} tokens of text")

    def encodings(self, texts) -> list[Encoding]:
        """Each text (a string, or a list of words) to an Encoding of all its tokens, without special tokens."""
        texts = [clean(text) if isinstance(text, str) else [clean(word) for word in text] for text in texts]
        split = bool(texts) and not isinstance(texts[0], str)
        return self.tokenizer.encode_batch(texts, is_pretokenized=split, add_special_tokens=False)

    def whole(self, texts: list[tuple[str, ...]]) -> list[list[Encoding | Tokens]]:
        """The windows of each text or pair, with ids and type_ids. Fast where most are not too long."""
        inputs = [tuple(clean(text) for text in one) for one in texts]
        if self.words is None:
            inputs = [one[0] if len(one) == 1 else one for one in inputs]
            encoded = self.tokenizer.encode_batch_fast(inputs)
        else:
            encoded = self.words.encoded(inputs)
        found = []
        for one, encoding in zip(texts, encoded, strict=True):
            if len(encoding) <= self.max_length:
                self.lengths[len(encoding)] += 1
                found.append([encoding])
            else:
                found.append(self.windows(*self.encodings(one)))
        return found

    def windows(self, first: Encoding, second: Encoding | None = None, *, only_second=False) -> list[Encoding]:
        """With special tokens, each at most max_length long. The Encodings given are cut.

        A text alone, or the second with only_second, is cut in windows that overlap; the other pairs are shortened, the
        longer text first, and both keep a token. With only_second, the first text leaves the second half of the room.
        """
        finish = self.tokenizer.post_process
        room = self.max_length - self.tokenizer.num_special_tokens_to_add(second is not None)
        self.lengths[len(first) + len(second or ()) + self.max_length - room] += 1
        if second is None:
            parts = self._parts(first, room)
            return [finish(part) for part in parts]
        if only_second:
            limit = room - min(len(second), room // 2)
            if len(first) > limit:
                self.truncated += 1
                first.truncate(limit)
            return [finish(copied(first), part) for part in self._parts(second, room - len(first))]
        if len(first) + len(second) > room:
            self.truncated += 1
            # as transformers does: the longer one down to the other's length, then both
            ordered = (second, first) if len(first) > len(second) else (first, second)
            short = len(ordered[0]) if 2 * len(ordered[0]) <= room else room // 2
            for encoding, end in zip(ordered, (short, room - short), strict=True):
                encoding.truncate(max(end, 1))
        return [finish(first, second)]

    def said(self) -> str | None:
        """What was too long, in a line; None if nothing was."""
        counts = {"cut": self.truncated, "read in several windows": self.windowed}
        parts = [f"{count:,} {what}" for what, count in counts.items() if count]
        return f"examples of more than {self.max_length} tokens: {', '.join(parts)}" if parts else None

    def _parts(self, encoding, room):
        if len(encoding) <= room:
            return [encoding]
        if self.truncate:
            self.truncated += 1
            encoding.truncate(room)
            return [encoding]
        self.windowed += 1
        encoding.truncate(room, stride=min(self.stride, room - 1))
        return [encoding, *encoding.overflowing]


def clean(text: str) -> str:
    # JSON can hold half a surrogate pair, which is no character and breaks tokenizers
    return text if text.isascii() else text.encode("utf-8", "replace").decode("utf-8")


def after_marks(text: str, end: int) -> int:
    """The end of a character: a tokenizer that strips accents leaves out the marks that follow their letter."""
    while end < len(text) and unicodedata.category(text[end]).startswith("M"):
        end += 1
    return end


def copied(encoding):
    """A copy: post-processing joins an Encoding with another."""
    return Encoding.merge([encoding], growing_offsets=False)


@contextlib.contextmanager
def without_collection():
    """Also a decorator. Python's search for cycles would look at all examples again and again: a third of the time."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


@without_collection()
def read_files(task, paths, spec: Spec, *, wants_gold=True) -> tuple[list[Example], list[Notes]]:
    """The Examples of some files, and the Notes of each. Sets spec.labels where they are None, from these files.

    Raises ValueError with the first fault, and when there is no example at all.
    """
    examples, notes = [], []
    for number, path in enumerate(paths):
        notes.append(Notes(path))
        for example in task.read(path, spec, notes[-1], wants_gold=wants_gold):
            example.more["file"] = number
            examples.append(example)
        notes[-1].check()
    if not examples:
        why = f": {said}" if (said := notes[0].said()) else ""
        raise ValueError(f"{paths[0]} has no usable row{why}")
    if spec.labels is None:
        names = set().union(*(one.labels for one in notes))
        numbers = all(name.isdecimal() for name in names)
        spec.labels = tuple(sorted(names, key=int if numbers else str))
    return examples, notes


# ---------------------------------------------------------------------------------------------------------------------


def batch_of(
    windows: list[list[Window]], class_weights: np.ndarray | None = None, *, token_types: int = 2
) -> Batch:  # fmt: skip
    """The packed Batch of the windows of some examples, on the CPU.

    class_weights: float [K], of each label's loss. token_types: how many the model has; below 2 all are 0, whatever the
    tokenizer says.
    """
    flat = [window for one in windows for window in one]
    lengths = [len(window.ids) for window in flat]
    cu_seqlens = np.concatenate(([0], np.cumsum(lengths)))
    cu_examples = np.concatenate(([0], np.cumsum([len(one) for one in windows])))
    T = int(cu_seqlens[-1])
    joined = (np.concatenate(parts) for parts in zip(*((window.ids, window.types) for window in flat), strict=True))
    ids, types = (torch.from_numpy(part.astype(np.int64)) for part in joined)
    types = types if token_types > 1 else torch.zeros_like(types)
    batch = Batch(
        ids, torch.from_numpy(np.arange(T) - np.repeat(cu_seqlens[:-1], lengths)), types,
        torch.from_numpy(cu_seqlens.astype(np.int32)), max(lengths),
        cu_examples=torch.from_numpy(cu_examples.astype(np.int32)),
    )  # fmt: skip
    weights = np.array([window.weight for window in flat], np.float32)
    if flat[0].labels is not None:
        labels = np.concatenate([window.labels for window in flat]).astype(np.int64)
        batch.labels, batch.picks = torch.from_numpy(labels), torch.from_numpy(np.flatnonzero(labels != -100))
        weights = np.repeat(weights, lengths)
    elif flat[0].label is not None:
        labels = np.array([window.label for window in flat])
        labels = labels.astype(np.float32 if labels.dtype.kind == "f" else np.int64)
        batch.targets = torch.from_numpy(labels)
    if class_weights is not None:
        weights = weights * np.where(labels < 0, 0, class_weights[np.maximum(labels, 0)]).astype(np.float32)
    if (weights != 1).any():
        batch.weights = torch.from_numpy(weights)
    return batch


def parts_by_size(sizes: Iterable[int], capacity: int, indices: Iterable[int]) -> Iterator[list[int]]:
    """Groups of neighbours among `indices` of at most `capacity` in all, or one alone that is larger."""
    part, total = [], 0
    for i in indices:
        if part and total + sizes[i] > capacity:
            yield part
            part, total = [], 0
        part.append(i)
        total += sizes[i]
    if part:
        yield part


def chunks(items: Iterable, size: int) -> Iterator[list]:
    items = iter(items)
    while chunk := list(islice(items, size)):
        yield chunk


def predictions(
    task, model, spec: Spec, pieces: Pieces, examples: Iterable[Example], *, tokens_per_batch: int = 8192,
    run=None, interrupted=lambda: False,
) -> Iterator[tuple[Example, dict]]:  # fmt: skip
    """(example, prediction) in the order of `examples`, CHUNK of them in memory at a time.

    Windows are sorted by length within a chunk, and packed into batches of at most tokens_per_batch tokens. run: calls
    the model, `model(batch)` by default. Stops early when `interrupted()` is true.
    """
    run = model if run is None else run
    for chunk in chunks(examples, getattr(task, "CHUNK", CHUNK)):
        windows = task.encode(chunk, pieces, spec)
        flat = [window for one in windows for window in one]
        sizes = [len(window.ids) for window in flat]
        order = sorted(range(len(flat)), key=sizes.__getitem__)
        logits = [None] * len(flat)
        for part in parts_by_size(sizes, tokens_per_batch, order):
            if interrupted():
                return
            bare = [[dataclasses.replace(flat[i], label=None, labels=None)] for i in part]
            with torch.no_grad():
                found = run(batch_of(bare, token_types=model.config.type_vocab_size)).logits.float().cpu().numpy()
            if len(found) != len(part):
                # a row for each token
                found = np.split(found, np.cumsum([sizes[i] for i in part])[:-1])
            for i, one in zip(part, found, strict=True):
                logits[i] = one
        ends = np.cumsum([len(one) for one in windows]).tolist()
        for example, one, end in zip(chunk, windows, ends, strict=True):
            yield example, task.decode(example, one, logits[end - len(one) : end], spec)
