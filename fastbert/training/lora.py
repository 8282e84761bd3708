"""LoRA (Hu et al. 2021) with peft: small matrices beside the encoder's are trained in their place, and the whole head.

The model is transformers' own, swapped. Around it is one of our heads, whose losses and counts the loop knows. What it
stores is the adapter alone: adapter_config.json and adapter_model.safetensors, as peft writes and reads them.
"""

import contextlib
import copy
import hashlib
import importlib.util
import inspect
import json
import math
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from .. import hub
from ..files import sha256
from ..model import families, hf_files
from ..packing import unpack
from ..swapping import lora as plain

# the folder of the adapter in the directory of a finished run, and its weights
ADAPTER, WEIGHTS = "adapter", "adapter_model.safetensors"
# what peft calls our tasks; it has no name for choices
_TASKS = {"SequenceClassifier": "SEQ_CLS", "TokenClassifier": "TOKEN_CLS", "QuestionAnswerer": "QUESTION_ANS"}
_EXPECTED = "expected r=8, and if need be alpha=16, dropout=0.1 and target=query+value, with commas between"


@dataclass(frozen=True)
class Lora:
    """The settings of --lora. r: the rank. alpha / r: the factor on the adapter. targets: names of linear layers."""

    r: int
    alpha: float
    dropout: float
    targets: tuple[str, ...]


def parsed(text):
    """The Lora of the text of --lora. Raises ValueError with the part that is wrong."""
    found = {}
    for part in text.split(","):
        name, _, value = (side.strip() for side in part.partition("="))
        if name not in ("r", "alpha", "dropout", "target") or not value or name in found:
            raise ValueError(f"--lora has {part.strip()!r}: {_EXPECTED}")
        found[name] = value
    if "r" not in found:
        raise ValueError(f"--lora is {text!r}: {_EXPECTED}")
    rank = _number("r", found["r"], lambda x: x >= 1 and x == int(x), "a whole number from 1 on")
    return Lora(
        int(rank),
        _number("alpha", found.get("alpha", 2 * rank), lambda x: x > 0, "a number above 0"),
        _number("dropout", found.get("dropout", 0.0), lambda x: 0 <= x < 1, "0 or more, below 1"),
        tuple(dict.fromkeys(filter(None, found.get("target", "").split("+")))),
    )


def _number(name, value, fits, expected):
    with contextlib.suppress(ValueError):
        number = float(value)
        if math.isfinite(number) and fits(number):
            return number
    raise ValueError(f"--lora has {name}={value}: expected {expected}")


def check_libraries():
    """Raises ValueError when a library that LoRA needs is not installed."""
    if not all(map(importlib.util.find_spec, ("peft", "transformers"))):
        raise ValueError("--lora needs peft and transformers: install fastbert-kernels with the extra lora")


def check_targets(settings, config):
    """Raises ValueError when the encoder of an EncoderConfig has no linear layer of a target's name."""
    if families.family(config.model_type).converts:
        raise ValueError(f"--lora does not know the modules of a {config.model_type}: train without it")
    if settings.targets:
        there = plain.linear_layers(plain.encoder_on_meta(hf_files.config_to_hf(config)), ["pooler"])
        if unknown := [name for name in settings.targets if name not in there]:
            raise ValueError(
                f"--lora has target={unknown[0]}: the linear layers of a {config.model_type} are {', '.join(there)}"
            )


def weights_hash(directory):
    """sha256 of the weights in a directory: an adapter goes with these alone."""
    found = [sha256(path) for path in sorted(Path(directory).glob("model*.safetensors"))]
    return hashlib.sha256(json.dumps(found).encode()).hexdigest()


def with_adapter(model, settings, base, revision=None):
    """A model that trains an adapter and a new head, and starts from the weights of `model`, one of our task heads.

    settings: a Lora of `check_targets`. base, revision: where peft finds the model that the adapter belongs to.
    """
    import peft

    check_libraries()
    kind, config = type(model), model.config
    row, names = families.family(config.model_type), _their_names(model)
    # a module of the model itself, or one beside the encoder in their bare model
    prefix = row.prefix
    head = {name for ours, name in names.items() if not ours.startswith("encoder.")}
    head = sorted({".".join(name.split(".")[: 2 if prefix and name.startswith(prefix) else 1]) for name in head})
    values = hf_files.config_to_hf(config)
    theirs = plain.plain_model(
        values, row.architectures[kind.__name__],
        {names[ours]: tensor for ours, tensor in model.state_dict().items()},
    )  # fmt: skip
    usual = {name.rpartition(".")[2] for name in _projections(model)} & {*plain.linear_layers(theirs, head)}
    targets = settings.targets or sorted(usual)
    theirs.name_or_path = base if hub.is_name(base) else str(Path(base).absolute())
    settings = peft.LoraConfig(
        task_type=_TASKS.get(kind.__name__), r=settings.r, lora_alpha=settings.alpha, lora_dropout=settings.dropout,
        target_modules=[*targets], modules_to_save=head, revision=revision,
    )  # fmt: skip
    with warnings.catch_warnings():
        # peft uses what transformers has renamed
        warnings.simplefilter("ignore", FutureWarning)
        theirs = peft.get_peft_model(theirs, settings)
    return type(f"Adapted{kind.__name__}", (_Adapted, kind), {"KIND": kind})(config, plain.swapped_in_place(theirs))


