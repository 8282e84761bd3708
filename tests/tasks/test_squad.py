"""SQuAD's scores and files."""

import json

import pytest
from labelled import write_jsonl

from fastbert.tasks import answer, squad, table
from fastbert.tasks.examples import Spec, read_files

# answer, right answers, (EM, F1) by the rules of 1.1 and of 2.0
CASES = [
    ("  the blue gate. ", ["Blue Gate", "gate"], (1, 1), (1, 1)),
    ("an", ["the"], (1, 0), (1, 1)),
    ("", ["gate"], (0, 0), (0, 0)),
    ("", [], (0, 0), (1, 1)),
    ("gate", [], (0, 0), (0, 0)),
    ("u.k.", ["UK"], (1, 1), (1, 1)),
    ("\u201cgate\u201d", ["gate"], (0, 0), (0, 0)),
    ("one-two", ["one two"], (0, 0), (0, 0)),
    ("red red blue", ["red blue blue"], (0, 2 / 3), (0, 2 / 3)),
]


@pytest.mark.parametrize(("text", "golds", "one", "two"), CASES, ids=[repr(case[0]) for case in CASES])
def test_exact_match_and_f1(text, golds, one, two):
    assert squad.exact_and_f1(text, tuple(golds), 1) == pytest.approx(one)
    assert squad.exact_and_f1(text, tuple(golds), 2) == pytest.approx(two)


def test_answers_and_non_answers_are_scored_apart():
    golds = [("a b", "b"), (), ("c d",), ()]
    scores = squad.scores(["b", "", "c", "x"], golds, 2)
    assert (scores["exact_match"], scores["f1"]) == pytest.approx((50, 100 * (2 + 2 / 3) / 4))
    assert (scores["HasAns_exact"], scores["HasAns_f1"]) == pytest.approx((50, 100 * (1 + 2 / 3) / 2))
    assert (scores["NoAns_exact"], scores["NoAns_total"]) == (50, 2)
    assert squad.scores(["b"], [("b",)], 2)["NoAns_f1"] is None


def test_the_best_threshold_is_that_of_a_search():
    golds = [("x",), (), ("y",), (), ("z",), ()]
    texts, nulls = ["x", "q", "y", "q", "w", "q"], [-4.0, -3.0, -2.5, 0.5, 1.0, 3.0]
    found = squad.best_thresholds(texts, golds, nulls)

    def score(threshold):
        answers = ["" if null > threshold else text for text, null in zip(texts, nulls)]
        return squad.scores(answers, golds, 2)["f1"]

    # below all of them nothing is answered: threshold 0 is where the official search starts
    assert found["best_f1"] == max(score(threshold) for threshold in (-9, *nulls)) == score(found["best_f1_thresh"])
    assert found["best_f1_thresh"] == -4.0


def read(path, **wants):
    spec = Spec("answer")
    examples, (notes,) = read_files(answer, [str(path)], spec, **wants)
    return {example.id: example for example in examples}, spec, notes


def document(context, *questions, version="1.1"):
    rows = [{"id": name, "question": "Who?"} | more for name, more in questions]
    return {"version": version, "data": [{"title": "t", "paragraphs": [{"context": context, "qas": rows}]}]}


def at(*answers):
    return {"answers": [{"text": text, "answer_start": start} for text, start in answers]}


def test_answers_stand_at_their_offsets_or_are_only_scored(tmp_path):
    context = "\U0001f3b5 Una Cafe\u0301  sings. Una\u00a0hums."
    path = tmp_path / "train.json"
    rows = {
        "second": at(("Una", 20), ("Una Cafe\u0301", 2)), "utf16": at(("Una", 3)), "nfc": at(("Caf\u00e9", 6)),
        "blanks": at(("Cafe\u0301  sings", 6)), "joined": at(("Una\u00a0hums", 20)), "far": at(("Una", 999)),
        "other": at(("Zoe", 2), ("Una", 2)),
    }  # fmt: skip
    path.write_text(json.dumps(document(context, *rows.items()), ensure_ascii=False))
    assert table.detect(str(path)) == "answer"
    found, spec, notes = read(path)
    assert [*found] == [*rows] and spec.settings == {"no_answer": False}
    spans = {name: next((span for span in one.gold["spans"] if span), None) for name, one in found.items()}
    assert [name for name, span in spans.items() if span is None] == ["utf16", "nfc", "far"]
    for name, span in spans.items():
        if span is not None:
            assert context[slice(*span)] in found[name].gold["texts"]
    assert spans["second"] == [20, 23] and found["other"].gold["texts"] == ["Zoe", "Una"]
    assert "cannot be learnt, only scored: 3, 'utf16' ('Una' is not at 3" in notes.said()


