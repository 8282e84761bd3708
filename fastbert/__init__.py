"""fastbert: fused Triton kernels for BERT-family encoders, and everything needed to train and serve them."""

import importlib
from pathlib import Path

__version__ = "0.1.0"

# In the repository kernels/ sits beside this package; setup.py ships it inside, as fastbert.kernels.
_root = Path(__file__).resolve().parent.parent
if (_root / "setup.py").exists():
    __path__.append(str(_root))

# the public names and their modules: loaded when first asked for, so that importing fastbert costs nothing
_MODULES = {
    "Batch": "packing",
    "EncoderConfig": "config",
    "Encoder": "encoder",
    "MaskedLM": "heads",
    "MultipleChoice": "heads",
    "PretrainConfig": "pretrain",
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


def __getattr__(name):
    if name == "ops":
        return importlib.import_module(".ops", __name__)
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_MODULES[name]}", __name__), name)
