"""A model's step, side by side: transformers (eager, sdpa, compiled, flash), the same swapped, and fastbert's own.

    python benchmarks/bench_models.py                                 the sweeps below: 18 minutes on two cores
    python benchmarks/bench_models.py --only fill batch               some of them
    python benchmarks/bench_models.py --models roberta-base           of this model alone, instead of all
    python benchmarks/bench_models.py --quick --output runs/quick     small shapes, under a minute: does it run?
    python benchmarks/bench_models.py step                            BERT-base's training step
    python benchmarks/bench_models.py step --own                      fastbert's alone, on packed batches; needs a GPU
    python benchmarks/bench_models.py families                        every family, and a sentence embedder; on a CPU

The sweeps (fill, length, batch, picked, families, sentences) write models.json, in fp32 on a CPU and bf16 on a GPU;
README.md says what each of them measures, and what all of them hold to.

`step` writes training_step.json. On a CPU: 8 sequences of at most 128 tokens, fp32, without dropout. There fastbert's
products go to whichever of oneDNN and MKL is faster, as `fastbert doctor` shows it, and torch's to MKL: a further row
runs fastbert on MKL alone. Peak memory is that of one process per library. On a GPU: 65,536 tokens of padding and
text, bf16 autocast, dropout 0.1; --own writes own_step.json, with the time of each kernel.

`families` writes families.json: base sizes with 4 layers, fp32, 8 sequences as above; a training step without the
optimizer, which is the same for all; one text of 8 tokens, where there is little to gain; 300 verses to vectors.
"""

import argparse
import functools
import gc
import json
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import machine
import model_pairs
import record
import tables
import torch
from model_pairs import FAMILIES, FLOPS, IMPLEMENTATIONS, OWN, Case, Model, batches, checked, leave_out, model_flops
from rounds import take_turns

import fastbert
from fastbert.proof import op_cases
from fastbert.training.memory import keep_freed_memory

# what is measured first comes first
SWEEPS = ("fill", "batch", "picked", "length", "families", "sentences")
FILES = {"sweeps": "models", "step": "training_step", "families": "families"}
# (least, most) timed calls on a CPU; on a GPU times vary less, and one number is enough
ROUNDS = {
    "sweeps": {"inference": (5, 20), "train": (4, 12)}, "step": {"train": (12, 20)},
    "families": {"inference": (5, 20), "train": (5, 20)},
}  # fmt: skip
ON_A_GPU = {"sweeps": 20, "step": 15}
# from this length on, transformers' eager attention is left out: its scores would take gigabytes
LONG = 4096
# the batches of `step` on a CPU: evenly spread lengths, which fill 60 % of their rectangle, and full ones
LENGTHS = {"text, 60 % fill": (26, 40, 55, 70, 84, 99, 113, 128), "no padding": (128,) * 8}
ON_A_CPU = ("transformers", "fastbert", "fastbert on MKL")
OF_FAMILIES = ("transformers", "swapped", "fastbert", "fastbert on MKL")


def lengths_of(sequences, longest, fill):
    """Lengths, evenly spread, that fill `fill` of the rectangle that their longest needs; one alone fills it."""
    if sequences == 1:
        return (longest,)
    mean = max((fill * sequences - 1) / (sequences - 1), 0.05)
    low, high = max(2 * mean - 1, 0), min(2 * mean, 1)
    spread = [low + (high - low) * (i + 0.5) / (sequences - 1) for i in range(sequences - 1)]
    return (*(max(round(longest * share), 2) for share in spread), longest)


def tokens_on(device):
    """Of the padded rectangle on a GPU: sizes go by its memory in all."""
    return 65536 if machine.memory(device) > 100 * 2**30 else 16384


