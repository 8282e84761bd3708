"""attn_implementation="fastbert" against transformers' own eager attention, on every family that looks it up.

Each model is run twice with the same weights; what must agree are the rows of real tokens, and all gradients.
"""

import copy

import pytest
import torch
import transformers
from transformers import DataCollatorWithFlattening
from transformers.masking_utils import create_bidirectional_mask

from fastbert import ops
from fastbert.swapping import attn_implementation

SIZES = dict(
    vocab_size=61, hidden_size=28, num_hidden_layers=2, num_attention_heads=2, intermediate_size=37,
    max_position_embeddings=40, pad_token_id=0,
)  # fmt: skip
FAMILIES = {
    "Bert": SIZES,
    "Roberta": {**SIZES, "type_vocab_size": 1},
    "XLMRoberta": {**SIZES, "type_vocab_size": 1},
    "Albert": {**SIZES, "embedding_size": 13},
    "Electra": {**SIZES, "embedding_size": 13},
    "DistilBert": dict(
        vocab_size=61, dim=28, n_layers=2, n_heads=2, hidden_dim=37, max_position_embeddings=40, pad_token_id=0
    ),
    # a window of 3 to each side, in the second and third layer
    "ModernBert": {
        **SIZES, "num_hidden_layers": 3, "local_attention": 6, "cls_token_id": 1, "sep_token_id": 2, "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "Esm": {**SIZES, "position_embedding_type": "rotary", "token_dropout": False},
    "EuroBert": {**SIZES, "num_key_value_heads": 1},
    "Gte": SIZES,
    "NomicBert": SIZES,
    "JinaEmbeddingsV3": SIZES,
}  # fmt: skip
# the suite switches this rule off
real_pays = ops.pays
NO_INTERFACE = {"MPNet": SIZES, "Deberta": {**SIZES, "relative_attention": True, "pos_att_type": ["c2p", "p2c"]}}
B, S = 3, 11
MASKS = {
    "none": None,
    "full": [[1] * S] * B,
    "right": [[1] * n + [0] * (S - n) for n in (7, S, 1)],
    "left": [[0] * (S - n) + [1] * n for n in (3, S, 7)],
    "holes": [[1, 1, 0] * 3 + [1, 1], [0, 0, 0, 1, 1, 0, 0, 1, 1, 1, 0], [1] * S],
    "a row of padding": [[1] * 5 + [0] * 6, [0] * S, [0] * 4 + [1] * 7],
}


def build(family, kind="Model", attn_implementation="eager", **options):
    config = getattr(transformers, f"{family}Config")(**{**{**FAMILIES, **NO_INTERFACE}[family], **options})
    config._attn_implementation = attn_implementation
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}{kind}")(config)
    # weights large enough for attention to be far from even
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(8)
    return model.eval()


def pair(family, kind="Model", **options):
    """(eager, fastbert) of the same weights."""
    eager = build(family, kind, **options)
    fast = copy.deepcopy(eager)
    fast.set_attn_implementation("fastbert")
    return eager, fast


def batch(mask="right"):
    """(input ids and mask, which tokens are real)."""
    mask = None if MASKS[mask] is None else torch.tensor(MASKS[mask])
    inputs = {"input_ids": torch.randint(3, 61, (B, S)), "attention_mask": mask}
    return inputs, torch.ones(B, S, dtype=torch.bool) if mask is None else mask.bool()


def assert_close(got, wanted, tolerance=1e-5):
    assert torch.isfinite(got).all()
    torch.testing.assert_close(got, wanted, rtol=tolerance, atol=tolerance)


def gradients(model, hidden, real):
    """Of all parameters, for one cotangent on the rows of real tokens."""
    model.zero_grad()
    cotangent = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(1)).to(hidden)
    (hidden * cotangent)[real].sum().backward()
    return {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in model.named_parameters()}


def assert_same_gradients(got, wanted):
    assert got.keys() == wanted.keys()
    for name, gradient in wanted.items():
        error = (got[name] - gradient).abs().max()
        assert error <= 1e-4 * gradient.abs().max() + 1e-5, f"{name}: {error}"


# the interpreter is slow, and the other families differ from BERT in nothing that attention sees
CASES = [("cpu", family, mask) for family in FAMILIES for mask in MASKS]
CASES += [("triton", family, mask) for family in ("Bert", "ModernBert") for mask in ("none", "left", "holes")]
CASES += [("triton", "Bert", "full"), ("triton", "ModernBert", "a row of padding")]


