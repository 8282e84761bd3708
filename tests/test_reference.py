"""The reference is the specification: checked in float64 against finite differences and plain PyTorch."""

import functools

import pytest
import torch
import torch.nn.functional as F
from helpers import cu_seqlens_of

from fastbert import reference

SEED = torch.tensor([2**40 + 17])
# along one direction: element by element takes minutes
gradcheck = functools.partial(torch.autograd.gradcheck, fast_mode=True)
LENGTHS = [3, 0, 4, 1, 4]


def double(*shape):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("packed", [True, False], ids=["packed", "separate"])
def test_attention_gradients(dropout_p, packed):
    cu_seqlens = cu_seqlens_of(LENGTHS, "cpu")
    T = sum(LENGTHS) + 2  # two rows of slack

    def run(q, k=None, v=None):
        return reference.attention(q, k, v, cu_seqlens, 4, dropout_p=dropout_p, seed=SEED, offset=3)

    assert gradcheck(run, (double(T, 3, 2, 5),) if packed else tuple(double(T, 2, 5) for _ in range(3)))


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
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_attention_of_some_rows(rows, dropout_p):
    """Asking for some rows gives these rows of the full result; with dropout, gradients still follow the values."""
    cu_seqlens = cu_seqlens_of(LENGTHS, "cpu")
    rows = torch.tensor(rows, dtype=torch.int64)
    cu_q = torch.searchsorted(rows, cu_seqlens.long()).to(torch.int32)
    q, kv = double(12, 2, 5), double(12, 2, 2, 5)

    def some(q, kv):
        return reference.attention(
            q[rows], kv, None, cu_seqlens, 4, cu_seqlens_q=cu_q, max_seqlen_q=4, dropout_p=dropout_p, seed=SEED
        )

    if dropout_p == 0.0:
        everything = reference.attention(q, kv[:, 0], kv[:, 1], cu_seqlens, 4)
        torch.testing.assert_close(some(q, kv), everything[rows])
    if len(rows):
        assert gradcheck(some, (q, kv))


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("with_residual", [False, True], ids=["plain", "residual"])
def test_layer_norm_gradients(dropout_p, with_residual):
    def run(x, weight, bias, residual=None):
        return reference.layer_norm(x, weight, bias, residual=residual, dropout_p=dropout_p, seed=SEED, offset=1)

    assert gradcheck(run, (double(5, 7), double(7), double(7), *([double(5, 7)] if with_residual else [])))


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_gelu_gradients(approximate):
    assert gradcheck(lambda x, b: reference.bias_gelu(x, b, approximate=approximate), (double(5, 7), double(7)))
    assert gradcheck(
        lambda *a: reference.gelu_layer_norm(*a, approximate=approximate),
        (double(5, 7), double(7), double(7), double(7)),
    )


def test_embedding_gradients():
    ids, positions, types = torch.tensor([1, 4, 1, 3, 1]), torch.tensor([0, 1, 0, 1, 2]), torch.tensor([0, 0, 1, 1, 0])
    tables = (double(6, 7), double(3, 7), double(2, 7), double(7), double(7))
    assert gradcheck(
        lambda *a: reference.embedding(ids, positions, types, *a, dropout_p=0.3, seed=SEED, offset=1), tables
    )


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
    assert gradcheck(lambda *a: run(*a)[0], (hidden, weight, bias))
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
