"""What a user could call instead of each op: plain PyTorch, PyTorch's own fused functions, other libraries.

A variant is a function from a case's Arguments to a Run (fastbert/proof/op_cases.py), in the strongest setting that was
found for it (README.md lists those). It raises Unavailable, with the reason, where it cannot be had, and NotApplicable
where it would be another one over again. PEERS, at the end, is the table.
"""

import contextlib
import importlib
import inspect
import math
from importlib import metadata

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastbert import ops
from fastbert.proof.op_cases import Arguments, Run, floating, run_of


class Unavailable(Exception):
    """This variant cannot be had here, and why."""


class NotApplicable(Exception):
    """This variant would be another one over again."""


# --- what a user writes without fastbert; dropout is torch's, whose masks differ from fastbert's


def _layer_norm(x, weight, bias, residual, dropout_p=0.0, seed=None, offset=0):
    return F.layer_norm(F.dropout(x, dropout_p) + residual, x.shape[-1:], weight, bias, 1e-12)


def _bias_gelu(x, bias):
    return F.gelu(x + bias)


def _gelu_layer_norm(x, bias, weight, ln_bias):
    return F.layer_norm(F.gelu(x + bias), x.shape[-1:], weight, ln_bias, 1e-12)


def _embedding(
    input_ids, position_ids, token_type_ids, word, position, token_type, weight, bias,
    dropout_p=0.0, seed=None, offset=0,
):  # fmt: skip
    z = F.embedding(input_ids, word) + F.embedding(position_ids, position) + F.embedding(token_type_ids, token_type)
    return F.dropout(F.layer_norm(z, z.shape[-1:], weight, bias, 1e-12), dropout_p)


def _masked_cross_entropy(hidden, weight, bias, labels):
    return F.cross_entropy(F.linear(hidden, weight, bias).float(), labels, reduction="sum")


def _unwidened_cross_entropy(hidden, weight, bias, labels):
    return F.cross_entropy(F.linear(hidden, weight, bias), labels, reduction="sum")


def _contrastive_cross_entropy(query, document, scale):
    scores = scale * (query @ document.T).float()
    return F.cross_entropy(scores, torch.arange(len(query), device=query.device), reduction="sum")


PLAIN = {
    "layer_norm": _layer_norm,
    "bias_gelu": _bias_gelu,
    "gelu_layer_norm": _gelu_layer_norm,
    "embedding": _embedding,
    "masked_cross_entropy": _masked_cross_entropy,
    "contrastive_cross_entropy": _contrastive_cross_entropy,
}


def _compiled(function):
    # for these shapes alone. Who compiles for many cases resets torch._dynamo between them
    return torch.compile(function, dynamic=False)


def _compiled_forward(make):
    """The variant that `make` builds, its forward compiled."""

    def compiled(arguments):
        run = make(arguments)
        run.forward = _compiled(run.forward)
        return run

    return compiled


def _device(arguments):
    return next(x.device for x in arguments.values() if torch.is_tensor(x))


def _gpu_library(name, arguments):
    """Raises Unavailable where the package `name`, whose kernels run on GPUs only, is not installed or has no GPU."""
    try:
        importlib.import_module(name)
    except ImportError as error:
        raise Unavailable(f"not installed ({error})") from error
    _gpu_only(arguments)


def _gpu_only(arguments, why="runs on GPUs only"):
    if _device(arguments).type == "cpu":
        raise Unavailable(why)


