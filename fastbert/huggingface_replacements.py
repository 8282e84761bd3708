"""What runs in place of HuggingFace's modules, see `swapping.py`: their own parameters under their own names, our ops.

Letters as in `replacements.py`; M picked tokens.
"""

import functools
import inspect
import sys

import torch
import torch.nn.functional as F
from torch import nn

from . import ops
from .replacements import (
    Packed,
    Replacement,
    attend,
    dropping,
    fresh_seed,
    gelu,
    gelu_form,
    is_plain,
    is_static,
    is_watched,
    key_mask,
    layer_norm,
    linear,
    linear_gelu,
    original,
    packing,
    refuses_activation,
)

# ------------------------------------------------------------------------------------------------------- attention


def _rows(x):
    """[B, S, D] -> [B * S, D]."""
    return x.flatten(0, 1)


class SelfAttention(Replacement):
    """BERT's, and what its copies call the same."""

    PARTS = ("attention",)
    WHAT = "fused attention"
    QUERY, KEY, VALUE = "query", "key", "value"

    @staticmethod
    def refuses(module):
        if getattr(module, "is_decoder", False) or getattr(module, "is_causal", False):
            return "a decoder's attention is causal"
        return None

    def forward(self, hidden_states, attention_mask=None, *args, **kwargs):
        if not isinstance(attention_mask, Packed):
            return super().forward(hidden_states, attention_mask, *args, **kwargs)
        return self._attended(hidden_states, attention_mask), None

    def _attended(self, hidden_states, packed):
        q, k, v = (_rows(linear(getattr(self, name), hidden_states)) for name in (self.QUERY, self.KEY, self.VALUE))
        heads = q.shape[-1] // self.attention_head_size
        out = attend(packed, q, k, v, heads, scale=self.scaling, **dropping(self._dropout(), q.device))
        return out.view(*hidden_states.shape[:-1], -1)

    def _dropout(self):
        return self.dropout


class AlbertAttention(SelfAttention):
    """The same with the output projection and the norm behind it."""

    WHAT = "fused attention, add and norm"

    def forward(self, hidden_states, attention_mask=None, *args, **kwargs):
        if not isinstance(attention_mask, Packed):
            return super().forward(hidden_states, attention_mask, *args, **kwargs)
        out = linear(self.dense, self._attended(hidden_states, attention_mask))
        return layer_norm(self.LayerNorm, out, hidden_states, self.output_dropout), None

    def _dropout(self):
        return self.attention_dropout


class DistilBertAttention(SelfAttention):
    QUERY, KEY, VALUE = "q_lin", "k_lin", "v_lin"

    def forward(self, hidden_states, attention_mask=None, *args, **kwargs):
        if not isinstance(attention_mask, Packed):
            return super().forward(hidden_states, attention_mask, *args, **kwargs)
        return linear(self.out_lin, self._attended(hidden_states, attention_mask)), None


class MPNetAttention(Replacement):
    """With a number for each distance: `position_bias` is then the `bias` of `ops.biased_attention`."""

    PARTS = ("attention",)
    WHAT = "fused attention with distances"

    def forward(self, hidden_states, attention_mask=None, position_bias=None, *args, **kwargs):
        if not isinstance(attention_mask, Packed):
            return super().forward(hidden_states, attention_mask, position_bias, *args, **kwargs)
        q, k, v = (_rows(linear(module, hidden_states)) for module in (self.q, self.k, self.v))
        op = functools.partial(_biased, bias=position_bias)
        out = attend(attention_mask, q, k, v, self.num_attention_heads, op, **dropping(self.dropout, q.device))
        return (linear(self.o, out.view(*hidden_states.shape[:-1], -1)),)


def _biased(q, k, v, cu_seqlens, max_seqlen, *, bias, **options):
    return ops.biased_attention(q, k, v, bias, cu_seqlens, max_seqlen, **options)


def _disentangled(q, k, v, cu_seqlens, max_seqlen, *, positions, **options):
    return ops.disentangled_attention(q, k, v, *positions, cu_seqlens, max_seqlen, **options)


