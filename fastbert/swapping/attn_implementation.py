"""attn_implementation="fastbert": this library's attention behind transformers' AttentionInterface.

    import fastbert
    model = AutoModel.from_pretrained(folder, attn_implementation="fastbert")    # or, on an existing model:
    model.set_attn_implementation("fastbert")

transformers calls `mask` once in a forward pass, then `attention` in every layer. The mask is not a [B, 1, S, S] tensor
but a `Mask`: where the tokens are, found once for all layers. Each layer packs by it, attends, and unpacks. Results at
padding are 0, but for the first place of a sequence, which models pool. Every other kind of attention (causal, to
another sequence, under a custom mask) gets the mask and the attention of `sdpa`, and so does one that packing would
make slower: short texts and batches without padding on a CPU.

B sequences, S padded length, H heads, K head size.
"""

import functools
import sys
from typing import NamedTuple

import torch
import torch.nn.functional as F

from .. import ops
from ..packing import Layout, full_layout, layout_of, tokens_before
from .flattened import first_positions
from .steps import dropout_arguments, from_file_of, is_dry

NAME = "fastbert"
_NO_ENCODER = ("is_decoder", "is_encoder_decoder", "add_cross_attention")


class Mask(NamedTuple):
    """Which tokens of a padded batch see each other: those of a sequence, in both directions, within a window if any.

    A tuple, like the Layout in it. window: None, or how many tokens a token sees to each side. restarts: None where the
    model was given a mask, else a dict for the sequences in a row as `position_ids` tell them, read once a pass.
    begins_padded: whether a sequence may begin with padding. plain: filled by the first layer: whether sdpa is faster,
    and its mask.
    """

    layout: Layout
    window: int | None
    restarts: dict | None
    begins_padded: bool
    plain: dict

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        """Another attention got this mask, where modules keep another config than their model has (an encoder-decoder
        pair). It gets a tensor: bool for sdpa, else one to add."""
        query = args[0]

        def dense(x):
            if not isinstance(x, cls):
                return x
            sees = _dense(x, x.layout.cu_seqlens, query.device)
            return sees if sees is None or function is F.scaled_dot_product_attention else _added(sees, query.dtype)

        return function(*map(dense, args), **{name: dense(x) for name, x in (kwargs or {}).items()})


def _mask(is_token, window, B, S, device):
    # read only in host memory: on a GPU the host would wait for the answer
    is_known = is_token is None or ops.in_memory(is_token)
    if is_known and (is_token is None or bool(is_token.all())):
        return Mask(full_layout(B, S, device), window, {} if is_token is None else None, False, {})
    begins_padded = not is_known or not bool(is_token[:, 0].all())
    return Mask(layout_of(is_token, padding_last=True), window, None, begins_padded, {})


def mask(**arguments):
    """For AttentionMaskInterface: a `Mask` where attention is that of an encoder, else the mask of `sdpa`.

    Takes the arguments of `transformers.masking_utils.sdpa_mask`, and `config`. A model that computes its attention
    itself (MPNet) gets the mask of `eager`, and a warning.
    """
    from transformers.masking_utils import eager_mask, sdpa_mask

    config = arguments["config"]
    model_file = sys.modules.get(type(config).__module__.replace(".configuration_", ".modeling_"))
    if model_file is not None and not hasattr(model_file, "ALL_ATTENTION_FUNCTIONS"):
        _warn_once(f"{config.model_type} computes its attention itself, whatever attn_implementation says")
        return eager_mask(**arguments)
    found = _encoder_mask(**arguments)
    return sdpa_mask(**arguments) if found is None else found


def _encoder_mask(
    *, batch_size, q_length, kv_length, q_offset, kv_offset, mask_function, attention_mask, config, device,
    local_size=None, allow_is_bidirectional_skip=False, **_,
):  # fmt: skip
    """A `Mask`, or None where it cannot say which tokens see each other."""
    from transformers.masking_utils import bidirectional_mask_function

    device, is_full = torch.device(device), mask_function is bidirectional_mask_function
    # transformers allows a mask to be skipped where it hides nothing but padding and what is outside `local_size`
    is_encoder = (
        allow_is_bidirectional_skip
        and (is_full or local_size is not None)
        and q_length == kv_length
        and all(isinstance(offset, int) and offset == 0 for offset in (q_offset, kv_offset))
        and (attention_mask is None or attention_mask.shape == (batch_size, kv_length))
        # in cross-attention a mask says nothing about the queries
        and not any(getattr(config, name, False) for name in _NO_ENCODER)
    )
    if not is_encoder or not _runs_on(device):
        return None
    window = None if is_full or local_size >= q_length - 1 else local_size
    if attention_mask is not None:
        attention_mask = attention_mask.to(torch.bool)
        if window is not None and _has_gaps(attention_mask):
            return None
    return _mask(attention_mask, window, batch_size, q_length, device)


