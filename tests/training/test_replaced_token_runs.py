"""Pretraining with replaced tokens: steps, evaluations and whole runs on tiny models."""

import math
import shutil
import signal

import pytest
import torch
import torch.nn.functional as F
import transformers
from runs import (
    MODEL,
    alone_and_in_two_processes,
    assert_same_tensors,
    cut,
    documents,
    draw_nothing,
    prepared,
    rows_without_times,
    run,
    short_run,
    stop_in,
    training_rows,
    write_model,
)
from safetensors.torch import load_file

from fastbert.data.batches import MaskedBatches
from fastbert.data.shards import Shards
from fastbert.model import hf_files
from fastbert.model.heads import MaskedLM, ReplacedTokenDetector
from fastbert.model.replaced_tokens import ReplacedTokenPretraining
from fastbert.packing import pack_inputs
from fastbert.tasks.fill_mask import fill_mask, load_masked_lm
from fastbert.training import checkpoint, log, pretrain
from fastbert.training.card import learning_curve
from fastbert.training.pretrain import PretrainConfig
from fastbert.training.step_sums import accumulate

FAMILIES = {
    "electra": dict(model_type="electra", embedding_size=16),
    "deberta-v2": dict(
        model_type="deberta-v2", relative_attention=True, pos_att_type=["c2p", "p2c"], type_vocab_size=0,
        position_buckets=4, share_att_key=True, norm_rel_ebd="layer_norm", position_biased_input=False,
    ),
}  # fmt: skip


