"""DeBERTa's enhanced mask decoder against the paper's, written out in float64 for a padded batch.

transformers does not have it: its classes give the encoder below the last layer.
"""

import json
import warnings

import pytest
import test_families
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import save_file
from test_families import RELATIVE
from transformers.models.deberta_v2.modeling_deberta_v2 import make_log_bucket_position

from fastbert.model import hf_files, presets
from fastbert.model.heads import MaskedLM, SequenceClassifier
from fastbert.model.replaced_tokens import ReplacedTokenPretraining
from fastbert.packing import Batch, pack_inputs

SIZES = dict(**test_families.SIZES, **RELATIVE, position_biased_input=False, enhanced_mask_decoder=True)
V3 = dict(model_type="deberta-v2", position_buckets=4, share_att_key=True, norm_rel_ebd="layer_norm")
CASES = {
    "v1": dict(model_type="deberta"),
    # heads of 18 and one term, 12 and two: transformers has the square root of 36, their product, in float32
    "v1-c2p": dict(model_type="deberta", pos_att_type=["c2p"], max_relative_positions=6, num_attention_heads=2),
    "v2": dict(model_type="deberta-v2", position_buckets=6),
    "v2-p2c": dict(model_type="deberta-v2", pos_att_type=["p2c"], position_buckets=6, num_attention_heads=2),
    "v3": V3,
    "one layer": {**V3, "num_hidden_layers": 1},
    "convolution": {**V3, "conv_kernel_size": 3, "num_hidden_layers": 2},
}
B, S = 4, 11
TABLE = "deberta.embeddings.position_embeddings.weight"


def model_of(case):
    model = MaskedLM(hf_files.config_from_hf({**SIZES, **CASES[case]}))
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, mean=float("norm.weight" in name), std=0.2)
    return model.double().eval()


def mask_of(kind):
    """int64 [B, S]; in all but "full" one row is padding alone."""
    column, length = torch.arange(S), torch.tensor([11, 3, 0, 8])[:, None]
    return {
        "full": torch.ones(B, S),
        "right": column < length,
        "left": column >= S - length,
        "holes": (column % 3 != length % 3) & (length > 0),
    }[kind].long()


def plain_layer(layer, config, hidden, query_states, mask, relative):
    """One layer of transformers written out: hidden [B, S, D] gives keys and values, query_states [B, S, D] queries."""
    own, heads = layer.attention.self, config.num_attention_heads
    K = config.hidden_size // heads

    def split(x):
        return x.unflatten(-1, (heads, K)).transpose(-3, -2)

    if config.model_type == "deberta":
        # in each head 3 K rows: of the query, of the key, of the value
        weights = own.in_proj.weight.view(heads, 3, K, -1).unbind(1)
        q, k, v = (split(x @ w.flatten(0, 1).T) for x, w in zip((query_states, hidden, hidden), weights))
        q, v = q + own.q_bias.view(heads, 1, K), v + own.v_bias.view(heads, 1, K)
        projections = getattr(own, "pos_proj", None), getattr(own, "pos_q_proj", None)
    else:
        q, k, v = split(own.query_proj(query_states)), split(own.key_proj(hidden)), split(own.value_proj(hidden))
        projections = (
            (own.key_proj, own.query_proj)
            if config.share_att_key
            else (getattr(own, "pos_key_proj", None), getattr(own, "pos_query_proj", None))
        )
    distance, span = torch.arange(S)[:, None] - torch.arange(S), len(relative) // 2
    if getattr(config, "position_buckets", -1) > 0:
        furthest = config.max_relative_positions
        distance = make_log_bucket_position(
            distance, span, furthest if furthest > 0 else SIZES["max_position_embeddings"]
        )
    index = (distance.long() + span).clamp(0, 2 * span - 1)
    scores = q @ k.transpose(-1, -2)
    if "c2p" in config.pos_att_type:
        scores = scores + torch.einsum("bhik,hijk->bhij", q, split(projections[0](relative))[:, index])
    if "p2c" in config.pos_att_type:
        scores = scores + torch.einsum("bhjk,hijk->bhij", k, split(projections[1](relative))[:, index])
    scores = scores / (K * (1 + len(config.pos_att_type))) ** 0.5
    p = scores.masked_fill(~mask.bool()[:, None, None], -1e30).softmax(-1)
    attended = (p @ v).transpose(1, 2).flatten(2)
    x = layer.attention.output.LayerNorm(layer.attention.output.dense(attended) + query_states)
    return layer.output.LayerNorm(layer.output.dense(F.gelu(layer.intermediate.dense(x))) + x)


