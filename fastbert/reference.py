"""What every op means, in plain PyTorch: the CPU path, the oracle of the tests, and the first thing to read.

Every function here has a twin of the same name, arguments and results in `kernels/`; `ops.py` chooses between the two.

Letters: B sequences, T packed tokens, D hidden size, F feed-forward size, H heads, K head size, V vocabulary, M rows.

Dropout is a pure function of `(seed, offset)` and of the element's place, the same one in PyTorch and in the kernels:
the same mask on every device, in forward and backward, under activation checkpointing and after a resume.
"""

import functools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

_UINT32 = 0xFFFFFFFF
PHILOX_ROUNDS = 7


def philox(c0, c1, c2, c3, k0, k1):
    """Philox4x32-7 (Salmon et al. 2011): four 32-bit random words from a 128-bit counter and a 64-bit key.

    All arguments are int64 tensors (or ints for the key) that hold unsigned 32-bit values; so do the four results.
    """
    for _ in range(PHILOX_ROUNDS):
        low, high = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c2 = ((high >> 32) & _UINT32) ^ c1 ^ k0, ((low >> 32) & _UINT32) ^ c3 ^ k1
        c1, c3 = high & _UINT32, low & _UINT32
        k0, k1 = (k0 + 0x9E3779B9) & _UINT32, (k1 + 0xBB67AE85) & _UINT32
    return c0, c1, c2, c3


# below this many multiply-adds, oneDNN's set-up for a shape it has not seen costs more than its product saves
_ONEDNN_SIZE = 2**24


def matmul(a, b, bias=None):
    """a [M, K] @ b [K, N], plus bias [N] if given, by the faster of torch's two CPU libraries.

    torch sends float32 products to MKL, which keeps to AVX2 on processors that are not Intel's; oneDNN, also inside
    torch, uses AVX-512 wherever it exists (2.1 times as fast on a Zen 5 core, equal on Intel's). Elsewhere: plain `@`.
    """
    if _prefers_onednn(a, b):
        return torch.ops.mkldnn._linear_pointwise(a, b.t(), bias, "none", [], "")
    return a @ b if bias is None else torch.addmm(bias, a, b)


