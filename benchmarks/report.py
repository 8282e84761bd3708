"""The results of a device as one page, with plots; and the figures of the project's README, from the same results.

    python benchmarks/report.py                          every folder of benchmarks/results that holds results
    python benchmarks/report.py --device FOLDER          one of them
    python benchmarks/report.py --readme                 the README's figures too

It reads benchmarks/results/<device>/*.json and writes README.md and plots beside them. It times nothing. In the
project's README --readme writes what stands between <!-- figures: NAME --> and <!-- end -->: see `FIGURES`.
"""

import argparse
import importlib.util
import itertools
import json
import re
import statistics
from pathlib import Path

import plots
import tables
from record import (
    RESULTS,
    ROOT,
    about,
    command_of,
    facts_of,
    is_usual,
    losses,
    not_measured,
    read,
    rows_of,
)

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
            # the name that it has in models.json
            values = {"transformers sdpa" if name == "transformers" else name: x for name, x in values.items()}
            if values:
                panels.setdefault(title, []).append((row["case"], values))
    for row in rows_of(results.get("models", {})):
        values = {name: 1024 * figures["peak_gib"] for name, figures in row["summary"].items() if "peak_gib" in figures}
        if row["sweep"] == "fill" and is_usual(row["fill"]) and values:
            kind = {"train": "a training step", "inference": "inference"}[row["pass"]]
            place = f"{row['sequences']} x {row['length']}\n{row['fill']:.0%} fill, {plots.short(row['dtype'])}"
            panels.setdefault(f"{kind} of {row['model']} beyond the weights, MiB", []).append((place, values))
    return panels


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
    points, figures = [], ("bytes", "flops", "seconds")
    for (op, shape), rows in itertools.groupby(counted["rows"], key=lambda row: (row["op"], row["shape"])):
        rows = list(rows)
        # of several ways to write it in plain PyTorch the first is the usual one; the least is the least of all
        ways = [rows[0]["fastbert"], *(row["plain"] for row in rows)]
        sums = [{x: sum(one[x] for one in passes.values()) for x in figures} for passes in ways]
        least = {f"useful {x}": min(way[x] for way in sums) for x in ("bytes", "flops")}
        for which, way in zip(("fastbert", "plain PyTorch"), sums):
            points.append({"op": op, "shape": shape, "which": which, **way, **least})
    ceilings = {"copy": counted["ceilings"]["bytes_per_second"], "product": counted["ceilings"]["flops_per_second"]}
    return points, ceilings, "counted traffic at an H200's measured ceilings, not timed"


# ---------------------------------------------------------------------------------------------------------------------
# the page


def page(folder, results, pictures):
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
    lines += [tables.table(("results", "date", "device and versions", "command"), what), ""]
    noted = [f"{name}.json: {result['note']}." for name, result in results.items() if result.get("note")]
    lines += [*noted, ""] if noted else []
    if "inference_matrix" in results:
        matrix = results["inference_matrix"]
        failing, cells = tables.failing(matrix), sum(len(row["cells"]) for row in matrix["rows"])
        lines += ["## Failing cells", "", f"{len(failing)} of {cells} cells of the matrix of inference below.", ""]
        lines += [*(f"- {line}" for line in failing), *[""] * bool(failing)]
    lost = losses(results)
    lines += ["## Losses", ""]
    lines += [f"- {line}" for line in lost] if lost else ["None: nothing that was timed here is faster than fastbert."]
    lines += [""]
    sections = (
        ("training_step", "A training step of BERT-base"), ("families", "Every family"), ("models", "Whole models"),
        ("inference_matrix", "Inference against the fastest other library"),
        ("training", "Training, side by side"), ("finetune", "Fine-tuning"), ("data", "The data path"), ("ops", "Ops"),
        ("demo", "The demo"),
    )  # fmt: skip
    for name, title in sections:
        if name in results:
            lines += [f"## {title}", "", *section(name, results[name], pictures), ""]
    for name, result in results.items():
        known = [section_name for section_name, _ in sections]
        if name not in known and rows_of(result):
            lines += [f"## {name}", "", tables.generic_table(result), ""]
    for picture, title in (("memory", "Memory"), ("roofline", "Roofline"), ("floors", "Floors of the kernels")):
        if picture in pictures:
            lines += [f"## {title}", "", f"![{pictures[picture]}]({picture}.png)", ""]
    lines += without_a_device()
    missing = not_measured(results)
    if missing:
        whys = [(what, why.replace("|", "/")) for what, why in missing.items()]
        lines += ["## Not measured", "", tables.table(("what", "why"), whys)]
    return "\n".join(lines).rstrip() + "\n"


