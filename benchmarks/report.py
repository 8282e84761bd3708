"""The results of a device as one page, with plots; and the figures of the project's README, from the same results.

    python benchmarks/report.py                          every folder of benchmarks/results that holds results
    python benchmarks/report.py --device cpu             one of them
    python benchmarks/report.py --readme                 the README's figures too

It reads benchmarks/results/<device>/*.json and writes README.md and plots beside them. It times nothing, so what it
writes follows from the committed results alone. A file of results is

    {"machine": {...}, "date": "2026-11-23", "command": "python ...", "settings": {...},
     "rows": [{names and sizes, "seconds": {implementation: [one for each round]}, "summary": {...}}],
     "not_measured": {implementation: why}}

and the files older than this form (training_step, families, demo, disentangled_attention) are read as they are. Ratios
are medians, over rounds, of another's time over fastbert's: below 1 fastbert is slower, and the page says so. Each run
with other ratios than the last adds a line to history.jsonl, from which the history is drawn.

In README.md what stands between <!-- figures: NAME --> and <!-- end --> is written by --readme: see `FIGURES`.
"""

import argparse
import datetime
import importlib
import itertools
import json
import re
import shlex
import statistics
import sys
import textwrap
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
for place in (str(ROOT / "benchmarks"), str(ROOT)):
    if place not in sys.path:
        sys.path.insert(0, place)

import machine  # noqa: E402

