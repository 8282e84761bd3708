"""The model on fake CUDA tensors: shapes, dtypes and devices as on a GPU, without data and, if need be, without a GPU.

    python tests/fake_cuda.py       runs every check below, and prints {name: "" or what went wrong} as its last line

A torch that was built without CUDA refuses to differentiate such tensors. fake_cuda.cpp, compiled here in seconds,
lets it; that is why this runs in a process of its own, started by test_fake_cuda.py.
"""

import ctypes
import json
import os
import shutil
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    # as on a GPU: there the kernels are compiled, not interpreted
    os.environ.pop("TRITON_INTERPRET", None)

import torch
import torch._subclasses.fake_tensor as fake_tensor
import torch.nn.functional as F
from torch._dynamo.exc import Unsupported
from torch._dynamo.testing import AotEagerAndRecordGraphs
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from fastbert import ops
from fastbert.config import EncoderConfig
from fastbert.heads import MaskedLM, Pretraining
from fastbert.packing import Batch

INSTALLED = "fake CUDA is installed"
LAYERS, HEADS, HIDDEN, FFN, VOCABULARY = 3, 2, 48, 96, 101
CONFIG = EncoderConfig(
    vocab_size=VOCABULARY, hidden_size=HIDDEN, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
    intermediate_size=FFN, max_position_embeddings=64,
)  # fmt: skip
# how often each pass of an op stands in one step of the model
CALLS = {"attention": LAYERS, "layer_norm": 2 * LAYERS, "bias_gelu": LAYERS, "gelu_layer_norm": 1, "embedding": 1}


def install():
    """Make fake CUDA tensors differentiable. Raises RuntimeError, which says why, where that cannot be."""
    if torch.cuda.is_available():
        return
    compiler = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
    if compiler is None:
        raise RuntimeError("no C++ compiler: neither c++, g++ nor clang++")
    home, source = Path(torch.__file__).parent, Path(__file__).with_suffix(".cpp")
    with tempfile.TemporaryDirectory() as directory:
        library = Path(directory) / "fake_cuda.so"
        abi = int(torch.compiled_with_cxx11_abi())
        command = [
            compiler, "-O1", "-std=c++20", "-fPIC", "-shared", f"-D_GLIBCXX_USE_CXX11_ABI={abi}", str(source),
            "-o", str(library), f"-I{home / 'include'}", f"-L{home / 'lib'}", "-lc10", "-ltorch_cpu",
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"fake_cuda.cpp does not compile against torch {torch.__version__}: {done.stderr[:500]}")
        ctypes.CDLL(str(library)).fastbert_install_fake_cuda()
    # what else asks for a driver
    fake_tensor.init_gpu_context = lambda device: None
    torch.cuda.amp.common.amp_definitely_not_available = lambda: False
    torch.cuda.is_bf16_supported = lambda *_, **__: True
    with FakeTensorMode():
        x = torch.ones(3, device="cuda", requires_grad=True)
        (x[1:] * 2).sum().backward()
        if x.grad is None or x.grad.device.type != "cuda":
            raise RuntimeError(f"fake_cuda.cpp does not fit torch {torch.__version__}: no gradient came")


class Recorder(TorchDispatchMode):
    """Names of fastbert's operators that ran."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "fastbert":
            self.names.append(function.name().partition("::")[2])
        return function(*args, **(kwargs or {}))


def batch(T=40, B=6, M=9, max_seqlen=16):
    """A Batch of fixed capacity, on the device; a fake one holds no lengths, only room for them."""

    def ids(*shape, dtype=torch.int64):
        return torch.zeros(*shape, dtype=dtype, device="cuda")

    return Batch(
        input_ids=ids(T), position_ids=ids(T), token_type_ids=ids(T), cu_seqlens=ids(B + 1, dtype=torch.int32),
        max_seqlen=max_seqlen, labels=ids(T), picks=ids(M), pair_labels=ids(B), seed=ids(1),
    )  # fmt: skip


def model_on_cuda(cls=MaskedLM, dtype=torch.float32):
    # made where they belong: a module of fake tensors cannot be moved or cast
    torch.set_default_dtype(dtype)
    try:
        with torch.device("cuda"):
            return cls(CONFIG).train()
    finally:
        torch.set_default_dtype(torch.float32)


def expected(passes=("fwd", "bwd")):
    calls = {f"{op}_{one}": count for op, count in CALLS.items() for one in passes}
    return calls | {"masked_cross_entropy_fwd": 1}


def counted(names):
    return {name: names.count(name) for name in sorted(set(names))}


def assert_gradients(model):
    for name, parameter in model.named_parameters():
        grad = parameter.grad
        assert grad is not None, f"{name} has no gradient"
        assert (grad.shape, grad.dtype, grad.device) == (parameter.shape, parameter.dtype, parameter.device), name


def check_a_training_step_runs_the_kernels():
    """impl="auto": on CUDA tensors every op goes to its kernels, forward and backward, and no gradient is missing."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        model = model_on_cuda(dtype=dtype)
        with Recorder() as recorder:
            output = model(batch())
            output.loss.backward()
        ran = counted(recorder.names)
        assert ran.items() >= expected().items(), ran
        loss = output.losses["mlm"]
        assert (loss.sum.dtype, loss.count.dtype, output.loss.device.type) == (
            torch.float32, torch.int64, "cuda",
        )  # fmt: skip
        assert_gradients(model)


