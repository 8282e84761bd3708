"""Checkpoints that survive a crash at any instant.

    checkpoint-<step>/
        config.json, model.safetensors, tokenizer files    a model that fastbert and transformers load
        generator/                                          the generator of replaced-token detection
        optimizer.safetensors                               AdamW's two moments and step, by parameter name, and
                                                            parameters that the model's file holds only rounded
        trainer_state.json                                  progress and options of the run, a JSON object
        MANIFEST.json                                       size and sha256 of each file above, written last

A checkpoint is built in a hidden directory beside its final one, forced to the disk, and renamed. So a directory named
checkpoint-<step> is complete unless the disk lost something, which the manifest shows. No file is a pickle.
"""

import contextlib
import dataclasses
import json
import re
import shutil
import warnings
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ..data.tokenizer import save_tokenizer
from ..files import MANIFEST, all_files, sync, verify_manifest, write_manifest
from .options import flag

MODEL, OPTIMIZER, STATE = "model.safetensors", "optimizer.safetensors", "trainer_state.json"
_NAME = re.compile(r"checkpoint-(\d+)")
_BUILDING, _REPLACED = ".building-", ".replaced-"
_EXACT = "parameter"


def save_checkpoint(directory, step, model, optimizer, tokenizer, state, *, keep=None):
    """Write `directory`/checkpoint-<step>, then delete all but the newest `keep` checkpoints (None: keep all).

    model: one of fastbert.model.heads. optimizer: a torch optimizer over its parameters. tokenizer: a
    tokenizers.Tokenizer. state: anything that JSON can hold. Returns the path.

    Raises ValueError when a parameter is not finite and OSError when the files cannot be written. Earlier checkpoints
    stay in both cases.
    """
    bad = [name for name, p in model.named_parameters() if not torch.isfinite(p).all()]
    if bad:
        raise ValueError(f"step {step} is not saved: {len(bad)} parameters are not finite, the first is {bad[0]}")
    directory = Path(directory)
    final = directory / f"checkpoint-{step}"
    with _building(directory, final.name) as building:
        model.save_pretrained(building)
        save_file(_optimizer_tensors(model, optimizer), building / OPTIMIZER)
        (building / STATE).write_text(json.dumps(state, indent=2) + "\n", encoding="utf-8")
        _save_tokenizers(tokenizer, building)
        write_manifest(building)
        # a directory cannot be renamed over one that is not empty
        if final.exists():
            final.rename(directory / f"{_REPLACED}{final.name}")
        building.rename(final)
        sync(directory)
    for old in _by_step(directory)[:-keep] if keep else []:
        # the manifest first: a half-deleted checkpoint must not pass for a whole one
        (old / MANIFEST).unlink(missing_ok=True)
        shutil.rmtree(old, ignore_errors=True)
    return final


def load_checkpoint(path, model, optimizer):
    """Verify checkpoint `path` and load its tensors into `model` and `optimizer`. Returns its state.

    Raises ValueError when a file is damaged or the checkpoint belongs to another model.
    """
    path = Path(path)
    verify(path)
    restored = model.stored(path)
    for name, tensor in model.state_dict().items():
        found = tuple(restored[name].shape) if name in restored else "missing"
        if found != tensor.shape:
            raise ValueError(f"{path} belongs to another model: {name} is {found}, expected {tuple(tensor.shape)}")
    model.load_state_dict(restored)
    parameters = dict(model.named_parameters())
    # a parameter that has had no gradient yet has no state
    for key, value in load_file(path / OPTIMIZER).items():
        name, _, entry = key.rpartition("/")
        if entry == _EXACT:
            parameters[name].data.copy_(value)
        else:
            optimizer.state[parameters[name]][entry] = value.to(parameters[name].device)
    return read_state(path)


def read_state(path):
    """The JSON object that `save_checkpoint` was given as `state`."""
    return json.loads((Path(path) / STATE).read_text(encoding="utf-8"))


