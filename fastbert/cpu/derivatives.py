"""Derivatives of derivatives: where somebody asks for them, a backward here is autograd's of what the op means."""

import torch


def derivatives(function, inputs, cotangents):
    """The gradient of each of `inputs` through function(*inputs), itself differentiable; None where none is wanted.

    For the backward of a Function, when gradients are enabled there: with create_graph=True.
    """
    # views, so that a tensor given twice gets a gradient for each place
    inputs = [x.view_as(x) if torch.is_tensor(x) and x.requires_grad else x for x in inputs]
    wanted = [x for x in inputs if torch.is_tensor(x) and x.requires_grad]
    # the forward was outside autocast, too
    with torch.autocast("cpu", enabled=False):
        out = function(*inputs)
        gradients = torch.autograd.grad(out, wanted, cotangents, create_graph=True, materialize_grads=True)
    gradients = iter(gradients)
    return [next(gradients) if torch.is_tensor(x) and x.requires_grad else None for x in inputs]
