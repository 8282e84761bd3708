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

All programs together also write zeros over the rows past the last sequence: the host does not know how many there are.

Letters: B sequences, M rows of q, T rows of k and v, H heads, K head size. Tiles have BLOCK_M queries and BLOCK_N keys.
"""

import math

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

from ._launch import INTERPRET, capability, dropout_constants, register, unit_columns
from ._math import keep_mask

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@triton.jit
def _at(ptr, row, stride_row, head, stride_head):
    """Where a row of a head begins. Products of row numbers and strides pass 2^31 in large batches: 64 bits."""
    return ptr + tl.cast(row, tl.int64) * stride_row + tl.cast(head, tl.int64) * stride_head


@triton.jit
def _load_tile(
    ptr, stride, rows,
    K: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, IS_WHOLE: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """[BLOCK_R, BLOCK_K] from `ptr`, zeros past `rows` (unless IS_WHOLE says that BLOCK_R rows exist) and past K."""
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
    ptr, stride_row, head, stride_head, end, rows, program, programs,
    K: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """This program's share of the zeros in rows `end` to `rows`."""
    zeros = tl.zeros([BLOCK_R, BLOCK_K], tl.float32)
    for r in range(end + program * BLOCK_R, rows, programs * BLOCK_R):
        _store_tile(_at(ptr, r, stride_row, head, stride_head), stride_row, rows - r, zeros, K, BLOCK_R, BLOCK_K)


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
    offs_m = tl.arange(0, BLOCK_M)
    offs_n = tl.arange(0, BLOCK_N)
    lse_ptr = _at(lse_ptr, 0, 1, h, M)

    end = tl.load(cu_seqlens_q_ptr + B)
    _zero_slack(out_ptr, stride_om, h, stride_oh, end, M, b, B, K, BLOCK_M, BLOCK_K)
    _zero_slack(lse_ptr, 1, 0, 0, end, M, b, B, 1, BLOCK_M, 1)

    start_q = tl.load(cu_seqlens_q_ptr + b)
    rows = tl.load(cu_seqlens_q_ptr + b + 1) - start_q
    start = tl.load(cu_seqlens_ptr + b)
    length = tl.load(cu_seqlens_ptr + b + 1) - start
    if rows == 0:
        return

    q_ptr = _at(q_ptr, start_q, stride_qm, h, stride_qh)
    k_ptr = _at(k_ptr, start, stride_kt, h, stride_kh)
    v_ptr = _at(v_ptr, start, stride_vt, h, stride_vh)
    out_ptr = _at(out_ptr, start_q, stride_om, h, stride_oh)
    q = _load_tile(q_ptr, stride_qm, rows, K, BLOCK_M, BLOCK_K, False, UPCAST)
    k = _load_tile(k_ptr, stride_kt, length, K, BLOCK_N, BLOCK_K, False, UPCAST)
    v = _load_tile(v_ptr, stride_vt, length, K, BLOCK_N, BLOCK_K, False, UPCAST)
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    s = tl.where(offs_n[None, :] < length, s, float("-inf"))
    # the two finite bounds only act in a sequence without keys, whose rows give 0
    highest = tl.maximum(tl.max(s, 1), -1e30) * scale_log2
    p = tl.exp2(s * scale_log2 - highest[:, None])
    total = tl.maximum(tl.sum(p, 1), 1e-30)
    tl.store(lse_ptr + start_q + offs_m, highest + tl.log2(total), mask=offs_m < rows)
    if HAS_DROPOUT:
        p = tl.where(keep_mask(start_q + offs_m, h, 0, tl.load(seed_ptr), offset, threshold, BLOCK_N), p, 0.0)
    out = tl.dot(p.to(v.dtype), v, input_precision=PRECISION) * (keep_scale / total)[:, None]
    _store_tile(out_ptr, stride_om, rows, out, K, BLOCK_M, BLOCK_K)


