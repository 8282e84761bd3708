"""Models on disk as HuggingFace keeps them, or on its hub: config.json beside the weights.

The weights are in one safetensors file or in shards. Names of tensors and keys are translated here, by the rows of
families.py.
"""

import json
import warnings
import zipfile
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from .. import files, hub, ops
from .config import checked, shown
from .encoder import initialize
from .families import ALIASES, FAMILIES, config_of, family

# the keys that every family's config.json has, unless its row says otherwise
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


# keys that change what a family computes, unless they have one of these values
_EXPECTED = {
    "is_decoder": [False], "add_cross_attention": [False], "position_embedding_type": ["absolute"],
    "quantization_config": [], "per_layer_config": [{}], "auto_map": [{}],
}  # fmt: skip


def config_from_hf(values):
    """The EncoderConfig of the contents of a HuggingFace config.json.

    Keys that change nothing in what transformers' class computes are ignored. Raises ValueError, with the key, for an
    unknown model type, a value that no model can have, and whatever this encoder does not have.
    """
    model_type = values.get("model_type", "bert")
    model_type = ALIASES.get(model_type, model_type) if isinstance(model_type, str) else model_type
    row = family(model_type)
    if row.converts:
        # what the code in their published directories computes is known
        values = {key: x for key, x in values.items() if key != "auto_map"}
    for key, expected in {**_EXPECTED, **row.expected}.items():
        if values.get(key) is not None and values[key] not in expected:
            raise ValueError(f"{key} is {shown(values[key])}: expected {' or '.join(map(repr, expected)) or 'none'}")
    keys = {**_keys(row), "problem_type": "problem_type", "num_labels": "num_labels"}
    fields = {ours: values[theirs] for ours, theirs in keys.items() if values.get(theirs) is not None}
    if "embedding_width" in fields:
        fields["embedding_size"] = fields.pop("embedding_width")
    if values.get("id2label") is not None:
        fields["labels"] = _read_labels(values["id2label"])
        if fields.setdefault("num_labels", len(fields["labels"])) != len(fields["labels"]):
            raise ValueError(f"num_labels is {shown(fields['num_labels'])}: id2label has {len(fields['labels'])} names")
        if fields["labels"] == _unnamed(len(fields["labels"])):
            fields["labels"] = None
    fields |= row.read(values)
    try:
        config = config_of(model_type, **fields)
    except ValueError as error:
        # it begins with our name of a field
        name, _, rest = str(error).partition(" ")
        raise ValueError(f"{keys.get(name, name)} {rest}") from None
    for key, name in row.same.items():
        if values.get(key) not in (None, getattr(config, name)):
            raise ValueError(f"{key} is {shown(values[key])}: expected {getattr(config, name)}, the {name}")
    return config


def _read_labels(names):
    """The names of the labels 0, 1, ... from id2label."""
    checked("id2label", names, dict)
    if {str(key) for key in names} != {str(i) for i in range(len(names))}:
        raise ValueError(f"id2label has the keys {shown([*names])}: expected 0 to {len(names) - 1}")
    return tuple(checked("id2label", names.get(str(i), names.get(i)), str) for i in range(len(names)))


def config_keys(values):
    """The keys of a config.json that are fields of EncoderConfig."""
    return set(_keys(family(values.get("model_type", "bert"))).values())


def _unnamed(num_labels):
    return tuple(f"LABEL_{i}" for i in range(num_labels))


def config_to_hf(config):
    """The contents of a HuggingFace config.json for `config`, without architectures."""
    keys = _keys(FAMILIES[config.model_type])
    values = {"model_type": config.model_type}
    for ours, theirs in keys.items():
        # two of our fields may share a key: the first is written
        values.setdefault(theirs, getattr(config, ours))
    if config.labels is not None or config.num_labels != 2:
        labels = config.labels or _unnamed(config.num_labels)
        values["id2label"] = {str(i): label for i, label in enumerate(labels)}
        values["label2id"] = {label: i for i, label in enumerate(labels)}
    values |= FAMILIES[config.model_type].write(config)
    if config.problem_type is not None:
        values["problem_type"] = config.problem_type
    return values


def read_config(path, changes=None):
    """The EncoderConfig of a config.json, ours or HuggingFace's, with other values for its keys in `changes`.

    Raises ValueError with the path.
    """
    values = files.read_json(path) | (changes or {})
    try:
        return config_from_hf(values)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


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
    """A checkpoint's tensors by HuggingFace's current full names: legacy names updated, a missing prefix added."""
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


# the directory of a path or of a name on the hub
local = hub.local

