"""fastbert: fused Triton kernels for BERT-family encoders, and everything needed to train and serve them."""

import contextlib
import importlib
import importlib.machinery
import sys
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


def __getattr__(name):
    if name == "ops":
        return importlib.import_module(".ops", __name__)
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_MODULES[name]}", __name__), name)


class _AfterTransformers:
    """Registers attn_implementation="fastbert" as soon as transformers' models can be built, and never imports it."""

    MODULE = "transformers.modeling_utils"

    @classmethod
    def find_spec(cls, name, path=None, target=None):
        """The spec that the other finders give, with a loader that registers when it is done."""
        if name != cls.MODULE:
            return None
        finders = [finder for finder in sys.meta_path if finder is not cls]
        spec = next(filter(None, (finder.find_spec(name, path, target) for finder in finders)), None)
        if spec is None:
            return None
        loader = spec.loader

        def exec_module(module):
            del loader.exec_module  # from here on the loader's own
            loader.exec_module(module)
            cls.register()

        loader.exec_module = exec_module
        return spec

    @classmethod
    def register(cls):
        if cls in sys.meta_path:
            sys.meta_path.remove(cls)
        # a transformers without the interfaces says by itself that it knows no "fastbert"
        with contextlib.suppress(ImportError):
            importlib.import_module(".huggingface", __name__).register()


if _AfterTransformers.MODULE in sys.modules:
    _AfterTransformers.register()
else:
    sys.meta_path.insert(0, _AfterTransformers)
