"""DeBERTa's attention over packed sequences: content and relative positions, with dropout.

    s[i, j] = q_i · k_j + q_i · pos_key[d(i - j)] + k_j · pos_query[d(i - j)]
    p       = softmax(s · scale)             within each sequence, per head
    out     = (keep * p / (1 - dropout_p)) v

PyTorch writes and reads q pos_keyᵀ and k pos_queryᵀ, 2*H*T*P elements for tables of P rows, gathers S x S scores from
both, and passes over S x S scores about six more times. Fused: read q, k, v, write out, 4*T*H*K elements, and one fp32
per row and head (two in fp32). The tables come from cache. The backward reads q, k, v, out, dout and writes dq, dk, dv,
8*T*H*K. Each of its kernels recomputes the probabilities from the saved log-sum-exp and reads its operands again, from
cache. The fp32 sums for the tables' gradients are two rows per distance, head and group of sequences.

In a tile of M query rows and N keys, i - j has M + N - 1 adjacent values. Their rows of pos_key are loaded as a band,
one row per distance (with buckets several are the same row), and q bandᵀ is a product for tensor cores. The score of
(i, j) is in row i at column i - j + N - 1, so each row is read from another column on. This shift is the same in all
tiles. It is a gather with a flat index through shared memory. The order of elements avoids bank conflicts, and most
addresses are a register plus a constant (NOTES.md). k and pos_query are treated alike, but their shift depends on j.
The backward shifts the gradients of the scores back, and multiplies them with the bands.

The gradients of the tables: all tiles with the same i0 - j0, a diagonal, have the same band. A program loops over a
diagonal and a second one, chosen so that all programs have equally many tiles, in a group of sequences, and keeps the
band's gradient on chip. A last kernel adds up the groups and diagonals for each row of the table. There are no atomics,
and the same inputs give the same bits.

Letters: B sequences, T tokens, H heads, K head size, P rows of a position table. Tiles have BLOCK_M query rows and
BLOCK_N keys, or BLOCK of both. Bands have BLOCK_W rows, or 2 BLOCK.
"""

import functools

import torch
import triton
import triton.language as tl

from ._attention import (
    at,
    exponent,
    load_lse,
    load_tile,
    opaque_zero,
    sequence,
    store_lse,
    store_tile,
    zero_slack,
    zero_slack_of_lse,
)
from ._attention_host import (
    check_operands,
    constants_of,
    empty_gradients,
    empty_results,
    key_of,
    scalars_of,
    strides,
    unpacked,
)
from ._bands import (
    device_table,
    distance_rows,
    load_bands,
    row_bounds,
    score_gradients,
    scores,
    shift_keys,
    shift_queries,
)
from ._launch import capability, differentiable_once, launch, multiprocessors, register, unit_columns
from ._math import attention_keep_mask


@triton.jit
def _place(B, tiles):
    """(sequence, head, tile, number of this program among its head's, number of the head's programs).

    Programs of one head are adjacent, since they read the same rows of the tables.
    """
    tile = tl.program_id(0) % tiles
    b = tl.program_id(0) // tiles % B
    return b, tl.program_id(0) // tiles // B, tile, b * tiles + tile, B * tiles


