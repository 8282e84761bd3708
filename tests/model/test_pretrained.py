"""Faults of a model directory are one clear line; what can be read is read right."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_families import CASES, theirs_of

from fastbert.model import families
from fastbert.model.convert import convert
from fastbert.model.heads import MaskedLM, Pretraining, ReplacedTokenDetector, SequenceClassifier, TokenClassifier
from fastbert.model.sentences import SentenceEmbedder
from fastbert.packing import pack


@pytest.fixture
def bert(tmp_path):
    """A directory that transformers has written: bert, three layers."""
    theirs_of("bert", "ForMaskedLM").save_pretrained(tmp_path)
    return tmp_path


def refuses(directory, message, **options):
    with pytest.raises(ValueError, match=message) as caught:
        MaskedLM.from_pretrained(directory, **options)
    assert "\n" not in str(caught.value) and str(directory) in str(caught.value)


CONFIGS = {
    "a size in quotes": (dict(hidden_size="36"), "hidden_size is '36': expected int"),
    "a fraction": (dict(hidden_size=36.0), "hidden_size is 36.0: expected int"),
    "a word for a number": (dict(hidden_dropout_prob="high"), "hidden_dropout_prob is 'high': expected float"),
    "no layers": (dict(num_hidden_layers=0), "num_hidden_layers is 0: expected 1 to 1024"),
    "padding outside": (dict(pad_token_id=99), "pad_token_id is 99: expected 0 to 98"),
    "pooling": (dict(model_type="modernbert", classifier_pooling="max"), "classifier_pooling is .max.: expected "),
    "even width": (dict(model_type="deberta-v2", conv_kernel_size=4), "conv_kernel_size is 4: expected an odd number"),
    "activation": (dict(model_type="deberta-v2", conv_act="relu"), "conv_act is 'relu': expected one of tanh, gelu"),
    "unknown term": (
        dict(model_type="deberta-v2", relative_attention=True, pos_att_type="c2p|p2p"),
        "expected some of c2p, p2c",
    ),
    "a decoder": (dict(is_decoder=True), "is_decoder is True: expected False"),
    "relative": (dict(position_embedding_type="relative_key"), "position_embedding_type is 'relative_key'"),
    "no type": (dict(model_type=None), "model_type None: expected one of bert, .*roberta"),
    "unknown": (dict(model_type="llama"), "model_type 'llama': expected one of bert, .*roberta.*modernbert"),
    "more layers": (dict(num_hidden_layers=4), "lacks 16 of the encoder's tensors, the first is bert.encoder.layer.3"),
    "wider": (
        dict(intermediate_size=38),
        r"intermediate.dense.weight has shape \(37, 36\), config.json wants \(38, 36",
    ),
    "more words": (dict(vocab_size=100), r"has shape \(99,\), config.json wants \(100,\)"),
    "fewer positions": (dict(max_position_embeddings=30), r"has shape \(40, 36\), config.json wants \(30, 36\)"),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_configs_that_contradict_themselves_or_the_weights(case, bert):
    changes, message = CONFIGS[case]
    path = bert / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    refuses(bert, message)


def with_integers(tensors):
    name = "bert.encoder.layer.0.output.dense.weight"
    return tensors | {name: tensors[name].to(torch.int8)}


def with_another_decoder(tensors):
    return tensors | {"cls.predictions.decoder.weight": torch.ones(99, 36)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (with_integers, "bert.encoder.layer.0.output.dense.weight is of I8: expected floating-point"),
        (with_another_decoder, "cls.predictions.decoder.weight is not the same as bert.embeddings.word_embed"),
    ],
    ids=["quantised", "not tied"],
)  # fmt: skip
def test_weights_that_do_not_fit(change, message, bert):
    save_file(change(load_file(bert / "model.safetensors")), bert / "model.safetensors")
    refuses(bert, message)


@pytest.mark.parametrize("content", [b"", b"text" * 99, "half"], ids=["empty", "text", "truncated"])
def test_files_that_are_no_safetensors(content, bert):
    path = bert / "model.safetensors"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2] if content == "half" else content)
    refuses(bert, "model.safetensors cannot be read: ")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "cannot be read as a file of tensors: EOFError"),
        (b"\x80\x02K\x01.", "cannot be read as a file of tensors"),
        ([torch.ones(2)], "does not hold tensors by name"),
        ({"state_dict": {"a": torch.ones(2)}}, "does not hold tensors by name"),
    ],
    ids=["empty", "another pickle", "a list", "a training state"],
)
def test_pickles_that_are_no_state_dict(content, message, bert):
    (bert / "model.safetensors").unlink()
    path = bert / "pytorch_model.bin"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    refuses(bert, message, allow_pickle=True)


def test_directories_without_a_model(bert):
    with pytest.raises(ValueError, match="bert-base-uncased is no directory: expected one with config.json"):
        MaskedLM.from_pretrained("bert-base-uncased")
    (bert / "model.safetensors").unlink()
    refuses(bert, "has no weights: expected model.safetensors")


@pytest.mark.parametrize(
    "case", ["bert", "roberta", "albert", "electra", "distilbert", "deberta", "deberta-v3", "mpnet", "modernbert"]
)
def test_any_one_of_tied_tensors_may_be_stored(case, tmp_path):
    """Other programs keep the one whose name comes first: roberta's is lm_head.decoder.weight."""
    theirs = theirs_of(case, "ForMaskedLM")
    theirs.save_pretrained(tmp_path)
    expected = MaskedLM.from_pretrained(tmp_path).state_dict()
    row = families.family(theirs.config.model_type)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    word = row.names["encoder.embeddings.word"] + ".weight"
    copy = next(name for name in row.tied if name.endswith("weight"))
    tensors[copy] = tensors[word].clone()
    save_file(tensors, path)
    both = MaskedLM.from_pretrained(tmp_path).state_dict()
    del tensors[word]
    save_file(tensors, path)
    one = MaskedLM.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(x, both[name]) and torch.equal(x, one[name]) for name, x in expected.items())


