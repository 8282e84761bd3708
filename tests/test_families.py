"""Every family against transformers' own classes: values, every gradient, checkpoints both ways, published sizes.

A family is a row of CASES: a transformers config of odd sizes, in which nothing has the same size by chance.
"""

import json

import pytest
import torch
import transformers

from fastbert import variants
from fastbert.heads import MaskedLM, pack_inputs

SIZES = dict(
    vocab_size=99, hidden_size=36, num_hidden_layers=3, num_attention_heads=3, intermediate_size=37,
    max_position_embeddings=40, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
)  # fmt: skip
DISTILBERT = dict(
    vocab_size=99, dim=36, n_layers=3, n_heads=3, hidden_dim=37, max_position_embeddings=40, dropout=0.0,
    attention_dropout=0.0,
)  # fmt: skip

# name -> (transformers' name of the family, its config)
CASES = {
    "bert": ("Bert", SIZES),
    "roberta": ("Roberta", {**SIZES, "type_vocab_size": 1, "layer_norm_eps": 1e-5}),
    "xlm-roberta": ("XLMRoberta", {**SIZES, "type_vocab_size": 1, "pad_token_id": 5, "hidden_act": "gelu_new"}),
    "albert": ("Albert", {**SIZES, "embedding_size": 13}),
    "albert-groups": (
        "Albert", {**SIZES, "embedding_size": 36, "num_hidden_layers": 4, "num_hidden_groups": 2, "inner_group_num": 2},
    ),
    "electra": ("Electra", {**SIZES, "embedding_size": 13}),
    "electra-square": ("Electra", {**SIZES, "embedding_size": 36, "hidden_act": "gelu_new"}),
    "distilbert": ("DistilBert", DISTILBERT),
}  # fmt: skip
B, S = 7, 17
MASKS = ["full", "right", "left", "holes"]


def mask_of(kind):
    """int64 [B, S]; in all but "full" some rows are short, and one is padding alone."""
    column, length = torch.arange(S), torch.randint(2, S + 1, (B, 1))
    mask = {
        "full": torch.ones(B, S),
        "right": column < length,
        "left": column >= S - length,
        "holes": (torch.rand(B, S) < 0.6) | (column == 3),
    }[kind].long()
    if kind != "full":
        mask[2] = 0
    return mask


def theirs_of(case, head):
    """transformers' model with weights larger than its initial ones, so that differences show."""
    name, options = CASES[case]
    config = getattr(transformers, f"{name}Config")(**options)
    model = getattr(transformers, name + head)(config)
    for parameter_name, parameter in model.named_parameters():
        is_norm_weight = "norm" in parameter_name.lower() and parameter_name.endswith("weight")
        torch.nn.init.normal_(parameter, mean=float(is_norm_weight), std=0.2)
    return model.eval()


@pytest.fixture(params=CASES)
def pair(request, tmp_path):
    """(ours, theirs): masked language models with the same weights."""
    theirs = theirs_of(request.param, "ForMaskedLM")
    theirs.save_pretrained(tmp_path)
    return MaskedLM.from_pretrained(tmp_path), theirs


def inputs_of(config, kind):
    mask = mask_of(kind)
    pad = config.pad_token_id
    ids = torch.randint(10, 99, (B, S)).masked_fill(mask == 0, pad)
    labels = torch.where((torch.rand(B, S) < 0.3) & mask.bool(), ids, -100)
    inputs = dict(input_ids=ids, attention_mask=mask, labels=labels)
    if config.type_vocab_size > 1:
        inputs["token_type_ids"] = torch.randint(0, config.type_vocab_size, (B, S))
    return inputs


def assert_gradients_equal(ours, theirs):
    names = variants.hf_names(dict(ours.named_parameters()), ours.config, type(ours).__name__)
    expected = dict(theirs.named_parameters(remove_duplicate=False))
    assert {id(expected[name]) for name in names.values()} == {id(x) for x in theirs.parameters()}
    for name, parameter in ours.named_parameters():
        gradient = expected[names[name]].grad
        own = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        gradient = torch.zeros_like(parameter) if gradient is None else gradient
        assert (own - gradient).abs().max() < 1e-5 * max(1, gradient.abs().max().item()), name


@pytest.mark.parametrize("kind", MASKS)
def test_values_and_gradients_equal_transformers(pair, kind):
    ours, theirs = pair
    inputs = inputs_of(ours.config, kind)
    real = inputs["attention_mask"].bool()
    labels = inputs.pop("labels")
    encoder = getattr(theirs, theirs.base_model_prefix)
    batch, _ = pack_inputs(ours.config, **inputs)
    hidden = encoder(**inputs).last_hidden_state[real]
    assert (ours.encoder(batch) - hidden).abs().max() < 1e-5
    scores, expected = ours(**inputs).logits, theirs(**inputs).logits
    assert (scores - expected)[real].abs().max() < 1e-5 * max(1, expected.abs().max().item())

    loss, expected = ours(**inputs, labels=labels).loss, theirs(**inputs, labels=labels).loss
    assert (loss - expected).abs() < 1e-5
    loss.backward()
    expected.backward()
    assert_gradients_equal(ours, theirs)


def test_given_position_ids(pair):
    ours, theirs = pair
    inputs = inputs_of(ours.config, "left")
    del inputs["labels"]
    if CASES_WITHOUT_POSITION_IDS & {ours.config.model_type}:
        pytest.skip("transformers' class takes no position_ids")
    positions = torch.randint(ours.config.position_offset, 40, (B, S))
    real = inputs["attention_mask"].bool()
    expected = theirs(**inputs, position_ids=positions).logits
    difference = ours(**inputs, position_ids=positions).logits - expected
    assert difference[real].abs().max() < 1e-5 * max(1, expected.abs().max().item())


CASES_WITHOUT_POSITION_IDS = {"none"}


def test_saved_directories_load_in_transformers(pair, tmp_path):
    ours, theirs = pair
    ours.save_pretrained(tmp_path / "saved")
    reloaded, info = type(theirs).from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert not any(info.values()), info
    expected, got = theirs.state_dict(), reloaded.state_dict()
    assert all(torch.equal(expected[name], got[name]) for name in expected)
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    original = theirs.config.to_dict()
    assert all(original[key] == value for key, value in config.items() if key != "architectures"), config
    assert ours.config == variants.read_config(tmp_path / "saved" / "config.json")
