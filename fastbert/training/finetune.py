"""Fine-tune an encoder on a task. Read this script from top to bottom:

    options -> checks -> examples, hold-out -> windows -> model -> the loop: micro-batches -> sums -> one division ->
    step -> evaluation, best step, log, checkpoint -> the best model, its scores, its predictions and its card

The output directory then holds:

    config.json model.safetensors tokenizer.json ...   the model: fastbert and transformers load the directory
    task.json                                          what `fastbert predict` needs to know besides
    metrics.json predictions.jsonl errors.md           scores, predictions and mistakes on the held-out examples
    README.md learning_curve.png metrics.jsonl         the model card, the curves, the log
    checkpoint-<step>/ tensorboard/                    checkpoints, TensorBoard's files

Everything random is a pure function of the seed and of the position in the run, as in pretraining: a resumed run equals
an uninterrupted one bit for bit on a CPU. The head, the split, the order and dropout have streams of their own.
"""

import contextlib
import dataclasses
import hashlib
import json
import math
import shutil
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from .. import ops
from ..data.batches import MAX_TOKENS
from ..data.tokenizer import tokenizer_hash
from ..files import lock, sha256
from ..tasks import results, table
from ..tasks.examples import Pieces, predictions, read_files
from ..tasks.predictor import flat_figures
from ..tasks.retrieval_files import PROMPTS
from ..tasks.schemes import SCHEMES
from . import card, checkpoint, finetune_card, finetune_seeds, lora, optim, processes
from .example_batches import ExampleBatches, class_weights
from .finetune_inputs import checked_lora, hold_out, main_score, spec_of, tokenizer_and_config
from .finetune_seeds import Outcome
from .log import Log
from .loop import Progress, Run
from .options import check_length, command_line, flag, option, take_bf16, tidy, with_local_model
from .step_sums import accumulate, forward
from .task_model import model_for
from .windows import encoded

# by default; a fresh adapter begins at zero and has far to go (Hu et al. 2021, D.1)
LEARNING_RATE, LORA_LEARNING_RATE = 3e-5, 3e-4