def config_of(family):
    no_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return hf_files.config_from_hf(MODEL | FAMILIES[family] | {"vocab_size": 148} | no_dropout)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A directory with a text, a tokenizer and shards of it, and a config.json for each family."""
    place = tmp_path_factory.mktemp("rtd")
    prepared(place, documents(150), 148)
    for name, values in FAMILIES.items():
        write_model(place, f"{name}.json", vocab_size=148, **values)
    return place


def loader_of(place, **changes):
    return MaskedBatches(
        Shards.open(place / "shards"),
        **{"max_seq_length": 24, "tokens_per_batch": 384, "objective": "rtd", "capacity": True, **changes},
    )


@pytest.mark.parametrize("case", ["electra", "deberta-v2"])
def test_cutting_a_step_into_micro_batches_changes_neither_samples_nor_gradients(case, place):
    model = ReplacedTokenPretraining(config_of(case))
    [batch, *_] = loader_of(place, capacity=False).epoch(0)
    B, found = len(batch.cu_seqlens) - 1, {}
    for parts in (1, 2, 4):
        model.zero_grad(set_to_none=True)
        sums = accumulate(model, cut(batch, [B // parts] * (parts - 1) + [B - B // parts * (parts - 1)]))
        found[parts] = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}, sums
    gradients, sums = found[1]
    assert sums["rtd_replaced"] > 10 and sums["tokens"] == sums["rtd_count"] == len(batch.input_ids)
    for parts in (2, 4):
        assert {k: v for k, v in found[parts][1].items() if "loss" not in k} == {
            k: v for k, v in sums.items() if "loss" not in k
        }
        assert gradients.keys() == found[parts][0].keys()
        for name, gradient in gradients.items():
            scale = gradient.abs().max().item()
            torch.testing.assert_close(found[parts][0][name], gradient, rtol=0, atol=3e-6 * scale + 1e-7, msg=name)
    # the loss of the model's output is what was divided
    output = model(batch)
    assert output.loss.item() == pytest.approx(
        sums["loss"] / sums["count"] + 50 * sums["rtd_loss"] / sums["rtd_count"], rel=1e-5
    )


def test_masks_are_electras_and_draws_depend_on_the_place_alone(place):
    """85 % of the picks are [MASK], none is random; another epoch has other draws, another batch size the same."""
    picks = hidden = 0
    draws = {}
    for size in (384, 96):
        loader = loader_of(place, tokens_per_batch=size)
        for batch in loader.epoch(0):
            labels = batch.labels[batch.picks]
            known = labels != -100
            read = batch.input_ids[batch.picks][known]
            assert ((read == loader.special.mask) | (read == labels[known])).all()
            picks, hidden = picks + int(known.sum()), hidden + int((read == loader.special.mask).sum())
            assert batch.draws.dtype == torch.float64 and batch.draws.shape == batch.picks.shape
            draws.setdefault(size, []).append(batch.draws[known])
    draws = {size: torch.cat(found).sort().values for size, found in draws.items()}
    assert torch.equal(draws[384], draws[96]) and len(draws[384].unique()) == len(draws[384])
    assert abs(hidden - 0.85 * picks) < 4 * (picks * 0.85 * 0.15) ** 0.5
    assert abs(draws[384].mean() - 0.5) < 0.05 and draws[384].min() >= 0 and draws[384].max() < 1
    second = torch.cat([batch.draws for batch in loader_of(place).epoch(1)])
    assert not torch.isin(second[second > 0], draws[384]).any()


def test_an_evaluation_is_the_same_each_time_and_right(place):
    model = ReplacedTokenPretraining(config_of("electra"))
    loader = loader_of(place, seed=1)
    row = pretrain.evaluate(model.train(), loader)
    assert model.training and row == pretrain.evaluate(model, loader)
    replaced, scores = [], []
    with torch.no_grad():
        detector = model.eval().detector()
        for batch in loader.epoch(0):
            generator = model.generator
            hidden = generator.transform(generator.encoder(batch, rows=batch.picks))
            corrupted = model.corrupt(batch, model.sample(hidden, batch.draws))
            end = int(batch.cu_seqlens[-1])
            replaced.append(corrupted.labels[:end])
            scores.append(detector(corrupted).logits[:end])
    replaced, scores = torch.cat(replaced).bool(), torch.cat(scores)
    assert replaced.sum() > 50
    assert row["eval_rtd_loss"] == pytest.approx(
        F.binary_cross_entropy_with_logits(scores, replaced.float()).item(), rel=1e-5
    )
    assert row["eval_rtd_accuracy"] == pytest.approx(((scores > 0) == replaced).double().mean().item())
    assert row["eval_rtd_recall"] == pytest.approx((scores[replaced] > 0).double().mean().item())
    assert row["eval_rtd_baseline_accuracy"] == pytest.approx((~replaced).double().mean().item())


def detection_run(place):
    return short_run(place) | {
        "model": place / "electra.json", "objective": "rtd", "max_steps": 8, "logging_steps": 4, "save_steps": 4,
        "save_total_limit": 5,
    }  # fmt: skip


@pytest.fixture(scope="module")
def finished(place):
    """The directory of that run. To be copied, not changed."""
    with pytest.MonkeyPatch.context() as patched:
        draw_nothing(patched)
        run(detection_run(place), output_dir=place / "finished")
    return place / "finished"


@pytest.fixture
def options(place, tmp_path):
    return detection_run(place) | {"output_dir": tmp_path / "run"}


def test_it_learns_to_find_replaced_tokens(options):
    """After the generator has learned the words of the text, the discriminator knows which go together."""
    result = run(
        options, max_steps=150, learning_rate=5e-3, gradient_accumulation_steps=1, tokens_per_batch=768, dropout=0.0,
        eval_steps=150, save_steps=150, schedule="constant",
    )  # fmt: skip
    assert result["eval_rtd_accuracy"] > result["eval_rtd_baseline_accuracy"] + 0.04
    assert result["eval_rtd_recall"] > 0.5
    assert 0.8 < result["eval_rtd_baseline_accuracy"] < 1
    losses = [row["rtd_loss"] for row in training_rows(options["output_dir"])]
    assert losses[-1] < 0.6 * losses[0]
    assert result["eval_rtd_loss"] < 0.7 * entropy(1 - result["eval_rtd_baseline_accuracy"])


def entropy(share):
    """The least loss of one that knows what share of the tokens is replaced, and nothing of which."""
    return -share * math.log(share) - (1 - share) * math.log(1 - share)


@pytest.mark.parametrize("family", ["electra", "deberta-v2"])
def test_a_finished_run_loads_in_transformers(family, options, place, capsys):
    result = run(options, model=place / f"{family}.json")
    directory = options["output_dir"]
    row = log.read_metrics(directory)[0]
    assert row["rtd_loss"] > 0 and 0 <= row["rtd_recall"] <= 1 and 0.8 < row["rtd_baseline_accuracy"] < 1
    assert f"replaced tokens found {result['eval_rtd_recall']:.1%}" in capsys.readouterr().err
    card = (directory / "README.md").read_text()
    for name in ("recall", "accuracy", "baseline_accuracy"):
        assert f"{result['eval_rtd_' + name]:.2%}" in card
    assert "ReplacedTokenDetector" in card and "fill-mask" in card
    assert learning_curve(directory).read_bytes().startswith(b"\x89PNG")

    names = {"electra": ("ElectraForPreTraining", "ElectraForMaskedLM"),
             "deberta-v2": ("DebertaV2Model", "DebertaV2ForMaskedLM")}[family]  # fmt: skip
    for place_, name in zip((directory, directory / "generator"), names):
        theirs, info = getattr(transformers, name).from_pretrained(place_, output_loading_info=True)
        if name == "DebertaV2Model":
            assert {key.split(".")[0] for key in info.pop("unexpected_keys")} == {"discriminator_predictions"}
        assert not any(info.values()), info
        assert transformers.AutoTokenizer.from_pretrained(place_).mask_token == "[MASK]"
    ours = ReplacedTokenDetector.from_pretrained(directory)
    ids = torch.randint(5, 100, (2, 9))
    theirs = getattr(transformers, names[0]).from_pretrained(directory).eval()
    if family == "electra":
        torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, atol=1e-5, rtol=1e-5)
    else:
        batch, _ = pack_inputs(ours.config, ids)
        expected = theirs(ids).last_hidden_state.flatten(0, 1)
        torch.testing.assert_close(ours.encoder(batch), expected, atol=1e-5, rtol=1e-5)
    # the tables: one, or a sum whose parts have both moved
    generator = MaskedLM.from_pretrained(directory / "generator")
    tables = [model.encoder.embeddings.word.weight for model in (ours, generator)]
    difference = (tables[0] - tables[1]).abs().max()
    assert difference == 0 if family == "electra" else tables[1].abs().max() > difference > 1e-4
    [words] = fill_mask(*load_masked_lm(directory / "generator"), "every day the [MASK] chases mice")
    assert len(words) == 5
    # going on from it begins with what it knows
    whole = ReplacedTokenPretraining.from_pretrained(directory)
    again = pretrain.model_of(PretrainConfig(**options | {"model": directory}), ours.config)
    for state in (whole.state_dict(), again.state_dict()):
        assert torch.equal(state["discriminator.dense.weight"], ours.dense.weight)
        assert torch.equal(state["generator.vocabulary_bias"], generator.vocabulary_bias)
    torch.testing.assert_close(again.detector().encoder.embeddings.word.weight, tables[0])


@pytest.mark.parametrize(("family", "sharing"), [("electra", None), ("electra", "none"), ("deberta-v2", "gdes")])
def test_a_stopped_run_resumes_to_the_bit(family, sharing, options, place, finished, tmp_path, monkeypatch):
    options |= {"model": place / f"{family}.json", "embedding_sharing": sharing}
    whole = finished
    if (family, sharing) != ("electra", None):
        whole = tmp_path / "whole"
        run(options, output_dir=whole)
    with monkeypatch.context() as patched:
        stop_in(patched, "accumulate", 6)
        assert run(options)["signal"] == signal.SIGTERM
    assert checkpoint.latest(options["output_dir"]).name == "checkpoint-6"
    run(options, resume=True)
    for name in (checkpoint.MODEL, checkpoint.OPTIMIZER, "generator/" + checkpoint.MODEL):
        assert_same_tensors(*(d / "checkpoint-8" / name for d in (whole, options["output_dir"])))
    assert rows_without_times(whole) == rows_without_times(options["output_dir"])


def test_a_damaged_generator_damages_its_checkpoint(finished, tmp_path):
    directory = shutil.copytree(finished, tmp_path / "run")
    file = directory / "checkpoint-8" / "generator" / checkpoint.MODEL
    file.write_bytes(file.read_bytes()[:-4] + b"\0\0\0\1")
    with pytest.warns(UserWarning, match="skipped a checkpoint: .*checkpoint-8/generator/model.safetensors is damaged"):
        assert checkpoint.latest(directory).name == "checkpoint-4"


def test_two_processes_learn_what_one_does_with_two_micro_batches(options, tmp_path):
    directories = alone_and_in_two_processes(options, tmp_path)
    for name in (checkpoint.MODEL, "generator/" + checkpoint.MODEL):
        one, two = (load_file(directory / name) for directory in directories)
        for key in one:
            torch.testing.assert_close(one[key], two[key], atol=2e-5, rtol=1e-4, msg=key)
    first, second = (log.read_metrics(directory)[0] for directory in directories)
    assert first["rtd_loss"] == pytest.approx(second["rtd_loss"], rel=1e-4)
