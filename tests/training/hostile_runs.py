"""Hostile option files, checkpoint manifests and states: each must give an error of one line.

Each function yields without end; `draw` is a random.Random. tests/training/test_hostile.py tries some of each.
"""

import copy
import json

from fastbert.files import MANIFEST
from fastbert.training import checkpoint


def option_files(draw, names):
    """Texts of a file for --config, JSON or YAML, in which something is always wrong. names: of the numeric options."""
    wrong = [None, True, [], [1], {}, {"a": 1}, "five", "", "nan", float("nan"), float("inf"), 10**400, -1e400, "\x00"]
    shapes = [
        "", "[", "[" * 20_000, "{" * 3, "[]", "3", "null", '"x"', "{}}", "\x00", "- a\n- b", "a: b: c",
        "&a [*a]", "!!x y",
    ]  # fmt: skip
    while True:
        if draw.random() < 0.3:
            yield draw.choice(shapes)
        elif draw.random() < 0.2:
            yield json.dumps({draw.choice(["", "max_stepz", "config", "help", "resume_", "__init__", "5"]): 1})
        else:
            yield json.dumps({draw.choice(names): draw.choice(wrong[1:])})


# names in a manifest that lead out of its directory, or to no file
OUTSIDE = ("../x", "/etc/passwd", "a/../../x", "C:\\x", "..\\x", "\\\\host\\share", "", ".", "a\x00b", "x" * 5000)
NO_SIZE = (-1, True, None, "1", 1.5, 10**30, float("nan"), float("inf"), [], {})
NO_DIGEST = (None, "", 0, True, "0" * 64, "0" * 63, [], {}, "g" * 64, "é" * 64)


def manifests(draw, directory):
    """Texts in place of the manifest of a whole checkpoint; `checkpoint.verify` must refuse each."""
    whole = (directory / MANIFEST).read_text(encoding="utf-8")
    files = json.loads(whole)
    shapes = [
        "", " ", "[", "[" * 200_000, '{"a":' * 100_000, "[]", "null", "3", '"x"', "{}", "NaN", "\ufeff{}",
        "{" + "9" * 5000,
    ]  # fmt: skip
    while True:
        changed = copy.deepcopy(files)
        name = draw.choice([*files])
        kind = draw.randrange(7)
        if kind == 0:
            yield draw.choice(shapes)
            continue
        if kind == 1:
            yield whole[: draw.randrange(len(whole.rstrip()))]
            continue
        if kind == 2:
            changed[draw.choice(OUTSIDE)] = changed[name]
        elif kind == 3:
            changed[name]["size"] = draw.choice([*NO_SIZE, float(files[name]["size"]), files[name]["size"] + 1])
        elif kind == 4:
            changed[name]["sha256"] = draw.choice([*NO_DIGEST, files[name]["sha256"][::-1], [files[name]["sha256"]]])
        elif kind == 5:
            changed[name] = draw.choice([None, [], "x", 3, {}, {"size": files[name]["size"]}, [changed[name]]])
        else:
            del changed[draw.choice([checkpoint.MODEL, checkpoint.OPTIMIZER, checkpoint.STATE])]
        yield json.dumps(changed)


def states(draw, state):
    """States in place of a checkpoint's `state`, a dict; a resume must refuse each."""
    wrong = (None, [], "x", True, -1, 1.5, 10**400, float("nan"), {"x": None}, [[]])
    while True:
        changed = copy.deepcopy(state)
        part = draw.choice(["config", "tokenizer", "data", "progress", "inside", "option", "less", "window"])
        if part == "less":
            draw.choice([changed, changed["progress"]]).clear()
        elif part == "window":
            changed["progress"]["window"] = {"loss": draw.choice([10**400, None, "x", []])}
        elif part == "option":
            changed["config"][draw.choice(["weight_decay", "seed", "objective"])] = draw.choice(wrong)
        elif part == "inside":
            name = draw.choice([name for name in changed["progress"] if name not in ("elapsed", "window")])
            changed["progress"][draw.choice([name, "unknown"])] = draw.choice(wrong)
        elif draw.random() < 0.5:
            changed[part] = draw.choice(wrong[:-2] + wrong[-1:])
        else:
            del changed[part]
        yield changed
