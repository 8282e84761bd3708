"""A layer for inference: the same values as op by op, whatever happens to its weights."""

import copy
import gc
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from fastbert import pack, preset
from fastbert.cpu import inference, libraries
from fastbert.model.heads import MaskedLM

LENGTHS = 40, 7, 1, 19


@pytest.fixture(params=["onednn", "torch"])
def library(request, monkeypatch):
    monkeypatch.setattr(libraries, "PINNED", request.param)
    with libraries.restored({}):
        yield request.param


@pytest.fixture
def model():
    # products of 67 rows are above the size from which oneDNN multiplies
    config = preset("bert-tiny").replace(vocab_size=100, hidden_size=128, intermediate_size=320, num_attention_heads=4)
    return MaskedLM(config).eval()


def small(family, **changes):
    sizes = dict(vocab_size=100, hidden_size=128, intermediate_size=320, num_attention_heads=4, num_hidden_layers=2)
    return preset(family).replace(**sizes | changes)


@pytest.mark.parametrize("family", ["albert-base-v2", "mpnet-base"])
def test_values_of_another_family(family, library, batch):
    check(MaskedLM(small(family)).eval(), batch)


@pytest.mark.parametrize("changes", [{}, {"share_att_key": False}, {"pos_att_type": ("c2p",)}], ids=str)
def test_values_of_relative_positions(changes, library, batch):
    """The table and its projections are read again, too."""
    model = MaskedLM(small("deberta-v3-small", **changes)).eval()
    before, attention = check(model, batch), model.encoder.blocks[1].attention
    for weight in (model.encoder.relative.table.weight, attention.position_projections()[0].weight):
        with torch.no_grad():
            weight.normal_()
        changed = check(model, batch)
        assert not torch.allclose(changed, before, atol=1e-4)
        before = changed


# a window that some sequences are longer than, and one that none is
@pytest.mark.parametrize("window", [8, 64])
def test_values_of_a_pre_norm_family(window, library, batch):
    config = small("modernbert-base", windows=(None, window), pad_token_id=0, rope_thetas=(1e4, 1e4))
    model = MaskedLM(config).eval()
    before = check(model, batch)
    for name in ("attention.qkv", "feed_forward.up", "feed_forward_norm"):
        with torch.no_grad():
            model.encoder.blocks[0].get_submodule(name).weight.mul_(1.5)
        changed = check(model, batch)
        assert not torch.allclose(changed, before, atol=1e-4)
        before = changed


def test_gaps_in_a_sequence_and_a_bias(library):
    """Padding between tokens: a bias goes by the columns, so op by op."""
    config = preset("mpnet-base").replace(
        vocab_size=100, hidden_size=128, intermediate_size=320, num_attention_heads=4, num_hidden_layers=1
    )
    model, mask = MaskedLM(config).eval(), torch.ones(2, 40, dtype=torch.int64)
    mask[0, 3:30] = 0
    batch = pack(torch.randint(5, 100, (2, 40)), mask)[0]
    with torch.no_grad():
        got = model.encoder(batch)
    assert not layers_of(model)
    torch.testing.assert_close(got, model.encoder(batch), rtol=1e-5, atol=1e-5)


@pytest.fixture
def batch():
    mask = (torch.arange(40) < torch.tensor(LENGTHS)[:, None]).long()
    return pack(torch.randint(5, 100, (len(LENGTHS), 40)), mask)[0]


def layers_of(model):
    return [inference._PREPARED[block][0] for block in model.encoder.blocks if block in inference._PREPARED]


def check(model, batch):
    """Within no_grad the layers run prepared, with the values that they have op by op."""
    with torch.no_grad():
        got = model.encoder(batch)
    assert len(layers_of(model)) == len(model.encoder.blocks)
    expected = model.encoder(batch)
    assert expected.requires_grad and not got.requires_grad
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    return got


def test_values(library, model, batch):
    check(model, batch)
    packed = [linear.packed is not None for linear in layers_of(model)[0].linears]
    assert packed == [library == "onednn"] * 4


def in_place(block):
    block.attention.value.weight.mul_(1.5)


