"""What the tasks on whole texts share: a text or a pair in columns of a table, windows, the mean of their logits."""

from typing import NamedTuple

import numpy as np

from ..data import glue, tables
from .examples import Example, Window

# columns that hold the text or the pair, unless named: the first of these that a file has
TEXTS = (
    ("text",), ("sentence1", "sentence2"), ("premise", "hypothesis"), ("question1", "question2"),
    ("question", "sentence"), ("text1", "text2"), ("text_a", "text_b"), ("#1 String", "#2 String"), ("sentence",),
    ("content",), ("review",),
)  # fmt: skip
IDS = ("id", "idx", "index", "guid", "pairID")


class Columns(NamedTuple):
    """Of a table: all its columns, those of the text or pair, and that of the label (None if it is not wanted).

    layout: that of a file of GLUE. group: the column of groups.
    """

    found: list
    texts: list
    label: str | None
    group: str | None
    layout: glue.Layout | None


def layout_of(path):
    """(columns, glue.Layout or None) of a table."""
    found = tables.columns(path)
    layout = glue.layout_of(path, found)
    return [*layout.names] if layout and layout.names else found, layout


def columns_of(path, spec, task, candidates, wants_gold):
    """The Columns of a file for a task: those in spec.columns, else by name. Those of the training file are stored.

    candidates: names of the label's column; (): the task looks for itself. Raises ValueError with the columns found.
    """
    found, layout = layout_of(path)
    own = {"texts": [*layout.texts], "label": layout.label} if layout and layout.task == task else {}
    texts = spec.columns.get("texts") or own.get("texts")
    if texts is None:
        texts = next(([*names] for names in TEXTS if set(names) <= set(found)), None) or ["text"]
    # a row of a .jsonl may lack a value, which its reader says
    if lacking := [name for name in texts if name not in found]:
        raise missing(path, lacking[0], found, "--text-column")
    label = None
    if wants_gold and candidates:
        label = spec.columns.get("label") or own.get("label")
        label = label or next((one for one in candidates if one in found), candidates[0])
        if label not in found and tables.kind(path) not in (".jsonl", ".json") or label in texts:
            raise missing(path, label, [name for name in found if name not in texts], "--label-column")
    group = spec.columns.get("group")
    if group and wants_gold and group not in found:
        raise missing(path, group, found, "--group-column")
    if spec.labels is None:
        spec.columns = {"texts": texts} | ({"label": label} if label else {}) | spec.columns
        if own:
            spec.metric = spec.metric or layout.metric
    return Columns(found, texts, label, group, layout)


def missing(path, column, found, flag=None):
    if not found:
        return ValueError(f"{path} has no column {column!r} beside the text")
    hint = f"; name another with {flag}" if flag else ""
    return ValueError(f"{path} has no column {column!r}: it has {', '.join(map(repr, found))}{hint}")


def text_rows(path, columns, notes, wants_gold):
    """Yields (Example without gold, row) for the rows of a table.

    wants_gold: leave out rows with an empty text or without a gold label. Without it each row with as many columns as
    the header has its example.
    """
    layout = columns.layout
    identity = next((one for one in IDS if one in columns.found), None)
    for number, row in tables.rows(path, notes.skip, names=layout and layout.names, quoted=False if layout else None):
        texts = tuple(map(row.get, columns.texts))
        wrong = empty = None
        for name, text in zip(columns.texts, texts, strict=True):
            if not isinstance(text, str):
                wrong = wrong or name
            elif not text or text.isspace():
                empty = empty or name
        if wrong is not None:
            value = row.get(wrong)
            notes.bad(number, f"{wrong!r} is {str(value)[:40]!r}, a {type(value).__name__}: expected text")
        elif wants_gold and empty is not None:
            notes.skip(number, f"{empty!r} is empty")
        elif wants_gold and layout and layout.unlabelled is not None and layout.unlabelled == row.get(columns.label):
            notes.skip(number, f"no gold label, {layout.unlabelled!r}")
        else:
            yield Example(number, texts, id=row.get(identity), group=row.get(columns.group)), row


def encode_texts(examples, pieces, label_of):
    """For each example its Windows, all with its label. label_of: of an example, None without gold."""
    found = []
    for example, windows in zip(examples, pieces.whole([example.texts for example in examples]), strict=True):
        label = None if example.gold is None else label_of(example)
        found.append([Window(one.ids, one.type_ids, label, weight=1 / len(windows)) for one in windows])
    return found


def pooled(logits):
    """The mean of the windows' logits, float64 [K]."""
    return np.mean(np.asarray(logits, dtype=np.float64), axis=0)