# ours in blue, others in greys and in Okabe and Ito's colours, told apart with every kind of colour vision
OURS, OURS_TOO, SWAPPED = "#2563eb", "#93c5fd", "#009E73"
OTHERS = ("#9aa5b1", "#52606d", "#E69F00", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442")


# ---------------------------------------------------------------------------------------------------------------------
# the form of a result


def device(name="auto"):
    """The torch.device that a benchmark runs on. Raises ValueError where there is no such device."""
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device is cuda: PyTorch finds no GPU here")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def new(device, settings):
    """A result without rows: the machine as it is now, the date, and the command that runs."""
    return {
        "machine": machine.describe(device), "date": datetime.date.today().isoformat(), "command": _command(),
        "settings": settings, "rows": [], "not_measured": {},
    }  # fmt: skip


def _command():
    """The command that runs, as one types it in the repository."""
    script = Path(sys.argv[0]).resolve()
    if not script.is_relative_to(ROOT / "benchmarks"):
        return shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
    return shlex.join(["python", str(script.relative_to(ROOT)), *sys.argv[1:]])


def save(result, file):
    """Write a result, its raw numbers in one line each, so that the file can be read and compared."""
    file.parent.mkdir(parents=True, exist_ok=True)
    text = re.sub(r"\[\s+([-\d.,e\s]+?)\s+\]", lambda m: f"[{' '.join(m[1].split())}]", json.dumps(result, indent=1))
    temporary = file.with_suffix(".tmp")
    temporary.write_text(text + "\n", encoding="utf-8")
    temporary.replace(file)


def read(folder):
    """{name: result} of the JSON files in a folder."""
    return {file.stem: json.loads(file.read_text(encoding="utf-8")) for file in sorted(folder.glob("*.json"))}


# ---------------------------------------------------------------------------------------------------------------------
# what is compared, whatever the form of the file


def comparisons(results):
    """(name, {implementation: [seconds]}) of everything that was timed side by side with fastbert, in any form."""
    for file, result in results.items():
        if file == "disentangled_attention":
            for row in result["rows"]:
                pass_ = "forward and backward" if row["backward"] else "forward"
                name = f"DeBERTa's attention, {row['length']} tokens, {row['fill']:.0%} fill, {pass_}"
                yield name, {x: [row[x] / 1e3] for x in ("fastbert", "transformers")}
        elif file == "families" and "families" in result:
            for row in result["families"]:
                for pass_ in ("train", "inference"):
                    yield f"{row['family']}, {result['layers']} layers, {pass_}", row[pass_]["seconds"]
            if result.get("sentences"):
                yield f"{result['sentences']['texts']} sentences embedded", result["sentences"]["seconds"]
        elif file == "training_step":
            for case in result["cases"]:
                libraries = {
                    name: value for name, value in case.items() if isinstance(value, dict) and name != "failed"
                }
                seconds = {x: v.get("seconds") or [v["median_ms"] / 1e3] for x, v in libraries.items()}
                yield f"BERT-base training step, {case['case']}", seconds
        elif file == "ops" and result["rows"] and "variant" in result["rows"][0]:
            for name, rows in itertools.groupby(result["rows"], key=lambda row: row["case"]):
                yield name, {row["variant"]: [row["both_us"] / 1e6] for row in rows}
        elif isinstance(result.get("rows"), list):
            for row in result["rows"]:
                if isinstance(row.get("seconds"), dict) and ours_of(row["seconds"]):
                    yield name_of(row), row["seconds"]


def ours_of(seconds):
    """The name of fastbert's own implementation among those of a row; None where it has none."""
    return next((name for name in seconds if name == "fastbert" or name.startswith("fastbert ")), None)


def is_ours(name):
    return name.startswith("fastbert") or name.endswith("swapped")


def name_of(row):
    """What a row of the common form measures, in words."""
    for key in ("name", "case"):
        if isinstance(row.get(key), str):
            parts = [row[key]] + ([row["pass"]] if "pass" in row and row["pass"] not in row[key] else [])
            return " ".join(parts)
    if "sweep" in row:
        shape = f"{row['sequences']} x {row['length']}, {row['fill']:.0%} fill"
        share = f", {row['picked_share']:.0%} picked" if row.get("picked_share") is not None else ""
        return f"{row['model']} ({row['layers']} layers) {row['pass']}, {shape}{share}, {row['dtype']}"
    left_out = ("seconds", "summary")
    return ", ".join(str(value) for key, value in row.items() if key not in left_out and isinstance(value, str | int))


def ratio(times, ours):
    """The median, over rounds, of another's time over fastbert's."""
    if len(times) == len(ours):
        return statistics.median(a / b for a, b in zip(times, ours))
    return statistics.median(times) / statistics.median(ours)


def ratios(results):
    """{name: {implementation: times fastbert's time}} of `comparisons`."""
    found = {}
    for name, seconds in comparisons(results):
        ours = ours_of(seconds)
        found[name] = {x: round(ratio(t, seconds[ours]), 3) for x, t in seconds.items() if x != ours and t}
    return found


def losses(results):
    """Lines on every row where an implementation that is not fastbert's is faster than it."""
    found = []
    for name, others in ratios(results).items():
        faster = sorted((times, other) for other, times in others.items() if times < 1 and not is_ours(other))
        if faster:
            rest = f"; faster too: {'; '.join(other for _, other in faster[1:])}" if faster[1:] else ""
            found.append(f"{name}: {faster[0][1]} takes {faster[0][0]:.2f}x of fastbert's time{rest}")
    return found


def not_measured(results):
    """{implementation: why not} over all files."""
    found = {}
    for result in results.values():
        if isinstance(result, dict):
            found |= result.get("not_measured") or {}
            for case, refused in (result.get("refused") or {}).items():
                for name, reason in refused.items():
                    found.setdefault(f"{name} ({case.split(' ')[0]})", reason)
    return found


# ---------------------------------------------------------------------------------------------------------------------
# tables


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
    return f"**{value:.2f}x**" if value >= 1 else f"{value:.2f}x, a loss"


def spread(seconds):
    if len(seconds) < 2:
        return ""
    low, median, high = statistics.quantiles(seconds, n=4, method="inclusive")
    return f" ±{50 * (high - low) / median:.0f} %"


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


def generic_table(result):
    """Any file of the common form: a line for each row, the median of each implementation, and of fastbert's time."""
    lines = []
    for row in result["rows"]:
        seconds = row.get("seconds")
        if not isinstance(seconds, dict) or not seconds:
            continue
        ours, name = ours_of(seconds), name_of(row)
        for implementation, times in seconds.items():
            if not times:
                continue
            against = "" if ours in (None, implementation) else times_of(ratio(times, seconds[ours]))
            lines.append((name, implementation, duration(statistics.median(times)) + spread(times), against))
            name = ""
    return table(("what", "implementation", "median", "of fastbert's time"), lines)


# ---------------------------------------------------------------------------------------------------------------------
# plots


def _figure(columns, lines=1, size=(5.2, 3.9), **settings):
    """(figure, axes as a flat list)."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(
        lines, columns, figsize=(size[0] * columns, size[1] * lines), layout="constrained", squeeze=False, **settings
    )
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=8)
    return figure, list(axes.flat)


def _save(figure, path, title):
    import matplotlib.pyplot as plt

    # so many letters of this size go into a line
    title = textwrap.fill(title, int(14 * figure.get_figwidth()))
    figure.suptitle(title, fontsize=8, color="#52606d")
    # no date and no version in the file: the same results give the same picture
    figure.savefig(path, dpi=130, metadata={"Software": None})
    plt.close(figure)


def _colours(names):
    """{implementation: colour}, the same in every plot."""
    fixed = {
        "fastbert": OURS, "fastbert, packed": "#1e3a8a", "fastbert on MKL": OURS_TOO, "swapped": SWAPPED,
        "transformers, swapped": SWAPPED, "sentence-transformers, swapped": SWAPPED, "transformers sdpa": OTHERS[0],
        "transformers": OTHERS[0], "transformers + Trainer": OTHERS[0], "transformers eager": OTHERS[2],
        "transformers compiled": OTHERS[1], "transformers flash_attention_2": OTHERS[3],
        "sentence-transformers": OTHERS[1],
    }  # fmt: skip
    rest = itertools.cycle(OTHERS[3:])
    return {name: fixed.get(name) or next(rest) for name in names}


def _facts(result):
    """What a result says of its machine, wherever its form keeps that."""
    return next((x for x in (result.get("machine"), result.get("about")) if isinstance(x, dict)), result)


def about(result, dated=True):
    """The device, versions and date behind a result, in a line."""
    facts = _facts(result)
    if isinstance(facts.get("machine"), str):
        where = facts["machine"]
    elif "threads" in facts:
        where = f"{facts.get('device') or facts.get('cpu')}, {facts['threads']} thread{'s' * (facts['threads'] > 1)}"
    else:
        where = facts.get("device", "")
    known = [f"{name} {facts[name]}" for name in ("fastbert", "torch", "triton", "transformers") if facts.get(name)]
    return ", ".join([where, *known, *([result["date"]] if dated and result.get("date") else [])])


def plot_speed(results, path):
    """Bars: how many times fastbert's time the others take, row by row, at 60 % fill and without padding."""
    rows = [row for row in results["models"]["rows"] if row["sweep"] in ("fill", "families")]
    rows = [row for row in rows if row["sweep"] == "families" or row["fill"] == 1 or 0.55 < row["fill"] < 0.75]
    panels = [("inference", "inference"), ("train", "training step")]
    panels = [(key, title) for key, title in panels if any(row["pass"] == key for row in rows)]
    longest = max(sum(row["pass"] == key for row in rows) for key, _ in panels)
    figure, axes = _figure(len(panels), size=(6.4, 0.55 * longest + 1.4))
    names = list(dict.fromkeys(name for row in rows for name in row["summary"] if name != "fastbert"))
    colours = _colours(names)
    for axis, (key, title) in zip(axes, panels):
        shown = [row for row in rows if row["pass"] == key][::-1]
        ticks, height = [], 0.0
        for row in shown:
            present = [name for name in names if name in row["summary"]][::-1]
            start = height
            for name in present:
                value = row["summary"][name]["times_fastbert"]
                axis.barh(height, value, 0.9, color=colours[name])
                axis.text(value, height, f" {value:.2f}", va="center", fontsize=6.5)
                height += 1
            ticks.append((start + height - 1) / 2)
            height += 0.8
        labels = [
            f"{row['model']}, {row['layers']} layers\n{row['sequences']} x {row['length']}, {row['fill']:.0%} fill, "
            f"{row['dtype'].replace('bfloat', 'bf')}"
            .replace("float32", "fp32")
            for row in shown
        ]  # fmt: skip
        axis.set_yticks(ticks, labels, fontsize=7)
        axis.axvline(1, color=OURS, linewidth=1.8)
        axis.set_xlim(left=0)
        axis.margins(x=0.08, y=0.01)
        axis.set_title(f"{title}: times fastbert's time", loc="left", fontsize=10)
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], color=OURS, linewidth=1.8), *(_patch(colours[name]) for name in names)]
    figure.legend(handles, ["fastbert", *names], loc="outside lower center", ncols=5, frameon=False, fontsize=8)
    _save(figure, path, f"Whole models: a bar beyond the blue line is slower than fastbert. {about(results['models'])}")


