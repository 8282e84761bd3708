"""The benchmarks of models, training and data run, and count what they should."""

import json
import tempfile
from pathlib import Path
from types import SimpleNamespace

import bench_data
import bench_dtypes
import bench_models
import bench_training
import corpus
import demo
import machine
import model_pairs
import numpy as np
import pytest
import record
import report
import rounds
import tables
import torch
from torch.utils.flop_counter import FlopCounterMode

import fastbert

ROOT = Path(__file__).resolve().parents[2]


def page_of(folder):
    report.write(folder)
    return (folder / "README.md").read_text(encoding="utf-8")


@pytest.fixture(autouse=True)
def memory(monkeypatch):
    """This process gives its memory back: it has other tests to run. A product that is timed for a ceiling is small."""
    for script in (bench_models, bench_training):
        monkeypatch.setattr(script, "keep_freed_memory", lambda: False)
    monkeypatch.setitem(machine.SIDE, "cpu", 64)


@pytest.mark.parametrize("fill", [0.4, 0.8, 1.0])
@pytest.mark.parametrize(("sequences", "longest"), [(4, 128), (512, 128), (1, 2048)])
def test_lengths_fill_what_they_should(sequences, longest, fill):
    lengths = bench_models.lengths_of(sequences, longest, fill)
    assert len(lengths) == sequences and max(lengths) == longest and min(lengths) >= 1
    if sequences > 1:
        assert sum(lengths) / (sequences * longest) == pytest.approx(fill, abs=0.01)
        assert len(set(lengths)) > min(sequences, longest) // 3 or fill == 1


@pytest.mark.parametrize(
    "preset", ["bert-base", "albert-base-v2", "electra-small", "modernbert-base", "deberta-v3-base"]
)
def test_model_flops_are_those_that_torch_counts(preset):
    """Of transformers' own model, without padding, every token picked: there nothing is left out."""
    n = 16
    config = model_pairs.config_of(preset, 3).replace(vocab_size=300, pad_token_id=0)
    if config.windows:
        # transformers computes every score, also outside of a window
        config = config.replace(windows=(None,) * 3)
    with tempfile.TemporaryDirectory() as directory:
        theirs, _, _ = model_pairs.load_pair(config, directory)
    theirs.set_attn_implementation("eager")
    ids = torch.randint(1, 300, (2, n))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        getattr(theirs, theirs.base_model_prefix)(input_ids=ids)
    counted = counter.get_total_flops()
    stated = model_pairs.model_flops(config, [n, n], 0, "inference")
    # DeBERTa projects its table of positions too, and multiplies with all of it before it gathers
    assert stated <= counted * 1.001
    if not config.pos_att_type:
        assert stated == pytest.approx(counted, rel=0.01)
        with FlopCounterMode(display=False) as counter:
            theirs(input_ids=ids, labels=ids).loss.backward()
        stated = model_pairs.model_flops(config, [n, n], 2 * n, "train")
        assert stated == pytest.approx(counter.get_total_flops(), rel=0.03)


