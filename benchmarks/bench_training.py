"""One short pretraining run three times: fastbert's `pretrain`, transformers' Trainer, the Trainer on a swapped model.

    python benchmarks/bench_training.py                     under five minutes on two cores
    python benchmarks/bench_training.py --steps 200         shorter

All runs have the same initial weights, text (that of benchmarks/demo.py), sequences, masks, order of batches, AdamW,
learning rate and clipping, and no dropout. Only the library differs, so losses agree by tokens and differ by time.
transformers gets each batch padded to its longest sequence, made before the clock starts; fastbert makes its batches in
the run. Hardly anything is padding: the text is cut into full sequences. Both multiply in bfloat16 where that is faster
on this machine. On a CPU the model has two layers of 256, so the vocabulary's head, of which fastbert computes only the
picked rows, is two fifths of the dense products; in BERT-base it is one fifth.

On a CPU all three runs keep the memory that they free (`keep_freed_memory`). Time is that of training alone, without
evaluation. Results: loss against time and tokens, and the time to a held-out masked accuracy: --accuracy, or the
highest that every run holds at its last two evaluations. Without accelerate the Trainer's runs are listed as not
measured. Writes training.json; benchmarks/report.py draws it.
"""

import importlib.util
import math
import os
import tempfile
import time
from functools import partial
from itertools import chain, count, islice
from pathlib import Path

import torch

os.environ["HF_HUB_OFFLINE"] = "1"

import demo
import machine
import record
import tables

import fastbert
from fastbert.data.batches import MaskedBatches
from fastbert.data.shards import Shards, prepare
from fastbert.data.tokenizer import train_wordpiece
from fastbert.model.config import EncoderConfig
from fastbert.model.heads import MaskedLM
from fastbert.training import optim
from fastbert.training.log import read_metrics
from fastbert.training.memory import keep_freed_memory
from fastbert.training.pretrain import PretrainConfig, pretrain
from fastbert.training.pretrain_inputs import EVAL_SEED

TRAINER, SWAPPED = "transformers + Trainer", "transformers, swapped"
MASKED_AT_LEAST = 0.01


def settings(quick):
    """(EncoderConfig, options of pretrain) for the machine at hand: a BERT, which every library has."""
    model = EncoderConfig(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    if torch.cuda.is_available():
        sizes = dict(hidden_size=512, num_hidden_layers=8, num_attention_heads=8, intermediate_size=2048)
        model = model.replace(vocab_size=8192, max_position_embeddings=128, **sizes)
        options = {"tokens_per_batch": 16384, "learning_rate": 7e-4, "bf16": True}
    else:
        # BERT's initial weights are meant for three times the width
        sizes = dict(hidden_size=256, num_hidden_layers=2, num_attention_heads=4, intermediate_size=1024)
        model = model.replace(vocab_size=4096, max_position_embeddings=32, initializer_range=0.04, **sizes)
        options = {"tokens_per_batch": 2048, "learning_rate": 1e-3, "bf16": demo.bf16_is_faster()}
    if quick:
        sizes = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128)
        model, options = model.replace(vocab_size=500, **sizes), options | {"tokens_per_batch": 256}
    return model, options


def write_data(work, model, limit=None):
    """Shards of the demo's text, for training and held out; the directory of a model with its first weights."""
    demo.write_text(work / "text")
    parts = {part: sorted((work / "text").glob(f"{part}-*.txt")) for part in ("train", "held-out")}
    if limit:
        for file in parts["train"] + parts["held-out"]:
            file.write_text(file.read_text(encoding="utf-8")[:limit], encoding="utf-8")
    tokenizer = train_wordpiece(parts["train"], model.vocab_size)
    for part, files in parts.items():
        prepare(files, tokenizer, work / part, progress=False)
    torch.manual_seed(0)
    model = model.replace(vocab_size=tokenizer.get_vocab_size())
    MaskedLM(model).save_pretrained(work / "first")
    return model


def run_fastbert(work, options):
    """`pretrain`, as a user runs it. (curve, held-out rows)."""
    pretrain(
        PretrainConfig(
            train_file=(str(work / "train"),), eval_file=(str(work / "held-out"),), output_dir=str(work / "fastbert"),
            model=str(work / "first"), save_steps=10**6, **options,
        )
    )  # fmt: skip
    curve, held_out, seconds, tokens = [], [], 0.0, 0
    for row in read_metrics(work / "fastbert"):
        if "loss" in row:
            seconds += (row["tokens"] - tokens) / row["tokens_per_second"]
        tokens = row["tokens"]
        place = {"step": row["step"], "tokens": tokens, "seconds": seconds}
        if "loss" in row:
            curve.append(place | {"loss": row["loss"]})
        else:
            figures = {x: row[f"eval_{y}_accuracy"] for x, y in (("accuracy", "masked"), ("baseline", "baseline"))}
            held_out.append(place | {"loss": row["eval_loss"]} | figures)
    return curve, held_out


