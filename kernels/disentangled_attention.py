"""DeBERTa's attention over packed sequences: content and relative positions, dropout inside.

    s[i, j] = q_i · k_j + q_i · pos_key[d(i - j)] + k_j · pos_query[d(i - j)]
    p       = softmax(s · scale)             within each sequence, per head
    out     = (keep * p / (1 - dropout_p)) v

PyTorch writes and reads q pos_keyᵀ and k pos_queryᵀ, 2*H*T*P elements for tables of P rows, gathers S x S scores from each
and passes over such scores half a dozen times more. Fused: read q, k, v, write out, 4*T*H*K elements and two fp32 a row
and head; the tables come from cache. The backward reads q, k, v, out, dout and writes dq, dk, dv, 8*T*H*K, and recomputes
the probabilities three times, once in each of its kernels; partial sums of the tables' gradients come on top.

Inside a tile of M queries and N keys the distances i - j are M + N - 1 neighbours. Their rows of pos_key are loaded as a
band, one row for each distance (so several may be the same row: buckets), and `q bandᵀ` is a product for tensor cores.
The score of a pair stands in its row i at column i - j + N - 1: each row is read from another column on. That shift is
the same in all tiles. It is a gather along a flat index, which goes through shared memory, in an order of elements that
has no bank conflicts and whose addresses are a register plus a constant (NOTES.md). The same with k and pos_query, whose
shift depends on j. The backward shifts the gradients of the scores back, as operands of products with the bands.

The gradients of the tables: all tiles with one i0 - j0, a diagonal, have the same band. A program walks a diagonal (and a
second one, so that all walk equally far) in a group of sequences and keeps the band's gradient on chip. What the groups
and diagonals found is added in a last kernel, distance by distance: no atomics, the same inputs give the same bits.

Letters: B sequences, T tokens, H heads, K head size, P rows of a position table, G groups of sequences. Tiles have
BLOCK_M queries and BLOCK_N keys, or BLOCK of both; bands have BLOCK_W rows.
"""

import functools
import math

import torch
import triton
import triton.language as tl

