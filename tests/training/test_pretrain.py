"""Pretraining on tiny models: it learns, its options take effect, wrong options are refused."""

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
import transformers
from runs import MODEL, WORDS, run, training_rows, write_model
from safetensors.torch import load_file

from fastbert.data.batches import MaskedBatches
from fastbert.data.shards import Shards
from fastbert.data.tokenizer import save_tokenizer, train_bpe
from fastbert.model import families, heads, hf_files
from fastbert.tasks.fill_mask import fill_mask, load_masked_lm
from fastbert.training import log, pretrain, pretrain_inputs
from fastbert.training.pretrain import PretrainConfig


def test_from_raw_text_to_a_model_that_knows_words(place, tmp_path, monkeypatch):
    monkeypatch.undo()  # with TensorBoard and the picture
    output = tmp_path / "run"
    result = pretrain.pretrain(PretrainConfig(
        train_file=(place / "long.txt",), output_dir=output, model=place / "model.json", vocab_size=148,
        max_seq_length=32, tokens_per_batch=512, max_steps=120, learning_rate=1e-2, eval_steps=40, save_steps=80,
        eval_share=0.1, dropout=0.0, schedule="constant",
    ))  # fmt: skip
    assert result["signal"] is None and result["step"] == 120
    assert result["eval_masked_accuracy"] > 2 * result["eval_baseline_accuracy"] > 0.05
    assert result["eval_picked_tokens"] > 20

    rows = log.read_metrics(output)
    train, held_out = [r for r in rows if "loss" in r], [r for r in rows if "eval_loss" in r]
    assert [r["step"] for r in train] == list(range(10, 121, 10))
    assert [r["step"] for r in held_out] == [40, 80, 120]
    assert train[-1]["loss"] < 0.6 * train[0]["loss"] and held_out[-1]["eval_loss"] < held_out[0]["eval_loss"]
    assert all(r["fill"] > 0.85 and r["tokens_per_second"] > 0 and r["memory_mb"] > 10 for r in train)
    # the same picks each time
    assert len({(r["eval_picked_tokens"], r["eval_baseline_accuracy"]) for r in held_out}) == 1
    assert sorted(p.name for p in output.glob("checkpoint-*")) == ["checkpoint-120", "checkpoint-80"]
    assert list((output / "tensorboard").iterdir())
    assert (output / "learning_curve.png").read_bytes().startswith(b"\x89PNG")
    card = (output / "README.md").read_text()
    assert f"{result['eval_masked_accuracy']:.2%}" in card and "| documents | 300 |" in card

    # fastbert and transformers load the same model, and it fills in what it has read
    model, tokenizer = load_masked_lm(output)
    [words] = fill_mask(model, tokenizer, "every day the cat chases [MASK] in dark barns .", top_k=5)
    assert {word for word, _ in words} == {sentence.split()[1] for sentence in WORDS.values()}
    shares = [share for _, share in words]
    assert shares == sorted(shares, reverse=True) and 0.9 < sum(shares) < 1
    theirs = transformers.AutoModelForMaskedLM.from_pretrained(output).eval()
    encoded = transformers.AutoTokenizer.from_pretrained(output)("every day the dog guards [MASK]", return_tensors="pt")
    expected = theirs(**encoded).logits
    ours = model(encoded["input_ids"]).logits
    torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-4)


def test_training_starts_from_the_given_model(options, whole, monkeypatch):
    start = {}

    def look(model, batches, **_):
        start.update({name: p.detach().clone() for name, p in model.named_parameters()})
        raise KeyboardInterrupt

    monkeypatch.setattr(pretrain, "accumulate", look)
    with pytest.raises(KeyboardInterrupt):
        run(options, model=whole, dropout=0.3)
    model = heads.MaskedLM.from_pretrained(whole)
    for name, p in model.named_parameters():
        assert torch.equal(p, start[name])


