"""MPNet's attention with a learned bias per distance and head, by the kernels of `disentangled_attention`.

    out = softmax(q kᵀ · scale + bias[i - j]) v

A bias is the position score of a query of 1: with q' = [q, 1, 1], k' = [k, 0, 0] and a position table
pos_key[r] = [0, high, low], high + low = bias[r] / scale, the score above is q' · (k' + pos_key[i - j]) · scale. The
bias takes two columns because 16 bits are too few. Zeros pad rows to a multiple of 16, for 16-byte loads. This costs
nothing if K and K + 2 pad to the same power of two, and half of the products at K = 64. In addition to the traffic of
those kernels, q, k and v are written and read once more.

B sequences, T packed tokens, H heads, K head size.
"""

import torch
import torch.nn.functional as F

from .disentangled_attention import disentangled_attention


def biased_attention(q, k, v, bias, cu_seqlens, max_seqlen, *, scale=None, dropout_p=0.0, seed=None, offset=0):
    """Attention with a bias per distance: arguments and result of `reference.biased_attention`.

    float16, bfloat16 or float32; head sizes up to 126; `seed` an int64 tensor [1] when dropout_p > 0. Raises ValueError
    and TypeError.
    """
    if k is None:
        q, k, v = q.unbind(1)
    elif v is None:
        k, v = k.unbind(1)
    K = q.shape[-1]
    scale = K**-0.5 if scale is None else scale
    whole = bias.float() / scale
    # the gradient flows through the low part only
    high = whole.detach().to(q.dtype)
    low = (whole - high.float()).to(q.dtype)
    wider = -(K + 2) % 16 + 2
    pos_key = F.pad(torch.stack((high, low), -1), (K, wider - 2))
    k, v = (F.pad(x, (0, wider)) for x in (k, v))
    out = disentangled_attention(
        F.pad(q, (0, wider), value=1.0), k, v, pos_key, None, cu_seqlens, max_seqlen,
        max_relative_positions=bias.shape[0] // 2, scale=scale, dropout_p=dropout_p, seed=seed, offset=offset,
    )  # fmt: skip
    return out[..., :K]
