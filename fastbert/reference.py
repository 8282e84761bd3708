"""What every op means, in plain PyTorch. The tests compare everything with it. Read it first.

`kernels/` and `cpu/` have faster functions with the same names, arguments and results; `ops.py` chooses between them.
Nothing here is fast: attention loops over the sequences, and autograd computes all gradients.

Letters: B sequences, T packed tokens, D hidden size, F feed-forward size, H heads, K head size, V vocabulary, M rows.

Dropout is a pure function of `(seed, offset)` and the element's position. So the mask is the same on every device, in
forward and backward, under activation checkpointing and after a resume.
"""

import torch
import torch.nn.functional as F

from .reference_heads import contrastive_cross_entropy as contrastive_cross_entropy
from .reference_heads import masked_cross_entropy as masked_cross_entropy
from .reference_heads import vocabulary_max as vocabulary_max
from .reference_heads import wide as wide

_UINT32 = 0xFFFFFFFF
PHILOX_ROUNDS = 7


# ---------------------------------------------------------------------------------------------------------- dropout


def philox(c0, c1, c2, c3, k0, k1):
    """Philox4x32-7 (Salmon et al. 2011): four 32-bit random words from a 128-bit counter and a 64-bit key.

    All arguments are int64 tensors (or ints for the key) that hold unsigned 32-bit values; so do the four results.
    """
    for _ in range(PHILOX_ROUNDS):
        # torch.compile writes C++, where a product over 2^63 is undefined: multiply by the factors minus 2^32 and add
        # c0 and c2 to the high words
        low, high = c0 * (0xD2511F53 - 2**32), c2 * (0xCD9E8D57 - 2**32)
        c0, c2 = (((high >> 32) + c2) & _UINT32) ^ c1 ^ k0, (((low >> 32) + c0) & _UINT32) ^ c3 ^ k1
        c1, c3 = high & _UINT32, low & _UINT32
        k0, k1 = (k0 + 0x9E3779B9) & _UINT32, (k1 + 0xBB67AE85) & _UINT32
    return c0, c1, c2, c3


def dropout_threshold(dropout_p):
    """`dropout_p` in steps of 1/65536. An element is kept if its 16 random bits are at least this."""
    return round(dropout_p * 65536)


def _random_pieces(groups, row, head, seed, offset):
    """int64 [..., groups, 8]: 16 random bits per piece, for int64 `row` and `head` that broadcast to [...].

    A group is one Philox call with the counter (group, row, head, offset) and the key `seed` (an int64 tensor [1]). Its
    pieces are the halves of its words in order, low half first.
    """
    # masked, so that torch.compile does not count in 32 bits
    group = torch.arange(groups, device=row.device) & _UINT32
    # broadcast late: parts that do not depend on all of them are computed once
    counter = group, row.unsqueeze(-1) & _UINT32, head.unsqueeze(-1) & _UINT32, torch.full_like(group, offset & _UINT32)
    words = philox(*counter, seed & _UINT32, (seed >> 32) & _UINT32)
    return torch.stack([half for word in words for half in (word & 0xFFFF, word >> 16)], dim=-1)


