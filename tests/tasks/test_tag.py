"""Tags by word: windows, words without pieces, texts without words, models of others."""

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from fastbert.tasks import tag
from fastbert.tasks.examples import Example, Pieces, Spec, batch_of

LABELS = ("B-A", "B-B", "I-A", "I-B", "O")
SPECIALS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
WORDS = ("an", "\u200b", "ideal", "\ufffd", "day", "is", "\u0301", "long", "enough")


def spelling(letters, *, bytes_=False):
    """A tokenizer with a piece a letter: WordPiece, or byte-level BPE with "aa" as a piece."""
    if bytes_:
        letters = [*pre_tokenizers.ByteLevel.alphabet(), "aa"]
        vocab = {piece: i for i, piece in enumerate((*SPECIALS, *letters))}
        tokenizer = Tokenizer(models.BPE(vocab, [("a", "a")]))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
    else:
        vocab = {piece: i for i, piece in enumerate((*SPECIALS, *letters, *(f"##{letter}" for letter in letters)))}
        tokenizer = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
        tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return tokenizer


def encoded(example, tokenizer, **settings):
    spec = Spec("tag", LABELS, **{"max_length": 64, "stride": 2} | settings)
    return tag.encode([example], Pieces(tokenizer, spec), spec)[0], spec


def answered(example, windows, spec, labels=None):
    """The prediction from logits that say the labels of the windows, or `labels`."""
    rows = [np.eye(len(LABELS))[[spec.index["O"] if i < 0 else i for i in window.labels]] * 20 for window in windows]
    return tag.decode(example, windows, rows if labels is None else labels, spec)


def sentence(tags=None):
    return Example(1, WORDS, tags, more={"words": "row"})


@pytest.mark.parametrize(("max_length", "stride"), [(64, 2), (8, 3), (7, 0), (4, 1), (3, 0)])
def test_each_word_is_decided_once_by_its_first_piece(max_length, stride):
    tags = ["B-A", "I-A", "I-A", "O", "B-B", "O", "O", "B-A", "O"]
    tokenizer = spelling(sorted(set("".join(WORDS))))
    windows, spec = encoded(sentence(tags), tokenizer, max_length=max_length, stride=stride)
    assert all(len(window.ids) == len(window.labels) <= max_length for window in windows)
    decided = {}
    for window in windows:
        for unit, place in zip(*window.more, strict=True):
            assert tokenizer.id_to_token(window.ids[place]) == WORDS[unit][0]
            assert window.labels[place] == spec.index[tags[unit]] and unit not in decided
            decided[int(unit)] = None
        assert sum(label >= 0 for label in window.labels) == len(window.more[0])
    # words without a piece are O, and the gold keeps them
    vanished = [1, 3, 6]
    assert sorted(decided) == [i for i in range(len(WORDS)) if i not in vanished]
    found = answered(sentence(tags), windows, spec)
    assert found["tags"] == ["B-A", "O", "I-A", "O", "B-B", "O", "O", "B-A", "O"]
    scores = tag.score([sentence(tags)], [found], spec)
    assert scores["undecided_words"] == 3 and scores["accuracy"] == 8 / 9
    # of 3 entities 2 are found; without its second word the first is two, by conlleval, of which none is right
    assert (scores["precision"], scores["recall"]) == (2 / 4, 2 / 3)


def test_a_window_shows_what_stands_around_a_word():
    words = tuple("abcdefghijkl")
    example = Example(1, words, None, more={"words": "row"})
    windows, _ = encoded(example, spelling(words), max_length=8, stride=4)
    assert len(windows) == 4
    for window in windows[1:-1]:
        # the middle two of six words, not those at the borders
        assert [place - 1 for place in window.more[1]] == [2, 3]


def test_class_weights_are_those_of_the_words():
    tags = ["B-A", "I-A", "O", "O", "B-B", "O", "O", "O", "O"]
    windows, _ = encoded(sentence(tags), spelling(sorted(set("".join(WORDS)))), max_length=8)
    batch = batch_of([windows], np.array([2.0, 3.0, 5.0, 7.0, 0.5]))
    expected = np.array([2.0, 3.0, 5.0, 7.0, 0.5, 0.0])[batch.labels.clamp(min=-1).numpy()]
    np.testing.assert_array_equal(batch.weights, expected)
    # the word of 5.0 has no piece
    assert sorted(expected[expected > 0]) == [0.5] * 4 + [2.0, 3.0]


def test_a_cut_sentence_keeps_its_gold():
    tags = ["O"] * 8 + ["B-A"]
    windows, spec = encoded(sentence(tags), spelling("andeilys"), max_length=8, truncate=True)
    scores = tag.score([sentence(tags)], [answered(sentence(tags), windows, spec)], spec)
    assert len(windows) == 1 and (scores["recall"], scores["words"]) == (0.0, 9)


