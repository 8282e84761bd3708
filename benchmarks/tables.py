"""The tables and sentences of a page of results, and those of the project's README: text made of files of results.

report.py puts them together; record.py says what form a file of results has.
"""

import itertools
import statistics

import rounds
from record import below_one, best_ratios, is_ours, name_of, ours_of, ratio, rows_of

OURS = ("swapped", "fastbert", "fastbert on MKL")
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
            times = figures["times_fastbert"]
            against = "" if name == "fastbert" else f"{times:.2f}x" if is_ours(name) else times_of(times)
            median = duration(figures["median_s"]) + spread(row["seconds"][name])
            rates = (f"{figures[x]:,}" for x in ("real_tokens_per_s", "padded_tokens_per_s"))
            worth = f"{figures['tflop_per_s']:.3g}", f"{figures['mfu']:.0%}", figures.get("peak_gib", "")
            lines.append((names, shape, name, median, *rates, *worth, against))
            names = shape = ""
    head = ("model, pass", "batch", "library", "median", "real tokens/s", "padded tokens/s", "TFLOP/s", "MFU", "GiB",
            "of fastbert's time")  # fmt: skip
    return table(head, lines)


def models_summary(result):
    """models.json in a few lines: against the fastest of transformers' ways at each place, by pass and dtype."""
    lines = []
    for row in result["rows"]:
        others = {x: f for x, f in row["summary"].items() if not is_ours(x)}
        if row["sweep"] != "fill" or not others:
            continue
        best = min(others, key=lambda name: others[name]["times_fastbert"])
        ours, swapped = row["summary"]["fastbert"], row["summary"].get("swapped")
        times = others[best]["times_fastbert"]
        of_swapped = f"{times / swapped['times_fastbert']:.2f}x" if swapped else ""
        names = f"{row['model']}, {row['pass']}, {row['dtype']}", f"{row['fill']:.0%}"
        fastest = f"{best.removeprefix('transformers ')}: {duration(others[best]['median_s'])}"
        rate = f"{ours['real_tokens_per_s']:,}"
        lines.append((*names, fastest, duration(ours["median_s"]), rate, times_of(times), of_swapped))
    head = ("model", "fill", "transformers' fastest", "fastbert", "real tokens/s", "speed", "swapped")
    return table(head, lines)


def training_table(result):
    """training.json: what each run reached, and when."""
    lines = []
    ours = next(row for row in result["rows"] if row["implementation"] == "fastbert")
    for row in result["rows"]:
        last, reached, against = row["held_out"][-1], row["seconds_to_accuracy"], ""
        if row is not ours and reached and ours["seconds_to_accuracy"]:
            against = times_of(reached / ours["seconds_to_accuracy"])
        run = row["implementation"], f"{row['steps']:,}", f"{row['tokens']:,}", f"{row['training_seconds']:.0f} s"
        ended = f"{row['tokens_per_s']:,}", f"{last['loss']:.3f}", f"{last['accuracy']:.1%}"
        lines.append((*run, *ended, "not reached" if reached is None else f"{reached:.0f} s", against))
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
        worth = (figures.get(x, "") for x in ("gb_per_s", "tflop_per_s", "percent_of_ceiling"))
        fastest = (best, times_of(others[best])) if best else ("none here", "")
        lines.append((row["case"], duration(statistics.median(ours)) + spread(ours), *worth, *fastest))
    head = ("op, forward and backward", "fastbert", "GB/s", "TFLOP/s", "% of ceiling", "fastest other", "its time")
    return table(head, lines)


def latency_table(result):
    """The batch sweep in two figures: how long one text takes, and how much text in a second the best batch makes."""
    lines = []
    rows = [row for row in result["rows"] if row["sweep"] == "batch"]
    for (model, dtype), found in itertools.groupby(rows, key=lambda row: (row["model"], row["dtype"])):
        found = list(found)
        for name in found[-1]["summary"]:
            have = [(row["sequences"], row["summary"][name]) for row in found if name in row["summary"]]
            alone = next((duration(figures["median_s"]) for sequences, figures in have if sequences == 1), "")
            sequences, most = max(have, key=lambda pair: pair[1]["real_tokens_per_s"] * (pair[0] > 1))
            rates = f"{most['real_tokens_per_s']:,}", f"{sequences / most['median_s']:,.1f}"
            lines.append((f"{model}, {dtype}", name, alone, *rates, sequences))
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
    lines = {}
    for row in rows:
        kind = f"{row['model']} ({row['layers']} layers)", f"{PASSES[row['pass']]}, {row['dtype']}"
        cells = lines.setdefault(kind, dict.fromkeys(places, ""))
        others = [f["times_fastbert"] for name, f in row["summary"].items() if not is_ours(name)]
        if others:
            cells[round(row[key], 1)] = times_of(min(others))
    lines = [(*kind, *cells.values()) for kind, cells in lines.items()]
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


