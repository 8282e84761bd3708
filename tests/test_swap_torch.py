"""torch.nn's modules, swapped: the same values and gradients at real places, whatever the form of the call."""

import copy
import functools
import io
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import fastbert
from fastbert import ops

D, H, FFN, S = 24, 2, 37, 7
LENGTHS = (7, 3, 5)
PADDING = torch.arange(S) >= torch.tensor(LENGTHS)[:, None]
PADDING_FORMS = {
    "bool": PADDING,
    "float": torch.zeros(PADDING.shape).masked_fill(PADDING, float("-inf")),
    "float_min": torch.zeros(PADDING.shape).masked_fill(PADDING, torch.finfo(torch.float32).min),
    "none": None,
}


def a_layer(activation="gelu", dropout=0.0, **options):
    layer = nn.TransformerEncoderLayer(D, H, FFN, dropout=dropout, activation=activation, **options)
    for p in layer.parameters():
        # torch begins with biases of 0 and norms of 1, which would hide their being left out
        nn.init.normal_(p, std=0.3)
    return layer


def an_encoder(layers=2, norm=False, dropout=0.0, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return nn.TransformerEncoder(a_layer(dropout=dropout, **options), layers, nn.LayerNorm(D) if norm else None)


def pair(module, **switches):
    """The module and its swapped copy, with the report."""
    swapped = copy.deepcopy(module)
    return module, swapped, fastbert.swap(swapped, **switches)


def results(module, call, *inputs):
    """The output of call(module, *inputs), and the gradients of all inputs and parameters for one random cotangent."""
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    module.zero_grad()
    out = call(module, *inputs)
    if torch.is_grad_enabled():
        cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        (out * cotangent.to(out.dtype)).sum().backward()
    leaves = [*inputs, *module.parameters()]
    return [out.detach(), *(torch.zeros_like(x) if x.grad is None else x.grad for x in leaves)]


def assert_equal_results(a, b, tolerance=1e-5):
    assert len(a) == len(b)
    for i, (x, y) in enumerate(zip(a, b)):
        assert x.shape == y.shape and x.dtype == y.dtype, f"result {i}: {x.shape} {x.dtype}, not {y.shape} {y.dtype}"
        assert torch.isfinite(y).all(), f"result {i} is not finite"
        error = (x - y).abs().max().item() / max(1.0, x.abs().max().item()) if x.numel() else 0.0
        assert error <= tolerance, f"result {i}: off by {error:.1e}"


def at_tokens(padding=PADDING, batch_first=True, **arguments):
    """A call of an encoder, or of a layer, whose result is that at real places."""

    def call(module, x):
        y = module(x if batch_first else x.transpose(0, 1), src_key_padding_mask=padding, **arguments)
        y = y if batch_first else y.transpose(0, 1)
        return y[~PADDING]

    return call


def no_torch_attention(monkeypatch):
    """Fails where torch's own attention runs, also that of its fast path for inference."""

    def never(*args, **kwargs):
        raise AssertionError("torch's own attention runs")

    for holder, name in (
        (torch, "_transformer_encoder_layer_fwd"),
        (torch, "_native_multi_head_attention"),
        (F, "multi_head_attention_forward"),
    ):
        monkeypatch.setattr(holder, name, never)


# ------------------------------------------------------------------------------------------------------- transformer


@pytest.mark.parametrize("mode", ["training", "evaluation", "inference"])
@pytest.mark.parametrize("padding", PADDING_FORMS)
@pytest.mark.parametrize("batch_first", [True, False], ids=["batch_first", "sequence_first"])
@pytest.mark.parametrize("norm_first", [False, True], ids=["post_norm", "pre_norm"])
@pytest.mark.parametrize("grain", ["stack", "layer"])
def test_encoder(grain, norm_first, batch_first, padding, mode, monkeypatch):
    options = dict(norm_first=norm_first, batch_first=batch_first)
    module = an_encoder(norm=norm_first, **options) if grain == "stack" else a_layer(**options)
    module, swapped, report = pair(module.train(mode == "training"))
    report.raise_if_incomplete()
    x, call = torch.randn(3, S, D), at_tokens(PADDING_FORMS[padding], batch_first)
    with torch.inference_mode(mode == "inference"):
        wanted = results(module, call, x)
        no_torch_attention(monkeypatch)
        assert_equal_results(wanted, results(swapped, call, x))


@pytest.mark.parametrize(
    "activation",
    ["gelu", "relu", nn.GELU(), nn.GELU("tanh"), functools.partial(F.gelu, approximate="tanh"), torch.tanh, nn.SiLU()],
    ids=["gelu", "relu", "nn.GELU", "nn.GELU-tanh", "partial-tanh", "torch.tanh", "nn.SiLU"],
)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
def test_activations(activation, bias):
    module, swapped, _ = pair(an_encoder(activation=activation, bias=bias, batch_first=True))
    x = torch.randn(3, S, D)
    assert_equal_results(results(module, at_tokens(), x), results(swapped, at_tokens(), x))


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("kind", ["causal", "causal_hint", "bool", "float", "per_head"])
@pytest.mark.parametrize("with_padding", [True, False], ids=["padding", "no_padding"])
@pytest.mark.parametrize("grain", ["stack", "layer"])
def test_masks_that_are_more_than_padding(grain, with_padding, kind, training):
    mask = nn.Transformer.generate_square_subsequent_mask(S)
    if kind == "bool":
        mask = mask != 0
    elif kind == "float":
        mask = torch.randn(S, S)
    elif kind == "per_head":
        mask = torch.randn(3 * H, S, S)
    padding = None if not with_padding else PADDING if kind == "bool" else PADDING_FORMS["float"]
    arguments = {"mask" if grain == "stack" else "src_mask": mask, "is_causal": kind == "causal_hint"}
    module = an_encoder(batch_first=True) if grain == "stack" else a_layer(batch_first=True)
    module, swapped, _ = pair(module.train(training))
    x = torch.randn(3, S, D)
    call = at_tokens(padding, **arguments)
    assert_equal_results(results(module, call, x), results(swapped, call, x))


@pytest.mark.parametrize("batch_first", [True, False], ids=["batch_first", "sequence_first"])
@pytest.mark.parametrize("with_padding", [True, False], ids=["padding", "no_padding"])
@pytest.mark.parametrize("grain", ["stack", "layer"])
def test_a_sequence_alone(grain, with_padding, batch_first):
    module = an_encoder(batch_first=batch_first) if grain == "stack" else a_layer(batch_first=batch_first)
    module, swapped, _ = pair(module)
    padding = PADDING[1] if with_padding else None

    def call(module, x):
        return module(x, src_key_padding_mask=padding)[: LENGTHS[1]]

    x = torch.randn(S, D)
    assert_equal_results(results(module, call, x), results(swapped, call, x))


@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
def test_nested_tensors_go_where_torch_takes_them(layout):
    module, swapped, _ = pair(an_encoder(batch_first=True).eval())
    ragged = torch.nested.nested_tensor([torch.randn(n, D) for n in LENGTHS], layout=layout)
    with torch.no_grad():
        try:
            wanted = module.layers[0](ragged)
        except Exception as error:
            with pytest.raises(type(error)):
                swapped.layers[0](ragged)
            return
        for a, b in zip(wanted.unbind(), swapped.layers[0](ragged).unbind()):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_padding_costs_nothing_and_gives_zero(monkeypatch):
    seen = []

    def recording(real):
        return lambda x, *args, **kwargs: (seen.append(x.shape), real(x, *args, **kwargs))[1]

    for name in ("linear", "linear_gelu", "layer_norm"):
        monkeypatch.setattr(ops, name, recording(getattr(ops, name)))
    for module in (an_encoder(norm=True, batch_first=True), an_encoder(), a_layer(norm_first=True, batch_first=True)):
        seen.clear()
        fastbert.swap(module)
        first = module.layers[0].self_attn.batch_first if hasattr(module, "layers") else True
        out = module(torch.randn(3, S, D) if first else torch.randn(S, 3, D), src_key_padding_mask=PADDING)
        assert out.is_contiguous() and not out[PADDING if first else PADDING.T].any()
        assert len(seen) >= 5 and {len(shape) for shape in seen} == {2}
        assert {shape[0] for shape in seen} == {sum(LENGTHS)}


def test_real_places_do_not_see_what_padding_holds():
    module, swapped, _ = pair(an_encoder(batch_first=True))
    x = torch.randn(3, S, D)
    wanted = module(x, src_key_padding_mask=PADDING)[~PADDING]
    got = swapped(x.masked_fill(PADDING[..., None], float("nan")), src_key_padding_mask=PADDING)[~PADDING]
    torch.testing.assert_close(wanted, got, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("where", ["left", "holes", "a_row_of_padding"])
def test_padding_in_other_places(where):
    padding = torch.zeros(3, S, dtype=torch.bool)
    if where == "left":
        padding[1, :3] = True
    elif where == "holes":
        padding[0, 2] = padding[2, 4:6] = True
    else:
        padding[2] = True
    module, swapped, _ = pair(an_encoder(batch_first=True))
    x = torch.randn(3, S, D)
    wanted = module(x, src_key_padding_mask=padding)[~padding]
    torch.testing.assert_close(wanted, swapped(x, src_key_padding_mask=padding)[~padding], rtol=1e-5, atol=1e-5)
    if where == "a_row_of_padding":
        assert torch.isfinite(swapped(x, src_key_padding_mask=padding)).all()


def test_masks_that_torch_refuses_are_refused():
    _, swapped, _ = pair(an_encoder(batch_first=True))
    x = torch.randn(3, S, D)
    with pytest.raises(AssertionError, match="only bool and floating"):
        swapped(x, src_key_padding_mask=PADDING.long())
    with pytest.raises((AssertionError, RuntimeError)):
        swapped(x, src_key_padding_mask=PADDING[:2])


@pytest.mark.parametrize("grain", ["stack", "layer", "attention"])
def test_a_floating_mask_that_is_no_padding(grain):
    module = {
        "stack": lambda: an_encoder(batch_first=True), "layer": lambda: a_layer(batch_first=True),
        "attention": lambda: nn.MultiheadAttention(D, H, batch_first=True),
    }[grain]()  # fmt: skip
    module, swapped, _ = pair(module)
    bias = torch.zeros(3, S).masked_fill(PADDING, float("-inf"))
    bias[:, 1] = -1.0

    def call(m, x):
        if grain == "attention":
            return m(x, x, x, key_padding_mask=bias, need_weights=False)[0][~PADDING]
        return m(x, src_key_padding_mask=bias)[~PADDING]

    x = torch.randn(3, S, D)
    assert_equal_results(results(module, call, x), results(swapped, call, x))


def test_a_learned_mask_gets_its_gradient():
    module, swapped, _ = pair(a_layer(batch_first=True))
    x = torch.randn(3, S, D)

    def call(module, x, bias):
        return module(x, src_key_padding_mask=bias)

    zeros = torch.zeros(3, S)
    assert_equal_results(results(module, call, x, zeros), results(swapped, call, x, zeros))


def test_no_unpadding_where_it_is_not_wanted(monkeypatch):
    no_torch_attention(monkeypatch)
    module = an_encoder(batch_first=True).eval()
    shapes = []
    fastbert.swap(module, unpad=False)
    real = ops.layer_norm
    monkeypatch.setattr(ops, "layer_norm", lambda x, *a, **k: (shapes.append(len(x)), real(x, *a, **k))[1])
    with torch.no_grad():
        module(torch.randn(3, S, D), src_key_padding_mask=PADDING)
    assert shapes and set(shapes) == {3 * S}


@pytest.mark.parametrize("need_weights", [False, True], ids=["no_weights", "weights"])
@pytest.mark.parametrize("batch_first", [True, False], ids=["batch_first", "sequence_first"])
@pytest.mark.parametrize("padding", PADDING_FORMS)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
def test_multihead_attention(bias, padding, batch_first, need_weights, monkeypatch):
    module, swapped, report = pair(nn.MultiheadAttention(D, H, batch_first=batch_first, bias=bias))
    report.raise_if_incomplete()
    for p in (*module.parameters(), *swapped.parameters()):
        nn.init.normal_(p, generator=torch.Generator().manual_seed(p.numel()))

    def call(module, x):
        x = x if batch_first else x.transpose(0, 1)
        y, weights = module(x, x, x, key_padding_mask=PADDING_FORMS[padding], need_weights=need_weights)
        assert (weights is None) != need_weights
        return (y if batch_first else y.transpose(0, 1))[~PADDING]

    x = torch.randn(3, S, D)
    wanted = results(module, call, x)
    if not need_weights:
        no_torch_attention(monkeypatch)
    assert_equal_results(wanted, results(swapped, call, x))


def test_other_attention_stays_as_it_was():
    module, swapped, _ = pair(nn.MultiheadAttention(D, H, batch_first=True))
    x, memory = torch.randn(3, S, D), torch.randn(3, 5, D)
    calls = [
        lambda m, x, y: m(x, y, y, need_weights=False)[0],
        lambda m, x, y: m(x, x.clone(), x, need_weights=False)[0],
        lambda m, x, y: m(x, x, x, need_weights=False, attn_mask=torch.eye(S).bool())[0],
        lambda m, x, y: m(x, x, x, need_weights=True)[1],
    ]
    for call in calls:
        assert_equal_results(results(module, call, x, memory), results(swapped, call, x, memory))
    for options, reason in (
        (dict(kdim=5), "another width"),
        (dict(add_bias_kv=True), "adds a key"),
        (dict(add_zero_attn=True), "adds a key"),
    ):
        (row,) = fastbert.swap(nn.MultiheadAttention(D, H, **options)).stayed
        assert reason in row.reason


@pytest.mark.parametrize("part", ["attention", "layer_norm", "gelu", "loss"])
def test_switches(part, monkeypatch):
    def never(*args, **kwargs):
        raise AssertionError("a part runs that is switched off")

    for other, names in (
        ("attention", ["attention"]), ("layer_norm", ["layer_norm"]), ("gelu", ["bias_gelu", "linear_gelu"]),
    ):  # fmt: skip
        for name in names:
            if other != part:
                monkeypatch.setattr(ops, name, never)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder = an_encoder(activation=nn.GELU(), norm=True, batch_first=True)
            self.loss = nn.CrossEntropyLoss()

        def forward(self, x):
            return self.loss(self.encoder(x, src_key_padding_mask=PADDING)[:, 0], torch.tensor([1, 2, -100]))

    module, swapped, report = pair(Model(), **{p: p == part for p in ("attention", "layer_norm", "gelu", "loss")})
    kinds = {row.module for row in report.swapped}
    layer = {"TransformerEncoderLayer"}
    assert kinds == {
        "attention": layer | {"TransformerEncoder", "MultiheadAttention"}, "layer_norm": layer | {"LayerNorm"},
        "gelu": layer | {"GELU"}, "loss": {"CrossEntropyLoss"},
    }[part]  # fmt: skip
    assert all("switched off" in row.reason for row in report.stayed)
    for training in (True, False):
        module.train(training), swapped.train(training)
        x = torch.randn(3, S, D)
        assert_equal_results(results(module, Model.__call__, x), results(swapped, Model.__call__, x))


def test_report_of_a_transformer():
    model = nn.Transformer(16, 2, 2, 2, 32)
    report = fastbert.swap(model, unpad=True)
    rows = {row.name: row for row in report.rows}
    assert rows["encoder"].became and rows["encoder.layers.1"].became and rows["encoder.layers.0.self_attn"].became
    for name in ("decoder", "decoder.layers.0", "decoder.layers.1"):
        assert "a decoder attends causally" in rows[name].reason
    source, target = torch.randn(6, 2, 16), torch.randn(4, 2, 16)
    model.eval()
    got = model(source, target, tgt_mask=nn.Transformer.generate_square_subsequent_mask(4))
    fastbert.unswap(model)
    wanted = model(source, target, tgt_mask=nn.Transformer.generate_square_subsequent_mask(4))
    torch.testing.assert_close(wanted, got, rtol=1e-5, atol=1e-5)


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


def test_a_block_of_ones_own_is_called():
    module, swapped, _ = pair(an_encoder(batch_first=True))
    for each in (module, swapped):
        each.layers[1]._ff_block = lambda x: x * 0.5
    x = torch.randn(3, S, D)
    assert_equal_results(results(module, at_tokens(), x), results(swapped, at_tokens(), x))


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


def test_copies_pickles_and_the_way_back():
    module, swapped, report = pair(an_encoder(norm=True, batch_first=True).eval())
    x = torch.randn(3, S, D)
    wanted = module(x, src_key_padding_mask=PADDING)[~PADDING]
    assert list(swapped.state_dict()) == list(module.state_dict())
    buffer = io.BytesIO()
    torch.save(swapped, buffer)
    buffer.seek(0)
    copies = [copy.deepcopy(swapped), pickle.loads(pickle.dumps(swapped)), torch.load(buffer, weights_only=False)]
    for each in copies:
        assert [type(m).__name__ for m in each.modules()] == [type(m).__name__ for m in module.modules()]
        assert all(isinstance(a, type(b)) for a, b in zip(each.modules(), module.modules()))
        torch.testing.assert_close(each(x, src_key_padding_mask=PADDING)[~PADDING], wanted, rtol=1e-5, atol=1e-5)
        assert len(fastbert.swap(each).swapped) == len(report.swapped)
        fastbert.unswap(each)
        assert [type(m) for m in each.modules()] == [type(m) for m in module.modules()]
        assert [vars(m).keys() for m in each.modules()] == [vars(m).keys() for m in module.modules()]
        assert torch.equal(each(x, src_key_padding_mask=PADDING)[~PADDING], wanted)


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


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


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


# ---------------------------------------------------------------------------------------------------- norms and GELU


@pytest.mark.parametrize(
    "shape, normalized, options",
    [
        ((3, 5, 37), 37, {}),
        ((3, 5, 37), (5, 37), {}),
        ((3, 5, 37), 37, dict(bias=False)),
        ((3, 5, 37), 37, dict(elementwise_affine=False)),
        ((3, 5, 37), (3, 5, 37), dict(elementwise_affine=False)),
        ((37,), 37, {}),
        ((0, 37), 37, {}),
        ((4, 0), (0,), {}),
        ((3, 37), 37, dict(eps=0.0)),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize("impl", ["cpu", "triton"])
def test_layer_norm(shape, normalized, options, dtype, impl, monkeypatch):
    module, swapped, report = pair(nn.LayerNorm(normalized, dtype=dtype, **options))
    for p in (*module.parameters(), *swapped.parameters()):
        nn.init.uniform_(p, 0.5, 1.5, generator=torch.Generator().manual_seed(3))
    report.raise_if_incomplete()
    x = torch.randn(shape, dtype=dtype)
    wanted = results(module, nn.Module.__call__, x)
    monkeypatch.setattr(ops, "IMPL", impl)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    assert_equal_results(wanted, results(swapped, nn.Module.__call__, x), tolerance)


def test_layer_norm_of_unusual_input():
    module, swapped, _ = pair(nn.LayerNorm(6))
    x = torch.randn(6, 5, 4)
    call = lambda m, x: m(x.transpose(0, 2))  # noqa: E731
    assert_equal_results(results(module, call, x), results(swapped, call, x))
    assert swapped(x.transpose(0, 2)).is_contiguous()
    with pytest.raises(RuntimeError, match="normalized_shape"):
        swapped(torch.randn(4, 12))
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype):
            for value in (x.transpose(0, 2), x.transpose(0, 2).to(dtype)):
                assert swapped(value).dtype == module(value).dtype
    ragged = torch.nested.nested_tensor([torch.randn(n, 6) for n in (2, 3)])
    assert torch.equal(module(ragged).to_padded_tensor(0), swapped(ragged).to_padded_tensor(0))
    assert "8192" in fastbert.swap(nn.LayerNorm((3, 4000))).stayed[0].reason


@pytest.mark.parametrize("shape", [(), (1,), (37,), (2, 3, 4, 5), (0, 4), (4, 0), (3, 1)], ids=str)
@pytest.mark.parametrize("approximate", ["none", "tanh"])
@pytest.mark.parametrize("impl", ["cpu", "triton"])
def test_gelu(shape, approximate, impl, monkeypatch):
    module, swapped, report = pair(nn.GELU(approximate))
    report.raise_if_incomplete()
    monkeypatch.setattr(ops, "IMPL", impl)
    x = torch.randn(shape)
    assert_equal_results(results(module, nn.Module.__call__, x), results(swapped, nn.Module.__call__, x))
    x = x.double()
    assert_equal_results(results(module, nn.Module.__call__, x), results(swapped, nn.Module.__call__, x), 1e-12)
    with torch.inference_mode():
        torch.testing.assert_close(module(x.float()), swapped(x.float()))


def test_gelu_keeps_the_memory_format():
    module, swapped, _ = pair(nn.GELU())
    x = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    assert swapped(x).stride() == module(x).stride()
    assert torch.equal(swapped(x), module(x))


# -------------------------------------------------------------------------------------------------------------- loss

V = 11


class Classifier(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(5, V)
        self.loss = nn.CrossEntropyLoss()

    def forward(self, hidden, labels):
        return self.loss(self.linear(hidden), labels)


def some_labels(*shape, ignore_index=-100):
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, V, shape, generator=generator)
    return labels.masked_fill(torch.rand(shape, generator=generator) < 0.6, ignore_index)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("shape", [(12, V), (2, V, 3, 2), (V,)], ids=str)
def test_cross_entropy(shape, reduction):
    for weighted, label_smoothing, ignore_index in ((False, 0.0, -100), (True, 0.1, 3)):
        weight = torch.rand(V) if weighted else None
        options = dict(ignore_index=ignore_index, reduction=reduction, label_smoothing=label_smoothing)
        module, swapped, report = pair(nn.CrossEntropyLoss(weight, **options))
        report.raise_if_incomplete()
        labels = torch.tensor(5)
        if len(shape) > 1:
            labels = some_labels(shape[0], *shape[2:], ignore_index=ignore_index)
            assert (labels == ignore_index).any() and not (labels == ignore_index).all()
        x, soft = torch.randn(shape), torch.softmax(torch.randn(shape), min(1, len(shape) - 1))
        # torch takes no ignore_index with probabilities
        for target in (labels, soft) if ignore_index < 0 else (labels,):
            call = lambda m, x, target=target: m(x, target)  # noqa: E731
            assert_equal_results(results(module, call, x), results(swapped, call, x))


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weighted", [False, True], ids=["", "weighted"])
@pytest.mark.parametrize("shape", [(12, V), (3, V, 4), (0, V), (V,)], ids=str)
def test_a_mean_of_no_label_is_zero(shape, weighted, label_smoothing):
    weight = torch.rand(V) if weighted else None
    module, swapped, _ = pair(nn.CrossEntropyLoss(weight, label_smoothing=label_smoothing))
    labels = torch.full((shape[0], *shape[2:]) if len(shape) > 1 else (), -100)
    out, gradient = results(swapped, lambda m, x: m(x, labels), torch.randn(shape))
    assert module(torch.randn(shape), labels).isnan()
    assert out.item() == 0 and out.shape == () and not gradient.any() and gradient.isfinite().all()
    for reduction in ("sum", "none"):
        module.reduction = swapped.reduction = reduction
        x = torch.randn(shape)
        assert torch.equal(module(x, labels), swapped(x, labels))


def test_errors_are_torchs():
    x = torch.randn(4, V)
    module, swapped, _ = pair(nn.CrossEntropyLoss(ignore_index=3))
    for labels in (
        torch.tensor([3, 3, -100, 1]), torch.zeros(3, dtype=torch.int64), torch.zeros(4, 1, dtype=torch.int64),
        torch.tensor([0, 1, V, 3]),
    ):  # fmt: skip
        with pytest.raises((ValueError, RuntimeError, IndexError)) as expected:
            module(x, labels)
        with pytest.raises(expected.type):
            swapped(x, labels)


def test_a_loss_after_a_linear_layer(fresh_compiler):
    """With labels and with none: in half precision, under autocast, copied, compiled as one graph."""
    module, swapped, _ = pair(Classifier())
    x, labels = torch.randn(12, 5), some_labels(12)

    def under_autocast(m, x, labels):
        with torch.autocast("cpu", torch.bfloat16):
            return m(x, labels)

    compiled = torch.compile(swapped, backend="eager", fullgraph=True)
    copied = pickle.loads(pickle.dumps(copy.deepcopy(swapped)))
    for wanted, own, call, tolerance in (
        (module, swapped, Classifier.__call__, 1e-5),
        (module, copied, Classifier.__call__, 1e-5),
        (module, swapped, under_autocast, 0.02),
        (module, swapped, lambda m, x, labels: compiled(x, labels) if m is swapped else m(x, labels), 1e-5),
        (copy.deepcopy(module).bfloat16(), copy.deepcopy(swapped).bfloat16(), Classifier.__call__, 0.02),
    ):
        given = x.to(wanted.linear.weight.dtype)
        a, b = (results(m, lambda m, x, call=call: call(m, x, labels), given) for m in (wanted, own))
        assert_equal_results(a, b, tolerance)
        none, *gradients = results(own, lambda m, x, call=call: call(m, x, torch.full_like(labels, -100)), given)
        assert none.item() == 0 and not any(g.any() for g in gradients)
    with torch.no_grad():
        assert torch.equal(module(x, labels), swapped(x, labels))
