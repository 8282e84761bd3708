"""The benchmarks of ops: their variants, their checks, what they write."""

import json
import os
import subprocess
import sys
import types

import bench_ops
import compare
import gpu
import machine
import op_pages
import op_peers
import peers
import pytest
import torch
from test_bench import ROOT

from fastbert import reference
from fastbert.proof import op_cases
from fastbert.proof.op_cases import Case

CPU = torch.device("cpu")

# --- ops


CASES = [Case(op, "tiny", lengths, torch.float32) for op in op_cases.OPS for lengths in ((3, 8, 1, 5), (8, 8))]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_variant_that_runs_here_computes_the_op(case):
    """Against the reference in fp64. What compiles is left out: it is the same functions."""
    arguments = case.arguments(CPU)
    wanted = op_cases.truth(case, arguments, torch.float64)
    agreed = set()
    for name, make in op_peers.variants(case.op).items():
        if name in bench_ops.COMPILING:
            continue
        try:
            run = op_peers.build(make, arguments)
        except peers.Unavailable as reason:
            assert str(reason).startswith(
                ("not installed (No module named", "runs on GPUs only", "on a CPU it makes", "this torch")
            ), reason
            continue
        except peers.NotApplicable:
            continue
        assert op_cases.disagreement(op_cases.results(run), wanted) < 1e-5, name
        moves(run, name)
        agreed.add(name)
    assert {"fastbert", "eager"} <= agreed


def moves(run, name):
    """Other numbers at the second place give another result, and the first place still gives the first one."""
    turn = bench_ops.rotation(run, op_cases.cotangent(run), types.SimpleNamespace(copies=lambda nbytes: 4))
    places = [x.data_ptr() for x in run.leaves]
    first = run.forward().detach()
    turn(1)
    assert not set(places) & {x.data_ptr() for x in run.leaves}, name
    assert torch.equal(run.forward(), first), name
    for x in run.leaves:
        x.data.mul_(1.5).add_(0.3)
    assert not torch.equal(run.forward(), first), name
    turn(4)
    assert [x.data_ptr() for x in run.leaves] == places and torch.equal(run.forward(), first), name


def test_a_disagreement_is_seen():
    output, gradients = torch.ones(4), [torch.ones(3), torch.ones(2)]
    wanted = (output, gradients)
    assert op_cases.disagreement((output, gradients), wanted) == 0
    assert op_cases.disagreement((output, [gradients[0], 1.01 * gradients[1]]), wanted) == pytest.approx(0.01)
    # of what has no backward the output alone is held to the truth
    assert op_cases.disagreement((1.02 * output, []), wanted) == pytest.approx(0.02)
    with pytest.raises(ValueError):
        op_cases.disagreement((output, gradients[:1]), wanted)


def test_a_bias_as_a_column_is_the_bias(monkeypatch):
    """Cut Cross Entropy's released version takes none."""
    theirs = types.ModuleType("cut_cross_entropy")

    def linear_cross_entropy(e, c, targets, impl, reduction):
        assert e.shape[1] == c.shape[1] == 64 and impl == "torch_compile"
        return torch.nn.functional.cross_entropy(e @ c.T, targets, reduction=reduction)

    theirs.linear_cross_entropy = linear_cross_entropy
    monkeypatch.setitem(sys.modules, "cut_cross_entropy", theirs)
    case = Case("masked_cross_entropy", "tiny", (30, 40), torch.float32)
    arguments = case.arguments(CPU)
    run = op_peers.build(op_peers.variants(case.op)["cut_cross_entropy, compiled"], arguments)
    assert op_cases.disagreement(op_cases.results(run), op_cases.truth(case, arguments, torch.float64)) < 1e-5


def test_what_is_installed_and_needs_a_gpu_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "liger_kernel", types.ModuleType("liger_kernel"))
    case = Case("layer_norm", "tiny", (3,), torch.float32)
    with pytest.raises(peers.Unavailable, match="runs on GPUs only"):
        op_peers.build(op_peers.variants("layer_norm")["liger"], case.arguments(CPU))


@pytest.fixture
def variants(monkeypatch):
    """A run of bench_ops with these variants of layer_norm beside fastbert."""

    def use(**found):
        ours = {"fastbert": op_peers.variants("layer_norm")["fastbert"]}
        monkeypatch.setattr(bench_ops, "variants", lambda op: ours | found)

    return use


