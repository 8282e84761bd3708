"""The kinds of attention, one class each: they project, call their op, and project back.

Letters: T packed tokens, D hidden size, H heads, K head size, M query rows.
"""

import math

import torch
from torch import nn

from .. import ops, reference
from .layers import Norm, dropped, longest_of


def project(x, *linears):
    """x through linear layers side by side."""
    # stored apart, as in every checkpoint; joining them costs D * D, the multiplication T times as much
    return ops.linears(x, [linear.weight for linear in linears], [linear.bias for linear in linears])


def project_back(output, out, query_rows=None):
    """Attention's [T, H, K] through the linear layer `output`; of the query rows only, if given."""
    out = out.flatten(1)
    return ops.linear(out if query_rows is None else out[query_rows], output.weight, output.bias)


class SelfAttention(nn.Module):
    """Queries, keys and values in one matrix multiplication, attention, and the output projection."""

    def __init__(self, config, i):
        super().__init__()
        self.config = config
        D = config.hidden_size
        self.query, self.key, self.value, self.output = (nn.Linear(D, D) for _ in range(4))

    def forward(self, x, layout, dropout):
        """x [T, D] -> [T, D], or [M, D] of the query rows."""
        H, K = self.config.num_attention_heads, self.config.head_size
        if layout.query_rows is None:
            q, k = project(x, self.query, self.key, self.value).view(-1, 3, H, K), None
        else:
            q = ops.linear(x[layout.query_rows], self.query.weight, self.query.bias).view(-1, H, K)
            k = project(x, self.key, self.value).view(-1, 2, H, K)
        out = ops.attention(
            q, k, None, layout.cu_seqlens, layout.max_seqlen, cu_seqlens_q=layout.cu_seqlens_q,
            max_seqlen_q=layout.max_seqlen_q, **dropout.next(self.config.attention_probs_dropout_prob),
        )  # fmt: skip
        return project_back(self.output, out)


class RotaryAttention(nn.Module):
    """The same with rotary positions (Su et al. 2021), and in some of ModernBERT's layers a window."""

    def __init__(self, config, i):
        super().__init__()
        self.config = config
        self.window, self.theta = config.windows[i], config.rope_thetas[i]
        D, bias = config.hidden_size, config.attention_bias
        self.qkv = nn.Linear(D, 3 * D, bias=bias)
        self.output = nn.Linear(D, D, bias=bias)

    def forward(self, x, layout, dropout):
        """x [T, D] -> [T, D], or [M, D] of the query rows."""
        H, K = self.config.num_attention_heads, self.config.head_size
        qkv = ops.linear(x, self.qkv.weight, self.qkv.bias).view(-1, 3, H, K)
        q, k = self._rotated(qkv[:, :2], layout).unbind(1)
        options = dict(window=self.window, **dropout.next(self.config.attention_probs_dropout_prob))
        if self.window is None and layout.query_rows is not None:
            out = ops.attention(
                q[layout.query_rows], k, qkv[:, 2], layout.cu_seqlens, layout.max_seqlen,
                cu_seqlens_q=layout.cu_seqlens_q, max_seqlen_q=layout.max_seqlen_q, **options,
            )  # fmt: skip
            return project_back(self.output, out)
        # a window counts a sequence's rows or columns from the first, so all rows need a query
        if self.window is None or layout.columns is None:
            out = ops.attention(q, k, qkv[:, 2], layout.cu_seqlens, layout.max_seqlen, **options)
        else:
            out = reference.attention_by_columns(q, k, qkv[:, 2], layout.cu_seqlens, layout.columns, **options)
        return project_back(self.output, out, layout.query_rows)

    def rotation(self, x, layout):
        """(cosines, sines), each [T, 1, 1, K / 2], of the dtype and on the device of x."""
        if self.theta not in layout.rotations:
            K = self.config.head_size
            frequencies = 1.0 / (self.theta ** (torch.arange(0, K, 2, dtype=torch.float32, device=x.device) / K))
            angle = layout.position_ids[:, None].float() * (frequencies / self.config.rope_factor)
            layout.rotations[self.theta] = tuple(f(angle).to(x.dtype)[:, None, None, :] for f in (torch.cos, torch.sin))
        return layout.rotations[self.theta]

    def _rotated(self, x, layout):
        """x [T, 2, H, K]; the two halves of a head are the coordinates that are rotated."""
        cos, sin = self.rotation(x, layout)
        a, b = x.float().chunk(2, -1)
        return torch.cat((a * cos - b * sin, b * cos + a * sin), -1).to(x.dtype)


