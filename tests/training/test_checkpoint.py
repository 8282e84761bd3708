"""Checkpoints: exact, whole or absent after a crash at any point, skipped when damaged."""

import errno
import json
import multiprocessing
import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from helpers import packed_batch
from runs import checkpoints
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models

from fastbert import files
from fastbert.data.tokenizer import SPECIALS
from fastbert.model.config import EncoderConfig
from fastbert.model.heads import MaskedLM
from fastbert.training import checkpoint, optim

CONFIG = EncoderConfig(
    vocab_size=20, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24,
    max_position_embeddings=8,
)  # fmt: skip
FORK = multiprocessing.get_context("fork")


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer(models.WordPiece({token: i for i, token in enumerate(SPECIALS)}, unk_token="[UNK]"))


def trained(seed=0, steps=1):
    """A model and its optimizer after a few steps."""
    torch.manual_seed(seed)
    model = MaskedLM(CONFIG)
    optimizer = optim.adamw(model, learning_rate=0.01, weight_decay=0.1, betas=(0.9, 0.98), epsilon=1e-6)
    batch = packed_batch([6], CONFIG.vocab_size, picked=1)
    batch.seed = torch.tensor([seed])
    for _ in range(steps):
        optimizer.zero_grad()
        model(batch).loss.backward()
        optimizer.step()
    return model, optimizer


def assert_same(model, optimizer, other_model, other_optimizer):
    for (name, p), q in zip(model.named_parameters(), other_model.parameters(), strict=True):
        assert torch.equal(p, q), name
        states = optimizer.state[p], other_optimizer.state[q]
        assert states[0].keys() == states[1].keys()
        for key in states[0]:
            assert torch.equal(states[0][key], states[1][key]), (name, key)


def test_a_round_trip_is_exact(tmp_path, tokenizer):
    model, optimizer = trained(steps=3)
    state = {"step": 3, "sum": 0.1 + 0.2, "text": "é"}
    path = checkpoint.save_checkpoint(tmp_path, 3, model, optimizer, tokenizer, state)
    assert path == tmp_path / "checkpoint-3" == checkpoint.latest(tmp_path)
    other_model, other_optimizer = trained(seed=1, steps=1)
    assert checkpoint.load_checkpoint(path, other_model, other_optimizer) == state
    assert_same(model, optimizer, other_model, other_optimizer)
    # nothing that would be unpickled, nothing left over
    assert {file.suffix for file in path.iterdir()} == {".json", ".safetensors", ".txt"}
    assert [file.name for file in tmp_path.iterdir()] == ["checkpoint-3"]


def test_only_the_newest_are_kept(tmp_path, tokenizer):
    model, optimizer = trained()
    for step in (5, 10, 9, 100):
        checkpoint.prune(checkpoint.save_checkpoint(tmp_path, step, model, optimizer, tokenizer, {}), 2)
    # counted as numbers, not as text
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-10", "checkpoint-100"]


@pytest.mark.parametrize("damage", [lambda path: shutil.rmtree(path), lambda path: flip(path / checkpoint.MODEL)])
def test_pruning_deletes_only_whole_and_older_ones(damage, tmp_path, tokenizer):
    model, optimizer = trained()
    for step in (1, 2, 3, 30):
        checkpoint.save_checkpoint(tmp_path, step, model, optimizer, tokenizer, {})
    for step in (3, 30):
        damage(tmp_path / f"checkpoint-{step}")
        (tmp_path / f"checkpoint-{step}").mkdir(exist_ok=True)
    path = checkpoint.save_checkpoint(tmp_path, 4, model, optimizer, tokenizer, {})
    checkpoint.prune(path, 2)
    assert checkpoints(tmp_path) == ["checkpoint-2", "checkpoint-3", "checkpoint-30", "checkpoint-4"]
    with pytest.warns(UserWarning, match="checkpoint-30"):
        assert checkpoint.latest(tmp_path) == path


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_files_have_the_permissions_of_new_files(umask, tmp_path, tokenizer):
    before = os.umask(umask)
    try:
        path = checkpoint.save_checkpoint(tmp_path, 1, *trained(), tokenizer, {})
        checkpoint.publish(tmp_path, trained()[0], tokenizer)
    finally:
        os.umask(before)
    modes = {
        file.name: file.stat().st_mode & 0o777 for file in (*path.iterdir(), *tmp_path.iterdir()) if file.is_file()
    }
    assert set(modes.values()) == {0o666 & ~umask}, modes


def truncate(file):
    file.write_bytes(file.read_bytes()[:-1])


