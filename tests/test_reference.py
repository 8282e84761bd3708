"""The reference is the specification: checked in float64 against plain PyTorch; its gradients: test_recompute.py."""

import pytest
import torch
import torch.nn.functional as F
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


def test_embedding_padding_row_gets_no_gradient():
    ids = torch.tensor([0, 1])
    tables = (double(6, 7), double(3, 7), double(2, 7), double(7), double(7))
    reference.embedding(ids, ids, ids, *tables, padding_idx=0).square().sum().backward()
    assert (tables[0].grad[0] == 0).all() and (tables[0].grad[1] != 0).any()


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize(
    "labels",
    [[1, -100, 3, 6, -100, 0], [1, 3, 6, -100, 4, 0], [-100] * 6, [2] * 6],
    ids=["some", "most", "none", "all"],
)
def test_masked_cross_entropy(labels, label_smoothing):
    labels = torch.tensor(labels)
    hidden, weight, bias = double(6, 4), double(7, 4), double(7)
    run = lambda *a: reference.masked_cross_entropy(*a, labels, label_smoothing=label_smoothing)  # noqa: E731
    loss_sum, count, correct = run(hidden, weight, bias)
    logits = F.linear(hidden, weight, bias)
    expected = F.cross_entropy(logits, labels, reduction="sum", label_smoothing=label_smoothing)
    torch.testing.assert_close(loss_sum, expected)
    picked = labels != -100
    assert count == picked.sum()
    assert correct == ((logits.argmax(-1) == labels) & picked).sum()
    # what stands in rows without a label never matters
    gradients = torch.autograd.grad(loss_sum, (hidden, weight, bias))
    poisoned = hidden.detach().where(picked[:, None], float("nan")).requires_grad_()
    again = torch.autograd.grad(run(poisoned, weight, bias)[0], (poisoned, weight, bias))
    for a, b in zip(gradients, again):
        assert torch.equal(a, b)


def test_masked_cross_entropy_honours_the_incoming_gradient_twice():
    labels = torch.tensor([1, -100, 3])
    hidden, weight, bias = double(3, 4), double(7, 4), double(7)
    loss = reference.masked_cross_entropy(hidden, weight, bias, labels)[0] * 2.5
    first = torch.autograd.grad(loss, (hidden, weight, bias), retain_graph=True)
    second = torch.autograd.grad(loss, (hidden, weight, bias))
    plain = F.cross_entropy(F.linear(hidden, weight, bias), labels, reduction="sum") * 2.5
    for a, b, c in zip(first, second, torch.autograd.grad(plain, (hidden, weight, bias))):
        assert torch.equal(a, b)
        torch.testing.assert_close(a, c)
