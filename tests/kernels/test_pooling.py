"""pooling: kernels and CPU against the reference in float64, the reference against sentence-transformers' formulas."""

import pytest
import torch
import torch.nn.functional as F
from helpers import IMPLEMENTATIONS, LAYOUTS, assert_op_within_budget, assert_same_bits, cu_seqlens_of

from fastbert import ops, reference
from fastbert.cpu import ops as cpu
from fastbert.kernels.pooling import MODES, pooling

pytestmark = pytest.mark.usefixtures("poison")

modes = pytest.mark.parametrize("mode", MODES)
both = pytest.mark.parametrize("normalize", [False, True], ids=["", "normalized"])
# some of one token, some empty, at both ends too; long ones that span chunks of 32 rows; ends on a chunk's end
LENGTHS = {
    "short": [5, 1, 0, 7],
    "empty ends": [0, 0, 3, 0],
    "long": [0, 100, 0, 28, 37, 27, 64, 0],
    "one": [70],
    "all empty": [0, 0],
}
lengths = pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
SLACK = 3
all_ops = pytest.mark.parametrize("op", [pooling, cpu.pooling, reference.pooling], ids=["kernel", "cpu", "reference"])


def make(lengths, D, device, dtype=torch.float32):
    """hidden with SLACK rows past the last sequence, cu_seqlens."""
    hidden = torch.randn(sum(lengths) + SLACK, D).to(device, dtype)
    return hidden, cu_seqlens_of(lengths, device)


def check(*args, **kwargs):
    assert_op_within_budget(pooling, *args, **kwargs)


def run(hidden, cu_seqlens, cotangent=None, op=pooling, **kwargs):
    """The result and the gradient, for `cotangent` as it lies in memory."""
    hidden = hidden.detach().requires_grad_()
    out = op(hidden, cu_seqlens, **kwargs)
    return out, *torch.autograd.grad(out, hidden, torch.ones_like(out) if cotangent is None else cotangent)


@modes
@both
@lengths
def test_values_and_gradients(lengths, mode, normalize, device):
    check(*make(lengths, 37, device), mode=mode, normalize=normalize)


@modes
@both
@pytest.mark.parametrize("D", [1, 96, 768])
def test_widths(D, mode, normalize, device):
    check(*make([5, 1, 0, 40], D, device), mode=mode, normalize=normalize)


@modes
@both
def test_half_precision(mode, normalize, device):
    check(*make(LENGTHS["long"], 96, device, torch.float16), mode=mode, normalize=normalize)


@both
def test_gradients_along_the_result(normalize, device):
    """Normalisation takes out what points along y: in half precision little is left, and must not be y's rounding."""
    hidden, cu_seqlens = make([5, 40], 96, device, torch.float16)
    y, dhidden = run(hidden, cu_seqlens, reference.pooling(hidden, cu_seqlens, normalize=True), normalize=normalize)
    truth = run(hidden.double(), cu_seqlens, reference.pooling(hidden, cu_seqlens, normalize=True).double(),
                op=reference.pooling, normalize=normalize)[1]  # fmt: skip
    assert (dhidden.double() - truth).abs().max().item() <= 2**-11 * truth.abs().max().item() + 1e-7


def sentence_transformers(hidden, mask, mode):
    """The formulas of sentence_transformers.models.Pooling, on a padded batch."""
    if mode == "cls":
        return hidden[:, 0]
    if mode == "lasttoken":
        return hidden[torch.arange(len(hidden)), mask.sum(1) - 1]
    expanded = mask.unsqueeze(-1).expand(hidden.size()).to(hidden.dtype)
    if mode == "max":
        return torch.max(hidden.masked_fill(expanded == 0, -1e9), 1)[0]
    if mode == "weightedmean":
        expanded = expanded * torch.arange(1, hidden.shape[1] + 1)[None, :, None]
    total, count = torch.sum(hidden * expanded, 1), torch.clamp(expanded.sum(1), min=1e-9)
    return total / (torch.sqrt(count) if mode == "mean_sqrt_len_tokens" else count)


