"""One small call of every op, from the table of ops, for the tests of all ops. A new op needs an entry here."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from helpers import cu_seqlens_of

from fastbert import ops
from fastbert.proof.op_cases import TABLE, Sizes, Tensors

# two rows more than the sequences have
SIZES = Sizes(
    (3, 6), T=11, D=24, H=2, F=37, V=37, P=6, R=2, M=7, Q=5, N=7, dtype=torch.float32, dropout_p=0.3
)  # fmt: skip


@dataclass(frozen=True)
class Call:
    """A call `ops.<op>(**arguments())`.

    tokens: names of the arguments with a row for each token. sizes: what differs from SIZES. options: gives what
    takes the place of the table's arguments, or stands beside them; floating tensors are drawn in fp32. exact: the same
    values give the same bits however they lie in memory, which a product by the device's own matrix library does not
    promise.
    """

    op: str
    tokens: tuple
    sizes: dict = field(default_factory=dict)
    options: Callable = dict
    exact: bool = True

    def arguments(self, device, dtype=torch.float32, **changes):
        """The same values each time, on `device`, floating ones as `dtype`. Arguments in `changes` are replaced."""
        sizes = replace(SIZES, **self.sizes)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            made = TABLE[self.op].arguments(sizes, Tensors(sizes, "cpu")) | self.options() | changes
        return {name: _moved(value, device, dtype) for name, value in made.items()}

    def takes(self, name):
        return name in inspect.signature(getattr(ops, self.op)).parameters

    def __call__(self, arguments, impl="triton"):
        """Its outputs, as a tuple."""
        results = getattr(ops, self.op)(**arguments, impl=impl)
        return results if isinstance(results, tuple) else (results,)

    def run(self, arguments, cotangents=None, impl="triton"):
        """(outputs, {argument: gradient}) for `cotangents`, one for each output that has a gradient, or ones."""
        leaves = {name: x.detach().requires_grad_() for name, x in arguments.items() if is_floating(x)}
        outputs = self(arguments | leaves, impl)
        differentiable = [x for x in outputs if x.requires_grad]
        if cotangents is None:
            cotangents = [torch.ones_like(x) for x in differentiable]
        gradients = torch.autograd.grad(differentiable, list(leaves.values()), cotangents)
        return outputs, dict(zip(leaves, gradients, strict=True))


def is_floating(x):
    return torch.is_tensor(x) and x.is_floating_point()


def _moved(value, device, dtype):
    if not torch.is_tensor(value):
        return value
    return value.to(device, dtype if value.is_floating_point() else value.dtype)


def _some_rows():
    return dict(
        q=torch.randn(5, 2, 12), k=torch.randn(11, 2, 2, 12), cu_seqlens_q=cu_seqlens_of([2, 2], "cpu"), max_seqlen_q=2
    )


def _apart():
    return {name: torch.randn(11, 2, 12) for name in "qkv"}


def _picked(**options):
    return dict(labels=torch.tensor([3, -100, 36, 0, 7, -100, 3])) | options


def _documents(**options):
    # two hard negatives, and a query without a document
    return dict(labels=torch.tensor([2, 0, -100, 5, 1]), scale=torch.tensor(2.0)) | options


def _ids(types=2):
    # words that repeat; none is the padding, whose gradient is left out
    words = torch.tensor([3, 1, 7, 1, 10, 5, 9, 4, 3])
    ids = dict(input_ids=words, position_ids=torch.arange(9) % 5, token_type_ids=torch.arange(9) % types)
    return dict(**ids, token_type=torch.randn(types, 37), padding_idx=2)


_ONE, _ROWS = dict(lengths=(9,)), dict(T=5, M=5, D=37)
_WORDS, _TOKENS = dict(T=9, D=37, V=11), ("input_ids", "position_ids", "token_type_ids")
_POOLED = dict(lengths=(3, 0, 6), D=37)
CALLS = {
    "attention": Call("attention", ("q",)),
    "attention-tiled": Call("attention", ("q",), _ONE, lambda: dict(max_seqlen=65)),
    "attention-some_rows": Call("attention", ("q", "k"), options=_some_rows),
    "attention-apart": Call("attention", ("q", "k", "v"), dict(dropout_p=0.0), _apart),
    "attention-grouped": Call("attention", ("q", "k"), dict(H=4, G=2)),
    "attention-grouped_tiled": Call("attention", ("q", "k"), dict(lengths=(9,), H=4, G=2), lambda: dict(max_seqlen=65)),
    "attention-window": Call("attention", ("q",), _ONE, lambda: dict(max_seqlen=65, window=3)),
    "biased_attention": Call("biased_attention", ("q",), _ONE),
    "disentangled_attention": Call("disentangled_attention", ("q",), _ONE, lambda: dict(max_relative_positions=8)),
    "layer_norm": Call("layer_norm", ("x", "residual"), _ROWS),
    "layer_norm-bare": Call(
        "layer_norm", ("x",), _ROWS | dict(dropout_p=0.0), lambda: dict(residual=None, weight=None, bias=None)
    ),
    "bias_gelu": Call("bias_gelu", ("x",), _ROWS),
    "bias_gelu-tanh": Call("bias_gelu", ("x",), _ROWS, lambda: dict(approximate="tanh")),
    "rms_norm": Call("rms_norm", ("x",), _ROWS),
    "gated_activation": Call("gated_activation", ("x",), _ROWS),
    "gated_activation-silu": Call("gated_activation", ("x",), _ROWS, lambda: dict(activation="silu", gate="last")),
    "gelu_layer_norm": Call("gelu_layer_norm", ("x",), _ROWS),
    "embedding": Call("embedding", _TOKENS, _WORDS, _ids),
    "embedding-three_types": Call("embedding", _TOKENS, _WORDS, lambda: _ids(3)),
    "pooling": Call("pooling", ("hidden",), _POOLED),
    "pooling-max": Call("pooling", ("hidden",), _POOLED, lambda: dict(mode="max", normalize=False)),
    "vocabulary_max": Call("vocabulary_max", ("hidden",), _POOLED | dict(V=11), exact=False),
    "masked_cross_entropy": Call("masked_cross_entropy", ("hidden", "labels"), options=_picked, exact=False),
    "masked_cross_entropy-smoothed": Call(
        "masked_cross_entropy", ("hidden", "labels"), options=lambda: _picked(bias=None, label_smoothing=0.1),
        exact=False,
    ),
    "contrastive_cross_entropy": Call(
        "contrastive_cross_entropy", ("query", "labels"), options=_documents, exact=False
    ),
    "contrastive_cross_entropy-symmetric": Call(
        "contrastive_cross_entropy", ("query", "labels"), options=lambda: _documents(symmetric=True), exact=False
    ),
}  # fmt: skip