def _has_gaps(is_token):
    """Whether there may be padding between tokens, which brings them closer together when packed."""
    if torch.compiler.is_compiling() or is_dry(is_token):
        return True
    # runs of tokens in each sequence
    runs = (is_token[:, 1:] & ~is_token[:, :-1]).sum(1) + is_token[:, 0]
    return bool((runs > 1).any())


def _runs_on(device):
    """Whether packed attention runs here; on a CPU it cannot be traced."""
    if torch.jit.is_tracing():
        return False
    return ops.uses_triton(device) or not torch.compiler.is_compiling()


def _warn_once(message):
    from transformers.utils import logging

    logging.get_logger(__name__).warning_once(
        f'attn_implementation="{NAME}": {message}. fastbert.swap(model) makes it fast.'
    )


def attention(module, query, key, value, attention_mask, dropout=0.0, scaling=None, is_causal=None, **kwargs):
    """For AttentionInterface: query, key, value [B, H, S, K] -> [B, S, H, K], and None or the weights [B, H, S, S].

    attention_mask: what `mask` returned, or a custom mask. In a flattened batch, `cu_seq_lens_q` (and `max_length_q`)
    separate the sequences, or `position_ids` that restart. `output_attentions` falls back to the model's eager
    attention.
    """
    B, H, S, K = query.shape
    found = attention_mask if isinstance(attention_mask, Mask) else None
    cu_seqlens, max_seqlen = (None, None) if found is None else _sequences(module, found, B, S, **kwargs)
    wants_weights = kwargs.get("output_attentions", False)
    if found is None or wants_weights or not _fits(query, key, value, kwargs):
        return _plain(
            module, query, key, value, attention_mask, found, cu_seqlens, wants_weights,
            dropout=dropout, scaling=scaling, is_causal=is_causal, **kwargs,
        )  # fmt: skip
    if cu_seqlens is found.layout.cu_seqlens and not _pays(module, found, query):
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        options = dict(dropout=dropout, scaling=scaling, is_causal=False)
        return sdpa_attention_forward(module, query, key, value, found.plain["mask"], **options)
    layout = found.layout
    if is_dry(query) and not ops.uses_triton(query.device):
        return query.transpose(1, 2).contiguous(), None
    out = ops.attention(
        *(layout.pack(x.transpose(1, 2)) for x in (query, key, value)), cu_seqlens, max_seqlen,
        scale=scaling, window=found.window, **dropout_arguments(dropout, query.device),
    )  # fmt: skip
    out = layout.unpack(out)
    if found.begins_padded:
        out = _with_first_place(out, found, query, key, value, dropout, scaling)
    return out, None


def _pays(module, found, query):
    """Whether packing pays, decided once in a forward pass: a layer that runs again for its gradients does the same."""
    B, H, S, K = query.shape
    if "pays" not in found.plain:
        pairs = B * S * S
        # on a GPU packing pays without a look at the lengths
        if found.layout.indices is not None and ops.in_memory(found.layout.cu_seqlens):
            pairs = int(found.layout.cu_seqlens.diff().square().sum())
        found.plain["pays"] = ops.pays(query, pairs, B * S * S, H * K, module.training, True)
        if not found.plain["pays"]:
            found.plain["mask"] = _dense(found, found.layout.cu_seqlens, query.device)
    return found.plain["pays"]


def _with_first_place(out, found, query, key, value, dropout, scaling):
    """out [B, S, H, K], with what the first place of a sequence sees also where that is padding: models pool it."""
    is_token = found.layout.is_token()
    sees = is_token
    if found.window is not None:
        sees = is_token & (torch.arange(is_token.shape[1], device=out.device) <= found.window)
    first = F.scaled_dot_product_attention(
        query[:, :, :1], key, value, sees[:, None, None], dropout, scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )  # fmt: skip
    first = torch.where(is_token[:, :1, None, None], out[:, :1], first.transpose(1, 2).to(out.dtype))
    return torch.cat((first, out[:, 1:]), 1)


def _fits(query, key, value, kwargs):
    """Whether `ops.attention` can do this."""
    if not _runs_on(query.device) or key.shape != value.shape:
        return False
    # query heads may share keys
    (B, H, *rest), (B_k, heads, *rest_k) = query.shape, key.shape
    if (B, rest) != (B_k, rest_k) or heads == 0 or H % heads:
        return False
    if any(kwargs.get(name) is not None for name in ("position_bias", "softcap", "s_aux", "cache")):
        return False
    is_triton = ops.uses_triton(query.device)
    return not is_triton or (query.shape[-1] <= 128 and query.dtype != torch.float64)


