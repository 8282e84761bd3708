"""Checkpoints that survive a crash at any instant, and one run at a time in a directory.

    checkpoint-<step>/
        config.json, model.safetensors, tokenizer files    a model that fastbert and transformers load
        generator/                                          a second model, where one is learned with
        optimizer.safetensors                               AdamW's two moments and step, by parameter name, and
                                                            parameters that the model's own file has only rounded
        trainer_state.json                                  where the run stands, a JSON object
        MANIFEST.json                                       size and sha256 of each file above, written last

A checkpoint is built in a hidden directory beside its place, forced to the disk, and renamed. So a directory named
checkpoint-<step> is whole unless the disk itself lost something, and that the manifest shows. No file is a pickle.
"""

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import warnings
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from .tokenizer import save_tokenizer

MODEL, OPTIMIZER, STATE, MANIFEST = "model.safetensors", "optimizer.safetensors", "trainer_state.json", "MANIFEST.json"
_NAME = re.compile(r"checkpoint-(\d+)")
_BUILDING, _REPLACED = ".building-", ".replaced-"
_EXACT = "parameter"


def save(directory, step, model, optimizer, tokenizer, state, *, keep=None):
    """Write `directory`/checkpoint-<step>, then delete all but the newest `keep` checkpoints (None: keep all).

    `model` is one of fastbert.heads; `optimizer` a torch optimizer over its parameters; `tokenizer` a
    tokenizers.Tokenizer; `state` goes through JSON. Returns the path. Raises ValueError when a parameter is not finite
    and OSError when the disk does not take the files; earlier checkpoints stay in both cases.
    """
    bad = [name for name, p in model.named_parameters() if not torch.isfinite(p).all()]
    if bad:
        raise ValueError(f"step {step} is not saved: {len(bad)} parameters are not finite, the first is {bad[0]}")
    directory = Path(directory)
    final = directory / f"checkpoint-{step}"
    clear_unfinished(directory)
    building = directory / f"{_BUILDING}{final.name}"
    try:
        building.mkdir(parents=True)
        model.save_pretrained(building)
        save_file(_optimizer_tensors(model, optimizer), building / OPTIMIZER)
        (building / STATE).write_text(json.dumps(state, indent=2) + "\n", encoding="utf-8")
        _save_tokenizers(tokenizer, building)
        write_manifest(building)
        if final.exists():  # a directory cannot be renamed over a full one
            final.rename(directory / f"{_REPLACED}{final.name}")
        building.rename(final)
        _sync(directory)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(building, ignore_errors=True)
        raise _unwritten(final, error) from None
    clear_unfinished(directory)
    for old in _by_step(directory)[:-keep] if keep else []:
        # without its manifest a checkpoint is no longer one, so that a half-deleted one cannot be taken for whole
        (old / MANIFEST).unlink(missing_ok=True)
        shutil.rmtree(old, ignore_errors=True)
    return final


def load(path, model, optimizer):
    """Put the tensors of checkpoint `path`, verified first, into `model` and `optimizer`. Returns its state.

    Raises ValueError when a file is damaged, or when the checkpoint is of another model.
    """
    path = Path(path)
    verify(path)
    restored = model.stored(path)
    own = model.state_dict()
    for name, tensor in own.items():
        if name not in restored or restored[name].shape != tensor.shape:
            found = tuple(restored[name].shape) if name in restored else "missing"
            raise ValueError(f"{path} is of another model: {name} is {found}, expected {tuple(tensor.shape)}")
    model.load_state_dict(restored)
    tensors = load_file(path / OPTIMIZER)
    for name, parameter in model.named_parameters():
        prefix = name + "/"
        entries = {key[len(prefix) :]: value for key, value in tensors.items() if key.startswith(prefix)}
        if _EXACT in entries:
            parameter.data.copy_(entries.pop(_EXACT))
        # a parameter that has had no gradient yet has no state
        if entries:
            optimizer.state[parameter] = {key: value.to(parameter.device) for key, value in entries.items()}
    return read_state(path)


def read_state(path):
    """The JSON object that `save` was given as `state`."""
    return json.loads((Path(path) / STATE).read_text(encoding="utf-8"))


def latest(directory):
    """The newest whole checkpoint in `directory`, as a Path; None when there is no checkpoint at all.

    A damaged one is passed over with a warning that says what is wrong with it. Raises ValueError when all are damaged.
    """
    candidates = _by_step(directory)
    for path in reversed(candidates):
        try:
            verify(path)
        except ValueError as error:
            warnings.warn(f"passed over: {error}", stacklevel=2)
        else:
            return path
    if candidates:
        raise ValueError(f"none of the {len(candidates)} checkpoints in {directory} is whole")
    return None