def by_data(block):
    block.attention.output.weight.data.mul_(1.5)


def merged(block):
    # as peft merges an adapter
    block.feed_forward.down.weight.data += torch.randn(128, 1) @ torch.randn(1, 320) / 10


def pruned_row(block):
    block.attention.value.weight.data[37] = 5.0


def pruned_column(block):
    block.feed_forward.down.weight.data[:, 201] = 5.0


def other_data(block):
    block.feed_forward.up.weight.data = torch.randn(320, 128) / 10


def other_parameter(block):
    block.attention.query.bias = torch.nn.Parameter(torch.randn(128))


def other_module(block):
    block.feed_forward.down = torch.nn.Linear(320, 128)


def loaded(block):
    block.load_state_dict({name: 1.1 * x for name, x in block.state_dict().items()})


def other_dtype(block):
    block.bfloat16().float()


CHANGES = (
    in_place,
    by_data,
    merged,
    pruned_row,
    pruned_column,
    other_data,
    other_parameter,
    other_module,
    loaded,
    other_dtype,
)


@pytest.mark.parametrize("change", CHANGES, ids=[change.__name__ for change in CHANGES])
def test_changed_weights_are_read_again(change, library, model, batch):
    before = check(model, batch)
    with torch.no_grad():
        change(model.encoder.blocks[0])
    assert not torch.allclose(check(model, batch), before, atol=1e-4)


def test_after_a_step_of_training(library, model, batch):
    before = check(model, batch)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    model.train().encoder(batch).square().sum().backward()
    optimizer.step()
    assert not torch.allclose(check(model.eval(), batch), before, atol=1e-4)


def test_a_copy_has_layers_of_its_own(model, batch):
    check(model, batch)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.encoder.blocks[0].attention.value.weight.mul_(1.5)
    check(other, batch)
    check(model, batch)
    known = len(inference._PREPARED)
    del other
    gc.collect()
    assert len(inference._PREPARED) == known - 2


@pytest.mark.parametrize("name", ["attention", "attention_norm", "feed_forward", "feed_forward_norm"])
def test_a_module_with_a_hook_is_called(name, model, batch):
    seen = []
    hook = getattr(model.encoder.blocks[1], name).register_forward_hook(lambda *arguments: seen.append(1))
    with torch.no_grad():
        model.encoder(batch)
        hook.remove()
        model.encoder(batch)
    assert seen == [1]


def test_a_weight_with_gaps_after_a_call(model, batch):
    check(model, batch)
    linear = model.encoder.blocks[0].attention.output
    linear.weight.data = torch.randn(128, 128).t()
    with torch.no_grad():
        got = model.encoder(batch)
    torch.testing.assert_close(got, model.encoder(batch), rtol=1e-5, atol=1e-5)


def test_another_dtype_after_a_call(model, batch):
    check(model, batch)
    with torch.no_grad():
        assert model.bfloat16().encoder(batch).dtype == torch.bfloat16
        assert model.double().encoder(batch).dtype == torch.float64
    check(model.float(), batch)


def test_threads_share_a_layer(library, model, batch):
    with torch.no_grad():
        expected = model.encoder(batch)
    inference._PREPARED.clear()

    def run(_):
        with torch.inference_mode():
            return model.encoder(batch)

    with ThreadPoolExecutor(4) as pool:
        for got in pool.map(run, range(16)):
            torch.testing.assert_close(got, expected)


def test_what_it_cannot_run(model, batch):
    """Dropout, autocast, other dtypes, some rows only: op by op."""

    def runs(model, **options):
        inference._PREPARED.clear()
        with torch.no_grad():
            model.encoder(batch, **options)
        return len(layers_of(model))

    assert runs(model) == 2
    assert runs(model, rows=torch.tensor([0, 3])) == 1
    assert runs(model.train()) == 0
    assert runs(model.eval().double()) == 0
    with torch.autocast("cpu", torch.bfloat16):
        assert runs(model.float()) == 0
    with torch.inference_mode():
        made_inside = copy.deepcopy(model)
    assert runs(made_inside) == 0
