"""masked_cross_entropy: the kernels against the reference and against torch.nn.functional.cross_entropy in float64."""

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_within_budget

from fastbert import ops, reference
from fastbert.kernels import cross_entropy
from fastbert.kernels.cross_entropy import masked_cross_entropy

pytestmark = pytest.mark.usefixtures("poison")

fp32_and_fp16 = pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
smoothings = pytest.mark.parametrize("label_smoothing", [0.0, 0.1])


def make(M, V, D, device, dtype=torch.float32, ignored=()):
    """hidden, weight, bias, labels. In fp16 all values are small multiples of 1/4: every logit is exact in 16 bits.

    A sum of losses is one number, whose error in the reference is small or large by chance. Exact logits leave nothing
    to chance, and make equal maxima, of which the first counts, common. Rounded logits are tested row by row below.
    """
    if dtype == torch.float32:
        hidden, weight, bias = torch.randn(M, D), torch.randn(V, D) * D**-0.5, torch.randn(V)
    else:
        hidden, weight, bias = (torch.randint(-4, 5, shape) / 4 for shape in ((M, D), (V, D), (V,)))
        hidden, weight = hidden.round(), weight * (torch.rand(V, D) < 8 / D)
    labels = torch.randint(V, (M,))
    labels[list(ignored)] = -100
    return *(x.to(device, dtype) for x in (hidden, weight, bias)), labels.to(device)


def leaves(*tensors):
    return [x.detach().clone().requires_grad_() for x in tensors]


def check(*args, **kwargs):
    assert_within_budget(masked_cross_entropy, reference.masked_cross_entropy, *args, **kwargs)


def by_row(op):
    """The same op, one row at a time: its losses are a vector, whose largest error is no accident."""

    def rows(hidden, weight, bias, labels, **kwargs):
        results = [op(hidden[m : m + 1], weight, bias, labels[m : m + 1], **kwargs) for m in range(len(hidden))]
        losses, counts, corrects = (torch.stack(part) for part in zip(*results, strict=True))
        return losses, counts, corrects

    return rows


@smoothings
@fp32_and_fp16
@pytest.mark.parametrize("M, V, D", [(0, 37, 8), (5, 37, 24), (13, 1000, 96)])
def test_values_and_gradients(M, V, D, dtype, label_smoothing, device):
    hidden, weight, bias, labels = make(M, V, D, device, dtype, ignored=range(1, M, 3))
    check(hidden, weight, bias, labels, label_smoothing=label_smoothing)


@smoothings
def test_one_row_of_two_words(label_smoothing, device):
    check(*make(1, 2, 8, device), label_smoothing=label_smoothing)


@smoothings
def test_rounded_logits_row_by_row(label_smoothing, device):
    hidden, weight, bias, labels = (x if x.dtype == torch.int64 else x.half() for x in make(13, 37, 24, device))
    labels[4] = -100
    assert_within_budget(
        by_row(masked_cross_entropy), by_row(reference.masked_cross_entropy), hidden, weight, bias, labels,
        label_smoothing=label_smoothing,
    )  # fmt: skip


def test_a_whole_vocabulary(device):
    hidden, weight, bias, labels = make(3, 30522, 8, device, ignored=[1])
    labels[2] = 30521
    check(hidden, weight, bias, labels)


@fp32_and_fp16
@pytest.mark.parametrize("rows, group", [(4, 128), (5, 128), (13, 8), (8, 4)])
def test_several_chunks_and_row_groups(rows, group, dtype, device, monkeypatch):
    monkeypatch.setattr(cross_entropy, "ROWS", rows)
    monkeypatch.setattr(cross_entropy, "ROW_GROUP", max(group, 8))
    hidden, weight, bias, labels = make(13, 70, 16, device, dtype, ignored=[0, 7])
    check(hidden, weight, bias, labels, label_smoothing=0.1)


