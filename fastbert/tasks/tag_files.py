"""Files of tagged words: CoNLL's columns, tables of words and tags, tables of texts and character spans.

All yield Examples. Those with words have them as texts, tags by word as gold, and more["words"]: "lines" where each
word has its line, else "row". Those with a text have spans (start, end, type) of its characters as gold.
"""

import re

from ..data import tables
from .examples import Example

WORDS = ("tokens", "words", "text", "sentence", "content")
TAGS = ("tags", "ner_tags", "pos_tags", "spans", "entities", "labels", "label")
DOCUMENT = "-DOCSTART-"
_BLANKS = " \t"


def examples(path, spec, notes, wants_gold):
    """The Examples of a file of any of the three kinds, with tags as the file spells them."""
    if tables.kind(path) not in tables.KINDS:
        return _columns(path, spec.columns.get("label"), notes, wants_gold)
    return _rows(path, spec, notes, wants_gold)


def _columns(path, column, notes, wants_gold):
    """A word a line, its tag in the last column, a blank line after each sentence; CoNLL-U's FORM and UPOS.

    column: the number of the tags' column, from 1, if it is not the last.

    Columns are split at tabs, or at blanks in a file without tabs. A file split at tabs may have comments: lines that
    begin with "# " and have no tab.
    """
    has_tabs = any("\t" in line for _, line in tables.lines(path))
    width, is_conllu = None, False
    words, tags, first = [], [], 0
    for number, line in tables.lines(path):
        if has_tabs and line.startswith("# ") and "\t" not in line:
            continue
        cells = line.split("\t") if has_tabs else [cell for cell in line.split(" ") if cell]
        if not line.strip(_BLANKS) or cells[0] == DOCUMENT:
            if words:
                yield _sentence(first, words, tags if wants_gold else None)
            words, tags = [], []
            continue
        if width is None:
            width = len(cells)
            # a sentence begins with the word 1, and the seventh column names its head
            is_conllu = width == 10 and re.fullmatch(r"1|1-[0-9]+|0\.1", cells[0]) is not None
            is_conllu = is_conllu and re.fullmatch(r"[0-9]+|_", cells[6]) is not None
            if width == 1 and wants_gold:
                notes.bad(number, f"one column, {cells[0][:40]!r}: expected a word and its tag")
                return
            if column is None:
                tag_at = 3 if is_conllu else width - 1
            elif wants_gold and not (column.isdecimal() and 1 <= int(column) <= width):
                raise ValueError(f"--label-column is {column!r}: {path} has columns 1 to {width}")
            else:
                tag_at = int(column) - 1 if wants_gold else 0
            if wants_gold and tag_at == (1 if is_conllu else 0):
                raise ValueError(f"--label-column is {column!r}: {path} has the words in that column")
        if len(cells) != width:
            plural = "" if len(cells) == 1 else "s"
            hint = " (a blank inside a word?)" if len(cells) > width and not has_tabs else ""
            notes.bad(number, f"{len(cells)} column{plural}, the file has {width}{hint}")
            continue
        if is_conllu and not cells[0].isdecimal():
            # a contraction, or a word that is not in the text: its parts follow
            continue
        word, tag = cells[1 if is_conllu else 0], cells[tag_at]
        if not word or not tag:
            notes.bad(number, "a word or a tag is empty")
            continue
        first = first if words else number
        words.append(word)
        tags.append(tag)
    if words:
        yield _sentence(first, words, tags if wants_gold else None)


def _sentence(number, words, tags):
    return Example(number, tuple(words), tags, more={"words": "lines"})


