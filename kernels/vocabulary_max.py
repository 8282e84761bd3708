"""The largest logit of each word over a text's tokens, as a weight of the word: SPLADE's vectors.

    z[b, v] = max over tokens t of text b of hidden[t] · weight[v] + bias[v],   out = log(1 + max(z, 0))
    g = dout / (1 + z) where z > 0, else 0;   o[b, v]: the token of the maximum
    dhidden[t] = sum over v of [o[b, v] = t] g[b, v] weight[v],   dweight[v] = sum over b of g[b, v] hidden[o[b, v]]

PyTorch has the logits [T, V], their relu and logarithm, and the gradients of all three in memory: at V = 250,002 and
2,048 tokens 2 GB each in fp32. Here nothing of that size exists: the forward keeps the maximum of a tile of words in
registers, and writes out, g / dout (fp32) and o (int32), 12 bytes for each text and word in fp32. Backward recomputes
nothing.

Bytes: the forward reads weight once for each text (the programs of a tile of words run side by side, so that L2 serves
all but one) and hidden once for each tile of words. `dhidden` multiplies a tile [tokens, words] that is g where o is
the token, in registers, with weight. `dweight` has B rows of hidden to add up for each word, from L2.

B texts, T packed tokens, D hidden size, V vocabulary.
"""

import torch
import triton
import triton.language as tl

from ._launch import INTERPRET, differentiable_once, launch, product_precision, register, shape_key, unit_columns


@triton.jit(do_not_specialize=["V"])
def _vocabulary_max_fwd_kernel(
    hidden_ptr, weight_ptr, bias_ptr, cu_seqlens_ptr,        # inputs
    out_ptr, slope_ptr, origin_ptr,                          # outputs [B, V]
    V, stride_ht, stride_wv,
    D: tl.constexpr, HAS_BIAS: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64)
    offs_v = tl.program_id(1).to(tl.int64) * BLOCK_V + tl.arange(0, BLOCK_V)
    mask_v = offs_v < V
    first = tl.load(cu_seqlens_ptr + b)
    end = tl.load(cu_seqlens_ptr + b + 1)

    highest = tl.full([BLOCK_V], -float("inf"), tl.float32)
    origin = tl.zeros([BLOCK_V], tl.int32)
    for start in range(first, end, BLOCK_T):
        offs_t = start + tl.arange(0, BLOCK_T)
        mask_t = offs_t < end
        logits = tl.zeros([BLOCK_V, BLOCK_T], tl.float32)
        for k in range(0, D, BLOCK_D):
            offs_d = k + tl.arange(0, BLOCK_D)
            words = tl.load(
                weight_ptr + offs_v[:, None] * stride_wv + offs_d[None, :],
                mask=mask_v[:, None] & (offs_d < D)[None, :], other=0.0,
            )  # fmt: skip
            rows = tl.load(
                hidden_ptr + offs_t[:, None].to(tl.int64) * stride_ht + offs_d[None, :],
                mask=mask_t[:, None] & (offs_d < D)[None, :], other=0.0,
            )  # fmt: skip
            if UPCAST:
                words, rows = words.to(tl.float32), rows.to(tl.float32)
            logits = tl.dot(words, tl.trans(rows), logits, input_precision=PRECISION)
        # a maximum leaves NaN out: infinity in its place is seen
        logits = tl.where(logits == logits, logits, float("inf"))
        logits = tl.where(mask_t[None, :], logits, -float("inf"))
        top = tl.max(logits, 1)
        # of equal logits the first token
        place = tl.min(tl.where(logits == top[:, None], offs_t[None, :], 2147483647), 1)
        origin = tl.where(top > highest, place, origin)
        highest = tl.maximum(top, highest)

    if HAS_BIAS:
        highest += tl.load(bias_ptr + offs_v, mask=mask_v, other=0.0).to(tl.float32)
    positive = tl.maximum(highest, 0.0)
    place = b * V + offs_v
    tl.store(out_ptr + place, tl.log(1.0 + positive), mask=mask_v)
    tl.store(slope_ptr + place, tl.where(highest > 0, 1.0 / (1.0 + positive), 0.0), mask=mask_v)
    tl.store(origin_ptr + place, origin, mask=mask_v)


