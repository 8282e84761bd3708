"""What goes wrong in libraries like this one, shown not to go wrong here. tests/README.md has the list.

First every op, from the table in calls.py; then the masked language model, through kernels and plain PyTorch, padded
and packed; then what transformers gets wrong.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from calls import CALLS, is_floating
from helpers import IMPLEMENTATIONS, PLAIN, assert_same_bits, assert_within_budget, cu_seqlens_of
from transformers import BertConfig, BertForMaskedLM, DataCollatorWithFlattening

from fastbert import ops, reference
from fastbert.config import EncoderConfig
from fastbert.cpu import dropout
from fastbert.heads import MaskedLM
from fastbert.kernels import _launch
from fastbert.packing import Batch, pack
from fastbert.training.loop import accumulate

# what the interpreter's numpy says about places that are not stored, or about the infinities under test
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

every_call = pytest.mark.parametrize("name", CALLS)
with_dropout = pytest.mark.parametrize(
    "name", [n for n, call in CALLS.items() if call.arguments("cpu").get("dropout_p")]
)
over_sequences = pytest.mark.parametrize("name", [n for n, call in CALLS.items() if call.takes("cu_seqlens")])
fp32_and_fp16 = pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])


def check(call, arguments):
    """Values and gradients against the reference in float64."""
    assert_within_budget(lambda **a: call(a), lambda **a: call(a, impl="reference"), **arguments)


def same(got, wanted):
    """Two results of Call.run are equal to the bit."""
    assert_same_bits(got[0], wanted[0])
    assert_same_bits(got[1].values(), wanted[1].values())


# ---------------------------------------------------------------------------------------------------- every op


GUARD = 512


class Guarded:
    """Inside it, fresh memory is full of NaN, or of 77, and lies between guards, which stores may not touch."""

    def __init__(self, monkeypatch):
        self.patch, self.memories = monkeypatch, []

    def __enter__(self):
        for name, fill in (("empty", None), ("empty_like", None), ("zeros", 0), ("zeros_like", 0)):
            self.patch.setattr(torch, name, self.made(getattr(torch, name), fill))

    def made(self, make, fill):
        def guarded(*args, **kwargs):
            plain = make(*args, **kwargs)
            size = 1 + sum((n - 1) * stride for n, stride in zip(plain.shape, plain.stride())) if plain.numel() else 0
            alien = float("nan") if plain.is_floating_point() else 77
            memory = torch.full((size + 2 * GUARD,), alien, dtype=plain.dtype, device=plain.device)
            self.memories.append((memory, memory.clone()))
            view = memory.as_strided(plain.shape, plain.stride(), GUARD)
            return view if fill is None else view.fill_(fill)

        return guarded

    def __exit__(self, *_):
        self.patch.undo()
        assert self.memories
        for memory, before in self.memories:
            for end in (slice(GUARD), slice(-GUARD, None)):
                torch.testing.assert_close(memory[end], before[end], rtol=0, atol=0, equal_nan=True)


@every_call
def test_every_element_is_written_and_none_beside(name, device, monkeypatch):
    """The results do not depend on what memory held, and no store lands outside a tensor."""
    call = CALLS[name]
    arguments = call.arguments(device)
    # guarded first: without guards, a store beside its tensor may end the process
    with Guarded(monkeypatch):
        got = call.run(arguments)
    expected = call.run(arguments)
    same(got, expected)
    # torch's own switch reaches what is allocated otherwise
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.utils.deterministic.fill_uninitialized_memory and torch.empty(3, device=device).isnan().all()
        got = call.run(arguments)
    finally:
        torch.use_deterministic_algorithms(False)
    same(got, expected)


@every_call
def test_any_incoming_gradient_is_honoured(name, device):
    """Gradients are linear in it: a negative part, nothing at all, and an output that is used twice."""
    call = CALLS[name]
    arguments = call.arguments(device)
    outputs = [x for x in call(arguments) if x.is_floating_point()]
    cotangents = [torch.randn(x.shape, device=device) for x in outputs]
    _, once = call.run(arguments, cotangents)
    # powers of 2 change no digit
    for factor in (-0.25, 0.0):
        _, scaled = call.run(arguments, [factor * c for c in cotangents])
        for argument, gradient in once.items():
            assert torch.equal(scaled[argument], factor * gradient), (factor, argument)
    leaves = {n: x.detach().requires_grad_() for n, x in arguments.items() if is_floating(x)}
    outputs = [x for x in call(arguments | leaves) if x.is_floating_point()]
    sum((2 * x * c).sum() - (x * c).sum() for x, c in zip(outputs, cotangents)).backward()
    for argument, gradient in once.items():
        assert torch.equal(leaves[argument].grad, gradient), argument


@every_call
def test_backward_twice_and_saved_tensors_of_others(name, device):
    """What stands before the op finds its own saved output as it was, also in a second backward."""
    call = CALLS[name]
    arguments = call.arguments(device)
    leaves = {n: x.detach().requires_grad_() for n, x in arguments.items() if is_floating(x)}
    # exp saves its output, which is the op's input; softmax as well
    inputs = {n: (0.5 * x).exp() if i % 2 else x.softmax(-1) for i, (n, x) in enumerate(leaves.items())}
    kept = {n: x.detach().clone() for n, x in inputs.items()}
    outputs = [x for x in call(arguments | inputs) if x.is_floating_point()]
    cotangents = [torch.randn(x.shape, device=device) for x in outputs]
    results = [torch.autograd.grad(outputs, list(leaves.values()), cotangents, retain_graph=True) for _ in range(2)]
    assert_same_bits(*results)
    _, own = call.run(arguments | kept, cotangents)
    assert_same_bits((inputs[n] for n in kept), kept.values())
    wanted = torch.autograd.grad(list(inputs.values()), list(leaves.values()), [own[n] for n in inputs])
    assert_same_bits(results[0], wanted)


@every_call
def test_two_calls_on_one_input(name, device):
    """Two heads on the same tensors: the second finds them as the first did."""
    call = CALLS[name]
    arguments = call.arguments(device)
    leaves = {n: x.detach().requires_grad_() for n, x in arguments.items() if is_floating(x)}
    outputs = [x for _ in range(2) for x in call(arguments | leaves) if x.is_floating_point()]
    sum(x.sum() for x in outputs).backward()
    _, once = call.run(arguments)
    for argument, gradient in once.items():
        # a sum of more than two terms may be rounded otherwise in another order
        within = dict(rtol=0, atol=0 if call.exact else 1e-6 * max(1.0, gradient.abs().max().item()))
        torch.testing.assert_close(leaves[argument].grad, 2 * gradient, **within, msg=argument)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@every_call
def test_no_tokens(name, impl, device):
    """Nothing in, nothing out: right shapes, and gradients of 0 for what is not per token."""
    call = CALLS[name]
    arguments = call.arguments(device)
    for token in call.tokens:
        arguments[token] = arguments[token][:0]
    starts = {n: x for n, x in arguments.items() if n.startswith("cu_seqlens") and x is not None}
    for sequences in (0, 2) if starts else (0,):
        for n in starts:
            arguments[n] = cu_seqlens_of([0] * sequences, device)
        wanted = call(arguments, impl="reference")
        outputs, gradients = call.run(arguments, impl=impl)
        for got, want in zip(outputs, wanted, strict=True):
            assert got.shape == want.shape and got.dtype == want.dtype and torch.equal(got, torch.zeros_like(got))
        for argument, gradient in gradients.items():
            assert gradient.shape == arguments[argument].shape, argument
            assert torch.equal(gradient, torch.zeros_like(gradient)), argument


def sequences(name, lengths, device, dtype=torch.float32, slack=2, size=1.0):
    """The arguments of a call for other lengths, and `slack` rows past the last sequence."""
    arguments = CALLS[name].arguments(device, dtype)
    lengths_q = [-(-n // 2) for n in lengths]
    for token in CALLS[name].tokens:
        asks = token == "q" and arguments.get("cu_seqlens_q") is not None
        rows = sum(lengths_q if asks else lengths) + slack
        arguments[token] = torch.randn(rows, *arguments[token].shape[1:], device=device, dtype=dtype) * size
    arguments["cu_seqlens"] = cu_seqlens_of(lengths, device)
    if "max_seqlen" in arguments:
        arguments["max_seqlen"] = max(arguments["max_seqlen"], *lengths)
    if CALLS[name].op == "biased_attention":
        arguments["bias"] = torch.randn(
            2 * arguments["max_seqlen"], arguments["bias"].shape[1], device=device, dtype=dtype
        )
    if arguments.get("cu_seqlens_q") is not None:
        arguments["cu_seqlens_q"], arguments["max_seqlen_q"] = cu_seqlens_of(lengths_q, device), max(lengths_q)
    return arguments


@over_sequences
def test_awkward_lengths_and_large_inputs(name, device):
    # the interpreter takes long over attention with relative positions
    is_slow = CALLS[name].op in ("biased_attention", "disentangled_attention")
    batches = [[1, 2, 33]] if is_slow else [[1, 2, 5, 17, 31, 33]]
    if name in ("attention", "pooling"):
        batches += [[127], [129]]
    for lengths in batches:
        check(CALLS[name], sequences(name, lengths, device, torch.float16, size=5.0))


HEAD_SIZES = [8, 24, 32, 59, 64, 80, 111, 128]


@pytest.mark.parametrize("K", HEAD_SIZES)
@pytest.mark.parametrize("name", ["attention", "attention-tiled"])
def test_head_sizes(name, K, device):
    arguments = CALLS[name].arguments(device, torch.float16)
    check(CALLS[name], arguments | dict(q=torch.randn(*arguments["q"].shape[:-1], K, device=device).half()))


@over_sequences
def test_slack_may_hold_anything(name, device):
    """Rows past the last sequence: read by nobody, 0 in the output, a gradient of 0, whatever they or dout hold."""
    call = CALLS[name]
    clean = sequences(name, [3, 0, 6], device)
    cotangents = [torch.randn_like(x) for x in call(clean)]
    expected = call.run(clean, cotangents)
    dirty = dict(clean)
    for token in call.tokens:
        dirty[token] = clean[token].clone()
        dirty[token][-2], dirty[token][-1] = float("nan"), -float("inf")
    for x in cotangents:
        if len(x) != len(clean["cu_seqlens"]) - 1:
            x[-2], x[-1] = float("inf"), float("nan")
    got = call.run(dirty, cotangents)
    same(got, expected)
    for token in call.tokens:
        assert torch.equal(got[1][token][-2:], torch.zeros_like(got[1][token][-2:]))


@over_sequences
def test_sequences_do_not_see_each_other(name, device):
    """Alone or among others, before or after them: a sequence gives the same bits; NaN in one stays there."""
    call = CALLS[name]
    silent = {"dropout_p": 0.0} if call.takes("dropout_p") else {}
    arguments = sequences(name, [4, 3, 6], device, slack=0) | silent
    if arguments.get("cu_seqlens_q") is not None:
        arguments |= dict(
            q=arguments["k"].select(1, 0).contiguous(), cu_seqlens_q=arguments["cu_seqlens"], max_seqlen_q=6
        )
    per_token = len(call(arguments)[0]) == 13
    dirty = dict(arguments)
    alone = dict(arguments)
    for token in call.tokens:
        dirty[token] = arguments[token].clone()
        dirty[token][4:7] = float("nan")
        alone[token] = arguments[token][7:]
    for n in ("cu_seqlens", "cu_seqlens_q"):
        if alone.get(n) is not None:
            alone[n] = cu_seqlens_of([6], device)
    whole, whole_gradients = call.run(arguments)
    got, gradients = call.run(dirty)
    others = [0, 1, 2, 3, 7, 8, 9, 10, 11, 12]
    rows = others if per_token else [0, 2]
    assert_same_bits((got[0][rows],), (whole[0][rows],))
    for token in call.tokens:
        assert_same_bits((gradients[token][others],), (whole_gradients[token][others],))
    only, only_gradients = call.run(alone)
    assert_same_bits((only[0],), (whole[0][7:] if per_token else whole[0][2:],))
    for token in call.tokens:
        assert_same_bits((only_gradients[token],), (whole_gradients[token][7:],))


ROW_WISE = [n for n, call in CALLS.items() if call.op in ("layer_norm", "bias_gelu", "gelu_layer_norm", "embedding")]


@pytest.mark.parametrize("name", ROW_WISE)
def test_rows_do_not_see_each_other(name, device):
    """A row gives the same bits wherever it stands and whatever stands beside it."""
    call = CALLS[name]
    silent = {"dropout_p": 0.0} if call.takes("dropout_p") else {}
    arguments = call.arguments(device) | silent
    (whole,) = call(arguments)
    for row in (0, len(whole) - 1):
        (alone,) = call(arguments | {n: arguments[n][row : row + 1] for n in call.tokens})
        assert torch.equal(alone[0], whole[row])


# ---------------------------------------------------------------------------------------------------- dropout


@with_dropout
def test_dropout_at_its_ends(name, device):
    """Too small to drop anything is no dropout, to the bit; nearly all, and all, are within the budget and finite."""
    call = CALLS[name]
    arguments = call.arguments(device)
    none = call.run(arguments | dict(dropout_p=0.0))
    same(call.run(arguments | dict(dropout_p=1e-7)), none)
    check(call, arguments | dict(dropout_p=0.999))
    check(call, arguments | dict(dropout_p=1.0))


@with_dropout
def test_dropout_that_cannot_be_is_refused(name, device):
    """Without a seed, or with no probability: it is never left out silently."""
    call = CALLS[name]
    arguments = call.arguments(device)
    for impl in IMPLEMENTATIONS:
        for wrong in (dict(seed=None), dict(dropout_p=-0.1), dict(dropout_p=1.5), dict(dropout_p=float("nan"))):
            with pytest.raises(ValueError, match="dropout_p"):
                call(arguments | wrong, impl)


@with_dropout
def test_seed_and_offset_are_the_mask(name, device):
    """The same ones give the same bits, other ones another mask; a seed of any sign and size counts in full."""
    call = CALLS[name]
    arguments = call.arguments(device) | dict(dropout_p=0.5)
    seeds = [0, 1, -1, 2**32, 2**63 - 1]
    results = [call(arguments | dict(seed=torch.tensor([s], device=device), offset=4))[0] for s in seeds]
    results += [call(arguments | dict(seed=torch.tensor([0], device=device), offset=5))[0]]
    for i, one in enumerate(results):
        assert not any(torch.equal(one, other) for other in results[:i])
    again = call(arguments | dict(seed=torch.tensor([0], device=device), offset=4))[0]
    assert torch.equal(again, results[0])


def test_masks_are_uniform(device):
    """What is kept at each probability, over 160,000 draws: the largest distance (Kolmogorov-Smirnov) is below 0.01."""
    row = torch.arange(400, device=device)
    seed = torch.tensor([77], device=device)
    for draw in (dropout.keep_mask, dropout.attention_keep_mask):
        for p in [i / 8 for i in range(1, 8)]:
            kept = draw(row, torch.zeros_like(row), 400, seed, 0, p).double().mean().item()
            assert abs(kept - (1 - p)) < 0.01
            assert abs(kept - (1 - p)) < 4 * (p * (1 - p) / 160000) ** 0.5


def test_keep_rate_of_an_op(device):
    """Within four standard deviations, in what comes out: 40,000 elements of a lookup."""
    p, T, D = 0.1, 400, 100
    ids = torch.zeros(T, dtype=torch.int64, device=device)
    tables = [torch.randn(1, D, device=device) for _ in range(3)]
    weight, bias = torch.ones(D, device=device), torch.full((D,), 100.0, device=device)
    seed = torch.tensor([3], device=device)
    y = ops.embedding(ids, ids, ids, *tables, weight, bias, dropout_p=p, seed=seed, impl="triton")
    kept = (y != 0).double().mean().item()
    assert abs(kept - 0.9) < 4 * (p * (1 - p) / (T * D)) ** 0.5


# ---------------------------------------------------------------------------------------------------- numbers


def _rows(device, dtype, x, **others):
    """Arguments of a row-wise call with the rows x [T, D]."""
    D = x.shape[1]
    parameters = {n: torch.randn(D, device=device, dtype=dtype) for n in others}
    return dict(x=x.to(device, dtype)) | parameters


def _special_rows(D=40):
    """Constant rows, zeros of both signs, large means with a small spread, denormals, one outlier."""
    noise = torch.randn(9, D)
    return torch.stack([
        torch.full((D,), 3.3), torch.zeros(D), torch.full((D,), -0.0), 100 + noise[0] * 1e-1, 1e4 + 10 * noise[1],
        noise[2] * 1e-7, noise[3] * 5, torch.eye(D)[3] * 6e4, noise[4],
    ])  # fmt: skip


@fp32_and_fp16
@pytest.mark.parametrize("eps", [1e-12, 1e-7, 1e-5])
def test_layer_norm_of_special_rows(eps, dtype, device):
    x = _special_rows().to(device, dtype)
    weight, bias = torch.randn(2, 40, device=device, dtype=dtype)
    if eps == 1e-12:
        # without a spread nothing but eps is left: 1 / sqrt(1e-12) makes any digit lost a million times larger, and
        # fp16 cannot hold the gradient of denormals
        x = torch.cat((x[3:5], x[6:]))
    residual = torch.zeros_like(x)

    def op(impl):
        return lambda x, weight, bias, residual: ops.layer_norm(x, weight, bias, residual=residual, eps=eps, impl=impl)

    assert_within_budget(op("triton"), op("reference"), x, weight, bias, residual)


@pytest.mark.parametrize("mean", [1e2, 1e4, 1e6])
def test_layer_norm_of_a_large_mean(mean, device):
    """Against float64 of the same fp32 numbers: only the digits that the numbers have lost may be missing."""
    x = (torch.randn(5, 96) + mean).to(device)
    weight, bias = torch.ones(96, device=device), torch.zeros(96, device=device)
    y = ops.layer_norm(x, weight, bias, impl="triton")
    truth = reference.layer_norm(x.double(), weight.double(), bias.double())
    assert (y - truth).abs().max().item() < 1e-5 + mean * 2**-24 * 4


@fp32_and_fp16
@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_gelu_of_special_numbers(approximate, dtype, device):
    x = torch.tensor([0.0, -0.0, 10, -10, 1e4, -1e4, 1e-40, -1e-40, 6e-8, -6e-8, 1e-5, 3.3, -3.3, 6e4, -6e4])
    x = x.to(device, dtype)[:, None].repeat(1, 8)
    zero = torch.zeros(8, device=device, dtype=dtype)
    (y,), gradients = CALLS["bias_gelu"].run(dict(x=x, bias=zero, approximate=approximate))
    assert torch.isfinite(y).all() and torch.isfinite(gradients["x"]).all()
    truth = dict(x=x.double(), bias=zero.double(), approximate=approximate)
    (wanted,), slopes = CALLS["bias_gelu"].run(truth, impl="reference")
    step = torch.finfo(dtype).eps
    assert ((y - wanted).abs() <= 2 * step * wanted.abs() + 1e-7).all()
    assert ((gradients["x"] - slopes["x"]).abs() <= 2 * step + 1e-6).all()


@fp32_and_fp16
def test_gelu_layer_norm_of_special_rows(dtype, device):
    x = _special_rows()[3:].to(device, dtype)
    bias, weight, ln_bias = torch.randn(3, 40, device=device, dtype=dtype)
    for approximate in ("none", "tanh"):
        arguments = dict(x=x, bias=bias, weight=weight, ln_bias=ln_bias, approximate=approximate, eps=1e-7)
        check(CALLS["gelu_layer_norm"], arguments)


@fp32_and_fp16
def test_embedding_of_special_rows(dtype, device):
    """Rows of large numbers with a small spread, looked up twice each."""
    word = _special_rows()[3:].to(device, dtype)
    word = torch.cat((word[:2], word[3:]))
    ids = torch.arange(10, device=device) % 5
    position, token_type = (torch.zeros(5, 40, device=device, dtype=dtype) for _ in range(2))
    weight, bias = torch.randn(2, 40, device=device, dtype=dtype)
    rows = dict(input_ids=ids, position_ids=ids, token_type_ids=ids % 2, token_type=token_type[:2], position=position)
    check(CALLS["embedding"], rows | dict(word=word, weight=weight, bias=bias, eps=1e-7))


@pytest.mark.parametrize("options", [dict(mode="mean"), dict(mode="mean", normalize=True), dict(mode="max")], ids=str)
def test_pooling_to_the_end_of_half_precision(options, device):
    """Sums and squares that fp16 cannot hold, and means that it can."""
    hidden = torch.randn(11, 37, device=device) + torch.linspace(-6e4, 6e4, 37, device=device)
    lengths = cu_seqlens_of([3, 0, 6], device)
    check(CALLS["pooling"], dict(hidden=hidden.half(), cu_seqlens=lengths) | options)


def test_variants_differ(device):
    """erf and tanh are not each other's stand-in, and an unknown one is refused."""
    x, zero = torch.linspace(-4, 4, 64, device=device).view(8, 8), torch.zeros(8, device=device)
    outs = [ops.bias_gelu(x, zero, approximate=a, impl="triton") for a in ("none", "tanh")]
    assert 1e-4 < (outs[0] - outs[1]).abs().max().item() < 1e-3
    for out, a in zip(outs, ("none", "tanh")):
        torch.testing.assert_close(out, torch.nn.functional.gelu(x, approximate=a), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("tiled", [False, True], ids=["short", "tiled"])
def test_attention_scores_to_the_end_of_half_precision(tiled, device):
    """Scores of 60,000 and -60,000 in fp16, where a mask added to them would overflow: values and gradients."""
    q = torch.zeros(9, 1, 16, dtype=torch.float16, device=device)
    kv = torch.randn(9, 2, 1, 16, dtype=torch.float16, device=device)
    q[:, 0, 0] = 250.0
    kv[:, 0, 0, 0] = torch.tensor([240.0, -240, 239, 1, 0, 0.01, -240, 240, -240])
    q[5] = 0.0
    lengths = cu_seqlens_of([5, 0, 4], device)
    arguments = dict(q=q, k=kv, v=None, cu_seqlens=lengths, max_seqlen=130 if tiled else 5, scale=1.0)
    check(CALLS["attention-some_rows"], arguments)
    # every score far below zero: the keys that do not exist would win with a score of 0
    kv[:, 0, 0, 0] = -240.0
    check(CALLS["attention-some_rows"], arguments)


@pytest.mark.parametrize("size", [1e-30, 1e-20, 1e4])
def test_attention_of_tiny_and_huge_values(size, device):
    """v of any size scales the result; tiny q and k weigh all keys alike."""
    qkv = torch.randn(9, 3, 2, 16, device=device)
    qkv[:, 2] *= size
    lengths = cu_seqlens_of([4, 5], device)
    out = ops.attention(qkv, None, None, lengths, 5, impl="triton")
    truth = reference.attention(qkv.double(), None, None, lengths, 5)
    assert (out - truth).abs().max().item() <= 3e-6 * size
    qkv[:, :2] *= 1e-30
    out = ops.attention(qkv, None, None, lengths, 5, impl="triton")
    torch.testing.assert_close(out[:4], qkv[:4, 2].mean(0).expand(4, 2, 16), rtol=1e-5, atol=1e-6 * size)


def _by_row(impl):
    def losses(hidden, weight, bias, labels):
        rows = range(len(hidden))
        parts = [
            ops.masked_cross_entropy(hidden[m : m + 1], weight, bias, labels[m : m + 1], impl=impl)[0] for m in rows
        ]
        return torch.stack(parts)

    return losses


@fp32_and_fp16
def test_cross_entropy_of_large_logits(dtype, device):
    """Logits of 10,000 and -10,000: exact in fp16, and far beyond what exp takes."""
    hidden = torch.zeros(4, 8, dtype=dtype, device=device)
    hidden[:, 0] = torch.tensor([100.0, -100, 1, 0])
    weight = torch.zeros(19, 8, dtype=dtype, device=device)
    weight[:, 0] = torch.linspace(-100, 100, 19).round()
    labels = torch.tensor([18, 18, 3, 0], device=device)
    bias = torch.randint(-4, 5, (19,), device=device).to(dtype)
    assert_within_budget(_by_row("triton"), _by_row("reference"), hidden, weight, bias, labels)


@pytest.mark.parametrize("symmetric", [False, True])
def test_contrast_of_large_scores(symmetric, device):
    """Scores of 10,000 and -10,000."""
    query, document = torch.zeros(4, 8, device=device), torch.zeros(6, 8, device=device)
    query[:, 0] = torch.tensor([100.0, -100, 1, 0])
    document[:, 0] = torch.tensor([100.0, -100, 90, 0, 3, -2])
    arguments = dict(query=query, document=document, scale=torch.tensor(1.0, device=device), symmetric=symmetric)
    check(CALLS["contrastive_cross_entropy"], arguments)


@fp32_and_fp16
def test_cross_entropy_of_one_word(dtype, device):
    """A vocabulary of one: no loss, no gradient, always right."""
    hidden, weight = torch.randn(5, 8, dtype=dtype, device=device), torch.randn(1, 8, dtype=dtype, device=device)
    arguments = dict(hidden=hidden, weight=weight, bias=torch.randn(1, dtype=dtype, device=device))
    arguments["labels"] = torch.tensor([0, 0, -100, 0, -100], device=device)
    (loss, count, correct), gradients = CALLS["masked_cross_entropy"].run(arguments)
    assert (loss.item(), count.item(), correct.item()) == (0.0, 3, 3)
    assert not any(gradient.any() for gradient in gradients.values())


@fp32_and_fp16
def test_cross_entropy_with_banned_words(dtype, device):
    """Words of bias -inf: as if they were not in the vocabulary; a label among them costs infinitely much."""
    arguments = CALLS["masked_cross_entropy"].arguments(device, dtype)
    banned = torch.tensor([1, 5, 20], device=device)
    arguments["bias"][banned] = -float("inf")
    (loss, count, _), gradients = CALLS["masked_cross_entropy"].run(arguments)
    assert torch.isfinite(loss) and all(torch.isfinite(g).all() for g in gradients.values())
    assert not gradients["weight"][banned].any() and not gradients["bias"][banned].any()
    check_rest = {n: x.double() if is_floating(x) else x for n, x in arguments.items()}
    (truth, *_), _ = CALLS["masked_cross_entropy"].run(check_rest, impl="reference")
    torch.testing.assert_close(loss.double(), truth.double(), rtol=3e-3 if dtype == torch.float16 else 1e-6, atol=0)
    arguments["labels"][0] = 5
    assert ops.masked_cross_entropy(**arguments, impl="triton")[0] == float("inf")


@pytest.mark.parametrize("picked", [0, 1, 7], ids=["none", "one", "all"])
def test_cross_entropy_of_picks(picked, device):
    arguments = CALLS["masked_cross_entropy"].arguments(device)
    arguments["labels"] = torch.arange(7, device=device).masked_fill(torch.arange(7, device=device) >= picked, -100)
    (loss, count, _), gradients = CALLS["masked_cross_entropy"].run(arguments)
    assert count == picked and (loss == 0) == (picked == 0)
    assert not gradients["hidden"][picked:].any()
    if picked == 0:
        assert not any(gradient.any() for gradient in gradients.values())
    check(CALLS["masked_cross_entropy"], arguments)


@pytest.mark.parametrize("op", ["layer_norm", "gelu_layer_norm", "embedding"])
@pytest.mark.parametrize("D", [8200, 70000])
def test_rows_wider_than_a_program_holds(op, D, device):
    """Right, or refused in a line that says how many columns there are: never wrong."""
    call = CALLS[op]
    arguments = call.arguments(device)
    for name, x in arguments.items():
        if is_floating(x) and x.dim() > 0:
            arguments[name] = torch.randn(*x.shape[:-1], D, device=device)
    try:
        check(call, arguments)
    except ValueError as error:
        assert str(D) in str(error)


# ---------------------------------------------------------------------------------------------------- settings


@pytest.fixture
def settings(monkeypatch):
    """A profile of its own, with the search switched on."""
    profile = {}
    monkeypatch.setattr(_launch, "AUTOTUNE", True)
    monkeypatch.setattr(_launch, "_profile", lambda device: profile)
    monkeypatch.setattr(_launch, "timings", {})
    return profile


# one call for each set of kernels
with_kernels = pytest.mark.parametrize("name", [n for n in CALLS if n.partition("-")[2] in ("", "tiled")])


@pytest.mark.skipif(torch.cuda.is_available(), reason="takes the clock away: tests/test_gpu.py searches on the device")
@with_kernels
def test_a_search_for_settings_does_not_show(name, device, settings, monkeypatch):
    """Every candidate runs, on buffers that some kernels change. The first call, which searches, gives the bits of the
    second, which does not."""
    tried = []

    def the_last_is_fastest(run):
        run()
        tried.append(1)
        return 1.0 / 2 ** len(tried)

    monkeypatch.setattr(_launch, "_microseconds", the_last_is_fastest)
    call = CALLS[name]
    arguments = call.arguments(device)
    searching = call.run(arguments)
    count = len(tried)
    same(call.run(arguments), searching)
    assert len(tried) == count and bool(count) == bool(settings)


@with_kernels
def test_every_candidate_is_right(name, device, settings, monkeypatch):
    """One after the other, so that none hides behind a better one."""
    call = CALLS[name]
    arguments = call.arguments(device)
    monkeypatch.setattr(_launch, "AUTOTUNE", False)
    default = call.run(arguments)
    monkeypatch.setattr(_launch, "AUTOTUNE", True)
    seen = {}

    def forced(run, kernel, key, candidates, overwrites):
        # what the interpreter ignores makes no other candidate
        blocks = [{k: v for k, v in c.items() if not k.startswith(("num_", "maxnreg"))} for c in candidates]
        different = [c for i, c in enumerate(candidates) if blocks[i] not in blocks[:i]]
        seen[kernel, key] = len(different)
        return different[min(number, len(different) - 1)]

    monkeypatch.setattr(_launch, "_fastest", forced)
    number = 1
    while number == 1 or number < max(seen.values(), default=0):
        settings.clear()
        got = call.run(arguments)
        for x, wanted in zip((*got[0], *got[1].values()), (*default[0], *default[1].values()), strict=True):
            torch.testing.assert_close(x, wanted, rtol=1e-5, atol=1e-5)
        number += 1


TOY = """
import triton
import triton.language as tl

@triton.jit
def toy(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + at, tl.exp(tl.load(x_ptr + at, mask=at < n)), mask=at < n)
"""
COMPILE = """
import hashlib, multiprocessing, sys
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from toy import toy

def compiled():
    source = ASTSource(toy, {"x_ptr": "*fp32", "y_ptr": "*fp32", "n": "i32", "BLOCK": "constexpr"}, {(3,): 256})
    return hashlib.sha256(compile(source, target=GPUTarget("cuda", 90, 32)).asm["cubin"]).hexdigest()

def at_once(barrier, results):
    barrier.wait()
    results.put(compiled())

fork = multiprocessing.get_context("fork")
barrier, results = fork.Barrier(4), fork.Queue()
children = [fork.Process(target=at_once, args=(barrier, results)) for _ in range(4)]
for child in children:
    child.start()
found = [results.get(timeout=100) for _ in children] + [compiled()]
print(len(found), len(set(found)), {child.join() or child.exitcode for child in children})
"""


def test_processes_may_compile_the_same_kernel_at_once(tmp_path):
    """Four of them, into one cache: each gets the whole kernel, and nothing half written stays for the fifth."""
    (tmp_path / "toy.py").write_text(TOY)
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path / "cache"), "PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True)
    assert done.stdout.split() == ["5", "1", "{0}"], done.stderr
    assert len(list((tmp_path / "cache").rglob("toy.cubin"))) == 1
    assert not list((tmp_path / "cache").rglob("tmp.*"))


