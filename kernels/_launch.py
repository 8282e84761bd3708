"""Host side, shared by the kernels: registration, the dropout's constants, block sizes. No @triton.jit here."""

import os

import torch
import triton
from triton.runtime import driver

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


def multiprocessors():
    """How many multiprocessors the current device has, by Triton's driver (which may be an offline one)."""
    if INTERPRET:
        return 4
    device = driver.active.get_current_device()
    return driver.active.utils.get_device_properties(device)["multiprocessor_count"]


def capability():
    """The current NVIDIA device's compute capability as 80, 90, ...; 0 for other makes. The interpreter plays a 90."""
    if INTERPRET:
        return 90
    arch = driver.active.get_current_target().arch
    return arch if isinstance(arch, int) else 0


def dropout_constants(dropout_p):
    """(threshold, scale): an element is kept when its 16 bits reach the threshold, and is then multiplied by scale."""
    threshold = round(dropout_p * 65536)
    return threshold, 65536 / max(65536 - threshold, 1)


def unit_columns(x):
    """x itself when the elements of a row lie side by side (rows may lie anywhere, even on each other), else a copy."""
    return x if x.stride(-1) == 1 else x.contiguous()


def row_tiles(D, itemsize):
    """Launch settings of a kernel that holds whole rows: BLOCK_T rows as TILES tiles [BLOCK_T, BLOCK_D].

    A thread holds 16 bytes of a tile, neighbouring columns: up to 256 columns of half precision, a warp has a row to
    itself and no reduction leaves the warp. 768 is 3 x 256 and 384 is 3 x 128: no lane idles.
    """
    whole = triton.next_power_of_2(max(D, 16))
    largest = max(min(whole, 256), whole // 4)
    BLOCK_D = min(largest, largest // 2, key=lambda block: (triton.cdiv(D, block) * block, -block))
    BLOCK_T = max(1024 // BLOCK_D, 1)
    TILES = triton.cdiv(D, BLOCK_D)
    return dict(BLOCK_T=BLOCK_T, BLOCK_D=BLOCK_D, TILES=TILES, num_warps=BLOCK_T * BLOCK_D * itemsize // 512)


def row_programs(T, BLOCK_T):
    """How many programs share T rows, for a kernel that holds whole rows and keeps partial sums of the columns.

    Two for each multiprocessor: their registers allow no third everywhere, and a second wave would double the time.
    """
    return min(triton.cdiv(T, BLOCK_T), 2 * multiprocessors())
