"""Each op, forward and backward, against what a user would write or install instead.

    python benchmarks/bench_ops.py                        every variant in turns: about three minutes on two cores
    python benchmarks/bench_ops.py --quick                one shape of each op, and nothing that compiles: a minute
    python benchmarks/bench_ops.py --ops attention pooling
    pytest benchmarks/bench_ops.py --benchmark-json new.json      by pytest-benchmark, variant after variant

README.md says at which shapes, how they are timed and what is checked before. Writes ops.json, ops.csv and ops.md. With
TRITON_INTERPRET=1 FASTBERT_IMPL=triton and no GPU it rehearses on tiny shapes in Triton's interpreter.
"""

import itertools
import logging
import statistics
import sys
import time
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import machine
import precompile
import record
from op_pages import PASSES, told, write
from op_peers import build, installed, variants
from peers import NotApplicable, Unavailable
from rounds import quartiles

from fastbert.proof import op_cases
from fastbert.proof.op_cases import TABLE, Case, results

LENGTHS = (26, 40, 55, 70, 84, 99, 113, 128)
TOLERANCE = {torch.bfloat16: 0.03, torch.float16: 0.005, torch.float32: 1e-4}
# these call torch.compile
COMPILING = ("compiled", "flex", "cut_cross_entropy, compiled")
ROWS = [(op, name) for op in op_cases.OPS for name in variants(op) if name not in COMPILING]


@pytest.mark.parametrize(("op", "variant"), ROWS, ids=[f"{op}-{variant}" for op, variant in ROWS])
def test_op(benchmark, device, op, variant):
    case = Case(op, TABLE[op].models[0], LENGTHS, torch.float32)
    arguments = case.arguments(device)
    try:
        run = build(variants(op)[variant], arguments)
        error = op_cases.disagreement(results(run), op_cases.truth(case, arguments, torch.float64))
    except (Unavailable, NotApplicable) as reason:
        pytest.skip(str(reason) or "the same as another variant")
    except RuntimeError as failure:
        if variant == "fastbert":
            raise
        pytest.skip(record.line_of(failure))
    assert error < TOLERANCE[case.dtype]
    gradient = op_cases.cotangent(run)

    def both():
        torch.autograd.grad(run.forward(), run.leaves, gradient)
        if device.type == "cuda":
            torch.cuda.synchronize()

    benchmark.group = op
    benchmark.extra_info.update(device=device.type, tokens=sum(LENGTHS), padded_tokens=case.padded_tokens)
    benchmark.pedantic(both, rounds=5, warmup_rounds=1)


def cases(device, quick=False):
    """The cases of a run, the ones that matter most first."""
    if machine.rehearsing(device):
        found = [Case(op, "tiny", (3, 8, 5, 8, 2), torch.float32) for op in op_cases.OPS]
        found.insert(1, replace(found[0], lengths=(8, 8, 8)))
    elif device.type == "cpu":
        found = _on_a_cpu()
    else:
        found = _on_a_gpu(device)
    if quick:
        # ragged at the first shape of each op
        return [next(case for case in found if case.op == op) for op in op_cases.OPS]
    # with dropout right after without: what passed the one is timed in the other. Once for each op on a CPU, where
    # drawing the mask is most of the time
    dropped, with_dropout = set(), []
    for case in found:
        with_dropout.append(case)
        if case.op in op_cases.WITH_DROPOUT and (device.type == "cuda" or case.op not in dropped):
            dropped.add(case.op)
            with_dropout.append(replace(case, dropout_p=0.1))
    return with_dropout


def _on_a_gpu(device):
    # a quarter with less memory
    tokens = 65536 if machine.memory(device) > 40 * 2**30 else 16384
    ragged, full = op_cases.ragged_lengths, op_cases.full_lengths
    found = []
    for op, entry in TABLE.items():
        by_length = op.endswith("attention")
        for S in (128, 512) if by_length or op == "pooling" else (128,):
            for lengths in (ragged, full) if by_length else (ragged,):
                found.append(Case(op, entry.models[0], tuple(lengths(tokens, S))))
    # other widths, if there is time
    for model in ("bert-large", "minilm"):
        for op in ("attention", "layer_norm", "bias_gelu", "masked_cross_entropy"):
            found.append(Case(op, model, tuple(ragged(tokens, 128))))
    # the first of every op, then the second: time may end before the list does
    by_op = [[case for case in found if case.op == op] for op in TABLE]
    return [case for turn in itertools.zip_longest(*by_op) for case in turn if case]


