"""fastbert doctor: what it says of the machine, and how --compile is asked and answers. Kernels: test_compile.py."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from fastbert import ops
from fastbert.cli import main
from fastbert.proof import doctor, offline
from fastbert.proof.op_cases import OPS

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}


def call(*arguments):
    return CliRunner().invoke(main, ["doctor", *arguments], prog_name="fastbert")


def compiled(*arguments):
    """The command in a process that may compile."""
    command = [sys.executable, "-m", "fastbert", "doctor", "--compile", *arguments]
    return subprocess.run(command, env=ENVIRONMENT, cwd=ROOT, capture_output=True, text=True)


def row(**changes):
    """A row of a report without a fault."""
    return dict(
        hash="0", kernel="_bias_gelu_fwd_kernel", arch="sm_90", dtype="bf16", op="bias_gelu",
        uses=[dict(model="bert-base", case="erf")], settings=dict(warps=4, stages=3), shared=4096,
        occupancy=dict(programs=8, warps=32, of=64, limit="registers"), registers=64, stack=0, spills=0, tensor={},
        dots=[], widths={"16": 4}, wide_share=1.0, atomics=0, warnings=[], waits=[0, 0], narrow_offsets=[],
        is_candidate=False, cycles={},
        loop=dict.fromkeys(("tensor", "mufu", "fp32", "int", "shared", "global", "sync", "slots"), 1) | {"whole": True},
    ) | changes  # fmt: skip


@pytest.fixture
def rows(monkeypatch):
    """Rows that take the place of what would be compiled."""
    rows = [row(), row(uses=[dict(model="minilm", case="erf")])]
    monkeypatch.setattr(offline, "check", lambda *_: None)
    monkeypatch.setattr(offline, "report", lambda *_, **__: [x | offline.judge(x) for x in rows])
    return rows


def test_one_line_for_each_thing():
    lines = call().stdout.splitlines()
    assert sum(line.startswith("launch settings: ") for line in lines) == 1
    for op in OPS:
        assert sum(line.startswith(f"ops.{op}: ") for line in lines) == 1


def test_the_devices_profile_is_named(monkeypatch, tmp_path):
    from fastbert.kernels import _launch

    monkeypatch.setattr(_launch, "PROFILES", tmp_path)
    monkeypatch.setattr(_launch, "device_name", lambda: "nvidia_h200")
    monkeypatch.setattr(ops, "has_triton", lambda: True)
    gpu = torch.device("cuda")
    assert doctor._settings(gpu) == "defaults, there is no nvidia_h200.json"
    (tmp_path / "nvidia_h200.json").write_text("{}")
    assert doctor._settings(gpu) == f"measured on this device, {tmp_path / 'nvidia_h200.json'}"
    assert "no kernel" in doctor._settings(torch.device("cpu"))


@pytest.mark.parametrize(
    "arguments, reason",
    [
        (["--compile", "--arch", "sm_70"], "no architecture is called 'sm_70': expected one of sm_80"),
        (["--compile", "--arch", "sm_80", "h100"], "'h100'"),
        (["--compile", "--dtype", "int8"], "no dtype is called 'int8'"),
        (["--compile", "--model", "gpt"], "no model is called 'gpt'"),
        (["--compile", "--op", "softmax"], "no op is called 'softmax'"),
        (["--compile", "--json", "/no/such/folder/x.json"], "/no/such/folder"),
        (["--arch", "sm_80"], "go with --compile"),
    ],
)
def test_bad_input_is_one_line(arguments, reason, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    result = call(*arguments)
    assert result.exit_code == 2
    assert reason in result.stderr and result.stderr.count("\n") == 1


def test_the_interpreter_compiles_nothing(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    result = call("--compile")
    assert result.exit_code == 2 and "TRITON_INTERPRET=1 is set" in result.stderr


def test_without_triton_nothing_compiles(monkeypatch):
    monkeypatch.setattr(ops, "_TRITON_FOUND", False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    result = call("--compile")
    assert result.exit_code == 2 and "Triton is not installed" in result.stderr and result.stderr.count("\n") == 1


def test_models_with_equal_figures_share_a_line(rows):
    result = call("--compile", "--arch", "sm_90", "--dtype", "bf16")
    assert result.exit_code == 0, result.output
    lines = [line for line in result.stdout.splitlines() if line.startswith("fwd")]
    assert len(lines) == 1 and "B-M-- erf" in lines[0] and "8 reg" in lines[0]
    assert "2 compiled kernels" in result.stdout and "no problem" in result.stdout
    assert max(map(len, result.stdout.splitlines())) <= 100


@pytest.mark.parametrize(
    "fault, words",
    [
        (dict(stack=8, spills=2), "registers spill: 8 bytes"),
        (dict(spills=1), "registers spill"),
        (dict(atomics=3), "3 atomics"),
        (dict(narrow_offsets=["%x = arith.muli"]), "a 32-bit offset overflows: %x"),
        (dict(dots=[[64, 64, 64, "bf16", "HMMA"]]), "not Hopper's HGMMA"),
        (dict(dots=[[64, 64, 64, "bf16", "FMA"]]), "uses no tensor core"),
        (dict(dots=[[32, 64, 64, "f32", "HMMA"]]), "rounded to tf32"),
        (dict(error="OutOfResources: shared memory"), "does not compile: OutOfResources"),
    ],
)
def test_a_problem_is_told_and_gives_exit_code_1(rows, fault, words, tmp_path):
    rows.append(row(op="layer_norm", kernel="_layer_norm_bwd_kernel", hash="1", **fault))
    result = call("--compile", "--arch", "sm_90", "--dtype", "bf16", "--json", str(tmp_path / "x.json"))
    assert result.exit_code == 1
    text = " ".join(result.stdout.split())
    assert f"problem: {words}"[:60] in text or words in text
    assert "sm_90 bf16 layer_norm bwd (bert-base: erf)" in text and "1 with problems" in text
    report = json.loads((tmp_path / "x.json").read_text())
    assert [bool(x["problems"]) for x in report["kernels"]] == [False, False, True]


@pytest.mark.parametrize(
    "change",
    [
        dict(dots=[[32, 64, 64, "bf16", "HMMA"]]),
        dict(dots=[[64, 64, 64, "bf16", "HMMA"]], settings=dict(warps=2, stages=1)),
        dict(widths={"2": 5}),
    ],
)
def test_a_remark_is_no_problem(rows, change):
    rows.append(row(hash="1", **change))
    result = call("--compile", "--arch", "sm_90", "--dtype", "bf16")
    assert result.exit_code == 0 and "remark: " in result.stdout and "problem: " not in result.stdout


@pytest.mark.parametrize("arch, dtype, by", [("sm_80", "bf16", "HMMA"), ("gfx942", "f32", "MFMA")])
def test_what_is_right_elsewhere_is_not_remarked(arch, dtype, by):
    assert offline.judge(row(arch=arch, dots=[[64, 64, 64, dtype, by]])) == dict(problems=[], remarks=[])


def test_candidates_and_amd(tmp_path):
    """The settings that a search would try, and AMD's machine code, in one report."""
    arguments = "--arch", "sm_80", "gfx942", "--dtype", "bf16", "--model", "minilm", "--op", "bias_gelu"
    done = compiled(*arguments, "--candidates", "--json", tmp_path / "x.json")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "---" not in done.stdout and " ? " in done.stdout
    report = json.loads((tmp_path / "x.json").read_text())
    assert report["versions"]["triton"] and report["seconds"] > 0
    for arch in ("sm_80", "gfx942"):
        rows = [x for x in report["kernels"] if x["arch"] == arch]
        names = {x["kernel"] for x in rows if x["is_candidate"]}
        assert names == {"_bias_gelu_fwd_kernel", "_bias_gelu_bwd_kernel"}
        for x in rows:
            assert x["registers"] > 0 and x["loop"]["slots"] > 10 and sum(x["widths"].values()) > 0
