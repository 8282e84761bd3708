"""The pictures of a page of results; benchmarks/report.py calls these with what it has read.

Each takes what it draws, a caption that says device, versions and date, and the path of the PNG.
"""

import itertools
import textwrap

import record

PASSES = {"inference": "inference", "train": "training step"}
# ours in blue, others in greys and in Okabe and Ito's colours, told apart with every kind of colour vision
OURS, OURS_TOO, SWAPPED = "#2563eb", "#93c5fd", "#009E73"
OTHERS = ("#9aa5b1", "#52606d", "#E69F00", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442")
# of ops, where a filled mark is fastbert and an empty one is not: without the blue that stands for fastbert elsewhere
OF_OPS = ("#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#52606d", "#8c564b", "#17becf", "#bcbd22", "#7F3C8D")


def figure_of(columns, lines=1, size=(5.2, 3.9), **settings):
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


def _labelled(*axes):
    """{label: bar or line} of these axes, each label once."""
    return {label: drawn for axis in axes for drawn, label in zip(*axis.get_legend_handles_labels())}


def save(figure, path, title, handles=None, columns=4):
    """Write the picture. handles: {label: bar or line} of its legend, in so many columns."""
    import matplotlib.pyplot as plt

    if handles:
        place = dict(loc="outside lower center", ncols=columns, frameon=False, fontsize=8)
        figure.legend(handles.values(), handles.keys(), **place)
    # a line of the title has room for this many letters
    title = textwrap.fill(title, int(14 * figure.get_figwidth()))
    figure.suptitle(title, fontsize=8, color="#52606d")
    # without date and version, so that the same results give the same file
    figure.savefig(path, dpi=130, metadata={"Software": None})
    plt.close(figure)


def _log_ticks(axis):
    """Numbers at 1, 2 and 5 of each decade, in full; and the scale named."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    axis.set_minor_formatter(NullFormatter())
    axis.set_label_text(f"{axis.get_label_text()} (log scale)", fontsize=8)


def _colours(names):
    """{implementation: colour}, the same in every plot."""
    fixed = {
        "fastbert": OURS, "fastbert, packed": "#1e3a8a", "fastbert on MKL": OURS_TOO, "transformers sdpa": OTHERS[0],
        "transformers": OTHERS[0], "transformers + Trainer": OTHERS[0], "transformers eager": OTHERS[2],
        "transformers compiled": OTHERS[1], "transformers flash_attention_2": OTHERS[3],
        "sentence-transformers": OTHERS[1],
    }  # fmt: skip
    rest = itertools.cycle(OTHERS[3:])
    return {name: SWAPPED if name.endswith("swapped") else fixed.get(name) or next(rest) for name in names}


def plot_speed(rows, caption, path):
    """Bars: how many times fastbert's time the others take, at 60 % fill and without padding. rows: of models.json."""
    rows = [row for row in rows if row["sweep"] in ("fill", "families") and record.is_usual(row["fill"])]
    panels = {title: [row for row in rows if row["pass"] == key][::-1] for key, title in PASSES.items()}
    panels = {title: shown for title, shown in panels.items() if shown}
    figure, axes = figure_of(len(panels), size=(6.4, 0.55 * max(map(len, panels.values())) + 1.4))
    names = list(dict.fromkeys(name for row in rows for name in row["summary"] if name != "fastbert"))
    colours = _colours(names)
    for axis, (title, shown) in zip(axes, panels.items()):
        ticks, height = [], 0.0
        for row in shown:
            present = [name for name in names if name in row["summary"]][::-1]
            start = height
            for name in present:
                value = row["summary"][name]["times_fastbert"]
                axis.barh(height, value, 0.9, color=colours[name])
                # the blue line would cross the number: write it to the right
                place = 1 if 0.85 < value < 1 else value
                axis.text(place, height, f" {value:.2f}", va="center", fontsize=6.5)
                height += 1
            ticks.append((start + height - 1) / 2)
            height += 0.8
        labels = [
            f"{row['model']}, {row['layers']} layers\n{row['sequences']} x {row['length']}, {row['fill']:.0%} fill, "
            f"{short(row['dtype'])}"
            for row in shown
        ]
        axis.set_yticks(ticks, labels, fontsize=7)
        axis.axvline(1, color=OURS, linewidth=1.8)
        axis.set_xlim(left=0)
        axis.margins(x=0.08, y=0.01)
        axis.set_title(f"{title}: times fastbert's time", loc="left", fontsize=10)
    from matplotlib.lines import Line2D

    handles = {"fastbert": Line2D([], [], color=OURS, linewidth=1.8)} | {name: _patch(colours[name]) for name in names}
    save(figure, path, f"Whole models: a bar beyond the blue line is slower than fastbert. {caption}", handles, 5)


def short(dtype):
    return dtype.replace("bfloat16", "bf16").replace("float32", "fp32")


def _patch(edge, face=None):
    from matplotlib.patches import Patch

    return Patch(edgecolor=edge, facecolor=face or edge)


def plot_memory(panels, caption, path):
    """Bars of peak memory. panels: {title: [(group, {implementation: value})]}; a title ends with the unit."""
    bars = max(sum(len(values) for _, values in groups) for groups in panels.values())
    across, down = (1, len(panels)) if bars > 18 else (len(panels), 1)
    figure, axes = figure_of(across, down, size=(max(5.2, 0.32 * bars), 3.8))
    names = dict.fromkeys(name for groups in panels.values() for _, values in groups for name in values)
    # ours last in each group, as in the tables
    names = sorted(names, key=lambda name: (name.startswith("fastbert"), name.endswith("swapped")))
    colours = _colours(names)
    for axis, (title, groups) in zip(axes, panels.items()):
        width = 0.84 / max(len(values) for _, values in groups)
        middles = []
        for x, (_, values) in enumerate(groups):
            present = [name for name in names if name in values]
            for i, name in enumerate(present):
                bar = axis.bar(x + width * i, values[name], 0.92 * width, color=colours[name])
                axis.bar_label(bar, fmt="%.1f" if title.endswith("GiB") else "%.0f", fontsize=7)
            middles.append(x + width * (len(present) - 1) / 2)
        axis.set_xticks(middles, [name for name, _ in groups], fontsize=8)
        axis.set_title(title, loc="left", fontsize=9)
        axis.set_ylabel(title.rpartition(", ")[2], fontsize=8)
        axis.margins(y=0.12)
    handles = {name: _patch(colours[name]) for name in names}
    save(figure, path, f"Peak memory, less is better. {caption}", handles, min(len(names), 6))


# sweep -> (what its axis shows, the axis's label, what is drawn against it)
SCALING = {
    "fill": ("fill", "share of the rectangle that is text", ("real_tokens_per_s",)),
    "length": ("length", "tokens in a sequence", ("real_tokens_per_s",)),
    # of one sequence the latency counts, of many the throughput
    "batch": ("sequences", "sequences in a batch", ("median_s", "real_tokens_per_s")),
    "picked": ("picked_share", "share of tokens picked", ("median_s",)),
}


def plot_scaling(rows, caption, path):
    """How cost grows with length, batch and picked share, and speed with fill. Whether there was anything to draw."""
    panels = []
    for sweep, (key, _, figures) in SCALING.items():
        kinds = {}
        for row in rows:
            if row["sweep"] == sweep or (sweep == "picked" and row["sweep"] == "fill" and _like_picked(row, rows)):
                # other sweeps have one length, or have it as their axis
                length = row["length"] if sweep == "fill" else None
                kinds.setdefault((row["model"], row["layers"], row["pass"], row["dtype"], length), []).append(row)
        if sweep == "picked":
            kinds = {kind: found for kind, found in kinds.items() if any(row["sweep"] == "picked" for row in found)}
        for kind, found in kinds.items():
            if len({row[key] for row in found}) > 1:
                panels += [(sweep, figure, kind, found) for figure in figures]
    if not panels:
        return False
    columns = min(3, len(panels))
    lines = -(-len(panels) // columns)
    figure, axes = figure_of(columns, lines, size=(4.9, 3.5))
    names = list(dict.fromkeys(name for *_, found in panels for row in found for name in row["summary"]))
    colours = _colours(names)
    for axis in axes[len(panels) :]:
        axis.set_axis_off()
    for axis, (sweep, what, kind, found) in zip(axes, panels):
        own = {name for row in found if row["sweep"] == sweep for name in row["summary"]}
        _curves(axis, sweep, what, found, [name for name in names if name in own], colours)
        model, layers, pass_, dtype, length = kind
        kind = {"median_s": ", latency", "real_tokens_per_s": ", throughput"}[what] if sweep == "batch" else ""
        kind += f", {short(dtype)}" + (f", S = {length}" if length else "")
        axis.set_title(f"{model} ({layers} layers), {PASSES[pass_]}{kind}", loc="left", fontsize=9)
    handles = _labelled(*axes)
    save(figure, path, f"How cost grows. {caption}", handles, len(handles))
    return True


def _curves(axis, sweep, what, rows, names, colours):
    """One panel: a line for each implementation."""
    from matplotlib.ticker import EngFormatter, NullLocator, PercentFormatter

    key, label, _ = SCALING[sweep]
    scale = 1e3 if what == "median_s" else 1
    for name in names:
        points = sorted((row[key], scale * row["summary"][name][what]) for row in rows if name in row["summary"])
        width = 2.2 if name.startswith("fastbert") else 1.4
        axis.plot(*zip(*points), color=colours[name], label=name, linewidth=width, marker="o", markersize=3.5)
    if key in ("length", "sequences"):
        axis.set_xscale("log", base=2)
        ticks = sorted({row[key] for row in rows})
        axis.set_xticks(ticks, [str(x) for x in ticks])
        axis.xaxis.set_minor_locator(NullLocator())
        label += " (log scale)"
    else:
        axis.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axis.set_xlabel(label, fontsize=8)
    axis.set_ylim(bottom=0)
    axis.grid(axis="y", color="#dddddd", linewidth=0.6)
    if what == "median_s":
        axis.set_ylabel(f"ms a {'batch' if sweep == 'batch' else 'step'} (less is better)", fontsize=8)
    else:
        axis.set_ylabel("real tokens per second (more is better)", fontsize=8)
        axis.yaxis.set_major_formatter(EngFormatter(sep=""))


def _like_picked(row, rows):
    """Whether a row of the fill sweep belongs to the curve over picked shares too."""
    keys = ("model", "pass", "dtype", "layers", "sequences", "length", "fill")
    return any(all(row[x] == other[x] for x in keys) for other in rows if other["sweep"] == "picked")


def plot_training(result, caption, path):
    """Loss against time and against tokens, and held-out accuracy against time, all runs on one picture."""
    figure, axes = figure_of(3, size=(4.7, 3.7))
    colours = _colours([row["implementation"] for row in result["rows"]])
    panels = (
        ("seconds", "training time, seconds", "loss", "loss of picked tokens, nats, against time"),
        ("tokens", "real tokens read", "loss", "loss of picked tokens, nats, against tokens"),
        ("seconds", "training time, seconds", "accuracy", "held-out masked accuracy"),
    )
    for axis, (x, label, y, title) in zip(axes, panels):
        for i, row in enumerate(result["rows"]):
            name, points = row["implementation"], row["held_out"] if y == "accuracy" else row["curve"]
            # curves against tokens lie on each other: draw the first one widest
            width = 1.2 + (1.6 * (len(result["rows"]) - 1 - i) if x == "tokens" else 0.6)
            marker = dict(marker="o", markersize=3.5) if y == "accuracy" else {}
            points = zip(*((point[x], point[y]) for point in points))
            axis.plot(*points, color=colours[name], label=name, linewidth=width, **marker)
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
    axes[2].text(0, goal, f" {goal:.0%}, which all reach", fontsize=7, va="bottom", color="#52606d")
    if baseline:
        axes[2].axhline(baseline, color="#bbbbbb", linewidth=1, linestyle=":")
        axes[2].text(0, baseline, " always the most frequent token", fontsize=7, va="bottom", color="#777777")
    save(figure, path, f"The same model, text, masks and order. {caption}", _labelled(axes[0]))


def plot_roofline(points, ceilings, caption, path):
    """Ops with matrix products under the roof; those without, by the bandwidth that they make of the memory."""
    names = list(dict.fromkeys(point["op"] for point in points))
    palette = dict(zip(names, itertools.cycle(OF_OPS)))
    under = [point for point in points if point["useful flops"]]
    rest = [point for point in points if not point["useful flops"]]
    groups = list(dict.fromkeys((point["op"], point["shape"]) for point in rest))[::-1]
    shapes = list(dict.fromkeys((point["op"], point["shape"]) for point in under))
    panels = bool(under) + bool(rest)
    figure, axes = figure_of(panels, size=(6.9, max(4.8, 0.42 * len(groups) + 1.2)))
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
        for op, shape in shapes:
            two = [point for point in under if (point["op"], point["shape"]) == (op, shape)]
            places = [(p["flops"] / p["bytes"], p["useful flops"] / p["seconds"] / per) for p in two]
            left.plot(*zip(*places), color=palette[op], linewidth=0.8, alpha=0.5, zorder=2)
            for point, (x, y) in zip(two, places):
                ours = point["which"] == "fastbert"
                left.scatter(
                    x, y, s=52, facecolor=palette[op] if ours else "white", edgecolor=palette[op], linewidth=1.3,
                    zorder=3, label=op if ours else None,
                )  # fmt: skip
        left.set_xscale("log")
        left.set_yscale("log")
        left.set_ylim(top=1.8 * product / per)
        left.set_xlabel("FLOPs of matrix products for a byte moved")
        left.set_ylabel(f"{unit}FLOP/s of the FLOPs that are needed")
        _log_ticks(left.xaxis)
        _log_ticks(left.yaxis)
        left.set_title("ops with matrix products, forward and backward", loc="left", fontsize=9)
        left.grid(color="#eeeeee", linewidth=0.6)
    if rest:
        right = axes[-1]
        for point in rest:
            ours, colour = point["which"] == "fastbert", palette[point["op"]]
            y = groups.index((point["op"], point["shape"])) + (0.2 if ours else -0.2)
            rate, fill = point["useful bytes"] / point["seconds"] / per, colour if ours else "white"
            right.barh(y, rate, 0.36, color=fill, edgecolor=colour, linewidth=1)
        right.set_yticks(range(len(groups)), [f"{op}\n{shape}" for op, shape in groups], fontsize=7)
        right.axvline(copy / per, color="#333333")
        right.set_xlabel(f"{unit}B/s of the bytes that are needed", fontsize=8)
        right.set_title("ops without: memory alone is the roof", loc="left", fontsize=9)
    handles = {"fastbert": _patch("#555555"), "plain PyTorch": _patch("#555555", "white")} | _labelled(axes[0])
    save(figure, path, f"Roofline: {caption}", handles, 2 * panels)


def plot_matrix(rows, caption, path):
    """Intervals: the fastest other library's time over ours in each cell of inference_matrix.json, a panel a family."""
    kinds = list(dict.fromkeys((row["family"], row["dtype"], row["threads"]) for row in rows))
    figure, axes = figure_of(len(kinds), sharex=True)
    for axis, kind in zip(axes, kinds):
        found = [row for row in rows if (row["family"], row["dtype"], row["threads"]) == kind]
        for place, row in enumerate(found):
            for shift, (name, colour) in zip((-0.15, 0.15), (("fastbert", OURS), ("swapped", SWAPPED))):
                if name in row["cells"]:
                    cell = row["cells"][name]
                    axis.plot(cell["interval"], [place + shift] * 2, color=colour, linewidth=2)
                    axis.plot(cell["ratio"], place + shift, "o", color=colour, markersize=4, label=name)
        axis.axvline(1, color=OTHERS[1], linewidth=1)
        shapes = [f"{row['sequences']} x {row['length']}, {row['fill']:.0%}" for row in found]
        axis.set_yticks(range(len(found)), shapes)
        axis.invert_yaxis()
        axis.set_xscale("log")
        axis.set_xlabel("times our time, above 1 ours is faster", fontsize=8)
        _log_ticks(axis.xaxis)
        axis.set_title(f"{kind[0]}, {short(kind[1])}, {kind[2]} thread{'s' * (kind[2] > 1)}", fontsize=9)
    save(figure, path, caption, _labelled(*axes))


def plot_families(rows, caption, path):
    """Bars for each family: how many times faster fastbert is than transformers. rows: of tables.speeds."""
    figure, axes = figure_of(2, size=(6, 3.8), sharey=True)
    shown = {"fastbert": "fastbert", "swapped": "transformers, swapped", "fastbert on MKL": "fastbert on MKL"}
    for axis, pass_ in zip(axes, ("train", "inference")):
        here = [row for row in rows if row["pass"] == pass_]
        bars = {label: [row["speedup"][name] for row in here] for name, label in shown.items()}
        _bars(axis, [row["family"] for row in here], bars, "%.1f", 6, rotation=35, ha="right")
        axis.axhline(1, color="#333333", linewidth=1)
        axis.set_title(f"{PASSES[pass_]}: times as fast as transformers", loc="left", fontsize=10)
    save(figure, path, f"Every family, base size with fewer layers, 60 % fill. {caption}", _labelled(axes[0]))


def plot_training_step(rows, caption, path):
    """Bars: speed and peak memory of BERT-base's training step. rows: of training_step.json, measured on a CPU."""
    panels = (("real_tokens_per_s", "real tokens per second (more is better)"),
              ("peak_memory_mib", "peak memory of the process, MiB (less is better)"))  # fmt: skip
    figure, axes = figure_of(len(panels), size=(4.7, 3.6))
    for axis, (key, title) in zip(axes, panels):
        bars = {name: [row["summary"][name][key] for row in rows] for name in rows[0]["summary"]}
        _bars(axis, [row["case"] for row in rows], bars, "%.0f", 8)
        axis.set_title(title, loc="left", fontsize=10)
        axis.margins(y=0.12)
    save(figure, path, f"BERT-base's training step. {caption}", _labelled(axes[0]))


def _bars(axis, groups, bars, form, fontsize, **ticks):
    """Bars side by side for each group. bars: {implementation: a value for each group}."""
    colours = _colours(bars)
    for i, (name, values) in enumerate(bars.items()):
        places = [x + 0.29 * i for x in range(len(groups))]
        drawn = axis.bar(places, values, 0.27, label=name, color=colours[name])
        axis.bar_label(drawn, fmt=form, fontsize=fontsize)
    middle = 0.29 * (len(bars) - 1) / 2
    axis.set_xticks([x + middle for x in range(len(groups))], groups, **ticks)
