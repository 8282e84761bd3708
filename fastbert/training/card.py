"""The learning curve and the model card of a finished run."""

import io
import math
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from .. import __version__
from ..files import write
from ..model.replaced_tokens import GENERATOR
from .log import RATES, SCORES, clock, in_words, is_evaluation, read_metrics, words

# Okabe and Ito's colours, which colour-blind readers can tell apart
TRAIN, HELD_OUT, BASELINE = "#56B4E9", "#D55E00", "#555555"
# figure -> what is drawn beside it
BASELINES = {"masked_accuracy": "baseline_accuracy", "rtd_accuracy": "rtd_baseline_accuracy"}
# objective -> the class that loads the model, what it was trained on
OBJECTIVES = {
    "mlm": ("MaskedLM", "masked-language modelling"),
    "mlm+nsp": ("Pretraining", "masked-language modelling and next-sentence prediction"),
    "mlm+sop": ("Pretraining", "masked-language modelling and sentence-order prediction"),
    "rtd": (
        "ReplacedTokenDetector",
        f"the detection of tokens replaced by a generator, which is in `{GENERATOR}`",
    ),
}
# options that say where a run was made, not how
NOT_THE_RECIPE = {
    "train_file", "eval_file", "output_dir", "tokenizer", "resume", "num_workers", "device", "text_column", "layout",
}  # fmt: skip


def learning_curve(directory):
    """Draw learning_curve.png from metrics.jsonl: losses and accuracies over steps and tokens.

    Returns its path, or None if matplotlib is not installed or there is nothing to draw.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.ticker import EngFormatter, PercentFormatter
    except ImportError:
        return None
    rows = read_metrics(directory)

    def curve(name):
        """(steps, values) of a column."""
        points = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
        return tuple(zip(*points, strict=True)) or ((), ())

    names = dict.fromkeys(name.removeprefix("eval_") for row in rows for name in row)
    shown = ("loss", *RATES, *SCORES)
    panels = [name for name in names if name.endswith(shown) and "baseline" not in name and "strict" not in name]
    if not panels:
        return None
    columns, lines = min(len(panels), 3), math.ceil(len(panels) / 3)
    figure = Figure(figsize=(5 * columns, 4.2 * lines), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    tokens_per_step = rows[-1]["tokens"] / rows[-1]["step"]
    for place, name in enumerate(panels, 1):
        axes = figure.add_subplot(lines, columns, place)
        if curve(name)[0]:
            axes.plot(*curve(name), color=TRAIN, linewidth=1.2, label="training")
        held_out = curve(f"eval_{name}")
        if held_out[0]:
            axes.plot(*held_out, color=HELD_OUT, linewidth=2, marker="o", markersize=4, label="held-out text")
        if not name.endswith("loss"):
            axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=1 if name == "rtd_accuracy" else 0))
        # that of replaced tokens changes over the run: a better generator leaves fewer wrong tokens
        baseline = f"eval_{BASELINES.get(name)}"
        if curve(baseline)[0]:
            axes.plot(*curve(baseline), color=BASELINE, linewidth=1.2, linestyle="--", label=words(baseline))
        title = words(name) + (" (nats)" if name.endswith("loss") else "")
        axes.set_title(title[0].upper() + title[1:], loc="left", fontsize=11)
        axes.set_xlabel("step")
        axes.set_xlim(left=0)
        if name in ("masked_accuracy", "rtd_recall"):
            axes.set_ylim(bottom=0)
        axes.grid(axis="y", color="#dddddd", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        if axes.lines:
            axes.legend(frameon=False, fontsize=9)
        above = axes.secondary_xaxis("top", functions=(lambda x: x * tokens_per_step, lambda x: x / tokens_per_step))
        above.xaxis.set_major_formatter(EngFormatter(sep=""))
        above.set_xlabel("tokens", fontsize=9)
        above.tick_params(labelsize=9, length=3)
        above.spines["top"].set_visible(False)
    path, picture = Path(directory) / "learning_curve.png", io.BytesIO()
    figure.savefig(picture, format="png")
    write(path, picture.getvalue())
    return path


def versions():
    """{name: version} of fastbert, Python and the libraries that are installed."""
    found = {"fastbert": __version__, "python": platform.python_version()}
    for name in ("torch", "triton", "tokenizers", "transformers", "safetensors", "numpy"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def table(head, rows):
    """A table of two columns in Markdown. rows: pairs."""
    return "\n".join([f"| {head} | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)])


def run_figures(progress):
    """Rows of the table of a run."""
    return [("steps", f"{progress.step:,}"), ("tokens seen", f"{progress.tokens:,}"),
            ("training time", clock(progress.elapsed))]  # fmt: skip


def model_card(directory, facts, manifest, progress):
    """Write README.md. facts: what checkpoints record of the run. manifest: of the training text."""
    directory = Path(directory)
    config, model = facts["config"], facts["model_config"]
    evaluation = next((row for row in reversed(read_metrics(directory)) if is_evaluation(row)), {})

    figures = run_figures(progress)
    if progress.skipped:
        figures.append(("steps skipped, gradient not finite", f"{progress.skipped:,}"))
    held_out = [*in_words(evaluation, digits=2).items()]
    if "eval_picked_tokens" in evaluation:
        held_out.append(("picked tokens", f"{evaluation['eval_picked_tokens']:,}"))
    text = [(name, f"{manifest[name]:,}") for name in ("documents", "sentences", "tokens")]
    text += [
        ("lines skipped, not UTF-8 or without text", f"{manifest['skipped_lines']:,}"),
        ("vocabulary", f"{manifest['vocab_size']:,} pieces"), ("tokenizer's sha256", facts["tokenizer"][:16]),
    ]  # fmt: skip
    is_detector = config["objective"] == "rtd"
    recipe = [
        (f"`{name}`", value)
        for name, value in config.items()
        if value is not None and name not in NOT_THE_RECIPE and (is_detector or name != "rtd_weight")
    ]
    kind, what = OBJECTIVES[config["objective"]]
    # a detector fills in no words; its generator does
    masked = directory / GENERATOR if is_detector else directory
    tags = "feature-extraction" if is_detector else "fill-mask"
    training = "replaced-token-detection" if is_detector else "masked-language-modeling"
    curve = "\n![Losses and accuracies over the run](learning_curve.png)\n"
    loss = "Loss: the sum over picked tokens, divided once per step by their number"
    if is_detector:
        loss += f", plus {config['rtd_weight']:g} times the discriminator's, over all tokens, divided by theirs"
    write(
        directory / "README.md",
        f"""---
library_name: transformers
pipeline_tag: {tags}
tags: [{model["model_type"]}, fastbert, {training}]
---
# {directory.resolve().name}

An encoder ({model["model_type"]}), {model["num_hidden_layers"]} layers of size {model["hidden_size"]}, pretrained \
with fastbert on
{what}.

## Use

```bash
fastbert fill-mask --model {masked} "A sentence with a [MASK] in it."
```
```python
from fastbert import {kind}
model = {kind}.from_pretrained("{directory}")
```
```python
from transformers import pipeline
pipeline("fill-mask", model="{masked}")("A sentence with a [MASK] in it.")
```

## Figures

{table("run", figures)}

{table("held-out text, losses in nats", held_out)}
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
