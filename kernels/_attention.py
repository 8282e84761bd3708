"""Device side of all attention kernels: sequences, tiles of q, k and v, and the log-sum-exp.

Letters: M query rows, H heads, K head size, R rows of a tile.
"""

import triton
import triton.language as tl


@triton.jit
def at(ptr, row, stride_row, head, stride_head):
    """A pointer to a row of a head. 64 bits: products of row numbers and strides pass 2^31 in large batches."""
    return ptr + tl.cast(row, tl.int64) * stride_row + tl.cast(head, tl.int64) * stride_head


@triton.jit
def sequence(cu_seqlens_ptr, b, skipped=0):
    """(first row, number of rows) of sequence b without its first `skipped` rows. The number may be negative."""
    start = tl.load(cu_seqlens_ptr + b) + skipped
    return start, tl.load(cu_seqlens_ptr + b + 1) - start


@triton.jit
def load_tile(
    ptr, row, stride_row, head, stride_head, rows,
    K: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, UPCAST: tl.constexpr,
    IS_WHOLE: tl.constexpr = False,
):  # fmt: skip
    """[BLOCK_R, BLOCK_K] of a head from `row` on, 0 past `rows` and past K. IS_WHOLE: all BLOCK_R rows exist."""
    offs_r = tl.arange(0, BLOCK_R)
    offs_k = tl.arange(0, BLOCK_K)
    pointers = at(ptr, row, stride_row, head, stride_head) + offs_r[:, None] * stride_row + offs_k[None, :]
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
def store_tile(
    ptr, row, stride_row, head, stride_head, rows, x,
    K: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Store the first `rows` rows of x [BLOCK_R, BLOCK_K] to a head from `row` on."""
    offs_r = tl.arange(0, BLOCK_R)
    offs_k = tl.arange(0, BLOCK_K)
    mask = (offs_r[:, None] < rows) & (offs_k[None, :] < K)
    pointers = at(ptr, row, stride_row, head, stride_head) + offs_r[:, None] * stride_row + offs_k[None, :]
    tl.store(pointers, x.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def zero_slack(
    ptr, stride_row, head, stride_head, end, rows, program, programs,
    K: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Write zeros to this program's share of the rows `end` to `rows`."""
    zeros = tl.zeros([BLOCK_R, BLOCK_K], tl.float32)
    for r in range(end + program * BLOCK_R, rows, programs * BLOCK_R):
        store_tile(ptr, r, stride_row, head, stride_head, rows - r, zeros, K, BLOCK_R, BLOCK_K)


@triton.jit
def zero_slack_of_lse(ptr, H, M, end, program, programs, IS_FP32: tl.constexpr, BLOCK_M: tl.constexpr):
    """`zero_slack` of what `store_lse` writes for the head that starts at `ptr`."""
    zero_slack(ptr, 1, 0, 0, end, M, program, programs, 1, BLOCK_M, 1)
    if IS_FP32:
        zero_slack(at(ptr, H, M, 0, 0), 1, 0, 0, end, M, program, programs, 1, BLOCK_M, 1)


@triton.jit
def exponent(s, scale_log2, highest, IS_FP32: tl.constexpr, AXIS: tl.constexpr = 1):
    """log2 of the numerators of softmax, from the products s and their maxima `highest` [BLOCK_M].

    s is [BLOCK_M, BLOCK_N], or [BLOCK_N, BLOCK_M] with AXIS 0, the axis of the keys.

    In fp32 the unscaled maximum is subtracted before scaling, so that scores of thousands keep the digits of their
    differences. In 16 bits `highest` is scaled, and both steps are one FMA.
    """
    highest = tl.expand_dims(highest, AXIS)
    return (s - highest) * scale_log2 if IS_FP32 else s * scale_log2 - highest


@triton.jit
def load_lse(ptr, rows, H, M, IS_FP32: tl.constexpr, BLOCK_M: tl.constexpr):
    """(highest, log2 of the sum) of rows that `store_lse` wrote. In 16 bits highest includes the log, which is 0 here.

    Rows that do not exist get infinity, so that their probabilities are 0.
    """
    offs_m = tl.arange(0, BLOCK_M)
    highest = tl.load(ptr + offs_m, mask=offs_m < rows, other=float("inf"))
    if IS_FP32:
        return highest, tl.load(at(ptr, H, M, 0, 0) + offs_m, mask=offs_m < rows, other=0.0)
    else:
        return highest, tl.zeros([BLOCK_M], tl.float32)


@triton.jit
def store_lse(ptr, rows, H, M, highest, total, IS_FP32: tl.constexpr, BLOCK_M: tl.constexpr):
    offs_m = tl.arange(0, BLOCK_M)
    if IS_FP32:
        tl.store(ptr + offs_m, highest, mask=offs_m < rows)
        tl.store(at(ptr, H, M, 0, 0) + offs_m, tl.log2(total), mask=offs_m < rows)
    else:
        tl.store(ptr + offs_m, highest + tl.log2(total), mask=offs_m < rows)


@triton.jit
def probabilities(s, scale_log2, highest, log_total, IS_FP32: tl.constexpr, AXIS: tl.constexpr = 1):
    x = exponent(s, scale_log2, highest, IS_FP32, AXIS)
    return tl.exp2(x - tl.expand_dims(log_total, AXIS) if IS_FP32 else x)


@triton.jit
def opaque_zero(keep_scale):
    """A 0 that the compiler cannot see: with a constant it would select after rounding p, one half at a time."""
    return 0.0 * keep_scale
