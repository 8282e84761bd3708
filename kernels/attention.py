"""Bidirectional softmax attention over packed sequences, dropout inside.

    p   = softmax(q kᵀ · scale)              within each sequence, per head; within `window` positions of the query
    out = (keep * p / (1 - dropout_p)) v

PyTorch writes and reads the S x S scores and probabilities, at least 4*H*S*S elements per sequence, and also computes
or masks padding. Fused: read q, k, v, write out, 4*M*H*K elements, and one fp32 log-sum-exp per row and head (two in
fp32). The short backward reads q, k, v, dout and the log-sum-exp and writes dq, dk, dv: 7*M*H*K. The tiled backward has
two kernels. They read these four twice and out once, and pass another fp32 per row and head: 12*M*H*K. Tiled kernels
read the operands of their loop once per tile, from cache after the first time.

The backward recomputes the probabilities from the log-sum-exp and draws the dropout mask again from (seed, offset).

There are two paths. Short: one program has a whole sequence and head on chip, softmax takes one pass, and one backward
kernel computes dq, dk and dv. Tiled, for longer sequences: an online softmax (Milakov & Gimelshein 2018, Dao et al.
2022) over tiles of keys. Its backward computes dq in one kernel, over tiles of keys, and dk and dv in another, over
tiles of query rows. So there are no atomics, and the same inputs give the same bits.

Several query heads may share a head of keys and values (grouped-query attention, Ainslie et al. 2023): GROUP of them.
Their dk and dv are written in fp32 and summed by PyTorch.

The programs also write zeros to the rows past the last sequence: the host does not know how many there are.

Letters: B sequences, M query rows, T rows of k and v, H heads, K head size. Tiles have BLOCK_M query rows and BLOCK_N
keys.
"""

import torch
import triton
import triton.language as tl

from ._attention import (
    at,
    exponent,
    load_lse,
    load_tile,
    opaque_zero,
    probabilities,
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
    query_tiles,
    scalars_of,
    short_settings,
    strides,
    tiled_settings,
    unpacked,
)
from ._launch import differentiable_once, launch, register, unit_columns
from ._math import attention_keep_mask


