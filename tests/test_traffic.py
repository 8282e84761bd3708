"""Every kernel moves the bytes that its docstring states, and no more: counted in the interpreter, access by access."""

import contextlib

import numpy as np
import pytest
import torch
from helpers import cu_seqlens_of
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder

from fastbert import ops

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="counts what Triton's interpreter does")

T, D = 64, 96
UNIT = T * D * 2  # bytes of one [T, D] in fp16


@contextlib.contextmanager
def counting(monkeypatch, smallest):
    """A list of one number: the bytes that kernels load from and store to arguments of at least `smallest` elements.

    Smaller arguments, parameters and statistics, are left out: next to the rows of a real batch they are nothing.
    """
    moved, ranges = [0], []
    call, load, store = (
        GridExecutor.__call__,
        InterpreterBuilder.create_masked_load,
        InterpreterBuilder.create_masked_store,
    )

    def counted(pointers, mask):
        places = pointers.data[np.broadcast_to(mask.data, pointers.data.shape).astype(bool)]
        inside = np.zeros(places.shape, bool)
        for start, end in ranges:
            inside |= (places >= start) & (places < end)
        moved[0] += int(inside.sum()) * pointers.get_element_ty().primitive_bitwidth // 8

    def launch(self, *args, **kwargs):
        tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor) and x.numel() >= smallest]
        ranges[:] = [(x.data_ptr(), x.data_ptr() + x.untyped_storage().nbytes()) for x in tensors]
        return call(self, *args, **kwargs)

    def masked_load(self, pointers, mask, *rest):
        counted(pointers, mask)
        return load(self, pointers, mask, *rest)

    def masked_store(self, pointers, value, mask, *rest):
        counted(pointers, mask)
        return store(self, pointers, value, mask, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(GridExecutor, "__call__", launch)
        patch.setattr(InterpreterBuilder, "create_masked_load", masked_load)
        patch.setattr(InterpreterBuilder, "create_masked_store", masked_store)
        yield moved


def random(*shape):
    return torch.randn(shape).half().requires_grad_()


def layer_norm(dropout_p):
    options = dict(dropout_p=dropout_p, seed=torch.tensor([3])) if dropout_p else {}
    return ops.layer_norm(random(T, D), random(D), random(D), residual=random(T, D), impl="triton", **options)


def attention(lengths):
    return ops.attention(random(T, 3, 3, 32), None, None, cu_seqlens_of(lengths, "cpu"), max(lengths), impl="triton")


def embedding():
    ids = torch.randperm(T), torch.arange(T), torch.arange(T) % 2
    return ops.embedding(*ids, random(T, D), random(T, D), random(2, D), random(D), random(D), impl="triton")


@pytest.mark.parametrize(
    "op, forward, backward",
    [
        # q, k, v, out; then q, k, v, dout, dq, dk, dv
        pytest.param(lambda: attention([20, 1, 43]), 4, 7, id="attention"),
        # x, residual, y; then dy, x, residual, dx and, under dropout, dresidual
        pytest.param(lambda: layer_norm(0.0), 3, 4, id="layer_norm"),
        pytest.param(lambda: layer_norm(0.1), 3, 5, id="layer_norm-dropout"),
        # x, y; then dy, x, dx
        pytest.param(lambda: ops.bias_gelu(random(T, D), random(D), impl="triton"), 2, 3, id="bias_gelu"),
        pytest.param(
            lambda: ops.gelu_layer_norm(random(T, D), random(D), random(D), random(D), impl="triton"), 2, 3,
            id="gelu_layer_norm",
        ),
        # words, positions, y; then dy, words, positions, dz, dz read for each of the two tables, and both gradients
        pytest.param(embedding, 3, 8, id="embedding"),
    ],
)  # fmt: skip
def test_rows_pass_once(op, forward, backward, monkeypatch):
    with counting(monkeypatch, T * D) as moved:
        out = op()
    assert forward * UNIT <= moved[0] <= 1.05 * forward * UNIT
    dout = torch.randn_like(out)
    with counting(monkeypatch, T * D) as moved:
        out.backward(dout)
    assert backward * UNIT <= moved[0] <= 1.05 * backward * UNIT


@pytest.mark.parametrize("gradients, passes", [(False, 1), (True, 3)], ids=["evaluation", "training"])
def test_logits_pass_three_times(gradients, passes, monkeypatch):
    """Read for the loss; read, and written over with their gradient."""
    M, V = 16, 640
    hidden, weight, bias = random(M, 8), random(V, 8), random(V)
    with counting(monkeypatch, M * V) as moved, torch.set_grad_enabled(gradients):
        ops.masked_cross_entropy(hidden, weight, bias, torch.randint(V, (M,)), impl="triton")
    assert passes * M * V * 2 <= moved[0] <= 1.05 * passes * M * V * 2
