"""The reference is the specification: checked in float64 against plain PyTorch; its gradients: test_recompute.py."""

import pytest
import torch
from helpers import cu_seqlens_of

from fastbert import reference

LENGTHS = [3, 0, 4, 1, 4]


def double(*shape):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("lengths", [LENGTHS, [40, 16, 17, 1, 33, 0, 32, 47]], ids=["short", "long"])
def test_attention_is_softmax_within_each_sequence(lengths):
    cu_seqlens = cu_seqlens_of(lengths, "cpu")
    q, k, v = (torch.randn(sum(lengths) + 2, 2, 5, dtype=torch.float64) for _ in range(3))
    for tensor in (q, k, v):
        tensor[-2:] = float("nan")  # slack is never read
    out = reference.attention(q, k, v, cu_seqlens, max(lengths), scale=0.7)
    start = 0
    for length in lengths:
        rows = slice(start, start + length)
        for h in range(2):
            expected = torch.softmax(0.7 * q[rows, h] @ k[rows, h].T, -1) @ v[rows, h]
            torch.testing.assert_close(out[rows, h], expected)
        start += length
    assert (out[start:] == 0).all()


@pytest.mark.parametrize("rows", [[0, 2, 3, 7, 8], [7], []], ids=str)
def test_attention_of_some_rows(rows):
    """With fewer query rows the result is these rows of the full result."""
    cu_seqlens = cu_seqlens_of(LENGTHS, "cpu")
    rows = torch.tensor(rows, dtype=torch.int64)
    cu_seqlens_q = torch.searchsorted(rows, cu_seqlens.long()).to(torch.int32)
    q, kv = double(12, 2, 5), double(12, 2, 2, 5)
    some = reference.attention(q[rows], kv, None, cu_seqlens, 4, cu_seqlens_q=cu_seqlens_q, max_seqlen_q=4)
    everything = reference.attention(q, kv[:, 0], kv[:, 1], cu_seqlens, 4)
    torch.testing.assert_close(some, everything[rows])
