"""A swapped model that its user changes afterwards: methods of classes, settings, wrappers, forwards that were kept."""

import functools
import importlib

import pytest
import torch
import torch.nn.functional as F
from small import D, S, assert_close, assert_same_gradients, batch, gradients, tiny
from test_own_code import Quantised, assert_unchanged, hidden, is_unpadded, mix_output, mixed
from torch import nn
from transformers.models.deberta_v2.modeling_deberta_v2 import DebertaV2Encoder

import fastbert


def class_of(name, family):
    return getattr(importlib.import_module(f"transformers.models.{family}.modeling_{family}"), name)


@pytest.mark.parametrize(
    ("kind", "family", "cls", "method"),
    [("BertModel", "bert", "BertLayer", "forward"), ("BertModel", "bert", "BertLayer", "feed_forward_chunk"),
     ("BertModel", "bert", "BertSelfOutput", "forward"), ("BertModel", "bert", "BertSelfAttention", "forward"),
     ("DistilBertModel", "distilbert", "FFN", "ff_chunk"), ("AlbertModel", "albert", "AlbertLayer", "ff_chunk"),
     ("MPNetModel", "mpnet", "MPNetEncoder", "compute_position_bias"),
     ("DebertaV2Model", "deberta_v2", "DebertaV2Encoder", "get_rel_embedding"),
     ("ModernBertModel", "modernbert", "ModernBertMLP", "forward")],
)  # fmt: skip
def test_a_method_that_is_replaced_for_a_class(kind, family, cls, method, monkeypatch, shapes):
    plain, model = tiny(kind), tiny(kind)
    fastbert.swap(model)
    before = hidden(model)
    cls = class_of(cls, family)
    original = vars(cls)[method]

    # transformers counts the arguments of chunks
    @functools.wraps(original)
    def own(self, *args, **kwargs):
        out = original(self, *args, **kwargs)
        return mix_output(None, (), out) if "forward" in method or "chunk" in method else out.flip(-1) * 9

    with monkeypatch.context() as patch:
        patch.setattr(cls, method, own)
        expected = hidden(plain)
        assert (expected - before).abs().max() > 1e-3
        assert_close(hidden(model), expected)
    shapes.clear()
    assert_close(hidden(model), before)
    assert any(map(is_unpadded, shapes))


class OwnPositions(DebertaV2Encoder):
    def get_rel_pos(self, *args, **kwargs):
        return super().get_rel_pos(*args, **kwargs).flip(-1)


def test_a_class_that_overrides_a_getter():
    report, _ = assert_unchanged(lambda model: setattr(model.encoder, "__class__", OwnPositions), "DebertaV2Model")
    assert "a subclass of DebertaV2Encoder with code of its own" in {row.reason for row in report.stayed}


def shift(x):
    """GELU, and what the token before has."""
    return F.gelu(x) + F.pad(x, (0, 0, 1, 0))[..., :-1, :]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("kind", "owner", "name"),
    [("BertForMaskedLM", "cls.predictions.transform", "transform_act_fn"),
     ("BertForMaskedLM", "cls.predictions.transform.transform_act_fn", "act"),
     ("BertForMaskedLM", "bert.encoder.layer.0.intermediate.intermediate_act_fn", "act"),
     ("ModernBertForMaskedLM", "head", "act"), ("AlbertForMaskedLM", "predictions", "activation")],
)  # fmt: skip
def test_a_function_for_an_activation(kind, owner, name, training):
    def change(model):
        module = model.get_submodule(owner)
        module._modules.pop(name, None)
        setattr(module, name, shift)

    plain = tiny(kind).train(training)
    change(plain)
    for when in ("before", "after"):
        model = tiny(kind).train(training)
        if when == "after":
            fastbert.swap(model)
        change(model)
        if when == "before":
            fastbert.swap(model)
        assert_close(model(**batch()).loss, plain(**batch()).loss)
        assert_same_gradients(gradients(model), gradients(plain))


