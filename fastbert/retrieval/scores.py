"""Scores of rankings, as trec_eval has them, and of similarities; each with an interval.

A ranking is the ids that were found for a query, the best first. Its gold is {id: grade}; a grade above 0 is relevant.
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np

from ..tasks.results import percentiles

# the main one first
MAIN = "ndcg@10"
CUTS = (1, 10, 100)
# documents of a ranking that a score looks at
DEPTH = 100
RESAMPLES = 1000


def of_query(ranking: Sequence[str], grades: Mapping[str, float]) -> dict[str, float]:
    """The scores of a ranking. grades: of all judged documents, those that were not found included; one is relevant.

    ndcg@10: gains are the grades, the ideal ranking has all judged documents. mrr@10: 1 / rank of the first relevant
    document, 0 beyond 10. recall@k: the share of the relevant documents among the first k. map@100: the mean of the
    precision at each relevant document, 0 for those beyond 100.
    """
    relevant = {name for name, grade in grades.items() if grade > 0}
    hits = [name in relevant for name in ranking[:DEPTH]]
    places = [rank for rank, hit in enumerate(hits, 1) if hit]
    ideal = sorted((grade for grade in grades.values() if grade > 0), reverse=True)
    gains = [max(grades.get(name, 0), 0) for name in ranking[:10]]
    first = places[0] if places else math.inf
    return {
        MAIN: _dcg(gains) / _dcg(ideal[:10]),
        "mrr@10": 1 / first if first <= 10 else 0.0,
        **{f"recall@{k}": sum(hits[:k]) / len(relevant) for k in CUTS},
        "map@100": sum(count / rank for count, rank in enumerate(places, 1)) / len(relevant),
    }


def _dcg(gains):
    return sum(gain / math.log2(rank + 1) for rank, gain in enumerate(gains, 1))


def means(per_query: Sequence[dict[str, float]]) -> tuple[dict[str, float], dict[str, list[float]]]:
    """(the mean of each score, the middle 95 % of the means of queries drawn with replacement), both by name."""
    names = [*per_query[0]]
    values = np.array([[one[name] for name in names] for one in per_query])
    draw = np.random.default_rng(0)
    drawn = np.stack([values[draw.integers(0, len(values), len(values))].mean(0) for _ in range(RESAMPLES)])
    return (
        dict(zip(names, values.mean(0).tolist(), strict=True)),
        {name: percentiles(drawn[:, i].tolist()) for i, name in enumerate(names)},
    )


def correlations(gold: Sequence[float], values: Sequence[float]) -> tuple[dict, dict]:
    """(Spearman's and Pearson's correlation, their intervals over pairs drawn with replacement); None if undefined."""
    gold, values = np.asarray(gold, np.float64), np.asarray(values, np.float64)
    draw = np.random.default_rng(0)
    # a ranking of many pairs takes long
    times = min(RESAMPLES, max(100, 5_000_000 // len(gold)))
    draws = (draw.integers(0, len(gold), len(gold)) for _ in range(times))
    drawn = [_correlations(gold[rows], values[rows]) for rows in draws]
    names = ("spearman", "pearson")
    found = dict(zip(names, _correlations(gold, values), strict=True))
    return (
        {name: None if math.isnan(value) else value for name, value in found.items()},
        {name: percentiles([one[i] for one in drawn]) for i, name in enumerate(names)},
    )


def _correlations(gold, values):
    from scipy.stats import rankdata

    return _pearson(rankdata(gold), rankdata(values)), _pearson(gold, values)


def _pearson(x, y):
    if np.ptp(x) == 0 or np.ptp(y) == 0:
        return math.nan
    return float(np.corrcoef(x, y)[0, 1])
