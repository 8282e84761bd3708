"""Without a GPU the kernels run in Triton's interpreter: its switch must be set before triton is imported."""

import dataclasses
import inspect
import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
# the same bits in every process of the suite, whatever else runs; test_libraries.py is about the choice
os.environ["FASTBERT_MATMUL"] = "onednn"

import pytest
import torch._dynamo  # notes torch's functions by their identity: before a test puts others in their places
from lost_worker import pytest_runtest_makereport  # noqa: F401


def _faster_interpreter():
    """Leaves out what Triton's interpreter does in vain, most of its time on small tensors."""
    import triton.language as tl
    from triton.runtime import interpreter

    # it patches triton.language again whenever one jitted function calls another: here once a launch
    patch = interpreter._patch_lang

    def patch_once(function):
        modules = [x for x in function.__globals__.values() if x is tl or x is tl.core]
        # Triton's own `range` is a class, the interpreter's a function
        if modules and all(inspect.isfunction(module.range) for module in modules):
            return interpreter._LangPatchScope()
        return patch(function)

    interpreter._patch_lang = patch_once
    # without debug mode nobody looks at whether a sum overflowed
    interpreter.interpreter_builder.options = dataclasses.replace(
        interpreter.interpreter_builder.options, sanitize_overflow=False
    )
    # it builds a table of all dtypes for each look into it
    slow, known = interpreter._get_np_dtype, {}

    def np_dtype(dtype):
        name = dtype.scalar.name
        if name not in known:
            known[name] = slow(dtype)
        return known[name]

    interpreter._get_np_dtype = np_dtype


if os.environ.get("TRITON_INTERPRET") == "1":
    _faster_interpreter()


@pytest.fixture(scope="session")
def device():
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def fresh_randomness():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def ours_always(monkeypatch):
    """A swapped stack runs our ops also where the original would be faster, as it is on tests' small shapes."""
    from fastbert import ops

    monkeypatch.setattr(ops, "pays", lambda *arguments: True)


@pytest.fixture
def poison(monkeypatch):
    """torch.empty hands out NaN, so an element that a kernel forgets to write cannot pass for a value."""

    def poisoned(real):
        def make(*args, **kwargs):
            tensor = real(*args, **kwargs)
            return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

        return make

    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, poisoned(getattr(torch, name)))
