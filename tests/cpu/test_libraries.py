"""The choice between torch's two matrix libraries."""

import math
import tempfile

import pytest
import torch

from fastbert.cpu import attention, libraries
from fastbert.cpu.matmul import candidates

SIZES = 100, 768, 768
FASTER, SLOWER, UNSURE = (1.0, True), (2.0, True), (2.0, False)


@pytest.fixture(autouse=True)
def fresh(monkeypatch, tmp_path):
    """Nothing known, and nothing pinned. Returns the path of the file."""
    monkeypatch.setattr(libraries, "PINNED", "auto")
    monkeypatch.setattr(libraries, "_file", lambda threads: tmp_path / "folder" / f"{threads}.json")
    with libraries.restored({}):
        yield tmp_path / "folder" / f"{torch.get_num_threads()}.json"


@pytest.fixture
def measured(monkeypatch):
    """What was measured; the first of the results below is the next one's."""
    results = []
    monkeypatch.setattr(libraries, "_measure", lambda *calls: results.pop(0))
    return results


def prefers(kind="forward", sizes=SIZES):
    return libraries.prefers_onednn(kind, sizes, candidates)


@pytest.mark.parametrize("sizes", [SIZES, (1, 2, 3), (8, 768, 3072), (1024, 768, 30522), (12, 500, 64, 500)], ids=str)
def test_a_class_is_timed_with_sizes_of_its_own(sizes):
    name = libraries.class_of("forward", sizes)
    rounded = tuple(map(int, name.removeprefix("forward ").split(" x ")))
    assert libraries.class_of("forward", rounded) == name
    assert math.prod(rounded) <= libraries.MOST
    assert all(a <= 1.5 * b for a, b in zip(rounded, sizes))
    if math.prod(sizes) < libraries.MOST:
        assert all(b <= 1.5 * a for a, b in zip(rounded, sizes) if b > 2)


@pytest.mark.parametrize("kind", ["forward", "gelu", "dx", "dweight", "batched", "batched-transposed"])
def test_candidates_compute_the_same_product(kind):
    onednn, own = (call() for call in candidates(kind, (2, 5, 7, 3) if kind.startswith("batched") else (5, 7, 3)))
    torch.testing.assert_close(onednn, own)
    assert onednn.shape == ((2, 5, 3) if kind.startswith("batched") else (5, 3)) and onednn.flatten()[0] == 7


def test_the_faster_one_is_taken_and_kept(measured, fresh):
    measured += [(FASTER, SLOWER), (SLOWER, FASTER)]
    assert prefers() and not prefers("dx")
    # another number of rows of the same class; and another process
    assert prefers(sizes=(128, 768, 768))
    with libraries.restored({}):
        assert prefers() and not prefers("dx")
    assert not measured


def test_times_of_a_busy_machine_are_not_kept(measured, fresh):
    measured += [(UNSURE, FASTER), (FASTER, SLOWER)]
    assert not prefers()
    assert not fresh.exists()
    with libraries.restored({}):
        assert prefers()
    assert fresh.exists()


@pytest.mark.parametrize(
    "content",
    ["", "[]", "[1]", '{"a": 1}', '{"forward 96 x 768 x 768": ["a", 1]}', '{"forward 96 x 768 x 768": [1, 0]}', "\0\1"],
)
def test_a_damaged_file_is_measured_again(content, measured, fresh):
    fresh.parent.mkdir()
    fresh.write_text(content)
    measured += [(FASTER, SLOWER)]
    assert prefers()
    with libraries.restored({}):
        assert prefers()


def test_without_a_file(measured, fresh):
    fresh.parent.write_text("not a folder")
    measured += [(FASTER, SLOWER)]
    assert prefers() and prefers()


def test_a_user_without_a_home(monkeypatch):
    monkeypatch.undo()
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(libraries.Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    assert libraries._file.__wrapped__(2).is_relative_to(tempfile.gettempdir())


def test_rounds_in_which_a_core_was_taken_away_do_not_count():
    assert libraries._shortest([(0, 3.0), (1, 1.0), (0, 3.1), (2, 9.0)]) == (3.0, True)
    assert libraries._shortest([(0, 3.0), (0, 9.0)]) == (3.0, False)
    assert libraries._shortest([(1, 3.0), (1, 2.0), (0, 9.0)]) == (2.0, False)


def test_measuring_takes_turns():
    calls = []
    rounds = libraries._measure(lambda: calls.append("a"), lambda: calls.append("b"))
    assert calls[:6] == ["a", "b"] * 3 and len(rounds) == 2


@pytest.mark.parametrize("pinned", ["onednn", "torch"])
def test_pinned(pinned, monkeypatch, measured):
    monkeypatch.setattr(libraries, "PINNED", pinned)
    assert prefers() == (pinned == "onednn")
    assert libraries.chosen() == {"every": pinned}


def test_a_resumed_run_goes_on_as_it_began(measured, monkeypatch):
    measured += [(FASTER, SLOWER), (SLOWER, FASTER), (SLOWER, FASTER)]
    assert prefers() and not prefers("dx")
    chosen = libraries.chosen()
    assert chosen == {"forward 96 x 768 x 768": "onednn", "dx 96 x 768 x 768": "torch"}
    # on another machine; what the run has not computed yet is measured
    monkeypatch.setattr(libraries, "_read", lambda path: {})
    with libraries.restored(chosen):
        assert prefers() and not prefers("dx") and not prefers("gelu")
        assert libraries.chosen() == chosen | {"gelu 96 x 768 x 768": "torch"}
    assert libraries.chosen() == chosen


def test_a_checkpoint_of_before_means_onednn(measured):
    with libraries.restored(None):
        assert prefers() and libraries.chosen() == {"every": "onednn"}


@pytest.mark.parametrize("choices", ["onednn", {"forward 96 x 768 x 768": "mkl"}, [1], {"every": "auto"}], ids=str)
def test_damaged_choices(choices):
    with pytest.raises(ValueError, match="products are .*expected"), libraries.restored(choices):
        pass


@pytest.mark.parametrize("kind", ["", "-uniform", "-dropout", "-bias", "-bias-dropout"])
def test_candidates_for_attention_run(kind):
    (first, _), (second, _) = libraries._measure(*attention._candidates(f"attention{kind}-backward", (2, 9, 9, 4)))
    assert first > 0 and second > 0


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_attention_is_measured_where_its_products_are_not_known(mode):
    with mode():
        out = attention.attention(torch.ones(300, 3, 2, 64), None, None, torch.tensor([0, 300]), 300)
    assert torch.equal(out, torch.ones(300, 2, 64))
    # timed with its backward, which activation checkpointing may want later
    assert {name.partition(" ")[0] for name in libraries.chosen()} >= {"attention-uniform-backward", "batched"}
