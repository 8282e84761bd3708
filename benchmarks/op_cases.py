"""The ops at the shapes of real models, what they cost at least, and what else a user could call instead.

One table for the benchmarks of ops, the tuning of launches and the tests on a GPU. It is no script.

Letters: B sequences, S longest, T packed tokens, M picked tokens, D hidden, F feed-forward, H heads, K head size,
V vocabulary.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastbert import ops, reference


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
        "disentangled_attention", "pooling", "contrastive_cross_entropy",
    )
    if hasattr(ops, name)
]  # fmt: skip
WITH_DROPOUT = ("attention", "layer_norm", "embedding", "disentangled_attention")
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


@dataclass(frozen=True)
class Case:
    """An op at one shape."""

    op: str
    model: str
    lengths: tuple
    dtype: torch.dtype = torch.bfloat16
    dropout_p: float = 0.0

    @property
    def name(self):
        dtype = str(self.dtype).removeprefix("torch.").replace("bfloat", "bf").replace("float", "fp")
        filled = "full" if len(set(self.lengths)) == 1 else "ragged"
        parts = [self.op, self.model, f"S{max(self.lengths)}", f"T{sum(self.lengths)}", filled, dtype]
        return " ".join(parts + [f"dropout {self.dropout_p}"] * (self.dropout_p > 0))

    def arguments(self, device):
        """What one call takes, by name. Weights [V, D] are scaled so that the loss is that of an untrained model."""
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

        Attention's backward counts the five products of its recomputing form, as everybody does.
        """
        model, T, itemsize = MODELS[self.model], sum(self.lengths), self.dtype.itemsize
        D, V, M = model.hidden_size, model.vocabulary, max(round(PICKED * T), 1)
        pairs = D * sum(n * n for n in self.lengths)
        row = D * itemsize
        if self.op == "attention":
            return {"forward": (4 * T * row, 4 * pairs), "backward": (8 * T * row, 10 * pairs)}
        if self.op == "disentangled_attention":
            # three products for the scores, one with the values; backward makes the scores again
            return {"forward": (4 * T * row, 8 * pairs), "backward": (8 * T * row, 22 * pairs)}
        if self.op == "layer_norm":
            return {"forward": (3 * T * row, 0), "backward": ((5 if self.dropout_p else 4) * T * row, 0)}
        if self.op == "bias_gelu":
            wide = T * model.feed_forward * itemsize
            return {"forward": (2 * wide, 0), "backward": (3 * wide, 0)}
        if self.op == "gelu_layer_norm":
            return {"forward": (2 * M * row, 0), "backward": (3 * M * row, 0)}
        if self.op == "embedding":
            return {"forward": (2 * T * row, 0), "backward": (2 * T * row + V * row, 0)}
        if self.op == "masked_cross_entropy":
            weights = (M + V) * row
            return {"forward": (weights, 2 * M * V * D), "backward": (2 * weights, 4 * M * V * D)}
        if self.op == "pooling":
            B = len(self.lengths)
            return {"forward": ((T + B) * row, 0), "backward": ((T + 2 * B) * row, 0)}
        B = min(T // 4, 8192)
        return {"forward": (3 * B * row, 4 * B * B * D), "backward": (6 * B * row, 8 * B * B * D)}


class Unavailable(Exception):
    """This variant cannot be had here, and why."""


@dataclass
class Run:
    """One way to compute a case.

    `packed` brings (output, gradients) into the form that fastbert's own have, `unpacked` an output's gradient into
    the form that this way's output has.
    """

    forward: Callable  # () -> output
    leaves: list  # what gradients are taken of
    packed: Callable = field(default=lambda output, gradients: (output, gradients))
    unpacked: Callable = field(default=lambda cotangent: cotangent)

    def __post_init__(self):
        self.leaves = [x.detach().requires_grad_() for x in self.leaves]


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


# --- what a user writes without fastbert; dropout is torch's, whose masks differ from fastbert's


def _layer_norm(x, weight, bias, residual, dropout_p=0.0, seed=None, offset=0):
    return F.layer_norm(F.dropout(x, dropout_p) + residual, x.shape[-1:], weight, bias, 1e-12)


def _bias_gelu(x, bias):
    return F.gelu(x + bias)


def _gelu_layer_norm(x, bias, weight, ln_bias):
    return F.layer_norm(F.gelu(x + bias), x.shape[-1:], weight, ln_bias, 1e-12)


def _embedding(
    input_ids, position_ids, token_type_ids, word, position, token_type, weight, bias,
    dropout_p=0.0, seed=None, offset=0,
):  # fmt: skip
    z = F.embedding(input_ids, word) + F.embedding(position_ids, position) + F.embedding(token_type_ids, token_type)
    return F.dropout(F.layer_norm(z, z.shape[-1:], weight, bias, 1e-12), dropout_p)


def _masked_cross_entropy(hidden, weight, bias, labels):
    return F.cross_entropy(F.linear(hidden, weight, bias).float(), labels, reduction="sum")


def _contrastive_cross_entropy(query, document, scale):
    scores = scale * (query @ document.T).float()
    return F.cross_entropy(scores, torch.arange(len(query), device=query.device), reduction="sum")


PLAIN = {
    "layer_norm": _layer_norm,
    "bias_gelu": _bias_gelu,
    "gelu_layer_norm": _gelu_layer_norm,
    "embedding": _embedding,
    "masked_cross_entropy": _masked_cross_entropy,
    "contrastive_cross_entropy": _contrastive_cross_entropy,
}


def _compiled(function):
    torch._dynamo.reset()
    return torch.compile(function, dynamic=False)


class _Padded:
    """The padded rectangle of packed rows: what a model without packing computes on."""

    def __init__(self, arguments):
        lengths = arguments["cu_seqlens"].diff()
        self.S = int(lengths.max())
        self.mask = torch.arange(self.S, device=lengths.device) < lengths[:, None]
        # None where nothing is padded: then a model without packing needs no mask either
        self.key_mask = None if bool(self.mask.all()) else self.mask[:, None, None, :]

    def rectangle(self, rows):
        """[T, ...] as [B, S, ...], padding 0."""
        padded = rows.new_zeros(*self.mask.shape, *rows.shape[1:])
        padded[self.mask] = rows
        return padded

    def heads_first(self, qkv):
        """q, k, v, each [B, H, S, K], of the packed projection [T, 3, H, K]."""
        return [self.rectangle(x).transpose(1, 2).contiguous() for x in qkv.unbind(1)]

    def unpacked(self, cotangent):
        return self.rectangle(cotangent).transpose(1, 2).contiguous()

    def packed(self, output, gradients):
        """(output [T, H, K], [gradient of the projection, [T, 3, H, K]]) of padded ones, each [B, H, S, K]."""
        rows = [x.transpose(1, 2)[self.mask] for x in (output, *gradients[:3])]
        return rows[0], [torch.stack(rows[1:], 1), *gradients[3:]]


def _plain_attention(q, k, v, mask, dropout_p):
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return F.dropout(torch.softmax(scores, -1), dropout_p) @ v


def _padded_attention(attend):
    """A variant that takes q, k, v [B, H, S, K], a key mask or None, and dropout's probability."""

    def make(arguments):
        padded = _Padded(arguments)
        run = Run(None, padded.heads_first(arguments["q"]), padded.packed, padded.unpacked)
        run.forward = lambda: attend(*run.leaves, padded.key_mask, arguments.get("dropout_p", 0.0))
        return run

    return make


def _sdpa(backend=None):
    def attend(q, k, v, mask, dropout_p):
        if backend is None:
            return F.scaled_dot_product_attention(q, k, v, mask, dropout_p)
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, mask, dropout_p)

    return _padded_attention(attend)


