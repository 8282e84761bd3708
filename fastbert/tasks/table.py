"""The tasks by name, and which one a file is for."""

import glob
import importlib
import importlib.util
import os

from ..data import tables
from . import texts

# each is a module of this folder
TASKS = ("classify", "multilabel", "regress", "tag", "answer", "choose", "embed", "rerank", "sparse")


def task(name):
    """The module of a task. Raises ValueError for an unknown name."""
    if name not in TASKS:
        raise ValueError(f"--task is {name!r}: expected one of {', '.join(TASKS)}")
    return importlib.import_module(f".{name}", __package__)


def check_libraries():
    """Raises ValueError when the libraries that compute scores are not installed."""
    if not all(map(importlib.util.find_spec, ("sklearn", "scipy"))):
        raise ValueError("scores need scikit-learn and scipy: install fastbert-kernels with the extra tasks")


def detect(path):
    """The name of the task that a training file is for, by its type and columns. Raises ValueError if none fits."""
    kind = tables.kind(path)
    if kind not in tables.KINDS:
        return "tag"
    if kind == ".json" and _is_squad(path):
        return "answer"
    found, layout = texts.layout_of(path)
    if layout is not None:
        return layout.task
    columns = set(found)
    for name, fits in (
        ("embed", not columns.isdisjoint(("query", "anchor")) and not columns.isdisjoint(("positive", "pos"))),
        ("answer", {"question", "context"} <= columns and bool({"answers", "answer"} & columns)),
        ("choose", not {"choices", "ending0", "choice0"}.isdisjoint(columns)),
        ("tag", "tags" in columns or "ner_tags" in columns or "spans" in columns or "entities" in columns),
        ("regress", "score" in columns and "label" not in columns),
        ("multilabel", "labels" in columns or ("label" not in columns and _has_columns_of_bits(path, found))),
        ("classify", any(column in columns for column in ("label", "gold_label", "category", "class", "sentiment"))),
    ):
        if fits:
            return name
    hint = " (a .csv is split at commas, a .tsv at tabs)" if len(found) == 1 else ""
    raise ValueError(
        f"{path} has the columns {', '.join(map(repr, found))}{hint}: no task fits, name one with --task, and its "
        "columns with --text-column and --label-column"
    )


# names of the files of a directory, without their endings
TRAIN, EVAL = ("train", "training"), ("dev", "dev_matched", "dev_mismatched", "validation", "valid", "val", "eval")


def train_and_eval_files(train, evaluation):
    """(files to train on, files to evaluate on), from files, folders and globs.

    A folder to train on gives its train.* and, unless `evaluation` names some, its dev.* or validation.*. Raises
    FileNotFoundError or ValueError for paths without a file.
    """
    found = _files(train, TRAIN)
    evaluation = _files(evaluation, EVAL)
    if not evaluation:
        evaluation = [file for path in train if os.path.isdir(path) for file in _named(path, EVAL)]
    if both := {os.path.realpath(one) for one in found} & {os.path.realpath(one) for one in evaluation}:
        raise ValueError(f"{sorted(both)[0]} is both a file to train on and one to evaluate on")
    return found, evaluation


def _files(paths, names):
    files = []
    for path in map(os.path.expanduser, paths):
        if os.path.isdir(path):
            found = _named(path, names)
            if not found:
                raise ValueError(f"the folder {path} has no file {' or '.join(f'{name}.*' for name in names[:2])}")
        elif os.path.isfile(path):
            found = [path]
        else:
            found = sorted(file for file in glob.glob(path) if os.path.isfile(file))
            if not found:
                raise FileNotFoundError(f"no such file or folder: {path}")
        files += found
    return files


def _named(folder, names):
    return [
        os.path.join(folder, file)
        for file in sorted(os.listdir(folder))
        if file.partition(".")[0] in names and "." in file and os.path.isfile(os.path.join(folder, file))
    ]


def how_read(path):
    """What is not plain about the way a file is read, in a line; None for most files."""
    if tables.kind(path) != ".tsv":
        return None
    if texts.layout_of(path)[1] is not None:
        return f"{path}: read as a file of GLUE, split at tabs, a quote is a letter"
    return f"{path}: split at tabs, " + (
        "quotes belong to the file" if tables.is_quoted(path) else "a quote is a letter"
    )


def _is_squad(path):
    for _, line in tables.lines(path):
        if line.strip():
            return line.lstrip().startswith("{") and ('"data"' in line[:200] or line.strip() == "{")
    return False


def _has_columns_of_bits(path, found):
    row = next(tables.rows(path, lambda *_: None), (0, {}))[1]
    others = [name for name in found if name not in {*texts.IDS, *(one for pair in texts.TEXTS for one in pair)}]
    return bool(others) and all(row.get(name) in (0, 1, "0", "1") for name in others)
