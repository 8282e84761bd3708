"""A user's code inside a swapped model: it computes what it did, wherever it stands and whenever it came there.

The modules and hooks here mix the tokens of a text, so that a text that saw another one, or other values at padding,
would come out different.
"""

import copy
import functools

import pytest
import torch
import torch.nn.functional as F
from small import LENGTHS, D, assert_close, assert_same_gradients, batch, gradients, is_swapped, tiny
from torch import nn
from transformers.models.bert.modeling_bert import BertLayer, BertOutput, BertSelfAttention

import fastbert

# family -> a linear layer of a stack
SPOTS = {
    "Bert": "encoder.layer.0.output.dense",
    "Roberta": "encoder.layer.1.attention.output.dense",
    "XLMRoberta": "encoder.layer.0.intermediate.dense",
    "Electra": "encoder.layer.0.attention.self.value",
    "Albert": "encoder.albert_layer_groups.0.albert_layers.0.ffn_output",
    "DistilBert": "transformer.layer.0.ffn.lin2",
    "MPNet": "encoder.layer.0.output.dense",
    "Deberta": "encoder.layer.1.output.dense",
    "DebertaV2": "encoder.layer.0.attention.self.query_proj",
    "ModernBert": "layers.0.mlp.Wo",
    "Gte": "layers.0.mlp.down_proj",
    "NomicBert": "layers.1.self_attn.v_proj",
    "JinaEmbeddingsV3": "layers.0.mlp.fc2",
}


class Mixing(nn.Module):
    """A linear layer and, behind it, an LSTM along the sequence."""

    def __init__(self, inner):
        super().__init__()
        torch.manual_seed(1)
        self.inner, size = inner, inner.out_features
        self.rnn = nn.LSTM(size, size, batch_first=True, bidirectional=True)

    def forward(self, x):
        y = self.inner(x)
        return y + sum(self.rnn(y)[0].chunk(2, -1))


def mixed(x):
    """Each token and the mean of its sequence."""
    return x + x.mean(1, keepdim=True)


def mix_output(module, args, out):
    if isinstance(out, tuple):
        return (mix_output(module, args, out[0]), *out[1:])
    return mixed(out) if torch.is_tensor(out) and out.dim() == 3 else out


def put(model, name, module):
    setattr(model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2], module)


def hidden(model, **inputs):
    """Hidden states at the real places."""
    inputs = inputs or {name: x for name, x in batch().items() if name != "labels"}
    return model(**inputs)[0][inputs["attention_mask"].bool()]


def assert_unchanged(change, kind="BertModel", when=("before", "after"), training=False, **options):
    """The reports of a model swapped after and before `change`; its hidden states are those of the unswapped."""
    plain = tiny(kind, **options).train(training)
    untouched = hidden(plain)
    change(plain)
    expected = hidden(plain)
    assert (expected - untouched).abs().max() > 1e-3
    reports = []
    for moment in when:
        model = tiny(kind, **options).train(training)
        if moment == "after":
            reports.append(fastbert.swap(model))
        change(model)
        if moment == "before":
            reports.append(fastbert.swap(model))
        assert_close(hidden(model), expected)
    return reports


@pytest.mark.parametrize("family", SPOTS)
def test_a_module_that_mixes_tokens_keeps_its_shapes_and_is_named(family):
    spot = SPOTS[family]
    report, _ = assert_unchanged(lambda m: put(m, spot, Mixing(m.get_submodule(spot))), f"{family}Model")
    stack = "" if spot.startswith("layers.") else spot.partition(".")[0]
    (row,) = [row for row in report.stayed if row.name == stack]
    assert row.reason == f"keeps its padding: {spot.removeprefix(f'{stack}.')} (Mixing) may look at other tokens"
    attention = [row for row in report.rows if "Attention" in row.module and not row.became]
    assert attention and {row.reason for row in attention} == {"it needs a stack around it that runs fastbert"}
    with pytest.raises(RuntimeError, match=r"\(Mixing\) may look at other tokens"):
        report.raise_if_incomplete()
    # and the texts beside it do not matter
    model = tiny(f"{family}Model")
    put(model, spot, Mixing(model.get_submodule(spot)))
    fastbert.swap(model)
    ids = batch()["input_ids"]
    assert_close(model(ids[:1])[0], model(ids)[0][:1])