# ---------------------------------------------------------------------------------------------------- the model

TINY = EncoderConfig(
    vocab_size=37, hidden_size=24, num_hidden_layers=2, num_attention_heads=1, intermediate_size=40,
    max_position_embeddings=80, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
)  # fmt: skip
LENGTHS = [5, 1, 9]


@pytest.fixture(params=["triton", PLAIN])
def impl(request, monkeypatch):
    monkeypatch.setattr(ops, "IMPL", request.param)
    return request.param


@pytest.fixture
def model(impl, device):
    torch.manual_seed(1)
    model = MaskedLM(TINY).to(device)
    for parameter in model.parameters():
        # larger than BERT's first weights, so that differences show
        torch.nn.init.normal_(parameter, mean=float(parameter.dim() == 1), std=0.3)
    return model


def padded(device, width=9, pad=0):
    """ids, mask and labels [3, width] of sequences of 5, 1 and 9 tokens; what stands in the padding is `pad`."""
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(1, 37, (3, 9), generator=generator)
    labels = torch.where(torch.rand(3, 9, generator=generator) < 0.4, ids, -100)
    mask = torch.arange(9) < torch.tensor(LENGTHS)[:, None]
    ids, labels = ids.where(mask, pad), labels.where(mask, -100)
    widen = lambda x, value: torch.nn.functional.pad(x, (0, width - 9), value=value).to(device)  # noqa: E731
    return dict(input_ids=widen(ids, pad), attention_mask=widen(mask.long(), 0), labels=widen(labels, -100))


