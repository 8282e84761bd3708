"""One training step of BERT-base: fastbert's MaskedLM against transformers' BertForMaskedLM with sdpa attention.

    python benchmarks/bench_training_step.py             8 sequences of at most 128 tokens, fp32, on the CPU
    python benchmarks/bench_training_step.py --rounds 5  shorter

A step is forward, backward and AdamW. Both start from the same weights and from the same padded batch, so fastbert's
step includes packing it. Dropout is 0 in both, and their losses are compared before any clock starts. Two batches: one
of text of uneven length, which fills 60 % of its padded rectangle, and one that fills it wholly.

fastbert's products on a CPU go through oneDNN, transformers' through MKL, as torch chooses; MKL keeps to AVX2 on
processors that are not Intel's. How much of the difference that makes, a third row says: fastbert on MKL.

Steps alternate in one process (A B, B A, A B, ...), so that whatever else the machine does falls on both alike; this is
why it is a plain script and no pytest-benchmark suite, which measures one thing after the other. Peak memory is that of
a process of its own for each. Writes benchmarks/results/cpu/training_step.json. Linux only: it reads /proc.
"""

import argparse
import gc
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import date
from importlib.metadata import version
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ["HF_HUB_OFFLINE"] = "1"

import fastbert  # noqa: E402

SEQUENCES, LENGTH, VOCABULARY, MASK = 8, 128, 30522, 103
LIBRARIES = ("transformers", "fastbert", "fastbert on MKL")
# the lengths of the uneven batch: evenly spread, 60 % of the rectangle
LENGTHS = {"text, 60 % fill": [26, 40, 55, 70, 84, 99, 113, 128], "no padding": [LENGTH] * SEQUENCES}
RESULTS = ROOT / "benchmarks" / "results" / "cpu" / "training_step.json"


def padded_batch(lengths, share=0.15):
    """HuggingFace's arguments for sequences of these lengths: random words, `share` of the real ones picked."""
    generator = torch.Generator().manual_seed(0)
    attention_mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    ids = torch.randint(1000, VOCABULARY, attention_mask.shape, generator=generator) * attention_mask
    picked = (torch.rand(ids.shape, generator=generator) < share) & attention_mask.bool()
    return {
        "input_ids": ids.masked_fill(picked, MASK),
        "attention_mask": attention_mask,
        "labels": ids.masked_fill(~picked, -100),
    }


def load(library, directory):
    """The model in `directory`, in training mode, and its optimizer."""
    if library != "transformers":
        from fastbert.heads import MaskedLM

        model = MaskedLM.from_pretrained(directory)
    else:
        from transformers import BertForMaskedLM

        model = BertForMaskedLM.from_pretrained(directory, attn_implementation="sdpa")
    model.train()
    return model, torch.optim.AdamW(model.parameters(), lr=1e-5, weight_decay=0.01, fused=True)


def step(library, model, optimizer, batch):
    """One training step; its loss."""
    with torch.backends.mkldnn.flags(enabled=library != "fastbert on MKL"):
        loss = model(**batch).loss
        loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.item()


def save_weights(directory):
    """BERT-base with random weights and without dropout, as a HuggingFace directory."""
    from transformers import BertConfig, BertForMaskedLM

    torch.manual_seed(0)
    config = BertConfig(vocab_size=VOCABULARY, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    BertForMaskedLM(config).save_pretrained(directory)


def same_loss(losses, what):
    difference = max(losses.values()) - min(losses.values())
    if difference > 1e-5:
        raise AssertionError(f"the losses differ by {difference:.1e} {what}: {losses}")
    return difference


def interleaved_seconds(directory, batch, rounds):
    """{library: seconds of each step}, and the largest difference of their losses."""
    models = {library: load(library, directory) for library in LIBRARIES}
    with torch.no_grad():
        losses = {library: model(**batch).loss.item() for library, (model, _) in models.items()}
    largest = same_loss(losses, "before the first step")
    seconds = {library: [] for library in LIBRARIES}
    for i in range(-1, rounds):  # the first round warms up
        for library in LIBRARIES[:: 1 if i % 2 else -1]:
            start = time.perf_counter()
            losses[library] = step(library, *models[library], batch)
            if i >= 0:
                seconds[library].append(time.perf_counter() - start)
        if i == -1:
            largest = max(largest, same_loss(losses, "in the first step"))
    return seconds, largest


def peak_mib(directory, case, library):
    """Peak memory in MiB of a process that does nothing but three training steps, and what it held before the model."""
    command = [sys.executable, __file__, "--memory", library, "--case", case, "--weights", str(directory)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def high_water_mib():
    # not resource.getrusage: its maximum begins with that of the process that started this one
    status = Path("/proc/self/status").read_text()
    return round(int(status.partition("VmHWM:")[2].split()[0]) / 1024)


def measure_memory(directory, case, library):
    before = high_water_mib()
    model, optimizer = load(library, directory)
    batch = padded_batch(LENGTHS[case])
    for _ in range(3):
        step(library, model, optimizer, batch)
    print(json.dumps({"peak": high_water_mib(), "before": before}))


def spread(seconds):
    low, median, high = statistics.quantiles(seconds, n=4)
    return {"median_s": round(median, 4), "quartiles_s": [round(low, 4), round(high, 4)]}


def run_case(directory, case, rounds):
    batch = padded_batch(LENGTHS[case])
    memory = {library: peak_mib(directory, case, library) for library in LIBRARIES}
    seconds, difference = interleaved_seconds(directory, batch, rounds)
    gc.collect()
    ratios = [a / b for a, b in zip(seconds["transformers"], seconds["fastbert"])]
    real = int(batch["attention_mask"].sum())
    row = {
        "case": case,
        "tokens_padded": SEQUENCES * LENGTH,
        "tokens_real": real,
        "picked": int((batch["labels"] != -100).sum()),
        "largest_loss_difference": difference,
        "speedup": round(statistics.median(seconds["transformers"]) / statistics.median(seconds["fastbert"]), 2),
        "speedup_on_mkl": round(
            statistics.median(seconds["transformers"]) / statistics.median(seconds["fastbert on MKL"]), 2
        ),
        "speedup_quartiles": [round(q, 2) for q in statistics.quantiles(ratios, n=4)[::2]],
    }
    for library in LIBRARIES:
        median = statistics.median(seconds[library])
        row[library] = {
            **spread(seconds[library]),
            "real_tokens_per_s": round(real / median),
            "peak_memory_mib": memory[library]["peak"],
            "memory_before_model_mib": memory[library]["before"],
            "seconds": [round(s, 4) for s in seconds[library]],
        }
    return row


def machine():
    cpu = platform.processor()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), cpu)
    return {
        "date": date.today().isoformat(),
        "cpu": cpu,
        "threads": torch.get_num_threads(),
        "load_average_before": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "transformers")},
        "fastbert": fastbert.__version__,
    }


