"""Which implementation an op runs, and what autocast makes of it."""

import runpy
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from calls import CALLS, is_floating
from helpers import PLAIN, cu_seqlens_of

from fastbert import ops


def test_unknown_implementation_is_named():
    x = torch.randn(2, 4)
    with pytest.raises(ValueError, match="impl='cuda'.*auto, triton, cpu, reference"):
        ops.bias_gelu(x, x[0], impl="cuda")


def test_environment_variable_is_checked(monkeypatch):
    monkeypatch.setenv("FASTBERT_IMPL", "fast")
    with pytest.raises(ValueError, match="FASTBERT_IMPL='fast': expected one of auto, triton, cpu, reference"):
        runpy.run_module("fastbert.ops")


def test_kernels_on_a_cpu_never_fall_back(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    x = torch.randn(2, 4)
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET=1"):
        ops.bias_gelu(x, x[0], impl="triton")


def test_auto_goes_by_the_device():
    chosen = {name: ops.implementation(torch.device(name), "auto") for name in ("cpu", "cuda", "mps", "meta")}
    on_a_gpu = "triton" if ops.has_triton() else "reference"
    assert chosen == {"cpu": "cpu", "cuda": on_a_gpu, "mps": "reference", "meta": "reference"}
    assert not ops.uses_triton(torch.device("cpu"))
    assert ops.uses_triton(torch.device("cuda")) == ops.has_triton()


@pytest.mark.parametrize("name", ["cuda", "mps", "meta"])
def test_cpu_on_another_device_is_refused(name):
    with pytest.raises(
        RuntimeError, match=f"impl='cpu' was requested for a {name} tensor: expected auto, triton or ref"
    ):
        ops.implementation(torch.device(name), "cpu")
    if name == "meta":
        x = torch.randn(2, 4, device=name)
        with pytest.raises(RuntimeError, match="requested for a meta tensor"):
            ops.bias_gelu(x, x[0], impl="cpu")


@pytest.mark.parametrize("name", [name for name in CALLS if name != "contrastive_cross_entropy"])
def test_transforms_of_torch_func(name):
    """The gradient and the derivative along a direction (forward mode), of what runs on a CPU."""
    call = CALLS[name]
    arguments = call.arguments("cpu", torch.float64)
    leaves = {name: x for name, x in arguments.items() if is_floating(x)}

    def function(leaves):
        return call(arguments | leaves, impl="auto")[0].sin().sum()

    _, wanted = CALLS[name].run(arguments, [call(arguments, impl="cpu")[0].cos()], impl="cpu")
    got = torch.func.grad(function)(leaves)
    tangents = {name: torch.randn_like(x) for name, x in leaves.items()}
    _, along = torch.func.jvp(function, (leaves,), (tangents,))
    for name in leaves:
        torch.testing.assert_close(got[name], wanted[name])
    torch.testing.assert_close(along, sum((wanted[name] * tangents[name]).sum() for name in leaves))


def test_vmap_on_a_cpu():
    x, weight, seed = torch.randn(3, 5, 8), torch.randn(8), torch.tensor([7])
    run = lambda x: ops.layer_norm(x, weight, None, dropout_p=0.3, seed=seed)  # noqa: E731
    torch.testing.assert_close(torch.func.vmap(run)(x), torch.stack([run(part) for part in x]))


# (ours, torch's own chain of ops), each of x [6, 8] and fp32 parameters [8]; tests/model/test_autocast.py has the rest
ROW_WISE = {
    "layer_norm, wide residual": (
        lambda x, p, impl: ops.layer_norm(x, p, p, residual=x.float(), impl=impl),
        lambda x, p: F.layer_norm(x + x.float(), (8,), p, p),
    ),
    "layer_norm, dtype asked for": (
        lambda x, p, impl: ops.layer_norm(x, p, p, residual=x.float(), dtype=torch.float16, impl=impl),
        lambda x, p: F.layer_norm(x + x.float(), (8,), p, p).half(),
    ),
    "pooling, mean": (
        lambda x, p, impl: ops.pooling(x, cu_seqlens_of([6], x.device), impl=impl),
        lambda x, p: x.sum(0, keepdim=True) / 6,
    ),
    "pooling, cls": (
        lambda x, p, impl: ops.pooling(x, cu_seqlens_of([6], x.device), mode="cls", impl=impl),
        lambda x, p: x,
    ),
}


@pytest.mark.parametrize("impl", [PLAIN, "triton"])
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("op", ROW_WISE)
def test_row_wise_ops_give_the_dtypes_of_torch(op, dtype, x_dtype, impl, device):
    """On a GPU, where layer_norm, sum and norm are on autocast's list, and on a CPU, where they are not."""
    ours, chain = ROW_WISE[op]
    x, p = torch.randn(6, 8, device=device).to(x_dtype), torch.ones(8, device=device)
    with torch.autocast(device.type, dtype=dtype):
        assert ours(x, p, impl).dtype == chain(x, p).dtype


def test_row_wise_ops_are_wide_under_a_gpus_autocast(monkeypatch):
    """The rule itself, without a GPU: torch's list for one."""
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: True)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        x = SimpleNamespace(device=torch.device("cuda"), dtype=dtype)
        assert ops._wide_under_autocast(x) == torch.float32
    assert ops._wide_under_autocast(SimpleNamespace(device=torch.device("cuda"), dtype=torch.float64)) == torch.float64