class _Padded:
    """The padded rectangle of packed rows: what a model without packing computes on."""

    def __init__(self, arguments):
        lengths = torch.tensor(arguments.lengths, device=_device(arguments))
        self.S, self.lengths = max(arguments.lengths), lengths
        self.mask = torch.arange(self.S, device=lengths.device) < lengths[:, None]
        self.is_full = min(arguments.lengths) == self.S
        # None where nothing is padded: then a model without packing needs no mask either
        self.key_mask = None if self.is_full else self.mask[:, None, None, :]

    def rectangle(self, rows):
        """[T, ...] as [B, S, ...], padding 0."""
        padded = rows.new_zeros(*self.mask.shape, *rows.shape[1:])
        padded[self.mask] = rows
        return padded

    def heads_first(self, qkv):
        """q, k, v, each [B, H, S, K], of the packed projection [T, 3, H, K]."""
        return [self.rectangle(x).transpose(1, 2).contiguous() for x in qkv.unbind(1)]

    def unpacked(self, cotangent):
        return self.rectangle(cotangent).transpose(1, 2).contiguous()

    def packed(self, output, gradients):
        """(output [T, H, K], [gradient of the projection, [T, 3, H, K]]) of padded ones, each [B, H, S, K]."""
        rows = [x.transpose(1, 2)[self.mask] for x in (output, *gradients[:3])]
        return rows[0], [torch.stack(rows[1:], 1), *gradients[3:]]


def _plain_attention(q, k, v, mask, dropout_p):
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return F.dropout(torch.softmax(scores, -1), dropout_p) @ v


def _padded_attention(attend, all_true_mask=False):
    """A variant that takes q, k, v [B, H, S, K], a key mask or None, and dropout's probability.

    all_true_mask: give a mask where nothing is padded, as a model does that never looks whether its mask masks.
    """

    def make(arguments):
        padded = _Padded(arguments)
        if all_true_mask and not padded.is_full:
            raise NotApplicable
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
            _gpu_only(arguments)
        return run

    return make


