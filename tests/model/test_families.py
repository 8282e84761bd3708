"""Every family against transformers' own classes: values, every gradient, checkpoints both ways.

A family is a row of CASES: a transformers config of odd sizes, in which nothing has the same size by chance.
"""

import json
import subprocess
import sys
import tempfile
import warnings

import pytest
import torch
import transformers
from safetensors.torch import load_file

from fastbert.model import families, hf_files
from fastbert.model.heads import (
    MaskedLM,
    MultipleChoice,
    Pretraining,
    QuestionAnswerer,
    ReplacedTokenDetector,
    SequenceClassifier,
    TokenClassifier,
)
from fastbert.packing import pack_inputs

SIZES = dict(
    vocab_size=99, hidden_size=36, num_hidden_layers=3, num_attention_heads=3, intermediate_size=37,
    max_position_embeddings=40, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
)  # fmt: skip
DISTILBERT = dict(
    vocab_size=99, dim=36, n_layers=3, n_heads=3, hidden_dim=37, max_position_embeddings=40, dropout=0.0,
    attention_dropout=0.0,
)  # fmt: skip

RELATIVE = dict(relative_attention=True, pos_att_type=["c2p", "p2c"], type_vocab_size=0)
V3 = dict(
    **RELATIVE, position_buckets=4, share_att_key=True, norm_rel_ebd="layer_norm", position_biased_input=False,
)  # fmt: skip
MODERNBERT = dict(
    vocab_size=99, hidden_size=36, num_hidden_layers=5, num_attention_heads=3, intermediate_size=37, local_attention=8,
    pad_token_id=0, cls_token_id=1, sep_token_id=2, bos_token_id=1, eos_token_id=2,
)  # fmt: skip

# name -> (transformers' name of the family, its config)
CASES = {
    "bert": ("Bert", SIZES),
    "roberta": ("Roberta", {**SIZES, "type_vocab_size": 1, "layer_norm_eps": 1e-5}),
    "xlm-roberta": ("XLMRoberta", {**SIZES, "type_vocab_size": 1, "pad_token_id": 5, "hidden_act": "gelu_new"}),
    "camembert": ("Camembert", SIZES),
    "data2vec-text": ("Data2VecText", {**SIZES, "type_vocab_size": 1}),
    "ernie": ("Ernie", SIZES),
    "ernie-tasks": ("Ernie", {**SIZES, "use_task_id": True, "task_type_vocab_size": 2}),
    "megatron-bert": ("MegatronBert", SIZES),
    "roberta-prelayernorm": ("RobertaPreLayerNorm", {**SIZES, "hidden_act": "gelu_new"}),
    "xlm-roberta-xl": ("XLMRobertaXL", SIZES),
    "albert": ("Albert", {**SIZES, "embedding_size": 13}),
    "albert-groups": (
        "Albert", {**SIZES, "embedding_size": 36, "num_hidden_layers": 4, "num_hidden_groups": 2, "inner_group_num": 2},
    ),
    "electra": ("Electra", {**SIZES, "embedding_size": 13}),
    "electra-square": ("Electra", {**SIZES, "embedding_size": 36, "hidden_act": "gelu_new"}),
    "distilbert": ("DistilBert", DISTILBERT),
    "deberta": ("Deberta", {**SIZES, **RELATIVE}),
    # more relative positions than sequences of 17 tokens need
    "deberta-far": ("Deberta", {**SIZES, **RELATIVE, "max_relative_positions": 90}),
    "deberta-plain": ("Deberta", SIZES),
    "deberta-c2p": ("Deberta", {**SIZES, **RELATIVE, "pos_att_type": ["c2p"], "type_vocab_size": 2}),
    "deberta-v2": ("DebertaV2", {**SIZES, **RELATIVE, "position_buckets": 4}),
    "deberta-v2-p2c": ("DebertaV2", {**SIZES, **RELATIVE, "pos_att_type": ["p2c"], "max_relative_positions": 6}),
    "deberta-v2-plain": ("DebertaV2", SIZES),
    "deberta-v2-xlarge": ("DebertaV2", {**SIZES, **V3, "conv_kernel_size": 3, "conv_act": "gelu"}),
    "deberta-v2-convolved-once": ("DebertaV2", {**SIZES, **V3, "conv_kernel_size": 5, "num_hidden_layers": 1}),
    "deberta-v3": ("DebertaV2", {**SIZES, **V3}),
    "deberta-v3-far": ("DebertaV2", {**SIZES, **V3, "position_buckets": 256, "max_relative_positions": 300}),
    "mpnet": ("MPNet", SIZES),
    "modernbert": ("ModernBert", MODERNBERT),
    "gte": ("Gte", SIZES),
    "gte-scaled": (
        "Gte",
        {**SIZES, "type_vocab_size": 0, "rope_parameters": {"rope_type": "linear", "factor": 3.0, "rope_theta": 90.0}},
    ),
    "nomic_bert": ("NomicBert", SIZES),
    "jina_embeddings_v3": ("JinaEmbeddingsV3", SIZES),
}  # fmt: skip
# one case of each family
ONE_EACH = list({name: case for case, (name, _) in CASES.items()}.values())
# what transformers does not have
LACKS = {
    "Deberta": ("ForMultipleChoice",), "JinaEmbeddingsV3": ("ForMultipleChoice",),
    **dict.fromkeys(("Esm", "EuroBert", "Gte", "NomicBert"), ("ForMultipleChoice", "ForQuestionAnswering")),
}  # fmt: skip
# what the swap knows; EuroBERT with three query heads for one of keys
SWAPPED = {
    **CASES,
    "esm": ("Esm", {**SIZES, "position_embedding_type": "rotary", "pad_token_id": 1, "mask_token_id": 4}),
    "eurobert": ("EuroBert", {**SIZES, "num_key_value_heads": 1, "pad_token_id": 0, "mask_token_id": 3}),
    "roc-bert": ("RoCBert", {**SIZES, "pronunciation_embed_dim": 5, "shape_embed_dim": 6, "shape_vocab_size": 9}),
}


