"""A whole training step as a GPU would see it, traced without one: see fake_cuda.py, which runs in its own process."""

import json
import os
import subprocess
import sys
from pathlib import Path

import fake_cuda
import pytest
import torch

PINNED = "2.13"


@pytest.fixture(scope="module")
def results():
    """{check: "" or what went wrong}; skips, with the reason, where fake CUDA tensors cannot be differentiated."""
    path = Path(fake_cuda.__file__)
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, str(path)], cwd=path.parent.parent, env=environment, capture_output=True, text=True
    )
    if fake_cuda.INSTALLED not in done.stdout.splitlines():
        reason = done.stderr.strip().rpartition("\n")[2] or f"torch {torch.__version__}: ended with {done.returncode}"
        # on the torch that the project pins, a missing compiler is the only excuse
        assert "no C++ compiler" in reason or not torch.__version__.startswith(PINNED), done.stderr
        pytest.skip(reason)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.strip().rpartition("\n")[2])


@pytest.mark.parametrize("check", fake_cuda.CHECKS)
def test_on_fake_cuda_tensors(check, results):
    assert results[check] == "", results[check]
