"""embedding: kernels and CPU against the reference in float64, repeated ids, and what must hold to the bit."""

import pytest
import torch
from helpers import LAYOUTS, assert_op_within_budget, assert_same_bits

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


def run(args, cotangent=None, op=embedding, **kwargs):
    """The output and the gradients, five if nothing is absent, for `cotangent` as it lies in memory."""
    inputs = [t if t is None else t.detach().requires_grad_() for t in args[3:]]
    y = op(*args[:3], *inputs, **kwargs)
    leaves = [t for t in inputs if t is not None]
    return y, *torch.autograd.grad(y, leaves, torch.ones_like(y) if cotangent is None else cotangent)


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
@pytest.mark.parametrize("D", [1, 37, 96, 768])
@pytest.mark.parametrize("T", [1, 5, 13])
def test_values_and_gradients(T, D, dropout_p, device):
    check(make(T, D, device), **dropping(dropout_p, device))


@dropouts
@pytest.mark.parametrize("D", [37, 96, 768])
def test_half_precision(D, dropout_p, device):
    check(make(13, D, device, torch.float16), **dropping(dropout_p, device))


@pytest.mark.parametrize("types", [1, 2, 3])
@dropouts
def test_numbers_of_types(types, dropout_p, device):
    check(make(13, 37, device, types=types), **dropping(dropout_p, device))


@pytest.mark.parametrize("absent", ["position", "types", "bias", "position types", "position types bias"])
@pytest.mark.parametrize("types", [2, 3])
def test_absent_tables(types, absent, device, small_chunks):
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


def test_result_in_a_wider_dtype(device):
    """It is not rounded on the way; gradients keep their arguments' dtypes."""
    args = make(13, 96, device, torch.float16)
    check(args, dtype=torch.float32, **dropping(0.3, device))
    y, *gradients = run(args, dtype=torch.float32)
    assert y.dtype == torch.float32 and {g.dtype for g in gradients} == {torch.float16}
    assert not torch.equal(y, y.half().float())


def test_result_in_a_narrower_dtype(device):
    """It is rounded once."""
    args, cotangent = make(13, 96, device), torch.randn(13, 96).to(device, torch.float16)
    y, *gradients = run(args, cotangent.float())
    assert_same_bits(run(args, cotangent, dtype=torch.float16), (y.half(), *gradients))


@pytest.mark.parametrize("dtypes", [(torch.float16, torch.float32), (torch.float32, torch.float16)], ids=str)
def test_mixed_dtypes(dtypes, device):
    *tables, weight, bias = make(13, 96, device)
    tables = [t.to(dtypes[0]) if t.is_floating_point() else t for t in tables]
    check([*tables, weight.to(dtypes[1]), bias.to(dtypes[1])])


@dropouts
def test_more_rows_than_programs(dropout_p, device):
    check(make(75, 256, device), **dropping(dropout_p, device))


def test_wide_rows(device):
    check(make(3, 5000, device))


@pytest.mark.parametrize("T", [4, 5, 16, 17, 33, 70])
@pytest.mark.parametrize("words", [1, 2, 5, 200], ids=lambda n: f"{n}words")
def test_repeated_ids_over_several_levels(words, T, device, small_chunks):
    """From one id that every token has to ids that occur once, with runs that end on, before and after chunks' ends."""
    check(make(T, 8, device, types=3, words=words))


def test_sums_of_halves_are_rounded_once(device, small_chunks):
    """Between the levels they are fp32: the result is half a unit in the last place off, not one for each level."""
    rows, ids = torch.rand(70, 96).to(device, torch.float16), torch.arange(70, device=device) % 2
    (got,) = segment_sums(rows, ids.int(), [torch.zeros(2, 96, device=device, dtype=torch.float16)], -1)
    wanted = torch.stack([rows[::2].double().sum(0), rows[1::2].double().sum(0)])
    assert ((got.double() - wanted) / wanted).abs().max().item() <= 2**-11 * 1.001
    check(make(70, 96, device, torch.float16, types=3, words=2))


