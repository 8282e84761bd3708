"""Dropout, residual add and LayerNorm in one pass, forward and backward.

    z = dropout(x) + residual              (either may be absent)
    y = (z - mean(z)) * rstd(z) * weight + bias

Plain PyTorch, forward: dropout reads x and writes it and a mask, the add reads two and writes z, LayerNorm reads z and
writes y: 7 T D elements and a mask. Fused: read x and residual, write y, 3 T D, and mean and rstd (8 bytes a row).
Backward, plain: LayerNorm reads dy and z and writes dz, reads both again for dweight and dbias, dropout reads dz and
the mask and writes dx: 7 T D and the mask. Fused: read dy, x, residual, write dx, and dresidual where it differs from
dx (under dropout, or in another dtype): 4 or 5 T D, and 8 D bytes of partial sums per program, written and read once.

z is not kept: the backward makes it again from x and residual. That reads one tensor more than a saved z would, the
forward writes one less, and z stays in fp32 where a saved one would be rounded to x's dtype. The dropout mask is drawn
again too. Statistics are fp32 and two-pass. Each program adds up dweight and dbias over the rows it walks; one sum over
the programs follows. No atomics: the same bits each time.

T tokens, D hidden size.
"""

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

from ._launch import dropout_constants, register, row_programs, row_tiles, unit_columns
from ._math import keep_mask, layer_norm_dz, row_moments


