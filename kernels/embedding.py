"""Three table lookups, their sum, LayerNorm and dropout in one pass, forward and backward.

    z = word[input_ids] + position[position_ids] + token_type[token_type_ids]      (the last two may be absent)
    y = dropout((z - mean(z)) * rstd(z) * weight + bias)

Plain PyTorch, forward: each lookup reads and writes T D elements, two adds read two and write one each, LayerNorm and
dropout read one and write one each: 16 T D and a mask. Fused: read the three rows, write y, 4 T D, of which the rows of
the small tables come from cache, and mean and rstd (8 bytes per row).

Backward, plain: dropout 2 T D and the mask, LayerNorm 5 T D, each table reads T D and writes its gradient. Fused: read
dy and the three rows, write dz, then read dz once for each large table: 7 T D, the tables' gradients, and the edges
described below. The backward computes z and draws the dropout mask again.

The gradient of a table is the sum of the rows of dz with the same id, without atomics. The ids of all tables are sorted
in one list (a stable sort; each table's ids follow those of the table before), and each program takes a chunk of the
sorted list. A run of equal ids inside a chunk is finished there. A chunk's first and last run may continue in the
adjacent chunks: their sums become two rows of a list that is 32 times shorter and sorted too. The same kernel runs over
that list, until one chunk has all of it. So the cost depends little on how often an id repeats, the order of additions
is fixed, and nothing waits for the host. A table of at most two rows (token types) is summed in the kernel of dz, like
weight and bias: partial sums in each program, one sum over the programs.

T tokens, D hidden size.
"""

import torch
import triton
import triton.language as tl

from ._column_sums import column_sums
from ._launch import (
    differentiable_once,
    dropout_constants,
    empty_like,
    launch,
    register,
    row_align,
    row_programs,
    row_settings,
    shape_key,
    unit_columns,
    walk_settings,
)
from ._math import columns, keep_mask, layer_norm_dz, load_rows, parameter, row_moments

# CHUNK sorted tokens per program; one warp has BLOCK_D columns
SEGMENTS = dict(CHUNK=64, BLOCK_D=256, STAGES=4, num_warps=1)
SEGMENTS_CANDIDATES = (SEGMENTS, *({**SEGMENTS, "CHUNK": n} for n in (32, 128)), {**SEGMENTS, "STAGES": 8})
# tables of at most this many rows are summed in registers
MOST_TYPES_IN_REGISTERS = 2


@triton.jit
def _id(ids_ptr, row, mask_t):
    """The tokens' rows in a table; without a table a placeholder."""
    if ids_ptr is None:
        return row
    else:
        return tl.load(ids_ptr + row, mask=mask_t, other=0).to(tl.int64)


@triton.jit
def _lookup(word_ptr, position_ptr, token_type_ptr, word_row, position_row, type_row, offs_d, mask, D: tl.constexpr):
    z = tl.load(word_ptr + word_row * D + offs_d, mask=mask, other=0.0).to(tl.float32)
    if token_type_ptr is not None:
        z += tl.load(token_type_ptr + type_row * D + offs_d, mask=mask, other=0.0).to(tl.float32)
    if position_ptr is not None:
        z += tl.load(position_ptr + position_row * D + offs_d, mask=mask, other=0.0).to(tl.float32)
    return z


