"""The results of a device as one page, with plots; and the figures of the project's README, from the same results.

    python benchmarks/report.py                          every folder of benchmarks/results that holds results
    python benchmarks/report.py --device FOLDER          one of them
    python benchmarks/report.py --readme                 the README's figures too

It reads benchmarks/results/<device>/*.json and writes README.md and plots beside them. It times nothing, so what it
writes follows from the committed results alone. See record.py for the form of a file of results.

Ratios are medians, over rounds, of another's time over fastbert's: below 1 fastbert is slower, and the page says so.
Each run with other ratios than the last adds a line to history.jsonl, from which the history is drawn.

In README.md what stands between <!-- figures: NAME --> and <!-- end --> is written by --readme: see `FIGURES`.
"""

import argparse
import datetime
import importlib.util
import itertools
import json
import re
import statistics
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
for place in (str(ROOT / "benchmarks"), str(ROOT)):
    if place not in sys.path:
        sys.path.insert(0, place)

import plots  # noqa: E402
import rounds  # noqa: E402
from record import (  # noqa: E402
    RESULTS,
    about,
    below_one,
    command_of,
    facts_of,
    is_ours,
    losses,
    name_of,
    not_measured,
    ours_of,
    ratio,
    ratios,
    read,
    rows_of,
)

# ---------------------------------------------------------------------------------------------------------------------
# tables


PASSES = {"train": "training step", "inference": "inference", "encode": "encode"}


def table(head, rows):
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    return "\n".join(lines + [f"| {' | '.join(map(str, row))} |" for row in rows])


def duration(seconds):
    """Seconds in the unit that reads best."""
    for factor, unit in ((1, "s"), (1e3, "ms"), (1e6, "µs")):
        if seconds * factor >= 1 or unit == "µs":
            return f"{seconds * factor:.3g} {unit}" if seconds * factor < 1000 else f"{seconds * factor:.0f} {unit}"


def times_of(value):
    """A ratio; one below 1 is a loss, and printed as one."""
    return f"**{value:.2f}x**" if value >= 1 else f"{below_one(value)}, a loss"


def spread(seconds):
    """Half of the distance between the quartiles, in per cent of the median, as the tables show it."""
    return f" ±{100 * rounds.spread(seconds):.0f} %" if len(seconds) > 1 else ""


def models_table(rows):
    """The rows of models.json, one line for each implementation."""
    lines = []
    for row in rows:
        names = f"{row['model']} ({row['layers']} layers), {row['pass']}"
        picked = f", {row['picked_share']:.0%} picked" if row["picked_share"] is not None else ""
        shape = f"{row['sequences']} x {row['length']}, {row['fill']:.0%} fill{picked}, {row['dtype']}"
        for name, figures in row["summary"].items():
            memory = figures.get("peak_gib", "")
            against = "" if name == "fastbert" else times_of(figures["times_fastbert"])
            if is_ours(name) and name != "fastbert":
                against = f"{figures['times_fastbert']:.2f}x"
            lines.append(
                (
                    names, shape, name, duration(figures["median_s"]) + spread(row["seconds"][name]),
                    f"{figures['real_tokens_per_s']:,}", f"{figures['padded_tokens_per_s']:,}",
                    f"{figures['tflop_per_s']:.3g}", f"{figures['mfu']:.0%}", memory, against,
                )
            )  # fmt: skip
            names = shape = ""
    head = ("model, pass", "batch", "library", "median", "real tokens/s", "padded tokens/s", "TFLOP/s", "MFU", "GiB",
            "of fastbert's time")  # fmt: skip
    return table(head, lines)


def models_summary(result):
    """models.json in a few lines: against the fastest of transformers' ways at each place, by pass and dtype."""
    lines = []
    for row in result["rows"]:
        if row["sweep"] != "fill":
            continue
        others = {x: f for x, f in row["summary"].items() if not is_ours(x)}
        if not others:
            continue
        best = min(others, key=lambda name: others[name]["times_fastbert"])
        ours, swapped = row["summary"]["fastbert"], row["summary"].get("swapped")
        times = others[best]["times_fastbert"]
        of_swapped = f"{times / swapped['times_fastbert']:.2f}x" if swapped else ""
        lines.append(
            (f"{row['model']}, {row['pass']}, {row['dtype']}", f"{row['fill']:.0%}",
             f"{best.removeprefix('transformers ')}: {duration(others[best]['median_s'])}", duration(ours["median_s"]),
             f"{ours['real_tokens_per_s']:,}", times_of(times), of_swapped)
        )  # fmt: skip
    head = ("model", "fill", "transformers' fastest", "fastbert", "real tokens/s", "speed", "swapped")
    return table(head, lines)


