"""Pretrain BERT on text. A script, to be read from top to bottom:

    options -> checks -> text, tokenizer, shards -> model -> the loop: micro-batches -> sums -> one division -> step
    -> evaluation, log, checkpoint -> the finished model, its learning curve and its card

What ends up in the output directory:

    config.json model.safetensors tokenizer.json ...   the model: fastbert and transformers load the directory
    generator/                                         the generator that a detector of replaced tokens learned with
    README.md learning_curve.png metrics.jsonl         how it came to be
    checkpoint-<step>/ data/ tensorboard/              to go on from, and to look closer

Everything random is a pure function of the seed and of a place in the run (epoch, sequence, step), so a resumed run
needs no generator's state, and on a CPU repeats an uninterrupted one bit for bit.
"""

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import signal
import threading
import time
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import torch
import torch.distributed as dist

from . import checkpoint, optim, report, variants
from .data import OBJECTIVES, PAIRS, MaskedBatches, held_out_split
from .heads import EMBEDDING_SHARING, GENERATOR, MaskedLM, Pretraining, ReplacedTokenPretraining
from .options import flag, option
from .shards import Shards, prepare
from .text import LAYOUTS, check_columns, expand
from .tokenizer import load_tokenizer, save_tokenizer, special_ids, tokenizer_hash, train_bpe, train_wordpiece

# so many steps in a row without a finite gradient, and the run gives up
MAX_NONFINITE = 5
# the held-out text is masked once and for all, by a seed that no option changes, and read up to this many tokens
EVAL_SEED, EVAL_TOKENS = 20181011, 1_000_000
# what a step adds up: counts, known before it, and fields of MaskedLMOutput
COUNTS = ("count", "pair_count", "rtd_count")
SUMS = (
    "loss_sum", "correct", "pair_loss_sum", "pair_correct", "rtd_loss_sum", "rtd_correct", "rtd_replaced", "rtd_found",
)  # fmt: skip

# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PretrainConfig:
    """The options of `fastbert pretrain`, one field each. Raises ValueError with the option and value that is wrong."""

    train_file: tuple[str, ...] = option((), "Text to train on: files, folders, globs, or one directory of shards.")
    eval_file: tuple[str, ...] = option((), "Text to evaluate on. Without it, part of the documents is held out.")
    eval_share: float = option(0.02, "Share of the documents held out for evaluation; 0 for none.")
    text_column: str = option("text", "Column with the text, in .jsonl, .csv and .parquet files.")
    layout: str = option("auto", "Documents in .txt files: separated by blank lines, or one per line.", LAYOUTS)
    output_dir: str = option("", "Directory for the model, checkpoints and logs.")
    tokenizer: str | None = option(None, "Directory of a tokenizer. Without it, one is trained on the text.")
    vocab_size: int = option(30522, "Vocabulary size of the trained tokenizer.")
    cased: bool = option(False, "Train a tokenizer that keeps case and accents.")
    model: str = option(
        "bert-base",
        "bert-tiny, -mini, -small, -medium, -base or -large; a config.json; or the directory of a model to start from.",
    )
    objective: str = option(
        "mlm", "Masked words, masked words and sentence pairs, or replaced tokens (ELECTRA, DeBERTa-v3).", OBJECTIVES
    )
    rtd_weight: float = option(50.0, "Replaced tokens: weight of the discriminator's loss; the generator's is 1.")
    embedding_sharing: str | None = option(
        None, "Replaced tokens: how the discriminator uses the generator's embeddings. Depends on the family.",
        EMBEDDING_SHARING,
    )  # fmt: skip
    max_seq_length: int = option(128, "Maximum tokens in a sequence, [CLS] and [SEP] included.")
    tokens_per_batch: int = option(8192, "Maximum tokens in a micro-batch. None of them is padding.")
    gradient_accumulation_steps: int = option(1, "Micro-batches per step.")
    max_steps: int | None = option(None, "Length of the run, in steps.")
    epochs: float | None = option(None, "Length of the run, in passes over the text; 1 if no length is given.")
    max_minutes: float | None = option(
        None, "Length of the run, in minutes of training; the schedule follows the clock."
    )
    learning_rate: float = option(5e-4, "Peak learning rate.")
    schedule: str = option("linear", "Learning rate schedule after the warm-up.", tuple(optim.SCHEDULES))
    warmup_ratio: float = option(0.06, "Share of the run spent on warm-up.")
    warmup_steps: int | None = option(None, "Warm-up in steps. Overrides --warmup-ratio.")
    weight_decay: float = option(0.01, "AdamW's weight decay. Biases and norms have none.")
    adam_beta1: float = option(0.9, "AdamW's beta 1.")
    adam_beta2: float = option(0.98, "AdamW's beta 2.")
    adam_epsilon: float = option(1e-6, "AdamW's epsilon.")
    max_grad_norm: float = option(1.0, "Gradient norm to clip at; 0 for no clipping.")
    mlm_probability: float = option(0.15, "Share of the tokens picked for prediction.")
    whole_word_mask: bool = option(False, "Pick whole words.")
    dropout: float | None = option(None, "Dropout of hidden states and attention. The model's own by default.")
    bf16: bool = option(False, "Run matrix products in bfloat16.")
    seed: int = option(0, "Seed of everything random.")
    resume: bool = option(False, "Resume the run in the output directory from its last good checkpoint.")
    save_steps: int = option(1000, "Steps between checkpoints.")
    save_total_limit: int = option(2, "Checkpoints to keep.")
    eval_steps: int = option(500, "Steps between evaluations.")
    logging_steps: int = option(10, "Steps between rows of the log.")
    num_workers: int | None = option(None, "Processes that prepare text. One per core by default.")
    device: str = option("auto", "auto, cpu, cuda or cuda:1.")

    def __post_init__(self):
        def need(wanted, test, *names):
            for name in names:
                if (value := getattr(self, name)) is not None and not test(value):
                    raise ValueError(f"{flag(name)} is {value!r}: expected {wanted}")

        for field_ in dataclasses.fields(self):
            name, value, choices = field_.name, getattr(self, field_.name), field_.metadata["choices"]
            if field_.default == ():
                value = (value,) if isinstance(value, str | os.PathLike) else value
                object.__setattr__(self, name, tuple(str(path) for path in value))
            elif isinstance(value, os.PathLike):
                object.__setattr__(self, name, str(value))
            elif choices:
                need(f"one of {', '.join(choices)}", choices.__contains__, name)
        for name in ("train_file", "output_dir"):
            if not getattr(self, name):
                raise ValueError(f"{flag(name)} is missing")
        need("at least 8", lambda value: value >= 8, "max_seq_length")
        need("at least 1", lambda value: value >= 1, "vocab_size", "gradient_accumulation_steps",
             "max_steps", "save_steps", "save_total_limit", "eval_steps", "logging_steps", "num_workers")  # fmt: skip
        need("a number above 0", lambda value: 0 < value < math.inf, "epochs", "max_minutes", "learning_rate",
             "adam_epsilon", "rtd_weight")  # fmt: skip
        need("0 or more", lambda value: 0 <= value < math.inf, "warmup_steps", "weight_decay", "max_grad_norm")
        need(
            "0 or more, and below 1", lambda value: 0 <= value < 1, "eval_share", "adam_beta1", "adam_beta2", "dropout"
        )
        need("more than 0, and below 1", lambda value: 0 < value < 1, "mlm_probability")
        need("from 0 to 1", lambda value: 0 <= value <= 1, "warmup_ratio")
        need(f"at least --max-seq-length, {self.max_seq_length}", self.max_seq_length.__le__, "tokens_per_batch")
        if sum(length is not None for length in (self.max_steps, self.epochs, self.max_minutes)) > 1:
            raise ValueError("more than one of --max-steps, --epochs and --max-minutes is given: expected one")
        if self.embedding_sharing is not None and self.objective != "rtd":
            raise ValueError(f"--embedding-sharing goes with --objective rtd: the objective is {self.objective}")
        if self.max_minutes is not None and self.warmup_steps is not None:
            raise ValueError("--warmup-steps does not go with --max-minutes, which knows no steps: use --warmup-ratio")


