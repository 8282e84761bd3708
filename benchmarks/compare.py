"""The regression gate: which ratios fell between two runs of a benchmark. README.md says how it judges.

    python benchmarks/compare.py old.json new.json               or two folders of results
    python benchmarks/compare.py --false-alarms FOLDER           how often it flags what has not changed

Exit code 1 when something fell, 2 when nothing could be compared.
"""

import argparse
import itertools
import json
import random
import statistics
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import record

LEAST_SPREAD, LEAST_ROUNDS = 0.03, 3


@dataclass(frozen=True)
class Ratio:
    """Median over the rounds of another's time over ours, and the spread that the gate allows."""

    median: float
    spread: float

    @classmethod
    def of(cls, rounds):
        low, median, high = statistics.quantiles(rounds, n=4, method="inclusive")
        return cls(median, max((high - low) * (1 + 4 / (len(rounds) - 1)), LEAST_SPREAD * median))


@dataclass(frozen=True)
class Change:
    """One ratio in both runs. name: (what was measured, whose time, over whose)."""

    name: tuple
    old: Ratio
    new: Ratio

    @property
    def margin(self):
        return self.old.spread + self.new.spread

    @property
    def fell(self):
        return self.old.median - self.new.median > self.margin

    @property
    def rose(self):
        return self.new.median - self.old.median > self.margin


def read(*paths):
    """{name: result} of files of results, and of every such file in folders of them.

    Raises ValueError for a file that holds nothing to compare, or a folder in which none does, and OSError for what
    cannot be read.
    """
    found = {}
    for path in map(Path, paths):
        files = sorted(path.glob("*.json")) if path.is_dir() else [path]
        results = {file.stem: _result(file) for file in files}
        results = {name: result for name, result in results.items() if ratios({name: result})}
        if not results:
            raise ValueError(
                f"{path} holds nothing to compare: expected results of a benchmark, with the seconds of fastbert and "
                f"of another implementation in at least {LEAST_ROUNDS} rounds"
            )
        found |= results
    return found


def _result(file):
    try:
        result = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not JSON: {error}") from None
    return result if isinstance(result, dict) else {}


def rounds_of(results):
    """{(what was measured, another implementation, ours): its time over ours in each round} of results."""
    found = {}
    for name, seconds in record.comparisons(results):
        counted = {x: times for x, times in seconds.items() if len(times) >= LEAST_ROUNDS}
        for own, other in itertools.product(filter(record.is_ours, counted), counted):
            if not record.is_ours(other):
                found[name, other, own] = [a / b for a, b in zip(counted[other], counted[own])]
    return found


def ratios(results):
    """{(what was measured, another implementation, ours): Ratio} of results."""
    return {name: Ratio.of(rounds) for name, rounds in rounds_of(results).items()}


def changes(old, new):
    """A Change for every ratio that both have."""
    before, now = ratios(old), ratios(new)
    return [Change(name, before[name], now[name]) for name in before if name in now]


def table(found):
    """The changes that matter, and a line that counts all: lines of text. What fell comes first, the deepest first."""
    lines = []
    fell, rose = [c for c in found if c.fell], [c for c in found if c.rose]
    for word, chosen in (("FELL", fell), ("rose", rose)):
        for change in sorted(chosen, key=lambda c: c.new.median / c.old.median, reverse=word == "rose"):
            what, other, own = change.name
            lines.append(
                f"{word}  {change.old.median:7.2f}x -> {change.new.median:7.2f}x  (margin {change.margin:.2f})  "
                f"{other} / {own}: {what}"
            )
    counts = f"{len(fell)} fell, {len(rose)} rose"
    lines.append(f"{len(found)} ratios compared: {counts}, the others are within their spreads")
    # who takes 1.25 times as long has a ratio 20 % lower
    seen = sum(c.margin < 0.2 * c.old.median for c in found)
    return [*lines, f"a ratio that is 20 % lower would be seen in {seen} of them; the others spread too widely"]


def absent(old, new):
    """Lines on what the old run has and the new one lacks: variants of rows that are in both, and other rows."""
    before, now = ratios(old), ratios(new)
    rows = {what for what, _, _ in now}
    lost = [name for name in before if name not in now]
    counts = Counter((other, own) for what, other, own in lost if what in rows)
    lines = [f"not measured now: {other} / {own}, in rows that were: {n}" for (other, own), n in counts.items()]
    others = len({what for what, _, _ in lost if what not in rows})
    return lines + ([f"rows of the old run that were not measured now: {others}"] if others else [])


def differences(old, new):
    """Lines on what else differs: a ratio also falls when a peer becomes faster, and other devices have others."""
    lines = []
    for name in ("device", "threads", "torch", "triton", "transformers"):
        pair = [{(result.get("machine") or {}).get(name) for result in results.values()} for results in (old, new)]
        was, now = (", ".join(sorted(map(str, values - {None}))) for values in pair)
        if was and now and was != now:
            lines.append(f"note: {name} was {was}, is {now}")
    return lines


def told(old, new):
    """Print how the results of a run compare with older ones, both {name: result}: the exit code."""
    found = changes(old, new)
    if not found:
        print(f"no ratio is in both: the runs measured other things, or one in fewer than {LEAST_ROUNDS} rounds")
        return 2
    print("\n".join([*differences(old, new), *table(found), *absent(old, new)]))
    return int(any(change.fell for change in found))


def false_alarms(results, draws=200, seed=0):
    """(ratios, share of them that is flagged though nothing changed, share of runs in which any is).

    One half of the rounds against the other, dealt out at random, `draws` times, of each ratio of at least 6 rounds.
    """
    generator, flagged, runs = random.Random(seed), 0, [False] * draws
    samples = [rounds for rounds in rounds_of(results).values() if len(rounds) >= 2 * LEAST_ROUNDS]
    for draw in range(draws):
        for rounds in samples:
            dealt = generator.sample(rounds, len(rounds))
            half = len(dealt) // 2
            fell = Change((), Ratio.of(dealt[:half]), Ratio.of(dealt[half : 2 * half])).fell
            flagged += fell
            runs[draw] |= fell
    return len(samples), flagged / max(draws * len(samples), 1), sum(runs) / draws


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("old", help="a file of results, or a folder of them")
    parser.add_argument("new", nargs="?", help="the same, of another run")
    parser.add_argument("--false-alarms", action="store_true", help="of `old` alone: how often it is flagged unchanged")
    options = parser.parse_args()
    if (options.new is None) != options.false_alarms:
        parser.error("expected two results, or --false-alarms and one")
    try:
        old = read(options.old)
        new = old if options.false_alarms else read(options.new)
    except (ValueError, OSError) as error:
        parser.exit(2, f"compare.py: error: {error}\n")
    if options.false_alarms:
        count, share, runs = false_alarms(old)
        print(f"{count} ratios, halves of their rounds: {share:.2%} are flagged, in {runs:.0%} of the runs any")
        return
    sys.exit(told(old, new))


if __name__ == "__main__":
    main()