def training_table(result):
    """training.json: what each run reached, and when."""
    lines = []
    ours = next(row for row in result["rows"] if row["implementation"] == "fastbert")
    for row in result["rows"]:
        reached = row["seconds_to_accuracy"]
        against = ""
        if row is not ours and reached and ours["seconds_to_accuracy"]:
            against = times_of(reached / ours["seconds_to_accuracy"])
        lines.append(
            (
                row["implementation"], f"{row['steps']:,}", f"{row['tokens']:,}", f"{row['training_seconds']:.0f} s",
                f"{row['tokens_per_s']:,}", f"{row['held_out'][-1]['loss']:.3f}",
                f"{row['held_out'][-1]['accuracy']:.1%}", "not reached" if reached is None else f"{reached:.0f} s",
                against,
            )
        )  # fmt: skip
    goal = f"to {result['settings']['accuracy']:.0%} held-out accuracy"
    head = ("run", "steps", "tokens", "training", "real tokens/s", "held-out loss", "accuracy", goal, "of fastbert's")
    return table(head, lines)


def data_table(result):
    """data.json: what the data path makes, and what eats it."""
    lines = [
        (row["name"], f"{row['tokens_per_s']:,}", row["against"], f"{row['against_tokens_per_s']:,}",
         times_of(row["ratio"]))
        for row in result["rows"]
    ]  # fmt: skip
    return table(("data path", "tokens/s", "against", "tokens/s", "ratio"), lines)


def ops_table(rows):
    """Both passes of every op: fastbert, and the fastest of what else there is."""
    lines = []
    for row in rows:
        if row["pass"] != "both" or "fastbert" not in row["seconds"]:
            continue
        figures, ours = row["summary"]["fastbert"], row["seconds"]["fastbert"]
        others = {name: ratio(times, ours) for name, times in row["seconds"].items() if name != "fastbert" and times}
        best = min(others, key=others.get, default=None)
        lines.append(
            (row["case"], duration(statistics.median(ours)) + spread(ours), figures.get("gb_per_s", ""),
             figures.get("tflop_per_s", ""), figures.get("percent_of_ceiling", ""), best or "none here",
             times_of(others[best]) if best else "")
        )  # fmt: skip
    head = ("op, forward and backward", "fastbert", "GB/s", "TFLOP/s", "% of ceiling", "fastest other", "its time")
    return table(head, lines)


def latency_table(result):
    """The batch sweep in two figures: how long one text takes, and how much text in a second the best batch makes."""
    lines = []
    rows = [row for row in result["rows"] if row["sweep"] == "batch"]
    for (model, dtype), found in itertools.groupby(rows, key=lambda row: (row["model"], row["dtype"])):
        found = list(found)
        alone = next((row for row in found if row["sequences"] == 1), None)
        for name in found[-1]["summary"]:
            latency = alone["summary"][name]["median_s"] if alone and name in alone["summary"] else None
            most = max(
                (row for row in found if name in row["summary"]),
                key=lambda row: row["summary"][name]["real_tokens_per_s"] * (row["sequences"] > 1),
            )
            lines.append(
                (f"{model}, {dtype}", name, duration(latency) if latency else "",
                 f"{most['summary'][name]['real_tokens_per_s']:,}",
                 f"{most['sequences'] / most['summary'][name]['median_s']:,.1f}", f"{most['sequences']}")
            )  # fmt: skip
    if not lines:
        return []
    length, fill = max(row["length"] for row in rows), rows[-1]["fill"]
    head = ("inference", "library", f"latency of one text of {length} tokens", "throughput, real tokens/s", "texts/s",
            f"at a batch of (texts of at most {length}, {fill:.0%} fill)")  # fmt: skip
    return [table(head, lines), ""]


