"""What runs in place of torch.nn's modules, see `mechanism.py`.

Letters: B sequences, S padded length, T tokens, D hidden size.

A stack of layers computes tokens alone, and returns 0 at padding. (torch does the same in its fast path for inference;
elsewhere it returns what the padding attended to, as layers and attention by themselves do here too.)
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from .. import ops
from ..packing import Layout, full_layout, layout_of
from .stacks import is_static
from .steps import (
    PLAIN,
    Replacement,
    dropout_arguments,
    has_plain_parameters,
    layer_norm,
    linear,
    linear_gelu,
    plain_modules,
)
from .tokenwise import is_watched

# limits of the kernels: columns of a norm, head size
MOST_COLUMNS, MOST_HEAD_SIZE = 8192, 128


def _takes(x):
    """Whether our ops take x, of any shape. Nested tensors, subclasses and what torch.func traces are left to torch."""
    if type(x) not in PLAIN or x.is_nested or x.device.type == "meta" or x.numel() == 0:
        return False
    # the kernels compute in fp32
    is_supported = x.is_floating_point() and (x.dtype != torch.float64 or not ops.uses_triton(x.device))
    return is_supported and not torch._C._are_functorch_transforms_active()


class LayerNorm(Replacement):
    RUNS = {"layer_norm": "fused norm"}
    TOKENWISE = True

    @staticmethod
    def refuses(module):
        columns = math.prod(module.normalized_shape)
        if columns > MOST_COLUMNS:
            return f"it normalizes over {columns} values, more than the kernels' {MOST_COLUMNS}"
        return None

    def forward(self, input):
        shape = self.normalized_shape
        # without a kernel torch's own is as fast
        if not (_takes(input) and ops.uses_triton(input.device)):
            return super().forward(input)
        if input.shape[-len(shape) :] != shape or not has_plain_parameters(self):
            return super().forward(input)
        weight, bias = (p if p is None else p.flatten() for p in (self.weight, self.bias))
        rows = input.reshape(-1, math.prod(shape))
        return ops.layer_norm(rows, weight, bias, eps=self.eps).view(input.shape)


class GELU(Replacement):
    RUNS = {"gelu": "fused GELU"}
    TOKENWISE = True

    def forward(self, input):
        # torch keeps the memory format of the input; without a kernel its own is as fast
        if not (_takes(input) and ops.uses_triton(input.device)) or not input.is_contiguous():
            return super().forward(input)
        rows = input.view(-1, input.shape[-1] if input.dim() else 1)
        return ops.bias_gelu(rows, None, approximate=self.approximate).view(input.shape)


def _layout(x, padding, batch_first, begins_padded=True):
    """The Layout of x [B, S, D] (or [S, B, D], or [S, D]) under torch's key_padding_mask: bool, True at padding, or
    floating, added to the scores. None where that mask hides more than padding.

    begins_padded: whether sequences may begin with padding.
    """
    if x.dim() not in (2, 3) or is_static():
        return None
    shape = x.shape[:-1]
    if x.dim() == 2:
        x, padding, batch_first = x[None], padding if padding is None else padding[None], True
    x = x if batch_first else x.transpose(0, 1)
    B, S = x.shape[:2]
    kept = None
    if padding is not None:
        if padding.shape != (B, S) or padding.requires_grad:
            return None
        if padding.dtype == torch.bool:
            kept = ~padding
        elif padding.is_floating_point():
            kept = padding == 0
            if not bool((kept | (padding <= torch.finfo(padding.dtype).min / 2)).all()):
                return None
        else:
            return None
    layout = full_layout(B, S, x.device) if kept is None or bool(kept.all()) else layout_of(kept)
    if layout.indices is not None and not begins_padded and not bool(kept[:, 0].all()):
        return None
    indices = layout.indices
    if not batch_first:
        # the places of the tokens in [S, B, D]
        places = torch.arange(B * S, device=x.device) if indices is None else indices
        indices = places % S * B + places // S
    return layout._replace(indices=indices, shape=tuple(shape))


class MultiheadAttention(Replacement):
    RUNS = {"attention": "fused self-attention; falls back to torch's with an attn_mask or need_weights"}
    TAKES_LAYOUT = True

    @staticmethod
    def refuses(module):
        if not module._qkv_same_embed_dim:
            return "its keys or values have another width (kdim, vdim)"
        if module.bias_k is not None or module.add_zero_attn:
            return "it adds a key to each sequence (add_bias_kv, add_zero_attn)"
        if module.head_dim > MOST_HEAD_SIZE:
            return f"its head size is {module.head_dim}, more than the kernels' {MOST_HEAD_SIZE}"
        return None

    def misfit(self):
        # torch does not call `out_proj` either
        is_here = has_plain_parameters(self) and has_plain_parameters(self.out_proj)
        return None if is_here else "has weights that are sharded, offloaded or quantised"

    def forward(
        self, query, key, value, key_padding_mask=None, need_weights=True, attn_mask=None, average_attn_weights=True,
        is_causal=False,
    ):  # fmt: skip
        layout = key_padding_mask if isinstance(key_padding_mask, Layout) else None
        is_other = need_weights or attn_mask is not None or is_causal
        if layout is None and query is key and key is value and not (is_other or self.misfit()) and _takes(query):
            layout = _layout(query, key_padding_mask, self.batch_first)
        if layout is None:
            return super().forward(
                query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
            )
        options = dropout_arguments(self.dropout if self.training else 0.0, query.device)
        rows, weight, bias = layout.pack(query), self.in_proj_weight, self.in_proj_bias
        if layout is key_padding_mask or len(rows) == math.prod(layout.shape):
            qkv = ops.linear(rows, weight, bias).view(len(rows), 3, self.num_heads, -1)
            out = ops.attention(qkv, None, None, layout.cu_seqlens, layout.max_seqlen, **options)
        else:
            # the caller may read padding rows, so these are query rows too
            tokens, layout = layout, _layout(query, None, self.batch_first)
            (weight_q, weight_kv), (bias_q, bias_kv) = (
                (None, None) if x is None else x.tensor_split([self.embed_dim]) for x in (weight, bias)
            )
            q = ops.linear(layout.pack(query), weight_q, bias_q).unflatten(1, (self.num_heads, -1))
            kv = ops.linear(rows, weight_kv, bias_kv).view(len(rows), 2, self.num_heads, -1)
            out = ops.attention(
                q, kv, None, tokens.cu_seqlens, tokens.max_seqlen, cu_seqlens_q=layout.cu_seqlens,
                max_seqlen_q=layout.max_seqlen, **options,
            )  # fmt: skip
        return layout.unpack(ops.linear(out.flatten(1), self.out_proj.weight, self.out_proj.bias)), None


class TransformerEncoderLayer(Replacement):
    """In evaluation too, where torch's fast path computes the exact GELU even if the tanh form was requested."""

    RUNS = {
        "layer_norm": "fused add and norm",
        "gelu": "linear, fused bias and GELU if that is its activation",
        "attention": "outside a stack without padding if unpad=True and no src_mask",
    }
    TAKES_LAYOUT = True

    def forward(self, src, src_mask=None, src_key_padding_mask=None, is_causal=False):
        if isinstance(src_key_padding_mask, Layout):
            return self._block(src, key_padding_mask=src_key_padding_mask)
        # the methods that torch's layer calls
        if vars(self).keys() & {"_sa_block", "_ff_block"} or not _takes(src) or (is_causal and src_mask is None):
            return super().forward(src, src_mask, src_key_padding_mask, is_causal)
        if src_mask is None and self.fastbert_options.unpad is True and not is_watched(self):
            layout = _layout(src, src_key_padding_mask, self.self_attn.batch_first, begins_padded=False)
            if layout is not None:
                rows = layout.pack(src)
                return layout.unpack(self._block(rows, key_padding_mask=layout.without_padding(len(rows))))
        # the form in which torch passes masks on
        padding = F._canonical_mask(
            src_key_padding_mask, "src_key_padding_mask", F._none_or_dtype(src_mask), "src_mask", src.dtype
        )
        mask = F._canonical_mask(src_mask, "src_mask", None, "", src.dtype, check_other=False)
        return self._block(src, attn_mask=mask, key_padding_mask=padding, is_causal=is_causal)

    def _block(self, x, **masks):
        def attended(x):
            return self.self_attn(x, x, x, need_weights=False, **masks)[0]

        if self.norm_first:
            x = x + self.dropout1(attended(self.norm1(x)))
            return x + self.dropout2(self._feed_forward(self.norm2(x)))
        x = self._add_norm(self.norm1, self.dropout1, attended(x), x)
        return self._add_norm(self.norm2, self.dropout2, self._feed_forward(x), x)

    def _add_norm(self, norm, dropout, x, residual):
        """norm(residual + dropout(x)), in one pass where the modules allow it."""
        if self.fastbert_options.layer_norm:
            return layer_norm(norm, x, residual, dropout)
        return norm(residual + dropout(x))

    def _feed_forward(self, x):
        if self.fastbert_options.gelu:
            y = linear_gelu(self.linear1, self.activation, x)
        else:
            y = self.activation(linear(self.linear1, x))
        return linear(self.linear2, self.dropout(y))


