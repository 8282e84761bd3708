"""The layers of a swapped stack for inference on a CPU, as `ops.prepare` has them.

Only where all that is inside a layer is its library's own code. Whether a hook or a module of one's own is there is
found before, by `tokenwise.is_watched`.
"""

from torch import nn

from .. import ops
from .attention import BertSelfAttention, DistilBertSelfAttention
from .steps import eps_of, gelu_form, is_plain


def _bert(layer):
    """(the modules that call others, the layer's attention first; its dropouts, its activation, its ops.PostNorm)."""
    inner, attended, output = layer.attention.self, layer.attention.output, layer.output
    parts = ops.PostNorm(
        inner.query, inner.key, inner.value, attended.dense, attended.LayerNorm,
        layer.intermediate.dense, output.dense, output.LayerNorm,
    )  # fmt: skip
    callers = inner, layer, layer.attention, attended, layer.intermediate, output
    return callers, (attended.dropout, output.dropout), layer.intermediate.intermediate_act_fn, parts


def _distilbert(layer):
    inner, ffn = layer.attention, layer.ffn
    parts = ops.PostNorm(
        inner.q_lin, inner.k_lin, inner.v_lin, inner.out_lin, layer.sa_layer_norm,
        ffn.lin1, ffn.lin2, layer.output_layer_norm,
    )  # fmt: skip
    return (inner, layer, ffn), (ffn.dropout,), ffn.activation, parts


# what replaced the attention -> how to find the rest, and where the attention is
_PARTS = {BertSelfAttention: _bert, DistilBertSelfAttention: _distilbert}


def prepared(stack):
    """The layers of a stack, each a function as `ops.prepare` returns it; None where one must run module by module."""
    options, layers = stack.fastbert_options, []
    if not (options.layer_norm and options.gelu):
        return None
    for layer in getattr(stack, "layer", ()):
        found = _prepared(layer)
        if found is None:
            return None
        layers.append(found)
    return layers or None


def _prepared(layer):
    attention = getattr(layer, "attention", None)
    replacement = getattr(type(getattr(attention, "self", attention)), "replacement", None)
    if replacement not in _PARTS:
        return None
    callers, dropouts, activation, parts = _PARTS[replacement](layer)
    # a library's hook may prepare the weights
    if any("forward" in vars(x) or x._forward_hooks or x._forward_pre_hooks for x in callers):
        return None
    inner = callers[0]
    drops = inner.training or any(x.training and getattr(x, "p", 0.0) for x in dropouts)
    linears = (part for part in parts if part not in (parts.attention_norm, parts.norm))
    if drops or not all(is_plain(linear, nn.Linear) for linear in linears):
        return None
    approximate = gelu_form(activation)
    if approximate is None or eps_of(parts.attention_norm) is None or eps_of(parts.norm) is None:
        return None
    heads = parts.query.out_features // inner.attention_head_size
    return ops.prepare(layer, parts, heads, inner.scaling, approximate)
