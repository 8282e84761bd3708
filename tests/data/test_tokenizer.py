"""Tokenizers: BERT's ids, the same vocabulary each time, and transformers reads what is saved."""

import gzip
import json
import time

import pytest
from corpus import make_documents, small_tokenizer, words, write_text
from test_sentencepiece import sentencepiece
from tokenizers import Tokenizer, models, normalizers

from fastbert.data.tokenizer import (
    SPECIALS,
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
    for train in (train_wordpiece, train_bpe):
        with pytest.raises(ValueError, match="a vocabulary of 1073741824 is too large: expected at most 4194304"):
            train([path], 1 << 30, progress=False)


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
    with pytest.raises(ValueError, match=r"vocab.txt is not a readable tokenizer: it has no \[PAD\] token"):
        load_tokenizer(tmp_path / "vocab.txt")
    with pytest.raises(OSError, match="tokenizer.json cannot be written"):
        save_tokenizer(small_tokenizer(tmp_path), tmp_path / "tokenizer.json")


CASES = {
    "uncased": {"do_lower_case": True},
    "cased": {"do_lower_case": False},
    "no settings": {},
    "keeps accents": {"do_lower_case": True, "strip_accents": False},
    "cased without accents": {"do_lower_case": False, "strip_accents": True},
    "Chinese words": {"tokenize_chinese_chars": False},
    "added tokens": {"added_tokens_decoder": {
        "900": {"content": "<num>", "lstrip": False, "normalized": False, "rstrip": False, "single_word": False,
                "special": True},
        "901": {"content": "wörd", "lstrip": False, "normalized": True, "rstrip": False, "single_word": True,
                "special": False},
    }},
    "other ends": {"cls_token": "[SEP]", "sep_token": "[CLS]"},
    "more special tokens": {"additional_special_tokens": ["naive", "caf"]},
    "DistilBERT": {"do_lower_case": False, "tokenizer_class": "DistilBertTokenizer"},
    "MPNet": {"tokenizer_class": "MPNetTokenizer"},
}  # fmt: skip
HARD = [*STRINGS, "Naïve CAFÉ 中文字 <num>x Wörd wörds", "[UNK] <mask> </s> [MASK]"]


@pytest.mark.parametrize("files", ["vocab.txt", "tokenizer.json", "added_tokens.json"])
@pytest.mark.parametrize("case", CASES)
def test_reads_what_transformers_reads(case, files, tmp_path, monkeypatch):
    """vocab.txt alone, and a tokenizer.json that says something else than tokenizer_config.json."""
    transformers = pytest.importorskip("transformers")
    settings = CASES[case]
    names = ["<pad>", "[UNK]", "<s>", "</s>", "<mask>"] if case == "MPNet" else list(SPECIALS)
    letters = "abcdefghijklmnopqrstuvwxyzABCDEFGNWéïöü中文字<>[]/"
    pieces = [*names, *letters, *(f"##{letter}" for letter in letters), "naive", "naïve", "中文字", "[UNUSED]"]
    (tmp_path / "vocab.txt").write_text("".join(f"{piece}\n" for piece in pieces), encoding="utf-8")
    if settings:
        kind = {"tokenizer_class": "BertTokenizer"}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(kind | settings))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mpnet" if case == "MPNet" else "bert"}))
    if files == "tokenizer.json":
        tokenizer = load_tokenizer(tmp_path / "vocab.txt")
        tokenizer.normalizer = normalizers.BertNormalizer(lowercase=not settings.get("do_lower_case", True))
        tokenizer.save(str(tmp_path / "tokenizer.json"))
    elif files == "added_tokens.json":
        (tmp_path / files).write_text(json.dumps({"<num>": len(pieces), "Wörd": len(pieces) + 1}))
        (tmp_path / "special_tokens_map.json").write_text(
            json.dumps({"mask_token": {"content": names[-1], "lstrip": True}})
        )
    theirs, ours = transformers.AutoTokenizer.from_pretrained(tmp_path), load_tokenizer(tmp_path)
    for text in HARD:
        assert ours.encode(text).ids == theirs(text)["input_ids"]
    # what is saved means the same to both
    save_tokenizer(ours, tmp_path / "saved")
    assert tokenizer_hash(load_tokenizer(tmp_path / "saved", as_saved=True)) == tokenizer_hash(ours)
    for again in (load_tokenizer(tmp_path / "saved"), transformers.AutoTokenizer.from_pretrained(tmp_path / "saved")):
        encode = again.encode if again.__class__ is Tokenizer else lambda text: again(text)  # noqa: B023
        for text in HARD:
            ids = encode(text)
            assert (ids.ids if hasattr(ids, "ids") else ids["input_ids"]) == ours.encode(text).ids


