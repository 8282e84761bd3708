"""What a user could call instead of the attentions. See op_peers.py."""

from functools import partial

import peers
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastbert.proof.op_cases import TABLE, Run


def _padded_attention(attend, all_true_mask=False):
    """A variant that takes q, k, v [B, H, S, K], a key mask or None, and dropout's probability.

    all_true_mask: give a mask where nothing is padded, as a model does that never looks whether its mask masks.
    """

    def make(arguments):
        padded = peers.Padded(arguments)
        if all_true_mask and not padded.is_full:
            raise peers.NotApplicable
        mask = padded.mask[:, None, None, :] if all_true_mask else padded.key_mask
        run = Run(None, padded.heads_first(arguments["q"]), padded.packed, padded.unpacked)
        run.forward = lambda: attend(*run.leaves, mask, arguments.get("dropout_p", 0.0))
        return run

    return make


def _sdpa(backend=None, all_true_mask=False):
    def attend(q, k, v, mask, dropout_p):
        if backend is None:
            return F.scaled_dot_product_attention(q, k, v, mask, dropout_p)
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, mask, dropout_p)

    def make(arguments):
        run = _padded_attention(attend, all_true_mask)(arguments)
        if backend in (SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION):
            peers.gpu_only(arguments)
        return run

    return make


