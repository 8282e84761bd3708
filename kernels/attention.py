"""Bidirectional softmax attention over packed sequences, dropout inside.

    p   = softmax(q kᵀ · scale)              within each sequence, per head
    out = (keep * p / (1 - dropout_p)) v

PyTorch writes and reads the S x S scores and probabilities, at least 4*H*S*S elements a sequence, and reads, writes or
masks padding beside them. Fused: read q, k, v, write out, 4*T*H*K elements and one fp32 log-sum-exp a row and head. The
backward reads q, k, v, dout and the log-sum-exp and writes dq, dk, dv: 7*T*H*K on the short path. The tiled path also
reads out, and reads the operands of the recomputed scores once per tile, mostly from cache.

The backward recomputes the probabilities from the log-sum-exp and draws the dropout mask again from (seed, offset).

Two paths. Short: one program has a whole sequence and head on chip, softmax needs no second look, and one backward
kernel makes dq, dk and dv together. Tiled, for longer sequences: an online softmax (Milakov & Gimelshein 2018, Dao et
al. 2022) over tiles of keys; the backward makes dq in one kernel, over tiles of keys, and dk, dv in another, over tiles
of queries, so that nothing is added atomically and the same inputs give the same bits.

All programs together also write zeros over the rows past the last sequence: nothing on the host knows how many there are.

Letters: B sequences, M rows of q, T rows of k and v, H heads, K head size. Tiles have BLOCK_M queries and BLOCK_N keys.
"""

import math

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