@triton.jit
def _disentangled_attention_fwd_kernel(
    q_ptr, k_ptr, v_ptr, pos_key_ptr, pos_query_ptr, index_ptr, cu_seqlens_ptr, seed_ptr,  # inputs
    out_ptr, lse_ptr,                                                               # outputs
    B, T, H, tiles, middle,
    stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh, stride_ot, stride_oh,
    stride_pkp, stride_pkh, stride_pqp, stride_pqh,
    scale_log2, offset, threshold, keep_scale,
    HAS_KEY: tl.constexpr, HAS_QUERY: tl.constexpr, HAS_DROPOUT: tl.constexpr, IS_FP32: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    b, h, tile, program, programs = _place(B, tiles)
    offs_m = tl.arange(0, BLOCK_M)
    offs_n = tl.arange(0, BLOCK_N)

    end = tl.load(cu_seqlens_ptr + B)
    zero_slack(out_ptr, stride_ot, h, stride_oh, end, T, program, programs, K, BLOCK_M, BLOCK_K)
    zero_slack_of_lse(at(lse_ptr, 0, 1, h, T), H, T, end, program, programs, IS_FP32, BLOCK_M)

    start, length = sequence(cu_seqlens_ptr, b)
    start_q = start + tile * BLOCK_M
    rows = length - tile * BLOCK_M
    if rows <= 0:
        return

    k_ptr = at(k_ptr, start, stride_kt, h, stride_kh)
    v_ptr = at(v_ptr, start, stride_vt, h, stride_vh)
    pos_key_ptr = at(pos_key_ptr, 0, 0, h, stride_pkh)
    pos_query_ptr = at(pos_query_ptr, 0, 0, h, stride_pqh)
    seed = tl.load(seed_ptr) if HAS_DROPOUT else 0
    q = load_tile(q_ptr, start_q, stride_qt, h, stride_qh, rows, K, BLOCK_M, BLOCK_K, UPCAST)
    highest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)
    first = middle + tile * BLOCK_M - BLOCK_N + 1
    for n in range(0, length, BLOCK_N):
        k = load_tile(k_ptr, 0, stride_kt, 0, 0, length - n, K, BLOCK_N, BLOCK_K, UPCAST)
        key_band, query_band = load_bands(
            pos_key_ptr, stride_pkp, pos_query_ptr, stride_pqp, index_ptr, first - n,
            HAS_KEY, HAS_QUERY, UPCAST, K, BLOCK_W, BLOCK_K,
        )  # fmt: skip
        s = scores(q, k, key_band, query_band, HAS_KEY, HAS_QUERY, PRECISION, BLOCK_M, BLOCK_N, BLOCK_W)
        s = tl.where(offs_n[None, :] < length - n, s, float("-inf"))
        if IS_FP32:
            higher = tl.maximum(highest, tl.max(s, 1))
            alpha = tl.exp2((highest - higher) * scale_log2)
        else:
            higher = tl.maximum(highest, tl.max(s, 1) * scale_log2)
            alpha = tl.exp2(highest - higher)
        p = tl.exp2(exponent(s, scale_log2, higher, IS_FP32))
        total = total * alpha + tl.sum(p, 1)
        highest = higher
        if HAS_DROPOUT:
            keep = attention_keep_mask(start_q + offs_m, h, n, seed, offset, threshold, BLOCK_N)
            p = tl.where(keep, p, opaque_zero(keep_scale))
        v = load_tile(v_ptr, 0, stride_vt, 0, 0, length - n, K, BLOCK_N, BLOCK_K, UPCAST)
        acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision=PRECISION)
        k_ptr = at(k_ptr, BLOCK_N, stride_kt, 0, 0)
        v_ptr = at(v_ptr, BLOCK_N, stride_vt, 0, 0)
    store_lse(at(lse_ptr, start_q, 1, h, T), rows, H, T, highest, total, IS_FP32, BLOCK_M)
    out = acc * (keep_scale / total)[:, None]
    store_tile(out_ptr, start_q, stride_ot, h, stride_oh, rows, out, K, BLOCK_M, BLOCK_K)