def _sequences(module, found, B, S, cu_seq_lens_q=None, max_length_q=None, position_ids=None, **_):
    """(cu_seqlens, max_seqlen) of the packed rows."""
    layout, restarts = found.layout, found.restarts
    if position_ids is not None and is_dry(position_ids):
        position_ids = None
    # nomic-embed passes one row of positions for all B sequences: only in a batch of one may they restart
    is_row = B == 1 and position_ids is not None and position_ids.shape == (1, S)
    if cu_seq_lens_q is None and restarts is not None and is_row:
        if not restarts:
            restarts["cu_seqlens"] = _restarts(position_ids)
        cu_seq_lens_q = restarts["cu_seqlens"]
    if cu_seq_lens_q is None:
        return layout.cu_seqlens, layout.max_seqlen
    if position_ids is not None and len(cu_seq_lens_q) > 2 and _counts_from_padding_idx(type(module)):
        _check_positions(module, first_positions(position_ids, cu_seq_lens_q))
    cu_seqlens = cu_seq_lens_q.to(torch.int32)
    if layout.indices is not None:
        cu_seqlens = tokens_before(layout.is_token())[cu_seqlens].to(torch.int32)
    return cu_seqlens, B * S if max_length_q is None else int(max_length_q)


@functools.cache
def _counts_from_padding_idx(cls):
    """Whether the model of this attention class begins its positions after `padding_idx`, as RoBERTa does."""
    classes = vars(sys.modules[cls.__module__]).values()
    return any(hasattr(c, "create_position_ids_from_input_ids") for c in classes if isinstance(c, type))


def _check_positions(module, starts):
    """Raises ValueError for the positions of DataCollatorWithFlattening, which count from 0."""
    offset = module.config.pad_token_id + 1
    ops.check(
        starts != 0,
        f"position_ids of the sequences begin at 0: {module.config.model_type} begins at {offset}, "
        f"add {offset} to those of DataCollatorWithFlattening",
    )


def _restarts(position_ids):
    """cu_seqlens of sequences in one row, whose positions all count up from the same start.

    None for positions of any other kind: they are custom positions of one sequence.
    """
    positions = position_ids.flatten()
    starts = positions.diff(prepend=positions[:1]) != 1
    if bool((starts != (positions == positions[:1])).any() | starts.all()):
        return None
    ends = torch.tensor([positions.shape[0]], device=positions.device)
    return torch.cat((starts.nonzero()[:, 0], ends)).to(torch.int32)


def _plain(module, query, key, value, attention_mask, found, cu_seqlens, wants_weights, **kwargs):
    """The attention of transformers: eager where the weights are requested, else sdpa."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if found is not None:
        attention_mask = sees = _dense(found, cu_seqlens, query.device)
        kwargs["is_causal"] = False
    eager = from_file_of(module, "eager_attention_forward") if wants_weights else None
    if eager is None:
        out, weights = sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    else:
        is_causal = kwargs.pop("is_causal")
        is_causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        if attention_mask is None and is_causal and query.shape[2] > 1:
            attention_mask = query.new_ones(query.shape[2], key.shape[2], dtype=torch.bool).tril()[None, None]
        if attention_mask is not None and attention_mask.dtype == torch.bool:
            attention_mask = _added(attention_mask, query.dtype)
        out, weights = eager(module, query, key, value, attention_mask, **kwargs)
    if found is not None and found.layout.indices is not None:
        # the first place too, unless it sees a token, see `_with_first_place`
        is_kept = torch.cat((sees[:, 0, :1].any(-1), found.layout.is_token()[:, 1:]), 1)
        out = out.masked_fill(~is_kept[:, :, None, None], 0)
    return out, weights


def _added(sees, dtype):
    """A mask to add to scores, of a bool mask."""
    return torch.zeros_like(sees, dtype=dtype).masked_fill(~sees, torch.finfo(dtype).min)


def _dense(found, cu_seqlens, device):
    """bool [B, 1, S, S], which query sees which key; None where all do."""
    layout = found.layout
    B, S = layout.shape
    place = torch.arange(S, device=device)
    masks = []
    if layout.indices is not None:
        masks.append(layout.is_token()[:, None, None, :])
    if found.window is not None:
        masks.append(((place[:, None] - place).abs() <= found.window)[None, None])
    if cu_seqlens is not layout.cu_seqlens:
        rows = torch.arange(B * S, device=device)
        sequence = layout.unpack(torch.bucketize(rows, cu_seqlens[1:], right=True))[:, None]
        masks.append(sequence[..., :, None] == sequence[..., None, :])
    return functools.reduce(torch.logical_and, masks).expand(B, 1, S, S) if masks else None


def register():
    """Register "fastbert" with transformers; `import fastbert` does it, whichever of the two is imported first."""
    from transformers.masking_utils import AttentionMaskInterface
    from transformers.modeling_utils import AttentionInterface

    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, mask)
