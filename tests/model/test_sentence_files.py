"""Directories of sentence-transformers, against the library: every key of every file is obeyed or refused by name.

What is loaded is also written again, which the library must read as the same model.
"""

import inspect
import json
import re
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_families import theirs_of
from test_sentences import embedder, tokenizer

from fastbert.model.sentences import MODES, SentenceEmbedder

library = pytest.importorskip("sentence_transformers")
from sentence_transformers.base import model as base_model  # noqa: E402
from sentence_transformers.base import modules as base  # noqa: E402
from sentence_transformers.sentence_transformer import model as their_model  # noqa: E402
from sentence_transformers.sentence_transformer import modules as theirs  # noqa: E402

# longer than the 8 tokens that are read; words that are known in lower case alone
TEXTS = ["the cat sat on a mat and then it ran far away", "The Dog RAN", "dog", "so the dog sat on the mat"]
TEXT_ONLY = {"text": {"method": "forward", "method_output_name": "last_hidden_state"}}
SIDES = ("Left", "Right")
# file -> key -> values to try
KEYS = {
    "sentence_bert_config.json": {
        "max_seq_length": [5, None, 0, "5", True], "do_lower_case": [True, "yes"],
        "config_kwargs": [
            {"num_hidden_layers": 1}, {"layer_norm_eps": 0.1, "hidden_act": "gelu_new"}, {"num_attention_heads": 2},
            {"is_decoder": True}, {"torch_dtype": "float16"}, {"output_attentions": True}, ["x"],
        ],
        "config_args": [{"num_hidden_layers": 1}],
        "processor_kwargs": [
            {"truncation_side": "left"}, {"model_max_length": 4}, {"padding_side": "left"}, {"do_lower_case": True},
        ],
        "tokenizer_args": [{"model_max_length": 5, "truncation_side": "left"}],
        "model_kwargs": [{"attn_implementation": "eager"}, {"dtype": "bfloat16"}, {"dtype": "float32"}],
        "model_args": [{"torch_dtype": "float16"}], "processing_kwargs": [{}, {"text": {"max_length": 4}}],
        "transformer_task": ["feature-extraction", "fill-mask"],
        "modality_config": [TEXT_ONLY, {"text": {"method": "forward", "method_output_name": "pooler_output"}}],
        "module_output_name": ["sentence_embedding"], "unpad_inputs": [False], "query_length": [4],
        "document_length": [4], "query_expansion": [{"length": 8}], "tokenizer_name_or_path": ["elsewhere"],
        "new_key": [1],
    },
    "tokenizer_config.json": {
        "truncation_side": ["left", "up"], "padding_side": ["left", "right"], "model_max_length": [5, 10**30, "x"],
    },
    "tokenizer.json": {
        "truncation": [dict(direction=side, max_length=5, strategy="LongestFirst", stride=0) for side in SIDES],
        "padding": [dict(strategy="BatchLongest", direction=side, pad_to_multiple_of=None, pad_id=0, pad_type_id=0,
                         pad_token="[PAD]") for side in SIDES],
        "post_processor": [None],
    },
    "2_Pooling/config.json": {
        **{f"pooling_mode_{key}": [True, 1] for key in (
            "cls_token", "max_tokens", "mean_sqrt_len_tokens", "weightedmean_tokens", "lasttoken",
        )},
        "pooling_mode_mean_tokens": [False], "pooling_mode": ["max", ["cls"], ["cls", "max"], "attention", []],
        "include_prompt": [False, "no"], "embedding_dimension": [36], "new_key": [1],
    },
    "1_Dense/config.json": {
        "module_input_name": ["sentence_embedding"], "module_output_name": ["sentence_embedding", "token_embeddings"],
    },
    "3_Dense/config.json": {
        "in_features": [20, -1], "out_features": [20, 36, None], "bias": [False, None], "use_residual": [True, 1],
        "activation_function": ["torch.nn.modules.linear.Identity", "torch.nn.GELU", "torch.nn.SiLU", "my.Tanh", 5],
        "module_input_name": ["token_embeddings"], "module_output_name": ["other"], "new_key": [1],
    },
    "4_Normalize/config.json": {"module_input_name": ["token_embeddings"], "module_output_name": ["other"]},
    "config_sentence_transformers.json": {
        "prompts": [{"query": "dog "}, {"query": None}, {"query": 5}, ["x"]],
        "default_prompt_name": ["query", "title"], "similarity_fn_name": ["dot", "euclidean", "manhattan", "other"],
        "truncate_dim": [5, 0, "5"], "model_type": ["SentenceTransformer", "SparseEncoder"],
        "__version__": [{"sentence_transformers": "2.0.0"}], "requirements": [{}], "new_key": [1],
    },
}  # fmt: skip
# keys of which every value in the table is refused; of all others at least one is obeyed
REFUSED_KEYS = {
    "model_args", "module_input_name", "module_output_name", "query_length", "document_length", "query_expansion",
    "tokenizer_name_or_path", "in_features", "bias", "use_residual", "new_key",
}  # fmt: skip
# these change no vector
KEPT = {"similarity_fn_name"}