WEIGHTS, PICKLED_WEIGHTS = "model.safetensors", "pytorch_model.bin"
# the types of tensors that a model can have, as safetensors and torch name them
_FLOATS = {"F64", "F32", "F16", "BF16", "torch.float64", "torch.float32", "torch.float16", "torch.bfloat16"}


def load_model(make, directory, *, head, other=None, config_changes=None, allow_pickle=False, dtype=torch.float32,
               revision=None, **changes):  # fmt: skip
    """A model from a directory or the hub, in evaluation mode: see `Model.from_pretrained`.

    make: builds the model of a config. head: the name of its class. other: parameters stored elsewhere, by our names.
    config_changes: values for keys of config.json. changes: values for fields of EncoderConfig.
    """
    products, dtype = (dtype, torch.float32) if isinstance(dtype, str) else ("fp32", dtype)
    # an error or a warning now, not after reading the weights
    products = ops.low_precision.chosen(products)
    directory = local(directory, revision)
    if not directory.is_dir():
        raise ValueError(
            f"{directory} is no directory: expected one with config.json and {WEIGHTS}, or the name of a model on the "
            f"hub, such as {hub.EXAMPLE}"
        )
    if (directory / "adapter_config.json").exists():
        raise ValueError(f"{directory} has an adapter_config.json: merge the adapter into the weights first")
    if "num_labels" in changes:
        changes.setdefault("labels", None)
    config = read_config(directory / "config.json", config_changes).replace(**changes)
    stored = from_hf_names(stored_tensors(directory, allow_pickle), config)
    # without memory: each tensor is read once, into the model
    with torch.device("meta"):
        model = make(config)
    other = other or {}
    for name in model.OPTIONAL:
        parameters = [x for x in model.state_dict() if x.startswith(f"{name}.")]
        if not set(hf_names(parameters, config, head).values()) & stored.keys():
            setattr(model, name, None)
    own = model.state_dict()
    names = hf_names([name for name in own if name not in other], config, head)

    row = family(config.model_type)
    is_tied = files.read_json(directory / "config.json").get("tie_word_embeddings", True)
    _untie(stored, row.tied, names, directory, is_tied)
    missing = [ours for ours, theirs in names.items() if theirs not in stored]
    lost = [names[ours] for ours in missing if ours.startswith("encoder.")]
    if lost:
        raise ValueError(f"{directory} lacks {len(lost)} of the encoder's tensors, the first is {lost[0]}")
    for ours, theirs in names.items():
        if theirs not in stored:
            continue
        shape, stored_dtype, _ = stored[theirs]
        if shape != own[ours].shape:
            raise ValueError(f"{directory}: {theirs} has shape {shape}, config.json wants {tuple(own[ours].shape)}")
        if stored_dtype not in _FLOATS:
            raise ValueError(f"{directory}: {theirs} is of {stored_dtype}: expected floating-point numbers")
    if missing:
        fresh = ", ".join(names[ours] for ours in missing)
        warnings.warn(f"{directory} lacks {fresh}: these start fresh and need training", stacklevel=3)
        _start_fresh(model, missing)
    heads = tuple(theirs for ours, theirs in row.names.items() if not ours.startswith(("encoder.", f"{head}.")))
    known = {*names.values(), *row.tied}
    unknown = [name for name in stored if name not in known and not name.startswith(heads)]
    if unknown:
        warnings.warn(f"{directory} has tensors that this model does not use: {', '.join(unknown)}", stacklevel=3)

    tensors = {ours: stored[theirs][-1]().to(dtype) for ours, theirs in names.items() if theirs in stored}
    tensors |= {ours: x.to(dtype) for ours, x in other.items()}
    model.load_state_dict(tensors, strict=False, assign=True)
    model.eval().encoder.set_dtype(products)
    return model


def save_model(model, directory, *, elsewhere=(), head=None):
    """Write model.safetensors, then config.json, under HuggingFace's names; parameters `elsewhere.` are left out.

    head: the name of the model's class, if it is saved as another.
    """
    directory, head = Path(directory), head or type(model).__name__
    architectures = family(model.config.model_type).architectures
    if head not in architectures:
        raise ValueError(
            f"a {model.config.model_type} has no {head} in transformers: expected {', '.join(architectures)}"
        )
    directory.mkdir(parents=True, exist_ok=True)
    own = {name: x for name, x in model.state_dict().items() if not name.startswith(elsewhere)}
    names = hf_names(own, model.config, head)
    save_tensors({names[ours]: x for ours, x in own.items()}, directory)
    config = {"architectures": [architectures[head]], **config_to_hf(model.config), "tie_word_embeddings": True}
    write_json(directory / "config.json", config)


