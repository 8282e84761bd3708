"""layer_norm: kernels and CPU against the reference in float64.

Strides, empty rows and dtypes: in the tests of all ops.
"""

import pytest
import torch
from helpers import assert_op_within_budget, assert_same_bits, assert_within_budget

from fastbert import reference
from fastbert.kernels import _launch
from fastbert.kernels.layer_norm import layer_norm

pytestmark = pytest.mark.usefixtures("poison")

residuals = pytest.mark.parametrize("with_residual", [False, True], ids=["alone", "residual"])
dropouts = pytest.mark.parametrize("dropout_p", [0.0, 0.3], ids=["", "dropout"])


def make(T, D, device, dtype=torch.float32):
    """x, weight, bias, residual."""
    return [torch.randn(shape).to(device, dtype) for shape in ((T, D), D, D, (T, D))]


def dropping(dropout_p, device):
    return dict(dropout_p=dropout_p, seed=torch.tensor([2**40 + 5], device=device), offset=3)


def check(x, weight, bias, residual, **kwargs):
    assert_op_within_budget(layer_norm, x, weight, bias, residual=residual, **kwargs)


def run(x, weight, bias, residual):
    """The output and the gradients, for a gradient of ones."""
    inputs = [t if t is None else t.detach().requires_grad_() for t in (x, weight, bias, residual)]
    y = layer_norm(*inputs[:3], residual=inputs[3])
    return y, *torch.autograd.grad(y, [t for t in inputs if t is not None], torch.ones_like(y))


@dropouts
@residuals
@pytest.mark.parametrize(
    "T, D, dtype",
    [(5, 1, torch.float32), (13, 96, torch.float32), (1, 37, torch.float16), (13, 768, torch.float16)],
    ids=str,
)
def test_values_and_gradients(T, D, dtype, with_residual, dropout_p, device):
    x, weight, bias, residual = make(T, D, device, dtype)
    check(x, weight, bias, residual if with_residual else None, **dropping(dropout_p, device))


@dropouts
def test_more_rows_than_programs(dropout_p, device):
    check(*make(75, 256, device), **dropping(dropout_p, device))


@pytest.mark.parametrize("D", [312, 1056, 8192])
def test_wide_rows(D, device):
    check(*make(2, D, device), **dropping(0.3, device))


@dropouts
@pytest.mark.parametrize("absent", ["weight", "bias", "weight and bias"])
def test_absent_parameters(absent, dropout_p, device):
    x, weight, bias, residual = make(13, 37, device)
    weight, bias = (None if name in absent else p for name, p in (("weight", weight), ("bias", bias)))
    check(x, weight, bias, residual, **dropping(dropout_p, device))
    ones, zeros = torch.ones(37, device=device), torch.zeros(37, device=device)
    present = run(x, ones if weight is None else weight, zeros if bias is None else bias, None)
    y, dx, *_ = run(x, weight, bias, None)
    assert_same_bits((y, dx), present[:2])


@pytest.mark.parametrize(
    "mean, spread, eps", [(1e2, 1e-3, 1e-12), (1e4, 1.0, 1e-7), (1e6, 1e-3, 1e-12), (1e6, 1.0, 1e-5)]
)
def test_small_spread_on_a_large_mean(mean, spread, eps, device):
    x, weight, bias, _ = make(13, 96, device)
    check(x * spread + mean, weight, bias, None, eps=eps)


def test_partial_sums_stay_few(device):
    """One program per block for a few rows, then one per multiprocessor, then as many as run at once."""
    places = _launch.multiprocessors()
    counts = [_launch.row_programs(T, 4, 2) for T in (0, 1, 4 * places, 8 * places, 64 * places)]
    assert counts == [0, 1, places, places, 2 * places]


@pytest.mark.parametrize("D, value", [(37, 0.0), (37, 0.1), (37, 1e8), (768, 1234.567)])
def test_a_row_of_one_number_gives_the_bias(D, value, device):
    """Its variance is 0. A mean that is off by one rounding, divided by the root of eps = 1e-12, would dominate."""
    _, weight, bias, _ = make(1, D, device)
    x = torch.full((3, D), value, device=device)
    y, dx, dweight, dbias, _ = run(x, weight, bias, torch.zeros_like(x))
    assert torch.equal(y, bias.expand(3, D))
    assert torch.isfinite(dx).all()
    assert torch.equal(dweight, torch.zeros_like(weight)) and torch.equal(dbias, torch.full_like(bias, 3.0))


def test_x_may_be_its_own_residual(device):
    x, weight, bias, _ = make(5, 96, device)
    assert_within_budget(
        lambda x, w, b: layer_norm(x, w, b, residual=x), lambda x, w, b: reference.layer_norm(x, w, b, residual=x),
        x, weight, bias,
    )  # fmt: skip
