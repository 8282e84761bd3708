"""The span of a text that answers a question (extractive QA), or that there is none."""

import numpy as np

from ..model.heads import QuestionAnswerer
from . import squad
from .examples import Example, Window, after_marks

SCORES = {"f1": 1, "exact_match": 1}
# tokens of the longest answer; spans that compete; those that a prediction shows
MAX_ANSWER, N_BEST, SHOWN = 30, 20, 3


def head(spec):
    return QuestionAnswerer, {}


def read(path, spec, notes, *, wants_gold=True):
    """Yields Examples of (question, context) with gold {"texts", "spans"}: None where an answer is not at its offset.

    The training file sets spec.settings["no_answer"]: whether questions may have no answer.
    """
    seen = set()
    is_training = spec.labels is None
    for number, row in squad.questions(path, spec.columns, notes, wants_gold):
        question, context = row["question"], row["context"]
        wrong = next((name for name in ("question", "context") if not isinstance(row[name], str)), None)
        if wrong is not None:
            notes.bad(number, f"{wrong!r} is {str(row[wrong])[:40]!r}: expected text")
            continue
        if isinstance(row["id"], list | dict):
            notes.bad(number, f"the id is {str(row['id'])[:40]!r}: expected text or a number")
            continue
        identity = f"row {number}" if row["id"] in (None, "") else row["id"]
        example = Example(number, (question.strip(), context), id=identity)
        # questions about a text stay together
        example.group = row["group"] if "group" in spec.columns else context
        if not wants_gold:
            yield example
            continue
        try:
            texts, starts = squad.gold_answers(row["answers"])
        except ValueError as error:
            notes.bad(number, str(error))
            continue
        if identity in seen:
            notes.skip(number, f"the id {identity!r} is there twice")
        elif not question.strip():
            notes.skip(number, "'question' is empty")
        elif texts and str(row["is_impossible"]).lower() in ("true", "1"):
            notes.skip(number, f"{identity!r} has is_impossible and an answer")
        else:
            seen.add(identity)
            example.gold = {"texts": texts, "spans": _spans(example, texts, starts, notes)}
            if not texts:
                notes.remark("questions without an answer, which a model trained on them learns to say", repr(identity))
                spec.settings["no_answer"] = spec.settings.get("no_answer", True) or is_training
            yield example
    if is_training and wants_gold:
        spec.settings.setdefault("no_answer", False)


def _spans(example, texts, starts, notes):
    """[start, end] of each answer in the context; None where it stands elsewhere, and a note if all do."""
    context, spans, faults = example.texts[1], [], []
    for text, start in zip(texts, starts, strict=True):
        if start is None:
            times = sum(context.startswith(text, i) for i in range(len(context)))
            if times == 1:
                notes.remark("answers without an offset, which are in their text once", repr(example.id))
                start = context.index(text)
            else:
                faults.append(f"{text[:40]!r} has no offset and is {times} times in the text")
        elif not (start >= 0 and context.startswith(text, start)):
            stands = context[max(start, 0) : max(start, 0) + len(text)][:40]
            faults.append(f"{text[:40]!r} is not at {start}, where {stands!r} stands")
            start = None
        if start is not None and not text.strip():
            start = None
        spans.append(None if start is None else [start, start + len(text)])
    if texts and not any(spans):
        why = "; ".join(faults) or "the answer is blank"
        notes.remark("questions whose answer cannot be learnt, only scored", f"{example.id!r} ({why})")
    return spans


def example(number, item):
    """The Example of a question and its context, as a pair or a dict."""
    if isinstance(item, dict):
        item = (item.get("question"), item.get("context"))
    if isinstance(item, str) or len(item) != 2 or not all(isinstance(text, str) for text in item):
        raise ValueError(f"item {number} is {str(item)[:40]!r}: expected a question and its context")
    return Example(number, (item[0].strip(), item[1]))


# ---------------------------------------------------------------------------------------------------------------------


def encode(examples, pieces, spec):
    """For each example its Windows: the question, then a part of the context. label: (start, end) tokens.

    (0, 0), [CLS], is "no answer"; (-100, -100) teaches nothing: the answer is not in the window, or nowhere. more:
    (first token, spans of characters) of the context's tokens.
    """
    if not examples:
        return []
    questions = pieces.encodings([example.texts[0] for example in examples])
    contexts = pieces.encodings([example.texts[1] for example in examples])
    found = []
    for example, question, context in zip(examples, questions, contexts, strict=True):
        windows = []
        for one in pieces.windows(question, context, only_second=True):
            body = [i for i, sequence in enumerate(one.sequence_ids) if sequence == 1]
            first = body[0] if body else 0
            # a property that makes a new list of all tokens each time
            spans = one.offsets
            offsets = np.array([spans[i] for i in body], np.int64).reshape(-1, 2)
            windows.append(Window(one.ids, one.type_ids, more=(first, offsets)))
        if example.gold is not None:
            _label(windows, example.gold, spec)
        found.append(windows)
    return found


