"""Answers: windows and their labels, the best span, no answer."""

import itertools

import numpy as np
import pytest
from test_tag import spelling

from fastbert.tasks import answer
from fastbert.tasks.examples import Example, Pieces, Spec
from fastbert.training.windows import encoded as for_training

QUESTION, CONTEXT = "who?", "Una  Reed met Cafe\u0301 Bo at one."
TOKENIZER = spelling(sorted({*"who?", *CONTEXT.lower()} - {" "}))


def example(text, start=None, context=CONTEXT):
    start = context.index(text) if start is None else start
    gold = {"texts": [text] if text else [], "spans": [[start, start + len(text)]] if text else []}
    return Example(1, (QUESTION, context), gold)


def encoded(one, tokenizer=TOKENIZER, *, no_answer=False, **settings):
    spec = Spec("answer", (), settings={"no_answer": no_answer}, **{"max_length": 64, "stride": 4} | settings)
    return answer.encode([one], Pieces(tokenizer, spec), spec)[0], spec


@pytest.mark.parametrize("bytes_", [False, True])
@pytest.mark.parametrize("max_length", [64, 20])
@pytest.mark.parametrize("text", ["Una", "Una  Reed", "Cafe\u0301", " Bo ", "met", "one."])
def test_the_label_of_a_window_gives_the_answer_back(text, max_length, bytes_):
    windows, spec = encoded(example(text), spelling("", bytes_=True) if bytes_ else TOKENIZER, max_length=max_length)
    labelled = [window for window in windows if window.label != (-100, -100)]
    assert labelled and (len(windows) > 1) == (max_length == 20)
    for window in labelled:
        first, offsets = window.more
        assert all(first <= place < first + len(offsets) for place in window.label)
        (start, _), (_, end) = (offsets[place - first] for place in window.label)
        # a tokenizer that strips accents may end before one
        assert CONTEXT[start:end].strip().removesuffix("\u0301") == text.strip().removesuffix("\u0301")
        # the logits that say so
        logits = np.zeros((len(window.ids), 2))
        logits[window.label, (0, 1)] = 9
        found = answer.decode(example(text), [window], [logits], spec)
        assert found["answer"] == text.strip() == CONTEXT[found["start"] : found["end"]]


def test_windows_without_the_whole_answer():
    one = example("Cafe\u0301 Bo")
    for no_answer, nothing in ((False, (-100, -100)), (True, (0, 0))):
        windows, _ = encoded(one, no_answer=no_answer, max_length=16)
        whole = [w.more[1][0, 0] <= 14 and w.more[1][-1, 1] >= 21 for w in windows]
        assert any(whole) and not all(whole)
        assert [window.label == nothing for window in windows] == [not complete for complete in whole]
    assert {window.label for window in encoded(example(""), no_answer=True)[0]} == {(0, 0)}
    # an answer that is not where it is said to be teaches nothing, not even that there is none
    lost = Example(1, (QUESTION, CONTEXT), {"texts": ["Zoe"], "spans": [None]})
    assert {window.label for window in encoded(lost, no_answer=True)[0]} == {(-100, -100)}


def test_a_long_question_leaves_room():
    one = Example(1, ("who? " * 20, CONTEXT), None)
    windows, _ = encoded(one, max_length=20, stride=2)
    assert all(len(window.ids) <= 20 and len(window.more[1]) for window in windows)
    covered = set().union(*(range(*offset) for window in windows for offset in window.more[1].tolist()))
    assert all(i in covered or not letter.strip() for i, letter in enumerate(CONTEXT) if letter != "\u0301")
    short = Example(1, ("who? " * 3, "Bo"), None)
    assert len(encoded(short)[0][0].ids) == 3 + 12 + 2


def test_the_best_span_is_that_of_a_search():
    windows, spec = encoded(example("met"), max_length=24)
    random = np.random.default_rng(0)
    logits = [random.normal(size=(len(window.ids), 2)) for window in windows]
    # spans that must not win: in the question, at [SEP], backwards
    for one, window in zip(logits, windows):
        one[: window.more[0]] += 9
        one[-1] += 9
    best = {}
    for one, window in zip(logits, windows, strict=True):
        first, offsets = window.more
        for a, b in itertools.combinations_with_replacement(range(len(offsets)), 2):
            if b - a < answer.MAX_ANSWER:
                span = (int(offsets[a, 0]), int(offsets[b, 1]))
                best[span] = max(best.get(span, -99), one[first + a, 0] + one[first + b, 1])
    expected = sorted(best, key=best.get, reverse=True)
    found = answer.decode(example("met"), windows, logits, spec)
    assert [(one["start"], one["end"]) for one in found["n_best"]] == expected[: answer.SHOWN]
    shares = np.exp([best[span] for span in expected[: answer.N_BEST]])
    assert found["score"] == pytest.approx(shares[0] / shares.sum())


