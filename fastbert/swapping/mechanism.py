"""Swap: make the modules of an existing model run our ops, in place and reversibly.

Only the class of a module changes: the new class derives from the old one and overrides `forward` (PyTorch's
`fully_shard` and `parametrize` work the same way). Parameters, buffers, names, hooks and references to the module stay
valid. No library is patched, and other models are not affected.

This file is the mechanism. `table.py` and `torch_nn.py` say what replaces what.
"""

import contextlib
import dataclasses
import functools
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.nn.utils import parametrize

from .. import ops
from . import low_precision, table, torch_nn
from .attention import Attention
from .stacks import BertEncoder
from .steps import Options, is_dry, plain
from .tokenwise import are_replaced, full_name, is_watched, library_methods, overrides, own_code

# full name of a class -> what takes its place
TABLE = {**torch_nn.TABLE, **table.TABLE}
STACKS = BertEncoder, torch_nn.TransformerEncoder


@dataclass
class Row:
    """One module: its name in the model ("" is the model itself), its class, what runs there now ("" if it was not
    swapped), and the reason why not ("" if it was)."""

    name: str
    module: str
    became: str = ""
    reason: str = ""


@dataclass
class SwapReport:
    """What `swap` has done. `print(report)` shows a table, with one line for layers that are alike."""

    rows: list[Row] = field(default_factory=list)

    @property
    def swapped(self) -> list[Row]:
        """The rows of the modules that run fastbert now."""
        return [row for row in self.rows if row.became]

    @property
    def stayed(self) -> list[Row]:
        """The rows of the modules of a known class that were not swapped, each with its reason."""
        return [row for row in self.rows if not row.became]

    def raise_if_incomplete(self) -> None:
        """RuntimeError that names the modules that were not swapped and why, or says that none was found."""
        if not self.rows:
            raise RuntimeError("fastbert.swap found nothing to swap: no module of this model is of a known class")
        if self.stayed:
            lines = [
                f"{name or 'the model'} ({module}): {reason}" for name, module, _, reason in self._lines(self.stayed)
            ]
            raise RuntimeError("fastbert.swap left some modules as they were: " + "; ".join(lines))

    @staticmethod
    def _lines(rows):
        """(names, class, became, reason), once for all layers that differ only in their number."""
        groups = {}
        for row in rows:
            pattern = re.sub(r"(?<=\.)\d+(?=\.|$)", "*", row.name)
            groups.setdefault((pattern, row.module, row.became, row.reason), []).append(row.name)
        for (_, module, became, reason), names in groups.items():
            yield _joined(names), module, became, reason

    def __str__(self) -> str:
        lines = [
            (name or "(the model)", module, became or f"unchanged: {reason}")
            for name, module, became, reason in self._lines(self.rows)
        ]
        head = ("module", "class", "runs")
        widths = [max(len(line[i]) for line in (head, *lines)) for i in range(2)]
        table = [f"{a:<{widths[0]}}  {b:<{widths[1]}}  {c}" for a, b, c in (head, *lines)]
        table.insert(1, "-" * max(map(len, table)))
        return "\n".join([*table, f"{len(self.swapped)} modules swapped, {len(self.stayed)} left as they were"])


def _joined(names):
    """`layer.0.x`, `layer.1.x`, `layer.2.x` as `layer.0-2.x`."""
    if len(names) == 1:
        return names[0]
    parts = [re.split(r"(?<=\.)(\d+)(?=\.|$)", name) for name in names]
    joined = list(parts[0])
    for i, column in enumerate(zip(*parts)):
        numbers = sorted({int(x) for x in column}) if i % 2 else []
        if len(numbers) > 1:
            whole = numbers == list(range(numbers[0], numbers[-1] + 1))
            joined[i] = f"{numbers[0]}-{numbers[-1]}" if whole else ",".join(map(str, numbers))
    return "".join(joined)