def cases_with(head):
    return [case for case in CASES if head not in LACKS.get(CASES[case][0], ())]


B, S = 7, 17
MASKS = ["full", "right", "left", "holes"]


def mask_of(kind, empty=True):
    """int64 [B, S]; in all but "full" some rows are short, and with `empty` one is padding alone."""
    column, length = torch.arange(S), torch.randint(2, S + 1, (B, 1))
    mask = {
        "full": torch.ones(B, S),
        "right": column < length,
        "left": column >= S - length,
        "holes": (torch.rand(B, S) < 0.6) | (column == 3),
    }[kind].long()
    if kind != "full" and empty:
        mask[2] = 0
    return mask


def theirs_of(case, head, **changes):
    """transformers' model with weights larger than its initial ones, so that differences show."""
    name, options = {**CASES, **SWAPPED}[case]
    config = getattr(transformers, f"{name}Config")(**{**options, **changes})
    model = getattr(transformers, name + head)(config)
    for parameter_name, parameter in model.named_parameters():
        *_, module, leaf = "", *parameter_name.lower().split(".")
        is_norm_weight = ("norm" in module or module == "ln") and leaf == "weight"
        torch.nn.init.normal_(parameter, mean=float(is_norm_weight), std=0.2)
    return model.eval()


@pytest.fixture(params=CASES)
def pair(request, tmp_path):
    """(ours, theirs): masked language models with the same weights."""
    theirs = theirs_of(request.param, "ForMaskedLM")
    theirs.save_pretrained(tmp_path)
    return MaskedLM.from_pretrained(tmp_path), theirs


def inputs_of(config, kind, empty=True):
    mask = mask_of(kind, empty)
    pad = config.pad_token_id
    ids = torch.randint(10, 99, (B, S)).masked_fill(mask == 0, pad)
    if not config.position_offset:
        # as a real token, whose row still gets no gradient; where positions count words it would be padding
        ids[0, 3] = pad
    labels = torch.where((torch.rand(B, S) < 0.3) & mask.bool(), ids, -100)
    inputs = dict(input_ids=ids, attention_mask=mask, labels=labels)
    if config.type_vocab_size > 1:
        inputs["token_type_ids"] = torch.randint(0, config.type_vocab_size, (B, S))
    return inputs


def as_stored(theirs):
    """The gradients of a model, as transformers stores its parameters."""
    gradients = {
        name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        for name, parameter in theirs.named_parameters(remove_duplicate=False)
        if not name.startswith("lm_head.decoder.weight")
    }
    with tempfile.TemporaryDirectory() as directory:
        theirs.save_pretrained(directory, state_dict=gradients)
        return load_file(f"{directory}/model.safetensors")