class Plain:
    """transformers' model below the decoder, in float64, with the weights of `ours`, and the decoder written out."""

    def __init__(self, ours):
        values = hf_files.config_to_hf(ours.config)
        name = {"deberta": "Deberta", "deberta-v2": "DebertaV2"}[ours.config.model_type]
        self.config = transformers.AutoConfig.for_model(**values)
        self.model = getattr(transformers, f"{name}ForMaskedLM")(self.config).double().eval()
        for module in self.model.modules():
            if type(module).__name__ == "DebertaLayerNorm":  # works in float32
                module.forward = lambda x, own=module: F.layer_norm(x, x.shape[-1:], own.weight, own.bias, 1e-7)
        self.table = ours.mask_decoder.position.weight.detach().clone().requires_grad_()
        self.names = hf_files.hf_names(dict(ours.named_parameters()), ours.config, "MaskedLM")
        tensors = {self.names[x]: y for x, y in ours.state_dict().items()}
        assert torch.equal(tensors.pop(TABLE), self.table)
        missing, unexpected = self.model.load_state_dict(tensors, strict=False)
        assert not unexpected and all("decoder" in x or "position_ids" in x for x in missing)

    def logits(self, input_ids, mask, position_ids):
        encoder = self.model.deberta.encoder
        hidden = self.model.deberta(input_ids, mask, output_hidden_states=True).hidden_states[-2]
        query_states = hidden + self.table[position_ids]
        for _ in range(2):
            query_states = plain_layer(
                encoder.layer[-1], self.config, hidden, query_states, mask, encoder.get_rel_embedding()
            )
        return self.model.cls(query_states)

    def gradients(self):
        found = dict(self.model.named_parameters()) | {TABLE: self.table}
        return {ours: found[theirs].grad for ours, theirs in self.names.items()}


def inputs_of(kind):
    mask = mask_of(kind)
    input_ids = torch.randint(10, 99, (B, S)) * mask
    labels = torch.where((torch.rand(B, S) < 0.4) & mask.bool(), torch.randint(10, 99, (B, S)), -100)
    labels[0, 4] = 12
    return input_ids, mask, labels


def assert_gradients_equal(ours, plain):
    for (name, parameter), expected in zip(ours.named_parameters(), plain.gradients().values(), strict=True):
        expected = torch.zeros_like(parameter) if expected is None else expected
        assert (parameter.grad - expected).abs().max() < 1e-9 * max(1, expected.abs().max().item()), name


@pytest.mark.parametrize("kind", ["full", "right", "left", "holes"])
@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients_equal_the_written_out_decoder(case, kind):
    """All rows for the logits, the picked ones for the loss; positions are columns, then given."""
    ours = model_of(case)
    plain = Plain(ours)
    input_ids, mask, labels = inputs_of(kind)
    real = mask.bool()
    for position_ids in (None, torch.randint(0, 40, (B, S))):
        positions = torch.arange(S).expand(B, S) if position_ids is None else position_ids
        expected = plain.logits(input_ids, mask, positions)
        got = ours(input_ids, mask, position_ids=position_ids).logits
        assert (got - expected)[real].abs().max() < 1e-9
    loss = ours(input_ids, mask, position_ids=position_ids, labels=labels).loss
    assert loss.item() == pytest.approx(F.cross_entropy(expected.flatten(0, 1), labels.flatten()).item(), abs=1e-6)
    # float64 all the way: the loss itself is fp32
    cotangent = torch.randn(B, S, 99, dtype=torch.float64) * (labels != -100)[..., None]
    batch, _ = pack_inputs(ours.config, input_ids, mask, position_ids=position_ids, labels=labels)
    (ours.logits(batch, batch.picks) * cotangent[labels != -100]).sum().backward()
    (expected * cotangent).sum().backward()
    assert_gradients_equal(ours, plain)


@pytest.mark.parametrize("picks", [[1, 3, 9, 9, 9], [9], []], ids=["filled up", "the last", "none"])
@pytest.mark.parametrize("case", ["v1", "v3"])
def test_a_packed_batch_of_fixed_capacity(case, picks):
    """Sequences of 4, 0 and 5 tokens, one place past them; picks of that place have no label."""
    ours = model_of(case)
    batch = Batch(
        torch.randint(10, 99, (10,)), torch.tensor([0, 1, 2, 3, 0, 1, 2, 3, 4, 0]), torch.zeros(10, dtype=torch.int64),
        torch.tensor([0, 4, 4, 9], dtype=torch.int32), 5, picks=torch.tensor(picks, dtype=torch.int64),
    )  # fmt: skip
    cotangent = torch.randn(len(picks), 99, dtype=torch.float64)
    some = ours.logits(batch, batch.picks)
    (some * cotangent).sum().backward()
    gradients = [p.grad.clone() for p in ours.parameters()]
    ours.zero_grad()
    every = ours.logits(batch)[batch.picks]
    (every * cotangent).sum().backward()
    assert torch.allclose(some, every, atol=1e-12)
    assert all(torch.allclose(g, p.grad, atol=1e-11) for g, p in zip(gradients, ours.parameters(), strict=True))


