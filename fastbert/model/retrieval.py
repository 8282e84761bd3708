"""Retrieval models in training: an embedder whose output is the loss of a batch of rows.

A row is a query with its documents, or a pair of texts: the sequences of an example in a packing.Batch, the query
first, then its positive, then its negatives. `targets` say what the loss needs of each sequence; see `LOSSES`.

Letters: B sequences, R rows, N documents, E embedding size.
"""

import dataclasses
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from .. import ops
from ..packing import Batch
from . import hf_files, sentence_files
from .heads import Output
from .losses import Loss, classification
from .sentences import SentenceEmbedder

if TYPE_CHECKING:
    # in the standard library from Python 3.11 on
    from typing_extensions import Self

# the folder of what a loss learns beside the model, which sentence-transformers does not read
LOSS_FOLDER = "loss"


@dataclass(frozen=True)
class Objective:
    """What a retrieval model is trained with.

    loss: one of LOSSES. scale: the inverse temperature of similarities. widths: Matryoshka (Kusupati et al. 2022): the
    sum of the losses of the first so many columns, each normalised again; (): all columns. labels: classes of softmax.
    similarity: of the contrastive losses, cosine or dot. flops: the factor of the regulariser of sparse vectors.
    """

    loss: str
    scale: float = 20.0
    widths: tuple[int, ...] = ()
    labels: int = 0
    similarity: str = "cosine"
    flops: float = 0.0


class TrainedEmbedder(SentenceEmbedder):
    """A SentenceEmbedder whose forward returns Output: logits are the vectors [B, E], and with targets loss "label".

    objective: the Objective. tokens_per_pass: a batch with more tokens is encoded in parts, and each again in the
    backward, with the same dropout: the loss sees the whole batch, and activations of one part are in memory at a time
    (gradient caching, Gao et al. 2021). The files are those of a SentenceEmbedder, and of `loss`.
    """

    tokens_per_pass = 8192

    def __init__(self, config, tokenizer=None, *, objective: Objective, **options) -> None:
        super().__init__(config, tokenizer, **options)
        self.objective = objective
        self.width = next((x.linear.out_features for x in reversed(self.dense) if hasattr(x, "linear")), None)
        self.width = self.width or next(
            (x.linear.out_features for x in reversed(self.token_dense) if hasattr(x, "linear")), config.hidden_size
        )
        if too_wide := [width for width in objective.widths if not 1 <= width <= self.width]:
            raise ValueError(f"--widths has {too_wide[0]}: expected 1 to {self.width}, the size of the model's vectors")

    @classmethod
    def start(cls, directory: str | Path, config, *, objective: Objective, dtype="fp32", **options) -> "Self":
        """The model to train, from a directory or, where there is none, fresh, with the dropouts of `config`.

        options: arguments of SentenceEmbedder that override those of the directory, but for None. Raises ValueError for
        a directory that cannot be trained.
        """
        options = {name: value for name, value in options.items() if value is not None}
        if not Path(directory).is_dir():
            model = cls(config, objective=objective, **options)
        else:
            found, folder, changes, weights = sentence_files.read_directory(Path(directory), False)
            dropouts = {name: getattr(config, name) for name in ("hidden_dropout_prob", "attention_probs_dropout_prob")}
            if not found.get("include_prompt", True):
                raise ValueError(f"{directory} leaves its prompts out of the pooling: it cannot be trained here")
            with warnings.catch_warnings():
                # of the head of another task, and of a pooler that is not used
                warnings.simplefilter("ignore")
                model = hf_files.load_model(
                    lambda config: cls(config, objective=objective, **{**found, **options}), folder,
                    head="SentenceEmbedder", other=weights, config_changes=changes, dtype=dtype, **dropouts,
                )  # fmt: skip
        if objective.loss == "softmax":
            # as sentence-transformers draws it
            model.classifier = nn.Linear(3 * model.width, objective.labels)
        return model

    def forward(self, batch: Batch) -> Output:
        vectors = in_passes(super().forward, batch, self.tokens_per_pass)
        if batch.targets is None:
            return Output(vectors)
        cu = batch.cu_examples.long()
        total = None
        for width in self.objective.widths or (self.width,):
            loss = LOSSES[self.objective.loss](self, vectors[:, :width], batch, cu)
            # the last is the widest
            total = loss if total is None else dataclasses.replace(loss, sum=total.sum + loss.sum)
        return Output(vectors, {"label": total})

    def label_counts(self, batch: Batch) -> dict[str, int]:
        """See `MaskedLM.label_counts`: rows; negatives with margins; and CoSENT has one loss for the whole batch."""
        return {"label": rows_of_loss(self.objective, batch)}

    def save_pretrained(self, directory) -> None:
        """Write what a SentenceEmbedder writes, and what the loss has learned in the folder `loss`."""
        sentence_files.write_directory(self, Path(directory))
        elsewhere = ("dense.", "token_dense.", "classifier.")
        hf_files.save_model(self, directory, elsewhere=elsewhere, head="SentenceEmbedder")
        if hasattr(self, "classifier"):
            (Path(directory) / LOSS_FOLDER).mkdir(exist_ok=True)
            hf_files.save_tensors(self.classifier.state_dict(), Path(directory) / LOSS_FOLDER)

    def stored(self, directory) -> dict[str, torch.Tensor]:
        found = SentenceEmbedder.from_pretrained(directory).state_dict()
        if hasattr(self, "classifier"):
            shapes = {name: tuple(x.shape) for name, x in self.classifier.state_dict().items()}
            tensors = hf_files.read_tensors(Path(directory) / LOSS_FOLDER, shapes, False)
            found |= {f"classifier.{name}": x for name, x in tensors.items()}
        return found


