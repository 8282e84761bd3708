"""One function per op. It picks the op's implementation and handles autocast.

`impl=` on a call, or else the environment variable FASTBERT_IMPL, selects the implementation:

    auto        kernels for tensors on a GPU, `cpu` for tensors on a CPU, else the reference (the default)
    triton      the kernels; on a CPU they need Triton's interpreter (TRITON_INTERPRET=1)
    cpu         the fast functions for a CPU, in PyTorch and NumPy
    reference   plain PyTorch on any device

If the requested implementation cannot run, the call raises. Arguments, shapes and results are those of the function of
the same name in `reference.py`, which runs under torch.func's transforms, too. Second derivatives use it on a CPU;
kernels have none.
"""

import importlib.util
import os
from collections.abc import Callable, Sequence

import torch

from . import reference
from .cpu import attention as cpu_attention
from .cpu import inference, matmul
from .cpu import libraries as libraries
from .cpu import low_precision as low_precision
from .cpu import ops as cpu
from .cpu.autograd import in_memory as in_memory
from .cpu.autograd import is_transformed as is_transformed
from .values import check as check
from .values import check_ids as check_ids
from .values import check_sequences

PostNorm, PreNorm = inference.PostNorm, inference.PreNorm
IMPLEMENTATIONS = ("auto", "triton", "cpu", "reference")
IMPL = os.environ.get("FASTBERT_IMPL", "auto")
if IMPL not in IMPLEMENTATIONS:
    raise ValueError(f"FASTBERT_IMPL={IMPL!r}: expected one of {', '.join(IMPLEMENTATIONS)}")


try:
    _TRITON_FOUND = importlib.util.find_spec("triton") is not None
except ImportError:
    # an import hook may forbid the import
    _TRITON_FOUND = False


def has_triton() -> bool:
    """Whether the Triton package is installed."""
    return _TRITON_FOUND


def _kernel(op):
    # one statement per file: torch.compile traces import statements, but neither importlib nor functools.cache
    match op:
        case "attention":
            from .kernels import attention as module
        case "bias_gelu":
            from .kernels import bias_gelu as module
        case "biased_attention":
            from .kernels import biased_attention as module
        case "contrastive_cross_entropy" | "masked_cross_entropy":
            from .kernels import cross_entropy as module
        case "disentangled_attention":
            from .kernels import disentangled_attention as module
        case "embedding":
            from .kernels import embedding as module
        case "gated_activation":
            from .kernels import gated_activation as module
        case "gelu_layer_norm":
            from .kernels import gelu_layer_norm as module
        case "layer_norm":
            from .kernels import layer_norm as module
        case "pooling":
            from .kernels import pooling as module
        case "rms_norm":
            from .kernels import rms_norm as module
        case "vocabulary_max":
            from .kernels import vocabulary_max as module
    return getattr(module, op)


def implementation(device: torch.device, impl: str | None = None) -> str:
    """ "triton", "cpu" or "reference": what an op runs on tensors of `device`, with `impl` or FASTBERT_IMPL."""
    impl = IMPL if impl is None else impl
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl={impl!r}: expected one of {', '.join(IMPLEMENTATIONS)}")
    if impl == "triton" and device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        raise RuntimeError(
            "the Triton kernels were requested for a CPU tensor: set TRITON_INTERPRET=1 before importing triton"
        )
    if impl == "cpu" and device.type != "cpu":
        raise RuntimeError(f"impl='cpu' was requested for a {device.type} tensor: expected auto, triton or reference")
    if impl != "auto":
        return impl
    if device.type == "cuda" and has_triton():
        return "triton"
    return "cpu" if device.type == "cpu" else "reference"


def uses_triton(device: torch.device, impl: str | None = None) -> bool:
    """Whether an op on tensors of `device` runs the kernels."""
    return implementation(device, impl) == "triton"


def pays(x: torch.Tensor, tokens: int, places: int, width: int, training: bool, pairs: bool = False) -> bool:
    """Whether a stack of another's layers, `width` wide, is faster with our ops on `tokens` packed rows than with its
    own modules on `places` padded rows. x: a tensor on their device. training: whether gradients will be wanted, also
    where activation checkpointing turns them off first. pairs: attention alone; both count pairs of query and key.

    On a GPU always, and with an `impl` or a dtype that is asked for. On a CPU by what was measured there.
    """
    if x.device.type != "cpu" or IMPL != "auto" or places == 0 or torch.compiler.is_compiling():
        return True
    training = training or torch.is_grad_enabled()
    rule = cpu_attention.pays if pairs else matmul.pays
    return low_precision.current() != "fp32" or rule(tokens, places, width, training, torch.get_num_threads())


