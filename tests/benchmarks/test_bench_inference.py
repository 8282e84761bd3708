"""The benchmark of inference judges its cells, and refuses what is wrong."""

import statistics

import bench_inference
import pytest
import report
import rounds
import torch


def test_the_interval_of_a_median_holds_it_in_95_of_100_samples():
    generator = torch.Generator().manual_seed(0)
    samples = torch.rand(2000, 9, generator=generator).tolist()
    held = statistics.mean(low <= 0.5 <= high for low, high in map(rounds.interval_of_median, samples))
    # the second and the eighth of nine: 96.1 %
    assert held == pytest.approx(0.961, abs=0.02)
    assert rounds.interval_of_median([3, 1, 2]) == (1, 3)


def row(name, fastbert, other):
    seconds = {"fastbert": fastbert, "ONNX Runtime": other, "OpenVINO": [9.0] * 9}
    facts = dict(name=name, family="bert", dtype="float32", threads=1, sequences=1, length=8, fill=1.0)
    found = {**facts, "seconds": seconds, "summary": bench_inference.record.summary(seconds), "slower": {}}
    return found | {"cells": bench_inference.cells_of(found)}


def test_a_cell_fails_when_its_interval_is_below_1_and_stands_at_the_top(tmp_path):
    slow = row("slow", [1.0] * 9, [0.8] * 7 + [1.2, 0.9])
    unsure = row("unsure", [1.0] * 9, [0.8] * 6 + [1.2] * 3)
    assert slow["cells"]["fastbert"]["fails"] and slow["cells"]["fastbert"]["best"] == "ONNX Runtime"
    assert not unsure["cells"]["fastbert"]["fails"]
    result = {"machine": {"device": "x"}, "date": "2026-01-01", "command": "x", "rows": [slow, unsure], "settings": {}}
    bench_inference.record.save(result, tmp_path / "inference_matrix.json")
    report.write(tmp_path)
    page = (tmp_path / "README.md").read_text(encoding="utf-8")
    top = page[: page.index("## Losses")]
    assert "1 of 2 cells" in top and "slow, fastbert: 0.80x of ONNX Runtime's speed" in top and "unsure" not in top


def test_what_is_wrong_is_not_timed():
    missing, truth = {}, torch.eye(2)
    calls = {"right": lambda: truth + 1e-4, "wrong": lambda: truth.flip(0), "broken": lambda: 1 / 0}
    kept = bench_inference.right(calls, (), truth, "float32", missing, "x")
    assert kept.keys() == {"right"} and missing.keys() == {"wrong: x", "broken: x"}
