"""The tasks tag, answer and choose from a file to a model that transformers loads."""

import json
import random
import shutil

import numpy as np
import pytest
import torch
from labelled import small_encoder, write_jsonl

from fastbert.tasks import predictor
from fastbert.tasks.predictor import flat_figures
from fastbert.training.finetune import FinetuneConfig, finetune

CITIES, BEASTS = ("barns", "hills", "trees", "years"), ("cat", "dog", "bird")


def sentence(draw):
    city, beast = draw.choice(CITIES), draw.choice(BEASTS)
    return city, beast, f"every day the {beast} {draw.choice(('guards', 'builds', 'chases'))} the green {city} ."


def write_tags(path, draw, count):
    lines = []
    for _ in range(count):
        city, beast, text = sentence(draw)
        names = {beast: "S-BEAST", "green": "B-CITY", city: "E-CITY"}
        lines += [f"{word} {names.get(word, 'O')}" for word in text.split()] + [""]
    path.write_text("\n".join(lines))
    return path


def write_questions(path, draw, count):
    """The answer is the beast. A text without one, in which "mice" take its place, has no answer."""
    rows = []
    for number in range(count):
        _, beast, text = sentence(draw)
        answers = {"text": [beast], "answer_start": [text.index(beast)]}
        if draw.random() < 0.3:
            text, answers = text.replace(beast, "mice"), {"text": [], "answer_start": []}
        context = text + " in dark barns" * draw.randint(0, 4)
        rows.append({"id": str(number), "question": "the day ?", "context": context, "answers": answers})
    return write_jsonl(path, rows)


def write_choices(path, draw, count):
    """The right choice is the beast, of two or three. The first row says how many choices there are."""
    rows = []
    for number in range(count):
        _, beast, text = sentence(draw)
        choices = [beast, *draw.sample(CITIES, 1 + (number % 3 != 1))]
        draw.shuffle(choices)
        rows.append({"context": text, "choices": choices, "label": choices.index(beast)})
    return write_jsonl(path, rows)


WRITERS = {"tag": ("txt", write_tags), "answer": ("jsonl", write_questions), "choose": ("jsonl", write_choices)}


@pytest.fixture(scope="module", params=WRITERS)
def trained(request, tmp_path_factory):
    """(task, directory of the model, evaluation file, metrics)."""
    place = tmp_path_factory.mktemp(request.param)
    ending, write = WRITERS[request.param]
    draw = random.Random(0)
    files = [write(place / f"{name}.{ending}", draw, count) for name, count in (("train", 160), ("dev", 40))]
    base = small_encoder(place, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    metrics = finetune(FinetuneConfig(
        model=base, train_file=files[0], eval_file=files[1], output_dir=place / "run", learning_rate=3e-3, epochs=10,
        max_seq_length=20, stride=6, patience=99, eval_steps=50, save_steps=999, logging_steps=50,
    ))  # fmt: skip
    return request.param, place / "run", files[1], metrics


def test_a_run_learns_and_evaluate_and_predict_agree(trained, tmp_path):
    task, directory, file, metrics = trained
    scores = metrics["scores"]
    assert metrics["task"] == task
    if task == "tag":
        assert scores["f1"] > 0.95 and scores["strict_f1"] > 0.95
        assert json.loads((directory / "task.json").read_text())["settings"]["scheme"] == "IOBES"
    elif task == "answer":
        assert scores["f1"] > 90 and 4 < scores["NoAns_total"] < 30
    else:
        assert scores["accuracy"] > 0.9 > 0.6 > scores["chance"]
    model = predictor.load(directory)
    again = flat_figures(model.evaluate([file])["scores"])
    assert again == pytest.approx(flat_figures(scores)) and len(again) > 3
    model.predict_file(file, tmp_path / "out.jsonl")
    found = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    shown = [json.loads(line) for line in (directory / "predictions.jsonl").read_text().splitlines()]
    assert len(found) == len(shown) == 40
    for one, other in zip(found, shown, strict=True):
        for name in ("tags", "answer", "start", "choice"):
            assert one.get(name) == other.get(name)


def test_transformers_loads_the_directory(trained):
    transformers = pytest.importorskip("transformers")
    task, directory, file, _ = trained
    model = predictor.load(directory)
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    if task == "tag":
        text = "every day the cat guards the green hills ."
        theirs = transformers.pipeline("token-classification", model=str(directory), aggregation_strategy="first")(text)
        ours = model.predict([text])[0]["entities"]
        assert [(one["entity_group"], one["start"], one["end"]) for one in theirs] == [
            (one["label"], one["start"], one["end"]) for one in ours
        ] == [("BEAST", 14, 17), ("CITY", 29, 40)]  # fmt: skip
        return
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    if task == "answer":
        theirs = transformers.AutoModelForQuestionAnswering.from_pretrained(directory)
        row = next(row for row in rows if len(row["context"]) < 60 and row["answers"]["text"])
        inputs = tokenizer(row["question"], row["context"], return_tensors="pt", return_offsets_mapping=True)
        offsets = inputs.pop("offset_mapping")[0]
        with torch.no_grad():
            output = theirs(**inputs)
        start, end = output.start_logits.argmax(), output.end_logits.argmax()
        answer = row["context"][offsets[start, 0] : offsets[end, 1]]
        assert model.predict([(row["question"], row["context"])])[0]["answer"] == answer == row["answers"]["text"][0]
        return
    theirs = transformers.AutoModelForMultipleChoice.from_pretrained(directory)
    row = rows[0]
    inputs = tokenizer([row["context"]] * 3, row["choices"], return_tensors="pt", padding=True)
    with torch.no_grad():
        logits = theirs(**{name: value[None] for name, value in inputs.items()}).logits[0]
    (found,) = model.predict([(row["context"], row["choices"])])
    np.testing.assert_allclose(found["probabilities"], logits.softmax(0), atol=1e-5)


def test_a_directory_of_others_has_no_task_json(trained, tmp_path):
    task, directory, _, _ = trained
    theirs = shutil.copytree(directory, tmp_path / "theirs", ignore=shutil.ignore_patterns("task.json", "checkpoint-*"))
    text = "every day the dog builds the green trees ."
    item = {"tag": text, "answer": ("the day ?", text), "choose": (text, ["hills", "dog"])}[task]
    ours, found = (predictor.load(place).predict([item])[0] for place in (directory, theirs))
    assert predictor.load(theirs).spec.task == task
    for name in ("entities", "answer", "probabilities"):
        assert ours.get(name) == found.get(name)
    assert {"tag": len(found.get("entities", ())) == 2, "answer": found.get("answer") == "dog",
            "choose": found.get("choice") == 1}[task]  # fmt: skip