from ._launch import INTERPRET, dropout_constants, register
from ._math import keep_mask

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@triton.jit
def _load_tile(
    ptr, stride, rows,
    K: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, IS_WHOLE: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """[BLOCK_R, BLOCK_K] from `ptr`, zeros past `rows` (which IS_WHOLE promises to reach BLOCK_R) and past K."""
    offs_r = tl.arange(0, BLOCK_R)
    offs_k = tl.arange(0, BLOCK_K)
    pointers = ptr + offs_r[:, None] * stride + offs_k[None, :]
    if IS_WHOLE and K == BLOCK_K:
        x = tl.load(pointers)
    elif IS_WHOLE:
        x = tl.load(pointers, mask=offs_k[None, :] < K, other=0.0)
    elif K == BLOCK_K:
        x = tl.load(pointers, mask=offs_r[:, None] < rows, other=0.0)
    else:
        x = tl.load(pointers, mask=(offs_r[:, None] < rows) & (offs_k[None, :] < K), other=0.0)
    return x.to(tl.float32) if UPCAST else x


@triton.jit
def _store_tile(ptr, stride, rows, x, K: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr):
    offs_r = tl.arange(0, BLOCK_R)
    offs_k = tl.arange(0, BLOCK_K)
    mask = (offs_r[:, None] < rows) & (offs_k[None, :] < K)
    tl.store(ptr + offs_r[:, None] * stride + offs_k[None, :], x.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def _zero_slack(
    ptr, stride, end, rows, program, programs,
    K: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """This program's share of zeros over rows `end` to `rows`."""
    zeros = tl.zeros([BLOCK_R, BLOCK_K], tl.float32)
    for r in range(end + program * BLOCK_R, rows, programs * BLOCK_R):
        _store_tile(ptr + tl.cast(r, tl.int64) * stride, stride, rows - r, zeros, K, BLOCK_R, BLOCK_K)


@triton.jit
def _attention_short_fwd_kernel(
    q_ptr, k_ptr, v_ptr, cu_seqlens_q_ptr, cu_seqlens_ptr, seed_ptr,  # inputs
    out_ptr, lse_ptr,                                                 # outputs
    B, M, H,
    stride_qm, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh, stride_om, stride_oh,
    scale_log2, offset, threshold, keep_scale,
    HAS_DROPOUT: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0) // H
    h = tl.program_id(0) % H
    wide_h = tl.cast(h, tl.int64)
    offs_m = tl.arange(0, BLOCK_M)
    offs_n = tl.arange(0, BLOCK_N)
    out_ptr += wide_h * stride_oh
    lse_ptr += wide_h * M

    end = tl.load(cu_seqlens_q_ptr + B)
    _zero_slack(out_ptr, stride_om, end, M, b, B, K, BLOCK_M, BLOCK_K)
    for m in range(end + b * BLOCK_M, M, B * BLOCK_M):
        tl.store(lse_ptr + m + offs_m, tl.zeros([BLOCK_M], tl.float32), mask=m + offs_m < M)

    start_q = tl.load(cu_seqlens_q_ptr + b).to(tl.int64)
    rows = tl.load(cu_seqlens_q_ptr + b + 1) - start_q
    start = tl.load(cu_seqlens_ptr + b).to(tl.int64)
    length = tl.load(cu_seqlens_ptr + b + 1) - start
    if rows == 0:
        return

    q = _load_tile(
        q_ptr + start_q * stride_qm + wide_h * stride_qh, stride_qm, rows, K, BLOCK_M, BLOCK_K, False, UPCAST
    )
    k = _load_tile(
        k_ptr + start * stride_kt + wide_h * stride_kh, stride_kt, length, K, BLOCK_N, BLOCK_K, False, UPCAST
    )
    v = _load_tile(
        v_ptr + start * stride_vt + wide_h * stride_vh, stride_vt, length, K, BLOCK_N, BLOCK_K, False, UPCAST
    )
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    s = tl.where(offs_n[None, :] < length, s, float("-inf"))
    # the two finite bounds only act in a sequence without keys, whose rows give 0
    highest = tl.maximum(tl.max(s, 1), -1e30) * scale_log2
    p = tl.exp2(s * scale_log2 - highest[:, None])
    total = tl.maximum(tl.sum(p, 1), 1e-30)
    tl.store(lse_ptr + start_q + offs_m, highest + tl.log2(total), mask=offs_m < rows)
    if HAS_DROPOUT:
        keep = keep_mask(start_q + offs_m, h, 0, tl.load(seed_ptr), offset, threshold, BLOCK_N)
        p = tl.where(keep, p, 0.0)
    out = tl.dot(p.to(v.dtype), v, input_precision=PRECISION) * (keep_scale / total)[:, None]
    _store_tile(out_ptr + start_q * stride_om, stride_om, rows, out, K, BLOCK_M, BLOCK_K)


@triton.jit
def _attend(
    m_i, l_i, acc, q, k_ptr, v_ptr, stride_kt, stride_vt, n, left,
    row, h, seed, scale_log2, offset, threshold,
    HAS_DROPOUT: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, IS_WHOLE: tl.constexpr,
):  # fmt: skip
    """One tile of keys, of which `left` exist, into the running maximum, sum and weighted values."""
    k = _load_tile(k_ptr, stride_kt, left, K, BLOCK_N, BLOCK_K, IS_WHOLE, UPCAST)
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    if not IS_WHOLE:
        s = tl.where(tl.arange(0, BLOCK_N)[None, :] < left, s, float("-inf"))
    m_new = tl.maximum(m_i, tl.max(s, 1) * scale_log2)
    alpha = tl.exp2(m_i - m_new)
    p = tl.exp2(s * scale_log2 - m_new[:, None])
    l_i = l_i * alpha + tl.sum(p, 1)
    if HAS_DROPOUT:
        p = tl.where(keep_mask(row, h, n, seed, offset, threshold, BLOCK_N), p, 0.0)
    v = _load_tile(v_ptr, stride_vt, left, K, BLOCK_N, BLOCK_K, IS_WHOLE, UPCAST)
    acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision=PRECISION)
    return m_new, l_i, acc


@triton.jit
def _attention_tiled_fwd_kernel(
    q_ptr, k_ptr, v_ptr, cu_seqlens_q_ptr, cu_seqlens_ptr, seed_ptr,  # inputs
    out_ptr, lse_ptr,                                                 # outputs
    B, M, H, tiles,
    stride_qm, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh, stride_om, stride_oh,
    scale_log2, offset, threshold, keep_scale,
    HAS_DROPOUT: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    # tiles of one sequence and head are neighbours: they read the same keys and values
    tile = tl.program_id(0) % tiles
    h = tl.program_id(0) // tiles % H
    wide_h = tl.cast(h, tl.int64)
    b = tl.program_id(0) // tiles // H
    offs_m = tl.arange(0, BLOCK_M)
    out_ptr += wide_h * stride_oh
    lse_ptr += wide_h * M

    end = tl.load(cu_seqlens_q_ptr + B)
    program = b * tiles + tile
    _zero_slack(out_ptr, stride_om, end, M, program, B * tiles, K, BLOCK_M, BLOCK_K)
    for m in range(end + program * BLOCK_M, M, B * tiles * BLOCK_M):
        tl.store(lse_ptr + m + offs_m, tl.zeros([BLOCK_M], tl.float32), mask=m + offs_m < M)

    start_q = tl.load(cu_seqlens_q_ptr + b).to(tl.int64) + tile * BLOCK_M
    rows = (tl.load(cu_seqlens_q_ptr + b + 1) - start_q).to(tl.int32)
    start = tl.load(cu_seqlens_ptr + b).to(tl.int64)
    length = (tl.load(cu_seqlens_ptr + b + 1) - start).to(tl.int32)
    if rows <= 0:
        return

    seed = tl.load(seed_ptr) if HAS_DROPOUT else 0
    row = start_q + offs_m
    q = _load_tile(
        q_ptr + start_q * stride_qm + wide_h * stride_qh, stride_qm, rows, K, BLOCK_M, BLOCK_K, False, UPCAST
    )
    k_ptr += start * stride_kt + wide_h * stride_kh
    v_ptr += start * stride_vt + wide_h * stride_vh
    # finite bounds: a sequence without keys gives rows of 0
    m_i = tl.full([BLOCK_M], -1e30, tl.float32)
    l_i = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)
    whole = length // BLOCK_N * BLOCK_N
    for n in range(0, whole, BLOCK_N):
        m_i, l_i, acc = _attend(
            m_i, l_i, acc, q, k_ptr, v_ptr, stride_kt, stride_vt, n, BLOCK_N, row, h, seed, scale_log2, offset, threshold,
            HAS_DROPOUT, PRECISION, UPCAST, K, BLOCK_N, BLOCK_K, True,
        )  # fmt: skip
        k_ptr += BLOCK_N * tl.cast(stride_kt, tl.int64)
        v_ptr += BLOCK_N * tl.cast(stride_vt, tl.int64)
    if whole < length:
        m_i, l_i, acc = _attend(
            m_i, l_i, acc, q, k_ptr, v_ptr, stride_kt, stride_vt, whole, length - whole,
            row, h, seed, scale_log2, offset, threshold,
            HAS_DROPOUT, PRECISION, UPCAST, K, BLOCK_N, BLOCK_K, False,
        )  # fmt: skip
    l_i = tl.maximum(l_i, 1e-30)
    tl.store(lse_ptr + row, m_i + tl.log2(l_i), mask=offs_m < rows)
    out = acc * (keep_scale / l_i)[:, None]
    _store_tile(out_ptr + start_q * stride_om, stride_om, rows, out, K, BLOCK_M, BLOCK_K)


@triton.jit
def _attention_short_bwd_kernel(
    dout_ptr, q_ptr, k_ptr, v_ptr, lse_ptr, cu_seqlens_q_ptr, cu_seqlens_ptr, seed_ptr,  # inputs
    dq_ptr, dk_ptr, dv_ptr,                                                              # outputs
    B, M, T, H,
    stride_om, stride_oh, stride_qm, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh,
    stride_dqm, stride_dqh, stride_dkt, stride_dkh, stride_dvt, stride_dvh,
    scale, scale_log2, offset, threshold, keep_scale,
    HAS_DROPOUT: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0) // H
    h = tl.program_id(0) % H
    wide_h = tl.cast(h, tl.int64)
    offs_m = tl.arange(0, BLOCK_M)
    offs_n = tl.arange(0, BLOCK_N)
    dq_ptr += wide_h * stride_dqh
    dk_ptr += wide_h * stride_dkh
    dv_ptr += wide_h * stride_dvh

    _zero_slack(dq_ptr, stride_dqm, tl.load(cu_seqlens_q_ptr + B), M, b, B, K, BLOCK_M, BLOCK_K)
    end = tl.load(cu_seqlens_ptr + B)
    _zero_slack(dk_ptr, stride_dkt, end, T, b, B, K, BLOCK_N, BLOCK_K)
    _zero_slack(dv_ptr, stride_dvt, end, T, b, B, K, BLOCK_N, BLOCK_K)

    start_q = tl.load(cu_seqlens_q_ptr + b).to(tl.int64)
    rows = tl.load(cu_seqlens_q_ptr + b + 1) - start_q
    start = tl.load(cu_seqlens_ptr + b).to(tl.int64)
    length = tl.load(cu_seqlens_ptr + b + 1) - start
    if rows + length == 0:
        return

    q = _load_tile(
        q_ptr + start_q * stride_qm + wide_h * stride_qh, stride_qm, rows, K, BLOCK_M, BLOCK_K, False, UPCAST
    )
    k = _load_tile(
        k_ptr + start * stride_kt + wide_h * stride_kh, stride_kt, length, K, BLOCK_N, BLOCK_K, False, UPCAST
    )
    v = _load_tile(
        v_ptr + start * stride_vt + wide_h * stride_vh, stride_vt, length, K, BLOCK_N, BLOCK_K, False, UPCAST
    )
    dout_ptr += start_q * stride_om + wide_h * stride_oh
    dout = _load_tile(dout_ptr, stride_om, rows, K, BLOCK_M, BLOCK_K, False, UPCAST)
    # infinity makes the probabilities of rows that do not exist 0
    lse = tl.load(lse_ptr + wide_h * M + start_q + offs_m, mask=offs_m < rows, other=float("inf"))

    s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    p = tl.exp2(s * scale_log2 - lse[:, None])
    p = tl.where(offs_n[None, :] < length, p, 0.0)
    dp = tl.dot(dout, tl.trans(v), input_precision=PRECISION)
    if HAS_DROPOUT:
        keep = keep_mask(start_q + offs_m, h, 0, tl.load(seed_ptr), offset, threshold, BLOCK_N)
        dp = tl.where(keep, dp * keep_scale, 0.0)
        kept = tl.where(keep, p, 0.0).to(dout.dtype)
    else:
        kept = p.to(dout.dtype)
    dv = tl.dot(tl.trans(kept), dout, input_precision=PRECISION) * keep_scale
    _store_tile(dv_ptr + start * stride_dvt, stride_dvt, length, dv, K, BLOCK_N, BLOCK_K)
    # the whole row is here, so sum(dout * out) is had without reading out
    delta = tl.sum(p * dp, 1)
    ds = (p * (dp - delta[:, None])).to(q.dtype)
    dk = tl.dot(tl.trans(ds), q, input_precision=PRECISION) * scale
    _store_tile(dk_ptr + start * stride_dkt, stride_dkt, length, dk, K, BLOCK_N, BLOCK_K)
    dq = tl.dot(ds, k, input_precision=PRECISION) * scale
    _store_tile(dq_ptr + start_q * stride_dqm, stride_dqm, rows, dq, K, BLOCK_M, BLOCK_K)


@triton.jit
def _add_dq(
    dq, q, dout, lse, delta, k_ptr, v_ptr, stride_kt, stride_vt, n, left,
    row, h, seed, scale_log2, offset, threshold, keep_scale,
    HAS_DROPOUT: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, IS_WHOLE: tl.constexpr,
):  # fmt: skip
    """What one tile of keys, of which `left` exist, adds to dq / scale."""
    k = _load_tile(k_ptr, stride_kt, left, K, BLOCK_N, BLOCK_K, IS_WHOLE, UPCAST)
    v = _load_tile(v_ptr, stride_vt, left, K, BLOCK_N, BLOCK_K, IS_WHOLE, UPCAST)
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    p = tl.exp2(s * scale_log2 - lse[:, None])
    if not IS_WHOLE:
        p = tl.where(tl.arange(0, BLOCK_N)[None, :] < left, p, 0.0)
    dp = tl.dot(dout, tl.trans(v), input_precision=PRECISION)
    if HAS_DROPOUT:
        dp = tl.where(keep_mask(row, h, n, seed, offset, threshold, BLOCK_N), dp * keep_scale, 0.0)
    ds = (p * (dp - delta[:, None])).to(k.dtype)
    return tl.dot(ds, k, dq, input_precision=PRECISION)


@triton.jit
def _attention_tiled_dq_kernel(
    dout_ptr, q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, cu_seqlens_q_ptr, cu_seqlens_ptr, seed_ptr,  # inputs
    dq_ptr, delta_ptr,                                                                            # outputs
    B, M, H, tiles,
    stride_dom, stride_doh, stride_qm, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh, stride_om, stride_oh,
    stride_dqm, stride_dqh,
    scale, scale_log2, offset, threshold, keep_scale,
    HAS_DROPOUT: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0) % tiles
    h = tl.program_id(0) // tiles % H
    wide_h = tl.cast(h, tl.int64)
    b = tl.program_id(0) // tiles // H
    offs_m = tl.arange(0, BLOCK_M)
    dq_ptr += wide_h * stride_dqh

    end = tl.load(cu_seqlens_q_ptr + B)
    _zero_slack(dq_ptr, stride_dqm, end, M, b * tiles + tile, B * tiles, K, BLOCK_M, BLOCK_K)

    start_q = tl.load(cu_seqlens_q_ptr + b).to(tl.int64) + tile * BLOCK_M
    rows = (tl.load(cu_seqlens_q_ptr + b + 1) - start_q).to(tl.int32)
    start = tl.load(cu_seqlens_ptr + b).to(tl.int64)
    length = (tl.load(cu_seqlens_ptr + b + 1) - start).to(tl.int32)
    if rows <= 0:
        return

    seed = tl.load(seed_ptr) if HAS_DROPOUT else 0
    row = start_q + offs_m
    q = _load_tile(
        q_ptr + start_q * stride_qm + wide_h * stride_qh, stride_qm, rows, K, BLOCK_M, BLOCK_K, False, UPCAST
    )
    dout_ptr += start_q * stride_dom + wide_h * stride_doh
    dout = _load_tile(dout_ptr, stride_dom, rows, K, BLOCK_M, BLOCK_K, False, UPCAST)
    out_ptr += start_q * stride_om + wide_h * stride_oh
    out = _load_tile(out_ptr, stride_om, rows, K, BLOCK_M, BLOCK_K, False, UPCAST)
    delta = tl.sum(dout.to(tl.float32) * out.to(tl.float32), 1)
    tl.store(delta_ptr + wide_h * M + row, delta, mask=offs_m < rows)
    lse = tl.load(lse_ptr + wide_h * M + row, mask=offs_m < rows, other=float("inf"))

    k_ptr += start * stride_kt + wide_h * stride_kh
    v_ptr += start * stride_vt + wide_h * stride_vh
    dq = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)
    whole = length // BLOCK_N * BLOCK_N
    for n in range(0, whole, BLOCK_N):
        dq = _add_dq(
            dq, q, dout, lse, delta, k_ptr, v_ptr, stride_kt, stride_vt, n, BLOCK_N,
            row, h, seed, scale_log2, offset, threshold, keep_scale,
            HAS_DROPOUT, PRECISION, UPCAST, K, BLOCK_N, BLOCK_K, True,
        )  # fmt: skip
        k_ptr += BLOCK_N * tl.cast(stride_kt, tl.int64)
        v_ptr += BLOCK_N * tl.cast(stride_vt, tl.int64)
    if whole < length:
        dq = _add_dq(
            dq, q, dout, lse, delta, k_ptr, v_ptr, stride_kt, stride_vt, whole, length - whole,
            row, h, seed, scale_log2, offset, threshold, keep_scale,
            HAS_DROPOUT, PRECISION, UPCAST, K, BLOCK_N, BLOCK_K, False,
        )  # fmt: skip
    _store_tile(dq_ptr + start_q * stride_dqm, stride_dqm, rows, dq * scale, K, BLOCK_M, BLOCK_K)


@triton.jit
def _attention_tiled_dkdv_kernel(
    dout_ptr, q_ptr, k_ptr, v_ptr, lse_ptr, delta_ptr, cu_seqlens_q_ptr, cu_seqlens_ptr, seed_ptr,  # inputs
    dk_ptr, dv_ptr,                                                                                 # outputs
    B, M, T, H, tiles,
    stride_om, stride_oh, stride_qm, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh,
    stride_dkt, stride_dkh, stride_dvt, stride_dvh,
    scale, scale_log2, offset, threshold, keep_scale,
    HAS_DROPOUT: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0) % tiles
    h = tl.program_id(0) // tiles % H
    wide_h = tl.cast(h, tl.int64)
    b = tl.program_id(0) // tiles // H
    offs_m = tl.arange(0, BLOCK_M)
    dk_ptr += wide_h * stride_dkh
    dv_ptr += wide_h * stride_dvh

    end = tl.load(cu_seqlens_ptr + B)
    _zero_slack(dk_ptr, stride_dkt, end, T, b * tiles + tile, B * tiles, K, BLOCK_N, BLOCK_K)
    _zero_slack(dv_ptr, stride_dvt, end, T, b * tiles + tile, B * tiles, K, BLOCK_N, BLOCK_K)

    start_q = tl.load(cu_seqlens_q_ptr + b).to(tl.int64)
    rows = (tl.load(cu_seqlens_q_ptr + b + 1) - start_q).to(tl.int32)
    start = tl.load(cu_seqlens_ptr + b).to(tl.int64) + tile * BLOCK_N
    length = (tl.load(cu_seqlens_ptr + b + 1) - start).to(tl.int32)
    if length <= 0:
        return

    seed = tl.load(seed_ptr) if HAS_DROPOUT else 0
    k = _load_tile(
        k_ptr + start * stride_kt + wide_h * stride_kh, stride_kt, length, K, BLOCK_N, BLOCK_K, False, UPCAST
    )
    v = _load_tile(
        v_ptr + start * stride_vt + wide_h * stride_vh, stride_vt, length, K, BLOCK_N, BLOCK_K, False, UPCAST
    )
    q_ptr += start_q * stride_qm + wide_h * stride_qh
    dout_ptr += start_q * stride_om + wide_h * stride_oh
    lse_ptr += wide_h * M + start_q
    delta_ptr += wide_h * M + start_q
    dk = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    for m in range(0, rows, BLOCK_M):
        q = _load_tile(q_ptr, stride_qm, rows - m, K, BLOCK_M, BLOCK_K, False, UPCAST)
        dout = _load_tile(dout_ptr, stride_om, rows - m, K, BLOCK_M, BLOCK_K, False, UPCAST)
        lse = tl.load(lse_ptr + m + offs_m, mask=m + offs_m < rows, other=float("inf"))
        delta = tl.load(delta_ptr + m + offs_m, mask=m + offs_m < rows, other=0.0)
        # transposed tiles [BLOCK_N, BLOCK_M]: they are the left operands of the two products below, straight from
        # registers. Keys that do not exist need no mask: what they make lands in their own rows, which are not stored
        s = tl.dot(k, tl.trans(q), input_precision=PRECISION)
        p = tl.exp2(s * scale_log2 - lse[None, :])
        dp = tl.dot(v, tl.trans(dout), input_precision=PRECISION)
        if HAS_DROPOUT:
            keep = tl.trans(keep_mask(start_q + m + offs_m, h, tile * BLOCK_N, seed, offset, threshold, BLOCK_N))
            dp = tl.where(keep, dp * keep_scale, 0.0)
            kept = tl.where(keep, p, 0.0).to(dout.dtype)
        else:
            kept = p.to(dout.dtype)
        dv = tl.dot(kept, dout, dv, input_precision=PRECISION)
        ds = (p * (dp - delta[None, :])).to(q.dtype)
        dk = tl.dot(ds, q, dk, input_precision=PRECISION)
        q_ptr += BLOCK_M * tl.cast(stride_qm, tl.int64)
        dout_ptr += BLOCK_M * tl.cast(stride_om, tl.int64)
    _store_tile(dk_ptr + start * stride_dkt, stride_dkt, length, dk * scale, K, BLOCK_N, BLOCK_K)
    _store_tile(dv_ptr + start * stride_dvt, stride_dvt, length, dv * keep_scale, K, BLOCK_N, BLOCK_K)


def _unpacked(q, k, v):
    """q, k and v [rows, H, K], views where they come packed, with elements of a head next to each other."""
    if k is None:
        q, k, v = q.unbind(1)
    elif v is None:
        k, v = k.unbind(1)
    return tuple(x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))


