"""SentenceEmbedder: texts to vectors, in the directories of sentence-transformers (Sentence-BERT, E5, BGE, GTE).

Letters: B texts, T packed tokens, D hidden size, E embedding size.
"""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import nn

from .. import ops
from ..data.tokenizer import check_vocabulary, load_tokenizer
from ..files import inside, read_json
from ..packing import Batch, pack_inputs
from . import families, hf_files
from .config import EncoderConfig
from .encoder import initialize
from .heads import Model
from .hf_files import write_json

if TYPE_CHECKING:
    # in the standard library from Python 3.11 on
    from typing_extensions import Self


MODES = ("mean", "cls", "max", "mean_sqrt_len_tokens", "weightedmean", "lasttoken")
# the activations that a Dense module may name, by their class in torch
_ACTIVATIONS = {"Identity": lambda x: x, "Tanh": torch.tanh, "ReLU": torch.relu, "GELU": F.gelu}


class SentenceEmbedder(Model):
    """A vector for each text: an encoder, pooling, optional linear layers, optional normalization.

    config: EncoderConfig. tokenizer: tokenizers.Tokenizer, for `encode`. pooling: one of MODES. normalize: divide by
    the L2 norm. prompts: {name: text put before a text}, as E5 and BGE use them; default_prompt_name: the one to use
    when none is requested. include_prompt: whether the prompt's tokens are pooled too. max_length: the number of tokens
    that are read of a text, specials included. dense: sizes and activations of the linear layers after pooling.
    """

    OPTIONAL = ("pooler",)

    def __init__(
        self, config: EncoderConfig, tokenizer: Tokenizer | None = None, *, pooling: str = "mean",
        normalize: bool = True, prompts: dict[str, str] | None = None, default_prompt_name: str | None = None,
        include_prompt: bool = True, max_length: int | None = None, dense: Iterable[tuple] = (),
    ) -> None:  # fmt: skip
        super().__init__(config)
        if pooling not in MODES:
            raise ValueError(f"pooling is {pooling!r}: expected one of {', '.join(MODES)}")
        if tokenizer is not None:
            check_vocabulary(tokenizer, config)
        self.tokenizer, self.pooling, self.normalize = tokenizer, pooling, normalize
        self.prompts, self.default_prompt_name = dict(prompts or {}), default_prompt_name
        if default_prompt_name is not None and default_prompt_name not in self.prompts:
            raise ValueError(f"default_prompt_name is {default_prompt_name!r}: expected one of {list(self.prompts)}")
        self.include_prompt = include_prompt
        self.max_length = min(config.max_length, 512 if max_length is None else max_length)
        self.dense = nn.ModuleList(nn.Linear(*sizes, bias=bias) for *sizes, bias, _ in dense)
        self.activations = [activation for *_, activation in dense]
        self.pooler = None
        if families.has_pooler(config):
            # not used, but HuggingFace's bare encoder has it
            self.pooler = nn.Linear(config.hidden_size, config.hidden_size)
        initialize(self, config)

    def forward(
        self, input_ids: torch.Tensor | Batch, attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None, position_ids: torch.Tensor | None = None, prompt_length: int = 0,
    ) -> torch.Tensor:  # fmt: skip
        """Vectors [B, E] of a packing.Batch, or of HuggingFace's padded arguments, each [B, S].

        prompt_length: the number of tokens at the start of each text that are not pooled, its first special included.
        """
        batch, _ = pack_inputs(self.config, input_ids, attention_mask, token_type_ids, position_ids)
        hidden, cu_seqlens = self._without_prompt(self.encoder(batch), batch, prompt_length)
        is_last = not self.dense
        x = ops.pooling(hidden, cu_seqlens, mode=self.pooling, normalize=self.normalize and is_last)
        for linear, activation in zip(self.dense, self.activations):
            x = _ACTIVATIONS[activation](ops.linear(x, linear.weight, linear.bias))
        return F.normalize(x, dim=-1) if self.normalize and not is_last else x

    @staticmethod
    def _without_prompt(hidden, batch, prompt_length):
        if not prompt_length:
            return hidden, batch.cu_seqlens
        starts = batch.cu_seqlens[:-1]
        lengths = (batch.cu_seqlens.diff() - prompt_length).clamp(min=0)
        rows = torch.cat([torch.arange(n) + s + prompt_length for s, n in zip(starts.tolist(), lengths.tolist())])
        cu_seqlens = F.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
        return hidden[rows.to(hidden.device)], cu_seqlens

    @torch.inference_mode()
    def encode(
        self, sentences: str | Iterable[str], *, prompt_name: str | None = None, prompt: str | None = None,
        batch_size: int = 32, show_progress_bar: bool = False, convert_to_tensor: bool = False,
        normalize_embeddings: bool = False,
    ) -> np.ndarray | torch.Tensor:  # fmt: skip
        """Vectors of one text (a str) or many: float32 NumPy [E] or [B, E], or a tensor on the model's device.

        prompt: text put before each; or prompt_name, one of `prompts`. Texts are cut to max_length tokens. Texts of
        similar length run together, batch_size at a time; the vectors are in the order of the texts. Leaves the model
        in evaluation mode. Raises ValueError for an unknown prompt, TypeError for what is not a str.
        """
        if self.tokenizer is None:
            raise ValueError(
                "this SentenceEmbedder has no tokenizer: pass one, or load a directory that has tokenizer.json"
            )
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}: expected at least 1")
        one = isinstance(sentences, str)
        texts = [sentences] if one else list(sentences)
        for i, text in enumerate(texts):
            if not isinstance(text, str):
                raise TypeError(f"text {i} is a {type(text).__name__}: expected str")
        prompt, skipped = self._prompt(prompt_name, prompt)
        encodings = self._tokenize([prompt + text for text in texts])
        # eval() takes longer than this check
        if any(module.training for module in self.modules()):
            self.eval()
        device = next(self.parameters()).device
        order = sorted(range(len(texts)), key=lambda i: -len(encodings[i].ids))
        groups = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
        vectors = [None] * len(texts)
        for group in _progress(groups, show_progress_bar):
            batch = _batch([encodings[i] for i in group]).to(device)
            embedded = self(batch, prompt_length=skipped)
            if normalize_embeddings and not self.normalize:
                embedded = F.normalize(embedded, dim=-1)
            for i, vector in zip(group, embedded.float().unbind()):
                vectors[i] = vector
        if not vectors:
            return torch.empty(0, device=device) if convert_to_tensor else np.empty(0, dtype=np.float32)
        result = vectors[0] if one else torch.stack(vectors)
        return result if convert_to_tensor else result.cpu().numpy()

    def _prompt(self, name, prompt):
        """(text, number of its tokens that are not pooled)."""
        if prompt is None:
            name = self.default_prompt_name if name is None else name
            if name is not None and name not in self.prompts:
                raise ValueError(f"prompt_name is {name!r}: expected one of {list(self.prompts)}")
            prompt = "" if name is None else self.prompts[name]
        if not prompt or self.include_prompt:
            return prompt, 0
        # without the special token at the end
        return prompt, len(self._tokenize([prompt])[0].ids) - 1

    def _tokenize(self, texts):
        self.tokenizer.no_padding()
        self.tokenizer.enable_truncation(self.max_length)
        return self.tokenizer.encode_batch(texts)

    @classmethod
    def from_pretrained(
        cls, directory: str | os.PathLike, *, allow_pickle: bool = False, dtype: torch.dtype = torch.float32,
        **options: object,
    ) -> "Self":  # fmt: skip
        """From a directory of sentence-transformers, or of a bare HuggingFace encoder (then mean pooling).

        options: arguments of the class that override those of the directory. Raises ValueError as other models do, and
        for an unknown module.
        """
        directory = Path(directory)
        found, folder = _read_modules(directory, allow_pickle)
        folder = directory / folder
        if any((folder / name).exists() for name in ("tokenizer.json", "vocab.txt")):
            found["tokenizer"] = load_tokenizer(folder)
        found |= _read_limits(folder)
        prompts = _read_json_if_there(directory / "config_sentence_transformers.json")
        found["prompts"] = prompts.get("prompts") or {}
        found["default_prompt_name"] = prompts.get("default_prompt_name")
        weights = found.pop("weights", [])
        return hf_files.load_model(
            lambda config: cls(config, **{**found, **options}), folder, allow_pickle=allow_pickle, dtype=dtype,
            head=cls.__name__, other={f"dense.{i}.{name}": x for i, w in enumerate(weights) for name, x in w.items()},
        )  # fmt: skip

    def save_pretrained(self, directory: str | os.PathLike) -> None:
        """Write what sentence-transformers loads: the encoder, its tokenizer, and a folder for each further module."""
        directory = Path(directory)
        hf_files.save_model(self, directory, elsewhere=("dense.",))
        kinds = ["Transformer", "Pooling", *["Dense"] * len(self.dense), *["Normalize"] * self.normalize]
        places = ["" if i == 0 else f"{i}_{kind}" for i, kind in enumerate(kinds)]
        modules = [
            dict(idx=i, name=str(i), path=place, type=f"sentence_transformers.models.{kind}")
            for i, (kind, place) in enumerate(zip(kinds, places))
        ]
        write_json(directory / "modules.json", modules)
        for kind, place in zip(kinds[1:], places[1:]):
            (directory / place).mkdir(exist_ok=True)
            if kind == "Pooling":
                pooling = {f"pooling_mode_{name}": mode == self.pooling for mode, name in _MODE_KEYS.items()}
                size = dict(word_embedding_dimension=self.config.hidden_size, include_prompt=self.include_prompt)
                write_json(directory / place / "config.json", size | pooling)
        for linear, activation, place in zip(self.dense, self.activations, places[2:]):
            sizes = dict(in_features=linear.in_features, out_features=linear.out_features, bias=linear.bias is not None)
            name = dict(activation_function=f"torch.nn.modules.activation.{activation}")
            if activation == "Identity":
                name = dict(activation_function="torch.nn.modules.linear.Identity")
            write_json(directory / place / "config.json", sizes | name)
            hf_files.save_tensors({f"linear.{name}": x for name, x in linear.state_dict().items()}, directory / place)
        limits = dict(max_seq_length=self.max_length, do_lower_case=False)
        write_json(directory / "sentence_bert_config.json", limits)
        prompts = dict(prompts=self.prompts, default_prompt_name=self.default_prompt_name, similarity_fn_name="cosine")
        write_json(directory / "config_sentence_transformers.json", prompts)
        if self.tokenizer is not None:
            self.tokenizer.save(str(directory / "tokenizer.json"))
            special = hf_files.special_tokens(self.tokenizer, self.config)
            limits = dict(tokenizer_class="PreTrainedTokenizerFast", model_max_length=self.max_length)
            write_json(directory / "tokenizer_config.json", special | limits)


