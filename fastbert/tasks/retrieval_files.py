"""The files that retrieval models learn from: queries with documents, pairs with a score, pairs with a label.

    pairs      query and positive, with any number of negatives, and for distillation a teacher's scores
    scored     two texts and how similar they are (STS)
    labelled   two texts and a label (NLI, duplicate questions)

BGE's .jsonl are pairs: "query", a list "pos" and a list "neg", "pos_scores" and "neg_scores".
"""

import hashlib
import re
from typing import NamedTuple

from ..data import tables
from . import texts
from .examples import Example
from .regress import number

QUERIES = ("query", "anchor", "question")
POSITIVES = ("positive", "pos", "document", "passage", "answer")
_NEGATIVE = re.compile(r"(hard_)?neg(ative)?s?(_?\d+)?")
# by sentence-transformers' names; a margin is the teacher's score of the positive minus that of the negative
SCORES, LABELS, TEACHERS = ("score", "similarity_score", "similarity"), ("label", "gold_label"), ("margin", "margins")
# what pairs of texts mean for their similarity, by the names that files of NLI have
MEANINGS = {"contradiction": 0.0, "neutral": 0.5, "entailment": 1.0, "0": 0.0, "1": 1.0}
# the texts put before a query and before a document: E5 (Wang et al. 2022), BGE (Xiao et al. 2023), Nomic
PROMPTS = {
    "e5": {"query": "query: ", "document": "passage: "},
    "bge": {"query": "Represent this sentence for searching relevant passages: ", "document": ""},
    "nomic": {"query": "search_query: ", "document": "search_document: "},
    "none": {"query": "", "document": ""},
}
# labels of rows that people did not agree on
_UNLABELLED = ("-", "-1")


class Layout(NamedTuple):
    """How a file is read. kind: see above. texts: both columns. negatives: theirs. label: the score's, or None."""

    kind: str
    texts: tuple[str, str]
    negatives: tuple[str, ...]
    label: str | None
    glue: object


def layout_of(path, spec):
    """The Layout of a file, by its columns or those of spec.columns. Raises ValueError if it has none."""
    found, glue = texts.layout_of(path)
    named = spec.columns.get("texts")
    if named and (spec.labels is None or set(named) <= set(found)):
        if len(named) != 2:
            raise ValueError(
                f"--text-column names {len(named)} column: expected two, such as the query's and then the positive's"
            )
        if lacking := [name for name in named if name not in found]:
            raise texts.missing(path, lacking[0], found, "--text-column")
        pair = tuple(named)
    else:
        pairs = [(query, positive) for query in QUERIES for positive in POSITIVES]
        pairs += [glue.texts] if glue else []
        pairs += [names for names in texts.TEXTS if len(names) == 2]
        pair = next((tuple(names) for names in pairs if set(names) <= set(found)), None)
    if pair is None:
        raise ValueError(
            f"{path} has no columns 'query' and 'positive', nor 'sentence1' and 'sentence2': it has "
            f"{', '.join(map(repr, found))}; name both texts with --text-column"
        )
    negatives = tuple(name for name in found if _NEGATIVE.fullmatch(name) and name not in pair)
    label = spec.columns.get("label") or (glue.label if glue else None)
    if label is not None and label not in found:
        if spec.labels is None:
            raise texts.missing(path, label, [name for name in found if name not in pair], "--label-column")
        label = None
    if negatives or pair[1] in POSITIVES:
        label = label or next((name for name in (*TEACHERS, *SCORES, *LABELS) if name in found), None)
        return Layout("pairs", pair, negatives, label, glue)
    label = label or next((name for name in (*SCORES, *LABELS) if name in found), None)
    is_score = label in SCORES or (glue is not None and glue.task == "regress")
    return Layout("pairs" if label is None else "scored" if is_score else "labelled", pair, negatives, label, glue)