def test_words_of_a_byte_level_tokenizer_are_those_of_the_text():
    tokenizer = spelling("", bytes_=True)
    words = ("aa", "aa", "b", "\u00e9a")
    (window,), _ = encoded(Example(1, words, None, more={"words": "row"}), tokenizer)
    assert window.ids[1:-1] == tokenizer.encode(" ".join(words), add_special_tokens=False).ids
    first = [tokenizer.id_to_token(window.ids[place]) for place in window.more[1]]
    assert first == ["aa", "\u0120", "\u0120", "\u0120"]


@pytest.mark.parametrize("bytes_", [False, True])
@pytest.mark.parametrize("max_length", [64, 9])
def test_spans_of_a_text_are_cut_from_the_text(bytes_, max_length):
    text = "  \U0001f600 Cafe\u0301  Ulm's \u6771\u4eac\u306b day"
    spans = [(4, 14, "A"), (17, 19, "B")]
    assert [text[start:end] for start, end, _ in spans] == ["Cafe\u0301  Ulm", "\u6771\u4eac"]
    example = Example(1, (text,), spans)
    windows, spec = encoded(example, spelling(sorted({*text.lower()} - {" "}), bytes_=bytes_), max_length=max_length)
    found = answered(example, windows, spec)
    entities = [(entity["text"], entity["label"]) for entity in found["entities"]]
    assert entities == [("Cafe\u0301  Ulm", "A"), ("\u6771\u4eac", "B")]
    scores = tag.score([example], [found], spec)
    assert (scores["f1"], scores["strict_f1"], scores["off_word_entities"]) == (1.0, 1.0, 0)


def test_words_of_a_tokenizer_that_cuts_at_blanks_alone():
    text = "Una met Bo, in \u6771\u4eac\u306b."
    pieces = [(piece, -1.0) for piece in (*SPECIALS, *sorted({*text} - {" "}), "\u2581", "\u2581Una")]
    tokenizer = Tokenizer(models.Unigram(pieces, 1))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.post_processor = spelling("").post_processor
    example = Example(1, (text,), [(0, 3, "A"), (8, 10, "A"), (15, 17, "B")])
    windows, spec = encoded(example, tokenizer)
    units = [text[start:end] for start, end in example.more["units"]]
    assert units == ["Una", "met", "Bo", ",", "in", "\u6771", "\u4eac", "\u306b", "."]
    assert [entity["text"] for entity in answered(example, windows, spec)["entities"]] == ["Una", "Bo", "\u6771\u4eac"]


def test_an_entity_inside_a_word_is_counted_and_missed():
    example = Example(1, ("unquiet days",), [(2, 7, "A")])
    windows, spec = encoded(example, spelling(sorted(set("unquietdays"))))
    found = answered(example, windows, spec)
    assert found["entities"][0]["text"] == "unquiet"
    scores = tag.score([example], [found], spec)
    assert (scores["recall"], scores["off_word_entities"]) == (0.0, 1)


def test_labels_of_others_may_be_of_another_scheme():
    spec = Spec("tag", ("O", "B-A", "E-A", "I-A", "S-A"))
    example = Example(1, tuple("abcd"), ["B-A", "I-A", "B-A", "O"], more={"words": "row"})
    assert not tag.is_plain(spec) and tag.is_plain(Spec("tag", ("NN", "VB")))
    spec.labels = ("O", "B-A", "E-A", "I-A", "S-A")
    windows = tag.encode([Example(1, example.texts, None, more=example.more)], Pieces(spelling("abcd"), spec), spec)[0]
    rows = np.eye(5)[[0, 1, 2, 4, 0, 0]]
    found = tag.decode(example, windows, [rows], spec)
    assert found["tags"] == ["B-A", "E-A", "S-A", "O"]
    assert tag.score([example], [found], spec)["strict_f1"] == 1.0


def test_plain_tags_have_no_entities():
    spec = Spec("tag", ("ADJ", "NOUN"), settings={"scheme": "plain"})
    example = Example(1, ("ab", "c"), ["ADJ", "NOUN"], more={"words": "row"})
    windows = tag.encode([example], Pieces(spelling("abc"), spec), spec)[0]
    found = tag.decode(example, windows, [np.eye(2)[[0, 0, 0, 0, 0]] * 9], spec)
    scores = tag.score([example], [found], spec)
    assert found["tags"] == ["ADJ", "ADJ"] and "entities" not in found
    assert scores["accuracy"] == 0.5 and scores["macro_f1"] == pytest.approx(1 / 3) and "f1" not in scores


def test_items_of_predict():
    assert tag.example(1, "a b").texts == ("a b",) and tag.example(1, ["a", "b"]).texts == ("a", "b")
    with pytest.raises(ValueError, match="item 7"):
        tag.example(7, ["a", 3])


def test_no_words_at_all():
    spec = Spec("tag", LABELS)
    for example in (
        Example(1, (), None, more={"words": "row"}),
        Example(1, ("\u200b",), None),
        Example(1, ("",), None),
    ):
        windows = tag.encode([example], Pieces(spelling("a"), spec), spec)[0]
        found = tag.decode(example, windows, [np.zeros((len(windows[0].ids), len(LABELS)))], spec)
        assert found["entities"] == [] and len(windows) == 1
