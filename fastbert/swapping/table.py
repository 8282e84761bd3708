"""Which of HuggingFace's classes is replaced by what."""

from .attention import (
    AlbertAttention,
    DebertaAttention,
    DebertaV2Attention,
    DistilBertAttention,
    ModernBertAttention,
    MPNetAttention,
    SelfAttention,
)
from .feed_forward import (
    AddNorm,
    AlbertBlock,
    DebertaLayerNorm,
    DistilBertBlock,
    DistilBertFeedForward,
    Intermediate,
    ModernBertFeedForward,
    MPNetAttentionNorm,
    Transform,
)
from .losses import AlbertPretraining, LossHead, MaskedLM, Pretraining
from .stacks import DebertaStack, ModernBertStack, MPNetStack, Stack


def _table():
    table = {}
    heads = ("SequenceClassification", "TokenClassification", "MultipleChoice", "NextSentencePrediction")
    for folder, name, own in (
        ("bert", "Bert", {"PredictionHeadTransform": Transform, "ForPreTraining": Pretraining}),
        ("roberta", "Roberta", {}),
        ("xlm_roberta", "XLMRoberta", {}),
        ("electra", "Electra", {"ForPreTraining": LossHead}),
        ("mpnet", "MPNet", {"SelfAttention": MPNetAttention, "Attention": MPNetAttentionNorm, "Encoder": MPNetStack}),
        ("deberta", "Deberta", {"Encoder": DebertaStack, "LayerNorm": DebertaLayerNorm}),
        ("deberta_v2", "DebertaV2", {"Encoder": DebertaStack}),
        (
            "albert", "Albert",
            {
                "Attention": AlbertAttention, "Layer": AlbertBlock, "Transformer": Stack,
                "ForPreTraining": AlbertPretraining,
            },
        ),
        ("distilbert", "DistilBert", {"SelfAttention": DistilBertAttention}),
        (
            "modernbert", "ModernBert",
            {"Attention": ModernBertAttention, "MLP": ModernBertFeedForward, "Model": ModernBertStack},
        ),
    ):  # fmt: skip
        kinds = {
            "Encoder": Stack, "SelfAttention": SelfAttention, "SelfOutput": AddNorm, "Output": AddNorm,
            "Intermediate": Intermediate, "ForMaskedLM": MaskedLM,
            **{f"For{head}": LossHead for head in heads}, **own,
        }  # fmt: skip
        prefix = f"transformers.models.{folder}.modeling_{folder}."
        table |= {f"{prefix}{name}{kind}": replacement for kind, replacement in kinds.items()}
    table["transformers.models.deberta.modeling_deberta.LegacyDebertaPredictionHeadTransform"] = Transform
    table["transformers.models.deberta_v2.modeling_deberta_v2.LegacyDebertaV2PredictionHeadTransform"] = Transform
    table["transformers.models.deberta.modeling_deberta.DisentangledSelfAttention"] = DebertaAttention
    table["transformers.models.deberta_v2.modeling_deberta_v2.DisentangledSelfAttention"] = DebertaV2Attention
    table["transformers.models.distilbert.modeling_distilbert.Transformer"] = Stack
    table["transformers.models.distilbert.modeling_distilbert.TransformerBlock"] = DistilBertBlock
    table["transformers.models.distilbert.modeling_distilbert.FFN"] = DistilBertFeedForward
    return table


# full name of HuggingFace's class -> what takes its place
TABLE = _table()
