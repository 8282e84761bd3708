"""Names of models on the HuggingFace hub, such as google-bert/bert-base-uncased: their files, in the hub's own cache.

huggingface_hub does the work, so that the cache, the token, mirrors and the offline switch (HF_HUB_OFFLINE) are those
of every other program. Only the files that are needed are fetched: no pickle, no code.
"""

import os
import re
from pathlib import Path

from .files import inside, read_json

# files beside the weights that belong to a tokenizer
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.txt",
    "vocab.json", "merges.txt", "spm.model", "spiece.model", "sentencepiece.bpe.model",
)  # fmt: skip
_WHOLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
# as patterns; what a repository lacks is not missed here
_MODEL_FILES = (
    _WHOLE, _INDEX, "model-?????-of-?????.safetensors", "config.json", "task.json", "modules.json",
    "config_sentence_transformers.json", "sentence_*_config.json",
)  # fmt: skip
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,95}/[A-Za-z0-9_][A-Za-z0-9_.-]{0,95}")
EXAMPLE = "google-bert/bert-base-uncased"


def is_name(path):
    """Whether `path` is OWNER/NAME, and not a file or folder here. Anything else is a path."""
    return _NAME.fullmatch(str(path)) is not None and not Path(path).exists()


def is_adapter(path):
    """Whether a directory holds what peft trained, without the model that it was trained on."""
    return os.path.isfile(f"{path}/adapter_config.json") and not os.path.isfile(f"{path}/config.json")


def local(path, revision=None, *, weights=True, folders=()):
    """The directory of a model as a Path: `path` itself, or that in the cache for the name of one on the hub.

    revision: a branch, tag or commit; the main branch by default. weights: False fetches the tokenizer alone. folders:
    with further models of the repository, beside those that its modules.json names. A path is returned as it is, also
    where there is nothing. Raises ValueError, in one line, for a name that the hub does not know or does not give, for
    a repository without safetensors, and where a name is needed and `path` is none.
    """
    if not is_name(path):
        if revision is not None:
            raise ValueError(
                f"the revision {str(revision)!r} goes with the name of a model on the hub, such as {EXAMPLE}: "
                f"{path} is none"
            )
        if weights and is_adapter(path):
            raise ValueError(f"{path} holds an adapter alone: expected the directory of a whole model")
        return Path(path)
    name = Path(path).as_posix()
    directory = _fetched(name, revision, [*TOKENIZER_FILES, *(_MODEL_FILES if weights else ("config.json",))])
    if not weights:
        return directory
    if (directory / "modules.json").is_file():
        folders = [*folders, *_module_folders(directory)]
    if folders:
        patterns = [f"{folder}/{file}" for folder in folders for file in (*TOKENIZER_FILES, *_MODEL_FILES)]
        # the same commit, even if the branch has moved meanwhile
        directory = _fetched(name, directory.name, patterns)
    if not any((directory / place / file).exists() for place in ("", *folders) for file in (_WHOLE, _INDEX)):
        raise ValueError(
            f"{name} has no {_WHOLE}{_of(revision)}: of the hub's files only safetensors are read (where a repository "
            "lacks them, a pull request of it often has them: --revision refs/pr/1)"
        )
    return directory


def _module_folders(directory):
    """The folders that a modules.json of sentence-transformers names."""
    path = directory / "modules.json"
    places = [entry.get("path") for entry in read_json(path, list) if isinstance(entry, dict)]
    return [inside(directory, place).relative_to(directory).as_posix() for place in places if place]


def _fetched(name, revision, patterns):
    try:
        from huggingface_hub import snapshot_download, utils
    except ImportError:
        raise ValueError(
            f"{name}: no such directory, and names of the hub need huggingface_hub: "
            "install fastbert-kernels with the extra hf"
        ) from None
    log_in = "log in with `hf auth login`, or set HF_TOKEN"
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except utils.GatedRepoError:
        reason = f"it is gated: ask for access on its page, and {log_in}"
    except utils.RepositoryNotFoundError:
        reason = f"no such directory, and no such model on the hub; if it is private, {log_in}"
    except utils.RevisionNotFoundError:
        reason = f"it has no revision {revision!r} on the hub"
    except utils.LocalEntryNotFoundError as error:
        cause = error.__cause__
        off = cause is None or isinstance(cause, utils.OfflineModeIsEnabled)
        why = "is switched off (HF_HUB_OFFLINE)" if off else f"cannot be reached ({_line(cause)})"
        reason = f"no such directory, not{_of(revision)} in the hub's cache as a whole, and the hub {why}"
    # the client's own errors, and those of the libraries below it
    except Exception as error:
        reason = f"it cannot be fetched from the hub: {_line(error)}"
    raise ValueError(f"{name}: {reason}")


def _of(revision):
    return "" if revision is None else f" at the revision {revision!r}"


def _line(error):
    return (str(error).strip() or type(error).__name__).splitlines()[0]