def sweep_table(result, sweep, key, shown):
    """A line for each model and pass: the time of the fastest of transformers' ways over fastbert's, by `key`."""
    rows = [row for row in result["rows"] if row["sweep"] == sweep]
    places = sorted({round(row[key], 1) for row in rows})
    kinds = dict.fromkeys((row["model"], row["layers"], row["pass"], row["dtype"]) for row in rows)
    lines = []
    for kind in kinds:
        model, layers, pass_, dtype = kind
        cells = dict.fromkeys(places, "")
        for row in rows:
            others = [f["times_fastbert"] for name, f in row["summary"].items() if not is_ours(name)]
            if (row["model"], row["layers"], row["pass"], row["dtype"]) == kind and others:
                cells[round(row[key], 1)] = times_of(min(others))
        lines.append((f"{model} ({layers} layers)", f"{PASSES[pass_]}, {dtype}", *cells.values()))
    return [table(("model", "pass", *map(shown, places)), lines), ""] if lines else []


def generic_table(result):
    """Any file: a line for each row, the median of each implementation, and of fastbert's time."""
    lines = []
    for row in rows_of(result):
        seconds = row["seconds"]
        ours, name = ours_of(seconds), name_of(row)
        for implementation, times in seconds.items():
            if not times:
                continue
            against = "" if ours in (None, implementation) else times_of(ratio(times, seconds[ours]))
            lines.append((name, implementation, duration(statistics.median(times)) + spread(times), against))
            name = ""
    return table(("what", "implementation", "median", "of fastbert's time"), lines)


# ---------------------------------------------------------------------------------------------------------------------
# what a page says of its results


def memory_panels(results):
    """Bars of peak memory, {title: [(group, {implementation: value})]}: of a process that trains, and of a call."""
    panels = {}
    for row in rows_of(results.get("training_step", {})):
        for figure, title in (
            ("peak_memory_mib", "a process that trains BERT-base, MiB"),
            ("peak_gib", "a step of BERT-base beyond the weights, GiB"),
        ):
            values = {name: figures[figure] for name, figures in row["summary"].items() if figures.get(figure)}
            # by the name that it has among the models
            values = {"transformers sdpa" if name == "transformers" else name: x for name, x in values.items()}
            panels.setdefault(title, []).append((row["case"], values))
    for row in rows_of(results.get("models", {})):
        values = {name: 1024 * figures["peak_gib"] for name, figures in row["summary"].items() if "peak_gib" in figures}
        if row["sweep"] == "fill" and plots.is_usual(row) and values:
            kind = {"train": "a training step", "inference": "inference"}[row["pass"]]
            short = row["dtype"].replace("bfloat16", "bf16").replace("float32", "fp32")
            place = f"{row['sequences']} x {row['length']}\n{row['fill']:.0%} fill, {short}"
            panels.setdefault(f"{kind} of {row['model']} beyond the weights, MiB", []).append((place, values))
    panels = {title: [group for group in groups if group[1]] for title, groups in panels.items()}
    return {title: groups for title, groups in panels.items() if groups}


def measured_points(ops):
    """(points, ceilings, title) of every op, forward and backward, of an ops.json; no points where it has none.

    A point is {"op", "shape", "which": "fastbert" or "plain PyTorch", "bytes", "flops": what that implementation moves
    and multiplies, "useful bytes", "useful flops": the least that any of them does, "seconds"}.
    """
    points, ceilings = [], (ops.get("settings") or {}).get("ceilings") or {}
    for row in ops["rows"] if {"copy", "product"} <= ceilings.keys() else ():
        if row.get("pass") != "both" or not {"bytes", "flops"} <= row.keys():
            continue
        for name, which in (("fastbert", "fastbert"), ("eager", "plain PyTorch")):
            if row["seconds"].get(name):
                points.append({
                    "op": row["op"], "shape": row["case"].removeprefix(row["op"]).strip(), "which": which,
                    "bytes": row["bytes"], "flops": row["flops"], "useful bytes": row["bytes"],
                    "useful flops": row["flops"], "seconds": statistics.median(row["seconds"][name]),
                })  # fmt: skip
    return points, ceilings, f"measured. {about(ops)}"


