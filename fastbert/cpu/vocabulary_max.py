"""The largest logit of each word over a text's tokens, on a CPU, with the logits of some words at a time."""

import warnings

import torch

from .. import reference
from .autograd import derivatives, runs_by_autograd
from .matmul import matmul

# torch says so at the first one; only its product with a dense matrix is used
warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta state")

# words whose logits are held at once
WORDS = 2048


class VocabularyMaxFunction(torch.autograd.Function):
    """Each word of a text has one token with a gradient: the backward multiplies B * V rows, not T * V logits.

    Saved: of each word and text, the row of its largest logit, and the derivative there.
    """

    @staticmethod
    def forward(ctx, hidden, weight, bias, cu_seqlens, max_seqlen):
        starts = cu_seqlens.tolist()
        rows, wide = hidden[: starts[-1]], reference.wide(hidden.dtype)
        B, V = len(starts) - 1, len(weight)
        highest = torch.full((V, B), -float("inf"), dtype=wide)
        origin = torch.zeros((V, B), dtype=torch.int32)
        for first in range(0, V, WORDS):
            words = slice(first, first + WORDS)
            # a word's logits lie side by side, so that their maximum is fast
            logits = matmul(weight[words], rows.t())
            for b, (start, end) in enumerate(zip(starts, starts[1:])):
                if end > start:
                    value, place = logits[:, start:end].max(-1)
                    highest[words, b] = value.to(wide)
                    origin[words, b] = place.int() + start
        if bias is not None:
            highest += bias.to(wide)[:, None]
        out = torch.log1p(torch.relu(highest)).t().contiguous().to(hidden.dtype)
        slope = (highest > 0) / (1 + highest.clamp_(min=0))
        ctx.save_for_backward(hidden, weight, bias, cu_seqlens, origin, slope)
        ctx.max_seqlen = max_seqlen
        return out

    @staticmethod
    def backward(ctx, dout):
        hidden, weight, bias, cu_seqlens, origin, slope = ctx.saved_tensors
        if runs_by_autograd(dout):
            op = lambda h, w, b: reference.vocabulary_max(h, w, b, cu_seqlens, ctx.max_seqlen)  # noqa: E731
            return *derivatives(op, (hidden, weight, bias), dout), None, None
        (V, B), (T, D) = slope.shape, hidden.shape
        wants = ctx.needs_input_grad
        dhidden = torch.zeros(T, D, dtype=slope.dtype) if wants[0] else None
        dweight = torch.empty_like(weight) if wants[1] else None
        dbias = torch.empty_like(bias) if wants[2] else None
        rows = hidden.to(slope.dtype)
        for first in range(0, V, WORDS):
            words = slice(first, first + WORDS)
            gradient = dout[:, words].t() * slope[words]
            places = origin[words].long()
            if wants[0]:
                vectors = weight[words].to(slope.dtype)
                for b in range(B):
                    dhidden.index_add_(0, places[:, b], vectors * gradient[:, b, None])
            if wants[1]:
                dweight[words] = _word_sums(gradient, places, rows)
            if wants[2]:
                dbias[words] = gradient.sum(-1)
        return dhidden if dhidden is None else dhidden.to(hidden.dtype), dweight, dbias, None, None


def _word_sums(gradient, places, rows):
    """[W, D]: for each word the sum over B texts of gradient [W, B] times the row of `rows` at places [W, B]."""
    W, B = gradient.shape
    ends = torch.arange(0, W * B + 1, max(B, 1))
    if not W * B or not len(rows):
        return rows.new_zeros(W, rows.shape[1])
    # a matrix with B numbers in each row; unlike scatter_add_ its product holds nothing of size W x B x D
    size = (W, len(rows))
    return _sparse(ends, places.flatten(), gradient.flatten(), size) @ rows


def _sparse(ends, columns, values, size):
    # a row may hold a column twice, and not in order: it is only multiplied
    return torch.sparse_csr_tensor(ends, columns, values, size, check_invariants=False)


def vocabulary_max(hidden, weight, bias, cu_seqlens, max_seqlen):
    return VocabularyMaxFunction.apply(hidden, weight, bias, cu_seqlens, max_seqlen)
