"""Retrieval models in training: losses as sentence-transformers', false negatives, gradient caching, files."""

import math

import pytest
import torch
from helpers import packed_batch
from labelled import losses_of, small_encoder, tokenizer_of

from fastbert.model.config import EncoderConfig
from fastbert.model.retrieval import Objective, TrainedEmbedder, false_negatives
from fastbert.model.sparse import TrainedSparseEncoder
from fastbert.tasks import embed
from fastbert.tasks.examples import Example, Pieces, Spec, batch_of

ANIMALS = {"cat": "chases mice in dark barns", "dog": "guards sheep on green hills", "bird": "builds nests"}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("retrieval")
    small_encoder(place, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    return place


def rows(kind, count=8):
    """(texts, gold) of `count` examples, all different."""
    names = [*ANIMALS]
    for i in range(count):
        name, other = names[i % 3], names[(i + 1) % 3]
        texts = (f"the {name} in year {i}", f"in year {i} it {ANIMALS[name]}")
        if kind == "pairs":
            texts += (f"in year {i} it {ANIMALS[other]}", f"every day {i} it {ANIMALS[other]} here")
        yield texts, {"scored": i % 4 / 4, "labelled": names[i % 3], "pairs": None}[kind]


# loss -> (class of sentence-transformers, its options, kind of rows, our options)
LOSSES = {
    "contrastive": ("MultipleNegativesRankingLoss", {}, "pairs", {}),
    "contrastive, scale 50": ("MultipleNegativesRankingLoss", dict(scale=50.0), "pairs", dict(scale=50.0)),
    "contrastive, widths": ("MultipleNegativesRankingLoss", {}, "pairs", dict(widths=(8, 32))),
    "symmetric": ("MultipleNegativesSymmetricRankingLoss", {}, "pairs", {}),
    "margin": ("MarginMSELoss", {}, "pairs", {}),
    "cosent": ("CoSENTLoss", {}, "scored", {}),
    "cosine": ("CosineSimilarityLoss", {}, "scored", {}),
    "softmax": ("SoftmaxLoss", dict(sentence_embedding_dimension=32, num_labels=3), "labelled", dict(labels=3)),
}


@pytest.mark.parametrize("name", LOSSES)
def test_losses_are_those_of_sentence_transformers(name, place, steps=8):
    """From the same weights, on the same rows, step by step, with the same optimizer."""
    st = pytest.importorskip("sentence_transformers")
    theirs_name, options, kind, ours = LOSSES[name]
    loss_name = name.partition(",")[0]
    objective = Objective(loss_name, **{"scale": 20.0} | ours)
    model = TrainedEmbedder.start(
        place / "encoder", EncoderConfig(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0), objective=objective
    ).train()
    their_model = st.SentenceTransformer(str(place / "encoder"), device="cpu").train()
    theirs = getattr(st.sentence_transformer.losses, theirs_name)(their_model, **options)
    if loss_name == "softmax":
        theirs.classifier.load_state_dict(model.classifier.state_dict())
    if "widths" in ours:
        theirs = st.sentence_transformer.losses.MatryoshkaLoss(their_model, theirs, [*ours["widths"]])
    spec = Spec("embed", tuple(sorted(ANIMALS)), max_length=32, stride=0, truncate=True, settings={"loss": loss_name})
    examples = [Example(i, texts, gold, more={"kind": kind}) for i, (texts, gold) in enumerate(rows(kind))]
    labels = torch.tensor([0.0])
    if kind == "scored":
        labels = torch.tensor([example.gold for example in examples])
    elif kind == "labelled":
        labels = torch.tensor([spec.index[example.gold] for example in examples])
    elif loss_name == "margin":
        labels = torch.randn(len(examples), 3, generator=torch.Generator().manual_seed(0))
        for example, scores in zip(examples, labels.tolist(), strict=True):
            example.gold = scores
    batch = batch_of(embed.encode(examples, Pieces(tokenizer_of(place), spec), spec))
    features = [
        {key: value for key, value in their_model.tokenize(list(column)).items() if torch.is_tensor(value)}
        for column in zip(*(example.texts for example in examples), strict=True)
    ]
    found = [
        losses_of(model, lambda: model(batch).loss, steps),
        losses_of(theirs, lambda: theirs([dict(feature) for feature in features], labels), steps),
    ]
    assert found[0] == pytest.approx(found[1], rel=1e-4, abs=1e-5)
    assert found[0][-1] < 0.95 * found[0][0]


@pytest.mark.parametrize("name", ["contrastive", "margin"])
def test_sparse_losses_are_those_of_sentence_transformers(name, place, steps=8):
    """With the regulariser of queries and documents."""
    st = pytest.importorskip("sentence_transformers")
    losses = st.sparse_encoder.losses
    objective = Objective(name, scale=1.0, similarity="dot", flops=0.01)
    config = EncoderConfig(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    model = TrainedSparseEncoder.start(place / "encoder", config, objective=objective).train()
    their_model = st.SparseEncoder(str(place / "encoder"), device="cpu").train()
    base = {"contrastive": losses.SparseMultipleNegativesRankingLoss, "margin": losses.SparseMarginMSELoss}[name]
    theirs = losses.SpladeLoss(their_model, base(their_model), 0.01, 0.01)
    spec = Spec("sparse", (), max_length=32, stride=0, truncate=True, settings={"loss": name})
    examples = [Example(i, texts, None, more={"kind": "pairs"}) for i, (texts, _) in enumerate(rows("pairs"))]
    labels = torch.randn(len(examples), 3, generator=torch.Generator().manual_seed(0))
    if name == "margin":
        for example, scores in zip(examples, labels.tolist(), strict=True):
            example.gold = scores
    batch = batch_of(embed.encode(examples, Pieces(tokenizer_of(place), spec), spec))
    features = [
        {key: value for key, value in their_model.tokenize(list(column)).items() if torch.is_tensor(value)}
        for column in zip(*(example.texts for example in examples), strict=True)
    ]
    found = [
        losses_of(model, lambda: model(batch).loss, steps),
        losses_of(theirs, lambda: sum(theirs([dict(one) for one in features], labels).values()), steps),
    ]
    assert found[0] == pytest.approx(found[1], rel=1e-4, abs=1e-5)
    assert found[0][-1] < found[0][0]


def test_false_negatives():
    """Pairs of queries and documents that a batch must not punish; see the rows."""
    queries = ["depth", "Orm depth", "bank", "bank", "rain", "DEPTH"]
    documents = ["90 m", "90 m", "Ada", "by Ada", "none", "deep", "90 m", "Ada of Fen"]
    numbers = {text: i for i, text in enumerate(dict.fromkeys(queries + documents))}
    found = false_negatives(*([numbers[text] for text in texts] for texts in (queries, documents)))
    # two queries with one document, one query with two documents, and a negative that is right; not another spelling
    assert sorted(map(tuple, found.tolist())) == [(0, 1), (0, 6), (1, 0), (1, 6), (2, 3), (3, 2)]
    assert false_negatives([1, 2], [3, 4, 5]) is None


def retrieval_batch(texts=3, rows=4):
    batch = packed_batch([5, 3, 7, 2, 6, 1, 4, 9, 3, 2, 8, 5][: texts * rows], vocab_size=60)
    batch.labels = batch.picks = None
    batch.cu_examples = torch.arange(0, texts * rows + 1, texts, dtype=torch.int32)
    batch.targets = torch.arange(texts * rows)
    return batch


def small_model(dropout, **objective):
    torch.manual_seed(0)
    config = EncoderConfig(
        vocab_size=60, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
        max_position_embeddings=16, hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout,
    )  # fmt: skip
    return TrainedEmbedder(config, objective=Objective("contrastive", **objective)).train()


def gradients(model, batch):
    model.zero_grad()
    loss = model(batch).loss
    loss.backward()
    return loss.item(), [p.grad.clone() for p in model.parameters() if p.grad is not None]


def test_gradient_caching_is_one_pass(monkeypatch):
    """In parts of few tokens: the loss and the gradients of the whole batch."""
    model, batch = small_model(0.0), retrieval_batch()
    loss, whole = gradients(model, batch)
    model.tokens_per_pass = 12
    cached, parts = gradients(model, batch)
    assert cached == pytest.approx(loss, abs=1e-6)
    for one, other in zip(whole, parts, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-4)


def test_gradient_caching_replays_dropout():
    """The gradient is that of the masks which the loss saw: along it the loss, drawn again, falls as it says."""
    model, batch = small_model(0.3), retrieval_batch()
    batch.seed = torch.tensor([2**40 + 5])
    model.tokens_per_pass = 12
    first, found = gradients(model, batch)
    again, repeated = gradients(model, batch)
    assert first == again and all(map(torch.equal, found, repeated))
    parameters, step = [p for p in model.parameters() if p.grad is not None], 1e-5
    with torch.no_grad():
        losses = []
        for sign in (1, -1):
            for p, g in zip(parameters, found):
                p += sign * step * g
            # with gradients the batch comes in parts, whose dropout is another than that of the whole
            with torch.enable_grad():
                losses.append(model(batch).loss.item())
            for p, g in zip(parameters, found):
                p -= sign * step * g
    slope = (losses[0] - losses[1]) / (2 * step)
    assert slope == pytest.approx(sum((g**2).sum().item() for g in found), rel=0.01)


def test_zero_vectors_and_rows_alone_are_defined():
    """A zero vector is like nothing; a batch without another document, or with equal ones alone, has the loss 0."""
    model = small_model(0.0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "feed_forward_norm" in name:
                parameter.zero_()
    batch = retrieval_batch(2, 1)
    assert gradients(model, batch)[0] == 0.0
    batch = retrieval_batch(2, 3)
    assert gradients(model, batch)[0] == pytest.approx(3 * math.log(3) / 3, abs=1e-5)
    batch.targets = torch.tensor([1, 7, 2, 7, 3, 7])
    loss, found = gradients(model, batch)
    assert loss == 0.0 and all(torch.isfinite(g).all() for g in found)


def test_widths_beyond_the_model_are_refused():
    with pytest.raises(ValueError, match="--widths has 17: expected 1 to 16"):
        small_model(0.0, widths=(8, 17))
