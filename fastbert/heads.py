"""Models: an encoder with a head, loaded from and saved to HuggingFace directories.

Letters: B sequences, S padded length, T packed tokens, D hidden size, V vocabulary, M picked tokens.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from . import ops, pretrained
from .encoder import Encoder, initialize
from .layers import VocabularyTransform
from .packing import Batch, pack, unpack


@dataclass
class MaskedLMOutput:
    """Sums, not means: several micro-batches or processes add up, and are divided once by the global count.

    loss_sum: fp32, of the picked tokens. count and correct: int64, how many were picked, how many predicted right.
    The pair_ fields are the same for NSP or SOP, per pair; None without it. logits: only when no labels were given.
    """

    loss_sum: torch.Tensor | None = None
    count: torch.Tensor | None = None
    correct: torch.Tensor | None = None
    pair_loss_sum: torch.Tensor | None = None
    pair_count: torch.Tensor | None = None
    pair_correct: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    pair_logits: torch.Tensor | None = None

    @property
    def loss(self):
        """The mean over picked tokens, plus the mean over pairs; 0 where there is nothing to predict, never NaN."""
        if self.loss_sum is None:
            return None
        loss = self.loss_sum / self.count.clamp(min=1)
        if self.pair_loss_sum is not None:
            loss = loss + self.pair_loss_sum / self.pair_count.clamp(min=1)
        return loss


class MaskedLM(nn.Module):
    """BERT with the masked-language-model head: transform, then the word table again as decoder, plus a bias."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.transform = VocabularyTransform(config)
        self.vocabulary_bias = nn.Parameter(torch.zeros(config.vocab_size))
        self.transform.apply(lambda module: initialize(module, config))

    def forward(self, input_ids, attention_mask=None, token_type_ids=None, position_ids=None, labels=None):
        """Loss when there are labels, else logits. Returns MaskedLMOutput.

        Either a packing.Batch alone, or HuggingFace's padded arguments, each [B, S]: labels are -100 where nothing was
        picked; attention_mask may have padding anywhere. Logits are [T, V] for a Batch, else [B, S, V].
        """
        batch, restore = pack_inputs(self.config, input_ids, attention_mask, token_type_ids, position_ids, labels)
        if batch.labels is None:
            return MaskedLMOutput(logits=restore(self.logits(batch)))
        return self._masked_lm(self.encoder(batch, rows=batch.picks), batch)

    def logits(self, batch, rows=None):
        """Vocabulary scores of the rows `rows` (int64 [M], ascending; None: all T) of a packing.Batch: [M, V]."""
        hidden = self.transform(self.encoder(batch, rows=rows))
        return ops.linear(hidden, self.encoder.embeddings.word.weight, self.vocabulary_bias)

    def _masked_lm(self, hidden, batch):
        loss_sum, count, correct = ops.masked_cross_entropy(
            self.transform(hidden), self.encoder.embeddings.word.weight, self.vocabulary_bias, batch.labels[batch.picks]
        )
        return MaskedLMOutput(loss_sum, count, correct)

    @classmethod
    def from_pretrained(cls, directory, *, allow_pickle=False, dtype=torch.float32):
        """From a directory with config.json and model.safetensors (or its shards), HuggingFace's or ours.

        allow_pickle: read a pytorch_model.bin where there is nothing else; only its tensors, no code in it is run.
        dtype: of the weights in memory. A head that the checkpoint lacks starts fresh, with a warning that names it.
        Raises ValueError when the encoder is incomplete, when a shape disagrees with config.json, or when a file cannot
        be read.
        """
        return pretrained.load(cls, directory, allow_pickle=allow_pickle, dtype=dtype)

    def save_pretrained(self, directory):
        """Write config.json and model.safetensors under HuggingFace's names; transformers loads the directory."""
        pretrained.save(self, directory)


class Pretraining(MaskedLM):
    """BERT with both pretraining heads: masked language model, and sentence pairs (NSP or SOP) from the first token."""

    def __init__(self, config):
        super().__init__(config)
        self.pooler = nn.Linear(config.hidden_size, config.hidden_size)
        self.pair_classifier = nn.Linear(config.hidden_size, 2)
        for module in (self.pooler, self.pair_classifier):
            initialize(module, config)

    def forward(
        self, input_ids, attention_mask=None, token_type_ids=None, position_ids=None, labels=None,
        next_sentence_label=None,
    ):  # fmt: skip
        """As MaskedLM.forward; next_sentence_label int64 [B], 0 for a true pair (or Batch.pair_labels).

        Either kind of label may be missing: its loss is then left out.
        """
        batch, restore = pack_inputs(self.config, input_ids, attention_mask, token_type_ids, position_ids, labels)
        if next_sentence_label is not None:
            batch.pair_labels = next_sentence_label
        if batch.labels is None and batch.pair_labels is None:
            hidden = self.encoder(batch)
            logits = ops.linear(self.transform(hidden), self.encoder.embeddings.word.weight, self.vocabulary_bias)
            pair_logits = self._pair_logits(hidden[first_rows(batch)], batch)
            return MaskedLMOutput(logits=restore(logits), pair_logits=pair_logits)
        picks = batch.picks if batch.labels is not None else batch.input_ids.new_empty(0)
        # one ascending list of the rows that either head reads, and where each of them stands in it
        rows, order = torch.sort(torch.cat((picks, first_rows(batch))), stable=True)
        place = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
        hidden = self.encoder(batch, rows=rows)[place]
        output = MaskedLMOutput()
        if batch.labels is not None:
            output = self._masked_lm(hidden[: len(picks)], batch)
        if batch.pair_labels is not None:
            scores = self._pair_logits(hidden[len(picks) :], batch)
            known = batch.pair_labels != -100
            output.pair_loss_sum = F.cross_entropy(scores.float(), batch.pair_labels, reduction="sum")
            output.pair_count = known.sum()
            output.pair_correct = ((scores.argmax(-1) == batch.pair_labels) & known).sum()
            if output.loss_sum is None:
                output.loss_sum, output.count, output.correct = (
                    0 * x for x in (output.pair_loss_sum, *(known.sum(),) * 2)
                )
        return output

    def _pair_logits(self, first, batch):
        scores = self.pair_classifier(torch.tanh(self.pooler(first)))
        return F.pad(scores, (0, 0, 0, len(batch.cu_seqlens) - 1 - len(scores)))  # a batch without a token has no first


def first_rows(batch):
    """The row of each sequence's first token, int64 [B]. An empty sequence names a neighbour's; none at all, [0]."""
    rows = batch.cu_seqlens[:-1].long()
    return rows.clamp(max=len(batch.input_ids) - 1) if len(batch.input_ids) else rows[:0]


def pack_inputs(config, input_ids, attention_mask=None, token_type_ids=None, position_ids=None, labels=None):
    """(Batch, function that gives packed rows the caller's layout) of HuggingFace's arguments, each [B, S]."""
    if isinstance(input_ids, Batch):
        return input_ids, lambda rows: rows
    B, S = input_ids.shape
    if config.max_length < S and position_ids is None:
        raise ValueError(f"input_ids are {S} tokens long: the model has {config.max_length} positions")
    if config.position_offset:
        if position_ids is None:
            # RoBERTa's rule: only what is not the padding token counts
            counted = input_ids != config.pad_token_id
            position_ids = counted.cumsum(1) * counted - 1
        else:
            position_ids = position_ids - config.position_offset
    batch, indices = pack(input_ids, attention_mask, token_type_ids, position_ids, labels)
    return batch, lambda rows: unpack(rows, indices, B, S)
