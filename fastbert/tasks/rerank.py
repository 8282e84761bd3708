"""How well a document fits a query, read together: a cross-encoder that sorts what a search has found."""

import math

import numpy as np

from ..model.heads import SequenceClassifier
from ..model.reranking import OBJECTIVES
from . import retrieval_files
from .examples import Window
from .regress import number

SCORES = {"mrr@10": 1, "recall@1": 1, "average_precision": 1, "spearman": 1}
LOSSES = {"binary": ("pairs", "labelled", "scored"), "listwise": ("pairs",), "margin": ("pairs",)}


def head(spec):
    return SequenceClassifier, {"num_labels": 1, "labels": None, "problem_type": None}


def objective(spec):
    """What takes the place of the head's own loss."""
    return OBJECTIVES[spec.settings["loss"]]


def main_score(spec):
    return {"pairs": "mrr@10", "labelled": "average_precision", "scored": "spearman"}[spec.settings["measured"]]


def read(path, spec, notes, *, wants_gold=True):
    """Yields Examples with texts (query, document, ...). gold: how well each document fits."""
    limits = spec.settings.get("score_range")
    for example in retrieval_files.read(path, spec, notes, LOSSES, wants_gold):
        if wants_gold and example.more["kind"] == "pairs":
            if len(example.texts) < 3:
                notes.skip(example.number, "no negative: a reranker learns from both")
                continue
            if example.gold is None:
                example.gold = [1.0] + [0.0] * (len(example.texts) - 2)
        elif wants_gold:
            value = number(example.gold)
            if value is not None and limits:
                value = (value - limits[0]) / (limits[1] - limits[0])
            if value is None or not 0 <= value <= 1:
                more = "0 to 1; name another with --score-range" if not limits else f"{limits[0]:g} to {limits[1]:g}"
                notes.bad(example.number, f"the label is {str(example.gold)[:40]!r}: expected a number, {more}")
                continue
            example.gold = value
        yield example


def encode(examples, pieces, spec):
    """For each example a Window a document: the query and the document, the longer one shortened."""
    prompts = spec.settings.get("prompts") or {}
    query, document = prompts.get("query", ""), prompts.get("document", "")
    pairs = [(query + one.texts[0], document + text) for one in examples for text in one.texts[1:]]
    encodings = iter(pieces.whole(pairs))
    found = []
    for example in examples:
        golds = example.gold if isinstance(example.gold, list) else [example.gold] * (len(example.texts) - 1)
        windows = [next(encodings)[0] for _ in golds]
        found.append([Window(one.ids, one.type_ids, gold) for one, gold in zip(windows, golds, strict=True)])
    return found


def decode(example, windows, logits, spec):
    """{"score"}: the sigmoid of the logit of the query with its first document, as sentence-transformers has it."""
    scores = np.array([one[0] for one in logits], np.float64)
    # of equal scores the right one comes last, and NaN is no score
    rank = min(1 + int((~(scores[1:] < scores[0])).sum()), len(scores))
    found = {"score": float(1 / (1 + math.exp(-min(max(scores[0], -700.0), 700.0)))), "_logit": float(scores[0])}
    if isinstance(example.gold, list):
        best = 1 + int(scores.argmax())
        found |= {"rank": rank, "_error": 1 - 1 / rank, "_gold": example.texts[1], "_text": example.texts[0]}
        found["_answer"] = example.texts[best if rank > 1 else 1]
    elif example.gold is not None:
        found["_error"] = abs(found["score"] - example.gold)
    return found


def score(examples, predictions, spec, *, tune=False):
    """Of queries with documents: where a row's positive stands among its own negatives, as mean 1 / rank, 0 beyond 10,
    and the share that come first. Of pairs: average precision for labels, Spearman's correlation for scores.
    """
    from scipy import stats
    from sklearn import metrics

    kinds, found = np.array([example.more["kind"] for example in examples]), {}
    ranks = np.array([prediction["rank"] for prediction, kind in zip(predictions, kinds) if kind == "pairs"])
    if len(ranks):
        found = {"mrr@10": float(np.where(ranks <= 10, 1 / ranks, 0).mean()), "recall@1": float((ranks == 1).mean())}
    for kind in {*kinds} - {"pairs"}:
        gold, values = np.array([
            (example.gold, prediction["_logit"]) for example, prediction in zip(examples, predictions)
            if example.more["kind"] == kind
        ]).T  # fmt: skip
        varies = np.ptp(gold) > 0 and bool(np.isfinite(values).all())
        if kind == "labelled":
            found["average_precision"] = float(metrics.average_precision_score(gold > 0.5, values)) if varies else None
        else:
            varies = varies and np.ptp(values) > 0
            found["spearman"] = float(stats.spearmanr(gold, values).statistic) if varies else None
    return found