def _patch(colour):
    from matplotlib.patches import Patch

    return Patch(color=colour)


def plot_memory(results, path):
    """Bars of peak memory: of a process that trains, and of a call beyond the weights. Whether there was any."""
    panels = {}
    for case in results.get("training_step", {}).get("cases", ()):
        parts = {name: value for name, value in case.items() if isinstance(value, dict) and name != "failed"}
        if any("peak_memory_mib" in part for part in parts.values()):
            values = {name: part["peak_memory_mib"] for name, part in parts.items()}
            panels.setdefault("a process that trains BERT-base, MiB", []).append((case["case"], values))
        else:
            values = {name: part["gib_of_a_step"] for name, part in parts.items() if part.get("gib_of_a_step")}
            panels.setdefault("a step of BERT-base beyond the weights, GiB", []).append((case["case"], values))
    for row in results.get("models", {}).get("rows", ()):
        values = {name: 1024 * figures["peak_gib"] for name, figures in row["summary"].items() if "peak_gib" in figures}
        if row["sweep"] == "fill" and (row["fill"] == 1 or 0.55 < row["fill"] < 0.75) and values:
            kind = {"train": "a training step", "inference": "inference"}[row["pass"]]
            short = row["dtype"].replace("bfloat16", "bf16").replace("float32", "fp32")
            place = f"{row['sequences']} x {row['length']}\n{row['fill']:.0%} fill, {short}"
            panels.setdefault(f"{kind} of {row['model']} beyond the weights, MiB", []).append((place, values))
    panels = {title: groups for title, groups in panels.items() if any(values for _, values in groups)}
    if not panels:
        return False
    bars = max(sum(len(values) for _, values in groups) for groups in panels.values())
    across, down = (1, len(panels)) if bars > 18 else (len(panels), 1)
    figure, axes = _figure(across, down, size=(max(5.2, 0.32 * bars), 3.8))
    names = list(dict.fromkeys(x for groups in panels.values() for _, values in groups for x in values))
    colours, handles = _colours(names), {}
    for axis, (title, groups) in zip(axes, panels.items()):
        here = [name for name in names if any(name in values for _, values in groups)]
        width = 0.84 / len(here)
        for i, name in enumerate(here):
            shown = [(x + width * i, values[name]) for x, (_, values) in enumerate(groups) if name in values]
            bars = axis.bar([x for x, _ in shown], [y for _, y in shown], 0.92 * width, color=colours[name])
            axis.bar_label(bars, fmt="%.1f" if title.endswith("GiB") else "%.0f", fontsize=7)
            handles[name] = _patch(colours[name])
        axis.set_xticks([x + 0.42 - width / 2 for x in range(len(groups))], [name for name, _ in groups], fontsize=8)
        axis.set_title(title, loc="left", fontsize=9)
        axis.margins(y=0.12)
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    _save(figure, path, f"Peak memory, less is better. {about(results.get('models') or results['training_step'])}")
    return True


