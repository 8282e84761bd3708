"""pooling: kernels and CPU against the reference in float64, the reference against sentence-transformers' formulas.

Strides and dtypes: in the tests of all ops.
"""

import pytest
import torch
import torch.nn.functional as F
from helpers import IMPLEMENTATIONS, assert_op_within_budget, assert_same_bits, cu_seqlens_of

from fastbert import ops, reference
from fastbert.cpu import ops as cpu
from fastbert.kernels.pooling import MODES, pooling

pytestmark = pytest.mark.usefixtures("poison")

modes = pytest.mark.parametrize("mode", MODES)
both = pytest.mark.parametrize("normalize", [False, True], ids=["", "normalized"])
# sequences of one token and without tokens, at both ends too; long ones that span chunks of 32 rows; 100 + 28 rows end
# with a chunk
LONG = [0, 100, 0, 28, 37, 1, 64, 0]
SLACK = 3
all_ops = pytest.mark.parametrize("op", [pooling, cpu.pooling, reference.pooling], ids=["kernel", "cpu", "reference"])


def make(lengths, D, device, dtype=torch.float32):
    """hidden with SLACK rows past the last sequence, cu_seqlens."""
    hidden = torch.randn(sum(lengths) + SLACK, D).to(device, dtype)
    return hidden, cu_seqlens_of(lengths, device)


def check(*args, **kwargs):
    assert_op_within_budget(pooling, *args, **kwargs)


def run(hidden, cu_seqlens, cotangent=None, op=pooling, **kwargs):
    """The result and the gradient."""
    hidden = hidden.detach().requires_grad_()
    out = op(hidden, cu_seqlens, **kwargs)
    return out, *torch.autograd.grad(out, hidden, torch.ones_like(out) if cotangent is None else cotangent)


@modes
@both
def test_values_and_gradients(mode, normalize, device):
    check(*make(LONG, 37, device), mode=mode, normalize=normalize)


@modes
@pytest.mark.parametrize("lengths", [[70], [0, 0, 3, 0]], ids=str)
def test_half_precision(lengths, mode, device):
    check(*make(lengths, 96, device, torch.float16), mode=mode, normalize=True)


@pytest.mark.parametrize("mode", ["mean", "max"])
@pytest.mark.parametrize("D", [1, 768])
def test_widths(D, mode, device):
    check(*make([5, 1, 0, 40], D, device), mode=mode, normalize=True)


@both
def test_gradients_along_the_result(normalize, device):
    """Normalisation removes the part along y. What is left in half precision must not be y's rounding error."""
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
def test_the_formulas_of_sentence_transformers(impl, mode, normalize, device):
    sizes = [5, 1, 40]
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
def test_empty_sequences_and_slack_rows(mode, device):
    """Empty sequences give zeros, and no row past the last sequence is read."""
    hidden, cu_seqlens = make(LONG, 37, device)
    expected = out, dhidden = run(hidden, cu_seqlens, mode=mode, normalize=True)
    hidden[-SLACK:] = float("nan")
    assert_same_bits(run(hidden, cu_seqlens, mode=mode, normalize=True), expected)
    empty = torch.tensor(LONG, device=device) == 0
    assert torch.equal(out[empty], torch.zeros_like(out[empty])) and out[~empty].any(1).all()
    assert torch.equal(dhidden[-SLACK:], torch.zeros_like(dhidden[-SLACK:]))


@modes
def test_many_slack_rows(mode, device):
    hidden, _ = make([100], 8, device)
    check(hidden, cu_seqlens_of([3, 4], device), mode=mode, normalize=True)


@pytest.mark.parametrize("mode", ["mean", "max"])
@pytest.mark.parametrize("eps", [0.5, 100.0])
def test_eps(eps, mode, device):
    """Where eps is larger than the norm it is the divisor, and the gradient is that of a division by a constant."""
    check(*make([5, 1, 40], 37, device), mode=mode, normalize=True, eps=eps)


def test_a_vector_of_zeros_stays_zero(device):
    hidden = torch.zeros(5, 8, device=device)
    out, dhidden = run(hidden, cu_seqlens_of([5], device), normalize=True, eps=1e-3)
    assert torch.equal(out, torch.zeros_like(out))
    torch.testing.assert_close(dhidden, torch.full_like(dhidden, 1e3 / 5))


@all_ops
def test_another_mode_is_refused(op, device):
    with pytest.raises(ValueError, match="mode='median'"):
        op(*make([5], 8, device), mode="median")
