"""Linear layers in bf16 and int8: exact integers, rows apart, weights packed again, and a dtype that is not faster."""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from test_inference import CHANGES, LENGTHS

from fastbert import pack, preset
from fastbert.cpu import inference, low_precision, matmul
from fastbert.cpu.low_precision import Packed, products
from fastbert.model.heads import MaskedLM

ENGINES = [x for x in ("onednn", "fbgemm") if x in torch.backends.quantized.supported_engines]


@pytest.fixture(params=ENGINES)
def engine(request, monkeypatch):
    monkeypatch.setattr(low_precision, "fastest_engine", lambda: request.param)
    return request.param


@pytest.fixture
def is_fast(monkeypatch):
    """A processor on which every dtype is twice as fast."""
    monkeypatch.setattr(low_precision, "gain", lambda dtype: 2.0)


def rounded(x, levels):
    """Each row of x [M, K] in float64, rounded to so many steps of its range, as int8 has it."""
    lo, hi = x.double().aminmax(dim=1, keepdim=True)
    step = (hi - lo) / levels
    return ((x.double() - lo) / step).round() * step + lo


@pytest.mark.parametrize("shape", [(1, 37, 5), (13, 96, 130), (130, 768, 96)], ids=str)
def test_int8_is_exact_up_to_its_two_roundings(shape, engine):
    M, K, N = shape
    x, weight, bias = torch.randn(M, K) * torch.rand(M, 1) * 100 + 3, torch.randn(N, K), torch.randn(N)
    step = weight.double().abs().amax(1, keepdim=True) / 127
    truth = rounded(x, 127 if low_precision.saturates(engine) else 255) @ ((weight / step).round() * step).t() + bias
    got = Packed(weight, "int8")(x, bias)
    # a value halfway between two steps may be rounded either way
    size = x.abs().amax(1, keepdim=True) * weight.abs().amax()
    assert ((got - truth).abs() / size).max() < 0.02
    assert ((got - truth).abs() / size).median() < 1e-6


def test_the_largest_numbers_do_not_overflow(engine):
    """Without VNNI, x86 adds two products of 8 bits in 16: a wrong number, and no error."""
    x = torch.ones(70, 512)
    x[:, 0] = 0.0
    got = Packed(torch.ones(33, 512), "int8")(x, None)
    torch.testing.assert_close(got, torch.full((70, 33), 511.0), rtol=1e-5, atol=0)
    got = Packed(-torch.ones(33, 512), "int8")(-x, None)
    torch.testing.assert_close(got, torch.full((70, 33), 511.0), rtol=1e-5, atol=0)


def test_a_row_depends_on_no_other(engine):
    x, packed, bias = torch.randn(9, 96), Packed(torch.randn(64, 96), "int8"), torch.randn(64)
    x[1:4] *= 1e4
    alone = torch.cat([packed(row[None], bias) for row in x])
    assert torch.equal(packed(x, bias), alone)
    x[3, 5], x[6, 0], x[7] = float("nan"), float("inf"), 2.5
    got = packed(x, bias)
    assert got[[3, 6]].isnan().all()
    assert torch.equal(got[[0, 1, 2, 4, 5, 8]], alone[[0, 1, 2, 4, 5, 8]])
    torch.testing.assert_close(got[7], packed(torch.full((1, 96), 2.5), bias)[0])
    assert packed(x[:0], bias).shape == (0, 64)


@pytest.mark.parametrize("dtype", ["bf16", "int8"])
def test_ops_multiply_in_it_only_where_no_gradient_is_wanted(dtype):
    x, weight, bias = torch.randn(5, 96), torch.nn.Parameter(torch.randn(64, 96)), torch.nn.Parameter(torch.randn(64))
    full = matmul.linear(x, weight, bias)
    with products(dtype):
        assert torch.equal(matmul.linear(x, weight, bias), full)
        with torch.no_grad():
            low = matmul.linear(x, weight, bias)
            assert low.dtype == torch.float32 and 1e-4 < (low - full).norm() / full.norm() < 0.02
            joined = matmul.linears(x, [weight, weight], [bias, bias])
            assert torch.equal(joined, torch.cat([low, low], 1))
            gelu = matmul.linear_gelu(x, weight, bias, approximate="tanh")
            torch.testing.assert_close(gelu, F.gelu(low, approximate="tanh"), atol=0.1, rtol=0.01)
            # an inference tensor or a product of others has no version or no second use
            assert torch.equal(matmul.linear(x, weight * 1.0, bias), full)
    with torch.no_grad():
        torch.testing.assert_close(matmul.linear(x, weight, bias), full)


def cosines(a, b):
    return F.cosine_similarity(a, b, dim=-1)


@pytest.fixture
def model():
    config = preset("bert-tiny").replace(vocab_size=100, hidden_size=128, intermediate_size=320, num_attention_heads=4)
    return MaskedLM(config).eval()


