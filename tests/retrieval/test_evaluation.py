"""Scores of folders and of STS files are those of plain computations and of sentence-transformers; what is wrong is
said in a line."""

import json

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from labelled import WORDS, write_csv, write_jsonl

from fastbert import load
from fastbert.cli import main
from fastbert.model.heads import SequenceClassifier
from fastbert.retrieval import embedding, folders
from fastbert.retrieval.embedding import load_embedder
from fastbert.retrieval.evaluation import evaluate_embedder, evaluate_reranker

ANIMALS = [*WORDS]
DOCUMENTS = {
    f"d{i}": (f"the {name}" if i % 2 else "", f"{WORDS[name]} in year {i}")
    for i, name in enumerate(ANIMALS * 6)
}  # fmt: skip
QUERIES = {f"q{i}": f"the {name} of year {i}" for i, name in enumerate(ANIMALS)}
GRADES = {
    f"q{i}": {f"d{j}": 1 for j, (_, text) in enumerate(DOCUMENTS.values()) if WORDS[name] in text}
    for i, name in enumerate(ANIMALS)
}


def call(*arguments):
    return CliRunner().invoke(main, [str(argument) for argument in arguments], prog_name="fastbert")


def write_folder(place, documents=None, queries=None, qrels=None):
    (place / "qrels").mkdir(parents=True)
    rows = [{"_id": name, "title": title, "text": text} for name, (title, text) in DOCUMENTS.items()]
    write_jsonl(place / "corpus.jsonl", rows if documents is None else documents)
    rows = [{"_id": name, "text": text} for name, text in QUERIES.items()]
    write_jsonl(place / "queries.jsonl", rows if queries is None else queries)
    lines = [f"{query}\t{document}\t{grade}" for query, own in GRADES.items() for document, grade in own.items()]
    text = "query-id\tcorpus-id\tscore\n" + "\n".join(lines) + "\n" if qrels is None else qrels
    (place / "qrels" / "test.tsv").write_bytes(text.encode())
    return place


@pytest.fixture
def folder(tmp_path):
    return write_folder(tmp_path / "beir")


@pytest.fixture
def model(directory):
    return load_embedder(directory, device="cpu")


def test_scores_are_those_of_sentence_transformers(directory, model, folder, monkeypatch):
    theirs = pytest.importorskip("sentence_transformers")
    from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator

    monkeypatch.setattr(embedding, "CHUNK", 5)
    found = evaluate_embedder(model, folder)
    corpus = {name: " ".join(part for part in parts if part) for name, parts in DOCUMENTS.items()}
    evaluator = InformationRetrievalEvaluator(
        QUERIES, corpus, {name: {*own} for name, own in GRADES.items()}, precision_recall_at_k=[1, 10, 100]
    )
    wanted = evaluator(theirs.SentenceTransformer(str(directory), device="cpu"))
    assert found["scores"] == pytest.approx({name: wanted[f"cosine_{name}"] for name in found["scores"]}, abs=1e-6)
    assert found["prompts"] == {"query": "query", "document": "document"} and found["remarks"] == []
    assert 0.05 < found["scores"]["ndcg@10"] < 0.95 and (found["queries"], found["documents"]) == (3, 18)


