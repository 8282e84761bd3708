"""Any checkpoint of a known family, rewritten as current transformers and sentence-transformers store it."""

import warnings
from pathlib import Path

from ..data.tokenizer import check_vocabulary, load_tokenizer
from ..files import read_json, unused
from . import families, heads, hf_files
from .config import checked
from .sentences import SentenceEmbedder


def load_by_architecture(directory, *, allow_pickle=False):
    """The model of a directory, of the class that its files name: see `convert`. Raises ValueError."""
    directory = Path(directory)
    if not directory.is_dir():
        raise ValueError(f"{directory} is no directory")
    if (directory / "modules.json").exists():
        return SentenceEmbedder.from_pretrained(directory, allow_pickle=allow_pickle)
    path = directory / "config.json"
    config, architectures = hf_files.read_config(path), read_json(path).get("architectures")
    row = families.family(config.model_type)
    heads_of = {architecture: head for head, architecture in row.architectures.items()}
    if architectures:
        named = [heads_of[name] for name in checked("architectures", architectures, list) if name in [*heads_of]]
    else:
        # DeBERTa's published checkpoints have no architectures
        tensors = hf_files.from_hf_names(hf_files.stored_tensors(directory, allow_pickle), config)
        named = ["MaskedLM" if row.names["vocabulary_bias"] in tensors else "SentenceEmbedder"]
    if not named:
        raise ValueError(
            f"{path} names no known architecture: has {architectures}, expected one of {', '.join(heads_of)}"
        )
    head = named[0]
    cls = SentenceEmbedder if head == "SentenceEmbedder" else getattr(heads, head)
    return cls.from_pretrained(directory, allow_pickle=allow_pickle)


def convert(source, destination, *, allow_pickle=False, revision=None):
    """Rewrite a model's directory: one model.safetensors under current names, with its tokenizer.

    source: a directory, or OWNER/NAME on the HuggingFace hub, at `revision` (a branch, tag or commit). Reads one file
    or shards, old names, a bare encoder or any head; pytorch_model.bin with `allow_pickle`. Returns the model. Raises
    ValueError when the source cannot be read or the destination already has a model.
    """
    destination = Path(destination)
    if (destination / "config.json").exists():
        raise ValueError(f"{destination} already has a model: choose another directory")
    source = hf_files.local(source, revision)
    with warnings.catch_warnings():
        # a fresh head would be another model
        warnings.filterwarnings("error", message=".*start fresh", category=UserWarning)
        try:
            model = load_by_architecture(source, allow_pickle=allow_pickle)
        except UserWarning as warning:
            raise ValueError(str(warning)) from None
    if (Path(source) / "tokenizer.json").exists():
        check_vocabulary(load_tokenizer(source), model.config)
    with unused(destination):
        destination.mkdir(parents=True, exist_ok=True)
        # config.json, which says that there is a model, is written last
        hf_files.copy_tokenizer(source, destination)
        model.save_pretrained(destination)
    return model
