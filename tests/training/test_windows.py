"""Windows in flat arrays, made by threads, and kept: what goes in comes out, and no run finds the tokens of another."""

import dataclasses

import numpy as np
import pytest
from labelled import sentences, tokenizer_of

from fastbert.tasks import table
from fastbert.tasks.examples import Example, Pieces, Spec, batch_of
from fastbert.training import windows
from fastbert.training.example_batches import class_weights

LABELS = ("bird", "cat", "dog")
TEXTS = sentences(30)


def squad(text):
    return {"texts": ["every day"], "spans": [[text.index("every day"), text.index("every day") + 9]]}


# task -> examples with its kind of gold; some texts have several windows
GOLDS = {
    "classify": lambda text, label: Example(1, (text, "a cat"), label),
    "multilabel": lambda text, label: Example(1, (text,), (label, "cat") if label != "dog" else ()),
    "regress": lambda text, label: Example(1, (text,), len(text) / 3),
    "tag": lambda text, label: Example(1, (*text.split(),), ["O"] * 4 + ["cat"] + ["O"] * (len(text.split()) - 5),
                                       more={"words": "row"}),
    "answer": lambda text, label: Example(1, ("when", text), squad(text)),
    "choose": lambda text, label: Example(1, (text, *LABELS), LABELS.index(label)),
}  # fmt: skip


def case(task, place, length=14):
    spec = Spec(task, ("O", "cat") if task == "tag" else LABELS, max_length=length, stride=2)
    if task == "tag":
        spec.settings["scheme"] = "plain"
    examples = [GOLDS[task](text, label) for text, label in TEXTS]
    return table.task(task), examples, Pieces(tokenizer_of(place), spec), spec


@pytest.fixture(scope="module")
def place(encoder):
    return encoder.parent


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An empty cache that keeps everything; calls of a few examples."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(windows, "KEPT", 0)
    monkeypatch.setattr(windows, "CALL", 4)
    return tmp_path / "fastbert" / "tokens"


def same(one, two):
    for name in (field.name for field in dataclasses.fields(one)):
        a, b = getattr(one, name), getattr(two, name)
        assert (a is None) == (b is None) and (a is None or np.array_equal(a, b)), name
    return True


@pytest.mark.parametrize("task", GOLDS)
def test_arrays_hold_what_the_task_encoded(task, place):
    """By threads, as one call does; read back, as made; batches to the bit."""
    module, examples, pieces, spec = case(task, place)
    plain = module.encode(examples, pieces, spec)
    if task == "answer":
        plain = [[one for one in found if one.label != (-100, -100)] for found in plain]
    counted = pieces.lengths, pieces.windowed, pieces.truncated
    assert max(map(len, plain)) > 1 or task == "answer" or pieces.truncated
    said = []
    for _ in range(2):
        pieces = Pieces(tokenizer_of(place), spec)
        found = windows.encoded(module, examples, pieces, spec, say=said.append)
        assert counted == (pieces.lengths, pieces.windowed, pieces.truncated)
        assert len(found) == len(plain) and found.sizes.tolist() == [sum(len(w.ids) for w in one) for one in plain]
        same(batch_of(plain), batch_of([*found]))
    assert [line.partition(":")[0] for line in said] == [
        "the tokens are kept for the next run", "tokens of an earlier run"
    ]  # fmt: skip


def test_no_run_finds_the_tokens_of_another(place, cache):
    """Texts, labels, options and tokenizers that differ have their own; so has a changed task."""

    def number(task, examples, pieces, spec):
        windows.encoded(task, examples, pieces, spec)
        return len([*cache.iterdir()])

    task, examples, pieces, spec = case("classify", place)
    assert number(task, examples, pieces, spec) == number(task, examples, pieces, spec) == 1
    other = [dataclasses.replace(examples[0], gold="dog" if examples[0].gold == "cat" else "cat"), *examples[1:]]
    assert number(task, other, pieces, spec) == 2
    assert number(task, [dataclasses.replace(examples[0], texts=("the", "a cat")), *examples[1:]], pieces, spec) == 3
    assert number(task, examples, pieces, dataclasses.replace(spec, labels=("cat", "bird", "dog"))) == 4
    assert number(*case("classify", place, length=15)) == 5
    pieces.tokenizer.add_tokens(["mice"])
    assert number(task, examples, pieces, spec) == 6


@pytest.mark.parametrize("damage", ["flipped", "cut", "missing", "no manifest"])
def test_damaged_tokens_are_made_again(damage, place, cache):
    task, examples, pieces, spec = case("classify", place)
    expected = windows.encoded(task, examples, pieces, spec)[3]
    (directory,) = cache.iterdir()
    file = directory / ("MANIFEST.json" if damage == "no manifest" else "ids.npy")
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.unlink()
    if damage in ("flipped", "cut"):
        file.write_bytes(data[: -4 if damage == "cut" else None])
    for expected_line in ("the tokens are kept", "tokens of an earlier run"):
        said = []
        found = windows.encoded(task, examples, pieces, spec, say=said.append)
        assert said[0].startswith(expected_line) and np.array_equal(found[3][0].ids, expected[0].ids)


def test_the_cache_is_bounded_and_not_needed(place, cache, monkeypatch):
    """What was used longest ago goes first; few tokens leave nothing; a place that cannot be written is no error."""
    sizes = []
    for length in (15, 16, 17):
        windows.encoded(*case("classify", place, length))
        sizes.append(sum(file.stat().st_size for one in cache.iterdir() for file in one.iterdir()))
    first = min(cache.iterdir(), key=lambda one: one.stat().st_mtime_ns)
    windows.encoded(*case("classify", place, 15))
    monkeypatch.setattr(windows, "LIMIT", sizes[-1] + sizes[0] // 2)
    windows.encoded(*case("classify", place, 18))
    assert len([*cache.iterdir()]) == 3 and first.exists()
    monkeypatch.setattr(windows, "KEPT", 10**6)
    windows.encoded(*case("classify", place, 19))
    assert len([*cache.iterdir()]) == 3
    monkeypatch.setattr(windows, "KEPT", 0)
    monkeypatch.setenv("XDG_CACHE_HOME", str(first / "ids.npy"))
    assert len(windows.encoded(*case("classify", place))) == len(TEXTS)


def test_weights_of_classes_count_examples(place):
    """From arrays as from lists: the windows of a long text are one example."""
    task, examples, pieces, spec = case("classify", place)
    plain = task.encode(examples, pieces, spec)
    found = windows.Windows.of(plain)
    assert np.array_equal(class_weights("balanced", spec, found), class_weights("balanced", spec, plain))