def swap(
    model: nn.Module, *, attention: bool = True, layer_norm: bool = True, gelu: bool = True, loss: bool = True,
    unpad: bool | str = "auto", logits: str = "evaluation", dtype: str = "fp32",
) -> SwapReport:  # fmt: skip
    """Make `model`, any nn.Module that contains modules of a known class, run fastbert's kernels, in place.

    attention, layer_norm, gelu, loss: the parts to swap. unpad: "auto" runs a stack of layers without padding unless
    hooks or output_hidden_states look inside it; True does so too where others may read padding rows, in torch's
    encoders beside a decoder, in torch's layers outside a stack and in question-answering models; False never does.
    logits: whether a masked-language model that is given labels also returns scores: in "evaluation" only, or "always".
    Without labels it always does. dtype: what stacks of layers multiply in on a CPU where no gradient is wanted;
    parameters and all else stay as they are. "fp32"; "bf16"; "int8" (8 bits for each row of the input and of the
    weight); or "auto": bf16 where this processor multiplies it faster, measured, else fp32. bf16 and int8 give fp32,
    with a warning, where they are not faster.

    Known: HuggingFace's BERT, RoBERTa, XLM-R, ALBERT, DistilBERT, ELECTRA, DeBERTa (v1, v2, v3), MPNet, ModernBERT,
    CamemBERT, ERNIE, data2vec-text, RoCBert, XLM-R-XL, RoBERTa-PreLayerNorm, Megatron-BERT, EuroBERT, ESM, GTE,
    nomic-embed and jina-embeddings-v3 with any head, also inside other models (sentence-transformers);
    nn.TransformerEncoder and its layers, nn.LayerNorm, nn.GELU, nn.CrossEntropyLoss. Returns a SwapReport. Swapping
    again applies the new switches. Raises ValueError for an unknown value of a switch, and when int8 loses too much: on
    8 sequences of 16 random ids, or of random states where there is no vocabulary, the mean hidden state of each must
    have a cosine of at least 0.99 to that in fp32; the model then has its original classes. TypeError if `model` is not
    an nn.Module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}: expected a torch.nn.Module")
    if unpad not in ("auto", True, False):
        raise ValueError(f"unpad is {unpad!r}: expected 'auto', True or False")
    if logits not in ("evaluation", "always"):
        raise ValueError(f"logits is {logits!r}: expected 'evaluation' or 'always'")
    wanted = dict(attention=attention, layer_norm=layer_norm, gelu=gelu, loss=loss)
    for name, value in wanted.items():
        if not isinstance(value, bool):
            raise ValueError(f"{name} is {value!r}: expected True or False")
    dtype = low_precision.chosen(model, dtype)
    options = Options(unpad=unpad, logits=logits, **wanted)
    unswap(model)
    rows, found, remote = [], {}, None
    read = set() if unpad is True else _encoders_of_decoders(model)
    shown = set() if unpad is True else _encoders_of_answers(model)
    for name, module in model.named_modules():
        known = next((cls for cls in type(module).__mro__ if full_name(cls) in TABLE), None)
        is_inside = remote is not None and name.startswith(remote)
        if known is None and not is_inside and type(module).__module__.partition(".")[0] == "transformers_modules":
            # one line for all that is inside
            remote = f"{name}." if name else ""
            reason = "its code came with the checkpoint: load transformers' own class, without trust_remote_code"
            rows.append(Row(name, type(module).__name__, reason=reason))
        if known is None or hasattr(type(module), "replaces"):
            continue
        row, replacement = Row(name, type(module).__name__), TABLE[full_name(known)]
        if overrides(type(module), known) or parametrize.is_parametrized(module):
            row.reason = f"a subclass of {known.__name__} with code of its own"
        elif not any(wanted[part] for part in replacement.RUNS):
            row.reason = f"switched off: {' and '.join(replacement.RUNS)}"
        elif "forward" in vars(module):
            row.reason = "its forward was replaced on the instance"
        elif id(module) in read and "attention" in replacement.RUNS:
            row.reason = "a decoder in this model may read its padding rows; pass unpad=True if it does not"
        else:
            row.reason = replacement.refuses(module) or ""
        if not row.reason:
            runs = "; ".join(what for part, what in replacement.RUNS.items() if wanted[part])
            row.became = runs if unpad else runs.replace("runs unpadded", "keeps its padding")
            module.__class__ = _class_of(replacement, type(module))
            module.fastbert_options = options
            if id(module) in shown and isinstance(module, BertEncoder):
                module.fastbert_options = dataclasses.replace(options, shows_padding=True)
                row.became = "runs on batches without padding: answers are scored against it, too, unless unpad=True"
            found[module] = row
        rows.append(row)
    _keep_stacks_with_own_code(found)
    if dtype != "fp32":
        stacks = [module for module in found if isinstance(module, STACKS)]
        try:
            low_precision.multiply_in(dtype, model, stacks)
        except ValueError:
            unswap(model)
            raise
        for module in stacks:
            found[module].became += f", products in {dtype}"
    return SwapReport(rows)


def _keep_stacks_with_own_code(found):
    """Give back the stacks that may not run unpadded, and attention without a stack around it. found: module -> Row."""
    inside = set()
    for module, row in found.items():
        if isinstance(module, STACKS):
            # a hook may go again: it is looked for in every call
            own, watched = own_code(module, hooks=False), own_code(module)
            if own is None and is_watched(module, hooks=False):
                own = ("it", "has its own methods or layers")
            if own is not None:
                row.reason = "keeps its padding: " + " ".join(own)
                continue
            inside.update(module.modules())
            if watched is not None:
                row.became = "keeps its padding while " + " ".join(watched)
    for module, row in found.items():
        if isinstance(module, Attention) and module not in inside:
            row.reason = "it needs a stack around it that runs fastbert"
        if row.reason:
            row.became = ""
            _give_back(module)


def _encoders_of_decoders(model):
    """The ids of torch's encoders and of the modules inside them, in a model with a decoder of torch's: nn.Transformer
    lets the decoder read padding rows too, unless it is given a memory_key_padding_mask."""
    modules = list(model.modules())
    if not any(isinstance(module, nn.TransformerDecoder) for module in modules):
        return set()
    return {id(inner) for module in modules if isinstance(module, nn.TransformerEncoder) for inner in module.modules()}


def _encoders_of_answers(model):
    """The ids of the modules in question-answering models: their loss, and their best score, are over padding, too."""
    names = {id(module): {cls.__name__ for cls in type(module).__mro__} for module in model.modules()}
    heads = [x for x in model.modules() if any(name.endswith("ForQuestionAnswering") for name in names[id(x)])]
    return {id(inner) for head in heads for inner in head.modules()}


def unswap(model: nn.Module) -> None:
    """Give every module of `model` its original class back. Does nothing where nothing was swapped."""
    for module in model.modules():
        _give_back(module)


def _give_back(module):
    original = vars(type(module)).get("replaces")
    if original is not None:
        module.__class__ = original
        vars(module).pop("fastbert_options", None)


@contextlib.contextmanager
def swapped(model: nn.Module, **switches: bool | str) -> Iterator[SwapReport]:
    """`with swapped(model) as report:` swaps as `swap` does, and restores the model at the end."""
    before = {id(module): (module, type(module), vars(module).get("fastbert_options")) for module in model.modules()}
    try:
        yield swap(model, **switches)
    finally:
        unswap(model)
        for module, cls, options in before.values():
            if "replaces" in vars(cls):
                module.__class__, module.fastbert_options = cls, options


@functools.cache
def _class_of(replacement, original):
    """`original` with the forward of `replacement`. It keeps its name, by which others look classes up."""
    methods = library_methods(original)

    is_stack = issubclass(replacement, STACKS)
    is_inside = replacement.TOKENWISE or replacement.TAKES_LAYOUT

    # keeps the signature: HuggingFace's Trainer reads from it what to pass
    @functools.wraps(original.forward)
    def forward(self, *args, **kwargs):
        if is_inside and not torch.compiler.is_compiling() and plain.is_on:
            return original.forward(self, *args, **kwargs)
        # a method of the class was replaced since, or the module was given back and someone has kept this method
        if are_replaced(methods) or not isinstance(self, replacement):
            return original.forward(self, *args, **kwargs)
        if replacement.yields(args, kwargs) or _is_dry_run(args, kwargs) or ops.is_transformed():
            return replacement.call_original(self, *args, **kwargs)
        # in training activation checkpointing may turn gradients off in the first of two passes
        is_low = is_stack and self.fastbert_options.dtype != "fp32" and not self.training
        if is_low and not torch.compiler.is_compiling():
            with ops.low_precision.products(self.fastbert_options.dtype, _first_tensor(args, kwargs)):
                return replacement.forward(self, *args, **kwargs)
        return replacement.forward(self, *args, **kwargs)

    return type(
        original.__name__,
        (replacement, original),
        {
            "__module__": original.__module__,
            "__qualname__": original.__qualname__,
            "__doc__": original.__doc__,
            "__reduce_ex__": _reduce,
            "__prepare_scriptable__": _original,
            "forward": forward,
            "replaces": original,
            "replacement": replacement,
        },
    )


def _is_dry_run(args, kwargs):
    """Whether a forward is for shapes only: meta and fake tensors have no lengths to pack by."""
    x = _first_tensor(args, kwargs)
    return x is not None and is_dry(x)


def _first_tensor(args, kwargs):
    return next((x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor)), None)


def _reduce(self, protocol):
    # the class is made at run time: a pickle names the two classes that it is made from
    cls = type(self)
    state = self.__getstate__() if hasattr(self, "__getstate__") else vars(self)
    return _new, (vars(cls)["replacement"], vars(cls)["replaces"]), state


def _original(self):
    """The module with its original class, and so all modules inside it, around the same parameters. torch.jit.script
    calls this: it reads the source of a forward."""
    module = object.__new__(vars(type(self)).get("replaces", type(self)))
    inside = {name: inner if inner is None else _original(inner) for name, inner in self._modules.items()}
    vars(module).update(vars(self), _modules=inside)
    vars(module).pop("fastbert_options", None)
    return module


def _new(replacement, original):
    cls = _class_of(replacement, original)
    return cls.__new__(cls)
