"""Every key of a config.json is obeyed, refused by name, or changes nothing; no value of it leads to a traceback.

Walked are the keys that transformers reads, for each family. tests/fuzz.py damages files at random.
"""

import inspect
import json
import re
import warnings
from pathlib import Path

import pytest
import torch
import transformers
from test_families import CASES, inputs_of, theirs_of

from fastbert.model import hf_files
from fastbert.model.heads import MaskedLM, MultipleChoice, SequenceClassifier

HEADS = {"ForMaskedLM": MaskedLM, "ForSequenceClassification": SequenceClassifier, "ForMultipleChoice": MultipleChoice}
# key -> values to put in place of a family's own, where a value of its kind taken at random is not telling
TELLING = {
    "hidden_act": ["gelu_new", "relu"], "activation": ["gelu_new", "relu"], "hidden_activation": ["gelu_new", "silu"],
    "classifier_activation": ["gelu_new", "silu"], "classifier_pooling": ["mean", "max"],
    "pooler_hidden_act": ["tanh", "silu"], "conv_act": ["gelu", "relu"],
    "position_embedding_type": ["relative_key"], "problem_type": ["regression", "multi_label_classification"],
    "summary_type": ["mean", "last"], "summary_activation": ["tanh"], "summary_proj_to_labels": [True],
    "summary_first_dropout": [0.5],
    "pos_att_type": [["c2p"], "p2c|c2p", []], "norm_rel_ebd": ["none", "layer_norm", "layer_norm | x"],
    "position_buckets": [2, 3, 8, -1], "max_relative_positions": [-1, 3, 5, 6, 16, 40],
    "relative_attention_num_buckets": [4, 5, 16, 33], "layer_norm_eps": [0.1], "norm_eps": [0.1],
    "layer_types": [["full_attention"] * 5, ["sliding_attention"] * 5, ["full_attention", "sliding_attention"] * 2],
    "global_attn_every_n_layers": [1, 2, 4], "local_attention": [2, 5, 16], "sliding_window": [1, 2],
    "global_rope_theta": [10.0], "local_rope_theta": [10.0], "rope_theta": [10.0], "partial_rotary_factor": [0.5],
    "rope_parameters": [
        {"full_attention": {"rope_type": "default", "rope_theta": 30.0}},
        {"full_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 30.0}},
        {"sliding_attention": {"type": "linear", "factor": 2.0}},
        {"sliding_attention": {"rope_theta": 20.0}},
    ],
    "rope_scaling": [{"rope_type": "linear", "factor": 2.0}], "head_dim": [6, 12], "conv_groups": [2],
    "conv_kernel_size": [0, 3, 4], "embedding_size": [13, 18, 36], "attention_head_size": [6, 12],
    "pooler_hidden_size": [18, 36], "num_hidden_layers": [1, 2, 4], "num_attention_heads": [1, 4, 6],
    "hidden_size": [36, 18], "num_labels": [3], "id2label": [{"0": "a", "1": "b", "2": "c"}], "pad_token_id": [0, 7],
    "per_layer_config": [{"0": {"hidden_act": "relu"}}], "num_hidden_groups": [2, 3], "inner_group_num": [2],
    "tie_word_embeddings": [False], "attn_implementation": ["eager"], "dtype": ["float32"], "is_decoder": [True],
    "vocab_size": [98, 100], "type_vocab_size": [1, 3], "max_position_embeddings": [30, 50],
}  # fmt: skip
# what these change is not what a model computes; `legacy` is about names in the checkpoint, of which both are read
NOT_COMPUTED = {
    "architectures", "model_type", "transformers_version", "label2id", "return_dict", "output_attentions", "legacy",
    "output_hidden_states", "chunk_size_feed_forward", "sparse_prediction", "sparse_pred_ignore_index",
}  # fmt: skip
# read for every family, wherever that is
GENERAL = {"position_embedding_type", "per_layer_config", "num_labels", "id2label", "tie_word_embeddings", "dtype"}
WALKED = [
    "bert", "roberta", "albert-groups", "electra", "distilbert", "deberta", "deberta-v2-xlarge", "mpnet", "modernbert",
    "ernie-tasks", "megatron-bert", "xlm-roberta-xl", "gte-scaled", "nomic_bert", "jina_embeddings_v3",
]  # fmt: skip


OF_HEADS = re.compile("classif|pool|label|problem|summary|dropout|act|eps|bias|tie")
READ = r'config\.([a-z]\w+)|getattr\((?:self\.)?config, "(\w+)"|kwargs\.(?:get|pop)\("(\w+)"'


def keys_of(case):
    """The keys that transformers reads for a family: its config's own, and those that the source of the model reads."""
    name, options = CASES[case]
    config = getattr(transformers, f"{name}Config")
    sources = [Path(inspect.getsourcefile(getattr(transformers, name + end))) for end in ("Model", "Config")]
    read = [re.findall(READ, source.read_text(encoding="utf-8")) for source in sources]
    names = {key for key in config(**options).to_dict() if not key.startswith("_")} | GENERAL
    names |= {name for found in read for groups in found for name in groups if name}
    methods = {name for name in names if callable(getattr(config, name, None))}
    return sorted(names - methods - NOT_COMPUTED)


def values_for(key, value):
    """What to put in place of a value."""
    if key in TELLING:
        return [other for other in TELLING[key] if other != value]
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int | float):
        return [value + 1 if isinstance(value, int) else value * 2 + 0.1]
    return [3] if value is None else []


@pytest.mark.parametrize("case", WALKED)
@torch.no_grad()
def test_every_key_is_obeyed_or_refused_by_name(case, tmp_path):
    """One key after another has another value: the logits stay those of transformers, or an error names the key."""
    seen = dict.fromkeys(("equal", "refused"), 0)
    for head, ours in HEADS.items():
        if head == "ForMultipleChoice" and case != "electra":
            continue
        theirs = theirs_of(case, head)
        theirs.save_pretrained(tmp_path)
        path = tmp_path / "config.json"
        own = json.loads(path.read_text())
        inputs = inputs_of(hf_files.read_config(path), "right", empty=False)
        mask = inputs["attention_mask"].bool()
        del inputs["labels"]
        if head == "ForMultipleChoice":
            inputs = {name: x[:, None] for name, x in inputs.items()}
        # the encoder's keys are walked with the first head
        keys = [key for key in keys_of(case) if head == "ForMaskedLM" or OF_HEADS.search(key)]
        for key in keys:
            for value in values_for(key, own.get(key, theirs.config.to_dict().get(key))):
                path.write_text(json.dumps(own | {key: value}))
                try:
                    with warnings.catch_warnings():
                        warnings.filterwarnings("error", message=".*start fresh")
                        warnings.filterwarnings("ignore", message=".*does not use")
                        got = ours.from_pretrained(tmp_path)(**inputs).logits
                except (ValueError, UserWarning) as error:
                    # a size that the weights do not have is refused by the name of a weight
                    assert re.search(rf"\b{key}\b|config.json wants| lacks |head_dim", str(error)), (
                        key,
                        value,
                        str(error),
                    )
                    seen["refused"] += 1
                    continue
                expected = type(theirs).from_pretrained(tmp_path).eval()(**inputs).logits
                if head == "ForMaskedLM":
                    got, expected = got[mask], expected[mask]
                assert got.shape == expected.shape, (key, value)
                assert (got - expected).abs().max() < 1e-5 * max(1, expected.abs().max().item()), (key, value)
                seen["equal"] += 1
    assert min(seen.values()) > 10, seen
