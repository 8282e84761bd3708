"""The reference is the specification: checked in float64 against finite differences and plain PyTorch."""

import shutil
import time

import pytest
import torch
import torch.nn.functional as F
from helpers import cu_seqlens_of
from torch.autograd import gradcheck, gradgradcheck

from fastbert import reference

SEED = torch.tensor([2**40 + 17])
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


@pytest.mark.parametrize("lengths", [LENGTHS, [40, 16, 17, 1, 33, 0, 32, 47]], ids=["short", "several buckets"])
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


@pytest.mark.parametrize("approximate", ["none", "tanh"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "columns of wider rows", "transposed", "one row expanded"])
def test_bias_gelu_in_blocks(layout, dtype, approximate, monkeypatch):
    """What PyTorch's parts give, to the last bits: it has several GELUs, and the bias's gradient adds up by blocks."""
    # two or three rows to a block, the last one shorter
    monkeypatch.setattr(reference, "_LARGE", 0)
    monkeypatch.setattr(reference, "_BLOCK", 80 // torch.get_num_threads())
    x = {
        "contiguous": torch.randn(13, 37),
        "columns of wider rows": torch.randn(13, 50)[:, 5:42],
        "transposed": torch.randn(37, 13).t(),
        "one row expanded": torch.randn(1, 37).expand(13, 37),
    }[layout].to(dtype).requires_grad_()  # fmt: skip
    bias, dout = torch.randn(37).to(dtype).requires_grad_(), torch.randn(37, 13).to(dtype).t()
    out, expected = reference.bias_gelu(x, bias, approximate=approximate), F.gelu(x + bias, approximate=approximate)
    assert "BiasGeluFunction" in type(out.grad_fn).__name__
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(out, expected, rtol=4 * eps, atol=4 * eps)
    (dx, dbias), (dx_there, dbias_there) = (torch.autograd.grad(y, (x, bias), dout) for y in (out, expected))
    torch.testing.assert_close(dx, dx_there, rtol=4 * eps, atol=4 * eps)
    torch.testing.assert_close(dbias, dbias_there, rtol=4 * eps, atol=20 * eps)


def test_bias_gelu_in_blocks_has_a_second_derivative(monkeypatch):
    monkeypatch.setattr(reference, "_LARGE", 0)
    monkeypatch.setattr(reference, "_BLOCK", 14)
    run = lambda x, bias: reference.bias_gelu(x, bias).square()  # noqa: E731
    inputs = double(5, 7), double(7)
    assert gradcheck(run, inputs) and gradgradcheck(run, inputs)
    first, differentiable = (torch.autograd.grad(run(*inputs).sum(), inputs, create_graph=c) for c in (False, True))
    for a, b in zip(first, differentiable):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("approximate", ["none", "tanh"])
@pytest.mark.parametrize("with_bias", [True, False])
def test_linear_gelu_without_gradients(with_bias, approximate, monkeypatch):
    """oneDNN's GELU behind its product is as accurate as torch's, and where gradients are wanted torch's is used."""
    monkeypatch.setattr(reference, "_ONEDNN_SIZE", 0)
    x, weight = torch.randn(37, 26)[:, ::2], torch.randn(13, 21).t()
    bias = torch.randn(21) if with_bias else None
    wide = F.linear(x.double(), weight.double(), bias if bias is None else bias.double())
    wide = F.gelu(wide, approximate=approximate)
    plain = F.gelu(F.linear(x, weight, bias), approximate=approximate)
    out = reference.linear_gelu(x, weight, bias, approximate=approximate)
    error, allowed = ((y - wide).abs().max() for y in (out, plain))
    assert error <= 2 * allowed
    with_gradient = reference.linear_gelu(x, weight.clone().requires_grad_(), bias, approximate=approximate)
    assert "Gelu" in type(with_gradient.grad_fn).__name__


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
def test_masked_cross_entropy(labels, label_smoothing, monkeypatch):
    monkeypatch.setattr(reference, "CROSS_ENTROPY_ROWS", 2)
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


def test_dropout_keeps_the_expectation_and_p0_is_the_identity():
    x = torch.ones(1000, 96)
    assert reference.dropout(x, 0.0, None, 0) is x
    dropped = reference.dropout(x, 0.1, SEED, 4)
    kept = dropped != 0
    assert abs(kept.double().mean() - 0.9) < 4 * (0.09 / x.numel()) ** 0.5
    torch.testing.assert_close(dropped[kept], torch.full_like(dropped[kept], 65536 / (65536 - 6554)))


def test_dropout_has_a_second_derivative_and_spares_its_argument():
    x = double(5, 7)
    run = lambda x: reference.dropout(x.transpose(0, 1), 0.4, SEED, 4)  # noqa: E731
    before = x.detach().clone()
    assert gradcheck(run, (x,)) and gradgradcheck(lambda x: run(x).square(), (x,))
    assert torch.equal(x, before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_drop_rounds_once(dtype):
    x = torch.randn(5, 7).to(dtype)
    keep = torch.rand(5, 8)[:, :7] > 0.3
    expected = x.double() * keep * (65536 / (65536 - 19661))
    # half an eps, and in float32 as much again for the scale
    rtol = 0.51 * torch.finfo(dtype).eps * (1 if dtype.itemsize == 2 else 2)
    torch.testing.assert_close(reference.drop(x, keep, 0.3).double(), expected, rtol=rtol, atol=0)
    assert reference.drop(x, torch.zeros_like(keep), 1.0).abs().sum() == 0


def test_dropout_compiles_to_the_same_numbers():
    """torch.compile gets it as PyTorch's own operations, eager on a CPU from NumPy."""
    x = torch.randn(5, 70, requires_grad=True)
    results = []
    for function in (reference.dropout, torch.compile(reference.dropout, backend="aot_eager", fullgraph=True)):
        out = function(x, 0.3, SEED, 2**31 + 4)
        results.append((out, *torch.autograd.grad(out, x, torch.ones_like(out))))
    for a, b in zip(*results):
        assert torch.equal(a, b)


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile writes C++ for a CPU")
def test_masks_in_compiled_code():
    """Nothing overflows there, for seeds whose products are large, and for heads that are numbers counted up."""

    def draw(seed):
        row, head = torch.arange(5), torch.arange(12)[:, None]
        return reference.attention_keep_mask(row, head, 70, seed, 2**31 + 4, 0.3)

    compiled = torch.compile(draw, fullgraph=True)
    for seed in (5, 2**40 + 3, -9, -(2**63) + 2**32 - 1):
        assert torch.equal(draw(torch.tensor([seed])), compiled(torch.tensor([seed])))


@pytest.mark.parametrize("with_bias", [True, False])
def test_linear_through_onednn_equals_torch(with_bias, monkeypatch):
    """Values and gradients, odd sizes, inputs that are views; and the switch torch.backends.mkldnn turns it off."""
    monkeypatch.setattr(reference, "_ONEDNN_SIZE", 0)
    x, weight, bias = torch.randn(37, 26)[:, ::2], torch.randn(13, 21).t(), torch.randn(21) if with_bias else None
    inputs = [t.requires_grad_() for t in (x, weight, bias) if t is not None]
    out, expected = reference.linear(x, weight, bias), F.linear(x, weight, bias)
    cotangent = torch.randn_like(out)
    if torch.backends.mkldnn.is_available():
        assert "LinearFunction" in type(out.grad_fn).__name__
    torch.testing.assert_close(out, expected)
    for a, b in zip(torch.autograd.grad(out, inputs, cotangent), torch.autograd.grad(expected, inputs, cotangent)):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    with torch.backends.mkldnn.flags(enabled=False):
        assert "LinearFunction" not in type(reference.linear(x, weight, bias).grad_fn).__name__


def test_gaps_in_a_weight_take_no_thousandfold_time():
    """oneDNN multiplies by a weight with gaps between its rows without vector instructions."""
    x, weight = torch.randn(512, 256), torch.randn(128, 512)[:, :256]

    def seconds(weight):
        began = time.process_time()
        reference.matmul(x, weight.t())
        return time.process_time() - began

    seconds(weight.contiguous())
    assert min(seconds(weight) for _ in range(3)) < 20 * seconds(weight.contiguous()) + 0.02


def test_masked_cross_entropy_does_no_gradient_work_without_gradients(monkeypatch):
    products = []
    plain = reference.matmul
    monkeypatch.setattr(reference, "matmul", lambda *a: products.append(a) or plain(*a))
    inputs = double(3, 4), double(7, 4), double(7), torch.tensor([1, -100, 3])
    with torch.no_grad():
        without = reference.masked_cross_entropy(*inputs)
    assert len(products) == 1
    assert torch.equal(without[0], reference.masked_cross_entropy(*inputs)[0])
    assert len(products) == 3


def test_attention_in_bfloat16_is_within_its_rounding():
    """On a CPU it takes another way than float32: the same result to a few of bfloat16's 2^-8 steps."""
    lengths = [40, 16, 1, 0, 33]
    cu_seqlens = cu_seqlens_of(lengths, "cpu")
    qkv = torch.randn(sum(lengths) + 2, 3, 2, 8, dtype=torch.bfloat16, requires_grad=True)
    wide = qkv.detach().double().requires_grad_()
    out, truth = (reference.attention(x, None, None, cu_seqlens, 40) for x in (qkv, wide))
    assert (out.double() - truth).abs().max() < 4 * 2**-8
    cotangent = torch.randn_like(truth)
    (gradient,), (expected,) = (
        torch.autograd.grad(x, y, cotangent.to(x.dtype)) for x, y in ((out, qkv), (truth, wide))
    )
    assert (gradient.double() - expected).abs().max() < 4 * 2**-8 * expected.abs().max()
