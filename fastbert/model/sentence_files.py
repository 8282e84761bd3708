"""Directories of sentence-transformers: modules.json, a folder for each module, and the settings beside them.

Every key of every file is obeyed, is known to change no vector, or is refused by name.
"""

import re

from tokenizers import normalizers

from ..data.tokenizer import load_tokenizer
from ..files import inside, read_json
from . import hf_files
from .config import checked, shown
from .hf_files import write_json

MODES = ("mean", "cls", "max", "mean_sqrt_len_tokens", "weightedmean", "lasttoken")
ACTIVATIONS = ("Identity", "Tanh", "ReLU", "GELU")
SIMILARITIES = ("cosine", "dot", "euclidean", "manhattan")
NORMALIZE = "Normalize"
# what the modules before Pooling read and write, and what those after it do
_TOKENS, _TEXT = "token_embeddings", "sentence_embedding"
# our mode -> its key in a pooling module's config.json, before sentence-transformers 6 one for each mode
_MODE_KEYS = {
    "cls": "pooling_mode_cls_token", "max": "pooling_mode_max_tokens", "mean": "pooling_mode_mean_tokens",
    "mean_sqrt_len_tokens": "pooling_mode_mean_sqrt_len_tokens", "weightedmean": "pooling_mode_weightedmean_tokens",
    "lasttoken": "pooling_mode_lasttoken",
}  # fmt: skip
_TYPE = re.compile(
    r"sentence_transformers\.(models|base\.modules|sentence_transformer\.modules)\.(\w+\.)?"
    r"(?P<kind>Transformer|Pooling|Dense|Normalize)"
)
# the files of a Transformer's settings; the first that holds something counts
_TRANSFORMER_FILES = [
    f"sentence_{name}_config.json"
    for name in ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
]
# where weights and files come from, and how they are held: sentence-transformers sets the first six itself
_HUB = ("subfolder", "token", "cache_dir", "revision", "local_files_only", "trust_remote_code")
_LOADING = (*_HUB, "attn_implementation", "low_cpu_mem_usage", "use_safetensors", "device_map", "add_pooling_layer")
_FP32 = dict(dtype=["float32", "auto"], torch_dtype=["float32", "auto"])


def _settings(source, values, obeyed=(), without_effect=(), **expected):
    """`values`, an object from the file `source`. expected: key -> the values of it that change nothing.

    Raises ValueError for any other key that is not null.
    """
    for key, value in values.items():
        if value is None or key in obeyed or key in without_effect:
            continue
        accepted = expected.get(key, [])
        if value not in accepted:
            expectation = f"expected {' or '.join(map(shown, accepted))}" if accepted else "that is not supported here"
            raise ValueError(f"{source}: {key} is {shown(value)}: {expectation}")
    return values


def _from_file(path, *obeyed, **rules):
    values = read_json(path) if path.exists() else {}
    return _settings(path, values, obeyed, **rules)


def read_directory(directory, allow_pickle):
    """(arguments of SentenceEmbedder, folder of the encoder, changes of its config.json, weights of the Dense modules).

    Without modules.json: a bare encoder, mean pooling, no normalization. weights: {name in the state dict: tensor}.
    Raises ValueError with the file and the key.
    """
    if not (directory / "modules.json").exists():
        arguments = dict(pooling="mean", normalize=False)
        return arguments | _read_limits(directory, {}, {}), directory, {}, {}
    (_, folder), *others = _read_modules(directory)
    transformer, config_changes, processor = _read_transformer(folder)
    arguments, weights = dict(token_dense=[], dense=[], normalize=False), {}
    for kind, place in others:
        if kind == "Pooling":
            arguments |= _read_pooling(place / "config.json")
            continue
        part = "dense" if "pooling" in arguments else "token_dense"
        layers = arguments[part]
        if kind == NORMALIZE:
            _read_names(place / "config.json", _from_file(place / "config.json", *_NAMES), part)
            layers.append(NORMALIZE)
        else:
            layer, tensors = _read_dense(place, part, allow_pickle)
            weights |= {f"{part}.{len(layers)}.{name}": tensor for name, tensor in tensors.items()}
            layers.append(layer)
    if arguments["dense"][-1:] == [NORMALIZE]:
        arguments["normalize"] = bool(arguments["dense"].pop())
    arguments |= _read_model(directory / "config_sentence_transformers.json")
    return arguments | _read_limits(folder, transformer, processor), folder, config_changes, weights


