"""Swapped models out of the ordinary: parametrized, derived, decoders, swapped twice."""

import copy
import pickle

import pytest
import torch
import transformers
from small import LENGTHS, assert_close, assert_same_gradients, batch, gradients, is_swapped, logits, tiny
from torch import nn

import fastbert


def test_parametrizations():
    from torch.nn.utils import parametrizations, parametrize

    plain, model, later = tiny(), tiny(), tiny()
    fastbert.swap(later)
    for one in (plain, model, later):
        parametrizations.weight_norm(one.bert.encoder.layer[0].attention.self.query)
        parametrize.register_parametrization(one.bert.encoder.layer[0].output.LayerNorm, "weight", nn.ReLU())
    report = fastbert.swap(model)
    assert [row.name for row in report.stayed] == ["bert.encoder.layer.0.output.LayerNorm"]
    for one in (model, later):
        assert_close(logits(one), logits(plain))
        norm = one.bert.encoder.layer[0].output.LayerNorm
        parametrize.remove_parametrizations(norm, "weight")
        fastbert.unswap(one)
        assert type(norm) is nn.LayerNorm


class Derived(transformers.BertForMaskedLM):
    def score(self, **inputs):
        return self(**inputs).loss


class OwnForward(transformers.BertForMaskedLM):
    def forward(self, *args, **kwargs):
        out = super().forward(*args, **kwargs)
        out.loss = out.loss * 2
        return out


def test_classes_derived_from_a_known_one():
    plain, model = tiny(), tiny(Derived)
    report = fastbert.swap(model)
    assert report.rows[0].module == "Derived" and report.rows[0].became
    assert_close(logits(model), logits(plain))
    assert abs(model.train().score(**batch()) - plain(**batch()).loss) < 1e-5
    assert type(pickle.loads(pickle.dumps(model))).__name__ == "Derived"
    fastbert.unswap(model)
    assert type(model) is Derived

    own = tiny(OwnForward)
    report = fastbert.swap(own)
    assert report.rows[0].reason == "a subclass of BertForMaskedLM with code of its own"
    assert abs(own(**batch()).loss - 2 * plain(**batch()).loss) < 1e-4


def test_decoders_are_left_alone_and_generate():
    model = tiny(transformers.BertLMHeadModel, is_decoder=True)
    settings = dict(max_new_tokens=6, do_sample=False, pad_token_id=0)
    ids = batch()["input_ids"][:1, :4]
    expected = model.generate(ids, **settings)
    state = model(ids, use_cache=True)
    report = fastbert.swap(model)
    reasons = {row.name: row.reason for row in report.stayed}
    assert reasons["bert.encoder"] == "a decoder's attention is causal, or reads another model"
    assert reasons["bert.encoder.layer.0.attention.self"] == "a decoder's attention is causal"
    assert torch.equal(model.generate(ids, **settings), expected)
    # token by token with past_key_values, as in one go
    cached = model(ids[:, :2], use_cache=True)
    cached = model(ids[:, 2:], past_key_values=cached.past_key_values, use_cache=True)
    assert_close(cached.logits, state.logits[:, 2:], tolerance=1e-4)


def test_two_berts_as_encoder_and_decoder():
    def pair():
        torch.manual_seed(0)
        both = transformers.EncoderDecoderConfig.from_encoder_decoder_configs(tiny().config, tiny().config)
        both.decoder_start_token_id, both.pad_token_id, both.eos_token_id = 2, 0, 3
        return transformers.EncoderDecoderModel(both).eval()

    plain, model = pair(), pair()
    report = fastbert.swap(model)
    swapped = {row.name for row in report.swapped}
    stayed = {row.name for row in report.stayed}
    assert {"encoder.encoder", "encoder.encoder.layer.0.attention.self"} <= swapped
    assert {"decoder.bert.encoder", "decoder.bert.encoder.layer.0.attention.self"} <= stayed
    inputs = dict(batch(), labels=batch()["input_ids"])
    got, expected = model(**inputs), plain(**inputs)
    assert_close(got.logits, expected.logits)
    assert_same_gradients(gradients(model.train(), inputs), gradients(plain.train(), inputs))
    ids = dict(inputs=inputs["input_ids"], attention_mask=inputs["attention_mask"])
    settings = dict(max_new_tokens=4, do_sample=False, decoder_start_token_id=2, num_beams=2)
    assert torch.equal(model.eval().generate(**ids, **settings), plain.eval().generate(**ids, **settings))


