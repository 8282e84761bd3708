"""Under autocast the ops give the dtypes that torch's own give, and a model trains: bf16, and fp16 with a GradScaler.

What autocast makes of CUDA tensors is in test_fake_cuda.py, for machines without a GPU.
"""

import functools
import inspect

import pytest
import torch
import torch.nn.functional as F
from helpers import PLAIN, cu_seqlens_of, packed_batch

from fastbert import ops
from fastbert.model.config import EncoderConfig
from fastbert.model.heads import MaskedLM

CONFIG = EncoderConfig(
    vocab_size=61, hidden_size=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=40,
    max_position_embeddings=16,
)  # fmt: skip
T, D, V = 9, 24, 37
HALVES = [torch.bfloat16, torch.float16]


def embedded(ids, word, position, weight, bias):
    return F.layer_norm(F.embedding(ids, word) + F.embedding(ids, position), (D,), weight, bias)


def plain_disentangled_attention(q, k, v, positions, relative):
    scores = q @ k.mT + (q @ positions.permute(1, 2, 0)).gather(-1, relative.expand(1, 2, T, T))
    return torch.softmax(scores, -1).to(v.dtype) @ v


def ours_and_torchs(device, impl, dtype):
    """{name: (our op, torch's own ops for the same)} on tensors of `dtype`, parameters too."""

    def normal(*shape):
        return torch.randn(*shape, device=device).to(dtype)

    ids, cu_seqlens = torch.arange(T, device=device), cu_seqlens_of([4, 5], device)
    x, residual, weight, bias, qkv = normal(T, D), normal(T, D), normal(D), normal(D), normal(T, 3, 2, 12)
    table, other, words = normal(V, D), normal(V, D), normal(V)
    heads = [y.transpose(0, 1).unsqueeze(0) for y in qkv.unbind(1)]
    positions, relative = normal(8, 2, 12), torch.randint(8, (T, T), device=device)
    options = dict(impl=impl)
    return {
        "linear": (lambda: ops.linear(x, table, words), lambda: F.linear(x, table, words)),
        "attention": (
            lambda: ops.attention(qkv, None, None, cu_seqlens, 5, **options),
            lambda: F.scaled_dot_product_attention(*heads),
        ),
        "biased_attention": (
            lambda: ops.biased_attention(qkv, None, None, normal(10, 2), cu_seqlens, 5, **options),
            lambda: F.scaled_dot_product_attention(*heads),
        ),
        "disentangled_attention": (
            lambda: ops.disentangled_attention(
                qkv, None, None, positions, None, cu_seqlens, 5, max_relative_positions=4, **options
            ),
            lambda: plain_disentangled_attention(*heads, positions, relative),
        ),
        "layer_norm": (
            lambda: ops.layer_norm(x, weight, bias, residual=residual, **options),
            lambda: F.layer_norm(x + residual, (D,), weight, bias),
        ),
        "bias_gelu": (lambda: ops.bias_gelu(x, bias, **options), lambda: F.gelu(x + bias)),
        "linear_gelu": (
            lambda: ops.linear_gelu(x, table, words, **options),
            lambda: F.gelu(F.linear(x, table, words)),
        ),
        "rms_norm": (lambda: ops.rms_norm(x, weight, **options), lambda: (x.float() * weight).to(x.dtype)),
        "gated_activation": (lambda: ops.gated_activation(x, **options), lambda: F.gelu(x[:, :12]) * x[:, 12:]),
        "gelu_layer_norm": (
            lambda: ops.gelu_layer_norm(x, bias, weight, bias, **options),
            lambda: F.layer_norm(F.gelu(x + bias), (D,), weight, bias),
        ),
        "embedding": (
            lambda: ops.embedding(ids, ids, None, table, other, None, weight, bias, **options),
            lambda: embedded(ids, table, other, weight, bias),
        ),
        "masked_cross_entropy": (
            lambda: ops.masked_cross_entropy(x, table, words, ids, **options)[0],
            lambda: F.cross_entropy(F.linear(x, table, words).float(), ids, reduction="sum"),
        ),
        "pooling": (
            lambda: ops.pooling(x, cu_seqlens, mode="mean", normalize=True, **options),
            lambda: F.normalize(x[:4].sum(0, keepdim=True) / 4),
        ),
        "vocabulary_max": (
            lambda: ops.vocabulary_max(x, table, words, cu_seqlens, 5, **options),
            lambda: F.linear(x, table, words).relu().amax(0, keepdim=True),
        ),
        "contrastive_cross_entropy": (
            lambda: ops.contrastive_cross_entropy(x, other, scale=20.0, **options)[0],
            lambda: F.cross_entropy((x @ other.T).float() * 20, ids),
        ),
    }


NAMES = list(ours_and_torchs(torch.device("cpu"), None, torch.float32))


