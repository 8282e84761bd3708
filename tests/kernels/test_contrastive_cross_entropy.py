"""contrastive_cross_entropy: kernels, CPU and reference against the formula written out, in values and gradients.

Large scores, repeats, strides, autocast and compiled calls: in the tests of all ops.
"""

import functools

import pytest
import torch
import torch.nn.functional as F
from allocations import allocations
from helpers import assert_within_budget

from fastbert import ops, reference
from fastbert.cpu import ops as cpu
from fastbert.kernels import cross_entropy
from fastbert.kernels.cross_entropy import contrastive_cross_entropy

pytestmark = pytest.mark.usefixtures("poison")

both_ops = pytest.mark.parametrize(
    "op", [contrastive_cross_entropy, cpu.contrastive_cross_entropy], ids=["kernels", "cpu"]
)
all_ops = pytest.mark.parametrize(
    "op", [contrastive_cross_entropy, cpu.contrastive_cross_entropy, reference.contrastive_cross_entropy],
    ids=["kernels", "cpu", "reference"],
)  # fmt: skip
directions = pytest.mark.parametrize("symmetric", [False, True], ids=["forward", "symmetric"])


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(cross_entropy, "ROWS", 4)


def make(B, N, D, device, dtype=torch.float32):
    """Embeddings of length 1; the first B documents are near their queries."""
    query = F.normalize(torch.randn(B, D), dim=-1)
    document = F.normalize(torch.cat((query + torch.randn(B, D) / D**0.5, torch.randn(N - B, D))), dim=-1)
    return query.to(device, dtype), document.to(device, dtype)


def leaves(*tensors):
    return [x.detach().clone().requires_grad_() for x in tensors]


def sentence_transformers_loss(query, document, scale, symmetric):
    """MultipleNegativesRankingLoss, or MultipleNegativesSymmetricRankingLoss, of normalised embeddings."""
    scores = query @ document.T * scale
    labels = torch.arange(len(scores), device=scores.device)
    forward = F.cross_entropy(scores, labels)
    if not symmetric:
        return forward
    return (forward + F.cross_entropy(scores[:, : len(query)].T, labels)) / 2


def written_out(query, document, labels, scale, symmetric, ignore_index=-100):
    """The sum over queries with a label, from the whole matrix of scores."""
    kept = labels != ignore_index
    query, labels = query[kept], labels[kept]
    loss = F.cross_entropy(query @ document.T * scale, labels, reduction="sum")
    if not symmetric:
        return loss
    own = torch.arange(len(query), device=query.device)
    return (loss + F.cross_entropy(document[labels] @ query.T * scale, own, reduction="sum")) / 2


@all_ops
@directions
@pytest.mark.parametrize("N", [7, 130], ids=["in_batch", "hard_negatives"])
def test_as_sentence_transformers(N, symmetric, op, device, small_chunks):
    query, document = make(7, N, 16, device)
    ours, theirs = leaves(query, document), leaves(query.double(), document.double())
    loss, count, correct = op(*ours, scale=20.0, symmetric=symmetric)
    expected = sentence_transformers_loss(*theirs, 20.0, symmetric)
    torch.testing.assert_close((loss / count).double(), expected, rtol=2e-6, atol=1e-6)
    best = (theirs[0] @ theirs[1].T).argmax(-1)
    assert (count.item(), correct.item()) == (7, (best == torch.arange(7, device=device)).sum().item())
    assert loss.dtype == torch.float32 and count.dtype == correct.dtype == torch.int64
    wanted = torch.autograd.grad(expected, theirs)
    for x, y in zip(torch.autograd.grad(loss / count, ours), wanted, strict=True):
        torch.testing.assert_close(x.double(), y, rtol=1e-5, atol=1e-6)


@all_ops
@directions
@pytest.mark.parametrize("ignore_index", [-100, 0])
def test_labels_say_which_document(ignore_index, symmetric, op, device, small_chunks):
    """In any order, shared by two queries, fewer than queries, or absent; and the scale is learned."""
    query, document = make(5, 5, 16, device)
    query = torch.cat((query, query.flip(0)))
    labels = torch.tensor([3, 1, ignore_index, 4, 4, 1, 2, 2, ignore_index, 3], device=device)
    inputs = (query, document, torch.tensor(15.0, device=device))
    ours, theirs = leaves(*inputs), leaves(*(x.double() for x in inputs))
    with torch.no_grad():
        ours[0][labels == ignore_index] = float("nan")
    loss, count, correct = op(*ours[:2], labels, scale=ours[2], symmetric=symmetric, ignore_index=ignore_index)
    expected = written_out(*theirs[:2], labels, theirs[2], symmetric, ignore_index)
    torch.testing.assert_close(loss.double(), expected, rtol=2e-6, atol=1e-6)
    best = (theirs[0] @ theirs[1].T).argmax(-1)
    kept = labels != ignore_index
    assert (count.item(), correct.item()) == (8, ((best == labels) & kept).sum().item())
    wanted = torch.autograd.grad(expected, theirs)
    for x, y in zip(torch.autograd.grad(loss, ours), wanted, strict=True):
        torch.testing.assert_close(x.double(), y, rtol=1e-5, atol=1e-5)