# those with replaced tokens learn in test_replaced_token_runs.py
FAMILIES = {
    "roberta": dict(type_vocab_size=1),
    "albert": dict(embedding_size=16),
    "distilbert": dict(dim=32, n_layers=2, n_heads=2, hidden_dim=64, dropout=0.1, attention_dropout=0.1),
    "modernbert": dict(local_attention=8, attention_dropout=0.1, pad_token_id=0),
}  # fmt: skip


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_learns_from_raw_text(name, place, tmp_path):
    model = write_model(tmp_path, model_type=name, vocab_size=320, **FAMILIES[name])
    tokenizer = place / "tokenizer"
    if families.family(name).positions_after_padding:
        tokenizer = tmp_path / "tokenizer"
        save_tokenizer(train_bpe([str(place / "long.txt")], 300, progress=False), tokenizer)
    result = run(dict(
        train_file=place / "long.txt", model=model, tokenizer=tokenizer, output_dir=tmp_path / "run",
        max_seq_length=24, tokens_per_batch=384, max_steps=40, learning_rate=5e-3, eval_share=0.1, eval_steps=40,
    ))  # fmt: skip
    losses = [row["loss"] for row in training_rows(tmp_path / "run")]
    assert result["signal"] is None and losses[-1] < 0.85 * losses[0]
    model = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / "run")
    assert model.config.model_type == name
    [words] = fill_mask(*load_masked_lm(tmp_path / "run"), "every day the [MASK] chases mice")
    assert len(words) == 5


@pytest.mark.parametrize("objective", ["mlm+nsp", "mlm+sop"])
def test_pair_objectives_log_their_accuracy_and_load_as_pretraining(objective, options):
    result = run(options, objective=objective, max_steps=5)
    [row] = training_rows(options["output_dir"])
    assert 0 < row["pair_loss"] < 2 and 0 <= row["pair_accuracy"] <= 1
    assert 0 <= result["eval_pair_accuracy"] <= 1
    heads.Pretraining.from_pretrained(options["output_dir"])


def test_an_evaluation_is_the_same_each_time_and_right(place):
    model = heads.MaskedLM(hf_files.config_from_hf(MODEL))
    loader = MaskedBatches(Shards.open(place / "shards"), max_seq_length=24, tokens_per_batch=192, seed=1)
    row = pretrain.evaluate(model.train(), loader)
    assert model.training and row == pretrain.evaluate(model, loader)
    truths, scores = [], []
    with torch.no_grad():
        for batch in loader.epoch(0):
            truths.append(batch.labels[batch.picks])
            scores.append(model.eval().logits(batch, batch.picks))
    truths, scores = torch.cat(truths), torch.cat(scores)
    assert row["eval_picked_tokens"] == len(truths)
    assert row["eval_loss"] == pytest.approx(F.cross_entropy(scores, truths).item(), rel=1e-5)
    assert row["eval_masked_accuracy"] == pytest.approx((scores.argmax(-1) == truths).double().mean().item())
    assert row["eval_baseline_accuracy"] == pytest.approx((truths == truths.mode().values).double().mean().item())
    assert pretrain.evaluate(model, loader, interrupted=lambda: True) is None


def test_held_out_documents_are_not_learned_from(options, monkeypatch):
    loaders = []
    real = pretrain.loaders
    monkeypatch.setattr(pretrain, "loaders", lambda *args: loaders.extend(real(*args)) or loaders)
    run(options, max_steps=1)
    train, held_out = ({*loader.index.document[loader.ids].tolist()} for loader in loaders)
    assert train | held_out == set(range(60)) and not train & held_out and len(held_out) >= 3


@pytest.mark.parametrize(("schedule", "warmup"), [("linear", {"warmup_steps": 4}), ("cosine", {"warmup_ratio": 0.5})])
def test_the_recipe_reaches_the_optimizer(schedule, warmup, options, monkeypatch):
    made, optimizers = {}, []
    real = pretrain.optim.adamw

    def adamw(model, **settings):
        made.update(settings)
        optimizers.append(real(model, **settings))
        return optimizers[0]

    monkeypatch.setattr(pretrain.optim, "adamw", adamw)
    run(options, schedule=schedule, **warmup, max_steps=8, logging_steps=1, learning_rate=0.01, weight_decay=0.2,
        adam_beta1=0.8, adam_beta2=0.95, adam_epsilon=1e-5)  # fmt: skip
    assert made == {"learning_rate": 0.01, "weight_decay": 0.2, "betas": (0.8, 0.95), "epsilon": 1e-5}
    rows = training_rows(options["output_dir"])
    # each row is about its own step alone: 15 % of at most two micro-batches
    assert all(r["picked_tokens"] < 0.2 * 2 * 192 for r in rows)
    rates = [r["learning_rate"] for r in rows]
    assert {group["lr"] for group in optimizers[0].param_groups} == {rates[-1]}
    expected = [0.01 * pretrain.optim.SCHEDULES[schedule](step, 8, 4) for step in range(8)]
    assert rates == pytest.approx(expected) and rates[0] == pytest.approx(0.0025)


