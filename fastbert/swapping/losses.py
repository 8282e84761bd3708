"""What runs in place of HuggingFace's models with a loss.

Letters as in `steps.py`; M labelled tokens.
"""

import torch
import torch.nn.functional as F
from torch import nn

from .. import ops
from .flattened import refuse_flattened
from .stacks import is_static
from .steps import HOOKS, Replacement, by_name, from_file_of, gelu_norm, is_plain, layer_norm, linear_gelu, original
from .tokenwise import own_code


def _mean(loss_sum, count, num_items):
    """The mean, over a whole step where its number of labels is known; 0 without a label."""
    number = torch.as_tensor(count if num_items is None else num_items, device=loss_sum.device)
    return loss_sum / number.clamp(min=1)


def _check_places(labels, mask):
    """Refuse labels of tokens where a stack returns zeros."""
    if mask is not None and mask.shape == labels.shape:
        ops.check(
            # a negative one is refused by its value, with the others
            (labels < 0).to(mask.device) | (mask != 0),
            "labels hold numbers at padding: expected -100 there, since hidden states of padding are 0",
        )


class BertForSequenceClassification(Replacement):
    """A head whose loss is a mean over labels. Under gradient accumulation, HuggingFace's Trainer passes the number of
    labels of the whole step and expects the model to divide by it. Their own heads do not."""

    RUNS = {"loss": "loss averaged over the labels of the whole step"}

    def forward(self, *args, **kwargs):
        kwargs = by_name(self, args, kwargs)
        refuse_flattened(self, kwargs)
        num_items, labels = kwargs.pop("num_items_in_batch", None), kwargs.get("labels")
        out = super().forward(**kwargs)
        if labels is None:
            return out
        loss, scores = out[:2] if isinstance(out, tuple) else (out.loss, out.logits)
        if scores.shape[:-1] == labels.shape and scores.dim() == 3:
            _check_places(labels, kwargs.get("attention_mask"))
        count = (labels != -100).sum().to(loss.device)
        if not labels.is_floating_point():
            # without labels their mean is NaN
            loss = torch.where(count == 0, 0, loss)
        if num_items is not None:
            loss = _mean(loss * count, count, num_items)
        if isinstance(out, tuple):
            return loss, *out[1:]
        out.loss = loss
        return out


class ElectraForPreTraining(BertForSequenceClassification):
    """The discriminator. Its loss is the mean over real tokens, whatever the labels of padding say.

    Labels other than -100 at padding are refused in a step of several micro-batches. As one batch, the step's loss is
    a sum over its real tokens, divided by their number. num_items_in_batch counts labels, those at padding too, and a
    micro-batch cannot know how many of the others' labels are at padding.
    """

    def forward(self, *args, **kwargs):
        kwargs = by_name(self, args, kwargs)
        labels, mask, number = (kwargs.get(name) for name in ("labels", "attention_mask", "num_items_in_batch"))
        if number is not None and labels is not None and mask is not None and mask.shape == labels.shape:
            is_labelled = labels != -100
            # in a step of one batch the number counts padding as `count` does, and both cancel
            is_whole = torch.as_tensor(number, device=labels.device) == is_labelled.sum()
            ops.check(
                ~is_labelled | (mask == 1) | is_whole,
                "labels hold numbers at padding, in a step of several batches: expected -100 there, since "
                "num_items_in_batch counts labels",
            )
        return super().forward(**kwargs)