def packed(device, slack=0, more_sequences=0, slack_id=0, more_picks=0):
    """The same as a Batch, filled up to a capacity."""
    inputs = padded("cpu")
    batch, _ = pack(**inputs)
    fill = lambda x, n, value: torch.cat((x, torch.full((n,), value, dtype=x.dtype)))  # noqa: E731
    T = int(batch.cu_seqlens[-1])
    return Batch(
        fill(batch.input_ids, slack, slack_id), fill(batch.position_ids, slack, slack_id % 7),
        fill(batch.token_type_ids, slack, slack_id % 2), fill(batch.cu_seqlens, more_sequences, T), batch.max_seqlen,
        fill(batch.labels, slack, -100), fill(batch.picks, more_picks, T + slack - 1),
    ).to(device)  # fmt: skip


def step(model, *args, **kwargs):
    """[loss sum, count, correct, every gradient]"""
    model.zero_grad(set_to_none=True)
    output = model(*args, **kwargs)
    output.loss.backward()
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
    loss = output.losses["mlm"]
    return [loss.sum.detach(), loss.count, loss.correct, *gradients]


@pytest.fixture
def expected(impl, model, device, kept={}):  # noqa: B006
    """The step of the packed batch, made once for each implementation."""
    if impl not in kept:
        kept[impl] = [x.clone() for x in step(model, packed(device))]
    return kept[impl]


