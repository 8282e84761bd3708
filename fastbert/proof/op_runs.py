"""Calls of an op or of what stands in its place, with gradients, and how far their results are from the truth."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from .. import reference


@dataclass
class Run:
    """One way to compute a case.

    `packed` brings (output, gradients) into the form that fastbert's own have, `unpacked` an output's gradient into
    the form that this way's output has. `forward_only` says why there is no backward, where there is none.
    """

    forward: Callable  # () -> output
    leaves: list  # what gradients are taken of
    packed: Callable = field(default=lambda output, gradients: (output, gradients))
    unpacked: Callable = field(default=lambda cotangent: cotangent)
    forward_only: str = ""

    def __post_init__(self):
        self.leaves = [x.detach().requires_grad_(not self.forward_only) for x in self.leaves]


def floating(arguments):
    return {name: x for name, x in arguments.items() if torch.is_tensor(x) and x.is_floating_point()}


def run_of(function, arguments):
    """A Run of anything with the op's own arguments."""
    names = list(floating(arguments))
    run = Run(None, list(floating(arguments).values()))
    rest = {name: x for name, x in arguments.items() if name not in names}

    def forward():
        result = function(**dict(zip(names, run.leaves)), **rest)
        return result[0] if isinstance(result, tuple) else result

    run.forward = forward
    return run


def cotangent(run):
    """A gradient for the run's output: the same random numbers, token by token, whatever the form of that output."""
    # with gradients, as everywhere: without them what compiles would compile once more
    output = run.packed(run.forward(), run.leaves)[0].detach()
    generator = torch.Generator(output.device).manual_seed(1)
    numbers = torch.randn(output.shape, generator=generator, device=output.device).to(output.dtype)
    return run.unpacked(numbers if output.dim() else torch.ones_like(output))


def results(run):
    """(output, gradients), packed; no gradients of a run that has no backward."""
    if run.forward_only:
        return run.packed(run.forward(), run.leaves)[0], []
    gradient = cotangent(run)
    output = run.forward()
    gradients = torch.autograd.grad(output, run.leaves, gradient)
    return run.packed(output.detach(), gradients)


def truth(case, arguments, dtype=torch.float32):
    """(output, gradients) of the reference in a wide dtype, on the same numbers."""
    widened = {n: x.to(dtype) if n in floating(arguments) else x for n, x in arguments.items()}
    return results(run_of(getattr(reference, case.op), widened))


def disagreement(got, wanted):
    """The largest relative error ||got - wanted|| / ||wanted|| of the output and the gradients that there are."""
    (output, gradients), errors = got, []
    wanted = (wanted[0], *(wanted[1] if gradients else ()))
    for g, w in zip((output, *gradients), wanted, strict=True):
        assert g.shape == w.shape, f"shape {tuple(g.shape)}, expected {tuple(w.shape)}"
        errors.append(((g.double() - w.double()).norm() / w.double().norm().clamp(min=1e-30)).item())
    return max(errors)
