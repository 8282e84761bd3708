"""Attention on a CPU, computed in cache or, short sequences, in padded groups.

    p = softmax(scale q kᵀ + bias),  out = drop(p) v                                               forward
    dv = drop(p)ᵀ dout,  dp = drop(dout vᵀ),  ds = p (dp - Σ dp p),  dq, dk = scale ds k, scale dsᵀ q   backward

In cache: one sequence at a time, and so few of its heads that their scores stay in a core's cache from the first
product to the last. Softmax and its gradient work in place. Sequences are read from the packed tensors, and gradients
are written to them, directly: no gathering, no padding. p is saved for backward up to S = 4 K, where it is no larger
than q, k, v and the result together. For longer sequences the backward computes it again.

Letters: T packed tokens, H heads, K head size, S a sequence's length, G heads at a time.
"""

import functools
from dataclasses import replace

import torch

from .. import reference
from .derivatives import derivatives
from .dropout import attention_keep_mask, drop, in_memory
from .groups import TakeFunction, arrange, attend, groups, no_rows, window_mask

# scores at a time per thread: 1 MiB of float32
_SCORES = 2**18
# below so many multiply-adds per matrix oneDNN's set-up costs more than it saves
_ONEDNN_SIZE = 2**20


def attention(
    q, k, v, cu_seqlens, max_seqlen, *,
    cu_seqlens_q=None, max_seqlen_q=None, scale=None, dropout_p=0.0, window=None, seed=None, offset=0,
):  # fmt: skip
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    starts = tuple(cu_seqlens.tolist())
    options = dict(scale=scale, dropout_p=dropout_p, seed=seed, offset=offset)
    if cu_seqlens_q is None and window is None:
        is_uniform = dropout_p == 0.0 and _is_uniform(starts, len(q))
        if _runs_in_cache(q, starts) and not (is_uniform and starts[1] ** 2 * q.shape[-1] < _ONEDNN_SIZE):
            return in_cache(q, k, v, starts, **options)
        if is_uniform:
            return uniform(q, k, v, len(starts) - 1, scale)
    starts_q = starts if cu_seqlens_q is None else tuple(cu_seqlens_q.tolist())
    return in_groups(q, k, v, starts_q, starts, window=window, **options)


def biased_attention(q, k, v, bias, cu_seqlens, max_seqlen, *, scale=None, dropout_p=0.0, seed=None, offset=0):
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    starts = tuple(cu_seqlens.tolist())
    run = in_cache if _runs_in_cache(q, starts) else biased_in_groups
    return run(q, k, v, starts, bias=bias, scale=scale, dropout_p=dropout_p, seed=seed, offset=offset)


def _runs_in_cache(q, starts):
    # shorter sequences are faster in padded groups, because each library call has an overhead
    return starts[-1] >= 64 * (len(starts) - 1) > 0 and q.dtype in (torch.float32, torch.float64) and in_memory(q)


@functools.lru_cache(maxsize=4)
def _is_uniform(starts, rows):
    """Whether all sequences have the same length and all rows belong to them."""
    length = starts[1] if len(starts) > 1 else 0
    return length > 0 and starts[-1] == rows and starts == tuple(range(0, rows + 1, length))


# --------------------------------------------------------------------------------------------------- padded groups


