"""One vector per packed sequence with L2 normalisation, in one pass over the rows, forward and backward.

    p = rows[0], rows[-1], the maximum or the weighted sum of the rows      (0 for an empty sequence)
    y = p / max(||p||, eps)                                                 (or p itself)

Plain PyTorch on a padded batch: mask times hidden reads and writes B S D elements, the sum reads them again, 3 B S D,
and normalising reads and writes B D four times. Fused, forward: read T D, write B D, and the pieces below. Backward:
read B D, write T D. In addition: with normalisation in half precision, y in fp32 for the backward (4 B D bytes, read
once per piece); for maxima, the row of each maximum (4 B D bytes).

Sequences may have any lengths, and there may be few of them. So programs are assigned to rows, not to sequences. Each
takes CHUNK adjacent rows, finds their first sequence by bisection of cu_seqlens, and loops from there. A sequence
inside a chunk is finished there. For a longer sequence each chunk writes a piece (8 D bytes, written and read), and a
second kernel with one program per sequence joins the pieces. It also writes the zeros of empty sequences. The index of
a piece, chunk + sequence, is unique without counting: adjacent pieces differ in exactly one of the two. First and last
tokens need only the second kernel. There are no atomics, the order of additions is fixed, and nothing waits for the
device. Rows past the last sequence are not read; their gradient is 0.

T packed tokens, B sequences, D hidden size.
"""

import torch
import triton
import triton.language as tl

from ._launch import (
    differentiable_once,
    launch,
    multiprocessors,
    register,
    row_align,
    row_settings,
    shape_key,
    unit_columns,
    walk_settings,
)
from ._math import load_rows

MODES = ("cls", "lasttoken", "max", "mean", "mean_sqrt_len_tokens", "weightedmean")


@triton.jit
def _sequence_of(cu_seqlens_ptr, B, row):
    """The sequence of `row`, which must not be past the last sequence."""
    low, high = row * 0, row * 0 + B
    while high - low > 1:
        middle = (low + high) // 2
        below = tl.load(cu_seqlens_ptr + middle) <= row
        low, high = tl.where(below, middle, low), tl.where(below, high, middle)
    return low


@triton.jit
def _scale(length, MODE: tl.constexpr):
    """The factor on the (weighted) sum of `length` rows."""
    n = tl.maximum(length, 1).to(tl.float32)
    if MODE == "mean":
        return 1.0 / n
    elif MODE == "mean_sqrt_len_tokens":
        return 1.0 / tl.sqrt(n)
    elif MODE == "weightedmean":
        return 2.0 / (n * (n + 1.0))
    else:
        return n * 0.0 + 1.0


