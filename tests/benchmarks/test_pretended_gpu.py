"""What benchmarks do on a GPU only, walked on a CPU that says it is one. No time means anything here."""

import importlib
import itertools
import json
import sys
from dataclasses import replace

import bench_models
import bench_ops
import gpu
import machine
import model_pairs
import pytest
import report
import torch
import tune
from pretend_cuda import NAME, Stream, pretending, small

from fastbert import reference
from fastbert.proof import op_cases

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


def step(title="one", lengths=(5, 9, 3), implementations=("transformers", "fastbert", model_pairs.OWN)):
    """A training step of BERT-base on few tokens."""
    case = bench_models.step_cases(machine.device("cpu"))[0]
    return replace(case, title=title, lengths=lengths, dtype="bfloat16", implementations=implementations)


def refusing(monkeypatch, implementation, failure):
    """Calls of this implementation fail."""
    call = model_pairs.Model.call

    def refuse(**_):
        raise failure

    def changed(self, name, *rest):
        return refuse if name == implementation else call(self, name, *rest)

    monkeypatch.setattr(model_pairs.Model, "call", changed)


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
    # no op has a second turn before every op had its first
    plain = [case.op for case in full if not case.dropout_p]
    assert plain[: len(op_cases.OPS)] == op_cases.OPS
    assert {sum(case.lengths) for case in full} == {65536} and {case.dtype for case in full} == {torch.bfloat16}
    assert len(set(full)) == len(full) and len(set(searched)) == len(searched)
    assert {case.op for case in searched} == set(op_cases.OPS)
    with pretending(24):
        assert {sum(case.lengths) for case in bench_ops.cases(CUDA)} == {16384}


def test_training_step(run, tmp_path, monkeypatch):
    """All four libraries take steps. What fails is told: a library in its place, a case at the end."""
    names = ("transformers", "transformers compiled", "fastbert", model_pairs.OWN)
    shapes = {"first": (5, 9, 3), "second": (9, 9), "third": (4, 9)}
    todo = [step(title, lengths, names) for title, lengths in shapes.items()]
    monkeypatch.setattr(bench_models, "step_cases", lambda *_: todo)
    batches = model_pairs.batches

    def batches_of(config, case, device):
        if case.title == "second":
            raise RuntimeError("out of memory")
        return batches(config, case, device)

    monkeypatch.setattr(model_pairs, "batches", batches_of)
    assert run(bench_models, "step", "--rounds", 2) == 1
    result = read(tmp_path, "training_step.json")
    assert [row["case"] for row in result["rows"]] == ["first", "third"] and result["settings"]["dropout"] == 0.1
    for row in result["rows"]:
        assert row["seconds"].keys() == set(names)
        assert all(len(rounds) == 2 for rounds in row["seconds"].values()) and row["difference"] < 0.02
        assert row["summary"]["fastbert"]["peak_gib"] == 2
    assert not [name for name in result["not_measured"] if name.startswith("transformers compiled")]
    assert len(run.compiled) == 1 and "transformers compiled" in (tmp_path / "training_step.md").read_text("utf-8")
    assert ("reset",) in Stream.log
    del todo[1:]
    refusing(monkeypatch, "transformers compiled", RuntimeError("too large"))
    assert run(bench_models, "step", "--rounds", 1) == 0
    result = read(tmp_path, "training_step.json")
    lost = {why for name, why in result["not_measured"].items() if name.startswith("transformers compiled: ")}
    assert lost == {"RuntimeError: too large"} and "fastbert" in result["rows"][0]["seconds"]
    assert run(bench_models, "step", "--warm") == 0


def test_what_is_compared_has_no_dropout_and_what_is_timed_has():
    pair = ("transformers", "fastbert")
    with pretending(30), small():
        case = step(implementations=pair)
        model = model_pairs.Model("bert-base", None, CUDA, dropout=True)
        calls, difference = model_pairs.checked(model, case, CUDA, {})
        assert calls.keys() == set(pair) and difference < 0.02
        for name, call in calls.items():
            assert model.module(name, case).training
            assert len({call().item() for _ in range(3)}) == 3, name


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


def test_models_are_compiled_beforehand(run, monkeypatch, capsys):
    """What the cases will call; one sequence with CUDA graphs. What does not compile stops no other."""
    case = bench_models.Case("fill", "bert-tiny", (9, 5), "train", "bfloat16")
    shapes = [case, replace(case, model="no model"), replace(case, passes="inference", lengths=(7,))]
    monkeypatch.setattr(bench_models, "cases", lambda *_: shapes)
    compiled = []
    monkeypatch.setattr(
        model_pairs.Model, "compiled_module", lambda _, module, case, mode=None: compiled.append(mode) or module
    )
    assert run(bench_models, "--warm") == 0
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


