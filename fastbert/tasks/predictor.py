"""Use a fine-tuned model: predictions for texts and files, and its scores."""

import dataclasses
import hashlib
import itertools
import json
import os
from collections import deque
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from .. import files, hub
from ..data.tokenizer import check_vocabulary, load_tokenizer, tokenizer_hash
from ..model import families, hf_files
from ..model.heads import Model
from . import prediction_files, results, table
from .examples import Example, Notes, Pieces, Spec, predictions, read_files

# the ending of a class of transformers -> our task; SequenceClassification has three
ARCHITECTURES = {"ForTokenClassification": "tag", "ForQuestionAnswering": "answer", "ForMultipleChoice": "choose"}
# tokens of a window, unless somebody says otherwise
MAX_LENGTH = 512


class Predictor:
    """A fine-tuned model, its tokenizer and its task.

    tokens_per_batch: how many tokens are computed at a time.
    """

    def __init__(self, model: Model, tokenizer: Tokenizer, spec: Spec, *, tokens_per_batch: int = 8192) -> None:
        self.model, self.tokenizer, self.spec = model.eval(), tokenizer, spec
        self.task, self.tokens_per_batch = table.task(spec.task), tokens_per_batch

    def predict(self, texts: Iterable[Any], *, calibrated: bool = False) -> list[dict]:
        """The prediction for each text, or pair of texts, in their order: a dict, which depends on the task.

        classify: {"label", "score", "probabilities"}. calibrated: divide the logits by the temperature that training
        found on its held-out examples. Raises ValueError for what is no text.
        """
        if isinstance(texts, str):
            raise ValueError(f"texts is the text {texts[:40]!r}: expected a list of texts")
        examples = (self._example(number, item) for number, item in enumerate(texts, 1))
        spec = _calibrated(self.spec) if calibrated else self.spec
        return [shown(prediction) for _, prediction in self._run(examples, spec)]

    def predict_file(
        self, path: str | os.PathLike, output: str | os.PathLike, *, calibrated: bool = False, say=lambda line: None
    ) -> int:
        """Write the predictions for the rows of a file to `output`, in their order. Returns the number of rows.

        output: a .jsonl file, or a directory NAME.parquet of part files with the same columns. Memory is constant. What
        was interrupted goes on from `output`.partial, if model, input and options are the same. A row with too few or
        too many columns has "error" in place of a prediction; say: is told of these rows. Raises ValueError before any
        work when another row cannot be read.
        """
        notes, ids = Notes(path), set()
        for example in self.task.read(path, self.spec, notes, wants_gold=False):
            if example.id is not None:
                ids.add(int if type(example.id) is int and abs(example.id) < 2**63 else str)
        notes.check()
        spec = _calibrated(self.spec) if calibrated else self.spec
        facts = {"input": files.sha256(path), "model": self._hash(), "calibrated": calibrated}
        facts |= {"columns": self.spec.columns, "tokens_per_batch": self.tokens_per_batch}
        facts |= {"dtype": self.model.encoder.products}
        columns = prediction_files.types(self.spec.task, ids, bool(notes.skipped))
        faulty = deque()

        def examples(rows):
            for row in rows:
                if isinstance(row, Example):
                    yield row
                else:
                    faulty.append(row)

        try:
            with prediction_files.opened(output, facts, columns) as writer:
                rows = itertools.islice(self._rows(path), writer.done, None)
                for example, prediction in self._run(examples(rows), spec):
                    while faulty and faulty[0][0] < example.number:
                        writer.write({"error": faulty.popleft()[1]})
                    identity = {} if example.id is None else {"id": example.id}
                    writer.write(identity | shown(prediction))
                for _, why in faulty:
                    writer.write({"error": why})
                writer.finish()
        except OSError as error:
            reason = (error.strerror or str(error)).rpartition(" cannot be written: ")[2]
            raise OSError(f"{output} cannot be written: {reason}") from None
        if notes.skipped:
            listed = ", ".join(f"{number} ({why})" for number, why in notes.skipped[:5])
            more = ", ..." if len(notes.skipped) > 5 else ""
            say(f'{path}: {len(notes.skipped):,} rows have "error" in place of a prediction, lines {listed}{more}')
        return writer.done

    def _rows(self, path):
        """Each row of a file to predict on, in its order: its Example, or (line, why) of one with other columns."""
        notes, told = Notes(path), 0
        for example in self.task.read(path, self.spec, notes, wants_gold=False):
            yield from notes.skipped[told:]
            told = len(notes.skipped)
            yield example
        yield from notes.skipped[told:]

    def _hash(self):
        return model_hash(self.model, dataclasses.asdict(self.spec), self.tokenizer)

    def evaluate(
        self, paths: Iterable[str | os.PathLike], *, output_dir: str | os.PathLike | None = None,
        calibrated: bool = False, say=lambda line: None,
    ) -> dict:  # fmt: skip
        """The scores on files with gold labels. output_dir: where to write metrics.json, predictions and pictures.

        A model without names of its labels, such as LABEL_0, takes the files' in sorted order. say: is told of it, and
        of rows that were left out. Raises ValueError for labels that the model does not know.
        """
        table.check_libraries()
        paths, spec = [str(path) for path in paths], self.spec
        if spec.settings.get("unnamed") and spec.labels:
            spec = dataclasses.replace(spec, labels=None)
            read_files(self.task, paths, spec)
            if len(spec.labels) != self.model.config.num_labels:
                raise ValueError(
                    f"{paths[0]} has {len(spec.labels)} labels, the model {self.model.config.num_labels} without names"
                )
            say(f"the model has no names of its labels: they are taken in the order {', '.join(spec.labels)}")
        spec = _calibrated(spec) if calibrated else spec
        examples, notes = read_files(self.task, paths, spec)
        for note in notes:
            if said := note.said():
                say(said)
        found = [prediction for _, prediction in self._run(examples, spec)]
        scores = self.task.score(examples, found, spec)
        resampled = results.resampled(self.task, spec, examples, found)
        metrics = results.summary(self.task, spec, examples, found, scores, paths, notes, resampled)
        if output_dir is not None:
            Path(output_dir).mkdir(parents=True, exist_ok=True)
            results.write_all(output_dir, spec, examples, found, metrics)
        return metrics

    def _example(self, number, item):
        if hasattr(self.task, "example"):
            return self.task.example(number, item)
        texts = tuple(item) if isinstance(item, list | tuple) else (item,)
        if not all(isinstance(text, str) for text in texts) or not 1 <= len(texts) <= 2:
            raise ValueError(f"item {number} is {str(item)[:40]!r}: expected a text, or a pair of texts")
        if len(texts) != (wanted := len(self.spec.columns.get("texts", texts))):
            raise ValueError(f"item {number} has {len(texts)} texts: the model was trained on {wanted} an example")
        return Example(number, texts)

    def _run(self, examples, spec):
        device = next(self.model.parameters()).device

        def run(batch):
            return self.model(batch if device.type == "cpu" else batch.to(device))

        pieces = Pieces(self.tokenizer, spec)
        return predictions(
            self.task, self.model, spec, pieces, examples, tokens_per_batch=self.tokens_per_batch, run=run
        )


