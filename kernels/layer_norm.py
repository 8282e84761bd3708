"""Dropout, residual add and LayerNorm in one pass, forward and backward.

    z = dropout(x) + residual              (either may be absent)
    y = (z - mean(z)) * rstd(z) * weight + bias

Plain PyTorch, forward: dropout reads x and writes it and a mask, the add reads two and writes z, LayerNorm reads z and
writes y: 7 T D elements and a mask. Fused: read x and residual, write y, 3 T D, and mean and rstd (8 bytes per row).
Backward, plain: LayerNorm reads dy and z and writes dz, reads both again for dweight and dbias, dropout reads dz and
the mask and writes dx: 7 T D and the mask. Fused: read dy, x, residual, write dx, and dresidual if it differs from dx
(with dropout, or in another dtype): 4 or 5 T D, and 8 D bytes of partial sums per program, written and read once.

z is not saved: the backward computes it again from x and residual. This reads one tensor more than a saved z, but the
forward writes one less, and z stays in fp32, where a saved z would be rounded to x's dtype. The backward also draws the
dropout mask again. Statistics are fp32 and two-pass. Each program adds up dweight and dbias over its rows, and one sum
over the programs follows. There are no atomics, and the same inputs give the same bits.

T tokens, D hidden size.
"""

import torch
import triton
import triton.language as tl

from ._column_sums import column_sums
from ._launch import (
    differentiable_once,
    dropout_constants,
    empty_like,
    launch,
    register,
    row_align,
    row_programs,
    row_settings,
    row_stride,
    shape_key,
    unit_columns,
    walk_settings,
)
from ._math import columns, keep_mask, layer_norm_dz, load_rows, parameter, row_moments