def publish(directory, model, tokenizer):
    """Put the finished model and its tokenizer into `directory` itself, each file whole or not at all."""
    directory = Path(directory)
    building = directory / f"{_BUILDING}model"
    shutil.rmtree(building, ignore_errors=True)
    try:
        building.mkdir()
        model.save_pretrained(building)
        _save_tokenizers(tokenizer, building)
        for path in _files(building):
            final = directory / path.relative_to(building)
            final.parent.mkdir(exist_ok=True)
            _sync(path)
            path.replace(final)
            _sync(final.parent)
        shutil.rmtree(building)
        _sync(directory)
    except (OSError, SafetensorError) as error:
        raise _unwritten(directory, error) from None


def write_manifest(directory):
    """Write MANIFEST.json over all files of `directory`, with everything forced to the disk, the manifest last."""
    directory = Path(directory)
    files = [path for path in _files(directory) if path != directory / MANIFEST]
    for path in (*files, *{path.parent for path in files}):
        _sync(path)
    manifest = {
        path.relative_to(directory).as_posix(): {"size": path.stat().st_size, "sha256": _sha256(path)} for path in files
    }
    (directory / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    _sync(directory / MANIFEST)
    _sync(directory)


def verify(path):
    """Raises ValueError, naming the file and the fault, unless every file of checkpoint `path` is as it was written."""
    path = Path(path)
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        expected = {name: (entry["size"], entry["sha256"]) for name, entry in manifest.items()}
    except FileNotFoundError:
        raise ValueError(f"{path} is no whole checkpoint: it has no {MANIFEST}") from None
    except (OSError, ValueError, AttributeError, TypeError, KeyError) as error:
        raise ValueError(f"{path / MANIFEST} cannot be read: {error}") from None
    missing = [name for name in (MODEL, OPTIMIZER, STATE) if name not in expected]
    if missing:
        raise ValueError(f"{path / MANIFEST} does not list {missing[0]}")
    for name, (size, digest) in expected.items():
        file = path / name
        if not file.is_file():
            raise ValueError(f"{file} is missing")
        if file.stat().st_size != size:
            raise ValueError(f"{file} has {file.stat().st_size} bytes: {size} were written")
        if _sha256(file) != digest:
            raise ValueError(f"{file} is damaged: its sha256 is not the one that was written")


@contextlib.contextmanager
def lock(directory):
    """Holds `directory` for this process, creating it; the file .lock in it names the process.

    The operating system drops the lock when the process ends, however it ends. Raises ValueError naming the process
    that holds it, OSError when the directory cannot be written.
    """
    import fcntl  # not on Windows: nothing else in the library needs it

    directory = Path(directory)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        file = open(directory / ".lock", "a+", encoding="utf-8")  # noqa: SIM115 (the with below)
    except OSError as error:
        raise OSError(f"{directory} cannot be written: {error.strerror}") from None
    with file:
        try:
            # lockf, not flock: forked workers do not inherit it, so one that outlives its parent holds nothing
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                raise OSError(f"{directory} cannot be locked: {error.strerror}") from None
            file.seek(0)
            holder = file.read().strip() or "unknown"
            raise ValueError(f"{directory} is in use by a live run, process {holder}") from None
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
        yield


def clear_unfinished(directory):
    """Undo what a save that was killed has left behind. Only for the holder of the lock."""
    directory = Path(directory)
    for path in directory.glob(f"{_REPLACED}*"):
        final = directory / path.name.removeprefix(_REPLACED)
        if final.exists():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.rename(final)
    for path in directory.glob(f"{_BUILDING}*"):
        shutil.rmtree(path, ignore_errors=True)


def write_text(path, text):
    """Replace the file `path` so that a crash leaves either the old text or the new."""
    path = Path(path)
    building = path.with_name(f"{_BUILDING}{path.name}")
    building.write_text(text, encoding="utf-8")
    _sync(building)
    building.replace(path)
    _sync(path.parent)


def _optimizer_tensors(model, optimizer):
    tensors = {
        f"{name}/{key}": value.detach().contiguous()
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }
    return tensors | {f"{name}/{_EXACT}": parameter.detach() for name, parameter in model.inexact().items()}


def _save_tokenizers(tokenizer, directory):
    """Beside every model in `directory`."""
    for path in directory.rglob("config.json"):
        save_tokenizer(tokenizer, path.parent)


def _files(directory):
    """All files of a directory and of those in it."""
    return sorted(path for path in directory.rglob("*") if path.is_file())


def _unwritten(path, error):
    """One OSError for what the system and safetensors say when a file cannot be written."""
    reason = getattr(error, "strerror", None) or error
    free = shutil.disk_usage(path.parent).free / 1e6
    return OSError(f"{path} cannot be written: {reason} ({free:,.0f} MB are free there)")


def _by_step(directory):
    steps = {int(match[1]): p for p in Path(directory).glob("checkpoint-*") if (match := _NAME.fullmatch(p.name))}
    return [steps[step] for step in sorted(steps)]


def _sha256(path):
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def _sync(path):
    """Force a file, or a directory's list of names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