def keys_read():
    """file -> the keys of it that the installed library reads."""
    sources = [inspect.getsource(module) for module in (base_model, their_model)]
    of_model = {key for source in sources for key in re.findall(r'model_config\.get\("(\w+)"', source)}
    legacy = [key for key in re.findall(r'"(pooling_mode_\w+)":', inspect.getsource(theirs.pooling))]
    transformer = set(inspect.signature(base.Transformer.__init__).parameters) - {"self", "model_name_or_path"}
    return {
        "sentence_bert_config.json": transformer | {"model_args", "tokenizer_args", "config_args"},
        "2_Pooling/config.json": {*theirs.Pooling.config_keys, *theirs.Pooling.config_key_renames, *legacy},
        "3_Dense/config.json": {*base.Dense.config_keys},
        "4_Normalize/config.json": {*base.Normalize.config_keys},
        "config_sentence_transformers.json": of_model | {"model_type"},
    }


def test_the_table_has_every_key_that_the_library_reads():
    # set by whoever loads, or without a value that is another than that of the directory
    without = {"backend", "word_embedding_dimension", "args", "kwargs"}
    for file, keys in keys_read().items():
        assert keys - without <= KEYS[file].keys(), (file, keys - without - KEYS[file].keys())
    read = re.findall(r'module_config(?:\.get\(|\[)"(\w+)"', inspect.getsource(base_model))
    assert set(read) == {"name", "path", "type", "kwargs"}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A directory with a module of each kind; the first Dense is before Pooling."""
    place = tmp_path_factory.mktemp("whole")
    model = embedder(
        max_length=8, token_dense=[(36, 36, True, "Tanh")], dense=[(36, 20, True, "Tanh")], prompts={"query": "so "}
    )
    model.save_pretrained(place)
    # as the library itself writes them
    edited(place / "sentence_bert_config.json", modality_config=TEXT_ONLY, module_output_name="token_embeddings")
    return place


def edited(path, **changes):
    values = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(values | changes))


def vectors_of(directory):
    """The library's vectors of TEXTS, or None if it cannot load the directory."""
    try:
        return library.SentenceTransformer(str(directory), device="cpu").encode(TEXTS)
    except Exception:
        return None


def same(got, expected):
    return got.shape == expected.shape and np.abs(got - expected).max() < 1e-5


@pytest.mark.parametrize("file, key", [(file, key) for file in KEYS for key in KEYS[file]])
def test_every_key_is_obeyed_or_refused_by_name(file, key, whole, tmp_path):
    obeyed = 0
    for i, value in enumerate(KEYS[file][key]):
        place = shutil.copytree(whole, tmp_path / str(i))
        # one mode of pooling in place of the other
        mean = {"pooling_mode_mean_tokens": False} if key.endswith(("_token", "_tokens", "lasttoken")) else {}
        edited(place / file, **{**mean, key: value})
        try:
            ours = SentenceEmbedder.from_pretrained(place)
            got = ours.encode(TEXTS)
        except ValueError as error:
            message = str(error)
            named = key in message or (isinstance(value, dict) and any(x in message for x in value))
            # a size that other modules do not have is refused by what it makes of the tensors
            assert "\n" not in message and (named or "expected {" in message), message
            continue
        expected = vectors_of(place)
        assert expected is not None and same(got, expected), (key, value)
        ours.save_pretrained(tmp_path / f"{i} again")
        assert same(vectors_of(tmp_path / f"{i} again"), expected), (key, value)
        again = json.loads((tmp_path / f"{i} again" / file).read_text()) if file.startswith("config") else {}
        assert key not in KEPT or again[key] == value
        obeyed += 1
    assert obeyed or key in REFUSED_KEYS


def pooling(mode="mean", **options):
    return theirs.Pooling(36, pooling_mode=mode, **options)


TOKENS = dict(module_input_name="token_embeddings")
ORDERS = {
    "normalize, dense": lambda: [pooling(), base.Normalize(), base.Dense(36, 16)],
    "twice": lambda: [pooling("max"), base.Dense(36, 24), base.Normalize(), base.Dense(24, 16)],
    "normalized twice": lambda: [pooling(), base.Normalize(), base.Dense(36, 36), base.Normalize()],
    "residual": lambda: [pooling(), base.Dense(36, 36, use_residual=True)],
    "residual of another width": lambda: [pooling(), base.Dense(36, 16, use_residual=True, bias=False)],
    "tokens": lambda: [base.Dense(36, 36, **TOKENS), base.Normalize(**TOKENS), pooling("weightedmean")],
    "pooling alone": lambda: [pooling("lasttoken")],
}
REFUSED = {
    "no pooling": lambda: [base.Normalize()],
    "two poolings": lambda: [pooling(), pooling("max")],
    "dropout": lambda: [pooling(), theirs.Dropout(0.5)],
    "norm": lambda: [pooling(), theirs.LayerNorm(36)],
    "tokens after pooling": lambda: [pooling(), base.Dense(36, 36, **TOKENS)],
}


