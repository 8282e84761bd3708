"""Masked cross-entropy over a large vocabulary: projection, loss and gradients without ever holding the logits.

    logits = hidden weightᵀ + bias                                            [M, V], made in chunks of ROWS rows
    loss   = logsumexp(logits) - (1 - e) logits[label] - e mean(logits)       e is the label smoothing
    dlogits = softmax(logits) - e / V - (1 - e) [column = label]              written over the chunk of logits
    dhidden = dlogits weight,   dweight = dlogitsᵀ hidden,   dbias = column sums of dlogits

PyTorch holds the logits, their log-probabilities and their gradient, 3 * M * V elements at once. Here one buffer of
[ROWS, V] in the input's dtype serves every chunk, and forward already makes the gradients, which backward only scales:
nothing is recomputed. Matrix products are the library's; around them each logit is read by `fwd`, and read and written
by `bwd`, which also sums the columns for dbias: 3 * M * V elements of traffic (6 bytes a logit in bf16, 2 without
gradients) beside the products' own. A row whose label is `ignore_index` costs as much as any other and counts nowhere:
hand in the picked rows.

M rows, D hidden size, V vocabulary.
"""

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

from ._launch import register

# Rows of logits in memory at once: 250 MB in bf16 at V = 30522. Each further chunk adds its share of dweight to the sum
# (fp32, 94 MB at D = 768), which costs a tenth of the time of the chunk's products at 4096 rows and a third at 1024.
ROWS = 4096

# Rows that one program of the backward kernel walks, and leaves one fp32 partial sum of dbias for, per column.
ROW_GROUP = 128


@triton.jit
def _masked_cross_entropy_fwd_kernel(
    logits_ptr, bias_ptr, label_ptr,                 # inputs; logits [rows, stride_logits] without the bias
    loss_ptr, correct_ptr, maximum_ptr, total_ptr,   # outputs [rows]; softmax = exp(logit - maximum) / total
    V, stride_logits, ignore_index, label_smoothing,
    HAS_SMOOTHING: tl.constexpr,
    BLOCK_V: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * stride_logits
    label = tl.load(label_ptr + row)
    picked = label != ignore_index
    at_label = tl.load(logits_ptr + label, mask=picked, other=0.0).to(tl.float32)
    at_label += tl.load(bias_ptr + label, mask=picked, other=0.0).to(tl.float32)

    # Every lane follows its own columns and the lanes are joined at the end: no reduction inside the loop. Of the two
    # factors exp(maximum - new maximum) and exp(x - new maximum) one is always 1, so each logit costs one exponential.
    # A finite start keeps -inf logits, banned words, from making inf - inf.
    maximum = tl.full([BLOCK_V], -3.0e38, tl.float32)
    total = tl.zeros([BLOCK_V], tl.float32)
    best = tl.zeros([BLOCK_V], tl.int32)
    summed = tl.zeros([BLOCK_V], tl.float32)
    for start in range(0, V, BLOCK_V):
        offs_v = start + tl.arange(0, BLOCK_V)
        # a mask at the row's padded end, a multiple of 64, leaves loads of 16 bytes whole; at V it would split them up
        mask = offs_v < stride_logits
        x = tl.load(logits_ptr + offs_v, mask=mask).to(tl.float32)
        x += tl.load(bias_ptr + offs_v, mask=mask).to(tl.float32)
        x = tl.where(offs_v < V, x, -float("inf"))
        above = x > maximum
        smaller = tl.exp(-tl.abs(x - maximum))
        total = tl.where(above, total * smaller + 1.0, total + smaller)
        best = tl.where(above, offs_v, best)
        maximum = tl.where(above, x, maximum)
        if HAS_SMOOTHING:
            summed += tl.where(offs_v < V, x, 0.0)

    row_maximum = tl.max(maximum, 0)
    row_total = tl.sum(total * tl.exp(maximum - row_maximum), 0)
    # of equal maxima the first counts, as in torch.argmax
    prediction = tl.min(tl.where(maximum == row_maximum, best, V), 0)

    # written relative to the maximum, the loss of a row of large logits keeps its digits
    loss = tl.log(row_total) + (1.0 - label_smoothing) * (row_maximum - at_label)
    if HAS_SMOOTHING:
        loss += label_smoothing * (row_maximum - tl.sum(summed, 0) / V)
    tl.store(loss_ptr + row, tl.where(picked, loss, 0.0))
    tl.store(correct_ptr + row, (picked & (prediction == label)).to(tl.int32))
    tl.store(maximum_ptr + row, row_maximum)
    tl.store(total_ptr + row, row_total)


@triton.jit(do_not_specialize=["rows"])
def _masked_cross_entropy_bwd_kernel(
    logits_ptr, bias_ptr, label_ptr, maximum_ptr, total_ptr,   # inputs; logits are overwritten with their gradient
    dbias_ptr,                                                 # output [row groups, stride_logits]: partial sums
    rows, V, stride_logits, ignore_index, label_smoothing,
    ROW_GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_V: tl.constexpr,
):  # fmt: skip
    group = tl.program_id(1).to(tl.int64)
    offs_v = tl.program_id(0) * BLOCK_V + tl.arange(0, BLOCK_V)
    mask_v = offs_v < stride_logits
    bias = tl.load(bias_ptr + offs_v, mask=mask_v).to(tl.float32)
    # each row of the tile has its own share until the end, so that nothing crosses warps inside the loop
    dbias = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)

    for start in range(0, ROW_GROUP, BLOCK_M):
        offs_m = group * ROW_GROUP + start + tl.arange(0, BLOCK_M)
        mask_m = offs_m < rows
        label = tl.load(label_ptr + offs_m, mask=mask_m, other=ignore_index)
        maximum = tl.load(maximum_ptr + offs_m, mask=mask_m, other=0.0)
        total = tl.load(total_ptr + offs_m, mask=mask_m, other=1.0)

        tile = logits_ptr + offs_m[:, None] * stride_logits + offs_v[None, :]
        mask = mask_m[:, None] & mask_v[None, :]
        x = tl.load(tile, mask=mask).to(tl.float32) + bias[None, :]
        dlogits = tl.exp(x - maximum[:, None]) * (1.0 / total)[:, None] - label_smoothing / V
        dlogits = tl.where(offs_v[None, :] == label[:, None], dlogits - (1.0 - label_smoothing), dlogits)
        # a select, not a product: whatever an ignored row holds, its gradient is 0
        dlogits = tl.where((label != ignore_index)[:, None], dlogits, 0.0)
        dbias += dlogits
        tl.store(tile, dlogits, mask=mask)

    tl.store(dbias_ptr + group * stride_logits + offs_v, tl.sum(dbias, 0), mask=mask_v)


