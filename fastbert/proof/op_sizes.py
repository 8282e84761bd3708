"""What an entry of the table of ops is made of: how large a call is, its tensors, and the class of entries.

Letters: S longest sequence, T packed rows, M picked rows, D hidden, F feed-forward, H heads, K head size, V vocabulary,
P positions, R buckets of relative positions, Q queries, N documents.
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Sizes:
    """How large a call is."""

    lengths: tuple
    T: int
    D: int = 768
    H: int = 12
    G: int = 1
    F: int = 3072
    V: int = 30522
    P: int = 512
    R: int = 256
    M: int = 1
    Q: int = 1
    N: int = 1
    dtype: torch.dtype = torch.bfloat16
    dropout_p: float = 0.0

    @property
    def S(self):
        return max(self.lengths)

    @property
    def K(self):
        return self.D // self.H

    @property
    def row(self):
        """Bytes of one row of hidden states."""
        return self.D * self.dtype.itemsize

    @property
    def pairs(self):
        """Multiply-adds of one product of queries and keys."""
        return self.D * sum(n * n for n in self.lengths)


class Tensors:
    """Makes the tensors of a call: random numbers, on the "meta" device none. wide: dtype of parameters, if another."""

    def __init__(self, sizes, device, wide=None):
        self.sizes, self.device, self.wide = sizes, torch.device(device), wide or sizes.dtype

    def normal(self, *shape, scale=1.0):
        return torch.randn(*shape, device=self.device, dtype=self.sizes.dtype) * scale

    def parameter(self, *shape):
        """A parameter, or what a residual is added to: fp32 under autocast."""
        return torch.randn(*shape, device=self.device, dtype=self.wide)

    def ids(self, below, count):
        return torch.randint(below, (count,), device=self.device)

    def sequences(self):
        cu_seqlens = torch.tensor([0, *self.sizes.lengths], device=self.device).cumsum(0).to(torch.int32)
        return dict(cu_seqlens=cu_seqlens, max_seqlen=self.sizes.S)

    def dropout(self):
        if not self.sizes.dropout_p:
            return {}
        # a seed that 32 bits do not hold
        seed = torch.tensor([2**40 + 5], device=self.device)
        return dict(dropout_p=self.sizes.dropout_p, seed=seed, offset=3)


class Op:
    """An entry of the table.

    arguments(z, new): what one call takes, by name, from Sizes and Tensors; weights are scaled so that the loss is that
    of an untrained model. floor(z): {pass: (bytes, FLOPs)} that no implementation goes below: each tensor once,
    dropout's mask and padding never. plain: what a user writes without fastbert, in batches; dropout is torch's, whose
    masks are others. Attention's takes the rectangle [B, H, S, K], a mask [B, 1, 1, S] of the keys or None, and
    returns the rectangle.
    """

    # whose layers call it; benchmarks take the shapes of the first
    models = ("bert-base", "bert-large", "minilm", "deberta-base")
    has_dropout = False
    # {case: how it is called} for the report of the compiler; see `without_data`
    compiled: dict
