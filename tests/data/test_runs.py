"""The text and the shards of a run: what a resume needs of them, and who may write into its directory."""

import json
import os
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner
from corpus import make_documents, small_tokenizer, write_text

from fastbert.cli import main
from fastbert.data.shards import prepare
from fastbert.data.tokenizer import save_tokenizer
from fastbert.files import lock
from fastbert.training import card, log
from fastbert.training.pretrain import PretrainConfig, pretrain

MODEL = {
    "model_type": "bert", "vocab_size": 150, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1,
    "intermediate_size": 8, "max_position_embeddings": 16,
}  # fmt: skip


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A function that runs two steps, or `changes`, on the texts in tmp_path / "texts"."""
    # their imports take seconds
    monkeypatch.setattr(log, "_tensorboard", lambda *_: None)
    monkeypatch.setattr(card, "learning_curve", lambda *_: None)
    (tmp_path / "texts").mkdir()
    for name in "ab":
        write_text(tmp_path / "texts" / f"{name}.txt", make_documents(40, seed=name))
    (tmp_path / "model.json").write_text(json.dumps(MODEL))
    options = dict(
        train_file=tmp_path / "texts", model=tmp_path / "model.json", output_dir=tmp_path / "run", vocab_size=150,
        max_seq_length=16, tokens_per_batch=128, eval_share=0.1,
    )  # fmt: skip
    return lambda **changes: pretrain(PretrainConfig(**options | {"max_steps": 2} | changes))


def touch(folder):
    os.utime(folder / "a.txt", (1, 1))


def move(folder):
    (folder / "a.txt").rename(folder / "c.txt")
    (folder / "b.txt").rename(folder / "d.txt")


def remove_one(folder):
    (folder / "b.txt").unlink()


@pytest.mark.filterwarnings("ignore:.*resuming with the shards in")
@pytest.mark.parametrize("change", [touch, move, remove_one, shutil.rmtree])
def test_a_resume_needs_the_bytes_of_the_text_or_whole_shards(change, run, tmp_path):
    run()
    manifest = (tmp_path / "run" / "data" / "manifest.json").read_bytes()
    change(tmp_path / "texts")
    assert run(resume=True, max_steps=3)["signal"] is None
    assert log.read_metrics(tmp_path / "run")[-1]["step"] == 3
    assert (tmp_path / "run" / "data" / "manifest.json").read_bytes() == manifest


def test_a_resume_with_another_text_is_refused(run, tmp_path):
    run()
    path = tmp_path / "texts" / "a.txt"
    path.write_text(path.read_text().replace("a", "e"))
    with pytest.raises(ValueError, match="data holds another preparation"):
        run(resume=True, max_steps=3)


def flip(path):
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("verify", [True, False])
def test_a_run_verifies_its_shards_when_it_starts(verify, run, tmp_path):
    run()
    shard = tmp_path / "run" / "data" / "shard-00000.tokens.npy"
    before = shard.read_bytes()
    flip(shard)
    if not verify:
        run(resume=True, max_steps=3, verify=False)
        assert shard.read_bytes() != before
        return
    with pytest.warns(UserWarning, match="damaged or missing, made again: shard-00000"):
        run(resume=True, max_steps=3)
    assert shard.read_bytes() == before


def test_a_prepared_directory_is_verified(run, tmp_path):
    prepare([tmp_path / "texts"], small_tokenizer(tmp_path), tmp_path / "shards", progress=False)
    flip(tmp_path / "shards" / "shard-00000.tokens.npy")
    with pytest.raises(ValueError, match="shard-00000.tokens.npy is damaged: its sha256 .*; prepare the data again"):
        run(train_file=tmp_path / "shards")
    assert run(train_file=tmp_path / "shards", verify=False)["signal"] is None


def test_nothing_is_written_into_the_directory_of_a_live_run(run, tmp_path):
    run()
    directory, text = tmp_path / "live", str(tmp_path / "texts")
    tokenizer = tmp_path / "tokenizer"
    save_tokenizer(small_tokenizer(tmp_path), tokenizer)
    commands = [
        ["tokenizer", "train", "--train-file", text, "--vocab-size", "150", "--output-dir", str(directory)],
        ["convert", str(tmp_path / "run"), str(directory)],
        ["prepare", "--train-file", text, "--tokenizer", str(tokenizer), "--output-dir", str(directory)],
    ]
    training = ["pretrain", "--train-file", text, "--model", "bert-tiny", "--output-dir", str(directory)]
    for command in (*commands, training):
        for folder in ("", "/checkpoint-2"):
            with lock(directory):
                done = CliRunner().invoke(main, [*command[:-1], command[-1] + folder])
            assert done.exit_code == 2, done.output
            last = done.output.strip().splitlines()[-1]
            assert last.startswith(f"fastbert: error: {directory} is in use by a live run")
            assert {path.name for path in directory.iterdir()} <= {".lock"}
    for number, command in enumerate(commands):
        free = [argument.replace(str(directory), f"{directory}{number}") for argument in command]
        assert CliRunner().invoke(main, free).exit_code == 0
        assert (Path(f"{directory}{number}") / "tokenizer.json").exists()
