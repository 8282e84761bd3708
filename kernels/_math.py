"""Device side: what several kernels compute. GELU and its derivative, and the dropout mask."""

import triton
import triton.language as tl

PHILOX_ROUNDS = tl.constexpr(7)


@triton.jit
def tanh(x):
    # exp of a non-positive number cannot overflow
    e = tl.exp(-2.0 * tl.abs(x))
    t = (1.0 - e) / (1.0 + e)
    return tl.where(x < 0, -t, t)


@triton.jit
def gelu(x, TANH: tl.constexpr):
    if TANH:
        return 0.5 * x * (1.0 + tanh(0.7978845608028654 * (x + 0.044715 * x * x * x)))
    else:
        return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))


@triton.jit
def gelu_derivative(x, TANH: tl.constexpr):
    if TANH:
        t = tanh(0.7978845608028654 * (x + 0.044715 * x * x * x))
        inner = 0.7978845608028654 * (1.0 + 3.0 * 0.044715 * x * x)
        return 0.5 * (1.0 + t) + 0.5 * x * (1.0 - t * t) * inner
    else:
        density = 0.3989422804014327 * tl.exp(-0.5 * x * x)
        return 0.5 * (1.0 + tl.erf(x * 0.7071067811865476)) + x * density


@triton.jit
def keep_mask(row, head, column, seed, offset, threshold, BLOCK_C: tl.constexpr):
    """The [R, BLOCK_C] tile of the keep mask that `fastbert/reference.py` defines.

    row [R] (any integer type), head a scalar, column the tile's first column (a multiple of 8), seed the int64 seed,
    offset the call's number, threshold = round(dropout_p * 65536). One Philox call makes eight neighbouring columns.
    """
    group = column // 8 + tl.arange(0, BLOCK_C // 8)
    zero = tl.zeros([row.shape[0], BLOCK_C // 8], tl.uint32)
    c0 = zero + group[None, :].to(tl.uint32)
    c1 = zero + row[:, None].to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(seed, c0, c1, zero + head, zero + offset, PHILOX_ROUNDS)
    # join pairs along a new last axis: the order below makes piece l (word l // 2, low half first) stand in column l
    even = tl.join(tl.join(w0 & 0xFFFF, w2 & 0xFFFF), tl.join(w1 & 0xFFFF, w3 & 0xFFFF))
    odd = tl.join(tl.join(w0 >> 16, w2 >> 16), tl.join(w1 >> 16, w3 >> 16))
    return tl.reshape(tl.join(even, odd), [row.shape[0], BLOCK_C]).to(tl.int32) >= threshold