def _packed_attention(make_attend):
    """A variant that takes packed q, k, v, each [T, H, K]."""

    def make(arguments):
        attend = make_attend(arguments)
        run = Run(None, [x.contiguous() for x in arguments["q"].unbind(1)])
        run.packed = lambda output, gradients: (output, [torch.stack(gradients, 1)])
        run.forward = lambda: attend(*run.leaves)
        return run

    return make


def _varlen(arguments):
    from torch.nn.attention.varlen import varlen_attn

    if arguments.get("dropout_p"):
        raise Unavailable("torch's varlen_attn has no dropout")
    cu_seqlens, S = arguments["cu_seqlens"], arguments["max_seqlen"]
    return lambda q, k, v: varlen_attn(q, k, v, cu_seqlens, cu_seqlens, S, S)


def _nested(arguments):
    offsets, S = arguments["cu_seqlens"].long(), arguments["max_seqlen"]
    shortest = int(offsets.diff().min())

    def jagged(x):
        nested = torch.nested.nested_tensor_from_jagged(x, offsets, min_seqlen=shortest, max_seqlen=S)
        return nested.transpose(1, 2)

    def attend(q, k, v):
        out = F.scaled_dot_product_attention(jagged(q), jagged(k), jagged(v), dropout_p=arguments.get("dropout_p", 0.0))
        return out.transpose(1, 2).values()

    return attend


def _flash_attn(arguments):
    from flash_attn import flash_attn_varlen_qkvpacked_func

    def attend(qkv):
        return flash_attn_varlen_qkvpacked_func(
            qkv, arguments["cu_seqlens"], arguments["max_seqlen"], dropout_p=arguments.get("dropout_p", 0.0)
        )

    run = Run(None, [arguments["q"]])
    run.forward = lambda: attend(*run.leaves)
    return run


