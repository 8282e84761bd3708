"""Parameter groups, schedules and clipping."""

import math

import pytest
import torch
from torch import nn

from fastbert.training import optim


class Tied(nn.Module):
    """The parts of a masked-LM head that groups can get wrong: a tied matrix, a bias, a norm, a frozen matrix."""

    def __init__(self):
        super().__init__()
        self.word = nn.Embedding(7, 3)
        self.norm = nn.LayerNorm(3)
        self.decoder = nn.Linear(3, 7)
        self.decoder.weight = self.word.weight
        self.frozen = nn.Linear(3, 3, bias=False).requires_grad_(False)


def test_adamw_decays_matrices_only_and_takes_a_tied_weight_once():
    model = Tied()
    optimizer = optim.adamw(model, learning_rate=0.1, weight_decay=0.2, betas=(0.8, 0.9), epsilon=1e-5)
    decayed, plain = optimizer.param_groups
    assert isinstance(optimizer, torch.optim.AdamW)
    assert decayed["weight_decay"] == 0.2 and plain["weight_decay"] == 0.0
    for group in (decayed, plain):
        assert (group["lr"], group["betas"], group["eps"], group["fused"]) == (0.1, (0.8, 0.9), 1e-5, True)
    assert [id(p) for p in decayed["params"]] == [id(model.word.weight)]
    assert {id(p) for p in plain["params"]} == {id(p) for p in (model.norm.weight, model.norm.bias, model.decoder.bias)}


@pytest.mark.parametrize("name", optim.SCHEDULES)
@pytest.mark.parametrize("warmup", [0, 10])
def test_schedules_rise_once_fall_once_and_never_reach_zero_early(name, warmup):
    schedule = optim.SCHEDULES[name]
    values = [schedule(step, 100, warmup) for step in range(100)]
    assert all(0 < value <= 1 for value in values)
    if warmup:
        assert values[:warmup] == pytest.approx([(step + 1) / warmup for step in range(warmup)])
    after = values[warmup:]
    assert after[0] == pytest.approx(1) and after == sorted(after, reverse=True)
    assert schedule(100, 100, warmup) == 0


def test_schedules_at_known_points():
    assert optim.linear(55, 100, 10) == pytest.approx(0.5)
    assert optim.cosine(55, 100, 10) == pytest.approx(0.5)
    assert optim.cosine(32.5, 100, 10) == pytest.approx(0.5 + 0.5 * math.cos(math.pi / 4))
    assert optim.constant(79, 100, 10) == 1 and optim.constant(90, 100, 10) == pytest.approx(0.5)
    # a budget in seconds may be overrun, or be all warm-up
    assert optim.linear(101.5, 100, 10) == 0
    assert optim.linear(99, 100, 100) == 1


@pytest.mark.parametrize(("max_norm", "expected"), [(1.0, 1.0), (100.0, 13.0), (0.0, 13.0)])
def test_clipping_is_by_the_common_norm(max_norm, expected):
    a, b, untouched = (nn.Parameter(torch.zeros(n)) for n in (2, 1, 1))
    a.grad, b.grad = torch.tensor([3.0, 4.0]), torch.tensor([12.0])
    norm = optim.clip_gradients([a, b, untouched], max_norm)
    assert norm.item() == pytest.approx(13)
    assert torch.cat([a.grad, b.grad]).norm().item() == pytest.approx(expected)
    assert a.grad[0] / b.grad[0] == pytest.approx(3 / 12)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_clipping_leaves_a_gradient_that_is_not_finite_visible(bad):
    a, b = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
    a.grad, b.grad = torch.tensor([bad]), torch.tensor([2.0])
    assert not optim.clip_gradients([a, b], 1.0).isfinite()
    assert b.grad.item() == 2.0