def counted_points():
    """The same from the counted traffic of the kernels, at the ceilings of the GPU that it states."""
    counted = json.loads((RESULTS / "traffic.json").read_text(encoding="utf-8"))
    points, groups = [], {}
    for row in counted["rows"]:
        groups.setdefault((row["op"], row["shape"]), []).append(row)
    for (op, shape), rows in groups.items():
        # of several ways to write it in plain PyTorch the first is the usual one; the least is the least of all
        ways = [("fastbert", rows[0]["fastbert"]), *(("plain PyTorch", row["plain"]) for row in rows)]
        sums = [(which, *(_both(passes, x) for x in ("bytes", "flops", "seconds"))) for which, passes in ways]
        least = {f"useful {x}": min(way[i] for way in sums) for i, x in ((1, "bytes"), (2, "flops"))}
        for which, size, flops, seconds in sums[:2]:
            points.append(
                {"op": op, "shape": shape, "which": which, "bytes": size, "flops": flops, "seconds": seconds, **least}
            )
    ceilings = {"copy": counted["ceilings"]["bytes_per_second"], "product": counted["ceilings"]["flops_per_second"]}
    return points, ceilings, "counted traffic at an H200's measured ceilings, not timed"


def _both(passes, what):
    return sum(figures[what] for figures in passes.values())


def headline(results):
    """{name: the best peer's time over fastbert's} of what stands for the whole, for the history."""
    found = {}
    for name, others in ratios(results).items():
        peers = [times for other, times in others.items() if not is_ours(other)]
        if peers:
            found[name] = min(peers)
    return found


def record_history(results, file):
    """Add a line to history.jsonl when the ratios are others than in its last; all lines."""
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.exists() else []
    now = headline(results)
    if now and (not lines or lines[-1]["ratios"] != now):
        dates = [result["date"] for result in results.values() if result.get("date")]
        facts = next((fact for fact in map(facts_of, results.values()) if "fastbert" in fact), {})
        named = {name: facts[name] for name in ("fastbert", "torch") if name in facts}
        day = max(dates, default=datetime.date.today().isoformat())
        lines.append({"date": day, **named, "ratios": now})
        file.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return lines


# ---------------------------------------------------------------------------------------------------------------------
# the page


def page(folder, results, pictures, history):
    """README.md of a device: pictures, tables, losses, what was not measured, and how to get the same."""
    facts = [facts_of(result) for result in results.values()]
    device = next((fact["device"] for fact in facts if fact.get("device")), folder.name)
    is_rehearsal = any("rehearsal" in fact for fact in facts)
    lines = ["# REHEARSAL: no time means anything" if is_rehearsal else f"# Measured on {device}", ""]
    lines += [
        "Written by `python benchmarks/report.py` from the JSON files beside it, which hold the raw seconds. Libraries",
        "took turns in one process, after their results were compared. Ratios are medians, over rounds, of another's",
        "time over fastbert's: above 1 fastbert is faster. ± is half of the distance between the quartiles.", "",
    ]  # fmt: skip
    what = [
        (f"[{name}.json]({name}.json)", result.get("date", ""), about(result, dated=False), f"`{command_of(result)}`")
        for name, result in results.items() if "command" in result
    ]  # fmt: skip
    lines += [table(("results", "date", "device and versions", "command"), what), ""]
    noted = [f"{name}.json: {result['note']}." for name, result in results.items() if result.get("note")]
    lines += [*noted, ""] if noted else []
    lost = losses(results)
    lines += ["## Losses", ""]
    lines += [f"- {line}" for line in lost] if lost else ["None: nothing that was timed here is faster than fastbert."]
    lines += [""]
    sections = (
        ("training_step", "A training step of BERT-base"), ("families", "Every family"), ("models", "Whole models"),
        ("training", "Training, side by side"), ("data", "The data path"), ("ops", "Ops"), ("demo", "The demo"),
    )  # fmt: skip
    for name, title in sections:
        if name in results:
            lines += [f"## {title}", "", *section(name, results[name], pictures), ""]
    for name, result in results.items():
        known = [section_name for section_name, _ in sections]
        if name not in known and rows_of(result):
            lines += [f"## {name}", "", generic_table(result), ""]
    for picture, title in (("memory", "Memory"), ("roofline", "Roofline"), ("floors", "Floors of the kernels")):
        if picture in pictures:
            lines += [f"## {title}", "", f"![{pictures[picture]}]({picture}.png)", ""]
    if "history" in pictures:
        lines += ["## History", "", f"![{pictures['history']}](history.png)", ""]
    elif history:
        runs = f"{len(history)} run{'s' * (len(history) > 1)} so far"
        lines += ["## History", "", f"{runs}: [history.jsonl](history.jsonl).", ""]
    lines += without_a_device()
    missing = not_measured(results)
    if missing:
        lines += ["## Not measured", "", table(("what", "why"), [(a, b.replace("|", "/")) for a, b in missing.items()])]
    return "\n".join(lines).rstrip() + "\n"