class TransformerEncoder(Replacement):
    RUNS = {"attention": "runs unpadded"}

    def forward(self, src, mask=None, src_key_padding_mask=None, is_causal=None):
        layout, unpads = None, self.fastbert_options.unpad
        if mask is None and not is_causal and _takes(src):
            places = src.numel() // src.shape[-1]
            orders = {layer.self_attn.batch_first for layer in self.layers}
            is_slower = not ops.pays(src, 0 if unpads else places, places, src.shape[-1])
            if len(orders) == 1 and not is_slower:
                layout = _layout(src, src_key_padding_mask, *orders, begins_padded=False)
                tokens = places if layout is None or layout.indices is None or not unpads else len(layout.indices)
                is_slower = layout is not None and not ops.pays(src, tokens, places, src.shape[-1])
            if is_slower:
                with plain_modules():
                    return super().forward(src, mask, src_key_padding_mask, is_causal)
            if layout is not None and is_watched(self):
                layout = None
        if layout is None:
            return super().forward(src, mask, src_key_padding_mask, is_causal)
        x = layout.pack(src) if unpads else src
        inner = layout.without_padding(len(x)) if unpads else layout
        for layer in self.layers:
            x = layer(x, src_key_padding_mask=inner)
        if self.norm is not None:
            x = self.norm(x)
        return layout.unpack(x if unpads else layout.pack(x))