@dataclass(frozen=True)
class FinetuneConfig:
    """The options of `fastbert finetune`, one field each. Raises ValueError with the wrong option and its value."""

    train_file: tuple[str, ...] = option(
        (), "Examples to train on: .csv, .tsv, .jsonl, .parquet files, or a directory with train.* and dev.*."
    )
    eval_file: tuple[str, ...] = option((), "Examples to evaluate on. Without it, part of the examples is held out.")
    eval_share: float = option(0.1, "Share of the examples held out for evaluation; 0 for none.", least=0, below=1)
    task: str = option("auto", f"The task: auto, or one of {', '.join(table.TASKS)}.")
    text_column: tuple[str, ...] = option((), "Column of the text, or both columns of a pair. Found by name otherwise.")
    label_column: str | None = option(None, "Column of the label, labels or score. Found by name by default.")
    group_column: str | None = option(None, "Column of a group, such as an author, that is held out as a whole.")
    output_dir: str = option("", "Directory for the model, checkpoints and logs.")
    model: str = option(
        "", "Model to start from: a directory or a name on the HuggingFace hub; a preset or a config.json starts fresh."
    )
    revision: str | None = option(None, "Branch, tag or commit of a --model on the hub. Its main branch by default.")
    tokenizer: str | None = option(None, "Directory or name of the tokenizer. The model's own by default.")
    max_seq_length: int | None = option(
        None,
        "Maximum tokens in a window, special tokens included. Up to 512, as the model allows, by default.",
        least=8,
    )
    scheme: str | None = option(
        None, "How the tags of entities are written, for the task tag. Found in each file by default.", SCHEMES
    )
    stride: int | None = option(
        None, "Tokens that neighbouring windows of a long text share. A quarter of a window by default.", least=0
    )
    truncate: bool = option(False, "Cut texts that are too long instead of reading them in windows.")
    batch_size: int = option(16, "Examples in a micro-batch.", least=1)
    tokens_per_batch: int = option(
        8192, "Maximum tokens computed at once: a larger micro-batch runs in parts, with the same gradient.",
        least=8, most=MAX_TOKENS,
    )  # fmt: skip
    gradient_accumulation_steps: int = option(1, "Micro-batches per step.", least=1)
    max_steps: int | None = option(None, "Length of the run, in steps.", least=1)
    epochs: float | None = option(
        None, "Length of the run, in passes over the examples; 3 if no length is given.", above=0, most=1e4
    )
    max_minutes: float | None = option(
        None, "Length of the run, in minutes of training; the schedule follows the clock.", above=0, most=1e7
    )
    learning_rate: float | None = option(
        None,
        "Peak learning rate, 2e-5 to 5e-5 as a rule. 3e-5, or 3e-4 with --lora, by default. --resume may lower it.",
        above=0,
    )
    schedule: str = option("linear", "Learning rate schedule after the warm-up.", tuple(optim.SCHEDULES))
    warmup_ratio: float = option(0.1, "Share of the run spent on warm-up.", least=0, most=1)
    warmup_steps: int | None = option(None, "Warm-up in steps. Overrides --warmup-ratio.", least=0)
    layer_decay: float = option(
        1.0, "Factor on the learning rate from each layer to the one below it; 1 for none.", above=0, most=1
    )
    weight_decay: float = option(0.01, "AdamW's weight decay. Biases and norms have none.", least=0)
    adam_beta1: float = option(0.9, "AdamW's beta 1.", least=0, below=1)
    adam_beta2: float = option(0.999, "AdamW's beta 2.", least=0, below=1)
    adam_epsilon: float = option(1e-8, "AdamW's epsilon.", above=0)
    max_grad_norm: float = option(1.0, "Gradient norm to clip at; 0 for no clipping.", least=0)
    dropout: float | None = option(
        None, "Dropout of hidden states and attention. The model's own by default.", least=0, below=1
    )
    label_smoothing: float = option(0.0, "Share of a label's probability spread over all labels.", least=0, below=1)
    loss: str | None = option(
        None, "Loss of a retrieval task: contrastive, symmetric or margin for queries with documents, cosent or cosine "
        "for pairs with a score, softmax for pairs with a label; of rerank, binary, listwise or margin. The first that "
        "fits the file by default."
    )  # fmt: skip
    scale: float | None = option(
        None, "Inverse temperature of similarities in the loss of a retrieval task: 20, or 1 for sparse, by default.",
        above=0,
    )  # fmt: skip
    flops_weight: float | None = option(
        None, "Factor of the regulariser that makes sparse vectors sparse (FLOPS); 3e-5 by default.", least=0
    )
    widths: tuple[str, ...] = option(
        (), "Vector sizes that shall be usable alone (Matryoshka): the losses of the first so many columns are added."
    )
    pooling: str | None = option(None, "How tokens become a vector, such as mean or cls. The model's own by default.")
    prompts: str | None = option(
        None, "Texts before queries and documents, in training and in the saved model. The model's own by default.",
        tuple(PROMPTS),
    )  # fmt: skip
    score_range: str | None = option(
        None, "Least and greatest score of the training file for --loss cosine, such as 0,5. Within -1 to 1 by default."
    )
    class_weights: str | None = option(
        None, 'Weights of the labels in the loss: balanced, or by name, such as "spam=5,ham=1".'
    )
    lora: str | None = option(
        None, "Train an adapter in place of the encoder: r=8, or r=8,alpha=16,dropout=0.1,target=query+value."
    )
    freeze_encoder: bool = option(False, "Train the head alone: faster and weaker than training the whole model.")
    metric: str | None = option(None, "The score that decides which step is best. The task's own by default.")
    patience: int = option(3, "Evaluations without a better score after which training ends early.", least=1)
    dtype: str = option(
        "auto",
        "What matrix products run in. auto: bf16 where this machine multiplies it faster. Parameters are fp32.",
        processes.DTYPES,
    )
    bf16: bool | None = option(None, "The same as --dtype bf16.")
    seed: int = option(0, "Seed of everything random.", least=-(2**63), most=2**63 - 1)
    split_seed: int | None = option(
        None, "Seed of the held-out share. --seed by default.", least=-(2**63), most=2**63 - 1
    )
    seeds: int = option(1, "Runs with so many seeds, from --seed on; the best is published.", least=1, most=1000)
    resume: bool = option(False, "Resume the run in the output directory from its last good checkpoint.")
    save_steps: int | None = option(
        None, "Steps between checkpoints. One a pass over the examples by default.", least=1
    )
    save_total_limit: int = option(1, "Checkpoints to keep.", least=1)
    eval_steps: int | None = option(None, "Steps between evaluations. One a pass by default.", least=1)
    logging_steps: int = option(10, "Steps between rows of the log.", least=1)
    device: str = option("auto", "auto, cpu, cuda or cuda:1.")

    def __post_init__(self):
        tidy(self)
        take_bf16(self)
        for name in ("train_file", "output_dir", "model"):
            if not getattr(self, name):
                raise ValueError(f"{flag(name)} is missing")
        if len(self.text_column) > 2:
            raise ValueError(f"--text-column names {len(self.text_column)} columns: expected one, or two for a pair")
        check_length(self)
        if self.task != "auto":
            table.task(self.task)
        if checked_lora(self) is not None:
            lora.check_libraries()
        if self.learning_rate is None:
            object.__setattr__(self, "learning_rate", LORA_LEARNING_RATE if self.lora else LEARNING_RATE)