@all_ops
@directions
def test_excluded_pairs_are_no_negatives(symmetric, op, device, small_chunks):
    """As if these documents were not there for their query; in any order, in every chunk of rows."""
    query, document = make(7, 11, 16, device)
    excluded = torch.tensor([[6, 2], [0, 3], [0, 10], [5, 0], [6, 9], [0, 4]], device=device)
    ours, theirs = leaves(query, document), leaves(query.double(), document.double())
    loss, count, correct = op(*ours, scale=3.0, symmetric=symmetric, excluded=excluded)
    scores = 3.0 * theirs[0] @ theirs[1].T
    off = torch.zeros_like(scores, dtype=torch.bool)
    off[excluded[:, 0], excluded[:, 1]] = True
    scores = scores.masked_fill(off, float("-inf"))
    numbers = torch.arange(7, device=device)
    expected = F.cross_entropy(scores, numbers, reduction="sum")
    if symmetric:
        expected = (expected + F.cross_entropy(scores[:, :7].T, numbers, reduction="sum")) / 2
    torch.testing.assert_close(loss.double(), expected, rtol=2e-6, atol=1e-6)
    assert (count.item(), correct.item()) == (7, (scores.argmax(-1) == numbers).sum().item())
    wanted = torch.autograd.grad(expected, theirs)
    for x, y in zip(torch.autograd.grad(loss, ours), wanted, strict=True):
        torch.testing.assert_close(x.double(), y, rtol=1e-5, atol=1e-6)


@both_ops
@directions
@pytest.mark.parametrize("dtype, scale", [(torch.float32, 1.0), (torch.float16, 50.0)], ids=["fp32", "fp16"])
def test_within_the_budget(scale, dtype, symmetric, op, device, small_chunks):
    query, document = make(9, 70, 16, device, dtype)
    scale = torch.tensor(scale, device=device)

    def fused(query, document, scale):
        return op(query, document, scale=scale, symmetric=symmetric)

    def plain(query, document, scale):
        # scores in the dtype of the embeddings, as plain PyTorch computes them
        labels = torch.arange(len(query), device=query.device)
        loss = written_out(query, document, labels, scale, symmetric)
        best = (query @ document.T).argmax(-1)
        return loss.to(torch.promote_types(query.dtype, torch.float32)), labels.new_tensor(9), (best == labels).sum()

    assert_within_budget(fused, plain, query, document, scale)
    if dtype == torch.float32:
        whole = functools.partial(reference.contrastive_cross_entropy, symmetric=symmetric)
        assert_within_budget(fused, lambda q, d, s: whole(q, d, scale=s), query, document, scale)


@all_ops
def test_half_precision_scores_are_not_rounded(op, device):
    """At a scale of 100, scores rounded to fp16 are off by up to 0.02 each, and the loss shows it."""
    query, document = make(16, 16, 32, device)
    document = F.normalize(document[:1] + 0.02 * document, dim=-1).half()
    query = F.normalize(document.float() + 0.02 * query, dim=-1).half()
    scores, labels = query.double() @ document.double().T, torch.arange(16, device=device)
    wanted = F.cross_entropy(scores * 100, labels, reduction="sum")
    got = op(query, document, scale=100.0)[0]
    assert wanted > 1
    assert (got.double() - wanted).abs() < 1e-5 * wanted
    rounded = F.cross_entropy(scores.half().double() * 100, labels, reduction="sum")
    assert (rounded - wanted).abs() > 1e-4 * wanted


def test_the_score_matrix_is_never_made(device, monkeypatch):
    """The forward, which also computes the gradients, holds the scores of one chunk of queries."""
    monkeypatch.setattr(cross_entropy, "ROWS", 16)
    query, document = make(32, 256, 4, device)
    labels, scale = torch.arange(32, device=device), torch.tensor(20.0, device=device)
    given = query, document, None, labels, scale, None
    counted, _ = allocations(
        lambda: cross_entropy.masked_cross_entropy_fwd(*given, -100, 0.0, [True, True, False, True]), *given
    )
    assert counted.largest == 16 * 256 * 4


@all_ops
@directions
def test_no_query_with_a_label(symmetric, op, device):
    query, document = leaves(*make(2, 3, 8, device))
    loss, count, correct = op(query, document, torch.tensor([-100, -100], device=device), symmetric=symmetric)
    assert (loss.item(), count.item(), correct.item()) == (0.0, 0, 0)
    for gradient in torch.autograd.grad(loss, (query, document)):
        assert torch.equal(gradient, torch.zeros_like(gradient))


@pytest.mark.parametrize(
    "query, document, labels, message",
    [
        ((3, 8), (2, 8), None, "expected a document for each query"),
        ((3, 8), (3, 7), None, r"query \[3, 8\], document \[3, 7\]"),
        ((3,), (3, 8), None, r"expected \[B, D\] and \[N, D\]"),
        ((3, 8), (3, 8), 2, r"labels has shape \[2\]: expected \[3\]"),
    ],
)
def test_wrong_shapes_are_refused(query, document, labels, message):
    labels = labels and torch.zeros(labels, dtype=torch.int64)
    with pytest.raises(ValueError, match=message):
        ops.contrastive_cross_entropy(torch.randn(query), torch.randn(document), labels)
