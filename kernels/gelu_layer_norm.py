"""Bias, GELU and LayerNorm in one pass, forward and backward: the masked-LM head's transform after its linear layer.

    h = gelu(x + bias)      (bias and ln_bias may be absent)
    y = (h - mean(h)) * rstd(h) * weight + ln_bias

Plain PyTorch, forward: read x, write x + bias, read it, write h, read h, write y, 6 T D elements. Fused: read x, write
y, 2 T D, and mean and rstd (8 bytes a row). Backward, plain: LayerNorm reads dy and h and writes dh, reads both again
for its parameters, GELU reads dh and x + bias and writes dx, dbias reads dx, 9 T D. Fused: read dy and x, write dx,
3 T D, and 12 D bytes of partial sums per program, written and read once.

The backward computes h and GELU's derivative again from x, in fp32. Each program adds up the three parameter gradients
over its rows, and one sum over the programs follows. There are no atomics, and the same inputs give the same bits.

T rows, D hidden size.
"""

import torch
import triton
import triton.language as tl

from ._column_sums import column_sums
from ._launch import (
    differentiable_once,
    empty_like,
    launch,
    register,
    row_align,
    row_programs,
    row_settings,
    shape_key,
    unit_columns,
    walk_settings,
)
from ._math import columns, gelu, gelu_derivative, layer_norm_dz, load_rows, parameter, row_moments


