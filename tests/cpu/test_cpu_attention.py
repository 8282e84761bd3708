"""Attention on a CPU: each of its implementations against the reference, in float64 and float32."""

import itertools

import pytest
import torch
from helpers import assert_same_bits, assert_within_budget, cu_seqlens_of
from torch.autograd import gradgradcheck

from fastbert import reference
from fastbert.cpu import attention, groups
from fastbert.cpu import ops as cpu
from fastbert.cpu.matmul import bmm

H = 3
SEED = torch.tensor([2**40 + 17])
DROPOUT = dict(dropout_p=0.3, seed=SEED, offset=3)
dropouts = pytest.mark.parametrize("options", [dict(seed=None), DROPOUT], ids=["", "dropout"])


def operands(form, lengths, K, slack=0):
    """q, k, v in a packing."""
    qkv = torch.randn(sum(lengths) + slack, 3, H, K)
    if form == "qkv":
        return qkv, None, None
    if form == "kv":
        return qkv[:, 0].contiguous(), qkv[:, 1:].contiguous(), None
    return tuple(qkv.transpose(2, 3).contiguous().transpose(2, 3).unbind(1))


def starts_of(lengths):
    return tuple(cu_seqlens_of(lengths, "cpu").tolist())


def with_starts(function, lengths, **options):
    """One of the implementations, called as an op: with q, k, v and a bias or None."""

    def run(q, k, v, bias):
        scale = q.shape[-1] ** -0.5
        extra = {} if bias is None else dict(bias=bias)
        return function(q, k, v, starts_of(lengths), scale=scale, **extra, **options)

    return run


def by_reference(lengths, **options):
    def run(q, k, v, bias):
        sequences = cu_seqlens_of(lengths, "cpu"), max(lengths)
        if bias is None:
            return reference.attention(q, k, v, *sequences, **options)
        return reference.biased_attention(q, k, v, bias, *sequences, **options)

    return run