def test_padding_changes_nothing(model, expected, device):
    """However much, and whatever it holds, even where its positions' embeddings are NaN: the packed batch's bits."""
    assert_same_bits(step(model, **padded(device)), expected)
    with torch.no_grad():
        logits = model(**{k: v for k, v in padded(device).items() if k != "labels"}).logits
        model.encoder.embeddings.position.weight[9:] = float("nan")
    for width, pad in ((16, 0), (73, 36)):
        inputs = padded(device, width, pad)
        assert_same_bits(step(model, **inputs), expected)
        del inputs["labels"]
        with torch.no_grad():
            got = model(**inputs).logits
        assert torch.equal(got[:, :9], logits) and not got[:, 9:].any()


def test_rows_of_padding_alone(model, device):
    """Some rows, or all: as if they were not there; their logits are 0."""
    inputs = padded(device)
    for kept in ([0, 2], []):
        masked = {k: v.clone() for k, v in inputs.items()}
        gone = [b for b in range(3) if b not in kept]
        masked["attention_mask"][gone] = 0
        masked["labels"][gone] = -100
        got = step(model, **masked)
        assert all(torch.isfinite(x).all() for x in got)
        assert_same_bits(got, step(model, **{k: v[kept] for k, v in inputs.items()}))
        del masked["labels"]
        with torch.no_grad():
            assert not model(**masked).logits[gone].any()