def plot_scaling(results, path):
    """How cost grows with length, batch and picked share, and how speed does with fill."""
    rows, panels = results["models"]["rows"], []
    for sweep, key, title in (
        ("fill", "fill", "share of the rectangle that is text"), ("length", "length", "tokens in a sequence"),
        ("batch", "sequences", "sequences in a batch"), ("picked", "picked_share", "share of tokens picked"),
    ):  # fmt: skip
        kinds = {}
        for row in rows:
            if row["sweep"] == sweep or (sweep == "picked" and row["sweep"] == "fill" and _like_picked(row, rows)):
                # other sweeps have one length, or have it as their axis
                length = row["length"] if sweep == "fill" else None
                kinds.setdefault((row["model"], row["layers"], row["pass"], row["dtype"], length), []).append(row)
        if sweep == "picked":
            kinds = {kind: found for kind, found in kinds.items() if any(row["sweep"] == "picked" for row in found)}
        panels += [
            (sweep, key, title, kind, found) for kind, found in kinds.items() if len({r[key] for r in found}) > 1
        ]
    if not panels:
        return False
    from matplotlib.ticker import EngFormatter

    columns = min(3, len(panels))
    lines = -(-len(panels) // columns)
    figure, axes = _figure(columns, lines, size=(4.9, 3.5))
    names = list(dict.fromkeys(name for *_, found in panels for row in found for name in row["summary"]))
    colours = _colours(names)
    for axis in axes[len(panels) :]:
        axis.set_axis_off()
    for axis, (sweep, key, title, (model, layers, pass_, dtype, length), found) in zip(axes, panels):
        # length keeps the tokens, so a time for each token; elsewhere the batch itself is what costs
        figure_of = "real_tokens_per_s" if sweep in ("length", "batch", "fill") else "median_s"
        own = {name for row in found if row["sweep"] == sweep for name in row["summary"]}
        for name in names:
            if name not in own:
                continue
            points = sorted((row[key], row["summary"][name][figure_of]) for row in found if name in row["summary"])
            if not points:
                continue
            scale = 1e3 if figure_of == "median_s" else 1
            style = dict(linewidth=2.2 if name.startswith("fastbert") else 1.4, marker="o", markersize=3.5)
            axis.plot([x for x, _ in points], [y * scale for _, y in points], color=colours[name], label=name, **style)
        if key in ("length", "sequences"):
            from matplotlib.ticker import NullLocator

            axis.set_xscale("log", base=2)
            ticks = sorted({row[key] for row in found})
            axis.set_xticks(ticks, [str(x) for x in ticks])
            axis.xaxis.set_minor_locator(NullLocator())
        else:
            from matplotlib.ticker import PercentFormatter

            axis.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        axis.set_ylim(bottom=0)
        axis.set_xlabel(title, fontsize=8)
        unit = "real tokens per second (more is better)" if figure_of != "median_s" else "ms a step (less is better)"
        axis.set_ylabel(unit, fontsize=8)
        axis.grid(axis="y", color="#dddddd", linewidth=0.6)
        kind = {"train": "training step", "inference": "inference"}[pass_]
        short = dtype.replace("bfloat16", "bf16").replace("float32", "fp32")
        of_length = f", S = {length}" if length else ""
        axis.set_title(f"{model} ({layers} layers), {kind}, {short}{of_length}", loc="left", fontsize=9)
        axis.yaxis.set_major_formatter(EngFormatter(sep=""))
    handles = {}
    for axis in axes:
        handles |= dict(zip(*axis.get_legend_handles_labels()[::-1]))
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=len(handles), frameon=False, fontsize=8)
    _save(figure, path, f"How cost grows. {about(results['models'])}")
    return True


