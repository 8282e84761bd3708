"""Files of queries with documents, scored and labelled pairs; scores of a ranking."""

import numpy as np
import pytest
from labelled import write_csv, write_jsonl

from fastbert.tasks import embed, rerank, table
from fastbert.tasks.examples import Example, Spec, read_files


def read(path, settings=None, **spec):
    spec = Spec("embed", settings=settings or {}, **spec)
    examples, (notes,) = read_files(embed, [str(path)], spec)
    return [(one.texts, one.gold) for one in examples], spec, notes.said()


def test_triplets(tmp_path):
    """Negatives of every kind, ragged; what is none is left out and counted, never the text "None"."""
    rows = [
        {"anchor": "a", "positive": "b", "negative": "c"}, {"anchor": "a", "positive": "b", "negative": "b"},
        {"anchor": "a", "positive": "b", "negative": None}, {"anchor": "a", "positive": "b", "negative": ""},
        {"anchor": "d", "positive": "d", "negative": "e"}, {"anchor": "f", "positive": "g", "negative": ["h", "i"]},
        {"anchor": "k", "positive": "l", "negative": []}, {"anchor": " ", "positive": "l", "negative": "m"},
    ]  # fmt: skip
    path = write_jsonl(tmp_path / "train.jsonl", rows)
    assert table.detect(str(path)) == "embed"
    found, spec, said = read(path)
    texts = [("a", "b", "c"), *[("a", "b")] * 3, ("d", "d", "e"), ("f", "g", "h", "i"), ("k", "l")]
    assert found == [(one, None) for one in texts]
    assert spec.settings["loss"] == "contrastive" and embed.main_score(spec) == "mrr@10"
    for part in ("1 rows skipped, lines 8 ('anchor' is empty)", "left out: 1, line 2", "positive is the query: 1",
                 "rows without a negative: 4"):  # fmt: skip
        assert part in said


@pytest.mark.parametrize(
    ("row", "texts", "gold"),
    [
        ({"query": "q", "pos": ["p", "r"], "neg": ["n"]}, [("q", "p", "n"), ("q", "r", "n")], [None, None]),
        ({"query": "q", "pos": ["p"], "neg": ["n", "m"], "pos_scores": [9], "neg_scores": [2.5, -1]},
         [("q", "p", "n", "m")], [[9, 2.5, -1]]),
        ({"query": "q", "positive": "p", "negative": "n", "margin": 3}, [("q", "p", "n")], [[0, -3]]),
        ({"query": "q", "positive": "p", "negative_1": "n", "negative_2": "m", "score": [5, 1, 2]},
         [("q", "p", "n", "m")], [[5, 1, 2]]),
    ],
    ids=["bge", "bge-scores", "margin", "scores"],
)  # fmt: skip
def test_rows_of_others(row, texts, gold, tmp_path):
    path = write_jsonl(tmp_path / "train.jsonl", [row])
    found, *_ = read(path, {} if gold[0] is None else {"loss": "margin"})
    assert found == list(zip(texts, gold, strict=True))


def test_scored_and_labelled_pairs(tmp_path):
    header = ("sentence1", "sentence2", "score")
    path = write_csv(tmp_path / "sts.csv", [('A "cat', "A cat", "4.0"), ("A", "B", "0")], header)
    found, spec, _ = read(path)
    assert found == [(('A "cat', "A cat"), 4.0), (("A", "B"), 0.0)]
    assert spec.settings["loss"] == "cosent" and embed.main_score(spec) == "spearman"
    # cosines are trained to 0 .. 1
    found, *_ = read(path, {"loss": "cosine", "score_range": [0, 5]})
    assert [gold for _, gold in found] == [0.8, 0.0]
    with pytest.raises(ValueError, match="sts.csv line 2: the score is 4: expected -1 to 1 .*--score-range"):
        read(path, {"loss": "cosine"})

    rows = [("a", "b", "entailment"), ("c", "d", "-"), ("e", "f", "neutral")]
    path = write_csv(tmp_path / "nli.csv", rows, ("premise", "hypothesis", "label"))
    found, spec, said = read(path)
    assert [gold for _, gold in found] == ["entailment", "neutral"] and "no gold label, '-'" in said
    assert spec.settings["loss"] == "softmax" and spec.labels == ("entailment", "neutral")


@pytest.mark.parametrize(
    ("rows", "settings", "said"),
    [
        ([{"text": "a", "label": 1}], {}, "no columns 'query' and 'positive', nor 'sentence1' and 'sentence2': it has"),
        ([{"query": "a", "positive": 3}], {}, "line 1: 'positive' or a negative is no text"),
        ([{"query": None, "positive": "b"}], {}, "line 1: 'query' is 'None': expected text"),
        ([{"query": "a", "positive": "b"}], {"loss": "cosent"}, "has queries with documents .*--loss cosent learns"),
        ([{"sentence1": "a", "sentence2": "b", "score": "x"}], {}, "line 1: 'score' is 'x': expected a number"),
        ([{"query": "a", "positive": "b", "negative": "c"}], {"loss": "margin"}, "line 1: no teacher's score"),
        ([{"query": "", "positive": "b"}], {}, "has no usable row.*'query' is empty"),
    ],
)
def test_what_is_wrong_is_one_line(rows, settings, said, tmp_path):
    with pytest.raises(ValueError, match=said):
        read(write_jsonl(tmp_path / "train.jsonl", rows), settings)