def uniform(q, k, v, B, scale):
    """Attention of B sequences of one length, without gathering: that would take a small batch as long as the rest."""
    padded = (x.view(B, len(x) // B, *x.shape[1:]).transpose(1, 2) for x in _apart(q, k, v))
    return attend(*padded, scale, None, None, 0.0).transpose(1, 2).reshape(len(q), *q.shape[-2:])


def in_groups(q, k, v, starts_q, starts, *, scale, window=None, dropout_p=0.0, seed=None, offset=0):
    """Attention of any sequences. starts_q, starts: B + 1 ints, the first row of each sequence in q and in k."""
    if v is not None:
        k = torch.stack((k, v), 1)
    batches, place_q, place_k = groups(starts_q, starts, len(q), len(q) if k is None else len(k), q.device)
    if k is None:
        grouped = (x.permute(2, 0, 3, 1, 4).unbind(0) for x in arrange(q, *place_q, batches, "length"))
    else:
        queries = (x.transpose(1, 2) for x in arrange(q, *place_q, batches, "length_q"))
        pairs = (x.permute(2, 0, 3, 1, 4).unbind(0) for x in arrange(k, *place_k, batches, "length"))
        grouped = ((x, *pair) for x, pair in zip(queries, pairs))
    if window is not None:
        batches = [replace(group, mask=window_mask(group, window)) for group in batches]
    outs = []
    for group, (queries, keys, values) in zip(batches, grouped):
        keep = None
        if dropout_p > 0.0:
            row = group.start_q[:, None] + torch.arange(group.length_q, device=q.device)
            head = torch.arange(queries.shape[1], device=q.device)
            keep = attention_keep_mask(row[:, None, :], head[None, :, None], group.length, seed, offset, dropout_p)
        out = attend(queries, keys, values, scale, group.mask, keep, dropout_p)
        outs.append(out.transpose(1, 2).flatten(0, 1))
    rows = torch.cat(outs) if outs else no_rows(q, q, k)
    return TakeFunction.apply(rows, *reversed(place_q))


def biased_in_groups(q, k, v, starts, *, bias, scale, dropout_p=0.0, seed=None, offset=0):
    """Attention of any sequences with a bias per distance."""
    if k is not None:
        q = torch.stack((q, *(k.unbind(1) if v is None else (k, v))), 1)
    batches, places, _ = groups(starts, starts, len(q), len(q), q.device)
    outs = []
    for group, qkv in zip(batches, arrange(q, *places, batches, "length")):
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
    rows = torch.cat(outs) if outs else no_rows(q, q, bias)
    return TakeFunction.apply(rows, *reversed(places))


# --------------------------------------------------------------------------------------------------------- in cache


def in_cache(q, k, v, starts, *, bias=None, scale, dropout_p=0.0, seed=None, offset=0):
    """softmax(q kᵀ · scale + bias) v within each sequence, for CPU tensors with as many query rows as keys.

    q, k, v in the three packings of `reference.attention`. starts: B + 1 ints, the first row of each sequence. bias
    [2 * span, H] or None: see `reference.biased_attention`. Returns [T, H, K].
    """
    inputs, options = (q, k, v, bias), (starts, scale, dropout_p, seed, offset)
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs):
        return InCacheFunction.apply(*inputs, options)
    return _forward(*inputs, *options)


class InCacheFunction(torch.autograd.Function):
    """`in_cache` with its backward."""

    @staticmethod
    def forward(ctx, q, k, v, bias, options):
        kept = []
        out = _forward(q, k, v, bias, *options, kept)
        ctx.save_for_backward(q, k, v, bias, *kept)
        ctx.options = options
        return out

    @staticmethod
    def backward(ctx, dout):
        q, k, v, bias, *kept = ctx.saved_tensors
        if torch.is_grad_enabled():
            return *derivatives(functools.partial(_meaning, options=ctx.options), (q, k, v, bias), dout), None
        with torch.autocast("cpu", enabled=False):
            return *_backward(dout, q, k, v, bias, iter(kept), ctx.needs_input_grad, *ctx.options), None


def _meaning(q, k, v, bias, options):
    starts, scale, dropout_p, seed, offset = options
    options = dict(scale=scale, dropout_p=dropout_p, seed=seed, offset=offset)
    sequences = torch.tensor(starts), _longest(starts)
    if bias is None:
        return reference.attention(q, k, v, *sequences, **options)
    return reference.biased_attention(q, k, v, bias, *sequences, **options)


def _forward(q, k, v, bias, starts, scale, dropout_p, seed, offset, kept=None):
    """[T, H, K]. If `kept` is a list, each part's p and dropout mask, or None, are appended to it for backward."""
    out = q.new_empty(len(q), *q.shape[-2:])
    out[starts[-1] :] = 0
    q, k, v = _apart(q, k, v)
    keep_scale = reference.keep_scale(dropout_p)
    for together in _heads(q.shape[1], starts, bias):
        table = _table(bias, together, starts, q.dtype)
        for rows, heads in _parts(starts, together):
            biases = _corner(table, together, rows, heads)
            p, keep = _probabilities(_part(q, rows, heads) * scale, _part(k, rows, heads), biases), None
            if dropout_p > 0.0:
                row, head = torch.arange(rows.start, rows.stop), torch.arange(heads.start, heads.stop)
                keep = attention_keep_mask(row, head[:, None], len(row), seed, offset, dropout_p).view(torch.uint8)
            if kept is not None:
                kept += p if _is_kept(p, q) else None, keep
            _part(out, rows, heads).copy_(_product(_dropped(p, keep, keep_scale), _part(v, rows, heads)))
    return out


def _backward(dout, q, k, v, bias, kept, wants, starts, scale, dropout_p, seed, offset):
    """The gradients of q, k, v (packed as they are) and bias; None for those not in `wants`."""
    gradients = [torch.empty_like(x) if want else None for x, want in zip((q, k, v), wants)]
    for x in gradients:
        if x is not None:
            x[starts[-1] :] = 0
    dbias = torch.zeros_like(bias) if wants[3] else None
    q, k, v = _apart(q, k, v)
    keep_scale = reference.keep_scale(dropout_p)
    dq, dk, dv = _apart(*gradients)
    for together in _heads(q.shape[1], starts, bias):
        table = _table(bias, together, starts, q.dtype)
        dtable = None if dbias is None else torch.zeros_like(table)
        for rows, heads in _parts(starts, together):
            queries, keys, values, douts = (_part(x, rows, heads) for x in (q, k, v, dout))
            queries, p, keep = queries * scale, next(kept), next(kept)
            p = _probabilities(queries, keys, _corner(table, together, rows, heads)) if p is None else p
            if dv is not None:
                _part(dv, rows, heads).copy_(_product(_dropped(p, keep, keep_scale).transpose(1, 2), douts))
            ds = _dropped(_product(douts, values.transpose(1, 2)), keep, keep_scale)
            # p and ds may come from different libraries
            if p.stride() != ds.stride():
                p = torch.empty_like(ds).copy_(p)
            torch.ops.aten._softmax_backward_data.out(_plain(ds), _plain(p), -1, p.dtype, grad_input=_plain(ds))
            if dtable is not None:
                _corner(dtable, together, rows, heads).add_(ds)
            if dq is not None:
                torch.mul(_product(ds, keys), scale, out=_part(dq, rows, heads))
            if dk is not None:
                _part(dk, rows, heads).copy_(_product(ds.transpose(1, 2), queries))
        if dbias is not None:
            _distances(dbias, together, starts).copy_(dtable.sum(1).flip(1))
    return *gradients, dbias


def _heads(H, starts, bias):
    """Slices of heads. With a bias they are so few that its table stays in cache while all sequences use it."""
    at_once = H if bias is None else 4 * _at_once(_longest(starts))
    return [slice(head, min(head + at_once, H)) for head in range(0, H, at_once)]


def _parts(starts, together):
    """Yields (slice of rows, slice of heads): the parts to compute one after another."""
    for start, end in zip(starts, starts[1:]):
        if start < end:
            at_once = _at_once(end - start)
            for head in range(together.start, together.stop, at_once):
                yield slice(start, end), slice(head, min(head + at_once, together.stop))


def _at_once(length):
    """The number of heads whose scores fit in cache."""
    return max(_SCORES * torch.get_num_threads() // length**2, 1)


def _longest(starts):
    return max(end - start for start, end in zip(starts, starts[1:]))


def _is_kept(p, q):
    return p.shape[2] <= 4 * q.shape[2]


def _part(x, rows, heads):
    """[G, S, K] of x [T, H, K]."""
    return x[rows, heads].transpose(0, 1)


def _apart(q, k, v):
    """q, k and v, each [T, H, K], from any packing; None for those that are absent."""
    if q is not None and q.dim() == 4:
        return q.unbind(1)
    return q, *(k.unbind(1) if k is not None and k.dim() == 4 else (k, v))


def _probabilities(q, k, biases):
    """softmax(q kᵀ + biases), [G, S, S]."""
    scores = _product(q, k.transpose(1, 2))
    if biases is not None:
        scores += biases
    torch.softmax(_plain(scores), -1, out=_plain(scores))
    return scores


def _product(a, b):
    """a [G, M, C] @ b [G, C, N] by the faster of torch's two CPU libraries: see matmul.py.

    Python can only call oneDNN's batched product as a 1 x 1 convolution with G groups, whose pixels are the rows of
    `a`; if b is stored by rows, as its transpose. The result lies in memory as [M, G, N].
    """
    G, M, C = a.shape
    N = b.shape[2]
    if G > 1 and a.stride(2) != 1 or not _prefers_onednn(a, M * C * N):
        return torch.bmm(a, b)
    pixels = (a[0].contiguous() if G == 1 else a.transpose(0, 1)).reshape(1, 1, M, G * C).permute(0, 3, 1, 2)
    if b.stride(2) == 1:
        weight = b.reshape(G * C, N, 1, 1)
        out = torch.ops.mkldnn._convolution_transpose_pointwise(
            pixels, weight, None, [0, 0], [0, 0], [1, 1], [1, 1], G, "none", [], ""
        )
    else:
        weight = b.transpose(1, 2).reshape(G * N, C, 1, 1)
        out = torch.ops.mkldnn._convolution_pointwise(pixels, weight, None, [0, 0], [1, 1], [1, 1], G, "none", [], "")
    return out.view(G, N, M).transpose(1, 2)


def _prefers_onednn(a, size):
    return (
        size >= _ONEDNN_SIZE
        and a.dtype == torch.float32
        and torch.backends.mkldnn.is_available()
        and torch.backends.mkldnn.enabled
        and hasattr(torch.ops.mkldnn, "_convolution_transpose_pointwise")
    )


def _plain(x):
    """x [G, M, N], or transposed to [M, G, N] if it lies like that in memory: some functions copy other layouts."""
    return x if x.is_contiguous() else x.transpose(0, 1)


def _dropped(x, keep, scale):
    # bytes: torch converts them with vector instructions, booleans without
    return x if keep is None else (x * keep.to(x.dtype)).mul_(scale)


def _table(bias, together, starts, dtype):
    """[heads, L, 2 L - 1], L the longest length: the biases of i - j = L - 1 down to 1 - L, L times; or None."""
    if bias is None:
        return None
    distances = _distances(bias, together, starts).to(dtype).flip(1)
    return distances[:, None].expand(-1, _longest(starts), -1).contiguous()


def _distances(bias, together, starts):
    """A view [heads, 2 L - 1] of the distances that occur, from i - j = 1 - L on."""
    L, span = _longest(starts), bias.shape[0] // 2
    return bias[span - L + 1 : span + L, together].t()


def _corner(table, together, rows, heads):
    """A view [G, S, S] of a table with the bias of i - j at [i, j]: each row starts one element further left."""
    if table is None:
        return None
    S, L, width = rows.stop - rows.start, *table.shape[1:]
    own = table[heads.start - together.start : heads.stop - together.start]
    return own.as_strided((len(own), S, S), (L * width, width - 1, 1), own.storage_offset() + L - 1)