class BertForMaskedLM(Replacement):
    """Head and loss on labelled tokens alone; in training no scores are kept."""

    RUNS = {"loss": "head and loss on labelled tokens only"}
    OUTPUT, SCORES = "MaskedLMOutput", "logits"
    # of a second head, for pairs of sentences: the argument with the labels, the head, its field in the output
    PAIRS = None, None, None

    @staticmethod
    def refuses(module):
        if getattr(module.config, "is_decoder", False):
            return "it is a decoder"
        return _own_head(module, hooks=False)

    def forward(self, *args, **kwargs):
        kwargs = by_name(self, args, kwargs)
        refuse_flattened(self, kwargs)
        if _has_own_loss(self):
            return super().forward(**kwargs)
        pairs, pair_head, pair_scores = self.PAIRS
        labels, pair_labels = kwargs.pop("labels", None), kwargs.pop(pairs, None)
        num_items = kwargs.pop("num_items_in_batch", None)
        if labels is None or (pairs and pair_labels is None):
            return super().forward(**kwargs)
        _check_places(labels, kwargs.get("attention_mask"))
        return_dict = kwargs.pop("return_dict", None)
        return_dict = self.config.return_dict if return_dict is None else return_dict
        head = _vocabulary_head(self) if self.training and self.fastbert_options.logits == "evaluation" else None
        if head is not None:
            out = self.base_model(**kwargs, return_dict=True)
            loss = self._labelled_loss(head, out[0], labels, num_items)
            fields = dict(hidden_states=out.get("hidden_states"), attentions=out.get("attentions"))
            if pairs:
                fields[pair_scores] = self.get_submodule(pair_head)(out[1])
            cls = from_file_of(self, self.OUTPUT)
        else:
            out = super().forward(**kwargs, return_dict=True)
            scores, flat = _rows(out[self.SCORES], labels)
            picks = (flat != -100).nonzero()[:, 0]
            loss = _mean(_cross_entropy(scores[picks], flat[picks]), len(picks), num_items)
            fields, cls = dict(out), type(out)
        if pairs:
            scores = fields[pair_scores].view(-1, 2)
            pair_labels = pair_labels.to(scores.device).flatten()
            pair_loss = _mean(_cross_entropy(scores, pair_labels), (pair_labels != -100).sum(), None)
            if num_items is not None:
                pair_loss = _mean(pair_loss * (labels != -100).sum().to(scores.device), None, num_items)
            loss = loss + pair_loss
        out = cls(**{**fields, "loss": loss})
        return out if return_dict else out.to_tuple()

    @staticmethod
    def _labelled_loss(head, hidden, labels, num_items):
        """The mean loss of hidden states [B, S, D] through a head, see `_vocabulary_head`."""
        hidden, labels = _rows(hidden, labels)
        if not is_static():
            picks = (labels != -100).nonzero()[:, 0]
            labels, hidden = labels[picks], hidden[picks]
        transform, decoder, *bias = head
        hidden = transform(hidden)
        if is_plain(decoder, nn.Linear):
            (bias,) = bias or [decoder.bias]
            loss_sum = ops.masked_cross_entropy(hidden, decoder.weight, bias, labels)[0]
        else:
            loss_sum = _cross_entropy(sum(bias, decoder(hidden)), labels)
        return _mean(loss_sum, (labels != -100).sum(), num_items)


class BertForPreTraining(BertForMaskedLM):
    """Both pretraining heads: masked language model, and sentence pairs from the pooler. There is a loss only with both
    kinds of label, as in the original. In a step of several micro-batches, the pair loss of each counts in proportion
    to its masked tokens."""

    OUTPUT, SCORES = "BertForPreTrainingOutput", "prediction_logits"
    PAIRS = "next_sentence_label", "cls.seq_relationship", "seq_relationship_logits"


class AlbertForPreTraining(BertForPreTraining):
    OUTPUT = "AlbertForPreTrainingOutput"
    PAIRS = "sentence_order_label", "sop_classifier", "sop_logits"


def _rows(x, labels):
    """(x [B, S, D] as rows, their labels)."""
    if labels.numel() != x.shape[:-1].numel():
        raise ValueError(f"labels has shape {tuple(labels.shape)}: expected {tuple(x.shape[:-1])}")
    return x.flatten(0, -2), labels.to(x.device).flatten()


def _cross_entropy(scores, labels):
    """The sum, in fp32 or wider."""
    ops.check_ids("labels", labels, scores.shape[-1], -100)
    return F.cross_entropy(scores.to(torch.promote_types(scores.dtype, torch.float32)), labels, reduction="sum")


def _has_own_loss(model):
    """Whether a user has set a loss: `loss_function`, the type of the loss, DistilBERT's module for it."""
    loss = getattr(model, "mlm_loss_fct", None)
    owner = next(cls for cls in type(model).__mro__ if "loss_function" in vars(cls))
    return (
        "_loss_function" in vars(model)
        or owner.__module__ != "transformers.modeling_utils"
        or getattr(model, "loss_type", None) not in (None, "ForMaskedLM")
        or (loss is not None and not _is_usual(loss))
    )


