"""Without a GPU the kernels run in Triton's interpreter: its switch must be set before triton is imported."""

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch._dynamo  # notes torch's functions by their identity: before a test puts others in their places
from lost_worker import pytest_runtest_makereport  # noqa: F401


@pytest.fixture(scope="session")
def device():
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def fresh_randomness():
    torch.manual_seed(0)


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
