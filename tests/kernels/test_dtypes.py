"""Arguments in different dtypes, and results in a dtype of their own, for every op that offers this."""

import pytest
import torch
from calls import CALLS
from helpers import PLAIN
from test_hazards import check, same

# arguments in fp16, the others in fp32. Each gradient comes in its argument's dtype
HALVES = [
    ("layer_norm", ("x", "residual")),
    ("layer_norm", ("x", "weight", "bias")),
    ("layer_norm", ("x",)),
    ("layer_norm", ("residual", "weight", "bias")),
    ("bias_gelu", ("x",)),
    ("bias_gelu", ("bias",)),
    ("gelu_layer_norm", ("x",)),
    ("gelu_layer_norm", ("bias", "weight", "ln_bias")),
    ("gelu_layer_norm", ("bias",)),
    ("rms_norm", ("x",)),
    ("rms_norm", ("weight",)),
    ("embedding", ("word", "position", "token_type")),
    ("embedding", ("weight", "bias")),
]
IMPLS = ["triton", PLAIN]
with_a_dtype = pytest.mark.parametrize("name", [n for n, call in CALLS.items() if call.takes("dtype") and n == call.op])


@pytest.mark.parametrize("name, halves", HALVES, ids=str)
def test_mixed_dtypes(name, halves, device):
    call = CALLS[name]
    arguments = call.arguments(device)
    arguments |= {half: arguments[half].half() for half in halves}
    for impl in IMPLS:
        check(call, arguments, impl)
    if name == "layer_norm":
        # without dropout only another dtype gives the residual a gradient of its own
        check(call, arguments | dict(dropout_p=0.0))


@with_a_dtype
def test_result_in_a_wider_dtype(name, device):
    """It is not rounded on the way; gradients keep their arguments' dtypes."""
    call = CALLS[name]
    arguments = call.arguments(device, torch.float16) | dict(dtype=torch.float32)
    for impl in IMPLS:
        check(call, arguments, impl)
    (y,), gradients = call.run(arguments)
    assert y.dtype == torch.float32 and {g.dtype for g in gradients.values()} == {torch.float16}
    assert not torch.equal(y, y.half().float())


@with_a_dtype
def test_result_in_a_narrower_dtype(name, device):
    """It is rounded once."""
    call = CALLS[name]
    arguments = call.arguments(device)
    cotangent = torch.randn_like(call(arguments, impl="reference")[0]).half()
    (y,), gradients = call.run(arguments, [cotangent.float()])
    same(call.run(arguments | dict(dtype=torch.float16), [cotangent]), ((y.half(),), gradients))
