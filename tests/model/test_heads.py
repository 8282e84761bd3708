"""The models against HuggingFace's own: values, every gradient, and checkpoints in both directions."""

import json
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForMaskedLM, BertConfig, BertForMaskedLM, BertForPreTraining, BertModel

from fastbert.model import hf_files, presets
from fastbert.model.heads import MaskedLM, Pretraining

CONFIG = BertConfig(
    vocab_size=99, hidden_size=36, num_hidden_layers=3, num_attention_heads=3, intermediate_size=37,
    max_position_embeddings=40, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
)  # fmt: skip
PAIRS = {"MaskedLM": (MaskedLM, BertForMaskedLM), "Pretraining": (Pretraining, BertForPreTraining)}
B, S = 13, 17


def lengths_mask(keep):
    return torch.stack([keep(torch.arange(S), length) for length in torch.randint(2, S + 1, (B,)).tolist()]).long()


MASKS = {
    "full": lambda: torch.ones(B, S, dtype=torch.int64),
    "right": lambda: lengths_mask(lambda column, length: column < length),
    "left": lambda: lengths_mask(lambda column, length: column >= S - length),
    "holes": lambda: torch.where(torch.arange(S) == 3, 1, (torch.rand(B, S) < 0.6).long()),
}


@pytest.fixture(params=PAIRS)
def pair(request, tmp_path):
    """(ours, theirs) with the same weights, larger than BERT's initial ones so that differences show."""
    ours, theirs = PAIRS[request.param]
    theirs = theirs(CONFIG)
    for name, parameter in theirs.named_parameters():
        torch.nn.init.normal_(parameter, mean="LayerNorm.weight" in name, std=0.2)
    theirs.save_pretrained(tmp_path)
    return ours.from_pretrained(tmp_path), theirs.eval()


def padded_inputs(mask):
    input_ids = torch.randint(0, 99, (B, S))  # id 0 is [PAD]: as a real token, its row still gets no gradient
    labels = torch.where((torch.rand(B, S) < 0.3) & mask.bool(), input_ids, -100)
    return {
        "input_ids": input_ids,
        "attention_mask": mask,
        "token_type_ids": torch.randint(0, 2, (B, S)),
        "labels": labels,
    }


@pytest.mark.parametrize("mask", MASKS)
def test_values_and_gradients_equal_transformers(pair, mask):
    ours, theirs = pair
    mask = MASKS[mask]()
    inputs = padded_inputs(mask)
    if isinstance(ours, Pretraining):
        inputs["next_sentence_label"] = torch.randint(0, 2, (B,))
        if not mask[
            :, 0
        ].all():  # the pooler reads column 0, which is padding here: transformers' own value is of a pad
            del inputs["next_sentence_label"]
    asked = {name: value for name, value in inputs.items() if not name.endswith(("labels", "label"))}
    logits, expected = ours(**asked).logits, theirs(**asked)
    expected = expected.logits if hasattr(expected, "logits") else expected.prediction_logits
    real = mask.bool()
    assert (logits - expected)[real].abs().max() < 1e-5
    if isinstance(ours, Pretraining) and "next_sentence_label" in inputs:
        difference = ours(**asked).pair_logits - theirs(**asked).seq_relationship_logits
        assert difference.abs().max() < 1e-5

    ours(**inputs).loss.backward()
    if isinstance(theirs, BertForPreTraining) and "next_sentence_label" not in inputs:
        # transformers gives no loss for masked tokens alone
        loss = torch.nn.functional.cross_entropy(
            theirs(**asked).prediction_logits.flatten(0, 1), inputs["labels"].flatten()
        )
    else:
        loss = theirs(**inputs).loss
    loss.backward()
    assert (ours(**inputs).loss - loss).abs() < 1e-5
    names = hf_files.hf_names(dict(ours.named_parameters()), ours.config)
    expected = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        gradient = expected[names[name]].grad
        if parameter.grad is None or gradient is None:
            assert (parameter.grad is None or not parameter.grad.any()) and (gradient is None or not gradient.any()), (
                name
            )
            continue
        assert (parameter.grad - gradient).abs().max() < 1e-5, name
    assert len(names) == len(expected)


def test_position_ids_are_honoured(pair):
    ours, theirs = pair
    mask = MASKS["left"]()
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    ids = torch.randint(0, 99, (B, S))
    expected = theirs(ids, attention_mask=mask, position_ids=positions)
    expected = expected.logits if hasattr(expected, "logits") else expected.prediction_logits
    assert (ours(ids, mask, position_ids=positions).logits - expected)[mask.bool()].abs().max() < 1e-5


