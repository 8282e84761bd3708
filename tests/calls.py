"""One small call of every op: the table that tests of all ops at once go through. A new op is a new entry of CALLS."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass

import torch
from helpers import cu_seqlens_of

from fastbert import ops


@dataclass(frozen=True)
class Call:
    """A call `ops.<op>(**arguments())`.

    make: gives the arguments by name; floating tensors are drawn in fp32. tokens: names of those with a row for each
    token. exact: the same values give the same bits however they lie in memory, which a product by the device's own
    matrix library does not promise.
    """

    op: str
    make: Callable
    tokens: tuple
    exact: bool = True

    def arguments(self, device, dtype=torch.float32, **changes):
        """The same values each time, on `device`, floating ones as `dtype`. Arguments in `changes` are replaced."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            made = self.make() | changes
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


def _dropout():
    return dict(dropout_p=0.3, seed=torch.tensor([2**40 + 5]), offset=3)


def _sequences(*lengths, max_seqlen=0):
    return dict(cu_seqlens=cu_seqlens_of(lengths, "cpu"), max_seqlen=max(max_seqlen, *lengths))


def _attention(**options):
    # two rows more than the sequences have
    return dict(q=torch.randn(11, 3, 2, 12), k=None, v=None, **_sequences(3, 6), **_dropout()) | options


def _attention_of_some_rows():
    return dict(
        q=torch.randn(5, 2, 12), k=torch.randn(11, 2, 2, 12), v=None, **_sequences(3, 6),
        cu_seqlens_q=cu_seqlens_of([2, 2], "cpu"), max_seqlen_q=2, **_dropout(),
    )  # fmt: skip


def _attention_apart():
    q, k, v = (torch.randn(11, 2, 12) for _ in range(3))
    return dict(q=q, k=k, v=v, **_sequences(3, 6))


def _biased_attention():
    return _attention(**_sequences(9)) | dict(bias=torch.randn(18, 2))


def _disentangled_attention():
    tables = dict(pos_key=torch.randn(4, 2, 12), pos_query=torch.randn(4, 2, 12), position_buckets=2)
    return _attention(**_sequences(9)) | tables | dict(max_relative_positions=8)


def _layer_norm(**options):
    x, residual = torch.randn(5, 37), torch.randn(5, 37)
    return dict(x=x, weight=torch.randn(37), bias=torch.randn(37), residual=residual, **_dropout()) | options


def _bias_gelu(approximate):
    return dict(x=torch.randn(5, 37), bias=torch.randn(37), approximate=approximate)


def _gelu_layer_norm():
    return dict(x=torch.randn(5, 37), bias=torch.randn(37), weight=torch.randn(37), ln_bias=torch.randn(37))


def _embedding(types):
    ids = dict(
        input_ids=torch.randint(1, 11, (9,)), position_ids=torch.arange(9) % 5, token_type_ids=torch.arange(9) % types
    )
    tables = dict(word=torch.randn(11, 37), position=torch.randn(6, 37), token_type=torch.randn(types, 37))
    return dict(**ids, **tables, weight=torch.randn(37), bias=torch.randn(37), padding_idx=2, **_dropout())


def _pooling(**options):
    # two rows more than the sequences have
    return dict(hidden=torch.randn(11, 37), cu_seqlens=cu_seqlens_of([3, 0, 6], "cpu")) | options


def _masked_cross_entropy(**options):
    labels = torch.tensor([3, -100, 36, 0, 7, -100, 3])
    return dict(hidden=torch.randn(7, 24), weight=torch.randn(37, 24), bias=torch.randn(37), labels=labels) | options


def _contrastive_cross_entropy(**options):
    # two hard negatives, and a query without a document
    labels = torch.tensor([2, 0, -100, 5, 1])
    return dict(query=torch.randn(5, 24), document=torch.randn(7, 24), labels=labels, scale=torch.tensor(2.0)) | options


CALLS = {
    "attention": Call("attention", _attention, ("q",)),
    "attention-tiled": Call("attention", lambda: _attention(**_sequences(9, max_seqlen=65)), ("q",)),
    "attention-some_rows": Call("attention", _attention_of_some_rows, ("q", "k")),
    "attention-apart": Call("attention", _attention_apart, ("q", "k", "v")),
    "attention-window": Call("attention", lambda: _attention(**_sequences(9, max_seqlen=65), window=3), ("q",)),
    "biased_attention": Call("biased_attention", _biased_attention, ("q",)),
    "disentangled_attention": Call("disentangled_attention", _disentangled_attention, ("q",)),
    "layer_norm": Call("layer_norm", _layer_norm, ("x", "residual")),
    "layer_norm-bare": Call(
        "layer_norm", lambda: _layer_norm(residual=None, weight=None, bias=None, dropout_p=0.0, seed=None), ("x",)
    ),
    "bias_gelu": Call("bias_gelu", lambda: _bias_gelu("none"), ("x",)),
    "bias_gelu-tanh": Call("bias_gelu", lambda: _bias_gelu("tanh"), ("x",)),
    "gelu_layer_norm": Call("gelu_layer_norm", _gelu_layer_norm, ("x",)),
    "embedding": Call("embedding", lambda: _embedding(2), ("input_ids", "position_ids", "token_type_ids")),
    "embedding-three_types": Call("embedding", lambda: _embedding(3), ("input_ids", "position_ids", "token_type_ids")),
    "pooling": Call("pooling", lambda: _pooling(mode="mean", normalize=True), ("hidden",)),
    "pooling-max": Call("pooling", lambda: _pooling(mode="max"), ("hidden",)),
    "masked_cross_entropy": Call("masked_cross_entropy", _masked_cross_entropy, ("hidden", "labels"), exact=False),
    "masked_cross_entropy-smoothed": Call(
        "masked_cross_entropy", lambda: _masked_cross_entropy(bias=None, label_smoothing=0.1), ("hidden", "labels"),
        exact=False,
    ),
    "contrastive_cross_entropy": Call(
        "contrastive_cross_entropy", _contrastive_cross_entropy, ("query", "labels"), exact=False
    ),
    "contrastive_cross_entropy-symmetric": Call(
        "contrastive_cross_entropy", lambda: _contrastive_cross_entropy(symmetric=True), ("query", "labels"),
        exact=False,
    ),
}  # fmt: skip