def _on_a_cpu():
    ragged, full = op_cases.ragged_lengths, op_cases.full_lengths
    found = []
    for op, entry in TABLE.items():
        # sentences are embedded with MiniLM
        model = "minilm" if op in ("pooling", "contrastive_cross_entropy") else entry.models[0]
        # half as many where each has logits for the whole vocabulary
        tokens = 512 if op == "masked_cross_entropy" else 1024
        shapes = [(model, ragged(tokens, 128))]
        if op != "contrastive_cross_entropy":  # knows no lengths
            shapes.append((model, full(tokens, 128)))
        if op.endswith("attention"):
            shapes.append((model, ragged(2048, 512)))
        if op == "attention":
            shapes.append((model, full(2048, 512)))
        if op in ("attention", "layer_norm", "bias_gelu", "masked_cross_entropy"):
            shapes.append(("minilm", ragged(tokens, 128)))
        if op in ("attention", "layer_norm", "bias_gelu"):
            shapes.append(("bert-large", ragged(tokens, 128)))
        found += [Case(op, name, tuple(lengths), torch.float32) for name, lengths in shapes]
    return found


def agreeing(case, device, passed, compiles=True):
    """{variant: Run} of those that agree with the reference, their errors, and {variant: why not} of the others."""
    torch._dynamo.reset()
    # the same numbers in every run, whatever its cases
    torch.manual_seed(0)
    arguments = case.arguments(device)
    if case.dropout_p:
        # the reference stores a mask of every score, which would take most of the memory
        few = replace(case, lengths=tuple(itertools.islice(case.lengths, 8)))
        few_arguments = few.arguments(device)
        wanted = truth(few, few_arguments)
    else:
        wanted = truth(case, arguments)
    runs, errors, refused = {}, {}, {}
    for name, make in variants(case.op).items():
        if name in COMPILING and not compiles:
            refused[name] = "takes its time to compile: left out of quick runs and rehearsals"
            continue
        try:
            run, error = build(make, arguments), None
            if not case.dropout_p:
                error = op_cases.disagreement(results(run), wanted)
            elif name == "fastbert":
                error = op_cases.disagreement(results(build(make, few_arguments)), wanted)
            elif name not in passed:
                raise Unavailable("did not agree with the reference without dropout")
            else:
                results(run)
            if error is not None and error >= TOLERANCE[case.dtype]:
                raise Unavailable(f"wrong: differs from the reference by {error:.1e}")
            runs[name], errors[name] = run, error
        except NotApplicable:
            continue
        except Unavailable as reason:
            refused[name] = str(reason)
        except Exception as failure:
            if name == "fastbert":
                raise
            refused[name] = record.line_of(failure)
    return runs, errors, refused


def truth(case, arguments):
    return op_cases.truth(case, arguments, torch.float64 if case.dtype == torch.float32 else torch.float32)


def in_turns(runs, clock, rounds, budget, refused):
    """({variant: {"forward": seconds of each round, "backward": ...}}, {variant: rounds in which it held the host up}).

    No sixth round begins past `budget` seconds. Each call finds its arguments at another place than the last did. A
    variant that fails leaves `runs`, and `refused` says why.
    """
    gradients, places = {}, {}

    def prepare(name):
        if not runs[name].forward_only:
            gradients[name] = op_cases.cotangent(runs[name])
        places[name] = rotation(runs[name], gradients.get(name), clock)

    def calls_of(name, run):
        if run.forward_only:
            return (run.forward,)
        return run.forward, lambda output: torch.autograd.grad(output, run.leaves, gradients[name])

    for name in list(runs):
        attempt(name, runs, refused, clock.device, lambda: prepare(name))  # noqa: B023
    calls = {name: calls_of(name, run) for name, run in runs.items()}
    seconds = {name: {"forward": [], "backward": []} for name in runs}
    late = dict.fromkeys(runs, 0)
    warm_up = 2 if clock.device.type == "cuda" else 1
    began = time.monotonic()
    for i in range(-warm_up, rounds):
        if i >= 5 and time.monotonic() - began > budget:
            break
        for name in list(runs)[:: 1 if i % 2 else -1]:
            places[name](i)
            taken = attempt(name, runs, refused, clock.device, lambda: clock.seconds(*calls[name]))  # noqa: B023
            if taken and i >= 0:
                late[name] += clock.was_late
                for what, value in zip(("forward", "backward"), taken):
                    seconds[name][what].append(value)
    for turn in places.values():
        turn(0)
    return {name: seconds[name] for name in runs}, late