def run_ops(monkeypatch, folder, *arguments):
    """The exit code of bench_ops on a tiny layer_norm, without and with dropout, and what it wrote."""
    case = Case("layer_norm", "tiny", (3, 8, 5), torch.float32)
    both = [case, Case("layer_norm", "tiny", (3, 8, 5), torch.float32, 0.1)]
    monkeypatch.setattr(bench_ops, "cases", lambda device, quick: both)
    monkeypatch.setattr(machine, "ceilings", lambda device: {"copy": 1e10, "product": 1e11})
    monkeypatch.setattr(sys, "argv", ["bench_ops.py", "--rounds", "3", "--output", str(folder), *arguments])
    with pytest.raises(SystemExit) as ended:
        bench_ops.main()
    return ended.value.code, json.loads((folder / "ops.json").read_text(encoding="utf-8"))


def eager(arguments):
    return op_cases.run_of(op_cases.TABLE["layer_norm"].plain, arguments)


def test_what_a_run_writes(variants, monkeypatch, tmp_path):
    def forward_only(arguments):
        run = eager(arguments)
        run.forward_only = "no backward here"
        return run

    def nowhere(arguments):
        raise peers.Unavailable("not installed")

    variants(eager=eager, inference=forward_only, missing=nowhere)
    code, result = run_ops(monkeypatch, tmp_path)
    assert code == 0 and result.keys() >= {"machine", "date", "command", "settings", "rows", "not_measured"}
    assert result["not_measured"] == {"missing": "not installed"}
    assert [(row["dropout_p"], row["pass"]) for row in result["rows"]] == [
        (p, what) for p in (0.0, 0.1) for what in ("forward", "backward", "both")
    ]
    forward, backward, both = result["rows"][:3]
    assert forward["seconds"].keys() == {"fastbert", "eager", "inference"}
    assert both["seconds"].keys() == backward["seconds"].keys() == {"fastbert", "eager"}
    assert both["not_measured"] == {"inference": "no backward here", "missing": "not installed"}
    # what is stated follows from the raw seconds
    for row in result["rows"]:
        assert row["tokens"] == 16 and row["padded_tokens"] == 24
        for name, seconds in row["seconds"].items():
            part, median = row["summary"][name], sorted(seconds)[1]
            assert len(seconds) == 3 and part["median_us"] == pytest.approx(1e6 * median, abs=0.06)
            ratios = sorted(a / b for a, b in zip(seconds, row["seconds"]["fastbert"]))
            assert part["times_fastbert"] == pytest.approx(ratios[1], abs=1e-2)
            assert part["gb_per_s"] == pytest.approx(row["bytes"] / median / 1e9, abs=0.06)
    for i in range(3):
        parts = [row["seconds"]["eager"][i] for row in (forward, backward, both)]
        assert parts[0] + parts[1] == pytest.approx(parts[2])
    # 3 and 4 rows of 32 fp32 numbers for each of 16 tokens
    assert (forward["bytes"], backward["bytes"], both["bytes"]) == (6144, 8192, 14336)
    assert both["floor_us"] == pytest.approx(1.4)
    assert both["summary"]["eager"]["peak_gib"] > 0 and backward["summary"]["eager"]["peak_gib"] is None
    assert len(compare.ratios({"ops": result})) == 8
    first, second = gpu.highlights(tmp_path)
    assert first.startswith(both["case"]) and "best of 1 others: eager" in first and "dropout 0.1" in second
    page = (tmp_path / "ops.md").read_text(encoding="utf-8")
    assert "| eager |" in page and "- missing: not installed" in page and "dropout 0.1" in page
    lines = (tmp_path / "ops.csv").read_text(encoding="utf-8").splitlines()
    assert len(lines) == 1 + 6 * 2 + 2 and lines[0].startswith("op,case,pass")


def test_what_is_wrong_is_not_timed(variants, monkeypatch, tmp_path):
    def wrong(arguments):
        return op_cases.run_of(lambda **a: 1.001 * op_cases.TABLE["layer_norm"].plain(**a), arguments)

    def wrong_gradient(arguments):
        def function(x, weight, bias, residual, dropout_p=0.0, seed=None, offset=0):
            y = op_cases.TABLE["layer_norm"].plain(x, weight, bias, residual)
            return y + 0.01 * (bias - bias.detach())

        return op_cases.run_of(function, arguments)

    def breaks(arguments):
        return op_cases.run_of(lambda **a: 1 / 0, arguments)

    variants(eager=eager, wrong=wrong, gradient=wrong_gradient, breaks=breaks)
    code, result = run_ops(monkeypatch, tmp_path)
    assert code == 0
    for row in result["rows"]:
        assert row["seconds"].keys() == {"fastbert", "eager"}
    plain, dropped = result["rows"][0]["not_measured"], result["rows"][3]["not_measured"]
    assert plain["wrong"].startswith("wrong: differs from the reference by 1.0e-03")
    assert plain["gradient"].startswith("wrong: ") and plain["breaks"].startswith("ZeroDivisionError")
    assert dropped.keys() == plain.keys()


