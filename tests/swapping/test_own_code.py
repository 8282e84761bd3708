"""A user's code inside a swapped model: it computes what it did, wherever it stands and whenever it came there.

The modules and hooks here mix the tokens of a text, so that a text that saw another one, or other values at padding,
would come out different.
"""

import functools

import pytest
import torch
import torch.nn.functional as F
import transformers
from small import LENGTHS, D, assert_close, assert_same_gradients, batch, gradients, is_swapped, tiny
from torch import nn
from transformers.models.bert.modeling_bert import BertLayer, BertSelfAttention

import fastbert
from fastbert import ops

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
    return (mixed(out[0]), *out[1:]) if isinstance(out, tuple) else mixed(out)


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
    stack = "" if family == "ModernBert" else spot.partition(".")[0]
    (row,) = [row for row in report.stayed if row.name == stack]
    assert row.reason == f"keeps its padding: {spot.removeprefix(f'{stack}.')} (Mixing) may look at other tokens"
    attention = [row for row in report.rows if "Attention" in row.module and not row.became]
    assert attention and {row.reason for row in attention} == {"no stack around it runs unpadded"}
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


OWN = {
    "a layer that reads the mask": of_class("encoder.layer.1", OwnLayer),
    "an attention": of_class("encoder.layer.0.attention.self", OwnAttention),
    "another method of a layer": of_class("encoder.layer.0", OwnChunk),
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


@pytest.fixture
def shapes(monkeypatch):
    """The shapes of what ops.layer_norm gets."""
    seen, layer_norm = [], ops.layer_norm
    monkeypatch.setattr(
        ops, "layer_norm", lambda x, *args, **kwargs: seen.append(x.shape) or layer_norm(x, *args, **kwargs)
    )
    return seen


def is_unpadded(shape):
    return shape[0] == sum(LENGTHS)


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_stack_runs_unpadded_again_once_its_hook_is_gone(when, shapes):
    model = tiny("BertModel")
    if when == "after":
        fastbert.swap(model)
    handle = model.encoder.layer[0].register_forward_hook(lambda *_: None)
    if when == "before":
        fastbert.swap(model).raise_if_incomplete()
    hidden(model)
    assert not any(map(is_unpadded, shapes))
    handle.remove()
    hidden(model)
    assert sum(map(is_unpadded, shapes)) == 4


# ------------------------------------------------------------------------------------------- tables, dropouts, heads


def bend(module):
    module.register_forward_hook(lambda module, args, out: out * out.sigmoid())


class Scaled(nn.Embedding):
    def forward(self, ids):
        return super().forward(ids) * 0.5


def scaled_table(model):
    model.encoder.relative_attention_bias.__class__ = Scaled


def capped_table(model):
    model.encoder.relative_attention_bias.max_norm = 0.1


@pytest.mark.parametrize("change", [lambda m: bend(m.encoder.relative_attention_bias), scaled_table, capped_table],
                         ids=["hook", "class", "max_norm"])  # fmt: skip
def test_the_table_of_distances_is_called(change):
    # sharper, so that the bias shows
    def louder(model):
        with torch.no_grad():
            model.encoder.relative_attention_bias.weight.mul_(20)
        change(model)

    assert_unchanged(louder, "MPNetModel")


class Always(nn.Module):
    """A dropout that is no dropout, in evaluation too. It has a probability, as those have."""

    p = 0.0

    def forward(self, x):
        return x * 0.5


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("kind", "name"),
    [("BertModel", "encoder.layer.0.output.dropout"), ("DistilBertModel", "transformer.layer.0.ffn.dropout"),
     ("AlbertModel", "encoder.albert_layer_groups.0.albert_layers.0.attention.output_dropout"),
     ("MPNetModel", "encoder.layer.0.attention.attn.dropout"), ("MPNetModel", "encoder.layer.0.attention.dropout"),
     ("DebertaModel", "encoder.layer.0.attention.self.dropout"),
     ("DebertaV2Model", "encoder.layer.0.attention.self.dropout"), ("ModernBertModel", "layers.0.mlp.drop"),
     ("DebertaV2Model", "encoder.layer.0.attention.self.pos_dropout"), ("ModernBertModel", "layers.0.attn.out_drop")],
)  # fmt: skip
def test_dropouts_replaced_or_hooked(kind, name, training):
    assert_unchanged(lambda model: put(model, name, Always()), kind, training=training)
    if name != "layers.0.attn.out_drop" or training:
        assert_unchanged(lambda model: bend(model.get_submodule(name)), kind, training=training)


