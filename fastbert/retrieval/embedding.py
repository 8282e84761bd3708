"""A vector for each row of a file: in parts on the disk, in the order of the rows, chunk by chunk.

Letters: N rows, E embedding size.
"""

import contextlib
import io
import json
import os
import random
import time
import warnings
from collections.abc import Callable, Iterable
from itertools import islice
from pathlib import Path

import numpy as np
import torch

from .. import __version__, files, hub
from ..data import tables
from ..model.sentences import Dense, SentenceEmbedder
from ..tasks import prediction_files, texts
from ..tasks.examples import clean
from ..tasks.predictor import model_hash

# rows, and letters, that are read, sorted by length and embedded at a time
CHUNK, LETTERS = 4096, 1 << 22
TOKENS_PER_BATCH = 8192
PRECISIONS = ("float32", "float16", "int8", "ubinary")
# rows that int8's ranges are measured on
CALIBRATION = 8192
IDS = ("_id", *texts.IDS)


def load_embedder(
    directory: str | os.PathLike, *, device: str | None = None, revision: str | None = None, dtype: str = "fp32",
    truncate_dim: int | None = None,
) -> SentenceEmbedder:  # fmt: skip
    """The SentenceEmbedder of a directory, or of a name on the HuggingFace hub, on `device`: a GPU by default, if any.

    Warns where the directory has an encoder alone. Raises ValueError or FileNotFoundError for what is no model.
    """
    directory = hub.local(directory, revision)
    if not (directory / "modules.json").is_file():
        if not (directory / "config.json").is_file():
            raise FileNotFoundError(f"no model in {directory}: expected a folder with config.json, or modules.json")
        warnings.warn(
            f"{directory} has no modules.json: it was not trained to embed texts, and the mean of its hidden states "
            "says little about how similar they are",
            stacklevel=2,
        )
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if torch.device(device).type != "cpu":
        if dtype not in ("fp32", "auto"):
            raise ValueError(f"dtype is {dtype!r} on the device {device}: bf16 and int8 are for a CPU")
        dtype = "fp32"
    # else what the directory says
    options = {} if truncate_dim is None else {"truncate_dim": truncate_dim}
    return SentenceEmbedder.from_pretrained(directory, dtype=dtype, **options).eval().to(device)


