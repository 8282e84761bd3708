"""Device side of several kernels: GELU and its derivative, LayerNorm over a tiled row, the dropout mask."""

import triton
import triton.language as tl

PHILOX_ROUNDS = tl.constexpr(7)


@triton.jit
def reciprocal(x):
    """1 / x for x >= 1, to 3e-7, in 2 instructions. A division takes 9, to handle ranges that cannot occur here."""
    root = tl.rsqrt(x)
    return root * root


@triton.jit
def sigmoid(x):
    """(1 / (1 + exp(-x)), its derivative). exp takes a non-positive number: no overflow, no digits lost near 0 or 1."""
    e = tl.exp2(-1.4426950408889634 * tl.abs(x))
    r = reciprocal(1.0 + e)
    return tl.where(x < 0, e * r, r), e * r * r


@triton.jit
def normal_tail(x):
    """(Φ(-|x|), exp(-x² / 2)): the normal distribution's lower tail and its unnormalised density.

    tl.erf takes about twice the instructions, and would make kernels compute-bound. Here Φ(-|x|) = exp(-x² / 2) t P(t)
    with t = 1 / (1 + 0.3 |x|). P has the least relative error of its degree, 1.5e-7 everywhere. So x Φ(x) is off by at
    most 2.5e-8, and its negative tail keeps the digits that cancel in 1 + erf(x).
    """
    t = reciprocal(1.0 + 0.3 * tl.abs(x))
    p = 0.03567539 * t - 0.15720586
    p = p * t + 0.20635863
    p = p * t - 0.05368861
    p = p * t + 0.12856436
    p = p * t + 0.09991264
    p = p * t + 0.1207541
    p = p * t + 0.11962929
    density = tl.exp2(-0.7213475204444817 * x * x)
    return p * t * density, density


@triton.jit
def gelu(x, TANH: tl.constexpr):
    if TANH:
        s, _ = sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
        return x * s
    else:
        tail, _ = normal_tail(x)
        return x * tl.where(x < 0, tail, 1.0 - tail)


@triton.jit
def gelu_derivative(x, TANH: tl.constexpr):
    if TANH:
        s, ds = sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
        return s + x * ds * 1.5957691216057308 * (1.0 + 3.0 * 0.044715 * x * x)
    else:
        tail, density = normal_tail(x)
        return tl.where(x < 0, tail, 1.0 - tail) + 0.3989422804014327 * x * density


@triton.jit
def activated(x, ACTIVATION: tl.constexpr):
    """SiLU ("silu"), or GELU ("gelu", "gelu_tanh")."""
    if ACTIVATION == "silu":
        s, _ = sigmoid(x)
        return x * s
    else:
        return gelu(x, ACTIVATION == "gelu_tanh")


@triton.jit
def activation_derivative(x, ACTIVATION: tl.constexpr):
    if ACTIVATION == "silu":
        s, ds = sigmoid(x)
        return s + x * ds
    else:
        return gelu_derivative(x, ACTIVATION == "gelu_tanh")


