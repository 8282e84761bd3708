"""What bench_ops.py writes of its result: ops.json, ops.csv, ops.md, and each case in a line."""

import csv
import itertools

import record

PASSES = ("forward", "backward", "both")


def title(result):
    facts = result["machine"]
    words = f"{facts['device']}, torch {facts['torch']}, triton {facts['triton']}, {result['date']}"
    if "threads" in facts:
        words = f"{facts['threads']} thread{'s' * (facts['threads'] > 1)} of {words}"
    return f"REHEARSAL, times mean nothing: {words}" if "rehearsal" in facts else words


def markdown(result):
    """The result as tables, one for each case."""
    settings = result["settings"]
    ceilings, empty = settings["ceilings"], settings.get("empty_call_us")
    of_the_clock = "" if empty is None else f" An empty call takes {empty} µs: so much of every pass is the clock's."
    named = [f"{name} {version}" for name, version in settings.get("peers", {}).items()]
    lines = [
        "# Ops",
        "",
        f"{title(result)}. `{result['command']}`. Measured ceilings: copy {ceilings['copy'] / 1e9:.0f} GB/s, matrix "
        f"product {ceilings['product'] / 1e12:.2f} TFLOP/s. Times are medians in µs, quartiles those of both passes; "
        "% is of the ceiling that binds: the least bytes over the copy's rate or the FLOPs over the product's. Rates "
        f"count real tokens.{of_the_clock}",
        *(["", f"Installed beside: {', '.join(named)}."] if named else []),
        "",
        *losses(result["rows"]),
    ]
    for name, rows in itertools.groupby(result["rows"], key=lambda row: row["case"]):
        rows = {row["pass"]: row for row in rows}
        both = rows["both"]
        lines += [
            "",
            f"## {name}" + (" (rehearsal)" if "rehearsal" in result["machine"] else ""),
            "",
            f"At least {both['bytes'] / 1e6:.1f} MB and {both['flops'] / 1e9:.2f} GFLOP: {both['floor_us']} µs. "
            f"{both['tokens']} tokens, {both['padded_tokens']} with padding.",
            "",
            "| variant | forward | backward | both | quartiles | times fastbert's | GB/s | TFLOP/s | % forward "
            "| % backward | MiB |",
            "|---|---|---|---|---|---|---|---|---|---|---|",
        ]
        for variant, forward in rows["forward"]["summary"].items():
            backward, whole = (rows[what]["summary"].get(variant) for what in PASSES[1:])
            if whole is None:
                cells = [forward["median_us"], "", "", "", f"{forward['times_fastbert']}x (forward)", "", ""]
                cells += [forward["percent_of_ceiling"], ""]
            else:
                cells = [forward["median_us"], backward["median_us"], whole["median_us"]]
                cells += [" to ".join(map(str, whole["quartiles_us"])), f"{whole['times_fastbert']}x"]
                cells += [whole["gb_per_s"], whole["tflop_per_s"]]
                cells += [forward["percent_of_ceiling"], backward["percent_of_ceiling"]]
            gib = (whole or forward)["peak_gib"]
            cells.append("" if gib is None else round(1024 * gib, 1))
            lines.append(f"| {variant} | {' | '.join(map(str, cells))} |")
        if both.get("waiting"):
            lines += ["", f"Waiting for the device within, so with the host's time: {', '.join(both['waiting'])}."]
        if both["not_measured"]:
            lines += ["", "Not measured:", ""]
            lines += [f"- {variant}: {reason}" for variant, reason in both["not_measured"].items()]
    if settings["left_out"]:
        lines += ["", "Left out, for want of time:", "", *(f"- {name}" for name in settings["left_out"])]
    return "\n".join(lines) + "\n"


def lost(row):
    """{variant: its time over fastbert's} of those that are faster in a row, beyond the spread of the rounds."""
    return {
        name: part["times_fastbert"]
        for name, part in row["summary"].items()
        if name != "fastbert" and part["times_fastbert_quartiles"][1] < 1
    }


def losses(rows):
    """Lines on what is lost in these rows."""
    lines = []
    for row in rows:
        others = sorted(lost(row).items(), key=lambda pair: pair[1])
        if others:
            times = ", ".join(f"{name} ({times:.2f}x of its time)" for name, times in others)
            lines.append(f"- {row['case']}, {row['pass']}: {times}")
    if not lines:
        return ["Nothing here is faster than fastbert beyond the spread of the rounds."]
    return ["Faster than fastbert, beyond the spread of the rounds:", "", *lines]


def write(result, folder):
    measured = {name for row in result["rows"] for name in row["seconds"]}
    result["not_measured"] = {
        name: reason for row in result["rows"] for name, reason in row["not_measured"].items() if name not in measured
    }
    record.save(result, folder / "ops.json")
    (folder / "ops.md").write_text(markdown(result), encoding="utf-8")
    if result["rows"]:
        left_out = ("seconds", "summary", "waiting", "disagreement", "not_measured")
        names = [name for name in result["rows"][0] if name not in left_out]
        with open(folder / "ops.csv", "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            figures = list(result["rows"][0]["summary"]["fastbert"])
            writer.writerow([*names, "variant", *figures])
            for row in result["rows"]:
                for variant, part in row["summary"].items():
                    writer.writerow([*(row[name] for name in names), variant, *(part[name] for name in figures)])


def told(rows):
    """A case in a line: fastbert's times, and the best of the others."""
    forward, backward, both = (row["summary"] for row in rows)
    ours = both["fastbert"]
    line = (
        f"{rows[0]['case']}: {forward['fastbert']['median_us']} + {backward['fastbert']['median_us']} µs, "
        f"{ours['percent_of_ceiling']} % of the ceiling"
    )
    others = {name: part for name, part in both.items() if name != "fastbert"}
    if others:
        best = min(others, key=lambda name: others[name]["times_fastbert"])
        low, high = others[best]["times_fastbert_quartiles"]
        verdict = "fastbert LOSES" if high < 1 else "fastbert wins" if low > 1 else "as fast, within the spread"
        times = others[best]["times_fastbert"]
        line += f"; best of {len(others)} others: {best}, {times:.2f}x fastbert's time: {verdict}"
    return line
