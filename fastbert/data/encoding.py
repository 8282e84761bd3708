"""Documents to token ids, on threads, in bounded memory."""

import contextlib
import itertools
import os
import re
import threading
from typing import NamedTuple

import numpy as np
from tokenizers import Tokenizer

from .text import BLANKS, IDEOGRAPHS, MAX_SIZE, Part
from .threads import ordered_map
from .tokenizer import vocabulary_size

# a rough rule is enough: these borders only say where a pair of segments may be split
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+")
# Letters of one call of the tokenizer, whose result is up to 250 times as large as the text, and of what is read ahead
# of the threads. These and the number of threads bound the memory. A text takes as much as so many letters more.
CALL, AHEAD, MAX_THREADS, PER_TEXT = 1 << 14, 1 << 22, 16, 64
# letters that the rest of a line may have without a place to cut it
MAX_REST = 4 * MAX_SIZE
# where a long sentence may be cut, if a token ends there: at blanks, else beside an ideograph or at a mark
_BLANKS = re.compile(rf"(?<=[^{BLANKS}])[{BLANKS}]+(?=[^{BLANKS}])")
_OTHERS = re.compile(rf"(?<=[{IDEOGRAPHS}])(?=\S)|(?<=\S)(?=[{IDEOGRAPHS}])|\b(?=\S)(?<=\S)")
# a token with a blank between letters, as WordPiece, byte-level BPE and SentencePiece write blanks
_SEVERAL_WORDS = re.compile("[^ \u0120\u2581][ \u0120\u2581]")


class _Piece(NamedTuple):
    """A text for the tokenizer: a sentence or a part of one."""

    text: str
    # letters at its beginning that the piece before ends with, and the number of their ids
    seen: int = 0
    known: int = 0


class _Sentence(list):
    """The pieces of a sentence of a line that was cut."""

    def __len__(self):
        return sum(len(piece.text) - piece.seen for piece in self)


def dtype_of(tokenizer):
    """The smallest of numpy's types that holds every id."""
    return np.dtype(np.uint16 if vocabulary_size(tokenizer) <= 1 << 16 else np.uint32)


def encoded_units(documents, tokenizer, *, unit_letters, skips, num_workers):
    """Tokenise documents in units, groups of whole documents of about `unit_letters` letters.

    skips: an iterator of bool, whether to skip a unit. num_workers: threads. Yields for each unit None if it is
    skipped, else (tokens, tokens per sentence, sentences per document), without empty ones.
    """
    encoder = _Encoder(tokenizer)
    calls = encoder.calls(zip(_units(encoder.joined(documents), unit_letters), skips))
    threads = max(1, min(num_workers, MAX_THREADS))
    arrays, lengths = [], []
    with _without_more_threads():
        for ids, counts, structure in ordered_map(encoder, calls, threads, size=encoder.letters, ahead=AHEAD):
            arrays.append(ids)
            lengths += counts
            if structure is not None:
                yield _arranged(np.concatenate(arrays), lengths, *structure) if structure else None
                arrays, lengths = [], []