def test_a_checkpoint_comes_back_the_same(tmp_path):
    ours = model_of("v3").float()
    ours.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["enhanced_mask_decoder"] is True
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = MaskedLM.from_pretrained(tmp_path)
    assert again.config == ours.config and again.mask_decoder is not None
    assert all(torch.equal(x, again.state_dict()[name]) for name, x in ours.state_dict().items())
    # transformers expects that there may be a table that it does not use
    _, info = transformers.DebertaV2ForMaskedLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    # only a model with the decoder writes the key
    assert "enhanced_mask_decoder" not in hf_files.config_to_hf(presets.preset("deberta-v3-base"))
    assert "enhanced_mask_decoder" not in hf_files.config_to_hf(presets.preset("bert-base"))


@pytest.mark.parametrize("case", ["v1", "v3"])
def test_published_checkpoints_keep_the_table(case, tmp_path):
    """Their config.json does not mention it, and the head's tensors have other names."""
    ours = model_of(case).float()
    ours.save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    del values["enhanced_mask_decoder"]
    (tmp_path / "config.json").write_text(json.dumps(values))
    old = {"transform.dense": "lm_head.dense", "transform.LayerNorm": "lm_head.LayerNorm", "bias": "lm_head.bias"}
    tensors = {}
    names = hf_files.hf_names(ours.state_dict(), ours.config, "MaskedLM")
    for name, tensor in zip(names.values(), ours.state_dict().values()):
        for new, published in old.items():
            name = name.replace(f"cls.predictions.{new}", f"lm_predictions.{published}")
        tensors[name] = tensor
    assert TABLE in tensors and "lm_predictions.lm_head.bias" in tensors
    save_file(tensors, tmp_path / "model.safetensors")
    input_ids, mask, _ = inputs_of("right")
    with pytest.warns(UserWarning, match=f"tensors that this model does not use: {TABLE}"):
        without = MaskedLM.from_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read = MaskedLM.from_pretrained(tmp_path, enhanced_mask_decoder=True)
    assert without.mask_decoder is None
    assert torch.equal(read(input_ids, mask).logits, ours(input_ids, mask).logits)
    assert (without(input_ids, mask).logits - ours(input_ids, mask).logits).abs().max() > 1e-2

    del tensors[TABLE]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.warns(UserWarning, match=f"lacks {TABLE}: these start fresh"):
        MaskedLM.from_pretrained(tmp_path, enhanced_mask_decoder=True)


def test_only_the_masked_language_model_has_it():
    config = hf_files.config_from_hf({**SIZES, **V3})
    assert not [name for name in SequenceClassifier(config).state_dict() if "mask_decoder" in name]
    # in replaced-token detection the generator has it
    model = ReplacedTokenPretraining(config)
    assert [n for n, _ in model.named_parameters() if "mask_decoder" in n] == ["generator.mask_decoder.position.weight"]
    input_ids, mask, labels = inputs_of("right")
    model(input_ids, mask, labels=labels).loss.backward()
    table = model.generator.mask_decoder.position.weight
    assert (table.grad.abs().sum(1) > 0).sum() == len((labels != -100).any(0).nonzero())


def test_dropout_is_replayed_by_its_seed():
    config = hf_files.config_from_hf({**SIZES, **V3, "hidden_dropout_prob": 0.2, "attention_probs_dropout_prob": 0.2})
    model = MaskedLM(config)
    batch, _ = pack_inputs(config, *inputs_of("holes")[:2])

    def logits(seed):
        batch.seed = torch.tensor([seed])
        return model.train().logits(batch)

    assert torch.equal(logits(3), logits(3)) and (logits(3) - logits(4)).abs().max() > 1e-3


@pytest.mark.parametrize(
    "values",
    [dict(position_biased_input=True), dict(model_type="deberta-v2", relative_attention=False, pos_att_type=[])],
    ids=["positions in the input", "plain attention"],
)
def test_where_it_has_no_place(values):
    with pytest.raises(ValueError, match="enhanced_mask_decoder is True: expected disentangled attention"):
        hf_files.config_from_hf({"model_type": "deberta", **SIZES, **values})
    with pytest.raises(ValueError, match="enhanced_mask_decoder is True"):
        presets.preset("bert-base").replace(enhanced_mask_decoder=True)


def test_positions_past_the_table_are_refused():
    model = MaskedLM(hf_files.config_from_hf({**SIZES, **V3}))
    with pytest.raises(ValueError, match="41 tokens long: the model has 40 positions"):
        model(torch.ones(1, 41, dtype=torch.int64))
    with pytest.raises(ValueError, match="position_ids holds 40: the model's table has rows 0 to 39"):
        model(torch.ones(1, 2, dtype=torch.int64), position_ids=torch.tensor([[0, 40]]))
