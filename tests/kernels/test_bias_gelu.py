"""bias_gelu: the kernels against the reference in float64, and what must hold to the bit."""

import pytest
import torch
import torch.nn.functional as F
from helpers import LAYOUTS, assert_same_bits, assert_within_budget

from fastbert import reference
from fastbert.kernels.bias_gelu import bias_gelu

pytestmark = pytest.mark.usefixtures("poison")

both = pytest.mark.parametrize("approximate", ["none", "tanh"])


def make(T, F, device, dtype=torch.float32):
    return [torch.randn(shape).to(device, dtype) * 2 for shape in ((T, F), F)]


def check(x, bias, approximate):
    assert_within_budget(bias_gelu, reference.bias_gelu, x, bias, approximate=approximate)


def run(x, bias, cotangent=None, op=bias_gelu, **kwargs):
    """The output and both gradients, for `cotangent` as it lies in memory."""
    inputs = [t.detach().requires_grad_() for t in (x, bias)]
    y = op(*inputs, **kwargs)
    return y, *torch.autograd.grad(y, inputs, torch.ones_like(y) if cotangent is None else cotangent)


@both
@pytest.mark.parametrize("F", [1, 37, 96, 768])
@pytest.mark.parametrize("T", [1, 5, 13])
def test_values_and_gradients(T, F, approximate, device):
    check(*make(T, F, device), approximate)


@both
@pytest.mark.parametrize("F", [37, 96, 768])
def test_half_precision(F, approximate, device):
    check(*make(13, F, device, torch.float16), approximate)


@both
@pytest.mark.parametrize("dtypes", [(torch.float16, torch.float32), (torch.float32, torch.float16)], ids=str)
def test_mixed_dtypes(dtypes, approximate, device):
    x, bias = make(13, 96, device)
    check(x.to(dtypes[0]), bias.to(dtypes[1]), approximate)


@both
def test_without_a_bias(approximate, device):
    x, _ = make(13, 37, device)
    check(x, None, approximate)
    zero = torch.zeros(37, device=device)
    cotangent = torch.randn(13, 37).to(device)
    leaf = x.requires_grad_()
    y = bias_gelu(leaf, None, approximate=approximate)
    (dx,) = torch.autograd.grad(y, leaf, cotangent)
    assert_same_bits((y, dx), run(x, zero, cotangent, approximate=approximate)[:2])


@both
def test_more_rows_than_programs(approximate, device):
    check(*make(150, 40, device), approximate)


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
def test_extreme_inputs(dtype, approximate, device):
    """Zeros of both signs, the smallest numbers, and numbers whose cube or exponential overflows."""
    x = torch.tensor([0.0, -0.0, 10.0, -10.0, 1e4, -1e4, 6e4, -6e4, 1e-7, -1e-7, 6e-8, 30.0, -30.0, 0.5, -0.5, 5.5])
    x = x.to(device, dtype)[:, None].expand(16, 3)
    y, dx, _ = run(x, torch.zeros(3, device=device, dtype=dtype), approximate=approximate)
    exactly = dict(rtol=3e-7, atol=0)  # two roundings of fp32
    for rows, factor, slope in (([0, 1], 0.0, 0.5), ([4, 6], 1.0, 1.0), ([5, 7], 0.0, 0.0)):
        torch.testing.assert_close(y[rows], factor * x[rows], **exactly)
        torch.testing.assert_close(dx[rows], torch.full_like(dx[rows], slope), **exactly)
    # below 1e4 the differences stay small enough to compare with the budget
    rest = torch.cat([x[:4], x[8:]])
    check(rest, torch.zeros(3, device=device, dtype=dtype), approximate)