def _short(max_seqlen_q, max_seqlen, dtype, block_k, backward):
    """(BLOCK_M, BLOCK_N, warps) when a whole sequence fits one program, else None."""
    block_m = max(triton.next_power_of_2(max_seqlen_q), 16)
    block_n = max(triton.next_power_of_2(max_seqlen), 16)
    if max(block_m, block_n) > 128:
        return None
    return dict(BLOCK_M=block_m, BLOCK_N=block_n, num_warps=8 if max(block_m, block_n) == 128 else 4, num_stages=1)


_TILES = {
    "fwd": dict(BLOCK_M=128, BLOCK_N=64, num_warps=4, num_stages=3),
    "dq": dict(BLOCK_M=64, BLOCK_N=64, num_warps=4, num_stages=3),
    "dkdv": dict(BLOCK_M=64, BLOCK_N=64, num_warps=4, num_stages=3),
}


def _tiled(kernel, dtype, block_k):
    return _TILES[kernel]


def _shared(q, scale, dropout_p, seed):
    """What every kernel is given alike: scalars and constants."""
    precision = "tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee"
    # Triton's interpreter computes wrongly with bfloat16, so there it is widened on load
    upcast = INTERPRET and q.dtype == torch.bfloat16
    block_k = max(triton.next_power_of_2(q.shape[-1]), 16)
    return dict(HAS_DROPOUT=dropout_p > 0.0, PRECISION=precision, UPCAST=upcast, K=q.shape[-1], BLOCK_K=block_k)