class OwnLayer(BertLayer):
    def forward(self, hidden_states, attention_mask=None, *args, **kwargs):
        seen = torch.ones_like(hidden_states[..., :1])
        if attention_mask is not None:
            seen = attention_mask[:, 0, :1].transpose(1, 2).to(hidden_states.dtype)
        return super().forward(hidden_states * seen * 0.5, attention_mask, *args, **kwargs)


class OwnAttention(BertSelfAttention):
    def forward(self, hidden_states, attention_mask=None, *args, **kwargs):
        return mixed(super().forward(hidden_states, attention_mask, *args, **kwargs)[0]), None


class OwnChunk(BertLayer):
    def feed_forward_chunk(self, attention_output):
        return mixed(super().feed_forward_chunk(attention_output))


class OwnCall(nn.Linear):
    def __call__(self, x):
        return mixed(super().__call__(x))


class OwnPart(BertOutput):
    """With a property in the place of a module."""

    @property
    def dense(self):
        return lambda x: mixed(self._modules["dense"](x))


class Folding(nn.Module):
    """A norm over all tokens of a text."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm((11, D), elementwise_affine=False)

    def forward(self, x):
        return self.norm(x)


def of_class(name, cls):
    def change(model):
        model.get_submodule(name).__class__ = cls

    return change


def with_method(name, method, function):
    def change(model):
        module = model.get_submodule(name)
        original = getattr(module, method)
        setattr(module, method, functools.wraps(original)(lambda *args, **kwargs: function(original(*args, **kwargs))))

    return change


def with_activation(activation):
    def change(model):
        del model.encoder.layer[0].intermediate.intermediate_act_fn
        model.encoder.layer[0].intermediate.intermediate_act_fn = activation

    return change


def in_a_sequence(model):
    output = model.encoder.layer[0].output
    output.dense = nn.Sequential(output.dense, Mixing(nn.Linear(D, D)))


def another_layer(make):
    """A layer of a known class where nobody gives it a mask."""

    def change(model):
        torch.manual_seed(1)
        output = model.encoder.layer[0].output
        output.dense = nn.Sequential(output.dense, make(model.config).eval())

    return change


def function_for(name):
    """A function in the place of a module."""

    def change(model):
        owner, _, name_there = name.rpartition(".")
        owner = model.get_submodule(owner)
        module = owner._modules.pop(name_there)
        setattr(owner, name_there, lambda *args, **kwargs: mix_output(None, (), module(*args, **kwargs)))

    return change


def layers_in_a_list(model):
    layers = [*model.encoder._modules.pop("layer")]
    model.encoder.layer = layers
    layers[0].register_forward_hook(mix_output)


OWN = {
    "a function for a linear": function_for("encoder.layer.0.output.dense"),
    "a function for a dropout": function_for("encoder.layer.0.output.dropout"),
    "a function for a norm": function_for("encoder.layer.1.attention.output.LayerNorm"),
    "a function for an output": function_for("encoder.layer.0.output"),
    "a function for an attention": function_for("encoder.layer.0.attention"),
    "layers in a list": layers_in_a_list,
    "another BERT layer": another_layer(BertLayer),
    "a layer of torch": another_layer(lambda _: nn.TransformerEncoderLayer(D, 4, 37, batch_first=True)),
    "a layer that reads the mask": of_class("encoder.layer.1", OwnLayer),
    "an attention": of_class("encoder.layer.0.attention.self", OwnAttention),
    "another method of a layer": of_class("encoder.layer.0", OwnChunk),
    "a property": of_class("encoder.layer.0.output", OwnPart),
    "a call": of_class("encoder.layer.0.output.dense", OwnCall),
    "a norm over all tokens": lambda model: put(model, "encoder.layer.0.output.LayerNorm", Folding()),
    "a forward on a layer": with_method("encoder.layer.0.output", "forward", mixed),
    "a forward on a linear": with_method("encoder.layer.0.attention.self.query", "forward", mixed),
    "a method on an instance": with_method("encoder.layer.0", "feed_forward_chunk", mixed),
    "a function for an activation": with_activation(lambda x: mixed(F.gelu(x))),
    "a softmax for an activation": with_activation(nn.Softmax(1)),
    "a sequence of modules": in_a_sequence,
}


@pytest.mark.parametrize("own", OWN)
def test_own_code(own):
    reports = assert_unchanged(OWN[own])
    assert "encoder" in {row.name for row in reports[0].stayed}


HOOKED = {
    "forward": lambda module: module.register_forward_hook(mix_output),
    "pre-forward": lambda module: module.register_forward_pre_hook(lambda module, args: (mixed(args[0]), *args[1:])),
    "with kwargs": lambda module: module.register_forward_hook(
        lambda module, args, kwargs, out: mix_output(module, args, out), with_kwargs=True
    ),
}


@pytest.mark.parametrize("hook", HOOKED)
@pytest.mark.parametrize(
    "name", ["attention.self", "attention.self.query", "output", "output.dropout", "output.LayerNorm", "intermediate"]
)
def test_hooks_that_mix_tokens(name, hook):
    assert_unchanged(lambda model: HOOKED[hook](model.get_submodule(f"encoder.layer.0.{name}")))


class Around(nn.Module):
    """Any module, and the mean of its sequence."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.p = inner, getattr(inner, "p", 0.0)

    def forward(self, *args, **kwargs):
        return mix_output(self, args, self.inner(*args, **kwargs))


