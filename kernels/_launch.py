"""Host side, shared by the kernels: registration, measured settings, the dropout's constants. No @triton.jit here."""

import functools
import json
import math
import os
import time
from pathlib import Path

import torch
import triton
from triton.compiler.errors import CompilationError
from triton.runtime import driver, errors

INTERPRET = os.environ.get("TRITON_INTERPRET", "0") == "1"  # Triton's own switch: kernels run on the CPU, slowly

_LIBRARY = torch.library.Library("fastbert", "FRAGMENT")


def register(schema, implementation, fake):
    """Make `implementation` the operator torch.ops.fastbert.<name>; `fake` gives its results' shapes and dtypes."""
    name = schema.split("(")[0]

    def on_device_of(*arguments):
        # Triton launches on the current GPU, which need not be the tensors'
        device = next(x.device for x in arguments if isinstance(x, torch.Tensor))
        if device.type != "cuda" or device.index == torch.cuda.current_device():
            return implementation(*arguments)
        with torch.cuda.device(device):
            return implementation(*arguments)

    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, on_device_of, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fastbert::{name}", fake, lib=_LIBRARY)
    return getattr(torch.ops.fastbert, name)


class _SecondDerivative(torch.autograd.Function):
    """Passes a gradient on, and refuses to be differentiated."""

    @staticmethod
    def forward(ctx, gradient, name):
        ctx.name = name
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError(f"{ctx.name} has no second derivative: its backward is a kernel of its own")


def differentiable_once(name):
    """Decorates the `backward` of op `name`'s Function: differentiating its result raises an error that says so."""

    def decorate(backward):
        @functools.wraps(backward)
        def once(ctx, *grads):
            with torch.no_grad():
                results = backward(ctx, *grads)
            if not torch.is_grad_enabled():
                return results
            # somebody asked for create_graph=True
            return tuple(x if x is None else _SecondDerivative.apply(x.requires_grad_(), name) for x in results)

        return once

    return decorate


# One file per device, written by benchmarks/tune.py: {"settings": {kernel: {key: {constant: value}}}, ...}
PROFILES = Path(__file__).resolve().parent / "profiles"
AUTOTUNE = os.environ.get("FASTBERT_AUTOTUNE", "0") == "1"

# what this process has timed: {kernel: {key: [(settings, microseconds or None where they do not fit), ...]}}
timings = {}
# too much shared memory or too many registers for this device
_DO_NOT_FIT = (errors.OutOfResources, errors.PTXASError, CompilationError)
# two settings closer than this are the same to within the noise of a timing: the default stays
MARGIN = 0.97


@functools.cache
def _profile(device):
    file = PROFILES / f"{device}.json"
    return json.loads(file.read_text(encoding="utf-8"))["settings"] if file.exists() else {}


def device_name():
    """The current device as its profile is named: "nvidia_h200"; "interpreter"; "none" where kernels only compile."""
    if INTERPRET:
        return "interpreter"
    return _device_name(torch.cuda.current_device()) if _has_gpu() else "none"


# asked before every launch, and it asks the driver
_has_gpu = functools.cache(torch.cuda.is_available)


@functools.cache
def _device_name(index):
    return torch.cuda.get_device_name(index).lower().replace(" ", "_").replace("/", "_")


def launch(run, kernel, key, default, candidates=(), overwrites=()):
    """Call `run(settings)`, which launches a kernel, with the settings measured to be fastest on this device.

    kernel: the op and its pass, "layer_norm_bwd". key: the class of shapes, a string with dtype and sizes, that shares
    settings. Without a measurement `default`, a dict of block sizes, num_warps and num_stages, is used. Nothing is
    searched, unless FASTBERT_AUTOTUNE=1: then `candidates`, dicts like it, are timed with `default` on the first call.
    overwrites: tensors that the kernel changes and that its other runs need as they were.
    """
    profile = _profile(device_name())
    settings = profile.get(kernel, {}).get(key)
    if settings is None and AUTOTUNE and candidates:
        settings = _fastest(run, kernel, key, [default, *(c for c in candidates if c != default)], overwrites)
        profile.setdefault(kernel, {})[key] = settings
    # a profile older than the kernel may hold what the kernel no longer offers
    if settings in candidates:
        try:
            return run(settings)
        except _DO_NOT_FIT:
            # measured with another version of Triton
            profile[kernel][key] = default
    run(default)


def measured():
    """{kernel: {key: settings}} of the current device: what its profile holds and what was found since."""
    return _profile(device_name())


def _fastest(run, kernel, key, candidates, overwrites):
    kept = [x.clone() for x in overwrites]
    times = []
    for settings in candidates:
        try:
            times.append(_microseconds(lambda: run(settings)))  # noqa: B023
        except _DO_NOT_FIT:
            times.append(float("inf"))
    for x, old in zip(overwrites, kept):
        x.copy_(old)
    timings.setdefault(kernel, {})[key] = [(c, us if us < float("inf") else None) for c, us in zip(candidates, times)]
    best = times.index(min(times))
    return candidates[best if times[best] < MARGIN * times[0] else 0]


def _microseconds(call):
    if INTERPRET:
        start = time.perf_counter()
        call()
        return (time.perf_counter() - start) * 1e6
    return triton.testing.do_bench(call, warmup=5, rep=25, return_mode="median") * 1e3


def multiprocessors():
    """How many multiprocessors the current device has, by Triton's driver (which may be an offline one)."""
    if INTERPRET:
        return 4
    device = driver.active.get_current_device()
    return driver.active.utils.get_device_properties(device)["multiprocessor_count"]


