"""Predictions come in the order of the file, whatever the batches; other authors' directories; the command line."""

import contextlib
import importlib.util
import json

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from labelled import sentences, write_csv, write_jsonl

from fastbert import files, load
from fastbert.cli import main
from fastbert.cpu import low_precision
from fastbert.data.tokenizer import load_tokenizer, save_tokenizer
from fastbert.model.heads import SequenceClassifier, TokenClassifier
from fastbert.tasks import examples as shared
from fastbert.tasks import prediction_files
from fastbert.tasks.examples import Spec


def call(*arguments):
    return CliRunner().invoke(main, [str(argument) for argument in arguments], prog_name="fastbert")


def directory_with_a_head(encoder, place, spec, **changes):
    """A model of random, lively weights in a directory of its own."""
    torch.manual_seed(5)
    with pytest.warns(UserWarning, match="start fresh"):
        model = SequenceClassifier.from_pretrained(encoder, **changes)
    with torch.no_grad():
        for parameter in (model.classifier.weight, model.pooler.weight, model.encoder.embeddings.word.weight):
            parameter.normal_(std=0.7)
        for name, parameter in model.encoder.blocks.named_parameters():
            if name.endswith("weight") and parameter.dim() == 2:
                parameter.normal_(std=0.3)
    model.save_pretrained(place)
    for path in encoder.iterdir():
        if not (place / path.name).exists():
            (place / path.name).write_bytes(path.read_bytes())
    if spec is not None:
        spec.save(place)
    return place


@pytest.fixture
def tuned(encoder, tmp_path):
    spec = Spec("classify", ("bird", "cat", "dog"), {"texts": ["text"], "label": "label"}, max_length=24, stride=4)
    return directory_with_a_head(encoder, tmp_path / "tuned", spec, num_labels=3, labels=spec.labels)


TEXTS = [text * (number % 4 + 1) for number, (text, _) in enumerate(sentences(30))] + ["", "a"]


def test_predictions_do_not_depend_on_the_batch(tuned, monkeypatch):
    alone = [load(tuned).predict([text])[0] for text in TEXTS]
    predictor = load(tuned)
    monkeypatch.setattr(shared, "CHUNK", 7)
    for tokens in (30, 8192):
        predictor.tokens_per_batch = tokens
        found = predictor.predict(TEXTS)
        assert [one["label"] for one in found] == [one["label"] for one in alone]
        for one, other in zip(found, alone):
            assert one["probabilities"] == pytest.approx(other["probabilities"], abs=1e-5)
    cat = [one["probabilities"]["cat"] for one in alone]
    assert max(cat) - min(cat) > 0.1, "the predictions were meant to differ"


def test_a_long_text_is_the_mean_of_its_windows(tuned):
    """Each window as transformers would cut it: stride tokens are shared."""
    transformers = pytest.importorskip("transformers")
    text = sentences(1)[0][0] * 4
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(tuned).eval()
    tokens = transformers.AutoTokenizer.from_pretrained(tuned)(
        text,
        max_length=24,
        stride=4,
        truncation=True,
        return_overflowing_tokens=True,
        padding=True,
        return_tensors="pt",
    )
    tokens.pop("overflow_to_sample_mapping")
    assert len(tokens["input_ids"]) > 2
    with torch.no_grad():
        logits = theirs(**tokens).logits.mean(0).softmax(-1)
    (found,) = load(tuned).predict([text])
    np.testing.assert_allclose([*found["probabilities"].values()], logits.numpy(), atol=1e-5)
    first = load(tuned)
    first.spec.truncate = True
    with torch.no_grad():
        whole = theirs(**{name: value[:1] for name, value in tokens.items()}).logits[0].softmax(-1)
    np.testing.assert_allclose([*first.predict([text])[0]["probabilities"].values()], whole.numpy(), atol=1e-5)


@pytest.mark.parametrize("max_length", [9, 10, 13])
def test_pairs_are_cut_as_transformers_cuts_them(encoder, max_length):
    transformers = pytest.importorskip("transformers")
    from fastbert.data.tokenizer import load_tokenizer
    from fastbert.tasks.examples import Pieces

    pieces = Pieces(load_tokenizer(encoder), Spec("classify", ("a", "b"), max_length=max_length, stride=0))
    theirs = transformers.AutoTokenizer.from_pretrained(encoder)
    long, short = sentences(1)[0][0], "the dog"
    for pair in ((long, short), (short, long), (long, long[7:]), (short, short)):
        (found,) = pieces.windows(*(pieces.encodings([text])[0] for text in pair))
        wanted = theirs(*pair, truncation="longest_first", max_length=max_length)
        assert (found.ids, found.type_ids) == (wanted["input_ids"], wanted["token_type_ids"])
    assert pieces.truncated == 3