def latest(directory):
    """The newest intact checkpoint in `directory`, as a Path; None when there is no checkpoint at all.

    A damaged one is skipped with a warning that says what is wrong with it. Raises ValueError when all are damaged.
    """
    candidates = _by_step(directory)
    for path in reversed(candidates):
        try:
            verify(path)
        except ValueError as error:
            warnings.warn(f"skipped a checkpoint: {error}", stacklevel=2)
        else:
            return path
    if candidates:
        raise ValueError(f"every checkpoint in {directory} is damaged ({len(candidates)} checked)")
    return None


def publish(directory, model, tokenizer):
    """Write the finished model and its tokenizer to `directory` itself, each file completely or not at all."""
    directory = Path(directory)
    with _building(directory, MODEL) as building:
        model.save_pretrained(building)
        _save_tokenizers(tokenizer, building)
        for path in all_files(building):
            final = directory / path.relative_to(building)
            final.parent.mkdir(exist_ok=True)
            sync(path)
            path.replace(final)
            sync(final.parent)
        sync(directory)


@contextlib.contextmanager
def _building(directory, name):
    """A hidden directory to build `directory`/`name` in. A file that cannot be written is an OSError of one line."""
    building = directory / f"{_BUILDING}{name}"
    try:
        clear_unfinished(directory)
        building.mkdir(parents=True)
        yield building
    except (OSError, SafetensorError) as error:
        shutil.rmtree(building, ignore_errors=True)
        reason = getattr(error, "strerror", None) or error
        free = shutil.disk_usage(directory).free / 1e6
        raise OSError(f"{directory / name} cannot be written: {reason} ({free:,.0f} MB are free there)") from None
    clear_unfinished(directory)


def verify(path):
    """Raises ValueError with the file and the fault unless every file of checkpoint `path` is as it was written."""
    verify_manifest(path, required=(MODEL, OPTIMIZER, STATE))


def to_resume(directory, resume):
    """The checkpoint that a run in `directory` resumes from; None for a new run.

    Raises ValueError when the directory holds a run and `resume` is False, or when all its checkpoints are damaged.
    """
    directory = Path(directory)
    if resume:
        clear_unfinished(directory)
        return latest(directory)
    for name in ("checkpoint-*", MODEL, "metrics.jsonl"):
        for path in directory.glob(name):
            raise ValueError(
                f"--output-dir {directory} holds another run ({path.name}): continue it with --resume, or choose "
                "another directory"
            )
    return None


def check_same_run(path, state, config, tokenizer, may_differ):
    """Raises ValueError unless checkpoint `path` has the options `config` and the tokenizer's hash.

    state: what `read_state` returns. may_differ: names of options that a resumed run may change.
    """
    # an option that is newer than the checkpoint had its default
    then = {field.name: field.default for field in dataclasses.fields(config)} | state["config"]
    now = json.loads(json.dumps(dataclasses.asdict(config)))
    for name in now:
        if name not in may_differ and then[name] != now[name]:
            raise ValueError(f"--resume: {flag(name)} is {now[name]!r}, but {then[name]!r} in {path}")
    if tokenizer != state["tokenizer"]:
        raise ValueError(
            f"--resume: the tokenizer has sha256 {tokenizer[:12]}, but {state['tokenizer'][:12]} in {path}"
        )


def clear_unfinished(directory):
    """Clean up after a save that was killed. Only the holder of the lock may call this."""
    directory = Path(directory)
    for path in directory.glob(f"{_REPLACED}*"):
        final = directory / path.name.removeprefix(_REPLACED)
        if final.exists():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.rename(final)
    for path in directory.glob(f"{_BUILDING}*"):
        shutil.rmtree(path, ignore_errors=True)


def _optimizer_tensors(model, optimizer):
    tensors = {
        f"{name}/{key}": value.detach().contiguous()
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }
    return tensors | {f"{name}/{_EXACT}": parameter.detach() for name, parameter in model.inexact().items()}


def _save_tokenizers(tokenizer, directory):
    """Save the tokenizer beside every model in `directory`."""
    for path in directory.rglob("config.json"):
        save_tokenizer(tokenizer, path.parent)


def _by_step(directory):
    steps = {int(match[1]): p for p in Path(directory).glob("checkpoint-*") if (match := _NAME.fullmatch(p.name))}
    return [steps[step] for step in sorted(steps)]
