"""Files of predictions, written as they come: .jsonl, a line a row, or .parquet, a directory with part files.

Both are built beside their place, as OUTPUT.partial with what they belong to in OUTPUT.partial.json, and are moved
there when they are complete. So what was interrupted goes on: after the last whole line, or the last whole part.
"""

import json
import os
import shutil
from pathlib import Path
from typing import NamedTuple

import numpy as np

from .. import files
from .examples import clean

# rows of a part file
PART = 8192


def opened(output, facts, columns):
    """The writer of a file: a JsonLines or a Parquet. `done` is the number of rows that are there already.

    facts: what the predictions depend on, for JSON; rows of others are thrown away. columns: {name: type} of a
    .parquet, see `types`. Raises ValueError, before any work, for a place that cannot be one.
    """
    kind = {".jsonl": JsonLines, ".parquet": Parquet}.get(os.path.splitext(output)[1].lower())
    if kind is None:
        raise ValueError(f"--output is {str(output)!r}: expected a .jsonl file, or .parquet for a directory of parts")
    return kind(Path(output), json.dumps(facts), columns)


class _Writer:
    def __init__(self, output, facts, columns):
        self.output, self.columns = output, columns
        self.partial, self.about = Path(f"{output}.partial"), Path(f"{output}.partial.json")
        self._check()
        is_known = self.about.is_file() and self.about.read_text(encoding="utf-8") == facts
        self.done = self._count() if is_known else 0
        if not self.done:
            self._begin()
            files.write(self.about, facts)


class JsonLines(_Writer):
    """One JSON object a line."""

    def _check(self):
        if self.output.is_dir():
            raise ValueError(f"--output {self.output} is a directory: expected a .jsonl file")

    def _count(self):
        """The whole lines; what follows the last is cut off."""
        if not self.partial.is_file():
            return 0
        with open(self.partial, "rb+") as file:
            count = end = 0
            for line in file:
                if not line.endswith(b"\n"):
                    break
                count, end = count + 1, end + len(line)
            file.truncate(end)
        return count

    def _begin(self):
        self.partial.unlink(missing_ok=True)

    def __enter__(self):
        self.file = open(self.partial, "a", encoding="utf-8")
        return self

    def __exit__(self, *error):
        self.file.close()

    def write(self, row):
        self.file.write(clean(json.dumps(row, ensure_ascii=False)) + "\n")
        self.done += 1

    def finish(self):
        self.file.close()
        files.sync(self.partial)
        self.partial.replace(self.output)
        self.about.unlink()


class _Parts(_Writer):
    """A directory of part files of PART rows each; only the last is shorter."""

    # files that a caller may put beside the parts
    BESIDE = ()

    def _check(self):
        others = [path for path in self._there(self.output) if not self._is_ours(path)]
        if others or self.output.is_file():
            what = f"holds {others[0].name}" if others else "is a file"
            raise ValueError(f"--output {self.output} {what}: expected a new directory, for part files")

    @staticmethod
    def _there(directory):
        return sorted(directory.iterdir()) if directory.is_dir() else []

    def _is_ours(self, path):
        return path.name in self.BESIDE or path.name.startswith("part-") and path.suffix == self.SUFFIX

    def _count(self):
        """The rows of the whole parts; what follows the first that is missing or broken is deleted."""
        count, self.parts, self.rows = 0, 0, []
        for path in self._there(self.partial):
            if path.name in self.BESIDE:
                continue
            found = self._rows_in(path) if path.name == self._name() else None
            if found is None:
                path.unlink()
            else:
                count, self.parts = count + found, self.parts + 1
        return count

    def _name(self):
        return f"part-{self.parts:05}{self.SUFFIX}"

    def _begin(self):
        shutil.rmtree(self.partial, ignore_errors=True)
        self.parts, self.rows = 0, []

    def __enter__(self):
        self.partial.mkdir(exist_ok=True)
        return self

    def __exit__(self, *error):
        pass

    def write(self, row):
        self.rows.append(row)
        self.done += 1
        if len(self.rows) == PART:
            self._write_part()

    def _write_part(self):
        path = self.partial / self._name()
        building = path.with_name("building")
        self._save(building)
        files.sync(building)
        building.replace(path)
        self.parts, self.rows = self.parts + 1, []

    def finish(self):
        if self.rows or not self.parts:
            self._write_part()
        # what is interrupted here has all its parts, and goes on
        shutil.rmtree(self.output, ignore_errors=True)
        self.partial.replace(self.output)
        self.about.unlink()