@triton.jit(do_not_specialize=["V"])
def _vocabulary_max_bwd_hidden_kernel(
    dout_ptr, slope_ptr, origin_ptr, weight_ptr, cu_seqlens_ptr,     # inputs
    dhidden_ptr,                                                     # output [T, D]
    V, stride_db, stride_wv,
    D: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(1).to(tl.int64)
    first = tl.load(cu_seqlens_ptr + b)
    end = tl.load(cu_seqlens_ptr + b + 1)
    start = first + tl.program_id(0) * BLOCK_T
    offs_d = tl.program_id(2) * BLOCK_D + tl.arange(0, BLOCK_D)
    if start < end:
        offs_t = start + tl.arange(0, BLOCK_T)
        # transposed: a first operand made in registers would let each product wait for the last one
        dhidden = tl.zeros([BLOCK_D, BLOCK_T], tl.float32)
        for v in range(0, V, BLOCK_V):
            offs_v = v + tl.arange(0, BLOCK_V).to(tl.int64)
            mask_v = offs_v < V
            dout = tl.load(dout_ptr + b * stride_db + offs_v, mask=mask_v, other=0.0).to(tl.float32)
            slope = tl.load(slope_ptr + b * V + offs_v, mask=mask_v, other=0.0)
            origin = tl.load(origin_ptr + b * V + offs_v, mask=mask_v, other=-1)
            words = tl.load(
                weight_ptr + offs_v[:, None] * stride_wv + offs_d[None, :],
                mask=mask_v[:, None] & (offs_d < D)[None, :], other=0.0,
            )  # fmt: skip
            chosen = tl.where(offs_t[:, None] == origin[None, :], (dout * slope)[None, :], 0.0)
            chosen = chosen.to(words.dtype)
            if UPCAST:
                words, chosen = words.to(tl.float32), chosen.to(tl.float32)
            dhidden = tl.dot(tl.trans(words), tl.trans(chosen), dhidden, input_precision=PRECISION)
        place = offs_t[:, None].to(tl.int64) * D + offs_d[None, :]
        tl.store(dhidden_ptr + place, tl.trans(dhidden), mask=(offs_t < end)[:, None] & (offs_d < D)[None, :])


@triton.jit(do_not_specialize=["B", "V"])
def _vocabulary_max_bwd_weight_kernel(
    dout_ptr, slope_ptr, origin_ptr, hidden_ptr,     # inputs
    dweight_ptr, dbias_ptr,                          # outputs [V, D], [V]
    B, V, stride_db, stride_ht,
    D: tl.constexpr, HAS_DBIAS: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    offs_v = tl.program_id(0).to(tl.int64) * BLOCK_V + tl.arange(0, BLOCK_V)
    offs_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_v = offs_v < V
    mask_d = offs_d < D
    dweight = tl.zeros([BLOCK_V, BLOCK_D], tl.float32)
    dbias = tl.zeros([BLOCK_V], tl.float32)
    for _ in range(0, B):
        dout = tl.load(dout_ptr + offs_v, mask=mask_v, other=0.0).to(tl.float32)
        slope = tl.load(slope_ptr + offs_v, mask=mask_v, other=0.0)
        origin = tl.load(origin_ptr + offs_v, mask=mask_v, other=0).to(tl.int64)
        gradient = dout * slope
        # a word without a gradient, as of an empty text, reads no row
        rows = tl.load(
            hidden_ptr + origin[:, None] * stride_ht + offs_d[None, :],
            mask=(slope > 0)[:, None] & mask_d[None, :], other=0.0,
        )  # fmt: skip
        dweight += gradient[:, None] * rows.to(tl.float32)
        dbias += gradient
        dout_ptr += stride_db
        slope_ptr += V
        origin_ptr += V
    tl.store(dweight_ptr + offs_v[:, None] * D + offs_d[None, :], dweight, mask=mask_v[:, None] & mask_d[None, :])
    if HAS_DBIAS:
        tl.store(dbias_ptr + offs_v, dbias, mask=mask_v & (tl.program_id(1) == 0))


def _products(dtype):
    # the interpreter's product of bf16 is wrong
    return dict(PRECISION=product_precision(dtype), UPCAST=INTERPRET and dtype == torch.bfloat16)


def _block_d(D, most):
    return min(max(triton.next_power_of_2(D), 16), most)


def _empty_fwd(hidden, weight, bias, cu_seqlens):
    """The uninitialised results of vocabulary_max_fwd; also its fake for torch.compile."""
    shape, new = (cu_seqlens.shape[0] - 1, weight.shape[0]), dict(device=hidden.device)
    out = torch.empty(shape, dtype=hidden.dtype, **new)
    return out, torch.empty(shape, dtype=torch.float32, **new), torch.empty(shape, dtype=torch.int32, **new)


def vocabulary_max_fwd(hidden, weight, bias, cu_seqlens):
    """(out [B, V] in hidden's dtype, slope fp32 [B, V], origin int32 [B, V]): see the formula; slope is g / dout."""
    (V, D), B = weight.shape, len(cu_seqlens) - 1
    out, slope, origin = _empty_fwd(hidden, weight, bias, cu_seqlens)
    if B == 0 or V == 0:
        return out, slope, origin
    hidden, weight, cu_seqlens = unit_columns(hidden), unit_columns(weight), cu_seqlens.contiguous()
    bias = bias if bias is None else bias.contiguous()

    def run(settings):
        _vocabulary_max_fwd_kernel[(B, triton.cdiv(V, settings["BLOCK_V"]))](
            hidden, weight, bias, cu_seqlens, out, slope, origin, V, hidden.stride(0), weight.stride(0),
            D=D, HAS_BIAS=bias is not None, **_products(hidden.dtype), **settings,
        )  # fmt: skip

    block_d = _block_d(D, 128 // hidden.element_size())
    default = dict(BLOCK_T=64, BLOCK_V=128, BLOCK_D=block_d, num_warps=4, num_stages=3)
    if hidden.dtype == torch.float32:
        default |= dict(BLOCK_T=32, BLOCK_V=64)
    others = [dict(BLOCK_T=t, BLOCK_V=v, num_warps=w) for t in (32, 64) for v in (64, 128) for w in (4, 8)]
    launch(run, "vocabulary_max_fwd", shape_key(hidden, D), default, [default | one for one in others])
    return out, slope, origin


def vocabulary_max_bwd(dout, hidden, weight, cu_seqlens, slope, origin, max_seqlen, wants):
    """(dhidden [T, D], dweight [V, D], dbias fp32 [V]). wants: whether each is wanted; the others are empty."""
    (T, D), V, B = hidden.shape, len(weight), len(cu_seqlens) - 1
    for_hidden, for_weight, for_bias = wants
    # rows of no sequence have no gradient
    dhidden = torch.zeros((T, D) if for_hidden else 0, dtype=hidden.dtype, device=hidden.device)
    dweight = torch.zeros((V, D) if for_weight or for_bias else 0, dtype=weight.dtype, device=hidden.device)
    dbias = torch.zeros(V if for_bias else 0, dtype=torch.float32, device=hidden.device)
    if B == 0 or V == 0 or T == 0:
        return dhidden, dweight if for_weight else dweight.new_empty(0), dbias
    hidden, weight, dout = unit_columns(hidden), unit_columns(weight), unit_columns(dout)
    cu_seqlens = cu_seqlens.contiguous()

    def run_hidden(settings):
        blocks = triton.cdiv(max(max_seqlen, 1), settings["BLOCK_T"]), B, triton.cdiv(D, settings["BLOCK_D"])
        _vocabulary_max_bwd_hidden_kernel[blocks](
            dout, slope, origin, weight, cu_seqlens, dhidden, V, dout.stride(0), weight.stride(0),
            D=D, **_products(hidden.dtype), **settings,
        )  # fmt: skip

    def run_weight(settings):
        _vocabulary_max_bwd_weight_kernel[(triton.cdiv(V, settings["BLOCK_V"]), triton.cdiv(D, settings["BLOCK_D"]))](
            dout, slope, origin, hidden, dweight, dbias, B, V, dout.stride(0), hidden.stride(0),
            D=D, HAS_DBIAS=for_bias, **settings,
        )  # fmt: skip

    if for_hidden:
        default = dict(BLOCK_T=64, BLOCK_V=64, BLOCK_D=_block_d(D, 128), num_warps=4, num_stages=3)
        if hidden.dtype == torch.float32:
            default |= dict(BLOCK_T=32, BLOCK_V=32, BLOCK_D=_block_d(D, 64))
        others = [dict(BLOCK_T=t, BLOCK_V=v, num_warps=w) for t in (32, 64) for v in (32, 64) for w in (4, 8)]
        launch(run_hidden, "vocabulary_max_bwd_hidden", shape_key(hidden, D), default, [default | x for x in others])
    if for_weight or for_bias:
        default = dict(BLOCK_V=16, BLOCK_D=_block_d(D, 128), num_warps=4)
        others = [dict(BLOCK_V=v, num_warps=w) for v in (8, 16, 32) for w in (2, 4, 8)]
        launch(run_weight, "vocabulary_max_bwd_weight", shape_key(hidden, D), default, [default | x for x in others])
    return dhidden, dweight if for_weight else dweight.new_empty(0), dbias


def _bwd_fake(dout, hidden, weight, cu_seqlens, slope, origin, max_seqlen, wants):
    for_hidden, for_weight, for_bias = wants
    return (
        hidden.new_empty(hidden.shape if for_hidden else 0), weight.new_empty(weight.shape if for_weight else 0),
        hidden.new_empty(len(weight) if for_bias else 0, dtype=torch.float32),
    )  # fmt: skip


_fwd = register(
    "vocabulary_max_fwd(Tensor hidden, Tensor weight, Tensor? bias, Tensor cu_seqlens) -> (Tensor, Tensor, Tensor)",
    vocabulary_max_fwd,
    _empty_fwd,
)
_bwd = register(
    "vocabulary_max_bwd(Tensor dout, Tensor hidden, Tensor weight, Tensor cu_seqlens, Tensor slope, Tensor origin, "
    "SymInt max_seqlen, bool[] wants) -> (Tensor, Tensor, Tensor)",
    vocabulary_max_bwd,
    _bwd_fake,
)


class VocabularyMaxFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, cu_seqlens, max_seqlen):
        out, slope, origin = _fwd(hidden, weight, bias, cu_seqlens)
        ctx.save_for_backward(hidden, weight, cu_seqlens, slope, origin)
        ctx.max_seqlen, ctx.dtype = max_seqlen, None if bias is None else bias.dtype
        return out

    @staticmethod
    @differentiable_once("vocabulary_max")
    def backward(ctx, dout):
        wants = list(ctx.needs_input_grad[:3])
        made = _bwd(dout, *ctx.saved_tensors, ctx.max_seqlen, wants)
        dhidden, dweight, dbias = (x if wanted else None for x, wanted in zip(made, wants))
        return dhidden, dweight, dbias if dbias is None else dbias.to(ctx.dtype), None, None


def vocabulary_max(hidden, weight, bias, cu_seqlens, max_seqlen):
    """log(1 + relu(max over a text's tokens of hidden @ weightᵀ + bias)), see `fastbert/reference_heads.py`.

    hidden [T, D] and weight [V, D] in fp32, fp16 or bf16, of one dtype, any strides; bias [V] or None; cu_seqlens int32
    [B+1], no sequence longer than max_seqlen. Returns [B, V] in hidden's dtype. Differentiable once.
    """
    return VocabularyMaxFunction.apply(hidden, weight, bias, cu_seqlens, max_seqlen)
