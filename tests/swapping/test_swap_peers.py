"""What the test suites of transformers and of torch ask of a model, asked of a swapped one.

Both compare a model with itself: another form of the output, another batch around a text, a graph made of it, a copy
loaded from disk. So whatever a swapped model returns, at padded places too, must not depend on how it was called.
"""

import pytest
import small
import torch
from torch import nn
from torch.testing import assert_close

import fastbert

# family -> what its tiny model is told beside
FAMILIES = {
    "Bert": {},
    "Roberta": dict(pad_token_id=1),
    "Electra": dict(embedding_size=16),
    "Albert": dict(embedding_size=8),
    "DistilBert": {},
    "MPNet": dict(pad_token_id=1),
    "Deberta": {},
    "DebertaV2": dict(share_att_key=True, norm_rel_ebd="layer_norm"),
    "ModernBert": {},
}
# three whose attention looks at how far tokens are apart, and two whose attention does not
SOME = ["Bert", "Albert", "MPNet", "DebertaV2", "ModernBert"]


def tiny(family, head="Model", **changes):
    model = small.tiny(family + head, **FAMILIES[family], **changes)
    assert fastbert.swap(model).swapped
    return model


def batch(gaps=False):
    inputs = small.batch(gaps)
    del inputs["labels"]
    return inputs


def close(got, expected):
    assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.no_grad():
        yield


