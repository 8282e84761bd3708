"""A whole training step as a GPU would see it, traced without one: the checks below run in a process of their own."""

import json
import os
import subprocess
import sys
import traceback
from pathlib import Path

import fake_cuda
import pytest
import torch
import torch._subclasses.fake_tensor as fake_tensor
import torch.nn.functional as F
from helpers import Recorder
from torch._dynamo.exc import Unsupported
from torch._dynamo.testing import AotEagerAndRecordGraphs

from fastbert import ops
from fastbert.model.config import EncoderConfig
from fastbert.model.heads import MaskedLM, Pretraining
from fastbert.packing import Batch

PINNED, INSTALLED = "2.13", "fake CUDA is installed"
LAYERS, HEADS, HIDDEN, FFN, VOCABULARY = 2, 2, 48, 96, 101
CONFIG = EncoderConfig(
    vocab_size=VOCABULARY, hidden_size=HIDDEN, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
    intermediate_size=FFN, max_position_embeddings=64,
)  # fmt: skip
# how often one step of the model runs each op
CALLS = {"attention": LAYERS, "layer_norm": 2 * LAYERS, "bias_gelu": LAYERS, "gelu_layer_norm": 1, "embedding": 1}
FORWARD = {f"{op}_fwd": count for op, count in CALLS.items()}
STEP = FORWARD | {f"{op}_bwd": count for op, count in CALLS.items()} | {"masked_cross_entropy_fwd": 1}


def batch(T=40, B=6, M=9):
    """A Batch of fixed capacity on the device; fake tensors hold no lengths, only room for them."""

    def ids(*shape, dtype=torch.int64):
        return torch.zeros(*shape, dtype=dtype, device="cuda")

    return Batch(
        input_ids=ids(T), position_ids=ids(T), token_type_ids=ids(T), cu_seqlens=ids(B + 1, dtype=torch.int32),
        max_seqlen=16, labels=ids(T), picks=ids(M), pair_labels=ids(B), seed=ids(1),
    )  # fmt: skip


def model_on_cuda(cls=MaskedLM, dtype=torch.float32):
    # made on the device in its dtype: a module of fake tensors cannot be moved or cast
    torch.set_default_dtype(dtype)
    try:
        with torch.device("cuda"):
            return cls(CONFIG).train()
    finally:
        torch.set_default_dtype(torch.float32)


def assert_ran(names, expected):
    ran = {name: names.count(name) for name in set(names)}
    assert ran.items() >= expected.items(), ran


def assert_gradients(model):
    for name, parameter in model.named_parameters():
        grad = parameter.grad
        assert grad is not None, f"{name} has no gradient"
        assert (grad.shape, grad.dtype, grad.device) == (parameter.shape, parameter.dtype, parameter.device), name


def names_of(recorder):
    return [function.name().partition("::")[2] for function, *_ in recorder.calls]


def check_a_training_step_runs_the_kernels():
    """impl="auto": on CUDA tensors every op runs its kernels, forward and backward, and no gradient is missing."""
    for cls, dtype in (
        (MaskedLM, torch.float32), (MaskedLM, torch.bfloat16), (MaskedLM, torch.float16), (Pretraining, torch.float32),
    ):  # fmt: skip
        model = model_on_cuda(cls, dtype)
        with Recorder() as recorder:
            output = model(batch())
            output.loss.backward()
        assert_ran(names_of(recorder), STEP)
        assert output.loss.dtype == torch.float32 and output.loss.device.type == "cuda"
        assert_gradients(model)


def check_inference_runs_forward_kernels():
    model = model_on_cuda(dtype=torch.bfloat16).eval()
    given = batch()
    given.labels = given.picks = None
    with torch.no_grad(), Recorder() as recorder:
        logits = model(given).logits
    assert (logits.shape, logits.dtype, logits.device.type) == ((40, VOCABULARY), torch.bfloat16, "cuda")
    assert_ran(names_of(recorder), FORWARD)
    assert not any(name.endswith("_bwd") for name in names_of(recorder))


