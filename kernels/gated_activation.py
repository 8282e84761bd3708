"""A gated feed-forward's activation times its other half in one pass, forward and backward.

    y = f(a) b      x = [a, b] or [b, a]; f: exact or tanh GELU, or SiLU

Plain PyTorch, forward: read a, write f(a), read it and b, write y, 5 T F elements. Fused: read x, write y, 3 T F.
Backward, plain: read dy, b and f(a), write two products, read the first and a, write da, and join da and db to dx,
12 T F. Fused: read dy and x, write dx, 5 T F.

The backward computes f(a) and its derivative again from a, so that x alone is kept. T tokens, F feed-forward size.
"""

import torch
import triton
import triton.language as tl

from ._launch import differentiable_once, launch, register, row_align, shape_key, unit_columns
from ._math import activated, activation_derivative, load_rows

# eight elements of a tile per thread
SETTINGS = dict(BLOCK_T=4, BLOCK_F=256, num_warps=4)
CANDIDATES = (
    SETTINGS,
    dict(BLOCK_T=8, BLOCK_F=256, num_warps=8),
    dict(BLOCK_T=2, BLOCK_F=512, num_warps=4),
    dict(BLOCK_T=2, BLOCK_F=256, num_warps=2),
    dict(BLOCK_T=2, BLOCK_F=256, num_warps=4),
)


@triton.jit(do_not_specialize=["T"])
def _gated_activation_fwd_kernel(
    x_ptr,
    y_ptr,
    T, stride_xt,
    F: tl.constexpr, ALIGN: tl.constexpr, ACTIVATION: tl.constexpr, GATE: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_F: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    # rows are int64: T * F can pass 2^31. GATE is the first column of the half that goes through the activation
    pid = tl.program_id(0).to(tl.int64)
    row = (pid // TILES * BLOCK_T + tl.arange(0, BLOCK_T))[:, None]
    offs_f = (pid % TILES).to(tl.int32) * BLOCK_F + tl.arange(0, BLOCK_F)[None, :]
    mask = (row < T) & (offs_f < F)

    a = load_rows(x_ptr, row, stride_xt, GATE + offs_f, mask, ALIGN)
    b = load_rows(x_ptr, row, stride_xt, F - GATE + offs_f, mask, ALIGN)
    tl.store(y_ptr + row * F + offs_f, activated(a, ACTIVATION) * b, mask=mask)


@triton.jit(do_not_specialize=["T"])
def _gated_activation_bwd_kernel(
    dy_ptr, x_ptr,
    dx_ptr,
    T, stride_dyt, stride_xt,
    F: tl.constexpr, ALIGN: tl.constexpr, ACTIVATION: tl.constexpr, GATE: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_F: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0).to(tl.int64)
    row = (pid // TILES * BLOCK_T + tl.arange(0, BLOCK_T))[:, None]
    offs_f = (pid % TILES).to(tl.int32) * BLOCK_F + tl.arange(0, BLOCK_F)[None, :]
    mask = (row < T) & (offs_f < F)

    dy = load_rows(dy_ptr, row, stride_dyt, offs_f, mask, ALIGN)
    a = load_rows(x_ptr, row, stride_xt, GATE + offs_f, mask, ALIGN)
    b = load_rows(x_ptr, row, stride_xt, F - GATE + offs_f, mask, ALIGN)
    out = dx_ptr + row * (2 * F) + offs_f
    tl.store(out + GATE, dy * b * activation_derivative(a, ACTIVATION), mask=mask)
    tl.store(out + F - GATE, dy * activated(a, ACTIVATION), mask=mask)


def _run(kernel, tensors, out, x, activation, gate):
    """Launch a kernel on all rows of x [T, 2 F] and of the other tensors."""
    T, F = x.shape[0], x.shape[1] // 2
    if T == 0 or F == 0:
        return out

    def run(settings):
        tiles = triton.cdiv(F, settings["BLOCK_F"])
        kernel[(triton.cdiv(T, settings["BLOCK_T"]) * tiles,)](
            *tensors, out, T, *(tensor.stride(0) for tensor in tensors),
            F=F, ALIGN=row_align(*tensors), ACTIVATION=activation, GATE=0 if gate == "first" else F, TILES=tiles,
            **settings,
        )  # fmt: skip

    name = f"gated_activation_{'fwd' if len(tensors) == 1 else 'bwd'}"
    launch(run, name, shape_key(x, F), SETTINGS, CANDIDATES)
    return out


def gated_activation_fwd(x, activation, gate):
    """y [T, F] in x's dtype."""
    y = torch.empty((x.shape[0], x.shape[1] // 2), dtype=x.dtype, device=x.device)
    return _run(_gated_activation_fwd_kernel, (unit_columns(x),), y, x, activation, gate)


def gated_activation_bwd(dy, x, activation, gate):
    """dx [T, 2 F]."""
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    return _run(_gated_activation_bwd_kernel, (unit_columns(dy), unit_columns(x)), dx, x, activation, gate)


_fwd = register(
    "gated_activation_fwd(Tensor x, str activation, str gate) -> Tensor",
    gated_activation_fwd,
    lambda x, activation, gate: x.new_empty(x.shape[0], x.shape[1] // 2),
)
_bwd = register(
    "gated_activation_bwd(Tensor dy, Tensor x, str activation, str gate) -> Tensor",
    gated_activation_bwd,
    lambda dy, x, activation, gate: x.new_empty(x.shape),
)


class GatedActivationFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, activation, gate):
        ctx.save_for_backward(x)
        ctx.activation, ctx.gate = activation, gate
        return _fwd(x, activation, gate)

    @staticmethod
    @differentiable_once("gated_activation")
    def backward(ctx, dy):
        return _bwd(dy, *ctx.saved_tensors, ctx.activation, ctx.gate), None, None


def gated_activation(x, *, activation="gelu", gate="first"):
    """The activation of one half of x times the other half, see `fastbert/reference.py`. x [T, 2 F], any strides.

    activation: "gelu", "gelu_tanh" or "silu". gate: the half that goes through it, "first" or "last". Returns [T, F] in
    x's dtype. Differentiable once.
    """
    return GatedActivationFunction.apply(x, activation, gate)