# A resumed run may differ from its beginning in these; the text and the tokenizer are compared by content.
MAY_DIFFER = {
    "train_file", "eval_file", "output_dir", "tokenizer", "max_steps", "epochs", "max_minutes", "resume", "save_steps",
    "save_total_limit", "eval_steps", "logging_steps", "num_workers", "device",
}  # fmt: skip


@dataclass
class Progress:
    """Where a run stands. With the parameters and the optimizer's state, all that a resume needs."""

    step: int = 0  # optimizer steps so far, left-out ones included: the schedule is a function of this
    epoch: int = 0
    batch: int = 0  # micro-batches of this epoch so far
    tokens: int = 0
    elapsed: float = 0.0  # seconds of training and evaluation, over all resumes
    skipped: int = 0  # steps left out because their gradient was not finite
    empty: int = 0  # steps left out because no token was picked
    evaluated: int = 0  # the step of the last evaluation
    window: dict = field(default_factory=dict)  # sums since the last row of the log


# ---------------------------------------------------------------------------------------------------------------------


def pretrain(config: PretrainConfig) -> dict:
    """Run `config`, a PretrainConfig, to its end, or until SIGTERM or SIGINT, which end it after the step and save.

    Returns the last row of metrics.jsonl that has an evaluation ({} without held-out text), and in "signal" the number
    of the signal that ended the run, or None. Raises ValueError or OSError for what the caller can put right, before
    any work is done where that can be known, and FloatingPointError when training diverges.
    Under torchrun, or with torch.distributed initialised, every process takes its share of the micro-batches.
    """
    rank, world_size = _join_processes()
    output_dir = Path(config.output_dir)
    device = _device(config.device)
    model_config = _model_config(config)
    sources = [_source(paths, config) for paths in (config.train_file, config.eval_file)]

    with checkpoint.lock(output_dir) if rank == 0 else contextlib.nullcontext(), report.Log(output_dir, rank) as log:
        resumed = _checkpoint_to_resume(config, log)
        tokenizer = _known_tokenizer(config, sources[0], resumed)
        state = checkpoint.read_state(resumed) if resumed else None
        if state:
            _check_same_run(config, tokenizer, state, resumed)
        _check_vocabulary(config, model_config, tokenizer)

        # text -> tokenizer -> shards; under torchrun the first process makes them and the others find them made
        with _first_process_first(rank):
            if tokenizer is None and rank == 0:
                kind = variants.family(model_config.model_type).tokenizer
                log.say(f"training a {kind} tokenizer of {config.vocab_size} pieces")
                reading = dict(text_column=config.text_column, layout=config.layout, progress=log.console.is_terminal)
                if kind == "bpe":
                    tokenizer = train_bpe(sources[0], config.vocab_size, **reading)
                else:
                    tokenizer = train_wordpiece(sources[0], config.vocab_size, lowercase=not config.cased, **reading)
            elif tokenizer is None:
                tokenizer = load_tokenizer(output_dir)
            if rank == 0:
                save_tokenizer(tokenizer, output_dir)
            train, evaluation = (
                _shards(source, tokenizer, output_dir / name, config)
                for source, name in zip(sources, ("data", "data-eval"))
            )
        for shards in (train, evaluation):
            if shards is not None and shards.manifest["skipped_lines"]:
                log.say(
                    f"{shards.directory}: {shards.manifest['skipped_lines']:,} lines skipped that are not UTF-8 text"
                )
        loader, held_out = _loaders(config, train, evaluation, rank, world_size)
        fingerprint = _fingerprint(train, evaluation)
        if state and state["data"] != fingerprint:
            raise ValueError(f"--resume: the text is not the text that {resumed} has learned from")

        # model and optimizer
        if config.model in variants.PRESETS:
            ids = special_ids(tokenizer)
            model_config = variants.with_vocabulary(model_config, tokenizer.get_vocab_size(), ids.pad)
        model = _model(config, model_config).to(device).train()
        optimizer = optim.adamw(
            model, learning_rate=config.learning_rate, weight_decay=config.weight_decay,
            betas=(config.adam_beta1, config.adam_beta2), epsilon=config.adam_epsilon,
        )  # fmt: skip
        progress = Progress()
        if resumed:
            checkpoint.load(resumed, model, optimizer)
            progress = Progress(**state["progress"])
        total, warmup = _length(config, loader)
        facts = {
            "config": dataclasses.asdict(config),
            "model_config": model_config.to_dict(),
            "tokenizer": tokenizer_hash(tokenizer),
            "data": fingerprint,
        }
        log.begin(progress, total, in_seconds=config.max_minutes is not None)

        stream = _micro_batches(loader, progress.epoch, progress.batch)
        saved, nonfinite = progress.step, 0
        earlier, began = progress.elapsed, time.monotonic()
        with _signals() as caught:
            while True:
                elapsed = earlier + time.monotonic() - began
                progress.elapsed, stop = _sum_over_processes(elapsed if rank == 0 else 0.0, len(caught))
                position = progress.step if config.max_minutes is None else progress.elapsed
                finished = position >= total

                # between steps: evaluate, save, end
                due = progress.step > progress.evaluated and (finished or progress.step % config.eval_steps == 0)
                if due and held_out is not None:
                    row = evaluate(model, held_out, bf16=config.bf16, interrupted=lambda: caught) if rank == 0 else None
                    if row is not None:
                        log.write(_place(progress) | row)
                        progress.evaluated = progress.step
                    # what was interrupted here is made up for after a resume, if no step comes between
                    (stop,) = _sum_over_processes(len(caught))
                if progress.step != saved and (finished or stop or progress.step % config.save_steps == 0):
                    if rank == 0:
                        facts["progress"] = dataclasses.asdict(progress)
                        checkpoint.save(
                            output_dir, progress.step, model, optimizer, tokenizer, facts, keep=config.save_total_limit
                        )
                    saved = progress.step
                if finished or stop:
                    break

                # one step
                started = time.monotonic()
                batches = []
                for progress.epoch, progress.batch, batch in islice(stream, config.gradient_accumulation_steps):
                    batch.seed = dropout_seed(config.seed, progress.step, len(batches), rank)
                    batches.append(batch)
                sums = accumulate(model, batches, bf16=config.bf16)
                norm, factor = None, optim.SCHEDULES[config.schedule](position, total, warmup)
                if not any(sums[name] for name in COUNTS):
                    progress.empty += 1
                else:
                    norm = optim.clip_gradients(model.parameters(), config.max_grad_norm).item()
                    if math.isfinite(norm):
                        for group in optimizer.param_groups:
                            group["lr"] = config.learning_rate * factor
                        optimizer.step()
                        nonfinite = 0
                    else:
                        progress.skipped += 1
                        nonfinite += 1
                        log.say(
                            f"step {progress.step + 1} is left out: its gradient norm is {norm} "
                            f"(epoch {progress.epoch}, up to micro-batch {progress.batch})"
                        )
                optimizer.zero_grad(set_to_none=True)
                progress.step += 1
                progress.tokens += int(sums["tokens"])
                sums["capacity"] = config.tokens_per_batch * len(batches) * world_size
                sums["seconds"] = time.monotonic() - started
                for name, value in sums.items():
                    progress.window[name] = progress.window.get(name, 0) + value
                if progress.step % config.logging_steps == 0:
                    log.write(_place(progress) | _averages(progress.window, device) | {
                        "learning_rate": config.learning_rate * factor, "gradient_norm": norm,
                        "skipped_steps": progress.skipped, "empty_steps": progress.empty,
                    })  # fmt: skip
                    progress.window.clear()
                log.advance(progress)
                if nonfinite == MAX_NONFINITE:
                    raise FloatingPointError(
                        f"training diverged: no finite gradient in the {nonfinite} steps up to {progress.step}; "
                        f"go on from the last checkpoint with a lower --learning-rate"
                    )

        if rank == 0 and finished:
            checkpoint.publish(output_dir, model, tokenizer)
            report.learning_curve(output_dir)
            report.model_card(output_dir, facts, train.manifest, progress)
            log.say(f"done: {output_dir} holds the model, README.md and learning_curve.png")
        elif rank == 0:
            name = signal.Signals(caught[0]).name if caught else "another process"
            log.say(f"stopped by {name} after step {progress.step}: go on with --resume")
        return log.last_evaluation | {"signal": caught[0] if caught and not finished else None}