def assert_gradients_equal(ours, theirs):
    names = hf_files.hf_names(dict(ours.named_parameters()), ours.config, type(ours).__name__)
    expected = dict(theirs.named_parameters(remove_duplicate=False))
    if families.family(ours.config.model_type).converts:
        gradients = as_stored(theirs)
        assert set(names.values()) == gradients.keys()
    else:
        assert {id(expected[name]) for name in names.values()} == {id(x) for x in theirs.parameters()}
        gradients = {name: parameter.grad for name, parameter in expected.items()}
    for name, parameter in ours.named_parameters():
        gradient = gradients[names[name]]
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
    positions = torch.randint(ours.config.position_offset, 40, (B, S))
    real = inputs["attention_mask"].bool()
    expected = theirs(**inputs, position_ids=positions).logits
    difference = ours(**inputs, position_ids=positions).logits - expected
    assert difference[real].abs().max() < 1e-5 * max(1, expected.abs().max().item())


def test_saved_directories_load_in_transformers(pair, tmp_path):
    ours, theirs = pair
    ours.save_pretrained(tmp_path / "saved")
    reloaded, info = type(theirs).from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert not any(info.values()), info
    expected, got = theirs.state_dict(), reloaded.state_dict()
    assert all(torch.equal(expected[name], got[name]) for name in expected)
    # tied tensors are stored once
    stored = load_file(tmp_path / "saved" / "model.safetensors")
    assert not stored.keys() & set(families.family(ours.config.model_type).tied)
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    original = theirs.config.to_dict()
    for key, value in config.items():
        # None and -1 stand for a value that follows from others, and some keys have no default in transformers
        assert key == "architectures" or original.get(key) in (value, None, -1), key
    assert ours.config == hf_files.read_config(tmp_path / "saved" / "config.json")


def loaded(case, ours, head, directory, **options):
    """(ours, theirs) with any head and equal weights."""
    theirs = theirs_of(case, head, **options)
    theirs.save_pretrained(directory)
    return ours.from_pretrained(directory), theirs


def classification_labels(kind):
    if kind == "classes":
        return torch.tensor([0, 2, 1, -100, 2, 2, 0])
    return torch.rand(B, 3) if kind == "regression" else (torch.rand(B, 3) < 0.5).float()


@pytest.mark.parametrize(
    ("case", "kind"), [*((case, "classes") for case in CASES), ("bert", "regression"), ("modernbert", "several")]
)
def test_sequence_classifier(case, kind, tmp_path):
    problem = {"regression": "regression", "several": "multi_label_classification"}.get(kind)
    ours, theirs = loaded(
        case, SequenceClassifier, "ForSequenceClassification", tmp_path, num_labels=3, problem_type=problem
    )
    inputs, labels = inputs_of(ours.config, "right", empty=False), classification_labels(kind)
    del inputs["labels"]
    got, expected = ours(**inputs, labels=labels), theirs(**inputs, labels=labels)
    assert_outputs_equal(got, expected, ours, theirs, ["logits"])


def assert_outputs_equal(got, expected, ours, theirs, names):
    for name in names:
        assert (getattr(got, name) - getattr(expected, name)).abs().max() < 1e-5, name
    assert (got.loss - expected.loss).abs() < 1e-5
    got.loss.backward()
    expected.loss.backward()
    assert_gradients_equal(ours, theirs)


@pytest.mark.parametrize("case", cases_with("ForMultipleChoice"))
def test_multiple_choice(case, tmp_path):
    ours, theirs = loaded(case, MultipleChoice, "ForMultipleChoice", tmp_path)
    first, second = (inputs_of(ours.config, "right", empty=False) for _ in range(2))
    inputs = {name: torch.stack((first[name], second[name]), 1) for name in first if name != "labels"}
    labels = torch.randint(0, 2, (B,))
    assert_outputs_equal(ours(**inputs, labels=labels), theirs(**inputs, labels=labels), ours, theirs, ["logits"])


@pytest.mark.parametrize("case", CASES)
def test_token_classifier(case, tmp_path):
    ours, theirs = loaded(case, TokenClassifier, "ForTokenClassification", tmp_path, num_labels=5)
    inputs = inputs_of(ours.config, "holes")
    inputs["labels"] = inputs["labels"].clamp(max=4)
    got, expected = ours(**inputs), theirs(**inputs)
    real = inputs["attention_mask"].bool()
    got.logits, expected.logits = got.logits[real], expected.logits[real]
    assert_outputs_equal(got, expected, ours, theirs, ["logits"])


@pytest.mark.parametrize("case", cases_with("ForQuestionAnswering"))
def test_question_answerer(case, tmp_path):
    ours, theirs = loaded(case, QuestionAnswerer, "ForQuestionAnswering", tmp_path)
    inputs = inputs_of(ours.config, "full")
    del inputs["labels"]
    # one outside: transformers ignores it too
    places = dict(
        start_positions=torch.tensor([3, 0, 16, 5, 40, 2, 2]), end_positions=torch.tensor([4, 0, 16, 9, 5, 2, 3])
    )
    got, expected = ours(**inputs, **places), theirs(**inputs, **places)
    assert_outputs_equal(got, expected, ours, theirs, ["start_logits", "end_logits"])


