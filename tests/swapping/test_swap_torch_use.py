"""What people do with a swapped encoder of torch.nn: reports, hooks, copies, dropout, compilers."""

import copy

import pytest
import torch
from test_swap_torch import FFN, PADDING, D, S, a_layer, an_encoder, assert_equal_results, at_tokens, pair, results
from torch import nn
from torch.utils.checkpoint import checkpoint

import fastbert
from fastbert import ops


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


@pytest.mark.parametrize(
    "name", ["linear1", "linear2", "norm1", "norm2", "self_attn", "dropout2", "dropout1", "activation"]
)
@pytest.mark.parametrize("grain", ["stack", "layer"])
def test_whatever_stands_in_a_part_is_called(grain, name):
    """Adapters, quantised layers, norms of one's own."""
    replaced = {
        "linear1": lambda: Doubled(D, FFN), "linear2": lambda: Doubled(FFN, D), "norm1": lambda: nn.RMSNorm(D),
        "norm2": lambda: nn.LayerNorm((S, D) if grain == "layer" else D, elementwise_affine=False),
        "self_attn": OwnAttention, "dropout1": LessForLater, "dropout2": lambda: nn.Hardtanh(-0.1, 0.1),
        "activation": nn.Tanh,
    }  # fmt: skip
    module = an_encoder(batch_first=True) if grain == "stack" else a_layer(batch_first=True)
    with_padding = grain == "stack"
    for when in ("before", "after"):
        module, swapped, _ = pair(module)
        part = replaced[name]()
        for each in (module, swapped):
            for layer in getattr(each, "layers", [each]):
                setattr(layer, name, copy.deepcopy(part))
        if when == "before":
            fastbert.swap(swapped)
        call = at_tokens(PADDING if with_padding else None)
        x = torch.randn(3, S, D)
        assert_equal_results(results(module, call, x), results(swapped, call, x))


class LessForLater(nn.Module):
    """Looks at which sequence of the batch it is, as stochastic depth does."""

    def forward(self, x):
        return x / torch.arange(1, len(x) + 1)[:, None, None]


class OwnAttention(nn.Module):
    batch_first = True

    def __init__(self):
        super().__init__()
        self.out = nn.Linear(D, D)

    def forward(self, q, k, v, attn_mask=None, key_padding_mask=None, need_weights=True, is_causal=False):
        assert q is k and attn_mask is None and (key_padding_mask is None or key_padding_mask.is_floating_point())
        weights = torch.ones(q.shape[:2]) if key_padding_mask is None else key_padding_mask.exp()
        return self.out((weights[..., None] * v).sum(1, keepdim=True) - q), None


@pytest.mark.parametrize("name", ["layers.0", "layers.1.norm1", "layers.0.linear1", "layers.0.self_attn", "norm"])
def test_hooks_inside_see_what_they_saw(name):
    module, swapped, _ = pair(an_encoder(norm=True, norm_first=True, batch_first=True))
    seen = []
    for each in (module, swapped):
        each.get_submodule(name).register_forward_hook(
            lambda m, args, out: seen.append((args[0], out[0] if isinstance(out, tuple) else out))
        )
    x = torch.randn(3, S, D)
    assert_equal_results(results(module, at_tokens(), x), results(swapped, at_tokens(), x))
    for a, b in zip(*seen):
        assert a.shape == b.shape == (3, S, a.shape[-1])
        torch.testing.assert_close(a[~PADDING], b[~PADDING], rtol=1e-5, atol=1e-5)


def test_hooks_of_the_stack_itself_leave_the_padding_out():
    module, swapped, _ = pair(an_encoder(batch_first=True))
    for each in (module, swapped):
        each.register_forward_hook(lambda m, args, out: out * 2)
    x = torch.randn(3, S, D)
    assert_equal_results(results(module, at_tokens(), x), results(swapped, at_tokens(), x))


