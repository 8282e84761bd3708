"""Same inputs, same bits: a second call, with the programs of every launch in reverse order, in poisoned memory.

Triton's interpreter runs the programs in one order, and races stay hidden. In reverse order each two programs change
places: a program that reads what another one writes, or writes where another one does, gives other bits. On a GPU,
test_gpu.py repeats calls instead.
"""

import functools

import pytest
import torch
from calls import CALLS
from test_hazards import random_cotangents
from triton.runtime.interpreter import InterpreterBuilder

from benchmarks import traffic

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="orders the programs of Triton's interpreter")


def reverse(monkeypatch):
    """Launches run their last program first."""
    set_index = InterpreterBuilder.set_grid_idx

    def reversed_index(self, x, y, z):
        set_index(self, *(count - 1 - i for count, i in zip(self.grid_dim, (x, y, z))))

    monkeypatch.setattr(InterpreterBuilder, "set_grid_idx", reversed_index)


def results_of(call):
    """Outputs and gradients of one entry of CALLS, for a random cotangent."""
    arguments = call.arguments("cpu")
    outputs, gradients = call.run(arguments, random_cotangents(call, arguments))
    return *outputs, *gradients.values()


def results_of_case(case):
    """The same of one case of the traffic table: more rows, many programs."""
    function, leaves = case.fused(case.sizes("small"))
    out = function()
    return out, *torch.autograd.grad(out, leaves, torch.randn(out.shape).to(out.dtype))


WORK = {name: functools.partial(results_of, call) for name, call in CALLS.items()} | {
    f"{case.op}, {case.shape}": functools.partial(results_of_case, case)
    for case in traffic.CASES
    # the slowest: CALLS has dropout in tiles too
    if (case.op, case.shape) not in (("attention", "S = 512, dropout"), ("disentangled_attention", "S = 256"))
}


@pytest.mark.parametrize("name", WORK)
def test_programs_in_another_order(name, monkeypatch, poison):
    torch.manual_seed(0)
    wanted = WORK[name]()
    reverse(monkeypatch)
    torch.manual_seed(0)
    for i, (one, other) in enumerate(zip(WORK[name](), wanted, strict=True)):
        assert one.dtype == other.dtype and torch.equal(one, other), f"result {i} differs"
        assert not one.is_floating_point() or torch.isfinite(one).all(), f"result {i} is not finite"


def test_a_race_shows(monkeypatch):
    """The instrument itself: it sees a kernel whose programs pass values on to each other."""
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
    reverse(monkeypatch)
    assert not torch.equal(run(), wanted)
