"""One vector for each text, near those of the texts that belong to it: search, similarity, duplicates."""

import math

import numpy as np

from ..model.retrieval import Objective, TrainedEmbedder
from . import retrieval_files
from .examples import Window
from .retrieval_files import MEANINGS, key

# a loss compares the rows of a batch, which is never computed in parts
TOGETHER = True
SCORES = {"mrr@10": 1, "recall@1": 1, "recall@10": 1, "spearman": 1, "pearson": 1}
# what each loss learns from; the first of a kind is its default
LOSSES = {
    "contrastive": ("pairs",), "symmetric": ("pairs",), "margin": ("pairs",), "cosent": ("scored",),
    "cosine": ("scored",), "softmax": ("labelled",),
}  # fmt: skip
# rows of scores in memory at once
BLOCK = 1024


def head(spec):
    settings = spec.settings
    if settings["loss"] == "softmax" and len(spec.labels) < 2:
        raise ValueError(f"the training file has {len(spec.labels)} label: --loss softmax needs at least two")
    if settings.get("widths") and settings["loss"] == "softmax":
        raise ValueError("--widths does not go with --loss softmax, whose classifier knows one width")
    objective = Objective(
        settings["loss"], settings.get("scale", 20.0), tuple(settings.get("widths", ())), len(spec.labels)
    )
    return TrainedEmbedder, dict(
        objective=objective, max_length=spec.max_length, pooling=settings.get("pooling"),
        prompts=settings.get("prompts"), similarity_fn_name=similarity(spec),
    )  # fmt: skip


def similarity(spec):
    return "dot" if spec.settings["loss"] == "margin" else "cosine"


def main_score(spec):
    """Of queries with documents, the rank; of pairs, the correlation."""
    return "mrr@10" if spec.settings["measured"] == "pairs" else "spearman"


def read(path, spec, notes, *, wants_gold=True):
    """Yields Examples with texts (query, document, ...); see retrieval_files.py."""
    limits = spec.settings.get("score_range")
    for example in retrieval_files.read(path, spec, notes, LOSSES, wants_gold):
        if spec.settings["loss"] == "cosine" and spec.labels is None and wants_gold:
            low, high = limits or (-1.0, 1.0)
            if not low <= example.gold <= high:
                more = "" if limits else " for --loss cosine; name another with --score-range"
                notes.bad(example.number, f"the score is {example.gold:g}: expected {low:g} to {high:g}{more}")
                continue
            # to 0 .. 1, as cosines of texts are trained
            example.gold = (example.gold - low) / (high - low) if limits else example.gold
        yield example


def encode(examples, pieces, spec):
    """For each example a Window a text, with what its loss needs to know of it as label: see model/retrieval.py."""
    prompts = spec.settings.get("prompts") or {}
    query, document = prompts.get("query", ""), prompts.get("document", "")
    # two texts of a kind are two queries to a model with a prompt for documents, and plain to others
    pair = (query, query) if document else ("", "")
    flat = []
    for example in examples:
        first, other = (query, document) if _kind(example, spec) == "pairs" else pair
        flat += [first + example.texts[0], *(other + text for text in example.texts[1:])]
    encodings = iter(pieces.whole([(text,) for text in flat]))
    found = []
    for example in examples:
        windows = [next(encodings)[0] for _ in example.texts]
        labels = _labels(example, spec)
        found.append([Window(one.ids, one.type_ids, label) for one, label in zip(windows, labels, strict=True)])
    return found


def _kind(example, spec):
    """Of its file; for two texts without one, that of the training file."""
    return example.more.get("kind", LOSSES[spec.settings["loss"]][0])


def _labels(example, spec):
    loss, gold, several = spec.settings["loss"], example.gold, len(example.texts)
    if loss == "margin" and isinstance(gold, list):
        return [0.0, *gold]
    if loss in ("contrastive", "symmetric"):
        return [key(text) for text in example.texts]
    if gold is None:
        return [None] * several
    return [(spec.index.get(gold, -100) if isinstance(gold, str) else gold)] * several


