"""A number for a text or for a pair of texts, such as how similar they are."""

import math
import re

import numpy as np

from ..model.heads import SequenceClassifier
from . import texts

SCORES = {"pearson": 1, "spearman": 1, "mse": -1}
COLUMNS = ("score", "label", "rating", "value", "target")
# the squares of larger ones are not finite in float32
LARGEST = 1e18
# what float() takes besides is no number in a file: nan, inf, 1_000, blanks inside
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")


def head(spec):
    return SequenceClassifier, {"num_labels": 1, "labels": None, "problem_type": "regression"}


def read(path, spec, notes, *, wants_gold=True):
    """Yields Examples with a float as gold, on the file's own scale."""
    columns = texts.columns_of(path, spec, "regress", COLUMNS, wants_gold)
    column = columns.label
    for example, row in texts.text_rows(path, columns, notes, wants_gold):
        if wants_gold:
            value = number(row.get(column))
            if value is None:
                notes.bad(example.number, f"{column!r} is {str(row.get(column))[:40]!r}: expected a number below 1e18")
                continue
            example.gold = value
        yield example


def number(value):
    """The float of a cell, None for what is no number below LARGEST."""
    if isinstance(value, str):
        value = float(value) if _NUMBER.fullmatch(value.strip()) else math.nan
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < LARGEST:
        return None
    return float(value)


def encode(examples, pieces, spec):
    return texts.encode_texts(examples, pieces, lambda example: example.gold)


def decode(example, windows, logits, spec):
    """{"score"}: the mean over the windows of a long text."""
    value = float(texts.pooled(logits)[0])
    return {"score": value, "_error": 0.0 if example.gold is None else abs(value - example.gold)}


def score(examples, predictions, spec, *, tune=False):
    """Pearson's and Spearman's correlation, None where one side is constant, and the mean squared error."""
    from scipy import stats

    gold = np.array([example.gold for example in examples])
    values = np.array([prediction["score"] for prediction in predictions])
    varies = len(gold) > 1 and bool(np.ptp(gold) > 0 and np.ptp(values) > 0)
    return {
        "pearson": float(stats.pearsonr(gold, values).statistic) if varies else None,
        "spearman": float(stats.spearmanr(gold, values).statistic) if varies else None,
        "mse": float(((gold - values) ** 2).mean()),
        "mean_baseline_mse": float(gold.var()),
    }
