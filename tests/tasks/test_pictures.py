"""The pictures of an evaluation: which there are, and what their numbers are."""

import pytest

from fastbert.tasks import pictures
from fastbert.tasks.examples import Example, Spec

# before the fixture that draws nothing
draw = pictures.draw


@pytest.fixture
def texts(monkeypatch):
    """The texts in the pictures."""
    pytest.importorskip("matplotlib")
    from matplotlib.axes import Axes

    found, text, line = [], Axes.text, Axes.axvline
    monkeypatch.setattr(Axes, "text", lambda *args, **more: (found.append(args[1:4]), text(*args, **more))[1])
    monkeypatch.setattr(Axes, "axvline", lambda *args, **more: (found.append(more["label"]), line(*args, **more))[1])
    return found


def test_a_classifier(texts, tmp_path):
    spec = Spec("classify", ("a", "b"), max_length=16, truncate=True)
    examples = [Example(i, ("x",), gold) for i, gold in enumerate("aab")]
    predictions = [{"label": label, "score": score} for label, score in (("a", 0.9), ("b", 0.6), ("b", 0.8))]
    scores = {"per_class": {"a": {"f1": 0.5}, "b": {"f1": 0.7}}}
    draw(tmp_path, spec, examples, predictions, scores, {5: 10, 17: 2, 30: 1})
    names = ["confusion_matrix.png", "lengths.png", "per_class_f1.png", "reliability.png"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    assert all(path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 5000 for path in tmp_path.iterdir())
    # (column, row, count): a is taken for a and for b, b for b
    assert texts == ["16 tokens: 3 of 13 are longer, cut", (0, 0, "1"), (1, 0, "1"), (1, 1, "1")]


def test_a_number_has_no_matrix(texts, tmp_path):
    draw(tmp_path, Spec("regress", ()), [Example(1, ("x",), 0.5)], [{"score": 0.5}], {"mse": 0.0})
    assert not [*tmp_path.iterdir()] and not texts


def test_too_many_labels_for_a_matrix(texts, tmp_path):
    labels = tuple(f"label {i}" for i in range(pictures.MAX_LABELS + 1))
    scores = {"per_class": {label: {"f1": 0.5} for label in labels}}
    draw(
        tmp_path,
        Spec("classify", labels),
        [Example(1, ("x",), labels[0])],
        [{"label": labels[0], "score": 1.0}],
        scores,
    )
    assert [path.name for path in tmp_path.iterdir()] == ["reliability.png"]