def test_slack_and_empty_sequences(model, expected, device):
    """A batch filled up to a capacity: what fills it does not matter to the bit, that it is filled only to rounding."""
    filled = step(model, packed(device, slack=4, more_sequences=3, slack_id=1, more_picks=2))
    assert_same_bits(filled, step(model, packed(device, slack=4, more_sequences=3, slack_id=30, more_picks=2)))
    assert_same_bits(filled[1:3], expected[1:3])
    for a, b in zip(filled, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=2e-6)


def test_alone_and_in_a_batch(model, device):
    """A text's scores hardly depend on what is beside it: the matrix library alone may sum in another order."""
    inputs = padded(device)
    del inputs["labels"]
    with torch.no_grad():
        together = model(**inputs).logits
        for b, length in enumerate(LENGTHS):
            alone = model(inputs["input_ids"][b : b + 1, :length]).logits[0]
            torch.testing.assert_close(alone, together[b, :length], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(0, 5), (2, 0), (0, 0)], ids=str)
def test_an_empty_batch(model, shape, device):
    ids = torch.zeros(shape, dtype=torch.int64, device=device)
    loss, count, correct, *gradients = step(model, ids, labels=torch.full_like(ids, -100))
    assert (loss.item(), count.item(), correct.item()) == (0.0, 0, 0)
    assert not any(gradient.any() for gradient in gradients)
    with torch.no_grad():
        assert model(ids).logits.shape == (*shape, 37)


