"""Fine-tuning of retrieval models: what it learns, what sentence-transformers loads, resume to the bit."""

import json
import signal

import numpy as np
import pytest
import torch
from labelled import WORDS, write_jsonl
from runs import assert_same_tensors, stop_in

from fastbert.tasks import predictor
from fastbert.training import checkpoint, finetune
from fastbert.training.finetune import FinetuneConfig


def pairs(count):
    """The words of an animal in one year, asked for by the name and the year; negatives are of the next year."""
    names = [*WORDS]
    for i in range(count):
        name = names[i % 3]
        negatives = [f"in year {i + 1} it {WORDS[name]}"] * (i % 3)
        yield {"query": f"the {name} in year {i}", "positive": f"in year {i} it {WORDS[name]}", "negative": negatives}


@pytest.fixture
def options(encoder, tmp_path):
    return {
        "train_file": write_jsonl(tmp_path / "train.jsonl", pairs(60)), "model": encoder, "task": "embed",
        "output_dir": tmp_path / "run", "learning_rate": 3e-3, "max_steps": 12, "eval_steps": 6, "save_steps": 6,
        "logging_steps": 4, "save_total_limit": 5, "eval_share": 0.2, "patience": 99,
    }  # fmt: skip


def run(options, **changes):
    return finetune.finetune(FinetuneConfig(**options | changes))


def test_embed_learns_and_sentence_transformers_loads_it(options, capsys):
    """Prompts and pooling included; the scores are those that `evaluate` finds; a large batch comes in parts."""
    st = pytest.importorskip("sentence_transformers")
    directory = options["output_dir"]
    recipe = dict(prompts="e5", pooling="max", widths="8,32", tokens_per_batch=512, max_steps=30, eval_steps=15)
    metrics = run(options, task="auto", **recipe)
    assert metrics["metric"] == "mrr@10" and metrics["scores"]["mrr@10"] > 0.8
    model, texts = st.SentenceTransformer(str(directory), device="cpu"), ["the cat in year 3", "it builds", ""]
    assert model.prompts == {"query": "query: ", "document": "passage: "} and model.similarity_fn_name == "cosine"
    found = predictor.load(directory)
    queries, documents = model.encode_query(texts), model.encode_document(texts)
    cosines = [one["score"] for one in found.predict([(text, text) for text in texts])]
    norms = np.linalg.norm(queries, axis=1) * np.linalg.norm(documents, axis=1)
    np.testing.assert_allclose((queries * documents).sum(1) / norms, cosines, atol=1e-4)
    rows = [json.loads(line) for line in (directory / "predictions.jsonl").read_text().splitlines()]
    held = write_jsonl(directory / "held.jsonl", [{"query": q, "positive": p, "negative": n} for q, p, *n in
                                                  (row["texts"] for row in rows)])  # fmt: skip
    assert found.evaluate([str(held)])["scores"] == pytest.approx(metrics["scores"], abs=1e-6)
    assert "sentence-transformers" in (directory / "README.md").read_text()


def test_a_run_with_a_classifier_resumes_to_the_bit(options, monkeypatch):
    """The classifier of softmax stands beside the model, in every checkpoint."""
    names = ("contradiction", "neutral", "entailment")
    rows = [{"premise": one["query"], "hypothesis": one["positive"], "label": names[i % 3]}
            for i, one in enumerate(pairs(60))]  # fmt: skip
    write_jsonl(options["train_file"], rows)
    whole = options["output_dir"].with_name("whole")
    metrics = run(options, output_dir=whole)
    assert metrics["metric"] == "spearman" and metrics["scores"]["spearman"] is not None
    with monkeypatch.context() as patched:
        stop_in(patched, "accumulate", 8, script=finetune)
        assert run(options)["signal"] == signal.SIGTERM
    assert run(options, resume=True)["signal"] is None
    for name in (checkpoint.MODEL, checkpoint.OPTIMIZER, "loss/model.safetensors"):
        assert_same_tensors(*(one / "checkpoint-12" / name for one in (options["output_dir"], whole)))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"loss": "triplet"}, "--loss is 'triplet': expected one of contrastive, symmetric"),
        ({"widths": "8,40"}, "--widths has 40: expected 1 to 32"),
        ({"widths": "8,x"}, "--widths is '8,x': expected whole numbers"),
        ({"pooling": "middle"}, "pooling is 'middle'"),
        ({"score_range": "5"}, "--score-range is '5': expected two numbers"),
        ({"lora": "r=8"}, "--lora does not go with --task embed"),
        ({"class_weights": "balanced"}, "--class-weights does not go with --task embed"),
        ({"task": "classify", "loss": "cosine"}, "--loss goes with the tasks embed"),
        ({"task": "sparse", "widths": "8"}, "--widths does not go with --task sparse"),
        ({"flops_weight": 1.0}, "--flops-weight does not go with --task embed"),
        ({"batch_size": 1}, "compares the rows of a batch: expected at least two"),
    ],
)
def test_wrong_options_are_one_line(changes, said, options):
    if "lora" in changes:
        pytest.importorskip("peft")
    with pytest.raises(ValueError, match=said):
        run(options, **changes)


