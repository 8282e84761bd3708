"""EncoderConfig: what distinguishes one encoder from another, under HuggingFace's names."""

import dataclasses
import numbers
import types
from dataclasses import dataclass

ACTIVATIONS = {"gelu": "none", "gelu_new": "tanh", "gelu_pytorch_tanh": "tanh"}
# further ones of gated feed-forwards
GATES = ("silu",)
_CHOICES = {
    "conv_act": ("tanh", "gelu"),
    "gate": (None, "first", "last", "apart"),
    "pooler_act": ("tanh", "relu", "gelu", "transform"),
    "head_pooling": ("cls", "mean"),
    "problem_type": (None, "regression", "single_label_classification", "multi_label_classification"),
}
# the types that a field accepts: NumPy's numbers too, and 1 for 1.0
_KINDS = {int: numbers.Integral, float: numbers.Real}
_WIDTH, _ROWS = 2**20, 2**31 - 1
# field -> its lowest and highest value; what is above describes no model that fits a machine
_LIMITS = {
    "vocab_size": (1, _ROWS), "hidden_size": (1, _WIDTH), "num_hidden_layers": (1, 1024),
    "num_attention_heads": (1, _WIDTH), "intermediate_size": (1, _WIDTH), "max_position_embeddings": (1, _ROWS),
    "type_vocab_size": (0, _ROWS), "task_type_vocab_size": (0, _ROWS), "position_offset": (0, _ROWS),
    "embedding_size": (1, _WIDTH),
    "num_hidden_groups": (1, 1024), "inner_group_num": (1, 1024), "position_buckets": (0, _WIDTH),
    "max_relative_positions": (0, _WIDTH), "conv_kernel_size": (0, 1023), "num_labels": (1, 2**22),
    "initializer_range": (0, 100), "rope_factor": (1e-3, 1e6), "layer_norm_eps": (0, 1),
    # a quarter of them are for one distance each, all below DistanceBias.FURTHEST
    "distance_buckets": (0, 511),
}  # fmt: skip


