"""gelu_layer_norm: the kernels against the reference in float64.

Strides, empty rows and dtypes: in the tests of all ops.
"""

import pytest
import torch
from helpers import assert_same_bits, assert_within_budget

from fastbert import reference
from fastbert.kernels.gelu_layer_norm import gelu_layer_norm

pytestmark = pytest.mark.usefixtures("poison")

both = pytest.mark.parametrize("approximate", ["none", "tanh"])


def make(T, D, device, dtype=torch.float32):
    """x, bias, weight, ln_bias."""
    return [torch.randn(shape).to(device, dtype) for shape in ((T, D), D, D, D)]


def check(*args, **kwargs):
    assert_within_budget(gelu_layer_norm, reference.gelu_layer_norm, *args, **kwargs)


def run(*args, **kwargs):
    """The output and the four gradients, for a gradient of ones."""
    inputs = [t.detach().requires_grad_() for t in args]
    y = gelu_layer_norm(*inputs, **kwargs)
    return y, *torch.autograd.grad(y, inputs, torch.ones_like(y))


@both
@pytest.mark.parametrize(
    "T, D, dtype",
    [(5, 1, torch.float32), (13, 96, torch.float32), (1, 37, torch.float16), (13, 768, torch.float16)],
    ids=str,
)
def test_values_and_gradients(T, D, dtype, approximate, device):
    check(*make(T, D, device, dtype), approximate=approximate)


@pytest.mark.parametrize("absent", ["bias", "ln_bias", "both"])
def test_absent_biases(absent, device):
    x, bias, weight, ln_bias = make(13, 37, device)
    bias = bias if absent == "ln_bias" else None
    ln_bias = ln_bias if absent == "bias" else None
    check(x, bias, weight, ln_bias)
    zero = torch.zeros(37, device=device)
    present = run(x, zero if bias is None else bias, weight, zero if ln_bias is None else ln_bias)
    leaf = x.requires_grad_()
    y = gelu_layer_norm(leaf, bias, weight, ln_bias)
    assert_same_bits((y, *torch.autograd.grad(y, leaf, torch.ones_like(y))), present[:2])


def test_more_rows_than_programs(device):
    check(*make(75, 256, device))


@pytest.mark.parametrize("D", [312, 5000])
def test_wide_rows(D, device):
    check(*make(2, D, device))


def test_wide_rows_of_half_precision(device):
    """The backward takes two rows at a time, in tiles of its own."""
    check(*make(40, 1000, device, torch.float16))


@both
def test_a_row_whose_gelu_is_zero_gives_the_bias(approximate, device):
    _, bias, weight, ln_bias = make(1, 96, device)
    x = torch.full((3, 96), -1e4, device=device)
    y, dx, _, dweight, dln_bias = run(x, bias, weight, ln_bias, approximate=approximate)
    assert torch.equal(y, ln_bias.expand(3, 96))
    assert torch.equal(dx, torch.zeros_like(dx)) and torch.equal(dweight, torch.zeros_like(dweight))
    assert torch.equal(dln_bias, torch.full_like(dln_bias, 3.0))