def padded(batch):
    """HuggingFace's arguments for a packed batch of fixed capacity, padded to its longest sequence."""
    starts = batch.cu_seqlens.long()
    lengths = starts.diff()
    starts, lengths = starts[:-1][lengths > 0], lengths[lengths > 0]
    columns = torch.arange(int(lengths.max()))
    mask = columns < lengths[:, None]
    places = (starts[:, None] + columns).clamp(max=len(batch.input_ids) - 1)
    return {
        "input_ids": batch.input_ids[places].where(mask, 0),
        "attention_mask": mask.long(),
        "labels": batch.labels[places].where(mask, -100),
    }


def batches_of(shards, options, seed):
    """The loader that `pretrain` makes of these options."""
    return MaskedBatches(
        shards, max_seq_length=options["max_seq_length"], tokens_per_batch=options["tokens_per_batch"], capacity=True,
        seed=seed, mlm_probability=0.15,
    )  # fmt: skip


def in_order(loader, steps):
    """The first `steps` batches, epoch after epoch."""
    return list(islice(chain.from_iterable(map(loader.epoch, count())), steps))


class InOrder(torch.utils.data.IterableDataset):
    """What the Trainer takes for examples: batches that are whole already, in their order, and have no length."""

    def __init__(self, batches):
        self.batches = batches

    def __iter__(self):
        return iter(self.batches)


def run_trainer(work, options, swapped):
    """transformers' Trainer on the same batches. (curve, held-out rows)."""
    from transformers import BertForMaskedLM, PrinterCallback, Trainer, TrainerCallback, TrainingArguments
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    steps, device = options["max_steps"], machine.device()
    defaults = {field.name: field.default for field in PretrainConfig.__dataclass_fields__.values()}
    model = BertForMaskedLM.from_pretrained(work / "first", attn_implementation="sdpa")
    if swapped:
        fastbert.swap(model)
    train = in_order(batches_of(Shards.open(work / "train"), options, options["seed"]), steps)
    tokens = torch.tensor([int(batch.cu_seqlens[-1]) for batch in train]).cumsum(0).tolist()
    held_out = [padded(batch) for batch in batches_of(Shards.open(work / "held-out"), options, EVAL_SEED).epoch(0)]
    optimizer = optim.adamw(
        model, learning_rate=options["learning_rate"], weight_decay=defaults["weight_decay"],
        betas=(defaults["adam_beta1"], defaults["adam_beta2"]), epsilon=defaults["adam_epsilon"],
    )  # fmt: skip
    warmup = defaults["warmup_ratio"] * steps
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: optim.linear(step, steps, warmup))
    curve, seen = [], []

    class Clock(TrainerCallback):
        """Notes losses with the time of training, and stops while the held-out text is read."""

        seconds = 0.0

        def on_train_begin(self, *_, **__):
            self.since = time.perf_counter()

        def place(self, step):
            if device.type == "cuda":
                torch.cuda.synchronize()
            now = time.perf_counter()
            self.seconds += now - self.since
            self.since = now
            return {"step": step, "tokens": tokens[step - 1], "seconds": self.seconds}

        def on_log(self, args, state, control, logs=None, **_):
            if "loss" in (logs or {}):
                curve.append(self.place(state.global_step) | {"loss": float(logs["loss"])})

        def on_step_end(self, args, state, control, **_):
            if state.global_step % options["eval_steps"] == 0 or state.global_step == steps:
                place = self.place(state.global_step)
                seen.append(place | held_out_figures(model, held_out, options["bf16"], device))
                self.since = time.perf_counter()

    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(work / "trainer"), max_steps=steps, per_device_train_batch_size=1, seed=options["seed"],
            bf16=options["bf16"], use_cpu=device.type == "cpu", max_grad_norm=defaults["max_grad_norm"],
            logging_steps=options["logging_steps"], save_strategy="no", report_to="none", disable_tqdm=True,
            dataloader_pin_memory=device.type == "cuda", remove_unused_columns=False,
        ),
        train_dataset=InOrder([padded(batch) for batch in train]),
        data_collator=lambda batches: batches[0],
        optimizers=(optimizer, schedule),
        callbacks=[Clock()],
    )  # fmt: skip
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return curve, seen


@torch.no_grad()
def held_out_figures(model, batches, bf16, device):
    """Loss and accuracy over the picks of the held-out batches, counted as `fastbert pretrain` does."""
    loss = correct = picked = 0
    model.eval()
    for batch in batches:
        batch = {name: x.to(device) for name, x in batch.items()}
        labels = batch.pop("labels")
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            logits = model(**batch).logits
        logits, labels = logits[labels != -100].float(), labels[labels != -100]
        loss += torch.nn.functional.cross_entropy(logits, labels, reduction="sum").item()
        correct += int((logits.argmax(-1) == labels).sum())
        picked += len(labels)
    model.train()
    return {"loss": loss / picked, "accuracy": correct / picked}