def embed_file(
    model: SentenceEmbedder, path: str | os.PathLike, output: str | os.PathLike, *, text_columns: Iterable[str] = (),
    prompt_name: str | None = None, precision: str = "float32", ranges: str | os.PathLike | None = None,
    normalize: bool = False, tokens_per_batch: int = TOKENS_PER_BATCH, say: Callable[[str], None] = lambda line: None,
) -> dict:  # fmt: skip
    """Write a vector for each row of a file to the directory `output`, in their order. Returns what manifest.json has.

    path: a .txt, a text a line, empty ones too; or a .jsonl, .csv, .tsv or .parquet; or .gz of all but the last. Rows
    of a table have their text in text_columns: several are joined by a blank. output: a directory of part-00000.npy,
    ... [8192, E] each, or NAME.parquet of part files with the columns id and vector; the id is that of the row, or its
    line. One chunk of the file is in memory. What was interrupted goes on, if model, input and options are the same.

    prompt_name: one of model.prompts. normalize: divide by the L2 norm, after the cut of model.truncate_dim. precision:
    float32; float16; "int8" and "ubinary" are quantize_embeddings' of sentence-transformers: 8 bits between the least
    and the greatest value of each column, which ranges.npy [2, E] keeps; or a bit for each number above 0. ranges: the
    ranges.npy of other vectors, to compare int8 vectors with them. say: is told of the columns read.

    Raises ValueError, before any work, for a row that cannot be read, an unknown prompt or precision, or a place that
    cannot be the output; and for a vector that is not finite.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision is {precision!r}: expected one of {', '.join(PRECISIONS)}")
    if ranges is not None and precision != "int8":
        raise ValueError(f"ranges go with the precision int8, not {precision}")
    path, output = os.fspath(path), Path(output)
    columns = columns_of(path, text_columns)
    if len(columns) > 1:
        say(f"{path}: a text is {' + '.join(map(repr, columns))}")
    encode = _encoder(model, prompt_name, normalize, tokens_per_batch)
    # of no text: the prompt is known, and there is a tokenizer
    width = encode([""]).shape[1]
    count, kinds, sample = 0, set(), []
    draw = random.Random(0)
    for count, (_, identity, _) in enumerate(rows_of(path, columns), 1):
        kinds.add(int if type(identity) is int and abs(identity) < 2**63 else str)
        # a row in each set of rows is as likely to be drawn as another (Vitter 1985, algorithm R)
        place = count - 1 if count <= CALIBRATION else draw.randrange(count)
        if place < CALIBRATION:
            sample[place : place + 1] = [count]
    if not count:
        raise ValueError(f"{path} has no rows")
    limits = None if ranges is None else _read_ranges(ranges, width)
    facts = {
        "model": model_hash(model, settings_of(model), model.tokenizer), "input": files.sha256(path),
        "columns": columns, "count": count, "width": width, "precision": precision,
        "prompt": _prompt(model, prompt_name), "normalize": normalize, "truncate_dim": model.truncate_dim,
        "computed_in": model.encoder.products,
        "similarity": model.similarity_fn_name, "fastbert": __version__,
    }  # fmt: skip
    known = facts | {"tokens_per_batch": tokens_per_batch, "ranges": None if limits is None else limits.tolist()}
    is_parquet = output.suffix.lower() == ".parquet"
    bits = precision == "ubinary"
    vector = prediction_files.Vector("uint8" if bits else precision, -(-width // 8) if bits else width)
    types = {"id": "whole" if kinds == {int} else "text", "vector": vector}
    kind = prediction_files.Parquet if is_parquet else prediction_files.Vectors
    manifest, ranges_name = kind.BESIDE
    with _told(output), kind(output, json.dumps(known), types) as writer:
        if precision == "int8":
            place = writer.partial / ranges_name
            if place.is_file():
                limits = _read_ranges(place, width)
            else:
                if limits is None:
                    chosen = set(sample)
                    limits = _measured(encode, (row for i, row in enumerate(rows_of(path, columns), 1) if i in chosen))
                content = io.BytesIO()
                np.save(content, limits)
                files.write(place, content.getvalue())
        with progress(count, writer.done) as show:
            for rows in chunks_of(islice(rows_of(path, columns), writer.done, None)):
                found = encode([text for _, _, text in rows])
                stored = quantized(found, precision, limits)
                for vectors in (found, stored):
                    check_finite(vectors, lambda i: f"{path} line {rows[i][0]}")  # noqa: B023
                for (_, identity, _), vector in zip(rows, stored, strict=True):
                    writer.write({"id": identity, "vector": vector})
                show(writer.done)
        files.write(writer.partial / manifest, json.dumps(facts, indent=2, ensure_ascii=False) + "\n")
        writer.finish()
    return facts


def settings_of(model):
    """What decides on a model's vectors beside its weights and its tokenizer, for JSON."""
    layers = [
        [layer.settings() if isinstance(layer, Dense) else layer.KIND for layer in part]
        for part in (model.token_dense, model.dense)
    ]
    names = ("pooling", "normalize", "include_prompt", "max_length", "truncation_side")
    return [layers, {name: getattr(model, name) for name in names}]


def columns_of(path, named=()):
    """The columns that hold a row's text; [] of a .txt. Raises ValueError with the columns there are."""
    if tables.kind(path) == ".txt":
        if named:
            raise ValueError(f"{path} has no columns: --text-column is for {', '.join(tables.KINDS)}")
        return []
    if tables.kind(path) not in tables.KINDS:
        raise ValueError(f"{path} has an unknown type: expected .txt, {', '.join(tables.KINDS)} (or .gz)")
    found = tables.columns(path)
    named = list(named)
    if not named:
        # a document of BEIR
        whole = ["title", "text"]
        single = (names for names in texts.TEXTS if len(names) == 1)
        named = whole if {"_id", *whole} <= {*found} else next(([*one] for one in single if one[0] in found), ["text"])
    if lacking := [name for name in named if name not in found]:
        raise texts.missing(path, lacking[0], found, "--text-column")
    return named


def rows_of(path, columns):
    """(line, id, text) of each row of a file. The id is the line where the row has none. Raises ValueError."""
    if not columns:
        last, text = 0, None
        for number, line in tables.lines(path):
            if number == last:
                raise ValueError(f"{path} line {number} has more than {tables.MAX_SIZE:,} letters")
            if last:
                yield last, last, text
            last, text = number, line
        # what follows the last end of a line is a line only if it is not empty
        if text:
            yield last, last, text
        return
    for number, row in tables.rows(path):
        parts = [row.get(name) for name in columns]
        for name, part in zip(columns, parts, strict=True):
            # a title may be missing
            if not isinstance(part, str) and (part is not None or len(parts) == 1):
                raise ValueError(f"{path} line {number}: {name!r} is {str(part)[:40]!r}: expected text")
        text = parts[0] if len(parts) == 1 else joined(parts)
        yield number, identity_of(path, number, row, number), clean(text)


