"""Linear layers on a CPU, by the faster of its two matrix libraries."""

import time

import pytest
import torch
import torch.nn.functional as F
from helpers import IMPLEMENTATIONS
from torch.autograd import gradgradcheck

from fastbert import ops, reference
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


def large():
    """What oneDNN multiplies."""
    return torch.randn(150, 100), torch.randn(110, 100, requires_grad=True), torch.randn(110, requires_grad=True)


def test_transforms_of_large_products():
    """As plain PyTorch does: torch.func.grad, several cotangents at once, and a gradient of a gradient."""
    x, weight, bias = large()

    def results(linear):
        loss = lambda weight: linear(x, weight, bias).sin().sum()  # noqa: E731
        out = linear(x, weight, bias)
        batched = torch.autograd.grad(out, weight, torch.ones(2, *out.shape), is_grads_batched=True, retain_graph=True)
        (first,) = torch.autograd.grad(out.sin().sum(), weight, create_graph=True)
        return torch.func.grad(loss)(weight), *batched, *torch.autograd.grad(first.square().sum(), weight)

    for got, expected in zip(results(ops.linear), results(F.linear), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-3)


class Halved(torch.Tensor):
    """A weight that is stored as its half: it can be a linear layer's, and no more than that, as quantised ones."""

    @staticmethod
    def __new__(cls, half):
        return torch.Tensor._make_wrapper_subclass(cls, half.shape, dtype=half.dtype, device=half.device)

    def __init__(self, half):
        self.half_of_it = half

    def __tensor_flatten__(self):
        return ["half_of_it"], None

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is F.linear:
            x, weight, bias = [*args, None][:3]
            return F.linear(x, 2 * weight.half_of_it, bias)
        return super().__torch_function__(function, types, args, kwargs)

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        raise NotImplementedError(f"{function} of a Halved")


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_a_weight_that_computes_in_its_own_way(impl, device, monkeypatch):
    """No op looks into it; each calls F.linear."""
    monkeypatch.setattr(ops, "IMPL", impl)
    x, plain, bias = (t.detach().to(device) for t in large())
    weight, labels = Halved(plain / 2), torch.arange(150, device=device) % 110
    both = torch.cat((plain, plain)), torch.cat((bias, bias))
    for got, expected in [
        (ops.linear(x, weight, bias), F.linear(x, plain, bias)),
        (ops.linears(x, [weight, weight], [bias, bias]), F.linear(x, *both)),
        (ops.linear_gelu(x, weight, bias), F.gelu(F.linear(x, plain, bias))),
        (ops.masked_cross_entropy(x, weight, bias, labels)[0], F.cross_entropy(x @ plain.T + bias, labels).mul(150)),
    ]:
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-3)


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
