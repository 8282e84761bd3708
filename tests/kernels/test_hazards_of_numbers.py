"""What goes wrong with dropout, extreme numbers and launch settings, shown not to go wrong here.

tests/README.md has the list of hazards.
"""

import os
import subprocess
import sys

import pytest
import torch
from calls import CALLS, is_floating
from helpers import IMPLEMENTATIONS, PLAIN, assert_within_budget, cu_seqlens_of
from test_hazards import check, same

from fastbert import ops, reference
from fastbert.cpu import dropout
from fastbert.kernels import _launch

# numpy warns about elements that are not stored, and about the infinities under test
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
# one call for each set of kernels
KERNELS = [n for n in CALLS if n.partition("-")[2] in ("", "tiled") and n != "biased_attention"]
with_kernels = pytest.mark.parametrize("name", KERNELS)
with_dropout = pytest.mark.parametrize("name", [n for n in KERNELS if CALLS[n].arguments("cpu").get("dropout_p")])
fp32_and_fp16 = pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])


@with_dropout
def test_dropout_of_nothing_and_of_everything(name, device):
    """A probability too small to drop anything gives the bits of no dropout, and 1 results within the budget."""
    call = CALLS[name]
    arguments = call.arguments(device)
    none = call.run(arguments | dict(dropout_p=0.0))
    same(call.run(arguments | dict(dropout_p=1e-7)), none)
    check(call, arguments | dict(dropout_p=1.0))


@with_dropout
def test_impossible_dropout_is_refused(name, device):
    """Without a seed, or with a number that is no probability: dropout is never left out silently."""
    call = CALLS[name]
    arguments = call.arguments(device)
    for impl in IMPLEMENTATIONS:
        for wrong in (dict(seed=None), dict(dropout_p=-0.1), dict(dropout_p=1.5), dict(dropout_p=float("nan"))):
            with pytest.raises(ValueError, match="dropout_p"):
                call(arguments | wrong, impl)


@with_dropout
def test_seed_and_offset_are_the_mask(name, device):
    """Equal ones give the same bits, others another mask; every bit of a seed counts."""
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
    """The share kept at each probability, over 160,000 draws: the Kolmogorov-Smirnov distance is below 0.01."""
    row = torch.arange(400, device=device)
    seed = torch.tensor([77], device=device)
    for draw in (dropout.keep_mask, dropout.attention_keep_mask):
        for p in [i / 8 for i in range(1, 8)]:
            kept = draw(row, torch.zeros_like(row), 400, seed, 0, p).double().mean().item()
            assert abs(kept - (1 - p)) < 0.01
            assert abs(kept - (1 - p)) < 4 * (p * (1 - p) / 160000) ** 0.5


def test_keep_rate_of_an_op(device):
    """Within four standard deviations, over the 40,000 elements of an output."""
    p, T, D = 0.1, 400, 100
    ids = torch.zeros(T, dtype=torch.int64, device=device)
    tables = [torch.randn(1, D, device=device) for _ in range(3)]
    weight, bias = torch.ones(D, device=device), torch.full((D,), 100.0, device=device)
    seed = torch.tensor([3], device=device)
    y = ops.embedding(ids, ids, ids, *tables, weight, bias, dropout_p=p, seed=seed, impl="triton")
    kept = (y != 0).double().mean().item()
    assert abs(kept - 0.9) < 4 * (p * (1 - p) / (T * D)) ** 0.5


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
        # rows without a spread are divided by sqrt(eps) alone: 1 / sqrt(1e-12) magnifies any error a million times, and
        # fp16 cannot hold the gradient of denormals
        x = torch.cat((x[3:5], x[6:]))
    residual = torch.zeros_like(x)

    def op(impl):
        return lambda x, weight, bias, residual: ops.layer_norm(x, weight, bias, residual=residual, eps=eps, impl=impl)

    assert_within_budget(op("triton"), op("reference"), x, weight, bias, residual)


