"""One training step of BERT-base on a GPU: fastbert's MaskedLM against transformers' BertForMaskedLM.

    python benchmarks/bench_training_step_gpu.py          part of make gpu
    python benchmarks/bench_training_step_gpu.py --own    fastbert's own step on packed batches alone: under a minute

A step is forward, backward and AdamW, in bf16 autocast, with BERT's dropout of 0.1, on 65,536 tokens of padded
rectangle: 512 sequences of at most 128 tokens, or 128 of at most 512, of text of uneven length (60 % fill) and without
padding. transformers attends with sdpa, eager and compiled. "fastbert" gets the same padded batch and packs it in every
step; "fastbert, packed" gets the batch packed, as fastbert's own loader makes it. All start from the same weights, and
their losses without dropout are compared before any clock starts. Steps take turns. Model FLOPs count real tokens and
picked rows of the vocabulary head, whatever a library computes.

Writes training_step.json and training_step.md; with --own own_step.json and own_step.md, where each row also says how
long the device spent in each kernel. Without a GPU it rehearses with a tiny model on the CPU.
"""

import argparse
import functools
import gc
import os
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ["HF_HUB_OFFLINE"] = "1"
if __name__ == "__main__" and not torch.cuda.is_available():
    # a rehearsal; before anything imports triton
    os.environ |= {"TRITON_INTERPRET": "1", "FASTBERT_IMPL": "triton"}

import bench_training_step as on_cpu
import machine
import precompile
import record

import fastbert
from fastbert.packing import pack
from fastbert.proof import op_cases

TINY = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=40, vocab_size=1100)
LIBRARIES = ("transformers", "transformers, compiled", "fastbert", "fastbert, packed")
OWN = LIBRARIES[-1]


def save_weights(directory, device):
    """BERT-base, or in a rehearsal a tiny one, with random weights, as a HuggingFace directory; its config."""
    torch.manual_seed(0)
    config = fastbert.preset("bert-base")
    if device.type != "cuda":
        config = config.replace(**TINY)
    fastbert.MaskedLM(config).save_pretrained(directory)
    return config


