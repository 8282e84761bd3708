"""Small texts for the tests of the data path."""

import random
from functools import cache

from fastbert.data.tokenizer import train_wordpiece


@cache
def words(count=300, seed=0):
    draw = random.Random(seed)
    syllables = [c + v for c in "bdfgklmnprstvz" for v in "aeiou"]
    return ["".join(draw.choices(syllables, k=draw.randint(1, 4))) for _ in range(count)]


def make_documents(count, seed=0, lines=8, line_words=12):
    """`count` documents of 1 to `lines` lines of 1 to `line_words` words, each line ending in a full stop."""
    draw = random.Random(seed)

    def line():
        return " ".join(draw.choices(words(), k=draw.randint(1, line_words))) + "."

    return [[line() for _ in range(draw.randint(1, lines))] for _ in range(count)]


def write_text(path, documents):
    """A .txt file with blank lines between documents; its path as a str."""
    path.write_text("\n".join("\n".join(document) + "\n" for document in documents), encoding="utf-8")
    return str(path)


def small_tokenizer(directory, vocab_size=150):
    """A WordPiece tokenizer for the words above, most of which it has to take apart."""
    path = write_text(directory / "corpus.txt", make_documents(60))
    return train_wordpiece([path], vocab_size, progress=False)


def document_of(shards, number):
    """The token ids of a document, a list of one list per sentence."""
    for tokens, sentences, documents in zip(shards.tokens, shards.sentences, shards.documents, strict=True):
        if number < len(documents) - 1:
            borders = sentences[documents[number] : documents[number + 1] + 1]
            return [tokens[a:b].tolist() for a, b in zip(borders, borders[1:])]
        number -= len(documents) - 1
    raise IndexError("no such document")
