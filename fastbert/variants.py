"""The models of the family as rows of data: published sizes, and HuggingFace's name for each of our parameters."""

from .config import EncoderConfig


def _bert(layers, hidden):
    return EncoderConfig(
        num_hidden_layers=layers, hidden_size=hidden, num_attention_heads=hidden // 64, intermediate_size=4 * hidden
    )


# Devlin et al. 2019 (base, large); Turc et al. 2019 (the small ones)
PRESETS = {
    "bert-tiny": _bert(2, 128),
    "bert-mini": _bert(4, 256),
    "bert-small": _bert(4, 512),
    "bert-medium": _bert(8, 512),
    "bert-base": _bert(12, 768),
    "bert-large": _bert(24, 1024),
}


def preset(name):
    """The EncoderConfig of a published size. Raises ValueError naming the known ones."""
    if name not in PRESETS:
        raise ValueError(f"no model is called {name!r}: expected one of {', '.join(PRESETS)}, or a config.json")
    return PRESETS[name]


# our module or parameter -> HuggingFace's; {i} stands for the layer's number
HF_NAMES = {
    "bert": {
        "encoder.embeddings.word": "bert.embeddings.word_embeddings",
        "encoder.embeddings.position": "bert.embeddings.position_embeddings",
        "encoder.embeddings.token_type": "bert.embeddings.token_type_embeddings",
        "encoder.embeddings.norm": "bert.embeddings.LayerNorm",
        "encoder.blocks.{i}.attention.query": "bert.encoder.layer.{i}.attention.self.query",
        "encoder.blocks.{i}.attention.key": "bert.encoder.layer.{i}.attention.self.key",
        "encoder.blocks.{i}.attention.value": "bert.encoder.layer.{i}.attention.self.value",
        "encoder.blocks.{i}.attention.output": "bert.encoder.layer.{i}.attention.output.dense",
        "encoder.blocks.{i}.attention_norm": "bert.encoder.layer.{i}.attention.output.LayerNorm",
        "encoder.blocks.{i}.feed_forward.up": "bert.encoder.layer.{i}.intermediate.dense",
        "encoder.blocks.{i}.feed_forward.down": "bert.encoder.layer.{i}.output.dense",
        "encoder.blocks.{i}.feed_forward_norm": "bert.encoder.layer.{i}.output.LayerNorm",
        "transform.dense": "cls.predictions.transform.dense",
        "transform.norm": "cls.predictions.transform.LayerNorm",
        "vocabulary_bias": "cls.predictions.bias",
        "pooler": "bert.pooler.dense",
        "pair_classifier": "cls.seq_relationship",
    },
}

# the head class that HuggingFace has for each of ours
HF_ARCHITECTURES = {"bert": {"MaskedLM": "BertForMaskedLM", "Pretraining": "BertForPreTraining"}}

# in a checkpoint, but not parameters of their own: copies of tied ones, and buffers
HF_TIED = {
    "bert": ("cls.predictions.decoder.weight", "cls.predictions.decoder.bias", "bert.embeddings.position_ids"),
}

# the prefix that a checkpoint of the bare encoder lacks
HF_PREFIX = {"bert": "bert."}

# names that old checkpoints use
HF_LEGACY = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}


def hf_names(names, config):
    """{our name: HuggingFace's name} for the parameter names `names` of a model with `config`."""
    table = HF_NAMES[config.model_type]
    result = {}
    for name in names:
        parts = name.split(".")
        number = next((part for part in parts if part.isdigit()), None)
        pattern = ".".join("{i}" if part.isdigit() else part for part in parts)
        module, _, leaf = pattern.rpartition(".")
        if pattern in table:
            result[name] = table[pattern]
        else:
            result[name] = f"{table[module]}.{leaf}".replace("{i}", number or "")
    return result


def from_hf_names(tensors, config):
    """A checkpoint's tensors by HuggingFace's current full names: legacy names renewed, a missing prefix put back."""
    prefix, known = HF_PREFIX[config.model_type], ("cls.",)
    renewed = {}
    for name, tensor in tensors.items():
        for old, new in HF_LEGACY.items():
            if name.endswith(old):
                name = name[: -len(old)] + new
        if not name.startswith((prefix, *known)):
            name = prefix + name
        renewed[name] = tensor
    return renewed