def may_prepare(x: torch.Tensor, rows: int, width: int) -> bool:
    """Whether `prepare` may have something for rows like x, of a layer `width` wide, that is worth the search in
    another's modules."""
    is_on_cpu = x.device.type == "cpu" and x.dtype == torch.float32 and IMPL in ("auto", "cpu")
    return is_on_cpu and not torch.is_grad_enabled() and rows * width**2 >= libraries.LEAST


def prepare(module: torch.nn.Module, x: torch.Tensor, find: Callable) -> Callable | None:
    """An `inference.Layer` for rows like x; None where nothing is faster than the ops one by one: on a GPU, where
    gradients are wanted, under autocast, for other dtypes than float32.

    module: whose layer this is. find(module): the arguments of Layer, or None where a module inside must be called;
    asked once, and again after a change inside the module. Weights are prepared once, and again after a change.
    """
    is_chosen = x.device.type == "cpu" and IMPL in ("auto", "cpu") and not torch.is_grad_enabled()
    is_traced = torch.compiler.is_compiling() or torch.jit.is_tracing() or is_transformed()
    if not is_chosen or is_traced or _autocasts(x):
        return None
    return inference.prepare(module, find)


def _run(op, impl, x, *arguments, **options):
    """Run the chosen implementation of an op on x and the other arguments, without autocast."""
    chosen = implementation(x.device, impl)
    if is_transformed():
        if chosen == "triton" and (impl or IMPL) == "triton":
            raise RuntimeError(
                f"{op}: torch.func and forward mode need plain PyTorch: expected impl='auto' or 'reference'"
            )
        chosen = "reference"
    if chosen == "reference" or any(map(_is_wrapper, arguments)):
        function = getattr(reference, op)
    else:
        function = _kernel(op) if chosen == "triton" else getattr(cpu, op)
    # on a small batch, entering an autocast that changes nothing takes longer than some ops
    if not _autocasts(x):
        return function(x, *arguments, **options)
    with torch.autocast(x.device.type, enabled=False):
        return function(x, *arguments, **options)


def _is_wrapper(x):
    """Whether x is a tensor subclass that computes in its own way, such as a quantised weight: it has no memory of the
    kind that a kernel reads."""
    return type(x) not in (torch.Tensor, torch.nn.Parameter) and hasattr(type(x), "__tensor_flatten__")


def _library(op, x):
    """An op without a kernel: a GPU runs it with its own library."""
    is_plain = implementation(x.device) == "reference" or x.device.type != "cpu" or _autocasts(x) or is_transformed()
    return getattr(reference if is_plain else cpu, op)


def _autocasts(x):
    # torch raises for autocast of the meta device
    return x.device.type != "meta" and torch.is_autocast_enabled(x.device.type)


def _autocast(x, *tensors):
    """The tensors in autocast's dtype, if autocast is on: torch's own matrix products run in that dtype."""
    if not _autocasts(x):
        return x, *tensors
    dtype = torch.get_autocast_dtype(x.device.type)
    return tuple(t if t is None else t.to(dtype) for t in (x, *tensors))


def _wide_under_autocast(x, *others):
    """The dtype that torch's own layer_norm (and sum, and norm) return under autocast; None without autocast.

    On a GPU autocast runs them in fp32. On a CPU it does not, and they return the dtype of their input: x with `others`
    added to it (None: absent).
    """
    if not _autocasts(x):
        return None
    dtype = x.dtype if x.device.type == "cpu" else torch.promote_types(x.dtype, torch.float32)
    for other in others:
        dtype = dtype if other is None else torch.promote_types(dtype, other.dtype)
    return dtype


def _check_dropout(dropout_p, seed):
    """Raises ValueError if dropout cannot be drawn: it is never left out silently."""
    if not 0.0 <= dropout_p <= 1.0:
        raise ValueError(f"dropout_p is {dropout_p}: expected a probability, 0 to 1")
    if dropout_p > 0.0 and seed is None:
        raise ValueError(f"dropout_p is {dropout_p} and seed is None: expected an int64 tensor [1]")