@modes
@both
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("sizes", [[5, 1, 40], [7, 7, 7], [13]], ids=["ragged", "full", "one"])
def test_the_formulas_of_sentence_transformers(sizes, impl, mode, normalize, device):
    hidden, cu_seqlens = make(sizes, 24, device)
    longest = torch.arange(max(sizes), device=device)
    mask = longest < torch.tensor(sizes, device=device)[:, None]
    padded = torch.zeros(*mask.shape, 24, device=device).masked_scatter(mask[..., None], hidden[: sum(sizes)])
    wanted = sentence_transformers(padded.cpu(), mask.cpu(), mode).to(device)
    wanted = F.normalize(wanted, p=2, dim=1) if normalize else wanted
    got = ops.pooling(hidden, cu_seqlens, mode=mode, normalize=normalize, impl=impl)
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)


@all_ops
def test_the_first_of_equal_maxima_gets_the_gradient(op, device):
    hidden = torch.zeros(100, 3, device=device)
    hidden[[7, 50, 90], 0] = 2.0
    hidden[:, 1] = -1.0
    hidden[:5, 2] = float("-inf")
    hidden[:, 2] = float("-inf")
    out, dhidden = run(hidden, cu_seqlens_of([5, 95], device), op=op, mode="max")
    assert torch.equal(out[1], torch.tensor([2.0, -1.0, float("-inf")], device=device))
    wanted = torch.zeros_like(hidden)
    wanted[0] = 1.0
    wanted[[7, 5, 5], [0, 1, 2]] = 1.0
    assert torch.equal(dhidden, wanted)


@all_ops
def test_a_nan_is_the_maximum(op, device):
    hidden = torch.randn(100, 3, device=device)
    hidden[[40, 80], 1] = float("nan")
    out, dhidden = run(hidden, cu_seqlens_of([20, 80], device), op=op, mode="max")
    assert out.isnan().nonzero().tolist() == [[1, 1]]
    assert dhidden[40, 1] == 1 and dhidden[80, 1] == 0


@modes
@both
def test_empty_sequences_and_slack_rows(mode, normalize, device):
    """Zeros come out, and nothing that stands past the last sequence is looked at."""
    lengths = LENGTHS["long"]
    hidden, cu_seqlens = make(lengths, 37, device)
    expected = run(hidden, cu_seqlens, mode=mode, normalize=normalize)
    for poison in (float("nan"), float("inf"), 1e30):
        hidden[-SLACK:] = poison
        assert_same_bits(run(hidden, cu_seqlens, mode=mode, normalize=normalize), expected)
    out, dhidden = expected
    empty = torch.tensor(lengths, device=device) == 0
    assert torch.equal(out[empty], torch.zeros_like(out[empty])) and out[~empty].any(1).all()
    assert torch.equal(dhidden[-SLACK:], torch.zeros_like(dhidden[-SLACK:]))


@modes
def test_many_slack_rows(mode, device):
    hidden, _ = make([100], 8, device)
    check(hidden, cu_seqlens_of([3, 4], device), mode=mode, normalize=True)


@modes
def test_no_sequence_and_no_rows(mode, device):
    for T, lengths in ((0, []), (5, []), (0, [0, 0])):
        hidden = torch.randn(T, 8, device=device)
        out, dhidden = run(hidden, cu_seqlens_of(lengths, device), mode=mode, normalize=True)
        assert out.shape == (len(lengths), 8) and torch.equal(out, torch.zeros_like(out))
        assert dhidden.shape == (T, 8) and torch.equal(dhidden, torch.zeros_like(dhidden))


@modes
@pytest.mark.parametrize("eps", [1e-12, 1e-7, 0.5, 100.0])
def test_eps(eps, mode, device):
    """Above the norm it divides, and the gradient is that of a division by a constant."""
    check(*make([5, 1, 40], 37, device), mode=mode, normalize=True, eps=eps)