class DebertaV2Attention(Replacement):
    PARTS = ("attention",)
    WHAT = "fused disentangled attention"

    @staticmethod
    def refuses(module):
        if not module.relative_attention or not set(module.pos_att_type) & {"c2p", "p2c"}:
            return "it has no relative positions"
        if set(module.pos_att_type) - {"c2p", "p2c"}:
            return f"pos_att_type {module.pos_att_type} has more than c2p and p2c"
        return None

    def forward(
        self, hidden_states, attention_mask, output_attentions=False, query_states=None, relative_pos=None,
        rel_embeddings=None,
    ):  # fmt: skip
        if not isinstance(attention_mask, Packed):
            return super().forward(
                hidden_states, attention_mask, output_attentions, query_states, relative_pos, rel_embeddings
            )
        q, k, v = self._projected(hidden_states)
        relative = self.pos_dropout(rel_embeddings)
        positions = [
            linear(getattr(self, name), relative).view(len(relative), self.num_attention_heads, -1)
            if term in self.pos_att_type
            else None
            for term, name in zip(("c2p", "p2c"), self._position_projections())
        ]
        out = attend(
            attention_mask, q, k, v, self.num_attention_heads, functools.partial(_disentangled, positions=positions),
            position_buckets=max(getattr(self, "position_buckets", 0), 0),
            max_relative_positions=self.max_relative_positions, **dropping(self.dropout, q.device),
        )  # fmt: skip
        return out.view_as(hidden_states), None

    def _projected(self, hidden_states):
        """Queries, keys and values, [N, D] each."""
        return (_rows(linear(module, hidden_states)) for module in (self.query_proj, self.key_proj, self.value_proj))

    def _position_projections(self):
        """Which module makes the keys of positions, which the queries."""
        return ("key_proj", "query_proj") if self.share_att_key else ("pos_key_proj", "pos_query_proj")


class DebertaAttention(DebertaV2Attention):
    """DeBERTa v1's: each head's query, key and value stand side by side in one projection."""

    @staticmethod
    def refuses(module):
        return "it has talking heads" if module.talking_head else DebertaV2Attention.refuses(module)

    def _projected(self, hidden_states):
        qkv = linear(self.in_proj, hidden_states)
        q, k, v = qkv.view(hidden_states.shape[:2].numel(), self.num_attention_heads, 3, -1).unbind(2)
        return q.flatten(1) + self.q_bias, k.flatten(1), v.flatten(1) + self.v_bias

    def _position_projections(self):
        return "pos_proj", "pos_q_proj"


