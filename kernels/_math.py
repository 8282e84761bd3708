"""Device side: what several kernels compute. GELU and its derivative, LayerNorm over a tiled row, the dropout mask."""

import triton
import triton.language as tl

PHILOX_ROUNDS = tl.constexpr(7)


@triton.jit
def reciprocal(x):
    """1 / x for x >= 1, to 3e-7. A division guards against ranges that cannot occur here: 9 instructions, not 2."""
    root = tl.rsqrt(x)
    return root * root


@triton.jit
def sigmoid(x):
    """(1 / (1 + exp(-x)), its derivative), by exp of a non-positive number: no overflow, no digits lost near 0 or 1."""
    e = tl.exp2(-1.4426950408889634 * tl.abs(x))
    r = reciprocal(1.0 + e)
    return tl.where(x < 0, e * r, r), e * r * r


@triton.jit
def normal_tail(x):
    """(Φ(-|x|), exp(-x² / 2)): the normal distribution's lower tail and its bare density.

    tl.erf takes about twice the instructions: arithmetic would bind the kernels that use it, where memory should. Here
    Φ(-|x|) = exp(-x² / 2) t P(t) with t = 1 / (1 + 0.3 |x|), and P has the least relative error of its degree: 1.5e-7
    everywhere. So x Φ(x) is off by 2.5e-8 at most, and its negative tail keeps the digits that 1 + erf(x) cancels.
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
def row_sum(tiles):
    """[R]: the sums of R rows that are held as a tuple of [R, BLOCK_D] tiles."""
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
    # what rounding left in the mean: taking it out keeps rows of one repeated large number at exactly zero variance
    shift = row_sum(centered) / D
    variance = tl.maximum(row_sum(squares) / D - shift * shift, 0.0)
    return mean + shift, 1.0 / tl.sqrt(variance + eps)


@triton.jit
def layer_norm_dz(g, z_hat, rstd, D: tl.constexpr):
    """Tiles of the gradient of LayerNorm's input; g is dy * weight, z_hat the normalised row, both 0 past the end."""
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
    # join pairs along a new last axis: the order below makes piece l (word l // 2, low half first) stand in column l
    even = tl.join(tl.join(w0 & 0xFFFF, w2 & 0xFFFF), tl.join(w1 & 0xFFFF, w3 & 0xFFFF))
    odd = tl.join(tl.join(w0 >> 16, w2 >> 16), tl.join(w1 >> 16, w3 >> 16))
    return tl.reshape(tl.join(even, odd), [row.shape[0], BLOCK_C]).to(tl.int32) >= threshold
