"""--lora: the adapter is peft's, the losses are ours, and what is published works with it and without."""

import json
import shutil
import signal

import numpy as np
import pytest
import torch
from labelled import sentences, write_csv, write_jsonl
from runs import assert_same_tensors, in_two_processes, rows_without_times, stop_in

from fastbert.model import heads
from fastbert.model.families import FAMILIES, config_of
from fastbert.model.hf_files import config_from_hf
from fastbert.tasks import predictor
from fastbert.tasks.examples import Window, batch_of
from fastbert.training import checkpoint, finetune, log, lora
from fastbert.training.finetune import FinetuneConfig

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore:.*these start fresh")


@pytest.fixture
def options(encoder, tmp_path):
    return {
        "train_file": write_csv(tmp_path / "train.csv", sentences(160)), "model": encoder, "lora": "r=4,dropout=0.1",
        "output_dir": tmp_path / "run", "learning_rate": 1e-2, "max_steps": 12, "eval_steps": 4, "save_steps": 4,
        "logging_steps": 4, "save_total_limit": 5, "eval_share": 0.2, "patience": 99,
    }  # fmt: skip


def run(options, **changes):
    return finetune.finetune(FinetuneConfig(**options | changes))


def test_the_adapter_loads_on_the_plain_model(options, encoder, capsys):
    """peft's logits on transformers' model, transformers' on the merged one, and our predictions: all the same."""
    directory = options["output_dir"]
    metrics = run(options, lora="r=4,target=query+value+dense", learning_rate=2e-2, max_steps=60)
    # 2 layers of 5 matrices, of which 2 have a side of 64; pooler and classifier
    assert f"--lora trains {2 * 4 * (3 * 64 + 2 * 96) + 33 * 32 + 33 * 3:,} of " in capsys.readouterr().err
    # of three labels; the encoder is random and tiny
    assert metrics["scores"]["accuracy"] > 0.6
    assert sorted(path.name for path in (directory / "adapter").iterdir()) == [
        "README.md", "adapter_config.json", "adapter_model.safetensors",
    ]  # fmt: skip
    texts = [text for text, _ in sentences(20, seed=3)]
    tokens = transformers.AutoTokenizer.from_pretrained(directory)(texts, padding=True, return_tensors="pt")
    base = transformers.AutoModelForSequenceClassification.from_pretrained(encoder, num_labels=3)
    with torch.no_grad():
        bare = base.eval()(**tokens).logits
        adapted = peft.PeftModel.from_pretrained(base, directory / "adapter").eval()(**tokens).logits
        merged = transformers.AutoModelForSequenceClassification.from_pretrained(directory).eval()(**tokens).logits
    assert (adapted - bare).abs().max() > 0.5
    torch.testing.assert_close(merged, adapted, atol=2e-5, rtol=1e-5)
    found = predictor.load(directory).predict(texts)
    np.testing.assert_allclose([[*one["probabilities"].values()] for one in found], adapted.softmax(-1), atol=1e-5)
    # the encoder of the base is as it was
    tensors, before = (lora.load_file(place / "model.safetensors") for place in (directory, encoder))
    assert torch.equal(*(one["bert.encoder.layer.0.attention.self.key.weight"] for one in (tensors, before)))
    settings = json.loads((directory / "adapter" / "adapter_config.json").read_text())
    assert sorted(settings["target_modules"]) == ["dense", "query", "value"]
    with pytest.raises(ValueError, match="run/adapter holds an adapter alone: expected the directory of a whole model"):
        predictor.load(directory / "adapter")
    rows = [json.loads(line) for line in (directory / "predictions.jsonl").read_text().splitlines()]
    again = predictor.load(directory).predict([row["texts"][0] for row in rows])
    assert [row["label"] for row in rows] == [one["label"] for one in again]


@pytest.mark.parametrize("step", [6, 12], ids=["between", "in-the-last"])
def test_a_stopped_run_resumes_to_the_bit(step, options, monkeypatch):
    run(options, output_dir=options["output_dir"].with_name("whole"))
    with monkeypatch.context() as patched:
        stop_in(patched, "accumulate", step, script=finetune)
        assert run(options)["signal"] == signal.SIGTERM
    assert run(options, resume=True)["signal"] is None
    one, two = options["output_dir"], options["output_dir"].with_name("whole")
    for name in ("checkpoint-12/adapter_model.safetensors", "checkpoint-12/optimizer.safetensors", "model.safetensors",
                 "adapter/adapter_model.safetensors"):  # fmt: skip
        assert_same_tensors(one / name, two / name)
    assert not (one / "checkpoint-12" / "model.safetensors").exists()
    checkpoint.verify(one / "checkpoint-12")
    assert rows_without_times(one) == rows_without_times(two)
    assert (one / "metrics.json").read_text() == (two / "metrics.json").read_text()
    run(options, resume=True)
    assert_same_tensors(one / "model.safetensors", two / "model.safetensors")
    (one / "checkpoint-12" / "adapter_model.safetensors").unlink()
    with pytest.raises(ValueError, match="checkpoint-12/adapter_model.safetensors is missing"):
        checkpoint.verify(one / "checkpoint-12")


