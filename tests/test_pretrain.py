"""Pretraining on tiny models: it learns, it resumes to the bit, it stops when told, it says what is wrong."""

import dataclasses
import json
import math
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file

from fastbert import checkpoint, heads, pretrain, report, variants
from fastbert.data import MaskedBatches
from fastbert.fill_mask import fill_mask, load
from fastbert.packing import Batch
from fastbert.pretrain import PretrainConfig
from fastbert.shards import Shards, prepare
from fastbert.tokenizer import load_tokenizer, save_tokenizer, train_bpe, train_wordpiece

ROOT = Path(__file__).parent.parent
MODEL = {
    "model_type": "bert", "vocab_size": 200, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "intermediate_size": 64, "max_position_embeddings": 64,
}  # fmt: skip
WORDS = {
    "cat": "chases mice in dark barns", "dog": "guards sheep on green hills", "bird": "builds nests among tall trees",
    "fish": "follows currents under grey ice", "horse": "carries riders over stone bridges",
}  # fmt: skip


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def no_tensorboard(monkeypatch):
    # its import takes seconds; one test asks for it
    monkeypatch.setattr(report, "_tensorboard", lambda *_: None)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A directory with a text and a longer one, model.json, and a tokenizer and shards of the shorter."""
    place = tmp_path_factory.mktemp("pretrain")
    rng = random.Random(0)
    documents = [
        "".join(
            f"every day the {animal} {WORDS[animal]} .\n" for animal in rng.choices(list(WORDS), k=rng.randint(1, 6))
        )
        for _ in range(300)
    ]
    (place / "long.txt").write_text("\n".join(documents))
    (place / "text.txt").write_text("\n".join(documents[:60]))
    (place / "model.json").write_text(json.dumps(MODEL))
    tokenizer = train_wordpiece([str(place / "text.txt")], 120, progress=False)
    save_tokenizer(tokenizer, place / "tokenizer")
    prepare([str(place / "text.txt")], tokenizer, place / "shards", progress=False)
    return place


def short_run(place):
    """Options of a run with dropout and accumulation, whose 12 steps pass the end of an epoch."""
    return {
        "train_file": place / "shards", "model": place / "model.json",
        "max_seq_length": 24, "tokens_per_batch": 192, "gradient_accumulation_steps": 2, "max_steps": 12,
        "learning_rate": 3e-3, "logging_steps": 5, "eval_steps": 4, "save_steps": 100, "eval_share": 0.1, "seed": 7,
    }  # fmt: skip


@pytest.fixture
def options(place, tmp_path):
    return short_run(place) | {"output_dir": tmp_path / "run"}


@pytest.fixture(scope="module")
def whole(place):
    """The directory of that run, done without a break."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(report, "_tensorboard", lambda *_: None)
        before = torch.get_num_threads()
        torch.set_num_threads(1)
        run(short_run(place), output_dir=place / "whole")
        torch.set_num_threads(before)
    return place / "whole"


def run(options, **changes):
    return pretrain.pretrain(PretrainConfig(**options | changes))


def rows_without_times(directory):
    timing = ("elapsed", "tokens_per_second", "memory_mb")
    return [{k: v for k, v in row.items() if k not in timing} for row in report.read_metrics(directory)]


def assert_same_run(one, other):
    """The same parameters, optimizer state and figures, bit for bit."""
    for name in (checkpoint.MODEL, checkpoint.OPTIMIZER):
        tensors = [load_file(directory / "checkpoint-12" / name) for directory in (one, other)]
        assert tensors[0].keys() == tensors[1].keys()
        for key, value in tensors[0].items():
            assert torch.equal(value, tensors[1][key]), key
    assert rows_without_times(one) == rows_without_times(other)


# ------------------------------------------------------------------------------------------------ the whole way


