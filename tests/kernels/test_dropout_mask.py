"""Kernels, NumPy and the reference draw the same dropout mask, bit for bit; dropout on a CPU."""

import shutil

import pytest
import torch
import triton
import triton.language as tl
from torch.autograd import gradcheck, gradgradcheck

from fastbert import reference
from fastbert.cpu import dropout
from fastbert.kernels._launch import dropout_constants
from fastbert.kernels._math import attention_keep_mask, keep_mask


@triton.jit
def _mask_kernel(
    seed_ptr, out_ptr, first_row, head, offset, threshold, columns,
    R: tl.constexpr, C: tl.constexpr, IS_ATTENTION: tl.constexpr,
):  # fmt: skip
    row = first_row + tl.arange(0, R)
    if IS_ATTENTION:
        keep = attention_keep_mask(row, head, tl.program_id(0) * C, tl.load(seed_ptr), offset, threshold, C)
    else:
        keep = keep_mask(row, head, tl.program_id(0) * C, tl.load(seed_ptr), offset, threshold, C)
    column = tl.program_id(0) * C + tl.arange(0, C)
    out = out_ptr + tl.arange(0, R)[:, None] * columns + column[None, :]
    tl.store(out, keep.to(tl.int8), mask=column[None, :] < columns)


@pytest.mark.parametrize("mask, C", [("keep_mask", 32), ("attention_keep_mask", 16), ("attention_keep_mask", 64)])
@pytest.mark.parametrize("seed, columns", [(0, 150), (-7, 1), (2**40 + 3, 37), (-(2**63), 8)])
def test_kernel_and_reference_masks_are_equal(mask, C, seed, columns, device):
    seed = torch.tensor([seed], device=device)
    out = torch.zeros(4, columns, dtype=torch.int8, device=device)
    threshold, _ = dropout_constants(0.3)
    grid = (triton.cdiv(columns, C),)
    _mask_kernel[grid](seed, out, 1000, 5, 9, threshold, columns, R=4, C=C, IS_ATTENTION=mask != "keep_mask")
    row = torch.arange(1000, 1004, device=device)
    want = getattr(reference, mask)(row, torch.full_like(row, 5), columns, seed, 9, 0.3)
    assert torch.equal(out.bool(), want)


@pytest.mark.parametrize("mask", ["keep_mask", "attention_keep_mask"])
@pytest.mark.parametrize(
    "seed, offset, columns",
    [(0, 0, 0), (0, 0, 1), (2**40 + 3, 2**31 + 5, 37), (-1, 2**32 + 7, 768), (-(2**63), -1, 20000)],
    ids=str,
)
def test_numpy_and_torch_draw_the_same_mask(mask, seed, offset, columns):
    """Rows and heads of several shapes; no block, one and several; with 20000 columns a block is a row."""
    seed = torch.tensor([seed])
    counts = [0, 1, 5] if columns > 768 else [0, 1, 700]
    many = torch.arange(2**31 - 3, 2**31 + 697)
    places = [(many[:n], torch.tensor(5)) for n in counts]
    places += [(many[:6].view(3, 1, 2), torch.arange(2)[:, None]), (torch.tensor(-1), torch.tensor(2**40))]
    fast, plain = (
        [getattr(file, mask)(*place, columns, seed, offset, p) for place in places for p in (0.1, 1.0)]
        for file in (dropout, reference)
    )
    for a, b in zip(fast, plain):
        assert a.dtype == b.dtype == torch.bool and torch.equal(a, b)


@pytest.mark.parametrize("threshold", [1, 65535, 65536])
def test_attention_mask_near_no_and_full_dropout(threshold, device):
    """All but one of 65536 draws kept, all but one dropped, and every one dropped."""
    seed = torch.tensor([3], device=device)
    out = torch.zeros(16, 512, dtype=torch.int8, device=device)
    _mask_kernel[(8,)](seed, out, 0, 0, 0, threshold, 512, R=16, C=64, IS_ATTENTION=True)
    row = torch.arange(16, device=device)
    assert torch.equal(out.bool(), reference.attention_keep_mask(row, row * 0, 512, seed, 0, threshold / 65536))
    assert abs(out.double().mean() - (1 - threshold / 65536)) < 1e-3


