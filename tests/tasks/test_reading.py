"""What each task reads in a file: columns, labels, numbers; what ends the run, what is left out, what is detected."""

import pytest
from labelled import write_csv, write_jsonl

from fastbert.tasks import table
from fastbert.tasks.examples import Notes, Spec, read_files


def read(name, path, wants_gold=True, **spec):
    spec, notes = Spec(name, **spec), Notes(path)
    return list(table.task(name).read(path, spec, notes, wants_gold=wants_gold)), notes, spec


def glue(tmp_path, folder, file, text):
    (tmp_path / folder).mkdir()
    path = tmp_path / folder / file
    path.write_text(text, encoding="utf-8")
    return path


def test_a_pair_a_name_and_an_empty_text(tmp_path):
    path = write_csv(
        tmp_path / "a.csv", [("1", "A b", "yes ", "C"), ("2", "D", "no", " "), ("3", "NA", "yes", "null")],
        ("id", "premise", "label", "hypothesis"),
    )  # fmt: skip
    examples, notes, spec = read("classify", path)
    assert [(e.texts, e.gold, e.id) for e in examples] == [(("A b", "C"), "yes", "1"), (("NA", "null"), "yes", "3")]
    assert notes.skipped == [(3, "'hypothesis' is empty")] and "1 rows skipped, lines 3" in notes.said()
    assert spec.columns == {"texts": ["premise", "hypothesis"], "label": "label"}
    # predictions have a row for each row
    assert len(read("classify", path, wants_gold=False)[0]) == 3


def test_labels_are_one_sorted_map_of_the_training_file(tmp_path):
    train = write_csv(tmp_path / "train.csv", [("a", "tech"), ("b", "Art"), ("c", "sport")])
    dev = write_csv(tmp_path / "dev.csv", [("d", "art"), ("e", "tech")])
    task, spec = table.task("classify"), Spec("classify")
    read_files(task, [train], spec)
    assert spec.labels == ("Art", "sport", "tech")
    examples, _ = read_files(task, [dev], spec)
    assert [example.gold for example in examples] == ["Art", "tech"] and spec.labels == ("Art", "sport", "tech")
    write_csv(dev, [("d", "tech"), ("e", "music"), ("f", "news")])
    with pytest.raises(ValueError, match="dev.csv line 3: the label 'music' is not one of the model's 3.*and 1 more"):
        read_files(task, [dev], spec)


def test_label_ids_sort_as_numbers(tmp_path):
    spec, rows = Spec("classify"), [{"text": "x", "label": number} for number in (10, 9, 0)]
    read_files(table.task("classify"), [write_jsonl(tmp_path / "a.jsonl", rows)], spec)
    assert spec.labels == ("0", "9", "10")


@pytest.mark.parametrize(
    ("row", "fault"),
    [
        ({"text": "c", "label": 1}, "the label 1 is a number, the first has a name"),
        ({"text": "c", "label": True}, "'label' is True: expected a name or a whole number"),
        ({"text": "c", "label": 0.5}, "'label' is 0.5: expected a name"),
        ({"text": "c"}, "'label' is missing or empty"),
        ({"text": "c", "label": None}, "'label' is missing or empty"),
        ({"text": "c", "label": " "}, "'label' is missing or empty"),
        ({"text": 7, "label": "pos"}, "'text' is '7', a int: expected text"),
        ({"text": ["c"], "label": "pos"}, "a list: expected text"),
        ({"label": "pos"}, "'text' is 'None'"),
    ],
)
def test_faults_of_a_label_or_text(row, fault, tmp_path):
    good = {"text": "a", "label": "pos"}
    _, notes, _ = read("classify", write_jsonl(tmp_path / "a.jsonl", [good, row, good, row]))
    assert [number for number, _ in notes.faults] == [2, 4]
    with pytest.raises(ValueError, match="a.jsonl line 2: .*(and 1 more bad row)") as error:
        notes.check()
    assert fault in str(error.value)


def test_numbers_are_numbers(tmp_path):
    cells = ["1.5", "nan", "inf", "", "2,5", "3e0", "-1", "40%", "1_000", " 4 ", "0x10", "1e400"]
    path = write_csv(tmp_path / "a.csv", [("t", cell) for cell in cells], ("text", "score"))
    examples, notes, _ = read("regress", path)
    assert [example.gold for example in examples] == [1.5, 3.0, -1.0, 4.0]
    assert [number for number, _ in notes.faults] == [3, 4, 5, 6, 9, 10, 12, 13]
    assert notes.faults[0][1] == "'score' is 'nan': expected a number below 1e18"


def test_three_spellings_of_several_labels(tmp_path):
    files = [
        write_csv(tmp_path / "a.csv", [("a", "x;z"), ("b", ""), ("c", "y ; x")], ("text", "labels")),
        write_jsonl(
            tmp_path / "b.jsonl", [{"text": t, "labels": n} for t, n in zip("abc", (["x", "z"], [], ["y", "x"]))]
        ),
        write_csv(tmp_path / "c.csv", [("a", 1, 0, 1), ("b", 0, 0, 0), ("c", 1, 1, 0)], ("text", "x", "y", "z")),
    ]
    for path in files:
        assert table.detect(path) == "multilabel"
        examples, notes, spec = read("multilabel", path)
        assert [example.gold for example in examples] == [("x", "z"), (), ("x", "y")], path.name
        assert notes.labels == {"x", "y", "z"} and not notes.faults
        labels = [one[0].label for one in encoded(examples, spec, ("x", "y", "z"))]
        assert labels == [[1.0, 0.0, 1.0], [0.0, 0.0, 0.0], [1.0, 1.0, 0.0]]


