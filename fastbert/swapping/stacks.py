"""The loops over layers, which alone know about padding.

A stack drops the padding from its hidden states, calls its layers with [1, T, D], and puts the padding back at the
end, as zeros. What is a mask otherwise is then a `Packed`, which every layer hands on unread to its attention. All
other modules work row by row and never notice.

Letters as in `steps.py`.
"""

import functools

import torch
import torch.nn.functional as F
from torch import nn

from ..packing import Packed
from .steps import Replacement, _beside, _named


def key_mask(mask, B, S):
    """Where the tokens are under a mask of any of HuggingFace's forms: bool [B, S], or None where every place has one
    or no such mask says what this one does; and whether it says just that: a bool, or a tensor of one."""
    if mask is None:
        return None, True
    if not torch.is_tensor(mask) or mask.dim() not in (2, 3, 4) or mask.shape[-1] != S:
        return None, False
    if mask.dim() == 2:
        return mask.bool().expand(B, S), True
    if mask.dim() == 4:
        if mask.shape[1] != 1:
            return None, False
        mask = mask[:, 0]
    rows, mask, says_all = mask, mask[:, 0], True
    if rows.shape[1] != 1 and rows.stride(1) != 0:
        says_all = (rows == rows[:, :1]).all()
    if mask.is_floating_point():
        # added to the scores: 0 or so little that nothing is left
        hides = (mask == 0) | (mask <= torch.finfo(mask.dtype).min / 2)
        says_all = hides.all() if says_all is True else hides.all() & says_all
        mask = mask == 0
    return mask.bool().expand(B, S), says_all


def is_static():
    """Whether a graph is made that must hold for every batch: then no shape may depend on how many tokens are real."""
    if torch.jit.is_tracing() or torch.compiler.is_exporting():
        return True
    if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
        return True
    return torch.compiler.is_compiling() and _compiles_whole()


@torch.compiler.assume_constant_result
def _compiles_whole():
    """Whether torch.compile, which calls this while it traces, was told fullgraph=True."""
    from torch._dynamo.symbolic_convert import InstructionTranslator

    return bool(getattr(InstructionTranslator.current_tx(), "one_graph", False))


def packing(hidden, mask, kwargs, *, inside, by_distance):
    """The Packed of hidden states [B, S, ...] under a mask, None where it would not do: where the mask says more than
    that, and where padding stands before a sequence.

    kwargs: of the call; cu_seq_lens_q and max_length_q, as HuggingFace's collators give them, go before the mask.
    by_distance: the attention looks at how far tokens are apart, so there may be no padding between them.
    """
    if is_static():
        return None
    B, S = hidden.shape[:2]
    if kwargs.get("cu_seq_lens_q") is not None:
        cu_seqlens = kwargs["cu_seq_lens_q"].to(torch.int32)
        longest = kwargs.get("max_length_q")
        return Packed(
            cu_seqlens,
            int((cu_seqlens[1:] - cu_seqlens[:-1]).max() if longest is None else longest),
            None,
            (B, S),
            inside,
        )
    if B * S == 0:
        return None
    kept, says_all = key_mask(mask, B, S)
    if not says_all:
        return None
    if kept is not None:
        indices = kept.flatten().nonzero()[:, 0]
        # with no token at all, attention is over the padding
        if len(indices) == 0:
            return None
        if len(indices) < B * S:
            lengths = kept.sum(1)
            # a model that reads the first place reads a padding token there, and what that one attends to
            unlike = ~kept[:, 0]
            if by_distance:
                last = S - 1 - kept.flip(1).int().argmax(1)
                unlike = unlike | (last + 1 != lengths)
            if bool((unlike & (lengths > 0)).any()):
                return None
            cu_seqlens = F.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
            return Packed(cu_seqlens, S, indices, (B, S), inside)
    return Packed(torch.arange(0, B * S + 1, S, dtype=torch.int32, device=hidden.device), S, None, (B, S), inside)


# hooks from these look at no shape
_BLIND = (
    "torch.distributed", "accelerate", "deepspeed", "peft", "transformers.utils.output_capturing",
    "transformers.modeling_utils",
)  # fmt: skip


def is_watched(module):
    """Whether a hook of the user looks at what is inside a module: then shapes there must be what they were."""
    return bool(nn.modules.module._has_any_global_hook()) or _has_hooks_inside(module)


def _has_hooks_inside(module):
    # for every call of a model: Module.modules() takes three times as long
    for inner in module._modules.values():
        if inner is None:
            continue
        for hooks in (inner._forward_hooks, inner._forward_pre_hooks, inner._backward_hooks, inner._backward_pre_hooks):
            if hooks and not all(_is_blind(hook) for hook in hooks.values()):
                return True
        if inner._modules and _has_hooks_inside(inner):
            return True
    return False


def _is_blind(hook):
    while isinstance(hook, functools.partial):
        hook = hook.func
    return (getattr(hook, "__module__", None) or "").startswith(_BLIND)


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
