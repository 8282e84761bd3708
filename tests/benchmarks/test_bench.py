"""The benchmark suite: its command, its ops, and the gate that flags ratios that fell."""

import json
import random
import subprocess
import sys
import types
from pathlib import Path

import compare
import pytest
import record
import report
import torch
from click.testing import CliRunner

from fastbert import cli

ROOT = Path(__file__).resolve().parents[2]


def call(*arguments):
    return CliRunner().invoke(cli.main, ["bench", *map(str, arguments)], prog_name="fastbert")


def result_of(ours, theirs, name="layer_norm bert-base", **more):
    """{file: result}, the result of one row: fastbert's seconds and those of another."""
    row = {"case": name, "pass": "both", "seconds": {"fastbert": ours, "eager": theirs}}
    return {"ops": {"machine": {"device": "a CPU"}, "rows": [row], **more}}


def noisy(ours, theirs, noise=0.0, seed=0):
    """A result of 20 rounds, each drawn from around these seconds."""
    draw = random.Random(seed)
    rounds = ([seconds * (1 + noise * draw.uniform(-1, 1)) for _ in range(20)] for seconds in (ours, theirs))
    return result_of(*rounds)


def fallen(old, new):
    return [change.name for change in compare.changes(old, new) if change.fell]


# --- the gate


def test_a_ratio_that_fell_is_flagged():
    old, slower = noisy(1.0, 2.0, 0.02, 1), noisy(1.25, 2.0, 0.02, 2)
    assert fallen(old, slower) == [("layer_norm bert-base both", "eager", "fastbert")]
    assert fallen(slower, old) == []
    (change,) = compare.changes(slower, old)
    assert change.rose


@pytest.mark.parametrize("times", [0.2, 1.0, 5.0])
@pytest.mark.parametrize("seed", range(5))
def test_neither_noise_nor_another_machine_is_flagged(times, seed):
    assert fallen(noisy(1.0, 2.0, 0.1, 2 * seed), noisy(times, 2.0 * times, 0.1, 2 * seed + 1)) == []


def test_what_slows_a_whole_round_is_not_flagged():
    """A busy machine: each round is slow by another factor, for all alike."""
    draw = random.Random(0)
    slow = [draw.uniform(1, 6) for _ in range(20)]
    new = result_of([s * draw.uniform(0.99, 1.01) for s in slow], [2 * s for s in slow])
    assert fallen(noisy(1.0, 2.0), new) == []


def test_the_margin_is_both_spreads_wider_for_few_rounds_and_at_least_three_percent_each():
    (change,) = compare.changes(result_of([1, 1, 1, 1, 1], [1.8, 1.9, 2.0, 2.1, 2.2]), result_of([1] * 3, [2.0] * 3))
    # of 5 rounds twice the quartiles' distance
    assert change.old.median == 2.0 and change.old.spread == pytest.approx(0.4)
    assert change.new.spread == pytest.approx(0.06) and change.margin == pytest.approx(0.46)
    # 2.0x -> 1.8x: a fall between quiet runs, and none when either is wide
    assert fallen(noisy(1.0, 2.0), noisy(1.0, 1.8))
    assert fallen(noisy(1.0, 2.0, 0.2), noisy(1.0, 1.8)) == fallen(noisy(1.0, 2.0), noisy(1.0, 1.8, 0.2)) == []


def test_too_few_rounds_are_no_ground():
    assert compare.ratios(result_of([1.0, 1.0], [2.0, 2.0])) == {}
    assert len(compare.ratios(result_of([1.0] * 3, [2.0] * 3))) == 1


def test_every_implementation_of_ours_is_held_to_every_other():
    seconds = {name: [1.0, 1.0, 1.0] for name in ("transformers eager", "transformers sdpa", "swapped", "fastbert")}
    found = compare.ratios({"models": {"rows": [{"case": "bert-base", "seconds": seconds}]}})
    assert {(other, ours) for _, other, ours in found} == {
        (f"transformers {kind}", ours) for kind in ("eager", "sdpa") for ours in ("swapped", "fastbert")
    }


@pytest.mark.parametrize("file", ["families", "training_step", "models", "ops", "data"])
def test_committed_results_can_be_compared(file):
    """Nothing falls against itself, and everything when what is ours takes twice the time."""
    path = report.FEATURED / f"{file}.json"
    old, new = compare.read(path), compare.read(path)
    assert fallen(old, new) == []
    for row in new[file]["rows"]:
        for name, seconds in row["seconds"].items():
            row["seconds"][name] = [2 * s for s in seconds] if record.is_ours(name) else seconds
    known = {name for name, _, _ in compare.ratios(old)}
    names = {name for name, _, _ in fallen(old, new)}
    assert len(names) >= 0.9 * len(known) >= 0.9


