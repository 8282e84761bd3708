"""SPLADE: a text as weights of the words of the vocabulary, most of them 0 (Formal et al. 2021), in training.

Letters: B sequences, V vocabulary.
"""

import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from .. import ops
from ..packing import Batch
from . import hf_files
from .heads import MaskedLM, Output
from .retrieval import LOSSES, Objective, in_passes, rows_of_loss
from .sentence_files import write_sparse_directory

if TYPE_CHECKING:
    # in the standard library from Python 3.11 on
    from typing_extensions import Self


class TrainedSparseEncoder(MaskedLM):
    """A MaskedLM whose forward returns weights [B, V] as logits, and with targets loss "label".

    The weight of a word is log(1 + relu(x)) of its largest logit over the text's tokens, special tokens included, as
    sentence-transformers has it. objective: see retrieval.Objective; its flops is the factor of the regulariser, the
    sum over words of the squared mean weight, of the queries and of the documents of a batch (Paria et al. 2020).
    tokens_per_pass: as of TrainedEmbedder. The files are those of a MaskedLM and of a SparseEncoder.
    """

    tokens_per_pass = 8192

    def __init__(self, config, *, objective: Objective, prompts: dict | None = None, max_length: int = 512) -> None:
        super().__init__(config)
        self.objective, self.prompts, self.max_length = objective, prompts or {}, max_length

    @classmethod
    def start(cls, directory: str | Path, config, *, dtype="fp32", **options) -> "Self":
        """The model to train, from a directory with a masked-LM head or, where there is none, fresh, with the dropouts
        of `config`. Raises ValueError for a directory without that head."""
        if not Path(directory).is_dir():
            return cls(config, **options)
        dropouts = {name: getattr(config, name) for name in ("hidden_dropout_prob", "attention_probs_dropout_prob")}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.filterwarnings("error", message=".* these start fresh")
            try:
                return hf_files.load_model(
                    lambda config: cls(config, **options), directory, head="MaskedLM", dtype=dtype, **dropouts
                )
            except UserWarning:
                raise ValueError(f"{directory} has no masked-LM head, which gives words their weights") from None

    def forward(self, batch: Batch) -> Output:
        weights = in_passes(self._weights, batch, self.tokens_per_pass)
        if batch.targets is None:
            return Output(weights)
        cu = batch.cu_examples.long()
        loss = LOSSES[self.objective.loss](self, weights, batch, cu)
        is_query = torch.zeros(len(weights), dtype=torch.bool, device=weights.device)
        is_query[cu[:-1]] = True
        flops = sum((part.float().mean(0) ** 2).sum() for part in (weights[is_query], weights[~is_query]))
        loss.sum = loss.sum + loss.count * self.objective.flops * flops
        return Output(weights, {"label": loss})

    def label_counts(self, batch: Batch) -> dict[str, int]:
        """See `MaskedLM.label_counts`."""
        return {"label": rows_of_loss(self.objective, batch)}

    def _weights(self, batch):
        hidden = self.transform(self.hidden(batch))
        word = self.encoder.embeddings.word.weight
        return ops.vocabulary_max(hidden, word, self.vocabulary_bias, batch.cu_seqlens, batch.max_seqlen)

    def save_pretrained(self, directory) -> None:
        """Write what a MaskedLM writes, and what SparseEncoder reads besides."""
        hf_files.save_model(self, directory, head="MaskedLM")
        write_sparse_directory(self, Path(directory))

    def stored(self, directory) -> dict[str, torch.Tensor]:
        return MaskedLM.from_pretrained(directory).state_dict()