def extend(file):
    file.write_bytes(file.read_bytes() + b"\0")


def flip(file):
    content = bytearray(file.read_bytes())
    content[-len(content) // 3] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("damage", [truncate, extend, flip, Path.unlink], ids=lambda f: f.__name__)
@pytest.mark.parametrize(
    "name", [checkpoint.MODEL, checkpoint.OPTIMIZER, checkpoint.STATE, files.MANIFEST, "config.json"]
)
def test_a_damaged_checkpoint_is_passed_over(damage, name, tmp_path, tokenizer):
    model, optimizer = trained()
    for step in (1, 2):
        checkpoint.save_checkpoint(tmp_path, step, model, optimizer, tokenizer, {})
    manifest = json.loads((tmp_path / "checkpoint-2" / files.MANIFEST).read_text())
    damage(tmp_path / "checkpoint-2" / name)
    if name == files.MANIFEST and damage in (truncate, flip):
        # a lost line end does no harm, and any letter may be hit: what counts is that nothing but the truth passes
        (tmp_path / "checkpoint-2" / name).write_text(json.dumps(manifest)[:-2])
    with pytest.warns(UserWarning, match=f"skipped a checkpoint: .*{name}"):
        assert checkpoint.latest(tmp_path) == tmp_path / "checkpoint-1"
    with pytest.raises(ValueError, match=name):
        checkpoint.load_checkpoint(tmp_path / "checkpoint-2", model, optimizer)


@pytest.mark.filterwarnings("ignore:skipped a checkpoint")
def test_latest_of_none_and_of_only_damaged_ones(tmp_path, tokenizer):
    assert checkpoint.latest(tmp_path) is None
    (tmp_path / "checkpoint-7").mkdir()
    (tmp_path / "checkpoint-final").mkdir()
    with pytest.raises(ValueError, match="is damaged .1 checked"):
        checkpoint.latest(tmp_path)


class Crash(BaseException):
    """Nothing cleans up after this, as nothing does after a kill."""


def crash_after(monkeypatch, operations):
    """The next save ends after so many file operations. Returns a list that holds the count of operations."""
    count = [0]

    def counted(real):
        def operation(*args, **kwargs):
            if count[0] == operations:
                raise Crash
            count[0] += 1
            return real(*args, **kwargs)

        return operation

    monkeypatch.setattr(checkpoint, "save_file", counted(checkpoint.save_file))
    monkeypatch.setattr(os, "fsync", counted(os.fsync))
    for name in ("mkdir", "rename", "write_text", "unlink"):
        monkeypatch.setattr(Path, name, counted(getattr(Path, name)))
    return count


@pytest.mark.parametrize("again", [False, True], ids=["new-step", "same-step"])
def test_a_crash_at_any_operation_loses_nothing(again, tmp_path, tokenizer, monkeypatch):
    first, second, loaded = trained(0), trained(1), trained(2)
    at = 1 if again else 2
    checkpoint.save_checkpoint(tmp_path / "first", 1, *first, tokenizer, {"of": "first"})
    for operations in range(100):
        directory = shutil.copytree(tmp_path / "first", tmp_path / str(operations))
        with monkeypatch.context() as patched:
            count = crash_after(patched, operations)
            try:
                checkpoint.prune(checkpoint.save_checkpoint(directory, at, *second, tokenizer, {"of": "second"}), 1)
                finished = True
            except Crash:
                finished = False
        checkpoint.clear_unfinished(directory)
        found = checkpoint.latest(directory)
        state = checkpoint.load_checkpoint(found, *loaded)
        assert_same(*loaded, *(first if state["of"] == "first" else second))
        # and the directory still takes the next one
        checkpoint.prune(checkpoint.save_checkpoint(directory, 3, *second, tokenizer, {}), 1)
        assert [p.name for p in directory.iterdir()] == ["checkpoint-3"]
        if finished:
            assert state["of"] == "second" and operations == count[0] > 10
            return
    raise AssertionError("the save never came to its end")


def save_forever(directory, tokenizer):
    model, optimizer = trained()
    step = 0
    while True:
        step += 1
        checkpoint.prune(checkpoint.save_checkpoint(directory, step, model, optimizer, tokenizer, {"step": step}), 2)


def test_kill_9_at_random_times_leaves_a_whole_checkpoint(tmp_path, tokenizer):
    rng = random.Random(0)
    checkpoint.save_checkpoint(tmp_path, 0, *trained(), tokenizer, {"step": 0})
    for _ in range(8):
        process = FORK.Process(target=save_forever, args=(tmp_path, tokenizer))
        process.start()
        # on a busy machine the first save takes a while
        while not (tmp_path / "checkpoint-2").exists():
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.1))
        process.kill()
        process.join()
        checkpoint.clear_unfinished(tmp_path)
        for path in tmp_path.glob(f"checkpoint-*/{files.MANIFEST}"):
            checkpoint.verify(path.parent)
        found = checkpoint.latest(tmp_path)
        assert checkpoint.read_state(found)["step"] == int(found.name.split("-")[1]) >= 1
        for path in tmp_path.glob("checkpoint-*"):
            shutil.rmtree(path)


