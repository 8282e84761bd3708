"""What the tasks on whole texts share: a text or a pair in columns of a table, windows, the mean of their logits."""

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


def layout_of(path):
    """(columns, glue.Layout or None) of a table."""
    found = tables.columns(path)
    return found, glue.layout_of(path, found)


def choose_columns(path, spec, name, candidates):
    """Set spec.columns from the training file: "texts", and "label" as the first of `candidates` that it has.

    name: of the task. Raises ValueError with the columns found.
    """
    found, layout = layout_of(path)
    columns = spec.columns
    if layout is not None and "texts" not in columns:
        columns |= {"texts": list(layout.texts), "label": layout.label} | columns
        spec.metric = spec.metric or layout.metric
        return
    if "texts" not in columns:
        pair = next((names for names in TEXTS if set(names) <= set(found)), None)
        if pair is None:
            raise missing(path, "text", found, "--text-column")
        columns["texts"] = list(pair)
    if "label" not in columns and candidates:
        label = next((one for one in candidates if one in found), None)
        if label is None:
            raise missing(path, candidates[0], found, f"--label-column, for --task {name}")
        columns["label"] = label


def missing(path, column, found, flag=None):
    hint = f"; name another with {flag}" if flag else ""
    return ValueError(f"{path} has no column {column!r}: it has {', '.join(map(repr, found)) or 'none'}{hint}")


def text_rows(path, spec, notes, wants_gold, label=None):
    """Yields (Example without gold, row) for the rows of a table.

    wants_gold: whether rows with an empty text are left out, and the column `label` must be there. Without it each row
    has its example.
    """
    found, layout = layout_of(path)
    names, label = layout and layout.names, spec.columns.get("label") if label is None else label
    header = names or found
    group = spec.columns.get("group")
    wanted = [*spec.columns["texts"], *([label] if wants_gold and label else []), *([group] if group else [])]
    if names is not None and label not in names and wants_gold:
        raise missing(path, label, names)
    for column in wanted:
        # the rows of a .jsonl are looked at one by one: the first may lack a value
        if column not in header and (tables.kind(path) not in (".jsonl", ".json") or column in spec.columns["texts"]):
            raise missing(path, column, header)
    identity = next((one for one in IDS if one in header), None)
    skip = notes.skip if wants_gold else None
    for number, row in tables.rows(path, skip, names=names, quoted=False if layout else None):
        texts = tuple(row.get(column) for column in spec.columns["texts"])
        wrong = next((i for i, text in enumerate(texts) if not isinstance(text, str)), None)
        if wrong is not None:
            column, value = spec.columns["texts"][wrong], texts[wrong]
            notes.bad(number, f"{column!r} is {str(value)[:40]!r}, a {type(value).__name__}: expected text")
        elif wants_gold and not all(text.strip() for text in texts):
            empty = next(c for c, text in zip(spec.columns["texts"], texts, strict=True) if not text.strip())
            notes.skip(number, f"{empty!r} is empty")
        elif wants_gold and layout and layout.unlabelled == row.get(label):
            notes.skip(number, f"no gold label, {layout.unlabelled!r}")
        else:
            yield Example(number, texts, id=row.get(identity), group=row.get(group)), row


def encode_texts(examples, pieces, label_of):
    """For each example its Windows, all with its label. label_of: of an example, None without gold."""
    encodings = [pieces.encodings([e.texts[i] for e in examples]) for i in range(len(examples[0].texts))]
    found = []
    for example, *parts in zip(examples, *encodings, strict=True):
        windows = pieces.windows(*parts)
        label = None if example.gold is None else label_of(example)
        found.append([Window(one.ids, one.type_ids, label, weight=1 / len(windows)) for one in windows])
    return found


def pooled(logits):
    """The mean of the windows' logits, float64 [K]."""
    return np.mean(np.asarray(logits, dtype=np.float64), axis=0)