def cases(device):
    """{name: lengths}, the most telling first."""
    if device.type != "cuda":
        return {"S=8, text": (3, 8, 5, 8, 2)}
    tokens = 65536 if machine.memory(device) > 100 * 2**30 else 16384
    # as many sequences as fill the rectangle
    text = {f"S={S}, text": tuple(op_cases.ragged_lengths(2 * tokens, S)[: tokens // S]) for S in (128, 512)}
    return text | {f"S={S}, no padding": tuple(op_cases.full_lengths(tokens, S)) for S in (128, 512)}


def batch_of(library, lengths, vocabulary, device):
    padded = on_cpu.padded_batch(lengths)
    padded = {name: x.clamp(max=vocabulary - 1).to(device) for name, x in padded.items()}
    if library != OWN:
        return padded
    return {"input_ids": pack(padded["input_ids"], padded["attention_mask"], labels=padded["labels"])[0]}


def load(library, directory, device):
    """(model, optimizer), in training mode."""
    model, _ = on_cpu.load(library.partition(",")[0], directory)
    model = model.to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, weight_decay=0.01, fused=True)
    if library.endswith("compiled"):
        model = torch.compile(model, dynamic=False)
    return model, optimizer


def loss_of(model, batch, device):
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        return model(**batch).loss


def compile_kernels(directory, device, lengths, vocabulary):
    """Compile what fastbert's step launches. The weights of its model are then anything: it is thrown away."""
    try:
        model, _ = load(OWN, directory, device)
        batch = batch_of(OWN, lengths, vocabulary, device)
        with precompile.compiling():
            loss_of(model, batch, device).backward()
    except Exception as failure:  # told again where it is timed
        print(f"not compiled: {failure}".partition("\n")[0][:200], flush=True)


def kernel_times(call):
    """[{"kernel", "calls", "us"}] of what a call runs on the device, the longest first."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    found = [event for event in profile.key_averages() if event.self_device_time_total]
    found.sort(key=lambda event: -event.self_device_time_total)
    return [
        {"kernel": event.key[:120], "calls": event.count, "us": round(event.self_device_time_total, 1)}
        for event in found[:60]
    ]


def step(model, optimizer, batch, device):
    loss = loss_of(model, batch, device)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.item()


def model_flops(config, lengths, picked):
    """FLOPs of a step that computes what the loss depends on, without the last layer's rows that nobody reads."""
    D, L, F = config.hidden_size, config.num_hidden_layers, config.intermediate_size
    linear = sum(lengths) * L * (8 * D * D + 4 * D * F)
    scores, tokens = sum(n * n for n in lengths), sum(lengths)
    # of a row of the last layer that is not picked the loss sees the key and the value alone
    unseen = (tokens - picked) * (4 * D * D + 4 * D * F + 4 * D * scores / tokens)
    head = picked * (2 * D * D + 2 * D * config.vocab_size)
    return round(3 * (linear + L * 4 * D * scores - unseen + head))


@torch.no_grad()
def loss_without_dropout(model, batch, device):
    model.eval()
    loss = loss_of(model, batch, device).item()
    model.train()
    return loss


def run_case(name, lengths, libraries, directory, config, device, ceiling, rounds, end):
    models, losses, gib, failed = {}, {}, {}, {}
    batches = {library: batch_of(library, lengths, config.vocab_size, device) for library in libraries}

    def attempt(library, call):
        """What `call` returns. Where it fails, the library leaves `models`. fastbert's own failure is raised."""
        try:
            return call()
        except Exception as failure:
            if library.startswith("fastbert"):
                raise
            failed[library] = f"{type(failure).__name__}: {failure}".partition("\n")[0][:200]
            models.pop(library, None)
        if device.type == "cuda":
            torch.cuda.empty_cache()
        return None

    for library in libraries:
        loaded = attempt(library, functools.partial(load, library, directory, device))
        if loaded:
            models[library] = loaded
    for library in list(models):
        # compiled is the same function; an evaluation would compile it once more
        if not library.endswith("compiled"):
            one = functools.partial(loss_without_dropout, models[library][0], batches[library], device)
            losses[library] = attempt(library, one)
    losses = {library: loss for library, loss in losses.items() if library in models}
    difference = max(losses.values()) - min(losses.values())
    if difference > (0.02 if device.type == "cuda" else 1e-4):
        raise AssertionError(f"{name}: the losses differ by {difference:.1e}: {losses}")
    seconds = {library: [] for library in models}

    def turn(library, i):
        one = functools.partial(step, *models[library], batches[library], device)
        if i == -1 and device.type == "cuda":
            gib[library] = machine.gib_per_call(device, one)
        start = time.perf_counter()
        one()
        if i >= 0:
            seconds[library].append(time.perf_counter() - start)

    warm_up = 2 if device.type == "cuda" else 0
    for i in range(-warm_up, rounds):
        if i > 4 and time.monotonic() > end:
            break
        for library in list(models)[:: 1 if i % 2 else -1]:
            attempt(library, functools.partial(turn, library, i))
    real = sum(lengths)
    picked = int((on_cpu.padded_batch(lengths)["labels"] != -100).sum())
    flops = model_flops(config, lengths, picked)
    seconds = {library: [round(s, 6) for s in times] for library, times in seconds.items() if times}
    summary = record.summary(seconds, real)
    for library, figures in summary.items():
        figures |= {
            "tflop_per_s": round(flops / figures["median_s"] / 1e12, 2),
            "percent_of_product": round(100 * flops / figures["median_s"] / ceiling, 2),
            "peak_gib": None if gib.get(library) is None else round(gib[library], 3),
        }  # fmt: skip
    if libraries == [OWN] and device.type == "cuda":
        try:
            summary[OWN]["kernels"] = kernel_times(functools.partial(step, *models[OWN], batches[OWN], device))
        except Exception as failure:  # the times of the step stay
            failed["times of kernels"] = f"{type(failure).__name__}: {failure}".partition("\n")[0][:200]
    return {
        "name": f"BERT-base training step, {name}", "case": name, "tokens_real": real,
        "tokens_padded": len(lengths) * max(lengths), "picked": picked, "difference": difference, "failed": failed,
        "seconds": seconds, "summary": summary,
    }  # fmt: skip


def markdown(result):
    facts = result["machine"]
    heading = f"{facts['device']}, torch {facts['torch']}, triton {facts['triton']}, {result['date']}"
    if "rehearsal" in facts:
        heading = f"REHEARSAL, times mean nothing: {heading}"
    lines = [
        "# A training step of BERT-base" + (" (rehearsal: a tiny model)" if "rehearsal" in facts else ""),
        "",
        f"{heading}. Medians of steps taken in turn; % of the measured rate of a bf16 product, "
        f"{result['settings']['ceilings']['product'] / 1e12:.0f} TFLOP/s.",
        "",
        "| batch | library | ms | real tokens/s | TFLOP/s | % | GiB beyond weights | speed |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        figures = row["summary"]
        first = next(iter(row["seconds"].values()))
        for library in (library for library in LIBRARIES if library in figures):
            found = figures[library]
            memory = "" if found["peak_gib"] is None else f"{found['peak_gib']:.1f}"
            lines.append(
                f"| {row['case']} | {library} | {1e3 * found['median_s']:.2f} | {found['real_tokens_per_s']:,} "
                f"| {found['tflop_per_s']} | {found['percent_of_product']} | {memory} "
                f"| {record.ratio(first, row['seconds'][library]):.2f}x |"
            )
        lines += [f"| {row['case']} | {library} | {reason} | | | | | |" for library, reason in row["failed"].items()]
    return "\n".join(lines) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/<device>")
    parser.add_argument("--seconds", type=float, default=1e9, help="begin no further case after this time")
    parser.add_argument("--rounds", type=int, default=15, help="timed steps of each library")
    parser.add_argument("--own", action="store_true", help="fastbert's own step alone, packed, without padding")
    parser.add_argument("--warm", action="store_true", help="only compile, and time nothing")
    options = parser.parse_args()
    end = time.monotonic() + options.seconds
    device = machine.device()
    folder = options.output or machine.folder(device)
    todo, name = cases(device), "own_step" if options.own else "training_step"
    if options.own:
        libraries = [OWN]
        todo = {case: lengths for case, lengths in todo.items() if "text" not in case} or todo
    else:
        libraries = [library for library in LIBRARIES if device.type == "cuda" or not library.endswith("compiled")]
    with tempfile.TemporaryDirectory() as directory:
        config = save_weights(directory, device)
        if device.type == "cuda":
            for lengths in todo.values():
                compile_kernels(directory, device, lengths, config.vocab_size)
        if options.warm:
            for lengths in todo.values():
                for library in libraries:
                    try:
                        batch = batch_of(library, lengths, config.vocab_size, device)
                        step(*load(library, directory, device), batch, device)
                    except Exception as failure:
                        print(f"{library}: {failure}".partition("\n")[0][:200], flush=True)
            return
        result = record.new(device, {
            "what": "BERT-base masked-LM training step: forward, backward, AdamW; bf16 autocast, dropout 0.1",
            "ceilings": machine.ceilings(device), "left_out": [],
        })  # fmt: skip
        failures = []
        ceiling, left_out = result["settings"]["ceilings"]["product"], result["settings"]["left_out"]
        for case, lengths in todo.items():
            if time.monotonic() > end:
                left_out.append(case)
                continue
            try:
                row = run_case(case, lengths, libraries, directory, config, device, ceiling, options.rounds, end)
            except Exception as failure:  # the other cases want their turn
                failures.append(case)
                print(f"{case}: FAILED: {type(failure).__name__}: {str(failure)[:2000]}", flush=True)
                continue
            finally:
                # nothing of a case is there when the next begins
                gc.collect()
                if device.type == "cuda":
                    torch.cuda.empty_cache()
            result["rows"].append(row)
            result["not_measured"] |= {
                f"{library}, training step {case}": why for library, why in row["failed"].items()
            }
            record.save(result, folder / f"{name}.json")
            (folder / f"{name}.md").write_text(markdown(result), encoding="utf-8")
    print(markdown(result))
    print(
        f"cases: {len(result['rows'])}, written to {folder}"
        + (f"; left out for want of time: {left_out}" if left_out else "")
        + (f"; FAILED: {', '.join(failures)}" if failures else "")
    )
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
