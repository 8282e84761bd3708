"""What runs in place of HuggingFace's attention modules.

Letters as in `steps.py`.
"""

import functools

import torch

from .. import ops
from ..packing import Packed
from .steps import Replacement, _rows, attend, dropping, fresh_seed, layer_norm, linear


class SelfAttention(Replacement):
    """BERT's, and what its copies call the same."""

    PARTS = ("attention",)
    WHAT = "fused attention"
    QUERY, KEY, VALUE = "query", "key", "value"

    @staticmethod
    def refuses(module):
        if getattr(module, "is_decoder", False) or getattr(module, "is_causal", False):
            return "a decoder's attention is causal"
        return None

    def forward(self, hidden_states, attention_mask=None, *args, **kwargs):
        if not isinstance(attention_mask, Packed):
            return super().forward(hidden_states, attention_mask, *args, **kwargs)
        return self._attended(hidden_states, attention_mask), None

    def _attended(self, hidden_states, packed):
        q, k, v = (_rows(linear(getattr(self, name), hidden_states)) for name in (self.QUERY, self.KEY, self.VALUE))
        heads = q.shape[-1] // self.attention_head_size
        out = attend(packed, q, k, v, heads, scale=self.scaling, **dropping(self._dropout(), q.device))
        return out.view(*hidden_states.shape[:-1], -1)

    def _dropout(self):
        return self.dropout


class AlbertAttention(SelfAttention):
    """The same with the output projection and the norm behind it."""

    WHAT = "fused attention, add and norm"

    def forward(self, hidden_states, attention_mask=None, *args, **kwargs):
        if not isinstance(attention_mask, Packed):
            return super().forward(hidden_states, attention_mask, *args, **kwargs)
        out = linear(self.dense, self._attended(hidden_states, attention_mask))
        return layer_norm(self.LayerNorm, out, hidden_states, self.output_dropout), None

    def _dropout(self):
        return self.attention_dropout


class DistilBertAttention(SelfAttention):
    QUERY, KEY, VALUE = "q_lin", "k_lin", "v_lin"

    def forward(self, hidden_states, attention_mask=None, *args, **kwargs):
        if not isinstance(attention_mask, Packed):
            return super().forward(hidden_states, attention_mask, *args, **kwargs)
        return linear(self.out_lin, self._attended(hidden_states, attention_mask)), None


class MPNetAttention(Replacement):
    """With a number for each distance: `position_bias` is then the `bias` of `ops.biased_attention`."""

    PARTS = ("attention",)
    WHAT = "fused attention with distances"

    def forward(self, hidden_states, attention_mask=None, position_bias=None, *args, **kwargs):
        if not isinstance(attention_mask, Packed):
            return super().forward(hidden_states, attention_mask, position_bias, *args, **kwargs)
        q, k, v = (_rows(linear(module, hidden_states)) for module in (self.q, self.k, self.v))
        op = functools.partial(_biased, bias=position_bias)
        out = attend(attention_mask, q, k, v, self.num_attention_heads, op, **dropping(self.dropout, q.device))
        return (linear(self.o, out.view(*hidden_states.shape[:-1], -1)),)


def _biased(q, k, v, cu_seqlens, max_seqlen, *, bias, **options):
    return ops.biased_attention(q, k, v, bias, cu_seqlens, max_seqlen, **options)


def _disentangled(q, k, v, cu_seqlens, max_seqlen, *, positions, **options):
    return ops.disentangled_attention(q, k, v, *positions, cu_seqlens, max_seqlen, **options)


class DebertaV2Attention(Replacement):
    PARTS = ("attention",)
    WHAT = "fused disentangled attention"

    @staticmethod
    def refuses(module):
        if not module.relative_attention or not set(module.pos_att_type) & {"c2p", "p2c"}:
            return "it has no relative positions"
        if set(module.pos_att_type) - {"c2p", "p2c"}:
            return f"pos_att_type {module.pos_att_type} has more than c2p and p2c"
        return None

    def forward(
        self, hidden_states, attention_mask, output_attentions=False, query_states=None, relative_pos=None,
        rel_embeddings=None,
    ):  # fmt: skip
        if not isinstance(attention_mask, Packed):
            return super().forward(
                hidden_states, attention_mask, output_attentions, query_states, relative_pos, rel_embeddings
            )
        q, k, v = self._projected(hidden_states)
        relative = self.pos_dropout(rel_embeddings)
        positions = [
            linear(getattr(self, name), relative).view(len(relative), self.num_attention_heads, -1)
            if term in self.pos_att_type
            else None
            for term, name in zip(("c2p", "p2c"), self._position_projections())
        ]
        out = attend(
            attention_mask, q, k, v, self.num_attention_heads, functools.partial(_disentangled, positions=positions),
            position_buckets=max(getattr(self, "position_buckets", 0), 0),
            max_relative_positions=self.max_relative_positions, **dropping(self.dropout, q.device),
        )  # fmt: skip
        return out.view_as(hidden_states), None

    def _projected(self, hidden_states):
        """Queries, keys and values, [N, D] each."""
        return (_rows(linear(module, hidden_states)) for module in (self.query_proj, self.key_proj, self.value_proj))

    def _position_projections(self):
        """Which module makes the keys of positions, which the queries."""
        return ("key_proj", "query_proj") if self.share_att_key else ("pos_key_proj", "pos_query_proj")


class DebertaAttention(DebertaV2Attention):
    """DeBERTa v1's: each head's query, key and value stand side by side in one projection."""

    @staticmethod
    def refuses(module):
        return "it has talking heads" if module.talking_head else DebertaV2Attention.refuses(module)

    def _projected(self, hidden_states):
        qkv = linear(self.in_proj, hidden_states)
        q, k, v = qkv.view(hidden_states.shape[:2].numel(), self.num_attention_heads, 3, -1).unbind(2)
        return q.flatten(1) + self.q_bias, k.flatten(1), v.flatten(1) + self.v_bias

    def _position_projections(self):
        return "pos_proj", "pos_q_proj"


class ModernBertAttention(Replacement):
    """With rotary positions, in some layers within a window."""

    PARTS = ("attention",)
    WHAT = "fused attention, rotary"

    def forward(self, hidden_states, position_embeddings=None, attention_mask=None, **kwargs):
        if not isinstance(attention_mask, Packed):
            return super().forward(hidden_states, position_embeddings, attention_mask, **kwargs)
        B, S, D = hidden_states.shape
        qkv = linear(self.Wqkv, hidden_states).view(B, S, 3, -1, self.head_dim)
        cos, sin = (table[:, :, None, None] for table in position_embeddings)
        turning = qkv[:, :, :2].float()
        a, b = turning.chunk(2, -1)
        q, k = (turning * cos + torch.cat((-b, a), -1) * sin).to(qkv.dtype).unbind(2)
        dropout_p = self.attention_dropout if self.training else 0.0
        options = dict(dropout_p=dropout_p, seed=fresh_seed(q.device)) if dropout_p else {}
        # their bound leaves out the last token that the window holds, to suit flash-attention
        window = None if self.sliding_window is None else self.sliding_window - 1
        q, k, v = (t.reshape(B * S, -1) for t in (q, k, qkv[:, :, 2]))
        out = attend(attention_mask, q, k, v, D // self.head_dim, scale=self.head_dim**-0.5, window=window, **options)
        return self.out_drop(linear(self.Wo, out.view(B, S, -1))), None
