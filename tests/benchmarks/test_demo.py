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


def test_the_surest_guesses_are_shown_one_for_each_word_and_right_ones_first(said, monkeypatch):
    monkeypatch.setattr(demo, "VERSES_TRIED", 7)
    monkeypatch.setattr(demo, "VERSES_SHOWN", 4)
    tried = [("abcde", 0.5, "x"), ("xbcde", 0.7, "x"), ("xabcd", 0.9, "f"), ("fxcde", 0.6, "x"), ("gxcde", 0.1, "g"),
             ("hxcde", 0.3, "h"), (["the", "bbbb"], 0.95, "bbbb")]  # fmt: skip
    guesses = iter([[(word if len(word) > 1 else 4 * word, sure) for word in words] for words, sure, _ in tried])
    verses = iter([(f"verse {i} [MASK].", (4 * truth)[:4]) for i, (_, _, truth) in enumerate(tried)])
    monkeypatch.setattr(demo, "hide_a_word", lambda *_: next(verses))
    monkeypatch.setattr(demo, "fill_mask", lambda *_: [next(guesses)])
    model = type("Model", (), {"config": preset("bert-tiny")})
    demo.show_guesses(model, None, [])
    text = said()
    # 1 says what 2 says, and 2 is surer; 4 is the least sure; 6 says a word that is too short
    assert [int(number) for number in re.findall(r"verse (\d)", text)] == [5, 3, 2, 0]
    assert "Of these 4, 1 right at once and 1 more among the five." in text
    assert "Of all 7 that were tried, 3 and 2." in text
