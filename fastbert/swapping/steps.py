"""What all replacements share: the base class, and operations on other people's modules.

Letters: B sequences, S padded length, T real tokens, N rows (T where padding is gone, else B * S), D hidden size,
H heads, K head size.
"""

import contextlib
import functools
import inspect
import sys
import threading
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

from .. import ops

# a module's own hooks, in its __dict__
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
PLAIN = (torch.Tensor, nn.Parameter)


@dataclass(frozen=True)
class Options:
    """The switches of `mechanism.swap`, as each swapped module keeps them."""

    attention: bool
    layer_norm: bool
    gelu: bool
    loss: bool
    unpad: bool | str
    logits: str
    dtype: str = "fp32"
    # whether what follows a stack reads its padding rows
    shows_padding: bool = False


class _Plain(threading.local):
    """Whether a stack of this thread runs its original modules, also those inside it."""

    is_on = False


plain = _Plain()


@contextlib.contextmanager
def plain_modules():
    """Within it, the swapped modules that act on each token alone run their originals."""
    before, plain.is_on = plain.is_on, True
    try:
        yield
    finally:
        plain.is_on = before


class Replacement:
    """A forward that takes the place of another class's; `self` is still an instance of that class.

    RUNS: switch of `swap` that asks for it -> what the report says runs then. TOKENWISE: whether it acts on each token
    alone. TAKES_LAYOUT: whether it takes a `Layout` in place of the mask. misfit: None, or a function of the module:
    why it cannot take one now, or None.
    """

    RUNS = {}
    TOKENWISE = False
    TAKES_LAYOUT = False
    misfit = None

    @staticmethod
    def refuses(module):
        """Why this module is left as it is, or None."""
        return None

    @staticmethod
    def yields(args, kwargs):
        """Whether a call is left to the original forward. A graph that leaves this process must hold for all lengths,
        so it is made of the original modules."""
        return torch.jit.is_tracing() or torch.compiler.is_exporting()

    def call_original(self, *args, **kwargs):
        return super().forward(*args, **kwargs)


def original(module):
    """The class of a module before the swap, even if something has derived from it since, as fully_shard does."""
    return getattr(type(module), "replaces", type(module))


def is_dry(x):
    """Whether a tensor has a shape but no values."""
    return x.is_meta or isinstance(x, FakeTensor)


def has_plain_parameters(module):
    """Whether the parameters of a module itself are here as plain tensors: not offloaded, sharded or quantised."""
    attributes = vars(module)
    # a user may also keep them as buffers or attributes
    tensors = (
        *module._parameters.values(),
        *module._buffers.values(),
        attributes.get("weight"),
        attributes.get("bias"),
    )
    return all(p is None or type(p) in PLAIN and not p.is_meta for p in tensors)


def is_plain(module, cls):
    """Whether `module` is of `cls` (or of what replaced it) and calling it runs the forward of its library and nothing
    else: no adapter, hook or parametrization. Only then may its parameters and settings be used without calling it."""
    kind = type(module)
    return (
        (kind is cls or vars(kind).get("replaces") is cls)
        and "forward" not in vars(module)
        and cls.forward.__module__ == cls.__module__
        and not any(vars(module)[kind] for kind in HOOKS)
        and not nn.modules.module._has_any_global_hook()
        and has_plain_parameters(module)
    )


def linear(module, x):
    """x [..., D] through a linear layer."""
    if not is_plain(module, nn.Linear):
        return module(x)
    rows = ops.linear(x.reshape(-1, x.shape[-1]), module.weight, module.bias)
    return rows.view(*x.shape[:-1], rows.shape[-1])


def dropout_arguments(dropout, device):
    """An op's arguments for an nn.Dropout or nn.Identity, or for a probability. The seed comes from torch's generator:
    torch.manual_seed and activation checkpointing reproduce it."""
    if isinstance(dropout, nn.Module):
        dropout = getattr(dropout, "p", 0.0) if dropout.training else 0.0
    if dropout == 0.0:
        return {}
    return dict(dropout_p=dropout, seed=torch.randint(-(2**63), 2**63 - 1, (1,), device=device))


def layer_norm(module, x, residual=None, dropout=None):
    """LayerNorm(dropout(x) + residual), in one pass where the modules allow it. x, residual [..., D]."""
    eps, options = eps_of(module), {}
    if dropout is not None:
        if eps is not None and is_plain(dropout, nn.Dropout):
            options = dropout_arguments(dropout, x.device)
        else:
            x = dropout(x)
    if eps is None:
        return module(x if residual is None else x + residual)
    rows = x.reshape(-1, x.shape[-1])
    residual = residual if residual is None else residual.reshape(rows.shape)
    return ops.layer_norm(rows, module.weight, module.bias, residual=residual, eps=eps, **options).view(x.shape)


