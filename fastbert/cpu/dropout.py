"""Dropout on a CPU. NumPy draws the random bits of `reference.philox` in a fraction of the time.

Four things make it fast. NumPy multiplies and shifts unsigned 64-bit words. Two 32-bit words of Philox's state are
stored in one of 64 bits, a = c0 · 2^32 + c1 and b = c2 · 2^32 + c3, so that a round is

    a, b = (b >> 32) · 0xCD9E8D57 ^ a << 32 ^ k0 << 32,  (a >> 32) · 0xD2511F53 ^ b << 32 ^ k1 << 32

The counter is (group, row, head, offset). After two rounds a and b are still the xor of a part that depends on the
group and a part that depends on row and head, so these rounds need no tensor over both. The other rounds work in place
on blocks that stay in a core's cache.
"""

import numpy as np
import torch

from .. import reference
from .autograd import in_memory, runs_by_autograd

# counters at a time: four words of 64 bits each, 512 KiB in total
_BLOCK = 2**14
_UINT32 = 0xFFFFFFFF
_HALF = np.uint64(32)
_FACTOR_A, _FACTOR_B = np.uint64(0xCD9E8D57), np.uint64(0xD2511F53)


def keep_mask(row, head, columns, seed, offset, dropout_p):
    if not in_memory(row, head, seed):
        return reference.keep_mask(row, head, columns, seed, offset, dropout_p)
    return draw(row, head, columns, seed, offset, reference.dropout_threshold(dropout_p), 1)


def attention_keep_mask(row, head, columns, seed, offset, dropout_p):
    if not in_memory(row, head, seed):
        return reference.attention_keep_mask(row, head, columns, seed, offset, dropout_p)
    return draw(row, head, columns, seed, offset, reference.dropout_threshold(dropout_p), 4)


def dropout(x, dropout_p, seed, offset=0):
    if dropout_p == 0.0:
        return x
    rows = torch.arange(len(x), device=x.device)
    return drop(x, keep_mask(rows, rows * 0, x.shape[1], seed, offset, dropout_p), dropout_p)


def drop(x, keep, dropout_p):
    return DropFunction.apply(x, keep, reference.keep_scale(dropout_p))


class DropFunction(torch.autograd.Function):
    """x * keep * scale. It saves one byte per element for backward."""

    @staticmethod
    def forward(ctx, x, keep, scale):
        ctx.save_for_backward(keep)
        ctx.scale = scale
        return DropFunction.drop(x, keep, scale)

    @staticmethod
    def backward(ctx, dout):
        (keep,) = ctx.saved_tensors
        if runs_by_autograd(dout):
            return dout * keep * ctx.scale, None, None
        return DropFunction.drop(dout, keep, ctx.scale), None, None

    @staticmethod
    def drop(x, keep, scale):
        # bytes: torch converts them with vector instructions, booleans without
        return torch.addcmul(x.new_zeros(()), x, keep.view(torch.uint8).to(x.dtype), value=scale)


def draw(row, head, columns, seed, offset, threshold, lanes):
    """The keep mask, bool [..., columns], for int64 CPU tensors `row` and `head` that broadcast to [...].

    threshold: an element is kept if its 16 bits are at least this. lanes: 1 for the column order of `keep_mask`, 4 for
    that of `attention_keep_mask`, where pairs of columns alternate between four groups.
    """
    shape = torch.broadcast_shapes(row.shape, head.shape)
    row, head = (_words((x & _UINT32).expand(shape)) for x in (row, head))
    groups = -(-columns // (8 * lanes)) * lanes
    keep = _draw(groups, row, head, int(seed), offset & _UINT32, threshold, lanes)
    return torch.from_numpy(keep).view(*shape, 8 * groups)[..., :columns]


def _words(x):
    return np.ascontiguousarray(x.numpy()).view(np.uint64).reshape(-1)


def _draw(groups, row, head, seed, offset, threshold, lanes):
    """bool [rows, 8 * groups] for row and head uint64 [rows]."""
    k0, k1 = seed & _UINT32, seed >> 32 & _UINT32
    keys = [(k0 + i * 0x9E3779B9 & _UINT32, k1 + i * 0xBB67AE85 & _UINT32) for i in range(reference.PHILOX_ROUNDS)]
    keys = [(np.uint64(k0 << 32), np.uint64(k1 << 32)) for k0, k1 in keys]
    # [lanes, 1, groups / lanes]
    group = np.arange(groups, dtype=np.uint64).reshape(-1, lanes).T[:, None]
    # after the first round one word depends on the row and one on the group, after the second a pair of each
    of_row = head * _FACTOR_A ^ row << _HALF ^ keys[0][0]
    of_group = group * _FACTOR_B ^ np.uint64(offset << 32) ^ keys[0][1]
    a_of_row, a_of_group = of_row << _HALF, (of_group >> _HALF) * _FACTOR_A ^ keys[1][0]
    b_of_row, b_of_group = (of_row >> _HALF) * _FACTOR_B, of_group << _HALF ^ keys[1][1]

    rows_at_once = max(_BLOCK // max(groups, 1), 1)
    buffers = np.empty((4, lanes, min(rows_at_once, len(row)), groups // lanes), np.uint64)
    # pairs of elements are the two halves of a 32-bit word
    out = np.empty((len(row), groups // lanes, 4, lanes), np.uint16)
    for start in range(0, len(row), rows_at_once):
        rows = slice(start, min(start + rows_at_once, len(row)))
        a, b, times_a, times_b = buffers[:, :, : rows.stop - start]
        np.bitwise_xor(a_of_group, a_of_row[rows, None], out=a)
        np.bitwise_xor(b_of_group, b_of_row[rows, None], out=b)
        for key_a, key_b in keys[2:]:
            np.right_shift(b, _HALF, out=times_a)
            np.right_shift(a, _HALF, out=times_b)
            times_a *= _FACTOR_A
            times_b *= _FACTOR_B
            a <<= _HALF
            a ^= times_a
            a ^= key_a
            b <<= _HALF
            b ^= times_b
            b ^= key_b
        for i, words in enumerate((a, b)):
            # lower half first on any machine
            halves = words.astype("<u8", copy=False).view("<u2")
            kept = (halves >= threshold).view(np.uint16)
            for lane in range(lanes):
                # c0 and c2 are the upper halves of their words
                out[rows, :, 2 * i, lane] = kept[lane, :, 1::2]
                out[rows, :, 2 * i + 1, lane] = kept[lane, :, 0::2]
    return out.view(bool)
