"""Everything that wants a GPU, in one command of at most ten minutes: `make gpu`.

    python benchmarks/gpu.py              with a GPU: tests, races, tuning, benchmarks, a page of results to commit
    python benchmarks/gpu.py              without: the same in Triton's interpreter on tiny shapes, a rehearsal
    python benchmarks/gpu.py --can-run    exit code 0 where this Python sees a GPU and has what is needed

It needs no network, installs nothing, and runs from the repository with any Python that has torch, triton and pytest. A
step that fails does not stop the next; the exit code says whether all passed. Logs go to runs/gpu, results to
benchmarks/results/<device>, the launch settings found to kernels/profiles. A rehearsal writes to
benchmarks/results/rehearsal alone, which git ignores.
"""

import argparse
import contextlib
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parent.parent
NEEDED = ("torch", "triton", "numpy", "safetensors", "tokenizers", "click", "rich", "pytest")
SECONDS = 585
# what of bench_models.py the interpreter does in seconds
TINY_MODELS = ("--quick", "--rounds", "2", "--models", "bert-tiny", "--only", "batch")
# tests that want the device for themselves: its memory, or its time
ALONE = "repeats or beyond_two_to_the_31 or current_stream"


@dataclass
class Step:
    """A step of the command. seconds: what it may take at least; what others leave is added."""

    name: str
    seconds: int
    script: str | None = None  # of benchmarks/; None: pytest
    result: str | None = None  # the file it writes among the results
    pytest: tuple = ()
    arguments: tuple = ()  # that its script gets on a GPU
    rehearsed: tuple = ()  # and in a rehearsal


def missing():
    return [name for name in NEEDED if importlib.util.find_spec(name) is None]


def sees_gpu():
    import torch

    return torch.cuda.is_available()


def tests_on_a_device():
    """The test files that take the `device` fixture, which is the GPU where there is one."""
    takes = re.compile(r"^def \w+\([^)]*\bdevice\b", re.MULTILINE)
    # what only a GPU can show comes first, should time be short
    files = sorted((ROOT / "tests").rglob("test_*.py"), key=lambda path: (path.name != "test_gpu.py", path.name))
    return [str(path.relative_to(ROOT)) for path in files if takes.search(path.read_text(encoding="utf-8"))]


def plan(on_gpu):
    here = ("tests/test_gpu.py", "tests/test_launch.py")
    together = [*(tests_on_a_device() if on_gpu else here), "-k", f"not ({ALONE})"]
    if on_gpu and importlib.util.find_spec("xdist"):
        together += ["-n", str(workers())]
    return [
        Step("device", 20, "machine.py", "machine.json"),
        Step("tests", 165, None, "tests.json", tuple(together)),
        Step("races", 60, None, "races.json", ("tests/test_gpu.py", "-k", ALONE)),
        Step("tuning", 90, "tune.py"),
        Step("ops", 115, "bench_ops.py", "ops.json", rehearsed=("--rounds", "2")),
        Step("training step", 55, "bench_training_step_gpu.py", "training_step.json", rehearsed=("--rounds", "2")),
        Step("models", 65, "bench_models.py", "models.json", (), ("--rounds", "10"), TINY_MODELS),
        Step("report", 15, "report.py"),
    ]