class _Encoder:
    """Tokenises texts into arrays. Safe to call from many threads."""

    def __init__(self, tokenizer):
        # a copy: the caller's tokenizer keeps its settings
        self.tokenizer = Tokenizer.from_str(tokenizer.to_str())
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        # "[MASK]" in a text is split like any other word; this setting is not part of the JSON
        self.tokenizer.encode_special_tokens = True
        self.dtype = dtype_of(tokenizer)
        self.large = threading.Lock()
        # letters on each side of a place that tell what is joined there; WordPiece looks at the length of a word
        self.around = max(99, getattr(tokenizer.model, "max_input_chars_per_word", 0))
        self.joins_words = any(map(_SEVERAL_WORDS.search, tokenizer.get_vocab()))

    def joined(self, documents):
        """The documents, with a `_Sentence` for each sentence of a line that was cut.

        The sentence that the cut went through ends before it, where a token ends. What is left of it begins the next
        part of the line, perhaps in the next document. So the ids are those of the whole line. (Of segmentations that
        are equally likely, Unigram takes one by rounding errors, which depend on all of the line before.)
        """
        rest = None
        for document in documents:
            lines = []
            for line in document:
                part = line if isinstance(line, Part) else Part()
                if rest and not part.follows:
                    # only blanks followed
                    lines.append(_Sentence([rest._replace(text=rest.text.rstrip())]))
                    rest = None
                if not rest and not part.goes_on:
                    lines.append(line)
                    continue
                rest = rest or _Piece("")
                text, first, last = rest.text + line if rest.text else line.lstrip(), None, None
                for last in _SENTENCE_END.finditer(text):
                    first = first or last
                rest = rest._replace(text=text)
                if first:
                    # whole sentences lie between the first and the last
                    lines.append(_Sentence(self._pieces(rest._replace(text=text[: first.start()]))))
                    lines.append(text[first.end() : last.start()])
                    rest = _Piece(text[last.end() :])
                pieces = [*self._pieces(rest)]
                rest = pieces.pop() if part.goes_on else None
                lines.append(_Sentence(pieces))
                if rest and len(rest.text) > MAX_REST:
                    raise ValueError(
                        f"{part.place} has {len(rest.text):,} letters where no token of this tokenizer is seen to end: "
                        "expected blanks"
                    )
            if lines := [line for line in lines if line]:
                yield lines
        if rest:
            yield [_Sentence([rest._replace(text=rest.text.rstrip())])]

    def calls(self, units):
        """What to tokenise: (pieces of about CALL letters, None, or with the last of a unit its structure).

        units: (a list of documents of `joined`; whether to skip it). Its structure: sentences per document,
        texts per sentence; () if it is skipped.
        """
        for unit, is_skipped in units:
            if is_skipped:
                yield [], ()
                continue
            # texts per sentence, sentences per document
            texts, size, parts, sentences = [], 0, [], []
            for document in unit:
                before = len(parts)
                for pieces in itertools.chain.from_iterable(map(self._cut_up, document)):
                    parts.append(0)
                    for piece in pieces:
                        if size >= CALL:
                            yield texts, None
                            texts, size = [], 0
                        texts.append(piece)
                        size += len(piece.text) + PER_TEXT
                        parts[-1] += 1
                sentences.append(len(parts) - before)
            yield texts, (sentences, parts)

    @staticmethod
    def letters(call):
        return sum(len(piece.text) + PER_TEXT for piece in call[0])

    def __call__(self, call):
        """(tokens of the texts, the number of each text's, the unit's structure)."""
        pieces, structure = call
        texts = [piece.text for piece in pieces]
        # texts that could not be cut are large: one after the other
        with self.large if self.letters(call) > 4 * CALL else contextlib.nullcontext():
            ids = [encoding.ids for encoding in self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)]
        ids = [own[piece.known :] for own, piece in zip(ids, pieces, strict=True)]
        counts = list(map(len, ids))
        return np.fromiter(itertools.chain.from_iterable(ids), self.dtype, sum(counts)), counts, structure

    def _ids(self, text):
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def _cut_up(self, line):
        """The pieces of each sentence of a line."""
        return [line] if isinstance(line, _Sentence) else (self._pieces(_Piece(part)) for part in _sentences(line))

    def _pieces(self, piece):
        """Pieces of about CALL letters of a longer one. Each begins with the end of the one before, so that the
        tokenizer sees what stands before its own letters.
        """
        sentence, start, known = piece
        begin, size = 0, CALL
        # what follows a cut must be there
        while len(sentence) - start > size + self.around:
            cut = self._cut(sentence, begin, start, start + size)
            if cut is None:
                # there was no such place: look further
                size *= 2
                continue
            yield _Piece(sentence[begin : cut[0]], start - begin, known)
            start, begin, known = cut
            size = CALL
        yield _Piece(sentence[begin:], start - begin, known)

    def _cut(self, sentence, begin, start, end):
        """Where the piece that begins at `begin`, with own letters from `start` on, ends, near `end` and before it:
        (place, where the next begins, number of ids between the two).

        None if no token is seen to end there.
        """
        for gaps, joins in ((_BLANKS, self.joins_words), (_OTHERS, True)):
            for gap in itertools.islice(reversed([*gaps.finditer(sentence, max(end - 4096, start + 1), end)]), 32):
                place, beyond = gap.start(), gap.end() + self.around
                following = max(place - self.around, start)
                known = self._ends_token(sentence, following, place, beyond)
                # in "aaaa" it depends on the beginning where a token "aa" ends
                if known and (not joins or self._ends_token(sentence, begin, place, beyond)):
                    return place, following, known
        return None

    def _ends_token(self, sentence, begin, place, beyond):
        """The number of tokens from `begin` to `place`; 0 if what follows changes them."""
        ids = self._ids(sentence[begin:place])
        # and on the end: so two of them
        ends = all(self._ids(sentence[begin:end])[: len(ids)] == ids for end in (beyond, beyond - 1))
        return len(ids) if ends else 0


def _sentences(line):
    start = 0
    for end in _SENTENCE_END.finditer(line):
        yield line[start : end.start()]
        start = end.end()
    yield line[start:]


def _arranged(tokens, lengths, sentences, parts):
    """What `encoded_units` yields, from the tokens per text, sentences per document and texts per sentence."""
    sentence = np.repeat(np.arange(len(parts)), parts)
    lengths = np.bincount(sentence, lengths, len(parts)).astype(np.int64)
    document = np.repeat(np.arange(len(sentences)), sentences)[lengths > 0]
    counts = np.bincount(document, minlength=len(sentences))
    return tokens, lengths[lengths > 0], counts[counts > 0]


def _units(documents, letters):
    unit, size = [], 0
    for document in documents:
        unit.append(document)
        size += sum(map(len, document))
        if size >= letters:
            yield unit
            unit, size = [], 0
    if unit:
        yield unit


@contextlib.contextmanager
def _without_more_threads():
    """Our threads use all cores already: the tokenizers library must not start more in each of them."""
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ["TOKENIZERS_PARALLELISM"]
        else:
            os.environ["TOKENIZERS_PARALLELISM"] = before