def test_the_dropout_of_attention_follows_its_module_as_in_the_original():
    model = tiny("BertModel", attention_probs_dropout_prob=0.5).train()
    fastbert.swap(model)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.eval()
    assert not torch.equal(hidden(model), hidden(model))


HEADS = {
    "BertForMaskedLM": ["cls", "cls.predictions", "cls.predictions.transform", "cls.predictions.transform.dense",
                        "cls.predictions.decoder"],
    "RobertaForMaskedLM": ["lm_head", "lm_head.dense", "lm_head.layer_norm", "lm_head.decoder"],
    "AlbertForMaskedLM": ["predictions", "predictions.activation", "predictions.LayerNorm", "predictions.decoder"],
    "DistilBertForMaskedLM": ["vocab_transform", "activation", "vocab_layer_norm", "vocab_projector"],
    "ElectraForMaskedLM": ["generator_predictions", "generator_lm_head"],
    "MPNetForMaskedLM": ["lm_head", "lm_head.decoder"],
    "DebertaV2ForMaskedLM": ["cls", "cls.predictions.transform.transform_act_fn"],
    "ModernBertForMaskedLM": ["head", "head.act", "decoder"],
}  # fmt: skip


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, names in HEADS.items() for name in names])
def test_hooks_on_heads(kind, name, training):
    plain = tiny(kind).train(training)
    before = plain(**batch()).loss
    bend(plain.get_submodule(name))
    expected = gradients(plain)
    assert abs(plain(**batch()).loss - before) > 1e-4
    for when in ("before", "after"):
        model = tiny(kind).train(training)
        if when == "after":
            fastbert.swap(model)
        bend(model.get_submodule(name))
        if when == "before":
            fastbert.swap(model)
        assert_close(model(**batch()).loss, plain(**batch()).loss)
        assert_same_gradients(gradients(model), expected)


class OwnHead(nn.Module):
    """With the parts of the head it replaces, and more."""

    def __init__(self, head):
        super().__init__()
        self.predictions = head.predictions

    def forward(self, x):
        return self.predictions(x) * 0.5


def own_cls(model):
    model.cls = OwnHead(model.cls)


def own_loss(model):
    model.loss_function = lambda logits, labels, **kwargs: F.cross_entropy(logits[0], labels[0], label_smoothing=0.3)


def own_loss_module(model):
    model.mlm_loss_fct = nn.CrossEntropyLoss(label_smoothing=0.3)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("kind", "change"),
    [("BertForMaskedLM", own_cls), ("ModernBertForMaskedLM", own_loss), ("DistilBertForMaskedLM", own_loss_module)],
)
def test_heads_and_losses_of_ones_own(kind, change, training):
    plain = tiny(kind).train(training)
    before = plain(**batch()).loss
    change(plain)
    assert abs(plain(**batch()).loss - before) > 1e-4
    for when in ("before", "after"):
        model = tiny(kind).train(training)
        if when == "after":
            fastbert.swap(model)
        change(model)
        if when == "before":
            fastbert.swap(model)
        assert_close(model(**batch()).loss, plain(**batch()).loss)
        assert_same_gradients(gradients(model), gradients(plain))


# ------------------------------------------------------------------------------------------------------- parameters


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


