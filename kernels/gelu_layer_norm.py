"""Bias, GELU and LayerNorm in one pass, forward and backward: the masked-LM head's transform after its linear layer.

    h = gelu(x + bias)
    y = (h - mean(h)) * rstd(h) * weight + ln_bias

Plain PyTorch, forward: read x, write x + bias, read it, write h, read h, write y, 6 T D elements. Fused: read x, write
y, 2 T D, and mean and rstd (8 bytes a row). Backward, plain: LayerNorm reads dy and h and writes dh, reads both again
for its parameters, GELU reads dh and x + bias and writes dx, dbias reads dx, 9 T D. Fused: read dy and x, write dx,
3 T D, and 12 D bytes of partial sums per program, written and read once.

The backward makes h and GELU's derivative again from x, in fp32. Each program adds up the three parameter gradients
over the rows it walks; one sum over the programs follows: no atomics, the same bits each time.

T rows, D hidden size.
"""

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

from ._launch import register, row_programs, row_tiles, unit_columns
from ._math import gelu, gelu_derivative, layer_norm_dz, row_moments


@triton.jit(do_not_specialize=["T"])
def _gelu_layer_norm_fwd_kernel(
    x_ptr, bias_ptr, weight_ptr, ln_bias_ptr,
    y_ptr, mean_ptr, rstd_ptr,
    T, stride_xt, eps,
    D: tl.constexpr, TANH: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    # rows are int64: T * D passes 2^31 on long runs
    offs_t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    row = offs_t[:, None]
    mask_t = row < T

    h = ()
    for i in tl.static_range(TILES):
        offs_d = i * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
        mask = mask_t & (offs_d < D)
        x = tl.load(x_ptr + row * stride_xt + offs_d, mask=mask, other=0.0).to(tl.float32)
        # parameters are read as whole tiles: a [1, BLOCK_D] load would get a layout of its own and cross shared memory
        bias = tl.load(tl.broadcast_to(bias_ptr + offs_d, mask.shape), mask=mask, other=0.0).to(tl.float32)
        h = h + (gelu(x + bias, TANH),)

    mean, rstd = row_moments(h, eps, D, BLOCK_D)
    tl.store(mean_ptr + offs_t, mean, mask=offs_t < T)
    tl.store(rstd_ptr + offs_t, rstd, mask=offs_t < T)

    for i in tl.static_range(TILES):
        offs_d = i * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
        mask = mask_t & (offs_d < D)
        weight = tl.load(tl.broadcast_to(weight_ptr + offs_d, mask.shape), mask=mask, other=0.0).to(tl.float32)
        ln_bias = tl.load(tl.broadcast_to(ln_bias_ptr + offs_d, mask.shape), mask=mask, other=0.0).to(tl.float32)
        y = (h[i] - mean[:, None]) * rstd[:, None] * weight + ln_bias
        tl.store(y_ptr + row * D + offs_d, y, mask=mask)


@triton.jit(do_not_specialize=["T"])
def _gelu_layer_norm_bwd_kernel(
    dy_ptr, x_ptr, bias_ptr, weight_ptr, mean_ptr, rstd_ptr,
    dx_ptr, dbias_ptr, dweight_ptr, dln_bias_ptr,
    T, stride_dyt, stride_xt,
    D: tl.constexpr, TANH: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    # the parameter gradients are [programs, D] fp32. Until the end each row of the block has its own share, so that
    # nothing crosses warps inside the loop
    dbias, dweight, dln_bias = (), (), ()
    for _ in tl.static_range(TILES):
        dbias = dbias + (tl.zeros([BLOCK_T, BLOCK_D], tl.float32),)
        dweight = dweight + (tl.zeros([BLOCK_T, BLOCK_D], tl.float32),)
        dln_bias = dln_bias + (tl.zeros([BLOCK_T, BLOCK_D], tl.float32),)

    pid = tl.program_id(0).to(tl.int64)
    for start in range(pid * BLOCK_T, T, tl.num_programs(0) * BLOCK_T):
        offs_t = start + tl.arange(0, BLOCK_T)
        row = offs_t[:, None]
        mask_t = row < T
        mean = tl.load(mean_ptr + offs_t, mask=offs_t < T, other=0.0)
        rstd = tl.load(rstd_ptr + offs_t, mask=offs_t < T, other=0.0)

        g, h_hat, slope, new_dweight, new_dln_bias = (), (), (), (), ()
        for i in tl.static_range(TILES):
            offs_d = i * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
            mask = mask_t & (offs_d < D)
            dy = tl.load(dy_ptr + row * stride_dyt + offs_d, mask=mask, other=0.0).to(tl.float32)
            x = tl.load(x_ptr + row * stride_xt + offs_d, mask=mask, other=0.0).to(tl.float32)
            bias = tl.load(tl.broadcast_to(bias_ptr + offs_d, mask.shape), mask=mask, other=0.0).to(tl.float32)
            weight = tl.load(tl.broadcast_to(weight_ptr + offs_d, mask.shape), mask=mask, other=0.0).to(tl.float32)
            h = tl.where(mask, (gelu(x + bias, TANH) - mean[:, None]) * rstd[:, None], 0.0)
            g = g + (dy * weight,)
            h_hat = h_hat + (h,)
            slope = slope + (gelu_derivative(x + bias, TANH),)
            new_dweight = new_dweight + (dweight[i] + dy * h,)
            new_dln_bias = new_dln_bias + (dln_bias[i] + dy,)
        dweight, dln_bias = new_dweight, new_dln_bias

        dh = layer_norm_dz(g, h_hat, rstd, D)
        new_dbias = ()
        for i in tl.static_range(TILES):
            offs_d = i * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
            dx = dh[i] * slope[i]
            # rows past the end have g = 0 and rstd = 0, hence dx = 0: they add nothing
            new_dbias = new_dbias + (dbias[i] + dx,)
            tl.store(dx_ptr + row * D + offs_d, dx, mask=mask_t & (offs_d < D))
        dbias = new_dbias

    for i in tl.static_range(TILES):
        offs_d = i * BLOCK_D + tl.arange(0, BLOCK_D)
        tl.store(dbias_ptr + pid * D + offs_d, tl.sum(dbias[i], 0), mask=offs_d < D)
        tl.store(dweight_ptr + pid * D + offs_d, tl.sum(dweight[i], 0), mask=offs_d < D)
        tl.store(dln_bias_ptr + pid * D + offs_d, tl.sum(dln_bias[i], 0), mask=offs_d < D)


def gelu_layer_norm_fwd(x, bias, weight, ln_bias, approximate, eps):
    """(y [T, D] in x's dtype, mean [T] fp32, rstd [T] fp32)."""
    T, D = x.shape
    y = torch.empty((T, D), dtype=x.dtype, device=x.device)
    mean, rstd = (torch.empty(T, dtype=torch.float32, device=x.device) for _ in range(2))
    if T == 0:
        return y, mean, rstd
    x = unit_columns(x)
    settings = row_tiles(D, x.element_size())
    _gelu_layer_norm_fwd_kernel[(triton.cdiv(T, settings["BLOCK_T"]),)](
        x, bias.contiguous(), weight.contiguous(), ln_bias.contiguous(), y, mean, rstd, T, x.stride(0), eps,
        D=D, TANH=approximate == "tanh", **settings,
    )  # fmt: skip
    return y, mean, rstd


def gelu_layer_norm_bwd(dy, x, bias, weight, ln_bias, mean, rstd, approximate):
    """(dx, dbias, dweight, dln_bias)."""
    T, D = x.shape
    dx = torch.empty((T, D), dtype=x.dtype, device=x.device)
    settings = row_tiles(D, x.element_size())
    programs = row_programs(T, settings["BLOCK_T"])
    dbias, dweight, dln_bias = (torch.empty((programs, D), dtype=torch.float32, device=x.device) for _ in range(3))
    if T:
        dy, x = unit_columns(dy), unit_columns(x)
        _gelu_layer_norm_bwd_kernel[(programs,)](
            dy, x, bias.contiguous(), weight.contiguous(), mean, rstd, dx, dbias, dweight, dln_bias,
            T, dy.stride(0), x.stride(0),
            D=D, TANH=approximate == "tanh", **settings,
        )  # fmt: skip
    return (
        dx,
        dbias.sum(0).to(bias.dtype),
        dweight.sum(0).to(weight.dtype),
        dln_bias.sum(0).to(ln_bias.dtype),
    )


def _fake_fwd(x, bias, weight, ln_bias, approximate, eps):
    statistics = x.new_empty(x.shape[0], dtype=torch.float32)
    return x.new_empty(x.shape), statistics, torch.empty_like(statistics)


def _fake_bwd(dy, x, bias, weight, ln_bias, mean, rstd, approximate):
    return tuple(t.new_empty(t.shape) for t in (x, bias, weight, ln_bias))


_fwd = register(
    "gelu_layer_norm_fwd(Tensor x, Tensor bias, Tensor weight, Tensor ln_bias, str approximate, float eps) "
    "-> (Tensor, Tensor, Tensor)",
    gelu_layer_norm_fwd,
    _fake_fwd,
)
_bwd = register(
    "gelu_layer_norm_bwd(Tensor dy, Tensor x, Tensor bias, Tensor weight, Tensor ln_bias, Tensor mean, Tensor rstd, "
    "str approximate) -> (Tensor, Tensor, Tensor, Tensor)",
    gelu_layer_norm_bwd,
    _fake_bwd,
)


class GeluLayerNormFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, bias, weight, ln_bias, approximate, eps):
        y, mean, rstd = _fwd(x, bias, weight, ln_bias, approximate, eps)
        ctx.save_for_backward(x, bias, weight, ln_bias, mean, rstd)
        ctx.approximate = approximate
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        return *_bwd(dy, *ctx.saved_tensors, ctx.approximate), None, None


def gelu_layer_norm(x, bias, weight, ln_bias, *, approximate="none", eps=1e-12):
    """LayerNorm(GELU(x + bias)), see `fastbert/reference.py`. x [T, D], any strides; bias, weight, ln_bias [D];
    approximate "none" (erf) or "tanh".

    Returns [T, D] in x's dtype. Dtypes may differ between the arguments; each gradient comes in its argument's.
    Differentiable once. Raises ValueError for another `approximate`.
    """
    if approximate not in ("none", "tanh"):
        raise ValueError(f"approximate={approximate!r}: expected 'none' or 'tanh'")
    return GeluLayerNormFunction.apply(x, bias, weight, ln_bias, approximate, eps)
