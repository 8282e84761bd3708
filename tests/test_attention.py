"""Attention's kernels against the reference. A `max_seqlen` above 128 takes the tiled path, whatever the lengths."""

import math

import pytest
import torch
from helpers import assert_within_budget, cu_seqlens_of
from torch.fx.experimental.proxy_tensor import make_fx

from fastbert import reference
from fastbert.kernels import attention as kernels
from fastbert.kernels.attention import attention

SHORT, TILED = 0, 129
pytestmark = pytest.mark.usefixtures("poison")


def longest(path, *lengths):
    """A `max_seqlen` that takes the path."""
    return max(path, *lengths)


@pytest.fixture(params=[SHORT, TILED], ids=["short", "tiled"])
def path(request):
    return request.param


@pytest.fixture
def seed(device):
    return torch.tensor([2**40 + 5], device=device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("K", [8, 13, 32, 64, 80])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_packed_in_one(path, dtype, K, dropout_p, seed, device):
    # lengths below, at and above multiples of the blocks, so that loops with and without a last partial tile both run
    lengths = [16, 0, 1, 13] if path == SHORT else [96, 0, 1, 13]
    qkv = torch.randn(sum(lengths), 3, 2, K, dtype=dtype, device=device)
    cu_seqlens = cu_seqlens_of(lengths, device)
    assert_within_budget(
        attention, reference.attention, qkv, None, None, cu_seqlens, longest(path, *lengths),
        dropout_p=dropout_p, seed=seed, offset=3,
    )  # fmt: skip


@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
def test_longest_short_and_several_tiles(dropout_p, seed, device):
    """128 keys in one program; 150 queries and keys are two tiles of each, the second partial."""
    for lengths in [128, 57], [150, 64]:
        qkv = torch.randn(sum(lengths), 3, 1, 64, dtype=torch.float16, device=device)
        assert_within_budget(
            attention, reference.attention, qkv, None, None, cu_seqlens_of(lengths, device), max(lengths),
            dropout_p=dropout_p, seed=seed, scale=0.3,
        )  # fmt: skip


@pytest.mark.parametrize("form", ["kv together", "three", "three, rows and heads swapped", "every second element"])
def test_forms_and_strides(path, form, device):
    lengths = [5, 0, 12]
    T, H, K = sum(lengths), 2, 16
    if form == "kv together":
        operands = torch.randn(T, H, K, device=device), torch.randn(T, 2, H, K, device=device), None
    elif form == "three":
        operands = torch.randn(3, T, H, K, device=device).unbind(0)
    elif form == "three, rows and heads swapped":
        operands = torch.randn(3, H, T, K, device=device).transpose(1, 2).unbind(0)
    else:
        operands = torch.randn(3, T, H, 2 * K, device=device)[..., ::2].unbind(0)
    cu_seqlens = cu_seqlens_of(lengths, device)
    assert_within_budget(attention, reference.attention, *operands, cu_seqlens, longest(path, *lengths))


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("with_max_seqlen_q", [True, False], ids=["", "no max_seqlen_q"])
def test_some_rows_ask(path, dropout_p, with_max_seqlen_q, seed, device):
    """Sequences in which nothing is asked, and rows whose sequence is empty."""
    lengths, lengths_q = [9, 4, 0, 0, 1, 40], [2, 0, 3, 0, 1, 5]
    q = torch.randn(sum(lengths_q), 2, 16, device=device)
    kv = torch.randn(sum(lengths), 2, 2, 16, device=device)
    cu_seqlens, cu_seqlens_q = cu_seqlens_of(lengths, device), cu_seqlens_of(lengths_q, device)
    arguments = (q, kv, None, cu_seqlens, longest(path, *lengths))
    options = dict(cu_seqlens_q=cu_seqlens_q, dropout_p=dropout_p, seed=seed)
    if with_max_seqlen_q:
        options["max_seqlen_q"] = max(lengths_q)
    assert_within_budget(attention, reference.attention, *arguments, **options)
    out = attention(*arguments, **options)
    assert torch.equal(out[2:5], torch.zeros_like(out[2:5]))


def test_more_rows_than_keys(device):
    """Several tiles of queries over one partial tile of keys, in two sequences."""
    q, kv = torch.randn(140, 1, 16, device=device), torch.randn(12, 2, 1, 16, device=device)
    cu_seqlens, cu_seqlens_q = cu_seqlens_of([5, 7], device), cu_seqlens_of([130, 10], device)
    assert_within_budget(
        attention, reference.attention, q, kv, None, cu_seqlens, 7, cu_seqlens_q=cu_seqlens_q, max_seqlen_q=130
    )


def test_rows_past_the_last_sequence(path, seed, device):
    """They hold NaN, give 0, get a gradient of 0, and change nothing elsewhere."""
    lengths, slack = [7, 0, 21], 150
    T = sum(lengths)
    cu_seqlens = cu_seqlens_of(lengths, device)
    options = dict(dropout_p=0.3, seed=seed)
    clean = torch.randn(T, 3, 2, 16, device=device, requires_grad=True)
    full = torch.full((T + slack, 3, 2, 16), float("nan"), device=device)
    full[:T] = clean.detach()
    full.requires_grad_()
    dout = torch.randn(T + slack, 2, 16, device=device)
    dout[T:] = float("nan")
    max_seqlen = longest(path, *lengths)
    expected = attention(clean, None, None, cu_seqlens, max_seqlen, **options)
    out = attention(full, None, None, cu_seqlens, max_seqlen, **options)
    expected.backward(dout[:T])
    out.backward(dout)
    for got, want in (out, expected), (full.grad, clean.grad):
        assert torch.equal(got[:T], want)
        assert torch.equal(got[T:], torch.zeros_like(got[T:]))


def test_other_sequences_do_not_leak(path, device):
    """A sequence of NaN harms itself only, although tiles reach into it."""
    lengths = [5, 6, 7]
    cu_seqlens = cu_seqlens_of(lengths, device)
    qkv = torch.randn(18, 3, 2, 16, device=device)
    qkv[5:11] = float("nan")
    qkv.requires_grad_()
    out = attention(qkv, None, None, cu_seqlens, longest(path, *lengths))
    out.backward(torch.ones_like(out))
    for x in out, qkv.grad:
        assert torch.isfinite(x[:5]).all() and torch.isfinite(x[11:]).all() and x[5:11].isnan().any()


@pytest.mark.parametrize("layout", ["expanded", "transposed", "sliced", "every second element"])
def test_strides_of_the_incoming_gradient(path, layout, device):
    lengths = [6, 9]
    qkv = torch.randn(15, 3, 2, 16, device=device, requires_grad=True)
    dout = {
        "expanded": torch.randn(1, 1, 16, device=device).expand(15, 2, 16),
        "transposed": torch.randn(2, 15, 16, device=device).transpose(0, 1),
        "sliced": torch.randn(15, 2, 40, device=device)[..., 3:19],
        "every second element": torch.randn(15, 2, 32, device=device)[..., ::2],
    }[layout]
    out = attention(qkv, None, None, cu_seqlens_of(lengths, device), longest(path, *lengths))
    (got,) = torch.autograd.grad(out, qkv, dout, retain_graph=True)
    (want,) = torch.autograd.grad(out, qkv, dout.contiguous())
    assert torch.equal(got, want)


@pytest.mark.parametrize("T, B", [(0, 0), (0, 2), (3, 0), (3, 2)])
def test_no_sequences_or_only_empty_ones(path, T, B, device):
    qkv = torch.randn(T, 3, 2, 16, device=device, requires_grad=True)
    out = attention(qkv, None, None, torch.zeros(B + 1, dtype=torch.int32, device=device), path)
    out.sum().backward()
    assert torch.equal(out, torch.zeros(T, 2, 16, device=device))
    assert torch.equal(qkv.grad, torch.zeros_like(qkv))


def test_large_scores_in_half_precision(path, device):
    """Scores of thousands: the maximum is taken out, so nothing overflows."""
    lengths = [16, 30]
    qkv = torch.randn(46, 3, 2, 16, dtype=torch.float16, device=device)
    qkv[:, :2] *= 30
    assert_within_budget(
        attention, reference.attention, qkv, None, None, cu_seqlens_of(lengths, device), longest(path, *lengths)
    )


def test_large_scores(path, device):
    """The same in fp32. No budget by the plain error here: scores have lost digits, so probabilities carry a relative
    error of the largest score times 2 ** -24, and whether one row shows it is luck. 16 such steps are allowed."""
    lengths = [16, 30]
    cu_seqlens = cu_seqlens_of(lengths, device)
    qkv = torch.randn(46, 3, 2, 16, device=device)
    qkv[:, :2] *= 30
    qkv.requires_grad_()
    wide = qkv.detach().double().requires_grad_()
    out = attention(qkv, None, None, cu_seqlens, longest(path, *lengths))
    truth = reference.attention(wide, None, None, cu_seqlens, max(lengths))
    dout = torch.randn_like(out)
    out.backward(dout)
    truth.backward(dout.double())
    score = torch.einsum("ihk,jhk->hij", wide[:, 0], wide[:, 1]).abs().max().item() / 4
    assert score > 2000
    for got, want in (out, truth), (qkv.grad, wide.grad):
        assert (got.double() - want).abs().max() <= 16 * score * 2**-24 * want.abs().max()


@pytest.mark.filterwarnings("ignore:(overflow|invalid value):RuntimeWarning")  # in rows that are not stored
def test_scores_far_below_zero(path, device):
    """Places without a key have a score of 0, which the log-sum-exp of the others would turn into infinity."""
    q = 10 + torch.rand(13, 2, 16, device=device)
    kv = torch.randn(13, 2, 2, 16, device=device)
    kv[:, 0] = -10 - kv[:, 0].abs() / 10
    cu_seqlens = cu_seqlens_of([5, 1, 7], device)
    assert_within_budget(attention, reference.attention, q, kv, None, cu_seqlens, longest(path, 7))


def test_bfloat16(path, device):
    """Triton's interpreter cuts bfloat16 off instead of rounding it, so this allows two of its steps, 2 ** -8 each."""
    lengths = [16, 5]
    qkv = torch.randn(21, 3, 2, 16, device=device).bfloat16().requires_grad_()
    wide = qkv.detach().double().requires_grad_()
    cu_seqlens = cu_seqlens_of(lengths, device)
    out = attention(qkv, None, None, cu_seqlens, longest(path, *lengths))
    truth = reference.attention(wide, None, None, cu_seqlens, max(lengths))
    dout = torch.randn_like(out)
    out.backward(dout)
    truth.backward(dout.double())
    for got, want in (out, truth), (qkv.grad, wide.grad):
        assert (got.double() - want).abs().max() <= 2**-7 * want.abs().max()


def test_same_bits_twice_and_new_masks_by_seed_and_offset(path, seed, device):
    lengths = [20, 11]
    qkv = torch.randn(31, 3, 2, 16, device=device, requires_grad=True)
    cu_seqlens = cu_seqlens_of(lengths, device)

    def run(seed, offset, dropout_p=0.5):
        out = attention(
            qkv, None, None, cu_seqlens, longest(path, *lengths), dropout_p=dropout_p, seed=seed, offset=offset
        )
        return out, *torch.autograd.grad(out.square().sum(), qkv)

    once, again = run(seed, 1), run(seed, 1)
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))
    assert not torch.equal(once[0], run(seed, 2)[0])
    assert not torch.equal(once[0], run(seed + 1, 1)[0])
    assert all(torch.equal(a, b) for a, b in zip(run(seed, 1, 0.0), run(None, 0, 0.0), strict=True))


