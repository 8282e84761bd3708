"""One thread, and one small model for all tests of tasks."""

import pytest
import torch
from labelled import small_encoder

from fastbert.tasks import results


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def encoder(tmp_path_factory):
    return small_encoder(tmp_path_factory.mktemp("tasks"))


@pytest.fixture(autouse=True)
def few_resamples(monkeypatch):
    """The bootstrap and the pictures take longer than a short run; test_pictures.py draws."""
    monkeypatch.setattr(results, "RESAMPLES", 2)
    monkeypatch.setattr(results.pictures, "draw", lambda *_: None)