def _like_picked(row, rows):
    """Whether a row of the fill sweep belongs to the curve over picked shares too."""
    others = [other for other in rows if other["sweep"] == "picked"]
    keys = ("model", "pass", "dtype", "layers", "sequences", "length", "fill")
    return any(all(row[key] == other[key] for key in keys) for other in others)


def plot_training(result, path):
    """Loss against time and against tokens, and held-out accuracy against time, all runs on one picture."""
    figure, axes = _figure(3, size=(4.7, 3.7))
    colours = _colours([row["implementation"] for row in result["rows"]])
    panels = (
        ("seconds", "training time, seconds", "loss", "loss of picked tokens (nats)"),
        ("tokens", "real tokens read", "loss", "the same against tokens"),
        ("seconds", "training time, seconds", "accuracy", "held-out masked accuracy"),
    )
    for axis, (x, label, y, title) in zip(axes, panels):
        for i, row in enumerate(result["rows"]):
            colour, name = colours[row["implementation"]], row["implementation"]
            points = row["held_out"] if y == "accuracy" else row["curve"]
            # the curves of the middle panel lie on each other: the first is the widest, so that all can be seen
            width = 1.2 + (1.6 * (len(result["rows"]) - 1 - i) if x == "tokens" else 0.6)
            marker = dict(marker="o", markersize=3.5) if y == "accuracy" else {}
            axis.plot(
                [p[x] for p in points], [p[y] for p in points], color=colour, label=name, linewidth=width, **marker
            )
        axis.set_xlabel(label, fontsize=8)
        axis.set_title(title, loc="left", fontsize=9)
        axis.set_xlim(left=0)
        axis.grid(axis="y", color="#dddddd", linewidth=0.6)
    from matplotlib.ticker import EngFormatter, PercentFormatter

    axes[1].xaxis.set_major_formatter(EngFormatter(sep=""))
    axes[2].yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    goal, baseline = result["settings"]["accuracy"], result["rows"][0]["held_out"][-1].get("baseline")
    highest = max([goal, baseline or 0, *(point["accuracy"] for row in result["rows"] for point in row["held_out"])])
    axes[2].set_ylim(0, 1.15 * highest)
    axes[2].axhline(goal, color="#52606d", linewidth=1, linestyle="--")
    if baseline:
        axes[2].axhline(baseline, color="#bbbbbb", linewidth=1, linestyle=":")
        axes[2].text(0, baseline, " always the most frequent token", fontsize=7, va="bottom", color="#777777")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    _save(figure, path, f"The same model, text, masks and order. {about(result)}")


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


def plot_roofline(points, ceilings, title, path):
    """Ops with matrix products under the roof; those without, by the bandwidth that they make of the memory."""
    from matplotlib.ticker import FuncFormatter, NullFormatter

    names = list(dict.fromkeys(point["op"] for point in points))
    palette = dict(zip(names, itertools.cycle((OURS, "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#52606d",
                                               "#8c564b", "#17becf", "#bcbd22"))))  # fmt: skip
    under = [point for point in points if point["useful flops"]]
    rest = [point for point in points if not point["useful flops"]]
    groups = list(dict.fromkeys((point["op"], point["shape"]) for point in rest))[::-1]
    shapes = list(dict.fromkeys((point["op"], point["shape"]) for point in under))
    panels = bool(under) + bool(rest)
    figure, axes = _figure(panels, size=(6.9, max(4.8, 0.42 * len(groups) + 1.2)))
    copy, product = ceilings["copy"], ceilings["product"]
    unit, per = ("T", 1e12) if product > 1e13 else ("G", 1e9)
    if under:
        left = axes[0]
        xs = [point["flops"] / point["bytes"] for point in under]
        ridge = product / copy
        low, high = min(*xs, ridge) / 2, max(*xs, ridge) * 3
        left.plot([low, ridge, high], [low * copy / per, product / per, product / per], color="#333333", zorder=1)
        left.text(high, 1.04 * product / per, f"{product / per:,.3g} {unit}FLOP/s", ha="right", va="bottom", fontsize=8)
        left.text(low, 1.9 * low * copy / per, f"{copy / per:,.3g} {unit}B/s", fontsize=8, va="bottom")
        # too many shapes for a legend: then it names the ops alone
        is_long, named = len(shapes) > 10, set()
        marks = dict(zip(shapes, itertools.cycle("o" if is_long else "osD^vP*X<>")))
        for (op, shape), mark in marks.items():
            two = [point for point in under if (point["op"], point["shape"]) == (op, shape)]
            places = [(p["flops"] / p["bytes"], p["useful flops"] / p["seconds"] / per) for p in two]
            left.plot(*zip(*places), color=palette[op], linewidth=0.8, alpha=0.5, zorder=2)
            for point, (x, y) in zip(two, places):
                ours, label = point["which"] == "fastbert", op if is_long else f"{op}, {shape}"
                left.scatter(
                    x, y, s=52, marker=mark, facecolor=palette[op] if ours else "white", edgecolor=palette[op],
                    linewidth=1.3, zorder=3, label=label if ours and label not in named else None,
                )  # fmt: skip
                named |= {label} if ours else set()
        for scale, axis in ((left.set_xscale, left.xaxis), (left.set_yscale, left.yaxis)):
            scale("log")
            axis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
            axis.set_minor_formatter(NullFormatter())
        left.set_ylim(top=1.8 * product / per)
        left.set_xlabel("FLOPs of matrix products for a byte moved", fontsize=8)
        left.set_ylabel(f"{unit}FLOP/s of the FLOPs that are needed", fontsize=8)
        left.set_title("ops with matrix products, forward and backward", loc="left", fontsize=9)
        left.grid(color="#eeeeee", linewidth=0.6)
    if rest:
        right = axes[-1]
        for y, (op, shape) in enumerate(groups):
            for point in rest:
                if (point["op"], point["shape"]) == (op, shape):
                    ours = point["which"] == "fastbert"
                    right.barh(
                        y + (0.2 if ours else -0.2), point["useful bytes"] / point["seconds"] / per, 0.36,
                        color=palette[op] if ours else "white", edgecolor=palette[op], linewidth=1,
                    )  # fmt: skip
        right.set_yticks(range(len(groups)), [f"{op}\n{shape}" for op, shape in groups], fontsize=7)
        right.axvline(copy / per, color="#333333")
        right.set_xlabel(f"{unit}B/s of the bytes that are needed", fontsize=8)
        right.set_title("ops without: memory alone is the roof", loc="left", fontsize=9)
    handles, labels = axes[0].get_legend_handles_labels() if under else ([], [])
    figure.legend(
        [_patch("#555555"), _outline("#555555"), *handles], ["fastbert", "plain PyTorch", *labels],
        loc="outside lower center", ncols=2 * panels, frameon=False, fontsize=8,
    )  # fmt: skip
    _save(figure, path, f"Roofline: {title}")