def read(path, spec, notes, kinds, wants_gold):
    """Yields Examples with texts (query, document, ...) and more["kind"].

    kinds: {loss: kinds of files that it learns from}, the first loss of a kind being its default; spec.settings["loss"]
    is set where it is None. gold: a score, the name of a label, or of distillation the teacher's score of each
    document, else None.
    """
    layout, settings, training = layout_of(path, spec), spec.settings, spec.labels is None
    kind, loss = layout.kind, settings.get("loss")
    if training:
        if loss is None:
            loss = settings["loss"] = next(name for name, known in kinds.items() if kind in known)
        if kind not in kinds[loss]:
            # 0 and 1 are scores, too
            if kind == "labelled" and "scored" in kinds[loss]:
                kind = "scored"
            else:
                raise ValueError(
                    f"{path} has {WORDS[kind]} ({', '.join(map(repr, layout.texts))}): --loss {loss} learns from "
                    f"{' or '.join(WORDS[one] for one in kinds[loss])}"
                )
    settings["measured"] = kind
    if kind == "pairs":
        yield from _pairs(path, layout, notes, loss == "margin", training)
        return
    columns = texts.Columns(None, layout.texts, layout.label, None, layout.glue)
    columns = columns._replace(found=tables.columns(path), group=spec.columns.get("group"))
    for example, row in texts.text_rows(path, columns, notes, wants_gold):
        example.more["kind"] = kind
        if wants_gold:
            value = row.get(layout.label)
            value = value.strip() if isinstance(value, str) else value
            if kind == "scored":
                example.gold = number(value)
                if example.gold is None:
                    notes.bad(example.number, f"{layout.label!r} is {str(value)[:40]!r}: expected a number")
                    continue
            elif value is None or isinstance(value, float | list | dict) or value == "":
                notes.bad(example.number, f"{layout.label!r} is {str(value)[:40]!r}: expected a label")
                continue
            elif str(value) in _UNLABELLED:
                notes.skip(example.number, f"no gold label, {value!r}")
                continue
            else:
                example.gold = str(value)
                if loss == "softmax":
                    example.gold = notes.label(example.gold, example.number, spec)
        yield example


WORDS = {"pairs": "queries with documents", "scored": "pairs with a score", "labelled": "pairs with a label"}


def _pairs(path, layout, notes, wants_scores, training):
    """The Examples of a file of pairs: one for each positive of a row, with all negatives of the row."""
    query_column, positive_column = layout.texts
    for count, row in tables.rows(path, notes.skip):
        query = row.get(query_column)
        if not isinstance(query, str):
            notes.bad(count, f"{query_column!r} is {str(query)[:40]!r}: expected text")
            continue
        positives = _list(row.get(positive_column))
        # of a .jsonl only the columns of the first row are known
        names = [name for name in row if _NEGATIVE.fullmatch(name) and name not in layout.texts]
        negatives = [text for name in names for text in _list(row[name])]
        if (
            positives is None
            or not all(isinstance(text, str) for text in positives)
            or not all(isinstance(text, str | None) for text in negatives)
        ):
            notes.bad(count, f"{positive_column!r} or a negative is no text: expected a text, or a list of texts")
            continue
        if not query.strip() or not any(text.strip() for text in positives):
            notes.skip(count, f"{query_column if not query.strip() else positive_column!r} is empty")
            continue
        scores = _teacher(row, layout, len(positives), len(negatives)) if wants_scores else None
        if wants_scores and scores is None:
            notes.bad(
                count, f"no teacher's score for each of {len(positives)} positives and {len(negatives)} negatives: "
                "expected 'margin', a number or one for each negative, or 'pos_scores' and 'neg_scores'"
            )  # fmt: skip
            continue
        kept = [i for i, text in enumerate(negatives) if text and text.strip() and text not in positives]
        if any(text in positives for text in negatives):
            notes.remark("negatives that are the positive are left out", f"line {count}")
        if (layout.negatives or names) and not kept:
            notes.remark("rows without a negative", f"line {count}")
            if wants_scores:
                notes.skip(count, "no negative to have a margin to")
                continue
        for place, positive in enumerate(positives):
            if not positive.strip():
                continue
            if positive == query:
                notes.remark("rows whose positive is the query", f"line {count}")
            gold = None if scores is None else [scores[0][place], *(scores[1][i] for i in kept)]
            # no query is on both sides of a split
            yield Example(
                count, (query, positive, *(negatives[i] for i in kept)), gold, row.get("id"), query, {"kind": "pairs"}
            )


def _list(value):
    return value if isinstance(value, list) else [value]


def _teacher(row, layout, positives, negatives):
    """(scores of the positives, of the negatives) by a teacher, None where they do not fit."""
    if "neg_scores" in row or "pos_scores" in row:
        found = [[number(value) for value in _list(row.get(name))] for name in ("pos_scores", "neg_scores")]
        fits = [len(one) for one in found] == [positives, negatives]
    else:
        values = [number(value) for value in _list(row.get(layout.label))]
        if positives == 1 and len(values) == negatives + 1 and negatives:
            # as sentence-transformers has it: the positive's score first
            found, fits = [values[:1], values[1:]], True
        else:
            found, fits = [[0.0] * positives, [None if x is None else -x for x in values]], len(values) == negatives
    return found if fits and None not in found[0] + found[1] else None


def key(text):
    """An int64 for a text, equal for equal texts."""
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
