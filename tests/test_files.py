"""Files: whole or absent after a crash, one process in a directory, names that lead out of it, and no fcntl."""

import json
import multiprocessing
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fastbert import files

ROOT = Path(__file__).parent.parent
FORK = multiprocessing.get_context("fork")


def hold(directory, pipe):
    with files.lock(directory):
        pipe.send("held")
        time.sleep(60)


def test_a_directory_has_one_holder_and_a_dead_one_holds_nothing(tmp_path):
    ours, theirs = FORK.Pipe()
    holder = FORK.Process(target=hold, args=(tmp_path / "run", theirs))
    holder.start()
    assert ours.poll(30)
    with (
        pytest.raises(ValueError, match=f"in use by a live run, process {holder.pid}"),
        files.lock(tmp_path / "run"),
    ):
        pass
    holder.kill()
    holder.join()
    with files.lock(tmp_path / "run"):
        assert (tmp_path / "run" / ".lock.pid").read_text() == f"{os.getpid()}\n"


def test_a_directory_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file/run cannot be written"), files.lock(tmp_path / "file" / "run"):
        pass


def test_a_lock_is_free_again_after_it_and_after_an_error(tmp_path):
    for _ in range(2):
        with pytest.raises(KeyError), files.lock(tmp_path):
            raise KeyError
    with files.lock(tmp_path), pytest.raises(ValueError, match="in use by a live run"), files.lock(tmp_path):
        pass
    assert not (tmp_path / ".lock.pid").exists()


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "file.json"
    files.write(path, "old é")
    assert path.read_text(encoding="utf-8") == "old é"
    files.write(path, b"older")

    def full(descriptor):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="file.json cannot be written: No space left on device") as error:
            files.write(path, "new")
    assert path.read_bytes() == b"older" and "\n" not in str(error.value)
    # nor half of a new one
    assert [p.name for p in tmp_path.iterdir()] == ["file.json"]
    files.write(path, "new")
    assert [p.name for p in tmp_path.iterdir()] == ["file.json"]


def test_a_manifest_knows_its_files(tmp_path):
    with pytest.raises(ValueError, match="has no MANIFEST.json: it was not finished"):
        files.verify_manifest(tmp_path)
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "a").write_text("abc")
    files.write_manifest(tmp_path)
    expected = {"size": 3, "sha256": "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"}
    assert json.loads((tmp_path / files.MANIFEST).read_text()) == {"deep/a": expected}
    files.verify_manifest(tmp_path, required=["deep/a"])
    with pytest.raises(ValueError, match="MANIFEST.json does not list b"):
        files.verify_manifest(tmp_path, required=["b"])
    (tmp_path / "deep" / "a").write_text("abd")
    with pytest.raises(ValueError, match="deep/a is damaged: its sha256"):
        files.verify_manifest(tmp_path)
    no_sha256 = json.dumps({"deep/a": {"size": 3, "sha256": None}})
    for damaged in ("{", "[]", '{"deep/a": 3}', no_sha256, no_sha256.replace("3", "null"), "[" * 200_000):
        (tmp_path / files.MANIFEST).write_text(damaged)
        with pytest.raises(ValueError, match="MANIFEST.json (cannot be read|holds no JSON object|has no size)"):
            files.verify_manifest(tmp_path)


@pytest.mark.parametrize("name", ["../a", "a/../../b", "/etc/passwd", "C:\\a", "..\\a", "\\\\host\\share"])
def test_names_that_lead_out_of_a_directory_are_refused(name, tmp_path):
    with pytest.raises(ValueError, match="expected one inside the directory"):
        files.inside(tmp_path, name)
    (tmp_path / files.MANIFEST).write_text(json.dumps({name: {"size": 0, "sha256": ""}}))
    with pytest.raises(ValueError, match="expected one inside the directory"):
        files.verify_manifest(tmp_path)


@pytest.mark.parametrize("name", [None, "a\0b", "\ud800"], ids=ascii)
def test_names_that_no_file_can_have_are_refused(name, tmp_path):
    with pytest.raises(ValueError, match="expected the path of one"):
        files.inside(tmp_path, name)


def test_names_inside_a_directory_are_its_files(tmp_path):
    assert files.inside(tmp_path, "a/b..c.txt") == tmp_path / "a" / "b..c.txt"
    assert files.inside(tmp_path, "") == tmp_path


WITHOUT = """
import sys, warnings
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name in {"fcntl", "resource"}:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Blocker())
for name in ("fcntl", "resource"):
    sys.modules.pop(name, None)
# the lock of filelock without fcntl on Linux, which has neither that nor what Windows has, says that it is a weaker one
warnings.filterwarnings("ignore", message="only soft file lock")
import torch, fastbert
from fastbert.data.shards import Shards, prepare
from fastbert.data.tokenizer import save_tokenizer, train_wordpiece
from fastbert.training import card, log, pretrain
# nor has Windows this
log._STATUS = log.Path("nowhere")
log._tensorboard = card.learning_curve = lambda *_: None
directory = sys.argv[1]
tokenizer = train_wordpiece([f"{directory}/text.txt"], 30, progress=False)
prepare([f"{directory}/text.txt"], tokenizer, f"{directory}/shards", progress=False)
config = fastbert.PretrainConfig(
    train_file=f"{directory}/shards", model=f"{directory}/model.json", output_dir=f"{directory}/run",
    max_seq_length=16, tokens_per_batch=64, max_steps=2, logging_steps=1, eval_share=0,
)
pretrain.pretrain(config)
assert not {"fcntl", "resource"} & sys.modules.keys()
print([row["memory_mb"] for row in log.read_metrics(f"{directory}/run")])
"""


def test_works_where_there_is_no_fcntl(tmp_path):
    """As on Windows: text is prepared, and a tiny model trained, saved and logged."""
    (tmp_path / "text.txt").write_text("\n\n".join(f"the {word} sees the other {word} ." for word in "abcdefgh" * 9))
    config = {
        "model_type": "bert", "vocab_size": 30, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1,
        "intermediate_size": 8, "max_position_embeddings": 16,
    }  # fmt: skip
    (tmp_path / "model.json").write_text(json.dumps(config))
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT, tmp_path], cwd=ROOT, capture_output=True, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[None, None]"
    assert (tmp_path / "run" / "model.safetensors").exists() and "MB" not in done.stderr
