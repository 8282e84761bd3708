"""Models on disk as HuggingFace keeps them: config.json beside the weights, in one safetensors file or in shards."""

import json
import pickle
import warnings
import zipfile
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from . import variants
from .encoder import initialize
from .files import inside

WEIGHTS, PICKLED_WEIGHTS = "model.safetensors", "pytorch_model.bin"
# what safetensors calls the types that no weights are of
_DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "I32": torch.int32, "I64": torch.int64,
}  # fmt: skip


def load(make, directory, *, head, other=None, allow_pickle=False, dtype=torch.float32, **changes):
    """A model from a directory, in evaluation mode: see `Model.from_pretrained`.

    make: gives the model of a config. head: its class's name. other: parameters by our names that lie elsewhere.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise ValueError(f"{directory} is no directory: expected one with config.json and {WEIGHTS}")
    if "num_labels" in changes:
        changes.setdefault("labels", None)
    config = variants.read_config(directory / "config.json").replace(**changes)
    stored = variants.from_hf_names(stored_tensors(directory, allow_pickle), config)
    # no memory yet: each tensor is read once, into the model
    with torch.device("meta"):
        model = make(config)
    other = other or {}
    for name in model.OPTIONAL:
        if (
            getattr(model, name) is not None
            and variants.hf_names([f"{name}.weight"], config, head)[f"{name}.weight"] not in stored
        ):
            setattr(model, name, None)
    own = model.state_dict()
    names = variants.hf_names([name for name in own if name not in other], config, head)

    row = variants.family(config.model_type)
    _untie(stored, row.tied, names, directory)
    missing = [ours for ours, theirs in names.items() if theirs not in stored]
    lost = [names[ours] for ours in missing if ours.startswith("encoder.")]
    if lost:
        raise ValueError(f"{directory} lacks {len(lost)} of the encoder's tensors, the first is {lost[0]}")
    for ours, theirs in names.items():
        if theirs not in stored:
            continue
        shape, stored_dtype, _ = stored[theirs]
        if shape != own[ours].shape:
            raise ValueError(
                f"{directory}: {theirs} has shape {tuple(shape)}, config.json wants {tuple(own[ours].shape)}"
            )
        if not stored_dtype.is_floating_point:
            raise ValueError(f"{directory}: {theirs} is of {stored_dtype}: expected floating-point numbers")
    if missing:
        fresh = ", ".join(names[ours] for ours in missing)
        warnings.warn(f"{directory} lacks {fresh}: these start fresh and want training", stacklevel=3)
        _start_fresh(model, missing)
    heads = tuple(theirs for ours, theirs in row.names.items() if not ours.startswith(("encoder.", f"{head}.")))
    known = {*names.values(), *row.tied}
    unknown = [name for name in stored if name not in known and not name.startswith(heads)]
    if unknown:
        warnings.warn(f"{directory} has tensors that this model does not use: {', '.join(unknown)}", stacklevel=3)

    tensors = {ours: stored[theirs][-1]().to(dtype) for ours, theirs in names.items() if theirs in stored}
    tensors |= {ours: x.to(dtype) for ours, x in other.items()}
    model.load_state_dict(tensors, strict=False, assign=True)
    return model.eval()


def save(model, directory, *, elsewhere=()):
    """Write config.json and model.safetensors under HuggingFace's names; parameters `elsewhere.` are left out."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    head = type(model).__name__
    own = {name: x for name, x in model.state_dict().items() if not name.startswith(elsewhere)}
    names = variants.hf_names(own, model.config, head)
    tensors = {names[ours]: tensor.detach().contiguous() for ours, tensor in own.items()}
    save_file(tensors, directory / WEIGHTS, metadata={"format": "pt"})
    architectures = variants.family(model.config.model_type).architectures
    if head not in architectures:
        raise ValueError(
            f"a {model.config.model_type} has no {head} in transformers: expected {', '.join(architectures)}"
        )
    config = {
        "architectures": [architectures[head]],
        **variants.config_to_hf(model.config),
        "tie_word_embeddings": True,
    }
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _untie(stored, tied, names, directory):
    """A tensor that is stored under the name of its copy alone gets its own; one that is no copy is refused.

    tied: names of what are copies of the word table or of the vocabulary's bias, or buffers, in checkpoints.
    """
    originals = {
        "weight": names.get("encoder.embeddings.word.weight"),
        # a model without the head does not care for its bias
        "bias": names.get("vocabulary_bias"),
    }
    for copy in tied:
        original = originals.get(copy.rpartition(".")[-1])
        if copy not in stored or original is None:
            continue
        if original not in stored:
            stored[original] = stored[copy]
        elif "vocabulary_bias" in names and not torch.equal(stored[copy][-1](), stored[original][-1]()):
            raise ValueError(f"{directory}: {copy} is not the same as {original}: expected them to be tied")


def stored_tensors(directory, allow_pickle):
    """{name: (shape, dtype, function that reads the tensor)} of a directory's weights, whole or in shards."""
    for whole, read, allowed in ((WEIGHTS, _safetensors, True), (PICKLED_WEIGHTS, _pickled, allow_pickle)):
        index = directory / f"{whole}.index.json"
        if not (directory / whole).exists() and not index.exists():
            continue
        if not allowed:
            raise ValueError(
                f"{directory} has no {WEIGHTS}, only {whole}, a pickle file: "
                "pass allow_pickle=True to read its tensors (no code in it is run)"
            )
        if (directory / whole).exists():
            return read(directory / whole)
        try:
            shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (OSError, ValueError, KeyError, AttributeError) as error:
            raise ValueError(f"{index} cannot be read: {error!r}") from None
        return {name: entry for shard in shards for name, entry in read(inside(directory, shard)).items()}
    raise ValueError(f"{directory} has no weights: expected {WEIGHTS} or {WEIGHTS}.index.json")


def _safetensors(path):
    try:
        file, tensors = safe_open(path, "pt"), {}
        for name in file.keys():  # noqa: SIM118
            piece = file.get_slice(name)
            # mapped, not read
            tensors[name] = (
                torch.Size(piece.get_shape()),
                _DTYPES.get(piece.get_dtype(), torch.float32),
                (lambda name=name: file.get_tensor(name)),
            )
        return tensors
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from None


def _pickled(path):
    try:
        # files from before torch 1.6 are no zip archives, and cannot be mapped
        tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except (OSError, EOFError, RuntimeError, pickle.UnpicklingError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"{path} cannot be read as a file of tensors: {reason}") from None
    if not isinstance(tensors, dict) or not all(torch.is_tensor(x) for x in tensors.values()):
        raise ValueError(f"{path} holds something else than tensors by name: expected a model's state_dict")
    return {name: (x.shape, x.dtype, lambda x=x: x) for name, x in tensors.items()}


def _start_fresh(model, names):
    """Initial weights for the parameters `names` of a model without memory."""
    for name in names:
        path, _, leaf = name.rpartition(".")
        module = model.get_submodule(path)
        if hasattr(module, "reset_parameters"):
            module.to_empty(device="cpu")
            module.reset_parameters()
            initialize(module, model.config)
        else:
            setattr(module, leaf, nn.Parameter(torch.zeros(getattr(module, leaf).shape)))
