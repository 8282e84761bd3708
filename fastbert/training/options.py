"""The options of a script: fields of one dataclass, set from the command line, a YAML or JSON file, or Python."""

import dataclasses
import json
import os
from pathlib import Path


def option(default, help, choices=None):
    """A dataclass field with its help text. A default () allows several values, a default None no value."""
    return dataclasses.field(default=default, metadata={"help": help, "choices": choices})


def flag(name):
    """The command line's spelling of an option: --max-steps."""
    return "--" + name.replace("_", "-")


def tidy(options):
    """For __post_init__: turn paths into text and several values into a tuple. Raises ValueError for a wrong choice."""
    for field in dataclasses.fields(options):
        name, value, choices = field.name, getattr(options, field.name), field.metadata["choices"]
        if field.default == ():
            value = (value,) if isinstance(value, str | os.PathLike) else value
            object.__setattr__(options, name, tuple(str(path) for path in value))
        elif isinstance(value, os.PathLike):
            object.__setattr__(options, name, str(value))
        elif choices:
            need(options, f"one of {', '.join(choices)}", choices.__contains__, name)


def need(options, wanted, test, *names):
    """Raises ValueError unless each of the options `names` is None or passes `test`. wanted: the test in words."""
    for name in names:
        if (value := getattr(options, name)) is not None and not test(value):
            raise ValueError(f"{flag(name)} is {value!r}: expected {wanted}")


def kind(field):
    """The plain type of a field's values: str, int, float or bool."""
    return getattr(field.type, "__args__", (field.type,))[0]


def read_file(path, options):
    """The values in a YAML or JSON file, as keyword arguments for the dataclass `options`.

    Names may have - or _. Raises ValueError for an unknown name and for a value of the wrong type.
    """
    path = Path(path)
    where = f"--config {path}"
    if not path.is_file():
        raise FileNotFoundError(f"{where}: no such file")
    try:
        values = _parse(path)
    except ImportError:
        raise ValueError(f"{where}: reading YAML needs the package pyyaml; JSON (.json) needs nothing") from None
    # the errors of YAML and JSON have no common base
    except Exception as error:
        raise ValueError(f"{where} cannot be read: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{where} holds a {type(values).__name__}: expected a mapping of options to values")
    fields = {field.name: field for field in dataclasses.fields(options)}
    result = {}
    for key, value in values.items():
        name = str(key).replace("-", "_")
        if name not in fields:
            raise ValueError(f"{where}: no option is called {key!r}")
        result[name] = _value(fields[name], value, f"{where}: {key}")
    return result


def _parse(path):
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".json":
        return json.loads(text)
    import yaml

    return yaml.safe_load(text)


def _value(field, value, where):
    wanted = kind(field)
    if value is None and field.default is None:
        return None
    if isinstance(field.default, tuple):
        return tuple(_scalar(wanted, one, where) for one in (value if isinstance(value, list) else [value]))
    return _scalar(wanted, value, where)


def _scalar(wanted, value, where):
    # YAML reads 5e-4 as text, and 1 is as good as 1.0. True, an int in Python, is neither
    if wanted is float and type(value) in (int, str):
        try:
            return float(value)
        except ValueError:
            pass
    if type(value) is not wanted:
        raise ValueError(f"{where} is {value!r}: expected {wanted.__name__}")
    return value