@pytest.mark.parametrize(("impl", "family", "mask"), CASES, indirect=["impl"])
def test_equal_to_eager(family, mask, impl, calls):
    eager, fast = pair(family)
    inputs, real = batch(mask)
    wanted, got = (model(**inputs).last_hidden_state for model in (eager, fast))
    assert_close(got[real], wanted[real])
    # of three layers of ModernBERT, windows with gaps in the mask are left to sdpa
    layers = 1 if family == "ModernBert" and mask == "holes" else fast.config.num_hidden_layers
    assert len(calls) == layers
    assert_same_gradients(gradients(fast, got, real), gradients(eager, wanted, real))
    assert torch.isfinite(got).all()


@pytest.mark.parametrize("family", ["Bert", "ModernBert"])
@pytest.mark.parametrize("mask", ["none", "full", "right", "left"])
def test_what_packing_does_not_pay_for_stays_with_sdpa(family, mask, calls, monkeypatch):
    """On a CPU, short texts and full batches: the values and gradients of sdpa, to the bit."""
    monkeypatch.setattr(ops, "IMPL", "auto")
    monkeypatch.setattr(ops, "pays", real_pays)
    fast = build(family, attn_implementation="fastbert").train()
    inputs, real = batch(mask)
    outs = []
    for name in ("fastbert", "sdpa"):
        fast.set_attn_implementation(name)
        torch.manual_seed(0)
        hidden = fast(**inputs).last_hidden_state
        outs.append([hidden[real], *gradients(fast, hidden, real).values()])
    assert not calls
    assert all(map(torch.equal, *outs))


def test_padding_that_pays_is_left_out_and_the_layer_that_runs_again_does_the_same(calls, monkeypatch):
    monkeypatch.setattr(ops, "IMPL", "auto")
    asked = []
    monkeypatch.setattr(ops, "pays", lambda *arguments: asked.append(arguments[1:]) or True)
    fast = build("Bert", attn_implementation="fastbert").train()
    fast.gradient_checkpointing_enable({"use_reentrant": True})
    fast.enable_input_require_grads()
    inputs, real = batch("right")
    gradients(fast, fast(**inputs).last_hidden_state, real)
    # two layers, each twice; the lengths are 7, 11 and 1
    assert len(calls) == 4
    assert asked == [(171, B * S * S, 28, True, True)]


def test_padding_gives_zero_and_costs_nothing(impl, calls):
    fast = build("Bert", attn_implementation="fastbert")
    outs = []
    for layer in fast.encoder.layer:
        layer.attention.self.register_forward_hook(lambda module, args, output: outs.append(output[0]))
    for mask in ("right", "left", "holes", "a row of padding"):
        inputs, real = batch(mask)
        fast(**inputs)
        # but for the first place, which a pooler reads
        padding = ~real
        padding[:, 0] = False
        assert all((out[padding] == 0).all() and (out[real] != 0).all() for out in outs)
        cu_seqlens = calls[-1][3]
        assert cu_seqlens.tolist() == [0, *real.sum(1).cumsum(0).tolist()]
        outs.clear()


@pytest.mark.parametrize("mask", ["left", "holes", "a row of padding"])
@pytest.mark.parametrize(
    ("family", "kind"),
    [("Bert", "Model"), ("Roberta", "ForSequenceClassification"), ("Albert", "Model"),
     ("DistilBert", "ForSequenceClassification"), ("ModernBert", "ForSequenceClassification")],
)  # fmt: skip
def test_padding_at_the_first_place_is_pooled_as_before(family, kind, mask):
    sdpa, fast = build(family, kind, "sdpa"), build(family, kind, "fastbert")
    inputs, _ = batch(mask)
    name = "pooler_output" if kind == "Model" else "logits"
    for more in ({}, dict(output_attentions=True)):
        assert_close(fast(**inputs, **more)[name], sdpa(**inputs)[name])


def test_what_stands_in_the_padding_does_not_matter(impl):
    fast = build("Bert", attn_implementation="fastbert")
    inputs, real = batch("holes")
    wanted = fast(**inputs).last_hidden_state[real]
    inputs["input_ids"] = torch.where(real, inputs["input_ids"], 7)
    assert torch.equal(fast(**inputs).last_hidden_state[real], wanted)


def test_layout_is_made_once_for_all_layers(monkeypatch, calls):
    made, make = [], attn_implementation._mask
    monkeypatch.setattr(attn_implementation, "_mask", lambda *args: made.append(args) or make(*args))
    fast = build("Albert", attn_implementation="fastbert")
    fast(**batch()[0])
    assert len(made) == 1 and len(calls) == 2
    assert calls[0][3] is calls[1][3]


@pytest.mark.parametrize("window", [1, 2, S - 2, S - 1, S])
@pytest.mark.parametrize("mask", ["none", "left"])
def test_window_ends_where_transformers_ends_it(window, mask, calls):
    eager, fast = pair("ModernBert", local_attention=2 * window)
    inputs, real = batch(mask)
    assert_close(fast(**inputs).last_hidden_state[real], eager(**inputs).last_hidden_state[real])
    # one that all tokens see across is no window
    assert [c[-1]["window"] for c in calls] == [None] + 2 * [window if window < S - 1 else None]


