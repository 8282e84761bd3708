"""Cross-entropy of a linear layer on a CPU: loss and gradients in one pass, with the logits of some rows at a time."""

import torch

from .. import reference
from .autograd import derivatives, runs_by_autograd
from .matmul import matmul

# rows whose logits are held at once
ROWS = 1024


class MaskedCrossEntropyFunction(torch.autograd.Function):
    """Loss and gradients of the picked rows in one pass over chunks of rows, so that [M, V] is never in memory.

    The backward computes the last chunk's share of the weight gradient, usually all of it. Until then the gradient of
    the logits takes less memory.
    """

    @staticmethod
    def forward(ctx, hidden, weight, bias, labels, ignore_index, label_smoothing, wants, excluded):
        has_label = labels != ignore_index
        count = has_label.sum()
        picked, is_complete = _pick(has_label, count)
        loss_sum = torch.zeros((), dtype=reference.wide(hidden.dtype), device=hidden.device)
        correct = torch.zeros((), dtype=torch.int64, device=hidden.device)
        dbias = loss_sum.new_zeros(len(weight)) if wants[2] else None
        drows, earlier = [], None
        # dlogits and rows of the last chunk
        last = hidden.new_zeros(0, len(weight)), hidden.new_zeros(0, hidden.shape[1])
        M = len(labels if picked is None else picked)
        for start in range(0, M, ROWS):
            chunk = slice(start, start + ROWS)
            chunk = chunk if picked is None else picked[chunk]
            rows, target, labelled = hidden[chunk], labels[chunk].long(), None
            if not is_complete:
                labelled = has_label[chunk, None]
                rows = rows.where(labelled, 0)
            logits = matmul(rows, weight.t(), bias)
            if excluded is not None:
                _exclude(logits, excluded, chunk, len(labels))
            losses, is_right, dlogits = _softmax(logits, target, labelled, label_smoothing)
            loss_sum += losses.sum()
            correct += is_right.sum()
            if not any(wants):
                continue
            _dlogits(dlogits, target, labelled, label_smoothing)
            if wants[2]:
                dbias += dlogits.sum(0)
            dlogits = dlogits.to(rows.dtype)
            if wants[0]:
                drows.append(matmul(dlogits, weight))
            last = dlogits, rows
            if wants[1] and start + ROWS < M:
                share = _word_sums(dlogits, rows).to(loss_sum.dtype)
                earlier = share if earlier is None else earlier.add_(share)
        if any(wants):
            drows = drows[0] if len(drows) == 1 else torch.cat(drows) if drows else last[1]
            ctx.save_for_backward(
                hidden, weight, bias, labels, picked, drows, dbias, earlier, *(last if wants[1] else (None, None))
            )
        ctx.wants, ctx.options = wants, dict(ignore_index=ignore_index, label_smoothing=label_smoothing)
        ctx.excluded = excluded
        ctx.mark_non_differentiable(count, correct)
        return loss_sum, count, correct

    @staticmethod
    def backward(ctx, dloss, dcount, dcorrect):
        hidden, weight, bias, labels, picked, drows, dbias, earlier, dlogits, rows = ctx.saved_tensors
        if runs_by_autograd(dloss):
            op, options, inputs = reference.masked_cross_entropy, ctx.options, (hidden, weight, bias)
            if ctx.excluded is not None:
                op, inputs = reference.contrastive_cross_entropy, (hidden, weight)
                options = dict(ignore_index=options["ignore_index"], excluded=ctx.excluded)
            found = derivatives(lambda *inputs: op(*inputs, labels, **options)[0], inputs, dloss)
            return *found, *[None] * (8 - len(found))
        # one dimension: a 0-dimensional tensor would be rounded to half precision in a product with it
        dloss = dloss.reshape(1)
        dhidden = dweight = None
        if ctx.wants[0]:
            dhidden = (drows * dloss).to(drows.dtype)
            if picked is not None:
                dhidden = torch.zeros_like(hidden).index_copy_(0, picked, dhidden)
        if ctx.wants[1]:
            # the factor goes into the smaller tensor, unless fp16 might not hold it there
            if rows.dtype == torch.float16:
                dweight = _word_sums(dlogits, rows) * dloss
            else:
                dweight = _word_sums(dlogits, rows * dloss.to(rows.dtype))
            dweight = (dweight if earlier is None else (earlier * dloss).add_(dweight)).to(weight.dtype)
        dbias = (dbias * dloss).to(bias.dtype) if ctx.wants[2] else None
        return dhidden, dweight, dbias, None, None, None, None, None


def _pick(has_label, count):
    """(picked, is_complete): the rows to compute (None: all), and whether all these rows have a label."""
    # torch.compile cannot read the count; and if most rows are picked, a constant number of rows, as in packed batches,
    # saves more time than leaving a few out
    if torch.compiler.is_compiling():
        return None, False
    if (number := int(count)) > 0.75 * len(has_label):
        return None, number == len(has_label)
    return has_label.nonzero()[:, 0], True


