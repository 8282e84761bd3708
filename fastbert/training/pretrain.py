"""Pretrain BERT on text. Read this script from top to bottom:

    options -> checks -> text, tokenizer, shards -> model -> the loop: micro-batches -> sums -> one division -> step
    -> evaluation, log, checkpoint -> the finished model, its learning curve and its card

The output directory then holds:

    config.json model.safetensors tokenizer.json ...   the model: fastbert and transformers load the directory
    generator/                                         the generator, after training with replaced tokens
    README.md learning_curve.png metrics.jsonl         the model card, the curves, the log
    checkpoint-<step>/ data/ tensorboard/              checkpoints, token shards, TensorBoard's files

Everything random is a pure function of the seed and of the position in the run (epoch, sequence, step). So a resume
needs no state of a random generator, and on a CPU a resumed run equals an uninterrupted one bit for bit.
"""

import contextlib
import dataclasses
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from .. import ops
from ..data.batches import MAX_TOKENS
from ..data.sequences import OBJECTIVES
from ..data.text import LAYOUTS
from ..data.tokenizer import (
    load_tokenizer,
    save_tokenizer,
    special_ids,
    tokenizer_hash,
    train_bpe,
    train_wordpiece,
    vocabulary_size,
)
from ..files import lock, unused
from ..model import families, presets
from ..model.replaced_tokens import EMBEDDING_SHARING, GENERATOR
from . import card, checkpoint, optim, processes
from .log import Log
from .loop import Progress, Run
from .options import check_length, flag, option, take_bf16, tidy, with_local_model
from .pretrain_inputs import (
    check_vocabulary,
    config_of,
    fingerprint_of,
    known_tokenizer,
    loaders,
    model_of,
    shards_of,
    source_of,
)
from .step_sums import accumulate, add, figures, forward

# held-out text is read up to this many tokens
EVAL_TOKENS = 1_000_000

# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PretrainConfig:
    """The options of `fastbert pretrain`, one field each. Raises ValueError with the wrong option and its value."""

    train_file: tuple[str, ...] = option((), "Text to train on: files, folders, globs, or one directory of shards.")
    eval_file: tuple[str, ...] = option((), "Text to evaluate on. Without it, part of the documents is held out.")
    eval_share: float = option(0.02, "Share of the documents held out for evaluation; 0 for none.", least=0, below=1)
    text_column: str = option("text", "Column with the text, in .jsonl, .csv and .parquet files.")
    layout: str = option("auto", "Documents in .txt files: separated by blank lines, or one per line.", LAYOUTS)
    output_dir: str = option("", "Directory for the model, checkpoints and logs.")
    tokenizer: str | None = option(None, "Directory or name of a tokenizer. Without it, one is trained on the text.")
    vocab_size: int = option(30522, "Vocabulary size of the trained tokenizer.", least=1)
    cased: bool = option(False, "Train a tokenizer that keeps case and accents.")
    model: str = option(
        "bert-base",
        "bert-tiny, -mini, -small, -medium, -base or -large; a config.json; or a model to start from: a directory or a "
        "name on the HuggingFace hub.",
    )
    revision: str | None = option(None, "Branch, tag or commit of a --model on the hub. Its main branch by default.")
    objective: str = option(
        "mlm", "Masked words, masked words and sentence pairs, or replaced tokens (ELECTRA, DeBERTa-v3).", OBJECTIVES
    )
    rtd_weight: float = option(
        50.0, "Replaced tokens: weight of the discriminator's loss; the generator's is 1.", above=0
    )
    embedding_sharing: str | None = option(
        None, "Replaced tokens: how the discriminator uses the generator's embeddings. Depends on the family.",
        EMBEDDING_SHARING,
    )  # fmt: skip
    max_seq_length: int = option(128, "Maximum tokens in a sequence, [CLS] and [SEP] included.", least=8)
    tokens_per_batch: int = option(
        8192, "Maximum tokens in a micro-batch. None of them is padding.", least=8, most=MAX_TOKENS
    )
    gradient_accumulation_steps: int = option(1, "Micro-batches per step.", least=1)
    max_steps: int | None = option(None, "Length of the run, in steps.", least=1)
    epochs: float | None = option(
        None, "Length of the run, in passes over the text; 1 if no length is given.", above=0, most=1e4
    )
    max_minutes: float | None = option(
        None, "Length of the run, in minutes of training; the schedule follows the clock.", above=0, most=1e7
    )
    learning_rate: float = option(5e-4, "Peak learning rate. --resume may lower it.", above=0)
    schedule: str = option("linear", "Learning rate schedule after the warm-up.", tuple(optim.SCHEDULES))
    warmup_ratio: float = option(0.06, "Share of the run spent on warm-up.", least=0, most=1)
    warmup_steps: int | None = option(None, "Warm-up in steps. Overrides --warmup-ratio.", least=0)
    weight_decay: float = option(0.01, "AdamW's weight decay. Biases and norms have none.", least=0)
    adam_beta1: float = option(0.9, "AdamW's beta 1.", least=0, below=1)
    adam_beta2: float = option(0.98, "AdamW's beta 2.", least=0, below=1)
    adam_epsilon: float = option(1e-6, "AdamW's epsilon.", above=0)
    max_grad_norm: float = option(1.0, "Gradient norm to clip at; 0 for no clipping.", least=0)
    mlm_probability: float = option(0.15, "Share of the tokens picked for prediction.", above=0, below=1)
    whole_word_mask: bool = option(False, "Pick whole words.")
    dropout: float | None = option(
        None, "Dropout of hidden states and attention. The model's own by default.", least=0, below=1
    )
    dtype: str = option(
        "fp32",
        "What matrix products run in. auto: bf16 where this machine multiplies it faster. Parameters are fp32.",
        processes.DTYPES,
    )
    bf16: bool | None = option(None, "The same as --dtype bf16.")
    seed: int = option(0, "Seed of everything random.", least=-(2**63), most=2**63 - 1)
    resume: bool = option(False, "Resume the run in the output directory from its last good checkpoint.")
    save_steps: int = option(1000, "Steps between checkpoints.", least=1)
    save_total_limit: int = option(2, "Checkpoints to keep.", least=1)
    eval_steps: int = option(500, "Steps between evaluations.", least=1)
    logging_steps: int = option(10, "Steps between rows of the log.", least=1)
    num_workers: int | None = option(None, "Threads that prepare text. One per core by default.", least=1, most=1024)
    verify: bool = option(True, "Compare token shards with their sha256 at the start.")
    device: str = option("auto", "auto, cpu, cuda or cuda:1.")

    def __post_init__(self):
        tidy(self)
        take_bf16(self)
        for name in ("train_file", "output_dir"):
            if not getattr(self, name):
                raise ValueError(f"{flag(name)} is missing")
        if self.tokens_per_batch < self.max_seq_length:
            raise ValueError(
                f"--tokens-per-batch is {self.tokens_per_batch}: expected at least --max-seq-length, "
                f"{self.max_seq_length}"
            )
        check_length(self)
        if self.embedding_sharing is not None and self.objective != "rtd":
            raise ValueError(f"--embedding-sharing goes with --objective rtd: the objective is {self.objective}")


