"""What the benchmark of ops calls of other libraries: the form of each call, and that it computes the op.

Most of them run on GPUs only. Here a stand-in with the library's own signature takes the call, refuses what the library
would refuse, and computes it in plain PyTorch. Those that are installed and whose kernels run in Triton's interpreter
are held to the reference themselves.
"""

import contextlib
import sys
import types
from pathlib import Path

import bench_ops
import op_pages
import op_peers
import peers
import peers_cross_entropy
import pytest
import torch
import torch.nn.functional as F

from fastbert.proof import op_cases
from fastbert.proof.op_cases import Case

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
RAGGED, FULL = (3, 8, 1, 5), (8, 8)


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    monkeypatch.setattr(peers, "gpu_only", lambda *_: None)
    # what a library does that never expects another device
    monkeypatch.setattr(torch.cuda, "device", lambda *_: contextlib.nullcontext())


def stand_in(monkeypatch, path, **functions):
    """A module at `path`, and those that it stands in."""
    parts = path.split(".")
    for i in range(1, len(parts) + 1):
        module = types.ModuleType(".".join(parts[:i]))
        module.__path__ = []
        monkeypatch.setitem(sys.modules, module.__name__, module)
    vars(sys.modules[path]).update(functions)


def held_to_the_reference(op, name, lengths=RAGGED, dropout_p=0.0):
    case = Case(op, "tiny", lengths, torch.float32, dropout_p)
    arguments = case.arguments(CPU)
    run = op_peers.build(op_peers.variants(op)[name], arguments)
    if not dropout_p:
        error = op_cases.disagreement(op_cases.results(run), op_cases.truth(case, arguments, torch.float64))
        assert error < 1e-5, f"{name}: {error:.1e}"
    return run


def by_sequence(q, k, v, boundaries):
    """Attention of packed rows [T, H, K], sequence by sequence."""
    out = []
    for first, end in zip(boundaries, boundaries[1:]):
        rows = (x[first:end].transpose(0, 1) for x in (q, k, v))
        out.append(F.scaled_dot_product_attention(*rows).transpose(0, 1))
    return torch.cat(out)


@pytest.mark.parametrize("lengths", [RAGGED, FULL])
def test_flash_attention_3_and_4(monkeypatch, as_on_a_gpu, lengths):
    def third(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_q=None, seqused_k=None):
        assert q.shape == (sum(lengths), 2, 16) and cu_seqlens_q.dtype == torch.int32 and max_seqlen_k == 8
        return by_sequence(q, k, v, cu_seqlens_k.tolist())

    def fourth(q, k, v, qv=None, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None):
        assert qv is None
        return third(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k), None

    stand_in(monkeypatch, "flash_attn_interface", flash_attn_varlen_func=third)
    stand_in(monkeypatch, "flash_attn.cute", flash_attn_varlen_func=fourth)
    for name in ("flash_attn 3", "flash_attn 4"):
        held_to_the_reference("attention", name, lengths)
        with pytest.raises(peers.Unavailable, match="no dropout"):
            held_to_the_reference("attention", name, lengths, dropout_p=0.1)


@pytest.mark.parametrize("lengths", [RAGGED, FULL])
def test_xformers(monkeypatch, as_on_a_gpu, lengths):
    seen = []

    class BlockDiagonalMask(list):
        @classmethod
        def from_seqlens(cls, q_seqlen, kv_seqlen=None, *, device=None):
            assert isinstance(q_seqlen, list) and device == CPU
            return cls([0, *torch.tensor(q_seqlen).cumsum(0).tolist()])

    def memory_efficient_attention(query, key, value, attn_bias=None, p=0.0, scale=None, *, op=None):
        assert query.shape == (1, sum(lengths), 2, 16) and isinstance(attn_bias, BlockDiagonalMask)
        seen.append(p)
        return by_sequence(query[0], key[0], value[0], attn_bias)[None]

    stand_in(monkeypatch, "xformers.ops.fmha.attn_bias", BlockDiagonalMask=BlockDiagonalMask)
    sys.modules["xformers.ops"].memory_efficient_attention = memory_efficient_attention
    held_to_the_reference("attention", "xformers", lengths)
    assert set(seen) == {0.0}
    held_to_the_reference("attention", "xformers", lengths, dropout_p=0.1).forward()
    assert seen[-1] == 0.1


def test_quack_is_given_whole_eights_of_rows_and_128s_of_words(monkeypatch, as_on_a_gpu):
    def chunked_linear_cross_entropy(x, weight, target, chunk_size=4096, ignore_index=-100, reduction="mean"):
        assert len(x) % 8 == 0 and x.shape[1] % 8 == 0 and len(x) == len(target)
        assert len(weight) % 128 == 0 or len(weight) == 2 * len(x)
        return F.cross_entropy(x @ weight.T, target, ignore_index=ignore_index, reduction=reduction)

    stand_in(monkeypatch, "quack.linear_cross_entropy", chunked_linear_cross_entropy=chunked_linear_cross_entropy)
    held_to_the_reference("masked_cross_entropy", "quack", (30, 40, 5))
    # 8 queries
    held_to_the_reference("contrastive_cross_entropy", "quack", (30, 2))