def _flex(arguments):
    """FlexAttention, compiled, on the rectangle; blocks whose queries or keys are padding only are skipped."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    if arguments.get("dropout_p"):
        raise Unavailable("FlexAttention has no dropout")
    padded = _Padded(arguments)
    bias, block_mask, score_mod = arguments.get("bias"), None, None
    if not padded.is_full:
        # of both: with padding among the queries left in, their blocks would be computed too
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

    attend = _compiled(flex_attention)
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

    _gpu_only(arguments)
    if arguments.get("dropout_p"):
        raise Unavailable("torch's varlen_attn has no dropout")
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


def _flash_attn_3(arguments):
    _gpu_library("flash_attn_interface", arguments)
    from flash_attn_interface import flash_attn_varlen_func

    return _newer_flash_attn(flash_attn_varlen_func, arguments)


def _flash_attn_4(arguments):
    _gpu_library("flash_attn.cute", arguments)
    from flash_attn.cute import flash_attn_varlen_func

    return _newer_flash_attn(flash_attn_varlen_func, arguments)


def _newer_flash_attn(function, arguments):
    if arguments.get("dropout_p"):
        raise Unavailable("FlashAttention has no dropout from its third version on")
    cu_seqlens, S = arguments["cu_seqlens"], arguments["max_seqlen"]
    # by name: the fourth has other arguments among these
    places = dict(cu_seqlens_q=cu_seqlens, cu_seqlens_k=cu_seqlens, max_seqlen_q=S, max_seqlen_k=S)

    def attend(q, k, v):
        out = function(q, k, v, **places)
        # some versions return the softmax's statistics too
        return out[0] if isinstance(out, tuple) else out

    return attend


def _xformers(arguments):
    _gpu_library("xformers", arguments)
    from xformers.ops import memory_efficient_attention
    from xformers.ops.fmha.attn_bias import BlockDiagonalMask

    boundaries = BlockDiagonalMask.from_seqlens(list(arguments.lengths), device=_device(arguments))
    p = arguments.get("dropout_p", 0.0)

    def attend(q, k, v):
        return memory_efficient_attention(q[None], k[None], v[None], boundaries, p)[0]

    return attend


def _flash_attn(arguments):
    _gpu_library("flash_attn", arguments)
    from flash_attn import flash_attn_varlen_qkvpacked_func

    def attend(qkv):
        return flash_attn_varlen_qkvpacked_func(
            qkv, arguments["cu_seqlens"], arguments["max_seqlen"], dropout_p=arguments.get("dropout_p", 0.0)
        )

    run = Run(None, [arguments["q"]])
    run.forward = lambda: attend(*run.leaves)
    return run


def _flashdeberta(arguments):
    _gpu_library("flashdeberta", arguments)
    from flashdeberta.ops.flash_attention_varlen import flash_attention_with_disentangled_varlen

    if arguments.get("dropout_p"):
        raise Unavailable("flashdeberta has no dropout")
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
    """DeBERTa's scores in full, the positions gathered, as transformers' eager code computes them."""
    from transformers.models.deberta_v2.modeling_deberta_v2 import build_relative_position

    padded = _Padded(arguments)
    span, p = arguments["position_buckets"], arguments.get("dropout_p", 0.0)
    probe = torch.empty(padded.S, 1, device=arguments["q"].device)
    relative = build_relative_position(probe, probe, span, arguments["max_relative_positions"])
    relative = relative.reshape(1, 1, padded.S, padded.S)
    c2p, p2c = ((sign * relative + span).clamp(0, 2 * span - 1) for sign in (1, -1))
    scale = (3 * arguments["q"].shape[-1]) ** -0.5
    leaves = [*padded.heads_first(arguments["q"]), arguments["pos_key"], arguments["pos_query"]]
    run = Run(None, leaves, padded.packed, padded.unpacked)

    def forward():
        q, k, v, pos_key, pos_query = run.leaves
        shape = *q.shape[:2], padded.S, padded.S
        scores = q @ k.transpose(-1, -2)
        scores = scores + (q @ pos_key.permute(1, 2, 0)).gather(-1, c2p.expand(shape))
        scores = scores + (k @ pos_query.permute(1, 2, 0)).gather(-1, p2c.expand(shape)).transpose(-1, -2)
        scores = scores * scale
        if padded.key_mask is not None:
            scores = scores.masked_fill(~padded.key_mask, float("-inf"))
        return F.dropout(torch.softmax(scores, -1), p) @ v

    run.forward = forward
    return run


def _disentangled_flash(arguments):
    """DisentangledFlash's training module, its projections replaced by their results; on a CPU its PyTorch path."""
    from disentangled_flash import packed as theirs
    from disentangled_flash._reference import DebertaAttentionConfig
    from disentangled_flash._torch import TorchTrainingDisentangledSelfAttention
    from disentangled_flash.training import TritonTrainingDisentangledSelfAttention

    H, K = arguments["q"].shape[-2:]
    device, p = _device(arguments), arguments.get("dropout_p", 0.0)
    config = DebertaAttentionConfig(
        hidden_size=H * K, num_attention_heads=H, attention_probs_dropout_prob=p, hidden_dropout_prob=0.0,
        share_att_key=False, position_buckets=arguments["position_buckets"],
        max_relative_positions=arguments["max_relative_positions"],
    )  # fmt: skip
    tables = [arguments["pos_key"], arguments["pos_query"]]
    padded = _Padded(arguments)
    on_gpu = device.type == "cuda"
    if on_gpu:
        rows = [x.contiguous() for x in arguments["q"].flatten(2).unbind(1)]
        module = TritonTrainingDisentangledSelfAttention(config).to(device).train()
    else:
        rows = [padded.rectangle(x) for x in arguments["q"].flatten(2).unbind(1)]
        module = TorchTrainingDisentangledSelfAttention(config, assume_unpadded=padded.is_full).train()
    run = Run(None, [*rows, *tables])
    module._project_qkv = lambda hidden: run.leaves[:3]
    # rows of the projected tables are the projections of the tables' rows
    module._project_active_positions = lambda _, slots: [
        x.index_select(0, slots).transpose(0, 1) for x in run.leaves[3:]
    ]

    def packed(output, gradients):
        rows = [(x if on_gpu else x[padded.mask]).unflatten(-1, (H, K)) for x in (output, *gradients[:3])]
        return rows[0], [torch.stack(rows[1:], 1), *gradients[3:]]

    run.packed = packed
    run.unpacked = lambda cotangent: cotangent.flatten(1) if on_gpu else padded.rectangle(cotangent.flatten(1))
    if on_gpu:
        info = theirs.validate_cu_seqlens(arguments["cu_seqlens"], len(rows[0]), arguments["max_seqlen"])

        def forward():
            return module.forward_packed(
                run.leaves[0], arguments["cu_seqlens"], rel_embeddings=tables[0], packed_info=info
            )[0]
    else:

        def forward():
            return module(run.leaves[0], padded.mask, rel_embeddings=tables[0])[0]

    run.forward = forward
    return run


