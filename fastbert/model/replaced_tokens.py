"""ELECTRA's pretraining: a generator fills in masked tokens, a discriminator finds the replaced ones.

Letters: T packed tokens, D hidden size, V vocabulary, M picked tokens.
"""

import dataclasses
import os
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from .. import ops
from ..packing import Batch, pack_inputs
from . import families, hf_files
from .config import EncoderConfig
from .heads import Loss, MaskedLM, Output, ReplacedTokenDetector, number_of_labels

if TYPE_CHECKING:
    # in the standard library from Python 3.11 on
    from typing_extensions import Self


EMBEDDING_SHARING = ("shared", "gdes", "none")
GENERATOR = "generator"
# flips bits of the seed, so that the discriminator's dropout differs from the generator's
_OTHER_DROPOUT = 0x5851F42D4C957F2D


class ReplacedTokenPretraining(nn.Module):
    """ELECTRA's pretraining (Clark et al. 2020): a generator fills in masked tokens, a discriminator says which.

    config: EncoderConfig of the discriminator, a ReplacedTokenDetector, the model to use afterwards. generator_config:
    of the generator, a MaskedLM; by default that of the family's paper. rtd_weight: of the discriminator's loss beside
    the generator's. embedding_sharing, by default the family's:

    "shared": both use the same word, position and segment tables and the norm after them, where sizes allow.
    "gdes": the discriminator's tables are the generator's, detached, plus parameters of its own that start at 0 (He et
    al. 2023, gradient-disentangled embedding sharing). These parameters take the place of the discriminator's tables;
    `detector()` is the discriminator that reads text by itself.
    "none": each has its own.

    Raises ValueError when the family has no such head, or when the two word tables cannot be shared.
    """

    def __init__(
        self, config: EncoderConfig, generator_config: EncoderConfig | None = None, *,
        embedding_sharing: str | None = None, rtd_weight: float = 50.0,
    ) -> None:  # fmt: skip
        super().__init__()
        row = families.family(config.model_type)
        if row.generator is None:
            raise ValueError(f"a {config.model_type} has no detector of replaced tokens: {families.detecting()} have")
        self.config, self.rtd_weight = config, rtd_weight
        self.embedding_sharing = embedding_sharing or row.embedding_sharing
        if self.embedding_sharing not in EMBEDDING_SHARING:
            raise ValueError(
                f"embedding_sharing is {embedding_sharing!r}: expected one of {', '.join(EMBEDDING_SHARING)}"
            )
        self.generator = MaskedLM(row.generator(config) if generator_config is None else generator_config)
        self.discriminator = ReplacedTokenDetector(config)
        self._share()

    def _share(self):
        ours, theirs = self.discriminator.encoder.embeddings, self.generator.encoder.embeddings
        shapes = [tuple(embeddings.word.weight.shape) for embeddings in (theirs, ours)]
        if shapes[0][0] != shapes[1][0] or (shapes[0] != shapes[1] and self.embedding_sharing != "none"):
            raise ValueError(
                f"the word table of the generator is {shapes[0]} and that of the discriminator {shapes[1]}: "
                "expected the same vocabulary, and to share them the same width"
            )
        parts = {"shared": ("word", "position", "token_type", "norm"), "gdes": ("word", "position", "token_type")}
        # names of the discriminator's tables that are a sum of two
        self._sums = []
        for part in parts.get(self.embedding_sharing, ()):
            own, other = getattr(ours, part), getattr(theirs, part)
            if own is None or other is None or own.weight.shape != other.weight.shape:
                continue
            if self.embedding_sharing == "gdes":
                nn.init.zeros_(own.weight)
                self._sums.append(f"encoder.embeddings.{part}.weight")
            else:
                for name in dict(own.named_parameters()):
                    setattr(own, name, getattr(other, name))

    def forward(
        self, input_ids: torch.Tensor | Batch, attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None, position_ids: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
    ) -> Output:  # fmt: skip
        """Losses "mlm" and "rtd" of a masked text. Returns Output, without logits.

        "rtd" counts more: how many tokens were "replaced", and how many of these were "found".

        Either a packing.Batch or HuggingFace's padded arguments, as for MaskedLM; there must be labels: the tokens of
        the text where input_ids are masked, else -100. The generator's tokens depend on batch.draws; without them they
        are drawn anew. Raises ValueError without labels.
        """
        batch, _ = pack_inputs(self.config, input_ids, attention_mask, token_type_ids, position_ids, labels)
        if batch.labels is None:
            raise ValueError("labels is None: expected the tokens of the text where it is masked, and -100 elsewhere")
        generator = self.generator
        hidden = generator.transform(generator.hidden(batch, batch.picks))
        predicted = ops.masked_cross_entropy(
            hidden, generator.encoder.embeddings.word.weight, generator.vocabulary_bias, batch.labels[batch.picks]
        )
        draws = batch.draws
        if draws is None:
            draws = torch.rand(len(batch.picks), dtype=torch.float64, device=hidden.device)
        corrupted = self.corrupt(batch, self.sample(hidden, draws))
        detected = torch.func.functional_call(self.discriminator, self._tables(), (corrupted,))
        detected.losses["rtd"].weight = self.rtd_weight
        return Output(losses={"mlm": Loss(*predicted), **detected.losses})

    def label_counts(self, batch: Batch) -> dict[str, int]:
        """See `MaskedLM.label_counts`; the discriminator predicts for every token of the text."""
        return {"mlm": number_of_labels(batch.labels), "rtd": int(batch.cu_seqlens[-1])}

    @torch.no_grad()
    def sample(self, hidden: torch.Tensor, draws: torch.Tensor) -> torch.Tensor:
        """Tokens of the generator's distributions at the hidden states [M, E] of its transform: int64 [M].

        draws: float64 [M] in [0, 1). Each is looked up in the cumulative distribution, so a token depends only on its
        own draw and hidden state. Only some rows of logits are in memory at a time.
        """
        weight, tokens = self.generator.encoder.embeddings.word.weight, []
        rows = max(1, 2**25 // len(weight))
        for some, draw in zip(hidden.split(rows), draws.split(rows)):
            shares = ops.linear(some, weight, self.generator.vocabulary_bias).float().softmax(-1)
            # integers: their sums do not depend on the order in which a device adds
            sums = shares.mul_(2**30).round_().to(torch.int32).cumsum(-1, dtype=torch.int32)
            target = (draw * sums[:, -1]).to(torch.int32)
            tokens.append(torch.searchsorted(sums, target[:, None], right=True)[:, 0])
        return torch.cat(tokens).clamp_(max=len(weight) - 1)

    def corrupt(self, batch: Batch, tokens: torch.Tensor) -> Batch:
        """The discriminator's input for a masked packing.Batch: its text with `tokens`, int64 [M], at the picks.

        Labels are 1 where a token has changed, 0 at all other tokens, special ones included, -100 past the last.
        """
        text = batch.input_ids.where(batch.labels == -100, batch.labels)
        # a batch of fixed capacity has unused picks
        tokens = tokens.where(batch.labels[batch.picks] != -100, text[batch.picks])
        input_ids = text.index_put((batch.picks,), tokens)
        is_token = torch.arange(len(text), device=text.device) < batch.cu_seqlens[-1]
        return dataclasses.replace(
            batch, input_ids=input_ids, labels=(input_ids != text).long().where(is_token, -100), picks=None,
            seed=None if batch.seed is None else batch.seed ^ _OTHER_DROPOUT,
        )  # fmt: skip

    def _tables(self):
        """The discriminator's parameters that are sums."""
        ours, theirs = (dict(model.named_parameters()) for model in (self.discriminator, self.generator))
        return {name: theirs[name].detach() + ours[name] for name in self._sums}

    def detector(self) -> ReplacedTokenDetector:
        """A ReplacedTokenDetector with complete tables; it shares all other weights with this model."""
        with torch.device("meta"):
            detector = ReplacedTokenDetector(self.config)
        with torch.no_grad():
            tensors = self.discriminator.state_dict() | self._tables()
        detector.load_state_dict(tensors, assign=True)
        return detector.train(self.training)

    @classmethod
    def from_pretrained(
        cls, directory: str | os.PathLike, *, embedding_sharing: str | None = None, rtd_weight: float = 50.0,
        revision: str | None = None,
    ) -> "Self":  # fmt: skip
        """From what `save_pretrained` writes: a detector's directory with its generator in the folder `generator`.

        directory: or OWNER/NAME on the HuggingFace hub, at `revision` (a branch, tag or commit).
        """
        directory = hf_files.local(directory, revision, folders=(GENERATOR,))
        configs = [hf_files.read_config(place / "config.json") for place in (directory, directory / GENERATOR)]
        model = cls(*configs, embedding_sharing=embedding_sharing, rtd_weight=rtd_weight)
        model.load_state_dict(model.stored(directory))
        return model.eval()

    def save_pretrained(self, directory: str | os.PathLike) -> None:
        """Write the detector, with complete tables, into a directory, and the generator into its folder `generator`."""
        self.detector().save_pretrained(directory)
        self.generator.save_pretrained(Path(directory) / GENERATOR)

    def stored(self, directory: str | os.PathLike) -> dict[str, torch.Tensor]:
        """See `Model.stored`."""
        generator = MaskedLM.from_pretrained(Path(directory) / GENERATOR).state_dict()
        discriminator = ReplacedTokenDetector.from_pretrained(directory).state_dict()
        for name in self._sums:
            discriminator[name] = discriminator[name] - generator[name]
        parts = (("generator", generator), ("discriminator", discriminator))
        return {f"{part}.{name}": tensor for part, state in parts for name, tensor in state.items()}

    def inexact(self) -> dict[str, torch.Tensor]:
        """See `Model.inexact`: of tables that are a sum, the sum was written."""
        own = dict(self.named_parameters())
        return {name: own[name] for name in (f"discriminator.{name}" for name in self._sums)}
