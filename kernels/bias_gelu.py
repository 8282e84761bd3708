"""Bias and GELU in one pass, forward and backward.

    y = gelu(x + bias)      exact: u Φ(u) with Φ by erf, or the tanh approximation

Plain PyTorch, forward: read x, write x + bias, read it, write y, 4 T F elements. Fused: read x, write y, 2 T F.
Backward, plain: read dy and x + bias, write dx, read dx again for dbias, 4 T F. Fused: read dy and x, write dx, 3 T F,
and 4 F bytes of partial sums per row program, written and read once.

The backward makes x + bias and GELU's derivative again from x. Each program keeps one tile of columns, walks over its
share of the rows and adds up dbias in registers; one sum over the programs follows. No atomics: the same bits each
time.

T tokens, F feed-forward size.
"""

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

from ._launch import multiprocessors, register, unit_columns
from ._math import gelu, gelu_derivative

# eight elements of a tile for each thread of four warps
BLOCK_T, BLOCK_F = 4, 256


@triton.jit(do_not_specialize=["T"])
def _bias_gelu_fwd_kernel(
    x_ptr, bias_ptr,
    y_ptr,
    T, stride_xt,
    F: tl.constexpr, TANH: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_F: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    # column tiles run fastest, so that neighbouring programs read neighbouring memory
    # rows are int64: T * F passes 2^31 on long runs
    pid = tl.program_id(0).to(tl.int64)
    row = (pid // TILES * BLOCK_T + tl.arange(0, BLOCK_T))[:, None]
    offs_f = (pid % TILES).to(tl.int32) * BLOCK_F + tl.arange(0, BLOCK_F)[None, :]
    mask = (row < T) & (offs_f < F)

    x = tl.load(x_ptr + row * stride_xt + offs_f, mask=mask, other=0.0).to(tl.float32)
    bias = tl.load(tl.broadcast_to(bias_ptr + offs_f, mask.shape), mask=mask, other=0.0).to(tl.float32)
    tl.store(y_ptr + row * F + offs_f, gelu(x + bias, TANH), mask=mask)


@triton.jit(do_not_specialize=["T"])
def _bias_gelu_bwd_kernel(
    dy_ptr, x_ptr, bias_ptr,
    dx_ptr, dbias_ptr,
    T, stride_dyt, stride_xt,
    F: tl.constexpr, TANH: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    # dbias is [row programs, F] fp32
    offs_f = tl.program_id(0) * BLOCK_F + tl.arange(0, BLOCK_F)[None, :]
    mask_f = offs_f < F
    dbias = tl.zeros([BLOCK_T, BLOCK_F], tl.float32)
    bias = tl.load(tl.broadcast_to(bias_ptr + offs_f, dbias.shape), mask=mask_f, other=0.0).to(tl.float32)

    pid = tl.program_id(1).to(tl.int64)
    for start in range(pid * BLOCK_T, T, tl.num_programs(1) * BLOCK_T):
        row = (start + tl.arange(0, BLOCK_T))[:, None]
        mask = (row < T) & mask_f
        x = tl.load(x_ptr + row * stride_xt + offs_f, mask=mask, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + row * stride_dyt + offs_f, mask=mask, other=0.0).to(tl.float32)
        dx = dy * gelu_derivative(x + bias, TANH)
        dbias += dx
        tl.store(dx_ptr + row * F + offs_f, dx, mask=mask)

    tl.store(dbias_ptr + pid * F + offs_f, tl.sum(dbias, 0)[None, :], mask=mask_f)


def bias_gelu_fwd(x, bias, approximate):
    """y [T, F] in x's dtype."""
    T, F = x.shape
    y = torch.empty((T, F), dtype=x.dtype, device=x.device)
    if T == 0:
        return y
    x = unit_columns(x)
    tiles = triton.cdiv(F, BLOCK_F)
    _bias_gelu_fwd_kernel[(triton.cdiv(T, BLOCK_T) * tiles,)](
        x, bias.contiguous(), y, T, x.stride(0),
        F=F, TANH=approximate == "tanh", BLOCK_T=BLOCK_T, BLOCK_F=BLOCK_F, TILES=tiles, num_warps=4,
    )  # fmt: skip
    return y


def bias_gelu_bwd(dy, x, bias, approximate):
    """(dx, dbias)."""
    T, F = x.shape
    dx = torch.empty((T, F), dtype=x.dtype, device=x.device)
    tiles = triton.cdiv(F, BLOCK_F)
    # eight programs for each multiprocessor, shared between the column tiles: all of them run at once
    programs = min(triton.cdiv(T, BLOCK_T), triton.cdiv(8 * multiprocessors(), tiles))
    dbias = torch.empty((programs, F), dtype=torch.float32, device=x.device)
    if T:
        dy, x = unit_columns(dy), unit_columns(x)
        _bias_gelu_bwd_kernel[(tiles, programs)](
            dy, x, bias.contiguous(), dx, dbias, T, dy.stride(0), x.stride(0),
            F=F, TANH=approximate == "tanh", BLOCK_T=BLOCK_T, BLOCK_F=BLOCK_F, num_warps=4,
        )  # fmt: skip
    return dx, dbias.sum(0).to(bias.dtype)


_fwd = register(
    "bias_gelu_fwd(Tensor x, Tensor bias, str approximate) -> Tensor",
    bias_gelu_fwd,
    lambda x, bias, approximate: x.new_empty(x.shape),
)
_bwd = register(
    "bias_gelu_bwd(Tensor dy, Tensor x, Tensor bias, str approximate) -> (Tensor, Tensor)",
    bias_gelu_bwd,
    lambda dy, x, bias, approximate: (x.new_empty(x.shape), bias.new_empty(bias.shape)),
)


class BiasGeluFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, bias, approximate):
        ctx.save_for_backward(x, bias)
        ctx.approximate = approximate
        return _fwd(x, bias, approximate)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        return *_bwd(dy, *ctx.saved_tensors, ctx.approximate), None


def bias_gelu(x, bias, *, approximate="none"):
    """GELU(x + bias), see `fastbert/reference.py`. x [T, F], any strides; bias [F]; approximate "none" (erf) or "tanh".

    Returns [T, F] in x's dtype. bias may have another dtype; each gradient comes in its argument's. Differentiable
    once.
    Raises ValueError for another `approximate`.
    """
    if approximate not in ("none", "tanh"):
        raise ValueError(f"approximate={approximate!r}: expected 'none' or 'tanh'")
    return BiasGeluFunction.apply(x, bias, approximate)