def limited_save(directory, tokenizer, pipe):
    import resource

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
    try:
        checkpoint.save_checkpoint(directory, 2, *trained(), tokenizer, {})
    except OSError as error:
        pipe.send(str(error))


def test_a_full_disk_gives_one_line_and_keeps_the_last_checkpoint(tmp_path, tokenizer, monkeypatch):
    checkpoint.save_checkpoint(tmp_path, 1, *trained(), tokenizer, {})
    ours, theirs = FORK.Pipe()
    process = FORK.Process(target=limited_save, args=(tmp_path, tokenizer, theirs))
    process.start()
    process.join(30)
    assert ours.poll(), "no OSError"
    message = ours.recv()
    assert "checkpoint-2 cannot be written" in message and "MB are free" in message and "\n" not in message
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-1"]
    # the same when the disk fills up at the small files
    full = OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(checkpoint, "write_manifest", lambda path: (_ for _ in ()).throw(full))
    with pytest.raises(OSError, match="checkpoint-2 cannot be written: No space left on device"):
        checkpoint.save_checkpoint(tmp_path, 2, *trained(), tokenizer, {})
    assert checkpoint.latest(tmp_path) == tmp_path / "checkpoint-1"


def test_a_checkpoint_of_another_model_is_refused(tmp_path, tokenizer):
    path = checkpoint.save_checkpoint(tmp_path, 1, *trained(), tokenizer, {})
    model = MaskedLM(CONFIG.replace(vocab_size=21))
    optimizer = optim.adamw(model, learning_rate=0.01, weight_decay=0.1, betas=(0.9, 0.98), epsilon=1e-6)
    with pytest.raises(ValueError, match=r"another model: vocabulary_bias is \(20,\), expected \(21,\)"):
        checkpoint.load_checkpoint(path, model, optimizer)


KEY = "vocabulary_bias/exp_avg"


@pytest.mark.parametrize(
    "changes",
    [{KEY: None}, {"vocabulary_bias/step": None}, {KEY: torch.zeros(())}, {KEY: torch.zeros(20, dtype=torch.float16)},
     {"vocabulary_bias/step": torch.zeros(20)}, {"vocabulary_bias/other": torch.zeros(20)}, None],
    ids=["no moment", "no step", "scalar", "half", "vector", "other", "no file of tensors"],
)  # fmt: skip
def test_an_optimizer_that_does_not_fit_is_refused(changes, tmp_path, tokenizer):
    """torch's fused AdamW reads beyond a tensor that is too small."""
    path = checkpoint.save_checkpoint(tmp_path, 1, *trained(), tokenizer, {})
    if changes is None:
        (path / checkpoint.OPTIMIZER).write_bytes(b"nothing")
    else:
        tensors = load_file(path / checkpoint.OPTIMIZER) | changes
        save_file({key: value for key, value in tensors.items() if value is not None}, path / checkpoint.OPTIMIZER)
    (path / files.MANIFEST).unlink()
    files.write_manifest(path)
    with pytest.raises(ValueError, match=f"{checkpoint.OPTIMIZER} (belongs to another|is damaged|cannot be read)"):
        checkpoint.load_checkpoint(path, *trained(1))


def test_a_resume_without_a_checkpoint_keeps_the_model(tmp_path, tokenizer):
    assert checkpoint.to_resume(tmp_path, True) is None
    checkpoint.publish(tmp_path, trained()[0], tokenizer)
    with pytest.raises(ValueError, match="--resume: .* holds a model and no checkpoint"):
        checkpoint.to_resume(tmp_path, True)


def test_published_files_replace_the_old_ones(tmp_path, tokenizer):
    (tmp_path / "config.json").write_text("old")
    model, _ = trained()
    checkpoint.publish(tmp_path, model, tokenizer)
    again = MaskedLM.from_pretrained(tmp_path)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), again.parameters(), strict=True))
    assert not list(tmp_path.glob(".*"))