def _untie(stored, tied, names, directory, is_tied):
    """Give a tensor that is stored only under the name of its copy its own name; refuse a copy that differs.

    tied: names of buffers and of copies of the word table or the vocabulary's bias in checkpoints. is_tied: whether
    config.json says that they are copies; if not, they must be stored, and equal.
    """
    copies = [name for name in tied if name.endswith("weight")]
    if "vocabulary_bias" in names and not is_tied and not stored.keys() & set(copies):
        raise ValueError(f"{directory / 'config.json'}: tie_word_embeddings is false, but {copies[0]} is not stored")
    originals = {
        "weight": names.get("encoder.embeddings.word.weight"),
        # a model without the head does not need its bias
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
    """{name: (shape, name of the dtype, function that reads it)} of a directory's weights, whole or in shards."""
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
        shards = files.read_json(index).get("weight_map")
        if not isinstance(shards, dict) or not all(isinstance(shard, str) for shard in shards.values()):
            raise ValueError(f"{index} has no usable weight_map: expected the name of a file for each tensor")
        shards = sorted(set(shards.values()))
        return {name: entry for shard in shards for name, entry in read(files.inside(directory, shard)).items()}
    if (directory / "adapter_config.json").exists():
        raise ValueError(f"{directory} holds an adapter alone: expected a model that it is merged into")
    raise ValueError(f"{directory} has no weights: expected {WEIGHTS} or {WEIGHTS}.index.json")


def read_tensors(directory, shapes, allow_pickle):
    """{name: tensor} of a directory that must hold the tensors of {name: shape} and no others. Raises ValueError."""
    stored = stored_tensors(directory, allow_pickle)
    found = {name: shape for name, (shape, dtype, _) in stored.items() if dtype in _FLOATS}
    if found != shapes or len(stored) != len(shapes):
        raise ValueError(f"{directory} holds tensors of the shapes {shown(found)}: expected {shown(shapes)}")
    return {name: read() for name, (*_, read) in stored.items()}


def _safetensors(path):
    try:
        file, tensors = safe_open(path, "pt"), {}
        for name in file.keys():  # noqa: SIM118
            # mapped, not read
            piece = file.get_slice(name)
            tensors[name] = (tuple(piece.get_shape()), piece.get_dtype(), lambda name=name: file.get_tensor(name))
        return tensors
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from None


def _pickled(path):
    try:
        # files from before torch 1.6 are no zip archives, and cannot be mapped
        tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:
        # what is no such file fails in any way
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"{path} cannot be read as a file of tensors: {reason}") from None
    if not isinstance(tensors, dict) or not all(torch.is_tensor(x) for x in tensors.values()):
        raise ValueError(f"{path} does not hold tensors by name: expected a model's state_dict")
    return {str(name): (tuple(x.shape), str(x.dtype), lambda x=x: x) for name, x in tensors.items()}


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


def write_json(path, values):
    files.write(path, json.dumps(values, indent=2, ensure_ascii=False) + "\n")


def write_tokenizer(tokenizer, directory, config, settings):
    """Write tokenizer.json of a tokenizers.Tokenizer, and tokenizer_config.json with `settings`."""
    names = dict(
        cls_token=("[CLS]", "<s>"), sep_token=("[SEP]", "</s>"), unk_token=("[UNK]", "<unk>"),
        mask_token=("[MASK]", "<mask>"), pad_token=(tokenizer.id_to_token(config.pad_token_id),),
    )  # fmt: skip
    found = {key: [x for x in tokens if x and tokenizer.token_to_id(x) is not None] for key, tokens in names.items()}
    special = {key: tokens[0] for key, tokens in found.items() if tokens}
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = special | dict(tokenizer_class="PreTrainedTokenizerFast") | settings
    write_json(directory / "tokenizer_config.json", settings)


def save_tensors(tensors: dict[str, torch.Tensor], directory: Path) -> None:
    """Write {name: tensor} to the model.safetensors of a directory: whole, or not at all. Raises OSError."""
    tensors = {name: x.detach().contiguous() for name, x in tensors.items()}
    path = directory / WEIGHTS
    building = path.with_name(f"{WEIGHTS}.tmp")
    try:
        # its mode is that of any new file, safetensors' own is 0600
        building.touch()
        mode = building.stat().st_mode
        save_file(tensors, building, metadata={"format": "pt"})
        building.chmod(mode)
        building.replace(path)
    except (OSError, SafetensorError) as error:
        building.unlink(missing_ok=True)
        raise OSError(f"{path} cannot be written: {error}") from None


def copy_tokenizer(source: str | Path, destination: str | Path) -> None:
    """Copy a tokenizer's files from one model's directory to another, except those that it already has."""
    for name in hub.TOKENIZER_FILES:
        if (Path(source) / name).exists() and not (Path(destination) / name).exists():
            files.write(Path(destination) / name, (Path(source) / name).read_bytes())
