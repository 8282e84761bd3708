"""What all replacements share, see `swapping.py`: sequences without padding, and steps on other people's modules.

Letters: B sequences, S padded length, T real tokens, N rows (T where padding is gone, else B * S), D hidden size,
H heads, K head size.

A stack, the module that loops over layers, drops the padding from its hidden states, calls its layers with [1, T, D],
and puts the padding back at the end, as zeros. What is a mask otherwise is then a `Packed`, which every layer hands on
unread to its attention. All other modules work row by row and never notice.
"""

import dataclasses
import functools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from . import ops


@dataclass(frozen=True)
class Options:
    """The switches of `swapping.swap`, as each swapped module keeps them."""

    attention: bool
    layer_norm: bool
    gelu: bool
    loss: bool
    unpad: bool
    logits: str


class Replacement:
    """A forward that takes the place of another class's, of which `self` is an instance all the same.

    PARTS: the switches of `swap` that each ask for it. WHAT: what the report says runs now.
    """

    PARTS = ()
    WHAT = ""

    @staticmethod
    def refuses(module):
        """Why this one stays as it is, or None."""
        return None

    @staticmethod
    def yields():
        """Whether `as_ever` is to run rather than `forward`: a graph that leaves this process, and is for any lengths,
        is the model's own."""
        return torch.jit.is_tracing() or torch.compiler.is_exporting()

    def as_ever(self, *args, **kwargs):
        return super().forward(*args, **kwargs)


# ---------------------------------------------------------------------------------------------------------- packing


@dataclass
class Packed:
    """Which rows are tokens of which sequence; stands where a mask does otherwise.

    cu_seqlens: int32 [B + 1]; max_seqlen: an int. indices: int64 [T], the tokens' places in [B * S], None where every
    place has one. shape: (B, S). inside: whether hidden states come without padding, [1, T, D], rather than [B, S, D].
    """

    cu_seqlens: torch.Tensor
    max_seqlen: int
    indices: torch.Tensor | None
    shape: tuple
    inside: bool

    def pack(self, x):
        """[B, S, ...] or [B * S, ...] -> the tokens' rows [T, ...]."""
        x = x.reshape(self.shape[0] * self.shape[1], *x.shape[2:]) if x.shape[:2] == self.shape else x
        return x if self.indices is None else x[self.indices]

    def unpack(self, x):
        """[T, ...] -> [B, S, ...], 0 where no token is."""
        if self.indices is not None:
            rows = x.new_zeros(self.shape[0] * self.shape[1], *x.shape[1:])
            x = rows.index_copy(0, self.indices, x)
        return x.view(*self.shape, *x.shape[1:])

    def blank(self, x):
        """[B, S, ...] with 0 where no token is."""
        return x if self.indices is None else self.unpack(self.pack(x))

    def to(self, device, non_blocking=False):
        """On another device: accelerate moves arguments from layer to layer so."""
        indices = self.indices if self.indices is None else self.indices.to(device, non_blocking=non_blocking)
        return dataclasses.replace(
            self, cu_seqlens=self.cu_seqlens.to(device, non_blocking=non_blocking), indices=indices
        )


def key_mask(mask, B, S):
    """Where the tokens are under a mask of any of HuggingFace's forms: bool [B, S], or None where every place has one
    or no such mask says what this one does; and whether it says just that: a bool, or a tensor of one."""
    if mask is None:
        return None, True
    if not torch.is_tensor(mask) or mask.dim() not in (2, 3, 4) or mask.shape[-1] != S:
        return None, False
    if mask.dim() == 2:
        return mask.bool().expand(B, S), True
    if mask.dim() == 4:
        if mask.shape[1] != 1:
            return None, False
        mask = mask[:, 0]
    rows, mask, says_all = mask, mask[:, 0], True
    if rows.shape[1] != 1 and rows.stride(1) != 0:
        says_all = (rows == rows[:, :1]).all()
    if mask.is_floating_point():
        # added to the scores: 0 or so little that nothing is left
        hides = (mask == 0) | (mask <= torch.finfo(mask.dtype).min / 2)
        says_all = hides.all() if says_all is True else hides.all() & says_all
        mask = mask == 0
    return mask.bool().expand(B, S), says_all


