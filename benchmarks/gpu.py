"""Everything that needs a GPU, in one command of limited time: `make gpu`, or without make

    python3 benchmarks/gpu.py                              tests, races, tuning, benchmarks: 480 seconds in all
    python3 benchmarks/gpu.py --seconds 300 --output DIR   what fits into 300; one archive in DIR, and nothing else
    python3 benchmarks/gpu.py --import DIR/gpu.tar.gz      put an archive's results where they are committed
    python3 benchmarks/gpu.py --can-run                    exit code 0 where this Python sees a GPU and can run this

README.md lists the steps. Without --output the archive goes to runs/gpu and is imported at the end. Without a GPU it
rehearses: the same steps in Triton's interpreter on tiny shapes. No time of a rehearsal means anything, and its results
go to benchmarks/results/rehearsal, which git ignores.
"""

import argparse
import contextlib
import ctypes
import gzip
import importlib.util
import io
import itertools
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
import zlib
from dataclasses import asdict, dataclass
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parent.parent
NEEDED = ("torch", "triton", "numpy", "safetensors", "tokenizers", "click", "rich", "pytest")
SECONDS = 480
ARCHIVE = "gpu.tar.gz"
OPS = ("attention", "layer_norm", "bias_gelu", "masked_cross_entropy")
# tests that need the device for themselves: its memory, or its time
ALONE = "repeats or beyond_two_to_the_31 or current_stream"
# keep the end of a long log, so that the archive stays small enough to send
LOG_BYTES = 2**20


@dataclass
class Step:
    """A step of the command. seconds: what it gets of SECONDS at least; what earlier steps leave is added."""

    name: str
    seconds: int
    script: str | None = None  # of benchmarks/; None: pytest
    result: str | None = None  # what pytest's counts are written to
    pytest: tuple = ()
    arguments: tuple = ()  # that its script gets on a GPU
    rehearsed: tuple = ()  # and in a rehearsal


def sees_gpu():
    import torch

    return torch.cuda.is_available()


def tests_on_a_device():
    """The test files that take the `device` fixture, which is the GPU where there is one."""
    takes = re.compile(r"^def \w+\([^)]*\bdevice\b", re.MULTILINE)
    files = sorted((ROOT / "tests").rglob("test_*.py"))
    return [str(path.relative_to(ROOT)) for path in files if takes.search(path.read_text(encoding="utf-8"))]


def plan(on_gpu):
    """The steps in their order: what the project most needs to know first, so that a short run has it too."""
    others = tests_on_a_device()
    own = next(file for file in others if Path(file).name == "test_gpu.py")
    others.remove(own)
    # xdist replaces a worker that a CUDA error has ended, so even one worker is better than none
    has_workers = on_gpu and importlib.util.find_spec("xdist")
    together, one_process = (("-n", str(workers())), ("-n", "1")) if has_workers else ((), ())
    few, alone, shared, only = ("--rounds", "2"), f"({ALONE})", f"not ({ALONE})", ""
    settings = ("--op", "attention", "layer_norm", "bias_gelu", "--model", "bert-base", "--dtype", "bfloat16")
    # in a rehearsal starting Python is most of a step
    seconds = iter((15, 35, 90, 60, 90, 60, 70, 50, 10) if on_gpu else (70, 50, 60, 60, 70, 60, 60, 40, 10))
    if not on_gpu:
        # one op and one file: the tests of all have their own place in the suite
        only, others = " and pooling", [file for file in others if "dropout_mask" in file]

    def script(name, file, arguments=(), rehearsed=()):
        return Step(name, next(seconds), file, arguments=arguments, rehearsed=rehearsed)

    def tests(name, *arguments):
        return Step(name, next(seconds), result=f"{name.replace(' ', '_')}.json", pytest=arguments)

    return [
        script("device", "machine.py"),
        script("own step", "bench_models.py", ("step", "--own"), ("step", "--own", *few)),
        tests("tests", own, "-k", shared + only, *together),
        script("tuning", "tune.py", settings, ("--op", "layer_norm", "bias_gelu")),
        script("ops", "bench_ops.py", ("--ops", *OPS), ("--ops", "layer_norm", "bias_gelu", *few)),
        tests("races", own, "-k", alone + only, *one_process),
        script("training step", "bench_models.py", ("step",), ("step", *few)),
        tests("other tests", *others, "-k", shared, *together),
        script("page", "report.py"),
    ]


