"""layer_norm: the kernels against the reference in float64, and what must hold to the bit."""

import pytest
import torch
from helpers import LAYOUTS, assert_same_bits, assert_within_budget
from torch.utils.checkpoint import checkpoint

from fastbert import reference
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
    assert_within_budget(layer_norm, reference.layer_norm, x, weight, bias, residual=residual, **kwargs)


def run(x, weight, bias, residual, cotangent=None, op=layer_norm, **kwargs):
    """The output and the four gradients, for `cotangent` as it lies in memory."""
    inputs = [t.detach().requires_grad_() for t in (x, weight, bias, residual)]
    y = op(*inputs[:3], residual=inputs[3], **kwargs)
    return y, *torch.autograd.grad(y, inputs, torch.ones_like(y) if cotangent is None else cotangent)


@dropouts
@residuals
@pytest.mark.parametrize("D", [1, 37, 96, 768])
@pytest.mark.parametrize("T", [1, 5, 13])
def test_values_and_gradients(T, D, with_residual, dropout_p, device):
    x, weight, bias, residual = make(T, D, device)
    check(x, weight, bias, residual if with_residual else None, **dropping(dropout_p, device))


@dropouts
@residuals
@pytest.mark.parametrize("D", [37, 96, 768])
def test_half_precision(D, with_residual, dropout_p, device):
    x, weight, bias, residual = make(13, D, device, torch.float16)
    check(x, weight, bias, residual if with_residual else None, **dropping(dropout_p, device))


@dropouts
@pytest.mark.parametrize("wide", ["weight and bias", "residual", "all but x", "x"])
def test_mixed_dtypes(wide, dropout_p, device):
    """Each gradient comes in its argument's dtype: the residual's is then another tensor than x's."""
    x, weight, bias, residual = make(13, 96, device)
    half = {"weight and bias": "xr", "residual": "xwb", "all but x": "x", "x": "wbr"}[wide]
    args = (t.half() if name in half else t for name, t in zip("xwbr", (x, weight, bias, residual), strict=True))
    check(*args, **dropping(dropout_p, device))


@dropouts
def test_more_rows_than_programs(dropout_p, device):
    check(*make(75, 256, device), **dropping(dropout_p, device))


@pytest.mark.parametrize("D", [300, 1056, 5000, 16384])
def test_wide_rows(D, device):
    check(*make(2, D, device), **dropping(0.3, device))


@pytest.mark.parametrize("eps", [1e-12, 1e-5])
def test_small_spread_on_a_large_mean(eps, device):
    x, weight, bias, _ = make(13, 96, device)
    check(x * 1e-2 + 1e4, weight, bias, None, eps=eps)


@pytest.mark.parametrize("value", [0.0, 0.1, 1234.567, 1e8])
@pytest.mark.parametrize("D", [37, 768])
def test_a_row_of_one_number_gives_the_bias(D, value, device):
    """Its variance is 0. A mean that is off by a rounding, over the root of eps = 1e-12, would give anything."""
    _, weight, bias, _ = make(1, D, device)
    x = torch.full((3, D), value, device=device)
    assert torch.equal(layer_norm(x, weight, bias), bias.expand(3, D))
    _, dx, dweight, dbias, _ = run(x, weight, bias, torch.zeros_like(x))
    assert torch.isfinite(dx).all()
    assert torch.equal(dweight, torch.zeros_like(weight)) and torch.equal(dbias, torch.full_like(bias, 3.0))


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda f: f.__name__)
def test_strides_of_inputs_and_gradients(layout, device):
    x, weight, bias, residual = make(5, 37, device)
    cotangent, options = torch.randn_like(x), dropping(0.3, device)
    expected = run(x, weight, bias, residual, cotangent, **options)
    for name in ("x", "residual", "cotangent"):
        args = dict(x=x, weight=weight, bias=bias, residual=residual, cotangent=cotangent)
        args[name] = layout(args[name])
        assert not args[name].is_contiguous()
        assert_same_bits(run(**args, **options), expected)
    check(layout(x), weight, bias, layout(residual), **options)


