"""Fine-tuning with several seeds: the same split, a directory each, the best one on top."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ..files import write
from ..tasks import results, table
from . import checkpoint, finetune_card, lora, processes
from .log import Log, words
from .options import command_line


@dataclass
class Outcome:
    """What a run with one seed gives.

    metrics: those of metrics.json, and "signal". resampled: see `results.resampled`. write_card: writes its card to a
    directory with a command line; None in an unfinished run, and in all processes but the first.
    """

    metrics: dict
    resampled: list = field(default_factory=list)
    write_card: Callable | None = None


def with_seeds(config, train):
    """Train with the seeds seed .. seed + seeds - 1 on the same split, in seed-<seed>/; publish the best.

    train: gives the Outcome of a config. Returns the contents of metrics.json: those of the best run, with each seed's
    main score, their mean, its interval and their standard deviation in "seeds". interval: of 95 % of the mean over
    held-out examples drawn with replacement, the same ones for each seed (Efron 1979).
    """
    output_dir, found = Path(config.output_dir), {}
    split_seed = config.seed if config.split_seed is None else config.split_seed
    if not config.eval_share and not table.train_and_eval_files(config.train_file, config.eval_file)[1]:
        raise ValueError("--seeds compares scores on held-out examples: use --eval-file, or --eval-share above 0")
    if not config.resume:
        # the checkpoints are in the directories of the seeds
        checkpoint.to_resume(output_dir, False)
    for seed in range(config.seed, config.seed + config.seeds):
        directory = output_dir / f"seed-{seed}"
        found[seed] = train(
            dataclasses.replace(config, seeds=1, seed=seed, split_seed=split_seed, output_dir=str(directory))
        )
        if found[seed].metrics["signal"] is not None:
            return found[seed].metrics
    if processes.join()[0] > 0:
        return found[config.seed].metrics
    first = found[config.seed].metrics
    metric, direction = first["metric"], table.task(first["task"]).SCORES[first["metric"]]
    scores = {seed: outcome.metrics["scores"][metric] for seed, outcome in found.items()}
    known = {seed: score for seed, score in scores.items() if score is not None}
    best = max(known, key=lambda seed: direction * known[seed], default=config.seed)
    values = np.array([*known.values()])
    seeds = {
        "scores": {str(seed): score for seed, score in scores.items()}, "best": best,
        "mean": float(values.mean()) if known else None,
        "standard_deviation": float(values.std(ddof=1)) if len(known) > 1 else None,
        "interval": results.percentiles(np.mean([outcome.resampled for outcome in found.values()], 0)),
    }  # fmt: skip
    metrics = found[best].metrics | {"seeds": seeds}
    for folder in (".", lora.ADAPTER):
        for path in sorted((output_dir / f"seed-{best}" / folder).glob("*")):
            if path.is_file() and not path.name.startswith("."):
                (output_dir / folder).mkdir(exist_ok=True)
                write(output_dir / folder / path.name, path.read_bytes())
    command = command_line("finetune", dataclasses.replace(config, resume=False))
    found[best].write_card(output_dir, command)
    finetune_card.add_seeds(output_dir, metric, seeds)
    results.write_metrics(output_dir, {name: value for name, value in metrics.items() if name != "signal"})
    Log(output_dir, 0).say(f"{config.seeds} seeds: {_said(metric, seeds)}; seed {best} is published in {output_dir}")
    return metrics


def _said(metric, seeds):
    if seeds["mean"] is None:
        return f"{words(metric)} is undefined"
    parts = [f"{words(metric)} {seeds['mean']:.4f} in the mean"]
    if seeds["standard_deviation"] is not None:
        parts.append(f"standard deviation {seeds['standard_deviation']:.4f}")
    if seeds["interval"] is not None:
        parts.append("95 % interval {:.4f} to {:.4f}".format(*seeds["interval"]))
    return ", ".join(parts)
