"""The regression gate: which ratios fell between two runs of a benchmark.

    python benchmarks/compare.py old.json new.json

Only ratios are compared, never times: another implementation's time over fastbert's, round by round, which is how many
times faster fastbert is. A machine that is faster, or busy, moves both. Of each ratio the median over the rounds
counts, and its spread: the interquartile range, and at least 2 % of the median, since the rounds of one run know
nothing of what differs from run to run. A ratio FELL when the new median is below the old one by more than both spreads
together. It is out of reach of the gate when a run has fewer than three rounds of it.

Files are those of every benchmark here, of the same kind. Exit code 1 when something fell, 2 when nothing could be
compared.
"""

import argparse
import json
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import report

LEAST_SPREAD, LEAST_ROUNDS = 0.02, 3


@dataclass(frozen=True)
class Ratio:
    """Median over the rounds of another's time over ours, and the interquartile range."""

    median: float
    spread: float

    @classmethod
    def of(cls, theirs, ours):
        low, median, high = statistics.quantiles([a / b for a, b in zip(theirs, ours)], n=4, method="inclusive")
        return cls(median, max(high - low, LEAST_SPREAD * median))


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


def read(path):
    """The result in a JSON file. Raises ValueError where it holds none, OSError where it cannot be read."""
    try:
        result = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(result, dict) or not ratios(result):
        raise ValueError(
            f"{path} holds nothing to compare: expected results of a benchmark, with the seconds of fastbert and of "
            f"another implementation in at least {LEAST_ROUNDS} rounds"
        )
    return result


def ratios(result):
    """{(what was measured, another implementation, ours): Ratio} of a result."""
    # older files are known by their names
    kinds = {"families": "families", "training_step": "cases"}
    kind = next((kind for kind, key in kinds.items() if key in result), "rows")
    found = {}
    for name, seconds in report.comparisons({kind: result}):
        ours = [x for x in seconds if report.is_ours(x)]
        for own in ours:
            for other in seconds:
                enough = min(len(seconds[own]), len(seconds[other])) >= LEAST_ROUNDS
                if other not in ours and enough:
                    found[name, other, own] = Ratio.of(seconds[other], seconds[own])
    return found


def changes(old, new):
    """A Change for every ratio that both results have."""
    before, now = ratios(old), ratios(new)
    return [Change(name, before[name], now[name]) for name in before if name in now]


def table(found):
    """The changes that matter, and a line that counts all: lines of text. What fell comes first, the deepest first."""
    lines = []
    for word, chosen in (("FELL", [c for c in found if c.fell]), ("rose", [c for c in found if c.rose])):
        for change in sorted(chosen, key=lambda c: c.new.median / c.old.median, reverse=word == "rose"):
            what, other, own = change.name
            lines.append(
                f"{word}  {change.old.median:7.2f}x -> {change.new.median:7.2f}x  (margin {change.margin:.2f})  "
                f"{other} / {own}: {what}"
            )
    fell, rose = sum(c.fell for c in found), sum(c.rose for c in found)
    return [*lines, f"{len(found)} ratios compared: {fell} fell, {rose} rose, the others are within their spreads"]


def differences(old, new):
    """Lines on what else differs: a ratio also falls when a peer becomes faster, and other devices have others."""
    names = ("device", "threads", "torch", "triton", "transformers")
    pairs = [(name, *(r.get("machine", r).get(name) for r in (old, new))) for name in names]
    return [f"note: {name} was {a}, is {b}" for name, a, b in pairs if a and b and a != b]


def told(old, news):
    """Print how results, several of one run, compare with an old one: the exit code."""
    found = []
    for new in news:
        both = changes(old, new)
        for line in differences(old, new) if both else ():
            print(line)
        found += both
    if not found:
        print("no ratio is in both: the runs measured other things")
        return 2
    known = set(ratios(old))
    print("\n".join(table(found)))
    if len(found) < len(known):
        print(f"{len(known) - len(found)} ratios of the old run were not measured now")
    return int(any(change.fell for change in found))


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("old")
    parser.add_argument("new")
    options = parser.parse_args()
    try:
        old, new = read(options.old), read(options.new)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    sys.exit(told(old, [new]))


if __name__ == "__main__":
    main()
