"""Examples of a task to packed batches, and the share of them that is held out."""

import hashlib
import math

import numpy as np

from ..data.draws import ORDER, draw, sequence_keys
from ..tasks.examples import batch_of, parts_by_size, without_collection


class ExampleBatches:
    """Batches of batch_size examples in random order, packed. A large one comes in parts, as a list of Batches.

    windows: the Windows of the examples. tokens_per_batch: tokens of a part, which has at least one example.
    class_weights, token_types: see `batch_of`. rank, world_size: each rank gets its own batches, all the same number.
    """

    def __init__(
        self, windows, *, batch_size, tokens_per_batch, seed=0, class_weights=None, token_types=2, rank=0, world_size=1
    ):  # fmt: skip
        self.windows, self.batch_size, self.tokens_per_batch = windows, batch_size, tokens_per_batch
        self.seed, self.class_weights, self.token_types = seed, class_weights, token_types
        self.rank, self.world_size = rank, world_size
        self.ids = np.flatnonzero(windows.sizes)
        if not len(self.ids):
            raise ValueError(f"none of the {len(windows):,} examples to train on has something to learn")
        if not self.num_batches(0):
            raise ValueError(
                f"{len(self.ids)} examples fill {-(-len(self.ids) // batch_size)} batches of {batch_size}: "
                f"expected one for each of {world_size} processes"
            )

    def num_batches(self, epoch):
        """The number of batches of `epoch(epoch)`."""
        return -(-len(self.ids) // self.batch_size) // self.world_size

    def epoch(self, epoch, start=0):
        """This rank's batches of an epoch, a list of Batches each, from batch `start` on."""
        order = self.ids[np.argsort(draw(sequence_keys(self.seed, epoch, self.ids), ORDER), kind="stable")]
        for number in range(start, self.num_batches(epoch)):
            first = (number * self.world_size + self.rank) * self.batch_size
            chosen = order[first : first + self.batch_size].tolist()
            yield [
                batch_of([self.windows[i] for i in part], self.class_weights, token_types=self.token_types)
                for part in parts_by_size(self.windows.sizes, self.tokens_per_batch, chosen)
            ]


def class_weights(text, spec, windows):
    """float [K], the weight of each label in the loss; None without --class-weights.

    text: that of the option. windows: those of the training examples, which "balanced" counts.
    """
    if text is None:
        return None
    first = next(window for one in windows for window in one)
    if first.labels is None and not isinstance(first.label, int) or not spec.labels:
        raise ValueError(f"--class-weights goes with classify and tag: the task is {spec.task}")
    if text == "balanced":
        counts = np.zeros(len(spec.labels))
        for one in windows:
            # the windows of a long text are one example
            for window in one[:1] if first.labels is None else one:
                labels = np.atleast_1d(window.label if window.labels is None else window.labels)
                counts += np.bincount(labels[labels >= 0], minlength=len(counts))
        present = counts > 0
        # n / (k n_c), and 0 for a label without examples
        return np.where(present, counts.sum() / (present.sum() * np.maximum(counts, 1)), 0.0)
    weights = np.ones(len(spec.labels))
    for part in text.split(","):
        name, _, value = part.rpartition("=")
        try:
            number = float(value)
        except ValueError:
            number = math.nan
        if name.strip() not in spec.index or not 0 <= number < math.inf:
            raise ValueError(
                f"--class-weights has {part!r}: expected balanced, or NAME=NUMBER with commas between, for labels of "
                f"the training file: {', '.join(map(repr, spec.labels[:8]))}"
            )
        weights[spec.index[name.strip()]] = number
    return weights


# ---------------------------------------------------------------------------------------------------------------------


@without_collection()
def held_out(examples, share, seed):
    """(examples to train on, held-out examples, labels that are too rare to be on both sides).

    Equal texts, but for case and blanks, stay on one side, and so does each group. About `share` of each label's
    examples is held out, at least one. The choice depends on the seed and the texts, not on the order of the rows.
    """
    texts = [normalised(example.texts) for example in examples]
    blocks = _blocks(examples, texts)
    strata = [_strata(example) for example in examples]
    keys = [min([_key(seed, texts[i]) for i in block]) for block in blocks]
    total, blocks_with = {}, {}
    for number, block in enumerate(blocks):
        for i in block:
            for name in strata[i]:
                total[name] = total.get(name, 0) + 1
                numbers = blocks_with.setdefault(name, [])
                if not numbers or numbers[-1] != number:
                    numbers.append(number)
    left, taken = dict(total), {}
    # the rarest first: the others have more choice
    for name in sorted(total, key=lambda name: (total[name], name)):
        wanted = max(1, round(share * total[name]))
        found = sorted(blocks_with[name], key=keys.__getitem__)
        for number in found:
            if total[name] - left[name] >= wanted:
                break
            counts = {}
            for i in blocks[number]:
                for one in strata[i]:
                    counts[one] = counts.get(one, 0) + 1
            # each label keeps an example to train on, and no large block is held out for the sake of one example
            room = wanted - (total[name] - left[name])
            too_large = counts[name] > max(room, 1) and number != found[-1]
            if number not in taken and not too_large and all(left[one] > count for one, count in counts.items()):
                taken[number] = None
                for one, count in counts.items():
                    left[one] -= count
    chosen = {i for number in taken for i in blocks[number]}
    rare = [name for name in total if name and left[name] == total[name]]
    sides = ([e for i, e in enumerate(examples) if (i in chosen) == held] for held in (False, True))
    return *sides, sorted(rare)


def normalised(texts):
    """Texts that a model cannot tell apart, or hardly, have the same."""
    return tuple(" ".join(text.casefold().split()) for text in texts)


def _strata(example):
    """What should be on both sides: the example's labels."""
    gold = example.gold
    if isinstance(gold, str):
        return [gold]
    if isinstance(gold, tuple | list) and all(isinstance(one, str) for one in gold):
        return sorted(set(gold)) or [""]
    return [""]


def _blocks(examples, texts):
    """Lists of indices of examples that must stay together, each ascending. texts: theirs, normalised."""
    if all(example.group is None for example in examples):
        blocks = {}
        for i, text in enumerate(texts):
            blocks.setdefault(text, []).append(i)
        return [*blocks.values()]
    owner = list(range(len(examples)))

    def root(i):
        while owner[i] != i:
            owner[i] = owner[owner[i]]
            i = owner[i]
        return i

    seen = {}
    for i, example in enumerate(examples):
        keys = [("text", texts[i])]
        if example.group is not None:
            keys.append(("group", example.group))
        for key in keys:
            a, b = root(seen.setdefault(key, i)), root(i)
            owner[max(a, b)] = min(a, b)
    blocks = {}
    for i in range(len(examples)):
        blocks.setdefault(root(i), []).append(i)
    return [*blocks.values()]


def _key(seed, texts):
    text = f"{seed}\0" + "\0".join(texts)
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
