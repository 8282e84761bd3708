"""Attention's kernels against the reference. A `max_seqlen` above 128 takes the tiled path, whatever the lengths.

Strides, empty batches, head sizes and dropout masks: in the tests of all ops.
"""

import math

import pytest
import torch
from helpers import assert_op_within_budget, assert_within_budget, cu_seqlens_of

from fastbert import ops, reference
from fastbert.kernels import attention as kernels
from fastbert.kernels.attention import attention

SHORT, TILED = 0, 129
pytestmark = pytest.mark.usefixtures("poison")


def longest(path, *lengths):
    """A `max_seqlen` that takes the path."""
    return max(path, *lengths)


@pytest.fixture(params=[SHORT, TILED], ids=["short", "tiled"])
def path(request):
    return request.param


@pytest.fixture
def seed(device):
    return torch.tensor([2**40 + 5], device=device)


@pytest.mark.parametrize(
    "dtype, K, dropout_p",
    [(torch.float32, 13, 0.3), (torch.float32, 64, 0.0), (torch.float16, 80, 0.3), (torch.float16, 8, 0.0)],
    ids=str,
)
def test_packed_in_one(path, dtype, K, dropout_p, seed, device):
    # lengths below, at and above multiples of the blocks, so that loops with and without a last partial tile both run
    lengths = [16, 0, 1, 13] if path == SHORT else [65, 0, 1, 13]
    qkv = torch.randn(sum(lengths), 3, 2, K, dtype=dtype, device=device)
    cu_seqlens = cu_seqlens_of(lengths, device)
    assert_within_budget(
        attention, reference.attention, qkv, None, None, cu_seqlens, longest(path, *lengths),
        dropout_p=dropout_p, seed=seed, offset=3,
    )  # fmt: skip


@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
def test_longest_short_and_several_tiles(dropout_p, seed, device):
    """128 keys in one program; 150 queries and keys are two tiles of each, the second partial."""
    for lengths in [128, 57], [150, 64]:
        qkv = torch.randn(sum(lengths), 3, 1, 64, dtype=torch.float16, device=device)
        assert_within_budget(
            attention, reference.attention, qkv, None, None, cu_seqlens_of(lengths, device), max(lengths),
            dropout_p=dropout_p, seed=seed, scale=0.3,
        )  # fmt: skip


@pytest.mark.parametrize("options", [{}, dict(dropout_p=0.3), dict(window=3)], ids=str)
@pytest.mark.parametrize("heads", [1, 2])
def test_shared_keys(path, heads, options, seed, device):
    """Three or six query heads for each head of keys, packed and apart, and rows past the last sequence."""
    lengths = [9, 0, 1, 40]
    q = torch.randn(52, 6, 16, device=device)
    kv = torch.randn(52, 2, heads, 16, device=device)
    sequences = cu_seqlens_of(lengths, device), longest(path, *lengths)
    for k, v in ((kv, None), kv.unbind(1)):
        assert_op_within_budget(attention, q, k, v, *sequences, **options, seed=seed)


@pytest.mark.parametrize("with_max_seqlen_q", [True, False], ids=["", "no max_seqlen_q"])
def test_queries_of_some_rows(path, with_max_seqlen_q, seed, device):
    """Sequences without query rows, and query rows of sequences without keys."""
    lengths, lengths_q = [9, 4, 0, 0, 1, 40], [2, 0, 3, 0, 1, 5]
    q = torch.randn(sum(lengths_q), 2, 16, device=device)
    kv = torch.randn(sum(lengths), 2, 2, 16, device=device)
    cu_seqlens, cu_seqlens_q = cu_seqlens_of(lengths, device), cu_seqlens_of(lengths_q, device)
    arguments = (q, kv, None, cu_seqlens, longest(path, *lengths))
    options = dict(cu_seqlens_q=cu_seqlens_q, dropout_p=0.3, seed=seed)
    if with_max_seqlen_q:
        options["max_seqlen_q"] = max(lengths_q)
    assert_within_budget(attention, reference.attention, *arguments, **options)
    out = attention(*arguments, **options)
    assert torch.equal(out[2:5], torch.zeros_like(out[2:5]))


def test_more_rows_than_keys(device):
    """Several tiles of queries over one partial tile of keys, in two sequences."""
    q, kv = torch.randn(140, 1, 16, device=device), torch.randn(12, 2, 1, 16, device=device)
    cu_seqlens, cu_seqlens_q = cu_seqlens_of([5, 7], device), cu_seqlens_of([130, 10], device)
    assert_within_budget(
        attention, reference.attention, q, kv, None, cu_seqlens, 7, cu_seqlens_q=cu_seqlens_q, max_seqlen_q=130
    )


