"""Modules that a replacement reads or passes over, with a user's code: tables, dropouts, heads, losses, weights; and
other clients of a swapped model.
"""

import pytest
import torch
import torch.nn.functional as F
import transformers
from small import assert_close, assert_same_gradients, batch, gradients, tiny
from test_own_code import assert_unchanged, hidden, is_unpadded, put, quantise
from torch import nn

import fastbert


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


def test_a_hook_on_the_model_without_its_head():
    def mask_out(module, args):
        return (args[0].masked_fill(args[0] > 12, 4), *args[1:])

    plain, model = tiny().train(), tiny().train()
    fastbert.swap(model)
    before = plain(**batch()).loss
    for one in (plain, model):
        one.bert.register_forward_pre_hook(mask_out)
    assert abs(plain(**batch()).loss - before) > 1e-4
    assert_close(model(**batch()).loss, plain(**batch()).loss)


def mix(module):
    """Adds what the token before has: padding, which stands behind, does not matter."""
    module.register_forward_hook(lambda module, args, out: out + F.pad(out, (0, 0, 1, 0))[:, :-1])


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, names in HEADS.items() for name in names])
def test_hooks_on_heads(kind, name, training):
    plain = tiny(kind).train(training)
    before = plain(**batch()).loss
    bend(plain.get_submodule(name))
    mix(plain.get_submodule(name))
    expected = gradients(plain)
    assert abs(plain(**batch()).loss - before) > 1e-4
    for when in ("before", "after"):
        model = tiny(kind).train(training)
        if when == "after":
            fastbert.swap(model)
        bend(model.get_submodule(name))
        mix(model.get_submodule(name))
        if when == "before":
            fastbert.swap(model).raise_if_incomplete()
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


class OwnLoss(transformers.ModernBertForMaskedLM):
    @property
    def loss_function(self):
        return lambda logits, labels, **kwargs: F.cross_entropy(logits[0], labels[0], label_smoothing=0.3)


def own_loss_of_a_class(model):
    model.__class__ = OwnLoss


def own_loss_module(model):
    model.mlm_loss_fct = nn.CrossEntropyLoss(label_smoothing=0.3)


def function_for_the_loss(model):
    del model.mlm_loss_fct
    model.mlm_loss_fct = lambda scores, labels: F.cross_entropy(scores, labels, label_smoothing=0.3)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("kind", "change"),
    [("BertForMaskedLM", own_cls), ("ModernBertForMaskedLM", own_loss), ("ModernBertForMaskedLM", own_loss_of_a_class),
     ("DistilBertForMaskedLM", own_loss_module), ("DistilBertForMaskedLM", function_for_the_loss)],
)  # fmt: skip
def test_heads_and_losses_of_ones_own(kind, change, training):
    plain = tiny(kind).train(training)
    before = plain(**batch()).loss
    change(plain)
    assert abs(plain(**batch()).loss - before) > 1e-4
    for when in ("before",) if change is own_loss_of_a_class else ("before", "after"):
        model = tiny(kind).train(training)
        if when == "after":
            fastbert.swap(model)
        change(model)
        if when == "before":
            fastbert.swap(model)
        assert_close(model(**batch()).loss, plain(**batch()).loss)
        assert_same_gradients(gradients(model), gradients(plain))


# ------------------------------------------------------------------------------------------------------- parameters


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


def test_a_row_of_padding_pools_what_it_did():
    inputs = {name: x for name, x in batch().items() if name != "labels"}
    inputs["attention_mask"][1] = 0
    for kind in ("BertModel", "AlbertModel", "MPNetModel"):
        plain, model = tiny(kind), tiny(kind)
        fastbert.swap(model)
        assert_close(model(**inputs).pooler_output, plain(**inputs).pooler_output)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("kind", ["BertModel", "DistilBertModel", "ModernBertModel"])
def test_an_attention_function_of_ones_own_is_called(kind, when):
    def gated(module, query, key, value, attention_mask, **kwargs):
        return (value * query.sigmoid()).transpose(1, 2), None

    transformers.AttentionInterface.register("gated", gated)
    plain, model = tiny(kind), tiny(kind)
    for one in (plain, model):
        if one is model and when == "after":
            fastbert.swap(model)
        one.set_attn_implementation("gated")
    if when == "before":
        report = fastbert.swap(model)
        assert "its attention, gated, is not one of transformers'" in {row.reason for row in report.stayed}
    assert_close(hidden(model), hidden(plain))


def flattened():
    """`batch()` as the collator flattens it."""
    inputs = batch()
    real = inputs["attention_mask"].bool()
    collator = transformers.DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_tensors="pt")
    rows = [{"input_ids": ids[is_token].tolist()} for ids, is_token in zip(inputs["input_ids"], real)]
    return {name: x for name, x in collator(rows).items() if name != "labels"}


@pytest.mark.parametrize("family", ["Roberta", "XLMRoberta", "Bert", "ModernBert"])
def test_flattened_batches_as_the_collator_makes_them(family):
    model, inputs, flat = tiny(f"{family}ForMaskedLM", pad_token_id=1), batch(), flattened()
    real = inputs["attention_mask"].bool()
    expected = model(inputs["input_ids"].masked_fill(~real, 1), attention_mask=inputs["attention_mask"]).logits[real]
    fastbert.swap(model).raise_if_incomplete()
    assert_close(model(**flat).logits[0], expected)
    if "Roberta" in family:
        # positions that begin where the family's do are taken as they are
        assert_close(model(**{**flat, "position_ids": flat["position_ids"] + 2}).logits[0], expected)


def test_flattened_sequences_are_kept_apart_or_refused():
    model, flat = tiny("BertModel"), flattened()
    expected = hidden(model)
    fastbert.swap(model)
    model.encoder.layer[0].register_forward_hook(lambda *_: None)
    assert_close(model(**flat)[0][0], expected)
    with pytest.raises(ValueError, match="runs the original BertEncoder, whose sdpa attention would mix the sequences"):
        model(**flat, output_attentions=True)
    for kind in ("MPNetModel", "MPNetForMaskedLM", "DebertaModel", "DebertaV2Model"):
        model = tiny(kind)
        fastbert.swap(model)
        with pytest.raises(ValueError, match=f"^cu_seq_lens_q is given: {kind} would mix the sequences, pad them$"):
            model(**flat)
