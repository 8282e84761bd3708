"""Linear layers on a CPU, by the faster of its two matrix libraries."""

import time

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradgradcheck

from fastbert import reference
from fastbert.cpu import ops as cpu
from fastbert.cpu.matmul import LinearFunction, matmul


@pytest.mark.parametrize("with_bias", [True, False])
def test_linear_through_onednn_equals_torch(with_bias):
    """Values and gradients, odd sizes, inputs that are views; and the switch torch.backends.mkldnn turns it off."""
    x, weight, bias = torch.randn(130, 194)[:, ::2], torch.randn(97, 101).t(), torch.randn(101) if with_bias else None
    inputs = [t.requires_grad_() for t in (x, weight, bias) if t is not None]
    out, expected = cpu.linear(x, weight, bias), F.linear(x, weight, bias)
    cotangent = torch.randn_like(out)
    if torch.backends.mkldnn.is_available():
        assert "LinearFunction" in type(out.grad_fn).__name__
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-4)
    for a, b in zip(torch.autograd.grad(out, inputs, cotangent), torch.autograd.grad(expected, inputs, cotangent)):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-4)
    with torch.backends.mkldnn.flags(enabled=False):
        assert "LinearFunction" not in type(cpu.linear(x, weight, bias).grad_fn).__name__


def test_gaps_in_a_weight_take_no_thousandfold_time():
    """oneDNN multiplies by a weight with gaps between its rows without vector instructions."""
    x, weight = torch.randn(512, 256), torch.randn(128, 512)[:, :256]

    def seconds(weight):
        began = time.process_time()
        matmul(x, weight.t())
        return time.process_time() - began

    seconds(weight.contiguous())
    assert min(seconds(weight) for _ in range(3)) < 20 * seconds(weight.contiguous()) + 0.02


@pytest.mark.parametrize("approximate", ["none", "tanh"])
@pytest.mark.parametrize("with_bias", [True, False])
def test_linear_gelu_without_gradients(with_bias, approximate):
    """oneDNN's GELU behind its product is as accurate as torch's, and where gradients are wanted torch's is used."""
    x, weight = torch.randn(130, 194)[:, ::2], torch.randn(97, 101).t() / 10
    bias = torch.randn(101) if with_bias else None
    wide = F.linear(x.double(), weight.double(), bias if bias is None else bias.double())
    wide = F.gelu(wide, approximate=approximate)
    plain = F.gelu(F.linear(x, weight, bias), approximate=approximate)
    out = cpu.linear_gelu(x, weight, bias, approximate=approximate)
    error, allowed = ((y - wide).abs().max() for y in (out, plain))
    assert error <= 2 * allowed
    with_gradient = cpu.linear_gelu(x, weight.clone().requires_grad_(), bias, approximate=approximate)
    assert "Gelu" in type(with_gradient.grad_fn).__name__


def test_second_derivatives():
    inputs = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in ((5, 3), (4, 3), (4,))]
    assert gradgradcheck(LinearFunction.apply, inputs)


@pytest.mark.parametrize("rows", [3, 150], ids=["few rows", "many"])
@pytest.mark.parametrize("with_gradients", [True, False])
def test_several_layers_at_once(rows, with_gradients):
    x, weights = torch.randn(rows, 100), [torch.randn(n, 100) for n in (100, 70)]
    biases = [torch.randn(len(weight)) for weight in weights]
    with torch.set_grad_enabled(with_gradients):
        got = cpu.linears(x, weights, biases)
    torch.testing.assert_close(got, reference.linears(x, weights, biases), rtol=1e-5, atol=1e-4)
    apart = [F.linear(x, weight, bias) for weight, bias in zip(weights, biases)]
    torch.testing.assert_close(got, torch.cat(apart, 1), rtol=1e-5, atol=1e-4)
