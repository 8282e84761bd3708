"""Tokenizers: BERT's ids, the same vocabulary each time, and transformers reads what is saved."""

import gzip
import json
import time

import pytest
from corpus import make_documents, small_tokenizer, words, write_text
from tokenizers import Tokenizer, models

from fastbert.data.tokenizer import (
    load_tokenizer,
    save_tokenizer,
    special_ids,
    tokenizer_hash,
    train_bpe,
    train_wordpiece,
    word_starts,
)

STRINGS = [
    "bada Kilo, zuvó! [MASK] 日本 don't",
    "",
    "   ",
    "xylophone\tquux",
    "a" * 200,
    "\x00\u200bba\ufffd",
    "ÀÉÎ naïve [SEP] [CLS]",
]


@pytest.fixture(scope="module")
def wide_text(tmp_path_factory):
    """A text with more than 1000 pieces, its words in capitals and with accents."""
    lines = [f"{word.capitalize()}é {word.upper()} {word}" for word in words(1500, seed=1)] * 2
    return write_text(tmp_path_factory.mktemp("wide") / "wide.txt", [lines])


def test_special_tokens_have_berts_ids(tokenizer, wide_text):
    assert list(special_ids(tokenizer)) == [0, 1, 2, 3, 4]
    wide = train_wordpiece([wide_text], 1000, progress=False)
    assert wide.get_vocab_size() == 1000
    assert list(special_ids(wide)) == [0, 100, 101, 102, 103]
    assert [wide.id_to_token(i) for i in (1, 99)] == ["[unused0]", "[unused98]"]
    assert wide.encode("ba").ids[0] == 101 and wide.encode("ba", "ba").type_ids == [0, 0, 0, 1, 1]


@pytest.mark.parametrize("train", [train_wordpiece, train_bpe])
def test_training_is_repeatable(train, wide_text):
    first, second = (train([wide_text], 1000, progress=False) for _ in range(2))
    assert tokenizer_hash(first) == tokenizer_hash(second)


def test_cased_and_uncased(wide_text):
    uncased = train_wordpiece([wide_text], 1000, progress=False)
    cased = train_wordpiece([wide_text], 1000, lowercase=False, progress=False)
    word = words(1500, seed=1)[0]
    assert uncased.encode(word.upper() + "é").ids == uncased.encode(word + "e").ids
    assert cased.encode(word.upper()).ids != cased.encode(word).ids
    assert cased.decode(cased.encode(word.capitalize() + "é").ids) == word.capitalize() + "é"


@pytest.mark.parametrize("name", ["text.jsonl", "text.txt.gz"])
def test_training_reads_every_format(name, tmp_path):
    documents = make_documents(60)
    plain = train_wordpiece([write_text(tmp_path / "text.txt", documents)], 150, progress=False)
    path = tmp_path / name
    if name.endswith(".gz"):
        path.write_bytes(gzip.compress((tmp_path / "text.txt").read_bytes()))
    else:
        path.write_text("".join(json.dumps({"body": "\n".join(d)}) + "\n" for d in documents))
    assert tokenizer_hash(train_wordpiece([path], 150, text_column="body", progress=False)) == tokenizer_hash(plain)


def test_vocabulary_larger_or_smaller_than_the_text_supports(tmp_path):
    path = write_text(tmp_path / "text.txt", make_documents(20))
    with pytest.raises(ValueError, match=r"30522 is larger than the text supports: it gave (\d+) pieces") as caught:
        train_wordpiece([path], progress=False)
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="a vocabulary of 20 is too small"):
        train_wordpiece([path], 20, progress=False)


@pytest.mark.parametrize("kind", ["uncased", "cased", "bpe"])
def test_transformers_loads_what_is_saved(wide_text, kind, tmp_path):
    transformers = pytest.importorskip("transformers")
    if kind == "bpe":
        tokenizer = train_bpe([wide_text], 1000, progress=False)
    else:
        tokenizer = train_wordpiece([wide_text], 1000, lowercase=kind == "uncased", progress=False)
    save_tokenizer(tokenizer, tmp_path)
    assert tokenizer_hash(load_tokenizer(tmp_path)) == tokenizer_hash(tokenizer)
    for loader in ("AutoTokenizer", *(["BertTokenizerFast"] if kind != "bpe" else [])):
        theirs = getattr(transformers, loader).from_pretrained(tmp_path)
        assert [theirs(s)["input_ids"] for s in STRINGS] == [tokenizer.encode(s).ids for s in STRINGS]
        pair = tokenizer.encode(STRINGS[0], STRINGS[3])
        assert theirs(STRINGS[0], STRINGS[3], return_token_type_ids=True)["token_type_ids"] == pair.type_ids
        assert [theirs.pad_token_id, theirs.unk_token_id, theirs.cls_token_id, theirs.sep_token_id,
                theirs.mask_token_id] == list(special_ids(tokenizer))  # fmt: skip
        assert len(theirs) == 1000


