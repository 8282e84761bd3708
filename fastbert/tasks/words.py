"""Words that a tokenizer has seen before: in a large file nearly all of them."""

import itertools
import threading
from dataclasses import dataclass

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

# words that are kept, and the letters of the longest
LIMIT, LONGEST = 1 << 18, 32


@dataclass(slots=True)
class Tokens:
    """What of a tokenizers.Encoding a Window needs."""

    ids: list[int]
    type_ids: list[int]

    def __len__(self):
        return len(self.ids)


class Words:
    """Texts to token ids by a tokenizer of BERT's kind, each word once. Safe to call from many threads.

    BERT's normalizer, its pre-tokenizer and WordPiece never look across a blank: the ids of a text are those of what
    stands between its blanks, one after another.
    """

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer, self.known, self.lock = tokenizer, {}, threading.Lock()
        self.frames = {count: frame(tokenizer, count) for count in (1, 2)}

    @staticmethod
    def fits(tokenizer: Tokenizer) -> bool:
        """Whether the ids of this tokenizer's texts are those of their words."""
        kinds = normalizers.BertNormalizer, pre_tokenizers.BertPreTokenizer, models.WordPiece
        parts = tokenizer.normalizer, tokenizer.pre_tokenizer, tokenizer.model
        # special tokens in a text are text; others that were added may have a blank inside, or end within a word
        added = tokenizer.get_added_tokens_decoder().values()
        if not all(map(isinstance, parts, kinds)) or not all(token.special for token in added):
            return False
        sides = [{side for side, *_ in frame(tokenizer, count)} - {None} for count in (1, 2)]
        return sides == [{0}, {0, 1}]

    def encoded(self, texts: list[tuple[str, ...]]) -> list[Tokens]:
        """Each text or pair with its special tokens."""
        ids = iter(self._ids([text for one in texts for text in one]))
        found = []
        for one in texts:
            sides = [next(ids) for _ in one]
            tokens = Tokens([], [])
            for side, special, kind in self.frames[len(one)]:
                part = special if side is None else sides[side]
                tokens.ids.extend(part)
                tokens.type_ids.extend([kind] * len(part))
            found.append(tokens)
        return found

    def _ids(self, texts):
        split = [text.split(" ") for text in texts]
        with self.lock:
            if len(self.known) > LIMIT:
                self.known.clear()
            words = itertools.chain.from_iterable(split)
            new = [*set(itertools.filterfalse(self.known.__contains__, words))]
            encodings = self.tokenizer.encode_batch_fast(new, add_special_tokens=False)
            self.known.update((word, one.ids) for word, one in zip(new, encodings, strict=True))
            found = [list(itertools.chain.from_iterable(map(self.known.__getitem__, words))) for words in split]
            # a text without blanks is no word that comes again
            for word in new:
                if len(word) > LONGEST:
                    del self.known[word]
        return found


def frame(tokenizer, count):
    """What comes in a row for one text or a pair: (which text, or None; the id of a special token; its type)."""
    whole = tokenizer.encode(*["a"] * count)
    parts = zip(whole.sequence_ids, whole.ids, whole.type_ids, strict=True)
    found = [(side, [number] if side is None else None, kind) for side, number, kind in parts]
    # "a" may be several tokens
    return [part for i, part in enumerate(found) if part[0] is None or i == 0 or found[i - 1] != part]