def test_the_two_masks_have_the_same_pieces_in_another_order():
    row = torch.arange(40)
    seed = torch.tensor([11])
    one, other = (
        mask(row, row * 0, 128, seed, 2, 0.4) for mask in (reference.keep_mask, reference.attention_keep_mask)
    )
    column = torch.arange(128)
    group = column // 32 * 4 + column // 2 % 4
    piece = column % 2 + 2 * (column // 8 % 2) + 4 * (column // 16 % 2)
    assert torch.equal(other, one[:, group * 8 + piece])
    assert sorted((group * 8 + piece).tolist()) == column.tolist()


def test_masks_follow_the_published_philox():
    """Random123's known answer for philox4x32-7: all-ones counter and key."""
    ones = torch.tensor([0xFFFFFFFF])
    words = reference.philox(ones, ones, ones, ones, 0xFFFFFFFF, 0xFFFFFFFF)
    assert [hex(int(w)) for w in words] == ["0x5207ddc2", "0x45165e59", "0x4d8ee751", "0x8c52f662"]


def test_keep_rate_and_independence():
    row = torch.arange(2000)
    seed = torch.tensor([11])
    draw = lambda offset, head: reference.keep_mask(row, torch.full_like(row, head), 100, seed, offset, 0.1)  # noqa: E731
    masks = [draw(0, 0), draw(1, 0), draw(0, 1)]
    sigma = (0.1 * 0.9 / masks[0].numel()) ** 0.5
    for mask in masks:
        assert abs(mask.double().mean().item() - 0.9) < 4 * sigma
    for other in masks[1:]:  # two masks agree where both keep or both drop: 0.81 + 0.01 when independent
        agreement = (masks[0] == other).double().mean().item()
        assert abs(agreement - 0.82) < 4 * (0.82 * 0.18 / other.numel()) ** 0.5


files = pytest.mark.parametrize("file", [dropout, reference], ids=["cpu", "reference"])


@files
def test_dropout_keeps_the_expectation_and_p0_is_the_identity(file):
    x = torch.ones(1000, 96)
    assert file.dropout(x, 0.0, None, 0) is x
    dropped = file.dropout(x, 0.1, torch.tensor([7]), 4)
    kept = dropped != 0
    assert abs(kept.double().mean() - 0.9) < 4 * (0.09 / x.numel()) ** 0.5
    torch.testing.assert_close(dropped[kept], torch.full_like(dropped[kept], 65536 / (65536 - 6554)))


def test_dropout_has_a_second_derivative_and_leaves_its_argument_alone():
    x = torch.randn(5, 7, dtype=torch.float64, requires_grad=True)
    run = lambda x: dropout.dropout(x.transpose(0, 1), 0.4, torch.tensor([7]), 4)  # noqa: E731
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
    torch.testing.assert_close(dropout.drop(x, keep, 0.3).double(), expected, rtol=rtol, atol=0)
    assert dropout.drop(x, torch.zeros_like(keep), 1.0).abs().sum() == 0


def test_dropout_compiles_to_the_same_numbers():
    """torch.compile sees PyTorch operations; eager mode on a CPU uses NumPy."""
    x = torch.randn(5, 70, requires_grad=True)
    results = []
    for function in (
        dropout.dropout,
        reference.dropout,
        torch.compile(dropout.dropout, backend="aot_eager", fullgraph=True),
    ):
        out = function(x, 0.3, torch.tensor([2**40 + 17]), 2**31 + 4)
        results.append((out, *torch.autograd.grad(out, x, torch.ones_like(out))))
    for a, b, c in zip(*results):
        assert torch.equal(a, b) and torch.equal(a, c)


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile writes C++ for a CPU")
def test_masks_in_compiled_code():
    """Nothing overflows there, for seeds with large products and for heads from an arange."""

    def draw(seed):
        row, head = torch.arange(5), torch.arange(12)[:, None]
        return dropout.attention_keep_mask(row, head, 70, seed, 2**31 + 4, 0.3)

    compiled = torch.compile(draw, fullgraph=True)
    for seed in (5, 2**40 + 3, -9, -(2**63) + 2**32 - 1):
        assert torch.equal(draw(torch.tensor([seed])), compiled(torch.tensor([seed])))