def _check_shape(name, x, *shape):
    # a kernel would read past the end of a smaller tensor, where PyTorch raises or broadcasts
    if x is not None and tuple(x.shape) != shape:
        raise ValueError(f"{name} has shape {list(x.shape)}: expected {list(shape)}")


def dropout(x: torch.Tensor, dropout_p: float, seed: torch.Tensor | None, offset: int = 0) -> torch.Tensor:
    """Dropout of x [T, D] where no kernel includes it: see `reference.dropout`."""
    _check_dropout(dropout_p, seed)
    return _library("dropout", x)(x, dropout_p, seed, offset)


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x @ weightᵀ + bias for x [T, D], by the device's own matrix library: see `reference.linear`."""
    return _library("linear", x)(x, weight, bias)


def linears(x: torch.Tensor, weights: Sequence[torch.Tensor], biases: Sequence[torch.Tensor | None]) -> torch.Tensor:
    """Several linear layers of x [T, D], with their results concatenated: see `reference.linears`."""
    if any(map(_is_wrapper, weights)):
        return torch.cat([linear(x, weight, bias) for weight, bias in zip(weights, biases)], 1)
    x, *cast = _autocast(x, *weights, *biases)
    return _library("linears", x)(x, cast[: len(weights)], cast[len(weights) :])


def linear_gelu(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, *, approximate: str = "none",
    impl: str | None = None,
) -> torch.Tensor:  # fmt: skip
    """GELU(linear(x)) for x [T, D], weight [F, D]. The bias is added for free: in the GELU's kernel, or on a CPU in the
    product."""
    chosen = implementation(x.device, impl)
    if chosen == "cpu" and not _autocasts(x) and not is_transformed():
        return cpu.linear_gelu(x, weight, bias, approximate=approximate)
    if chosen == "triton":
        return bias_gelu(linear(x, weight), bias, approximate=approximate, impl=impl)
    return bias_gelu(linear(x, weight, bias), None, approximate=approximate, impl=impl)


def attention(
    q: torch.Tensor, k: torch.Tensor | None, v: torch.Tensor | None, cu_seqlens: torch.Tensor, max_seqlen: int, *,
    cu_seqlens_q: torch.Tensor | None = None, max_seqlen_q: int | None = None, scale: float | None = None,
    dropout_p: float = 0.0, window: int | None = None, seed: torch.Tensor | None = None, offset: int = 0,
    impl: str | None = None,
) -> torch.Tensor:  # fmt: skip
    """Packed bidirectional softmax attention, also within a window, with dropout: see `reference.attention`."""
    _check_dropout(dropout_p, seed)
    _check_attention(q, k, v, cu_seqlens, max_seqlen, scale, cu_seqlens_q, max_seqlen_q, window, shares=True)
    q, k, v = _autocast(q, k, v)
    return _run(
        "attention", impl, q, k, v, cu_seqlens, max_seqlen, cu_seqlens_q=cu_seqlens_q, max_seqlen_q=max_seqlen_q,
        scale=scale, dropout_p=dropout_p, window=window, seed=seed, offset=offset,
    )  # fmt: skip