def test_bfloat16_products_learn_in_float32_parameters(options):
    run(options, bf16=True, max_steps=3, logging_steps=1)
    rows = training_rows(options["output_dir"])
    assert all(math.isfinite(r["loss"]) for r in rows) and rows[-1]["skipped_steps"] == 0
    tensors = load_file(options["output_dir"] / "model.safetensors")
    assert all(tensor.dtype == torch.float32 for tensor in tensors.values())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train_file": "nowhere.txt"}, "no such file or folder: nowhere.txt"),
        ({"train_file": ()}, "--train-file is missing"),
        ({"output_dir": ""}, "--output-dir is missing"),
        ({"max_seq_length": 65}, r"--max-seq-length is 65: the model .* has 64 positions"),
        ({"max_seq_length": 193}, "--tokens-per-batch is 192: expected at least --max-seq-length, 193"),
        ({"vocab_size": 201, "train_file": "text"}, "the tokenizer has 201 pieces: .* has a vocab_size of 200"),
        ({"model": "bert-huge"}, "no model is called 'bert-huge'"),
        ({"model": "missing.json"}, "missing.json cannot be read"),
        ({"model": "odd"}, "hidden_size is 30: expected a multiple of num_attention_heads, 4"),
        ({"tokenizer": "nowhere"}, "no tokenizer in nowhere"),
        ({"objective": "clm"}, "--objective is 'clm': expected one of mlm, mlm.nsp, mlm.sop"),
        ({"mlm_probability": 1.5}, "--mlm-probability is 1.5: expected a number above 0 and below 1"),
        ({"learning_rate": -1.0}, "--learning-rate is -1.0: expected a number above 0"),
        ({"dropout": 1.0}, "--dropout is 1.0"),
        ({"epochs": 1}, "more than one of --max-steps, --epochs and --max-minutes"),
        ({"max_steps": None, "max_minutes": 1, "warmup_steps": 5}, "--warmup-steps does not go with --max-minutes"),
        ({"device": "abacus"}, "--device is 'abacus'"),
        ({"device": "meta"}, "--device is 'meta': expected auto, cpu, cuda or cuda:1"),
        ({"device": "cuda:99"}, "--device is 'cuda:99': PyTorch finds no such GPU"),
        ({"device": "cuda:99999999999999999999"}, "--device is 'cuda:9+': expected"),
        ({"output_dir": "file/run"}, "file/run cannot be written"),
        ({"train_file": "empty"}, "holds no text"),
        ({"objective": "rtd"}, "--objective rtd: bert models have no head for replaced tokens, electra, deberta-v2"),
        ({"objective": "rtd", "model": "deberta"}, "deberta models have no head for replaced tokens"),
        ({"objective": "rtd", "model": "lone"}, "rtd: .*lone has no generator, expected one in .*lone/generator"),
        ({"rtd_weight": 0.0}, "--rtd-weight is 0.0: expected a number above 0"),
        ({"rtd_weight": math.nan}, "--rtd-weight is nan"),
        ({"embedding_sharing": "es"}, "--embedding-sharing is 'es': expected one of shared, gdes, none"),
        ({"embedding_sharing": "gdes"}, "--embedding-sharing goes with --objective rtd"),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else "",
)
def test_impossible_options_are_refused_before_any_work(changes, message, options, place, tmp_path, monkeypatch):
    def no_work(*args, **kwargs):
        raise AssertionError("work was begun")

    for script, name in ((pretrain, "train_wordpiece"), (pretrain_inputs, "prepare"), (pretrain, "model_of")):
        monkeypatch.setattr(script, name, no_work)
    (tmp_path / "file").write_text("")
    (tmp_path / "empty.txt").write_text("\n \n")
    if changes.get("model") == "lone":
        config = hf_files.config_from_hf(MODEL | {"model_type": "electra"})
        heads.ReplacedTokenDetector(config).save_pretrained(tmp_path / "lone")
    stand_ins = {
        "text": place / "text.txt", "empty": tmp_path / "empty.txt", "file/run": tmp_path / "file" / "run",
        "odd": write_model(tmp_path, "odd.json", hidden_size=30, num_attention_heads=4),
        "deberta": write_model(tmp_path, "deberta.json", model_type="deberta", relative_attention=True),
        "lone": tmp_path / "lone",
    }  # fmt: skip
    changes = {name: stand_ins.get(value, value) for name, value in changes.items()}
    with pytest.raises((ValueError, OSError), match=message) as error:
        run(options, **changes)
    assert "\n" not in str(error.value)


def test_every_option_has_help_and_a_default():
    for field in dataclasses.fields(PretrainConfig):
        assert field.metadata["help"].endswith("."), field.name
        assert field.default is not dataclasses.MISSING, field.name
