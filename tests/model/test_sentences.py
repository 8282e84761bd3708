"""SentenceEmbedder against transformers and sentence-transformers: vectors, prompts, directories both ways."""

import json
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from fastbert.cpu import low_precision
from fastbert.model import families
from fastbert.model.sentences import MODES, SentenceEmbedder

WORDS = re.findall(r"\S+", "the cat sat on a mat and then it ran far away from that dog query passage : so")
TEXTS = ["the cat sat", "on a mat and then it ran far away from that dog", "", "dog", "so the dog sat on the mat"]
SIZES = dict(
    vocab_size=40, hidden_size=36, num_hidden_layers=2, num_attention_heads=3, intermediate_size=37,
    max_position_embeddings=24,
)  # fmt: skip


def tokenizer():
    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(specials + WORDS)}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return made


def embedder(**options):
    torch.manual_seed(3)
    model = SentenceEmbedder(families.config_of("bert", **SIZES), tokenizer(), **options)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def theirs_of(model, directory):
    """transformers' bare encoder with the same weights."""
    model.save_pretrained(directory)
    theirs, info = transformers.AutoModel.from_pretrained(directory, output_loading_info=True)
    assert not any(info.values()), info
    return theirs.eval()


def pooled(theirs, texts, mode, skipped=0):
    """Pooling written out, one text at a time, without padding."""
    ids = [torch.tensor([tokenizer().encode(text).ids]) for text in texts]
    return torch.stack([_pooled(theirs(x).last_hidden_state[0, skipped:], mode) for x in ids])


def _pooled(rows, mode):
    weights = torch.arange(1, len(rows) + 1.0)[:, None]
    return {
        "mean": rows.mean(0), "cls": rows[0], "max": rows.max(0).values, "lasttoken": rows[-1],
        "mean_sqrt_len_tokens": rows.sum(0) / len(rows) ** 0.5, "weightedmean": (rows * weights).sum(0) / weights.sum(),
    }[mode]  # fmt: skip


@pytest.mark.parametrize("mode", MODES)
@torch.no_grad()
def test_vectors_are_those_of_transformers(mode, tmp_path):
    model = embedder(pooling=mode, normalize=False)
    expected = pooled(theirs_of(model, tmp_path), TEXTS, mode)
    got = model.encode(TEXTS, batch_size=2)
    assert got.dtype == np.float32 and np.abs(got - expected.numpy()).max() < 1e-5
    normalized = model.encode(TEXTS, normalize_embeddings=True, convert_to_tensor=True)
    assert (normalized - F.normalize(expected, dim=-1)).abs().max() < 1e-5
    reloaded = SentenceEmbedder.from_pretrained(tmp_path)
    assert np.array_equal(reloaded.encode(TEXTS, batch_size=2), got)
    assert reloaded.max_length == 24 and not reloaded.normalize


@torch.no_grad()
def test_prompts(tmp_path):
    prompts = {"query": "query : ", "passage": "passage : "}
    model = embedder(prompts=prompts, default_prompt_name="query", normalize=False)
    model.save_pretrained(tmp_path)
    model = SentenceEmbedder.from_pretrained(tmp_path)
    assert model.prompts == prompts and model.default_prompt_name == "query"
    one = model.encode("dog")
    assert one.shape == (36,)
    assert np.array_equal(one, model.encode("query : dog", prompt=""))
    assert np.array_equal(model.encode("dog", prompt_name="passage"), model.encode("dog", prompt="passage : "))
    assert np.abs(one - model.encode("dog", prompt_name="passage")).max() > 1e-3
    with pytest.raises(ValueError, match="prompt_name is 'title': expected one of"):
        model.encode("dog", prompt_name="title")

    apart = embedder(prompts=prompts, include_prompt=False, normalize=False)
    theirs = theirs_of(apart, tmp_path / "apart")
    # [CLS] query : are left out
    expected = pooled(theirs, ["query : dog ran", "query : a cat"], "mean", skipped=3)
    got = apart.encode(["dog ran", "a cat"], prompt_name="query")
    assert np.abs(got - expected.numpy()).max() < 1e-5


def test_long_texts_are_cut_and_order_is_kept():
    model = embedder(max_length=6)
    long = "the cat sat on a mat and then it ran"
    assert np.array_equal(model.encode(long), model.encode("the cat sat on"))
    both = model.encode(["dog", long])
    assert np.allclose(both, np.stack([model.encode("dog"), model.encode(long)]), atol=1e-6)
    assert model.encode([]).shape == (0,)


def test_gradients_reach_the_encoder():
    model = embedder().train()
    ids = torch.randint(5, 20, (3, 7))
    model(ids, torch.ones_like(ids)).square().sum().backward()
    assert model.encoder.embeddings.word.weight.grad.abs().max() > 0


def test_bad_input(tmp_path):
    model = embedder()
    with pytest.raises(TypeError, match="text 1 is a int: expected str"):
        model.encode(["a", 5])
    with pytest.raises(ValueError, match="batch_size is 0"):
        model.encode("a", batch_size=0)
    with pytest.raises(ValueError, match="pooling is 'middle': expected one of mean"):
        embedder(pooling="middle")
    model.save_pretrained(tmp_path)
    modules = json.loads((tmp_path / "modules.json").read_text())
    modules.append(dict(idx=9, name="9", path="9_LSTM", type="sentence_transformers.models.LSTM"))
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(ValueError, match="has a module 'sentence_transformers.models.LSTM': it is not known here"):
        SentenceEmbedder.from_pretrained(tmp_path)


@pytest.mark.parametrize("dtype", ["auto", "bf16", "int8"])
def test_a_dtype_of_products_is_not_that_of_the_weights(dtype, tmp_path, monkeypatch):
    """Read, encode, save: close to fp32, weights to the bit; a text gives the same vector in any batch."""
    monkeypatch.setattr(low_precision, "gain", lambda dtype: 2.0)
    model = embedder()
    model.save_pretrained(tmp_path / "a")
    low = SentenceEmbedder.from_pretrained(tmp_path / "a", dtype=dtype)
    assert low.encoder.products == ("bf16" if dtype == "auto" else dtype)
    expected, got = model.encode(TEXTS), low.encode(TEXTS)
    assert (expected * got).sum(1).min() > 0.99 and abs(expected - got).max() > 1e-5
    alone = np.stack([low.encode(text) for text in TEXTS])
    np.testing.assert_allclose(alone, got, atol=1e-5 if dtype == "int8" else 1e-2)
    low.save_pretrained(tmp_path / "b")
    assert (tmp_path / "a/model.safetensors").read_bytes() == (tmp_path / "b/model.safetensors").read_bytes()