def keep_mask(row, head, columns, seed, offset, dropout_p):
    """The keep mask of one call: bool [..., columns] for int64 `row` and `head` that broadcast to [...].

    Element (row, head, column) uses piece `column % 8` of group `column // 8` of `_random_pieces`.
    """
    bits = _random_pieces(-(-columns // 8), row, head, seed, offset)
    return bits.flatten(-2)[..., :columns] >= dropout_threshold(dropout_p)


def attention_keep_mask(row, head, columns, seed, offset, dropout_p):
    """The same with the columns in the order in which a GPU thread holds attention's scores.

    Bits 0, 3 and 4 of a column, from the lowest, are the number of the piece. The other bits are that of the group.
    """
    bits = _random_pieces(-(-columns // 32) * 4, row, head, seed, offset)
    # bits 5 and above, bits 2 and 1, then the piece as bits 4, 3, 0
    bits = bits.unflatten(-1, (2, 2, 2)).unflatten(-4, (-1, 4))
    bits = bits.permute(*range(bits.dim() - 5), -5, -3, -2, -4, -1)
    return bits.flatten(-5)[..., :columns] >= dropout_threshold(dropout_p)


def keep_scale(dropout_p):
    """The factor on kept elements that preserves the expectation."""
    return 65536 / max(65536 - dropout_threshold(dropout_p), 1)


def drop(x, keep, dropout_p):
    """x scaled by `keep_scale` where `keep` (bool, x's shape) is true, and 0 elsewhere."""
    return x * keep * keep_scale(dropout_p)


def dropout(x, dropout_p, seed, offset=0):
    """x [T, D] with elements dropped and the others scaled by `keep_scale`."""
    if dropout_p == 0.0:
        return x
    rows = torch.arange(x.shape[0], device=x.device)
    keep = keep_mask(rows, torch.zeros_like(rows), x.shape[1], seed, offset, dropout_p)
    return drop(x, keep, dropout_p)


# -------------------------------------------------------------------------------------------------------- attention


def attention(
    q, k, v, cu_seqlens, max_seqlen, *,
    cu_seqlens_q=None, max_seqlen_q=None, scale=None, dropout_p=0.0, window=None, seed=None, offset=0,
):  # fmt: skip
    """softmax(q kᵀ · scale) v within each sequence, in both directions.

    q, k and v [T, H, K]; or q [T, 3, H, K] with all three (k and v None); or k [T, 2, H, K] with keys and values (v
    None). k and v may have fewer heads, of which H is a multiple: neighbouring query heads share them (Ainslie et al.
    2023). The gradient of a packed argument is packed. Sequence b has rows cu_seqlens[b] to cu_seqlens[b+1] (int32
    [B+1]) and at most `max_seqlen` of them. Rows past the last sequence are not read; their result is 0.

    With fewer query rows than keys, q is [M, H, K], and sequence b has its rows cu_seqlens_q[b] to cu_seqlens_q[b+1]
    (int32 [B+1]). Query rows of a sequence without keys give 0. `scale`, above 0, defaults to K ** -0.5. With `window`,
    an int of at least 0, row i of a sequence sees keys j with |i - j| <= window (Beltagy et al. 2020; ModernBERT).
    Dropout acts on the probabilities. Its mask is indexed by (row of q, head, position of the key in its sequence), see
    `attention_keep_mask`. Returns [T or M, H, K].
    """
    q, k, v = with_all_heads(*apart(q, k, v))
    return attention_by_columns(
        q, k, v, cu_seqlens, None, cu_seqlens_q=cu_seqlens_q, window=window, scale=scale,
        dropout_p=dropout_p, seed=seed, offset=offset,
    )  # fmt: skip


def apart(q, k, v):
    """q, k and v, each [T, H, K], from any of the three packings."""
    if k is None:
        return q.unbind(1)
    return q, *(k.unbind(1) if v is None else (k, v))


def with_all_heads(q, k, v):
    """The same with heads of k and v repeated where query heads share them."""
    group = q.shape[1] // k.shape[1]
    return q, *(x if group == 1 else x.repeat_interleave(group, 1) for x in (k, v))


def attention_by_columns(
    q, k, v, cu_seqlens, columns, *, cu_seqlens_q=None, window=None, position_scores=None, scale=None,
    dropout_p=0.0, seed=None, offset=0,
):  # fmt: skip
    """All attentions in this file: as `attention`, for q, k, v [T, H, K], with token t in column `columns[t]`.

    columns: int64 [T], ascending within a sequence; None: a token's position in its sequence. They matter if padding
    stands between the tokens of a row (a mask such as 1 1 0 1): windows and relative positions count columns.
    position_scores: a function of q, k [L, H, K] and the distances [L, L], the query's column minus the key's, that
    returns scores [H, L, L] to add.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    heads = torch.arange(q.shape[1], device=q.device)[:, None]
    starts = cu_seqlens.tolist()
    starts_q = starts if cu_seqlens_q is None else cu_seqlens_q.tolist()
    outs = []
    for start, end, start_q, end_q in zip(starts, starts[1:], starts_q, starts_q[1:]):
        queries, keys, values = q[start_q:end_q], k[start:end], v[start:end]
        scores = torch.einsum("ihk,jhk->hij", queries * scale, keys)
        place = torch.arange(end - start, device=q.device) if columns is None else columns[start:end]
        distance = place[:, None] - place
        if position_scores is not None:
            scores = scores + position_scores(queries, keys, distance)
        if window is not None:
            scores = scores.masked_fill(distance.abs() > window, float("-inf"))
        probabilities = torch.softmax(scores, -1)
        if dropout_p > 0.0:
            rows = torch.arange(start_q, end_q, device=q.device)
            keep = attention_keep_mask(rows, heads, end - start, seed, offset, dropout_p)
            probabilities = drop(probabilities, keep, dropout_p)
        outs.append(torch.einsum("hij,jhk->ihk", probabilities, values))
    # rows of no sequence give 0; without any sequence every argument still gets a gradient of 0
    outs.append(torch.zeros_like(q[starts_q[-1] :]) + sum(x[:0].sum() for x in (q, k, v)))
    return torch.cat(outs)


def biased_attention(q, k, v, bias, cu_seqlens, max_seqlen, *, scale=None, dropout_p=0.0, seed=None, offset=0):
    """Attention with a learned bias per distance and head: softmax(q kᵀ · scale + bias[i - j]) v.

    q, k, v, cu_seqlens, max_seqlen, dropout and result as in `attention`, with as many query rows as keys. bias
    [2 * span, H]: row span + i - j is for query i and key j of a sequence; span is at least `max_seqlen`. Source:
    Raffel et al. 2020, section 2.1; the caller expands its buckets to distances.
    """

    def scores(q, k, distance):
        return bias[distance + bias.shape[0] // 2].permute(2, 0, 1).to(q.dtype)

    options = dict(scale=scale, dropout_p=dropout_p, seed=seed, offset=offset)
    out = attention_by_columns(*apart(q, k, v), cu_seqlens, None, position_scores=scores, **options)
    return out + bias[:0].sum().to(out.dtype)


def disentangled_attention(
    q, k, v, pos_key, pos_query, cu_seqlens, max_seqlen, *,
    position_buckets=0, max_relative_positions, scale=None, dropout_p=0.0, seed=None, offset=0,
):  # fmt: skip
    """Attention that also scores relative positions, as all versions of DeBERTa do: softmax(s · scale) v with

        s[i, j] = q_i · k_j + q_i · pos_key[d(i - j)] + k_j · pos_query[d(i - j)]

    q, k, v, cu_seqlens, max_seqlen, dropout and result as in `attention`, with as many query rows as keys. pos_key and
    pos_query [2 * span, H, K] are the projected embeddings of relative positions; None: no such term. d(r) is the
    position r, or its bucket, counted from -span and clamped to the table: see `relative_index`. `scale` defaults to
    (K * (1 + the number of position terms)) ** -0.5. Source: He et al. 2021, section 3.
    """
    tables = [x for x in (pos_key, pos_query) if x is not None]
    scale = (q.shape[-1] * (1 + len(tables))) ** -0.5 if scale is None else scale
    longest = max(max_seqlen, 1)
    index = relative_index(longest, position_buckets, max_relative_positions).to(q.device)
    scores = relative_scores(pos_key, pos_query, lambda distance: index[distance + longest - 1], scale)
    options = dict(scale=scale, dropout_p=dropout_p, seed=seed, offset=offset)
    out = attention_by_columns(*apart(q, k, v), cu_seqlens, None, position_scores=scores, **options)
    return out + sum(table[:0].sum() for table in tables)


def relative_index(length, position_buckets, max_relative_positions):
    """int64 [2 * length - 1]: the row of a position table for r = 1 - length, ..., length - 1.

    With `position_buckets` of 0 or -1 (DeBERTa v1) the row is r, and span is `max_relative_positions`. Otherwise (v2,
    v3) span is `position_buckets`; half of the buckets are single positions, and the others grow with the logarithm of
    |r|, in float32. Rows are counted from -span, so that r = 0 is row `span`, and clamped to the table.
    """
    r = torch.arange(1 - length, length)
    span = max_relative_positions
    if position_buckets > 0:
        span, mid = position_buckets, position_buckets // 2
        far = r.abs().clamp(min=mid)
        steps = torch.log(far / mid) / torch.log(torch.tensor((max_relative_positions - 1) / mid)) * (mid - 1)
        r = torch.where(r.abs() <= mid, r, (torch.ceil(steps) + mid).long() * r.sign())
    return (r + span).clamp(0, 2 * span - 1)


def relative_scores(pos_key, pos_query, index, scale):
    """The `position_scores` of disentangled attention. index: a function from distances to rows of the tables pos_key
    and pos_query [2 * span, H, K]."""

    def scores(q, k, distance):
        rows = index(distance).expand(q.shape[1], -1, -1)
        total = 0.0
        if pos_key is not None:
            total = total + torch.einsum("ihk,rhk->hir", q, pos_key).gather(2, rows)
        if pos_query is not None:
            total = total + torch.einsum("rhk,jhk->hrj", pos_query, k).gather(1, rows)
        return total * scale

    return scores


# ------------------------------------------------------------------------------------------------ one row at a time


def linear(x, weight, bias=None):
    """x @ weightᵀ + bias. x [T, D], weight [F, D], bias [F] or None."""
    return F.linear(x, weight, bias)


def linears(x, weights, biases):
    """Several linear layers of x [T, D], with their results [T, F] concatenated; all have a bias, or none has."""
    return F.linear(x, torch.cat(weights), None if biases[0] is None else torch.cat(biases))


def linear_gelu(x, weight, bias=None, *, approximate="none"):
    """GELU(linear(x)), exact (`"none"`) or `"tanh"`."""
    return F.gelu(F.linear(x, weight, bias), approximate=approximate)


def layer_norm(x, weight, bias, *, residual=None, dropout_p=0.0, seed=None, offset=0, eps=1e-12, dtype=None):
    """LayerNorm(dropout(x) + residual). x and residual [T, D]; weight and bias [D], or None for ones and zeros.

    Returns [T, D] in `dtype`, or x's. Under autocast the op of `ops.py` returns the dtype of torch's layer_norm, unless
    `dtype` is given. Source: Ba et al. 2016; post-norm residual of Vaswani et al. 2017, section 5.4.
    """
    z = dropout(x, dropout_p, seed, offset)
    if residual is not None:
        z = z + residual
    dtype = dtype or x.dtype
    # F.layer_norm computes its statistics in fp32, but returns its argument's dtype
    z = z.to(torch.promote_types(z.dtype, dtype))
    weight, bias = (None if p is None else p.to(z.dtype) for p in (weight, bias))
    return F.layer_norm(z, z.shape[-1:], weight, bias, eps).to(dtype)


def bias_gelu(x, bias, *, approximate="none"):
    """GELU(x + bias), exact (`"none"`) or `"tanh"`. x [T, F], bias [F] or None. Returns [T, F] in x's dtype.

    Source: Hendrycks & Gimpel 2016.
    """
    return F.gelu(x if bias is None else x + bias.to(x.dtype), approximate=approximate)


def gelu_layer_norm(x, bias, weight, ln_bias, *, approximate="none", eps=1e-12, dtype=None):
    """LayerNorm(GELU(x + bias)): the masked-LM head after its linear layer. x [T, D]; weight [D]; bias and ln_bias [D]
    or None. Returns [T, D] in `dtype`, or x's (under autocast: see layer_norm).
    """
    return layer_norm(bias_gelu(x, bias, approximate=approximate), weight, ln_bias, eps=eps, dtype=dtype)


def rms_norm(x, weight, *, eps=1e-6):
    """x / sqrt(mean(x²) + eps) · weight. x [T, D], weight [D]. Returns [T, D] in x's dtype.

    Source: Zhang & Sennrich 2019.
    """
    z = x.to(wide(x.dtype))
    return (z * torch.rsqrt(z.square().mean(-1, keepdim=True) + eps) * weight.to(z.dtype)).to(x.dtype)


def gated_activation(x, *, activation="gelu", gate="first"):
    """One half of x [T, 2 F] through an activation, times the other half: [T, F] in x's dtype.

    activation: "gelu" (exact), "gelu_tanh" or "silu". gate: the half that goes through it, "first" or "last". Source:
    Shazeer 2020.
    """
    gated, others = x.chunk(2, -1)[:: 1 if gate == "first" else -1]
    if activation == "silu":
        return F.silu(gated) * others
    return F.gelu(gated, approximate="tanh" if activation == "gelu_tanh" else "none") * others


def embedding(
    input_ids, position_ids, token_type_ids, word, position, token_type, weight, bias, *,
    padding_idx=-1, eps=1e-12, dropout_p=0.0, seed=None, offset=0, dtype=None,
):  # fmt: skip
    """dropout(LayerNorm(word[input_ids] + position[position_ids] + token_type[token_type_ids])).

    Ids int64 [T]; tables [V, D], [P, D], [types, D]; weight [D]; bias [D] or None. The tables of positions and types
    may be None, each with its ids. Row `padding_idx` of `word` gets no gradient (-1: every row gets one). Returns
    [T, D] in `dtype`, or the word table's (under autocast: see layer_norm). Source: Devlin et al. 2019, figure 2.
    """
    z = F.embedding(input_ids, word, padding_idx if padding_idx >= 0 else None)
    for ids, table in ((token_type_ids, token_type), (position_ids, position)):
        if table is not None:
            z = z + F.embedding(ids, table)
    dtype = dtype or word.dtype
    z = layer_norm(z, weight, bias, eps=eps, dtype=torch.promote_types(word.dtype, dtype))
    return dropout(z, dropout_p, seed, offset).to(dtype)


# ---------------------------------------------------------------------------------------- pooling and cross-entropy


def pooling(hidden, cu_seqlens, *, mode="mean", normalize=False, eps=1e-12, dtype=None):
    """One vector for each sequence. `mode`, by sentence-transformers' names: its first token ("cls"), its last
    ("lasttoken"), the "max" of each column, the "mean", the sum over the root of the length ("mean_sqrt_len_tokens"),
    or the mean with the weights 1, 2, 3 ... ("weightedmean").

    hidden [T, D]; sequence b has rows cu_seqlens[b] to cu_seqlens[b+1] (int32 [B+1]). Rows past the last sequence are
    not read and get a gradient of 0. An empty sequence gives 0. With `normalize` each vector is divided by its L2 norm,
    or by `eps` if that is larger, as in F.normalize. Of equal maxima the first gets the gradient, as in torch.max(dim),
    which sentence-transformers calls; torch.amax would divide it among them. Returns [B, D] in `dtype`, or hidden's.
    Sums are fp32. Source: Reimers & Gurevych 2019, section 3.
    """
    check_pooling(mode)
    starts = cu_seqlens.tolist()
    pooled = [hidden[:0].to(wide(hidden.dtype))]
    for start, end in zip(starts, starts[1:]):
        rows = hidden[start:end].to(wide(hidden.dtype))
        n = len(rows)
        weights = torch.arange(1, n + 1, device=rows.device)[:, None]
        if n == 0:
            vector = rows.sum(0)
        elif mode in ("cls", "lasttoken"):
            vector = rows[0 if mode == "cls" else -1]
        elif mode == "max":
            vector = rows.max(0).values
        elif mode == "weightedmean":
            vector = (rows * weights).sum(0) / weights.sum()
        else:
            vector = rows.sum(0) / (n if mode == "mean" else n**0.5)
        pooled.append(vector[None])
    pooled = torch.cat(pooled)
    return (F.normalize(pooled, dim=-1, eps=eps) if normalize else pooled).to(dtype or hidden.dtype)


def check_pooling(mode):
    """Raises ValueError for an unknown mode."""
    if mode not in ("cls", "lasttoken", "max", "mean", "mean_sqrt_len_tokens", "weightedmean"):
        raise ValueError(f"mode={mode!r}: expected cls, lasttoken, max, mean, mean_sqrt_len_tokens or weightedmean")