WAYS = [
    lambda model, name: put(model, name, Around(model.get_submodule(name))),
    lambda model, name: HOOKED["forward"](model.get_submodule(name)),
    lambda model, name: with_method(name, "forward", lambda out: mix_output(None, (), out))(model),
    lambda model, name: function_for(name)(model),
]


@pytest.mark.parametrize("family", SPOTS)
def test_each_module_in_turn(family):
    kind, options = f"{family}Model", dict(conv_kernel_size=3) if family == "DebertaV2" else {}
    stack = "" if SPOTS[family].startswith("layers.") else SPOTS[family].partition(".")[0]
    modules = tiny(kind, **options).named_modules()
    names = [n for n, module in modules if n.startswith(stack) and n != stack and not isinstance(module, nn.ModuleList)]
    for i, name in enumerate(names):
        change = WAYS[i % len(WAYS)]
        plain, model = tiny(kind, **options), tiny(kind, **options)
        change(plain, name)
        try:
            expected = hidden(plain)
        except (AttributeError, RuntimeError):
            # the original reads an attribute of it, or it gets another shape
            continue
        if i % 2:
            fastbert.swap(model)
        change(model, name)
        if not i % 2:
            fastbert.swap(model)
        assert_close(hidden(model), expected)


@pytest.mark.parametrize("kind", ["BertModel", "MPNetModel", "DebertaV2Model", "ModernBertModel"])
def test_global_hooks_that_mix_tokens(kind):
    plain, model = tiny(kind), tiny(kind)
    fastbert.swap(model)
    only_dropouts = lambda module, args, out: mixed(out) if isinstance(module, nn.Dropout) and out.dim() == 3 else None  # noqa: E731
    handle = nn.modules.module.register_module_forward_hook(only_dropouts)
    try:
        got, expected = hidden(model), hidden(plain)
    finally:
        handle.remove()
    assert_close(got, expected)


def test_a_hook_that_changes_gradients():
    def change(model):
        layer = model.bert.encoder.layer[0]
        layer.intermediate.register_full_backward_hook(lambda module, dx, dout: (mixed(dx[0]),))
        layer.attention.self.value.register_full_backward_pre_hook(lambda module, dout: (mixed(dout[0]),))

    plain, model, later = tiny(), tiny(), tiny()
    fastbert.swap(later)
    for one in (plain, model, later):
        change(one)
    fastbert.swap(model)
    for one in (model, later):
        assert_same_gradients(gradients(one), gradients(plain))


def is_unpadded(shape):
    return shape[0] == sum(LENGTHS)


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_stack_runs_unpadded_again_once_its_hook_is_gone(when, shapes):
    model = tiny("BertModel")
    if when == "after":
        fastbert.swap(model)
    handle = model.encoder.layer[0].register_forward_hook(lambda *_: None)
    if when == "before":
        report = fastbert.swap(model)
        report.raise_if_incomplete()
        assert "keeps its padding while layer.0 (BertLayer) has a hook" in {row.became for row in report.rows}
    hidden(model)
    assert not any(map(is_unpadded, shapes))
    handle.remove()
    shapes.clear()
    hidden(model)
    assert len(shapes) >= 8 and all(map(is_unpadded, shapes))