def _prefers_onednn(a, b):
    return (
        a.dtype == b.dtype == torch.float32
        and a.device.type == "cpu"
        and a.shape[0] * a.shape[1] * b.shape[1] >= _ONEDNN_SIZE
        and torch.backends.mkldnn.is_available()
        and torch.backends.mkldnn.enabled
        and not torch.compiler.is_compiling()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


class LinearFunction(torch.autograd.Function):
    """A linear layer whose three products go through `matmul`."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        return matmul(x, weight.t(), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        x, weight = ctx.saved_tensors
        wants_x, wants_weight, wants_bias = ctx.needs_input_grad
        dx = matmul(dout, weight) if wants_x else None
        dweight = matmul(dout.t(), x) if wants_weight else None
        return dx, dweight, dout.sum(0) if wants_bias else None


def linear(x, weight, bias=None):
    """x @ weightᵀ + bias. x [T, D], weight [F, D], bias [F] or None."""
    if _prefers_onednn(x, weight.t()):
        return LinearFunction.apply(x, weight, bias)
    return F.linear(x, weight, bias)


def dropout_threshold(dropout_p):
    """`dropout_p` in the 1/65536 steps that the masks are drawn in: an element is kept when its 16 bits reach this."""
    return round(dropout_p * 65536)


def keep_mask(row, head, columns, seed, offset, dropout_p):
    """The keep mask of one call: bool [..., columns] for int64 `row` and `head` that broadcast to [...].

    Element (row, head, column) looks at 16 bits: piece `column % 8` of the eight that Philox makes from the counter
    (column // 8, row, head, offset) and the key `seed` (an int64 tensor [1]). Pieces are in order of word, low half
    first.
    """
    row, head = torch.broadcast_tensors(row.unsqueeze(-1), head.unsqueeze(-1))
    group = torch.arange((columns + 7) // 8, device=row.device).expand(*row.shape[:-1], -1)
    row, head = row & _UINT32, head & _UINT32
    words = philox(group, row, head, torch.full_like(group, offset), seed & _UINT32, (seed >> 32) & _UINT32)
    bits = torch.stack([half for word in words for half in (word & 0xFFFF, word >> 16)], dim=-1)
    return bits.flatten(-2)[..., :columns] >= dropout_threshold(dropout_p)


def dropout(x, dropout_p, seed, offset):
    """x [T, D] with elements dropped and the rest scaled so that the expectation stays."""
    if dropout_p == 0.0:
        return x
    rows = torch.arange(x.shape[0], device=x.device)
    keep = keep_mask(rows, torch.zeros_like(rows), x.shape[1], seed, offset, dropout_p)
    return x * keep * _keep_scale(dropout_p)


def _keep_scale(dropout_p):
    return 65536 / max(65536 - dropout_threshold(dropout_p), 1)


def attention(
    q, k, v, cu_seqlens, max_seqlen, *,
    cu_seqlens_q=None, max_seqlen_q=None, scale=None, dropout_p=0.0, seed=None, offset=0,
):  # fmt: skip
    """softmax(q kᵀ · scale) v within each sequence, in both directions.

    q [T, H, K], k and v [T, H, K]; or q [T, 3, H, K] holding all three (k and v None); or k [T, 2, H, K] holding keys
    and values (v None). The gradient of a packed argument comes packed. Sequence b owns rows cu_seqlens[b] to
    cu_seqlens[b+1] (int32 [B+1]); none is longer than `max_seqlen`. Rows past the last sequence are not read, give 0.

    When only some rows ask, q is [M, H, K] and `cu_seqlens_q` (int32 [B+1]) says which belong to which sequence; rows
    of q whose sequence is empty give 0. `scale` defaults to K ** -0.5. Dropout acts on the probabilities, its mask
    indexed by (row of q, head, position of the key in its sequence). Returns [T or M, H, K].
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    starts = tuple(cu_seqlens.tolist())
    starts_q = starts if cu_seqlens_q is None else tuple(cu_seqlens_q.tolist())
    if v is not None:
        k = torch.stack((k, v), 1)
    groups, place_q, place_k = _groups(starts_q, starts, len(q), len(q) if k is None else len(k), q.device)

    if k is None:
        grouped = (x.permute(2, 0, 3, 1, 4).unbind(0) for x in _arrange(q, *place_q, groups, "length"))
    else:
        queries = (x.transpose(1, 2) for x in _arrange(q, *place_q, groups, "length_q"))
        pairs = (x.permute(2, 0, 3, 1, 4).unbind(0) for x in _arrange(k, *place_k, groups, "length"))
        grouped = ((x, *pair) for x, pair in zip(queries, pairs))
    outs = []
    for group, (queries, keys, values) in zip(groups, grouped):
        keep = None
        if dropout_p > 0.0:
            row = group.start_q[:, None] + torch.arange(group.length_q, device=q.device)
            head = torch.arange(queries.shape[1], device=q.device)
            keep = keep_mask(row[:, None, :], head[None, :, None], group.length, seed, offset, dropout_p)
        out = _attend(queries, keys, values, scale, group.mask, keep, dropout_p)
        outs.append(out.transpose(1, 2).flatten(0, 1))
    rows = torch.cat(outs) if outs else q.new_zeros(0, *q.shape[-2:])
    return TakeFunction.apply(rows, *reversed(place_q))


def _attend(q, k, v, scale, mask, keep, dropout_p):
    # in bfloat16 on a CPU, torch's fused attention takes several times as long as its parts (4x at length 128, 1.7x at
    # 512, both passes; Zen 5)
    if keep is None and not (q.dtype == torch.bfloat16 and q.device.type == "cpu"):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    scores = q * scale @ k.transpose(-1, -2)
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    probabilities = torch.softmax(scores, dim=-1)
    if keep is not None:
        probabilities = probabilities * keep * _keep_scale(dropout_p)
    return probabilities @ v


@dataclass
class _Group:
    """Sequences of about one length, padded to one: `members` of them, `length` keys and `length_q` queries each."""

    members: int
    length: int
    length_q: int
    start_q: torch.Tensor
    mask: torch.Tensor | None


_BUCKET = 16


@functools.lru_cache(maxsize=4)
def _groups(starts_q, starts, rows_q, rows, device):
    """How to run packed sequences in few batched calls: `(groups, place_q, place_k)`.

    A place is a pair of what TakeFunction wants: from packed rows to the groups' slots, and back. All layers of a pass
    share one layout, hence the cache.
    """
    lengths_q = [end - start for start, end in zip(starts_q, starts_q[1:])]
    lengths = [end - start for start, end in zip(starts, starts[1:])]
    buckets = {}
    for b, (length_q, length) in enumerate(zip(lengths_q, lengths)):
        if length and length_q:
            buckets.setdefault(-(-length // _BUCKET), []).append(b)
    buckets = list(buckets.values())
    groups = []
    for bucket in buckets:
        own = torch.tensor([lengths[b] for b in bucket], device=device)
        length, mask = lengths[bucket[0]], None
        if (own != length).any():
            # up to the bucket's own length, so that few shapes occur: libraries set up, and keep, something for each
            length = -(-length // _BUCKET) * _BUCKET
            mask = (torch.arange(length, device=device) < own[:, None])[:, None, None, :]
        length_q = length
        if starts_q != starts:
            length_q = -(-max(lengths_q[b] for b in bucket) // 8) * 8
        start_q = torch.tensor([starts_q[b] for b in bucket], device=device)
        groups.append(_Group(len(bucket), length, length_q, start_q, mask))

    def place(starts, lengths, rows, widths):
        slots, holes = [], []
        for bucket, width in zip(buckets, widths):
            start = torch.tensor([starts[b] for b in bucket])[:, None]
            length = torch.tensor([lengths[b] for b in bucket])[:, None]
            column = torch.arange(width)
            slots.append((start + column.minimum(length - 1)).flatten())
            holes.append((column >= length).flatten())
        slots = torch.cat(slots) if slots else torch.zeros(0, dtype=torch.int64)
        holes = torch.cat(holes) if holes else torch.zeros(0, dtype=torch.bool)
        back = torch.full((rows,), -1)
        back[slots[~holes]] = (~holes).nonzero()[:, 0]
        to_slots = (slots.to(device), holes.nonzero()[:, 0].to(device))
        return to_slots, (back.clamp(min=0).to(device), (back < 0).nonzero()[:, 0].to(device))

    place_q = place(starts_q, lengths_q, rows_q, [group.length_q for group in groups])
    return groups, place_q, place(starts, lengths, rows, [group.length for group in groups])


def _arrange(x, to_slots, to_rows, groups, length):
    """Rows [T, ...] as one [members, length, ...] per group."""
    parts = TakeFunction.apply(x, to_slots, to_rows).split([g.members * getattr(g, length) for g in groups])
    return [part.unflatten(0, (g.members, getattr(g, length))) for part, g in zip(parts, groups)]


class TakeFunction(torch.autograd.Function):
    """x[index] with the rows `holes` set to 0, where `(index, holes)` there and `back` undo each other."""

    @staticmethod
    def forward(ctx, x, there, back):
        ctx.back = back
        return TakeFunction.take(x, *there)

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        return TakeFunction.take(dout, *ctx.back), None, None

    @staticmethod
    def take(x, index, holes):
        if len(x) == 0:
            return x.new_zeros(len(index), *x.shape[1:])
        return x.index_select(0, index).index_fill_(0, holes, 0)


def disentangled_attention(
    q, k, v, pos_key, pos_query, cu_seqlens, max_seqlen, *,
    position_buckets=0, max_relative_positions, scale=None, dropout_p=0.0, seed=None, offset=0,
):  # fmt: skip
    """Attention that also scores relative positions, as all versions of DeBERTa do: softmax(s · scale) v with

        s[i, j] = q_i · k_j + q_i · pos_key[d(i - j)] + k_j · pos_query[d(i - j)]

    q, k, v, cu_seqlens, max_seqlen, dropout and result as in `attention`; all rows ask. pos_key and pos_query
    [2 * span, H, K] are the projected embeddings of relative positions, None for a term that is absent. d(r) is the
    position r, or its bucket, counted from -span and kept within the table: see `relative_index`. `scale` defaults to
    (K * (1 + the number of position terms)) ** -0.5. Source: He et al. 2021, section 3.
    """
    tables = [x for x in (pos_key, pos_query) if x is not None]
    scale = (q.shape[-1] * (1 + len(tables))) ** -0.5 if scale is None else scale
    if k is not None:
        q = torch.stack((q, *(k.unbind(1) if v is None else (k, v))), 1)
    starts = tuple(cu_seqlens.tolist())
    groups, places, _ = _groups(starts, starts, len(q), len(q), q.device)
    outs = []
    for group, qkv in zip(groups, _arrange(q, *places, groups, "length")):
        L = group.length
        index = relative_index(L, position_buckets, max_relative_positions).to(q.device)
        key_table = None if pos_key is None else pos_key.index_select(0, index).transpose(0, 1)
        query_table = None if pos_query is None else pos_query.index_select(0, index).transpose(0, 1) * scale
        queries, keys, values = qkv.permute(2, 3, 0, 1, 4).contiguous().unbind(0)
        row = group.start_q[:, None] + torch.arange(L, device=q.device)
        parts = []
        # as many heads at a time as have their scores in cache
        at_once = max(_SCORES_AT_ONCE // (group.members * L * L), 1)
        for head in torch.arange(q.shape[2], device=q.device).split(at_once):
            heads = slice(head[0], head[-1] + 1)
            scores = DisentangledScoresFunction.apply(
                queries[heads] * scale, keys[heads], *(x if x is None else x[heads] for x in (key_table, query_table))
            )
            if group.mask is not None:
                scores = scores.masked_fill_(~group.mask.transpose(0, 1), float("-inf"))
            probabilities = torch.softmax(scores, dim=-1)
            if dropout_p > 0.0:
                keep = keep_mask(row, head[:, None, None], L, seed, offset, dropout_p)
                probabilities = probabilities * keep * _keep_scale(dropout_p)
            parts.append(probabilities @ values[heads])
        outs.append(torch.cat(parts).permute(1, 2, 0, 3).flatten(0, 1))
    rows = torch.cat(outs) if outs else q.new_zeros(0, *q.shape[-2:])
    return TakeFunction.apply(rows, *reversed(places))


# elements of [H, G, L, L], for what works on several such tensors in turn; rows of L that share a product with a table
_SCORES_AT_ONCE, _RELATIVE_ROWS = 2**20, 64


@functools.lru_cache(maxsize=64)
def relative_index(length, position_buckets, max_relative_positions):
    """int64 [2 * length - 1]: which row of a position table serves r = 1 - length, ..., length - 1.

    With `position_buckets` of 0 or -1 (DeBERTa v1) that is r itself and span is `max_relative_positions`. Otherwise
    (v2, v3) span is `position_buckets`, half of the buckets are single positions and the others widen with the
    logarithm of |r|, in float32. Counted from -span, so that r = 0 is row `span`; clamped to the table.
    """
    r = torch.arange(1 - length, length)
    span = max_relative_positions
    if position_buckets > 0:
        span, mid = position_buckets, position_buckets // 2
        far = r.abs().clamp(min=mid)
        steps = torch.log(far / mid) / torch.log(torch.tensor((max_relative_positions - 1) / mid)) * (mid - 1)
        r = torch.where(r.abs() <= mid, r, (torch.ceil(steps) + mid).long() * r.sign())
    return (r + span).clamp(0, 2 * span - 1)


class DisentangledScoresFunction(torch.autograd.Function):
    """q_i · k_j + q_i · key_table[i - j] + k_j · query_table[i - j], [H, G, L, L], for q and k [H, G, L, K].

    Tables are [H, 2 L - 1, K], from i - j = 1 - L on, or None.
    """

    @staticmethod
    def forward(ctx, q, k, key_table, query_table):
        ctx.save_for_backward(q, k, key_table, query_table)
        scores = q @ k.transpose(-1, -2)
        if key_table is not None:
            _add_relative(scores, q, key_table.flip(1))
        if query_table is not None:
            _add_relative(scores.transpose(-1, -2), k, query_table)
        return scores

    @staticmethod
    @once_differentiable
    def backward(ctx, dscores):
        q, k, key_table, query_table = ctx.saved_tensors
        dq, dk = dscores @ k, dscores.transpose(-1, -2) @ q
        dkey_table = dquery_table = None
        if key_table is not None:
            dkey_table = _relative_gradient(dscores, q, key_table.flip(1), dq).flip(1)
        if query_table is not None:
            dquery_table = _relative_gradient(dscores.transpose(-1, -2), k, query_table, dk)
        return dq, dk, dkey_table, dquery_table


def _add_relative(scores, x, table):
    """scores[i, j] += x_i · table[j - i + L - 1], for scores [H, G, L, L], x [H, G, L, K] and table [H, 2 L - 1, K]."""
    H, G, L, K = x.shape
    for rows, columns in _relative_blocks(L):
        band = x[:, :, rows].reshape(H, -1, K) @ table[:, columns].transpose(1, 2)
        scores[:, :, rows] += _skewed(band.unflatten(1, (G, -1)), L)


def _relative_gradient(dscores, x, table, dx):
    """The gradient of `table` in _add_relative; that of x is added to `dx`."""
    H, G, L, K = x.shape
    dtable = torch.zeros_like(table)
    for rows, columns in _relative_blocks(L):
        dband = x.new_zeros(H, G, rows.stop - rows.start, columns.stop - columns.start)
        _skewed(dband, L).copy_(dscores[:, :, rows])
        dband = dband.flatten(1, 2)
        dx[:, :, rows] += (dband @ table[:, columns]).unflatten(1, (G, -1))
        dtable[:, columns] += dband.transpose(1, 2) @ x[:, :, rows].reshape(H, -1, K)
    return dtable


def _relative_blocks(length):
    """Slices of rows, and of the columns of a table that they need."""
    for start in range(0, length, _RELATIVE_ROWS):
        end = min(start + _RELATIVE_ROWS, length)
        yield slice(start, end), slice(length - end, 2 * length - 1 - start)


def _skewed(band, length):
    """The view [..., R, length] of `band` [..., R, length + R - 1] in which each row begins one column further left."""
    *others, stride, _ = band.stride()
    return band.as_strided((*band.shape[:-1], length), (*others, stride - 1, 1), band.shape[-2] - 1)


def layer_norm(x, weight, bias, *, residual=None, dropout_p=0.0, seed=None, offset=0, eps=1e-12):
    """LayerNorm(dropout(x) + residual). x and residual [T, D]; weight and bias [D]. Returns [T, D] in x's dtype.

    Source: Ba et al. 2016; post-norm residual of Vaswani et al. 2017, section 5.4.
    """
    z = dropout(x, dropout_p, seed, offset)
    if residual is not None:
        z = z + residual
    return F.layer_norm(z, z.shape[-1:], weight.to(z.dtype), bias.to(z.dtype), eps).to(x.dtype)


def bias_gelu(x, bias, *, approximate="none"):
    """GELU(x + bias), exact (`"none"`) or `"tanh"`. x [T, F], bias [F]. Source: Hendrycks & Gimpel 2016."""
    return F.gelu(x + bias.to(x.dtype), approximate=approximate)


def gelu_layer_norm(x, bias, weight, ln_bias, *, approximate="none", eps=1e-12):
    """LayerNorm(GELU(x + bias)), what the masked-LM head does after its linear layer. x [T, D]; the rest [D]."""
    return layer_norm(bias_gelu(x, bias, approximate=approximate), weight, ln_bias, eps=eps)


def embedding(
    input_ids, position_ids, token_type_ids, word, position, token_type, weight, bias, *,
    padding_idx=-1, eps=1e-12, dropout_p=0.0, seed=None, offset=0,
):  # fmt: skip
    """dropout(LayerNorm(word[input_ids] + position[position_ids] + token_type[token_type_ids])).

    Ids int64 [T]; tables [V, D], [P, D], [types, D]; weight and bias [D]. Row `padding_idx` of `word` gets no gradient
    (-1: every row does). Returns [T, D] in the dtype of the tables. Source: Devlin et al. 2019, figure 2.
    """
    z = F.embedding(input_ids, word, padding_idx if padding_idx >= 0 else None)
    z = z + F.embedding(token_type_ids, token_type) + F.embedding(position_ids, position)
    return dropout(layer_norm(z, weight, bias, eps=eps), dropout_p, seed, offset)


class MaskedCrossEntropyFunction(torch.autograd.Function):
    """Loss and gradients of the picked rows in one sweep over chunks of rows, so that [M, V] is never held.

    The last chunk's share of the weight gradient, mostly all of it, waits for the backward: until then it is smaller as
    the gradient of the logits.
    """

    ROWS = 1024

    @staticmethod
    def forward(ctx, hidden, weight, bias, labels, ignore_index, label_smoothing, wants):
        has_label = labels != ignore_index
        count = has_label.sum()
        if count > 0.75 * len(labels):
            # mostly picked rows: a constant number of them, as packed batches have, is worth more than the few saved
            picked, rows, targets = slice(None), hidden.where(has_label[:, None], 0), labels
        else:
            picked = has_label.nonzero()[:, 0]
            rows, targets, has_label = hidden[picked], labels[picked], has_label[picked]
        wide = torch.promote_types(hidden.dtype, torch.float32)
        loss_sum = torch.zeros((), dtype=wide, device=hidden.device)
        correct = torch.zeros((), dtype=torch.int64, device=hidden.device)
        dhidden, dweight, dbias = torch.zeros_like(hidden), None, torch.zeros_like(bias, dtype=wide)
        last = (hidden.new_zeros(0, weight.shape[0]), hidden.new_zeros(0, weight.shape[1]))
        for start in range(0, len(rows), MaskedCrossEntropyFunction.ROWS):
            chunk = slice(start, start + MaskedCrossEntropyFunction.ROWS)
            logits = matmul(rows[chunk], weight.t(), bias).to(wide)
            labelled = has_label[chunk]
            target = targets[chunk].where(labelled, 0)
            correct += ((logits.argmax(-1) == target) & labelled).sum()
            log_p = logits.sub_(logits.logsumexp(-1, keepdim=True))
            losses = (label_smoothing - 1) * log_p.gather(1, target[:, None])[:, 0]
            if label_smoothing:
                losses -= label_smoothing / weight.shape[0] * log_p.sum(-1)
            loss_sum += losses.where(labelled, 0).sum()
            if not wants:
                continue
            dlogits = log_p.exp_().sub_(label_smoothing / weight.shape[0])
            dlogits[torch.arange(len(target), device=target.device), target] -= 1 - label_smoothing
            dlogits[~labelled] = 0
            dbias += dlogits.sum(0)
            dlogits = dlogits.to(hidden.dtype)
            dhidden[chunk if isinstance(picked, slice) else picked[chunk]] = matmul(dlogits, weight)
            last = (dlogits, rows[chunk])
            if chunk.stop < len(rows):
                product = matmul(dlogits.t(), rows[chunk]).to(wide)
                dweight = product if dweight is None else dweight.add_(product)
        if wants:
            ctx.save_for_backward(dhidden, dbias.to(bias.dtype), dweight, *last)
        ctx.mark_non_differentiable(count, correct)
        return loss_sum, count, correct

    @staticmethod
    @once_differentiable
    def backward(ctx, dloss, dcount, dcorrect):
        dhidden, dbias, earlier, dlogits, rows = ctx.saved_tensors
        dweight = matmul(dlogits.t(), rows * dloss.to(rows.dtype))
        if earlier is not None:
            dweight = (earlier * dloss).add_(dweight).to(dweight.dtype)
        return dhidden * dloss.to(dhidden.dtype), dweight, dbias * dloss.to(dbias.dtype), None, None, None, None


def masked_cross_entropy(hidden, weight, bias, labels, *, ignore_index=-100, label_smoothing=0.0):
    """Cross-entropy of `hidden @ weightᵀ + bias` against `labels`, over the rows whose label is not `ignore_index`.

    hidden [M, D], weight [V, D], bias [V], labels int64 [M]. Returns `(loss_sum, count, correct)`, 0-dimensional: the
    sum of the losses (fp32, natural log), how many rows had a label, and how many of those were predicted right
    (int64). No row with a label gives 0, 0, 0 and zero gradients. Label smoothing as in F.cross_entropy.
    """
    # asked here: inside a Function gradients look disabled, and needs_input_grad knows nothing of no_grad
    wants = torch.is_grad_enabled() and any(x.requires_grad for x in (hidden, weight, bias))
    return MaskedCrossEntropyFunction.apply(hidden, weight, bias, labels, ignore_index, label_smoothing, wants)
