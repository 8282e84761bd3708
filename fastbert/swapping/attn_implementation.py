"""attn_implementation="fastbert": this library's attention behind transformers' AttentionInterface.

    import fastbert
    model = AutoModel.from_pretrained(folder, attn_implementation="fastbert")    # or on a model that stands already:
    model.set_attn_implementation("fastbert")

transformers asks twice: once a forward pass for a mask (`mask`), then in every layer for attention (`attention`). The
mask is no [B, 1, S, S] but a `Layout`: where the real tokens stand, worked out once for all layers. Each layer packs by
it, attends, and puts its rows back; the padding of every result is 0. All other kinds of attention (causal, to another
sequence, under a mask of the user's own) get the mask that `sdpa` gets, and its attention.

B sequences, S padded length, T tokens of a flattened batch, H heads, K head size.
"""

import sys
from typing import NamedTuple

import torch

from .. import ops

NAME = "fastbert"
_NO_ENCODER = ("is_decoder", "is_encoder_decoder", "add_cross_attention")


class Layout(NamedTuple):
    """Which tokens of a padded batch see each other: the real ones of a row, both ways, within a window if it has one.

    A tuple of tensors, which whatever moves a layer's arguments (accelerate, FSDP, torch.compile) knows how to walk.

    padding: bool [B, S], True for real tokens; None when the model was given no mask. window: None, or how far a token
    sees to each side, itself not counted. order: int64 [B * S], the places of the real tokens one after the other, then
    those of the padding; places: int64 [B * S], its inverse; both None where nothing needs to move. So all shapes
    are known without asking the device how many tokens are real. cu_seqlens: int32 [B + 1] over the rows in that order.
    shared: what the layers of a pass work out once.
    """

    padding: torch.Tensor | None
    window: int | None
    order: torch.Tensor | None
    places: torch.Tensor | None
    cu_seqlens: torch.Tensor
    max_seqlen: int
    shared: dict


def _layout(padding, window, B, S, device):
    # asked only where the answer is at hand: on a GPU the host would wait for it
    if padding is None or (ops.in_memory(padding) and bool(padding.all())):
        return Layout(padding, window, None, None, _boundaries(B, S, device), S, {})
    real = padding.flatten()
    before = _real_before(padding)
    places = torch.arange(B * S, device=device)
    places = torch.where(real, before[:-1], before[-1] + places - before[:-1])
    order = torch.empty_like(places).scatter_(0, places, torch.arange(B * S, device=device))
    cu_seqlens = before[_boundaries(B, S, device)].to(torch.int32)
    return Layout(padding, window, order, places, cu_seqlens, S, {})


def _boundaries(B, S, device):
    return torch.arange(B + 1, dtype=torch.int32, device=device) * S


def _real_before(padding):
    """int64 [B * S + 1]: how many real tokens come before each place, and in all."""
    return torch.nn.functional.pad(padding.flatten().cumsum(0), (1, 0))


def mask(**arguments):
    """For AttentionMaskInterface: a `Layout` where the attention is that of an encoder, else the mask of `sdpa`.

    Arguments as `transformers.masking_utils.sdpa_mask` has them, and `config`. A model whose layers add the mask by
    themselves (MPNet) gets the mask of `eager`, and a warning.
    """
    from transformers.masking_utils import eager_mask, sdpa_mask

    config = arguments["config"]
    if not _uses_interface(config):
        _warn_once(f"{config.model_type} computes its attention itself, whatever attn_implementation says")
        return eager_mask(**arguments)
    layout = _encoder_layout(**arguments)
    return sdpa_mask(**arguments) if layout is None else layout