@pytest.mark.parametrize("head", ["ForMaskedLM", "Model"])
@pytest.mark.parametrize("case", ["bert", "deberta", "deberta-v3"])
def test_a_config_without_architectures_is_converted_by_its_tensors(case, head, tmp_path):
    theirs_of(case, head).save_pretrained(tmp_path / "in")
    path = tmp_path / "in" / "config.json"
    values = json.loads(path.read_text())
    del values["architectures"]
    path.write_text(json.dumps(values))
    model = convert(tmp_path / "in", tmp_path / "out")
    assert type(model) is (MaskedLM if head == "ForMaskedLM" else SentenceEmbedder)
    [written] = json.loads((tmp_path / "out" / "config.json").read_text())["architectures"]
    assert written == CASES[case][0] + head


def test_linear_layers_of_old_sentence_transformers_are_pickles(tmp_path):
    model = SentenceEmbedder(families.config_of("bert", **CASES["bert"][1]), dense=[(36, 7, True, "Tanh")])
    model.save_pretrained(tmp_path)
    path = tmp_path / "2_Dense" / "model.safetensors"
    torch.save(load_file(path), tmp_path / "2_Dense" / "pytorch_model.bin")
    path.unlink()
    with pytest.raises(ValueError, match=re.escape("2_Dense has no model.safetensors, only pytorch_model.bin")):
        SentenceEmbedder.from_pretrained(tmp_path)
    again = SentenceEmbedder.from_pretrained(tmp_path, allow_pickle=True)
    assert all(torch.equal(x, again.state_dict()[name]) for name, x in model.state_dict().items())


ONES = torch.ones(2, 3, dtype=torch.int64)


