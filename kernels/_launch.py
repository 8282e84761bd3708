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
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fastbert::{name}", fake, lib=_LIBRARY)
    return getattr(torch.ops.fastbert, name)


def multiprocessors():
    """How many multiprocessors the current device has, by Triton's driver (which may be an offline one)."""
    if INTERPRET:
        return 4
    device = driver.active.get_current_device()
    return driver.active.utils.get_device_properties(device)["multiprocessor_count"]


def dropout_constants(dropout_p):
    """(threshold, scale): an element is kept when its 16 bits reach the threshold, and is then multiplied by scale."""
    threshold = round(dropout_p * 65536)
    return threshold, 65536 / max(65536 - threshold, 1)


def tiles(size, largest):
    """(block, count): powers of two of at most `largest` that cover `size` with the least waste, the larger first."""
    block = min(triton.next_power_of_2(size), largest)
    while block > 64 and triton.cdiv(size, block // 2) * (block // 2) < triton.cdiv(size, block) * block:
        block //= 2
    return block, triton.cdiv(size, block)
