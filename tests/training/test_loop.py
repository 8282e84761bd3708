"""The loop of training: what a step adds up, the step itself, its length, and several processes."""

import math
import shutil
import time

import pytest
import torch
import torch.nn.functional as F
from helpers import packed_batch
from runs import MODEL, alone_and_in_two_processes, checkpoints, cut, run, training_rows
from safetensors.torch import load_file

from fastbert.data.batches import MaskedBatches
from fastbert.data.shards import Shards
from fastbert.model import heads, hf_files
from fastbert.training import checkpoint, log, loop, pretrain
from fastbert.training.step_sums import accumulate


def one_batch(lengths, picks, pairs=False):
    """A Batch of random sequences with these rows picked."""
    batch = packed_batch(lengths, 50)
    batch.picks = torch.tensor(picks, dtype=torch.int64)
    batch.labels = torch.full_like(batch.input_ids, -100).index_put(
        (batch.picks,), torch.randint(5, 50, batch.picks.shape)
    )
    batch.pair_labels = torch.arange(len(lengths)) % 2 if pairs else None
    return batch


# of the six sequences, the second, fourth and fifth have no picks
LENGTHS, PICKS = [7, 3, 9, 1, 5, 8], [1, 2, 3, 6, 14, 25, 26, 27, 28, 29, 30]


def gradients_of(model, batches):
    model.zero_grad(set_to_none=True)
    sums = accumulate(model, batches)
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}, sums


@pytest.mark.parametrize("kind", ["MaskedLM", "Pretraining"])
@pytest.mark.parametrize("groups", [[3, 3], [1, 2, 2, 1], [6]], ids=["two", "four-one-without-picks", "one"])
def test_cutting_a_step_into_micro_batches_does_not_change_its_gradient(kind, groups):
    config = hf_files.config_from_hf(MODEL | {"vocab_size": 50, "hidden_dropout_prob": 0.0,
                                              "attention_probs_dropout_prob": 0.0})  # fmt: skip
    model = getattr(heads, kind)(config)
    batch = one_batch(LENGTHS, PICKS, pairs=kind == "Pretraining")
    parts = cut(batch, groups)
    if len(groups) == 4:
        assert any(len(part.picks) == 0 for part in parts)
    found, sums = gradients_of(model, parts)
    assert (sums["count"], sums["tokens"]) == (11, sum(LENGTHS))

    # the truth: a mean over all picks, from logits, without micro-batches
    model.zero_grad(set_to_none=True)
    hidden = model.encoder(batch)
    logits = F.linear(model.transform(hidden), model.encoder.embeddings.word.weight, model.vocabulary_bias)
    loss = F.cross_entropy(logits, batch.labels)
    assert sums["loss"] / 11 == pytest.approx(loss.item(), rel=1e-5)
    if kind == "Pretraining":
        scores = model.pair_classifier(torch.tanh(model.pooler(hidden[batch.cu_seqlens[:-1].long()])))
        pair_loss = F.cross_entropy(scores, batch.pair_labels)
        assert sums["pair_loss"] / 6 == pytest.approx(pair_loss.item(), rel=1e-5)
        loss = loss + pair_loss
    loss.backward()
    for name, p in model.named_parameters():
        scale = p.grad.abs().max().item()
        torch.testing.assert_close(found[name], p.grad, rtol=0, atol=2e-6 * scale + 1e-8, msg=name)


def test_a_step_without_picks_leaves_no_gradient_and_no_nan(options):
    model = heads.MaskedLM(hf_files.config_from_hf(MODEL | {"vocab_size": 50}))
    found, sums = gradients_of(model, [one_batch([4, 3], [])])
    assert not found and sums == {"count": 0, "tokens": 7, "capacity": 7}
    # in a run: steps go by, are counted, and leave the model finite
    run(options, mlm_probability=1e-4, logging_steps=12, gradient_accumulation_steps=1)
    [row] = training_rows(options["output_dir"])
    assert 6 < row["empty_steps"] <= 12 and math.isfinite(row["loss"]) and row["skipped_steps"] == 0


def poison(monkeypatch, steps):
    """In these steps (from 0) one parameter's gradient is NaN. Returns a list: the parameters before each step."""
    real, seen = pretrain.accumulate, []

    def accumulate(model, batches, **kwargs):
        seen.append([p.detach().clone() for p in model.parameters()])
        sums = real(model, batches, **kwargs)
        if len(seen) - 1 in steps:
            next(model.parameters()).grad.view(-1)[0] = math.nan
        return sums

    monkeypatch.setattr(pretrain, "accumulate", accumulate)
    return seen


def test_a_gradient_that_is_not_finite_leaves_the_parameters_untouched(options, monkeypatch):
    seen = poison(monkeypatch, {2, 3, 6})
    run(options, logging_steps=1)
    unchanged = [all(torch.equal(a, b) for a, b in zip(one, two, strict=True)) for one, two in zip(seen, seen[1:])]
    assert [step for step, same in enumerate(unchanged) if same] == [2, 3, 6]
    rows = training_rows(options["output_dir"])
    assert [r["skipped_steps"] for r in rows] == [0, 0, 1, 2, 2, 2, 3, 3, 3, 3, 3, 3]
    assert [r["gradient_norm"] is None for r in rows] == [step in (2, 3, 6) for step in range(12)]


