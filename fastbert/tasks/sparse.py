"""Weights of words for each text, which an inverted index can search (SPLADE)."""

import numpy as np

from ..model.retrieval import Objective
from ..model.sparse import TrainedSparseEncoder
from . import embed, retrieval_files

TOGETHER = True
SCORES = {"mrr@10": 1, "recall@1": 1, "recall@10": 1, "words": -1}
LOSSES = {"contrastive": ("pairs",), "symmetric": ("pairs",), "margin": ("pairs",)}
# texts whose weights of all words are in memory at once
CHUNK = 64


def head(spec):
    settings = spec.settings
    objective = Objective(
        settings["loss"], settings.get("scale", 1.0), similarity="dot", flops=settings.get("flops_weight", 3e-5)
    )
    return TrainedSparseEncoder, dict(
        objective=objective, prompts=settings.get("prompts"), max_length=spec.max_length
    )  # fmt: skip


def main_score(spec):
    return "mrr@10"


def read(path, spec, notes, *, wants_gold=True):
    """Yields Examples with texts (query, document, ...); see retrieval_files.py."""
    for example in retrieval_files.read(path, spec, notes, LOSSES, wants_gold):
        if example.more["kind"] != "pairs":
            raise ValueError(
                f"{path} has {retrieval_files.WORDS[example.more['kind']]}: expected queries with documents"
            )
        yield example


encode = embed.encode


def decode(example, windows, logits, spec):
    """{"score"}: the dot product of the first two texts' weights; "words": how many words the first document has."""
    from scipy import sparse

    weights = sparse.csr_array(np.stack(logits).astype(np.float32))
    score = float((weights[[0]] @ weights[[1]].T).toarray()[0, 0])
    return {"score": score, "_vectors": weights, "_words": int(weights[[1]].nnz), "_error": 0.0}


def score(examples, predictions, spec, *, tune=False):
    """As of embed; words: how many weights of a document are not 0, on average."""
    found = embed.score(examples, predictions, spec)
    return found | {"words": float(np.mean([prediction["_words"] for prediction in predictions]))}