def is_of_processes(result):
    """Whether a training_step.json has the peak memory of processes, as on a CPU."""
    return any("peak_memory_mib" in figures for row in result["rows"] for figures in row["summary"].values())


def matrix_table(result):
    """inference_matrix.json: ours against the fastest other library in each cell, with the 95 % interval."""
    lines = []
    for row in result["rows"]:
        cells = []
        for name in ("fastbert", "swapped"):
            cell = row["cells"].get(name)
            interval = "" if cell is None else "{:.2f} to {:.2f}".format(*cell["interval"])
            cells += ["", ""] if cell is None else [times_of(cell["ratio"]), interval + ", fails" * cell["fails"]]
        best = next(iter(row["cells"].values()))["best"]
        ours = duration(statistics.median(row["seconds"][ours_of(row["seconds"])]))
        lines.append((row["name"], f"{best}: {duration(row['summary'][best]['median_s'])}", ours, *cells))
    head = ("cell", "fastest other", "fastbert", "speed", "95 % interval", "swapped", "95 % interval")
    return table(head, lines)


def failing(result):
    """Lines on the cells of a matrix that fail: the interval of the ratio to the fastest other lies below 1."""
    return [
        f"{row['name']}, {name}: {below_one(cell['ratio'])} of {cell['best']}'s speed, "
        "95 % interval {:.2f} to {:.2f}".format(*cell["interval"])
        for row in result["rows"] for name, cell in row["cells"].items() if cell["fails"]
    ]  # fmt: skip


def step_table(result):
    """training_step.json: on a CPU with the memory of the processes, on a GPU as any model's rows."""
    if not is_of_processes(result):
        return models_table(result["rows"])
    lines = []
    for row in result["rows"]:
        theirs, ours = (row["summary"][library] for library in ("transformers", "fastbert"))
        on_mkl = ratio(row["seconds"]["transformers"], row["seconds"]["fastbert on MKL"])
        medians = f"{theirs['median_s']:.2f} s", f"{ours['median_s']:.2f} s"
        memory = f"{theirs['peak_memory_mib']} -> {ours['peak_memory_mib']} MiB"
        lines.append((row["case"], *medians, f"**{theirs['times_fastbert']:.2f}x**", f"{on_mkl:.2f}x", memory))
    return table(("batch", "transformers", "fastbert", "speed", "the same on MKL", "peak memory"), lines)


def speeds(result):
    """Of each family and pass, {"family", "pass", "speedup": {ours: how many times as fast as transformers}}."""
    return [
        {
            "family": row["family"], "pass": row["pass"],
            "speedup": {name: ratio(row["seconds"]["transformers"], row["seconds"][name]) for name in OURS},
        }
        for row in result["rows"] if "family" in row
    ]  # fmt: skip


def families_table(result):
    """families.json: every family's two passes in a line."""
    head = ["| family | training step | | swapped | on MKL | inference | | swapped | on MKL |", f"|{'---|' * 9}"]
    lines = {}
    # both passes of a family follow each other
    for row, speed in zip((row for row in result["rows"] if "family" in row), speeds(result)):
        times, medians = speed["speedup"], (1000 * row["summary"][x]["median_s"] for x in ("transformers", "fastbert"))
        cells = lines.setdefault(row["family"], [row["family"]])
        cells += ["{:.0f} -> {:.0f} ms".format(*medians), f"**{times['fastbert']:.2f}x**"]
        cells += [f"{times[name]:.2f}x" for name in ("swapped", "fastbert on MKL")]
    return "\n".join(head + [f"| {' | '.join(cells)} |" for cells in lines.values()])