def test_a_packed_batch_without_tokens(model, device):
    none = torch.zeros(0, dtype=torch.int64, device=device)
    for sequences in (0, 2):
        batch = Batch(none, none, none, cu_seqlens_of([0] * sequences, device), 0, none, none)
        loss, count, correct, *gradients = step(model, batch)
        assert (loss.item(), count.item(), correct.item()) == (0.0, 0, 0)
        assert not any(gradient.any() for gradient in gradients)


@pytest.mark.parametrize("picked", [0, 1, 15], ids=["none", "one", "all"])
def test_labels(picked, model, device):
    """Without one the loss is 0 and so are the gradients, through both doors, where transformers gives NaN."""
    inputs, batch = padded(device), packed(device)
    batch.labels = torch.where(torch.arange(15, device=device) < picked, batch.input_ids, -100)
    batch.picks = (batch.labels != -100).nonzero()[:, 0]
    loss, count, _, *gradients = got = step(model, batch)
    assert count == picked and torch.isfinite(loss) and (loss == 0) == (picked == 0)
    assert all(torch.isfinite(gradient).all() for gradient in gradients)
    assert any(gradient.any() for gradient in gradients) == (picked > 0)
    if picked == 0:
        assert_same_bits(got, step(model, **inputs | dict(labels=torch.full_like(inputs["labels"], -100))))