def without_a_device():
    """Lines on what the compiler made of the kernels, and where their traffic was counted: of every device's page."""
    lines, file = [], RESULTS / "compile.json"
    if file.exists():
        result = json.loads(file.read_text(encoding="utf-8"))
        rows = []
        for arch in dict.fromkeys(kernel["arch"] for kernel in result["kernels"]):
            kernels = [kernel for kernel in result["kernels"] if kernel["arch"] == arch]
            whole = [kernel for kernel in kernels if "error" not in kernel]
            on_cores = [bool(kernel["tensor"]) for kernel in whole if kernel["dots"]]
            spill, atomics = (sum(bool(kernel[x]) for kernel in whole) for x in ("spills", "atomics"))
            most = max(kernel["registers"] for kernel in whole)
            products = f"{sum(on_cores)} of {len(on_cores)}"
            rows.append((arch, len(kernels), len(kernels) - len(whole), spill, products, atomics, most))
        head = ("for", "kernels", "do not compile", "spill", "products on tensor cores", "atomics", "most registers")
        made = ", ".join([f"Triton {result['versions']['triton']}", *filter(None, [result.get("date")])])
        lines += ["## What the compiler makes of the kernels", "", tables.table(head, rows), ""]
        lines += [f"{made}: [compile.json](../compile.json).", ""]
    lines += ["What each kernel moves at least, counted: [kernels/NOTES.md](../../../kernels/NOTES.md).", ""]
    return lines


def section(name, result, pictures):
    """The lines of one file's section."""
    if name == "training_step":
        lines = [tables.step_table(result), "", f"{about(result)}."]
        return [*lines, "", "![Speed and memory](training_step.png)"] if tables.is_of_processes(result) else lines
    if name == "families":
        sentences = tables.sentences_line(result)
        lines = [tables.families_table(result), "", f"{about(result)}.", *(["", f"{sentences}."] if sentences else [])]
        return [*lines, "", "![Every family](families.png)"]
    if name == "models":
        shown = [f"![{pictures[x]}]({x}.png)\n" for x in ("speed", "scaling") if x in pictures]
        settings = result["settings"]
        rates = ", ".join(f"{dtype} {rate / 1e12:.3g}" for dtype, rate in settings["product_flops_per_s"].items())
        lines = [*shown, f"{about(result)}. MFU is of the measured matrix product, TFLOP/s: {rates}. FLOPs, counted on"]
        lines += [f"real tokens: {settings['flops']}.", ""]
        lines += tables.latency_table(result)
        by_fill = tables.sweep_table(result, "families", "fill", lambda fill: f"{fill:.0%} fill")
        by_length = tables.sweep_table(result, "length", "length", lambda length: f"{length:.0f} tokens")
        if by_fill or by_length:
            lines += ["Times fastbert's time that the fastest of transformers' ways takes, by fill and by length:", ""]
        lines += by_fill + by_length
        for sweep in dict.fromkeys(row["sweep"] for row in result["rows"]):
            rows = [row for row in result["rows"] if row["sweep"] == sweep]
            fold = f"<details><summary>{sweep}: {len(rows)} rows</summary>"
            lines += [fold, "", tables.models_table(rows), "", "</details>"]
        if settings.get("left_out"):
            lines += ["", f"Left out for want of time: {'; '.join(settings['left_out'])}."]
        return lines
    if name == "training":
        lines = [f"![{pictures['training']}](training.png)\n"] if "training" in pictures else []
        return [*lines, tables.training_table(result), "", f"{result['settings']['what']}. {about(result)}."]
    if name == "inference_matrix":
        about_it = f"{about(result)}. A ratio is the other's time over ours; a cell fails where its interval is below 1"
        shown = [f"![{pictures[name]}]({name}.png)\n"] if name in pictures else []
        return [*shown, tables.matrix_table(result), "", f"{about_it}."]
    if name == "finetune":
        return [*tables.finetune_tables(result), "", f"{about(result)}."]
    if name == "data":
        return [tables.data_line(result), "", tables.data_table(result), "", f"{about(result)}."]
    if name == "ops":
        return [tables.ops_table(result["rows"]), "", f"{about(result)}. Every variant and pass: [ops.md](ops.md)."]
    return [tables.demo_line(result), "", "![The demo's loss and held-out masked accuracy](demo.png)"]


