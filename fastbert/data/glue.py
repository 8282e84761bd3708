"""The nine tasks of GLUE (Wang et al. 2018), as downloaded: which columns of their .tsv files mean what.

Their files have no quoting: a quote is a letter. CoLA's have no header line, but for the test file.
"""

import os
import re
from typing import NamedTuple


class Layout(NamedTuple):
    """texts, label: names of columns. task, metric: the task and its main score. names: the columns of a file without
    a header line. unlabelled: the value of a row that has no gold label."""

    texts: tuple
    label: str
    metric: str
    task: str = "classify"
    names: tuple | None = None
    unlabelled: str | None = None


LAYOUTS = {
    "cola": Layout(("sentence",), "label", "mcc", names=("source", "label", "mark", "sentence")),
    "sst2": Layout(("sentence",), "label", "accuracy"),
    "mrpc": Layout(("#1 String", "#2 String"), "Quality", "f1"),
    "qqp": Layout(("question1", "question2"), "is_duplicate", "f1"),
    "stsb": Layout(("sentence1", "sentence2"), "score", "pearson", task="regress"),
    "mnli": Layout(("sentence1", "sentence2"), "gold_label", "accuracy", unlabelled="-"),
    "qnli": Layout(("question", "sentence"), "label", "accuracy"),
    "rte": Layout(("sentence1", "sentence2"), "label", "accuracy"),
    "wnli": Layout(("sentence1", "sentence2"), "label", "accuracy"),
}


def layout_of(path, header):
    """The Layout of a .tsv file in a folder that is named as a task of GLUE; None for others. header: its columns.

    The first line of CoLA's files is no header: their Layout has names.
    """
    path = os.fspath(path)
    folder = os.path.basename(os.path.dirname(os.path.abspath(path)))
    words = re.split(r"[^a-z0-9]+", re.sub(r"(?i)(sst|sts)-(2|b)\b", r"\1\2", folder.lower()))
    found = next((LAYOUTS[word] for word in words if word in LAYOUTS), None)
    if found is None or not path.lower().endswith((".tsv", ".tsv.gz")):
        return None
    if found.names and len(header) == len(found.names) and "sentence" not in header:
        return found
    # the test files have the texts alone
    return found._replace(names=None) if set(found.texts) <= set(header) else None
