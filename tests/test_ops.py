"""Which implementation an op runs, and what autocast makes of it."""

import subprocess
import sys

import pytest
import torch
from helpers import cu_seqlens_of

from fastbert import ops


def test_unknown_implementation_is_named():
    x = torch.randn(2, 4)
    with pytest.raises(ValueError, match="impl='cuda'.*auto, triton, reference"):
        ops.bias_gelu(x, x[0], impl="cuda")


def test_environment_variable_is_checked():
    run = subprocess.run(
        [sys.executable, "-c", "import fastbert.ops"],
        env={"FASTBERT_IMPL": "fast", "PYTHONPATH": "."},
        capture_output=True,
    )
    assert b"FASTBERT_IMPL='fast': expected one of auto, triton, reference" in run.stderr


def test_kernels_on_a_cpu_never_fall_back(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    x = torch.randn(2, 4)
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET=1"):
        ops.bias_gelu(x, x[0], impl="triton")


def test_cpu_tensors_take_the_reference():
    assert not ops.uses_triton(torch.device("cpu"))
    assert ops.uses_triton(torch.device("cuda")) == ops.has_triton()


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_ops_under_autocast(impl, device):
    """Matrix products run in autocast's dtype; the row-wise ops give what they are given, with fp32 inside."""
    dtype = torch.float16 if impl == "triton" and device.type == "cpu" else torch.bfloat16
    x, weight, labels = (
        torch.randn(6, 8, device=device),
        torch.randn(11, 8, device=device),
        torch.tensor([1] * 6, device=device),
    )
    bias = torch.randn(8, device=device)
    qkv = torch.randn(6, 3, 2, 4, device=device)
    with torch.autocast(device.type, dtype=dtype):
        attended = ops.attention(qkv, None, None, cu_seqlens_of([2, 4], device), 4, impl=impl)
        loss, *_ = ops.masked_cross_entropy(x, weight, torch.randn(11, device=device), labels, impl=impl)
        normed = ops.layer_norm(x.to(dtype), bias, bias, residual=x, impl=impl)
        activated = ops.bias_gelu(x.to(dtype), bias, impl=impl)
    assert attended.dtype == normed.dtype == activated.dtype == dtype
    assert loss.dtype == torch.float32
