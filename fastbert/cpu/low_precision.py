"""Linear layers in bf16 or int8 for inference; what is around them stays in float32.

int8: a row of x is mapped to 0 .. 1 by its smallest value lo and its range r, and rounded to 8 bits; a row of the
weight by its largest magnitude. The integers are multiplied exactly:

    y = r (x' w'ᵀ) + lo sum(w') + bias,   x' = round((x - lo) / r),  w' = round(weight),  both in steps of their own

No row reads another, so the texts of a batch do not change each other's results. Weights are packed once, and again
after a change. Which of torch's two libraries for int8 multiplies, and whether bf16 or int8 are worth their casts, is
measured: see libraries.py.
"""

import contextlib
import functools
import threading
import warnings
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch.utils.weak import WeakTensorKeyDictionary

from .autograd import in_memory
from .libraries import measured

DTYPES = ("fp32", "bf16", "int8")
# below this ratio of times, a model gains nothing: attention, norms and GELU stay as they are
WORTH = 1.2
# of the vectors of a model in int8 to those in float32
LEAST_COSINE = 0.99
# rows, inputs and outputs of the product that decides: BERT-base's, of a few texts
_SIZES = 96, 768, 768
_ENGINES = ("onednn", "fbgemm")
_TINY = torch.finfo(torch.float32).tiny


class _Current(threading.local):
    dtype = "fp32"


_current = _Current()
# torch's engine is a setting of the process
_lock = threading.Lock()


@contextlib.contextmanager
def products(dtype: str, x: torch.Tensor | None = None) -> Iterator[None]:
    """Within it, linear layers of parameters multiply in `dtype`, one of DTYPES, where no gradient is wanted.

    x: an input, if there is one. Warns if it is not on a CPU: its layers multiply in their own dtype.
    """
    if dtype != "fp32" and x is not None and x.device.type != "cpu":
        warnings.warn(f"dtype is {dtype!r} and the model is on {x.device}: bf16 and int8 are for a CPU", stacklevel=3)
    before, _current.dtype = _current.dtype, dtype
    try:
        yield
    finally:
        _current.dtype = before


def current() -> str:
    """The dtype that linear layers multiply in now, one of DTYPES."""
    is_off = _current.dtype == "fp32" or torch.is_grad_enabled() or torch.compiler.is_compiling()
    return "fp32" if is_off else _current.dtype


# ------------------------------------------------------------------------------------------------------- one product


class Packed:
    """weight float32 [N, K] in `dtype`, bf16 or int8. Call it with x [M, K] and the bias: x @ weight.T + bias, [M, N].

    The result is float32, or bfloat16 behind a GELU in bf16: the next product reads that.
    """

    def __init__(self, weight: torch.Tensor, dtype: str) -> None:
        self.dtype = dtype
        if dtype == "int8":
            engine = fastest_engine()
            (self.weight, self.sums), self.reduces = _int8_weight(weight, engine), saturates(engine)
        else:
            self.weight = weight.bfloat16()
            if has_bf16():
                self.weight = torch.ops.mkldnn._reorder_linear_weight(self.weight.contiguous())

    def __call__(self, x: torch.Tensor, bias: torch.Tensor | None, gelu: str | None = None) -> torch.Tensor:
        """gelu: "none" or "tanh" as PyTorch names it; None for none."""
        if self.dtype == "int8":
            y = _int8_product(x, self.weight, self.sums, bias, self.reduces)
            return y if gelu is None else F.gelu(y, approximate=gelu)
        x, bias = x.bfloat16(), None if bias is None else bias.bfloat16()
        if self.weight.is_mkldnn:
            activation, form = ("none", "") if gelu is None else ("gelu", gelu)
            y = torch.ops.mkldnn._linear_pointwise(x, self.weight, bias, activation, [], form)
        else:
            y = F.linear(x, self.weight, bias)
            y = y if gelu is None else F.gelu(y, approximate=gelu)
        return y.float() if gelu is None else y


def _int8_weight(weight, engine):
    """(the weight [N, K] as the library `engine` reads it, quantised by rows; the sums of its rows)."""
    scale = weight.abs().amax(1).clamp_(min=_TINY).div_(127)
    integers = (weight / scale[:, None]).round_().to(torch.int8)
    with _lock, warnings.catch_warnings():
        # torch will replace its quantised tensors one day
        warnings.simplefilter("ignore")
        before, torch.backends.quantized.engine = torch.backends.quantized.engine, engine
        try:
            zeros = torch.zeros(len(scale), dtype=torch.int64)
            quantised = torch._make_per_channel_quantized_tensor(integers, scale.double(), zeros, 0)
            return torch.ops.quantized.linear_prepack(quantised, None), integers.float().sum(1).mul_(scale)
        finally:
            torch.backends.quantized.engine = before


def _int8_product(x, packed, sums, bias, reduces):
    if not len(x):
        return x.new_empty(0, len(sums))
    # amin and amax: aminmax takes ten times as long
    lo = x.amin(1, keepdim=True)
    r = x.amax(1, keepdim=True).sub_(lo)
    # divided, not multiplied by 1 / r: torch quantises by the range of the whole tensor, so all rows must reach 1
    scaled = x.sub(lo).div_(r.clamp(min=_TINY))
    is_finite = r.isfinite()
    if not is_finite.all():
        # the result of this row is r * 0, NaN; the others do not see it
        scaled.masked_fill_(~is_finite, 0.0)
    y = torch.ops.quantized.linear_dynamic(scaled, packed, reduces)
    offset = lo * sums if bias is None else torch.addcmul(bias, lo, sums)
    return offset.addcmul_(y, r)