def _outline(colour):
    from matplotlib.patches import Patch

    return Patch(facecolor="white", edgecolor=colour)


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
        facts = next((fact for fact in map(_facts, results.values()) if "fastbert" in fact), {})
        named = {name: facts[name] for name in ("fastbert", "torch") if name in facts}
        day = max(dates, default=datetime.date.today().isoformat())
        lines.append({"date": day, **named, "ratios": now})
        file.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return lines


def plot_history(lines, path):
    """Every ratio over the runs that have it, and their geometric mean."""
    figure, (axis,) = _figure(1, size=(8, 4))
    names = {name for line in lines for name in line["ratios"]}
    for name in sorted(names):
        points = [(i, line["ratios"][name]) for i, line in enumerate(lines) if name in line["ratios"]]
        axis.plot([x for x, _ in points], [y for _, y in points], color=OTHERS[0], linewidth=0.8, alpha=0.6)
    in_all = [name for name in names if all(name in line["ratios"] for line in lines)]
    if in_all:
        means = [statistics.geometric_mean(line["ratios"][name] for name in in_all) for line in lines]
        axis.plot(
            means, color=OURS, linewidth=2.5, marker="o", label=f"geometric mean of the {len(in_all)} in all runs"
        )
        axis.legend(frameon=False, fontsize=8)
    axis.axhline(1, color="#333333", linewidth=1)
    axis.set_yscale("log")
    from matplotlib.ticker import NullFormatter, ScalarFormatter

    axis.yaxis.set_major_formatter(ScalarFormatter())
    axis.yaxis.set_minor_formatter(NullFormatter())
    labels = [f"{line['date']}\n{line.get('fastbert', '')}" for line in lines]
    axis.set_xticks(range(len(lines)), labels, fontsize=8)
    axis.set_ylabel("best peer's time over fastbert's", fontsize=8)
    _save(figure, path, "History: above 1 fastbert is faster than every peer")


# ---------------------------------------------------------------------------------------------------------------------
# the page


