"""Fine-tuning: what it learns and leaves behind, exact sums, the best step, resume to the bit, heads of other tasks."""

import json
import signal

import numpy as np
import pytest
import torch
from labelled import sentences, write_csv
from runs import assert_same_tensors, checkpoints, in_two_processes, rows_without_times, stop_in

from fastbert.model.heads import SequenceClassifier
from fastbert.tasks import predictor, results
from fastbert.training import checkpoint, finetune, log, optim
from fastbert.training.finetune import FinetuneConfig
from fastbert.training.step_sums import accumulate

pytestmark = pytest.mark.filterwarnings("ignore:.*these start fresh")


@pytest.fixture
def options(encoder, tmp_path):
    """Options of a run of 12 steps, with an evaluation and a checkpoint every 4."""
    return {
        "train_file": write_csv(tmp_path / "train.csv", sentences(160)), "model": encoder,
        "output_dir": tmp_path / "run", "learning_rate": 3e-3, "max_steps": 12, "eval_steps": 4, "save_steps": 4,
        "logging_steps": 4, "save_total_limit": 5, "eval_share": 0.2, "patience": 99,
    }  # fmt: skip


def run(options, **changes):
    return finetune.finetune(FinetuneConfig(**options | changes))


def test_a_run_learns_and_leaves_what_it_says(options, capsys):
    transformers = pytest.importorskip("transformers")
    directory = options["output_dir"]
    metrics = run(options, max_steps=None, epochs=6)
    assert metrics["task"] == "classify" and metrics["examples"] + metrics["train_examples"] == 160
    assert metrics["scores"]["accuracy"] >= 0.95 > 0.6 > metrics["scores"]["majority_baseline"]
    assert json.loads((directory / "metrics.json").read_text()) | {"signal": None} == metrics

    # what the files say is what the model in the directory does, here and in transformers
    lines = (directory / "predictions.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    texts = [row["texts"][0] for row in rows]
    found = predictor.load(directory).predict(texts)
    assert [row["label"] for row in rows] == [one["label"] for one in found]
    theirs = transformers.pipeline("text-classification", model=str(directory))(texts)
    assert [one["label"] for one in theirs] == [one["label"] for one in found]
    np.testing.assert_allclose([one["score"] for one in theirs], [one["score"] for one in found], atol=1e-5)
    # one temperature for all: the labels stay, the probabilities move
    calm = predictor.load(directory).predict(texts, calibrated=True)
    assert [one["label"] for one in calm] == [one["label"] for one in found]
    assert min(one["score"] for one in calm) > min(one["score"] for one in found), "it is sure and right: T < 1"
    wrong = sum(row["label"] != row["gold"] for row in rows)
    assert f"{wrong:,} of {len(rows):,} held-out examples" in (directory / "errors.md").read_text()
    card = (directory / "README.md").read_text()
    assert f"| accuracy | {metrics['scores']['accuracy']:.4f} |" in card and "fastbert finetune --train-file" in card
    assert not [*directory.glob("best-*")]
    assert "read as classify" in capsys.readouterr().err


@pytest.mark.parametrize("task", ["multilabel", "regress"])
def test_other_tasks_of_texts(task, options):
    """Training lowers the loss; the scores are those that `evaluate` finds; transformers computes the same."""
    transformers = pytest.importorskip("transformers")
    directory, rows = options["output_dir"], sentences(160)
    if task == "regress":
        rows = [(text, 1.0 + len(label)) for text, label in rows]
        write_csv(options["train_file"], rows, ("text", "score"))
    else:
        rows = [(text, f"{label};animal" if "cat" in text else label) for text, label in rows]
        write_csv(options["train_file"], rows, ("text", "labels"))
    held = write_csv(directory.with_name("dev.csv"), rows[:40], ("text", "score" if task == "regress" else "labels"))
    metrics = run(options, eval_file=held, max_steps=30)
    assert metrics["task"] == task
    losses = [row["label_loss"] for row in log.read_metrics(directory) if "label_loss" in row]
    assert losses[-1] < 0.93 * losses[0]
    best = [row for row in log.read_metrics(directory) if row["step"] == metrics["step"]][-1]
    name = metrics["metric"]
    assert best[f"eval_{name}"] == pytest.approx(metrics["scores"][name], abs=1e-6)
    assert best[f"eval_{name}"] == max(row.get(f"eval_{name}") or -1 for row in log.read_metrics(directory)) > 0.3
    again = predictor.load(directory).evaluate([held])["scores"]
    assert predictor.flat_figures(again) == pytest.approx(predictor.flat_figures(metrics["scores"]), abs=1e-5)

    texts = [text for text, _ in rows[:3]]
    model = transformers.AutoModelForSequenceClassification.from_pretrained(directory).eval()
    tokens = transformers.AutoTokenizer.from_pretrained(directory)(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        logits = model(**tokens).logits
    for one, row in zip(predictor.load(directory).predict(texts), logits):
        if task == "regress":
            assert one["score"] == pytest.approx(row.item(), abs=1e-4)
        else:
            assert [*one["probabilities"].values()] == pytest.approx(row.sigmoid().tolist(), abs=1e-5)
            chosen = json.loads((directory / "task.json").read_text())["settings"]["thresholds"]
            assert one["labels"] == [name for name, p in one["probabilities"].items() if p >= chosen[name]]


def test_shuffled_labels_give_the_majority_baseline(options):
    texts = [text for text, _ in sentences(160)]
    labels = np.random.default_rng(0).permutation([label for _, label in sentences(160)])
    write_csv(options["train_file"], zip(texts, labels))
    scores = run(options, metric="log_loss")["scores"]
    # three labels, 32 examples: two standard errors around a third
    assert abs(scores["accuracy"] - 1 / 3) < 0.2 and scores["log_loss"] > 1.0


@pytest.mark.parametrize(
    "recipe", [{}, {"class_weights": "balanced", "label_smoothing": 0.1}], ids=["plain", "weights-and-smoothing"]
)
def test_a_step_does_not_depend_on_its_parts(options, recipe):
    """Parts of a batch and accumulation: the same loss, the same parameters."""
    options |= {"dropout": 0.0, "eval_share": 0, "max_steps": 2, "logging_steps": 1, "max_seq_length": 12} | recipe
    whole = options["output_dir"]
    run(options, batch_size=24)
    run(options, batch_size=24, tokens_per_batch=24, output_dir=whole.with_name("parts"))
    run(options, batch_size=12, gradient_accumulation_steps=2, output_dir=whole.with_name("accumulated"))
    models = [SequenceClassifier.from_pretrained(whole.with_name(name)) for name in ("run", "parts", "accumulated")]
    rows = [log.read_metrics(whole.with_name(name)) for name in ("run", "parts", "accumulated")]
    for other, found in zip(models[1:], rows[1:]):
        for (name, one), two in zip(models[0].named_parameters(), other.parameters()):
            # AdamW divides by the root of tiny squares: a rounding difference may become 1e-4 of a step
            torch.testing.assert_close(one, two, atol=3e-6, rtol=1e-4, msg=name)
        assert [row["label_loss"] for row in found] == pytest.approx([row["label_loss"] for row in rows[0]], abs=1e-5)


def test_two_processes_share_a_step(options, tmp_path):
    """The same parameters as two micro-batches in one process; early stopping ends both processes."""
    options |= {"dropout": 0.0, "eval_steps": 2, "patience": 2, "max_steps": 40, "learning_rate": 1e-9}
    run(options, gradient_accumulation_steps=2, output_dir=tmp_path / "one")
    in_two_processes(run, options | {"output_dir": tmp_path / "two"}, tmp_path / "rendezvous")
    assert checkpoints(tmp_path / "one") == checkpoints(tmp_path / "two")
    rows = [log.read_metrics(tmp_path / name) for name in ("one", "two")]
    assert [row["step"] for row in rows[0]] == [row["step"] for row in rows[1]] and rows[1][-1]["step"] < 40
    for name in ("label_loss", "gradient_norm", "eval_label_loss"):
        values = [[row[name] for row in one if name in row] for one in rows]
        assert values[0] and values[0] == pytest.approx(values[1], rel=1e-5), name


def test_long_texts_count_once(options, encoder):
    """The windows of a text share its weight: the loss of a batch is a mean over examples, not over windows."""
    from fastbert.tasks import classify
    from fastbert.tasks.examples import Example, Pieces, Spec, batch_of

    spec = Spec("classify", ("bird", "cat", "dog"), max_length=12, stride=3)
    pieces = Pieces(checkpoint_tokenizer(encoder), spec)
    text = sentences(1)[0][0]
    windows = classify.encode([Example(1, (text * 3,), "cat"), Example(2, ("the cat",), "dog")], pieces, spec)
    assert len(windows[0]) > 2 and len(windows[1]) == 1 and pieces.windowed == 1
    model = SequenceClassifier.from_pretrained(encoder, num_labels=3)
    batch = batch_of(windows)
    with torch.no_grad():
        losses = [float(model(batch_of([[window]])).loss) for one in windows for window in one]
        loss = float(model(batch).loss)
    assert loss == pytest.approx((np.mean(losses[:-1]) + losses[-1]) / 2, abs=1e-6)
    assert model.label_counts(batch)["label"] == pytest.approx(2)


def checkpoint_tokenizer(directory):
    from fastbert.data.tokenizer import load_tokenizer

    return load_tokenizer(directory)


@pytest.mark.parametrize(
    ("where", "call", "step"),
    [("accumulate", 6, 6), ("accumulate", 8, 8), ("evaluate", 2, 8), ("accumulate", 12, 12)],
    ids=["between", "at-an-evaluation", "in-an-evaluation", "in-the-last"],
)
def test_a_stopped_run_resumes_to_the_bit(where, call, step, options, monkeypatch, capsys):
    run(options, output_dir=options["output_dir"].with_name("whole"))
    with monkeypatch.context() as patched:
        stop_in(patched, where, call, script=finetune)
        assert run(options)["signal"] == signal.SIGTERM
    assert f"stopped by SIGTERM after step {step}" in capsys.readouterr().err
    assert run(options, resume=True)["signal"] is None
    one, two = options["output_dir"], options["output_dir"].with_name("whole")
    for name in (checkpoint.MODEL, checkpoint.OPTIMIZER):
        assert_same_tensors(*(directory / "checkpoint-12" / name for directory in (one, two)))
    assert_same_tensors(one / "model.safetensors", two / "model.safetensors")
    assert rows_without_times(one) == rows_without_times(two)
    for name in ("metrics.json", "predictions.jsonl", "task.json"):
        assert (one / name).read_text() == (two / name).read_text()
    # the same when the run is made longer: the model of the best step was published, its directory is gone
    for directory in (one, two):
        run(options, resume=True, max_steps=16, output_dir=directory)
    assert (one / "metrics.json").read_text() == (two / "metrics.json").read_text()
    assert_same_tensors(one / "model.safetensors", two / "model.safetensors")


def test_other_examples_do_not_resume(options, monkeypatch):
    stop_in(monkeypatch, "accumulate", 4, script=finetune)
    run(options)
    write_csv(options["train_file"], sentences(160, seed=1))
    with pytest.raises(ValueError, match="--resume: the examples are not those that .*checkpoint-4 was trained on"):
        run(options, resume=True)


@pytest.mark.parametrize(
    ("direction", "scores", "best"),
    [
        (1, [0.3, 0.5, 0.5, 0.4], 2),
        (-1, [0.3, 0.5, 0.2, 0.2], 3),
        (1, [float("nan"), None, -0.2, float("nan")], 3),
        (1, [None, float("nan"), None, None], None),
    ],
    ids=["a-tie-keeps-the-earlier", "lower-is-better", "nan-is-never-best", "none"],
)
def test_the_best_step(direction, scores, best, tmp_path, encoder):
    model = SequenceClassifier.from_pretrained(encoder, num_labels=3)
    state = {"score": None, "step": 0, "since": 0, "evaluated": 0}
    for step, score in enumerate(scores, 1):
        finetune.keep_best(tmp_path, model, state, step, score, direction)
    assert [path.name for path in tmp_path.glob("best-*")] == ([f"best-{best}"] if best else [])
    assert state["step"] == (best or 0) and state["since"] == len(scores) - (best or 0)


def test_the_published_model_is_that_of_the_best_step(options, monkeypatch, capsys):
    """And training ends after `patience` evaluations without a better one, also in a resumed run."""
    scores = iter([0.2, 0.9, 0.4, 0.3, 0.2])
    monkeypatch.setattr(finetune, "evaluate", lambda *_: {"eval_label_accuracy": next(scores)})
    metrics = run(options, patience=2, max_steps=40)
    assert metrics["step"] == 8 and checkpoints(options["output_dir"])[-1] == "checkpoint-8"
    assert (options["output_dir"] / "checkpoint-16").exists() and not (options["output_dir"] / "checkpoint-20").exists()
    assert_same_tensors(
        options["output_dir"] / "model.safetensors", options["output_dir"] / "checkpoint-8" / "model.safetensors"
    )
    assert "no better score in 2 evaluations" in capsys.readouterr().err


def test_layers_below_learn_slower(encoder):
    model = SequenceClassifier.from_pretrained(encoder, num_labels=3)
    optimizer = optim.adamw(
        model, learning_rate=1.0, weight_decay=0.1, betas=(0.9, 0.999), epsilon=1e-8, layer_decay=0.5
    )
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    scale = {names[id(p)]: group["scale"] for group in optimizer.param_groups for p in group["params"]}
    assert scale.keys() == dict(model.named_parameters()).keys()
    wanted = {
        "classifier": 1.0,
        "pooler": 1.0,
        "encoder.blocks.1": 0.5,
        "encoder.blocks.0": 0.25,
        "encoder.embed": 0.125,
    }
    for name, value in scale.items():
        assert value == next(scale for start, scale in wanted.items() if name.startswith(start)), name


def test_update_scales_the_learning_rate_of_a_group(options, monkeypatch):
    seen = []
    real = torch.optim.AdamW.step
    monkeypatch.setattr(
        torch.optim.AdamW, "step", lambda self: (seen.append([g["lr"] for g in self.param_groups]), real(self))
    )
    run(options, layer_decay=0.5, max_steps=1, warmup_steps=0, eval_share=0)
    assert sorted(set(seen[0])) == pytest.approx([3e-3 * scale for scale in (0.125, 0.25, 0.5, 1.0)])


def test_a_frozen_encoder_stays_as_it_is(options, encoder, capsys):
    run(options, freeze_encoder=True, max_steps=4)
    tuned = SequenceClassifier.from_pretrained(options["output_dir"])
    before = SequenceClassifier.from_pretrained(encoder, num_labels=3)
    for (name, one), other in zip(before.encoder.named_parameters(), tuned.encoder.parameters()):
        assert torch.equal(one, other), name
    assert "expect clearly lower scores" in capsys.readouterr().err


def test_a_head_of_the_same_labels_is_kept_and_sorted_by_name(options, capsys):
    run(options, max_steps=60)
    first = options["output_dir"]
    # as another author might have saved it: another order of the labels, in capitals
    config = json.loads((first / "config.json").read_text())
    order = [2, 0, 1]
    names = [config["id2label"][str(i)].upper() for i in order]
    config |= {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}
    tensors = checkpoint.load_file(first / "model.safetensors")
    for name in ("classifier.weight", "classifier.bias"):
        tensors[name] = tensors[name][order].contiguous()
    checkpoint.save_file(tensors, first / "model.safetensors", metadata={"format": "pt"})
    (first / "config.json").write_text(json.dumps(config))
    (first / "task.json").unlink()

    scores = predictor.load(first).evaluate([options["train_file"]])["scores"]
    assert scores["accuracy"] > 0.9, "labels are matched by name"
    capsys.readouterr()
    metrics = run(
        options, model=first, output_dir=first.with_name("second"), learning_rate=1e-9, max_steps=1, eval_share=0.5
    )
    assert metrics["scores"]["accuracy"] > 0.9 and "for the same labels" in capsys.readouterr().err
    saved = json.loads((first.with_name("second") / "config.json").read_text())
    assert saved["id2label"] == {"0": "bird", "1": "cat", "2": "dog"}


def test_a_head_of_other_labels_is_drawn_anew(options, capsys):
    run(options, max_steps=1)
    first = options["output_dir"]
    write_csv(options["train_file"], [(text, f"the {label}") for text, label in sentences(160)])
    run(options, model=first, output_dir=first.with_name("a"), max_steps=1, learning_rate=1e-12)
    run(options, model=first, output_dir=first.with_name("b"), max_steps=1, learning_rate=1e-12, dropout=0.3)
    run(options, model=first, output_dir=first.with_name("c"), max_steps=1, learning_rate=1e-12, seed=1)
    said = capsys.readouterr().err
    assert said.count("(BertForSequenceClassification) is for another task or other labels: it is ignored") == 3
    heads = [
        SequenceClassifier.from_pretrained(first.with_name(name)).classifier.weight for name in ("run", "a", "b", "c")
    ]
    assert torch.allclose(heads[1], heads[2], atol=1e-9) and not torch.allclose(heads[1], heads[3], atol=1e-3)
    assert not torch.allclose(heads[0], heads[1], atol=1e-3)


def test_class_weights():
    from fastbert.tasks.examples import Spec, Window
    from fastbert.training.example_batches import class_weights

    spec = Spec("classify", ("a", "b", "c"))
    windows = [[Window([1], [0], label)] for label in (0, 0, 0, 1)]
    # n / (k n_c); a label without examples is no division by 0
    assert class_weights("balanced", spec, windows).tolist() == pytest.approx([4 / (2 * 3), 4 / 2, 0])
    assert class_weights("c=2, a=0.5", spec, windows).tolist() == [0.5, 1, 2]
    assert class_weights(None, spec, windows) is None
    for wrong in ("d=1", "a", "a=x", "a=-1", "a=nan"):
        with pytest.raises(ValueError, match="--class-weights has .*: expected balanced, or NAME=NUMBER"):
            class_weights(wrong, spec, windows)
    with pytest.raises(ValueError, match="--class-weights goes with classify and tag: the task is regress"):
        class_weights("balanced", Spec("regress", ()), [[Window([1], [0], 0.5)]])


def test_weights_divide_a_sum_below_one(encoder):
    """A micro-batch whose weights sum to 0.5 has the mean of its loss, not half of it."""
    from fastbert.tasks.examples import Window, batch_of

    model = SequenceClassifier.from_pretrained(encoder, num_labels=3)
    plain = [[Window([2, 7, 3], [0, 0, 0], 1)]]
    light = [[Window([2, 7, 3], [0, 0, 0], 1, weight=0.5)]]
    found = [accumulate(model, [batch_of(one)]) for one in (plain, light)]
    assert found[1]["label_loss"] / found[1]["label_count"] == pytest.approx(found[0]["label_loss"])
    with torch.no_grad():
        assert model(batch_of(light)).loss.item() == pytest.approx(model(batch_of(plain)).loss.item())


def test_several_seeds_share_the_split_and_the_best_is_on_top(options, monkeypatch, capsys):
    directory, outcomes, real = options["output_dir"], [], finetune.train
    monkeypatch.setattr(results, "RESAMPLES", 20)
    monkeypatch.setattr(finetune, "train", lambda config: outcomes.append(real(config)) or outcomes[-1])
    metrics = run(options, seeds=2, seed=3, metric="log_loss", max_steps=4)
    scores = metrics["seeds"]["scores"]
    assert [*scores] == ["3", "4"] and metrics["seeds"]["mean"] == pytest.approx(np.mean([*scores.values()]))
    assert metrics["seeds"]["standard_deviation"] == pytest.approx(abs(scores["3"] - scores["4"]) / 2**0.5)
    best = min(scores, key=scores.get)
    assert metrics["seeds"]["best"] == int(best) and scores["3"] != scores["4"]
    assert_same_tensors(directory / "model.safetensors", directory / f"seed-{best}" / "model.safetensors")
    lines = [
        {json.loads(line)["line"] for line in (directory / f"seed-{seed}" / "predictions.jsonl").open()}
        for seed in (3, 4)
    ]
    assert lines[0] == lines[1]
    assert json.loads((directory / "metrics.json").read_text()) | {"signal": None} == metrics
    card = (directory / "README.md").read_text()
    assert f"| {best} | {scores[best]:.4f} |" in card and f"| mean | {metrics['seeds']['mean']:.4f} |" in card
    # the card is that of the whole, not of the seed
    assert card.split("\n# ")[1].startswith(f"{directory.name}\n") and "seed-" not in card and "--seeds 2" in card
    # the interval of the mean: over the same resamples of the examples for both seeds
    means = np.mean([outcome.resampled for outcome in outcomes], 0)
    low, high = metrics["seeds"]["interval"]
    assert [low, high] == pytest.approx(np.percentile(means, [2.5, 97.5])) and low < metrics["seeds"]["mean"] < high
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith(f"2 seeds: log loss {metrics['seeds']['mean']:.4f} in the mean, standard deviation ")
    assert f"95 % interval {low:.4f} to {high:.4f}; seed {best} is published in {directory}" in said
    # finished runs go on to the same end
    assert run(options, seeds=2, seed=3, metric="log_loss", max_steps=4, resume=True)["seeds"] == metrics["seeds"]


def test_several_seeds_need_held_out_examples(options):
    with pytest.raises(ValueError, match="--seeds compares scores on held-out examples"):
        run(options, seeds=2, eval_share=0)
    assert not options["output_dir"].exists()


@pytest.mark.parametrize(
    ("count", "said"),
    [(160, None), (12, "25.0% of the examples are held out, not 10.0%: at least one example of each label")],
)
def test_the_share_that_is_held_out_is_said(count, said, options, capsys):
    run(options, train_file=write_csv(options["train_file"], sentences(count)), eval_share=0.1, max_steps=1)
    found = [line for line in capsys.readouterr().err.splitlines() if "are held out, not" in line]
    assert found == ([] if said is None else [said])
