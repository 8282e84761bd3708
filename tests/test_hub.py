"""Names of models on the hub: from a cache as the hub's client lays it out, without network; and what goes wrong."""

import json
import shutil
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
from click.testing import CliRunner
from labelled import sentences, small_encoder, write_csv

import fastbert
from fastbert import hub
from fastbert.cli import main
from fastbert.data.tokenizer import load_tokenizer, tokenizer_hash
from fastbert.model.convert import convert

huggingface_hub = pytest.importorskip("huggingface_hub")
constants = pytest.importorskip("huggingface_hub.constants")

COMMITS = "a" * 40, "b" * 40
NAME = "some-org/tiny.model"


def put(cache, name, directory, commit, refs=("main",)):
    """A repository in a cache: blobs, links to them, and refs."""
    place = cache / f"models--{name.replace('/', '--')}"
    for path in (path for path in directory.rglob("*") if path.is_file()):
        inner = path.relative_to(directory)
        link, blob = place / "snapshots" / commit / inner, place / "blobs" / f"{commit}-{'-'.join(inner.parts)}"
        link.parent.mkdir(parents=True, exist_ok=True)
        blob.parent.mkdir(exist_ok=True)
        shutil.copyfile(path, blob)
        link.symlink_to(blob)
    for ref in refs:
        (place / "refs" / ref).parent.mkdir(parents=True, exist_ok=True)
        (place / "refs" / ref).write_text(commit)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return small_encoder(tmp_path_factory.mktemp("hub"))


@pytest.fixture
def cache(tmp_path, encoder, monkeypatch):
    """An empty directory for work, and a cache with two revisions of a model."""
    for constant, value in (("HF_HUB_CACHE", str(tmp_path / "cache")), ("HF_HUB_OFFLINE", True)):
        monkeypatch.setattr(constants, constant, value)
    put(tmp_path / "cache", NAME, encoder, COMMITS[0])
    other = shutil.copytree(encoder, tmp_path / "other")
    config = json.loads((other / "config.json").read_text()) | {"layer_norm_eps": 0.5}
    (other / "config.json").write_text(json.dumps(config))
    put(tmp_path / "cache", NAME, other, COMMITS[1], ["v1", "refs/pr/1"])
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "cache"


def call(*arguments):
    return CliRunner().invoke(main, [str(argument) for argument in arguments], prog_name="fastbert")


def fails(*arguments):
    result = call(*arguments)
    assert result.exit_code == 2 and result.stderr.count("\n") == 1, result.output
    return result.stderr


def test_models_and_tokenizers_by_name(cache, encoder):
    model = fastbert.MaskedLM.from_pretrained(NAME)
    for (name, one), other in zip(fastbert.MaskedLM.from_pretrained(encoder).named_parameters(), model.parameters()):
        assert (one == other).all(), name
    assert tokenizer_hash(load_tokenizer(NAME)) == tokenizer_hash(load_tokenizer(encoder))
    for revision in ("v1", "refs/pr/1", COMMITS[1]):
        assert fastbert.MaskedLM.from_pretrained(NAME, revision=revision).config.layer_norm_eps == 0.5
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert convert(NAME, "new", revision="v1").config.layer_norm_eps == 0.5


def test_a_directory_here_comes_before_a_name(cache, encoder):
    shutil.copytree(encoder, "some-org/tiny.model")
    assert hub.local(NAME).resolve() == (cache.parent / "work" / NAME)
    with pytest.raises(ValueError, match="the revision 'v1' goes with the name of a model on the hub"):
        fastbert.MaskedLM.from_pretrained(NAME, revision="v1")


def test_modules_in_folders(cache, encoder, tmp_path):
    """sentence-transformers' directories, with the encoder at the top or in a folder."""
    config = fastbert.MaskedLM.from_pretrained(encoder).config
    embedder = fastbert.SentenceEmbedder(config, load_tokenizer(encoder), dense=[(32, 8)])
    embedder.save_pretrained(tmp_path / "st")
    put(cache, "org/st", tmp_path / "st", COMMITS[0])
    listed = json.loads((tmp_path / "st" / "modules.json").read_text())
    assert {entry["path"] for entry in listed} == {"", "1_Pooling", "2_Dense", "3_Normalize"}
    inner = tmp_path / "st" / "0_Transformer"
    inner.mkdir()
    for path in [path for path in (tmp_path / "st").iterdir() if path.is_file() and "modules" not in path.name]:
        if path.name != "config_sentence_transformers.json":
            path.rename(inner / path.name)
    listed[0]["path"] = "0_Transformer"
    (tmp_path / "st" / "modules.json").write_text(json.dumps(listed))
    put(cache, "org/nested", tmp_path / "st", COMMITS[0])
    texts = [text for text, _ in sentences(3)]
    for name in ("org/st", "org/nested"):
        found = fastbert.SentenceEmbedder.from_pretrained(name).encode(texts)
        np.testing.assert_array_equal(found, embedder.encode(texts))