# a resumed run may change these options too, see checkpoint.check_same_run
MAY_DIFFER = {"num_workers", "verify"}


# ---------------------------------------------------------------------------------------------------------------------


def pretrain(config: PretrainConfig) -> dict:
    """Run `config` to its end. SIGTERM and SIGINT end it after the current step, with a checkpoint.

    Returns the last row of metrics.jsonl that has an evaluation ({} without held-out text), with the number of the
    signal that ended the run, or None, in "signal". Raises ValueError or OSError for errors of the caller, if possible
    before any work, and FloatingPointError when training diverges. Under torchrun, or with torch.distributed
    initialised, every process takes its share of the micro-batches.
    """
    rank, world_size = processes.join()
    output_dir = Path(config.output_dir)
    device = processes.device_of(config.device)
    here = with_local_model(config, folders=(GENERATOR,) if config.objective == "rtd" else ())
    model_config = config_of(here)
    if rank == 0:
        # not in a folder of a live run
        with unused(output_dir.absolute().parent):
            pass
    sources = [
        source_of(config.train_file, config, output_dir / "data", rank),
        source_of(config.eval_file, config, output_dir / "data-eval", rank),
    ]

    with lock(output_dir) if rank == 0 else contextlib.nullcontext(), Log(output_dir, rank) as log:
        resumed = checkpoint.to_resume(output_dir, config.resume, log.say)
        if here.model != config.model:
            log.say(f"--model {config.model}: commit {Path(here.model).name} of the hub")
        tokenizer = known_tokenizer(here, sources[0], resumed)
        state = checkpoint.read_state(resumed) if resumed else None
        if resumed:
            checkpoint.check_same_run(resumed, state, config, tokenizer_hash(tokenizer), MAY_DIFFER)
        config = dataclasses.replace(config, dtype=processes.dtype_of(config, device, resumed, state, log.say))
        check_vocabulary(here, model_config, tokenizer)

        # text -> tokenizer -> shards; under torchrun the first process makes them for all
        with processes.first_process_first(rank):
            if tokenizer is None and rank == 0:
                kind = families.family(model_config.model_type).tokenizer
                log.say(f"training a {kind} tokenizer of {config.vocab_size} pieces")
                train = train_bpe if kind == "bpe" else partial(train_wordpiece, lowercase=not config.cased)
                tokenizer = train(
                    sources[0], config.vocab_size,
                    text_column=config.text_column, layout=config.layout, progress=log.console.is_terminal,
                )  # fmt: skip
            elif tokenizer is None:
                tokenizer = load_tokenizer(output_dir, as_saved=True)
            if rank == 0:
                save_tokenizer(tokenizer, output_dir)
            train, evaluation = (
                shards_of(source, tokenizer, output_dir / name, config, rank)
                for source, name in zip(sources, ("data", "data-eval"))
            )
        for shards in (train, evaluation):
            if shards is not None and (skipped := shards.manifest["skipped_lines"]):
                log.say(f"{shards.directory}: {skipped:,} lines skipped that are not valid text")
        loader, held_out = loaders(config, train, evaluation, rank, world_size)
        fingerprint = fingerprint_of(train, evaluation)
        if resumed and state["data"] != fingerprint:
            raise ValueError(f"--resume: the text is not the one that {resumed} was trained on")

        # model and optimizer
        if config.model in presets.PRESETS:
            size, pad = vocabulary_size(tokenizer), special_ids(tokenizer).pad
            model_config = families.with_vocabulary(model_config, size, pad)
        model = model_of(here, model_config).to(device).train()
        optimizer = optim.adamw(
            model, learning_rate=config.learning_rate, weight_decay=config.weight_decay,
            betas=(config.adam_beta1, config.adam_beta2), epsilon=config.adam_epsilon,
        )  # fmt: skip
        progress = Progress()
        if resumed:
            checkpoint.load_checkpoint(resumed, model, optimizer)
            progress = Progress.restored(state["progress"])
        total, warmup = optim.length(config, loader)
        facts = {
            "config": dataclasses.asdict(config), "model_config": model_config.to_dict(),
            "tokenizer": tokenizer_hash(tokenizer), "data": fingerprint,
        }  # fmt: skip
        log.begin(progress, total, in_seconds=config.max_minutes is not None)

        # a resumed run multiplies by the libraries that it began with
        products = state.get("products") if state else {}
        with ops.libraries.restored(products), processes.signals() as caught:
            run = Run(config, model, optimizer, tokenizer, facts, progress, log, total, caught)
            # the first process alone writes checkpoints
            run.resumed = resumed if rank == 0 else None
            for step in run.steps(loader, evaluates=held_out is not None):
                if step.batches is None:
                    step.row = evaluate(model, held_out, bf16=config.dtype == "bf16", interrupted=lambda: caught)
                    continue
                sums = accumulate(model, step.batches, bf16=config.dtype == "bf16")
                factor = optim.SCHEDULES[config.schedule](step.position, total, warmup)
                run.update(step, sums, config.learning_rate * factor)

        if rank == 0 and run.finished:
            checkpoint.publish(output_dir, model, tokenizer)
            card.learning_curve(output_dir)
            card.model_card(output_dir, facts, train.manifest, progress)
            log.say(f"done: {output_dir} holds the model, README.md and learning_curve.png")
        return log.last_evaluation | {"signal": run.stopped_by()}


@torch.no_grad()
def evaluate(model, loader, *, bf16=False, interrupted=lambda: False):
    """Loss and accuracy on epoch 0 of a loader, with the same picks every time. None when `interrupted()` is true.

    Also returns the baseline: the accuracy of always predicting the most frequent of the picked tokens.
    """
    device = next(model.parameters()).device
    histogram = torch.zeros(model.config.vocab_size, dtype=torch.int64)
    sums, tokens = {}, 0
    model.eval()
    try:
        for batch in loader.epoch(0):
            if interrupted():
                return None
            add(sums, forward(model, batch, device, bf16).losses)
            histogram += torch.bincount(batch.labels[batch.labels != -100], minlength=len(histogram))
            tokens += int(batch.cu_seqlens[-1])
            if tokens >= EVAL_TOKENS:
                break
    finally:
        model.train()
    row = figures({name: value.item() for name, value in sums.items()})
    row["baseline_accuracy"] = histogram.max().item() / max(row["picked_tokens"], 1)
    return {f"eval_{name}": value for name, value in row.items()}
