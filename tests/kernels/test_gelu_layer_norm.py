"""gelu_layer_norm: the kernels against the reference in float64, and what must hold to the bit."""

import pytest
import torch
from helpers import LAYOUTS, assert_same_bits, assert_within_budget

from fastbert import reference
from fastbert.kernels.gelu_layer_norm import gelu_layer_norm

pytestmark = pytest.mark.usefixtures("poison")

both = pytest.mark.parametrize("approximate", ["none", "tanh"])


def make(T, D, device, dtype=torch.float32):
    """x, bias, weight, ln_bias."""
    return [torch.randn(shape).to(device, dtype) for shape in ((T, D), D, D, D)]


def check(*args, **kwargs):
    assert_within_budget(gelu_layer_norm, reference.gelu_layer_norm, *args, **kwargs)


def run(*args, cotangent=None, op=gelu_layer_norm, **kwargs):
    """The output and the four gradients, for `cotangent` as it lies in memory."""
    inputs = [t.detach().requires_grad_() for t in args]
    y = op(*inputs, **kwargs)
    return y, *torch.autograd.grad(y, inputs, torch.ones_like(y) if cotangent is None else cotangent)


@both
@pytest.mark.parametrize("D", [1, 37, 96, 768])
@pytest.mark.parametrize("T", [1, 5, 13])
def test_values_and_gradients(T, D, approximate, device):
    check(*make(T, D, device), approximate=approximate)


@both
@pytest.mark.parametrize("D", [37, 96, 768])
def test_half_precision(D, approximate, device):
    check(*make(13, D, device, torch.float16), approximate=approximate)


@both
@pytest.mark.parametrize("half", ["x", "bias, weight, ln_bias", "bias"])
def test_mixed_dtypes(half, approximate, device):
    names = ("x", "bias", "weight", "ln_bias")
    args = (t.half() if name in half.split(", ") else t for name, t in zip(names, make(13, 96, device), strict=True))
    check(*args, approximate=approximate)


@both
@pytest.mark.parametrize("absent", ["bias", "ln_bias", "both"])
def test_absent_biases(absent, approximate, device):
    x, bias, weight, ln_bias = make(13, 37, device)
    bias = bias if absent == "ln_bias" else None
    ln_bias = ln_bias if absent == "bias" else None
    check(x, bias, weight, ln_bias, approximate=approximate)
    zero = torch.zeros(37, device=device)
    present = run(x, zero if bias is None else bias, weight, zero if ln_bias is None else ln_bias)
    leaf = x.requires_grad_()
    y = gelu_layer_norm(leaf, bias, weight, ln_bias)
    assert_same_bits((y, *torch.autograd.grad(y, leaf, torch.ones_like(y))), present[:2])


def test_result_in_a_wider_dtype(device):
    """It is not rounded on the way; gradients keep their arguments' dtypes."""
    args = make(13, 96, device, torch.float16)
    check(*args, dtype=torch.float32)
    y, *gradients = run(*args, dtype=torch.float32)
    assert y.dtype == torch.float32 and {g.dtype for g in gradients} == {torch.float16}
    assert not torch.equal(y, y.half().float())


def test_result_in_a_narrower_dtype(device):
    """It is rounded once."""
    args, cotangent = make(13, 96, device), torch.randn(13, 96).to(device, torch.float16)
    y, *gradients = run(*args, cotangent=cotangent.float())
    assert_same_bits(run(*args, cotangent=cotangent, dtype=torch.float16), (y.half(), *gradients))


def test_rows_that_are_too_wide_are_refused(device):
    with pytest.raises(ValueError, match="8193 columns"):
        gelu_layer_norm(*make(2, 8193, device))


@both
def test_more_rows_than_programs(approximate, device):
    check(*make(75, 256, device), approximate=approximate)


@pytest.mark.parametrize("D", [300, 312, 1023, 5000])
def test_wide_rows(D, device):
    check(*make(2, D, device))


