"""A CPU that says it is a GPU, so that the tests reach what benchmarks do on a GPU only.

`torch.device("cuda")` means the CPU wherever a function of torch is given a device: tensors have data and say that they
are on the CPU, scripts see a device of type "cuda". Streams, events, memory and properties are made up. Kernels do not
run: ops are plain PyTorch. No time means anything. fake_cuda.py is the other half: tensors on CUDA, without data.
"""

import contextlib
import time
from types import SimpleNamespace
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode

CPU = torch.device("cpu")
GIB = 2**30
NAME = "Pretended H200"


class OnTheCPU(TorchFunctionMode):
    """A device of type "cuda" among a function's arguments becomes the CPU."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.device:
            return function(*args, **(kwargs or {}))
        return function(*map(_here, args), **{name: _here(x) for name, x in (kwargs or {}).items()})


def _here(x):
    if isinstance(x, torch.device) and x.type == "cuda":
        return CPU
    return "cpu" if isinstance(x, str) and x.partition(":")[0] == "cuda" else x


class Stream:
    """The time of a device that works while the host goes on: it is ready at `until`."""

    until = 0.0
    # what each call of a function of this module was given
    log = []

    @classmethod
    def sleep(cls, cycles):
        cls.log.append(("sleep", cycles))
        # 1e9 a second
        cls.until = max(cls.until, time.perf_counter()) + cycles / 1e9

    @classmethod
    def synchronize(cls, device=None):
        cls.log.append(("synchronize",))
        time.sleep(max(cls.until - time.perf_counter(), 0))


class Event:
    def __init__(self, enable_timing=False):
        assert enable_timing

    def record(self):
        # the device gets here when it has slept, and when the host has come here
        # and nothing takes no time
        self.at = Stream.until = max(Stream.until, time.perf_counter()) + 1e-6

    def query(self):
        return time.perf_counter() >= self.at

    def elapsed_time(self, other):
        assert time.perf_counter() >= other.at, "the device has not got there yet"
        return (other.at - self.at) * 1e3


def properties(gib=140):
    return SimpleNamespace(
        name=NAME, total_memory=gib * GIB, multi_processor_count=132, major=9, minor=0, L2_cache_size=50 * 2**20
    )


@contextlib.contextmanager
def pretending(gib=140):
    """torch.cuda as of one idle GPU with so many GiB, of which nine tenths are free."""
    made_up = {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "get_device_name": lambda *_: NAME,
        "get_device_properties": lambda *_: properties(gib),
        "get_device_capability": lambda *_: (9, 0),
        "mem_get_info": lambda *_: (gib * GIB * 9 // 10, gib * GIB),
        "memory_allocated": lambda *_: GIB,
        "max_memory_allocated": lambda *_: 3 * GIB,
        "reset_peak_memory_stats": lambda *_: Stream.log.append(("reset",)),
        "empty_cache": lambda: None,
        "manual_seed_all": lambda seed: None,
        "is_bf16_supported": lambda *_, **__: True,
        "synchronize": Stream.synchronize,
        "_sleep": Stream.sleep,
        "Event": Event,
    }
    Stream.log.clear()
    with contextlib.ExitStack() as stack:
        for name, value in made_up.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, value))
        stack.enter_context(mock.patch.object(torch.version, "cuda", "13.0"))
        stack.enter_context(OnTheCPU())
        yield


@contextlib.contextmanager
def small():
    """The models of benchmarks with few columns and layers."""
    import machine
    import model_pairs

    from fastbert.proof import op_cases

    with contextlib.ExitStack() as stack:
        for sizes, size in ((machine.COPIED, 2**16), (machine.SIDE, 64), (machine.COLD, 2**10)):
            stack.enter_context(mock.patch.dict(sizes, cuda=size))
        models = dict.fromkeys(op_cases.MODELS, dict(D=32, H=2, F=40, V=1100, R=4))
        stack.enter_context(mock.patch.object(op_cases, "MODELS", models))
        for name in ("ragged_lengths", "full_lengths"):
            make = getattr(op_cases, name)

            def few(tokens, longest, make=make):
                return make(max(tokens // 64, 2 * longest), longest)

            stack.enter_context(mock.patch.object(op_cases, name, few))
        config_of = model_pairs.config_of
        sizes = dict(hidden_size=64, num_attention_heads=2, intermediate_size=96)

        def narrow(model, layers, dropout):
            config = config_of(model, min(layers or 2, 2), dropout)
            return config.replace(**sizes, embedding_size=64 if config.embedding_size else None)

        stack.enter_context(mock.patch.object(model_pairs, "config_of", narrow))
        yield