def ranked(vectors, texts):
    spec = Spec("embed", (), settings={"loss": "contrastive", "measured": "pairs"})
    examples = [Example(i, one, more={"kind": "pairs"}) for i, one in enumerate(texts)]
    found = [
        embed.decode(example, [], [np.array(vectors[text], float) for text in example.texts], spec)
        for example in examples
    ]
    return embed.score(examples, found, spec), [one["rank"] for one in found]


def test_ranks_among_all_documents():
    """Own negatives and others' documents compete, other documents of the same query do not."""
    vectors = {"q": [1, 0], "r": [0, 2], "a": [1, 0.1], "b": [0.9, 0.3], "c": [0.1, 1], "n": [0, 3]}
    scores, ranks = ranked(vectors, [("q", "a"), ("q", "b"), ("r", "c", "n")])
    assert ranks == [1, 1, 2]
    assert scores == {
        "mrr@10": pytest.approx(2.5 / 3),
        "recall@1": pytest.approx(2 / 3),
        "recall@10": 1.0,
        "documents": 4,
    }


def test_a_constant_and_a_broken_model_are_not_good():
    """Of equal scores the right one comes last; NaN is no score; a zero vector is like nothing."""
    texts = [(f"q{i}", f"d{i}") for i in range(30)]
    for value in ([1.0, 0.0], [float("nan")] * 2, [0.0, 0.0]):
        scores, ranks = ranked({text: value for one in texts for text in one}, texts)
        assert ranks == [30] * 30 and scores["mrr@10"] == scores["recall@10"] == 0.0


def test_labels_without_an_order_are_not_scored():
    spec = Spec("embed", (), settings={"loss": "softmax", "measured": "labelled"})
    examples = [Example(1, ("a", "b"), gold, more={"kind": "labelled"}) for gold in ("Entailment", "neutral", "2")]
    found = [{"score": score} for score in (0.9, 0.2)]
    assert embed.score(examples[:2], found, spec)["spearman"] == pytest.approx(1.0)
    with pytest.raises(ValueError, match="the label '2' has no order"):
        embed.score(examples, [*found, {"score": 0}], spec)


def test_what_a_reranker_reads(tmp_path):
    """Labels are 0 and 1; scores are divided by their range; a row without a negative is left out."""
    rows = [("a", "b", "1"), ("c", "d", "0")]
    spec = Spec("rerank")
    examples, _ = read_files(rerank, [str(write_csv(tmp_path / "a.csv", rows, ("text1", "text2", "label")))], spec)
    assert [one.gold for one in examples] == [1.0, 0.0] and rerank.main_score(spec) == "average_precision"
    assert spec.settings["loss"] == "binary" and spec.labels == ()
    path = write_csv(tmp_path / "b.csv", [("a", "b", "4")], ("text1", "text2", "score"))
    with pytest.raises(ValueError, match="line 2: the label is '4.0': expected a number, 0 to 1; .*--score-range"):
        read_files(rerank, [str(path)], Spec("rerank"))
    examples, _ = read_files(rerank, [str(path)], Spec("rerank", settings={"score_range": [0, 5]}))
    assert [one.gold for one in examples] == [0.8]
    rows = [{"query": "q", "positive": "p"}, {"query": "q", "positive": "p", "negative": "n"}]
    examples, (notes,) = read_files(rerank, [str(write_jsonl(tmp_path / "c.jsonl", rows))], Spec("rerank"))
    assert [one.gold for one in examples] == [[1.0, 0.0]] and "no negative" in notes.said()


def test_scores_of_a_reranker():
    spec = Spec("rerank", (), settings={"loss": "binary", "measured": "pairs"})
    texts = ("q", "p", "n", "m")
    examples = [Example(i, texts, [1.0, 0.0, 0.0], more={"kind": "pairs"}) for i in range(3)]
    logits = ([2, 1, 0], [1, 1, 3], [np.nan] * 3)
    found = [rerank.decode(one, [], [np.array([x]) for x in row], spec) for one, row in zip(examples, logits)]
    assert [one["rank"] for one in found] == [1, 3, 3] and found[0]["score"] == pytest.approx(1 / (1 + np.exp(-2)))
    assert rerank.score(examples, found, spec) == {"mrr@10": pytest.approx(5 / 9), "recall@1": pytest.approx(1 / 3)}
    examples = [Example(i, ("q", "p"), gold, more={"kind": "labelled"}) for i, gold in enumerate((1.0, 0.0, 1.0))]
    found = [rerank.decode(one, [], [np.array([x])], spec) for one, x in zip(examples, (3, 2, 1))]
    assert rerank.score(examples, found, spec) == {"average_precision": pytest.approx((1 + 2 / 3) / 2)}
