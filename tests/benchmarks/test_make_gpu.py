"""benchmarks/gpu.py without a GPU: its rehearsal, and what it leaves behind however it ends."""

import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
import types
from pathlib import Path

import gpu
import machine
import pytest
import torch
from pretend_cuda import pretending

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a rehearsal is for machines without a GPU")

WARMED = ("tune.py", "bench_models.py", "bench_ops.py")
# the files of results that a step leaves when it is done
RESULTS = {
    "device": {"machine.json"}, "own step": {"own_step.json", "own_step.md"}, "tests": {"tests.json"},
    "tuning": {"profile.json"}, "ops": {"ops.json", "ops.csv", "ops.md"}, "races": {"races.json"},
    "training step": {"training_step.json", "training_step.md"}, "other tests": {"other_tests.json"}, "page": set(),
}  # fmt: skip


def start(tmp_path, *arguments):
    # a user's own switches must not reach the steps
    environment = {**os.environ, "FASTBERT_IMPL": "reference", "FASTBERT_AUTOTUNE": "1", "TMPDIR": str(tmp_path)}
    command = [sys.executable, "benchmarks/gpu.py", *arguments, "--output", str(tmp_path / "out")]
    return subprocess.Popen(
        command, cwd=gpu.ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def finished(archive):
    """{step: how it ended} of an archive, whose files are there for every step that passed."""
    with tarfile.open(archive) as tar:
        names = set(tar.getnames())
        steps = json.load(tar.extractfile("run.json"))["steps"]
    for step in steps:
        if step["status"] == "passed":
            assert {f"results/{name}" for name in RESULTS[step["step"]]} <= names, step
        has_log = f"logs/{step['step'].replace(' ', '_')}.log" in names
        assert has_log == (step["status"] != "left out")
    return {step["step"]: step["status"] for step in steps}


def imports(archive, root):
    """Import an archive into a tree of its own; {name: content} of the JSON files that came."""
    folder = gpu.put_in_place(archive, root)
    assert folder == root / "benchmarks" / "results" / "rehearsal"
    assert (folder / "README.md").read_text(encoding="utf-8").startswith("# REHEARSAL: no time means anything")
    assert "REHEARSAL" in (folder / "summary.md").read_text(encoding="utf-8")
    # settings of the interpreter are of no use to anybody
    assert not (root / "kernels").exists() and list((root / "runs" / "gpu" / "logs").glob("*.log"))
    return {path.name: json.loads(path.read_text(encoding="utf-8")) for path in folder.glob("*.json")}


def test_the_whole_command_in_forty_seconds(tmp_path):
    """More than fits: what overruns is ended, the last steps are left out, the archive has what the others made."""
    # on a machine that is busy enough not even the first step fits
    for seconds in (40, 80, 160):
        began = time.monotonic()
        process = start(tmp_path, "--seconds", str(seconds))
        said, _ = process.communicate(timeout=2 * seconds)
        assert time.monotonic() - began < 1.5 * seconds
        if finished(tmp_path / "out" / gpu.ARCHIVE)["device"] == "passed":
            break
    assert [path.name for path in (tmp_path / "out").iterdir()] == [gpu.ARCHIVE], said
    steps = finished(tmp_path / "out" / gpu.ARCHIVE)
    assert list(steps) == list(RESULTS) and set(steps.values()) <= {"passed", "out of time", "left out"}, said
    assert process.returncode == int(set(steps.values()) != {"passed"}) and steps["device"] == "passed"
    found = imports(tmp_path / "out" / gpu.ARCHIVE, tmp_path / "tree")
    assert "rehearsal" in found["machine.json"]
    if steps["tuning"] == "passed":
        assert {"layer_norm_fwd", "layer_norm_bwd", "bias_gelu_bwd"} <= found["profile.json"]["microseconds"].keys()
    if steps["own step"] == "passed":
        (row,) = found["own_step.json"]["rows"]
        assert row["seconds"].keys() == {"fastbert, packed"} and len(row["seconds"]["fastbert, packed"]) == 2


def test_a_killed_command_leaves_what_its_finished_steps_made(tmp_path):
    process = start(tmp_path, "--seconds", "300", "--only", "device", "ops")
    archive = tmp_path / "out" / gpu.ARCHIVE
    for line in process.stdout:
        if line.startswith("[2/2]"):
            break
    children = []
    while not children:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    process.kill()
    process.wait()
    # a step does not outlive the command
    assert ended(*children)
    assert finished(archive) == {"device": "passed"}
    assert imports(archive, tmp_path / "tree").keys() == {"machine.json"}


def ended(*pids):
    """Whether these processes are gone; what has been killed may take a moment."""
    end = time.monotonic() + 10
    while any(is_running(pid) for pid in pids) and time.monotonic() < end:
        time.sleep(0.1)
    return not any(is_running(pid) for pid in pids)


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.fixture
def step(tmp_path):
    """A step that runs one test, with the given body."""
    for name in ("logs", "results"):
        (tmp_path / name).mkdir()

    def make(body, name="tests"):
        file = tmp_path / f"test_of_{name}.py"
        file.write_text(f"import time\ndef test_this():\n    {body}\n")
        return gpu.Step(name, 240, None, f"{name}.json", (str(file), "-p", "no:cacheprovider"))

    return make


def test_a_failing_step_does_not_stop_the_next_and_is_told(step, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "plan", lambda on_gpu: [step("assert False"), step("pass", "races")])
    with pytest.raises(SystemExit) as ended:
        gpu.main(["--output", str(tmp_path / "out")])
    assert ended.value.code == 1
    with tarfile.open(tmp_path / "out" / gpu.ARCHIVE) as tar:
        tests, races = (json.load(tar.extractfile(f"results/{name}.json")) for name in ("tests", "races"))
    assert (tests["passed"], tests["failed"], races["passed"]) == (0, 1, 1) and "test_this" in tests["failures"][0]
    assert finished(tmp_path / "out" / gpu.ARCHIVE) == {"tests": "FAILED", "races": "passed"}


def test_a_step_that_takes_too_long_is_ended(step, tmp_path):
    """And what it has seen until then is not lost."""
    both = step("pass\ndef test_that():\n    time.sleep(60)")
    # as in a command that a shell runs in the background
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        status, took, last = gpu.run(both, 12, dict(os.environ), tmp_path)
    finally:
        signal.signal(signal.SIGINT, before)
    assert status == "out of time" and took <= 13
    gpu.counts(last, tmp_path / "tests.xml", tmp_path / "tests.json")
    assert json.loads((tmp_path / "tests.json").read_text(encoding="utf-8"))["passed"] == 1


@pytest.mark.parametrize("ends", [False, True])
def test_nothing_of_a_step_runs_beside_the_next(ends, step, tmp_path):
    """Neither what it started, in its group, nor what ran beside it, be it ended or done."""
    sleep = "import subprocess, sys; "
    sleep += "print(subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']).pid, file=open({!r}, 'w'))"
    first, second = tmp_path / "first", tmp_path / "second"
    body = f"exec({sleep.format(str(first))!r})\n    time.sleep({4 if ends else 60})"
    beside = [sys.executable, "-c", sleep.format(str(second)) + "; import time; time.sleep(60)"]
    done = [sys.executable, "-c", "print('compiled')"]
    status, *_ = gpu.run(step(body), 30 if ends else 12, dict(os.environ), tmp_path, meanwhile=[done, beside])
    assert status == ("passed" if ends else "out of time")
    assert ended(*(path.read_text().strip() for path in (first, second)))
    assert "compiled" in (tmp_path / "logs" / "compile.log").read_text()


def test_what_a_killed_pytest_leaves_is_no_failure_of_the_command(tmp_path):
    for content in (None, "<testsuites><testcase"):
        xml = tmp_path / "x.xml"
        if content:
            xml.write_text(content)
        gpu.counts("2 failed, 3 passed in 4s", xml, tmp_path / "tests.json")
        counted = json.loads((tmp_path / "tests.json").read_text(encoding="utf-8"))
        assert (counted["passed"], counted["failed"], counted["failures"]) == (3, 2, [])


def test_a_log_in_the_archive_is_cut_to_its_end(tmp_path):
    (tmp_path / "work" / "logs").mkdir(parents=True)
    (tmp_path / "work" / "logs" / "a.log").write_text("first\n" + "x" * 3 * gpu.LOG_BYTES + "\nlast\n")
    with tarfile.open(gpu.save(tmp_path / "work", tmp_path)) as tar:
        text = tar.extractfile("logs/a.log").read()
    assert len(text) == gpu.LOG_BYTES and text.endswith(b"\nlast\n")


@pytest.mark.parametrize("what", ["missing", "text", "cut", "bits", "other", "device", "path"])
def test_what_is_no_archive_is_refused_in_one_line(what, tmp_path, capsys):
    archive = tmp_path / gpu.ARCHIVE
    files = {
        "other": {"a.txt": "x"}, "device": {"run.json": '{"device": "../../evil"}'}, "cut": {"run.json": "{}" * 10**6},
        "path": {"run.json": '{"device": "x"}', "../outside": "x"},
        "bits": {"run.json": '{"device": "rehearsal"}', "logs/a.log": " ".join(map(str, range(10**4)))},
    }.get(what)  # fmt: skip
    if what == "text":
        archive.write_text("no archive")
    elif files:
        with tarfile.open(archive, "w:gz") as tar:
            for name, content in files.items():
                entry = tarfile.TarInfo(name)
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content.encode()))
    if what == "cut":
        archive.write_bytes(archive.read_bytes()[:-200])
    if what == "bits":
        # inside what is compressed: tar itself would not notice
        content = bytearray(archive.read_bytes())
        content[len(content) // 2] ^= 16
        archive.write_bytes(content)
    with pytest.raises(SystemExit) as ended:
        gpu.main(["--import", str(archive)])
    assert ended.value.code == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert f"--import {archive}" in last and "expected" in last
    assert not (tmp_path.parent / "outside").exists()


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--seconds", "5"], "--seconds is 5: expected at least 10"),
        (["--seconds", "nan"], "--seconds is nan"),
        (["--seconds", "inf"], "--seconds is inf: expected at least 10, and finite"),
        (["--output", "/proc/nowhere"], "--output /proc/nowhere: nothing can be written there"),
        (["--only", "everything"], "invalid choice: 'everything'"),
        # not wrong: no Python will do without a GPU
        (["--can-run"], None),
    ],
)
def test_wrong_options_are_refused_in_one_line(arguments, said, capsys):
    with pytest.raises(SystemExit) as ended:
        gpu.main(arguments)
    error = capsys.readouterr().err
    assert ended.value.code == (2 if said else 1) and (said in error.splitlines()[-1] if said else not error)


