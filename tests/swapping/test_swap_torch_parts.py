"""torch.nn's norms, GELU and loss, swapped: the same values and gradients."""

import copy
import pickle

import pytest
import torch
from test_swap_torch import assert_equal_results, pair, results
from torch import nn

import fastbert
from fastbert import ops


@pytest.mark.parametrize(
    "shape, normalized, options",
    [
        ((3, 5, 37), 37, {}),
        ((3, 5, 37), (5, 37), {}),
        ((3, 5, 37), 37, dict(bias=False)),
        ((3, 5, 37), 37, dict(elementwise_affine=False)),
        ((3, 5, 37), (3, 5, 37), dict(elementwise_affine=False)),
        ((37,), 37, {}),
        ((0, 37), 37, {}),
        ((4, 0), (0,), {}),
        ((3, 37), 37, dict(eps=0.0)),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize("impl", ["cpu", "triton"])
def test_layer_norm(shape, normalized, options, dtype, impl, monkeypatch):
    module, swapped, report = pair(nn.LayerNorm(normalized, dtype=dtype, **options))
    for p in (*module.parameters(), *swapped.parameters()):
        nn.init.uniform_(p, 0.5, 1.5, generator=torch.Generator().manual_seed(3))
    report.raise_if_incomplete()
    x = torch.randn(shape, dtype=dtype)
    wanted = results(module, nn.Module.__call__, x)
    monkeypatch.setattr(ops, "IMPL", impl)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    assert_equal_results(wanted, results(swapped, nn.Module.__call__, x), tolerance)


def test_layer_norm_of_unusual_input():
    module, swapped, _ = pair(nn.LayerNorm(6))
    x = torch.randn(6, 5, 4)
    call = lambda m, x: m(x.transpose(0, 2))  # noqa: E731
    assert_equal_results(results(module, call, x), results(swapped, call, x))
    assert swapped(x.transpose(0, 2)).is_contiguous()
    with pytest.raises(RuntimeError, match="normalized_shape"):
        swapped(torch.randn(4, 12))
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype):
            for value in (x.transpose(0, 2), x.transpose(0, 2).to(dtype)):
                assert swapped(value).dtype == module(value).dtype
    ragged = torch.nested.nested_tensor([torch.randn(n, 6) for n in (2, 3)])
    assert torch.equal(module(ragged).to_padded_tensor(0), swapped(ragged).to_padded_tensor(0))
    assert "8192" in fastbert.swap(nn.LayerNorm((3, 4000))).stayed[0].reason


@pytest.mark.parametrize("shape", [(), (1,), (37,), (2, 3, 4, 5), (0, 4), (4, 0), (3, 1)], ids=str)
@pytest.mark.parametrize("approximate", ["none", "tanh"])
@pytest.mark.parametrize("impl", ["cpu", "triton"])
def test_gelu(shape, approximate, impl, monkeypatch):
    module, swapped, report = pair(nn.GELU(approximate))
    report.raise_if_incomplete()
    monkeypatch.setattr(ops, "IMPL", impl)
    x = torch.randn(shape)
    assert_equal_results(results(module, nn.Module.__call__, x), results(swapped, nn.Module.__call__, x))
    x = x.double()
    assert_equal_results(results(module, nn.Module.__call__, x), results(swapped, nn.Module.__call__, x), 1e-12)
    with torch.inference_mode():
        torch.testing.assert_close(module(x.float()), swapped(x.float()))


def test_gelu_keeps_the_memory_format():
    module, swapped, _ = pair(nn.GELU())
    x = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    assert swapped(x).stride() == module(x).stride()
    assert torch.equal(swapped(x), module(x))


V = 11


class Classifier(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(5, V)
        self.loss = nn.CrossEntropyLoss()

    def forward(self, hidden, labels):
        return self.loss(self.linear(hidden), labels)


def some_labels(*shape, ignore_index=-100):
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, V, shape, generator=generator)
    return labels.masked_fill(torch.rand(shape, generator=generator) < 0.6, ignore_index)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("shape", [(12, V), (2, V, 3, 2), (V,)], ids=str)
def test_cross_entropy(shape, reduction):
    for weighted, label_smoothing, ignore_index in ((False, 0.0, -100), (True, 0.1, 3)):
        weight = torch.rand(V) if weighted else None
        options = dict(ignore_index=ignore_index, reduction=reduction, label_smoothing=label_smoothing)
        module, swapped, report = pair(nn.CrossEntropyLoss(weight, **options))
        report.raise_if_incomplete()
        labels = torch.tensor(5)
        if len(shape) > 1:
            labels = some_labels(shape[0], *shape[2:], ignore_index=ignore_index)
            assert (labels == ignore_index).any() and not (labels == ignore_index).all()
        x, soft = torch.randn(shape), torch.softmax(torch.randn(shape), min(1, len(shape) - 1))
        # torch takes no ignore_index with probabilities
        for target in (labels, soft) if ignore_index < 0 else (labels,):
            call = lambda m, x, target=target: m(x, target)  # noqa: E731
            assert_equal_results(results(module, call, x), results(swapped, call, x))


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weighted", [False, True], ids=["", "weighted"])
@pytest.mark.parametrize("shape", [(12, V), (3, V, 4), (0, V), (V,)], ids=str)
def test_a_mean_of_no_label_is_zero(shape, weighted, label_smoothing):
    weight = torch.rand(V) if weighted else None
    module, swapped, _ = pair(nn.CrossEntropyLoss(weight, label_smoothing=label_smoothing))
    labels = torch.full((shape[0], *shape[2:]) if len(shape) > 1 else (), -100)
    out, gradient = results(swapped, lambda m, x: m(x, labels), torch.randn(shape))
    assert module(torch.randn(shape), labels).isnan()
    assert out.item() == 0 and out.shape == () and not gradient.any() and gradient.isfinite().all()
    for reduction in ("sum", "none"):
        module.reduction = swapped.reduction = reduction
        x = torch.randn(shape)
        assert torch.equal(module(x, labels), swapped(x, labels))


def test_errors_are_torchs():
    x = torch.randn(4, V)
    module, swapped, _ = pair(nn.CrossEntropyLoss(ignore_index=3))
    for labels in (
        torch.tensor([3, 3, -100, 1]), torch.zeros(3, dtype=torch.int64), torch.zeros(4, 1, dtype=torch.int64),
        torch.tensor([0, 1, V, 3]),
    ):  # fmt: skip
        with pytest.raises((ValueError, RuntimeError, IndexError)) as expected:
            module(x, labels)
        with pytest.raises(expected.type):
            swapped(x, labels)


def test_a_loss_after_a_linear_layer(fresh_compiler):
    """With labels and with none: in half precision, under autocast, copied, compiled as one graph."""
    module, swapped, _ = pair(Classifier())
    x, labels = torch.randn(12, 5), some_labels(12)

    def under_autocast(m, x, labels):
        with torch.autocast("cpu", torch.bfloat16):
            return m(x, labels)

    compiled = torch.compile(swapped, backend="eager", fullgraph=True)
    copied = pickle.loads(pickle.dumps(copy.deepcopy(swapped)))
    for wanted, own, call, tolerance in (
        (module, swapped, Classifier.__call__, 1e-5),
        (module, copied, Classifier.__call__, 1e-5),
        (module, swapped, under_autocast, 0.02),
        (module, swapped, lambda m, x, labels: compiled(x, labels) if m is swapped else m(x, labels), 1e-5),
        (copy.deepcopy(module).bfloat16(), copy.deepcopy(swapped).bfloat16(), Classifier.__call__, 0.02),
    ):
        given = x.to(wanted.linear.weight.dtype)
        a, b = (results(m, lambda m, x, call=call: call(m, x, labels), given) for m in (wanted, own))
        assert_equal_results(a, b, tolerance)
        none, *gradients = results(own, lambda m, x, call=call: call(m, x, torch.full_like(labels, -100)), given)
        assert none.item() == 0 and not any(g.any() for g in gradients)
    with torch.no_grad():
        assert torch.equal(module(x, labels), swapped(x, labels))