def capability():
    """The compute capability that settings go by, as 80, 90, ...; 0 where it is not NVIDIA's. The interpreter: 90."""
    if INTERPRET:
        return 90
    arch = driver.active.get_current_target().arch
    if not isinstance(arch, int):
        return 0
    # 120 and 121, RTX cards, have the instructions for products and the shared memory of Ada's, not of a B200
    return 89 if arch >= 120 else arch


def product_precision(dtype):
    """What `tl.dot` calls torch's switch for products of fp32 on a GPU: "tf32" or "ieee". It counts for fp32 alone."""
    if dtype != torch.float32:
        return "ieee"
    matmul = torch.backends.cuda.matmul
    # torch 2.9 on: whichever of the two was set; allow_tf32 then raises if it was this one
    precision = getattr(matmul, "fp32_precision", None)
    if precision is None:
        precision = "tf32" if matmul.allow_tf32 else "ieee"
    return "tf32" if precision == "tf32" else "ieee"


def dropout_constants(dropout_p):
    """(threshold, scale): an element is kept when its 16 bits reach the threshold, and is then multiplied by scale."""
    threshold = round(dropout_p * 65536)
    return threshold, 65536 / max(65536 - threshold, 1)


def unit_columns(x):
    """x itself when the elements of a row lie side by side (rows may lie anywhere, even on each other), else a copy."""
    return x if x.stride(-1) == 1 else x.contiguous()


def empty_like(argument, x):
    """Room for an argument's gradient, contiguous, in its dtype. Without that argument (None): nothing, beside x."""
    if argument is None:
        return torch.empty(0, dtype=x.dtype, device=x.device)
    return torch.empty(argument.shape, dtype=argument.dtype, device=argument.device)


# a row is held in registers whole; beyond this they overflow, in one kernel or another
MOST_COLUMNS = 8192


def row_tiles(D, itemsize):
    """Launch settings of a kernel that holds whole rows: BLOCK_T rows as TILES tiles [BLOCK_T, BLOCK_D].

    A thread holds 16 bytes of a tile, neighbouring columns: up to 256 columns of half precision, a warp has a row to
    itself and no reduction leaves the warp. 768 is 3 x 256 and 384 is 3 x 128: no lane idles. Raises ValueError for
    rows of more than MOST_COLUMNS.
    """
    if D > MOST_COLUMNS:
        raise ValueError(f"rows of {D} columns: the kernels hold at most {MOST_COLUMNS}; impl='reference' takes any")
    whole = triton.next_power_of_2(max(D, 16))
    largest = max(min(whole, 256), whole // 4)
    BLOCK_D = min(largest, largest // 2, key=lambda block: (triton.cdiv(D, block) * block, -block))
    BLOCK_T = max(1024 // BLOCK_D, 1)
    TILES = triton.cdiv(D, BLOCK_D)
    num_warps = min(BLOCK_T * BLOCK_D * itemsize // 512, 16)
    return dict(BLOCK_T=BLOCK_T, BLOCK_D=BLOCK_D, TILES=TILES, num_warps=num_warps)


@functools.cache
def row_settings(D, itemsize, **more):
    """(default, candidates) for `launch`: row_tiles and `more`; beside it, as many rows on more or on fewer warps, and
    half or twice as many rows on half or twice as many warps."""
    default = {**row_tiles(D, itemsize), **more}
    BLOCK_T, num_warps = default["BLOCK_T"], default["num_warps"]
    sizes = [(BLOCK_T, 2 * num_warps), (BLOCK_T, num_warps // 2), (2 * BLOCK_T, 2 * num_warps)]
    sizes += [(BLOCK_T // 2, num_warps // 2), (BLOCK_T // 4, num_warps // 4)]
    others = [{**default, "BLOCK_T": rows, "num_warps": warps} for rows, warps in sizes if rows and 1 <= warps <= 16]
    return default, (default, *others)


@functools.cache
def walk_settings(D, itemsize, PROGRAMS, STAGES=1):
    """row_settings of a kernel whose programs walk over the rows, PROGRAMS of them for each multiprocessor; with fewer
    rows in a program, more programs. Also tried: fewer or more programs of the same kind, and loads that run ahead of
    the arithmetic by a stage or two."""
    default, sizes = row_settings(D, itemsize, STAGES=STAGES)
    sizes = [{**s, "PROGRAMS": max(PROGRAMS * default["BLOCK_T"] // s["BLOCK_T"], 1)} for s in sizes]
    default = sizes[0]
    programs = ({**default, "PROGRAMS": n} for n in (1, 3, 4) if n != PROGRAMS)
    return default, (*sizes, *programs, *({**default, "STAGES": n} for n in (1, 2, 3) if n != STAGES))


def shape_key(x, *sizes):
    """The key of `launch` for a kernel whose settings depend on x's dtype and on `sizes`: "bfloat16 768"."""
    return " ".join((str(x.dtype).removeprefix("torch."), *map(str, sizes)))


def row_align(*tensors):
    """The largest power of two, up to 16, that divides the row stride of every tensor (None: does not count)."""
    return math.gcd(16, *(x.stride(0) for x in tensors if x is not None))


def row_stride(x):
    return 0 if x is None else x.stride(0)


def row_programs(T, BLOCK_T, most):
    """How many programs share T rows, for a kernel that keeps partial sums of the columns: at most `most` for each
    multiprocessor, so that all run at once.

    Few rows get one a multiprocessor, and more only where each has four blocks to walk: partial sums are written and
    read again, and would outweigh the rows.
    """
    blocks, places = triton.cdiv(T, BLOCK_T), multiprocessors()
    return min(blocks, most * places, max(places, triton.cdiv(blocks, 4)))
