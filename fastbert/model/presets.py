"""The published models by name: their sizes, each as an EncoderConfig."""

from .config import EncoderConfig
from .families import config_of
from .hf_files import config_from_hf


def _sized(model_type, layers, hidden, heads=None, **changes):
    return config_of(
        model_type, num_hidden_layers=layers, hidden_size=hidden, num_attention_heads=heads or hidden // 64,
        **{"intermediate_size": 4 * hidden, **changes},
    )  # fmt: skip


def _from_hf(model_type, layers, hidden, **values):
    sizes = dict(num_hidden_layers=layers, hidden_size=hidden, num_attention_heads=hidden // 64)
    return config_from_hf({"model_type": model_type, **sizes, "intermediate_size": 4 * hidden, **values})


_DEBERTA = dict(relative_attention=True, position_biased_input=False, pos_att_type=["c2p", "p2c"])
_V2 = dict(_DEBERTA, pos_att_type=["p2c", "c2p"], position_buckets=256, share_att_key=True, norm_rel_ebd="layer_norm")
_LIU = dict(max_position_embeddings=514, type_vocab_size=1, layer_norm_eps=1e-5)

PRESETS = {
    # Devlin et al. 2019 (base, large); Turc et al. 2019 (the small ones)
    "bert-tiny": _sized("bert", 2, 128),
    "bert-mini": _sized("bert", 4, 256),
    "bert-small": _sized("bert", 4, 512),
    "bert-medium": _sized("bert", 8, 512),
    "bert-base": _sized("bert", 12, 768),
    "bert-large": _sized("bert", 24, 1024),
    # Liu et al. 2019; Conneau et al. 2020
    "roberta-base": _sized("roberta", 12, 768, vocab_size=50265, **_LIU),
    "roberta-large": _sized("roberta", 24, 1024, vocab_size=50265, **_LIU),
    "xlm-roberta-base": _sized("xlm-roberta", 12, 768, vocab_size=250002, **_LIU),
    "xlm-roberta-large": _sized("xlm-roberta", 24, 1024, vocab_size=250002, **_LIU),
    # Martin et al. 2020; Baevski et al. 2022; Goyal et al. 2021
    "camembert-base": _sized("camembert", 12, 768, vocab_size=32005, **_LIU),
    "data2vec-text-base": _sized("data2vec-text", 12, 768, vocab_size=50265, **_LIU),
    "xlm-roberta-xl": _sized("xlm-roberta-xl", 36, 2560, 32),
    # Wettig et al. 2023, with a masked share of 40 %
    "efficient-mlm": _sized("roberta-prelayernorm", 24, 1024, **_LIU),
    # Sun et al. 2021
    "ernie-3.0-base-zh": _sized(
        "ernie",
        12,
        768,
        vocab_size=40000,
        max_position_embeddings=2048,
        type_vocab_size=4,
        task_type_vocab_size=3,
        layer_norm_eps=1e-5,
    ),
    # Shoeybi et al. 2019
    "megatron-bert-345m": _sized("megatron-bert", 24, 1024),
    # Lan et al. 2020, second version
    "albert-base-v2": _sized("albert", 12, 768),
    "albert-large-v2": _sized("albert", 24, 1024),
    "albert-xlarge-v2": _sized("albert", 24, 2048, 16),
    "albert-xxlarge-v2": _sized("albert", 12, 4096, hidden_act="gelu"),
    # Clark et al. 2020: the discriminators
    "electra-small": _sized("electra", 12, 256),
    "electra-base": _sized("electra", 12, 768, embedding_size=768),
    "electra-large": _sized("electra", 24, 1024, embedding_size=1024),
    # He et al. 2021 (v1, v2); He et al. 2023 (v3)
    "deberta-base": _from_hf("deberta", 12, 768, **_DEBERTA),
    "deberta-large": _from_hf("deberta", 24, 1024, **_DEBERTA),
    "deberta-v2-xlarge": _from_hf("deberta-v2", 24, 1536, **_V2, conv_kernel_size=3, conv_act="gelu"),
    "deberta-v2-xxlarge": _from_hf("deberta-v2", 48, 1536, **_V2, conv_kernel_size=3, conv_act="gelu"),
    "deberta-v3-xsmall": _from_hf("deberta-v2", 12, 384, **_V2),
    "deberta-v3-small": _from_hf("deberta-v2", 6, 768, **_V2),
    "deberta-v3-base": _from_hf("deberta-v2", 12, 768, **_V2),
    "deberta-v3-large": _from_hf("deberta-v2", 24, 1024, **_V2),
    # Song et al. 2020
    "mpnet-base": _sized("mpnet", 12, 768, max_position_embeddings=514, layer_norm_eps=1e-5),
    # Warner et al. 2024
    "modernbert-base": _from_hf("modernbert", 22, 768, intermediate_size=1152),
    "modernbert-large": _from_hf("modernbert", 28, 1024, intermediate_size=2624),
    # Zhang et al. 2024; Nussbaum et al. 2024; Sturua et al. 2024, without its adapters
    "gte-multilingual-base": _from_hf("gte", 12, 768),
    "nomic-embed-text-v1.5": _from_hf("nomic_bert", 12, 768),
    "jina-embeddings-v3": _from_hf("jina_embeddings_v3", 24, 1024),
    # Sanh et al. 2019
    "distilbert-base": _sized("distilbert", 6, 768),
}


def preset(name: str) -> EncoderConfig:
    """The EncoderConfig of a published size. Raises ValueError naming the known ones."""
    if name not in PRESETS:
        raise ValueError(f"no model is called {name!r}: expected one of {', '.join(PRESETS)}, or a config.json")
    return PRESETS[name]
