"""The ops at the shapes of real models, what they cost at least, and how one way to compute them is held to another.

One table for the benchmarks of ops, the tuning of launches and the tests on a GPU. What a user could call instead of
fastbert stands in op_peers.py. Neither is a script.

Letters: B sequences, S longest, T packed tokens, M picked tokens, D hidden, F feed-forward, H heads, K head size,
V vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

from .. import ops, reference


@dataclass(frozen=True)
class Model:
    hidden_size: int
    heads: int
    feed_forward: int
    vocabulary: int
    position_buckets: int = 0  # DeBERTa's; 0: a model with absolute positions

    @property
    def head_size(self):
        return self.hidden_size // self.heads


MODELS = {
    "bert-base": Model(768, 12, 3072, 30522),
    "bert-large": Model(1024, 16, 4096, 30522),
    "minilm": Model(384, 12, 1536, 30522),
    "mpnet-base": Model(768, 12, 3072, 30527),
    "deberta-base": Model(768, 12, 3072, 128100, position_buckets=256),
    # for rehearsals in Triton's interpreter
    "tiny": Model(32, 2, 40, 61),
    "tiny-deberta": Model(32, 2, 40, 61, position_buckets=4),
}
# what a model spends its time in, so that the first ones matter most
OPS = [
    name
    for name in (
        "attention", "layer_norm", "bias_gelu", "masked_cross_entropy", "embedding", "gelu_layer_norm",
        "disentangled_attention", "pooling", "contrastive_cross_entropy", "biased_attention",
    )
    if hasattr(ops, name)
]  # fmt: skip
WITH_DROPOUT = ("attention", "layer_norm", "embedding", "disentangled_attention", "biased_attention")
PICKED = 0.15


def full_lengths(tokens, longest):
    return [longest] * (tokens // longest)


def ragged_lengths(tokens, longest):
    """Lengths between a fifth of the longest and the longest, 60 % of it on average, `tokens` in all; no two alike."""
    generator, lengths = torch.Generator().manual_seed(0), [longest]
    while sum(lengths) < tokens:
        low = max(longest // 5, 1)
        lengths.append(low + int(torch.rand((), generator=generator) * (longest - low + 1)))
    lengths[-1] -= sum(lengths) - tokens
    return [n for n in lengths if n > 0]


class Arguments(dict):
    """What one call takes, by name, and the lengths of the sequences, which not every op is told."""

    def __init__(self, values, lengths):
        super().__init__(values)
        self.lengths = lengths


@dataclass(frozen=True)
class Case:
    """An op at one shape."""

    op: str
    model: str
    lengths: tuple
    dtype: torch.dtype = torch.bfloat16
    dropout_p: float = 0.0

    @property
    def padded_tokens(self):
        """Tokens of the rectangle that a model without packing computes."""
        return len(self.lengths) * max(self.lengths)

    @property
    def name(self):
        dtype = str(self.dtype).removeprefix("torch.").replace("bfloat", "bf").replace("float", "fp")
        filled = "full" if len(set(self.lengths)) == 1 else "ragged"
        parts = [self.op, self.model, f"S{max(self.lengths)}", f"T{sum(self.lengths)}", filled, dtype]
        return " ".join(parts + [f"dropout {self.dropout_p}"] * (self.dropout_p > 0))

    def arguments(self, device):
        """What one call takes: Arguments. Weights [V, D] are scaled so that the loss is that of an untrained model."""
        return Arguments(self._arguments(device), self.lengths)

    def _arguments(self, device):
        model, T, S = MODELS[self.model], sum(self.lengths), max(self.lengths)
        D, H, K, V = model.hidden_size, model.heads, model.head_size, model.vocabulary
        M = max(round(PICKED * T), 1)
        cu_seqlens = torch.tensor([0, *self.lengths], device=device).cumsum(0).to(torch.int32)

        def normal(*shape, scale=1.0):
            return torch.randn(*shape, device=device, dtype=self.dtype) * scale

        def ids(below, count=T):
            return torch.randint(below, (count,), device=device)

        dropout = {}
        if self.dropout_p:
            dropout = dict(dropout_p=self.dropout_p, seed=torch.tensor([5], device=device), offset=3)
        if self.op == "attention":
            return dict(q=normal(T, 3, H, K), k=None, v=None, cu_seqlens=cu_seqlens, max_seqlen=S, **dropout)
        if self.op == "biased_attention":
            bias = normal(2 * S, H)
            return dict(q=normal(T, 3, H, K), k=None, v=None, bias=bias, cu_seqlens=cu_seqlens, max_seqlen=S, **dropout)
        if self.op == "disentangled_attention":
            span = model.position_buckets
            return dict(
                q=normal(T, 3, H, K), k=None, v=None, pos_key=normal(2 * span, H, K), pos_query=normal(2 * span, H, K),
                cu_seqlens=cu_seqlens, max_seqlen=S, position_buckets=span, max_relative_positions=512, **dropout,
            )  # fmt: skip
        if self.op == "layer_norm":
            return dict(x=normal(T, D), weight=normal(D), bias=normal(D), residual=normal(T, D), **dropout)
        if self.op == "bias_gelu":
            return dict(x=normal(T, model.feed_forward), bias=normal(model.feed_forward))
        if self.op == "gelu_layer_norm":
            return dict(x=normal(M, D), bias=normal(D), weight=normal(D), ln_bias=normal(D))
        if self.op == "embedding":
            tables = dict(word=normal(V, D), position=normal(max(S, 2), D), token_type=normal(2, D))
            places = dict(input_ids=ids(V), position_ids=ids(max(S, 2)), token_type_ids=ids(2))
            return dict(**places, **tables, weight=normal(D), bias=normal(D), **dropout)
        if self.op == "masked_cross_entropy":
            return dict(hidden=normal(M, D), weight=normal(V, D, scale=0.02), bias=normal(V), labels=ids(V, M))
        if self.op == "pooling":
            return dict(hidden=normal(T, D), cu_seqlens=cu_seqlens, mode="mean", normalize=True)
        assert self.op == "contrastive_cross_entropy"
        B = min(T // 4, 8192)
        query, document = (F.normalize(normal(n, D), dim=-1) for n in (B, 2 * B))
        return dict(query=query, document=document, scale=20.0)

    def floor(self):
        """{pass: (bytes, FLOPs)} that no implementation goes below: each tensor once, dropout's mask and padding never.

        Attention's backward counts the five products of its recomputing form, as everybody does. LayerNorm's reads x
        and the residual again; from the rounded result, as Apex can, it would be a row less, and less exact.
        """
        model, T, itemsize = MODELS[self.model], sum(self.lengths), self.dtype.itemsize
        D, V, M = model.hidden_size, model.vocabulary, max(round(PICKED * T), 1)
        pairs = D * sum(n * n for n in self.lengths)
        row = D * itemsize
        if self.op in ("attention", "biased_attention"):
            return {"forward": (4 * T * row, 4 * pairs), "backward": (8 * T * row, 10 * pairs)}
        if self.op == "disentangled_attention":
            # three products for the scores, one with the values; backward makes the scores again. Long sequences could
            # share some of them, as far positions have one bucket: at 512 tokens a third of those with positions
            return {"forward": (4 * T * row, 8 * pairs), "backward": (8 * T * row, 22 * pairs)}
        if self.op == "layer_norm":
            return {"forward": (3 * T * row, 0), "backward": ((5 if self.dropout_p else 4) * T * row, 0)}
        if self.op == "bias_gelu":
            wide = T * model.feed_forward * itemsize
            return {"forward": (2 * wide, 0), "backward": (3 * wide, 0)}
        if self.op == "gelu_layer_norm":
            return {"forward": (2 * M * row, 0), "backward": (3 * M * row, 0)}
        if self.op == "embedding":
            # no word is read twice
            return {"forward": ((min(T, V) + T) * row, 0), "backward": (2 * T * row + V * row, 0)}
        if self.op == "masked_cross_entropy":
            weights = (M + V) * row
            return {"forward": (weights, 2 * M * V * D), "backward": (2 * weights, 4 * M * V * D)}
        if self.op == "pooling":
            B = len(self.lengths)
            return {"forward": ((T + B) * row, 0), "backward": ((T + 2 * B) * row, 0)}
        B = min(T // 4, 8192)
        return {"forward": (3 * B * row, 4 * B * B * D), "backward": (6 * B * row, 8 * B * B * D)}


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