@triton.jit(do_not_specialize=["T", "offset"])
def _layer_norm_fwd_kernel(
    x_ptr, residual_ptr, weight_ptr, bias_ptr, seed_ptr,
    y_ptr, mean_ptr, rstd_ptr,
    T, stride_xt, stride_rt, offset, threshold, scale, eps,
    D: tl.constexpr, HAS_RESIDUAL: tl.constexpr, HAS_DROPOUT: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    # rows are int64: T * D passes 2^31 on long runs
    offs_t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    row = offs_t[:, None]
    mask_t = row < T

    z = ()
    for i in tl.static_range(TILES):
        offs_d = i * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
        mask = mask_t & (offs_d < D)
        tile = tl.load(x_ptr + row * stride_xt + offs_d, mask=mask, other=0.0).to(tl.float32)
        if HAS_DROPOUT:
            keep = keep_mask(offs_t, 0, i * BLOCK_D, tl.load(seed_ptr), offset, threshold, BLOCK_D)
            tile = tl.where(keep, tile * scale, 0.0)
        if HAS_RESIDUAL:
            tile += tl.load(residual_ptr + row * stride_rt + offs_d, mask=mask, other=0.0).to(tl.float32)
        z = z + (tile,)

    mean, rstd = row_moments(z, eps, D, BLOCK_D)
    tl.store(mean_ptr + offs_t, mean, mask=offs_t < T)
    tl.store(rstd_ptr + offs_t, rstd, mask=offs_t < T)

    for i in tl.static_range(TILES):
        offs_d = i * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
        mask = mask_t & (offs_d < D)
        weight = tl.load(tl.broadcast_to(weight_ptr + offs_d, mask.shape), mask=mask, other=0.0).to(tl.float32)
        bias = tl.load(tl.broadcast_to(bias_ptr + offs_d, mask.shape), mask=mask, other=0.0).to(tl.float32)
        y = (z[i] - mean[:, None]) * rstd[:, None] * weight + bias
        tl.store(y_ptr + row * D + offs_d, y, mask=mask)


@triton.jit(do_not_specialize=["T", "offset"])
def _layer_norm_bwd_kernel(
    dy_ptr, x_ptr, residual_ptr, weight_ptr, seed_ptr, mean_ptr, rstd_ptr,
    dx_ptr, dresidual_ptr, dweight_ptr, dbias_ptr,
    T, stride_dyt, stride_xt, stride_rt, offset, threshold, scale,
    D: tl.constexpr, HAS_RESIDUAL: tl.constexpr, HAS_DROPOUT: tl.constexpr, WRITE_DRESIDUAL: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    # dweight and dbias are [programs, D] fp32. Until the end each row of the block has its own share, so that nothing
    # crosses warps inside the loop
    dweight, dbias = (), ()
    for _ in tl.static_range(TILES):
        dweight = dweight + (tl.zeros([BLOCK_T, BLOCK_D], tl.float32),)
        dbias = dbias + (tl.zeros([BLOCK_T, BLOCK_D], tl.float32),)

    pid = tl.program_id(0).to(tl.int64)
    for start in range(pid * BLOCK_T, T, tl.num_programs(0) * BLOCK_T):
        offs_t = start + tl.arange(0, BLOCK_T)
        row = offs_t[:, None]
        mask_t = row < T
        mean = tl.load(mean_ptr + offs_t, mask=offs_t < T, other=0.0)
        rstd = tl.load(rstd_ptr + offs_t, mask=offs_t < T, other=0.0)

        g, z_hat, keeps, new_dweight, new_dbias = (), (), (), (), ()
        for i in tl.static_range(TILES):
            offs_d = i * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
            mask = mask_t & (offs_d < D)
            dy = tl.load(dy_ptr + row * stride_dyt + offs_d, mask=mask, other=0.0).to(tl.float32)
            z = tl.load(x_ptr + row * stride_xt + offs_d, mask=mask, other=0.0).to(tl.float32)
            if HAS_DROPOUT:
                keep = keep_mask(offs_t, 0, i * BLOCK_D, tl.load(seed_ptr), offset, threshold, BLOCK_D)
                z = tl.where(keep, z * scale, 0.0)
                keeps = keeps + (keep,)
            if HAS_RESIDUAL:
                z += tl.load(residual_ptr + row * stride_rt + offs_d, mask=mask, other=0.0).to(tl.float32)
            z = tl.where(mask, (z - mean[:, None]) * rstd[:, None], 0.0)
            weight = tl.load(tl.broadcast_to(weight_ptr + offs_d, mask.shape), mask=mask, other=0.0).to(tl.float32)
            g = g + (dy * weight,)
            z_hat = z_hat + (z,)
            new_dweight = new_dweight + (dweight[i] + dy * z,)
            new_dbias = new_dbias + (dbias[i] + dy,)
        dweight, dbias = new_dweight, new_dbias

        dz = layer_norm_dz(g, z_hat, rstd, D)
        for i in tl.static_range(TILES):
            offs_d = i * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
            mask = mask_t & (offs_d < D)
            dx = dz[i]
            if WRITE_DRESIDUAL:
                tl.store(dresidual_ptr + row * D + offs_d, dx, mask=mask)
            if HAS_DROPOUT:
                dx = tl.where(keeps[i], dx * scale, 0.0)
            tl.store(dx_ptr + row * D + offs_d, dx, mask=mask)

    for i in tl.static_range(TILES):
        offs_d = i * BLOCK_D + tl.arange(0, BLOCK_D)
        tl.store(dweight_ptr + pid * D + offs_d, tl.sum(dweight[i], 0), mask=offs_d < D)
        tl.store(dbias_ptr + pid * D + offs_d, tl.sum(dbias[i], 0), mask=offs_d < D)


def layer_norm_fwd(x, weight, bias, residual, dropout_p, seed, offset, eps):
    """(y [T, D] in x's dtype, mean [T] fp32, rstd [T] fp32)."""
    T, D = x.shape
    y = torch.empty((T, D), dtype=x.dtype, device=x.device)
    mean, rstd = (torch.empty(T, dtype=torch.float32, device=x.device) for _ in range(2))
    if T == 0:
        return y, mean, rstd
    x = unit_columns(x)
    residual = None if residual is None else unit_columns(residual)
    settings = row_tiles(D, x.element_size())
    _layer_norm_fwd_kernel[(triton.cdiv(T, settings["BLOCK_T"]),)](
        x, residual, weight.contiguous(), bias.contiguous(), seed, y, mean, rstd,
        T, x.stride(0), 0 if residual is None else residual.stride(0), offset, *dropout_constants(dropout_p), eps,
        D=D, HAS_RESIDUAL=residual is not None, HAS_DROPOUT=dropout_p > 0.0, **settings,
    )  # fmt: skip
    return y, mean, rstd


def _has_own_gradient(residual, x, dropout_p):
    """Whether the residual's gradient differs from x's, in numbers or in dtype."""
    return residual is not None and (dropout_p > 0.0 or residual.dtype != x.dtype)


def layer_norm_bwd(dy, x, weight, bias, residual, mean, rstd, dropout_p, seed, offset):
    """(dx, dresidual, dweight, dbias). dresidual is empty when dx serves for it, or when there is no residual."""
    T, D = x.shape
    write_dresidual = _has_own_gradient(residual, x, dropout_p)
    dx = torch.empty((T, D), dtype=x.dtype, device=x.device)
    dresidual = torch.empty(
        (T, D) if write_dresidual else 0, dtype=residual.dtype if write_dresidual else x.dtype, device=x.device
    )
    settings = row_tiles(D, x.element_size())
    programs = row_programs(T, settings["BLOCK_T"])
    dweight, dbias = (torch.empty((programs, D), dtype=torch.float32, device=x.device) for _ in range(2))
    if T:
        dy, x = unit_columns(dy), unit_columns(x)
        residual = None if residual is None else unit_columns(residual)
        _layer_norm_bwd_kernel[(programs,)](
            dy, x, residual, weight.contiguous(), seed, mean, rstd, dx, dresidual, dweight, dbias,
            T, dy.stride(0), x.stride(0), 0 if residual is None else residual.stride(0), offset,
            *dropout_constants(dropout_p),
            D=D, HAS_RESIDUAL=residual is not None, HAS_DROPOUT=dropout_p > 0.0, WRITE_DRESIDUAL=write_dresidual,
            **settings,
        )  # fmt: skip
    return dx, dresidual, dweight.sum(0).to(weight.dtype), dbias.sum(0).to(bias.dtype)


def _fake_fwd(x, weight, bias, residual, dropout_p, seed, offset, eps):
    statistics = x.new_empty(x.shape[0], dtype=torch.float32)
    return x.new_empty(x.shape), statistics, torch.empty_like(statistics)


def _fake_bwd(dy, x, weight, bias, residual, mean, rstd, dropout_p, seed, offset):
    dresidual = residual.new_empty(x.shape) if _has_own_gradient(residual, x, dropout_p) else x.new_empty(0)
    return x.new_empty(x.shape), dresidual, weight.new_empty(weight.shape), bias.new_empty(bias.shape)


_fwd = register(
    "layer_norm_fwd(Tensor x, Tensor weight, Tensor bias, Tensor? residual, float dropout_p, Tensor? seed, int offset, "
    "float eps) -> (Tensor, Tensor, Tensor)",
    layer_norm_fwd,
    _fake_fwd,
)
_bwd = register(
    "layer_norm_bwd(Tensor dy, Tensor x, Tensor weight, Tensor bias, Tensor? residual, Tensor mean, Tensor rstd, "
    "float dropout_p, Tensor? seed, int offset) -> (Tensor, Tensor, Tensor, Tensor)",
    layer_norm_bwd,
    _fake_bwd,
)


class LayerNormFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, residual, dropout_p, seed, offset, eps):
        y, mean, rstd = _fwd(x, weight, bias, residual, dropout_p, seed, offset, eps)
        ctx.save_for_backward(x, weight, bias, residual, seed, mean, rstd)
        ctx.dropout_p, ctx.offset = dropout_p, offset
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, weight, bias, residual, seed, mean, rstd = ctx.saved_tensors
        dx, dresidual, dweight, dbias = _bwd(dy, x, weight, bias, residual, mean, rstd, ctx.dropout_p, seed, ctx.offset)
        if not _has_own_gradient(residual, x, ctx.dropout_p):
            dresidual = None if residual is None else dx
        return dx, dweight, dbias, dresidual, None, None, None, None


def layer_norm(x, weight, bias, *, residual=None, dropout_p=0.0, seed=None, offset=0, eps=1e-12):
    """LayerNorm(dropout(x) + residual), see `fastbert/reference.py`. x, residual [T, D], any strides; weight, bias [D].

    Returns [T, D] in x's dtype. Dtypes may differ between the arguments; each gradient comes in its argument's.
    `seed` is an int64 tensor [1] on x's device, needed when `dropout_p` is over 0. Differentiable once.
    """
    return LayerNormFunction.apply(x, weight, bias, residual, dropout_p, seed, offset, eps)