def test_nothing_picked_gives_zero_where_transformers_gives_nan(pair):
    ours, theirs = pair
    ids = torch.randint(5, 99, (2, 4))
    nothing = torch.full_like(ids, -100)
    if isinstance(theirs, BertForMaskedLM):
        assert theirs(ids, labels=nothing).loss.isnan()
    output = ours(ids, labels=nothing)
    output.loss.backward()
    assert output.loss == 0 and output.losses["mlm"].count == 0
    assert all(p.grad is None or (p.grad == 0).all() for p in ours.parameters())


def test_a_batch_of_padding_alone(pair):
    ours, _ = pair
    ids = torch.randint(5, 99, (2, 4))
    mask = torch.tensor([[0, 0, 0, 0], [1, 1, 0, 0]])
    labels = torch.where(mask.bool(), ids, -100)
    assert torch.isfinite(ours(ids, mask, labels=labels).loss)
    assert (ours(ids, mask).logits[0] == 0).all()
    assert (ours(ids, torch.zeros_like(mask)).logits == 0).all()


def test_masked_tokens_alone_and_pairs_alone(tmp_path):
    model = Pretraining(presets.preset("bert-tiny"))
    ids = torch.randint(5, 99, (2, 4))
    tokens, pairs = model(ids, labels=ids), model(ids, next_sentence_label=torch.tensor([0, 1]))
    both = model.eval()(ids, labels=ids, next_sentence_label=torch.tensor([0, 1]))
    assert [*tokens.losses] == ["mlm"] and [*pairs.losses] == ["pair"] and pairs.losses["pair"].count == 2
    tokens, pairs = model(ids, labels=ids), model(ids, next_sentence_label=torch.tensor([0, 1]))
    torch.testing.assert_close(both.loss, tokens.loss + pairs.loss)


def test_saved_directory_loads_in_transformers_without_a_missing_key(pair, tmp_path):
    ours, theirs = pair
    ours.save_pretrained(tmp_path / "saved")
    reloaded, info = type(theirs).from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert not any(info.values()), info
    for name, parameter in theirs.named_parameters():
        assert torch.equal(parameter, dict(reloaded.named_parameters())[name]), name
    assert isinstance(AutoModelForMaskedLM.from_pretrained(tmp_path / "saved"), BertForMaskedLM)
    stored = load_file(tmp_path / "saved" / "model.safetensors")
    assert not any("decoder" in name for name in stored), "the tied decoder is stored twice"


def rewrite(directory, change):
    path = directory / "model.safetensors"
    save_file(change(load_file(path)), path, metadata={"format": "pt"})


def test_old_names_bare_encoders_and_other_heads_load(tmp_path):
    theirs = BertForPreTraining(CONFIG)
    theirs.save_pretrained(tmp_path)

    def old(tensors):
        renamed = {n.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): t
                   for n, t in tensors.items()}  # fmt: skip
        return {**renamed, "bert.embeddings.position_ids": torch.arange(40)}

    rewrite(tmp_path, old)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours = MaskedLM.from_pretrained(tmp_path)
    assert torch.equal(ours.encoder.embeddings.norm.weight, theirs.bert.embeddings.LayerNorm.weight)

    bare = BertModel(CONFIG)
    bare.save_pretrained(tmp_path / "bare")
    with pytest.warns(UserWarning, match="lacks cls.predictions.bias.*start fresh"):
        ours = MaskedLM.from_pretrained(tmp_path / "bare")
    assert torch.equal(ours.encoder.blocks[2].feed_forward.up.weight, bare.encoder.layer[2].intermediate.dense.weight)


def test_bad_checkpoints_are_one_clear_line(tmp_path):
    BertForMaskedLM(CONFIG).save_pretrained(tmp_path)
    good = load_file(tmp_path / "model.safetensors")
    name = "bert.encoder.layer.1.output.dense.weight"
    path = tmp_path / "model.safetensors"

    def refuses(message):
        with pytest.raises(ValueError, match=message) as caught:
            MaskedLM.from_pretrained(tmp_path)
        assert "\n" not in str(caught.value)

    save_file({n: t for n, t in good.items() if n != name}, path)
    refuses(f"lacks 1 of the encoder's tensors, the first is {name}")
    save_file({**good, name: torch.zeros(3, 3)}, path)
    refuses(rf"{name} has shape \(3, 3\), config.json wants \(36, 37\)")
    path.write_bytes(path.read_bytes()[:-10])
    refuses("model.safetensors cannot be read")
    path.unlink()
    refuses("has no weights: expected model.safetensors")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "model_type": "llama"}))
    refuses("model_type 'llama': expected one of bert")
    (tmp_path / "config.json").write_text("{")
    refuses("config.json is not a readable JSON file")
    save_file({**good, "bert.encoder.novel": torch.zeros(2)}, path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.warns(UserWarning, match="does not use: bert.encoder.novel"):
        MaskedLM.from_pretrained(tmp_path)
