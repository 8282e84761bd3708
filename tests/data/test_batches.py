"""Shards -> batches: sequences, masks, seeds, threads, ranks, pairs."""

import random
import shutil
import threading
import time
from collections import Counter

import numpy as np
import pytest
import torch
from corpus import document_of, write_text

from fastbert.data.batches import MaskedBatches
from fastbert.data.sequences import cut_sequences, held_out_split
from fastbert.data.shards import Shards, prepare
from fastbert.data.tokenizer import special_ids

FIELDS = ("input_ids", "position_ids", "token_type_ids", "cu_seqlens", "max_seqlen", "labels", "picks", "pair_labels")


@pytest.mark.parametrize("objective", ["mlm", "mlm+sop"])
def test_sequences_cover_each_document_in_order(shards, objective):
    special = 2 if objective == "mlm" else 3
    index = cut_sequences(shards, 32, objective)
    tokens = np.concatenate(shards.tokens)
    assert index.length.max() == 32 - special
    covered = {}
    for start, length, document in zip(index.start, index.length, index.document):
        covered.setdefault(document, []).extend(tokens[start : start + length].tolist())
    for number in range(shards.manifest["documents"]):
        whole = sum(document_of(shards, number), [])
        dropped = objective != "mlm" and len(whole) % (32 - special) == 1
        assert covered.get(number, []) == whole[: len(whole) - dropped]


def sequences_of(batch):
    """The sequences of a batch with their labels put back, as tuples."""
    ids = torch.where(batch.labels != -100, batch.labels, batch.input_ids).tolist()
    cu = batch.cu_seqlens.tolist()
    return [tuple(ids[a:b]) for a, b in zip(cu, cu[1:])]


def equal(first, second):
    return all(
        torch.equal(a, b) if torch.is_tensor(a) else a == b
        for a, b in ((getattr(first, f), getattr(second, f)) for f in FIELDS)
    )


def loader(shards, **arguments):
    return MaskedBatches(shards, **{"max_seq_length": 32, "tokens_per_batch": 512, "num_workers": 0, **arguments})


def test_batches_hold_every_sequence_once(shards):
    special = special_ids(shards.tokenizer)
    batches = loader(shards)
    tokens = np.concatenate(shards.tokens)
    expected = Counter(
        (special.cls, *tokens[start : start + length].tolist(), special.sep)
        for start, length in zip(batches.index.start, batches.index.length)
    )
    got, real = Counter(), 0
    for batch in batches.epoch(0):
        got.update(sequences_of(batch))
        T = int(batch.cu_seqlens[-1])
        real += T
        assert T == len(batch.input_ids) <= 512
        lengths = batch.cu_seqlens.diff()
        assert batch.max_seqlen == lengths.max() <= 32
        assert batch.position_ids.tolist() == [p for n in lengths.tolist() for p in range(n)]
        assert not batch.token_type_ids.any() and batch.pair_labels is None and batch.seed is None
        assert batch.picks.tolist() == (batch.labels != -100).nonzero()[:, 0].tolist()
        assert batch.cu_seqlens.dtype == torch.int32
        for field in ("input_ids", "position_ids", "token_type_ids", "labels", "picks"):
            assert getattr(batch, field).dtype == torch.int64
    assert got == expected
    assert batches.fill == pytest.approx(real / (512 * batches.num_batches(0)))
    assert batches.fill > 0.97


def test_epochs_and_seeds_differ_and_the_same_ones_do_not(shards):
    first = list(loader(shards).epoch(3))
    assert all(equal(a, b) for a, b in zip(first, loader(shards).epoch(3), strict=True))
    for other in (loader(shards).epoch(4), loader(shards, seed=1).epoch(3)):
        assert sequences_of(next(iter(other))) != sequences_of(first[0])


def masks_of(batches):
    """{sequence: its masked ids}; without short ones, which may be there more than once."""
    found = {}
    for batch in batches:
        cu, ids = batch.cu_seqlens.tolist(), batch.input_ids.tolist()
        found.update(zip(sequences_of(batch), (tuple(ids[a:b]) for a, b in zip(cu, cu[1:]))))
    return {sequence: masked for sequence, masked in found.items() if len(sequence) > 12}


@pytest.mark.parametrize("objective", ["mlm", "mlm+nsp", "mlm+sop"])
def test_batches_do_not_depend_on_workers_nor_masks_on_batches(shards, objective):
    same = {"objective": objective, "whole_word_mask": True, "seed": 5}
    plain = list(loader(shards, **same).epoch(1))
    for num_workers in (1, 3):
        threaded = loader(shards, **same, num_workers=num_workers).epoch(1)
        assert all(equal(a, b) for a, b in zip(plain, threaded, strict=True))
    for other in ({"tokens_per_batch": 96}, {"capacity": True}, {"rank": 1, "world_size": 3}):
        masks, expected = masks_of(loader(shards, **same, **other).epoch(1)), masks_of(plain)
        assert masks and all(expected[sequence] == ids for sequence, ids in masks.items())


