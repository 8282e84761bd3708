"""The package is typed (py.typed): every public function states the types of its arguments and of its result."""

import ast
import inspect
from pathlib import Path

import pytest

import fastbert


def functions(owner):
    """(name, function) of the public functions of a module, or the public methods that a class has from fastbert."""
    if inspect.ismodule(owner):
        for name, member in inspect.getmembers(owner, inspect.isfunction):
            if name[0] != "_" and member.__module__ == owner.__name__:
                yield name, member
        return
    for cls in inspect.getmro(owner):
        for name, member in vars(cls).items() if cls.__module__.startswith("fastbert") else ():
            member = getattr(member, "fget", None) or getattr(member, "__func__", member)
            if inspect.isfunction(member) and (name[0] != "_" or name == "__init__"):
                yield name, member


def untyped(owner):
    """What lacks a type: `name(argument)` or `name() ->`."""
    found = []
    for name, function in [(owner.__name__, owner)] if inspect.isfunction(owner) else functions(owner):
        signature = inspect.signature(function)
        found += [
            f"{name}({argument})"
            for argument, parameter in signature.parameters.items()
            if parameter.annotation is parameter.empty and argument not in ("self", "cls")
        ]
        if signature.return_annotation is signature.empty:
            found.append(f"{name}() ->")
    return found


@pytest.mark.parametrize("name", fastbert.__all__)
def test_public_functions_are_typed(name):
    assert untyped(getattr(fastbert, name)) == []


def test_missing_types_are_found():
    class Module:
        __module__ = "fastbert.none"

        def __init__(self, x: int):
            pass

        @property
        def size(self):
            return 1

        @classmethod
        def make(cls, y, *, z: int = 1) -> None:
            pass

        def _private(self, x):
            pass

    assert untyped(Module) == ["__init__() ->", "size() ->", "make(y)"]


def test_type_checkers_see_the_lazily_loaded_names():
    tree = ast.parse(Path(fastbert.__file__).read_text(encoding="utf-8"))
    (block,) = (x for x in tree.body if isinstance(x, ast.If) and getattr(x.test, "id", None) == "TYPE_CHECKING")
    shown = {name.asname: statement.module for statement in block.body for name in statement.names}
    assert shown == {"ops": None, **fastbert._MODULES}
