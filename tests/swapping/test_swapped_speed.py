"""On a CPU a swapped stack takes the fastest of three: layers prepared for inference, packed rows, the original."""

import pytest
import torch

from fastbert import ops, swap, unswap
from fastbert.cpu import inference, libraries, matmul

transformers = pytest.importorskip("transformers")

# products of 100 rows are above the size from which layers are prepared
SIZES = dict(
    vocab_size=100, hidden_size=128, num_hidden_layers=2, num_attention_heads=4, intermediate_size=256,
    max_position_embeddings=64,
)  # fmt: skip
DISTILBERT = dict(vocab_size=100, dim=128, n_layers=2, n_heads=4, hidden_dim=256, max_position_embeddings=64)
FAMILIES = {
    "Bert": SIZES, "Roberta": SIZES, "XLMRoberta": SIZES, "Electra": SIZES, "DistilBert": DISTILBERT, "MPNet": SIZES,
    "Albert": {**SIZES, "embedding_size": 32, "num_hidden_groups": 2},
    "DebertaV2": {
        **SIZES, "relative_attention": True, "pos_att_type": ["c2p", "p2c"], "position_buckets": 16,
        "share_att_key": True, "norm_rel_ebd": "layer_norm", "type_vocab_size": 0,
    },
    # the second layer has a window, of 8 to each side
    "ModernBert": {
        **SIZES, "local_attention": 16, "layer_types": ["full_attention", "sliding_attention"], "pad_token_id": 0,
        "cls_token_id": 1, "sep_token_id": 2, "bos_token_id": 1, "eos_token_id": 2,
    },
}  # fmt: skip
MASK = (torch.arange(40) < torch.tensor([[40], [33], [5], [22]])).long()
IDS = torch.randint(5, 100, (4, 40), generator=torch.Generator().manual_seed(0))
real_pays = ops.pays


def a_model(family="Bert", **options):
    config = getattr(transformers, f"{family}Config")(**FAMILIES[family], **options)
    return getattr(transformers, f"{family}Model")(config).eval()


def hidden(model, mask=MASK, ids=IDS):
    with torch.no_grad():
        out = model(input_ids=ids, attention_mask=mask).last_hidden_state
    return out if mask is None else out * mask[..., None]


def stack_of(model):
    return next((x for name in ("encoder", "transformer") if (x := getattr(model, name, None)) is not None), model)


@pytest.fixture(autouse=True)
def nothing_prepared():
    inference._PREPARED.clear()


def layers_of(model):
    stack = stack_of(model)
    groups = getattr(stack, "albert_layer_groups", ())
    return [layer for group in groups for layer in group.albert_layers] or getattr(stack, "layer", None) or stack.layers


def prepared(model):
    return sum(layer in inference._PREPARED for layer in layers_of(model))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("mask", [MASK, None], ids=["padding", "no padding"])
def test_prepared_layers_equal_the_original(family, mask):
    model = a_model(family)
    expected = hidden(model, mask)
    swap(model)
    torch.testing.assert_close(hidden(model, mask), expected, rtol=1e-4, atol=1e-5)
    assert prepared(model) == 2
    for parameter in stack_of(model).parameters():
        parameter.data.mul_(1.1)
    changed = hidden(model, mask)
    unswap(model)
    assert not torch.allclose(changed, expected, atol=1e-3)
    torch.testing.assert_close(changed, hidden(model, mask), rtol=1e-4, atol=1e-5)


class Doubled(torch.nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def own_linear(layer):
    layer.output.dense.__class__ = Doubled


def own_activation(layer):
    layer.intermediate.intermediate_act_fn = torch.nn.ReLU()


def own_norm(layer):
    # eps of another kind
    layer.output.LayerNorm = torch.nn.LayerNorm(128, eps=1.0, elementwise_affine=False)


def hook_inside(layer):
    layer.attention.output.dense.register_forward_hook(lambda module, x, out: out + x[0])


def hook_on_a_caller(layer):
    layer.intermediate.register_forward_hook(lambda module, x, out: out + 1)


def own_forward(layer):
    forward = layer.attention.self.value.forward
    layer.attention.self.value.forward = lambda x: forward(x) + 1


def an_adapter(layer):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["query"], init_lora_weights=False)
    peft.inject_adapter_in_model(config, layer)


OWN = own_linear, own_activation, own_norm, hook_inside, hook_on_a_caller, own_forward, an_adapter