def test_from_raw_text_to_a_model_that_knows_words(place, tmp_path, monkeypatch):
    monkeypatch.undo()  # with TensorBoard
    output = tmp_path / "run"
    result = pretrain.pretrain(PretrainConfig(
        train_file=(place / "long.txt",), output_dir=output, model=place / "model.json", vocab_size=148,
        max_seq_length=32, tokens_per_batch=512, max_steps=120, learning_rate=1e-2, eval_steps=40, save_steps=80,
        eval_share=0.1, dropout=0.0, schedule="constant",
    ))  # fmt: skip
    assert result["signal"] is None and result["step"] == 120
    assert result["eval_masked_accuracy"] > 2 * result["eval_baseline_accuracy"] > 0.05
    assert result["eval_picked_tokens"] > 20

    rows = report.read_metrics(output)
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
    model, tokenizer = load(output)
    [words] = fill_mask(model, tokenizer, "every day the cat chases [MASK] in dark barns .", top_k=5)
    assert {word for word, _ in words} == {sentence.split()[1] for sentence in WORDS.values()}
    shares = [share for _, share in words]
    assert shares == sorted(shares, reverse=True) and 0.9 < sum(shares) < 1
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForMaskedLM.from_pretrained(output).eval()
    encoded = transformers.AutoTokenizer.from_pretrained(output)("every day the dog guards [MASK]", return_tensors="pt")
    expected = theirs(**encoded).logits
    ours = model(encoded["input_ids"]).logits
    torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-4)


def test_going_on_from_a_model_begins_with_what_it_knows(options, tmp_path, monkeypatch):
    run(options, max_steps=4)
    start = {}

    def look(model, batches, **_):
        start.update({name: p.detach().clone() for name, p in model.named_parameters()})
        raise KeyboardInterrupt

    monkeypatch.setattr(pretrain, "accumulate", look)
    with pytest.raises(KeyboardInterrupt):
        run(options, model=options["output_dir"], output_dir=tmp_path / "second", dropout=0.3)
    model = heads.MaskedLM.from_pretrained(options["output_dir"])
    for name, p in model.named_parameters():
        assert torch.equal(p, start[name])


FAMILIES = {
    "roberta": dict(type_vocab_size=1),
    "albert": dict(embedding_size=16),
    "electra": dict(embedding_size=16),
    "distilbert": dict(dim=32, n_layers=2, n_heads=2, hidden_dim=64, dropout=0.1, attention_dropout=0.1),
    "deberta-v2": dict(
        relative_attention=True, pos_att_type=["c2p", "p2c"], position_buckets=8, share_att_key=True,
        norm_rel_ebd="layer_norm", position_biased_input=False, type_vocab_size=0,
    ),
    "modernbert": dict(local_attention=8, attention_dropout=0.1, pad_token_id=0),
}  # fmt: skip


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_learns_from_raw_text(name, place, tmp_path):
    values = {**MODEL, "model_type": name, "vocab_size": 320, **FAMILIES[name]}
    (tmp_path / "model.json").write_text(json.dumps(values))
    tokenizer = train_bpe([str(place / "long.txt")], 300, progress=False)
    save_tokenizer(tokenizer, tmp_path / "tokenizer")
    if variants.family(name).positions_after_padding:
        options = dict(tokenizer=tmp_path / "tokenizer")
    else:
        options = dict(tokenizer=place / "tokenizer")
    result = run(
        dict(
            train_file=place / "long.txt", model=tmp_path / "model.json", output_dir=tmp_path / "run",
            max_seq_length=24, tokens_per_batch=384, max_steps=40, learning_rate=5e-3, eval_share=0.1, eval_steps=40,
            **options,
        )
    )  # fmt: skip
    losses = [row["loss"] for row in report.read_metrics(tmp_path / "run") if "loss" in row]
    assert result["signal"] is None and losses[-1] < 0.85 * losses[0]
    model = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / "run")
    assert model.config.model_type == name
    [words] = fill_mask(*load(tmp_path / "run"), "every day the [MASK] chases mice")
    assert len(words) == 5


