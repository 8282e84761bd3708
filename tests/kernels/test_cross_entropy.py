"""masked_cross_entropy: kernels and CPU against the reference, all three against torch's cross_entropy in float64.

Large logits, repeats, strides and compiled calls: in the tests of all ops.
"""

import pytest
import torch
import torch.nn.functional as F
from allocations import allocations
from helpers import assert_same_bits, assert_within_budget

from fastbert import reference
from fastbert.cpu import cross_entropy as cpu_cross_entropy
from fastbert.cpu import ops as cpu
from fastbert.kernels import cross_entropy
from fastbert.kernels.cross_entropy import masked_cross_entropy

pytestmark = pytest.mark.usefixtures("poison")

fp32_and_fp16 = pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
both_ops = pytest.mark.parametrize("op", [masked_cross_entropy, cpu.masked_cross_entropy], ids=["kernels", "cpu"])
all_ops = pytest.mark.parametrize(
    "op", [masked_cross_entropy, cpu.masked_cross_entropy, reference.masked_cross_entropy],
    ids=["kernels", "cpu", "reference"],
)  # fmt: skip


@pytest.fixture
def small_chunks(monkeypatch):
    """Of 5 rows, in the kernels. On a CPU: test_several_chunks_on_a_cpu."""
    monkeypatch.setattr(cross_entropy, "ROWS", 5)


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


def check(op, *args, **kwargs):
    assert_within_budget(op, reference.masked_cross_entropy, *args, **kwargs)


def by_row(op):
    """The same op, one row at a time: it gives a vector of losses, whose largest error is not a matter of chance."""

    def rows(hidden, weight, bias, labels, **kwargs):
        results = [op(hidden[m : m + 1], weight, bias, labels[m : m + 1], **kwargs) for m in range(len(hidden))]
        losses, counts, corrects = (torch.stack(part) for part in zip(*results, strict=True))
        return losses, counts, corrects

    return rows


@both_ops
@fp32_and_fp16
@pytest.mark.parametrize("M, V, D, label_smoothing", [(5, 37, 24, 0.0), (13, 1000, 96, 0.1)])
def test_values_and_gradients(M, V, D, label_smoothing, dtype, op, device, small_chunks):
    hidden, weight, bias, labels = make(M, V, D, device, dtype, ignored=range(1, M, 3))
    check(op, hidden, weight, bias, labels, label_smoothing=label_smoothing)


@pytest.mark.parametrize(
    "ignored, dtype",
    [(range(0, 1100, 300), torch.float32), (range(0, 2000, 2), torch.float16), ([], torch.float32)],
    ids=["few", "many", "none"],
)
def test_several_chunks_on_a_cpu(ignored, dtype):
    hidden, weight, bias, labels = make(2200, 11, 5, "cpu", dtype, ignored=ignored)

    def scaled(op):
        # a sum of 5000 in fp32 has an error of 5e-4 by chance
        def run(*args):
            loss, *counts = op(*args, label_smoothing=0.1)
            return loss / 64, *counts

        return run

    inputs = hidden, weight, bias, labels
    assert_within_budget(scaled(cpu.masked_cross_entropy), scaled(reference.masked_cross_entropy), *inputs)


@both_ops
def test_no_bias(op, device, small_chunks):
    hidden, weight, _, labels = make(7, 70, 16, device, torch.float16, ignored=[0])
    check(op, hidden, weight, None, labels, label_smoothing=0.1)