def test_another_model_does_not_resume(options, encoder, tmp_path, monkeypatch):
    """The checkpoint has the adapter alone: on other weights it would be another model."""
    options |= {"model": shutil.copytree(encoder, tmp_path / "model")}
    stop_in(monkeypatch, "accumulate", 4, script=finetune)
    run(options)
    tensors = lora.load_file(tmp_path / "model" / "model.safetensors")
    tensors["bert.embeddings.LayerNorm.weight"] += 1
    checkpoint.save_file(tensors, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="--resume: the weights of .*model are not those that .*checkpoint-4 adapts"):
        run(options, resume=True)


def test_a_step_does_not_depend_on_its_parts(options, tmp_path):
    options |= {"lora": "r=2,target=query+dense", "dropout": 0.0, "eval_share": 0, "max_steps": 2, "logging_steps": 1,
                "label_smoothing": 0.1, "class_weights": "balanced", "max_seq_length": 12}  # fmt: skip
    run(options, batch_size=24)
    run(options, batch_size=24, tokens_per_batch=24, output_dir=tmp_path / "parts")
    run(options, batch_size=12, gradient_accumulation_steps=2, output_dir=tmp_path / "accumulated")
    in_two_processes(run, options | {"batch_size": 12, "output_dir": tmp_path / "two"}, tmp_path / "rendezvous")
    whole = log.read_metrics(tmp_path / "run")
    for name in ("parts", "accumulated", "two"):
        for one, other in zip(log.read_metrics(tmp_path / name), whole, strict=True):
            assert one["label_loss"] == pytest.approx(other["label_loss"], abs=1e-5), name
            assert one["gradient_norm"] == pytest.approx(other["gradient_norm"], rel=1e-3), name


@pytest.mark.parametrize("task", ["multilabel", "regress", "tag", "answer", "choose"])
def test_every_task(task, options, tmp_path):
    texts = [text for text, _ in sentences(60)]
    rows = {
        "multilabel": [{"text": text, "labels": [name for name in ("cat", "dog") if name in text]} for text in texts],
        "regress": [{"text": text, "score": float("dog" in text)} for text in texts],
        "tag": [{"tokens": text.split(), "tags": ["B-X" if word == "dog" else "O" for word in text.split()]}
                for text in texts],
        "answer": [{"question": f"who {i}", "context": text, "answers": {"text": ["year"], "answer_start": [3]}}
                   for i, text in enumerate(texts)],
        "choose": [{"context": text, "choices": ["the dog", "the cat"], "label": i % 2}
                   for i, text in enumerate(texts)],
    }[task]  # fmt: skip
    metrics = run(options, train_file=write_jsonl(tmp_path / "train.jsonl", rows), max_steps=4)
    assert metrics["task"] == task and (tmp_path / "run" / "adapter" / "adapter_config.json").is_file()
    again = predictor.load(tmp_path / "run").evaluate([tmp_path / "train.jsonl"])
    assert set(metrics["scores"]) <= {*again["scores"], "temperature"}
    # a .parquet has what a .jsonl has
    for ending in ("jsonl", "parquet"):
        predictor.load(tmp_path / "run").predict_file(tmp_path / "train.jsonl", tmp_path / f"out.{ending}")
    table = pytest.importorskip("pyarrow.dataset").dataset(tmp_path / "out.parquet").to_table()
    found = [{name: value for name, value in row.items() if value is not None}
             for row in table.to_pylist(maps_as_pydicts="strict")]  # fmt: skip
    lines = (tmp_path / "out.jsonl").read_text().splitlines()
    wanted = [{name: value for name, value in json.loads(line).items() if value is not None} for line in lines]
    assert found == wanted


SMALL = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16,
         "max_position_embeddings": 32}  # fmt: skip