def test_five_in_a_row_abort_and_keep_the_checkpoints_from_before(options, monkeypatch):
    """checkpoint-4 has given no finite gradient yet: checkpoint-2 must stay, too. Then a lower rate goes on."""
    options |= {"save_steps": 2, "save_total_limit": 1, "gradient_accumulation_steps": 1}
    with monkeypatch.context() as patched:
        poison(patched, range(4, 100))
        with pytest.raises(FloatingPointError, match="no finite gradient in the 5 steps up to 9; .* --learning-rate"):
            run(options)
    assert checkpoints(options["output_dir"]) == ["checkpoint-2", "checkpoint-4"]
    run(options, resume=True, learning_rate=1e-4)
    assert checkpoints(options["output_dir"]) == ["checkpoint-12"]


def test_a_checkpoint_that_gives_no_finite_gradient_after_a_resume_is_set_aside(options, whole, monkeypatch):
    directory = shutil.copytree(whole, options["output_dir"])
    with monkeypatch.context() as patched:
        poison(patched, range(100))
        with pytest.raises(FloatingPointError, match="5 steps up to 17"):
            run(options, resume=True, max_steps=20)
    assert checkpoints(directory) == ["checkpoint-4", "checkpoint-8"] and (directory / "diverged-12").is_dir()
    assert run(options, resume=True, max_steps=9, learning_rate=1e-4)["step"] == 9


@pytest.mark.parametrize("value", [1e30, math.inf, math.nan])
def test_a_dead_parameter_displaces_no_checkpoint(value, options, monkeypatch):
    real = pretrain.accumulate

    def accumulate(model, batches, **kwargs):
        sums = real(model, batches, **kwargs)
        if len(seen) == 5:
            next(model.parameters()).data.view(-1)[0] = value
        return sums

    seen = poison(monkeypatch, [])
    real = pretrain.accumulate
    monkeypatch.setattr(pretrain, "accumulate", accumulate)
    with pytest.raises(FloatingPointError, match=r"after step 5 parameter \S+ has a value of (1e\+30|inf|nan)"):
        run(options, save_steps=1, save_total_limit=2)
    assert checkpoints(options["output_dir"]) == ["checkpoint-3", "checkpoint-4"]


def test_a_run_that_ends_without_a_finite_gradient_is_not_done(options, monkeypatch):
    poison(monkeypatch, {10, 11})
    with pytest.raises(FloatingPointError, match="no finite gradient in the 2 steps up to 12"):
        run(options, save_steps=5)
    assert checkpoints(options["output_dir"]) == ["checkpoint-10", "checkpoint-5"]
    assert not (options["output_dir"] / checkpoint.MODEL).exists()


def test_a_model_whose_held_out_loss_is_not_finite_is_not_published(options, monkeypatch):
    real, rows = pretrain.evaluate, []

    def evaluate(*args, **kwargs):
        rows.append(real(*args, **kwargs))
        # the first of three
        return rows[-1] | ({"eval_loss": math.nan} if len(rows) != 2 else {})

    monkeypatch.setattr(pretrain, "evaluate", evaluate)
    with pytest.raises(FloatingPointError, match="the held-out loss after step 12 is not finite"):
        run(options, save_steps=4)
    # that of step 4 waits for step 5
    assert checkpoints(options["output_dir"]) == ["checkpoint-5", "checkpoint-8"]
    assert not (options["output_dir"] / checkpoint.MODEL).exists()
    # a resume cannot publish it either
    with pytest.raises(FloatingPointError):
        run(options, save_steps=4, resume=True)


def test_dropout_has_another_seed_in_every_place():
    places = [(0, 0, 0, 0), (1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1), (0, 11, 0, 0), (0, 1, 1, 0)]
    seeds = [loop.dropout_seed(*place) for place in places]
    assert len({int(seed) for seed in seeds}) == len(places)
    assert all(seed.dtype == torch.int64 and seed.shape == (1,) for seed in seeds)
    assert torch.equal(seeds[0], loop.dropout_seed(*places[0]))


def test_length_in_epochs_is_passes_over_the_text(options, place):
    run(options, epochs=1.5, max_steps=None, eval_share=0)
    loader = MaskedBatches(Shards.open(place / "shards"), max_seq_length=24, tokens_per_batch=192, seed=7)
    state = checkpoint.read_state(checkpoint.latest(options["output_dir"]))
    expected = math.ceil((loader.num_batches(0) + 0.5 * loader.num_batches(1)) / 2)
    assert state["progress"]["step"] == expected
    assert run(options, resume=True, epochs=1.5, max_steps=None, eval_share=0) == {"signal": None}


def test_a_run_by_the_clock_ends_in_time_with_its_rate_near_zero(options):
    began = time.monotonic()
    run(options, max_steps=None, max_minutes=1.5 / 60, logging_steps=1)
    assert time.monotonic() - began < 15
    rates = [r["learning_rate"] for r in training_rows(options["output_dir"])]
    assert max(rates) > 2e-3 and rates[-1] < 1e-3 and len(rates) > 3


def test_two_processes_learn_what_one_does_with_two_micro_batches(options, tmp_path):
    directories = alone_and_in_two_processes(options, tmp_path)
    one, two = (load_file(directory / checkpoint.MODEL) for directory in directories)
    for name in one:
        torch.testing.assert_close(one[name], two[name], atol=1e-5, rtol=1e-4, msg=name)
    figures = [log.read_metrics(directory)[-1] for directory in directories]
    assert figures[0]["tokens"] == figures[1]["tokens"]