@functools.cache
def saturates(engine: str) -> bool:
    """Whether the sum of two products of 8 bits overflows, as it does on x86 without VNNI: x then gets 7 bits."""
    x, weight = torch.ones(1, 64), torch.ones(1, 64)
    x[0, 0] = 0.0
    return abs(_int8_product(x, *_int8_weight(weight, engine), None, False).item() - 63) > 1


# ------------------------------------------------------------------------------------------------------- what is worth


def has_bf16() -> bool:
    """Whether oneDNN multiplies bf16 on this processor at all."""
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def fastest_engine() -> str | None:
    """The library that multiplies int8 fastest here, as torch.backends.quantized names it; None if there is none."""
    there = [engine for engine in _ENGINES if engine in torch.backends.quantized.supported_engines]
    if len(there) < 2 or not hasattr(torch, "_make_per_channel_quantized_tensor"):
        return there[0] if there and hasattr(torch, "_make_per_channel_quantized_tensor") else None
    times = measured("int8", _SIZES, _candidates)
    return there[times.index(min(times))]


def gain(dtype: str) -> float:
    """How many times as fast as in float32 linear layers are in bf16 or int8 here, casts included; 0.0: there are
    none."""
    if not (has_bf16() if dtype == "bf16" else fastest_engine()):
        return 0.0
    low, full = measured(f"{dtype}-gain", _SIZES, _candidates)
    return full / low


def chosen(dtype: str) -> str:
    """The dtype of DTYPES to multiply in where "auto", "fp32", "bf16" or "int8" is asked for.

    auto: bf16 where that is faster. Otherwise a dtype that is not faster than float32 gives "fp32", with a warning.
    Raises ValueError for anything else.
    """
    if not isinstance(dtype, str) or dtype not in ("auto", *DTYPES):
        raise ValueError(f"dtype is {dtype!r}: expected auto, {', '.join(DTYPES)}")
    if dtype == "auto":
        return "bf16" if gain("bf16") >= WORTH else "fp32"
    if dtype != "fp32" and (found := gain(dtype)) < WORTH:
        warnings.warn(
            f"dtype {dtype} is {found:.2f} times as fast as fp32 on this processor: fp32 is used", stacklevel=2
        )
        return "fp32"
    return dtype


@torch.no_grad()
def check_int8(module: torch.nn.Module, run: Callable[[], torch.Tensor]) -> None:
    """Raise ValueError, with the figure, if a module loses too much in int8.

    run: returns its hidden states [B, S, D] on a probe. The mean of each sequence is compared with that in float32: the
    smallest cosine must be at least LEAST_COSINE.
    """
    vectors, modes = [], [(inner, inner.training) for inner in module.modules()]
    module.eval()
    try:
        for dtype in ("fp32", "int8"):
            with products(dtype):
                vectors.append(run().float().mean(1))
    finally:
        for inner, training in modes:
            inner.training = training
    cosine = F.cosine_similarity(*vectors).min().item()
    # NaN compares as false
    if not cosine >= LEAST_COSINE:
        raise ValueError(
            f"dtype int8: the cosine to fp32 falls to {cosine:.4f} for this model: expected at least {LEAST_COSINE}, "
            "use bf16 or fp32"
        )


def _candidates(kind, sizes):
    """Two functions, a product each. int8: by each of _ENGINES; bf16-gain, int8-gain: in that dtype, and in float32 by
    the faster library."""
    M, K, N = sizes
    x, weight, bias = torch.ones(M, K), torch.ones(N, K), torch.ones(N)
    if kind == "int8":
        packed = [(*_int8_weight(weight, engine), bias, saturates(engine)) for engine in _ENGINES]
        return [functools.partial(_int8_product, x, *arguments) for arguments in packed]
    low, full = Packed(weight, kind.removesuffix("-gain")), torch.ops.mkldnn._reorder_linear_weight(weight)
    onednn = lambda: torch.ops.mkldnn._linear_pointwise(x, full, bias, "none", [], "")  # noqa: E731
    own = lambda: F.linear(x, weight, bias)  # noqa: E731
    times = measured("packed", sizes, lambda kind, sizes: (onednn, own))
    return lambda: low(x, bias), onednn if times[0] < times[1] else own


# ---------------------------------------------------------------------------------------- any linear layer, packed once


# weight -> (dtype, what tells a change, Packed)
_PACKED = WeakTensorKeyDictionary()


def takes(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether `linear` can multiply these now. Weights that are no parameters are made anew in every call."""
    return (
        current() != "fp32"
        and isinstance(weight, torch.nn.Parameter)
        and in_memory(x, weight)
        and x.dtype == weight.dtype == torch.float32
        and weight.is_contiguous()
        # inference tensors do not say when they are changed
        and not weight.is_inference()
    )


def linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, gelu: str | None = None
) -> torch.Tensor:
    """gelu(x @ weight.T + bias), float32 [M, N], in the dtype of `products`. gelu: see `Packed`."""
    return _packed(weight)(x, bias, gelu).float()


def _packed(weight):
    dtype = current()
    stamp, sampled = (dtype, weight._version, weight.data_ptr()), samples(weight.detach())
    found = _PACKED.get(weight)
    if found is None or found[0] != stamp or not torch.equal(found[1], sampled):
        found = _PACKED[weight] = stamp, sampled.clone(), Packed(weight.detach(), dtype)
    return found[2]


def samples(x):
    """A view of some values of a contiguous tensor, by which changes through `.data` are noticed: about the diagonal of
    a matrix, again and again, a value of each row and, where there are more, of each column."""
    return x.view(-1)[:: min(x.shape) + 1] if x.dim() == 2 else x