def _check_attention(
    q, k, v, cu_seqlens, max_seqlen, scale, cu_seqlens_q=None, max_seqlen_q=None, window=None, *, shares=False
):
    shapes = [tuple(x.shape) for x in (q, k, v) if x is not None]
    if k is None:
        is_right = v is None and q.dim() == 4 and q.shape[1] == 3
    elif v is None:
        is_right = q.dim() == 3 and k.dim() == 4 and k.shape[1] == 2
    else:
        is_right = q.dim() == k.dim() == 3 and k.shape == v.shape
    if is_right and k is not None:
        H, heads = q.shape[1], k.shape[-2]
        is_right = k.shape[-1] == q.shape[-1] and (heads == H or shares and heads > 0 and H % heads == 0)
    if not is_right:
        raise ValueError(
            f"q, k, v have shapes {', '.join(map(str, shapes))}: expected q [T, 3, H, K] alone, or q [M, H, K] with "
            "k [T, 2, H, K], or with k and v [T, H, K]" + "; or H a multiple of the heads of k and v" * shares
        )
    check_sequences(cu_seqlens, len(q if k is None else k), max_seqlen)
    if cu_seqlens_q is None:
        if k is not None and len(k) != len(q):
            raise ValueError(f"q has {len(q)} rows and k {len(k)}: expected equal numbers, or cu_seqlens_q")
    elif k is None:
        raise ValueError("cu_seqlens_q is given with q [T, 3, H, K]: expected q [M, H, K] with k and v")
    elif cu_seqlens_q.shape != cu_seqlens.shape:
        raise ValueError(f"cu_seqlens_q has shape {tuple(cu_seqlens_q.shape)}: expected {tuple(cu_seqlens.shape)}")
    else:
        check_sequences(cu_seqlens_q, len(q), max_seqlen_q, "cu_seqlens_q")
    if scale is not None and not scale > 0:
        raise ValueError(f"scale is {scale}: expected a number above 0")
    if window is not None and not (isinstance(window, int) and window >= 0):
        raise ValueError(f"window is {window}: expected None or an int of at least 0")
    if window is not None and cu_seqlens_q is not None:
        raise ValueError("window and cu_seqlens_q are given: a window needs the position of each query row")


def biased_attention(
    q: torch.Tensor, k: torch.Tensor | None, v: torch.Tensor | None, bias: torch.Tensor, cu_seqlens: torch.Tensor,
    max_seqlen: int, *, scale: float | None = None, dropout_p: float = 0.0, seed: torch.Tensor | None = None,
    offset: int = 0, impl: str | None = None,
) -> torch.Tensor:  # fmt: skip
    """Attention with a learned bias per distance and head: see `reference.biased_attention`.

    Raises ValueError if the bias has too few rows for `max_seqlen`.
    """
    _check_dropout(dropout_p, seed)
    _check_attention(q, k, v, cu_seqlens, max_seqlen, scale)
    if bias.shape[0] < 2 * max_seqlen:
        raise ValueError(
            f"bias has {bias.shape[0]} rows: expected at least {2 * max_seqlen} for max_seqlen {max_seqlen}"
        )
    q, k, v = _autocast(q, k, v)
    options = dict(scale=scale, dropout_p=dropout_p, seed=seed, offset=offset)
    return _run("biased_attention", impl, q, k, v, bias, cu_seqlens, max_seqlen, **options)


def disentangled_attention(
    q: torch.Tensor, k: torch.Tensor | None, v: torch.Tensor | None, pos_key: torch.Tensor | None,
    pos_query: torch.Tensor | None, cu_seqlens: torch.Tensor, max_seqlen: int, *, position_buckets: int = 0,
    max_relative_positions: int, scale: float | None = None, dropout_p: float = 0.0, seed: torch.Tensor | None = None,
    offset: int = 0, impl: str | None = None,
) -> torch.Tensor:  # fmt: skip
    """DeBERTa's attention, with scores of relative positions: see `reference.disentangled_attention`."""
    _check_dropout(dropout_p, seed)
    _check_attention(q, k, v, cu_seqlens, max_seqlen, scale)
    _check_positions(q, pos_key, pos_query, position_buckets, max_relative_positions)
    q, k, v, pos_key, pos_query = _autocast(q, k, v, pos_key, pos_query)
    return _run(
        "disentangled_attention", impl, q, k, v, pos_key, pos_query, cu_seqlens, max_seqlen,
        position_buckets=position_buckets, max_relative_positions=max_relative_positions,
        scale=scale, dropout_p=dropout_p, seed=seed, offset=offset,
    )  # fmt: skip


def _check_positions(q, pos_key, pos_query, position_buckets, max_relative_positions):
    if max_relative_positions < 1:
        raise ValueError(f"max_relative_positions is {max_relative_positions}: expected 1 or more")
    span = position_buckets if position_buckets > 0 else max_relative_positions
    if position_buckets == 1 or position_buckets > 0 and max_relative_positions < position_buckets // 2 + 2:
        raise ValueError(
            f"position_buckets is {position_buckets} and max_relative_positions {max_relative_positions}: expected 0 "
            "or -1 for no buckets, or at least 2 with max_relative_positions of at least position_buckets // 2 + 2"
        )
    for name, table in (("pos_key", pos_key), ("pos_query", pos_query)):
        if table is not None and tuple(table.shape) != (2 * span, *q.shape[-2:]):
            raise ValueError(
                f"{name} has shape {tuple(table.shape)}: expected {(2 * span, *q.shape[-2:])}, two rows for each of "
                f"{span} distances"
            )


