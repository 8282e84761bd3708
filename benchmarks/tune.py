"""Time the launch settings that each kernel offers, and write the profile of this device.

    python benchmarks/tune.py                     writes kernels/profiles/<device>.json: commit it
    python benchmarks/tune.py --seconds 120       the classes that matter most first; the rest keep what they had

Every op runs forward and backward at the shapes of the models that have it, in bf16 and fp32, with and without dropout,
under the search of kernels/_launch.py. A class of shapes whose default is the fastest, or within the noise of it, gets
no entry, so that a better default takes effect. Without a GPU it rehearses on tiny shapes in Triton's interpreter.
"""

import argparse
import copy
import json
import os
import sys
import tempfile
import time
from dataclasses import replace
from datetime import date
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
if __name__ == "__main__" and not torch.cuda.is_available():
    # before anything imports triton
    os.environ |= {"TRITON_INTERPRET": "1", "FASTBERT_IMPL": "triton"}

import machine
import precompile
import record

from fastbert import ops
from fastbert.kernels import _launch
from fastbert.proof import op_cases
from fastbert.proof.op_cases import Case

PROFILES = _launch.PROFILES
MODELS = ("bert-base", "deberta-base", "mpnet-base", "bert-large", "minilm")
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def cases(device, models=MODELS, dtypes=tuple(DTYPES)):
    """Every class of shapes once, the ones that matter most first. Without a GPU: of tiny models."""
    if device.type != "cuda":
        return [Case(op, "tiny", (3, 8, 5), torch.float32) for op in op_cases.OPS]
    found = []
    for dtype in (DTYPES[name] for name in dtypes):
        for model in models:
            for op, entry in op_cases.TABLE.items():
                # without its attention, DeBERTa is BERT
                if model not in entry.models or (model == "deberta-base" and entry.models != (model,)):
                    continue
                by_length = op in ("attention", "disentangled_attention")
                for S in (128, 512, 256, 64) if by_length else (128,):
                    case = Case(op, model, tuple(op_cases.ragged_lengths(32768, S)), dtype)
                    found.append(case)
                    if op in op_cases.WITH_DROPOUT:
                        found.append(replace(case, dropout_p=0.1))
    return found


def compile_all(todo, device):
    """Compile every setting of every case, many at a time: one after the other they take longer than to be timed."""
    timed, _launch.microseconds = _launch.microseconds, lambda call: call() or 0.0
    with precompile.compiling():
        for case in todo:
            try:
                op_cases.results(op_cases.run_of(getattr(ops, case.op), case.arguments(device)))
            except Exception as failure:  # told where it is timed
                print(f"{case.name}: not compiled: {record.line_of(failure)}", flush=True)
    _launch.microseconds = timed
    # what was chosen was chosen by nothing
    _launch.timings.clear()
    _launch.profile_of.cache_clear()


def profile(old, facts):
    """The profile's content: what was timed now, and what `old` knows of other classes of shapes."""
    settings, microseconds = (copy.deepcopy(old.get(name, {})) for name in ("settings", "microseconds"))
    for kernel, classes in _launch.timings.items():
        for key, timed in classes.items():
            chosen, (default, default_us) = _launch.measured()[kernel][key], timed[0]
            chosen_us = next(us for setting, us in timed if setting == chosen)
            pair = [None if us is None else round(us, 2) for us in (chosen_us, default_us)]
            microseconds.setdefault(kernel, {})[key] = pair
            settings.setdefault(kernel, {}).pop(key, None)
            if chosen != default:
                settings[kernel][key] = chosen
    settings = {kernel: classes for kernel, classes in settings.items() if classes}
    return {**facts, "date": date.today().isoformat(), "settings": settings, "microseconds": microseconds}


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--output", type=Path, help="default: kernels/profiles/<device>.json")
    parser.add_argument("--seconds", type=float, default=1e9, help="begin no further class after this time")
    parser.add_argument("--op", nargs="+", choices=op_cases.OPS, default=op_cases.OPS)
    parser.add_argument("--model", nargs="+", choices=MODELS, default=MODELS, help="default: all of them")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES), help="default: both")
    parser.add_argument("--warm", action="store_true", help="only compile, and time nothing")
    options = parser.parse_args()
    end = time.monotonic() + options.seconds
    device = machine.device()
    _launch.AUTOTUNE = True
    # searched anew, whatever is known already
    nothing = tempfile.TemporaryDirectory()
    _launch.PROFILES = Path(nothing.name)
    todo = [case for case in cases(device, options.model, options.dtype) if case.op in options.op]
    if device.type == "cuda":
        compile_all(todo, device)
    if options.warm:
        return

    folder = PROFILES if device.type == "cuda" else machine.folder(device)
    output = options.output or folder / f"{_launch.device_name()}.json"
    facts = machine.describe(device)
    old = json.loads(output.read_text(encoding="utf-8")) if output.exists() else {}
    if old.get("triton") != facts["triton"]:
        old = {}
    failures = left_out = 0
    for case in todo:
        if time.monotonic() > end:
            left_out += 1
            continue
        before = sum(map(len, _launch.timings.values()))
        try:
            arguments = case.arguments(device)
            op_cases.results(op_cases.run_of(getattr(ops, case.op), arguments))
        except Exception as failure:  # the other classes want their turn
            failures += 1
            print(f"{case.name}: FAILED: {record.line_of(failure)}", flush=True)
            continue
        new = sum(map(len, _launch.timings.values())) - before
        print(f"{case.name}: {new} classes of shapes", flush=True)
        content = profile(old, facts)
        output.parent.mkdir(parents=True, exist_ok=True)
        # in one piece: every later launch reads it
        part = output.with_suffix(".part")
        part.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        part.replace(output)
    nothing.cleanup()
    pairs = [pair for classes in profile(old, facts)["microseconds"].values() for pair in classes.values()]
    faster = [default / chosen for chosen, default in pairs if chosen and default and chosen < default]
    most = f", the most {max(faster):.2f}x" if faster else ""
    print(
        f"{len(pairs)} classes measured, {len(faster)} faster than by default{most}; cases left out for want of time: "
        f"{left_out}. Written to {output}"
    )
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