@pytest.fixture
def batch():
    mask = (torch.arange(40) < torch.tensor(LENGTHS)[:, None]).long()
    return pack(torch.randint(5, 100, (len(LENGTHS), 40)), mask)[0]


@pytest.mark.parametrize("prepares", [True, False], ids=["prepared", "op by op"])
@pytest.mark.parametrize("dtype", ["bf16", "int8"])
# bf16 sees no rounding to bf16
@pytest.mark.parametrize("change", [pytest.param(x, id=x.__name__) for x in CHANGES if x.__name__ != "other_dtype"])
@torch.no_grad()
def test_changed_weights_are_packed_again(change, dtype, prepares, model, batch, monkeypatch, is_fast):
    if not prepares:
        monkeypatch.setattr(inference, "prepare", lambda *arguments: None)
    full = model.encoder(batch)
    model.encoder.set_dtype(dtype)
    before = model.encoder(batch)
    assert cosines(before, full).min() > 0.99 and not torch.allclose(before, full, atol=1e-4)
    change(model.encoder.blocks[0])
    after = model.encoder(batch)
    # a copy has packed nothing yet
    fresh = copy.deepcopy(model)
    assert torch.equal(after, fresh.encoder(batch))
    assert not torch.allclose(after, before, atol=1e-3)


def test_training_and_autocast_are_as_before(model, batch, is_fast):
    expected = model.encoder(batch)
    model.encoder.set_dtype("int8")
    assert torch.equal(model.encoder(batch), expected)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        got = model.encoder(batch)
    model.encoder.set_dtype("fp32")
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model.encoder(batch), got)


def test_a_model_that_loses_too_much_is_refused_with_the_figure(model, is_fast):
    with torch.no_grad():
        # one column a thousand times as large takes all the steps of a row, but has no part in the result
        for block in model.encoder.blocks:
            block.attention_norm.weight[3] = 1000.0
            block.feed_forward.up.weight[:, 3] = 0.0
            block.feed_forward.up.weight.mul_(50)
            block.feed_forward_norm.weight[3] = 0.0
    training = [module.training for module in model.train().modules()]
    with pytest.raises(ValueError, match=r"^dtype int8: the cosine to fp32 falls to 0\.\d{4} .* least 0.99") as error:
        model.encoder.set_dtype("int8")
    assert "\n" not in str(error.value)
    assert model.encoder.products == "fp32" and [module.training for module in model.modules()] == training
    model.encoder.set_dtype("bf16")


def test_what_is_not_faster_stays_in_fp32_and_says_so(monkeypatch, model):
    for found, auto in ((0.4, "fp32"), (0.0, "fp32"), (1.3, "bf16")):
        monkeypatch.setattr(low_precision, "gain", lambda dtype, found=found: found)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert low_precision.chosen("auto") == auto
            assert low_precision.chosen("fp32") == "fp32"
        if found < low_precision.WORTH:
            with pytest.warns(UserWarning, match=f"^dtype int8 is {found:.2f} times as fast as fp32 .*: fp32 is used$"):
                model.encoder.set_dtype("int8")
            assert model.encoder.products == "fp32"
    with pytest.raises(ValueError, match="dtype is 'int4': expected auto, fp32, bf16, int8"):
        low_precision.chosen("int4")


def test_what_is_faster_is_measured(monkeypatch):
    """By its own candidates: each runs, and the file of times is read once in a process."""
    asked = []

    def measured(kind, sizes, candidates):
        asked.append(kind)
        for call in candidates(kind, sizes):
            call()
        return (2.0, 1.0) if kind in ("int8", "packed") else (1.0, 3.0)

    monkeypatch.setattr(low_precision, "measured", measured)
    monkeypatch.setattr(low_precision, "has_bf16", lambda: False)
    assert low_precision.gain("bf16") == 0.0 and not asked
    assert low_precision.gain("int8") == 3.0 and set(asked) == {"int8", "int8-gain", "packed"}
    assert low_precision.fastest_engine() == "fbgemm"


def test_a_model_that_left_the_cpu_says_that_it_multiplies_as_before():
    said = pytest.warns(UserWarning, match="dtype is 'int8' and the model is on meta: bf16 and int8 are for a CPU")
    with said, products("int8", torch.empty(1, device="meta")):
        pass


def test_training_is_in_float32_where_gradients_are_off_in_the_first_of_two_passes():
    """As under reentrant checkpointing: the second pass is in float32."""
    no_dropout = dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    model = MaskedLM(preset("bert-tiny").replace(vocab_size=100, **no_dropout)).train()
    model.encoder.products = "int8"
    batch = pack(torch.randint(5, 100, (2, 8)))[0]
    with torch.no_grad():
        first = model.encoder(batch)
    torch.testing.assert_close(first, model.encoder(batch), rtol=1e-5, atol=1e-5)
