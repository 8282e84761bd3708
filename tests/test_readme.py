"""The README states what was measured: its figures are those of the raw results beside the benchmarks."""

import json
import os
import re
import statistics
import subprocess
import sys
from pathlib import Path

import bench_models
import pytest
import report
import tables
from model_pairs import FAMILIES

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
RESULTS = report.FEATURED

# a number with the unit of something measured
FIGURE = re.compile(
    r"(?<![\w.-])\d[\d,.]*\s?(?:x|ms|s|µs|[KMGT]i?B(?:/s)?|[GTP]FLOP(?:/s|s)?|%|tokens|times|seconds|a second)(?![\w-])"
)
# figures that no benchmark gives: what the tests allow, where the README says so
STATED = ["2x", "3x"]


def test_text_between_marks_is_generated():
    """After a new result: `python benchmarks/report.py --readme`."""
    assert report.with_figures(README) == README
    assert {name for _, name, *_ in report.BLOCK.findall(README)} >= {
        "training_step", "training_step_about", "training_step_span", "families", "families_about", "sentences",
        "models_span", "ops_span", "demo",
    }  # fmt: skip


def test_a_changed_figure_is_found():
    """One digit of each generated block, and the folder of each link to results."""
    for block in report.BLOCK.finditer(README):
        digit = next(re.finditer(r"\d", block[0].partition("-->")[2]))
        place = block.start() + len(block[0].partition("-->")[0]) + len("-->") + digit.start()
        changed = README[:place] + str((int(digit[0]) + 1) % 10) + README[place + 1 :]
        assert changed != README and report.with_figures(changed) == README
    moved = README.replace(f"/{report.FEATURED.name}/", "/cpu-another/")
    assert moved != README and report.with_figures(moved) == README


def test_no_figure_stands_elsewhere():
    """A new figure goes between marks, as one of report.FIGURES, or, where nothing measures it, into STATED."""
    prose = report.BLOCK.sub("", re.sub(r"```.*?```", "", README, flags=re.DOTALL))
    prose = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", prose)
    assert FIGURE.findall(prose) == STATED
    # that it can find one
    found = FIGURE.findall("it is 2.5x as fast, 1,024 tokens in 3.1 s, 20 GB/s, at 420 a second; int8, v3, S=128, 3.11")
    assert found == ["2.5x", "1,024 tokens", "3.1 s", "20 GB/s", "420 a second"]


# runs files one after the other, each with names of its own; checks what it computed; prints the seconds of one thread,
# without those of importing transformers, which a busy machine stretches
RUN = """
import runpy, sys, time, torch
from transformers import BertForMaskedLM
torch.set_num_threads(1)
start = time.process_time()
for file in sys.argv[1:]:
    names = runpy.run_path(file)
    computed = [names[name] for name in ("loss", "y") if name in names]
    assert computed and all(x.isfinite().all() for x in computed), file
    leaves = names["model"].parameters() if "model" in names else [names[name] for name in "qkv"]
    assert any(x.grad is not None and x.grad.abs().sum() > 0 for x in leaves), file
print(time.process_time() - start)
"""


def test_snippets_run_as_written(tmp_path):
    """The three ways in, each copied into a file, in another directory, without network, in under ten seconds."""
    pytest.importorskip("transformers")
    section = README.partition("## Three ways in")[2].partition("\n## ")[0]
    snippets = re.findall(r"```python\n(.*?)```", section, flags=re.DOTALL)
    assert len(snippets) == 3
    for number, snippet in enumerate(snippets):
        (tmp_path / f"{number}.py").write_text(snippet)
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", RUN, *(f"{number}.py" for number in range(3))]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "BertForMaskedLM" in done.stdout
    assert float(done.stdout.split()[-1]) < 10


def test_training_step_figures_follow_from_the_raw_seconds():
    result = json.loads((RESULTS / "training_step.json").read_text(encoding="utf-8"))
    shown = tables.step_table(result)
    for row in result["rows"]:
        assert row["difference"] <= 1e-5
        for library in bench_models.ON_A_CPU[1:]:
            rounds = zip(row["seconds"]["transformers"], row["seconds"][library])
            assert f"{statistics.median(a / b for a, b in rounds):.2f}x" in shown, library


def test_family_figures_follow_from_the_raw_seconds():
    result = json.loads((RESULTS / "families.json").read_text(encoding="utf-8"))
    rows = [row for row in result["rows"] if "family" in row]
    assert list(dict.fromkeys(row["family"] for row in rows)) == list(FAMILIES)
    assert [row["pass"] for row in rows] == ["train", "inference"] * len(FAMILIES)
    lines = {line.split(" | ")[0].strip("| "): line for line in tables.families_table(result).splitlines()}
    for row in rows:
        assert row["difference"] <= 1e-4
        times = statistics.median(a / b for a, b in zip(row["seconds"]["transformers"], row["seconds"]["fastbert"]))
        assert f"**{times:.2f}x**" in lines[row["family"]], row["name"]
        assert times >= (1.5 if row["family"].startswith("deberta") else 1.0), row["family"]


def test_pictures_of_results_have_their_raw_numbers_beside_them():
    pictures = re.findall(r"!\[[^\]]+\]\((benchmarks/results/[^)]+)\.png\)", README)
    assert len(pictures) >= 2
    for picture in pictures:
        assert (ROOT / f"{picture}.png").exists()
        # a picture of the report draws what the page beside it tabulates
        assert (ROOT / f"{picture}.json").exists() or (ROOT / picture).with_name("README.md").exists()


def test_every_file_that_the_readme_links_is_there():
    links = re.findall(r"\]\(([^)#]+)\)", README)
    assert links
    for link in links:
        assert link.startswith("http") or (ROOT / link).exists(), link