def shown(value):
    """A value in an error message: on one line, and short."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def checked(name, value, kind, limits=None):
    """`value`, which must be of the type `kind` and within limits (lowest, highest). Raises ValueError with `name`.

    A bool is no int; an int is a float.
    """
    if not isinstance(value, _KINDS.get(kind, kind)) or (isinstance(value, bool) and kind is not bool):
        raise ValueError(f"{name} is {shown(value)}: expected {kind.__name__}")
    if limits is not None and not limits[0] <= value <= limits[1]:
        raise ValueError(f"{name} is {shown(value)}: expected {limits[0]} to {limits[1]}")
    return value


@dataclass(frozen=True)
class EncoderConfig:
    """Shape and constants of an encoder. Field names and defaults are those of HuggingFace's BertConfig.

    Raises ValueError with the offending value when fields contradict each other.
    """

    # --- BERT, and all families after it
    # HuggingFace's name of the family, a row of families.FAMILIES
    model_type: str = "bert"
    # rows of the word table
    vocab_size: int = 30522
    # width of the hidden states
    hidden_size: int = 768
    # how many layers run
    num_hidden_layers: int = 12
    # each has hidden_size / num_attention_heads columns
    num_attention_heads: int = 12
    # width inside the feed-forward
    intermediate_size: int = 3072
    # the feed-forward's activation, one of ACTIVATIONS, or of GATES where it is gated
    hidden_act: str = "gelu"
    # dropout of the hidden states
    hidden_dropout_prob: float = 0.1
    # dropout of the attention probabilities
    attention_probs_dropout_prob: float = 0.1
    # rows of the table of absolute positions
    max_position_embeddings: int = 512
    # rows of the token type table; 0 for no table
    type_vocab_size: int = 2
    # standard deviation of fresh weights
    initializer_range: float = 0.02
    # LayerNorm's epsilon
    layer_norm_eps: float = 1e-12
    # the id of [PAD]
    pad_token_id: int = 0
    # the branches that hidden_dropout_prob applies to before the residual is added
    dropped_branches: tuple = ("attention", "feed_forward")
    # class of the attention slot, a key of attentions.ATTENTIONS
    attention: str = "softmax"

    # --- RoBERTa, MPNet
    # row of the position table for the first token of a sequence
    position_offset: int = 0

    # --- ELECTRA, ALBERT, DeBERTa
    # width of the embedding tables if a projection to hidden_size follows; None for no projection
    embedding_size: int | None = None

    # --- ALBERT
    # groups of layers that share their weights; None: no sharing
    num_hidden_groups: int | None = None
    # layers of a group, which run in turn
    inner_group_num: int = 1

    # --- DeBERTa
    # whether the embeddings add a table of absolute positions
    position_biased_input: bool = True
    # buckets of relative positions; 0 for no buckets
    position_buckets: int = 0
    # farthest relative position
    max_relative_positions: int = 0
    # the position terms of the scores, of "c2p" and "p2c"
    pos_att_type: tuple = ()
    # whether relative positions use the projections of the queries and keys
    share_att_key: bool = False
    # whether the table of relative positions has a LayerNorm
    norm_rel_ebd: bool = False
    # width of the convolution beside the first layer; 0 for none
    conv_kernel_size: int = 0
    # the convolution's activation
    conv_act: str = "tanh"
    # whether the masked-LM head adds a table of positions, see layers.MaskDecoder
    enhanced_mask_decoder: bool = False

    # --- MPNet
    # buckets of the distances that have a bias; 0 for no bias
    distance_buckets: int = 0

    # --- ERNIE
    # rows of the table of task types; every token is of type 0, the default of transformers. 0 for no table
    task_type_vocab_size: int = 0

    # --- pre-norm families: ModernBERT, Megatron-BERT, XLM-RoBERTa-XL
    # whether norms come before attention and feed-forward, and after the last layer
    pre_norm: bool = False
    # whether the sum of the embeddings goes through a LayerNorm
    embedding_norm: bool = True
    # whether the first pre-norm layer has a norm before attention
    first_norm: bool = True

    # --- families with gated feed-forwards or rotary positions: ModernBERT, GTE, nomic-embed, jina-embeddings-v3
    # where a gated feed-forward has the half that goes through the activation: "first" or "last" in one linear layer,
    # "apart" in a layer of its own; None: it is not gated
    gate: str | None = None
    # positions are divided by this before they are rotated
    rope_factor: float = 1.0
    # how far each layer sees to both sides, None for a layer that sees everything; None: all layers do
    windows: tuple | None = None
    # the rotary base of each layer; None: no rotary positions
    rope_thetas: tuple | None = None
    # whether attention's linear layers have biases
    attention_bias: bool = True
    # whether the feed-forward's linear layers have biases
    mlp_bias: bool = True
    # the same for its last one; None: mlp_bias
    down_bias: bool | None = None
    # whether the norms have biases
    norm_bias: bool = True
    # dropout after the gate
    mlp_dropout: float = 0.0
    # dropout after attention's output projection, in pre-norm layers
    output_dropout: float = 0.0
    # dropout after the feed-forward, in pre-norm layers
    down_dropout: float = 0.0
    # the masked-LM head's activation; None: hidden_act
    head_act: str | None = None
    # whether the masked-LM head's linear layer has a bias
    head_bias: bool = True

    # --- the heads of tasks
    # what a sequence is classified by: its first token ("cls") or the "mean" of its tokens
    head_pooling: str = "cls"
    # activation after the pooler's linear layer; "transform": the masked-LM head's transform precedes every classifier
    pooler_act: str = "tanh"
    # dropout before the pooler's linear layer; None: classifier_dropout
    pooler_dropout: float | None = 0.0
    # dropout before the classifier of sentence pairs
    pair_dropout: float = 0.0
    # dropout before the classifier of sequences; None: hidden_dropout_prob
    classifier_dropout: float | None = None
    # dropout before the classifier of tokens; None: classifier_dropout
    token_dropout: float | None = None
    # dropout before the classifier of choices; None: classifier_dropout
    choice_dropout: float | None = None
    # dropout before the classifier of answers
    qa_dropout: float = 0.0
    # outputs of a classifier
    num_labels: int = 2
    # their names; None: no names
    labels: tuple | None = None
    # the loss of a classifier of sequences, one of _CHOICES; None: depends on the labels
    problem_type: str | None = None

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value, kind = getattr(self, field.name), field.type
            if isinstance(kind, types.UnionType):
                kind, _ = kind.__args__
                if value is None:
                    continue
            checked(field.name, value, kind, _LIMITS.get(field.name))
        heads, layers, activations = self.num_attention_heads, self.num_hidden_layers, ", ".join(ACTIVATIONS)
        per_layer = [(name, getattr(self, name)) for name in ("windows", "rope_thetas")]
        rules = [
            # field, whether its value is right, what would be
            ("hidden_size", self.hidden_size % heads == 0, f"a multiple of num_attention_heads, {heads}"),
            ("num_attention_heads", self.rope_thetas is None or self.head_size % 2 == 0,
             f"hidden_size, {self.hidden_size}, in heads of an even size for rotary positions"),
            ("pad_token_id", 0 <= self.pad_token_id < self.vocab_size, f"0 to {self.vocab_size - 1}"),
            ("hidden_act", self.hidden_act in ACTIVATIONS or (self.gate and self.hidden_act in GATES),
             f"one of {activations}"),
            ("head_act", self.head_act is None or self.head_act in (*ACTIVATIONS, *GATES), f"one of {activations}"),
            ("num_hidden_groups", (self.num_hidden_groups or 1) <= layers, f"at most num_hidden_layers, {layers}"),
            ("max_position_embeddings", not self.has_positions or self.max_length >= 1,
             f"more than the {self.position_offset} rows before that of the first token"),
            ("enhanced_mask_decoder", not self.enhanced_mask_decoder
             or (not self.position_biased_input and "disentangled" in self.attention),
             "disentangled attention, and position_biased_input false"),
            ("pos_att_type", sorted(self.pos_att_type) in ([], ["c2p"], ["p2c"], ["c2p", "p2c"]), "some of c2p, p2c"),
            ("conv_kernel_size", self.conv_kernel_size % 2 == 1 or self.conv_kernel_size == 0,
             "an odd number, or 0 for none"),
            ("distance_buckets", not 0 < self.distance_buckets < 4, "at least 4, or 0 for none"),
            ("labels", self.labels is None or len(self.labels) == self.num_labels, f"{self.num_labels} names"),
            *((name, values is None or len(values) == layers, f"{layers}, one for each layer")
              for name, values in per_layer),
            *((name, getattr(self, name) in choices, f"one of {', '.join(map(str, choices))}")
              for name, choices in _CHOICES.items()),
            *((field.name, 0 <= (getattr(self, field.name) or 0) < 1, "a probability below 1")
              for field in dataclasses.fields(self) if "dropout" in field.name),
        ]  # fmt: skip
        for name, holds, expected in rules:
            if not holds:
                raise ValueError(f"{name} is {shown(getattr(self, name))}: expected {expected}")

    @property
    def head_size(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def approximate(self) -> str:
        """The form of the GELU, as torch.nn.functional.gelu names it; None for another activation."""
        return ACTIVATIONS.get(self.hidden_act)

    @property
    def head_approximate(self) -> str:
        """The same for the masked-LM head."""
        return ACTIVATIONS.get(self.head_act or self.hidden_act)

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