class ModernBertAttention(Replacement):
    """With rotary positions, in some layers within a window."""

    PARTS = ("attention",)
    WHAT = "fused attention, rotary"

    def forward(self, hidden_states, position_embeddings=None, attention_mask=None, **kwargs):
        if not isinstance(attention_mask, Packed):
            return super().forward(hidden_states, position_embeddings, attention_mask, **kwargs)
        B, S, D = hidden_states.shape
        qkv = linear(self.Wqkv, hidden_states).view(B, S, 3, -1, self.head_dim)
        cos, sin = (table[:, :, None, None] for table in position_embeddings)
        turning = qkv[:, :, :2].float()
        a, b = turning.chunk(2, -1)
        q, k = (turning * cos + torch.cat((-b, a), -1) * sin).to(qkv.dtype).unbind(2)
        dropout_p = self.attention_dropout if self.training else 0.0
        options = dict(dropout_p=dropout_p, seed=fresh_seed(q.device)) if dropout_p else {}
        # their bound leaves out the last token that the window holds, to suit flash-attention
        window = None if self.sliding_window is None else self.sliding_window - 1
        q, k, v = (t.reshape(B * S, -1) for t in (q, k, qkv[:, :, 2]))
        out = attend(attention_mask, q, k, v, D // self.head_dim, scale=self.head_dim**-0.5, window=window, **options)
        return self.out_drop(linear(self.Wo, out.view(B, S, -1))), None


# ------------------------------------------------------------------------------------------- norms and feed-forward


class AddNorm(Replacement):
    """LayerNorm(dropout(dense(x)) + residual)."""

    PARTS = ("layer_norm",)
    WHAT = "linear, fused dropout, add and norm"

    def forward(self, hidden_states, input_tensor):
        return layer_norm(self.LayerNorm, linear(self.dense, hidden_states), input_tensor, self.dropout)


class MPNetAttentionNorm(Replacement):
    PARTS = ("layer_norm",)
    WHAT = "fused dropout, add and norm"

    def forward(self, hidden_states, attention_mask=None, position_bias=None, output_attentions=False, **kwargs):
        attended, *rest = self.attn(hidden_states, attention_mask, position_bias, output_attentions=output_attentions)
        return layer_norm(self.LayerNorm, attended, hidden_states, self.dropout), *rest


class DebertaLayerNorm(Replacement):
    PARTS = ("layer_norm",)
    WHAT = "fused norm"

    def forward(self, hidden_states):
        rows = hidden_states.reshape(-1, hidden_states.shape[-1])
        return ops.layer_norm(rows, self.weight, self.bias, eps=self.variance_epsilon).view(hidden_states.shape)


class Intermediate(Replacement):
    """gelu(dense(x))."""

    PARTS = ("gelu",)
    WHAT = "linear, fused bias and GELU"
    refuses = refuses_activation("intermediate_act_fn")

    def forward(self, hidden_states):
        return linear_gelu(self.dense, self.intermediate_act_fn, hidden_states)


class DistilBertFeedForward(Replacement):
    PARTS = ("gelu",)
    WHAT = "linear, fused bias and GELU"
    refuses = refuses_activation("activation")

    def ff_chunk(self, input):
        return self.dropout(linear(self.lin2, linear_gelu(self.lin1, self.activation, input)))

    def forward(self, input):
        return super().forward(input)


class DistilBertBlock(Replacement):
    PARTS = ("layer_norm",)
    WHAT = "fused add and norm"

    def forward(self, hidden_states, attention_mask=None, **kwargs):
        attended, _ = self.attention(hidden_states, attention_mask=attention_mask, **kwargs)
        x = layer_norm(self.sa_layer_norm, attended, hidden_states)
        return layer_norm(self.output_layer_norm, self.ffn(x), x)


class AlbertBlock(Replacement):
    PARTS = ("layer_norm", "gelu")
    WHAT = "linear, fused bias and GELU, add and norm"
    refuses = refuses_activation("activation")

    def forward(self, hidden_states, attention_mask=None, **kwargs):
        if self.chunk_size_feed_forward:
            return super().forward(hidden_states, attention_mask, **kwargs)
        x, _ = self.attention(hidden_states, attention_mask, **kwargs)
        if self.fastbert_options.gelu:
            y = linear(self.ffn_output, linear_gelu(self.ffn, self.activation, x))
        else:
            y = self.ff_chunk(x)
        return (
            layer_norm(self.full_layer_layer_norm, y, x)
            if self.fastbert_options.layer_norm
            else self.full_layer_layer_norm(y + x)
        )


class ModernBertFeedForward(Replacement):
    PARTS = ("gelu",)
    WHAT = "linear, fused GELU"
    refuses = refuses_activation("act")

    def forward(self, hidden_states):
        x, gate = linear(self.Wi, hidden_states).chunk(2, -1)
        x = gelu(x, gelu_form(self.act)) * gate
        return linear(self.Wo, self.drop(x))


class Transform(Replacement):
    """LayerNorm(gelu(dense(x))): what a masked-LM head does first."""

    PARTS = ("gelu", "layer_norm")
    WHAT = "linear, fused bias, GELU and norm"
    refuses = refuses_activation("transform_act_fn")

    def forward(self, hidden_states):
        if self.fastbert_options.gelu and self.fastbert_options.layer_norm:
            return gelu_norm(self.dense, gelu_form(self.transform_act_fn), self.LayerNorm, hidden_states)
        if self.fastbert_options.gelu:
            return self.LayerNorm(linear_gelu(self.dense, self.transform_act_fn, hidden_states))
        return layer_norm(self.LayerNorm, self.transform_act_fn(self.dense(hidden_states)))


def gelu_norm(dense, approximate, norm, x):
    """LayerNorm(gelu(dense(x))), in one pass after the product where the modules allow it."""
    if not is_plain(dense, nn.Linear) or not is_plain(norm, nn.LayerNorm):
        return layer_norm(norm, gelu(linear(dense, x), approximate))
    rows = x.reshape(-1, x.shape[-1])
    y = ops.gelu_layer_norm(
        ops.linear(rows, dense.weight), dense.bias, norm.weight, norm.bias, approximate=approximate, eps=norm.eps
    )
    return y.view(*x.shape[:-1], y.shape[-1])


# ---------------------------------------------------------------------------------------------------------- stacks


def _asks(stack, kwargs, name):
    """Whether a call or the model's config asks for output_hidden_states or output_attentions."""
    value = kwargs.get(name)
    return bool(getattr(_config(stack), name, False) if value is None else value)


def _config(stack):
    # DistilBERT's stack has none itself, but its attention does
    return next(config for module in stack.modules() if (config := vars(module).get("config")) is not None)


class Stack(Replacement):
    """The loop over layers, on real tokens alone."""

    PARTS = ("attention",)
    WHAT = "the layers without padding (asked for attentions: as before)"
    BY_DISTANCE = False

    @staticmethod
    def refuses(module):
        config = _config(module)
        if getattr(config, "is_decoder", False) or getattr(config, "add_cross_attention", False):
            return "a decoder attends causally, or to another model"
        return None

    @staticmethod
    def yields():
        return is_static()

    def as_ever(self, *args, **kwargs):
        out = super().as_ever(*args, **kwargs)
        kwargs = _named(self, args, kwargs)
        if kwargs.get("cu_seq_lens_q") is not None or not self._encodes(kwargs):
            return out
        kept, says_all = key_mask(kwargs.get("attention_mask"), *out[0].shape[:2])
        if kept is None:
            return out
        # as in packed batches; but not in a sequence with padding at its first place, which a model may read
        padding = ~kept & (kept[:, :1] | ~kept.any(1, keepdim=True)) & kept.any()
        if says_all is not True:
            padding = padding & says_all
        return self._blanked(out, lambda x: x.masked_fill(padding[..., None], 0))

    @staticmethod
    def _blanked(out, blank):
        return _with_last(out, blank(out[0]))

    def forward(self, hidden_states, attention_mask=None, *args, **kwargs):
        packed = self._packing(hidden_states, attention_mask, kwargs)
        if packed is None:
            return self.as_ever(hidden_states, attention_mask, *args, **kwargs)
        if not packed.inside:
            out = super().forward(hidden_states, packed, *args, **kwargs)
            return _with_last(out, packed.blank(out[0]))
        out = super().forward(packed.pack(hidden_states)[None], packed, *args, **kwargs)
        return _with_last(out, packed.unpack(out[0][0]))

    @staticmethod
    def _encodes(kwargs):
        """Whether a call is no decoder's."""
        given = any(kwargs.get(name) is not None for name in ("encoder_hidden_states", "past_key_values"))
        return not given and not kwargs.get("use_cache")

    def _packing(self, hidden_states, attention_mask, kwargs):
        """The Packed to call the layers with, None where they must be called as ever."""
        if not self._encodes(kwargs) or _asks(self, kwargs, "output_attentions"):
            return None
        seen = _asks(self, kwargs, "output_hidden_states") or is_watched(self)
        # feed-forwards in chunks need padded lengths
        inside = self.fastbert_options.unpad and not seen and not getattr(_config(self), "chunk_size_feed_forward", 0)
        packed = packing(hidden_states, attention_mask, kwargs, inside=inside, by_distance=self.BY_DISTANCE)
        # what is seen of a sequence may not depend on whether another one in its batch has gaps
        return None if seen and self.BY_DISTANCE and packed is not None and packed.indices is not None else packed


def _with_last(out, last, between=lambda x: x):
    """What a stack returns, with other hidden states of its last layer, and `between` of those before it."""

    def seen(states):
        # the first are those that came in
        return *states[:-1][:1], *map(between, states[1:-1]), last

    if last is out[0]:
        return out
    if isinstance(out, tuple):
        first, *rest = out
        return last, *(seen(x) if isinstance(x, tuple) and x and x[-1] is first else x for x in rest)
    if out.hidden_states and out.hidden_states[-1] is out.last_hidden_state:
        out.hidden_states = seen(out.hidden_states)
    out.last_hidden_state = last
    return out


class MPNetStack(Stack):
    BY_DISTANCE = True

    def forward(
        self, hidden_states, attention_mask=None, output_attentions=False, output_hidden_states=False,
        return_dict=False, **kwargs,
    ):  # fmt: skip
        asked = dict(output_attentions=output_attentions, output_hidden_states=output_hidden_states)
        packed = self._packing(hidden_states, attention_mask, {**kwargs, **asked})
        if packed is None:
            return self.as_ever(hidden_states, attention_mask, **asked, return_dict=return_dict, **kwargs)
        # row max_seqlen + i - j is of a query at i and a key at j
        distance = torch.arange(-packed.max_seqlen, packed.max_seqlen, device=hidden_states.device)
        buckets = F.one_hot(self.relative_position_bucket(-distance), self.relative_attention_bias.num_embeddings)
        bias = buckets.to(hidden_states.dtype) @ self.relative_attention_bias.weight.to(hidden_states.dtype)
        return _run(self, hidden_states, packed, lambda layer, x: layer(x, packed, bias)[0], asked, return_dict)


def _run(stack, hidden_states, packed, call, asked, return_dict, after_first=None):
    """A loop over `stack.layer` for the families whose own loop reads the mask; `call(layer, x)` runs one."""
    x = packed.pack(hidden_states)[None] if packed.inside else hidden_states
    restored = (lambda x: packed.unpack(x[0])) if packed.inside else packed.blank
    states = [hidden_states]
    for i, layer in enumerate(stack.layer):
        x = call(layer, x)
        if i == 0 and after_first is not None:
            padded = after_first(hidden_states, restored(x))
            x = packed.pack(padded)[None] if packed.inside else padded
        if asked["output_hidden_states"] or i + 1 == len(stack.layer):
            states.append(restored(x))
    every = tuple(states) if asked["output_hidden_states"] else None
    if not return_dict:
        return (states[-1],) if every is None else (states[-1], every)
    return _output_class(stack)(last_hidden_state=states[-1], hidden_states=every)


def _output_class(stack):
    return _beside(stack, "BaseModelOutput")


def _beside(module, name):
    """What stands under a name in the file of a module's class, or of the first that it derives from and has it."""
    files = (sys.modules.get(cls.__module__) for cls in type(module).__mro__)
    return next(getattr(file, name) for file in files if hasattr(file, name))


class DebertaStack(Stack):
    BY_DISTANCE = True

    @staticmethod
    def refuses(module):
        return None if module.relative_attention else "it has no relative positions"

    @staticmethod
    def _blanked(out, blank):
        # every state of it is seen, and they come from its loop
        return _with_last(out, blank(out[0]), blank)

    def forward(
        self, hidden_states, attention_mask, output_hidden_states=True, output_attentions=False, query_states=None,
        relative_pos=None, return_dict=True,
    ):  # fmt: skip
        given = query_states is not None or relative_pos is not None or not torch.is_tensor(hidden_states)
        packed = None
        if not given and not output_attentions and attention_mask.dim() == 2:
            inside = self.fastbert_options.unpad and not is_watched(self)
            packed = packing(hidden_states, attention_mask, {}, inside=inside, by_distance=True)
        if packed is None:
            return self.as_ever(
                hidden_states, attention_mask, output_hidden_states, output_attentions, query_states, relative_pos,
                return_dict,
            )  # fmt: skip
        relative = self.get_rel_embedding()
        conv = getattr(self, "conv", None)
        return _run(
            self, hidden_states, packed, lambda layer, x: layer(x, packed, rel_embeddings=relative)[0],
            dict(output_hidden_states=output_hidden_states), return_dict,
            after_first=None if conv is None else lambda first, x: conv(first, x, attention_mask),
        )  # fmt: skip


class ModernBertStack(Stack):
    """ModernBERT's model is its own stack: the padding goes before the embeddings."""

    BY_DISTANCE = True

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, inputs_embeds=None, **kwargs):
        x = input_ids if input_ids is not None else inputs_embeds
        packed = None
        if x is not None and (input_ids is None or inputs_embeds is None) and not isinstance(attention_mask, dict):
            packed = self._packing(x, attention_mask, kwargs)
        if packed is None:
            return self.as_ever(input_ids, attention_mask, position_ids, inputs_embeds, **kwargs)
        B, S = packed.shape
        if position_ids is None:
            position_ids = torch.arange(S, device=x.device)[None]
        if packed.inside:
            position_ids = packed.pack(position_ids.expand(B, S))[None]
            x = packed.pack(x)[None]
        return_dict = kwargs.pop("return_dict", None)
        out = super(Stack, self).forward(
            x if input_ids is not None else None, dict.fromkeys(("full_attention", "sliding_attention"), packed),
            position_ids, x if input_ids is None else None, **kwargs,
        )  # fmt: skip
        out = _with_last(out, packed.unpack(out[0][0]) if packed.inside else packed.blank(out[0]))
        return out if (self.config.return_dict if return_dict is None else return_dict) else out.to_tuple()