class Parquet(_Parts):
    """Part files with the same columns."""

    SUFFIX = ".parquet"
    # readers of a folder leave out names that begin so
    BESIDE = ("_manifest.json", "_ranges.npy")

    def _check(self):
        try:
            import pyarrow
            import pyarrow.parquet
        except ImportError:
            raise ValueError(f"{self.output}: writing .parquet needs pyarrow (pip install pyarrow)") from None
        self.pa = pyarrow
        super()._check()

    def _rows_in(self, path):
        try:
            return self.pa.parquet.read_metadata(path).num_rows
        except (self.pa.ArrowException, OSError):
            return None

    def write(self, row):
        if not isinstance(row.get("vector"), np.ndarray):
            row = json.loads(clean(json.dumps(row, ensure_ascii=False)))
        super().write(row)

    def _save(self, path):
        pa = self.pa
        fields = [(name, _type(pa, kind)) for name, kind in self.columns.items()]
        for row in self.rows:
            if unknown := row.keys() - self.columns.keys():
                raise RuntimeError(f"a prediction has {sorted(unknown)}: the .parquet has no such column")
        columns = [_array(pa, [row.get(name) for row in self.rows], kind) for name, kind in fields]
        pa.parquet.write_table(pa.Table.from_arrays(columns, schema=pa.schema(fields)), path)


class Vectors(_Parts):
    """Part files .npy, each an array [rows, width], of rows that are {"vector": array}; columns:
    {"vector": Vector}."""

    SUFFIX = ".npy"
    BESIDE = ("manifest.json", "ranges.npy")

    def _rows_in(self, path):
        try:
            return len(np.load(path, mmap_mode="r"))
        except (ValueError, OSError, EOFError):
            return None

    def _save(self, path):
        kind = self.columns["vector"]
        found = np.array([row["vector"] for row in self.rows], kind.dtype).reshape(-1, kind.width)
        with open(path, "wb") as file:
            np.save(file, found)


class Vector(NamedTuple):
    """The type of a column of vectors: numpy's name of their numbers, and how many they are."""

    dtype: str
    width: int


def types(task, ids, has_errors):
    """{column: type} of a .parquet for a task: the same in all parts, whatever the rows of one part have.

    ids: the Python types of the rows' ids. has_errors: whether there are rows without a prediction.
    """
    found = {"id": "whole" if ids == {int} else "text"} if ids else {}
    return found | _TYPES[task] | ({"error": "text"} if has_errors else {})


_SPANS = {"label": "text", "text": "text", "start": "whole", "end": "whole", "score": "number"}
_ANSWERS = {"answer": "text", "start": "whole", "end": "whole", "score": "number"}
# task -> the type of each part of a prediction; a list has one of these in brackets, a map goes from text to numbers
_TYPES = {
    "classify": {"label": "text", "score": "number", "probabilities": "map"},
    "multilabel": {"labels": ["text"], "probabilities": "map"},
    "regress": {"score": "number"},
    "tag": {"tags": ["text"], "scores": ["number"], "spans": [["whole"]], "entities": [_SPANS]},
    "answer": {**_ANSWERS, "n_best": [_ANSWERS], "no_answer_score": "number"},
    "choose": {"choice": "whole", "text": "text", "score": "number", "probabilities": ["number"]},
    "embed": {"score": "number"},
    "rerank": {"score": "number"},
    "sparse": {"score": "number"},
}


def _type(pa, kind):
    if isinstance(kind, Vector):
        return pa.list_(pa.from_numpy_dtype(kind.dtype), kind.width)
    if isinstance(kind, list):
        return pa.list_(_type(pa, kind[0]))
    if isinstance(kind, dict):
        return pa.struct([(name, _type(pa, one)) for name, one in kind.items()])
    plain = {"text": pa.string(), "whole": pa.int64(), "number": pa.float64()}
    return pa.map_(pa.string(), pa.float64()) if kind == "map" else plain[kind]


def _array(pa, values, kind):
    if pa.types.is_fixed_size_list(kind):
        flat = np.concatenate(values) if values else np.empty(0, kind.value_type.to_pandas_dtype())
        return pa.FixedSizeListArray.from_arrays(pa.array(flat), kind.list_size)
    return pa.array([_cell(value, kind) for value in values], kind)


def _cell(value, kind):
    if str(kind) == "string" and value is not None and not isinstance(value, str):
        # an id that is a number among texts
        return json.dumps(value, ensure_ascii=False)
    return [*value.items()] if isinstance(value, dict) else value