def row_of(name, curve, held_out):
    last = curve[-1]
    return {
        "implementation": name, "steps": last["step"], "tokens": last["tokens"],
        "training_seconds": round(last["seconds"], 3), "tokens_per_s": round(last["tokens"] / last["seconds"]),
        "curve": rounded(curve), "held_out": rounded(held_out),
    }  # fmt: skip


def rounded(rows):
    return [{name: round(x, 5) if isinstance(x, float) else x for name, x in row.items()} for row in rows]


def seconds_to(held_out, accuracy):
    """When a run first reaches an accuracy on held-out text, interpolated between evaluations; None if never."""
    before = {"seconds": 0.0, "accuracy": 0.0}
    for row in held_out:
        if row["accuracy"] >= accuracy:
            share = (accuracy - before["accuracy"]) / (row["accuracy"] - before["accuracy"])
            return round(before["seconds"] + share * (row["seconds"] - before["seconds"]), 2)
        before = row
    return None


def common_accuracy(rows):
    """The highest whole per cent that every run holds at its last two evaluations, so that no single one decides."""
    lowest = min(min(point["accuracy"] for point in row["held_out"][-2:]) for row in rows)
    return max(math.floor(100 * lowest) / 100, MASKED_AT_LEAST)


def largest_difference(rows, upto=20):
    """How far apart the losses of the first `upto` logged points are, before rounding errors have grown."""
    curves = [[point["loss"] for point in row["curve"][:upto]] for row in rows]
    return max((max(losses) - min(losses) for losses in zip(*curves)), default=0.0)


def main(arguments=None):
    parser = machine.parser(__doc__)
    parser.add_argument("--steps", type=int, default=1200, help="optimizer steps of each run")
    parser.add_argument("--accuracy", type=float, help="time to this held-out masked accuracy, such as 0.3")
    parser.add_argument("--quick", action="store_true", help="a tiny model and little text: does it run?")
    options = parser.parse_args(arguments)
    if options.steps < 20:
        parser.error(f"--steps is {options.steps}: expected at least 20")
    device = machine.device()
    file = (options.output or machine.folder(device)) / "training.json"
    model, how = settings(options.quick)
    how |= {
        "max_steps": options.steps, "max_seq_length": model.max_length, "eval_steps": max(options.steps // 15, 10),
        "logging_steps": 10, "seed": 0,
    }  # fmt: skip
    result = record.new(device, {"options": how, "memory_kept": device.type == "cpu" and keep_freed_memory()})
    with tempfile.TemporaryDirectory() as directory:
        work = Path(directory)
        model = write_data(work, model, 40_000 if options.quick else None)
        runs = {"fastbert": lambda: run_fastbert(work, how)}
        if importlib.util.find_spec("accelerate") is None:
            result["not_measured"] |= dict.fromkeys((TRAINER, SWAPPED), "accelerate is not installed")
        else:
            runs |= {name: partial(run_trainer, work, how, name == SWAPPED) for name in (TRAINER, SWAPPED)}
        for name, run in runs.items():
            row = row_of(name, *run())
            result["rows"].append(row)
            print(
                f"{name}: {row['steps']} steps, {row['tokens']:,} tokens in {row['training_seconds']:.1f} s of "
                f"training, {row['tokens_per_s']:,} a second; held out: loss "
                f"{row['held_out'][-1]['loss']:.3f}, accuracy {row['held_out'][-1]['accuracy']:.1%}",
                flush=True,
            )
    apart = largest_difference(result["rows"])
    allowed = 0.02 if how["bf16"] else 1e-3
    if apart > allowed * result["rows"][0]["curve"][0]["loss"]:
        raise AssertionError(f"losses of the same batches are {apart:.3f} apart: the runs are not the same training")
    accuracy = options.accuracy or common_accuracy(result["rows"])
    result["settings"] |= {
        "accuracy": accuracy, "largest_loss_difference": apart, "model": model.to_dict(),
        "what": f"A BERT of {model.num_hidden_layers} layers of {model.hidden_size} with {model.vocab_size:,} pieces, "
        f"{how['tokens_per_batch']:,} tokens a step in sequences of at most {model.max_length}, "
        f"{'bfloat16' if how['bf16'] else 'float32'} products, on two translations of the Bible",
    }  # fmt: skip
    for row in result["rows"]:
        row["seconds_to_accuracy"] = seconds_to(row["held_out"], accuracy)
    record.save(result, file)
    print(f"\n{tables.training_table(result)}\n\nwritten to {file}; python benchmarks/report.py draws it")


if __name__ == "__main__":
    main()
