"""The ops on a CPU, with the names, arguments and results of `reference.py`."""

# nothing is faster here than the reference
from ..reference import bias_gelu, gelu_layer_norm, rms_norm
from .attention import attention, biased_attention
from .cross_entropy import contrastive_cross_entropy, masked_cross_entropy
from .disentangled_attention import disentangled_attention
from .dropout import dropout
from .gated_activation import gated_activation
from .layer_norm import embedding, layer_norm
from .matmul import linear, linear_gelu, linears
from .pooling import pooling
from .vocabulary_max import vocabulary_max

__all__ = [
    "attention", "bias_gelu", "biased_attention", "contrastive_cross_entropy", "disentangled_attention", "dropout",
    "embedding", "gated_activation", "gelu_layer_norm", "layer_norm", "linear", "linear_gelu", "linears",
    "masked_cross_entropy", "pooling", "rms_norm", "vocabulary_max",
]  # fmt: skip