@triton.jit
def _reduce_rows(
    x_ptr, places_ptr, stride, start, stop, first,
    D: tl.constexpr, ALIGN: tl.constexpr, IS_MAX: tl.constexpr, IS_WEIGHTED: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, TILES: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """(tiles, places), each a tuple of [BLOCK_D], of rows `start` to `stop` of x: sums, or maxima and their places.

    IS_WEIGHTED: row r has the weight r - first + 1. A maximum's place is its row, or the entry of `places_ptr` there.
    """
    values, places = (), ()
    for _ in tl.static_range(TILES):
        values = values + (tl.full([BLOCK_T, BLOCK_D], float("-inf") if IS_MAX else 0.0, tl.float32),)
        if IS_MAX:
            places = places + (tl.full([BLOCK_T, BLOCK_D], 0x7FFFFFFF, tl.int32),)
    for block in tl.range(start, stop, BLOCK_T, num_stages=STAGES):
        row = (block + tl.arange(0, BLOCK_T))[:, None]
        new_values, new_places = (), ()
        for i in tl.static_range(TILES):
            offs_d = i * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
            mask = (row < stop) & (offs_d < D)
            other = float("-inf") if IS_MAX else 0.0
            x = load_rows(x_ptr, row, stride, offs_d, mask, ALIGN, other)
            if IS_MAX:
                # a NaN is the maximum, as in torch; the first row always replaces the initial -inf
                better = mask & ((x > values[i]) | ((x != x) & (values[i] == values[i])) | (places[i] == 0x7FFFFFFF))
                if places_ptr is None:
                    place = tl.broadcast_to(row, mask.shape).to(tl.int32)
                else:
                    place = tl.load(places_ptr + row * D + offs_d, mask=mask, other=0)
                new_places = new_places + (tl.where(better, place, places[i]),)
                new_values = new_values + (tl.where(better, x, values[i]),)
            elif IS_WEIGHTED:
                new_values = new_values + (values[i] + x * (row - first + 1).to(tl.float32),)
            else:
                new_values = new_values + (values[i] + x,)
        values, places = new_values, new_places

    totals, origins = (), ()
    for i in tl.static_range(TILES):
        if IS_MAX:
            is_nan = values[i] != values[i]
            most = tl.max(tl.where(is_nan, float("inf"), values[i]), 0)
            nans = tl.max(is_nan.to(tl.int32), 0) > 0
            wins = tl.where(nans[None, :], is_nan, values[i] == most[None, :])
            origins = origins + (tl.min(tl.where(wins, places[i], 0x7FFFFFFF), 0),)
            totals = totals + (tl.where(nans, float("nan"), most),)
        else:
            totals = totals + (tl.sum(values[i], 0),)
    return totals, origins


@triton.jit
def _finish(
    totals, origins, scale, b, wanted, out_ptr, unit_ptr, norm_ptr, origin_ptr, eps,
    D: tl.constexpr, BLOCK_D: tl.constexpr, NORMALIZE: tl.constexpr, HAS_UNIT: tl.constexpr, IS_MAX: tl.constexpr,
):  # fmt: skip
    """Write the results of sequence b, if they are `wanted`."""
    divisor = 1.0
    if NORMALIZE:
        square = 0.0
        for i in tl.static_range(len(totals)):
            inside = i * BLOCK_D + tl.arange(0, BLOCK_D) < D
            pooled = tl.where(inside, totals[i] * scale, 0.0)
            square += tl.sum(pooled * pooled, 0)
        norm = tl.sqrt(square)
        tl.store(norm_ptr + b, norm, mask=wanted)
        divisor = tl.maximum(norm, eps)
    for i in tl.static_range(len(totals)):
        offs_d = i * BLOCK_D + tl.arange(0, BLOCK_D)
        mask = wanted & (offs_d < D)
        y = totals[i] * scale
        if NORMALIZE:
            y = y / divisor
        tl.store(out_ptr + b * D + offs_d, y, mask=mask)
        if HAS_UNIT:
            tl.store(unit_ptr + b * D + offs_d, y, mask=mask)
        if IS_MAX:
            tl.store(origin_ptr + b * D + offs_d, origins[i], mask=mask)


@triton.jit(do_not_specialize=["B", "CHUNK"])
def _pooling_fwd_kernel(
    hidden_ptr, cu_seqlens_ptr,
    out_ptr, unit_ptr, norm_ptr, origin_ptr, pieces_ptr, piece_origins_ptr,
    B, CHUNK, stride_ht, eps,
    D: tl.constexpr, ALIGN: tl.constexpr, MODE: tl.constexpr, NORMALIZE: tl.constexpr, HAS_UNIT: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, TILES: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    chunk = tl.program_id(0).to(tl.int64)
    row = chunk * CHUNK
    last = tl.minimum(row + CHUNK, tl.load(cu_seqlens_ptr + B).to(tl.int64))
    b = _sequence_of(cu_seqlens_ptr, B, row)
    while row < last:
        first = tl.load(cu_seqlens_ptr + b).to(tl.int64)
        end = tl.load(cu_seqlens_ptr + b + 1).to(tl.int64)
        stop = tl.minimum(end, last)
        totals, origins = _reduce_rows(
            hidden_ptr, None, stride_ht, row, stop, first,
            D, ALIGN, MODE == "max", MODE == "weightedmean", BLOCK_T, BLOCK_D, TILES, STAGES,
        )  # fmt: skip
        is_whole = (first == row) & (end == stop)
        # the other kernel writes empty sequences
        _finish(
            totals, origins, _scale(end - first, MODE), b, is_whole & (row < stop),
            out_ptr, unit_ptr, norm_ptr, origin_ptr, eps, D, BLOCK_D, NORMALIZE, HAS_UNIT, MODE == "max",
        )  # fmt: skip
        for i in tl.static_range(TILES):
            offs_d = i * BLOCK_D + tl.arange(0, BLOCK_D)
            mask = (is_whole == 0) & (offs_d < D)
            tl.store(pieces_ptr + (chunk + b) * D + offs_d, totals[i], mask=mask)
            if MODE == "max":
                tl.store(piece_origins_ptr + (chunk + b) * D + offs_d, origins[i], mask=mask)
        row = stop
        b += 1


@triton.jit(do_not_specialize=["CHUNK"])
def _pooling_join_kernel(
    rows_ptr, places_ptr, cu_seqlens_ptr,
    out_ptr, unit_ptr, norm_ptr, origin_ptr,
    CHUNK, stride, eps,
    D: tl.constexpr, ALIGN: tl.constexpr, MODE: tl.constexpr, NORMALIZE: tl.constexpr, HAS_UNIT: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    # rows are the pieces of sequences, or hidden itself if one row is the result
    b = tl.program_id(0).to(tl.int64)
    first = tl.load(cu_seqlens_ptr + b).to(tl.int64)
    end = tl.load(cu_seqlens_ptr + b + 1).to(tl.int64)
    if MODE == "cls":
        start, stop = first, tl.minimum(first + 1, end)
        wanted = end >= first
    elif MODE == "lasttoken":
        start, stop = tl.maximum(end - 1, first), end
        wanted = end >= first
    else:
        start, stop = first // CHUNK + b, (end - 1) // CHUNK + b + 1
        wanted = (stop - start > 1) | (first == end)
        # sequences inside a chunk are finished already
        stop = tl.where(wanted & (first < end), stop, start)
    if wanted:
        totals, origins = _reduce_rows(
            rows_ptr, places_ptr, stride, start, stop, start,
            D, ALIGN, MODE == "max", False, BLOCK_T, BLOCK_D, TILES, 1,
        )  # fmt: skip
        cleared = ()
        for i in tl.static_range(TILES):
            cleared = cleared + (tl.where(first < end, totals[i], 0.0),)
        _finish(
            cleared, origins, _scale(end - first, MODE), b, wanted,
            out_ptr, unit_ptr, norm_ptr, origin_ptr, eps, D, BLOCK_D, NORMALIZE, HAS_UNIT, MODE == "max",
        )  # fmt: skip


@triton.jit(do_not_specialize=["T", "B", "CHUNK"])
def _pooling_bwd_kernel(
    dout_ptr, cu_seqlens_ptr, unit_ptr, norm_ptr, origin_ptr,
    dhidden_ptr,
    T, B, CHUNK, stride_db, eps,
    D: tl.constexpr, ALIGN: tl.constexpr, MODE: tl.constexpr, NORMALIZE: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    start = tl.program_id(0).to(tl.int64) * CHUNK
    stop_chunk = tl.minimum(start + CHUNK, T)
    last = tl.minimum(stop_chunk, tl.load(cu_seqlens_ptr + B).to(tl.int64))
    row = start
    b = _sequence_of(cu_seqlens_ptr, B, row)
    while row < last:
        first = tl.load(cu_seqlens_ptr + b).to(tl.int64)
        end = tl.load(cu_seqlens_ptr + b + 1).to(tl.int64)
        stop = tl.minimum(end, last)

        dp, y, origins = (), (), ()
        dot = 0.0
        for i in tl.static_range(TILES):
            offs_d = i * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
            mask = offs_d < D
            d = load_rows(dout_ptr, b, stride_db, offs_d, mask, ALIGN)
            if NORMALIZE:
                unit = tl.load(unit_ptr + b * D + offs_d, mask=mask, other=0.0).to(tl.float32)
                dot += tl.sum(tl.sum(d * unit, 1), 0)
                y = y + (unit,)
            if MODE == "max":
                origins = origins + (tl.load(origin_ptr + b * D + offs_d, mask=mask, other=-1),)
            dp = dp + (d,)
        scale = _scale(end - first, MODE)
        if NORMALIZE:
            norm = tl.load(norm_ptr + b)
            # below eps the divisor is constant
            dot = tl.where(norm >= eps, dot, 0.0)
            scale = scale / tl.maximum(norm, eps)

        for block in range(row, stop, BLOCK_T):
            rows = (block + tl.arange(0, BLOCK_T))[:, None]
            for i in tl.static_range(TILES):
                columns = i * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
                dx = dp[i]
                if NORMALIZE:
                    dx = dx - y[i] * dot
                dx = tl.broadcast_to(dx * scale, [BLOCK_T, BLOCK_D])
                if MODE == "weightedmean":
                    dx *= (rows - first + 1).to(tl.float32)
                elif MODE == "max":
                    dx = tl.where(origins[i] == rows, dx, 0.0)
                elif MODE == "cls":
                    dx = tl.where(rows == first, dx, 0.0)
                elif MODE == "lasttoken":
                    dx = tl.where(rows == end - 1, dx, 0.0)
                tl.store(dhidden_ptr + rows * D + columns, dx, mask=(rows < stop) & (columns < D))
        row = stop
        b += 1

    # rows that belong to no sequence
    for block in range(tl.maximum(start, last), stop_chunk, BLOCK_T):
        rows = (block + tl.arange(0, BLOCK_T))[:, None]
        for i in tl.static_range(TILES):
            columns = i * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
            zero = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
            tl.store(dhidden_ptr + rows * D + columns, zero, mask=(rows < stop_chunk) & (columns < D))


def _chunk(T, programs):
    """Rows of a chunk: few enough for `programs` chunks per multiprocessor, and enough that joining the pieces of one
    long sequence is fast."""
    return min(max(triton.next_power_of_2(triton.cdiv(T, programs * multiprocessors())), 32), 128)


def _empty_fwd(hidden, cu_seqlens, mode, normalize, eps, dtype=None):
    """The uninitialised results of pooling_fwd; also its fake for torch.compile."""
    B, D = cu_seqlens.shape[0] - 1, hidden.shape[1]
    out = torch.empty((B, D), dtype=dtype or hidden.dtype, device=hidden.device)
    narrow = normalize and out.dtype != torch.float32
    unit = torch.empty((B, D) if narrow else 0, dtype=torch.float32, device=hidden.device)
    norm = torch.empty(B if normalize else 0, dtype=torch.float32, device=hidden.device)
    origin = torch.empty((B, D) if mode == "max" else 0, dtype=torch.int32, device=hidden.device)
    return out, unit, norm, origin


def pooling_fwd(hidden, cu_seqlens, mode, normalize, eps, dtype=None):
    """(out [B, D] in `dtype`, unit, norm [B] fp32, origin). unit: out in fp32, if `normalize` is set and out is not
    fp32. norm: of the vectors before normalising. origin: int32 [B, D], the rows of the maxima. Others are empty.
    """
    T, D = hidden.shape
    B = len(cu_seqlens) - 1
    out, unit, norm, origin = _empty_fwd(hidden, cu_seqlens, mode, normalize, eps, dtype)
    default, candidates = walk_settings(D, hidden.element_size(), 4, STAGES=3)
    if B == 0:
        return out, unit, norm, origin
    hidden, cu_seqlens = unit_columns(hidden), cu_seqlens.contiguous()
    flags = dict(D=D, MODE=mode, NORMALIZE=normalize, HAS_UNIT=len(unit) > 0)
    join, _ = row_settings(D, 2)

    def run(settings):
        constants = dict(settings)
        chunk = _chunk(T, constants.pop("PROGRAMS"))
        rows, places, stride = hidden, None, hidden.stride(0)
        if mode not in ("cls", "lasttoken"):
            chunks = triton.cdiv(T, chunk)
            rows, stride = torch.empty((chunks + B, D), dtype=torch.float32, device=hidden.device), D
            places = torch.empty_like(rows, dtype=torch.int32) if mode == "max" else None
            if T:
                _pooling_fwd_kernel[(chunks,)](
                    hidden, cu_seqlens, out, unit, norm, origin, rows, places, B, chunk, hidden.stride(0), eps,
                    ALIGN=row_align(hidden), **flags, **constants,
                )  # fmt: skip
        _pooling_join_kernel[(B,)](
            rows, places, cu_seqlens, out, unit, norm, origin, chunk, stride, eps,
            ALIGN=row_align(rows), **flags, **join,
        )  # fmt: skip

    launch(run, "pooling_fwd", shape_key(hidden, D, mode), default, candidates)
    return out, unit, norm, origin


def pooling_bwd(dout, cu_seqlens, unit, norm, origin, T, dtype, mode, normalize, eps):
    """dhidden [T, D] in `dtype`."""
    B, D = dout.shape
    dhidden = torch.empty((T, D), dtype=dtype, device=dout.device)
    default, candidates = row_settings(D, dtype.itemsize)
    if T == 0:
        return dhidden
    if B == 0:
        return dhidden.zero_()
    dout, cu_seqlens, chunk = unit_columns(dout), cu_seqlens.contiguous(), _chunk(T, 8)

    def run(settings):
        _pooling_bwd_kernel[(triton.cdiv(T, chunk),)](
            dout, cu_seqlens, unit, norm, origin, dhidden, T, B, chunk, dout.stride(0), eps,
            D=D, ALIGN=row_align(dout), MODE=mode, NORMALIZE=normalize, **settings,
        )  # fmt: skip

    launch(run, "pooling_bwd", shape_key(dhidden, D, mode), default, candidates)
    return dhidden


_fwd = register(
    "pooling_fwd(Tensor hidden, Tensor cu_seqlens, str mode, bool normalize, float eps, ScalarType? dtype=None) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    pooling_fwd,
    _empty_fwd,
)
_bwd = register(
    "pooling_bwd(Tensor dout, Tensor cu_seqlens, Tensor unit, Tensor norm, Tensor origin, SymInt T, ScalarType dtype, "
    "str mode, bool normalize, float eps) -> Tensor",
    pooling_bwd,
    lambda dout, cu_seqlens, unit, norm, origin, T, dtype, mode, normalize, eps: dout.new_empty(
        (T, dout.shape[1]), dtype=dtype
    ),
)


class PoolingFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, cu_seqlens, mode, normalize, eps, dtype):
        out, unit, norm, origin = _fwd(hidden, cu_seqlens, mode, normalize, eps, dtype)
        # hidden itself is not needed again
        ctx.save_for_backward(cu_seqlens, out if normalize and out.dtype == torch.float32 else unit, norm, origin)
        ctx.rest = hidden.shape[0], hidden.dtype, mode, normalize, eps
        return out

    @staticmethod
    @differentiable_once("pooling")
    def backward(ctx, dout):
        return _bwd(dout, *ctx.saved_tensors, *ctx.rest), None, None, None, None, None


def pooling(hidden, cu_seqlens, *, mode="mean", normalize=False, eps=1e-12, dtype=None):
    """One vector per sequence, see `fastbert/reference.py`. hidden [T, D], any strides; cu_seqlens int32 [B+1].

    Returns [B, D] in `dtype`, or hidden's. Differentiable once. Raises ValueError for an unknown `mode` and for rows of
    more than 8192 columns.
    """
    if mode not in MODES:
        raise ValueError(f"mode={mode!r}: expected one of {', '.join(MODES)}")
    return PoolingFunction.apply(hidden, cu_seqlens, mode, normalize, eps, dtype)
