"""A tag for each word: names of persons and places (NER), parts of speech."""

import re
import unicodedata

import numpy as np

from ..model.heads import TokenClassifier
from . import schemes, tag_files
from .examples import Example, Window, after_marks

SCORES = {"f1": 1, "strict_f1": 1, "macro_f1": 1, "precision": 1, "recall": 1, "accuracy": 1}
# scripts that put no blanks between words: Thai, Lao, Myanmar, Khmer, kana, ideographs
_DENSE = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3005-\u3007\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
    "\uff66-\uff9f\U00020000-\U0003ffff]"
)


def head(spec):
    if len(spec.labels) < 2:
        names = f", {spec.labels[0]!r}" if spec.labels else ""
        raise ValueError(f"the training file has {len(spec.labels)} tag{names}: expected at least two")
    return TokenClassifier, {"num_labels": len(spec.labels), "labels": spec.labels}


def is_plain(spec):
    """Whether the labels are no entities' tags, but each word's own, such as parts of speech."""
    if "scheme" in spec.settings:
        return spec.settings["scheme"] == "plain"
    # a model of others
    return not any(label.startswith(("B-", "I-")) for label in spec.labels)


def read(path, spec, notes, *, wants_gold=True):
    """Yields Examples; with gold, the whole file is read first: its scheme is in no single sentence.

    The training file sets spec.settings["scheme"], and the labels: "O", and B- and I- of each type. The scheme is
    detected file by file, unless spec.settings["read_as"] has it.
    """
    found = tag_files.examples(path, spec, notes, wants_gold)
    if not wants_gold:
        yield from found
        return
    found = list(found)
    if not found:
        return
    is_training = spec.labels is None
    tags = [example.gold for example in found if "words" in example.more]
    scheme, remark = spec.settings.get("read_as"), None
    try:
        if scheme is None:
            scheme, remark = schemes.detect(tags) if tags else ("spans", None)
    except ValueError as error:
        number = next((example.number for example in found if "words" in example.more), 1)
        notes.bad(number, str(error))
        return
    if is_training:
        scheme = spec.settings.setdefault("scheme", scheme)
        if scheme == "plain":
            spec.metric = spec.metric or "accuracy"
            if spec.metric not in ("accuracy", "macro_f1"):
                raise ValueError(
                    f"--metric {spec.metric} is that of entities, {path} has plain tags: expected accuracy"
                )
        else:
            notes.labels.add("O")
        remark = remark or f"tags are read as {scheme}"
    if remark:
        notes.remark(remark)
    for example in found:
        if "words" not in example.more:
            gold = [(start, end, _type(kind, example.number, spec, notes)) for start, end, kind in example.gold]
            example.gold = None if any(kind is None for *_, kind in gold) else gold
        elif is_plain(spec):
            example.gold = [notes.label(tag, example.number, spec) for tag in example.gold]
        else:
            example.gold = _entity_tags(example, spec, notes)
        if example.gold is not None:
            yield example


def _entity_tags(example, spec, notes):
    for i, tag in enumerate(example.gold):
        if tag != "O" and schemes.parts(tag)[1] == "":
            number = example.number + (i if example.more["words"] == "lines" else 0)
            hint = "has no type" if schemes.parts(tag)[0] != "O" else "has no prefix"
            notes.bad(number, f"the tag {tag!r} of {example.texts[i]!r} {hint}: expected one such as 'B-PER', or 'O'")
            return None
    # by IOB2 an I- that follows nothing of its type is as O
    found = schemes.strict_entities if spec.settings.get("read_as") == "IOB2" else schemes.entities
    tags = schemes.iob2(example.gold, found)
    types = {tag[2:]: _type(tag[2:], example.number, spec, notes) for tag in tags if tag.startswith("B-")}
    if None in types.values():
        return None
    return ["O" if tag == "O" else tag[:2] + types[tag[2:]] for tag in tags]


def _type(kind, number, spec, notes):
    """An entity's type as the model spells it; None, and a fault, if it has none such."""
    if spec.labels is None:
        notes.labels |= {f"B-{kind}", f"I-{kind}"}
        return kind
    found = next((name for name in map(spec.known, (f"B-{kind}", f"I-{kind}", f"S-{kind}")) if name), None)
    if found is None:
        notes.label(f"B-{kind}", number, spec)
        return None
    return schemes.parts(found)[1]


def example(number, item):
    """The Example of a text, or of a list of words."""
    if isinstance(item, str):
        return Example(number, (item,))
    if not isinstance(item, list | tuple) or not all(isinstance(word, str) for word in item):
        raise ValueError(f"item {number} is {str(item)[:40]!r}: expected a text, or a list of words")
    return Example(number, tuple(item), more={"words": "row"})


# ---------------------------------------------------------------------------------------------------------------------


