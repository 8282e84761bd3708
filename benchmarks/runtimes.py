"""What else runs a trained model on a CPU, and how: transformers, torch.compile, ONNX Runtime, OpenVINO.

Each is a function (ids, mask) -> the result in float32, both arguments int64 [B, S]. mask: 0 at padding. Each is in the
strongest setting found:

transformers            sdpa where the model has it, else eager; no mask where nothing is padded
torch.compile           the same, compiled for all lengths
ONNX Runtime            exported with eager attention, whose nodes its optimizer for transformers fuses; every
                        optimization of graphs. int8: dynamic, the weights by channels
OpenVINO                converted from PyTorch, tuned for latency. bf16: by its hint
"""

import importlib.util
import logging
import os
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

# how ours are asked for each class of precision, and the smallest cosine of any text to float32 that it allows
PRECISIONS = {"float32": "fp32", "bfloat16": "bf16", "int8": "int8"}
COSINE = {"float32": 0.99999, "bfloat16": 0.999, "int8": 0.99}


@dataclass
class Exported:
    """A model of transformers' in evaluation mode, and the folder for what is made of it.

    pick: its output -> the tensor that is wanted. The float32 graphs are made once, whatever the number of threads.
    """

    module: nn.Module
    folder: Path
    pick: object
    attention: str = "sdpa"

    def onnx(self, precision):
        """The path of a graph for ONNX Runtime."""
        plain, fused, small = (self.folder / f"{name}.onnx" for name in ("plain", "fused", "int8"))
        if not fused.exists():
            self._export(plain)
            from onnxruntime.transformers import optimizer

            # the names of its fusions: most families have BERT's parts
            config = self.module.config
            settings = dict(num_heads=config.num_attention_heads, hidden_size=config.hidden_size, opt_level=1)
            optimizer.optimize_model(str(plain), model_type="bert", **settings).save_model_to_file(str(fused))
        if precision == "int8" and not small.exists():
            from onnx import TensorProto
            from onnxruntime.quantization import QuantType, quantize_dynamic

            # ONNX does not know the types of what the fused nodes return
            extra = {"DefaultTensorType": TensorProto.FLOAT}
            quantize_dynamic(fused, small, per_channel=True, weight_type=QuantType.QInt8, extra_options=extra)
        return small if precision == "int8" else fused

    def _export(self, path):
        ids, mask = self._example()
        axes = {name: {0: "B", 1: "S"} for name in ("ids", "mask")} | {"out": {0: "B"}}
        self.module.set_attn_implementation("eager")
        try:
            with _quiet(), torch.no_grad():
                torch.onnx.export(
                    _Call(self).eval(), (ids, mask), str(path), input_names=["ids", "mask"], output_names=["out"],
                    dynamic_axes=axes, opset_version=17, dynamo=False,
                )  # fmt: skip
        finally:
            self.module.set_attn_implementation(self.attention)

    def openvino(self):
        """The path of a model for OpenVINO."""
        path = self.folder / "openvino.xml"
        if not path.exists():
            import openvino

            with _quiet(), torch.no_grad():
                converted = openvino.convert_model(_Call(self).eval(), example_input=self._example())
            openvino.save_model(converted, path, compress_to_fp16=False)
        return path

    @staticmethod
    def _example():
        # one with padding, so that no branch without a mask is traced
        ids, mask = torch.full((2, 16), 7), torch.ones(2, 16, dtype=torch.int64)
        mask[1, 10:] = 0
        return ids, mask


class _Call(nn.Module):
    """Of two arguments, one result."""

    def __init__(self, exported):
        super().__init__()
        self.module, self.pick = exported.module, exported.pick

    def forward(self, ids, mask):
        return self.pick(self.module(input_ids=ids, attention_mask=mask))


class _quiet(warnings.catch_warnings):
    """Within it, what is traced tells of no branch that it takes."""

    def __enter__(self):
        found = super().__enter__()
        warnings.simplefilter("ignore")
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)
        return found


def by_transformers(exported, precision, threads):
    """With transformers' own modules, in bf16 converted."""
    module = exported.module
    if precision == "bfloat16":
        import copy

        module = copy.deepcopy(module).to(torch.bfloat16)
    return _by_module(module, exported.pick)


def compiled(exported, precision, threads):
    import torch._inductor.config

    # the number of threads is in the code that it makes, and in the key of its cache
    torch._inductor.config.cpp.threads = threads
    torch._dynamo.reset()
    return _by_module(torch.compile(exported.module, dynamic=True), exported.pick)


def _by_module(run, pick):
    @torch.inference_mode()
    def call(ids, mask):
        return pick(run(input_ids=ids, attention_mask=None if mask.all() else mask)).float()

    return call


def onnx_runtime(exported, precision, threads):
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    session = onnxruntime.InferenceSession(str(exported.onnx(precision)), options, providers=["CPUExecutionProvider"])

    def call(ids, mask):
        return torch.from_numpy(session.run(None, {"ids": ids.numpy(), "mask": mask.numpy()})[0])

    return call


def openvino(exported, precision, threads):
    import openvino as ov

    settings = {
        "INFERENCE_PRECISION_HINT": {"float32": "f32", "bfloat16": "bf16"}[precision], "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": threads,
    }  # fmt: skip
    request = ov.compile_model(str(exported.openvino()), "CPU", settings).create_infer_request()

    def call(ids, mask):
        # a copy: the next call writes over the result
        out = request.infer([ids.numpy(), mask.numpy()], share_inputs=True)
        return torch.from_numpy(out[0])

    return call


@dataclass(frozen=True)
class Peer:
    """make: (Exported, precision, threads) -> a function (ids, mask) -> result. package: what it needs."""

    name: str
    make: object
    precisions: tuple
    package: str = "transformers"


PEERS = (
    Peer("transformers", by_transformers, ("float32", "bfloat16")),
    Peer("torch.compile", compiled, ("float32",)),
    Peer("ONNX Runtime", onnx_runtime, ("float32", "int8"), "onnxruntime"),
    Peer("OpenVINO", openvino, ("float32", "bfloat16"), "openvino"),
)


def peers(precision, not_measured, but=()):
    """Those for a class of precision whose package is installed; the others are named in not_measured."""
    found = []
    for peer in PEERS:
        if precision not in peer.precisions or peer.name in but:
            continue
        needed = [peer.package] + ["onnx"] * (peer.package == "onnxruntime")
        missing = [name for name in needed if importlib.util.find_spec(name) is None]
        if missing:
            not_measured[peer.name] = f"{missing[0]} is not installed"
        else:
            found.append(peer)
    return found


def versions():
    """{package: version} of those that are installed."""
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for name in ("transformers", "sentence-transformers", "onnxruntime", "openvino"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


# OpenVINO sends usage data otherwise
os.environ.setdefault("OPENVINO_TELEMETRY_DISABLED", "1")