def attention_fwd(q, k, v, cu_seqlens_q, cu_seqlens, max_seqlen_q, max_seqlen, scale, dropout_p, seed, offset):
    """(out [M, H, K], log-sum-exp fp32 [H, M]). The latter is to base 2, of the scaled scores; 0 where no key is."""
    q, k, v = _unpacked(q, k, v)
    M, H, K = q.shape
    B = cu_seqlens.shape[0] - 1
    out = torch.empty(M, H, K, dtype=q.dtype, device=q.device)
    lse = torch.empty(H, M, dtype=torch.float32, device=q.device)
    if B * H == 0:
        return out.zero_(), lse.zero_()
    threshold, keep_scale = dropout_constants(dropout_p)
    constants = _shared(q, scale, dropout_p, seed)
    short = _short(max_seqlen_q, max_seqlen, q.dtype, constants["BLOCK_K"], False)
    inputs = (q, k, v, cu_seqlens_q, cu_seqlens, seed, out, lse)
    scalars = (
        q.stride(0), q.stride(1), k.stride(0), k.stride(1), v.stride(0), v.stride(1), out.stride(0), out.stride(1),
        scale * math.log2(math.e), offset, threshold, keep_scale,
    )  # fmt: skip
    if short:
        _attention_short_fwd_kernel[(B * H,)](*inputs, B, M, H, *scalars, **constants, **short)
        return out, lse
    blocks = _tiled("fwd", q.dtype, constants["BLOCK_K"])
    tiles = max(triton.cdiv(max_seqlen_q, blocks["BLOCK_M"]), 1)
    _attention_tiled_fwd_kernel[(B * H * tiles,)](*inputs, B, M, H, tiles, *scalars, **constants, **blocks)
    return out, lse


