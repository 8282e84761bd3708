"""Bands of relative positions: the table rows for a tile's distances, and the shift between them and the scores.

disentangled_attention.py explains them. Letters: M queries and N keys of a tile, K head size.
"""

from concurrent.futures import ThreadPoolExecutor

import torch
import triton
import triton.language as tl

from ._attention import opaque_zero, probabilities
from ._math import attention_keep_mask


@triton.jit
def _load_band(
    table_ptr, stride, index_ptr, first,
    K: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_K: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """[BLOCK_W, BLOCK_K]: the rows of a position table for BLOCK_W distances, from entry `first` of the index on."""
    offs_k = tl.arange(0, BLOCK_K)
    rows = tl.load(index_ptr + first + tl.arange(0, BLOCK_W))
    pointers = table_ptr + rows.to(tl.int64)[:, None] * stride + offs_k[None, :]
    x = tl.load(pointers) if K == BLOCK_K else tl.load(pointers, mask=offs_k[None, :] < K, other=0.0)
    return x.to(tl.float32) if UPCAST else x


@triton.jit
def load_bands(
    pos_key_ptr, stride_pkp, pos_query_ptr, stride_pqp, index_ptr, first,
    HAS_KEY: tl.constexpr, HAS_QUERY: tl.constexpr, UPCAST: tl.constexpr,
    K: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The bands of both tables. If one is absent, the other takes its place."""
    if HAS_KEY:
        key_band = _load_band(pos_key_ptr, stride_pkp, index_ptr, first, K, BLOCK_W, BLOCK_K, UPCAST)
        query_band = key_band
    if HAS_QUERY:
        query_band = _load_band(pos_query_ptr, stride_pqp, index_ptr, first, K, BLOCK_W, BLOCK_K, UPCAST)
        if not HAS_KEY:
            key_band = query_band
    if not (HAS_KEY or HAS_QUERY):
        key_band = 0
        query_band = 0
    return key_band, query_band


@triton.jit
def _flat(x, R: tl.constexpr, C: tl.constexpr):
    """x [R, C] as [R * C]: element (r, c) at index c // 8 * 8 R + 8 r + c % 8."""
    return tl.reshape(tl.permute(tl.reshape(x, [R, C // 8, 8]), [1, 0, 2]), [R * C])


@triton.jit
def _beside(left, right, BLOCK: tl.constexpr):
    """[BLOCK, 2 BLOCK] of two [BLOCK, BLOCK]."""
    return tl.reshape(tl.permute(tl.join(left, right), [0, 2, 1]), [BLOCK, 2 * BLOCK])


@triton.jit
def _below(upper, lower, BLOCK: tl.constexpr):
    """[2 BLOCK, BLOCK] of two [BLOCK, BLOCK]."""
    return tl.reshape(tl.permute(tl.join(upper, lower), [2, 0, 1]), [2 * BLOCK, BLOCK])


@triton.jit
def _pick(x, row, low, high, R: tl.constexpr, C: tl.constexpr, M: tl.constexpr, N: tl.constexpr):
    """[M, N]: elements (row, low + 8 high) of x [R, C]. row, low, high broadcast to [M, N // 8, 8] of columns 8 n + c.

    If low depends on rows and c, high on n, and row on one of them, most addresses are a register plus a constant.
    """
    place = (low >> 3) * (8 * R) + (low & 7) + high * (8 * R) + row * 8
    place = tl.broadcast_to(place, [M, N // 8, 8])
    return tl.reshape(tl.gather(_flat(x, R, C), tl.reshape(place, [M * N]), 0), [M, N])


@triton.jit
def scores(
    q, k, key_band, query_band,
    HAS_KEY: tl.constexpr, HAS_QUERY: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """Unscaled scores [BLOCK_M, BLOCK_N], fp32, of q [BLOCK_M, K], k [BLOCK_N, K] and bands [BLOCK_W, K].

    Both position terms are rounded to the dtype of q, as in PyTorch.
    """
    i = tl.arange(0, BLOCK_M)[:, None, None]
    n = tl.arange(0, BLOCK_N // 8)[None, :, None]
    c = tl.arange(0, 8)[None, None, :]
    if HAS_QUERY:
        band = tl.dot(k, tl.trans(query_band), input_precision=PRECISION).to(q.dtype)
        band = _pick(band, 8 * n + c, i - c + 7, BLOCK_N // 8 - 1 - n, BLOCK_N, BLOCK_W, BLOCK_M, BLOCK_N)
        s = band.to(tl.float32)
    if HAS_KEY:
        band = tl.dot(q, tl.trans(key_band), input_precision=PRECISION).to(q.dtype)
        band = _pick(band, i, i - c + 7, BLOCK_N // 8 - 1 - n, BLOCK_M, BLOCK_W, BLOCK_M, BLOCK_N)
        s = s + band.to(tl.float32) if HAS_QUERY else band.to(tl.float32)
    if HAS_KEY or HAS_QUERY:
        return tl.dot(q, tl.trans(k), s, input_precision=PRECISION)
    else:
        return tl.dot(q, tl.trans(k), input_precision=PRECISION)


@triton.jit
def score_gradients(
    s, v, dout, highest, log_total, delta, row, rows_k, h, column, seed, scale_log2, offset, threshold, keep_scale,
    HAS_DROPOUT: tl.constexpr, IS_FP32: tl.constexpr, PRECISION: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """(kept, ds) [BLOCK, BLOCK] in v's dtype: unscaled probabilities after dropout, and the gradient of the scores."""
    p = probabilities(s, scale_log2, highest, log_total, IS_FP32)
    p = tl.where(tl.arange(0, BLOCK)[None, :] < rows_k, p, 0.0)
    dp = tl.dot(dout, tl.trans(v), input_precision=PRECISION)
    if HAS_DROPOUT:
        keep = attention_keep_mask(row, h, column, seed, offset, threshold, BLOCK)
        dp = tl.where(keep, dp * keep_scale, 0.0)
        kept = tl.where(keep, p, opaque_zero(keep_scale))
    else:
        kept = p
    return kept.to(v.dtype), (p * (dp - delta[:, None])).to(v.dtype)


@triton.jit
def shift_queries(ds, BLOCK: tl.constexpr):
    """[BLOCK, 2 BLOCK] of queries and distances from the gradient of scores [BLOCK, BLOCK]; 0 without a key."""
    i = tl.arange(0, BLOCK)[:, None, None]
    n = tl.arange(0, BLOCK // 8)[None, :, None]
    c = tl.arange(0, 8)[None, None, :]
    none = tl.zeros([BLOCK, BLOCK], ds.dtype)
    # zeros beside ds, after or before the keys of a query, for each half of the distances
    first = _pick(_beside(ds, none, BLOCK), i, i - c + 7, BLOCK // 8 - 1 - n, BLOCK, 2 * BLOCK, BLOCK, BLOCK)
    second = _pick(_beside(none, ds, BLOCK), i, i - c + 7, BLOCK // 8 - 1 - n, BLOCK, 2 * BLOCK, BLOCK, BLOCK)
    return _beside(first, second, BLOCK)


@triton.jit
def shift_keys(ds, BLOCK: tl.constexpr):
    """[BLOCK, 2 BLOCK] of keys and distances from the gradient of scores [BLOCK, BLOCK]; 0 without a query."""
    j = tl.arange(0, BLOCK)[:, None, None]
    w = 8 * tl.arange(0, BLOCK // 8)[None, :, None] + tl.arange(0, 8)[None, None, :]
    none = tl.zeros([BLOCK, BLOCK], ds.dtype)
    first = _pick(_below(none, ds, BLOCK), w + j + 1, j, 0, 2 * BLOCK, BLOCK, BLOCK, BLOCK)
    second = _pick(_below(ds, none, BLOCK), w + j + 1, j, 0, 2 * BLOCK, BLOCK, BLOCK, BLOCK)
    return _beside(first, second, BLOCK)


def distance_rows(furthest, position_buckets, max_relative_positions):
    """int32 [2 * furthest + 1]: the row of a position table for i - j = -furthest, ..., furthest."""
    r = torch.arange(-furthest, furthest + 1)
    span = max_relative_positions
    if position_buckets > 0:
        span, mid = position_buckets, position_buckets // 2
        # in float32, as transformers' make_log_bucket_position
        far = r.abs().clamp(min=mid)
        steps = torch.log(far / mid) / torch.log(torch.tensor((max_relative_positions - 1) / mid)) * (mid - 1)
        r = torch.where(r.abs() <= mid, r, (torch.ceil(steps) + mid).long() * r.sign())
    return (r + span).clamp(0, 2 * span - 1).to(torch.int32)


def row_bounds(reach, BLOCK, rows, position_buckets, max_relative_positions):
    """int32 [rows + 1]: the first distance of each table row, among the distances in tiles of `reach` tokens.

    Distances are counted from i - j = 1 - reach - BLOCK, the first of diagonal 0.
    """
    index = distance_rows(reach - 1, position_buckets, max_relative_positions)
    bounds = torch.searchsorted(index, torch.arange(rows + 1, dtype=torch.int32)) + BLOCK
    return bounds.to(torch.int32)


# {(function, its arguments, device): table}. Nothing is ever removed: a CUDA graph refers to a table by its address
TABLES = {}


def device_table(device, make, *sizes):
    """make(*sizes), sorted, on `device`. Made once, or in each call that a CUDA graph records before the first."""
    key = make, sizes, device
    if key in TABLES:
        return TABLES[key]
    table = make(*sizes)
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        # a graph cannot copy from the host, and its memory must not be cached: fill in each run of equal numbers
        runs = zip(*(x.tolist() for x in torch.unique_consecutive(table, return_counts=True)))
        return torch.cat([torch.full((n,), value, dtype=table.dtype, device=device) for value, n in runs])
    # in a new thread: the warm-up of torch.compile allocates from the graph's pool in its own thread
    with ThreadPoolExecutor(1) as thread:
        return TABLES.setdefault(key, thread.submit(table.to, device).result())