# ---------------------------------------------------------------------------------------------------- heads and losses


def _named(self, args, kwargs):
    """All arguments of a call of a model's forward by their names."""
    names = list(inspect.signature(original(self).forward).parameters)[1:]
    return {**dict(zip(names, args)), **kwargs}


def _mean(loss_sum, count, num_items):
    """The mean, over the whole of a step where its number of labels is known; 0 where there is no label."""
    number = torch.as_tensor(count if num_items is None else num_items, device=loss_sum.device)
    return loss_sum / number.clamp(min=1)


class LossHead(Replacement):
    """A head whose loss is a mean over labels. Under gradient accumulation and several processes HuggingFace's Trainer
    hands the number of labels of the whole step to the model and expects it to divide by that; theirs do not."""

    PARTS = ("loss",)
    WHAT = "loss by the number of labels of the whole step"

    def forward(self, *args, **kwargs):
        kwargs = _named(self, args, kwargs)
        num_items, labels = kwargs.pop("num_items_in_batch", None), kwargs.get("labels")
        out = super().forward(**kwargs)
        if labels is None:
            return out
        loss = out[0] if isinstance(out, tuple) else out.loss
        count = (labels != -100).sum().to(loss.device)
        # their mean over no label is NaN
        loss = torch.where(count == 0, 0, loss)
        if num_items is not None:
            loss = _mean(loss * count, count, num_items)
        if isinstance(out, tuple):
            return loss, *out[1:]
        out.loss = loss
        return out