def test_every_op_is_held_against_torch():
    public = {name for name, f in vars(ops).items() if inspect.isfunction(f) and not name.startswith("_")}
    chosen = {name for name in public if "impl" in inspect.signature(getattr(ops, name)).parameters}
    assert chosen - {"uses_triton", "implementation"} <= set(NAMES)


@pytest.mark.parametrize(
    "autocast, given", [(half, given) for half in HALVES for given in (torch.float32, half)], ids=str
)
@pytest.mark.parametrize("impl", [PLAIN, "triton"])
@pytest.mark.parametrize("name", NAMES)
def test_dtypes_are_those_of_torch(name, impl, autocast, given, device):
    ours, torchs = ours_and_torchs(device, impl, given)[name]
    with torch.autocast(device.type, autocast):
        assert ours().dtype == torchs().dtype
        # autocast is on
        assert F.linear(torch.ones(2, 2, device=device), torch.ones(2, 2, device=device)).dtype == autocast


def batches(device):
    made = [packed_batch([9, 1, 0, 13, 4], CONFIG.vocab_size).to(device) for _ in range(3)]
    for i, batch in enumerate(made):
        batch.seed = torch.tensor([i], device=device)
    return made


def trained(device, autocast=None, steps=20):
    """Losses of a tiny model, in fp32 or under autocast, and its gradients' dtypes."""
    torch.manual_seed(3)
    model = MaskedLM(CONFIG).to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    scaler = torch.amp.GradScaler(device.type, enabled=autocast == torch.float16)
    given, losses = batches(device), []
    for step in range(steps):
        optimizer.zero_grad()
        with torch.autocast(device.type, autocast or torch.bfloat16, enabled=autocast is not None):
            loss = model(given[step % 3]).loss
        assert loss.dtype == torch.float32
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
    assert {parameter.grad.dtype for parameter in model.parameters()} == {torch.float32}
    return torch.tensor(losses)


@functools.cache
def fp32_curve(device):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ops, "IMPL", "auto")
        return trained(device)


@pytest.mark.parametrize("impl", [PLAIN, "triton"])
@pytest.mark.parametrize("autocast", HALVES, ids=str)
def test_a_model_trains_as_in_fp32(autocast, impl, device, monkeypatch):
    """Twenty steps with dropout: the curve stays within a few roundings of the 16-bit dtype of the fp32 curve."""
    if impl == "triton" and device.type == "cpu" and autocast == torch.bfloat16:
        pytest.skip("the interpreter truncates to bfloat16 where a GPU rounds")
    plain = fp32_curve(device)
    monkeypatch.setattr(ops, "IMPL", impl)
    # kernels are slow in the interpreter
    steps = 20 if impl == PLAIN or device.type == "cuda" else 4
    under = trained(device, autocast, steps)
    assert plain[-3:].mean() < 0.9 * plain[:3].mean(), "nothing was learned: the comparison would say nothing"
    # errors of one step, 8 and 11 bits of a loss of 4, grow as the two models drift apart
    rounding = torch.finfo(autocast).eps * plain[0]
    assert ((under - plain[:steps]).abs() <= 2 * rounding).all(), (under - plain[:steps]) / rounding
    assert not torch.equal(under, plain[:steps])


@pytest.mark.parametrize("impl", [PLAIN, "triton"])
def test_gradients_under_a_scaler_are_finite_and_right(impl, device, monkeypatch):
    """Scaled by 2^16 the gradients fit fp16 wherever they pass through it; unscaled they are those of fp32."""
    monkeypatch.setattr(ops, "IMPL", impl)
    model, batch = MaskedLM(CONFIG).to(device).train(), batches(device)[0]
    model(batch).loss.backward()
    plain = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler(device.type, init_scale=2.0**16)
    with torch.autocast(device.type, torch.float16):
        loss = model(batch).loss
    scaler.scale(loss).backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters())
    scaler.unscale_(optimizer)
    for parameter, wanted in zip(model.parameters(), plain):
        assert (parameter.grad - wanted).norm() <= 0.02 * wanted.norm() + 1e-7


@pytest.mark.parametrize("impl", [PLAIN, "triton"])
def test_a_gradient_that_overflows_skips_the_step(impl, device, monkeypatch):
    """Infinity reaches the scaler instead of being lost on the way: no parameter changes, and the scale halves."""
    monkeypatch.setattr(ops, "IMPL", impl)
    model, batch = MaskedLM(CONFIG).to(device).train(), batches(device)[0]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler(device.type, init_scale=2.0**40, growth_interval=1)
    before = [parameter.detach().clone() for parameter in model.parameters()]

    def step():
        optimizer.zero_grad()
        with torch.autocast(device.type, torch.float16):
            loss = model(batch).loss
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()

    step()
    assert scaler.get_scale() == 2.0**39
    assert all(torch.equal(parameter, old) for parameter, old in zip(model.parameters(), before))
    scaler.update(2.0**10)
    step()
    assert any(not torch.equal(parameter, old) for parameter, old in zip(model.parameters(), before))
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())