def rows_of_loss(objective: Objective, batch: Batch) -> int:
    """How many losses are added in the loss of a batch."""
    rows = len(batch.cu_examples) - 1
    return {"margin": len(batch.cu_seqlens) - 1 - 2 * rows, "cosent": 1}.get(objective.loss, rows)


def in_passes(encode: Callable, batch: Batch, tokens: int) -> torch.Tensor:
    """encode(batch), [B, ...]; with gradients in parts of at most `tokens` tokens, that run again in the backward."""
    if not torch.is_grad_enabled() or len(batch.input_ids) <= tokens:
        return encode(batch)
    return torch.cat([checkpoint(encode, part, use_reentrant=False) for part in in_parts(batch, tokens)])


def in_parts(batch: Batch, tokens: int):
    """Batches of neighbouring sequences of `batch`, of at most `tokens` tokens or one sequence, each with its seed."""
    cu, first = batch.cu_seqlens.tolist(), 0
    while first < len(cu) - 1:
        end = first + 1
        while end < len(cu) - 1 and cu[end + 1] - cu[first] <= tokens:
            end += 1
        rows = slice(cu[first], cu[end])
        lengths = [cu[i + 1] - cu[i] for i in range(first, end)]
        yield Batch(
            batch.input_ids[rows], batch.position_ids[rows], batch.token_type_ids[rows],
            batch.cu_seqlens[first : end + 1] - cu[first], max(lengths),
            seed=None if batch.seed is None else batch.seed + first,
        )  # fmt: skip
        first = end


# -------------------------------------------------------------------------------------------------------------- losses