# ---------------------------------------------------------------------------------------------------------------------
# the arithmetic of a step


def accumulate(model, batches, *, bf16=False):
    """Add to the model's gradients that of the loss of one step, made of the micro-batches `batches` (packing.Batch).

    The loss is the sum over all picked tokens, divided once by how many they are in all micro-batches of all processes;
    the same for sentence pairs and for tokens that may be replaced, weighted and added. So it does not matter how a
    step is cut into micro-batches. Nothing to predict: no gradient. Returns sums over the micro-batches of all
    processes: tokens, COUNTS, and SUMS (without "_sum").
    """
    device = next(model.parameters()).device
    counts = dict.fromkeys((*COUNTS, "tokens"), 0)
    for batch in batches:
        for name, count in model.label_counts(batch).items():
            counts[name] += count
        counts["tokens"] += int(batch.cu_seqlens[-1])
    counts = dict(zip(counts, _sum_over_processes(*counts.values()), strict=True))
    is_empty = not any(counts[name] for name in COUNTS)
    sums = torch.zeros(len(SUMS), dtype=torch.float64, device=device)
    for batch in () if is_empty else batches:
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            output = model(_to(batch, device))
        output.divided(counts).backward()
        for i, name in enumerate(SUMS):
            if (value := getattr(output, name)) is not None:
                sums[i] += value.detach()
    if dist.is_initialized() and not is_empty:
        for parameter in model.parameters():
            # a process may have had no batch left
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            dist.all_reduce(parameter.grad)
    # the one wait for the device in a step, beside the gradient norm
    sums = _sum_over_processes(*sums.tolist())
    return counts | {name.removesuffix("_sum"): value for name, value in zip(SUMS, sums, strict=True)}