def test_the_table_and_the_exit_code(capsys):
    old = result_of([1.0] * 5, [2.0] * 5)
    assert compare.told(old, result_of([2.0] * 5, [2.0] * 5, machine={"device": "another CPU"})) == 1
    said = capsys.readouterr().out
    assert "FELL" in said and "2.00x" in said and "1.00x" in said and "eager / fastbert" in said
    assert "device was a CPU, is another CPU" in said and "1 fell" in said
    assert compare.told(old, old) == 0
    assert "0 fell" in capsys.readouterr().out
    # other things than before were measured
    assert compare.told(old, result_of([1.0] * 5, [2.0] * 5, name="pooling")) == 2


def test_what_is_missing_is_told(capsys):
    def with_more(rows=(), **seconds):
        result = result_of([1.0] * 5, [2.0] * 5)
        result["ops"]["rows"][0]["seconds"] |= seconds
        result["ops"]["rows"] += [{"case": name, "seconds": result["ops"]["rows"][0]["seconds"]} for name in rows]
        return result

    assert compare.told(with_more(rows=["pooling"], peer=[3.0] * 5), with_more()) == 0
    said = capsys.readouterr().out.splitlines()
    assert "not measured now: peer / fastbert, in rows that were: 1" in said
    assert "rows of the old run that were not measured now: 1" in said
    # what is new is no matter
    assert compare.told(with_more(), with_more(peer=[3.0] * 5)) == 0
    assert "not measured now" not in capsys.readouterr().out


def test_how_often_it_is_wrong():
    """Halves of the committed rounds, which nothing has changed between; README.md states the figure."""
    count, share, _ = compare.false_alarms(compare.read(report.FEATURED), draws=30)
    assert count > 100 and share < 0.002
    # rounds that drift apart are flagged
    noisy = result_of([1.0] * 8, [2.0, 2.0, 2.0, 2.0, 1.0, 1.0, 1.0, 1.0])
    assert compare.false_alarms(noisy)[1] > 0.002


def test_the_script(tmp_path, monkeypatch, capsys):
    for name, seconds in (("old", 1.0), ("new", 1.5)):
        for folder in (tmp_path, tmp_path / name):
            folder.mkdir(exist_ok=True)
            (folder / f"{'ops' if folder.name == name else name}.json").write_text(
                json.dumps(result_of([seconds] * 5, [2.0] * 5)["ops"])
            )
    (tmp_path / "empty.json").write_text('{"rows": []}')
    # neither a result nor one that can be compared hinders those beside it
    (tmp_path / "old" / "machine.json").write_text('{"device": "a CPU"}')
    (tmp_path / "old" / "rtd.json").write_text('{"rows": [{"name": "x"}]}')

    def code_of(*files):
        monkeypatch.setattr(sys, "argv", ["compare.py", *(str(tmp_path / file) for file in files)])
        with pytest.raises(SystemExit) as ended:
            compare.main()
        return ended.value.code

    assert code_of("old.json", "new.json") == 1 and code_of("new.json", "old.json") == 0
    assert code_of("old", "new") == 1 and code_of("new", "old") == code_of("old", "old.json") == 0
    capsys.readouterr()
    for wrong in ("empty.json", "nowhere.json"):
        assert code_of("old.json", wrong) == 2
        said = capsys.readouterr().err
        assert said.startswith("compare.py: error: ") and said.count("\n") == 1 and wrong in said


# --- the command


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--ops", "layernorm"], ["layernorm is unknown", "layer_norm, bias_gelu"]),
        (["--ops", "pooling", "nothing"], ["nothing is unknown"]),
        (["--models", "bert-huge"], ["bert-huge is unknown", "bert-base"]),
        (["--device", "tpu"], ["tpu"]),
        (["--compare", "nowhere.json"], ["nowhere.json"]),
        (["--compare", ROOT / "README.md"], ["README.md is not JSON"]),
        (["--compare", ROOT / "benchmarks" / "results" / "traffic.json"], ["holds nothing to compare"]),
        (["--compare", ROOT / "kernels"], ["kernels holds nothing to compare"]),
        (["--output", ROOT / "README.md"], ["README.md: no results can be written there"]),
    ],
    ids=lambda value: str(value[0])[:20],
)
def test_what_is_wrong_is_one_line(arguments, parts, monkeypatch):
    monkeypatch.setattr(subprocess, "run", None)
    done = call(*arguments)
    assert done.exit_code == 2, done.output
    assert done.stderr.startswith("fastbert: error: ") and done.stderr.count("\n") == 1, done.stderr
    for part in parts:
        assert part in done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there():
    done = call("--device", "cuda")
    assert done.exit_code == 2 and "finds no GPU" in done.stderr