def _biased_eager(arguments):
    """MPNet's attention as transformers writes it: the table's entries as a matrix that is added to the scores."""
    return _with_bias(arguments, _plain_biased_attention)


def _plain_biased_attention(q, k, v, bias, mask, dropout_p):
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5 + bias
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return F.dropout(torch.softmax(scores, -1), dropout_p) @ v


def _biased_sdpa(arguments):
    def attend(q, k, v, bias, mask, dropout_p):
        bias = bias[None] if mask is None else bias.masked_fill(~mask, float("-inf"))
        return F.scaled_dot_product_attention(q, k, v, bias, dropout_p)

    return _with_bias(arguments, attend)


def _with_bias(arguments, attend):
    padded = _Padded(arguments)
    table = arguments["bias"]
    position = torch.arange(padded.S, device=table.device)
    distance = position[:, None] - position + table.shape[0] // 2
    run = Run(None, [*padded.heads_first(arguments["q"]), table], padded.packed, padded.unpacked)

    def forward():
        bias = run.leaves[3][distance].permute(2, 0, 1)
        return attend(*run.leaves[:3], bias, padded.key_mask, arguments.get("dropout_p", 0.0))

    run.forward = forward
    return run


def _pooling_eager(arguments):
    """As sentence-transformers does it: a masked mean over the padded rectangle, then F.normalize."""
    padded = _Padded(arguments)
    run = Run(None, [padded.rectangle(arguments["hidden"])])
    run.packed = lambda output, gradients: (output, [gradients[0][padded.mask]])
    weights = padded.mask[:, :, None].to(arguments["hidden"].dtype)

    def forward():
        (hidden,) = run.leaves
        return F.normalize((hidden * weights).sum(1) / weights.sum(1), dim=-1)

    run.forward = forward
    return run


def _pooling_segments(arguments):
    """A mean of each sequence's packed rows, by torch's own reduction of segments: no padding."""
    lengths = torch.tensor(arguments.lengths, device=_device(arguments))
    run = Run(None, [arguments["hidden"]])
    run.forward = lambda: F.normalize(torch.segment_reduce(run.leaves[0], "mean", lengths=lengths, axis=0), dim=-1)
    return run


def _in_the_rectangle(function, *per_token):
    """A variant that computes padding too, as a model without packing does. per_token: arguments with a row a token."""

    def make(arguments):
        padded = _Padded(arguments)
        if padded.is_full:
            raise NotApplicable
        wide = {name: padded.rectangle(x) if name in per_token else x for name, x in arguments.items()}
        run = run_of(function, wide)
        names = list(floating(arguments))

        def packed(output, gradients):
            rows = [x[padded.mask] if name in per_token else x for name, x in zip(names, gradients)]
            return output[padded.mask], rows

        run.packed, run.unpacked = packed, padded.rectangle
        return run

    return make


def _every_token(function, per_pick):
    """A variant that computes every token of the rectangle, as transformers' heads do; picks stand evenly in it."""

    def make(arguments):
        x = arguments[per_pick]
        M, tokens = len(x), len(arguments.lengths) * max(arguments.lengths)
        picks = torch.arange(M, device=x.device) * tokens // M
        everything = torch.randn(tokens, x.shape[1], device=x.device, dtype=x.dtype).index_copy(0, picks, x)
        wide = {**arguments, per_pick: everything}
        if "labels" in wide:
            wide["labels"] = wide["labels"].new_full((tokens,), -100).index_copy(0, picks, wide["labels"])
        run = run_of(function, wide)

        def packed(output, gradients):
            return output[picks] if output.dim() else output, [gradients[0][picks], *gradients[1:]]

        run.packed = packed
        if "labels" not in wide:
            run.unpacked = lambda cotangent: torch.zeros_like(everything).index_copy(0, picks, cotangent)
        return run

    return make


