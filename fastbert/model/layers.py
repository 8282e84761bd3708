"""The modules of an encoder beside attention: linear layers around one fused op each.

Letters: T packed tokens, D hidden size, F feed-forward size, M query rows.
"""

import torch
from torch import nn

from .. import ops


class Embeddings(nn.Module):
    """Token, position and segment tables: sum, LayerNorm, dropout; narrower tables are projected to D."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        D, width = config.hidden_size, config.embedding_width
        self.word = nn.Embedding(config.vocab_size, width, padding_idx=config.pad_token_id)
        self.position = nn.Embedding(config.max_position_embeddings, width) if config.position_biased_input else None
        self.token_type = nn.Embedding(config.type_vocab_size, width) if config.type_vocab_size else None
        self.task_type = nn.Embedding(config.task_type_vocab_size, width) if config.task_type_vocab_size else None
        self.norm = None
        if config.embedding_norm:
            self.norm = nn.LayerNorm(width, eps=config.layer_norm_eps, bias=config.norm_bias)
        self.project = nn.Linear(width, D) if config.embedding_size is not None else None

    def forward(self, batch, dropout):
        token_type_ids, token_type, position_ids, position = None, None, None, None
        if self.token_type is not None:
            token_type_ids, token_type = batch.token_type_ids, self.token_type.weight
        if self.position is not None:
            position_ids, position = batch.position_ids, self.position.weight
            if self.config.position_offset:
                position_ids = position_ids + self.config.position_offset
        if self.task_type is not None:
            # all tokens have row 0: a constant, which the token types' table can carry
            token_type = token_type + self.task_type.weight[0]
        tables = batch.input_ids, position_ids, token_type_ids, self.word.weight, position, token_type
        padding_idx, dropout_p = self.config.pad_token_id, self.config.hidden_dropout_prob
        if self.norm is None:
            x = dropped(summed(*tables, padding_idx), dropout_p, dropout)
        else:
            x = ops.embedding(
                *tables, self.norm.weight, self.norm.bias, padding_idx=padding_idx, eps=self.norm.eps,
                **dropout.next(dropout_p),
            )  # fmt: skip
        return x if self.project is None else ops.linear(x, self.project.weight, self.project.bias)


def summed(input_ids, position_ids, token_type_ids, word, position, token_type, padding_idx):
    """The sum of `ops.embedding`'s lookups alone, [T, width]."""
    ops.check_ids("input_ids", input_ids, len(word))
    x = nn.functional.embedding(input_ids, word, padding_idx)
    for name, ids, table in (("token_type", token_type_ids, token_type), ("position", position_ids, position)):
        if table is not None:
            ops.check_ids(f"{name}_ids", ids, len(table))
            x = x + nn.functional.embedding(ids, table)
    return x


def longest_of(layout):
    """An int above every distance between two tokens of a sequence."""
    return layout.max_seqlen if layout.columns is None else int(layout.columns.max()) + 1


class MaskDecoder(nn.Module):
    """DeBERTa's enhanced mask decoder (He et al. 2021, section 3.2): absolute positions before the masked-LM head.

    The last layer runs twice, with keys and values from the layer before it. The query states are first the same
    hidden states plus the positions, then the result of the first run. As in microsoft/DeBERTa's
    masked_language_model.py.
    """

    def __init__(self, config):
        super().__init__()
        self.position = nn.Embedding(config.max_position_embeddings, config.hidden_size)

    def forward(self, block, x, layout, dropout):
        """block: the last; x [T, D] -> [T, D], or [M, D] of the query rows."""
        dropout = dropout.copy()
        rows = slice(None) if layout.query_rows is None else layout.query_rows
        query_states = x[rows] + self.position(layout.position_ids[rows]).to(x.dtype)
        for _ in range(2):
            attended = block.attention(x, layout, dropout, query_states)
            query_states = block.after_attention(attended, query_states, dropout)
        return query_states