def graphs_of(model, autocast):
    """The graphs of one compiled step: [(name, its results)] of fastbert's operators in forward and backward."""

    def loss(given):
        with torch.autocast("cuda", autocast, enabled=autocast is not None):
            return model(given).loss

    backend = AotEagerAndRecordGraphs()
    torch._dynamo.reset()
    torch.compile(loss, fullgraph=True, backend=backend)(batch()).backward()
    assert len(backend.fw_graphs) == len(backend.bw_graphs) == 1
    nodes = [node for graph in (*backend.fw_graphs, *backend.bw_graphs) for node in graph.graph.nodes]
    for node in nodes:
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor) and value.numel() > 1:
            assert value.device.type == "cuda", f"{node.format_node()} is on {value.device}"
    return [
        (str(node.target).split(".")[1], torch.utils._pytree.tree_leaves(node.meta["val"]))
        for node in nodes if str(node.target).startswith("fastbert.")
    ]  # fmt: skip


def check_the_step_is_one_graph():
    """torch.compile(fullgraph=True): no graph break, and every operator is in the graph, with the right results."""
    model = model_on_cuda(dtype=torch.bfloat16)
    found = graphs_of(model, None)
    assert_ran([name for name, _ in found], STEP)
    assert_gradients(model)
    # the last layer computes picked rows only
    rows = {"attention_fwd": [(40, HEADS, 24)] * (LAYERS - 1) + [(9, HEADS, 24)],
            "layer_norm_fwd": [(40, HIDDEN)] * (2 * LAYERS - 2) + [(9, HIDDEN)] * 2,
            "bias_gelu_fwd": [(40, FFN)] * (LAYERS - 1) + [(9, FFN)],
            "gelu_layer_norm_fwd": [(9, HIDDEN)],
            "embedding_fwd": [(40, HIDDEN)]}  # fmt: skip
    for name, shapes in rows.items():
        results = [x for one, x in found if one == name]
        assert [tuple(first.shape) for first, *_ in results] == shapes, name
        assert {first.dtype for first, *_ in results} == {torch.bfloat16}, name
        if name != "bias_gelu_fwd":
            # mean and rstd, or the log-sum-exp
            rest = [x for _, *rest in results for x in rest if isinstance(x, torch.Tensor)]
            assert {x.dtype for x in rest if x.is_floating_point()} == {torch.float32}, name


def check_the_step_is_one_graph_under_autocast():
    """fp32 parameters, 16-bit arithmetic: what passes between the layers stays in 16 bits."""
    for dtype in (torch.bfloat16, torch.float16):
        model = model_on_cuda()
        found = graphs_of(model, dtype)
        assert_ran([name for name, _ in found], STEP)
        assert_gradients(model)
        for name in ("attention_fwd", "bias_gelu_fwd", "layer_norm_fwd"):
            assert {results[0].dtype for one, results in found if one == name} == {dtype}, name


def check_ops_under_autocast_give_what_torch_gives():
    """Matrix products give autocast's dtype, losses fp32, GELU its input's dtype."""
    given = batch()
    x, weight, bias = (torch.zeros(shape, device="cuda") for shape in ((40, HIDDEN), (VOCABULARY, HIDDEN), VOCABULARY))
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cuda", dtype):
            qkv = ops.linear(x, x.new_zeros(3 * HIDDEN, HIDDEN)).view(40, 3, HEADS, -1)
            assert qkv.dtype == F.linear(x, weight).dtype == dtype
            for packed in (qkv, qkv.float()):
                attended = ops.attention(packed, None, None, given.cu_seqlens, 16)
                q = packed[:, 0].unsqueeze(0).transpose(1, 2)
                assert attended.dtype == F.scaled_dot_product_attention(q, q, q).dtype == dtype
            for rows in (x, x.to(dtype)):
                assert ops.bias_gelu(rows, bias[:HIDDEN]).dtype == F.gelu(rows).dtype == rows.dtype
                # in fp32 on a GPU, unless the caller, as our encoder, asks for another
                wide = F.layer_norm(rows, (HIDDEN,)).dtype
                norms = [ops.layer_norm(rows, None, None), ops.gelu_layer_norm(rows, None, None, None)]
                assert {y.dtype for y in norms} == {wide} == {torch.float32}
                assert ops.layer_norm(rows, None, None, dtype=dtype).dtype == dtype
                pooled = ops.pooling(rows, given.cu_seqlens, normalize=True)
                assert pooled.dtype == F.normalize(rows.sum(0, keepdim=True)).dtype
            loss = ops.masked_cross_entropy(x, weight, bias, given.labels)[0]
            assert loss.dtype == F.cross_entropy(F.linear(x, weight, bias), given.labels).dtype == torch.float32