def _in_half_precision(function):
    """A variant that leaves numbers in the dtype that they come in."""

    def make(arguments):
        if next(iter(floating(arguments).values())).dtype == torch.float32:
            raise NotApplicable
        return run_of(function, arguments)

    return make


def _own_document(query, document, scale):
    """(hidden, weight, labels) that make a vocabulary's cross-entropy of the contrastive one."""
    return query * scale, document, torch.arange(len(query), device=query.device)


def _vocabulary_or_documents(cross_entropy):
    """A variant of both cross-entropies. cross_entropy(hidden, weight, bias or None, labels) gives the sum."""

    def make(arguments):
        if "query" not in arguments:
            return run_of(cross_entropy, arguments)

        def call(query, document, scale):
            hidden, weight, labels = _own_document(query, document, scale)
            return cross_entropy(hidden, weight, None, labels)

        return run_of(call, arguments)

    return make


def _linear_cross_entropy(chunked):
    """torch's own: as it is (linear, then cross_entropy), or in chunks of rows whose logits are not kept."""

    def make(arguments):
        if not hasattr(F, "linear_cross_entropy"):
            raise Unavailable("this torch has no linear_cross_entropy")
        options = {}
        if chunked:
            if not hasattr(torch.nn, "LinearCrossEntropyOptions"):
                raise Unavailable("this torch has no LinearCrossEntropyOptions")
            # its choice for a CPU, a handful of rows a chunk, reads the whole weight for each: many times slower
            rows = len(arguments.get("hidden", arguments.get("query")))
            size = dict(batch_chunk_size=rows) if _device(arguments).type == "cpu" else {}
            options["options"] = torch.nn.LinearCrossEntropyOptions(**size)

        def call(hidden, weight, bias, labels):
            return F.linear_cross_entropy(hidden, weight, labels, linear_bias=bias, reduction="sum", **options)

        return _vocabulary_or_documents(call)(arguments)

    return make


def _liger_cross_entropy(rows=None):
    """Liger's, in chunks of its own choice, or of about so many rows.

    It aims at logits of the size of `hidden`, which with a large vocabulary and a narrow model are chunks of 64 to 256
    rows, each of which reads and writes the weight's whole gradient.
    """

    def make(arguments):
        _gpu_library("liger_kernel", arguments)
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

        options = {}
        if rows is not None:
            if "chunk_mem_const" not in inspect.signature(liger_fused_linear_cross_entropy).parameters:
                raise Unavailable("this version of liger_kernel has no chunk_mem_const")
            hidden, weight = (
                arguments.get(a, arguments.get(b)) for a, b in (("hidden", "query"), ("weight", "document"))
            )
            share = min(rows / len(hidden), 1.0)
            options["chunk_mem_const"] = math.ceil(share * len(weight) / weight.shape[1])

        def call(hidden, weight, bias, labels):
            return liger_fused_linear_cross_entropy(hidden, weight, labels, bias=bias, reduction="sum", **options)

        return _vocabulary_or_documents(call)(arguments)

    return make


def _cut_cross_entropy(impl):
    """Cut Cross Entropy. Where it takes no bias the bias is one more column of the weight, for free.

    A column that is one in every row of `hidden` and the bias in `weight`, and zeros up to a multiple of 64, as its
    blocks like it, stand in its arguments before any clock starts.
    """

    def make(arguments):
        from cut_cross_entropy import linear_cross_entropy

        on_a_cpu = _device(arguments).type == "cpu"
        if impl == "cce":
            _gpu_only(arguments)
        elif not on_a_cpu:
            raise NotApplicable  # what "compiled" is
        # its own kernels leave out gradients that are small, which those of an untrained model are
        options = dict(impl=impl, reduction="sum", **({} if on_a_cpu else {"filter_eps": None}))
        if "query" in arguments or "bias" in inspect.signature(linear_cross_entropy).parameters:

            def call(hidden, weight, bias, labels):
                given = {} if bias is None else {"bias": bias}
                return linear_cross_entropy(hidden, weight, labels, **given, **options)

            return _vocabulary_or_documents(call)(arguments)

        hidden, weight, bias, labels = (arguments[name] for name in ("hidden", "weight", "bias", "labels"))
        D = weight.shape[1]
        run = Run(None, [_and_columns(hidden, torch.ones_like(hidden[:, 0])), _and_columns(weight, bias)])
        run.packed = lambda output, gradients: (output, [gradients[0][:, :D], gradients[1][:, :D], gradients[1][:, D]])
        run.forward = lambda: linear_cross_entropy(*run.leaves, labels, **options)
        return run

    return make


