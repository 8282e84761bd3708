"""Each op, forward and backward, against what a user would write or install instead.

    pytest benchmarks/bench_ops.py                     on a CPU: a table for each op, by pytest-benchmark (make bench)
    pytest benchmarks/bench_ops.py --benchmark-json new.json        keep it; --benchmark-compare shows change
    python benchmarks/bench_ops.py                     on a GPU: every variant at full size (part of make gpu)

On the CPU the batch is 8 sequences of 26 to 128 tokens, 60 % of its padded rectangle, in fp32. fastbert is its own
plain PyTorch there; only the peers tell something.

On a GPU it is 65,536 real tokens in bf16, full or ragged. A peer that needs padding gets the rectangle, which is what
it computes in a real model, already padded; rates count real tokens only. Variants take turns, round after round, each
from a cold cache, timed on the device's own stream without the host's time; a row is the median. Each variant must
agree with the reference in fp32 before it is timed. Under dropout masks differ between libraries: there only fastbert,
whose mask the reference draws too, is checked again, and the rest must have passed without dropout. Writes ops.json,
ops.csv, ops.md and ops.png. Without a GPU the script rehearses on tiny shapes in Triton's interpreter
(TRITON_INTERPRET=1 FASTBERT_IMPL=triton).
"""

import argparse
import csv
import itertools
import json
import statistics
import sys
import time
import warnings
from dataclasses import replace
from datetime import date
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import machine
import op_cases
from op_cases import Case, Unavailable, build, results, variants

LENGTHS = (26, 40, 55, 70, 84, 99, 113, 128)
TOLERANCE = {torch.bfloat16: 0.03, torch.float16: 0.005, torch.float32: 1e-4}
# what pytest runs: the rest needs a GPU, or compiles for a minute
ON_A_CPU = ("fastbert", "eager", "sdpa", "dense", "torch linear_cross_entropy")
ROWS = [
    (op, name)
    for op in op_cases.OPS
    if op != "disentangled_attention"  # has a benchmark of its own
    for name in variants(op)
    if name in ON_A_CPU
]


@pytest.mark.parametrize(("op", "variant"), ROWS, ids=[f"{op}-{variant}" for op, variant in ROWS])
def test_op(benchmark, device, op, variant):
    case = Case(op, "bert-base", LENGTHS, torch.float32)
    arguments = case.arguments(device)
    try:
        run = build(variants(op)[variant], arguments)
    except Unavailable as reason:
        pytest.skip(str(reason))
    assert op_cases.disagreement(results(run), op_cases.truth(case, arguments)) < TOLERANCE[case.dtype]
    gradient = op_cases.cotangent(run)

    def both():
        torch.autograd.grad(run.forward(), run.leaves, gradient)
        if device.type == "cuda":
            torch.cuda.synchronize()

    benchmark.group = op
    benchmark.extra_info.update(device=device.type, tokens=sum(LENGTHS), padded_tokens=len(LENGTHS) * max(LENGTHS))
    benchmark.pedantic(both, rounds=10, warmup_rounds=2)


def cases(device):
    """The cases of a full run, the ones that matter most first."""
    if device.type != "cuda":
        attention = [Case("attention", "tiny", lengths, torch.float32) for lengths in ((8, 8, 8), (3, 8, 5, 8, 2))]
        found = attention + [Case(op, "tiny", (3, 8, 5, 8, 2), torch.float32) for op in op_cases.OPS[1:]]
    else:
        # a quarter where memory is short
        tokens = 65536 if torch.cuda.mem_get_info(device)[0] > 40 * 2**30 else 16384
        found = []
        for op in op_cases.OPS:
            by_length = op in ("attention", "disentangled_attention")
            for S in (128, 512) if by_length or op == "pooling" else (128,):
                found.append(Case(op, "bert-base", tuple(op_cases.ragged_lengths(tokens, S))))
                if by_length:
                    found.append(Case(op, "bert-base", tuple(op_cases.full_lengths(tokens, S))))
    deberta = "deberta-base" if device.type == "cuda" else "tiny-deberta"
    found = [replace(c, model=deberta) if c.op == "disentangled_attention" else c for c in found]
    # with dropout right after without: what passed the one is timed in the other
    return [
        replace(case, dropout_p=p)
        for case in found
        for p in ((0.0, 0.1) if case.op in op_cases.WITH_DROPOUT else (0.0,))
    ]


