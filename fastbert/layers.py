"""The modules that own an encoder's parameters. Each is linear layers around one fused op.

Letters: T packed tokens, D hidden size, F feed-forward size, H heads, K head size, M rows of T.
"""

import torch
from torch import nn

from . import ops


class Embeddings(nn.Module):
    """Token, position and segment tables, summed, normalised, dropped out; narrower tables are projected to D."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        D, width = config.hidden_size, config.embedding_width
        self.word = nn.Embedding(config.vocab_size, width, padding_idx=config.pad_token_id)
        self.position = nn.Embedding(config.max_position_embeddings, width)
        self.token_type = nn.Embedding(config.type_vocab_size, width) if config.type_vocab_size else None
        self.norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.project = nn.Linear(width, D) if config.embedding_size is not None else None

    def forward(self, batch, dropout):
        token_type_ids, token_type = None, None
        if self.token_type is not None:
            token_type_ids, token_type = batch.token_type_ids, self.token_type.weight
        position_ids = batch.position_ids
        if self.config.position_offset:
            position_ids = position_ids + self.config.position_offset
        x = ops.embedding(
            batch.input_ids, position_ids, token_type_ids,
            self.word.weight, self.position.weight, token_type, self.norm.weight, self.norm.bias,
            padding_idx=self.config.pad_token_id, eps=self.norm.eps, **dropout(self.config.hidden_dropout_prob),
        )  # fmt: skip
        return x if self.project is None else ops.linear(x, self.project.weight, self.project.bias)


class SelfAttention(nn.Module):
    """Queries, keys and values in one product, attention over each sequence, and the output projection."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        D = config.hidden_size
        self.query, self.key, self.value, self.output = (nn.Linear(D, D) for _ in range(4))

    def forward(self, x, layout, dropout):
        """x [T, D] -> [T, D], or [M, D] when the layout asks for some rows only."""
        H, K = self.config.num_attention_heads, self.config.head_size
        if layout.rows is None:
            q, k = self._project(x, self.query, self.key, self.value).view(-1, 3, H, K), None
        else:
            q = self._project(x[layout.rows], self.query).view(-1, H, K)
            k = self._project(x, self.key, self.value).view(-1, 2, H, K)
        out = ops.attention(
            q, k, None, layout.cu_seqlens, layout.max_seqlen, cu_seqlens_q=layout.cu_seqlens_q,
            max_seqlen_q=layout.max_seqlen_q, **dropout(self.config.attention_probs_dropout_prob),
        )  # fmt: skip
        return ops.linear(out.flatten(1), self.output.weight, self.output.bias)

    @staticmethod
    def _project(x, *linears):
        # the parameters stay apart, as every checkpoint has them; joining them costs D * D, the product T times that
        if len(linears) == 1:
            return ops.linear(x, linears[0].weight, linears[0].bias)
        weight = torch.cat([linear.weight for linear in linears])
        return ops.linear(x, weight, torch.cat([linear.bias for linear in linears]))


class FeedForward(nn.Module):
    """Up to F, GELU, down to D. The first bias is added inside the GELU's kernel."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.up = nn.Linear(config.hidden_size, config.intermediate_size)
        self.down = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x):
        x = ops.bias_gelu(ops.linear(x, self.up.weight), self.up.bias, approximate=self.config.approximate)
        return ops.linear(x, self.down.weight, self.down.bias)


class AddNorm(nn.LayerNorm):
    """LayerNorm(dropout(x) + residual)."""

    def __init__(self, config):
        super().__init__(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout_p = config.hidden_dropout_prob

    def forward(self, x, residual, dropout):
        return ops.layer_norm(x, self.weight, self.bias, residual=residual, eps=self.eps, **dropout(self.dropout_p))


class VocabularyTransform(nn.Module):
    """What the masked-LM head does before the tied projection: linear, GELU, LayerNorm."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.dense = nn.Linear(config.hidden_size, config.embedding_width)
        self.norm = nn.LayerNorm(config.embedding_width, eps=config.layer_norm_eps)

    def forward(self, x):
        return ops.gelu_layer_norm(
            ops.linear(x, self.dense.weight), self.dense.bias, self.norm.weight, self.norm.bias,
            approximate=self.config.head_approximate, eps=self.norm.eps,
        )  # fmt: skip
