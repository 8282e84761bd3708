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
from ..data.tokenizer import check_vocabulary
from ..packing import Batch, pack_inputs
from . import families, hf_files, sentence_files
from .config import EncoderConfig, checked
from .encoder import initialize
from .heads import Model
from .sentence_files import ACTIVATIONS, MODES, NORMALIZE, SIMILARITIES

if TYPE_CHECKING:
    # in the standard library from Python 3.11 on
    from typing_extensions import Self


_FUNCTIONS = {"Identity": lambda x: x, "Tanh": torch.tanh, "ReLU": torch.relu, "GELU": F.gelu}


class Dense(nn.Module):
    """activation(linear(x)), and with use_residual + x, which goes through a linear layer where the sizes differ.

    activation: one of sentence_files.ACTIVATIONS. Raises ValueError for another.
    """

    KIND = "Dense"

    def __init__(
        self, in_features: int, out_features: int, bias: bool = True, activation: str = "Tanh",
        use_residual: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation is {activation!r}: expected one of {', '.join(ACTIVATIONS)}")
        self.linear = nn.Linear(in_features, out_features, bias=bias)
        self.activation, self.use_residual = activation, use_residual
        if use_residual and in_features != out_features:
            self.residual = nn.Linear(in_features, out_features, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = _FUNCTIONS[self.activation](ops.linear(x, self.linear.weight, self.linear.bias))
        if not self.use_residual:
            return y
        return y + (ops.linear(x, self.residual.weight) if hasattr(self, "residual") else x)

    def settings(self) -> dict:
        """As the config.json of a Dense module has them."""
        place = "linear" if self.activation == "Identity" else "activation"
        settings = dict(
            in_features=self.linear.in_features, out_features=self.linear.out_features,
            bias=self.linear.bias is not None,
            activation_function=f"torch.nn.modules.{place}.{self.activation}",
        )  # fmt: skip
        # older versions do not know the key
        return settings | (dict(use_residual=True) if self.use_residual else {})


class Normalize(nn.Module):
    """x divided by its L2 norm."""

    KIND = NORMALIZE

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.normalize(x, dim=-1)


def _layers(layers, width):
    """(the modules of `dense` or `token_dense`, the width of what they return)."""
    made = nn.ModuleList(Normalize() if layer == NORMALIZE else Dense(*layer) for layer in layers)
    for layer in made:
        if isinstance(layer, Dense):
            if layer.linear.in_features != width:
                raise ValueError(f"a Dense layer has {layer.linear.in_features} in_features: expected {width}")
            width = layer.linear.out_features
    return made, width


class SentenceEmbedder(Model):
    """A vector for each text: an encoder, pooling, optional linear layers, optional normalization.

    config: EncoderConfig. tokenizer: tokenizers.Tokenizer, for `encode`. pooling: one of MODES. normalize: divide by
    the L2 norm. prompts: {name: text put before a text}, as E5 and BGE use them; default_prompt_name: the one to use
    when none is requested. include_prompt: whether the prompt's tokens are pooled too. max_length: the number of tokens
    that are read of a text, specials included; truncation_side: where a longer one loses tokens. dense: the layers
    between pooling and that normalization: arguments of Dense, or "Normalize"; token_dense: the same before pooling.
    truncate_dim: the number of columns that `encode` returns. similarity_fn_name: the similarity that the vectors are
    made for, one of sentence_files.SIMILARITIES; it is only kept.
    """

    OPTIONAL = ("pooler",)

    def __init__(
        self, config: EncoderConfig, tokenizer: Tokenizer | None = None, *, pooling: str = "mean",
        normalize: bool = True, prompts: dict[str, str] | None = None, default_prompt_name: str | None = None,
        include_prompt: bool = True, max_length: int | None = None, truncation_side: str = "right",
        dense: Iterable[tuple | str] = (), token_dense: Iterable[tuple | str] = (), truncate_dim: int | None = None,
        similarity_fn_name: str = "cosine",
    ) -> None:  # fmt: skip
        super().__init__(config)
        for name, value, choices in (
            ("pooling", pooling, MODES), ("truncation_side", truncation_side, ("right", "left")),
            ("similarity_fn_name", similarity_fn_name, SIMILARITIES),
        ):  # fmt: skip
            if value not in choices:
                raise ValueError(f"{name} is {value!r}: expected one of {', '.join(choices)}")
        if tokenizer is not None:
            check_vocabulary(tokenizer, config)
        self.tokenizer, self.pooling, self.normalize = tokenizer, pooling, normalize
        self.prompts = {name: checked(f"prompt {name!r}", text or "", str) for name, text in (prompts or {}).items()}
        self.default_prompt_name = default_prompt_name
        if default_prompt_name is not None and str(default_prompt_name) not in self.prompts:
            raise ValueError(f"default_prompt_name is {default_prompt_name!r}: expected one of {list(self.prompts)}")
        self.include_prompt = include_prompt
        self.max_length = min(config.max_length, 512 if max_length is None else max_length)
        self.truncation_side, self.similarity_fn_name = truncation_side, similarity_fn_name
        self.token_dense, width = _layers(token_dense, config.hidden_size)
        self.dense, width = _layers(dense, width)
        self.truncate_dim = None if truncate_dim is None else checked("truncate_dim", truncate_dim, int, (1, width))
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
        hidden = self.encoder(batch)
        for layer in self.token_dense:
            hidden = layer(hidden)
        x = self._pooled(*self._without_prompt(hidden, batch, prompt_length), prompt_length)
        for layer in self.dense:
            x = layer(x)
        return F.normalize(x, dim=-1) if self.normalize and self.dense else x

    def _pooled(self, hidden, cu_seqlens, prompt_length):
        """Vectors [B, D], normalized if nothing follows."""
        normalize = self.normalize and not self.dense
        if self.pooling != "weightedmean" or not prompt_length:
            return ops.pooling(hidden, cu_seqlens, mode=self.pooling, normalize=normalize)
        # the weight of a token is its place in the whole text, prompt_length more than in what is pooled
        n = cu_seqlens.diff()[:, None].to(hidden.dtype)
        weighted, mean = (ops.pooling(hidden, cu_seqlens, mode=mode) for mode in ("weightedmean", "mean"))
        weight, more = n * (n + 1) / 2, prompt_length * n
        x = (weight * weighted + more * mean) / (weight + more).clamp(min=1)
        return F.normalize(x, dim=-1) if normalize else x

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
        batch_size: int = 32, tokens_per_batch: int | None = None, show_progress_bar: bool = False,
        convert_to_tensor: bool = False, normalize_embeddings: bool = False,
    ) -> np.ndarray | torch.Tensor:  # fmt: skip
        """Vectors of one text (a str) or many: float32 NumPy [E] or [B, E], or a tensor on the model's device.

        prompt: text put before each; or prompt_name, one of `prompts`. Texts are cut to max_length tokens. Texts of
        similar length run together, batch_size at a time, or with tokens_per_batch as many as have so many tokens; the
        vectors are in the order of the texts. Leaves the model in evaluation mode. Raises ValueError for an unknown
        prompt, TypeError for what is not a str.
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
        if tokens_per_batch is None:
            groups = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
        else:
            groups = _groups(order, [len(encoding.ids) for encoding in encodings], tokens_per_batch)
        vectors = [None] * len(texts)
        for group in _progress(groups, show_progress_bar):
            batch = _batch([encodings[i] for i in group]).to(device)
            embedded = self(batch, prompt_length=skipped)[:, : self.truncate_dim]
            if normalize_embeddings and not (self.normalize and self.truncate_dim is None):
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
        [encoding] = self._tokenize([prompt])
        return prompt, len(encoding.ids) - sum(encoding.special_tokens_mask[-1:])

    def _tokenize(self, texts):
        self.tokenizer.no_padding()
        self.tokenizer.enable_truncation(self.max_length, direction=self.truncation_side)
        return self.tokenizer.encode_batch(texts)

    @classmethod
    def from_pretrained(
        cls, directory: str | os.PathLike, *, allow_pickle: bool = False, dtype: torch.dtype | str = torch.float32,
        revision: str | None = None, **options: object,
    ) -> "Self":  # fmt: skip
        """From a directory of sentence-transformers, or of a bare HuggingFace encoder (then mean pooling).

        directory: or OWNER/NAME on the HuggingFace hub, at `revision` (a branch, tag or commit). dtype: see
        `Model.from_pretrained`. options: arguments of the class that override those of the directory. Raises ValueError
        as other models do, and for a module or a setting of sentence-transformers that is not known here.
        """
        directory = hf_files.local(directory, revision)
        found, folder, config_changes, weights = sentence_files.read_directory(directory, allow_pickle)
        return hf_files.load_model(
            lambda config: cls(config, **{**found, **options}), folder, allow_pickle=allow_pickle, dtype=dtype,
            head=cls.__name__, other=weights, config_changes=config_changes,
        )  # fmt: skip

    def save_pretrained(self, directory: str | os.PathLike) -> None:
        """Write what sentence-transformers loads: the encoder, its tokenizer, and a folder for each further module."""
        sentence_files.write_directory(self, Path(directory))
        hf_files.save_model(self, directory, elsewhere=("dense.", "token_dense."))


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


def _groups(order, lengths, capacity):
    """Neighbours in `order` of at most `capacity` tokens in all, or one text alone that is longer."""
    groups, total = [], capacity
    for i in order:
        total += lengths[i]
        if total > capacity:
            groups.append([])
            total = lengths[i]
        groups[-1].append(i)
    return groups


def _progress(groups, show):
    if not show:
        return groups
    from rich.progress import track

    return track(groups, "Embedding")
