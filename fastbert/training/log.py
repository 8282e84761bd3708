"""The log of a run: a progress bar and lines, metrics.jsonl, TensorBoard."""

import contextlib
import json
import math
import os
import platform
import sys
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from ..files import write

METRICS = "metrics.jsonl"
# endings of the names of figures that are shown in percent
RATES = ("accuracy", "precision", "recall")
# endings of the names of tasks' scores, which are not
SCORES = ("f1", "mcc", "pearson", "spearman", "mse", "map", "exact_match")
# names of figures, or their parts between underscores, in words; another's words are its name
WORDS = {
    "f1": "F1",
    "mcc": "MCC",
    "map": "mean average precision",
    "mse": "squared error",
    "pearson": "Pearson",
    "spearman": "Spearman",
    "baseline_accuracy": "always guessing the most frequent token",
    "rtd_loss": "detection loss",
    "rtd_accuracy": "detection accuracy",
    "rtd_baseline_accuracy": "always guessing original",
    "rtd_recall": "replaced tokens found",
}


class Log:
    """A context manager. Processes of rank above 0 print and write nothing.

    `last_evaluation` is the last row with an evaluation, {} before the first.
    """

    def __init__(self, directory, rank):
        self.directory, self.rank = Path(directory), rank
        self.console = Console(stderr=True, highlight=False, quiet=rank > 0)
        self.last_evaluation = {}
        self.rows = self.bar = self.tensorboard = None

    def __enter__(self):
        return self

    def __exit__(self, *error):
        if self.bar is not None:
            self.bar.stop()
        for part in (self.rows, self.tensorboard):
            if part is not None:
                # on a full disk closing fails once more
                with contextlib.suppress(OSError):
                    part.close()

    def say(self, line):
        # soft_wrap: no line breaks in a narrow terminal
        self.console.print(line, markup=False, soft_wrap=True)

    def begin(self, progress, total, *, in_seconds):
        """Open the log at `progress`, without later rows, which a resume repeats. The run ends at step or second
        `total`."""
        self.total, self.in_seconds = total, in_seconds
        if self.rank > 0:
            return
        path = self.directory / METRICS
        kept = [row for row in read_metrics(self.directory) if row["step"] <= progress.step] if progress.step else []
        write(path, "".join(json.dumps(row) + "\n" for row in kept))
        self.last_evaluation = next((row for row in reversed(kept) if is_evaluation(row)), {})
        self.rows = open(path, "a", encoding="utf-8", buffering=1)  # noqa: SIM115 (closed in __exit__)
        self.tensorboard = _tensorboard(self.directory / "tensorboard", progress.step)
        columns = (
            TextColumn("{task.description}"), BarColumn(bar_width=16), TextColumn("{task.fields[figures]}"),
            TimeRemainingColumn(), TextColumn("left"),
        )  # fmt: skip
        # a step of a large model takes minutes on a CPU: the time left is estimated from the last hour
        self.bar = Progress(
            *columns, console=self.console, transient=True, disable=not self.console.is_terminal,
            speed_estimate_period=3600,
        )  # fmt: skip
        self.task = self.bar.add_task("", total=total, figures="")
        self.bar.start()
        self.advance(progress)

    def advance(self, progress):
        """Move the bar."""
        if self.rank == 0:
            place = f"step {progress.step}" + ("" if self.in_seconds else f"/{self.total}")
            done = progress.elapsed if self.in_seconds else progress.step
            self.bar.update(self.task, completed=done, description=place)

    def write(self, row):
        """Append a row to metrics.jsonl and show it. Numbers that are not finite become null."""
        if self.rank > 0:
            return
        row = {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in row.items()
        }
        try:
            self.rows.write(json.dumps(row) + "\n")
            if self.tensorboard is not None:
                self.tensorboard.write(row)
        except OSError as error:
            raise OSError(f"the log in {self.directory} cannot be written: {error.strerror}") from None
        said = ", ".join(f"{name} {value}" for name, value in in_words(row).items())
        if is_evaluation(row):
            self.last_evaluation = row
            self.say(f"step {row['step']}: held-out {said}")
            return
        if "examples_per_second" in row:
            said += f", {row['examples_per_second']:,.0f} examples/s"
        said += f", {row['tokens_per_second']:,} tokens/s, fill {row['fill']:.1%}"
        if row["memory_mb"] is not None:
            said += f", {row['memory_mb']:,} MB"
        self.bar.update(self.task, figures=said)
        if not self.console.is_terminal:
            self.say(f"step {row['step']}: {said}, {clock(row['elapsed'])}")