class MaskedLM(Replacement):
    """A masked-language model: the head and the loss on picked tokens alone; in training no scores are kept."""

    PARTS = ("loss",)
    WHAT = "head and loss on picked tokens alone"
    SCORES = "logits"

    @staticmethod
    def refuses(module):
        if getattr(module.config, "is_decoder", False):
            return "a decoder"
        return None if _vocabulary_head(module) is not None else "its head is not one that fastbert knows"

    def forward(self, *args, **kwargs):
        kwargs = _named(self, args, kwargs)
        labels, num_items = kwargs.pop("labels", None), kwargs.pop("num_items_in_batch", None)
        if labels is None:
            return super().forward(**kwargs)
        return_dict = kwargs.pop("return_dict", None)
        return_dict = self.config.return_dict if return_dict is None else return_dict
        if self.training and self.fastbert_options.logits == "evaluation":
            out = self.base_model(**kwargs, return_dict=True)
            loss = self._picked_loss(out[0], labels, num_items)
            fields = dict(loss=loss, hidden_states=out.get("hidden_states"), attentions=out.get("attentions"))
            cls = _beside(self, "MaskedLMOutput")
        else:
            out = super().forward(**kwargs, return_dict=True)
            scores = out[self.SCORES].flatten(0, -2)
            labels = labels.to(scores.device).flatten()
            picks = (labels != -100).nonzero()[:, 0]
            loss_sum = _cross_entropy(scores[picks], labels[picks])
            fields, cls = {**out, "loss": _mean(loss_sum, (labels != -100).sum(), num_items)}, type(out)
        out = cls(**fields)
        return out if return_dict else out.to_tuple()

    def _picked_loss(self, hidden, labels, num_items):
        labels = labels.to(hidden.device).flatten()
        picks = slice(None) if is_static() else (labels != -100).nonzero()[:, 0]
        return _mean(*picked_loss(self, hidden.flatten(0, -2)[picks], labels[picks]), num_items)


