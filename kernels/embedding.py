"""Three table lookups, their sum, LayerNorm and dropout in one pass, forward and backward.

    z = word[input_ids] + position[position_ids] + token_type[token_type_ids]
    y = dropout((z - mean(z)) * rstd(z) * weight + bias)

Plain PyTorch, forward: each lookup reads and writes T D elements, two adds read two and write one each, LayerNorm and
dropout read one and write one each: 16 T D and a mask. Fused: read the three rows, write y, 4 T D, of which the small
tables' T D come from cache, and mean and rstd (8 bytes a row).

Backward, plain: dropout 2 T D and the mask, LayerNorm 5 T D, each table reads T D and writes its gradient. Fused: read
dy and the three rows, write dz, then read dz once for each large table: 7 T D, the tables' gradients, and the edges
described below. z is made again from the tables, and the dropout mask is drawn again.

The gradient of a table adds up the rows of dz that share an id, without atomics: the tokens are sorted by id (a stable
sort), and programs walk over chunks of the sorted order. A run of equal ids that lies inside a chunk is finished there.
A chunk's first and last run may go on in its neighbours: their sums become two rows of a list that is 32 times shorter
and sorted as well, and the same kernel runs over that list, until one chunk holds it all. So the cost depends little on
how often an id repeats, the order of additions is fixed, and nothing waits for the host. A table of at most two rows
(token types) is summed where dz is made, like weight and bias: partial sums in each program, one sum over the programs.

T tokens, D hidden size.
"""

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

from ._launch import dropout_constants, register, row_programs, row_tiles, unit_columns
from ._math import keep_mask, layer_norm_dz, row_moments

# sorted tokens in a chunk; columns of a segment sum that one warp holds
CHUNK, BLOCK_COLUMNS = 64, 256
# tables of so few rows are summed in registers
MOST_TYPES_IN_REGISTERS = 2


@triton.jit
def _lookup(word_ptr, position_ptr, token_type_ptr, word_row, position_row, type_row, offs_d, mask, D: tl.constexpr):
    z = tl.load(word_ptr + word_row * D + offs_d, mask=mask, other=0.0).to(tl.float32)
    z += tl.load(token_type_ptr + type_row * D + offs_d, mask=mask, other=0.0).to(tl.float32)
    return z + tl.load(position_ptr + position_row * D + offs_d, mask=mask, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["T", "offset"])