@pytest.mark.parametrize(
    ("head", "inputs", "message"),
    [
        (MaskedLM, dict(input_ids=ONES[0]), r"input_ids has shape \(3,\): expected \[batch, length\]"),
        (MaskedLM, dict(input_ids=ONES.float()), "input_ids are of torch.float32: expected integers"),
        (MaskedLM, dict(input_ids=ONES, labels=ONES[:, :2]), r"labels has shape \(2, 2\): expected \(2, 3\)"),
        (MaskedLM, dict(input_ids=ONES, token_type_ids=ONES[:, :2]), r"token_type_ids has shape \(2, 2\)"),
        (MaskedLM, dict(input_ids=ONES, attention_mask=ONES[:1]), r"attention_mask has shape \(1, 3\)"),
        (MaskedLM, dict(input_ids=ONES, labels=99 * ONES), "labels hold 99: expected 0 to 98, or -100 for none"),
        (MaskedLM, dict(input_ids=ONES, labels=-ONES), "labels hold -1: expected 0 to 98"),
        (TokenClassifier, dict(input_ids=ONES, labels=2 * ONES), "labels hold 2: expected 0 to 1"),
        (SequenceClassifier, dict(input_ids=ONES, labels=2 * ONES[:, 0]), "labels hold 2: expected 0 to 1"),
        (ReplacedTokenDetector, dict(input_ids=ONES, labels=2 * ONES), "labels hold 2: expected 0 to 1"),
        (Pretraining, dict(input_ids=ONES, next_sentence_label=2 * ONES[:, 0]), "pair labels hold 2: expected 0 to 1"),
        (MaskedLM, dict(input_ids=pack(99 * ONES)[0]), "input_ids hold 99: expected 0 to 98"),
        (MaskedLM, dict(input_ids=pack(ONES, position_ids=99 * ONES)[0]), "position_ids hold 99"),
        (MaskedLM, dict(input_ids=pack(ONES, token_type_ids=99 * ONES)[0]), "token_type_ids hold 99"),
    ],
    ids=[
        "one row", "floats", "short labels", "short segments", "few masks", "label", "negative", "token", "text", "rtd",
        "pair", "packed ids", "packed positions", "packed segments",
    ],
)  # fmt: skip
def test_inputs_that_do_not_fit(head, inputs, message):
    model = head(families.config_of("bert", **CASES["bert"][1]))
    with pytest.raises(ValueError, match=message):
        model(**inputs)


def test_positions_and_segments_may_be_given_once_for_all_rows():
    model = MaskedLM(families.config_of("bert", **CASES["bert"][1])).eval()
    whole = torch.tensor([[3, 1, 2]]).expand(2, 3)
    expected = model(ONES, position_ids=whole, token_type_ids=whole % 2).logits
    for rows in (whole[:1], whole[0]):
        assert torch.equal(model(ONES, position_ids=rows, token_type_ids=rows % 2).logits, expected)


def test_published_gte_directories(tmp_path):
    """They name another model type, have code of their own, other names of tensors, and a scaling of their own."""
    theirs = theirs_of("gte", "Model")
    theirs.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file({f"new.{name.removeprefix('gte.')}": x for name, x in tensors.items()}, tmp_path / "model.safetensors")
    config = json.loads((tmp_path / "config.json").read_text())
    del config["rope_parameters"]
    config |= dict(
        model_type="new", architectures=["NewModel"], auto_map={"AutoModel": "x--modeling.NewModel"}, pack_qkv=True,
        rope_theta=20.0, rope_scaling={"type": "ntk", "factor": 8.0}, layer_norm_type="layer_norm",
        logn_attention_scale=False, position_embedding_type="rope",
    )  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = SentenceEmbedder.from_pretrained(tmp_path, normalize=False)
    K = 12
    theirs.rotary_emb.inv_freq = 1 / (20.0 * 8.0) ** (torch.arange(0, K, 2) / K) / 8.0 ** (2 / K)
    ids = torch.randint(10, 99, (3, 17))
    assert (model(ids) - theirs(ids).last_hidden_state.mean(1)).abs().max() < 1e-5
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_attention_heads": 100}))
    with pytest.raises(ValueError, match="hidden_size is 36: expected a multiple of num_attention_heads, 100"):
        SentenceEmbedder.from_pretrained(tmp_path)
    for key, value in (("logn_attention_scale", True), ("layer_norm_type", "rms_norm"), ("pack_qkv", False)):
        (tmp_path / "config.json").write_text(json.dumps({**config, key: value}))
        with pytest.raises(ValueError, match=f"{key} is {value!r}: expected"):
            SentenceEmbedder.from_pretrained(tmp_path)
