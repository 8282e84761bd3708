import pytest
from corpus import make_documents, small_tokenizer, write_text

from fastbert.data.shards import Shards, prepare


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return small_tokenizer(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def shards(tokenizer, tmp_path_factory):
    """300 documents in several shards."""
    folder = tmp_path_factory.mktemp("shards")
    path = write_text(folder / "text.txt", make_documents(300))
    prepare([path], tokenizer, folder / "out", shard_tokens=5000, num_workers=1, progress=False)
    opened = Shards.open(folder / "out", verify=True)
    assert len(opened.tokens) >= 3
    return opened
