"""The right one of several choices, such as the end of a story or the answer to a question (SWAG, RACE)."""

import numpy as np

from ..data import tables
from ..model.heads import MultipleChoice
from .examples import Example, Window, copied

SCORES = {"accuracy": 1, "log_loss": -1}
CONTEXTS = ("context", "sent1", "article", "passage", "question", "premise", "text")
CHOICES = ("choices", "options", "endings", "answers")
LABELS = ("label", "answer", "answerKey", "gold", "correct")


def head(spec):
    return MultipleChoice, {}


def read(path, spec, notes, *, wants_gold=True):
    """Yields Examples with texts (context, choice, choice, ...) and the place of the right choice as gold, from 0.

    The first row of the training file says how many choices there are: spec.settings["choices"]. Fewer are fine.
    """
    found = tables.columns(path)
    named, label = [*spec.columns.get("texts", ())], spec.columns.get("label")
    context = next((one for one in [*named, *CONTEXTS] if one in found), None)
    if context is None:
        raise ValueError(f"{path} has no column {[*named, 'context'][0]!r}: it has {', '.join(map(repr, found))}")
    endings = _numbered(found)
    choices = next((one for one in [*named[1:], *CHOICES] if one in found and one != context), None)
    if not endings and choices is None:
        raise ValueError(f"{path} has no column 'choices' or 'ending0': it has {', '.join(map(repr, found))}")
    label = label or next((one for one in LABELS if one in found), "label")
    if wants_gold and label not in found and tables.kind(path) in (".csv", ".tsv"):
        raise ValueError(f"{path} has no column {label!r}: it has {', '.join(map(repr, found))}")
    # what comes before each choice: SWAG's beginning of the sentence, RACE's question
    before = next((one for one in ("sent2", "question") if one in found and one != context), None)
    for number, row in tables.rows(path, notes.skip):
        names = None
        if endings:
            texts = [row.get(one) for one in endings]
        else:
            texts = row.get(choices)
            if isinstance(texts, dict):
                texts, names = texts.get("text"), texts.get("label")
        texts = _checked(number, row.get(context), texts, choices or endings[0], notes)
        if texts is None:
            continue
        empty = [i for i, text in enumerate(texts) if not text.strip()]
        if empty and wants_gold:
            which = endings[empty[0]] if endings else f"choice {empty[0]}"
            notes.remark("rows with an empty choice", f"{which} in line {number}")
        start = row.get(before) if before else None
        if isinstance(start, str) and start.strip():
            texts = [f"{start.strip()} {text.strip()}".strip() for text in texts]
        limit = spec.settings.setdefault("choices", len(texts)) if spec.labels is None else spec.settings.get("choices")
        if limit is not None and len(texts) > limit:
            notes.bad(number, f"{len(texts)} choices, the training file's first row has {limit}")
            continue
        gold = None
        if wants_gold:
            gold = _place(row.get(label), len(texts), names)
            if gold is None:
                last = chr(ord("A") + len(texts) - 1)
                notes.bad(number, f"{label!r} is {row.get(label)!r}: expected 0 to {len(texts) - 1}, or A to {last}")
                continue
        yield Example(number, (row[context], *texts), gold, row.get("id"), row.get(spec.columns.get("group")))


def example(number, item):
    """The Example of (context, [choice, ...]), of (context, choice, ...) or of a dict with context and choices."""
    if isinstance(item, dict):
        item = (item.get("context"), item.get("choices"))
    texts = [] if isinstance(item, str) else [*item]
    if len(texts) == 2 and isinstance(texts[1], list | tuple):
        texts = [texts[0], *texts[1]]
    if len(texts) < 3 or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"item {number} is {str(item)[:40]!r}: expected a context and at least two choices")
    return Example(number, tuple(texts))


def _numbered(found):
    """ending0, ending1, ... as far as a file has them, or choice0, ..."""
    for name in ("ending", "choice"):
        several = [f"{name}{i}" for i in range(len(found)) if f"{name}{i}" in found]
        if len(several) > 1:
            return several
    return []


def _checked(number, context, texts, column, notes):
    """The choices of a row, None if it is faulty."""
    if not isinstance(context, str):
        notes.bad(number, f"the context is {str(context)[:40]!r}: expected text")
    elif not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        notes.bad(number, f"{column!r} is {str(texts)[:40]!r}: expected a list of texts")
    elif len(texts) < 2:
        notes.bad(number, f"{len(texts)} choices: expected at least two")
    else:
        return texts
    return None


def _place(label, count, names):
    """The place of the right choice from 0, None for what is none. names: of the choices, if the row has them."""
    if isinstance(names, list) and label in names:
        return names.index(label)
    if isinstance(label, str):
        label = label.strip()
        if len(label) == 1 and "A" <= label <= "Z":
            label = ord(label) - ord("A")
        elif label.isascii() and label.isdecimal():
            label = int(label)
    return label if type(label) is int and 0 <= label < count else None


def encode(examples, pieces, spec):
    """For each example a Window a choice: the context and the choice, the longer one shortened."""
    if not examples:
        return []
    encodings = iter(pieces.encodings([text for example in examples for text in example.texts]))
    found = []
    for example in examples:
        context, *choices = (next(encodings) for _ in example.texts)
        windows = [pieces.windows(copied(context), choice)[0] for choice in choices]
        found.append([Window(one.ids, one.type_ids, example.gold) for one in windows])
    return found


def decode(example, windows, logits, spec):
    """{"choice": its place from 0, "text", "score", "probabilities"}; of equal choices the first."""
    scores = np.array([one[0] for one in logits], np.float64)
    shares = np.exp(scores - scores.max())
    shares /= shares.sum()
    best = int(shares.argmax())
    found = {
        "choice": best, "text": example.texts[1 + best], "score": float(shares[best]), "probabilities": shares.tolist()
    }  # fmt: skip
    if example.gold is not None:
        found |= {"_gold": example.texts[1 + example.gold], "_answer": found["text"], "_text": example.texts[0]}
        found["_error"] = found["score"] if best != example.gold else 0.0
    return found


def score(examples, predictions, spec, *, tune=False):
    """Accuracy and log loss. chance: the accuracy of guessing; majority_baseline: of the place that is right most."""
    gold = [example.gold for example in examples]
    right = [prediction["choice"] == place for prediction, place in zip(predictions, gold, strict=True)]
    shares = [prediction["probabilities"][place] for prediction, place in zip(predictions, gold, strict=True)]
    return {
        "accuracy": sum(right) / len(right),
        "log_loss": float(-np.log(np.maximum(shares, 1e-300)).mean()),
        "chance": float(np.mean([1 / (len(example.texts) - 1) for example in examples])),
        "majority_baseline": max(map(gold.count, set(gold))) / len(gold),
    }