def _is_usual(loss):
    settings = [getattr(loss, name, None) for name in ("weight", "ignore_index", "reduction", "label_smoothing")]
    return is_plain(loss, nn.CrossEntropyLoss) and settings == [None, -100, "mean", 0.0]


def _vocabulary_head(model):
    """(the transform of a masked-LM head, its last linear layer, and a bias beside that, if any). None where the model
    must be called as a whole: there is a user's code on the head or a hook before it."""
    base, cls = vars(model.base_model), original(model.base_model)
    # a user's code may expect the arguments where the original puts them
    is_own = "forward" in base or not cls.forward.__module__.startswith("transformers.")
    if is_own or any(base[kind] for kind in HOOKS) or nn.modules.module._has_any_global_hook():
        return None
    return None if _own_head(model) else _row(model)[1](model)


def _own_head(model, hooks=True):
    """Why a masked-LM head cannot run on labelled tokens alone, else None. hooks: whether a hook is a reason."""
    parts, _ = _row(model)
    if not set(parts) <= model._modules.keys():
        return "fastbert does not know its head"
    own = own_code(model, hooks, parts)
    return own and "its head: " + " ".join(own)


def _row(model):
    return next(_VOCABULARY_HEADS[c.__name__] for c in type(model).__mro__ if c.__name__ in _VOCABULARY_HEADS)


def _bert_head(model):
    return model.cls.predictions.transform, model.cls.predictions.decoder


def _electra_head(model):
    return model.generator_predictions, model.generator_lm_head


def _bare_head(model):
    return lambda x: x, model.lm_head


def _modernbert_head(model):
    return model.head, model.decoder


def _roberta_head(model):
    head = model.lm_head
    return lambda x: gelu_norm(head.dense, F.gelu, head.layer_norm, x), head.decoder


def _esm_head(model):
    return *_roberta_head(model), model.lm_head.bias


def _albert_head(model):
    head = model.predictions
    return lambda x: head.LayerNorm(linear_gelu(head.dense, head.activation, x)), head.decoder


def _distilbert_head(model):
    return (
        lambda x: layer_norm(model.vocab_layer_norm, linear_gelu(model.vocab_transform, model.activation, x)),
        model.vocab_projector,
    )


_DISTILBERT = "vocab_transform", "activation", "vocab_layer_norm", "vocab_projector"
# class -> the modules of its head, a function that finds transform and last layer
_VOCABULARY_HEADS = {
    "AlbertForMaskedLM": (("predictions",), _albert_head),
    "AlbertForPreTraining": (("predictions",), _albert_head),
    "BertForMaskedLM": (("cls",), _bert_head),
    "BertForPreTraining": (("cls",), _bert_head),
    "CamembertForMaskedLM": (("lm_head",), _roberta_head),
    "Data2VecTextForMaskedLM": (("lm_head",), _roberta_head),
    "DebertaForMaskedLM": (("cls",), _bert_head),
    "DebertaV2ForMaskedLM": (("cls",), _bert_head),
    "DistilBertForMaskedLM": (_DISTILBERT, _distilbert_head),
    "ElectraForMaskedLM": (("generator_predictions", "generator_lm_head"), _electra_head),
    "ErnieForMaskedLM": (("cls",), _bert_head),
    "ErnieForPreTraining": (("cls",), _bert_head),
    "EsmForMaskedLM": (("lm_head",), _esm_head),
    "EuroBertForMaskedLM": (("lm_head",), _bare_head),
    "GteForMaskedLM": (("lm_head",), _roberta_head),
    "JinaEmbeddingsV3ForMaskedLM": (("lm_head",), _roberta_head),
    "MegatronBertForMaskedLM": (("cls",), _bert_head),
    "MegatronBertForPreTraining": (("cls",), _bert_head),
    "ModernBertForMaskedLM": (("head", "decoder"), _modernbert_head),
    "MPNetForMaskedLM": (("lm_head",), _roberta_head),
    "NomicBertForMaskedLM": (("cls",), _bert_head),
    "RoCBertForMaskedLM": (("cls",), _bert_head),
    "RobertaForMaskedLM": (("lm_head",), _roberta_head),
    "RobertaPreLayerNormForMaskedLM": (("lm_head",), _roberta_head),
    "XLMRobertaXLForMaskedLM": (("lm_head",), _roberta_head),
    "XLMRobertaForMaskedLM": (("lm_head",), _roberta_head),
}