def cases(device, models, only, quick):
    """The cases of the sweeps. models: names; empty: bert-base in all sweeps, and every family beside it."""
    on_gpu = device.type == "cuda"
    dtype, tokens, S = ("bfloat16", tokens_on(device), 128) if on_gpu else ("float32", 512, 128)
    if quick:
        tokens, S = 64, 32
    # compiling takes most of a minute: only where it tells most
    uncompiled = tuple(name for name in IMPLEMENTATIONS if name != "transformers compiled")
    compiled = uncompiled if quick else IMPLEMENTATIONS
    # eager attention is never the fastest: one sweep has it
    few = tuple(name for name in uncompiled if name != "transformers eager")
    both = ("inference", "train")
    # one of ModernBERT's three layers has global attention, the same share as in the whole model
    whole, of_modernbert, of_families = (2, 2, 2) if quick else (None, None, None) if on_gpu else (None, 3, 4)
    found = []

    def add(sweep, model, lengths, passes, implementations, dtype=dtype, layers=whole, **more):
        found.append(Case(sweep, model, lengths, passes, dtype, layers, implementations=implementations, **more))

    for model in models or ("bert-base",):
        for width in (128, 512) if on_gpu and not quick else (S,):
            for fill in (0.6, 1.0) if quick else (0.6, 1.0, 0.4, 0.8):
                lengths = lengths_of(tokens // width, width, fill)
                # without a mask there is another graph to compile, which takes too long on a CPU
                wanted = compiled if on_gpu or fill < 1 else uncompiled
                if fill in (0.4, 0.8) and not on_gpu:
                    wanted = tuple(name for name in wanted if name != "transformers eager")
                for passes in both:
                    add("fill", model, lengths, passes, wanted)
                if fill == 0.6 and not on_gpu and not quick:
                    add("fill", model, lengths, "inference", compiled, "bfloat16")
                    add("fill", model, lengths, "train", uncompiled, "bfloat16")
        for B in (1, 2, 4) if quick else (1, 2, 4, 8, 16, *((64, 256) if on_gpu else ())):
            lengths = lengths_of(B, S, 1.0 if B == 1 else 0.6)
            add("batch", model, lengths, "inference", compiled if B == 1 else few)
        # the fill sweep has 15 %
        for share in (0.05, 0.3) if quick or not on_gpu else (0.05, 0.3, 0.6, 1.0):
            add("picked", model, lengths_of(tokens // S, S, 0.6), "train", few, picked=share)
        if model != "modernbert-base":
            for width in (16, 32) if quick else (64, 128, 256, 512):
                for passes in both:
                    wanted = uncompiled if on_gpu or passes == "inference" else few
                    add("length", model, lengths_of(tokens // width, width, 1.0), passes, wanted)
    if not models or "modernbert-base" in models:
        layers = whole if models else of_modernbert
        for width in (16, 32) if quick else (64, 128, 256, 512, 1024, 2048, 4096, 8192):
            wanted = uncompiled if width < LONG else few
            around = max(tokens if on_gpu or quick else 1024, width)
            add("length", "modernbert-base", (width,) * (around // width), "inference", wanted, layers=layers)
            # on a CPU, rounds of a step of 4096 tokens would take a minute
            if on_gpu or quick or width in (128, 512, 2048):
                around = max(tokens, width)
                add("length", "modernbert-base", (width,) * (around // width), "train", few, layers=layers)
    for family, model in () if models else FAMILIES.items():
        if quick and family != "deberta-v2":
            continue
        for fill in (0.6,) if quick else (0.6, 1.0, 0.4, 0.8):
            wanted = compiled if on_gpu and fill == 0.6 and family in ("deberta-v2", "modernbert") else few
            for passes in both:
                add("families", model, lengths_of(tokens // S, S, fill), passes, wanted, layers=of_families)
        if quick or family in ("bert", "modernbert"):
            # their lengths are above
            continue
        for width in (512, 1024, 2048) if family == "deberta-v2" else (512,):
            for passes in both if width == 512 or on_gpu else ("inference",):
                around = max(tokens, width)
                add("length", model, (width,) * (around // width), passes, few, layers=of_families)
    found = sorted((case for case in found if case.sweep in only), key=lambda case: SWEEPS.index(case.sweep))
    # cases of one model together, as loading it takes longer than a case
    models = list(dict.fromkeys((case.model, case.layers) for case in found))
    return sorted(found, key=lambda case: models.index((case.model, case.layers)))


def most_telling_first(cases):
    """The order of a run that may be cut: text at 60 % fill, then every family at it, one sequence, and the rest."""

    def place(case):
        if case.sweep in ("fill", "families") and 0.55 < case.fill < 0.65 and max(case.lengths) <= 128:
            return ("fill", "families").index(case.sweep)
        return 2 if case.sweep == "batch" and len(case.lengths) == 1 else 3

    # stable: cases of one model stay together
    return sorted(cases, key=place)


def step_cases(device, is_own=False):
    """BERT-base's training step, the most telling batch first."""
    dtype, implementations, layers, found = "float32", ON_A_CPU, None, LENGTHS
    if machine.rehearsing(device):
        implementations, layers, found = ("transformers", "fastbert", OWN), 2, {"S=8, text": (3, 8, 5, 8, 2)}
    elif device.type == "cuda":
        dtype, implementations = "bfloat16", ("transformers", "transformers compiled", "fastbert", OWN)
        tokens = tokens_on(device)
        # as many sequences as the rectangle has rows
        found = {f"S={S}, text": op_cases.ragged_lengths(2 * tokens, S)[: tokens // S] for S in (128, 512)}
        found |= {f"S={S}, no padding": op_cases.full_lengths(tokens, S) for S in (128, 512)}
        if is_own:
            found = {title: lengths for title, lengths in found.items() if "text" not in title}
    implementations = (OWN,) if is_own else implementations
    return [
        Case("step", "bert-base", tuple(lengths), "train", dtype, layers, implementations=implementations, title=title)
        for title, lengths in found.items()
    ]


def family_cases(models, layers):
    lengths = LENGTHS["text, 60 % fill"]
    same = dict(layers=layers, implementations=OF_FAMILIES, updates=False)
    found = [
        Case("family", model, lengths, passes, title=family, **same)
        for family, model in FAMILIES.items()
        for passes in ("train", "inference")
        if model in models or not models
    ]
    return [*found, Case("single", "bert-base", (8,), "inference", implementations=OF_FAMILIES[:2])]


def names_of(case, layers):
    """What a row that the README shows is known by."""
    if case.sweep == "step":
        return {"name": f"BERT-base training step, {case.title}", "case": case.title}
    if case.sweep == "family":
        return {"name": f"{case.title}, {layers} layers, {case.passes}", "family": case.title}
    return {"name": f"one text of {sum(case.lengths)} tokens through BERT-base"} if case.sweep == "single" else {}


def row_of(facts, lengths, padded, flops, seconds, rate, gib=None, difference=0.0):
    """A row of the result: what it is, the raw seconds of each implementation, and their figures."""
    return {
        **facts, "sequences": len(lengths), "length": max(lengths), "fill": round(sum(lengths) / padded, 3),
        "tokens_real": sum(lengths), "tokens_padded": padded, "flops": flops, "difference": difference,
        "seconds": record.rounded(seconds),
        "summary": summary(seconds, sum(lengths), padded, flops, rate, gib or {}),
    }  # fmt: skip


def summary(seconds, real, padded, flops, rate, gib):
    """record.summary of raw seconds, with the figures of a model."""
    found = record.summary(seconds, real)
    for name, figures in found.items():
        median = figures["median_s"]
        figures["padded_tokens_per_s"] = round(padded / median)
        figures |= {"tflop_per_s": round(flops / median / 1e12, 4), "mfu": round(flops / median / rate, 4)}
        if gib.get(name) is not None:
            figures["peak_gib"] = round(gib[name], 3)
    return found


def run_case(case, model, device, rates, rounds, not_measured, seconds=20.0):
    """The row of a case. rounds: (least, most); seconds: how long they may take."""
    if device.type == "cuda" and case.sweep == "step":
        compile_kernels(case, model, device)
    calls, difference = checked(model, case, device, not_measured)

    def prepare(name):
        # implementations share modules: set the mode and the attention that this one needs
        model.module(name, case)

    def failed(name, failure):
        leave_out(name, failure, case, device, not_measured)
        del calls[name]

    times = take_turns(calls, rounds, seconds, device=device, prepare=prepare, on_failure=failed)
    gib = {}
    # on a CPU a profiler counts, which takes its time
    is_counted = device.type == "cuda" or (case.sweep == "fill" and record.is_usual(case.fill))
    for name, call in list(calls.items()) if is_counted else ():
        try:
            prepare(name)
            gib[name] = machine.gib_per_call(device, call)
        except Exception as failure:  # its times stay
            leave_out(name, failure, case, device, not_measured)
    is_train, layers = case.passes == "train", model.config.num_hidden_layers
    picked = int((batches(model.config, case, device)[0]["labels"] != -100).sum())
    facts = {"sweep": case.sweep, **names_of(case, layers), "model": case.model, "layers": layers}
    if case.sweep != "single":
        facts["pass"] = case.passes
    facts |= {"dtype": case.dtype, "picked_share": None, "picked": None}
    if is_train:
        facts |= {"picked_share": case.picked, "picked": picked}
    flops = model_flops(model.config, case.lengths, picked, case.passes)
    padded = len(case.lengths) * max(case.lengths)
    row = row_of(facts, case.lengths, padded, flops, times, rates[case.dtype], gib, difference)
    if case.implementations == (OWN,) and device.type == "cuda":
        try:
            row["summary"][OWN]["kernels"] = machine.kernel_times(calls[OWN])
        except Exception as failure:  # the times of the step stay
            not_measured[f"times of kernels: {case.title}"] = record.line_of(failure)
    if case.implementations == ON_A_CPU:
        for name, figures in row["summary"].items():
            figures |= memory_of_a_process(name, case, model)
    return row


def compile_kernels(case, model, device):
    """Compile what fastbert's step launches, many kernels at a time."""
    # needs triton, which may be missing on a CPU
    import precompile

    try:
        batch, packed = batches(model.config, case, device)
        # without the optimizer: these gradients mean nothing
        with precompile.compiling():
            model_pairs.train_step(model.module(OWN, case), {"input_ids": packed}, autocast=model.autocast(case))
    except Exception as failure:  # told again where it is timed
        print(f"not compiled: {record.line_of(failure)}", flush=True)


def memory_of_a_process(implementation, case, model):
    """Peak memory in MiB of a process that does nothing but three training steps, and what it held before the model."""
    command = [sys.executable, __file__, "step", "--memory", implementation, "--case", case.title]
    command += ["--weights", model.directory.name]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def measure_memory(directory, title, implementation):
    def peak_mib():
        # not resource.getrusage: its maximum begins with that of the process that started this one
        status = Path("/proc/self/status").read_text()
        return round(int(status.partition("VmHWM:")[2].split()[0]) / 1024)

    before, module = peak_mib(), model_pairs.load(implementation, directory)
    batch = model_pairs.padded_batch(model_pairs.config_of("bert-base"), LENGTHS[title])
    step = functools.partial(model_pairs.train_step, module, batch, model_pairs.optimizer_of(module))
    for _ in range(3):
        (model_pairs.on_mkl(step) if implementation.endswith("on MKL") else step)()
    print(json.dumps({"peak_memory_mib": peak_mib(), "memory_before_model_mib": before}))


def sentence_rows(device, rates, rounds, counts, not_measured, of_sweep=True):
    """Texts to vectors, for so many verses. of_sweep: by the names of the sweeps, without MKL."""
    ours, calls = model_pairs.encoders(device, not_measured)
    if of_sweep:
        calls.pop("fastbert on MKL", None)
        names = {"transformers": "transformers sdpa", "swapped": "sentence-transformers, swapped"}
        calls = {names.get(name, name): call for name, call in calls.items()}
    for count in counts if calls else ():
        texts = model_pairs.verses()[:count]
        # before the lengths are read: encode makes the tokenizer truncate and not pad
        vectors = {name: call(texts) for name, call in calls.items()}
        lengths = [len(encoding.ids) for encoding in ours.tokenizer.encode_batch(texts)]
        # the padding of a library that sorts by length
        in_order = sorted(lengths, reverse=True)
        padded = sum(n * len(in_order[i : i + 32]) for i in range(0, count, 32) for n in in_order[i : i + 1])
        truth = next(iter(vectors.values()))
        difference = max((x - truth).abs().max().item() for x in vectors.values())
        if difference > 1e-5:
            raise AssertionError(f"the vectors of {', '.join(calls)} differ by {difference:.1e}")
        calls_now = {name: functools.partial(call, texts) for name, call in calls.items()}
        seconds = take_turns(calls_now, rounds, device=device)
        facts = {
            "sweep": "sentences", "model": "all-MiniLM-L6-v2", "layers": ours.config.num_hidden_layers,
            "pass": "encode", "dtype": "float32", "picked_share": None, "picked": None,
        }  # fmt: skip
        if not of_sweep:
            facts = {"sweep": "sentences", "name": f"{count} sentences embedded", "texts": count, "dtype": "float32"}
            if "sentence-transformers" in calls:
                facts["sentence_transformers"] = version("sentence-transformers")
        flops = model_flops(ours.config, lengths, 0, "inference")
        yield row_of(facts, lengths, padded, flops, seconds, rates["float32"], difference=difference)


def line_of(row):
    """A row in one line: fastbert, and how many times its time the others take. Below 1 is a loss."""
    own = record.ours_of(row["seconds"])
    ours, others = row["summary"][own], []
    for name, figures in row["summary"].items():
        times = figures["times_fastbert"]
        if name != own:
            others.append(f"{name} {times:.2f}x" + (" (a loss)" if times < 1 and not record.is_ours(name) else ""))
    return (
        f"{row['sweep']:10}{record.name_of(row)}: {ours['median_s']:.4f} s, {ours['real_tokens_per_s']:,} real "
        f"tokens/s, MFU {ours['mfu']:.0%}; against it {', '.join(others) or 'nothing'}"
    )


def warm(case, model, device):
    """Call once what a case calls, so that what is compiled lies in the caches on disk; time nothing."""
    # transformers compiles nothing, and takes most of the memory
    for name in (name for name in case.implementations if name != "transformers"):
        try:
            model.call(name, case, *batches(model.config, case, device))()
        except Exception as failure:
            print(f"{name}, {case.name}: {record.line_of(failure)}", flush=True)


def options_of(arguments):
    parser = machine.parser(__doc__)
    parser.add_argument("what", nargs="?", choices=FILES, default="sweeps", help="default: sweeps")
    parser.add_argument("--models", nargs="+", default=[], metavar="NAME", help="these alone; default: see above")
    parser.add_argument("--only", nargs="+", choices=SWEEPS, default=list(SWEEPS), help="these sweeps")
    parser.add_argument("--own", action="store_true", help="of step: fastbert's own alone, packed, without padding")
    parser.add_argument("--rounds", type=int, help="timed calls of each; default: 4 to 20")
    parser.add_argument("--seconds", type=float, default=1e9, help="begin no further case after this time")
    parser.add_argument("--warm", action="store_true", help="only compile, and time nothing")
    parser.add_argument("--quick", action="store_true", help="small shapes: whether it runs, not how fast")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="families: the CPU always")
    # how it calls itself for memory
    for name in ("--memory", "--case", "--weights"):
        parser.add_argument(name, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    try:
        device = machine.device("cpu" if options.what == "families" else options.device)
        for name in options.models:
            fastbert.preset(name)
        if options.own and (options.what != "step" or device.type != "cuda" and not machine.rehearsing(device)):
            raise ValueError("--own is of step, on a GPU: on a CPU packing takes no time to speak of")
    except ValueError as error:
        parser.error(str(error))
    return options, device


def main(arguments=None):
    options, device = options_of(arguments)
    if options.memory:
        return measure_memory(options.weights, options.case, options.memory)
    what, end = options.what, time.monotonic() + options.seconds
    has_dropout = what == "step" and (device.type == "cuda" or machine.rehearsing(device))
    torch._dynamo.config.cache_size_limit = 64
    if what == "step":
        todo = step_cases(device, options.own)
    elif what == "families":
        todo = family_cases(options.models, 1 if options.quick else 4)
    else:
        todo = cases(device, options.models, options.only, options.quick)
        if options.warm or options.seconds < 1e9:
            todo = most_telling_first(todo)
    count = options.rounds or (3 if options.quick else ON_A_GPU[what] if device.type == "cuda" else None)
    rounds = {passes: (count, count) if count else span for passes, span in ROUNDS[what].items()}
    model, failures = None, []
    file = (options.output or machine.folder(device)) / f"{'own_step' if options.own else FILES[what]}.json"
    clock, dtypes = machine.Clock(device), {case.dtype for case in todo} | {"float32"}
    rates = {} if options.warm else {dtype: machine.product_rate(clock, dtype) for dtype in sorted(dtypes)}
    result = record.new(device, {
        "rounds": rounds, "memory_kept": device.type == "cpu" and keep_freed_memory(), "quick": options.quick,
        "optimizer": "left out" if what == "families" else "AdamW, fused, as part of train",
        "dropout": 0.1 if has_dropout else 0.0, "flops": FLOPS, "product_flops_per_s": rates, "left_out": [],
    })  # fmt: skip
    missing, left_out = result["not_measured"], result["settings"]["left_out"]
    if what == "sweeps":
        missing |= {f"transformers eager, from {LONG} tokens on": "its scores would take gigabytes"}
        if device.type == "cpu":
            missing["transformers compiled"] = "elsewhere than listed: it compiles for a minute on few cores"
    elif device.type == "cpu":
        result["settings"] |= {"shape": "8 x 128", "dtype": "float32"}

    def kept(row):
        result["rows"].append(row)
        print(line_of(row), flush=True)
        record.save(result, file)

    def failed(name, failure):
        failures.append(name)
        print(f"{name}: FAILED: {record.line_of(failure)}", flush=True)

    for case in todo:
        if time.monotonic() > end:
            left_out.append(case.title or case.name)
            continue
        try:
            if model is None or model.key != (case.model, case.layers):
                model = None
                gc.collect()
                model = Model(case.model, case.layers, device, has_dropout, options.own)
            if options.warm:
                warm(case, model, device)
                continue
            # a case of `step` takes five minutes at most
            seconds = min(300.0, max(end - time.monotonic(), 1.0)) if what == "step" else 20.0
            kept(run_case(case, model, device, rates, rounds[case.passes], missing, seconds))
        except Exception as failure:  # the other cases want their turn
            failed(case.title or case.name, failure)
    if options.warm:
        return
    model = None
    gc.collect()
    if what != "step" and "sentences" in options.only and not options.models and time.monotonic() < end:
        many = 20 if options.quick else model_pairs.VERSES
        counts = (1, many) if what == "sweeps" else (many,)
        try:
            for row in sentence_rows(device, rates, rounds["inference"], counts, missing, what == "sweeps"):
                kept(row)
        except Exception as failure:  # what is measured is kept
            failed("sentences", failure)
    record.save(result, file)
    if what == "step":
        rehearsal = "REHEARSAL, no time means anything: " if machine.rehearsing(device) else ""
        text = f"{rehearsal}{record.about(result)}\n\n{tables.step_table(result)}\n"
        file.with_suffix(".md").write_text(text, encoding="utf-8")
        print(text)
    for name, reason in missing.items():
        print(f"not measured: {name}: {reason}")
    print(
        f"{len(result['rows'])} rows written to {file}"
        + (f"; left out for want of time: {len(left_out)}" if left_out else "")
        + (f"; FAILED: {', '.join(failures)}" if failures else "")
    )
    if failures:
        sys.exit(1)


if __name__ == "__main__":
    main()