def _exclude(logits, pairs, chunk, M):
    """Write -inf to the logits of `pairs`, int64 [P, 2], of a row of M and a column. chunk: the rows of the logits."""
    place = torch.full((M,), -1)
    place[chunk] = torch.arange(len(logits))
    rows = place[pairs[:, 0].clamp(max=M - 1)].where(pairs[:, 0] < M, -1)
    # no boolean index, whose size torch.compile does not know: what is not here adds 0
    off = logits.new_zeros(len(pairs)).masked_fill_(rows >= 0, -float("inf"))
    logits.index_put_((rows.clamp(min=0), pairs[:, 1].where(rows >= 0, 0)), off, accumulate=True)


def _place(target, V):
    """(labels clamped to the vocabulary, int64 [rows, 1]; whether they were inside it)."""
    place = target[:, None].clamp(0, V - 1)
    return place, place == target[:, None]


def _softmax(logits, target, labelled, label_smoothing):
    """(losses [rows, 1], whether the prediction is right, probabilities in place of the logits).

    labelled: bool [rows, 1], the rows that count, or None for all. With a large vocabulary each pass over the logits
    takes a notable part of their product's time, so passes are few.
    """
    # before half precision is widened: half the bytes
    maximum, best = logits.max(-1, keepdim=True)
    maximum, logits = (x.to(reference.wide(x.dtype)) for x in (maximum, logits))
    place, inside = _place(target, logits.shape[1])
    # a label outside the vocabulary gives NaN
    at_label = logits.gather(1, place).where(inside, float("nan"))
    # relative to the largest logit, so that the loss of a row of large logits keeps its digits
    over = maximum - at_label
    if label_smoothing:
        mean = logits.sum(-1, keepdim=True) / logits.shape[1]
        over = (1 - label_smoothing) * over + label_smoothing * (maximum - mean)
    # in place on a CPU, where torch reads each number before it writes there
    is_here = logits.device.type == "cpu" and not torch.compiler.is_compiling()
    probabilities = torch.softmax(logits, -1, out=logits if is_here else None)
    # the numerator at the largest logit is 1, so its probability is 1 / total
    losses, is_right = over - probabilities.gather(1, best).log(), best == target[:, None]
    if labelled is not None:
        losses, is_right = losses.masked_fill(~labelled, 0), is_right & labelled
    return losses, is_right, probabilities


def _dlogits(probabilities, target, labelled, label_smoothing):
    """Turn probabilities [rows, V] into the gradient of the logits, in place."""
    place, inside = _place(target, probabilities.shape[1])
    at_label = inside.to(probabilities.dtype).mul_(label_smoothing - 1)
    if labelled is not None:
        labelled = labelled.to(probabilities.dtype)
        probabilities.mul_(labelled)
        at_label.mul_(labelled)
    if label_smoothing:
        even = label_smoothing / probabilities.shape[1]
        probabilities.sub_(even if labelled is None else even * labelled)
    probabilities.scatter_add_(1, place, at_label)


def _word_sums(dlogits, rows):
    """dlogitsᵀ rows. fp16 is computed in fp32: a sum over thousands of rows may overflow."""
    if rows.dtype == torch.float16:
        dlogits, rows = dlogits.float(), rows.float()
    return matmul(dlogits.t(), rows.to(dlogits.dtype))


def masked_cross_entropy(hidden, weight, bias, labels, *, ignore_index=-100, label_smoothing=0.0):
    return _cross_entropy(hidden, weight, bias, labels, ignore_index, label_smoothing)


def _cross_entropy(hidden, weight, bias, labels, ignore_index, label_smoothing=0.0, excluded=None):
    # checked here: inside a Function gradients look disabled, and needs_input_grad ignores no_grad
    enabled = torch.is_grad_enabled()
    wants = [enabled and x is not None and x.requires_grad for x in (hidden, weight, bias)]
    return MaskedCrossEntropyFunction.apply(
        hidden, weight, bias, labels, ignore_index, label_smoothing, wants, excluded
    )  # fmt: skip


def contrastive_cross_entropy(
    query, document, labels=None, *, scale=1.0, symmetric=False, excluded=None, ignore_index=-100
):  # fmt: skip
    # fp32 or wider: a scale magnifies rounding errors
    query, document = (x.to(reference.wide(query.dtype)) for x in (query, document))
    numbers = torch.arange(len(query), device=query.device)
    if labels is None:
        labels, ignore_index = numbers, -1
    picked = labels != ignore_index
    # a query without a label may hold anything
    query = query.masked_fill(~picked[:, None], 0.0)
    forward = _cross_entropy(query * scale, document, None, labels, ignore_index, excluded=excluded)
    if not symmetric:
        return forward
    own = document.index_select(0, labels.masked_fill(~picked, 0))
    # nor is it a negative
    absent = query.new_zeros(len(query)).masked_fill(~picked, -float("inf"))
    numbers = numbers.masked_fill(~picked, -1)
    if excluded is not None:
        # without labels: pairs of a query and its negative have no counterpart
        excluded, absent = excluded.flip(1), None
    backward = _cross_entropy(own * scale, query, absent, numbers, -1, excluded=excluded)
    return (forward[0] + backward[0]) / 2, *forward[1:]