def _read_modules(directory):
    """[(kind, folder)] of modules.json: a Transformer, then others, among them one Pooling."""
    path, modules, names = directory / "modules.json", [], set()
    for entry in read_json(path, list):
        checked(f"{path}: a module", entry, dict)
        _settings(path, entry, ("type", "path", "name"), ("idx", "kwargs"))
        kind, place, name = (checked(f"{path}: {key}", entry.get(key), str) for key in ("type", "path", "name"))
        match = _TYPE.fullmatch(kind)
        if match is None:
            raise ValueError(f"{path} has a module {shown(kind)}: it is not known here")
        if name in names:
            raise ValueError(f"{path} has two modules named {shown(name)}")
        names.add(name)
        modules.append((match["kind"], inside(directory, place)))
    kinds = [kind for kind, _ in modules]
    if kinds[:1] != ["Transformer"] or kinds.count("Transformer") != 1 or kinds.count("Pooling") != 1:
        raise ValueError(f"{path} has the modules {shown(kinds)}: expected a Transformer first, and one Pooling")
    return modules


def _read_transformer(folder):
    """(settings, changes of config.json, settings of the tokenizer) of a Transformer module."""
    paths = [folder / name for name in _TRANSFORMER_FILES]
    path = next((path for path in paths if path.exists() and read_json(path)), paths[0])
    parts = {"config_kwargs": "config_args", "processor_kwargs": "tokenizer_args", "model_kwargs": "model_args"}
    values = _from_file(
        path, "max_seq_length", "do_lower_case", *parts, *parts.values(), without_effect=("unpad_inputs", "backend"),
        transformer_task=["feature-extraction"], module_output_name=[_TOKENS], processing_kwargs=[{}],
        modality_config=[{"text": {"method": "forward", "method_output_name": "last_hidden_state"}}],
    )  # fmt: skip
    # the older name wins
    config, processor, model = (
        checked(f"{path}: {new}", values.get(old, values.get(new)) or {}, dict) for new, old in parts.items()
    )
    _settings(f"{path}: model_kwargs", model, (), _LOADING, **_FP32)
    _settings(
        f"{path}: processor_kwargs", processor, ("model_max_length", "truncation_side", "padding_side"),
        (*_HUB, "use_fast", "clean_up_tokenization_spaces"),
    )  # fmt: skip
    known = hf_files.config_keys(read_json(folder / "config.json"))
    harmless = (*_LOADING, "output_attentions", "output_hidden_states", "use_cache", "return_dict")
    _settings(f"{path}: config_kwargs", config, known, harmless, **_FP32)
    return values, {key: value for key, value in config.items() if key in known}, processor


