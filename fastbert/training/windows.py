"""The windows of training examples: tokenised in parallel, in flat arrays, kept for the next run.

A run on the same examples, with the same tokenizer and options, finds the arrays of an earlier one in
~/.cache/fastbert/tokens/<hash>/, or under $XDG_CACHE_HOME. The hash is that of the examples' texts and labels, the
tokenizer, the options and the code that tokenises, so that no run finds the tokens of another. Damaged arrays are made
again, and old ones go when all together take more than LIMIT.
"""

import contextlib
import copy
import hashlib
import itertools
import json
import os
import shutil
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import tokenizers

from .. import ops
from ..data.threads import ordered_map
from ..data.tokenizer import tokenizer_hash
from ..files import read_json, verify_manifest, write_manifest
from ..tasks.examples import Window, chunks, without_collection

# examples of a call of the tokenizer, whose result is some 100 times as large as the text
CALL = 512
# tokens from which arrays are kept: about a second's work. Bytes of all that are kept
KEPT, LIMIT = 1 << 20, 4 << 30
FACTS = "facts.json"


class Windows(Sequence):
    """For each of E examples a list of its B windows in all, of T tokens: `windows[i]` is that of example i.

    arrays: {name: array}: ids int32 [T], types uint8 [T]; starts int64 [B + 1], of the windows among the tokens;
    examples int64 [E + 1], of the examples among the windows; weights float32 [B]. Of the labels, as the task has them:
    labels int32 [T]; or label, int64 or float64 [B] or [B, 2]; or for several labels the places of the ones, int32, and
    ones int64 [B + 1], of the windows among these, and width [1], the number of labels.
    """

    def __init__(self, arrays):
        self.arrays = arrays
        self.sizes = np.diff(arrays["starts"][arrays["examples"]])

    @classmethod
    def of(cls, examples):
        """From a list of Windows for each example."""
        flat = [window for one in examples for window in one]
        sizes = [len(window.ids) for window in flat]
        arrays = {
            "ids": _joined((window.ids for window in flat), np.int32, sum(sizes)),
            "types": _joined((window.types for window in flat), np.uint8, sum(sizes)),
            "starts": _ends(sizes), "examples": _ends(map(len, examples)),
            "weights": np.array([window.weight for window in flat], np.float32),
        }  # fmt: skip
        if flat and flat[0].labels is not None:
            arrays["labels"] = _joined((window.labels for window in flat), np.int32, sum(sizes))
        elif flat and isinstance(flat[0].label, list):
            places = [np.flatnonzero(window.label) for window in flat]
            arrays |= {"places": _joined(places, np.int32), "ones": _ends(map(len, places))}
            arrays["width"] = np.array([len(flat[0].label)])
        elif flat and flat[0].label is not None:
            arrays["label"] = np.array([window.label for window in flat])
        return cls(arrays)

    def __len__(self):
        return len(self.arrays["examples"]) - 1

    def __getitem__(self, i):
        if not 0 <= i < len(self):
            raise IndexError(i)
        first, end = self.arrays["examples"][i : i + 2].tolist()
        return [self._window(b) for b in range(first, end)]

    def _window(self, b):
        arrays, label = self.arrays, None
        start, end = arrays["starts"][b : b + 2].tolist()
        if "label" in arrays:
            label = arrays["label"][b].tolist()
        elif "places" in arrays:
            label = np.zeros(int(arrays["width"][0]), np.float32)
            label[arrays["places"][slice(*arrays["ones"][b : b + 2].tolist())]] = 1
        labels = arrays["labels"][start:end] if "labels" in arrays else None
        return Window(arrays["ids"][start:end], arrays["types"][start:end], label, labels, float(arrays["weights"][b]))


def _joined(lists, dtype, count=-1):
    return np.fromiter(itertools.chain.from_iterable(lists), dtype, count)


def _ends(counts):
    """int64, from 0: where each of some groups of `counts` begins, and the end."""
    return np.cumsum([0, *counts], dtype=np.int64)


def _concatenated(parts):
    """The arrays of several Windows in one, `parts` emptied."""
    arrays = {}
    for name in {name: None for part in parts for name in part}:
        # a part without windows has no labels
        found = [part.pop(name) for part in parts if name in part]
        if name in ("starts", "examples", "ones"):
            offsets = _ends(int(one[-1]) for one in found)
            found = [one[1:] + offset for one, offset in zip(found, offsets)]
            found.insert(0, np.zeros(1, np.int64))
        arrays[name] = found[0] if name == "width" else np.concatenate(found)
    return arrays