@pytest.mark.parametrize("kind", ["SequenceClassifier", "TokenClassifier", "QuestionAnswerer", "MultipleChoice"])
@pytest.mark.parametrize("family", [name for name, row in FAMILIES.items() if not row.converts])
def test_every_family_and_head(family, kind):
    """Before training the adapted model is ours: the same logits, losses and counts; merged, it is so after it, too."""
    if kind not in FAMILIES[family].architectures:
        pytest.skip("no such head in transformers")
    torch.manual_seed(0)
    small = SMALL | {"pad_token_id": 1, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    more = {"modernbert": {"global_attn_every_n_layers": 2, "local_attention": 4}, "deberta": {"pos_att_type": ["c2p"]}}
    if family in more:
        config = config_from_hf({"model_type": family, **small, **more[family], "relative_attention": True})
    else:
        config = config_of(family, **small, num_labels=2)
    ours = getattr(heads, kind)(config).eval()
    adapted = lora.with_adapter(ours, lora.parsed("r=2"), "base").eval()
    label = {"SequenceClassifier": 1, "QuestionAnswerer": (1, 2), "MultipleChoice": 1}.get(kind)
    texts = [[5, 7, 8, 9, 4], [6, 9, 3], [5, 5, 2, 8, 7, 6]]
    windows = [[Window(ids, [0] * len(ids), label, [0, 1] + [-100] * (len(ids) - 2) if label is None else None)]
               for ids in texts]  # fmt: skip
    if kind == "MultipleChoice":
        windows = [[window for one in windows for window in one]]
    batch = batch_of(windows)
    assert adapted.label_counts(batch) == ours.label_counts(batch)
    found = None
    for after in (False, True):
        if after:
            with torch.no_grad():
                for parameter in adapted.parameters():
                    if parameter.requires_grad:
                        parameter.add_(0.3 * torch.randn_like(parameter))
            before, ours = found, adapted.merged()
        found, wanted = adapted(batch), ours(batch)
        torch.testing.assert_close(found.logits, wanted.logits, atol=2e-5, rtol=1e-4)
        torch.testing.assert_close(found.loss, wanted.loss, atol=2e-5, rtol=1e-4)
    assert (found.logits - before.logits).abs().max() > 0.01


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("8", "--lora has '8': expected r=8, and if need be"),
        ("rank=8", "--lora has 'rank=8': expected r=8"),
        ("r=", "--lora has 'r='"),
        ("r=0", "--lora has r=0: expected a whole number from 1 on"),
        ("r=1.5", "--lora has r=1.5"),
        ("r=nan", "--lora has r=nan"),
        ("r=4,r=8", "--lora has 'r=8'"),
        ("r=8,dropout=1", "--lora has dropout=1: expected 0 or more, below 1"),
        ("r=8,alpha=x", "--lora has alpha=x: expected a number above 0"),
        ("alpha=8", "--lora is 'alpha=8': expected r=8"),
        ("", "--lora has ''"),
        ("r=8,target=", "--lora has 'target='"),
    ],
)
def test_settings_that_are_none(text, said, options):
    with pytest.raises(ValueError) as error:
        FinetuneConfig(**options | {"lora": text})
    assert said in str(error.value) and "\n" not in str(error.value)


def test_settings():
    assert lora.parsed("r=8") == lora.Lora(8, 16, 0.0, ())
    assert lora.parsed("r=8, alpha=4,dropout=0.5,target=query+value") == lora.Lora(8, 4.0, 0.5, ("query", "value"))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"lora": "r=2,target=q_proj"}, "target=q_proj: the linear layers of a bert are dense, key, query, value"),
        ({"freeze_encoder": True}, "--freeze-encoder does not go with --lora"),
        ({"layer_decay": 0.9}, "--layer-decay does not go with --lora"),
        ({"model": "bert-tiny"}, "--lora needs a trained model: --model bert-tiny has fresh weights"),
    ],
    ids=["target", "freeze", "decay", "preset"],
)
def test_what_does_not_go_together(changes, said, options, tmp_path, monkeypatch):
    def unread(*_):
        raise AssertionError("the examples were read before the options were checked")

    monkeypatch.setattr("fastbert.training.finetune.read_files", unread)
    with pytest.raises(ValueError, match=said):
        run(options, **changes)
    assert not [*tmp_path.glob("run/checkpoint-*")]


def test_families_that_are_stored_under_other_names_are_refused():
    with pytest.raises(ValueError, match="--lora does not know the modules of a gte"):
        lora.check_targets(lora.parsed("r=2"), config_from_hf({"model_type": "gte", **SMALL}))


def test_the_learning_rate_is_higher_by_default(options):
    del options["learning_rate"]
    assert FinetuneConfig(**options).learning_rate == 3e-4
    assert FinetuneConfig(**options | {"lora": None}).learning_rate == 3e-5


def test_it_needs_peft(options, monkeypatch):
    real = lora.importlib.util.find_spec
    monkeypatch.setattr(
        lora.importlib.util, "find_spec", lambda name, *more: None if name == "peft" else real(name, *more)
    )
    with pytest.raises(ValueError, match="--lora needs peft and transformers: install fastbert-kernels with the extra"):
        FinetuneConfig(**options)
