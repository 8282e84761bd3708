"""What runs in place of HuggingFace's loops over layers. Only these know about padding.

A stack removes the padding from its hidden states, calls its layers with [1, T, D], and restores the padding at the
end, as zeros. In place of the mask it passes a `Layout`, which the layers pass on to their attention. All other modules
work row by row and see no difference; where one may not, the original runs (`tokenwise.py`).

Letters as in `steps.py`.
"""

import contextlib
import sys

import torch
import torch.nn.functional as F
from torch import nn

from .. import ops
from ..packing import Layout, full_layout, layout_of
from .inference import prepared, run_modernbert
from .steps import PLAIN, Replacement, by_name, from_file_of, is_plain, linear, plain_modules
from .tokenwise import is_watched, may_run_again


def key_mask(mask, B, S):
    """(is_token, says_all) of a mask in any of HuggingFace's forms.

    is_token: bool [B, S], False at padding; None where there is no padding or the mask has another form. says_all:
    whether the mask hides padding and nothing else, as a bool or a tensor of one.
    """
    if mask is None:
        return None, True
    # one with a gradient may be any number in the next step
    if not torch.is_tensor(mask) or mask.dim() not in (2, 3, 4) or mask.shape[-1] != S or mask.requires_grad:
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
        # added to the scores: 0, or so low that the key gets no weight
        hides = (mask == 0) | (mask <= torch.finfo(mask.dtype).min / 2)
        says_all = hides.all() if says_all is True else hides.all() & says_all
        mask = mask == 0
    return mask.bool().expand(B, S), says_all


def is_static():
    """Whether a graph is made that must hold for every batch: no shape may then depend on the number of tokens."""
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


def layout_under(mask, hidden, kwargs, *, by_distance):
    """The Layout of hidden states [B, S, ...] under a mask. None where there is no such layout: where the mask hides
    more than padding, and where a sequence begins with padding.

    kwargs: of the call; cu_seq_lens_q and max_length_q, as HuggingFace's collators give them, win over the mask.
    by_distance: attention depends on the distance between tokens, so there may be no padding between them.
    """
    if is_static():
        return None
    if type(hidden) not in PLAIN:
        return None
    B, S = hidden.shape[:2]
    if kwargs.get("cu_seq_lens_q") is not None:
        cu_seqlens = kwargs["cu_seq_lens_q"].to(torch.int32)
        longest = kwargs.get("max_length_q")
        return Layout(cu_seqlens, int(cu_seqlens.diff().max() if longest is None else longest), shape=(B, S))
    if B * S == 0:
        return None
    is_token, says_all = key_mask(mask, B, S)
    if not says_all:
        return None
    if is_token is None:
        return full_layout(B, S, hidden.device)
    layout = layout_of(is_token)
    if len(layout.indices) == B * S:
        return layout.without_padding(B, S)
    # the model may read the first place of a sequence: if that is padding, its value depends on what it attends to
    differs = ~is_token[:, 0]
    if by_distance:
        last = S - 1 - is_token.flip(1).int().argmax(1)
        differs = differs | (last + 1 != layout.cu_seqlens.diff())
    return None if bool(differs.any()) else layout


def _requests(config, kwargs, name):
    """Whether a call or the model's config requests output_hidden_states or output_attentions."""
    value = kwargs.get(name)
    value = getattr(config, name, False) if value is None else value
    # 0 is the number of a layer
    return value is not None and value is not False


def _config(stack):
    # DistilBERT's stack has none, but its attention does
    configs = (vars(module).get("config") for module in stack.modules())
    return next((config for config in configs if hasattr(config, "_attn_implementation")), None)


def _adds(config, mask):
    """Whether the original adds a user's mask of bools or integers to the scores: eager attention adds what it gets."""
    is_given = torch.is_tensor(mask) and mask.dim() == 4 and not mask.is_floating_point()
    return is_given and getattr(config, "_attn_implementation", None) == "eager"


def _own_attention(stack):
    """Why the attention function that a config asks for must be called, else None."""
    name = getattr(_config(stack), "_attn_implementation", None)
    function = sys.modules["transformers.modeling_utils"].ALL_ATTENTION_FUNCTIONS.get(name)
    function = function or from_file_of(stack, "eager_attention_forward")
    file = getattr(getattr(function, "func", function), "__module__", None)
    is_known = function is None or (file or "").startswith(("transformers.", "fastbert."))
    return None if is_known else f"its attention, {name}, is not one of transformers'"


