"""The held-out share: no text on both sides, every label on both, a choice of the seed alone; batches of examples."""

import random

import numpy as np
import pytest

from fastbert.tasks.examples import Example, Window
from fastbert.training.example_batches import ExampleBatches, held_out
from fastbert.training.windows import Windows

ROWS = [
    ("Good soup", "pos", "u1"), ("Bad soup", "neg", "u1"), ("Good soup", "pos", "u2"), ("good  SOUP", "pos", "u3"),
    ("Cold tea", "neg", "u3"), ("Cold tea", "pos", "u4"), ("Hot tea", "pos", "u5"), ("Warm tea", "neg", "u5"),
    ("Old bread", "neg", "u6"), ("New bread", "pos", "u6"),
]  # fmt: skip


def examples(grouped):
    return [
        Example(i, (text,), label, group=group if grouped else None) for i, (text, label, group) in enumerate(ROWS, 1)
    ]


@pytest.mark.parametrize("grouped", [False, True], ids=["texts", "groups"])
def test_no_text_and_no_group_is_on_both_sides(grouped):
    for seed in range(50):
        train, held, rare = held_out(examples(grouped), 0.2, seed)
        sides = [{example.number for example in side} for side in (train, held)]
        assert len(train) + len(held) == 10 and not rare
        for together in ({1, 3, 4}, {5, 6}):
            assert any(together <= side for side in sides)
        for side in (train, held):
            assert {example.gold for example in side} == {"pos", "neg"}
        if grouped:
            assert not {example.group for example in train} & {example.group for example in held}


def test_the_split_depends_on_seed_and_texts_alone():
    rows, shuffled = examples(False), random.Random(1).sample(examples(False), 10)
    splits = {seed: {example.number for example in held_out(rows, 0.3, seed)[1]} for seed in range(8)}
    for seed, held in splits.items():
        assert {example.number for example in held_out(shuffled, 0.3, seed)[1]} == held
    assert len({frozenset(held) for held in splits.values()}) > 2


def test_a_share_of_each_label_is_held_out():
    rows = [Example(i, (f"text {i}",), "often" if i % 10 else "seldom") for i in range(1000)]
    rows.append(Example(1000, ("alone",), "once"))
    train, held, rare = held_out(rows, 0.2, 0)
    counts = {label: sum(example.gold == label for example in held) for label in ("often", "seldom", "once")}
    assert counts == {"often": 180, "seldom": 20, "once": 0} and rare == ["once"]
    assert "once" in {example.gold for example in train}


def test_several_labels_and_numbers():
    rows = [Example(i, (f"text {i}",), ("a", "b") if i % 3 else ()) for i in range(60)]
    _, held, _ = held_out(rows, 0.1, 0)
    assert {len(example.gold) for example in held} == {0, 2} and 5 <= len(held) <= 8
    _, held, _ = held_out([Example(i, (f"text {i}",), float(i)) for i in range(60)], 0.1, 0)
    assert len(held) == 6


def loader(**changes):
    windows = [[Window(np.arange(n % 7 + 2), np.zeros(n % 7 + 2, int), n % 3)] for n in range(23)]
    return ExampleBatches(Windows.of(windows), **{"batch_size": 5, "tokens_per_batch": 1000, "seed": 3} | changes)


def lengths(batches):
    return [[part.cu_seqlens.diff().tolist() for part in parts] for parts in batches]


def test_each_epoch_has_every_example_once_in_another_order():
    epochs = [lengths(loader().epoch(epoch)) for epoch in (0, 1)]
    for batches in epochs:
        assert [len(parts[0]) for parts in batches] == [5, 5, 5, 5, 3]
        assert sorted(n for parts in batches for part in parts for n in part) == sorted(n % 7 + 2 for n in range(23))
    assert epochs[0] != epochs[1]
    assert lengths(loader().epoch(1, start=3)) == epochs[1][3:]


def test_parts_keep_the_order_and_the_limit():
    whole, parts = lengths(loader().epoch(0)), lengths(loader(tokens_per_batch=12).epoch(0))
    assert [sum(one, []) for one in parts] == [sum(one, []) for one in whole]
    assert all(sum(part) <= 12 for one in parts for part in one) and max(map(len, parts)) > 1


def test_ranks_share_the_batches():
    ranks = [lengths(loader(rank=rank, world_size=2).epoch(0)) for rank in (0, 1)]
    assert [len(one) for one in ranks] == [2, 2]
    assert [one for pair in zip(*ranks) for one in pair] == lengths(loader().epoch(0))[:4]
    with pytest.raises(ValueError, match="23 examples fill 5 batches of 5: expected one for each of 6 processes"):
        loader(world_size=6)