def is_evaluation(row):
    return any(name.startswith("eval_") for name in row)


def words(name):
    """A column's name in words: "rtd_recall" and "eval_rtd_recall" are "replaced tokens found"."""
    name = name.removeprefix("eval_")
    return WORDS.get(name) or " ".join(WORDS.get(part, part) for part in name.split("_"))


def in_words(row, digits=1):
    """{name in words: value as text} of the losses, rates and scores in a row. digits: of percentages.

    The strict scores of tags are left out: they are in metrics.jsonl, and mostly the same.
    """
    shown = {}
    for name, value in row.items():
        if name.removeprefix("eval_").startswith("strict_"):
            continue
        if value is None and name.endswith("loss"):
            shown[words(name)] = "not finite"
        elif name.endswith("loss"):
            shown[words(name)] = f"{value:.3f}"
        elif value is not None and name.endswith(RATES):
            shown[words(name)] = f"{value:.{digits}%}"
        elif name.endswith(SCORES):
            shown[words(name)] = "undefined" if value is None else f"{value:.3f}"
    return shown


def read_metrics(directory):
    """The rows of a run's metrics.jsonl, up to the first line that is none: a crash may have cut the last one."""
    path = Path(directory) / METRICS
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else ():
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            break
        if not isinstance(row, dict) or type(row.get("step")) is not int:
            break
        rows.append(row)
    return rows


# where Linux writes the peak memory of this process
_STATUS = Path("/proc/self/status")


def peak_memory_mb(device):
    """Peak memory so far: of tensors on a GPU, else of this process. None if the system does not tell."""
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated(device) / 1e6)
    if _STATUS.exists():
        # getrusage on Linux begins with the peak of the process that started this one
        return round(int(_STATUS.read_text(encoding="utf-8").partition("VmHWM:")[2].split()[0]) * 1024 / 1e6)
    try:
        import resource
    except ImportError:  # Windows
        return None
    # kilobytes, on macOS bytes
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e6 if sys.platform == "darwin" else 1e3))


def _tensorboard(directory, step):
    """TensorBoard's file of a run that begins after `step`, or None where TensorBoard is not installed."""
    try:
        return TensorBoard(directory, step)
    except ImportError:
        return None


class TensorBoard:
    """An event file. TensorBoard's own writer has a thread, whose errors nobody can catch."""

    def __init__(self, directory, step):
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.record_writer import RecordWriter

        self.event, self.summary = Event, Summary
        directory.mkdir(exist_ok=True)
        name = f"events.out.tfevents.{time.time_ns()}.{platform.node()}.{os.getpid()}"
        self.file = open(directory / name, "xb")  # noqa: SIM115 (closed by the log)
        self.records = RecordWriter(self.file)
        self._add(file_version="brain.Event:2")
        # rows after `step` that an earlier process wrote do not count
        self._add(step=step + 1, session_log=SessionLog(status=SessionLog.START))

    def write(self, row):
        values = [
            self.summary.Value(tag=name.replace("eval_", "eval/", 1), simple_value=value)
            for name, value in row.items()
            if name not in ("step", "elapsed") and value is not None
        ]
        self._add(step=row["step"], summary=self.summary(value=values))

    def close(self):
        self.file.close()

    def _add(self, **fields):
        self.records.write(self.event(wall_time=time.time(), **fields).SerializeToString())
        self.file.flush()


def clock(seconds):
    seconds = max(0, round(seconds))
    return f"{seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"
