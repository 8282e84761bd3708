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