def eps_of(norm):
    """The epsilon of a LayerNorm over the last dimension whose parameters may be used; None for other modules."""
    if is_plain(norm, nn.LayerNorm):
        return norm.eps if len(norm.normalized_shape) == 1 and norm.weight is not None else None
    # DeBERTa v1 has a class of its own that computes the same
    kind = original(norm)
    is_debertas = kind.__name__ == "DebertaLayerNorm" and kind.__module__.startswith("transformers.models.")
    return norm.variance_epsilon if is_debertas and is_plain(norm, kind) else None


_GELUS = {
    "GELUActivation": "none", "NewGELUActivation": "tanh", "GELUTanh": "tanh", "PytorchGELUTanh": "tanh",
    "FastGELUActivation": "tanh",
}  # fmt: skip


def gelu_kind(activation):
    """The form of a GELU of HuggingFace's or torch's, as `torch.nn.functional.gelu` names it, else None."""
    if isinstance(activation, functools.partial) and activation.func is F.gelu and not activation.args:
        return activation.keywords.get("approximate", "none") if activation.keywords.keys() <= {"approximate"} else None
    if activation is F.gelu:
        return "none"
    kind = original(activation)
    if kind is nn.GELU:
        return activation.approximate
    if kind.__module__ != "transformers.activations":
        return None
    # some are a shell around a function
    inner = vars(activation).get("act")
    is_own = inner is not None and getattr(inner, "__self__", None) is not activation and gelu_kind(inner) is None
    return None if is_own else _GELUS.get(kind.__name__)


def gelu_form(activation):
    """The same, but None for a module that must be called: one with a hook or code of its own."""
    is_called = isinstance(activation, nn.Module) and not is_plain(activation, original(activation))
    return None if is_called else gelu_kind(activation)


def linear_gelu(dense, activation, x):
    """activation(dense(x)), the bias added inside the GELU's kernel."""
    approximate = gelu_form(activation)
    if approximate is None:
        return activation(linear(dense, x))
    if not is_plain(dense, nn.Linear):
        return gelu(activation, dense(x))
    rows = x.reshape(-1, x.shape[-1])
    y = ops.linear_gelu(rows, dense.weight, dense.bias, approximate=approximate)
    return y.view(*x.shape[:-1], y.shape[-1])


def gelu(activation, x):
    """activation(x) of x [..., F]."""
    approximate = gelu_form(activation)
    if approximate is None:
        return activation(x)
    return ops.bias_gelu(x.reshape(-1, x.shape[-1]), None, approximate=approximate).view(x.shape)


def gated(activation, x):
    """activation(the first half of x [..., 2 F]) * the second."""
    approximate = gelu_form(activation)
    if approximate is None:
        first, second = x.chunk(2, -1)
        return activation(first) * second
    activation = "gelu_tanh" if approximate == "tanh" else "gelu"
    return ops.gated_activation(x.reshape(-1, x.shape[-1]), activation=activation).view(*x.shape[:-1], -1)


def gelu_norm(dense, activation, norm, x):
    """norm(activation(dense(x))), one pass after the matrix multiplication where the modules allow it."""
    approximate, eps = gelu_form(activation), eps_of(norm)
    if approximate is None or eps is None or not is_plain(dense, nn.Linear):
        return layer_norm(norm, gelu(activation, linear(dense, x)))
    rows = x.reshape(-1, x.shape[-1])
    y = ops.gelu_layer_norm(
        ops.linear(rows, dense.weight), dense.bias, norm.weight, norm.bias, approximate=approximate, eps=eps
    )
    return y.view(*x.shape[:-1], y.shape[-1])


def refuses_activation(name):
    def refuses(module):
        activation = getattr(module, name)
        if gelu_kind(activation) is None:
            kind = getattr(activation, "__name__", type(activation).__name__)
            return f"its activation, {kind}, is no GELU"
        return None

    return staticmethod(refuses)


def attend(layout, q, k, v, heads, op=ops.attention, **options):
    """Attention of q, k, v [B, S, H * K] or [B, S, H, K] -> [B, S, H * K]; of four dimensions k and v may have fewer
    heads.

    op: takes (q, k, v, cu_seqlens, max_seqlen, **options).
    """
    q, k, v = (x if x.dim() == 3 else x.reshape(len(x), heads, -1) for x in map(layout.pack, (q, k, v)))
    return layout.unpack(op(q, k, v, layout.cu_seqlens, layout.max_seqlen, **options).flatten(1))


def from_file_of(module, name):
    """What `name` means in the file of a module's class, or in the first file of its base classes that has it."""
    files = (sys.modules.get(cls.__module__) for cls in type(module).__mro__)
    return next((getattr(file, name) for file in files if hasattr(file, name)), None)


def by_name(self, args, kwargs):
    """The arguments of a call of the original forward, all by name."""
    return {**dict(zip(_parameters(original(self).forward), args)), **kwargs}


@functools.cache
def _parameters(forward):
    return list(inspect.signature(forward).parameters)[1:]