def layer_norm(
    x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, *, residual: torch.Tensor | None = None,
    dropout_p: float = 0.0, seed: torch.Tensor | None = None, offset: int = 0, eps: float = 1e-12,
    dtype: torch.dtype | None = None, impl: str | None = None,
) -> torch.Tensor:  # fmt: skip
    """LayerNorm(dropout(x) + residual) in one pass: see `reference.layer_norm`."""
    _check_dropout(dropout_p, seed)
    _check_shape("weight", weight, x.shape[-1])
    _check_shape("bias", bias, x.shape[-1])
    _check_shape("residual", residual, *x.shape)
    dtype = dtype or _wide_under_autocast(x, residual)
    return _run(
        "layer_norm", impl, x, weight, bias, residual=residual, dropout_p=dropout_p, seed=seed, offset=offset, eps=eps,
        dtype=dtype,
    )  # fmt: skip


def bias_gelu(
    x: torch.Tensor, bias: torch.Tensor | None, *, approximate: str = "none", impl: str | None = None,
) -> torch.Tensor:  # fmt: skip
    """GELU(x + bias) in one pass: see `reference.bias_gelu`."""
    _check_shape("bias", bias, x.shape[-1])
    return _run("bias_gelu", impl, x, bias, approximate=approximate)


def gelu_layer_norm(
    x: torch.Tensor, bias: torch.Tensor | None, weight: torch.Tensor, ln_bias: torch.Tensor | None, *,
    approximate: str = "none", eps: float = 1e-12, dtype: torch.dtype | None = None, impl: str | None = None,
) -> torch.Tensor:  # fmt: skip
    """LayerNorm(GELU(x + bias)) in one pass: see `reference.gelu_layer_norm`."""
    for name, parameter in (("bias", bias), ("weight", weight), ("ln_bias", ln_bias)):
        _check_shape(name, parameter, x.shape[-1])
    dtype = dtype or _wide_under_autocast(x)
    return _run("gelu_layer_norm", impl, x, bias, weight, ln_bias, approximate=approximate, eps=eps, dtype=dtype)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, *, eps: float = 1e-6, impl: str | None = None) -> torch.Tensor:
    """x over the root of its mean square, times the weight, in one pass: see `reference.rms_norm`."""
    _check_shape("weight", weight, x.shape[-1])
    return _run("rms_norm", impl, x, weight, eps=eps)


def gated_activation(
    x: torch.Tensor, *, activation: str = "gelu", gate: str = "first", impl: str | None = None
) -> torch.Tensor:
    """One half of x through an activation, times the other half, in one pass: see `reference.gated_activation`.

    Raises ValueError for another activation or gate, and for an odd number of columns.
    """
    if activation not in ("gelu", "gelu_tanh", "silu"):
        raise ValueError(f"activation={activation!r}: expected gelu, gelu_tanh or silu")
    if gate not in ("first", "last"):
        raise ValueError(f"gate={gate!r}: expected first or last")
    if x.shape[-1] % 2:
        raise ValueError(f"x has shape {list(x.shape)}: expected an even number of columns, two halves")
    return _run("gated_activation", impl, x, activation=activation, gate=gate)


def embedding(
    input_ids: torch.Tensor, position_ids: torch.Tensor | None, token_type_ids: torch.Tensor | None,
    word: torch.Tensor, position: torch.Tensor | None, token_type: torch.Tensor | None, weight: torch.Tensor,
    bias: torch.Tensor | None, *, padding_idx: int = -1, eps: float = 1e-12, dropout_p: float = 0.0,
    seed: torch.Tensor | None = None, offset: int = 0, dtype: torch.dtype | None = None, impl: str | None = None,
) -> torch.Tensor:  # fmt: skip
    """Three lookups, their sum, LayerNorm and dropout in one pass: see `reference.embedding`."""
    _check_dropout(dropout_p, seed)
    given = (("input", input_ids, word), ("position", position_ids, position))
    for name, ids, table in (*given, ("token_type", token_type_ids, token_type)):
        if table is not None:
            if ids is None:
                raise ValueError(f"{name}_ids is None: expected ids, as there is a table")
            _check_shape(name, table, len(table), word.shape[1])
            _check_shape(f"{name}_ids", ids, *input_ids.shape)
            check_ids(f"{name}_ids", ids, len(table))
    _check_shape("weight", weight, word.shape[1])
    _check_shape("bias", bias, word.shape[1])
    dtype = dtype or _wide_under_autocast(word, position, token_type)
    return _run(
        "embedding", impl, input_ids, position_ids, token_type_ids, word, position, token_type, weight, bias,
        padding_idx=padding_idx, eps=eps, dropout_p=dropout_p, seed=seed, offset=offset, dtype=dtype,
    )  # fmt: skip