def _read_limits(folder, transformer, processor):
    """What is read of a text: tokenizer, max_length, truncation_side."""
    path = folder / "tokenizer_config.json"
    settings, made = read_json(path) if path.exists() else {}, None
    if any((folder / name).exists() for name in ("tokenizer.json", "vocab.txt")):
        made = load_tokenizer(folder)
    if checked(f"{folder}: do_lower_case", transformer.get("do_lower_case") or False, bool):
        if made is None:
            raise ValueError(f"{folder}: do_lower_case is true, but there is no tokenizer.json or vocab.txt")
        _lower_case(made)
    given = {"model_max_length": processor.get("model_max_length"), "max_seq_length": transformer.get("max_seq_length")}
    given = [(key, length) for key, length in given.items() if length is not None][:1]
    config = hf_files.read_config(folder / "config.json")
    longest = config.max_position_embeddings
    usual = [("max_position_embeddings", longest), ("model_max_length", _longest(settings) or longest)]
    # transformers writes 1e30 for no limit
    limits = [checked(f"{folder}: {key}", length, float, (1, 1e31)) for key, length in given or usual]
    own = dict(truncation_side=made and made.truncation, padding_side=made and made.padding)
    sides = {
        key: processor.get(key) or settings.get(key) or (values or {}).get("direction", "right")
        for key, values in own.items()
    }
    # a text's positions would depend on how much longer another in its batch is
    if sides["padding_side"] != "right" and config.has_positions and not config.position_offset:
        raise ValueError(f"{folder}: padding_side is {shown(sides['padding_side'])}: expected 'right'")
    return dict(tokenizer=made, max_length=int(min(limits)), truncation_side=sides["truncation_side"])


def _longest(settings):
    # the older name counts where the other is missing
    return settings.get("model_max_length", settings.get("max_len"))


def _lower_case(tokenizer):
    """Let a tokenizer lower the case of a text first, as sentence-transformers does."""
    steps = tokenizer.normalizer
    steps = [] if steps is None else [*steps] if isinstance(steps, normalizers.Sequence) else [steps]
    if not any(isinstance(step, normalizers.Lowercase) for step in steps):
        tokenizer.normalizer = normalizers.Sequence([normalizers.Lowercase(), *steps])


def _read_model(path):
    """What config_sentence_transformers.json says, as far as it is given."""
    keys = ("prompts", "default_prompt_name", "similarity_fn_name", "truncate_dim")
    values = _from_file(
        path, *keys, without_effect=("__version__", "requirements"), model_type=["SentenceTransformer"]
    )  # fmt: skip
    checked(f"{path}: prompts", values.get("prompts") or {}, dict)
    return {key: values[key] for key in keys if values.get(key) is not None}


def _read_pooling(path):
    values = _from_file(
        path, "pooling_mode", "include_prompt", *_MODE_KEYS.values(),
        without_effect=("word_embedding_dimension", "embedding_dimension"),
    )  # fmt: skip
    if not values:
        raise ValueError(f"{path} is missing: expected the mode of a Pooling module")
    modes = [mode for mode, key in _MODE_KEYS.items() if checked(f"{path}: {key}", values.get(key) or False, bool)]
    named = values.get("pooling_mode", modes or "mean")
    modes = [named] if isinstance(named, str) else checked(f"{path}: pooling_mode", named, list)
    if len(modes) != 1 or modes[0] not in MODES:
        raise ValueError(f"{path}: pooling_mode is {shown(modes)}: expected one of {', '.join(MODES)}")
    return dict(
        pooling=modes[0], include_prompt=checked(f"{path}: include_prompt", values.get("include_prompt", True), bool)
    )


_NAMES = ("module_input_name", "module_output_name")


def _read_names(path, values, part):
    """Refuse a module that reads or writes something else than what stands in its place."""
    read = values.get("module_input_name", _TEXT)
    expected = _TOKENS if part == "token_dense" else _TEXT
    for key, name in zip(_NAMES, (read, values.get("module_output_name") or read)):
        if name != expected:
            where = "before Pooling" if expected == _TOKENS else "after Pooling"
            raise ValueError(f"{path}: {key} is {shown(name)}: expected {expected!r} {where}")


