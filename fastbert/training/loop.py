"""The loop of a training script. The script runs it itself:

    for step in run.steps(loader, evaluates=True):
        if step.batches is None:
            step.row = ...               an evaluation: its figures
        else:
            sums = accumulate(model, step.batches)
            run.update(step, sums, learning_rate)

Between the steps the loop keeps time, handles signals, saves checkpoints and writes the log.
"""

import hashlib
import math
import signal
import time
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from .. import ops
from . import checkpoint, optim, processes
from .log import peak_memory_mb
from .memory import keep_freed_memory
from .step_sums import column, figures, losses_in

# the run gives up after so many steps in a row without a finite gradient
MAX_NONFINITE = 5
NO_GRADIENT = "no finite gradient in the {} steps up to {}"


@dataclass
class Progress:
    """How far a run has come. A resume needs this, the parameters and the optimizer's state."""

    # optimizer steps so far, skipped ones included: the schedule is a function of this
    step: int = 0
    epoch: int = 0
    # micro-batches of this epoch so far
    batch: int = 0
    tokens: int = 0
    # seconds of training and evaluation, over all resumes
    elapsed: float = 0.0
    # steps skipped because their gradient was not finite
    skipped: int = 0
    # steps skipped because there was nothing to predict
    empty: int = 0
    # the step of the last evaluation
    evaluated: int = 0
    # sums since the last row of the log
    window: dict = field(default_factory=dict)

    @classmethod
    def restored(cls, values):
        """From what a checkpoint says. Raises ValueError for other names and for values that no run has."""
        if missing := [name for name in ("step", "epoch", "batch") if name not in values]:
            raise ValueError(f"the checkpoint's progress has no {missing[0]}: it is damaged")
        for name, value in values.items():
            kind = cls.__annotations__.get(name)
            if kind is dict:
                # sums may be NaN, after a step that was skipped
                fits = isinstance(value, dict) and all(
                    type(x) is float or (type(x) is int and abs(x) < 2**63) for x in value.values()
                )
            else:
                fits = kind is not None and type(value) in (int, kind) and 0 <= value < 2**63
            if not fits:
                raise ValueError(f"the checkpoint's progress has {name} {value!r}: it is damaged")
        return cls(**values)

    def place(self):
        """The first columns of every row of the log."""
        place = {"step": self.step, "epoch": self.epoch, "tokens": self.tokens}
        return place | {"elapsed": round(self.elapsed, 3)}


@dataclass
class Step:
    """One step of training, or one evaluation. An evaluation has no micro-batches."""

    # position in the schedule: steps, or seconds with --max-minutes
    position: float
    batches: list | None = None
    # the script sets the figures of an evaluation; None when it was interrupted
    row: dict | None = None
    began: float = field(default_factory=time.monotonic)


