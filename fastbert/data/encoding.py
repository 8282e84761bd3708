"""Documents to token ids, on threads, in bounded memory."""

import contextlib
import itertools
import os
import re
import threading

import numpy as np
from tokenizers import Tokenizer

from .text import BLANKS, IDEOGRAPHS
from .threads import ordered_map
from .tokenizer import vocabulary_size

# a rough rule is enough: these borders only say where a pair of segments may be split
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+")
# Letters of one call of the tokenizer, whose result is up to 250 times as large as the text, and of what is read ahead
# of the threads. These and the number of threads bound the memory. A text takes as much as so many letters more.
CALL, AHEAD, MAX_THREADS, PER_TEXT = 1 << 14, 1 << 22, 16, 64
# where a long sentence may be cut, if the ids allow it: at blanks, else between two ideographs or at a mark
_GAPS = [
    re.compile(rf"(?<=[^{BLANKS}])[{BLANKS}]+(?=[^{BLANKS}])"),
    re.compile(rf"(?<=[{IDEOGRAPHS}])(?=[{IDEOGRAPHS}])|\b(?=\S)(?<=\S)"),
]


def dtype_of(tokenizer):
    """The smallest of numpy's types that holds every id."""
    return np.dtype(np.uint16 if vocabulary_size(tokenizer) <= 1 << 16 else np.uint32)


def encoded_units(documents, tokenizer, *, unit_letters, skips, num_workers):
    """Tokenise documents in units, groups of whole documents of about `unit_letters` letters.

    skips: an iterator of bool, whether to skip a unit. num_workers: threads. Yields for each unit None if it is
    skipped, else (tokens, tokens per sentence, sentences per document), without empty ones.
    """
    encoder = _Encoder(tokenizer)
    calls = encoder.calls(zip(_units(documents, unit_letters), skips))
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

    def calls(self, units):
        """What to tokenise: (texts of about CALL letters, None, or with the last texts of a unit its structure).

        units: (a list of documents, each a list of lines; whether to skip it). Its structure: sentences per document,
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
                for sentence in itertools.chain.from_iterable(map(_sentences, document)):
                    parts.append(0)
                    for text in self._parts(sentence):
                        if size >= CALL:
                            yield texts, None
                            texts, size = [], 0
                        texts.append(text)
                        size += len(text) + PER_TEXT
                        parts[-1] += 1
                sentences.append(len(parts) - before)
            yield texts, (sentences, parts)

    @staticmethod
    def letters(call):
        return sum(map(len, call[0])) + PER_TEXT * len(call[0])

    def __call__(self, call):
        """(tokens of the texts, the number of each text's, the unit's structure)."""
        texts, structure = call
        # texts that could not be cut are large: one after the other
        with self.large if self.letters(call) > 4 * CALL else contextlib.nullcontext():
            ids = [encoding.ids for encoding in self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)]
        counts = list(map(len, ids))
        return np.fromiter(itertools.chain.from_iterable(ids), self.dtype, sum(counts)), counts, structure

    def _ids(self, text):
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def _parts(self, sentence):
        """Parts of about CALL letters of a sentence, whose ids together are those of the whole."""
        start, size = 0, CALL
        while len(sentence) - start > size:
            cut = self._cut(sentence, start, start + size)
            if cut is None:
                # there was no such place: look further
                size *= 2
                continue
            yield sentence[start : cut[0]]
            start, size = cut[1], CALL
        yield sentence[start:]

    def _cut(self, sentence, start, end):
        """(end of one part, start of the next), near `end` and before it; None if the ids allow none."""
        for gaps in _GAPS:
            for gap in itertools.islice(reversed([*gaps.finditer(sentence, max(end - 4096, start + 1), end)]), 32):
                # a hundred letters on each side tell what a tokenizer joins
                left, right = sentence[max(gap.start() - 99, start) : gap.start()], sentence[gap.end() : gap.end() + 99]
                whole, ids = self._ids(left + gap[0] + right), self._ids(left)
                # most tokenizers see a blank as part of the word after it; some think of one themselves
                if whole == ids + self._ids(gap[0] + right):
                    return gap.start(), gap.start()
                if whole == ids + self._ids(right):
                    return gap.start(), gap.end()
        return None


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
