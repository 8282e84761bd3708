"""Losses of a reranker as sentence-transformers', on rows of different lengths."""

import pytest
import torch
from labelled import losses_of, small_encoder, tokenizer_of

from fastbert.model.heads import SequenceClassifier
from fastbert.model.reranking import OBJECTIVES
from fastbert.tasks import rerank
from fastbert.tasks.examples import Example, Pieces, Spec, batch_of

# loss -> (class of sentence-transformers, how many documents its rows have)
LOSSES = {
    "binary": ("BinaryCrossEntropyLoss", (2, 4, 3)), "listwise": ("ListNetLoss", (2, 4, 3)),
    "margin": ("MarginMSELoss", (3, 3, 3)),
}  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("reranking")
    small_encoder(place, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, num_labels=1)
    torch.manual_seed(0)
    model = SequenceClassifier.from_pretrained(place / "encoder", num_labels=1)
    model.save_pretrained(place / "encoder")
    return place


@pytest.mark.filterwarnings("ignore:.*these start fresh")
@pytest.mark.parametrize("name", LOSSES)
def test_losses_are_those_of_sentence_transformers(name, place, steps=8):
    st = pytest.importorskip("sentence_transformers")
    theirs_name, sizes = LOSSES[name]
    model = SequenceClassifier.from_pretrained(place / "encoder").train()
    model.objective = OBJECTIVES[name]
    their_model = st.CrossEncoder(str(place / "encoder"), device="cpu").train()
    theirs = getattr(st.cross_encoder.losses, theirs_name)(their_model)
    documents = ["it builds nests", "it chases mice in dark barns", "every day the dog guards sheep", "in year 7"]
    examples, golds = [], []
    for i, size in enumerate(sizes):
        gold = [1.0] + [0.0] * (size - 1) if name != "margin" else [2.0 - i, 0.5, -1.0]
        golds.append(gold)
        examples.append(Example(i, (f"the bird in year {i}", *documents[:size]), gold))
    spec = Spec("rerank", (), max_length=32, stride=0, truncate=True, settings={"loss": name})
    batch = batch_of(rerank.encode(examples, Pieces(tokenizer_of(place), spec), spec))
    queries = [one.texts[0] for one in examples]
    if name == "binary":
        pairs = [(one.texts[0], text, label) for one, gold in zip(examples, golds) for text, label in
                 zip(one.texts[1:], gold)]  # fmt: skip
        arguments = [[pair[0] for pair in pairs], [pair[1] for pair in pairs]], torch.tensor([p[2] for p in pairs])
    elif name == "listwise":
        arguments = [queries, [list(one.texts[1:]) for one in examples]], [torch.tensor(gold) for gold in golds]
    else:
        arguments = [queries, *map(list, zip(*(one.texts[1:] for one in examples)))], torch.tensor(golds)
    found = [
        losses_of(model, lambda: model(batch).loss, steps), losses_of(theirs, lambda: theirs(*arguments), steps)
    ]  # fmt: skip
    assert found[0] == pytest.approx(found[1], rel=1e-4, abs=1e-5)
    assert found[0][-1] < found[0][0]
