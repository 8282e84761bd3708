"""Masked cross-entropy over a large vocabulary: projection, loss and gradients without ever holding the logits.

    logits = scale hidden weightᵀ + bias                                      [M, V], made in tiles
    loss   = L - (1 - e) logits[label] - e mean(logits) + z L²                L = logsumexp(logits), e label smoothing
    dlogits = (1 + 2 z L) softmax(logits) - e / V - (1 - e) [column = label]  written over the tile of logits
    dhidden = scale dlogits weight,   dweight = scale dlogitsᵀ hidden,   dbias = column sums of dlogits

PyTorch holds the logits, their log-probabilities and their gradient, 3 * M * V elements at once. Here one buffer serves
all tiles. Matrix products are the library's; around them each logit is read by `fwd`, and read and written by `bwd`,
which also sums the columns for dbias: 3 * M * V elements of traffic (6 bytes a logit in bf16, 2 without gradients)
beside the products' own. Two ways:

    the usual    a tile is some thousand rows over the whole vocabulary, and forward already makes the gradients from
                 it, which backward only scales: 3 products, nothing is recomputed. Held at the peak: the buffer
                 (BUFFER bytes or 2 D rows, whichever is more), dweight in fp32, dhidden
    low memory   a tile is ROWS x COLUMNS (32 MB in half precision: it stays in the cache of a large GPU). Forward keeps
                 the maximum and the sum of each row, backward makes each tile again: 4 products, and the logits are
                 written once more. Held at the peak, beside inputs and gradients: one tile, a chunk's rows of hidden,
                 a tile's words of dweight and all of dhidden in fp32

Rows without a label cost as much as any other and count nowhere: hand in the picked rows, or set `max_picks`.
`contrastive_cross_entropy` is the same loss over documents in place of words; its tiles are kept in fp32, since a scale
of 20 to 100 would magnify their rounding (10 bytes of traffic a score in half precision, not 6).

M rows, D hidden size, V vocabulary, T rows before the picks are taken, B queries, N documents.
"""

import torch
import triton
import triton.language as tl

from ._launch import differentiable_once, launch, register

# Rows of logits in memory at once, if they are not more than BUFFER bytes. Each further chunk adds its share of dweight
# to the sum (fp32, 94 MB at D = 768), which costs a tenth of the time of the chunk's products at 4096 rows and a third
# at 1024.
ROWS = 4096
BUFFER = 1 << 28

# Words in a tile of the low-memory mode; a multiple of 64.
COLUMNS = 4096

# Rows that one program of the backward kernel walks, and leaves one fp32 partial sum of dbias for, per column.
ROW_GROUP = 128

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _joined(x, group, maximum, total, best):
    """(maximum, sum of exp(x - maximum), first word of the first group with it) of what each lane saw, x joined.

    x [lanes, GROUP], fp32; the others [lanes]. exp2, since exp would guard against subnormal results: 5 instructions
    for 1. The difference is taken before the product by log2(e), so that large logits keep their digits.
    """
    top = tl.max(x, 1)
    larger = tl.maximum(maximum, top)
    total = total * tl.exp2((maximum - larger) * LOG2_E) + tl.sum(tl.exp2((x - larger[:, None]) * LOG2_E), 1)
    return larger, total, tl.where(top > maximum, group, best)


