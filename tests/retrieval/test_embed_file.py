"""Vectors of files are those of `encode`, in the order of the rows, in every form, after every interruption."""

import contextlib
import json

import numpy as np
import pytest
from click.testing import CliRunner
from labelled import sentences, write_csv, write_jsonl

from fastbert.cli import main
from fastbert.model.sentences import SentenceEmbedder
from fastbert.retrieval import embedding
from fastbert.retrieval.embedding import embed_file, load_embedder, quantized, restored
from fastbert.tasks import prediction_files

TEXTS = [text * (number % 4 + 1) for number, (text, _) in enumerate(sentences(29))] + ["", "a"]


def call(*arguments):
    return CliRunner().invoke(main, [str(argument) for argument in arguments], prog_name="fastbert")


@pytest.fixture
def model(directory):
    return load_embedder(directory, device="cpu")


@pytest.fixture
def lines(tmp_path):
    (tmp_path / "in.txt").write_text("\n".join(TEXTS) + "\n")
    return tmp_path / "in.txt"


@pytest.fixture
def small_parts(monkeypatch):
    monkeypatch.setattr(prediction_files, "PART", 8)
    monkeypatch.setattr(embedding, "CHUNK", 5)


def read(directory):
    return np.concatenate([np.load(path) for path in sorted(directory.glob("part-*.npy"))])


def test_rows_keep_their_order(model, lines, tmp_path, small_parts):
    wanted = model.encode(TEXTS)
    for tokens in (40, 8192):
        manifest = embed_file(model, lines, tmp_path / "out", tokens_per_batch=tokens)
        assert [len(np.load(path)) for path in sorted((tmp_path / "out").glob("part-*.npy"))] == [8, 8, 8, 7]
        np.testing.assert_allclose(read(tmp_path / "out"), wanted, atol=1e-5)
    assert json.loads((tmp_path / "out" / "manifest.json").read_text()) == manifest
    assert (manifest["count"], manifest["width"], manifest["prompt"]) == (31, 32, "")
    assert not [*tmp_path.glob("*.partial*")] and np.abs(np.diff(wanted, axis=0)).max(1).min() > 0.01


def test_the_command_line(directory, tmp_path):
    """A prompt, fewer columns, a table with ids, parquet."""
    pq = pytest.importorskip("pyarrow.parquet")
    path = write_csv(tmp_path / "in.csv", [(f"r{i}", text) for i, text in enumerate(TEXTS)], ("id", "words"))
    output = tmp_path / "out.parquet"
    command = ("embed", "--model", directory, "--input", path, "--output", output, "--text-column", "words")
    result = call(*command, "--prompt", "query", "--truncate-dim", 7, "--normalize", "--precision", "float16")
    assert result.exit_code == 0 and "31 vectors of 7 numbers, float16" in result.stdout, result.output
    found = pq.read_table(output).to_pydict()
    assert found["id"] == [f"r{i}" for i in range(31)]
    wanted = SentenceEmbedder.from_pretrained(directory, truncate_dim=7).encode(
        TEXTS, prompt_name="query", normalize_embeddings=True
    )
    np.testing.assert_allclose(np.array(found["vector"], np.float32), wanted, atol=1e-3)
    assert json.loads((output / "_manifest.json").read_text())["prompt"] == "the cat "


@pytest.mark.parametrize("kind", ["npy", "parquet"])
def test_an_interrupted_file_goes_on(kind, model, lines, tmp_path, monkeypatch, small_parts):
    """What is whole stays, a broken part is made again, and the vectors and ranges are those of one run."""
    if kind == "parquet":
        pytest.importorskip("pyarrow")
    end, name = (".parquet", "part-00001.parquet") if kind == "parquet" else ("", "part-00001.npy")
    whole, output = tmp_path / f"whole{end}", tmp_path / f"out{end}"
    embed_file(model, lines, whole, precision="int8")
    real, calls = model.encode, []

    def interrupted(texts, **options):
        calls.append(len(texts))
        # the width, seven chunks for the ranges, then those of the file
        if len(calls) == 13:
            raise KeyboardInterrupt
        return real(texts, **options)

    with monkeypatch.context() as patched, contextlib.suppress(KeyboardInterrupt):
        patched.setattr(model, "encode", interrupted)
        embed_file(model, lines, output, precision="int8")
    partial = tmp_path / f"out{end}.partial"
    parts = sorted(partial.glob("part-*"))
    assert len(parts) == 2 and parts[1].name == name and not output.exists()
    # as if the disk had lost the end of one
    parts[1].write_bytes(parts[1].read_bytes()[:-9])
    first = parts[0].stat().st_mtime_ns
    embed_file(model, lines, output, precision="int8")
    for path in sorted(whole.iterdir()):
        if path.suffix == ".npy":
            # batches of other texts round otherwise
            assert np.abs(np.load(path).astype(float) - np.load(output / path.name)).max() <= 1
    assert (output / parts[0].name).stat().st_mtime_ns == first and len([*output.iterdir()]) == len([*whole.iterdir()])
    # another prompt is another run
    (output / parts[0].name).replace(tmp_path / "kept")
    assert embed_file(model, lines, output, precision="int8", prompt_name="query")["prompt"] == "the cat "