def describe(result):
    """The device, versions and shape behind a result, in a line."""
    return (
        f"{result['cpu']}, {result['threads']} threads, {result['dtype']}, {result['shape']} tokens, "
        f"Python {result['python']}, torch {result['torch']}, transformers {result['transformers']}"
    )


def markdown(result):
    """The result as the table that the README shows."""
    rows = [
        "| batch | transformers | fastbert | speed | the same on MKL | peak memory |",
        "|---|---|---|---|---|---|",
    ]
    for case in result["cases"]:
        theirs, ours = (case[library] for library in LIBRARIES[:2])
        rows.append(
            f"| {case['case']} | {theirs['median_s']:.2f} s | {ours['median_s']:.2f} s | **{case['speedup']:.2f}x** "
            f"| {case['speedup_on_mkl']:.2f}x | {theirs['peak_memory_mib']} -> {ours['peak_memory_mib']} MiB |"
        )
    return "\n".join(rows)


def plot(result, path):
    """Speed and peak memory as bars."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    panels = (("real_tokens_per_s", "real tokens per second (more is better)"), ("peak_memory_mib", "peak memory, MiB"))
    for axis, (name, title) in zip(axes, panels):
        for i, (library, colour) in enumerate(zip(LIBRARIES, ("#9aa5b1", "#2563eb", "#93c5fd"))):
            values = [case[library][name] for case in result["cases"]]
            bars = axis.bar([x + 0.28 * i for x in range(len(values))], values, 0.26, label=library, color=colour)
            axis.bar_label(bars, fmt="%.0f", fontsize=8)
        axis.set_xticks([x + 0.28 for x in range(len(values))], [case["case"] for case in result["cases"]])
        axis.set_title(title, fontsize=10)
        axis.margins(y=0.12)
        axis.spines[["top", "right"]].set_visible(False)
    axes[1].legend(frameon=False, loc="lower right")
    figure.suptitle(f"BERT-base training step. {describe(result)}", fontsize=8)
    figure.savefig(path, dpi=130)


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=15, help="timed steps of each library")
    parser.add_argument("--output", type=Path, default=RESULTS)
    # how it calls itself for memory
    parser.add_argument("--memory", choices=LIBRARIES, help=argparse.SUPPRESS)
    parser.add_argument("--case", choices=LENGTHS, help=argparse.SUPPRESS)
    parser.add_argument("--weights", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.memory:
        return measure_memory(options.weights, options.case, options.memory)

    result = {
        "what": "BERT-base masked-LM training step: forward, backward, AdamW",
        "shape": f"{SEQUENCES} x {LENGTH}",
        "dtype": "float32",
        "rounds": options.rounds,
        **machine(),
        "cases": [],
    }
    with tempfile.TemporaryDirectory() as directory:
        save_weights(directory)
        for case in LENGTHS:
            row = run_case(directory, case, options.rounds)
            result["cases"].append(row)
            ours, theirs = row["fastbert"], row["transformers"]
            print(
                f"{case}: transformers {theirs['median_s']:.3f} s, fastbert {ours['median_s']:.3f} s, "
                f"{row['speedup']:.2f}x (quartiles {' to '.join(map(str, row['speedup_quartiles']))}), "
                f"on MKL {row['speedup_on_mkl']:.2f}x; "
                f"peak memory {theirs['peak_memory_mib']} and {ours['peak_memory_mib']} MiB; "
                f"loss difference {row['largest_loss_difference']:.0e}",
                flush=True,
            )
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    plot(result, options.output.with_suffix(".png"))
    print(f"\n{markdown(result)}\n\n{describe(result)}\nwritten to {options.output}, with a plot beside it")


if __name__ == "__main__":
    main()
