"""The model card of a fine-tuned model."""

from pathlib import Path

from ..files import write
from .card import run_figures, table, versions
from .log import words

# what transformers calls the tasks
PIPELINES = {
    "classify": "text-classification", "multilabel": "text-classification", "regress": "text-classification",
    "tag": "token-classification", "answer": "question-answering", "choose": "multiple-choice",
    "embed": "sentence-similarity", "rerank": "text-ranking", "sparse": "feature-extraction",
}  # fmt: skip
# what `predict` takes, other than a text
USES = {
    "embed": '("TEXT", "TEXT")',
    "rerank": '("QUERY", "DOCUMENT")',
    "sparse": '("QUERY", "DOCUMENT")',
    "answer": '("QUESTION", "CONTEXT")',
    "choose": '("CONTEXT", ["CHOICE", "CHOICE"])',
}
PICTURES = {
    "learning_curve.png": "Losses and scores over the run", "confusion_matrix.png": "Gold labels and predictions",
    "per_class_f1.png": "F1 of each label", "reliability.png": "Confidence and accuracy",
    "lengths.png": "Lengths of the training texts",
}  # fmt: skip


def write_card(directory, command, facts, spec, metrics, progress):
    """Write README.md.

    command: the command line of the run. facts: what checkpoints record of it. metrics: those of metrics.json, {} for
    none.
    """
    directory = Path(directory)
    model = facts["model_config"]

    scores = [
        (words(name), "undefined" if value is None else f"{value:,}" if isinstance(value, int) else f"{value:.4f}")
        for name, value in metrics.get("scores", {}).items()
        if value is None or isinstance(value, int | float)
    ]
    if metrics.get("interval"):
        low, high = metrics["interval"]
        scores.append((f"{words(metrics['metric'])}, 95 % interval (bootstrap)", f"{low:.4f} to {high:.4f}"))
    run = run_figures(progress)
    if metrics:
        run += [("examples to train on", f"{metrics['train_examples']:,}"),
                ("held-out examples", f"{metrics['examples']:,}"), ("best step", f"{metrics['step']:,}")]  # fmt: skip
        run += [(f"rows skipped in {path}", f"{count:,}") for path, count in metrics["skipped_rows"].items()]
    labels = spec.labels or ()
    shown = ", ".join(labels[:50]) + (", ..." if len(labels) > 50 else "")
    pictures = [f"![{title}]({name})" for name, title in PICTURES.items() if (directory / name).exists()]
    write(
        directory / "README.md",
        f"""---
library_name: {"sentence-transformers" if spec.task in ("embed", "rerank", "sparse") else "transformers"}
pipeline_tag: {PIPELINES[spec.task]}
tags: [{model["model_type"]}, fastbert, {PIPELINES[spec.task]}]
---
# {directory.resolve().name}

An encoder ({model["model_type"]}), {model["num_hidden_layers"]} layers of size {model["hidden_size"]}, fine-tuned \
with fastbert for the task `{spec.task}`.

```bash
{command}
```

## Use

```bash
fastbert predict --model {directory} --input FILE.jsonl --output PREDICTIONS.jsonl
```
```python
import fastbert
fastbert.load("{directory}").predict([{USES.get(spec.task, '"..."')}])
```

{_adapter(directory, facts)}## Scores

{table(f"{metrics['examples']:,} held-out examples", scores) if metrics else "Nothing was held out."}

{"Labels: " + shown if shown else ""}

{chr(10).join(pictures)}

## Run

{table("run", run)}

Windows of {spec.max_length} tokens{f", {spec.stride} shared by neighbours" if not spec.truncate else ""}. \
Made with {", ".join(f"{name} {number}" for name, number in versions().items())}.
""",
    )


def _adapter(directory, facts):
    """How to load what --lora trained, without the model around it."""
    config, model = facts["config"], facts["model_config"]
    if not config.get("lora"):
        return ""
    return f"""The adapter of --lora is merged into this model. For peft it stands alone in `adapter`: load the base, \
`{config["model"]}`, with transformers' class for the task and `num_labels={model["num_labels"]}`, then
`PeftModel.from_pretrained(base, "{directory / "adapter"}")`.

"""


def add_seeds(directory, metric, seeds):
    """Add the scores of all seeds to README.md. seeds: those of metrics.json."""
    rows = [*seeds["scores"].items(), ("mean", seeds["mean"]), ("standard deviation", seeds["standard_deviation"])]
    lines = [f"| seed | {words(metric)} |", "|---|---|"]
    lines += [f"| {name} | {'undefined' if value is None else f'{value:.4f}'} |" for name, value in rows]
    if seeds["interval"]:
        low, high = seeds["interval"]
        lines.append(f"| mean, 95 % interval (bootstrap) | {low:.4f} to {high:.4f} |")
    said = f"This is the model of seed {seeds['best']}, chosen by the held-out examples that its score is from."
    path = Path(directory) / "README.md"
    text = path.read_text(encoding="utf-8")
    write(path, text.replace("\n## Run\n", "\n## Seeds\n\n" + said + "\n\n" + "\n".join(lines) + "\n\n## Run\n", 1))