@triton.jit(do_not_specialize=["T"])
def _gelu_layer_norm_fwd_kernel(
    x_ptr, bias_ptr, weight_ptr, ln_bias_ptr,
    y_ptr, mean_ptr, rstd_ptr,
    T, stride_xt, eps,
    D: tl.constexpr, ALIGN: tl.constexpr, TANH: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_LN_BIAS: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    # rows are int64: T * D can pass 2^31
    offs_t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    row = offs_t[:, None]
    mask_t = row < T

    h = ()
    for i in tl.static_range(TILES):
        offs_d, mask = columns(i, mask_t, D, BLOCK_D)
        u = load_rows(x_ptr, row, stride_xt, offs_d, mask, ALIGN)
        if HAS_BIAS:
            u += parameter(bias_ptr, offs_d, mask)
        h = h + (gelu(u, TANH),)

    mean, rstd = row_moments(h, eps, D, BLOCK_D)
    tl.store(mean_ptr + offs_t, mean, mask=offs_t < T)
    tl.store(rstd_ptr + offs_t, rstd, mask=offs_t < T)

    for i in tl.static_range(TILES):
        offs_d, mask = columns(i, mask_t, D, BLOCK_D)
        y = (h[i] - mean[:, None]) * rstd[:, None] * parameter(weight_ptr, offs_d, mask)
        if HAS_LN_BIAS:
            y += parameter(ln_bias_ptr, offs_d, mask)
        tl.store(y_ptr + row * D + offs_d, y, mask=mask)


@triton.jit(do_not_specialize=["T"])
def _gelu_layer_norm_bwd_kernel(
    dy_ptr, x_ptr, bias_ptr, weight_ptr, mean_ptr, rstd_ptr,
    dx_ptr, partials_ptr,
    T, stride_dyt, stride_xt,
    D: tl.constexpr, ALIGN: tl.constexpr, TANH: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_LN_BIAS: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, TILES: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    # partials, fp32: per program dweight [D], then dbias, then dln_bias. Until the end each row of the block has its
    # own sums, so that nothing crosses warps inside the loop
    dbias, dweight, dln_bias = (), (), ()
    for _ in tl.static_range(TILES):
        dbias = dbias + (tl.zeros([BLOCK_T, BLOCK_D], tl.float32),)
        dweight = dweight + (tl.zeros([BLOCK_T, BLOCK_D], tl.float32),)
        dln_bias = dln_bias + (tl.zeros([BLOCK_T, BLOCK_D], tl.float32),)

    pid = tl.program_id(0).to(tl.int64)
    for start in tl.range(pid * BLOCK_T, T, tl.num_programs(0) * BLOCK_T, num_stages=STAGES):
        offs_t = start + tl.arange(0, BLOCK_T)
        row = offs_t[:, None]
        mask_t = row < T
        mean = tl.load(mean_ptr + offs_t, mask=offs_t < T, other=0.0)
        rstd = tl.load(rstd_ptr + offs_t, mask=offs_t < T, other=0.0)

        g, h_hat, slope, new_dweight, new_dln_bias = (), (), (), (), ()
        for i in tl.static_range(TILES):
            offs_d, mask = columns(i, mask_t, D, BLOCK_D)
            dy = load_rows(dy_ptr, row, stride_dyt, offs_d, mask, ALIGN)
            u = load_rows(x_ptr, row, stride_xt, offs_d, mask, ALIGN)
            if HAS_BIAS:
                u += parameter(bias_ptr, offs_d, mask)
            h = tl.where(mask, (gelu(u, TANH) - mean[:, None]) * rstd[:, None], 0.0)
            g = g + (dy * parameter(weight_ptr, offs_d, mask),)
            h_hat = h_hat + (h,)
            slope = slope + (gelu_derivative(u, TANH),)
            new_dweight = new_dweight + (dweight[i] + dy * h,)
            new_dln_bias = new_dln_bias + (dln_bias[i] + dy,)
        dweight, dln_bias = new_dweight, new_dln_bias

        dh = layer_norm_dz(g, h_hat, rstd, D)
        new_dbias = ()
        for i in tl.static_range(TILES):
            offs_d, mask = columns(i, mask_t, D, BLOCK_D)
            dx = dh[i] * slope[i]
            # rows past the end have g = 0 and rstd = 0, hence dx = 0: they add nothing
            new_dbias = new_dbias + (dbias[i] + dx,)
            tl.store(dx_ptr + row * D + offs_d, dx, mask=mask)
        dbias = new_dbias

    for i in tl.static_range(TILES):
        offs_d = i * BLOCK_D + tl.arange(0, BLOCK_D)
        out = partials_ptr + pid * (1 + HAS_BIAS + HAS_LN_BIAS) * D + offs_d
        tl.store(out, tl.sum(dweight[i], 0), mask=offs_d < D)
        if HAS_BIAS:
            tl.store(out + D, tl.sum(dbias[i], 0), mask=offs_d < D)
        if HAS_LN_BIAS:
            tl.store(out + (1 + HAS_BIAS) * D, tl.sum(dln_bias[i], 0), mask=offs_d < D)


def _empty_fwd(x, bias, weight, ln_bias, approximate, eps, dtype=None):
    """The uninitialised results of gelu_layer_norm_fwd; also its fake for torch.compile."""
    mean, rstd = (torch.empty(x.shape[0], dtype=torch.float32, device=x.device) for _ in range(2))
    return torch.empty(x.shape, dtype=dtype or x.dtype, device=x.device), mean, rstd


def gelu_layer_norm_fwd(x, bias, weight, ln_bias, approximate, eps, dtype=None):
    """(y [T, D] in `dtype`, mean [T] fp32, rstd [T] fp32)."""
    T, D = x.shape
    y, mean, rstd = _empty_fwd(x, bias, weight, ln_bias, approximate, eps, dtype)
    default, candidates = row_settings(D, x.element_size())
    if T == 0:
        return y, mean, rstd
    x, weight = unit_columns(x), weight.contiguous()
    bias, ln_bias = (None if p is None else p.contiguous() for p in (bias, ln_bias))

    def run(settings):
        _gelu_layer_norm_fwd_kernel[(triton.cdiv(T, settings["BLOCK_T"]),)](
            x, bias, weight, ln_bias, y, mean, rstd, T, x.stride(0), eps,
            D=D, ALIGN=row_align(x), TANH=approximate == "tanh", HAS_BIAS=bias is not None,
            HAS_LN_BIAS=ln_bias is not None, **settings,
        )  # fmt: skip

    launch(run, "gelu_layer_norm_fwd", shape_key(x, D), default, candidates)
    return y, mean, rstd


def _empty_bwd(dy, x, bias, weight, ln_bias, mean, rstd, approximate):
    """The uninitialised results of gelu_layer_norm_bwd; also its fake for torch.compile."""
    return tuple(empty_like(t, x) for t in (x, bias, weight, ln_bias))


def gelu_layer_norm_bwd(dy, x, bias, weight, ln_bias, mean, rstd, approximate):
    """(dx, dbias, dweight, dln_bias); dbias and dln_bias are empty without a bias or an ln_bias."""
    T, D = x.shape
    dx, dbias, dweight, dln_bias = _empty_bwd(dy, x, bias, weight, ln_bias, mean, rstd, approximate)
    dy, x, weight = unit_columns(dy), unit_columns(x), weight.contiguous()
    bias = None if bias is None else bias.contiguous()
    sums = [dweight, *(d for d, p in ((dbias, bias), (dln_bias, ln_bias)) if p is not None)]

    def run(settings):
        constants = dict(settings)
        programs = row_programs(T, constants["BLOCK_T"], constants.pop("PROGRAMS"))
        partials = torch.empty((programs, len(sums), D), dtype=torch.float32, device=x.device)
        if T:
            _gelu_layer_norm_bwd_kernel[(programs,)](
                dy, x, bias, weight, mean, rstd, dx, partials, T, dy.stride(0), x.stride(0),
                D=D, ALIGN=row_align(dy, x), TANH=approximate == "tanh", HAS_BIAS=bias is not None,
                HAS_LN_BIAS=ln_bias is not None, **constants,
            )  # fmt: skip
        column_sums(partials, sums)

    default, candidates = walk_settings(D, x.element_size(), 2)
    if x.element_size() == 2 and (default["TILES"] == 3 or D >= 2048):
        # GELU takes more registers than LayerNorm alone. Twice the warps for the same rows need half the registers per
        # thread, so that twice the warps fit (three tiles) and nothing spills (wide rows)
        default = candidates[1]
    elif x.element_size() == 2 and default["TILES"] == 4 and D <= 1024:
        # half the rows, each on two warps: no spills, and 1.5 times as many warps at once
        default = {**default, "BLOCK_T": 2, "BLOCK_D": 512, "TILES": 2, "PROGRAMS": 3}
        candidates = (*candidates, default)
    launch(run, "gelu_layer_norm_bwd", shape_key(x, D), default, candidates)
    return dx, dbias, dweight, dln_bias


_fwd = register(
    "gelu_layer_norm_fwd(Tensor x, Tensor? bias, Tensor weight, Tensor? ln_bias, str approximate, float eps, "
    "ScalarType? dtype=None) -> (Tensor, Tensor, Tensor)",
    gelu_layer_norm_fwd,
    _empty_fwd,
)
_bwd = register(
    "gelu_layer_norm_bwd(Tensor dy, Tensor x, Tensor? bias, Tensor weight, Tensor? ln_bias, Tensor mean, Tensor rstd, "
    "str approximate) -> (Tensor, Tensor, Tensor, Tensor)",
    gelu_layer_norm_bwd,
    _empty_bwd,
)


class GeluLayerNormFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, bias, weight, ln_bias, approximate, eps, dtype):
        y, mean, rstd = _fwd(x, bias, weight, ln_bias, approximate, eps, dtype)
        ctx.save_for_backward(x, bias, weight, ln_bias, mean, rstd)
        ctx.approximate = approximate
        return y

    @staticmethod
    @differentiable_once("gelu_layer_norm")
    def backward(ctx, dy):
        x, bias, weight, ln_bias, mean, rstd = ctx.saved_tensors
        dx, dbias, dweight, dln_bias = _bwd(dy, x, bias, weight, ln_bias, mean, rstd, ctx.approximate)
        dbias, dln_bias = (None if p is None else d for p, d in ((bias, dbias), (ln_bias, dln_bias)))
        return dx, dbias, dweight, dln_bias, None, None, None


def gelu_layer_norm(x, bias, weight, ln_bias, *, approximate="none", eps=1e-12, dtype=None):
    """LayerNorm(GELU(x + bias)), see `fastbert/reference.py`. x [T, D], any strides; weight [D]; bias and ln_bias [D]
    or None; approximate "none" (erf) or "tanh".

    Returns [T, D] in `dtype`, or x's. The arguments may have different dtypes; each gradient has its argument's.
    Differentiable once. Raises ValueError for another `approximate`, and for rows of more than 8192 columns.
    """
    if approximate not in ("none", "tanh"):
        raise ValueError(f"approximate={approximate!r}: expected 'none' or 'tanh'")
    return GeluLayerNormFunction.apply(x, bias, weight, ln_bias, approximate, eps, dtype)