@torch.no_grad()
def evaluate(model, loader, *, bf16=False, interrupted=lambda: False):
    """Loss and accuracy on a loader's epoch 0, so on the same picks every time; None when `interrupted()` says so.

    Beside them the baseline: the share of the same picks that the most frequent token among them gets right.
    """
    device = next(model.parameters()).device
    histogram = torch.zeros(model.config.vocab_size, dtype=torch.int64)
    sums, tokens = dict.fromkeys((*COUNTS, *SUMS), 0), 0
    model.eval()
    try:
        for batch in loader.epoch(0):
            if interrupted():
                return None
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                output = model(_to(batch, device))
            for name in sums:
                if (value := getattr(output, name)) is not None:
                    sums[name] += value.item()
            histogram += torch.bincount(batch.labels[batch.labels != -100], minlength=len(histogram))
            tokens += int(batch.cu_seqlens[-1])
            if tokens >= EVAL_TOKENS:
                break
    finally:
        model.train()
    figures = _figures({name.removesuffix("_sum"): value for name, value in sums.items()})
    figures["baseline_accuracy"] = histogram.max().item() / max(sums["count"], 1)
    return {f"eval_{name}": value for name, value in figures.items()}


def _figures(sums):
    """What the sums of `accumulate` come to. Finding a replaced token is hard, so detection has two figures more: the
    share of the replaced tokens that were found, and the accuracy of always saying that a token is original."""
    figures = {
        "loss": sums["loss"] / max(sums["count"], 1),
        "masked_accuracy": sums["correct"] / max(sums["count"], 1),
        "picked_tokens": int(sums["count"]),
    }
    for kind in ("pair", "rtd"):
        if count := sums[f"{kind}_count"]:
            figures[f"{kind}_loss"] = sums[f"{kind}_loss"] / count
            figures[f"{kind}_accuracy"] = sums[f"{kind}_correct"] / count
    if sums["rtd_count"]:
        figures["rtd_baseline_accuracy"] = 1 - sums["rtd_replaced"] / sums["rtd_count"]
        figures["rtd_recall"] = sums["rtd_found"] / max(sums["rtd_replaced"], 1)
    return figures


