"""Exact search: the best documents of each query, blockwise, never with all scores in memory.

Letters: Q queries, N documents, n of them in a block, E embedding size, k.
"""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from .. import files
from .embedding import restored

# rows of scores that are in memory at once, and documents
QUERIES, DOCUMENTS = 256, 4096
_LOW = 0x7FFFFFFF


def _dot(queries, documents):
    return queries @ documents.T


# as sentence-transformers has them: the higher, the nearer. A vector of zeros has a cosine of 0
SIMILARITIES: dict[str, Callable] = {
    "cosine": lambda queries, documents: _dot(F.normalize(queries, dim=-1), F.normalize(documents, dim=-1)),
    "dot": _dot,
    "euclidean": lambda queries, documents: -torch.cdist(queries, documents),
    "manhattan": lambda queries, documents: -torch.cdist(queries, documents, p=1.0),
}


class Best:
    """The k best documents of each query among those added so far, by score and then by rank.

    queries: float32 [Q, E]. similarity: one of SIMILARITIES. Of equal scores, which are float32, the document of the
    higher rank comes first.
    """

    def __init__(self, queries: torch.Tensor, k: int, similarity: str = "cosine") -> None:
        self.queries, self.k, self.count = queries.float(), k, 0
        self.similarity = SIMILARITIES[similarity]
        self.keys = torch.empty(len(queries), 0, dtype=torch.int64, device=queries.device)

    def add(self, documents: torch.Tensor, ranks: torch.Tensor) -> None:
        """documents: float32 [n, E]. ranks: int64 [n], each once, 0 to 2**32 - 1. Raises ValueError."""
        if documents.shape[1:] != self.queries.shape[1:]:
            raise ValueError(
                f"the documents' vectors have {documents.shape[1]} numbers, the queries' {self.queries.shape[1]}: "
                "expected those of one model"
            )
        self.count += len(documents)
        k, found = min(self.k, self.count), []
        for start in range(0, len(self.queries), QUERIES):
            keys = [self.keys[start : start + QUERIES]]
            for first in range(0, len(documents), DOCUMENTS):
                block = documents[first : first + DOCUMENTS].to(self.queries)
                scores = self.similarity(self.queries[start : start + QUERIES], block)
                if not scores.isfinite().all():
                    query, document = (~scores.isfinite()).nonzero()[0].tolist()
                    raise ValueError(
                        f"the score of query {start + query + 1} and document "
                        f"{self.count - len(documents) + first + document + 1} is not finite"
                    )
                keys.append(_keys(scores, ranks[first : first + DOCUMENTS].to(scores.device)))
                whole = torch.cat(keys, 1)
                keys = [whole.topk(min(k, whole.shape[1]), dim=1).values]
            found.append(keys[0])
        self.keys = torch.cat(found) if found else self.keys

    def found(self) -> tuple[np.ndarray, np.ndarray]:
        """(scores float32, ranks int64), both [Q, min(k, N)], the best first."""
        ordered = (self.keys >> 32).to(torch.int32)
        scores = (ordered ^ ((ordered >> 31) & _LOW)).view(torch.float32)
        return scores.cpu().numpy(), (self.keys & 0xFFFFFFFF).cpu().numpy()


def _keys(scores, ranks):
    """int64 of the same order as (score, rank): no two are equal, so that there is no tie for topk to break."""
    # 0.0 and -0.0 are equal
    bits = (scores + 0.0).view(torch.int32)
    return ((bits ^ ((bits >> 31) & _LOW)).long() << 32) | ranks


def search(
    queries: np.ndarray | torch.Tensor, documents: np.ndarray | torch.Tensor | str | os.PathLike, k: int = 10,
    similarity: str = "cosine",
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """(scores float32, rows int64), both [Q, min(k, N)]: the k best documents of each query, the best first.

    queries: [Q, E]. documents: [N, E], or a directory of `fastbert embed`, which is read part by part; its int8 vectors
    are restored, its bits are 1 and -1. similarity: "cosine", "dot", "euclidean" or "manhattan", the last two as
    negative distances. Of equal scores, the earlier row comes first. Raises ValueError for vectors of another width, a
    score that is not finite, and what is no directory of vectors.
    """
    if similarity not in SIMILARITIES:
        raise ValueError(f"similarity is {similarity!r}: expected one of {', '.join(SIMILARITIES)}")
    if k < 1:
        raise ValueError(f"k is {k}: expected at least 1")
    queries = torch.as_tensor(queries)
    if queries.dim() != 2:
        raise ValueError(f"queries has {queries.dim()} dimensions: expected 2, [queries, numbers]")
    best, last = Best(queries, k, similarity), 2**32 - 1
    blocks = vectors(documents) if isinstance(documents, str | os.PathLike) else [documents]
    for block in blocks:
        block = torch.as_tensor(block)
        rows = torch.arange(best.count, best.count + len(block))
        best.add(block, last - rows)
    scores, ranks = best.found()
    return scores, last - ranks


def vectors(directory: str | os.PathLike) -> Iterator[np.ndarray]:
    """Yields the vectors of a directory of `fastbert embed`, part by part: float32 [n, E].

    Raises ValueError for a directory without them, or with a part that is missing or broken.
    """
    directory = Path(directory)
    is_parquet = (directory / "_manifest.json").is_file()
    path = directory / ("_manifest.json" if is_parquet else "manifest.json")
    if not path.is_file():
        raise ValueError(f"{directory} has no manifest.json: expected a directory of fastbert embed")
    manifest, count = files.read_json(path), 0
    ranges = path.with_name(path.name.replace("manifest.json", "ranges.npy"))
    ranges = np.load(ranges) if ranges.is_file() else None
    for part in sorted(directory.glob("part-*.parquet" if is_parquet else "part-*.npy")):
        try:
            found = _of_parquet(part) if is_parquet else np.load(part)
        except (ValueError, OSError, EOFError) as error:
            raise ValueError(f"{part} cannot be read: {error}") from None
        count += len(found)
        yield restored(found, ranges, manifest["width"])
    if count != manifest["count"]:
        raise ValueError(f"{directory} has {count:,} vectors, its manifest says {manifest['count']:,}")


def _of_parquet(path):
    import pyarrow.parquet as pq

    column = pq.read_table(path, columns=["vector"])["vector"].combine_chunks()
    return column.flatten().to_numpy().reshape(len(column), -1)
