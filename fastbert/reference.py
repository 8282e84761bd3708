"""What every op means, in plain PyTorch: the CPU path, the oracle of the tests, and the first thing to read.

Every function here has a twin of the same name, arguments and results in `kernels/`; `ops.py` chooses between the two.

Letters: B sequences, T packed tokens, D hidden size, F feed-forward size, H heads, K head size, V vocabulary, M rows.

Dropout is a pure function of `(seed, offset)` and of the element's place, the same one in PyTorch and in the kernels:
the same mask on every device, in forward and backward, under activation checkpointing and after a resume.
"""

import functools
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from . import cpu_attention, dropout_mask

_UINT32 = 0xFFFFFFFF
PHILOX_ROUNDS = 7


def philox(c0, c1, c2, c3, k0, k1):
    """Philox4x32-7 (Salmon et al. 2011): four 32-bit random words from a 128-bit counter and a 64-bit key.

    All arguments are int64 tensors (or ints for the key) that hold unsigned 32-bit values; so do the four results.
    """
    for _ in range(PHILOX_ROUNDS):
        # the factors less 2^32, and so c0 and c2 too little above: a product over 2^63 is undefined in the C++ that
        # torch.compile writes
        low, high = c0 * (0xD2511F53 - 2**32), c2 * (0xCD9E8D57 - 2**32)
        c0, c2 = (((high >> 32) + c2) & _UINT32) ^ c1 ^ k0, (((low >> 32) + c0) & _UINT32) ^ c3 ^ k1
        c1, c3 = high & _UINT32, low & _UINT32
        k0, k1 = (k0 + 0x9E3779B9) & _UINT32, (k1 + 0xBB67AE85) & _UINT32
    return c0, c1, c2, c3


# from so many multiply-adds on, MiniLM's on 8 tokens, oneDNN's product saves something. Its set-up for a shape that it
# has not seen, under a millisecond, then costs what a few products save, and a model's layers share its shapes
_ONEDNN_SIZE = 2**20


def matmul(a, b, bias=None):
    """a [M, K] @ b [K, N], plus bias [N] if given, by the faster of torch's two CPU libraries.

    torch sends float32 products to MKL, which keeps to AVX2 on processors that are not Intel's; oneDNN, also inside
    torch, uses AVX-512 wherever it exists (2.1 times as fast on a Zen 5 core, equal on Intel's). Elsewhere: plain `@`.
    """
    if _prefers_onednn(a, b):
        return torch.ops.mkldnn._linear_pointwise(a, _dense(b.t()), bias, "none", [], "")
    return a @ b if bias is None else torch.addmm(bias, a, b)


def _dense(weight):
    """The weight without gaps between its rows or columns, with which oneDNN takes a thousand times as long."""
    return weight if weight.is_contiguous() or weight.t().is_contiguous() else weight.contiguous()