def test_the_command_line_and_reranking(directory, encoder, folder, tmp_path):
    """The run that one command writes is what the other orders; pairs have the scores of sentence-transformers."""
    result = call("evaluate", "--model", directory, "--input", folder, "--output-dir", tmp_path / "dense")
    assert result.exit_code == 0, result.output
    dense = json.loads(result.stdout)
    assert dense["task"] == "embed" and dense == json.loads((tmp_path / "dense" / "metrics.json").read_text())
    rows = [json.loads(line) for line in (tmp_path / "dense" / "queries.jsonl").read_text().splitlines()]
    assert dense["scores"]["map@100"] == pytest.approx(np.mean([row["map@100"] for row in rows]))

    torch.manual_seed(5)
    with pytest.warns(UserWarning, match="start fresh"):
        cross = SequenceClassifier.from_pretrained(encoder, num_labels=1, labels=None)
    with torch.no_grad():
        for parameter in cross.parameters():
            parameter.normal_(std=0.4)
    place = tmp_path / "cross"
    cross.save_pretrained(place)
    for path in encoder.iterdir():
        if not (place / path.name).exists():
            (place / path.name).write_bytes(path.read_bytes())
    run = tmp_path / "dense" / "run.trec"
    result = call("evaluate", "--model", place, "--input", folder, "--candidates", run, "--output-dir", tmp_path / "re")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["task"] == "rerank" and found["pairs"] == 54
    assert found["candidates"]["scores"] == pytest.approx(dense["scores"])
    # 100 documents are more than there are: the same candidates
    again = evaluate_reranker(load(place, device="cpu"), folder, load_embedder(directory, device="cpu"))
    assert again["scores"] == found["scores"] != dense["scores"]

    theirs = pytest.importorskip("sentence_transformers").CrossEncoder(str(place), device="cpu")
    corpus = {name: " ".join(part for part in parts if part) for name, parts in DOCUMENTS.items()}
    for query, ranking in folders.read_run(tmp_path / "re" / "run.trec").items():
        wanted = theirs.predict([(QUERIES[query], corpus[name]) for name in ranking], activation_fn=torch.nn.Identity())
        assert (np.diff(wanted) < 1e-5).all() and np.ptp(wanted) > 0.01

    for arguments, error in (
        (("--task", "rerank"), "--task rerank needs --candidates"),
        (("--candidates", tmp_path / "no"), "no such file or folder"),
        (("--candidates", run, "--input", folder), "--input names 2 paths: expected one"),
    ):
        result = call("evaluate", "--model", place, "--input", folder, *arguments)
        assert result.exit_code == 2 and error in result.stderr and result.stderr.count("\n") == 1, result.output
    run.write_text("q0\tQ0\td1\t1\t0.5\tx\nq0\tQ0\tnone\t2\t0.4\tx\n")
    said = []
    found = evaluate_reranker(load(place, device="cpu"), folder, run, say=said.append)
    assert found["pairs"] == 1 and found["scores"]["recall@100"] < 0.1
    assert "1 documents are not in the corpus" in said[0] and "2 queries have no candidates" in said[1]


def test_pairs_with_a_score(model, tmp_path):
    """STS: the cosine of two texts, as `encode` gives it, against the gold scores; by columns and as GLUE has them."""
    stats = pytest.importorskip("scipy.stats")
    texts = [text for _, text in DOCUMENTS.values()]
    rows = [(one, other, str(i % 5)) for i, (one, other) in enumerate(zip(texts, texts[::-1]))]
    path = write_csv(tmp_path / "sts.csv", [*rows, ("", "a", "1")], ("sentence1", "sentence2", "score"))
    result = call("evaluate", "--model", model_directory(model, tmp_path), "--input", path)
    assert result.exit_code == 0 and "1 rows skipped" in result.stderr, result.output
    found = json.loads(result.stdout)
    cosines = (model.encode(texts) * model.encode(texts[::-1])).sum(1)
    gold = [float(row[2]) for row in rows]
    assert found["scores"]["spearman"] == pytest.approx(stats.spearmanr(gold, cosines).statistic, abs=1e-6)
    assert found["scores"]["pearson"] == pytest.approx(stats.pearsonr(gold, cosines).statistic, abs=1e-5)
    assert found["pairs"] == 18 and found["intervals"]["pearson"][0] < found["scores"]["pearson"]
    path = write_csv(tmp_path / "one.csv", [("a", "1")], ("text", "score"))
    with pytest.raises(ValueError, match="name the columns of both with --text-column"):
        evaluate_embedder(model, path)


def model_directory(model, place):
    model.save_pretrained(place / "model")
    return place / "model"


def test_a_document_of_the_query_s_own_id(model, tmp_path):
    """It is left out as in BEIR; but not where it is judged for the query, or on request."""
    rows = [{"_id": name, "text": text} for name, text in (*QUERIES.items(), ("d1", "sheep"))]
    folder = write_folder(tmp_path / "a", rows, qrels="q0\td1\t1\nq1\td1\t1\nq1\tq1\t2\n")
    said = []
    found = evaluate_embedder(model, folder, say=said.append)
    kept = evaluate_embedder(model, folder, keep_self=True)
    assert found["own_id_left_out"] == 1 and kept["own_id_left_out"] == 0
    assert any("1 queries found the document of their own id" in line for line in said)
    assert found["scores"]["mrr@10"] > kept["scores"]["mrr@10"] and found["scores"]["recall@100"] == 1