# 300: not all heads at a time; with K of 20, the backward computes probabilities of sequences above 80 again; with K
# of 64, products of 128 rows are oneDNN's
@pytest.mark.parametrize("lengths, K", [([128, 130], 64), ([70, 0, 1, 130], 20), ([300, 5], 8)], ids=str)
@pytest.mark.parametrize("with_bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("form", ["qkv", "kv", "apart"])
@dropouts
def test_in_cache(lengths, K, with_bias, form, options):
    inputs = operands(form, lengths, K, slack=3)
    bias = 2 * torch.randn(2 * max(lengths) + 6, H) if with_bias else None
    assert_within_budget(
        with_starts(attention.in_cache, lengths, **options), by_reference(lengths, **options), *inputs, bias
    )


@pytest.mark.parametrize("with_bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("form", ["qkv", "kv", "apart"])
@pytest.mark.parametrize("lengths", [[3, 0, 4, 1, 4], [40, 16, 17, 1, 33, 0, 32, 47]], ids=["short", "several groups"])
@dropouts
def test_in_groups(lengths, form, with_bias, options):
    inputs = operands(form, lengths, 13, slack=2)
    bias = 2 * torch.randn(2 * max(lengths), H) if with_bias else None
    assert_within_budget(
        with_starts(groups.in_groups, lengths, **options), by_reference(lengths, **options), *inputs, bias
    )


@pytest.mark.parametrize("form", ["qkv", "kv", "apart"])
@pytest.mark.parametrize("length", [1, 5, 70])
def test_sequences_of_one_length(length, form):
    def uniform(q, k, v, bias):
        return groups.uniform(q, k, v, 3, q.shape[-1] ** -0.5)

    assert_within_budget(uniform, by_reference([length] * 3), *operands(form, [length] * 3, 13), None)


@pytest.mark.parametrize("lengths", [[9, 4, 0, 1], [70, 9, 90], [5, 5]], ids=str)
@pytest.mark.parametrize("window", [None, 0, 3, 1000])
@dropouts
def test_the_op_chooses_a_right_one(lengths, window, options):
    qkv, sequences = operands("qkv", lengths, 12)[0], (cu_seqlens_of(lengths, "cpu"), max(lengths))
    assert_within_budget(cpu.attention, reference.attention, qkv, None, None, *sequences, window=window, **options)


@dropouts
def test_some_query_rows(options):
    """Sequences without query rows, and query rows whose sequence is empty."""
    lengths, lengths_q = [9, 4, 0, 0, 1, 40], [2, 0, 3, 0, 1, 5]
    q, kv = torch.randn(sum(lengths_q), 2, 16), torch.randn(sum(lengths), 2, 2, 16)
    assert_within_budget(
        cpu.attention, reference.attention, q, kv, None, cu_seqlens_of(lengths, "cpu"), 40,
        cu_seqlens_q=cu_seqlens_of(lengths_q, "cpu"), max_seqlen_q=5, **options,
    )  # fmt: skip


# 90: a sequence in blocks of rows; 400 tokens of it: not all heads at a time
@pytest.mark.parametrize(
    ("lengths", "terms"),
    [
        *itertools.product(([9, 4, 0, 1], [41, 90, 3]), ("c2p p2c", "c2p", "p2c", "neither")),
        # the slow one, once
        ([400], "c2p p2c"),
    ],
    ids=str,
)
@dropouts
def test_disentangled(lengths, terms, options):
    heads = 8 if max(lengths) == 400 else 2
    qkv = torch.randn(sum(lengths) + 2, 3, heads, 8)
    tables = [torch.randn(16, heads, 8) if term in terms else None for term in ("c2p", "p2c")]
    assert_within_budget(
        cpu.disentangled_attention, reference.disentangled_attention, qkv, None, None, *tables,
        cu_seqlens_of(lengths, "cpu"), max(lengths), position_buckets=8, max_relative_positions=40, **options,
    )  # fmt: skip


@pytest.mark.parametrize("name", ["attention", "biased_attention", "disentangled_attention"])
@pytest.mark.parametrize("lengths", [[9, 4, 1], [80, 70]], ids=str)
def test_rows_past_the_last_sequence(name, lengths):
    """They hold NaN, give 0 and get a gradient of 0."""
    qkv = operands("qkv", lengths, 8, slack=3)[0]
    qkv[-3:] = float("nan")
    tables = {"biased_attention": [torch.randn(200, H)], "disentangled_attention": [torch.randn(16, H, 8)] * 2}
    options = dict(max_relative_positions=8) if name == "disentangled_attention" else {}
    for op in (getattr(cpu, name), getattr(reference, name)):
        leaf = qkv.clone().requires_grad_()
        out = op(leaf, None, None, *tables.get(name, []), cu_seqlens_of(lengths, "cpu"), max(lengths), **options)
        (gradient,) = torch.autograd.grad(out, leaf, torch.ones_like(out))
        for x in out, gradient:
            assert torch.isfinite(x).all() and not x[-3:].any()


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (3,), (0, 2)], ids=str)
def test_gradients_of_some(wanted):
    lengths = [128, 64]
    inputs = [*operands("apart", lengths, 64), torch.randn(256, H)]

    def gradients(wanted):
        leaves = [x.detach().clone().requires_grad_(i in wanted) for i, x in enumerate(inputs)]
        out = with_starts(attention.in_cache, lengths)(*leaves)
        cotangent = torch.ones_like(out)
        return out, *torch.autograd.grad(out, [leaves[i] for i in wanted], cotangent)

    whole = gradients(range(4))
    assert_same_bits(gradients(wanted), [whole[0], *(whole[1 + i] for i in wanted)])


# sizes below and above those from which oneDNN computes
@pytest.mark.parametrize(
    "shape", [(3, 5, 7, 6), (1, 5, 7, 6), (4, 1, 5, 1), (2, 129, 64, 128), (1, 130, 65, 127), (2, 1, 1025, 1025)],
    ids=str,
)  # fmt: skip
def test_product_of_any_layout(shape):
    G, M, C, N = shape
    lefts = torch.randn(G, M, C), torch.randn(M, 2, G, C)[:, 1].transpose(0, 1), torch.randn(G, C, M).transpose(1, 2)
    rights = torch.randn(G, C, N), torch.randn(C, 3, G, N)[:, 1].transpose(0, 1), torch.randn(N, G, C).permute(1, 2, 0)
    for a in lefts:
        for b in rights:
            got = bmm(a, b)
            torch.testing.assert_close(got, a @ b, rtol=1e-4, atol=1e-4)
            # what lies otherwise would be copied by the softmax
            assert got.is_contiguous() or got.transpose(0, 1).is_contiguous()


