"""Cuts documents into sequences, and splits these into training and held-out sequences."""

from dataclasses import dataclass

import numpy as np

from .draws import ORDER, draw, sequence_keys

PAIRS = ("mlm+nsp", "mlm+sop")
OBJECTIVES = ("mlm", *PAIRS, "rtd")


@dataclass(frozen=True)
class SequenceIndex:
    """Where the sequences of a training run are in the shards. A sequence's id is its index in these arrays.

    start: int64 [N], the number of the first token. length: int64 [N], without special tokens. document: int64 [N].
    document_starts: int64 [documents + 1].
    """

    start: np.ndarray
    length: np.ndarray
    document: np.ndarray
    document_starts: np.ndarray


def cut_sequences(shards, max_seq_length, objective="mlm"):
    """Cut documents into sequences of at most max_seq_length tokens, special tokens included.

    A sequence takes as many of its document's next tokens as fit, and never crosses into another document. So only the
    last sequence of a document is shorter. A pair objective leaves out a sequence of one token, which cannot be split.
    Raises ValueError for a max_seq_length below 8.
    """
    if objective not in OBJECTIVES:
        raise ValueError(f"objective is {objective!r}: expected one of {', '.join(OBJECTIVES)}")
    if max_seq_length < 8:
        raise ValueError(f"max_seq_length is {max_seq_length}: expected at least 8")
    pairs = objective in PAIRS
    room = max_seq_length - (3 if pairs else 2)
    starts = shards.document_starts()
    pieces = -(-np.diff(starts) // room)
    document = np.repeat(np.arange(len(pieces)), pieces)
    number = np.arange(len(document)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    start = starts[document] + number * room
    length = np.minimum(room, starts[document + 1] - start)
    kept = length >= (2 if pairs else 1)
    return SequenceIndex(start[kept], length[kept], document[kept], starts)


def held_out_split(shards, share, seed=0, *, max_seq_length, objective="mlm"):
    """Split the sequences by documents: `(train_ids, held_out_ids)`, for MaskedBatches(sequence_ids=...).

    Documents are held out in random order until they have `share` of the tokens. Each side has at least one document.
    Raises ValueError for a share outside (0, 1), or when there is only one document.
    """
    if not 0 < share < 1:
        raise ValueError(f"the held-out share is {share}: expected more than 0 and less than 1")
    index = cut_sequences(shards, max_seq_length, objective)
    tokens = np.bincount(index.document, weights=index.length, minlength=len(index.document_starts) - 1)
    documents = np.flatnonzero(tokens)
    if len(documents) < 2:
        raise ValueError(f"there is only {len(documents)} document: none can be held out")
    order = documents[np.argsort(draw(sequence_keys(seed, 0, documents), ORDER), kind="stable")]
    before = np.cumsum(tokens[order]) - tokens[order]
    count = np.searchsorted(before, share * tokens.sum(), side="left")
    held_out = np.zeros(len(tokens), dtype=bool)
    held_out[order[: min(max(count, 1), len(order) - 1)]] = True
    return np.flatnonzero(~held_out[index.document]), np.flatnonzero(held_out[index.document])
