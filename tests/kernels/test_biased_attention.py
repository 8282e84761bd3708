"""Attention with a bias for each distance: the kernels against the reference, and the reference against its formula."""

import pytest
import torch
from helpers import assert_within_budget, cu_seqlens_of

from fastbert import ops, reference


def arguments(lengths, H, K, device, dtype=torch.float32, slack=0):
    T, longest = sum(lengths) + slack, max(lengths)
    q, k, v = (torch.randn(T, H, K, device=device, dtype=dtype) for _ in range(3))
    bias = 3 * torch.randn(2 * longest, H, device=device)
    return q, k, v, bias, cu_seqlens_of(lengths, device), longest


def kernel(*args, **options):
    return ops.biased_attention(*args, impl="triton", **options)


@pytest.mark.parametrize("lengths, K", [([5], 8), ([1, 0, 13, 7], 13), ([18, 3], 64)], ids=str)
def test_values_and_gradients(lengths, K, device, poison):
    assert_within_budget(kernel, reference.biased_attention, *arguments(lengths, 2, K, device, slack=2))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision(dtype, device):
    args = arguments([17, 30], 2, 16, device, dtype)
    truth = reference.biased_attention(
        *(x.double() if torch.is_tensor(x) and x.is_floating_point() else x for x in args)
    )
    plain, got = reference.biased_attention(*args), kernel(*args)
    assert got.dtype == dtype
    assert (got.double() - truth).abs().max() <= 2 * (plain.double() - truth).abs().max() + 1e-5


def test_dropout_draws_the_same_mask(device):
    args = arguments([9, 20], 2, 16, device)
    options = dict(dropout_p=0.3, seed=torch.tensor([4], device=device), offset=2)
    torch.testing.assert_close(
        kernel(*args, **options), reference.biased_attention(*args, **options), atol=1e-5, rtol=1e-5
    )


def test_the_reference_is_the_formula():
    q, k, v, bias, cu_seqlens, longest = arguments([6, 11], 2, 5, "cpu")
    got = reference.biased_attention(torch.stack((q, k, v), 1), None, None, bias, cu_seqlens, longest)
    for start, end in ((0, 6), (6, 17)):
        place = torch.arange(end - start)
        added = bias[longest + place[:, None] - place].permute(2, 0, 1)
        scores = torch.einsum("ihk,jhk->hij", q[start:end], k[start:end]) * 5**-0.5 + added
        expected = torch.einsum("hij,jhk->ihk", scores.softmax(-1), v[start:end])
        assert (got[start:end] - expected).abs().max() < 1e-6


def test_a_bias_with_too_few_rows_is_refused():
    q, k, v, bias, cu_seqlens, longest = arguments([6, 11], 2, 5, "cpu")
    with pytest.raises(ValueError, match="bias has 20 rows: expected at least 22 for max_seqlen 11"):
        ops.biased_attention(q, k, v, bias[:20], cu_seqlens, longest)
