"""Second derivatives: if they are requested, a backward in this wing uses autograd on the reference."""

import torch


def derivatives(function, inputs, cotangents):
    """The differentiable gradients of `inputs` through function(*inputs); None for those that require none.

    For the backward of a Function when gradients are enabled, that is with create_graph=True.
    """
    # views, so that a tensor that is passed twice gets a gradient for each argument
    inputs = [x.view_as(x) if torch.is_tensor(x) and x.requires_grad else x for x in inputs]
    wanted = [x for x in inputs if torch.is_tensor(x) and x.requires_grad]
    # the forward ran without autocast, too
    with torch.autocast("cpu", enabled=False):
        out = function(*inputs)
        gradients = torch.autograd.grad(out, wanted, cotangents, create_graph=True, materialize_grads=True)
    gradients = iter(gradients)
    return [next(gradients) if torch.is_tensor(x) and x.requires_grad else None for x in inputs]
