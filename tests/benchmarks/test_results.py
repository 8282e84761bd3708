"""Committed results are of one piece: what they state follows from the raw seconds beside it, and so do their tables.

A figure that is edited by hand, or a summary that another version has made, is found here, also where no page shows it.
"""

import copy
import datetime
import json
import platform
import statistics
from pathlib import Path

import machine
import op_pages
import pytest
import record
import report
import torch

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results"
FILES = [path for path in sorted(RESULTS.glob("*/*.json")) if path.parent.name != "rehearsal"]
# what figures are of, by the end of their names: how many in a second
PER_SECOND = {"_us": 1e6, "_s": 1.0}


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


def untrue(result):
    """What a result states that does not follow from its seconds: lines of text."""
    found = []

    def hold(stated, follows, where, digits):
        # half a step of the rounding of what is stated, and of the seconds behind it
        if abs(stated - follows) > 0.51 * 10**-digits + 2e-3 * abs(follows):
            found.append(f"{where}: {stated}, and {follows:.6g} follows")

    for row in record.rows_of(result):
        name = record.name_of(row)
        for variant, figures in row.get("summary", {}).items():
            seconds, where = row["seconds"][variant], f"{name}, {variant}"
            low, median, high = statistics.quantiles(seconds, n=4, method="inclusive")
            unit = next(unit for unit in PER_SECOND if f"median{unit}" in figures)
            scale, digits = PER_SECOND[unit], 1 if unit == "_us" else 4
            hold(figures[f"median{unit}"], median * scale, f"{where}: median", digits)
            for stated, follows in zip(figures[f"quartiles{unit}"], (low, high)):
                hold(stated, follows * scale, f"{where}: quartiles", digits)
            ours = row["seconds"][record.ours_of(row["seconds"])]
            ratio = statistics.median(a / b for a, b in zip(seconds, ours))
            hold(figures["times_fastbert"], ratio, f"{where}: times fastbert's", 3)
            worth = {
                "gb_per_s": (row.get("bytes"), 1e9, 1), "tflop_per_s": (row.get("flops"), 1e12, 3),
                "real_tokens_per_s": (row.get("tokens_real"), 1, 0),
                "padded_tokens_per_s": (row.get("tokens_padded"), 1, 0),
                "mfu": (row.get("flops"), result["settings"].get("product_flops_per_s", {}).get(row.get("dtype")), 4),
            }  # fmt: skip
            for figure, (amount, size, places) in worth.items():
                if figure in figures and amount is not None:
                    hold(figures[figure], amount / median / size, f"{where}: {figure}", places)
            if "percent_of_ceiling" in figures and row["pass"] != "both":
                ceilings = result["settings"]["ceilings"]
                least = max(row["bytes"] / ceilings["copy"], row["flops"] / ceilings["product"])
                hold(figures["percent_of_ceiling"], 100 * least / median, f"{where}: % of the ceiling", 1)
        if "ratio" in row:
            # of two rates: bench_data.py
            (ours, theirs), tokens = row["seconds"].values(), (row["tokens"], row["against_tokens"])
            rates = [n / statistics.median(times) for n, times in zip(tokens, (ours, theirs))]
            hold(row["tokens_per_s"], rates[0], f"{name}: tokens a second", 0)
            hold(row["against_tokens_per_s"], rates[1], f"{name}: tokens a second of the other", 0)
            hold(row["ratio"], rates[0] / rates[1], f"{name}: ratio", 3)
    for row in result.get("rows", ()):
        if "training_seconds" in row:
            hold(row["training_seconds"], row["curve"][-1]["seconds"], f"{row['implementation']}: seconds", 3)
            hold(row["tokens_per_s"], row["tokens"] / row["training_seconds"], f"{row['implementation']}: rate", 0)
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_a_result_has_the_one_form_and_what_it_states_follows_from_its_seconds(path):
    result = read(path)
    if isinstance(result, dict) and "rows" in result:
        assert {"machine", "date", "command", "settings", "rows", "not_measured"} <= result.keys() and result["command"]
        assert datetime.date.fromisoformat(result["date"])
        assert untrue(result) == []


def test_a_changed_figure_is_found():
    """In every kind of result: in its seconds as well as in what it states."""
    kinds = set()
    for path in FILES:
        result = read(path)
        rows = record.rows_of(result)
        for row in rows[:: max(len(rows) // 3, 1)]:
            alone = result | {"rows": [row]}
            changed = copy.deepcopy(alone)
            seconds = changed["rows"][0]["seconds"]
            for i, name in enumerate(seconds):
                seconds[name] = [x * (1.1 + 0.1 * i) for x in seconds[name]]
            assert untrue(changed), path
            for name, figures in list(row.get("summary", {}).items())[:2]:
                for figure in figures.keys() - {"times_fastbert_quartiles"}:
                    if figure.startswith(("peak", "memory", "quartiles")) or not figures[figure]:
                        continue
                    if figure == "percent_of_ceiling" and row["pass"] == "both":
                        continue
                    changed = copy.deepcopy(alone)
                    changed["rows"][0]["summary"][name][figure] *= 1.5
                    assert untrue(changed), (path, name, figure)
            kinds.add(path.stem)
    assert kinds >= {"ops", "models", "data", "families", "training_step"}


@pytest.mark.parametrize("path", [x for x in FILES if x.stem == "ops"], ids=lambda path: path.parent.name)
def test_the_files_of_ops_are_those_of_their_json(path, tmp_path):
    op_pages.write(read(path), tmp_path)
    for name in ("ops.json", "ops.md", "ops.csv"):
        assert (tmp_path / name).read_bytes() == path.with_name(name).read_bytes(), name


X86 = "processor : 0\ncpu family : {}\nmodel : {}\nmodel name : {}\nstepping : 1\n\nprocessor : 1\nmodel : 9\n"
ARM = "processor : 0\nBogoMIPS : 50\nCPU implementer : 0x41\nCPU part : 0xd4f\n"
PROCESSORS = {
    X86.format(25, 1, "AMD EPYC"): "cpu-amd-epyc-family-25-model-1-8-cores",
    X86.format(26, 2, "AMD EPYC 9B45 128-Core Processor"): "cpu-amd-epyc-9b45-family-26-model-2-8-cores",
    X86.format(6, 143, "Intel(R) Xeon(R) CPU @ 2.20GHz"): "cpu-intel-xeon-family-6-model-143-8-cores",
    ARM: f"cpu-{platform.machine().replace('_', '-')}-implementer-0x41-part-0xd4f-8-cores",
}


@pytest.mark.parametrize("cpuinfo", PROCESSORS, ids=PROCESSORS.get)
def test_a_cpu_has_a_folder_of_its_own(cpuinfo, tmp_path, monkeypatch):
    monkeypatch.setattr(platform, "processor", str)
    (tmp_path / "cpuinfo").write_text(cpuinfo)
    assert machine.cpu_folder(machine.processor(tmp_path / "cpuinfo"), 8) == PROCESSORS[cpuinfo]


def test_committed_results_of_a_cpu_are_in_the_folder_of_that_cpu():
    """And so is what is measured here."""
    machines = [(path.parent, read(path).get("machine", {})) for path in FILES if path.parent.name.startswith("cpu")]
    named = [(folder, facts) for folder, facts in machines if "cores" in facts]
    assert report.FEATURED in {folder for folder, _ in named}
    here = machine.describe(torch.device("cpu"))
    for folder, facts in [*named, (machine.folder(torch.device("cpu")), here)]:
        assert folder.name == machine.cpu_folder(facts["device"], facts["cores"])
