"""The operators under torch.compile: schemas, fakes, and whole graphs."""

import importlib
from pathlib import Path

import pytest
import torch
from calls import CALLS, is_floating
from helpers import PLAIN, Recorder, assert_same_bits, packed_batch
from torch._dynamo.testing import AotEagerAndRecordGraphs

from fastbert import ops
from fastbert.model.config import EncoderConfig
from fastbert.model.heads import MaskedLM

# calls that hand their operators other arguments than those of CALLS: absent ones, or of other dtypes
MORE_CALLS = {
    "layer_norm-residual_of_another_dtype": ("layer_norm", dict(residual=torch.float32)),
    "layer_norm-no_dropout": ("layer_norm", dict(dropout_p=0.0)),
    "bias_gelu-no_bias": ("bias_gelu", dict(bias=None)),
    "gelu_layer_norm-no_biases": ("gelu_layer_norm", dict(bias=None, ln_bias=None)),
    "gelu_layer_norm-wide": ("gelu_layer_norm", dict(dtype=torch.float32)),
    "embedding-few_tables": ("embedding", dict(position=None, position_ids=None, bias=None, padding_idx=-1)),
    "pooling-wide": ("pooling", dict(dtype=torch.float32)),
}


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


def recorded(name, device, layout=as_given, dtype=torch.float32):
    """The operators that a call runs, with floating inputs and incoming gradients in this layout and dtype."""
    name, changes = MORE_CALLS.get(name, (name, {}))
    call = CALLS[name]
    arguments = call.arguments(device, dtype)
    for key, change in changes.items():
        has_tensor = isinstance(change, torch.dtype) and key in arguments
        arguments[key] = arguments[key].to(change) if has_tensor else change
    arguments = {key: layout(x) if is_floating(x) else x for key, x in arguments.items()}
    outputs = [x for x in call(arguments, "reference") if is_floating(x)]
    with Recorder() as recorder:
        if name == "masked_cross_entropy":
            # the operator also computes the gradients that are wanted: here none
            with torch.no_grad():
                call(arguments)
        call.run(arguments, [layout(torch.randn_like(x)) for x in outputs])
    return recorder.calls


def detached(arguments):
    return [x.detach() if isinstance(x, torch.Tensor) else x for x in arguments]


def test_every_operator_is_checked(device):
    checked = {operator.name() for name in CALLS for operator, *_ in recorded(name, device)}
    assert checked == {f"fastbert::{name}" for name in registered()}


@pytest.mark.parametrize("name", [name for name in CALLS if name == CALLS[name].op])
def test_operators_are_registered_soundly(name, device):
    """torch's own tests of an operator: its schema, its fakes, its registration, and as part of a dynamic graph.

    The operators have no formula of autograd: the autograd.Function around each pair has. So inputs want no gradient,
    as inside the Function.
    """
    for operator, arguments, _ in recorded(name, device):
        torch.library.opcheck(operator, detached(arguments))


@pytest.mark.parametrize("name", [*CALLS, *MORE_CALLS])
def test_fakes_are_like_the_real_results(name, device):
    """Shapes, dtypes and strides; inputs are left alone, and no result shares memory with them or another result.

    Autograd may overwrite a result that it alone holds.
    """
    for operator, arguments, _ in recorded(name, device, slice_of_a_wider_tensor, torch.float16):
        torch.library.opcheck(operator, detached(arguments), test_utils=("test_schema", "test_faketensor"))


def with_gradients(function, arguments):
    """The outputs of a function, and the gradients of its floating arguments and of nothing else."""
    leaves = {name: x.detach().requires_grad_() for name, x in arguments.items() if is_floating(x)}
    outputs = function(**arguments | leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    return *outputs, *torch.autograd.grad(outputs[0].square().sum(), list(leaves.values()))


# the model below has the other ops; on a CPU only these take another path under torch.compile
@pytest.mark.parametrize(
    "name, impl",
    [
        *((name, "triton") for name in ("biased_attention", "pooling-max", "contrastive_cross_entropy-symmetric")),
        *((name, PLAIN) for name in ("masked_cross_entropy", "contrastive_cross_entropy")),
    ],
)
def test_an_op_compiles_whole(name, impl, device):
    """In one graph without a break, with the results of eager mode."""
    call = CALLS[name]

    def op(**arguments):
        return getattr(ops, call.op)(**arguments, impl=impl)

    arguments = call.arguments(device)
    eager = with_gradients(op, arguments)
    compiled = with_gradients(torch.compile(op, fullgraph=True, backend="aot_eager"), arguments)
    for one, other in zip(eager, compiled, strict=True):
        if call.exact and impl == "triton":
            assert torch.equal(one, other)
        else:
            torch.testing.assert_close(one, other)


def test_the_model_compiles_whole(device, monkeypatch):
    """A training step of a model that has most ops: one graph without a break, eager mode's loss and gradients."""
    monkeypatch.setattr(ops, "IMPL", "triton")
    config = EncoderConfig(
        vocab_size=37, hidden_size=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=40,
        max_position_embeddings=16,
    )  # fmt: skip
    model, batch = MaskedLM(config).to(device), packed_batch((5, 1, 0, 7), 37)
    batch.seed = torch.tensor([5])
    batch = batch.to(device)

    def loss(batch):
        return model(batch).loss

    def gradients(value):
        return value, *torch.autograd.grad(value, list(model.parameters()))

    backend = AotEagerAndRecordGraphs()
    with Recorder() as recorder:
        eager = gradients(loss(batch))
    assert_same_bits(gradients(torch.compile(loss, fullgraph=True, backend=backend)(batch)), eager)
    targets = [str(node.target) for graph in (*backend.fw_graphs, *backend.bw_graphs) for node in graph.graph.nodes]
    compiled = {target.split(".")[1] for target in targets if target.startswith("fastbert.")}
    assert compiled == {operator.name().partition("::")[2] for operator, *_ in recorder.calls}
    assert {name.rpartition("_")[0] for name in compiled} == {
        "attention", "layer_norm", "bias_gelu", "gelu_layer_norm", "embedding", "masked_cross_entropy",
    }  # fmt: skip
