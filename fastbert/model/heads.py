"""Models: an encoder with a head, loaded from and saved to HuggingFace directories.

Letters: B sequences, S padded length, T packed tokens, D hidden size, V vocabulary, M picked tokens.
"""

import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import nn

from .. import ops
from ..packing import Batch, first_rows, pack_inputs, padded_groups
from . import hf_files
from .config import EncoderConfig
from .encoder import Encoder, initialize
from .layers import MaskDecoder, VocabularyTransform, dropped
from .losses import Loss, classification, label_loss, number_of_labels, ragged_classification

if TYPE_CHECKING:
    # in the standard library from Python 3.11 on
    from typing_extensions import Self


@dataclass
class Output:
    """What a model with a head returns.

    logits: see the model; None where only the loss was computed. losses: a Loss by the name of what was predicted
    ("mlm" masked tokens, "pair" sentence pairs, "rtd" replaced tokens, "label" of a text, a choice or a token, "start"
    and "end" of an answer); empty without labels.
    """

    logits: torch.Tensor | None = None
    losses: dict[str, Loss] = field(default_factory=dict)
    pair_logits: torch.Tensor | None = None
    start_logits: torch.Tensor | None = None
    end_logits: torch.Tensor | None = None

    @property
    def loss(self) -> torch.Tensor | None:
        """The weighted sum of the means; 0 where there is nothing to predict, never NaN. None without labels."""
        return self.divided({name: loss.count for name, loss in self.losses.items()}) if self.losses else None

    def divided(self, counts: dict) -> torch.Tensor:
        """The weighted sum of the losses, each divided by its own count of {name: int or 0-dimensional tensor}."""
        parts = []
        for name, loss in self.losses.items():
            count = counts[name]
            # a sum of weights may be below 1
            count = (count + (count == 0)).to(loss.sum.dtype) if torch.is_tensor(count) else count or 1
            parts.append(loss.weight * loss.sum / count)
        return sum(parts[1:], parts[0])


class Model(nn.Module):
    """An encoder, and what all heads share: inputs, and directories in and out."""

    # modules that are left out when a checkpoint lacks them
    OPTIONAL = ()
    # share of a label's probability that training gives to all labels alike (Szegedy et al. 2016); set it on the model
    label_smoothing = 0.0

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)

    def forward(
        self, input_ids: torch.Tensor | Batch, attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None, position_ids: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
    ) -> Output:  # fmt: skip
        """Either a packing.Batch alone, or HuggingFace's padded arguments, each [B, S]. Returns Output.

        attention_mask may have padding anywhere. labels are -100 where there is nothing to predict. Logits have a row
        for each token of a Batch, [T, ...], else they are [B, S, ...], and 0 at padding: see the class.
        """
        batch, restore = pack_inputs(self.config, input_ids, attention_mask, token_type_ids, position_ids, labels)
        output = self._output(batch)
        if output.logits is not None:
            output.logits = restore(output.logits)
        return output

    @classmethod
    def from_pretrained(
        cls, directory: str | os.PathLike, *, allow_pickle: bool = False, dtype: torch.dtype | str = torch.float32,
        revision: str | None = None, **changes: object,
    ) -> "Self":  # fmt: skip
        """From a directory with config.json and model.safetensors (or its shards), HuggingFace's or ours.

        directory: or OWNER/NAME on the HuggingFace hub, at `revision` (a branch, tag or commit). allow_pickle: read a
        pytorch_model.bin where there is nothing else; only tensors are read, no code is run. dtype: of the weights in
        memory; or "auto", "bf16" or "int8", for inference on a CPU: see `Encoder.set_dtype`. changes: EncoderConfig
        fields to set, such as num_labels of a new head. A head that the checkpoint lacks starts fresh, with a warning
        that names it. Raises ValueError when the encoder is incomplete, when a shape disagrees with config.json, when a
        file cannot be read, or when int8 loses too much.
        """
        options = dict(allow_pickle=allow_pickle, dtype=dtype, revision=revision)
        return hf_files.load_model(cls, directory, head=cls.__name__, **options, **changes)

    def save_pretrained(self, directory: str | os.PathLike) -> None:
        """Write config.json and model.safetensors under HuggingFace's names; transformers loads the directory."""
        hf_files.save_model(self, directory)

    def stored(self, directory: str | os.PathLike) -> dict[str, torch.Tensor]:
        """The state dict of this model as `save_pretrained` has written it to a directory."""
        return type(self).from_pretrained(directory).state_dict()

    def inexact(self) -> dict[str, torch.Tensor]:
        """{name: parameter} of those that `stored` returns only up to rounding."""
        return {}


