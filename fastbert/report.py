"""What a run tells: a progress bar and lines, metrics.jsonl, TensorBoard; at its end a picture and a model card."""

import json
import math
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from . import __version__
from .checkpoint import write_text
from .heads import GENERATOR

METRICS = "metrics.jsonl"
# Okabe and Ito's colours, told apart with every kind of colour vision
TRAIN, HELD_OUT, BASELINE = "#56B4E9", "#D55E00", "#555555"


class Log:
    """Use with `with`. Processes of rank above 0 say and write nothing.

    `last_evaluation` is the last row with an evaluation, {} before there is one.
    """

    def __init__(self, directory, rank):
        self.directory, self.rank = Path(directory), rank
        self.console = Console(stderr=True, highlight=False, quiet=rank > 0)
        self.last_evaluation = {}
        self.rows = self.bar = self.tensorboard = None

    def __enter__(self):
        return self

    def __exit__(self, *error):
        for part in (self.rows, self.tensorboard):
            if part is not None:
                part.close()
        if self.bar is not None:
            self.bar.stop()

    def say(self, line):
        # soft_wrap: a line stays one line, however narrow the terminal
        self.console.print(line, markup=False, soft_wrap=True)

    def begin(self, progress, total, *, in_seconds):
        """Open the log at `progress`: later rows, from before a resume, go. The run ends at step or second `total`."""
        self.total, self.in_seconds = total, in_seconds
        self.began = (progress.step, progress.elapsed)
        if self.rank > 0:
            return
        path = self.directory / METRICS
        kept = [row for row in read_metrics(self.directory) if row["step"] <= progress.step] if progress.step else []
        write_text(path, "".join(json.dumps(row) + "\n" for row in kept))
        self.last_evaluation = next((row for row in reversed(kept) if "eval_loss" in row), {})
        self.rows = open(path, "a", encoding="utf-8", buffering=1)  # noqa: SIM115 (closed in __exit__)
        self.tensorboard = _tensorboard(self.directory / "tensorboard", progress.step)
        columns = (
            TextColumn("{task.fields[place]}"), BarColumn(bar_width=16), TextColumn("{task.fields[figures]}"),
            TextColumn("{task.fields[left]} left"),
        )  # fmt: skip
        self.bar = Progress(*columns, console=self.console, transient=True, disable=not self.console.is_terminal)
        self.task = self.bar.add_task("", total=total, place="step 0", figures="", left="?")
        self.bar.start()
        self.advance(progress)

    def advance(self, progress):
        """Move the bar."""
        if self.rank > 0:
            return
        now, start = (progress.elapsed, self.began[1]) if self.in_seconds else (progress.step, self.began[0])
        left = "?"
        if now > start:
            left = _clock((progress.elapsed - self.began[1]) * (self.total - now) / (now - start))
        place = f"step {progress.step}" + ("" if self.in_seconds else f"/{self.total}")
        self.bar.update(self.task, completed=now, place=place, left=left)

    def write(self, row):
        """Append a row to metrics.jsonl, and show it. Numbers that are not finite become null."""
        if self.rank > 0:
            return
        row = {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in row.items()
        }
        self.rows.write(json.dumps(row) + "\n")
        if self.tensorboard is not None:
            for name, value in row.items():
                if name not in ("step", "elapsed") and value is not None:
                    self.tensorboard.add_scalar(name.replace("eval_", "eval/", 1), value, row["step"])
        if "eval_loss" in row:
            self.last_evaluation = row
            pairs = f", pairs {row['eval_pair_accuracy']:.1%}" if "eval_pair_accuracy" in row else ""
            replaced = ""
            if "eval_rtd_loss" in row:
                replaced = (
                    f"; replaced tokens found {row['eval_rtd_recall']:.1%}, right {row['eval_rtd_accuracy']:.1%}"
                    f" (always original: {row['eval_rtd_baseline_accuracy']:.1%})"
                )
            loss, accuracy, baseline = (row[f"eval_{x}"] for x in ("loss", "masked_accuracy", "baseline_accuracy"))
            self.say(
                f"step {row['step']}: held-out loss {_number(loss)}, masked accuracy {accuracy:.1%}{pairs}"
                f" (always the most frequent token: {baseline:.1%}){replaced}"
            )
            return
        replaced = ""
        if "rtd_loss" in row:
            replaced = (
                f"replaced: loss {_number(row['rtd_loss'])}  found {row['rtd_recall']:.1%}  "
                f"right {row['rtd_accuracy']:.1%}  "
            )
        figures = (
            f"loss {_number(row['loss'])}  accuracy {row['masked_accuracy']:.1%}  {replaced}"
            f"{row['tokens_per_second']:,} tokens/s  fill {row['fill']:.1%}  {row['memory_mb']:,.0f} MB"
        )
        self.bar.update(self.task, figures=figures)
        if not self.console.is_terminal:
            self.say(f"step {row['step']}: {figures}  {_clock(row['elapsed'])}")


