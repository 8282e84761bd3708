"""The report says what the results say, losses as losses."""

import json
import shutil
from pathlib import Path

import bench_models
import pytest
import record
import report
import tables

ROOT = Path(__file__).resolve().parents[2]


def models_row(**changes):
    seconds = {"transformers sdpa": [0.4, 0.44, 0.4], "swapped": [0.3, 0.3, 0.3], "fastbert": [0.2, 0.2, 0.25]}
    seconds |= changes.pop("seconds", {})
    row = {
        "sweep": "fill", "model": "bert-base", "layers": 12, "pass": "inference", "dtype": "float32", "sequences": 4,
        "length": 128, "fill": 0.6, "picked_share": None, "tokens_real": 300, "tokens_padded": 512, "picked": None,
        "flops": 10**9, "difference": 1e-6, **changes,
    }  # fmt: skip
    gib = dict.fromkeys(seconds, 0.25)
    return row | {"seconds": seconds, "summary": bench_models.summary(seconds, 300, 512, 10**9, 10**11, gib)}


def models_result(*rows):
    return {
        "machine": {"device": "a processor", "threads": 2, "fastbert": "0.1.0", "torch": "2"}, "date": "2026-01-02",
        "command": "python benchmarks/bench_models.py",
        "settings": {"rounds": 3, "flops": "formula", "product_flops_per_s": {"float32": 1e11}, "left_out": ["this"]},
        "rows": list(rows), "not_measured": {"transformers compiled": "no | compiler"},
    }  # fmt: skip


def write(folder, **results):
    folder.mkdir(exist_ok=True)
    for name, result in results.items():
        record.save(result, folder / f"{name}.json")
    report.write(folder)
    return (folder / "README.md").read_text(encoding="utf-8")


def test_the_committed_page_follows_from_the_committed_results(tmp_path, monkeypatch):
    # to draw takes long, and nothing here looks at it
    monkeypatch.setattr(report.plots, "save", lambda *_: None)
    for folder in (place for place in record.RESULTS.iterdir() if (place / "README.md").exists()):
        copied = tmp_path / folder.name
        shutil.copytree(folder, copied)
        report.write(copied)
        now, committed = ((place / "README.md").read_text(encoding="utf-8") for place in (copied, folder))
        assert now == committed, f"{folder.name}/README.md is old: run python benchmarks/report.py"
        links = report.re.findall(r"\]\(([^)#]+)\)", now)
        assert links and all((folder / link).exists() for link in links)


def test_a_page_of_models(tmp_path):
    rows = [models_row(), models_row(fill=1.0), models_row(model="deberta-v3-base", sweep="families")]
    page = write(tmp_path, models=models_result(*rows))
    # median 0.2 s: 300 real and 512 padded tokens, 1e9 FLOPs of 1e11 a second
    assert "| fastbert | 200 ms ±6 % | 1,500 | 2,560 | 0.005 | 5% | 0.25 |  |" in page
    # the ratios of the rounds are 2, 2.2 and 1.6
    assert "| transformers sdpa | 400 ms ±3 % | 750 | 1,280 | 0.0025 | 2% | 0.25 | **2.00x** |" in page
    assert "None: nothing that was timed here is faster" in page
    assert "| transformers compiled | no / compiler |" in page and "Left out for want of time: this." in page
    for words in ("a processor, 2 threads", "2026-01-02", "`python benchmarks/bench_models.py`", "formula"):
        assert words in page
    for picture in ("speed", "scaling", "memory", "floors"):
        assert f"({picture}.png)" in page and (tmp_path / f"{picture}.png").stat().st_size > 10_000


def test_a_loss_is_printed_as_a_loss(tmp_path):
    slow = models_row(seconds={"transformers sdpa": [0.1, 0.11, 0.1], "transformers eager": [0.05, 0.05, 0.05]})
    page = write(tmp_path, models=models_result(slow))
    assert "0.50x, a loss |" in page and "0.25x, a loss |" in page
    (line,) = [line for line in page.splitlines() if line.startswith("- ")]
    assert line == (
        "- bert-base (12 layers) inference, 4 x 128, 60% fill, float32: transformers eager takes 0.25x of fastbert's "
        "time; faster too: transformers sdpa"
    )
    # swapped is fastbert too: faster than the own model, it is no loss
    assert record.losses({"models": models_result(models_row(seconds={"swapped": [0.1, 0.1, 0.1]}))}) == []


def test_a_loss_in_a_committed_file_is_found():
    """Each file that times fastbert beside another: a row of it, made slower, is a loss of that name."""
    results = record.read(report.FEATURED)
    for file in ("training_step", "families", "models", "ops"):
        row = next(row for row in results[file]["rows"] if record.losses({file: {"rows": [row]}}) == [])
        row["seconds"]["fastbert"] = [1e3 * s for s in row["seconds"]["fastbert"]]
        (line,) = record.losses({file: {"rows": [row]}})
        assert line.startswith(f"{record.name_of(row)}: "), file