class DistanceBias(nn.Module):
    """MPNet's bias for each head and bucket of distances, one table for all layers (Raffel et al. 2020)."""

    # from here on all distances share a bucket
    FURTHEST = 128

    def __init__(self, config):
        super().__init__()
        self.table = nn.Embedding(config.distance_buckets, config.num_attention_heads)

    def forward(self, layout):
        """[2 * span, H], span = layout.max_seqlen: row span + i - j is for a query at i and a key at j."""
        span = longest_of(layout)
        distance = torch.arange(-span, span, device=self.table.weight.device)
        # not a lookup: the gradient of a product is summed in a fixed order on every device
        one_hot = nn.functional.one_hot(self.bucket(distance), self.table.num_embeddings)
        return one_hot.to(self.table.weight) @ self.table.weight

    def bucket(self, distance):
        """The row of the table for int64 distances: half for keys before, half for keys after; one row each for the
        nearest, then ever wider buckets."""
        half = self.table.num_embeddings // 2
        exact = half // 2
        far = distance.abs().clamp(min=1).float() / exact
        wide = exact + (torch.log(far) / math.log(self.FURTHEST / exact) * (half - exact)).long()
        return torch.where(distance.abs() < exact, distance.abs(), wide.clamp(max=half - 1)) + half * (distance < 0)