@triton.jit
def row_start(row, stride, ALIGN: tl.constexpr):
    """row * stride, for a stride that is a multiple of ALIGN.

    Triton itself only looks for multiples of 16, and would read 312 columns of bf16 two bytes at a time. Here it sees a
    product with ALIGN. tl.multiple_of on the offsets of a single row crashes the compiler (3.7.1).
    """
    return row * (stride // ALIGN * ALIGN)


@triton.jit
def load_rows(ptr, row, stride, offs_d, mask, ALIGN: tl.constexpr, other=0.0):
    """Columns `offs_d` [1, BLOCK_D] of rows [R, 1] in fp32, `other` outside the mask."""
    return tl.load(ptr + row_start(row, stride, ALIGN) + offs_d, mask=mask, other=other).to(tl.float32)


@triton.jit
def parameter(ptr, offs_d, mask):
    """Columns `offs_d` of a parameter as a whole tile [R, BLOCK_D], fp32.

    A [1, BLOCK_D] load would get another layout, and converting to it would move the rows through shared memory.
    """
    return tl.load(tl.broadcast_to(ptr + offs_d, mask.shape), mask=mask, other=0.0).to(tl.float32)


@triton.jit
def columns(i, mask_t, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """(columns [1, BLOCK_D] of tile i, mask [BLOCK_T, BLOCK_D] of those that exist in the rows of mask_t)."""
    offs_d = i * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
    return offs_d, mask_t & (offs_d < D)


@triton.jit
def row_sum(tiles):
    """[R]: the sums of R rows, given as a tuple of [R, BLOCK_D] tiles."""
    total = tiles[0]
    for i in tl.static_range(1, len(tiles)):
        total += tiles[i]
    return tl.sum(total, 1)


@triton.jit
def row_moments(z, eps, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """(mean, 1 / sqrt(variance + eps)), each [R], of rows of D elements whose tiles `z` (fp32) hold 0 past the end."""
    mean = row_sum(z) / D
    centered = ()
    squares = ()
    for i in tl.static_range(len(z)):
        inside = i * BLOCK_D + tl.arange(0, BLOCK_D)[None, :] < D
        c = tl.where(inside, z[i] - mean[:, None], 0.0)
        centered = centered + (c,)
        squares = squares + (c * c,)
    # remove the mean's rounding error, so that a row of equal large numbers has a variance of exactly 0
    shift = row_sum(centered) / D
    variance = tl.maximum(row_sum(squares) / D - shift * shift, 0.0)
    return mean + shift, 1.0 / tl.sqrt(variance + eps)


@triton.jit
def layer_norm_dz(g, z_hat, rstd, D: tl.constexpr):
    """Tiles of the gradient of LayerNorm's input. g is dy * weight, z_hat the normalised row, both 0 past the end."""
    products = ()
    for i in tl.static_range(len(g)):
        products = products + (g[i] * z_hat[i],)
    mean_g = (row_sum(g) / D)[:, None]
    mean_product = (row_sum(products) / D)[:, None]
    dz = ()
    for i in tl.static_range(len(g)):
        dz = dz + ((g[i] - mean_g - z_hat[i] * mean_product) * rstd[:, None],)
    return dz


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
    # join pairs along a new last axis, in the order that puts piece l (word l // 2, low half first) in column l
    even = tl.join(tl.join(w0 & 0xFFFF, w2 & 0xFFFF), tl.join(w1 & 0xFFFF, w3 & 0xFFFF))
    odd = tl.join(tl.join(w0 >> 16, w2 >> 16), tl.join(w1 >> 16, w3 >> 16))
    return tl.reshape(tl.join(even, odd), [row.shape[0], BLOCK_C]).to(tl.int32) >= threshold


@triton.jit
def philox(c0, c1, c2, c3, seed):
    """Philox4x32-7: four random uint32 from a counter of four (which may broadcast) and an int64 seed.

    Like tl.philox, but with one wide product instead of two products for its two halves.
    """
    k0 = (seed & 0xFFFFFFFF).to(tl.uint32)
    k1 = ((seed >> 32) & 0xFFFFFFFF).to(tl.uint32)
    for _ in tl.static_range(PHILOX_ROUNDS):
        product_0 = c0.to(tl.uint64) * 0xD2511F53
        product_2 = c2.to(tl.uint64) * 0xCD9E8D57
        c0 = (product_2 >> 32).to(tl.uint32) ^ c1 ^ k0
        c2 = (product_0 >> 32).to(tl.uint32) ^ c3 ^ k1
        c1 = product_2.to(tl.uint32)
        c3 = product_0.to(tl.uint32)
        k0 = tl.add(k0, 0x9E3779B9, sanitize_overflow=False)
        k1 = tl.add(k1, 0xBB67AE85, sanitize_overflow=False)
    return c0, c1, c2, c3


@triton.jit
def attention_keep_mask(row, head, column, seed, offset, threshold, BLOCK_C: tl.constexpr):
    """The [R, BLOCK_C] tile of the keep mask of attention that `fastbert/reference.py` defines.

    Arguments as for `keep_mask`, but `threshold` is at least 1 (0 drops nothing and needs no mask), BLOCK_C is at least
    16, and `column`, the tile's first column, is a multiple of BLOCK_C or of 32.

    One Philox call serves the eight columns that differ in bits 0, 3 and 4. In the accumulator of a tensor core a
    thread has columns with all values of bits 0, 3, 4 and above, and bits 1 and 2 are the number of the thread. So each
    thread draws the bits of its own columns, and none has to move. In other layouts this is correct too, but slower.
    """
    # dimensions: row; bits 4 and above of the column; bit 3; bits 2 and 1; bit 0
    high = column // 16 + tl.arange(0, BLOCK_C // 16)[None, :, None, None, None]
    bit_3 = tl.arange(0, 2)[None, None, :, None, None]
    bits_21 = tl.arange(0, 4)[None, None, None, :, None]
    bit_0 = tl.arange(0, 2)[None, None, None, None, :]
    c0 = (high // 2 * 4 + bits_21).to(tl.uint32)
    c1 = row.to(tl.uint32)[:, None, None, None, None]
    zero = tl.zeros([1, 1, 1, 1, 1], tl.uint32)
    w0, w1, w2, w3 = philox(c0, c1, zero + tl.cast(head, tl.uint32), zero + tl.cast(offset, tl.uint32), seed)
    word = tl.where(high % 2 == 0, tl.where(bit_3 == 0, w0, w1), tl.where(bit_3 == 0, w2, w3))
    # the high half is at least the threshold if the whole word is above the largest one with a smaller high half
    least = tl.cast(threshold, tl.uint32)
    keep = tl.where(bit_0 == 0, (word & 0xFFFF) >= least, word > ((least - 1) << 16 | 0xFFFF))
    return tl.reshape(keep, [row.shape[0], BLOCK_C])
