"""A layer without gradients: few calls, and weights in the form that the faster library reads quickest.

With a few rows the time goes into calls and into reading the weights. So the three projections of attention are one
product, the GELU is part of its product, residuals are added in place, and for oneDNN the weights are packed once.
"""

import operator
import weakref
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from . import low_precision
from .attention import attention, biased_attention
from .autograd import in_memory
from .disentangled_attention import disentangled_attention
from .libraries import LEAST, prefers_onednn
from .matmul import candidates


class PostNorm(NamedTuple):
    """The parts of a layer: x -> norm(x + output(attention(query(x), key(x), value(x)))), then y -> norm(y +
    down(gelu(up(y)))). Linear layers and LayerNorms. pos_key, pos_query: of relative positions, in DeBERTa."""

    query: nn.Linear
    key: nn.Linear
    value: nn.Linear
    output: nn.Linear
    attention_norm: nn.LayerNorm
    up: nn.Linear
    down: nn.Linear
    norm: nn.LayerNorm
    pos_key: nn.Linear | None = None
    pos_query: nn.Linear | None = None


class PreNorm(NamedTuple):
    """The parts of a layer: x -> x + output(attention(qkv(attention_norm(x)))), then y -> y + down(gelu(a) * b), a and
    b the halves of up(norm(y)). Linear layers and LayerNorms. attention_norm: None for none."""

    attention_norm: nn.LayerNorm | None
    qkv: nn.Linear
    output: nn.Linear
    norm: nn.LayerNorm
    up: nn.Linear
    down: nn.Linear


class _Linear:
    """Linear layers of one input side by side, without gradients."""

    def __init__(self, *linears):
        self.linears = linears

    def read(self):
        """Read the weights again. Returns those that copies are made of."""
        weights, biases = [x.weight.detach() for x in self.linears], [x.bias for x in self.linears]
        self.packed, self.low = None, {}
        if len(weights) == 1:
            self.weight, self.bias = weights[0], biases[0]
            return weights
        self.weight, self.bias = torch.cat(weights), torch.cat(biases)
        return weights + [x.detach() for x in biases]

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
        y = F.linear(x, self.weight, self.bias)
        return y if gelu is None else F.gelu(y, approximate=gelu)


def _parameters(parts):
    return [x for part in parts if part is not None for x in (part.weight, part.bias) if x is not None]


def _is_readable(x):
    return x.dtype == torch.float32 and x.is_contiguous()


