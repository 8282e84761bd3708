"""The benchmark suite in one command: `fastbert bench`, which `make bench` runs.

Each step is a script of this folder in a process of its own, one after the other. A step that fails does not stop the
next; the exit code says so.
"""

import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import compare as gate
import machine

from fastbert.model import presets
from fastbert.proof import op_cases

ROOT = Path(__file__).resolve().parent.parent
EVERY = "all"


@dataclass(frozen=True)
class Step:
    """A script with its arguments, and the file of results that it writes, if any."""

    name: str
    arguments: tuple
    result: Path | None = None


def steps(ops, models, device, quick, folder):
    """What to run, by the names given. Neither ops nor models: everything there is."""
    quickly = ("--quick",) * quick
    whole = not ops and not models
    # results state the command that made them: without the place of this checkout
    place = folder.relative_to(ROOT) if folder.is_relative_to(ROOT) else folder
    found = []

    def add(name, script, file, *arguments):
        found.append(Step(name, (f"benchmarks/{script}", *map(str, arguments)), folder / file))

    if ops or whole:
        named = () if not ops or EVERY in ops else ("--ops", *ops)
        add("ops", "bench_ops.py", "ops.json", *named, *quickly, "--output", place)
    if whole and not quick:
        add("training step", "bench_models.py", "training_step.json", "step", "--output", place)
        if device.type == "cpu":
            add("families", "bench_models.py", "families.json", "families", "--output", place)
            add("inference", "bench_inference.py", "inference_matrix.json", "--output", place)
    if models or whole:
        named = () if not models or EVERY in models else ("--models", *models)
        add("models", "bench_models.py", "models.json", *named, *quickly, "--output", place)
    if whole:
        add("training", "bench_training.py", "training.json", *quickly, "--output", place)
        add("data", "bench_data.py", "data.json", *quickly, "--output", place)
    if whole and not quick:
        found.append(Step("report", ("benchmarks/report.py", "--device", str(place))))
    return found


def checked(names, known, what):
    for name in names:
        if name not in known and name != EVERY:
            raise ValueError(f"--{what} {name} is unknown: expected {EVERY} or some of {', '.join(known)}")


def run(ops=(), models=(), device="auto", quick=False, compare=None, output=None):
    """Run the suite. Returns the exit code: 1 where a step failed or a ratio fell.

    ops, models: names, or "all"; neither: everything. compare: a file of older results, or a folder of them. output:
    where results go; by default benchmarks/results/<device> for everything in full, and runs/bench for a part or with
    `quick`, so that no part takes the place of the whole. Raises ValueError for unknown names, a device that is not
    there, and old results that cannot be compared; OSError for a file that cannot be read.
    """
    checked(ops, op_cases.OPS, "ops")
    checked(models, presets.PRESETS, "models")
    here = machine.device(device)
    # before anything is written over it
    old = gate.read(compare) if compare else None
    folder = Path(output).resolve() if output else ROOT / "runs" / "bench"
    if not (output or quick or ops or models):
        folder = machine.folder(here)
    # before any work is done
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise ValueError(
            f"--output {folder}: no results can be written there ({error.strerror}): name a folder"
        ) from None
    todo = steps(ops, models, here, quick, folder)

    environment = {name: value for name, value in os.environ.items() if not name.startswith("FASTBERT_")}
    # the user's own switches would change what is measured
    environment.pop("TRITON_INTERPRET", None)
    environment |= {"PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}
    if here.type == "cpu":
        environment |= {"CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": ""}
    facts = machine.describe(here)
    print(", ".join([facts["device"], *facts.get("instructions", ())]))
    began, failed, written = time.monotonic(), [], []
    for number, step in enumerate(todo, 1):
        print(f"[{number}/{len(todo)}] {step.name}: python {' '.join(step.arguments)}", flush=True)
        start, before = time.monotonic(), _changed(step.result)
        code = subprocess.run([sys.executable, *step.arguments], cwd=ROOT, env=environment).returncode
        print(f"    {'passed' if code == 0 else f'FAILED ({code})'} in {time.monotonic() - start:.0f} s", flush=True)
        if code:
            failed.append(step.name)
        if step.result and _changed(step.result) != before:
            written.append(step.result)
    print(f"{time.monotonic() - began:.0f} s in all; results in {folder}")
    if failed:
        print(f"failed: {', '.join(failed)}")
    code = gate.told(old, gate.read(*filter(_holds_rounds, written))) if old else 0
    return 1 if failed else code


def _changed(file):
    return file.stat().st_mtime_ns if file and file.exists() else None


def _holds_rounds(file):
    try:
        gate.read(file)
    except ValueError:
        # such as those of bench_training.py, which has no rounds
        return False
    return True
