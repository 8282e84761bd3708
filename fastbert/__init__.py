"""fastbert: fused Triton kernels for BERT-family encoders, and everything needed to train and serve them."""

from pathlib import Path

__version__ = "0.1.0"

# In the repository kernels/ sits beside this package; setup.py ships it inside, as fastbert.kernels.
_root = Path(__file__).resolve().parent.parent
if (_root / "setup.py").exists():
    __path__.append(str(_root))
