"""What a run reports: rows of the log in words, the picture, the card; a new loss needs only a name."""

import errno
import json
import shutil

import pytest
import torch
from runs import assert_same_run, run, training_rows

from fastbert.cpu import libraries
from fastbert.data.batches import MaskedBatches
from fastbert.data.shards import Shards
from fastbert.data.tokenizer import load_tokenizer
from fastbert.model import hf_files
from fastbert.model.heads import TokenClassifier
from fastbert.training import card, checkpoint, log, loop, optim, pretrain, processes
from fastbert.training.pretrain import PretrainConfig
from fastbert.training.step_sums import accumulate, add, figures

MLM = {"loss": 2.0, "masked_accuracy": 0.25, "picked_tokens": 40}
PAIR = {"pair_loss": 0.5, "pair_accuracy": 0.75}
RTD = {"rtd_loss": 0.25, "rtd_accuracy": 0.9, "rtd_baseline_accuracy": 0.875, "rtd_recall": 0.5}


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (MLM, "loss 2.000, masked accuracy 25.0%"),
        (MLM | PAIR, "loss 2.000, masked accuracy 25.0%, pair loss 0.500, pair accuracy 75.0%"),
        (MLM | RTD, "loss 2.000, masked accuracy 25.0%, detection loss 0.250, detection accuracy 90.0%, "
                    "always guessing original 87.5%, replaced tokens found 50.0%"),
        (MLM | {"loss": None}, "loss not finite, masked accuracy 25.0%"),
        ({"span_loss": 1.5, "span_accuracy": 0.5, "size_loss": 3.0},
         "span loss 1.500, span accuracy 50.0%, size loss 3.000"),
        ({"macro_f1": 0.5, "strict_macro_f1": 0.5, "precision": 0.75, "mcc": 0.25, "pearson": None},
         "macro F1 0.500, precision 75.0%, MCC 0.250, Pearson undefined"),
    ],
    ids=["mlm", "pair", "rtd", "not-finite", "others", "scores"],
)  # fmt: skip
def test_rows_in_words(row, said):
    assert ", ".join(f"{name} {value}" for name, value in log.in_words(row).items()) == said
    evaluated = {f"eval_{name}": value for name, value in (row | {"baseline_accuracy": 0.125}).items()}
    said = log.in_words(row) | {"always guessing the most frequent token": "12.5%"}
    assert log.in_words(evaluated) == said


def test_figures_of_sums():
    sums = {
        "loss": 80.0, "count": 40, "correct": 10.0, "pair_loss": 0.0, "pair_count": 0, "pair_correct": 0.0,
        "rtd_loss": 25.0, "rtd_count": 100, "rtd_correct": 90.0, "rtd_replaced": 8.0, "rtd_found": 4.0, "tokens": 100,
    }  # fmt: skip
    expected = MLM | RTD | {"rtd_baseline_accuracy": 0.92}
    assert figures(sums) == expected and [*figures(sums)] == [*expected]
    assert figures({"count": 0, "tokens": 9}) == {"loss": 0, "masked_accuracy": 0, "picked_tokens": 0}
    assert figures({"size_loss": 3.0, "size_count": 2}) == {"size_loss": 1.5}


class Tagged:
    """MaskedBatches whose labels say of every token whether its number is odd."""

    def __init__(self, place):
        self.loader = MaskedBatches(Shards.open(place / "shards"), max_seq_length=24, tokens_per_batch=192, seed=1)

    def epoch(self, epoch, start=0):
        for batch in self.loader.epoch(epoch, start=start):
            batch.labels, batch.picks = batch.input_ids % 2, None
            yield batch


