"""Packing: padded <-> packed, and best fit."""

import numpy as np
import pytest
import torch

from fastbert.packing import Layout, best_fit, pack, unpack


@pytest.mark.parametrize("mask", [[[1, 1, 1, 0], [1, 0, 0, 0]], [[0, 0, 1, 1], [0, 1, 1, 1]], [[1, 0, 1, 1], [0] * 4]])
def test_pack_and_unpack(mask):
    mask = torch.tensor(mask)
    ids, labels = torch.arange(10, 18).view(2, 4), torch.full((2, 4), -100)
    labels[0, 2] = 12
    batch, indices = pack(ids, mask, labels=labels)
    assert batch.input_ids.tolist() == ids[mask.bool()].tolist()
    # the column, also behind padding on the left or holes
    assert batch.position_ids.tolist() == torch.arange(4).expand(2, 4)[mask.bool()].tolist()
    assert batch.cu_seqlens.tolist() == [0, *mask.sum(1).cumsum(0).tolist()]
    assert batch.cu_seqlens.dtype == torch.int32 and batch.max_seqlen == mask.sum(1).max()
    assert batch.input_ids[batch.picks].tolist() == ([12] if mask[0, 2] else [])
    assert torch.equal(unpack(batch.input_ids, indices, 2, 4), ids * mask)


@pytest.mark.parametrize(
    "picks, ends", [([1, 3, 8, 8, 8, 8, 8], [0, 1, 2, 3]), ([1, 8], [0, 1, 1, 2]), ([], [0, 0, 0, 0])]
)
def test_picks_that_fill_up_a_batch_belong_to_no_sequence(picks, ends):
    layout = Layout(torch.tensor([0, 3, 6, 9], dtype=torch.int32), 3)
    queries = layout.with_queries(torch.tensor(picks, dtype=torch.int64))
    assert queries.cu_seqlens_q.tolist() == ends and queries.cu_seqlens_q.dtype == torch.int32
    assert queries.max_seqlen_q >= queries.cu_seqlens_q.diff().max()


def random_lengths(kind, count=20000):
    draw = np.random.default_rng(0)
    if kind == "short lines":
        return np.clip(draw.gamma(3, 12, count).astype(int), 3, 128)
    # documents cut every 128 tokens: full sequences and one shorter tail each
    tails = draw.integers(3, 129, count // 6)
    return draw.permutation(np.concatenate([np.full(count - len(tails), 128), tails]))


@pytest.mark.parametrize("kind", ["short lines", "cut documents"])
@pytest.mark.parametrize("capacity", [128, 1024, 4096])
def test_best_fit_fills_batches(kind, capacity):
    lengths = random_lengths(kind)
    order, offsets = best_fit(lengths, capacity)
    assert np.array_equal(np.sort(order), np.arange(len(lengths)))
    assert offsets[0] == 0 and offsets[-1] == len(lengths) and (np.diff(offsets) > 0).all()
    loads = np.add.reduceat(lengths[order], offsets[:-1])
    assert loads.max() <= capacity
    assert loads.mean() / capacity >= 0.98


def test_best_fit_keeps_the_order_within_its_look_ahead():
    lengths = random_lengths("cut documents")
    order, offsets = best_fit(lengths, 4096, look_ahead=1000)
    # nothing comes before it is in sight
    assert (order - np.arange(len(order)) < 1000).all()
    # a batch is as mixed as the text: full sequences are not used up first
    full = np.add.reduceat((lengths[order] == 128).astype(float), offsets[:-1]) / np.diff(offsets)
    assert abs(full[:100].mean() - full[-101:-1].mean()) < 0.03


def test_best_fit_takes_the_largest_that_fits():
    order, offsets = best_fit([60, 90, 30, 40, 41, 39], 100)
    assert [order[a:b].tolist() for a, b in zip(offsets, offsets[1:])] == [[0, 3], [1], [2, 4], [5]]


def test_best_fit_limits_the_number_of_sequences():
    order, offsets = best_fit(np.ones(100, dtype=int), 64, max_sequences=7)
    assert sorted(order) == list(range(100)) and np.diff(offsets).max() == 7


@pytest.mark.parametrize("lengths, batches", [([], 0), ([0, 0], 1), ([5], 1), ([5, 5], 2)])
def test_best_fit_small_cases(lengths, batches):
    order, offsets = best_fit(lengths, 5)
    assert len(order) == len(lengths) and len(offsets) == batches + 1


def test_best_fit_refuses_what_cannot_fit():
    with pytest.raises(ValueError, match="a sequence of 9 tokens does not fit a batch of 8"):
        best_fit([3, 9], 8)
