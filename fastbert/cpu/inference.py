"""A post-norm layer without gradients: few calls, and weights in the form that the faster library reads quickest.

With a few rows the time goes into calls and into reading the weights. So the three projections of attention are one
product, the GELU is part of its product, residuals are added in place, and for oneDNN the weights are packed once.
"""

import weakref
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from . import low_precision
from .attention import attention, biased_attention
from .autograd import in_memory
from .libraries import LEAST, prefers_onednn
from .matmul import candidates


class PostNorm(NamedTuple):
    """The parts of a layer: x -> norm(x + output(attention(query(x), key(x), value(x)))), then y -> norm(y +
    down(gelu(up(y)))). Linear layers and LayerNorms."""

    query: nn.Linear
    key: nn.Linear
    value: nn.Linear
    output: nn.Linear
    attention_norm: nn.LayerNorm
    up: nn.Linear
    down: nn.Linear
    norm: nn.LayerNorm


class _Linear:
    """Linear layers of one input side by side, without gradients."""

    def __init__(self, *linears):
        self.linears = linears

    def read(self):
        """Read the weights again. Returns those that copies are made of."""
        weights, biases = [x.weight.detach() for x in self.linears], [x.bias.detach() for x in self.linears]
        self.weight, self.bias = (x[0] if len(x) == 1 else torch.cat(x) for x in (weights, biases))
        self.packed, self.low = None, {}
        return weights if len(weights) == 1 else weights + biases

    def __call__(self, x, gelu=None):
        """gelu(x [M, K] @ weight.T + bias), [M, N]. gelu: "none" or "tanh" as PyTorch names it; None for none."""
        dtype = low_precision.current()
        if dtype != "fp32":
            low = self.low.get(dtype)
            if low is None:
                low = self.low[dtype] = low_precision.Packed(self.weight, dtype)
            return low(x, self.bias, gelu)
        (M, K), N = x.shape, len(self.weight)
        kind = "packed" if gelu is None else "packed-gelu"
        if M * K * N >= LEAST and torch.backends.mkldnn.enabled and prefers_onednn(kind, (M, K, N), candidates):
            # another thread may be here, too
            packed = self.packed
            if packed is None:
                packed = self.packed = torch.ops.mkldnn._reorder_linear_weight(self.weight.contiguous(), M)
            activation, form = ("none", "") if gelu is None else ("gelu", gelu)
            return torch.ops.mkldnn._linear_pointwise(x, packed, self.bias, activation, [], form)
        y = torch.addmm(self.bias, x, self.weight.t())
        return y if gelu is None else F.gelu(y, approximate=gelu)


class Layer:
    """A layer of the modules `parts`, with the attention of H heads.

    Weights that change are read again. PyTorch counts changes in place, but not those through `.data`: for these, a
    value of each row and column is compared, so that a change of single values through `.data` may go unnoticed.
    """

    def __init__(self, parts: PostNorm, heads: int, scale: float | None, approximate: str) -> None:
        self.parts, self.heads, self.scale, self.approximate = parts, heads, scale, approximate
        self.linears = _Linear(parts.query, parts.key, parts.value), *map(_Linear, (parts.output, parts.up, parts.down))
        self.parameters = [x for part in parts for x in (part.weight, part.bias)]
        self.stamp = None

    def holds(self, parts):
        """Whether these are still the modules, with the same parameters, in float32 and without gaps."""
        return parts == self.parts and all(
            part.weight is weight and part.bias is bias and weight.dtype == bias.dtype == torch.float32
            and weight.is_contiguous() and bias.is_contiguous()
            for part, weight, bias in zip(parts, self.parameters[::2], self.parameters[1::2])
        )  # fmt: skip

    def _refresh(self):
        stamp = [(x._version, x.data_ptr()) for x in self.parameters]
        if stamp == self.stamp and torch.equal(torch.cat(self.samples), self.sampled):
            return
        copied = [x for linear in self.linears for x in linear.read()]
        self.samples = [low_precision.samples(x) for x in copied]
        self.sampled, self.stamp = torch.cat(self.samples), stamp

    def __call__(
        self, x: torch.Tensor, cu_seqlens: torch.Tensor, max_seqlen: int, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        """x float32 [T, D] -> [T, D], with the sequences of `ops.attention`; with a bias, of `ops.biased_attention`."""
        self._refresh()
        qkv, output, up, down = self.linears
        heads = qkv(x).view(len(x), 3, self.heads, -1)
        if bias is None:
            attended = attention(heads, None, None, cu_seqlens, max_seqlen, scale=self.scale)
        else:
            attended = biased_attention(heads, None, None, bias, cu_seqlens, max_seqlen, scale=self.scale)
        x = _normalised(self.parts.attention_norm, output(attended.flatten(1)).add_(x))
        return _normalised(self.parts.norm, down(up(x, self.approximate)).add_(x))


def _normalised(norm, x):
    # as F.layer_norm, whose checks take as long as the norm of a short text
    return torch.layer_norm(x, norm.normalized_shape, norm.weight, norm.bias, norm.eps)


# module -> its Layer
_PREPARED = weakref.WeakKeyDictionary()


def prepare(module, parts, heads, scale, approximate):
    """The Layer of `module`, made once; None for parameters that are no contiguous float32 tensors in memory."""
    layer = _PREPARED.get(module)
    if layer is None or not layer.holds(parts):
        parameters = [x for part in parts for x in (part.weight, part.bias)]
        # inference tensors do not say when they are changed
        if not in_memory(*parameters) or not torch.backends.mkldnn.is_available():
            return None
        if not all(x.dtype == torch.float32 and x.is_contiguous() and not x.is_inference() for x in parameters):
            return None
        layer = _PREPARED[module] = Layer(parts, heads, scale, approximate)
    return layer
