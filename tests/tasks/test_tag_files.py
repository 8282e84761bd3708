"""Files of tags: columns, tables, spans; schemes are found, faults are named."""

import pytest
from labelled import write_jsonl

from fastbert.tasks import schemes, table, tag
from fastbert.tasks.examples import Spec, read_files

COLUMNS = {
    "iob2": ("-DOCSTART- -X- O\n\nUna NN B-PER\nReed NN I-PER\nmet VB O\n \nKiel NN B-LOC\n", "IOB2"),
    "iob1": ("Una NN I-PER\nReed NN I-PER\nmet VB O\n\n\nKiel NN I-LOC", "IOB1"),
    "iobes": ("\ufeffUna NN B-PER\r\nReed NN E-PER\r\nmet VB O\r\n\r\nKiel NN S-LOC\r\n", "IOBES"),
    "bilou": ("Una NN B-PER\nReed NN L-PER\nmet VB O\n\nKiel NN U-LOC\n", "BILOU"),
    "tabs": ("# a comment\nUna\tNN\tB-PER\nReed\tNN\tI-PER\nmet\tVB\tO\n\t\nKiel\tNN\tB-LOC\n", "IOB2"),
}
TAGS = [["B-PER", "I-PER", "O"], ["B-LOC"]]


def read(path, spec=None, **wants):
    spec = Spec("tag") if spec is None else spec
    examples, (notes,) = read_files(tag, [str(path)], spec, **wants)
    return examples, spec, notes


@pytest.mark.parametrize("name", COLUMNS)
def test_every_scheme_becomes_iob2(name, tmp_path):
    text, scheme = COLUMNS[name]
    path = tmp_path / "train.txt"
    path.write_bytes(text.encode())
    assert table.detect(str(path)) == "tag"
    examples, spec, notes = read(path)
    assert [example.texts for example in examples] == [("Una", "Reed", "met"), ("Kiel",)]
    assert [example.gold for example in examples] == TAGS
    # I-LOC too, which this file has not
    assert spec.labels == ("B-LOC", "B-PER", "I-LOC", "I-PER", "O")
    assert spec.settings["scheme"] == scheme and scheme in notes.said()
    # another file has a scheme of its own
    other = tmp_path / "dev.txt"
    other.write_text(COLUMNS["bilou"][0])
    assert [example.gold for example in read(other, spec)[0]] == TAGS


def test_blanks_of_other_kinds_are_part_of_a_word(tmp_path):
    path = tmp_path / "train.txt"
    path.write_text("7\u00a0500 O\na\u2028b B-X\n")
    assert read(path)[0][0].texts == ("7\u00a0500", "a\u2028b")


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("Una B-PER\nReed\n", ("line 2", "1 column,", "has 2")),
        ("Una NN B-PER\nNew Ulm NN B-LOC\n", ("line 2", "4 columns", "has 3")),
        ("\nUna O\nReed I-\n", ("line 3", "'I-'", "no type")),
        ("Una B-PER\nReed PER\n", ("'B-PER'", "'PER'")),
        ("Una S-PER\nReed L-PER\n", ("'S-PER'", "'L-PER'")),
        ("Una\nReed\n", ("line 1", "one column")),
    ],
)
def test_a_malformed_file_is_refused(text, names, tmp_path):
    path = tmp_path / "bad.conll"
    path.write_text(text)
    with pytest.raises(ValueError) as error:
        read(path)
    assert all(name in str(error.value) for name in ("bad.conll", *names)), error.value


def test_parts_of_speech_are_plain_tags_in_any_column(tmp_path):
    path = tmp_path / "train.txt"
    path.write_text("Una NN B-PER\nmet VB O\n")
    spec = Spec("tag", columns={"label": "2"})
    examples, spec, _ = read(path, spec)
    assert examples[0].gold == ["NN", "VB"] and spec.settings["scheme"] == "plain" and spec.metric == "accuracy"
    conllu = tmp_path / "train.conllu"
    lines = ["# sent_id = 1", "1-2\tdu\t_", "1\tde\tde\tADP", "2\tle\tle\tDET"]
    conllu.write_text("\n".join(line + "\t_" * (9 - line.count("\t")) * ("\t" in line) for line in lines))
    examples, spec, _ = read(conllu)
    assert (examples[0].texts, examples[0].gold) == (("de", "le"), ["ADP", "DET"])
    with pytest.raises(ValueError, match="--metric f1 is that of entities"):
        read(conllu, Spec("tag", metric="f1"))


def test_a_scheme_that_is_given_counts(tmp_path):
    path = tmp_path / "train.txt"
    path.write_text("Una I-PER\nmet O\nKiel B-LOC\nHarbour I-LOC\n")
    examples, _, notes = read(path)
    assert examples[0].gold == ["B-PER", "O", "B-LOC", "I-LOC"] and "IOB1" in notes.said()
    read_as = {name: read(path, Spec("tag", settings={"read_as": name}))[0][0].gold for name in ("IOB2", "plain")}
    assert read_as == {"IOB2": ["O", "O", "B-LOC", "I-LOC"], "plain": ["I-PER", "O", "B-LOC", "I-LOC"]}