def test_the_tests_that_run_on_a_gpu_are_those_that_take_a_device():
    names = {Path(file).name for file in gpu.tests_on_a_device()}
    assert {"test_gpu.py", "test_attention.py", "test_dropout_mask.py"} <= names
    assert not {"test_cli.py", "test_layout.py"} & names


# --- the plan of a GPU


def test_the_plan_fits_and_its_scripts_know_what_they_are_told():
    for on_gpu in (False, True):
        with pretending():
            steps = gpu.plan(on_gpu)
        assert sum(step.seconds for step in steps) == gpu.SECONDS == 480 and list(RESULTS) == [s.name for s in steps]
        for step in steps:
            if step.script:
                # --output is machine.parser's
                files = (gpu.ROOT / "benchmarks" / name for name in (step.script, "machine.py"))
                known = "".join(file.read_text(encoding="utf-8") for file in files)
                command = gpu.command_of(step, 60, gpu.ROOT, not on_gpu)
                assert all(f'"{word}"' in known for word in command if word.startswith("--")), command


def test_on_a_gpu(monkeypatch, tmp_path, capsys):
    """In order, within the time; compilation beside the tests and never beside what is timed; the profile comes too."""
    seen, now = [], [0.0]
    monkeypatch.setattr(gpu, "time", types.SimpleNamespace(monotonic=lambda: now[0], time=time.time))
    with pretending():
        profile = tmp_path / "kernels" / "profiles" / f"{machine.folder(machine.device()).name}.json"
    profile.parent.mkdir(parents=True)
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    monkeypatch.setattr(
        gpu, "tests_on_a_device", lambda: ["tests/kernels/test_gpu.py", "tests/kernels/test_attention.py"]
    )

    def run_step(step, seconds, environment, work, is_rehearsal, meanwhile):
        assert "TRITON_INTERPRET" not in environment and "FASTBERT_IMPL" not in environment
        assert bool(meanwhile) == (step.name == "tests") and not is_rehearsal
        assert all((gpu.ROOT / command[1]).name in WARMED and command[-1] == "--warm" for command in meanwhile)
        seen.append(step.name)
        taken = min(seconds, {"device": 9.0, "ops": 500.0}.get(step.name, step.seconds / 2))
        now[0] += taken
        # what an earlier step left is there for the next
        assert seconds >= step.seconds * 0.99 and now[0] <= gpu.SECONDS
        if step.name == "tuning":
            profile.write_text("{}")
        return ("passed" if taken < seconds else "out of time"), taken, "3 passed"

    monkeypatch.setenv("FASTBERT_IMPL", "reference")
    monkeypatch.setattr(gpu, "run", run_step)
    with pretending(), pytest.raises(SystemExit) as ended:
        gpu.main(["--output", str(tmp_path / "out")])
    assert ended.value.code == 1 and seen == list(RESULTS)
    with tarfile.open(tmp_path / "out" / gpu.ARCHIVE) as tar:
        assert f"profiles/{profile.name}" in tar.getnames()
        summary = tar.extractfile("results/summary.md").read().decode()
    assert summary.startswith("# make gpu on") and "| ops | out of time |" in summary and "not told" not in summary