def operator_arguments(form, max_seqlen, dropout_p, seed, device):
    lengths = [5, 0, 9]
    q, k, v = {
        "qkv": (torch.randn(15, 3, 2, 16, device=device), None, None),
        "q, kv": (torch.randn(15, 2, 16, device=device), torch.randn(15, 2, 2, 16, device=device), None),
        "q, k, v": tuple(torch.randn(3, 15, 2, 16, device=device)),
    }[form]
    cu_seqlens = cu_seqlens_of(lengths, device)
    return (q, k, v), (cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, 0.25, dropout_p, seed, 7)


@pytest.mark.parametrize("form", ["qkv", "q, kv", "q, k, v"])
def test_operators(path, form, seed, device):
    """Schema, fake implementation, no aliases, and tracing, by PyTorch's own checks."""
    operands, rest = operator_arguments(form, longest(path, 9), 0.1, seed, device)
    torch.library.opcheck(torch.ops.fastbert.attention_fwd, (*operands, *rest))
    out, lse = kernels.attention_fwd(*operands, *rest)
    torch.library.opcheck(torch.ops.fastbert.attention_bwd, (torch.randn_like(out), *operands, out, lse, *rest))


def test_compile_and_trace(path, seed, device):
    """torch.compile without a graph break, and make_fx over forward and backward, give the bits of the plain call."""
    lengths = [5, 0, 9]
    cu_seqlens = cu_seqlens_of(lengths, device)

    def step(qkv, seed):
        out = attention(qkv, None, None, cu_seqlens, longest(path, *lengths), dropout_p=0.2, seed=seed, offset=1)
        return out, *torch.autograd.grad(out.square().sum(), qkv)

    qkv = torch.randn(14, 3, 2, 16, device=device, requires_grad=True)
    plain = step(qkv, seed)
    traced = make_fx(step)(qkv, seed)(qkv, seed)
    assert all(torch.equal(a, b) for a, b in zip(plain, traced, strict=True))

    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(qkv, seed):
        return attention(qkv, None, None, cu_seqlens, longest(path, *lengths), dropout_p=0.2, seed=seed, offset=1)

    out = compiled(qkv, seed)
    assert torch.equal(out, plain[0])
    assert torch.equal(*torch.autograd.grad(out.square().sum(), qkv), plain[1])


