"""Padded <-> packed. Inside the library there is no padding: the tokens of all sequences follow one another.

B sequences, S padded length, T packed tokens, M picked tokens.
"""

import dataclasses
import math
from collections import deque
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F


class Layout(NamedTuple):
    """Which packed rows belong to which sequence, and where they stand in the padded batch that they come from.

    Stands in for an attention mask. A tuple, so that whatever moves a layer's arguments (accelerate, FSDP,
    torch.compile) can walk it.

    cu_seqlens: int32 [B + 1], where each sequence starts, and the end. max_seqlen: an int, no sequence is longer.
    position_ids: int64 [T], from 0 in each sequence. columns: see `Batch`.

    query_rows: int64 [M], ascending, the only rows with a query (None: all have one); cu_seqlens_q, max_seqlen_q:
    cu_seqlens and max_seqlen of these rows. relative: what the model's table of relative positions gave for this batch.
    rotations: the rotary base of a layer -> (cos, sin), filled by the first layer that needs it.

    indices: int64 [T], the place of each row in the flattened padded batch; None: every place, in order. shape: the
    leading dimensions of padded tensors, usually (B, S).
    """

    cu_seqlens: torch.Tensor
    max_seqlen: int
    position_ids: torch.Tensor | None = None
    columns: torch.Tensor | None = None
    query_rows: torch.Tensor | None = None
    cu_seqlens_q: torch.Tensor | None = None
    max_seqlen_q: int | None = None
    relative: torch.Tensor | tuple | None = None
    rotations: dict[float, tuple] | None = None
    indices: torch.Tensor | None = None
    shape: tuple | None = None

    def pack(self, x):
        """Padded [*shape, ...] -> packed rows [T, ...]."""
        rows = x.flatten(0, len(self.shape) - 1)
        return rows if self.indices is None else rows.index_select(0, self.indices)

    def unpack(self, x):
        """Packed rows [T, ...] -> padded [*shape, ...], 0 where there is no row."""
        if self.indices is not None:
            x = x.new_zeros(math.prod(self.shape), *x.shape[1:]).index_copy(0, self.indices, x)
        return x.view(*self.shape, *x.shape[1:])

    def is_token(self):
        """bool [*shape]: False at padding. Only where there are indices."""
        return self.unpack(torch.arange(len(self.indices), device=self.indices.device) < self.cu_seqlens[-1])

    def without_padding(self, *shape):
        """For layers whose hidden states [*shape, D] are the packed rows themselves."""
        return self._replace(indices=None, shape=shape)

    def with_queries(self, rows):
        """The same sequences with queries from `rows` alone (int64 [M], ascending, each once but the last).

        Picks that fill up a batch repeat the last row: the repetitions belong to no sequence, or one would be longer
        than max_seqlen.
        """
        cu_seqlens_q = torch.searchsorted(rows, self.cu_seqlens.to(rows.dtype))
        if len(rows):
            cu_seqlens_q = torch.minimum(cu_seqlens_q, torch.searchsorted(rows, rows[-1:]) + 1)
        cu_seqlens_q = cu_seqlens_q.to(torch.int32)
        return self._replace(query_rows=rows, cu_seqlens_q=cu_seqlens_q, max_seqlen_q=min(self.max_seqlen, len(rows)))


def full_layout(B, S, device):
    """The Layout of B sequences of S tokens each."""
    return Layout(torch.arange(B + 1, dtype=torch.int32, device=device) * S, S, shape=(B, S))


def tokens_before(is_token):
    """int64 [B * S + 1]: how many tokens stand before each place of bool [B, S], and in all."""
    return F.pad(is_token.flatten().cumsum(0), (1, 0))


def layout_of(is_token, *, padding_last=False):
    """The Layout of a padded batch: bool [B, S], False at padding. Waits for the device.

    padding_last: the rows are all B * S places, those of the tokens first. No shape then depends on the number of
    tokens, and nothing waits.
    """
    B, S = is_token.shape
    flat, before = is_token.flatten(), tokens_before(is_token)
    if padding_last:
        places = torch.arange(B * S, device=flat.device)
        row = torch.where(flat, before[:-1], before[-1] + places - before[:-1])
        indices = torch.empty_like(places).scatter_(0, row, places)
    else:
        indices = flat.nonzero()[:, 0]
    cu_seqlens = before[torch.arange(B + 1, device=flat.device) * S].to(torch.int32)
    return Layout(cu_seqlens, S, indices=indices, shape=(B, S))