@smoothings
def test_agrees_with_torch(label_smoothing, device):
    hidden, weight, bias, labels = make(13, 211, 32, device, ignored=[3, 12])
    ours, theirs = leaves(hidden, weight, bias), leaves(*(x.double() for x in (hidden, weight, bias)))
    cotangent = torch.tensor(-1.7, device=device)
    loss, count, correct = masked_cross_entropy(*ours, labels, label_smoothing=label_smoothing)
    logits = F.linear(*theirs)
    expected = F.cross_entropy(logits, labels, reduction="sum", label_smoothing=label_smoothing)
    gradients = torch.autograd.grad(loss, ours, cotangent), torch.autograd.grad(expected, theirs, cotangent.double())
    assert loss.dtype == torch.float32 and loss.shape == ()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)
    assert count.item() == 11 and count.dtype == torch.int64
    assert correct.item() == (logits.argmax(-1) == labels).sum().item() and correct.dtype == torch.int64
    for got, wanted in zip(*gradients, strict=True):
        torch.testing.assert_close(got.double(), wanted, rtol=1e-5, atol=1e-5)


def test_counts_right_predictions(device):
    """Rows that predict their label, rows that miss it, and ignored rows, all of which predict the ignored label."""
    weight = torch.eye(40, device=device)
    labels = torch.arange(40, device=device)
    hidden = torch.roll(weight, 1, 0) * 9.0
    hidden[::4] = weight[::4] * 9.0
    labels[::8], hidden[::8] = 0, weight[0] * 9.0
    loss, count, correct = masked_cross_entropy(hidden, weight, torch.zeros(40, device=device), labels, ignore_index=0)
    assert (count.item(), correct.item()) == (35, 5)


def test_of_equal_maxima_the_first_is_the_prediction(device):
    """Also when they are blocks apart, in the same lane of the kernel."""
    bias = torch.zeros(5000, device=device)
    bias[[9, 9 + 2048, 9 + 4096]] = 3.0
    hidden, weight = torch.zeros(2, 8, device=device), torch.zeros(5000, 8, device=device)
    for labels, right in (([9, 9], 2), ([9 + 2048, 9 + 4096], 0)):
        assert masked_cross_entropy(hidden, weight, bias, torch.tensor(labels, device=device))[2].item() == right


def test_all_rows_ignored(device):
    hidden, weight, bias, labels = make(5, 37, 16, device, ignored=range(5))
    inputs = leaves(hidden, weight, bias)
    loss, count, correct = masked_cross_entropy(*inputs, labels)
    assert (loss.item(), count.item(), correct.item()) == (0.0, 0, 0)
    for gradient in torch.autograd.grad(loss, inputs):
        assert torch.equal(gradient, torch.zeros_like(gradient))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_ignored_rows_may_hold_anything(bad, device):
    hidden, weight, bias, labels = make(6, 37, 16, device, ignored=[0, 4])
    hidden[4, 3] = hidden[0] = bad
    clean = hidden.masked_fill((labels == -100)[:, None], 0.0)
    dirty_in, clean_in = leaves(hidden, weight, bias), leaves(clean, weight, bias)
    dirty, clean = masked_cross_entropy(*dirty_in, labels)[0], masked_cross_entropy(*clean_in, labels)[0]
    assert torch.equal(dirty, clean) and torch.isfinite(dirty)
    for got, wanted in zip(torch.autograd.grad(dirty, dirty_in), torch.autograd.grad(clean, clean_in), strict=True):
        assert torch.equal(got, wanted) and torch.isfinite(got).all()


def test_a_nan_in_a_picked_row_is_not_hidden(device):
    hidden, weight, bias, labels = make(3, 37, 16, device)
    hidden[1, 0] = float("nan")
    assert masked_cross_entropy(hidden, weight, bias, labels)[0].isnan()


@smoothings
def test_large_logits(label_smoothing, device):
    hidden, weight, bias, labels = make(5, 37, 16, device)
    assert_within_budget(
        by_row(masked_cross_entropy), by_row(reference.masked_cross_entropy), hidden * 1e4, weight, bias, labels,
        label_smoothing=label_smoothing,
    )  # fmt: skip


