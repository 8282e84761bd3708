"""The README states what was measured: its figures are those of the raw results beside the benchmarks."""

import importlib.util
import json
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
RESULTS = ROOT / "benchmarks" / "results" / "cpu"


def test_training_step_figures_are_the_measured_ones():
    spec = importlib.util.spec_from_file_location("bench", ROOT / "benchmarks" / "bench_training_step.py")
    bench = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(bench)
    result = json.loads((RESULTS / "training_step.json").read_text(encoding="utf-8"))
    assert bench.markdown(result) in README
    assert bench.describe(result) in README
    for case in result["cases"]:
        assert case["largest_loss_difference"] <= 1e-5
        # the summary follows from the raw seconds
        medians = [sorted(case[library]["seconds"])[result["rounds"] // 2] for library in bench.LIBRARIES]
        assert abs(medians[0] / medians[1] - case["speedup"]) < 0.02
        assert abs(medians[0] / medians[2] - case["speedup_on_mkl"]) < 0.02


def test_family_figures_are_the_measured_ones():
    spec = importlib.util.spec_from_file_location("bench_families", ROOT / "benchmarks" / "bench_families.py")
    bench = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(bench)
    result = json.loads((RESULTS / "families.json").read_text(encoding="utf-8"))
    assert [row["family"] for row in result["families"]] == list(bench.MODELS)
    assert bench.markdown(result) in README
    assert bench.sentences_line(result) in README
    assert bench.describe(result) in README
    for row in result["families"]:
        assert max(row["loss_difference"], row["hidden_difference"]) <= 1e-4
        for kind in ("train", "inference"):
            part = row[kind]
            # the summary follows from the raw seconds
            assert bench.summary(part["seconds"])["speedup"] == part["speedup"]
            least = 1.5 if row["family"].startswith("deberta") else 1.0
            assert part["speedup"]["transformers"] >= least, row["family"]


def test_demo_figures_are_the_measured_ones():
    row = json.loads((RESULTS / "demo.json").read_text(encoding="utf-8"))
    for name in ("eval_masked_accuracy", "eval_baseline_accuracy"):
        assert f"{row[name]:.1%}" in README


def test_every_file_that_the_readme_links_is_there():
    links = re.findall(r"\]\(([^)#]+)\)", README)
    assert links
    for link in links:
        assert link.startswith("http") or (ROOT / link).exists(), link
