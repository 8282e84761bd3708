"""What a pretraining run needs before it begins: config, text, tokenizer, shards, batches, model.

Each function raises a one-line error if something is missing or wrong.
"""

import hashlib
import json
import warnings
from functools import partial
from pathlib import Path

import torch

from ..data.batches import MaskedBatches
from ..data.sequences import PAIRS, held_out_split
from ..data.shards import Shards, prepare
from ..data.text import check_columns, expand
from ..data.tokenizer import load_tokenizer, special_ids, tokenizer_hash, vocabulary_size
from ..model import families, hf_files, presets
from ..model.heads import MaskedLM, Pretraining
from ..model.replaced_tokens import GENERATOR, ReplacedTokenPretraining

# held-out text is masked with a seed of its own, the same for all runs
EVAL_SEED = 20181011


def config_of(config):
    """EncoderConfig of --model with --dropout. A preset gets the tokenizer's vocabulary size later."""
    path = Path(config.model)
    if config.model in presets.PRESETS or not (path.exists() or path.suffix == ".json"):
        found = presets.preset(config.model)
    else:
        found = hf_files.read_config(path / "config.json" if path.is_dir() else path)
    if config.max_seq_length > found.max_length:
        raise ValueError(
            f"--max-seq-length is {config.max_seq_length}: the model {config.model} has {found.max_length} positions"
        )
    row, objective = families.family(found.model_type), f"--objective {config.objective}"
    if config.objective in PAIRS and found.type_vocab_size < 2:
        raise ValueError(f"{objective} needs two token types: {config.model} has 1")
    if config.objective in PAIRS and "Pretraining" not in row.architectures:
        raise ValueError(f"{objective}: {found.model_type} models have no head for sentence pairs")
    if config.objective == "rtd" and row.generator is None:
        raise ValueError(
            f"{objective}: {found.model_type} models have no head for replaced tokens, {families.detecting()} have"
        )
    if config.objective == "rtd" and path.is_dir() and not (path / GENERATOR / "config.json").is_file():
        raise ValueError(f"{objective}: {path} has no generator, expected one in {path / GENERATOR}")
    return _with_dropout(found, config)


def _with_dropout(found, config):
    if config.dropout is None:
        return found
    return found.replace(hidden_dropout_prob=config.dropout, attention_probs_dropout_prob=config.dropout)


def source_of(paths, config, directory, rank):
    """The source that --train-file or --eval-file names: Shards of a prepared directory, text files, or None.

    A run that is resumed goes on with its own shards, in `directory`, when the text is gone.
    """
    if not paths:
        return None
    verify = config.verify and rank == 0
    prepared = [path for path in paths if (Path(path) / "manifest.json").is_file()]
    if len(prepared) == 1 and len(paths) == 1:
        return Shards.open(paths[0], verify=verify, progress=True)
    if prepared:
        raise ValueError(f"{prepared[0]} is a prepared directory: it cannot be combined with other files")
    try:
        files = expand(paths)
        check_columns(files, config.text_column)
        return files
    except (ValueError, OSError) as error:
        if not (config.resume and (directory / "manifest.json").is_file()):
            raise
        warnings.warn(f"{error}: resuming with the shards in {directory}", stacklevel=2)
        return Shards.open(directory, verify=verify, progress=True)


def known_tokenizer(config, source, resumed):
    """The tokenizer that the options name; None when one must be trained."""
    directory = config.tokenizer
    if not directory and (resumed or (Path(config.model) / "tokenizer.json").is_file()):
        directory = resumed or config.model
    if not isinstance(source, Shards):
        return load_tokenizer(directory, as_saved=directory == resumed) if directory else None
    if config.tokenizer and tokenizer_hash(load_tokenizer(config.tokenizer)) != tokenizer_hash(source.tokenizer):
        raise ValueError(f"--tokenizer {config.tokenizer} is not the one that {config.train_file[0]} was prepared with")
    return source.tokenizer


def check_vocabulary(config, model_config, tokenizer):
    """Raises ValueError when the tokenizer does not fit the model. A preset takes the tokenizer's size."""
    if config.model in presets.PRESETS:
        return
    size = config.vocab_size if tokenizer is None else vocabulary_size(tokenizer)
    if size > model_config.vocab_size:
        raise ValueError(
            f"the tokenizer has {size} pieces: {config.model} has a vocab_size of {model_config.vocab_size}"
        )
    pad = model_config.pad_token_id if tokenizer is None else special_ids(tokenizer).pad
    if pad != model_config.pad_token_id:
        raise ValueError(
            f"the tokenizer's [PAD] is {pad}: {config.model} has a pad_token_id of {model_config.pad_token_id}"
        )


def shards_of(source, tokenizer, directory, config, rank):
    """Shards of a source that `source_of` found; text is prepared into `directory`."""
    if not isinstance(source, list):
        return source
    if rank == 0:
        prepare(
            source, tokenizer, directory,
            text_column=config.text_column, layout=config.layout, num_workers=config.num_workers,
            verify=config.verify,
        )  # fmt: skip
    return Shards.open(directory)


def loaders(config, train, evaluation, rank, world_size):
    """(MaskedBatches to train on, MaskedBatches to evaluate on or None)."""
    ids = held_out_ids = None
    if evaluation is None and config.eval_share:
        evaluation = train
        try:
            ids, held_out_ids = held_out_split(
                train, config.eval_share, config.seed, max_seq_length=config.max_seq_length, objective=config.objective
            )
        except ValueError as error:
            raise ValueError(f"{error} (use --eval-share 0 for no evaluation, or --eval-file)") from None
    # capacity: constant shapes, because matrix libraries set up, and cache, something for each new shape
    batches = partial(
        MaskedBatches, max_seq_length=config.max_seq_length, tokens_per_batch=config.tokens_per_batch,
        mlm_probability=config.mlm_probability, whole_word_mask=config.whole_word_mask, objective=config.objective,
        capacity=True,
    )  # fmt: skip
    loader = batches(train, seed=config.seed, rank=rank, world_size=world_size, sequence_ids=ids)
    return loader, evaluation and batches(evaluation, seed=EVAL_SEED, sequence_ids=held_out_ids)


def fingerprint_of(*shards):
    """sha256 of the contents of the training and the evaluation text."""
    files = [[record["sha256"] for record in one.manifest["shards"]] for one in shards if one is not None]
    return hashlib.sha256(json.dumps(files).encode()).hexdigest()


def model_of(config, model_config):
    torch.manual_seed(config.seed)
    directory = Path(config.model)
    if config.objective == "rtd":
        # a directory has been looked at by `config_of`; else the family's default
        generator = None
        if directory.is_dir():
            generator = _with_dropout(hf_files.read_config(directory / GENERATOR / "config.json"), config)
        model = ReplacedTokenPretraining(
            model_config, generator, embedding_sharing=config.embedding_sharing, rtd_weight=config.rtd_weight
        )
    else:
        model = (Pretraining if config.objective in PAIRS else MaskedLM)(model_config)
    if directory.is_dir():
        model.load_state_dict(model.stored(directory))
    return model