@pytest.mark.parametrize("seconds", [60, 100, 300])
def test_a_short_run_does_what_matters_most(seconds, monkeypatch, tmp_path):
    """The first steps have all the time that they need; what does not fit is left out, and not begun in vain."""
    given, now = {}, [0.0]
    monkeypatch.setattr(gpu, "time", types.SimpleNamespace(monotonic=lambda: now[0], time=time.time))

    def run_step(step, share, environment, work, *_):
        given[step.name] = share
        now[0] += min(step.seconds, share)
        return "passed", min(step.seconds, share), "3 passed"

    monkeypatch.setattr(gpu, "run", run_step)
    with pretending(), pytest.raises(SystemExit) as ended:
        gpu.main(["--output", str(tmp_path), "--seconds", str(seconds)])
    assert ended.value.code == 1 and now[0] <= seconds
    with pretending():
        whole = gpu.plan(True)
    fit = [step for i, step in enumerate(whole) if sum(x.seconds for x in whole[: i + 1]) <= seconds]
    assert {"device", "own step"} <= {step.name for step in fit} <= given.keys()
    assert all(given[step.name] >= step.seconds for step in fit)
    assert all(given[step.name] >= step.seconds / 2 for step in whole if step.name in given)
    with tarfile.open(tmp_path / gpu.ARCHIVE) as tar:
        steps = {step["step"]: step["status"] for step in json.load(tar.extractfile("run.json"))["steps"]}
    assert steps == {step.name: "passed" if step.name in given else "left out" for step in whole}


