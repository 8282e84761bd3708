"""Fake CUDA tensors that can be differentiated: shapes, dtypes and devices as on a GPU, without data and without a GPU.

A torch built without CUDA refuses to differentiate them. fake_cuda.cpp, compiled here in seconds, lets it, in a process
of its own: see test_fake_cuda.py.
"""

import ctypes
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch
import torch._subclasses.fake_tensor as fake_tensor
from torch._subclasses.fake_tensor import FakeTensorMode


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
        command = [
            compiler, "-O1", "-std=c++20", "-fPIC", "-shared", str(source),
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
