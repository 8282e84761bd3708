"""What the ops of retrieval models mean, in plain PyTorch; see `reference.py`."""

import torch
import torch.nn.functional as F


def vocabulary_max(hidden, weight, bias, cu_seqlens, max_seqlen):
    """A weight for each word of the vocabulary: log(1 + relu(max over a text's tokens of hidden @ weightᵀ + bias)).

    hidden [T, D], weight [V, D], bias [V] or None. Sequence b has rows cu_seqlens[b] to cu_seqlens[b+1] (int32 [B+1])
    and at most `max_seqlen` of them. Rows past the last sequence are not read and get a gradient of 0. An empty
    sequence gives 0. Of equal maxima the first gets the gradient. Returns [B, V] in hidden's dtype. Source: Formal et
    al. 2021 (SPLADE v2), equation 6.
    """
    starts = cu_seqlens.tolist()
    logits = F.linear(hidden[: starts[-1]], weight, bias).to(torch.promote_types(hidden.dtype, torch.float32))
    highest = [logits[:0]]
    for start, end in zip(starts, starts[1:]):
        rows = logits[start:end]
        highest.append(rows.max(0).values[None] if end > start else logits.new_zeros(1, len(weight)))
    # without any token every argument still gets a gradient of 0
    return torch.log1p(torch.relu(torch.cat(highest))).to(hidden.dtype) + logits[:0].sum().to(hidden.dtype)