@pytest.mark.parametrize("objective", ["mlm+nsp", "mlm+sop"])
def test_pair_objectives_log_their_accuracy_and_load_as_pretraining(objective, options):
    result = run(options, objective=objective, max_steps=5)
    [row] = [r for r in report.read_metrics(options["output_dir"]) if "loss" in r]
    assert 0 < row["pair_loss"] < 2 and 0 <= row["pair_accuracy"] <= 1
    assert 0 <= result["eval_pair_accuracy"] <= 1
    heads.Pretraining.from_pretrained(options["output_dir"])


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
    rates = [r["learning_rate"] for r in report.read_metrics(options["output_dir"]) if "loss" in r]
    assert max(rates) > 2e-3 and rates[-1] < 1e-3 and len(rates) > 3


# --------------------------------------------------------------------------------------------- the loss rule


def one_batch(lengths, picks_of, vocab=50, pairs=False):
    """A Batch of random sequences; sequence b has the rows `picks_of[b]` picked."""
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
    T = int(cu_seqlens[-1])
    ids = torch.randint(5, vocab, (T,))
    labels = torch.full((T,), -100)
    for start, rows in zip(cu_seqlens.tolist(), picks_of, strict=False):
        for row in rows:
            labels[start + row] = torch.randint(5, vocab, ())
    return Batch(
        ids, torch.cat([torch.arange(n) for n in lengths]), torch.zeros_like(ids), cu_seqlens.int(), max(lengths),
        labels=labels, picks=(labels != -100).nonzero()[:, 0],
        pair_labels=torch.arange(len(lengths)) % 2 if pairs else None,
    )  # fmt: skip


def cut(batch, groups):
    """The sequences of a batch as several batches, `groups` sequences each."""
    starts, parts, at = batch.cu_seqlens.tolist(), [], 0
    for size in groups:
        rows = slice(starts[at], starts[at + size])
        labels = batch.labels[rows]
        parts.append(Batch(
            batch.input_ids[rows], batch.position_ids[rows], batch.token_type_ids[rows],
            batch.cu_seqlens[at : at + size + 1] - starts[at], batch.max_seqlen, labels=labels,
            picks=(labels != -100).nonzero()[:, 0],
            pair_labels=None if batch.pair_labels is None else batch.pair_labels[at : at + size],
        ))  # fmt: skip
        at += size
    assert at == len(starts) - 1
    return parts


LENGTHS, PICKS = [7, 3, 9, 1, 5, 8], [[1, 2, 3, 6], [], [4], [], [], [0, 1, 2, 3, 4, 5]]


def gradients_of(model, batches):
    model.zero_grad(set_to_none=True)
    sums = pretrain.accumulate(model, batches)
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}, sums


