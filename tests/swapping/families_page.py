"""docs/families.md: what runs of every class of transformers' masked language models.

    python tests/swapping/families_page.py      writes it

Each class is built with one layer and without memory, and swapped.
"""

import sys
import warnings
from pathlib import Path

import torch
import transformers
from transformers.models.auto import configuration_auto, modeling_auto

import fastbert
from fastbert.model.families import FAMILIES
from fastbert.swapping.stacks import BertEncoder

PAGE = Path(__file__).resolve().parents[2] / "docs" / "families.md"
# where transformers' defaults are no published model's
_RELATIVE = dict(relative_attention=True, pos_att_type=["c2p", "p2c"])
OPTIONS = {
    "deberta": _RELATIVE,
    "deberta-v2": _RELATIVE,
    "esm": dict(vocab_size=33, pad_token_id=1, mask_token_id=32, position_embedding_type="rotary"),
    "funnel": dict(block_sizes=[1]),
}
LAYERS = "num_hidden_layers", "n_layers", "n_layer", "num_layers", "encoder_layers", "decoder_layers"
HEAD = """# Families

What runs of each masked language model of transformers {version}, as `tests/swapping/families_page.py` finds it: it
builds each class with one layer and swaps it.

- **own model**: `fastbert.MaskedLM.from_pretrained(dir)` and the other heads load its directories.
- **`fastbert.swap`**: the switches that replace something. *unpadded*: its layers run on real tokens alone. Without it,
  only single modules are replaced, and padding stays.
- **`attn_implementation="fastbert"`**: *packed*, where transformers looks attention and mask up; else the model
  computes as it always does.

| model type | class | own model | `fastbert.swap` | `attn_implementation` |
|---|---|---|---|---|
"""


def built(model_type, name):
    """The model on the "meta" device, with one layer."""
    config = getattr(transformers, configuration_auto.CONFIG_MAPPING_NAMES[model_type])(**OPTIONS.get(model_type, {}))
    for part in LAYERS:
        if isinstance(vars(config).get(part), int):
            setattr(config, part, 1)
    with torch.device("meta"):
        return getattr(transformers, name)(config)


def swap_of(model):
    report = fastbert.swap(model)
    replaced = [vars(type(model.get_submodule(row.name)))["replacement"] for row in report.swapped]
    parts = [name for name in ("attention", "layer_norm", "gelu", "loss") if any(name in x.RUNS for x in replaced)]
    unpadded = "unpadded: " * any(issubclass(x, BertEncoder) for x in replaced)
    return unpadded + (", ".join(f"`{part}`" for part in parts) or "nothing")


def attention_of(model):
    file = sys.modules[type(model).__module__]
    looks_up = all(hasattr(file, name) for name in ("ALL_ATTENTION_FUNCTIONS", "create_bidirectional_mask"))
    return "packed" if looks_up and not getattr(model.config, "is_encoder_decoder", False) else "no"


def line(model_type, name):
    own, model = "yes" if model_type in FAMILIES else "no", built(model_type, name)
    attention = attention_of(model)
    return f"| `{model_type}` | `{name}` | {own} | {swap_of(model)} | {attention} |"


def page():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        lines = [line(*row) for row in sorted(modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES.items())]
    return HEAD.format(version=transformers.__version__) + "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