@triton.jit
def _attend(
    highest, total, acc, q, k_ptr, v_ptr, stride_kt, stride_vt, n, left,
    row, h, seed, scale_log2, offset, threshold,
    HAS_DROPOUT: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, IS_WHOLE: tl.constexpr,
):  # fmt: skip
    """The tile of keys from `n` on, of which `left` exist, into the running maximum, sum and weighted values."""
    k = _load_tile(k_ptr, stride_kt, left, K, BLOCK_N, BLOCK_K, IS_WHOLE, UPCAST)
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    if not IS_WHOLE:
        s = tl.where(tl.arange(0, BLOCK_N)[None, :] < left, s, float("-inf"))
    higher = tl.maximum(highest, tl.max(s, 1) * scale_log2)
    alpha = tl.exp2(highest - higher)
    p = tl.exp2(s * scale_log2 - higher[:, None])
    total = total * alpha + tl.sum(p, 1)
    if HAS_DROPOUT:
        p = tl.where(keep_mask(row, h, n, seed, offset, threshold, BLOCK_N), p, 0.0)
    v = _load_tile(v_ptr, stride_vt, left, K, BLOCK_N, BLOCK_K, IS_WHOLE, UPCAST)
    acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision=PRECISION)
    return higher, total, acc


@triton.jit
def _attention_tiled_fwd_kernel(
    q_ptr, k_ptr, v_ptr, cu_seqlens_q_ptr, cu_seqlens_ptr, seed_ptr,  # inputs
    out_ptr, lse_ptr,                                                 # outputs
    B, M, H, tiles,
    stride_qm, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh, stride_om, stride_oh,
    scale_log2, offset, threshold, keep_scale,
    HAS_DROPOUT: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PEEL: tl.constexpr,
):  # fmt: skip
    # tiles of one sequence and head are neighbours: they read the same keys and values
    tile = tl.program_id(0) % tiles
    h = tl.program_id(0) // tiles % H
    b = tl.program_id(0) // tiles // H
    offs_m = tl.arange(0, BLOCK_M)
    lse_ptr = _at(lse_ptr, 0, 1, h, M)

    end = tl.load(cu_seqlens_q_ptr + B)
    _zero_slack(out_ptr, stride_om, h, stride_oh, end, M, b * tiles + tile, B * tiles, K, BLOCK_M, BLOCK_K)
    _zero_slack(lse_ptr, 1, 0, 0, end, M, b * tiles + tile, B * tiles, 1, BLOCK_M, 1)

    start_q = tl.load(cu_seqlens_q_ptr + b) + tile * BLOCK_M
    rows = tl.load(cu_seqlens_q_ptr + b + 1) - start_q
    start = tl.load(cu_seqlens_ptr + b)
    length = tl.load(cu_seqlens_ptr + b + 1) - start
    if rows <= 0:
        return

    q_ptr = _at(q_ptr, start_q, stride_qm, h, stride_qh)
    k_ptr = _at(k_ptr, start, stride_kt, h, stride_kh)
    v_ptr = _at(v_ptr, start, stride_vt, h, stride_vh)
    out_ptr = _at(out_ptr, start_q, stride_om, h, stride_oh)
    seed = tl.load(seed_ptr) if HAS_DROPOUT else 0
    row = start_q + offs_m
    q = _load_tile(q_ptr, stride_qm, rows, K, BLOCK_M, BLOCK_K, False, UPCAST)
    # finite, so that a sequence without keys gives rows of 0
    highest = tl.full([BLOCK_M], -1e30, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)
    whole = length // BLOCK_N * BLOCK_N if PEEL else length
    for n in range(0, whole, BLOCK_N):
        highest, total, acc = _attend(
            highest, total, acc, q, k_ptr, v_ptr, stride_kt, stride_vt, n, length - n,
            row, h, seed, scale_log2, offset, threshold,
            HAS_DROPOUT, PRECISION, UPCAST, K, BLOCK_N, BLOCK_K, PEEL,
        )  # fmt: skip
        k_ptr = _at(k_ptr, BLOCK_N, stride_kt, 0, 0)
        v_ptr = _at(v_ptr, BLOCK_N, stride_vt, 0, 0)
    if whole < length:
        highest, total, acc = _attend(
            highest, total, acc, q, k_ptr, v_ptr, stride_kt, stride_vt, whole, length - whole,
            row, h, seed, scale_log2, offset, threshold,
            HAS_DROPOUT, PRECISION, UPCAST, K, BLOCK_N, BLOCK_K, False,
        )  # fmt: skip
    total = tl.maximum(total, 1e-30)
    tl.store(lse_ptr + row, highest + tl.log2(total), mask=offs_m < rows)
    _store_tile(out_ptr, stride_om, rows, acc * (keep_scale / total)[:, None], K, BLOCK_M, BLOCK_K)