def test_default_chunks_over_three_levels(device):
    ids = torch.cat([torch.full((2100,), 3), torch.arange(300) % 7]).to(device)
    rows = torch.randn(2400, 4).to(device)
    (got,) = segment_sums(rows, ids.int(), [torch.zeros(9, 4, device=device)], -1)
    wanted = torch.zeros(9, 4, dtype=torch.float64, device=device).index_add(0, ids, rows.double())
    torch.testing.assert_close(got.double(), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("padding_idx", [0, 4, V - 1])
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


def test_small_spread_on_a_large_mean(device):
    args = make(13, 96, device)
    args[3] = args[3] * 1e-2 + 1e4
    args[4:6] = [t * 1e-2 for t in args[4:6]]
    check(args)


@pytest.mark.parametrize("value", [0.1, 1234.567])
def test_a_row_of_one_number_gives_the_bias(value, device):
    *ids, word, position, token_type, weight, bias = make(5, 37, device)
    tables = torch.full_like(word, value), torch.zeros_like(position), torch.zeros_like(token_type)
    assert torch.equal(embedding(*ids, *tables, weight, bias), bias.expand(5, 37))


def test_dropout_may_drop_everything(device):
    args = make(5, 37, device)
    for result in run(args, **dropping(1.0, device)):
        assert torch.equal(result, torch.zeros_like(result))


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda f: f.__name__)
def test_strides_of_tables_and_gradients(layout, device):
    args, options = make(13, 37, device), dropping(0.3, device)
    cotangent = torch.randn(13, 37).to(device)
    expected = run(args, cotangent, **options)
    assert_same_bits(run(args, layout(cotangent), **options), expected)
    ids = [i.repeat_interleave(2)[::2] for i in args[:3]]
    strided = [*ids, *(layout(t) for t in args[3:6]), *(t.repeat_interleave(2)[::2] for t in args[6:])]
    assert not any(t.is_contiguous() for t in strided)
    assert_same_bits(run(strided, cotangent, **options), expected)


def test_expanded_ids_and_gradients(device):
    args = make(5, 37, device)
    args[0] = args[0][:1].expand(5)
    check(args)
    cotangent = torch.randn(5, 37).to(device)
    for expanded in (cotangent[:1].expand(5, -1), cotangent[:, :1].expand(-1, 37), cotangent[:1, :1].expand(5, 37)):
        assert_same_bits(run(args, expanded), run(args, expanded.contiguous()))


@pytest.mark.parametrize("types", [2, 3])
def test_no_tokens(types, device):
    y, *gradients = run(make(0, 37, device, types=types), **dropping(0.3, device))
    assert y.shape == (0, 37)
    for gradient in gradients:
        assert torch.equal(gradient, torch.zeros_like(gradient))


def test_two_runs_give_the_same_bits(device, small_chunks):
    args, options = make(75, 40, device, types=3), dropping(0.3, device)
    cotangent = torch.randn(75, 40).to(device)
    assert_same_bits(run(args, cotangent, **options), run(args, cotangent, **options))


def test_no_dropout_ignores_the_seed(device):
    args = make(5, 96, device)
    assert_same_bits(run(args, **dropping(0.0, device)), run(args))


@pytest.mark.parametrize("types", [2, 3])
def test_operators_are_well_formed(types, device):
    args, seed = make(5, 37, device, types=types), torch.tensor([1], device=device)
    y, mean, rstd = torch.ops.fastbert.embedding_fwd(*args, 1e-12, 0.3, seed, 2)
    torch.library.opcheck(torch.ops.fastbert.embedding_fwd, (*args, 1e-12, 0.3, seed, 2))
    torch.library.opcheck(torch.ops.fastbert.embedding_fwd, (*args, 1e-12, 0.0, None, 0))
    torch.library.opcheck(torch.ops.fastbert.embedding_bwd, (y, *args, mean, rstd, 0, 0.3, seed, 2))
    torch.library.opcheck(torch.ops.fastbert.embedding_bwd, (y, *args, mean, rstd, -1, 0.0, None, 0))
    args = without(args, "position", "types", "bias")
    wide = dict(dtype=torch.float16)
    torch.library.opcheck(torch.ops.fastbert.embedding_fwd, (*args, 1e-12, 0.0, None, 0), wide)
    torch.library.opcheck(torch.ops.fastbert.embedding_bwd, (y, *args, mean, rstd, -1, 0.0, None, 0))


@dropouts
def test_compiled_whole(dropout_p, device):
    args, options = make(5, 37, device), dropping(dropout_p, device)
    compiled = torch.compile(embedding, fullgraph=True, backend="aot_eager")
    assert_same_bits(run(args, op=compiled, **options), run(args, **options))


def test_second_derivatives_are_refused(device):
    args = make(5, 37, device)
    args[3].requires_grad_()
    (dword,) = torch.autograd.grad(embedding(*args).square().sum(), args[3], create_graph=True)
    with pytest.raises(RuntimeError, match="has no second derivative"):
        dword.sum().backward()