def one_by_one(batch):
    """The sequences of a batch as batches of one."""
    starts, parts = batch.cu_seqlens.tolist(), []
    for start, end in zip(starts, starts[1:]):
        rows, labels = slice(start, end), batch.labels[start:end]
        parts.append(Batch(
            batch.input_ids[rows], batch.position_ids[rows], batch.token_type_ids[rows],
            cu_seqlens_of([end - start], labels.device), end - start, labels, (labels != -100).nonzero()[:, 0],
        ))  # fmt: skip
    return parts


def test_accumulated_gradients_are_those_of_one_batch(model, device):
    """Micro-batches of unequal picks, one of none: the sum is divided once, by what all of them picked."""
    batch = packed(device)
    batch.picks = torch.tensor([1, 3, 7, 8, 9, 14], device=device)
    batch.labels = torch.full_like(batch.labels, -100).index_copy(0, batch.picks, batch.input_ids[batch.picks])
    parts = one_by_one(batch)
    assert [len(part.picks) for part in parts] == [2, 0, 4]
    _, _, _, *whole = step(model, batch)
    model.zero_grad(set_to_none=True)
    accumulate(model, parts)
    largest = max(wanted.abs().max().item() for wanted in whole)
    for parameter, wanted in zip(model.parameters(), whole, strict=True):
        torch.testing.assert_close(parameter.grad, wanted, rtol=0, atol=1e-6 * largest)


