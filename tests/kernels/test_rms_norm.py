"""rms_norm: kernels and CPU against the reference in float64.

Strides, empty rows and dtypes: in the tests of all ops.
"""

import pytest
import torch
from helpers import assert_op_within_budget

from fastbert.kernels.rms_norm import rms_norm

pytestmark = pytest.mark.usefixtures("poison")


@pytest.mark.parametrize(
    "T, D, dtype",
    [(5, 1, torch.float32), (13, 96, torch.float32), (1, 37, torch.float16), (13, 768, torch.float16),
     (75, 256, torch.float32), (2, 1056, torch.float32)],
    ids=str,
)  # fmt: skip
def test_values_and_gradients(T, D, dtype, device):
    x, weight = (torch.randn(shape).to(device, dtype) for shape in ((T, D), D))
    assert_op_within_budget(rms_norm, x, weight)


@pytest.mark.parametrize("scale, eps", [(0.0, 1e-6), (1e-4, 1e-6), (1e6, 1e-5)])
def test_small_and_large_rows(scale, eps, device):
    """A row of zeros gives zeros; eps counts where the squares are as small."""
    assert_op_within_budget(
        rms_norm, torch.randn(5, 37, device=device) * scale, torch.randn(37, device=device), eps=eps
    )