class Convolution(nn.Module):
    """After the first layer of DeBERTa v2 xlarge: LayerNorm(x + activation(convolution of the embeddings))."""

    def __init__(self, config):
        super().__init__()
        D, width = config.hidden_size, config.conv_kernel_size
        self.conv = nn.Conv1d(D, D, width, padding=width // 2)
        self.norm = Norm(config)
        self.activation = {"tanh": torch.tanh, "gelu": nn.functional.gelu}[config.conv_act]
        self.dropout_p = config.hidden_dropout_prob

    def forward(self, embeddings, x, layout, dropout):
        """embeddings [T, D]; x [T, D], or [M, D] of the query rows -> as x. No sequence reads another."""
        T, width = len(embeddings), self.conv.kernel_size[0]
        rows = torch.arange(T, device=x.device)
        sequence = torch.searchsorted(layout.cu_seqlens[1:], rows.to(torch.int32), right=True)
        column = rows - layout.cu_seqlens[sequence] if layout.columns is None else layout.columns
        # ascending; two sequences are more than the width apart
        place = sequence * (longest_of(layout) + width) + column
        columns = []
        for shift in range(-(width // 2), width // 2 + 1):
            wanted = (place if layout.query_rows is None else place[layout.query_rows]) + shift
            there = torch.searchsorted(place, wanted).clamp(max=T - 1)
            columns.append(embeddings[there] * (place[there] == wanted)[:, None])
        weight = self.conv.weight.transpose(1, 2).flatten(1)
        y = dropped(ops.linear(torch.cat(columns, 1), weight, self.conv.bias), self.dropout_p, dropout)
        return self.norm(x + self.activation(y))


class FeedForward(nn.Module):
    """Up to F, GELU, down to D. The first bias is added inside the GELU's kernel."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.up = nn.Linear(config.hidden_size, config.intermediate_size)
        self.down = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x, dropout):
        x = ops.linear_gelu(x, self.up.weight, self.up.bias, approximate=self.config.approximate)
        return ops.linear(x, self.down.weight, self.down.bias)


class GatedFeedForward(nn.Module):
    """Up to 2 F; one half goes through the activation and is multiplied with the other; down to D (Shazeer 2020)."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        D, F, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate = nn.Linear(D, F, bias=bias) if config.gate == "apart" else None
        self.up = nn.Linear(D, F if self.gate else 2 * F, bias=bias)
        self.down = nn.Linear(F, D, bias=bias if config.down_bias is None else config.down_bias)

    def forward(self, x, dropout):
        if self.gate is None:
            up = ops.linear(x, self.up.weight, self.up.bias)
        else:
            up = ops.linears(x, [self.gate.weight, self.up.weight], [self.gate.bias, self.up.bias])
        gate = "last" if self.config.gate == "last" else "first"
        # SiLU is the only activation that is no GELU
        activation = {"none": "gelu", "tanh": "gelu_tanh", None: "silu"}[self.config.approximate]
        x = dropped(ops.gated_activation(up, activation=activation, gate=gate), self.config.mlp_dropout, dropout)
        return ops.linear(x, self.down.weight, self.down.bias)


class Norm(nn.LayerNorm):
    """LayerNorm alone."""

    def __init__(self, config):
        super().__init__(config.hidden_size, eps=config.layer_norm_eps, bias=config.norm_bias)

    def forward(self, x):
        # dtype: see AddNorm
        return ops.layer_norm(x, self.weight, self.bias, eps=self.eps, dtype=x.dtype)


def dropped(x, dropout_p, dropout):
    """dropout(x), x [M, D]."""
    options = dropout.next(dropout_p)
    return ops.dropout(x, **options) if options else x


class AddNorm(nn.LayerNorm):
    """LayerNorm(dropout(x) + residual), with dropout if config.dropped_branches has this `branch`."""

    def __init__(self, config, branch):
        super().__init__(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout_p = config.hidden_dropout_prob if branch in config.dropped_branches else 0.0

    def forward(self, x, residual, dropout):
        # dtype: under autocast the op, like torch's, would return fp32, and its readers would move twice the bytes
        return ops.layer_norm(
            x, self.weight, self.bias, residual=residual, eps=self.eps, dtype=x.dtype, **dropout.next(self.dropout_p)
        )


class VocabularyTransform(nn.Module):
    """The masked-LM head before the tied projection: linear, activation, LayerNorm."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        width = config.embedding_width
        self.dense = nn.Linear(config.hidden_size, width, bias=config.head_bias)
        self.norm = nn.LayerNorm(width, eps=config.layer_norm_eps, bias=config.norm_bias)

    def forward(self, x):
        if self.config.head_approximate is None:
            x = nn.functional.silu(ops.linear(x, self.dense.weight, self.dense.bias))
            return ops.layer_norm(x, self.norm.weight, self.norm.bias, eps=self.norm.eps, dtype=x.dtype)
        x = ops.linear(x, self.dense.weight)
        # dtype: see AddNorm
        return ops.gelu_layer_norm(
            x, self.dense.bias, self.norm.weight, self.norm.bias,
            approximate=self.config.head_approximate, eps=self.norm.eps, dtype=x.dtype,
        )  # fmt: skip
