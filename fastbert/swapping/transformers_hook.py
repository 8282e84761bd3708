"""Registers attn_implementation="fastbert" once transformers' models can be built, without importing transformers.

Imports neither torch nor transformers, so that `import fastbert` stays cheap.
"""

import contextlib
import importlib
import sys

MODULE = "transformers.modeling_utils"


def register_with_transformers() -> None:
    """Register now where transformers is already imported, else as soon as it is."""
    if MODULE in sys.modules:
        _register()
    elif _Finder not in sys.meta_path:
        sys.meta_path.insert(0, _Finder)


def _register():
    # a transformers without these interfaces rejects "fastbert" with its own message
    with contextlib.suppress(ImportError):
        importlib.import_module(".attn_implementation", __package__).register()


class _Finder:
    """Finds transformers.modeling_utils as the other finders do, and registers after it has been executed."""

    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name != MODULE:
            return None
        finders = [finder for finder in sys.meta_path if finder is not cls]
        spec = next(filter(None, (finder.find_spec(name, path, target) for finder in finders)), None)
        if spec is None:
            return None
        loader = spec.loader

        def exec_module(module):
            # uncovers the loader's own method
            del loader.exec_module
            loader.exec_module(module)
            if cls in sys.meta_path:
                sys.meta_path.remove(cls)
            _register()

        loader.exec_module = exec_module
        return spec