@pytest.mark.filterwarnings("ignore:(overflow|invalid value):RuntimeWarning")  # in rows that are not stored
def test_scores_far_below_zero(path, device):
    """Keys past the end have a score of 0, which the log-sum-exp of the real keys would turn into infinity."""
    q = 10 + torch.rand(13, 2, 16, device=device)
    kv = torch.randn(13, 2, 2, 16, device=device)
    kv[:, 0] = -10 - kv[:, 0].abs() / 10
    cu_seqlens = cu_seqlens_of([5, 1, 7], device)
    assert_within_budget(attention, reference.attention, q, kv, None, cu_seqlens, longest(path, 7))


def test_bfloat16(path, device):
    """Triton's interpreter truncates to bfloat16 instead of rounding, so the error may be two steps of 2 ** -8."""
    lengths = [16, 5]
    qkv = torch.randn(21, 3, 2, 16, device=device).bfloat16().requires_grad_()
    wide = qkv.detach().double().requires_grad_()
    cu_seqlens = cu_seqlens_of(lengths, device)
    out = attention(qkv, None, None, cu_seqlens, longest(path, *lengths))
    truth = reference.attention(wide, None, None, cu_seqlens, max(lengths))
    dout = torch.randn_like(out)
    out.backward(dout)
    truth.backward(dout.double())
    for got, want in (out, truth), (qkv.grad, wide.grad):
        assert (got.double() - want).abs().max() <= 2**-7 * want.abs().max()


def test_log_sum_exp(path, seed, device):
    """In base 2 and fp32, of the scaled scores; 0 in rows past the last sequence; in two parts for fp32 operands."""
    lengths = [14, 1]
    q, k, v = torch.randn(3, 17, 2, 16, dtype=torch.float16, device=device)
    cu_seqlens = cu_seqlens_of(lengths, device)
    max_seqlen = longest(path, *lengths)
    _, lse = kernels.attention_fwd(q, k, v, None, cu_seqlens, max_seqlen, max_seqlen, 0.5, 0.1, seed, 0)
    score = torch.einsum("ihk,jhk->hij", q.double(), k.double()) * 0.5
    want = torch.cat([score[:, :14, :14].logsumexp(-1), score[:, 14:15, 14], torch.zeros(2, 2, device=device)], 1)
    torch.testing.assert_close(lse[0].double(), want / math.log(2), rtol=1e-6, atol=1e-6)
    _, parts = kernels.attention_fwd(
        q.float(), k.float(), v.float(), None, cu_seqlens, max_seqlen, max_seqlen, 0.5, 0.1, seed, 0
    )
    torch.testing.assert_close(
        parts[0].double() * 0.5 / math.log(2) + parts[1], want / math.log(2), rtol=1e-6, atol=1e-6
    )


@pytest.mark.parametrize(
    "lengths, window, dtype, dropout_p",
    [
        *(([16, 0, 1, 13], window, torch.float16, 0.0) for window in (0, 2**31 - 1)),
        ([16, 0, 1, 13], 5, torch.float16, 0.3),
        # 150 is more than a tile of queries and two of keys. A window of 40 skips tiles, one of 110 has whole tiles
        *(([150, 1, 70], window, torch.float16, 0.0) for window in (1, 110, 149)),
        ([150, 1, 70], 40, torch.float16, 0.3),
        ([150, 1, 70], 40, torch.float32, 0.0),
    ],
    ids=str,
)
def test_window(lengths, window, dtype, dropout_p, seed, device):
    qkv = torch.randn(sum(lengths), 3, 1, 16, dtype=dtype, device=device)
    assert_within_budget(
        attention, reference.attention, qkv, None, None, cu_seqlens_of(lengths, device), max(lengths),
        dropout_p=dropout_p, seed=seed, offset=3, window=window,
    )  # fmt: skip


@pytest.mark.parametrize("lengths", [[16, 5, 1], [150, 20]], ids=["short", "tiled"])
def test_keys_outside_the_window_do_not_matter(lengths, device):
    """Keys outside a row's window hold NaN and infinity, their values are huge, and the row is the same to the bit."""
    cu_seqlens = cu_seqlens_of(lengths, device)
    clean = torch.randn(sum(lengths), 3, 1, 16, device=device)
    asked, window = lengths[0] // 2, 2
    spoiled = clean.clone()
    far = [*range(asked - window), *range(asked + window + 1, lengths[0])]
    spoiled[far, 1] = float("nan")
    spoiled[far[::2], 1] = float("inf")
    spoiled[far, 2] = 1e30
    once, again = (attention(qkv, None, None, cu_seqlens, max(lengths), window=window) for qkv in (clean, spoiled))
    assert torch.equal(once[asked], again[asked])


