"""The families of models as rows of data."""

from . import config_json, naming
from .config import EncoderConfig, checked, shown
from .naming import Family

# names of model types that are another's: of directories with code of their own
ALIASES = {"new": "gte"}


def _bert(name, prefix="bert.", encoder=None, **options):
    """encoder: names of the encoder; None: BERT's."""
    return Family(
        prefix=prefix,
        names={
            **(naming.encoder(prefix) if encoder is None else encoder),
            **naming.vocabulary_head(
                "cls.predictions.transform.dense", "cls.predictions.transform.LayerNorm", "cls.predictions.bias"
            ),
            "pooler": f"{prefix}pooler.dense",
            "pair_classifier": "cls.seq_relationship",
            **naming.CLASSIFIERS,
        },
        architectures=naming.heads(name, Pretraining=f"{name}ForPreTraining"),
        tied=("cls.predictions.decoder.weight", "cls.predictions.decoder.bias", f"{prefix}embeddings.position_ids"),
        **options,
    )


def _roberta(name, prefix="roberta.", encoder=None, keys=None, **defaults):
    """encoder: names of the encoder; None: BERT's."""
    return Family(
        prefix=prefix,
        names={
            **(encoder or naming.encoder(prefix)),
            **naming.LM_HEAD,
            **naming.DENSE_CLASSIFIER,
            "pooler": f"{prefix}pooler.dense",
        },
        architectures=naming.heads(name),
        tied=(*naming.LM_HEAD_TIED, f"{prefix}embeddings.position_ids"),
        defaults=dict(pad_token_id=1, head_act="gelu", pooler_dropout=None, **defaults),
        keys=dict(classifier_dropout="classifier_dropout", **(keys or {})),
        tokenizer="bpe",
        positions_after_padding=True,
    )