@pytest.mark.parametrize("kind", ["MaskedLM", "Pretraining"])
@pytest.mark.parametrize("groups", [[3, 3], [1, 2, 2, 1], [6]], ids=["two", "four-one-without-picks", "one"])
def test_cutting_a_step_into_micro_batches_does_not_change_its_gradient(kind, groups):
    config = variants.config_from_hf(MODEL | {"vocab_size": 50, "hidden_dropout_prob": 0.0,
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
    model = heads.MaskedLM(variants.config_from_hf(MODEL | {"vocab_size": 50}))
    found, sums = gradients_of(model, [one_batch([4, 3], [[], []])])
    assert not found and sums["count"] == 0 and sums["loss"] == 0
    # in a run: steps go by, are counted, and leave the model finite
    run(options, mlm_probability=1e-4, logging_steps=12, gradient_accumulation_steps=1)
    [row] = [r for r in report.read_metrics(options["output_dir"]) if "loss" in r]
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
    rows = [r for r in report.read_metrics(options["output_dir"]) if "loss" in r]
    assert [r["skipped_steps"] for r in rows] == [0, 0, 1, 2, 2, 2, 3, 3, 3, 3, 3, 3]
    assert [r["gradient_norm"] is None for r in rows] == [step in (2, 3, 6) for step in range(12)]


def test_five_in_a_row_abort_and_keep_the_last_good_checkpoint(options, monkeypatch):
    poison(monkeypatch, range(4, 100))
    with pytest.raises(FloatingPointError, match="no finite gradient in the 5 steps up to 9"):
        run(options, save_steps=4, gradient_accumulation_steps=1)
    found = checkpoint.latest(options["output_dir"])
    assert found.name == "checkpoint-8"
    assert all(tensor.isfinite().all() for tensor in load_file(found / checkpoint.MODEL).values())


def test_an_evaluation_is_the_same_each_time_and_right(place):
    model = heads.MaskedLM(variants.config_from_hf(MODEL))
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
    real = pretrain._loaders
    monkeypatch.setattr(pretrain, "_loaders", lambda *args: loaders.extend(real(*args)) or loaders)
    run(options, max_steps=1)
    train, held_out = ({*loader.index.document[loader.ids].tolist()} for loader in loaders)
    assert train | held_out == set(range(60)) and not train & held_out and len(held_out) >= 3


def test_dropout_has_another_seed_in_every_place():
    places = [(0, 0, 0, 0), (1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1), (0, 11, 0, 0), (0, 1, 1, 0)]
    seeds = [pretrain.dropout_seed(*place) for place in places]
    assert len({int(seed) for seed in seeds}) == len(places)
    assert all(seed.dtype == torch.int64 and seed.shape == (1,) for seed in seeds)
    assert torch.equal(seeds[0], pretrain.dropout_seed(*places[0]))


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
    rows = [r for r in report.read_metrics(options["output_dir"]) if "loss" in r]
    # each row is about its own step alone: 15 % of at most two micro-batches
    assert all(r["picked_tokens"] < 0.2 * 2 * 192 for r in rows)
    rates = [r["learning_rate"] for r in rows]
    assert {group["lr"] for group in optimizers[0].param_groups} == {rates[-1]}
    expected = [0.01 * pretrain.optim.SCHEDULES[schedule](step, 8, 4) for step in range(8)]
    assert rates == pytest.approx(expected) and rates[0] == pytest.approx(0.0025)


def test_bfloat16_products_learn_in_float32_parameters(options):
    run(options, bf16=True, max_steps=3, logging_steps=1)
    rows = [r for r in report.read_metrics(options["output_dir"]) if "loss" in r]
    assert all(math.isfinite(r["loss"]) for r in rows) and rows[-1]["skipped_steps"] == 0
    tensors = load_file(options["output_dir"] / "model.safetensors")
    assert all(tensor.dtype == torch.float32 for tensor in tensors.values())


# ------------------------------------------------------------------------------------------------- resuming


def stop_in(monkeypatch, name, call):
    """SIGTERM arrives in call number `call` of the function `name` of pretrain.py."""
    real, calls = getattr(pretrain, name), [0]

    def function(*args, **kwargs):
        calls[0] += 1
        if calls[0] == call:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*args, **kwargs)

    monkeypatch.setattr(pretrain, name, function)


@pytest.mark.parametrize(
    ("where", "call", "step"),
    [("accumulate", 1, 1), ("accumulate", 6, 6), ("accumulate", 8, 8), ("evaluate", 1, 4), ("accumulate", 10, 10)],
    ids=["first-step", "mid-epoch", "at-an-evaluation", "in-an-evaluation", "second-epoch-at-a-row-of-the-log"],
)
def test_a_stopped_run_resumes_to_the_bit(where, call, step, options, whole, monkeypatch, capsys):
    handler = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patched:
        stop_in(patched, where, call)
        result = run(options)
    assert result["signal"] == signal.SIGTERM and signal.getsignal(signal.SIGTERM) is handler
    assert f"stopped by SIGTERM after step {step}: go on with --resume" in capsys.readouterr().err
    assert checkpoint.latest(options["output_dir"]).name == f"checkpoint-{step}"
    assert not (options["output_dir"] / "model.safetensors").exists()
    result = run(options, resume=True)
    assert result["signal"] is None and result["step"] == 12
    assert_same_run(whole, options["output_dir"])
    epochs = {row["epoch"] for row in report.read_metrics(options["output_dir"])}
    assert epochs == {0, 1}, "the run was meant to pass the end of an epoch"


@pytest.mark.filterwarnings("ignore:passed over")
def test_a_run_goes_on_from_the_good_checkpoint_before_a_damaged_one(options, whole):
    run(options, save_steps=4, save_total_limit=5)
    directory = options["output_dir"]
    for name in ("checkpoint-12", "checkpoint-8"):
        (directory / name / checkpoint.MODEL).write_bytes(b"")
    (directory / "model.safetensors").unlink()
    with pytest.warns(UserWarning, match="passed over: .*checkpoint-12/model.safetensors has 0 bytes"):
        run(options, resume=True)
    assert_same_run(whole, directory)
    assert (directory / "model.safetensors").exists()


def test_a_finished_run_may_be_made_longer(options):
    run(options, max_steps=4)
    assert run(options, max_steps=6, resume=True)["step"] == 6


def test_resume_without_a_run_begins_one(options, capsys):
    assert run(options, resume=True, max_steps=2)["step"] == 2
    assert "no checkpoint yet" in capsys.readouterr().err


def command(options, *flags):
    arguments = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
    code = "import sys; from fastbert.cli import main; main(sys.argv[1:], prog_name='fastbert')"
    return subprocess.Popen(
        [sys.executable, "-c", code, "pretrain", *arguments, *flags], cwd=ROOT, text=True,
        stderr=subprocess.PIPE, stdout=subprocess.PIPE, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def wait_for(path, process):
    for _ in range(1200):
        if path.exists():
            return
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    raise AssertionError(f"{path} did not come")


def test_a_killed_process_a_busy_directory_and_ctrl_c(options, tmp_path):
    """One long run: busy while it lives, killed without warning, resumed, interrupted, resumed to its end."""
    directory = options["output_dir"]
    options = options | {"save_steps": 3, "eval_steps": 1000, "max_steps": 3000}
    process = command(options)
    wait_for(directory / "checkpoint-3", process)
    with pytest.raises(ValueError, match=f"in use by a live run, process {process.pid}"):
        run(options, resume=True)
    process.kill()
    process.communicate()
    killed_at = checkpoint.read_state(checkpoint.latest(directory))["progress"]["step"]

    process = command(options, "--resume")
    wait_for(directory / f"checkpoint-{killed_at + 6}", process)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "stopped by SIGINT after step" in errors.splitlines()[-1] and "Traceback" not in errors
    # the same run without a break
    step = checkpoint.read_state(checkpoint.latest(directory))["progress"]["step"]
    with pytest.MonkeyPatch.context() as patched:
        stop_in(patched, "accumulate", step)
        run(options, output_dir=tmp_path / "whole")
    one, other = (load_file(d / f"checkpoint-{step}" / checkpoint.MODEL) for d in (directory, tmp_path / "whole"))
    assert all(torch.equal(one[name], other[name]) for name in one)


# --------------------------------------------------------------------------------------- several processes


def worker(rank, world_size, file, options):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=world_size)
    report._tensorboard = lambda *_: None
    run(options)
    torch.distributed.destroy_process_group()


def test_two_processes_learn_what_one_does_with_two_micro_batches(options, tmp_path):
    options = options | {"dropout": 0.0, "max_steps": 4, "gradient_accumulation_steps": 1}
    run(options, output_dir=tmp_path / "one", gradient_accumulation_steps=2)
    context = multiprocessing.get_context("fork")
    processes = [
        context.Process(target=worker, args=(rank, 2, tmp_path / "rendezvous", options)) for rank in range(2)
    ]  # fmt: skip
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0]
    one, two = (load_file(d / "model.safetensors") for d in (tmp_path / "one", options["output_dir"]))
    for name in one:
        torch.testing.assert_close(one[name], two[name], atol=1e-5, rtol=1e-4, msg=name)
    figures = [report.read_metrics(d)[-1] for d in (tmp_path / "one", options["output_dir"])]
    assert figures[0]["tokens"] == figures[1]["tokens"]