def write(folder):
    """Page and, where matplotlib is installed, pictures of one folder of results. Returns the files written."""
    results = read(folder)
    if not results:
        return []
    pictures = draw(folder, results) if importlib.util.find_spec("matplotlib") else {}
    (folder / "README.md").write_text(page(folder, results, pictures), encoding="utf-8")
    return [folder / "README.md", *(folder / f"{name}.png" for name in pictures)]


def draw(folder, results):
    """The pictures of one folder of results: {name of the file: what it shows}."""
    pictures, models, ops = {}, results.get("models"), results.get("ops")
    step = results.get("training_step", {})
    if rows_of(step) and tables.is_of_processes(step):
        plots.plot_training_step(step["rows"], about(step), folder / "training_step.png")
        pictures["training_step"] = "Speed and memory"
    if rows_of(results.get("families", {})):
        families = results["families"]
        plots.plot_families(tables.speeds(families), about(families), folder / "families.png")
        pictures["families"] = "Every family"
    if rows_of(results.get("inference_matrix", {})):
        matrix = results["inference_matrix"]
        plots.plot_matrix(matrix["rows"], about(matrix), folder / "inference_matrix.png")
        pictures["inference_matrix"] = "Inference: how many times our time the fastest other library takes"
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
        # without a GPU's own: counted
        rooflines["floors"] = counted_points()
    for name, (points, ceilings, title) in rooflines.items():
        if points:
            plots.plot_roofline(points, ceilings, title, folder / f"{name}.png")
            pictures[name] = f"Roofline: {title}"
    return pictures


# ---------------------------------------------------------------------------------------------------------------------
# the figures of the project's README

# the folder of results that they come from
FEATURED = RESULTS / "cpu-amd-epyc-2-cores"
# and of another processor, without AVX-512: the demo, and a training step for comparison
OTHER = RESULTS / "cpu-amd-epyc-family-25-model-1-2-cores"


def _of(file, say, folder=FEATURED):
    """What `say` makes of a file of results, when asked."""
    return lambda: say(json.loads((folder / f"{file}.json").read_text(encoding="utf-8")))


def _about(result):
    """Device, versions, date, rounds and the command, as far as the file has them."""
    counts = [len(times) for row in rows_of(result) for times in row["seconds"].values() if times]
    few, many = min(counts, default=0), max(counts, default=0)
    medians = f", medians of {few if few == many else f'{few} to {many}'} rounds" if counts else ""
    return f"{about(result)}{medians}, by `{command_of(result)}`"


# name -> function that gives what stands in the README between the marks of that name
FIGURES = {
    "training_step": _of("training_step", tables.step_table),
    "training_step_span": _of("training_step", tables.span_line),
    "training_step_about": _of("training_step", _about),
    "families": _of("families", tables.families_table),
    "families_about": _of("families", _about),
    "sentences": _of("families", tables.sentences_line),
    "single": _of("families", tables.single_line),
    "demo": _of("demo", tables.demo_line, OTHER),
    "training_step_elsewhere": _of("training_step", tables.span_line, OTHER),
    "models": _of("models", tables.models_summary),
    "models_span": _of("models", tables.span_line),
    "models_about": _of("models", _about),
    "ops_span": _of("ops", tables.span_line),
    "training": _of("training", tables.training_table),
    "training_about": _of("training", _about),
    "data": _of("data", tables.data_line),
    "dtypes": _of("dtypes", tables.dtypes_table, OTHER),
    "dtypes_about": _of("dtypes", _about, OTHER),
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

    text = re.sub(r"(?<=\(benchmarks/results/)cpu-[^/)]+(?=[/)])(?!/demo\.png)", FEATURED.name, BLOCK.sub(filled, text))
    return re.sub(r"(?<=\(benchmarks/results/)cpu-[^/)]+(?=/demo\.png)", OTHER.name, text)


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", help="a folder of benchmarks/results, or any folder; default: every one of them")
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