def _prefers_onednn(a, b):
    return (
        a.dtype == b.dtype == torch.float32
        and a.device.type == "cpu"
        and a.shape[0] * a.shape[1] * b.shape[1] >= _ONEDNN_SIZE
        and torch.backends.mkldnn.is_available()
        and torch.backends.mkldnn.enabled
        and not torch.compiler.is_compiling()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


class LinearFunction(torch.autograd.Function):
    """A linear layer whose three products go through `matmul`."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        return matmul(x, weight.t(), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        x, weight = ctx.saved_tensors
        wants_x, wants_weight, wants_bias = ctx.needs_input_grad
        dx = matmul(dout, weight) if wants_x else None
        dweight = matmul(dout.t(), x) if wants_weight else None
        return dx, dweight, dout.sum(0) if wants_bias else None


def linear(x, weight, bias=None):
    """x @ weightᵀ + bias. x [T, D], weight [F, D], bias [F] or None."""
    if not _prefers_onednn(x, weight.t()):
        return F.linear(x, weight, bias)
    if not torch.is_grad_enabled():
        return matmul(x, weight.t(), bias)
    return LinearFunction.apply(x, weight, bias)


def linear_gelu(x, weight, bias=None, *, approximate="none"):
    """GELU(linear(x)). Where nobody wants gradients, oneDNN applies the GELU before the product leaves the cache."""
    wants_gradient = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias))
    if not wants_gradient and _prefers_onednn(x, weight.t()):
        return torch.ops.mkldnn._linear_pointwise(x, _dense(weight), bias, "gelu", [], approximate)
    return F.gelu(linear(x, weight, bias), approximate=approximate)


def dropout_threshold(dropout_p):
    """`dropout_p` in the 1/65536 steps that the masks are drawn in: an element is kept when its 16 bits reach this."""
    return round(dropout_p * 65536)


def _random_pieces(groups, row, head, seed, offset):
    """int64 [..., groups, 8]: for int64 `row` and `head` that broadcast to [...], 16 random bits in each piece.

    A group is one Philox call: its counter is (group, row, head, offset) and its key `seed` (an int64 tensor [1]). Its
    pieces stand in order of word, low half first.
    """
    # masked, lest torch.compile count it in 32 bits
    group = torch.arange(groups, device=row.device) & _UINT32
    # left to broadcast: what does not depend on all of them is computed once
    counter = group, row.unsqueeze(-1) & _UINT32, head.unsqueeze(-1) & _UINT32, torch.full_like(group, offset & _UINT32)
    words = philox(*counter, seed & _UINT32, (seed >> 32) & _UINT32)
    return torch.stack([half for word in words for half in (word & 0xFFFF, word >> 16)], dim=-1)


def keep_mask(row, head, columns, seed, offset, dropout_p):
    """The keep mask of one call: bool [..., columns] for int64 `row` and `head` that broadcast to [...].

    Element (row, head, column) looks at piece `column % 8` of group `column // 8` of `_random_pieces`.
    """
    if _in_memory(row, head, seed):
        return dropout_mask.draw(row, head, columns, seed, offset, dropout_threshold(dropout_p), 1)
    bits = _random_pieces(-(-columns // 8), row, head, seed, offset)
    return bits.flatten(-2)[..., :columns] >= dropout_threshold(dropout_p)


def attention_keep_mask(row, head, columns, seed, offset, dropout_p):
    """The same with another order of the columns, in which a thread of a GPU holds attention's scores.

    Bits 0, 3 and 4 of a column, in this order from the lowest, say which piece; the others say which group.
    """
    if _in_memory(row, head, seed):
        return dropout_mask.draw(row, head, columns, seed, offset, dropout_threshold(dropout_p), 4)
    bits = _random_pieces(-(-columns // 32) * 4, row, head, seed, offset)
    # bits 5 and above, bits 2 and 1, then the piece as bits 4, 3, 0
    bits = bits.unflatten(-1, (2, 2, 2)).unflatten(-4, (-1, 4))
    bits = bits.permute(*range(bits.dim() - 5), -5, -3, -2, -4, -1)
    return bits.flatten(-5)[..., :columns] >= dropout_threshold(dropout_p)


def dropout(x, dropout_p, seed, offset):
    """x [T, D] with elements dropped and the rest scaled so that the expectation stays."""
    if dropout_p == 0.0:
        return x
    rows = torch.arange(x.shape[0], device=x.device)
    keep = keep_mask(rows, torch.zeros_like(rows), x.shape[1], seed, offset, dropout_p)
    return drop(x, keep, dropout_p)


def _keep_scale(dropout_p):
    return 65536 / max(65536 - dropout_threshold(dropout_p), 1)


def drop(x, keep, dropout_p):
    """x with what `keep`, bool of x's shape, says scaled so that the expectation stays, and 0 elsewhere."""
    return DropFunction.apply(x, keep, _keep_scale(dropout_p))


class DropFunction(torch.autograd.Function):
    """x * keep * scale, which keeps for its backward a byte for each element."""

    @staticmethod
    def forward(ctx, x, keep, scale):
        ctx.save_for_backward(keep)
        ctx.scale = scale
        if x.device.type != "cpu":
            return x * keep * scale
        # on a CPU, torch converts bytes with vector instructions, but not booleans
        return keep.view(torch.uint8).to(x.dtype).mul_(x).mul_(scale)

    @staticmethod
    def backward(ctx, dout):
        return DropFunction.apply(dout, *ctx.saved_tensors, ctx.scale), None, None


def attention(
    q, k, v, cu_seqlens, max_seqlen, *,
    cu_seqlens_q=None, max_seqlen_q=None, scale=None, dropout_p=0.0, window=None, seed=None, offset=0,
):  # fmt: skip
    """softmax(q kᵀ · scale) v within each sequence, in both directions.

    q [T, H, K], k and v [T, H, K]; or q [T, 3, H, K] holding all three (k and v None); or k [T, 2, H, K] holding keys
    and values (v None). The gradient of a packed argument comes packed. Sequence b owns rows cu_seqlens[b] to
    cu_seqlens[b+1] (int32 [B+1]); none is longer than `max_seqlen`. Rows past the last sequence are not read, give 0.

    When only some rows ask, q is [M, H, K] and `cu_seqlens_q` (int32 [B+1]) says which belong to which sequence; rows
    of q whose sequence is empty give 0. `scale`, above 0, defaults to K ** -0.5. With `window`, an int from 0 on, row
    i of a sequence sees keys j with |i - j| <= window (Beltagy et al. 2020; ModernBERT). Dropout acts on
    the probabilities, its mask indexed by (row of q, head, position of the key in its sequence): `attention_keep_mask`.
    Returns [T or M, H, K].
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    starts = tuple(cu_seqlens.tolist())
    if cu_seqlens_q is None and window is None:
        is_uniform = dropout_p == 0.0 and _is_uniform(starts, len(q))
        if _runs_in_cache(q, starts) and not (is_uniform and starts[1] ** 2 * q.shape[-1] < cpu_attention.ONEDNN_SIZE):
            options = dict(scale=scale, **_drawing(dropout_p, seed, offset))
            return cpu_attention.attention(q, k, v, starts, **options)
        if is_uniform:
            return _uniform_attention(q, k, v, len(starts) - 1, scale)
    starts_q = starts if cu_seqlens_q is None else tuple(cu_seqlens_q.tolist())
    if v is not None:
        k = torch.stack((k, v), 1)
    groups, place_q, place_k = _groups(starts_q, starts, len(q), len(q) if k is None else len(k), q.device)

    if k is None:
        grouped = (x.permute(2, 0, 3, 1, 4).unbind(0) for x in _arrange(q, *place_q, groups, "length"))
    else:
        queries = (x.transpose(1, 2) for x in _arrange(q, *place_q, groups, "length_q"))
        pairs = (x.permute(2, 0, 3, 1, 4).unbind(0) for x in _arrange(k, *place_k, groups, "length"))
        grouped = ((x, *pair) for x, pair in zip(queries, pairs))
    if window is not None:
        groups = [replace(group, mask=_window_mask(group, window)) for group in groups]
    outs = []
    for group, (queries, keys, values) in zip(groups, grouped):
        keep = None
        if dropout_p > 0.0:
            row = group.start_q[:, None] + torch.arange(group.length_q, device=q.device)
            head = torch.arange(queries.shape[1], device=q.device)
            keep = attention_keep_mask(row[:, None, :], head[None, :, None], group.length, seed, offset, dropout_p)
        out = _attend(queries, keys, values, scale, group.mask, keep, dropout_p)
        outs.append(out.transpose(1, 2).flatten(0, 1))
    rows = torch.cat(outs) if outs else _no_rows(q, q, k)
    return TakeFunction.apply(rows, *reversed(place_q))


def _runs_in_cache(q, starts):
    # shorter sequences are better computed side by side, padded, as each call of a library takes a while to begin
    return starts[-1] >= 64 * (len(starts) - 1) > 0 and q.dtype in (torch.float32, torch.float64) and _in_memory(q)


def _drawing(dropout_p, seed, offset):
    """Dropout as `cpu_attention.attention` wants it."""
    if dropout_p == 0.0:
        return {}
    draw = functools.partial(attention_keep_mask, seed=seed, offset=offset, dropout_p=dropout_p)
    return dict(draw=draw, keep_scale=_keep_scale(dropout_p))


@functools.lru_cache(maxsize=4)
def _is_uniform(starts, rows):
    """Whether the sequences are all of one length and all rows are theirs."""
    length = starts[1] if len(starts) > 1 else 0
    return length > 0 and starts[-1] == rows and starts == tuple(range(0, rows + 1, length))


def _uniform_attention(q, k, v, B, scale):
    """Attention of B sequences of one length: nothing to gather, which costs a small batch as much as it computes."""
    if k is None:
        q, k, v = q.unbind(1)
    elif v is None:
        k, v = k.unbind(1)
    padded = (x.view(B, len(x) // B, *x.shape[1:]).transpose(1, 2) for x in (q, k, v))
    return _attend(*padded, scale, None, None, 0.0).transpose(1, 2).reshape(q.shape)


def _no_rows(q, *inputs):
    """[0, H, K] that hangs on all inputs, so that a backward gives each of them its zeros."""
    return q.new_zeros(0, *q.shape[-2:]) + sum(x[:0].sum() for x in inputs if x is not None)


def _window_mask(group, window):
    """bool [members or 1, 1, length, length]: who sees whom. Rows that only fill up see something, lest they be NaN."""
    place = torch.arange(group.length, device=group.start_q.device)
    near = (place[:, None] - place).abs() <= window
    return near[None, None] if group.mask is None else near & group.mask | ~group.mask.transpose(-1, -2)


def _attend(q, k, v, scale, mask, keep, dropout_p):
    # in bfloat16 on a CPU, torch's fused attention takes several times as long as its parts (4x at length 128, 1.7x at
    # 512, both passes; Zen 5)
    if keep is None and not (q.dtype == torch.bfloat16 and q.device.type == "cpu"):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    scores = q * scale @ k.transpose(-1, -2)
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    probabilities = torch.softmax(scores, dim=-1)
    if keep is not None:
        probabilities = drop(probabilities, keep, dropout_p)
    return probabilities @ v


@dataclass
class _Group:
    """Sequences of about one length, padded to one: `members` of them, `length` keys and `length_q` queries each."""

    members: int
    length: int
    length_q: int
    start_q: torch.Tensor
    mask: torch.Tensor | None


_BUCKET = 16


@functools.lru_cache(maxsize=4)
def _groups(starts_q, starts, rows_q, rows, device):
    """How to run packed sequences in few batched calls: `(groups, place_q, place_k)`.

    A place is a pair of what TakeFunction wants: from packed rows to the groups' slots, and back. All layers of a pass
    share one layout, hence the cache.
    """
    lengths_q = [end - start for start, end in zip(starts_q, starts_q[1:])]
    lengths = [end - start for start, end in zip(starts, starts[1:])]
    buckets = {}
    for b, (length_q, length) in enumerate(zip(lengths_q, lengths)):
        if length and length_q:
            buckets.setdefault(-(-length // _BUCKET), []).append(b)
    buckets = list(buckets.values())
    groups = []
    for bucket in buckets:
        own = torch.tensor([lengths[b] for b in bucket], device=device)
        length, mask = lengths[bucket[0]], None
        if (own != length).any():
            # up to the bucket's own length, so that few shapes occur: libraries set up, and keep, something for each
            length = -(-length // _BUCKET) * _BUCKET
            mask = (torch.arange(length, device=device) < own[:, None])[:, None, None, :]
        length_q = length
        if starts_q != starts:
            length_q = -(-max(lengths_q[b] for b in bucket) // 8) * 8
        start_q = torch.tensor([starts_q[b] for b in bucket], device=device)
        groups.append(_Group(len(bucket), length, length_q, start_q, mask))

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

    place_q = place(starts_q, lengths_q, rows_q, [group.length_q for group in groups])
    return groups, place_q, place(starts, lengths, rows, [group.length for group in groups])


def _arrange(x, to_slots, to_rows, groups, length):
    """Rows [T, ...] as one [members, length, ...] per group."""
    parts = TakeFunction.apply(x, to_slots, to_rows).split([g.members * getattr(g, length) for g in groups])
    return [part.unflatten(0, (g.members, getattr(g, length))) for part, g in zip(parts, groups)]


class TakeFunction(torch.autograd.Function):
    """x[index] with the rows `holes` set to 0, where `(index, holes)` there and `back` undo each other."""

    @staticmethod
    def forward(ctx, x, there, back):
        ctx.back = back
        return TakeFunction.take(x, *there)

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        return TakeFunction.take(dout, *ctx.back), None, None

    @staticmethod
    def take(x, index, holes):
        if len(x) == 0:
            return x.new_zeros(len(index), *x.shape[1:])
        return x.index_select(0, index).index_fill_(0, holes, 0)


def disentangled_attention(
    q, k, v, pos_key, pos_query, cu_seqlens, max_seqlen, *,
    position_buckets=0, max_relative_positions, scale=None, dropout_p=0.0, seed=None, offset=0,
):  # fmt: skip
    """Attention that also scores relative positions, as all versions of DeBERTa do: softmax(s · scale) v with

        s[i, j] = q_i · k_j + q_i · pos_key[d(i - j)] + k_j · pos_query[d(i - j)]

    q, k, v, cu_seqlens, max_seqlen, dropout and result as in `attention`; all rows ask. pos_key and pos_query
    [2 * span, H, K] are the projected embeddings of relative positions, None for a term that is absent. d(r) is the
    position r, or its bucket, counted from -span and kept within the table: see `relative_index`. `scale` defaults to
    (K * (1 + the number of position terms)) ** -0.5. Source: He et al. 2021, section 3.
    """
    tables = [x for x in (pos_key, pos_query) if x is not None]
    scale = (q.shape[-1] * (1 + len(tables))) ** -0.5 if scale is None else scale
    if k is not None:
        q = torch.stack((q, *(k.unbind(1) if v is None else (k, v))), 1)
    starts = tuple(cu_seqlens.tolist())
    groups, places, _ = _groups(starts, starts, len(q), len(q), q.device)
    outs = []
    for group, qkv in zip(groups, _arrange(q, *places, groups, "length")):
        L = group.length
        index = relative_index(L, position_buckets, max_relative_positions).to(q.device)
        key_table = None if pos_key is None else pos_key.index_select(0, index).transpose(0, 1)
        query_table = None if pos_query is None else pos_query.index_select(0, index).transpose(0, 1) * scale
        queries, keys, values = qkv.permute(2, 3, 0, 1, 4).contiguous().unbind(0)
        row = group.start_q[:, None] + torch.arange(L, device=q.device)
        parts = []
        # as many heads at a time as have their scores in cache
        at_once = max(_SCORES_AT_ONCE // (group.members * L * L), 1)
        for head in torch.arange(q.shape[2], device=q.device).split(at_once):
            heads = slice(head[0], head[-1] + 1)
            scores = DisentangledScoresFunction.apply(
                queries[heads] * scale, keys[heads], *(x if x is None else x[heads] for x in (key_table, query_table))
            )
            if group.mask is not None:
                scores = scores.masked_fill_(~group.mask.transpose(0, 1), float("-inf"))
            probabilities = torch.softmax(scores, dim=-1)
            if dropout_p > 0.0:
                keep = attention_keep_mask(row, head[:, None, None], L, seed, offset, dropout_p)
                probabilities = drop(probabilities, keep, dropout_p)
            parts.append(probabilities @ values[heads])
        outs.append(torch.cat(parts).permute(1, 2, 0, 3).flatten(0, 1))
    rows = torch.cat(outs) if outs else _no_rows(q, q, pos_key, pos_query)
    return TakeFunction.apply(rows, *reversed(places))


def biased_attention(q, k, v, bias, cu_seqlens, max_seqlen, *, scale=None, dropout_p=0.0, seed=None, offset=0):
    """Attention with a learned number for each distance and head: softmax(q kᵀ · scale + bias[i - j]) v.

    q, k, v, cu_seqlens, max_seqlen, dropout and result as in `attention`; all rows ask. bias [2 * span, H]: row
    span + i - j is that of query i and key j of a sequence; span is at least `max_seqlen`. Source: Raffel et al. 2020,
    section 2.1, whose buckets the caller spreads over the distances.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    starts = tuple(cu_seqlens.tolist())
    if _runs_in_cache(q, starts):
        options = dict(scale=scale, **_drawing(dropout_p, seed, offset))
        return cpu_attention.attention(q, k, v, starts, bias=bias, **options)
    if k is not None:
        q = torch.stack((q, *(k.unbind(1) if v is None else (k, v))), 1)
    groups, places, _ = _groups(starts, starts, len(q), len(q), q.device)
    outs = []
    for group, qkv in zip(groups, _arrange(q, *places, groups, "length")):
        L = group.length
        queries, keys, values = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        position = torch.arange(L, device=q.device)
        # a group may be padded beyond the longest sequence
        distance = (position[:, None] - position + bias.shape[0] // 2).clamp(0, bias.shape[0] - 1)
        scores = queries * scale @ keys.transpose(-1, -2) + bias[distance].permute(2, 0, 1).to(q.dtype)
        if group.mask is not None:
            scores = scores.masked_fill(~group.mask, float("-inf"))
        probabilities = torch.softmax(scores, dim=-1)
        if dropout_p > 0.0:
            row, head = group.start_q[:, None] + position, torch.arange(q.shape[2], device=q.device)
            keep = attention_keep_mask(row[:, None, :], head[None, :, None], L, seed, offset, dropout_p)
            probabilities = drop(probabilities, keep, dropout_p)
        outs.append((probabilities @ values).transpose(1, 2).flatten(0, 1))
    rows = torch.cat(outs) if outs else _no_rows(q, q, bias)
    return TakeFunction.apply(rows, *reversed(places))


# elements of [H, G, L, L], for what works on several such tensors in turn; rows of L that share a product with a table
_SCORES_AT_ONCE, _RELATIVE_ROWS = 2**20, 64


@functools.lru_cache(maxsize=64)
@torch.inference_mode(False)  # what is kept may be first asked for in inference, and later for training
def relative_index(length, position_buckets, max_relative_positions):
    """int64 [2 * length - 1]: which row of a position table serves r = 1 - length, ..., length - 1.

    With `position_buckets` of 0 or -1 (DeBERTa v1) that is r itself and span is `max_relative_positions`. Otherwise
    (v2, v3) span is `position_buckets`, half of the buckets are single positions and the others widen with the
    logarithm of |r|, in float32. Counted from -span, so that r = 0 is row `span`; clamped to the table.
    """
    r = torch.arange(1 - length, length)
    span = max_relative_positions
    if position_buckets > 0:
        span, mid = position_buckets, position_buckets // 2
        far = r.abs().clamp(min=mid)
        steps = torch.log(far / mid) / torch.log(torch.tensor((max_relative_positions - 1) / mid)) * (mid - 1)
        r = torch.where(r.abs() <= mid, r, (torch.ceil(steps) + mid).long() * r.sign())
    return (r + span).clamp(0, 2 * span - 1)


class DisentangledScoresFunction(torch.autograd.Function):
    """q_i · k_j + q_i · key_table[i - j] + k_j · query_table[i - j], [H, G, L, L], for q and k [H, G, L, K].

    Tables are [H, 2 L - 1, K], from i - j = 1 - L on, or None.
    """

    @staticmethod
    def forward(ctx, q, k, key_table, query_table):
        ctx.save_for_backward(q, k, key_table, query_table)
        scores = q @ k.transpose(-1, -2)
        if key_table is not None:
            _add_relative(scores, q, key_table.flip(1))
        if query_table is not None:
            _add_relative(scores.transpose(-1, -2), k, query_table)
        return scores

    @staticmethod
    @once_differentiable
    def backward(ctx, dscores):
        q, k, key_table, query_table = ctx.saved_tensors
        dq, dk = dscores @ k, dscores.transpose(-1, -2) @ q
        dkey_table = dquery_table = None
        if key_table is not None:
            dkey_table = _relative_gradient(dscores, q, key_table.flip(1), dq).flip(1)
        if query_table is not None:
            dquery_table = _relative_gradient(dscores.transpose(-1, -2), k, query_table, dk)
        return dq, dk, dkey_table, dquery_table


def _add_relative(scores, x, table):
    """scores[i, j] += x_i · table[j - i + L - 1], for scores [H, G, L, L], x [H, G, L, K] and table [H, 2 L - 1, K]."""
    H, G, L, K = x.shape
    for rows, columns in _relative_blocks(L):
        band = x[:, :, rows].reshape(H, -1, K) @ table[:, columns].transpose(1, 2)
        scores[:, :, rows] += _skewed(band.unflatten(1, (G, -1)), L)


def _relative_gradient(dscores, x, table, dx):
    """The gradient of `table` in _add_relative; that of x is added to `dx`."""
    H, G, L, K = x.shape
    dtable = torch.zeros_like(table)
    for rows, columns in _relative_blocks(L):
        dband = x.new_zeros(H, G, rows.stop - rows.start, columns.stop - columns.start)
        _skewed(dband, L).copy_(dscores[:, :, rows])
        dband = dband.flatten(1, 2)
        dx[:, :, rows] += (dband @ table[:, columns]).unflatten(1, (G, -1))
        dtable[:, columns] += dband.transpose(1, 2) @ x[:, :, rows].reshape(H, -1, K)
    return dtable


def _relative_blocks(length):
    """Slices of rows, and of the columns of a table that they need."""
    for start in range(0, length, _RELATIVE_ROWS):
        end = min(start + _RELATIVE_ROWS, length)
        yield slice(start, end), slice(length - end, 2 * length - 1 - start)


def _skewed(band, length):
    """The view [..., R, length] of `band` [..., R, length + R - 1] in which each row begins one column further left."""
    *others, stride, _ = band.stride()
    return band.as_strided((*band.shape[:-1], length), (*others, stride - 1, 1), band.shape[-2] - 1)


def layer_norm(x, weight, bias, *, residual=None, dropout_p=0.0, seed=None, offset=0, eps=1e-12, dtype=None):
    """LayerNorm(dropout(x) + residual). x and residual [T, D]; weight and bias [D], or None for ones and zeros.

    Returns [T, D] in `dtype`, or x's. Under autocast the op of `ops.py` returns what torch's layer_norm does there,
    unless `dtype` says otherwise. Source: Ba et al. 2016; post-norm residual of Vaswani et al. 2017, section 5.4.
    """
    z = dropout(x, dropout_p, seed, offset)
    if residual is not None:
        # what dropout made is nobody else's
        z = z + residual if z is x or z.dtype != residual.dtype else z.add_(residual)
    wanted = dtype or x.dtype
    if z.dtype == wanted and all(p is None or p.dtype == wanted for p in (weight, bias)):
        return F.layer_norm(z, z.shape[-1:], weight, bias, eps)
    # statistics are fp32 inside F.layer_norm, but its result has its argument's dtype
    z = z.to(torch.promote_types(z.dtype, wanted))
    weight, bias = (None if p is None else p.to(z.dtype) for p in (weight, bias))
    return F.layer_norm(z, z.shape[-1:], weight, bias, eps).to(wanted)


def bias_gelu(x, bias, *, approximate="none"):
    """GELU(x + bias), exact (`"none"`) or `"tanh"`. x [T, F], bias [F] or None. Returns [T, F] in x's dtype.

    Source: Hendrycks & Gimpel 2016.
    """
    if bias is None:
        return F.gelu(x, approximate=approximate)
    if bias.dtype != x.dtype:
        bias = bias.to(x.dtype)
    if x.dim() == 2 and x.numel() >= _LARGE and _in_memory(x):
        return BiasGeluFunction.apply(x, bias, approximate)
    return F.gelu(x + bias, approximate=approximate)


class BiasGeluFunction(torch.autograd.Function):
    """GELU(x + bias) by blocks of rows: the sum, which stays in cache, is nowhere kept, and backward makes it again."""

    @staticmethod
    def forward(ctx, x, bias, approximate):
        ctx.save_for_backward(x, bias)
        ctx.approximate = approximate
        out = torch.empty_like(x)
        for rows in _row_blocks(x):
            torch.ops.aten.gelu_(torch.add(x[rows], bias, out=out[rows]), approximate=approximate)
        return out

    @staticmethod
    def backward(ctx, dout):
        x, bias = ctx.saved_tensors
        if torch.is_grad_enabled():
            # with create_graph=True somebody differentiates what is done here
            dx = torch.ops.aten.gelu_backward(dout, x + bias, approximate=ctx.approximate)
            return dx, dx.sum(0), None
        dx = torch.empty_like(x)
        dbias = torch.zeros_like(bias, dtype=torch.promote_types(bias.dtype, torch.float32))
        for rows in _row_blocks(x):
            # in one place, first the sum and then the gradient
            block = torch.add(x[rows], bias, out=dx[rows])
            torch.ops.aten.gelu_backward.grad_input(dout[rows], block, approximate=ctx.approximate, grad_input=block)
            dbias += block.sum(0, dtype=dbias.dtype)
        return dx, dbias.to(bias.dtype), None


# elements of a block for each thread: 1 MiB of float32 stays in most caches, and torch's GELU takes a while to begin
_BLOCK = 2**18
# elements from which blocks are worth it: less than 8 MiB of float32 may stay in cache as a whole
_LARGE = 2**21


def _row_blocks(x):
    """Slices of x's rows."""
    rows = max(_BLOCK * torch.get_num_threads() // max(x.shape[1], 1), 1)
    return [slice(start, min(start + rows, len(x))) for start in range(0, len(x), rows)]


def _in_memory(*tensors):
    """Whether these are numbers in a CPU's memory and nobody traces what is done with them."""
    return (
        all(type(x) is torch.Tensor and x.device.type == "cpu" for x in tensors)
        and not torch.compiler.is_compiling()
        and not torch._C._are_functorch_transforms_active()
    )


def gelu_layer_norm(x, bias, weight, ln_bias, *, approximate="none", eps=1e-12, dtype=None):
    """LayerNorm(GELU(x + bias)), what the masked-LM head does after its linear layer. x [T, D]; weight [D]; bias and
    ln_bias [D] or None. Returns [T, D] in `dtype`, or x's (under autocast: see layer_norm).
    """
    return layer_norm(bias_gelu(x, bias, approximate=approximate), weight, ln_bias, eps=eps, dtype=dtype)


def embedding(
    input_ids, position_ids, token_type_ids, word, position, token_type, weight, bias, *,
    padding_idx=-1, eps=1e-12, dropout_p=0.0, seed=None, offset=0, dtype=None,
):  # fmt: skip
    """dropout(LayerNorm(word[input_ids] + position[position_ids] + token_type[token_type_ids])).

    Ids int64 [T]; tables [V, D], [P, D], [types, D]; weight [D]; bias [D] or None. A table of positions or types may be
    None with its ids: such models have none. Row `padding_idx` of `word` gets no gradient (-1: every row does). Returns
    [T, D] in `dtype`, or the word table's (under autocast: see layer_norm). Source: Devlin et al. 2019, figure 2.
    """
    z = F.embedding(input_ids, word, padding_idx if padding_idx >= 0 else None)
    for ids, table in ((token_type_ids, token_type), (position_ids, position)):
        if table is not None:
            rows = F.embedding(ids, table)
            z = z.add_(rows) if rows.dtype == z.dtype else z + rows
    wanted = dtype or word.dtype
    z = layer_norm(z, weight, bias, eps=eps, dtype=torch.promote_types(word.dtype, wanted))
    return dropout(z, dropout_p, seed, offset).to(wanted)


def pooling(hidden, cu_seqlens, *, mode="mean", normalize=False, eps=1e-12, dtype=None):
    """One vector for each sequence. `mode`, by sentence-transformers' names: its first token ("cls"), its last
    ("lasttoken"), the "max" of each column, the "mean", the sum over the root of the length ("mean_sqrt_len_tokens"),
    or the mean with the weights 1, 2, 3 ... ("weightedmean").

    hidden [T, D]; sequence b owns rows cu_seqlens[b] to cu_seqlens[b+1] (int32 [B+1]); rows past the last one are not
    read and get no gradient. An empty sequence gives 0, and so does its gradient. With `normalize` each vector is
    divided by its L2 norm, or by `eps` where that is more, as F.normalize does. Of equal maxima the first gets the
    gradient, as in torch.max(dim), which sentence-transformers calls; torch.amax would share it out. Returns [B, D] in
    `dtype`, or hidden's; what is added up is added in fp32. Source: Reimers & Gurevych 2019, section 3.
    """
    starts = cu_seqlens.tolist()
    lengths = [end - start for start, end in zip(starts, starts[1:])]
    # a slice of everything would copy the gradient
    rows = hidden if starts[-1] == len(hidden) else hidden[: starts[-1]]
    rows, sizes = rows.to(torch.promote_types(hidden.dtype, torch.float32)), [1]
    match mode:
        case "cls" | "lasttoken":
            picked = starts[:-1] if mode == "cls" else [end - 1 for end in starts[1:]]
            picked = torch.tensor([row for row, n in zip(picked, lengths) if n], dtype=torch.int64, device=rows.device)
            pooled = _sums(rows.index_select(0, picked), [min(n, 1) for n in lengths])
        case "max":
            pooled = _maxima(rows, lengths)
        case "mean":
            pooled, sizes = _sums(rows, lengths), lengths
        case "mean_sqrt_len_tokens":
            pooled, sizes = _sums(rows, lengths), [n**0.5 for n in lengths]
        case "weightedmean":
            before = torch.tensor(starts[:-1], device=rows.device).index_select(0, _sequences(lengths, rows.device))
            weights = torch.arange(1, len(rows) + 1, device=rows.device) - before
            pooled, sizes = _sums(rows * weights[:, None], lengths), [n * (n + 1) / 2 for n in lengths]
        case _:
            raise ValueError(f"mode={mode!r}: expected cls, lasttoken, max, mean, mean_sqrt_len_tokens or weightedmean")
    # an empty sequence's sum is 0 already. Sizes before the norm would cancel, but for eps
    divisor = [(eps if normalize else 1) * (size or 1) for size in sizes]
    # one number for all costs less than a tensor
    divisor = divisor[0] if len(set(divisor)) == 1 else pooled.new_tensor(divisor)[:, None]
    if normalize:
        divisor = torch.linalg.vector_norm(pooled, dim=-1, keepdim=True).clamp(min=divisor)
    pooled = pooled / divisor
    return pooled.to(dtype or hidden.dtype)


def _sequences(lengths, device):
    """int64 [T]: the sequence of each row."""
    return torch.repeat_interleave(torch.tensor(lengths, dtype=torch.int64, device=device))


def _sums(rows, lengths):
    """[B, D]: the sum of each sequence's rows, 0 where it has none."""
    if lengths and min(lengths) == max(lengths) > 0:
        return rows.reshape(len(lengths), lengths[0], -1).sum(1)
    return rows.new_zeros(len(lengths), rows.shape[1]).index_add(0, _sequences(lengths, rows.device), rows)


def _maxima(rows, lengths):
    """[B, D]: the largest number in each column of a sequence, 0 where it has none."""
    if lengths and min(lengths) == max(lengths) > 0:
        return rows.reshape(len(lengths), lengths[0], -1).max(1).values
    return MaximaFunction.apply(rows, _sequences(lengths, rows.device), len(lengths))


class MaximaFunction(torch.autograd.Function):
    """The largest number in each column of each of B sequences: the first of equal ones gets the gradient.

    rows [T, D]; sequence: int64 [T], the sequence of each row. Of one without rows 0.
    """

    @staticmethod
    def forward(ctx, rows, sequence, B):
        places = sequence[:, None].expand_as(rows)
        highest = rows.new_zeros(B, rows.shape[1]).scatter_reduce_(0, places, rows, "amax", include_self=False)
        ctx.save_for_backward(rows, sequence, highest)
        return highest

    @staticmethod
    @once_differentiable
    def backward(ctx, dhighest):
        rows, sequence, highest = ctx.saved_tensors
        T = len(rows)
        # where one is NaN it is the highest, and equals nothing
        is_highest = (rows == highest.index_select(0, sequence)) | rows.isnan()
        # in a dtype that scatter_reduce is fast at, and that holds every row's number
        dtype = torch.float32 if T < 2**24 else torch.float64
        number = torch.arange(T, dtype=dtype, device=rows.device)[:, None].where(is_highest, T)
        first = number.new_full(highest.shape, T)
        first.scatter_reduce_(0, sequence[:, None].expand_as(rows), number, "amin")
        # row T: of sequences that have none
        drows = dhighest.new_zeros(T + 1, rows.shape[1]).scatter_(0, first.long(), dhighest)
        return drows[:T], None, None


# a chunk of rows, and of words in the low-memory mode, whose logits are held at once
CROSS_ENTROPY_ROWS = 1024
CROSS_ENTROPY_COLUMNS = 1024


class MaskedCrossEntropyFunction(torch.autograd.Function):
    """Loss and gradients of the picked rows in one sweep over chunks of rows, so that [M, V] is never held.

    The last chunk's share of the weight gradient, mostly all of it, waits for the backward: until then it is smaller as
    the gradient of the logits. TiledCrossEntropyFunction is the same in less memory.
    """

    @staticmethod
    def forward(ctx, hidden, weight, bias, labels, scale, max_picks, ignore_index, label_smoothing, z_loss, wants):
        picked, labels, count, spoiled, complete = _pick(labels, ignore_index, max_picks)
        V, wide = len(weight), torch.promote_types(hidden.dtype, torch.float32)
        loss_sum = torch.zeros((), dtype=wide, device=hidden.device)
        correct = torch.zeros((), dtype=torch.int64, device=hidden.device)
        dbias = loss_sum.new_zeros(V) if wants[2] else None
        dscale = torch.zeros_like(loss_sum) if wants[3] else None
        drows, earlier, last = [], None, None
        for start in range(0, len(labels), CROSS_ENTROPY_ROWS):
            chunk = slice(start, start + CROSS_ENTROPY_ROWS)
            rows, target, labelled = _labelled_rows(hidden, labels, picked, chunk, ignore_index, complete)
            logits = _logits(rows, weight, bias, scale, slice(V))
            place, inside = _place(target, 0, V)
            losses, best, dlogits, log_sum = _softmax(logits, place, inside, label_smoothing, z_loss)
            _count_in(loss_sum, correct, losses, best == target[:, None], labelled)
            if not any(wants):
                continue
            factor = 1 + 2 * z_loss * log_sum if z_loss else None
            _dlogits(dlogits, factor, place, inside, labelled, V, label_smoothing)
            if wants[2]:
                dbias += dlogits.sum(0)
            dlogits = dlogits if scale is not None else dlogits.to(rows.dtype)
            if wants[0] or wants[3]:
                drows.append(matmul(dlogits, weight.to(dlogits.dtype)).to(rows.dtype))
            if wants[3]:
                dscale += (rows * drows[-1]).sum(dtype=wide)
            last = (dlogits, rows)
            if wants[1] and chunk.stop < len(labels):
                share = _word_sums(dlogits, rows).to(wide)
                earlier = share if earlier is None else earlier.add_(share)
        if last is None:
            last = hidden.new_zeros(0, V), hidden.new_zeros(0, hidden.shape[1])
        if any(wants):
            drows = drows[0] if len(drows) == 1 else torch.cat(drows) if drows else last[1]
            ctx.save_for_backward(
                picked, spoiled, scale, drows, dbias, dscale, earlier, *(last if wants[1] else (None, None))
            )
        ctx.wants, ctx.T = wants, len(hidden)
        ctx.dtypes = weight.dtype, None if bias is None else bias.dtype
        ctx.mark_non_differentiable(count, correct)
        return loss_sum if spoiled is None else loss_sum + spoiled, count, correct

    @staticmethod
    @once_differentiable
    def backward(ctx, dloss, dcount, dcorrect):
        picked, spoiled, scale, drows, dbias, dscale, earlier, dlogits, rows = ctx.saved_tensors
        dloss, factor = _factors(dloss, spoiled, scale)
        weight_dtype, bias_dtype = ctx.dtypes
        dhidden = dweight = None
        if ctx.wants[0]:
            dhidden = _put_back((drows * factor).to(drows.dtype), picked, ctx.T)
        if ctx.wants[1]:
            # the factor goes into the smaller tensor, unless fp16 might not hold it there
            if rows.dtype == torch.float16:
                dweight = _word_sums(dlogits, rows) * factor
            else:
                dweight = _word_sums(dlogits, rows * factor.to(rows.dtype))
            dweight = (dweight if earlier is None else (earlier * factor).add_(dweight)).to(weight_dtype)
        dbias = (dbias * dloss).to(bias_dtype) if ctx.wants[2] else None
        dscale = dscale * dloss[0] if ctx.wants[3] else None
        return dhidden, dweight, dbias, None, dscale, None, None, None, None, None


class TiledCrossEntropyFunction(torch.autograd.Function):
    """The low-memory mode: tiles of rows and words, of which only each row's maximum and sum of powers are kept.

    Backward makes each tile again. Words outside, rows inside: the weight gradient is finished tile by tile.
    """

    @staticmethod
    def forward(ctx, hidden, weight, bias, labels, scale, max_picks, ignore_index, label_smoothing, z_loss, wants):
        picked, labels, count, spoiled, complete = _pick(labels, ignore_index, max_picks)
        wide = torch.promote_types(hidden.dtype, torch.float32)
        loss_sum = torch.zeros((), dtype=wide, device=hidden.device)
        correct = torch.zeros((), dtype=torch.int64, device=hidden.device)
        maxima, totals = (loss_sum.new_zeros(len(labels), 1) for _ in range(2))
        for start in range(0, len(labels), CROSS_ENTROPY_ROWS):
            chunk = slice(start, start + CROSS_ENTROPY_ROWS)
            rows, target, labelled = _labelled_rows(hidden, labels, picked, chunk, ignore_index, complete)
            losses, best, maxima[chunk], totals[chunk] = _tiled_losses(
                rows, target, weight, bias, scale, label_smoothing, z_loss
            )
            _count_in(loss_sum, correct, losses, best == target[:, None], labelled)
        if any(wants):
            ctx.save_for_backward(picked, spoiled, scale, hidden, weight, bias, labels, maxima, totals)
        ctx.options = ignore_index, label_smoothing, z_loss, wants, complete
        ctx.mark_non_differentiable(count, correct)
        return loss_sum if spoiled is None else loss_sum + spoiled, count, correct

    @staticmethod
    @once_differentiable
    def backward(ctx, dloss, dcount, dcorrect):
        picked, spoiled, scale, hidden, weight, bias, labels, maxima, totals = ctx.saved_tensors
        ignore_index, label_smoothing, z_loss, wants, complete = ctx.options
        dloss, factor = _factors(dloss, spoiled, scale)
        drows = maxima.new_zeros(len(labels), hidden.shape[1])
        dweight = torch.zeros_like(weight) if wants[1] else None
        dbias = torch.zeros_like(bias) if wants[2] else None
        for first in range(0, len(weight), CROSS_ENTROPY_COLUMNS):
            words = slice(first, first + CROSS_ENTROPY_COLUMNS)
            word_sums, bias_sums = 0, 0
            for start in range(0, len(labels), CROSS_ENTROPY_ROWS):
                chunk = slice(start, start + CROSS_ENTROPY_ROWS)
                rows, target, labelled = _labelled_rows(hidden, labels, picked, chunk, ignore_index, complete)
                dlogits = _logits(rows, weight, bias, scale, words).sub_(maxima[chunk]).exp_()
                share = 1 / totals[chunk]
                if z_loss:
                    share *= 1 + 2 * z_loss * (maxima[chunk] + totals[chunk].log())
                place, inside = _place(target, first, dlogits.shape[1])
                _dlogits(dlogits, share, place, inside, labelled, len(weight), label_smoothing)
                bias_sums += dlogits.sum(0)
                dlogits = dlogits if scale is not None else dlogits.to(rows.dtype)
                drows[chunk] += matmul(dlogits, weight[words].to(dlogits.dtype))
                if wants[1]:
                    word_sums += _word_sums(dlogits, rows).to(maxima.dtype)
            if wants[1]:
                dweight[words] = word_sums * factor
            if wants[2]:
                dbias[words] = bias_sums * dloss
        dscale = None
        if wants[3]:
            rows, *_ = _labelled_rows(hidden, labels, picked, slice(0, len(labels)), ignore_index, complete)
            dscale = (drows * rows).sum() * dloss[0]
        dhidden = _put_back(drows.mul_(factor).to(hidden.dtype), picked, len(hidden)) if wants[0] else None
        return dhidden, dweight, dbias, None, dscale, None, None, None, None, None


def _pick(labels, ignore_index, max_picks):
    """(picked, labels there, count, spoiled, complete): the rows to compute, None for all, and how many have a label.

    With max_picks the first rows with a label, and past the last of them row T, which no tensor has. spoiled is to be
    added to the loss: nothing, or NaN when some labelled rows found no room. complete: all rows there have a label, as
    with ignore_index None.
    """
    if ignore_index is None:
        return None, labels, torch.full((), len(labels), device=labels.device), None, True
    has_label = labels != ignore_index
    count = has_label.sum()
    if max_picks is not None:
        room = torch.arange(1, min(max_picks, len(labels)) + 1, device=labels.device)
        picked = torch.searchsorted(has_label.cumsum(0), room)
        spoiled = torch.zeros((), device=labels.device).masked_fill(count > len(room), float("nan"))
        labels = torch.cat((labels, labels.new_full((1,), ignore_index)))[picked]
        return picked, labels, count, spoiled, False
    # torch.compile cannot look at the count; and where most rows are picked, a constant number of them, as packed
    # batches have, is worth more than the few saved
    if torch.compiler.is_compiling():
        return None, labels, count, None, False
    if (number := int(count)) > 0.75 * len(labels):
        return None, labels, count, None, number == len(labels)
    picked = has_label.nonzero()[:, 0]
    return picked, labels[picked], count, None, True


def _labelled_rows(hidden, labels, picked, chunk, ignore_index, complete):
    """(rows, labels, which of them count) of a chunk of the picked rows; what counts nowhere is 0. None: all count."""
    rows = hidden[chunk] if picked is None else hidden[picked[chunk].clamp(max=len(hidden) - 1)]
    if complete:
        return rows, labels[chunk].long(), None
    labelled = labels[chunk] != ignore_index
    return rows.where(labelled[:, None], 0), labels[chunk].long(), labelled


def _logits(rows, weight, bias, scale, words):
    """The logits of some words, a slice, in fp32 or wider: a scale would magnify what rounding left of them."""
    wide = torch.promote_types(rows.dtype, torch.float32)
    bias = None if bias is None else bias[words]
    if scale is None:
        return matmul(rows, weight[words].t(), bias).to(wide)
    logits = matmul(rows.to(wide) * scale, weight[words].to(wide).t())
    return logits if bias is None else logits.add_(bias)


def _place(target, first, width):
    """(where the labels [rows] stand in a tile of words, int64 [rows, 1]; whether they do)."""
    target = target[:, None] - first if first else target[:, None]
    place = target.clamp(0, width - 1)
    return place, place == target


def _softmax(logits, place, inside, label_smoothing, z_loss):
    """(losses [rows, 1], best words [rows, 1], probabilities in place of the logits, log-sum-exp [rows, 1]).

    With many words each look at all logits takes as long as a part of their product.
    """
    V = logits.shape[1]
    maximum, best = logits.max(-1, keepdim=True)
    # a label that is no word leaves NaN
    at_label = logits.gather(1, place).where(inside, float("nan"))
    summed = logits.sum(-1, keepdim=True) if label_smoothing else None
    # in place where that is known to work: a CPU has read a number before it writes there
    is_here = logits.device.type == "cpu" and not torch.compiler.is_compiling()
    probabilities = torch.softmax(logits, -1, out=logits if is_here else None)
    # the best word's power is 1, so that its probability is 1 / total
    log_total = -probabilities.gather(1, best).log()
    losses = _losses(maximum, log_total, at_label, summed, V, label_smoothing, z_loss)
    return losses, best, probabilities, maximum + log_total if z_loss else None


def _losses(maximum, log_total, at_label, summed, V, label_smoothing, z_loss):
    """Losses of rows: largest logit, log of the sum of powers, the label's logit, the logits' sum; all [rows, 1].

    A power is exp(logit - maximum). Written relative to that, the loss of a row of large logits keeps its digits.
    """
    over = maximum - at_label
    if label_smoothing:
        over = (1 - label_smoothing) * over + label_smoothing * (maximum - summed / V)
    losses = over + log_total
    return losses + z_loss * (maximum + log_total).square() if z_loss else losses


def _tiled_losses(rows, target, weight, bias, scale, label_smoothing, z_loss):
    """(losses, best words, maxima, sums of powers), each [rows, 1], with one tile of logits held at a time."""
    V, wide = len(weight), torch.promote_types(rows.dtype, torch.float32)
    maximum = rows.new_full((len(rows), 1), torch.finfo(wide).min, dtype=wide)
    # a label that no tile has leaves NaN
    total, at_label, summed = torch.zeros_like(maximum), torch.full_like(maximum, float("nan")), 0
    best = torch.zeros_like(target)[:, None]
    for first in range(0, V, CROSS_ENTROPY_COLUMNS):
        logits = _logits(rows, weight, bias, scale, slice(first, first + CROSS_ENTROPY_COLUMNS))
        top, word = logits.max(-1, keepdim=True)
        place, inside = _place(target, first, logits.shape[1])
        at_label = logits.gather(1, place).where(inside, at_label)
        if label_smoothing:
            summed = summed + logits.sum(-1, keepdim=True)
        best = torch.where(top > maximum, first + word, best)
        before, maximum = maximum, torch.maximum(maximum, top)
        total = total * (before - maximum).exp() + logits.sub_(maximum).exp_().sum(-1, keepdim=True)
    losses = _losses(maximum, total.log(), at_label, summed, V, label_smoothing, z_loss)
    return losses, best, maximum, total


def _count_in(loss_sum, correct, losses, right, labelled):
    """Add the rows [rows, 1] that count to both sums."""
    if labelled is not None:
        losses, right = losses.masked_fill(~labelled[:, None], 0), right & labelled[:, None]
    loss_sum += losses.sum()
    correct += right.sum()


def _dlogits(powers, factor, place, inside, labelled, V, label_smoothing):
    """Make of a tile of powers, of V words in all, the gradient of its logits, in place.

    factor [rows, 1] makes them probabilities, and what z_loss wants; None: that is what they are.
    """
    if labelled is not None:
        labelled = labelled[:, None].to(powers.dtype)
        factor = labelled if factor is None else factor * labelled
    if factor is not None:
        powers.mul_(factor)
    if label_smoothing:
        powers.sub_(label_smoothing / V if labelled is None else label_smoothing / V * labelled)
    at_label = inside.to(powers.dtype).mul_(label_smoothing - 1)
    powers.scatter_add_(1, place, at_label if labelled is None else at_label.mul_(labelled))


def _word_sums(dlogits, rows):
    """dlogitsᵀ rows. In fp16, whose largest number a sum over thousands of rows may pass, as fp32."""
    if rows.dtype == torch.float16:
        dlogits, rows = dlogits.float(), rows.float()
    return matmul(dlogits.t(), rows.to(dlogits.dtype))


def _factors(dloss, spoiled, scale):
    # of one dimension: in a product with halves, a tensor of none would first be rounded to them
    dloss = (dloss if spoiled is None else dloss + spoiled).reshape(1)
    return dloss, dloss if scale is None else dloss * scale


def _put_back(drows, picked, T):
    if picked is None:
        return drows
    # one row more, for places that hold none
    return drows.new_zeros(T + 1, drows.shape[1]).index_copy_(0, picked, drows)[:T]


def _cross_entropy(hidden, weight, bias, labels, scale, max_picks, ignore_index, label_smoothing, z_loss, low_memory):
    # asked here: inside a Function gradients look disabled, and needs_input_grad knows nothing of no_grad
    enabled = torch.is_grad_enabled()
    wants = [enabled and x is not None and x.requires_grad for x in (hidden, weight, bias, scale)]
    function = TiledCrossEntropyFunction if low_memory else MaskedCrossEntropyFunction
    return function.apply(hidden, weight, bias, labels, scale, max_picks, ignore_index, label_smoothing, z_loss, wants)


def masked_cross_entropy(
    hidden, weight, bias, labels, *,
    ignore_index=-100, label_smoothing=0.0, z_loss=0.0, max_picks=None, low_memory=False,
):  # fmt: skip
    """Cross-entropy of `hidden @ weightᵀ + bias` against `labels`, over the rows whose label is not `ignore_index`.

    hidden [M, D], weight [V, D], bias [V] or None, labels [M] int64 or int32, in 0 .. V - 1 or `ignore_index` (anything
    else makes the loss NaN). Returns `(loss_sum, count, correct)`, 0-dimensional: the sum of the losses (fp32, natural
    log), how many rows had a label, and how many of those were predicted right (int64; of equal logits the first is the
    prediction). No row with a label gives 0, 0, 0 and zero gradients.

    label_smoothing: as in F.cross_entropy. z_loss: adds this times the square of the log-sum-exp to each row's loss.
    max_picks: the rows with a label are gathered into this many places, a number that no data changes, so that others
    cost nothing; if they are more, loss and gradients are NaN. low_memory: a tile of logits is all that is ever held,
    and the backward computes it again.
    """
    return _cross_entropy(
        hidden, weight, bias, labels, None, max_picks, ignore_index, label_smoothing, z_loss, low_memory
    )


def contrastive_cross_entropy(
    query, document, labels=None, *, scale=1.0, symmetric=False, ignore_index=-100, low_memory=False
):
    """InfoNCE: the cross-entropy of `scale * query @ documentᵀ` over the documents, without keeping the scores.

    query [B, D], document [N, D]; labels int64 [B]: the row of the document that belongs to each query, or
    `ignore_index`; None: 0 .. B - 1. Every other document, of the batch or a hard negative, is a negative. scale: the
    inverse temperature, a number or a 0-dimensional tensor, which gets a gradient. symmetric: the mean of this and of
    the cross-entropy from each query's own document to all queries that have a label. Returns `(loss_sum, count,
    correct)`: the sum of the losses (fp32), how many queries have a label, and how many of those score their own
    document highest.
    """
    wide = torch.promote_types(query.dtype, torch.float32)
    if not isinstance(scale, torch.Tensor):
        scale = torch.full((), scale, dtype=wide, device=query.device)
    scale, absent = scale.to(wide), None
    everyone = labels is None
    if everyone:
        labels, ignore_index = torch.arange(len(query), device=query.device), None
    forward = _cross_entropy(query, document, None, labels, scale, None, ignore_index, 0.0, 0.0, low_memory)
    if not symmetric:
        return forward
    if everyone:
        own, targets = document[: len(query)], labels
    else:
        picked = labels != ignore_index
        targets = torch.arange(len(query), device=query.device).masked_fill(~picked, -1)
        # a query without a label is nobody's negative
        own, query = document[labels.masked_fill(~picked, 0)], query.masked_fill(~picked[:, None], 0.0)
        absent = scale.new_zeros(len(query)).masked_fill(~picked, -float("inf"))
    backward = _cross_entropy(own, query, absent, targets, scale, None, None if everyone else -1, 0.0, 0.0, low_memory)
    return (forward[0] + backward[0]) / 2, *forward[1:]
