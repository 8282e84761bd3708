"""What `fastbert finetune` refuses: one line, exit code 2, before any training."""

import json

import pytest
from click.testing import CliRunner
from labelled import sentences, write_csv, write_jsonl

from fastbert.cli import main

GOOD = sentences(20)


def finetune(encoder, place, *options):
    """The one line of an error."""
    arguments = ["finetune", "--model", encoder, "--output-dir", place / "run", "--max-steps", 1, *options]
    result = CliRunner().invoke(main, [str(argument) for argument in arguments], prog_name="fastbert")
    assert result.exit_code == 2, result.output
    *said, error = result.stderr.splitlines()
    assert error.startswith("fastbert: error: ") and not [line for line in said if "error" in line]
    assert not (place / "run" / "metrics.jsonl").exists(), "it ended before training"
    return error


@pytest.mark.parametrize(
    ("rows", "header", "options", "parts"),
    [
        (GOOD, ("body", "label"), [], ["train.csv has no column 'text': it has 'body', 'label'", "--text-column"]),
        (GOOD, ("text", "topic"), ["--task", "classify"], ["has no column 'label': it has 'topic'", "--label-column"]),
        (GOOD, ("text", "label"), ["--label-column", "topic"], ["no column 'topic'"]),
        (GOOD, ("text", "label"), ["--group-column", "user"], ["no column 'user'", "--group-column"]),
        ([("a", "x"), ("b", "x")], ("text", "label"), [], ["has 1 class, 'x'"]),
        ([(" ", "x"), ("", "y")], ("text", "label"), [], ["has no usable row", "2 rows skipped", "'text' is empty"]),
        ([("a", "1"), ("b", "nan"), ("c", "")], ("text", "score"), [], ["line 3: 'score' is 'nan'", "1 more bad row"]),
        ([("a", "x"), ("A ", "x"), ("a", "y")], ("text", "label"), [], ["too few different texts", "--eval-share 0"]),
        (GOOD, ("text", "label"), ["--task", "tell"], ["--task is 'tell': expected one of classify"]),
        (GOOD, ("text", "label"), ["--metric", "bleu"], ["--metric is 'bleu': expected one of accuracy"]),
        (GOOD, ("text", "label"), ["--metric", "f1"], ["of two labels: there are 3"]),
        (GOOD, ("text", "label"), ["--class-weights", "cow=2"], ["has 'cow=2': expected", "'bird', 'cat', 'dog'"]),
        (GOOD, ("text", "label"), ["--max-seq-length", "65"], ["--max-seq-length is 65", "64 positions"]),
        (GOOD, ("text", "label"), ["--max-seq-length", "16", "--stride", "14"], ["--stride is 14", "14 tokens"]),
        (GOOD, ("text", "label"), ["--model", "nowhere"], ["--model nowhere: no such directory"]),
        (GOOD, ("text", "label"), ["--model", "bert-tiny"], ["--tokenizer is missing: --model bert-tiny has none"]),
        (GOOD, ("text", "label"), ["--epochs", "1"], ["more than one of --max-steps, --epochs"]),
        (GOOD, ("text", "label"), ["--train-file", "none.csv"], ["no such file or folder: none.csv"]),
    ],
)  # fmt: skip
def test_one_line(rows, header, options, parts, encoder, tmp_path):
    path = write_csv(tmp_path / "train.csv", rows, header)
    error = finetune(encoder, tmp_path, "--train-file", path, *options)
    for part in parts:
        assert part in error, error


def test_a_label_that_training_has_not_seen(encoder, tmp_path):
    train, dev = write_csv(tmp_path / "train.csv", GOOD), write_csv(tmp_path / "dev.csv", [*GOOD, ("a", "cow")])
    error = finetune(encoder, tmp_path, "--train-file", train, "--eval-file", dev)
    assert "dev.csv line 22: the label 'cow' is not one of the model's 3: 'bird', 'cat', 'dog'" in error
    # ids where names were promised
    dev = write_jsonl(tmp_path / "dev.jsonl", [{"text": "a", "label": 1}])
    assert "dev.jsonl line 1: the label '1' is not one" in finetune(
        encoder, tmp_path, "--train-file", train, "--eval-file", dev
    )


def test_a_vocabulary_that_does_not_fit(encoder, tmp_path):
    config = json.loads((encoder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"vocab_size": 100}))
    path = write_csv(tmp_path / "train.csv", GOOD)
    error = finetune(
        encoder, tmp_path, "--train-file", path, "--model", tmp_path / "config.json", "--tokenizer", encoder
    )
    assert "the tokenizer has 140 pieces: the model has a vocab_size of 100" in error


def test_a_directory_that_holds_a_run(encoder, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "model.safetensors").write_bytes(b"")
    path = write_csv(tmp_path / "train.csv", GOOD)
    assert "holds another run (model.safetensors)" in finetune(encoder, tmp_path, "--train-file", path)


def test_a_list_is_no_group_and_no_id(encoder, tmp_path):
    rows = [{"text": text, "label": label, "user": [1]} for text, label in GOOD]
    path = write_jsonl(tmp_path / "groups.jsonl", rows)
    error = finetune(encoder, tmp_path, "--train-file", path, "--group-column", "user")
    assert "line 1: the group 'user' is '[1]': expected text or a number" in error
    row = {"id": ["a"], "question": "who?", "context": "a cat", "answers": "cat"}
    error = finetune(encoder, tmp_path, "--train-file", write_jsonl(tmp_path / "ids.jsonl", [row]))
    assert "ids.jsonl line 1: the id is \"['a']\": expected text or a number" in error


@pytest.mark.parametrize("value", ["1e18", "-1e300", "9" * 400])
def test_a_score_whose_square_is_not_finite(value, encoder, tmp_path):
    path = write_csv(tmp_path / "train.csv", [("a", "1"), ("b", value)], ("text", "score"))
    assert "line 3: 'score' is" in (error := finetune(encoder, tmp_path, "--train-file", path))
    assert "expected a number below 1e18" in error


def test_a_column_of_words_is_none_of_tags(encoder, tmp_path):
    (tmp_path / "train.txt").write_text("a O\nb B-X\n\n" * 4)
    error = finetune(encoder, tmp_path, "--train-file", tmp_path / "train.txt", "--label-column", "1")
    assert "--label-column is '1': " in error and "train.txt has the words in that column" in error


def test_questions_without_anything_to_learn(encoder, tmp_path):
    rows = [{"question": f"who {i}?", "context": f"a cat {i}", "answers": "dog"} for i in range(9)]
    error = finetune(encoder, tmp_path, "--train-file", write_jsonl(tmp_path / "train.jsonl", rows))
    assert "none of the 8 examples to train on has something to learn" in error