def attempt(name, runs, refused, device, call):
    """What `call` returns. Where it fails, None: the variant leaves `runs`. fastbert's own failure is raised."""
    try:
        return call()
    except Exception as failure:
        if name == "fastbert":
            raise
        del runs[name]
        refused[name] = record.line_of(failure)
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return None


def rotation(run, gradient, clock):
    """A function of a round's number that puts the run's leaves, and its output's gradient, at another place in memory.

    The tensors stay the same objects with the same numbers, so nothing is compiled again. Indices stay where they are.
    """
    tensors = [*run.leaves, *([] if gradient is None else [gradient])]
    copies = clock.copies(sum(x.nbytes for x in tensors))
    places = [[x.data for x in tensors]] + [[x.detach().clone() for x in tensors] for _ in range(1, copies)]

    def turn(i):
        for x, place in zip(tensors, places[i % len(places)]):
            x.data = place

    return turn


def measure(case, runs, errors, refused, clock, ceilings, rounds, budget):
    """A row for each pass of a case, with the seconds of every one of `runs`."""
    seconds, late = in_turns(runs, clock, rounds, budget, refused)
    memory = {}

    def count(name, run):
        memory["forward", name] = machine.gib_per_call(clock.device, run.forward)
        if not run.forward_only:
            gradient = op_cases.cotangent(run)
            memory["both", name] = machine.gib_per_call(
                clock.device, lambda: torch.autograd.grad(run.forward(), run.leaves, gradient)
            )

    for name, run in list(runs.items()):
        attempt(name, runs, refused, clock.device, lambda: count(name, run))  # noqa: B023
    for passes in seconds.values():
        passes["both"] = [sum(pair) for pair in zip(passes["forward"], passes["backward"])]
    # such a call waits for the device within, so its time includes the host's
    waiting = [name for name in runs if 2 * late[name] > len(seconds[name]["forward"])]
    floor = case.floor()
    least = {x: max(size / ceilings["copy"], flops / ceilings["product"]) for x, (size, flops) in floor.items()}
    # one pass after the other: "both" waits for each of them
    floor["both"], least["both"] = tuple(map(sum, zip(*floor.values()))), sum(least.values())
    rows = []
    for what in PASSES:
        size, flops = floor[what]
        missing = {name: run.forward_only for name, run in runs.items() if run.forward_only and what != "forward"}
        taken = {name: seconds[name][what] for name in runs if name not in missing}
        rows.append({
            "op": case.op, "case": case.name, "pass": what, "model": case.model, "dtype": str(case.dtype)[6:],
            "length": max(case.lengths), "tokens": sum(case.lengths), "padded_tokens": case.padded_tokens,
            "dropout_p": case.dropout_p, "bytes": size, "flops": flops, "floor_us": round(least[what] * 1e6, 1),
            "bound_by": "bytes" if size / ceilings["copy"] > flops / ceilings["product"] else "flops",
            "seconds": record.rounded(taken, 9),
            "summary": {
                name: summary(times, taken["fastbert"], size, flops, least[what], memory.get((what, name)))
                for name, times in taken.items()
            },
            "waiting": [name for name in waiting if name in taken], "disagreement": errors,
            "not_measured": refused | missing,
        })  # fmt: skip
    return rows