def test_save_and_load(tokenizer, tmp_path):
    save_tokenizer(tokenizer, tmp_path / "new" / "folder")
    again = [load_tokenizer(tmp_path / "new" / "folder"), load_tokenizer(tmp_path / "new/folder/tokenizer.json")]
    assert {tokenizer_hash(t) for t in again} == {tokenizer_hash(tokenizer)}
    # old directories have the vocabulary and the switch for lower case only
    (tmp_path / "new/folder/tokenizer.json").unlink()
    old = load_tokenizer(tmp_path / "new" / "folder")
    assert [old.encode(s).ids for s in STRINGS] == [tokenizer.encode(s).ids for s in STRINGS]


def test_loading_what_is_no_tokenizer(tmp_path):
    with pytest.raises(FileNotFoundError, match="no tokenizer in .*nowhere"):
        load_tokenizer(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="expected a folder with tokenizer.json"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"model": ')
    with pytest.raises(ValueError, match="tokenizer.json is not a readable tokenizer"):
        load_tokenizer(tmp_path)
    Tokenizer(models.WordPiece({"a": 0, "[UNK]": 1}, unk_token="[UNK]")).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match=r"has no \[PAD\] token"):
        load_tokenizer(tmp_path)
    (tmp_path / "vocab.txt").write_text("a\nb\n")
    with pytest.raises(ValueError, match=r"vocab.txt has no \[CLS\] token"):
        load_tokenizer(tmp_path / "vocab.txt")
    with pytest.raises(OSError, match="tokenizer.json cannot be written"):
        save_tokenizer(small_tokenizer(tmp_path), tmp_path / "tokenizer.json")


def test_hash_is_of_what_decides_the_ids(tokenizer):
    before = tokenizer_hash(tokenizer)
    copy = Tokenizer.from_str(tokenizer.to_str())
    copy.enable_truncation(16)
    copy.enable_padding(length=16)
    assert tokenizer_hash(copy) == before
    copy.add_tokens(["another"])
    assert tokenizer_hash(copy) != before


def test_word_starts(tokenizer):
    starts = word_starts(tokenizer)
    assert len(starts) == 150
    for text in ("bada kilozuvo", words()[0] + ", " + words()[1]):
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        assert sum(starts[i] for i in ids) == len(tokenizer.pre_tokenizer.pre_tokenize_str(text)) < len(ids)
    with pytest.raises(ValueError, match="whole words are not known for a BPE tokenizer with the decoder NoneType"):
        word_starts(Tokenizer(models.BPE()))


def test_a_word_of_a_megabyte(tmp_path):
    documents = make_documents(60)
    plain = train_wordpiece([write_text(tmp_path / "plain.txt", documents)], 150, progress=False)
    started = time.monotonic()
    path = write_text(tmp_path / "long.txt", [*documents, ["ba" * 500_000]])
    tokenizer = train_wordpiece([path], 150, progress=False)
    assert time.monotonic() - started < 30
    # it is [UNK] in the end, so it has no say in the vocabulary
    assert tokenizer_hash(tokenizer) == tokenizer_hash(plain)
    assert tokenizer.encode("ba" * 500_000, add_special_tokens=False).tokens == ["[UNK]"]


@pytest.fixture(scope="module")
def bpe(wide_text):
    return train_bpe([wide_text], 700, progress=False)


def test_bpe_has_robertas_ids_and_loses_nothing(bpe):
    assert list(special_ids(bpe)) == [1, 3, 0, 2, 699] and bpe.get_vocab_size() == 700
    assert bpe.encode("ba", "ba").ids[0] == 0 and bpe.encode("ba", "ba").type_ids == [0] * len(bpe.encode("ba", "ba"))
    for text in STRINGS:
        ids = bpe.encode(text, add_special_tokens=False).ids
        assert bpe.decode(ids, skip_special_tokens=False) == text.replace(" [MASK]", " [MASK]")
        assert special_ids(bpe).unk not in ids
    assert bpe.encode("to <mask> it", add_special_tokens=False).ids.count(699) == 1


def test_bpe_words_begin_with_their_blank(bpe):
    starts = word_starts(bpe)
    encoding = bpe.encode("one two")
    begun = [bpe.id_to_token(i) for i in encoding.ids if starts[i]]
    assert all(piece.startswith("\u0120") or piece in ("<s>", "</s>") for piece in begun) and len(begun) >= 3


def test_bpe_of_too_little_text(wide_text):
    with pytest.raises(ValueError, match="too small: the bytes and the special tokens are 261"):
        train_bpe([wide_text], 200, progress=False)
    with pytest.raises(ValueError, match="larger than the text supports"):
        train_bpe([wide_text], 90000, progress=False)
