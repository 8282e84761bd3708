"""Pictures of an evaluation, where matplotlib is installed."""

import io
from pathlib import Path

import numpy as np

from ..files import write

# labels that a picture has room for
MAX_LABELS = 40
BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#555555"


def draw(directory, spec, examples, predictions, scores, lengths=None):
    """Draw confusion_matrix.png, per_class_f1.png and reliability.png, as far as the task has them; and lengths.png.

    lengths: {tokens: how many texts to train on have so many}.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return

    def picture(name, width, height, paint):
        figure = Figure(figsize=(width, height), dpi=120, layout="constrained")
        FigureCanvasAgg(figure)
        paint(figure.add_subplot())
        data = io.BytesIO()
        figure.savefig(data, format="png")
        write(Path(directory) / name, data.getvalue())

    if lengths:
        picture("lengths.png", 6, 3.5, lambda axes: _lengths(axes, lengths, spec))
    labels = spec.labels or ()
    side = 3 + 0.35 * len(labels)
    per_class = scores.get("per_class")
    if per_class and len(labels) <= MAX_LABELS:
        picture("per_class_f1.png", 6, 1.2 + 0.3 * len(per_class), lambda axes: _bars(axes, per_class))
    if not examples or not all("label" in p and isinstance(e.gold, str) for e, p in zip(examples, predictions)):
        return
    if len(labels) <= MAX_LABELS:
        picture("confusion_matrix.png", side + 1, side, lambda axes: _matrix(axes, spec, examples, predictions))
    picture("reliability.png", 5, 5, lambda axes: _reliability(axes, examples, predictions))


def _lengths(axes, lengths, spec):
    tokens, counts = np.array(sorted(lengths.items())).T
    longer = int(counts[tokens > spec.max_length].sum())
    what = "cut" if spec.truncate else "cut, or read in windows"
    axes.hist(tokens, bins=np.linspace(0, max(tokens.max(), spec.max_length), 41), weights=counts, color=BLUE)
    line = f"{spec.max_length} tokens: {longer:,} of {int(counts.sum()):,} are longer, {what}"
    axes.axvline(spec.max_length, color=ORANGE, linestyle="--", label=line)
    axes.set_xlim(left=0)
    axes.set_xlabel("tokens")
    axes.set_ylabel("texts to train on")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9)


def _bars(axes, per_class):
    names = [*per_class]
    axes.barh(names, [per_class[name]["f1"] for name in names], color=BLUE)
    axes.invert_yaxis()
    axes.set_xlim(0, 1)
    axes.set_xlabel("F1")
    axes.spines[["top", "right"]].set_visible(False)


def _matrix(axes, spec, examples, predictions):
    counts = np.zeros((len(spec.labels),) * 2, int)
    for example, prediction in zip(examples, predictions, strict=True):
        counts[spec.index[example.gold], spec.index[prediction["label"]]] += 1
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for (row, column), count in np.ndenumerate(counts):
        if count:
            color = "white" if shares[row, column] > 0.5 else "black"
            axes.text(column, row, f"{count:,}", ha="center", va="center", fontsize=8, color=color)
    places = range(len(spec.labels))
    axes.set_xticks(places, spec.labels, rotation=90)
    axes.set_yticks(places, spec.labels)
    axes.set_xlabel("prediction")
    axes.set_ylabel("gold")


def _reliability(axes, examples, predictions):
    confidence = np.array([prediction["score"] for prediction in predictions])
    right = np.array([e.gold == p["label"] for e, p in zip(examples, predictions, strict=True)])
    place = np.clip(np.ceil(confidence * 10 - 1e-9).astype(int) - 1, 0, 9)
    counts = np.bincount(place, minlength=10)
    filled = counts > 0
    means = [np.bincount(place, values, 10)[filled] / counts[filled] for values in (confidence, right)]
    axes.plot([0, 1], [0, 1], color=GREY, linewidth=1, linestyle="--", label="perfectly calibrated")
    axes.plot(*means, color=ORANGE, marker="o", label="held-out examples")
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1)
    axes.set_xlabel("confidence")
    axes.set_ylabel("accuracy")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9)