from ._launch import INTERPRET, capability, differentiable_once, dropout_constants, launch, multiprocessors, register
from ._launch import unit_columns
from ._math import attention_keep_mask
from .attention import _at, _load_tile, _store_tile, _unpacked, _zero_slack

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@triton.jit
def _load_band(
    table_ptr, stride, index_ptr, first,
    K: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_K: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """[BLOCK_W, BLOCK_K]: the rows of a position table that serve BLOCK_W distances, from entry `first` of the index."""
    offs_k = tl.arange(0, BLOCK_K)
    rows = tl.load(index_ptr + first + tl.arange(0, BLOCK_W))
    pointers = table_ptr + rows.to(tl.int64)[:, None] * stride + offs_k[None, :]
    x = tl.load(pointers) if K == BLOCK_K else tl.load(pointers, mask=offs_k[None, :] < K, other=0.0)
    return x.to(tl.float32) if UPCAST else x


@triton.jit
def _flat(x, R: tl.constexpr, C: tl.constexpr):
    """[R * C]: x [R, C], element (r, c) in place c // 8 * 8 R + 8 r + c % 8."""
    return tl.reshape(tl.permute(tl.reshape(x, [R, C // 8, 8]), [1, 0, 2]), [R * C])


@triton.jit
def _stacked(first, second, R: tl.constexpr, C: tl.constexpr):
    """[2 R, C] of two [R, C]."""
    return tl.reshape(tl.permute(tl.join(first, second), [2, 0, 1]), [2 * R, C])


@triton.jit
def _pick(x, row, low, high, R: tl.constexpr, C: tl.constexpr, M: tl.constexpr, N: tl.constexpr):
    """[M, N]: elements (row, low + 8 high) of x [R, C]. row, low, high broadcast to [M, N // 8, 8], of columns 8 n + c.

    Where low depends on rows and c, high on n, and row on one of them, addresses need no arithmetic of their own.
    """
    place = (low >> 3) * (8 * R) + (low & 7) + high * (8 * R) + row * 8
    place = tl.broadcast_to(place, [M, N // 8, 8])
    return tl.reshape(tl.gather(_flat(x, R, C), tl.reshape(place, [M * N]), 0), [M, N])


@triton.jit
def _scores(
    q, k, pos_key_ptr, stride_pkp, pos_query_ptr, stride_pqp, index_ptr, first,
    HAS_KEY: tl.constexpr, HAS_QUERY: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Unscaled scores [BLOCK_M, BLOCK_N], fp32; the index has the band from entry `first` on.

    Both position terms are rounded to the dtype of q, as PyTorch rounds them.
    """
    i = tl.arange(0, BLOCK_M)[:, None, None]
    n = tl.arange(0, BLOCK_N // 8)[None, :, None]
    c = tl.arange(0, 8)[None, None, :]
    if HAS_QUERY:
        rows = _load_band(pos_query_ptr, stride_pqp, index_ptr, first, K, BLOCK_W, BLOCK_K, UPCAST)
        band = tl.dot(k, tl.trans(rows), input_precision=PRECISION).to(q.dtype)
        band = _pick(band, 8 * n + c, i - c + 7, BLOCK_N // 8 - 1 - n, BLOCK_N, BLOCK_W, BLOCK_M, BLOCK_N)
        s = band.to(tl.float32)
    if HAS_KEY:
        rows = _load_band(pos_key_ptr, stride_pkp, index_ptr, first, K, BLOCK_W, BLOCK_K, UPCAST)
        band = tl.dot(q, tl.trans(rows), input_precision=PRECISION).to(q.dtype)
        band = _pick(band, i, i - c + 7, BLOCK_N // 8 - 1 - n, BLOCK_M, BLOCK_W, BLOCK_M, BLOCK_N)
        s = s + band.to(tl.float32) if HAS_QUERY else band.to(tl.float32)
    if HAS_KEY or HAS_QUERY:
        return tl.dot(q, tl.trans(k), s, input_precision=PRECISION)
    else:
        return tl.dot(q, tl.trans(k), input_precision=PRECISION)


@triton.jit
def _disentangled_attention_fwd_kernel(
    q_ptr, k_ptr, v_ptr, pos_key_ptr, pos_query_ptr, index_ptr, cu_seqlens_ptr, seed_ptr,  # inputs
    out_ptr, statistics_ptr,                                                               # outputs
    B, T, H, tiles, middle,
    stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh, stride_ot, stride_oh,
    stride_pkp, stride_pkh, stride_pqp, stride_pqh,
    scale_log2, offset, threshold, keep_scale,
    HAS_KEY: tl.constexpr, HAS_QUERY: tl.constexpr, HAS_DROPOUT: tl.constexpr, IS_EXACT: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    # programs of one head run at about the same time: they read the same rows of the tables
    tile = tl.program_id(0) % tiles
    b = tl.program_id(0) // tiles % B
    h = tl.program_id(0) // tiles // B
    offs_m = tl.arange(0, BLOCK_M)
    offs_n = tl.arange(0, BLOCK_N)

    end = tl.load(cu_seqlens_ptr + B)
    _zero_slack(out_ptr, stride_ot, h, stride_oh, end, T, b * tiles + tile, B * tiles, K, BLOCK_M, BLOCK_K)

    start = tl.load(cu_seqlens_ptr + b)
    length = tl.load(cu_seqlens_ptr + b + 1) - start
    start_q = start + tile * BLOCK_M
    rows = length - tile * BLOCK_M
    if rows <= 0:
        return

    q_ptr = _at(q_ptr, start_q, stride_qt, h, stride_qh)
    k_ptr = _at(k_ptr, start, stride_kt, h, stride_kh)
    v_ptr = _at(v_ptr, start, stride_vt, h, stride_vh)
    pos_key_ptr = _at(pos_key_ptr, 0, 0, h, stride_pkh)
    pos_query_ptr = _at(pos_query_ptr, 0, 0, h, stride_pqh)
    seed = tl.load(seed_ptr) if HAS_DROPOUT else 0
    q = _load_tile(q_ptr, stride_qt, rows, K, BLOCK_M, BLOCK_K, False, UPCAST)
    highest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)
    first = middle + tile * BLOCK_M - BLOCK_N + 1
    for n in range(0, length, BLOCK_N):
        k = _load_tile(k_ptr, stride_kt, length - n, K, BLOCK_N, BLOCK_K, False, UPCAST)
        s = _scores(
            q, k, pos_key_ptr, stride_pkp, pos_query_ptr, stride_pqp, index_ptr, first - n,
            HAS_KEY, HAS_QUERY, PRECISION, UPCAST, K, BLOCK_M, BLOCK_N, BLOCK_W, BLOCK_K,
        )  # fmt: skip
        s = tl.where(offs_n[None, :] < length - n, s, float("-inf"))
        higher = tl.maximum(highest, tl.max(s, 1) * scale_log2)
        alpha = tl.exp2(highest - higher)
        p = tl.exp2(s * scale_log2 - higher[:, None])
        total = total * alpha + tl.sum(p, 1)
        highest = higher
        if HAS_DROPOUT:
            keep = attention_keep_mask(start_q + offs_m, h, n, seed, offset, threshold, BLOCK_N)
            p = tl.where(keep, p, 0.0)
        v = _load_tile(v_ptr, stride_vt, length - n, K, BLOCK_N, BLOCK_K, False, UPCAST)
        acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision=PRECISION)
        k_ptr = _at(k_ptr, BLOCK_N, stride_kt, 0, 0)
        v_ptr = _at(v_ptr, BLOCK_N, stride_vt, 0, 0)
    statistics_ptr = _at(statistics_ptr, start_q, 1, h, T)
    if IS_EXACT:
        tl.store(statistics_ptr + offs_m, highest, mask=offs_m < rows)
        tl.store(_at(statistics_ptr, 0, 0, H, T) + offs_m, total, mask=offs_m < rows)
    else:
        tl.store(statistics_ptr + offs_m, highest + tl.log2(total), mask=offs_m < rows)
    out_ptr = _at(out_ptr, start_q, stride_ot, h, stride_oh)
    _store_tile(out_ptr, stride_ot, rows, acc * (keep_scale / total)[:, None], K, BLOCK_M, BLOCK_K)


@triton.jit
def _load_statistics(statistics_ptr, row, rows, h, H, T, IS_EXACT: tl.constexpr, BLOCK: tl.constexpr):
    """(x, weight) [BLOCK]: exp2(scores - x) * weight are the probabilities, 0 past the end. Without IS_EXACT weight is
    1: a log-sum-exp of thousands has lost digits, but in 16 bits operands have as well."""
    offs = tl.arange(0, BLOCK)
    statistics_ptr = _at(statistics_ptr, row, 1, h, T)
    x = tl.load(statistics_ptr + offs, mask=offs < rows, other=float("inf"))
    if IS_EXACT:
        return x, 1.0 / tl.load(_at(statistics_ptr, 0, 0, H, T) + offs, mask=offs < rows, other=1.0)
    else:
        return x, 1.0


@triton.jit
def _gradients(
    q, k, v, dout, highest, weight, delta, row, rows_k, column,
    pos_key_ptr, stride_pkp, pos_query_ptr, stride_pqp, index_ptr, first,
    h, seed, scale_log2, offset, threshold, keep_scale,
    HAS_KEY: tl.constexpr, HAS_QUERY: tl.constexpr, HAS_DROPOUT: tl.constexpr, IS_EXACT: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """(kept, ds) [BLOCK, BLOCK] in the dtype of q: probabilities after dropout, unscaled, and the scores' gradient."""
    s = _scores(
        q, k, pos_key_ptr, stride_pkp, pos_query_ptr, stride_pqp, index_ptr, first,
        HAS_KEY, HAS_QUERY, PRECISION, UPCAST, K, BLOCK, BLOCK, 2 * BLOCK, BLOCK_K,
    )  # fmt: skip
    p = tl.exp2(s * scale_log2 - highest[:, None])
    if IS_EXACT:
        p *= weight[:, None]
    p = tl.where(tl.arange(0, BLOCK)[None, :] < rows_k, p, 0.0)
    dp = tl.dot(dout, tl.trans(v), input_precision=PRECISION)
    if HAS_DROPOUT:
        keep = attention_keep_mask(row, h, column, seed, offset, threshold, BLOCK)
        dp = tl.where(keep, dp * keep_scale, 0.0)
        kept = tl.where(keep, p, 0.0)
    else:
        kept = p
    return kept.to(q.dtype), (p * (dp - delta[:, None])).to(q.dtype)


@triton.jit
def _shift_queries(ds, BLOCK: tl.constexpr):
    """[BLOCK, 2 BLOCK] of queries and distances, from the gradient of scores [BLOCK, BLOCK]; 0 where no key is."""
    i = tl.arange(0, BLOCK)
    n = tl.arange(0, BLOCK // 8)[None, :, None]
    c = tl.arange(0, 8)[None, None, :]
    both = tl.reshape(tl.permute(tl.join(ds, ds), [0, 2, 1]), [BLOCK, 2 * BLOCK])
    i_3 = i[:, None, None]
    shifted = _pick(both, i_3, i_3 - c + 7, BLOCK // 8 - 1 - n, BLOCK, 2 * BLOCK, BLOCK, BLOCK)
    # a query's keys have the distances of the first half from its own number on, and of the second half up to there
    is_first = i[None, :] >= i[:, None]
    none = tl.zeros([BLOCK, BLOCK], ds.dtype)
    halves = tl.join(tl.where(is_first, shifted, none), tl.where(is_first, none, shifted))
    return tl.reshape(tl.permute(halves, [0, 2, 1]), [BLOCK, 2 * BLOCK])


@triton.jit
def _shift_keys(ds, BLOCK: tl.constexpr):
    """[BLOCK, 2 BLOCK] of keys and distances, likewise."""
    j = tl.arange(0, BLOCK)
    n = tl.arange(0, BLOCK // 8)[None, :, None]
    c = tl.arange(0, 8)[None, None, :]
    both = _stacked(ds, ds, BLOCK, BLOCK)
    j_3 = j[:, None, None]
    shifted = _pick(both, 8 * n + c + j_3 + 1, j_3, 0, 2 * BLOCK, BLOCK, BLOCK, BLOCK)
    is_first = j[None, :] >= BLOCK - 1 - j[:, None]
    none = tl.zeros([BLOCK, BLOCK], ds.dtype)
    halves = tl.join(tl.where(is_first, shifted, none), tl.where(is_first, none, shifted))
    return tl.reshape(tl.permute(halves, [0, 2, 1]), [BLOCK, 2 * BLOCK])


@triton.jit
def _disentangled_attention_dq_kernel(
    dout_ptr, q_ptr, k_ptr, v_ptr, out_ptr, pos_key_ptr, pos_query_ptr, index_ptr, statistics_ptr, cu_seqlens_ptr,
    seed_ptr,                                                                              # inputs
    dq_ptr, delta_ptr,                                                                     # outputs
    B, T, H, tiles, middle,
    stride_dot, stride_doh, stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh, stride_ot, stride_oh,
    stride_pkp, stride_pkh, stride_pqp, stride_pqh, stride_dqt, stride_dqh,
    scale, scale_log2, offset, threshold, keep_scale,
    HAS_KEY: tl.constexpr, HAS_QUERY: tl.constexpr, HAS_DROPOUT: tl.constexpr, IS_EXACT: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """dq, and delta [H, T] = rowsum(dout * out) for the kernels below."""
    tile = tl.program_id(0) % tiles
    b = tl.program_id(0) // tiles % B
    h = tl.program_id(0) // tiles // B
    offs = tl.arange(0, BLOCK)

    end = tl.load(cu_seqlens_ptr + B)
    _zero_slack(dq_ptr, stride_dqt, h, stride_dqh, end, T, b * tiles + tile, B * tiles, K, BLOCK, BLOCK_K)

    start = tl.load(cu_seqlens_ptr + b)
    length = tl.load(cu_seqlens_ptr + b + 1) - start
    start_q = start + tile * BLOCK
    rows = length - tile * BLOCK
    if rows <= 0:
        return

    dout_ptr = _at(dout_ptr, start_q, stride_dot, h, stride_doh)
    q_ptr = _at(q_ptr, start_q, stride_qt, h, stride_qh)
    k_ptr = _at(k_ptr, start, stride_kt, h, stride_kh)
    v_ptr = _at(v_ptr, start, stride_vt, h, stride_vh)
    out_ptr = _at(out_ptr, start_q, stride_ot, h, stride_oh)
    pos_key_ptr = _at(pos_key_ptr, 0, 0, h, stride_pkh)
    pos_query_ptr = _at(pos_query_ptr, 0, 0, h, stride_pqh)
    seed = tl.load(seed_ptr) if HAS_DROPOUT else 0
    q = _load_tile(q_ptr, stride_qt, rows, K, BLOCK, BLOCK_K, False, UPCAST)
    dout = _load_tile(dout_ptr, stride_dot, rows, K, BLOCK, BLOCK_K, False, UPCAST)
    out = _load_tile(out_ptr, stride_ot, rows, K, BLOCK, BLOCK_K, False, UPCAST)
    delta = tl.sum(dout.to(tl.float32) * out.to(tl.float32), 1)
    tl.store(_at(delta_ptr, start_q, 1, h, T) + offs, delta, mask=offs < rows)
    highest, weight = _load_statistics(statistics_ptr, start_q, rows, h, H, T, IS_EXACT, BLOCK)

    dq = tl.zeros([BLOCK, BLOCK_K], tl.float32)
    first = middle + tile * BLOCK - BLOCK + 1
    for n in range(0, length, BLOCK):
        k = _load_tile(k_ptr, stride_kt, length - n, K, BLOCK, BLOCK_K, False, UPCAST)
        v = _load_tile(v_ptr, stride_vt, length - n, K, BLOCK, BLOCK_K, False, UPCAST)
        _, ds = _gradients(
            q, k, v, dout, highest, weight, delta, start_q + offs, length - n, n,
            pos_key_ptr, stride_pkp, pos_query_ptr, stride_pqp, index_ptr, first,
            h, seed, scale_log2, offset, threshold, keep_scale,
            HAS_KEY, HAS_QUERY, HAS_DROPOUT, IS_EXACT, PRECISION, UPCAST, K, BLOCK, BLOCK_K,
        )  # fmt: skip
        dq = tl.dot(ds, k, dq, input_precision=PRECISION)
        if HAS_KEY:
            band = _load_band(pos_key_ptr, stride_pkp, index_ptr, first, K, 2 * BLOCK, BLOCK_K, UPCAST)
            dq = tl.dot(_shift_queries(ds, BLOCK), band, dq, input_precision=PRECISION)
        k_ptr = _at(k_ptr, BLOCK, stride_kt, 0, 0)
        v_ptr = _at(v_ptr, BLOCK, stride_vt, 0, 0)
        first -= BLOCK
    _store_tile(_at(dq_ptr, start_q, stride_dqt, h, stride_dqh), stride_dqt, rows, dq * scale, K, BLOCK, BLOCK_K)


@triton.jit
def _disentangled_attention_dkdv_kernel(
    dout_ptr, q_ptr, k_ptr, v_ptr, pos_key_ptr, pos_query_ptr, index_ptr, statistics_ptr, delta_ptr, cu_seqlens_ptr,
    seed_ptr,                                                                              # inputs
    dk_ptr, dv_ptr,                                                                        # outputs
    B, T, H, tiles, middle,
    stride_dot, stride_doh, stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh,
    stride_pkp, stride_pkh, stride_pqp, stride_pqh, stride_dkt, stride_dkh, stride_dvt, stride_dvh,
    scale, scale_log2, offset, threshold, keep_scale,
    HAS_KEY: tl.constexpr, HAS_QUERY: tl.constexpr, HAS_DROPOUT: tl.constexpr, IS_EXACT: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0) % tiles
    b = tl.program_id(0) // tiles % B
    h = tl.program_id(0) // tiles // B
    offs = tl.arange(0, BLOCK)

    end = tl.load(cu_seqlens_ptr + B)
    _zero_slack(dk_ptr, stride_dkt, h, stride_dkh, end, T, b * tiles + tile, B * tiles, K, BLOCK, BLOCK_K)
    _zero_slack(dv_ptr, stride_dvt, h, stride_dvh, end, T, b * tiles + tile, B * tiles, K, BLOCK, BLOCK_K)

    start = tl.load(cu_seqlens_ptr + b)
    length = tl.load(cu_seqlens_ptr + b + 1) - start
    start_k = start + tile * BLOCK
    rows_k = length - tile * BLOCK
    if rows_k <= 0:
        return

    dout_ptr = _at(dout_ptr, start, stride_dot, h, stride_doh)
    q_ptr = _at(q_ptr, start, stride_qt, h, stride_qh)
    k_ptr = _at(k_ptr, start_k, stride_kt, h, stride_kh)
    v_ptr = _at(v_ptr, start_k, stride_vt, h, stride_vh)
    delta_ptr = _at(delta_ptr, start, 1, h, T)
    pos_key_ptr = _at(pos_key_ptr, 0, 0, h, stride_pkh)
    pos_query_ptr = _at(pos_query_ptr, 0, 0, h, stride_pqh)
    seed = tl.load(seed_ptr) if HAS_DROPOUT else 0
    k = _load_tile(k_ptr, stride_kt, rows_k, K, BLOCK, BLOCK_K, False, UPCAST)
    v = _load_tile(v_ptr, stride_vt, rows_k, K, BLOCK, BLOCK_K, False, UPCAST)
    dk = tl.zeros([BLOCK, BLOCK_K], tl.float32)
    dv = tl.zeros([BLOCK, BLOCK_K], tl.float32)
    first = middle - tile * BLOCK - BLOCK + 1
    for m in range(0, length, BLOCK):
        q = _load_tile(q_ptr, stride_qt, length - m, K, BLOCK, BLOCK_K, False, UPCAST)
        dout = _load_tile(dout_ptr, stride_dot, length - m, K, BLOCK, BLOCK_K, False, UPCAST)
        highest, weight = _load_statistics(statistics_ptr, start + m, length - m, h, H, T, IS_EXACT, BLOCK)
        delta = tl.load(delta_ptr + m + offs, mask=m + offs < length, other=0.0)
        kept, ds = _gradients(
            q, k, v, dout, highest, weight, delta, start + m + offs, rows_k, tile * BLOCK,
            pos_key_ptr, stride_pkp, pos_query_ptr, stride_pqp, index_ptr, first,
            h, seed, scale_log2, offset, threshold, keep_scale,
            HAS_KEY, HAS_QUERY, HAS_DROPOUT, IS_EXACT, PRECISION, UPCAST, K, BLOCK, BLOCK_K,
        )  # fmt: skip
        dv = tl.dot(tl.trans(kept), dout, dv, input_precision=PRECISION)
        dk = tl.dot(tl.trans(ds), q, dk, input_precision=PRECISION)
        if HAS_QUERY:
            band = _load_band(pos_query_ptr, stride_pqp, index_ptr, first, K, 2 * BLOCK, BLOCK_K, UPCAST)
            dk = tl.dot(_shift_keys(ds, BLOCK), band, dk, input_precision=PRECISION)
        q_ptr = _at(q_ptr, BLOCK, stride_qt, 0, 0)
        dout_ptr = _at(dout_ptr, BLOCK, stride_dot, 0, 0)
        first += BLOCK
    _store_tile(_at(dk_ptr, start_k, stride_dkt, h, stride_dkh), stride_dkt, rows_k, dk * scale, K, BLOCK, BLOCK_K)
    _store_tile(_at(dv_ptr, start_k, stride_dvt, h, stride_dvh), stride_dvt, rows_k, dv * keep_scale, K, BLOCK, BLOCK_K)


@triton.jit
def _disentangled_attention_dband_kernel(
    dout_ptr, q_ptr, k_ptr, v_ptr, pos_key_ptr, pos_query_ptr, index_ptr, statistics_ptr, delta_ptr, cu_seqlens_ptr,
    seed_ptr,                                                                              # inputs
    dband_ptr,                                                                             # output
    B, T, H, tiles, groups, middle,
    stride_dot, stride_doh, stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh,
    stride_pkp, stride_pkh, stride_pqp, stride_pqh,
    scale, scale_log2, offset, threshold, keep_scale,
    HAS_KEY: tl.constexpr, HAS_QUERY: tl.constexpr, HAS_DROPOUT: tl.constexpr, IS_EXACT: tl.constexpr,
    OF_KEY: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Gradients [2 tiles, groups, H, 2 BLOCK, K] of the bands of pos_key (OF_KEY) or pos_query.

    Diagonal D has the tiles whose first query is D - tiles tiles behind the first key. A program walks two diagonals,
    of `tiles` tiles together.
    """
    group = tl.program_id(0) % groups
    pair = tl.program_id(0) // groups % tiles
    h = tl.program_id(0) // groups // tiles
    offs = tl.arange(0, BLOCK)
    pos_key_ptr = _at(pos_key_ptr, 0, 0, h, stride_pkh)
    pos_query_ptr = _at(pos_query_ptr, 0, 0, h, stride_pqh)
    delta_ptr = _at(delta_ptr, 0, 1, h, T)
    seed = tl.load(seed_ptr) if HAS_DROPOUT else 0
    for diagonal in range(pair, pair + tiles + 1, tiles):
        apart = diagonal - tiles
        first = middle + apart * BLOCK - BLOCK + 1
        dband = tl.zeros([2 * BLOCK, BLOCK_K], tl.float32)
        for b in range(group, B, groups):
            start = tl.load(cu_seqlens_ptr + b)
            length = tl.load(cu_seqlens_ptr + b + 1) - start
            for tile in range(tl.maximum(0, -apart), tl.cdiv(length, BLOCK) - tl.maximum(0, apart)):
                n = tile * BLOCK
                m = n + apart * BLOCK
                q = _load_tile(
                    _at(q_ptr, start + m, stride_qt, h, stride_qh), stride_qt, length - m, K, BLOCK, BLOCK_K,
                    False, UPCAST,
                )  # fmt: skip
                dout = _load_tile(
                    _at(dout_ptr, start + m, stride_dot, h, stride_doh), stride_dot, length - m, K, BLOCK, BLOCK_K,
                    False, UPCAST,
                )  # fmt: skip
                k = _load_tile(
                    _at(k_ptr, start + n, stride_kt, h, stride_kh), stride_kt, length - n, K, BLOCK, BLOCK_K,
                    False, UPCAST,
                )  # fmt: skip
                v = _load_tile(
                    _at(v_ptr, start + n, stride_vt, h, stride_vh), stride_vt, length - n, K, BLOCK, BLOCK_K,
                    False, UPCAST,
                )  # fmt: skip
                highest, weight = _load_statistics(statistics_ptr, start + m, length - m, h, H, T, IS_EXACT, BLOCK)
                delta = tl.load(delta_ptr + start + m + offs, mask=m + offs < length, other=0.0)
                _, ds = _gradients(
                    q, k, v, dout, highest, weight, delta, start + m + offs, length - n, n,
                    pos_key_ptr, stride_pkp, pos_query_ptr, stride_pqp, index_ptr, first,
                    h, seed, scale_log2, offset, threshold, keep_scale,
                    HAS_KEY, HAS_QUERY, HAS_DROPOUT, IS_EXACT, PRECISION, UPCAST, K, BLOCK, BLOCK_K,
                )  # fmt: skip
                if OF_KEY:
                    dband = tl.dot(tl.trans(_shift_queries(ds, BLOCK)), q, dband, input_precision=PRECISION)
                else:
                    dband = tl.dot(tl.trans(_shift_keys(ds, BLOCK)), k, dband, input_precision=PRECISION)
        place = tl.cast((diagonal * groups + group) * H + h, tl.int64) * (2 * BLOCK * K)
        _store_tile(dband_ptr + place, K, 2 * BLOCK, dband * scale, K, 2 * BLOCK, BLOCK_K)


@triton.jit
def _disentangled_attention_dtable_kernel(
    dband_ptr, bounds_ptr,  # inputs
    dtable_ptr,             # output
    H, tiles, groups,
    K: tl.constexpr, BLOCK: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One row and head of a position table's gradient [P, H, K]: the sum over the distances that the row serves."""
    row = tl.program_id(0) // H
    h = tl.program_id(0) % H
    offs_g = tl.arange(0, BLOCK_G)
    offs_k = tl.arange(0, BLOCK_K)
    total = tl.zeros([BLOCK_G, BLOCK_K], tl.float32)
    # distances are counted from the first one of diagonal 0
    for distance in range(tl.load(bounds_ptr + row), tl.load(bounds_ptr + row + 1)):
        for half in range(2):
            diagonal = distance // BLOCK - half
            w = distance % BLOCK + half * BLOCK
            place = (tl.cast(diagonal, tl.int64) * groups + offs_g) * H + h
            mask = (offs_g[:, None] < groups) & (diagonal < 2 * tiles) & (offs_k[None, :] < K)
            pointers = dband_ptr + (place[:, None] * (2 * BLOCK) + w) * K + offs_k[None, :]
            total += tl.load(pointers, mask=mask, other=0.0)
    dtable_ptr += tl.cast(tl.program_id(0), tl.int64) * K
    tl.store(dtable_ptr + offs_k, tl.sum(total, 0).to(dtable_ptr.dtype.element_ty), mask=offs_k < K)


def _distance_rows(furthest, position_buckets, max_relative_positions):
    """int32 [2 * furthest + 1]: which row of a position table serves i - j = -furthest, ..., furthest."""
    r = torch.arange(-furthest, furthest + 1)
    span = max_relative_positions
    if position_buckets > 0:
        span, mid = position_buckets, position_buckets // 2
        # in float32, as transformers' make_log_bucket_position
        far = r.abs().clamp(min=mid)
        steps = torch.log(far / mid) / torch.log(torch.tensor((max_relative_positions - 1) / mid)) * (mid - 1)
        r = torch.where(r.abs() <= mid, r, (torch.ceil(steps) + mid).long() * r.sign())
    return (r + span).clamp(0, 2 * span - 1).to(torch.int32)


@functools.lru_cache(maxsize=64)
def _index(furthest, position_buckets, max_relative_positions, device):
    return _distance_rows(furthest, position_buckets, max_relative_positions).to(device)


@functools.lru_cache(maxsize=64)
def _bounds(reach, BLOCK, rows, position_buckets, max_relative_positions, device):
    """int32 [rows + 1]: where the distances of each row of a table begin, among those of the tiles of `reach` tokens.

    Counted from i - j = 1 - reach - BLOCK, the first of diagonal 0.
    """
    index = _distance_rows(reach - 1, position_buckets, max_relative_positions)
    bounds = torch.searchsorted(index, torch.arange(rows + 1, dtype=torch.int32)) + BLOCK
    return bounds.to(torch.int32).to(device)


def _settings(kernel, q, max_seqlen):
    """Launch settings of one of the kernels."""
    if q.dtype == torch.float32:
        block = 16
    else:
        block = 32 if kernel != "fwd" or max_seqlen <= 32 else 64
    settings = dict(num_warps=4, num_stages=1)
    if kernel == "fwd":
        return dict(BLOCK_M=block, BLOCK_N=block, BLOCK_W=2 * block, **settings)
    return dict(BLOCK=block, **settings)


def _constants(q, pos_key, pos_query, dropout_p):
    """The compile-time constants that every kernel has beside its blocks."""
    K = q.shape[-1]
    return dict(
        HAS_KEY=pos_key is not None,
        HAS_QUERY=pos_query is not None,
        HAS_DROPOUT=dropout_p > 0.0,
        IS_EXACT=q.dtype == torch.float32,
        PRECISION="tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee",
        # Triton's interpreter computes wrongly with bfloat16, so there it is widened as it is loaded
        UPCAST=INTERPRET and q.dtype == torch.bfloat16,
        K=K,
        BLOCK_K=max(triton.next_power_of_2(K), 16),
    )


def _furthest(max_seqlen):
    """Distances up to this may be looked up by a tile that begins within a sequence: the largest tile is 128."""
    return triton.cdiv(max_seqlen, 128) * 128 + 128


def disentangled_attention_fwd(
    q, k, v, pos_key, pos_query, cu_seqlens, max_seqlen, position_buckets, max_relative_positions, scale, dropout_p,
    seed, offset,
):  # fmt: skip
    """(out [T, H, K], statistics fp32 [2, H, T]: the largest scaled score as a power of two, and the sum beside it)."""
    q, k, v = _unpacked(q, k, v)
    T, H, K = q.shape
    B = cu_seqlens.shape[0] - 1
    out = torch.empty(T, H, K, dtype=q.dtype, device=q.device)
    statistics = torch.empty(1 + (q.dtype == torch.float32), H, T, dtype=torch.float32, device=q.device)
    if B * H == 0:
        return out.zero_(), statistics.zero_()
    tables = [q if x is None else unit_columns(x) for x in (pos_key, pos_query)]
    middle = _furthest(max_seqlen)
    index = _index(middle, position_buckets, max_relative_positions, q.device)
    threshold, keep_scale = dropout_constants(dropout_p)
    strides = [x.stride(d) for x in (q, k, v, out, *tables) for d in (0, 1)]
    constants = _constants(q, pos_key, pos_query, dropout_p)

    def run(settings):
        tiles = max(triton.cdiv(max_seqlen, settings["BLOCK_M"]), 1)
        _disentangled_attention_fwd_kernel[(B * H * tiles,)](
            q, k, v, *tables, index, cu_seqlens, seed, out, statistics, B, T, H, tiles, middle, *strides,
            scale * math.log2(math.e), offset, threshold, keep_scale, **constants, **settings,
        )  # fmt: skip

    launch(run, "disentangled_attention_fwd", _key(q, max_seqlen, dropout_p), _settings("fwd", q, max_seqlen))
    return out, statistics


def _key(q, max_seqlen, dropout_p):
    dtype = str(q.dtype).removeprefix("torch.")
    size = min(max(triton.next_power_of_2(max_seqlen), 64), 1024)
    return f"{dtype} K{q.shape[-1]} S{size}" + (" dropout" if dropout_p > 0.0 else "")


def disentangled_attention_bwd(
    dout, q, k, v, pos_key, pos_query, out, statistics, cu_seqlens, max_seqlen, position_buckets,
    max_relative_positions, scale, dropout_p, seed, offset, wants_tables,
):  # fmt: skip
    """The gradients of q, k, v, pos_key, pos_query as they were given: a list without those that are None.

    With `wants_tables` False those of pos_key and pos_query are left out too.
    """
    grads = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v) if x is not None]
    dq, dk, dv = _unpacked(*grads, *[None] * (3 - len(grads)))
    dpos_key, dpos_query = (
        None if x is None or not wants_tables else torch.empty(x.shape, dtype=x.dtype, device=x.device)
        for x in (pos_key, pos_query)
    )
    dtables = [x for x in (dpos_key, dpos_query) if x is not None]
    q, k, v = _unpacked(q, k, v)
    dout = unit_columns(dout)
    T, H, K = q.shape
    B = cu_seqlens.shape[0] - 1
    if B * H == 0:
        return [x.zero_() for x in grads + dtables]
    tables = [q if x is None else unit_columns(x) for x in (pos_key, pos_query)]
    middle = _furthest(max_seqlen)
    index = _index(middle, position_buckets, max_relative_positions, q.device)
    threshold, keep_scale = dropout_constants(dropout_p)
    operands = [x.stride(d) for x in (dout, q, k, v) for d in (0, 1)]
    positions = [x.stride(d) for x in tables for d in (0, 1)]
    scalars = (scale, scale * math.log2(math.e), offset, threshold, keep_scale)
    constants = _constants(q, pos_key, pos_query, dropout_p)
    key = _key(q, max_seqlen, dropout_p)
    delta = torch.empty(H, T, dtype=torch.float32, device=q.device)

    def run_dq(settings):
        tiles = max(triton.cdiv(max_seqlen, settings["BLOCK"]), 1)
        _disentangled_attention_dq_kernel[(B * H * tiles,)](
            dout, q, k, v, out, *tables, index, statistics, cu_seqlens, seed, dq, delta, B, T, H, tiles, middle,
            *operands, out.stride(0), out.stride(1), *positions, dq.stride(0), dq.stride(1), *scalars,
            **constants, **settings,
        )  # fmt: skip

    def run_dkdv(settings):
        tiles = max(triton.cdiv(max_seqlen, settings["BLOCK"]), 1)
        _disentangled_attention_dkdv_kernel[(B * H * tiles,)](
            dout, q, k, v, *tables, index, statistics, delta, cu_seqlens, seed, dk, dv, B, T, H, tiles, middle,
            *operands, *positions, dk.stride(0), dk.stride(1), dv.stride(0), dv.stride(1), *scalars,
            **constants, **settings,
        )  # fmt: skip

    def run_dtable(settings, dtable):
        block = settings["BLOCK"]
        tiles = max(triton.cdiv(max_seqlen, block), 1)
        # programs for two on each multiprocessor
        groups = min(max(2 * multiprocessors() // (H * tiles), 1), B)
        dband = torch.empty(2 * tiles, groups, H, 2 * block, K, dtype=torch.float32, device=q.device)
        _disentangled_attention_dband_kernel[(H * tiles * groups,)](
            dout, q, k, v, *tables, index, statistics, delta, cu_seqlens, seed, dband, B, T, H, tiles, groups, middle,
            *operands, *positions, *scalars, **constants, OF_KEY=dtable is dpos_key, **settings,
        )  # fmt: skip
        P = dtable.shape[0]
        bounds = _bounds(tiles * block, block, P, position_buckets, max_relative_positions, q.device)
        _disentangled_attention_dtable_kernel[(P * H,)](
            dband, bounds, dtable, H, tiles, groups, K=K, BLOCK=block, BLOCK_G=triton.next_power_of_2(groups),
            BLOCK_K=constants["BLOCK_K"], num_warps=1,
        )  # fmt: skip

    launch(run_dq, "disentangled_attention_dq", key, _settings("dq", q, max_seqlen))
    launch(run_dkdv, "disentangled_attention_dkdv", key, _settings("dkdv", q, max_seqlen))
    for dtable in dtables:
        launch(
            functools.partial(run_dtable, dtable=dtable), "disentangled_attention_dtable", key,
            _settings("dband", q, max_seqlen),
        )  # fmt: skip
    return grads + dtables


def _disentangled_attention_fwd_fake(
    q, k, v, pos_key, pos_query, cu_seqlens, max_seqlen, position_buckets, max_relative_positions, scale, dropout_p,
    seed, offset,
):  # fmt: skip
    T, H, K = q.shape[0], *q.shape[-2:]
    return q.new_empty(T, H, K), q.new_empty(1 + (q.dtype == torch.float32), H, T, dtype=torch.float32)


def _disentangled_attention_bwd_fake(
    dout, q, k, v, pos_key, pos_query, out, statistics, cu_seqlens, max_seqlen, position_buckets,
    max_relative_positions, scale, dropout_p, seed, offset, wants_tables,
):  # fmt: skip
    given = (q, k, v, pos_key, pos_query) if wants_tables else (q, k, v)
    return [x.new_empty(x.shape) for x in given if x is not None]


_INPUTS = "Tensor q, Tensor? k, Tensor? v, Tensor? pos_key, Tensor? pos_query"
_TAIL = (
    "Tensor cu_seqlens, SymInt max_seqlen, int position_buckets, int max_relative_positions, float scale, "
    "float dropout_p, Tensor? seed, SymInt offset"
)
_disentangled_attention_fwd = register(
    f"disentangled_attention_fwd({_INPUTS}, {_TAIL}) -> (Tensor, Tensor)",
    disentangled_attention_fwd,
    _disentangled_attention_fwd_fake,
)
_disentangled_attention_bwd = register(
    f"disentangled_attention_bwd(Tensor dout, {_INPUTS}, Tensor out, Tensor statistics, {_TAIL}, bool wants_tables) "
    "-> Tensor[]",
    disentangled_attention_bwd,
    _disentangled_attention_bwd_fake,
)


class DisentangledAttentionFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, pos_key, pos_query, cu_seqlens, *rest):
        out, statistics = _disentangled_attention_fwd(q, k, v, pos_key, pos_query, cu_seqlens, *rest)
        *scalars, seed, offset = rest
        ctx.save_for_backward(q, k, v, pos_key, pos_query, out, statistics, cu_seqlens, seed)
        ctx.scalars = *scalars, offset
        return out

    @staticmethod
    @differentiable_once("disentangled_attention")
    def backward(ctx, dout):
        *saved, seed = ctx.saved_tensors
        *scalars, offset = ctx.scalars
        wants_tables = ctx.needs_input_grad[3] or ctx.needs_input_grad[4]
        grads = iter(_disentangled_attention_bwd(dout, *saved, *scalars, seed, offset, wants_tables))
        given = [x is not None for x in saved[:3]] + [x is not None and wants_tables for x in saved[3:5]]
        return *(next(grads) if is_given else None for is_given in given), *[None] * 8


def disentangled_attention(
    q, k, v, pos_key, pos_query, cu_seqlens, max_seqlen, *,
    position_buckets=0, max_relative_positions, scale=None, dropout_p=0.0, seed=None, offset=0,
):  # fmt: skip
    """DeBERTa's attention: arguments and result of `reference.disentangled_attention`.

    float16, bfloat16 or float32; head sizes up to 128; `seed` an int64 tensor [1] when dropout_p > 0. Raises ValueError
    and TypeError.
    """
    terms = (pos_key is not None) + (pos_query is not None)
    scale = (q.shape[-1] * (1 + terms)) ** -0.5 if scale is None else scale
    return DisentangledAttentionFunction.apply(
        q, k, v, pos_key, pos_query, cu_seqlens, max_seqlen, position_buckets, max_relative_positions, scale, dropout_p,
        seed, offset,
    )  # fmt: skip