def _electra_generator(config):
    """As deep as the discriminator, a quarter as wide, base a third; heads of 64 (Clark et al. 2020, table 6)."""
    hidden = max(1, round(config.hidden_size / (3 if config.hidden_size == 768 else 4)))
    heads = max(1, hidden // 64)
    while hidden % heads:
        heads -= 1
    return config.replace(
        hidden_size=hidden, num_attention_heads=heads,
        intermediate_size=max(1, config.intermediate_size * hidden // config.hidden_size),
        embedding_size=None if config.embedding_width == hidden else config.embedding_width,
    )  # fmt: skip


def _deberta_generator(config):
    """As wide as the discriminator, half as deep (He et al. 2023)."""
    return config.replace(num_hidden_layers=max(1, config.num_hidden_layers // 2))


def _deberta(**names):
    return dict(
        prefix="deberta.",
        names={
            **naming.encoder("deberta."),
            "encoder.relative.table": "deberta.encoder.rel_embeddings",
            "MaskedLM.mask_decoder.position": "deberta.embeddings.position_embeddings",
            **naming.vocabulary_head(
                "cls.predictions.transform.dense", "cls.predictions.transform.LayerNorm", "cls.predictions.bias"
            ),
            "pooler": "pooler.dense",
            **naming.CLASSIFIERS,
            **names,
        },
        tied=("cls.predictions.decoder.weight", "cls.predictions.decoder.bias", "deberta.embeddings.position_ids"),
        renamed={
            # the names of the published checkpoints
            "lm_predictions.lm_head.dense.": "cls.predictions.transform.dense.",
            "lm_predictions.lm_head.LayerNorm.": "cls.predictions.transform.LayerNorm.",
            "lm_predictions.lm_head.bias": "cls.predictions.bias",
        },
        expected=dict(talking_head=[False], conv_groups=[1]),
        same=dict(embedding_size="hidden_size", pooler_hidden_size="hidden_size", attention_head_size="head_size"),
        read=config_json.read_deberta,
        write=config_json.write_deberta,
    )


_DEBERTA_DEFAULTS = dict(type_vocab_size=0, layer_norm_eps=1e-7, pooler_act="gelu")
_DEBERTA_KEYS = dict(
    position_biased_input="position_biased_input", pooler_act="pooler_hidden_act", pooler_dropout="pooler_dropout",
    classifier_dropout="cls_dropout",
)  # fmt: skip
_DEBERTA_SELF = "deberta.encoder.layer.{i}.attention.self."
_MODERNBERT_LAYER = "model.layers.{i}."
_PRE_NORM_DROPOUTS = dict(output_dropout="hidden_dropout_prob", down_dropout="hidden_dropout_prob")

FAMILIES = {
    "bert": _bert("Bert", keys=dict(classifier_dropout="classifier_dropout")),
    "ernie": _bert(
        "Ernie", "ernie.",
        encoder={**naming.encoder("ernie."), "encoder.embeddings.task_type": "ernie.embeddings.task_type_embeddings"},
        keys=dict(classifier_dropout="classifier_dropout"),
        read=config_json.read_ernie,
        write=config_json.write_ernie,
    ),
    "megatron-bert": _bert(
        "MegatronBert",
        encoder={
            **naming.embeddings_without_norm("bert."),
            **naming.pre_norm_layers("bert.", "attention.ln", "ln"),
            "encoder.final_norm": "bert.encoder.ln",
        },
        defaults=dict(
            vocab_size=29056, hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096,
            pre_norm=True, embedding_norm=False,
        ),
        keys=_PRE_NORM_DROPOUTS,
    ),
    "roberta": _roberta("Roberta"),
    "xlm-roberta": _roberta("XLMRoberta"),
    "camembert": _roberta("Camembert"),
    "data2vec-text": _roberta("Data2VecText", "data2vec_text."),
    "roberta-prelayernorm": _roberta(
        "RobertaPreLayerNorm", "roberta_prelayernorm.",
        encoder={
            **naming.embeddings("roberta_prelayernorm."),
            **naming.pre_norm_layers("roberta_prelayernorm.", "attention.LayerNorm", "intermediate.LayerNorm"),
            "encoder.final_norm": "roberta_prelayernorm.LayerNorm",
        },
        keys=_PRE_NORM_DROPOUTS, vocab_size=50265, pre_norm=True,
    ),
    "xlm-roberta-xl": _roberta(
        "XLMRobertaXL",
        encoder={
            **naming.embeddings_without_norm("roberta."),
            **naming.pre_norm_layers("roberta.", "attention.self_attn_layer_norm", "LayerNorm"),
            "encoder.final_norm": "roberta.encoder.LayerNorm",
        },
        keys=dict(output_dropout="hidden_dropout_prob"),
        vocab_size=250880, hidden_size=2560, num_hidden_layers=36, num_attention_heads=32, intermediate_size=10240,
        max_position_embeddings=514, type_vocab_size=1, layer_norm_eps=1e-5, pre_norm=True, embedding_norm=False,
    ),
    "albert": Family(
        prefix="albert.",
        names={
            **naming.embeddings("albert."),
            "encoder.embeddings.project": "albert.encoder.embedding_hidden_mapping_in",
            **naming.layers(
                "albert.encoder.albert_layer_groups.{g}.albert_layers.{j}.",
                "attention.query attention.key attention.value attention.dense attention.LayerNorm ffn ffn_output "
                "full_layer_layer_norm",
            ),
            **naming.vocabulary_head("predictions.dense", "predictions.LayerNorm", "predictions.bias"),
            "pooler": "albert.pooler",
            "pair_classifier": "sop_classifier.classifier",
            **naming.CLASSIFIERS,
        },
        architectures=naming.heads("Albert", Pretraining="AlbertForPreTraining"),
        tied=("predictions.decoder.weight", "predictions.decoder.bias", "albert.embeddings.position_ids"),
        defaults=dict(
            vocab_size=30000, embedding_size=128, hidden_size=4096, num_attention_heads=64, intermediate_size=16384,
            hidden_act="gelu_new", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, num_hidden_groups=1,
            classifier_dropout=0.1, pair_dropout=0.1, dropped_branches=("attention",),
        ),
        keys=dict(
            embedding_width="embedding_size", num_hidden_groups="num_hidden_groups", inner_group_num="inner_group_num",
            classifier_dropout="classifier_dropout_prob", pair_dropout="classifier_dropout_prob",
        ),
        projects_always=True,
    ),
    "electra": Family(
        prefix="electra.",
        names={
            **naming.encoder("electra."),
            "encoder.embeddings.project": "electra.embeddings_project",
            **naming.vocabulary_head(
                "generator_predictions.dense", "generator_predictions.LayerNorm", "generator_lm_head.bias"
            ),
            **naming.DENSE_CLASSIFIER,
            "MultipleChoice.pooler": "sequence_summary.summary",
            "dense": "discriminator_predictions.dense",
            "ReplacedTokenDetector.classifier": "discriminator_predictions.dense_prediction",
        },
        architectures=naming.heads("Electra", ReplacedTokenDetector="ElectraForPreTraining"),
        tied=("generator_lm_head.weight", "electra.embeddings.position_ids"),
        defaults=dict(
            embedding_size=128, hidden_size=256, num_attention_heads=4, intermediate_size=1024, head_act="gelu",
            pooler_act="gelu", pooler_dropout=None, choice_dropout=0.1,
        ),
        keys=dict(
            embedding_width="embedding_size", classifier_dropout="classifier_dropout",
            choice_dropout="summary_last_dropout",
        ),
        expected=dict(
            summary_type=["first"], summary_use_proj=[True], summary_activation=["gelu"],
            summary_proj_to_labels=[False],
        ),
        generator=_electra_generator,
        embedding_sharing="shared",
    ),
    "distilbert": Family(
        prefix="distilbert.",
        names={
            **naming.embeddings("distilbert."),
            **naming.layers(
                "distilbert.transformer.layer.{i}.",
                "attention.q_lin attention.k_lin attention.v_lin attention.out_lin sa_layer_norm ffn.lin1 ffn.lin2 "
                "output_layer_norm",
            ),
            **naming.vocabulary_head("vocab_transform", "vocab_layer_norm", "vocab_projector.bias"),
            "pooler": "pre_classifier",
            **naming.CLASSIFIERS,
        },
        architectures=naming.heads("DistilBert"),
        tied=("vocab_projector.weight", "distilbert.embeddings.position_ids"),
        defaults=dict(
            num_hidden_layers=6, type_vocab_size=0, pooler_act="relu", classifier_dropout=0.2, token_dropout=0.1,
            qa_dropout=0.1, dropped_branches=("feed_forward",),
        ),
        keys=dict(
            token_dropout="dropout", num_hidden_layers="n_layers", num_attention_heads="n_heads", hidden_size="dim",
            intermediate_size="hidden_dim", hidden_dropout_prob="dropout",
            attention_probs_dropout_prob="attention_dropout", hidden_act="activation", type_vocab_size=None,
            layer_norm_eps=None, classifier_dropout="seq_classif_dropout", qa_dropout="qa_dropout",
        ),
        read=config_json.read_distilbert,
    ),
    "deberta": Family(
        **_deberta(**{
            "encoder.blocks.{i}.attention.in_proj": _DEBERTA_SELF + "in_proj",
            "encoder.blocks.{i}.attention.q_bias": _DEBERTA_SELF + "q_bias",
            "encoder.blocks.{i}.attention.v_bias": _DEBERTA_SELF + "v_bias",
            "encoder.blocks.{i}.attention.pos_key": _DEBERTA_SELF + "pos_proj",
            "encoder.blocks.{i}.attention.pos_query": _DEBERTA_SELF + "pos_q_proj",
        }),
        architectures=naming.without(naming.heads("Deberta"), "MultipleChoice"),
        tokenizer="bpe",
        defaults=dict(vocab_size=50265, **_DEBERTA_DEFAULTS),
        keys=_DEBERTA_KEYS,
    ),
    "deberta-v2": Family(
        **_deberta(**{
            **naming.encoder(
                "deberta.", "attention.self.query_proj attention.self.key_proj attention.self.value_proj"
            ),
            "encoder.blocks.{i}.attention.pos_key": _DEBERTA_SELF + "pos_key_proj",
            "encoder.blocks.{i}.attention.pos_query": _DEBERTA_SELF + "pos_query_proj",
            "encoder.relative.norm": "deberta.encoder.LayerNorm",
            "encoder.convolution.conv": "deberta.encoder.conv.conv",
            "encoder.convolution.norm": "deberta.encoder.conv.LayerNorm",
            # transformers has no such head; the published one computes something else
            "dense": "discriminator_predictions.dense",
            "ReplacedTokenDetector.classifier": "discriminator_predictions.dense_prediction",
        }),
        architectures=naming.heads("DebertaV2", ReplacedTokenDetector="DebertaV2ForReplacedTokenDetection"),
        generator=_deberta_generator,
        embedding_sharing="gdes",
        tokenizer="bpe",
        defaults=dict(
            vocab_size=128100, num_hidden_layers=24, hidden_size=1536, num_attention_heads=24, intermediate_size=6144,
            **_DEBERTA_DEFAULTS,
        ),
        keys=dict(
            share_att_key="share_att_key", conv_kernel_size="conv_kernel_size", conv_act="conv_act", **_DEBERTA_KEYS
        ),
    ),
    "mpnet": Family(
        prefix="mpnet.",
        names={
            **naming.embeddings("mpnet."),
            **naming.layers(
                "mpnet.encoder.layer.{i}.",
                "attention.attn.q attention.attn.k attention.attn.v attention.attn.o attention.LayerNorm "
                "intermediate.dense output.dense output.LayerNorm",
            ),
            "encoder.relative.table": "mpnet.encoder.relative_attention_bias",
            **naming.LM_HEAD,
            **naming.DENSE_CLASSIFIER,
            "pooler": "mpnet.pooler.dense",
        },
        architectures=naming.heads("MPNet"),
        tied=(*naming.LM_HEAD_TIED, "mpnet.embeddings.position_ids"),
        defaults=dict(
            vocab_size=30527, type_vocab_size=0, pad_token_id=1, attention="biased", distance_buckets=32,
            # whatever the padding token's id is
            position_offset=2, head_act="gelu", pooler_dropout=None,
        ),
        keys=dict(distance_buckets="relative_attention_num_buckets", type_vocab_size=None),
    ),
    "gte": Family(
        **naming.rotary(
            "gte.", "encoder.layer", "embeddings.LayerNorm",
            {
                "attention.qkv": "attention.qkv_proj", "attention.output": "attention.o_proj",
                "attention_norm": "attn_ln", "feed_forward.up": "mlp.up_gate_proj",
                "feed_forward.down": "mlp.down_proj", "feed_forward_norm": "mlp_ln",
            },
            {**naming.vocabulary_head("lm_head.dense", "lm_head.norm", "lm_head.decoder.bias"), **naming.CLASSIFIERS},
            160000.0,
            vocab_size=250048, attention_probs_dropout_prob=0.0, max_position_embeddings=8192, type_vocab_size=1,
            pad_token_id=1, head_act="gelu", gate="last", mlp_bias=False, down_bias=True,
        ),
        architectures=naming.without(naming.heads("Gte"), "QuestionAnswerer", "MultipleChoice"),
        tied=("lm_head.decoder.weight", "gte.embeddings.position_ids"),
        renamed={"new.": "gte.", "lm_head.layer_norm.": "lm_head.norm."},
        keys=dict(classifier_dropout="classifier_dropout", mlp_dropout="hidden_dropout_prob"),
        expected=dict(
            # of the published directories
            pack_qkv=[True], layer_norm_type=["layer_norm"], logn_attention_scale=[False], logn_attention_clip1=[False],
            position_embedding_type=["rope"],
        ),
    ),
    "nomic_bert": Family(
        **naming.rotary(
            "nomic_bert.", "encoder.layers", "emb_ln",
            {
                "attention.qkv": "attn.Wqkv", "attention.output": "attn.out_proj", "attention_norm": "norm1",
                "feed_forward.gate": "mlp.fc12", "feed_forward.up": "mlp.fc11", "feed_forward.down": "mlp.fc2",
                "feed_forward_norm": "norm2",
            },
            {
                **naming.vocabulary_head(
                    "cls.predictions.transform.dense", "cls.predictions.transform.layer_norm", "cls.predictions.bias"
                ),
                **naming.CLASSIFIERS,
            },
            1000.0,
            vocab_size=30528, hidden_act="silu", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
            max_position_embeddings=2048, gate="apart", attention_bias=False, mlp_bias=False,
            same=dict(
                n_embd="hidden_size", n_head="num_attention_heads", n_layer="num_hidden_layers",
                n_inner="intermediate_size",
            ),
        ),
        architectures=naming.without(naming.heads("NomicBert"), "QuestionAnswerer", "MultipleChoice"),
        tied=("cls.predictions.decoder.weight", "cls.predictions.decoder.bias", "nomic_bert.embeddings.position_ids"),
        keys=dict(classifier_dropout="classifier_dropout"),
        expected=dict(
            # of the published directories
            activation_function=["swiglu"], moe_every_n_layers=[0], prenorm=[False], qkv_proj_bias=[False],
            mlp_fc1_bias=[False], mlp_fc2_bias=[False], rotary_emb_base=[1000], rotary_emb_fraction=[1.0],
            rotary_emb_interleaved=[False], rotary_scaling_factor=[],
        ),
    ),
    "jina_embeddings_v3": Family(
        **naming.rotary(
            "roberta.", "encoder.layers", "emb_ln",
            {
                "attention.qkv": "mixer.Wqkv", "attention.output": "mixer.out_proj", "attention_norm": "norm1",
                "feed_forward.up": "mlp.fc1", "feed_forward.down": "mlp.fc2", "feed_forward_norm": "norm2",
            },
            {**naming.LM_HEAD, **naming.DENSE_CLASSIFIER},
            20000.0,
            vocab_size=250002, hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096,
            max_position_embeddings=8194, type_vocab_size=1, layer_norm_eps=1e-5, pad_token_id=1, head_act="gelu",
            pooler_dropout=None,
        ),
        architectures=naming.without(naming.heads("JinaEmbeddingsV3"), "MultipleChoice"),
        tied=(*naming.LM_HEAD_TIED, "roberta.embeddings.position_ids"),
        keys=dict(classifier_dropout="classifier_dropout"),
        tokenizer="bpe",
    ),
    "modernbert": Family(
        prefix="model.",
        names={
            "encoder.embeddings.word": "model.embeddings.tok_embeddings",
            "encoder.embeddings.norm": "model.embeddings.norm",
            "encoder.blocks.{i}.attention_norm": _MODERNBERT_LAYER + "attn_norm",
            "encoder.blocks.{i}.attention.qkv": _MODERNBERT_LAYER + "attn.Wqkv",
            "encoder.blocks.{i}.attention.output": _MODERNBERT_LAYER + "attn.Wo",
            "encoder.blocks.{i}.feed_forward_norm": _MODERNBERT_LAYER + "mlp_norm",
            "encoder.blocks.{i}.feed_forward.up": _MODERNBERT_LAYER + "mlp.Wi",
            "encoder.blocks.{i}.feed_forward.down": _MODERNBERT_LAYER + "mlp.Wo",
            "encoder.final_norm": "model.final_norm",
            **naming.vocabulary_head("head.dense", "head.norm", "decoder.bias"),
            "pooler.dense": "head.dense",
            "pooler.norm": "head.norm",
            "classifier": "classifier",
        },
        architectures=naming.heads("ModernBert"),
        tokenizer="bpe",
        tied=("decoder.weight",),
        defaults=dict(
            vocab_size=50368, num_hidden_layers=22, intermediate_size=1152, max_position_embeddings=8192,
            layer_norm_eps=1e-5, pad_token_id=50283, type_vocab_size=0, position_biased_input=False, pre_norm=True,
            first_norm=False, gate="first", attention="rotary", hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0, attention_bias=False, mlp_bias=False, norm_bias=False, head_bias=False,
            head_act="gelu", pooler_act="transform", classifier_dropout=0.0,
        ),
        keys=dict(
            hidden_act="hidden_activation", head_act="classifier_activation", hidden_dropout_prob="embedding_dropout",
            attention_probs_dropout_prob="attention_dropout", output_dropout="attention_dropout",
            mlp_dropout="mlp_dropout", layer_norm_eps="norm_eps", norm_bias="norm_bias",
            attention_bias="attention_bias", mlp_bias="mlp_bias", head_bias="classifier_bias",
            head_pooling="classifier_pooling", classifier_dropout="classifier_dropout", qa_dropout="classifier_dropout",
            type_vocab_size=None,
        ),
        expected=dict(decoder_bias=[True], rope_scaling=[]),
        same=dict(head_dim="head_size"),
        read=config_json.read_modernbert,
        write=config_json.write_modernbert,
    ),
}  # fmt: skip


def family(model_type):
    """The row of a model type. Raises ValueError naming the known ones."""
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise ValueError(f"model_type {shown(model_type)}: expected one of {', '.join(FAMILIES)}")
    return FAMILIES[model_type]


def detecting():
    """The model types that are pretrained by detecting replaced tokens, as text."""
    return ", ".join(name for name, row in FAMILIES.items() if row.generator is not None)


def config_of(model_type, **changes):
    """An EncoderConfig of a family, with its defaults."""
    row = family(model_type)
    fields = {**row.defaults, **changes}
    if fields.get("embedding_size") == fields.get("hidden_size") and not row.projects_always:
        fields["embedding_size"] = None
    if row.positions_after_padding:
        fields.setdefault("position_offset", checked("pad_token_id", fields["pad_token_id"], int) + 1)
    return EncoderConfig(model_type=model_type, **fields)


def with_vocabulary(config, vocab_size, pad_token_id):
    """`config` for another tokenizer."""
    offset = pad_token_id + 1 if family(config.model_type).positions_after_padding else config.position_offset
    return config.replace(vocab_size=vocab_size, pad_token_id=pad_token_id, position_offset=offset)


def has_pooler(config):
    """Whether HuggingFace's bare encoder has a pooler."""
    row = FAMILIES[config.model_type]
    return row.names.get("pooler", "").startswith(row.prefix)
