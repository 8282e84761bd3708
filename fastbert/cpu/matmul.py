"""Matrix products and linear layers on a CPU: each product by the faster of torch's two matrix libraries.

torch runs float32 products with MKL, which only uses AVX2 on processors that are not Intel's. oneDNN, also in torch,
uses AVX-512 wherever it exists (2.1 times as fast on a Zen 5 core, equal on Intel's).
"""

import torch
import torch.nn.functional as F

from .autograd import in_memory, runs_by_autograd

# below 2**20 multiply-adds oneDNN's set-up, under a millisecond per new shape, costs more than it saves
ONEDNN_SIZE = 2**20


def _prefers_onednn(size, *tensors):
    """Whether oneDNN is faster in a product of `size` multiply-adds."""
    return (
        size >= ONEDNN_SIZE
        and in_memory(*tensors)
        and all(x.dtype == torch.float32 for x in tensors)
        and torch.backends.mkldnn.is_available()
        and torch.backends.mkldnn.enabled
    )


def matmul(a, b, bias=None):
    """a [M, K] @ b [K, N], plus bias [N] if given."""
    if _prefers_onednn(a.numel() * b.shape[1], a, b):
        return torch.ops.mkldnn._linear_pointwise(a, _dense(b.t()), bias, "none", [], "")
    return a @ b if bias is None else torch.addmm(bias, a, b)


def _dense(weight):
    """The weight without gaps between its rows or columns: with gaps oneDNN takes a thousand times as long."""
    return weight if weight.is_contiguous() or weight.t().is_contiguous() else weight.contiguous()


def bmm(a, b):
    """a [G, M, C] @ b [G, C, N].

    Python can only call oneDNN's batched product as a 1 x 1 convolution with G groups, whose pixels are the rows of
    `a`; if b is stored by rows, as its transpose. Its result lies in memory as [M, G, N].
    """
    G, M, C = a.shape
    N = b.shape[2]
    if G > 1 and a.stride(2) != 1 or not _prefers_onednn(M * C * N, a):
        return torch.bmm(a, b)
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
    if not _prefers_onednn(x.shape[0] * weight.numel(), x, weight):
        return F.linear(x, weight, bias)
    if not torch.is_grad_enabled():
        return matmul(x, weight.t(), bias)
    return LinearFunction.apply(x, weight, bias)


def linears(x, weights, biases):
    if len(x) < x.shape[1] and not (torch.is_grad_enabled() or torch.compiler.is_compiling()):
        # with few rows, concatenating the results is faster than concatenating the weights
        return torch.cat([linear(x, weight, bias) for weight, bias in zip(weights, biases)], 1)
    return linear(x, torch.cat(weights), torch.cat(biases))


def linear_gelu(x, weight, bias=None, *, approximate="none"):
    """GELU(linear(x)). Without gradients oneDNN applies the GELU while the product is in cache."""
    wants_gradient = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias))
    if not wants_gradient and _prefers_onednn(x.shape[0] * weight.numel(), x, weight):
        return torch.ops.mkldnn._linear_pointwise(x, _dense(weight), bias, "gelu", [], approximate)
    return F.gelu(linear(x, weight, bias), approximate=approximate)
