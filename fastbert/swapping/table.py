"""Which of HuggingFace's classes is replaced by what: by a class of the same name, or BERT's where it is a copy."""

from .attention import (
    AlbertAttention,
    BertSelfAttention,
    DebertaDisentangledSelfAttention,
    DebertaV2DisentangledSelfAttention,
    DistilBertSelfAttention,
    ModernBertAttention,
    MPNetSelfAttention,
)
from .feed_forward import (
    FFN,
    AlbertLayer,
    BertIntermediate,
    BertPredictionHeadTransform,
    BertSelfOutput,
    DebertaLayerNorm,
    ModernBertMLP,
    MPNetAttention,
    TransformerBlock,
)
from .losses import (
    AlbertForPreTraining,
    BertForMaskedLM,
    BertForPreTraining,
    BertForSequenceClassification,
    ElectraForPreTraining,
)
from .stacks import BertEncoder, DebertaEncoder, ModernBertModel, MPNetEncoder

# what most families copy from BERT, by the name without the family's
_COPIED = {
    "Encoder": BertEncoder,
    "SelfAttention": BertSelfAttention,
    "SelfOutput": BertSelfOutput,
    "Output": BertSelfOutput,
    "Intermediate": BertIntermediate,
    "ForMaskedLM": BertForMaskedLM,
    "ForSequenceClassification": BertForSequenceClassification,
    "ForTokenClassification": BertForSequenceClassification,
    "ForMultipleChoice": BertForSequenceClassification,
    "ForNextSentencePrediction": BertForSequenceClassification,
}
# file, family's name -> their class: ours, where it is not one of those above
_OWN = {
    ("bert", "Bert"): {
        "BertForPreTraining": BertForPreTraining,
        "BertPredictionHeadTransform": BertPredictionHeadTransform,
    },
    ("roberta", "Roberta"): {},
    ("xlm_roberta", "XLMRoberta"): {},
    ("electra", "Electra"): {"ElectraForPreTraining": ElectraForPreTraining},
    ("albert", "Albert"): {
        "AlbertAttention": AlbertAttention,
        "AlbertForPreTraining": AlbertForPreTraining,
        "AlbertLayer": AlbertLayer,
        "AlbertTransformer": BertEncoder,
    },
    ("distilbert", "DistilBert"): {
        "DistilBertSelfAttention": DistilBertSelfAttention,
        "FFN": FFN,
        "Transformer": BertEncoder,
        "TransformerBlock": TransformerBlock,
    },
    ("deberta", "Deberta"): {
        "DebertaEncoder": DebertaEncoder,
        "DebertaLayerNorm": DebertaLayerNorm,
        "DisentangledSelfAttention": DebertaDisentangledSelfAttention,
        "LegacyDebertaPredictionHeadTransform": BertPredictionHeadTransform,
    },
    ("deberta_v2", "DebertaV2"): {
        "DebertaV2Encoder": DebertaEncoder,
        "DisentangledSelfAttention": DebertaV2DisentangledSelfAttention,
        "LegacyDebertaV2PredictionHeadTransform": BertPredictionHeadTransform,
    },
    ("mpnet", "MPNet"): {
        "MPNetAttention": MPNetAttention,
        "MPNetEncoder": MPNetEncoder,
        "MPNetSelfAttention": MPNetSelfAttention,
    },
    ("modernbert", "ModernBert"): {
        "ModernBertAttention": ModernBertAttention,
        "ModernBertMLP": ModernBertMLP,
        "ModernBertModel": ModernBertModel,
    },
}

# full name of HuggingFace's class -> what takes its place
TABLE = {
    f"transformers.models.{file}.modeling_{file}.{theirs}": ours
    for (file, family), own in _OWN.items()
    for theirs, ours in {**{f"{family}{name}": cls for name, cls in _COPIED.items()}, **own}.items()
}
