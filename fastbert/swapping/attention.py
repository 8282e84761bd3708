"""What runs in place of HuggingFace's attention modules, wherever a stack passes them a `Layout` for a mask.

Letters as in `steps.py`.
"""

import torch
from torch import nn

from .. import ops
from ..packing import Layout
from .steps import Replacement, attend, dropout_arguments, is_plain, layer_norm, linear


class Attention(Replacement):
    """Runs only inside a stack that passes it a `Layout`."""

    RUNS = {"attention": "fused attention"}
    TAKES_LAYOUT = True

    @staticmethod
    def yields(args, kwargs):
        return not any(isinstance(x, Layout) for x in (*args, *kwargs.values()))


def _misfit_dropout(module):
    """For attention whose original calls its dropout on the probabilities, which ours does not store."""
    dropout = module.dropout
    return None if is_plain(dropout, nn.Dropout) or type(dropout) is nn.Identity else "has a dropout of its own"


class BertSelfAttention(Attention):
    QUERY, KEY, VALUE, DROPOUT = "query", "key", "value", "dropout"

    @staticmethod
    def refuses(module):
        if getattr(module, "is_decoder", False) or getattr(module, "is_causal", False):
            return "a decoder's attention is causal"
        return None

    def forward(self, hidden_states, attention_mask, *args, **kwargs):
        return self._attended(hidden_states, attention_mask), None

    def _attended(self, hidden_states, layout):
        q, k, v = (linear(getattr(self, name), hidden_states) for name in (self.QUERY, self.KEY, self.VALUE))
        heads = q.shape[-1] // self.attention_head_size
        # the original too reads the probability, and does not call the dropout
        dropout = dropout_arguments(getattr(self, self.DROPOUT).p if self.training else 0.0, q.device)
        # Megatron-BERT's has no such attribute: it divides by the root, as an op does without a scale
        return attend(layout, q, k, v, heads, scale=getattr(self, "scaling", None), **dropout)


class AlbertAttention(BertSelfAttention):
    """With the output projection and the norm."""

    RUNS = {"attention": "fused attention, add and norm"}
    DROPOUT = "attention_dropout"

    def forward(self, hidden_states, attention_mask, *args, **kwargs):
        out = linear(self.dense, self._attended(hidden_states, attention_mask))
        return layer_norm(self.LayerNorm, out, hidden_states, self.output_dropout), None


class DistilBertSelfAttention(BertSelfAttention):
    """With the output projection."""

    QUERY, KEY, VALUE = "q_lin", "k_lin", "v_lin"

    def forward(self, hidden_states, attention_mask, *args, **kwargs):
        return linear(self.out_lin, self._attended(hidden_states, attention_mask)), None


class MPNetSelfAttention(Attention):
    """`position_bias` is the `bias` of `ops.biased_attention`."""

    RUNS = {"attention": "fused attention with a relative position bias"}
    misfit = staticmethod(_misfit_dropout)

    def forward(self, hidden_states, attention_mask, position_bias, *args, **kwargs):
        q, k, v = (linear(module, hidden_states) for module in (self.q, self.k, self.v))

        def op(q, k, v, *sequences, **options):
            return ops.biased_attention(q, k, v, position_bias, *sequences, **options)

        options = dropout_arguments(self.dropout, q.device)
        return (linear(self.o, attend(attention_mask, q, k, v, self.num_attention_heads, op, **options)),)


class DebertaV2DisentangledSelfAttention(Attention):
    RUNS = {"attention": "fused disentangled attention"}
    misfit = staticmethod(_misfit_dropout)

    @staticmethod
    def refuses(module):
        if not module.relative_attention or not set(module.pos_att_type) & {"c2p", "p2c"}:
            return "it has no relative positions"
        if set(module.pos_att_type) - {"c2p", "p2c"}:
            return f"pos_att_type {module.pos_att_type} has more than c2p and p2c"
        return None

    def forward(self, hidden_states, attention_mask, *args, rel_embeddings, **kwargs):
        q, k, v = self._projected(hidden_states)
        relative = self.pos_dropout(rel_embeddings)
        positions = [
            part and linear(part, relative).view(len(relative), self.num_attention_heads, -1)
            for part in self.position_projections()
        ]

        def op(q, k, v, *sequences, **options):
            return ops.disentangled_attention(q, k, v, *positions, *sequences, **options)

        buckets, furthest = self.distances()
        out = attend(
            attention_mask, q, k, v, self.num_attention_heads, op, position_buckets=buckets,
            max_relative_positions=furthest, **dropout_arguments(self.dropout, q.device),
        )  # fmt: skip
        return out, None

    def distances(self):
        """(position_buckets, max_relative_positions) of the op."""
        return max(getattr(self, "position_buckets", 0), 0), self.max_relative_positions

    def _projected(self, hidden_states):
        """Queries, keys and values, [B, S, D] each."""
        return (linear(module, hidden_states) for module in (self.query_proj, self.key_proj, self.value_proj))

    def position_projections(self):
        """The modules that make the keys and the queries of positions; None for a term that is left out."""
        names = ("key_proj", "query_proj") if self.share_att_key else ("pos_key_proj", "pos_query_proj")
        return [getattr(self, name) if term in self.pos_att_type else None for term, name in zip(("c2p", "p2c"), names)]