@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_epoch_can_be_entered_in_its_middle(shards, num_workers):
    batches = loader(shards, objective="mlm+nsp", num_workers=num_workers)
    whole = list(batches.epoch(2))
    assert len(whole) == batches.num_batches(2)
    for start in (0, 1, 7, len(whole) - 1, len(whole)):
        rest = list(loader(shards, objective="mlm+nsp", num_workers=num_workers).epoch(2, start=start))
        assert all(equal(a, b) for a, b in zip(whole[start:], rest, strict=True))
    with pytest.raises(ValueError, match=f"start is {len(whole) + 1}: epoch 2 has {len(whole)} batches"):
        batches.epoch(2, start=len(whole) + 1)


def test_leaving_an_epoch_early_stops_its_threads(shards):
    before = threading.active_count()
    for _ in loader(shards, num_workers=2).epoch(0):
        break
    deadline = time.monotonic() + 5
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() == before


def test_an_error_in_a_thread_reaches_the_caller(shards, monkeypatch):
    batches = loader(shards, num_workers=1)
    monkeypatch.setattr(batches, "_build", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        next(batches.epoch(0))


def test_ranks_share_an_epoch(shards):
    alone = [sequences_of(batch) for batch in loader(shards).epoch(0)]
    ranks = [loader(shards, rank=rank, world_size=3) for rank in range(3)]
    assert {r.num_batches(0) for r in ranks} == {len(alone) // 3}
    shared = [[sequences_of(batch) for batch in r.epoch(0)] for r in ranks]
    assert [batch for batches in zip(*shared, strict=True) for batch in batches] == alone[: len(alone) // 3 * 3]
    middle = [sequences_of(batch) for batch in ranks[1].epoch(0, start=5)]
    assert middle == shared[1][5:]


def test_held_out_documents_are_not_trained_on(shards):
    train, held_out = held_out_split(shards, 0.1, 7, max_seq_length=32)
    index = cut_sequences(shards, 32)
    assert sorted([*train, *held_out]) == list(range(len(index.start)))
    assert not set(index.document[train]) & set(index.document[held_out])
    assert 0.1 <= index.length[held_out].sum() / index.length.sum() < 0.12
    # the same documents for another length and objective, others for another seed
    same = held_out_split(shards, 0.1, 7, max_seq_length=64, objective="mlm+sop")[1]
    other = held_out_split(shards, 0.1, 8, max_seq_length=32)[1]
    documents = set(index.document[held_out])
    assert set(cut_sequences(shards, 64, "mlm+sop").document[same]) == documents != set(index.document[other])

    tokens = np.concatenate(shards.tokens)
    seen = set(masks_of(loader(shards, sequence_ids=train).epoch(0)))
    assert len(seen) > 0.5 * len(train)
    for i in held_out[:50]:
        if index.length[i] > 10:
            assert (2, *tokens[index.start[i] : index.start[i] + index.length[i]].tolist(), 3) not in seen
    with pytest.raises(ValueError, match="share is 1: expected more than 0 and less than 1"):
        held_out_split(shards, 1, max_seq_length=32)


def pairs_of(batch, special):
    """(first segment, second segment, pair label) of each sequence, after a look at its form."""
    types, cu = batch.token_type_ids.tolist(), batch.cu_seqlens.tolist()
    for ids, a, b, label in zip(sequences_of(batch), cu[:-1], cu[1:], batch.pair_labels.tolist(), strict=True):
        assert ids[0] == special.cls and ids[-1] == special.sep and ids.count(special.sep) == 2
        middle = ids.index(special.sep)
        assert types[a:b] == [0] * (middle + 1) + [1] * (len(ids) - middle - 1)
        assert middle > 1 and len(ids) - middle > 2
        yield ids[1:middle], ids[middle + 1 : -1], label


def spelled(ids):
    return "," + ",".join(map(str, ids)) + ","


@pytest.mark.parametrize("objective", ["mlm+nsp", "mlm+sop"])
def test_pairs(shards, objective):
    special = special_ids(shards.tokenizer)
    # held-out documents may not get in by way of a random second segment
    train, _ = held_out_split(shards, 0.3, max_seq_length=32, objective=objective)
    batches = loader(shards, objective=objective, sequence_ids=train)
    tokens, index = np.concatenate(shards.tokens).tolist(), batches.index
    whole = {tuple(tokens[index.start[i] : index.start[i] + index.length[i]]) for i in train}
    text = {d: spelled(sum(document_of(shards, d), [])) for d in set(index.document[train].tolist())}
    labels, at_border = [], 0
    enders = {shards.tokenizer.token_to_id(c) for c in ".!?"}
    for epoch in range(2):
        for batch in batches.epoch(epoch):
            for first, second, label in pairs_of(batch, special):
                labels.append(label)
                if label == 0:
                    assert first + second in whole
                    at_border += first[-1] in enders
                elif objective == "mlm+sop":
                    assert second + first in whole
                elif len(second) > 9 and len(first) > 9:
                    one, two = ({d for d in text if spelled(s) in text[d]} for s in (first, second))
                    assert one and two and not one & two
    n = len(labels)
    assert abs(sum(labels) - n / 2) < 4 * (n / 4) ** 0.5
    # a sentence border where there is one
    assert at_border > 0.5 * (n - sum(labels))


def test_pairs_change_with_the_epoch(shards):
    batches = loader(shards, objective="mlm+sop")
    first, second = (
        {frozenset(a + b): label for batch in batches.epoch(e) for a, b, label in pairs_of(batch, batches.special)}
        for e in (0, 1)
    )
    both = first.keys() & second.keys()
    assert 0.35 < np.mean([first[k] == second[k] for k in both]) < 0.65


@pytest.mark.parametrize("objective", ["mlm", "mlm+nsp"])
@pytest.mark.parametrize("whole_word_mask", [False, True], ids=["tokens", "words"])
def test_capacity_gives_every_batch_the_same_shapes(shards, objective, whole_word_mask):
    same = {"objective": objective, "whole_word_mask": whole_word_mask}
    batches = loader(shards, **same, capacity=True)
    shapes, masks = set(), {}
    for batch in batches.epoch(0):
        shapes.add(tuple(v.shape if torch.is_tensor(v) else v for v in (getattr(batch, f) for f in FIELDS)))
        T, lengths = int(batch.cu_seqlens[-1]), batch.cu_seqlens.diff()
        assert (batch.input_ids[T:] == special_ids(shards.tokenizer).pad).all()
        assert (batch.labels[T:] == -100).all() and (lengths >= 0).all()
        real = batch.labels[batch.picks] != -100
        assert batch.picks[real].tolist() == (batch.labels != -100).nonzero()[:, 0].tolist()
        assert (batch.picks[~real] == len(batch.input_ids) - 1).all()
        if objective != "mlm":
            assert torch.equal(batch.pair_labels == -100, lengths == 0)
        masks.update(masks_of([batch]))
    assert len(shapes) == 1
    assert batches.fill > 0.95
    assert masks_of([b for b in loader(shards, **same).epoch(0)]).items() >= masks.items()


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"max_seq_length": 7}, "max_seq_length is 7: expected at least 8"),
        ({"tokens_per_batch": 31}, "tokens_per_batch is 31: expected max_seq_length, 32, to 16777216"),
        ({"tokens_per_batch": 10**20}, "tokens_per_batch is 10+: expected"),
        ({"objective": "nsp"}, "objective is 'nsp': expected one of mlm, mlm.nsp, mlm.sop"),
        ({"mlm_probability": 0}, "mlm_probability is 0: expected more than 0"),
        ({"rank": 2, "world_size": 2}, "rank is 2: expected 0 to 1"),
        ({"sequence_ids": []}, "there are no sequences"),
        ({"sequence_ids": [0, 10**6]}, "sequence_ids go from 0 to 1000000"),
        ({"sequence_ids": [0], "objective": "mlm+nsp"}, "needs at least two documents"),
        ({"world_size": 1000}, "expected at least one for each of 1000 ranks"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_loader_arguments(arguments, message, shards):
    with pytest.raises(ValueError, match=message):
        loader(shards, **arguments)


def test_one_document_cannot_be_held_out(tmp_path, tokenizer):
    path = write_text(tmp_path / "a.txt", [["ba bo", "bi bu"]])
    prepare(path, tokenizer, tmp_path / "out", layout="blank-line", progress=False)
    with pytest.raises(ValueError, match="there is only 1 document"):
        held_out_split(Shards.open(tmp_path / "out"), 0.5, max_seq_length=32)


@pytest.mark.parametrize("part", ["tokens", "sentences", "documents"])
def test_flipped_bits_in_shards_that_are_not_verified(part, shards, tmp_path):
    """A batch may hold other tokens then, but none outside the vocabulary; else one line names the file."""
    directory = shutil.copytree(shards.directory, tmp_path / "out")
    path, draw = directory / f"shard-00001.{part}.npy", random.Random(part)
    whole, said = path.read_bytes(), Counter()
    for trial in range(40):
        data = bytearray(whole)
        for _ in range(3):
            data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        path.write_bytes(data)
        try:
            opened = Shards.open(directory)
            for objective in ("mlm", "mlm+sop"):
                for batch in loader(opened, objective=objective, whole_word_mask=True).epoch(trial):
                    assert batch.input_ids.min() >= 0 and batch.input_ids.max() < opened.vocab_size
                    assert batch.cu_seqlens.diff().min() > 0
        except ValueError as error:
            assert str(path) in str(error) and "damaged" in str(error) and "\n" not in str(error)
            said[True] += 1
    assert said[True] > 20
