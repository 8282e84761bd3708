"""Matrix products and linear layers on a CPU, each by the faster of torch's two matrix libraries: see libraries.py."""

import functools
import math

import torch
import torch.nn.functional as F

from . import low_precision
from .autograd import in_memory, runs_by_autograd
from .libraries import LEAST, prefers_onednn, share_saved


def _may_use_onednn(size, *tensors):
    """Whether oneDNN can multiply these tensors, and the product is not too small for it. size: multiply-adds."""
    return (
        size >= LEAST
        and in_memory(*tensors)
        and all(x.dtype == torch.float32 for x in tensors)
        and torch.backends.mkldnn.is_available()
        and torch.backends.mkldnn.enabled
    )


def _uses_onednn(kind, a, b, N):
    """Whether oneDNN multiplies a [..., M, K] by b, N wide or a weight with N rows. kind: see `candidates`."""
    sizes = *a.shape, N
    return _may_use_onednn(math.prod(sizes), a, b) and prefers_onednn(kind, sizes, candidates)


def matmul(a, b, bias=None):
    """a [M, K] @ b [K, N], plus bias [N] if given."""
    return (_by_onednn if _uses_onednn(_kind(a, b), a, b, b.shape[1]) else _by_torch)(a, b, bias)


def _kind(a, b):
    """The kind of a product, by the layout of its operands. Each is one of a linear layer's three."""
    if a.stride(0) == 1 != a.stride(1):
        return "dweight"
    return "dx" if b.stride(1) == 1 else "forward"


def _by_onednn(a, b, bias=None, activation="none", approximate=""):
    weight = b.t()
    # with gaps between its rows or columns oneDNN takes a thousand times as long
    if not (weight.is_contiguous() or b.is_contiguous()):
        weight = weight.contiguous()
    return torch.ops.mkldnn._linear_pointwise(a, weight, bias, activation, [], approximate)


def _by_torch(a, b, bias=None):
    return a @ b if bias is None else torch.addmm(bias, a, b)


def bmm(a, b):
    """a [G, M, C] @ b [G, C, N]. oneDNN's result lies in memory as [M, G, N]."""
    kind = "batched" if b.stride(2) == 1 else "batched-transposed"
    if len(a) > 1 and a.stride(2) != 1 or not _uses_onednn(kind, a, b, b.shape[2]):
        return torch.bmm(a, b)
    return _bmm_by_onednn(a, b)


def _bmm_by_onednn(a, b):
    """Python can only call oneDNN's batched product as a 1 x 1 convolution with G groups, whose pixels are the rows of
    `a`; if b is stored by rows, as its transpose."""
    G, M, C = a.shape
    N = b.shape[2]
    pixels = (a[0].contiguous() if G == 1 else a.transpose(0, 1)).reshape(1, 1, M, G * C).permute(0, 3, 1, 2)
    if b.stride(2) == 1:
        weight = b.reshape(G * C, N, 1, 1)
        out = torch.ops.mkldnn._convolution_transpose_pointwise(
            pixels, weight, None, [0, 0], [0, 0], [1, 1], [1, 1], G, "none", [], ""
        )
    else:
        weight = b.transpose(1, 2).reshape(G * N, C, 1, 1)
        out = torch.ops.mkldnn._convolution_pointwise(pixels, weight, None, [0, 0], [1, 1], [1, 1], G, "none", [], "")
    return out.view(G, N, M).transpose(1, 2)


# seconds that our path costs in a layer of another's stack, in calls of Python: without gradients, and with
OVERHEAD = 4e-4, 2e-3
# multiply-adds of a layer's linear products without gradients and with, in units of tokens * width**2
_LAYER = 12, 36


@functools.lru_cache(maxsize=4096)
def pays(tokens, places, width, wants_gradients, threads):
    """Whether a layer of another's stack gains more than it loses by running our ops on `tokens` packed rows instead of
    its own on `places` padded rows of this width. threads: torch's, which the answer depends on."""
    seconds, saved = share_saved("forward", (places, width, width), candidates)
    left = tokens / places
    return _LAYER[wants_gradients] * seconds * (1 - left + left * saved) > OVERHEAD[wants_gradients]