def test_replaced_token_detector(tmp_path):
    ours, theirs = loaded("electra", ReplacedTokenDetector, "ForPreTraining", tmp_path)
    inputs = inputs_of(ours.config, "holes")
    real = inputs["attention_mask"].bool()
    inputs["labels"] = torch.randint(0, 2, (B, S)).masked_fill(~real, -100)
    got, expected = ours(**inputs), theirs(**inputs)
    got.logits, expected.logits = got.logits[real], expected.logits[real]
    assert_outputs_equal(got, expected, ours, theirs, ["logits"])


@pytest.mark.parametrize("kind", ["full", "right"])
@pytest.mark.parametrize("case", ["bert", "albert"])
def test_pretraining(case, kind, tmp_path):
    ours, theirs = loaded(case, Pretraining, "ForPreTraining", tmp_path)
    inputs, pairs = inputs_of(ours.config, kind, empty=False), torch.randint(0, 2, (B,))
    key = "next_sentence_label" if case == "bert" else "sentence_order_label"
    expected = theirs(**inputs, **{key: pairs})
    assert_outputs_equal(ours(**inputs, next_sentence_label=pairs), expected, ours, theirs, [])
    real = inputs["attention_mask"].bool()
    del inputs["labels"]
    got = ours(**inputs)
    assert (got.logits - expected.prediction_logits)[real].abs().max() < 1e-5
    pair_logits = expected.seq_relationship_logits if case == "bert" else expected.sop_logits
    assert (got.pair_logits - pair_logits).abs().max() < 1e-5


HEADS = [MaskedLM, SequenceClassifier, TokenClassifier, QuestionAnswerer, MultipleChoice]
THEIR_HEADS = {QuestionAnswerer: "ForQuestionAnswering", MultipleChoice: "ForMultipleChoice"}


@pytest.mark.parametrize(
    ("case", "head"),
    [
        pytest.param(case, head, id=f"{case}-{head.__name__}")
        for case in ONE_EACH
        for head in HEADS
        if case in cases_with(THEIR_HEADS.get(head))
    ],
)
def test_every_head_is_saved_as_transformers_stores_it(case, head, tmp_path):
    source = theirs_of(case, "ForMaskedLM")
    source.save_pretrained(tmp_path / "mlm")
    with warnings.catch_warnings():
        # a new head
        warnings.simplefilter("ignore")
        ours = head.from_pretrained(tmp_path / "mlm", num_labels=2)
    ours.save_pretrained(tmp_path / "saved")
    name = json.loads((tmp_path / "saved" / "config.json").read_text())["architectures"][0]
    theirs, info = getattr(transformers, name).from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert not any(info.values()), info
    again = head.from_pretrained(tmp_path / "saved")
    assert all(torch.equal(x, again.state_dict()[name]) for name, x in ours.state_dict().items())
    assert again.config == ours.config


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (dict(input_ids=torch.tensor([[5, 99]])), "input_ids holds 99: the model's table has rows 0 to 98"),
        (dict(input_ids=torch.tensor([[5, -1]])), "input_ids holds -1"),
        (dict(token_type_ids=torch.tensor([[0, 2]])), "token_type_ids holds 2"),
        (dict(position_ids=torch.tensor([[0, 40]])), "position_ids holds 40"),
        (dict(input_ids=torch.ones(1, 41, dtype=torch.int64)), "41 tokens long: the model has 40 positions"),
    ],
    ids=["too large", "negative", "segment", "position", "too long"],
)
def test_ids_out_of_range_are_refused(inputs, message):
    model = MaskedLM(families.config_of("bert", **SIZES))
    with pytest.raises(ValueError, match=message):
        model(**{"input_ids": torch.tensor([[5, 6]]), **inputs})


