"""Attention on a CPU: long sequences in cache, here; short ones in padded groups, see groups.py.

    p = softmax(scale q kᵀ + bias),  out = drop(p) v                                               forward
    dv = drop(p)ᵀ dout,  dp = drop(dout vᵀ),  ds = p (dp - Σ dp p),  dq, dk = scale ds k, scale dsᵀ q   backward

In cache: one sequence at a time, and so few of its heads that their scores stay in a core's cache from the first
product to the last. Softmax and its gradient work in place. Sequences are read from the packed tensors, and gradients
are written to them, directly: no gathering, no padding. p is saved for backward up to S = 4 K, where it is no larger
than q, k, v and the result together. For longer sequences the backward computes it again.

Letters: T packed tokens, H heads, K head size, S a sequence's length, L the longest length, G heads at a time.
"""

import functools
from itertools import pairwise

import torch

from .. import reference
from .autograd import derivatives, in_memory, runs_by_autograd
from .dropout import attention_keep_mask
from .groups import in_groups, uniform, with_backward
from .libraries import LEAST, prefers_onednn, share_saved
from .matmul import OVERHEAD, bmm, candidates

# scores at a time per thread: 1 MiB of float32
_SCORES = 2**18


def attention(
    q, k, v, cu_seqlens, max_seqlen, *,
    cu_seqlens_q=None, max_seqlen_q=None, scale=None, dropout_p=0.0, window=None, seed=None, offset=0,
):  # fmt: skip
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if k is not None and k.shape[-2] < q.shape[-2]:
        q, k, v = reference.with_all_heads(*reference.apart(q, k, v))
    starts = tuple(cu_seqlens.tolist())
    options = dict(scale=scale, dropout_p=dropout_p, seed=seed, offset=offset)
    if window is not None and max_seqlen - 1 <= window:
        # every token sees all of its sequence
        window = None
    if cu_seqlens_q is None and window is None:
        is_uniform = dropout_p == 0.0 and _is_uniform(starts, len(q))
        is_short = is_uniform and starts[1] ** 2 * q.shape[-1] < LEAST
        kind = "attention-uniform" if is_uniform else "attention" + "-dropout" * (dropout_p > 0.0)
        if not is_short and _runs_in_cache(kind, q, starts):
            return in_cache(q, k, v, starts, **options)
        if is_uniform:
            return uniform(q, k, v, len(starts) - 1, scale)
    starts_q = starts if cu_seqlens_q is None else tuple(cu_seqlens_q.tolist())
    return in_groups(q, k, v, starts, starts_q=starts_q, window=window, **options)


def biased_attention(q, k, v, bias, cu_seqlens, max_seqlen, *, scale=None, dropout_p=0.0, seed=None, offset=0):
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    starts = tuple(cu_seqlens.tolist())
    kind = "attention-bias" + "-dropout" * (dropout_p > 0.0)
    run = in_cache if _runs_in_cache(kind, q, starts) else in_groups
    return run(q, k, v, starts, bias=bias, scale=scale, dropout_p=dropout_p, seed=seed, offset=offset)


def _runs_in_cache(kind, q, starts):
    """Whether long sequences are faster in cache than in groups, where torch's fused attention may run. kind: see
    `_candidates`."""
    # shorter sequences are faster in padded groups, because each library call has an overhead
    if not starts[-1] >= 64 * (len(starts) - 1) > 0 or not in_memory(q):
        return False
    is_bf16 = q.dtype == torch.bfloat16
    if q.dtype != torch.float32 and not is_bf16:
        return q.dtype == torch.float64
    if is_bf16 and "-bias" in kind:
        # a bias's gradient is a long sum
        return False
    # always with the backward: activation checkpointing runs the forward without gradients first, and then again
    kind += "-bf16" * is_bf16 + "-backward"
    length = starts[-1] // (len(starts) - 1)
    # in bf16 the first of the two is what older checkpoints ran: groups
    return is_bf16 != prefers_onednn(kind, (min(q.shape[-2], 4), length, length, q.shape[-1]), _candidates)


