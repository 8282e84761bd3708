"""Any number of labels of a text or of a pair of texts."""

import numpy as np

from ..data import tables
from ..model.heads import SequenceClassifier
from . import texts

SCORES = {"micro_f1": 1, "macro_f1": 1, "map": 1, "exact_match": 1}
COLUMNS = ("labels", "label", "tags", "categories", "genres")
# probabilities that a prediction shows, if there are more labels than these
SHOWN = 10


def head(spec):
    if not spec.labels:
        raise ValueError("no row of the training file has a label")
    return SequenceClassifier, {
        "num_labels": len(spec.labels), "labels": spec.labels, "problem_type": "multi_label_classification"
    }  # fmt: skip


def read(path, spec, notes, *, wants_gold=True):
    """Yields Examples with a tuple of labels as gold.

    The labels are a list, names with ; between, or a column of 0 and 1 for each label. No label is an answer as well.
    """
    bits = spec.columns.get("bits")
    columns = texts.columns_of(path, spec, "multilabel", (), wants_gold)
    column = spec.columns.get("label") or next((one for one in COLUMNS if one in columns.found), None)
    if wants_gold and not bits and column not in columns.found:
        bits = _columns_of_bits(path, columns)
    if spec.labels is None:
        spec.columns |= {"bits": bits} if bits else {"label": column}
    if wants_gold and bits:
        if lacking := [name for name in bits if name not in columns.found]:
            raise texts.missing(path, lacking[0], columns.found)
        notes.labels |= set(bits)
    for example, row in texts.text_rows(path, columns, notes, wants_gold):
        if wants_gold:
            names = _bits(row, bits, example, notes) if bits else _names(row, column, example, notes)
            if names is None:
                continue
            example.gold = tuple(sorted({notes.label(name, example.number, spec) or name for name in names}))
        yield example


def _columns_of_bits(path, columns):
    others = [name for name in columns.found if name not in {*columns.texts, *texts.IDS, columns.group}]
    row = next(tables.rows(path, lambda *_: None), (0, {}))[1]
    bits = [name for name in others if row.get(name) in (0, 1, "0", "1")]
    if not bits:
        raise texts.missing(path, COLUMNS[0], columns.found, "--label-column")
    return bits


def _names(row, column, example, notes):
    value = row.get(column)
    if value is None:
        notes.bad(example.number, f"{column!r} is missing: expected a list, which may be empty")
    elif isinstance(value, str):
        return [name.strip() for name in value.split(";") if name.strip()]
    elif isinstance(value, list) and all(isinstance(name, str | int) and not isinstance(name, bool) for name in value):
        return [str(name).strip() for name in value]
    else:
        notes.bad(
            example.number, f"{column!r} is {str(value)[:40]!r}: expected a list of names, or names with ; between"
        )
    return None


def _bits(row, bits, example, notes):
    for name in bits:
        if row.get(name) not in (0, 1, "0", "1") or isinstance(row[name], float):
            notes.bad(example.number, f"{name!r} is {str(row.get(name))[:40]!r}: expected 0 or 1")
            return None
    return [name for name in bits if int(row[name])]


def encode(examples, pieces, spec):
    def label_of(example):
        label = [0.0] * len(spec.labels)
        for name in example.gold:
            label[spec.index[name]] = 1.0
        return label

    return texts.encode_texts(examples, pieces, label_of)


def thresholds(spec):
    """float [K]: a label is predicted from this probability on; 0.5 unless training chose another."""
    chosen = spec.settings.get("thresholds", {})
    return np.array([chosen.get(name, 0.5) for name in spec.labels])


def decode(example, windows, logits, spec):
    """{"labels", "probabilities"}."""
    values = 1 / (1 + np.exp(-texts.pooled(logits)))
    labels = [spec.labels[i] for i in np.flatnonzero(values >= thresholds(spec))]
    shown = np.argsort(-values, kind="stable")[:SHOWN] if len(values) > SHOWN else range(len(values))
    prediction = {"labels": labels, "probabilities": {spec.labels[i]: float(values[i]) for i in shown}}
    wrong = set(labels) ^ set(example.gold) if example.gold is not None else ()
    error = max((abs(float(values[spec.index[name]]) - (name in example.gold)) for name in wrong), default=0.0)
    return prediction | {"_values": values, "_error": error}


def score(examples, predictions, spec, *, tune=False):
    """F1 over all decisions (micro) and its mean over labels (macro), mean average precision, exact match.

    map: the mean over the labels that occur. tune: choose each label's threshold for its best F1; a label that does not
    occur keeps 0.5.
    """
    from sklearn import metrics

    gold = np.zeros((len(examples), len(spec.labels)), bool)
    for i, example in enumerate(examples):
        gold[i, [spec.index[name] for name in example.gold]] = True
    values = np.stack([prediction["_values"] for prediction in predictions])
    if tune:
        spec.settings["thresholds"] = {
            name: best_threshold(gold[:, i], values[:, i]) for i, name in enumerate(spec.labels)
        }
        for prediction, row in zip(predictions, values, strict=True):
            prediction["labels"] = [spec.labels[i] for i in np.flatnonzero(row >= thresholds(spec))]
    chosen = values >= thresholds(spec)
    right, asked, given = (gold & chosen).sum(0), gold.sum(0), chosen.sum(0)
    f1 = 2 * right / np.maximum(asked + given, 1)
    precision = [
        float(metrics.average_precision_score(gold[:, i], values[:, i])) if asked[i] else None
        for i in range(len(spec.labels))
    ]
    occurring = [value for value in precision if value is not None]
    by_row = 2 * (gold & chosen).sum(1) / np.maximum(gold.sum(1) + chosen.sum(1), 1)
    return {
        "micro_f1": float(2 * right.sum() / max(asked.sum() + given.sum(), 1)),
        "macro_f1": float(f1.mean()),
        "map": float(np.mean(occurring)) if occurring else None,
        "exact_match": float((gold == chosen).all(1).mean()),
        "samples_f1": float(by_row.mean()),
        "per_class": {
            name: {"f1": float(f1[i]), "average_precision": precision[i], "support": int(asked[i])}
            for i, name in enumerate(spec.labels)
        },
    }


def best_threshold(gold, values):
    """The threshold of the best F1, in the middle between two neighbouring values; 0.5 without a positive."""
    if not gold.any():
        return 0.5
    order = np.argsort(-values, kind="stable")
    right = np.cumsum(gold[order])
    f1 = 2 * right / (gold.sum() + np.arange(1, len(gold) + 1))
    ordered = values[order]
    # a threshold cannot part equal values
    ends = np.append(ordered[:-1] > ordered[1:], True)
    best = int(np.where(ends, f1, -1).argmax())
    below = ordered[best + 1] if best + 1 < len(ordered) else 0.0
    return float((ordered[best] + below) / 2)