def test_expanded_inputs_and_gradients(device):
    x, weight, bias, residual = make(5, 37, device)
    one_row = x[:1].expand(5, -1)
    check(one_row, weight, bias, residual)
    check(x, weight, bias, one_row, **dropping(0.3, device))
    wide = (weight.repeat_interleave(2)[::2], bias[:1].expand(37))
    check(x, *wide, residual)
    for cotangent in (one_row, x[:, :1].expand(5, 37), x[:1, :1].expand(5, 37)):
        args = (x, weight, bias, residual)
        assert_same_bits(run(*args, cotangent), run(*args, cotangent.contiguous()))


@dropouts
def test_no_rows(dropout_p, device):
    y, dx, dweight, dbias, dresidual = run(*make(0, 37, device), **dropping(dropout_p, device))
    assert y.shape == dx.shape == dresidual.shape == (0, 37)
    assert torch.equal(dweight, torch.zeros_like(dweight)) and torch.equal(dbias, torch.zeros_like(dbias))


def test_two_runs_give_the_same_bits(device):
    args, options = make(75, 96, device), dropping(0.3, device)
    assert_same_bits(run(*args, **options), run(*args, **options))


def test_no_dropout_ignores_the_seed(device):
    args = make(5, 96, device)
    assert_same_bits(run(*args, **dropping(0.0, device)), run(*args))


def test_inputs_are_left_alone(device):
    args = make(5, 96, device)
    before = [t.clone() for t in args]
    cotangent = torch.randn(5, 96, device=device)
    kept = cotangent.clone()
    run(*args, cotangent, **dropping(0.3, device))
    assert_same_bits([*args, cotangent], [*before, kept])


def test_the_mask_is_drawn_again_under_checkpointing(device):
    def checkpointed(x, weight, bias, residual, **kwargs):
        return checkpoint(
            lambda *a: layer_norm(*a[:3], residual=a[3], **kwargs), x, weight, bias, residual, use_reentrant=False
        )

    args, options = make(5, 96, device), dropping(0.3, device)
    assert_same_bits(run(*args, op=checkpointed, **options), run(*args, **options))


def test_x_may_be_its_own_residual(device):
    x, weight, bias, _ = make(5, 96, device)
    assert_within_budget(
        lambda x, w, b: layer_norm(x, w, b, residual=x), lambda x, w, b: reference.layer_norm(x, w, b, residual=x),
        x, weight, bias,
    )  # fmt: skip


@pytest.mark.parametrize("dropout_p, dtype", [(0.0, torch.float32), (0.3, torch.float32), (0.0, torch.float16)])
def test_operators_are_well_formed(dropout_p, dtype, device):
    x, weight, bias, residual = make(5, 37, device)
    residual = residual.to(dtype)
    seed = torch.tensor([1], device=device)
    _, mean, rstd = torch.ops.fastbert.layer_norm_fwd(x, weight, bias, residual, dropout_p, seed, 2, 1e-12)
    torch.library.opcheck(torch.ops.fastbert.layer_norm_fwd, (x, weight, bias, residual, dropout_p, seed, 2, 1e-12))
    backward = (x, x, weight, bias, residual, mean, rstd, dropout_p, seed, 2)
    torch.library.opcheck(torch.ops.fastbert.layer_norm_bwd, backward)
    torch.library.opcheck(torch.ops.fastbert.layer_norm_fwd, (x, weight, bias, None, 0.0, None, 0, 1e-12))
    torch.library.opcheck(torch.ops.fastbert.layer_norm_bwd, (x, x, weight, bias, None, mean, rstd, 0.0, None, 0))


@dropouts
def test_compiled_whole(dropout_p, device):
    args, options = make(5, 37, device), dropping(dropout_p, device)
    compiled = torch.compile(layer_norm, fullgraph=True, backend="aot_eager")
    assert_same_bits(run(*args, op=compiled, **options), run(*args, **options))


def test_second_derivatives_are_refused(device):
    x, weight, bias, _ = make(5, 37, device)
    x.requires_grad_()
    (dx,) = torch.autograd.grad(layer_norm(x, weight, bias).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="has no second derivative"):
        dx.sum().backward()