def sentences_line(result):
    """What `encode` does, in a sentence; empty where it was not measured."""
    row = next((row for row in result["rows"] if "texts" in row), None)
    if row is None:
        return ""
    seconds = row["seconds"]
    peer = "sentence-transformers" if "sentence-transformers" in seconds else "transformers"
    known = f"{peer} {row['sentence_transformers']}" if peer in seconds else f"{peer} with the pooling written out"
    ours, theirs = (row["texts"] / row["summary"][name]["median_s"] for name in ("fastbert", peer))
    times = {name: ratio(seconds[peer], seconds[name]) for name in OURS if name in seconds}
    swapped = f"; {peer}'s own model, swapped: **{times['swapped']:.2f}x**" if "swapped" in times else ""
    return (
        f"all-MiniLM-L6-v2 embeds {row['texts']} verses ({row['tokens_real']} tokens) at {ours:.0f} a second, {known} "
        f"at {theirs:.0f}: **{times['fastbert']:.2f}x** ({times['fastbert on MKL']:.2f}x on MKL){swapped}"
    )


def single_line(result):
    """What the swap does to one short text, in a sentence."""
    row = next(row for row in result["rows"] if row["seconds"].keys() == {"transformers", "swapped"})
    before, after = (1000 * row["summary"][name]["median_s"] for name in ("transformers", "swapped"))
    times = row["summary"]["transformers"]["times_fastbert"]
    return f"{row['name']}: {before:.1f} -> {after:.1f} ms swapped, {times:.2f}x"


def data_line(result):
    """The data path in one number and its ratio."""
    row = next(row for row in result["rows"] if row["name"].startswith("loader"))
    return (
        f"The loader makes {row['tokens_per_s']:,} masked, packed tokens a second, **{row['ratio']:.0f} times** what "
        f"{row['against']} eats ({row['against_tokens_per_s']:,})."
    )


def dtypes_table(result):
    """dtypes.json: what bf16 and int8 cost, and how many times as fast as fp32 they are; "" where not faster here."""
    head = ["dtype", "smallest cosine to fp32", "mean", "Spearman with the labels"]
    lines = []
    for dtype, cost in result["settings"]["costs"].items():
        cells = [dtype, *(f"{cost[name]:.4f}" for name in ("smallest_cosine", "mean_cosine", "spearman"))]
        for row in result["rows"]:
            times = row["seconds"].get("fastbert" if dtype == "fp32" else f"fastbert {dtype}")
            cells.append(f"{1 / ratio(times, row['seconds']['fastbert']):.2f}x" if times else "")
        lines.append(cells)
    return table([*head, *(row["name"] for row in result["rows"])], lines)


def span_line(result):
    """The worst and the best ratio of a file to the fastest of the others, row by row, and how many are losses."""
    fastest = best_ratios({"": result})
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


def finetune_tables(result):
    """finetune.json: a table of transformers against fastbert, a line for each task, and one of where a run starts."""
    by_task, starts = {}, []
    for row in result["rows"]:
        cells = by_task.setdefault(row["case"], dict.fromkeys(("losses", "time", "memory"), "not measured"))
        if row["part"] == "losses":
            cells["losses"] = f"{row['largest_difference']:.1g}"
        elif row["part"] == "time":
            theirs, ours = (row["summary"][library] for library in ("transformers", "fastbert"))
            cells["time"] = f"**{theirs['times_fastbert']:.2f}x**{spread(row['seconds']['fastbert'])}"
            cells["memory"] = f"{theirs['peak_memory_mib']} -> {ours['peak_memory_mib']} MiB"
        elif row["part"] == "start":
            score = f"{row['metric']} {row['scores']['fastbert'][row['metric']]:.3f}"
            starts.append((row["case"], row["model"], row["how"], score))
    known, lines = result["settings"]["difference"], []
    for task, cells in by_task.items():
        scores = "not measured"
        if task in known:
            found = known[task]
            low, high = found["interval"]
            scores = f"{found['mean']:+.4f} [{low:+.4f}, {high:+.4f}], {found['pairs']} pairs, {found['metric']}"
        lines.append((task, cells["losses"], cells["time"], cells["memory"], scores))
    head = ("task", "losses apart, at most", "speed", "peak memory", "score less transformers'")
    tables = [table(head, lines)]
    return tables + ["", table(("task", "model", "begins with", "held out"), starts)] if starts else tables
