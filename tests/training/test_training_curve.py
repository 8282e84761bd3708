"""A tiny model trained with the kernels follows the curve of plain PyTorch, dropout and all."""

import pytest
import torch
from helpers import packed_batch

from fastbert import ops
from fastbert.model.config import EncoderConfig
from fastbert.model.heads import Pretraining

STEPS = 30
# the interpreter takes milliseconds for each head of each sequence, and for each word of the vocabulary
CONFIG = EncoderConfig(
    vocab_size=31, hidden_size=24, num_hidden_layers=1, num_attention_heads=1, intermediate_size=40,
    max_position_embeddings=16,
)  # fmt: skip


def curve(impl, dtype, device, monkeypatch):
    """The masked-LM and pair losses of 30 AdamW steps on batches that repeat, so that there is something to learn."""
    monkeypatch.setattr(ops, "IMPL", impl)
    torch.manual_seed(3)
    model = Pretraining(CONFIG).to(device, dtype).train()
    batches = [packed_batch([9, 1, 0, 5], CONFIG.vocab_size) for _ in range(3)]
    for batch in batches:
        batch.pair_labels = torch.tensor([0, 1, -100, 1])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for step in range(STEPS):
        batch = batches[step % 3].to(device)
        batch.seed = torch.tensor([step], device=device)
        optimizer.zero_grad()
        loss = model(batch).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.detach().double().cpu())
    return torch.stack(losses)


@pytest.fixture
def curves(device, monkeypatch):
    runs = {
        "truth": ("reference", torch.float64),
        "plain": ("reference", torch.float32),
        "cpu": ("cpu", torch.float32),
        "fused": ("triton", torch.float32),
    }
    at = lambda impl: torch.device("cpu") if impl == "cpu" else device  # noqa: E731
    return {name: curve(*run, at(run[0]), monkeypatch) for name, run in runs.items()}


def test_fused_training_follows_the_plain_curve(curves):
    truth, plain = curves["truth"], curves["plain"]
    assert truth[-3:].mean() < 0.8 * truth[:3].mean(), "nothing was learned: the comparison would say nothing"
    budget = 2 * (plain - truth).abs().max() + 1e-5
    for fast in (curves["fused"], curves["cpu"]):
        assert (fast - truth).abs().max() <= budget