def test_a_new_task_needs_only_a_name(options, place, tmp_path, capsys):
    """Another script around the same loop: its name is in the log, on the console, in the card and the checkpoint."""
    config = PretrainConfig(**options | {"max_steps": 12, "logging_steps": 4, "eval_steps": 6, "learning_rate": 0.01})
    torch.manual_seed(0)
    model = TokenClassifier(hf_files.read_config(place / "model.json")).train()
    optimizer = optim.adamw(model, learning_rate=0.01, weight_decay=0.0, betas=(0.9, 0.98), epsilon=1e-6)
    loader, progress, directory = Tagged(place), loop.Progress(), tmp_path / "run"
    facts = {"config": {"objective": "mlm"}, "model_config": model.config.to_dict(), "tokenizer": "0" * 64}
    directory.mkdir()
    with log.Log(directory, 0) as journal, processes.signals() as caught:
        journal.begin(progress, 12, in_seconds=False)
        tokenizer = load_tokenizer(place / "tokenizer")
        taken = loop.Run(config, model, optimizer, tokenizer, facts, progress, journal, 12, caught)
        for step in taken.steps(loader, evaluates=True):
            if step.batches is None:
                with torch.no_grad():
                    sums = {}
                    add(sums, model(next(loader.epoch(0))).losses)
                step.row = {f"eval_{name}": value.item() for name, value in figures(sums).items()}
                continue
            taken.update(step, accumulate(model, step.batches), 0.01)
        last = journal.last_evaluation
    rows = training_rows(directory)
    assert [row["step"] for row in rows] == [4, 8, 12] and "loss" not in rows[0]
    assert rows[-1]["label_loss"] < 0.8 * rows[0]["label_loss"] and rows[-1]["label_accuracy"] > 0.6
    said = capsys.readouterr().err
    assert f"step 12: label loss {rows[-1]['label_loss']:.3f}, label accuracy {rows[-1]['label_accuracy']:.1%}" in said
    assert last["step"] == 12 and f"step 12: held-out label loss {last['eval_label_loss']:.3f}" in said
    assert checkpoint.read_state(directory / "checkpoint-12")["progress"]["evaluated"] == 12
    manifest = dict.fromkeys(("documents", "sentences", "tokens", "skipped_lines", "vocab_size"), 1)
    card.model_card(directory, facts, manifest, progress)
    text = (directory / "README.md").read_text(encoding="utf-8")
    assert f"| label loss | {last['eval_label_loss']:.3f} |" in text
    assert f"| label accuracy | {last['eval_label_accuracy']:.2%} |" in text


def test_an_old_checkpoint_resumes(options, whole, monkeypatch):
    """Then the sums of every objective were written, those that a run did not have as 0, and oneDNN multiplied."""
    directory = shutil.copytree(whole, options["output_dir"])
    for name in ("checkpoint-12", "checkpoint-8"):
        shutil.rmtree(directory / name)
    file = directory / "checkpoint-4" / checkpoint.STATE
    state = json.loads(file.read_text())
    sums = state["progress"]["window"]
    assert sums["count"] > 0 and not any("_" in name for name in sums)
    old = [f"{name}_{what}" for name in ("pair", "rtd") for what in ("count", "loss", "correct")]
    sums.update(dict.fromkeys([*old, "rtd_replaced", "rtd_found"], 0))
    assert state.pop("products") == {"every": "onednn"}
    file.write_text(json.dumps(state))
    checkpoint.write_manifest(directory / "checkpoint-4")
    for name in (checkpoint.MODEL, log.METRICS):
        (directory / name).unlink()
    (directory / log.METRICS).write_text("".join(
        line + "\n" for line in (whole / log.METRICS).read_text().splitlines() if json.loads(line)["step"] <= 4
    ))  # fmt: skip
    monkeypatch.setattr(libraries, "PINNED", "torch")
    run(options, resume=True)
    assert_same_run(whole, directory)


def test_tensorboard_reads_the_event_file(tmp_path):
    loader = pytest.importorskip("tensorboard.backend.event_processing.event_file_loader")
    writer = log.TensorBoard(tmp_path / "events", 3)
    writer.write({"step": 5, "elapsed": 1.5, "loss": 2.5, "eval_loss": None, "eval_masked_accuracy": 0.25, "tokens": 9})
    writer.close()
    [file] = (tmp_path / "events").iterdir()
    version, start, row = loader.LegacyEventFileLoader(str(file)).Load()
    assert version.file_version == "brain.Event:2" and (start.step, start.session_log.status) == (4, 1)
    values = {value.tag: value.simple_value for value in row.summary.value}
    assert row.step == 5 and values == {"loss": 2.5, "eval/masked_accuracy": 0.25, "tokens": 9}


def test_a_run_whose_directory_is_deleted_still_saves_its_model(options, monkeypatch, capfd):
    monkeypatch.undo()  # with TensorBoard
    real, calls = pretrain.accumulate, [0]

    def accumulate(*args, **kwargs):
        calls[0] += 1
        if calls[0] == 6:
            shutil.rmtree(options["output_dir"])
        return real(*args, **kwargs)

    monkeypatch.setattr(pretrain, "accumulate", accumulate)
    assert run(options)["step"] == 12
    assert (options["output_dir"] / checkpoint.MODEL).exists() and "Traceback" not in capfd.readouterr().err


def test_a_log_that_cannot_be_written_is_one_line(tmp_path):
    class Full:
        def write(self, text):
            raise OSError(errno.ENOSPC, "No space left on device")

        def close(self):
            self.write("")

    with (
        pytest.raises(OSError, match="^the log in .* cannot be written: No space left on device$"),
        log.Log(tmp_path, 0) as journal,
    ):
        journal.begin(loop.Progress(), 12, in_seconds=False)
        journal.rows = Full()
        journal.write({"step": 1, "eval_loss": 1.0})
