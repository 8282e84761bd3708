"""Bias and GELU in one pass, forward and backward.

    y = gelu(x + bias)      exact: u Φ(u) with Φ by erf, or the tanh approximation; bias may be absent

Plain PyTorch, forward: read x, write x + bias, read it, write y, 4 T F elements. Fused: read x, write y, 2 T F.
Backward, plain: read dy and x + bias, write dx, read dx again for dbias, 4 T F. Fused: read dy and x, write dx, 3 T F,
and 4 F bytes of partial sums per row program, written and read once.

The backward computes x + bias and GELU's derivative again from x. Each program has one tile of columns, loops over its
share of the rows and adds up dbias in registers. One sum over the programs follows. There are no atomics, and the same
inputs give the same bits.

T tokens, F feed-forward size.
"""

import torch
import triton
import triton.language as tl

from ._column_sums import column_sums
from ._launch import (
    differentiable_once,
    empty_like,
    launch,
    multiprocessors,
    register,
    row_align,
    shape_key,
    unit_columns,
)
from ._math import gelu, gelu_derivative, load_rows, parameter

# eight elements of a tile per thread
FORWARD = dict(BLOCK_T=4, BLOCK_F=256, num_warps=4)
FORWARD_CANDIDATES = (
    FORWARD,
    dict(BLOCK_T=8, BLOCK_F=256, num_warps=4),
    dict(BLOCK_T=8, BLOCK_F=256, num_warps=8),
    dict(BLOCK_T=2, BLOCK_F=512, num_warps=4),
    dict(BLOCK_T=2, BLOCK_F=256, num_warps=2),
)
# eight programs per multiprocessor, divided among the column tiles: all run at once
BACKWARD = dict(BLOCK_T=4, BLOCK_F=256, num_warps=4, PROGRAMS=8, STAGES=1)
BACKWARD_CANDIDATES = (
    BACKWARD,
    *({**BACKWARD, "PROGRAMS": n} for n in (4, 10, 16)),
    *({**BACKWARD, "STAGES": n} for n in (2, 3, 4)),
    {**BACKWARD, "BLOCK_T": 8, "PROGRAMS": 4},
    {**BACKWARD, "BLOCK_T": 2, "num_warps": 2, "PROGRAMS": 16},
)


