"""Folders of BEIR, and files of rankings.

    corpus.jsonl       "_id", "title" (may be missing), "text"
    queries.jsonl      "_id", "text"
    qrels/test.tsv     query, document, grade; or query, 0, document, grade (TREC); with a header line or without
    run.trec           query, Q0, document, rank, score, name

Any of them may be .gz. Ids are texts: 7 and "7" are the same.
"""

import math
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from ..data import tables
from ..tasks.examples import clean
from .embedding import identity_of, joined

_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")


@dataclass
class Folder:
    """What a folder of BEIR asks for.

    queries: {id: text} of those with a relevant document. grades: {query: {document: grade}} of these. documents: the
    ids of the corpus, in its order. remarks: what else there is to say, a line each.
    """

    path: Path
    queries: dict[str, str]
    grades: dict[str, dict[str, float]]
    documents: list[str]
    remarks: list[str] = field(default_factory=list)

    def corpus(self) -> Iterator[tuple[int, str, str]]:
        """(line, id, text) of each document."""
        return _rows(_file(self.path, "corpus"), True)


def is_folder(path: str | os.PathLike) -> bool:
    return os.path.isdir(path)


def read_folder(path: str | os.PathLike) -> Folder:
    """The Folder at a path. Raises ValueError for what is missing, an id twice, and qrels of other queries alone."""
    path = Path(path)
    corpus, queries, remarks = _file(path, "corpus"), {}, []
    source = _file(path, "queries")
    for number, identity, text in _rows(source, False):
        if identity in queries:
            raise ValueError(f"{source} line {number}: the id {identity!r} is there twice")
        queries[identity] = text
    qrels = _qrels(path)
    grades = read_qrels(qrels)
    unknown = grades.keys() - queries.keys()
    if not grades.keys() & queries.keys():
        raise ValueError(f"{qrels}: none of its {len(grades):,} queries is in {source}")
    judged = {document for one in grades.values() for document in one}
    documents, empty, seen = [], 0, set()
    for number, identity, text in _rows(corpus, True):
        if identity in seen:
            raise ValueError(f"{corpus} line {number}: the id {identity!r} is there twice")
        seen.add(identity)
        documents.append(identity)
        empty += not text
    if not documents:
        raise ValueError(f"{corpus} has no documents")
    if judged.isdisjoint(seen):
        raise ValueError(f"{qrels}: none of its {len(judged):,} documents is in {corpus}")
    kept = {name: one for name, one in grades.items() if name in queries and any(grade > 0 for grade in one.values())}
    if not kept:
        raise ValueError(f"{qrels}: no query of {source} has a relevant document, with a grade above 0")
    _count(remarks, len(unknown), f"queries of {qrels.name} are not in {source.name}: left out", unknown)
    _count(remarks, len(judged - seen), f"documents of {qrels.name} are not in {corpus.name}", judged - seen)
    without = queries.keys() - kept.keys()
    _count(remarks, len(without), "queries without a relevant document are left out", without)
    blank = [name for name in kept if not queries[name].strip()]
    _count(remarks, len(blank), "queries are empty, and searched as any other", blank)
    _count(remarks, empty, "documents are empty")
    return Folder(path, {name: text for name, text in queries.items() if name in kept}, kept, documents, remarks)


def read_qrels(path: str | os.PathLike) -> dict[str, dict[str, float]]:
    """{query: {document: grade}} of a file of three or four columns. Raises ValueError with the line."""
    found, width = {}, None
    for number, line in tables.lines(path):
        # blanks are part of an id where there are tabs
        cells = [cell.strip() for cell in line.split("\t")] if "\t" in line else line.split()
        if not any(cells):
            continue
        if width is None:
            width = len(cells)
            if width not in (3, 4):
                raise ValueError(f"{path} line {number} has {width} columns: expected query, document, grade")
            if not _NUMBER.fullmatch(cells[-1]):
                continue
        if len(cells) != width or not _NUMBER.fullmatch(cells[-1]) or not cells[0] or not cells[-2]:
            raise ValueError(f"{path} line {number} is {line[:60]!r}: expected {width} columns, the last a grade")
        query, document, grade = cells[0], cells[-2], float(cells[-1])
        if found.setdefault(query, {}).setdefault(document, grade) != grade:
            raise ValueError(f"{path} line {number}: {document!r} has two grades for {query!r}")
    if not found:
        raise ValueError(f"{path} has no rows")
    return found


def read_run(path: str | os.PathLike) -> dict[str, list[str]]:
    """{query: its documents, the best first} of a run of TREC. Raises ValueError with the line."""
    found = {}
    for number, line in tables.lines(path):
        cells = line.split("\t") if "\t" in line else line.split()
        if not any(cells):
            continue
        score = cells[4].strip() if len(cells) == 6 else ""
        if not _NUMBER.fullmatch(score) or not math.isfinite(float(score)):
            raise ValueError(f"{path} line {number} is {line[:60]!r}: expected query, Q0, document, rank, score, name")
        own = found.setdefault(cells[0], {})
        if cells[2] in own:
            raise ValueError(f"{path} line {number}: {cells[2]!r} is there twice for {cells[0]!r}")
        own[cells[2]] = float(score)
    if not found:
        raise ValueError(f"{path} has no rows")
    return {query: ranked(scores) for query, scores in found.items()}


def ranked(scores: dict[str, float]) -> list[str]:
    """Ids by score, and of equal scores the greater id first, as trec_eval has it."""
    return sorted(scores, key=lambda name: (scores[name], name), reverse=True)


def run_lines(rankings: dict[str, dict[str, float]], name: str) -> Iterator[str]:
    for query, scores in rankings.items():
        for rank, document in enumerate(ranked(scores), 1):
            yield f"{query}\tQ0\t{document}\t{rank}\t{scores[document]!r}\t{name}\n"


def _file(folder, stem):
    found = [path for end in ("jsonl", "jsonl.gz") if (path := folder / f"{stem}.{end}").is_file()]
    if not found:
        raise ValueError(f"{folder} has no {stem}.jsonl: expected a folder of BEIR, with corpus, queries and qrels")
    return found[0]


def _qrels(folder):
    found = sorted([*(folder / "qrels").glob("*.tsv"), *(folder / "qrels").glob("*.tsv.gz")])
    found = [path for path in found if path.name.startswith("test.")] or found
    if len(found) != 1:
        what = f"has {', '.join(path.name for path in found)}" if found else "has no .tsv"
        raise ValueError(f"{folder / 'qrels'} {what}: expected test.tsv")
    return found[0]


def _rows(path, has_title):
    for number, row in tables.rows(path):
        identity, text = str(identity_of(path, number, row)), row.get("text")
        title = row.get("title") if has_title else None
        for name, value in (("text", text), ("title", title)):
            if not isinstance(value, str) and (name == "text" or value is not None):
                raise ValueError(f"{path} line {number}: {name!r} is {str(value)[:40]!r}: expected text")
        yield number, identity, clean(joined([title, text]) if has_title else text)


def _count(remarks, count, text, names=()):
    if count:
        named = f", such as {min(names)!r}" if names else ""
        remarks.append(f"{count:,} {text}{named}")
