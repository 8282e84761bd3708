"""Token shards to masked, packed batches.

Every choice (order, masks, pairs) is a draw of draws.py. So it does not depend on the rest of the batch, on threads or
on ranks, and an epoch can start in its middle.
"""

import numpy as np
import torch

from ..packing import Batch, best_fit
from .draws import CUT, ORDER, PAIR, PARTNER, WORD, draw, sequence_keys, uniform
from .masking import BERT_FATES, ELECTRA_FATES, IGNORED, mask_tokens
from .sequences import PAIRS, cut_sequences
from .threads import ordered_map
from .tokenizer import special_ids, word_starts

# tokens of a batch: no GPU holds the activations of more, and indices stay in 32 bits
MAX_TOKENS = 1 << 24


class MaskedBatches:
    """Masked, packed batches of prepared text.

    shards: Shards. max_seq_length, tokens_per_batch: in tokens, special tokens included. objective: "mlm"; "mlm+nsp",
    the second segment follows the first or, half of the time, comes from another document (pair_labels 1); "mlm+sop",
    the two are swapped half of the time (pair_labels 1); "rtd", picks are masked as in ELECTRA and come with draws for
    a generator (Batch.draws). sequence_ids: the sequences to use, all by default. rank, world_size: each rank gets its
    own batches, and all ranks get the same number; up to world_size - 1 batches are left out, others in each epoch.
    num_workers: threads that build batches ahead; 0 builds each batch when it is requested.

    capacity=True: every batch has exactly tokens_per_batch tokens, a constant number of sequences and of picks, and
    max_seqlen = max_seq_length. It is filled up with padding rows that belong to no sequence, empty sequences (pair
    label -100), and picks that point at the last row, which has no label.

    Raises ValueError when these contradict each other or there is no sequence.
    """

    def __init__(
        self,
        shards,
        *,
        max_seq_length,
        tokens_per_batch,
        mlm_probability=0.15,
        whole_word_mask=False,
        objective="mlm",
        seed=0,
        rank=0,
        world_size=1,
        sequence_ids=None,
        num_workers=1,
        capacity=False,
    ):
        self.index = cut_sequences(shards, max_seq_length, objective)
        if not max_seq_length <= tokens_per_batch <= MAX_TOKENS:
            raise ValueError(
                f"tokens_per_batch is {tokens_per_batch}: expected max_seq_length, {max_seq_length}, to {MAX_TOKENS}"
            )
        if not 0 < mlm_probability <= 1:
            raise ValueError(f"mlm_probability is {mlm_probability}: expected more than 0 and at most 1")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank is {rank}: expected 0 to {world_size - 1}, for world_size is {world_size}")
        ids = np.arange(len(self.index.start)) if sequence_ids is None else np.unique(np.asarray(sequence_ids))
        if len(ids) == 0:
            raise ValueError("there are no sequences: no text, or nothing left of it")
        if ids[0] < 0 or ids[-1] >= len(self.index.start):
            raise ValueError(f"sequence_ids go from {ids[0]} to {ids[-1]}: there are {len(self.index.start)} sequences")
        self._documents = self.index.document[ids]
        if objective == "mlm+nsp" and self._documents[0] == self._documents[-1]:
            raise ValueError("mlm+nsp needs at least two documents: a random second segment comes from another one")
        self.shards, self.ids = shards, ids
        self.max_seq_length, self.tokens_per_batch = max_seq_length, tokens_per_batch
        self.mlm_probability, self.objective, self.seed = mlm_probability, objective, seed
        self.rank, self.world_size, self.num_workers = rank, world_size, num_workers
        self.special = special_ids(shards.tokenizer)
        # the ids of a vocabulary may have gaps
        self.words = np.setdiff1d(list(shards.tokenizer.get_vocab().values()), self.special)
        self.starts = np.array(word_starts(shards.tokenizer)) if whole_word_mask else None
        self._lengths = self.index.length[ids] + (3 if objective in PAIRS else 2)
        self.max_sequences = self.max_picks = None
        if capacity:
            # a quarter more sequences than the average batch has, so that the limit rarely matters
            self.max_sequences = int(1.25 * tokens_per_batch / self._lengths.mean()) + 8
            # without whole words no batch can have more picks than this; with them it is practically impossible
            picks = int(np.ceil(mlm_probability * tokens_per_batch)) + self.max_sequences
            self.max_picks = min(-(-picks // 8) * 8, tokens_per_batch)
        self._plan = None
        self._planned(0)

    def num_batches(self, epoch):
        """The number of batches of `epoch(epoch)`."""
        return (len(self._planned(epoch)[1]) - 1) // self.world_size

    @property
    def fill(self):
        """Mean share of tokens_per_batch that real tokens fill, over the batches of the epoch planned last."""
        _, _, offsets = self._plan
        return float(self._lengths.sum() / (self.tokens_per_batch * (len(offsets) - 1)))

    def epoch(self, epoch, start=0):
        """Iterate over this rank's batches of an epoch, a `fastbert.packing.Batch` each, from batch `start` on.

        Tensors are on the CPU: cu_seqlens int32, the others int64. Batches before `start` cost nothing.
        """
        order, offsets = self._planned(epoch)
        count = self.num_batches(epoch)
        if not 0 <= start <= count:
            raise ValueError(f"start is {start}: epoch {epoch} has {count} batches")
        numbers = range(self.rank + start * self.world_size, count * self.world_size, self.world_size)
        batches = [order[offsets[b] : offsets[b + 1]] for b in numbers]
        return ordered_map(lambda ids: self._build(epoch, ids), batches, self.num_workers)

    def _planned(self, epoch):
        """(sequence ids in the order of the batches, the offset of each batch in them and the end) of an epoch."""
        if self._plan is None or self._plan[0] != epoch:
            order = np.argsort(draw(sequence_keys(self.seed, epoch, self.ids), ORDER), kind="stable")
            placed, offsets = best_fit(self._lengths[order], self.tokens_per_batch, max_sequences=self.max_sequences)
            if len(offsets) - 1 < self.world_size:
                raise ValueError(
                    f"the text fills {len(offsets) - 1} batches of {self.tokens_per_batch} tokens: "
                    f"expected at least one for each of {self.world_size} ranks"
                )
            self._plan = epoch, self.ids[order[placed]], offsets
        return self._plan[1:]

    def _build(self, epoch, ids):
        keys = sequence_keys(self.seed, epoch, ids)
        # segments are [B, 1] or, for pairs, [B, 2]
        starts, lengths, pair_labels = self._segments(ids, keys)
        B, S = starts.shape
        cu_seqlens = np.zeros(B + 1, dtype=np.int64)
        np.cumsum((lengths + 1).sum(1) + 1, out=cu_seqlens[1:])
        T = cu_seqlens[-1]

        # [CLS] segment [SEP] segment [SEP]: start with [SEP] everywhere and write the rest over it
        input_ids = np.full(T, self.special.sep, dtype=np.int64)
        input_ids[cu_seqlens[:-1]] = self.special.cls
        places = cu_seqlens[:-1, None] + 1 + np.cumsum(lengths + 1, axis=1) - (lengths + 1)
        counts = lengths.ravel()
        within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        tokens = self._tokens(starts.ravel(), counts, within)
        input_ids[np.repeat(places.ravel(), counts) + within] = tokens
        # [CLS] belongs to the first segment, [SEP] to the segment before it
        type_counts = lengths + 1
        type_counts[:, 0] += 1
        token_type_ids = np.repeat(np.tile(np.arange(S), B), type_counts.ravel())
        position_ids = np.arange(T) - np.repeat(cu_seqlens[:-1], np.diff(cu_seqlens))

        masked, labels = mask_tokens(
            input_ids,
            cu_seqlens,
            keys,
            special=self.special,
            words=self.words,
            probability=self.mlm_probability,
            starts=self.starts,
            fates=ELECTRA_FATES if self.objective == "rtd" else BERT_FATES,
        )
        picks = np.flatnonzero(labels != IGNORED)
        draws = None
        if self.objective == "rtd":
            # no pick becomes a random word here: the generator samples one, with the draw for it
            owner = np.searchsorted(cu_seqlens, picks, side="right") - 1
            draws = uniform(draw(keys[owner], WORD, position_ids[picks]))
        max_seqlen = int(np.diff(cu_seqlens).max())
        if self.max_sequences is not None:
            beyond = picks[self.max_picks :]
            masked[beyond], labels[beyond] = input_ids[beyond], IGNORED
            rows, sequences, max_seqlen = self.tokens_per_batch, self.max_sequences, self.max_seq_length
            masked, labels = _resized(masked, rows, self.special.pad), _resized(labels, rows, IGNORED)
            position_ids, token_type_ids = _resized(position_ids, rows, 0), _resized(token_type_ids, rows, 0)
            cu_seqlens = _resized(cu_seqlens, sequences + 1, T)
            pair_labels = _resized(pair_labels, sequences, IGNORED)
            # unused picks point at the last row, a [PAD] or [SEP], which has no label
            picks, draws = _resized(picks, self.max_picks, rows - 1), _resized(draws, self.max_picks, 0)
        arrays = {
            "input_ids": masked,
            "position_ids": position_ids,
            "token_type_ids": token_type_ids,
            "cu_seqlens": cu_seqlens.astype(np.int32),
            "labels": labels,
            "picks": picks,
            "pair_labels": pair_labels,
            "draws": draws,
        }
        tensors = {name: torch.from_numpy(array) for name, array in arrays.items() if array is not None}
        return Batch(max_seqlen=max_seqlen, **tensors)

    def _segments(self, ids, keys):
        """(first tokens [B, S], lengths [B, S], pair labels [B] or None) of each sequence's segments."""
        start, length = self.index.start[ids], self.index.length[ids]
        if self.objective not in PAIRS:
            return start[:, None], length[:, None], None
        cut = self._cuts(start, length, uniform(draw(keys, CUT)))
        starts, lengths = np.stack([start, start + cut], 1), np.stack([cut, length - cut], 1)
        false = uniform(draw(keys, PAIR)) < 0.5
        if self.objective == "mlm+sop":
            starts[false], lengths[false] = starts[false, ::-1], lengths[false, ::-1]
        else:
            # the beginning of another document's sequence, as long as the segment it replaces: length gives no hint
            first, last = (
                np.searchsorted(self._documents, self.index.document[ids], side) for side in ("left", "right")
            )
            others = len(self.ids) - (last - first)
            partner = (uniform(draw(keys, PARTNER)) * others).astype(np.int64)
            partner = self.ids[np.where(partner < first, partner, partner + last - first)]
            there = self.index.start[partner]
            left = self.index.document_starts[self.index.document[partner] + 1] - there
            starts[false, 1] = there[false]
            lengths[false, 1] = np.minimum(lengths[:, 1], left)[false]
        return starts, lengths, false.astype(np.int64)

    def _shard_of(self, starts):
        return np.searchsorted(self.shards.first_token, starts, side="right") - 1

    def _cuts(self, start, length, share):
        """Where each sequence is split in two: at a random sentence border inside it, else in the middle."""
        cut = length // 2
        shard = self._shard_of(start)
        for s in np.unique(shard):
            here = np.flatnonzero(shard == s)
            borders, first = self.shards.sentences[s], start[here] - self.shards.first_token[s]
            low = np.searchsorted(borders, first, side="right")
            count = np.searchsorted(borders, first + length[here], side="left") - low
            some = count > 0
            border = (low + (share[here] * count).astype(np.int64))[some]
            cut[here[some]] = borders[border] - first[some]
            if not ((cut[here] > 0) & (cut[here] < length[here])).all():
                raise self.shards.damage(s, "sentences", "a sentence begins before the one that it follows")
        return cut

    def _tokens(self, starts, counts, within):
        """The tokens of segments, concatenated."""
        shard = self._shard_of(starts)
        sources = np.repeat(starts - self.shards.first_token[shard], counts) + within
        shard = np.repeat(shard, counts)
        tokens = np.empty(len(sources), dtype=np.int64)
        for s in np.unique(shard):
            here = shard == s
            tokens[here] = self.shards.tokens_at(s, sources[here])
        return tokens


def _resized(array, size, value):
    """The array cut or filled up with `value` to `size` entries; None stays None."""
    if array is None:
        return None
    array = array[:size]
    return np.pad(array, (0, size - len(array)), constant_values=value)
