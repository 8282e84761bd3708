"""embedding: kernels and CPU against the reference in float64, and gradients of repeated ids.

Strides, empty rows, dtypes: in the tests of all ops.
"""

import pytest
import torch
from helpers import assert_op_within_budget, assert_same_bits

from fastbert.kernels import embedding as embedding_file
from fastbert.kernels.embedding import embedding, segment_sums

pytestmark = pytest.mark.usefixtures("poison")

dropouts = pytest.mark.parametrize("dropout_p", [0.0, 0.3], ids=["", "dropout"])
V, P = 11, 9


def make(T, D, device, dtype=torch.float32, types=2, words=V):
    """Three ids, three tables, weight, bias."""
    ids = (torch.randint(words, (T,)), torch.arange(T) % P, torch.randint(types, (T,)))
    parameters = (torch.randn(shape) for shape in ((words, D), (P, D), (types, D), D, D))
    return [*(i.to(device) for i in ids), *(t.to(device, dtype) for t in parameters)]


def dropping(dropout_p, device):
    return dict(dropout_p=dropout_p, seed=torch.tensor([-7], device=device), offset=3)


def check(args, **kwargs):
    assert_op_within_budget(embedding, *args, **kwargs)


def run(args, cotangent=None, **kwargs):
    """The output and the five gradients."""
    inputs = [t.detach().requires_grad_() for t in args[3:]]
    y = embedding(*args[:3], *inputs, **kwargs)
    return y, *torch.autograd.grad(y, inputs, torch.ones_like(y) if cotangent is None else cotangent)


def without(args, *absent):
    """`args` where the tables named (with their ids), or the bias, are None."""
    places = dict(position=(1, 4), types=(2, 5), bias=(7,))
    gone = [i for name in absent for i in places[name]]
    return [None if i in gone else a for i, a in enumerate(args)]


@pytest.fixture
def small_chunks(monkeypatch):
    """Chunks of four sorted tokens, so that a few dozen tokens make several levels."""
    monkeypatch.setattr(embedding_file, "SEGMENTS", {**embedding_file.SEGMENTS, "CHUNK": 4})


@dropouts
@pytest.mark.parametrize(
    "T, D, dtype",
    [(5, 1, torch.float32), (13, 96, torch.float32), (1, 37, torch.float16), (13, 768, torch.float16)],
    ids=str,
)
def test_values_and_gradients(T, D, dtype, dropout_p, device):
    check(make(T, D, device, dtype), **dropping(dropout_p, device))


@pytest.mark.parametrize("types", [1, 2, 3])
@dropouts
def test_numbers_of_types(types, dropout_p, device):
    check(make(13, 37, device, types=types), **dropping(dropout_p, device))


@pytest.mark.parametrize(
    "absent, types", [("position", 3), ("types", 2), ("bias", 3), ("position", 2), ("position types bias", 2)]
)
def test_absent_tables(absent, types, device, small_chunks):
    args = without(make(33, 37, device, types=types), *absent.split())
    check(args, **dropping(0.3, device))
    check(args, padding_idx=3)


def test_a_table_without_ids_is_refused(device):
    args = make(5, 8, device)
    for i, name in ((1, "position_ids"), (5, "token_type_ids")):
        with pytest.raises(ValueError, match=f"{name} and"):
            embedding(*(None if j == i else a for j, a in enumerate(args)))


def test_ids_may_be_int32(device):
    args = make(13, 37, device)
    narrow = [t.int() if i < 3 else t for i, t in enumerate(args)]
    assert_same_bits(run(narrow), run(args))


def test_more_rows_than_programs(device):
    check(make(75, 256, device), **dropping(0.3, device))


def test_wide_rows(device):
    check(make(3, 5000, device))


@pytest.mark.parametrize("T, words", [(4, 1), (5, 200), (16, 5), (17, 2), (33, 1), (70, 5), (70, 200)])
def test_repeated_ids_over_several_levels(T, words, device, small_chunks):
    """From one id for all tokens to ids that occur once, with runs that end at, before and after a chunk's end."""
    check(make(T, 8, device, types=3, words=words))


def test_half_precision_sums_are_rounded_once(device, small_chunks):
    """Between the levels they are fp32: the result is half a unit in the last place off, not one for each level."""
    rows, ids = torch.rand(70, 96).to(device, torch.float16), torch.arange(70, device=device) % 2
    (got,) = segment_sums(rows, ids.int(), [torch.zeros(2, 96, device=device, dtype=torch.float16)], -1)
    wanted = torch.stack([rows[::2].double().sum(0), rows[1::2].double().sum(0)])
    assert ((got.double() - wanted) / wanted).abs().max().item() <= 2**-11 * 1.001
    check(make(70, 96, device, torch.float16, types=3, words=2))


def test_default_chunks_over_three_levels(device):
    ids = torch.cat([torch.full((2060,), 3), torch.arange(60) % 7]).to(device)
    rows = torch.randn(2120, 4).to(device)
    (got,) = segment_sums(rows, ids.int(), [torch.zeros(9, 4, device=device)], -1)
    wanted = torch.zeros(9, 4, dtype=torch.float64, device=device).index_add(0, ids, rows.double())
    torch.testing.assert_close(got.double(), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("padding_idx", [0, V - 1])
def test_the_padding_row_gets_no_gradient(padding_idx, device, small_chunks):
    args = make(33, 8, device)
    args[0][::2] = padding_idx
    check(args, padding_idx=padding_idx)
    dword, dposition = run(args, torch.randn(33, 8, device=device), padding_idx=padding_idx)[1:3]
    assert torch.equal(dword[padding_idx], torch.zeros_like(dword[padding_idx]))
    assert dword.any(1).sum() == len(set(args[0].tolist())) - 1 and dposition[padding_idx % P].any()


def test_all_tables_share_one_sort(device, monkeypatch):
    calls = []
    sort = torch.sort
    monkeypatch.setattr(torch, "sort", lambda *args, **kwargs: calls.append(args) or sort(*args, **kwargs))
    run(make(33, 8, device, types=3))
    assert len(calls) == 1


def test_every_token_is_padding(device, small_chunks):
    args = make(13, 8, device)
    args[0].fill_(0)
    dword = run(args, torch.randn(13, 8, device=device), padding_idx=0)[1]
    assert torch.equal(dword, torch.zeros_like(dword))


@pytest.mark.parametrize("value", [0.1, 1234.567])
def test_a_row_of_one_number_gives_the_bias(value, device):
    *ids, word, position, token_type, weight, bias = make(5, 37, device)
    tables = torch.full_like(word, value), torch.zeros_like(position), torch.zeros_like(token_type)
    assert torch.equal(embedding(*ids, *tables, weight, bias), bias.expand(5, 37))
