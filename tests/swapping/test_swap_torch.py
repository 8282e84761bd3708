"""torch.nn's modules, swapped: the same values and gradients at real places, whatever the form of the call."""

import copy
import functools
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

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
        fastbert.swap(module, unpad=True)
        first = module.layers[0].self_attn.batch_first if hasattr(module, "layers") else True
        out = module(torch.randn(3, S, D) if first else torch.randn(S, 3, D), src_key_padding_mask=PADDING)
        assert out.is_contiguous() and not out[PADDING if first else PADDING.T].any()
        assert len(seen) >= 4 and {len(shape) for shape in seen} == {2}
        assert {shape[0] for shape in seen} == {sum(LENGTHS)}
    seen.clear()
    fastbert.swap(module, unpad=False)
    module(torch.randn(3, S, D), src_key_padding_mask=PADDING)
    # but for the keys and values
    assert [shape[0] for shape in seen].count(sum(LENGTHS)) == 1


@pytest.mark.parametrize("where", ["right", "left", "holes", "a_row_of_padding"])
def test_padding_anywhere_may_hold_anything(where):
    padding = torch.zeros(3, S, dtype=torch.bool)
    if where == "right":
        padding = PADDING
    elif where == "left":
        padding[1, :3] = True
    elif where == "holes":
        padding[0, 2] = padding[2, 4:6] = True
    else:
        padding[2] = True
    module, swapped, _ = pair(an_encoder(batch_first=True))
    x = torch.randn(3, S, D)
    wanted = module(x, src_key_padding_mask=padding)[~padding]
    filled = x.masked_fill(padding[..., None], float("nan"))
    got = swapped(filled, src_key_padding_mask=padding)
    torch.testing.assert_close(wanted, got[~padding], rtol=1e-5, atol=1e-5)
    # sequences that begin with padding keep it
    given = x if padding[:, 0].any() else filled
    assert torch.isfinite(swapped(given, src_key_padding_mask=padding)).all()


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
