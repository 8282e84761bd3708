"""Random numbers for the data: each is a hash of (seed, epoch, sequence id, position, purpose).

So a draw depends on nothing else, and an epoch can start in its middle.
"""

import numpy as np

# the purposes of draws; a token's draws have the counters 8 * position + purpose
ORDER, COUNT, PICK, FATE, WORD, CUT, PAIR, PARTNER = range(8)
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def _mix(x):
    """The output function of SplitMix64 (Steele, Lea and Flood, 2014) for a uint64 array; overflow is intended."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def sequence_keys(seed, epoch, ids):
    """uint64 [B]: the random keys of the sequences `ids` in an epoch."""
    key = np.array([seed % (1 << 64)], dtype=np.uint64)
    for number in (epoch, ids):
        key = _mix(key + _GOLDEN * (np.atleast_1d(np.asarray(number)).astype(np.uint64) + np.uint64(1)))
    return key


def draw(keys, purpose, position=0):
    """uint64, of the shape of keys: draw number (position, purpose) of each key."""
    counter = 8 * np.atleast_1d(np.asarray(position)).astype(np.uint64) + np.uint64(purpose + 1)
    return _mix(keys + _GOLDEN * counter)


def uniform(draws):
    """Draws as float64 in [0, 1)."""
    return (draws >> np.uint64(11)) * 2.0**-53
