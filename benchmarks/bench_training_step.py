"""One training step of BERT-base: fastbert's MaskedLM against transformers' BertForMaskedLM with sdpa attention.

    python benchmarks/bench_training_step.py             8 sequences of at most 128 tokens, fp32, on the CPU
    python benchmarks/bench_training_step.py --rounds 5  shorter, and the same number of all

A step is forward, backward and AdamW. Both start from the same weights and from the same padded batch, so fastbert's
step includes packing it. Dropout is 0 in both, and their losses are compared before any clock starts. Two batches: one
of text of uneven length, which fills 60 % of its padded rectangle, and one that fills it wholly.

fastbert's products on a CPU go through oneDNN, transformers' through MKL, as torch chooses; MKL keeps to AVX2 on
processors that are not Intel's. How much of the difference that makes, a third row says: fastbert on MKL.

Steps alternate in one process (A B, B A, A B, ...), so that whatever else the machine does falls on both alike; this is
why it is a plain script and no pytest-benchmark suite, which measures one thing after the other. Peak memory is that of
a process of its own for each, with the allocator as it is; the process that times keeps what it frees
(machine.keep_memory). Writes training_step.json; benchmarks/report.py draws it. Linux only: it reads /proc.
"""

import argparse
import functools
import gc
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
os.environ["HF_HUB_OFFLINE"] = "1"

import machine
import record
from rounds import take_turns

SEQUENCES, LENGTH, VOCABULARY, MASK = 8, 128, 30522, 103
LIBRARIES = ("transformers", "fastbert", "fastbert on MKL")
# the lengths of the uneven batch: evenly spread, 60 % of the rectangle
LENGTHS = {"text, 60 % fill": [26, 40, 55, 70, 84, 99, 113, 128], "no padding": [LENGTH] * SEQUENCES}


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
        from fastbert.model.heads import MaskedLM

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
    first = {library: step(library, *model, batch) for library, model in models.items()}
    largest = max(largest, same_loss(first, "in the first step"))
    calls = {library: functools.partial(step, library, *model, batch) for library, model in models.items()}
    # a case takes five minutes at most
    return take_turns(calls, rounds, seconds=300.0), largest


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


def run_case(directory, case, rounds):
    batch = padded_batch(LENGTHS[case])
    memory = {library: peak_mib(directory, case, library) for library in LIBRARIES}
    seconds, difference = interleaved_seconds(directory, batch, rounds)
    gc.collect()
    real = int(batch["attention_mask"].sum())
    summary = record.summary(seconds, real)
    for library, found in memory.items():
        summary[library] |= {"peak_memory_mib": found["peak"], "memory_before_model_mib": found["before"]}
    return {
        "name": f"BERT-base training step, {case}", "case": case, "tokens_real": real,
        "tokens_padded": SEQUENCES * LENGTH, "picked": int((batch["labels"] != -100).sum()), "difference": difference,
        "seconds": {library: [round(s, 4) for s in times] for library, times in seconds.items()}, "summary": summary,
    }  # fmt: skip


def markdown(result):
    """The result as the table that the README shows."""
    rows = [
        "| batch | transformers | fastbert | speed | the same on MKL | peak memory |",
        "|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        seconds, figures = row["seconds"], row["summary"]
        theirs, ours = (figures[library] for library in LIBRARIES[:2])
        on_mkl = record.ratio(seconds["transformers"], seconds["fastbert on MKL"])
        rows.append(
            f"| {row['case']} | {theirs['median_s']:.2f} s | {ours['median_s']:.2f} s "
            f"| **{theirs['times_fastbert']:.2f}x** | {on_mkl:.2f}x "
            f"| {theirs['peak_memory_mib']} -> {ours['peak_memory_mib']} MiB |"
        )
    return "\n".join(rows)


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, help="timed steps of each library; default: 12 to 20")
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/cpu-<name>")
    # how it calls itself for memory
    parser.add_argument("--memory", choices=LIBRARIES, help=argparse.SUPPRESS)
    parser.add_argument("--case", choices=LENGTHS, help=argparse.SUPPRESS)
    parser.add_argument("--weights", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.memory:
        return measure_memory(options.weights, options.case, options.memory)

    cpu = torch.device("cpu")
    file = (options.output or machine.folder(cpu)) / "training_step.json"
    rounds = (options.rounds, options.rounds) if options.rounds else (12, 20)
    result = record.new(cpu, {
        "what": "BERT-base masked-LM training step: forward, backward, AdamW", "shape": f"{SEQUENCES} x {LENGTH}",
        "dtype": "float32", "rounds": rounds, "memory_kept": machine.keep_memory(),
    })  # fmt: skip
    with tempfile.TemporaryDirectory() as directory:
        save_weights(directory)
        for case in LENGTHS:
            row = run_case(directory, case, rounds)
            result["rows"].append(row)
            print(f"{case}: loss difference {row['difference']:.0e}", flush=True)
            record.save(result, file)
    print(f"\n{markdown(result)}\n\n{record.about(result)}\nwritten to {file}; python benchmarks/report.py draws it")


if __name__ == "__main__":
    main()
