"""Host side of the kernels: registration, measured settings, dropout constants. No @triton.jit here."""

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

# Triton's own switch: kernels run on the CPU, slowly
INTERPRET = os.environ.get("TRITON_INTERPRET", "0") == "1"

_LIBRARY = torch.library.Library("fastbert", "FRAGMENT")


def register(schema, implementation, fake):
    """Register `implementation` as torch.ops.fastbert.<name>. `fake` gives the shapes and dtypes of its results."""
    name = schema.split("(")[0]

    def on_device_of(*arguments):
        # Triton launches on the current GPU, which may not be that of the tensors
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
    """Passes a gradient on and raises when it is differentiated."""

    @staticmethod
    def forward(ctx, gradient, name):
        ctx.name = name
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError(f"{ctx.name} has no second derivative: its backward is a kernel of its own")


def differentiable_once(name):
    """Decorator for the `backward` of an op's Function: differentiating its result raises a clear error."""

    def decorate(backward):
        @functools.wraps(backward)
        def once(ctx, *grads):
            with torch.no_grad():
                results = backward(ctx, *grads)
            if not torch.is_grad_enabled():
                return results
            # called with create_graph=True
            return tuple(x if x is None else _SecondDerivative.apply(x.requires_grad_(), name) for x in results)

        return once

    return decorate


# One file per device, written by benchmarks/tune.py: {"settings": {kernel: {key: {constant: value}}}, ...}
PROFILES = Path(__file__).resolve().parent / "profiles"
AUTOTUNE = os.environ.get("FASTBERT_AUTOTUNE", "0") == "1"

# what this process has timed: {kernel: {key: [(settings, microseconds, or None if they do not fit), ...]}}
timings = {}
# raised for too much shared memory or too many registers
DO_NOT_FIT = (errors.OutOfResources, errors.PTXASError, CompilationError)
# settings that are closer than this differ by noise only: keep the default
MARGIN = 0.97


@functools.cache
def profile_of(device):
    file = PROFILES / f"{device}.json"
    return json.loads(file.read_text(encoding="utf-8"))["settings"] if file.exists() else {}


def device_name():
    """The name of the current device's profile: "nvidia_h200"; "interpreter"; "none" if kernels only compile."""
    if INTERPRET:
        return "interpreter"
    return device_name_of(torch.cuda.current_device()) if _has_gpu() else "none"


# cached: every launch calls it, and it asks the driver
_has_gpu = functools.cache(torch.cuda.is_available)


@functools.cache
def device_name_of(index):
    return torch.cuda.get_device_name(index).lower().replace(" ", "_").replace("/", "_")


def launch(run, kernel, key, default, candidates=(), overwrites=()):
    """Call `run(settings)`, which launches a kernel, with the settings measured to be fastest on this device.

    kernel: op and pass, "layer_norm_bwd". key: a string with dtype and sizes; shapes with the same key share settings.
    default: a dict of block sizes, num_warps and num_stages, used without a measurement. candidates: dicts like it.
    With FASTBERT_AUTOTUNE=1 they are timed on the first call, else nothing is searched. overwrites: tensors that the
    kernel changes and that the search must restore.
    """
    profile = profile_of(device_name())
    settings = profile.get(kernel, {}).get(key)
    if settings is None and AUTOTUNE and candidates:
        settings = fastest(run, kernel, key, [default, *(c for c in candidates if c != default)], overwrites)
        profile.setdefault(kernel, {})[key] = settings
    # an old profile may hold settings that the kernel no longer offers
    if settings in candidates:
        try:
            return run(settings)
        except DO_NOT_FIT:
            # the profile was measured with another version of Triton
            profile[kernel][key] = default
    run(default)


def measured():
    """{kernel: {key: settings}} of the current device: its profile, and what autotuning has found since."""
    return profile_of(device_name())


def fastest(run, kernel, key, candidates, overwrites):
    kept = [x.clone() for x in overwrites]
    times = []
    for settings in candidates:
        try:
            times.append(microseconds(lambda: run(settings)))  # noqa: B023
        except DO_NOT_FIT:
            times.append(float("inf"))
    for x, old in zip(overwrites, kept):
        x.copy_(old)
    timings.setdefault(kernel, {})[key] = [(c, us if us < float("inf") else None) for c, us in zip(candidates, times)]
    best = times.index(min(times))
    return candidates[best if times[best] < MARGIN * times[0] else 0]


def microseconds(call):
    if INTERPRET:
        start = time.perf_counter()
        call()
        return (time.perf_counter() - start) * 1e6
    return triton.testing.do_bench(call, warmup=5, rep=25, return_mode="median") * 1e3


def multiprocessors():
    """The number of multiprocessors of the current device, from Triton's driver (which may be an offline one)."""
    if INTERPRET:
        return 4
    device = driver.active.get_current_device()
    return driver.active.utils.get_device_properties(device)["multiprocessor_count"]


def capability():
    """The compute capability for the choice of settings: 80, 90, ...; 0 if not NVIDIA's; 90 in the interpreter."""
    if INTERPRET:
        return 90
    arch = driver.active.get_current_target().arch
    if not isinstance(arch, int):
        return 0
    # 120 and 121, RTX cards, have Ada's matrix instructions and shared memory, not those of a B200
    return 89 if arch >= 120 else arch


