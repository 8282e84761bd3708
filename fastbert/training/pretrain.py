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
import hashlib
import json
import signal
import warnings
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from .. import ops
from ..data.batches import MAX_TOKENS, MaskedBatches
from ..data.sequences import OBJECTIVES, PAIRS, held_out_split
from ..data.shards import Shards, prepare
from ..data.text import LAYOUTS, check_columns, expand
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
from ..model import families, hf_files, presets
from ..model.heads import MaskedLM, Pretraining
from ..model.replaced_tokens import EMBEDDING_SHARING, GENERATOR, ReplacedTokenPretraining
from . import card, checkpoint, optim, processes
from .log import Log
from .loop import Progress, Run, accumulate, add, figures, forward, length
from .options import flag, option, take_bf16, tidy, with_local_model

# held-out text is masked with a seed of its own, the same for all runs, and read up to this many tokens
EVAL_SEED, EVAL_TOKENS = 20181011, 1_000_000

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
        if sum(length is not None for length in (self.max_steps, self.epochs, self.max_minutes)) > 1:
            raise ValueError("more than one of --max-steps, --epochs and --max-minutes is given: expected one")
        if self.embedding_sharing is not None and self.objective != "rtd":
            raise ValueError(f"--embedding-sharing goes with --objective rtd: the objective is {self.objective}")
        if self.max_minutes is not None and self.warmup_steps is not None:
            raise ValueError("--warmup-steps does not go with --max-minutes, which counts time: use --warmup-ratio")


# A resumed run may change these options. The text and the tokenizer are compared by content.
MAY_DIFFER = {
    "train_file", "eval_file", "output_dir", "tokenizer", "max_steps", "epochs", "max_minutes", "resume", "save_steps",
    "save_total_limit", "eval_steps", "logging_steps", "num_workers", "verify", "device",
    # see processes.dtype_of
    "dtype", "bf16",
}  # fmt: skip
# these it may lower, after training diverged
MAY_FALL = {"learning_rate"}


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
    model_config = _model_config(here)
    if rank == 0:
        # not in a folder of a live run
        with unused(output_dir.absolute().parent):
            pass
    sources = [
        _source(config.train_file, config, output_dir / "data", rank),
        _source(config.eval_file, config, output_dir / "data-eval", rank),
    ]

    with lock(output_dir) if rank == 0 else contextlib.nullcontext(), Log(output_dir, rank) as log:
        resumed = checkpoint.to_resume(output_dir, config.resume)
        if resumed:
            log.say(f"resuming from {resumed}")
        elif config.resume:
            log.say(f"--resume: {output_dir} has no checkpoint yet, starting a new run")
        if here.model != config.model:
            log.say(f"--model {config.model}: commit {Path(here.model).name} of the hub")
        tokenizer = _known_tokenizer(here, sources[0], resumed)
        state = checkpoint.read_state(resumed) if resumed else None
        if resumed:
            checkpoint.check_same_run(resumed, state, config, tokenizer_hash(tokenizer), MAY_DIFFER, MAY_FALL)
        config = dataclasses.replace(config, dtype=processes.dtype_of(config, device, resumed, state, log.say))
        _check_vocabulary(here, model_config, tokenizer)

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
                _shards(source, tokenizer, output_dir / name, config, rank)
                for source, name in zip(sources, ("data", "data-eval"))
            )
        for shards in (train, evaluation):
            if shards is not None and (skipped := shards.manifest["skipped_lines"]):
                log.say(f"{shards.directory}: {skipped:,} lines skipped that are not valid text")
        loader, held_out = _loaders(config, train, evaluation, rank, world_size)
        fingerprint = _fingerprint(train, evaluation)
        if resumed and state["data"] != fingerprint:
            raise ValueError(f"--resume: the text is not the one that {resumed} was trained on")

        # model and optimizer
        if config.model in presets.PRESETS:
            size, pad = vocabulary_size(tokenizer), special_ids(tokenizer).pad
            model_config = families.with_vocabulary(model_config, size, pad)
        model = _model(here, model_config).to(device).train()
        optimizer = optim.adamw(
            model, learning_rate=config.learning_rate, weight_decay=config.weight_decay,
            betas=(config.adam_beta1, config.adam_beta2), epsilon=config.adam_epsilon,
        )  # fmt: skip
        progress = Progress()
        if resumed:
            checkpoint.load_checkpoint(resumed, model, optimizer)
            progress = Progress.restored(state["progress"])
        total, warmup = length(config, loader)
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
        elif rank == 0:
            name = signal.Signals(caught[0]).name if caught else "another process"
            log.say(f"stopped by {name} after step {progress.step}: continue with --resume")
        return log.last_evaluation | {"signal": caught[0] if caught and not run.finished else None}


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


# ---------------------------------------------------------------------------------------------------------------------
# what a run needs; each function raises a one-line error if it is missing or wrong


def _model_config(config):
    """EncoderConfig of --model with --dropout. A preset gets the tokenizer's vocabulary size later."""
    path = Path(config.model)
    if config.model in presets.PRESETS or not (path.exists() or path.suffix == ".json"):
        found = presets.preset(config.model)
    else:
        found = hf_files.read_config(path / "config.json" if path.is_dir() else path)
    if config.max_seq_length > found.max_length:
        raise ValueError(
            f"--max-seq-length is {config.max_seq_length}: the model {config.model} has {found.max_length} positions"
        )
    row, objective = families.family(found.model_type), f"--objective {config.objective}"
    if config.objective in PAIRS and found.type_vocab_size < 2:
        raise ValueError(f"{objective} needs two token types: {config.model} has 1")
    if config.objective in PAIRS and "Pretraining" not in row.architectures:
        raise ValueError(f"{objective}: {found.model_type} models have no head for sentence pairs")
    if config.objective == "rtd" and row.generator is None:
        raise ValueError(
            f"{objective}: {found.model_type} models have no head for replaced tokens, {families.detecting()} have"
        )
    if config.objective == "rtd" and path.is_dir() and not (path / GENERATOR / "config.json").is_file():
        raise ValueError(f"{objective}: {path} has no generator, expected one in {path / GENERATOR}")
    return _with_dropout(found, config)