def _flashdeberta(arguments):
    from flashdeberta.ops.flash_attention_varlen import flash_attention_with_disentangled_varlen

    if arguments.get("dropout_p"):
        raise Unavailable("flashdeberta has no dropout")
    positions = [arguments[name].transpose(0, 1)[None].contiguous() for name in ("pos_key", "pos_query")]
    cu_seqlens, S, K = arguments["cu_seqlens"], arguments["max_seqlen"], arguments["q"].shape[-1]
    run = Run(None, [*(x.contiguous() for x in arguments["q"].unbind(1)), *positions])

    def packed(output, gradients):
        return output, [torch.stack(gradients[:3], 1), *(x[0].transpose(0, 1) for x in gradients[3:])]

    run.packed = packed
    run.forward = lambda: flash_attention_with_disentangled_varlen(
        *run.leaves, cu_seqlens, cu_seqlens, S, S, False, (3 * K) ** -0.5,
        arguments["position_buckets"], arguments["max_relative_positions"],
    )  # fmt: skip
    return run


def _deberta_eager(arguments):
    """DeBERTa's scores in full, the positions gathered, as transformers' eager code computes them."""
    from transformers.models.deberta_v2.modeling_deberta_v2 import build_relative_position

    padded = _Padded(arguments)
    span, p = arguments["position_buckets"], arguments.get("dropout_p", 0.0)
    probe = torch.empty(padded.S, 1, device=arguments["q"].device)
    relative = build_relative_position(probe, probe, span, arguments["max_relative_positions"])
    relative = relative.reshape(1, 1, padded.S, padded.S)
    c2p, p2c = ((sign * relative + span).clamp(0, 2 * span - 1) for sign in (1, -1))
    scale = (3 * arguments["q"].shape[-1]) ** -0.5
    leaves = [*padded.heads_first(arguments["q"]), arguments["pos_key"], arguments["pos_query"]]
    run = Run(None, leaves, padded.packed, padded.unpacked)

    def forward():
        q, k, v, pos_key, pos_query = run.leaves
        shape = *q.shape[:2], padded.S, padded.S
        scores = q @ k.transpose(-1, -2)
        scores = scores + (q @ pos_key.permute(1, 2, 0)).gather(-1, c2p.expand(shape))
        scores = scores + (k @ pos_query.permute(1, 2, 0)).gather(-1, p2c.expand(shape)).transpose(-1, -2)
        scores = scores * scale
        if padded.key_mask is not None:
            scores = scores.masked_fill(~padded.key_mask, float("-inf"))
        return F.dropout(torch.softmax(scores, -1), p) @ v

    run.forward = forward
    return run


def _pooling_eager(arguments):
    """As sentence-transformers does it: a masked mean over the padded rectangle, then F.normalize."""
    padded = _Padded(arguments)
    run = Run(None, [padded.rectangle(arguments["hidden"])])
    run.packed = lambda output, gradients: (output, [gradients[0][padded.mask]])
    weights = padded.mask[:, :, None].to(arguments["hidden"].dtype)

    def forward():
        (hidden,) = run.leaves
        return F.normalize((hidden * weights).sum(1) / weights.sum(1), dim=-1)

    run.forward = forward
    return run


def _dense_cross_entropy(arguments):
    """Logits of every token, as the heads of transformers make them; the picked tokens stand evenly among them."""
    hidden, labels = arguments["hidden"], arguments["labels"]
    T = round(len(hidden) / PICKED)
    picks = torch.arange(len(hidden), device=hidden.device) * T // len(hidden)
    everything = torch.randn(T, hidden.shape[1], device=hidden.device, dtype=hidden.dtype)
    everything[picks] = hidden
    sparse = labels.new_full((T,), -100).index_copy(0, picks, labels)
    run = run_of(_masked_cross_entropy, {**arguments, "hidden": everything, "labels": sparse})
    run.packed = lambda output, gradients: (output, [gradients[0][picks], *gradients[1:]])
    return run


def _linear_cross_entropy(arguments):
    if not hasattr(F, "linear_cross_entropy"):
        raise Unavailable("this torch has no linear_cross_entropy")
    # without options it is no more than linear and cross_entropy
    options = {}
    if hasattr(torch.nn, "LinearCrossEntropyOptions"):
        options["options"] = torch.nn.LinearCrossEntropyOptions()

    def call(hidden, weight, bias, labels):
        return F.linear_cross_entropy(hidden, weight, labels, linear_bias=bias, reduction="sum", **options)

    return run_of(call, arguments)