def _embedding_fwd_kernel(
    input_ids_ptr, position_ids_ptr, token_type_ids_ptr, word_ptr, position_ptr, token_type_ptr,
    weight_ptr, bias_ptr, seed_ptr,
    y_ptr, mean_ptr, rstd_ptr,
    T, offset, threshold, scale, eps,
    D: tl.constexpr, HAS_DROPOUT: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    # rows, in tables and tokens, are int64: T * D and V * D may pass 2^31
    offs_t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    row = offs_t[:, None]
    mask_t = row < T
    word_row = tl.load(input_ids_ptr + row, mask=mask_t, other=0)
    position_row = tl.load(position_ids_ptr + row, mask=mask_t, other=0)
    type_row = tl.load(token_type_ids_ptr + row, mask=mask_t, other=0)

    z = ()
    for i in tl.static_range(TILES):
        offs_d = i * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
        mask = mask_t & (offs_d < D)
        z = z + (_lookup(word_ptr, position_ptr, token_type_ptr, word_row, position_row, type_row, offs_d, mask, D),)

    mean, rstd = row_moments(z, eps, D, BLOCK_D)
    tl.store(mean_ptr + offs_t, mean, mask=offs_t < T)
    tl.store(rstd_ptr + offs_t, rstd, mask=offs_t < T)

    for i in tl.static_range(TILES):
        offs_d = i * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
        mask = mask_t & (offs_d < D)
        # parameters are read as whole tiles: a [1, BLOCK_D] load would get a layout of its own and cross shared memory
        weight = tl.load(tl.broadcast_to(weight_ptr + offs_d, mask.shape), mask=mask, other=0.0).to(tl.float32)
        bias = tl.load(tl.broadcast_to(bias_ptr + offs_d, mask.shape), mask=mask, other=0.0).to(tl.float32)
        y = (z[i] - mean[:, None]) * rstd[:, None] * weight + bias
        if HAS_DROPOUT:
            keep = keep_mask(offs_t, 0, i * BLOCK_D, tl.load(seed_ptr), offset, threshold, BLOCK_D)
            y = tl.where(keep, y * scale, 0.0)
        tl.store(y_ptr + row * D + offs_d, y, mask=mask)


@triton.jit(do_not_specialize=["T", "offset"])
def _embedding_bwd_kernel(
    dy_ptr, input_ids_ptr, position_ids_ptr, token_type_ids_ptr, word_ptr, position_ptr, token_type_ptr,
    weight_ptr, seed_ptr, mean_ptr, rstd_ptr,
    dz_ptr, dtoken_type_ptr, dweight_ptr, dbias_ptr,
    T, stride_dyt, offset, threshold, scale,
    D: tl.constexpr, TYPES: tl.constexpr, HAS_DROPOUT: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    # dweight and dbias are [programs, D] fp32, dtoken_type [programs, TYPES, D]. Until the end each row of the block
    # has its own share, so that nothing crosses warps inside the loop. dtypes[i * TYPES + k]: tile i of type k
    dweight, dbias, dtypes = (), (), ()
    for _ in tl.static_range(TILES):
        dweight = dweight + (tl.zeros([BLOCK_T, BLOCK_D], tl.float32),)
        dbias = dbias + (tl.zeros([BLOCK_T, BLOCK_D], tl.float32),)
        for _k in tl.static_range(TYPES):
            dtypes = dtypes + (tl.zeros([BLOCK_T, BLOCK_D], tl.float32),)

    pid = tl.program_id(0).to(tl.int64)
    for start in range(pid * BLOCK_T, T, tl.num_programs(0) * BLOCK_T):
        offs_t = start + tl.arange(0, BLOCK_T)
        row = offs_t[:, None]
        mask_t = row < T
        word_row = tl.load(input_ids_ptr + row, mask=mask_t, other=0)
        position_row = tl.load(position_ids_ptr + row, mask=mask_t, other=0)
        type_row = tl.load(token_type_ids_ptr + row, mask=mask_t, other=0)
        mean = tl.load(mean_ptr + offs_t, mask=offs_t < T, other=0.0)
        rstd = tl.load(rstd_ptr + offs_t, mask=offs_t < T, other=0.0)

        g, z_hat, new_dweight, new_dbias = (), (), (), ()
        for i in tl.static_range(TILES):
            offs_d = i * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
            mask = mask_t & (offs_d < D)
            dy = tl.load(dy_ptr + row * stride_dyt + offs_d, mask=mask, other=0.0).to(tl.float32)
            if HAS_DROPOUT:
                keep = keep_mask(offs_t, 0, i * BLOCK_D, tl.load(seed_ptr), offset, threshold, BLOCK_D)
                dy = tl.where(keep, dy * scale, 0.0)
            z = _lookup(word_ptr, position_ptr, token_type_ptr, word_row, position_row, type_row, offs_d, mask, D)
            z = tl.where(mask, (z - mean[:, None]) * rstd[:, None], 0.0)
            weight = tl.load(tl.broadcast_to(weight_ptr + offs_d, mask.shape), mask=mask, other=0.0).to(tl.float32)
            g = g + (dy * weight,)
            z_hat = z_hat + (z,)
            new_dweight = new_dweight + (dweight[i] + dy * z,)
            new_dbias = new_dbias + (dbias[i] + dy,)
        dweight, dbias = new_dweight, new_dbias

        dz = layer_norm_dz(g, z_hat, rstd, D)
        new_dtypes = ()
        for i in tl.static_range(TILES):
            offs_d = i * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
            tl.store(dz_ptr + row * D + offs_d, dz[i], mask=mask_t & (offs_d < D))
            for k in tl.static_range(TYPES):
                # rows past the end have g = 0 and rstd = 0, hence dz = 0: they add nothing
                new_dtypes = new_dtypes + (dtypes[i * TYPES + k] + tl.where(type_row == k, dz[i], 0.0),)
        dtypes = new_dtypes

    for i in tl.static_range(TILES):
        offs_d = i * BLOCK_D + tl.arange(0, BLOCK_D)
        tl.store(dweight_ptr + pid * D + offs_d, tl.sum(dweight[i], 0), mask=offs_d < D)
        tl.store(dbias_ptr + pid * D + offs_d, tl.sum(dbias[i], 0), mask=offs_d < D)
        for k in tl.static_range(TYPES):
            out = dtoken_type_ptr + (pid * TYPES + k) * D + offs_d
            tl.store(out, tl.sum(dtypes[i * TYPES + k], 0), mask=offs_d < D)


@triton.jit(do_not_specialize=["count", "skipped_key"])
def _segment_sum_kernel(
    rows_ptr, order_ptr, keys_ptr,
    table_ptr, edges_ptr, edge_keys_ptr,
    count, skipped_key,
    D: tl.constexpr, HAS_ORDER: tl.constexpr, IS_LAST: tl.constexpr, CHUNK: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    # one chunk of `count` sorted keys. Place r belongs to row order[r], or r itself without an order
    chunk = tl.program_id(0).to(tl.int64)
    offs_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_d = offs_d < D
    start = chunk * CHUNK
    end = tl.minimum(start + CHUNK, count)
    first_key = tl.load(keys_ptr + start)
    last_key = tl.load(keys_ptr + end - 1)

    total = tl.zeros([BLOCK_D], tl.float32)
    for r in tl.range(start, end, num_stages=4):
        key = tl.load(keys_ptr + r)
        row = r
        if HAS_ORDER:
            row = tl.load(order_ptr + r)
        total += tl.load(rows_ptr + row * D + offs_d, mask=mask_d, other=0.0).to(tl.float32)
        ends = tl.load(keys_ptr + r + 1, mask=r + 1 < end, other=-1) != key
        if IS_LAST:
            inside = ends
        else:
            inside = ends & (key != first_key) & (key != last_key)
            # the first run's sum goes to edge 0 of the chunk, the last run's to edge 1, which stays 0 when they are one
            edge = edges_ptr + (2 * chunk + (key != first_key)) * D + offs_d
            tl.store(edge, total, mask=mask_d & (ends & ((key == first_key) | (key == last_key))))
        tl.store(table_ptr + key.to(tl.int64) * D + offs_d, total, mask=mask_d & (inside & (key != skipped_key)))
        total = tl.where(ends, 0.0, total)

    if not IS_LAST and tl.program_id(1) == 0:
        tl.store(edge_keys_ptr + 2 * chunk, first_key)
        tl.store(edge_keys_ptr + 2 * chunk + 1, last_key)


def segment_sum(rows, ids, table, skipped_key):
    """The gradient of a lookup of `ids` [T] in `table` [V, D] from that of its result, `rows` [T, D], like `table`.

    Row `skipped_key` stays zero (-1: none does).
    """
    gradient = torch.zeros(table.shape, dtype=table.dtype, device=table.device)
    count, D = rows.shape
    if count == 0:
        return gradient
    keys, order = torch.sort(ids.to(torch.int32), stable=True)
    while True:
        chunks = triton.cdiv(count, CHUNK)
        is_last = chunks == 1
        edges = torch.zeros((2 * chunks, D), dtype=torch.float32, device=rows.device)
        edge_keys = torch.empty(2 * chunks, dtype=torch.int32, device=rows.device)
        _segment_sum_kernel[(chunks, triton.cdiv(D, BLOCK_COLUMNS))](
            rows, order, keys, gradient, edges, edge_keys, count, skipped_key,
            D=D, HAS_ORDER=order is not None, IS_LAST=is_last, CHUNK=CHUNK, BLOCK_D=BLOCK_COLUMNS, num_warps=1,
        )  # fmt: skip
        if is_last:
            return gradient
        rows, order, keys, count = edges, None, edge_keys, 2 * chunks


def embedding_fwd(
    input_ids, position_ids, token_type_ids, word, position, token_type, weight, bias, eps, dropout_p, seed, offset
):
    """(y [T, D] in the word table's dtype, mean [T] fp32, rstd [T] fp32)."""
    T, D = input_ids.shape[0], word.shape[1]
    y = torch.empty((T, D), dtype=word.dtype, device=word.device)
    mean, rstd = (torch.empty(T, dtype=torch.float32, device=word.device) for _ in range(2))
    if T == 0:
        return y, mean, rstd
    settings = row_tiles(D, word.element_size())
    inputs = (input_ids, position_ids, token_type_ids, word, position, token_type, weight, bias)
    _embedding_fwd_kernel[(triton.cdiv(T, settings["BLOCK_T"]),)](
        *(t.contiguous() for t in inputs), seed, y, mean, rstd, T, offset, *dropout_constants(dropout_p), eps,
        D=D, HAS_DROPOUT=dropout_p > 0.0, **settings,
    )  # fmt: skip
    return y, mean, rstd


def embedding_bwd(
    dy, input_ids, position_ids, token_type_ids, word, position, token_type, weight, bias, mean, rstd,
    padding_idx, dropout_p, seed, offset,
):  # fmt: skip
    """(dword, dposition, dtoken_type, dweight, dbias)."""
    T, D = input_ids.shape[0], word.shape[1]
    types = token_type.shape[0] if token_type.shape[0] <= MOST_TYPES_IN_REGISTERS else 0
    settings = row_tiles(D, word.element_size())
    programs = row_programs(T, settings["BLOCK_T"])
    dz = torch.empty((T, D), dtype=word.dtype, device=word.device)
    dtoken_type = torch.empty((programs, types, D), dtype=torch.float32, device=word.device)
    dweight, dbias = (torch.empty((programs, D), dtype=torch.float32, device=word.device) for _ in range(2))
    if T:
        dy = unit_columns(dy)
        inputs = (input_ids, position_ids, token_type_ids, word, position, token_type, weight)
        _embedding_bwd_kernel[(programs,)](
            dy, *(t.contiguous() for t in inputs), seed, mean, rstd, dz, dtoken_type, dweight, dbias,
            T, dy.stride(0), offset, *dropout_constants(dropout_p),
            D=D, TYPES=types, HAS_DROPOUT=dropout_p > 0.0, **settings,
        )  # fmt: skip
    return (
        segment_sum(dz, input_ids, word, padding_idx),
        segment_sum(dz, position_ids, position, -1),
        dtoken_type.sum(0).to(token_type.dtype) if types else segment_sum(dz, token_type_ids, token_type, -1),
        dweight.sum(0).to(weight.dtype),
        dbias.sum(0).to(bias.dtype),
    )


def _fake_fwd(input_ids, position_ids, token_type_ids, word, *rest):
    T = input_ids.shape[0]
    statistics = word.new_empty(T, dtype=torch.float32)
    return word.new_empty((T, word.shape[1])), statistics, torch.empty_like(statistics)


def _fake_bwd(dy, input_ids, position_ids, token_type_ids, word, position, token_type, weight, bias, *rest):
    return tuple(t.new_empty(t.shape) for t in (word, position, token_type, weight, bias))


_fwd = register(
    "embedding_fwd(Tensor input_ids, Tensor position_ids, Tensor token_type_ids, Tensor word, Tensor position, "
    "Tensor token_type, Tensor weight, Tensor bias, float eps, float dropout_p, Tensor? seed, int offset) "
    "-> (Tensor, Tensor, Tensor)",
    embedding_fwd,
    _fake_fwd,
)
_bwd = register(
    "embedding_bwd(Tensor dy, Tensor input_ids, Tensor position_ids, Tensor token_type_ids, Tensor word, "
    "Tensor position, Tensor token_type, Tensor weight, Tensor bias, Tensor mean, Tensor rstd, int padding_idx, "
    "float dropout_p, Tensor? seed, int offset) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    embedding_bwd,
    _fake_bwd,
)


class EmbeddingFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, input_ids, position_ids, token_type_ids, word, position, token_type, weight, bias,
        padding_idx, eps, dropout_p, seed, offset,
    ):  # fmt: skip
        tensors = (input_ids, position_ids, token_type_ids, word, position, token_type, weight, bias)
        y, mean, rstd = _fwd(*tensors, eps, dropout_p, seed, offset)
        ctx.save_for_backward(*tensors, mean, rstd, seed)
        ctx.padding_idx, ctx.dropout_p, ctx.offset = padding_idx, dropout_p, offset
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        *tensors, seed = ctx.saved_tensors
        return None, None, None, *_bwd(dy, *tensors, ctx.padding_idx, ctx.dropout_p, seed, ctx.offset), *(None,) * 5


def embedding(
    input_ids, position_ids, token_type_ids, word, position, token_type, weight, bias, *,
    padding_idx=-1, eps=1e-12, dropout_p=0.0, seed=None, offset=0,
):  # fmt: skip
    """dropout(LayerNorm(word[input_ids] + position[position_ids] + token_type[token_type_ids])): see
    `fastbert/reference.py`.

    Ids int64 [T], inside their tables (not checked); tables [V, D], [P, D], [types, D]; weight and bias [D]. Row
    `padding_idx` of `word` gets no gradient (-1: every row does). `seed` is an int64 tensor [1] on the tables' device,
    needed when `dropout_p` is over 0. Returns [T, D] in the word table's dtype; each gradient comes in its argument's.
    Differentiable once.
    """
    return EmbeddingFunction.apply(
        input_ids, position_ids, token_type_ids, word, position, token_type, weight, bias,
        padding_idx, eps, dropout_p, seed, offset,
    )  # fmt: skip