@triton.jit(do_not_specialize=["T", "offset"])
def _layer_norm_fwd_kernel(
    x_ptr, residual_ptr, weight_ptr, bias_ptr, seed_ptr,
    y_ptr, mean_ptr, rstd_ptr,
    T, stride_xt, stride_rt, offset, threshold, scale, eps,
    D: tl.constexpr, ALIGN: tl.constexpr, HAS_RESIDUAL: tl.constexpr, HAS_DROPOUT: tl.constexpr,
    HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    # rows are int64: T * D can pass 2^31
    offs_t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    row = offs_t[:, None]
    mask_t = row < T

    z = ()
    for i in tl.static_range(TILES):
        offs_d, mask = columns(i, mask_t, D, BLOCK_D)
        tile = load_rows(x_ptr, row, stride_xt, offs_d, mask, ALIGN)
        if HAS_DROPOUT:
            keep = keep_mask(offs_t, 0, i * BLOCK_D, tl.load(seed_ptr), offset, threshold, BLOCK_D)
            tile = tl.where(keep, tile * scale, 0.0)
        if HAS_RESIDUAL:
            tile += load_rows(residual_ptr, row, stride_rt, offs_d, mask, ALIGN)
        z = z + (tile,)

    mean, rstd = row_moments(z, eps, D, BLOCK_D)
    tl.store(mean_ptr + offs_t, mean, mask=offs_t < T)
    tl.store(rstd_ptr + offs_t, rstd, mask=offs_t < T)

    for i in tl.static_range(TILES):
        offs_d, mask = columns(i, mask_t, D, BLOCK_D)
        y = (z[i] - mean[:, None]) * rstd[:, None]
        if HAS_WEIGHT:
            y *= parameter(weight_ptr, offs_d, mask)
        if HAS_BIAS:
            y += parameter(bias_ptr, offs_d, mask)
        tl.store(y_ptr + row * D + offs_d, y, mask=mask)


@triton.jit(do_not_specialize=["T", "offset"])
def _layer_norm_bwd_kernel(
    dy_ptr, x_ptr, residual_ptr, weight_ptr, seed_ptr, mean_ptr, rstd_ptr,
    dx_ptr, dresidual_ptr, partials_ptr,
    T, stride_dyt, stride_xt, stride_rt, offset, threshold, scale,
    D: tl.constexpr, ALIGN: tl.constexpr, HAS_RESIDUAL: tl.constexpr, HAS_DROPOUT: tl.constexpr,
    HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr, WRITE_DRESIDUAL: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, TILES: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    # partials, fp32: per program dweight [D], then dbias [D]. Until the end each row of the block has its own sums, so
    # that nothing crosses warps inside the loop
    dweight, dbias = (), ()
    for _ in tl.static_range(TILES):
        dweight = dweight + (tl.zeros([BLOCK_T, BLOCK_D], tl.float32),)
        dbias = dbias + (tl.zeros([BLOCK_T, BLOCK_D], tl.float32),)

    pid = tl.program_id(0).to(tl.int64)
    for start in tl.range(pid * BLOCK_T, T, tl.num_programs(0) * BLOCK_T, num_stages=STAGES):
        offs_t = start + tl.arange(0, BLOCK_T)
        row = offs_t[:, None]
        mask_t = row < T
        mean = tl.load(mean_ptr + offs_t, mask=offs_t < T, other=0.0)
        rstd = tl.load(rstd_ptr + offs_t, mask=offs_t < T, other=0.0)

        g, z_hat, keeps, new_dweight, new_dbias = (), (), (), (), ()
        for i in tl.static_range(TILES):
            offs_d, mask = columns(i, mask_t, D, BLOCK_D)
            dy = load_rows(dy_ptr, row, stride_dyt, offs_d, mask, ALIGN)
            z = load_rows(x_ptr, row, stride_xt, offs_d, mask, ALIGN)
            if HAS_DROPOUT:
                keep = keep_mask(offs_t, 0, i * BLOCK_D, tl.load(seed_ptr), offset, threshold, BLOCK_D)
                z = tl.where(keep, z * scale, 0.0)
                keeps = keeps + (keep,)
            if HAS_RESIDUAL:
                z += load_rows(residual_ptr, row, stride_rt, offs_d, mask, ALIGN)
            z = tl.where(mask, (z - mean[:, None]) * rstd[:, None], 0.0)
            z_hat = z_hat + (z,)
            new_dweight = new_dweight + (dweight[i] + dy * z,)
            new_dbias = new_dbias + (dbias[i] + dy,)
            if HAS_WEIGHT:
                dy *= parameter(weight_ptr, offs_d, mask)
            g = g + (dy,)
        dweight, dbias = new_dweight, new_dbias

        dz = layer_norm_dz(g, z_hat, rstd, D)
        for i in tl.static_range(TILES):
            offs_d, mask = columns(i, mask_t, D, BLOCK_D)
            dx = dz[i]
            if WRITE_DRESIDUAL:
                tl.store(dresidual_ptr + row * D + offs_d, dx, mask=mask)
            if HAS_DROPOUT:
                dx = tl.where(keeps[i], dx * scale, 0.0)
            tl.store(dx_ptr + row * D + offs_d, dx, mask=mask)

    for i in tl.static_range(TILES):
        offs_d = i * BLOCK_D + tl.arange(0, BLOCK_D)
        out = partials_ptr + pid * (HAS_WEIGHT + HAS_BIAS) * D + offs_d
        if HAS_WEIGHT:
            tl.store(out, tl.sum(dweight[i], 0), mask=offs_d < D)
        if HAS_BIAS:
            tl.store(out + HAS_WEIGHT * D, tl.sum(dbias[i], 0), mask=offs_d < D)


def _empty_fwd(x, weight, bias, residual, dropout_p, seed, offset, eps, dtype=None):
    """The uninitialised results of layer_norm_fwd; also its fake for torch.compile."""
    mean, rstd = (torch.empty(x.shape[0], dtype=torch.float32, device=x.device) for _ in range(2))
    return torch.empty(x.shape, dtype=dtype or x.dtype, device=x.device), mean, rstd


def layer_norm_fwd(x, weight, bias, residual, dropout_p, seed, offset, eps, dtype=None):
    """(y [T, D] in `dtype`, mean [T] fp32, rstd [T] fp32)."""
    T, D = x.shape
    y, mean, rstd = _empty_fwd(x, weight, bias, residual, dropout_p, seed, offset, eps, dtype)
    default, candidates = row_settings(D, x.element_size())
    if T == 0:
        return y, mean, rstd
    x = unit_columns(x)
    residual = None if residual is None else unit_columns(residual)
    weight, bias = (None if p is None else p.contiguous() for p in (weight, bias))

    def run(settings):
        _layer_norm_fwd_kernel[(triton.cdiv(T, settings["BLOCK_T"]),)](
            x, residual, weight, bias, seed, y, mean, rstd,
            T, x.stride(0), row_stride(residual), offset, *dropout_constants(dropout_p), eps,
            D=D, ALIGN=row_align(x, residual), HAS_RESIDUAL=residual is not None, HAS_DROPOUT=dropout_p > 0.0,
            HAS_WEIGHT=weight is not None, HAS_BIAS=bias is not None, **settings,
        )  # fmt: skip

    launch(run, "layer_norm_fwd", shape_key(x, D), default, candidates)
    return y, mean, rstd


def _has_own_gradient(residual, x, dropout_p):
    """Whether the residual's gradient differs from x's in values or dtype."""
    return residual is not None and (dropout_p > 0.0 or residual.dtype != x.dtype)


def _empty_bwd(dy, x, weight, bias, residual, mean, rstd, dropout_p, seed, offset):
    """The uninitialised results of layer_norm_bwd; also its fake for torch.compile."""
    own = residual if _has_own_gradient(residual, x, dropout_p) else None
    return empty_like(x, x), empty_like(own, x), empty_like(weight, x), empty_like(bias, x)


def layer_norm_bwd(dy, x, weight, bias, residual, mean, rstd, dropout_p, seed, offset):
    """(dx, dresidual, dweight, dbias). dresidual is empty if it equals dx or there is no residual; dweight and dbias
    are empty without a weight or a bias."""
    T, D = x.shape
    dx, dresidual, dweight, dbias = _empty_bwd(dy, x, weight, bias, residual, mean, rstd, dropout_p, seed, offset)
    write_dresidual = _has_own_gradient(residual, x, dropout_p)
    dy, x = unit_columns(dy), unit_columns(x)
    residual = None if residual is None else unit_columns(residual)
    parameters = [p for p in (weight, bias) if p is not None]
    weight = None if weight is None else weight.contiguous()

    def run(settings):
        constants = dict(settings)
        programs = row_programs(T, constants["BLOCK_T"], constants.pop("PROGRAMS"))
        partials = torch.empty((programs, len(parameters), D), dtype=torch.float32, device=x.device)
        if T:
            _layer_norm_bwd_kernel[(programs,)](
                dy, x, residual, weight, seed, mean, rstd, dx, dresidual, partials,
                T, dy.stride(0), x.stride(0), row_stride(residual), offset, *dropout_constants(dropout_p),
                D=D, ALIGN=row_align(dy, x, residual), HAS_RESIDUAL=residual is not None, HAS_DROPOUT=dropout_p > 0.0,
                HAS_WEIGHT=weight is not None, HAS_BIAS=bias is not None, WRITE_DRESIDUAL=write_dresidual, **constants,
            )  # fmt: skip
        if parameters:
            column_sums(partials, [d for d, p in ((dweight, weight), (dbias, bias)) if p is not None])

    launch(run, "layer_norm_bwd", shape_key(x, D), *walk_settings(D, x.element_size(), 2))
    return dx, dresidual, dweight, dbias


_fwd = register(
    "layer_norm_fwd(Tensor x, Tensor? weight, Tensor? bias, Tensor? residual, float dropout_p, Tensor? seed, "
    "int offset, float eps, ScalarType? dtype=None) -> (Tensor, Tensor, Tensor)",
    layer_norm_fwd,
    _empty_fwd,
)
_bwd = register(
    "layer_norm_bwd(Tensor dy, Tensor x, Tensor? weight, Tensor? bias, Tensor? residual, Tensor mean, Tensor rstd, "
    "float dropout_p, Tensor? seed, int offset) -> (Tensor, Tensor, Tensor, Tensor)",
    layer_norm_bwd,
    _empty_bwd,
)


class LayerNormFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, residual, dropout_p, seed, offset, eps, dtype):
        y, mean, rstd = _fwd(x, weight, bias, residual, dropout_p, seed, offset, eps, dtype)
        ctx.save_for_backward(x, weight, bias, residual, seed, mean, rstd)
        ctx.dropout_p, ctx.offset = dropout_p, offset
        return y

    @staticmethod
    @differentiable_once("layer_norm")
    def backward(ctx, dy):
        x, weight, bias, residual, seed, mean, rstd = ctx.saved_tensors
        dx, dresidual, dweight, dbias = _bwd(dy, x, weight, bias, residual, mean, rstd, ctx.dropout_p, seed, ctx.offset)
        if not _has_own_gradient(residual, x, ctx.dropout_p):
            dresidual = None if residual is None else dx
        dweight, dbias = (None if p is None else d for p, d in ((weight, dweight), (bias, dbias)))
        return dx, dweight, dbias, dresidual, None, None, None, None, None


def layer_norm(x, weight, bias, *, residual=None, dropout_p=0.0, seed=None, offset=0, eps=1e-12, dtype=None):
    """LayerNorm(dropout(x) + residual), see `fastbert/reference.py`. x, residual [T, D], any strides; weight, bias [D],
    either may be None.

    Returns [T, D] in `dtype`, or x's. The arguments may have different dtypes; each gradient has its argument's. `seed`
    is an int64 tensor [1] on x's device, needed if `dropout_p` is above 0. Differentiable once. Raises ValueError for
    rows of more than 8192 columns.
    """
    return LayerNormFunction.apply(x, weight, bias, residual, dropout_p, seed, offset, eps, dtype)