def workers():
    """Processes that share the GPU, each with some gigabytes."""
    import torch

    gib = torch.cuda.get_device_properties(0).total_memory // 2**30
    return max(1, min(8, (os.cpu_count() or 2) // 2, gib // 16))


class Background:
    """Compiles what the later steps time, into the caches on disk, while the tests run."""

    def __init__(self, environment, logs):
        n = workers()
        # each process would otherwise start as many compilers as there are cores
        environment = {**environment, "TORCHINDUCTOR_COMPILE_THREADS": "2"}
        # whole models one after the other: each takes tens of gigabytes
        whole = '"$0" benchmarks/bench_training_step_gpu.py --warm; "$0" benchmarks/bench_models.py --warm'
        commands = [["sh", "-c", whole, sys.executable]]
        for i in range(n):
            warm = f'"$0" benchmarks/tune.py --warm {i}/{n}; "$0" benchmarks/bench_ops.py --warm {i}/{n}'
            commands.append(["sh", "-c", warm, sys.executable])
        self.processes = [start(command, logs / "compile.log", environment) for command in commands]

    def wait(self, until):
        """Wait for them, not past `until`; then end those that are still at it."""
        while any(process.poll() is None for process in self.processes) and time.monotonic() < until:
            time.sleep(0.2)
        for process in self.processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def start(command, log, environment):
    def hear_ctrl_c():
        # which a shell makes what it starts in the background ignore: pytest could no longer be asked to end
        signal.signal(signal.SIGINT, signal.default_int_handler)

    with open(log, "a", encoding="utf-8") as file:
        return subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True,
            preexec_fn=hear_ctrl_c,
        )  # fmt: skip


def end(process):
    """End a process and what it started: first as Ctrl-C does, upon which pytest still tells what it has seen."""
    for how, seconds in ((signal.SIGINT, 10), (signal.SIGKILL, None)):
        if process.poll() is None:
            os.killpg(process.pid, how)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(seconds)


def command_of(step, seconds, logs, results, is_rehearsal):
    """The command of a step that may take so many seconds."""
    if not step.script:
        xml = logs / f"{step.name}.xml"
        return [sys.executable, "-m", "pytest", "-rfE", "--tb=short", f"--junit-xml={xml}", *step.pytest]
    command = [sys.executable, f"benchmarks/{step.script}"]
    if step.name == "report":
        return [*command, "--device", str(results)]
    if step.name != "device":
        # what it has begun then, it has the rest of its time for
        command += ["--seconds", str(int(seconds * 0.85))]
    if is_rehearsal:
        # settings of the interpreter are of no use to anybody
        command += ["--output", str(results / "profile.json" if step.name == "tuning" else results)]
    return [*command, *(step.rehearsed if is_rehearsal else step.arguments)]


def run(step, seconds, environment, logs, results, is_rehearsal=False):
    """Run a step. (how it ended, how long it took, the last line that it said). results: the folder they go to."""
    log = logs / f"{step.name.replace(' ', '_')}.log"
    # of an earlier run
    for old in (log, logs / f"{step.name}.xml"):
        old.unlink(missing_ok=True)
    command = command_of(step, seconds, logs, results, is_rehearsal)
    began = time.monotonic()
    process = start(command, log, environment)
    said = 0
    try:
        while process.poll() is None and time.monotonic() - began < seconds:
            time.sleep(0.2)
            said = echo(log, said, step)
        late = process.poll() is None
    finally:
        end(process)
    echo(log, said, step)
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    status = "out of time" if late else "passed" if process.returncode == 0 else "FAILED"
    return status, time.monotonic() - began, lines[-1] if lines else ""


def echo(log, said, step):
    """Show the lines of a benchmark as they come; a test's log is long, and only told about at its end."""
    if not step.script:
        return said
    lines = log.read_text(encoding="utf-8", errors="replace").split("\n")
    for line in lines[said:-1]:
        if line.strip():
            print(f"    {line[:160]}", flush=True)
    return len(lines) - 1


def counts(last, xml, file):
    """Write how many tests passed, by the last line that pytest said, and which did not."""
    content = {what: 0 for what in ("passed", "failed", "skipped")}
    content |= {what: int(number) for number, what in re.findall(r"(\d+) (passed|failed|skipped|error)", last)}
    cases = ()
    # a pytest that had to be killed leaves none, or a part
    with contextlib.suppress(FileNotFoundError, ElementTree.ParseError):
        cases = ElementTree.parse(xml).iter("testcase")
    content["failures"] = [
        f"{case.get('classname')}::{case.get('name')}"
        for case in cases
        if case.find("failure") is not None or case.find("error") is not None
    ]
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def highlights(results, since=0.0):
    """Lines on what was measured, from the result files that were written since that time."""

    def read(name):
        file = results / name
        is_new = file.exists() and file.stat().st_mtime >= since
        return json.loads(file.read_text(encoding="utf-8")) if is_new else None

    ops, step, models = read("ops.json"), read("training_step.json"), read("models.json")
    lines = []
    if ops:
        import bench_ops

        cases = {}
        for row in ops["rows"]:
            cases.setdefault(row["case"], []).append(row)
        lines += [bench_ops.told(rows) for rows in cases.values()]
    for row in step["rows"] if step else ():
        figures = row["summary"]
        packed = figures.get("fastbert, packed")
        others = [figures[library] for library in ("transformers", "transformers, compiled") if library in figures]
        if packed and others:
            times = min(other["median_s"] for other in others) / packed["median_s"]
            lines.append(
                f"training step, {row['case']}: {packed['real_tokens_per_s']:,} real tokens/s, "
                f"{packed['percent_of_product']} % of the product's rate, {times:.2f}x transformers"
            )
    if models:
        import bench_models

        lines += [bench_models.line_of(row) for row in models["rows"]]
    return lines


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--can-run", action="store_true", help="only say whether this Python will do for a GPU")
    names = [step.name for step in plan(False)]
    parser.add_argument("--only", nargs="+", choices=names, default=names, help="these steps")
    parser.add_argument("--output", type=Path, help="results of a rehearsal; default: benchmarks/results/rehearsal")
    options = parser.parse_args()
    lacking = missing()
    if options.can_run:
        sys.exit(bool(lacking) or not sees_gpu())
    if lacking:
        sys.exit(f"{sys.executable} lacks {', '.join(lacking)}")

    began, since = time.monotonic(), time.time()
    on_gpu = sees_gpu()
    if on_gpu and options.output:
        parser.error("--output is for rehearsals: results of a GPU go where they are committed")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("FASTBERT_")}
    environment |= {"PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1"}
    if on_gpu:
        environment.pop("TRITON_INTERPRET", None)
        import machine

        results, logs = machine.folder(machine.device()), ROOT / "runs" / "gpu"
        print(f"{results.name}: results go to {results}, logs to {logs}")
    else:
        environment |= {"TRITON_INTERPRET": "1", "FASTBERT_IMPL": "triton", "OMP_NUM_THREADS": "1"}
        results = options.output or ROOT / "benchmarks" / "results" / "rehearsal"
        logs = results / "logs"
        shutil.rmtree(results, ignore_errors=True)
        print("no GPU: a REHEARSAL in Triton's interpreter, on tiny shapes. No time below means anything")
    logs.mkdir(parents=True, exist_ok=True)
    (logs / "compile.log").unlink(missing_ok=True)

    todo = [step for step in plan(on_gpu) if step.name in options.only]
    told, background = [], None
    for i, step in enumerate(todo):
        if on_gpu and step.name == "tests":
            background = Background(environment, logs)
        if background and step.name not in ("device", "tests"):
            # not while something is timed; they may have what the tests have left, and a little more
            background.wait(began + 195)
            background = None
        later = sum(other.seconds for other in todo[i + 1 :])
        seconds = max(SECONDS - (time.monotonic() - began) - later, 10)
        print(f"[{i + 1}/{len(todo)}] {step.name}, at most {seconds:.0f} s", flush=True)
        status, took, last = run(step, seconds, environment, logs, results, not on_gpu)
        if not step.script:
            counts(last, logs / f"{step.name}.xml", results / step.result)
        print(f"    {status} in {took:.0f} s: {last[:160]}", flush=True)
        told.append((step, status, took, last))
    if background:
        background.wait(0)

    title = f"make gpu on {results.name}" if on_gpu else "REHEARSAL, without a GPU: no time means anything"
    lines = [f"# {title}", "", "| step | | seconds | said |", "|---|---|---|---|"]
    lines += [f"| {step.name} | {status} | {took:.0f} | {last[:200]} |" for step, status, took, last in told]
    try:
        found = highlights(results, since) if on_gpu else []
    except Exception as failure:  # what was measured lies in its files: the summary of the steps must not go with this
        found = [f"not told: {type(failure).__name__}: {failure}"]
    lines += ["", *[f"- {line}" for line in found]] if found else []
    summary = "\n".join(lines) + "\n"
    results.mkdir(parents=True, exist_ok=True)
    (results / "summary.md").write_text(summary, encoding="utf-8")
    print(f"\n{summary}\n{time.monotonic() - began:.0f} s in all. Results: {results}; logs: {logs}")
    if on_gpu:
        print("To keep them: git add benchmarks/results kernels/profiles && git commit")
    sys.exit(any(status != "passed" for _, status, _, _ in told))


if __name__ == "__main__":
    main()