def dropout_seed(seed, step, micro_batch, rank):
    """The seed of all dropout in one micro-batch, int64 [1]: a function of the run's seed and the place in the run."""
    digest = hashlib.blake2b(f"{seed} {step} {micro_batch} {rank}".encode(), digest_size=8).digest()
    return torch.tensor([int.from_bytes(digest, "little", signed=True)])


def _to(batch, device):
    return batch if device.type == "cpu" else batch.pin_memory().to(device, non_blocking=True)


def _micro_batches(loader, epoch, start):
    """Endlessly (epoch, how many batches of it are then done, batch), beginning after `start` batches of `epoch`."""
    while True:
        done = start
        for done, batch in enumerate(loader.epoch(epoch, start=start), start + 1):
            yield epoch, done, batch
        if not done:
            raise ValueError("the text gives no batch at all")
        epoch, start = epoch + 1, 0


def _length(config, loader):
    """(total, warmup) of the run: in steps, or in seconds under --max-minutes."""
    if config.max_minutes is not None:
        total = 60 * config.max_minutes
    elif config.max_steps is not None:
        total = config.max_steps
    else:
        whole, part = divmod(config.epochs or 1, 1)
        micro_batches = sum(loader.num_batches(epoch) for epoch in range(int(whole)))
        if part:
            micro_batches += part * loader.num_batches(int(whole))
        total = max(1, math.ceil(micro_batches / config.gradient_accumulation_steps))
    return total, config.warmup_ratio * total if config.warmup_steps is None else config.warmup_steps


def _place(progress):
    """What every row of the log begins with."""
    return {
        "step": progress.step, "epoch": progress.epoch, "tokens": progress.tokens,
        "elapsed": round(progress.elapsed, 3),
    }  # fmt: skip


def _averages(window, device):
    return _figures(window) | {
        "fill": window["tokens"] / window["capacity"],
        "tokens_per_second": round(window["tokens"] / window["seconds"]),
        "memory_mb": report.peak_memory_mb(device),
    }


# ---------------------------------------------------------------------------------------------------------------------
# what a run stands on: each of these raises one clear line when it cannot stand


def _device(name):
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"--device is {name!r}: expected auto, cpu, cuda or cuda:1") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device is {name!r}: PyTorch finds no GPU here")
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    return device


def _model_config(config):
    """EncoderConfig of --model with --dropout; a preset's vocabulary is sized later, to the tokenizer."""
    path = Path(config.model)
    if config.model in variants.PRESETS or not (path.exists() or path.suffix == ".json"):
        found = variants.preset(config.model)
    else:
        found = variants.read_config(path / "config.json" if path.is_dir() else path)
    if config.max_seq_length > found.max_length:
        raise ValueError(
            f"--max-seq-length is {config.max_seq_length}: the model {config.model} has {found.max_length} positions"
        )
    row = variants.family(found.model_type)
    if config.objective in PAIRS and found.type_vocab_size < 2:
        raise ValueError(f"--objective {config.objective} needs two token types: {config.model} has 1")
    if config.objective in PAIRS and "Pretraining" not in row.architectures:
        raise ValueError(f"--objective {config.objective}: a {found.model_type} does not learn from sentence pairs")
    if config.objective == "rtd" and row.generator is None:
        raise ValueError(
            f"--objective rtd: a {found.model_type} has no detector of replaced tokens, {variants.detecting()} have"
        )
    if config.objective == "rtd" and path.is_dir() and not (path / GENERATOR / "config.json").is_file():
        raise ValueError(f"--objective rtd: {path} has no generator, expected one in {path / GENERATOR}")
    if config.dropout is not None:
        found = found.replace(hidden_dropout_prob=config.dropout, attention_probs_dropout_prob=config.dropout)
    return found


