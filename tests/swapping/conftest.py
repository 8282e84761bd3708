import sys

import pytest
import torch

from fastbert import ops


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture(autouse=True)
def fresh_accelerate():
    """accelerate keeps one state a process, its precision included, which the next Trainer or Accelerator inherits."""
    if "accelerate" in sys.modules:
        sys.modules["accelerate"].state.AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(params=["cpu", "triton"])
def impl(request, monkeypatch):
    monkeypatch.setattr(ops, "IMPL", request.param)
    return request.param


@pytest.fixture
def calls(monkeypatch):
    """The arguments of every call of ops.attention."""
    seen, attention = [], ops.attention

    def recorded(q, *args, **kwargs):
        seen.append((q.shape, *args, kwargs))
        return attention(q, *args, **kwargs)

    monkeypatch.setattr(ops, "attention", recorded)
    return seen


@pytest.fixture
def shapes(monkeypatch):
    """The shapes of what ops.linear gets."""
    seen, linear = [], ops.linear
    monkeypatch.setattr(ops, "linear", lambda x, *rest: seen.append(x.shape) or linear(x, *rest))
    return seen