def page(folder, results, pictures, history):
    """README.md of a device: pictures, tables, losses, what was not measured, and how to get the same."""
    facts = [_facts(result) for result in results.values()]
    device = next((x for fact in facts for x in (fact.get("cpu"), fact.get("device")) if x and x != "cpu"), folder.name)
    lines = [f"# Measured on {device}", ""]
    lines += [
        "Written by `python benchmarks/report.py` from the JSON files beside it, which hold the raw seconds. Libraries",
        "took turns in one process, after their results were compared. Ratios are medians, over rounds, of another's",
        "time over fastbert's: above 1 fastbert is faster. ± is half of the distance between the quartiles.", "",
    ]  # fmt: skip
    what = []
    for name, result in results.items():
        if isinstance(result, dict):
            command = result.get("command") or OLD_COMMANDS.get(name)
            command = f"`{command}`" if command else ""
            what.append((f"[{name}.json]({name}.json)", result.get("date", ""), about(result, dated=False), command))
    lines += [table(("results", "date", "device and versions", "command"), what), ""]
    lost = losses(results)
    lines += ["## Losses", ""]
    lines += [f"- {line}" for line in lost] if lost else ["None: nothing that was timed here is faster than fastbert."]
    lines += [""]
    sections = (
        ("training_step", "A training step of BERT-base"), ("families", "Every family"), ("models", "Whole models"),
        ("training", "Training, side by side"), ("data", "The data path"), ("ops", "Ops"),
        ("disentangled_attention", "DeBERTa's attention"), ("demo", "The demo"),
    )  # fmt: skip
    for name, title in sections:
        if name in results:
            lines += [f"## {title}", "", *section(name, results[name], pictures), ""]
    for name, result in results.items():
        known = [section_name for section_name, _ in sections]
        if name not in known and isinstance(result, dict) and _has_seconds(result):
            lines += [f"## {name}", "", generic_table(result), ""]
    for picture, title in (("memory", "Memory"), ("roofline", "Roofline"), ("floors", "Floors of the kernels")):
        if picture in pictures:
            lines += [f"## {title}", "", f"![{pictures[picture]}]({picture}.png)", ""]
    if "history" in pictures:
        lines += ["## History", "", f"![{pictures['history']}](history.png)", ""]
    elif history:
        lines += ["## History", "", "One run so far: [history.jsonl](history.jsonl).", ""]
    missing = not_measured(results)
    if missing:
        lines += ["## Not measured", "", table(("what", "why"), [(a, b.replace("|", "/")) for a, b in missing.items()])]
    return "\n".join(lines).rstrip() + "\n"


OLD_COMMANDS = {
    "training_step": "python benchmarks/bench_training_step.py", "families": "python benchmarks/bench_families.py",
    "disentangled_attention": "python benchmarks/bench_disentangled_attention.py", "demo": "make demo",
    "machine": "python benchmarks/machine.py",
}  # fmt: skip


def _has_seconds(result):
    rows = result.get("rows")
    return isinstance(rows, list) and any(isinstance(row.get("seconds"), dict) for row in rows)


def section(name, result, pictures):
    """The lines of one file's section."""
    if name == "training_step" and "cpu" in result:
        import bench_training_step as bench

        return [bench.markdown(result), "", bench.describe(result) + ".", "", "![Speed and memory](training_step.png)"]
    if name == "training_step":
        import bench_training_step_gpu as bench

        return [bench.markdown(result).partition("\n\n")[2].strip()]
    if name == "families":
        import bench_families as bench

        lines = [bench.markdown(result), "", bench.describe(result) + "."]
        lines += ["", bench.sentences_line(result) + "."] if result.get("sentences") else []
        return [*lines, "", "![Every family](families.png)"]
    if name == "models":
        shown = [f"![{pictures[x]}]({x}.png)\n" for x in ("speed", "scaling") if x in pictures]
        settings = result["settings"]
        rates = ", ".join(f"{dtype} {rate / 1e12:.3g}" for dtype, rate in settings["product_flops_per_s"].items())
        lines = [*shown, f"{about(result)}. MFU is of the measured matrix product, TFLOP/s: {rates}. FLOPs, counted on"]
        lines += [f"real tokens: {settings['flops']}.", ""]
        for sweep, rows in itertools.groupby(result["rows"], key=lambda row: row["sweep"]):
            rows = list(rows)
            lines += [
                f"<details><summary>{sweep}: {len(rows)} rows</summary>",
                "",
                models_table(rows),
                "",
                "</details>",
            ]
        if settings.get("left_out"):
            lines += ["", f"Left out for want of time: {'; '.join(settings['left_out'])}."]
        return lines
    if name == "training":
        lines = [f"![{pictures['training']}](training.png)\n"] if "training" in pictures else []
        return [*lines, training_table(result), "", f"{result['settings']['what']}. {about(result)}."]
    if name == "data":
        return [data_line(result), "", data_table(result), "", f"{about(result)}."]
    if name == "ops" and result["rows"] and "variant" in result["rows"][0]:
        import bench_ops as bench

        return [bench.markdown(result).partition("\n\n")[2].replace("\n## ", "\n### ").strip()]
    if name == "ops":
        return [ops_table(result["rows"]), "", f"{about(result)}. Every variant and pass: [ops.md](ops.md)."]
    if name == "demo":
        return [demo_line(result), "", "![The demo's loss and held-out masked accuracy](demo.png)"]
    if name == "disentangled_attention":
        rows = [
            (row["length"], f"{row['fill']:.0%}", "forward, backward" if row["backward"] else "forward",
             f"{row['transformers']:.1f} -> {row['fastbert']:.1f} ms", times_of(row["transformers"] / row["fastbert"]))
            for row in result["rows"]
        ]  # fmt: skip
        return [table(("length", "fill", "pass", "transformers -> fastbert", "speed"), rows)]
    return [generic_table(result)]


