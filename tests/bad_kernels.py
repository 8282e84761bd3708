"""Kernels with a fault each, compiled without a GPU; prints what the report says of them, one JSON object.

A process of its own: Triton decides between compiler and interpreter when it is imported.
"""

import json
import sys
from pathlib import Path

import torch
import triton
import triton.language as tl

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from fastbert.proof import offline


@triton.jit
def _spilling_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):
    # a thread would hold 512 values
    offs = tl.arange(0, BLOCK)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    x = tl.load(x_ptr + offs)
    tl.store(y_ptr + offs, tl.exp(x) / tl.sum(x, 1)[:, None] + tl.sum(x, 0)[None, :])


@triton.jit
def _atomic_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    tl.atomic_add(y_ptr + offs, tl.load(x_ptr + tl.program_id(0) * BLOCK + offs))


@triton.jit
def _narrow_kernel(x_ptr, y_ptr, D, BLOCK: tl.constexpr):
    # the size is no multiple of 16, and not known to the compiler
    offs = tl.arange(0, BLOCK)
    tl.store(y_ptr + offs, tl.load(x_ptr + offs, mask=offs < D), mask=offs < D)


@triton.jit
def _overflowing_kernel(x_ptr, y_ptr, stride, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * stride + tl.arange(0, BLOCK)
    tl.store(y_ptr + offs, tl.load(x_ptr + offs))


@triton.jit
def _product_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr, PRECISION: tl.constexpr):
    offs = tl.arange(0, BLOCK)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    x = tl.load(x_ptr + offs)
    for _ in range(8):
        y = tl.dot(x, tl.trans(x), input_precision=PRECISION)
        x = (tl.exp2(y) * y + 1.0).to(x.dtype)
    tl.store(y_ptr + offs, x)


@triton.jit
def _serialised_kernel(x_ptr, y_ptr, rows, BLOCK: tl.constexpr, IS_AWAITED: tl.constexpr):
    # two sums of products at once, each with a factor from a product of the same iteration
    offs = tl.arange(0, BLOCK)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    y = tl.load(y_ptr + offs)
    a = tl.zeros([BLOCK, BLOCK], tl.float32)
    b = tl.zeros([BLOCK, BLOCK], tl.float32)
    for m in range(0, rows, BLOCK):
        if IS_AWAITED:
            # times a 1 that the compiler cannot see
            b *= 1.0 + 0.0 * rows
        x = tl.load(x_ptr + m * BLOCK + offs)
        s = tl.dot(x, tl.trans(y))
        p = tl.exp2(s)
        a = tl.dot(tl.trans(p.to(x.dtype)), x, a)
        b = tl.dot(tl.trans((p * s).to(x.dtype)), x, b)
    tl.store(y_ptr + offs, (a * b).to(y.dtype))


@triton.jit
def _good_kernel(x_ptr, y_ptr, stride, BLOCK: tl.constexpr):
    offs = tl.program_id(0).to(tl.int64) * stride + tl.arange(0, BLOCK)
    tl.store(y_ptr + offs, tl.load(x_ptr + offs))


def full(*shape, dtype=torch.float32):
    return torch.empty(shape, dtype=dtype, device="meta")


def product(size, dtype, precision):
    _product_kernel[(1,)](full(size, size, dtype=dtype), full(size, size, dtype=dtype), BLOCK=size, PRECISION=precision)


def two_sums(is_awaited):
    x, y = full(512, 64, dtype=half), full(64, 64, dtype=half)
    _serialised_kernel[(1,)](x, y, 512, BLOCK=64, IS_AWAITED=is_awaited, num_warps=4, num_stages=2)


half = torch.bfloat16
LAUNCHES = {
    "spilling": lambda: _spilling_kernel[(1,)](full(128, 128), full(128, 128), BLOCK=128, num_warps=1),
    "atomic": lambda: _atomic_kernel[(9,)](full(9, 128), full(128), BLOCK=128),
    "narrow": lambda: _narrow_kernel[(1,)](full(8192, dtype=half), full(8192, dtype=half), 8191, BLOCK=8192),
    "overflowing": lambda: _overflowing_kernel[(4 << 20,)](full(4 << 20, 768), full(4 << 20, 768), 768, BLOCK=256),
    "tf32": lambda: product(64, torch.float32, "tf32"),
    "fp32": lambda: product(64, torch.float32, "ieee"),
    "half": lambda: product(64, half, "ieee"),
    "small": lambda: product(32, half, "ieee"),
    "serialised": lambda: two_sums(False),
    "awaited": lambda: two_sums(True),
    "good": lambda: _good_kernel[(4 << 20,)](full(4 << 20, 768), full(4 << 20, 768), 768, BLOCK=256),
}

if __name__ == "__main__":
    arch, found = sys.argv[1], {}
    for name, launch in LAUNCHES.items():
        (row,) = offline.compile_launches(arch, launch)
        found[name] = row | offline.judge(row | dict(arch=arch))
    print(json.dumps(found))