class Quantised(torch.Tensor):
    """A weight that is a tensor of another class: it multiplies by its own rule, and cannot be transposed."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function in (torch.Tensor.t, torch.matmul):
            raise NotImplementedError("packed weights cannot be transposed")
        with torch._C.DisableTorchFunctionSubclass():
            if function in (F.linear, F.layer_norm):
                args = [x.as_subclass(torch.Tensor) * 0.5 if isinstance(x, cls) else x for x in args]
                return function(*args, **(kwargs or {}))
        return super().__torch_function__(function, types, args, kwargs or {})


def quantise(model):
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.LayerNorm)) and module.weight is not None:
            module.weight = nn.Parameter(module.weight.detach().as_subclass(Quantised), requires_grad=False)


# ---------------------------------------------------------------------------------------------------------- torch.nn


class Encoder(nn.Module):
    """torch's encoder, or layer, or attention, in front of a convolution that sees padding rows too."""

    def __init__(self, kind, batch_first=True):
        super().__init__()
        torch.manual_seed(0)
        self.kind, self.batch_first = kind, batch_first
        layer = nn.TransformerEncoderLayer(D, 4, 37, dropout=0.0, activation="gelu", batch_first=batch_first)
        self.stack = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.attention = nn.MultiheadAttention(D, 4, batch_first=batch_first)
        self.conv = nn.Conv1d(D, D, 3, padding=1)

    def forward(self, x, padding):
        x = x if self.batch_first else x.transpose(0, 1)
        if self.kind == "attention":
            x = self.attention(x, x, x, key_padding_mask=padding, need_weights=False)[0]
        else:
            x = self.stack(x, src_key_padding_mask=padding)
        x = x if self.batch_first else x.transpose(0, 1)
        return self.conv(x.transpose(1, 2)).transpose(1, 2) if self.kind == "attention" else x


def encoded(model, grad=True):
    mask = batch()["attention_mask"].bool()
    x = torch.randn(*mask.shape, D, generator=torch.Generator().manual_seed(3)).requires_grad_(grad)
    out = model(x, ~mask)[mask]
    if grad:
        out.square().sum().backward()
    return out.detach(), x.grad


@pytest.mark.parametrize("batch_first", [True, False])
def test_attention_by_itself_gives_padding_rows_what_torch_does(batch_first):
    plain, model = Encoder("attention", batch_first), Encoder("attention", batch_first)
    assert is_swapped(model.attention) or fastbert.swap(model).swapped
    for got, expected in zip(encoded(model), encoded(plain)):
        assert_close(got, expected)


TORCH_OWN = {
    "a module that mixes tokens": lambda m: put(m, "stack.layers.0.linear2", Mixing(m.stack.layers[0].linear2)),
    "a hook": lambda m: m.stack.layers[0].linear1.register_forward_hook(mix_output),
    "a hook on attention": lambda m: m.stack.layers[1].self_attn.register_forward_hook(mix_output),
    "a function": lambda m: setattr(m.stack.layers[0], "activation", lambda x: mixed(F.gelu(x))),
    "a block": with_method("stack.layers.1", "_ff_block", mixed),
    "another layer": lambda m: put(
        m, "stack.layers.0.linear2", nn.Sequential(m.stack.layers[0].linear2, copy.deepcopy(m.stack.layers[1]))
    ),
    "a norm at the end": lambda m: setattr(m.stack, "norm", Mixing(m.attention.out_proj)),
    "weights of another class": quantise,
}


@pytest.mark.parametrize("own", TORCH_OWN)
@pytest.mark.parametrize("when", ["before", "after"])
def test_own_code_in_torchs_encoder(own, when):
    plain, model = Encoder("stack"), Encoder("stack")
    untouched = encoded(plain)[0]
    TORCH_OWN[own](plain)
    expected = encoded(plain)
    assert (expected[0] - untouched).abs().max() > 1e-3
    if when == "after":
        fastbert.swap(model)
    TORCH_OWN[own](model)
    if when == "before":
        stayed = {row.name: row.reason for row in fastbert.swap(model).stayed}
        if own == "a module that mixes tokens":
            assert stayed["stack"] == "keeps its padding: layers.0.linear2 (Mixing) may look at other tokens"
    for got, wanted in zip(encoded(model), expected):
        assert_close(got, wanted)
