"""SQuAD (Rajpurkar et al. 2016, 2018): the official scores of versions 1.1 and 2.0, and the reading of its files."""

import ast
import functools
import json
import re
import string
from collections import Counter

from ..data import tables

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = frozenset(string.punctuation)


def normalized(text):
    """Lower case, without ASCII punctuation and English articles, words joined by one blank."""
    text = "".join(letter for letter in text.lower() if letter not in _PUNCTUATION)
    return " ".join(_ARTICLES.sub(" ", text).split())


def _f1(answer, gold, rules):
    words, right = normalized(answer).split(), normalized(gold).split()
    if rules == 2 and not (words and right):
        return float(words == right)
    common = (Counter(words) & Counter(right)).total()
    # as the official programs compute it, to the bit
    precision, recall = (common / len(words), common / len(right)) if common else (0.0, 0.0)
    return 2 * precision * recall / (precision + recall) if common else 0.0


# the thresholds and the bootstrap ask for the same again and again
@functools.lru_cache(1 << 17)
def exact_and_f1(answer, golds, rules):
    """(EM, F1) in 0 .. 1 of an answer for a tuple of right ones, the best of each. rules: 1 (of SQuAD 1.1) or 2 (2.0).

    By version 2 "the" is no right answer, for nothing is left of it, and without a right answer "" is right.
    """
    if rules == 2:
        golds = [gold for gold in golds if normalized(gold)] or [""]
    exact = max((float(normalized(answer) == normalized(gold)) for gold in golds), default=0.0)
    return exact, max((_f1(answer, gold, rules) for gold in golds), default=0.0)


def scores(answers, golds, rules):
    """{"f1", "exact_match", "total"} in percent; by version 2 also HasAns_ and NoAns_ figures, None where undefined.

    answers: texts. golds: tuples of right answers, empty where there is none.
    """
    each = [exact_and_f1(answer, gold, rules) for answer, gold in zip(answers, golds, strict=True)]
    found = {"f1": _percent([f1 for _, f1 in each]), "exact_match": _percent([exact for exact, _ in each])}
    found["total"] = len(each)
    if rules == 2:
        for name, wanted in (("HasAns", True), ("NoAns", False)):
            some = [one for one, gold in zip(each, golds, strict=True) if bool(gold) == wanted]
            found |= {
                f"{name}_exact": _percent([exact for exact, _ in some]), f"{name}_f1": _percent([f1 for _, f1 in some]),
                f"{name}_total": len(some),
            }  # fmt: skip
    return found


def _percent(values):
    return 100.0 * sum(values) / len(values) if values else None


def best_thresholds(answers, golds, no_answer_scores):
    """{"best_exact", "best_exact_thresh", "best_f1", "best_f1_thresh"} of version 2's program.

    A question whose no_answer_score is above the threshold is answered "".
    """
    each = [exact_and_f1(answer, gold, 2) for answer, gold in zip(answers, golds, strict=True)]
    order = sorted(range(len(each)), key=no_answer_scores.__getitem__)
    found = {}
    for place, name in enumerate(("exact", "f1")):
        current = best = sum(not gold for gold in golds)
        threshold = 0.0
        for i in order:
            if golds[i]:
                current += each[i][place]
            elif answers[i]:
                current -= 1
            if current > best:
                best, threshold = current, no_answer_scores[i]
        found |= {f"best_{name}": 100.0 * best / len(each), f"best_{name}_thresh": threshold}
    return found


# ---------------------------------------------------------------------------------------------------------------------


def questions(path, columns, notes, wants_gold):
    """Yields (number, {"id", "question", "context", "answers", "is_impossible"}) of SQuAD's JSON or of a table.

    columns: those of Spec. number: the line of a table, or the number of the question from 1.
    """
    document = _document(path)
    if document is not None:
        yield from enumerate(_paragraphs(path, document), 1)
        return
    found = tables.columns(path)
    question, context = columns.get("texts") or ("question", "context")
    answers = columns.get("label") or next((one for one in ("answers", "answer") if one in found), "answers")
    for column in (question, context, *([answers] if wants_gold else [])):
        if column not in found and (tables.kind(path) in (".csv", ".tsv") or column in (question, context)):
            raise ValueError(f"{path} has no column {column!r}: it has {', '.join(map(repr, found))}")
    for number, row in tables.rows(path, notes.skip):
        yield number, {
            "id": row.get("id"), "question": row.get(question), "context": row.get(context),
            "answers": _cell(row.get(answers), row.get("answer_start")), "is_impossible": row.get("is_impossible"),
            "group": row.get(columns.get("group")),
        }  # fmt: skip


def _document(path):
    """The object of a .json that is SQuAD's, else None."""
    if tables.kind(path) != ".json":
        return None
    text = "\n".join(line for _, line in tables.lines(path))
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        # rows of objects, or no JSON at all: tables.py says which
        if '"data"' not in text[:1000]:
            return None
        raise ValueError(f"{path} is not JSON: {str(error).partition(chr(10))[0]}") from None
    return found if isinstance(found, dict) and "data" in found else None


def _paragraphs(path, document):
    try:
        for article in document["data"]:
            for paragraph in article["paragraphs"]:
                for question in paragraph["qas"]:
                    yield {
                        "id": question.get("id"), "question": question["question"], "context": paragraph["context"],
                        "answers": question.get("answers"), "is_impossible": question.get("is_impossible"),
                        "group": None,
                    }  # fmt: skip
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} is not SQuAD's JSON ({type(error).__name__} {error}): expected data, paragraphs, qas, question"
        ) from None


def _cell(value, start):
    """The answers in a cell of text: JSON, or Python's repr of it, or the answer itself."""
    if isinstance(value, str) and value.lstrip()[:1] in ("{", "["):
        for parse in (json.loads, ast.literal_eval):
            try:
                value = parse(value)
                break
            except (ValueError, SyntaxError, RecursionError, MemoryError):
                continue
    if isinstance(value, str) and start not in (None, ""):
        start = int(start) if isinstance(start, str) and re.fullmatch(r"[0-9]+", start) else start
        return {"text": [value], "answer_start": [start]} if value else None
    return value


def gold_answers(answers):
    """(texts, starts) of a question's answers; a start is None if it is not given. Without answers, two empty lists.

    Raises ValueError for what is none.
    """
    if answers is None or answers == "":
        return [], []
    if isinstance(answers, str):
        answers = [answers]
    if isinstance(answers, dict):
        texts, starts = answers.get("text"), answers.get("answer_start")
        texts = [texts] if isinstance(texts, str) else texts
        starts = [starts] if type(starts) is int else starts
        if not isinstance(texts, list) or not isinstance(starts, list | None):
            raise ValueError(f"the answers {str(answers)[:60]}: expected lists of text and of answer_start")
        if starts is not None and len(texts) != len(starts):
            raise ValueError(f"{len(texts)} texts and {len(starts)} values of answer_start: expected one for each text")
        answers = [{"text": text, "answer_start": start} for text, start in zip(texts, starts or [None] * len(texts))]
    if not isinstance(answers, list):
        raise ValueError(f"the answers are {str(answers)[:60]!r}: expected a text, or a list of text and answer_start")
    texts, starts = [], []
    for answer in answers:
        answer = {"text": answer} if isinstance(answer, str) else answer
        text, start = (answer.get("text"), answer.get("answer_start")) if isinstance(answer, dict) else (None, None)
        if not isinstance(text, str) or not (start is None or type(start) is int):
            raise ValueError(f"the answer {str(answer)[:60]}: expected a text and answer_start, a whole number")
        if text:
            texts.append(text)
            starts.append(start)
    return texts, starts
