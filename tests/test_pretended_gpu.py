"""What benchmarks do on a GPU only, walked on a CPU that says it is one. No time means anything here."""

import importlib
import itertools
import json
import os
import sys
import time
import types
from dataclasses import replace

import bench_models
import bench_ops
import bench_training_step_gpu
import gpu
import machine
import op_cases
import pytest
import report
import torch
import tune
from pretend_cuda import NAME, Stream, pretending, small

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a real GPU")
CUDA = torch.device("cuda")


@pytest.fixture
def run(monkeypatch, tmp_path):
    """A function that runs a benchmark's main with arguments and gives its exit code; nothing is compiled."""

    def call(module, *arguments):
        monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *map(str, arguments), "--output", str(tmp_path)])
        # what is compiled says so, and is the function itself
        monkeypatch.setattr(torch, "compile", lambda function, **_: compiled.append(function) or function)
        with pretending(30), small():
            try:
                module.main()
            except SystemExit as ended:
                return ended.code
        return 0

    call.compiled = compiled = []
    return call


def read(folder, name):
    return json.loads((folder / name).read_text(encoding="utf-8"))


def test_machine(run, tmp_path):
    assert run(machine) == 0
    found = read(tmp_path, "machine.json")
    assert (found["device"], found["capability"], found["l2_mib"]) == (NAME, "9.0", 50)
    assert found["ceilings"].keys() == {"copy", "product"} and "threads" not in found


def test_ops(run, tmp_path):
    """Every op once; in bf16; each variant is held to the reference before it is timed; figures are of the device."""
    assert run(bench_ops, "--rounds", 2, "--quick", "--ops", "layer_norm", "pooling", "embedding") == 0
    result = read(tmp_path, "ops.json")
    assert result["machine"]["device"] == NAME and result["settings"]["empty_call_us"] > 0
    assert {row["op"] for row in result["rows"]} == {"layer_norm", "pooling", "embedding"}
    for row in result["rows"]:
        assert row["dtype"] == "bfloat16" and {"fastbert", "eager"} <= row["seconds"].keys()
        assert all(len(rounds) == 2 for rounds in row["seconds"].values()) and row["disagreement"]["eager"] < 0.03
        gib = row["summary"]["fastbert"]["peak_gib"]
        assert gib == (None if row["pass"] == "backward" else 2)
    text = (tmp_path / "ops.md").read_text(encoding="utf-8")
    assert NAME in text and "µs: so much of every pass is the clock's" in text


def test_the_cases_of_a_gpu():
    with pretending(140):
        full, quick = bench_ops.cases(CUDA), bench_ops.cases(CUDA, quick=True)
        searched = tune.cases(CUDA)
    assert [case.op for case in quick] == op_cases.OPS and set(quick) <= set(full)
    assert {sum(case.lengths) for case in full} == {65536} and {case.dtype for case in full} == {torch.bfloat16}
    assert len(set(full)) == len(full) and len(set(searched)) == len(searched)
    assert {case.op for case in searched} == set(op_cases.OPS)
    with pretending(24):
        assert {sum(case.lengths) for case in bench_ops.cases(CUDA)} == {16384}