def candidates(kind, sizes):
    """A product of this kind and these sizes by oneDNN, and by torch, as functions.

    Kinds, with M rows, K inputs and N outputs: forward x [M, K] @ weight [N, K].T; gelu the same with a GELU behind it;
    packed and packed-gelu the same with a weight that oneDNN has packed before; dx dout [M, N] @ weight [N, K]; dweight
    dout [M, N].T @ x [M, K]; batched [G, M, C] @ [G, C, N], the second by rows, or batched-transposed by columns.
    """
    if kind.startswith("batched"):
        G, M, C, N = sizes
        a = torch.ones(G, M, C)
        b = torch.ones(G, C, N) if kind == "batched" else torch.ones(G, N, C).transpose(1, 2)
        return lambda: _bmm_by_onednn(a, b), lambda: torch.bmm(a, b)
    P, Q, R = sizes
    a = torch.ones(Q, P).t() if kind == "dweight" else torch.ones(P, Q)
    b = torch.ones(Q, R) if kind in ("dx", "dweight") else torch.ones(R, Q).t()
    if kind.startswith("packed"):
        packed = torch.ops.mkldnn._reorder_linear_weight(b.t(), P)
        activation, form = ("gelu", "none") if kind == "packed-gelu" else ("none", "")
        activate = F.gelu if kind == "packed-gelu" else lambda y: y
        return (
            lambda: torch.ops.mkldnn._linear_pointwise(a, packed, None, activation, [], form),
            lambda: activate(_by_torch(a, b)),
        )
    if kind == "gelu":
        return lambda: _by_onednn(a, b, None, "gelu", "none"), lambda: F.gelu(_by_torch(a, b))
    return lambda: _by_onednn(a, b), lambda: _by_torch(a, b)


class LinearFunction(torch.autograd.Function):
    """A linear layer with its three products by `matmul`."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        return matmul(x, weight.t(), bias)

    @staticmethod
    def backward(ctx, dout):
        x, weight = ctx.saved_tensors
        product = torch.matmul if runs_by_autograd(dout) else matmul
        wants_x, wants_weight, wants_bias = ctx.needs_input_grad
        dx = product(dout, weight) if wants_x else None
        dweight = product(dout.t(), x) if wants_weight else None
        return dx, dweight, dout.sum(0) if wants_bias else None


def linear(x, weight, bias=None):
    if low_precision.takes(x, weight):
        return low_precision.linear(x, weight, bias)
    if not _may_use_onednn(x.shape[0] * weight.numel(), x, weight):
        return F.linear(x, weight, bias)
    if not torch.is_grad_enabled():
        return matmul(x, weight.t(), bias)
    (M, K), N = x.shape, len(weight)
    products = (("forward", (M, K, N)), ("dx", (M, N, K)), ("dweight", (N, M, K)))
    if any(prefers_onednn(*product, candidates) for product in products):
        return LinearFunction.apply(x, weight, bias)
    return F.linear(x, weight, bias)


def linears(x, weights, biases):
    is_low = all(low_precision.takes(x, weight) for weight in weights)
    if is_low or len(x) < x.shape[1] and not (torch.is_grad_enabled() or torch.compiler.is_compiling()):
        # with few rows, concatenating the results is faster than concatenating the weights
        return torch.cat([linear(x, weight, bias) for weight, bias in zip(weights, biases)], 1)
    return linear(x, torch.cat(weights), None if biases[0] is None else torch.cat(biases))


def linear_gelu(x, weight, bias=None, *, approximate="none"):
    """GELU(linear(x)). Without gradients oneDNN applies the GELU while the product is in cache."""
    if low_precision.takes(x, weight):
        return low_precision.linear(x, weight, bias, approximate)
    wants_gradient = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias))
    if not wants_gradient and _uses_onednn("gelu", x, weight, len(weight)):
        return _by_onednn(x, weight.t(), bias, "gelu", approximate)
    return F.gelu(linear(x, weight, bias), approximate=approximate)
