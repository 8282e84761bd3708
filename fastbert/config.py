"""EncoderConfig: the numbers that distinguish one encoder from another, under HuggingFace's names."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

ACTIVATIONS = {"gelu": "none", "gelu_new": "tanh", "gelu_pytorch_tanh": "tanh"}


@dataclass(frozen=True)
class EncoderConfig:
    """Shape and constants of an encoder. Field names and defaults are those of HuggingFace's BertConfig.

    Raises ValueError with the offending value when fields contradict each other.
    """

    model_type: str = "bert"
    vocab_size: int = 30522
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-12
    pad_token_id: int = 0

    def __post_init__(self):
        for name in (
            "vocab_size",
            "hidden_size",
            "num_attention_heads",
            "intermediate_size",
            "max_position_embeddings",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: expected at least 1")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} is not divisible by num_attention_heads {self.num_attention_heads}"
            )
        if self.hidden_act not in ACTIVATIONS:
            raise ValueError(f"hidden_act is {self.hidden_act!r}: expected one of {', '.join(ACTIVATIONS)}")
        for name in ("hidden_dropout_prob", "attention_probs_dropout_prob"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: expected a probability below 1")

    @property
    def head_size(self):
        return self.hidden_size // self.num_attention_heads

    @property
    def approximate(self):
        """The GELU's form, as torch.nn.functional.gelu names it."""
        return ACTIVATIONS[self.hidden_act]

    def replace(self, **changes):
        return dataclasses.replace(self, **changes)

    def to_dict(self):
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values):
        """From the contents of a HuggingFace config.json; keys that do not concern the encoder are ignored."""
        fields = {field.name for field in dataclasses.fields(cls)}
        if values.get("position_embedding_type", "absolute") != "absolute":
            raise ValueError(f"position_embedding_type is {values['position_embedding_type']!r}: expected 'absolute'")
        return cls(**{name: value for name, value in values.items() if name in fields and value is not None})

    @classmethod
    def from_file(cls, path):
        """From a config.json."""
        path = Path(path)
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ValueError(f"{path} is not a readable JSON file: {error}") from None
        if not isinstance(values, dict):
            raise ValueError(f"{path} holds a {type(values).__name__}: expected a JSON object")
        return cls.from_dict(values)
