"""DeBERTa's attention on a CPU: scores of relative positions by products with bands of the position tables."""

import functools

import torch

from .. import reference
from .autograd import derivatives, runs_by_autograd
from .dropout import attention_keep_mask, drop
from .groups import TakeFunction, arrange, groups, no_rows

# elements of [H, G, L, L] at a time, so that several such tensors fit in cache; rows of L per product with a table
_SCORES_AT_ONCE, _RELATIVE_ROWS = 2**20, 64


def disentangled_attention(
    q, k, v, pos_key, pos_query, cu_seqlens, max_seqlen, *,
    position_buckets=0, max_relative_positions, scale=None, dropout_p=0.0, seed=None, offset=0,
):  # fmt: skip
    tables = [x for x in (pos_key, pos_query) if x is not None]
    scale = (q.shape[-1] * (1 + len(tables))) ** -0.5 if scale is None else scale
    if k is not None:
        q = torch.stack(reference.apart(q, k, v), 1)
    starts = tuple(cu_seqlens.tolist())
    batches, places, _ = groups(starts, starts, len(q), len(q), q.device)
    outs = []
    for group, qkv in zip(batches, arrange(q, *places, batches, "length")):
        L = group.length
        index = _index(L, position_buckets, max_relative_positions).to(q.device)
        key_table = None if pos_key is None else pos_key.index_select(0, index).transpose(0, 1)
        query_table = None if pos_query is None else pos_query.index_select(0, index).transpose(0, 1) * scale
        queries, keys, values = qkv.permute(2, 3, 0, 1, 4).contiguous().unbind(0)
        row = group.start_q[:, None] + torch.arange(L, device=q.device)
        parts = []
        # as many heads at a time as fit their scores in cache
        at_once = max(_SCORES_AT_ONCE // (group.members * L * L), 1)
        for head in torch.arange(q.shape[2], device=q.device).split(at_once):
            heads = slice(head[0], head[-1] + 1)
            scores = DisentangledScoresFunction.apply(
                queries[heads] * scale, keys[heads], *(x if x is None else x[heads] for x in (key_table, query_table))
            )
            if group.mask is not None:
                scores = scores.masked_fill_(~group.mask.transpose(0, 1), float("-inf"))
            probabilities = torch.softmax(scores, dim=-1)
            if dropout_p > 0.0:
                keep = attention_keep_mask(row, head[:, None, None], L, seed, offset, dropout_p)
                probabilities = drop(probabilities, keep, dropout_p)
            parts.append(probabilities @ values[heads])
        outs.append(torch.cat(parts).permute(1, 2, 0, 3).flatten(0, 1))
    rows = torch.cat(outs) if outs else no_rows(q, q, pos_key, pos_query)
    return TakeFunction.apply(rows, *reversed(places))


@functools.lru_cache(maxsize=64)
# the first call may come in inference mode and a later one in training
@torch.inference_mode(False)
def _index(length, position_buckets, max_relative_positions):
    return reference.relative_index(length, position_buckets, max_relative_positions)


class DisentangledScoresFunction(torch.autograd.Function):
    """q_i · k_j + q_i · key_table[i - j] + k_j · query_table[i - j]: [H, G, L, L] for q and k [H, G, L, K].

    Tables are [H, 2 L - 1, K], from i - j = 1 - L on, or None.
    """

    @staticmethod
    def forward(ctx, q, k, key_table, query_table):
        ctx.save_for_backward(q, k, key_table, query_table)
        scores = q @ k.transpose(-1, -2)
        if key_table is not None:
            _add_relative(scores, q, key_table.flip(1))
        if query_table is not None:
            _add_relative(scores.transpose(-1, -2), k, query_table)
        return scores

    @staticmethod
    def backward(ctx, dscores):
        q, k, key_table, query_table = ctx.saved_tensors
        if runs_by_autograd(dscores):
            return tuple(derivatives(_scores, ctx.saved_tensors, dscores))
        dq, dk = dscores @ k, dscores.transpose(-1, -2) @ q
        dkey_table = dquery_table = None
        if key_table is not None:
            dkey_table = _relative_gradient(dscores, q, key_table.flip(1), dq).flip(1)
        if query_table is not None:
            dquery_table = _relative_gradient(dscores.transpose(-1, -2), k, query_table, dk)
        return dq, dk, dkey_table, dquery_table


def _scores(q, k, key_table, query_table):
    """The same, by products with the whole tables."""
    L = q.shape[2]
    position = torch.arange(L, device=q.device)
    distance = (position[:, None] - position + L - 1).expand(*q.shape[:2], L, L)
    scores = q @ k.transpose(-1, -2)
    if key_table is not None:
        scores = scores + (q @ key_table[:, None].transpose(-1, -2)).gather(3, distance)
    if query_table is not None:
        scores = scores + (query_table[:, None] @ k.transpose(-1, -2)).gather(2, distance)
    return scores


def _add_relative(scores, x, table):
    """scores[i, j] += x_i · table[j - i + L - 1], for scores [H, G, L, L], x [H, G, L, K] and table [H, 2 L - 1, K]."""
    H, G, L, K = x.shape
    for rows, columns in _relative_blocks(L):
        band = x[:, :, rows].reshape(H, -1, K) @ table[:, columns].transpose(1, 2)
        scores[:, :, rows] += _skewed(band.unflatten(1, (G, -1)), L)


def _relative_gradient(dscores, x, table, dx):
    """The gradient of `table` in _add_relative. The gradient of x is added to `dx`."""
    H, G, L, K = x.shape
    dtable = torch.zeros_like(table)
    for rows, columns in _relative_blocks(L):
        dband = x.new_zeros(H, G, rows.stop - rows.start, columns.stop - columns.start)
        _skewed(dband, L).copy_(dscores[:, :, rows])
        dband = dband.flatten(1, 2)
        dx[:, :, rows] += (dband @ table[:, columns]).unflatten(1, (G, -1))
        dtable[:, columns] += dband.transpose(1, 2) @ x[:, :, rows].reshape(H, -1, K)
    return dtable


def _relative_blocks(length):
    """Yields (slice of rows, slice of the table's columns that they need)."""
    for start in range(0, length, _RELATIVE_ROWS):
        end = min(start + _RELATIVE_ROWS, length)
        yield slice(start, end), slice(length - end, 2 * length - 1 - start)


def _skewed(band, length):
    """A view [..., R, length] of `band` [..., R, length + R - 1]: each row starts one column further left."""
    *others, stride, _ = band.stride()
    return band.as_strided((*band.shape[:-1], length), (*others, stride - 1, 1), band.shape[-2] - 1)
