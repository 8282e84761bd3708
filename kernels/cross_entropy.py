"""Masked cross-entropy over a large vocabulary: projection, loss and gradients without all logits in memory.

    logits = scale hidden weightᵀ + bias                                      [M, V], computed in chunks of rows
    loss   = L - (1 - e) logits[label] - e mean(logits)                       L = logsumexp(logits), e label smoothing
    dlogits = softmax(logits) - e / V - (1 - e) [column = label]              written over the chunk of logits
    dhidden = scale dlogits weight,   dweight = scale dlogitsᵀ hidden,   dbias = column sums of dlogits

PyTorch has the logits, their log-probabilities and their gradient in memory, 3 * M * V elements. Here one buffer serves
all chunks, each some thousand rows over the whole vocabulary. torch computes the matrix products. Around them `fwd`
reads each logit once, and `bwd` reads and writes it and sums the columns for dbias: 3 * M * V elements of traffic (6
bytes per logit in bf16, 2 without gradients) in addition to the products'. The forward computes the gradients, and the
backward only scales them: 3 products, nothing is recomputed. Peak memory: the buffer (BUFFER bytes or 2 D rows,
whichever is more), dweight in fp32, dhidden.

Rows without a label cost as much as any other row, so pass picked rows only. `contrastive_cross_entropy` is the same
loss over documents instead of words. Its scores are fp32, because a scale of 20 to 100 would magnify rounding errors
(10 bytes of traffic per score in half precision, not 6).

M rows, D hidden size, V vocabulary, B queries, N documents.
"""

import torch
import triton
import triton.language as tl

from ._launch import differentiable_once, launch, register

# Rows of logits in memory at once, if they take at most BUFFER bytes. Each further chunk adds its share of dweight to
# the sum (fp32, 94 MB at D = 768), which takes a tenth of the time of the chunk's products at 4096 rows and a third at
# 1024.
ROWS = 4096
BUFFER = 1 << 28

# rows per program of the backward kernel, which writes one fp32 partial sum of dbias per column
ROW_GROUP = 128

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _joined(x, group, maximum, total, best):
    """Update each lane's (maximum, sum of exp(x - maximum), first word of the first group with the maximum) with x.

    x [lanes, GROUP], fp32; the others [lanes]. exp2 takes 1 instruction; exp takes 5, to handle subnormal results. The
    maximum is subtracted before the multiplication by log2(e), so that large logits keep their digits.
    """
    top = tl.max(x, 1)
    larger = tl.maximum(maximum, top)
    total = total * tl.exp2((maximum - larger) * LOG2_E) + tl.sum(tl.exp2((x - larger[:, None]) * LOG2_E), 1)
    return larger, total, tl.where(top > maximum, group, best)