@triton.jit
def _attention_short_bwd_kernel(
    dout_ptr, q_ptr, k_ptr, v_ptr, lse_ptr, cu_seqlens_q_ptr, cu_seqlens_ptr, seed_ptr,  # inputs
    dq_ptr, dk_ptr, dv_ptr,                                                              # outputs
    B, M, T, H,
    stride_dom, stride_doh, stride_qm, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh,
    stride_dqm, stride_dqh, stride_dkt, stride_dkh, stride_dvt, stride_dvh,
    scale, scale_log2, offset, threshold, keep_scale,
    HAS_DROPOUT: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0) // H
    h = tl.program_id(0) % H
    offs_m = tl.arange(0, BLOCK_M)
    offs_n = tl.arange(0, BLOCK_N)

    end = tl.load(cu_seqlens_ptr + B)
    _zero_slack(dk_ptr, stride_dkt, h, stride_dkh, end, T, b, B, K, BLOCK_N, BLOCK_K)
    _zero_slack(dv_ptr, stride_dvt, h, stride_dvh, end, T, b, B, K, BLOCK_N, BLOCK_K)
    _zero_slack(dq_ptr, stride_dqm, h, stride_dqh, tl.load(cu_seqlens_q_ptr + B), M, b, B, K, BLOCK_M, BLOCK_K)

    start_q = tl.load(cu_seqlens_q_ptr + b)
    rows = tl.load(cu_seqlens_q_ptr + b + 1) - start_q
    start = tl.load(cu_seqlens_ptr + b)
    length = tl.load(cu_seqlens_ptr + b + 1) - start
    if rows + length == 0:
        return

    dout_ptr = _at(dout_ptr, start_q, stride_dom, h, stride_doh)
    q_ptr = _at(q_ptr, start_q, stride_qm, h, stride_qh)
    k_ptr = _at(k_ptr, start, stride_kt, h, stride_kh)
    v_ptr = _at(v_ptr, start, stride_vt, h, stride_vh)
    q = _load_tile(q_ptr, stride_qm, rows, K, BLOCK_M, BLOCK_K, False, UPCAST)
    k = _load_tile(k_ptr, stride_kt, length, K, BLOCK_N, BLOCK_K, False, UPCAST)
    v = _load_tile(v_ptr, stride_vt, length, K, BLOCK_N, BLOCK_K, False, UPCAST)
    dout = _load_tile(dout_ptr, stride_dom, rows, K, BLOCK_M, BLOCK_K, False, UPCAST)
    # infinity makes the probabilities of rows that do not exist 0
    lse = tl.load(_at(lse_ptr, start_q, 1, h, M) + offs_m, mask=offs_m < rows, other=float("inf"))

    s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    p = tl.exp2(s * scale_log2 - lse[:, None])
    p = tl.where(offs_n[None, :] < length, p, 0.0)
    # a large log-sum-exp has lost digits; the whole row is here to restore its sum of 1
    p *= (1.0 / tl.maximum(tl.sum(p, 1), 1e-30))[:, None]
    dp = tl.dot(dout, tl.trans(v), input_precision=PRECISION)
    if HAS_DROPOUT:
        keep = keep_mask(start_q + offs_m, h, 0, tl.load(seed_ptr), offset, threshold, BLOCK_N)
        dp = tl.where(keep, dp * keep_scale, 0.0)
        kept = tl.where(keep, p, 0.0).to(dout.dtype)
    else:
        kept = p.to(dout.dtype)
    dv = tl.dot(tl.trans(kept), dout, input_precision=PRECISION) * keep_scale
    _store_tile(_at(dv_ptr, start, stride_dvt, h, stride_dvh), stride_dvt, length, dv, K, BLOCK_N, BLOCK_K)
    # rowsum(dout * out), without reading out
    delta = tl.sum(p * dp, 1)
    ds = (p * (dp - delta[:, None])).to(q.dtype)
    dk = tl.dot(tl.trans(ds), q, input_precision=PRECISION) * scale
    _store_tile(_at(dk_ptr, start, stride_dkt, h, stride_dkh), stride_dkt, length, dk, K, BLOCK_N, BLOCK_K)
    dq = tl.dot(ds, k, input_precision=PRECISION) * scale
    _store_tile(_at(dq_ptr, start_q, stride_dqm, h, stride_dqh), stride_dqm, rows, dq, K, BLOCK_M, BLOCK_K)