def encoded(examples, spec, labels):
    class Whole:
        def whole(self, texts):
            return [[type("Encoding", (), {"ids": [1], "type_ids": [0]})] for _ in texts]

    spec.labels = labels
    return table.task(spec.task).encode(examples, Whole(), spec)


def test_bad_several_labels(tmp_path):
    path = write_csv(tmp_path / "c.csv", [("a", 1, 0), ("b", 2, 0), ("c", "", 1)], ("text", "x", "y"))
    assert read("multilabel", path)[1].faults == [(3, "'x' is '2': expected 0 or 1"), (4, "'x' is '': expected 0 or 1")]
    path = write_jsonl(tmp_path / "d.jsonl", [{"text": "a", "labels": [1.5]}, {"text": "b"}])
    assert [number for number, _ in read("multilabel", path)[1].faults] == [1, 2]


@pytest.mark.parametrize(
    ("columns", "task"),
    [
        (("text", "label"), "classify"),
        (("sentence1", "sentence2", "gold_label"), "classify"),
        (("text", "labels"), "multilabel"),
        (("sentence1", "sentence2", "score"), "regress"),
        (("question", "context", "answers"), "answer"),
        (("context", "choices", "label"), "choose"),
        (("tokens", "tags"), "tag"),
    ],
)
def test_the_task_is_seen_from_the_columns(columns, task, tmp_path):
    assert table.detect(write_jsonl(tmp_path / "a.jsonl", [dict.fromkeys(columns, "a")])) == task


def test_no_task_fits(tmp_path):
    with pytest.raises(ValueError, match="has the columns 'text', 'year': no task fits, name one with --task"):
        table.detect(write_csv(tmp_path / "a.csv", [("a", 1999)], ("text", "year")))


def test_glue_files(tmp_path):
    path = glue(tmp_path, "CoLA", "train.tsv", 'a\t1\t\tThe cup.\na\t0\t*\t"Who did?\n')
    examples, _, spec = read("classify", path)
    assert [(e.texts[0], e.gold) for e in examples] == [("The cup.", "1"), ('"Who did?', "0")]
    assert (table.detect(path), spec.metric) == ("classify", "mcc")
    path = glue(
        tmp_path, "STS-B", "dev.tsv", 'index\tyear\tsentence1\tsentence2\tscore\n0\t2015\tA "dog\tA dog\t4.750\n'
    )
    examples, _, spec = read(table.detect(path), path)
    assert [(e.texts, e.gold) for e in examples] == [(('A "dog', "A dog"), 4.75)] and spec.metric == "pearson"
    path = glue(
        tmp_path, "MNLI", "train.tsv",
        "index\tsentence1\tsentence2\tlabel1\tgold_label\n0\ta\tb\tneutral\tcontradiction\n1\tc\td\tneutral\t-\n",
    )  # fmt: skip
    examples, notes, _ = read("classify", path)
    assert [e.gold for e in examples] == ["contradiction"] and notes.skipped == [(3, "no gold label, '-'")]
    path = glue(tmp_path, "SST-2", "train.tsv", 'sentence\tlabel\n"a warm\t1\n"quoted" fine\t0\nends"\t1\n \t1\n')
    examples, notes, _ = read("classify", path)
    assert [e.texts[0] for e in examples] == ['"a warm', '"quoted" fine', 'ends"'] and [
        n for n, _ in notes.skipped
    ] == [5]
    test = tmp_path / "SST-2" / "test.tsv"
    test.write_text('index\tsentence\n0\t"what now\n')
    columns = {"texts": ["sentence"], "label": "label"}
    examples, _, _ = read("classify", test, wants_gold=False, labels=("0", "1"), columns=columns)
    assert [(e.texts, e.id) for e in examples] == [(('"what now',), "0")]


def test_how_a_tsv_is_read_is_said(tmp_path):
    path = glue(tmp_path, "RTE", "train.tsv", "index\tsentence1\tsentence2\tlabel\n0\ta\tb\tx\n")
    assert "read as a file of GLUE" in table.how_read(path)
    path = glue(tmp_path, "mine", "train.tsv", 'text\tlabel\n"a\tx\n')
    assert table.how_read(path).endswith("split at tabs, a quote is a letter")
    path.write_text('text\tlabel\n"a"\tx\n')
    assert table.how_read(path).endswith("split at tabs, quotes belong to the file")
    assert table.how_read(tmp_path / "a.csv") is None


def test_files_of_a_folder(tmp_path):
    for name in ("train.csv", "dev_matched.tsv", "dev_mismatched.tsv", "test.csv", "notes.txt", "train"):
        (tmp_path / name).write_text("x")
    train, evaluation = table.train_and_eval_files([str(tmp_path)], [])
    names = [[path.rpartition("/")[2] for path in files] for files in (train, evaluation)]
    assert names == [["train.csv"], ["dev_matched.tsv", "dev_mismatched.tsv"]]
    train, evaluation = table.train_and_eval_files([str(tmp_path)], [str(tmp_path / "test.csv")])
    assert [path.rpartition("/")[2] for path in evaluation] == ["test.csv"]
    with pytest.raises(FileNotFoundError, match="no such file or folder: .*none.csv"):
        table.train_and_eval_files([str(tmp_path / "none.csv")], [])
    with pytest.raises(ValueError, match="is both a file to train on and one to evaluate on"):
        table.train_and_eval_files([str(tmp_path)], [str(tmp_path / "train.csv")])
