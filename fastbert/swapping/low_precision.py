"""The switch `dtype` of `swap`: what swapped stacks of layers multiply in, in inference on a CPU."""

import dataclasses
import warnings

import torch

from .. import ops


def chosen(model, dtype):
    """ "fp32", "bf16" or "int8" for a model, where `dtype` is asked for. Raises ValueError, also for one on a GPU."""
    elsewhere = next((x.device for x in model.parameters() if x.device.type != "cpu"), None)
    if elsewhere is not None and dtype in ("bf16", "int8"):
        raise ValueError(f"dtype is {dtype!r} and the model is on {elsewhere}: bf16 and int8 are for a CPU")
    return "fp32" if elsewhere is not None and dtype == "auto" else ops.low_precision.chosen(dtype)


def multiply_in(dtype, model, stacks):
    """Let swapped stacks multiply in `dtype`. Raises ValueError when int8 loses too much: see `swap`."""
    if not stacks:
        warnings.warn(f"dtype {dtype}: no stack of layers was swapped, nothing multiplies in it", stacklevel=3)
    if dtype == "int8":
        for module, run in _probes(model, stacks):
            ops.low_precision.check_int8(module, run)
    for stack in stacks:
        stack.fastbert_options = dataclasses.replace(stack.fastbert_options, dtype=dtype)


def _probes(model, stacks):
    """(a module, a function that returns its hidden states [B, S, D]) for each stack, or the models around them."""
    generator = torch.Generator().manual_seed(0)
    owners = [x for x in model.modules() if hasattr(x, "get_input_embeddings") and getattr(x, "base_model", None) is x]
    for stack in stacks:
        # the innermost is the last
        around = [owner for owner in owners if any(inner is stack for inner in owner.modules())]
        if around:
            owner = around[-1]
            length = min(16, (getattr(owner.config, "max_position_embeddings", None) or 32) // 2)
            vocabulary = len(owner.get_input_embeddings().weight)
            ids = torch.randint(vocabulary, (8, length), generator=generator)
            yield owner, lambda owner=owner, ids=ids: owner(input_ids=ids, attention_mask=torch.ones_like(ids))[0]
        elif len(getattr(stack, "layers", ())):
            attention = stack.layers[0].self_attn
            x = torch.randn(8, 16, attention.embed_dim, generator=generator)
            order = (0, 1) if attention.batch_first else (1, 0)
            yield stack, lambda stack=stack, x=x, order=order: stack(x.transpose(*order)).transpose(*order)