@triton.jit
def _masked_cross_entropy_fwd_kernel(
    logits_ptr, scale_ptr, bias_ptr, label_ptr,      # inputs; logits [rows, stride_logits] without scale and bias
    loss_ptr, correct_ptr,                           # outputs [rows]
    maximum_ptr, total_ptr,                          # outputs [rows]; softmax = exp(logit - maximum) / total
    padded, V, stride_logits, ignore_index, label_smoothing,
    HAS_SCALE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SMOOTHING: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_V: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * stride_logits
    label = tl.load(label_ptr + row).to(tl.int64)
    picked = label != ignore_index
    scale = 1.0
    if HAS_SCALE:
        scale = tl.load(scale_ptr)

    # Every lane reads groups of GROUP adjacent words, 16 bytes, and the lanes are combined at the end: no reduction in
    # the loop leaves a thread. The start is finite, so that -inf logits, banned words, give no inf - inf.
    R: tl.constexpr = BLOCK_V // GROUP
    maximum = tl.full([R], -3.0e38, tl.float32)
    total = tl.zeros([R], tl.float32)
    best = tl.zeros([R], tl.int32)
    summed = tl.zeros([R], tl.float32)
    offs_r = tl.arange(0, R) * GROUP
    offs_v = offs_r[:, None] + tl.arange(0, GROUP)[None, :]
    whole = V // BLOCK_V * BLOCK_V
    for start in range(0, whole, BLOCK_V):
        x = tl.load(logits_ptr + start + offs_v).to(tl.float32) * scale
        if HAS_BIAS:
            x += tl.load(bias_ptr + start + offs_v).to(tl.float32)
        if HAS_SMOOTHING:
            summed += tl.sum(x, 1)
        maximum, total, best = _joined(x, start + offs_r, maximum, total, best)
    for start in range(whole, V, BLOCK_V):
        # a mask at the row's padded end, a multiple of 64, keeps 16-byte loads; a mask at V would split them
        mask = start + offs_v < padded
        x = tl.load(logits_ptr + start + offs_v, mask=mask).to(tl.float32) * scale
        if HAS_BIAS:
            x += tl.load(bias_ptr + start + offs_v, mask=mask).to(tl.float32)
        if HAS_SMOOTHING:
            summed += tl.sum(tl.where(start + offs_v < V, x, 0.0), 1)
        x = tl.where(start + offs_v < V, x, -float("inf"))
        maximum, total, best = _joined(x, start + offs_r, maximum, total, best)

    row_maximum = tl.max(maximum, 0)
    row_total = tl.sum(total * tl.exp2((maximum - row_maximum) * LOG2_E), 0)
    row_sum = tl.sum(summed, 0)
    # Read again the first group with the maximum, whose first maximum is the prediction, as in torch.argmax, and the
    # label's logit. A label outside the vocabulary gives NaN.
    group = tl.min(tl.where(maximum == row_maximum, best, V), 0)
    is_word = picked & (label >= 0) & (label < V)
    offs_g = tl.arange(0, 2 * GROUP)
    in_group = (offs_g < GROUP) & (group + offs_g < V)
    at = tl.where(offs_g < GROUP, group + offs_g, label)
    mask = in_group | ((offs_g == GROUP) & is_word)
    x = tl.load(logits_ptr + at, mask=mask, other=0.0).to(tl.float32) * scale
    if HAS_BIAS:
        x += tl.load(bias_ptr + at, mask=mask, other=0.0).to(tl.float32)
    at_label = tl.where(is_word, tl.sum(tl.where(offs_g == GROUP, x, 0.0), 0), float("nan"))
    x = tl.where(in_group, x, -float("inf"))
    prediction = tl.min(tl.where(in_group & (x == tl.max(x, 0)), group + offs_g, V), 0)

    # relative to the maximum, the loss of a row with large logits keeps its digits
    loss = tl.log(row_total) + (1.0 - label_smoothing) * (row_maximum - at_label)
    if HAS_SMOOTHING:
        loss += label_smoothing * (row_maximum - row_sum / V)
    tl.store(loss_ptr + row, tl.where(picked, loss, 0.0))
    tl.store(correct_ptr + row, (picked & (prediction == label)).to(tl.int32))
    tl.store(maximum_ptr + row, row_maximum)
    tl.store(total_ptr + row, row_total)


@triton.jit(do_not_specialize=["rows"])
def _masked_cross_entropy_bwd_kernel(
    logits_ptr, scale_ptr, bias_ptr, label_ptr, maximum_ptr, total_ptr,   # inputs
    dlogits_ptr, dbias_ptr,                                  # outputs; dlogits may be logits; dbias [groups, padded]
    rows, padded, V, stride_logits, stride_dlogits, ignore_index, label_smoothing,
    HAS_SCALE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_DBIAS: tl.constexpr,
    ROW_GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_V: tl.constexpr,
):  # fmt: skip
    group = tl.program_id(1).to(tl.int64)
    offs_v = tl.program_id(0) * BLOCK_V + tl.arange(0, BLOCK_V)
    mask_v = offs_v < padded
    scale = 1.0
    if HAS_SCALE:
        scale = tl.load(scale_ptr)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + offs_v, mask=mask_v).to(tl.float32)
    # until the end each row of the tile has its own sums, so that nothing crosses warps inside the loop
    dbias = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)

    for start in range(0, ROW_GROUP, BLOCK_M):
        offs_m = group * ROW_GROUP + start + tl.arange(0, BLOCK_M)
        mask_m = offs_m < rows
        label = tl.load(label_ptr + offs_m, mask=mask_m, other=ignore_index).to(tl.int64)
        maximum = tl.load(maximum_ptr + offs_m, mask=mask_m, other=0.0)
        total = tl.load(total_ptr + offs_m, mask=mask_m, other=1.0)
        factor = 1.0 / total

        mask = mask_m[:, None] & mask_v[None, :]
        x = tl.load(logits_ptr + offs_m[:, None] * stride_logits + offs_v[None, :], mask=mask).to(tl.float32) * scale
        if HAS_BIAS:
            x += bias[None, :]
        dlogits = tl.exp2((x - maximum[:, None]) * LOG2_E) * factor[:, None] - label_smoothing / V
        dlogits = tl.where(offs_v[None, :] == label[:, None], dlogits - (1.0 - label_smoothing), dlogits)
        # a select, not a product: an ignored row may hold anything, and its gradient is 0
        dlogits = tl.where((label != ignore_index)[:, None], dlogits, 0.0)
        if HAS_DBIAS:
            dbias += dlogits
        tl.store(dlogits_ptr + offs_m[:, None] * stride_dlogits + offs_v[None, :], dlogits, mask=mask)

    if HAS_DBIAS:
        tl.store(dbias_ptr + group * padded + offs_v, tl.sum(dbias, 0), mask=mask_v)