def test_without_output_the_archive_is_imported_at_the_end(monkeypatch, tmp_path, capsys):
    imported = []
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    monkeypatch.setattr(gpu, "tests_on_a_device", lambda: ["tests/kernels/test_gpu.py"])
    monkeypatch.setattr(gpu, "run", lambda *arguments: ("passed", 1.0, ""))
    monkeypatch.setattr(gpu, "put_in_place", lambda archive: imported.append(archive) or archive.parent)
    with pytest.raises(SystemExit) as ended:
        gpu.main(["--only", "device"])
    assert ended.value.code == 0 and imported == [tmp_path / "runs" / "gpu" / gpu.ARCHIVE]


# --- one illegal access fails one test


LOST = """
import pytest

lost = []

def work(name, where):
    # what an illegal access does: every later call of the process fails
    if where in name:
        lost.append(name)
    if lost:
        error = "Triton Error [CUDA]" if "setup" in lost[0] else "CUDA error"
        raise RuntimeError(f"{error}: an illegal memory access was encountered")

@pytest.fixture
def around(request):
    work(request.node.name, "setup")
    yield
    work(request.node.name, "teardown")

@pytest.mark.parametrize("name", NAMES)
def test(around, name):
    work(name, "call")
"""


# what is lost at its teardown has passed its call
@pytest.mark.parametrize(("workers", "counted"), [(1, "3 failed, 9 passed"), (0, "1 failed, 2 passed")])
def test_a_cuda_error_costs_one_test(workers, counted, tmp_path):
    """The worker in which it happened is replaced: the context of its process is lost. Without one, nothing follows."""
    if workers:
        pytest.importorskip("xdist")
    (tmp_path / "conftest.py").write_text("from lost_worker import pytest_runtest_makereport  # noqa: F401")
    names = ["a", "b", "call", "c", "d", "setup", "e", "f", "teardown", "g", "h"]
    (tmp_path / "test_lost.py").write_text(LOST.replace("NAMES", str(names)))
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", str(tmp_path)]
    command += ["-n", str(workers)] if workers else []
    # this test may be run by a worker of xdist itself
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    environment["PYTHONPATH"] = str(Path(__file__).parents[1])
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert counted in done.stdout, done.stdout + done.stderr
    assert workers or "every later test" in done.stdout
    assert "an illegal memory access was encountered" in done.stderr + done.stdout
