"""A training script's device, the other processes of its run, and the signals that end it."""

import contextlib
import os
import signal
import threading

import torch
import torch.distributed as dist

from .. import ops


def device_of(name):
    """The torch.device of --device. Under torchrun each process has its own GPU. Raises ValueError."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except (RuntimeError, ValueError, OverflowError):
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise ValueError(f"--device is {name!r}: expected auto, cpu, cuda or cuda:1")
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    if device.type == "cuda" and (not torch.cuda.is_available() or device.index >= max(torch.cuda.device_count(), 1)):
        raise ValueError(f"--device is {name!r}: PyTorch finds no such GPU")
    return device


DTYPES = ("auto", "fp32", "bf16")


def dtype_of(config, device, resumed, state, say):
    """ "fp32" or "bf16", what matrix products run in: a resumed run's own, or what --dtype says or means on `device`.

    resumed: the checkpoint's path, or None. state: see `checkpoint.read_state`. say: is told what --dtype auto means
    where that is no default, and that bf16 was asked for in vain. All processes take the first one's. Raises ValueError
    where --dtype is not the checkpoint's.
    """
    if state is not None:
        # older checkpoints say bf16: true or false
        then = state["config"].get("dtype") or ("bf16" if state["config"].get("bf16") else "fp32")
        if config.dtype not in ("auto", then):
            raise ValueError(f"--resume: --dtype is {config.dtype!r}, but {then!r} in {resumed}")
        return then
    if device.type == "cuda":
        is_faster = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        is_faster = ops.low_precision.chosen("auto") == "bf16"
    (is_faster,) = total(is_faster if join()[0] == 0 else False)
    if config.dtype == "bf16" and not is_faster:
        say("--dtype bf16: bf16 is not faster than fp32 on this machine")
    if config.dtype != "auto":
        return config.dtype
    dtype = "bf16" if is_faster else "fp32"
    if is_faster or type(config).dtype != "auto":
        say(f"--dtype auto: matrix products run in {dtype}")
    return dtype


def join():
    """(rank, world size). Joins the other processes if torchrun's environment is set."""
    if not dist.is_initialized() and int(os.environ.get("WORLD_SIZE", 1)) > 1:
        dist.init_process_group()
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def total(*numbers):
    """The sums of these numbers over all processes."""
    if not dist.is_initialized():
        return numbers
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    sums = torch.tensor(numbers, dtype=torch.float64, device=device)
    dist.all_reduce(sums)
    return sums.tolist()


def add_gradients(model):
    """Replace every gradient by its sum over all processes. A missing one counts as 0; frozen parameters have none."""
    if not dist.is_initialized():
        return
    for parameter in (parameter for parameter in model.parameters() if parameter.requires_grad):
        parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        dist.all_reduce(parameter.grad)


@contextlib.contextmanager
def first_process_first(rank):
    """The other processes enter after the first has left."""
    if rank > 0:
        dist.barrier()
    yield
    if rank == 0 and dist.is_initialized():
        dist.barrier()


@contextlib.contextmanager
def signals():
    """Yields a list that collects SIGTERM and SIGINT. A second signal has its usual effect."""
    caught, before, wakeup = [], {}, -1

    def note(number, frame):
        caught.append(number)
        restore()

    def restore():
        for number, handler in before.items():
            signal.signal(number, handler)
        if before:
            signal.set_wakeup_fd(wakeup)

    # only the main thread may set handlers; in other threads the caller handles signals
    if threading.current_thread() is threading.main_thread():
        # a step may take long: nobody else is told of a signal meanwhile
        wakeup = signal.set_wakeup_fd(-1)
        before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield caught
    finally:
        restore()