@all_ops
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_against_torch(label_smoothing, op, device, small_chunks):
    hidden, weight, bias, labels = make(11, 150, 16, device, ignored=[3, 9])
    ours, theirs = leaves(hidden, weight, bias), leaves(*(x.double() for x in (hidden, weight, bias)))
    loss, count, correct = op(*ours, labels, label_smoothing=label_smoothing)
    assert loss.dtype == torch.float32 and loss.shape == ()
    logits = F.linear(*theirs)
    expected = F.cross_entropy(logits, labels, reduction="sum", label_smoothing=label_smoothing)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)
    assert (count.item(), correct.item()) == (9, (logits.argmax(-1) == labels).sum().item())
    assert count.dtype == correct.dtype == torch.int64
    cotangent = torch.tensor(-0.3, device=device)
    wanted = torch.autograd.grad(expected, theirs, cotangent.double())
    for x, y in zip(torch.autograd.grad(loss, ours, cotangent), wanted, strict=True):
        torch.testing.assert_close(x.double(), y, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("V", [2, 64, 65])
@both_ops
def test_few_words(V, op, device):
    check(op, *make(3, V, 8, device), label_smoothing=0.1)


@all_ops
def test_labels_of_32_bits_and_wrong_ones(op, device, small_chunks):
    hidden, weight, bias, labels = make(6, 70, 8, device, ignored=[1])
    results = [op(hidden, weight, bias, kind) for kind in (labels, labels.int())]
    assert_same_bits(*results)
    for wrong in (-1, 70, 2**31 - 1, -(2**31)):
        labels[2] = wrong
        assert op(hidden, weight, bias, labels)[0].isnan()


@both_ops
@pytest.mark.parametrize("cotangent", [1 / 3, 1e-7, 3e7])
def test_any_loss_gradient(cotangent, op, device):
    """Also one that fp16 cannot hold: gradients are multiplied by it in fp32, and rounded once."""
    hidden, weight, bias, labels = make(7, 70, 8, device, torch.float16, ignored=[2])
    small = 1e-6 / max(cotangent, 1e-6) if cotangent > 100 else 1.0
    ours, wide = leaves(hidden, weight, bias), leaves(*(x.double() for x in (hidden, weight, bias)))
    got = torch.autograd.grad(op(*ours, labels)[0] * small, ours, torch.tensor(cotangent).to(device))
    loss = F.cross_entropy(F.linear(*wide), labels, reduction="sum") * small
    wanted = torch.autograd.grad(loss, wide, torch.tensor(cotangent, dtype=torch.float64, device=device))
    for x, y in zip(got, wanted, strict=True):
        assert (x.double() - y).abs().max() <= 4e-3 * y.abs().max() + 6e-8


@both_ops
def test_rounded_logits_row_by_row(op, device):
    hidden, weight, bias, labels = (x if x.dtype == torch.int64 else x.half() for x in make(13, 37, 24, device))
    labels[4] = -100
    assert_within_budget(
        by_row(op), by_row(reference.masked_cross_entropy), hidden, weight, bias, labels, label_smoothing=0.1
    )


def test_a_whole_vocabulary(device, monkeypatch):
    # so that programs do not loop over rows that do not exist
    monkeypatch.setattr(cross_entropy, "ROW_GROUP", 8)
    hidden, weight, bias, labels = make(2, 30522, 4, device)
    labels[1] = 30521
    check(masked_cross_entropy, hidden, weight, bias, labels)


@pytest.mark.parametrize("rows", [4, 13])
def test_several_row_groups(rows, device, monkeypatch):
    """One in each of four chunks, and two in one chunk."""
    monkeypatch.setattr(cross_entropy, "ROWS", rows)
    monkeypatch.setattr(cross_entropy, "ROW_GROUP", 8)
    hidden, weight, bias, labels = make(13, 70, 16, device, ignored=[0, 7])
    check(masked_cross_entropy, hidden, weight, bias, labels, label_smoothing=0.1)


@both_ops
def test_counts_right_predictions(op, device):
    """Rows that predict their label, rows that miss it, and ignored rows, all of which predict the ignored label."""
    weight = torch.eye(40, device=device)
    labels = torch.arange(40, device=device)
    hidden = torch.roll(weight, 1, 0) * 9.0
    hidden[::4] = weight[::4] * 9.0
    labels[::8], hidden[::8] = 0, weight[0] * 9.0
    loss, count, correct = op(hidden, weight, torch.zeros(40, device=device), labels, ignore_index=0)
    assert (count.item(), correct.item()) == (35, 5)


@all_ops
def test_of_equal_maxima_the_first_is_the_prediction(op, device):
    """Also when they are adjacent, or in different blocks of the same lane."""
    bias = torch.zeros(5000, device=device)
    bias[[9, 10, 9 + 2048, 9 + 4096]] = 3.0
    hidden, weight = torch.zeros(2, 8, device=device), torch.zeros(5000, 8, device=device)
    for labels, right in (([9, 9], 2), ([10, 9 + 2048], 0), ([9 + 4096, 8], 0)):
        labels = torch.tensor(labels, device=device)
        assert op(hidden, weight, bias, labels)[2].item() == right


@all_ops
# on a CPU a few ignored rows are computed with the others, and many are left out
@pytest.mark.parametrize(
    "ignored, bad", [([0, 2, 4], float("nan")), ([0, 1, 4], float("inf")), ([4], float("nan"))], ids=str
)
def test_ignored_rows_may_hold_anything(ignored, bad, op, device):
    hidden, weight, bias, labels = make(6, 37, 16, device, ignored=ignored)
    hidden[4, 3] = bad
    hidden[ignored[:-1]] = bad
    clean = hidden.masked_fill((labels == -100)[:, None], 0.0)
    dirty_in, clean_in = leaves(hidden, weight, bias), leaves(clean, weight, bias)
    dirty, clean = (op(*x, labels)[0] for x in (dirty_in, clean_in))
    assert torch.equal(dirty, clean) and torch.isfinite(dirty)
    for got, wanted in zip(torch.autograd.grad(dirty, dirty_in), torch.autograd.grad(clean, clean_in), strict=True):
        assert torch.equal(got, wanted) and torch.isfinite(got).all()


@all_ops
def test_a_nan_in_a_picked_row_is_not_hidden(op, device):
    hidden, weight, bias, labels = make(3, 37, 16, device)
    hidden[1, 0] = float("nan")
    assert op(hidden, weight, bias, labels)[0].isnan()


@all_ops
def test_banned_words(op, device):
    """A bias of -inf takes a word out of the softmax, also whole blocks of words; as a label it costs infinity."""
    hidden, weight, bias, labels = make(3, 2100, 8, device)
    bias[:2060] = -float("inf")
    labels = labels % 40 + 2060
    inputs, shorter = leaves(hidden, weight, bias), leaves(hidden, weight[2060:], bias[2060:])
    got, wanted = op(*inputs, labels)[0], op(*shorter, labels - 2060)[0]
    torch.testing.assert_close(got, wanted, rtol=1e-6, atol=0)
    got, wanted = torch.autograd.grad(got, inputs), torch.autograd.grad(wanted, shorter)
    torch.testing.assert_close(got[0], wanted[0])
    assert torch.equal(got[2][:2060], torch.zeros_like(bias[:2060]))
    torch.testing.assert_close(got[2][2060:], wanted[2])
    labels[0] = 5
    assert op(hidden, weight, bias, labels)[0] == float("inf")


def test_layouts_on_a_cpu():
    """A transposed hidden, a weight with gaps between its rows, a strided bias and labels; none is written to."""
    hidden, weight, bias, labels = make(7, 37, 16, "cpu", ignored=[2])
    hidden, weight = hidden.T.contiguous().T, torch.cat((weight, weight), 1)[:, :16]
    bias, labels = bias.repeat_interleave(2)[::2], labels.repeat_interleave(3)[::3]
    before = [x.clone() for x in (hidden, weight, bias, labels)]
    check(cpu.masked_cross_entropy, hidden, weight, bias, labels)
    cpu.masked_cross_entropy(hidden.requires_grad_(), weight, bias, labels)[0].backward()
    for now, then in zip((hidden, weight, bias, labels), before, strict=True):
        assert torch.equal(now, then)


def test_evaluation_makes_no_gradients(device, monkeypatch):
    """Under no_grad nothing but the loss is computed, although Parameters require gradients."""
    hidden, weight, bias, labels = make(5, 37, 8, device)
    trained = masked_cross_entropy(*leaves(hidden, weight, bias), labels)
    monkeypatch.setattr(cross_entropy, "_masked_cross_entropy_bwd_kernel", None)
    with torch.no_grad():
        evaluated = masked_cross_entropy(*leaves(hidden, weight, bias), labels)
    for a, b in zip(trained, evaluated, strict=True):
        assert torch.equal(a, b) and not b.requires_grad


@pytest.mark.parametrize("wanted", [0, 1, 2], ids=["hidden", "weight", "bias"])
@pytest.mark.parametrize(
    ("op", "file", "product"),
    [(masked_cross_entropy, cross_entropy, "product"), (cpu.masked_cross_entropy, cpu_cross_entropy, "matmul")],
    ids=["kernels", "cpu"],
)
def test_only_the_gradients_that_are_wanted(op, file, product, wanted, device, monkeypatch):
    """A frozen tensor costs no product and gets no gradient; the others are the same to the bit."""
    tensors = make(5, 37, 8, device, ignored=[1])
    labels, inputs = tensors[3], leaves(*tensors[:3])
    loss = op(*inputs, labels)[0]
    everything = torch.autograd.grad(loss, inputs)
    products, plain = [], getattr(file, product)
    monkeypatch.setattr(file, product, lambda *a, **k: products.append(a) or plain(*a, **k))
    inputs = [x.detach().requires_grad_(i == wanted) for i, x in enumerate(inputs)]
    loss = op(*inputs, labels)[0]
    (gradient,) = torch.autograd.grad(loss, inputs[wanted])
    assert torch.equal(gradient, everything[wanted])
    assert len(products) == 1 + (wanted < 2)
    products.clear()
    with torch.no_grad():
        op(*inputs, labels)
    assert len(products) == 1


def test_holds_a_chunk(device, monkeypatch):
    """The forward's peak memory is what the file's docstring states."""
    M, V, D = 48, 1000, 4
    monkeypatch.setattr(cross_entropy, "BUFFER", 24 * 1024 * 4)
    given = *make(M, V, D, device, ignored=range(0, 48, 2)), None, None
    counted, results = allocations(
        lambda: cross_entropy.masked_cross_entropy_fwd(*given, -100, 0.0, [True, True, True, False]), *given
    )
    made = sum(x.numel() * 4 for x in results)
    chunk, bias_partials = 24 * 1024 * 4, 1024 * 4
    assert chunk <= counted.peak <= made + chunk + bias_partials + 3 * 4 * V + 2 * 24 * D * 4 + 20 * M + 4000


def test_holds_a_chunk_on_a_cpu():
    hidden, weight, bias, labels = make(3000, 100, 2, "cpu")
    counted, _ = allocations(lambda: cpu.masked_cross_entropy(hidden, weight, bias, labels), hidden, weight, bias)
    assert counted.largest == cpu_cross_entropy.ROWS * 100 * 4


def test_nothing_waits_for_the_device(device):
    """No operator reads a value on the host, or has a result whose size depends on the data."""
    hidden, weight, bias, labels = make(7, 70, 8, device, ignored=[2])
    forward, _ = allocations(
        lambda: cross_entropy.masked_cross_entropy_fwd(
            hidden, weight, bias, labels, None, None, -100, 0.1, [True, True, True, False]
        )
    )
    whole, _ = allocations(lambda: masked_cross_entropy(*leaves(hidden, weight, bias), labels)[0].backward())
    waiting = {"_local_scalar_dense", "nonzero", "masked_select", "unique_dim", "_unique2", "item", "is_nonzero"}
    assert not waiting & (forward.names | whole.names)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_half_precision_products_into_fp32(dtype, device):
    a, b = torch.randn(5, 64, device=device, dtype=dtype), torch.randn(64, 3, device=device, dtype=dtype)
    out = torch.full((5, 3), 7.0, device=device)
    wanted = a.double() @ b.double()
    cross_entropy.product(out, a, b)
    torch.testing.assert_close(out.double(), wanted, rtol=1e-5, atol=1e-5)
    cross_entropy.product(out, a, b, add=True)
    torch.testing.assert_close(out.double(), 2 * wanted, rtol=1e-5, atol=1e-5)


def test_chunks_are_even_and_bounded():
    """No short last chunk, which would cost a whole addition to dweight, and no buffer beyond its bounds."""
    hidden = torch.empty(1, 768, dtype=torch.bfloat16, device="meta")

    def rows(M, V, scale=None):
        return len(cross_entropy.score_buffers(M, V, hidden, scale, True)[0])

    assert rows(100, 30522) == 100
    assert rows(4096, 30522) == 4096
    assert rows(4097, 30522) == 2176
    assert rows(10000, 30522) == 3456
    assert rows(10000, 250002) == 1536
    assert rows(4096, 32768, scale=True) == 1408