@pytest.mark.parametrize("mean", [1e2, 1e4, 1e6])
def test_layer_norm_of_a_large_mean(mean, device):
    """Against float64 on the same fp32 numbers: no more digits are lost than the numbers themselves have lost."""
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
def test_pooling_near_the_limits_of_half_precision(options, device):
    """Sums and squares that fp16 cannot hold, and means that it can."""
    hidden = torch.randn(11, 37, device=device) + torch.linspace(-6e4, 6e4, 37, device=device)
    lengths = cu_seqlens_of([3, 0, 6], device)
    check(CALLS["pooling"], dict(hidden=hidden.half(), cu_seqlens=lengths) | options)


def test_variants_differ(device):
    """erf and tanh give different results, and another name is refused."""
    x, zero = torch.linspace(-4, 4, 64, device=device).view(8, 8), torch.zeros(8, device=device)
    outs = [ops.bias_gelu(x, zero, approximate=a, impl="triton") for a in ("none", "tanh")]
    assert 1e-4 < (outs[0] - outs[1]).abs().max().item() < 1e-3
    for out, a in zip(outs, ("none", "tanh")):
        torch.testing.assert_close(out, torch.nn.functional.gelu(x, approximate=a), rtol=1e-6, atol=1e-6)
    for name in ("bias_gelu", "gelu_layer_norm"):
        with pytest.raises(ValueError, match="approximate='sigmoid'"):
            CALLS[name](CALLS[name].arguments(device) | dict(approximate="sigmoid"))


@pytest.mark.parametrize("tiled", [False, True], ids=["short", "tiled"])
def test_attention_scores_near_the_limits_of_half_precision(tiled, device):
    """Scores of 60,000 and -60,000 in fp16, where a mask added to them would overflow: values and gradients."""
    q = torch.zeros(9, 1, 16, dtype=torch.float16, device=device)
    kv = torch.randn(9, 2, 1, 16, dtype=torch.float16, device=device)
    q[:, 0, 0] = 250.0
    kv[:, 0, 0, 0] = torch.tensor([240.0, -240, 239, 1, 0, 0.01, -240, 240, -240])
    q[5] = 0.0
    lengths = cu_seqlens_of([5, 0, 4], device)
    arguments = dict(q=q, k=kv, v=None, cu_seqlens=lengths, max_seqlen=130 if tiled else 5, scale=1.0)
    check(CALLS["attention-some_rows"], arguments)
    # every score far below zero: keys that do not exist would win with a score of 0
    kv[:, 0, 0, 0] = -240.0
    check(CALLS["attention-some_rows"], arguments)


@pytest.mark.parametrize("size", [1e-30, 1e-20, 1e4])
def test_attention_of_tiny_and_huge_values(size, device):
    """The result scales with v; tiny q and k give all keys the same weight."""
    qkv = torch.randn(9, 3, 2, 16, device=device)
    qkv[:, 2] *= size
    lengths = cu_seqlens_of([4, 5], device)
    out = ops.attention(qkv, None, None, lengths, 5, impl="triton")
    truth = reference.attention(qkv.double(), None, None, lengths, 5)
    assert (out - truth).abs().max().item() <= 3e-6 * size
    qkv[:, :2] *= 1e-30
    out = ops.attention(qkv, None, None, lengths, 5, impl="triton")
    torch.testing.assert_close(out[:4], qkv[:4, 2].mean(0).expand(4, 2, 16), rtol=1e-5, atol=1e-6 * size)


def _losses_by_row(impl):
    def losses(hidden, weight, bias, labels):
        rows = range(len(hidden))
        parts = [
            ops.masked_cross_entropy(hidden[m : m + 1], weight, bias, labels[m : m + 1], impl=impl)[0] for m in rows
        ]
        return torch.stack(parts)

    return losses


@pytest.mark.parametrize("impl", ["triton", PLAIN])
@fp32_and_fp16
def test_cross_entropy_of_large_logits(dtype, impl, device):
    """Logits of 10,000 and -10,000: exact in fp16, and far beyond what exp takes."""
    hidden = torch.zeros(4, 8, dtype=dtype, device=device)
    hidden[:, 0] = torch.tensor([100.0, -100, 1, 0])
    weight = torch.zeros(19, 8, dtype=dtype, device=device)
    weight[:, 0] = torch.linspace(-100, 100, 19).round()
    labels = torch.tensor([18, 18, 3, 0], device=device)
    bias = torch.randint(-4, 5, (19,), device=device).to(dtype)
    assert_within_budget(_losses_by_row(impl), _losses_by_row("reference"), hidden, weight, bias, labels)


