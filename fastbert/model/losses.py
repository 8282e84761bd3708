"""Losses of heads as sums, and how many labels they are of.

Letters: N predictions, C or K labels.
"""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

from .. import ops


@dataclass
class Loss:
    """A sum, not a mean: those of micro-batches and processes are added, then divided once by the global count.

    sum: fp32. count, correct: int64, the number of predictions and of correct ones (None in regression); with weights,
    their sums. weight: of the mean in `Output.loss`. more: other counts of the task, by name.
    """

    sum: torch.Tensor
    count: torch.Tensor
    correct: torch.Tensor | None = None
    weight: float = 1.0
    more: dict = field(default_factory=dict)


def number_of_labels(labels, weights=None):
    """The labels that are not -100, or the sum of their weights. A target of floats counts all its numbers."""
    if labels is None:
        return 0
    if weights is None:
        return labels.numel() if labels.is_floating_point() else int((labels != -100).sum())
    if labels.is_floating_point():
        return float(weights.double().sum()) * labels[:1].numel()
    return float(weights.double()[labels != -100].sum())


def classification(logits, labels, weight=1.0, name="labels", weights=None, smoothing=0.0):
    """Loss of logits [N, C] for labels int64 [N], -100 for none. weights: of the N losses, fp32 [N].

    smoothing: this share of a label's probability is spread over all labels (Szegedy et al. 2016).
    """
    ops.check_ids(name, labels, logits.shape[-1], -100)
    known, scores = labels != -100, logits.float()
    hits = (logits.argmax(-1) == labels) & known
    if weights is None:
        loss_sum = F.cross_entropy(scores, labels, reduction="sum", label_smoothing=smoothing)
        return Loss(loss_sum, known.sum(), hits.sum(), weight)
    losses = F.cross_entropy(scores, labels, reduction="none", label_smoothing=smoothing)
    weights = weights.where(known, 0.0)
    return Loss((weights * losses).sum(), weights.double().sum(), (weights * hits).sum(), weight)


def ragged_classification(scores, labels, weight=1.0, smoothing=0.0):
    """As `classification`, for rows [N, C] of different lengths: -inf where a row has ended, which is no label."""
    is_label = ~scores.isneginf()
    # -inf would give NaN as the gradient of a row without a label
    scores = scores.masked_fill(~is_label, -1e30)
    found = classification(scores, labels, weight)
    if smoothing:
        spread = -scores.log_softmax(-1).where(is_label, 0.0).sum(-1) / is_label.sum(-1).clamp(min=1)
        found.sum = (1 - smoothing) * found.sum + smoothing * spread.where(labels != -100, 0.0).sum()
    return found


def label_loss(logits, labels, config=None, weights=None, smoothing=0.0):
    """{"label": Loss}, of the kind that config.problem_type or the labels' type and shape mean; {} without labels."""
    if labels is None:
        return {}
    kind = config.problem_type if config is not None else "single_label_classification"
    if kind is None:
        kind = "multi_label_classification" if labels.is_floating_point() else "single_label_classification"
        if logits.shape[-1] == 1:
            kind = "regression"
    if kind == "single_label_classification":
        if labels.shape != logits.shape[:-1]:
            raise ValueError(f"labels have shape {tuple(labels.shape)}: expected {tuple(logits.shape[:-1])}")
        return {"label": classification(logits, labels, weights=weights, smoothing=smoothing)}
    scores, labels = logits.float(), labels.float()
    if labels.numel() != logits.numel():
        raise ValueError(f"labels have shape {tuple(labels.shape)}: expected {tuple(logits.shape)} for {kind}")
    labels = labels.view_as(scores)
    if kind == "regression":
        losses, hits = F.mse_loss(scores, labels, reduction="none"), None
    else:
        targets = labels * (1 - smoothing) + smoothing / 2
        losses = F.binary_cross_entropy_with_logits(scores, targets, reduction="none")
        hits = (scores > 0) == (labels > 0.5)
    if weights is None:
        count = torch.tensor(labels.numel(), device=labels.device)
    else:
        weights = weights[:, None].expand_as(scores)
        losses, hits, count = weights * losses, hits if hits is None else weights * hits, weights.double().sum()
    return {"label": Loss(losses.sum(), count, hits if hits is None else hits.sum())}