def read_metrics(directory):
    """The rows of a run's metrics.jsonl; a last line that a crash has cut is left out."""
    path = Path(directory) / METRICS
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


def peak_memory_mb(device):
    """Most memory held so far: by tensors on a GPU, else by this process."""
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated(device) / 1e6)
    import resource  # not on Windows

    # kilobytes, on macOS bytes
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e6 if sys.platform == "darwin" else 1e3))


def _tensorboard(directory, step):
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(directory), purge_step=step + 1)


def _clock(seconds):
    seconds = max(0, round(seconds))
    return f"{seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"


def _number(value):
    return "not finite" if value is None else f"{value:.3f}"


def learning_curve(directory):
    """Draw learning_curve.png from metrics.jsonl: losses and accuracies, against steps and tokens.

    Returns its path, or None when matplotlib is not installed or there is nothing to draw.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.ticker import EngFormatter, PercentFormatter
    except ImportError:
        return None
    rows = read_metrics(directory)
    train = [row for row in rows if row.get("loss") is not None]
    held_out = [row for row in rows if row.get("eval_loss") is not None]
    if not train and not held_out:
        return None
    # figure -> its title; shares have a baseline: its figure and its name
    panels = {"loss": "Loss per picked token (nats)", "masked_accuracy": "Masked accuracy"}
    shares = {"masked_accuracy": ("baseline_accuracy", "always the most frequent token")}
    if "rtd_loss" in (train or [{}])[0] or "eval_rtd_loss" in (held_out or [{}])[0]:
        panels |= {
            "rtd_loss": "Replaced or original: loss per token (nats)",
            "rtd_accuracy": "Replaced or original: accuracy",
            "rtd_recall": "Replaced tokens that were found",
        }
        shares |= {"rtd_accuracy": ("rtd_baseline_accuracy", "always original"), "rtd_recall": (None, None)}
    columns = min(len(panels), 3)
    lines = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(5 * columns, 4.2 * lines), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    tokens_per_step = rows[-1]["tokens"] / rows[-1]["step"]
    places = figure.subplots(lines, columns, squeeze=False)
    if lines > 1:
        # the generator above, the discriminator below
        places[0, -1].set_axis_off()
        places = [*places[0, :-1], *places[1]]
    else:
        places = places[0]
    for axes, (name, title) in zip(places, panels.items(), strict=True):
        axes.plot([r["step"] for r in train], [r[name] for r in train], color=TRAIN, linewidth=1.2, label="training")
        if held_out:
            axes.plot(
                [r["step"] for r in held_out], [r[f"eval_{name}"] for r in held_out],
                color=HELD_OUT, linewidth=2, marker="o", markersize=4, label="held-out text",
            )  # fmt: skip
        if name in shares:
            baseline, meaning = shares[name]
            axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=1 if name == "rtd_accuracy" else 0))
            if held_out and baseline:
                values = [row[f"eval_{baseline}"] for row in held_out]
                look = dict(color=BASELINE, linewidth=1.2, linestyle="--", label=meaning)
                # the better a generator, the fewer of its tokens are wrong
                if len(set(values)) > 1:
                    axes.plot([row["step"] for row in held_out], values, **look)
                else:
                    axes.axhline(values[0], **look)
        axes.set_title(title, loc="left", fontsize=11)
        axes.set_xlabel("step")
        axes.set_xlim(left=0)
        if name in ("masked_accuracy", "rtd_recall"):
            axes.set_ylim(bottom=0)
        axes.grid(axis="y", color="#dddddd", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=9)
        above = axes.secondary_xaxis("top", functions=(lambda x: x * tokens_per_step, lambda x: x / tokens_per_step))
        above.xaxis.set_major_formatter(EngFormatter(sep=""))
        above.set_xlabel("tokens", fontsize=9)
        above.tick_params(labelsize=9, length=3)
        above.spines["top"].set_visible(False)
    path = Path(directory) / "learning_curve.png"
    figure.savefig(path)
    return path


def versions():
    """Names and versions of what a run depends on, those that are not installed left out."""
    found = {"fastbert": __version__, "python": platform.python_version()}
    for name in ("torch", "triton", "tokenizers", "transformers", "safetensors", "numpy"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def model_card(directory, facts, manifest, progress):
    """Write README.md. facts: what checkpoints record of the run; manifest: of the text it learned from."""
    directory = Path(directory)
    config, model = facts["config"], facts["model_config"]
    evaluation = next((row for row in reversed(read_metrics(directory)) if "eval_loss" in row), None)

    def table(head, rows):
        lines = [f"| {head} | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)]
        return "\n".join(lines)

    figures = [("steps", f"{progress.step:,}"), ("tokens seen", f"{progress.tokens:,}"),
               ("training time", _clock(progress.elapsed))]  # fmt: skip
    if progress.skipped:
        figures.append(("steps left out, gradient not finite", f"{progress.skipped:,}"))
    if evaluation:
        figures += [
            ("held-out loss", f"{_number(evaluation['eval_loss'])} nats per picked token"),
            ("held-out masked accuracy", f"{evaluation['eval_masked_accuracy']:.2%}"),
            ("always the most frequent token", f"{evaluation['eval_baseline_accuracy']:.2%}"),
            ("held-out picked tokens", f"{evaluation['eval_picked_tokens']:,}"),
        ]
        if "eval_pair_accuracy" in evaluation:
            figures.append(("held-out pair accuracy", f"{evaluation['eval_pair_accuracy']:.2%}"))
        if "eval_rtd_loss" in evaluation:
            figures += [
                ("held-out loss of detection", f"{evaluation['eval_rtd_loss']:.4f} nats per token"),
                ("held-out replaced tokens found", f"{evaluation['eval_rtd_recall']:.2%}"),
                ("held-out tokens judged right", f"{evaluation['eval_rtd_accuracy']:.2%}"),
                ("the same, always saying original", f"{evaluation['eval_rtd_baseline_accuracy']:.2%}"),
            ]
    text = [
        (name, f"{manifest[key]:,}")
        for name, key in (("documents", "documents"), ("sentences", "sentences"), ("tokens", "tokens"),
                          ("lines skipped, not UTF-8 or without text", "skipped_lines"))
    ]  # fmt: skip
    text += [("vocabulary", f"{manifest['vocab_size']:,} pieces"), ("tokenizer's sha256", facts["tokenizer"][:16])]
    is_detector = config["objective"] == "rtd"
    left_out = (
        "train_file",
        "eval_file",
        "output_dir",
        "tokenizer",
        "resume",
        "num_workers",
        "device",
        "text_column",
        "layout",
        *(() if is_detector else ("rtd_weight",)),
    )
    recipe = [(f"`{name}`", value) for name, value in config.items() if name not in left_out and value is not None]
    objectives = {
        "mlm": "masked-language modelling",
        "mlm+nsp": "masked-language modelling and next-sentence prediction",
        "mlm+sop": "masked-language modelling and sentence-order prediction",
        "rtd": f"the detection of tokens that a generator, kept in `{GENERATOR}`, has replaced",
    }
    kind = {"mlm": "MaskedLM", "rtd": "ReplacedTokenDetector"}.get(config["objective"], "Pretraining")
    # a detector fills in nothing; its generator does
    masked = directory / GENERATOR if is_detector else directory
    tags = "feature-extraction" if is_detector else "fill-mask"
    training = "replaced-token-detection" if is_detector else "masked-language-modeling"
    curve = "\n![Losses and accuracies over the run](learning_curve.png)\n"
    loss = "Loss: the sum over picked tokens, divided once per step by their number"
    if is_detector:
        loss += f", plus {config['rtd_weight']:g} times the discriminator's, over all tokens, divided by theirs"
    write_text(
        directory / "README.md",
        f"""---
library_name: transformers
pipeline_tag: {tags}
tags: [{model["model_type"]}, fastbert, {training}]
---
# {directory.resolve().name}

An encoder ({model["model_type"]}), {model["num_hidden_layers"]} layers of size {model["hidden_size"]}, pretrained \
with fastbert on
{objectives[config["objective"]]}.

## Use

```bash
fastbert fill-mask --model {masked} "A sentence with a [MASK] in it."
```
```python
from fastbert.heads import {kind}
model = {kind}.from_pretrained("{directory}")
```
```python
from transformers import pipeline
pipeline("fill-mask", model="{masked}")("A sentence with a [MASK] in it.")
```

## Figures

{table("run", figures)}
{curve if (directory / "learning_curve.png").exists() else ""}
## Text

{table("training text, held-out documents included", text)}

## Model

{table("config.json", [(f"`{name}`", value) for name, value in model.items()])}

## Recipe

{table("option", recipe)}

{loss}. Made with \
{", ".join(f"{name} {number}" for name, number in versions().items())}.
""",
    )