@triton.jit
def _add_dq(
    dq, q, dout, lse, delta, k_ptr, v_ptr, stride_kt, stride_vt, n, left,
    row, h, seed, scale_log2, offset, threshold, keep_scale,
    HAS_DROPOUT: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, IS_WHOLE: tl.constexpr,
):  # fmt: skip
    """dq / scale with what the tile of keys from `n` on, of which `left` exist, adds to it."""
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
    K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PEEL: tl.constexpr,
):  # fmt: skip
    """dq, and delta [H, M] = rowsum(dout * out) for the kernel below."""
    tile = tl.program_id(0) % tiles
    h = tl.program_id(0) // tiles % H
    b = tl.program_id(0) // tiles // H
    offs_m = tl.arange(0, BLOCK_M)

    end = tl.load(cu_seqlens_q_ptr + B)
    _zero_slack(dq_ptr, stride_dqm, h, stride_dqh, end, M, b * tiles + tile, B * tiles, K, BLOCK_M, BLOCK_K)

    start_q = tl.load(cu_seqlens_q_ptr + b) + tile * BLOCK_M
    rows = tl.load(cu_seqlens_q_ptr + b + 1) - start_q
    start = tl.load(cu_seqlens_ptr + b)
    length = tl.load(cu_seqlens_ptr + b + 1) - start
    if rows <= 0:
        return

    dout_ptr = _at(dout_ptr, start_q, stride_dom, h, stride_doh)
    q_ptr = _at(q_ptr, start_q, stride_qm, h, stride_qh)
    k_ptr = _at(k_ptr, start, stride_kt, h, stride_kh)
    v_ptr = _at(v_ptr, start, stride_vt, h, stride_vh)
    out_ptr = _at(out_ptr, start_q, stride_om, h, stride_oh)
    q = _load_tile(q_ptr, stride_qm, rows, K, BLOCK_M, BLOCK_K, False, UPCAST)
    dout = _load_tile(dout_ptr, stride_dom, rows, K, BLOCK_M, BLOCK_K, False, UPCAST)
    out = _load_tile(out_ptr, stride_om, rows, K, BLOCK_M, BLOCK_K, False, UPCAST)
    delta = tl.sum(dout.to(tl.float32) * out.to(tl.float32), 1)
    tl.store(_at(delta_ptr, start_q, 1, h, M) + offs_m, delta, mask=offs_m < rows)
    lse = tl.load(_at(lse_ptr, start_q, 1, h, M) + offs_m, mask=offs_m < rows, other=float("inf"))

    seed = tl.load(seed_ptr) if HAS_DROPOUT else 0
    row = start_q + offs_m
    dq = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)
    whole = length // BLOCK_N * BLOCK_N if PEEL else length
    for n in range(0, whole, BLOCK_N):
        dq = _add_dq(
            dq, q, dout, lse, delta, k_ptr, v_ptr, stride_kt, stride_vt, n, length - n,
            row, h, seed, scale_log2, offset, threshold, keep_scale,
            HAS_DROPOUT, PRECISION, UPCAST, K, BLOCK_N, BLOCK_K, PEEL,
        )  # fmt: skip
        k_ptr = _at(k_ptr, BLOCK_N, stride_kt, 0, 0)
        v_ptr = _at(v_ptr, BLOCK_N, stride_vt, 0, 0)
    if whole < length:
        dq = _add_dq(
            dq, q, dout, lse, delta, k_ptr, v_ptr, stride_kt, stride_vt, whole, length - whole,
            row, h, seed, scale_log2, offset, threshold, keep_scale,
            HAS_DROPOUT, PRECISION, UPCAST, K, BLOCK_N, BLOCK_K, False,
        )  # fmt: skip
    _store_tile(_at(dq_ptr, start_q, stride_dqm, h, stride_dqh), stride_dqm, rows, dq * scale, K, BLOCK_M, BLOCK_K)