def _rows(path, spec, notes, wants_gold):
    found = tables.columns(path)
    named, label = spec.columns.get("texts", ()), spec.columns.get("label")
    text = next((one for one in [*named, *WORDS] if one in found), None)
    if text is None or (named and text != named[0]):
        raise ValueError(f"{path} has no column {[*named, 'tokens'][0]!r}: it has {', '.join(map(repr, found))}")
    gold = next((one for one in [*([label] if label else []), *TAGS] if one in found and one != text), None)
    if wants_gold and (gold is None or (label and gold != label)):
        raise ValueError(f"{path} has no column {label or 'tags'!r}: it has {', '.join(map(repr, found))}")
    kinds, group = {}, spec.columns.get("group")
    for number, row in tables.rows(path, notes.skip):
        value, marks, of = row.get(text), row.get(gold), row.get(group) if group else None
        if isinstance(value, str):
            if not wants_gold:
                yield Example(number, (value,), id=row.get("id"), group=of)
            elif not value.strip():
                notes.skip(number, f"{text!r} is empty")
            elif (spans := _spans(number, value, marks, gold, notes)) is not None:
                yield Example(number, (value,), spans, id=row.get("id"), group=of)
            continue
        if not isinstance(value, list) or not all(isinstance(word, str) for word in value):
            notes.bad(number, f"{text!r} is {str(value)[:40]!r}: expected a list of words, or a text")
        elif not wants_gold:
            yield Example(number, tuple(value), None, row.get("id"), of, {"words": "row"})
        elif not value:
            notes.skip(number, f"{text!r} has no words")
        elif (tags := _tags(number, value, marks, gold, kinds, notes)) is not None:
            yield Example(number, tuple(value), tags, row.get("id"), of, {"words": "row"})


def _tags(number, words, tags, column, kinds, notes):
    """The tags of a row as text, None if they are faulty."""
    if not isinstance(tags, list):
        notes.bad(number, f"{column!r} is {str(tags)[:40]!r}: expected a list of {len(words)} tags")
    elif len(tags) != len(words):
        notes.bad(number, f"{len(words)} words and {len(tags)} tags: expected one for each word")
    elif not all(isinstance(tag, str) and tag or type(tag) is int for tag in tags):
        wrong = next(tag for tag in tags if not (isinstance(tag, str) and tag or type(tag) is int))
        notes.bad(number, f"the tag {wrong!r}: expected a name or a whole number")
    elif any(type(tag) is not kinds.setdefault("tag", type(tags[0])) for tag in tags):
        names = ("a name", "numbers") if kinds["tag"] is int else ("a number", "names")
        wrong = next(tag for tag in tags if type(tag) is not kinds["tag"])
        notes.bad(number, f"the tag {wrong!r} is {names[0]}, the first row has {names[1]}: expected one type")
    else:
        return [str(tag) for tag in tags]
    return None


def _spans(number, text, spans, column, notes):
    """The spans (start, end, type) of a text, ascending; None if one is faulty."""
    if not isinstance(spans, list):
        notes.bad(number, f"{column!r} is {str(spans)[:40]!r}: expected a list of spans, [] for none")
        return None
    found = set()
    for span in spans:
        said = None
        if isinstance(span, dict):
            said = span.get("text")
            span = [span.get("start"), span.get("end"), span.get("label", span.get("type"))]
        if not (isinstance(span, list) and len(span) == 3 and type(span[0]) is int and type(span[1]) is int):
            notes.bad(number, f"the span {str(span)[:60]}: expected [start, end, type] or start, end and label")
            return None
        start, end, kind = span
        if not isinstance(kind, str) or not kind.strip():
            notes.bad(number, f"the span {span} has the type {kind!r}: expected a name")
            return None
        if not 0 <= start < end <= len(text):
            notes.bad(number, f"the span {start} to {end} is empty or outside of the text's {len(text)} characters")
            return None
        surface = text[start:end]
        if said is not None and said != surface:
            hint = "expected offsets in characters (code points), not in bytes or UTF-16"
            notes.bad(number, f"the span {start} to {end} is {surface!r}, the row says {str(said)[:40]!r}: {hint}")
            return None
        if not surface.strip():
            notes.bad(number, f"the span {start} to {end} is blank")
            return None
        if surface != surface.strip():
            notes.remark("spans with blanks at their ends, which were cut off", f"line {number}")
        start += len(surface) - len(surface.lstrip())
        found.add((start, start + len(surface.strip()), kind.strip()))
    found = sorted(found)
    for one, other in zip(found, found[1:]):
        if other[0] < one[1]:
            pair = " and ".join(f"{text[s:e]!r} ({kind})" for s, e, kind in (one, other))
            notes.bad(number, f"the spans {pair} overlap: a word can have one tag")
            return None
    return found
