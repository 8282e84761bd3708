"""What runs in place of HuggingFace's models with a loss.

Letters as in `steps.py`; M labelled tokens.
"""

import torch
import torch.nn.functional as F
from torch import nn

from .. import ops
from .stacks import is_static
from .steps import Replacement, by_name, from_file_of, gelu_norm, is_plain, layer_norm, linear_gelu


def _mean(loss_sum, count, num_items):
    """The mean, over a whole step where its number of labels is known; 0 without a label."""
    number = torch.as_tensor(count if num_items is None else num_items, device=loss_sum.device)
    return loss_sum / number.clamp(min=1)


class BertForSequenceClassification(Replacement):
    """A head whose loss is a mean over labels. Under gradient accumulation, HuggingFace's Trainer passes the number of
    labels of the whole step and expects the model to divide by it. Their own heads do not."""

    PARTS = ("loss",)
    WHAT = "loss averaged over the labels of the whole step"

    def forward(self, *args, **kwargs):
        kwargs = by_name(self, args, kwargs)
        num_items, labels = kwargs.pop("num_items_in_batch", None), kwargs.get("labels")
        out = super().forward(**kwargs)
        if labels is None:
            return out
        loss = out[0] if isinstance(out, tuple) else out.loss
        count = (labels != -100).sum().to(loss.device)
        # without labels their mean is NaN
        loss = torch.where(count == 0, 0, loss)
        if num_items is not None:
            loss = _mean(loss * count, count, num_items)
        if isinstance(out, tuple):
            return loss, *out[1:]
        out.loss = loss
        return out


class BertForMaskedLM(Replacement):
    """Head and loss on labelled tokens alone; in training no scores are kept."""

    PARTS = ("loss",)
    WHAT = "head and loss on labelled tokens only"
    OUTPUT, SCORES = "MaskedLMOutput", "logits"
    # of a second head, for pairs of sentences: the argument with the labels, the head, its field in the output
    PAIRS = None, None, None

    @staticmethod
    def refuses(module):
        if getattr(module.config, "is_decoder", False):
            return "it is a decoder"
        return None if _vocabulary_head(module) is not None else "fastbert does not know its head"

    def forward(self, *args, **kwargs):
        kwargs = by_name(self, args, kwargs)
        pairs, pair_head, pair_scores = self.PAIRS
        labels, pair_labels = kwargs.pop("labels", None), kwargs.pop(pairs, None)
        num_items = kwargs.pop("num_items_in_batch", None)
        if labels is None or (pairs and pair_labels is None):
            return super().forward(**kwargs)
        return_dict = kwargs.pop("return_dict", None)
        return_dict = self.config.return_dict if return_dict is None else return_dict
        if self.training and self.fastbert_options.logits == "evaluation":
            out = self.base_model(**kwargs, return_dict=True)
            loss = self._labelled_loss(out[0], labels, num_items)
            fields = dict(hidden_states=out.get("hidden_states"), attentions=out.get("attentions"))
            if pairs:
                fields[pair_scores] = self.get_submodule(pair_head)(out[1])
            cls = from_file_of(self, self.OUTPUT)
        else:
            out = super().forward(**kwargs, return_dict=True)
            scores = out[self.SCORES].flatten(0, -2)
            flat = labels.to(scores.device).flatten()
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

    def _labelled_loss(self, hidden, labels, num_items):
        """The mean loss of hidden states [B, S, D], head included."""
        labels, hidden = labels.to(hidden.device).flatten(), hidden.flatten(0, -2)
        if not is_static():
            picks = (labels != -100).nonzero()[:, 0]
            labels, hidden = labels[picks], hidden[picks]
        transform, decoder = _vocabulary_head(self)
        hidden = transform(hidden)
        if is_plain(decoder, nn.Linear):
            loss_sum = ops.masked_cross_entropy(hidden, decoder.weight, decoder.bias, labels)[0]
        else:
            loss_sum = _cross_entropy(decoder(hidden), labels)
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


def _cross_entropy(scores, labels):
    """The sum, in fp32 or wider."""
    return F.cross_entropy(scores.to(torch.promote_types(scores.dtype, torch.float32)), labels, reduction="sum")


def _vocabulary_head(model):
    """(the transform of a masked-LM head, its last linear layer); None for a head that is not known."""
    find = next((_VOCABULARY_HEADS[c.__name__] for c in type(model).__mro__ if c.__name__ in _VOCABULARY_HEADS), None)
    try:
        return None if find is None else find(model)
    except AttributeError:
        return None


def _lm_head(model):
    head = model.lm_head
    return lambda x: gelu_norm(head.dense, "none", head.layer_norm, x), head.decoder


def _bert_head(model):
    return model.cls.predictions.transform, model.cls.predictions.decoder


def _albert_head(model):
    head = model.predictions
    return lambda x: head.LayerNorm(linear_gelu(head.dense, head.activation, x)), head.decoder


def _distilbert_head(model):
    return (
        lambda x: layer_norm(model.vocab_layer_norm, linear_gelu(model.vocab_transform, model.activation, x)),
        model.vocab_projector,
    )


_VOCABULARY_HEADS = {
    "BertForMaskedLM": _bert_head,
    "BertForPreTraining": _bert_head,
    "RobertaForMaskedLM": _lm_head,
    "XLMRobertaForMaskedLM": _lm_head,
    "MPNetForMaskedLM": _lm_head,
    "AlbertForMaskedLM": _albert_head,
    "AlbertForPreTraining": _albert_head,
    "DistilBertForMaskedLM": _distilbert_head,
    "ElectraForMaskedLM": lambda model: (model.generator_predictions, model.generator_lm_head),
    "DebertaForMaskedLM": _bert_head,
    "DebertaV2ForMaskedLM": _bert_head,
    "ModernBertForMaskedLM": lambda model: (model.head, model.decoder),
}
