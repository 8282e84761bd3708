"""The encoder: embeddings, then the loop over layers."""

import torch
from torch import nn

from ..packing import Batch, Layout
from .attentions import ATTENTIONS, DistanceBias, RelativePositions
from .config import EncoderConfig
from .layers import AddNorm, Convolution, Embeddings, FeedForward, GatedFeedForward, Norm, dropped


class Dropout:
    """Hands every call of one forward pass its own place in the random stream of one seed."""

    PER_LAYER = 16  # places that are kept for each layer

    def __init__(self, seed, offset=0):
        self.seed, self.offset = seed, offset

    def of_layer(self, n):
        """The Dropout of the layer that runs as the n-th, from 0; n = the number of layers: of what comes after."""
        return Dropout(self.seed, (n + 1) * self.PER_LAYER)

    def copy(self):
        """Another that begins where this one stands: a block draws from its copy, so that running it again, as
        activation checkpointing does, draws the same."""
        return Dropout(self.seed, self.offset)

    def __call__(self, dropout_p):
        self.offset += 1
        if self.seed is None or dropout_p == 0.0:
            return {}
        return {"dropout_p": dropout_p, "seed": self.seed, "offset": self.offset}


class Block(nn.Module):
    """One post-norm transformer layer (Vaswani et al. 2017, Devlin et al. 2019)."""

    def __init__(self, config, i):
        super().__init__()
        self.attention = ATTENTIONS[config.attention](config, i)
        self.attention_norm = AddNorm(config, "attention")
        self.feed_forward = FeedForward(config)
        self.feed_forward_norm = AddNorm(config, "feed_forward")

    def forward(self, x, layout, dropout):
        """x [T, D] -> [T, D], or [M, D] when the layout asks for some rows only."""
        dropout = dropout.copy()
        attended = self.attention(x, layout, dropout)
        return self.after_attention(attended, x if layout.rows is None else x[layout.rows], dropout)

    def after_attention(self, attended, asking, dropout):
        """What attention gave, and the rows that asked, both [T, D] or [M, D], through the rest of the layer."""
        x = self.attention_norm(attended, asking, dropout)
        return self.feed_forward_norm(self.feed_forward(x), x, dropout)


class PreNormBlock(nn.Module):
    """One layer with its norms in front, as in ModernBERT (Warner et al. 2024); the first has none for attention."""

    def __init__(self, config, i):
        super().__init__()
        self.attention_norm = Norm(config) if i > 0 else None
        self.attention = ATTENTIONS[config.attention](config, i)
        self.feed_forward_norm = Norm(config)
        self.feed_forward = GatedFeedForward(config)
        self.output_dropout = config.output_dropout

    def forward(self, x, layout, dropout):
        """x [T, D] -> [T, D], or [M, D] when the layout asks for some rows only."""
        dropout = dropout.copy()
        attended = self.attention(x if self.attention_norm is None else self.attention_norm(x), layout, dropout)
        attended = dropped(attended, self.output_dropout, dropout)
        x = attended + (x if layout.rows is None else x[layout.rows])
        return x + self.feed_forward(self.feed_forward_norm(x), dropout)


class Encoder(nn.Module):
    """BERT's encoder on packed batches.

    config: EncoderConfig. Weights start as in the paper: normal with `initializer_range`, biases 0.
    """

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.config = config
        self.embeddings = Embeddings(config)
        block = PreNormBlock if config.pre_norm else Block
        self.blocks = nn.ModuleList(block(config, i) for i in range(max(config.layer_order) + 1))
        self.final_norm = Norm(config) if config.pre_norm else None
        self.relative = None
        if config.pos_att_type or config.distance_buckets:
            self.relative = (RelativePositions if config.pos_att_type else DistanceBias)(config)
        self.convolution = Convolution(config) if config.conv_kernel_size else None
        self.apply(lambda module: initialize(module, config))

    def forward(
        self, batch: Batch, rows: torch.Tensor | None = None, dropout: Dropout | None = None,
        decoder: nn.Module | None = None,
    ) -> torch.Tensor:  # fmt: skip
        """Hidden states [T, D] of a packing.Batch; of the rows `rows` (int64 [M], ascending) only, [M, D], if given.

        With rows, the last layer's queries, feed-forward and norms run on these rows alone, which changes nothing in
        their values. dropout: a Dropout that a head goes on drawing from. decoder: a head's MaskDecoder, which runs the
        last layer in its own way. Raises ValueError when a sequence is longer than the model has positions.
        """
        if batch.max_seqlen > self.config.max_length:
            raise ValueError(
                f"a sequence of {batch.max_seqlen} tokens: the model has {self.config.max_length} positions"
            )
        dropout = self.dropout(batch) if dropout is None else dropout
        layout = Layout(batch.cu_seqlens, batch.max_seqlen, batch.position_ids, batch.columns)
        x = self.embeddings(batch, dropout)
        if self.relative is not None:
            layout.shared["relative"] = self.relative(layout)
        embedded = x
        *earlier, last = self.config.layer_order
        for n, i in enumerate(earlier):
            x = self.blocks[i](x, layout, dropout.of_layer(n))
            if n == 0 and self.convolution is not None:
                x = self.convolution(embedded, x, layout, dropout)
        layout = layout if rows is None else layout.asking(rows)
        last, place = self.blocks[last], dropout.of_layer(len(earlier))
        x = last(x, layout, place) if decoder is None else decoder(last, x, layout, place)
        if not earlier and self.convolution is not None and decoder is None:
            x = self.convolution(embedded, x, layout, dropout)
        dropout.offset = dropout.of_layer(len(earlier) + 1).offset
        return x if self.final_norm is None else self.final_norm(x)

    def dropout(self, batch: Batch) -> Dropout:
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
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)
    if isinstance(module, nn.Embedding) and module.padding_idx is not None:
        with torch.no_grad():
            module.weight[module.padding_idx].zero_()