@pytest.mark.parametrize("implementation", ["eager", "sdpa", "flash_attention_2", "flex_attention", "fastbert"])
def test_any_attn_implementation(implementation):
    """Whatever the model was told, also what this machine lacks: the swap runs its own attention."""
    plain, model = tiny(), tiny()
    if implementation == "fastbert":
        model.set_attn_implementation(implementation)
    else:  # as on a machine that has it; here the check of what is installed would raise
        model.config._attn_implementation = implementation
    report = fastbert.swap(model)
    report.raise_if_incomplete()
    if implementation == "flex_attention":
        # transformers would compile the making of its mask
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            got = logits(model)
    else:
        got = logits(model)
    assert_close(got, logits(plain))


def test_an_exception_inside_of_swapped_gives_the_model_back():
    model = tiny()
    with pytest.raises(ZeroDivisionError), fastbert.swapped(model):
        assert is_swapped(model)
        raise ZeroDivisionError
    assert not any(map(is_swapped, model.modules()))
    with pytest.raises(ValueError), fastbert.swapped(model, logits="never"):
        raise AssertionError("not reached")
    assert not any(map(is_swapped, model.modules()))


def test_nested():
    model = tiny()
    state = lambda: [(type(module), vars(module).get("fastbert_options")) for module in model.modules()]  # noqa: E731
    start = state()
    with fastbert.swapped(model, gelu=False) as outer:
        assert not any(row.became and row.module == "BertIntermediate" for row in outer.rows)
        inside = state()
        with fastbert.swapped(model, attention=False) as inner:
            assert not any(row.became and row.module == "BertSelfAttention" for row in inner.rows)
            assert not is_swapped(model.bert.encoder.layer[0].attention.self)
        assert state() == inside
    assert state() == start
    fastbert.swap(model, loss=False)
    before = state()
    with fastbert.swapped(model):
        assert is_swapped(model)
    assert state() == before and not is_swapped(model)


def test_swapping_again_and_unswapping_what_is_not_swapped():
    model, expected = tiny(), logits(tiny())
    keys = [sorted(vars(module)) for module in model.modules()]
    fastbert.unswap(model)
    first = fastbert.swap(model)
    classes = [type(module) for module in model.modules()]
    assert fastbert.swap(model).rows == first.rows
    assert [type(module) for module in model.modules()] == classes
    report = fastbert.swap(model, loss=False, unpad=False)
    assert not is_swapped(model) and is_swapped(model.bert.encoder)
    assert {row.name: row.reason for row in report.stayed} == {"": "switched off: loss"}
    assert_close(logits(model), expected)
    fastbert.unswap(model)
    fastbert.unswap(model)
    assert not any(map(is_swapped, model.modules()))
    assert [sorted(vars(module)) for module in model.modules()] == keys


def test_another_model_from_the_same_config_is_untouched():
    shared = tiny().config
    first, second = transformers.BertForMaskedLM(shared), transformers.BertForMaskedLM(shared)
    before = copy.deepcopy(shared.to_dict())
    fastbert.swap(first)
    third = transformers.BertForMaskedLM(shared)
    assert shared.to_dict() == before
    for other in (second, third):
        assert not any(map(is_swapped, other.modules()))
        assert type(other) is transformers.BertForMaskedLM
    assert "fastbert" not in transformers.BertForMaskedLM.forward.__code__.co_filename


def test_code_of_a_checkpoint_has_one_line():
    """What trust_remote_code has loaded; the LayerNorm inside is swapped all the same."""
    layer = type("NewLayer", (nn.Sequential,), {"__module__": "transformers_modules.some.modeling"})
    cls = type("NewModel", (nn.Module,), {"__module__": "transformers_modules.some.modeling"})
    model = nn.Sequential(nn.Linear(4, 4), cls())
    model[1].layer = layer(nn.LayerNorm(4), nn.Linear(4, 4))
    report = fastbert.swap(model)
    assert [(row.name, row.module) for row in report.stayed] == [("1", "NewModel")]
    assert [row.name for row in report.swapped] == ["1.layer.0"]
    with pytest.raises(RuntimeError, match="load transformers' own class, without trust_remote_code"):
        report.raise_if_incomplete()


@pytest.mark.parametrize("positions", ["absolute", "rotary"])
def test_esm_runs_unpadded_whatever_its_config_says_of_a_cache(positions, shapes):
    plain, model = (tiny("EsmModel", position_embedding_type=positions, use_cache=True) for _ in range(2))
    fastbert.swap(model)
    inputs = {name: x for name, x in batch().items() if name != "labels"}
    real = inputs["attention_mask"].bool()
    assert_close(model(**inputs)[0], plain(**inputs)[0], real)
    # ops.linear gets [1, T, D] as rows
    assert {shape[0] for shape in shapes} == {sum(LENGTHS)}