@pytest.mark.parametrize("size", [100, 3000])
def test_fp32_keeps_its_digits_at_large_scores(path, size, device):
    """Scores that are exact in fp32 (small integers times powers of two), so that any error is the softmax's."""
    lengths = [33, 20]
    q, k = torch.randint(-3, 4, (2, 53, 1, 16), device=device).float()
    q *= size / 32
    v = torch.randn(53, 1, 16, device=device)
    cu_seqlens = cu_seqlens_of(lengths, device)
    assert (torch.einsum("ihk,jhk->hij", q, k).abs().max() / 4).item() > size / 4
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    wide = [x.double().requires_grad_() for x in (q, k, v)]
    out = attention(*leaves, cu_seqlens, longest(path, *lengths))
    truth = reference.attention(*wide, cu_seqlens, max(lengths))
    dout = torch.randn_like(out)
    got = out, *torch.autograd.grad(out, leaves, dout)
    want = truth, *torch.autograd.grad(truth, wide, dout.double())
    for g, t in zip(got, want):
        assert (g.double() - t).abs().max() <= 2e-6 * t.abs().max()


@pytest.mark.parametrize("rows, slack", [([130, 0, 10, 3], 0), ([0, 0, 200, 1], 70), ([64, 64, 64, 0], 70)], ids=str)
def test_rows_without_a_bound(rows, slack, seed, device):
    """Without max_seqlen_q each program finds its sequence by bisection."""
    lengths = [20, 9, 3, 0]
    q = torch.randn(sum(rows) + slack, 1, 16, dtype=torch.float16, device=device)
    kv = torch.randn(sum(lengths), 2, 1, 16, dtype=torch.float16, device=device)
    cu_seqlens, cu_seqlens_q = cu_seqlens_of(lengths, device), cu_seqlens_of(rows, device)
    assert_within_budget(
        attention, reference.attention, q, kv, None, cu_seqlens, 20, cu_seqlens_q=cu_seqlens_q, dropout_p=0.2, seed=seed
    )


@pytest.mark.parametrize("change, error, words", [
    (dict(dtype=torch.float64), TypeError, "float64"),
    (dict(K=136), ValueError, "136"),
], ids=["dtype", "head size"])  # fmt: skip
def test_unsupported_operands(change, error, words, device):
    qkv = torch.randn(4, 3, 1, change.pop("K", 16), dtype=change.pop("dtype", torch.float32), device=device)
    with pytest.raises(error, match=words):
        attention(qkv, None, None, cu_seqlens_of([4], device), 4)


@pytest.mark.parametrize("impl", ["triton", "reference"])
@pytest.mark.parametrize(
    "change, words",
    [
        (dict(scale=0.0), "scale is 0.0: expected a number above 0"),
        (dict(scale=-1.0), "scale is -1.0"),
        (dict(scale=float("nan")), "scale is nan"),
        (dict(window=-1), "window is -1"),
        (dict(window=1.5), "window is 1.5"),
        (dict(dropout_p=0.1), "seed"),
        (dict(q=(4, 3, 16)), r"q, k, v have shapes \(4, 3, 16\)"),
        (dict(q=(4, 2, 1, 16)), r"\(4, 2, 1, 16\)"),
        (dict(q=(4, 1, 16), k=(4, 3, 1, 16)), r"\(4, 3, 1, 16\)"),
        (dict(q=(4, 1, 16), k=(4, 2, 1, 8)), r"\(4, 2, 1, 8\)"),
        (dict(q=(4, 1, 16), k=(4, 1, 16), v=(4, 1, 8)), r"\(4, 1, 8\)"),
        (dict(q=(3, 1, 16), k=(4, 2, 1, 16)), "q has 3 rows and k 4"),
        (dict(cu_seqlens=torch.zeros(2, 2, dtype=torch.int32)), "cu_seqlens has shape"),
        (dict(cu_seqlens_q=torch.zeros(2, dtype=torch.int32)), "cu_seqlens_q is given with q"),
        (dict(q=(4, 1, 16), k=(4, 2, 1, 16), cu_seqlens_q=torch.zeros(3, dtype=torch.int32)), "cu_seqlens_q has shape"),
        (dict(q=(4, 1, 16), k=(4, 2, 1, 16), cu_seqlens_q=torch.zeros(2, dtype=torch.int32), window=3), "window needs"),
    ],
    ids=str,
)
def test_bad_arguments(impl, change, words, device):
    """Both give the same message."""
    change = {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in change.items()}
    shapes = change.pop("q", (4, 3, 1, 16)), change.pop("k", None), change.pop("v", None)
    operands = [None if shape is None else torch.randn(shape, device=device) for shape in shapes]
    cu_seqlens = change.pop("cu_seqlens", cu_seqlens_of([4], device))
    with pytest.raises(ValueError, match=words):
        ops.attention(*operands, cu_seqlens, 4, impl=impl, **change)
