"""What this machine offers, and what fastbert makes of it."""

import inspect
import platform

import torch

from . import ops, reference
from .report import versions


def doctor():
    """Lines for a person: versions, the device, the GPU and Triton, and which implementation each op would use."""
    lines = [f"{name} {number}" for name, number in versions().items()]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    lines.append(f"machine: {platform.machine()}, {platform.system()}, {torch.get_num_threads()} threads")
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        lines.append(f"GPU: {properties.name}, {properties.total_memory / 1e9:.0f} GB")
    else:
        lines.append("GPU: PyTorch finds none")
    lines.append(f"Triton: {'found' if ops.has_triton() else 'not installed'}")
    lines.append(f"FASTBERT_IMPL: {ops.IMPL}")
    for name, op in vars(ops).items():
        if inspect.isfunction(op) and not name.startswith("_") and hasattr(reference, name):
            lines.append(f"ops.{name}: {_implementation(device)}")
    return lines


def _implementation(device):
    try:
        return "Triton kernels" if ops.uses_triton(device) else "plain PyTorch"
    except RuntimeError as error:
        return f"fails, {error}"