def _encoder_layout(
    *, batch_size, q_length, kv_length, q_offset, kv_offset, mask_function, attention_mask, config, device,
    local_size=None, allow_is_bidirectional_skip=False, **_,
):  # fmt: skip
    """A `Layout`, or None where it cannot say who sees whom."""
    from transformers.masking_utils import bidirectional_mask_function

    device, is_full = torch.device(device), mask_function is bidirectional_mask_function
    # transformers lets a mask be skipped where only padding, and the window `local_size`, can restrict it
    is_encoder = (
        allow_is_bidirectional_skip
        and (is_full or local_size is not None)
        and q_length == kv_length
        and all(isinstance(offset, int) and offset == 0 for offset in (q_offset, kv_offset))
        and (attention_mask is None or attention_mask.shape == (batch_size, kv_length))
        # between two sequences of the same length, a mask says nothing of the queries
        and not any(getattr(config, name, False) for name in _NO_ENCODER)
    )
    if not is_encoder or not _runs_on(device):
        return None
    window = None if is_full or local_size >= q_length - 1 else local_size
    if attention_mask is not None:
        attention_mask = attention_mask.to(torch.bool)
        if window is not None and _has_gaps(attention_mask):
            return None
    return _layout(attention_mask, window, batch_size, q_length, device)


def _has_gaps(padding):
    """Whether padding may stand between real tokens, which then are farther apart than they are when packed."""
    if torch.compiler.is_compiling():
        return True
    # how often a row goes from padding to a token or back
    changes = (padding[:, 1:] & ~padding[:, :-1]).sum(1) + padding[:, 0]
    return bool((changes > 1).any())


def _runs_on(device):
    """Whether packed attention runs here: while a graph is traced for a CPU, there is none to trace."""
    if torch.jit.is_tracing():
        return False
    return ops.uses_triton(device) or not torch.compiler.is_compiling()


def _uses_interface(config):
    """Whether the model of this config looks its attention up in AttentionInterface."""
    module = sys.modules.get(type(config).__module__.replace(".configuration_", ".modeling_"))
    return module is None or hasattr(module, "ALL_ATTENTION_FUNCTIONS")


def _warn_once(message):
    from transformers.utils import logging

    logging.get_logger(__name__).warning_once(
        f'attn_implementation="{NAME}": {message}. fastbert.swap(model) makes it fast.'
    )


def attention(module, query, key, value, attention_mask, dropout=0.0, scaling=None, is_causal=None, **kwargs):
    """For AttentionInterface: query, key, value [B, H, S, K] -> [B, S, H, K], and None or the weights [B, H, S, S].

    attention_mask: what `mask` returned, or a mask of the user's own. In a flattened batch, `cu_seq_lens_q`
    (and `max_length_q`), or else `position_ids` that start anew, keep the sequences apart. `output_attentions` falls
    back on the model's own eager attention.
    """
    B, H, S, K = query.shape
    layout = attention_mask if isinstance(attention_mask, Layout) else None
    cu_seqlens, max_seqlen = (None, None) if layout is None else _sequences(layout, B, S, **kwargs)
    wants_weights = kwargs.get("output_attentions", False)
    if layout is None or wants_weights or not _fits(query, key, value, kwargs):
        return _plain(
            module, query, key, value, attention_mask, layout, cu_seqlens, wants_weights,
            dropout=dropout, scaling=scaling, is_causal=is_causal, **kwargs,
        )  # fmt: skip

    def packed(x):
        rows = x.transpose(1, 2).reshape(B * S, H, K)
        return rows if layout.order is None else PermuteFunction.apply(rows, layout.order, layout.places)

    seed = None
    if dropout > 0.0:
        # from torch's generator, which activation checkpointing winds back
        seed = torch.randint(-(2**63), 2**63 - 1, (1,), dtype=torch.int64, device=query.device)
    out = ops.attention(
        packed(query), packed(key), packed(value), cu_seqlens, max_seqlen,
        scale=scaling, dropout_p=dropout, window=layout.window, seed=seed,
    )  # fmt: skip
    if layout.order is not None:
        out = PermuteFunction.apply(out, layout.places, layout.order)
    return out.view(B, S, H, K), None


class PermuteFunction(torch.autograd.Function):
    """x[order] for a permutation whose inverse is `places`: the gradient is gathered too, and nothing added up."""

    @staticmethod
    def forward(ctx, x, order, places):
        ctx.save_for_backward(order, places)
        return x.index_select(0, order)

    @staticmethod
    def backward(ctx, dout):
        order, places = ctx.saved_tensors
        return PermuteFunction.apply(dout, places, order), None, None


