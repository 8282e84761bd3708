"""Runs in these tests use one thread, without TensorBoard and pictures, which take longer than the training."""

import pytest
import torch
from labelled import small_encoder
from runs import documents, draw_nothing, prepared, run, short_run, write_model

from fastbert.tasks import results


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    draw_nothing(monkeypatch)


@pytest.fixture(scope="session")
def place(tmp_path_factory):
    """A directory with a text and a longer one, model.json, and a tokenizer and shards of the shorter."""
    place = tmp_path_factory.mktemp("training")
    texts = documents(300)
    (place / "long.txt").write_text("\n".join(texts))
    prepared(place, texts[:60], 120)
    write_model(place)
    return place


@pytest.fixture
def options(place, tmp_path):
    return short_run(place) | {"output_dir": tmp_path / "run"}


@pytest.fixture(scope="session")
def whole(place):
    """The directory of that run, done without a break, with a checkpoint every 4 steps. To be copied, not changed."""
    with pytest.MonkeyPatch.context() as patched:
        draw_nothing(patched)
        before = torch.get_num_threads()
        torch.set_num_threads(1)
        run(short_run(place), output_dir=place / "whole", save_steps=4, save_total_limit=5)
        torch.set_num_threads(before)
    return place / "whole"


@pytest.fixture(scope="session")
def encoder(tmp_path_factory):
    """The directory of a small masked-LM model."""
    return small_encoder(tmp_path_factory.mktemp("finetune"))


@pytest.fixture(autouse=True)
def few_resamples(monkeypatch):
    """The bootstrap and the pictures take longer than a short run; test_pictures.py draws."""
    monkeypatch.setattr(results, "RESAMPLES", 2)
    monkeypatch.setattr(results.pictures, "draw", lambda *_: None)
