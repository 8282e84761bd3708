"""fastbert: fused Triton kernels for BERT-family encoders, and everything needed to train and serve them."""

import importlib
import importlib.util
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import TYPE_CHECKING

from .swapping.transformers_hook import register_with_transformers

__version__ = "0.1.0"

# The wheel has the kernels inside this package. A checkout has them beside it in kernels/, which must not be importable
# under that name: map that one folder to fastbert.kernels.
_package = Path(__file__).resolve().parent
if not (_package / "kernels").is_dir():
    _spec = ModuleSpec("fastbert.kernels", None, is_package=True)
    _spec.submodule_search_locations = [str(_package.parent / "kernels")]
    kernels = sys.modules[_spec.name] = importlib.util.module_from_spec(_spec)

# public names and their modules, which are loaded at first use, so that importing fastbert is fast
_MODULES = {
    "Batch": "packing",
    "EncoderConfig": "model.config",
    "Encoder": "model.encoder",
    "FinetuneConfig": "training.finetune",
    "MaskedLM": "model.heads",
    "MultipleChoice": "model.heads",
    "PretrainConfig": "training.pretrain",
    "Pretraining": "model.heads",
    "QuestionAnswerer": "model.heads",
    "ReplacedTokenDetector": "model.heads",
    "ReplacedTokenPretraining": "model.replaced_tokens",
    "SentenceEmbedder": "model.sentences",
    "SequenceClassifier": "model.heads",
    "SwapReport": "swapping.mechanism",
    "TokenClassifier": "model.heads",
    "embed_file": "retrieval.embedding",
    "finetune": "training.finetune",
    "load": "tasks.predictor",
    "pack": "packing",
    "preset": "model.presets",
    "search": "retrieval.search",
    "swap": "swapping.mechanism",
    "swapped": "swapping.mechanism",
    "unswap": "swapping.mechanism",
    "unpack": "packing",
}
__all__ = ["ops", *_MODULES]

if TYPE_CHECKING:
    # the same names again for type checkers and editors, which cannot follow __getattr__
    from . import ops as ops
    from .model.config import EncoderConfig as EncoderConfig
    from .model.encoder import Encoder as Encoder
    from .model.heads import MaskedLM as MaskedLM
    from .model.heads import MultipleChoice as MultipleChoice
    from .model.heads import Pretraining as Pretraining
    from .model.heads import QuestionAnswerer as QuestionAnswerer
    from .model.heads import ReplacedTokenDetector as ReplacedTokenDetector
    from .model.heads import SequenceClassifier as SequenceClassifier
    from .model.heads import TokenClassifier as TokenClassifier
    from .model.presets import preset as preset
    from .model.replaced_tokens import ReplacedTokenPretraining as ReplacedTokenPretraining
    from .model.sentences import SentenceEmbedder as SentenceEmbedder
    from .packing import Batch as Batch
    from .packing import pack as pack
    from .packing import unpack as unpack
    from .retrieval.embedding import embed_file as embed_file
    from .retrieval.search import search as search
    from .swapping.mechanism import SwapReport as SwapReport
    from .swapping.mechanism import swap as swap
    from .swapping.mechanism import swapped as swapped
    from .swapping.mechanism import unswap as unswap
    from .tasks.predictor import load as load
    from .training.finetune import FinetuneConfig as FinetuneConfig
    from .training.finetune import finetune as finetune
    from .training.pretrain import PretrainConfig as PretrainConfig
else:

    def __getattr__(name):
        if name == "ops":
            return importlib.import_module(".ops", __name__)
        if name not in _MODULES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(importlib.import_module(f".{_MODULES[name]}", __name__), name)

    def __dir__():
        return sorted({*globals(), *__all__})


register_with_transformers()
