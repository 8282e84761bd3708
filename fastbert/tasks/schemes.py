"""Tags of words to entities: the schemes of NER files, and the F1 of entities.

An entity is (type, first word, last word + 1). A tag is "O", or a prefix and a type: "B-PER". Inside the library tags
are IOB2: every entity begins with B- and goes on with I-.

    IOB1       I- begins an entity; B- only where it touches another of its type
    IOB2       B- begins every entity
    IOBES      E- ends an entity of several words, S- is one of a single word
    BILOU      the same with L- and U-
    plain      labels without a prefix, such as parts of speech
"""

import re
from collections import Counter

SCHEMES = ("IOB1", "IOB2", "IOBES", "BILOU", "plain")
_TAG = re.compile(r"([BIESLUM])(?:-(.*))?", re.DOTALL)
# BILOU's and BMES' letters for what IOBES calls E, S and I
_SAME = {"L": "E", "U": "S", "M": "I"}


def parts(tag):
    """(prefix B, I, E or S, type) of a tag; ("O", "") of O, and of what has no prefix. A bare "B" has the type "_"."""
    match = _TAG.fullmatch(tag)
    if match is None:
        return "O", ""
    return _SAME.get(match[1], match[1]), "_" if match[2] is None else match[2]


def entities(tags):
    """The entities of a sentence's tags as conlleval and seqeval's default find them, in any scheme with prefixes.

    A tag begins an entity also where it should not: I- or E- after O, after the end of another entity, or after another
    type. In gold tags that is IOB1.
    """
    found, start = [], None
    before, before_type = "O", ""
    for i, tag in enumerate([*tags, "O"]):
        prefix, kind = parts(tag)
        begins = prefix != "O" and (prefix in "BS" or before in "OES" or kind != before_type)
        if start is not None and (prefix == "O" or begins):
            found.append((before_type, start, i))
            start = None
        if begins:
            start = i
        before, before_type = prefix, kind
    return found


def strict_entities(tags):
    """The entities that IOB2 allows: B-, then I- of its type. Other tags are as O (seqeval's strict mode)."""
    found, start, kind = [], None, ""
    for i, tag in enumerate([*tags, "O"]):
        prefix, this = parts(tag)
        if start is not None and not (prefix == "I" and this == kind):
            found.append((kind, start, i))
            start = None
        if prefix == "B":
            start, kind = i, this
    return found


def iob2(tags, found=entities):
    """The tags of a sentence in IOB2, from any scheme with prefixes. found: the function that finds the entities."""
    result = ["O"] * len(tags)
    for kind, start, end in found(tags):
        result[start:end] = [f"B-{kind}", *[f"I-{kind}"] * (end - start - 1)]
    return result


def detect(sentences):
    """(scheme, remark or None) of an iterable of sentences' tags. Raises ValueError for a mixture of schemes.

    Tags of which none has a prefix are plain. Tags that are all O are IOB2.
    """
    letters, bare = {}, None
    begins = Counter()
    for tags in sentences:
        before, before_type = "O", ""
        for tag in tags:
            match = _TAG.fullmatch(tag)
            if match is not None:
                letters.setdefault((match[1], match[2] is None), tag)
            elif tag != "O" and bare is None:
                bare = tag
            prefix, kind = parts(tag)
            # where IOB1 and IOB2 differ
            if before == "O" or kind != before_type:
                begins[prefix] += 1
            before, before_type = prefix, kind
    # "B" without a type is a tag only where no tag has one
    bare = next((tag for (_, is_bare), tag in letters.items() if is_bare), None) if bare is None else bare
    with_type = {letter: tag for (letter, is_bare), tag in letters.items() if not is_bare}
    if bare is not None and not with_type:
        is_iob = all(is_bare for _, is_bare in letters) and ("B", True) in letters and bare in dict.fromkeys("BIESLUM")
        if not is_iob:
            return "plain", None
        with_type = {letter: tag for (letter, _), tag in letters.items()}
    elif bare is not None:
        tag = with_type.get("B") or with_type.get("I")
        if tag is None:
            return "plain", None
        raise ValueError(f"some tags have a prefix ({tag!r}) and some have none ({bare!r}): expected one scheme")
    iobes, bilou = ([with_type[x] for x in pair if x in with_type] for pair in ("ES", "LU"))
    if iobes and bilou:
        raise ValueError(f"the tags {iobes[0]!r} (IOBES) and {bilou[0]!r} (BILOU) are of two schemes: expected one")
    if iobes or bilou:
        return ("IOBES" if iobes else "BILOU"), None
    if not begins["I"]:
        return "IOB2", None
    if not begins["B"]:
        return "IOB1", None
    return "IOB1", (
        f"{begins['B']:,} entities begin with B- (IOB2) and {begins['I']:,} with I- (IOB1): every I- that follows "
        "nothing of its type is read as a beginning"
    )


def entity_counts(gold, found):
    """Of a sentence's entities (type, start, end), by type: how many there are, are found, are found rightly."""
    gold, found = set(gold), set(found)
    return tuple(Counter(kind for kind, *_ in some) for some in (gold, found, gold & found))


def entity_scores(counts):
    """{"precision", "recall", "f1", "macro_f1", "per_class"} of the `entity_counts` of some sentences.

    An entity is right if type, start and end are. per_class: {type: {precision, recall, f1, support}}. macro_f1: the
    mean over the types that occur in gold or found. What has no denominator is 0.
    """
    support, predicted, right = Counter(), Counter(), Counter()
    for one in counts:
        for total, counter in zip((support, predicted, right), one, strict=True):
            total.update(counter)
    per_class = {
        kind: _rates(right[kind], predicted[kind], support[kind]) | {"support": support[kind]}
        for kind in sorted(support | predicted)
    }
    scores = [one["f1"] for one in per_class.values()]
    total = _rates(right.total(), predicted.total(), support.total())
    return total | {"macro_f1": sum(scores) / len(scores) if scores else 0.0, "per_class": per_class}


def _rates(right, predicted, support):
    return {
        "precision": right / predicted if predicted else 0.0,
        "recall": right / support if support else 0.0,
        "f1": 2 * right / (predicted + support) if predicted + support else 0.0,
    }