@pytest.mark.parametrize("kind", ["BertModel", "AlbertModel", "DistilBertModel", "MPNetModel", "ModernBertModel"])
def test_weights_of_another_tensor_class(kind):
    assert_unchanged(quantise, kind)


def test_adapters_chosen_per_text(shapes):
    peft = pytest.importorskip("peft")

    def adapted(swaps):
        model = peft.get_peft_model(tiny(), peft.LoraConfig(target_modules=["query", "dense"], r=2), adapter_name="a")
        model.add_adapter("b", peft.LoraConfig(target_modules=["query", "dense"], r=3))
        torch.manual_seed(2)
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                nn.init.normal_(parameter, std=0.2)
        if swaps:
            fastbert.swap(model)
        return model.eval()

    plain, model = adapted(False), adapted(True)
    for names in (["a", "b", "__base__"], ["b", "b", "a"]):
        chosen = dict(adapter_names=names)
        assert_close(model(**batch(), **chosen).loss, plain(**batch(), **chosen).loss)
    assert not any(map(is_unpadded, shapes))
    # one adapter for all texts runs unpadded
    assert_close(model(**batch()).loss, plain(**batch()).loss)
    assert any(map(is_unpadded, shapes))


@pytest.mark.parametrize("when", ["before", "after"])
def test_lora_on_the_table_of_distances(when):
    peft = pytest.importorskip("peft")

    def adapted(model):
        model = peft.get_peft_model(model, peft.LoraConfig(target_modules=["relative_attention_bias", "q"], r=2))
        torch.manual_seed(2)
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                nn.init.normal_(parameter)
        return model.eval()

    plain, model = adapted(tiny("MPNetModel")), tiny("MPNetModel")
    if when == "after":
        fastbert.swap(model)
    model = adapted(model)
    if when == "before":
        fastbert.swap(model)
    assert_close(hidden(model), hidden(plain))


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


# ------------------------------------------------------------------------------------------------------ other clients


def test_a_row_of_padding_pools_what_it_did():
    inputs = {name: x for name, x in batch().items() if name != "labels"}
    inputs["attention_mask"][1] = 0
    for kind in ("BertModel", "AlbertModel", "MPNetModel"):
        plain, model = tiny(kind), tiny(kind)
        fastbert.swap(model)
        assert_close(model(**inputs).pooler_output, plain(**inputs).pooler_output)


def test_torch_func_on_a_swapped_model():
    plain, model = tiny("BertForSequenceClassification"), tiny("BertForSequenceClassification")
    fastbert.swap(model)
    ids = batch()["input_ids"]

    def per_text(model):
        parameters = {name: p.detach() for name, p in model.named_parameters()}

        def loss(parameters, ids):
            return torch.func.functional_call(model, parameters, (ids[None],)).logits.square().sum()

        return torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, ids)

    assert_same_gradients(per_text(model), per_text(plain), tolerance=1e-3)


@pytest.mark.parametrize("kind", ["RobertaForMaskedLM", "XLMRobertaForMaskedLM", "BertForMaskedLM"])
def test_flattened_batches_as_the_collator_makes_them(kind):
    model, inputs = tiny(kind, pad_token_id=1), batch()
    real = inputs["attention_mask"].bool()
    expected = model(inputs["input_ids"].masked_fill(~real, 1), attention_mask=inputs["attention_mask"]).logits[real]
    collator = transformers.DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_tensors="pt")
    rows = [{"input_ids": ids[is_token].tolist()} for ids, is_token in zip(inputs["input_ids"], real)]
    flat = {name: x for name, x in collator(rows).items() if name != "labels"}
    fastbert.swap(model).raise_if_incomplete()
    assert_close(model(**flat).logits[0], expected)
    if kind != "BertForMaskedLM":
        # positions that begin where the family's do are taken as they are
        assert_close(model(**{**flat, "position_ids": flat["position_ids"] + 2}).logits[0], expected)