def _liger_cross_entropy(arguments):
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    def call(hidden, weight, bias, labels):
        return liger_fused_linear_cross_entropy(hidden, weight, labels, bias=bias, reduction="sum")

    return run_of(call, arguments)


def _cut_cross_entropy(arguments):
    from cut_cross_entropy import linear_cross_entropy

    if "bias" not in inspect.signature(linear_cross_entropy).parameters:
        raise Unavailable("this version of cut_cross_entropy takes no bias")

    def call(hidden, weight, bias, labels):
        return linear_cross_entropy(hidden, weight, labels, bias=bias, reduction="sum")

    return run_of(call, arguments)


def _liger_layer_norm(arguments):
    from liger_kernel.transformers.functional import liger_layer_norm

    def call(x, weight, bias, residual, dropout_p=0.0, seed=None, offset=0):
        return liger_layer_norm(F.dropout(x, dropout_p) + residual, weight, bias, 1e-12)

    return run_of(call, arguments)


def _flash_attn_layer_norm(arguments):
    from flash_attn.ops.triton.layer_norm import layer_norm_fn

    def call(x, weight, bias, residual, dropout_p=0.0, seed=None, offset=0):
        return layer_norm_fn(x, weight, bias, residual=residual, eps=1e-12, dropout_p=dropout_p)

    return run_of(call, arguments)


PEERS = {
    "attention": {
        "eager": _padded_attention(_plain_attention),
        "compiled": lambda arguments: _padded_attention(_compiled(_plain_attention))(arguments),
        "sdpa": _sdpa(),
        "sdpa flash": _sdpa(SDPBackend.FLASH_ATTENTION),
        "sdpa efficient": _sdpa(SDPBackend.EFFICIENT_ATTENTION),
        "sdpa cudnn": _sdpa(SDPBackend.CUDNN_ATTENTION),
        "sdpa math": _sdpa(SDPBackend.MATH),
        "torch varlen": _packed_attention(_varlen),
        "torch nested": _packed_attention(_nested),
        "flash_attn": _flash_attn,
    },
    "disentangled_attention": {"eager": _deberta_eager, "flashdeberta": _flashdeberta},
    "layer_norm": {"liger": _liger_layer_norm, "flash_attn": _flash_attn_layer_norm},
    "masked_cross_entropy": {
        "dense": _dense_cross_entropy,
        "torch linear_cross_entropy": _linear_cross_entropy,
        "liger": _liger_cross_entropy,
        "cut_cross_entropy": _cut_cross_entropy,
    },
    "pooling": {"eager": _pooling_eager},
}


def variants(op):
    """{name: function from a case's arguments to a Run}, fastbert first. A function may raise Unavailable."""
    found = {"fastbert": lambda arguments: run_of(getattr(ops, op), arguments)}
    if op in PLAIN:
        found["eager"] = lambda arguments: run_of(PLAIN[op], arguments)
        found["compiled"] = lambda arguments: run_of(_compiled(PLAIN[op]), arguments)
    return found | PEERS.get(op, {})


def build(make, arguments):
    """The variant's Run; Unavailable, with the reason, where it cannot be had."""
    try:
        return make(arguments)
    except (ImportError, RuntimeError, AttributeError, TypeError) as error:
        raise Unavailable(f"{type(error).__name__}: {error}".partition("\n")[0][:200]) from error


def cotangent(run):
    """A gradient for the run's output: the same random numbers, token by token, whatever the form of that output."""
    with torch.no_grad():
        output = run.packed(run.forward(), run.leaves)[0]
    generator = torch.Generator(output.device).manual_seed(1)
    numbers = torch.randn(output.shape, generator=generator, device=output.device).to(output.dtype)
    return run.unpacked(numbers if output.dim() else torch.ones_like(output))


def results(run):
    """(output, gradients), packed."""
    gradient = cotangent(run)
    output = run.forward()
    gradients = torch.autograd.grad(output, run.leaves, gradient)
    return run.packed(output.detach(), gradients)


def truth(case, arguments, dtype=torch.float32):
    """(output, gradients) of the reference in a wide dtype, on the same numbers."""
    widened = {n: x.to(dtype) if n in floating(arguments) else x for n, x in arguments.items()}
    return results(run_of(getattr(reference, case.op), widened))


def disagreement(got, wanted):
    """The largest relative error ||got - wanted|| / ||wanted|| of the output and the gradients."""
    errors = []
    for g, w in zip((got[0], *got[1]), (wanted[0], *wanted[1]), strict=True):
        assert g.shape == w.shape, f"shape {tuple(g.shape)}, expected {tuple(w.shape)}"
        errors.append(((g.double() - w.double()).norm() / w.double().norm().clamp(min=1e-30)).item())
    return max(errors)