@triton.jit
def _attention_tiled_dkdv_kernel(
    dout_ptr, q_ptr, k_ptr, v_ptr, lse_ptr, delta_ptr, cu_seqlens_q_ptr, cu_seqlens_ptr, seed_ptr,  # inputs
    dk_ptr, dv_ptr,                                                                                 # outputs
    B, M, T, H, tiles,
    stride_dom, stride_doh, stride_qm, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh,
    stride_dkt, stride_dkh, stride_dvt, stride_dvh,
    scale, scale_log2, offset, threshold, keep_scale,
    HAS_DROPOUT: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0) % tiles
    h = tl.program_id(0) // tiles % H
    b = tl.program_id(0) // tiles // H
    offs_m = tl.arange(0, BLOCK_M)

    end = tl.load(cu_seqlens_ptr + B)
    _zero_slack(dk_ptr, stride_dkt, h, stride_dkh, end, T, b * tiles + tile, B * tiles, K, BLOCK_N, BLOCK_K)
    _zero_slack(dv_ptr, stride_dvt, h, stride_dvh, end, T, b * tiles + tile, B * tiles, K, BLOCK_N, BLOCK_K)

    start_q = tl.load(cu_seqlens_q_ptr + b)
    rows = tl.load(cu_seqlens_q_ptr + b + 1) - start_q
    start = tl.load(cu_seqlens_ptr + b) + tile * BLOCK_N
    length = tl.load(cu_seqlens_ptr + b + 1) - start
    if length <= 0:
        return

    dout_ptr = _at(dout_ptr, start_q, stride_dom, h, stride_doh)
    q_ptr = _at(q_ptr, start_q, stride_qm, h, stride_qh)
    k_ptr = _at(k_ptr, start, stride_kt, h, stride_kh)
    v_ptr = _at(v_ptr, start, stride_vt, h, stride_vh)
    lse_ptr = _at(lse_ptr, start_q, 1, h, M)
    delta_ptr = _at(delta_ptr, start_q, 1, h, M)
    k = _load_tile(k_ptr, stride_kt, length, K, BLOCK_N, BLOCK_K, False, UPCAST)
    v = _load_tile(v_ptr, stride_vt, length, K, BLOCK_N, BLOCK_K, False, UPCAST)
    seed = tl.load(seed_ptr) if HAS_DROPOUT else 0
    dk = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    for m in range(0, rows, BLOCK_M):
        q = _load_tile(q_ptr, stride_qm, rows - m, K, BLOCK_M, BLOCK_K, False, UPCAST)
        dout = _load_tile(dout_ptr, stride_dom, rows - m, K, BLOCK_M, BLOCK_K, False, UPCAST)
        lse = tl.load(lse_ptr + m + offs_m, mask=m + offs_m < rows, other=float("inf"))
        delta = tl.load(delta_ptr + m + offs_m, mask=m + offs_m < rows, other=0.0)
        # transposed tiles [BLOCK_N, BLOCK_M]: the left operands of the last two products, straight from registers.
        # Keys that do not exist need no mask: what they make lands in rows of their own, which are not stored
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
        q_ptr = _at(q_ptr, BLOCK_M, stride_qm, 0, 0)
        dout_ptr = _at(dout_ptr, BLOCK_M, stride_dom, 0, 0)
    dk_ptr = _at(dk_ptr, start, stride_dkt, h, stride_dkh)
    dv_ptr = _at(dv_ptr, start, stride_dvt, h, stride_dvh)
    _store_tile(dk_ptr, stride_dkt, length, dk * scale, K, BLOCK_N, BLOCK_K)
    _store_tile(dv_ptr, stride_dvt, length, dv * keep_scale, K, BLOCK_N, BLOCK_K)


def _unpacked(q, k, v):
    """q, k and v [rows, H, K], views where they come packed, with the elements of a head side by side."""
    if k is None:
        q, k, v = q.unbind(1)
    elif v is None:
        k, v = k.unbind(1)
    return unit_columns(q), unit_columns(k), unit_columns(v)


