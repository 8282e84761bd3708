"""Search is exact, whatever the blocks, and ties have one order; scores are those of scikit-learn and by hand."""

import json

import numpy as np
import pytest
import torch

from fastbert.retrieval import search as module
from fastbert.retrieval.embedding import embed_file, load_embedder
from fastbert.retrieval.scores import correlations, means, of_query
from fastbert.retrieval.search import SIMILARITIES, Best, search, vectors


@pytest.mark.parametrize("similarity", SIMILARITIES)
@pytest.mark.parametrize("blocks", [(3, 4), (256, 4096)])
def test_the_best_are_those_of_a_full_sort(similarity, blocks, monkeypatch):
    """Small whole numbers: many equal scores, and a vector of zeros. Cosines of one number are exact."""
    monkeypatch.setattr(module, "QUERIES", blocks[0])
    monkeypatch.setattr(module, "DOCUMENTS", blocks[1])
    draw = np.random.default_rng(0)
    queries, documents = (
        draw.integers(-1, 2, (n, 1 if similarity == "cosine" else 2)).astype(np.float32) for n in (7, 23)
    )
    documents[5] = 0
    ranks = draw.permutation(23)
    best = Best(torch.from_numpy(queries), 9, similarity)
    for rows in (slice(0, 6), slice(6, 6), slice(6, 23)):
        best.add(torch.from_numpy(documents[rows]), torch.from_numpy(ranks[rows]))
    scores, found = best.found()
    every = SIMILARITIES[similarity](torch.from_numpy(queries), torch.from_numpy(documents)).numpy() + 0.0
    for i, row in enumerate(every):
        wanted = sorted(zip(row.tolist(), ranks.tolist()), reverse=True)[:9]
        assert [*zip(scores[i].tolist(), found[i].tolist())] == wanted
    assert len(np.unique(every)) < every.size / 4
    assert similarity != "cosine" or (every[:, 5] == 0).all()


def test_vectors_of_a_directory(directory, tmp_path):
    """float32, bits and int8, as far as they can tell; the same from parquet; k beyond the documents."""
    model = load_embedder(directory, device="cpu")
    texts = [f"the {a} guards {b}" for a in ("cat", "dog", "bird") for b in ("barns", "sheep", "trees", "hills")]
    (tmp_path / "in.txt").write_text("\n".join(texts))
    queries = model.encode(texts)
    wanted, rows = search(queries, queries, 12)
    assert (rows[:, 0] == np.arange(12)).all() and search(queries, queries, 99)[1].shape == (12, 12)
    for name, precision in (("f", "float32"), ("i", "int8"), ("b", "ubinary"), ("f.parquet", "float16")):
        embed_file(model, tmp_path / "in.txt", tmp_path / name, precision=precision)
        found, best = search(queries, tmp_path / name, 12)
        # two texts may have the same bits
        assert (best[:, 0] == np.arange(12)).mean() > 0.5
        assert precision == "ubinary" or np.abs(found - wanted).max() < 0.01
    (tmp_path / "f" / "part-00000.npy").unlink()
    with pytest.raises(ValueError, match="f has 0 vectors, its manifest says 12"):
        [*vectors(tmp_path / "f")]
    with pytest.raises(ValueError, match="vectors have 32 numbers, the queries' 7"):
        search(queries[:, :7], tmp_path / "i")
    with pytest.raises(ValueError, match="has no manifest.json: expected a directory of fastbert embed"):
        search(queries, tmp_path)
    with pytest.raises(ValueError, match="the score of query 1 and document 2 is not finite"):
        search(queries[:1], np.stack([queries[0], queries[0] * np.nan]), 1)
    assert json.loads((tmp_path / "i" / "manifest.json").read_text())["precision"] == "int8"


def test_scores_by_hand():
    found = of_query(["a", "x", "b"], {"b": 1, "c": 2, "x": 0})
    assert found == pytest.approx({
        "ndcg@10": (1 / 2) / (2 + 1 / np.log2(3)), "mrr@10": 1 / 3, "recall@1": 0, "recall@10": 1 / 2,
        "recall@100": 1 / 2, "map@100": 1 / 3 / 2,
    })  # fmt: skip
    # beyond the cuts
    late = [str(i) for i in range(200)]
    assert of_query(late, {"10": 1})["mrr@10"] == of_query(late, {"10": 1})["ndcg@10"] == 0
    assert (of_query(late, {"99": 1})["map@100"], of_query(late, {"100": 1})["map@100"]) == (0.01, 0)
    assert of_query([], {"a": 3}) == dict.fromkeys(found, 0)


def test_ndcg_is_that_of_scikit_learn():
    sklearn = pytest.importorskip("sklearn.metrics")
    draw = np.random.default_rng(1)
    for _ in range(20):
        grades, scores = draw.integers(0, 4, 30), draw.permutation(30)
        grades[0] = 1
        ranking = [str(i) for i in np.argsort(-scores)]
        found = of_query(ranking, {str(i): float(grade) for i, grade in enumerate(grades)})["ndcg@10"]
        assert found == pytest.approx(sklearn.ndcg_score([grades], [scores], k=10))


def test_intervals():
    """Of a mean: about two standard errors each way; the same at every call; of a correlation: around it."""
    draw = np.random.default_rng(2)
    per_query = [{"x": float(value)} for value in draw.normal(size=400)]
    mean, intervals = means(per_query)
    low, high = intervals["x"]
    assert low < mean["x"] < high and (high - low) / 4 == pytest.approx(1 / 20, rel=0.15)
    assert means(per_query)[1] == intervals
    gold = draw.normal(size=300)
    stats = pytest.importorskip("scipy.stats")
    noisy = np.round(gold + draw.normal(size=300))
    found, intervals = correlations(gold, noisy)
    assert found["spearman"] == pytest.approx(stats.spearmanr(gold, noisy).statistic)
    assert found["pearson"] == pytest.approx(stats.pearsonr(gold, noisy).statistic)
    assert all(intervals[name][0] < found[name] < intervals[name][1] for name in found)
    assert correlations([1, 1], [0.1, 0.2]) == (
        {"spearman": None, "pearson": None},
        {"spearman": None, "pearson": None},
    )
