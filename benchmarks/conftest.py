"""The benchmarks import the library from the repository, and run where the tests do: on the GPU if there is one."""

import pytest
import torch


@pytest.fixture(scope="session")
def device():
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
