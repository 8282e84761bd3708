"""Memory that a step frees stays in the process."""

import os
import subprocess
import sys

import pytest

# tensors above and below 32 MB, and the page faults of the last round
CODE = """
import resource, sys
import torch
from fastbert.training.memory import keep_freed_memory
kept = keep_freed_memory()
for _ in range(8):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    a = torch.ones(9_000_000)
    b = [torch.ones(1_000_000) for _ in range(11)]
    del a, b
print(kept, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc is of Linux")
@pytest.mark.parametrize("own", [{}, {"MALLOC_ARENA_MAX": "4"}, {"GLIBC_TUNABLES": "glibc.malloc.check=0"}], ids=str)
def test_freed_memory_is_used_again_unless_the_user_has_settings(own):
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    done = subprocess.run(
        [sys.executable, "-c", CODE], env=inherited | own, capture_output=True, text=True, check=True
    )  # fmt: skip
    kept, faults = done.stdout.split()
    assert (kept == "True") == (not own)
    # 80 MB are 20,000 pages, or 40 large ones; with settings of the user's own it is as glibc likes
    assert own or int(faults) < 30
