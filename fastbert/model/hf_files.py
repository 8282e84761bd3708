"""Models on disk as HuggingFace keeps them: config.json beside the weights.

The weights are in one safetensors file or in shards. Names of tensors and keys are translated here, by the rows of
families.py.
"""

import json
import pickle
import shutil
import warnings
import zipfile
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from ..files import inside
from . import families
from .encoder import initialize
from .families import FAMILIES, config_of, family

# what every family's config.json holds, under the same names, unless its row says otherwise
_COMMON = (
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "hidden_act",
    "hidden_dropout_prob", "attention_probs_dropout_prob", "max_position_embeddings", "type_vocab_size",
    "initializer_range", "layer_norm_eps", "pad_token_id",
)  # fmt: skip

# names that old checkpoints use
_LEGACY = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}


def _keys(row):
    keys = {**{name: name for name in _COMMON}, **row.keys}
    return {ours: theirs for ours, theirs in keys.items() if theirs is not None}


def config_from_hf(values):
    """The EncoderConfig that the contents of a HuggingFace config.json mean; keys of other matters are ignored.

    Raises ValueError for a model type or a feature that is not here.
    """
    model_type = values.get("model_type", "bert")
    if values.get("position_embedding_type", "absolute") != "absolute":
        raise ValueError(f"position_embedding_type is {values['position_embedding_type']!r}: expected 'absolute'")
    for name in ("is_decoder", "add_cross_attention"):
        if values.get(name):
            raise ValueError(f"{name} is true: expected false, an encoder")
    keys = _keys(family(model_type))
    fields = {ours: values[theirs] for ours, theirs in keys.items() if values.get(theirs) is not None}
    if "embedding_width" in fields:
        fields["embedding_size"] = fields.pop("embedding_width")
    if "id2label" in values:
        names = sorted(values["id2label"].items(), key=lambda item: int(item[0]))
        fields["num_labels"] = len(names)
        fields["labels"] = tuple(name for _, name in names)
        if fields["labels"] == _unnamed(len(names)):
            fields["labels"] = None
    if values.get("problem_type") is not None:
        fields["problem_type"] = values["problem_type"]
    return config_of(model_type, **fields, **family(model_type).read(values))


def _unnamed(num_labels):
    return tuple(f"LABEL_{i}" for i in range(num_labels))


def config_to_hf(config):
    """The contents of a HuggingFace config.json for `config`, without architectures."""
    keys = _keys(FAMILIES[config.model_type])
    values = {"model_type": config.model_type}
    for ours, theirs in keys.items():
        # where two of our fields share a key, the first is written
        values.setdefault(theirs, getattr(config, ours))
    if config.labels is not None or config.num_labels != 2:
        labels = config.labels or _unnamed(config.num_labels)
        values["id2label"] = {str(i): label for i, label in enumerate(labels)}
        values["label2id"] = {label: i for i, label in enumerate(labels)}
    values |= FAMILIES[config.model_type].write(config)
    if config.problem_type is not None:
        values["problem_type"] = config.problem_type
    return values


def read_values(path):
    """The contents of a config.json. Raises ValueError with the path."""
    path = Path(path)
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is not a readable JSON file: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds a {type(values).__name__}: expected a JSON object")
    return values


def read_config(path):
    """The EncoderConfig of a config.json, ours or HuggingFace's. Raises ValueError with the path."""
    values = read_values(path)
    try:
        return config_from_hf(values)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def special_tokens(tokenizer, config):
    """What a tokenizer_config.json says of the special tokens of a tokenizers.Tokenizer."""
    names = {"cls_token": ("[CLS]", "<s>"), "sep_token": ("[SEP]", "</s>"), "unk_token": ("[UNK]", "<unk>"),
             "mask_token": ("[MASK]", "<mask>")}  # fmt: skip
    found = {
        key: next((t for t in tokens if tokenizer.token_to_id(t) is not None), None) for key, tokens in names.items()
    }
    found["pad_token"] = tokenizer.id_to_token(config.pad_token_id)
    return {key: token for key, token in found.items() if token is not None}