def test_a_type_that_training_did_not_have(tmp_path):
    path = tmp_path / "train.txt"
    path.write_text(COLUMNS["iob2"][0])
    _, spec, _ = read(path)
    path.write_text("Una B-per\n")
    assert read(path, spec)[0][0].gold == ["B-PER"]
    path.write_text("Una O\nAcme B-ORG\n")
    with pytest.raises(ValueError, match="'B-ORG' is not one of the model's 5"):
        read(path, spec)


def test_tables_of_words(tmp_path):
    good = {"id": "a", "tokens": ["New Ulm", "grows"], "ner_tags": ["B-LOC", "O"]}
    path = write_jsonl(tmp_path / "train.jsonl", [good])
    assert table.detect(str(path)) == "tag"
    assert (read(path)[0][0].texts, read(path)[0][0].gold) == (("New Ulm", "grows"), ["B-LOC", "O"])
    for bad, names in (
        ({"tokens": ["x", "y"], "ner_tags": ["O"]}, "line 2: 2 words and 1 tags"),
        ({"tokens": ["x"], "ner_tags": [0]}, "line 2: the tag 0 is a number"),
        ({"tokens": ["x"], "ner_tags": [None]}, "line 2: the tag None"),
        ({"tokens": ["x", 3], "ner_tags": ["O", "O"]}, "line 2: 'tokens'"),
        ({"tokens": ["x"], "ner_tags": ["B-"]}, "line 2: the tag 'B-'"),
    ):
        with pytest.raises(ValueError, match=names):
            read(write_jsonl(path, [good, bad]))
    assert [example.gold for example in read(write_jsonl(path, [{"tokens": ["x"]}]), wants_gold=False)[0]] == [None]


def test_spans_of_characters(tmp_path):
    text = "\U0001f600 In Cafe\u0301 Ulm, now"
    rows = [
        {"text": text, "spans": [[4, 14, "ORG"]]},
        {"text": text, "spans": [{"start": 5, "end": 10, "label": "LOC", "text": "Cafe\u0301"}]},
        {"text": "nothing", "spans": []},
    ]
    examples, spec, notes = read(write_jsonl(tmp_path / "train.jsonl", rows))
    assert [e.gold for e in examples] == [[(5, 14, "ORG")], [(5, 10, "LOC")], []]
    assert text[5:14] == "Cafe\u0301 Ulm" and "which were cut off: 1, line 1" in notes.said()
    assert spec.labels == ("B-LOC", "B-ORG", "I-LOC", "I-ORG", "O")


@pytest.mark.parametrize(
    ("spans", "names"),
    [
        ([{"start": 6, "end": 11, "label": "LOC", "text": "Cafe\u0301"}], "UTF-16"),
        ([[5, 14, "ORG"], [11, 14, "LOC"]], "'Ulm' .LOC. overlap"),
        ([[5, 99, "ORG"]], "5 to 99 is empty or outside"),
        ([[5, 5, "ORG"]], "5 to 5 is empty"),
        ([[5, 14]], "expected .start, end, type."),
        ([[5, 14, ""]], "type ''"),
        (None, "expected a list of spans"),
    ],
)
def test_a_faulty_span_is_refused(spans, names, tmp_path):
    path = write_jsonl(tmp_path / "bad.jsonl", [{"text": "\U0001f600 In Cafe\u0301 Ulm, now", "spans": spans}])
    with pytest.raises(ValueError, match=f"bad.jsonl line 1: .*{names}"):
        read(path)


def test_entities_are_those_of_conlleval():
    gold = ["B-A", "I-A", "O", "I-B", "B-B", "I-A", "O"]
    assert schemes.entities(gold) == [("A", 0, 2), ("B", 3, 4), ("B", 4, 5), ("A", 5, 6)]
    assert schemes.strict_entities(gold) == [("A", 0, 2), ("B", 4, 5)]
    assert schemes.entities(["S-A", "I-A", "E-A", "E-A", "B-A", "L-A", "U-A"]) == [
        ("A", 0, 1), ("A", 1, 3), ("A", 3, 4), ("A", 4, 6), ("A", 6, 7)
    ]  # fmt: skip


def test_the_scores_are_those_of_seqeval():
    """The figures of seqeval 1.2.2, by default and with mode="strict", scheme=IOB2."""
    gold = [["B-A", "I-A", "O", "B-B"], ["B-B", "I-B", "O"], ["O", "O"]]
    found = [["B-A", "I-A", "O", "I-B"], ["B-B", "I-A", "O"], ["O", "B-C"]]
    loose, strict = (
        schemes.entity_scores(schemes.entity_counts(schemes.entities(a), reading(b)) for a, b in zip(gold, found))
        for reading in (schemes.entities, schemes.strict_entities)
    )
    assert (loose["precision"], loose["recall"]) == (2 / 5, 2 / 3) and loose["f1"] == pytest.approx(0.5)
    assert (strict["precision"], strict["recall"]) == (1 / 3, 1 / 3)
    assert loose["per_class"]["C"] == {"precision": 0.0, "recall": 0.0, "f1": 0.0, "support": 0}
    assert loose["macro_f1"] == pytest.approx((2 / 3 + 1 / 2 + 0) / 3)
    seqeval = pytest.importorskip("seqeval.metrics")
    assert loose["f1"] == pytest.approx(seqeval.f1_score(gold, found))
