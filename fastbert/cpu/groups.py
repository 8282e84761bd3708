"""Attention of packed sequences as a few padded batches, each with sequences of about one length.

They are for short sequences: one at a time, the overhead of library calls would dominate.
"""

import functools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend

from .. import reference
from .autograd import derivatives, in_memory, runs_by_autograd
from .dropout import attention_keep_mask, drop
from .libraries import prefers_onednn

_BUCKET = 16


def uniform(q, k, v, B, scale):
    """Attention of B sequences of one length, without gathering: that would take a small batch as long as the rest."""
    padded = (x.view(B, len(x) // B, *x.shape[1:]).transpose(1, 2) for x in reference.apart(q, k, v))
    return _attend(*padded, scale).transpose(1, 2).reshape(len(q), *q.shape[-2:])


def in_groups(
    q, k, v, starts, *,
    starts_q=None, bias=None, scale, window=None, dropout_p=0.0, seed=None, offset=0,
):  # fmt: skip
    """softmax(q kᵀ · scale + bias) v of any sequences, within a window if there is one.

    q, k, v in the three packings of `reference.attention`. starts, starts_q: B + 1 ints, the first row of each sequence
    in k and in q (None: the same). bias [2 * span, H] or None: see `reference.biased_attention`. Returns q's rows,
    [T or M, H, K].
    """
    if v is not None:
        k = torch.stack((k, v), 1)
    batches, place_q, place_k = groups(starts_q or starts, starts, len(q), len(q if k is None else k), q.device)
    if k is None:
        grouped = (x.permute(2, 0, 3, 1, 4).unbind(0) for x in arrange(q, *place_q, batches, "length"))
    else:
        queries = (x.transpose(1, 2) for x in arrange(q, *place_q, batches, "length_q"))
        pairs = (x.permute(2, 0, 3, 1, 4).unbind(0) for x in arrange(k, *place_k, batches, "length"))
        grouped = ((x, *pair) for x, pair in zip(queries, pairs))
    outs = []
    for group, (queries, keys, values) in zip(batches, grouped):
        position = torch.arange(group.length, device=q.device)
        distance = position[:, None] - position
        mask, biases, keep = group.mask, None, None
        if window is not None:
            near = distance.abs() <= window
            # padding rows see some keys, to avoid NaN
            mask = near[None, None] if mask is None else near & mask | ~mask.transpose(-1, -2)
        if bias is not None:
            # a group may be padded beyond the longest sequence
            rows = (distance + bias.shape[0] // 2).clamp(0, bias.shape[0] - 1)
            biases = bias[rows].permute(2, 0, 1).to(q.dtype)
        if dropout_p > 0.0:
            row = group.start_q[:, None] + torch.arange(group.length_q, device=q.device)
            head = torch.arange(queries.shape[1], device=q.device)
            keep = attention_keep_mask(row[:, None, :], head[None, :, None], group.length, seed, offset, dropout_p)
        out = _attend(queries, keys, values, scale, mask, biases, keep, dropout_p)
        outs.append(out.transpose(1, 2).flatten(0, 1))
    rows = torch.cat(outs) if outs else no_rows(q, q, k, bias)
    return TakeFunction.apply(rows, *reversed(place_q))


def _attend(q, k, v, scale, mask=None, biases=None, keep=None, dropout_p=0.0):
    """softmax(q kᵀ · scale + biases) v for q, k, v [members, H, length, K]; what is None is absent."""
    if biases is None and keep is None and not _is_faster_in_steps(q):
        if _runs_flash(q, k, v, mask, scale):
            return FlashFunction.apply(q, k, v, mask, scale)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    return _attend_in_steps(q, k, v, scale, mask, biases, keep, dropout_p)


def _is_faster_in_steps(q):
    """Whether torch's fused attention is slower than its parts, as in bfloat16 it may be (4x at length 128, 1.7x at
    512, forward and backward; Zen 5)."""
    if q.dtype != torch.bfloat16:
        return False
    if not in_memory(q):
        return True
    members, H, L, K = q.shape
    # with the backward in any case: see `attention._runs_in_cache`
    return prefers_onednn("attend-bf16-backward", (min(members * H, 8), L, L, K), _candidates)


def _candidates(kind, sizes):
    """Attention in bfloat16 of one group, in steps and fused, as functions; for `prefers_onednn`."""
    H, L, _, K = sizes
    q, k, v = (torch.ones(1, H, L, K, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    fused, in_steps = lambda: F.scaled_dot_product_attention(q, k, v), lambda: _attend_in_steps(q, k, v, K**-0.5, None)
    return with_backward(in_steps, (q, k, v)), with_backward(fused, (q, k, v))


def with_backward(forward, inputs):
    """A function that runs `forward` and the gradients of `inputs`."""

    def both():
        with torch.enable_grad():
            out = forward()
        torch.autograd.grad(out, inputs, out.detach())

    return both


def _attend_in_steps(q, k, v, scale, mask, biases=None, keep=None, dropout_p=0.0):
    scores = q * scale @ k.transpose(-1, -2)
    if biases is not None:
        scores = scores + biases
    if mask is not None:
        # the product's, or the sum's, and nobody else's
        scores = scores.masked_fill_(~mask, float("-inf"))
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
        if runs_by_autograd(dout):
            gradients = derivatives(lambda q, k, v: _attend_in_steps(q, k, v, ctx.scale, mask), (q, k, v), dout)
        else:
            backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
            gradients = backward(dout, q, k, v, out, lse, 0.0, False, attn_mask=added, scale=ctx.scale)
        return *gradients, None, None


# ------------------------------------------------------------- packed <-> groups, for DeBERTa's attention too


@dataclass
class Group:
    """Sequences of about one length, padded: `members` sequences with `length` keys and `length_q` query rows each."""

    members: int
    length: int
    length_q: int
    start_q: torch.Tensor
    mask: torch.Tensor | None


@functools.lru_cache(maxsize=4)
# the first call may come in inference mode and a later one in training
@torch.inference_mode(False)
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
        # -1: no row here
        slots = [torch.zeros(0, dtype=torch.int64)]
        for bucket, width in zip(buckets, widths):
            start, length = (torch.tensor([x[b] for b in bucket])[:, None] for x in (starts, lengths))
            column = torch.arange(width)
            slots.append(torch.where(column < length, start + column, -1).flatten())
        slots, back = torch.cat(slots), torch.full((rows,), -1)
        filled = (slots >= 0).nonzero()[:, 0]
        back[slots[filled]] = filled
        return [(x.clamp(min=0).to(device), (x < 0).nonzero()[:, 0].to(device)) for x in (slots, back)]

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
        ctx.back = back
        return TakeFunction.take(x, *there)

    @staticmethod
    def backward(ctx, dout):
        return TakeFunction.take(dout, *ctx.back), None, None

    @staticmethod
    def take(x, index, holes):
        if len(x) == 0:
            return x.new_zeros(len(index), *x.shape[1:])
        return x.index_select(0, index).index_fill_(0, holes, 0)


def no_rows(q, *inputs):
    """An empty [0, H, K] that depends on all inputs, so that the backward gives each of them zeros."""
    return q.new_zeros(0, *q.shape[-2:]) + sum(x[:0].sum() for x in inputs if x is not None)