def encode(examples, pieces, spec):
    """For each example its Windows. more: (units, places): each unit is decided in one window, at a token of it.

    Units are the words of an example with words, else those of the text. A unit's first piece has its label, in the
    window that shows most around it.
    """
    if not examples:
        return []
    blanks = _blanks_matter(pieces)
    with_words = [i for i, example in enumerate(examples) if "words" in example.more]
    with_text = [i for i, example in enumerate(examples) if "words" not in example.more]
    words = [[f" {word}" if n and blanks else word for n, word in enumerate(examples[i].texts)] for i in with_words]
    encodings = [None] * len(examples)
    for indices, texts in ((with_words, words), (with_text, [examples[i].texts[0] for i in with_text])):
        for i, encoding in zip(indices, pieces.encodings(texts) if texts else [], strict=True):
            encodings[i] = encoding
    found = []
    for example, encoding in zip(examples, encodings, strict=True):
        if "words" in example.more:
            ids = np.array([-1 if i is None else i for i in encoding.word_ids], np.int64)
            firsts = np.flatnonzero(np.diff(ids, prepend=-1) != 0)
            firsts = firsts[ids[firsts] >= 0]
            units, tags = ids[firsts], example.gold
        else:
            firsts, example.more["units"] = _units(example.texts[0], encoding)
            units = np.arange(len(firsts))
            tags = None if example.gold is None else unit_tags(example.more["units"], example.gold)
        found.append(_windows(encoding, firsts, units, tags, pieces, spec))
    return found


def _windows(encoding, firsts, units, tags, pieces, spec):
    total = len(encoding)
    windows = pieces.windows(encoding)
    bodies = [np.flatnonzero(np.array(one.special_tokens_mask) == 0) for one in windows]
    room = len(bodies[0])
    step = room - min(pieces.stride, max(room - 1, 0))
    starts = np.arange(len(windows)) * step
    ends = np.minimum(starts + room, total)
    # how many tokens a window shows on the narrower side of a first piece; less than none outside of it
    shown = np.minimum(firsts[:, None] - starts, ends - 1 - firsts[:, None])
    chosen = np.where((shown < 0).all(1), -1, shown.argmax(1)) if len(firsts) else np.zeros(0, np.int64)
    found = []
    for number, (one, body) in enumerate(zip(windows, bodies, strict=True)):
        mine = chosen == number
        places = body[firsts[mine] - starts[number]]
        labels = None
        if tags is not None:
            labels = np.full(len(one.ids), -100)
            labels[places] = [spec.index[tags[unit]] for unit in units[mine]]
        found.append(Window(one.ids, one.type_ids, labels=labels, more=(units[mine], places)))
    return found


def _blanks_matter(pieces):
    """Whether a word has other pieces with a blank before it than alone, as in GPT-2's and RoBERTa's tokenizers."""
    whole, alone, with_blank = (
        pieces.encodings(["a a"]),
        pieces.encodings([["a", "a"]]),
        pieces.encodings([["a", " a"]]),
    )
    return whole[0].ids != alone[0].ids and whole[0].ids == with_blank[0].ids


def _units(text, encoding):
    """(first pieces, spans of characters) of the words of a text, as the tokenizer cuts it.

    In scripts without blanks between words each piece is a unit: a tokenizer may call a whole sentence a word. Nor does
    every tokenizer cut at punctuation.
    """
    firsts, spans, before = [], [], None
    for i, (word, (start, end)) in enumerate(zip(encoding.word_ids, encoding.offsets, strict=True)):
        surface = text[start:end]
        if not surface.strip():
            # a piece that is a blank, or nothing that is in the text
            continue
        start, end = start + len(surface) - len(surface.lstrip()), after_marks(text, end)
        dense = _DENSE.search(surface) is not None
        # pieces of one character, in bytes, stay together
        if firsts and start < spans[-1][1] or before == (word, False) and not (dense or _is_punctuation(text[start])):
            spans[-1][1] = max(end, spans[-1][1])
        else:
            firsts.append(i)
            spans.append([start, end])
        before = word, dense or _is_punctuation(text[end - 1])
    return np.array(firsts, np.int64), spans


def _is_punctuation(letter):
    """Whether a character is punctuation or a symbol."""
    return unicodedata.category(letter)[0] in "PS"


def unit_tags(units, spans):
    """IOB2 tags of units (spans of characters) for entities (start, end, type): those of the units that they touch."""
    tags = ["O"] * len(units)
    for start, end, kind in spans:
        touched = [i for i, (a, b) in enumerate(units) if a < end and b > start and tags[i] == "O"]
        for n, i in enumerate(touched):
            tags[i] = f"I-{kind}" if n else f"B-{kind}"
    return tags