def _label(windows, gold, spec):
    # a window without the whole answer has none, if questions may have no answer
    nothing = (0, 0) if spec.settings.get("no_answer") else (-100, -100)
    span = next((span for span in gold["spans"] if span), None)
    inside = [np.zeros(0, np.int64)] * len(windows)
    if span is not None:
        inside = [np.flatnonzero((w.more[1][:, 0] < span[1]) & (w.more[1][:, 1] > span[0])) for w in windows]
    places = [window.more[1][some] for window, some in zip(windows, inside, strict=True) if len(some)]
    for window, some in zip(windows, inside, strict=True):
        if gold["texts"] and not places:
            window.label = (-100, -100)
        elif len(some) and _outline(window.more[1][some]) == _outline(np.concatenate(places)):
            window.label = (window.more[0] + int(some[0]), window.more[0] + int(some[-1]))
        else:
            window.label = nothing


def _outline(offsets):
    return int(offsets[:, 0].min()), int(offsets[:, 1].max())


def decode(example, windows, logits, spec):
    """{"answer", "start", "end", "score", "n_best"}, with "no_answer_score" where there may be no answer.

    start, end: characters of the context; None with the answer "". score: the answer's share in the softmax of the
    n-best spans. no_answer_score: the smallest null score of a window, less the best span's score; above
    spec.settings["null_threshold"] (0) the answer is "".
    """
    context, best, null = example.texts[1], {}, None
    for window, values in zip(windows, logits, strict=True):
        values = np.asarray(values, np.float64)
        here = float(values[0].sum())
        null = here if null is None else min(null, here)
        for value, start, end in _best_spans(values, window.more):
            text = context[start : after_marks(context, end)]
            start += len(text) - len(text.lstrip())
            span = (start, start + len(text.strip()))
            if text.strip() and value > best.get(span, (-np.inf,))[0]:
                best[span] = (value, *span)
    spans = sorted(best.values(), key=lambda one: (-one[0], one[1:]))[:N_BEST]
    null = 0.0 if null is None else null
    # without a span the null answer wins
    gap = null - spans[0][0] if spans else 1e9
    values = [value for value, *_ in spans] + ([null] if spec.settings.get("no_answer") or not spans else [])
    shares = np.exp(np.array(values) - max(values))
    shares = (shares / shares.sum()).tolist()
    found = {
        "_spans": [(context[start:end], start, end, share) for (_, start, end), share in zip(spans, shares)],
        "_null_share": shares[-1] if len(shares) > len(spans) else 0.0, "_gap": gap,
    }  # fmt: skip
    if example.gold is not None:
        found["_golds"] = tuple(example.gold["texts"])
    return _chosen(found, spec)


def _rules(golds, spec):
    """The version of SQuAD's rules."""
    return 2 if spec.settings.get("no_answer") or not all(golds) else 1


def _best_spans(values, more):
    """(score, start, end) of a window's best spans of characters."""
    first, offsets = more
    C = len(offsets)
    if not C:
        return []
    starts, ends = (values[first : first + C, side] for side in (0, 1))
    width = min(MAX_ANSWER, C)
    # [C, width]: the score of each start with the ends that follow it
    padded = np.concatenate((ends, np.full(width - 1, -np.inf)))
    total = starts[:, None] + np.lib.stride_tricks.sliding_window_view(padded, width)
    best = np.argpartition(-total, min(N_BEST, total.size) - 1, axis=None)[:N_BEST]
    best = best[np.isfinite(total.ravel()[best])]
    rows, columns = np.divmod(best, width)
    return [
        (float(total[row, column]), int(offsets[row, 0]), int(offsets[row + column, 1]))
        for row, column in zip(rows.tolist(), columns.tolist(), strict=True)
    ]


def _chosen(found, spec):
    """The prediction with what a user sees of it, which depends on the threshold."""
    may_lack, spans = spec.settings.get("no_answer"), found["_spans"]
    if not spans or (may_lack and found["_gap"] > spec.settings.get("null_threshold", 0.0)):
        text, start, end, share = "", None, None, found["_null_share"]
    else:
        text, start, end, share = spans[0]
    shown = [dict(zip(("answer", "start", "end", "score"), span)) for span in spans[:SHOWN]]
    found |= {"answer": text, "start": start, "end": end, "score": share, "n_best": shown}
    if (golds := found.get("_golds")) is not None:
        wrong = 1 - squad.exact_and_f1(text, golds, _rules([golds], spec))[1]
        found |= {"_error": wrong * share, "_gold": " or ".join(golds) or "no answer", "_answer": text or "no answer"}
    return found | ({"no_answer_score": found["_gap"]} if may_lack else {})


def score(examples, predictions, spec, *, tune=False):
    """The official EM and F1 in percent, of SQuAD 2.0 where questions may have no answer, else of 1.1.

    tune: choose the null threshold with the best F1 (of these examples), and answer by it.
    """
    golds = [tuple(example.gold["texts"]) for example in examples]
    rules = _rules(golds, spec)
    found = {}
    if rules == 2 and spec.settings.get("no_answer"):
        texts = [prediction["_spans"][0][0] if prediction["_spans"] else "" for prediction in predictions]
        gaps = [prediction["_gap"] for prediction in predictions]
        found = squad.best_thresholds(texts, golds, gaps)
        if tune:
            # where it is best to answer nothing, version 2's program says 0.0, which some gaps are below
            answers_nothing = found["best_f1"] <= 100.0 * sum(not gold for gold in golds) / len(golds)
            spec.settings["null_threshold"] = min(gaps) - 1.0 if answers_nothing else found["best_f1_thresh"]
            for prediction in predictions:
                _chosen(prediction, spec)
        found["null_threshold"] = spec.settings.get("null_threshold", 0.0)
    return squad.scores([prediction["answer"] for prediction in predictions], golds, rules) | found