@pytest.fixture
def assembled(whole, tmp_path):
    def assemble(modules):
        transformer = base.Transformer(str(whole))
        library.SentenceTransformer(modules=[transformer, *modules], device="cpu").save(str(tmp_path / "theirs"))
        return tmp_path / "theirs"

    return assemble


@pytest.mark.parametrize("case", ORDERS)
def test_modules_run_in_their_order(case, assembled, tmp_path):
    place = assembled(ORDERS[case]())
    model, expected = SentenceEmbedder.from_pretrained(place), vectors_of(place)
    assert same(model.encode(TEXTS), expected)
    model.save_pretrained(tmp_path / "again")
    assert same(vectors_of(tmp_path / "again"), expected)


@pytest.mark.parametrize("case", REFUSED)
def test_other_modules_are_refused(case, assembled):
    with pytest.raises(ValueError, match="(modules|config).json"):
        SentenceEmbedder.from_pretrained(assembled(REFUSED[case]()))


@pytest.mark.parametrize("mode", MODES)
def test_prompts_that_are_not_pooled(mode, assembled):
    place = assembled([pooling(mode, include_prompt=False)])
    got = SentenceEmbedder.from_pretrained(place).encode(TEXTS, prompt="so the ")
    assert same(got, library.SentenceTransformer(str(place), device="cpu").encode(TEXTS, prompt="so the "))


ENTRY = dict(idx=0, name="0", path="", type="sentence_transformers.models.Transformer")


@pytest.mark.parametrize(
    ("modules", "message"),
    [
        ("x", "holds no JSON array"),
        ([], "expected a Transformer first"),
        ([{}], "type is None: expected str"),
        (["x"], "a module is 'x': expected dict"),
        ([dict(ENTRY, path=None)], "path is None: expected str"),
        ([dict(ENTRY, path="../elsewhere")], "expected one inside the directory"),
        ([dict(ENTRY, path="/etc")], "expected one inside the directory"),
        ([dict(ENTRY, path="a\0b")], "expected the path of one"),
        ([dict(ENTRY, type="mine.Transformer")], "'mine.Transformer': it is not known here"),
        ([dict(ENTRY, type="sentence_transformers.sparse_encoder.models.MLMTransformer")], "it is not known here"),
        ([ENTRY, ENTRY], "two modules named '0'"),
        ([dict(ENTRY, new=1)], "new is 1: that is not supported here"),
    ],
)
def test_lists_of_modules_that_cannot_be_run(modules, message, whole, tmp_path):
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        SentenceEmbedder.from_pretrained(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("case", ["bert", "roberta", "modernbert", "deberta-v3"])
@pytest.mark.parametrize("limit", [None, 7, 10**30])
def test_the_longest_text_of_a_bare_encoder(case, limit, tmp_path):
    """As many tokens as transformers' tokenizer reads, if the model has positions for them."""
    theirs_of(case, "Model").save_pretrained(tmp_path)
    tokenizer().save(str(tmp_path / "tokenizer.json"))
    settings = dict(tokenizer_class="PreTrainedTokenizerFast", **({} if limit is None else {"model_max_length": limit}))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    ours = SentenceEmbedder.from_pretrained(tmp_path)
    longest = base.Transformer(str(tmp_path)).max_seq_length
    assert ours.max_length == min(longest, ours.config.max_length) and ours.pooling == "mean" and not ours.normalize


def test_an_adapter_is_not_passed_over(whole, tmp_path):
    place = shutil.copytree(whole, tmp_path / "adapted")
    (place / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="has an adapter_config.json: merge the adapter into the weights first"):
        SentenceEmbedder.from_pretrained(place)


def test_weights_of_a_dense_module_that_do_not_fit(whole, tmp_path):
    place = shutil.copytree(whole, tmp_path / "changed")
    path = place / "3_Dense" / "model.safetensors"
    good = load_file(path)
    for tensors in (
        {}, good | {"more": torch.ones(2)}, good | {"linear.bias": torch.ones(3)},
        {name: x.to(torch.int8) for name, x in good.items()},
    ):  # fmt: skip
        save_file(tensors, path)
        with pytest.raises(ValueError, match=r"3_Dense holds tensors of the shapes .*expected \{'linear.weight'"):
            SentenceEmbedder.from_pretrained(place)
