"""Documents -> token ids: long sentences in parts, and how far is read ahead."""

import itertools
import random
import threading
import time
import tracemalloc

import pytest
from corpus import make_documents, small_tokenizer, words, write_text
from test_sentencepiece import sentencepiece

from fastbert.data import encoding
from fastbert.data.encoding import encoded_units
from fastbert.data.threads import ordered_map
from fastbert.data.tokenizer import train_bpe


@pytest.fixture(scope="module", params=["wordpiece", "bpe", "albert", "xlm-roberta", "deberta-v2"])
def kind(request, tmp_path_factory):
    """A tokenizer that also has tokens of two words."""
    folder = tmp_path_factory.mktemp("kind")
    text = write_text(folder / "text.txt", make_documents(60))
    if request.param == "wordpiece":
        tokenizer = small_tokenizer(folder)
    elif request.param == "bpe":
        tokenizer = train_bpe([text], 300, progress=False)
    else:
        tokenizer = sentencepiece(request.param, [text])
    tokenizer.add_tokens(["bada kilo zuvo", "\u65e5\u672c"])
    return tokenizer


def long_sentence(kind):
    draw = random.Random(0)
    if kind == "words":
        return " ".join(draw.choices(words(), k=2000))
    if kind == "blanks":
        return "".join(
            word + draw.choice([" ", " ", " ", "  ", "\t", "\u3000", " \r "]) for word in draw.choices(words(), k=2000)
        )
    if kind == "marks":
        return "".join(word + draw.choice([",", "-", "  ", "/", "'"]) for word in draw.choices(words(), k=2000))
    if kind == "phrases":
        return "bada kilo zuvo " * 600
    return "".join(draw.choices("\u65e5\u672c\u8a9e\u4e2d\u6587", k=5000)) + " " + "w" * 3000 + " ba"


@pytest.mark.parametrize("text", ["words", "blanks", "marks", "phrases", "ideographs"])
def test_the_ids_of_a_long_sentence_are_those_of_the_whole(kind, text, monkeypatch):
    monkeypatch.setattr(encoding, "CALL", 300)
    calls = []
    encode = encoding._Encoder.__call__
    monkeypatch.setattr(encoding._Encoder, "__call__", lambda self, call: calls.append(call) or encode(self, call))
    line = long_sentence(text).strip()
    documents = [["ba bo."], [line, "Ki ku. Za"]]
    units = list(encoded_units(documents, kind, unit_letters=1 << 18, skips=itertools.repeat(False), num_workers=2))
    ((tokens, sentences, of_document),) = units
    whole = [kind.encode(s, add_special_tokens=False).ids for s in ("ba bo.", line, "Ki ku.", "Za")]
    assert [list(ids) for ids in whole] == [
        tokens[a:b].tolist() for a, b in itertools.pairwise(itertools.accumulate(sentences, initial=0))
    ]
    assert of_document.tolist() == [1, 3]
    assert len(calls) > 5 or text == "ideographs"


@pytest.mark.parametrize("threads", [1, 3])
def test_little_is_read_ahead_of_what_is_taken(threads):
    read, taken = [], 0
    gate = threading.Event()

    def items():
        for item in (5, 1, 1, 9, 1, 1, 1):
            read.append(item)
            yield item

    mapped = ordered_map(lambda item: gate.wait(10) and item, items(), threads, size=lambda item: item, ahead=6)
    gate.set()
    for item in mapped:
        taken += item
        # at most the limit and the item that went beyond it
        assert sum(read[:-1]) - taken <= 6
    assert taken == 19 and len(read) == 7


def test_large_texts_are_tokenised_one_after_the_other(tmp_path, monkeypatch):
    monkeypatch.setattr(encoding, "CALL", 100)
    encoder = encoding._Encoder(small_tokenizer(tmp_path))
    whole, inside, most, lock = encoder.tokenizer, 0, 0, threading.Lock()

    class Counting:
        def encode_batch_fast(self, texts, **settings):
            nonlocal inside, most
            with lock:
                inside += 1
                most = max(most, inside)
            time.sleep(0.002)
            with lock:
                inside -= 1
            return whole.encode_batch_fast(texts, **settings)

    encoder.tokenizer = Counting()
    # a word without a place to cut it
    for text, expected in (("w" * 1000, [1]), ("ba", [2, 3, 4])):
        most = 0
        assert len(list(ordered_map(encoder, [([text], None)] * 30, 4, ahead=30))) == 30
        assert most in expected


def test_many_short_sentences_are_read_a_few_at_a_time(tmp_path):
    encoder = encoding._Encoder(small_tokenizer(tmp_path))
    line = "a. " * 100_000
    tracemalloc.start()
    calls = encoder.calls([([[line]], False)])
    number = sum(len(texts) for texts, _ in itertools.islice(calls, 50))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # a list of all sentences would take 60 bytes for each
    assert 5000 < number < 50_000 and peak < 1e6
