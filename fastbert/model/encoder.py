"""The encoder: embeddings, then the loop over layers."""

import torch
from torch import nn

from .. import ops
from ..packing import Batch, Layout
from .attentions import ATTENTIONS, DistanceBias, RelativePositions
from .config import EncoderConfig
from .layers import AddNorm, Convolution, Embeddings, FeedForward, GatedFeedForward, Norm, dropped


class DropoutStream:
    """Gives every dropout of one forward pass its own place in the random stream of one seed."""

    # places kept for each layer
    PER_LAYER = 16

    def __init__(self, seed, offset=0):
        self.seed, self.offset = seed, offset

    def next(self, dropout_p):
        """An op's arguments for its dropout."""
        self.offset += 1
        if self.seed is None or dropout_p == 0.0:
            return {}
        return {"dropout_p": dropout_p, "seed": self.seed, "offset": self.offset}

    def of_layer(self, n):
        """The stream of the layer that runs as the n-th, from 0; n = the number of layers: of what comes after."""
        return DropoutStream(self.seed, (n + 1) * self.PER_LAYER)

    def copy(self):
        """A second stream from the same place. A block draws from a copy, so that activation checkpointing, which runs
        the block again, draws the same."""
        return DropoutStream(self.seed, self.offset)


class Block(nn.Module):
    """One post-norm transformer layer (Vaswani et al. 2017, Devlin et al. 2019)."""

    def __init__(self, config, i):
        super().__init__()
        self.config = config
        self.attention = ATTENTIONS[config.attention](config, i)
        self.attention_norm = AddNorm(config, "attention")
        self.feed_forward = (GatedFeedForward if config.gate else FeedForward)(config)
        self.feed_forward_norm = AddNorm(config, "feed_forward")

    def forward(self, x, layout, dropout):
        """x [T, D] -> [T, D], or [M, D] of the query rows."""
        prepared = self._prepared(x, layout, dropout)
        if prepared is not None:
            return prepared(x, layout.cu_seqlens, layout.max_seqlen, layout.relative)
        dropout = dropout.copy()
        attended = self.attention(x, layout, dropout)
        return self.after_attention(attended, x if layout.query_rows is None else x[layout.query_rows], dropout)

    def _prepared(self, x, layout, dropout):
        """This layer as `ops.prepare` has it for inference, or None."""
        config = self.config
        is_relative = config.attention in ("biased", "disentangled") and layout.columns is None
        is_plain = config.attention == "softmax" or is_relative
        if not is_plain or config.gate or dropout.seed is not None or layout.query_rows is not None:
            return None
        return ops.prepare(self, x, Block._found)

    def _found(self):
        """What `ops.prepare` asks for."""
        config, attention, feed_forward = self.config, self.attention, self.feed_forward
        if has_hooks(attention, self.attention_norm, feed_forward, self.feed_forward_norm):
            return None
        parts = ops.PostNorm(
            attention.query, attention.key, attention.value, attention.output, self.attention_norm,
            feed_forward.up, feed_forward.down, self.feed_forward_norm,
            *(attention.position_projections() if config.attention == "disentangled" else ()),
        )  # fmt: skip
        return parts, config.num_attention_heads, config.approximate

    def after_attention(self, attended, residual, dropout):
        """The rest of the layer; attention's output and the residual are both [T, D] or [M, D]."""
        x = self.attention_norm(attended, residual, dropout)
        return self.feed_forward_norm(self.feed_forward(x, dropout), x, dropout)


class PreNormBlock(nn.Module):
    """One pre-norm layer (Xiong et al. 2020), as in Megatron-BERT and, gated, in ModernBERT (Warner et al. 2024)."""

    def __init__(self, config, i):
        super().__init__()
        self.attention_norm = Norm(config) if i > 0 or config.first_norm else None
        self.attention = ATTENTIONS[config.attention](config, i)
        self.feed_forward_norm = Norm(config)
        self.feed_forward = (GatedFeedForward if config.gate else FeedForward)(config)
        self.output_dropout, self.down_dropout = config.output_dropout, config.down_dropout

    def forward(self, x, layout, dropout):
        """x [T, D] -> [T, D], or [M, D] of the query rows."""
        prepared = self._prepared(x, layout, dropout)
        if prepared is not None:
            rotation = self.attention.rotation(x, layout)
            return prepared(x, layout.cu_seqlens, layout.max_seqlen, rotation=rotation)
        dropout = dropout.copy()
        attended = self.attention(x if self.attention_norm is None else self.attention_norm(x), layout, dropout)
        attended = dropped(attended, self.output_dropout, dropout)
        x = attended + (x if layout.query_rows is None else x[layout.query_rows])
        down = self.feed_forward(self.feed_forward_norm(x), dropout)
        return x + dropped(down, self.down_dropout, dropout)

    def _prepared(self, x, layout, dropout):
        """See Block: ModernBERT's layer."""
        config = self.attention.config
        is_known = config.attention == "rotary" and config.gate == "first" and config.approximate is not None
        if not is_known or dropout.seed is not None or layout.query_rows is not None or layout.columns is not None:
            return None
        return ops.prepare(self, x, PreNormBlock._found)

    def _found(self):
        attention, feed_forward = self.attention, self.feed_forward
        if has_hooks(self.attention_norm, attention, self.feed_forward_norm, feed_forward):
            return None
        parts = ops.PreNorm(
            self.attention_norm, attention.qkv, attention.output, self.feed_forward_norm, feed_forward.up,
            feed_forward.down,
        )  # fmt: skip
        config = attention.config
        return parts, config.num_attention_heads, config.approximate, None, attention.window


