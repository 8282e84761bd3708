"""fastbert: fused Triton kernels for BERT-family encoders, and everything needed to train and serve them."""

import importlib
import importlib.util
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import TYPE_CHECKING

from .transformers_hook import register_with_transformers

__version__ = "0.1.0"

# The wheel ships the kernels inside this package. In a checkout they sit beside it, in kernels/, which must not be
# importable under that name: map that one folder to fastbert.kernels.
_package = Path(__file__).resolve().parent
if not (_package / "kernels").is_dir():
    _spec = ModuleSpec("fastbert.kernels", None, is_package=True)
    _spec.submodule_search_locations = [str(_package.parent / "kernels")]
    kernels = sys.modules[_spec.name] = importlib.util.module_from_spec(_spec)

# the public names and their modules: loaded when first asked for, so that importing fastbert costs nothing
_MODULES = {
    "Batch": "packing",
    "EncoderConfig": "config",
    "Encoder": "encoder",
    "MaskedLM": "heads",
    "MultipleChoice": "heads",
    "PretrainConfig": "training.pretrain",
    "Pretraining": "heads",
    "QuestionAnswerer": "heads",
    "ReplacedTokenDetector": "heads",
    "ReplacedTokenPretraining": "heads",
    "SentenceEmbedder": "sentences",
    "SequenceClassifier": "heads",
    "SwapReport": "swapping",
    "TokenClassifier": "heads",
    "pack": "packing",
    "preset": "variants",
    "swap": "swapping",
    "swapped": "swapping",
    "unswap": "swapping",
    "unpack": "packing",
}
__all__ = ["ops", *_MODULES]

if TYPE_CHECKING:
    # the same names for type checkers and editors, which cannot follow __getattr__
    from . import ops as ops
    from .config import EncoderConfig as EncoderConfig
    from .encoder import Encoder as Encoder
    from .heads import MaskedLM as MaskedLM
    from .heads import MultipleChoice as MultipleChoice
    from .heads import Pretraining as Pretraining
    from .heads import QuestionAnswerer as QuestionAnswerer
    from .heads import ReplacedTokenDetector as ReplacedTokenDetector
    from .heads import ReplacedTokenPretraining as ReplacedTokenPretraining
    from .heads import SequenceClassifier as SequenceClassifier
    from .heads import TokenClassifier as TokenClassifier
    from .packing import Batch as Batch
    from .packing import pack as pack
    from .packing import unpack as unpack
    from .sentences import SentenceEmbedder as SentenceEmbedder
    from .swapping import SwapReport as SwapReport
    from .swapping import swap as swap
    from .swapping import swapped as swapped
    from .swapping import unswap as unswap
    from .training.pretrain import PretrainConfig as PretrainConfig
    from .variants import preset as preset
else:

    def __getattr__(name):
        if name == "ops":
            return importlib.import_module(".ops", __name__)
        if name not in _MODULES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(importlib.import_module(f".{_MODULES[name]}", __name__), name)


register_with_transformers()