def test_a_vocabulary_inwhole_64s_is_the_same_loss(as_on_a_gpu):
    seen = []

    def make(arguments):
        seen.append(arguments["weight"].shape)
        return op_cases.run_of(op_cases.TABLE["masked_cross_entropy"].plain, arguments)

    case = Case("masked_cross_entropy", "tiny", (30, 40), torch.float32)
    arguments = case.arguments(CPU)
    run = op_peers.build(peers_cross_entropy.whole_64s(make), arguments)
    assert seen == [(64, 32)]
    assert op_cases.disagreement(op_cases.results(run), op_cases.truth(case, arguments, torch.float64)) < 1e-5
    # a vocabulary that is whole already is the plain variant over again
    arguments["weight"], arguments["bias"] = torch.randn(128, 32), torch.randn(128)
    with pytest.raises(peers.NotApplicable):
        op_peers.build(peers_cross_entropy.whole_64s(make), arguments)


def test_flex_computes_no_block_that_is_padding_only(monkeypatch):
    """Neither among the keys nor among the queries: 2 * 2 and 1 * 1 of 2 * 2 blocks."""
    import torch.nn.attention.flex_attention as flex

    blocks, real = [], flex.create_block_mask
    monkeypatch.setattr(flex, "create_block_mask", lambda *a, **k: blocks.append(real(*a, **k)) or blocks[-1])
    case = Case("attention", "tiny", (256, 100), torch.float32)
    op_peers.variants("attention")["flex"](case.arguments(CPU))
    assert blocks[0].to_dense().sum((1, 2, 3)).tolist() == [4, 1]


# those whose kernels Triton's interpreter runs in fp32
INTERPRETED = [
    ("masked_cross_entropy", "liger", "liger-kernel"),
    ("masked_cross_entropy", "liger, large chunks", "liger-kernel"),
    ("contrastive_cross_entropy", "liger", "liger-kernel"),
    ("disentangled_attention", "flashdeberta", "flashdeberta"),
    ("disentangled_attention", "disentangled_flash", "disentangled-flash"),
]
PINNED = (line.strip() for line in (ROOT / "requirements-peers.txt").read_text(encoding="utf-8").splitlines())
PINNED = dict(line.split("==") for line in PINNED if "==" in line)


@pytest.mark.parametrize(("op", "name", "package"), INTERPRETED, ids=lambda x: str(x).replace(" ", "_"))
def test_those_installed(as_on_a_gpu, op, name, package):
    if op_peers.installed().get(package) != PINNED[package]:
        pytest.skip(f"{package} {PINNED[package]} is not installed: make test does that")
    for lengths in (RAGGED, FULL):
        held_to_the_reference(op, name, lengths)


def test_every_compiling_variant_is_known():
    names = {name for op in op_cases.OPS for name in op_peers.variants(op)}
    assert set(bench_ops.COMPILING) <= names


def test_a_result_names_the_versions_of_its_peers(monkeypatch):
    versions = {"xformers": "0.0.35"}

    def version(name):
        if name not in versions:
            raise op_peers.metadata.PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(op_peers.metadata, "version", version)
    assert op_peers.installed() == versions
    settings = {"ceilings": {"copy": 1, "product": 1}, "left_out": [], "peers": op_peers.installed()}
    result = {"machine": {"device": "x", "torch": "2", "triton": "3"}, "date": "", "command": "", "rows": []}
    assert "\nInstalled beside: xformers 0.0.35.\n" in op_pages.markdown(result | {"settings": settings})


def test_logits_that_are_not_widened_are_for_half_precision_alone():
    variant = op_peers.variants("masked_cross_entropy")["eager, not widened"]
    case = Case("masked_cross_entropy", "tiny", (30, 40), torch.bfloat16)
    arguments = case.arguments(CPU)
    error = op_cases.disagreement(op_cases.results(variant(arguments)), op_cases.truth(case, arguments))
    assert 1e-4 < error < bench_ops.TOLERANCE[case.dtype]
    with pytest.raises(peers.NotApplicable):
        variant(Case("masked_cross_entropy", "tiny", (30, 40), torch.float32).arguments(CPU))


def test_the_numbers_of_a_case_are_those_of_every_run():
    case = Case("layer_norm", "tiny", (3, 5), torch.float32)
    runs = [bench_ops.agreeing(case, CPU, (), compiles=False)[0]["eager"] for _ in range(2)]
    assert all(torch.equal(*pair) for pair in zip(*(run.leaves for run in runs)))