def test_questions_without_an_answer(tmp_path):
    path = tmp_path / "train.json"
    plausible = {"plausible_answers": [{"text": "Una", "answer_start": 0}]}
    path.write_text(json.dumps(document(
        "Una sings.", ("a", at(("Una", 0)) | {"is_impossible": False}), ("b", {"answers": []} | plausible),
        ("c", {"is_impossible": True}), ("d", at(("Una", 0)) | {"is_impossible": True}), ("a", at(("sings", 4))),
    )))  # fmt: skip
    found, spec, notes = read(path)
    assert {name: one.gold["texts"] for name, one in found.items()} == {"a": ["Una"], "b": [], "c": []}
    assert spec.settings == {"no_answer": True}
    assert "2 rows skipped" in notes.said() and "5 (the id 'a' is there twice)" in notes.said()


def test_columns(tmp_path):
    base = {"question": " Who? ", "context": "\u00a0Una sings to Bo, Bo hums."}
    rows = [
        {"answers": {"text": ["Una"], "answer_start": [1]}}, {"answers": {"text": [], "answer_start": []}},
        {"answers": [{"text": "Bo", "answer_start": 14}]}, {"answers": "Una"}, {"answers": None}, {"answers": "Bo"},
        {"answers": ["sings", "Una"]},
    ]  # fmt: skip
    path = write_jsonl(tmp_path / "train.jsonl", [base | row for row in rows])
    assert table.detect(str(path)) == "answer"
    found, _, notes = read(path)
    assert [one.gold["spans"] for one in found.values()] == [
        [[1, 4]], [], [[14, 16]], [[1, 4]], [], [None], [[5, 10], [1, 4]]
    ]  # fmt: skip
    assert found["row 1"].texts == ("Who?", base["context"])
    assert "'Bo' has no offset and is 2 times in the text" in notes.said()
    for bad, said in (
        ({"text": ["a", "b"], "answer_start": [1]}, "2 texts and 1 values"),
        ([{"text": "Una", "answer_start": "1"}], "expected a text and answer_start"), (7, "expected a text, or a list"),
    ):  # fmt: skip
        write_jsonl(path, [base | {"answers": "Una"}, base | {"answers": bad}])
        with pytest.raises(ValueError, match=f"train.jsonl line 2: .*{said}"):
            read(path)


def test_cells_of_a_csv(tmp_path):
    path = tmp_path / "train.csv"
    path.write_text(
        "question,context,answers\n"
        """Who?,Una sings.,"{""text"": [""Una""], ""answer_start"": [0]}"\n"""
        """Who?,Una sings.,"{'text': ['sings'], 'answer_start': [4]}"\nWho?,Una sings.,\n"""
    )
    assert [one.gold["spans"] for one in read(path)[0].values()] == [[[0, 3]], [[4, 9]], []]
    path.write_text("question,context,answer,answer_start\nWho?,Una hums and hums.,hums,13\n")
    assert [one.gold["spans"] for one in read(path)[0].values()] == [[[13, 17]]]


@pytest.mark.parametrize("paragraphs", ['[{"qas": [{"id": 1}]}]', "[", "3"])
def test_what_is_no_squad(paragraphs, tmp_path):
    path = tmp_path / "bad.json"
    path.write_text('{"data": [{"paragraphs": ' + paragraphs + "}]}")
    with pytest.raises(ValueError, match=r"bad\.json is not"):
        read(path)