@triton.jit(do_not_specialize=["T", "offset"])
def _embedding_fwd_kernel(
    input_ids_ptr, position_ids_ptr, token_type_ids_ptr, word_ptr, position_ptr, token_type_ptr,
    weight_ptr, bias_ptr, seed_ptr,
    y_ptr, mean_ptr, rstd_ptr,
    T, offset, threshold, scale, eps,
    D: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_DROPOUT: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    # rows of tables and tokens are int64: T * D and V * D can pass 2^31
    offs_t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    row = offs_t[:, None]
    mask_t = row < T
    word_row = _id(input_ids_ptr, row, mask_t)
    position_row = _id(position_ids_ptr, row, mask_t)
    type_row = _id(token_type_ids_ptr, row, mask_t)

    z = ()
    for i in tl.static_range(TILES):
        offs_d, mask = columns(i, mask_t, D, BLOCK_D)
        z = z + (_lookup(word_ptr, position_ptr, token_type_ptr, word_row, position_row, type_row, offs_d, mask, D),)

    mean, rstd = row_moments(z, eps, D, BLOCK_D)
    tl.store(mean_ptr + offs_t, mean, mask=offs_t < T)
    tl.store(rstd_ptr + offs_t, rstd, mask=offs_t < T)

    for i in tl.static_range(TILES):
        offs_d, mask = columns(i, mask_t, D, BLOCK_D)
        y = (z[i] - mean[:, None]) * rstd[:, None] * parameter(weight_ptr, offs_d, mask)
        if HAS_BIAS:
            y += parameter(bias_ptr, offs_d, mask)
        if HAS_DROPOUT:
            keep = keep_mask(offs_t, 0, i * BLOCK_D, tl.load(seed_ptr), offset, threshold, BLOCK_D)
            y = tl.where(keep, y * scale, 0.0)
        tl.store(y_ptr + row * D + offs_d, y, mask=mask)


@triton.jit(do_not_specialize=["T", "offset"])
def _embedding_bwd_kernel(
    dy_ptr, input_ids_ptr, position_ids_ptr, token_type_ids_ptr, word_ptr, position_ptr, token_type_ptr,
    weight_ptr, seed_ptr, mean_ptr, rstd_ptr,
    dz_ptr, partials_ptr, keys_ptr,
    T, stride_dyt, offset, threshold, scale, first_position, first_type,
    D: tl.constexpr, ALIGN: tl.constexpr, TYPES: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_DROPOUT: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, TILES: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    # partials, fp32: per program dweight [D], dtypes [TYPES, D], dbias [D]. Until the end each row of the block has its
    # own sums, so that nothing crosses warps inside the loop. dtypes[i * TYPES + k]: tile i of type k.
    # keys: the ids to sort, [T] for each table whose gradient comes from segments
    dweight, dbias, dtypes = (), (), ()
    for _ in tl.static_range(TILES):
        dweight = dweight + (tl.zeros([BLOCK_T, BLOCK_D], tl.float32),)
        dbias = dbias + (tl.zeros([BLOCK_T, BLOCK_D], tl.float32),)
        for _k in tl.static_range(TYPES):
            dtypes = dtypes + (tl.zeros([BLOCK_T, BLOCK_D], tl.float32),)

    pid = tl.program_id(0).to(tl.int64)
    for start in tl.range(pid * BLOCK_T, T, tl.num_programs(0) * BLOCK_T, num_stages=STAGES):
        offs_t = start + tl.arange(0, BLOCK_T)
        row = offs_t[:, None]
        mask_t = row < T
        word_row = _id(input_ids_ptr, row, mask_t)
        position_row = _id(position_ids_ptr, row, mask_t)
        type_row = _id(token_type_ids_ptr, row, mask_t)
        tl.store(keys_ptr + row, word_row.to(tl.int32), mask=mask_t)
        key_row = row + T
        if position_ptr is not None:
            tl.store(keys_ptr + key_row, (first_position + position_row).to(tl.int32), mask=mask_t)
            key_row += T
        if token_type_ptr is not None and TYPES == 0:
            tl.store(keys_ptr + key_row, (first_type + type_row).to(tl.int32), mask=mask_t)
        mean = tl.load(mean_ptr + offs_t, mask=offs_t < T, other=0.0)
        rstd = tl.load(rstd_ptr + offs_t, mask=offs_t < T, other=0.0)

        g, z_hat, new_dweight, new_dbias = (), (), (), ()
        for i in tl.static_range(TILES):
            offs_d, mask = columns(i, mask_t, D, BLOCK_D)
            dy = load_rows(dy_ptr, row, stride_dyt, offs_d, mask, ALIGN)
            if HAS_DROPOUT:
                keep = keep_mask(offs_t, 0, i * BLOCK_D, tl.load(seed_ptr), offset, threshold, BLOCK_D)
                dy = tl.where(keep, dy * scale, 0.0)
            z = _lookup(word_ptr, position_ptr, token_type_ptr, word_row, position_row, type_row, offs_d, mask, D)
            z = tl.where(mask, (z - mean[:, None]) * rstd[:, None], 0.0)
            g = g + (dy * parameter(weight_ptr, offs_d, mask),)
            z_hat = z_hat + (z,)
            new_dweight = new_dweight + (dweight[i] + dy * z,)
            new_dbias = new_dbias + (dbias[i] + dy,)
        dweight, dbias = new_dweight, new_dbias

        dz = layer_norm_dz(g, z_hat, rstd, D)
        new_dtypes = ()
        for i in tl.static_range(TILES):
            offs_d, mask = columns(i, mask_t, D, BLOCK_D)
            tl.store(dz_ptr + row * D + offs_d, dz[i], mask=mask)
            for k in tl.static_range(TYPES):
                # rows past the end have g = 0 and rstd = 0, hence dz = 0: they add nothing
                new_dtypes = new_dtypes + (dtypes[i * TYPES + k] + tl.where(type_row == k, dz[i], 0.0),)
        dtypes = new_dtypes

    for i in tl.static_range(TILES):
        offs_d = i * BLOCK_D + tl.arange(0, BLOCK_D)
        out = partials_ptr + pid * (1 + TYPES + HAS_BIAS) * D + offs_d
        tl.store(out, tl.sum(dweight[i], 0), mask=offs_d < D)
        for k in tl.static_range(TYPES):
            tl.store(out + (1 + k) * D, tl.sum(dtypes[i * TYPES + k], 0), mask=offs_d < D)
        if HAS_BIAS:
            tl.store(out + (1 + TYPES) * D, tl.sum(dbias[i], 0), mask=offs_d < D)


@triton.jit(do_not_specialize=["count", "T", "skipped_key", "first1", "first2"])
def _segment_sum_kernel(
    rows_ptr, order_ptr, keys_ptr,
    table0_ptr, table1_ptr, table2_ptr, edges_ptr, edge_keys_ptr,
    count, T, skipped_key, first1, first2,
    D: tl.constexpr, IS_LAST: tl.constexpr, CHUNK: tl.constexpr, BLOCK_D: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    # one chunk of `count` sorted keys: keys below first1 are of table 0, keys below first2 of table 1. Key r belongs to
    # row order[r] modulo T, or to row r without an order
    chunk = tl.program_id(0).to(tl.int64)
    offs_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_d = offs_d < D
    start = chunk * CHUNK
    end = tl.minimum(start + CHUNK, count)
    first_key = tl.load(keys_ptr + start)
    last_key = tl.load(keys_ptr + end - 1)

    total = tl.zeros([BLOCK_D], tl.float32)
    for r in tl.range(start, end, num_stages=STAGES):
        key = tl.load(keys_ptr + r)
        row = r
        if order_ptr is not None:
            row = tl.load(order_ptr + r)
            row = tl.where(row >= 2 * T, row - 2 * T, tl.where(row >= T, row - T, row))
        total += tl.load(rows_ptr + row * D + offs_d, mask=mask_d, other=0.0).to(tl.float32)
        ends = tl.load(keys_ptr + r + 1, mask=r + 1 < end, other=-1) != key
        if IS_LAST:
            inside = ends
        else:
            inside = ends & (key != first_key) & (key != last_key)
            # the first run's sum goes to edge 0 of the chunk, the last run's to edge 1
            edge = edges_ptr + (2 * chunk + (key != first_key)) * D + offs_d
            tl.store(edge, total, mask=mask_d & (ends & ((key == first_key) | (key == last_key))))
        inside = inside & (key != skipped_key)
        tl.store(table0_ptr + key.to(tl.int64) * D + offs_d, total, mask=mask_d & (inside & (key < first1)))
        if table1_ptr is not None:
            out = table1_ptr + (key - first1).to(tl.int64) * D + offs_d
            tl.store(out, total, mask=mask_d & (inside & (key >= first1) & (key < first2)))
        if table2_ptr is not None:
            out = table2_ptr + (key - first2).to(tl.int64) * D + offs_d
            tl.store(out, total, mask=mask_d & (inside & (key >= first2)))
        total = tl.where(ends, 0.0, total)

    if not IS_LAST:
        # a chunk with one run has no second edge: store 0
        zero = tl.zeros([BLOCK_D], tl.float32)
        tl.store(edges_ptr + (2 * chunk + 1) * D + offs_d, zero, mask=mask_d & (first_key == last_key))
        if tl.program_id(1) == 0:
            tl.store(edge_keys_ptr + 2 * chunk, first_key)
            tl.store(edge_keys_ptr + 2 * chunk + 1, last_key)


def segment_sums(rows, keys, tables, skipped_key):
    """The gradients of lookups in at most three `tables` [V, D], from the gradient of their sum, `rows` [T, D].

    keys int32 [len(tables) * T]: the ids of one table after the other, plus the number of rows in the tables before.
    Each gradient has the shape and dtype of its table. Row `skipped_key` of the first table stays 0 (-1: no such row).
    """
    T, D = rows.shape
    gradients = [torch.zeros(table.shape, dtype=table.dtype, device=table.device) for table in tables]
    if T == 0:
        return gradients
    first1 = len(tables[0])
    first2 = first1 + (len(tables[1]) if len(tables) > 1 else 0)
    padded = (*gradients, *(None,) * (3 - len(tables)))
    sorted_keys, sorted_order = torch.sort(keys, stable=True)

    def run(settings):
        level, order, keys, count = rows, sorted_order, sorted_keys, len(sorted_keys)
        while True:
            chunks = triton.cdiv(count, settings["CHUNK"])
            is_last = chunks == 1
            edges = torch.empty((0 if is_last else 2 * chunks, D), dtype=torch.float32, device=rows.device)
            edge_keys = torch.empty(len(edges), dtype=torch.int32, device=rows.device)
            _segment_sum_kernel[(chunks, triton.cdiv(D, settings["BLOCK_D"]))](
                level, order, keys, *padded, edges, edge_keys, count, T, skipped_key, first1, first2,
                D=D, IS_LAST=is_last, **settings,
            )  # fmt: skip
            if is_last:
                return
            level, order, keys, count = edges, None, edge_keys, 2 * chunks

    launch(run, "embedding_segments", shape_key(rows, D), SEGMENTS, SEGMENTS_CANDIDATES)
    return gradients


def _empty_fwd(
    input_ids, position_ids, token_type_ids, word, position, token_type, weight, bias, eps, dropout_p, seed, offset,
    dtype=None,
):  # fmt: skip
    """The uninitialised results of embedding_fwd; also its fake for torch.compile."""
    T, D = input_ids.shape[0], word.shape[1]
    mean, rstd = (torch.empty(T, dtype=torch.float32, device=word.device) for _ in range(2))
    return torch.empty((T, D), dtype=dtype or word.dtype, device=word.device), mean, rstd


def embedding_fwd(
    input_ids, position_ids, token_type_ids, word, position, token_type, weight, bias, eps, dropout_p, seed, offset,
    dtype=None,
):  # fmt: skip
    """(y [T, D] in `dtype`, mean [T] fp32, rstd [T] fp32)."""
    T, D = input_ids.shape[0], word.shape[1]
    inputs = (input_ids, position_ids, token_type_ids, word, position, token_type, weight, bias)
    y, mean, rstd = _empty_fwd(*inputs, eps, dropout_p, seed, offset, dtype)
    default, candidates = row_settings(D, word.element_size())
    if T == 0:
        return y, mean, rstd
    inputs = [None if t is None else t.contiguous() for t in inputs]

    def run(settings):
        _embedding_fwd_kernel[(triton.cdiv(T, settings["BLOCK_T"]),)](
            *inputs, seed, y, mean, rstd, T, offset, *dropout_constants(dropout_p), eps,
            D=D, HAS_BIAS=bias is not None, HAS_DROPOUT=dropout_p > 0.0, **settings,
        )  # fmt: skip

    launch(run, "embedding_fwd", shape_key(word, D), default, candidates)
    return y, mean, rstd


def embedding_bwd(
    dy, input_ids, position_ids, token_type_ids, word, position, token_type, weight, bias, mean, rstd,
    padding_idx, dropout_p, seed, offset,
):  # fmt: skip
    """(dword, dposition, dtoken_type, dweight, dbias), each empty where its argument is absent."""
    T, D = input_ids.shape[0], word.shape[1]
    dposition, dtoken_type, dweight, dbias = (empty_like(t, word) for t in (position, token_type, weight, bias))
    in_registers = token_type is not None and len(token_type) <= MOST_TYPES_IN_REGISTERS
    types = len(token_type) if in_registers else 0
    tables = [t for t in (word, position, None if in_registers else token_type) if t is not None]
    dz = torch.empty((T, D), dtype=word.dtype, device=word.device)
    keys = torch.empty(len(tables) * T, dtype=torch.int32, device=word.device)
    dy = unit_columns(dy)
    inputs = (input_ids, position_ids, token_type_ids, word, position, token_type, weight)
    inputs = [None if t is None else t.contiguous() for t in inputs]
    sums = [dweight, *dtoken_type[:types], *([] if bias is None else [dbias])]

    def run(settings):
        constants = dict(settings)
        programs = row_programs(T, constants["BLOCK_T"], constants.pop("PROGRAMS"))
        partials = torch.empty((programs, len(sums), D), dtype=torch.float32, device=word.device)
        if T:
            _embedding_bwd_kernel[(programs,)](
                dy, *inputs, seed, mean, rstd, dz, partials, keys,
                T, dy.stride(0), offset, *dropout_constants(dropout_p),
                len(word), len(word) + (0 if position is None else len(position)),
                D=D, ALIGN=row_align(dy), TYPES=types, HAS_BIAS=bias is not None, HAS_DROPOUT=dropout_p > 0.0,
                **constants,
            )  # fmt: skip
        column_sums(partials, sums)

    default, candidates = walk_settings(D, word.element_size(), 2)
    if word.element_size() == 2 and default["TILES"] == 4 and D <= 4096:
        # with four tiles, the sums for token types take too many registers: as many rows on twice the warps; one
        # program fits
        default = {**candidates[1], "PROGRAMS": 1}
    launch(run, "embedding_bwd", shape_key(word, D), default, candidates)
    dword, *others = segment_sums(dz, keys, tables, padding_idx)
    if position is not None:
        dposition = others.pop(0)
    if token_type is not None and not in_registers:
        dtoken_type = others.pop(0)
    return dword, dposition, dtoken_type, dweight, dbias


def _fake_bwd(dy, input_ids, position_ids, token_type_ids, word, position, token_type, weight, bias, *rest):
    return tuple(empty_like(t, word) for t in (word, position, token_type, weight, bias))


_fwd = register(
    "embedding_fwd(Tensor input_ids, Tensor? position_ids, Tensor? token_type_ids, Tensor word, Tensor? position, "
    "Tensor? token_type, Tensor weight, Tensor? bias, float eps, float dropout_p, Tensor? seed, int offset, "
    "ScalarType? dtype=None) -> (Tensor, Tensor, Tensor)",
    embedding_fwd,
    _empty_fwd,
)
_bwd = register(
    "embedding_bwd(Tensor dy, Tensor input_ids, Tensor? position_ids, Tensor? token_type_ids, Tensor word, "
    "Tensor? position, Tensor? token_type, Tensor weight, Tensor? bias, Tensor mean, Tensor rstd, int padding_idx, "
    "float dropout_p, Tensor? seed, int offset) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    embedding_bwd,
    _fake_bwd,
)


class EmbeddingFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, input_ids, position_ids, token_type_ids, word, position, token_type, weight, bias,
        padding_idx, eps, dropout_p, seed, offset, dtype,
    ):  # fmt: skip
        tensors = (input_ids, position_ids, token_type_ids, word, position, token_type, weight, bias)
        y, mean, rstd = _fwd(*tensors, eps, dropout_p, seed, offset, dtype)
        ctx.save_for_backward(*tensors, mean, rstd, seed)
        ctx.padding_idx, ctx.dropout_p, ctx.offset = padding_idx, dropout_p, offset
        return y

    @staticmethod
    @differentiable_once("embedding")
    def backward(ctx, dy):
        *tensors, seed = ctx.saved_tensors
        gradients = _bwd(dy, *tensors, ctx.padding_idx, ctx.dropout_p, seed, ctx.offset)
        gradients = (None if t is None else d for t, d in zip(tensors[3:8], gradients))
        return None, None, None, *gradients, *(None,) * 6


def embedding(
    input_ids, position_ids, token_type_ids, word, position, token_type, weight, bias, *,
    padding_idx=-1, eps=1e-12, dropout_p=0.0, seed=None, offset=0, dtype=None,
):  # fmt: skip
    """dropout(LayerNorm(word[input_ids] + position[position_ids] + token_type[token_type_ids])): see
    `fastbert/reference.py`.

    Ids int64 or int32 [T], inside their tables (not checked); tables [V, D], [P, D], [types, D], with fewer than 2^31
    rows in total; weight [D]; bias [D] or None. The last two tables may be None, each with its ids. Row `padding_idx`
    of `word` gets no gradient (-1: every row gets one). `seed` is an int64 tensor [1] on the tables' device, needed if
    `dropout_p` is above 0. Returns [T, D] in `dtype`, or the word table's; each gradient has its argument's dtype.
    Differentiable once. Raises ValueError for rows of more than 8192 columns, and for a table without its ids.
    """
    for name, ids, table in (("position", position_ids, position), ("token_type", token_type_ids, token_type)):
        if (ids is None) != (table is None):
            raise ValueError(f"{name}_ids and {name}: expected both or neither")
    return EmbeddingFunction.apply(
        input_ids, position_ids, token_type_ids, word, position, token_type, weight, bias,
        padding_idx, eps, dropout_p, seed, offset, dtype,
    )  # fmt: skip