@pytest.mark.parametrize("preset", ["bert-base", "albert-base-v2"])
def test_model_flops_of_a_training_step_are_those_that_fastbert_does(preset):
    """A quarter picked: what the last layer does not compute of the others is not claimed either."""
    n = 16
    config = model_pairs.config_of(preset, 3).replace(vocab_size=300, pad_token_id=0)
    ids = torch.randint(1, 300, (2, n))
    labels = ids.masked_fill(torch.arange(n) >= n // 4, -100)
    # oneDNN's products are not counted
    with torch.backends.mkldnn.flags(enabled=False), FlopCounterMode(display=False) as counter:
        fastbert.MaskedLM(config)(input_ids=ids, labels=labels).loss.backward()
    stated = model_pairs.model_flops(config, [n, n], n // 2, "train")
    assert stated == pytest.approx(counter.get_total_flops(), rel=0.01)
    assert stated < 0.9 * model_pairs.model_flops(config, [n, n], 2 * n, "train")


def test_pairs_in_a_window():
    for n, window in ((1, 0), (5, 2), (9, 3), (9, 20), (8, 7)):
        place = torch.arange(n)
        seen = int(((place[:, None] - place).abs() <= window).sum())
        assert model_pairs.scores_of(n, window) == seen
    assert model_pairs.scores_of(7, None) == 49


def test_padding_a_batch_of_fixed_capacity_loses_nothing(tmp_path):
    file = corpus.write_text(tmp_path / "text.txt", corpus.make_documents(60))
    bench_training.prepare([file], corpus.small_tokenizer(tmp_path), tmp_path / "shards", progress=False)
    shards = bench_training.Shards.open(tmp_path / "shards")
    loader = bench_training.batches_of(shards, {"max_seq_length": 12, "tokens_per_batch": 64}, 0)
    batches = bench_training.in_order(loader, loader.num_batches(0) + 2)
    for batch in batches:
        padded = bench_training.padded(batch)
        real = padded["attention_mask"].bool()
        T = int(batch.cu_seqlens[-1])
        assert torch.equal(padded["input_ids"][real], batch.input_ids[:T])
        assert torch.equal(padded["labels"][real], batch.labels[:T])
        assert (padded["labels"][~real] == -100).all() and int(real.sum()) == T
        assert real.sum(1).max() == real.shape[1]
        assert int((padded["labels"] != -100).sum()) == int((batch.labels != -100).sum()) > 0


def test_time_to_an_accuracy():
    rows = [{"seconds": 10.0, "accuracy": 0.1}, {"seconds": 20.0, "accuracy": 0.3}, {"seconds": 30.0, "accuracy": 0.25}]
    assert bench_training.seconds_to(rows, 0.1) == 10.0
    assert bench_training.seconds_to(rows, 0.2) == pytest.approx(15.0)
    assert bench_training.seconds_to(rows, 0.05) == pytest.approx(5.0)
    assert bench_training.seconds_to(rows, 0.31) is None
    assert bench_training.common_accuracy([{"held_out": rows}]) == 0.25


@pytest.fixture
def narrow(monkeypatch):
    """Models of one layer and few columns."""
    config_of = model_pairs.config_of
    sizes = dict(hidden_size=64, num_attention_heads=2, intermediate_size=96, vocab_size=1100)
    monkeypatch.setattr(model_pairs, "config_of", lambda model, *_: config_of(model, 1).replace(**sizes))


def test_models_end_to_end(narrow, tmp_path, capsys):
    bench_models.main(["--quick", "--models", "bert-tiny", "--only", "fill", "--output", str(tmp_path)])
    result = json.loads((tmp_path / "models.json").read_text(encoding="utf-8"))
    assert {"machine", "date", "command", "settings", "rows", "not_measured"} == result.keys()
    assert [row["pass"] for row in result["rows"]] == ["inference", "train"] * 2
    for row in result["rows"]:
        assert {"transformers sdpa", "transformers eager", "fastbert"} <= row["seconds"].keys()
        assert row["difference"] < 1e-4
        for name, figures in row["summary"].items():
            assert figures["median_s"] == pytest.approx(sorted(row["seconds"][name])[1], rel=1e-3)
            assert figures["real_tokens_per_s"] == pytest.approx(row["tokens_real"] / figures["median_s"], rel=0.01)
    assert "flash_attention_2" in " ".join(result["not_measured"])
    assert "real tokens/s" in capsys.readouterr().out
    assert "fill: 4 rows" in page_of(tmp_path)


def test_families_end_to_end(narrow, tmp_path, capsys):
    bench_models.main(["families", "--models", "bert-base", "--quick", "--output", str(tmp_path)])
    result = json.loads((tmp_path / "families.json").read_text(encoding="utf-8"))
    # by these names older results are compared
    assert [record.name_of(row) for row in result["rows"]] == [
        "bert, 1 layers, train", "bert, 1 layers, inference", "one text of 8 tokens through BERT-base",
    ]  # fmt: skip
    for row in result["rows"][:2]:
        assert list(row["seconds"]) == list(bench_models.OF_FAMILIES) and row["tokens_real"] == 615
        assert all(len(times) == 3 for times in row["seconds"].values())
    assert result["rows"][2]["seconds"].keys() == {"transformers", "swapped"}
    assert "fastbert on MKL" in capsys.readouterr().out
    assert tables.single_line(result).startswith("one text of 8 tokens through BERT-base: ")
    page = page_of(tmp_path)
    assert "| bert |" in page and "(families.png)" in page


def test_training_step_end_to_end(narrow, tmp_path, monkeypatch):
    memory = {"peak_memory_mib": 20, "memory_before_model_mib": 10}
    monkeypatch.setattr(bench_models, "memory_of_a_process", lambda *_: memory)
    bench_models.main(["step", "--rounds", "3", "--output", str(tmp_path)])
    result = json.loads((tmp_path / "training_step.json").read_text(encoding="utf-8"))
    assert [row["case"] for row in result["rows"]] == list(bench_models.LENGTHS)
    assert record.name_of(result["rows"][1]) == "BERT-base training step, no padding"
    for row in result["rows"]:
        assert [len(row["seconds"][library]) for library in bench_models.ON_A_CPU] == [3, 3, 3]
        assert row["summary"]["fastbert"]["peak_memory_mib"] == 20 and row["difference"] < 1e-5
    page = page_of(tmp_path)
    assert "20 -> 20 MiB" in page and "(training_step.png)" in page


def test_memory_of_a_process(narrow, tmp_path, monkeypatch, capsys):
    """What the process does that measures it: three steps of the model in a directory."""
    model = model_pairs.Model("bert-base", 1, torch.device("cpu"))
    steps = []
    train_step = model_pairs.train_step
    monkeypatch.setattr(model_pairs, "train_step", lambda *rest: steps.append(rest) or train_step(*rest))
    for name in bench_models.ON_A_CPU:
        arguments = ["step", "--memory", name, "--case", "no padding", "--weights", model.directory.name]
        bench_models.main(arguments)
        found = json.loads(capsys.readouterr().out)
        assert found["peak_memory_mib"] >= found["memory_before_model_mib"] > 100
    assert len(steps) == 9


def test_names_of_results_are_those_of_the_committed_ones():
    """So that a new run is compared with them, row by row."""
    results = record.read(report.FEATURED)
    families = {(case.title, case.passes) for case in bench_models.family_cases([], 4)}
    names = {record.name_of(row) for row in results["families"]["rows"]}
    for case in bench_models.family_cases([], 4):
        assert bench_models.names_of(case, case.layers)["name"] in names
    assert len(families) == 19 and "300 sentences embedded" in names
    for case in bench_models.step_cases(torch.device("cpu")):
        assert bench_models.names_of(case, 12)["name"] in {row["name"] for row in results["training_step"]["rows"]}
    sweeps = {record.name_of(row) for row in results["models"]["rows"]}
    for case in bench_models.cases(torch.device("cpu"), [], bench_models.SWEEPS, False):
        layers = case.layers or fastbert.preset(case.model).num_hidden_layers
        share = case.picked if case.passes == "train" else None
        row = {"sweep": case.sweep, "model": case.model, "layers": layers, "pass": case.passes, "dtype": case.dtype}
        row |= {"sequences": len(case.lengths), "length": max(case.lengths), "fill": case.fill, "picked_share": share}
        assert record.name_of(row) in sweeps


def test_a_wrong_implementation_is_not_timed(monkeypatch):
    device = torch.device("cpu")
    case = bench_models.Case(
        "fill", "bert-tiny", (16, 9), "inference", layers=1, implementations=("transformers eager", "fastbert")
    )
    model = model_pairs.Model("bert-tiny", 1, device)
    call = model_pairs.Model.call

    def changed(self, implementation, *rest):
        found = call(self, implementation, *rest)
        return (lambda: found() * 1.01) if implementation in wrong else found

    monkeypatch.setattr(model_pairs.Model, "call", changed)
    wrong, missing = {"transformers eager"}, {}
    calls, _ = model_pairs.checked(model, case, device, missing)
    assert "fastbert" in calls and "transformers eager" not in calls
    assert any("wrong: differs" in reason for reason in missing.values())
    wrong = {"fastbert"}
    with pytest.raises(ValueError, match="wrong"):
        model_pairs.checked(model, case, device, {})


def test_sweeps_go_as_far_as_the_families_allow():
    found = bench_models.cases(torch.device("cpu"), [], bench_models.SWEEPS, False)
    longest = {}
    for case in found:
        longest[case.model, case.passes] = max(longest.get((case.model, case.passes), 0), *case.lengths)
    for family, model in model_pairs.FAMILIES.items():
        positions = fastbert.preset(model).max_length
        # DeBERTa's relative positions know no end
        wanted = {"modernbert": 8192, "deberta-v2": 2048}.get(family, 512)
        assert longest[model, "inference"] == wanted <= positions and longest[model, "train"] >= 512, family
        of_family = [case for case in found if case.sweep == "families" and case.model == model]
        fills = {(round(case.fill, 1), case.passes) for case in of_family}
        assert fills == {(fill, passes) for fill in (0.4, 0.6, 0.8, 1.0) for passes in ("inference", "train")}
    assert all(
        "transformers eager" not in case.implementations for case in found if max(case.lengths) >= bench_models.LONG
    )
    # of models that are named nothing else is loaded
    named = bench_models.cases(torch.device("cpu"), ["modernbert-base"], bench_models.SWEEPS, False)
    assert {(case.model, case.layers) for case in named} == {("modernbert-base", None)}
    assert max(max(case.lengths) for case in named) == 8192
    # a model is loaded once
    loads = [(case.model, case.layers) for case in found]
    assert len({place for place in loads}) == 1 + sum(a != b for a, b in zip(loads, loads[1:]))


def test_rounds_go_on_while_the_spread_is_wide(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(rounds.time, "perf_counter", lambda: now[0])
    # two rounds take memory, and the others none
    taken = iter([0, 10**6, 10**6, 2 * 10**6])
    monkeypatch.setattr(rounds, "pages_taken", lambda: next(taken, 2 * 10**6))

    def calls(*durations):
        times = iter(durations)

        def call():
            now[0] += next(times)

        return {"fastbert": call}

    def took(durations, *arguments, **settings):
        return rounds.take_turns(calls(*durations), *arguments, **settings)["fastbert"]

    # those are not kept; then the least that is asked for, which agree
    assert took([9.0, 8.0, *[1.0] * 20], (4, 12), seconds=1e9) == pytest.approx([1.0] * 4)
    assert len(took([1.0, 1.5] * 20, (4, 12), seconds=1e9)) == 12, "a wide spread, all the rounds"
    assert len(took([1.0, 1.5, 1.0, 1.5, *[1.0] * 20], (4, 12), seconds=1e9)) == 8
    assert len(took([10.0] * 20, (4, 12), seconds=5.0)) == 3, "never fewer than three"
    assert len(took([0.01] * 200, (5, 20))) == 20, "short calls get all rounds"
    assert len(took([1.0] * 5, (2, 2))) == 2


@pytest.fixture
def text(monkeypatch):
    """A small text in place of the demo's, which takes seconds to read."""

    def write(folder):
        folder.mkdir()
        for seed, part in enumerate(("train", "held-out")):
            documents = corpus.make_documents(200 - 150 * seed, seed)
            corpus.write_text(folder / f"{part}-made-up.txt", documents)

    monkeypatch.setattr(demo, "write_text", write)


def test_data_path_end_to_end(text, tmp_path):
    bench_data.main(["--quick", "--rounds", "2", "--output", str(tmp_path)])
    result = json.loads((tmp_path / "data.json").read_text(encoding="utf-8"))
    rows = {row["name"]: row for row in result["rows"]}
    assert rows["prepare"]["seconds"].keys() == {"fastbert", "tokenizers alone"}
    assert rows["loader, mlm"]["ratio"] > 1, "the loader is slower than the model"
    page = page_of(tmp_path)
    assert f"**{rows['loader, mlm']['ratio']:.0f} times**" in page and "| prepare |" in page


def test_dtypes_end_to_end(tmp_path, monkeypatch):
    """With vectors that are off by a known angle: their figures, and the page."""
    angles = {"fp32": 0.0, "bf16": 0.01, "int8": 0.1}

    class Embedder:
        encoder = SimpleNamespace(products="fp32")

        def encode(self, texts):
            found, angle = [], angles[self.encoder.products]
            for text in texts:
                x, y = np.random.default_rng(len(text)).normal(size=(2, 8))
                x /= np.linalg.norm(x)
                y -= (x @ y) * x
                found.append(np.cos(angle) * x + np.sin(angle) * y / np.linalg.norm(y))
            return np.array(found)

    monkeypatch.setattr(bench_dtypes, "embedder", Embedder)
    monkeypatch.setattr(bench_dtypes, "pairs", lambda count: [["a" * i for i in range(1, count + 1)]] * 3)
    monkeypatch.setattr(bench_dtypes.low_precision, "gain", lambda dtype: 2.0 * (dtype == "int8"))
    bench_dtypes.main(["--quick", "--output", str(tmp_path)])
    result = json.loads((tmp_path / "dtypes.json").read_text(encoding="utf-8"))
    for dtype, angle in angles.items():
        costs = result["settings"]["costs"][dtype]
        assert costs["smallest_cosine"] == pytest.approx(np.cos(angle), abs=1e-5)
        # labels 2 and 1 are the same texts here, 0 others
        assert 0.7 < costs["spearman"] < 0.95
    assert result["rows"][0]["seconds"].keys() == {"fastbert", "fastbert int8"}
    assert "int8: smallest cosine 0.9950, mean 0.9950" in page_of(tmp_path)
    assert "| int8 | 0.9950 | 0.9950 |" in tables.dtypes_table(result)


def test_training_end_to_end(text, tmp_path):
    bench_training.main(["--quick", "--steps", "20", "--output", str(tmp_path)])
    result = json.loads((tmp_path / "training.json").read_text(encoding="utf-8"))
    names = [row["implementation"] for row in result["rows"]]
    # accelerate is a dependency of nobody here
    assert names[0] == "fastbert" and set(names) | set(result["not_measured"]) >= {bench_training.TRAINER}
    losses = [point["loss"] for point in result["rows"][0]["curve"]]
    assert len(losses) == 2 and losses[1] < losses[0]
    page = page_of(tmp_path)
    assert "(training.png)" in page and "held-out accuracy" in page