def test_shards_and_pickles(tmp_path):
    theirs = theirs_of("roberta", "ForMaskedLM")
    theirs.save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    ours = MaskedLM.from_pretrained(tmp_path / "sharded")
    assert torch.equal(ours.encoder.embeddings.word.weight, theirs.roberta.embeddings.word_embeddings.weight)

    (tmp_path / "pickled").mkdir()
    theirs.config.save_pretrained(tmp_path / "pickled")
    torch.save(theirs.state_dict(), tmp_path / "pickled" / "pytorch_model.bin")
    with pytest.raises(ValueError, match="only pytorch_model.bin, a pickle file: pass allow_pickle=True"):
        MaskedLM.from_pretrained(tmp_path / "pickled")
    loaded = MaskedLM.from_pretrained(tmp_path / "pickled", allow_pickle=True)
    assert all(torch.equal(x, loaded.state_dict()[name]) for name, x in ours.state_dict().items())

    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "executed"), "w"))

    torch.save({"roberta.embeddings.word_embeddings.weight": Evil()}, tmp_path / "pickled" / "pytorch_model.bin")
    with pytest.raises(ValueError, match="cannot be read as a file of tensors"):
        MaskedLM.from_pretrained(tmp_path / "pickled", allow_pickle=True)
    assert not (tmp_path / "executed").exists()
    index = tmp_path / "sharded" / "model.safetensors.index.json"
    index.write_text("{}")
    with pytest.raises(ValueError, match="index.json has no usable weight_map"):
        MaskedLM.from_pretrained(tmp_path / "sharded")


def test_loading_holds_one_copy(tmp_path):
    """In a process of its own: the peak above the weights is less than half of them."""
    config = families.config_of("bert", **{**SIZES, "vocab_size": 50000, "hidden_size": 600, "num_attention_heads": 10})
    MaskedLM(config).save_pretrained(tmp_path)
    code = f"""
import resource, torch
from fastbert import MaskedLM
import fastbert.model.heads
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
model = MaskedLM.from_pretrained({str(tmp_path)!r})
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    size = (tmp_path / "model.safetensors").stat().st_size
    assert int(done.stdout) < 1.5 * size


DROPOUTS = [
    "hidden_dropout_prob", "attention_probs_dropout_prob", "mlp_dropout", "output_dropout", "down_dropout",
    "classifier_dropout", "pooler_dropout",
]  # fmt: skip


@pytest.mark.parametrize("case", ONE_EACH)
def test_dropout_is_replayed_by_its_seed(case):
    name, sizes = CASES[case]
    values = getattr(transformers, f"{name}Config")(**sizes).to_dict()
    config = hf_files.config_from_hf(values).replace(num_labels=3, labels=None, **dict.fromkeys(DROPOUTS, 0.2))
    model = SequenceClassifier(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    batch, _ = pack_inputs(config, torch.randint(10, 99, (5, 9)))

    def logits(seed):
        batch.seed = torch.tensor([seed])
        return model.train()(batch).logits

    assert torch.equal(logits(3), logits(3))
    assert (logits(3) - logits(4)).abs().max() > 1e-3
    assert not torch.equal(logits(3), model.eval()(batch).logits)
    batch.seed = None
    assert not torch.equal(model.train()(batch).logits, model(batch).logits)


# what these call their dropouts; the others have BERT's names
DROPOUT_NAMES = {
    "DistilBert": ("dropout", "attention_dropout", "seq_classif_dropout"),
    "ModernBert": ("embedding_dropout", "attention_dropout", "mlp_dropout", "classifier_dropout"),
    "Albert": ("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout_prob"),
}


@pytest.mark.parametrize(
    ("case", "head"),
    [
        *(
            (case, SequenceClassifier)
            for case in (
                "bert",
                "albert",
                "electra",
                "distilbert",
                "deberta",
                "deberta-v3",
                "mpnet",
                "modernbert",
                "megatron-bert",
                "xlm-roberta-xl",
            )
        ),
        ("electra", MultipleChoice),
    ],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
@torch.no_grad()
def test_dropout_has_the_distribution_of_transformers(case, head, tmp_path):
    """One text, 24 passes of 64 copies: the scores have the same variance, and means within their standard errors."""
    names = DROPOUT_NAMES.get(CASES[case][0], ("hidden_dropout_prob", "attention_probs_dropout_prob"))
    their_head = {SequenceClassifier: "ForSequenceClassification", MultipleChoice: "ForMultipleChoice"}[head]
    models = loaded(case, head, their_head, tmp_path, num_labels=5, **dict.fromkeys(names, 0.2))
    ids = torch.randint(10, 99, (7,)).expand(64, *[2] * (head is MultipleChoice), 7).contiguous()
    ours, theirs = (torch.stack([model.train()(ids).logits for _ in range(24)]) for model in models)
    spreads = [x.flatten(0, 1).var(0).mean() for x in (ours, theirs)]
    assert 0.9 < spreads[0] / spreads[1] < 1.1
    # the copies of a pass may share the mask of a table; passes do not
    passes = [x.mean(1) for x in (ours, theirs)]
    error = (sum(x.var(0) for x in passes) / 24).sqrt()
    assert ((passes[0].mean(0) - passes[1].mean(0)).abs() < 4.5 * error).all()