def _and_columns(x, column):
    return torch.cat((x, column[:, None], x.new_zeros(len(x), -(x.shape[1] + 1) % 64)), 1)


def _quack_cross_entropy(arguments):
    """QuACK's, in chunks of rows. It takes no bias, whole eights of rows, and is at its best in 128s of words."""
    _gpu_library("quack", arguments)
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    if "query" in arguments:
        return _vocabulary_or_documents(
            lambda hidden, weight, bias, labels: chunked_linear_cross_entropy(hidden, weight, labels, reduction="sum")
        )(arguments)
    hidden, weight, bias, labels = (arguments[name] for name in ("hidden", "weight", "bias", "labels"))
    (M, D), V = hidden.shape, len(weight)
    # what is filled up: rows without a label, words that no softmax sees
    weight = _with_rows(_and_columns(weight, bias), -V % 128)
    weight[V:, D] = _NEVER
    run = Run(None, [_with_rows(_and_columns(hidden, torch.ones_like(hidden[:, 0])), -M % 8), weight])
    labels = F.pad(labels, (0, -M % 8), value=-100)
    run.packed = lambda output, gradients: (
        output,
        [gradients[0][:M, :D], gradients[1][:V, :D], gradients[1][:V, D]],
    )
    run.forward = lambda: chunked_linear_cross_entropy(*run.leaves, labels, reduction="sum")
    return run


# a logit that leaves no probability, in every dtype
_NEVER = -1e4


def _with_rows(x, count):
    return torch.cat((x, x.new_zeros(count, *x.shape[1:])))


def _whole_64s(make):
    """The variant with the vocabulary filled up to a multiple of 64 words, as one does for tensor cores.

    BERT's 30,522 are no multiple of 8: rows of logits are not aligned then, and libraries fall back to slower products.
    """

    def wide(arguments):
        _gpu_only(arguments, "on a CPU it makes no difference")
        V = len(arguments["weight"])
        more = -V % 64
        if not more:
            raise NotApplicable
        filled = {
            "weight": _with_rows(arguments["weight"], more),
            "bias": F.pad(arguments["bias"], (0, more), value=_NEVER),
        }
        run = make(Arguments({**arguments, **filled}, arguments.lengths))
        run.packed = lambda output, gradients: (output, [gradients[0], *(x[:V] for x in gradients[1:])])
        return run

    return wide


def _liger_layer_norm(arguments):
    _gpu_library("liger_kernel", arguments)
    from liger_kernel.transformers.functional import liger_layer_norm

    def call(x, weight, bias, residual, dropout_p=0.0, seed=None, offset=0):
        return liger_layer_norm(F.dropout(x, dropout_p) + residual, weight, bias, 1e-12)

    return run_of(call, arguments)


def _flash_attn_layer_norm(arguments):
    _gpu_library("flash_attn", arguments)
    from flash_attn.ops.triton.layer_norm import layer_norm_fn

    def call(x, weight, bias, residual, dropout_p=0.0, seed=None, offset=0):
        return layer_norm_fn(x, weight, bias, residual=residual, eps=1e-12, dropout_p=dropout_p)

    return run_of(call, arguments)