def decode(example, windows, logits, spec):
    """{"score"}: the similarity of the first two texts."""
    vectors = np.stack(logits).astype(np.float32)
    if similarity(spec) == "cosine":
        vectors /= np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12)
    return {"score": float(vectors[0] @ vectors[1]), "_vectors": vectors, "_error": 0.0}


def score(examples, predictions, spec, *, tune=False):
    """For queries with documents: the share of rows whose document is the first, or among ten (recall), and the mean of
    1 / rank, 0 beyond 10. A row's document competes with all other documents of these examples, but for those that
    belong to the same query, too; of equal scores it comes last. For pairs: both correlations, None where undefined.
    """
    ranked = [i for i, example in enumerate(examples) if example.more["kind"] == "pairs"]
    found = {}
    if ranked:
        if any("_rank" not in predictions[i] for i in ranked):
            _rank([examples[i] for i in ranked], [predictions[i] for i in ranked])
        ranks = np.array([predictions[i]["_rank"] for i in ranked])
        found = {
            "mrr@10": float(np.where(ranks <= 10, 1 / ranks, 0.0).mean()), "recall@1": float((ranks == 1).mean()),
            "recall@10": float((ranks <= 10).mean()), "documents": predictions[ranked[0]]["_documents"],
        }  # fmt: skip
    others = [i for i, example in enumerate(examples) if example.more["kind"] != "pairs"]
    if others:
        from scipy import stats

        gold = np.array([_meaning(examples[i].gold) for i in others])
        values = np.array([predictions[i]["score"] for i in others])
        varies = len(gold) > 1 and bool(np.ptp(gold) > 0 and np.ptp(values) > 0)
        found["spearman"] = float(stats.spearmanr(gold, values).statistic) if varies else None
        found["pearson"] = float(stats.pearsonr(gold, values).statistic) if varies else None
    return found


def _meaning(gold):
    """The similarity that a score or the name of a label stands for."""
    if not isinstance(gold, str):
        return gold
    if gold.casefold() not in MEANINGS:
        raise ValueError(
            f"the label {gold!r} has no order that a similarity could have: expected entailment, neutral and "
            "contradiction, or 0 and 1; evaluate on other files with --eval-file, or not at all with --eval-share 0"
        )
    return MEANINGS[gold.casefold()]


def _stacked(rows):
    """Rows [1, E] one below the other: arrays of NumPy, or sparse ones."""
    if isinstance(rows[0], np.ndarray):
        return np.concatenate(rows)
    from scipy import sparse

    return sparse.vstack(rows, "csr")


def _rank(examples, predictions):
    """Set "_rank" of each prediction, from 1, and what errors.md shows."""
    place, vectors, positives = {}, [], {}
    for example, prediction in zip(examples, predictions, strict=True):
        for i, text in enumerate(example.texts[1:], 1):
            if text not in place:
                place[text] = len(vectors)
                vectors.append(prediction["_vectors"][[i]])
        positives.setdefault(example.texts[0], {})[place[example.texts[1]]] = None
    documents = _stacked(vectors)
    names = [*place]
    for start in range(0, len(examples), BLOCK):
        block = slice(start, start + BLOCK)
        scores = _stacked([one["_vectors"][[0]] for one in predictions[block]]) @ documents.T
        # of sparse vectors it is sparse, too
        scores = scores if isinstance(scores, np.ndarray) else scores.toarray()
        # the same numbers for the same vectors, whatever a product's blocks do
        for example, prediction, row in zip(examples[block], predictions[block], scores, strict=True):
            own = place[example.texts[1]]
            value = row[own]
            row[[*positives[example.texts[0]]]] = -math.inf
            best = int(row.argmax())
            # NaN is last
            rank = min(1 + int((~(row < value)).sum()), len(row))
            prediction |= {
                "rank": rank, "_rank": rank, "_documents": len(names), "_error": 1 - 1 / rank,
                "_gold": example.texts[1], "_answer": names[best] if rank > 1 else example.texts[1],
                "_text": example.texts[0],
            }  # fmt: skip