def without_a_device():
    """Lines on what the compiler made of the kernels, and where their traffic was counted: of every device's page."""
    lines, file = [], RESULTS / "compile.json"
    if file.exists():
        result = json.loads(file.read_text(encoding="utf-8"))
        rows, by_arch = [], {}
        for kernel in result["kernels"]:
            by_arch.setdefault(kernel["arch"], []).append(kernel)
        for arch, kernels in by_arch.items():
            whole = [kernel for kernel in kernels if "error" not in kernel]
            products = [kernel for kernel in whole if kernel["dots"]]
            rows.append(
                (
                    arch, len(kernels), len(kernels) - len(whole), sum(bool(kernel["spills"]) for kernel in whole),
                    f"{sum(bool(kernel['tensor']) for kernel in products)} of {len(products)}",
                    sum(bool(kernel["atomics"]) for kernel in whole), max(kernel["registers"] for kernel in whole),
                )
            )  # fmt: skip
        head = ("for", "kernels", "do not compile", "spill", "products on tensor cores", "atomics", "most registers")
        made = ", ".join([f"Triton {result['versions']['triton']}", *filter(None, [result.get("date")])])
        lines += ["## What the compiler makes of the kernels", "", table(head, rows), ""]
        lines += [f"{made}: [compile.json](../compile.json).", ""]
    if (RESULTS / "traffic.md").exists():
        lines += ["What each kernel moves at least, counted: [traffic.md](../traffic.md).", ""]
    return lines


def section(name, result, pictures):
    """The lines of one file's section."""
    if name == "training_step" and "ceilings" in result["settings"]:
        import bench_training_step_gpu as bench

        return [bench.markdown(result).partition("\n\n")[2].strip()]
    if name == "training_step":
        import bench_training_step as bench

        return [bench.markdown(result), "", f"{about(result)}.", "", "![Speed and memory](training_step.png)"]
    if name == "families":
        import bench_families as bench

        lines = [bench.markdown(result), "", f"{about(result)}."]
        lines += ["", f"{bench.sentences_line(result)}."] if bench.sentences_line(result) else []
        return [*lines, "", "![Every family](families.png)"]
    if name == "models":
        shown = [f"![{pictures[x]}]({x}.png)\n" for x in ("speed", "scaling") if x in pictures]
        settings = result["settings"]
        rates = ", ".join(f"{dtype} {rate / 1e12:.3g}" for dtype, rate in settings["product_flops_per_s"].items())
        lines = [*shown, f"{about(result)}. MFU is of the measured matrix product, TFLOP/s: {rates}. FLOPs, counted on"]
        lines += [f"real tokens: {settings['flops']}.", ""]
        lines += latency_table(result)
        by_fill = sweep_table(result, "families", "fill", lambda fill: f"{fill:.0%} fill")
        by_length = sweep_table(result, "length", "length", lambda length: f"{length:.0f} tokens")
        if by_fill or by_length:
            lines += ["Times fastbert's time that the fastest of transformers' ways takes, by fill and by length:", ""]
        lines += by_fill + by_length
        for sweep in dict.fromkeys(row["sweep"] for row in result["rows"]):
            rows = [row for row in result["rows"] if row["sweep"] == sweep]
            fold = f"<details><summary>{sweep}: {len(rows)} rows</summary>"
            lines += [fold, "", models_table(rows), "", "</details>"]
        if settings.get("left_out"):
            lines += ["", f"Left out for want of time: {'; '.join(settings['left_out'])}."]
        return lines
    if name == "training":
        lines = [f"![{pictures['training']}](training.png)\n"] if "training" in pictures else []
        return [*lines, training_table(result), "", f"{result['settings']['what']}. {about(result)}."]
    if name == "data":
        return [data_line(result), "", data_table(result), "", f"{about(result)}."]
    if name == "ops":
        return [ops_table(result["rows"]), "", f"{about(result)}. Every variant and pass: [ops.md](ops.md)."]
    if name == "demo":
        return [demo_line(result), "", "![The demo's loss and held-out masked accuracy](demo.png)"]
    return [generic_table(result)]


