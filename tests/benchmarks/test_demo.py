"""The demo: its length goes by tokens, it says how long it will take, and the verses it got right come first."""

import contextlib
import json
import re

import demo
import pytest
from pretend_cuda import pretending
from rich.console import Console

from fastbert.model.hf_files import config_from_hf, config_to_hf
from fastbert.model.presets import preset
from fastbert.training.pretrain import PretrainConfig


@pytest.fixture
def said(monkeypatch):
    """What the demo prints."""
    console = Console(record=True, width=200, quiet=False, file=open("/dev/null", "w"))  # noqa: SIM115
    monkeypatch.setattr(demo, "console", console)
    return console.export_text


def row(**changes):
    return {"step": 50, "tokens": 51_200, "loss": 6.0, "elapsed": 4.0, "tokens_per_second": 12_800} | changes


@pytest.mark.parametrize("on_gpu", [False, True], ids=["cpu", "gpu"])
def test_its_length_goes_by_tokens_alone(on_gpu):
    with pretending() if on_gpu else contextlib.nullcontext():
        model, options, _ = demo.settings()
    assert options["max_steps"] and not {"max_minutes", "epochs"} & options.keys()
    PretrainConfig(train_file="x", output_dir="y", max_seq_length=model.max_position_embeddings, **options)
    # what `pretrain` reads from the file
    assert config_from_hf(config_to_hf(model)) == model


@pytest.mark.parametrize(
    ("changes", "sentence", "minutes"),
    [
        ({}, "0.1 of 2.6 million tokens, 12,800 a second: about 3 minutes to go.", 3.33),
        # ten times slower: the promise follows the speed of now, not the mean
        ({"tokens_per_second": 1280}, "0.1 of 2.6 million tokens, 1,280 a second: about 33 minutes to go.", 32.7),
        ({"step": 2000, "tokens": 2_048_000, "elapsed": 200.0},
         "2.0 of 2.6 million tokens, 12,800 a second: less than a minute to go.", 4.0),
    ],
)  # fmt: skip
def test_a_promise_follows_from_the_measured_speed(changes, sentence, minutes):
    said, total = demo.promise(row(**changes), 2500, since=0.0)
    assert said == sentence and total == pytest.approx(minutes, rel=0.02)
    # the time since the row was written has passed
    assert "less than a minute to go" in demo.promise(row(), 2500, since=180.0)[0]


def test_promises_are_kept_up_to_date_and_a_slow_machine_is_told_once(said, tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "EVERY", 0.05)
    log = tmp_path / "metrics.jsonl"
    with demo.Promises(tmp_path, 2500) as promises:
        wait = promises.ended.wait
        monkeypatch.setattr(promises.ended, "wait", lambda seconds: wait(min(seconds, 0.05)))
        for step in (100, 1000):
            changed = row(step=step, tokens=1024 * step, tokens_per_second=1280)
            log.write_text(json.dumps({"step": 1, "eval_loss": 8.0}) + "\n" + json.dumps(changed) + "\n")
            while f"{changed['tokens'] / 1e6:.1f} of" not in (text := said(clear=False)):
                wait(0.05)
    assert text.count("too slow") == 1 and re.search(r"takes about 3\d minutes", text)


def test_verses_that_it_got_right_come_first(said, monkeypatch):
    guesses = iter([["a", "b", "c", "d", "e"], ["f", "x", "c", "d", "e"], ["x", "b", "c", "d", "e"]] * 4)
    verses = iter([(f"verse {i} [MASK].", "x") for i in range(demo.VERSES_SHOWN)])
    monkeypatch.setattr(demo, "hide_a_word", lambda *_: next(verses))
    monkeypatch.setattr(demo, "fill_mask", lambda *_: [[(word, 0.2) for word in next(guesses)]])
    model = type("Model", (), {"config": preset("bert-tiny")})
    demo.show_guesses(model, None, [])
    text = said()
    places = [text.index(f"verse {i} ") for i in range(demo.VERSES_SHOWN)]
    assert sorted(range(demo.VERSES_SHOWN), key=places.__getitem__) == [2, 5, 8, 11, 1, 4, 7, 10, 0, 3, 6, 9]
    assert "Of 12, 4 right at once and 4 more among the five." in text
