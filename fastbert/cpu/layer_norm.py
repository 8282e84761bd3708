"""LayerNorm and embedding on a CPU, with the fast dropout."""

import torch
import torch.nn.functional as F

from .. import reference
from .dropout import dropout


def layer_norm(x, weight, bias, *, residual=None, dropout_p=0.0, seed=None, offset=0, eps=1e-12, dtype=None):
    z = dropout(x, dropout_p, seed, offset)
    if residual is not None:
        # dropout returned a fresh tensor: add in place
        z = z + residual if z is x or z.dtype != residual.dtype else z.add_(residual)
    dtype = dtype or x.dtype
    if z.dtype == dtype == torch.bfloat16 and weight is not None and weight.dtype == torch.float32:
        # torch reads a float32 weight beside a bfloat16 input: nothing is cast, forward or backward
        bias = torch.zeros_like(weight) if bias is None else bias
        return F.layer_norm(z, z.shape[-1:], weight, bias, eps)
    return reference.layer_norm(z, weight, bias, eps=eps, dtype=dtype)


def embedding(
    input_ids, position_ids, token_type_ids, word, position, token_type, weight, bias, *,
    padding_idx=-1, eps=1e-12, dropout_p=0.0, seed=None, offset=0, dtype=None,
):  # fmt: skip
    dtype = dtype or word.dtype
    x = reference.embedding(
        input_ids, position_ids, token_type_ids, word, position, token_type, weight, bias,
        padding_idx=padding_idx, eps=eps, dtype=torch.promote_types(word.dtype, dtype),
    )  # fmt: skip
    return dropout(x, dropout_p, seed, offset).to(dtype)
