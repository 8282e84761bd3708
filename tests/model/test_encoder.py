"""The encoder: its size, its rows, its dropout, and what it costs."""

import pytest
import torch
from helpers import packed_batch
from torch.utils.flop_counter import FlopCounterMode

from fastbert import reference
from fastbert.model import families
from fastbert.model.attentions import RelativePositions
from fastbert.model.config import EncoderConfig
from fastbert.model.encoder import Encoder
from fastbert.model.heads import MaskedLM
from fastbert.model.presets import PRESETS, preset
from fastbert.packing import Layout, pack

TINY = EncoderConfig(
    vocab_size=99, hidden_size=36, num_hidden_layers=3, num_attention_heads=3, intermediate_size=37,
    max_position_embeddings=40,
)  # fmt: skip


def test_presets_have_distinct_shapes_and_unknown_names_are_refused():
    assert len(set(PRESETS.values())) == len(PRESETS)
    with pytest.raises(ValueError, match="'bert-huge'.*bert-base"):
        preset("bert-huge")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": 100}, "hidden_size is 100: expected a multiple of num_attention_heads, 12"),
        ({"hidden_act": "relu"}, "hidden_act is 'relu'"),
        ({"hidden_dropout_prob": 1.0}, "hidden_dropout_prob is 1.0"),
        ({"vocab_size": 0}, "vocab_size is 0"),
    ],
)
def test_config_contradictions_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        EncoderConfig(**change)


@pytest.mark.parametrize("rows", [[0, 6, 7, 8, 20, 24], [24], []], ids=str)
def test_rows_only_is_exact(rows):
    """With rows, the last layer runs on these alone and gives what the full run gives there."""
    encoder = Encoder(TINY).double().eval()
    batch, rows = packed_batch(), torch.tensor(rows, dtype=torch.int64)
    torch.testing.assert_close(encoder(batch, rows), encoder(batch)[rows], rtol=0, atol=1e-12)


def test_rows_only_gradients_are_exact():
    encoder, batch = Encoder(TINY).double().eval(), packed_batch()
    weights = torch.randn(len(batch.picks), 36, dtype=torch.float64)
    gradients = []
    for hidden in (encoder(batch, batch.picks), encoder(batch)[batch.picks]):
        gradients.append(torch.autograd.grad((hidden * weights).sum(), list(encoder.parameters())))
    for a, b in zip(*gradients):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_flops_are_those_of_the_picked_rows():
    """The step's matrix products cost what the formula says: head and last layer on picked rows only."""
    config = TINY.replace(
        vocab_size=501, num_attention_heads=1, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
    )
    model = MaskedLM(config)
    batch = packed_batch([40] * 8, 501, picked=0.15)
    # the counter does not know oneDNN's products
    with torch.backends.mkldnn.flags(enabled=False), FlopCounterMode(display=False) as counter:
        model(batch).loss.backward()
    counted = sum(
        flops for op, flops in counter.get_flop_counts()["Global"].items() if "mm" in str(op) or "addmm" in str(op)
    )
    T, M, D, I, V, L = 320, len(batch.picks), 36, 37, 501, config.num_hidden_layers
    full_layer = 2 * T * (4 * D * D + 2 * D * I)
    last_layer = 2 * T * 2 * D * D + 2 * M * (2 * D * D + 2 * D * I)
    head = 2 * M * (D * D + D * V)
    assert counted == 3 * ((L - 1) * full_layer + last_layer + head)
    assert counted < 0.6 * 3 * (L * full_layer + 2 * T * (D * D + D * V))


def test_dropout_differs_between_layers():
    seen = []
    encoder = Encoder(TINY).train()
    for block in encoder.blocks:
        block.attention_norm.register_forward_pre_hook(lambda module, args: seen.append(args[2].offset))
    encoder(packed_batch())
    assert len(set(seen)) == 3


def test_a_sequence_longer_than_the_positions_is_refused():
    with pytest.raises(ValueError, match="41 tokens: the model has 40 positions"):
        Encoder(TINY)(packed_batch([41]))
    with pytest.raises(ValueError, match="41 tokens long: the model has 40 positions"):
        MaskedLM(TINY)(torch.ones(1, 41, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"attention_mask has shape \(1, 3\): expected \(1, 4\)"):
        pack(torch.ones(1, 4, dtype=torch.int64), torch.ones(1, 3))


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (dict(), {1: 64, 64: 64, 65: 128, 448: 448, 449: 512, 512: 512, 700: 512}),
        (dict(position_buckets=256), {1: 64, 65: 128, 128: 128, 129: 192, 130: 256, 700: 256}),
        (dict(position_buckets=6), {1: 6, 5: 6}),
    ],
    ids=["v1", "v3", "few"],
)
def test_relative_positions_that_no_distance_needs_are_left_out(values, expected):
    """Every distance finds the row that it has in the whole table; `expected`: longest sequence -> half the rows."""
    model = families.config_of("deberta-v2", hidden_size=24, max_relative_positions=512, norm_rel_ebd=True, **values)
    relative = RelativePositions(model)
    torch.nn.init.normal_(relative.table.weight)
    whole = relative.norm(relative.table.weight)
    for longest, span in expected.items():
        layout = Layout(torch.tensor([0, longest], dtype=torch.int32), longest, torch.arange(longest))
        rows, *scale = relative(layout)
        assert len(rows) == 2 * span
        index = reference.relative_index(longest, model.position_buckets, model.max_relative_positions)
        assert torch.equal(rows[reference.relative_index(longest, *scale)], whole[index])
        # padding within a sequence: the columns are as far apart
        layout = Layout(torch.tensor([0, 2], dtype=torch.int32), 2, torch.arange(2), torch.tensor([0, longest - 1]))
        assert torch.equal(relative(layout)[0], rows)
        relative.zero_grad()
        (rows * torch.randn_like(rows)).sum().backward()
        middle = len(whole) // 2
        inside = (torch.arange(len(whole)) - middle + 0.5).abs() < span
        assert torch.equal(relative.table.weight.grad.ne(0).any(1), inside)