class Pretraining(MaskedLM):
    """Both pretraining heads: the masked language model, and sentence pairs from the pooler. Theirs give a loss only
    where both kinds of label are given. Of a step in several parts, each part's pairs count as its picked tokens do."""

    SCORES = "prediction_logits"
    # their argument for the pairs' labels, the head of the pairs, and its field in what the model returns
    PAIRS = "next_sentence_label", "cls.seq_relationship", "seq_relationship_logits"

    def forward(self, *args, **kwargs):
        kwargs = _named(self, args, kwargs)
        argument, head, field = self.PAIRS
        labels, pair_labels = kwargs.pop("labels", None), kwargs.pop(argument, None)
        num_items = kwargs.pop("num_items_in_batch", None)
        if labels is None or pair_labels is None:
            return super().forward(**kwargs)
        return_dict = kwargs.pop("return_dict", None)
        return_dict = self.config.return_dict if return_dict is None else return_dict
        if self.training and self.fastbert_options.logits == "evaluation":
            out = self.base_model(**kwargs, return_dict=True)
            loss = self._picked_loss(out[0], labels, num_items)
            fields = {field: self.get_submodule(head)(out[1])}
            fields |= dict(hidden_states=out.get("hidden_states"), attentions=out.get("attentions"))
            cls = _beside(self, f"{self.config.model_type.capitalize()}ForPreTrainingOutput")
        else:
            out = super().forward(**kwargs, labels=labels, num_items_in_batch=num_items, return_dict=True)
            loss, fields, cls = out.loss, dict(out), type(out)
        scores, pair_labels = fields[field], pair_labels.to(fields[field].device).flatten()
        pair_loss = _mean(_cross_entropy(scores.view(-1, 2), pair_labels), (pair_labels != -100).sum(), None)
        if num_items is not None:
            pair_loss = _mean(pair_loss * (labels != -100).sum().to(pair_loss.device), None, num_items)
        out = cls(**{**fields, "loss": loss + pair_loss})
        return out if return_dict else out.to_tuple()


class AlbertPretraining(Pretraining):
    PAIRS = "sentence_order_label", "sop_classifier", "sop_logits"


def picked_loss(model, rows, labels):
    """(sum of the cross-entropies, how many) of hidden states [M, D] and labels [M], all of them picked."""
    transform, decoder = _vocabulary_head(model)
    rows = transform(rows)
    count = (labels != -100).sum()
    if is_plain(decoder, nn.Linear):
        return ops.masked_cross_entropy(rows, decoder.weight, decoder.bias, labels)[0], count
    return _cross_entropy(decoder(rows), labels), count


def _cross_entropy(scores, labels):
    """The sum, in fp32 or wider."""
    return F.cross_entropy(scores.to(torch.promote_types(scores.dtype, torch.float32)), labels, reduction="sum")


def _vocabulary_head(model):
    """(what a masked-LM head does with hidden states before the vocabulary, its last linear layer), None: unknown."""
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


# ----------------------------------------------------------------------------------------------------------- tables


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