class BertEncoder(Replacement):
    """The loop over layers, on tokens alone."""

    RUNS = {"attention": "runs unpadded; falls back to the original when attentions are requested"}
    BY_DISTANCE = False
    # whether layers as `ops.prepare` has them are faster than the original, also without padding
    PREPARES = True

    @staticmethod
    def refuses(module):
        config = _config(module)
        if getattr(config, "is_decoder", False) or getattr(config, "add_cross_attention", False):
            return "a decoder's attention is causal, or reads another model"
        return _own_attention(module)

    @staticmethod
    def yields(args, kwargs):
        return is_static() or Replacement.yields(args, kwargs)

    def call_original(self, *args, **kwargs):
        named = by_name(self, args, kwargs)
        is_flat = named.get("cu_seq_lens_q") is not None
        if is_flat and not any(kind in str(_config(self)._attn_implementation) for kind in ("flash", "fastbert")):
            raise ValueError(
                f"cu_seq_lens_q is given, but this call runs the original {type(self).__name__}, whose "
                f"{_config(self)._attn_implementation} attention would mix the sequences: pad them"
            )
        out = super().call_original(*args, **kwargs)
        if is_flat or not self._encodes(named) or self.fastbert_options.shows_padding:
            return out
        is_token, says_all = key_mask(named.get("attention_mask"), *out[0].shape[:2])
        if is_token is None:
            return out
        # zeros at padding, as an unpadded run has; not in a sequence that begins with padding: the model may read it
        padding = ~is_token & is_token[:, :1]
        if says_all is not True:
            padding = padding & says_all
        return self._zeroed(out, lambda x: x.masked_fill(padding[..., None], 0))

    @staticmethod
    def _zeroed(out, zero):
        return _with_last(out, zero(out[0]))

    def forward(self, hidden_states, attention_mask=None, *args, **kwargs):
        layout, unpads = self._layout(hidden_states, attention_mask, kwargs)
        if layout is None:
            return self._padded(unpads, hidden_states, attention_mask, *args, **kwargs)
        layers = self._prepared(hidden_states, unpads, kwargs)
        if layers is None and not self._pays(hidden_states, layout, unpads, kwargs):
            return self._padded(None, hidden_states, attention_mask, *args, **kwargs)
        x, inner = _entering(layout, hidden_states, unpads)
        if layers is None:
            kwargs = self._packed(layout, kwargs) if unpads else kwargs
            out = super().forward(x, inner, *args, **kwargs)
            return _with_last(out, _leaving(layout, out[0], unpads))
        x = x[0]
        if hasattr(self, "embedding_hidden_mapping_in"):
            # ALBERT's stack begins with it
            x = linear(self.embedding_hidden_mapping_in, x)
        for layer in layers:
            x = layer(x, inner.cu_seqlens, inner.max_seqlen)
        made = from_file_of(self, "BaseModelOutputWithPastAndCrossAttentions") or from_file_of(self, "BaseModelOutput")
        return made(last_hidden_state=layout.unpack(x))

    @staticmethod
    def _packed(layout, kwargs):
        """The further arguments of the layers, for packed rows."""
        return kwargs

    @staticmethod
    def _encodes(kwargs):
        """Whether a call is not a decoder's."""
        given = any(kwargs.get(name) is not None for name in ("encoder_hidden_states", "past_key_values"))
        return not given and not kwargs.get("use_cache")

    def _layout(self, hidden_states, attention_mask, kwargs):
        """(the Layout or None where the original must run; whether the layers run on packed rows, None where the
        original is faster)."""
        may_prepare, is_flat = self._may_prepare(hidden_states), kwargs.get("cu_seq_lens_q") is not None
        # the least that packed rows can cost: a small model should not wait for what follows
        if not may_prepare and not self._pays(hidden_states, None, True, kwargs):
            return None, None
        config = _config(self)
        if not self._encodes(kwargs) or _requests(config, kwargs, "output_attentions") or _adds(config, attention_mask):
            return None, False
        seen = _requests(config, kwargs, "output_hidden_states")
        # feed-forwards in chunks need padded lengths
        unpads = self.fastbert_options.unpad and not seen and not getattr(config, "chunk_size_feed_forward", 0)
        if not may_prepare and not self._pays(hidden_states, None, unpads, kwargs):
            return None, None
        layout = layout_under(attention_mask, hidden_states, kwargs, by_distance=self.BY_DISTANCE)
        if seen and self.BY_DISTANCE and layout is not None and layout.indices is not None:
            # what is seen of a sequence may not depend on whether another one in the batch has gaps
            layout = None
        if self._lacks_rows(layout):
            layout = None
        is_known = layout is not None and not may_prepare
        if is_known and not self._pays(hidden_states, layout, unpads, kwargs):
            return None, None
        # the shapes of flattened sequences are the same in the original
        if layout is None or is_watched(self, hooks=not is_flat) or _own_attention(self):
            return None, False
        return layout, unpads

    def _lacks_rows(self, layout):
        """Whether a layout leaves padding rows out that are read."""
        return self.fastbert_options.shows_padding and layout is not None and layout.indices is not None

    def _may_prepare(self, hidden_states):
        """Whether to look if the layers can run as `ops.prepare` has them: without padding, too, that pays."""
        rows = hidden_states.shape[0] * hidden_states.shape[1]
        return self.PREPARES and ops.may_prepare(hidden_states, rows, self._width(hidden_states))

    def _prepared(self, hidden_states, unpads, kwargs):
        """The layers as `ops.prepare` has them, or None."""
        is_flat = kwargs.get("cu_seq_lens_q") is not None
        return prepared(self, hidden_states) if unpads and not is_flat and self._may_prepare(hidden_states) else None

    def _pays(self, x, layout, unpads, kwargs):
        """Whether packed rows of x [B, S, ...] are faster than the original. layout: None while it is not known."""
        if kwargs.get("cu_seq_lens_q") is not None:
            return True
        places = x.shape[0] * x.shape[1]
        tokens = places
        if unpads:
            tokens = 0 if layout is None else places if layout.indices is None else len(layout.indices)
        return ops.pays(x, tokens, places, self._width(x), self.training)

    def _width(self, x):
        """Of the layers; x may be ids [B, S], or ALBERT's narrower embeddings."""
        is_hidden = x.dim() > 2 and "embedding_hidden_mapping_in" not in self._modules
        return x.shape[-1] if is_hidden else _config(self).hidden_size

    def _padded(self, unpads, *args, **kwargs):
        """The original. unpads: None if it is faster, so that the modules inside are originals, too."""
        with plain_modules() if unpads is None and not may_run_again(self) else contextlib.nullcontext():
            return self.call_original(*args, **kwargs)