@pytest.mark.parametrize(
    "qrels",
    [
        "query-id\tcorpus-id\tscore\nq0\t7\t1\nq1\td 2\t2\n", "q0\t7\t1\r\nq1\td 2\t2\r\n",
        "\ufeffq0\t0\t7\t1\nq1\t0\td 2\t2\n\n", "qid\titer\tdocid\trel\nq0\t0\t7\t1.0\nq1\t0\td 2\t2",
    ],
)  # fmt: skip
def test_forms_of_qrels(qrels, tmp_path):
    """Three and four columns, with and without a header, BOM and CRLF; ids that are numbers or have blanks."""
    documents = [{"_id": 7, "text": "a"}, {"_id": "d 2", "title": None, "text": "b"}]
    found = folders.read_folder(write_folder(tmp_path / "a", documents, qrels=qrels))
    assert found.grades == {"q0": {"7": 1.0}, "q1": {"d 2": 2.0}} and found.documents == ["7", "d 2"]
    assert found.remarks == ["1 queries without a relevant document are left out, such as 'q2'"]
    assert [text for *_, text in found.corpus()] == ["a", "b"]


def test_what_is_odd_is_counted(model, tmp_path):
    documents = [{"_id": "d1", "text": "cat"}, {"_id": "d2", "text": ""}]
    queries = [{"_id": "q1", "text": ""}, {"_id": "q2", "text": "dog"}, {"_id": "q3", "text": "dog"}]
    qrels = "q1 d1 1\nq1 gone 1\nq2 d1 0\nother d1 1\n"
    said = []
    found = evaluate_embedder(model, write_folder(tmp_path / "a", documents, queries, qrels), say=said.append)
    assert [line.partition(": ")[2] for line in said] == found["remarks"] == [
        "1 queries of test.tsv are not in queries.jsonl: left out, such as 'other'",
        "1 documents of test.tsv are not in corpus.jsonl, such as 'gone'",
        "2 queries without a relevant document are left out, such as 'q2'",
        "1 queries are empty, and searched as any other, such as 'q1'", "1 documents are empty",
    ]  # fmt: skip
    assert found["queries"] == 1 and found["scores"]["recall@100"] == 0.5


@pytest.mark.parametrize(
    ("documents", "queries", "qrels", "error"),
    [
        ([], None, None, "corpus.jsonl has no documents"),
        ([{"text": "a"}], None, None, "corpus.jsonl line 1: '_id' is 'None': expected an id"),
        ([{"_id": "a", "text": "x"}, {"_id": "a", "text": "y"}], None, None, "line 2: the id 'a' is there twice"),
        ([{"_id": "a", "text": None}], None, None, "line 1: 'text' is 'None': expected text"),
        (None, [{"_id": 1, "text": "x"}, {"_id": "1", "text": "y"}], None, "line 2: the id '1' is there twice"),
        (None, None, "other\td1\t1\n", "test.tsv: none of its 1 queries is in .*queries.jsonl"),
        (None, None, "q1\tother\t1\n", "test.tsv: none of its 1 documents is in .*corpus.jsonl"),
        (None, None, "q1\td1\t0\n", "no query of .* has a relevant document"),
        (None, None, "q1\td1\n", "test.tsv line 1 has 2 columns: expected query, document, grade"),
        (None, None, "q1\td1\t1\nq1\td2\tyes\n", "test.tsv line 2 is .*: expected 3 columns, the last a grade"),
        (None, None, "q1\td1\t1\nq1\td1\t2\n", "line 2: 'd1' has two grades for 'q1'"),
        (None, None, "", "test.tsv has no rows"),
    ],
)
def test_what_is_wrong_with_a_folder(documents, queries, qrels, error, tmp_path):
    place = write_folder(tmp_path / "a", documents, queries, qrels)
    with pytest.raises(ValueError, match=error):
        folders.read_folder(place)


def test_what_a_folder_lacks(folder, tmp_path, directory):
    (folder / "qrels" / "test.tsv").rename(folder / "qrels" / "dev.tsv")
    assert len(folders.read_folder(folder).queries) == 3
    (folder / "qrels" / "train.tsv").write_text("q0\td1\t1\n")
    with pytest.raises(ValueError, match="qrels has dev.tsv, train.tsv: expected test.tsv"):
        folders.read_folder(folder)
    (folder / "queries.jsonl").unlink()
    result = call("evaluate", "--model", directory, "--input", folder)
    assert result.exit_code == 2 and "has no queries.jsonl: expected a folder of BEIR" in result.stderr, result.output
    with pytest.raises(ValueError, match="run line 1 is 'q0 d1 0.5': expected query, Q0, document"):
        (tmp_path / "run").write_text("q0 d1 0.5")
        folders.read_run(tmp_path / "run")


def test_a_model_that_gives_nan(model, folder):
    model.encoder.embeddings.word.weight.data[model.tokenizer.token_to_id("dog")] = np.nan
    with pytest.raises(ValueError, match="the vector of query 'q1' is not finite"):
        evaluate_embedder(model, folder)