def masked_cross_entropy_fwd(hidden, weight, bias, labels, ignore_index, label_smoothing, gradients):
    """(loss_sum, count, correct, dhidden, dweight, dbias): the last two fp32; no `gradients`, the last three empty."""
    (M, D), V = hidden.shape, weight.shape[0]
    picked = labels != ignore_index
    # an ignored row may hold anything, and 0 * NaN in the product for dweight would be NaN
    hidden = hidden.masked_fill(~picked[:, None], 0.0)
    fp32 = dict(dtype=torch.float32, device=hidden.device)
    # rows are padded to a multiple of 64 elements, whatever V, so that vector loads and tensor cores find them aligned
    padded = triton.cdiv(V, 64) * 64
    buffer = torch.empty(min(M, ROWS), padded, dtype=hidden.dtype, device=hidden.device)
    labels, bias = labels.contiguous(), torch.nn.functional.pad(bias, (0, padded - V))
    maximum, total = (torch.empty(min(M, ROWS), **fp32) for _ in range(2))
    loss, correct = torch.empty(M, **fp32), torch.empty(M, dtype=torch.int32, device=hidden.device)
    dhidden = torch.empty((M, D) if gradients else 0, dtype=hidden.dtype, device=hidden.device)
    dweight, dbias = torch.empty(0, **fp32), torch.empty(0, **fp32)

    # without any row one empty chunk runs: its products are the zeros that are wanted
    for start in range(0, max(M, 1), ROWS):
        chunk = slice(start, min(start + ROWS, M))
        rows = chunk.stop - chunk.start
        logits = buffer[:rows, :V]
        torch.mm(hidden[chunk], weight.T, out=logits)
        _masked_cross_entropy_fwd_kernel[(rows,)](
            logits, bias, labels[chunk], loss[chunk], correct[chunk], maximum, total,
            V, padded, ignore_index, label_smoothing,
            HAS_SMOOTHING=label_smoothing > 0.0, BLOCK_V=min(triton.next_power_of_2(V), 2048), num_warps=8,
        )  # fmt: skip
        if not gradients:
            continue
        block_v, groups = min(triton.next_power_of_2(V), 256), triton.cdiv(rows, ROW_GROUP)
        partial = torch.empty(groups, padded, **fp32)
        _masked_cross_entropy_bwd_kernel[(triton.cdiv(V, block_v), groups)](
            logits, bias, labels[chunk], maximum, total, partial,
            rows, V, padded, ignore_index, label_smoothing,
            ROW_GROUP=ROW_GROUP, BLOCK_M=8, BLOCK_V=block_v, num_warps=4,
        )  # fmt: skip
        torch.mm(logits, weight, out=dhidden[chunk])
        shares = _fp32_product(logits.T, hidden[chunk]), partial[:, :V].sum(0)
        dweight, dbias = shares if start == 0 else (dweight.add_(shares[0]), dbias.add_(shares[1]))
    return loss.sum(), picked.sum(), correct.sum(), dhidden, dweight, dbias


