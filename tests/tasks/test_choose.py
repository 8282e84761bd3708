"""Choices: SWAG's and RACE's columns, ragged choices, scores."""

import numpy as np
import pytest
from labelled import write_jsonl
from test_tag import spelling

from fastbert.tasks import choose, table
from fastbert.tasks.examples import Example, Pieces, Spec, batch_of, read_files

SWAG = """sent1,sent2,gold-source,ending0,ending1,ending2,label
Una sits.,She,gold,sings.,"hums, too.",,2
Bo.,He,gen,a,b,c,0
"""


def read(path, spec=None, **wants):
    spec = Spec("choose") if spec is None else spec
    examples, (notes,) = read_files(choose, [str(path)], spec, **wants)
    return examples, spec, notes


def test_swag(tmp_path):
    path = tmp_path / "train.csv"
    path.write_text(SWAG)
    assert table.detect(str(path)) == "choose"
    examples, spec, notes = read(path)
    assert examples[0].texts == ("Una sits.", "She sings.", "She hums, too.", "She")
    assert [example.gold for example in examples] == [2, 0] and spec.settings["choices"] == 3
    assert "ending2 in line 2" in notes.said()


@pytest.mark.parametrize(
    ("row", "texts", "gold"),
    [
        ({"context": "c", "choices": ["x", "y"], "label": 1}, ("c", "x", "y"), 1),
        ({"context": "c", "choices": ["x", "y"], "label": "0"}, ("c", "x", "y"), 0),
        ({"article": "c", "question": "q?", "options": ["x", "y"], "answer": "B"}, ("c", "q? x", "q? y"), 1),
        (
            {"question": "q?", "choices": {"text": ["x", "y"], "label": ["1", "2"]}, "answerKey": "2"},
            ("q?", "x", "y"),
            1,
        ),
    ],
)
def test_rows_of_others(row, texts, gold, tmp_path):
    (example,), _, _ = read(write_jsonl(tmp_path / "train.jsonl", [row]))
    assert (example.texts, example.gold) == (texts, gold)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"choices": ["x", "y", "z"], "label": 0}, "3 choices, the training file's first row has 2"),
        ({"choices": ["x"], "label": 0}, "1 choices: expected at least two"),
        ({"choices": ["x", "y"], "label": 2}, "'label' is 2: expected 0 to 1, or A to B"),
        ({"choices": ["x", "y"], "label": True}, "'label' is True"),
        ({"choices": ["x", "y"]}, "'label' is None"),
        ({"choices": ["x", 3], "label": 0}, "expected a list of texts"),
    ],
)
def test_a_faulty_row_is_refused(row, said, tmp_path):
    good = {"context": "c", "choices": ["x", "y"], "label": 0}
    with pytest.raises(ValueError, match=f"train.jsonl line 2: .*{said}"):
        read(write_jsonl(tmp_path / "train.jsonl", [good, {"context": "c"} | row]))


def test_missing_columns_are_named(tmp_path):
    path = tmp_path / "train.csv"
    for header, said in (
        ("text,label", "no column 'choices' or 'ending0'"),
        ("ending0,ending1", "no column 'context'"),
    ):
        path.write_text(f"{header}\nx,y\n")
        with pytest.raises(ValueError, match=f"{said}: it has"):
            read(path)


def test_choices_share_their_context_in_one_batch():
    spec = Spec("choose", (), max_length=10, stride=0)
    examples = [Example(1, ("abcabc", "a", "bcabc", ""), 1), Example(2, ("c", "a", "b"), 0)]
    pieces = Pieces(spelling("abc"), spec)
    windows = choose.encode(examples, pieces, spec)
    assert [[len(window.ids) for window in one] for one in windows] == [[10, 10, 9], [5, 5]]
    # the longer text is cut, and neither to nothing
    assert [sum(window.types) for window in windows[0]] == [2, 4, 1] and pieces.truncated == 1
    batch = batch_of(windows)
    assert batch.cu_examples.tolist() == [0, 3, 5] and batch.targets.tolist() == [1, 1, 1, 0, 0]


def test_scores():
    spec = Spec("choose", ())
    examples = [Example(1, ("c", "x", "y", "z"), 2), Example(2, ("c", "x", "y"), 0)]
    logits = [[np.array([x]) for x in row] for row in ([0.0, 1.0, 3.0], [0.0, 0.0])]
    found = [choose.decode(one, [], values, spec) for one, values in zip(examples, logits)]
    # of equal choices the first
    assert [(one["choice"], one["text"]) for one in found] == [(2, "z"), (0, "x")]
    assert found[0]["probabilities"] == pytest.approx(np.exp([0, 1, 3]) / np.exp([0, 1, 3]).sum())
    scores = choose.score(examples, found, spec)
    assert scores["accuracy"] == 1.0 and scores["chance"] == pytest.approx((1 / 3 + 1 / 2) / 2)
    assert scores["log_loss"] == pytest.approx(-(np.log(found[0]["score"]) + np.log(0.5)) / 2)


def test_items_of_predict():
    for item in (("c", ["x", "y"]), ("c", "x", "y"), {"context": "c", "choices": ["x", "y"]}):
        assert choose.example(1, item).texts == ("c", "x", "y")
    with pytest.raises(ValueError, match="item 2"):
        choose.example(2, ("c", "x"))