def agreeing(case, device, passed):
    """{variant: Run} of those that agree with the reference, and {variant: why not} of the others."""
    arguments = case.arguments(device)
    wanted = None if case.dropout_p else op_cases.truth(case, arguments)
    if case.dropout_p:
        # the reference's masks of every score would take most of the memory
        few = replace(case, lengths=tuple(itertools.islice(case.lengths, 8)))
        few_arguments = few.arguments(device)
        few_wanted = op_cases.truth(few, few_arguments)
    runs, refused = {}, {}
    for name, make in variants(case.op).items():
        try:
            if not case.dropout_p:
                run = build(make, arguments)
                error = op_cases.disagreement(results(run), wanted)
            elif name == "fastbert":
                error = op_cases.disagreement(results(build(make, few_arguments)), few_wanted)
                run = build(make, arguments)
            elif name in passed:
                error, run = 0.0, build(make, arguments)
                results(run)
            else:
                continue
        except Unavailable as reason:
            refused[name] = str(reason)
        except Exception as failure:
            if name == "fastbert":
                raise
            refused[name] = f"{type(failure).__name__}: {failure}".partition("\n")[0][:200]
        else:
            if error < TOLERANCE[case.dtype]:
                runs[name] = run
            else:
                refused[name] = f"wrong: differs from the reference by {error:.1e}"
    return runs, refused


def measure(case, runs, clock, ceilings, rounds):
    """A row for each of `runs`, timed in turns."""
    device = clock.device
    gradients = {name: op_cases.cotangent(run) for name, run in runs.items()}

    def backward(run, gradient):
        return lambda output: torch.autograd.grad(output, run.leaves, gradient)

    seconds = {name: [] for name in runs}
    warm_up = 2 if device.type == "cuda" else 0
    for i in range(-warm_up, rounds):
        for name in list(runs)[:: 1 if i % 2 else -1]:
            taken = clock.seconds(runs[name].forward, backward(runs[name], gradients[name]))
            if i >= 0:
                seconds[name].append(taken)
    floors = {
        what: max(size / ceilings["copy"], flops / ceilings["product"]) for what, (size, flops) in case.floor().items()
    }
    floors["both"] = sum(floors.values())
    size, flops = (sum(part) for part in zip(*case.floor().values()))
    rows = []
    for name, run in runs.items():
        passes = {"forward": [f for f, _ in seconds[name]], "backward": [b for _, b in seconds[name]]}
        passes["both"] = [f + b for f, b in seconds[name]]
        median = {what: statistics.median(times) for what, times in passes.items()}
        low, _, high = statistics.quantiles(passes["both"], n=4, method="inclusive")
        memory = machine.gib_per_call(device, lambda: torch.autograd.grad(run.forward(), run.leaves, gradients[name]))  # noqa: B023
        rows.append(
            {
                "op": case.op, "case": case.name, "variant": name, "model": case.model, "dropout_p": case.dropout_p,
                "tokens": sum(case.lengths), "padded_tokens": len(case.lengths) * max(case.lengths),
                **{f"{what}_us": round(s * 1e6, 1) for what, s in median.items()},
                "quartiles_us": [round(low * 1e6, 1), round(high * 1e6, 1)],
                "gb_per_s": round(size / median["both"] / 1e9, 1),
                "tflop_per_s": round(flops / median["both"] / 1e12, 2),
                **{f"{what}_percent_of_ceiling": round(100 * floors[what] / s, 1) for what, s in median.items()},
                "peak_gib": memory if memory is None else round(memory, 3),
            }
        )  # fmt: skip
    for row in rows:
        row["times_fastbert"] = round(row["both_us"] / rows[0]["both_us"], 2)
    return rows


def title(result):
    facts = result["machine"]
    words = f"{facts['device']}, torch {facts['torch']}, triton {facts['triton']}, {result['date']}"
    return f"REHEARSAL, times mean nothing: {words}" if "rehearsal" in facts else words


def markdown(result):
    """The result as tables, one for each case."""
    ceilings = result["ceilings"]
    lines = [
        "# Ops",
        "",
        f"{title(result)}. Measured ceilings: copy {ceilings['copy'] / 1e12:.2f} TB/s, bf16 product "
        f"{ceilings['product'] / 1e12:.0f} TFLOP/s. Times are medians in µs; % is of the ceiling that binds: the least "
        "bytes over the copy's rate or the FLOPs over the product's. Rates count real tokens.",
    ]
    for name, rows in itertools.groupby(result["rows"], key=lambda row: row["case"]):
        lines += [
            "",
            f"## {name}" + (" (rehearsal)" if "rehearsal" in result["machine"] else ""),
            "",
            "| variant | forward | backward | both | of fastbert's | GB/s | TFLOP/s | % forward | % backward | GiB |",
            "|---|---|---|---|---|---|---|---|---|---|",
        ]
        for row in rows:
            lines.append(
                f"| {row['variant']} | {row['forward_us']} | {row['backward_us']} | {row['both_us']} "
                f"| {row['times_fastbert']}x | {row['gb_per_s']} | {row['tflop_per_s']} "
                f"| {row['forward_percent_of_ceiling']} | {row['backward_percent_of_ceiling']} "
                f"| {'' if row['peak_gib'] is None else row['peak_gib']} |"
            )
        refused = result["refused"].get(name, {})
        if refused:
            lines += ["", "Not timed:", ""]
            lines += [f"- {variant}: {reason}" for variant, reason in refused.items()]
    if result["left_out"]:
        lines += ["", "Left out, for want of time:", ""]
        lines += [f"- {name}" for name in result["left_out"]]
    return "\n".join(lines) + "\n"