@pytest.mark.parametrize("norm_first", [False, True], ids=["post_norm", "pre_norm"])
def test_dropout_is_replayed_and_as_frequent(norm_first):
    module = an_encoder(layers=1, batch_first=True, dropout=0.25, norm_first=norm_first)
    module, swapped, _ = pair(module)
    x, call = torch.randn(3, S, D), at_tokens()

    def seeded(module, seed):
        torch.manual_seed(seed)
        return results(module, call, x)

    first, again, other = seeded(swapped, 1), seeded(swapped, 1), seeded(swapped, 2)
    assert all(torch.equal(a, b) for a, b in zip(first, again))
    assert not torch.allclose(first[0], other[0], atol=1e-3)
    with torch.no_grad():
        samples = [torch.stack([call(each, x) for _ in range(200)]) for each in (module, swapped)]
    (mean, spread), (own_mean, own_spread) = ((s.mean(0), s.std(0)) for s in samples)
    # the error of a mean of 200
    assert (mean - own_mean).abs().max() < 6 * spread.max() * (2 / 200) ** 0.5
    assert (spread / own_spread).mean().item() == pytest.approx(1, abs=0.03)


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non_reentrant"])
def test_activation_checkpointing(reentrant):
    encoder = an_encoder(batch_first=True, dropout=0.25)
    fastbert.swap(encoder)

    def plain(module, x):
        for layer in module.layers:
            x = layer(x, src_key_padding_mask=PADDING)
        return x

    def checkpointed(module, x):
        for layer in module.layers:
            x = checkpoint(layer, x, None, PADDING, use_reentrant=reentrant)
        return x

    x, got = torch.randn(3, S, D), []
    for call in (plain, checkpointed):
        torch.manual_seed(5)
        got.append(results(encoder, call, x))
    assert_equal_results(*got, tolerance=1e-6)


def test_the_kernels(monkeypatch):
    """All of it in Triton's interpreter."""
    module, swapped, _ = pair(an_encoder(norm=True, activation=nn.GELU("tanh"), batch_first=False))
    x, call = torch.randn(3, S, D), at_tokens(batch_first=False)
    wanted = results(module, call, x)
    monkeypatch.setattr(ops, "IMPL", "triton")
    assert_equal_results(wanted, results(swapped, call, x))
    # the kernels would round these
    assert_equal_results(
        results(module.double(), call, x.double()), results(swapped.double(), call, x.double()), tolerance=1e-12
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_and_autocast(dtype):
    module, swapped, _ = pair(an_encoder(norm=True, batch_first=True))
    x = torch.randn(3, S, D)

    def under_autocast(module, x):
        with torch.autocast("cpu", dtype):
            return at_tokens()(module, x)

    assert_equal_results(results(module, under_autocast, x), results(swapped, under_autocast, x), tolerance=0.05)
    module.to(dtype), swapped.to(dtype)
    assert_equal_results(
        results(module, at_tokens(), x.to(dtype)), results(swapped, at_tokens(), x.to(dtype)), tolerance=0.05
    )


@pytest.mark.parametrize("fullgraph", [False, True], ids=["graph_breaks", "fullgraph"])
def test_torch_compile(fullgraph, fresh_compiler):
    module, swapped, _ = pair(an_encoder(layers=1, activation=nn.GELU(), norm=True, batch_first=True))
    compiled = torch.compile(swapped, backend="eager", fullgraph=fullgraph)
    # sequences of one length, which are traced in a fraction of the time
    padding = (torch.arange(S) >= 4).expand(2, S)
    call = lambda m, x: m(x, src_key_padding_mask=padding)[:, :4]  # noqa: E731
    x = torch.randn(2, S, D)
    assert_equal_results(results(module, call, x), results(swapped, lambda _, x: call(compiled, x), x))


def test_torch_func(monkeypatch):
    monkeypatch.setattr(ops, "IMPL", "triton")
    module, swapped, _ = pair(an_encoder(layers=1, batch_first=True))
    x = torch.randn(3, S, D)

    def loss(parameters, module, x):
        return torch.func.functional_call(module, parameters, (x,)).square().sum()

    a, b = (torch.func.grad(loss)(dict(m.named_parameters()), m, x) for m in (module, swapped))
    assert_equal_results(list(a.values()), list(b.values()))