def is_static():
    """Whether a graph is made that must hold for every batch: then no shape may depend on how many tokens are real."""
    if torch.jit.is_tracing() or torch.compiler.is_exporting():
        return True
    if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
        return True
    return torch.compiler.is_compiling() and _compiles_whole()


@torch.compiler.assume_constant_result
def _compiles_whole():
    """Whether torch.compile, which calls this while it traces, was told fullgraph=True."""
    from torch._dynamo.symbolic_convert import InstructionTranslator

    return bool(getattr(InstructionTranslator.current_tx(), "one_graph", False))


def packing(hidden, mask, kwargs, *, inside, by_distance):
    """The Packed of hidden states [B, S, ...] under a mask, None where it would not do: where the mask says more than
    that, and where padding stands before a sequence.

    kwargs: of the call; cu_seq_lens_q and max_length_q, as HuggingFace's collators give them, go before the mask.
    by_distance: the attention looks at how far tokens are apart, so there may be no padding between them.
    """
    if is_static():
        return None
    B, S = hidden.shape[:2]
    if kwargs.get("cu_seq_lens_q") is not None:
        cu_seqlens = kwargs["cu_seq_lens_q"].to(torch.int32)
        longest = kwargs.get("max_length_q")
        return Packed(
            cu_seqlens,
            int((cu_seqlens[1:] - cu_seqlens[:-1]).max() if longest is None else longest),
            None,
            (B, S),
            inside,
        )
    if B * S == 0:
        return None
    kept, says_all = key_mask(mask, B, S)
    if not says_all:
        return None
    if kept is not None:
        indices = kept.flatten().nonzero()[:, 0]
        # with no token at all, attention is over the padding
        if len(indices) == 0:
            return None
        if len(indices) < B * S:
            lengths = kept.sum(1)
            # a model that reads the first place reads a padding token there, and what that one attends to
            unlike = ~kept[:, 0]
            if by_distance:
                last = S - 1 - kept.flip(1).int().argmax(1)
                unlike = unlike | (last + 1 != lengths)
            if bool((unlike & (lengths > 0)).any()):
                return None
            cu_seqlens = F.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
            return Packed(cu_seqlens, S, indices, (B, S), inside)
    return Packed(torch.arange(0, B * S + 1, S, dtype=torch.int32, device=hidden.device), S, None, (B, S), inside)


# hooks from these look at no shape
_BLIND = (
    "torch.distributed", "accelerate", "deepspeed", "peft", "transformers.utils.output_capturing",
    "transformers.modeling_utils",
)  # fmt: skip


def is_watched(module):
    """Whether a hook of the user looks at what is inside a module: then shapes there must be what they were."""
    return bool(nn.modules.module._has_any_global_hook()) or _has_hooks_inside(module)


def _has_hooks_inside(module):
    # for every call of a model: Module.modules() takes three times as long
    for inner in module._modules.values():
        if inner is None:
            continue
        for hooks in (inner._forward_hooks, inner._forward_pre_hooks, inner._backward_hooks, inner._backward_pre_hooks):
            if hooks and not all(_is_blind(hook) for hook in hooks.values()):
                return True
        if inner._modules and _has_hooks_inside(inner):
            return True
    return False


def _is_blind(hook):
    while isinstance(hook, functools.partial):
        hook = hook.func
    return (getattr(hook, "__module__", None) or "").startswith(_BLIND)


# ------------------------------------------------------------------------------------------------------ single steps


def original(module):
    """The class of a module before the swap, whatever has derived from that since (fully_shard does)."""
    return getattr(type(module), "replaces", type(module))


def is_plain(module, cls):
    """Whether `module` is of `cls` (or what took its place) and calling it does nothing but its forward: no adapter,
    no hook, no parametrization. Only then its parameters may be used without calling it."""
    kind = type(module)
    return (kind is cls or vars(kind).get("replaces") is cls) and not (
        nn.modules.module._has_any_global_hook()
        or module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in vars(module)
    )