def test_precisions_are_those_of_sentence_transformers(model, lines, tmp_path):
    theirs = pytest.importorskip("sentence_transformers.util.quantization")
    wanted = model.encode(TEXTS, tokens_per_batch=8192)
    for precision, error in (("int8", 0.02), ("ubinary", 2.0)):
        embed_file(model, lines, tmp_path / precision, precision=precision)
        found = read(tmp_path / precision)
        assert found.dtype == (np.int8 if precision == "int8" else np.uint8)
        np.testing.assert_array_equal(found, theirs.quantize_embeddings(wanted, precision))
        ranges = np.load(tmp_path / "int8" / "ranges.npy")
        back = restored(found, ranges, 32)
        assert np.abs(back - wanted).max() < error and (np.sign(back) == np.sign(wanted))[np.abs(wanted) > 0.02].all()
    # ranges of other vectors: values beyond them are cut, and a constant column divides by nothing
    ranges[:, 0] = wanted[0, 0]
    np.save(tmp_path / "ranges.npy", ranges / 2)
    embed_file(model, lines, tmp_path / "cut", precision="int8", ranges=tmp_path / "ranges.npy")
    np.testing.assert_array_equal(read(tmp_path / "cut"), theirs.quantize_embeddings(wanted, "int8", ranges=ranges / 2))
    assert quantized(np.full((1, 32), 9.0), "int8", ranges)[0, 1:].min() == 127


def test_int8_ranges_come_from_the_whole_file(model, tmp_path, monkeypatch):
    """Not from its beginning: the last texts are unlike the first."""
    (tmp_path / "in.txt").write_text("cat\n" * 60 + "dog guards sheep\n" * 60)
    monkeypatch.setattr(embedding, "CALIBRATION", 20)
    embed_file(model, tmp_path / "in.txt", tmp_path / "out", precision="int8")
    both = model.encode(["cat", "dog guards sheep"])
    np.testing.assert_allclose(np.load(tmp_path / "out" / "ranges.npy"), np.sort(both, axis=0), atol=1e-5)


def test_documents_of_beir_are_title_and_text(model, tmp_path):
    rows = [{"_id": 7, "title": "the dog", "text": "guards"}, {"_id": "b", "title": "", "text": " sheep "},
            {"_id": "c", "title": None, "text": "nests"}]  # fmt: skip
    said = []
    embed_file(model, write_jsonl(tmp_path / "in.jsonl", rows), tmp_path / "out", say=said.append)
    assert "a text is 'title' + 'text'" in said[0]
    np.testing.assert_allclose(read(tmp_path / "out"), model.encode(["the dog guards", "sheep", "nests"]), atol=1e-5)


@pytest.mark.parametrize(
    ("content", "options", "error"),
    [
        ('{"text": "a"}\n{"text": null}\n', {}, "in.jsonl line 2: 'text' is 'None': expected text"),
        ('{"words": "a"}\n', {}, "has no column 'text': it has 'words'; name another with --text-column"),
        ('{"text": "a", "id": 1.5}\n', {}, "line 1: 'id' is '1.5': expected an id"),
        ("", {}, "in.jsonl has no rows"),
        ('{"text": "a"}\n', {"prompt_name": "passage"}, "--prompt is 'passage': expected one of 'query', 'document'"),
        ('{"text": "a"}\n', {"precision": "int4"}, "precision is 'int4': expected one of float32"),
        ('{"text": "a"}\n', {"ranges": "x.npy"}, "ranges go with the precision int8, not float32"),
        ('{"text": "a"}\n', {"ranges": "x.npy", "precision": "int8"}, "x.npy is no array of ranges"),
    ],
)
def test_what_is_wrong_ends_it_before_any_work(content, options, error, model, tmp_path):
    (tmp_path / "in.jsonl").write_text(content)
    with pytest.raises(ValueError, match=error):
        embed_file(model, tmp_path / "in.jsonl", tmp_path / "out", **options)
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


def test_other_directories(encoder, directory, tmp_path, lines):
    with pytest.warns(UserWarning, match="has no modules.json: it was not trained to embed"):
        load_embedder(encoder, device="cpu")
    with pytest.raises(FileNotFoundError, match="no model in"):
        load_embedder(tmp_path)
    result = call("embed", "--model", directory, "--input", lines, "--output", tmp_path, "--truncate-dim", 33)
    assert result.exit_code == 2 and "truncate_dim is 33" in result.stderr and result.stderr.count("\n") == 1
    result = call("embed", "--model", directory, "--input", lines, "--output", tmp_path)
    assert result.exit_code == 2 and "holds in.txt: expected a new directory" in result.stderr, result.output


def test_a_vector_that_is_not_finite(model, lines, tmp_path):
    model.encoder.embeddings.word.weight.data[model.tokenizer.token_to_id("dog")] = np.nan
    number = next(i for i, text in enumerate(TEXTS, 1) if "dog" in text)
    with pytest.raises(ValueError, match=f"in.txt line {number} is not finite"):
        embed_file(model, lines, tmp_path / "out")