def test_without_a_checkout(tmp_path, monkeypatch):
    monkeypatch.setattr(cli, "__file__", str(tmp_path / "site-packages" / "fastbert" / "cli.py"))
    done = call("--quick")
    assert done.exit_code == 2 and "checkout of the repository" in done.stderr and done.stderr.count("\n") == 1


@pytest.fixture
def started(monkeypatch):
    """What the suite would start, (arguments, environment) each; `codes` of scripts that fail, `files` they write."""
    calls = types.SimpleNamespace(all=[], codes={}, files={})

    def run(command, cwd, env):
        script = Path(command[1]).name
        assert (ROOT / command[1]).is_file() and cwd == ROOT
        calls.all.append((command[1:], env))
        if script in calls.files:
            folder = Path(command[command.index("--output") + 1])
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "ops.json").write_text(json.dumps(calls.files[script]["ops"]))
        return types.SimpleNamespace(returncode=calls.codes.get(script, 0))

    monkeypatch.setattr(subprocess, "run", run)
    return calls


def test_names_choose_the_steps(started, tmp_path):
    assert (
        call("--ops", "attention", "pooling", "--models", "bert-base", "--quick", "--output", tmp_path).exit_code == 0
    )
    ops, models = ([Path(arguments[0]).name, *arguments[1:]] for arguments, _ in started.all)
    assert ops == ["bench_ops.py", "--ops", "attention", "pooling", "--quick", "--output", str(tmp_path)]
    assert models[:3] == ["bench_models.py", "--models", "bert-base"]
    assert models[-3:] == ["--quick", "--output", str(tmp_path)]


def test_without_names_everything_runs_and_a_part_never_replaces_the_whole(started):
    assert call().exit_code == 0
    scripts = [Path(arguments[0]).name for arguments, _ in started.all]
    assert scripts[0] == "bench_ops.py" and scripts[-1] == "report.py"
    assert {"bench_models.py", "bench_training.py", "bench_data.py"} < set(scripts)
    assert all("results" in str(arguments) and str(ROOT) not in str(arguments) for arguments, _ in started.all)
    for part in (["--ops", "all"], ["--models", "all"], ["--quick"]):
        started.all.clear()
        assert call(*part).exit_code == 0
        # not where this checkout lies: results state the command
        assert all("runs/bench" in arguments and str(ROOT) not in str(arguments) for arguments, _ in started.all), part


def test_switches_of_the_user_do_not_reach_the_steps(started, monkeypatch):
    monkeypatch.setenv("FASTBERT_IMPL", "reference")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    call("--ops", "pooling", "--device", "cpu")
    ((_, environment),) = started.all
    assert not {"FASTBERT_IMPL", "TRITON_INTERPRET"} & environment.keys()
    assert environment["CUDA_VISIBLE_DEVICES"] == ""


def test_a_step_that_fails_is_told_and_does_not_stop_the_next(started, tmp_path):
    started.codes["bench_ops.py"] = 1
    done = call("--ops", "all", "--models", "all", "--output", tmp_path)
    assert done.exit_code == 1 and len(started.all) == 2
    assert "failed: ops" in done.stdout and "[2/2] models" in done.stdout


@pytest.mark.parametrize(("seconds", "code"), [(1.0, 0), (1.5, 1)])
def test_compare_reads_the_old_results_before_they_are_written_over(started, tmp_path, seconds, code):
    file = tmp_path / "ops.json"
    started.files["bench_ops.py"] = result_of([seconds] * 5, [2.0] * 5)
    for old in (file, tmp_path):
        file.write_text(json.dumps(result_of([1.0] * 5, [2.0] * 5)["ops"]))
        done = call("--ops", "all", "--compare", old, "--output", tmp_path)
        assert done.exit_code == code, done.output
        assert f"{code} fell" in done.stdout
    # what this run has not written is not compared
    started.files.clear()
    assert call("--ops", "all", "--compare", file, "--output", tmp_path).exit_code == 2