def data_line(result):
    """The data path in one number and its ratio."""
    row = next(row for row in result["rows"] if row["name"].startswith("loader"))
    return (
        f"The loader makes {row['tokens_per_s']:,} masked, packed tokens a second, **{row['ratio']:.0f} times** what "
        f"{row['against']} eats ({row['against_tokens_per_s']:,})."
    )


def span_line(result):
    """The worst and the best ratio of a file to the fastest of the others, row by row, and how many are losses."""
    fastest = {}
    for name, others in ratios({"": result}).items():
        peers = [times for other, times in others.items() if not is_ours(other)]
        if peers:
            fastest[name] = min(peers)
    low, high, lost = min(fastest, key=fastest.get), max(fastest, key=fastest.get), sum(x < 1 for x in fastest.values())
    return (
        f"from **{fastest[low]:.2f}x** ({low}) to **{fastest[high]:.2f}x** ({high}), and slower in "
        f"{lost or 'none'} of {len(fastest)} measurements"
    )


def demo_line(result):
    """What the demo's model has learned, in a sentence."""
    (row,) = result["rows"]
    return (
        f"it gets {row['eval_masked_accuracy']:.1%} of them right; always guessing the most frequent token gets "
        f"{row['eval_baseline_accuracy']:.1%}."
    )


def write(folder):
    """Page and, where matplotlib is installed, pictures of one folder of results. Returns the files written."""
    results = read(folder)
    if not results:
        return []
    history = record_history(results, folder / "history.jsonl")
    pictures = draw(folder, results, history) if importlib.util.find_spec("matplotlib") else {}
    (folder / "README.md").write_text(page(folder, results, pictures, history), encoding="utf-8")
    return [folder / "README.md", *(folder / f"{name}.png" for name in pictures)]


def draw(folder, results, history):
    """The pictures of one folder of results: {name of the file: what it shows}."""
    pictures, models, ops = {}, results.get("models"), results.get("ops")
    if rows_of(results.get("training_step", {})) and "ceilings" not in results["training_step"]["settings"]:
        step = results["training_step"]
        plots.plot_training_step(step["rows"], about(step), folder / "training_step.png")
        pictures["training_step"] = "Speed and memory"
    if rows_of(results.get("families", {})):
        import bench_families

        families = results["families"]
        plots.plot_families(bench_families.speeds(families), about(families), folder / "families.png")
        pictures["families"] = "Every family"
    if models and models["rows"]:
        if any(row["sweep"] in ("fill", "families") for row in models["rows"]):
            plots.plot_speed(models["rows"], about(models), folder / "speed.png")
            pictures["speed"] = "Every model: how many times fastbert's time the others take"
        if plots.plot_scaling(models["rows"], about(models), folder / "scaling.png"):
            pictures["scaling"] = "How cost grows with fill, length, batch and picked share"
    panels = memory_panels(results)
    if panels:
        plots.plot_memory(panels, about(models or results["training_step"]), folder / "memory.png")
        pictures["memory"] = "Peak memory"
    if results.get("training", {}).get("rows"):
        plots.plot_training(results["training"], about(results["training"]), folder / "training.png")
        pictures["training"] = "Loss against time and tokens, and held-out accuracy against time"
    rooflines = {"roofline": measured_points(ops)} if ops else {}
    if not any("capability" in facts_of(result) for result in results.values()):
        # no GPU's own: the kernels as counted
        rooflines["floors"] = counted_points()
    for name, (points, ceilings, title) in rooflines.items():
        if points:
            plots.plot_roofline(points, ceilings, title, folder / f"{name}.png")
            pictures[name] = f"Roofline: {title}"
    if len(history) > 1:
        plots.plot_history(history, next(filter(None, map(about, results.values())), ""), folder / "history.png")
        pictures["history"] = "The ratios of every run"
    return pictures


