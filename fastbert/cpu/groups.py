"""Packed sequences as a few padded batches, each with sequences of about one length. Both attentions use them.

They are for short sequences: one at a time, the overhead of library calls would dominate.
"""

import functools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend

from .derivatives import derivatives
from .dropout import drop

_BUCKET = 16


@dataclass
class Group:
    """Sequences of about one length, padded: `members` sequences with `length` keys and `length_q` query rows each."""

    members: int
    length: int
    length_q: int
    start_q: torch.Tensor
    mask: torch.Tensor | None


@functools.lru_cache(maxsize=4)
def groups(starts_q, starts, rows_q, rows, device):
    """Groups of packed sequences, for a few batched calls: `(groups, place_q, place_k)`.

    A place is a pair of arguments of TakeFunction: from packed rows to the groups' slots, and back. All layers of a
    model share one layout, hence the cache.
    """
    lengths_q = [end - start for start, end in zip(starts_q, starts_q[1:])]
    lengths = [end - start for start, end in zip(starts, starts[1:])]
    buckets = {}
    for b, (length_q, length) in enumerate(zip(lengths_q, lengths)):
        if length and length_q:
            buckets.setdefault(-(-length // _BUCKET), []).append(b)
    buckets = list(buckets.values())
    found = []
    for bucket in buckets:
        own = torch.tensor([lengths[b] for b in bucket], device=device)
        length, mask = lengths[bucket[0]], None
        if (own != length).any():
            # up to the bucket's length, so that few shapes occur: libraries set up, and cache, something per shape
            length = -(-length // _BUCKET) * _BUCKET
            mask = (torch.arange(length, device=device) < own[:, None])[:, None, None, :]
        length_q = length
        if starts_q != starts:
            length_q = -(-max(lengths_q[b] for b in bucket) // 8) * 8
        start_q = torch.tensor([starts_q[b] for b in bucket], device=device)
        found.append(Group(len(bucket), length, length_q, start_q, mask))

    def place(starts, lengths, rows, widths):
        slots, holes = [], []
        for bucket, width in zip(buckets, widths):
            start = torch.tensor([starts[b] for b in bucket])[:, None]
            length = torch.tensor([lengths[b] for b in bucket])[:, None]
            column = torch.arange(width)
            slots.append((start + column.minimum(length - 1)).flatten())
            holes.append((column >= length).flatten())
        slots = torch.cat(slots) if slots else torch.zeros(0, dtype=torch.int64)
        holes = torch.cat(holes) if holes else torch.zeros(0, dtype=torch.bool)
        back = torch.full((rows,), -1)
        back[slots[~holes]] = (~holes).nonzero()[:, 0]
        to_slots = (slots.to(device), holes.nonzero()[:, 0].to(device))
        return to_slots, (back.clamp(min=0).to(device), (back < 0).nonzero()[:, 0].to(device))

    place_q = place(starts_q, lengths_q, rows_q, [group.length_q for group in found])
    return found, place_q, place(starts, lengths, rows, [group.length for group in found])


def arrange(x, to_slots, to_rows, groups, length):
    """Rows [T, ...] as one [members, length, ...] per group."""
    parts = TakeFunction.apply(x, to_slots, to_rows).split([g.members * getattr(g, length) for g in groups])
    return [part.unflatten(0, (g.members, getattr(g, length))) for part, g in zip(parts, groups)]


class TakeFunction(torch.autograd.Function):
    """x[index] with the rows `holes` set to 0. `there` and `back` are such pairs, inverse to each other."""

    @staticmethod
    def forward(ctx, x, there, back):
        ctx.there, ctx.back = there, back
        return TakeFunction.take(x, *there)

    @staticmethod
    def backward(ctx, dout):
        return TakeFunction.apply(dout, ctx.back, ctx.there), None, None

    @staticmethod
    def take(x, index, holes):
        if len(x) == 0:
            return x.new_zeros(len(index), *x.shape[1:])
        return x.index_select(0, index).index_fill_(0, holes, 0)


def no_rows(q, *inputs):
    """An empty [0, H, K] that depends on all inputs, so that the backward gives each of them zeros."""
    return q.new_zeros(0, *q.shape[-2:]) + sum(x[:0].sum() for x in inputs if x is not None)


def window_mask(group, window):
    """bool [members or 1, 1, length, length]: which keys a query sees. Padding rows see some keys, to avoid NaN."""
    place = torch.arange(group.length, device=group.start_q.device)
    near = (place[:, None] - place).abs() <= window
    return near[None, None] if group.mask is None else near & group.mask | ~group.mask.transpose(-1, -2)


def attend(q, k, v, scale, mask, keep, dropout_p):
    """softmax(q kᵀ · scale) v for q, k, v [members, H, length, K], with a mask or None and a keep mask or None."""
    # in bfloat16 torch's fused attention is slower than its parts (4x at length 128, 1.7x at 512, forward and backward;
    # Zen 5)
    if keep is None and q.dtype != torch.bfloat16:
        if _runs_flash(q, k, v, mask, scale):
            return FlashFunction.apply(q, k, v, mask, scale)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    return _attend(q, k, v, scale, mask, keep, dropout_p)


def _attend(q, k, v, scale, mask, keep=None, dropout_p=0.0):
    scores = q * scale @ k.transpose(-1, -2)
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    probabilities = torch.softmax(scores, dim=-1)
    if keep is not None:
        probabilities = drop(probabilities, keep, dropout_p)
    return probabilities @ v


def _runs_flash(q, k, v, mask, scale):
    """Whether torch would choose, for tensors that require gradients, its attention without a second derivative."""
    return (
        torch.is_grad_enabled()
        and any(x.requires_grad for x in (q, k, v))
        and not torch.compiler.is_compiling()
        and torch._fused_sdp_choice(q, k, v, mask, scale=scale) == SDPBackend.FLASH_ATTENTION.value
    )


class FlashFunction(torch.autograd.Function):
    """torch's fused attention of F.scaled_dot_product_attention, with a second derivative."""

    @staticmethod
    def forward(ctx, q, k, v, mask, scale):
        added = None if mask is None else torch.zeros_like(mask, dtype=q.dtype).masked_fill_(~mask, float("-inf"))
        attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        out, lse = attention(q, k, v, 0.0, False, attn_mask=added, scale=scale)
        ctx.save_for_backward(q, k, v, mask, added, out, lse)
        ctx.scale = scale
        return out

    @staticmethod
    def backward(ctx, dout):
        q, k, v, mask, added, out, lse = ctx.saved_tensors
        if torch.is_grad_enabled():
            gradients = derivatives(lambda q, k, v: _attend(q, k, v, ctx.scale, mask), (q, k, v), dout)
        else:
            backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
            gradients = backward(dout, q, k, v, out, lse, 0.0, False, attn_mask=added, scale=ctx.scale)
        return *gradients, None, None
