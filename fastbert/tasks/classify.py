"""One label of a text or of a pair of texts."""

import numpy as np

from ..model.heads import SequenceClassifier
from . import texts

SCORES = {"accuracy": 1, "macro_f1": 1, "mcc": 1, "f1": 1, "log_loss": -1, "calibration_error": -1}
COLUMNS = ("label", "labels", "gold_label", "category", "class", "sentiment", "Quality", "is_duplicate")
# labels that a prediction shows, if there are more than these
SHOWN = 10


def head(spec):
    if len(spec.labels) < 2:
        names = f", {spec.labels[0]!r}" if spec.labels else ""
        raise ValueError(f"the training file has {len(spec.labels)} class{names}: expected at least two")
    return SequenceClassifier, {
        "num_labels": len(spec.labels), "labels": spec.labels, "problem_type": "single_label_classification"
    }  # fmt: skip


def read(path, spec, notes, *, wants_gold=True):
    """Yields Examples with the name of their label as gold. Label ids are names too: "0", "1"."""
    columns = texts.columns_of(path, spec, "classify", COLUMNS, wants_gold)
    label, first = columns.label, None
    for example, row in texts.text_rows(path, columns, notes, wants_gold):
        if wants_gold:
            value = row.get(label)
            if isinstance(value, str):
                value = value.strip()
            if value is None or value == "":
                notes.bad(example.number, f"{label!r} is missing or empty: expected a label")
                continue
            if isinstance(value, bool) or not isinstance(value, str | int):
                hint = " (numbers are for --task regress)" if isinstance(value, float) else ""
                notes.bad(example.number, f"{label!r} is {value!r}: expected a name or a whole number{hint}")
                continue
            first = type(value) if first is None else first
            if type(value) is not first:
                kinds = {str: "a name", int: "a number"}
                notes.bad(
                    example.number,
                    f"the label {value!r} is {kinds[type(value)]}, the first has {kinds[first]}: expected one type",
                )
                continue
            example.gold = notes.label(str(value), example.number, spec)
        yield example


def encode(examples, pieces, spec):
    return texts.encode_texts(examples, pieces, lambda example: spec.index[example.gold])


def decode(example, windows, logits, spec):
    """{"label", "score", "probabilities"}; of equal probabilities the first label's counts."""
    scores = texts.pooled(logits)
    values = softmax(scores / spec.settings.get("applied_temperature", 1.0))
    best = int(values.argmax())
    # argsort of negative values is stable: equal ones stay in the labels' order
    shown = np.argsort(-values, kind="stable")[:SHOWN] if len(values) > SHOWN else range(len(values))
    label, value = spec.labels[best], float(values[best])
    return {
        "label": label, "score": value, "probabilities": {spec.labels[i]: float(values[i]) for i in shown},
        "_logits": scores, "_error": 0.0 if example.gold in (None, label) else value,
    }  # fmt: skip


def score(examples, predictions, spec, *, tune=False):
    """Accuracy, macro F1 over the labels that occur in gold or prediction, MCC, log loss, calibration error.

    f1: of the second label, if there are two. tune: fit the temperature (Guo et al. 2017).
    """
    from sklearn import metrics

    gold = np.array([spec.index[example.gold] for example in examples])
    scores = np.stack([prediction["_logits"] for prediction in predictions])
    if tune:
        spec.settings["temperature"] = temperature(scores, gold)
    values = softmax(scores / spec.settings.get("applied_temperature", 1.0))
    best = values.argmax(1)
    every = range(len(spec.labels))
    columns = metrics.precision_recall_fscore_support(gold, best, labels=every, zero_division=0.0)
    occurs = np.union1d(gold, best)
    found = {
        "accuracy": float((best == gold).mean()),
        "macro_f1": float(columns[2][occurs].mean()),
        "mcc": correlation(gold, best),
        "log_loss": float(-np.log(np.maximum(values[np.arange(len(gold)), gold], 1e-300)).mean()),
        "calibration_error": calibration_error(values.max(1), best == gold),
        "majority_baseline": float(np.bincount(gold).max() / len(gold)),
    }
    if len(spec.labels) == 2:
        found["f1"] = float(columns[2][1])
    names = ("precision", "recall", "f1", "support")
    found["per_class"] = {
        label: {name: float(column[i]) for name, column in zip(names, columns, strict=True)}
        for i, label in enumerate(spec.labels)
    }
    return found


def softmax(scores):
    shifted = np.exp(scores - scores.max(-1, keepdims=True))
    return shifted / shifted.sum(-1, keepdims=True)


def correlation(gold, best):
    """Matthews' correlation of two arrays of label ids (Gorodkin 2004); 0 where one of them is constant.

    Not scikit-learn's: it makes a dense matrix of all pairs of labels, 800 MB for 10,000.
    """
    n, right = len(gold), int((gold == best).sum())
    counts = [np.bincount(values, minlength=max(gold.max(), best.max()) + 1).astype(float) for values in (gold, best)]
    (a, b), both = (n * n - (one**2).sum() for one in counts), (counts[0] * counts[1]).sum()
    return float((right * n - both) / np.sqrt(a * b)) if a and b else 0.0


def calibration_error(confidence, right, bins=10):
    """Expected calibration error: |accuracy - confidence| in bins (k / 10, (k + 1) / 10], weighted by their share."""
    # a hair less, so that a confidence at a border is in the bin below it, in spite of rounding
    place = np.clip(np.ceil(confidence * bins - 1e-9).astype(int) - 1, 0, bins - 1)
    gaps = np.bincount(place, right, bins) - np.bincount(place, confidence, bins)
    return float(np.abs(gaps).sum() / len(confidence))


def temperature(scores, gold):
    """What to divide the logits by for the smallest log loss, of some 10 million logits at most."""
    from scipy.optimize import minimize_scalar

    rows = max(1000, 10_000_000 // scores.shape[1])
    scores, gold = scores[:rows], gold[:rows]

    def loss(log_temperature):
        values = softmax(scores / np.exp(log_temperature))
        return -np.log(np.maximum(values[np.arange(len(gold)), gold], 1e-300)).mean()

    return float(np.exp(minimize_scalar(loss, bounds=(-3, 3), method="bounded").x))