@pytest.mark.parametrize("settings", [{}, {"do_lower_case": False}, {"keep_accents": True}, {"split_by_punct": True},
                                      {"do_lower_case": True}, {"add_prefix_space": True}, {"add_prefix_space": False},
                                      {"split_special_tokens": True}, {"extra_special_tokens": {"x": "Kilo"}},
                                      {"bos_token": "</s>", "eos_token": "<s>"}])  # fmt: skip
@pytest.mark.parametrize("kind", ["AlbertTokenizer", "DebertaV2Tokenizer", "RobertaTokenizer", "XLMRobertaTokenizer"])
def test_settings_of_other_classes_count(kind, settings, wide_text, tmp_path):
    transformers = pytest.importorskip("transformers")
    if kind == "RobertaTokenizer":
        tokenizer, model_type = train_bpe([wide_text], 400, progress=False), "roberta"
    else:
        model_type = {"AlbertTokenizer": "albert", "DebertaV2Tokenizer": "deberta-v2"}.get(kind, "xlm-roberta")
        tokenizer = sentencepiece(model_type, [wide_text])
    rules = json.loads(tokenizer.to_str())
    # the classes build these anew
    rules |= {"post_processor": None, "truncation": {"direction": "Left", "max_length": 9, "strategy": "LongestFirst",
                                                     "stride": 0}}  # fmt: skip
    rules["model"] |= {"byte_fallback": False}
    (tmp_path / "tokenizer.json").write_text(json.dumps(rules))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": kind} | settings))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    theirs, ours = transformers.AutoTokenizer.from_pretrained(tmp_path), load_tokenizer(tmp_path)
    ours.no_truncation()
    for text in ("Bada ``Kilo'', zuvó!", "naïve  ÀÉ", " don't", "\tba\n ku ", "a <mask> [MASK] b", "ﬁ \u65e5"):
        assert ours.encode(text).ids == theirs(text)["input_ids"]


def test_a_class_with_another_model_is_refused(wide_text, tmp_path):
    """transformers would make a tokenizer of that class of the vocabulary."""
    train_bpe([wide_text], 400, progress=False).save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}')
    with pytest.raises(ValueError, match="it holds a BPE model, but the class BertTokenizer has WordPiece"):
        load_tokenizer(tmp_path)


def test_a_vocabulary_of_a_class_that_is_not_known_is_refused(tmp_path):
    (tmp_path / "vocab.txt").write_text("\n".join(SPECIALS))
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "BertJapaneseTokenizer"}')
    with pytest.raises(ValueError, match="of the class BertJapaneseTokenizer, expected one of BertTokenizer"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("name", ["added_tokens.json", "tokenizer_config.json"])
def test_tokens_in_other_files_take_the_ids_after_those_of_tokenizer_json(name, wide_text, tmp_path):
    transformers = pytest.importorskip("transformers")
    tokenizer = train_bpe([wide_text], 400, progress=False)
    assert "<mask>" not in json.loads(tokenizer.to_str())["model"]["vocab"]
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    other = {"added_tokens.json": {"kilobada": 600}, "tokenizer_config.json": {"delimiter_token": "kilobada"}}
    (tmp_path / name).write_text(json.dumps(other[name]))
    (tmp_path / "config.json").write_text('{"model_type": "roberta"}')
    text = "ba kilobada <mask>"
    expected = transformers.AutoTokenizer.from_pretrained(tmp_path)(text)["input_ids"]
    assert load_tokenizer(tmp_path).encode(text).ids == expected


@pytest.mark.parametrize(
    "file", ["tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "config.json"]
)
@pytest.mark.parametrize("content", ["[]", "3", '"x"', "{", "[" * 100_000, '{"x": []}', '{"added_tokens_decoder": [1]}',
                                     '{"tokenizer_class": 3}', '{"do_lower_case": "no"}'])  # fmt: skip
def test_odd_files_beside_a_tokenizer_are_one_clear_line(content, file, tokenizer, tmp_path):
    save_tokenizer(tokenizer, tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    (tmp_path / f"{file}.json").write_text(content)
    for name in ("tokenizer.json", "vocab.txt"):
        try:
            load_tokenizer(tmp_path / name)
        except ValueError as error:
            assert str(tmp_path) in str(error) and "\n" not in str(error)


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