class MaskedLM(Model):
    """With the masked-language-model head: transform, then the word table as decoder, plus a bias.

    Logits [B, S, V] without labels; loss "mlm" and no logits for labels int64 [B, S].
    """

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__(config)
        self.transform = VocabularyTransform(config)
        self.vocabulary_bias = nn.Parameter(torch.zeros(config.vocab_size))
        self.mask_decoder = MaskDecoder(config) if config.enhanced_mask_decoder else None
        initialize(self.transform, config)
        if self.mask_decoder is not None:
            initialize(self.mask_decoder, config)

    def _output(self, batch):
        if batch.labels is None:
            return Output(self.logits(batch))
        return Output(losses={"mlm": self._masked_lm(self.hidden(batch, batch.picks), batch)})

    def hidden(self, batch: Batch, rows: torch.Tensor | None = None) -> torch.Tensor:
        """The input of the head: hidden states of the rows `rows` (int64 [M], ascending; None: all T), [M, D]."""
        return self.encoder(batch, rows, decoder=self.mask_decoder)

    def label_counts(self, batch: Batch) -> dict[str, int]:
        """The counts that divide the losses of a packing.Batch, see `Output.divided`. Waits for its device."""
        return {"mlm": number_of_labels(batch.labels)}

    def logits(self, batch: Batch, rows: torch.Tensor | None = None) -> torch.Tensor:
        """Vocabulary scores of the rows `rows` (int64 [M], ascending; None: all T) of a packing.Batch: [M, V]."""
        hidden = self.transform(self.hidden(batch, rows))
        return ops.linear(hidden, self.encoder.embeddings.word.weight, self.vocabulary_bias)

    def _masked_lm(self, hidden, batch):
        weight, bias = self.encoder.embeddings.word.weight, self.vocabulary_bias
        return Loss(*ops.masked_cross_entropy(self.transform(hidden), weight, bias, batch.labels[batch.picks]))


