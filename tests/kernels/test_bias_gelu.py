"""bias_gelu: the kernels against the reference in float64.

Strides, empty rows and dtypes: in the tests of all ops.
"""

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_same_bits, assert_within_budget

from fastbert import reference
from fastbert.kernels.bias_gelu import bias_gelu

pytestmark = pytest.mark.usefixtures("poison")

both = pytest.mark.parametrize("approximate", ["none", "tanh"])


def make(T, F, device, dtype=torch.float32):
    return [torch.randn(shape).to(device, dtype) * 2 for shape in ((T, F), F)]


def check(x, bias, approximate):
    assert_within_budget(bias_gelu, reference.bias_gelu, x, bias, approximate=approximate)


def run(x, bias, op=bias_gelu, **kwargs):
    """The output and both gradients, for a gradient of ones."""
    inputs = [t.detach().requires_grad_() for t in (x, bias)]
    y = op(*inputs, **kwargs)
    return y, *torch.autograd.grad(y, inputs, torch.ones_like(y))


@both
@pytest.mark.parametrize(
    "T, F, dtype",
    [(5, 1, torch.float32), (13, 96, torch.float32), (1, 37, torch.float16), (13, 768, torch.float16)],
    ids=str,
)
def test_values_and_gradients(T, F, dtype, approximate, device):
    check(*make(T, F, device, dtype), approximate)


@both
def test_without_a_bias(approximate, device):
    x, _ = make(13, 37, device)
    check(x, None, approximate)
    leaf = x.requires_grad_()
    y = bias_gelu(leaf, None, approximate=approximate)
    (dx,) = torch.autograd.grad(y, leaf, torch.ones_like(y))
    assert_same_bits((y, dx), run(x, torch.zeros(37, device=device), approximate=approximate)[:2])


@both
def test_more_rows_than_programs(approximate, device):
    check(*make(150, 40, device), approximate)


@both
def test_subnormal_inputs(approximate, device):
    """The result is half the input, and the derivative a half. fp16's subnormal numbers are normal ones in fp32."""
    for dtype, tiny in ((torch.float16, 2**-23), (torch.float32, 2**-124)):
        x = torch.tensor([[tiny, -tiny, 4 * tiny, -4 * tiny]], device=device, dtype=dtype)
        y, dx, _ = run(x, torch.zeros(4, device=device, dtype=dtype), approximate=approximate)
        torch.testing.assert_close(y, F.gelu(x.double(), approximate=approximate).to(dtype), rtol=1e-5, atol=0)
        torch.testing.assert_close(dx, torch.full_like(dx, 0.5), rtol=1e-6, atol=0)


@both
def test_close_to_the_truth_everywhere(approximate, device):
    """In fp32, within two roundings of the largest result over the whole range; the negative tail keeps its digits."""
    x = torch.linspace(-12, 12, 4096, device=device).view(16, 256)
    zero = torch.zeros(256, device=device)
    y, dx, _ = run(x, zero, approximate=approximate)
    wanted, slope, _ = run(x.double(), zero.double(), op=reference.bias_gelu, approximate=approximate)
    assert (y - wanted).abs().max().item() <= 12 * 2**-23
    assert (dx - slope).abs().max().item() <= 2 * 2**-22
    tail = (x < -1) & (wanted.abs() > 1e-20)
    assert ((y - wanted) / wanted)[tail & (x > -6)].abs().max().item() <= 1e-3
    if approximate == "none":
        # below -8 the reference in double loses digits itself; erfc keeps them
        exact = 0.5 * x.double() * torch.special.erfc(-x.double() * 0.5**0.5)
        assert ((y - exact) / exact)[(x < -1) & (x > -12)].abs().max().item() <= 2e-5