def test_the_command_line(tuned, tmp_path):
    rows = [{"id": f"r{i}", "text": text, "label": label} for i, (text, label) in enumerate(sentences(20))]
    path, output = write_jsonl(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl"
    result = call("predict", "--model", tuned, "--input", path, "--output", output)
    assert result.exit_code == 0 and "20 predictions" in result.stdout, result.output
    found = [json.loads(line) for line in output.read_text().splitlines()]
    assert [row["id"] for row in found] == [row["id"] for row in rows]
    wanted = load(tuned).predict([row["text"] for row in rows])
    assert [{"id": row["id"], **one} for row, one in zip(rows, wanted)] == found

    result = call("predict", "--model", tuned, "--text", rows[0]["text"])
    assert json.loads(result.stdout)["label"] == wanted[0]["label"]
    result = call("predict", "--model", tuned, "--text", "a", "--device", "gpu")
    assert result.exit_code == 2 and "--device is 'gpu': expected auto, cpu, cuda or cuda:1" in result.output
    result = call("evaluate", "--model", tuned, "--input", path, "--output-dir", tmp_path / "scores")
    assert result.exit_code == 0, result.output
    right = np.mean([row["label"] == one["label"] for row, one in zip(rows, wanted)])
    assert json.loads(result.stdout)["scores"]["accuracy"] == pytest.approx(right)
    assert json.loads((tmp_path / "scores" / "metrics.json").read_text()) == json.loads(result.stdout)


def test_a_directory_of_transformers(encoder, tmp_path):
    """Without task.json and without names of labels: those of the file, in sorted order, and it is said."""
    place = directory_with_a_head(encoder, tmp_path / "theirs", None, num_labels=3)
    predictor = load(place)
    assert predictor.predict(["the dog"])[0]["label"] in {"LABEL_0", "LABEL_1", "LABEL_2"}
    said = []
    metrics = predictor.evaluate([write_csv(tmp_path / "a.csv", sentences(20))], say=said.append)
    assert said == ["the model has no names of its labels: they are taken in the order bird, cat, dog"]
    assert set(metrics["scores"]["per_class"]) == {"bird", "cat", "dog"}
    with pytest.raises(ValueError, match="a.csv has 4 labels, the model 3 without names"):
        predictor.evaluate([write_csv(tmp_path / "a.csv", [*sentences(20), ("x", "cow")])])


@pytest.mark.parametrize(
    ("texts", "error"),
    [
        ([7], "item 1 is '7': expected a text"),
        (["a", ("b", "c", "d")], "item 2 is"),
        ([[]], "item 1 is"),
        (["a", ("b", "c")], "item 2 has 2 texts: the model was trained on 1 an example"),
    ],
)
def test_what_is_no_text(texts, error, tuned):
    with pytest.raises(ValueError, match=error):
        load(tuned).predict(texts)


def test_directories_without_a_trained_head(encoder, tmp_path):
    with pytest.raises(ValueError, match="is a BertForMaskedLM, without the head of a task: use fastbert finetune"):
        load(encoder)
    with pytest.raises(FileNotFoundError, match="no model in"):
        load(tmp_path)
    place = directory_with_a_head(encoder, tmp_path / "a", None, num_labels=3)
    tensors = {"bert.x": torch.zeros(1)}
    from safetensors.torch import load_file, save_file

    tensors = {k: v for k, v in load_file(place / "model.safetensors").items() if not k.startswith("classifier")}
    save_file(tensors, place / "model.safetensors")
    with pytest.raises(ValueError, match="has no classifier.weight: its head for classify is not trained"):
        load(place)


def test_a_faulty_row_ends_a_prediction_before_any_work(tuned, tmp_path):
    path = write_jsonl(tmp_path / "in.jsonl", [{"text": "a"}, {"text": None}])
    result = call("predict", "--model", tuned, "--input", path, "--output", tmp_path / "out.jsonl")
    assert result.exit_code == 2 and "in.jsonl line 2: 'text' is 'None'" in result.stderr, result.output
    assert not [*tmp_path.glob("out.jsonl*")]


def test_an_interrupted_prediction_goes_on(tuned, tmp_path, monkeypatch):
    rows = [{"text": text} for text in TEXTS]
    path, output = write_jsonl(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl"
    monkeypatch.setattr(shared, "CHUNK", 8)
    load(tuned).predict_file(path, tmp_path / "whole.jsonl")
    real, calls = shared.batch_of, []

    def interrupted(windows, **more):
        calls.append(len(windows))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(windows, **more)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(shared, "batch_of", interrupted)
        load(tuned).predict_file(path, output)
    partial = tmp_path / "out.jsonl.partial"
    done = partial.read_bytes()
    assert done.count(b"\n") == 16 and not output.exists()
    # as if it had been killed in the middle of a line
    partial.write_bytes(done + b'{"label": "c')
    assert load(tuned).predict_file(path, output) == len(TEXTS)
    assert output.read_bytes() == (tmp_path / "whole.jsonl").read_bytes() and not [*tmp_path.glob("*.partial*")]


def read_jsonl(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def read_parquet(directory):
    dataset = pytest.importorskip("pyarrow.dataset")
    return dataset.dataset(directory, format="parquet").to_table().to_pylist(maps_as_pydicts="strict")


def test_parts_of_a_parquet_go_on(tuned, tmp_path, monkeypatch):
    """The rows are those of the .jsonl; whole parts are kept, broken ones are made again."""
    rows = [{"id": i, "text": text} for i, text in enumerate(TEXTS)]
    path, output = write_jsonl(tmp_path / "in.jsonl", rows), tmp_path / "out.parquet"
    monkeypatch.setattr(prediction_files, "PART", 8)
    monkeypatch.setattr(shared, "CHUNK", 8)
    load(tuned).predict_file(path, tmp_path / "whole.jsonl")
    wanted = read_jsonl(tmp_path / "whole.jsonl")
    real, calls = shared.batch_of, []

    def interrupted(windows, **more):
        calls.append(len(windows))
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(windows, **more)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(shared, "batch_of", interrupted)
        load(tuned).predict_file(path, output)
    parts = sorted((tmp_path / "out.parquet.partial").iterdir())
    assert [part.name for part in parts] == [f"part-0000{i}.parquet" for i in range(3)] and not output.exists()
    # as if the disk had lost the end of one
    parts[1].write_bytes(parts[1].read_bytes()[:50])
    first = parts[0].stat().st_mtime_ns
    assert load(tuned).predict_file(path, output) == len(TEXTS)
    assert sorted(part.name for part in output.iterdir()) == [f"part-0000{i}.parquet" for i in range(4)]
    assert (output / "part-00000.parquet").stat().st_mtime_ns == first
    assert read_parquet(output) == wanted and not [*tmp_path.glob("*.partial*")]
    # again, in the place of the old one
    assert load(tuned).predict_file(path, output) == len(TEXTS) and read_parquet(output) == wanted


def test_a_parquet_replaces_nothing_else(tuned, tmp_path):
    pytest.importorskip("pyarrow")
    path = write_jsonl(tmp_path / "in.jsonl", [{"text": "the cat"}])
    (tmp_path / "file.parquet").write_text("mine")
    (tmp_path / "folder.parquet").mkdir()
    (tmp_path / "folder.parquet" / "notes.txt").write_text("mine")
    (tmp_path / "folder.jsonl").mkdir()
    for name, said in (("file.parquet", "is a file"), ("folder.parquet", "holds notes.txt"),
                       ("folder.jsonl", "is a dir"), ("out.csv", "expected a .jsonl file, or .parquet")):  # fmt: skip
        with pytest.raises(ValueError, match=f"--output .*{name}.*{said}"):
            load(tuned).predict_file(path, tmp_path / name)
    assert (tmp_path / "file.parquet").read_text() == (tmp_path / "folder.parquet" / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_rows_with_other_columns_keep_their_place(ending, tuned, tmp_path):
    """In training they are left out and counted; here the rows below them must not move up."""
    lines = ["id,text", "x", "a,the cat", "y", "b,the dog", "c,the bird", "z"]
    path = tmp_path / "in.csv"
    path.write_text("\n".join(lines))
    output = tmp_path / f"out.{ending}"
    result = call("predict", "--model", tuned, "--input", path, "--output", output)
    assert result.exit_code == 0 and f"{output}: 6 predictions" in result.stdout, result.output
    assert (
        'in.csv: 3 rows have "error" in place of a prediction, lines 2 (1 columns, the header has 2), 4 ('
        in result.stderr
    )
    found = (
        read_parquet(output) if ending == "parquet" else [json.loads(line) for line in output.read_text().splitlines()]
    )
    assert ["error" in row and row["error"] is not None for row in found] == [True, False, True, False, False, True]
    assert [row.get("id") for row in found] == [None, "a", None, "b", "c", None]
    assert [row["label"] for row in found if row.get("label")] == [
        one["label"] for one in load(tuned).predict(["the cat", "the dog", "the bird"])
    ]


@pytest.mark.parametrize("done", range(7))
def test_rows_with_other_columns_keep_their_place_when_it_goes_on(done, tuned, tmp_path, monkeypatch):
    path = tmp_path / "in.csv"
    path.write_text("\n".join(["id,text", "x", "a,the cat", "y", "b,the dog", "c,the bird", "z"]))
    load(tuned).predict_file(path, tmp_path / "whole.jsonl")
    whole, facts = (tmp_path / "whole.jsonl").read_text(), []
    real = prediction_files.opened
    monkeypatch.setattr(prediction_files, "opened", lambda *more: facts.append(more[1]) or real(*more))
    (tmp_path / "out.jsonl.partial").write_text("".join(whole.splitlines(keepends=True)[:done]))
    load(tuned).predict_file(path, tmp_path / "other.jsonl")
    (tmp_path / "out.jsonl.partial.json").write_text(json.dumps(facts[0]))
    load(tuned).predict_file(path, tmp_path / "out.jsonl")
    for one, other in zip(read_jsonl(tmp_path / "out.jsonl"), read_jsonl(tmp_path / "whole.jsonl"), strict=True):
        # another batch: other rounding
        assert one.pop("score", None) == pytest.approx(other.pop("score", None), abs=1e-6)
        assert one.pop("probabilities", None) == pytest.approx(other.pop("probabilities", None), abs=1e-6)
        assert one == other


def test_another_input_does_not_go_on(tuned, tmp_path):
    path, output = write_jsonl(tmp_path / "in.jsonl", [{"text": "the cat"}]), tmp_path / "out.jsonl"
    (tmp_path / "out.jsonl.partial").write_text('{"label": "old"}\n')
    (tmp_path / "out.jsonl.partial.json").write_text("{}")
    assert load(tuned).predict_file(path, output) == 1
    assert "old" not in output.read_text()


def test_the_length_is_the_least_of_three(tuned, encoder, tmp_path):
    from fastbert.tasks.predictor import usual_length

    config = load(tuned).model.config
    assert (
        usual_length(encoder, config) == 64
        and usual_length(encoder, config.replace(max_position_embeddings=4096)) == 512
    )
    for limit, expected in ((32, 32), (10**30, 64), (1e30, 64), (None, 64)):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"model_max_length": limit}))
        assert usual_length(tmp_path, config) == expected


def test_a_temperature_changes_predictions_and_scores(tuned, tmp_path):
    spec = Spec.load(tuned)
    spec.settings["temperature"] = 0.25
    spec.save(tuned)
    path, texts = write_csv(tmp_path / "a.csv", sentences(30)), [text for text, _ in sentences(30)]
    plain, sharp = (load(tuned).predict(texts, calibrated=calibrated) for calibrated in (False, True))
    for one, other in zip(plain, sharp):
        powers = np.array([*one["probabilities"].values()]) ** 4
        assert [*other["probabilities"].values()] == pytest.approx(powers / powers.sum(), abs=1e-5)
    index, golds = spec.index, [label for _, label in sentences(30)]
    for calibrated, found in ((False, plain), (True, sharp)):
        scores = load(tuned).evaluate([path], calibrated=calibrated)["scores"]
        loss = np.mean([-np.log([*one["probabilities"].values()][index[gold]]) for one, gold in zip(found, golds)])
        assert scores["log_loss"] == pytest.approx(loss, abs=1e-5)


def test_no_texts_at_all(tuned):
    assert load(tuned).predict([]) == []
    with pytest.raises(ValueError, match="texts is the text 'one': expected a list"):
        load(tuned).predict("one")


def test_an_untuned_temperature(tuned):
    with pytest.raises(ValueError, match="the model has no temperature"):
        load(tuned).predict(["a"], calibrated=True)


def test_a_token_classifier_is_not_taken_for_a_classifier(encoder, tmp_path):
    with pytest.warns(UserWarning):
        TokenClassifier.from_pretrained(encoder, num_labels=3).save_pretrained(tmp_path)
    save_tokenizer(load_tokenizer(encoder), tmp_path)
    assert load(tmp_path).spec.task == "tag"


def test_several_files_have_scores_of_their_own(tuned, tmp_path):
    files = [write_csv(tmp_path / f"{seed}.csv", sentences(12 + seed, seed)) for seed in (1, 2)]
    both = load(tuned).evaluate(files)
    alone = [load(tuned).evaluate([path])["scores"]["accuracy"] for path in files]
    assert [one["accuracy"] for one in both["by_file"].values()] == alone
    assert both["scores"]["accuracy"] == pytest.approx((13 * alone[0] + 14 * alone[1]) / 27)


def test_scores_need_their_libraries(tuned, tmp_path, monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *more: None if name == "sklearn" else real(name, *more)
    )
    path = write_csv(tmp_path / "a.csv", sentences(12))
    with pytest.raises(ValueError, match="scores need scikit-learn and scipy"):
        load(tuned).evaluate([path])
    assert len(load(tuned).predict(["a"])) == 1


@pytest.mark.parametrize("family", ["roberta", "modernbert"])
def test_pairs_of_a_model_without_token_types(family, tmp_path, encoder):
    """BERT's tokenizer gives a pair two token types; a model with none, or one, does not look at them."""
    from fastbert import FinetuneConfig, finetune
    from fastbert.model.heads import MaskedLM
    from fastbert.model.presets import preset

    small = {"vocab_size": 140, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
             "intermediate_size": 64, "max_position_embeddings": 64, "pad_token_id": 0}  # fmt: skip
    config = preset("roberta-base") if family == "roberta" else preset("modernbert-base")
    per_layer = {name: value[:2] for name in ("windows", "rope_thetas") if (value := getattr(config, name)) is not None}
    MaskedLM(config.replace(**small, **per_layer)).save_pretrained(tmp_path / "model")
    rows = [(text, "in the year", label) for text, label in sentences(30)]
    path = write_csv(tmp_path / "train.csv", rows, ("sentence1", "sentence2", "label"))
    finetune(FinetuneConfig(train_file=path, model=tmp_path / "model", tokenizer=encoder, max_steps=2, eval_share=0,
                            output_dir=tmp_path / "run"))  # fmt: skip
    first, other = load(tmp_path / "run"), load(tmp_path / "run")
    wanted = first.predict([row[:2] for row in rows])
    other.tokens_per_batch = 16
    for one, two in zip(wanted, other.predict([row[:2] for row in rows])):
        assert one["probabilities"] == pytest.approx(two["probabilities"], abs=1e-5)


def test_half_a_surrogate_is_written_as_a_question_mark(tuned, tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", [{"id": "\ud83d", "text": "a \ud83d b", "label": "cat"}] * 2)
    call("predict", "--model", tuned, "--input", path, "--output", tmp_path / "out.jsonl")
    assert json.loads((tmp_path / "out.jsonl").read_text().splitlines()[0])["id"] == "?"
    load(tuned).evaluate([path], output_dir=tmp_path / "scores")
    assert '"a ? b"' in (tmp_path / "scores" / "predictions.jsonl").read_text()


def test_int8_on_the_command_line(tuned, tmp_path, monkeypatch):
    """Close to fp32; what was interrupted in one dtype does not go on in another; not for a GPU."""
    monkeypatch.setattr(low_precision, "gain", lambda dtype: 2.0)
    monkeypatch.setattr(low_precision, "LEAST_COSINE", 0.9)
    write_jsonl(tmp_path / "in.jsonl", [{"text": text} for text in TEXTS])
    for dtype in ("fp32", "int8"):
        output = tmp_path / f"{dtype}.jsonl"
        done = call("predict", "--model", tuned, "--input", tmp_path / "in.jsonl", "--output", output, "--dtype", dtype)
        assert done.exit_code == 0, done.output
    lines = [(tmp_path / f"{name}.jsonl").read_text().splitlines() for name in ("fp32", "int8")]
    scores = np.array([[json.loads(line)["score"] for line in found] for found in lines])
    assert 1e-5 < abs(scores[0] - scores[1]).max() < 0.2
    about = []
    for dtype in ("fp32", "int8"):
        monkeypatch.setattr(files, "write", lambda path, text: about.append(json.loads(text)))
        with contextlib.suppress(OSError):
            load(tuned, dtype=dtype).predict_file(tmp_path / "in.jsonl", tmp_path / "out.jsonl")
    assert [one.pop("dtype") for one in about] == ["fp32", "int8"] and about[0] == about[1]
    with pytest.raises(ValueError, match="dtype is 'int8' on the device cuda: bf16 and int8 are for a CPU"):
        load(tuned, device="cuda", dtype="int8")
    assert call("evaluate", "--model", tuned, "--input", tmp_path / "in.jsonl", "--dtype", "fp8").exit_code == 2