@both
def test_subnormal_inputs(approximate, device):
    """Half of each remains, and the slope is a half. What fp16 can hold is not small to fp32."""
    for dtype, tiny in ((torch.float16, 2**-23), (torch.float32, 2**-124)):
        x = torch.tensor([[tiny, -tiny, 4 * tiny, -4 * tiny]], device=device, dtype=dtype)
        y, dx, _ = run(x, torch.zeros(4, device=device, dtype=dtype), approximate=approximate)
        torch.testing.assert_close(y, F.gelu(x.double(), approximate=approximate).to(dtype), rtol=1e-5, atol=0)
        torch.testing.assert_close(dx, torch.full_like(dx, 0.5), rtol=1e-6, atol=0)


@both
def test_close_to_the_truth_everywhere(approximate, device):
    """Two roundings of the largest result at most, over the whole range, in fp32; the negative tail keeps digits."""
    x = torch.linspace(-12, 12, 4096, device=device).view(16, 256)
    zero = torch.zeros(256, device=device)
    y, dx, _ = run(x, zero, approximate=approximate)
    wanted, slope, _ = run(x.double(), zero.double(), op=reference.bias_gelu, approximate=approximate)
    assert (y - wanted).abs().max().item() <= 12 * 2**-23
    assert (dx - slope).abs().max().item() <= 2 * 2**-22
    tail = (x < -1) & (wanted.abs() > 1e-20)
    assert ((y - wanted) / wanted)[tail & (x > -6)].abs().max().item() <= 1e-3
    if approximate == "none":
        # the reference in double loses digits itself below -8: erfc keeps them
        exact = 0.5 * x.double() * torch.special.erfc(-x.double() * 0.5**0.5)
        assert ((y - exact) / exact)[(x < -1) & (x > -12)].abs().max().item() <= 2e-5


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda f: f.__name__)
def test_strides_of_inputs_and_gradients(layout, device):
    x, bias = make(5, 37, device)
    cotangent = torch.randn_like(x)
    assert not layout(x).is_contiguous()
    expected = run(x, bias, cotangent)
    assert_same_bits(run(layout(x), bias, cotangent), expected)
    assert_same_bits(run(x, bias, layout(cotangent)), expected)
    check(layout(x), bias.repeat_interleave(2)[::2], "none")


def test_expanded_inputs_and_gradients(device):
    x, bias = make(5, 37, device)
    one_row = x[:1].expand(5, -1)
    check(one_row, bias[:1].expand(37), "none")
    for cotangent in (one_row, x[:, :1].expand(5, 37), x[:1, :1].expand(5, 37)):
        assert_same_bits(run(x, bias, cotangent), run(x, bias, cotangent.contiguous()))


@both
def test_no_rows(approximate, device):
    y, dx, dbias = run(*make(0, 37, device), approximate=approximate)
    assert y.shape == dx.shape == (0, 37)
    assert torch.equal(dbias, torch.zeros_like(dbias))


def test_two_runs_give_the_same_bits(device):
    args = make(150, 40, device)
    assert_same_bits(run(*args), run(*args))


@both
def test_operators_are_well_formed(approximate, device):
    x, bias = make(5, 37, device)
    torch.library.opcheck(torch.ops.fastbert.bias_gelu_fwd, (x, bias, approximate))
    torch.library.opcheck(torch.ops.fastbert.bias_gelu_bwd, (x, x, bias, approximate))
    torch.library.opcheck(torch.ops.fastbert.bias_gelu_fwd, (x, None, approximate))
    torch.library.opcheck(torch.ops.fastbert.bias_gelu_bwd, (x, x, None, approximate))


@both
def test_compiled_whole(approximate, device):
    args = make(5, 37, device)
    compiled = torch.compile(bias_gelu, fullgraph=True, backend="aot_eager")
    assert_same_bits(run(*args, op=compiled, approximate=approximate), run(*args, approximate=approximate))


def test_another_approximation_is_refused(device):
    with pytest.raises(ValueError, match="approximate='sigmoid'"):
        bias_gelu(*make(1, 8, device), approximate="sigmoid")


def test_second_derivatives_are_refused(device):
    x, bias = make(5, 37, device)
    x.requires_grad_()
    (dx,) = torch.autograd.grad(bias_gelu(x, bias).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="has no second derivative"):
        dx.sum().backward()