class TransformerDecoder(Replacement):
    """And nn.TransformerDecoderLayer."""

    RUNS = {"attention": ""}

    @staticmethod
    def refuses(module):
        return "a decoder's attention is causal, or reads another model"


class CrossEntropyLoss(Replacement):
    """Without any label the mean and all gradients are 0; torch's are NaN."""

    RUNS = {"loss": "0 instead of NaN when no row has a label"}

    def forward(self, input, target):
        loss = super().forward(input, target)
        # a floating-point target holds probabilities
        if self.reduction != "mean" or target.is_floating_point() or type(loss) is not torch.Tensor:
            return loss
        # does not wait for the device
        return loss.masked_fill((target == self.ignore_index).all(), 0.0)


# full name of torch's class -> what takes its place
TABLE = {
    f"{cls.__module__}.{cls.__qualname__}": replacement
    for cls, replacement in {
        nn.LayerNorm: LayerNorm,
        nn.GELU: GELU,
        nn.MultiheadAttention: MultiheadAttention,
        nn.TransformerEncoderLayer: TransformerEncoderLayer,
        nn.TransformerEncoder: TransformerEncoder,
        nn.TransformerDecoderLayer: TransformerDecoder,
        nn.TransformerDecoder: TransformerDecoder,
        nn.CrossEntropyLoss: CrossEntropyLoss,
    }.items()
}
