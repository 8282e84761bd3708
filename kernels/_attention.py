"""Shared by the attention kernels: tiles of q, k and v, and the log-sum-exp.

Letters: H heads, K head size, R rows of a tile.
"""

import torch
import triton
import triton.language as tl

from ._launch import unit_columns

_DTYPES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}


@triton.jit
def _at(ptr, row, stride_row, head, stride_head):
    """A pointer to a row of a head. 64 bits: products of row numbers and strides pass 2^31 in large batches."""
    return ptr + tl.cast(row, tl.int64) * stride_row + tl.cast(head, tl.int64) * stride_head


@triton.jit
def _load_tile(
    ptr, stride, rows,
    K: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, IS_WHOLE: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """[BLOCK_R, BLOCK_K] from `ptr`, 0 past `rows` and past K. IS_WHOLE: all BLOCK_R rows exist."""
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
    """Write zeros to this program's share of the rows `end` to `rows`."""
    zeros = tl.zeros([BLOCK_R, BLOCK_K], tl.float32)
    for r in range(end + program * BLOCK_R, rows, programs * BLOCK_R):
        _store_tile(_at(ptr, r, stride_row, head, stride_head), stride_row, rows - r, zeros, K, BLOCK_R, BLOCK_K)


@triton.jit
def _exponent(s, scale_log2, highest, IS_FP32: tl.constexpr, AXIS: tl.constexpr = 1):
    """log2 of the numerators of softmax, from the products s and their maxima `highest` [BLOCK_M].

    s is [BLOCK_M, BLOCK_N], or [BLOCK_N, BLOCK_M] with AXIS 0, the axis of the keys.

    In fp32 the unscaled maximum is subtracted before scaling, so that scores of thousands keep the digits of their
    differences. In 16 bits `highest` is scaled, and both steps are one FMA.
    """
    highest = tl.expand_dims(highest, AXIS)
    return (s - highest) * scale_log2 if IS_FP32 else s * scale_log2 - highest


@triton.jit
def _load_lse(ptr, rows, H, M, IS_FP32: tl.constexpr, BLOCK_M: tl.constexpr):
    """(highest, log2 of the sum) of rows that `_store_lse` wrote. In 16 bits highest includes the log, which is 0 here.

    Rows that do not exist get infinity, so that their probabilities are 0.
    """
    offs_m = tl.arange(0, BLOCK_M)
    highest = tl.load(ptr + offs_m, mask=offs_m < rows, other=float("inf"))
    if IS_FP32:
        return highest, tl.load(_at(ptr, H, M, 0, 0) + offs_m, mask=offs_m < rows, other=0.0)
    else:
        return highest, tl.zeros([BLOCK_M], tl.float32)


@triton.jit
def _store_lse(ptr, rows, H, M, highest, total, IS_FP32: tl.constexpr, BLOCK_M: tl.constexpr):
    offs_m = tl.arange(0, BLOCK_M)
    if IS_FP32:
        tl.store(ptr + offs_m, highest, mask=offs_m < rows)
        tl.store(_at(ptr, H, M, 0, 0) + offs_m, tl.log2(total), mask=offs_m < rows)
    else:
        tl.store(ptr + offs_m, highest + tl.log2(total), mask=offs_m < rows)


@triton.jit
def _probabilities(s, scale_log2, highest, log_total, IS_FP32: tl.constexpr, AXIS: tl.constexpr = 1):
    x = _exponent(s, scale_log2, highest, IS_FP32, AXIS)
    return tl.exp2(x - tl.expand_dims(log_total, AXIS) if IS_FP32 else x)


@triton.jit
def _zero(keep_scale):
    """A 0 that the compiler does not know: with a constant it would select after rounding p, half by half."""
    return 0.0 * keep_scale


def _unpacked(q, k, v):
    """q, k and v [rows, H, K] from any packing, with the elements of a head contiguous."""
    if k is None:
        q, k, v = q.unbind(1)
    elif v is None:
        k, v = k.unbind(1)
    return unit_columns(q), unit_columns(k), unit_columns(v)


def _lse_parts(q):
    return 2 if q.dtype == torch.float32 else 1