def _short(q, max_seqlen_q, max_seqlen, is_forward):
    """Launch settings where one program takes a whole sequence and head, None where that would spill registers."""
    block_m, block_n = (max(triton.next_power_of_2(size), 16) for size in (max_seqlen_q, max_seqlen))
    is_wide = q.shape[-1] > 64
    largest = 128 if capability() >= 90 else 64
    if q.dtype == torch.float32:
        largest = 16 if is_wide else 32
    if max(block_m, block_n) > largest:
        return None
    settings = dict(BLOCK_M=block_m, BLOCK_N=block_n, num_warps=8 if max(block_m, block_n) == 128 else 4, num_stages=1)
    if is_forward and settings["num_warps"] == 8 and not is_wide:
        # with dropout the compiler takes 129, and a multiprocessor then holds one program instead of two
        settings["maxnreg"] = 128
    return settings


# (kernel, operands are fp32, head size is over 64): (BLOCK_M, BLOCK_N, warps, stages).
# Chosen from the compiler's reports (no spills on sm_80 and sm_90: NOTES.md), not yet from times on a device
_TILES = {
    ("fwd", False, False): (128, 64, 8, 3),
    ("fwd", False, True): (128, 64, 8, 2),
    ("fwd", True, False): (64, 32, 8, 1),
    ("fwd", True, True): (32, 32, 8, 1),
    ("dq", False, False): (64, 32, 4, 2),
    ("dq", False, True): (64, 32, 8, 2),
    ("dq", True, False): (32, 32, 8, 1),
    ("dq", True, True): (16, 16, 8, 1),
    ("dkdv", False, False): (32, 128, 8, 2),
    ("dkdv", False, True): (32, 64, 8, 2),
    ("dkdv", True, False): (32, 64, 8, 1),
    ("dkdv", True, True): (16, 32, 8, 1),
}


def _tiled(kernel, q, max_seqlen_q, has_dropout):
    """Launch settings of one of the three tiled kernels."""
    is_full, is_wide = q.dtype == torch.float32, q.shape[-1] > 64
    # sm_100's tensor cores take tiles of 64 rows or more, and Triton lets them round fp32 to tf32, whatever the
    # precision asked for, once an operand comes from a join, as the dropout mask does: keep below
    is_wide |= is_full and capability() >= 100
    block_m, block_n, num_warps, num_stages = _TILES[kernel, is_full, is_wide]
    if kernel == "fwd" and max_seqlen_q <= 64 < block_m:
        # few rows ask, as in a last layer that only serves the picked ones
        block_m, num_warps = 64, 4
    settings = dict(BLOCK_M=block_m, BLOCK_N=block_n, num_warps=num_warps, num_stages=num_stages)
    if kernel != "dkdv":
        # where operands are large, two copies of the loop's body would share them in registers, and spill
        settings["PEEL"] = not (is_full or is_wide)
    if kernel == "fwd" and block_m == 128 and not (is_wide or has_dropout) and capability() >= 90:
        # the compiler takes 130, and a multiprocessor then holds one program instead of two
        settings["maxnreg"] = 128
    return settings


def _constants(q, dropout_p):
    """The compile-time constants that every kernel has beside its blocks."""
    K = q.shape[-1]
    return dict(
        HAS_DROPOUT=dropout_p > 0.0,
        PRECISION="tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee",
        # Triton's interpreter computes wrongly with bfloat16, so there it is widened as it is loaded
        UPCAST=INTERPRET and q.dtype == torch.bfloat16,
        K=K,
        BLOCK_K=max(triton.next_power_of_2(K), 16),
    )


