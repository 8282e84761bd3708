"""One thread, and one small model for all tests of retrieval."""

import pytest
import torch
from labelled import small_encoder

from fastbert.model.sentences import SentenceEmbedder


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def encoder(tmp_path_factory):
    return small_encoder(tmp_path_factory.mktemp("retrieval"))


@pytest.fixture(scope="session")
def directory(encoder, tmp_path_factory):
    """A model with lively random weights and two prompts."""
    place = tmp_path_factory.mktemp("embedder")
    prompts = {"query": "the cat ", "document": ""}
    model = SentenceEmbedder.from_pretrained(encoder, prompts=prompts, normalize=True)
    torch.manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(std=0.4)
    model.save_pretrained(place)
    return place
