"""A gated feed-forward's activation on a CPU: its gradient goes into both halves in place, where autograd joins two."""

import torch
import torch.nn.functional as F

from .. import reference
from .autograd import derivatives, in_memory, runs_by_autograd


def gated_activation(x, *, activation="gelu", gate="first"):
    if not in_memory(x):
        return reference.gated_activation(x, activation=activation, gate=gate)
    if torch.is_grad_enabled() and x.requires_grad:
        return GatedActivationFunction.apply(x, activation, gate)
    gated, others = _halves(x, gate)
    return _activated(gated, activation).mul_(others)


def _halves(x, gate):
    """(the half that goes through the activation, the other), as views."""
    return x.chunk(2, -1)[:: 1 if gate == "first" else -1]


def _activated(x, activation):
    if activation == "silu":
        return F.silu(x)
    return F.gelu(x, approximate="tanh" if activation == "gelu_tanh" else "none")


class GatedActivationFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, activation, gate):
        gated, others = _halves(x, gate)
        activated = _activated(gated, activation)
        ctx.save_for_backward(x, activated)
        ctx.options = dict(activation=activation, gate=gate)
        return activated * others

    @staticmethod
    def backward(ctx, dy):
        x, activated = ctx.saved_tensors
        if runs_by_autograd(dy):
            return *derivatives(lambda x: reference.gated_activation(x, **ctx.options), [x], [dy]), None, None
        activation, gate = ctx.options.values()
        dx = torch.empty_like(x, memory_format=torch.contiguous_format)
        (gated, others), (dgated, dothers) = _halves(x, gate), _halves(dx, gate)
        torch.mul(dy, activated, out=dothers)
        if activation == "silu":
            torch.ops.aten.silu_backward.grad_input(dy * others, gated, grad_input=dgated)
        else:
            approximate = "tanh" if activation == "gelu_tanh" else "none"
            torch.ops.aten.gelu_backward.grad_input(dy * others, gated, approximate=approximate, grad_input=dgated)
        return dx, None, None