def attention_bwd(
    dout, q, k, v, out, lse, cu_seqlens_q, cu_seqlens, max_seqlen_q, max_seqlen, scale, dropout_p, seed, offset
):
    """Gradients of q, k, v as they were given: one tensor [T, 3, H, K], or [M, H, K] and [T, 2, H, K], or three."""
    grads = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v) if x is not None]
    dq, dk, dv = _unpacked(*grads, *[None] * (3 - len(grads)))
    q, k, v = _unpacked(q, k, v)
    dout = dout if dout.stride(-1) == 1 else dout.contiguous()
    M, H, K = q.shape
    T, B = k.shape[0], cu_seqlens.shape[0] - 1
    if B * H == 0:
        return [grad.zero_() for grad in grads]
    threshold, keep_scale = dropout_constants(dropout_p)
    constants = _shared(q, scale, dropout_p, seed)
    strides = [x.stride(d) for x in (dout, q, k, v) for d in (0, 1)]
    strides_dq, strides_dkdv = dq.stride()[:2], (*dk.stride()[:2], *dv.stride()[:2])
    scalars = (scale, scale * math.log2(math.e), offset, threshold, keep_scale)
    short = _short(max_seqlen_q, max_seqlen, q.dtype, constants["BLOCK_K"], True)
    if short:
        _attention_short_bwd_kernel[(B * H,)](
            dout, q, k, v, lse, cu_seqlens_q, cu_seqlens, seed, dq, dk, dv, B, M, T, H,
            *strides, *strides_dq, *strides_dkdv, *scalars, **constants, **short,
        )  # fmt: skip
        return grads
    delta = torch.empty_like(lse)
    blocks = _tiled("dq", q.dtype, constants["BLOCK_K"])
    tiles = max(triton.cdiv(max_seqlen_q, blocks["BLOCK_M"]), 1)
    _attention_tiled_dq_kernel[(B * H * tiles,)](
        dout, q, k, v, out, lse, cu_seqlens_q, cu_seqlens, seed, dq, delta, B, M, H, tiles,
        *strides, out.stride(0), out.stride(1), *strides_dq, *scalars, **constants, **blocks,
    )  # fmt: skip
    blocks = _tiled("dkdv", q.dtype, constants["BLOCK_K"])
    tiles = max(triton.cdiv(max_seqlen, blocks["BLOCK_N"]), 1)
    _attention_tiled_dkdv_kernel[(B * H * tiles,)](
        dout, q, k, v, lse, delta, cu_seqlens_q, cu_seqlens, seed, dk, dv, B, M, T, H, tiles,
        *strides, *strides_dkdv, *scalars, **constants, **blocks,
    )  # fmt: skip
    return grads


