"""What runs in place of torch.nn's modules, see `swapping.py`."""

from torch import nn

from . import ops
from .replacements import Replacement


class LayerNorm(Replacement):
    PARTS = ("layer_norm",)
    WHAT = "fused norm"

    @staticmethod
    def refuses(module):
        if len(module.normalized_shape) != 1:
            return f"it normalises over {len(module.normalized_shape)} dimensions"
        if module.weight is None:
            return "it has no weight"
        return None

    def forward(self, input):
        rows = input.reshape(-1, input.shape[-1])
        return ops.layer_norm(rows, self.weight, self.bias, eps=self.eps).view(input.shape)


class GELU(Replacement):
    PARTS = ("gelu",)
    WHAT = "fused GELU"

    def forward(self, input):
        return ops.bias_gelu(input, None, approximate=self.approximate)


# full name of torch's class -> what takes its place
TABLE = {
    f"{cls.__module__}.{cls.__qualname__}": replacement
    for cls, replacement in {nn.LayerNorm: LayerNorm, nn.GELU: GELU}.items()
}
