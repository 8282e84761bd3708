"""The operators without data: what torch.compile believes of them is what they do."""

import importlib
from pathlib import Path

import calls
import pytest
import torch
from helpers import Recorder, cu_seqlens_of
from torch._dynamo.testing import AotEagerAndRecordGraphs
from torch._subclasses.fake_tensor import FakeTensorMode

from fastbert import ops
from fastbert.model.config import EncoderConfig
from fastbert.model.heads import MaskedLM
from fastbert.packing import Batch

CONFIG = EncoderConfig(
    vocab_size=37, hidden_size=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=40,
    max_position_embeddings=16,
)  # fmt: skip
LENGTHS, T, D = [5, 1, 0, 7], 13, 24


@pytest.fixture(autouse=True)
def kernels_are_used(monkeypatch):
    monkeypatch.setattr(ops, "IMPL", "triton")


def batch_on(device):
    labels = torch.randint(37, (T,), device=device)
    labels[::3] = -100
    return Batch(
        input_ids=torch.randint(37, (T,), device=device),
        position_ids=torch.arange(T, device=device) % 7,
        token_type_ids=torch.arange(T, device=device) % 2,
        cu_seqlens=cu_seqlens_of(LENGTHS, device),
        max_seqlen=7,
        labels=labels,
        picks=(labels != -100).nonzero()[:, 0],
        seed=torch.tensor([5], device=device),
    )


def attention(device, dtype, packing):
    cu_seqlens, seed = cu_seqlens_of(LENGTHS, device), torch.tensor([5], device=device)
    q, k, v = torch.randn(T, 3, 2, 12, device=device, dtype=dtype, requires_grad=True), None, None
    options = dict(dropout_p=0.1, seed=seed)
    if packing == "kv":
        q, k = torch.randn(4, 2, 12, device=device, dtype=dtype, requires_grad=True), q[:, 1:].detach().requires_grad_()
        options |= dict(cu_seqlens_q=cu_seqlens_of([2, 0, 0, 2], device), max_seqlen_q=4)
    elif packing == "apart":
        q, k, v = (x.detach().requires_grad_() for x in q.transpose(2, 3).contiguous().transpose(2, 3).unbind(1))
    return ops.attention(q, k, v, cu_seqlens, 7, **options)


def layer_norm(device, dtype, residual_dtype, dropout_p, transposed):
    x = torch.randn(D, T, device=device, dtype=dtype).T if transposed else torch.randn(T, D, device=device, dtype=dtype)
    residual = residual_dtype and torch.randn(T, D, device=device, dtype=residual_dtype, requires_grad=True)
    weight, bias = (torch.randn(D, device=device, requires_grad=True) for _ in range(2))
    seed = torch.tensor([5], device=device) if dropout_p else None
    return ops.layer_norm(x.requires_grad_(), weight, bias, residual=residual, dropout_p=dropout_p, seed=seed, eps=1e-5)


def bias_gelu(device, dtype):
    x, bias = torch.randn(T, 2 * D, device=device, dtype=dtype)[:, :D], torch.randn(D, device=device)
    return ops.bias_gelu(x.requires_grad_(), bias.requires_grad_(), approximate="tanh")


def gelu_layer_norm(device, dtype):
    x, *rest = torch.randn(T, D, device=device, dtype=dtype), *(torch.randn(D, device=device) for _ in range(3))
    return ops.gelu_layer_norm(x.requires_grad_(), *(p.requires_grad_() for p in rest))


def embedding(device, dtype):
    batch = batch_on(device)
    shapes = (37, D), (16, D), (2, D), (D,), (D,)
    tables = [torch.randn(shape, device=device, dtype=dtype, requires_grad=True) for shape in shapes]
    return ops.embedding(
        batch.input_ids,
        batch.position_ids,
        batch.token_type_ids,
        *tables,
        padding_idx=0,
        dropout_p=0.1,
        seed=batch.seed,
    )


def masked_cross_entropy(device, dtype, gradients):
    # transposed: gradients must not inherit the layout unsaid
    shapes = (D, T), (D, 37), (37,)
    hidden, weight, bias = (torch.randn(shape, device=device, dtype=dtype, requires_grad=gradients) for shape in shapes)
    return ops.masked_cross_entropy(hidden.T, weight.T, bias, batch_on(device).labels, label_smoothing=0.1)[0]


CALLS = {
    "attention-qkv": (attention, "qkv"),
    "attention-kv": (attention, "kv"),
    "attention-apart": (attention, "apart"),
    "layer_norm-bare": (layer_norm, None, 0.0, False),
    "layer_norm-transposed": (layer_norm, None, 0.1, True),
    "layer_norm-residual": (layer_norm, torch.float16, 0.0, False),
    "layer_norm-residual-dropout": (layer_norm, torch.float16, 0.1, True),
    "layer_norm-wide-residual": (layer_norm, torch.float32, 0.0, False),
    "bias_gelu": (bias_gelu,),
    "gelu_layer_norm": (gelu_layer_norm,),
    "embedding": (embedding,),
    "masked_cross_entropy-training": (masked_cross_entropy, True),
    "masked_cross_entropy-evaluation": (masked_cross_entropy, False),
}