def sequences():
    return [{"input_ids": torch.randint(3, 61, (n,)).tolist()} for n in (5, 1, 9, 6)]


# these tell their layers no position ids, so no attention of transformers' own can know of them
UNTOLD = "DistilBert", "ModernBert", "Esm", "Gte", "JinaEmbeddingsV3"
FLATTENED = [(family, "cu_seq_lens", "cpu") for family in FAMILIES]
FLATTENED += [(family, "position_ids", "cpu") for family in FAMILIES if family not in UNTOLD]
FLATTENED += [("ModernBert", "cu_seq_lens", "triton"), ("Bert", "position_ids", "triton")]


@pytest.mark.parametrize(("family", "by", "impl"), FLATTENED, indirect=["impl"])
def test_flattened_batch(family, by, impl, calls):
    with_lengths = by == "cu_seq_lens"
    eager, fast = pair(family)
    start = 1 if "Roberta" in family else 0
    flattened = DataCollatorWithFlattening(return_flash_attn_kwargs=with_lengths)(rows := sequences())
    flattened.pop("labels")
    flattened["position_ids"] += start
    got = fast(**flattened).last_hidden_state
    apart = [
        eager(torch.tensor([row["input_ids"]]), position_ids=torch.arange(len(row["input_ids"]))[None] + start)
        for row in rows
    ]
    assert_close(got, torch.cat([out.last_hidden_state for out in apart], 1))
    # four sequences, and nothing of the size [T, T]
    assert [tuple(c[3].tolist()) for c in calls] == [(0, 5, 6, 15, 21)] * fast.config.num_hidden_layers
    if with_lengths:
        assert {c[4] for c in calls} == {9}


def test_flattened_batch_with_padding_at_its_end():
    # as padding to a multiple does it
    eager, fast = pair("Bert")
    ids = torch.randint(3, 61, (1, 16))
    lengths = torch.tensor([0, 5, 12, 16], dtype=torch.int32)
    mask = torch.tensor([[1] * 13 + [0] * 3])
    positions = torch.cat([torch.arange(n) for n in (5, 7, 4)])[None]
    inputs = dict(input_ids=ids, attention_mask=mask, position_ids=positions)
    got = fast(**inputs, cu_seq_lens_q=lengths, cu_seq_lens_k=lengths, max_length_q=7, max_length_k=7)
    for start, end in ((0, 5), (5, 12), (12, 13)):
        wanted = eager(ids[:, start:end], position_ids=positions[:, start:end]).last_hidden_state
        assert_close(got.last_hidden_state[:, start:end], wanted)
    weights = fast(**inputs, cu_seq_lens_q=lengths, cu_seq_lens_k=lengths, max_length_q=7, output_attentions=True)
    assert_close(weights.last_hidden_state, got.last_hidden_state)
    assert (weights.attentions[0][0, :, :5, 5:] == 0).all() and (weights.attentions[0][0, :, 5:12, 12:] == 0).all()


@pytest.mark.parametrize(
    "positions", [[7, 3, 9, 1, 0, 2], [0] * 6, [2, 3, 4, 5, 6, 7], [0, 1, 2, 1, 2, 3], [1, 2, 3, 0, 1, 2]], ids=str
)
def test_position_ids_of_ones_own_are_one_sequence(positions):
    eager, fast = pair("Bert")
    inputs = dict(input_ids=torch.randint(3, 61, (1, 6)), position_ids=torch.tensor([positions]))
    assert_close(fast(**inputs).last_hidden_state, eager(**inputs).last_hidden_state)


@pytest.mark.parametrize("mask", ["none", "right", "holes"])
@pytest.mark.parametrize("family", FAMILIES)
def test_output_attentions(family, mask):
    eager, fast = pair(family)
    inputs, real = batch(mask)
    wanted, got = (model(**inputs, output_attentions=True, output_hidden_states=True) for model in (eager, fast))
    assert len(got.attentions) == len(wanted.attentions) == fast.config.num_hidden_layers
    for g, w in zip(got.attentions, wanted.attentions, strict=True):
        # of queries that are real tokens
        assert_close(g.transpose(1, 2)[real], w.transpose(1, 2)[real])
    for g, w in zip(got.hidden_states, wanted.hidden_states, strict=True):
        assert_close(g[real], w[real])
    # asking for weights changes nothing else
    assert_close(fast(**inputs).last_hidden_state, got.last_hidden_state)


