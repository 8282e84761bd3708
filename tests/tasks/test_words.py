"""Texts whose words are tokenised once have the tokens that the tokenizer gives to the whole text."""

import random

import pytest
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, processors

from fastbert.tasks import words
from fastbert.tasks.examples import Pieces, Spec, clean

PARTS = [
    *"aeé.,'-[]#Åß中東日🙂Σς", "\u0301", "\u00a0", "\u2028", "\u200b", "\ufffd", "\x00", "\t", "\n", "\u3000", " ",
    "  ", "[SEP]", "[MASK]", "##a", "ab", "\ud800", "unaffable", "İ", "x" * 120,
]  # fmt: skip


def tokenizer(lowercase, template=False):
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"aebc.,'-[]#x", *(f"##{one}" for one in "aebcx"), "中"]
    vocabulary += ["σ", "##σ", "##ς", "ss", "##ss", "sep", "mask", "i", "ab", "##ab"]
    made = Tokenizer(models.WordPiece({name: i for i, name in enumerate(vocabulary)}, unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    if template:
        made.post_processor = processors.TemplateProcessing(
            "[CLS] $A:0 [SEP]", "[CLS] $A:0 [SEP] $B:1 [SEP]:1", [("[CLS]", 2), ("[SEP]", 3)]
        )
    made.add_special_tokens(vocabulary[:5])
    return made


def texts(count):
    draw = random.Random(count)
    found = ["".join(draw.choices(PARTS, k=draw.randrange(12))) for _ in range(count)]
    return [(one,) if draw.random() < 0.5 else (one, draw.choice(found)) for one in found]


@pytest.mark.parametrize("lowercase", [True, False])
def test_the_tokens_are_those_of_the_whole_text(lowercase, monkeypatch):
    monkeypatch.setattr(words, "LIMIT", 200)
    pieces = Pieces(tokenizer(lowercase, template=lowercase), Spec("classify", max_length=999, stride=2))
    assert pieces.words is not None
    drawn = texts(1000)
    for start in range(0, len(drawn), 50):
        some = drawn[start : start + 50]
        inputs = [tuple(map(clean, one)) if len(one) > 1 else clean(one[0]) for one in some]
        expected = pieces.tokenizer.encode_batch(inputs)
        for (found,), right, text in zip(pieces.whole(some), expected, some, strict=True):
            assert (found.ids, found.type_ids) == (right.ids, right.type_ids), text
    assert sum(pieces.lengths.values()) == 1000
    assert len(pieces.words.known) <= 200 + 50 * 2 * 12, "it begins anew when it is full"
    assert max(map(len, pieces.words.known)) <= words.LONGEST


def test_tokenizers_that_look_across_blanks_are_asked_for_the_whole():
    plain, added = tokenizer(True), tokenizer(True)
    added.add_tokens([AddedToken("a b")])
    other = tokenizer(True)
    other.pre_tokenizer = pre_tokenizers.Metaspace()
    assert [words.Words.fits(one) for one in (plain, added, other)] == [True, False, False]
    ((found,),) = Pieces(added, Spec("classify", max_length=9, stride=2)).whole([("a b",)])
    assert found.ids == [2, added.token_to_id("a b"), 3]