@triton.jit
def _masked_cross_entropy_fwd_kernel(
    logits_ptr, scale_ptr, bias_ptr, label_ptr,      # inputs; logits [rows, stride_logits] without scale and bias
    loss_ptr, correct_ptr,                           # outputs [rows]; until the last tile the label's logit, best word
    maximum_ptr, total_ptr, sum_ptr,                 # outputs [rows]; softmax = exp(logit - maximum) / total
    first, width, padded, V, stride_logits, ignore_index, label_smoothing, z_loss,
    HAS_SCALE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SMOOTHING: tl.constexpr,
    HAS_Z_LOSS: tl.constexpr,
    IS_FIRST: tl.constexpr,
    IS_LAST: tl.constexpr,
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

    # Every lane follows groups of GROUP neighbouring words, 16 bytes, and the lanes are joined at the end: no reduction
    # inside the loop leaves a thread. A finite start keeps -inf logits, banned words, from making inf - inf.
    R: tl.constexpr = BLOCK_V // GROUP
    maximum = tl.full([R], -3.0e38, tl.float32)
    total = tl.zeros([R], tl.float32)
    best = tl.zeros([R], tl.int32)
    summed = tl.zeros([R], tl.float32)
    offs_r = tl.arange(0, R) * GROUP
    offs_v = offs_r[:, None] + tl.arange(0, GROUP)[None, :]
    whole = width // BLOCK_V * BLOCK_V
    for start in range(0, whole, BLOCK_V):
        x = tl.load(logits_ptr + start + offs_v).to(tl.float32) * scale
        if HAS_BIAS:
            x += tl.load(bias_ptr + start + offs_v).to(tl.float32)
        if HAS_SMOOTHING:
            summed += tl.sum(x, 1)
        maximum, total, best = _joined(x, start + offs_r, maximum, total, best)
    for start in range(whole, width, BLOCK_V):
        # a mask at the row's padded end, a multiple of 64, leaves loads of 16 bytes whole; at width it would split them
        mask = start + offs_v < padded
        x = tl.load(logits_ptr + start + offs_v, mask=mask).to(tl.float32) * scale
        if HAS_BIAS:
            x += tl.load(bias_ptr + start + offs_v, mask=mask).to(tl.float32)
        if HAS_SMOOTHING:
            summed += tl.sum(tl.where(start + offs_v < width, x, 0.0), 1)
        x = tl.where(start + offs_v < width, x, -float("inf"))
        maximum, total, best = _joined(x, start + offs_r, maximum, total, best)

    row_maximum = tl.max(maximum, 0)
    row_total = tl.sum(total * tl.exp2((maximum - row_maximum) * LOG2_E), 0)
    row_sum = tl.sum(summed, 0)
    # Read again: the first group with the maximum, whose first maximum is the prediction, as in torch.argmax,
    # and the label's logit, from the tile that has it; a label that no tile has leaves NaN.
    group = tl.min(tl.where(maximum == row_maximum, best, V), 0)
    column = label - first
    here = picked & (column >= 0) & (column < width)
    offs_g = tl.arange(0, 2 * GROUP)
    in_group = (offs_g < GROUP) & (group + offs_g < width)
    at = tl.where(offs_g < GROUP, group + offs_g, column)
    mask = in_group | ((offs_g == GROUP) & here)
    x = tl.load(logits_ptr + at, mask=mask, other=0.0).to(tl.float32) * scale
    if HAS_BIAS:
        x += tl.load(bias_ptr + at, mask=mask, other=0.0).to(tl.float32)
    at_label = tl.sum(tl.where(offs_g == GROUP, x, 0.0), 0)
    x = tl.where(in_group, x, -float("inf"))
    prediction = first + tl.min(tl.where(in_group & (x == tl.max(x, 0)), group + offs_g, V), 0)
    elsewhere = float("nan")
    if not IS_FIRST:
        elsewhere = tl.load(loss_ptr + row)
    at_label = tl.where(here, at_label, elsewhere)
    if not IS_FIRST:
        before = tl.load(maximum_ptr + row)
        prediction = tl.where(row_maximum > before, prediction, tl.load(correct_ptr + row))
        larger = tl.maximum(row_maximum, before)
        row_total = row_total * tl.exp2((row_maximum - larger) * LOG2_E)
        row_total += tl.load(total_ptr + row) * tl.exp2((before - larger) * LOG2_E)
        row_maximum = larger
        if HAS_SMOOTHING:
            row_sum += tl.load(sum_ptr + row)

    tl.store(maximum_ptr + row, row_maximum)
    tl.store(total_ptr + row, row_total)
    if IS_LAST:
        # written relative to the maximum, the loss of a row of large logits keeps its digits
        log_total = tl.log(row_total)
        loss = log_total + (1.0 - label_smoothing) * (row_maximum - at_label)
        if HAS_SMOOTHING:
            loss += label_smoothing * (row_maximum - row_sum / V)
        if HAS_Z_LOSS:
            loss += z_loss * (row_maximum + log_total) * (row_maximum + log_total)
        tl.store(loss_ptr + row, tl.where(picked, loss, 0.0))
        tl.store(correct_ptr + row, (picked & (prediction == label)).to(tl.int32))
    else:
        tl.store(loss_ptr + row, at_label)
        tl.store(correct_ptr + row, prediction)
        if HAS_SMOOTHING:
            tl.store(sum_ptr + row, row_sum)


@triton.jit(do_not_specialize=["rows"])
def _masked_cross_entropy_bwd_kernel(
    logits_ptr, scale_ptr, bias_ptr, label_ptr, maximum_ptr, total_ptr,   # inputs
    dlogits_ptr, dbias_ptr,                                  # outputs; dlogits may be logits; dbias [groups, padded]
    rows, first, padded, V, stride_logits, stride_dlogits, ignore_index, label_smoothing, z_loss,
    HAS_SCALE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_DBIAS: tl.constexpr,
    HAS_Z_LOSS: tl.constexpr,
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
    # each row of the tile has its own share until the end, so that nothing crosses warps inside the loop
    dbias = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)

    for start in range(0, ROW_GROUP, BLOCK_M):
        offs_m = group * ROW_GROUP + start + tl.arange(0, BLOCK_M)
        mask_m = offs_m < rows
        label = tl.load(label_ptr + offs_m, mask=mask_m, other=ignore_index).to(tl.int64)
        maximum = tl.load(maximum_ptr + offs_m, mask=mask_m, other=0.0)
        total = tl.load(total_ptr + offs_m, mask=mask_m, other=1.0)
        factor = 1.0 / total
        if HAS_Z_LOSS:
            factor *= 1.0 + 2.0 * z_loss * (maximum + tl.log(total))

        mask = mask_m[:, None] & mask_v[None, :]
        x = tl.load(logits_ptr + offs_m[:, None] * stride_logits + offs_v[None, :], mask=mask).to(tl.float32) * scale
        if HAS_BIAS:
            x += bias[None, :]
        dlogits = tl.exp2((x - maximum[:, None]) * LOG2_E) * factor[:, None] - label_smoothing / V
        dlogits = tl.where((first + offs_v)[None, :] == label[:, None], dlogits - (1.0 - label_smoothing), dlogits)
        # a select, not a product: whatever an ignored row holds, its gradient is 0
        dlogits = tl.where((label != ignore_index)[:, None], dlogits, 0.0)
        if HAS_DBIAS:
            dbias += dlogits
        tl.store(dlogits_ptr + offs_m[:, None] * stride_dlogits + offs_v[None, :], dlogits, mask=mask)

    if HAS_DBIAS:
        tl.store(dbias_ptr + group * padded + offs_v, tl.sum(dbias, 0), mask=mask_v)


def _fwd_tile(tile, scale, bias, labels, state, first, V, options):
    """Take the logits `tile` of the words from `first` on into `state`: loss, correct, maximum, total, sum [rows]."""
    rows, width = tile.shape
    block_v = min(max(triton.next_power_of_2(width), 64), 2048)

    def run(settings):
        _masked_cross_entropy_fwd_kernel[(rows,)](
            tile, scale, None if bias is None else bias[first:], labels, *state,
            first, width, triton.cdiv(width, 64) * 64, V, tile.stride(0), *options,
            HAS_SCALE=scale is not None, HAS_BIAS=bias is not None,
            HAS_SMOOTHING=options[1] != 0.0, HAS_Z_LOSS=options[2] != 0.0,
            IS_FIRST=first == 0, IS_LAST=first + width == V, GROUP=16 // tile.element_size(), **settings,
        )  # fmt: skip

    launch(
        run, "masked_cross_entropy_fwd", _key(tile), dict(BLOCK_V=block_v, num_warps=max(block_v // 256, 1)),
        [dict(BLOCK_V=block, num_warps=warps) for block in (1024, 2048, 4096) for warps in (4, 8, 16)], state,
    )  # fmt: skip


def _bwd_tile(tile, dtile, scale, bias, labels, maximum, total, first, V, options, for_bias):
    """Write the gradient of the logits `tile` into `dtile`, which may be the same. Returns its column sums, or None."""
    rows, width = tile.shape
    padded, groups = triton.cdiv(width, 64) * 64, triton.cdiv(rows, ROW_GROUP)
    partial = torch.empty((groups, padded) if for_bias else 0, dtype=torch.float32, device=tile.device)

    def run(settings):
        _masked_cross_entropy_bwd_kernel[(triton.cdiv(width, settings["BLOCK_V"]), groups)](
            tile, scale, None if bias is None else bias[first:], labels, maximum, total,
            dtile, partial,
            rows, first, padded, V, tile.stride(0), dtile.stride(0), *options,
            HAS_SCALE=scale is not None, HAS_BIAS=bias is not None, HAS_DBIAS=for_bias, HAS_Z_LOSS=options[2] != 0.0,
            ROW_GROUP=ROW_GROUP, **settings,
        )  # fmt: skip

    launch(
        run, "masked_cross_entropy_bwd", _key(tile),
        dict(BLOCK_M=8, BLOCK_V=min(max(triton.next_power_of_2(width), 64), 256), num_warps=4),
        [dict(BLOCK_M=m, BLOCK_V=v, num_warps=w) for m in (4, 8, 16) for v in (128, 256, 512) for w in (4, 8)],
        [tile] if dtile is tile else [],
    )  # fmt: skip
    return partial[:, :width].sum(0) if for_bias else None


def _key(tile):
    return f"{str(tile.dtype).removeprefix('torch.')} V={triton.cdiv(tile.shape[1], 64) * 64}"


def _product(out, a, b, add=False):
    """Write a b into out, or add it. out has the dtype of a and b, or is fp32 and takes their sums unrounded."""
    if out.dtype == a.dtype:
        return torch.addmm(out, a, b, out=out) if add else torch.mm(a, b, out=out)
    if a.is_cuda and torch.version.hip is None:
        if add:
            return torch.addmm(out, a, b, out_dtype=torch.float32, out=out)
        return torch.mm(a, b, out_dtype=torch.float32, out=out)
    # elsewhere a product of halves comes rounded
    product = torch.mm(a.float(), b.float())
    return out.add_(product) if add else out.copy_(product)


def _scaled(gradient, factor, dtype):
    # Rounded once, after the factor, which the loss's mean brings: a sum over thousands of rows may not fit in fp16. As
    # a tensor with dimensions the factor stays fp32 in the product, and `out` makes it one pass.
    factor = factor.reshape([1] * gradient.dim())
    return torch.mul(gradient, factor, out=gradient.new_empty(gradient.shape, dtype=dtype))


def _buffers(M, width, hidden, scale, gradients):
    """(scores, dscores), [rows of a chunk, width padded]: one tensor if both have one dtype; None for no gradients.

    Rows are padded to a multiple of 64 elements, so that vector loads and tensor cores find them aligned.
    """
    padded = triton.cdiv(width, 64) * 64
    # a scale magnifies the rounding of the scores: then they are fp32, and their gradient has its own place
    apart = scale is not None and hidden.dtype != torch.float32
    size = hidden.element_size() + (4 if apart else 0)
    most = min(ROWS, max(BUFFER // max(padded * size, 1), 2 * hidden.shape[1], 1))
    # even chunks: a short last one would pay as much for its share of dweight as a long one
    even = triton.cdiv(M, max(triton.cdiv(M, most), 1))
    rows = max(min(most, M, triton.cdiv(even, 128) * 128), 1)
    new = dict(device=hidden.device)
    scores = torch.empty(rows, padded, dtype=torch.float32 if apart else hidden.dtype, **new)
    if not gradients:
        return scores, None
    return scores, torch.empty(rows, padded, dtype=hidden.dtype, **new) if apart else scores


def _take(hidden, rows, chunk):
    return hidden[chunk] if rows is None else hidden.index_select(0, rows[chunk].clamp(max=len(hidden) - 1))


def _without_ignored(x, labels, ignore_index):
    # an ignored row may hold anything, and 0 * NaN in a product over rows would be NaN
    return x.masked_fill((labels == ignore_index)[:, None], 0.0)


def _padded(bias):
    """The bias [V] up to a multiple of 64: loads may then end there, and stay wide."""
    return bias if bias is None else torch.nn.functional.pad(bias, (0, -len(bias) % 64))


def masked_cross_entropy_fwd(
    hidden, weight, bias, labels, rows, scale, ignore_index, label_smoothing, z_loss, low_memory, wants
):
    """(loss_sum, correct, maximum, total, dhidden, dweight, dbias, dscale), the last four for a loss gradient of 1.

    rows [M] says of which rows of hidden the labels [M] are (None: all; past the end: of none). maximum and total [M]
    are what backward needs with `low_memory`, where it makes the gradients. dweight, dbias and dscale are fp32; dhidden
    and dweight are not yet multiplied by the scale. wants: whether hidden, weight, bias and scale want a gradient; one
    that nobody wants is empty.
    """
    M, (V, D) = len(labels), weight.shape
    for_hidden, for_weight, for_bias, for_scale = (wanted and not low_memory for wanted in wants)
    options = ignore_index, label_smoothing, z_loss
    labels, bias = labels.contiguous(), _padded(bias)
    width = min(V, COLUMNS) if low_memory else V
    scores, dscores = _buffers(M, width, hidden, scale, for_hidden or for_weight or for_bias or for_scale)
    fp32 = dict(dtype=torch.float32, device=hidden.device)
    loss, maximum, total = (torch.empty(M, **fp32) for _ in range(3))
    correct = torch.empty(M, dtype=torch.int32, device=hidden.device)
    state = loss, correct, maximum, total, torch.empty(M, **fp32) if label_smoothing else total
    dhidden = hidden.new_empty((M, D) if for_hidden or for_scale else 0)
    dweight = (torch.empty if M else torch.zeros)(weight.shape if for_weight else 0, **fp32)
    dbias, dscale = torch.zeros(V if for_bias else 0, **fp32), torch.zeros(() if for_scale else 0, **fp32)

    for start in range(0, M, len(scores)):
        chunk = slice(start, min(start + len(scores), M))
        x, targets = _take(hidden, rows, chunk), labels[chunk]
        for first in range(0, V, width):
            tile = scores[: len(x), : min(width, V - first)]
            _product(tile, x, weight[first : first + width].T)
            _fwd_tile(tile, scale, bias, targets, [part[chunk] for part in state], first, V, options)
        if dscores is None:
            continue
        dtile = tile if dscores is scores else dscores[: len(x), :V]
        sums = _bwd_tile(tile, dtile, scale, bias, targets, maximum[chunk], total[chunk], 0, V, options, for_bias)
        x = _without_ignored(x, targets, ignore_index)
        if for_hidden or for_scale:
            _product(dhidden[chunk], dtile, weight)
        if for_weight:
            _product(dweight, dtile.T, x, add=start > 0)
        if for_bias:
            dbias += sums
        if for_scale:
            dscale += (x.float() * dhidden[chunk]).sum()
    return loss.sum(), correct.sum(), maximum, total, dhidden, dweight, dbias, dscale


def masked_cross_entropy_bwd(
    dloss, hidden, weight, bias, labels, rows, scale, maximum, total, ignore_index, label_smoothing, z_loss, wants
):
    """(dhidden [M, D], dweight, dbias, dscale) of the low-memory mode, multiplied by dloss and scale, in their dtypes.

    Words outside, rows inside: dweight is finished tile by tile, dhidden is summed over the tiles in fp32.
    """
    M, (V, D) = len(labels), weight.shape
    for_hidden, for_weight, for_bias, for_scale = wants
    options = ignore_index, label_smoothing, z_loss
    labels, padded_bias = labels.contiguous(), _padded(bias)
    width = min(V, COLUMNS)
    scores, dscores = _buffers(M, width, hidden, scale, True)
    fp32 = dict(dtype=torch.float32, device=hidden.device)
    dhidden = torch.empty((M, D) if for_hidden or for_scale else 0, **fp32)
    part = torch.empty((width, D) if for_weight and M else 0, **fp32)
    dweight = torch.zeros_like(weight, memory_format=torch.contiguous_format) if for_weight else weight.new_empty(0)
    dbias, dscale = torch.zeros(V if for_bias else 0, **fp32), torch.zeros(() if for_scale else 0, **fp32)
    factor = dloss if scale is None else dloss * scale

    for first in range(0, V if M else 0, width):
        columns = slice(first, min(first + width, V))
        for start in range(0, M, len(scores)):
            chunk = slice(start, min(start + len(scores), M))
            x, targets = _take(hidden, rows, chunk), labels[chunk]
            tile = scores[: len(x), : columns.stop - first]
            dtile = tile if dscores is scores else dscores[: len(x), : columns.stop - first]
            _product(tile, x, weight[columns].T)
            sums = _bwd_tile(
                tile, dtile, scale, padded_bias, targets, maximum[chunk], total[chunk], first, V, options, for_bias
            )
            if for_hidden or for_scale:
                _product(dhidden[chunk], dtile, weight[columns], add=first > 0)
            if for_weight:
                x = _without_ignored(x, targets, ignore_index)
                _product(part[: columns.stop - first], dtile.T, x, add=start > 0)
            if for_bias:
                dbias[columns] += sums
        if for_weight:
            torch.mul(part[: columns.stop - first], factor.reshape(1), out=dweight[columns])

    for start in range(0, M if for_scale else 0, ROWS):
        chunk = slice(start, min(start + ROWS, M))
        x = _without_ignored(_take(hidden, rows, chunk), labels[chunk], ignore_index)
        dscale += dloss * (x * dhidden[chunk]).sum()
    dbias = _scaled(dbias, dloss, torch.float32 if bias is None else bias.dtype)
    return _scaled(dhidden, factor, hidden.dtype) if for_hidden else hidden.new_empty(0), dweight, dbias, dscale


def _masked_cross_entropy_fwd_fake(
    hidden, weight, bias, labels, rows, scale, ignore_index, label_smoothing, z_loss, low_memory, wants
):
    wide, M = dict(dtype=torch.float32), labels.shape[0]
    for_hidden, for_weight, for_bias, for_scale = (wanted and not low_memory for wanted in wants)
    return (
        hidden.new_empty((), **wide), hidden.new_empty((), dtype=torch.int64),
        hidden.new_empty(M, **wide), hidden.new_empty(M, **wide),
        hidden.new_empty((M, hidden.shape[1]) if for_hidden or for_scale else 0),
        hidden.new_empty(weight.shape if for_weight else 0, **wide),
        hidden.new_empty(len(weight) if for_bias else 0, **wide),
        hidden.new_empty(() if for_scale else 0, **wide),
    )  # fmt: skip


def _masked_cross_entropy_bwd_fake(
    dloss, hidden, weight, bias, labels, rows, scale, maximum, total, ignore_index, label_smoothing, z_loss, wants
):
    for_hidden, for_weight, for_bias, for_scale = wants
    return (
        hidden.new_empty((labels.shape[0], hidden.shape[1]) if for_hidden else 0),
        weight.new_empty(weight.shape if for_weight else 0),
        hidden.new_empty(len(weight) if for_bias else 0, dtype=torch.float32 if bias is None else bias.dtype),
        hidden.new_empty(() if for_scale else 0, dtype=torch.float32),
    )


_fwd = register(
    "masked_cross_entropy_fwd(Tensor hidden, Tensor weight, Tensor? bias, Tensor labels, Tensor? rows, Tensor? scale, "
    "int ignore_index, float label_smoothing, float z_loss, bool low_memory, bool[] wants) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    masked_cross_entropy_fwd,
    _masked_cross_entropy_fwd_fake,
)
_bwd = register(
    "masked_cross_entropy_bwd(Tensor dloss, Tensor hidden, Tensor weight, Tensor? bias, Tensor labels, Tensor? rows, "
    "Tensor? scale, Tensor maximum, Tensor total, int ignore_index, float label_smoothing, float z_loss, bool[] wants) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    masked_cross_entropy_bwd,
    _masked_cross_entropy_bwd_fake,
)


def _first_labelled(labels, ignore_index, max_picks):
    """(rows, labels [M]) of the first rows with a label: row T, and no label, where there are fewer than max_picks."""
    found = (labels != ignore_index).cumsum(0)
    rows = torch.searchsorted(found, torch.arange(1, min(max_picks, len(labels)) + 1, device=labels.device))
    return rows, torch.cat((labels, labels.new_full((1,), ignore_index)))[rows]


class MaskedCrossEntropyFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, labels, scale, max_picks, *options):
        # options: ignore_index, label_smoothing, z_loss, low_memory, wants
        ignore_index, low_memory = options[0], options[3]
        count, rows, spoiled = (labels != ignore_index).sum(), None, None
        if max_picks is not None:
            rows, labels = _first_labelled(labels, ignore_index, max_picks)
            # to be added: nothing, or NaN when some labelled rows found no room
            spoiled = torch.zeros((), device=hidden.device).masked_fill(count > len(rows), float("nan"))
        loss_sum, correct, maximum, total, *made = _fwd(hidden, weight, bias, labels, rows, scale, *options)
        saved = (hidden, weight, bias, labels, maximum, total) if low_memory else made
        ctx.save_for_backward(rows, spoiled, scale, *saved)
        ctx.options, ctx.T = options, len(hidden)
        ctx.dtypes = [None if x is None else x.dtype for x in (hidden, weight, bias, scale)]
        ctx.mark_non_differentiable(count, correct)
        return loss_sum if spoiled is None else loss_sum + spoiled, count, correct

    @staticmethod
    @differentiable_once("masked_cross_entropy")
    def backward(ctx, dloss, dcount, dcorrect):
        *formula, low_memory, wants = ctx.options
        rows, spoiled, scale, *saved = ctx.saved_tensors
        if spoiled is not None:
            dloss = dloss + spoiled
        if low_memory:
            hidden, weight, bias, labels, maximum, total = saved
            made = _bwd(dloss, hidden, weight, bias, labels, rows, scale, maximum, total, *formula, wants)
        else:
            # out of place, so that a second backward finds them as they were
            inner = dloss if scale is None else dloss * scale
            factors = inner, inner, dloss, dloss
            made = [_scaled(*each) if want else None for want, *each in zip(wants, saved, factors, ctx.dtypes)]
        dhidden, dweight, dbias, dscale = (x if want else None for x, want in zip(made, wants))
        if rows is not None and dhidden is not None:
            # one row more, for slots that hold none
            dhidden = dhidden.new_zeros(ctx.T + 1, dhidden.shape[1]).index_copy_(0, rows, dhidden)[:-1]
        return dhidden, dweight, dbias, None, dscale, None, None, None, None, None, None


def _cross_entropy(hidden, weight, bias, labels, scale, max_picks, ignore_index, label_smoothing, z_loss, low_memory):
    # asked here: inside a Function gradient mode is off, and Parameters want gradients even under no_grad
    enabled = torch.is_grad_enabled()
    wants = [enabled and x is not None and x.requires_grad for x in (hidden, weight, bias, scale)]
    return MaskedCrossEntropyFunction.apply(
        hidden, weight, bias, labels, scale, max_picks, ignore_index, label_smoothing, z_loss, low_memory, wants
    )


def masked_cross_entropy(
    hidden, weight, bias, labels, *,
    ignore_index=-100, label_smoothing=0.0, z_loss=0.0, max_picks=None, low_memory=False,
):  # fmt: skip
    """Cross-entropy of `hidden @ weightᵀ + bias` against `labels`, over the rows whose label is not `ignore_index`.

    hidden [M, D], weight [V, D] and bias [V] or None, in fp32, fp16 or bf16, all of one dtype, any strides; labels [M]
    int64 or int32, in 0 .. V - 1 or `ignore_index` (anything else makes the loss NaN). label_smoothing: the share of
    the target that is spread over all words. z_loss: this times its squared log-sum-exp is added to each row's loss.
    max_picks: only so many rows, the first with a label, are gathered and computed, without waiting for the device;
    when there are more, loss and gradients are NaN. low_memory: never more than one tile of logits (see the top of this
    file), for a fourth product. Returns `(loss_sum, count, correct)`, 0-dimensional: the losses' sum (fp32, natural
    log), how many rows had a label, and how many of those computed were predicted right (int64). Never waits for the
    device; the same inputs give the same bits; not differentiable twice.

    Source: the chunks of Liger-Kernel's fused linear cross-entropy (Hsu et al. 2024), the tiles of Cut Cross-Entropy
    (Wijmans et al. 2024); the label smoothing of Szegedy et al. 2016, section 7, as torch.nn.functional.cross_entropy
    has it; the z-loss of PaLM (Chowdhery et al. 2022, section 5).
    """
    return _cross_entropy(
        hidden, weight, bias, labels, None, max_picks, ignore_index, label_smoothing, z_loss, low_memory
    )


def contrastive_cross_entropy(
    query, document, labels=None, *, scale=1.0, symmetric=False, ignore_index=-100, low_memory=False
):
    """InfoNCE: the cross-entropy of `scale * query @ documentᵀ` over the documents, without keeping the scores.

    query [B, D] and document [N, D] in fp32, fp16 or bf16, of one dtype, any strides; labels int64 [B]: the row of the
    document that belongs to each query, or `ignore_index` (None: 0 .. B - 1). All other documents are its negatives.
    scale: the inverse temperature, a number or a 0-dimensional tensor on the same device, which gets a gradient.
    symmetric: the mean of this and of the cross-entropy from each query's document to all queries with a label.
    low_memory: see `masked_cross_entropy`. Returns `(loss_sum, count, correct)`: the losses' sum (fp32), how many
    queries have a label, and how many of them score their own document highest.

    Source: van den Oord et al. 2018; symmetric: Radford et al. 2021, as sentence-transformers has it.
    """
    if not isinstance(scale, torch.Tensor):
        scale = torch.full((), scale, device=query.device)
    scale, own, absent = scale.float(), None, None
    if labels is None:
        labels = torch.arange(len(query), device=query.device)
        ignore_index, own = -1, document[: len(query)]
    forward = _cross_entropy(query, document, None, labels, scale, None, ignore_index, 0.0, 0.0, low_memory)
    if not symmetric:
        return forward
    targets = labels
    if own is None:
        picked = labels != ignore_index
        targets = torch.arange(len(query), device=query.device).masked_fill(~picked, -1)
        # a query without a label is nobody's negative
        own, query = document[labels.masked_fill(~picked, 0)], query.masked_fill(~picked[:, None], 0.0)
        absent = scale.new_zeros(len(query)).masked_fill(~picked, -float("inf"))
    backward = _cross_entropy(own, query, absent, targets, scale, None, -1, 0.0, 0.0, low_memory)
    return (forward[0] + backward[0]) / 2, *forward[1:]