# multiply-adds of attention without gradients and with, in units of pairs * width
_PRODUCTS = 2, 7


@functools.lru_cache(maxsize=4096)
def pays(pairs, places, width, wants_gradients, threads):
    """Whether packing another's padded batch for attention alone, and unpacking it, costs less than it saves: `pairs`
    of a query and a key are left of `places`. threads: torch's, which the answer depends on."""
    if pairs == places:
        return False
    rows = -(-places // width)
    seconds, _ = share_saved("forward", (rows, width, width), candidates)
    return _PRODUCTS[wants_gradients] * seconds * (1 - pairs / places) > OVERHEAD[wants_gradients]


def _wants_gradients(*tensors):
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def _candidates(kind, sizes):
    """Attention of one sequence in cache and in a group, as functions; for `prefers_onednn`. In bf16 the other way
    round.

    kind: "attention", with what is in the call: -bias, -dropout, -bf16, -uniform where all have one length; -backward.
    """
    H, S, _, K = sizes
    dtype = torch.bfloat16 if "-bf16" in kind else torch.float32
    q, options = torch.ones(S, 3, H, K, dtype=dtype, requires_grad=True), dict(scale=K**-0.5)
    if "-bias" in kind:
        options["bias"] = torch.zeros(2 * S, H)
    if "-dropout" in kind:
        options |= dict(dropout_p=0.1, seed=torch.zeros(1, dtype=torch.int64))

    def call(run):
        def forward():
            return run(q, None, None, (0, S), **options)

        return with_backward(forward, (q,))

    def alike(q, k, v, starts, *, scale):
        return uniform(q, k, v, 1, scale)

    both = call(in_cache), call(alike if "-uniform" in kind else in_groups)
    return both[::-1] if "-bf16" in kind else both


@functools.lru_cache(maxsize=4)
def _is_uniform(starts, rows):
    """Whether all sequences have the same length and all rows belong to them."""
    length = starts[1] if len(starts) > 1 else 0
    return length > 0 and starts[-1] == rows and starts == tuple(range(0, rows + 1, length))


def in_cache(q, k, v, starts, *, bias=None, scale, dropout_p=0.0, seed=None, offset=0):
    """softmax(q kᵀ · scale + bias) v within each sequence, for CPU tensors with as many query rows as keys.

    q, k, v in the three packings of `reference.attention`. starts: B + 1 ints, the first row of each sequence. bias
    [2 * span, H] or None: see `reference.biased_attention`. Returns [T, H, K].
    """
    inputs, options = (q, k, v, bias), (starts, scale, dropout_p, seed, offset)
    if _wants_gradients(*inputs):
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
        if runs_by_autograd(dout):
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
    for rows, heads, biases, _ in _parts(q.shape[1], starts, bias, q.dtype):
        p, keep = _probabilities(_part(q, rows, heads) * scale, _part(k, rows, heads), biases), None
        if dropout_p > 0.0:
            row, head = torch.arange(rows.start, rows.stop), torch.arange(heads.start, heads.stop)
            keep = attention_keep_mask(row, head[:, None], len(row), seed, offset, dropout_p).view(torch.uint8)
        if kept is not None:
            kept += p if p.shape[2] <= 4 * q.shape[2] else None, keep
        _part(out, rows, heads).copy_(bmm(_dropped(p, keep, keep_scale), _part(v, rows, heads)))
    return out


def _backward(dout, q, k, v, bias, kept, wants, starts, scale, dropout_p, seed, offset):
    """The gradients of q, k, v (packed as they are) and bias; None for those not in `wants`."""
    gradients = [torch.empty_like(x) if want else None for x, want in zip((q, k, v), wants)]
    for x in gradients:
        if x is not None:
            x[starts[-1] :] = 0
    dbias = torch.zeros_like(bias) if wants[3] else None
    q, k, v = _apart(q, k, v)
    dq, dk, dv = _apart(*gradients)
    keep_scale = reference.keep_scale(dropout_p)
    for rows, heads, biases, dbiases in _parts(q.shape[1], starts, bias, q.dtype, dbias):
        queries, keys, values, douts = (_part(x, rows, heads) for x in (q, k, v, dout))
        queries, p, keep = queries * scale, next(kept), next(kept)
        p = _probabilities(queries, keys, biases) if p is None else p
        if dv is not None:
            _part(dv, rows, heads).copy_(bmm(_dropped(p, keep, keep_scale).transpose(1, 2), douts))
        ds = _dropped(bmm(douts, values.transpose(1, 2)), keep, keep_scale)
        # p and ds may come from different libraries
        if p.stride() != ds.stride():
            p = torch.empty_like(ds).copy_(p)
        torch.ops.aten._softmax_backward_data.out(_plain(ds), _plain(p), -1, p.dtype, grad_input=_plain(ds))
        if dbiases is not None:
            dbiases.add_(ds)
        if dq is not None:
            torch.mul(bmm(ds, keys), scale, out=_part(dq, rows, heads))
        if dk is not None:
            _part(dk, rows, heads).copy_(bmm(ds.transpose(1, 2), queries))
    return *gradients, dbias


def _parts(H, starts, bias, dtype, dbias=None):
    """Yields the parts to compute one after another: (slice of rows, slice of heads, biases [G, S, S], where to add
    their gradient). `dbias`, if given, has its values after the last part."""
    L = _longest(starts)
    # few heads with a bias, so that its table stays in cache while all sequences use it
    together = H if bias is None else 4 * _at_once(L)
    for first in range(0, H, together):
        group = slice(first, min(first + together, H))
        table = dtable = None
        if bias is not None:
            # [heads, L, 2 L - 1]: the biases of i - j = L - 1 down to 1 - L, L times
            table = _distances(bias, group, L).to(dtype).flip(1)[:, None].expand(-1, L, -1).contiguous()
            dtable = None if dbias is None else torch.zeros_like(table)
        for start, end in pairwise(starts):
            if start == end:
                continue
            at_once = _at_once(end - start)
            for head in range(first, group.stop, at_once):
                heads = slice(head, min(head + at_once, group.stop))
                corners = (_corner(x, head - first, heads.stop - first, end - start) for x in (table, dtable))
                yield slice(start, end), heads, *corners
        if dbias is not None:
            _distances(dbias, group, L).copy_(dtable.sum(1).flip(1))


def _at_once(length):
    """The number of heads whose scores fit in cache."""
    return max(_SCORES * torch.get_num_threads() // length**2, 1)


def _longest(starts):
    return max(end - start for start, end in pairwise(starts))


def _distances(bias, heads, L):
    """A view [heads, 2 L - 1] of the distances that occur, from i - j = 1 - L on."""
    span = bias.shape[0] // 2
    return bias[span - L + 1 : span + L, heads].t()


def _corner(table, first, last, S):
    """A view [G, S, S] of a table with the bias of i - j at [i, j]: each row starts one element further left."""
    if table is None:
        return None
    L, width = table.shape[1:]
    own = table[first:last]
    return own.as_strided((len(own), S, S), (L * width, width - 1, 1), own.storage_offset() + L - 1)


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
    scores = bmm(q, k.transpose(1, 2))
    if biases is not None:
        scores += biases
    torch.softmax(_plain(scores), -1, out=_plain(scores))
    return scores


def _plain(x):
    """x [G, M, N], or transposed to [M, G, N] if it lies like that in memory: some functions copy other layouts."""
    return x if x.is_contiguous() else x.transpose(0, 1)


def _dropped(x, keep, scale):
    # bytes: torch converts them with vector instructions, booleans without
    return x if keep is None else (x * keep.to(x.dtype)).mul_(scale)