def _entering(layout, x, unpads):
    """(hidden states [B, S, D], or ids, for the first layer; the Layout for all layers)."""
    if not unpads:
        return x, layout
    x = layout.pack(x)[None]
    return x, layout.without_padding(*x.shape[:2])


def _leaving(layout, x, unpads):
    """Hidden states of a layer as [B, S, D], 0 at padding."""
    if unpads:
        return layout.unpack(x[0])
    return x if layout.indices is None else layout.unpack(layout.pack(x))


def _with_last(out, last, between=lambda x: x):
    """A stack's output with other hidden states of its last layer; `between` changes those of the layers before."""

    def seen(states):
        # the first are the input
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


class PreNormEncoder(BertEncoder):
    """Of layers that begin with their norms."""

    PREPARES = False


class EsmEncoder(PreNormEncoder):
    """Its rotary positions are made for the padded batch."""

    @staticmethod
    def _encodes(kwargs):
        # its model passes on what its config says of a cache, and has none
        return PreNormEncoder._encodes({**kwargs, "use_cache": None})

    @staticmethod
    def _packed(layout, kwargs):
        tables = kwargs.get("position_embeddings")
        if tables is None:
            return kwargs
        packed = tuple(layout.pack(table.expand(*layout.shape, -1))[None] for table in tables)
        return kwargs | dict(position_embeddings=packed)