def test_fastbert_itself_wrong_fails_the_run(variants, monkeypatch, tmp_path):
    variants(eager=eager)
    real = reference.layer_norm
    monkeypatch.setattr(reference, "layer_norm", lambda *a, **k: 1.001 * real(*a, **k))
    monkeypatch.setattr(
        bench_ops, "truth", lambda case, a: op_cases.results(eager({n: x.double() for n, x in a.items()}))
    )
    code, result = run_ops(monkeypatch, tmp_path)
    assert code == 1 and not [row for row in result["rows"] if row["dropout_p"] == 0]


def test_a_loss_is_called_a_loss():
    def row(theirs):
        seconds = {"fastbert": [2.0, 2.1, 1.9, 2.0], "eager": theirs}
        parts = {name: bench_ops.summary(x, seconds["fastbert"], 1e9, 0, 1.0, None) for name, x in seconds.items()}
        return {"case": "pooling", "pass": "both", "summary": parts}

    lost, won, even = row([1.0, 1.1, 1.0, 0.9]), row([3.0] * 4), row([1.9, 2.2, 1.8, 2.1])
    assert op_pages.lost(lost) == {"eager": pytest.approx(0.5, abs=0.03)}
    assert op_pages.lost(won) == op_pages.lost(even) == {}
    assert "LOSES" in op_pages.told([lost] * 3) and "wins" in op_pages.told([won] * 3)
    assert "within the spread" in op_pages.told([even] * 3)
    assert "eager (0.5" in "\n".join(op_pages.losses([lost, won]))


def test_the_cases_of_a_cpu():
    """Quick ones are among the full ones, so that a quick run can be compared with a full one."""
    full, quick = bench_ops.cases(CPU), bench_ops.cases(CPU, quick=True)
    assert [case.op for case in quick] == op_cases.OPS and set(quick) <= set(full) and len(set(full)) == len(full)
    for op in op_cases.WITH_DROPOUT:
        assert {case.dropout_p for case in full if case.op == op} == {0.0, 0.1}, op
    for op in op_cases.OPS:
        shapes = {min(case.lengths) == max(case.lengths) for case in full if case.op == op}
        assert shapes == ({False} if op == "contrastive_cross_entropy" else {True, False}), op
    for case in full:
        if case.dropout_p:
            assert full[full.index(case) - 1] == Case(case.op, case.model, case.lengths, case.dtype)


def test_memory_of_a_call_on_a_cpu():
    x = torch.ones(2**18)  # 1 MiB
    # the first result is let go before the third is there
    assert machine.gib_per_call(CPU, lambda: ((x + 1) + 1) + 1) * 1024 == pytest.approx(2, rel=0.01)


def test_every_variant_stands_in_the_readme():
    text = (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")
    for op in op_cases.OPS:
        for name in op_peers.variants(op):
            assert f"`{name.removesuffix(', all-true mask')}`" in text, name
    for script in (ROOT / "benchmarks").glob("*.py"):
        assert script.name in text, script.name


def test_the_suites_run_under_plain_pytest(tmp_path):
    file = tmp_path / "x.json"
    # nor may it take itself for a worker of this run: then no file is written
    environment = {n: x for n, x in os.environ.items() if n != "TRITON_INTERPRET" and not n.startswith("PYTEST_")}
    command = [sys.executable, "-m", "pytest", "benchmarks/", f"--benchmark-json={file}", "-k", "pooling"]
    command += ["-p", "no:xdist"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(file.read_text(encoding="utf-8"))["benchmarks"]
    ours = [f"test_op[pooling-{name}]" for name in ("fastbert", "eager", "torch segment_reduce")]
    assert [row["name"] for row in found] == ours
    assert all(row["extra_info"]["tokens"] == sum(bench_ops.LENGTHS) for row in found)