def _attention_fwd_fake(q, k, v, cu_seqlens_q, cu_seqlens, max_seqlen_q, max_seqlen, scale, dropout_p, seed, offset):
    M, H, K = q.shape[0], *q.shape[-2:]
    return q.new_empty(M, H, K), q.new_empty(H, M, dtype=torch.float32)


def _attention_bwd_fake(
    dout, q, k, v, out, lse, cu_seqlens_q, cu_seqlens, max_seqlen_q, max_seqlen, scale, dropout_p, seed, offset
):
    return [x.new_empty(x.shape) for x in (q, k, v) if x is not None]


_TAIL = (
    "Tensor cu_seqlens_q, Tensor cu_seqlens, SymInt max_seqlen_q, SymInt max_seqlen, "
    "float scale, float dropout_p, Tensor? seed, SymInt offset"
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
    def forward(ctx, q, k, v, cu_seqlens_q, cu_seqlens, max_seqlen_q, max_seqlen, scale, dropout_p, seed, offset):
        out, lse = _attention_fwd(
            q, k, v, cu_seqlens_q, cu_seqlens, max_seqlen_q, max_seqlen, scale, dropout_p, seed, offset
        )
        ctx.save_for_backward(q, k, v, out, lse, cu_seqlens_q, cu_seqlens, seed)
        ctx.scalars = max_seqlen_q, max_seqlen, scale, dropout_p, offset
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        *saved, seed = ctx.saved_tensors
        *scalars, offset = ctx.scalars
        grads = _attention_bwd(dout, *saved, *scalars, seed, offset)
        return *grads, *[None] * (11 - len(grads))


def attention(
    q, k, v, cu_seqlens, max_seqlen, *,
    cu_seqlens_q=None, max_seqlen_q=None, scale=None, dropout_p=0.0, seed=None, offset=0,
):  # fmt: skip
    """softmax(q kᵀ · scale) v within each packed sequence, with dropout: arguments and result of `reference.attention`.

    float16, bfloat16 or float32; head sizes up to 128; `scale` above 0; `seed` an int64 tensor [1] when dropout_p > 0.
    Without `max_seqlen_q`, rows of `cu_seqlens_q` may be as many as q has. Raises ValueError and TypeError.
    """
    if q.dtype not in _DTYPES or any(x is not None and x.dtype != q.dtype for x in (k, v)):
        dtypes = ", ".join(str(x.dtype) for x in (q, k, v) if x is not None)
        raise TypeError(f"q, k, v are {dtypes}: expected one of float16, bfloat16, float32 for all")
    if q.shape[-1] > 128:
        raise ValueError(f"the head size is {q.shape[-1]}: expected at most 128")
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if scale <= 0:
        raise ValueError(f"scale is {scale}: expected a number above 0")
    if dropout_p > 0.0 and seed is None:
        raise ValueError(f"dropout_p is {dropout_p} and seed is None: expected an int64 tensor [1]")
    if cu_seqlens_q is None:
        cu_seqlens_q, max_seqlen_q = cu_seqlens, max_seqlen
    elif max_seqlen_q is None:
        max_seqlen_q = q.shape[0]
    return AttentionFunction.apply(
        q, k, v, cu_seqlens_q, cu_seqlens, max_seqlen_q, max_seqlen, scale, dropout_p, seed, offset
    )
