"""Files of predictions, written as they come: .jsonl, a line a row, or .parquet, a directory with part files.

Both are built beside their place, as OUTPUT.partial with what they belong to in OUTPUT.partial.json, and are moved
there when they are complete. So what was interrupted goes on: after the last whole line, or the last whole part.
"""

import json
import os
import shutil
from pathlib import Path

from .. import files
from .examples import clean

# rows of a part file
PART = 8192
_PATTERN = "part-{:05}.parquet"


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


class Parquet(_Writer):
    """A directory of part files of PART rows each, with the same columns; only the last is shorter."""

    def _check(self):
        try:
            import pyarrow
            import pyarrow.parquet
        except ImportError:
            raise ValueError(f"{self.output}: writing .parquet needs pyarrow (pip install pyarrow)") from None
        self.pa, self.rows = pyarrow, []
        others = [path for path in self._there(self.output) if not self._is_part(path)]
        if others or self.output.is_file():
            what = f"holds {others[0].name}" if others else "is a file"
            raise ValueError(f"--output {self.output} {what}: expected a new directory, for part files")

    @staticmethod
    def _there(directory):
        return sorted(directory.iterdir()) if directory.is_dir() else []

    @staticmethod
    def _is_part(path):
        return path.name.startswith("part-") and path.suffix == ".parquet"

    def _count(self):
        """The rows of the whole parts; what follows the first that is missing or broken is deleted."""
        count, self.parts = 0, 0
        for path in self._there(self.partial):
            try:
                found = self.pa.parquet.read_metadata(path) if path.name == _PATTERN.format(self.parts) else None
            except (self.pa.ArrowException, OSError):
                found = None
            if found is None:
                path.unlink()
            else:
                count, self.parts = count + found.num_rows, self.parts + 1
        return count

    def _begin(self):
        shutil.rmtree(self.partial, ignore_errors=True)
        self.parts = 0

    def __enter__(self):
        self.partial.mkdir(exist_ok=True)
        return self

    def __exit__(self, *error):
        pass

    def write(self, row):
        self.rows.append(json.loads(clean(json.dumps(row, ensure_ascii=False))))
        self.done += 1
        if len(self.rows) == PART:
            self._write_part()

    def _write_part(self):
        pa = self.pa
        fields = [(name, _type(pa, kind)) for name, kind in self.columns.items()]
        for row in self.rows:
            if unknown := row.keys() - self.columns.keys():
                raise RuntimeError(f"a prediction has {sorted(unknown)}: the .parquet has no such column")
        columns = [pa.array([_cell(row.get(name), kind) for row in self.rows], kind) for name, kind in fields]
        path = self.partial / _PATTERN.format(self.parts)
        building = path.with_name("building")
        pa.parquet.write_table(pa.Table.from_arrays(columns, schema=pa.schema(fields)), building)
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
    if isinstance(kind, list):
        return pa.list_(_type(pa, kind[0]))
    if isinstance(kind, dict):
        return pa.struct([(name, _type(pa, one)) for name, one in kind.items()])
    plain = {"text": pa.string(), "whole": pa.int64(), "number": pa.float64()}
    return pa.map_(pa.string(), pa.float64()) if kind == "map" else plain[kind]


def _cell(value, kind):
    if str(kind) == "string" and value is not None and not isinstance(value, str):
        # an id that is a number among texts
        return json.dumps(value, ensure_ascii=False)
    return [*value.items()] if isinstance(value, dict) else value