# a resumed run may change these options too, see checkpoint.check_same_run
MAY_DIFFER = {"tokens_per_batch", "patience", "seeds"}


# ---------------------------------------------------------------------------------------------------------------------


def finetune(config: FinetuneConfig) -> dict:
    """Run `config` to its end. SIGTERM and SIGINT end it after the current step, with a checkpoint.

    Returns the contents of metrics.json ({} without held-out examples), with the number of the signal that ended the
    run, or None, in "signal". Raises ValueError or OSError for errors of the caller, if possible before any work, and
    FloatingPointError when training diverges. Under torchrun every process takes its share of the micro-batches.
    With --seeds N: see `finetune_seeds.with_seeds`.
    """
    return finetune_seeds.with_seeds(config, train) if config.seeds > 1 else train(config).metrics


def train(config):
    """The Outcome of a run with one seed."""
    rank, world_size = processes.join()
    command = command_line("finetune", dataclasses.replace(config, resume=False))
    output_dir = Path(config.output_dir)
    device = processes.device_of(config.device)
    # a wrong path leaves no directory behind
    train_files, eval_files = table.train_and_eval_files(config.train_file, config.eval_file)
    with lock(output_dir) if rank == 0 else contextlib.nullcontext(), Log(output_dir, rank) as log:
        resumed = checkpoint.to_resume(output_dir, config.resume, log.say)
        with processes.first_process_first(rank):
            # the others have looked at the directory before the first writes into it
            here = with_local_model(config)
            if here.model != config.model:
                log.say(f"--model {config.model}: commit {Path(here.model).name} of the hub")
            tokenizer, encoder_config = tokenizer_and_config(here, resumed)
            if (adapts := checked_lora(config)) is not None:
                lora.check_targets(adapts, encoder_config)
        state = checkpoint.read_state(resumed) if resumed else None
        if state:
            checkpoint.check_same_run(resumed, state, config, tokenizer_hash(tokenizer), MAY_DIFFER)
        config = dataclasses.replace(config, dtype=processes.dtype_of(config, device, resumed, state, log.say))

        # files -> examples -> training and held-out examples
        name = table.detect(train_files[0]) if config.task == "auto" else config.task
        task = table.task(name)
        if config.task == "auto":
            log.say(f"--task auto: {train_files[0]} is read as {name}")
        spec = spec_of(here, name, encoder_config)
        training, notes = read_files(task, train_files, spec)
        if eval_files or config.eval_share:
            table.check_libraries()
        evaluation, eval_notes = read_files(task, eval_files, spec) if eval_files else ([], [])
        for said in filter(None, map(table.how_read, train_files)):
            log.say(said)
        for note in (*notes, *eval_notes):
            if said := note.said():
                log.say(said)
        if not eval_files and config.eval_share:
            training, evaluation = hold_out(config, training, train_files[0], log.say)
        if torn := results.torn(training, evaluation):
            log.say(f"{len(torn):,} texts have two labels: errors.md names them")
        log.say(f"{len(training):,} examples to train on, {len(evaluation):,} held out")
        if alike := spec.alike():
            log.say(f"labels that differ in case alone are different labels: {', '.join(map(repr, alike))}")
        kind, fields = task.head(spec)
        metric = main_score(config, task, spec)
        pieces = Pieces(tokenizer, spec)
        windows = encoded(task, training, pieces, spec, say=log.say)
        lengths = dict(pieces.lengths)
        if cut := pieces.said():
            log.say(cut)
        # a loss that compares the rows of a batch needs it whole
        is_together = hasattr(task, "TOGETHER")
        if is_together and min(len(training), config.batch_size) < 2:
            raise ValueError(f"--task {name} compares the rows of a batch: expected at least two, and --batch-size 2")
        loader = ExampleBatches(
            windows, batch_size=config.batch_size,
            tokens_per_batch=math.inf if is_together else config.tokens_per_batch, seed=config.seed,
            class_weights=class_weights(config.class_weights, spec, windows),
            token_types=encoder_config.type_vocab_size, rank=rank, world_size=world_size,
        )  # fmt: skip
        fingerprint = hashlib.sha256(json.dumps([sha256(file) for file in (*train_files, *eval_files)]).encode())
        if state and state["data"] != fingerprint.hexdigest():
            raise ValueError(f"--resume: the examples are not those that {resumed} was trained on")

        # model and optimizer
        base = lora.weights_hash(here.model) if adapts else None
        if state and state.get("base") != base:
            raise ValueError(f"--resume: the weights of {config.model} are not those that {resumed} adapts")
        # a checkpoint has the weights, but with --lora those of the adapter alone
        model = model_for(here, kind, encoder_config, fields, None if adapts else resumed, log)
        if adapts:
            model = lora.with_adapter(model, adapts, config.model, config.revision)
            share = sum(p.numel() for p in model.parameters() if p.requires_grad)
            log.say(f"--lora trains {share:,} of {sum(p.numel() for p in model.parameters()):,} parameters")
        model = model.to(device).train()
        model.label_smoothing = config.label_smoothing
        if hasattr(task, "objective"):
            model.objective = task.objective(spec)
        if is_together:
            model.tokens_per_pass = config.tokens_per_batch
        if config.freeze_encoder:
            log.say("--freeze-encoder trains the head alone: expect clearly lower scores than without it")
            model.encoder.requires_grad_(False)
        optimizer = optim.adamw(
            model, learning_rate=config.learning_rate, weight_decay=config.weight_decay,
            betas=(config.adam_beta1, config.adam_beta2), epsilon=config.adam_epsilon, layer_decay=config.layer_decay,
        )  # fmt: skip
        progress, best = Progress(), {"score": None, "step": 0, "since": 0, "evaluated": 0}
        if resumed:
            checkpoint.load_checkpoint(resumed, model, optimizer)
            progress, best = Progress.restored(state["progress"]), state["best"]
        if (config.epochs, config.max_steps, config.max_minutes) == (None,) * 3:
            config = dataclasses.replace(config, epochs=3.0)
        total, warmup = optim.length(config, loader)
        facts = {
            "config": dataclasses.asdict(config), "model_config": model.config.to_dict(),
            "tokenizer": tokenizer_hash(tokenizer), "data": fingerprint.hexdigest(), "best": best,
            "base": base,
        }  # fmt: skip
        log.begin(progress, total, in_seconds=config.max_minutes is not None)
        keep = partial(keep_best, output_dir, model, best, direction=task.SCORES[metric])
        if log.last_evaluation.get("step", 0) > best["evaluated"]:
            # a run that was stopped in an evaluation has its checkpoint from before it
            keep(progress.step, log.last_evaluation[column(metric)])

        def predict(examples, model=model, **more):
            run = partial(forward, model, device=device, bf16=config.dtype == "bf16")
            return predictions(
                task, model, spec, pieces, examples, tokens_per_batch=config.tokens_per_batch, run=run, **more
            )

        # a resumed run multiplies by the libraries that it began with
        products = state.get("products") if state else {}
        with ops.libraries.restored(products), processes.signals() as caught:
            a_pass = max(1, loader.num_batches(0) // config.gradient_accumulation_steps)
            run = Run(
                dataclasses.replace(
                    config, eval_steps=config.eval_steps or a_pass, save_steps=config.save_steps or a_pass
                ),
                model, optimizer, tokenizer, facts, progress, log, total, caught,
            )  # fmt: skip
            # the first process alone writes checkpoints
            run.resumed = resumed if rank == 0 else None
            stop_early(run, best, config.patience)
            for step in run.steps(loader, evaluates=bool(evaluation)):
                if step.batches is None:
                    step.row = evaluate(model, task, spec, predict, evaluation, lambda: caught)
                    if step.row is not None:
                        keep(progress.step, step.row[column(metric)])
                        stop_early(run, best, config.patience)
                    continue
                sums = accumulate(model, step.batches, bf16=config.dtype == "bf16")
                factor = optim.SCHEDULES[config.schedule](step.position, total, warmup)
                run.update(step, sums, config.learning_rate * factor)

        outcome = Outcome({"signal": run.stopped_by()})
        if rank == 0 and run.finished:
            if best["score"] is not None:
                stored = best_directory(output_dir, best["step"])
                # a finished run that is resumed has published it
                model.load_state_dict(model.stored(stored if stored.is_dir() else output_dir))
            # the scores are those of what is published
            final = model.merged() if adapts else model.eval()
            metrics = {}
            if evaluation:
                found = [prediction for _, prediction in predict(evaluation, final)]
                scores = task.score(evaluation, found, spec, tune=True)
                outcome.resampled = results.resampled(task, spec, evaluation, found)
                metrics = results.summary(
                    task, spec, evaluation, found, scores, eval_files, [*notes, *eval_notes], outcome.resampled
                )
                metrics |= {"step": best["step"] or progress.step, "train_examples": len(training)}
                results.write_all(output_dir, spec, evaluation, found, metrics, training, lengths)
            checkpoint.publish(output_dir, lora.Published(final, model) if adapts else model, tokenizer)
            spec.save(output_dir)
            for path in output_dir.glob("best-*"):
                shutil.rmtree(path, ignore_errors=True)
            card.learning_curve(output_dir)
            outcome.metrics |= metrics
            outcome.write_card = partial(
                finetune_card.write_card, facts=facts, spec=spec, metrics=metrics, progress=progress
            )
            outcome.write_card(output_dir, command)
            log.say(f"done: {output_dir} holds the model and README.md")
        return outcome


def evaluate(model, task, spec, predict, examples, interrupted):
    """The figures of the task on held-out examples, by `column`, or None when `interrupted()` is true.

    With thresholds chosen on these examples, as in the end: at 0.5, rare labels would score 0 for most of the run.
    """
    model.eval()
    try:
        found = [prediction for _, prediction in predict(examples, interrupted=interrupted)]
    finally:
        model.train()
    if len(found) < len(examples):
        return None
    spec = dataclasses.replace(spec, settings=dict(spec.settings))
    scores = task.score(examples, found, spec, tune=True)
    return {column(name): value for name, value in flat_figures(scores).items()}


def column(name):
    """The log's name of a figure on held-out examples: that of the same figure in training, where there is one."""
    same = {"log_loss": "label_loss", "accuracy": "label_accuracy"}
    return f"eval_{same.get(name, name)}"


def keep_best(directory, model, best, step, score, direction):
    """Save the model if its score is the best so far. A tie keeps the earlier step, and NaN or None is never best.

    Models of earlier best steps stay as long as a checkpoint refers to them.
    """
    best["evaluated"] = step
    finite = score is not None and math.isfinite(score)
    if not finite or (best["score"] is not None and direction * score <= direction * best["score"]):
        best["since"] += 1
        return
    model.save_pretrained(best_directory(directory, step))
    best |= {"score": score, "step": step, "since": 0}
    needed = {step}
    for path in directory.glob(f"checkpoint-*/{checkpoint.STATE}"):
        with contextlib.suppress(OSError, ValueError):
            needed.add(checkpoint.read_state(path.parent)["best"]["step"])
    for path in directory.glob("best-*"):
        if path not in {best_directory(directory, one) for one in needed}:
            shutil.rmtree(path, ignore_errors=True)


def best_directory(directory, step):
    return directory / f"best-{step}"


def stop_early(run, best, patience):
    """End the run after `patience` evaluations without a better score."""
    if best["since"] >= patience:
        run.log.say(f"no better score in {patience} evaluations: training ends, step {best['step']} is the best")
        run.total = 0