# ---------------------------------------------------------------------------------------------------------------------
# the figures of the project's README


# the folder of results that they come from
FEATURED = RESULTS / "cpu-amd-epyc-2-cores"


def _from(file, module, function):
    """What `function` of a benchmark's module, or of this one, says of a file of results."""

    def text():
        result = json.loads((FEATURED / f"{file}.json").read_text(encoding="utf-8"))
        return (globals()[function] if module is None else getattr(importlib.import_module(module), function))(result)

    return text


def _about(file):
    """Device, versions, date, rounds and the command, as far as the file has them."""

    def text(result):
        counts = [len(times) for row in rows_of(result) for times in row["seconds"].values() if times]
        few, many = min(counts, default=0), max(counts, default=0)
        medians = f", medians of {few if few == many else f'{few} to {many}'} rounds" if counts else ""
        return f"{about(result)}{medians}, by `{command_of(result)}`"

    return lambda: text(json.loads((FEATURED / f"{file}.json").read_text(encoding="utf-8")))


# name -> function that gives what stands in the README between the marks of that name
FIGURES = {
    "training_step": _from("training_step", "bench_training_step", "markdown"),
    "training_step_span": _from("training_step", None, "span_line"),
    "training_step_about": _about("training_step"),
    "families": _from("families", "bench_families", "markdown"),
    "families_about": _about("families"),
    "sentences": _from("families", "bench_families", "sentences_line"),
    "single": _from("families", "bench_families", "single_line"),
    "demo": _from("demo", None, "demo_line"),
    "models": _from("models", None, "models_summary"),
    "models_span": _from("models", None, "span_line"),
    "models_about": _about("models"),
    "ops_span": _from("ops", None, "span_line"),
    "training": _from("training", None, "training_table"),
    "training_about": _about("training"),
    "data": _from("data", None, "data_line"),
}
BLOCK = re.compile(r"(<!-- figures: (\w+) -->\n?)(.*?)(\n?<!-- end -->)", re.DOTALL)


def with_figures(text):
    """The README `text` with the figures of the FEATURED results, and links to them.

    Raises ValueError for an unknown name of a figure.
    """

    def filled(match):
        if match[2] not in FIGURES:
            raise ValueError(f"README.md has figures of {match[2]!r}: expected one of {', '.join(FIGURES)}")
        return match[1] + FIGURES[match[2]]() + match[4]

    return re.sub(r"(?<=\(benchmarks/results/)cpu-[^/)]+", FEATURED.name, BLOCK.sub(filled, text))


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--device", help="a folder of benchmarks/results, or any folder; default: all that hold results"
    )
    parser.add_argument("--readme", action="store_true", help="write the figures of README.md too")
    options = parser.parse_args(arguments)
    folders = [place for place in sorted(RESULTS.iterdir()) if place.is_dir() and place.name != "rehearsal"]
    if options.device:
        folders = [RESULTS / options.device if (RESULTS / options.device).is_dir() else Path(options.device)]
        if not list(folders[0].glob("*.json")):
            known = ", ".join(place.name for place in sorted(RESULTS.iterdir()) if place.is_dir())
            parser.error(f"--device is {options.device!r}: no such results, expected one of {known}, or a folder")
    for place in folders:
        for file in write(place):
            print(file.relative_to(ROOT) if file.is_relative_to(ROOT) else file)
    if not importlib.util.find_spec("matplotlib"):
        print("without plots: matplotlib is not installed")
    if options.readme:
        readme = ROOT / "README.md"
        readme.write_text(with_figures(readme.read_text(encoding="utf-8")), encoding="utf-8")
        print("README.md")


if __name__ == "__main__":
    main()
