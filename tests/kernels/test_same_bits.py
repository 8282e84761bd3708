"""Same inputs, same bits: again, with the programs of every launch in another order, and from poisoned memory.

Programs that read what another one writes, or that write one place twice, agree as long as they run in one order, as
they do in Triton's interpreter. Run backwards and shuffled they show. On a GPU, test_gpu.py repeats calls instead.
"""

import functools
import random

import pytest
import torch
from calls import CALLS
from triton.runtime.interpreter import InterpreterBuilder

from benchmarks import traffic

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="orders the programs of Triton's interpreter")


@functools.cache
def shuffled(count):
    places = list(range(count))
    random.Random(count).shuffle(places)
    return places


ORDERS = {"backwards": lambda count: range(count - 1, -1, -1), "shuffled": shuffled}


def rearrange(monkeypatch, order):
    """Launches run their programs in `order`: a function of how many there are."""
    set_index = InterpreterBuilder.set_grid_idx

    def rearranged(self, x, y, z):
        nx, ny, nz = self.grid_dim
        place = order(nx * ny * nz)[(x * ny + y) * nz + z]
        set_index(self, place // (ny * nz), place // nz % ny, place % nz)

    monkeypatch.setattr(InterpreterBuilder, "set_grid_idx", rearranged)


def results_of(call):
    """Outputs and gradients of one entry of CALLS, for a cotangent that is not the same everywhere."""
    arguments = call.arguments("cpu")
    outputs = call(arguments | {n: x.requires_grad_() for n, x in arguments.items() if is_floating(x)})
    generator = torch.Generator().manual_seed(1)
    wanted = [x for x in outputs if x.requires_grad]
    cotangents = [torch.randn(x.shape, generator=generator).to(x.dtype) for x in wanted]
    return *outputs, *torch.autograd.grad(wanted, [x for x in arguments.values() if is_floating(x)], cotangents)


def is_floating(x):
    return torch.is_tensor(x) and x.is_floating_point()


def results_of_case(case):
    """The same of one case of the traffic table: more rows, many programs."""
    torch.manual_seed(0)
    function, leaves = case.fused(case.sizes("small"))
    out = function()
    return out, *torch.autograd.grad(out, leaves, torch.randn(out.shape).to(out.dtype))


WORK = {name: functools.partial(results_of, call) for name, call in CALLS.items()} | {
    f"{case.op}, {case.shape}": functools.partial(results_of_case, case)
    for case in traffic.CASES
    # the longest; CALLS has dropout in tiles too
    if (case.op, case.shape) not in (("attention", "S = 512, dropout"), ("disentangled_attention", "S = 256"))
}


@functools.cache
def first(name):
    return WORK[name]()


def assert_same(got, wanted):
    for i, (g, w) in enumerate(zip(got, wanted, strict=True)):
        assert g.dtype == w.dtype and torch.equal(g, w), f"result {i} differs"
        assert not g.is_floating_point() or torch.isfinite(g).all(), f"result {i} is not finite"


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", WORK)
def test_programs_in_another_order(name, order, monkeypatch, poison):
    """Which is the same call again, too."""
    wanted = first(name)
    rearrange(monkeypatch, ORDERS[order])
    assert_same(WORK[name](), wanted)


def test_a_race_shows(monkeypatch):
    """The instrument itself: a kernel whose programs add to one place without atomics, or pass values on."""
    import triton
    import triton.language as tl

    @triton.jit
    def _passes_on_kernel(x_ptr, y_ptr):
        i = tl.program_id(0) + tl.program_id(1) * tl.num_programs(0)
        tl.store(y_ptr + i + 1, tl.load(y_ptr + i) + tl.load(x_ptr + i))

    def run():
        y = torch.zeros(7)
        _passes_on_kernel[(3, 2)](torch.arange(6.0), y)
        return y

    wanted = run()
    assert torch.equal(run(), wanted)
    rearrange(monkeypatch, ORDERS["backwards"])
    assert not torch.equal(run(), wanted)