def attention_fwd(q, k, v, cu_seqlens_q, cu_seqlens, max_seqlen_q, max_seqlen, scale, dropout_p, seed, offset):
    """(out [M, H, K], lse fp32 [H, M]: log2 of the sum of exp(scaled scores), without meaning where no key is)."""
    q, k, v = _unpacked(q, k, v)
    cu_seqlens_q = cu_seqlens if cu_seqlens_q is None else cu_seqlens_q
    M, H, K = q.shape
    B = cu_seqlens.shape[0] - 1
    out = torch.empty(M, H, K, dtype=q.dtype, device=q.device)
    lse = torch.empty(H, M, dtype=torch.float32, device=q.device)
    if B * H == 0:
        return out.zero_(), lse.zero_()
    threshold, keep_scale = dropout_constants(dropout_p)
    arguments = (q, k, v, cu_seqlens_q, cu_seqlens, seed, out, lse, B, M, H)
    strides = [x.stride(d) for x in (q, k, v, out) for d in (0, 1)]
    scalars = (scale * math.log2(math.e), offset, threshold, keep_scale)
    constants = _constants(q, dropout_p)
    settings = _short(q, max_seqlen_q, max_seqlen, True)
    if settings:
        _attention_short_fwd_kernel[(B * H,)](*arguments, *strides, *scalars, **constants, **settings)
        return out, lse
    settings = _tiled("fwd", q, max_seqlen_q, dropout_p > 0.0)
    tiles = max(triton.cdiv(max_seqlen_q, settings["BLOCK_M"]), 1)
    _attention_tiled_fwd_kernel[(B * H * tiles,)](*arguments, tiles, *strides, *scalars, **constants, **settings)
    return out, lse


def attention_bwd(
    dout, q, k, v, out, lse, cu_seqlens_q, cu_seqlens, max_seqlen_q, max_seqlen, scale, dropout_p, seed, offset
):
    """The gradients of q, k, v as they were given: a list of one when q holds all three, of two when k holds two."""
    grads = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v) if x is not None]
    dq, dk, dv = _unpacked(*grads, *[None] * (3 - len(grads)))
    q, k, v = _unpacked(q, k, v)
    dout = unit_columns(dout)
    cu_seqlens_q = cu_seqlens if cu_seqlens_q is None else cu_seqlens_q
    M, H, _ = q.shape
    T, B = k.shape[0], cu_seqlens.shape[0] - 1
    if B * H == 0:
        return [grad.zero_() for grad in grads]
    threshold, keep_scale = dropout_constants(dropout_p)
    strides = [x.stride(d) for x in (dout, q, k, v) for d in (0, 1)]
    strides_dq = [dq.stride(d) for d in (0, 1)]
    strides_dkdv = [x.stride(d) for x in (dk, dv) for d in (0, 1)]
    scalars = (scale, scale * math.log2(math.e), offset, threshold, keep_scale)
    constants = _constants(q, dropout_p)
    settings = _short(q, max_seqlen_q, max_seqlen, False)
    if settings:
        _attention_short_bwd_kernel[(B * H,)](
            dout, q, k, v, lse, cu_seqlens_q, cu_seqlens, seed, dq, dk, dv, B, M, T, H,
            *strides, *strides_dq, *strides_dkdv, *scalars, **constants, **settings,
        )  # fmt: skip
        return grads
    delta = torch.empty_like(lse)
    settings = _tiled("dq", q, max_seqlen_q, dropout_p > 0.0)
    tiles = max(triton.cdiv(max_seqlen_q, settings["BLOCK_M"]), 1)
    _attention_tiled_dq_kernel[(B * H * tiles,)](
        dout, q, k, v, out, lse, cu_seqlens_q, cu_seqlens, seed, dq, delta, B, M, H, tiles,
        *strides, out.stride(0), out.stride(1), *strides_dq, *scalars, **constants, **settings,
    )  # fmt: skip
    settings = _tiled("dkdv", q, max_seqlen_q, dropout_p > 0.0)
    tiles = max(triton.cdiv(max_seqlen, settings["BLOCK_N"]), 1)
    _attention_tiled_dkdv_kernel[(B * H * tiles,)](
        dout, q, k, v, lse, delta, cu_seqlens_q, cu_seqlens, seed, dk, dv, B, M, T, H, tiles,
        *strides, *strides_dkdv, *scalars, **constants, **settings,
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
    "Tensor? cu_seqlens_q, Tensor cu_seqlens, SymInt max_seqlen_q, SymInt max_seqlen, "
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
        max_seqlen_q = max_seqlen
    elif max_seqlen_q is None:
        max_seqlen_q = q.shape[0]
    return AttentionFunction.apply(
        q, k, v, cu_seqlens_q, cu_seqlens, max_seqlen_q, max_seqlen, scale, dropout_p, seed, offset
    )