def _their_names(model):
    return hf_files.hf_names(model.state_dict(), model.config, type(model).__name__)


def _projections(model):
    """transformers' names of the projections to queries and values, or of the one to both."""
    parts = tuple(f"attention.{name}.weight" for name in ("query", "value", "in_proj", "qkv"))
    return [theirs.removesuffix(".weight") for ours, theirs in _their_names(model).items() if ours.endswith(parts)]


class _Adapted:
    """One of our heads with transformers' model in place of the encoder: its logits, our losses and counts."""

    def __init__(self, config, theirs):
        nn.Module.__init__(self)
        self.config, self.theirs = config, theirs
        self.has_types = "token_type_ids" in inspect.signature(theirs.get_base_model().forward).parameters

    def _scores(self, batch, *_):
        B, S, device = len(batch.cu_seqlens) - 1, batch.max_seqlen, batch.input_ids.device
        starts = torch.arange(B, device=device) * S
        rows = starts.repeat_interleave(batch.cu_seqlens.diff().long()) + batch.position_ids
        pad = self.config.pad_token_id
        inputs = {
            "input_ids": unpack(batch.input_ids - pad, rows, B, S) + pad,
            "attention_mask": unpack(torch.ones_like(batch.input_ids), rows, B, S),
        }
        if self.has_types and self.config.type_vocab_size:
            inputs["token_type_ids"] = unpack(batch.token_type_ids, rows, B, S)
        if self.KIND.__name__ == "MultipleChoice":
            # each choice alone: its logit does not depend on the others
            inputs = {name: value[:, None] for name, value in inputs.items()}
        with _drawn_from(batch.seed if self.training else None, device):
            output = self.theirs.get_base_model()(**inputs)
        if "start_logits" in output:
            logits = torch.stack((output.start_logits, output.end_logits), -1)
        else:
            logits = output.logits
        return logits.flatten(0, 1)[rows] if logits.dim() == 3 else logits

    def state_dict(self, *args, **kwargs):
        """The adapter's tensors, by peft's names."""
        import peft

        return peft.get_peft_model_state_dict(self.theirs, save_embedding_layers=False)

    def load_state_dict(self, tensors, *args, **kwargs):
        import peft

        peft.set_peft_model_state_dict(self.theirs, tensors)

    def stored(self, directory):
        directory = Path(directory) / ADAPTER if (Path(directory) / ADAPTER).is_dir() else Path(directory)
        try:
            return load_file(directory / WEIGHTS)
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{directory / WEIGHTS} cannot be read: {error}") from None

    def save_pretrained(self, directory):
        """Write the adapter for peft, and config.json of the model that it belongs to."""
        directory = Path(directory)
        self.theirs.save_pretrained(directory, save_embedding_layers=False)
        architectures = families.family(self.config.model_type).architectures
        hf_files.write_json(
            directory / "config.json",
            {"architectures": [architectures[self.KIND.__name__]], **hf_files.config_to_hf(self.config)},
        )
        # safetensors' own mode is 0600
        (directory / WEIGHTS).chmod((directory / "config.json").stat().st_mode)

    def merged(self):
        """Our own model with the adapter's matrices added to the encoder's."""
        tensors = copy.deepcopy(self.theirs).merge_and_unload().state_dict()
        model = self.KIND(self.config)
        model.load_state_dict({ours: tensors[theirs] for ours, theirs in _their_names(model).items()})
        return model.to(next(self.parameters()).device).eval()


@dataclass
class Published:
    """What the directory of a finished run holds: the merged model, and the adapter in a folder."""

    merged: nn.Module
    adapted: nn.Module

    def save_pretrained(self, directory):
        self.merged.save_pretrained(directory)
        adapter = Path(directory) / ADAPTER
        self.adapted.save_pretrained(adapter)
        # where there is one, transformers looks for a model and not for an adapter
        (adapter / "config.json").unlink()


@contextlib.contextmanager
def _drawn_from(seed, device):
    """Draw all dropout from `seed`, int64 [1]; None: as it comes. torch's generator is afterwards as it was."""
    if seed is None:
        yield
        return
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(int(seed))
        yield