class Layer:
    """A layer of the modules `parts`, a PostNorm or PreNorm, with the attention of H heads.

    Weights that change are read again. PyTorch counts changes in place, but not those through `.data`: for these, a
    value of each row and column is compared, so that a change of single values through `.data` may go unnoticed.
    """

    def __init__(
        self, parts: PostNorm | PreNorm, heads: int, approximate: str, scale: float | None = None,
        window: int | None = None,
    ) -> None:  # fmt: skip
        self.parts, self.heads, self.scale, self.approximate, self.window = parts, heads, scale, approximate, window
        is_post = isinstance(parts, PostNorm)
        projections = (parts.query, parts.key, parts.value) if is_post else (parts.qkv,)
        self.linears = _Linear(*projections), *map(_Linear, (parts.output, parts.up, parts.down))
        tables = (parts.pos_key, parts.pos_query) if is_post else ()
        self.tables = [part and _Linear(part) for part in tables]
        self.parameters = _parameters(parts)
        self.stamp = None

    def is_readable(self):
        """Whether the parameters are in float32 and without gaps."""
        return all(map(_is_readable, self.parameters))

    def _refresh(self):
        stamp = [(x._version, x.data_ptr()) for x in self.parameters]
        if stamp == self.stamp and torch.equal(torch.cat(self.samples), self.sampled):
            return
        copied = [x for linear in (*self.linears, *filter(None, self.tables)) for x in linear.read()]
        # (dtype, table of relative positions, its projections)
        self.positions = None, None, None
        self.samples = [low_precision.samples(x) for x in copied]
        self.sampled, self.stamp = torch.cat(self.samples), stamp

    def __call__(
        self, x: torch.Tensor, cu_seqlens: torch.Tensor, max_seqlen: int,
        relative: torch.Tensor | tuple[torch.Tensor, int, int] | None = None,
        rotation: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> torch.Tensor:  # fmt: skip
        """x float32 [T, D] -> [T, D], with the sequences of `ops.attention`.

        relative: the bias of `ops.biased_attention`; or DeBERTa's table of relative positions [2 * span, D], with the
        position_buckets and max_relative_positions of `ops.disentangled_attention`.
        rotation: for a PreNorm, cosines and sines, [T, 1, 1, K / 2] each, that rotate the two halves of each query and
        key.
        """
        self._refresh()
        if isinstance(self.parts, PreNorm):
            return self._pre_norm(x, cu_seqlens, max_seqlen, rotation)
        return self._post_norm(x, cu_seqlens, max_seqlen, relative)

    def _post_norm(self, x, cu_seqlens, max_seqlen, relative):
        qkv, output, up, down = self.linears
        heads = qkv(x).view(len(x), 3, self.heads, -1)
        if relative is None:
            attended = attention(heads, None, None, cu_seqlens, max_seqlen, scale=self.scale)
        elif isinstance(relative, tuple):
            table, buckets, furthest = relative
            attended = disentangled_attention(
                heads, None, None, *self._projected(table), cu_seqlens, max_seqlen, scale=self.scale,
                position_buckets=buckets, max_relative_positions=furthest,
            )  # fmt: skip
        else:
            attended = biased_attention(heads, None, None, relative, cu_seqlens, max_seqlen, scale=self.scale)
        x = _normalised(self.parts.attention_norm, output(attended.flatten(1)).add_(x))
        return _normalised(self.parts.norm, down(up(x, self.approximate)).add_(x))

    def _projected(self, table):
        """A table of relative positions through its projections, [2 * span, H, K] each or None: the same in every call
        with the same weights, and for a short text the largest products of a layer."""
        dtype, known, projected = self.positions
        if dtype != low_precision.current() or known.shape != table.shape or not torch.equal(known, table):
            projected = [x and x(table).view(len(table), self.heads, -1) for x in self.tables]
            # the table may be a view of a parameter
            self.positions = low_precision.current(), table.clone(), projected
        return projected

    def _pre_norm(self, x, cu_seqlens, max_seqlen, rotation):
        qkv, output, up, down = self.linears
        norm = self.parts.attention_norm
        heads = qkv(x if norm is None else _normalised(norm, x)).view(len(x), 3, self.heads, -1)
        _rotate(heads, *rotation)
        attended = attention(heads, None, None, cu_seqlens, max_seqlen, scale=self.scale, window=self.window)
        x = output(attended.flatten(1)).add_(x)
        first, gate = up(_normalised(self.parts.norm, x)).chunk(2, -1)
        return down(F.gelu(first, approximate=self.approximate).mul_(gate)).add_(x)


def _rotate(heads, cos, sin):
    """Rotate queries and keys of heads [T, 3, H, K] in place."""
    half = heads.shape[-1] // 2
    a, b = heads[:, :2, :, :half], heads[:, :2, :, half:]
    turned = a * sin
    a.mul_(cos).addcmul_(b, sin, value=-1)
    b.mul_(cos).add_(turned)


def _normalised(norm, x):
    # as F.layer_norm, whose checks take as long as the norm of a short text
    return torch.layer_norm(x, norm.normalized_shape, norm.weight, norm.bias, norm.eps)


class _Seen:
    """All that a module and those inside it consist of: what a Layer was made from, unless they have changed since."""

    def __init__(self, module):
        # not the module itself: it would stay alive
        self.modules = [
            (None if inner is module else inner, type(inner), *map(list, _contents(inner)))
            for inner in module.modules()
        ]

    def holds(self, module):
        for inner, kind, *contents in self.modules:
            inner = module if inner is None else inner
            if type(inner) is not kind or any(map(_differ, contents, _contents(inner))):
                return False
            if inner._forward_hooks or inner._forward_pre_hooks or inner._backward_hooks or inner._backward_pre_hooks:
                return False
        return True


def _contents(module):
    attributes = vars(module)
    return attributes.values(), attributes["_modules"].values(), attributes["_parameters"].values()


def _differ(before, now):
    return len(before) != len(now) or not all(map(operator.is_, before, now))


# module -> (its Layer, _Seen)
_PREPARED = weakref.WeakKeyDictionary()


def prepare(module, find):
    """The Layer of `module`, made once; None for parameters that are no contiguous float32 tensors in memory.

    find(module): the arguments of Layer, or None. It is asked again after a change of the module or inside it.
    """
    layer, seen = _PREPARED.get(module, (None, None))
    if layer is not None and seen.holds(module) and layer.is_readable():
        return layer
    found = find(module)
    if found is None:
        return None
    parameters = _parameters(found[0])
    if layer is not None and found == layer.found and not _differ(parameters, layer.parameters) and layer.is_readable():
        # something else has changed
        _PREPARED[module] = layer, _Seen(module)
        return layer
    # inference tensors do not say when they are changed
    if not in_memory(*parameters) or not torch.backends.mkldnn.is_available():
        return None
    if not all(_is_readable(x) and not x.is_inference() for x in parameters):
        return None
    layer = Layer(*found)
    layer.found = found
    _PREPARED[module] = layer, _Seen(module)
    return layer
