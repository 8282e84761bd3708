"""What the functions of this wing need to know of autograd: which tensors they take, and derivatives of derivatives."""

import torch
from torch.autograd import forward_ad


def is_transformed():
    """Whether torch.func or forward-mode differentiation is at work: they need plain PyTorch."""
    return not torch.compiler.is_compiling() and (
        torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0
    )


def in_memory(*tensors):
    """Whether these are plain CPU tensors, and nothing traces or transforms what is done with them."""
    return (
        all(type(x) in (torch.Tensor, torch.nn.Parameter) and x.device.type == "cpu" for x in tensors)
        and not torch.compiler.is_compiling()
        and not is_transformed()
    )


def runs_by_autograd(cotangent):
    """Whether a backward must be plain PyTorch: it is differentiated itself (create_graph=True), or there are several
    cotangents at once (vmap)."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return torch.is_grad_enabled()
    return is_transformed() or torch._C._functorch.is_legacy_batchedtensor(cotangent)


def derivatives(function, inputs, cotangents):
    """The gradients of `inputs` through function(*inputs), by autograd; None for those that require none.

    For the backward of a Function where it `runs_by_autograd`.
    """
    create_graph = torch.is_grad_enabled()
    # the forward ran without autocast, too
    with torch.enable_grad(), torch.autocast("cpu", enabled=False):
        # views, so that a tensor that is passed twice gets a gradient for each argument
        inputs = [x.view_as(x) if torch.is_tensor(x) and x.requires_grad else x for x in inputs]
        wanted = [x for x in inputs if torch.is_tensor(x) and x.requires_grad]
        out = function(*inputs)
        gradients = torch.autograd.grad(out, wanted, cotangents, create_graph=create_graph, materialize_grads=True)
    gradients = iter(gradients)
    return [next(gradients) if torch.is_tensor(x) and x.requires_grad else None for x in inputs]
