"""The swap's dtype: what stacks multiply in, in every family; refusals leave the model as it was."""

import copy

import pytest
import torch
import torch.nn.functional as F
from test_families import theirs_of
from torch import nn

import fastbert
from fastbert.cpu import low_precision


@pytest.fixture(autouse=True)
def is_fast(monkeypatch):
    """A processor on which every dtype is twice as fast."""
    monkeypatch.setattr(low_precision, "gain", lambda dtype: 2.0)


def inputs():
    ids, mask = torch.randint(10, 99, (3, 13)), torch.ones(3, 13, dtype=torch.int64)
    mask[1, 7:] = 0
    return dict(input_ids=ids, attention_mask=mask)


@pytest.mark.parametrize("dtype", ["bf16", "int8"])
@pytest.mark.parametrize("case", ["bert", "distilbert", "albert", "deberta-v2", "mpnet", "modernbert"])
def test_a_swapped_model_multiplies_in_it(case, dtype):
    model, given = theirs_of(case, "Model").eval(), inputs()
    with torch.no_grad():
        expected = model(**given)[0]
    report = fastbert.swap(model, dtype=dtype)
    assert any(row.became.endswith(f", products in {dtype}") for row in report.swapped)
    with torch.no_grad():
        got = model(**given)[0]
        # a copy, and the model itself after changes, are in int8 as well
        assert torch.equal(copy.deepcopy(model)(**given)[0], got)
    cosine = F.cosine_similarity(got, expected, dim=-1)[given["attention_mask"].bool()]
    assert cosine.min() > 0.99 and (got - expected).abs().max() > 1e-3
    # where gradients are wanted, nothing has changed
    torch.testing.assert_close(model(**given)[0][0], expected[0], atol=1e-5, rtol=1e-4)
    fastbert.swap(model)
    with torch.no_grad():
        torch.testing.assert_close(model(**given)[0][0], expected[0], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("batch_first", [True, False])
def test_torchs_encoder(batch_first):
    layer = nn.TransformerEncoderLayer(64, 4, 130, activation="gelu", batch_first=batch_first)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    x = torch.randn(5, 7, 64)
    with torch.no_grad():
        expected = model(x)
        fastbert.swap(model, dtype="int8")
        got = model(x)
    assert F.cosine_similarity(got, expected, dim=-1).min() > 0.99 and (got - expected).abs().max() > 1e-4


def test_a_model_that_loses_too_much_is_as_it_was(monkeypatch):
    model = theirs_of("bert", "ForMaskedLM").train()
    model.bert.encoder.layer[0].eval()
    before = {name: (type(module), module.training) for name, module in model.named_modules()}
    monkeypatch.setattr(low_precision, "LEAST_COSINE", 0.99999)
    with pytest.raises(ValueError, match=r"^dtype int8: the cosine to fp32 falls to 0\.99\d\d for this model"):
        fastbert.swap(model, dtype="int8")
    assert {name: (type(module), module.training) for name, module in model.named_modules()} == before


def test_faults_are_named():
    model = theirs_of("bert", "ForMaskedLM")
    with pytest.raises(ValueError, match="dtype is 'fp16': expected auto, fp32, bf16, int8"):
        fastbert.swap(model, dtype="fp16")
    with pytest.raises(ValueError, match="dtype is 'int8' and the model is on meta: bf16 and int8 are for a CPU"):
        fastbert.swap(copy.deepcopy(model).to("meta"), dtype="int8")
    with pytest.warns(UserWarning, match="dtype int8: no stack of layers was swapped, nothing multiplies in it"):
        fastbert.swap(nn.Sequential(nn.LayerNorm(8)), dtype="int8")