def workers():
    """Processes that share the GPU, each with some gigabytes."""
    import torch

    gib = torch.cuda.get_device_properties(0).total_memory // 2**30
    return max(1, min(8, (os.cpu_count() or 2) // 2, gib // 16))


def warming():
    """The commands that compile what later steps time into the caches on disk, to be run one after the other."""
    tuning = next(step for step in plan(True) if step.name == "tuning")
    scripts = [["tune.py", *tuning.arguments], ["bench_models.py", "step"], ["bench_ops.py", "--ops", *OPS]]
    return [[sys.executable, f"benchmarks/{script}", *arguments, "--warm"] for script, *arguments in scripts]


def start(command, log, environment):
    def before():
        # a shell makes background jobs ignore SIGINT, which asks pytest to end
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if sys.platform == "linux":
            # PR_SET_PDEATHSIG: a step must not outlive this command, even when that is killed
            ctypes.CDLL(None).prctl(1, signal.SIGKILL)

    with open(log, "a", encoding="utf-8") as file:
        return subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True,
            preexec_fn=before,
        )  # fmt: skip


def end(process, grace):
    """End a process and its children: first by SIGINT, after which pytest still reports what it has seen."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(grace)
    # a child may outlive it, and would run while the next step is timed
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def command_of(step, seconds, work, is_rehearsal):
    """The command of a step that may take so many seconds. work: the folder of results and logs."""
    if not step.script:
        xml = work / "logs" / f"{step.name}.xml"
        return [sys.executable, "-m", "pytest", "-rfE", "--tb=short", f"--junit-xml={xml}", *step.pytest]
    command = [sys.executable, f"benchmarks/{step.script}"]
    if step.name == "page":
        return [*command, "--device", str(work / "results")]
    if step.name != "device":
        # the rest is for the case that it has begun by then
        command += ["--seconds", str(int(seconds * 0.85))]
    if step.name != "tuning":
        command += ["--output", str(work / "results")]
    elif is_rehearsal:
        # a GPU's goes to kernels/profiles, where the next steps find it
        command += ["--output", str(work / "results" / "profile.json")]
    return [*command, *(step.rehearsed if is_rehearsal else step.arguments)]


def run(step, seconds, environment, work, is_rehearsal=False, meanwhile=()):
    """Run a step, for so many seconds at most. (how it ended, how long it took, the last line that it said).

    meanwhile: commands that run beside it one after the other, until it ends.
    """
    log = work / "logs" / f"{step.name.replace(' ', '_')}.log"
    grace = min(8 if not step.script else 2, seconds / 4)
    began = time.monotonic()
    process = start(command_of(step, seconds, work, is_rehearsal), log, environment)
    said, meanwhile, beside = 0, list(meanwhile), None
    try:
        while process.poll() is None and time.monotonic() - began < seconds - grace:
            if meanwhile and (beside is None or beside.poll() is not None):
                beside = start(meanwhile.pop(0), work / "logs" / "compile.log", environment)
            time.sleep(0.1)
            said = echo(log, said, step)
        late = process.poll() is None
    finally:
        if beside is not None:
            end(beside, 0)
        end(process, grace)
    echo(log, said, step)
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    status = "out of time" if late else "passed" if process.returncode == 0 else "FAILED"
    return status, time.monotonic() - began, lines[-1] if lines else ""


def echo(log, said, step):
    """Show the lines of a benchmark as they come. A test's log is long: only its last line is shown, at its end."""
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
    content["failures"] = []
    # a pytest that was killed leaves no file, or part of one
    with contextlib.suppress(FileNotFoundError, ElementTree.ParseError):
        for case in ElementTree.parse(xml).iter("testcase"):
            if case.find("failure") is not None or case.find("error") is not None:
                content["failures"].append(f"{case.get('classname')}::{case.get('name')}")
    file.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


# ---------------------------------------------------------------------------------------------------------------------
# the archive


def save(work, output):
    """Replace output/gpu.tar.gz by what lies in `work`, in one piece. Returns the archive."""
    archive = output / ARCHIVE
    part = archive.with_name(f".{ARCHIVE}.part")
    with tempfile.TemporaryDirectory() as short, tarfile.open(part, "w:gz", compresslevel=6) as tar:
        for file in sorted(path for path in work.rglob("*") if path.is_file()):
            name = file.relative_to(work)
            if name.parts[0] == "logs" and file.stat().st_size > LOG_BYTES:
                with open(file, "rb") as whole:
                    whole.seek(-LOG_BYTES, os.SEEK_END)
                    file = Path(short) / file.name
                    file.write_bytes(whole.read())
            tar.add(file, str(name))
    os.replace(part, archive)
    return archive


def put_in_place(archive, root=ROOT):
    """Put an archive's results and profile where they are committed, its logs into runs/gpu, and write the page.

    Returns the folder of the results. Raises ValueError, one line of it, for what is no archive of this command.
    """
    import report

    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        try:
            # decompress all of it: tarfile does not check the checksum
            content = io.BytesIO(gzip.decompress(archive.read_bytes()))
            with tarfile.open(fileobj=content) as tar:
                tar.extractall(folder, filter="data")
            run = json.loads((folder / "run.json").read_text(encoding="utf-8"))
            device = run["device"]
        except (tarfile.TarError, zlib.error, EOFError, OSError, KeyError, TypeError, ValueError) as error:
            why = " ".join(f"{type(error).__name__}: {error}".split())
            raise ValueError(
                f"--import {archive}: no archive of this command ({why}): expected the {ARCHIVE} that "
                "`gpu.py --output` writes"
            ) from None
        if not isinstance(device, str) or not re.fullmatch(r"[a-z0-9][a-z0-9_.-]*", device):
            raise ValueError(f"--import {archive}: its device is {device!r}: expected a name such as nvidia_h200")
        results = root / "benchmarks" / "results" / device
        places = {"results": results, "profiles": root / "kernels" / "profiles", "logs": root / "runs" / "gpu" / "logs"}
        for name, place in places.items():
            for file in sorted((folder / name).glob("*")):
                # the page and its pictures are made anew, from these results and those that were here
                if file.name != "README.md" and file.suffix not in (".png", ".jsonl"):
                    place.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(file, place / file.name)
    report.write(results)
    return results


# ---------------------------------------------------------------------------------------------------------------------
# what is told


def highlights(results):
    """Lines on what was measured, from the files of results."""

    def rows_of(name):
        file = results / name
        return json.loads(file.read_text(encoding="utf-8"))["rows"] if file.exists() else []

    def rates_of(figures):
        return f"{figures['real_tokens_per_s']:,} real tokens/s, {figures['mfu']:.0%} of the product's rate"

    import op_pages

    lines = []
    for row in rows_of("own_step.json"):
        ours = row["summary"]["fastbert, packed"]
        lines.append(f"own training step, {row['case']}: {1e3 * ours['median_s']:.1f} ms, {rates_of(ours)}")
    for _, rows in itertools.groupby(rows_of("ops.json"), key=lambda row: row["case"]):
        lines.append(op_pages.told(list(rows)))
    for row in rows_of("training_step.json"):
        packed = row["summary"].get("fastbert, packed")
        others = [x["median_s"] for name, x in row["summary"].items() if name.startswith("transformers")]
        if packed and others:
            times = min(others) / packed["median_s"]
            lines.append(f"training step, {row['case']}: {rates_of(packed)}, {times:.2f}x transformers")
    return lines


def summary_of(device, told, results, on_gpu):
    title = f"make gpu on {device}" if on_gpu else "REHEARSAL, without a GPU: no time means anything"
    lines = [f"# {title}", "", "| step | | seconds | said |", "|---|---|---|---|"]
    lines += [f"| {step} | {status} | {took:.0f} | {last[:200]} |" for step, status, took, last in told]
    try:
        found = highlights(results) if on_gpu else []
    except Exception as failure:  # what was measured lies in its files: the summary of the steps must not go with this
        found = [f"not told: {type(failure).__name__}: {failure}"]
    lines += ["", *[f"- {line}" for line in found]] if found else []
    return "\n".join(lines) + "\n"


# ---------------------------------------------------------------------------------------------------------------------


def options_of(arguments):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=SECONDS, help=f"for everything; default: {SECONDS}")
    parser.add_argument("--output", type=Path, metavar="DIR", help="the archive goes here, and nothing is imported")
    parser.add_argument("--import", type=Path, dest="archive", metavar="ARCHIVE", help="put its results into place")
    parser.add_argument("--can-run", action="store_true", help="only say whether this Python will do for a GPU")
    names = [step.name for step in plan(False)]
    parser.add_argument("--only", nargs="+", choices=names, default=names, help="these steps")
    options = parser.parse_args(arguments)
    if not 10 <= options.seconds < math.inf:
        parser.error(f"--seconds is {options.seconds:g}: expected at least 10, and finite")
    if options.output:
        try:
            options.output.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=options.output).close()
        except OSError as error:
            parser.error(f"--output {options.output}: nothing can be written there ({error.strerror}): name a folder")
    if options.archive:
        try:
            print(f"results: {put_in_place(options.archive)}")
        except ValueError as error:
            parser.error(str(error))
        sys.exit(0)
    lacking = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if options.can_run:
        sys.exit(bool(lacking) or not sees_gpu())
    if lacking:
        parser.error(f"{sys.executable} lacks {', '.join(lacking)}")
    return options