def _fwd_chunk(logits, scale, bias, labels, state, V, options):
    """Write the loss, correct, maximum and total [rows] of `state`."""
    rows = len(logits)
    block_v = min(max(triton.next_power_of_2(V), 64), 2048)

    def run(settings):
        _masked_cross_entropy_fwd_kernel[(rows,)](
            logits, scale, bias, labels, *state,
            logits.shape[1], V, logits.stride(0), *options,
            HAS_SCALE=scale is not None, HAS_BIAS=bias is not None, HAS_SMOOTHING=options[1] != 0.0,
            GROUP=16 // logits.element_size(), **settings,
        )  # fmt: skip

    launch(
        run, "masked_cross_entropy_fwd", _key(logits), dict(BLOCK_V=block_v, num_warps=max(block_v // 256, 1)),
        [dict(BLOCK_V=block, num_warps=warps) for block in (1024, 2048, 4096) for warps in (4, 8, 16)], state,
    )  # fmt: skip


def _bwd_chunk(logits, dlogits, scale, bias, labels, maximum, total, V, options, for_bias):
    """Write the gradient of the logits to `dlogits`, which may be `logits`. Returns its column sums, or None."""
    rows, padded = logits.shape
    groups = triton.cdiv(rows, ROW_GROUP)
    partial = torch.empty((groups, padded) if for_bias else 0, dtype=torch.float32, device=logits.device)

    def run(settings):
        _masked_cross_entropy_bwd_kernel[(triton.cdiv(V, settings["BLOCK_V"]), groups)](
            logits, scale, bias, labels, maximum, total,
            dlogits, partial,
            rows, padded, V, logits.stride(0), dlogits.stride(0), *options,
            HAS_SCALE=scale is not None, HAS_BIAS=bias is not None, HAS_DBIAS=for_bias,
            ROW_GROUP=ROW_GROUP, **settings,
        )  # fmt: skip

    launch(
        run, "masked_cross_entropy_bwd", _key(logits),
        dict(BLOCK_M=8, BLOCK_V=min(max(triton.next_power_of_2(V), 64), 256), num_warps=4),
        [dict(BLOCK_M=m, BLOCK_V=v, num_warps=w) for m in (4, 8, 16) for v in (128, 256, 512) for w in (4, 8)],
        [logits] if dlogits is logits else [],
    )  # fmt: skip
    return partial[:, :V].sum(0) if for_bias else None


def _key(logits):
    return f"{str(logits.dtype).removeprefix('torch.')} V={logits.shape[1]}"


def product(out, a, b, add=False):
    """Write a b to out, or add it. out has the dtype of a and b, or is fp32 and gets sums that are not rounded."""
    if out.dtype == a.dtype:
        return torch.addmm(out, a, b, out=out) if add else torch.mm(a, b, out=out)
    if a.is_cuda and torch.version.hip is None:
        if add:
            return torch.addmm(out, a, b, out_dtype=torch.float32, out=out)
        return torch.mm(a, b, out_dtype=torch.float32, out=out)
    # on other devices a product in half precision is rounded
    exact = torch.mm(a.float(), b.float())
    return out.add_(exact) if add else out.copy_(exact)


def _scaled(gradient, factor, dtype):
    # Rounded once, after the multiplication: the factor includes the mean, and a sum over thousands of rows may
    # overflow fp16. As a tensor with dimensions the factor stays fp32 in the product, and `out` makes it one pass.
    factor = factor.reshape([1] * gradient.dim())
    return torch.mul(gradient, factor, out=gradient.new_empty(gradient.shape, dtype=dtype))


def score_buffers(M, V, hidden, scale, gradients):
    """(scores, dscores), [rows of a chunk, V padded]: one tensor if their dtypes are equal; dscores None without
    gradients. Rows are padded to a multiple of 64 elements, to align them for vector loads and tensor cores.
    """
    padded = triton.cdiv(V, 64) * 64
    # a scale magnifies the rounding of the scores: then they are fp32, and their gradient has its own buffer
    apart = scale is not None and hidden.dtype != torch.float32
    size = hidden.element_size() + (4 if apart else 0)
    most = min(ROWS, max(BUFFER // max(padded * size, 1), 2 * hidden.shape[1], 1))
    # even chunks: adding the share of dweight takes as long for a short chunk as for a long one
    even = triton.cdiv(M, max(triton.cdiv(M, most), 1))
    rows = max(min(most, M, triton.cdiv(even, 128) * 128), 1)
    new = dict(device=hidden.device)
    scores = torch.empty(rows, padded, dtype=torch.float32 if apart else hidden.dtype, **new)
    if not gradients:
        return scores, None
    return scores, torch.empty(rows, padded, dtype=hidden.dtype, **new) if apart else scores


def _exclude(logits, pairs, start):
    """Write -inf to the scores of `pairs`, int64 [P, 2], of a row, counted from `start`, and a column."""
    rows = pairs[:, 0] - start
    # the size of a boolean index would have to be waited for: what is not in this chunk adds 0
    is_here = (rows >= 0) & (rows < len(logits))
    off = logits.new_zeros(len(pairs)).masked_fill(is_here, -float("inf"))
    logits.index_put_((rows.where(is_here, 0), pairs[:, 1].where(is_here, 0)), off, accumulate=True)


def _without_ignored(x, labels, ignore_index):
    # an ignored row may hold anything, and 0 * NaN is NaN in a product over rows
    return x.masked_fill((labels == ignore_index)[:, None], 0.0)


def _padded(bias):
    """The bias [V] padded to a multiple of 64, so that loads stay wide."""
    return bias if bias is None else torch.nn.functional.pad(bias, (0, -len(bias) % 64))


def masked_cross_entropy_fwd(hidden, weight, bias, labels, scale, excluded, ignore_index, label_smoothing, wants):
    """(loss_sum, correct, dhidden, dweight, dbias, dscale), the last four for a loss gradient of 1.

    dweight, dbias and dscale are fp32. dhidden and dweight are not yet multiplied by the scale. wants: whether hidden,
    weight, bias and scale require a gradient; the others are empty.
    """
    M, V = len(labels), len(weight)
    for_hidden, for_weight, for_bias, for_scale = wants
    options = ignore_index, label_smoothing
    labels, bias = labels.contiguous(), _padded(bias)
    scores, dscores = score_buffers(M, V, hidden, scale, any(wants))
    fp32 = dict(dtype=torch.float32, device=hidden.device)
    loss, maximum, total = (torch.empty(M, **fp32) for _ in range(3))
    correct = torch.empty(M, dtype=torch.int32, device=hidden.device)
    dhidden = hidden.new_empty(hidden.shape if for_hidden or for_scale else 0)
    dweight = (torch.empty if M else torch.zeros)(weight.shape if for_weight else 0, **fp32)
    dbias, dscale = torch.zeros(V if for_bias else 0, **fp32), torch.zeros(() if for_scale else 0, **fp32)

    for start in range(0, M, len(scores)):
        chunk = slice(start, min(start + len(scores), M))
        x, targets, logits = hidden[chunk], labels[chunk], scores[: chunk.stop - start]
        state = [part[chunk] for part in (loss, correct, maximum, total)]
        product(logits[:, :V], x, weight.T)
        if excluded is not None:
            _exclude(logits, excluded, start)
        _fwd_chunk(logits, scale, bias, targets, state, V, options)
        if dscores is None:
            continue
        dlogits = logits if dscores is scores else dscores[: len(x)]
        sums = _bwd_chunk(logits, dlogits, scale, bias, targets, *state[2:], V, options, for_bias)
        dlogits, x = dlogits[:, :V], _without_ignored(x, targets, ignore_index)
        if for_hidden or for_scale:
            product(dhidden[chunk], dlogits, weight)
        if for_weight:
            product(dweight, dlogits.T, x, add=start > 0)
        if for_bias:
            dbias += sums
        if for_scale:
            dscale += (x.float() * dhidden[chunk]).sum()
    return loss.sum(), correct.sum(), dhidden, dweight, dbias, dscale


def _masked_cross_entropy_fwd_fake(hidden, weight, bias, labels, scale, excluded, ignore_index, label_smoothing, wants):
    wide = dict(dtype=torch.float32)
    for_hidden, for_weight, for_bias, for_scale = wants
    return (
        hidden.new_empty((), **wide), hidden.new_empty((), dtype=torch.int64),
        hidden.new_empty(hidden.shape if for_hidden or for_scale else 0),
        hidden.new_empty(weight.shape if for_weight else 0, **wide),
        hidden.new_empty(len(weight) if for_bias else 0, **wide),
        hidden.new_empty(() if for_scale else 0, **wide),
    )  # fmt: skip


_fwd = register(
    "masked_cross_entropy_fwd(Tensor hidden, Tensor weight, Tensor? bias, Tensor labels, Tensor? scale, "
    "Tensor? excluded, int ignore_index, float label_smoothing, bool[] wants) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    masked_cross_entropy_fwd,
    _masked_cross_entropy_fwd_fake,
)


class MaskedCrossEntropyFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, labels, scale, excluded, ignore_index, label_smoothing, wants):
        count = (labels != ignore_index).sum()
        loss_sum, correct, *made = _fwd(
            hidden, weight, bias, labels, scale, excluded, ignore_index, label_smoothing, wants
        )  # fmt: skip
        ctx.save_for_backward(scale, *made)
        ctx.wants = wants
        ctx.dtypes = [None if x is None else x.dtype for x in (hidden, weight, bias, scale)]
        ctx.mark_non_differentiable(count, correct)
        return loss_sum, count, correct

    @staticmethod
    @differentiable_once("masked_cross_entropy")
    def backward(ctx, dloss, dcount, dcorrect):
        scale, *made = ctx.saved_tensors
        inner = dloss if scale is None else dloss * scale
        # out of place, so that a second backward gets the same
        each = zip(ctx.wants, made, (inner, inner, dloss, dloss), ctx.dtypes)
        dhidden, dweight, dbias, dscale = (_scaled(*rest) if wanted else None for wanted, *rest in each)
        return dhidden, dweight, dbias, None, dscale, None, None, None, None


def _cross_entropy(hidden, weight, bias, labels, scale, ignore_index, label_smoothing=0.0, excluded=None):
    # checked here: inside a Function gradient mode is off, and parameters require gradients even under no_grad
    enabled = torch.is_grad_enabled()
    wants = [enabled and x is not None and x.requires_grad for x in (hidden, weight, bias, scale)]
    return MaskedCrossEntropyFunction.apply(
        hidden, weight, bias, labels, scale, excluded, ignore_index, label_smoothing, wants
    )  # fmt: skip


def masked_cross_entropy(hidden, weight, bias, labels, *, ignore_index=-100, label_smoothing=0.0):
    """Cross-entropy of `hidden @ weightᵀ + bias` against `labels`, over the rows whose label is not `ignore_index`.

    hidden [M, D], weight [V, D] and bias [V] or None, in fp32, fp16 or bf16, all of one dtype, any strides; labels [M]
    int64 or int32, in 0 .. V - 1 or `ignore_index` (anything else makes the loss NaN). label_smoothing: the share of
    the target that is spread over all words. Returns `(loss_sum, count, correct)`, 0-dimensional: the sum of the losses
    (fp32, natural log), the number of rows with a label, and the number of correct predictions among them (int64).
    Never waits for the device. The same inputs give the same bits. Differentiable once.

    Source: the chunks of Liger-Kernel's fused linear cross-entropy (Hsu et al. 2024); the label smoothing of Szegedy et
    al. 2016, section 7, as torch.nn.functional.cross_entropy has it.
    """
    return _cross_entropy(hidden, weight, bias, labels, None, ignore_index, label_smoothing)


def contrastive_cross_entropy(
    query, document, labels=None, *, scale=1.0, symmetric=False, excluded=None, ignore_index=-100
):  # fmt: skip
    """InfoNCE: the cross-entropy of `scale * query @ documentᵀ` over the documents, without all scores in memory.

    query [B, D] and document [N, D] in fp32, fp16 or bf16, of one dtype, any strides; labels int64 [B]: the row of each
    query's document, or `ignore_index` (None: 0 .. B - 1). All other documents are its negatives, but for the pairs
    (query, document) in excluded, int64 [P, 2]. scale: the inverse temperature, a number or a 0-dimensional tensor on
    the same device, which gets a gradient. symmetric: the mean of this and of the cross-entropy from each query's
    document to all queries with a label; with excluded, it needs labels None. Returns `(loss_sum, count, correct)`:
    the sum of the losses (fp32), the number of queries with a label, and the number of those that score their own
    document highest.

    Source: van den Oord et al. 2018; symmetric: Radford et al. 2021, as sentence-transformers has it.
    """
    if not isinstance(scale, torch.Tensor):
        scale = torch.full((), scale, device=query.device)
    scale, own, absent = scale.float(), None, None
    if labels is None:
        labels = torch.arange(len(query), device=query.device)
        ignore_index, own = -1, document[: len(query)]
    forward = _cross_entropy(query, document, None, labels, scale, ignore_index, excluded=excluded)
    if not symmetric:
        return forward
    targets = labels
    if own is None:
        picked = labels != ignore_index
        targets = torch.arange(len(query), device=query.device).masked_fill(~picked, -1)
        # a query without a label is not a negative
        own, query = document[labels.masked_fill(~picked, 0)], query.masked_fill(~picked[:, None], 0.0)
        absent = scale.new_zeros(len(query)).masked_fill(~picked, -float("inf"))
    excluded = None if excluded is None else excluded.flip(1)
    backward = _cross_entropy(own, query, absent, targets, scale, -1, excluded=excluded)
    return (forward[0] + backward[0]) / 2, *forward[1:]