@dataclass
class Run:
    """A run of a training script.

    config: its options; those read here have the names of PretrainConfig. facts: what checkpoints record of the run
    besides its progress. total: its length, see `optim.length`. caught: signals received so far, see
    `processes.signals`.
    """

    config: Any
    model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    tokenizer: Any
    facts: dict
    progress: Progress
    log: Any
    total: float
    caught: list
    finished: bool = False
    # steps in a row without a finite gradient
    nonfinite: int = 0
    # the checkpoint that the run resumed from
    resumed: Path | None = None
    # the last checkpoint, until its parameters have given a finite gradient; older ones are kept until then
    unproven: Path | None = None

    def steps(self, loader, *, evaluates):
        """Yields a Step for each step of training and each evaluation, until the run is finished or gets a signal.

        loader: gives the micro-batches, see `MaskedBatches.epoch`. evaluates: whether there is held-out text; the first
        process evaluates. Raises FloatingPointError when a parameter is dead, and when the run ends without a finite
        gradient or held-out loss. The last checkpoint is then from before.
        """
        config, progress, self.unproven = self.config, self.progress, self.resumed
        rank, _ = processes.join()
        if next(self.model.parameters()).device.type == "cpu":
            keep_freed_memory()
        # an evaluation after the last checkpoint
        progress.evaluated = max(progress.evaluated, self.log.last_evaluation.get("step", 0))
        stream = micro_batches(loader, progress.epoch, progress.batch)
        saved, save_due = progress.step, False
        earlier, began = progress.elapsed, time.monotonic()
        while True:
            elapsed = earlier + time.monotonic() - began
            # the script may end the run by a total of 0, in the first process alone
            progress.elapsed, stop, ended = processes.total(
                elapsed if rank == 0 else 0.0, len(self.caught), self.total <= 0
            )
            position = progress.step if config.max_minutes is None else progress.elapsed
            self.finished = position >= self.total or ended > 0

            # between steps: evaluate, save, end
            lost = False
            if evaluates and (self.finished or progress.step % config.eval_steps == 0):
                if rank == 0 and progress.step > progress.evaluated:
                    yield (step := Step(position))
                    if step.row is not None:
                        self.log.write(progress.place() | step.row)
                        progress.evaluated = progress.step
                    self.finished = self.finished or self.total <= 0
                row = self.log.last_evaluation
                lost = row.get("step") == progress.step and None in (row[name] for name in row if name.endswith("loss"))
                # a resume repeats an evaluation that was interrupted here, unless a step comes first
                interrupted = rank == 0 and progress.step > progress.evaluated
                stop, lost, interrupted, ended = processes.total(len(self.caught), lost, interrupted, self.finished)
                self.finished = ended > 0 and not interrupted
            if self.finished and lost:
                raise self._diverged(f"the held-out loss after step {progress.step} is not finite")
            if self.finished and self.nonfinite:
                raise self._diverged(NO_GRADIENT.format(self.nonfinite, progress.step))
            # a checkpoint waits for a finite gradient and a finite held-out loss
            save_due = progress.step != saved and (save_due or progress.step % config.save_steps == 0)
            if progress.step != saved and (self.finished or stop or save_due) and not self.nonfinite and not lost:
                if dead := checkpoint.dead_parameter(self.model):
                    raise self._diverged(f"after step {progress.step} parameter {dead}")
                if rank == 0:
                    self.unproven = checkpoint.save_checkpoint(
                        config.output_dir, progress.step, self.model, self.optimizer, self.tokenizer,
                        self.facts | {"progress": asdict(progress), "products": ops.libraries.chosen()},
                    )  # fmt: skip
                saved, save_due = progress.step, False
            if self.finished:
                self._prune()
            if self.finished or stop:
                return

            step = Step(position, [])
            for progress.epoch, progress.batch, batch in islice(stream, config.gradient_accumulation_steps):
                # a loader may give a large batch in parts
                for part in batch if isinstance(batch, list) else [batch]:
                    part.seed = dropout_seed(config.seed, progress.step, len(step.batches), rank)
                    step.batches.append(part)
            yield step

    def update(self, step, sums, learning_rate):
        """Clip the gradients, step the optimizer, write the log.

        sums: what `accumulate` returned. The optimizer does not step when a gradient is not finite or there is none.
        Raises FloatingPointError when that is so in MAX_NONFINITE steps in a row.
        """
        config, progress, window, norm = self.config, self.progress, self.progress.window, None
        if not any(sums[column(name, "count")] for name in losses_in(sums)):
            progress.empty += 1
        else:
            norm = optim.clip_gradients(self.model.parameters(), config.max_grad_norm).item()
            if math.isfinite(norm):
                self._prune()
                for group in self.optimizer.param_groups:
                    group["lr"] = learning_rate * group.get("scale", 1.0)
                self.optimizer.step()
                self.nonfinite = 0
            else:
                progress.skipped += 1
                self.nonfinite += 1
                self.log.say(
                    f"step {progress.step + 1} is skipped: its gradient norm is {norm} "
                    f"(epoch {progress.epoch}, up to micro-batch {progress.batch})"
                )
        self.optimizer.zero_grad(set_to_none=True)

        progress.step += 1
        progress.tokens += int(sums["tokens"])
        # of a task; the other processes have as many
        examples = sum(len(batch.cu_examples) - 1 for batch in step.batches if batch.cu_examples is not None)
        more = {"examples": examples * processes.join()[1]} if examples else {}
        for name, value in (sums | more | {"seconds": time.monotonic() - step.began}).items():
            window[name] = window.get(name, 0) + value
        if progress.step % config.logging_steps == 0:
            self.log.write(progress.place() | figures(window) | {
                "fill": window["tokens"] / window["capacity"],
                "tokens_per_second": round(window["tokens"] / window["seconds"]),
                **({"examples_per_second": window["examples"] / window["seconds"]} if examples else {}),
                "memory_mb": peak_memory_mb(next(self.model.parameters()).device),
                "learning_rate": learning_rate, "gradient_norm": norm,
                "skipped_steps": progress.skipped, "empty_steps": progress.empty,
            })  # fmt: skip
            window.clear()
        self.log.advance(progress)
        if self.nonfinite == MAX_NONFINITE:
            raise self._diverged(NO_GRADIENT.format(self.nonfinite, progress.step))

    def stopped_by(self):
        """The number of the signal that ended the run before its time, else None. Says that the run was stopped."""
        if self.finished:
            return None
        name = signal.Signals(self.caught[0]).name if self.caught else "another process"
        self.log.say(f"stopped by {name} after step {self.progress.step}: continue with --resume")
        return self.caught[0] if self.caught else None

    def _prune(self):
        """The parameters of the last checkpoint have proved good: older checkpoints may go."""
        if self.unproven is not None:
            checkpoint.prune(self.unproven, self.config.save_total_limit)
            self.unproven = None

    def _diverged(self, why):
        """The error that ends the run. A checkpoint that the run resumed from in vain is set aside."""
        if self.unproven is not None and self.unproven == self.resumed:
            self.log.say(
                f"{self.unproven} gave no finite gradient: it is renamed {checkpoint.set_aside(self.unproven)}"
            )
        return FloatingPointError(f"training diverged: {why}; continue with --resume and a lower --learning-rate")


def dropout_seed(seed, step, micro_batch, rank):
    """The seed of all dropout in one micro-batch, int64 [1]: a function of the run's seed and the micro-batch."""
    digest = hashlib.blake2b(f"{seed} {step} {micro_batch} {rank}".encode(), digest_size=8).digest()
    return torch.tensor([int.from_bytes(digest, "little", signed=True)])


def micro_batches(loader, epoch, start):
    """Yields (epoch, number of its batches done, batch) without end, starting after `start` batches of `epoch`."""
    while True:
        done = start
        for done, batch in enumerate(loader.epoch(epoch, start=start), start + 1):
            yield epoch, done, batch
        if not done:
            raise ValueError("the text is too short for a batch")
        epoch, start = epoch + 1, 0
