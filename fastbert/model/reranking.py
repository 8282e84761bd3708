"""Losses of a reranker: a SequenceClassifier with one label that reads a query and a document together.

The sequences of an example in a packing.Batch are the query with each of its documents, the positive first. `targets`,
float [B], say how well each fits. Set one of OBJECTIVES as the model's `objective`.

Letters: B pairs of a query and a document, R rows.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F

from ..packing import Batch, padded_groups
from .losses import Loss


class Binary(NamedTuple):
    """Binary cross-entropy of each pair. targets: 0 to 1."""

    def count(self, batch: Batch) -> int:
        return len(batch.targets)

    def loss(self, logits: torch.Tensor, batch: Batch) -> Loss:
        scores = logits[:, 0].float()
        losses = F.binary_cross_entropy_with_logits(scores, batch.targets, reduction="sum")
        hits = (scores > 0) == (batch.targets > 0.5)
        return Loss(losses, torch.tensor(len(scores), device=scores.device), hits.sum())


class Listwise(NamedTuple):
    """ListNet (Cao et al. 2007): cross-entropy of the softmax of a row's logits against that of its targets."""

    def count(self, batch: Batch) -> int:
        return len(batch.cu_examples) - 1

    def loss(self, logits: torch.Tensor, batch: Batch) -> Loss:
        cu = batch.cu_examples
        longest = int(cu.diff().max())
        scores, targets = (padded_groups(x.float(), cu, longest) for x in (logits[:, 0], batch.targets))
        # past the end of a row both are -inf, whose product is no number
        is_pair = ~scores.isneginf()
        losses = -(targets.softmax(-1) * scores.log_softmax(-1).where(is_pair, 0.0)).sum()
        hits = scores.argmax(-1) == targets.argmax(-1)
        return Loss(losses, torch.tensor(len(scores), device=scores.device), hits.sum())


class Margin(NamedTuple):
    """Squared error of how much more than each negative the positive scores. targets: a teacher's scores."""

    def count(self, batch: Batch) -> int:
        return len(batch.targets) - len(batch.cu_examples) + 1

    def loss(self, logits: torch.Tensor, batch: Batch) -> Loss:
        cu, scores = batch.cu_examples.long(), logits[:, 0].float()
        first = torch.repeat_interleave(cu[:-1], cu.diff(), output_size=len(scores))
        # of the positive itself both are 0
        wanted, found = (x[first] - x for x in (batch.targets, scores))
        return Loss(((found - wanted) ** 2).sum(), torch.tensor(self.count(batch), device=scores.device))


OBJECTIVES = {"binary": Binary(), "listwise": Listwise(), "margin": Margin()}