def test_every_command_takes_a_name(cache):
    rows = write_csv(cache / "rows.csv", sentences(30))
    options = ("--train-file", rows, "--max-steps", 1, "--eval-share", 0, "--output-dir", "run")
    result = call("finetune", "--model", NAME, *options)
    assert result.exit_code == 0 and f"--model {NAME}: commit {COMMITS[0]} of the hub" in result.stderr, result.output
    assert f"--model {NAME}" in (cache.parent / "work" / "run" / "README.md").read_text()
    put(cache, "me/run", cache.parent / "work" / "run", COMMITS[0])
    found = json.loads(call("predict", "--model", "me/run", "--text", "the cat").stdout)
    assert sorted(found["probabilities"]) == ["bird", "cat", "dog"]
    assert fastbert.load("me/run", revision=COMMITS[0]).spec.labels == ("bird", "cat", "dog")
    assert "accuracy" in call("evaluate", "--model", "me/run", "--input", rows).stdout
    assert "[MASK] 1" in call("fill-mask", "--model", NAME, "--revision", "v1", "the [MASK]").stdout
    (cache / "text.txt").write_text("\n\n".join(text for text, _ in sentences(60)))
    options = ("--train-file", cache / "text.txt", "--max-seq-length", 32, "--max-steps", 1, "--output-dir", "p")
    result = call("pretrain", "--model", NAME, *options)
    assert result.exit_code == 0 and COMMITS[0] in result.stderr, result.output
    result = call("prepare", "--tokenizer", NAME, "--train-file", cache / "text.txt", "--output-dir", "shards")
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ["--model", "some-org/tiny.modle"],
            "some-org/tiny.modle: no such directory, not in the hub's cache as a whole, and the hub is switched off",
        ),
        (["--model", NAME, "--revision", "v9"], f"{NAME}: no such directory, not at the revision 'v9' in the hub's"),
        (["--model", "tiny"], "no model in tiny: expected a folder"),
        (["--model", "tiny", "--revision", "v1"], "the revision 'v1' goes with the name of a model on the hub"),
        (["--model", "/no/such/place"], "no model in /no/such/place"),
        (["--model", "./some-org/tiny.model"], "no model in some-org/tiny.model"),
        (["--model", "org/pickled"], "org/pickled has no model.safetensors: of the hub's files only safetensors"),
    ],
    ids=["typo", "revision", "no-owner", "revision-of-a-path", "path", "dot", "pickle"],
)
def test_what_is_not_there(arguments, said, cache, encoder, tmp_path):
    shutil.copytree(encoder, tmp_path / "pickled")
    (tmp_path / "pickled" / "model.safetensors").rename(tmp_path / "pickled" / "pytorch_model.bin")
    put(cache, "org/pickled", tmp_path / "pickled", COMMITS[0])
    assert said in fails("predict", *arguments, "--text", "a")


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("GatedRepoError", "it is gated: ask for access on its page, and log in with `hf auth login`, or set HF_TOKEN"),
        ("RepositoryNotFoundError", "no such directory, and no such model on the hub; if it is private, log in with"),
        ("RevisionNotFoundError", "it has no revision 'v1' on the hub"),
        ("disk full\nTraceback", "it cannot be fetched from the hub: disk full"),
    ],
    ids=["gated", "401", "revision", "disk"],
)
def test_what_the_hub_refuses(kind, said, cache, monkeypatch):
    def refuse(*args, **kwargs):
        error = getattr(huggingface_hub.utils, kind, None)
        raise error("", response=SimpleNamespace(headers={}, status_code=401, request=None)) if error else OSError(kind)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    assert f"{NAME}: {said}" in fails("fill-mask", "--model", NAME, "--revision", "v1", "the [MASK]")


def test_without_network(cache, monkeypatch):
    """The cache is enough; a model that is not in it is one line."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("NO_PROXY", "*")
    assert fastbert.MaskedLM.from_pretrained(NAME).config.layer_norm_eps != 0.5
    assert "and the hub cannot be reached (" in fails("predict", "--model", "org/other", "--text", "a")


def test_without_its_client(cache, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "huggingface_hub", None)
    assert f"{NAME}: no such directory, and names of the hub need huggingface_hub: install" in fails(
        "predict", "--model", NAME, "--text", "a"
    )


def test_only_what_is_needed_is_asked_for(cache, monkeypatch):
    asked, real = [], huggingface_hub.snapshot_download

    def download(name, *, revision, allow_patterns):
        files = ["config.json", "model.safetensors", "tokenizer.json", "pytorch_model.bin", "onnx/model.onnx",
                 "modeling_own.py", "flax_model.msgpack", "2_Dense/model.safetensors"]  # fmt: skip
        asked.append([*huggingface_hub.utils.filter_repo_objects(files, allow_patterns=allow_patterns)])
        return real(name, revision=revision, allow_patterns=allow_patterns)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    hub.local(NAME)
    hub.local(NAME, weights=False)
    assert asked == [["config.json", "model.safetensors", "tokenizer.json"], ["config.json", "tokenizer.json"]]