def has_hooks(*modules):
    """Whether one of the modules, or None, must be called for its hooks."""
    return any(module is not None and (module._forward_hooks or module._forward_pre_hooks) for module in modules)


class Encoder(nn.Module):
    """BERT's encoder on packed batches.

    config: EncoderConfig. Initial weights are those of the paper: normal with `initializer_range`, biases 0.
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
        # what linear layers multiply in where no gradient is wanted: see `set_dtype`
        self.products = "fp32"
        initialize(self, config)

    def set_dtype(self, dtype: str) -> None:
        """Let linear layers multiply in `dtype` in inference on a CPU; the rest, weights included, stays float32.

        dtype: "fp32"; "bf16"; "int8" (8 bits for each row of the input and of the weight); or "auto": bf16 where this
        processor multiplies it faster, measured, else fp32. bf16 and int8 give fp32, with a warning, where they are not
        faster. Raises ValueError when int8 loses too much: on 8 sequences of 16 random ids, always the same, the mean
        hidden state of each must have a cosine of at least 0.99 to that in fp32. Random ids lose more than text.
        """
        products = ops.low_precision.chosen(dtype)
        if products == "int8":
            self.products = "fp32"
            ops.low_precision.check_int8(self, self._probed)
        self.products = products

    def _probed(self):
        B, S = 8, min(16, self.config.max_length)
        ids = torch.randint(self.config.vocab_size, (B * S,), generator=torch.Generator().manual_seed(0))
        starts = torch.arange(B + 1, dtype=torch.int32) * S
        return self(Batch(ids, torch.arange(S).repeat(B), torch.zeros_like(ids), starts, S)).view(B, S, -1)

    def forward(
        self, batch: Batch, rows: torch.Tensor | None = None, dropout: DropoutStream | None = None,
        decoder: nn.Module | None = None,
    ) -> torch.Tensor:  # fmt: skip
        """Hidden states [T, D] of a packing.Batch; of the rows `rows` (int64 [M], ascending) only, [M, D], if given.

        With rows, the last layer's queries, feed-forward and norms run on these rows alone; the values are the same.
        dropout: a DropoutStream that the head also draws from. decoder: a head's MaskDecoder, which runs the last layer
        in its own way. Raises ValueError when a sequence is longer than the model has positions.
        """
        if batch.max_seqlen > self.config.max_length:
            raise ValueError(
                f"a sequence of {batch.max_seqlen} tokens: the model has {self.config.max_length} positions"
            )
        # in training activation checkpointing may turn gradients off in the first of two passes
        if self.products == "fp32" or self.training or torch.compiler.is_compiling():
            return self._run(batch, rows, dropout, decoder)
        with ops.low_precision.products(self.products, batch.input_ids):
            return self._run(batch, rows, dropout, decoder)

    def _run(self, batch, rows, dropout, decoder):
        dropout = self.dropout(batch) if dropout is None else dropout
        layout = Layout(batch.cu_seqlens, batch.max_seqlen, batch.position_ids, batch.columns, rotations={})
        x = self.embeddings(batch, dropout)
        if self.relative is not None:
            layout = layout._replace(relative=self.relative(layout))
        embedded = x
        *earlier, last = self.config.layer_order
        for n, i in enumerate(earlier):
            x = self.blocks[i](x, layout, dropout.of_layer(n))
            if n == 0 and self.convolution is not None:
                x = self.convolution(embedded, x, layout, dropout)
        layout = layout if rows is None else layout.with_queries(rows)
        last, place = self.blocks[last], dropout.of_layer(len(earlier))
        x = last(x, layout, place) if decoder is None else decoder(last, x, layout, place)
        if not earlier and self.convolution is not None and decoder is None:
            x = self.convolution(embedded, x, layout, dropout)
        dropout.offset = dropout.of_layer(len(earlier) + 1).offset
        return x if self.final_norm is None else self.final_norm(x)

    def dropout(self, batch: Batch) -> DropoutStream:
        """The DropoutStream of one pass: without a seed in evaluation, else of the batch's seed or a fresh one."""
        if not self.training:
            return DropoutStream(None)
        if batch.seed is not None:
            return DropoutStream(batch.seed)
        return DropoutStream(torch.randint(-(2**63), 2**63 - 1, (1,), dtype=torch.int64, device=batch.input_ids.device))


def initialize(model, config):
    """BERT's initial weights for the linear layers and tables of a module."""
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=config.initializer_range)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
        if isinstance(module, nn.Embedding) and module.padding_idx is not None:
            with torch.no_grad():
                module.weight[module.padding_idx].zero_()