class Pretraining(MaskedLM):
    """With both pretraining heads: masked language model, and sentence pairs (NSP or SOP) from the first token."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__(config)
        self.pooler = nn.Linear(config.hidden_size, config.hidden_size)
        self.pair_classifier = nn.Linear(config.hidden_size, 2)
        for module in (self.pooler, self.pair_classifier):
            initialize(module, config)

    def forward(
        self, input_ids: torch.Tensor | Batch, attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None, position_ids: torch.Tensor | None = None,
        labels: torch.Tensor | None = None, next_sentence_label: torch.Tensor | None = None,
    ) -> Output:  # fmt: skip
        """As Model.forward, and loss "pair" of next_sentence_label (or Batch.pair_labels): int64 [B], 0 if true.

        Either kind of label may be missing: its loss is then left out.
        """
        batch, restore = pack_inputs(self.config, input_ids, attention_mask, token_type_ids, position_ids, labels)
        if next_sentence_label is not None:
            batch.pair_labels = next_sentence_label
        if batch.labels is None and batch.pair_labels is None:
            dropout = self.encoder.dropout(batch)
            hidden = self.encoder(batch, dropout=dropout)
            logits = ops.linear(self.transform(hidden), self.encoder.embeddings.word.weight, self.vocabulary_bias)
            pair_logits = self._pair_logits(hidden[first_rows(batch)], batch, dropout)
            return Output(restore(logits), pair_logits=pair_logits)
        picks = batch.picks if batch.labels is not None else batch.input_ids.new_empty(0)
        # the rows that either head reads, each once and ascending; repetitions of the last fill the list up
        wanted = torch.cat((picks, first_rows(batch)))
        rows = wanted.sort().values
        is_new = rows.diff(prepend=rows[:1] - 1) != 0
        rows = rows.where(is_new, rows[-1:]).sort().values
        place = torch.searchsorted(rows, wanted)
        dropout = self.encoder.dropout(batch)
        hidden = self.encoder(batch, rows, dropout)[place]
        output = Output()
        if batch.labels is not None:
            output.losses["mlm"] = self._masked_lm(hidden[: len(picks)], batch)
        if batch.pair_labels is not None:
            scores = self._pair_logits(hidden[len(picks) :], batch, dropout)
            output.losses["pair"] = classification(scores, batch.pair_labels, name="pair labels")
        return output

    def label_counts(self, batch: Batch) -> dict[str, int]:
        """See `MaskedLM.label_counts`."""
        return {"mlm": number_of_labels(batch.labels), "pair": number_of_labels(batch.pair_labels)}

    def _pair_logits(self, first, batch, dropout):
        pooled = dropped(torch.tanh(self.pooler(first)), self.config.pair_dropout, dropout)
        scores = self.pair_classifier(pooled)
        # a batch without tokens has no first ones
        return F.pad(scores, (0, 0, 0, len(batch.cu_seqlens) - 1 - len(scores)))


_ACTIVATIONS = {"tanh": torch.tanh, "relu": torch.relu, "gelu": F.gelu}


class SequenceClassifier(Model):
    """A label, several labels or a number for each sequence or pair: pooler of the first token, then a linear layer."""

    OUTPUTS = None
    # what takes the place of the loss of each label in training: one of reranking.OBJECTIVES
    objective = None

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__(config)
        D = config.hidden_size
        self.pooler = VocabularyTransform(config) if config.pooler_act == "transform" else nn.Linear(D, D)
        self.classifier = nn.Linear(D, self.OUTPUTS or config.num_labels)
        for module in (self.pooler, self.classifier):
            initialize(module, config)

    def forward(
        self, input_ids: torch.Tensor | Batch, attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None, position_ids: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
    ) -> Output:  # fmt: skip
        """Logits [B, num_labels], and loss "label" when there are labels. Returns Output.

        Either a packing.Batch, or HuggingFace's padded arguments, each [B, S]. labels: int64 [B], -100 for none; or
        float [B, num_labels] in 0 .. 1, a probability of each label by itself; or float [B] (or [B, num_labels])
        with problem_type "regression" or one label: squared error. A Batch has them as targets, with weights. The first
        token is the first that is not padding, wherever it stands. Raises ValueError when labels do not fit.
        """
        batch, _ = pack_inputs(self.config, input_ids, attention_mask, token_type_ids, position_ids)
        logits = self._scores(batch, self.config.pooler_dropout, self.config.classifier_dropout)
        if self.objective is not None and batch.targets is not None:
            return Output(logits, {"label": self.objective.loss(logits, batch)})
        labels = batch.targets if labels is None else labels
        return Output(logits, label_loss(logits, labels, self.config, batch.weights, self.label_smoothing))

    def label_counts(self, batch: Batch) -> dict[str, int]:
        """See `MaskedLM.label_counts`."""
        if self.objective is not None:
            return {"label": self.objective.count(batch)}
        return {"label": number_of_labels(batch.targets, batch.weights)}

    def _scores(self, batch, pooler_dropout, classifier_dropout):
        config, dropout = self.config, self.encoder.dropout(batch)
        if config.head_pooling == "cls":
            hidden = first_hidden(self.encoder, batch, dropout)
        else:
            hidden = ops.pooling(self.encoder(batch, dropout=dropout), batch.cu_seqlens, mode=config.head_pooling)
        classifier_dropout = config.hidden_dropout_prob if classifier_dropout is None else classifier_dropout
        hidden = dropped(hidden, classifier_dropout if pooler_dropout is None else pooler_dropout, dropout)
        if config.pooler_act == "transform":
            pooled = self.pooler(hidden)
        else:
            pooled = _ACTIVATIONS[config.pooler_act](ops.linear(hidden, self.pooler.weight, self.pooler.bias))
        pooled = dropped(pooled, classifier_dropout, dropout)
        return ops.linear(pooled, self.classifier.weight, self.classifier.bias)


class MultipleChoice(SequenceClassifier):
    """The right one of several choices: each is read with the question and gets one score."""

    OUTPUTS = 1

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None, position_ids: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
    ) -> Output:  # fmt: skip
        """Logits [B, C] for arguments [B, C, S], and loss "label" for labels int64 [B]. Returns Output.

        A packing.Batch has a sequence for each choice: cu_examples says which belong together, and targets, int64 [B],
        are the same for all of them. Its logits are [B, 1].
        """
        config = self.config
        dropout_p = config.classifier_dropout if config.choice_dropout is None else config.choice_dropout
        dropouts = config.pooler_dropout or 0.0, dropout_p
        if isinstance(input_ids, Batch):
            logits, output = self._scores(input_ids, *dropouts), Output()
            labels = self._labels(input_ids)
            if labels is not None:
                cu = input_ids.cu_examples
                scores = padded_groups(logits[:, 0].float(), cu, int(cu.diff().max()))
                output.losses["label"] = ragged_classification(scores, labels, smoothing=self.label_smoothing)
            output.logits = logits
            return output
        if input_ids.dim() != 3:
            raise ValueError(f"input_ids has shape {tuple(input_ids.shape)}: expected [batch, choices, length]")
        flat = (x if x is None else x.flatten(0, 1) for x in (attention_mask, token_type_ids, position_ids))
        batch, _ = pack_inputs(self.config, input_ids.flatten(0, 1), *flat)
        logits = self._scores(batch, *dropouts).view(input_ids.shape[:2])
        return Output(logits, label_loss(logits, labels, smoothing=self.label_smoothing))

    def label_counts(self, batch: Batch) -> dict[str, int]:
        """See `MaskedLM.label_counts`."""
        return {"label": number_of_labels(self._labels(batch))}

    @staticmethod
    def _labels(batch):
        return None if batch.targets is None else batch.targets[batch.cu_examples[:-1].long()]


class _TokenScores(Model):
    """Scores for each token: what TokenClassifier and QuestionAnswerer share."""

    def __init__(self, config: EncoderConfig, outputs: int) -> None:
        super().__init__(config)
        self.transform = VocabularyTransform(config) if config.pooler_act == "transform" else None
        self.classifier = nn.Linear(config.hidden_size, outputs)
        for module in filter(None, (self.classifier, self.transform)):
            initialize(module, config)

    def _scores(self, batch, dropout_p):
        dropout = self.encoder.dropout(batch)
        hidden = self.encoder(batch, dropout=dropout)
        hidden = hidden if self.transform is None else self.transform(hidden)
        return ops.linear(dropped(hidden, dropout_p, dropout), self.classifier.weight, self.classifier.bias)


class TokenClassifier(_TokenScores):
    """A label for each token, such as the names of persons and places.

    Logits [B, S, num_labels], and loss "label" for labels int64 [B, S].
    """

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__(config, config.num_labels)

    def _output(self, batch):
        config = self.config
        chain = (config.token_dropout, config.classifier_dropout, config.hidden_dropout_prob)
        logits = self._scores(batch, next(p for p in chain if p is not None))
        return Output(logits, label_loss(logits, batch.labels, None, batch.weights, self.label_smoothing))

    def label_counts(self, batch: Batch) -> dict[str, int]:
        """See `MaskedLM.label_counts`."""
        return {"label": number_of_labels(batch.labels, batch.weights)}


class ReplacedTokenDetector(Model):
    """ELECTRA's discriminator: which tokens of a text a generator has replaced (Clark et al. 2020).

    Logits [B, S], above 0 where a token looks replaced; and loss "rtd" for labels int64 [B, S]: 1 where a token was
    replaced, 0 where not.
    """

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__(config)
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.classifier = nn.Linear(config.hidden_size, 1)
        for module in (self.dense, self.classifier):
            initialize(module, config)

    def _output(self, batch):
        hidden = ops.linear(self.encoder(batch), self.dense.weight)
        hidden = ops.bias_gelu(hidden, self.dense.bias, approximate=self.config.approximate)
        logits = ops.linear(hidden, self.classifier.weight, self.classifier.bias)[:, 0]
        output = Output(logits)
        if batch.labels is not None:
            ops.check_ids("labels", batch.labels, 2, -100)
            known, detected = batch.labels != -100, logits > 0
            replaced = batch.labels == 1
            losses = F.binary_cross_entropy_with_logits(logits.float(), replaced.to(torch.float32), reduction="none")
            output.losses["rtd"] = Loss(
                losses.where(known, 0).sum(), known.sum(), ((detected == replaced) & known).sum(),
                more={"replaced": replaced.sum(), "found": (replaced & detected).sum()},
            )  # fmt: skip
        return output


class QuestionAnswerer(_TokenScores):
    """The span of a text that answers a question: a score for each token as its start and as its end."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__(config, 2)

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None, position_ids: torch.Tensor | None = None,
        start_positions: torch.Tensor | None = None, end_positions: torch.Tensor | None = None,
    ) -> Output:  # fmt: skip
        """start_logits and end_logits [B, S] for HuggingFace's padded arguments, and losses "start" and "end".

        start_positions, end_positions: int64 [B], columns of input_ids. One outside 0 .. S - 1, or at padding, is no
        label. Padding takes no part: its logits are -inf. A packing.Batch has logits [T, 2], and as targets int64
        [B, 2] the places of start and end in their sequence, -100 for none. Returns Output.
        """
        batch, restore = pack_inputs(self.config, input_ids, attention_mask, token_type_ids, position_ids)
        logits, output = self._scores(batch, self.config.qa_dropout), Output()
        if isinstance(input_ids, Batch):
            output.logits = logits
            if batch.targets is None:
                return output
            start_positions, end_positions = batch.targets.unbind(1)
            scores = padded_groups(logits.float(), batch.cu_seqlens, batch.max_seqlen)
        else:
            is_token = torch.ones_like(input_ids) if attention_mask is None else attention_mask
            scores = restore(logits).float().masked_fill(~is_token.bool()[..., None], float("-inf"))
            output.start_logits, output.end_logits = scores.unbind(-1)
        if start_positions is not None and end_positions is not None:
            S = scores.shape[1]
            for name, one, place in zip(("start", "end"), scores.unbind(-1), (start_positions, end_positions)):
                inside = (place >= 0) & (place < S)
                inside &= ~one.gather(1, place.clamp(0, S - 1)[:, None])[:, 0].isneginf()
                # each end's mean counts half
                place = place.where(inside, -100)
                output.losses[name] = ragged_classification(one, place, 0.5, self.label_smoothing)
        return output

    def label_counts(self, batch: Batch) -> dict[str, int]:
        """See `MaskedLM.label_counts`."""
        places = (None, None) if batch.targets is None else batch.targets.unbind(1)
        return {name: number_of_labels(place) for name, place in zip(("start", "end"), places, strict=True)}


def first_hidden(encoder, batch, dropout):
    """Hidden states [B, D] of each sequence's first token; 0 for an empty sequence."""
    hidden = encoder(batch, first_rows(batch), dropout)
    B = len(batch.cu_seqlens) - 1
    # a batch without tokens has no first ones
    if len(hidden) < B:
        return hidden.new_zeros(B, hidden.shape[-1])
    return hidden.masked_fill((batch.cu_seqlens.diff() == 0)[:, None], 0.0)