def test_banned_words(device):
    """A bias of -inf takes a word out of the softmax, also where it fills a whole block of the vocabulary."""
    hidden, weight, bias, labels = make(3, 2100, 8, device)
    bias[:2060] = -float("inf")
    labels = labels % 40 + 2060
    inputs, shorter = leaves(hidden, weight, bias), leaves(hidden, weight[2060:], bias[2060:])
    got, wanted = masked_cross_entropy(*inputs, labels)[0], masked_cross_entropy(*shorter, labels - 2060)[0]
    torch.testing.assert_close(got, wanted, rtol=1e-6, atol=0)
    got, wanted = torch.autograd.grad(got, inputs), torch.autograd.grad(wanted, shorter)
    torch.testing.assert_close(got[0], wanted[0])
    assert torch.equal(got[2][:2060], torch.zeros_like(bias[:2060]))
    torch.testing.assert_close(got[2][2060:], wanted[2])


def test_layouts(device):
    """A transposed hidden, a weight with holes between its rows, a strided bias and labels; none is written to."""
    hidden, weight, bias, labels = make(7, 37, 16, device, ignored=[2])
    hidden, weight = hidden.T.contiguous().T, torch.cat((weight, weight), 1)[:, :16]
    bias, labels = bias.repeat_interleave(2)[::2], labels.repeat_interleave(3)[::3]
    before = [x.clone() for x in (hidden, weight, bias, labels)]
    check(hidden, weight, bias, labels)
    masked_cross_entropy(hidden.requires_grad_(), weight, bias, labels)[0].backward()
    for now, then in zip((hidden, weight, bias, labels), before, strict=True):
        assert torch.equal(now, then)


def test_backward_twice_and_same_bits(device):
    hidden, weight, bias, labels = make(7, 70, 16, device, ignored=[2])
    inputs = leaves(hidden, weight, bias)
    loss = masked_cross_entropy(*inputs, labels)[0]
    first = torch.autograd.grad(loss, inputs, torch.tensor(3.0, device=device), retain_graph=True)
    second = torch.autograd.grad(loss, inputs, torch.tensor(3.0, device=device), retain_graph=True)
    again = masked_cross_entropy(*inputs, labels)[0]
    third = torch.autograd.grad(again, inputs, torch.tensor(3.0, device=device))
    assert torch.equal(loss, again)
    for a, b, c in zip(first, second, third, strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)


def test_not_differentiable_twice(device):
    hidden, weight, bias, labels = make(3, 37, 8, device)
    inputs = leaves(hidden, weight, bias)
    loss = masked_cross_entropy(*inputs, labels)[0]
    (gradient,) = torch.autograd.grad(loss**2, inputs[0], create_graph=True)
    with pytest.raises(RuntimeError, match="masked_cross_entropy has no second derivative"):
        gradient.sum().backward()


def test_evaluation_makes_no_gradients(device, monkeypatch):
    """Under no_grad nothing but the loss is computed, although Parameters require gradients."""
    hidden, weight, bias, labels = make(5, 37, 8, device)
    trained = masked_cross_entropy(*leaves(hidden, weight, bias), labels)
    monkeypatch.setattr(cross_entropy, "_masked_cross_entropy_bwd_kernel", None)
    with torch.no_grad():
        evaluated = masked_cross_entropy(*leaves(hidden, weight, bias), labels)
    for a, b in zip(trained, evaluated, strict=True):
        assert torch.equal(a, b) and not b.requires_grad


@pytest.mark.parametrize("gradients", [False, True], ids=["evaluation", "training"])
def test_operator_is_registered_soundly(gradients, device):
    hidden, weight, bias, labels = make(5, 37, 8, device, ignored=[1])
    torch.library.opcheck(
        torch.ops.fastbert.masked_cross_entropy_fwd, (hidden, weight, bias, labels, -100, 0.1, gradients)
    )


def test_compiles_whole(device):
    hidden, weight, bias, labels = make(5, 37, 8, device, ignored=[1])

    def mean(hidden, weight, bias, labels):
        loss, count, correct = ops.masked_cross_entropy(hidden, weight, bias, labels, impl="triton")
        return loss / count, correct

    results = []
    for function in (mean, torch.compile(mean, fullgraph=True, backend="aot_eager")):
        inputs = leaves(hidden, weight, bias)
        loss, correct = function(*inputs, labels)
        results.append((loss, correct, *torch.autograd.grad(loss, inputs)))
    for eager, compiled in zip(*results, strict=True):
        assert torch.equal(eager, compiled)