# --------------------------------------------------------------------------------------------------- errors


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
        ({"model": "missing.json"}, "missing.json is not a readable JSON file"),
        ({"model": "odd"}, "hidden_size 30 is not divisible by num_attention_heads 4"),
        ({"tokenizer": "nowhere"}, "no tokenizer in nowhere"),
        ({"objective": "clm"}, "--objective is 'clm': expected one of mlm, mlm.nsp, mlm.sop"),
        ({"mlm_probability": 1.5}, "--mlm-probability is 1.5: expected more than 0, and below 1"),
        ({"learning_rate": -1.0}, "--learning-rate is -1.0: expected a number above 0"),
        ({"dropout": 1.0}, "--dropout is 1.0"),
        ({"epochs": 1}, "more than one of --max-steps, --epochs and --max-minutes"),
        ({"max_steps": None, "max_minutes": 1, "warmup_steps": 5}, "--warmup-steps does not go with --max-minutes"),
        ({"device": "abacus"}, "--device is 'abacus'"),
        ({"output_dir": "file/run"}, "file/run cannot be written"),
        ({"train_file": "empty"}, "holds no text"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_cannot_work_is_said_before_any_work(changes, message, options, place, tmp_path, monkeypatch):
    def no_work(*args, **kwargs):
        raise AssertionError("work was begun")

    for name in ("train_wordpiece", "prepare", "_model"):
        monkeypatch.setattr(pretrain, name, no_work)
    (tmp_path / "file").write_text("")
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "odd.json").write_text(json.dumps(MODEL | {"hidden_size": 30, "num_attention_heads": 4}))
    stand_ins = {
        "text": place / "text.txt", "empty": tmp_path / "empty.txt", "odd": tmp_path / "odd.json",
        "file/run": tmp_path / "file" / "run",
    }  # fmt: skip
    changes = {name: stand_ins.get(value, value) for name, value in changes.items()}
    with pytest.raises((ValueError, OSError), match=message) as error:
        run(options, **changes)
    assert "\n" not in str(error.value)