class MPNetEncoder(BertEncoder):
    BY_DISTANCE = True

    def forward(
        self, hidden_states, attention_mask=None, output_attentions=False, output_hidden_states=False,
        return_dict=False, **kwargs,
    ):  # fmt: skip
        outputs = dict(output_attentions=output_attentions, output_hidden_states=output_hidden_states)
        layout, unpads = self._layout(hidden_states, attention_mask, {**kwargs, **outputs})
        # its weights are read
        table = self.relative_attention_bias
        is_read = is_plain(table, nn.Embedding) and table.padding_idx is None and table.max_norm is None
        if layout is None or not is_read or table.scale_grad_by_freq:
            return self._padded(unpads, hidden_states, attention_mask, **outputs, return_dict=return_dict, **kwargs)
        layers = self._prepared(hidden_states, unpads, kwargs)
        if layers is None and not self._pays(hidden_states, layout, unpads, kwargs):
            return self._padded(None, hidden_states, attention_mask, **outputs, return_dict=return_dict, **kwargs)
        # row max_seqlen + i - j is for a query at i and a key at j
        distance = torch.arange(-layout.max_seqlen, layout.max_seqlen, device=hidden_states.device)
        buckets = F.one_hot(self.relative_position_bucket(-distance), table.num_embeddings)
        bias = buckets.to(hidden_states.dtype) @ table.weight.to(hidden_states.dtype)

        def call(layer, x, inner):
            if layers is None:
                return layer(x, inner, bias)[0]
            return faster[layer](x[0], inner.cu_seqlens, inner.max_seqlen, bias)[None]

        faster = dict(zip(self.layer, layers or ()))
        return _run(self, hidden_states, layout, unpads, call, output_hidden_states, return_dict)


def _run(stack, hidden_states, layout, unpads, call, output_hidden_states, return_dict, after_first=None):
    """The loop over `stack.layer` for families whose own loop reads the mask; `call(layer, x, layout)` runs one."""
    x, inner = _entering(layout, hidden_states, unpads)
    states = [hidden_states]
    for i, layer in enumerate(stack.layer):
        x = call(layer, x, inner)
        if i == 0 and after_first is not None:
            x, _ = _entering(layout, after_first(hidden_states, _leaving(layout, x, unpads)), unpads)
        if output_hidden_states or i + 1 == len(stack.layer):
            states.append(_leaving(layout, x, unpads))
    every = tuple(states) if output_hidden_states else None
    if not return_dict:
        return (states[-1],) if every is None else (states[-1], every)
    return from_file_of(stack, "BaseModelOutput")(last_hidden_state=states[-1], hidden_states=every)


class DebertaEncoder(BertEncoder):
    BY_DISTANCE = True

    @staticmethod
    def refuses(module):
        return None if module.relative_attention else "it has no relative positions"

    @staticmethod
    def _zeroed(out, zero):
        # this loop shows the states of every layer
        return _with_last(out, zero(out[0]), zero)

    def forward(
        self, hidden_states, attention_mask, output_hidden_states=True, output_attentions=False, query_states=None,
        relative_pos=None, return_dict=True,
    ):  # fmt: skip
        given = query_states is not None or relative_pos is not None or not torch.is_tensor(hidden_states)
        layout, layers, unpads = None, None, self.fastbert_options.unpad
        if not given and not output_attentions and attention_mask.dim() == 2:
            pays = self._pays(hidden_states, None, unpads, {})
            if not pays and not self._may_prepare(hidden_states):
                unpads = None
            elif not is_watched(self):
                layout = layout_under(attention_mask, hidden_states, {}, by_distance=True)
            layers = None if layout is None else self._prepared(hidden_states, unpads, {})
            if layers is None and not pays:
                layout = unpads = None
        if layout is None or self._lacks_rows(layout):
            return self._padded(
                unpads, hidden_states, attention_mask, output_hidden_states, output_attentions, query_states,
                relative_pos, return_dict,
            )  # fmt: skip
        relative = self.get_rel_embedding()
        conv = getattr(self, "conv", None)
        faster = dict(zip(self.layer, layers or ()))

        def call(layer, x, inner):
            if layers is None:
                return layer(x, inner, rel_embeddings=relative)[0]
            positions = relative, *layer.attention.self.distances()
            return faster[layer](x[0], inner.cu_seqlens, inner.max_seqlen, positions)[None]

        return _run(
            self, hidden_states, layout, unpads, call, output_hidden_states, return_dict,
            after_first=None if conv is None else lambda first, x: conv(first, x, attention_mask),
        )  # fmt: skip


