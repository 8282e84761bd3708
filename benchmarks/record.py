"""A result: what every benchmark writes, and what pages, the gate and tests read. README.md has the form of the file.

Ratios are medians over rounds of another's time over fastbert's. Below 1 fastbert is slower.
"""

import datetime
import json
import re
import shlex
import statistics
import sys
from pathlib import Path

import machine
import rounds

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def new(device, settings):
    """A result without rows: the machine as it is now, the date, and the command that runs."""
    return {
        "machine": machine.describe(device), "date": datetime.date.today().isoformat(), "command": _command(),
        "settings": settings, "rows": [], "not_measured": {},
    }  # fmt: skip


def command_of(result):
    """The command that made a result. Where the result went is no part of what was measured."""
    return re.sub(r" --output \S+", "", result["command"])


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


def is_usual(fill):
    """Whether a batch is text at 60 % fill, or has no padding: what pictures and memory show of the fills."""
    return fill == 1 or 0.55 < fill < 0.75


def rounded(seconds, digits=6):
    return {name: [round(s, digits) for s in times] for name, times in seconds.items()}


def line_of(failure):
    """An exception in one line, which may be cut."""
    return f"{type(failure).__name__}: {failure}".partition("\n")[0][:200]


def summary(seconds, tokens=None):
    """{implementation: figures} of raw seconds; real tokens a second where `tokens` of a round are given.

    times_fastbert: the median, over rounds, of its time over fastbert's, or over that of what is ours in its place.
    """
    found, ours = {}, seconds[ours_of(seconds)]
    for name, times in seconds.items():
        median = statistics.median(times)
        low, high = rounds.quartiles(times)
        found[name] = {
            "median_s": round(median, 6), "quartiles_s": [round(low, 6), round(high, 6)],
            **({"real_tokens_per_s": round(tokens / median)} if tokens else {}),
            "times_fastbert": round(ratio(times, ours), 3),
        }  # fmt: skip
    return found


def read(folder):
    """{name: result} of the JSON files in a folder."""
    return {file.stem: json.loads(file.read_text(encoding="utf-8")) for file in sorted(folder.glob("*.json"))}


def comparisons(results):
    """(name, {implementation: [seconds]}) of everything that was timed side by side with fastbert."""
    for result in results.values():
        for row in rows_of(result):
            if ours_of(row["seconds"]):
                yield name_of(row), row["seconds"]


def rows_of(result):
    """The rows of a result that hold raw seconds; none of what is no result, such as machine.json."""
    rows = result.get("rows") if isinstance(result, dict) else None
    return [row for row in rows if isinstance(row.get("seconds"), dict)] if isinstance(rows, list) else []


def ours_of(seconds):
    """The name of fastbert's own implementation among those of a row, or of what is swapped; None without either."""
    own = (name for name in seconds if name == "fastbert" or name.startswith("fastbert "))
    return next(own, next(filter(is_ours, seconds), None))


def is_ours(name):
    return name.startswith("fastbert") or name.endswith("swapped")


def name_of(row):
    """What a row of the common form measures, in words."""
    for key in ("name", "case"):
        if isinstance(row.get(key), str):
            return row[key] if row.get("pass", "") in row[key] else f"{row[key]} {row['pass']}"
    if "sweep" in row:
        shape = f"{row['sequences']} x {row['length']}, {row['fill']:.0%} fill"
        share = f", {row['picked_share']:.0%} picked" if row.get("picked_share") is not None else ""
        return f"{row['model']} ({row['layers']} layers) {row['pass']}, {shape}{share}, {row['dtype']}"
    return ", ".join(str(value) for value in row.values() if isinstance(value, str | int))


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


def best_ratios(results):
    """{name: the fastest peer's time over fastbert's} of rows that have a peer that is not ours."""
    found = {}
    for name, others in ratios(results).items():
        peers = [times for other, times in others.items() if not is_ours(other)]
        if peers:
            found[name] = min(peers)
    return found


def losses(results):
    """Lines on every row where an implementation that is not fastbert's is faster than it."""
    found = []
    for name, others in ratios(results).items():
        faster = sorted((times, other) for other, times in others.items() if times < 1 and not is_ours(other))
        if faster:
            rest = f"; faster too: {'; '.join(other for _, other in faster[1:])}" if faster[1:] else ""
            found.append(f"{name}: {faster[0][1]} takes {below_one(faster[0][0])} of fastbert's time{rest}")
    return found


def not_measured(results):
    """{implementation: why not} over all files."""
    return {name: why for result in results.values() for name, why in (result.get("not_measured") or {}).items()}


def below_one(value):
    """A ratio below 1, with as many digits as show that it is."""
    return f"{value:.2f}x" if value < 0.995 else f"{value:.3f}x"


def about(result, dated=True):
    """The device, versions and date behind a result, in a line; dtype and shape where they are the same throughout."""
    facts, settings = facts_of(result), result.get("settings") or {}
    where = [facts["device"]] if facts.get("device") else []
    if "threads" in facts:
        where.append(f"{facts['threads']} thread{'s' * (facts['threads'] > 1)}")
    shape = [settings["dtype"]] if settings.get("dtype") else []
    shape += [f"{settings['shape']} tokens"] if settings.get("shape") else []
    known = [f"{name} {facts[name]}" for name in ("fastbert", "torch", "triton", "transformers") if facts.get(name)]
    return ", ".join([*where, *shape, *known, *([result["date"]] if dated and result.get("date") else [])])


def facts_of(result):
    """What a result says of its machine; machine.json is nothing else."""
    return result.get("machine", result)