class DebertaDisentangledSelfAttention(DebertaV2DisentangledSelfAttention):
    """DeBERTa v1's: one projection, in which each head's query, key and value stand side by side."""

    @staticmethod
    def refuses(module):
        return "it has talking heads" if module.talking_head else DebertaV2DisentangledSelfAttention.refuses(module)

    def _projected(self, hidden_states):
        qkv = linear(self.in_proj, hidden_states)
        q, k, v = qkv.view(*qkv.shape[:2], self.num_attention_heads, 3, -1).unbind(3)
        return q.flatten(2) + self.q_bias, k.flatten(2), v.flatten(2) + self.v_bias

    def position_projections(self):
        terms = ("c2p", "pos_proj"), ("p2c", "pos_q_proj")
        return [getattr(self, name) if term in self.pos_att_type else None for term, name in terms]


def _rotated(x, position_embeddings, dtype=torch.float32):
    """x [B, S, H, K] turned by (cos, sin), each [B or 1, S, K], in a dtype."""
    cos, sin = (table[:, :, None] for table in position_embeddings)
    turning = x.to(dtype)
    a, b = turning.chunk(2, -1)
    return (turning * cos + torch.cat((-b, a), -1) * sin).to(x.dtype)


class GteAttention(Attention):
    """With rotary positions. A `Layout` comes under its own name, beside a mask that says nothing."""

    RUNS = {"attention": "fused attention, rotary"}

    def forward(self, hidden_states, position_embeddings=None, layout=None, **kwargs):
        q, k, v = (
            linear(getattr(self, name), hidden_states).view(*hidden_states.shape[:2], -1, self.head_dim)
            for name in ("q_proj", "k_proj", "v_proj")
        )
        # ModernBERT's original takes fp32 for every model, these take the model's own
        dtype = torch.promote_types(q.dtype, torch.float32)
        q, k = (_rotated(x, position_embeddings, dtype) for x in (q, k))
        dropout = dropout_arguments(self.attention_dropout if self.training else 0.0, q.device)
        out = attend(layout, q, k, v, q.shape[2], scale=self.scaling, **dropout)
        return linear(self.o_proj, out), None


class EsmSelfAttention(BertSelfAttention):
    """With rotary positions, or those of a table."""

    def forward(self, hidden_states, attention_mask, *args, position_embeddings=None, **kwargs):
        K = self.attention_head_size
        q, k, v = (
            linear(module, hidden_states).view(*hidden_states.shape[:2], -1, K)
            for module in (self.query, self.key, self.value)
        )
        if self.position_embedding_type == "rotary":
            q, k = (_rotated(x, position_embeddings) for x in (q, k))
        dropout = dropout_arguments(self.dropout if self.training else 0.0, q.device)
        # the original scales the queries before they turn
        return attend(attention_mask, q, k, v, q.shape[2], scale=K**-0.5, **dropout), None


class ModernBertAttention(Attention):
    """With rotary positions; in some layers within a window."""

    RUNS = {"attention": "fused attention, rotary"}

    def forward(self, hidden_states, position_embeddings=None, attention_mask=None, **kwargs):
        B, S, D = hidden_states.shape
        qkv = linear(self.Wqkv, hidden_states).view(B, S, 3, -1, self.head_dim)
        q, k = _rotated(qkv[:, :, :2].flatten(2, 3), position_embeddings).chunk(2, 2)
        options = dropout_arguments(self.attention_dropout if self.training else 0.0, q.device)
        window = window_of(self)
        out = attend(
            attention_mask, q, k, qkv[:, :, 2], D // self.head_dim, scale=self.head_dim**-0.5, window=window, **options
        )
        return self.out_drop(linear(self.Wo, out)), None


def window_of(attention):
    """How many tokens one sees to each side in ModernBERT's attention; None: all."""
    # their window leaves out its last token, to suit flash-attention
    return None if attention.sliding_window is None else attention.sliding_window - 1
