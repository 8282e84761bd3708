"""Attention in a CPU's cache against the padded way that `reference` takes elsewhere, in float64 and float32."""

import pytest
import torch
from helpers import assert_same_bits, cu_seqlens_of

from fastbert import cpu_attention, reference

H = 3
SEED = torch.tensor([2**40 + 17])


@pytest.fixture(params=["oneDNN", "MKL"])
def library(request, monkeypatch):
    monkeypatch.setattr(cpu_attention, "ONEDNN_SIZE", 0 if request.param == "oneDNN" else 2**60)


@pytest.fixture(params=[2**18, 2**13], ids=["all heads at once", "a head at a time"])
def parts(request, monkeypatch):
    monkeypatch.setattr(cpu_attention, "_SCORES", request.param // torch.get_num_threads())


def operands(form, lengths, K, dtype, slack=0):
    """q, k, v in a packing; rows past the last sequence hold NaN."""
    qkv = torch.randn(sum(lengths) + slack, 3, H, K, dtype=dtype)
    qkv[sum(lengths) :] = float("nan")
    if form == "qkv":
        return qkv, None, None
    if form == "kv":
        return qkv[:, 0], qkv[:, 1:], None
    return tuple(qkv.transpose(2, 3).contiguous().transpose(2, 3).unbind(1))


def results(inputs, bias, lengths, wants=None, **options):
    """(output, gradients) of attention, or of biased attention if there is a bias. wants: whose gradients."""
    leaves = [x if x is None else x.detach().clone() for x in (*inputs, bias)]
    wants = [x is not None for x in leaves] if wants is None else wants
    leaves = [x if x is None else x.requires_grad_(want) for x, want in zip(leaves, wants)]
    cu_seqlens = cu_seqlens_of(lengths, "cpu")
    if bias is None:
        out = reference.attention(*leaves[:3], cu_seqlens, max(lengths), **options)
    else:
        out = reference.biased_attention(*leaves, cu_seqlens, max(lengths), **options)
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(out.dtype)
    return out, *torch.autograd.grad(out, [x for x, want in zip(leaves, wants) if want], cotangent)


@pytest.fixture
def padded(monkeypatch):
    """The results of the padded way."""

    def run(*arguments, **options):
        with monkeypatch.context() as patch:
            patch.setattr(reference, "_runs_in_cache", lambda q, starts: False)
            return results(*arguments, **options)

    return run


# with K of 20, probabilities of sequences above 80 are made again in the backward
@pytest.mark.parametrize("lengths", [[128], [70, 0, 130], [65, 65], [150, 7, 1, 99]], ids=str)
@pytest.mark.parametrize("with_bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("form", ["qkv", "kv", "apart"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_equals_the_padded_way(lengths, with_bias, form, dropout_p, library, parts, padded):
    for dtype, tolerance in (torch.float64, 1e-11), (torch.float32, 1e-4):
        inputs = operands(form, lengths, 20, dtype, slack=3)
        bias = 2 * torch.randn(2 * max(lengths) + 6, H, dtype=dtype) if with_bias else None
        options = dict(dropout_p=dropout_p, seed=SEED, offset=3)
        got, wanted = results(inputs, bias, lengths, **options), padded(inputs, bias, lengths, **options)
        assert (
            "CPUAttention" in type(got[0].grad_fn).__name__ and "CPUAttention" not in type(wanted[0].grad_fn).__name__
        )
        for g, w in zip(got, wanted, strict=True):
            assert (g - w).abs().max() <= tolerance * w.abs().max()
        with torch.no_grad():
            out = reference.attention(*inputs, cu_seqlens_of(lengths, "cpu"), max(lengths), **options)
        assert with_bias or torch.equal(out, got[0])


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (3,), (0, 2)], ids=str)
def test_gradients_of_some(wanted, library):
    inputs, bias = operands("apart", [80, 64], 8, torch.float32), torch.randn(160, H)
    whole = results(inputs, bias, [80, 64])
    some = results(inputs, bias, [80, 64], [i in wanted for i in range(4)])
    assert_same_bits(some, [whole[0], *(whole[1 + i] for i in wanted)])


@pytest.mark.parametrize("shape", [(3, 5, 7, 6), (1, 5, 7, 6), (1, 1, 3, 4), (4, 1, 5, 1), (2, 33, 16, 33)], ids=str)
def test_product_of_any_layout(shape, library):
    G, M, C, N = shape
    lefts = torch.randn(G, M, C), torch.randn(M, 2, G, C)[:, 1].transpose(0, 1), torch.randn(G, C, M).transpose(1, 2)
    rights = torch.randn(G, C, N), torch.randn(C, 3, G, N)[:, 1].transpose(0, 1), torch.randn(N, G, C).permute(1, 2, 0)
    for a in lefts:
        for b in rights:
            got = cpu_attention._product(a, b)
            torch.testing.assert_close(got, a @ b, rtol=1e-5, atol=1e-5)
            assert cpu_attention._plain(got).is_contiguous()


def test_the_same_twice_and_no_second_derivative():
    qkv = torch.randn(128, 3, H, 16, requires_grad=True)
    out = reference.attention(qkv, None, None, cu_seqlens_of([128], "cpu"), 128, dropout_p=0.1, seed=SEED)
    cotangent = torch.randn_like(out, requires_grad=True)
    (once,) = torch.autograd.grad(out, qkv, cotangent, retain_graph=True)
    (again,) = torch.autograd.grad(out, qkv, cotangent, create_graph=True)
    assert torch.equal(once, again)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        again.sum().backward()


@pytest.mark.parametrize("lengths, slack", [([20], 3), ([16, 16], 2)], ids=str)
def test_slack_beside_sequences_of_one_length(lengths, slack):
    """Rows past the last sequence, fewer than a sequence has: not read, and 0."""
    inputs = operands("qkv", lengths, 8, torch.float64, slack)
    with torch.no_grad():
        clean = inputs[0][: sum(lengths)]
        got, alone = (
            reference.attention(x, None, None, cu_seqlens_of(lengths, "cpu"), max(lengths)) for x in (inputs[0], clean)
        )
    torch.testing.assert_close(got[: sum(lengths)], alone)
    assert (got[sum(lengths) :] == 0).all()


def test_memory_of_long_sequences():
    """No [H, S, S] is kept: what autograd holds is the inputs."""
    kept = []
    qkv = torch.randn(512, 3, H, 16, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        reference.attention(qkv, None, None, cu_seqlens_of([512], "cpu"), 512)
    assert sum(kept) == qkv.numel()