def hf_names(names, config, head=None):
    """{our name: HuggingFace's name} for the parameter names `names` of a model with `config`; head: its class name."""
    table = FAMILIES[config.model_type].names
    result = {}
    for name in names:
        parts = name.split(".")
        number = next((int(part) for part in parts if part.isdigit()), 0)
        pattern = ".".join("{i}" if part.isdigit() else part for part in parts)
        module, _, leaf = pattern.rpartition(".")
        whole = table.get(f"{head}.{pattern}", table.get(pattern))
        theirs = whole or f"{table.get(f'{head}.{module}') or table[module]}.{leaf}"
        group, place = divmod(number, config.inner_group_num)
        result[name] = theirs.replace("{i}", str(number)).replace("{g}", str(group)).replace("{j}", str(place))
    return result


def from_hf_names(tensors, config):
    """A checkpoint's tensors by HuggingFace's current full names: legacy names renewed, a missing prefix put back."""
    row = FAMILIES[config.model_type]
    heads = tuple({name.split(".")[0] + "." for name in (*row.names.values(), *row.tied)})
    renewed = {}
    for name, tensor in tensors.items():
        for old, new in row.renamed.items():
            if name.startswith(old):
                name = new + name[len(old) :]
        for old, new in _LEGACY.items():
            if name.endswith(old):
                name = name[: -len(old)] + new
        if not name.startswith(heads):
            name = row.prefix + name
        renewed[name] = tensor
    return renewed


WEIGHTS, PICKLED_WEIGHTS = "model.safetensors", "pytorch_model.bin"
# what safetensors calls the types that no weights are of
_DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "I32": torch.int32, "I64": torch.int64,
}  # fmt: skip


def load_model(make, directory, *, head, other=None, allow_pickle=False, dtype=torch.float32, **changes):
    """A model from a directory, in evaluation mode: see `Model.from_pretrained`.

    make: gives the model of a config. head: its class's name. other: parameters by our names that lie elsewhere.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise ValueError(f"{directory} is no directory: expected one with config.json and {WEIGHTS}")
    if "num_labels" in changes:
        changes.setdefault("labels", None)
    config = read_config(directory / "config.json").replace(**changes)
    stored = from_hf_names(stored_tensors(directory, allow_pickle), config)
    # no memory yet: each tensor is read once, into the model
    with torch.device("meta"):
        model = make(config)
    other = other or {}
    for name in model.OPTIONAL:
        if (
            getattr(model, name) is not None
            and hf_names([f"{name}.weight"], config, head)[f"{name}.weight"] not in stored
        ):
            setattr(model, name, None)
    own = model.state_dict()
    names = hf_names([name for name in own if name not in other], config, head)

    row = families.family(config.model_type)
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
    names = hf_names(own, model.config, head)
    tensors = {names[ours]: tensor.detach().contiguous() for ours, tensor in own.items()}
    save_file(tensors, directory / WEIGHTS, metadata={"format": "pt"})
    architectures = families.family(model.config.model_type).architectures
    if head not in architectures:
        raise ValueError(
            f"a {model.config.model_type} has no {head} in transformers: expected {', '.join(architectures)}"
        )
    config = {
        "architectures": [architectures[head]],
        **config_to_hf(model.config),
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


def _read_json(path):
    if not path.exists():
        return {}
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not a readable JSON file: {error}") from None


def _write_json(path, values):
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


# files beside the weights that go along as they are
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.txt",
    "vocab.json", "merges.txt", "spm.model", "spiece.model", "sentencepiece.bpe.model",
)  # fmt: skip


def save_tensors(tensors: dict[str, torch.Tensor], directory: Path) -> None:
    """Write {name: tensor} to the model.safetensors of a directory."""
    tensors = {name: x.detach().contiguous() for name, x in tensors.items()}
    save_file(tensors, directory / WEIGHTS, metadata={"format": "pt"})


def copy_tokenizer(source: str | Path, destination: str | Path) -> None:
    """Copy the files of a tokenizer from one model's directory to another's, where it has no such file."""
    for name in TOKENIZER_FILES:
        if (Path(source) / name).exists() and not (Path(destination) / name).exists():
            shutil.copy(Path(source) / name, Path(destination) / name)