@pytest.mark.parametrize("with_bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("form", ["qkv", "kv", "apart"])
@dropouts
def test_second_derivatives_in_cache(form, with_bias, options):
    lengths = [3, 0, 4, 1]
    inputs = [*operands(form, lengths, 5, slack=1), torch.randn(8, H) if with_bias else None]
    given = [i for i, x in enumerate(inputs) if x is not None]
    run = with_starts(attention.in_cache, lengths, **options)

    def function(*leaves):
        return run(*(leaves[given.index(i)] if i in given else None for i in range(4)))

    assert gradgradcheck(function, [inputs[i].double().requires_grad_() for i in given], fast_mode=True)


def test_the_same_twice():
    """Twice the same bits; with create_graph=True the same up to rounding."""
    qkv = torch.randn(128, 3, H, 16, requires_grad=True)
    out = cpu.attention(qkv, None, None, cu_seqlens_of([128], "cpu"), 128, dropout_p=0.1, seed=SEED)
    cotangent = torch.randn_like(out)
    once, again, differentiable = (
        torch.autograd.grad(out, qkv, cotangent, retain_graph=True, create_graph=create_graph)[0]
        for create_graph in (False, False, True)
    )
    assert torch.equal(once, again) and differentiable.requires_grad
    torch.testing.assert_close(once, differentiable)


def test_one_tensor_given_three_times():
    """Its gradient is the sum of three, with create_graph=True too."""
    x = torch.randn(70, H, 8, dtype=torch.float64, requires_grad=True)
    out = cpu.attention(x, x, x, cu_seqlens_of([70], "cpu"), 70)
    once, again = (
        torch.autograd.grad(out.square().sum(), x, retain_graph=True, create_graph=c)[0] for c in (False, True)
    )
    torch.testing.assert_close(once, again)


def test_memory_of_long_sequences():
    """No [H, S, S] is kept: what autograd holds is the inputs."""
    kept = []
    qkv = torch.randn(512, 3, H, 16, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        cpu.attention(qkv, None, None, cu_seqlens_of([512], "cpu"), 512)
    assert sum(kept) == qkv.numel()


@pytest.mark.parametrize("lengths", [[40, 16, 1, 0, 33], [80, 70]], ids=str)
@pytest.mark.parametrize("is_older", [True, False], ids=["in steps", "in cache or fused"])
@pytest.mark.parametrize("options", [{}, dict(dropout_p=0.2, seed=torch.tensor([3]))], ids=["", "dropout"])
def test_bfloat16_is_within_its_rounding(lengths, is_older, options, monkeypatch):
    """Computed differently from float32: the same result to a few of bfloat16's steps of 2^-8."""
    for module in (attention, groups):
        monkeypatch.setattr(module, "prefers_onednn", lambda *arguments: is_older)
    cu_seqlens = cu_seqlens_of(lengths, "cpu")
    qkv = torch.randn(sum(lengths) + 2, 3, 2, 8, dtype=torch.bfloat16, requires_grad=True)
    wide = qkv.detach().double().requires_grad_()
    out, truth = (
        op.attention(x, None, None, cu_seqlens, max(lengths), **options) for op, x in ((cpu, qkv), (reference, wide))
    )
    assert (out.double() - truth).abs().max() < 4 * 2**-8
    cotangent = torch.randn_like(truth)
    (gradient,), (expected,) = (
        torch.autograd.grad(x, y, cotangent.to(x.dtype)) for x, y in ((out, qkv), (truth, wide))
    )
    assert (gradient.double() - expected).abs().max() < 4 * 2**-8 * expected.abs().max()


def test_gradients_after_a_call_in_inference_mode_with_the_same_lengths():
    q, cu_seqlens = torch.randn(12, 3, 2, 4, requires_grad=True), torch.tensor([0, 5, 12])
    with torch.inference_mode():
        expected = attention.attention(q, None, None, cu_seqlens, 7)
    out = attention.attention(q, None, None, cu_seqlens, 7)
    out.sum().backward()
    torch.testing.assert_close(out, expected)
    assert q.grad.abs().sum() > 0


def test_what_packing_for_attention_alone_pays_for():
    """Much padding of long texts; neither a full batch nor short texts."""
    assert attention.pays(32 * 200**2, 32 * 512**2, 768, True, 1)
    assert not attention.pays(32 * 512**2, 32 * 512**2, 768, True, 1)
    assert not attention.pays(8 * 3**2, 8 * 8**2, 768, False, 1)