def test_log_sum_exp(path, seed, device):
    """To base 2, in fp32, of the scaled scores, and 0 in rows past the last sequence."""
    lengths = [14, 1]
    q, k, v = torch.randn(3, 17, 2, 16, dtype=torch.float16, device=device)
    cu_seqlens = cu_seqlens_of(lengths, device)
    max_seqlen = longest(path, *lengths)
    _, lse = kernels.attention_fwd(q, k, v, None, cu_seqlens, max_seqlen, max_seqlen, 0.5, 0.1, seed, 0)
    score = torch.einsum("ihk,jhk->hij", q.double(), k.double()) * 0.5
    want = torch.cat([score[:, :14, :14].logsumexp(-1), score[:, 14:15, 14], torch.zeros(2, 2, device=device)], 1)
    torch.testing.assert_close(lse.double(), want / math.log(2), rtol=1e-6, atol=1e-6)


def test_no_second_derivative(device):
    qkv = torch.randn(5, 3, 1, 16, device=device, requires_grad=True)
    out = attention(qkv, None, None, cu_seqlens_of([5], device), 5)
    (grad,) = torch.autograd.grad(out.square().sum(), qkv, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.parametrize(
    "change, error, words",
    [
        (dict(dtype=torch.float64), TypeError, "float64"),
        (dict(K=136), ValueError, "136"),
        (dict(scale=0.0), ValueError, "0.0"),
        (dict(dropout_p=0.1), ValueError, "seed"),
    ],
    ids=["dtype", "head size", "scale", "no seed"],
)
def test_bad_arguments(change, error, words, device):
    qkv = torch.randn(4, 3, 1, change.pop("K", 16), dtype=change.pop("dtype", torch.float32), device=device)
    with pytest.raises(error, match=words):
        attention(qkv, None, None, cu_seqlens_of([4], device), 4, **change)
