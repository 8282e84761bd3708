"""Which modules act on each token alone: the condition for running a stack of layers without padding.

Without padding, every module inside a stack gets the tokens of all sequences in one row, and a `Layout` in place of the
mask. A module that looks along the row would see other texts. So each must be of a class that is known here, and
without code of its user's: a hook, a method set on the instance, a function of one's own as activation.
"""

import functools
import inspect
import itertools
import re

import torch
import torch.nn.functional as F
from torch import nn

from .. import ops
from .steps import HOOKS

_TORCH = {
    "activation": "CELU ELU GELU Hardshrink Hardsigmoid Hardswish Hardtanh LeakyReLU LogSigmoid Mish ReLU ReLU6 SELU "
    "Sigmoid SiLU Softplus Softshrink Softsign Tanh Tanhshrink Threshold",
    "container": "ModuleDict ModuleList ParameterDict ParameterList Sequential",
    "dropout": "Dropout",
    "linear": "Identity Linear NonDynamicallyQuantizableLinear",
    "normalization": "LayerNorm RMSNorm",
    "sparse": "Embedding",
}
# DeBERTa's stack calls this one with padded hidden states: its convolution may look at several tokens
CONVOLVES = "transformers.models.deberta_v2.modeling_deberta_v2.ConvLayer"
# full names of classes that act on each token alone if the modules inside them do; `table.py` adds transformers'
KNOWN = {f"torch.nn.modules.{file}.{name}" for file, names in _TORCH.items() for name in names.split()} | {
    "peft.tuners.lora.dora.DoraLinearLayer",
    "peft.tuners.lora.layer.Linear",
    "peft.utils.other.ModulesToSaveWrapper",
    CONVOLVES,
    "torch.distributed.algorithms._checkpoint.checkpoint_wrapper.CheckpointWrapper",
    "torch.distributed.fsdp.fully_sharded_data_parallel.FullyShardedDataParallel",
}
# classes that torch derives from a module's at run time come from here (fully_shard, parametrize)
_DERIVING = ("torch.distributed.", "torch.nn.utils.parametrize")
# the children to which a stack and its layers pass a `Layout`, beside items of lists and what wrappers wrap (_*)
_PASSES = {"layer", "layers", "attention", "attn", "self", "self_attn", "albert_layers", "albert_layer_groups"}
# hooks from here do not look at shapes
_BLIND = (
    "torch.distributed", "accelerate", "deepspeed", "transformers.utils.output_capturing",
    "transformers.modeling_utils",
)  # fmt: skip

_FUNCTIONS = (F.gelu, F.relu, F.silu, F.elu, F.leaky_relu, F.mish, F.hardtanh, torch.relu, torch.tanh, torch.sigmoid)
_LIBRARIES = ("transformers.models.", "transformers.activations", "torch.nn.modules.", "peft.")
# methods that find or replace a table, and do not compute
_ACCESSORS = re.compile(r"__(?!call__).*|[gs]et_\w+_embeddings|extra_repr|reset_\w+")


def full_name(cls):
    """Module and name of a class; "" for one made by the swap."""
    return f"{cls.__module__}.{cls.__qualname__}" if "replaces" not in vars(cls) else ""


def overrides(cls, base):
    """Whether a class derived from `base` may compute something else: it overrides what `base` itself defines, or a
    method of `base` was replaced for all its modules."""
    methods = _methods(base)
    if "replaces" not in vars(base) and any(f.__module__ != base.__module__ for f in methods.values()):
        return True
    between = itertools.takewhile(lambda c: c is not base, cls.__mro__)
    names = {name for c in between if not c.__module__.startswith(_DERIVING) for name in vars(c)}
    return not names.isdisjoint({"forward", "__call__", *methods})


def _methods(cls):
    """{name: function} of the methods that a class itself defines for computing."""
    return {name: f for name, f in vars(cls).items() if inspect.isfunction(f) and not _ACCESSORS.fullmatch(name)}


def library_methods(cls):
    """[(class, name, function)] of a class and its bases, as far as they are of `_LIBRARIES`."""
    own = itertools.takewhile(lambda c: c is not nn.Module, cls.__mro__)
    return [(c, *method) for c in own if c.__module__.startswith(_LIBRARIES) for method in _methods(c).items()]


def are_replaced(methods):
    """Whether someone has replaced one of `library_methods` for all modules of its class."""
    if not torch.compiler.is_compiling():
        # runs in every call of a module: any() takes twice as long
        for c, name, f in methods:
            if c.__dict__.get(name) is not f:
                return True
    return False