def recorded(name, device):
    function, *arguments = CALLS[name]
    with Recorder() as recorder:
        out = function(device, torch.float16, *arguments)
        if out.requires_grad:
            out.backward(torch.randn_like(out))
    return recorder.calls


def detached(arguments):
    return [x.detach() if isinstance(x, torch.Tensor) else x for x in arguments]


def registered():
    """Names of all operators of fastbert."""
    for path in (Path(__file__).resolve().parents[2] / "kernels").glob("[!_]*.py"):
        importlib.import_module(f"fastbert.kernels.{path.stem}")
    names = (name.partition("::") for name in torch._C._dispatch_get_all_op_names())
    return {name for library, _, name in names if library == "fastbert"}


def as_given(x):
    return x


def slice_of_a_wider_tensor(x):
    return torch.cat((x, x), -1)[..., : x.shape[-1]] if x.dim() else x


def recorded_small(name, device, layout):
    """The operators that one entry of calls.CALLS runs, with floating inputs and incoming gradients laid out so."""
    call = calls.CALLS[name]
    arguments = {key: layout(x) if calls.is_floating(x) else x for key, x in call.arguments(device).items()}
    shapes = [x for x in call(arguments) if x.is_floating_point()]
    with Recorder() as recorder:
        call.run(arguments, [layout(torch.randn_like(x)) for x in shapes])
    return recorder.calls


def outline(results):
    results = results if isinstance(results, (tuple, list)) else (results,)
    return [(tuple(x.shape), x.dtype, x.stride(), x.device) for x in results]


@pytest.mark.parametrize("name", [*CALLS, *(f"small {name}" for name in calls.CALLS)])
def test_fakes_are_like_the_real_results(name, device):
    small = name.removeprefix("small ")
    ran = recorded(name, device) if small == name else recorded_small(small, device, as_given)
    assert ran
    for operator, arguments, real in ran:
        with FakeTensorMode() as mode:
            fakes = [mode.from_tensor(x) if isinstance(x, torch.Tensor) else x for x in arguments]
            fake = operator(*fakes)
        assert outline(fake) == outline(real), operator
        # autograd may overwrite a result that it alone holds: none may share memory with another or with an argument
        tensors = [x for x in (real if isinstance(real, (tuple, list)) else (real,)) if x.numel()]
        places = [x.untyped_storage().data_ptr() for x in (*tensors, *arguments) if isinstance(x, torch.Tensor)]
        assert not set(places[: len(tensors)]) & set(places[len(tensors) :]), operator
        assert len(set(places[: len(tensors)])) == len(tensors), operator


def test_every_operator_is_checked(device):
    checked = {operator.name() for name in calls.CALLS for operator, *_ in recorded_small(name, device, as_given)}
    assert checked == {f"fastbert::{name}" for name in registered()}


@pytest.mark.parametrize("name", calls.CALLS)
def test_opcheck(name, device):
    """torch's own tests of an operator: its schema, its fakes, its registration, and as part of a dynamic graph.

    The operators have no formula of autograd: the autograd.Function around each pair has. So inputs want no gradient,
    as inside the Function.
    """
    for operator, arguments, _ in recorded_small(name, device, as_given):
        torch.library.opcheck(operator, detached(arguments))


@pytest.mark.parametrize("name", [name for name in calls.CALLS if name == calls.CALLS[name].op])
def test_opcheck_of_slices(name, device):
    # what depends on strides: whether inputs are left alone and results are fresh, and what the fakes say of them
    for operator, arguments, _ in recorded_small(name, device, slice_of_a_wider_tensor):
        torch.library.opcheck(operator, detached(arguments), test_utils=("test_schema", "test_faketensor"))


def test_the_model_compiles_whole(device):
    """A training step of a model in which all ops stand: one graph without a break, eager mode's loss and gradients."""
    model, batch = MaskedLM(CONFIG).to(device), batch_on(device)

    def loss(batch):
        return model(batch).loss

    def gradients(value):
        return value, *torch.autograd.grad(value, list(model.parameters()))

    backend = AotEagerAndRecordGraphs()
    with Recorder() as recorder:
        results = [gradients(loss(batch))]
    results.append(gradients(torch.compile(loss, fullgraph=True, backend=backend)(batch)))
    targets = [str(node.target) for graph in (*backend.fw_graphs, *backend.bw_graphs) for node in graph.graph.nodes]
    compiled = {target.split(".")[1] for target in targets if target.startswith("fastbert.")}
    assert compiled == {operator.name().partition("::")[2] for operator, *_ in recorder.calls}
    assert {name.rpartition("_")[0] for name in compiled} == {
        "attention", "layer_norm", "bias_gelu", "gelu_layer_norm", "embedding", "masked_cross_entropy",
    }  # fmt: skip
    for eager, compiled in zip(*results):
        assert torch.equal(eager, compiled)