@pytest.mark.parametrize("symmetric", [False, True])
def test_contrastive_cross_entropy_of_large_scores(symmetric, device):
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


@pytest.mark.parametrize("picked", [0, 1, 7], ids=["none", "one", "all"])
def test_cross_entropy_of_picks(picked, device):
    arguments = CALLS["masked_cross_entropy"].arguments(device)
    arguments["labels"] = torch.arange(7, device=device).masked_fill(torch.arange(7, device=device) >= picked, -100)
    (loss, count, _), gradients = CALLS["masked_cross_entropy"].run(arguments)
    assert count == picked and (loss == 0) == (picked == 0)
    assert not gradients["hidden"][picked:].any()
    if picked == 0:
        assert not any(gradient.any() for gradient in gradients.values())
    for impl in ("triton", PLAIN):
        check(CALLS["masked_cross_entropy"], arguments, impl)


@pytest.mark.parametrize("name", ["layer_norm", "gelu_layer_norm", "embedding", "pooling"])
def test_rows_wider_than_a_program_holds(name, device):
    """They are refused in a line that says how many columns there are."""
    call = CALLS[name]
    arguments = call.arguments(device)
    wide = {n: x.new_zeros(*x.shape[:-1], 8193) for n, x in arguments.items() if is_floating(x)}
    with pytest.raises(ValueError, match="8193 columns: the kernels take at most 8192"):
        call(arguments | wide)


@pytest.fixture
def settings(monkeypatch):
    """An empty profile, with the search switched on."""
    profile = {}
    monkeypatch.setattr(_launch, "AUTOTUNE", True)
    monkeypatch.setattr(_launch, "profile_of", lambda device: profile)
    monkeypatch.setattr(_launch, "timings", {})
    return profile


@pytest.mark.skipif(
    torch.cuda.is_available(), reason="replaces the clock: tests/kernels/test_gpu.py searches on the device"
)
@with_kernels
def test_tuning_does_not_change_results(name, device, settings, monkeypatch):
    """The first call, which times the default and another candidate on buffers that some kernels change, gives the bits
    of the second, which times nothing."""
    tried, fastest = [], _launch.fastest

    def of_two(run, kernel, key, candidates, overwrites):
        return fastest(run, kernel, key, [candidates[0], candidates[-1]], overwrites)

    def the_last_is_fastest(run):
        run()
        tried.append(1)
        return 1.0 / 2 ** len(tried)

    monkeypatch.setattr(_launch, "fastest", of_two)
    monkeypatch.setattr(_launch, "microseconds", the_last_is_fastest)
    call = CALLS[name]
    arguments = call.arguments(device)
    searching = call.run(arguments)
    count = len(tried)
    same(call.run(arguments), searching)
    assert len(tried) == count and bool(count) == bool(settings)


@with_kernels
def test_every_candidate_is_right(name, device, settings, monkeypatch):
    """Each on its own, so that a wrong one cannot hide behind a faster one."""
    call = CALLS[name]
    arguments = call.arguments(device)
    monkeypatch.setattr(_launch, "AUTOTUNE", False)
    default = call.run(arguments)
    monkeypatch.setattr(_launch, "AUTOTUNE", True)
    seen = {}

    def forced(run, kernel, key, candidates, overwrites):
        # candidates that differ only in what the interpreter ignores are one
        blocks = [{k: v for k, v in c.items() if not k.startswith(("num_", "maxnreg"))} for c in candidates]
        different = [c for i, c in enumerate(candidates) if blocks[i] not in blocks[:i]]
        seen[kernel, key] = len(different)
        return different[min(number, len(different) - 1)]

    monkeypatch.setattr(_launch, "fastest", forced)
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
    """Four of them share a cache: each gets the whole kernel, and nothing half-written is left for a fifth."""
    (tmp_path / "toy.py").write_text(TOY)
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path / "cache"), "PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True)
    assert done.stdout.split() == ["5", "1", "{0}"], done.stderr
    assert len(list((tmp_path / "cache").rglob("toy.cubin"))) == 1
    assert not list((tmp_path / "cache").rglob("tmp.*"))
