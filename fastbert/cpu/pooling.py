"""Pooling on a CPU, all sequences at the same time."""

import torch

from .. import reference


def pooling(hidden, cu_seqlens, *, mode="mean", normalize=False, eps=1e-12, dtype=None):
    reference.check_pooling(mode)
    starts = cu_seqlens.tolist()
    lengths = [end - start for start, end in zip(starts, starts[1:])]
    # a slice of everything would copy the gradient
    rows = hidden if starts[-1] == len(hidden) else hidden[: starts[-1]]
    rows, sizes = rows.to(reference.wide(hidden.dtype)), [1]
    match mode:
        case "cls" | "lasttoken":
            picked = starts[:-1] if mode == "cls" else [end - 1 for end in starts[1:]]
            picked = torch.tensor([row for row, n in zip(picked, lengths) if n], dtype=torch.int64, device=rows.device)
            pooled = _sums(rows.index_select(0, picked), [min(n, 1) for n in lengths])
        case "max":
            pooled = _maxima(rows, lengths)
        case "mean":
            pooled, sizes = _sums(rows, lengths), lengths
        case "mean_sqrt_len_tokens":
            pooled, sizes = _sums(rows, lengths), [n**0.5 for n in lengths]
        case "weightedmean":
            before = torch.tensor(starts[:-1], device=rows.device).index_select(0, _sequences(lengths, rows.device))
            weights = torch.arange(1, len(rows) + 1, device=rows.device) - before
            pooled, sizes = _sums(rows * weights[:, None], lengths), [n * (n + 1) / 2 for n in lengths]
    # the sum of an empty sequence is 0 already; before normalising, sizes only matter for eps
    divisor = [(eps if normalize else 1) * (size or 1) for size in sizes]
    # one number for all sequences is faster than a tensor
    divisor = divisor[0] if len(set(divisor)) == 1 else pooled.new_tensor(divisor)[:, None]
    if normalize:
        divisor = torch.linalg.vector_norm(pooled, dim=-1, keepdim=True).clamp(min=divisor)
    pooled = pooled / divisor
    return pooled.to(dtype or hidden.dtype)


def _sequences(lengths, device):
    """int64 [T]: the sequence of each row."""
    return torch.repeat_interleave(torch.tensor(lengths, dtype=torch.int64, device=device))


def _sums(rows, lengths):
    """[B, D]: the sum of each sequence's rows, 0 for an empty sequence."""
    if lengths and min(lengths) == max(lengths) > 0:
        return rows.reshape(len(lengths), lengths[0], -1).sum(1)
    return rows.new_zeros(len(lengths), rows.shape[1]).index_add(0, _sequences(lengths, rows.device), rows)


def _maxima(rows, lengths):
    """[B, D]: the maximum of each column of a sequence, 0 for an empty sequence."""
    if lengths and min(lengths) == max(lengths) > 0:
        return rows.reshape(len(lengths), lengths[0], -1).max(1).values
    return MaximaFunction.apply(rows, _sequences(lengths, rows.device), len(lengths))


class MaximaFunction(torch.autograd.Function):
    """The column maxima of B sequences, 0 for an empty one. Of equal maxima the first gets the gradient.

    rows [T, D]; sequence: int64 [T], the sequence of each row.
    """

    @staticmethod
    def forward(ctx, rows, sequence, B):
        places = sequence[:, None].expand_as(rows)
        highest = rows.new_zeros(B, rows.shape[1]).scatter_reduce_(0, places, rows, "amax", include_self=False)
        ctx.save_for_backward(rows, sequence, highest)
        return highest

    @staticmethod
    def backward(ctx, dhighest):
        rows, sequence, highest = ctx.saved_tensors
        T = len(rows)
        # a NaN is the maximum, and equals nothing
        is_highest = (rows == highest.index_select(0, sequence)) | rows.isnan()
        # a dtype that is fast in scatter_reduce and can hold every row number
        dtype = torch.float32 if T < 2**24 else torch.float64
        number = torch.arange(T, dtype=dtype, device=rows.device)[:, None].where(is_highest, T)
        first = number.new_full(highest.shape, T)
        first.scatter_reduce_(0, sequence[:, None].expand_as(rows), number, "amin")
        # row T is for sequences without rows
        drows = dhighest.new_zeros(T + 1, rows.shape[1]).scatter_(0, first.long(), dhighest)
        return drows[:T], None, None