def _fp32_product(a, b):
    """a b in fp32. The fp32 sums of a 16-bit product are to be had only on a GPU; elsewhere they come rounded."""
    if a.is_cuda and a.dtype != torch.float32:
        return torch.mm(a, b, out_dtype=torch.float32)
    return torch.mm(a, b).float()


def _masked_cross_entropy_fake(hidden, weight, bias, labels, ignore_index, label_smoothing, gradients):
    wide = dict(dtype=torch.float32)
    loss_sum = hidden.new_empty((), **wide)
    count, correct = (hidden.new_empty((), dtype=torch.int64) for _ in range(2))
    if not gradients:
        return loss_sum, count, correct, hidden.new_empty(0), hidden.new_empty(0, **wide), hidden.new_empty(0, **wide)
    dweight, dbias = hidden.new_empty(weight.shape, **wide), hidden.new_empty(weight.shape[0], **wide)
    return loss_sum, count, correct, hidden.new_empty(hidden.shape), dweight, dbias


_fwd = register(
    "masked_cross_entropy_fwd(Tensor hidden, Tensor weight, Tensor bias, Tensor labels, int ignore_index, "
    "float label_smoothing, bool gradients) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    masked_cross_entropy_fwd,
    _masked_cross_entropy_fake,
)


class MaskedCrossEntropyFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, labels, ignore_index, label_smoothing, gradients):
        loss_sum, count, correct, *saved = _fwd(hidden, weight, bias, labels, ignore_index, label_smoothing, gradients)
        ctx.save_for_backward(*saved)
        ctx.dtypes = hidden.dtype, weight.dtype, bias.dtype
        ctx.mark_non_differentiable(count, correct)
        return loss_sum, count, correct

    @staticmethod
    @once_differentiable
    def backward(ctx, dloss, dcount, dcorrect):
        # out of place, so that a second backward finds them as they were; cast after the scale, which the loss's mean
        # brings: a sum over thousands of rows may not fit in fp16
        dhidden, dweight, dbias = ((grad * dloss).to(dtype) for grad, dtype in zip(ctx.saved_tensors, ctx.dtypes))
        return dhidden, dweight, dbias, None, None, None, None


def masked_cross_entropy(hidden, weight, bias, labels, *, ignore_index=-100, label_smoothing=0.0):
    """Cross-entropy of `hidden @ weightᵀ + bias` against `labels`, over the rows whose label is not `ignore_index`.

    hidden [M, D], weight [V, D] and bias [V] in fp32, fp16 or bf16, all of one dtype, any strides; labels int64 [M], in
    0 .. V - 1 or `ignore_index` (anything else is undefined). Returns `(loss_sum, count, correct)`, 0-dimensional: the
    losses' sum (fp32, natural log), how many rows had a label, and how many of those were predicted right (int64).
    Never waits for the device; the same inputs give the same bits; not differentiable twice.

    Source: the chunks of Liger-Kernel's fused linear cross-entropy (Hsu et al. 2024); the label smoothing of Szegedy et
    al. 2016, section 7, as torch.nn.functional.cross_entropy has it.
    """
    # asked here: inside a Function gradient mode is off, and Parameters want gradients even under no_grad
    gradients = torch.is_grad_enabled() and any(x.requires_grad for x in (hidden, weight, bias))
    return MaskedCrossEntropyFunction.apply(hidden, weight, bias, labels, ignore_index, label_smoothing, gradients)