def plot(result, path):
    """Bars: how many times fastbert's time every other variant takes, forward and backward, case by case."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    groups = [(name, list(rows)) for name, rows in itertools.groupby(result["rows"], key=lambda row: row["case"])]
    columns = 3
    lines = -(-len(groups) // columns)
    height = 0.24 * max(len(rows) for _, rows in groups) + 0.7
    figure, axes = plt.subplots(lines, columns, figsize=(15, height * lines + 0.5), layout="constrained", squeeze=False)
    for axis, (name, rows) in itertools.zip_longest(axes.flat, groups, fillvalue=(None, None)):
        if name is None:
            axis.set_axis_off()
            continue
        rows = rows[::-1]
        ours = [row["variant"] == "fastbert" for row in rows]
        labels = [row["variant"] for row in rows]
        axis.barh(labels, [row["forward_us"] for row in rows], color=["#2563eb" if own else "#9aa5b1" for own in ours])
        bars = axis.barh(
            labels, [row["backward_us"] for row in rows], left=[row["forward_us"] for row in rows],
            color=["#93c5fd" if own else "#d3d9df" for own in ours],
        )  # fmt: skip
        axis.bar_label(
            bars, [f"{row['both_us']:.0f} µs, {row['times_fastbert']}x" for row in rows], fontsize=7, padding=2
        )
        axis.set_title(name, fontsize=8)
        axis.margins(x=0.35)
        axis.tick_params(labelsize=7)
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"Forward (dark) and backward (light), less is better. {title(result)}", fontsize=9)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def write(result, folder):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "ops.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    (folder / "ops.md").write_text(markdown(result), encoding="utf-8")
    if result["rows"]:
        with open(folder / "ops.csv", "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, result["rows"][0])
            writer.writeheader()
            writer.writerows(result["rows"])


def warm(todo, device):
    """Call every variant once, so that what it compiles lies in the caches on disk."""
    for case in todo:
        arguments = case.arguments(device)
        for make in variants(case.op).values():
            try:
                results(build(make, arguments))
            except Exception as failure:
                print(f"{case.name}: {failure}".partition("\n")[0][:200])


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/<device>")
    parser.add_argument("--seconds", type=float, default=1e9, help="begin no further case after this time")
    parser.add_argument("--rounds", type=int, default=20, help="timed calls of each variant")
    parser.add_argument("--op", nargs="+", choices=op_cases.OPS, default=op_cases.OPS)
    parser.add_argument("--warm", metavar="I/N", help="only compile: the I-th of every N cases, and time nothing")
    options = parser.parse_args()
    warnings.simplefilter("ignore")  # torch explains at length why a backend does not take a call
    end = time.monotonic() + options.seconds
    device = machine.device()
    todo = [case for case in cases(device) if case.op in options.op]
    if options.warm:
        i, n = map(int, options.warm.split("/"))
        return warm(todo[i::n], device)

    folder = options.output or machine.folder(device)
    result = {
        "machine": machine.describe(device), "date": date.today().isoformat(), "rounds": options.rounds,
        "ceilings": machine.ceilings(device), "rows": [], "refused": {}, "left_out": [],
    }  # fmt: skip
    clock = machine.Clock(device)
    passed, failures = {}, []
    for case in todo:
        if time.monotonic() > end:
            result["left_out"].append(case.name)
            continue
        plain = replace(case, dropout_p=0.0)
        try:
            runs, refused = agreeing(case, device, passed.get(plain, ()))
        except Exception as failure:
            runs, refused = {}, {"fastbert": f"{type(failure).__name__}: {failure}"[:2000]}
        passed.setdefault(plain, tuple(runs))
        result["refused"][case.name] = refused
        if "fastbert" not in runs:
            failures.append(case.name)
            print(f"{case.name}: FAILED: {refused['fastbert']}", flush=True)
            continue
        rows = measure(case, runs, clock, result["ceilings"], options.rounds)
        result["rows"] += rows
        best = min(rows[1:], key=lambda row: row["both_us"], default=None)
        print(
            f"{case.name}: {rows[0]['forward_us']} + {rows[0]['backward_us']} µs, "
            f"{rows[0]['both_percent_of_ceiling']} % of the ceiling"
            + (f"; best of {len(rows) - 1} others: {best['variant']}, {best['times_fastbert']}x" if best else ""),
            flush=True,
        )
        write(result, folder)  # what is measured is kept, whatever comes next
        del runs
        if device.type == "cuda":
            torch.cuda.empty_cache()
    write(result, folder)
    if result["rows"]:
        try:
            plot(result, folder / "ops.png")
        except ImportError:
            print("no plot: matplotlib is not installed")
    print(
        f"written to {folder}"
        + (f"; left out for want of time: {len(result['left_out'])}" if result["left_out"] else "")
    )
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