def test_families_by_fill_and_length():
    rows = [models_row(sweep="families", fill=0.6), models_row(sweep="families", fill=1.0, seconds={"x": [0.1] * 3})]
    (lines, _) = tables.sweep_table({"rows": rows}, "families", "fill", "{:.0%}".format)
    assert lines.splitlines()[::2] == [
        "| model | pass | 60% | 100% |",
        # the fastest counts, and a loss is one
        "| bert-base (12 layers) | inference, float32 | **2.00x** | 0.50x, a loss |",
    ]
    assert tables.sweep_table({"rows": rows}, "length", "length", str) == []
    assert tables.times_of(0.997) == "0.997x, a loss" and tables.times_of(1.0) == "**1.00x**"


def test_latency_and_throughput_stand_beside_each_other():
    def row(sequences, ours, theirs):
        seconds = {"transformers sdpa": [theirs] * 3, "swapped": [ours] * 3, "fastbert": [ours] * 3}
        found = models_row(sweep="batch", sequences=sequences, seconds=seconds)
        return found | {"summary": bench_models.summary(seconds, 100 * sequences, 128 * sequences, 1e9, 1e11, {})}

    # one text in 10 ms; 4 take 16 ms, and 8 as long for each: 4 are the better batch
    rows = [row(1, 0.01, 0.04), row(4, 0.016, 0.1), row(8, 0.04, 0.2)]
    first, second = tables.latency_table({"rows": rows})[0].splitlines()[2:5:2]
    assert first == "| bert-base, float32 | transformers sdpa | 40 ms | 4,000 | 40.0 | 4 |"
    assert second == "| bert-base, float32 | fastbert | 10 ms | 25,000 | 250.0 | 4 |"
    assert tables.latency_table({"rows": []}) == []


def test_any_file_of_the_common_form_has_a_table(tmp_path):
    row = {"op": "thing", "tokens": 7, "seconds": {"fastbert": [2e-5, 2e-5], "peer": [1e-5, 3e-5], "none": []}}
    result = {"machine": {"device": "x"}, "date": "", "command": "c", "settings": {}, "rows": [row], "not_measured": {}}
    page = write(tmp_path, other=result)
    assert "## other" in page
    assert "| thing, 7 | fastbert | 20 µs ±0 % |  |" in page
    assert "|  | peer | 20 µs ±25 % | **1.00x** |" in page


def test_the_roofline_has_every_op_and_nothing_above_the_roof():
    counted = json.loads((record.RESULTS / "traffic.json").read_text(encoding="utf-8"))
    points, ceilings, title = report.counted_points()
    assert "counted" in title
    assert {(point["op"], point["which"]) for point in points} == {
        (row["op"], which) for row in counted["rows"] for which in ("fastbert", "plain PyTorch")
    }
    for point in points:
        assert point["useful bytes"] / point["seconds"] <= 1.001 * ceilings["copy"]
        assert point["useful flops"] / point["seconds"] <= 1.001 * ceilings["product"]
        assert point["useful bytes"] <= point["bytes"] and point["useful flops"] <= point["flops"]


def ops_result():
    row = {
        "op": "layer_norm", "case": "layer_norm bert", "pass": "both", "bytes": 10**9, "flops": 0,
        "seconds": {"fastbert": [0.5, 0.5], "eager": [1.0, 1.0], "peer": [0.1, 0.1]},
        "summary": {"fastbert": {"gb_per_s": 2.0, "tflop_per_s": 0, "percent_of_ceiling": 50.0}},
    }  # fmt: skip
    attention = row | {"op": "attention", "case": "attention bert", "flops": 10**11}
    ops = models_result(row, row | {"pass": "forward"}, attention)
    ops["settings"]["ceilings"] = {"copy": 4e9, "product": 1e12}
    return ops


def test_measured_ops_under_their_roof(tmp_path):
    points, ceilings, title = report.measured_points(ops_result())
    assert title.startswith("measured") and ceilings["copy"] == 4e9
    assert [(p["op"], p["shape"], p["which"], p["useful bytes"] / p["seconds"]) for p in points] == [
        ("layer_norm", "bert", "fastbert", 2e9), ("layer_norm", "bert", "plain PyTorch", 1e9),
        ("attention", "bert", "fastbert", 2e9), ("attention", "bert", "plain PyTorch", 1e9),
    ]  # fmt: skip
    page = write(tmp_path, ops=ops_result())
    assert "| layer_norm bert | 500 ms ±0 % | 2.0 | 0 | 50.0 | peer | 0.20x, a loss |" in page
    # the kernels are counted only where there is no GPU
    assert "(roofline.png)" in page and "(floors.png)" in page
    on_gpu = ops_result()
    on_gpu["machine"] |= {"capability": "9.0"}
    shutil.rmtree(tmp_path)
    page = write(tmp_path, ops=on_gpu)
    assert "(roofline.png)" in page and "(floors.png)" not in page


def test_unknown_marks_are_refused():
    with pytest.raises(ValueError, match="'nothing'.*training_step"):
        report.with_figures("a <!-- figures: nothing -->b<!-- end -->")
