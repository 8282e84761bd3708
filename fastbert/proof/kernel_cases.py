"""What each op is compiled for: the shapes of models, and the ways in which these call it, forward and backward.

Tensors are on the "meta" device: they have shapes, strides and alignment but no memory.
"""

import torch

from ..model.config import EncoderConfig
from ..model.presets import preset

# the shapes that kernels are compiled for. Wang et al. 2020 (MiniLM), He et al. 2021 (DeBERTa v3)
MODELS = {
    "bert-base": preset("bert-base"),
    "bert-large": preset("bert-large"),
    "minilm": EncoderConfig(hidden_size=384, intermediate_size=1536),
    "deberta-base": EncoderConfig(vocab_size=128100),
}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

# so many that the number of a row times its stride passes 2^31
ROWS, SEQUENCES = 4 << 20, 1 << 15
PICKED = 9000


def _empty(*shape, dtype):
    return torch.empty(shape, dtype=dtype, device="meta", requires_grad=dtype.is_floating_point)


def _ids(rows):
    return _empty(rows, dtype=torch.int64)


def _backward(out, *inputs):
    torch.autograd.grad(out, inputs, torch.empty_like(out))


def _attention(config, dtype, length, **options):
    from ..kernels.attention import attention

    qkv = _empty(ROWS, 3, config.num_attention_heads, config.hidden_size // config.num_attention_heads, dtype=dtype)
    cu_seqlens = _empty(SEQUENCES + 1, dtype=torch.int32)
    _backward(attention(qkv, None, None, cu_seqlens, length, seed=_ids(1), **options), qkv)


def _disentangled_attention(config, dtype, length, buckets=256, **options):
    from ..kernels.disentangled_attention import disentangled_attention

    shape = config.num_attention_heads, config.hidden_size // config.num_attention_heads
    qkv = _empty(ROWS, 3, *shape, dtype=dtype)
    pos_key, pos_query = (_empty(2 * (buckets or 512), *shape, dtype=dtype) for _ in range(2))
    cu_seqlens = _empty(SEQUENCES + 1, dtype=torch.int32)
    out = disentangled_attention(
        qkv, None, None, pos_key, pos_query, cu_seqlens, length,
        position_buckets=buckets, max_relative_positions=512, seed=_ids(1), **options,
    )  # fmt: skip
    _backward(out, qkv, pos_key, pos_query)


def _biased_attention(config, dtype, length, **options):
    from ..kernels.biased_attention import biased_attention

    shape = config.num_attention_heads, config.hidden_size // config.num_attention_heads
    qkv, bias = _empty(ROWS, 3, *shape, dtype=dtype), _empty(1024, shape[0], dtype=dtype)
    cu_seqlens = _empty(SEQUENCES + 1, dtype=torch.int32)
    _backward(biased_attention(qkv, None, None, bias, cu_seqlens, length, seed=_ids(1), **options), qkv, bias)


def _layer_norm(config, dtype, has_residual, is_mixed=False, **options):
    from ..kernels.layer_norm import layer_norm

    wide = torch.float32 if is_mixed else dtype
    x, residual = (_empty(ROWS, config.hidden_size, dtype=kind) for kind in (dtype, wide))
    weight, bias = (_empty(config.hidden_size, dtype=wide) for _ in range(2))
    inputs = (x, weight, bias, residual) if has_residual else (x, weight, bias)
    y = layer_norm(x, weight, bias, residual=residual if has_residual else None, seed=_ids(1), dtype=wide, **options)
    _backward(y, *inputs)


def _bias_gelu(config, dtype, approximate, is_mixed=False):
    from ..kernels.bias_gelu import bias_gelu

    x = _empty(ROWS, config.intermediate_size, dtype=dtype)
    bias = _empty(config.intermediate_size, dtype=torch.float32 if is_mixed else dtype)
    _backward(bias_gelu(x, bias, approximate=approximate), x, bias)


def _gelu_layer_norm(config, dtype, approximate, is_mixed=False):
    from ..kernels.gelu_layer_norm import gelu_layer_norm

    x = _empty(ROWS, config.hidden_size, dtype=dtype)
    wide = torch.float32 if is_mixed else dtype
    parameters = [_empty(config.hidden_size, dtype=wide) for _ in range(3)]
    _backward(gelu_layer_norm(x, *parameters, approximate=approximate, dtype=wide), x, *parameters)


def _embedding(config, dtype, dropout_p):
    from ..kernels.embedding import embedding

    sizes = config.vocab_size, config.max_position_embeddings, config.type_vocab_size
    tables = [_empty(rows, config.hidden_size, dtype=dtype) for rows in sizes]
    weight, bias = (_empty(config.hidden_size, dtype=dtype) for _ in range(2))
    ids = [_ids(ROWS) for _ in range(3)]
    y = embedding(*ids, *tables, weight, bias, padding_idx=0, dropout_p=dropout_p, seed=_ids(1))
    _backward(y, *tables, weight, bias)


def _masked_cross_entropy(config, dtype, **options):
    from ..kernels.cross_entropy import masked_cross_entropy

    hidden, weight = (_empty(rows, config.hidden_size, dtype=dtype) for rows in (PICKED, config.vocab_size))
    bias = _empty(config.vocab_size, dtype=dtype)
    loss, _, _ = masked_cross_entropy(hidden, weight, bias, _ids(PICKED), **options)
    _backward(loss, hidden, weight, bias)


def _contrastive_cross_entropy(config, dtype, **options):
    from ..kernels.cross_entropy import contrastive_cross_entropy

    query, document = (_empty(rows, config.hidden_size, dtype=dtype) for rows in (PICKED, 2 * PICKED))
    loss, _, _ = contrastive_cross_entropy(query, document, scale=20.0, **options)
    _backward(loss, query, document)


def _pooling(config, dtype, mode, normalize):
    from ..kernels.pooling import pooling

    hidden, cu_seqlens = _empty(ROWS, config.hidden_size, dtype=dtype), _empty(SEQUENCES + 1, dtype=torch.int32)
    _backward(pooling(hidden, cu_seqlens, mode=mode, normalize=normalize), hidden)


# op -> (function that calls it and its backward, {case: arguments}).
# Mixed: parameters, and what residuals are added to, in fp32, as under autocast
CASES = {
    "attention": (
        _attention,
        {
            "S=32 p=.1": dict(length=32, dropout_p=0.1),
            "S=64 p=.1": dict(length=64, dropout_p=0.1),
            "S=128 p=.1": dict(length=128, dropout_p=0.1),
            "S=128": dict(length=128),
            "S=512 p=.1": dict(length=512, dropout_p=0.1),
            "S=512": dict(length=512),
            "window p=.1": dict(length=512, dropout_p=0.1, window=64),
            "window": dict(length=512, window=64),
        },
    ),
    "disentangled_attention": (
        _disentangled_attention,
        {
            "S=64 p=.1": dict(length=64, dropout_p=0.1),
            "S=128 p=.1": dict(length=128, dropout_p=0.1),
            "S=128": dict(length=128),
            "S=512 p=.1": dict(length=512, dropout_p=0.1),
            "S=512": dict(length=512),
        },
    ),
    "biased_attention": (
        _biased_attention,
        {"S=128 p=.1": dict(length=128, dropout_p=0.1), "S=512 p=.1": dict(length=512, dropout_p=0.1)},
    ),
    "layer_norm": (
        _layer_norm,
        {
            "residual p=.1": dict(has_residual=True, dropout_p=0.1),
            "bare": dict(has_residual=False),
            "mixed p=.1": dict(has_residual=True, dropout_p=0.1, is_mixed=True),
        },
    ),
    "bias_gelu": (
        _bias_gelu,
        {
            "erf": dict(approximate="none"),
            "tanh": dict(approximate="tanh"),
            "mixed": dict(approximate="none", is_mixed=True),
        },
    ),
    "gelu_layer_norm": (
        _gelu_layer_norm,
        {
            "erf": dict(approximate="none"),
            "tanh": dict(approximate="tanh"),
            "mixed": dict(approximate="none", is_mixed=True),
        },
    ),
    "embedding": (_embedding, {"p=.1": dict(dropout_p=0.1)}),
    "masked_cross_entropy": (
        _masked_cross_entropy,
        {
            "plain": {},
            "smoothed": dict(label_smoothing=0.1),
        },
    ),
    "pooling": (
        _pooling,
        {
            "cls": dict(mode="cls", normalize=False),
            "cls L2": dict(mode="cls", normalize=True),
            "mean L2": dict(mode="mean", normalize=True),
            "max": dict(mode="max", normalize=False),
        },
    ),
    "contrastive_cross_entropy": (
        _contrastive_cross_entropy,
        {"plain": {}, "symmetric": dict(symmetric=True)},
    ),
}


# by default every model runs an op. MPNet-base, which alone has biased_attention, has the shapes of bert-base
_MODELS = {
    "attention": ("bert-base", "bert-large", "minilm"),
    "disentangled_attention": ("deberta-base",),
    "biased_attention": ("bert-base",),
}


def cases_of(op, model):
    """Names of the op's cases that `model` runs."""
    return list(CASES[op][1]) if model in _MODELS.get(op, MODELS) else []