@triton.jit
def _disentangled_attention_dq_kernel(
    dout_ptr, q_ptr, k_ptr, v_ptr, out_ptr, pos_key_ptr, pos_query_ptr, index_ptr, lse_ptr, cu_seqlens_ptr,
    seed_ptr,                                                                              # inputs
    dq_ptr, delta_ptr,                                                                     # outputs
    B, T, H, tiles, middle,
    stride_dot, stride_doh, stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh, stride_ot, stride_oh,
    stride_pkp, stride_pkh, stride_pqp, stride_pqh, stride_dqt, stride_dqh,
    scale, scale_log2, offset, threshold, keep_scale,
    HAS_KEY: tl.constexpr, HAS_QUERY: tl.constexpr, HAS_DROPOUT: tl.constexpr, IS_FP32: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """dq, and delta [H, T] = rowsum(dout * out) for the kernels below."""
    b, h, tile, program, programs = _place(B, tiles)
    offs = tl.arange(0, BLOCK)

    end = tl.load(cu_seqlens_ptr + B)
    zero_slack(dq_ptr, stride_dqt, h, stride_dqh, end, T, program, programs, K, BLOCK, BLOCK_K)

    start, length = sequence(cu_seqlens_ptr, b)
    start_q = start + tile * BLOCK
    rows = length - tile * BLOCK
    if rows <= 0:
        return

    k_ptr = at(k_ptr, start, stride_kt, h, stride_kh)
    v_ptr = at(v_ptr, start, stride_vt, h, stride_vh)
    pos_key_ptr = at(pos_key_ptr, 0, 0, h, stride_pkh)
    pos_query_ptr = at(pos_query_ptr, 0, 0, h, stride_pqh)
    seed = tl.load(seed_ptr) if HAS_DROPOUT else 0
    q = load_tile(q_ptr, start_q, stride_qt, h, stride_qh, rows, K, BLOCK, BLOCK_K, UPCAST)
    dout = load_tile(dout_ptr, start_q, stride_dot, h, stride_doh, rows, K, BLOCK, BLOCK_K, UPCAST)
    out = load_tile(out_ptr, start_q, stride_ot, h, stride_oh, rows, K, BLOCK, BLOCK_K, UPCAST)
    delta = tl.sum(dout.to(tl.float32) * out.to(tl.float32), 1)
    tl.store(at(delta_ptr, start_q, 1, h, T) + offs, delta, mask=offs < rows)
    highest, log_total = load_lse(at(lse_ptr, start_q, 1, h, T), rows, H, T, IS_FP32, BLOCK)

    dq = tl.zeros([BLOCK, BLOCK_K], tl.float32)
    first = middle + tile * BLOCK - BLOCK + 1
    for n in range(0, length, BLOCK):
        k = load_tile(k_ptr, 0, stride_kt, 0, 0, length - n, K, BLOCK, BLOCK_K, UPCAST)
        key_band, query_band = load_bands(
            pos_key_ptr, stride_pkp, pos_query_ptr, stride_pqp, index_ptr, first,
            HAS_KEY, HAS_QUERY, UPCAST, K, 2 * BLOCK, BLOCK_K,
        )  # fmt: skip
        s = scores(q, k, key_band, query_band, HAS_KEY, HAS_QUERY, PRECISION, BLOCK, BLOCK, 2 * BLOCK)
        v = load_tile(v_ptr, 0, stride_vt, 0, 0, length - n, K, BLOCK, BLOCK_K, UPCAST)
        _, ds = score_gradients(
            s, v, dout, highest, log_total, delta, start_q + offs, length - n, h, n,
            seed, scale_log2, offset, threshold, keep_scale, HAS_DROPOUT, IS_FP32, PRECISION, BLOCK,
        )  # fmt: skip
        dq = tl.dot(ds, k, dq, input_precision=PRECISION)
        if HAS_KEY:
            dq = tl.dot(shift_queries(ds, BLOCK), key_band, dq, input_precision=PRECISION)
        k_ptr = at(k_ptr, BLOCK, stride_kt, 0, 0)
        v_ptr = at(v_ptr, BLOCK, stride_vt, 0, 0)
        first -= BLOCK
    store_tile(dq_ptr, start_q, stride_dqt, h, stride_dqh, rows, dq * scale, K, BLOCK, BLOCK_K)


@triton.jit
def _add_dkdv(
    dk, dv, k, v, dout_ptr, q_ptr, pos_key_ptr, pos_query_ptr, index_ptr, lse_ptr, delta_ptr,
    T, H, stride_dot, stride_qt, stride_pkp, stride_pqp, start, length, m, rows_k, column, first,
    h, seed, scale_log2, offset, threshold, keep_scale,
    HAS_KEY: tl.constexpr, HAS_QUERY: tl.constexpr, HAS_DROPOUT: tl.constexpr, IS_FP32: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """dk / scale and dv / keep_scale plus the contribution of the query rows from `m` on."""
    offs = m + tl.arange(0, BLOCK)
    q = load_tile(q_ptr, m, stride_qt, 0, 0, length - m, K, BLOCK, BLOCK_K, UPCAST)
    key_band, query_band = load_bands(
        pos_key_ptr, stride_pkp, pos_query_ptr, stride_pqp, index_ptr, first,
        HAS_KEY, HAS_QUERY, UPCAST, K, 2 * BLOCK, BLOCK_K,
    )  # fmt: skip
    s = scores(q, k, key_band, query_band, HAS_KEY, HAS_QUERY, PRECISION, BLOCK, BLOCK, 2 * BLOCK)
    dout = load_tile(dout_ptr, m, stride_dot, 0, 0, length - m, K, BLOCK, BLOCK_K, UPCAST)
    highest, log_total = load_lse(at(lse_ptr, start + m, 1, h, T), length - m, H, T, IS_FP32, BLOCK)
    delta = tl.load(delta_ptr + offs, mask=offs < length, other=0.0)
    kept, ds = score_gradients(
        s, v, dout, highest, log_total, delta, start + offs, rows_k, h, column,
        seed, scale_log2, offset, threshold, keep_scale, HAS_DROPOUT, IS_FP32, PRECISION, BLOCK,
    )  # fmt: skip
    dv = tl.dot(tl.trans(kept), dout, dv, input_precision=PRECISION)
    dk = tl.dot(tl.trans(ds), q, dk, input_precision=PRECISION)
    if HAS_QUERY:
        dk = tl.dot(shift_keys(ds, BLOCK), query_band, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit
def _disentangled_attention_dkdv_kernel(
    dout_ptr, q_ptr, k_ptr, v_ptr, pos_key_ptr, pos_query_ptr, index_ptr, lse_ptr, delta_ptr, cu_seqlens_ptr,
    seed_ptr,                                                                              # inputs
    dk_ptr, dv_ptr,                                                                        # outputs
    B, T, H, tiles, middle,
    stride_dot, stride_doh, stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh,
    stride_pkp, stride_pkh, stride_pqp, stride_pqh, stride_dkt, stride_dkh, stride_dvt, stride_dvh,
    scale, scale_log2, offset, threshold, keep_scale,
    HAS_KEY: tl.constexpr, HAS_QUERY: tl.constexpr, HAS_DROPOUT: tl.constexpr, IS_FP32: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    b, h, tile, program, programs = _place(B, tiles)

    end = tl.load(cu_seqlens_ptr + B)
    zero_slack(dk_ptr, stride_dkt, h, stride_dkh, end, T, program, programs, K, BLOCK, BLOCK_K)
    zero_slack(dv_ptr, stride_dvt, h, stride_dvh, end, T, program, programs, K, BLOCK, BLOCK_K)

    start, length = sequence(cu_seqlens_ptr, b)
    start_k = start + tile * BLOCK
    rows_k = length - tile * BLOCK
    if rows_k <= 0:
        return

    dout_ptr = at(dout_ptr, start, stride_dot, h, stride_doh)
    q_ptr = at(q_ptr, start, stride_qt, h, stride_qh)
    delta_ptr = at(delta_ptr, start, 1, h, T)
    pos_key_ptr = at(pos_key_ptr, 0, 0, h, stride_pkh)
    pos_query_ptr = at(pos_query_ptr, 0, 0, h, stride_pqh)
    seed = tl.load(seed_ptr) if HAS_DROPOUT else 0
    k = load_tile(k_ptr, start_k, stride_kt, h, stride_kh, rows_k, K, BLOCK, BLOCK_K, UPCAST)
    v = load_tile(v_ptr, start_k, stride_vt, h, stride_vh, rows_k, K, BLOCK, BLOCK_K, UPCAST)
    dk = tl.zeros([BLOCK, BLOCK_K], tl.float32)
    dv = tl.zeros([BLOCK, BLOCK_K], tl.float32)
    first = middle - tile * BLOCK - BLOCK + 1
    # no hoisting: addresses and masks outside the loop would spill
    for m in tl.range(0, length, BLOCK, disable_licm=True):
        dk, dv = _add_dkdv(
            dk, dv, k, v, dout_ptr, q_ptr, pos_key_ptr, pos_query_ptr, index_ptr, lse_ptr, delta_ptr,
            T, H, stride_dot, stride_qt, stride_pkp, stride_pqp, start, length, m, rows_k, tile * BLOCK, first + m,
            h, seed, scale_log2, offset, threshold, keep_scale,
            HAS_KEY, HAS_QUERY, HAS_DROPOUT, IS_FP32, PRECISION, UPCAST, K, BLOCK, BLOCK_K,
        )  # fmt: skip
    store_tile(dk_ptr, start_k, stride_dkt, h, stride_dkh, rows_k, dk * scale, K, BLOCK, BLOCK_K)
    store_tile(dv_ptr, start_k, stride_dvt, h, stride_dvh, rows_k, dv * keep_scale, K, BLOCK, BLOCK_K)


@triton.jit
def _add_dband(
    dband, key_band, query_band, dout_ptr, q_ptr, k_ptr, v_ptr, lse_ptr, delta_ptr,
    T, H, stride_dot, stride_doh, stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh,
    start, length, m, n, h, seed, scale_log2, offset, threshold, keep_scale,
    HAS_KEY: tl.constexpr, HAS_QUERY: tl.constexpr, HAS_DROPOUT: tl.constexpr, IS_FP32: tl.constexpr,
    OF_KEY: tl.constexpr, IS_EARLY: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """dband / scale plus the contribution of the tile of query rows from `m` and keys from `n` on."""
    offs = m + tl.arange(0, BLOCK)
    # addresses first: with the loads in between, fp32 with dropout spills on sm_90
    q_ptr = at(q_ptr, start + m, stride_qt, h, stride_qh)
    k_ptr = at(k_ptr, start + n, stride_kt, h, stride_kh)
    v_ptr = at(v_ptr, start + n, stride_vt, h, stride_vh)
    dout_ptr = at(dout_ptr, start + m, stride_dot, h, stride_doh)
    q = load_tile(q_ptr, 0, stride_qt, 0, 0, length - m, K, BLOCK, BLOCK_K, UPCAST)
    k = load_tile(k_ptr, 0, stride_kt, 0, 0, length - n, K, BLOCK, BLOCK_K, UPCAST)
    if IS_EARLY:
        dout = load_tile(dout_ptr, 0, stride_dot, 0, 0, length - m, K, BLOCK, BLOCK_K, UPCAST)
        v = load_tile(v_ptr, 0, stride_vt, 0, 0, length - n, K, BLOCK, BLOCK_K, UPCAST)
    s = scores(q, k, key_band, query_band, HAS_KEY, HAS_QUERY, PRECISION, BLOCK, BLOCK, 2 * BLOCK)
    if not IS_EARLY:
        dout = load_tile(dout_ptr, 0, stride_dot, 0, 0, length - m, K, BLOCK, BLOCK_K, UPCAST)
        v = load_tile(v_ptr, 0, stride_vt, 0, 0, length - n, K, BLOCK, BLOCK_K, UPCAST)
    highest, log_total = load_lse(at(lse_ptr, start + m, 1, h, T), length - m, H, T, IS_FP32, BLOCK)
    delta = tl.load(delta_ptr + start + offs, mask=offs < length, other=0.0)
    _, ds = score_gradients(
        s, v, dout, highest, log_total, delta, start + offs, length - n, h, n,
        seed, scale_log2, offset, threshold, keep_scale, HAS_DROPOUT, IS_FP32, PRECISION, BLOCK,
    )  # fmt: skip
    if OF_KEY:
        return tl.dot(tl.trans(shift_queries(ds, BLOCK)), q, dband, input_precision=PRECISION)
    else:
        return tl.dot(tl.trans(shift_keys(ds, BLOCK)), k, dband, input_precision=PRECISION)


@triton.jit
def _disentangled_attention_dband_kernel(
    dout_ptr, q_ptr, k_ptr, v_ptr, pos_key_ptr, pos_query_ptr, index_ptr, lse_ptr, delta_ptr, cu_seqlens_ptr,
    seed_ptr,                                                                              # inputs
    dband_ptr,                                                                             # output
    B, T, H, tiles, groups, middle,
    stride_dot, stride_doh, stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh,
    stride_pkp, stride_pkh, stride_pqp, stride_pqh,
    scale, scale_log2, offset, threshold, keep_scale,
    HAS_KEY: tl.constexpr, HAS_QUERY: tl.constexpr, HAS_DROPOUT: tl.constexpr, IS_FP32: tl.constexpr,
    OF_KEY: tl.constexpr, IS_EARLY: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Gradients [2 tiles, groups, H, 2 BLOCK, K] of the bands of pos_key (OF_KEY) or pos_query.

    Diagonal D has the tiles whose first query row is D - tiles tiles behind the first key. A program loops over two
    diagonals with `tiles` tiles together.
    """
    group = tl.program_id(0) % groups
    pair = tl.program_id(0) // groups % tiles
    h = tl.program_id(0) // groups // tiles
    pos_key_ptr = at(pos_key_ptr, 0, 0, h, stride_pkh)
    pos_query_ptr = at(pos_query_ptr, 0, 0, h, stride_pqh)
    delta_ptr = at(delta_ptr, 0, 1, h, T)
    seed = tl.load(seed_ptr) if HAS_DROPOUT else 0
    for diagonal in range(pair, pair + tiles + 1, tiles):
        apart = diagonal - tiles
        # diagonal 0 has no tiles, and its band begins before the index
        first = tl.maximum(middle + apart * BLOCK - BLOCK + 1, 0)
        key_band, query_band = load_bands(
            pos_key_ptr, stride_pkp, pos_query_ptr, stride_pqp, index_ptr, first,
            HAS_KEY, HAS_QUERY, UPCAST, K, 2 * BLOCK, BLOCK_K,
        )  # fmt: skip
        dband = tl.zeros([2 * BLOCK, BLOCK_K], tl.float32)
        for b in range(group, B, groups):
            start, length = sequence(cu_seqlens_ptr, b)
            end = tl.cdiv(length, BLOCK) - tl.maximum(0, apart)
            for tile in tl.range(tl.maximum(0, -apart), end, disable_licm=True):
                dband = _add_dband(
                    dband, key_band, query_band, dout_ptr, q_ptr, k_ptr, v_ptr, lse_ptr, delta_ptr,
                    T, H, stride_dot, stride_doh, stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh,
                    start, length, (tile + apart) * BLOCK, tile * BLOCK,
                    h, seed, scale_log2, offset, threshold, keep_scale,
                    HAS_KEY, HAS_QUERY, HAS_DROPOUT, IS_FP32, OF_KEY, IS_EARLY, PRECISION, UPCAST,
                    K, BLOCK, BLOCK_K,
                )  # fmt: skip
        place = tl.cast((diagonal * groups + group) * H + h, tl.int64) * (2 * BLOCK * K)
        store_tile(dband_ptr + place, 0, K, 0, 0, 2 * BLOCK, dband * scale, K, 2 * BLOCK, BLOCK_K)


@triton.jit
def _disentangled_attention_dtable_kernel(
    dband_ptr, bounds_ptr,  # inputs
    dtable_ptr,             # output
    H, tiles, groups,
    K: tl.constexpr, BLOCK: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One row and head of a position table's gradient [P, H, K]: the sum over the distances that use the row."""
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


# (kernel, operands are fp32, large tiles: Hopper's tensor cores and a head size up to 64): tile sizes (query rows, and
# keys if they differ), warps, stages. Chosen from the compiler's reports (no spills on sm_80 and sm_90: NOTES.md), not
# from times on a device
_TILES = {
    ("fwd", False, True): (64, 64, 4, 1),
    ("fwd", False, False): (32, 32, 4, 1),
    ("fwd", True, False): (16, 16, 8, 1),
    ("dq", False, True): (64, 4, 1),
    ("dq", False, False): (32, 4, 1),
    ("dq", True, False): (16, 8, 1),
    ("dkdv", False, True): (64, 4, 1),
    ("dkdv", False, False): (32, 4, 1),
    ("dkdv", True, False): (16, 4, 1),
    ("dband", False, True): (64, 4, 1),
    ("dband", False, False): (32, 8, 1),
    ("dband", True, False): (16, 8, 1),
}


def _settings(kernel, q, max_seqlen, has_dropout):
    """(settings, candidates) of one of the four kernels with tiles."""
    is_fp32, is_wide = q.dtype == torch.float32, q.shape[-1] > 64

    def settings(*tile):
        *rows, num_warps, num_stages = tile
        blocks = dict(num_warps=num_warps, num_stages=num_stages)
        if kernel == "fwd":
            return dict(BLOCK_M=rows[0], BLOCK_N=rows[1], BLOCK_W=triton.next_power_of_2(sum(rows) - 1), **blocks)
        if kernel == "dband":
            # with dropout one order of loads does not spill, without dropout the other
            blocks["IS_EARLY"] = has_dropout and rows[0] == 64
        return dict(BLOCK=rows[0], **blocks)

    # a sequence of up to 64 tokens is one tile: without a loop that shares its loads, the bands' gradient spills
    shortest = 64 if kernel == "dband" and has_dropout else 32
    is_large = not (is_fp32 or is_wide) and max_seqlen > shortest and capability() >= 90
    default = settings(*_TILES[kernel, is_fp32, is_large])
    if kernel == "dband" and (is_fp32 and has_dropout and capability() < 90 or not is_fp32 and capability() == 0):
        # fp32 on Ampere, and AMD's wider warps
        default = settings(16 if is_fp32 else 32, 4, 1)
    if is_fp32 and is_wide and kernel in ("dq", "dkdv"):
        # fp32 rows of more than 64 elements: twice the warps with half the registers each
        default = settings(16, 16, 1)
    if kernel == "fwd" and not (is_fp32 or is_wide or is_large) and max_seqlen > 32:
        default = settings(64, 32, 4, 2)
    small = _TILES[kernel, False, False]
    candidates = [default] if is_fp32 or not is_large else [default, settings(*small)]
    if kernel == "fwd" and is_large:
        candidates += [settings(64, 32, 4, 2), settings(64, 64, 4, 2)]
    return default, candidates


def _constants(q, pos_key, pos_query, dropout_p):
    """The compile-time constants of every kernel except its block sizes."""
    return dict(HAS_KEY=pos_key is not None, HAS_QUERY=pos_query is not None) | constants_of(q, dropout_p)


def _key(q, max_seqlen, constants):
    """The key for `launch`: "bf16 K64 S512 c2p p2c dropout"."""
    terms = {"c2p": "HAS_KEY", "p2c": "HAS_QUERY", "dropout": "HAS_DROPOUT"}
    return key_of(q, max_seqlen, *(name for name, flag in terms.items() if constants[flag]))


def _furthest(max_seqlen):
    """The largest distance that a tile in a sequence can look up: tiles have at most 128 rows."""
    return triton.cdiv(max_seqlen, 128) * 128 + 128


def disentangled_attention_fwd(
    q, k, v, pos_key, pos_query, cu_seqlens, max_seqlen, position_buckets, max_relative_positions, scale, dropout_p,
    seed, offset,
):  # fmt: skip
    """(out [T, H, K], lse fp32 [2 or 1, H, T]: see `store_lse`)."""
    q, k, v = unpacked(q, k, v)
    cu_seqlens = unit_columns(cu_seqlens)
    T, H, _ = q.shape
    B = cu_seqlens.shape[0] - 1
    out, lse = empty_results(q)
    if B * H == 0:
        return out.zero_(), lse.zero_()
    tables = [q if x is None else unit_columns(x) for x in (pos_key, pos_query)]
    middle = _furthest(max_seqlen)
    index = device_table(q.device, distance_rows, middle, position_buckets, max_relative_positions)
    _, *scalars = scalars_of(scale, dropout_p, offset)
    constants = _constants(q, pos_key, pos_query, dropout_p)

    def run(settings):
        tiles = max(triton.cdiv(max_seqlen, settings["BLOCK_M"]), 1)
        _disentangled_attention_fwd_kernel[(B * H * tiles,)](
            q, k, v, *tables, index, cu_seqlens, seed, out, lse, B, T, H, tiles, middle,
            *strides(q, k, v, out, *tables), *scalars, **constants, **settings,
        )  # fmt: skip

    settings = _settings("fwd", q, max_seqlen, constants["HAS_DROPOUT"])
    launch(run, "disentangled_attention_fwd", _key(q, max_seqlen, constants), *settings)
    return out, lse


def disentangled_attention_bwd(
    dout, q, k, v, pos_key, pos_query, out, lse, cu_seqlens, max_seqlen, position_buckets,
    max_relative_positions, scale, dropout_p, seed, offset, wants_tables,
):  # fmt: skip
    """The gradients of q, k, v, pos_key, pos_query, packed as the arguments: a list without those that are None.

    With `wants_tables` False it has no gradients of pos_key and pos_query.
    """
    grads, (dq, dk, dv) = empty_gradients(q, k, v)
    dpos_key, dpos_query = (
        None if x is None or not wants_tables else torch.empty(x.shape, dtype=x.dtype, device=x.device)
        for x in (pos_key, pos_query)
    )
    dtables = [x for x in (dpos_key, dpos_query) if x is not None]
    q, k, v = unpacked(q, k, v)
    cu_seqlens = unit_columns(cu_seqlens)
    dout = unit_columns(dout)
    T, H, K = q.shape
    B = cu_seqlens.shape[0] - 1
    if B * H == 0:
        return [x.zero_() for x in grads + dtables]
    tables = [q if x is None else unit_columns(x) for x in (pos_key, pos_query)]
    middle = _furthest(max_seqlen)
    index = device_table(q.device, distance_rows, middle, position_buckets, max_relative_positions)
    operands, positions = strides(dout, q, k, v), strides(*tables)
    scalars = scalars_of(scale, dropout_p, offset)
    constants = _constants(q, pos_key, pos_query, dropout_p)
    key = _key(q, max_seqlen, constants)
    delta = torch.empty(H, T, dtype=torch.float32, device=q.device)

    def run_dq(settings):
        tiles = max(triton.cdiv(max_seqlen, settings["BLOCK"]), 1)
        _disentangled_attention_dq_kernel[(B * H * tiles,)](
            dout, q, k, v, out, *tables, index, lse, cu_seqlens, seed, dq, delta, B, T, H, tiles, middle,
            *operands, *strides(out), *positions, *strides(dq), *scalars, **constants, **settings,
        )  # fmt: skip

    def run_dkdv(settings):
        tiles = max(triton.cdiv(max_seqlen, settings["BLOCK"]), 1)
        _disentangled_attention_dkdv_kernel[(B * H * tiles,)](
            dout, q, k, v, *tables, index, lse, delta, cu_seqlens, seed, dk, dv, B, T, H, tiles, middle,
            *operands, *positions, *strides(dk, dv), *scalars, **constants, **settings,
        )  # fmt: skip

    def run_dtable(settings, dtable):
        block = settings["BLOCK"]
        tiles = max(triton.cdiv(max_seqlen, block), 1)
        # two programs per multiprocessor
        groups = min(max(2 * multiprocessors() // (H * tiles), 1), B)
        dband = torch.empty(2 * tiles, groups, H, 2 * block, K, dtype=torch.float32, device=q.device)
        _disentangled_attention_dband_kernel[(H * tiles * groups,)](
            dout, q, k, v, *tables, index, lse, delta, cu_seqlens, seed, dband, B, T, H, tiles, groups, middle,
            *operands, *positions, *scalars, **constants, OF_KEY=dtable is dpos_key, **settings,
        )  # fmt: skip
        P = dtable.shape[0]
        bounds = device_table(q.device, row_bounds, tiles * block, block, P, position_buckets, max_relative_positions)
        _disentangled_attention_dtable_kernel[(P * H,)](
            dband, bounds, dtable, H, tiles, groups, K=K, BLOCK=block, BLOCK_G=triton.next_power_of_2(groups),
            BLOCK_K=constants["BLOCK_K"], num_warps=1,
        )  # fmt: skip

    def settings(kernel):
        return _settings(kernel, q, max_seqlen, constants["HAS_DROPOUT"])

    launch(run_dq, "disentangled_attention_dq", key, *settings("dq"))
    launch(run_dkdv, "disentangled_attention_dkdv", key, *settings("dkdv"))
    for dtable in dtables:
        run = functools.partial(run_dtable, dtable=dtable)
        table = "dpos_key" if dtable is dpos_key else "dpos_query"
        launch(run, f"disentangled_attention_{table}", key, *settings("dband"))
    return grads + dtables


def _disentangled_attention_fwd_fake(
    q, k, v, pos_key, pos_query, cu_seqlens, max_seqlen, position_buckets, max_relative_positions, scale, dropout_p,
    seed, offset,
):  # fmt: skip
    return empty_results(q)


def _disentangled_attention_bwd_fake(
    dout, q, k, v, pos_key, pos_query, out, lse, cu_seqlens, max_seqlen, position_buckets,
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
    f"disentangled_attention_bwd(Tensor dout, {_INPUTS}, Tensor out, Tensor lse, {_TAIL}, bool wants_tables) "
    "-> Tensor[]",
    disentangled_attention_bwd,
    _disentangled_attention_bwd_fake,
)


class DisentangledAttentionFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, pos_key, pos_query, cu_seqlens, *rest):
        out, lse = _disentangled_attention_fwd(q, k, v, pos_key, pos_query, cu_seqlens, *rest)
        *scalars, seed, offset = rest
        ctx.save_for_backward(q, k, v, pos_key, pos_query, out, lse, cu_seqlens, seed)
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

    float16, bfloat16 or float32, the same for all; head sizes up to 128. Raises TypeError and ValueError;
    `ops.disentangled_attention` checks the other arguments.
    """
    check_operands("q, k, v, pos_key, pos_query", q, k, v, pos_key, pos_query)
    terms = (pos_key is not None) + (pos_query is not None)
    scale = (q.shape[-1] * (1 + terms)) ** -0.5 if scale is None else scale
    return DisentangledAttentionFunction.apply(
        q, k, v, pos_key, pos_query, cu_seqlens, max_seqlen, position_buckets, max_relative_positions, scale, dropout_p,
        seed, offset,
    )  # fmt: skip