def test_no_answer_is_the_least_null_score_against_the_best_span():
    windows, spec = encoded(example("met"), no_answer=True, max_length=20)
    logits = [np.zeros((len(window.ids), 2)) for window in windows]
    for null, one in zip((5.0, 3.0, 4.0), logits):
        one[0] = null / 2
    logits[1][windows[1].more[0]] = 1.0
    found = answer.decode(example("met"), windows, logits, spec)
    assert found["no_answer_score"] == pytest.approx(min(5, 3, 4, *(0 for _ in logits[3:])) - 2.0)
    spec.settings["null_threshold"] = found["no_answer_score"] - 0.1
    below = answer.decode(example("met"), windows, logits, spec)
    spec.settings["null_threshold"] = found["no_answer_score"]
    at = answer.decode(example("met"), windows, logits, spec)
    assert (below["answer"], below["start"]) == ("", None) and at["answer"] != ""


def test_validation_chooses_the_threshold_and_answers_by_it():
    spec = Spec("answer", (), settings={"no_answer": True})
    golds = [["x"], [], ["y"], []]
    examples = [Example(1, ("q", "x y"), {"texts": gold, "spans": []}) for gold in golds]
    spans = {"x": ("x", 0, 1, 0.5), "y": ("y", 2, 3, 0.5)}
    predictions = [
        answer._chosen({"_spans": [spans[text]], "_gap": gap, "_null_share": 0.5, "_golds": tuple(gold)}, spec)
        for (text, gap), gold in zip((("x", 1.0), ("x", 2.5), ("y", 2.0), ("y", 3.0)), golds)
    ]
    assert answer.score(examples, predictions, spec)["f1"] == 50
    scores = answer.score(examples, predictions, spec, tune=True)
    assert scores["f1"] == scores["best_f1"] == 100 and spec.settings["null_threshold"] == 2.0
    assert [one["answer"] for one in predictions] == ["x", "", "y", ""]
    assert [one["_error"] for one in predictions] == [0, 0, 0, 0] and predictions[1]["_answer"] == "no answer"


def test_where_no_answer_is_right_nothing_is_answered():
    spec = Spec("answer", (), settings={"no_answer": True})
    golds = [["x"], [], []]
    examples = [Example(1, ("q", "x y"), {"texts": gold, "spans": []}) for gold in golds]
    wrong = {"_spans": [("z", 0, 1, 0.5)], "_null_share": 0.5}
    predictions = [
        answer._chosen({**wrong, "_gap": gap, "_golds": tuple(gold)}, spec)
        for gap, gold in zip((-5.0, -3.0, 2.0), golds)
    ]
    scores = answer.score(examples, predictions, spec, tune=True)
    assert scores["f1"] == scores["best_f1"] == pytest.approx(200 / 3) and not any(p["answer"] for p in predictions)


@pytest.mark.parametrize("no_answer", [False, True])
@pytest.mark.parametrize("context", ["", "\u200b", "   "])
def test_a_context_without_tokens(context, no_answer):
    one = Example(1, (QUESTION, context), {"texts": [], "spans": []})
    windows, spec = encoded(one, no_answer=no_answer)
    assert [len(window.ids) for window in windows] == [2 + 4 + 1]
    found = answer.decode(one, windows, [np.zeros((len(windows[0].ids), 2))], spec)
    assert found["answer"] == "" and found["n_best"] == [] and np.isfinite(found["score"])
    assert answer.score([one], [found], spec)["f1"] == 100


def test_items_of_predict():
    expected = answer.example(1, (" who?", " Bo"))
    assert expected.texts == ("who?", " Bo") == answer.example(1, {"question": "who?", "context": " Bo"}).texts
    for item in ("who?", ("who?",), {"question": "who?"}):
        with pytest.raises(ValueError, match="item 3"):
            answer.example(3, item)


def test_windows_that_teach_nothing_are_left_out_of_training():
    lost = Example(2, (QUESTION, CONTEXT), {"texts": ["Zoe"], "spans": [None]})
    for no_answer, counts in ((False, [1, 0]), (True, [2, 0])):
        spec = Spec("answer", (), max_length=20, stride=4, settings={"no_answer": no_answer})
        found = for_training(answer, [example("Una"), lost], Pieces(TOKENIZER, spec), spec)
        assert [len(windows) for windows in found] == counts