def joined(parts):
    """Title and text as BEIR joins them."""
    return " ".join(part for part in parts if part).strip()


def identity_of(path, number, row, default=None):
    """A row's id: a text or an int. Raises ValueError for another, or where there is none and no default."""
    name = next((name for name in IDS if row.get(name) is not None), None)
    value = default if name is None else row[name]
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise ValueError(f"{path} line {number}: {name or '_id'!r} is {str(value)[:40]!r}: expected an id")
    return clean(value) if isinstance(value, str) else value


def check_finite(vectors, name):
    """Raises ValueError with name(i) for a vector i with NaN or infinity."""
    if not np.isfinite(vectors).all():
        i = int((~np.isfinite(vectors)).any(1).argmax())
        raise ValueError(f"the vector of {name(i)} is not finite: the model is broken, or its dtype too small")


def quantized(vectors: np.ndarray, precision: str, ranges: np.ndarray | None = None) -> np.ndarray:
    """float32 [N, E] as `embed_file` stores it. ranges: float32 [2, E], of int8."""
    if precision == "float16":
        return vectors.astype(np.float16)
    if precision == "ubinary":
        return np.packbits(vectors > 0, axis=-1)
    if precision == "int8":
        starts, steps = _steps(ranges)
        return (np.clip(np.floor((vectors - starts) / steps), 0, 255) - 128).astype(np.int8)
    return vectors


def restored(vectors: np.ndarray, ranges: np.ndarray | None = None, width: int | None = None) -> np.ndarray:
    """float32 [N, E] of stored vectors: the middle of an int8's step, and 1 or -1 for a bit. width: E of bits."""
    if vectors.dtype == np.uint8:
        return np.unpackbits(vectors, axis=-1, count=width).astype(np.float32) * 2 - 1
    if vectors.dtype == np.int8:
        starts, steps = _steps(ranges)
        return starts + (vectors.astype(np.float32) + 128.5) * steps
    return vectors.astype(np.float32)


def _steps(ranges):
    steps = (ranges[1] - ranges[0]) / 255
    # a column of one value
    return ranges[0], np.where(steps == 0, 1, steps).astype(np.float32)


def _measured(encode, rows):
    low, high = np.inf, -np.inf
    for chunk in chunks_of(rows):
        vectors = encode([text for _, _, text in chunk])
        check_finite(vectors, lambda i: f"line {chunk[i][0]}")  # noqa: B023
        low, high = np.minimum(low, vectors.min(0)), np.maximum(high, vectors.max(0))
    return np.stack((low, high)).astype(np.float32)


def _read_ranges(path, width):
    try:
        found = np.load(path)
    except (ValueError, OSError, EOFError):
        raise ValueError(f"{path} is no array of ranges: expected the ranges.npy of fastbert embed") from None
    if found.shape != (2, width) or found.dtype != np.float32 or not np.isfinite(found).all():
        raise ValueError(f"{path} has shape {found.shape}: expected float32 (2, {width}), as the model's vectors")
    return found


def _prompt(model, name):
    name = model.default_prompt_name if name is None else name
    return "" if name is None else model.prompts[name]


def _encoder(model, prompt_name, normalize, tokens_per_batch):
    if prompt_name is not None and prompt_name not in model.prompts:
        those = f"one of {', '.join(map(repr, model.prompts))}" if model.prompts else "none, the model has no prompts"
        raise ValueError(f"--prompt is {prompt_name!r}: expected {those}")
    options = dict(prompt_name=prompt_name, normalize_embeddings=normalize, tokens_per_batch=tokens_per_batch)
    return lambda found: model.encode(found, **options)


def chunks_of(rows):
    """Lists of at most CHUNK of the rows, and about LETTERS letters."""
    chunk, size = [], 0
    for row in rows:
        chunk.append(row)
        size += len(row[2])
        if len(chunk) == CHUNK or size >= LETTERS:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


@contextlib.contextmanager
def _told(output):
    """A disk's errors name the output."""
    try:
        yield
    except OSError as error:
        reason = (error.strerror or str(error)).rpartition(" cannot be written: ")[2]
        raise OSError(f"{output} cannot be written: {reason}") from None


@contextlib.contextmanager
def progress(total, done):
    """A function that is told how many rows are done; a bar on a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console, first, start = Console(stderr=True), done, time.perf_counter()
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[speed]} texts/s"), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=total, completed=done, speed="?")

        def show(now):
            speed = (now - first) / (time.perf_counter() - start)
            bar.update(task, completed=now, speed=f"{speed:,.0f}")

        yield show
