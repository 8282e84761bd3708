"""What an evaluation leaves behind: metrics.json, predictions.jsonl, errors.md, pictures."""

import json
import math
from pathlib import Path

import numpy as np

from ..files import write
from . import pictures
from .examples import clean

# rows of errors.md
MISTAKES = 50
# of the bootstrap, fewer where there are many examples
RESAMPLES = 200


def summary(task, spec, examples, predictions, scores, paths, notes, resampled):
    """The contents of metrics.json. resampled: see the function of that name."""
    metric = spec.metric or next(iter(task.SCORES))
    metrics = {
        "task": spec.task, "metric": metric, "examples": len(examples), "scores": scores,
        "interval": percentiles(resampled),
        "skipped_rows": {str(note.path): len(note.skipped) for note in notes if note.skipped},
    }  # fmt: skip
    if len(paths) > 1:
        metrics["by_file"] = {}
        for number, path in enumerate(paths):
            chosen = [i for i, example in enumerate(examples) if example.more.get("file") == number]
            if chosen:
                own = task.score([examples[i] for i in chosen], [predictions[i] for i in chosen], spec)
                metrics["by_file"][str(path)] = {k: v for k, v in own.items() if not isinstance(v, dict)}
    return metrics


def write_all(directory, spec, examples, predictions, metrics, train=(), lengths=None):
    """Write metrics.json, predictions.jsonl, errors.md, and pictures where matplotlib is installed.

    lengths: see `pictures.draw`.
    """
    directory = Path(directory)
    write_metrics(directory, metrics)
    rows = []
    for example, prediction in zip(examples, predictions, strict=True):
        row = {"line": example.number} | ({} if example.id is None else {"id": example.id})
        row |= {"texts": example.texts, "gold": example.gold}
        row |= {name: value for name, value in prediction.items() if not name.startswith("_")}
        rows.append(clean(json.dumps(finite(row), ensure_ascii=False, default=str)) + "\n")
    write(directory / "predictions.jsonl", "".join(rows))
    write(directory / "errors.md", errors(examples, predictions, train))
    pictures.draw(directory, spec, examples, predictions, metrics["scores"], lengths)


def write_metrics(directory, metrics):
    text = json.dumps(finite(metrics), indent=2, ensure_ascii=False)
    write(Path(directory) / "metrics.json", text + "\n")


def resampled(task, spec, examples, predictions):
    """The main score on examples drawn with replacement, the same ones for the same number of examples (Efron 1979).

    NaN where it is undefined. [] where so many examples and labels would take too long.
    """
    metric = spec.metric or next(iter(task.SCORES))
    draw, found = np.random.default_rng(0), []
    times = min(RESAMPLES, 50_000_000 // (len(examples) * (1 + len(spec.labels or ()))))
    for _ in range(times if times >= min(RESAMPLES, 20) else 0):
        chosen = draw.integers(0, len(examples), len(examples))
        scores = task.score([examples[i] for i in chosen], [predictions[i] for i in chosen], spec)
        found.append(math.nan if scores.get(metric) is None else scores[metric])
    return found


def percentiles(values):
    """[low, high] of the middle 95 % of some numbers, without NaN; None where there is none."""
    known = [value for value in values if not math.isnan(value)]
    return [float(value) for value in np.percentile(known, [2.5, 97.5])] if known else None


def errors(examples, predictions, train):
    """The page of mistakes: the worst first, then what is odd about the examples."""
    worst = sorted(
        (i for i, prediction in enumerate(predictions) if prediction.get("_error", 0) > 0),
        key=lambda i: -predictions[i]["_error"],
    )
    lines = ["# Mistakes", "", f"{len(worst):,} of {len(examples):,} held-out examples, the most confident first.", ""]
    if worst:
        lines += ["| line | gold | prediction | score | text |", "|---|---|---|---|---|"]
    for i in worst[:MISTAKES]:
        example, prediction = examples[i], predictions[i]
        answer = next((prediction[name] for name in ("label", "labels", "score", "text") if name in prediction), "")
        score = prediction.get("score")
        score = f"{score:.3f}" if isinstance(score, float) and answer is not score else ""
        gold, text = prediction.get("_gold", example.gold), prediction.get("_text", " / ".join(example.texts))
        cells = (example.number, gold, prediction.get("_answer", answer), score, text)
        lines.append("| " + " | ".join(_cell(cell) for cell in cells) + " |")
    found = torn(train, examples)
    lines += ["", "## Texts with two labels", ""]
    lines += [
        f"- {_cell(' / '.join(texts))}: {', '.join(map(_cell, labels))}"
        for texts, labels in [*found.items()][:MISTAKES]
    ]
    lines += ["", f"{len(found):,} in all."]
    if train:
        only = sorted(_labels(train) - _labels(examples))
        lines += [
            "",
            "## Labels that only the training examples have",
            "",
            ", ".join(map(_cell, only[:200])) or "None.",
        ]
    return "\n".join(lines) + "\n"


def _labels(examples):
    """The labels that some examples have; of words, for tags."""
    golds = [example.gold for example in examples]
    several = {name for gold in golds if isinstance(gold, list | tuple) for name in gold if isinstance(name, str)}
    return several | {gold for gold in golds if isinstance(gold, str)}


def torn(*sides):
    """{texts: their labels} of the texts that have more than one."""
    first, labels = {}, {}
    for example in (example for side in sides for example in side):
        if isinstance(example.gold, str) and first.setdefault(example.texts, example.gold) != example.gold:
            labels.setdefault(example.texts, {first[example.texts]: None})[example.gold] = None
    return {texts: [*found] for texts, found in labels.items()}


def _cell(value):
    text = " ".join(clean(str(value)).split()).replace("|", "\\|")
    return text if len(text) <= 160 else f"{text[:157]}..."


def finite(value):
    """JSON has no NaN: null in its place."""
    if isinstance(value, dict):
        return {name: finite(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