def product_precision(dtype):
    """`tl.dot`'s name for torch's precision of fp32 products on a GPU: "tf32" or "ieee"."""
    if dtype != torch.float32:
        return "ieee"
    matmul = torch.backends.cuda.matmul
    # exists since torch 2.9; if it was set, reading allow_tf32 raises
    precision = getattr(matmul, "fp32_precision", None)
    if precision is None:
        precision = "tf32" if matmul.allow_tf32 else "ieee"
    return "tf32" if precision == "tf32" else "ieee"


def dropout_constants(dropout_p):
    """(threshold, scale): an element is kept if its 16 bits are at least the threshold, and is multiplied by scale."""
    threshold = round(dropout_p * 65536)
    return threshold, 65536 / max(65536 - threshold, 1)


def unit_columns(x):
    """x itself if the elements of a row are contiguous (rows may have any stride), else a copy."""
    return x if x.stride(-1) == 1 else x.contiguous()


def empty_like(argument, x):
    """A contiguous tensor for an argument's gradient, in its dtype; an empty one on x's device if it is None."""
    if argument is None:
        return torch.empty(0, dtype=x.dtype, device=x.device)
    return torch.empty(argument.shape, dtype=argument.dtype, device=argument.device)


# a whole row is in registers; longer rows spill in one kernel or another
MOST_COLUMNS = 8192


def row_tiles(D, itemsize):
    """Launch settings of a kernel with whole rows in registers: BLOCK_T rows as TILES tiles [BLOCK_T, BLOCK_D].

    A thread has 16 bytes of a tile, in adjacent columns. Up to 256 columns in half precision, a warp has a whole row
    and no reduction leaves the warp. 768 is 3 x 256 and 384 is 3 x 128, so no lane idles. Raises ValueError for rows of
    more than MOST_COLUMNS.
    """
    if D > MOST_COLUMNS:
        raise ValueError(f"rows have {D} columns: the kernels take at most {MOST_COLUMNS}, impl='reference' any number")
    whole = triton.next_power_of_2(max(D, 16))
    largest = max(min(whole, 256), whole // 4)
    BLOCK_D = min(largest, largest // 2, key=lambda block: (triton.cdiv(D, block) * block, -block))
    BLOCK_T = max(1024 // BLOCK_D, 1)
    TILES = triton.cdiv(D, BLOCK_D)
    num_warps = min(BLOCK_T * BLOCK_D * itemsize // 512, 16)
    return dict(BLOCK_T=BLOCK_T, BLOCK_D=BLOCK_D, TILES=TILES, num_warps=num_warps)


@functools.cache
def row_settings(D, itemsize, **more):
    """(default, candidates) for `launch`. The default is row_tiles and `more`. Candidates have as many rows on more or
    fewer warps, or half or twice as many rows on half or twice as many warps."""
    default = {**row_tiles(D, itemsize), **more}
    BLOCK_T, num_warps = default["BLOCK_T"], default["num_warps"]
    sizes = [(BLOCK_T, 2 * num_warps), (BLOCK_T, num_warps // 2), (2 * BLOCK_T, 2 * num_warps)]
    sizes += [(BLOCK_T // 2, num_warps // 2), (BLOCK_T // 4, num_warps // 4)]
    others = [{**default, "BLOCK_T": rows, "num_warps": warps} for rows, warps in sizes if rows and 1 <= warps <= 16]
    return default, (default, *others)


@functools.cache
def walk_settings(D, itemsize, PROGRAMS, STAGES=1):
    """row_settings of a kernel whose programs loop over the rows, with PROGRAMS programs per multiprocessor, or more
    with fewer rows per program. Other candidates have fewer or more programs, or loads a stage or two ahead of the
    arithmetic."""
    default, sizes = row_settings(D, itemsize, STAGES=STAGES)
    sizes = [{**s, "PROGRAMS": max(PROGRAMS * default["BLOCK_T"] // s["BLOCK_T"], 1)} for s in sizes]
    default = sizes[0]
    programs = ({**default, "PROGRAMS": n} for n in (1, 3, 4) if n != PROGRAMS)
    return default, (*sizes, *programs, *({**default, "STAGES": n} for n in (1, 2, 3) if n != STAGES))


def shape_key(x, *sizes):
    """The key for `launch` if settings depend on x's dtype and on `sizes`: "bfloat16 768"."""
    return " ".join((str(x.dtype).removeprefix("torch."), *map(str, sizes)))


def row_align(*tensors):
    """The largest power of two, up to 16, that divides the row stride of every tensor that is not None."""
    return math.gcd(16, *(x.stride(0) for x in tensors if x is not None))


def row_stride(x):
    return 0 if x is None else x.stride(0)


def row_programs(T, BLOCK_T, most):
    """The number of programs for T rows in a kernel with partial sums of the columns.

    At most `most` per multiprocessor, so that all run at once. Few rows get one program per multiprocessor, and more
    only if each has four blocks: partial sums are written and read again, and would cost more than the rows.
    """
    blocks, places = triton.cdiv(T, BLOCK_T), multiprocessors()
    return min(blocks, most * places, max(places, triton.cdiv(blocks, 4)))