def check_pretraining_with_sentence_pairs():
    model = model_on_cuda(Pretraining)
    output = model(batch())
    output.loss.backward()
    assert output.losses["pair"].sum.device.type == "cuda"
    assert_gradients(model)


def check_inference_runs_forward_kernels():
    model = model_on_cuda(dtype=torch.bfloat16).eval()
    given = batch()
    given.labels = given.picks = None
    with torch.no_grad(), Recorder() as recorder:
        logits = model(given).logits
    assert (logits.shape, logits.dtype, logits.device.type) == ((40, VOCABULARY), torch.bfloat16, "cuda")
    ran = counted(recorder.names)
    assert ran.items() >= {f"{op}_fwd": count for op, count in CALLS.items()}.items(), ran
    assert not any(name.endswith("_bwd") for name in ran)


def graphs_of(model, loss, given):
    """The graphs of one compiled step: [(op name, node)] of fastbert's operators in forward and backward."""
    backend = AotEagerAndRecordGraphs()
    torch._dynamo.reset()
    value = torch.compile(loss, fullgraph=True, backend=backend)(given)
    value.backward()
    assert len(backend.fw_graphs) == len(backend.bw_graphs) == 1
    nodes = [node for graph in (*backend.fw_graphs, *backend.bw_graphs) for node in graph.graph.nodes]
    for node in nodes:
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor) and value.numel() > 1:
            assert value.device.type == "cuda", f"{node.format_node()} is on {value.device}"
    return [(str(node.target).split(".")[1], node) for node in nodes if str(node.target).startswith("fastbert.")]


def tensors(value):
    return [x for x in (value if isinstance(value, (tuple, list)) else (value,)) if isinstance(x, torch.Tensor)]


def check_the_step_is_one_graph():
    """torch.compile(fullgraph=True): no graph break, every operator stands in the graph, with its results' outlines."""
    model = model_on_cuda(dtype=torch.bfloat16)
    found = graphs_of(model, lambda given: model(given).loss, batch(T=40, M=9))
    names = counted([name for name, _ in found])
    assert names.items() >= expected().items(), names
    assert_gradients(model)

    # the last layer works on the picked rows alone
    rows = {"attention_fwd": [(40, HEADS, 24)] * (LAYERS - 1) + [(9, HEADS, 24)],
            "layer_norm_fwd": [(40, HIDDEN)] * (2 * LAYERS - 2) + [(9, HIDDEN)] * 2,
            "bias_gelu_fwd": [(40, FFN)] * (LAYERS - 1) + [(9, FFN)],
            "gelu_layer_norm_fwd": [(9, HIDDEN)],
            "embedding_fwd": [(40, HIDDEN)]}  # fmt: skip
    for name, shapes in rows.items():
        first = [tensors(node.meta["val"])[0] for one, node in found if one == name]
        assert [tuple(x.shape) for x in first] == shapes, (name, [x.shape for x in first])
        assert {x.dtype for x in first} == {torch.bfloat16}, name
    for name, node in found:
        if name.endswith("_fwd") and name not in ("bias_gelu_fwd", "masked_cross_entropy_fwd"):
            # mean and rstd, or the log-sum-exp
            assert {x.dtype for x in tensors(node.meta["val"])[1:] if x.is_floating_point()} == {torch.float32}, name


def check_the_step_is_one_graph_under_autocast():
    """fp32 parameters, 16-bit work: between the layers the stream stays in 16 bits."""
    for dtype in (torch.bfloat16, torch.float16):
        model = model_on_cuda()

        def loss(given, model=model, dtype=dtype):
            with torch.autocast("cuda", dtype):
                return model(given).loss

        found = graphs_of(model, loss, batch())
        assert counted([name for name, _ in found]).items() >= expected().items()
        assert_gradients(model)
        for name, node in found:
            if name in ("attention_fwd", "bias_gelu_fwd"):
                assert tensors(node.meta["val"])[0].dtype == dtype, name
        inside = [tensors(node.meta["val"])[0].dtype for name, node in found if name == "layer_norm_fwd"]
        assert set(inside) == {dtype}, inside


def check_ops_under_autocast_give_what_torch_gives():
    """Matrix products come in autocast's dtype, losses in fp32, GELU as it was given."""
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
    """Batches of one capacity share a graph whatever lengths they hold; other numbers of tokens do when marked so."""
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
        except (DataDependentOutputException, fake_tensor.DynamicOutputShapeException):
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


def main():
    install()
    print(INSTALLED, flush=True)
    results = {}
    for name, check in CHECKS.items():
        try:
            with FakeTensorMode():
                check()
            results[name] = ""
        except Exception:
            results[name] = traceback.format_exc()
    print(json.dumps(results))


if __name__ == "__main__":
    main()