def test_a_run_does_not_depend_on_its_parts(options):
    """Gradient caching by a budget of tokens: the same parameters."""
    options |= {"dropout": 0.0, "eval_share": 0, "max_steps": 2}
    run(options)
    run(options, tokens_per_batch=40, output_dir=options["output_dir"].with_name("parts"))
    one, other = (predictor.load(options["output_dir"].with_name(name)).model.state_dict() for name in ("run", "parts"))
    for name, tensor in one.items():
        # AdamW divides by the root of tiny squares: a rounding difference may become 1e-4 of a step
        torch.testing.assert_close(tensor, other[name], atol=3e-6, rtol=1e-4, msg=name)


@pytest.mark.filterwarnings("ignore:.*these start fresh")
@pytest.mark.parametrize("loss", ["binary", "listwise"])
def test_rerank_learns_and_sentence_transformers_loads_it(loss, options):
    st = pytest.importorskip("sentence_transformers")
    names, rows = [*WORDS], []
    for i in range(80):
        name = names[i % 3]
        # what a tiny model can learn in a few steps: the positive is about mice
        row = {"query": f"the {name} in year {i}", "pos": [f"every day it {WORDS['cat']}"]}
        rows.append(row | {"neg": [f"every day it {WORDS[('dog', 'bird')[i % 2]]}"] * (i % 4 != 0)})
    write_jsonl(options["train_file"], rows)
    directory = options["output_dir"]
    metrics = run(options, task="rerank", loss=loss, max_steps=30, eval_steps=15)
    # rows without a negative teach nothing
    assert metrics["examples"] + metrics["train_examples"] == 60 and metrics["metric"] == "mrr@10"
    assert metrics["scores"]["mrr@10"] > 0.8
    pairs = [
        ("the cat in year 3", "every day it chases mice in dark barns"),
        ("the cat", "it builds nests"),
        ("a", "b"),
    ]
    ours = [one["score"] for one in predictor.load(directory).predict(pairs)]
    theirs = st.CrossEncoder(str(directory), device="cpu").predict(pairs)
    np.testing.assert_allclose(theirs, ours, atol=1e-4)
    assert ours[0] > ours[1]


def test_sparse_learns_and_sentence_transformers_loads_it(options):
    """A larger factor of the regulariser gives fewer words; a batch may come in parts."""
    st = pytest.importorskip("sentence_transformers")
    directory, texts = options["output_dir"], ["the cat in year 3", "it builds", ""]
    metrics = run(options, task="sparse", flops_weight=1e-3, max_steps=30, eval_steps=15, tokens_per_batch=400)
    assert metrics["metric"] == "mrr@10" and metrics["scores"]["mrr@10"] > 0.5
    model = st.SparseEncoder(str(directory), device="cpu")
    vectors = model.encode(texts, convert_to_tensor=True).to_dense()
    found = predictor.load(directory).predict([(one, other) for one, other in zip(texts, texts[1:])])
    wanted = [float(one @ other) for one, other in zip(vectors, vectors[1:])]
    assert [one["score"] for one in found] == pytest.approx(wanted, rel=1e-4, abs=1e-4)
    fewer = run(options, task="sparse", flops_weight=3.0, max_steps=30, eval_steps=30, output_dir=directory / "few")
    assert fewer["scores"]["words"] < 0.7 * metrics["scores"]["words"]


def test_sparse_needs_a_masked_lm_head(options, tmp_path):
    from fastbert import SentenceEmbedder

    SentenceEmbedder.from_pretrained(options["model"]).save_pretrained(tmp_path / "bare")
    with pytest.raises(ValueError, match="has no masked-LM head"):
        run(options, task="sparse", model=tmp_path / "bare")
