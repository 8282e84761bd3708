"""What several test files need: the error budget, equality of bits, a packed batch, and a record of operator calls."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastbert import reference
from fastbert.cpu import ops as cpu
from fastbert.packing import Batch

VALUE_SLACK, GRADIENT_SLACK, FLOOR = 2.0, 3.0, 1e-5
# what runs on the tests' device where no kernel does, and all that can
PLAIN = "reference" if torch.cuda.is_available() else "cpu"
IMPLEMENTATIONS = ["triton", *dict.fromkeys([PLAIN, "reference"])]


def assert_within_budget(kernel, reference, *args, **kwargs):
    """`kernel` may be as far from the truth as `reference` in the same dtype is, times a slack, plus a floor.

    The truth is `reference` in float64. Compared are every floating output, and the gradient of every floating argument
    for one random cotangent. Keyword arguments may hold tensors; floating ones among them get gradients too.
    """

    def run(op, dtype):
        leaves = []

        def leaf(value):
            if not (torch.is_tensor(value) and value.is_floating_point()):
                return value
            # a fresh view with the same strides, so that layouts under test survive
            fresh = torch.empty_strided(value.size(), value.stride(), dtype=dtype or value.dtype, device=value.device)
            if all(value.stride(d) or value.size(d) == 1 for d in range(value.dim())):
                fresh.copy_(value)
            else:  # expanded: overlapping memory cannot be copied into
                fresh = value.detach().to(dtype or value.dtype)
            leaves.append(fresh.requires_grad_())
            return fresh

        outputs = op(*(leaf(a) for a in args), **{name: leaf(a) for name, a in kwargs.items()})
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        floating = [o for o in outputs if o.is_floating_point()]
        generator = torch.Generator(device=floating[0].device).manual_seed(1)
        cotangents = [torch.randn(o.shape, generator=generator, device=o.device, dtype=torch.float64) for o in floating]
        loss = sum((o.double() * c).sum() for o, c in zip(floating, cotangents))
        gradients = torch.autograd.grad(loss, leaves, allow_unused=True)
        return outputs, [torch.zeros_like(x) if g is None else g for x, g in zip(leaves, gradients)]

    truth, plain, got = run(reference, torch.float64), run(reference, None), run(kernel, None)
    for what, slack, triples in (
        ("output", VALUE_SLACK, zip(truth[0], plain[0], got[0])),
        ("gradient", GRADIENT_SLACK, zip(truth[1], plain[1], got[1])),
    ):
        for i, (t, p, g) in enumerate(triples):
            assert g.shape == p.shape, f"{what} {i}: shape {tuple(g.shape)}, expected {tuple(p.shape)}"
            assert g.dtype == p.dtype, f"{what} {i}: dtype {g.dtype}, expected {p.dtype}"
            if not g.is_floating_point():
                assert torch.equal(g, t), f"{what} {i}: {g} is not {t}"
                continue
            if g.numel() == 0:
                continue
            assert torch.isfinite(g).all(), f"{what} {i}: not finite"
            budget = slack * (p.double() - t).abs().max().item() + FLOOR
            error = (g.double() - t).abs().max().item()
            assert error <= budget, f"{what} {i}: error {error:.2e} over the budget {budget:.2e}"


def assert_op_within_budget(kernel, *args, **kwargs):
    """The kernel, and on a CPU the function of `fastbert.cpu` with the same name, against that of the reference."""
    name = kernel.__name__
    assert_within_budget(kernel, getattr(reference, name), *args, **kwargs)
    if all(x.device.type == "cpu" for x in (*args, *kwargs.values()) if torch.is_tensor(x)):
        assert_within_budget(getattr(cpu, name), getattr(reference, name), *args, **kwargs)


def cu_seqlens_of(lengths, device):
    """int32 [B + 1] for a list of sequence lengths."""
    return torch.tensor([0, *lengths], dtype=torch.int32, device=device).cumsum(0, dtype=torch.int32)


def packed_batch(lengths=(7, 1, 0, 13, 4), vocab_size=99, picked=0.3):
    """A packing.Batch of random sequences, some of whose tokens are picked."""
    ids = torch.randint(5, vocab_size, (sum(lengths),))
    positions = torch.cat([torch.arange(n) for n in lengths])
    labels = torch.where(torch.rand(len(ids)) < picked, ids, -100)
    return Batch(
        ids, positions, positions % 2, cu_seqlens_of(lengths, "cpu"), max(lengths), labels,
        (labels != -100).nonzero()[:, 0],
    )  # fmt: skip


def assert_same_bits(got, wanted):
    for i, (g, w) in enumerate(zip(got, wanted, strict=True)):
        assert torch.equal(g, w), f"result {i} differs by {(g - w).abs().max().item():.2e}"


class Recorder(TorchDispatchMode):
    """Keeps the calls of a namespace's operators: (operator, arguments, result)."""

    def __init__(self, namespace="fastbert"):
        super().__init__()
        self.namespace, self.calls = namespace, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function.namespace == self.namespace:
            self.calls.append((function, args, result))
        return result
