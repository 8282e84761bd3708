"""Picks tokens for prediction and masks them."""

import numpy as np

from .draws import COUNT, FATE, PICK, WORD, draw, uniform

# a pick draws from [0, 1): below the first number it becomes [MASK], below the second a random token, else it stays
BERT_FATES, ELECTRA_FATES = (0.8, 0.9), (0.85, 0.85)
IGNORED = -100


def mask_tokens(input_ids, cu_seqlens, keys, *, special, words, probability=0.15, starts=None, fates=BERT_FATES):
    """Pick tokens to predict in each packed sequence, and mask most of them (Devlin et al. 2019, 3.1).

    input_ids: int64 [T]. cu_seqlens: [B + 1]. keys: uint64 [B] from `sequence_keys`. special: SpecialIds; special
    tokens are never picked. words: int64, the other ids of the vocabulary, ascending. starts: bool by id, whether a
    piece begins a word, for whole-word masking; None: tokens are picked one by one. All are numpy arrays.

    Of the n candidates (tokens or words) of a sequence exactly floor(n * probability + u) are picked, u uniform in
    [0, 1). So the expectation is exact and the variance minimal. fates: the share of the picks that become [MASK], and
    that share plus the share of random tokens. By default 80 % become [MASK], 10 % a random token that is not special,
    drawn for each token of a word, and 10 % stay.

    Returns `(masked_ids, labels)`, int64 [T]; labels are -100 where nothing was picked.
    """
    masked, labels = input_ids.copy(), np.full_like(input_ids, IGNORED)
    lengths = np.diff(cu_seqlens)
    sequence = np.repeat(np.arange(len(lengths)), lengths)
    position = np.arange(len(input_ids)) - np.repeat(cu_seqlens[:-1], lengths)

    rows = np.flatnonzero(~np.isin(input_ids, special))
    if starts is None:
        first, candidate = rows, np.arange(len(rows))
    else:
        # a continuation piece without the beginning of its word counts as a word
        begins = starts[input_ids[rows]] | (np.diff(rows, prepend=-2) > 1) | (position[rows] == 0)
        first, candidate = rows[begins], np.cumsum(begins) - 1

    owner = sequence[first]
    counts = np.bincount(owner, minlength=len(lengths))
    wanted = np.floor(counts * probability + uniform(draw(keys, COUNT))).astype(np.int64)
    draws = draw(keys[owner], PICK, position[first])
    # the candidates of each sequence, sorted by their draws; the stable sort keeps equal draws in order
    order = np.argsort((owner.astype(np.uint64) << np.uint64(40)) | (draws >> np.uint64(24)), kind="stable")
    rank = np.arange(len(order)) - np.repeat(np.cumsum(counts) - counts, counts)
    picked = np.zeros(len(first), dtype=bool)
    picked[order[rank < np.repeat(wanted, counts)]] = True

    fate = np.ones(len(first))
    fate[picked] = uniform(draw(keys[owner[picked]], FATE, position[first[picked]]))
    rows, fate = rows[picked[candidate]], fate[candidate[picked[candidate]]]
    labels[rows] = input_ids[rows]
    masked[rows[fate < fates[0]]] = special.mask
    changed = rows[(fate >= fates[0]) & (fate < fates[1])]
    chosen = uniform(draw(keys[sequence[changed]], WORD, position[changed])) * len(words)
    masked[changed] = words[chosen.astype(np.int64)]
    return masked, labels