def _read_dense(place, part, allow_pickle):
    """((in_features, out_features, bias, activation, use_residual), {name: tensor}) of a Dense module."""
    path = place / "config.json"
    values = _from_file(path, "in_features", "out_features", "bias", "activation_function", "use_residual", *_NAMES)
    _read_names(path, values, part)
    sizes = [checked(f"{path}: {key}", values.get(key), int, (1, 2**20)) for key in ("in_features", "out_features")]
    bias, use_residual = (
        checked(f"{path}: {key}", values.get(key, default), bool)
        for key, default in (("bias", True), ("use_residual", False))
    )
    activation = checked(f"{path}: activation_function", values.get("activation_function", "torch.nn.Tanh"), str)
    name = activation.rsplit(".", 1)[-1]
    if not activation.startswith("torch.nn.") or name not in ACTIVATIONS:
        raise ValueError(
            f"{path}: activation_function is {shown(activation)}: expected torch.nn's {', '.join(ACTIVATIONS)}"
        )
    shapes = {"linear.weight": (sizes[1], sizes[0])}
    if bias:
        shapes["linear.bias"] = (sizes[1],)
    if use_residual and sizes[0] != sizes[1]:
        shapes["residual.weight"] = (sizes[1], sizes[0])
    return (*sizes, bias, name, use_residual), hf_files.read_tensors(place, shapes, allow_pickle)


def write_directory(model, directory):
    """Write modules.json and all that it names but the encoder; of the tokenizer, its settings."""
    modules = [
        ("Transformer", None), *((layer.KIND, layer) for layer in model.token_dense), ("Pooling", None),
        *((layer.KIND, layer) for layer in model.dense), *[(NORMALIZE, None)] * model.normalize,
    ]  # fmt: skip
    listed, names, width = [], dict.fromkeys(_NAMES, _TOKENS), model.config.hidden_size
    for i, (kind, layer) in enumerate(modules):
        place = f"{i}_{kind}" if i else ""
        listed.append(dict(idx=i, name=str(i), path=place, type=f"sentence_transformers.models.{kind}"))
        settings = {}
        if kind == "Pooling":
            settings = {key: mode == model.pooling for mode, key in _MODE_KEYS.items()}
            settings |= dict(word_embedding_dimension=width, include_prompt=model.include_prompt)
            # older versions do not know the names, which are the default from here on
            names = {}
        elif kind == "Dense":
            width = layer.linear.out_features
            settings = layer.settings() | names
        elif kind == NORMALIZE:
            settings = names
        (directory / place).mkdir(parents=True, exist_ok=True)
        if settings:
            write_json(directory / place / "config.json", settings)
        if kind == "Dense":
            hf_files.save_tensors(layer.state_dict(), directory / place)
    write_json(directory / "modules.json", listed)
    write_json(directory / "sentence_bert_config.json", dict(max_seq_length=model.max_length, do_lower_case=False))
    settings = dict(
        prompts=model.prompts, default_prompt_name=model.default_prompt_name,
        similarity_fn_name=model.similarity_fn_name,
    )  # fmt: skip
    if model.truncate_dim is not None:
        settings["truncate_dim"] = model.truncate_dim
    write_json(directory / "config_sentence_transformers.json", settings)
    if model.tokenizer is not None:
        hf_files.write_tokenizer(model.tokenizer, directory, model.config, dict(
            model_max_length=model.max_length, truncation_side=model.truncation_side,
        ))  # fmt: skip


def write_sparse_directory(model, directory):
    """Write what SparseEncoder of sentence-transformers reads beside a masked-LM model: its modules and settings."""
    names = (("Transformer", "base.modules"), ("SpladePooling", "sparse_encoder.modules"))
    listed = []
    for i, (kind, place) in enumerate(names):
        path = f"{i}_{kind}" if i else ""
        listed.append(dict(idx=i, name=str(i), path=path, type=f"sentence_transformers.{place}.{kind}"))
        (directory / path).mkdir(parents=True, exist_ok=True)
    write_json(directory / "modules.json", listed)
    settings = dict(max_seq_length=model.max_length, do_lower_case=False, transformer_task="fill-mask")
    write_json(directory / "sentence_bert_config.json", settings)
    settings = dict(pooling_strategy="max", activation_function="relu", embedding_dimension=model.config.vocab_size)
    write_json(directory / listed[1]["path"] / "config.json", settings)
    settings = dict(model_type="SparseEncoder", prompts=model.prompts, similarity_fn_name="dot")
    write_json(directory / "config_sentence_transformers.json", settings)