@triton.jit(do_not_specialize=["T"])
def _bias_gelu_fwd_kernel(
    x_ptr, bias_ptr,
    y_ptr,
    T, stride_xt,
    F: tl.constexpr, ALIGN: tl.constexpr, TANH: tl.constexpr, HAS_BIAS: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_F: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    # adjacent programs have adjacent column tiles, and read adjacent memory
    # rows are int64: T * F can pass 2^31
    pid = tl.program_id(0).to(tl.int64)
    row = (pid // TILES * BLOCK_T + tl.arange(0, BLOCK_T))[:, None]
    offs_f = (pid % TILES).to(tl.int32) * BLOCK_F + tl.arange(0, BLOCK_F)[None, :]
    mask = (row < T) & (offs_f < F)

    x = load_rows(x_ptr, row, stride_xt, offs_f, mask, ALIGN)
    if HAS_BIAS:
        x += parameter(bias_ptr, offs_f, mask)
    tl.store(y_ptr + row * F + offs_f, gelu(x, TANH), mask=mask)


@triton.jit(do_not_specialize=["T"])
def _bias_gelu_bwd_kernel(
    dy_ptr, x_ptr, bias_ptr,
    dx_ptr, partials_ptr,
    T, stride_dyt, stride_xt,
    F: tl.constexpr, ALIGN: tl.constexpr, TANH: tl.constexpr, HAS_BIAS: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_F: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    # partials: dbias [F], fp32, per row program
    offs_f = tl.program_id(0) * BLOCK_F + tl.arange(0, BLOCK_F)[None, :]
    mask_f = offs_f < F
    dbias = tl.zeros([BLOCK_T, BLOCK_F], tl.float32)
    if HAS_BIAS:
        bias = parameter(bias_ptr, offs_f, tl.broadcast_to(mask_f, dbias.shape))

    pid = tl.program_id(1).to(tl.int64)
    for start in tl.range(pid * BLOCK_T, T, tl.num_programs(1) * BLOCK_T, num_stages=STAGES):
        row = (start + tl.arange(0, BLOCK_T))[:, None]
        mask = (row < T) & mask_f
        x = load_rows(x_ptr, row, stride_xt, offs_f, mask, ALIGN)
        dy = load_rows(dy_ptr, row, stride_dyt, offs_f, mask, ALIGN)
        if HAS_BIAS:
            x += bias
        dx = dy * gelu_derivative(x, TANH)
        dbias += dx
        tl.store(dx_ptr + row * F + offs_f, dx, mask=mask)

    if HAS_BIAS:
        tl.store(partials_ptr + pid * F + offs_f, tl.sum(dbias, 0)[None, :], mask=mask_f)


def bias_gelu_fwd(x, bias, approximate):
    """y [T, F] in x's dtype."""
    T, F = x.shape
    y = torch.empty((T, F), dtype=x.dtype, device=x.device)
    if T == 0:
        return y
    x = unit_columns(x)
    bias = None if bias is None else bias.contiguous()

    def run(settings):
        tiles = triton.cdiv(F, settings["BLOCK_F"])
        _bias_gelu_fwd_kernel[(triton.cdiv(T, settings["BLOCK_T"]) * tiles,)](
            x, bias, y, T, x.stride(0),
            F=F, ALIGN=row_align(x), TANH=approximate == "tanh", HAS_BIAS=bias is not None, TILES=tiles, **settings,
        )  # fmt: skip

    launch(run, "bias_gelu_fwd", shape_key(x, F), FORWARD, FORWARD_CANDIDATES)
    return y


def bias_gelu_bwd(dy, x, bias, approximate):
    """(dx, dbias); dbias is empty without a bias."""
    T, F = x.shape
    dx, dbias = empty_like(x, x), empty_like(bias, x)
    dy, x = unit_columns(dy), unit_columns(x)
    bias = None if bias is None else bias.contiguous()

    def run(settings):
        constants = dict(settings)
        tiles = triton.cdiv(F, constants["BLOCK_F"])
        blocks, most = triton.cdiv(T, constants["BLOCK_T"]), constants.pop("PROGRAMS") * multiprocessors()
        programs = min(blocks, triton.cdiv(most, tiles))
        partials = torch.empty((programs, 1, 0 if bias is None else F), dtype=torch.float32, device=x.device)
        if T:
            _bias_gelu_bwd_kernel[(tiles, programs)](
                dy, x, bias, dx, partials, T, dy.stride(0), x.stride(0),
                F=F, ALIGN=row_align(dy, x), TANH=approximate == "tanh", HAS_BIAS=bias is not None, **constants,
            )  # fmt: skip
        if bias is not None:
            column_sums(partials, [dbias])

    launch(run, "bias_gelu_bwd", shape_key(x, F), BACKWARD, BACKWARD_CANDIDATES)
    return dx, dbias


_fwd = register(
    "bias_gelu_fwd(Tensor x, Tensor? bias, str approximate) -> Tensor",
    bias_gelu_fwd,
    lambda x, bias, approximate: x.new_empty(x.shape),
)
_bwd = register(
    "bias_gelu_bwd(Tensor dy, Tensor x, Tensor? bias, str approximate) -> (Tensor, Tensor)",
    bias_gelu_bwd,
    lambda dy, x, bias, approximate: (empty_like(x, x), empty_like(bias, x)),
)


class BiasGeluFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, bias, approximate):
        ctx.save_for_backward(x, bias)
        ctx.approximate = approximate
        return _fwd(x, bias, approximate)

    @staticmethod
    @differentiable_once("bias_gelu")
    def backward(ctx, dy):
        x, bias = ctx.saved_tensors
        dx, dbias = _bwd(dy, x, bias, ctx.approximate)
        return dx, None if bias is None else dbias, None


def bias_gelu(x, bias, *, approximate="none"):
    """GELU(x + bias), see `fastbert/reference.py`. x [T, F], any strides; bias [F] or None; approximate "none" (erf) or
    "tanh".

    Returns [T, F] in x's dtype. bias may have another dtype; each gradient has its argument's. Differentiable once.
    Raises ValueError for another `approximate`.
    """
    if approximate not in ("none", "tanh"):
        raise ValueError(f"approximate={approximate!r}: expected 'none' or 'tanh'")
    return BiasGeluFunction.apply(x, bias, approximate)