def check_other_lengths_make_no_second_graph():
    """Batches of one capacity share a graph, whatever their lengths; so do other sizes if marked dynamic."""
    model = model_on_cuda()
    backend = AotEagerAndRecordGraphs()
    torch._dynamo.reset()
    step = torch.compile(lambda given: model(given).loss, fullgraph=True, backend=backend)
    for _ in range(3):
        step(batch()).backward()
    assert len(backend.fw_graphs) == len(backend.bw_graphs) == 1

    backend.fw_graphs.clear(), backend.bw_graphs.clear()
    torch._dynamo.reset()
    for T, B, M in ((40, 6, 9), (56, 7, 12), (33, 5, 20)):
        given = batch(T, B, M)
        for x in (given.input_ids, given.position_ids, given.token_type_ids, given.labels):
            torch._dynamo.mark_dynamic(x, 0)
        torch._dynamo.mark_dynamic(given.cu_seqlens, 0)
        torch._dynamo.mark_dynamic(given.picks, 0)
        step(given).backward()
    assert len(backend.fw_graphs) == len(backend.bw_graphs) == 1, len(backend.fw_graphs)


def check_the_instrument_sees_what_it_should():
    """A wait for the device, a graph break and a tensor on the wrong device are errors here."""
    x = torch.ones(4, device="cuda")
    for wait in (lambda: int(x.sum()), lambda: x.tolist(), lambda: x.nonzero().sum().item()):
        try:
            wait()
        except (fake_tensor.DataDependentOutputException, fake_tensor.DynamicOutputShapeException):
            continue
        raise AssertionError("a wait for the device went unseen")

    def broken(x):
        torch._dynamo.graph_break()
        return x + 1

    try:
        torch.compile(broken, fullgraph=True, backend="aot_eager")(x)
    except Unsupported:
        pass
    else:
        raise AssertionError("a graph break went unseen")
    try:
        x + torch.ones(4)
    except RuntimeError as error:
        assert "device" in str(error)
    else:
        raise AssertionError("a mix of devices went unseen")


CHECKS = {name[6:]: function for name, function in list(globals().items()) if name.startswith("check_")}


@pytest.fixture(scope="module")
def results():
    """{check: "" or what went wrong}; skips, with the reason, where fake CUDA tensors cannot be differentiated."""
    root = Path(__file__).resolve().parents[2]
    # as on a GPU: there the kernels are compiled, not interpreted
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(map(str, (root, root / "tests")))
    done = subprocess.run([sys.executable, __file__], cwd=root, env=environment, capture_output=True, text=True)
    if INSTALLED not in done.stdout.splitlines():
        reason = done.stderr.strip().rpartition("\n")[2] or f"torch {torch.__version__}: ended with {done.returncode}"
        # on the torch that the project pins, a missing compiler is the only excuse
        assert "no C++ compiler" in reason or not torch.__version__.startswith(PINNED), done.stderr
        pytest.skip(reason)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.strip().rpartition("\n")[2])


@pytest.mark.parametrize("check", CHECKS)
def test_on_fake_cuda_tensors(check, results):
    assert results[check] == "", results[check]


if __name__ == "__main__":
    fake_cuda.install()
    print(INSTALLED, flush=True)
    found = {}
    for name, check in CHECKS.items():
        try:
            with fake_tensor.FakeTensorMode():
                check()
            found[name] = ""
        except Exception:
            found[name] = traceback.format_exc()
    print(json.dumps(found))