def own_code(module, hooks=True, parts=None, passes=True):
    """(name, reason) of the first module inside `module` that may look beyond each token, else None.

    hooks: whether a hook is a reason. parts: the names of the children to look at, if not all. passes: whether `module`
    passes a `Layout` on. Runs in every call of a stack, so classes are looked up once.
    """
    for name in parts or module._modules:
        inner = module._modules[name]
        # parametrizations act on parameters
        if inner is None or name == "parametrizations":
            continue
        cls, attributes = type(inner), vars(inner)
        if cls not in _CLASSES:
            _CLASSES[cls] = _learned(inner)
        if _CLASSES[cls] is None:
            return name, f"({cls.__name__}) may look at other tokens"
        names, check, convolves, takes_layout = _CLASSES[cls]
        for used in names:
            if used in attributes and not _is_harmless(inner, used):
                return name, f"({cls.__name__}) has its own {used}"
        has_hooks = (
            attributes["_forward_hooks"] or attributes["_forward_pre_hooks"] or attributes["_backward_hooks"]
            or attributes["_backward_pre_hooks"]
        )  # fmt: skip
        if hooks and has_hooks and not all(_is_blind(hook) for kind in HOOKS for hook in attributes[kind].values()):
            return name, f"({cls.__name__}) has a hook"
        is_compiled = hooks and "_compiled_call_impl" in attributes
        if is_compiled and not all(ops.uses_triton(parameter.device) for parameter in inner.parameters()):
            return name, f"({cls.__name__}) is compiled by itself, and compiled code on a CPU cannot read a layout"
        if check is not None and (reason := check(inner)):
            return name, f"({cls.__name__}) {reason}"
        if inner._modules:
            passed = passes and (name in _PASSES or name.isdigit() or name.startswith("_"))
            if takes_layout and not passed:
                return name, f"({cls.__name__}) attends in a place where it gets no mask"
            rest = [part for part, x in inner._modules.items() if type(x) is not nn.Conv1d] if convolves else None
            found = own_code(inner, hooks, rest, passed)
            if found is not None:
                return f"{name}.{found[0]}", found[1]
    return None


# class -> (`_names`, a check of each module, whether it is `CONVOLVES`, whether it takes a `Layout`); None: not known
_CLASSES = {}
# class -> `_names` of the first of its modules
_NAMES = {}
# `library_methods` of all of them
_METHODS = []


def _learned(module):
    cls = type(module)
    for base in cls.__mro__:
        replacement, name = vars(base).get("replacement"), full_name(base)
        if replacement is not None or name in KNOWN or base.__module__ == "transformers.activations":
            break
    else:
        return None
    takes_layout = getattr(replacement, "TAKES_LAYOUT", False)
    if overrides(cls, base) or not (replacement is None or replacement.TOKENWISE or takes_layout):
        return None
    check = replacement and replacement.misfit
    if issubclass(base, (nn.LayerNorm, nn.RMSNorm)):
        check = _normalizes_more
    return _names(module), check, name == CONVOLVES, takes_layout


def _names(module):
    """The names of the methods of a module's class, and of the modules and functions that it has."""
    cls = type(module)
    if cls not in _NAMES:
        methods = library_methods(cls)
        _METHODS.extend(methods)
        own = {name for name, x in vars(module).items() if (callable(x) or isinstance(x, list)) and name[0] != "_"}
        _NAMES[cls] = tuple(own.union(["forward"], module._modules, [name for _, name, _ in methods]))
    return _NAMES[cls]


def _normalizes_more(norm):
    return "normalizes over several tokens" if len(norm.normalized_shape) > 1 else None


def is_watched(stack, hooks=True):
    """Whether there is a user's code on or inside a stack: a module or a method of their own, a hook."""
    return (
        any(name in vars(stack) and not _is_harmless(stack, name) for name in _names(stack))
        or (hooks and bool(nn.modules.module._has_any_global_hook()))
        or are_replaced(_METHODS)
        or own_code(stack, hooks) is not None
    )


def _is_harmless(module, name):
    """Whether what was set on a module in place of a method or another module looks at no other token."""
    value = vars(module)[name]
    if name == "forward":
        # accelerate's forward moves tensors between devices and calls the original
        return (
            getattr(getattr(value, "func", None), "__module__", None) == "accelerate.hooks"
            and module._old_forward == type(module).forward.__get__(module)
            and _is_accelerates(module._hf_hook)
        )
    if isinstance(value, functools.partial) and not value.args:
        value = value.func
    if isinstance(value, list | tuple):
        return not any(map(callable, value))
    return not callable(value) or any(value is function for function in _FUNCTIONS)


def _is_accelerates(hook):
    return type(hook).__module__.startswith("accelerate.") and all(map(_is_accelerates, getattr(hook, "hooks", ())))


def _is_blind(hook):
    while isinstance(hook, functools.partial):
        hook = hook.func
    module = getattr(hook, "__module__", None) or ""
    return any(module == blind or module.startswith(f"{blind}.") for blind in _BLIND)