def _contrastive(model, vectors, batch, cu, symmetric=False):
    """Cross-entropy of each query's positive among all documents of the batch, its own and others' negatives included.

    targets: int64 [B], equal for equal texts. A document that is a positive of the same query elsewhere in the batch,
    or has the same text as one, is no negative.
    """
    vectors = vectors.float()
    if model.objective.similarity == "cosine":
        vectors = F.normalize(vectors, dim=-1)
    place = torch.arange(len(vectors), device=cu.device)
    is_negative = torch.ones_like(place, dtype=torch.bool)
    is_negative[cu[:-1]] = is_negative[cu[:-1] + 1] = False
    order = torch.cat((cu[:-1] + 1, place[is_negative]))
    excluded = false_negatives(batch.targets[cu[:-1]].tolist(), batch.targets[order].tolist())
    if excluded is not None:
        excluded = excluded.to(cu.device)
    return Loss(*ops.contrastive_cross_entropy(
        vectors[cu[:-1]], vectors[order], scale=model.objective.scale, symmetric=symmetric, excluded=excluded
    ))  # fmt: skip


def false_negatives(queries: list[int], documents: list[int]) -> torch.Tensor | None:
    """int64 [P, 2]: the pairs (query, document) of R queries and N >= R documents that are right and not (i, i).

    queries, documents: a number for each, equal for equal texts; document i is that of query i. None for no pair.
    """
    rows_of, places_of, pairs = {}, {}, []
    for i, query in enumerate(queries):
        rows_of.setdefault(query, []).append(i)
    for j, document in enumerate(documents):
        places_of.setdefault(document, []).append(j)
    for rows in rows_of.values():
        right = dict.fromkeys(documents[i] for i in rows)
        places = [j for document in right for j in places_of[document]]
        pairs += [(i, j) for i in rows for j in places if i != j]
    return torch.tensor(pairs) if pairs else None


def _symmetric(model, vectors, batch, cu):
    return _contrastive(model, vectors, batch, cu, symmetric=True)


def _cosines(vectors, cu):
    return F.cosine_similarity(vectors[cu[:-1]].float(), vectors[cu[:-1] + 1].float(), dim=-1)


def _cosine(model, vectors, batch, cu):
    """Squared error of the cosine of each pair. targets: float [B]."""
    losses = (_cosines(vectors, cu) - batch.targets[cu[:-1]]) ** 2
    return Loss(losses.sum(), torch.tensor(len(losses)))


def _cosent(model, vectors, batch, cu):
    """log(1 + sum of exp(scale (cos b - cos a))) over the pairs a of rows with a higher target than b (Su 2022)."""
    cosines, targets = model.objective.scale * _cosines(vectors, cu), batch.targets[cu[:-1]]
    differences = cosines[:, None] - cosines
    differences = differences.masked_fill(targets[:, None] >= targets, float("-inf"))
    return Loss(torch.logsumexp(F.pad(differences.flatten(), (1, 0)), 0), torch.tensor(1))


def _softmax(model, vectors, batch, cu):
    """Cross-entropy of a linear layer on (u, v, |u - v|) (Reimers & Gurevych 2019). targets: int64 [B]."""
    u, v = vectors[cu[:-1]], vectors[cu[:-1] + 1]
    logits = ops.linear(torch.cat((u, v, (u - v).abs()), -1), model.classifier.weight, model.classifier.bias)
    return classification(logits, batch.targets[cu[:-1]])


def _margin(model, vectors, batch, cu):
    """Squared error of how much more than each negative the positive scores, by dot product (Hofstaetter et al. 2020).

    targets: float [B], the teacher's score of each document.
    """
    vectors = vectors.float()
    row = torch.repeat_interleave(torch.arange(len(cu) - 1, device=cu.device), cu.diff(), output_size=len(vectors))
    scores = (vectors * vectors[cu[:-1]][row]).sum(-1)
    margins, wanted = (x[cu[:-1] + 1][row] - x for x in (scores, batch.targets))
    is_negative = torch.ones_like(row, dtype=torch.bool)
    is_negative[cu[:-1]] = is_negative[cu[:-1] + 1] = False
    losses = ((margins - wanted) ** 2).where(is_negative, 0.0)
    return Loss(losses.sum(), is_negative.sum())


LOSSES = {
    "contrastive": _contrastive, "symmetric": _symmetric, "margin": _margin, "cosent": _cosent, "cosine": _cosine,
    "softmax": _softmax,
}  # fmt: skip