def _source(paths, config):
    """What --train-file or --eval-file stands for: Shards of a prepared directory, a list of text files, or None."""
    if not paths:
        return None
    prepared = [path for path in paths if (Path(path) / "manifest.json").is_file()]
    if len(prepared) == 1 and len(paths) == 1:
        return Shards.open(paths[0])
    if prepared:
        raise ValueError(f"{prepared[0]} is a prepared directory: it cannot be joined with other files, name it alone")
    files = expand(paths)
    check_columns(files, config.text_column)
    return files


def _checkpoint_to_resume(config, log):
    """The checkpoint to go on from; None to begin."""
    directory = Path(config.output_dir)
    run = [name for name in ("metrics.jsonl", checkpoint.MODEL) if (directory / name).exists()]
    run += [path.name for path in directory.glob("checkpoint-*")]
    if run and not config.resume:
        raise ValueError(
            f"--output-dir {directory} holds another run ({run[-1]}): go on with it by --resume, or name another"
        )
    if not config.resume:
        return None
    checkpoint.clear_unfinished(directory)
    found = checkpoint.latest(directory)
    log.say(f"resuming from {found}" if found else f"--resume: {directory} has no checkpoint yet, this run begins")
    return found


def _known_tokenizer(config, source, resumed):
    """The tokenizer that the options point at; None when it is to be trained."""
    given = load_tokenizer(config.tokenizer) if config.tokenizer else None
    if isinstance(source, Shards):
        if given is not None and tokenizer_hash(given) != tokenizer_hash(source.tokenizer):
            raise ValueError(
                f"--tokenizer {config.tokenizer} is not the one that {config.train_file[0]} was prepared with"
            )
        return source.tokenizer
    if given is None and (resumed or (Path(config.model) / "tokenizer.json").is_file()):
        given = load_tokenizer(resumed or config.model)
    return given


def _check_same_run(config, tokenizer, state, resumed):
    # an option that is younger than the checkpoint had its default
    then = {field.name: field.default for field in dataclasses.fields(config)} | state["config"]
    now = json.loads(json.dumps(dataclasses.asdict(config)))
    for name in now:
        if name not in MAY_DIFFER and then[name] != now[name]:
            raise ValueError(f"--resume: {flag(name)} is {now[name]!r}, and {then[name]!r} in {resumed}")
    if (sha256 := tokenizer_hash(tokenizer)) != state["tokenizer"]:
        raise ValueError(
            f"--resume: the tokenizer is another (sha256 {sha256[:12]}), and {state['tokenizer'][:12]} in {resumed}"
        )


def _check_vocabulary(config, model_config, tokenizer):
    """A preset takes the tokenizer's size; any other model has a size of its own."""
    if config.model in variants.PRESETS:
        return
    size = config.vocab_size if tokenizer is None else tokenizer.get_vocab_size()
    if size > model_config.vocab_size:
        raise ValueError(
            f"the tokenizer has {size} pieces: {config.model} has a vocab_size of {model_config.vocab_size}"
        )
    if tokenizer is not None and special_ids(tokenizer).pad != model_config.pad_token_id:
        raise ValueError(
            f"the tokenizer's [PAD] is {special_ids(tokenizer).pad}: "
            f"{config.model} has a pad_token_id of {model_config.pad_token_id}"
        )