def environment_of(on_gpu):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("FASTBERT_")}
    environment |= {"PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    environment.pop("TRITON_INTERPRET", None)
    if not on_gpu:
        environment |= {"TRITON_INTERPRET": "1", "FASTBERT_IMPL": "triton", "OMP_NUM_THREADS": "1"}
    return environment


def main(arguments=None):
    began, since = time.monotonic(), time.time()
    options = options_of(arguments)
    on_gpu = sees_gpu()
    environment, device = environment_of(on_gpu), "rehearsal"
    if on_gpu:
        import machine

        device = machine.folder(machine.device()).name
    else:
        print("no GPU: a REHEARSAL in Triton's interpreter, on tiny shapes. No time below means anything")
    output = options.output or ROOT / "runs" / "gpu"
    output.mkdir(parents=True, exist_ok=True)
    todo = [step for step in plan(on_gpu) if step.name in options.only]
    told = []
    with tempfile.TemporaryDirectory(prefix="fastbert-gpu-") as work:
        work = Path(work)
        for name in ("results", "logs", "profiles"):
            (work / name).mkdir()
        for i, step in enumerate(todo):
            left = options.seconds - (time.monotonic() - began)
            later = sum(other.seconds for other in todo[i + 1 :]) * max(options.seconds / SECONDS, 1)
            # in a short run the first steps get their full time, and the last ones are left out
            seconds = min(left, max(left - later, step.seconds))
            print(f"[{i + 1}/{len(todo)}] {step.name}, at most {max(seconds, 0):.0f} s", flush=True)
            if seconds < step.seconds / 2:
                status, took, last = "left out", 0.0, "for want of time"
            else:
                meanwhile = warming() if on_gpu and step.name == "tests" else ()
                status, took, last = run(step, seconds, environment, work, not on_gpu, meanwhile)
                if not step.script:
                    counts(last, work / "logs" / f"{step.name}.xml", work / "results" / step.result)
            print(f"    {status} in {took:.0f} s: {last[:160]}", flush=True)
            told.append((step.name, status, took, last))
            if on_gpu:
                profile = ROOT / "kernels" / "profiles" / f"{device}.json"
                if profile.exists() and profile.stat().st_mtime >= since:
                    shutil.copyfile(profile, work / "profiles" / profile.name)
            summary = summary_of(device, told, work / "results", on_gpu)
            (work / "results" / "summary.md").write_text(summary, encoding="utf-8")
            steps = [dict(zip(("step", "status", "seconds", "said"), row)) for row in told]
            run_file = {"device": device, "seconds": options.seconds, "steps": steps, "plan": [asdict(x) for x in todo]}
            (work / "run.json").write_text(json.dumps(run_file, indent=1) + "\n", encoding="utf-8")
            archive = save(work, output)
    print(f"\n{summary}\n{time.monotonic() - began:.0f} s in all. Archive: {archive}")
    if not options.output:
        print(f"Results: {put_in_place(archive)}")
        if on_gpu:
            print("To keep them: git add benchmarks/results kernels/profiles && git commit")
    sys.exit(any(status != "passed" for _, status, _, _ in told))


if __name__ == "__main__":
    main()
