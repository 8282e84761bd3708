"""The table of ops: how each is called at the shapes of real models, what it costs at least, its plain PyTorch.

One table for the report of the compiler, the benchmarks of ops, counted traffic, the tuning of launches, and the tests
that go through all ops. What other libraries offer instead of an op stands in the benchmarks.

Letters as in `op_sizes.py`.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from .op_runs import Run as Run
from .op_runs import cotangent as cotangent
from .op_runs import disagreement as disagreement
from .op_runs import floating as floating
from .op_runs import results as results
from .op_runs import run_of as run_of
from .op_runs import truth as truth
from .op_sizes import Op, Sizes, Tensors


class Attention(Op):
    models = ("bert-base", "bert-large", "minilm")
    has_dropout = True
    compiled = {
        "S=32 p=.1": dict(longest=32, dropout_p=0.1),
        "S=64 p=.1": dict(longest=64, dropout_p=0.1),
        "S=128 p=.1": dict(longest=128, dropout_p=0.1),
        "S=128": dict(longest=128),
        "S=512 p=.1": dict(longest=512, dropout_p=0.1),
        "S=512": dict(longest=512),
        "window p=.1": dict(longest=512, dropout_p=0.1, window=64),
        "window": dict(longest=512, window=64),
        "S=128 grouped": dict(longest=128, G=4),
        "S=512 grouped": dict(longest=512, G=4),
    }

    @staticmethod
    def arguments(z, new):
        shapes = [(z.T, 3, z.H, z.K)] if z.G == 1 else [(z.T, z.H, z.K), (z.T, 2, z.H // z.G, z.K)]
        q, k = (*(new.normal(*shape) for shape in shapes), None)[:2]
        return dict(q=q, k=k, v=None, **new.sequences(), **new.dropout())

    @staticmethod
    def floor(z):
        # backward has the five products of the form that makes the scores again, as everybody counts them
        return {"forward": (4 * z.T * z.row, 4 * z.pairs), "backward": (8 * z.T * z.row, 10 * z.pairs)}

    @staticmethod
    def plain(q, k, v, mask=None, dropout_p=0.0, bias=None):
        scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
        if bias is not None:
            scores = scores + bias
        if mask is not None:
            scores = scores.masked_fill(~mask, float("-inf"))
        return F.dropout(torch.softmax(scores, -1), dropout_p) @ v


class BiasedAttention(Attention):
    models = ("mpnet-base",)
    compiled = {"S=128 p=.1": dict(longest=128, dropout_p=0.1), "S=512 p=.1": dict(longest=512, dropout_p=0.1)}

    @staticmethod
    def arguments(z, new):
        bias = new.normal(2 * z.S, z.H)
        return Attention.arguments(z, new) | dict(bias=bias)


class DisentangledAttention(Op):
    models = ("deberta-base",)
    has_dropout = True
    compiled = {name: Attention.compiled[name] for name in ("S=64 p=.1", "S=128 p=.1", "S=128", "S=512 p=.1", "S=512")}

    @staticmethod
    def arguments(z, new):
        q, pos_key, pos_query = (new.normal(*shape, z.H, z.K) for shape in ((z.T, 3), (2 * z.R,), (2 * z.R,)))
        return dict(
            q=q, k=None, v=None, pos_key=pos_key, pos_query=pos_query, **new.sequences(), position_buckets=z.R,
            max_relative_positions=512, **new.dropout(),
        )  # fmt: skip

    @staticmethod
    def floor(z):
        # three products for the scores, one with the values; backward makes the scores again. Long sequences could
        # share some of them, as far positions have one bucket: at 512 tokens a third of those with positions
        return {"forward": (4 * z.T * z.row, 8 * z.pairs), "backward": (8 * z.T * z.row, 22 * z.pairs)}

    @staticmethod
    def plain(q, k, v, pos_key, pos_query, c2p, p2c, mask=None, dropout_p=0.0):
        """As in transformers: products with the whole tables [2R, H, K], gathered at c2p and p2c [.., .., S, S]."""
        scores = q @ k.transpose(-1, -2)
        shape = scores.shape
        scores = scores + (q @ pos_key.permute(1, 2, 0)).gather(-1, c2p.expand(shape))
        scores = scores + (k @ pos_query.permute(1, 2, 0)).gather(-1, p2c.expand(shape)).transpose(-1, -2)
        scores = scores * (3 * q.shape[-1]) ** -0.5
        if mask is not None:
            scores = scores.masked_fill(~mask, float("-inf"))
        return F.dropout(torch.softmax(scores, -1), dropout_p) @ v


class LayerNorm(Op):
    has_dropout = True
    compiled = {
        "residual p=.1": dict(dropout_p=0.1),
        "bare": dict(residual=None),
        "mixed p=.1": dict(dropout_p=0.1, is_mixed=True, dtype=torch.float32),
    }

    @staticmethod
    def arguments(z, new):
        x, (weight, bias) = new.normal(z.T, z.D), (new.parameter(z.D) for _ in range(2))
        return dict(x=x, weight=weight, bias=bias, residual=new.parameter(z.T, z.D), **new.dropout())

    @staticmethod
    def floor(z):
        # backward reads x and the residual again; from the rounded result, as Apex can, it would be a row less, and
        # less exact
        return {"forward": (3 * z.T * z.row, 0), "backward": ((5 if z.dropout_p else 4) * z.T * z.row, 0)}

    @staticmethod
    def plain(x, weight, bias, residual, dropout_p=0.0, seed=None, offset=0):
        return F.layer_norm(F.dropout(x, dropout_p) + residual, x.shape[-1:], weight, bias, 1e-12)


class BiasGelu(Op):
    compiled = {"erf": {}, "tanh": dict(approximate="tanh"), "mixed": dict(is_mixed=True)}

    @staticmethod
    def arguments(z, new):
        return dict(x=new.normal(z.T, z.F), bias=new.parameter(z.F))

    @staticmethod
    def floor(z):
        wide = z.T * z.F * z.dtype.itemsize
        return {"forward": (2 * wide, 0), "backward": (3 * wide, 0)}

    @staticmethod
    def plain(x, bias):
        return F.gelu(x + bias)


class GeluLayerNorm(Op):
    compiled = {"erf": {}, "tanh": dict(approximate="tanh"), "mixed": dict(is_mixed=True, dtype=torch.float32)}

    @staticmethod
    def arguments(z, new):
        x, (bias, weight, ln_bias) = new.normal(z.M, z.D), (new.parameter(z.D) for _ in range(3))
        return dict(x=x, bias=bias, weight=weight, ln_bias=ln_bias)

    @staticmethod
    def floor(z):
        return {"forward": (2 * z.M * z.row, 0), "backward": (3 * z.M * z.row, 0)}

    @staticmethod
    def plain(x, bias, weight, ln_bias):
        return F.layer_norm(F.gelu(x + bias), x.shape[-1:], weight, ln_bias, 1e-12)


class RmsNorm(Op):
    compiled = {"plain": {}, "mixed": dict(is_mixed=True)}

    @staticmethod
    def arguments(z, new):
        return dict(x=new.normal(z.T, z.D), weight=new.parameter(z.D))

    @staticmethod
    def floor(z):
        return {"forward": (2 * z.T * z.row, 0), "backward": (3 * z.T * z.row, 0)}

    @staticmethod
    def plain(x, weight):
        """As in transformers."""
        wide = x.float()
        return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


class GatedActivation(Op):
    compiled = {"gelu": {}, "tanh": dict(activation="gelu_tanh"), "silu last": dict(activation="silu", gate="last")}

    @staticmethod
    def arguments(z, new):
        return dict(x=new.normal(z.T, 2 * z.F))

    @staticmethod
    def floor(z):
        wide = z.T * z.F * z.dtype.itemsize
        return {"forward": (3 * wide, 0), "backward": (5 * wide, 0)}

    @staticmethod
    def plain(x):
        gated, others = x.chunk(2, -1)
        return F.gelu(gated) * others


class Embedding(Op):
    has_dropout = True
    compiled = {"p=.1": dict(dropout_p=0.1, padding_idx=0)}

    @staticmethod
    def arguments(z, new):
        tables = [new.normal(rows, z.D) for rows in (z.V, z.P, 2)]
        ids = [new.ids(rows, z.T) for rows in (z.V, z.P, 2)]
        names = "input_ids", "position_ids", "token_type_ids", "word", "position", "token_type"
        return dict(zip(names, ids + tables), weight=new.normal(z.D), bias=new.normal(z.D), **new.dropout())

    @staticmethod
    def floor(z):
        # no word is read twice
        words = (min(z.T, z.V) + z.T) * z.row
        return {"forward": (words, 0), "backward": (2 * z.T * z.row + z.V * z.row, 0)}

    @staticmethod
    def plain(
        input_ids, position_ids, token_type_ids, word, position, token_type, weight, bias,
        dropout_p=0.0, seed=None, offset=0,
    ):  # fmt: skip
        z = F.embedding(input_ids, word) + F.embedding(position_ids, position) + F.embedding(token_type_ids, token_type)
        return F.dropout(F.layer_norm(z, z.shape[-1:], weight, bias, 1e-12), dropout_p)


class MaskedCrossEntropy(Op):
    compiled = {"plain": {}, "smoothed": dict(label_smoothing=0.1)}

    @staticmethod
    def arguments(z, new):
        weights = dict(hidden=new.normal(z.M, z.D), weight=new.normal(z.V, z.D, scale=0.02), bias=new.normal(z.V))
        return weights | dict(labels=new.ids(z.V, z.M))

    @staticmethod
    def floor(z):
        weights, product = (z.M + z.V) * z.row, 2 * z.M * z.V * z.D
        return {"forward": (weights, product), "backward": (2 * weights, 2 * product)}

    @staticmethod
    def plain(hidden, weight, bias, labels):
        return F.cross_entropy(F.linear(hidden, weight, bias).float(), labels, reduction="sum")


class Pooling(Op):
    compiled = {
        "cls": dict(mode="cls", normalize=False),
        "cls L2": dict(mode="cls"),
        "mean L2": dict(mode="mean"),
        "max": dict(mode="max", normalize=False),
    }

    @staticmethod
    def arguments(z, new):
        return dict(hidden=new.normal(z.T, z.D), cu_seqlens=new.sequences()["cu_seqlens"], mode="mean", normalize=True)

    @staticmethod
    def floor(z):
        B = len(z.lengths)
        return {"forward": ((z.T + B) * z.row, 0), "backward": ((z.T + 2 * B) * z.row, 0)}

    @staticmethod
    def plain(hidden, weights):
        """A masked mean of the rectangle [B, S, D]. weights: [B, S, 1], 1 and 0."""
        # sentence-transformers writes the weights out to [B, S, D] first, which moves more
        return F.normalize((hidden * weights).sum(1) / weights.sum(1), dim=-1)


class ContrastiveCrossEntropy(Op):
    compiled = {"plain": {}, "symmetric": dict(symmetric=True)}

    @staticmethod
    def arguments(z, new):
        query, document = (F.normalize(new.normal(n, z.D), dim=-1) for n in (z.Q, z.N))
        return dict(query=query, document=document, scale=20.0)

    @staticmethod
    def floor(z):
        rows, product = (z.Q + z.N) * z.row, 2 * z.Q * z.N * z.D
        return {"forward": (rows, product), "backward": (2 * rows, 2 * product)}

    @staticmethod
    def plain(query, document, scale):
        scores = scale * (query @ document.T).float()
        return F.cross_entropy(scores, torch.arange(len(query), device=query.device), reduction="sum")


class VocabularyMax(Op):
    compiled = {"plain": {}, "no bias": dict(bias=None)}

    @staticmethod
    def arguments(z, new):
        return dict(
            hidden=new.normal(z.T, z.D), weight=new.normal(z.V, z.D, scale=0.02), bias=new.normal(z.V),
            **new.sequences(),
        )  # fmt: skip

    @staticmethod
    def floor(z):
        # each text and word has one token with a gradient
        B = len(z.lengths)
        read, made = (z.T + z.V) * z.row, B * z.V * z.dtype.itemsize
        return {"forward": (read + made, 2 * z.T * z.V * z.D), "backward": (2 * read + made, 4 * B * z.V * z.D)}

    @staticmethod
    def plain(hidden, weight, bias, mask):
        """Of the rectangle [B, S, D]. mask: [B, S, 1], 1 and 0."""
        return torch.log1p(torch.relu(F.linear(hidden, weight, bias) * mask)).max(1).values


# what a model spends its time in, so that the first ones matter most
TABLE = {
    "attention": Attention,
    "layer_norm": LayerNorm,
    "bias_gelu": BiasGelu,
    "masked_cross_entropy": MaskedCrossEntropy,
    "embedding": Embedding,
    "gelu_layer_norm": GeluLayerNorm,
    "disentangled_attention": DisentangledAttention,
    "pooling": Pooling,
    "contrastive_cross_entropy": ContrastiveCrossEntropy,
    "biased_attention": BiasedAttention,
    "gated_activation": GatedActivation,
    "rms_norm": RmsNorm,
    "vocabulary_max": VocabularyMax,
}
OPS = list(TABLE)
WITH_DROPOUT = [name for name, op in TABLE.items() if op.has_dropout]
# Devlin et al. 2019 (BERT), Wang et al. 2020 (MiniLM), He et al. 2021 (DeBERTa v3), Song et al. 2020 (MPNet)
MODELS = {
    "bert-base": {},
    "bert-large": dict(D=1024, H=16, F=4096),
    "minilm": dict(D=384, F=1536),
    "deberta-base": dict(V=128100),
    "mpnet-base": dict(V=30527),
    # for rehearsals in Triton's interpreter
    "tiny": dict(D=32, H=2, F=40, V=61, R=4),
}
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

    @property
    def sizes(self):
        T = sum(self.lengths)
        Q = min(T // 4, 8192)
        rows = dict(T=T, P=max(*self.lengths, 2), M=max(round(PICKED * T), 1), Q=Q, N=2 * Q)
        return Sizes(self.lengths, dtype=self.dtype, dropout_p=self.dropout_p, **rows, **MODELS[self.model])

    def arguments(self, device):
        """What one call takes: Arguments."""
        return Arguments(TABLE[self.op].arguments(self.sizes, Tensors(self.sizes, device)), self.lengths)

    def floor(self):
        return TABLE[self.op].floor(self.sizes)


def without_data(op, model, dtype, /, *, longest=512, dropout_p=0.0, is_mixed=False, G=1, **options):
    """What a call takes, on the "meta" device: shapes, strides and alignment without memory.

    There are so many rows that the number of a row times its stride passes 2^31. is_mixed: parameters, and what
    residuals are added to, in fp32, as under autocast. options take the place of the table's arguments.
    """
    rows = 4 << 20
    # a cross-entropy launches its kernels for each chunk of the picked rows
    picked = rows if op == "gelu_layer_norm" else 9000
    counts = dict(T=rows, M=picked, Q=picked, N=2 * picked)
    sizes = Sizes((longest,) * (1 << 15), dtype=dtype, dropout_p=dropout_p, G=G, **counts, **MODELS[model])
    return TABLE[op].arguments(sizes, Tensors(sizes, "meta", torch.float32 if is_mixed else None)) | options