@pytest.mark.parametrize("D", [1000, 1024])
def test_wide_rows_of_half_precision(D, device):
    """The backward takes them two at a time, in tiles of its own."""
    check(*make(75, D, device, torch.float16))


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
def test_extreme_inputs(dtype, approximate, device):
    x, _, weight, ln_bias = make(13, 96, device, dtype)
    extremes = torch.tensor([0.0, -0.0, 10.0, -10.0, 1e4, -1e4, 30.0, -30.0], device=device, dtype=dtype)
    x[:, :8] = extremes
    zero = torch.zeros_like(weight)
    results = run(x, zero, weight, ln_bias, approximate=approximate, eps=1e-5)
    assert all(torch.isfinite(result).all() for result in results)
    check(x.clamp(-30, 30), zero, weight, ln_bias, approximate=approximate, eps=1e-5)


@both
def test_a_row_that_the_gelu_silences_gives_the_bias(approximate, device):
    _, bias, weight, ln_bias = make(1, 96, device)
    x = torch.full((3, 96), -1e4, device=device)
    y, dx, _, dweight, dln_bias = run(x, bias, weight, ln_bias, approximate=approximate)
    assert torch.equal(y, ln_bias.expand(3, 96))
    assert torch.equal(dx, torch.zeros_like(dx)) and torch.equal(dweight, torch.zeros_like(dweight))
    assert torch.equal(dln_bias, torch.full_like(dln_bias, 3.0))


def test_small_spread_on_a_large_mean(device):
    """Above 10 the GELU changes nothing, so the LayerNorm sees what it is given."""
    x, bias, weight, ln_bias = make(13, 96, device)
    check(x * 1e-2 + 1e4, torch.zeros_like(bias), weight, ln_bias)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda f: f.__name__)
def test_strides_of_inputs_and_gradients(layout, device):
    x, *rest = make(5, 37, device)
    cotangent = torch.randn_like(x)
    assert not layout(x).is_contiguous()
    expected = run(x, *rest, cotangent=cotangent)
    assert_same_bits(run(layout(x), *rest, cotangent=cotangent), expected)
    assert_same_bits(run(x, *rest, cotangent=layout(cotangent)), expected)
    check(layout(x), *(t.repeat_interleave(2)[::2] for t in rest))


def test_expanded_inputs_and_gradients(device):
    x, *rest = make(5, 37, device)
    one_row = x[:1].expand(5, -1)
    check(one_row, *rest)
    for cotangent in (one_row, x[:, :1].expand(5, 37), x[:1, :1].expand(5, 37)):
        expected = run(x, *rest, cotangent=cotangent.contiguous())
        assert_same_bits(run(x, *rest, cotangent=cotangent), expected)


def test_no_rows(device):
    y, dx, *others = run(*make(0, 37, device))
    assert y.shape == dx.shape == (0, 37)
    for gradient in others:
        assert torch.equal(gradient, torch.zeros(37, device=device))


def test_two_runs_give_the_same_bits(device):
    args = make(75, 96, device)
    assert_same_bits(run(*args), run(*args))


@both
def test_operators_are_well_formed(approximate, device):
    x, *rest = make(5, 37, device)
    _, mean, rstd = torch.ops.fastbert.gelu_layer_norm_fwd(x, *rest, approximate, 1e-12)
    torch.library.opcheck(torch.ops.fastbert.gelu_layer_norm_fwd, (x, *rest, approximate, 1e-12))
    torch.library.opcheck(torch.ops.fastbert.gelu_layer_norm_bwd, (x, x, *rest, mean, rstd, approximate))
    absent = (None, rest[1], None)
    torch.library.opcheck(
        torch.ops.fastbert.gelu_layer_norm_fwd, (x, *absent, approximate, 1e-12), dict(dtype=torch.float16)
    )
    torch.library.opcheck(torch.ops.fastbert.gelu_layer_norm_bwd, (x, x, *absent, mean, rstd, approximate))


@both
def test_compiled_whole(approximate, device):
    args = make(5, 37, device)
    compiled = torch.compile(gelu_layer_norm, fullgraph=True, backend="aot_eager")
    assert_same_bits(run(*args, op=compiled, approximate=approximate), run(*args, approximate=approximate))


def test_another_approximation_is_refused(device):
    with pytest.raises(ValueError, match="approximate='sigmoid'"):
        gelu_layer_norm(*make(1, 8, device), approximate="sigmoid")


def test_second_derivatives_are_refused(device):
    x, *rest = make(5, 37, device)
    x.requires_grad_()
    (dx,) = torch.autograd.grad(gelu_layer_norm(x, *rest).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="has no second derivative"):
        dx.sum().backward()
