"""How HuggingFace names the parts of its models: what a row of `families.FAMILIES` is made of."""

from collections.abc import Callable
from dataclasses import dataclass, field

from . import config_json


@dataclass(frozen=True)
class Family:
    """How HuggingFace stores one model type.

    prefix: of the encoder's tensors in a checkpoint of a whole model. names: our module or parameter -> theirs; {i} is
    the layer's number, {g} and {j} its group and its place there; "Head.name" stands for `name` in that head alone.
    architectures: our head -> their class. tied: in checkpoints, but copies of other tensors or buffers.

    defaults: EncoderConfig fields whose default is not BERT's. keys: EncoderConfig field -> their key in config.json,
    where BERT has no such key or another name; None where they have none. expected: further keys of config.json -> the
    values for which this library computes the same as transformers. same: keys -> the EncoderConfig field or property
    that they must agree with. tokenizer: the kind that is trained for it.
    positions_after_padding: the rows of the position table up to the padding token's id are unused. projects_always:
    the embeddings have a projection even if they are as wide as the hidden states. renamed: beginnings of names in
    published checkpoints -> current ones. read, write: EncoderConfig fields from a whole config.json, and back, where
    more than names differ. generator: the EncoderConfig of the generator for a discriminator, in families that detect
    replaced tokens; embedding_sharing: how these two share tables, see replaced_tokens.ReplacedTokenPretraining.
    converts: transformers' parameters have other names and shapes than what it stores, which `names` are for.
    """

    prefix: str
    names: dict
    architectures: dict
    tied: tuple = ()
    defaults: dict = field(default_factory=dict)
    keys: dict = field(default_factory=dict)
    expected: dict = field(default_factory=dict)
    same: dict = field(default_factory=dict)
    tokenizer: str = "wordpiece"
    positions_after_padding: bool = False
    projects_always: bool = False
    renamed: dict = field(default_factory=dict)
    read: Callable = lambda values: {}
    write: Callable = lambda config: {}
    generator: Callable | None = None
    embedding_sharing: str | None = None
    converts: bool = False


# the modules of a layer, in the order in which `layers` gets their names
LAYER = (
    "attention.query", "attention.key", "attention.value", "attention.output", "attention_norm", "feed_forward.up",
    "feed_forward.down", "feed_forward_norm",
)  # fmt: skip


def layers(prefix, theirs):
    """Names of the modules of a layer: theirs in one text, in the order of LAYER."""
    return {f"encoder.blocks.{{i}}.{ours}": prefix + name for ours, name in zip(LAYER, theirs.split(), strict=True)}


def embeddings(prefix):
    return {
        "encoder.embeddings.word": prefix + "embeddings.word_embeddings",
        "encoder.embeddings.position": prefix + "embeddings.position_embeddings",
        "encoder.embeddings.token_type": prefix + "embeddings.token_type_embeddings",
        "encoder.embeddings.norm": prefix + "embeddings.LayerNorm",
    }


def embeddings_without_norm(prefix):
    return {ours: theirs for ours, theirs in embeddings(prefix).items() if ours != "encoder.embeddings.norm"}


def encoder(prefix, query_key_value="attention.self.query attention.self.key attention.self.value"):
    """The names of BERT's encoder, which several families share."""
    rest = "attention.output.dense attention.output.LayerNorm intermediate.dense output.dense output.LayerNorm"
    return embeddings(prefix) | layers(prefix + "encoder.layer.{i}.", f"{query_key_value} {rest}")


def pre_norm_layers(prefix, before_attention, before_feed_forward):
    """BERT's names, with the norms elsewhere."""
    return layers(
        prefix + "encoder.layer.{i}.",
        f"attention.self.query attention.self.key attention.self.value attention.output.dense {before_attention} "
        f"intermediate.dense output.dense {before_feed_forward}",
    )


def heads(name, **others):
    """transformers' classes for our heads, which most families name alike."""
    return {
        "MaskedLM": f"{name}ForMaskedLM",
        "SequenceClassifier": f"{name}ForSequenceClassification",
        "TokenClassifier": f"{name}ForTokenClassification",
        "QuestionAnswerer": f"{name}ForQuestionAnswering",
        "MultipleChoice": f"{name}ForMultipleChoice",
        "SentenceEmbedder": f"{name}Model",
        **others,
    }


def vocabulary_head(dense, norm, bias):
    return {"transform.dense": dense, "transform.norm": norm, "vocabulary_bias": bias}


CLASSIFIERS = {"classifier": "classifier", "QuestionAnswerer.classifier": "qa_outputs"}
DENSE_CLASSIFIER = {
    **CLASSIFIERS,
    "SequenceClassifier.pooler": "classifier.dense",
    "SequenceClassifier.classifier": "classifier.out_proj",
}
LM_HEAD = vocabulary_head("lm_head.dense", "lm_head.layer_norm", "lm_head.bias")
LM_HEAD_TIED = ("lm_head.decoder.weight", "lm_head.decoder.bias")


def rotary(prefix, layer, norm, theirs, heads, default_theta, same=None, **defaults):
    """What families of rotary positions and post-norm layers share, under the names of the published checkpoints, which
    transformers' directories have, too.

    layer: the beginning of a layer's names, after the prefix. norm: of the embeddings. theirs: names of the modules of
    a layer, by ours. same: see Family.
    """
    tables = embeddings(prefix) | {"encoder.embeddings.norm": prefix + norm}
    del tables["encoder.embeddings.position"]
    modules = {f"encoder.blocks.{{i}}.{ours}": f"{prefix}{layer}.{{i}}.{name}" for ours, name in theirs.items()}
    return dict(
        prefix=prefix,
        names={**tables, **modules, "pooler": f"{prefix}pooler.dense", **heads},
        defaults=dict(attention="rotary", position_biased_input=False, **defaults),
        same={"head_dim": "head_size", **(same or {})},
        converts=True,
        **config_json.rotary(default_theta, defaults.get("num_hidden_layers", 12)),
    )


def without(heads, *names):
    return {head: name for head, name in heads.items() if head not in names}
