"""Masked-LM masks: rates, whole words, special tokens, and that nothing but (seed, epoch, sequence id) decides them."""

import numpy as np
import pytest

from fastbert.data.draws import sequence_keys
from fastbert.data.masking import mask_tokens
from fastbert.data.tokenizer import SpecialIds

SPECIAL = SpecialIds(0, 100, 101, 102, 103)
VOCAB = 1000
# pieces with an odd id go on with a word
STARTS = np.arange(VOCAB) % 2 == 0


def make_batch(count, seed=0, longest=60):
    """`count` packed sequences [CLS] ... [SEP] of 0 to `longest` tokens, some of them [UNK] or [SEP]."""
    draw = np.random.default_rng(seed)
    sequences = []
    for _ in range(count):
        n = draw.integers(0, longest + 1)
        tokens = draw.integers(104, VOCAB, n)
        tokens[draw.random(n) < 0.05] = draw.choice([100, 102])
        sequences.append(np.concatenate([[101], tokens, [102]]))
    return np.concatenate(sequences), np.cumsum([0, *map(len, sequences)])


def run(ids, cu_seqlens, *, first_id=0, probability=0.15, whole_word=False, seed=0, epoch=0):
    keys = sequence_keys(seed, epoch, np.arange(first_id, first_id + len(cu_seqlens) - 1))
    return mask_tokens(
        ids,
        cu_seqlens,
        keys,
        special=SPECIAL,
        words=np.setdiff1d(np.arange(VOCAB), SPECIAL),
        probability=probability,
        starts=STARTS if whole_word else None,
    )


def within_four_sigma(hits, trials, share):
    return abs(hits - trials * share) <= 4 * (trials * share * (1 - share)) ** 0.5


def candidates(ids, cu_seqlens, whole_word):
    """For each token the number of its candidate, -1 for special ones: the plain loop that mask_tokens vectorises."""
    number = np.full(len(ids), -1)
    count = 0
    for a, b in zip(cu_seqlens, cu_seqlens[1:]):
        inside = False
        for t in range(a, b):
            if ids[t] in tuple(SPECIAL):
                inside = False
                continue
            if not (whole_word and inside and not STARTS[ids[t]]):
                count += 1
            number[t], inside = count - 1, True
    return number


@pytest.mark.parametrize("whole_word", [False, True], ids=["tokens", "words"])
@pytest.mark.parametrize("probability", [0.15, 0.3, 1.0])
def test_how_many_are_picked(probability, whole_word):
    ids, cu = make_batch(3000)
    masked, labels = run(ids, cu, probability=probability, whole_word=whole_word)
    number, picked = candidates(ids, cu, whole_word), labels != -100
    # special tokens never, and where nothing is picked nothing changes; labels are the true tokens
    assert not picked[number < 0].any()
    assert np.array_equal(masked[~picked], ids[~picked]) and np.array_equal(labels[picked], ids[picked])
    expected = got = spread = 0
    for a, b in zip(cu, cu[1:]):
        of_sequence = number[a:b]
        n = len(np.unique(of_sequence[of_sequence >= 0]))
        chosen = np.unique(of_sequence[picked[a:b]])
        # all of a word or nothing of it
        assert picked[a:b].sum() == np.isin(of_sequence, chosen).sum()
        assert len(chosen) in (int(np.floor(n * probability)), int(np.ceil(n * probability)))
        part = n * probability % 1
        expected, got, spread = expected + n * probability, got + len(chosen), spread + part * (1 - part)
    assert abs(got - expected) <= 4 * spread**0.5 + 1e-6


@pytest.mark.parametrize("whole_word", [False, True], ids=["tokens", "words"])
def test_80_10_10(whole_word):
    ids, cu = make_batch(10000)
    masked, labels = run(ids, cu, whole_word=whole_word)
    picked = labels != -100
    number = candidates(ids, cu, whole_word)[picked]
    # one decision per candidate, so they are what is counted
    _, first = np.unique(number, return_index=True)
    true, now = ids[picked][first], masked[picked][first]
    n = len(first)
    assert n > 20000
    assert within_four_sigma((now == SPECIAL.mask).sum(), n, 0.8)
    # a random token is the true one once in the vocabulary
    changed = (now != SPECIAL.mask) & (now != true)
    assert within_four_sigma(changed.sum(), n, 0.1 * (1 - 1 / (VOCAB - 5)))
    assert within_four_sigma((now == true).sum(), n, 0.1 + 0.1 / (VOCAB - 5))
    # within a word all tokens share one fate
    if whole_word:
        hidden = masked[picked] == SPECIAL.mask
        assert np.array_equal(hidden, hidden[first][np.unique(number, return_inverse=True)[1]])
        kept_apart = (masked[picked] == ids[picked]) & ~(now == true)[np.unique(number, return_inverse=True)[1]]
        assert kept_apart.mean() < 0.005


def test_random_words_are_of_the_whole_vocabulary_but_special_tokens():
    ids = np.full(400_000, 500)
    cu = np.arange(0, len(ids) + 1, 100)
    masked, labels = run(ids, cu, probability=0.9)
    words = masked[(labels != -100) & (masked != SPECIAL.mask) & (masked != 500)]
    counts = np.bincount(words, minlength=VOCAB)
    assert not counts[list(SPECIAL)].any()
    others = np.delete(counts, [*SPECIAL, 500])
    assert others.min() > 0
    # chi-square over 994 words: its mean is its degrees of freedom, its deviation sqrt(2 * that)
    expected = others.mean()
    assert abs(((others - expected) ** 2 / expected).sum() - (len(others) - 1)) < 4 * (2 * (len(others) - 1)) ** 0.5


def test_every_place_is_picked_alike():
    cu = np.arange(0, 40 * 5000 + 1, 40)
    _, labels = run(np.full(cu[-1], 500), cu)
    for hits in (labels != -100).reshape(5000, 40).sum(0):
        assert within_four_sigma(hits, 5000, 0.15)


@pytest.mark.parametrize("whole_word", [False, True], ids=["tokens", "words"])
def test_masks_depend_on_seed_epoch_and_sequence_only(whole_word):
    ids, cu = make_batch(50)
    together = run(ids, cu, first_id=1000, whole_word=whole_word)
    for i, (a, b) in enumerate(zip(cu, cu[1:])):
        alone = run(ids[a:b], np.array([0, b - a]), first_id=1000 + i, whole_word=whole_word)
        assert np.array_equal(alone[0], together[0][a:b]) and np.array_equal(alone[1], together[1][a:b])
    for other in ({"seed": 1}, {"epoch": 1}, {"first_id": 0}, {"seed": -1}):
        labels = run(ids, cu, **{"first_id": 1000, **other}, whole_word=whole_word)[1]
        both = (labels != -100) & (together[1] != -100)
        # independent picks agree on 0.15 of the picked; those of the same key on all
        assert 0.05 < both.sum() / (labels != -100).sum() < 0.3


def test_seeds_and_epochs_do_not_stand_for_each_other():
    keys = [sequence_keys(s, e, [i])[0] for s in range(-3, 5) for e in range(8) for i in range(8)]
    assert len(set(keys)) == len(keys)


@pytest.mark.parametrize("lengths", [[], [2], [0, 3, 0]])
def test_nothing_to_pick(lengths):
    cu = np.cumsum([0, *lengths])
    ids = np.full(cu[-1], SPECIAL.sep)
    masked, labels = run(ids, cu)
    assert np.array_equal(masked, ids) and (labels == -100).all()