def test_training_step(run, tmp_path, monkeypatch):
    """All four libraries take steps. What fails is told: a library in its place, a case at the end."""
    load, lengths = bench_training_step_gpu.load, {"first": (5, 9, 3), "second": (9, 9), "third": (4, 9)}
    monkeypatch.setattr(bench_training_step_gpu, "cases", lambda device: lengths)
    batches = bench_training_step_gpu.batch_of

    def batch_of(library, lengths, vocabulary, device):
        if lengths == (9, 9):
            raise RuntimeError("out of memory")
        return batches(library, lengths, vocabulary, device)

    monkeypatch.setattr(bench_training_step_gpu, "batch_of", batch_of)
    assert run(bench_training_step_gpu, "--rounds", 2) == 1
    result = read(tmp_path, "training_step.json")
    assert [row["case"] for row in result["rows"]] == ["first", "third"]
    for row in result["rows"]:
        assert row["seconds"].keys() == set(bench_training_step_gpu.LIBRARIES) and not row["failed"]
        assert all(len(rounds) == 2 for rounds in row["seconds"].values()) and row["difference"] < 0.02
        assert row["summary"]["fastbert"]["peak_gib"] == 2
    assert len(run.compiled) == 3 and "transformers, compiled" in (tmp_path / "training_step.md").read_text("utf-8")
    assert ("reset",) in Stream.log

    def refuses(library, directory, device):
        if library.endswith("compiled"):
            load(library, directory, device)
            return (lambda **_: 1 / 0), types.SimpleNamespace(zero_grad=lambda set_to_none: None)
        return load(library, directory, device)

    lengths.pop("second")
    monkeypatch.setattr(bench_training_step_gpu, "load", refuses)
    # a library without eval or train would stop all: it must not
    assert run(bench_training_step_gpu, "--rounds", 1) == 0
    row = read(tmp_path, "training_step.json")["rows"][0]
    assert row["failed"] == {"transformers, compiled": "ZeroDivisionError: division by zero"}
    assert run(bench_training_step_gpu, "--warm") == 0


def test_models(run, tmp_path, monkeypatch):
    """The most telling first where time is short; a case that fails does not stop the next."""
    assert run(bench_models, "--rounds", 2, "--quick", "--models", "bert-tiny", "--only", "fill", "--seconds", 600) == 0
    rows = read(tmp_path, "models.json")["rows"]
    assert [(row["pass"], row["dtype"]) for row in rows[:2]] == [("inference", "bfloat16"), ("train", "bfloat16")]
    assert 0.55 < rows[0]["fill"] < 0.65 and {"fastbert", "fastbert, packed", "swapped"} <= rows[0]["seconds"].keys()
    assert rows[0]["summary"]["fastbert"]["peak_gib"] == 2
    real = bench_models.run_case
    monkeypatch.setattr(
        bench_models, "run_case", lambda case, *rest: 1 / 0 if case.passes == "train" else real(case, *rest)
    )
    assert run(bench_models, "--rounds", 2, "--quick", "--models", "bert-tiny", "--only", "fill") == 1
    assert {row["pass"] for row in read(tmp_path, "models.json")["rows"]} == {"inference"}


def test_models_are_compiled_beforehand(monkeypatch, capsys):
    """What the cases will call; one sequence with CUDA graphs. What does not compile stops no other."""
    case = bench_models.Case("fill", "bert-tiny", (9, 5), "train", "bfloat16")
    shapes = [case, replace(case, model="no model"), replace(case, passes="inference", lengths=(7,))]
    shapes.append(replace(case, implementations=("fastbert",)))
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda module, mode=None, **_: compiled.append(mode) or module)
    with pretending(30), small():
        bench_models.warm(shapes, CUDA)
    assert compiled == [None, "reduce-overhead"]
    assert "no model" in capsys.readouterr().out


def test_the_order_of_models_that_may_be_cut():
    with pretending(140):
        found = bench_models.most_telling_first(bench_models.cases(CUDA, [], bench_models.SWEEPS, False))
    first = [(case.sweep, case.passes, max(case.lengths)) for case in found[:2]]
    assert first == [("fill", "inference", 128), ("fill", "train", 128)]
    families = [case.model for case in found[2:] if case.sweep == "families"][:18]
    assert len(set(families)) == 9 and all(case.sweep == "families" for case in found[2:20])
    one = found[20]
    assert one.sweep == "batch" and one.lengths == (128,)


# --- make gpu


def test_the_plan_fits_ten_minutes_and_ends_with_the_page(monkeypatch):
    for on_gpu in (False, True):
        with pretending():
            steps = gpu.plan(on_gpu)
        assert sum(step.seconds for step in steps) <= gpu.SECONDS <= 585 and steps[-1].script == "report.py"
        for step in steps:
            assert step.script is None or (gpu.ROOT / "benchmarks" / step.script).is_file()
            # what a step is told, its script knows
            if step.script:
                known = (gpu.ROOT / "benchmarks" / step.script).read_text(encoding="utf-8")
                command = gpu.command_of(step, 60, gpu.ROOT, gpu.ROOT, not on_gpu)
                assert all(f'"{word}"' in known for word in command if word.startswith("--")), command


