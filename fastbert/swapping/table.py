"""Which of HuggingFace's classes is replaced by what: by a class of the same name, or BERT's where it is a copy."""

from .attention import (
    AlbertAttention,
    Attention,
    BertSelfAttention,
    DebertaDisentangledSelfAttention,
    DebertaV2DisentangledSelfAttention,
    DistilBertSelfAttention,
    EsmSelfAttention,
    GteAttention,
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
    EsmIntermediate,
    EuroBertRMSNorm,
    GteLayer,
    JinaEmbeddingsV3MLP,
    ModernBertMLP,
    MPNetAttention,
    RobertaPreLayerNormIntermediate,
    TransformerBlock,
)
from .flattened import MPNetModel, RobertaModel
from .losses import (
    AlbertForPreTraining,
    BertForMaskedLM,
    BertForPreTraining,
    BertForSequenceClassification,
    ElectraForPreTraining,
)
from .stacks import (
    BertEncoder,
    DebertaEncoder,
    EsmEncoder,
    GteModel,
    ModernBertModel,
    MPNetEncoder,
    PreNormEncoder,
)
from .tokenwise import KNOWN

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


def _pre_norm(family, **others):
    """Their residuals have no norm."""
    return {f"{family}Encoder": PreNormEncoder, f"{family}SelfOutput": None, f"{family}Output": None, **others}


def _rotary(family, **others):
    parts = {"Model": GteModel, "Layer": GteLayer, "Attention": GteAttention}
    return {f"{family}{part}": cls for part, cls in parts.items()} | others


# file, family's name -> their class: ours, where it is not one of those above; None: it stays
_OWN = {
    ("bert", "Bert"): {
        "BertForPreTraining": BertForPreTraining,
        "BertPredictionHeadTransform": BertPredictionHeadTransform,
    },
    ("ernie", "Ernie"): {
        "ErnieForPreTraining": BertForPreTraining,
        "ErniePredictionHeadTransform": BertPredictionHeadTransform,
    },
    ("roc_bert", "RoCBert"): {"RoCBertPredictionHeadTransform": BertPredictionHeadTransform},
    ("megatron_bert", "MegatronBert"): _pre_norm(
        "MegatronBert",
        MegatronBertForPreTraining=BertForPreTraining,
        MegatronBertPredictionHeadTransform=BertPredictionHeadTransform,
    ),
    ("roberta", "Roberta"): {"RobertaModel": RobertaModel},
    ("xlm_roberta", "XLMRoberta"): {"XLMRobertaModel": RobertaModel},
    ("camembert", "Camembert"): {"CamembertModel": RobertaModel},
    ("data2vec", "Data2VecText"): {"Data2VecTextModel": RobertaModel},
    ("roberta_prelayernorm", "RobertaPreLayerNorm"): _pre_norm(
        "RobertaPreLayerNorm",
        RobertaPreLayerNormIntermediate=RobertaPreLayerNormIntermediate,
        RobertaPreLayerNormModel=RobertaModel,
    ),
    ("xlm_roberta_xl", "XLMRobertaXL"): _pre_norm("XLMRobertaXL", XLMRobertaXLModel=RobertaModel),
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
        "DebertaModel": MPNetModel,
        "DisentangledSelfAttention": DebertaDisentangledSelfAttention,
        "LegacyDebertaPredictionHeadTransform": BertPredictionHeadTransform,
    },
    ("deberta_v2", "DebertaV2"): {
        "DebertaV2Encoder": DebertaEncoder,
        "DebertaV2Model": MPNetModel,
        "DisentangledSelfAttention": DebertaV2DisentangledSelfAttention,
        "LegacyDebertaV2PredictionHeadTransform": BertPredictionHeadTransform,
    },
    ("mpnet", "MPNet"): {
        "MPNetAttention": MPNetAttention,
        "MPNetEncoder": MPNetEncoder,
        "MPNetModel": MPNetModel,
        "MPNetSelfAttention": MPNetSelfAttention,
    },
    ("modernbert", "ModernBert"): {
        "ModernBertAttention": ModernBertAttention,
        "ModernBertMLP": ModernBertMLP,
        "ModernBertModel": ModernBertModel,
    },
    ("esm", "Esm"): _pre_norm(
        "Esm",
        EsmEncoder=EsmEncoder,
        EsmSelfAttention=EsmSelfAttention,
        EsmIntermediate=EsmIntermediate,
    ),
    ("gte", "Gte"): _rotary("Gte"),
    ("nomic_bert", "NomicBert"): _rotary("NomicBert"),
    ("eurobert", "EuroBert"): _rotary("EuroBert", EuroBertRMSNorm=EuroBertRMSNorm),
    ("jina_embeddings_v3", "JinaEmbeddingsV3"): _rotary("JinaEmbeddingsV3", JinaEmbeddingsV3MLP=JinaEmbeddingsV3MLP),
}

# classes inside a stack or a masked-LM head that only call the others
_CALLERS = (
    "Attention", "EncoderLayer", "Embeddings", "Layer", "LayerGroup", "RotaryEmbedding", "LMHead", "LMPredictionHead",
    "MLMHead", "GeneratorPredictions", "OnlyMLMHead", "PredictionHead", "PredictionHeadTransform", "PreTrainingHeads",
    "MLP", "Pooler", "DecoderLayer",
)  # fmt: skip


def _full_name(file, name):
    # data2vec is a folder of three models
    return f"transformers.models.{file}.modeling_{'data2vec_text' if file == 'data2vec' else file}.{name}"


# full name of HuggingFace's class -> what takes its place
TABLE = {
    _full_name(file, theirs): ours
    for (file, family), own in _OWN.items()
    for theirs, ours in {**{f"{family}{name}": cls for name, cls in _COPIED.items()}, **own}.items()
    if ours is not None
}
# attention must be ours, the rest may also have stayed what it was
KNOWN.update(
    _full_name(file, f"{prefix}{family}{name}")
    for file, family in _OWN
    for name in _CALLERS
    for prefix in ("", "Legacy")
)
KNOWN.update(name for name, cls in TABLE.items() if cls.TOKENWISE)
KNOWN.update(_full_name(file, name) for (file, _), own in _OWN.items() for name, cls in own.items() if cls is None)
KNOWN.difference_update(name for name, cls in TABLE.items() if issubclass(cls, Attention))