def _fits(query, key, value, kwargs):
    """Whether `ops.attention` can do this."""
    if not _runs_on(query.device) or not query.shape == key.shape == value.shape:
        return False
    if any(kwargs.get(name) is not None for name in ("position_bias", "softcap", "s_aux", "cache")):
        return False
    is_triton = ops.uses_triton(query.device)
    return not is_triton or (query.shape[-1] <= 128 and query.dtype != torch.float64)


def _sequences(layout, B, S, cu_seq_lens_q=None, max_length_q=None, position_ids=None, **_):
    """(cu_seqlens, max_seqlen) of the packed rows."""
    if cu_seq_lens_q is None and layout.padding is None and position_ids is not None and position_ids.shape == (1, S):
        if "restarts" not in layout.shared:
            layout.shared["restarts"] = _restarts(position_ids)
        cu_seq_lens_q = layout.shared["restarts"]
    if cu_seq_lens_q is None:
        return layout.cu_seqlens, layout.max_seqlen
    cu_seqlens = cu_seq_lens_q.to(torch.int32)
    if layout.order is not None:
        cu_seqlens = _real_before(layout.padding)[cu_seqlens].to(torch.int32)
    return cu_seqlens, B * S if max_length_q is None else int(max_length_q)


def _restarts(position_ids):
    """cu_seqlens of a row of sequences whose positions count up from the same start each; None where they do not.

    Positions of any other kind are the user's own, of one sequence.
    """
    positions = position_ids.flatten()
    starts = positions.diff(prepend=positions[:1]) != 1
    if bool((starts != (positions == positions[:1])).any() | starts.all()):
        return None
    ends = torch.tensor([positions.shape[0]], device=positions.device)
    return torch.cat((starts.nonzero()[:, 0], ends)).to(torch.int32)


def _plain(module, query, key, value, attention_mask, layout, cu_seqlens, wants_weights, **kwargs):
    """The attention of transformers: eager where the weights are wanted, else sdpa."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if layout is not None:
        attention_mask = _dense(layout, cu_seqlens, query)
        kwargs["is_causal"] = False
    eager = _eager(module) if wants_weights else None
    if eager is None:
        out, weights = sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    else:
        is_causal = kwargs.pop("is_causal")
        is_causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        if attention_mask is None and is_causal and query.shape[2] > 1:
            attention_mask = query.new_ones(query.shape[2], key.shape[2], dtype=torch.bool).tril()[None, None]
        if attention_mask is not None and attention_mask.dtype == torch.bool:
            lowest = torch.finfo(query.dtype).min
            attention_mask = torch.zeros_like(attention_mask, dtype=query.dtype).masked_fill(~attention_mask, lowest)
        out, weights = eager(module, query, key, value, attention_mask, **kwargs)
    if layout is not None and layout.padding is not None:
        out = out.masked_fill(~layout.padding[:, :, None, None], 0)
    return out, weights


def _eager(module):
    """The eager attention of the file that the module's class, or one that it is made from, comes from."""
    for parent in type(module).__mro__:
        found = getattr(sys.modules.get(parent.__module__), "eager_attention_forward", None)
        if found is not None:
            return found
    return None


def _dense(layout, cu_seqlens, query):
    """bool [B, 1, S, S], who sees whom; None where everybody sees everybody."""
    B, _, S, _ = query.shape
    place = torch.arange(S, device=query.device)
    masks = []
    if layout.padding is not None:
        masks.append(layout.padding[:, None, None, :])
    if layout.window is not None:
        masks.append(((place[:, None] - place).abs() <= layout.window)[None, None])
    if cu_seqlens is not layout.cu_seqlens:
        rows = torch.arange(B * S, device=query.device) if layout.places is None else layout.places
        sequence = torch.bucketize(rows, cu_seqlens[1:], right=True).view(B, 1, S)
        masks.append(sequence[..., :, None] == sequence[..., None, :])
    if not masks:
        return None
    seen = masks[0]
    for other in masks[1:]:
        seen = seen & other
    return seen.expand(B, 1, S, S)


def register():
    """Make "fastbert" known to transformers. `import fastbert` sees to it, in whichever order the two are imported."""
    from transformers.masking_utils import AttentionMaskInterface
    from transformers.modeling_utils import AttentionInterface

    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, mask)
