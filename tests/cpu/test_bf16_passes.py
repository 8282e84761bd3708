"""Training in bf16: what is cast, and how often. Each cast is a pass over memory that the product's speed pays for."""

from collections import Counter

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastbert import ops


class Casts(TorchDispatchMode):
    """Counts casts by dtypes and number of elements."""

    def __init__(self):
        super().__init__()
        self.seen = Counter()

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        out = function(*arguments, **(options or {}))
        if function is torch.ops.aten._to_copy.default and out.dtype != arguments[0].dtype:
            self.seen[str(arguments[0].dtype)[6:], str(out.dtype)[6:], out.numel()] += 1
        return out


def test_layer_norm_casts_nothing_but_the_dropout_mask():
    """And dropout's mask once in each direction; parameters and their gradients stay float32."""
    x, residual = (torch.randn(6, 32, dtype=torch.bfloat16, requires_grad=True) for _ in range(2))
    weight, bias = torch.randn(32, requires_grad=True), torch.randn(32, requires_grad=True)
    dropout = dict(dropout_p=0.3, seed=torch.tensor([1]))
    with torch.autocast("cpu", torch.bfloat16), Casts() as casts:
        out = ops.layer_norm(x, weight, bias, residual=residual, dtype=torch.bfloat16, **dropout)
        out.backward(torch.ones_like(out))
    assert casts.seen == {("uint8", "bfloat16", 6 * 32): 2}
    assert weight.grad.dtype == bias.grad.dtype == torch.float32
    truth = ops.layer_norm(
        x.detach().double(), weight.detach().double(), bias.detach().double(), residual=residual.detach().double(),
        **dropout,
    )  # fmt: skip
    torch.testing.assert_close(out.double(), truth, rtol=0.02, atol=0.02)


def test_projections_side_by_side_are_cast_before_they_are_joined():
    x = torch.randn(5, 32, dtype=torch.bfloat16)
    weights, biases = [torch.randn(32, 32, requires_grad=True) for _ in range(3)], [torch.zeros(32) for _ in range(3)]
    with torch.autocast("cpu", torch.bfloat16), Casts() as casts:
        ops.linears(x, weights, biases)
    assert casts.seen == {("float32", "bfloat16", 32 * 32): 3, ("float32", "bfloat16", 32): 3}


def test_the_logits_are_widened_once_and_rounded_once():
    hidden, weight = torch.randn(9, 16, requires_grad=True), torch.randn(70, 16, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16), Casts() as casts:
        ops.masked_cross_entropy(hidden, weight, None, torch.randint(70, (9,)))[0].backward()
    logits = {key[:2]: count for key, count in casts.seen.items() if key[2] == 9 * 70}
    assert logits == {("bfloat16", "float32"): 1, ("float32", "bfloat16"): 1}
