"""Checkpoints that survive a crash at any instant.

    checkpoint-<step>/
        config.json, model.safetensors, tokenizer files    a model that fastbert and transformers load; with --lora, in
                                                            its place the adapter
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
from ..files import all_files, read_json, sync, verify_manifest, write_manifest
from .options import flag

CONFIG, MODEL, OPTIMIZER, STATE = "config.json", "model.safetensors", "optimizer.safetensors", "trainer_state.json"
# in place of the model's weights, after --lora
ADAPTER = "adapter_model.safetensors"
_NAME = re.compile(r"checkpoint-(0|[1-9][0-9]*)")
# the square root of the largest float32
MAX_PARAMETER = 1.8e19
_BUILDING, _REPLACED, _DELETED = ".building-", ".replaced-", ".deleted-"
# A resumed run may change these options: texts and the tokenizer are compared by content, for the dtype see
# processes.dtype_of. The learning rate it may lower, after training diverged.
MAY_DIFFER = {
    "train_file", "eval_file", "output_dir", "tokenizer", "max_steps", "epochs", "max_minutes", "resume", "save_steps",
    "save_total_limit", "eval_steps", "logging_steps", "device", "dtype", "bf16",
}  # fmt: skip
MAY_FALL = {"learning_rate"}
# what AdamW keeps for each parameter
_ADAMW, _EXACT = ("step", "exp_avg", "exp_avg_sq"), "parameter"


def save_checkpoint(directory, step, model, optimizer, tokenizer, state):
    """Write `directory`/checkpoint-<step>.

    model: one of fastbert.model.heads. optimizer: a torch optimizer over its parameters. tokenizer: a
    tokenizers.Tokenizer. state: anything that JSON can hold. Returns the path.

    Raises OSError when the files cannot be written. Earlier checkpoints stay.
    """
    directory = Path(directory)
    final = directory / f"checkpoint-{step}"
    with _building(directory, final.name) as building:
        model.save_pretrained(building)
        save_file(_optimizer_tensors(model, optimizer), building / OPTIMIZER)
        # safetensors' own are 0600
        (building / OPTIMIZER).chmod((building / CONFIG).stat().st_mode)
        (building / STATE).write_text(json.dumps(state, indent=2) + "\n", encoding="utf-8")
        _save_tokenizers(tokenizer, building)
        write_manifest(building)
        # a directory cannot be renamed over one that is not empty
        if final.exists():
            final.rename(directory / f"{_REPLACED}{final.name}")
        building.rename(final)
        sync(directory)
    return final


def dead_parameter(model):
    """What is wrong with the first parameter that holds NaN, infinity, or a number whose square overflows; or None.

    Attention and norms multiply such numbers with each other: no finite gradient can come of them.
    """
    for name, parameter in model.named_parameters():
        largest = parameter.detach().abs().max().item() if parameter.numel() else 0.0
        # NaN compares as false
        if not largest < MAX_PARAMETER:
            return f"{name} has a value of {largest:g}"
    return None


def prune(newest, keep):
    """Delete older checkpoints beside checkpoint `newest` so that `keep` are left, itself included.

    A damaged checkpoint neither counts nor is deleted. One with a higher step than `newest` stays.
    """
    older, kept = False, 1
    for path in _newest_first(newest.parent):
        if older and _fault(path) is None:
            kept += 1
            if kept > keep:
                # a half-deleted checkpoint must not pass for a whole one, and must be found again
                shutil.rmtree(path.rename(path.with_name(f"{_DELETED}{path.name}")), ignore_errors=True)
        older = older or path == newest


def set_aside(path):
    """Rename checkpoint-<step>, whose parameters give no finite gradient, to diverged-<step>. Returns the new path."""
    aside = path.with_name(path.name.replace("checkpoint", "diverged"))
    shutil.rmtree(aside, ignore_errors=True)
    return path.rename(aside)


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
    try:
        tensors = load_file(path / OPTIMIZER)
    except SafetensorError as error:
        raise ValueError(f"{path / OPTIMIZER} cannot be read: {error}") from None
    for key, value in tensors.items():
        name, _, entry = key.rpartition("/")
        parameter = parameters.get(name)
        shape = () if parameter is None or entry == "step" else parameter.shape
        if parameter is None or entry not in (*_ADAMW, _EXACT) or value.shape != shape or value.dtype != torch.float32:
            raise ValueError(
                f"{path / OPTIMIZER} belongs to another model: {key} is {value.dtype} {tuple(value.shape)}, "
                f"expected {f'torch.float32 {tuple(shape)}' if parameter is not None else 'a parameter of the model'}"
            )
        if entry == _EXACT:
            parameter.data.copy_(value)
        else:
            optimizer.state[parameter][entry] = value.to(parameter.device)
    # a parameter that has had no gradient yet has no state
    names = [key.rpartition("/")[0] for key in tensors if not key.endswith(f"/{_EXACT}")]
    missing = [f"{name}/{entry}" for name in names for entry in _ADAMW if f"{name}/{entry}" not in tensors]
    if missing:
        raise ValueError(f"{path / OPTIMIZER} is damaged: it lacks {missing[0]}")
    return read_state(path)


def read_state(path):
    """The JSON object that `save_checkpoint` was given as `state`."""
    return read_json(Path(path) / STATE)


def latest(directory):
    """The newest intact checkpoint in `directory`, as a Path; None when there is no checkpoint at all.

    A damaged one is skipped with a warning that says what is wrong with it. Raises ValueError when all are damaged.
    """
    candidates = _newest_first(directory)
    for path in candidates:
        fault = _fault(path)
        if fault is None:
            return path
        warnings.warn(f"skipped a checkpoint: {fault}", stacklevel=2)
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
        # the error may name the hidden file
        reason = (getattr(error, "strerror", None) or str(error)).rpartition(" cannot be written: ")[2]
        free = shutil.disk_usage(directory).free / 1e6
        raise OSError(f"{directory / name} cannot be written: {reason} ({free:,.0f} MB are free there)") from None
    clear_unfinished(directory)


def verify(path):
    """Raises ValueError with the file and the fault unless every file of checkpoint `path` is as it was written."""
    weights = ADAPTER if (Path(path) / "adapter_config.json").exists() else MODEL
    verify_manifest(path, required=(CONFIG, weights, OPTIMIZER, STATE, "tokenizer.json"))


def to_resume(directory, resume, say=lambda line: None):
    """The checkpoint that a run in `directory` resumes from; None for a new run. say: is told which it is.

    Raises ValueError when the directory holds a run and `resume` is False, when all its checkpoints are damaged, or
    when it holds a finished model without a checkpoint.
    """
    directory = Path(directory)
    if resume:
        clear_unfinished(directory)
        found = latest(directory)
        if found is None and (directory / MODEL).exists():
            raise ValueError(f"--resume: {directory} holds a model and no checkpoint: choose another directory")
        say(f"resuming from {found}" if found else f"--resume: {directory} has no checkpoint yet, starting a new run")
        return found
    for name in ("checkpoint-*", MODEL, "metrics.jsonl"):
        for path in directory.glob(name):
            raise ValueError(
                f"--output-dir {directory} holds another run ({path.name}): continue it with --resume, or choose "
                "another directory"
            )
    return None


def check_same_run(path, state, config, tokenizer, may_differ):
    """Raises ValueError unless checkpoint `path` has the options `config` and the tokenizer's hash.

    state: what `read_state` returns. may_differ: names of options that a resume may change besides MAY_DIFFER.
    """
    for name, kind in (("config", dict), ("tokenizer", str), ("data", str), ("progress", dict)):
        if not isinstance(state.get(name), kind):
            raise ValueError(f"{path / STATE} has {state.get(name)!r} as {name!r}: it is damaged")
    # an option that is newer than the checkpoint had its default
    then = {field.name: field.default for field in dataclasses.fields(config)} | state["config"]
    now = json.loads(json.dumps(dataclasses.asdict(config)))
    for name in now:
        lower = name in MAY_FALL and isinstance(then[name], int | float) and now[name] < then[name]
        if name not in MAY_DIFFER | may_differ and not lower and then[name] != now[name]:
            only = " (it may be lowered)" if name in MAY_FALL else ""
            raise ValueError(f"--resume: {flag(name)} is {now[name]!r}, but {then[name]!r} in {path}{only}")
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
    for path in (*directory.glob(f"{_BUILDING}*"), *directory.glob(f"{_DELETED}*")):
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
    for path in directory.rglob(CONFIG):
        # the config.json of a module of sentence-transformers, such as its pooling, is not that of a model
        if "model_type" in read_json(path):
            save_tokenizer(tokenizer, path.parent)


def _newest_first(directory):
    """The paths of the checkpoints in a directory, whole or not, by falling steps."""
    steps = {path: match[1] for path in Path(directory).iterdir() if (match := _NAME.fullmatch(path.name))}
    return sorted(steps, key=lambda path: int(steps[path]), reverse=True)


def _fault(path):
    """What `verify` finds wrong with a checkpoint, or None."""
    try:
        verify(path)
    except (OSError, ValueError) as error:
        return error
    return None