def data_line(result):
    """The data path in one number and its ratio."""
    row = next(row for row in result["rows"] if row["name"].startswith("loader"))
    return (
        f"The loader makes {row['tokens_per_s']:,} masked, packed tokens a second, **{row['ratio']:.0f} times** what "
        f"{row['against']} eats ({row['against_tokens_per_s']:,})."
    )


def demo_line(result):
    """What the demo's model has learned, in a sentence."""
    return (
        f"it gets {result['eval_masked_accuracy']:.1%} of them right; always guessing the most frequent token gets "
        f"{result['eval_baseline_accuracy']:.1%}."
    )


def write(folder):
    """Pictures and page of one folder of results. Returns the files written."""
    results = read(folder)
    if not results:
        return []
    pictures = {}
    models = results.get("models")
    if models and models["rows"]:
        if any(row["sweep"] in ("fill", "families") for row in models["rows"]):
            plot_speed(results, folder / "speed.png")
            pictures["speed"] = "Every model: how many times fastbert's time the others take"
        if plot_scaling(results, folder / "scaling.png"):
            pictures["scaling"] = "How cost grows with fill, length, batch and picked share"
    if plot_memory(results, folder / "memory.png"):
        pictures["memory"] = "Peak memory"
    if results.get("training", {}).get("rows"):
        plot_training(results["training"], folder / "training.png")
        pictures["training"] = "Loss against time and tokens, and held-out accuracy against time"
    rooflines = {"roofline": measured_points(results["ops"])} if "ops" in results else {}
    if not any("capability" in _facts(result) for result in results.values()):
        # no GPU's own: the kernels as counted
        rooflines["floors"] = counted_points()
    for name, (points, ceilings, title) in rooflines.items():
        if points:
            plot_roofline(points, ceilings, title, folder / f"{name}.png")
            pictures[name] = f"Roofline: {title}"
    history = record_history(results, folder / "history.jsonl")
    if len(history) > 1:
        plot_history(history, folder / "history.png")
        pictures["history"] = "The ratios of every run"
    (folder / "README.md").write_text(page(folder, results, pictures, history), encoding="utf-8")
    return [folder / "README.md", *(folder / f"{name}.png" for name in pictures)]


# ---------------------------------------------------------------------------------------------------------------------
# the figures of the project's README


def _from(file, module, function, device="cpu"):
    """What `function` of a benchmark's module, or of this one, says of a file of results."""

    def text():
        result = json.loads((RESULTS / device / f"{file}.json").read_text(encoding="utf-8"))
        return (globals()[function] if module is None else getattr(importlib.import_module(module), function))(result)

    return text


def _about(file, module=None):
    """Device, versions, date, rounds and the command, as far as the file has them."""

    def text(result):
        known = about(result) if module is None else importlib.import_module(module).describe(result)
        dated = f", {result['date']}" if module and result.get("date") else ""
        rounds = result.get("rounds") if module else result["settings"].get("rounds")
        rounds = min(rounds.values()) if isinstance(rounds, dict) else rounds
        medians = f", medians of {rounds} rounds" if rounds else ""
        return f"{known}{dated}{medians}, by `{result.get('command') or OLD_COMMANDS[file]}`"

    return lambda: text(json.loads((RESULTS / "cpu" / f"{file}.json").read_text(encoding="utf-8")))


# name -> function that gives what stands in the README between the marks of that name
FIGURES = {
    "training_step": _from("training_step", "bench_training_step", "markdown"),
    "training_step_about": _about("training_step", "bench_training_step"),
    "families": _from("families", "bench_families", "markdown"),
    "families_about": _about("families", "bench_families"),
    "sentences": _from("families", "bench_families", "sentences_line"),
    "single": _from("families", "bench_families", "single_line"),
    "demo": _from("demo", None, "demo_line"),
    "models": _from("models", None, "models_summary"),
    "models_about": _about("models"),
    "training": _from("training", None, "training_table"),
    "training_about": _about("training"),
    "data": _from("data", None, "data_line"),
}
BLOCK = re.compile(r"(<!-- figures: (\w+) -->\n?)(.*?)(\n?<!-- end -->)", re.DOTALL)


def with_figures(text):
    """The README `text` with its figures as the committed results have them. Raises ValueError for an unknown name."""

    def filled(match):
        if match[2] not in FIGURES:
            raise ValueError(f"README.md has figures of {match[2]!r}: expected one of {', '.join(FIGURES)}")
        return match[1] + FIGURES[match[2]]() + match[4]

    return BLOCK.sub(filled, text)


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
    if options.readme:
        readme = ROOT / "README.md"
        readme.write_text(with_figures(readme.read_text(encoding="utf-8")), encoding="utf-8")
        print("README.md")


if __name__ == "__main__":
    main()
