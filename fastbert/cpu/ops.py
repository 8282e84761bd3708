"""The ops on a CPU, faster than `reference.py` reads: same names, arguments and results."""

# with nothing to gain over what they mean
from ..reference import bias_gelu, gelu_layer_norm
from .attention import attention, biased_attention
from .cross_entropy import contrastive_cross_entropy, masked_cross_entropy
from .disentangled_attention import disentangled_attention
from .dropout import dropout
from .layer_norm import embedding, layer_norm
from .matmul import linear, linear_gelu, linears
from .pooling import pooling

__all__ = [
    "attention", "bias_gelu", "biased_attention", "contrastive_cross_entropy", "disentangled_attention", "dropout",
    "embedding", "gelu_layer_norm", "layer_norm", "linear", "linear_gelu", "linears", "masked_cross_entropy", "pooling",
]  # fmt: skip