def _shards(source, tokenizer, directory, config):
    """Shards of a source that `_source` found; text is prepared into `directory`."""
    if not isinstance(source, list):
        return source
    if int(os.environ.get("RANK", 0)) == 0:
        prepare(
            source, tokenizer, directory,
            text_column=config.text_column, layout=config.layout, num_workers=config.num_workers,
        )  # fmt: skip
    return Shards.open(directory)


def _loaders(config, train, evaluation, rank, world_size):
    """MaskedBatches to train on and, or None, to evaluate on."""
    ids = held_out_ids = None
    if evaluation is None and config.eval_share:
        try:
            ids, held_out_ids = held_out_split(
                train, config.eval_share, config.seed,
                max_seq_length=config.max_seq_length, objective=config.objective,
            )  # fmt: skip
        except ValueError as error:
            raise ValueError(f"{error} (--eval-share 0 does without, --eval-file takes other text)") from None
        evaluation = train
    same = {
        "max_seq_length": config.max_seq_length,
        "tokens_per_batch": config.tokens_per_batch,
        "mlm_probability": config.mlm_probability,
        "whole_word_mask": config.whole_word_mask,
        "objective": config.objective,
        # constant shapes: matrix libraries set up, and keep, something for each one that they meet
        "capacity": True,
    }
    loader = MaskedBatches(train, **same, seed=config.seed, rank=rank, world_size=world_size, sequence_ids=ids)
    if evaluation is None:
        return loader, None
    return loader, MaskedBatches(evaluation, **same, seed=EVAL_SEED, sequence_ids=held_out_ids)


def _fingerprint(*shards):
    """sha256 of the contents of the training and the evaluation text."""
    files = [[record["sha256"] for record in one.manifest["shards"]] for one in shards if one is not None]
    return hashlib.sha256(json.dumps(files).encode()).hexdigest()


def _model(config, model_config):
    torch.manual_seed(config.seed)
    if config.objective == "rtd":
        model = ReplacedTokenPretraining(
            model_config, _generator_config(config), embedding_sharing=config.embedding_sharing,
            rtd_weight=config.rtd_weight,
        )  # fmt: skip
    else:
        model = (Pretraining if config.objective in PAIRS else MaskedLM)(model_config)
    if Path(config.model).is_dir():
        model.load_state_dict(model.stored(config.model))
    return model


def _generator_config(config):
    """That of the generator to go on with; None for the family's own."""
    if not Path(config.model).is_dir():
        return None
    found = variants.read_config(Path(config.model) / GENERATOR / "config.json")
    if config.dropout is not None:
        found = found.replace(hidden_dropout_prob=config.dropout, attention_probs_dropout_prob=config.dropout)
    return found


# ---------------------------------------------------------------------------------------------------------------------
# processes and signals


def _join_processes():
    """(rank, world size). torchrun's environment is enough to join the others."""
    if not dist.is_initialized() and int(os.environ.get("WORLD_SIZE", 1)) > 1:
        dist.init_process_group()
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def _sum_over_processes(*numbers):
    if not dist.is_initialized():
        return numbers
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    sums = torch.tensor(numbers, dtype=torch.float64, device=device)
    dist.all_reduce(sums)
    return sums.tolist()


@contextlib.contextmanager
def _first_process_first(rank):
    """The others enter when the first has left."""
    if rank > 0:
        dist.barrier()
    yield
    if rank == 0 and dist.is_initialized():
        dist.barrier()


@contextlib.contextmanager
def _signals():
    """Collects SIGTERM and SIGINT in the list it gives. A second one does what it did before."""
    caught = []

    def note(number, frame):
        caught.append(number)
        restore()

    def restore():
        for number, handler in before.items():
            signal.signal(number, handler)

    before = {}
    # only the main thread may set handlers; elsewhere signals are the caller's affair
    if threading.current_thread() is threading.main_thread():
        before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield caught
    finally:
        restore()
