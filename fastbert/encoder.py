"""The encoder: embeddings, then the loop over layers."""

from dataclasses import dataclass

import torch
from torch import nn

from .layers import AddNorm, Embeddings, FeedForward, SelfAttention


@dataclass
class Layout:
    """Which rows belong together, for attention. `rows`: the rows of x that ask (None: all of them)."""

    cu_seqlens: torch.Tensor
    max_seqlen: int
    rows: torch.Tensor | None = None
    cu_seqlens_q: torch.Tensor | None = None
    max_seqlen_q: int | None = None

    def asking(self, rows):
        """The same sequences, where only `rows` (ascending, int64 [M]) ask."""
        cu_seqlens_q = torch.searchsorted(rows, self.cu_seqlens.to(rows.dtype)).to(torch.int32)
        return Layout(self.cu_seqlens, self.max_seqlen, rows, cu_seqlens_q, min(self.max_seqlen, len(rows)))


class Dropout:
    """Hands every call of one forward pass its own place in the random stream of one seed."""

    def __init__(self, seed):
        self.seed, self.offset = seed, 0

    def __call__(self, dropout_p):
        self.offset += 1
        if self.seed is None or dropout_p == 0.0:
            return {}
        return {"dropout_p": dropout_p, "seed": self.seed, "offset": self.offset}


class Block(nn.Module):
    """One post-norm transformer layer (Vaswani et al. 2017, Devlin et al. 2019)."""

    def __init__(self, config):
        super().__init__()
        self.attention = SelfAttention(config)
        self.attention_norm = AddNorm(config)
        self.feed_forward = FeedForward(config)
        self.feed_forward_norm = AddNorm(config)

    def forward(self, x, layout, dropout):
        """x [T, D] -> [T, D], or [M, D] when the layout asks for some rows only."""
        attended = self.attention(x, layout, dropout)
        x = self.attention_norm(attended, x if layout.rows is None else x[layout.rows], dropout)
        return self.feed_forward_norm(self.feed_forward(x), x, dropout)


class Encoder(nn.Module):
    """BERT's encoder on packed batches.

    config: EncoderConfig. Weights start as in the paper: normal with `initializer_range`, biases 0.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embeddings = Embeddings(config)
        self.blocks = nn.ModuleList(Block(config) for _ in range(max(config.layer_order) + 1))
        self.apply(lambda module: initialize(module, config))

    def forward(self, batch, rows=None, dropout=None):
        """Hidden states [T, D] of a packing.Batch; of the rows `rows` (int64 [M], ascending) only, [M, D], if given.

        With rows, the last layer's queries, feed-forward and norms run on these rows alone, which changes nothing in
        their values. dropout: a Dropout that a head goes on drawing from. Raises ValueError when a sequence is longer
        than the model has positions.
        """
        if batch.max_seqlen > self.config.max_length:
            raise ValueError(
                f"a sequence of {batch.max_seqlen} tokens: the model has {self.config.max_length} positions"
            )
        dropout = self.dropout(batch) if dropout is None else dropout
        layout = Layout(batch.cu_seqlens, batch.max_seqlen)
        x = self.embeddings(batch, dropout)
        *earlier, last = self.config.layer_order
        for i in earlier:
            x = self.blocks[i](x, layout, dropout)
        return self.blocks[last](x, layout if rows is None else layout.asking(rows), dropout)

    def dropout(self, batch):
        """The Dropout of one pass over `batch`: none in evaluation, else from the batch's seed or a fresh one."""
        if not self.training:
            return Dropout(None)
        if batch.seed is not None:
            return Dropout(batch.seed)
        return Dropout(torch.randint(-(2**63), 2**63 - 1, (1,), dtype=torch.int64, device=batch.input_ids.device))


def initialize(module, config):
    """BERT's initial weights for one module."""
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=config.initializer_range)
    if isinstance(module, nn.Linear):
        nn.init.zeros_(module.bias)
    if isinstance(module, nn.Embedding) and module.padding_idx is not None:
        with torch.no_grad():
            module.weight[module.padding_idx].zero_()