def load(
    directory: str | os.PathLike, *, device: str | None = None, text_columns: Iterable[str] = (),
    label_column: str | None = None, revision: str | None = None, dtype: str = "fp32",
) -> Predictor:  # fmt: skip
    """The Predictor of a directory that `fastbert finetune` wrote, or that transformers saved with a task's head.

    directory: or OWNER/NAME on the HuggingFace hub, at `revision` (a branch, tag or commit). device: "cpu", "cuda"; a
    GPU by default, if there is one. text_columns, label_column: of the files to read; those of the training file by
    default, or found by name. dtype: "fp32", "auto", "bf16" or "int8", what the encoder multiplies in on a CPU: see
    `Encoder.set_dtype`. Raises ValueError when the model has no head of a task, and when it loses too much in int8.
    """
    directory = hub.local(directory, revision)
    if not (directory / "config.json").is_file():
        raise FileNotFoundError(f"no model in {directory}: expected a folder with config.json and model.safetensors")
    config, spec = hf_files.read_config(directory / "config.json"), Spec.load(directory)
    spec = _spec_of(directory, config) if spec is None else spec
    if spec.labels and len(spec.labels) != config.num_labels:
        raise ValueError(f"{directory}: task.json has {len(spec.labels)} labels, config.json {config.num_labels}")
    if text_columns:
        spec.columns = spec.columns | {"texts": list(text_columns)}
    if label_column:
        spec.columns = spec.columns | {"label": label_column}
    kind, fields = table.task(spec.task).head(spec)
    if not hasattr(kind, "start"):
        _check_head(directory, config, kind, spec.task)
    tokenizer = load_tokenizer(directory)
    check_vocabulary(tokenizer, config)
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if torch.device(device).type != "cpu":
        if dtype not in ("fp32", "auto"):
            raise ValueError(f"dtype is {dtype!r} on the device {device}: bf16 and int8 are for a CPU")
        dtype = "fp32"
    if hasattr(kind, "start"):
        model = kind.start(directory, config, dtype=dtype, **fields)
    else:
        model = kind.from_pretrained(directory, dtype=dtype)
    return Predictor(model.to(device), tokenizer, spec)