def test_on_a_gpu(monkeypatch, tmp_path, capsys):
    """Steps run in order, compilation beside the tests and never beside what is timed; one that fails is told."""
    seen, started, ended_early = [], [], []
    # nothing here may reach a real process: no number below is one's, and no signal is sent
    monkeypatch.setattr(gpu.os, "killpg", lambda pid, signal: ended_early.append(pid))
    ticks = itertools.count(0, 2)
    here = types.SimpleNamespace(monotonic=lambda: next(ticks), time=time.time, sleep=lambda seconds: None)
    monkeypatch.setattr(gpu, "time", here)
    (tmp_path / "models.json").write_text('{"rows": "old, and not to be told"}')
    os.utime(tmp_path / "models.json", (0, 0))

    class Compiling:
        pid, returncode = "nobody's", None

        def poll(self):
            return None

        def wait(self, *_):
            pass

    def start(command, log, environment):
        started.append(" ".join(command))
        assert "TRITON_INTERPRET" not in environment and "FASTBERT_IMPL" not in environment
        return Compiling()

    def run_step(step, seconds, environment, logs, results, is_rehearsal):
        seen.append(step.name)
        assert 5 <= seconds <= gpu.SECONDS and results == tmp_path and not is_rehearsal
        if step.name == "models":
            return "out of time", 1.0, "cut"
        return "passed", 1.0, "3 passed"

    monkeypatch.setenv("FASTBERT_IMPL", "reference")
    monkeypatch.setattr(gpu, "start", start)
    monkeypatch.setattr(gpu, "run", run_step)
    monkeypatch.setattr(machine, "folder", lambda device: tmp_path)
    monkeypatch.setattr(sys, "argv", ["gpu.py"])
    with pretending(), pytest.raises(SystemExit) as ended:
        gpu.main()
    assert ended.value.code == 1
    assert seen == ["device", "tests", "races", "tuning", "ops", "training step", "models", "report"]
    # those that are still at it when the tests are over are given a while, and ended before anything is timed
    assert ended_early == ["nobody's"] * len(started) and seen[:2] == ["device", "tests"]
    assert sum("bench_ops.py --warm" in command for command in started) == len(started) - 1
    assert "bench_models.py --warm" in started[0]
    summary = (tmp_path / "summary.md").read_text(encoding="utf-8")
    assert summary.startswith("# make gpu on") and "| models | out of time |" in summary
    assert read(tmp_path, "tests.json")["passed"] == 3
    # what an earlier run has measured is not told again
    assert "not told" not in summary and "old" not in summary
    assert "git add benchmarks/results" in capsys.readouterr().out


def test_a_page_without_matplotlib(monkeypatch, tmp_path):
    """What was measured is told, without pictures."""
    step = {
        "machine": {"device": NAME, "torch": "2.11", "triton": "3.6", "capability": "9.0"}, "date": "2026-11-23",
        "command": "python x", "settings": {"ceilings": {"copy": 1e12, "product": 1e14}, "left_out": []}, "rows": [],
        "not_measured": {"liger": "not installed"},
    }  # fmt: skip
    (tmp_path / "training_step.json").write_text(json.dumps(step))
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "matplotlib" else find(name))
    assert report.write(tmp_path) == [tmp_path / "README.md"]
    text = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert f"# Measured on {NAME}" in text and "| liger | not installed |" in text and ".png" not in text


def test_the_cases_of_a_training_step():
    """As many tokens in each rectangle; text fills 60 % of its own."""
    with pretending(140):
        found = bench_training_step_gpu.cases(CUDA)
    assert list(found) == ["S=128, text", "S=512, text", "S=128, no padding", "S=512, no padding"]
    for name, lengths in found.items():
        assert len(lengths) * max(lengths) == 65536, name
        assert sum(lengths) / 65536 == pytest.approx(0.6 if "text" in name else 1.0, abs=0.03), name
