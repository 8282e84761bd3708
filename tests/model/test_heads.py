"""What transformers does not answer: nothing to predict, padding alone, one loss of two; and checkpoints of others."""

import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_families import loaded, theirs_of

from fastbert.model import presets
from fastbert.model.heads import MaskedLM, Pretraining

PAIRS = [(MaskedLM, "ForMaskedLM"), (Pretraining, "ForPreTraining")]


@pytest.fixture(params=PAIRS, ids=lambda pair: pair[0].__name__)
def pair(request, tmp_path):
    """(ours, theirs), a bert with the same weights."""
    return loaded("bert", *request.param, tmp_path)


def test_nothing_picked_gives_zero_where_transformers_gives_nan(pair):
    ours, theirs = pair
    ids = torch.randint(5, 99, (2, 4))
    nothing = torch.full_like(ids, -100)
    if type(ours) is MaskedLM:
        assert theirs(ids, labels=nothing).loss.isnan()
    output = ours(ids, labels=nothing)
    output.loss.backward()
    assert output.loss == 0 and output.losses["mlm"].count == 0
    assert all(p.grad is None or (p.grad == 0).all() for p in ours.parameters())


def test_a_batch_of_padding_alone(pair):
    ours, _ = pair
    ids = torch.randint(5, 99, (2, 4))
    mask = torch.tensor([[0, 0, 0, 0], [1, 1, 0, 0]])
    labels = torch.where(mask.bool(), ids, -100)
    assert torch.isfinite(ours(ids, mask, labels=labels).loss)
    assert (ours(ids, mask).logits[0] == 0).all()
    assert (ours(ids, torch.zeros_like(mask)).logits == 0).all()


def test_masked_tokens_alone_and_pairs_alone():
    model = Pretraining(presets.preset("bert-tiny")).eval()
    ids, labels = torch.randint(5, 99, (2, 4)), torch.tensor([0, 1])
    # the second time the last text is one token, whose row both heads read
    for mask in (torch.ones_like(ids), torch.tensor([[1, 1, 1, 1], [1, 0, 0, 0]])):
        tokens, both = model(ids, mask, labels=ids), model(ids, mask, labels=ids, next_sentence_label=labels)
        pairs = model(ids, mask, next_sentence_label=labels)
        assert [*tokens.losses] == ["mlm"] and [*pairs.losses] == ["pair"] and pairs.losses["pair"].count == 2
        torch.testing.assert_close(both.loss, tokens.loss + pairs.loss)


def test_old_names_bare_encoders_and_other_heads_load(tmp_path):
    theirs = theirs_of("bert", "ForPreTraining")
    theirs.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    old = {n.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): x
           for n, x in load_file(path).items()}  # fmt: skip
    save_file(old | {"bert.embeddings.position_ids": torch.arange(40)}, path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours = MaskedLM.from_pretrained(tmp_path)
    assert torch.equal(ours.encoder.embeddings.norm.weight, theirs.bert.embeddings.LayerNorm.weight)

    bare = theirs_of("bert", "Model")
    bare.save_pretrained(tmp_path / "bare")
    with pytest.warns(UserWarning, match="lacks cls.predictions.bias.*start fresh"):
        ours = MaskedLM.from_pretrained(tmp_path / "bare")
    assert torch.equal(ours.encoder.blocks[2].feed_forward.up.weight, bare.encoder.layer[2].intermediate.dense.weight)

    save_file(load_file(path) | {"bert.encoder.novel": torch.zeros(2)}, path)
    with pytest.warns(UserWarning, match="does not use: bert.encoder.novel"):
        MaskedLM.from_pretrained(tmp_path)