def _check_head(directory, config, kind, task):
    """Raises ValueError when the head of a task is not stored."""
    with torch.device("meta"):
        head = [name for name in kind(config).state_dict() if name.startswith("classifier.")]
    names = hf_files.hf_names(head, config, kind.__name__)
    stored = hf_files.from_hf_names(hf_files.stored_tensors(directory, False), config)
    if lacking := [name for name in names.values() if name not in stored]:
        raise ValueError(f"{directory} has no {lacking[0]}: its head for {task} is not trained, use fastbert finetune")


def _spec_of(directory, config):
    """The Spec of a directory without task.json, from its config.json."""
    architecture = (files.read_json(directory / "config.json").get("architectures") or ["none"])[0]
    known = set(families.family(config.model_type).architectures.values())
    name = next((task for ending, task in ARCHITECTURES.items() if architecture.endswith(ending)), None)
    if architecture.endswith("ForSequenceClassification"):
        multilabel = config.problem_type == "multi_label_classification"
        single = config.num_labels == 1 or config.problem_type == "regression"
        name = "multilabel" if multilabel else "regress" if single else "classify"
    if name is None or architecture not in known:
        raise ValueError(f"{directory} is a {architecture}, without the head of a task: use fastbert finetune")
    labels = config.labels or tuple(f"LABEL_{i}" for i in range(config.num_labels))
    length = usual_length(directory, config)
    return Spec(
        name, labels if name in ("classify", "multilabel", "tag") else (), {}, length, length // 4,
        settings={} if config.labels else {"unnamed": True},
    )  # fmt: skip


def usual_length(directory, config):
    """Tokens of a window: as many as the model, its tokenizer and MAX_LENGTH allow."""
    path = Path(directory) / "tokenizer_config.json"
    limit = files.read_json(path).get("model_max_length") if path.is_file() else None
    # transformers writes 1e30 for no limit
    return int(
        min(config.max_length, MAX_LENGTH, limit if isinstance(limit, int | float) and limit >= 8 else MAX_LENGTH)
    )


def _calibrated(spec):
    """`spec` with the temperature of the held-out examples applied, in predictions and in scores."""
    if "temperature" not in spec.settings:
        raise ValueError("the model has no temperature: it was not evaluated in training, or needs none")
    return dataclasses.replace(spec, settings=spec.settings | {"applied_temperature": spec.settings["temperature"]})


def shown(prediction):
    """A prediction without what is for `score` alone."""
    return {name: value for name, value in prediction.items() if not name.startswith("_")}


def flat_figures(scores):
    """The figures of `score` that are numbers, or None where undefined."""
    return {name: value for name, value in scores.items() if value is None or isinstance(value, int | float)}


def model_hash(model, settings, tokenizer):
    """sha256 (hex) of a model's weights and of what decides on its results beside them. settings: for JSON."""
    digest = hashlib.sha256(json.dumps([settings, tokenizer_hash(tokenizer)]).encode())
    for name, tensor in model.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()
