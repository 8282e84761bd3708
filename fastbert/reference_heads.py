"""What the ops behind the encoder mean, losses and `vocabulary_max`, in plain PyTorch. `reference.py` has them, too."""

import torch
import torch.nn.functional as F


def wide(dtype):
    """The dtype of sums: fp32, or fp64 for fp64."""
    return torch.promote_types(dtype, torch.float32)


def masked_cross_entropy(hidden, weight, bias, labels, *, ignore_index=-100, label_smoothing=0.0):
    """Cross-entropy of `hidden @ weightᵀ + bias` against `labels`, over the rows whose label is not `ignore_index`.

    hidden [M, D], weight [V, D], bias [V] or None, labels [M] int64 or int32, in 0 .. V - 1 or `ignore_index` (`ops.py`
    refuses others; here the loss is NaN). label_smoothing: as in F.cross_entropy. Returns `(loss_sum, count, correct)`,
    0-dimensional: the sum of the losses (fp32, natural log), the number of rows with a label, and the number of correct
    predictions among them (int64; of equal logits the first is the prediction). Without a label all three, and all
    gradients, are 0.
    """
    is_labelled = labels != ignore_index
    # rows without a label may hold anything, even NaN
    logits = F.linear(hidden.where(is_labelled[:, None], 0), weight, bias)
    return _cross_entropy(logits.to(wide(hidden.dtype)), labels, is_labelled, label_smoothing)


def _cross_entropy(logits, labels, is_labelled, label_smoothing=0.0):
    """(loss_sum, count, correct) of logits [M, V]."""
    V, labels = logits.shape[1], labels.long()
    log_p = torch.log_softmax(logits.where(is_labelled[:, None], 0), -1)
    at_label = log_p.gather(1, labels.clamp(0, V - 1)[:, None])[:, 0]
    losses = -at_label.where((labels >= 0) & (labels < V), float("nan"))
    if label_smoothing:
        losses = (1 - label_smoothing) * losses - label_smoothing * log_p.mean(-1)
    is_right = (logits.argmax(-1) == labels) & is_labelled if len(labels) else is_labelled
    return losses.where(is_labelled, 0).sum(), is_labelled.sum(), is_right.sum()


def contrastive_cross_entropy(
    query, document, labels=None, *, scale=1.0, symmetric=False, excluded=None, ignore_index=-100
):  # fmt: skip
    """InfoNCE: the cross-entropy of `scale * query @ documentᵀ` over the documents.

    query [B, D], document [N, D]; labels int64 [B]: the row of each query's document, or `ignore_index`; None: 0 ..
    B - 1. All other documents are negatives, but for those in excluded, int64 [P, 2]: pairs (query, document), such as
    documents that are right, too. scale: the inverse temperature, a number or a 0-dimensional tensor, which gets a
    gradient. symmetric: the mean of this and of the cross-entropy from each query's document to all queries with a
    label; with excluded, it needs labels None. Returns `(loss_sum, count, correct)`: the sum of the losses (fp32),
    the number of queries with a label, and the number of those that score their own document highest.
    """
    numbers = torch.arange(len(query), device=query.device)
    is_labelled = torch.ones_like(numbers, dtype=torch.bool) if labels is None else labels != ignore_index
    labels = numbers if labels is None else labels
    query = query.where(is_labelled[:, None], 0).to(wide(query.dtype))
    document = document.to(query.dtype)
    if torch.is_tensor(scale):
        scale = scale.to(query.dtype)
    scores = _without_pairs(query * scale @ document.T, excluded)
    forward = _cross_entropy(scores, labels, is_labelled)
    if not symmetric:
        return forward
    own = document[labels.masked_fill(~is_labelled, 0)]
    # a query without a label is not a negative
    scores = (own * scale @ query.T).masked_fill(~is_labelled, float("-inf"))
    scores = _without_pairs(scores, None if excluded is None else excluded[excluded[:, 1] < len(own)].flip(1))
    backward = _cross_entropy(scores, numbers, is_labelled)
    return (forward[0] + backward[0]) / 2, *forward[1:]


def _without_pairs(scores, pairs):
    """scores with -inf at `pairs`, int64 [P, 2]."""
    if pairs is None:
        return scores
    is_excluded = torch.zeros_like(scores, dtype=torch.bool)
    is_excluded[pairs[:, 0], pairs[:, 1]] = True
    return scores.masked_fill(is_excluded, float("-inf"))


def vocabulary_max(hidden, weight, bias, cu_seqlens, max_seqlen):
    """A weight for each word of the vocabulary: log(1 + relu(max over a text's tokens of hidden @ weightᵀ + bias)).

    hidden [T, D], weight [V, D], bias [V] or None. Sequence b has rows cu_seqlens[b] to cu_seqlens[b+1] (int32 [B+1])
    and at most `max_seqlen` of them. Rows past the last sequence are not read and get a gradient of 0. An empty
    sequence gives 0. Of equal maxima the first gets the gradient. Returns [B, V] in hidden's dtype. Source: Formal et
    al. 2021 (SPLADE v2), equation 6.
    """
    starts = cu_seqlens.tolist()
    logits = F.linear(hidden[: starts[-1]], weight, bias).to(wide(hidden.dtype))
    highest = [logits[:0]]
    for start, end in zip(starts, starts[1:]):
        rows = logits[start:end]
        highest.append(rows.max(0).values[None] if end > start else logits.new_zeros(1, len(weight)))
    # without any token every argument still gets a gradient of 0
    return torch.log1p(torch.relu(torch.cat(highest))).to(hidden.dtype) + logits[:0].sum().to(hidden.dtype)
