"""Forward passes that run again in the backward, derivatives by finite differences, and derivatives of derivatives."""

import pytest
import torch
from calls import CALLS, is_floating
from helpers import PLAIN, cu_seqlens_of
from torch.utils.checkpoint import checkpoint

from fastbert import ops
from fastbert.model.config import EncoderConfig
from fastbert.model.encoder import DropoutStream, Encoder
from fastbert.packing import Batch, Layout

CONFIG = EncoderConfig(
    vocab_size=37, hidden_size=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=40,
    max_position_embeddings=16, hidden_dropout_prob=0.2, attention_probs_dropout_prob=0.3,
)  # fmt: skip
LENGTHS, T = [5, 1, 0, 7], 13
RECOMPUTE = {"reentrant": True, "not reentrant": False}


def gradients(block, layout, x, cotangent, use_reentrant=None):
    """(output, gradients of x and of every parameter). use_reentrant: None keeps all activations."""

    def forward(x):
        # the stream begins at the same place when the forward runs again
        return block(x, layout, DropoutStream(torch.tensor([2**35 + 7], device=x.device)))

    block.zero_grad()
    x = x.detach().requires_grad_()
    if use_reentrant is None:
        y = forward(x)
    else:
        # masks depend on the seed alone, so the generator's state need not be kept and may change in between
        y = checkpoint(forward, x, use_reentrant=use_reentrant, preserve_rng_state=False)
        torch.rand(3)
    y.backward(cotangent)
    return y, x.grad, *(p.grad for p in block.parameters())


@pytest.mark.parametrize("use_reentrant", RECOMPUTE.values(), ids=RECOMPUTE)
@pytest.mark.parametrize("impl", [PLAIN, "triton"])
def test_activation_checkpointing_changes_no_bit(impl, use_reentrant, device, monkeypatch):
    monkeypatch.setattr(ops, "IMPL", impl)
    block = Encoder(CONFIG).to(device).train().blocks[0]
    layout = Layout(cu_seqlens_of(LENGTHS, device), 7, torch.arange(T, device=device) % 7)
    x, cotangent = (torch.randn(T, CONFIG.hidden_size, device=device) for _ in range(2))
    kept = gradients(block, layout, x, cotangent)
    again = gradients(block, layout, x, cotangent, use_reentrant)
    for one, other in zip(kept, again, strict=True):
        assert torch.equal(one, other)
    # there was something to replay: without dropout the values differ
    assert not torch.equal(kept[0], block(x, layout, DropoutStream(None)))


@pytest.mark.parametrize("use_reentrant", RECOMPUTE.values(), ids=RECOMPUTE)
@pytest.mark.parametrize("pre_norm", [False, True], ids=["post-norm", "pre-norm"])
def test_every_block_of_an_encoder_may_be_recomputed(pre_norm, use_reentrant, device, monkeypatch):
    """As a user does it: each block's forward runs through checkpoint, with the encoder's DropoutStream."""
    gate = "first" if pre_norm else None
    config = CONFIG.replace(pre_norm=pre_norm, gate=gate, output_dropout=0.2, mlp_dropout=0.1)
    encoder = Encoder(config).to(device).train()
    batch = Batch(
        torch.arange(T, device=device), torch.arange(T, device=device) % 7,
        torch.zeros(T, dtype=torch.int64, device=device), cu_seqlens_of(LENGTHS, device), 7,
        seed=torch.tensor([9], device=device),
    )  # fmt: skip
    cotangent = torch.randn(T, CONFIG.hidden_size, device=device)

    def results():
        encoder.zero_grad()
        y = encoder(batch)
        y.backward(cotangent)
        return y, *(p.grad for p in encoder.parameters())

    kept = results()
    for block in encoder.blocks:
        forward = block.forward
        monkeypatch.setattr(
            block, "forward", lambda *args, f=forward: checkpoint(f, *args, use_reentrant=use_reentrant)
        )
    for one, other in zip(kept, results(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("impl", ["cpu", "reference"])
@pytest.mark.parametrize("name", CALLS)
def test_formulas_by_finite_differences(name, impl):
    """In float64, of gradients and of gradients of gradients."""
    call = CALLS[name]
    arguments = call.arguments("cpu", torch.float64)
    names = [name for name, x in arguments.items() if is_floating(x)]

    def function(*leaves):
        outputs = call(arguments | dict(zip(names, leaves)), impl=impl)
        return tuple(x for x in outputs if is_floating(x))

    leaves = [arguments[name].requires_grad_() for name in names]
    assert torch.autograd.gradcheck(function, leaves, nondet_tol=0.0, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, leaves, fast_mode=True)
    # gradgradcheck asks for gradients with a graph only, which a CPU computes in another way
    out = function(*leaves)[0]
    cotangent = torch.randn_like(out)
    once, differentiable = (
        torch.autograd.grad(out, leaves, cotangent, retain_graph=True, create_graph=c) for c in (False, True)
    )
    for one, other in zip(once, differentiable, strict=True):
        torch.testing.assert_close(one, other)


def penalised(call, arguments, impl):
    """Backward of a gradient penalty, which needs second derivatives."""
    leaves = {name: x.detach().requires_grad_() for name, x in arguments.items() if is_floating(x)}
    out = next(x for x in call(arguments | leaves, impl=impl) if x.requires_grad)
    # a cotangent that is 1 everywhere would make LayerNorm's gradient 0
    generator = torch.Generator(device=out.device).manual_seed(1)
    cotangent = torch.randn(out.shape, generator=generator, device=out.device, dtype=out.dtype)
    first = torch.autograd.grad(out, list(leaves.values()), cotangent.requires_grad_(), create_graph=True)
    sum((x * x).sum() for x in first).backward()


@pytest.mark.parametrize("name", CALLS)
def test_kernels_refuse_a_second_derivative_by_name(name, device):
    # two ops use the Function of another op
    op = CALLS[name].op.replace("contrastive", "masked").replace("biased", "disentangled")
    with pytest.raises(RuntimeError, match=f"{op} has no second derivative"):
        penalised(CALLS[name], CALLS[name].arguments(device), "triton")