def _flex(arguments):
    """FlexAttention, compiled, on the rectangle; blocks whose queries or keys are padding only are skipped."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    peers.no_dropout("FlexAttention", arguments)
    padded = peers.Padded(arguments)
    bias, block_mask, score_mod = arguments.get("bias"), None, None
    if not padded.is_full:
        # of queries too: otherwise blocks of padding rows among the queries would be computed
        def is_token(b, h, query, key):
            return (query < padded.lengths[b]) & (key < padded.lengths[b])

        block_mask = create_block_mask(
            is_token, len(padded.lengths), None, padded.S, padded.S, device=padded.mask.device
        )
    leaves = [*padded.heads_first(arguments["q"]), *([] if bias is None else [bias])]
    on_a_cpu = "FlexAttention has no backward on a CPU" if padded.mask.device.type == "cpu" else ""
    run = Run(None, leaves, padded.packed, padded.unpacked, on_a_cpu)
    if bias is not None:
        span, (table,) = bias.shape[0] // 2, run.leaves[3:]

        def score_mod(score, b, h, query, key):
            return score + table[span + query - key, h]

    attend = peers.compiled(flex_attention)
    run.forward = lambda: attend(*run.leaves[:3], score_mod=score_mod, block_mask=block_mask)
    return run


def _packed_attention(make_attend):
    """A variant that takes packed q, k, v, each [T, H, K]."""

    def make(arguments):
        attend = make_attend(arguments)
        run = Run(None, [x.contiguous() for x in arguments["q"].unbind(1)])
        run.packed = lambda output, gradients: (output, [torch.stack(gradients, 1)])
        run.forward = lambda: attend(*run.leaves)
        return run

    return make


def _varlen(arguments):
    from torch.nn.attention.varlen import varlen_attn

    peers.gpu_only(arguments)
    peers.no_dropout("torch's varlen_attn", arguments)
    cu_seqlens, S = arguments["cu_seqlens"], arguments["max_seqlen"]
    return lambda q, k, v: varlen_attn(q, k, v, cu_seqlens, cu_seqlens, S, S)


def _nested(arguments):
    offsets, S = arguments["cu_seqlens"].long(), arguments["max_seqlen"]
    shortest = int(offsets.diff().min())

    def jagged(x):
        nested = torch.nested.nested_tensor_from_jagged(x, offsets, min_seqlen=shortest, max_seqlen=S)
        return nested.transpose(1, 2)

    def attend(q, k, v):
        out = F.scaled_dot_product_attention(jagged(q), jagged(k), jagged(v), dropout_p=arguments.get("dropout_p", 0.0))
        return out.transpose(1, 2).values()

    return attend


def _newer_flash_attn(module):
    """FlashAttention of the third and the fourth version."""

    def make_attend(arguments):
        function = peers.gpu_library(module, arguments).flash_attn_varlen_func
        peers.no_dropout("FlashAttention from its third version on", arguments)
        cu_seqlens, S = arguments["cu_seqlens"], arguments["max_seqlen"]
        # by name: the fourth has other arguments among these
        places = dict(cu_seqlens_q=cu_seqlens, cu_seqlens_k=cu_seqlens, max_seqlen_q=S, max_seqlen_k=S)

        def attend(q, k, v):
            out = function(q, k, v, **places)
            # some versions return the softmax's statistics too
            return out[0] if isinstance(out, tuple) else out

        return attend

    return make_attend


def _xformers(arguments):
    peers.gpu_library("xformers", arguments)
    from xformers.ops import memory_efficient_attention
    from xformers.ops.fmha.attn_bias import BlockDiagonalMask

    boundaries = BlockDiagonalMask.from_seqlens(list(arguments.lengths), device=peers.device_of(arguments))
    p = arguments.get("dropout_p", 0.0)

    def attend(q, k, v):
        return memory_efficient_attention(q[None], k[None], v[None], boundaries, p)[0]

    return attend


def _flash_attn(arguments):
    function = peers.gpu_library("flash_attn", arguments).flash_attn_varlen_qkvpacked_func
    cu_seqlens, S, p = arguments["cu_seqlens"], arguments["max_seqlen"], arguments.get("dropout_p", 0.0)
    run = Run(None, [arguments["q"]])
    run.forward = lambda: function(*run.leaves, cu_seqlens, S, dropout_p=p)
    return run


def _flashdeberta(arguments):
    peers.gpu_library("flashdeberta", arguments)
    from flashdeberta.ops.flash_attention_varlen import flash_attention_with_disentangled_varlen

    peers.no_dropout("flashdeberta", arguments)
    positions = [arguments[name].transpose(0, 1)[None].contiguous() for name in ("pos_key", "pos_query")]
    cu_seqlens, S, K = arguments["cu_seqlens"], arguments["max_seqlen"], arguments["q"].shape[-1]
    run = Run(None, [*(x.contiguous() for x in arguments["q"].unbind(1)), *positions])

    def packed(output, gradients):
        return output, [torch.stack(gradients[:3], 1), *(x[0].transpose(0, 1) for x in gradients[3:])]

    run.packed = packed
    run.forward = lambda: flash_attention_with_disentangled_varlen(
        *run.leaves, cu_seqlens, cu_seqlens, S, S, False, (3 * K) ** -0.5,
        arguments["position_buckets"], arguments["max_relative_positions"],
    )  # fmt: skip
    return run


def _deberta_eager(arguments):
    """Plain attention, its positions from transformers' own function."""
    from transformers.models.deberta_v2.modeling_deberta_v2 import build_relative_position

    padded = peers.Padded(arguments)
    span, p = arguments["position_buckets"], arguments.get("dropout_p", 0.0)
    probe = torch.empty(padded.S, 1, device=arguments["q"].device)
    relative = build_relative_position(probe, probe, span, arguments["max_relative_positions"])
    relative = relative.reshape(1, 1, padded.S, padded.S)
    places = [(sign * relative + span).clamp(0, 2 * span - 1) for sign in (1, -1)]
    leaves = [*padded.heads_first(arguments["q"]), arguments["pos_key"], arguments["pos_query"]]
    run = Run(None, leaves, padded.packed, padded.unpacked)
    run.forward = lambda: TABLE["disentangled_attention"].plain(*run.leaves, *places, padded.key_mask, p)
    return run