CROSS_ENTROPIES = {
    "torch linear_cross_entropy": _linear_cross_entropy(chunked=False),
    "torch linear_cross_entropy, chunked": _linear_cross_entropy(chunked=True),
    "liger": _liger_cross_entropy(),
    "liger, large chunks": _liger_cross_entropy(4096),
    "cut_cross_entropy": _cut_cross_entropy("cce"),
    "cut_cross_entropy, compiled": _cut_cross_entropy("torch_compile"),
    "quack": _quack_cross_entropy,
}
BACKENDS = {
    "sdpa": None,
    "sdpa flash": SDPBackend.FLASH_ATTENTION,
    "sdpa efficient": SDPBackend.EFFICIENT_ATTENTION,
    "sdpa cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa math": SDPBackend.MATH,
}
PEERS = {
    "attention": {
        "eager": _padded_attention(_plain_attention),
        "compiled": _padded_attention(_compiled(_plain_attention)),
        **{name: _sdpa(backend) for name, backend in BACKENDS.items()},
        **{f"{name}, all-true mask": _sdpa(backend, all_true_mask=True) for name, backend in BACKENDS.items()},
        "flex": _flex,
        "torch varlen": _packed_attention(_varlen),
        "torch nested": _packed_attention(_nested),
        "flash_attn": _flash_attn,
        "flash_attn 3": _packed_attention(_flash_attn_3),
        "flash_attn 4": _packed_attention(_flash_attn_4),
        "xformers": _packed_attention(_xformers),
    },
    "biased_attention": {
        "eager": _biased_eager,
        "compiled": _compiled_forward(_biased_eager),
        "sdpa": _biased_sdpa,
        "flex": _flex,
    },
    "disentangled_attention": {
        "eager": _deberta_eager,
        "compiled": _compiled_forward(_deberta_eager),
        "flashdeberta": _flashdeberta,
        "disentangled_flash": _disentangled_flash,
    },
    "layer_norm": {
        "eager, padded": _in_the_rectangle(_layer_norm, "x", "residual"),
        "liger": _liger_layer_norm,
        "flash_attn": _flash_attn_layer_norm,
    },
    "bias_gelu": {"eager, padded": _in_the_rectangle(_bias_gelu, "x")},
    "embedding": {
        "eager, padded": _in_the_rectangle(_embedding, "input_ids", "position_ids", "token_type_ids"),
    },
    "gelu_layer_norm": {"eager, every token": _every_token(_gelu_layer_norm, "x")},
    "masked_cross_entropy": {
        "eager, every token": _every_token(_masked_cross_entropy, "hidden"),
        "eager, not widened": _in_half_precision(_unwidened_cross_entropy),
        "eager, whole 64s": _whole_64s(lambda arguments: run_of(_masked_cross_entropy, arguments)),
        **CROSS_ENTROPIES,
        **{
            f"{name}, whole 64s": _whole_64s(CROSS_ENTROPIES[name])
            for name in ("torch linear_cross_entropy, chunked", "liger, large chunks")
        },
    },
    "contrastive_cross_entropy": CROSS_ENTROPIES,
    "pooling": {
        "eager": _pooling_eager,
        "compiled": _compiled_forward(_pooling_eager),
        "torch segment_reduce": _pooling_segments,
    },
}


# what the variants above import, by the names that they are installed by
LIBRARIES = (
    "cut-cross-entropy", "disentangled-flash", "flash-attn", "flash-attn-3", "flash-attn-4", "flashdeberta",
    "liger-kernel", "quack-kernels", "xformers",
)  # fmt: skip


def installed():
    """{library: version} of those that are there."""
    found = {}
    for name in LIBRARIES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def variants(op):
    """{name: function from a case's Arguments to a Run}, fastbert first. It may raise Unavailable or NotApplicable."""
    found = {"fastbert": lambda arguments: run_of(getattr(ops, op), arguments)}
    if op in PLAIN:
        found["eager"] = lambda arguments: run_of(PLAIN[op], arguments)
        found["compiled"] = lambda arguments: run_of(_compiled(PLAIN[op]), arguments)
    return found | PEERS.get(op, {})


def build(make, arguments):
    """The variant's Run; Unavailable, with the reason, where it cannot be had."""
    try:
        return make(arguments)
    except ImportError as error:
        raise Unavailable(f"not installed ({error})") from error
    except (RuntimeError, AttributeError, TypeError) as error:
        raise Unavailable(f"{type(error).__name__}: {error}".partition("\n")[0][:200]) from error