def test_a_vector_of_zeros_stays_zero(device):
    hidden = torch.zeros(5, 8, device=device)
    out, dhidden = run(hidden, cu_seqlens_of([5], device), normalize=True, eps=1e-3)
    assert torch.equal(out, torch.zeros_like(out))
    torch.testing.assert_close(dhidden, torch.full_like(dhidden, 1e3 / 5))


@modes
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda f: f.__name__)
def test_strides_of_inputs_and_gradients(layout, mode, device):
    hidden, cu_seqlens = make(LENGTHS["long"], 37, device)
    cotangent = torch.randn(len(cu_seqlens) - 1, 37).to(device)
    options = dict(mode=mode, normalize=True)
    expected = run(hidden, cu_seqlens, cotangent, **options)
    assert_same_bits(run(layout(hidden), cu_seqlens, cotangent, **options), expected)
    assert_same_bits(run(hidden, cu_seqlens, layout(cotangent), **options), expected)
    assert_same_bits(run(hidden, cu_seqlens.repeat_interleave(2)[::2], cotangent, **options), expected)


def test_expanded_inputs_and_gradients(device):
    hidden, cu_seqlens = make([5, 1, 40], 37, device)
    check(hidden[:1].expand(46, -1), cu_seqlens, normalize=True)
    cotangent = torch.randn(3, 37).to(device)
    for expanded in (cotangent[:1].expand(3, -1), cotangent[:, :1].expand(-1, 37), cotangent[:1, :1].expand(3, 37)):
        assert_same_bits(run(hidden, cu_seqlens, expanded), run(hidden, cu_seqlens, expanded.contiguous()))


@modes
def test_result_in_a_wider_dtype(mode, device):
    args = make([5, 1, 40], 37, device, torch.float16)
    check(*args, mode=mode, normalize=True, dtype=torch.float32)
    out, dhidden = run(*args, mode=mode, normalize=True, dtype=torch.float32)
    assert out.dtype == torch.float32 and dhidden.dtype == torch.float16


@modes
def test_two_runs_give_the_same_bits(mode, device):
    args = make(LENGTHS["long"], 37, device)
    assert_same_bits(run(*args, mode=mode, normalize=True), run(*args, mode=mode, normalize=True))


def test_a_sequence_does_not_depend_on_its_neighbours(device):
    """Within a chunk, where its rows start does not matter."""
    hidden, _ = make([20], 37, device)
    alone = pooling(hidden[:5], cu_seqlens_of([5], device))
    assert torch.equal(pooling(torch.cat((hidden[7:12], hidden)), cu_seqlens_of([5, 5, 10], device))[1:2], alone)


@both
@modes
def test_operators_are_well_formed(mode, normalize, device):
    hidden, cu_seqlens = make([5, 0, 40], 24, device)
    for dtype in (None, torch.float16):
        results = torch.ops.fastbert.pooling_fwd(hidden, cu_seqlens, mode, normalize, 1e-12, dtype)
        torch.library.opcheck(torch.ops.fastbert.pooling_fwd, (hidden, cu_seqlens, mode, normalize, 1e-12, dtype))
    out, unit, norm, origin = results
    args = (out, cu_seqlens, unit, norm, origin, len(hidden), hidden.dtype, mode, normalize, 1e-12)
    torch.library.opcheck(torch.ops.fastbert.pooling_bwd, args)


@modes
def test_compiled_whole(mode, device):
    args = make([5, 0, 40], 24, device)
    compiled = torch.compile(pooling, fullgraph=True, backend="aot_eager")
    assert_same_bits(run(*args, op=compiled, mode=mode, normalize=True), run(*args, mode=mode, normalize=True))


@all_ops
def test_another_mode_is_refused(op, device):
    with pytest.raises(ValueError, match="mode='median'"):
        op(*make([5], 8, device), mode="median")


def test_second_derivatives_are_refused(device):
    hidden, cu_seqlens = make([5, 1], 8, device)
    hidden.requires_grad_()
    (dhidden,) = torch.autograd.grad(pooling(hidden, cu_seqlens).square().sum(), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="pooling has no second derivative"):
        dhidden.sum().backward()