def test_masks_of_other_shapes_are_left_to_sdpa(calls):
    eager, fast = pair("Bert")
    inputs, real = batch()
    see = torch.rand(B, 1, S, S) < 0.5
    see |= torch.eye(S, dtype=torch.bool)
    additive = torch.zeros(B, 1, S, S).masked_fill(~see, torch.finfo(torch.float32).min)
    wanted = eager(inputs["input_ids"], attention_mask=additive).last_hidden_state
    for mask in (see, additive):
        assert_close(fast(inputs["input_ids"], attention_mask=mask).last_hidden_state, wanted)
    weights = fast(inputs["input_ids"], attention_mask=see, output_attentions=True)
    assert_close(weights.last_hidden_state, wanted)
    assert not calls


@pytest.mark.parametrize("output_attentions", [False, True])
def test_decoder_and_cross_attention_are_left_to_sdpa(output_attentions, calls):
    options = dict(is_decoder=True, add_cross_attention=True)
    eager, fast = pair("Bert", "LMHeadModel", **options)
    inputs, real = batch("right")
    # another sequence of the same length, whose padding says nothing of the queries
    other = dict(encoder_hidden_states=torch.randn(B, S, 28), encoder_attention_mask=torch.tensor(MASKS["left"]))
    for extra in ({}, other):
        for mask in (inputs["attention_mask"], None):
            arguments = dict(input_ids=inputs["input_ids"], attention_mask=mask, **extra, use_cache=False)
            wanted, got = (m(**arguments, output_attentions=output_attentions) for m in (eager, fast))
            shown = real if mask is not None else torch.ones_like(real)
            assert_close(got.logits[shown], wanted.logits[shown])
            if output_attentions:
                assert_close(got.attentions[0].transpose(1, 2)[shown], wanted.attentions[0].transpose(1, 2)[shown])
    assert not calls
    ids = inputs["input_ids"][:, :4]
    tokens = [
        m.generate(ids, max_new_tokens=4, do_sample=False, attention_mask=torch.ones_like(ids)) for m in (eager, fast)
    ]
    assert torch.equal(*tokens)


@pytest.mark.parametrize("others", ["sdpa", "eager"])
def test_a_pair_whose_modules_keep_another_config(others):
    pair = transformers.EncoderDecoderModel(
        encoder=build("Bert", attn_implementation=others),
        decoder=build("Bert", "LMHeadModel", others, is_decoder=True, add_cross_attention=True),
    ).eval()
    inputs, real = batch("left")
    arguments = dict(**inputs, decoder_input_ids=inputs["input_ids"])
    wanted = pair(**arguments)
    pair.set_attn_implementation("fastbert")
    got = pair(**arguments)
    assert_close(got.encoder_last_hidden_state[real], wanted.encoder_last_hidden_state[real])
    assert_close(got.logits, wanted.logits)


@pytest.mark.parametrize("with_lengths", [True, False])
def test_positions_that_begin_before_the_familys_are_refused(with_lengths):
    flattened = DataCollatorWithFlattening(return_flash_attn_kwargs=with_lengths)(sequences())
    flattened.pop("labels")
    fast = build("Roberta", attn_implementation="fastbert")
    with pytest.raises(ValueError, match="^position_ids .* begin at 0: roberta begins at 1, add 1 to those of Data"):
        fast(**flattened)


def test_mask_functions_of_ones_own_are_built_out():
    config = build("Bert", attn_implementation="fastbert").config
    sdpa = copy.deepcopy(config)
    sdpa._attn_implementation = "sdpa"
    x = torch.zeros(B, S, 28)

    def near(batch, head, q, k):
        return (q - k).abs() < 3

    for options in (
        dict(and_mask_function=near), dict(or_mask_function=near), dict(allow_is_bidirectional_skip=False),
        dict(encoder_hidden_states=torch.zeros(B, S + 2, 28)),
    ):  # fmt: skip
        for mask in (None, torch.tensor(MASKS["left"])):
            if mask is not None and "encoder_hidden_states" in options:
                mask = torch.nn.functional.pad(mask, (0, 2))
            got, wanted = (create_bidirectional_mask(c, x, mask, **options) for c in (config, sdpa))
            assert got is None and wanted is None or torch.equal(got, wanted)


@pytest.mark.parametrize("family", NO_INTERFACE)
def test_models_that_compute_their_attention_themselves(family):
    eager, fast = build(family), build(family, attn_implementation="fastbert")
    inputs, real = batch("holes")
    wanted, got = (model(**inputs).last_hidden_state for model in (eager, fast))
    assert torch.equal(got[real], wanted[real])


def test_more_than_the_kernels_can_do(monkeypatch, calls):
    monkeypatch.setattr(ops, "IMPL", "triton")
    inputs, real = batch("holes")
    eager, fast = pair("Bert", hidden_size=272)  # heads of 136
    assert_close(fast(**inputs).last_hidden_state[real], eager(**inputs).last_hidden_state[real])
    eager, fast = (model.double() for model in pair("Bert"))
    assert_close(fast(**inputs).last_hidden_state[real], eager(**inputs).last_hidden_state[real])
    assert not calls