def test_a_page_without_matplotlib(monkeypatch, tmp_path):
    """What was measured is told, without pictures."""
    step = {
        "machine": {"device": NAME, "torch": "2.11", "triton": "3.6", "capability": "9.0"}, "date": "2026-11-23",
        "command": "python x", "settings": {"left_out": []}, "rows": [],
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
        found = {case.title: case.lengths for case in bench_models.step_cases(CUDA)}
    assert list(found) == ["S=128, text", "S=512, text", "S=128, no padding", "S=512, no padding"]
    for name, lengths in found.items():
        assert len(lengths) * max(lengths) == 65536, name
        assert sum(lengths) / 65536 == pytest.approx(0.6 if "text" in name else 1.0, abs=0.03), name


def out_of_memory(call, after):
    """`call`, which runs out of memory after so many calls."""
    count = itertools.count()

    def failing(**settings):
        if next(count) >= after:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return call(**settings)

    return failing


@pytest.mark.parametrize("after", [0, 2, 3, 6])
def test_a_peer_that_fails_costs_its_row(after, run, tmp_path, monkeypatch):
    """At its first call, in a later one, in a timed one: everybody else's figures stay."""
    every = bench_ops.variants

    def planted(arguments):
        run = op_cases.run_of(reference.layer_norm, arguments)
        run.forward = out_of_memory(run.forward, after)
        return run

    monkeypatch.setattr(bench_ops, "variants", lambda op: every(op) | {"planted": planted})
    assert run(bench_ops, "--rounds", 2, "--quick", "--ops", "layer_norm") == 0
    rows = read(tmp_path, "ops.json")["rows"]
    assert len(rows) == 3
    for row in rows:
        assert "planted" not in row["seconds"] and {"fastbert", "eager"} <= row["seconds"].keys()
        assert row["not_measured"]["planted"] == "OutOfMemoryError: CUDA out of memory"


@pytest.mark.parametrize("where", ["call", "turn"])
def test_a_model_that_fails_costs_its_row(where, run, tmp_path, monkeypatch):
    """A peer that fails in its first or in a timed call costs its own figures alone."""
    call = bench_models.Model.call

    def calls(self, implementation, case, *batches):
        made = call(self, implementation, case, *batches)
        return out_of_memory(made, int(where == "turn")) if implementation == "swapped" else made

    monkeypatch.setattr(bench_models.Model, "call", calls)
    assert run(bench_models, "--rounds", 2, "--quick", "--models", "bert-tiny", "--only", "fill") == 0
    result = read(tmp_path, "models.json")
    assert len(result["rows"]) == 4
    assert all("swapped" not in row["seconds"] and "fastbert" in row["seconds"] for row in result["rows"])
    lost = {why for name, why in result["not_measured"].items() if name.startswith("swapped: ")}
    assert lost == {"OutOfMemoryError: CUDA out of memory"}


def test_an_own_step(run, tmp_path, monkeypatch):
    """fastbert's alone, without padding, at both lengths."""
    monkeypatch.setattr(machine, "kernel_times", lambda call: [{"kernel": "k", "calls": 1, "us": 1.0}])
    assert run(bench_models, "step", "--own", "--rounds", 2) == 0
    rows = read(tmp_path, "own_step.json")["rows"]
    assert [row["case"] for row in rows] == ["S=128, no padding", "S=512, no padding"]
    for row in rows:
        assert row["seconds"].keys() == {"fastbert, packed"} and row["summary"]["fastbert, packed"]["kernels"]
    assert not (tmp_path / "training_step.json").exists() and "2 x 512" in (tmp_path / "own_step.md").read_text("utf-8")
    assert len(gpu.highlights(tmp_path)) == 2


def test_sizes_go_by_all_of_the_memory(monkeypatch):
    """Not by what others have left free."""
    with pretending(140):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (2**30, 140 * 2**30))
        assert {sum(case.lengths) for case in bench_ops.cases(CUDA)} == {65536}
        assert {len(case.lengths) * max(case.lengths) for case in bench_models.step_cases(CUDA)} == {65536}
        case = bench_models.cases(CUDA, ["bert-base"], ["fill"], False)[0]
        assert len(case.lengths) * max(case.lengths) == 65536
