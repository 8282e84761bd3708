"""Root mean square normalisation in one pass, forward and backward.

    y = x rstd weight      rstd = 1 / sqrt(mean(x²) + eps)

Plain PyTorch as in transformers, forward: read x, write it in fp32, its squares and their means, x rstd, its cast, y:
some 12 T D elements of bf16. Fused: read x, write y, 2 T D, and rstd, 4 bytes per row. Backward, fused: read dy and x,
write dx, 3 T D, and 4 D bytes of partial sums of dweight per program, written and read once.

Each program adds up dweight over its rows, and one sum over the programs follows. There are no atomics, and the same
inputs give the same bits. T tokens, D hidden size.
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
from ._math import columns, load_rows, parameter, row_sum


@triton.jit(do_not_specialize=["T"])
def _rms_norm_fwd_kernel(
    x_ptr, weight_ptr,
    y_ptr, rstd_ptr,
    T, stride_xt, eps,
    D: tl.constexpr, ALIGN: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    # rows are int64: T * D can pass 2^31
    offs_t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    row = offs_t[:, None]
    mask_t = row < T

    x, squares = (), ()
    for i in tl.static_range(TILES):
        offs_d, mask = columns(i, mask_t, D, BLOCK_D)
        tile = load_rows(x_ptr, row, stride_xt, offs_d, mask, ALIGN)
        x = x + (tile,)
        squares = squares + (tile * tile,)
    rstd = 1.0 / tl.sqrt(row_sum(squares) / D + eps)
    tl.store(rstd_ptr + offs_t, rstd, mask=offs_t < T)

    for i in tl.static_range(TILES):
        offs_d, mask = columns(i, mask_t, D, BLOCK_D)
        tl.store(y_ptr + row * D + offs_d, x[i] * rstd[:, None] * parameter(weight_ptr, offs_d, mask), mask=mask)


@triton.jit(do_not_specialize=["T"])
def _rms_norm_bwd_kernel(
    dy_ptr, x_ptr, weight_ptr, rstd_ptr,
    dx_ptr, partials_ptr,
    T, stride_dyt, stride_xt,
    D: tl.constexpr, ALIGN: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, TILES: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    # partials: dweight [D], fp32, per program. Until the end each row of the block has its own sums, so that nothing
    # crosses warps inside the loop
    dweight = ()
    for _ in tl.static_range(TILES):
        dweight = dweight + (tl.zeros([BLOCK_T, BLOCK_D], tl.float32),)

    pid = tl.program_id(0).to(tl.int64)
    for start in tl.range(pid * BLOCK_T, T, tl.num_programs(0) * BLOCK_T, num_stages=STAGES):
        offs_t = start + tl.arange(0, BLOCK_T)
        row = offs_t[:, None]
        mask_t = row < T
        rstd = tl.load(rstd_ptr + offs_t, mask=offs_t < T, other=0.0)[:, None]

        g, x_hat, products, new_dweight = (), (), (), ()
        for i in tl.static_range(TILES):
            offs_d, mask = columns(i, mask_t, D, BLOCK_D)
            dy = load_rows(dy_ptr, row, stride_dyt, offs_d, mask, ALIGN)
            x = load_rows(x_ptr, row, stride_xt, offs_d, mask, ALIGN) * rstd
            new_dweight = new_dweight + (dweight[i] + dy * x,)
            dy *= parameter(weight_ptr, offs_d, mask)
            g = g + (dy,)
            x_hat = x_hat + (x,)
            products = products + (dy * x,)
        dweight = new_dweight

        mean_product = (row_sum(products) / D)[:, None]
        for i in tl.static_range(TILES):
            offs_d, mask = columns(i, mask_t, D, BLOCK_D)
            tl.store(dx_ptr + row * D + offs_d, (g[i] - x_hat[i] * mean_product) * rstd, mask=mask)

    for i in tl.static_range(TILES):
        offs_d = i * BLOCK_D + tl.arange(0, BLOCK_D)
        tl.store(partials_ptr + pid * D + offs_d, tl.sum(dweight[i], 0), mask=offs_d < D)


def _empty_fwd(x, weight, eps):
    """The uninitialised results of rms_norm_fwd; also its fake for torch.compile."""
    return empty_like(x, x), torch.empty(x.shape[0], dtype=torch.float32, device=x.device)


def rms_norm_fwd(x, weight, eps):
    """(y [T, D] in x's dtype, rstd [T] fp32)."""
    T, D = x.shape
    y, rstd = _empty_fwd(x, weight, eps)
    default, candidates = row_settings(D, x.element_size())
    if T == 0:
        return y, rstd
    x, weight = unit_columns(x), weight.contiguous()

    def run(settings):
        _rms_norm_fwd_kernel[(triton.cdiv(T, settings["BLOCK_T"]),)](
            x, weight, y, rstd, T, x.stride(0), eps, D=D, ALIGN=row_align(x), **settings
        )

    launch(run, "rms_norm_fwd", shape_key(x, D), default, candidates)
    return y, rstd


def rms_norm_bwd(dy, x, weight, rstd):
    """(dx, dweight)."""
    T, D = x.shape
    dx, dweight = empty_like(x, x), empty_like(weight, x)
    dy, x, weight = unit_columns(dy), unit_columns(x), weight.contiguous()

    def run(settings):
        constants = dict(settings)
        programs = row_programs(T, constants["BLOCK_T"], constants.pop("PROGRAMS"))
        partials = torch.empty((programs, 1, D), dtype=torch.float32, device=x.device)
        if T:
            _rms_norm_bwd_kernel[(programs,)](
                dy, x, weight, rstd, dx, partials, T, dy.stride(0), x.stride(0), D=D, ALIGN=row_align(dy, x),
                **constants,
            )  # fmt: skip
        column_sums(partials, [dweight])

    launch(run, "rms_norm_bwd", shape_key(x, D), *walk_settings(D, x.element_size(), 2))
    return dx, dweight


_fwd = register("rms_norm_fwd(Tensor x, Tensor weight, float eps) -> (Tensor, Tensor)", rms_norm_fwd, _empty_fwd)
_bwd = register(
    "rms_norm_bwd(Tensor dy, Tensor x, Tensor weight, Tensor rstd) -> (Tensor, Tensor)",
    rms_norm_bwd,
    lambda dy, x, weight, rstd: (empty_like(x, x), empty_like(weight, x)),
)


class RmsNormFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, eps):
        y, rstd = _fwd(x, weight, eps)
        ctx.save_for_backward(x, weight, rstd)
        return y

    @staticmethod
    @differentiable_once("rms_norm")
    def backward(ctx, dy):
        return *_bwd(dy, *ctx.saved_tensors), None


def rms_norm(x, weight, *, eps=1e-6):
    """x over the root of its mean square, times the weight, see `fastbert/reference.py`. x [T, D], any strides; weight
    [D].

    Returns [T, D] in x's dtype. weight may have another dtype; each gradient has its argument's. Differentiable once.
    Raises ValueError for rows of more than 8192 columns.
    """
    return RmsNormFunction.apply(x, weight, eps)