@without_collection()
def encoded(task, examples, pieces, spec, say=lambda line: None):
    """The Windows of training examples, without those that teach nothing; from an earlier run where one kept them.

    Adds to what `pieces` counts. say: called with a line on what is kept or was found.
    """
    directory = _directory(task, examples, pieces, spec)
    if (found := _kept(directory, pieces)) is not None:
        say(f"tokens of an earlier run: {directory}")
        return found

    def encode(chunk):
        own = copy.copy(pieces)
        own.truncated, own.windowed, own.lengths = 0, 0, Counter()
        found = task.encode(chunk, own, spec)
        # a window without its answer teaches nothing
        found = Windows.of([[one for one in windows if one.label != (-100, -100)] for windows in found])
        return found.arrays, own

    parts = []
    for arrays, own in ordered_map(encode, chunks(examples, CALL), max(1, min(4, os.cpu_count() or 1))):
        pieces.truncated, pieces.windowed = pieces.truncated + own.truncated, pieces.windowed + own.windowed
        pieces.lengths.update(own.lengths)
        parts.append(arrays)
    found = Windows(_concatenated(parts))
    if len(found.arrays["ids"]) >= KEPT and _keep(directory, found, pieces):
        say(f"the tokens are kept for the next run: {directory}")
    return found


# ----------------------------------------------------------------------------------------------------------- the cache


def _directory(task, examples, pieces, spec):
    """The place of the examples' tokens, by everything that they depend on."""
    options = {"task": task.__name__, "labels": spec.labels, "settings": spec.settings, "max_length": pieces.max_length,
               "stride": pieces.stride, "truncate": pieces.truncate, "tokenizers": tokenizers.__version__,
               "tokenizer": tokenizer_hash(pieces.tokenizer)}  # fmt: skip
    digest = hashlib.sha256(json.dumps(options).encode())
    for file in (Path(__file__), *sorted(Path(task.__file__).parent.glob("*.py"))):
        digest.update(file.read_bytes())
    for chunk in chunks(examples, CALL):
        digest.update(repr([(one.texts, one.gold, one.more) for one in chunk]).encode())
    return ops.libraries.cache_directory() / "tokens" / digest.hexdigest()[:32]


def _kept(directory, pieces):
    """The Windows in a directory, and what was counted when they were made added to `pieces`; None without."""
    try:
        verify_manifest(directory, (FACTS, "ids.npy", "starts.npy", "examples.npy"))
        facts = read_json(directory / FACTS)
        arrays = {file.stem: np.load(file, mmap_mode="r") for file in sorted(directory.glob("*.npy"))}
        pieces.truncated, pieces.windowed = pieces.truncated + facts["truncated"], pieces.windowed + facts["windowed"]
        pieces.lengths.update({int(length): count for length, count in facts["lengths"].items()})
    except (OSError, ValueError):
        return None
    with contextlib.suppress(OSError):
        # the one that was used last goes last
        os.utime(directory)
    return Windows(arrays)


def _keep(directory, windows, pieces):
    """Whether the Windows could be written to a directory, which then is complete."""
    building = directory.with_name(f"{directory.name}.{os.getpid()}.tmp")
    try:
        building.mkdir(parents=True, exist_ok=True)
        for name, array in windows.arrays.items():
            np.save(building / f"{name}.npy", array)
        facts = {"truncated": pieces.truncated, "windowed": pieces.windowed, "lengths": pieces.lengths}
        (building / FACTS).write_text(json.dumps(facts), encoding="utf-8")
        write_manifest(building)
        # damaged
        shutil.rmtree(directory, ignore_errors=True)
        building.rename(directory)
        _make_room(directory)
        return True
    except OSError:
        # without it the next run tokenises again
        return False
    finally:
        shutil.rmtree(building, ignore_errors=True)


def _make_room(newest):
    """Delete what was used longest ago, until all together take at most LIMIT; and what a killed run left."""
    total = 0
    for directory in sorted(newest.parent.iterdir(), key=lambda one: -one.stat().st_mtime):
        total += sum(file.stat().st_size for file in directory.glob("*"))
        is_left = directory.suffix == ".tmp" and time.time() - directory.stat().st_mtime > 24 * 3600
        if directory != newest and (total > LIMIT or is_left):
            shutil.rmtree(directory, ignore_errors=True)
