"""`make gpu` without a GPU: the cheap steps of its rehearsal, so that the command cannot rot."""

import json
import os
import signal
import subprocess
import sys

import gpu
import pytest
import torch

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a rehearsal is for machines without a GPU")


def test_rehearsal(tmp_path):
    # a user's own switches must not reach the steps
    environment = {**os.environ, "FASTBERT_IMPL": "reference", "FASTBERT_AUTOTUNE": "1"}
    command = [sys.executable, "benchmarks/gpu.py", "--only", "device", "tuning", "training step", "--output", tmp_path]
    done = subprocess.run(command, cwd=gpu.ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    files = {path.name: path for path in tmp_path.iterdir() if path.is_file()}
    assert files.keys() == {
        "machine.json", "profile.json", "training_step.json", "training_step.md", "summary.md",
    }  # fmt: skip
    # nobody takes these times for measured ones
    for name in ("summary.md", "training_step.md"):
        assert "REHEARSAL" in files[name].read_text(encoding="utf-8"), name
    for name in ("machine.json", "profile.json"):
        assert "rehearsal" in json.loads(files[name].read_text(encoding="utf-8")), name
    profile = json.loads(files["profile.json"].read_text(encoding="utf-8"))
    assert {"layer_norm_fwd", "layer_norm_bwd", "bias_gelu_bwd"} <= profile["microseconds"].keys()
    (row,) = json.loads(files["training_step.json"].read_text(encoding="utf-8"))["rows"]
    assert len(row["seconds"]["fastbert, packed"]) == 2 and not row["failed"]


@pytest.fixture
def step(tmp_path):
    """A step that runs one test, with the given body."""

    def make(body):
        file = tmp_path / "test_of_its_own.py"
        file.write_text(f"import time\ndef test_this():\n    {body}\n")
        return gpu.Step("tests", 9, None, "tests.json", (str(file), "-p", "no:cacheprovider"))

    return make


def test_a_failing_step_does_not_stop_the_next_and_is_told(step, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "plan", lambda on_gpu: [step("assert False"), gpu.Step("device", 9, "machine.py")])
    results = tmp_path / "results"
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--output", str(results)])
    with pytest.raises(SystemExit) as ended:
        gpu.main()
    assert ended.value.code == 1
    summary = (results / "summary.md").read_text(encoding="utf-8")
    assert "| tests | FAILED |" in summary and "| device | passed |" in summary
    counted = json.loads((results / "tests.json").read_text(encoding="utf-8"))
    assert (counted["passed"], counted["failed"]) == (0, 1) and "test_this" in counted["failures"][0]


def test_a_step_that_takes_too_long_is_ended(step, tmp_path):
    """And what it has seen until then is not lost."""
    both = step("pass\ndef test_that():\n    time.sleep(60)")
    # as in a command that a shell runs in the background
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        status, took, last = gpu.run(both, 5, dict(os.environ), tmp_path, tmp_path)
    finally:
        signal.signal(signal.SIGINT, before)
    assert status == "out of time" and took < 20
    gpu.counts(last, tmp_path / "tests.xml", tmp_path / "tests.json")
    assert json.loads((tmp_path / "tests.json").read_text(encoding="utf-8"))["passed"] == 1


def test_what_a_killed_pytest_leaves_is_no_failure_of_the_command(step, tmp_path):
    for content in (None, "<testsuites><testcase"):
        xml = tmp_path / "x.xml"
        if content:
            xml.write_text(content)
        gpu.counts("2 failed, 3 passed in 4s", xml, tmp_path / "tests.json")
        counted = json.loads((tmp_path / "tests.json").read_text(encoding="utf-8"))
        assert (counted["passed"], counted["failed"], counted["failures"]) == (3, 2, [])
    # and that of an earlier run is not taken for this one's
    (tmp_path / "tests.xml").write_text("<old/>")
    (tmp_path / "tests.log").write_text("9 passed")
    gone = gpu.Step("tests", 9, None, "tests.json", ("--no-such-option",))
    status, _, last = gpu.run(gone, 30, dict(os.environ), tmp_path, tmp_path)
    assert status == "FAILED" and "9 passed" not in last
    assert not (tmp_path / "tests.xml").exists() or "<old/>" not in (tmp_path / "tests.xml").read_text()


def test_the_tests_that_run_on_a_gpu_are_those_that_take_a_device():
    files = gpu.tests_on_a_device()
    assert {"tests/test_gpu.py", "tests/test_attention.py", "tests/test_dropout_mask.py"} <= set(files)
    assert not {"tests/test_cli.py", "tests/test_layout.py"} & set(files)


def test_without_a_gpu_no_python_will_do():
    assert subprocess.run([sys.executable, "benchmarks/gpu.py", "--can-run"], cwd=gpu.ROOT).returncode == 1
