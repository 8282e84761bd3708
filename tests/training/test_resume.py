"""Runs that end early resume bit for bit: stopped, killed, damaged; two runs cannot share a directory."""

import json
import multiprocessing
import os
import shutil
import signal
import sys
import time

import pytest
from click.testing import CliRunner
from runs import assert_same_run, assert_same_tensors, run, stop_in

from fastbert import __main__
from fastbert.cli import main
from fastbert.cpu import low_precision
from fastbert.data.shards import prepare
from fastbert.data.tokenizer import load_tokenizer, save_tokenizer, train_wordpiece
from fastbert.training import checkpoint, log
from fastbert.training.finetune import FinetuneConfig
from fastbert.training.pretrain import PretrainConfig


@pytest.mark.parametrize(
    ("where", "call", "step"),
    [
        ("accumulate", 1, 1),
        ("accumulate", 6, 6),
        ("accumulate", 8, 8),
        ("evaluate", 1, 4),
        ("evaluate", 3, 12),
        ("accumulate", 10, 10),
    ],
    ids=["first-step", "mid-epoch", "at-an-evaluation", "in-an-evaluation", "in-the-last", "second-epoch-at-a-row"],
)
def test_a_stopped_run_resumes_to_the_bit(where, call, step, options, whole, monkeypatch, capsys):
    handler = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patched:
        stop_in(patched, where, call)
        result = run(options)
    assert result["signal"] == signal.SIGTERM and signal.getsignal(signal.SIGTERM) is handler
    assert f"stopped by SIGTERM after step {step}: continue with --resume" in capsys.readouterr().err
    assert checkpoint.latest(options["output_dir"]).name == f"checkpoint-{step}"
    assert not (options["output_dir"] / "model.safetensors").exists()
    result = run(options, resume=True)
    assert result["signal"] is None and result["step"] == 12
    assert_same_run(whole, options["output_dir"])
    epochs = {row["epoch"] for row in log.read_metrics(options["output_dir"])}
    assert epochs == {0, 1}, "the run was meant to pass the end of an epoch"


@pytest.mark.filterwarnings("ignore:skipped a checkpoint")
def test_a_run_resumes_from_the_last_intact_checkpoint(options, whole):
    directory = options["output_dir"]
    shutil.copytree(whole, directory)
    for name in ("checkpoint-12", "checkpoint-8"):
        (directory / name / checkpoint.MODEL).write_bytes(b"")
    (directory / "model.safetensors").unlink()
    with pytest.warns(UserWarning, match="skipped a checkpoint: .*checkpoint-12/model.safetensors has 0 bytes"):
        run(options, resume=True)
    assert_same_run(whole, directory)
    assert (directory / "model.safetensors").exists()


@pytest.mark.parametrize("is_old", [False, True], ids=["now", "before there was --dtype"])
def test_a_run_keeps_its_dtype_on_another_machine(is_old, options, tmp_path, monkeypatch, capsys):
    """bf16 where auto means fp32: bit for bit as if it had not moved."""
    options |= {"max_steps": 4, "logging_steps": 1, "eval_steps": 4}
    one = tmp_path / "one"
    monkeypatch.setattr(low_precision, "gain", lambda dtype: 2.0)
    run(options, dtype="auto", output_dir=one)
    assert "--dtype auto: matrix products run in bf16" in capsys.readouterr().err
    two = options["output_dir"]
    with monkeypatch.context() as patched:
        stop_in(patched, "accumulate", 2)
        run(options, dtype="bf16")
    if is_old:
        file = two / "checkpoint-2" / checkpoint.STATE
        state = json.loads(file.read_text())
        state["config"]["bf16"] = state["config"].pop("dtype") == "bf16"
        file.write_text(json.dumps(state))
        checkpoint.write_manifest(file.parent)
    monkeypatch.setattr(low_precision, "gain", lambda dtype: 0.5)
    with pytest.raises(ValueError, match=r"--resume: --dtype is 'fp32', but 'bf16' in .*checkpoint-2"):
        run(options, resume=True)
    run(options, dtype="auto", resume=True)
    assert_same_run(one, two, step=4)


def test_dtypes_of_a_run(tmp_path, options, monkeypatch, capsys):
    """--bf16 is another name; auto is told; bf16 in vain, too."""
    monkeypatch.setattr(low_precision, "gain", lambda dtype: 0.5)
    given = dict(train_file="a", output_dir="b")
    assert PretrainConfig(**given, bf16=True) == PretrainConfig(**given, dtype="bf16")
    assert PretrainConfig(**given, bf16=False) == PretrainConfig(**given, dtype="fp32") == PretrainConfig(**given)
    assert FinetuneConfig(**given, model="c", bf16=False).dtype == "fp32"
    assert FinetuneConfig(**given, model="c").dtype == "auto"
    with pytest.raises(ValueError, match="--no-bf16 is --dtype fp32: --dtype is bf16"):
        PretrainConfig(**given, bf16=False, dtype="bf16")
    with pytest.raises(ValueError, match="--dtype is 'int8': expected one of auto, fp32, bf16"):
        PretrainConfig(**given, dtype="int8")
    run(options, dtype="auto", max_steps=1)
    assert "--dtype auto: matrix products run in fp32" in capsys.readouterr().err
    run(options, bf16=True, max_steps=1, output_dir=tmp_path / "other")
    assert "--dtype bf16: bf16 is not faster than fp32 on this machine" in capsys.readouterr().err


def test_a_finished_run_may_be_made_longer(options, whole):
    shutil.copytree(whole, options["output_dir"])
    assert run(options, max_steps=14, resume=True)["step"] == 14


