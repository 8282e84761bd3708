"""Documents -> token ids: long sentences in parts, and how far is read ahead."""

import itertools
import random
import threading
import time
import tracemalloc

import pytest
from corpus import make_documents, small_tokenizer, words, write_text
from test_sentencepiece import sentencepiece
from tokenizers import normalizers, pre_tokenizers

from fastbert.data import encoding, text
from fastbert.data.encoding import encoded_units
from fastbert.data.threads import ordered_map
from fastbert.data.tokenizer import train_bpe

# Unigram leaves it to rounding whether "aaa" is "a aa" or "aa a", in a line as a whole: few of them are alike
IDEOGRAPHS = "".join(map(chr, range(0x4E00, 0x4E1E)))


@pytest.fixture(scope="module", params=["wordpiece", "bpe", "albert", "xlm-roberta", "deberta-v2"])
def kind(request, tmp_path_factory):
    """A tokenizer that also has tokens of several ideographs and of several words."""
    folder, draw = tmp_path_factory.mktemp("kind"), random.Random(1)
    ideographs = [
        "".join(draw.choices(["\u65e5" * 3, "\u65e5\u672c", "\u8a9e", "\u4e2d\u6587"], k=9)) for _ in range(99)
    ]
    text = write_text(folder / "text.txt", make_documents(60) + [ideographs])
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
    return "".join(draw.choices(IDEOGRAPHS, k=5000)) + " " + "w" * 3000 + " ba"


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
    assert len(calls) > 5


@pytest.mark.parametrize("case", ["words", "blanks", "marks", "phrases", "ideographs", "sentences", "one letter"])
def test_the_ids_of_a_line_in_several_documents_are_those_of_the_whole(kind, case, tmp_path, monkeypatch):
    monkeypatch.setattr(encoding, "CALL", 150)
    monkeypatch.setattr(text, "MAX_SIZE", 1100)
    if case == "one letter":
        # with tokens of several, a place where one ends depends on all that stands before
        line = "\u65e5" * 3001 + "\u672c\u65e5" + "w" * 50 + "\u8a9e" * 2000 + "\u65e5\u672c" * 2000
    elif case == "sentences":
        line = "".join(word + (". " if i % 9 else "! \u3000 ") for i, word in enumerate(long_sentence("words").split()))
    else:
        line = long_sentence(case).strip()
    (tmp_path / "a.txt").write_text(f"ba bo\n{line}\nki ku\n")
    documents = [*text.read_documents([str(tmp_path / "a.txt")], layout="line")]
    assert len(documents) > 5
    units = encoded_units(documents, kind, unit_letters=2000, skips=itertools.repeat(False), num_workers=2)
    tokens = [id for ids, _, _ in units for id in ids.tolist()]
    whole = [kind.encode(s, add_special_tokens=False).ids for s in ("ba bo", *encoding._sentences(line), "ki ku")]
    assert tokens == sum(whole, [])


def test_a_line_that_no_tokenizer_can_cut(tmp_path, monkeypatch):
    """Letters that WordPiece takes for one word, as it does not set ideographs apart."""
    monkeypatch.setattr(text, "MAX_SIZE", 1000)
    monkeypatch.setattr(encoding, "MAX_REST", 3000)
    tokenizer = small_tokenizer(tmp_path)
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.normalizer = normalizers.Sequence([])
    for letters, fits in ((2000, True), (5000, False)):
        (tmp_path / "a.txt").write_text("\u65e5" * letters + "\n")
        units = encoded_units(
            text.read_documents([str(tmp_path / "a.txt")]), tokenizer,
            unit_letters=9999, skips=itertools.repeat(False), num_workers=1,
        )  # fmt: skip
        if fits:
            ((tokens, *_),) = units
            assert tokens.tolist() == [tokenizer.token_to_id("[UNK]")]
        else:
            with pytest.raises(ValueError, match=r"a.txt line 1 has 3,99\d letters where no token .* expected blanks"):
                list(units)


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
    for piece, expected in ((encoding._Piece("w" * 1000), [1]), (encoding._Piece("ba"), [2, 3, 4])):
        most = 0
        assert len(list(ordered_map(encoder, [([piece], None)] * 30, 4, ahead=30))) == 30
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