class BiasedAttention(SelfAttention):
    """MPNet's attention, with the same bias for each distance in all layers."""

    def forward(self, x, layout, dropout):
        """x [T, D] -> [T, D], or [M, D] of the query rows."""
        config = self.config
        qkv = project(x, self.query, self.key, self.value).view(-1, 3, config.num_attention_heads, config.head_size)
        options = dropout.next(config.attention_probs_dropout_prob)
        relative = layout.relative
        if layout.columns is None:
            out = ops.biased_attention(qkv, None, None, relative, layout.cu_seqlens, layout.max_seqlen, **options)
        else:
            out = reference.attention_by_columns(
                *qkv.unbind(1), layout.cu_seqlens, layout.columns, **options,
                position_scores=lambda q, k, distance: relative[distance + len(relative) // 2].permute(2, 0, 1).to(q),
            )  # fmt: skip
        return project_back(self.output, out, layout.query_rows)


class RelativePositions(nn.Module):
    """DeBERTa's embeddings of relative positions, one table for all layers."""

    def __init__(self, config):
        super().__init__()
        span = config.position_buckets or config.max_relative_positions
        self.buckets, self.furthest = config.position_buckets, config.max_relative_positions
        self.table = nn.Embedding(2 * span, config.hidden_size)
        self.norm = Norm(config) if config.norm_rel_ebd else None

    def forward(self, layout):
        """(rows [2 * span, D], position_buckets, max_relative_positions): see `reference.disentangled_attention`.

        Where the distances of a batch all have a row of their own, only those rows in the middle of the table, and no
        buckets.
        """
        table, buckets, furthest = self.table.weight, self.buckets, self.furthest
        span, longest = len(table) // 2, longest_of(layout)
        # in steps of 64: torch.compile compiles anew for each number of rows
        rows = -(-longest // 64) * 64
        if longest <= (buckets // 2 + 1 if buckets else span) and rows < span:
            table, buckets, furthest = table[span - rows : span + rows], 0, rows
        return table if self.norm is None else self.norm(table), buckets, furthest


class DisentangledAttention(SelfAttention):
    """DeBERTa v2's and v3's attention to content and to relative positions (He et al. 2021)."""

    def __init__(self, config, i):
        super().__init__(config, i)
        D = config.hidden_size
        own = () if config.share_att_key else config.pos_att_type
        self.pos_key = nn.Linear(D, D) if "c2p" in own else None
        self.pos_query = nn.Linear(D, D) if "p2c" in own else None

    def forward(self, x, layout, dropout, query_states=None):
        """x [T, D] -> [T, D], or [M, D] of the query rows.

        query_states: [T, D] or [M, D], from which the queries are projected in place of x, for MaskDecoder.
        """
        H, K = self.config.num_attention_heads, self.config.head_size
        if query_states is None:
            q, k, v = project(x, self.query, self.key, self.value).view(-1, 3, H, K), None, None
        else:
            q = ops.linear(query_states, self.query.weight, self.query.bias).view(-1, H, K)
            q = self._at_all_rows(q, layout, len(x))
            k, v = project(x, self.key, self.value).view(-1, 2, H, K).unbind(1)
        return self._attend(q, k, v, *self.position_projections(), layout, dropout)

    def position_projections(self):
        """The linear layers that make keys and queries of the relative positions; None for a term that is left out."""
        shares, terms = self.config.share_att_key, self.config.pos_att_type
        pairs = ("c2p", self.key if shares else self.pos_key), ("p2c", self.query if shares else self.pos_query)
        return [linear if term in terms else None for term, linear in pairs]

    @staticmethod
    def _at_all_rows(q, layout, T):
        """q [M, H, K] of the query rows as [T, H, K]; what the other rows hold is not used."""
        if layout.query_rows is None:
            return q
        rows = torch.searchsorted(layout.query_rows, torch.arange(T, device=q.device))
        return nn.functional.pad(q, (0, 0, 0, 0, 0, 1))[rows]

    def _attend(self, q, k, v, pos_key, pos_query, layout, dropout):
        config = self.config
        if not config.pos_att_type:
            options = dropout.next(config.attention_probs_dropout_prob)
            out = ops.attention(q, k, v, layout.cu_seqlens, layout.max_seqlen, **options)
            return project_back(self.output, out, layout.query_rows)
        relative, buckets, furthest = layout.relative
        relative = dropped(relative, config.hidden_dropout_prob, dropout)
        positions = [
            linear and ops.linear(relative, linear.weight, linear.bias).view(-1, *q.shape[-2:])
            for linear in (pos_key, pos_query)
        ]
        options = dropout.next(config.attention_probs_dropout_prob)
        if layout.columns is None:
            out = ops.disentangled_attention(
                q, k, v, *positions, layout.cu_seqlens, layout.max_seqlen,
                position_buckets=buckets, max_relative_positions=furthest, **options,
            )  # fmt: skip
        else:
            length = longest_of(layout)
            rows = reference.relative_index(length, buckets, furthest).to(q.device)
            scale = (config.head_size * (1 + len(config.pos_att_type))) ** -0.5
            scores = reference.relative_scores(*positions, lambda distance: rows[distance + length - 1], scale)
            q, k, v = (q, k, v) if k is not None else q.unbind(1)
            out = reference.attention_by_columns(
                q, k, v, layout.cu_seqlens, layout.columns, position_scores=scores, scale=scale, **options
            )
        return project_back(self.output, out, layout.query_rows)


class PackedDisentangledAttention(DisentangledAttention):
    """DeBERTa v1's: one projection, in which each head's query, key and value stand side by side; keys have no bias."""

    def __init__(self, config, i):
        nn.Module.__init__(self)
        self.config = config
        D = config.hidden_size
        self.in_proj = nn.Linear(D, 3 * D, bias=False)
        self.q_bias, self.v_bias = (nn.Parameter(torch.zeros(D)) for _ in range(2))
        self.pos_key = nn.Linear(D, D, bias=False) if "c2p" in config.pos_att_type else None
        self.pos_query = nn.Linear(D, D) if "p2c" in config.pos_att_type else None
        self.output = nn.Linear(D, D)

    def forward(self, x, layout, dropout, query_states=None):
        """As DisentangledAttention.forward."""
        H, K = self.config.num_attention_heads, self.config.head_size
        q_bias, v_bias = self.q_bias.view(H, K), self.v_bias.view(H, K)
        bias = torch.stack((q_bias, torch.zeros_like(q_bias), v_bias), 1)
        if query_states is None:
            q, k, v = ops.linear(x, self.in_proj.weight, bias.flatten()).view(-1, H, 3, K).unbind(2)
        else:
            weight = self.in_proj.weight.view(H, 3, K, -1)
            q = ops.linear(query_states, weight[:, 0].flatten(0, 1), self.q_bias).view(-1, H, K)
            q = self._at_all_rows(q, layout, len(x))
            k, v = ops.linear(x, weight[:, 1:].flatten(0, 2), bias[:, 1:].flatten()).view(-1, H, 2, K).unbind(2)
        return self._attend(q, k, v, self.pos_key, self.pos_query, layout, dropout)


# EncoderConfig.attention -> the class
ATTENTIONS = {
    "softmax": SelfAttention,
    "biased": BiasedAttention,
    "rotary": RotaryAttention,
    "disentangled": DisentangledAttention,
    "packed disentangled": PackedDisentangledAttention,
}