def test_resume_without_a_run_begins_one(options, capsys):
    assert run(options, resume=True, max_steps=2)["step"] == 2
    assert "no checkpoint yet" in capsys.readouterr().err


def arguments_of(options):
    return [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]


def command(errors, options, *flags):
    """A process that runs `fastbert pretrain` with its stderr in the file `errors`; a fork, as imports take seconds."""

    def child():
        sys.argv[1:] = ["pretrain", *arguments_of(options), *flags]
        # the process may end without closing it
        with open(errors, "w", buffering=1) as file:
            os.dup2(file.fileno(), 2)
            sys.stderr = file
            __main__.run()

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    return process


def wait_for(path, process):
    for _ in range(1200):
        if path.exists():
            return
        assert process.is_alive()
        time.sleep(0.05)
    raise AssertionError(f"{path} did not come")


def test_a_killed_process_a_busy_directory_and_ctrl_c(options, tmp_path):
    """One long run: busy while it lives, killed without warning, resumed, interrupted, resumed to its end."""
    directory = options["output_dir"]
    options = options | {"save_steps": 3, "eval_steps": 1000, "max_steps": 3000}
    process = command(tmp_path / "errors", options)
    wait_for(directory / "checkpoint-3", process)
    second = CliRunner().invoke(main, ["pretrain", *arguments_of(options), "--resume"])
    assert second.exit_code == 2 and second.stderr.count("\n") == 1
    assert f"in use by a live run, process {process.pid}" in second.stderr
    process.kill()
    process.join()
    killed_at = checkpoint.read_state(checkpoint.latest(directory))["progress"]["step"]

    process = command(tmp_path / "errors", options, "--resume")
    wait_for(directory / f"checkpoint-{killed_at + 6}", process)
    os.kill(process.pid, signal.SIGINT)
    process.join(60)
    assert process.exitcode == 130
    errors = (tmp_path / "errors").read_text()
    assert "stopped by SIGINT after step" in errors.splitlines()[-1] and "Traceback" not in errors
    # the same run without a break
    step = checkpoint.read_state(checkpoint.latest(directory))["progress"]["step"]
    with pytest.MonkeyPatch.context() as patched:
        stop_in(patched, "accumulate", step)
        run(options, output_dir=tmp_path / "whole")
    assert_same_tensors(*(d / f"checkpoint-{step}" / checkpoint.MODEL for d in (directory, tmp_path / "whole")))


@pytest.mark.parametrize(
    ("where", "signals", "code"),
    [
        ("loaders", [signal.SIGTERM], 143),
        ("loaders", [signal.SIGINT], 130),
        ("accumulate", [signal.SIGINT, signal.SIGINT], 130),
        ("accumulate", [signal.SIGTERM, signal.SIGTERM], 143),
        ("accumulate", [signal.SIGINT, signal.SIGINT, signal.SIGINT], 130),
    ],
)
def test_signals_before_the_loop_and_twice_end_in_one_line(where, signals, code, options, tmp_path, monkeypatch):
    stop_in(monkeypatch, where, 1, *signals)
    process = command(tmp_path / "errors", options)
    process.join(60)
    errors = (tmp_path / "errors").read_text()
    assert process.exitcode == code
    assert errors == f"fastbert: error: stopped by {signal.Signals(signals[0]).name}\n"
    monkeypatch.undo()
    assert run(options, resume=True, max_steps=1)["step"] == 1


def test_a_directory_with_another_run_is_not_overwritten(options, whole):
    before = {p: p.stat().st_mtime_ns for p in whole.iterdir() if p.is_file() and p.name != ".lock"}
    with pytest.raises(ValueError, match="holds another run .*--resume"):
        run(options, output_dir=whole)
    assert before == {p: p.stat().st_mtime_ns for p in before}


@pytest.fixture(scope="module")
def stand_ins(place, whole, tmp_path_factory):
    """A run, another tokenizer and another text, by the names that stand for them below."""
    here = tmp_path_factory.mktemp("other")
    shutil.copytree(whole, here / "run")
    save_tokenizer(train_wordpiece([str(place / "text.txt")], 100, progress=False), here / "tokenizer")
    lines = (place / "text.txt").read_text().splitlines(keepends=True)[::-1]
    (here / "reversed.txt").write_text("".join(lines))
    prepare([str(here / "reversed.txt")], load_tokenizer(place / "tokenizer"), here / "shards", progress=False)
    return {
        "run": here / "run", "text": place / "text.txt", "other": here / "tokenizer", "other text": here / "shards"
    }  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"learning_rate": 0.5}, r"--learning-rate is 0.5, but 0.003 in .*checkpoint-12 \(it may be lowered\)"),
        ({"tokens_per_batch": 256}, "--tokens-per-batch is 256, but 192 in"),
        ({"seed": 8}, "--seed is 8, but 7 in"),
        ({"dropout": 0.0}, "--dropout is 0.0, but None in"),
        ({"tokenizer": "other", "train_file": "text"}, "the tokenizer has sha256 .*, but .* in .*checkpoint-12"),
        ({"train_file": "other text"}, "the text is not the one that"),
    ],
    ids=["learning-rate", "batch", "seed", "dropout", "tokenizer", "text"],
)
def test_resuming_with_something_else_names_it(changes, message, options, stand_ins):
    changes = {name: stand_ins.get(value, value) for name, value in changes.items()}
    with pytest.raises(ValueError, match=message):
        run(options, output_dir=stand_ins["run"], max_steps=14, resume=True, **changes)