def summary(times, ours, size, flops, least, gib):
    """The figures of a variant in a row. times_fastbert: how many times fastbert's time, round by round."""
    slower = [a / b for a, b in zip(times, ours)]
    median = statistics.median(times)
    return {
        "median_us": round(median * 1e6, 1), "quartiles_us": [round(x * 1e6, 1) for x in quartiles(times)],
        "times_fastbert": round(statistics.median(slower), 3),
        "times_fastbert_quartiles": [round(x, 3) for x in quartiles(slower)],
        "gb_per_s": round(size / median / 1e9, 1), "tflop_per_s": round(flops / median / 1e12, 3),
        "percent_of_ceiling": round(100 * least / median, 1), "peak_gib": None if gib is None else round(gib, 6),
    }  # fmt: skip


def warm(todo, device):
    """Call every variant once, so that what it compiles lies in the caches on disk: fastbert's of all cases first."""
    with precompile.compiling():
        for case in todo:
            results(build(variants(case.op)["fastbert"], case.arguments(device)))
    for case in todo:
        torch._dynamo.reset()
        arguments = case.arguments(device)
        for make in variants(case.op).values():
            try:
                results(build(make, arguments))
            except Exception as failure:
                print(f"{case.name}: {record.line_of(failure)}")


def main():
    parser = machine.parser(__doc__)
    parser.add_argument("--ops", nargs="+", choices=op_cases.OPS, default=op_cases.OPS)
    parser.add_argument("--quick", action="store_true", help="one shape of each op, and nothing that compiles")
    parser.add_argument("--rounds", type=int, help="timed calls of each variant; default: 20, with --quick 7")
    parser.add_argument("--seconds", type=float, default=1e9, help="begin no further case after this time")
    parser.add_argument("--warm", action="store_true", help="only compile, and time nothing")
    options = parser.parse_args()
    warnings.simplefilter("ignore")  # torch explains at length why a backend does not take a call
    end = time.monotonic() + options.seconds
    logging.getLogger("torch").setLevel(logging.ERROR)
    device = machine.device()
    todo = [case for case in cases(device, options.quick) if case.op in options.ops]
    if options.warm:
        return warm(todo, device)

    folder = options.output or machine.folder(device)
    rounds = options.rounds or (7 if options.quick else 20)
    compiles = not (options.quick or machine.rehearsing(device))
    # seconds that a case may take, beyond five rounds
    budget = 1e9 if device.type == "cuda" else 0.5 if options.quick else 2.0
    ceilings = machine.ceilings(device)
    result = record.new(
        device, {"rounds": rounds, "quick": options.quick, "ceilings": ceilings, "peers": installed(), "left_out": []}
    )
    clock = machine.Clock(device)
    empty = statistics.median([clock.seconds(lambda: None)[0] for _ in range(10)])
    result["settings"]["empty_call_us"] = round(empty * 1e6, 2)
    passed, failures = {}, []
    for number, case in enumerate(todo, 1):
        if time.monotonic() > end:
            result["settings"]["left_out"].append(case.name)
            continue
        plain = replace(case, dropout_p=0.0)
        try:
            runs, errors, refused = agreeing(case, device, passed.get(plain, ()), compiles)
            if "fastbert" not in runs:
                raise AssertionError(refused["fastbert"])
            passed.setdefault(plain, tuple(runs))
            rows = measure(case, runs, errors, refused, clock, ceilings, rounds, budget)
        except Exception as failure:
            failures.append(case.name)
            print(f"[{number}/{len(todo)}] {case.name}: FAILED: {record.line_of(failure)}", flush=True)
            continue
        finally:
            runs = None
            if device.type == "cuda":
                torch.cuda.empty_cache()
        result["rows"] += rows
        print(f"[{number}/{len(todo)}] {told(rows)}", flush=True)
        write(result, folder)  # what is measured is kept, whatever comes next
    write(result, folder)
    for name, reason in result["not_measured"].items():
        print(f"not measured: {name}: {reason}")
    left_out = len(result["settings"]["left_out"])
    print(f"written to {folder}" + (f"; left out for want of time: {left_out}" if left_out else ""))
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
