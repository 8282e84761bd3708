"""EncoderConfig: what distinguishes one encoder from another, under HuggingFace's names."""

import dataclasses
import numbers
from dataclasses import dataclass

ACTIVATIONS = {"gelu": "none", "gelu_new": "tanh", "gelu_pytorch_tanh": "tanh"}
_CHOICES = {
    "conv_act": ("tanh", "gelu"),
    "pooler_act": ("tanh", "relu", "gelu", "transform"),
    "head_pooling": ("cls", "mean"),
    "problem_type": (None, "regression", "single_label_classification", "multi_label_classification"),
}
# a field's annotation -> the types that it takes: NumPy's numbers too, and 1 for 1.0
_KINDS = {
    int: numbers.Integral,
    int | None: numbers.Integral | None,
    float: numbers.Real,
    float | None: numbers.Real | None,
}


@dataclass(frozen=True)
class EncoderConfig:
    """Sizes and constants of an encoder and its heads. Names and defaults are those of HuggingFace's BertConfig.

    Raises ValueError with the offending value when fields contradict each other.
    """

    # one of `families.FAMILIES`
    model_type: str = "bert"
    vocab_size: int = 30522
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    # one of ACTIVATIONS
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    max_position_embeddings: int = 512
    # 0: no segments
    type_vocab_size: int = 2
    # standard deviation of the initial weights
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-12
    pad_token_id: int = 0

    # where families differ
    # width of the embedding tables if a projection to hidden_size follows, else None
    embedding_size: int | None = None
    # whether there is a table of positions, and its row for the first token of a sequence
    position_biased_input: bool = True
    position_offset: int = 0
    # groups of layers that share weights (None: each layer has its own), and the layers in a group
    num_hidden_groups: int | None = None
    inner_group_num: int = 1
    # the class in the attention slot, one of `attentions.ATTENTIONS`
    attention: str = "softmax"
    # post-norm: the branches with hidden_dropout_prob before the residual is added
    dropped_branches: tuple = ("attention", "feed_forward")

    # ModernBERT; more of it below
    # norms before attention and feed-forward, and a gated feed-forward
    pre_norm: bool = False
    # how far each layer sees to both sides; None, for a layer or for all: without limit
    windows: tuple | None = None
    # the rotary base of each layer
    rope_thetas: tuple | None = None

    # DeBERTa, and MPNet's distance_buckets
    # 0: no buckets
    position_buckets: int = 0
    max_relative_positions: int = 0
    # some of "c2p" and "p2c"
    pos_att_type: tuple = ()
    # 0: no table of distances
    distance_buckets: int = 0
    share_att_key: bool = False
    # whether the table of relative positions has a LayerNorm
    norm_rel_ebd: bool = False
    # 0: no convolution
    conv_kernel_size: int = 0
    conv_act: str = "tanh"
    # whether the masked-LM head adds a table of positions, see `layers.MaskDecoder`
    enhanced_mask_decoder: bool = False

    # ModernBERT has none of these biases
    attention_bias: bool = True
    mlp_bias: bool = True
    norm_bias: bool = True
    # dropout after the gate, and after attention's output projection
    mlp_dropout: float = 0.0
    output_dropout: float = 0.0

    # the masked-LM head: its activation (None: hidden_act), and whether its linear layer has a bias
    head_act: str | None = None
    head_bias: bool = True

    # the heads of tasks
    # what stands for a sequence: its first token ("cls"), or "mean"
    head_pooling: str = "cls"
    # the activation after the pooler, or "transform": the masked-LM head's transform in place of the pooler
    pooler_act: str = "tanh"
    # before the pooler; None: classifier_dropout
    pooler_dropout: float | None = 0.0
    # before the classifier of sentence pairs, of sequences (None: hidden_dropout_prob), of tokens and of choices
    # (None: classifier_dropout), and of answers
    pair_dropout: float = 0.0
    classifier_dropout: float | None = None
    token_dropout: float | None = None
    choice_dropout: float | None = None
    qa_dropout: float = 0.0
    num_labels: int = 2
    # the names of the labels
    labels: tuple | None = None
    # "regression", "single_label_classification", "multi_label_classification"; None: by the type of the labels
    problem_type: str | None = None

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value, kinds = getattr(self, field.name), _KINDS.get(field.type, field.type)
            if not isinstance(value, kinds):
                expected = getattr(field.type, "__name__", field.type)
                raise ValueError(f"{field.name} is {value!r}: expected {expected}")
        for name in (
            "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size",
            "max_position_embeddings", "inner_group_num", "num_labels",
        ):  # fmt: skip
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: expected at least 1")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} is not divisible by num_attention_heads {self.num_attention_heads}"
            )
        if not 0 <= self.pad_token_id < self.vocab_size:
            raise ValueError(f"pad_token_id is {self.pad_token_id}: expected 0 to {self.vocab_size - 1}")
        for act in (self.hidden_act, self.head_act or self.hidden_act):
            if act not in ACTIVATIONS:
                raise ValueError(f"hidden_act is {act!r}: expected one of {', '.join(ACTIVATIONS)}")
        if self.enhanced_mask_decoder and (self.position_biased_input or "disentangled" not in self.attention):
            raise ValueError(
                "enhanced_mask_decoder is true: expected disentangled attention, and position_biased_input false"
            )
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} is {getattr(self, name)!r}: expected one of {', '.join(map(str, choices))}")
        if set(self.pos_att_type) - {"c2p", "p2c"}:
            raise ValueError(f"pos_att_type is {self.pos_att_type}: expected some of c2p, p2c")
        if self.conv_kernel_size and self.conv_kernel_size % 2 == 0:
            raise ValueError(f"conv_kernel_size is {self.conv_kernel_size}: expected an odd number, or 0 for none")
        if self.labels is not None and len(self.labels) != self.num_labels:
            raise ValueError(f"{len(self.labels)} labels have names: expected num_labels, {self.num_labels}")
        for name in (field.name for field in dataclasses.fields(self) if "dropout" in field.name):
            if not 0 <= (getattr(self, name) or 0) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: expected a probability below 1")

    @property
    def head_size(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def approximate(self) -> str:
        """The form of the GELU, as torch.nn.functional.gelu names it."""
        return ACTIVATIONS[self.hidden_act]

    @property
    def head_approximate(self) -> str:
        """The same for the masked-LM head."""
        return ACTIVATIONS[self.head_act or self.hidden_act]

    @property
    def embedding_width(self) -> int:
        return self.embedding_size or self.hidden_size

    @property
    def has_positions(self) -> bool:
        """Whether there is a table of absolute positions, of max_position_embeddings rows."""
        return self.position_biased_input or self.enhanced_mask_decoder

    @property
    def max_length(self) -> int:
        """The longest sequence that the position table allows, in tokens; without a table there is no limit."""
        if not self.has_positions:
            return 2**31 - 1
        return self.max_position_embeddings - self.position_offset

    @property
    def layer_order(self) -> list[int]:
        """The numbers of the blocks in the order in which they run; a block that layers share comes several times."""
        if self.num_hidden_groups is None:
            return list(range(self.num_hidden_layers))
        groups = [int(i / (self.num_hidden_layers / self.num_hidden_groups)) for i in range(self.num_hidden_layers)]
        return [g * self.inner_group_num + j for g in groups for j in range(self.inner_group_num)]

    def replace(self, **changes: object) -> "EncoderConfig":
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict:
        return dataclasses.asdict(self)
