"""The options of a script: fields of one dataclass, set from the command line, a YAML or JSON file, or Python."""

import dataclasses
import json
import math
import operator
import os
import shlex
from pathlib import Path

from .. import hub


def option(default, help, choices=None, **limits):
    """A dataclass field with its help text. A default () allows several values, a default None no value.

    limits of a number: `least` and `most` are allowed themselves, `above` and `below` are not. Without `most` an int
    ends at 2**31 - 1, and a float may be anything finite.
    """
    return dataclasses.field(default=default, metadata={"help": help, "choices": choices, "limits": limits})


def flag(name):
    """The command line's spelling of an option: --max-steps."""
    return "--" + name.replace("_", "-")


def tidy(options):
    """For __post_init__: paths become text, several values a tuple. Raises ValueError for a value out of its range."""
    for field in dataclasses.fields(options):
        name, value, choices = field.name, getattr(options, field.name), field.metadata["choices"]
        if field.default == ():
            value = (value,) if isinstance(value, str | os.PathLike) else value
            object.__setattr__(options, name, tuple(str(path) for path in value))
        elif isinstance(value, os.PathLike):
            object.__setattr__(options, name, str(value))
        elif choices and value is not None and value not in choices:
            raise ValueError(f"{flag(name)} is {value!r}: expected one of {', '.join(choices)}")
        elif value is not None and kind(field) in (int, float):
            limits = dict(field.metadata["limits"])
            if kind(field) is int:
                limits.setdefault("most", 2**31 - 1)
            # not math.isfinite, which cannot take a huge int
            finite = -math.inf < value < math.inf
            if not finite or not all(LIMITS[key][0](value, limit) for key, limit in limits.items()):
                words = " and ".join(f"{LIMITS[key][1]} {limit}" for key, limit in limits.items())
                raise ValueError(f"{flag(name)} is {value!r}: expected {words}")


def take_bf16(options):
    """For __post_init__: --bf16, an older name, is --dtype bf16, and --no-bf16 is --dtype fp32. Raises ValueError if
    --dtype says something else."""
    if options.bf16 is None:
        return
    dtype, default = "bf16" if options.bf16 else "fp32", type(options).dtype
    if options.dtype not in (default, dtype):
        raise ValueError(f"--{'' if options.bf16 else 'no-'}bf16 is --dtype {dtype}: --dtype is {options.dtype}")
    object.__setattr__(options, "dtype", dtype)
    object.__setattr__(options, "bf16", None)


def check_length(options):
    """For __post_init__: at most one length of the run, and a warm-up in its unit. Raises ValueError."""
    if sum(length is not None for length in (options.max_steps, options.epochs, options.max_minutes)) > 1:
        raise ValueError("more than one of --max-steps, --epochs and --max-minutes is given: expected one")
    if options.max_minutes is not None and options.warmup_steps is not None:
        raise ValueError("--warmup-steps does not go with --max-minutes, which counts time: use --warmup-ratio")


def with_local_model(options, **more):
    """`options` with directories in place of a --model and a --tokenizer that are names on the hub; see hub.local."""
    found = {}
    model = hub.local(options.model, options.revision, **more)
    if hub.is_name(options.model):
        found = {"model": str(model), "revision": None}
    if options.tokenizer and hub.is_name(options.tokenizer):
        # of the same repository the same revision
        revision = options.revision if options.tokenizer == options.model else None
        found["tokenizer"] = str(hub.local(options.tokenizer, revision, weights=False))
    return dataclasses.replace(options, **found)


def command_line(command, options):
    """The command line of `command` with these options, a dataclass; those that are as by default are left out."""
    words = ["fastbert", command]
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        if value != field.default:
            if isinstance(value, bool):
                words.append(flag(field.name if value else f"no_{field.name}"))
            else:
                words += [flag(field.name), *map(str, value if isinstance(value, tuple) else [value])]
    return shlex.join(words)


# limit -> its test, its words
LIMITS = {
    "least": (operator.ge, "at least"),
    "above": (operator.gt, "a number above"),
    "most": (operator.le, "at most"),
    "below": (operator.lt, "below"),
}


def kind(field):
    """The plain type of a field's values: str, int, float or bool."""
    return getattr(field.type, "__args__", (field.type,))[0]


def read_file(path, options):
    """The values in a YAML or JSON file as arguments of the command line, such as ["--max-steps=5", "--no-bf16"].

    Names may have - or _. Raises ValueError for a name that is no field of the dataclass `options`.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError("no such file")
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".json":
            values = json.loads(text)
        else:
            import yaml

            values = yaml.safe_load(text)
    except ImportError:
        raise ValueError("reading YAML needs the package pyyaml; JSON (.json) needs nothing") from None
    # the errors of YAML and JSON have no common base
    except Exception as error:
        raise ValueError(f"cannot be read: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"holds a {type(values).__name__}: expected a mapping of options to values")
    fields, arguments = {field.name: field for field in dataclasses.fields(options)}, []
    for key, value in values.items():
        name = str(key).replace("-", "_")
        if name not in fields:
            raise ValueError(f"no option is called {key!r}")
        if kind(fields[name]) is bool and isinstance(value, bool):
            arguments.append(flag(name if value else f"no_{name}"))
        elif value is not None:
            several = isinstance(value, list) and fields[name].default == ()
            arguments += [f"{flag(name)}={one}" for one in (value if several else [value])]
    return arguments
