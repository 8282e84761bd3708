"""Attention by distance where a padded row has gaps: padding between its tokens.

Inside the library a sequence's tokens stand next to each other, so a kernel takes how far apart two of them are from
their rows. With padding between them (a mask such as 1 1 0 1) models that look at distances, by windows or relative
positions, mean the distance of columns. That is rare, and done here plainly: one sequence after the other, in PyTorch.
"""

import torch

from . import reference


def attention(
    q, k, v, cu_seqlens, columns, *, window=None, position_scores=None, scale=None, dropout_p=0.0, seed=None, offset=0
):
    """As `reference.attention`, for q, k, v [T, H, K], where token t of its sequence stands in column `columns[t]`.

    columns: int64 [T], ascending within a sequence. position_scores: a function of q, k [L, H, K] and the distances
    [L, L], query's column less key's, that gives scores [H, L, L] to add before `scale`.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    heads = torch.arange(q.shape[1], device=q.device)[:, None]
    outs, starts = [], cu_seqlens.tolist()
    for start, end in zip(starts, starts[1:]):
        queries, keys, values = (x[start:end] for x in (q, k, v))
        distance = columns[start:end, None] - columns[None, start:end]
        scores = torch.einsum("ihk,jhk->hij", queries, keys)
        if position_scores is not None:
            scores = scores + position_scores(queries, keys, distance)
        scores = scores * scale
        if window is not None:
            scores = scores.masked_fill(distance.abs() > window, float("-inf"))
        p = torch.softmax(scores, -1)
        if dropout_p > 0.0:
            rows = torch.arange(start, end, device=q.device)
            keep = reference.attention_keep_mask(rows, heads, end - start, seed, offset, dropout_p)
            p = reference.drop(p, keep, dropout_p)
        outs.append(torch.einsum("hij,jhk->ihk", p, values))
    outs.append(torch.zeros_like(q[starts[-1] :]))
    return torch.cat(outs)


def relative_scores(pos_key, pos_query, index):
    """The `position_scores` of disentangled attention: pos_key, pos_query [P, H, K] or None; index: distance -> row."""

    def scores(q, k, distance):
        rows = index(distance).expand(q.shape[1], -1, -1)
        total = 0.0
        if pos_key is not None:
            total = total + torch.einsum("ihk,phk->hip", q, pos_key).gather(2, rows)
        if pos_query is not None:
            total = total + torch.einsum("jhk,phk->hpj", k, pos_query).gather(1, rows)
        return total

    return scores