def _with_dropout(found, config):
    if config.dropout is None:
        return found
    return found.replace(hidden_dropout_prob=config.dropout, attention_probs_dropout_prob=config.dropout)


def _source(paths, config, directory, rank):
    """The source that --train-file or --eval-file names: Shards of a prepared directory, text files, or None.

    A run that is resumed goes on with its own shards, in `directory`, when the text is gone.
    """
    if not paths:
        return None
    verify = config.verify and rank == 0
    prepared = [path for path in paths if (Path(path) / "manifest.json").is_file()]
    if len(prepared) == 1 and len(paths) == 1:
        return Shards.open(paths[0], verify=verify, progress=True)
    if prepared:
        raise ValueError(f"{prepared[0]} is a prepared directory: it cannot be combined with other files")
    try:
        files = expand(paths)
        check_columns(files, config.text_column)
        return files
    except (ValueError, OSError) as error:
        if not (config.resume and (directory / "manifest.json").is_file()):
            raise
        warnings.warn(f"{error}: resuming with the shards in {directory}", stacklevel=2)
        return Shards.open(directory, verify=verify, progress=True)


def _known_tokenizer(config, source, resumed):
    """The tokenizer that the options name; None when one must be trained."""
    directory = config.tokenizer
    if not directory and (resumed or (Path(config.model) / "tokenizer.json").is_file()):
        directory = resumed or config.model
    if not isinstance(source, Shards):
        return load_tokenizer(directory, as_saved=directory == resumed) if directory else None
    if config.tokenizer and tokenizer_hash(load_tokenizer(config.tokenizer)) != tokenizer_hash(source.tokenizer):
        raise ValueError(f"--tokenizer {config.tokenizer} is not the one that {config.train_file[0]} was prepared with")
    return source.tokenizer


def _check_vocabulary(config, model_config, tokenizer):
    """Raises ValueError when the tokenizer does not fit the model. A preset takes the tokenizer's size."""
    if config.model in presets.PRESETS:
        return
    size = config.vocab_size if tokenizer is None else vocabulary_size(tokenizer)
    if size > model_config.vocab_size:
        raise ValueError(
            f"the tokenizer has {size} pieces: {config.model} has a vocab_size of {model_config.vocab_size}"
        )
    pad = model_config.pad_token_id if tokenizer is None else special_ids(tokenizer).pad
    if pad != model_config.pad_token_id:
        raise ValueError(
            f"the tokenizer's [PAD] is {pad}: {config.model} has a pad_token_id of {model_config.pad_token_id}"
        )


def _shards(source, tokenizer, directory, config, rank):
    """Shards of a source that `_source` found; text is prepared into `directory`."""
    if not isinstance(source, list):
        return source
    if rank == 0:
        prepare(
            source, tokenizer, directory,
            text_column=config.text_column, layout=config.layout, num_workers=config.num_workers,
            verify=config.verify,
        )  # fmt: skip
    return Shards.open(directory)


def _loaders(config, train, evaluation, rank, world_size):
    """(MaskedBatches to train on, MaskedBatches to evaluate on or None)."""
    ids = held_out_ids = None
    if evaluation is None and config.eval_share:
        evaluation = train
        try:
            ids, held_out_ids = held_out_split(
                train, config.eval_share, config.seed, max_seq_length=config.max_seq_length, objective=config.objective
            )
        except ValueError as error:
            raise ValueError(f"{error} (use --eval-share 0 for no evaluation, or --eval-file)") from None
    # capacity: constant shapes, because matrix libraries set up, and cache, something for each new shape
    batches = partial(
        MaskedBatches, max_seq_length=config.max_seq_length, tokens_per_batch=config.tokens_per_batch,
        mlm_probability=config.mlm_probability, whole_word_mask=config.whole_word_mask, objective=config.objective,
        capacity=True,
    )  # fmt: skip
    loader = batches(train, seed=config.seed, rank=rank, world_size=world_size, sequence_ids=ids)
    return loader, evaluation and batches(evaluation, seed=EVAL_SEED, sequence_ids=held_out_ids)


def _fingerprint(*shards):
    """sha256 of the contents of the training and the evaluation text."""
    files = [[record["sha256"] for record in one.manifest["shards"]] for one in shards if one is not None]
    return hashlib.sha256(json.dumps(files).encode()).hexdigest()


def _model(config, model_config):
    torch.manual_seed(config.seed)
    directory = Path(config.model)
    if config.objective == "rtd":
        # a directory has been looked at by `_model_config`; else the family's default
        generator = None
        if directory.is_dir():
            generator = _with_dropout(hf_files.read_config(directory / GENERATOR / "config.json"), config)
        model = ReplacedTokenPretraining(
            model_config, generator, embedding_sharing=config.embedding_sharing, rtd_weight=config.rtd_weight
        )
    else:
        model = (Pretraining if config.objective in PAIRS else MaskedLM)(model_config)
    if directory.is_dir():
        model.load_state_dict(model.stored(directory))
    return model