def decode(example, windows, logits, spec):
    """{"entities": [{label, text, start, end, score}], ...}; and the "tags" of an example with words.

    start, end: characters of the text, or of the words joined by blanks. score: the mean of the words' probabilities. A
    word without a piece, or beyond a cut, is "O". With plain labels: {"tags", "scores"}, and "spans" for a text.
    """
    has_words = "words" in example.more
    units = word_spans(example.texts) if has_words else example.more["units"]
    text = " ".join(example.texts) if has_words else example.texts[0]
    tags, scores = ["O"] * len(units), np.zeros(len(units))
    decided = 0
    for window, values in zip(windows, logits, strict=True):
        decisions, places = window.more
        rows = np.asarray(values, np.float64)[places]
        if len(rows):
            best = rows.argmax(-1)
            scores[decisions] = 1 / np.exp(rows - rows.max(-1, keepdims=True)).sum(-1)
            for unit, label in zip(decisions.tolist(), best.tolist(), strict=True):
                tags[unit] = spec.labels[label]
        decided += len(rows)
    found = {"tags": tags} if has_words or is_plain(spec) else {}
    if is_plain(spec):
        found |= {"scores": scores.tolist()} | ({} if has_words else {"spans": [[*span] for span in units]})
    else:
        # a model of others may have labels of another scheme
        if any(label.startswith(("E-", "S-", "L-", "U-")) for label in spec.labels):
            tags = schemes.iob2(tags)
        found["entities"] = [
            {"label": kind, "text": text[start:end], "start": start, "end": end, "score": float(scores[a:b].mean())}
            for kind, a, b in schemes.entities(tags)
            for start, end in [(units[a][0], units[b - 1][1])]
        ]
        found["_strict"] = [(kind, units[a][0], units[b - 1][1]) for kind, a, b in schemes.strict_entities(tags)]
    found |= {"_tags": tags, "_units": units, "_undecided": len(units) - decided, "_text": text}
    if example.gold is not None:
        gold = example.gold if has_words else unit_tags(units, example.gold)
        wrong = [i for i, (right, tag) in enumerate(zip(gold, tags, strict=True)) if right != tag]
        found["_gold"], found["_answer"] = (
            ", ".join(f"{text[slice(*units[i])]} {which[i]}" for i in wrong) for which in (gold, tags)
        )
        found["_error"] = float(max((scores[i] for i in wrong), default=0.0))
    return found


def word_spans(words):
    """[start, end] of each word in the words joined by blanks."""
    ends = np.cumsum([len(word) + 1 for word in words]).tolist()
    return [[end - 1 - len(word), end - 1] for word, end in zip(words, ends, strict=True)]


def score(examples, predictions, spec, *, tune=False):
    """Entity F1 as conlleval (seqeval's default) counts it, per type too; strict_f1 takes IOB2's entities alone.

    accuracy: of the words' tags. undecided_words: words that have no token, or are beyond a cut: predicted "O".
    off_word_entities: those in texts that begin or end inside a word, which cannot be found. With plain labels:
    accuracy, macro_f1 and per_class of the words' labels.
    """
    for example, prediction in zip(examples, predictions, strict=True):
        # the bootstrap asks for the same again and again
        if "_counts" not in prediction:
            prediction["_counts"] = _counts(example, prediction, spec)
    counts = [prediction["_counts"] for prediction in predictions]
    words, right, undecided, off = (sum(one[i] for one in counts) for i in range(4))
    scores = schemes.entity_scores(one[4] for one in counts)
    found = {"accuracy": right / words if words else 0.0, "words": words, "undecided_words": undecided}
    if is_plain(spec):
        return found | {name: scores[name] for name in ("macro_f1", "per_class")}
    strict = schemes.entity_scores(one[5] for one in counts)
    found |= scores | {"entities": sum(sum(one[4][0].values()) for one in counts), "off_word_entities": off}
    return found | {f"strict_{name}": strict[name] for name in ("precision", "recall", "f1", "macro_f1")}


def _counts(example, prediction, spec):
    """(words, right ones, undecided ones, entities off the words, entity_counts, those of strict entities)."""
    units, tags, off = prediction["_units"], prediction["_tags"], 0
    gold = example.gold
    gold_tags = gold if "words" in example.more else unit_tags(units, gold)
    right = sum(a == b for a, b in zip(gold_tags, tags, strict=True))
    if is_plain(spec):
        # each word is an entity of its tag
        entities, loose, strict = [*zip(gold_tags, range(len(tags)))], [*zip(tags, range(len(tags)))], ()
    else:
        if "words" in example.more:
            entities = [(kind, units[a][0], units[b - 1][1]) for kind, a, b in schemes.entities(gold)]
        else:
            starts, ends = ({unit[side] for unit in units} for side in (0, 1))
            entities = [(kind, start, end) for start, end, kind in gold]
            off = sum(start not in starts or end not in ends for _, start, end in entities)
        loose = [(entity["label"], entity["start"], entity["end"]) for entity in prediction["entities"]]
        strict = prediction["_strict"]
    return (
        len(tags), right, prediction["_undecided"], off, schemes.entity_counts(entities, loose),
        schemes.entity_counts(entities, strict),
    )  # fmt: skip