def _disentangled_flash(arguments):
    """DisentangledFlash's training module, its projections replaced by their results; on a CPU its PyTorch path."""
    from disentangled_flash import packed as theirs
    from disentangled_flash._reference import DebertaAttentionConfig
    from disentangled_flash._torch import TorchTrainingDisentangledSelfAttention
    from disentangled_flash.training import TritonTrainingDisentangledSelfAttention

    H, K = arguments["q"].shape[-2:]
    device, p = peers.device_of(arguments), arguments.get("dropout_p", 0.0)
    config = DebertaAttentionConfig(
        hidden_size=H * K, num_attention_heads=H, attention_probs_dropout_prob=p, hidden_dropout_prob=0.0,
        share_att_key=False, position_buckets=arguments["position_buckets"],
        max_relative_positions=arguments["max_relative_positions"],
    )  # fmt: skip
    tables = [arguments["pos_key"], arguments["pos_query"]]
    padded = peers.Padded(arguments)
    on_gpu = device.type == "cuda"
    if on_gpu:
        rows = [x.contiguous() for x in arguments["q"].flatten(2).unbind(1)]
        module = TritonTrainingDisentangledSelfAttention(config).to(device).train()
    else:
        rows = [padded.rectangle(x) for x in arguments["q"].flatten(2).unbind(1)]
        module = TorchTrainingDisentangledSelfAttention(config, assume_unpadded=padded.is_full).train()
    run = Run(None, [*rows, *tables])
    module._project_qkv = lambda hidden: run.leaves[:3]
    # project the tables once: projecting rows that were picked gives the same
    module._project_active_positions = lambda _, slots: [
        x.index_select(0, slots).transpose(0, 1) for x in run.leaves[3:]
    ]

    def packed(output, gradients):
        rows = [(x if on_gpu else x[padded.mask]).unflatten(-1, (H, K)) for x in (output, *gradients[:3])]
        return rows[0], [torch.stack(rows[1:], 1), *gradients[3:]]

    run.packed = packed
    run.unpacked = lambda cotangent: cotangent.flatten(1) if on_gpu else padded.rectangle(cotangent.flatten(1))
    if on_gpu:
        cu_seqlens = arguments["cu_seqlens"]
        info = theirs.validate_cu_seqlens(cu_seqlens, len(rows[0]), arguments["max_seqlen"])
        call = partial(module.forward_packed, rel_embeddings=tables[0], packed_info=info)
        run.forward = lambda: call(run.leaves[0], cu_seqlens)[0]
    else:
        run.forward = lambda: module(run.leaves[0], padded.mask, rel_embeddings=tables[0])[0]
    return run


def _with_bias(attend):
    """A variant of MPNet's attention as transformers writes it: the table's entries are added to the scores."""

    def make(arguments):
        padded = peers.Padded(arguments)
        table = arguments["bias"]
        position = torch.arange(padded.S, device=table.device)
        distance = position[:, None] - position + table.shape[0] // 2
        run = Run(None, [*padded.heads_first(arguments["q"]), table], padded.packed, padded.unpacked)

        def forward():
            bias = run.leaves[3][distance].permute(2, 0, 1)
            return attend(*run.leaves[:3], padded.key_mask, arguments.get("dropout_p", 0.0), bias)

        run.forward = forward
        return run

    return make


def _biased_sdpa(q, k, v, mask, dropout_p, bias):
    bias = bias[None] if mask is None else bias.masked_fill(~mask, float("-inf"))
    return F.scaled_dot_product_attention(q, k, v, bias, dropout_p)


BACKENDS = {
    "sdpa": None,
    "sdpa flash": SDPBackend.FLASH_ATTENTION,
    "sdpa efficient": SDPBackend.EFFICIENT_ATTENTION,
    "sdpa cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa math": SDPBackend.MATH,
}
PEERS = {
    "attention": {
        "eager": _padded_attention(TABLE["attention"].plain),
        "compiled": _padded_attention(peers.compiled(TABLE["attention"].plain)),
        **{name: _sdpa(backend) for name, backend in BACKENDS.items()},
        **{f"{name}, all-true mask": _sdpa(backend, all_true_mask=True) for name, backend in BACKENDS.items()},
        "flex": _flex,
        "torch varlen": _packed_attention(_varlen),
        "torch nested": _packed_attention(_nested),
        "flash_attn": _flash_attn,
        "flash_attn 3": _packed_attention(_newer_flash_attn("flash_attn_interface")),
        "flash_attn 4": _packed_attention(_newer_flash_attn("flash_attn.cute")),
        "xformers": _packed_attention(_xformers),
    },
    "biased_attention": {
        "eager": _with_bias(TABLE["attention"].plain),
        "compiled": peers.compiled_forward(_with_bias(TABLE["attention"].plain)),
        "sdpa": _with_bias(_biased_sdpa),
        "flex": _flex,
    },
    "disentangled_attention": {
        "eager": _deberta_eager,
        "compiled": peers.compiled_forward(_deberta_eager),
        "flashdeberta": _flashdeberta,
        "disentangled_flash": _disentangled_flash,
    },
}