def linear(module, x):
    """x [..., D] through a linear layer."""
    if not is_plain(module, nn.Linear):
        return module(x)
    rows = ops.linear(x.reshape(-1, x.shape[-1]), module.weight, module.bias)
    return rows.view(*x.shape[:-1], rows.shape[-1])


def fresh_seed(device):
    """A dropout seed from torch's generator, so that manual_seed and activation checkpointing replay it."""
    return torch.randint(-(2**63), 2**63 - 1, (1,), device=device)


def dropping(module, device):
    """The dropout arguments of an op for an nn.Dropout."""
    if not module.training or module.p == 0.0:
        return {}
    return dict(dropout_p=module.p, seed=fresh_seed(device))


def layer_norm(module, x, residual=None, dropout=None):
    """LayerNorm(dropout(x) + residual), in one pass where the modules allow it. x, residual [..., D]."""
    eps = _eps(module)
    if eps is None or module.weight is None:
        x = x if dropout is None else dropout(x)
        return module(x if residual is None else x + residual)
    options = {}
    if dropout is not None and dropout.training:
        if is_plain(dropout, nn.Dropout):
            options = dropping(dropout, x.device)
        else:
            x = dropout(x)
    rows = x.reshape(-1, x.shape[-1])
    residual = residual if residual is None else residual.reshape(rows.shape)
    return ops.layer_norm(rows, module.weight, module.bias, residual=residual, eps=eps, **options).view(x.shape)


def _eps(norm):
    """The epsilon of a LayerNorm over the last dimension whose parameters may be used; None for other modules."""
    if is_plain(norm, nn.LayerNorm):
        return norm.eps if len(norm.normalized_shape) == 1 else None
    # DeBERTa v1 has one of its own, which computes the same
    kind = original(norm)
    return norm.variance_epsilon if kind.__name__ == "DebertaLayerNorm" and is_plain(norm, kind) else None


def gelu_form(activation):
    """Which GELU a module of HuggingFace's or torch's is, as `torch.nn.functional.gelu` names it; None: another."""
    kind = original(activation)
    if kind is nn.GELU:
        return activation.approximate
    return {
        "GELUActivation": "none", "NewGELUActivation": "tanh", "GELUTanh": "tanh", "PytorchGELUTanh": "tanh",
        "FastGELUActivation": "tanh",
    }.get(kind.__name__)  # fmt: skip


def linear_gelu(dense, activation, x):
    """activation(dense(x)), the bias added inside the GELU's kernel."""
    approximate = gelu_form(activation)
    if approximate is None or not is_plain(activation, original(activation)):
        return activation(linear(dense, x))
    if not is_plain(dense, nn.Linear):
        return gelu(dense(x), approximate)
    rows = x.reshape(-1, x.shape[-1])
    y = ops.linear_gelu(rows, dense.weight, dense.bias, approximate=approximate)
    return y.view(*x.shape[:-1], y.shape[-1])


def gelu(x, approximate):
    """x [..., F]."""
    return ops.bias_gelu(x.reshape(-1, x.shape[-1]), None, approximate=approximate).view(x.shape)


def refuses_activation(name):
    def refuses(module):
        activation = getattr(module, name)
        if gelu_form(activation) is None:
            kind = getattr(activation, "__name__", type(activation).__name__)
            return f"its activation, {kind}, is no GELU"
        return None

    return staticmethod(refuses)


def attend(packed, q, k, v, heads, op=ops.attention, **options):
    """Attention of [N, H * K] rows each, [N, H * K]. `op`: that of `ops` which takes (q, k, v, cu_seqlens, longest)."""
    D = q.shape[-1]
    if not packed.inside:
        q, k, v = (packed.pack(x) for x in (q, k, v))
    q, k, v = (x.reshape(len(x), heads, -1) for x in (q, k, v))
    out = op(q, k, v, packed.cu_seqlens, packed.max_seqlen, **options).reshape(-1, D)
    return out if packed.inside else packed.unpack(out).view(-1, D)
