"""Fine-tuning against transformers: both train alike, and what is no part of the recipe is noticed; the text."""

import json

import pytest
import torch
from labelled import sentences, small_encoder, write_jsonl

bench = pytest.importorskip("bench_finetune", reason="needs transformers")
import finetune_data  # noqa: E402
import tables  # noqa: E402

pytest.importorskip("transformers")
TASKS = [*bench.SIZES]


def rows(task, text, label):
    words = text.split()
    return {
        "classify": {"text": text, "label": label},
        "tag": {"text": text, "spans": [[text.index(label), text.index(label) + len(label), label]]},
        "answer": {"question": "when", "context": " ".join(words * (1 + len(label) % 3)) + " once", "id": text,
                   "answers": {"text": ["once"], "answer_start": [len(" ".join(words * (1 + len(label) % 3))) + 1]}},
    }[task]  # fmt: skip


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    """A function: Data of a task, and the directory of its small model."""
    place = tmp_path_factory.mktemp("finetune")
    encoder = small_encoder(place)

    def data(task):
        found = [(text, label) for text, label in sentences(60) if label in text]
        files = [write_jsonl(place / f"{task}-{side}.jsonl", [rows(task, *one) for one in found]) for side in "ab"]
        return bench.Data(task, [*map(str, files)], encoder), encoder

    return data


@pytest.mark.parametrize("task", TASKS)
def test_losses_of_the_same_batches_are_the_same(task, case, monkeypatch):
    """And those of another learning rate in one of them are not."""
    data, encoder = case(task)
    monkeypatch.setattr(bench, "STEPS", 6)
    monkeypatch.setattr(bench, "LEARNING_RATE", 1e-3)
    row = bench.losses(data, encoder)
    assert len(row["losses"]["fastbert"]) == 6 and row["largest_difference"] < 1e-5
    assert row["losses"]["fastbert"][0] != row["losses"]["fastbert"][-1]
    update = bench.Ours.update

    def slower(self):
        self.done += type(self) is bench.Ours
        update(self)

    monkeypatch.setattr(bench.Ours, "update", slower)
    monkeypatch.setattr(bench, "ALLOWED", 1e-5)
    with pytest.raises(AssertionError, match=f"{task}: losses of the same batches are .* apart"):
        bench.losses(data, encoder)


@pytest.mark.parametrize("task", TASKS)
def test_scores_are_computed_alike(task, case):
    """The untrained model in both libraries gives the same scores, by padded and by packed batches."""
    data, encoder = case(task)
    first = data.first(encoder, 0)
    own, other = bench.Ours(first, 1), bench.Theirs(first, 1)
    with torch.no_grad():
        found = [data.scores(run.model, run.run) for run in (own, other)]
    for name, value in found[0].items():
        if isinstance(value, float):
            assert value == pytest.approx(found[1][name], abs=1e-5), name


def test_the_page_shows_what_was_measured_and_what_was_not():
    rows = [
        {"part": "losses", "case": "tag", "largest_difference": 2e-7},
        *({"part": "seeds", "case": "tag", "metric": "f1", "scores": {"fastbert": {"f1": x}, "transformers": {"f1": y}}}
          for x, y in ((0.6, 0.4), (0.7, 0.8), (0.8, 0.6))),
        {"part": "start", "case": "tag", "model": "MiniLM", "how": "frozen encoder", "metric": "f1",
         "scores": {"fastbert": {"f1": 0.25}}},
    ]  # fmt: skip
    result = {"rows": rows, "settings": {}}
    bench.summarise(result)
    # the mean of 0.2, -0.1 and 0.2; 4.303 standard errors of 0.1 on each side
    assert result["settings"]["difference"]["tag"]["mean"] == pytest.approx(0.1)
    assert result["settings"]["difference"]["tag"]["interval"] == pytest.approx([-0.3303, 0.5303], abs=1e-4)
    text = "\n".join(tables.finetune_tables(result))
    assert "| tag | 2e-07 | not measured | not measured | +0.1000 [-0.3303, +0.5303], 3 pairs, f1 |" in text
    assert "| tag | MiniLM | frozen encoder | f1 0.250 |" in text


def test_names_are_cut_out_of_the_markup(tmp_path):
    place = tmp_path / finetune_data.DOCUMENTATION
    place.mkdir(parents=True)
    text = "Use :class:`~io.StringIO` or :py:func:`open <open>`, *not* ``x`` :ref:`here`.\n\nTitle\n=====\n\nA code::\n"
    for name in ("a", "b"):
        (place / f"{name}.rst.txt").write_text(text)
    train, held = finetune_data.tags([tmp_path])
    assert (
        train == held == [{"text": "Use StringIO or open, not x here.", "spans": [(4, 12, "class"), (16, 20, "func")]}]
    )
    (question,), _ = finetune_data.questions([tmp_path])
    answer, (start,) = question["answers"]["text"][0], question["answers"]["answer_start"]
    assert question["context"][start : start + len(answer)] == answer in ("StringIO", "open")
    assert answer not in question["question"] and json.dumps(question)
