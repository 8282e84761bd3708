"""Which implementation an op runs, and what autocast makes of it."""

import runpy
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from calls import CALLS, is_floating
from helpers import IMPLEMENTATIONS, PLAIN, cu_seqlens_of
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad

from fastbert import ops

# a GPU asserts what a CPU raises, and is of no use afterwards
on_a_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels run on a GPU")


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


# a call, an argument with ids, and a number that its table does not have
OUTSIDE = [
    ("masked_cross_entropy", "labels", -1),
    ("masked_cross_entropy", "labels", 37),
    ("masked_cross_entropy-smoothed", "labels", 2**40),
    ("contrastive_cross_entropy", "labels", -1),
    ("contrastive_cross_entropy-symmetric", "labels", 7),
    ("embedding", "input_ids", -1),
    ("embedding", "input_ids", 11),
    ("embedding", "position_ids", 9),
    ("embedding-three_types", "token_type_ids", 3),
]


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize(("name", "argument", "number"), OUTSIDE)
@on_a_cpu
def test_an_id_outside_its_table_is_named(name, argument, number, impl):
    call = CALLS[name]
    arguments = call.arguments("cpu")
    arguments[argument][2] = number
    with pytest.raises(ValueError, match=f"{argument} hold {number}: expected 0 to "):
        call(arguments, impl)
    x = next(x for x in arguments.values() if is_floating(x))
    with pytest.raises(ValueError, match=f"{argument} hold {number}"):
        torch.func.grad(lambda x: x.sum() + call(arguments, "reference")[0].sum())(x)


@pytest.mark.parametrize(("name", "argument"), [("masked_cross_entropy", "labels"), ("embedding", "input_ids")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bool], ids=str)
def test_ids_are_integers(name, argument, dtype, device):
    arguments = CALLS[name].arguments(device)
    with pytest.raises(ValueError, match=f"{argument} are of {dtype}: expected integers"):
        CALLS[name](arguments | {argument: arguments[argument].to(dtype)}, PLAIN)


# what PyTorch would broadcast, and a kernel would read past the end
OTHER_SHAPES = [
    ("layer_norm", "weight"), ("layer_norm", "bias"), ("layer_norm", "residual"), ("bias_gelu", "bias"),
    ("gelu_layer_norm", "bias"), ("gelu_layer_norm", "weight"), ("gelu_layer_norm", "ln_bias"),
    ("embedding", "position_ids"), ("embedding", "token_type_ids"), ("embedding", "weight"), ("embedding", "bias"),
    ("masked_cross_entropy", "labels"), ("masked_cross_entropy", "bias"),
]  # fmt: skip


def test_other_shapes_are_refused(device):
    for name, argument in OTHER_SHAPES:
        arguments = CALLS[name].arguments(device)
        x = arguments[argument]
        with pytest.raises(ValueError, match=rf"{argument} has shape \[1[],].*: expected \[{len(x)}[],]"):
            CALLS[name](arguments | {argument: x[:1]}, PLAIN)


def test_a_gpu_is_not_waited_for(monkeypatch):
    """Fake tensors raise where the host would read a value. The assertion says what is wrong."""
    said, assert_async = [], torch._assert_async
    monkeypatch.setattr(torch, "_assert_async", lambda x, message: said.append(message) or assert_async(x, message))
    with FakeTensorMode():
        ops.check_ids("labels", torch.ones(3, dtype=torch.int64, device="cuda"), 5, -100)
    assert said == ["labels outside [0, 5): expected 0 to 4, or -100 for none"]


def test_compiled_code_asserts_too():
    check = torch.compile(lambda ids: ops.check_ids("labels", ids, 5), backend="eager", fullgraph=True)
    check(torch.tensor([4, 0]))
    with pytest.raises(RuntimeError, match=r"labels outside \[0, 5\)"):
        check(torch.tensor([4, 5]))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_asserts():
    code = (
        "import torch; from fastbert import ops; x = torch.randn(3, 8, device='cuda')\n"
        "print(ops.masked_cross_entropy(x, x, None, torch.tensor([0, -1, 2], device='cuda')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode != 0 and "labels outside [0, 3)" in done.stderr + done.stdout


@pytest.mark.parametrize(
    ("starts", "reason"),
    [
        ([0, 3, 12], "cu_seqlens runs from 0 to 12: expected 0 to at most 11 rows"),
        ([0, 5, 3], "cu_seqlens runs from 0 to 3: .* ascending"),
        ([1, 3, 9], "cu_seqlens runs from 1 to 9"),
        ([0, 2, 10], "max_seqlen is 6: expected at least 8, the length of the longest sequence"),
    ],
    ids=str,
)
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", ["attention", "attention-some_rows", "biased_attention", "disentangled_attention"])
@on_a_cpu
def test_sequences_that_cannot_be_are_named(name, starts, reason, impl):
    arguments = CALLS[name].arguments("cpu", cu_seqlens=torch.tensor(starts, dtype=torch.int32), max_seqlen=6)
    with pytest.raises(ValueError, match=reason):
        CALLS[name](arguments, impl)


@pytest.mark.parametrize("name", CALLS)
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
    with forward_ad.dual_level():
        duals = {name: forward_ad.make_dual(x, tangents[name]) for name, x in leaves.items()}
        torch.testing.assert_close(forward_ad.unpack_dual(function(duals)).tangent, along)


def test_kernels_refuse_torch_func(device):
    run = lambda x: ops.bias_gelu(x, None, impl="triton").sum()  # noqa: E731
    with pytest.raises(RuntimeError, match="bias_gelu: torch.func and forward mode need plain PyTorch: expected impl="):
        torch.func.grad(run)(torch.randn(2, 4, device=device))


@pytest.mark.parametrize("name", CALLS)
def test_several_cotangents_at_once(name):
    """vmap over the backward of what runs on a CPU, as torch.autograd.functional.jacobian(vectorize=True) does."""
    call = CALLS[name]
    arguments = call.arguments("cpu", torch.float64)
    leaves = {name: x.requires_grad_() for name, x in arguments.items() if is_floating(x)}
    out = call(arguments, impl="cpu")[0]
    cotangents = torch.randn(3, *out.shape, dtype=out.dtype)
    options = dict(retain_graph=True)
    got = torch.autograd.grad(out, list(leaves.values()), cotangents, is_grads_batched=True, **options)
    one_by_one = [torch.autograd.grad(out, list(leaves.values()), x, **options) for x in cotangents]
    for x, expected in zip(got, zip(*one_by_one), strict=True):
        torch.testing.assert_close(x, torch.stack(expected))


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