# our mode -> its key in a pooling module's config.json, before sentence-transformers 6 one for each mode
_MODE_KEYS = {
    "cls": "cls_token", "max": "max_tokens", "mean": "mean_tokens", "mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "weightedmean": "weightedmean_tokens", "lasttoken": "lasttoken",
}  # fmt: skip


def _read_json_if_there(path):
    return read_json(path) if path.exists() else {}


def _read_modules(directory, allow_pickle):
    """(arguments of SentenceEmbedder, the encoder's folder) from modules.json."""
    found, folder = dict(pooling="mean", normalize=False, dense=[], weights=[]), ""
    if not (directory / "modules.json").exists():
        return found, folder
    for module in hf_files.read_list(directory / "modules.json"):
        kind, place = module["type"].rsplit(".", 1)[-1], inside(directory, module["path"])
        if kind == "Transformer":
            folder = module["path"]
        elif kind == "Pooling":
            values = read_json(place / "config.json")
            modes = [mode for mode, key in _MODE_KEYS.items() if values.get(f"pooling_mode_{key}")]
            named = values.get("pooling_mode")
            modes = modes if named is None else [named] if isinstance(named, str) else list(named)
            if len(modes) != 1 or modes[0] not in MODES:
                raise ValueError(f"{place / 'config.json'} asks for {modes or 'no pooling'}: expected one of {MODES}")
            found["pooling"] = modes[0]
            found["include_prompt"] = values.get("include_prompt", True)
        elif kind == "Dense":
            values = read_json(place / "config.json")
            activation = values.get("activation_function", "Tanh").rsplit(".", 1)[-1]
            if activation not in _ACTIVATIONS:
                raise ValueError(
                    f"{place / 'config.json'}: activation {activation!r}, expected one of {list(_ACTIVATIONS)}"
                )
            found["dense"].append((values["in_features"], values["out_features"], values.get("bias", True), activation))
            tensors = hf_files.stored_tensors(place, allow_pickle)
            found["weights"].append({name.removeprefix("linear."): read() for name, (*_, read) in tensors.items()})
        elif kind == "Normalize":
            found["normalize"] = True
        else:
            raise ValueError(f"{directory / 'modules.json'} has a module {module['type']}: it is not known here")
    return found, folder


def _read_limits(folder):
    """max_length, by the first file that gives one."""
    for file, key in (("sentence_bert_config.json", "max_seq_length"), ("tokenizer_config.json", "model_max_length")):
        length = _read_json_if_there(folder / file).get(key)
        # transformers writes 1e30 for no limit
        if isinstance(length, int) and length < 1 << 20:
            return dict(max_length=length)
    return {}


def _batch(encodings):
    """A packing.Batch of tokenized texts."""
    lengths = [len(encoding.ids) for encoding in encodings]
    starts = np.cumsum([0, *lengths])
    joined = [np.concatenate([getattr(e, name) for e in encodings] or [[]]) for name in ("ids", "type_ids")]
    positions = np.arange(starts[-1]) - np.repeat(starts[:-1], lengths)
    return Batch(
        *(torch.from_numpy(x.astype(np.int64)) for x in (joined[0], positions, joined[1])),
        torch.from_numpy(starts.astype(np.int32)), max(lengths, default=0),
    )  # fmt: skip


def _progress(groups, show):
    if not show:
        return groups
    from rich.progress import track

    return track(groups, "Embedding")