def test_a_directory_with_another_run_is_not_overwritten(options):
    run(options, max_steps=2)
    before = {p: p.stat().st_mtime_ns for p in options["output_dir"].iterdir() if p.is_file() and p.name != ".lock"}
    with pytest.raises(ValueError, match="holds another run .*--resume"):
        run(options)
    assert before == {p: p.stat().st_mtime_ns for p in before}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"learning_rate": 0.5}, r"--learning-rate is 0.5, and 0.003 in .*checkpoint-2"),
        ({"tokens_per_batch": 256}, "--tokens-per-batch is 256, and 192 in"),
        ({"seed": 8}, "--seed is 8, and 7 in"),
        ({"dropout": 0.0}, "--dropout is 0.0, and None in"),
        ({"tokenizer": "other", "train_file": "text"}, "the tokenizer is another"),
        ({"train_file": "other text"}, "the text is not the text that"),
    ],
    ids=["learning-rate", "batch", "seed", "dropout", "tokenizer", "text"],
)
def test_resuming_with_something_else_names_it(changes, message, options, place, tmp_path):
    run(options, max_steps=2)
    tokenizer = load_tokenizer(place / "tokenizer")
    save_tokenizer(train_wordpiece([str(place / "text.txt")], 100, progress=False), tmp_path / "other")
    lines = (place / "text.txt").read_text().splitlines(keepends=True)[::-1]
    (tmp_path / "reversed.txt").write_text("".join(lines))
    prepare([str(tmp_path / "reversed.txt")], tokenizer, tmp_path / "other-shards", progress=False)
    stand_ins = {"text": place / "text.txt", "other": tmp_path / "other", "other text": tmp_path / "other-shards"}
    changes = {name: stand_ins.get(value, value) for name, value in changes.items()}
    with pytest.raises(ValueError, match=message):
        run(options, max_steps=4, resume=True, **changes)


def test_every_option_has_help_and_a_default():
    for field in dataclasses.fields(PretrainConfig):
        assert field.metadata["help"].endswith("."), field.name
        assert field.default is not dataclasses.MISSING, field.name