class Around(nn.Module):
    """A base model with other names for its arguments."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, ids, **kwargs):
        return self.model(ids.clamp(max=12), **kwargs)


@pytest.mark.parametrize("kind", ["BertForMaskedLM", "RobertaForMaskedLM", "ElectraForMaskedLM"])
def test_a_wrapper_around_the_model_without_its_head(kind):
    plain, model = tiny(kind).train(), tiny(kind).train()
    fastbert.swap(model)
    for one in (plain, model):
        setattr(one, one.base_model_prefix, Around(one.base_model))
    assert_close(model(**batch()).loss, plain(**batch()).loss)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", ["BertForMaskedLM", "ModernBertForMaskedLM"])
def test_labels_of_another_shape_are_refused(kind, training):
    model = tiny(kind).train(training)
    fastbert.swap(model)
    with pytest.raises(ValueError, match=rf"^labels has shape \(3, {S - 1}\): expected \(3, {S}\)$"):
        model(**{**batch(), "labels": batch()["labels"][:, 1:]})
    assert_close(model(**{**batch(), "labels": batch()["labels"].flatten()}).loss, model(**batch()).loss)


def test_a_regression_whose_targets_are_the_number_that_means_no_label():
    inputs = {**batch(), "labels": torch.full((3,), -100.0)}
    plain, model = (tiny("BertForSequenceClassification", num_labels=1, problem_type="regression") for _ in "ab")
    fastbert.swap(model)
    assert_close(model(**inputs).loss, plain(**inputs).loss)


def test_a_mask_with_a_gradient():
    def gradient(model):
        mask = torch.zeros(3, 1, S, S, requires_grad=True)
        model(batch()["input_ids"], attention_mask=mask)[0].square().sum().backward()
        return mask.grad

    plain, model = tiny("BertModel"), tiny("BertModel")
    fastbert.swap(model)
    assert_close(gradient(model), gradient(plain))


@pytest.mark.parametrize("keep", [lambda m: m.register_buffer, lambda m: lambda *x: object.__setattr__(m, *x)])
def test_weights_of_another_tensor_class_that_are_no_parameters(keep):
    def change(model):
        for module in (model.encoder.layer[0].output.dense, model.encoder.layer[0].output.LayerNorm):
            weight = module._parameters.pop("weight").detach().as_subclass(Quantised)
            keep(module)("weight", weight)

    assert_unchanged(change)


def accelerates_around_own(model):
    """accelerate's forward around one of the user's own."""
    hooks = pytest.importorskip("accelerate").hooks
    dense = model.encoder.layer[0].output.dense
    original = dense.forward
    dense.forward = lambda x: mixed(original(x))
    hooks.add_hook_to_module(dense, hooks.AlignDevicesHook())


def own_among_accelerates(model):
    hooks = pytest.importorskip("accelerate").hooks

    class Mixed(hooks.ModelHook):
        def post_forward(self, module, output):
            return mixed(output)

    for hook in (hooks.AlignDevicesHook(), Mixed()):
        hooks.add_hook_to_module(model.encoder.layer[0].output.dense, hook, append=True)


@pytest.mark.parametrize("change", [accelerates_around_own, own_among_accelerates])
def test_own_code_under_accelerates_hooks(change):
    assert_unchanged(change)


@pytest.mark.parametrize("kind", ["BertForMaskedLM", "ModernBertForMaskedLM"])
def test_a_model_is_given_back_whose_forward_someone_has_wrapped(kind):
    model = tiny(kind).train()
    expected = model(**batch())
    fastbert.swap(model)
    # as accelerate does for mixed precision
    swapped = model.forward
    model.forward = lambda **inputs: swapped(**inputs)
    fastbert.unswap(model)
    assert torch.equal(model(**batch()).logits, expected.logits)


def test_an_eager_attention_of_ones_own(monkeypatch):
    def gated(module, query, key, value, attention_mask, **kwargs):
        return (value * query.sigmoid()).transpose(1, 2), None

    plain, model = (tiny("BertModel", attn_implementation="eager") for _ in "ab")
    fastbert.swap(model)
    monkeypatch.setattr("transformers.models.bert.modeling_bert.eager_attention_forward", gated)
    assert_close(hidden(model), hidden(plain))


def test_the_report_says_what_the_switches_leave():
    def rows(model, **switches):
        return {row.module: row.became for row in fastbert.swap(model, **switches).rows}

    whole, padded = rows(tiny("BertModel")), rows(tiny("BertModel"), unpad=False)
    assert whole["BertEncoder"].startswith("runs unpadded") and padded["BertEncoder"].startswith("keeps its padding")
    assert rows(tiny("AlbertModel"), gelu=False)["AlbertLayer"] == "fused add and norm"
    layer = nn.Sequential(nn.TransformerEncoderLayer(D, 4, 37))
    assert rows(layer, attention=False)["TransformerEncoderLayer"].count("padding") == 0


@pytest.mark.parametrize("kind", ["BertModel", "ModernBertModel"])
def test_a_layer_that_is_compiled_by_itself(kind, fresh_compiler):
    plain, model = tiny(kind), tiny(kind)
    fastbert.swap(model)
    layer = model.get_submodule("layers.1" if kind == "ModernBertModel" else "encoder.layer.1")
    layer.compile(backend="eager", fullgraph=True)
    assert_close(hidden(model), hidden(plain))