# ------------------------------------------------------------------------------------------- what others get wrong


@pytest.fixture
def theirs():
    config = BertConfig(
        vocab_size=37, hidden_size=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=40,
        max_position_embeddings=80, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return BertForMaskedLM(config).eval()


def test_accumulation_in_transformers_inflates_the_gradient(theirs, tmp_path):
    """Its Trainer divides nothing and hands the models `num_items_in_batch`, which BERT's ignores: n micro-batches
    give n times the gradient of one batch. Ours give that of one batch (huggingface/transformers#47688)."""
    theirs.save_pretrained(tmp_path)
    ours = MaskedLM.from_pretrained(tmp_path)
    ids = torch.randint(1, 37, (4, 6))
    labels = torch.where(torch.arange(6) < 2, ids, -100)

    def norm(parameters):
        return torch.stack([p.grad.norm() for p in parameters if p.grad is not None]).norm().item()

    theirs(ids, labels=labels).loss.backward()
    whole = norm(theirs.parameters())
    theirs.zero_grad()
    for b in range(4):
        theirs(ids[b : b + 1], labels=labels[b : b + 1], num_items_in_batch=torch.tensor(8)).loss.backward()
    assert norm(theirs.parameters()) == pytest.approx(4 * whole, rel=1e-3)

    accumulate(ours, [pack(ids[b : b + 1], labels=labels[b : b + 1])[0] for b in range(4)])
    assert norm(ours.parameters()) == pytest.approx(whole, rel=1e-5)


def test_flattening_in_transformers_loses_segments_and_labels(theirs, tmp_path):
    """Its collator drops token_type_ids and the first label of each sequence; packing keeps both, and the model's
    scores are those of the padded batch."""
    examples = [
        {"input_ids": [3, 4, 5, 6], "token_type_ids": [0, 0, 1, 1], "labels": [3, -100, 5, -100]},
        {"input_ids": [7, 8], "token_type_ids": [0, 1], "labels": [7, -100]},
    ]
    flat = DataCollatorWithFlattening(return_tensors="pt")(examples)
    assert "token_type_ids" not in flat and flat["labels"].flatten().tolist() == [-100, -100, 5, -100, -100, -100]

    theirs.save_pretrained(tmp_path)
    ours = MaskedLM.from_pretrained(tmp_path)
    fill = lambda name, value: torch.tensor([(e[name] + [value] * 4)[:4] for e in examples])  # noqa: E731
    ids, segments, labels = fill("input_ids", 0), fill("token_type_ids", 0), fill("labels", -100)
    mask = (ids > 0).long()
    batch, _ = pack(ids, mask, segments, labels=labels)
    assert batch.token_type_ids.tolist() == [0, 0, 1, 1, 0, 1]
    assert batch.labels.tolist() == [3, -100, 5, -100, 7, -100]
    expected = theirs(ids, attention_mask=mask, token_type_ids=segments).logits[mask.bool()]
    torch.testing.assert_close(ours.logits(batch), expected, rtol=0, atol=1e-5)


def test_the_list_of_hazards_names_tests_that_exist():
    folder = Path(__file__).parent
    named = re.findall(r"`((?:\w+/)?test_\w+\.py)::(\w+)`", (folder / "README.md").read_text(encoding="utf-8"))
    assert len(named) > 50
    for file, test in named:
        assert f"def {test}(" in (folder / file).read_text(encoding="utf-8"), f"{file}::{test}"