@triton.jit
def _visible(m, n, length, window, HAS_WINDOW: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Whether the keys from `n` on exist and the query rows from `m` on see them: [BLOCK_M or 1, BLOCK_N]."""
    offs_n = n + tl.arange(0, BLOCK_N)
    if HAS_WINDOW:
        # one comparison of each key's position, counted from the first key that the row sees
        first = m + tl.arange(0, BLOCK_M) - window
        count = tl.maximum(tl.minimum(2 * window + 1, length - first), 0)
        return (offs_n[None, :] - first[:, None]).to(tl.uint32, bitcast=True) < count[:, None].to(tl.uint32)
    else:
        return offs_n[None, :] < length


@triton.jit
def _attention_short_fwd_kernel(
    q_ptr, k_ptr, v_ptr, cu_seqlens_q_ptr, cu_seqlens_ptr, seed_ptr,  # inputs
    out_ptr, lse_ptr,                                                 # outputs
    B, M, H,
    stride_qm, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh, stride_om, stride_oh,
    scale_log2, window, offset, threshold, keep_scale,
    HAS_DROPOUT: tl.constexpr, HAS_WINDOW: tl.constexpr, IS_FP32: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr, GROUP: tl.constexpr,
    K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0) // H
    h = tl.program_id(0) % H
    lse_ptr = at(lse_ptr, 0, 1, h, M)

    end = tl.load(cu_seqlens_q_ptr + B)
    zero_slack(out_ptr, stride_om, h, stride_oh, end, M, b, B, K, BLOCK_M, BLOCK_K)
    zero_slack_of_lse(lse_ptr, H, M, end, b, B, IS_FP32, BLOCK_M)

    start_q, rows = sequence(cu_seqlens_q_ptr, b)
    start, length = sequence(cu_seqlens_ptr, b)
    if rows == 0:
        return

    q = load_tile(q_ptr, start_q, stride_qm, h, stride_qh, rows, K, BLOCK_M, BLOCK_K, UPCAST)
    k = load_tile(k_ptr, start, stride_kt, h // GROUP, stride_kh, length, K, BLOCK_N, BLOCK_K, UPCAST)
    v = load_tile(v_ptr, start, stride_vt, h // GROUP, stride_vh, length, K, BLOCK_N, BLOCK_K, UPCAST)
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    s = tl.where(_visible(0, 0, length, window, HAS_WINDOW, BLOCK_M, BLOCK_N), s, float("-inf"))
    # the two finite bounds only matter for a sequence without keys, whose rows give 0
    highest = tl.maximum(tl.max(s, 1), -1e30) * (1.0 if IS_FP32 else scale_log2)
    p = tl.exp2(exponent(s, scale_log2, highest, IS_FP32))
    total = tl.maximum(tl.sum(p, 1), 1e-30)
    store_lse(lse_ptr + start_q, rows, H, M, highest, total, IS_FP32, BLOCK_M)
    if HAS_DROPOUT:
        row = start_q + tl.arange(0, BLOCK_M)
        keep = attention_keep_mask(row, h, 0, tl.load(seed_ptr), offset, threshold, BLOCK_N)
        p = tl.where(keep, p, opaque_zero(keep_scale))
    out = tl.dot(p.to(v.dtype), v, input_precision=PRECISION) * (keep_scale / total)[:, None]
    store_tile(out_ptr, start_q, stride_om, h, stride_oh, rows, out, K, BLOCK_M, BLOCK_K)


@triton.jit
def _sequence_of_program(cu_seqlens_ptr, B, H, tiles, BLOCK: tl.constexpr, IS_BOUNDED: tl.constexpr):
    """(sequence, head, tile, number of this program among its head's, number of the head's programs).

    Tiles of one sequence and head have adjacent programs, since they read the same rows. IS_BOUNDED: no sequence has
    more than `tiles` tiles, and each gets `tiles` programs. Else a head has `tiles` programs, and those of sequence b
    start at cu_seqlens[b] // BLOCK + b, which gives it enough of them; bisection finds the sequence.
    """
    pid = tl.program_id(0)
    tile = pid % tiles
    if IS_BOUNDED:
        b = pid // tiles // H
        return b, pid // tiles % H, tile, b * tiles + tile, B * tiles
    else:
        low = tl.zeros([], tl.int32)
        high = low + (B - 1)
        while low < high:
            middle = (low + high + 1) // 2
            is_before = tl.load(cu_seqlens_ptr + middle) // BLOCK + middle <= tile
            low = tl.where(is_before, middle, low)
            high = tl.where(is_before, high, middle - 1)
        return low, pid // tiles, tile - (tl.load(cu_seqlens_ptr + low) // BLOCK + low), tile, tiles


@triton.jit
def _range(first, count, length, window, HAS_WINDOW: tl.constexpr, BLOCK: tl.constexpr):
    """The tiles of BLOCK keys that rows `first` to `first + count` see: (start, whole, whole_end, end).

    Some row sees some key of the tiles from `start` to `end`. Every row sees every key of those from `whole` to
    `whole_end`.
    """
    if HAS_WINDOW:
        start = tl.maximum(first - window, 0) // BLOCK * BLOCK
        end = tl.minimum(first + count + window, length)
        whole = tl.maximum((first + count - 1 - window + BLOCK - 1) // BLOCK * BLOCK, start)
        whole_end = tl.maximum(tl.minimum(first + window + 1, length) // BLOCK * BLOCK, whole)
        return start, whole, whole_end, end
    else:
        return 0, 0, length // BLOCK * BLOCK, length


@triton.jit
def _edges(start, whole, whole_end, end, BLOCK: tl.constexpr):
    """(number of partial tiles before the whole ones, number of partial tiles), from `_range`."""
    before = (tl.minimum(whole, end) - start + BLOCK - 1) // BLOCK
    return before, before + tl.maximum((end - whole_end + BLOCK - 1) // BLOCK, 0)


@triton.jit
def _edge(i, before, start, whole_end, BLOCK: tl.constexpr):
    """The first key of partial tile i."""
    return tl.where(i < before, start + i * BLOCK, whole_end + (i - before) * BLOCK)


@triton.jit
def _attend(
    highest, total, acc, q, k_ptr, v_ptr, stride_kt, stride_vt, n, length,
    row, m, h, window, seed, scale_log2, offset, threshold, keep_scale,
    HAS_DROPOUT: tl.constexpr, HAS_WINDOW: tl.constexpr, IS_FP32: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, IS_WHOLE: tl.constexpr,
):  # fmt: skip
    """Update the running maximum, sum and weighted values of the query rows from `m` with the keys from `n` on."""
    k = load_tile(k_ptr, n, stride_kt, 0, 0, length - n, K, BLOCK_N, BLOCK_K, UPCAST, IS_WHOLE)
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    if not IS_WHOLE:
        s = tl.where(_visible(m, n, length, window, HAS_WINDOW, BLOCK_M, BLOCK_N), s, float("-inf"))
    higher = tl.maximum(highest, tl.max(s, 1) * (1.0 if IS_FP32 else scale_log2))
    alpha = tl.exp2((highest - higher) * scale_log2 if IS_FP32 else highest - higher)
    p = tl.exp2(exponent(s, scale_log2, higher, IS_FP32))
    total = total * alpha + tl.sum(p, 1)
    if HAS_DROPOUT:
        p = tl.where(attention_keep_mask(row, h, n, seed, offset, threshold, BLOCK_N), p, opaque_zero(keep_scale))
    v = load_tile(v_ptr, n, stride_vt, 0, 0, length - n, K, BLOCK_N, BLOCK_K, UPCAST, IS_WHOLE)
    acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision=PRECISION)
    return higher, total, acc


@triton.jit
def _attention_tiled_fwd_kernel(
    q_ptr, k_ptr, v_ptr, cu_seqlens_q_ptr, cu_seqlens_ptr, seed_ptr,  # inputs
    out_ptr, lse_ptr,                                                 # outputs
    B, M, H, tiles,
    stride_qm, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh, stride_om, stride_oh,
    scale_log2, window, offset, threshold, keep_scale,
    HAS_DROPOUT: tl.constexpr, HAS_WINDOW: tl.constexpr, IS_FP32: tl.constexpr, IS_BOUNDED: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr, GROUP: tl.constexpr,
    K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PEEL: tl.constexpr,
):  # fmt: skip
    b, h, tile, program, programs = _sequence_of_program(cu_seqlens_q_ptr, B, H, tiles, BLOCK_M, IS_BOUNDED)
    lse_ptr = at(lse_ptr, 0, 1, h, M)

    end = tl.load(cu_seqlens_q_ptr + B)
    zero_slack(out_ptr, stride_om, h, stride_oh, end, M, program, programs, K, BLOCK_M, BLOCK_K)
    zero_slack_of_lse(lse_ptr, H, M, end, program, programs, IS_FP32, BLOCK_M)

    m = tile * BLOCK_M
    start_q, rows = sequence(cu_seqlens_q_ptr, b, m)
    start, length = sequence(cu_seqlens_ptr, b)
    if rows <= 0:
        return

    k_ptr = at(k_ptr, start, stride_kt, h // GROUP, stride_kh)
    v_ptr = at(v_ptr, start, stride_vt, h // GROUP, stride_vh)
    seed = tl.load(seed_ptr) if HAS_DROPOUT else 0
    row = start_q + tl.arange(0, BLOCK_M)
    q = load_tile(q_ptr, start_q, stride_qm, h, stride_qh, rows, K, BLOCK_M, BLOCK_K, UPCAST)
    # finite, so that query rows of a sequence without keys give 0
    highest = tl.full([BLOCK_M], -1e30, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)
    first, whole, whole_end, last = _range(m, BLOCK_M, length, window, HAS_WINDOW, BLOCK_N)
    if PEEL:
        for n in range(whole, whole_end, BLOCK_N):
            highest, total, acc = _attend(
                highest, total, acc, q, k_ptr, v_ptr, stride_kt, stride_vt, n, length,
                row, m, h, window, seed, scale_log2, offset, threshold, keep_scale,
                HAS_DROPOUT, HAS_WINDOW, IS_FP32, PRECISION, UPCAST, K, BLOCK_M, BLOCK_N, BLOCK_K, True,
            )  # fmt: skip
        before, edges = _edges(first, whole, whole_end, last, BLOCK_N)
        for i in tl.range(0, edges, num_stages=1):
            highest, total, acc = _attend(
                highest, total, acc, q, k_ptr, v_ptr, stride_kt, stride_vt,
                _edge(i, before, first, whole_end, BLOCK_N), length,
                row, m, h, window, seed, scale_log2, offset, threshold, keep_scale,
                HAS_DROPOUT, HAS_WINDOW, IS_FP32, PRECISION, UPCAST, K, BLOCK_M, BLOCK_N, BLOCK_K, False,
            )  # fmt: skip
    else:
        for n in range(first, last, BLOCK_N):
            highest, total, acc = _attend(
                highest, total, acc, q, k_ptr, v_ptr, stride_kt, stride_vt, n, length,
                row, m, h, window, seed, scale_log2, offset, threshold, keep_scale,
                HAS_DROPOUT, HAS_WINDOW, IS_FP32, PRECISION, UPCAST, K, BLOCK_M, BLOCK_N, BLOCK_K, False,
            )  # fmt: skip
    total = tl.maximum(total, 1e-30)
    store_lse(lse_ptr + start_q, rows, H, M, highest, total, IS_FP32, BLOCK_M)
    out = acc * (keep_scale / total)[:, None]
    store_tile(out_ptr, start_q, stride_om, h, stride_oh, rows, out, K, BLOCK_M, BLOCK_K)


@triton.jit
def _attention_short_bwd_kernel(
    dout_ptr, q_ptr, k_ptr, v_ptr, lse_ptr, cu_seqlens_q_ptr, cu_seqlens_ptr, seed_ptr,  # inputs
    dq_ptr, dk_ptr, dv_ptr,                                                              # outputs
    B, M, T, H,
    stride_dom, stride_doh, stride_qm, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh,
    stride_dqm, stride_dqh, stride_dkt, stride_dkh, stride_dvt, stride_dvh,
    scale, scale_log2, window, offset, threshold, keep_scale,
    HAS_DROPOUT: tl.constexpr, HAS_WINDOW: tl.constexpr, IS_FP32: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr, GROUP: tl.constexpr,
    K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0) // H
    h = tl.program_id(0) % H

    end = tl.load(cu_seqlens_ptr + B)
    zero_slack(dk_ptr, stride_dkt, h, stride_dkh, end, T, b, B, K, BLOCK_N, BLOCK_K)
    zero_slack(dv_ptr, stride_dvt, h, stride_dvh, end, T, b, B, K, BLOCK_N, BLOCK_K)
    zero_slack(dq_ptr, stride_dqm, h, stride_dqh, tl.load(cu_seqlens_q_ptr + B), M, b, B, K, BLOCK_M, BLOCK_K)

    start_q, rows = sequence(cu_seqlens_q_ptr, b)
    start, length = sequence(cu_seqlens_ptr, b)
    if rows + length == 0:
        return

    q = load_tile(q_ptr, start_q, stride_qm, h, stride_qh, rows, K, BLOCK_M, BLOCK_K, UPCAST)
    k = load_tile(k_ptr, start, stride_kt, h // GROUP, stride_kh, length, K, BLOCK_N, BLOCK_K, UPCAST)
    v = load_tile(v_ptr, start, stride_vt, h // GROUP, stride_vh, length, K, BLOCK_N, BLOCK_K, UPCAST)
    dout = load_tile(dout_ptr, start_q, stride_dom, h, stride_doh, rows, K, BLOCK_M, BLOCK_K, UPCAST)
    highest, log_total = load_lse(at(lse_ptr, start_q, 1, h, M), rows, H, M, IS_FP32, BLOCK_M)

    s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    p = probabilities(s, scale_log2, highest, log_total, IS_FP32)
    p = tl.where(_visible(0, 0, length, window, HAS_WINDOW, BLOCK_M, BLOCK_N), p, 0.0)
    dp = tl.dot(dout, tl.trans(v), input_precision=PRECISION)
    if HAS_DROPOUT:
        row = start_q + tl.arange(0, BLOCK_M)
        keep = attention_keep_mask(row, h, 0, tl.load(seed_ptr), offset, threshold, BLOCK_N)
        dp = tl.where(keep, dp, 0.0)
        kept = tl.where(keep, p, opaque_zero(keep_scale)).to(dout.dtype)
    else:
        kept = p.to(dout.dtype)
    # rowsum(dout * out) / keep_scale, without reading out
    delta = tl.sum(p * dp, 1)
    ds = (p * (dp - delta[:, None])).to(q.dtype)
    # dq first: after it p and ds are needed in 16 bits only, which saves 60 registers at S = 128
    dq = tl.dot(ds, k, input_precision=PRECISION) * (scale * keep_scale)
    store_tile(dq_ptr, start_q, stride_dqm, h, stride_dqh, rows, dq, K, BLOCK_M, BLOCK_K)
    dv = tl.dot(tl.trans(kept), dout, input_precision=PRECISION) * keep_scale
    store_tile(dv_ptr, start, stride_dvt, h, stride_dvh, length, dv, K, BLOCK_N, BLOCK_K)
    dk = tl.dot(tl.trans(ds), q, input_precision=PRECISION) * (scale * keep_scale)
    store_tile(dk_ptr, start, stride_dkt, h, stride_dkh, length, dk, K, BLOCK_N, BLOCK_K)


@triton.jit
def _add_dq(
    dq, q, dout, highest, log_total, delta, k_ptr, v_ptr, stride_kt, stride_vt, n, length,
    row, m, h, window, seed, scale_log2, offset, threshold,
    HAS_DROPOUT: tl.constexpr, HAS_WINDOW: tl.constexpr, IS_FP32: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, IS_WHOLE: tl.constexpr,
):  # fmt: skip
    """dq / (scale * keep_scale) plus the contribution of the keys from `n` on."""
    k = load_tile(k_ptr, n, stride_kt, 0, 0, length - n, K, BLOCK_N, BLOCK_K, UPCAST, IS_WHOLE)
    v = load_tile(v_ptr, n, stride_vt, 0, 0, length - n, K, BLOCK_N, BLOCK_K, UPCAST, IS_WHOLE)
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    p = probabilities(s, scale_log2, highest, log_total, IS_FP32)
    if not IS_WHOLE:
        p = tl.where(_visible(m, n, length, window, HAS_WINDOW, BLOCK_M, BLOCK_N), p, 0.0)
    dp = tl.dot(dout, tl.trans(v), input_precision=PRECISION)
    if HAS_DROPOUT:
        dp = tl.where(attention_keep_mask(row, h, n, seed, offset, threshold, BLOCK_N), dp, 0.0)
    ds = (p * (dp - delta[:, None])).to(k.dtype)
    return tl.dot(ds, k, dq, input_precision=PRECISION)


@triton.jit
def _attention_tiled_dq_kernel(
    dout_ptr, q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, cu_seqlens_q_ptr, cu_seqlens_ptr, seed_ptr,  # inputs
    dq_ptr, delta_ptr,                                                                            # outputs
    B, M, H, tiles,
    stride_dom, stride_doh, stride_qm, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh, stride_om, stride_oh,
    stride_dqm, stride_dqh,
    scale, scale_log2, window, offset, threshold, keep_scale,
    HAS_DROPOUT: tl.constexpr, HAS_WINDOW: tl.constexpr, IS_FP32: tl.constexpr, IS_BOUNDED: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr, GROUP: tl.constexpr,
    K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PEEL: tl.constexpr,
):  # fmt: skip
    """dq, and delta [H, M] = rowsum(dout * out) / keep_scale for the kernel below."""
    b, h, tile, program, programs = _sequence_of_program(cu_seqlens_q_ptr, B, H, tiles, BLOCK_M, IS_BOUNDED)
    offs_m = tl.arange(0, BLOCK_M)

    end = tl.load(cu_seqlens_q_ptr + B)
    zero_slack(dq_ptr, stride_dqm, h, stride_dqh, end, M, program, programs, K, BLOCK_M, BLOCK_K)

    m = tile * BLOCK_M
    start_q, rows = sequence(cu_seqlens_q_ptr, b, m)
    start, length = sequence(cu_seqlens_ptr, b)
    if rows <= 0:
        return

    k_ptr = at(k_ptr, start, stride_kt, h // GROUP, stride_kh)
    v_ptr = at(v_ptr, start, stride_vt, h // GROUP, stride_vh)
    q = load_tile(q_ptr, start_q, stride_qm, h, stride_qh, rows, K, BLOCK_M, BLOCK_K, UPCAST)
    dout = load_tile(dout_ptr, start_q, stride_dom, h, stride_doh, rows, K, BLOCK_M, BLOCK_K, UPCAST)
    out = load_tile(out_ptr, start_q, stride_om, h, stride_oh, rows, K, BLOCK_M, BLOCK_K, UPCAST)
    delta = tl.sum(dout.to(tl.float32) * out.to(tl.float32), 1) / keep_scale
    tl.store(at(delta_ptr, start_q, 1, h, M) + offs_m, delta, mask=offs_m < rows)
    highest, log_total = load_lse(at(lse_ptr, start_q, 1, h, M), rows, H, M, IS_FP32, BLOCK_M)

    seed = tl.load(seed_ptr) if HAS_DROPOUT else 0
    row = start_q + offs_m
    dq = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)
    first, whole, whole_end, last = _range(m, BLOCK_M, length, window, HAS_WINDOW, BLOCK_N)
    if PEEL:
        for n in range(whole, whole_end, BLOCK_N):
            dq = _add_dq(
                dq, q, dout, highest, log_total, delta, k_ptr, v_ptr, stride_kt, stride_vt, n, length,
                row, m, h, window, seed, scale_log2, offset, threshold,
                HAS_DROPOUT, HAS_WINDOW, IS_FP32, PRECISION, UPCAST, K, BLOCK_M, BLOCK_N, BLOCK_K, True,
            )  # fmt: skip
        before, edges = _edges(first, whole, whole_end, last, BLOCK_N)
        for i in tl.range(0, edges, num_stages=1):
            dq = _add_dq(
                dq, q, dout, highest, log_total, delta, k_ptr, v_ptr, stride_kt, stride_vt,
                _edge(i, before, first, whole_end, BLOCK_N), length,
                row, m, h, window, seed, scale_log2, offset, threshold,
                HAS_DROPOUT, HAS_WINDOW, IS_FP32, PRECISION, UPCAST, K, BLOCK_M, BLOCK_N, BLOCK_K, False,
            )  # fmt: skip
    else:
        for n in range(first, last, BLOCK_N):
            dq = _add_dq(
                dq, q, dout, highest, log_total, delta, k_ptr, v_ptr, stride_kt, stride_vt, n, length,
                row, m, h, window, seed, scale_log2, offset, threshold,
                HAS_DROPOUT, HAS_WINDOW, IS_FP32, PRECISION, UPCAST, K, BLOCK_M, BLOCK_N, BLOCK_K, False,
            )  # fmt: skip
    dq *= scale * keep_scale
    store_tile(dq_ptr, start_q, stride_dqm, h, stride_dqh, rows, dq, K, BLOCK_M, BLOCK_K)


@triton.jit
def _attention_tiled_dkdv_kernel(
    dout_ptr, q_ptr, k_ptr, v_ptr, lse_ptr, delta_ptr, cu_seqlens_q_ptr, cu_seqlens_ptr, seed_ptr,  # inputs
    dk_ptr, dv_ptr,                                                                                 # outputs
    B, M, T, H, tiles,
    stride_dom, stride_doh, stride_qm, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh,
    stride_dkt, stride_dkh, stride_dvt, stride_dvh,
    scale, scale_log2, window, offset, threshold, keep_scale,
    HAS_DROPOUT: tl.constexpr, HAS_WINDOW: tl.constexpr, IS_FP32: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr, GROUP: tl.constexpr,
    K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    IS_TRANSPOSED: tl.constexpr, WAIT_DK: tl.constexpr,
):  # fmt: skip
    """dk and dv. IS_TRANSPOSED: scores are [BLOCK_N, BLOCK_M], and are operands without passing shared memory. Not with
    dropout, whose mask has the layout of [BLOCK_M, BLOCK_N]. WAIT_DK: see the loop."""
    tile = tl.program_id(0) % tiles
    h = tl.program_id(0) // tiles % H
    b = tl.program_id(0) // tiles // H
    offs_m = tl.arange(0, BLOCK_M)

    end = tl.load(cu_seqlens_ptr + B)
    zero_slack(dk_ptr, stride_dkt, h, stride_dkh, end, T, b * tiles + tile, B * tiles, K, BLOCK_N, BLOCK_K)
    zero_slack(dv_ptr, stride_dvt, h, stride_dvh, end, T, b * tiles + tile, B * tiles, K, BLOCK_N, BLOCK_K)

    n = tile * BLOCK_N
    start_q, rows = sequence(cu_seqlens_q_ptr, b)
    start, length = sequence(cu_seqlens_ptr, b, n)
    if length <= 0:
        return

    dout_ptr = at(dout_ptr, start_q, stride_dom, h, stride_doh)
    q_ptr = at(q_ptr, start_q, stride_qm, h, stride_qh)
    k_ptr = at(k_ptr, start, stride_kt, h // GROUP, stride_kh)
    v_ptr = at(v_ptr, start, stride_vt, h // GROUP, stride_vh)
    lse_ptr = at(lse_ptr, start_q, 1, h, M)
    delta_ptr = at(delta_ptr, start_q, 1, h, M)
    k = load_tile(k_ptr, 0, stride_kt, 0, 0, length, K, BLOCK_N, BLOCK_K, UPCAST)
    v = load_tile(v_ptr, 0, stride_vt, 0, 0, length, K, BLOCK_N, BLOCK_K, UPCAST)
    seed = tl.load(seed_ptr) if HAS_DROPOUT else 0
    dk = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    first, _, _, last = _range(n, BLOCK_N, rows, window, HAS_WINDOW, BLOCK_M)
    for m in range(first, last, BLOCK_M):
        if WAIT_DK:
            # multiply by a 1 that the compiler cannot see, so that Triton waits for dk. With the products of dv and
            # dk both in flight at the start of an iteration, ptxas on Hopper serialises all products
            dk *= 1.0 + opaque_zero(keep_scale)
        q = load_tile(q_ptr, m, stride_qm, 0, 0, rows - m, K, BLOCK_M, BLOCK_K, UPCAST)
        dout = load_tile(dout_ptr, m, stride_dom, 0, 0, rows - m, K, BLOCK_M, BLOCK_K, UPCAST)
        highest, log_total = load_lse(lse_ptr + m, rows - m, H, M, IS_FP32, BLOCK_M)
        delta = tl.load(delta_ptr + m + offs_m, mask=m + offs_m < rows, other=0.0)
        if IS_TRANSPOSED:
            tl.static_assert(not HAS_DROPOUT)
            s = tl.dot(k, tl.trans(q), input_precision=PRECISION)
            p = probabilities(s, scale_log2, highest, log_total, IS_FP32, 0)
            if HAS_WINDOW:
                # keys and query rows swapped: the window is symmetric, and rows that do not exist have p = 0
                p = tl.where(_visible(n, m, rows, window, True, BLOCK_N, BLOCK_M), p, 0.0)
            dv = tl.dot(p.to(dout.dtype), dout, dv, input_precision=PRECISION)
            dp = tl.dot(v, tl.trans(dout), input_precision=PRECISION)
            dk = tl.dot((p * (dp - delta[None, :])).to(q.dtype), q, dk, input_precision=PRECISION)
        else:
            s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
            p = probabilities(s, scale_log2, highest, log_total, IS_FP32)
            if HAS_WINDOW:
                p = tl.where(_visible(m, n, n + length, window, True, BLOCK_M, BLOCK_N), p, 0.0)
            # else no mask: keys that do not exist only affect their own rows of dk and dv, which are not stored
            dp = tl.dot(dout, tl.trans(v), input_precision=PRECISION)
            if HAS_DROPOUT:
                keep = attention_keep_mask(start_q + m + offs_m, h, n, seed, offset, threshold, BLOCK_N)
                dp = tl.where(keep, dp, 0.0)
                kept = tl.where(keep, p, opaque_zero(keep_scale)).to(dout.dtype)
            else:
                kept = p.to(dout.dtype)
            dv = tl.dot(tl.trans(kept), dout, dv, input_precision=PRECISION)
            ds = (p * (dp - delta[:, None])).to(q.dtype)
            dk = tl.dot(tl.trans(ds), q, dk, input_precision=PRECISION)
    dk *= scale * keep_scale
    dv *= keep_scale
    store_tile(dk_ptr, start, stride_dkt, h, stride_dkh, length, dk, K, BLOCK_N, BLOCK_K)
    store_tile(dv_ptr, start, stride_dvt, h, stride_dvh, length, dv, K, BLOCK_N, BLOCK_K)


def _arguments(q, k, max_seqlen, scale, dropout_p, window, offset):
    """(scalar arguments after the strides, compile-time constants of every kernel except its block sizes)."""
    has_window = 0 <= window < max_seqlen - 1
    scale, scale_log2, *rest = scalars_of(scale, dropout_p, offset)
    scalars = (scale, scale_log2, window if has_window else 0, *rest)
    return scalars, dict(HAS_WINDOW=has_window, GROUP=q.shape[1] // k.shape[1]) | constants_of(q, dropout_p)


def _key(q, constants, longest, *more):
    """The key for `launch`: "bf16 K64 S512 dropout window"."""
    return key_of(q, longest, *more, *(name for name in ("dropout", "window") if constants[f"HAS_{name.upper()}"]))


def attention_fwd(
    q, k, v, cu_seqlens_q, cu_seqlens, max_seqlen_q, max_seqlen, scale, dropout_p, seed, offset, window=-1
):
    """(out [M, H, K], lse fp32 [1 or 2, H, M]): in 16 bits lse[0] is log2 of the sum of exp(scaled scores); in fp32 lse
    is (unscaled maximum, log2 of the sum relative to it)."""
    q, k, v = unpacked(q, k, v)
    cu_seqlens = unit_columns(cu_seqlens)
    cu_seqlens_q = cu_seqlens if cu_seqlens_q is None else unit_columns(cu_seqlens_q)
    M, H, _ = q.shape
    B = cu_seqlens.shape[0] - 1
    out, lse = empty_results(q)
    if B * H == 0:
        return out.zero_(), lse.zero_()
    (_, *scalars), constants = _arguments(q, k, max_seqlen, scale, dropout_p, window, offset)
    arguments = (q, k, v, cu_seqlens_q, cu_seqlens, seed, out, lse, B, M, H)
    operands = strides(q, k, v, out)
    most_rows = M if max_seqlen_q < 0 else max_seqlen_q
    short = short_settings(q, most_rows, max_seqlen, True)
    if short:

        def run(settings):
            _attention_short_fwd_kernel[(B * H,)](*arguments, *operands, *scalars, **constants, **settings)

        launch(run, "attention_short_fwd", _key(q, constants, max(most_rows, max_seqlen)), *short)
        return out, lse

    def run(settings):
        tiles, is_bounded = query_tiles(M, B, max_seqlen_q, settings["BLOCK_M"])
        grid = (H * tiles * (B if is_bounded else 1),)
        _attention_tiled_fwd_kernel[grid](
            *arguments, tiles, *operands, *scalars, **constants, IS_BOUNDED=is_bounded, **settings
        )

    key = _key(q, constants, max_seqlen, *["few rows"] * (most_rows <= 64))
    launch(run, "attention_tiled_fwd", key, *tiled_settings("fwd", q, most_rows, constants))
    return out, lse


def attention_bwd(
    dout, q, k, v, out, lse, cu_seqlens_q, cu_seqlens, max_seqlen_q, max_seqlen, scale, dropout_p, seed, offset,
    window=-1,
):  # fmt: skip
    """The gradients of q, k, v, packed as the arguments: a list of one if q has all three, of two if k has two."""
    grads, (dq, *shared) = empty_gradients(q, k, v)
    q, k, v = unpacked(q, k, v)
    # of each query head, if heads share their keys
    is_shared = k.shape[1] < q.shape[1]
    if is_shared:
        dk, dv = (torch.empty(len(k), *q.shape[1:], dtype=torch.float32, device=q.device) for _ in shared)
    else:
        dk, dv = shared
    dout = unit_columns(dout)
    cu_seqlens = unit_columns(cu_seqlens)
    cu_seqlens_q = cu_seqlens if cu_seqlens_q is None else unit_columns(cu_seqlens_q)
    M, H, _ = q.shape
    T, B = k.shape[0], cu_seqlens.shape[0] - 1
    if B * H == 0:
        return [grad.zero_() for grad in grads]
    scalars, constants = _arguments(q, k, max_seqlen, scale, dropout_p, window, offset)
    operands = strides(dout, q, k, v)
    most_rows = M if max_seqlen_q < 0 else max_seqlen_q
    short = short_settings(q, most_rows, max_seqlen, False)
    if short:

        def run(settings):
            _attention_short_bwd_kernel[(B * H,)](
                dout, q, k, v, lse, cu_seqlens_q, cu_seqlens, seed, dq, dk, dv, B, M, T, H,
                *operands, *strides(dq, dk, dv), *scalars, **constants, **settings,
            )  # fmt: skip

        launch(run, "attention_short_bwd", _key(q, constants, max(most_rows, max_seqlen)), *short)
        return _shared(grads, shared, (dk, dv), is_shared)
    delta = torch.empty(H, M, dtype=torch.float32, device=q.device)

    def run_dq(settings):
        tiles, is_bounded = query_tiles(M, B, max_seqlen_q, settings["BLOCK_M"])
        grid = (H * tiles * (B if is_bounded else 1),)
        _attention_tiled_dq_kernel[grid](
            dout, q, k, v, out, lse, cu_seqlens_q, cu_seqlens, seed, dq, delta, B, M, H, tiles,
            *operands, *strides(out, dq), *scalars, **constants,
            IS_BOUNDED=is_bounded, **settings,
        )  # fmt: skip

    def run_dkdv(settings):
        tiles = max(triton.cdiv(max_seqlen, settings["BLOCK_N"]), 1)
        _attention_tiled_dkdv_kernel[(B * H * tiles,)](
            dout, q, k, v, lse, delta, cu_seqlens_q, cu_seqlens, seed, dk, dv, B, M, T, H, tiles,
            *operands, *strides(dk, dv), *scalars, **constants, **settings,
        )  # fmt: skip

    key = _key(q, constants, max_seqlen)
    launch(run_dq, "attention_dq", key, *tiled_settings("dq", q, most_rows, constants))
    launch(run_dkdv, "attention_dkdv", key, *tiled_settings("dkdv", q, most_rows, constants))
    return _shared(grads, shared, (dk, dv), is_shared)


def _shared(grads, shared, each, is_shared):
    """grads, after the gradients of the keys' heads are summed over the query heads that share them."""
    if is_shared:
        for gradient, one in zip(shared, each):
            gradient.copy_(one.unflatten(1, (gradient.shape[1], -1)).sum(2))
    return grads


def _attention_fwd_fake(
    q, k, v, cu_seqlens_q, cu_seqlens, max_seqlen_q, max_seqlen, scale, dropout_p, seed, offset, window=-1
):
    return empty_results(q)


def _attention_bwd_fake(dout, q, k, v, *_):
    return [x.new_empty(x.shape) for x in (q, k, v) if x is not None]


_TAIL = (
    "Tensor? cu_seqlens_q, Tensor cu_seqlens, SymInt max_seqlen_q, SymInt max_seqlen, "
    "float scale, float dropout_p, Tensor? seed, SymInt offset, SymInt window=-1"
)
_attention_fwd = register(
    f"attention_fwd(Tensor q, Tensor? k, Tensor? v, {_TAIL}) -> (Tensor, Tensor)", attention_fwd, _attention_fwd_fake
)
_attention_bwd = register(
    f"attention_bwd(Tensor dout, Tensor q, Tensor? k, Tensor? v, Tensor out, Tensor lse, {_TAIL}) -> Tensor[]",
    attention_bwd,
    _attention_bwd_fake,
)


class AttentionFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, q, k, v, cu_seqlens_q, cu_seqlens, max_seqlen_q, max_seqlen, scale, dropout_p, seed, offset, window
    ):
        out, lse = _attention_fwd(
            q, k, v, cu_seqlens_q, cu_seqlens, max_seqlen_q, max_seqlen, scale, dropout_p, seed, offset, window
        )
        ctx.save_for_backward(q, k, v, out, lse, cu_seqlens_q, cu_seqlens, seed)
        ctx.scalars = max_seqlen_q, max_seqlen, scale, dropout_p, offset, window
        return out

    @staticmethod
    @differentiable_once("attention")
    def backward(ctx, dout):
        *saved, seed = ctx.saved_tensors
        *scalars, offset, window = ctx.scalars
        grads = _attention_bwd(dout, *saved, *scalars, seed, offset, window)
        return *grads, *[None] * (12 - len(grads))


def attention(
    q, k, v, cu_seqlens, max_seqlen, *,
    cu_seqlens_q=None, max_seqlen_q=None, scale=None, dropout_p=0.0, window=None, seed=None, offset=0,
):  # fmt: skip
    """softmax(q kᵀ · scale) v within each packed sequence, with dropout: arguments and result of `reference.attention`.

    float16, bfloat16 or float32; head sizes up to 128. Without `max_seqlen_q`, a sequence may have all rows of q.
    Raises TypeError and ValueError; `ops.attention` checks the other arguments.
    """
    check_operands("q, k, v", q, k, v)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if cu_seqlens_q is None:
        max_seqlen_q = max_seqlen
    elif max_seqlen_q is None:
        max_seqlen_q = -1
    window = -1 if window is None else window
    return AttentionFunction.apply(
        q, k, v, cu_seqlens_q, cu_seqlens, max_seqlen_q, max_seqlen, scale, dropout_p, seed, offset, window
    )