def pooling(
    hidden: torch.Tensor, cu_seqlens: torch.Tensor, *, mode: str = "mean", normalize: bool = False, eps: float = 1e-12,
    dtype: torch.dtype | None = None, impl: str | None = None,
) -> torch.Tensor:  # fmt: skip
    """One vector for each packed sequence, with L2 normalisation, in one pass: see `reference.pooling`."""
    check_sequences(cu_seqlens, len(hidden), None)
    if normalize or mode in ("mean", "mean_sqrt_len_tokens", "weightedmean"):
        dtype = dtype or _wide_under_autocast(hidden)
    return _run("pooling", impl, hidden, cu_seqlens, mode=mode, normalize=normalize, eps=eps, dtype=dtype)


def masked_cross_entropy(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, labels: torch.Tensor, *,
    ignore_index: int = -100, label_smoothing: float = 0.0, impl: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """Projection to the vocabulary and cross-entropy without the logits: see `reference.masked_cross_entropy`."""
    _check_shape("weight", weight, len(weight), hidden.shape[1])
    _check_shape("bias", bias, len(weight))
    _check_shape("labels", labels, len(hidden))
    check_ids("labels", labels, len(weight), ignore_index)
    hidden, weight, bias = _autocast(hidden, weight, bias)
    options = dict(ignore_index=ignore_index, label_smoothing=label_smoothing)
    return _run("masked_cross_entropy", impl, hidden, weight, bias, labels, **options)


def contrastive_cross_entropy(
    query: torch.Tensor, document: torch.Tensor, labels: torch.Tensor | None = None, *,
    scale: float | torch.Tensor = 1.0, symmetric: bool = False, excluded: torch.Tensor | None = None,
    ignore_index: int = -100, impl: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """Each query's document against all others, without keeping the scores: see `reference.contrastive_cross_entropy`.

    Raises ValueError for arguments that do not fit, such as fewer documents than queries without labels.
    """
    shapes = f"query {list(query.shape)}, document {list(document.shape)}"
    if query.dim() != 2 or document.dim() != 2 or query.shape[1] != document.shape[1]:
        raise ValueError(f"{shapes}: expected [B, D] and [N, D]")
    if labels is None and len(document) < len(query):
        raise ValueError(f"{shapes}: expected a document for each query, or labels with the document of each query")
    _check_shape("labels", labels, len(query))
    if labels is not None:
        check_ids("labels", labels, len(document), ignore_index)
    if excluded is not None:
        if symmetric and labels is not None:
            raise ValueError("symmetric is true, and excluded and labels are given: expected only one of these two")
        _check_shape("excluded", excluded, len(excluded), 2)
        limits = excluded.new_tensor([len(query), len(document)])
        check((excluded >= 0) & (excluded < limits), "excluded names a query or a document that is not there")
    query, document = _autocast(query, document)
    options = dict(scale=scale, symmetric=symmetric, excluded=excluded, ignore_index=ignore_index)
    return _run("contrastive_cross_entropy", impl, query, document, labels, **options)


def vocabulary_max(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, cu_seqlens: torch.Tensor, max_seqlen: int,
    *, impl: str | None = None,
) -> torch.Tensor:  # fmt: skip
    """The weight of each word in a text, without the logits of its tokens: see `reference.vocabulary_max`."""
    _check_shape("weight", weight, len(weight), hidden.shape[1])
    _check_shape("bias", bias, len(weight))
    check_sequences(cu_seqlens, len(hidden), max_seqlen)
    hidden, weight, bias = _autocast(hidden, weight, bias)
    return _run("vocabulary_max", impl, hidden, weight, bias, cu_seqlens, max_seqlen)
