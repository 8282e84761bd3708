"""gated_activation: kernels and CPU against the reference in float64.

Strides, empty rows and dtypes: in the tests of all ops.
"""

import pytest
import torch
from helpers import assert_op_within_budget

from fastbert import ops
from fastbert.kernels.gated_activation import gated_activation

pytestmark = pytest.mark.usefixtures("poison")


@pytest.mark.parametrize("gate", ["first", "last"])
@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "silu"])
@pytest.mark.parametrize(
    "T, F, dtype", [(5, 1, torch.float32), (13, 96, torch.float32), (1, 37, torch.float16), (13, 300, torch.float16)],
    ids=str,
)  # fmt: skip
def test_values_and_gradients(T, F, dtype, activation, gate, device):
    x = torch.randn(T, 2 * F).to(device, dtype) * 2
    assert_op_within_budget(gated_activation, x, activation=activation, gate=gate)


def test_refusals():
    x = torch.zeros(3, 7)
    for options, error in (
        (dict(activation="relu"), "activation='relu'"),
        (dict(gate="apart"), "gate='apart'"),
        ({}, "even"),
    ):
        with pytest.raises(ValueError, match=error):
            ops.gated_activation(x, **options)