@dataclass
class Batch:
    """A packed batch.

    input_ids, position_ids (from 0 in each sequence, whichever row of its table a model begins with), token_type_ids:
    int64 [T]. cu_seqlens: int32 [B + 1], where each sequence starts, and the end. max_seqlen: an int, no sequence is
    longer. labels: int64 [T], -100 where nothing is to be predicted. picks: int64 [M], ascending, the rows that have a
    label. pair_labels: int64 [B], 1 where a pair is false (NSP: random second segment, SOP: swapped). columns: int64
    [T], the column of each token in its padded row, if there was padding between the tokens of a row. seed: int64 [1],
    the dropout seed of this step. draws: float64 [M] in [0, 1), from which a generator draws its token at each pick.

    targets: labels of whole sequences, [B, ...], of the type that the head expects. weights: float32, of each loss that
    has a target or label, as long as these; None: all 1. cu_examples: int32 [E + 1], where the sequences of each
    example start among the B, where an example has several: windows of a long text, choices.

    A batch may be filled up to a fixed capacity: tokens past cu_seqlens[-1] belong to no sequence, sequences at the end
    may be empty (pair label -100), and unused picks point at the last row, which has no label.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    token_type_ids: torch.Tensor
    cu_seqlens: torch.Tensor
    max_seqlen: int
    labels: torch.Tensor | None = None
    picks: torch.Tensor | None = None
    pair_labels: torch.Tensor | None = None
    columns: torch.Tensor | None = None
    seed: torch.Tensor | None = None
    draws: torch.Tensor | None = None
    targets: torch.Tensor | None = None
    weights: torch.Tensor | None = None
    cu_examples: torch.Tensor | None = None

    def _map(self, f):
        return dataclasses.replace(self, **{name: f(x) for name, x in vars(self).items() if torch.is_tensor(x)})

    def to(self, device: torch.device | str | int, non_blocking: bool = False) -> "Batch":
        return self._map(lambda t: t.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "Batch":
        return self._map(torch.Tensor.pin_memory)


def pack(
    input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, token_type_ids: torch.Tensor | None = None,
    position_ids: torch.Tensor | None = None, labels: torch.Tensor | None = None,
) -> tuple[Batch, torch.Tensor]:  # fmt: skip
    """A padded batch [B, S] without its padding. Returns `(batch, indices)`.

    attention_mask: [B, S], 1 for real tokens; padding may be right, left or in the middle. Position ids default to the
    column, as in HuggingFace's BERT, so left-padded tokens keep the position that the column gives them. `indices`
    (int64 [T]) are the places of the packed tokens in the flattened [B * S], for `unpack`. Waits for the device.
    """
    if input_ids.dim() != 2:
        raise ValueError(f"input_ids has shape {tuple(input_ids.shape)}: expected [batch, length]")
    B, S = input_ids.shape
    if attention_mask is not None and attention_mask.shape != input_ids.shape:
        raise ValueError(
            f"attention_mask has shape {tuple(attention_mask.shape)}: expected {(B, S)}, that of input_ids"
        )
    # without a mask there is nothing to look for, and nothing to wait for
    is_token = None if attention_mask is None else attention_mask.bool()
    layout = full_layout(B, S, input_ids.device) if is_token is None else layout_of(is_token)
    column = torch.arange(S, device=input_ids.device)
    if position_ids is None:
        position_ids = column
    if token_type_ids is None:
        token_type_ids = torch.zeros_like(input_ids)

    def packed(ids):
        return layout.pack(ids.expand(B, S))

    batch = Batch(
        packed(input_ids), packed(position_ids), packed(token_type_ids), layout.cu_seqlens, S if B else 0
    )  # fmt: skip
    indices = layout.indices
    if is_token is None:
        indices = torch.arange(B * S, device=input_ids.device)
    else:
        lengths = layout.cu_seqlens.diff()
        batch.max_seqlen = int(lengths.max()) if B else 0
        widths = (is_token * column).amax(1) - is_token.int().argmax(1) + 1 if S else lengths
        if bool(((widths != lengths) & (lengths > 0)).any()):
            batch.columns = indices % S
    if labels is not None:
        batch.labels = packed(labels)
        batch.picks = (batch.labels != -100).nonzero()[:, 0]
    return batch, indices


def unpack(packed: torch.Tensor, indices: torch.Tensor, B: int, S: int) -> torch.Tensor:
    """Packed rows [T, ...] back in a padded [B, S, ...]; places without a token are 0."""
    return Layout(None, S, indices=indices, shape=(B, S)).unpack(packed)


def padded_groups(x: torch.Tensor, cu_seqlens: torch.Tensor, S: int) -> torch.Tensor:
    """Rows [N, ...] of groups that begin at cu_seqlens, int32 [G + 1]: [G, S, ...], -inf where a group has ended."""
    columns = torch.arange(S, device=x.device)
    inside = columns < cu_seqlens.diff()[:, None]
    rows = x[(cu_seqlens[:-1, None] + columns).where(inside, 0).long()]
    return rows.masked_fill(~inside.view(*inside.shape, *[1] * (x.dim() - 1)), float("-inf"))


def best_fit(lengths, capacity, *, max_sequences=None, look_ahead=1 << 14):
    """Group sequences into batches of at most `capacity` tokens and `max_sequences` sequences, with little room left.

    lengths: ints [N], in the order in which the sequences should come. A batch takes the oldest waiting sequences until
    the room left is less than two of the longest. Then it takes the largest of the next `look_ahead` sequences that
    fits, until none does. No sequence waits for ever.

    Returns `(order, offsets)`, int64 arrays: batch b has the sequences `order[offsets[b] : offsets[b + 1]]`. A pure
    function of its arguments. Raises ValueError when a sequence is longer than the capacity.
    """
    lengths = np.asarray(lengths).tolist()
    N, longest = len(lengths), max(lengths, default=0)
    if longest > capacity:
        raise ValueError(f"a sequence of {longest} tokens does not fit a batch of {capacity}")
    # waiting sequences by length, oldest first; bit n of `present`: some of length n are waiting
    waiting = [deque() for _ in range(longest + 1)]
    present = 0
    up_to = [(2 << n) - 1 for n in range(longest + 1)]
    taken = bytearray(N)
    order, offsets = [], [0]
    arrived = oldest = 0
    room = capacity
    while len(order) < N:
        while arrived < N and arrived - len(order) < look_ahead:
            waiting[lengths[arrived]].append(arrived)
            present |= 1 << lengths[arrived]
            arrived += 1
        if room == capacity or room >= 2 * longest:
            while taken[oldest]:
                oldest += 1
            n = lengths[oldest]
        else:
            n = (present & up_to[min(room, longest)]).bit_length() - 1
        if n < 0 or len(order) - offsets[-1] == max_sequences:
            offsets.append(len(order))
            room = capacity
            continue
        sequence = waiting[n].popleft()
        if not waiting[n]:
            present ^= 1 << n
        taken[sequence] = 1
        order.append(sequence)
        room -= n
    if N:
        offsets.append(N)
    return np.array(order, dtype=np.int64), np.array(offsets, dtype=np.int64)


def first_rows(batch):
    """The row of each sequence's first token, int64 [B]; of an empty sequence, a neighbour's. Without tokens, [0]."""
    rows = batch.cu_seqlens[:-1].long()
    return rows.clamp(max=len(batch.input_ids) - 1) if len(batch.input_ids) else rows[:0]


def pack_inputs(config, input_ids, attention_mask=None, token_type_ids=None, position_ids=None, labels=None):
    """(Batch, function from packed rows to the caller's layout) of a Batch or of HuggingFace's arguments [B, S]."""
    if isinstance(input_ids, Batch):
        return input_ids, lambda rows: rows
    if input_ids.dim() != 2:
        raise ValueError(f"input_ids has shape {tuple(input_ids.shape)}: expected [batch, length]")
    B, S = input_ids.shape
    given = dict(input_ids=input_ids, token_type_ids=token_type_ids, position_ids=position_ids, labels=labels)
    for name, ids in given.items():
        if ids is None:
            continue
        if ids.is_floating_point() or ids.is_complex():
            raise ValueError(f"{name} are of {ids.dtype}: expected integers")
        # positions and segments may be the same for all rows
        if ids.shape != (B, S) and (name in ("input_ids", "labels") or ids.shape not in ((S,), (1, S))):
            raise ValueError(f"{name} has shape {tuple(ids.shape)}: expected {(B, S)}, that of input_ids")
    if config.max_length < S and position_ids is None:
        raise ValueError(f"input_ids are {S} tokens long: the model has {config.max_length} positions")
    limits = [("input_ids", input_ids, config.vocab_size)]
    if config.type_vocab_size:
        limits.append(("token_type_ids", token_type_ids, config.type_vocab_size))
    if config.has_positions:
        limits.append(("position_ids", position_ids, config.max_position_embeddings))
    for name, ids, rows in limits:
        if ids is not None and ids.numel() and not torch.compiler.is_compiling():
            lowest, highest = (int(x) for x in torch.aminmax(ids))
            if lowest < 0 or highest >= rows:
                outside = lowest if lowest < 0 else highest
                raise ValueError(f"{name} holds {outside}: the model's table has rows 0 to {rows - 1}")
    if config.position_offset:
        if position_ids is None:
            # RoBERTa's rule: the token whose id is the row before the first counts for nothing, usually padding
            counted = input_ids != config.position_offset - 1
            position_ids = counted.cumsum(1) * counted - 1
        else:
            position_ids = position_ids - config.position_offset
    batch, indices = pack(input_ids, attention_mask, token_type_ids, position_ids, labels)
    if attention_mask is None:
        return batch, lambda rows: rows.view(B, S, *rows.shape[1:])
    return batch, lambda rows: unpack(rows, indices, B, S)
