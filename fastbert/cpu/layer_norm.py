"""LayerNorm and embedding on a CPU: fast dropout, and sums in place on fresh tensors."""

import torch
import torch.nn.functional as F

from .. import reference
from .dropout import dropout


def layer_norm(x, weight, bias, *, residual=None, dropout_p=0.0, seed=None, offset=0, eps=1e-12, dtype=None):
    z = dropout(x, dropout_p, seed, offset)
    if residual is not None:
        # dropout returned a fresh tensor: add in place
        z = z + residual if z is x or z.dtype != residual.dtype else z.add_(residual)
    return reference.layer_norm(z, weight, bias, eps=eps, dtype=dtype or x.dtype)


def embedding(
    input_ids, position_ids, token_type_ids, word, position, token_type, weight, bias, *,
    padding_idx=-1, eps=1e-12, dropout_p=0.0, seed=None, offset=0, dtype=None,
):  # fmt: skip
    z = F.embedding(input_ids, word, padding_idx if padding_idx >= 0 else None)
    for ids, table in ((token_type_ids, token_type), (position_ids, position)):
        if table is not None:
            rows = F.embedding(ids, table)
            z = z.add_(rows) if rows.dtype == z.dtype else z + rows
    wanted = dtype or word.dtype
    z = reference.layer_norm(z, weight, bias, eps=eps, dtype=torch.promote_types(word.dtype, wanted))
    return dropout(z, dropout_p, seed, offset).to(wanted)
