"""layer_norm: kernels and CPU against the reference in float64, and what must hold to the bit."""

import pytest
import torch
from helpers import LAYOUTS, assert_op_within_budget, assert_same_bits, assert_within_budget
from torch.utils.checkpoint import checkpoint

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


def run(x, weight, bias, residual, cotangent=None, op=layer_norm, **kwargs):
    """The output and the four gradients, for `cotangent` as it lies in memory."""
    inputs = [t if t is None else t.detach().requires_grad_() for t in (x, weight, bias, residual)]
    y = op(*inputs[:3], residual=inputs[3], **kwargs)
    leaves = [t for t in inputs if t is not None]
    return y, *torch.autograd.grad(y, leaves, torch.ones_like(y) if cotangent is None else cotangent)


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


@pytest.mark.parametrize("D", [300, 312, 1023, 1056, 5000, 8192])
def test_wide_rows(D, device):
    check(*make(2, D, device), **dropping(0.3, device))


def test_rows_that_are_too_wide_are_refused(device):
    x, weight, bias, _ = make(2, 8193, device)
    with pytest.raises(ValueError, match="8193 columns: the kernels take at most 8192"):
        layer_norm(x, weight, bias)


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
    y, *gradients = run(*args, cotangent.float())
    assert_same_bits(run(*args, cotangent, dtype=torch.float16), (y.half(), *gradients))


@pytest.mark.parametrize("eps", [1e-12, 1e-7, 1e-5])
@pytest.mark.parametrize("spread", [1e-3, 1.0])
@pytest.mark.parametrize("mean", [1e2, 1e4, 1e6])
def test_small_spread_on_a_large_mean(mean, spread, eps, device):
    x, weight, bias, _ = make(13, 96, device)
    check(x * spread + mean, weight, bias, None, eps=eps)


@pytest.mark.parametrize("D", [8, 312, 37])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
def test_odd_places_in_memory(D, dtype, device):
    """Rows and parameters that start anywhere, with row strides that no power of two divides."""

    def moved(t):
        wide = torch.zeros(t.numel() // t.shape[-1] * (D + 3) + 3, device=device, dtype=dtype)
        view = wide[3:].view(-1, D + 3)[:, :D].view(t.shape) if t.dim() == 1 else wide[3:].view(-1, D + 3)[:, :D]
        return view.copy_(t)

    args = make(5, D, device, dtype)
    cotangent = torch.randn(5, D).to(device, dtype)
    expected = run(*args, cotangent)
    assert_same_bits(run(*(moved(t) for t in args), moved(cotangent)), expected)


def test_partial_sums_stay_few(device):
    """Fewer programs than multiprocessors for a handful of rows, then one each, then as many as run at once."""
    places = _launch.multiprocessors()
    counts = [_launch.row_programs(T, 4, 2) for T in (0, 1, 4 * places, 8 * places, 64 * places)]
    assert counts == [0, 1, places, places, 2 * places]


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
    torch.library.opcheck(
        torch.ops.fastbert.layer_norm_fwd, (x, None, None, None, 0.0, None, 0, 1e-12), dict(dtype=torch.float16)
    )
    torch.library.opcheck(torch.ops.fastbert.layer_norm_bwd, (x, x, None, None, None, mean, rstd, 0.0, None, 0))
    torch.library.opcheck(torch.ops.fastbert.layer_norm_bwd, (x, x, weight, None, None, mean, rstd, 0.0, None, 0))
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