@pytest.mark.parametrize("change", OWN, ids=[change.__name__ for change in OWN])
@pytest.mark.parametrize("when", ["before the swap", "after a call"])
def test_what_a_user_has_changed_in_a_layer_is_called(change, when):
    model = a_model()
    plain = hidden(model)
    if when == "after a call":
        swap(model)
        hidden(model)
        assert prepared(model) == 2
    change(stack_of(model).layer[1])
    if when == "before the swap":
        swap(model)
    changed = hidden(model)
    # what was prepared before the change stays, and is not run
    assert prepared(model) < 2 or when == "after a call"
    unswap(model)
    assert not torch.allclose(changed, plain, atol=1e-3)
    torch.testing.assert_close(changed, hidden(model), rtol=1e-4, atol=1e-5)


def on_a_group(model):
    stack_of(model).albert_layer_groups[1].register_forward_hook(lambda module, x, out: out + 1)


def on_attention(model):
    layers_of(model)[1].attention.register_forward_hook(lambda module, x, out: (3 * out[0], *out[1:]))


def in_attention(model):
    attn = layers_of(model)[1].attention.attn
    forward = attn.forward
    attn.forward = lambda x, *args, **kwargs: (forward(x, *args, **kwargs)[0] + 3 * x,)


def on_mlp(model):
    layers_of(model)[1].mlp.register_forward_hook(lambda module, x, out: 2 * out)


def on_identity(model):
    layers_of(model)[0].attn_norm.register_forward_hook(lambda module, x, out: 2 * out)


@pytest.mark.parametrize(
    "family, change",
    [
        ("Albert", on_a_group), ("Albert", on_attention), ("MPNet", on_attention), ("MPNet", in_attention),
        ("ModernBert", on_mlp), ("ModernBert", on_identity),
    ],
)  # fmt: skip
def test_what_a_user_has_changed_in_another_family_is_called(family, change):
    model = a_model(family)
    plain = hidden(model)
    change(model)
    swap(model)
    changed = hidden(model)
    assert prepared(model) < 2
    unswap(model)
    assert not torch.allclose(changed, plain, atol=1e-3)
    torch.testing.assert_close(changed, hidden(model), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["dropout", "attn.dropout", "output.dropout"])
def test_each_dropout_of_mpnet_drops(name):
    model = a_model("MPNet")
    swap(model)
    layer = layers_of(model)[1]
    (layer if name.startswith("output") else layer.attention).get_submodule(name).train()
    assert not torch.equal(hidden(model), hidden(model)) and prepared(model) < 2


def test_dropout_that_is_on_in_evaluation_drops():
    model = a_model()
    swap(model)
    stack_of(model).layer[0].output.dropout.train()
    assert not torch.equal(hidden(model), hidden(model)) and prepared(model) == 0


@pytest.fixture
def spied(monkeypatch):
    """Rows of what `ops.linear` gets, with the rule that the suite switches off."""
    monkeypatch.setattr(ops, "pays", real_pays)
    seen, linear = [], ops.linear
    monkeypatch.setattr(ops, "linear", lambda x, *rest: (seen.append(len(x)), linear(x, *rest))[1])
    return seen


@pytest.mark.parametrize("family", FAMILIES)
def test_a_short_text_runs_the_original_modules(family, spied):
    model = a_model(family)
    ids = IDS[:1, :8]
    expected = hidden(model, None, ids)
    swap(model)
    assert torch.equal(hidden(model, None, ids), expected) and not spied and prepared(model) == 0
    # the answer depends on whether there is padding that can be left out, too
    model(input_ids=IDS[:1, :8], attention_mask=MASK[:1, :8])
    assert not spied


def test_much_padding_is_left_out(spied):
    model = a_model()
    ids, mask = torch.zeros(400, 64, dtype=torch.int64), torch.zeros(400, 64, dtype=torch.int64)
    ids[:, 0], mask[:, 0] = 7, 1
    swap(model)
    model(input_ids=ids, attention_mask=mask)
    assert set(spied) == {400}


def test_what_pays(monkeypatch):
    """More tokens gain more; a slow library, too; gradients and calls cost."""

    def pays(tokens, places, width=768, wants_gradients=False):
        matmul.pays.cache_clear()
        return matmul.pays(tokens, places, width, wants_gradients, 1)

    try:
        assert pays(600, 1024) and not pays(1024, 1024) and pays(600, 1024, wants_gradients=True)
        assert not pays(60, 100, width=64) and not pays(6, 8, wants_gradients=True)
        monkeypatch.setattr(libraries, "PINNED", "auto")
        monkeypatch.setattr(libraries, "_times", lambda *arguments: (0.005, 0.01))
        with libraries.restored({}):
            assert pays(1024, 1024)
    finally:
        matmul.pays.cache_clear()
