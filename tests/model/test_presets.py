"""The published sizes have the published numbers of parameters."""

import pytest
import torch
import transformers

from fastbert.model import hf_files, presets
from fastbert.model.heads import MaskedLM

# the parameters of transformers' bare encoder, millions, as the papers and model cards give them
MILLIONS = {
    "bert-base": 109.48, "bert-large": 335.14, "roberta-base": 124.65, "roberta-large": 355.36,
    "xlm-roberta-base": 278.04, "xlm-roberta-large": 559.89, "albert-base-v2": 11.68, "albert-large-v2": 17.68,
    "albert-xlarge-v2": 58.72, "albert-xxlarge-v2": 222.60, "electra-small": 13.48, "electra-base": 108.89,
    "electra-large": 334.09, "distilbert-base": 66.36, "deberta-base": 138.60, "deberta-large": 405.16,
    "deberta-v3-base": 183.83, "deberta-v3-large": 434.01,
    "deberta-v3-xsmall": 70.68, "deberta-v3-small": 141.30, "deberta-v2-xlarge": 884.59, "deberta-v2-xxlarge": 1564.55,
    "mpnet-base": 109.49, "modernbert-base": 149.01, "modernbert-large": 394.78, "bert-tiny": 4.39, "bert-mini": 11.17,
    "bert-small": 28.76, "bert-medium": 41.37, "camembert-base": 110.62, "data2vec-text-base": 124.65,
    "xlm-roberta-xl": 3482.49, "efficient-mlm": 355.36, "ernie-3.0-base-zh": 117.94, "megatron-bert-345m": 333.64,
    "gte-multilingual-base": 305.37, "nomic-embed-text-v1.5": 136.73, "jina-embeddings-v3": 559.36,
}  # fmt: skip


def sizes(config):
    """(parameters of our masked language model, of transformers', of its bare encoder), without memory for any."""
    theirs = transformers.AutoConfig.for_model(**hf_files.config_to_hf(config))
    with torch.device("meta"):
        models = (
            MaskedLM(config),
            transformers.AutoModelForMaskedLM.from_config(theirs),
            transformers.AutoModel.from_config(theirs),
        )
    return [sum(x.numel() for x in model.parameters()) for model in models]


@pytest.mark.parametrize("name", presets.PRESETS)
def test_presets_have_the_published_sizes(name):
    config = presets.preset(name)
    layers = config.num_hidden_layers
    # layers are alike, and building 48 of them takes time: two and three tell what each adds
    few, more = (
        sizes(config.replace(num_hidden_layers=n, **{key: value[:n] for key, value in per_layer(config).items()}))
        for n in (2, 3)
    )
    ours, theirs, base = (a + (layers - 2) * (b - a) for a, b in zip(few, more))
    assert ours == theirs
    assert round(base / 1e6, 2) == MILLIONS[name]


def per_layer(config):
    return {key: getattr(config, key) for key in ("windows", "rope_thetas") if getattr(config, key) is not None}


_BERT = dict(
    architectures=["BertModel"], attention_probs_dropout_prob=0.1, classifier_dropout=None, hidden_act="gelu",
    hidden_dropout_prob=0.1, initializer_range=0.02, layer_norm_eps=1e-12, max_position_embeddings=512, pad_token_id=0,
    position_embedding_type="absolute", type_vocab_size=2, use_cache=True, vocab_size=30522, num_attention_heads=12,
)  # fmt: skip
_XLM_R = _BERT | dict(
    architectures=["XLMRobertaModel"], bos_token_id=0, eos_token_id=2, pad_token_id=1, output_past=True,
    layer_norm_eps=1e-5, max_position_embeddings=514, type_vocab_size=1, vocab_size=250002,
)  # fmt: skip
# embedding models whose shape is not a preset's: the keys of their config.json, and millions of parameters as published
EMBEDDERS = {
    "e5-small, bge-small-en": (33, "bert", 12, 384, _BERT),
    "multilingual-e5-small": (118, "bert", 12, 384, _BERT | dict(vocab_size=250037)),
    # Elnaggar et al. 2022: BERT on amino acids
    "prot-bert": (
        420, "bert", 30, 1024, _BERT | dict(vocab_size=30, max_position_embeddings=40000, num_attention_heads=16),
    ),
    "bge-m3, arctic-embed-l-v2.0": (
        568, "xlm-roberta", 24, 1024, _XLM_R | dict(max_position_embeddings=8194, num_attention_heads=16),
    ),
    "granite-embedding-30m-english": (
        30, "roberta", 6, 384, _XLM_R | dict(architectures=["RobertaModel"], vocab_size=50265),
    ),
    "granite-embedding-107m-multilingual": (107, "xlm-roberta", 6, 384, _XLM_R),
    "granite-embedding-small-english-r2": (
        48, "modernbert", 12, 384,
        dict(num_attention_heads=12, vocab_size=50368, pad_token_id=50283, norm_eps=1e-5, global_rope_theta=80000.0),
    ),
    "arctic-embed-m-v2.0": (
        305, "gte", 12, 768,
        _BERT | dict(
            architectures=["GteModel"], auto_map={"AutoModel": "modeling_hf_alibaba_nlp_gte.GteModel"},
            attention_probs_dropout_prob=0.0, layer_norm_type="layer_norm", logn_attention_clip1=False,
            logn_attention_scale=False, matryoshka_dimensions=[256], max_position_embeddings=8192, pack_qkv=True,
            pad_token_id=1, position_embedding_type="rope", rope_scaling=None, rope_theta=160000, type_vocab_size=1,
            unpad_inputs="true", use_memory_efficient_attention="true", vocab_size=250048,
        ),
    ),
    "nomic-embed-text-v1.5, arctic-embed-m-long": (
        137, "nomic_bert", 12, 768,
        dict(
            activation_function="swiglu", architectures=["NomicBertModel"], attn_pdrop=0.0,
            auto_map={"AutoModel": "nomic-ai/nomic-bert-2048--modeling_hf_nomic_bert.NomicBertModel"}, causal=False,
            dense_seq_output=True, embd_pdrop=0.0, initializer_range=0.02, layer_norm_epsilon=1e-12,
            max_trained_positions=2048, mlp_fc1_bias=False, mlp_fc2_bias=False, n_embd=768, n_head=12, n_inner=3072,
            n_positions=8192, pad_vocab_size_multiple=64, parallel_block=False, prenorm=False, qkv_proj_bias=False,
            resid_pdrop=0.0, rotary_emb_base=1000, rotary_emb_fraction=1.0, rotary_emb_interleaved=False,
            rotary_emb_scale_base=None, rotary_scaling_factor=None, type_vocab_size=2, use_rms_norm=False,
            vocab_size=30528,
        ),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", EMBEDDERS)
def test_embedders_as_published(name):
    """arctic-embed-m and l, e5 and bge base and large, mxbai-large are BERT's presets; multilingual-e5 base and large
    and granite 278m XLM-R's; gte-modernbert and granite r2 ModernBERT's."""
    millions, model_type, layers, hidden, values = EMBEDDERS[name]
    values = values | dict(model_type=model_type, hidden_size=hidden, intermediate_size=4 * hidden)
    few, more = (sizes(hf_files.config_from_hf(values | dict(num_hidden_layers=n))) for n in (2, 3))
    assert few[0] == few[1]
    assert round((few[2] + (layers - 2) * (more[2] - few[2])) / 1e6) == millions
