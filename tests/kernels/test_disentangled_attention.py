"""DeBERTa's attention: the reference against transformers' modules, the kernels against the reference."""

import threading

import pytest
import torch
from helpers import Recorder, assert_within_budget, cu_seqlens_of
from torch.utils._pytree import tree_leaves

from fastbert import ops, reference
from fastbert.kernels import _bands
from fastbert.kernels import disentangled_attention as kernels
from fastbert.kernels.disentangled_attention import disentangled_attention

# the sizes of transformers' modules
H, K = 2, 8
D = H * K


def theirs_v1(types, max_relative_positions):
    """transformers' module of DeBERTa v1."""
    from transformers import DebertaConfig
    from transformers.models.deberta.modeling_deberta import DisentangledSelfAttention

    config = DebertaConfig(
        hidden_size=D, num_attention_heads=H, pos_att_type=types, relative_attention=True,
        max_relative_positions=max_relative_positions, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return DisentangledSelfAttention(config)


def theirs_v2(types, max_relative_positions, position_buckets, share_att_key):
    from transformers import DebertaV2Config
    from transformers.models.deberta_v2.modeling_deberta_v2 import DisentangledSelfAttention

    config = DebertaV2Config(
        hidden_size=D, num_attention_heads=H, pos_att_type=types, relative_attention=True,
        max_relative_positions=max_relative_positions, position_buckets=position_buckets, share_att_key=share_att_key,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return DisentangledSelfAttention(config)


def projected(module, x, embeddings):
    """q, k, v [T, H, K] of packed x [T, D], and both tables [2 * span, H, K], by a module's own parameters."""
    if hasattr(module, "in_proj"):
        q, k, v = module.in_proj(x).unflatten(-1, (H, 3 * K)).chunk(3, -1)
        q, v = q + module.q_bias.view(H, K), v + module.v_bias.view(H, K)
        project_key, project_query = getattr(module, "pos_proj", None), getattr(module, "pos_q_proj", None)
    else:
        q, k, v = (f(x).unflatten(-1, (H, K)) for f in (module.query_proj, module.key_proj, module.value_proj))
        project_key, project_query = getattr(module, "pos_key_proj", None), getattr(module, "pos_query_proj", None)
        if module.share_att_key:
            project_key, project_query = module.key_proj, module.query_proj
    project_key = project_key if "c2p" in module.pos_att_type else None
    project_query = project_query if "p2c" in module.pos_att_type else None
    tables = [f and f(embeddings).unflatten(-1, (H, K)) for f in (project_key, project_query)]
    return q, k, v, *tables


V1_CLAMPED = ("v1", dict(max_relative_positions=9))
LOG_BUCKETS = ("v2", dict(max_relative_positions=40, position_buckets=8, share_att_key=True))


@pytest.mark.parametrize(
    "version, options, types",
    [
        ("v1", dict(max_relative_positions=512), ["c2p", "p2c"]),
        *((*V1_CLAMPED, types) for types in (["c2p", "p2c"], ["c2p"], ["p2c"])),
        ("v2", dict(max_relative_positions=64, position_buckets=-1, share_att_key=False), ["c2p", "p2c"]),
        ("v2", dict(max_relative_positions=512, position_buckets=256, share_att_key=True), ["c2p", "p2c"]),
        *((*LOG_BUCKETS, types) for types in (["c2p", "p2c"], ["c2p"], ["p2c"])),
        ("v2", dict(max_relative_positions=30, position_buckets=16, share_att_key=False), ["c2p", "p2c"]),
    ],
    ids=str,
)
def test_transformers_gives_the_same(version, options, types):
    """Values and the gradients of all parameters, of x and of the position embeddings, on a padded batch."""
    lengths = [1, 17, 50, 133] if options["max_relative_positions"] < 512 else [40, 3]
    module = {"v1": theirs_v1, "v2": theirs_v2}[version](types, **options)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    buckets = options.get("position_buckets", 0)
    span = buckets if buckets > 0 else options["max_relative_positions"]
    B, S = len(lengths), max(lengths)
    is_token = torch.arange(S) < torch.tensor(lengths)[:, None]
    x, embeddings = torch.randn(sum(lengths), D), torch.randn(2 * span, D)
    dout = torch.randn(sum(lengths), D)

    def run(ours):
        leaves = [x.clone().requires_grad_(), embeddings.clone().requires_grad_()]
        if ours:
            out = reference.disentangled_attention(
                *projected(module, *leaves), cu_seqlens_of(lengths, "cpu"), S, position_buckets=buckets,
                max_relative_positions=options["max_relative_positions"],
            ).flatten(1)  # fmt: skip
        else:
            padded = torch.zeros(B, S, D).masked_scatter(is_token[..., None], leaves[0])
            mask = (is_token[:, None, :] & is_token[:, :, None])[:, None]
            positions = relative_positions(module, S)
            out = module(padded, mask, relative_pos=positions, rel_embeddings=leaves[1])[0][is_token]
        parameters = list(module.parameters())
        grads = torch.autograd.grad(out, leaves + parameters, dout, allow_unused=True)
        return out, *(torch.zeros_like(p) if g is None else g for p, g in zip(leaves + parameters, grads))

    for got, want in zip(run(True), run(False), strict=True):
        assert (got - want).abs().max() <= 1e-5 * max(1.0, want.abs().max().item())


def relative_positions(module, S):
    """What transformers' encoders hand to every layer."""
    if hasattr(module, "in_proj"):
        from transformers.models.deberta.modeling_deberta import build_relative_position

        return build_relative_position(torch.empty(S, 1), torch.empty(S, 1))
    from transformers.models.deberta_v2.modeling_deberta_v2 import build_relative_position

    return build_relative_position(
        torch.empty(S, 1), torch.empty(S, 1), module.position_buckets, module.max_relative_positions
    )


@pytest.mark.parametrize(
    "buckets, max_relative_positions", [(4, 30), (8, 1024), (32, 128), (50, 512), (256, 512), (256, 1024)]
)
def test_buckets_are_those_of_transformers(buckets, max_relative_positions):
    from transformers.models.deberta_v2.modeling_deberta_v2 import build_relative_position

    S = 700
    table = torch.empty(S, 1)
    want = build_relative_position(table, table, buckets, max_relative_positions)[0] + buckets
    got = reference.relative_index(S, buckets, max_relative_positions)
    positions = torch.arange(S)
    assert torch.equal(got[positions[:, None] - positions + S - 1], want.clamp(0, 2 * buckets - 1))


@pytest.fixture
def seed(device):
    return torch.tensor([2**40 + 5], device=device)


BUCKETS = dict(position_buckets=8, max_relative_positions=40)
PLAIN = dict(position_buckets=0, max_relative_positions=32)


def arguments(lengths, K, device, dtype=torch.float32, heads=1, span=8, terms="c2p p2c", slack=0, scale=1.0):
    """q [T, 3, H, K], None, None, both tables, cu_seqlens, max_seqlen."""
    qkv = scale * torch.randn(sum(lengths) + slack, 3, heads, K, device=device, dtype=dtype)
    tables = (torch.randn(2 * span, heads, K, device=device, dtype=dtype) for _ in range(2))
    tables = [x if term in terms else None for term, x in zip(("c2p", "p2c"), tables)]
    return qkv, None, None, *tables, cu_seqlens_of(lengths, device), max(lengths)


def assert_kernel_within_budget(*args, **options):
    assert_within_budget(disentangled_attention, reference.disentangled_attention, *args, **options)


@pytest.mark.parametrize(
    "dtype, terms, dropout_p",
    [
        (torch.float32, "c2p p2c", 0.3),
        (torch.float16, "c2p p2c", 0.0),
        (torch.float16, "c2p", 0.3),
        (torch.float32, "p2c", 0.0),
        (torch.float32, "neither", 0.3),
    ],
    ids=str,
)
def test_values_and_gradients(dtype, terms, dropout_p, seed, device, poison):
    """One tile and two, sequences of no and of one token, distances that share a bucket or are clamped: 31 > 2 * 8."""
    assert_kernel_within_budget(
        *arguments([31, 0, 1, 17], 16, device, dtype, 2, terms=terms),
        dropout_p=dropout_p, seed=seed, offset=3, **BUCKETS,
    )  # fmt: skip


@pytest.mark.parametrize("K", [13, 128])
def test_head_sizes(K, device, poison):
    assert_kernel_within_budget(*arguments([21, 5], K, device, span=32), **PLAIN)


@pytest.mark.parametrize("lengths", [[64, 65], [127, 2], [31, 32, 33]], ids=str)
def test_lengths_at_the_edges_of_tiles(lengths, seed, device, poison):
    """In half precision, whose tiles are larger: 64 rows above 32 tokens."""
    args = arguments(lengths, 16, device, torch.float16, span=16)
    assert_kernel_within_budget(
        *args, position_buckets=16, max_relative_positions=100, dropout_p=0.1, seed=seed, scale=0.3
    )


def test_more_distances_than_the_table_has(device, poison):
    """Without buckets, all far distances share the first and the last row."""
    assert_kernel_within_budget(*arguments([20], 16, device, span=3), position_buckets=-1, max_relative_positions=3)


def test_max_seqlen_longer_than_any_sequence(device, poison):
    *args, _ = arguments([5, 9], 16, device)
    assert_kernel_within_budget(*args, 40, **BUCKETS)


@pytest.mark.parametrize("form", ["kv together", "rows and heads swapped"])
def test_forms_and_strides(form, device):
    T, H, K = 17, 2, 16
    if form == "kv together":
        operands = torch.randn(T, H, K, device=device), torch.randn(T, 2, H, K, device=device), None
        tables = torch.randn(2, 16, H, K, device=device).unbind(0)
    else:
        operands = torch.randn(3, H, T, K, device=device).transpose(1, 2).unbind(0)
        tables = torch.randn(2, H, 16, K, device=device).transpose(1, 2).unbind(0)
    assert_kernel_within_budget(*operands, *tables, cu_seqlens_of([5, 0, 12], device), 12, **BUCKETS)


def test_large_scores(device):
    """The same in fp32. No budget by the plain error here: scores have lost digits, so probabilities carry a relative
    error of the largest score times 2 ** -24, and whether one row shows it is luck. One such step of the largest
    gradient is allowed: where all probabilities are 0 or 1 the tables' gradients are sums that cancel."""
    qkv, *rest = arguments([16, 30], 16, device)
    qkv[:, :2] *= 30

    def run(function, dtype):
        fresh = [x.detach().to(dtype) if torch.is_tensor(x) and x.is_floating_point() else x for x in (qkv, *rest)]
        leaves = [x.requires_grad_() for x in fresh if torch.is_tensor(x) and x.is_floating_point()]
        out = function(*fresh, **BUCKETS)
        return out, *torch.autograd.grad(out, leaves, dout.to(dtype))

    dout = torch.randn(46, 1, 16, device=device)
    score = torch.einsum("ihk,jhk->hij", qkv[:, 0], qkv[:, 1]).abs().max().item() / 48**0.5
    assert score > 2000
    got, want = run(disentangled_attention, torch.float32), run(reference.disentangled_attention, torch.float64)
    largest = max(w.abs().max() for w in want)
    for g, w in zip(got, want, strict=True):
        assert (g.double() - w).abs().max() <= score * 2**-24 * largest


def test_bfloat16(device):
    """Triton's interpreter truncates to bfloat16 instead of rounding, so the error may be two steps of 2 ** -8."""
    args = arguments([16, 35], 16, device, torch.bfloat16)

    def run(function, dtype):
        fresh = [x.detach().to(dtype) if torch.is_tensor(x) and x.is_floating_point() else x for x in args]
        leaves = [x.requires_grad_() for x in fresh if torch.is_tensor(x) and x.is_floating_point()]
        out = function(*fresh, **BUCKETS)
        return out, *torch.autograd.grad(out.double().square().sum(), leaves)

    for got, want in zip(
        run(disentangled_attention, torch.bfloat16), run(reference.disentangled_attention, torch.float64), strict=True
    ):
        assert (got.double() - want).abs().max() <= 2**-6 * want.abs().max()


@pytest.mark.parametrize("frozen", [(3,), (4,), (3, 4)], ids=str)
def test_tables_that_want_no_gradient(frozen, device, poison):
    """If neither does, their kernels are not launched; if one does, its gradient is the same."""
    args = list(arguments([9, 4], 16, device))
    for i in (0, 3, 4):
        args[i] = args[i].detach().requires_grad_(i not in frozen)
    out = disentangled_attention(*args, **BUCKETS)
    wanted = reference.disentangled_attention(*args, **BUCKETS)
    leaves = [args[i] for i in (0, 3, 4) if i not in frozen]
    for got, want in zip(*(torch.autograd.grad(x.square().sum(), leaves) for x in (out, wanted)), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_one_tensor_as_both_tables(device):
    """As with share_att_key: its gradient is the sum of both."""
    qkv, _, _, table, _, *rest = arguments([9, 14], 16, device)
    assert_within_budget(
        lambda qkv, table: disentangled_attention(qkv, None, None, table, table, *rest, **BUCKETS),
        lambda qkv, table: reference.disentangled_attention(qkv, None, None, table, table, *rest, **BUCKETS),
        qkv, table,
    )  # fmt: skip


def test_many_groups_and_few(device, monkeypatch, poison):
    """However many groups of programs share the sequences for the tables' gradients: two, or one for each sequence."""
    for multiprocessors in 2, 100:
        monkeypatch.setattr(kernels, "multiprocessors", lambda n=multiprocessors: n)
        assert_kernel_within_budget(*arguments([7, 17, 3, 9, 5], 16, device), **BUCKETS)


@pytest.mark.parametrize("buckets, furthest", [(0, 40), (-1, 5), (8, 40), (32, 512)])
def test_the_kernels_look_up_the_same_rows(buckets, furthest):
    index = _bands.distance_rows(300, buckets, furthest)
    assert torch.equal(index.long(), reference.relative_index(301, buckets, furthest))


TABLES = [
    (_bands.distance_rows, (640, 256, 512)),
    (_bands.row_bounds, (64, 32, 64, 32, 512)),
]


@pytest.mark.parametrize("make, sizes", TABLES)
def test_tables_are_made_inside_a_cuda_graph(make, sizes, monkeypatch):
    """They are not copied from the host, equal those made outside, and are not cached: their memory is the graph's."""
    monkeypatch.setattr(_bands, "TABLES", {})
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    full, cat = torch.full, torch.cat
    # "cuda" is the meta device here
    with monkeypatch.context() as patch:
        patch.setattr(torch, "full", lambda *a, device, **k: full(*a, device="meta", **k))
        with Recorder("aten") as seen:
            made = _bands.device_table(torch.device("cuda", 0), make, *sizes)
    assert made.device.type == "meta" and (made.shape, made.dtype) == (make(*sizes).shape, torch.int32)
    for function, *values in seen.calls:
        tensors = [x for x in tree_leaves(values) if isinstance(x, torch.Tensor)]
        assert len({x.device for x in tensors}) <= 1, function
    assert "aten::cat" in {function.name() for function, *_ in seen.calls} and not _bands.TABLES
    # again, with real numbers
    with monkeypatch.context() as patch:
        patch.setattr(torch, "full", lambda *a, device, **k: full(*a, **k))
        assert torch.equal(_bands.device_table(torch.device("cuda", 0), make, *sizes), make(*sizes))
    # a cached one serves the graph
    outside = _bands.TABLES[make, sizes, torch.device("cuda", 0)] = cat([make(*sizes)])
    assert _bands.device_table(torch.device("cuda", 0), make, *sizes) is outside


@pytest.mark.parametrize("make, sizes", TABLES)
def test_tables_are_made_once_by_another_thread(make, sizes, monkeypatch):
    """So their memory does not come from the pool of a graph that this thread is about to record."""
    monkeypatch.setattr(_bands, "TABLES", {})
    threads, to = [], torch.Tensor.to
    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "to", lambda *a: (threads.append(threading.get_ident()), to(*a))[1])
        made = _bands.device_table(torch.device("meta"), make, *sizes)
    assert made.device.type == "meta" and made.shape == make(*sizes).shape
    assert threads and threads[-1] != threading.get_ident()
    assert _bands.device_table(torch.device("meta"), make, *sizes) is made
    assert torch.equal(_bands.device_table(torch.device("cpu"), make, *sizes), make(*sizes))


@pytest.mark.parametrize("form", ["q, kv", "no table"])
def test_results_of_the_operators(form, seed, device):
    """The fakes and the schema fit where tensors are absent, and where the tables want no gradient."""
    q, k, v = torch.randn(15, 3, 1, 16, device=device), None, None
    tables = (None, None)
    if form == "q, kv":
        q, k = q[:, 0].contiguous(), q[:, 1:].contiguous()
        tables = tuple(torch.randn(2, 16, 1, 16, device=device))
    rest = (cu_seqlens_of([5, 0, 9], device), 9, 8, 40, 0.25, 0.1, seed, 7)
    checks = dict(test_utils=("test_schema", "test_faketensor"))
    torch.library.opcheck(torch.ops.fastbert.disentangled_attention_fwd, (q, k, v, *tables, *rest), **checks)
    out, lse = kernels.disentangled_attention_fwd(q, k, v, *tables, *rest)
    for wants_tables in True, False:
        given = (torch.randn_like(out), q, k, v, *tables, out, lse, *rest, wants_tables)
        torch.library.opcheck(torch.ops.fastbert.disentangled_attention_bwd, given, **checks)


@pytest.mark.parametrize("impl", ["triton", "reference"])
@pytest.mark.parametrize(
    "change, words",
    [
        (dict(scale=0.0), "scale is 0.0"),
        (dict(dropout_p=0.1), "seed is None"),
        (dict(position_buckets=1), "position_buckets is 1"),
        (dict(max_relative_positions=5), "max_relative_positions 5"),
        (dict(max_relative_positions=0), "max_relative_positions is 0"),
        (dict(position_buckets=0), r"expected \(80, 1, 16\)"),
        (dict(pos_query=torch.zeros(16, 1, 8)), r"pos_query has shape \(16, 1, 8\)"),
        (dict(k=torch.zeros(4, 1, 16)), "expected q"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_bad_arguments(change, words, impl, device):
    names = ("q", "k", "v", "pos_key", "pos_query", "cu_seqlens", "max_seqlen")
    named = dict(zip(names, arguments([4], 16, device))) | BUCKETS | change
    with pytest.raises(ValueError, match=words):
        ops.disentangled_attention(**named, impl=impl)


@pytest.mark.parametrize("dtype, K, error", [(torch.float64, 16, TypeError), (torch.float32, 136, ValueError)])
def test_unsupported_operands(dtype, K, error, device):
    with pytest.raises(error):
        disentangled_attention(*arguments([4], K, device, dtype), **BUCKETS)