@pytest.mark.parametrize("gaps", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_text_alone_is_what_it_is_in_a_batch(family, gaps):
    model, inputs = tiny(family), batch(gaps)
    for asked in ({}, dict(output_hidden_states=True)):
        together = model(**inputs, **asked)
        for row in range(len(small.LENGTHS)):
            alone = model(**{name: value[row : row + 1] for name, value in inputs.items()}, **asked)
            close(alone.last_hidden_state[0], together.last_hidden_state[row])
            for one, many in zip(alone.hidden_states or (), together.hidden_states or ()):
                close(one[0], many[row])


@pytest.mark.parametrize("family", SOME)
def test_padded_places_are_zero_however_it_is_called(family):
    model = tiny(family)
    for gaps in (False, True):
        inputs = batch(gaps)
        padding = inputs["attention_mask"] == 0
        expected = model(**inputs).last_hidden_state
        assert (expected[padding] == 0).all() and (expected[~padding] != 0).any(-1).all()
        asked = model(**inputs, output_hidden_states=True)
        close(asked.last_hidden_state, expected)
        assert asked.hidden_states[-1] is asked.last_hidden_state or family == "DebertaV2"
        close(asked.hidden_states[-1], asked.last_hidden_state)
        close(model(**inputs, return_dict=False)[0], expected)
        handle = next(module for name, module in model.named_modules() if name.endswith(".0")).register_forward_hook(
            lambda *_: None
        )
        close(model(**inputs).last_hidden_state, expected)
        handle.remove()
        fastbert.swap(model, unpad=False)
        close(model(**inputs).last_hidden_state, expected)
        fastbert.swap(model)


def test_padding_at_the_first_place_stays_what_the_model_reads_there():
    inputs = batch()
    inputs["attention_mask"] = inputs["attention_mask"].flip(1)
    model = tiny("Bert", "ForSequenceClassification")
    got = model(**inputs)
    fastbert.unswap(model)
    close(got.logits, model(**inputs).logits)


@pytest.mark.parametrize("family", ["Bert", "Roberta", "Electra", "Albert", "DistilBert"])
def test_feed_forward_in_chunks(family):
    inputs = batch()
    whole = tiny(family)(**inputs)[0]
    for chunk in (1, 11):
        model = tiny(family, chunk_size_feed_forward=chunk)
        close(model(**inputs)[0], whole)
        fastbert.swap(model).raise_if_incomplete()


@pytest.mark.parametrize("family", SOME)
def test_an_exported_graph_returns_what_the_model_does(family):
    model = tiny(family, "ForMaskedLM")
    graph = torch.export.export(model, args=(), kwargs=batch(), strict=False).module()
    for gaps in (False, True):
        close(graph(**batch(gaps)).logits, model(**batch(gaps)).logits)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", ["Bert", "DebertaV2"])
def test_a_traced_graph_returns_what_the_model_does(family):
    model = tiny(family, "ForMaskedLM")
    graph = torch.jit.trace(Scores(model), tuple(batch().values()), check_trace=False)
    for gaps in (False, True):
        close(graph(*batch(gaps).values()), model(**batch(gaps)).logits)


class Scores(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids, attention_mask):
        return self.model(input_ids, attention_mask=attention_mask).logits


@pytest.mark.parametrize("family", ["Bert", "ModernBert"])
def test_compiles_as_one_graph(family, fresh_compiler):
    model, inputs = tiny(family, "ForMaskedLM"), batch()
    close(torch.compile(model, backend="eager", fullgraph=True)(**inputs).logits, model(**inputs).logits)
    if family == "Bert":
        model.train()
        torch._dynamo.reset()
        with torch.enable_grad():
            expected = small.gradients(model)
            got = small.gradients(torch.compile(model, backend="eager", fullgraph=True))
        close(list(got.values()), list(expected.values()))


# --------------------------------------------------------------------------------------------------- torch's own tests


def encoder(norm_first=False, layer=nn.TransformerEncoderLayer):
    torch.manual_seed(0)
    one = layer(16, 2, 32, dropout=0.0, activation="gelu", batch_first=True, norm_first=norm_first)
    return nn.TransformerEncoder(one, 2, enable_nested_tensor=False)


@pytest.mark.parametrize("norm_first", [False, True])
def test_a_decoder_reads_the_padding_of_its_encoder(norm_first):
    """nn.Transformer hands its decoder all places where it is given no memory_key_padding_mask."""
    torch.manual_seed(0)
    model = nn.Transformer(16, 2, 2, 2, 32, dropout=0.0, batch_first=True, norm_first=norm_first)
    x, y = torch.randn(2, 5, 16), torch.randn(2, 4, 16)
    padding = torch.tensor([[False] * 3 + [True] * 2, [False] * 5])
    expected = model(x, y, src_key_padding_mask=padding)
    report = fastbert.swap(model)
    close(model(x, y, src_key_padding_mask=padding), expected)
    assert {row.name for row in report.stayed} >= {"encoder", "encoder.layers.0", "encoder.layers.1.self_attn"}
    assert any("unpad=True" in row.reason for row in report.stayed)
    report = fastbert.swap(model, unpad=True)
    assert {"encoder", "encoder.layers.1", "encoder.layers.0.self_attn"} <= {row.name for row in report.swapped}
    decoders = {row.name for row in report.stayed if row.reason.startswith("a decoder's attention is causal")}
    assert {"decoder", "decoder.layers.0", "decoder.layers.1"} <= decoders
    causal = nn.Transformer.generate_square_subsequent_mask(4)
    told = dict(src_key_padding_mask=padding, memory_key_padding_mask=padding, tgt_mask=causal)
    got = model(x, y, **told)
    fastbert.unswap(model)
    close(got, model(x, y, **told))


class Derived(nn.TransformerEncoderLayer):
    pass


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("layer", [nn.TransformerEncoderLayer, Derived])
def test_a_swapped_module_can_be_scripted(layer):
    model, x = encoder(layer=layer).eval(), torch.randn(2, 5, 16)
    fastbert.swap(model)
    classes = [type(module) for module in model.modules()]
    scripted = torch.jit.script(model)
    close(scripted(x), model(x))
    assert [type(module) for module in model.modules()] == classes
    # around the same parameters
    model.layers[0].linear1.weight.mul_(2)
    close(scripted(x), model(x))


@pytest.mark.parametrize("training", [False, True])
def test_masks_of_any_numbers_and_of_no_known_type(training):
    model, x = encoder().train(training), torch.randn(2, 5, 16)
    padding = torch.randn(2, 5)
    with torch.enable_grad():  # without, torch's C++ path returns NaN in evaluation
        expected = model(x, src_key_padding_mask=padding).detach()
    fastbert.swap(model)
    close(model(x, src_key_padding_mask=padding), expected)
    for dtype in (torch.uint8, torch.int64):
        with pytest.raises(AssertionError, match="only bool and floating types"):
            model(x, src_key_padding_mask=(padding > 0).to(dtype))
    with pytest.raises((AssertionError, RuntimeError)):
        model(x, src_key_padding_mask=padding[:1])
