"""DeBERTa's attention: the reference against transformers' modules, the kernels against the reference."""

import threading

import pytest
import torch
from helpers import assert_same_bits, assert_within_budget, cu_seqlens_of
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastbert import ops, reference
from fastbert.kernels import _bands
from fastbert.kernels import disentangled_attention as kernels
from fastbert.kernels.disentangled_attention import disentangled_attention

# of the modules of transformers
H, K = 2, 8
D = H * K


def theirs_v1(lengths, types, max_relative_positions, **_):
    """transformers' module of DeBERTa v1, and the arguments after q, k, v that mean the same."""
    from transformers import DebertaConfig
    from transformers.models.deberta.modeling_deberta import DisentangledSelfAttention

    config = DebertaConfig(
        hidden_size=D, num_attention_heads=H, pos_att_type=types, relative_attention=True,
        max_relative_positions=max_relative_positions, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return DisentangledSelfAttention(config)


def theirs_v2(lengths, types, max_relative_positions, position_buckets, share_att_key):
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


@pytest.mark.parametrize("types", [["c2p", "p2c"], ["c2p"], ["p2c"]], ids="-".join)
@pytest.mark.parametrize(
    "version, options",
    [
        ("v1", dict(max_relative_positions=512)),
        ("v1", dict(max_relative_positions=9)),
        ("v2", dict(max_relative_positions=64, position_buckets=-1, share_att_key=False)),
        ("v2", dict(max_relative_positions=512, position_buckets=256, share_att_key=True)),
        ("v2", dict(max_relative_positions=40, position_buckets=8, share_att_key=True)),
        ("v2", dict(max_relative_positions=30, position_buckets=16, share_att_key=False)),
    ],
    ids=["v1", "v1-clamped", "v2-no-buckets", "v3", "log buckets", "log buckets, clamped"],
)
def test_transformers_gives_the_same(version, options, types):
    """Values and the gradients of all parameters, of x and of the position embeddings, on a padded batch."""
    lengths = [1, 17, 50, 133] if options["max_relative_positions"] < 512 else [40, 3]
    module = {"v1": theirs_v1, "v2": theirs_v2}[version](lengths, types, **options)
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
            cu_seqlens = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
            out = reference.disentangled_attention(
                *projected(module, *leaves), cu_seqlens, S, position_buckets=buckets,
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


@pytest.mark.parametrize("buckets", [4, 8, 32, 50, 256])
@pytest.mark.parametrize("max_relative_positions", [30, 128, 512, 1024])
def test_buckets_are_those_of_transformers(buckets, max_relative_positions):
    from transformers.models.deberta_v2.modeling_deberta_v2 import build_relative_position

    if max_relative_positions <= buckets:
        pytest.skip("fewer positions than buckets")
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("terms", ["c2p p2c", "c2p", "p2c", "neither"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_values_and_gradients(dtype, terms, dropout_p, seed, device, poison):
    """One tile and several, sequences of no and of one token, buckets that collide and clamp: 41 > 2 * 8."""
    assert_kernel_within_budget(
        *arguments([41, 0, 1, 17], 16, device, dtype, 2, terms=terms),
        dropout_p=dropout_p,
        seed=seed,
        offset=3,
        **BUCKETS,
    )


@pytest.mark.parametrize("K", [8, 13, 64, 128])
def test_head_sizes(K, device, poison):
    assert_kernel_within_budget(*arguments([21, 5], K, device, span=32), **PLAIN)


@pytest.mark.parametrize("lengths", [[64, 65], [127, 2], [33, 31, 32], [15, 16, 17]], ids=str)
def test_lengths_at_the_edges_of_tiles(lengths, seed, device, poison):
    """In half precision, whose tiles are larger; from 32 tokens on they are of 64."""
    args = arguments(lengths, 16, device, torch.float16, span=16)
    assert_kernel_within_budget(
        *args, position_buckets=16, max_relative_positions=100, dropout_p=0.1, seed=seed, scale=0.3
    )


def test_more_distances_than_the_table_has(device, poison):
    """Without buckets, all far distances share the first and the last row."""
    assert_kernel_within_budget(*arguments([50], 16, device, span=3), position_buckets=-1, max_relative_positions=3)


def test_max_seqlen_longer_than_any_sequence(device, poison):
    *args, _ = arguments([5, 9], 16, device)
    assert_kernel_within_budget(*args, 70, **BUCKETS)


@pytest.mark.parametrize("form", ["kv together", "three", "rows and heads swapped", "every second element"])
def test_forms_and_strides(form, device):
    T, H, K = 17, 2, 16
    tables = torch.randn(2, 16, H, K, device=device).unbind(0)
    if form == "kv together":
        operands = torch.randn(T, H, K, device=device), torch.randn(T, 2, H, K, device=device), None
    elif form == "three":
        operands = torch.randn(3, T, H, K, device=device).unbind(0)
    elif form == "rows and heads swapped":
        operands = torch.randn(3, H, T, K, device=device).transpose(1, 2).unbind(0)
        tables = torch.randn(2, H, 16, K, device=device).transpose(1, 2).unbind(0)
    else:
        operands = torch.randn(3, T, H, 2 * K, device=device)[..., ::2].unbind(0)
        tables = torch.randn(2, 32, H, 2 * K, device=device)[:, ::2, :, ::2].unbind(0)
    assert_kernel_within_budget(*operands, *tables, cu_seqlens_of([5, 0, 12], device), 12, **BUCKETS)


@pytest.mark.parametrize("layout", ["expanded", "transposed", "every second element"])
def test_strides_of_the_incoming_gradient(layout, device):
    args = arguments([6, 9], 16, device)
    leaves = [x.requires_grad_() for x in args if torch.is_tensor(x) and x.is_floating_point()]
    dout = {
        "expanded": torch.randn(1, 1, 1, device=device).expand(15, 1, 16),
        "transposed": torch.randn(1, 15, 16, device=device).transpose(0, 1),
        "every second element": torch.randn(15, 1, 32, device=device)[..., ::2],
    }[layout]
    out = disentangled_attention(*args, **BUCKETS)
    got = torch.autograd.grad(out, leaves, dout, retain_graph=True)
    assert_same_bits(got, torch.autograd.grad(out, leaves, dout.contiguous()))


def test_rows_past_the_last_sequence(seed, device, poison):
    """They hold NaN, give 0, get a gradient of 0, and change nothing elsewhere, the tables' gradients included."""
    lengths, slack = [7, 0, 21], 40
    qkv, _, _, *tables, cu_seqlens, longest = arguments(lengths, 16, device)
    full = torch.cat((qkv, torch.full((slack, 3, 1, 16), float("nan"), device=device)))
    dout = torch.randn(28 + slack, 1, 16, device=device)
    dout[28:] = float("nan")

    def run(qkv, dout):
        leaves = [x.detach().requires_grad_() for x in (qkv, *tables)]
        q, *both = leaves
        out = disentangled_attention(q, None, None, *both, cu_seqlens, longest, dropout_p=0.3, seed=seed, **BUCKETS)
        return out, *torch.autograd.grad(out, leaves, dout)

    (out, dqkv, *dtables), (expected, *wanted) = run(full, dout), run(qkv, dout[:28])
    assert_same_bits((out[:28], dqkv[:28], *dtables), (expected, *wanted))
    for x in out, dqkv:
        assert torch.equal(x[28:], torch.zeros_like(x[28:]))


def test_other_sequences_do_not_leak(device):
    """A sequence of NaN harms itself only, and the tables' gradients."""
    qkv, *rest = arguments([5, 6, 7], 16, device)
    qkv[5:11] = float("nan")
    qkv.requires_grad_()
    out = disentangled_attention(qkv, *rest, **BUCKETS)
    out.backward(torch.ones_like(out))
    for x in out, qkv.grad:
        assert torch.isfinite(x[:5]).all() and torch.isfinite(x[11:]).all() and x[5:11].isnan().any()


@pytest.mark.parametrize("T, B", [(0, 0), (0, 2), (3, 0), (3, 2)])
def test_no_sequences_or_only_empty_ones(T, B, device, poison):
    qkv = torch.randn(T, 3, 2, 16, device=device, requires_grad=True)
    tables = [torch.randn(16, 2, 16, device=device, requires_grad=True) for _ in range(2)]
    cu_seqlens = torch.zeros(B + 1, dtype=torch.int32, device=device)
    out = disentangled_attention(qkv, None, None, *tables, cu_seqlens, 0, **BUCKETS)
    out.sum().backward()
    for x, shape in ((out, (T, 2, 16)), (qkv.grad, (T, 3, 2, 16)), *((x.grad, (16, 2, 16)) for x in tables)):
        assert torch.equal(x, torch.zeros(shape, device=device))


def test_large_scores_in_half_precision(device):
    """Scores of thousands: the maximum is taken out, so nothing overflows."""
    qkv, *rest = arguments([16, 30], 16, device, torch.float16)
    qkv[:, :2] *= 30
    assert_kernel_within_budget(qkv, *rest, **BUCKETS)


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
    """Triton's interpreter cuts bfloat16 off instead of rounding it, so this allows two of its steps, 2 ** -8 each."""
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


def test_same_bits_twice_and_new_masks_by_seed_and_offset(seed, device):
    qkv, *rest = arguments([18, 5], 16, device)
    leaves = [x.requires_grad_() for x in (qkv, *rest[2:4])]

    def run(seed, offset, dropout_p=0.5):
        out = disentangled_attention(qkv, *rest, dropout_p=dropout_p, seed=seed, offset=offset, **BUCKETS)
        return out, *torch.autograd.grad(out.square().sum(), leaves)

    once = run(seed, 1)
    assert_same_bits(once, run(seed, 1))
    assert not torch.equal(once[0], run(seed, 2)[0])
    assert not torch.equal(once[0], run(seed + 1, 1)[0])


@pytest.mark.parametrize("frozen", [(), (3,), (4,), (3, 4)], ids=str)
def test_tables_that_want_no_gradient(frozen, device, poison):
    """With none that does, the kernels of the tables are not launched; with one, its gradient is the same."""
    args = list(arguments([9, 4], 16, device))
    for i in (0, 3, 4):
        args[i] = args[i].detach().requires_grad_(i not in frozen)
    out = disentangled_attention(*args, **BUCKETS)
    wanted = reference.disentangled_attention(*args, **BUCKETS)
    leaves = [args[i] for i in (0, 3, 4) if i not in frozen]
    for got, want in zip(*(torch.autograd.grad(x.square().sum(), leaves) for x in (out, wanted)), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_one_tensor_as_both_tables(device):
    """As share_att_key may give: its gradient is the sum of both."""
    qkv, _, _, table, _, *rest = arguments([9, 14], 16, device)
    assert_within_budget(
        lambda qkv, table: disentangled_attention(qkv, None, None, table, table, *rest, **BUCKETS),
        lambda qkv, table: reference.disentangled_attention(qkv, None, None, table, table, *rest, **BUCKETS),
        qkv, table,
    )  # fmt: skip


def test_many_groups_and_few(device, monkeypatch, poison):
    """However many programs share the sequences for the tables' gradients."""
    for multiprocessors in 1, 3, 100:
        monkeypatch.setattr(kernels, "multiprocessors", lambda n=multiprocessors: n)
        assert_kernel_within_budget(*arguments([7, 18, 3, 9, 20], 16, device), **BUCKETS)


@pytest.mark.parametrize("buckets, furthest", [(0, 40), (-1, 5), (8, 40), (32, 512)])
def test_the_kernels_look_up_the_same_rows(buckets, furthest):
    index = _bands._distance_rows(300, buckets, furthest)
    assert torch.equal(index.long(), reference.relative_index(301, buckets, furthest))


class Calls(TorchDispatchMode):
    """The functions that were called, and the devices of the tensors that they were given and that they returned."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        tensors = [x for x in tree_leaves((args, kwargs, result)) if isinstance(x, torch.Tensor)]
        self.calls.append((function.name(), {x.device.type for x in tensors}))
        return result


TABLES = [
    (_bands._distance_rows, (640, 256, 512)),
    (_bands._distance_rows, (256, 0, 40)),
    (_bands._bounds, (512, 64, 512, 256, 512)),
    (_bands._bounds, (64, 32, 64, 32, 512)),
]


@pytest.mark.parametrize("make, sizes", TABLES)
def test_tables_are_made_inside_a_cuda_graph(make, sizes, monkeypatch):
    """Without a copy from the host, equal to those outside, and not kept: their memory is the graph's."""
    monkeypatch.setattr(_bands, "_tables", {})
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    full, cat = torch.full, torch.cat
    # "cuda" is the meta device here
    with monkeypatch.context() as patch:
        patch.setattr(torch, "full", lambda *a, device, **k: full(*a, device="meta", **k))
        with Calls() as seen:
            made = _bands._table(torch.device("cuda", 0), make, *sizes)
    assert made.device.type == "meta" and (made.shape, made.dtype) == (make(*sizes).shape, torch.int32)
    assert not [call for call in seen.calls if len(call[1]) > 1]
    assert ("aten::cat", {"meta"}) in seen.calls and not _bands._tables
    # the same with its numbers
    with monkeypatch.context() as patch:
        patch.setattr(torch, "full", lambda *a, device, **k: full(*a, **k))
        assert torch.equal(_bands._table(torch.device("cuda", 0), make, *sizes), make(*sizes))
    # one that is there serves the graph
    outside = _bands._tables[make, sizes, torch.device("cuda", 0)] = cat([make(*sizes)])
    assert _bands._table(torch.device("cuda", 0), make, *sizes) is outside


@pytest.mark.parametrize("make, sizes", TABLES)
def test_tables_are_made_once_by_another_thread(make, sizes, monkeypatch):
    """One whose memory is not taken from the pool of a graph that this thread is about to record."""
    monkeypatch.setattr(_bands, "_tables", {})
    threads, to = [], torch.Tensor.to
    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "to", lambda *a: (threads.append(threading.get_ident()), to(*a))[1])
        made = _bands._table(torch.device("meta"), make, *sizes)
    assert made.device.type == "meta" and made.shape == make(*sizes).shape
    assert threads and threads[-1] != threading.get_ident()
    assert _bands._table(torch.device("meta"), make, *sizes) is made
    assert torch.equal(_bands._table(torch.device("cpu"), make, *sizes), make(*sizes))


@pytest.mark.parametrize("form", ["q, kv", "q, k, v", "no table"])
def test_operators(form, seed, device):
    """Schema, fake implementation, no aliases, and tracing, by PyTorch's own checks."""
    q, k, v = {
        "q, kv": (torch.randn(15, 1, 16, device=device), torch.randn(15, 2, 1, 16, device=device), None),
        "q, k, v": tuple(torch.randn(3, 15, 1, 16, device=device)),
    }.get(form, (torch.randn(15, 3, 1, 16, device=device), None, None))
    tables = (None, None) if form == "no table" else tuple(torch.randn(2, 16, 1, 16, device=device))
    rest = (cu_seqlens_of([5, 0, 9], device), 9, 8, 40, 0.25, 0.1, seed, 7)
    torch.library.opcheck(torch.ops.fastbert.disentangled_attention_fwd, (q, k, v, *tables, *rest))
    out, lse = kernels.disentangled_attention_fwd(q, k, v, *tables, *rest)
    for wants_tables in True, False:
        torch.library.opcheck(
            torch.ops.fastbert.disentangled_attention_bwd,
            (torch.randn_like(out), q, k, v, *tables, out, lse, *rest, wants_tables),
        )


def test_no_second_derivative(device):
    qkv, *rest = arguments([5], 16, device)
    out = disentangled_attention(qkv.requires_grad_(), *rest, **BUCKETS)
    (grad,) = torch.autograd.grad(out.square().sum(), qkv, create_graph=True)
    with pytest.raises(RuntimeError, match="disentangled_attention has no second derivative"):
        grad.sum().backward()


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
def test_what_the_kernels_do_not_take(dtype, K, error, device):
    with pytest.raises(error):
        disentangled_attention(*arguments([4], K, device, dtype), **BUCKETS)
