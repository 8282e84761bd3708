"""The layers of a swapped stack for inference on a CPU, as `ops.prepare` has them.

Only where all that is inside a layer is its library's own code. Whether a hook or a module of one's own is there is
found before, by `tokenwise.is_watched`.
"""

from torch import nn

from .. import ops
from .attention import (
    AlbertAttention,
    BertSelfAttention,
    DebertaV2DisentangledSelfAttention,
    DistilBertSelfAttention,
    ModernBertAttention,
    MPNetSelfAttention,
    window_of,
)
from .steps import eps_of, from_file_of, gelu_form, is_plain


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


def _albert(layer):
    inner = layer.attention
    parts = ops.PostNorm(
        inner.query, inner.key, inner.value, inner.dense, inner.LayerNorm,
        layer.ffn, layer.ffn_output, layer.full_layer_layer_norm,
    )  # fmt: skip
    return (inner, layer), (inner.output_dropout,), layer.activation, parts


def _deberta(layer):
    inner, attended, output = layer.attention.self, layer.attention.output, layer.output
    parts = ops.PostNorm(
        inner.query_proj, inner.key_proj, inner.value_proj, attended.dense, attended.LayerNorm,
        layer.intermediate.dense, output.dense, output.LayerNorm, *inner.position_projections(),
    )  # fmt: skip
    callers = inner, layer, layer.attention, attended, layer.intermediate, output
    dropouts = inner.dropout, inner.pos_dropout, attended.dropout, output.dropout
    return callers, dropouts, layer.intermediate.intermediate_act_fn, parts


def _mpnet(layer):
    attended, output = layer.attention, layer.output
    inner = attended.attn
    parts = ops.PostNorm(
        inner.q, inner.k, inner.v, inner.o, attended.LayerNorm, layer.intermediate.dense, output.dense, output.LayerNorm
    )
    callers, dropouts = (inner, layer, attended, layer.intermediate, output), (attended.dropout, output.dropout)
    return callers, (inner.dropout, *dropouts), layer.intermediate.intermediate_act_fn, parts


def _modernbert(layer):
    inner, mlp, norm = layer.attn, layer.mlp, layer.attn_norm
    # the first layer has an Identity
    norm = None if is_plain(norm, nn.Identity) else norm
    parts = ops.PreNorm(norm, inner.Wqkv, inner.Wo, layer.mlp_norm, mlp.Wi, mlp.Wo)
    return (inner, layer, mlp), (inner.out_drop, mlp.drop), mlp.act, parts


# what replaced the attention -> how to find the rest, and where the attention is
_PARTS = {
    AlbertAttention: _albert,
    BertSelfAttention: _bert,
    DebertaV2DisentangledSelfAttention: _deberta,
    DistilBertSelfAttention: _distilbert,
    ModernBertAttention: _modernbert,
    MPNetSelfAttention: _mpnet,
}


def prepared(stack, x):
    """The layers of a stack for rows like x, each as `ops.prepare` has it; None where one must run module by module."""
    options, layers = stack.fastbert_options, []
    if not (options.layer_norm and options.gelu):
        return None
    for layer in getattr(stack, "layer", ()) or getattr(stack, "layers", ()) or _alberts(stack):
        found = layer and ops.prepare(layer, x, _found)
        if found is None:
            return None
        layers.append(found)
    return layers or None


def _alberts(stack):
    """The layers of an ALBERT stack as often as they run; None for those of a group that must be called."""
    groups = getattr(stack, "albert_layer_groups", ())
    n = stack.config.num_hidden_layers if groups else 0
    for i in range(n):
        group = groups[int(i / (n / len(groups)))]
        yield from (None if _is_called(group) else layer for layer in group.albert_layers)


def _is_called(module):
    """Whether a module must be called: a library's hook may prepare the weights."""
    return "forward" in vars(module) or module._forward_hooks or module._forward_pre_hooks


def _found(layer):
    """What `ops.prepare` asks for."""
    attention = getattr(layer, "attention", None) or getattr(layer, "attn", None)
    inner = getattr(attention, "self", getattr(attention, "attn", attention))
    replacement = getattr(type(inner), "replacement", None)
    if replacement not in _PARTS:
        return None
    callers, dropouts, activation, parts = _PARTS[replacement](layer)
    if any(map(_is_called, callers)):
        return None
    inner = callers[0]
    drops = inner.training or any(x.training and getattr(x, "p", 0.0) for x in dropouts)
    norms = parts.attention_norm, parts.norm
    if drops or not all(is_plain(part, nn.Linear) for part in parts if part is not None and part not in norms):
        return None
    approximate = gelu_form(activation)
    if approximate is None or any(norm is not None and eps_of(norm) is None for norm in norms):
        return None
    if isinstance(parts, ops.PreNorm):
        return parts, inner.Wo.in_features // inner.head_dim, approximate, None, window_of(inner)
    heads = parts.query.out_features // inner.attention_head_size
    return parts, heads, approximate, getattr(inner, "scaling", None)


def run_modernbert(model, layers, inputs, position_ids, layout):
    """The output of a ModernBERT whose layers `prepared` has made. inputs: those of its embeddings."""
    x, rotations = model.embeddings(**inputs), {}
    for kind in set(model.config.layer_types):
        # the two halves are the same
        tables = (table[0].chunk(2, -1)[0] for table in model.rotary_emb(x, position_ids, kind))
        rotations[kind] = tuple(table[:, None, None] for table in tables)
    x = x[0]
    for layer, own in zip(layers, model.layers):
        x = layer(x, layout.cu_seqlens, layout.max_seqlen, rotation=rotations[own.attention_type])
    return from_file_of(model, "BaseModelOutput")(last_hidden_state=model.final_norm(x)[None])