class ModernBertModel(BertEncoder):
    """The model is its own stack: the padding goes before the embeddings."""

    BY_DISTANCE = True
    # the original has almost as few calls: layers are prepared only where packing pays
    PREPARES = False

    @staticmethod
    def refuses(module):
        kinds = getattr(module.rotary_emb, "rope_type", {})
        kinds = {"dynamic", "longrope"}.intersection(kinds.values() if isinstance(kinds, dict) else [kinds])
        if kinds:
            return f"its rotary embedding, {kinds.pop()}, depends on the padded length"
        return BertEncoder.refuses(module)

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, inputs_embeds=None, **kwargs):
        x = input_ids if input_ids is not None else inputs_embeds
        layout, unpads = None, False
        # transformers takes masks of four dimensions as they are: its local layers then have no window
        is_usual = attention_mask is None or torch.is_tensor(attention_mask) and attention_mask.dim() == 2
        if x is not None and (input_ids is None or inputs_embeds is None) and is_usual:
            layout, unpads = self._layout(x, attention_mask, kwargs)
        if layout is None:
            return self._padded(unpads, input_ids, attention_mask, position_ids, inputs_embeds, **kwargs)
        layers = prepared(self, x) if unpads and kwargs.get("cu_seq_lens_q") is None else None
        if position_ids is None:
            position_ids = torch.arange(layout.shape[1], device=x.device)[None]
        if unpads:
            position_ids = layout.pack(position_ids.expand(layout.shape))[None]
        x, inner = _entering(layout, x, unpads)
        return_dict = kwargs.pop("return_dict", None)
        inputs = dict(input_ids=x if input_ids is not None else None, inputs_embeds=x if input_ids is None else None)
        if layers is None:
            masks = dict.fromkeys(("full_attention", "sliding_attention"), inner)
            out = super(BertEncoder, self).forward(attention_mask=masks, position_ids=position_ids, **inputs, **kwargs)
        else:
            out = run_modernbert(self, layers, inputs, position_ids, inner)
        out = _with_last(out, _leaving(layout, out[0], unpads))
        return out if (self.config.return_dict if return_dict is None else return_dict) else out.to_tuple()


class GteModel(ModernBertModel):
    """And nomic-embed's, jina-embeddings-v3's: positions are those of the padded columns, so there may be padding
    anywhere. A pooler reads the first token of a sequence, so it runs once more where the padding is back."""

    BY_DISTANCE = False

    def forward(self, *args, **kwargs):
        kwargs = by_name(self, args, kwargs)
        name = "input_ids" if kwargs.get("input_ids") is not None else "inputs_embeds"
        x, layout, unpads = kwargs.get(name), None, False
        if x is not None and (name == "inputs_embeds" or kwargs.get("inputs_embeds") is None):
            layout, unpads = self._layout(x, kwargs.get("attention_mask"), kwargs)
        if layout is None:
            return self._padded(unpads, **kwargs)
        if kwargs.get("position_ids") is None:
            kwargs["position_ids"] = torch.arange(layout.shape[1], device=x.device)[None]
        if unpads:
            for ids in ("position_ids", "token_type_ids"):
                if kwargs.get(ids) is not None:
                    kwargs[ids] = layout.pack(kwargs[ids].expand(layout.shape))[None]
        kwargs[name], inner = _entering(layout, x, unpads)
        return_dict = kwargs.pop("return_dict", None)
        # a mask of four dimensions is passed on as it is; none is read
        kwargs["attention_mask"] = torch.empty(1, 1, 1, 0, device=x.device)
        out = super(BertEncoder, self).forward(**kwargs, layout=inner, return_dict=True)
        out = _with_last(out, _leaving(layout, out[0], unpads))
        if getattr(self, "pooler", None) is not None:
            out.pooler_output = self.pooler(out.last_hidden_state)
        return out if (self.config.return_dict if return_dict is None else return_dict) else out.to_tuple()
