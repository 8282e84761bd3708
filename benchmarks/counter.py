"""Counts kernels: the bytes that each moves and the FLOPs of its matrix products. Nothing is timed.

`with counting() as kernels:` gives a list of Kernel:

- a Triton kernel, in Triton's interpreter, access by access: which elements of which argument it loads and stores, how
  often, and the FLOPs of its matrix products. Distinct elements are what must cross the memory bus however good the
  caches are; "asked" is what the programs ask for, from any cache.
- a kernel of PyTorch, in eager mode: the bytes of the tensors it takes and returns. Views are free. That is the least
  it can move: LayerNorm's backward, several kernels in truth, counts as one that reads its inputs once.
- the same two on tensors without data. What a launch moves there follows from its arguments: a kernel moves each of
  them once, as was seen where it was counted, but for the rows that it picks from a table.
"""

import contextlib
import importlib
import math
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

ROOT = Path(__file__).resolve().parent.parent

# an H200: bytes a second of a large copy, FLOPs a second of a large bf16 product
BANDWIDTH, PRODUCTS = 4.3e12, 788e12

# Tables of which a kernel picks rows: {kernel: {table: the argument that holds one row for each pick}}.
PICKED = {
    "_embedding_fwd_kernel": dict.fromkeys(("word_ptr", "position_ptr", "token_type_ptr"), "y_ptr"),
    "_embedding_bwd_kernel": dict.fromkeys(("word_ptr", "position_ptr", "token_type_ptr"), "dz_ptr"),
    "_segment_sum_kernel": dict.fromkeys(("table0_ptr", "table1_ptr", "table2_ptr"), "rows_ptr"),
}


@dataclass
class Kernel:
    """One kernel. Dicts are by argument; arguments that share memory share a name, such as q_ptr+k_ptr+v_ptr."""

    name: str
    flops: int = 0
    size: dict = field(default_factory=dict)  # bytes of the elements that the argument has
    loaded: dict = field(default_factory=dict)  # distinct bytes
    stored: dict = field(default_factory=dict)
    asked: dict = field(default_factory=dict)  # bytes of all loads and stores
    scalars: dict = field(default_factory=dict)  # what else it was launched with

    @property
    def bytes(self):
        return sum(self.loaded.values()) + sum(self.stored.values())

    @property
    def seconds(self):
        return max(self.bytes / BANDWIDTH, self.flops / PRODUCTS)

    def once(self, loaded, stored):
        """What this launch moves when it moves each argument once: a Kernel. loaded, stored: names of arguments."""
        picked = PICKED.get(self.name, {})
        size = {name: min(x, self.size.get(picked.get(name), x)) for name, x in self.size.items()}
        directions = ({name: size[name] for name in size if name in names} for names in (loaded, stored))
        return Kernel(self.name, self.flops, self.size, *directions, scalars=self.scalars)


class counting(TorchDispatchMode):
    """A context in which kernels are counted: `with counting() as kernels:` gives the list of Kernel, in their order.

    Launches on fake tensors are only noted, not run.
    """

    active = []  # the lists of the contexts that are open

    def __enter__(self):
        super().__enter__()
        self.kernels = []
        counting.active.append(self.kernels)
        self._patches = contextlib.ExitStack()
        self._patches.enter_context(_interpreter_counts(self.kernels))
        return self.kernels

    def __exit__(self, *exception):
        self._patches.close()
        counting.active.pop()
        return super().__exit__(*exception)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function.namespace == "fastbert":
            # the operator's own body, so that the kernels of PyTorch in it are seen
            with self._again():
                return _launcher(function)(*args, **kwargs)
        if function.namespace != "aten":
            return function(*args, **kwargs)
        # inside an operator autograd is passed, and functions made of others, such as `to`, come here whole
        with self._again():
            result = function.decompose(*args, **kwargs)
        if result is not NotImplemented:
            return result
        result = function(*args, **kwargs)
        if not function.is_view:
            kernel = _aten_kernel(function, args, kwargs, result)
            if kernel.bytes:
                self.kernels.append(kernel)
        return result

    @contextlib.contextmanager
    def _again(self):
        super().__enter__()
        try:
            yield
        finally:
            super().__exit__(None, None, None)


def _launcher(operator):
    """The Python function of an operator: by the contract of kernels/, one of its name in one of the files."""
    name = operator.name().partition("::")[2]
    for path in sorted((ROOT / "kernels").glob("[!_]*.py")):
        module = importlib.import_module(f"fastbert.kernels.{path.stem}")
        if hasattr(module, name):
            return getattr(module, name)
    raise LookupError(f"no file of kernels/ has a function {name}")


def _named_tensors(arguments):
    """{name: [tensors]} of a launch, by storage."""
    by_storage = {}
    for name, value in arguments.items():
        if isinstance(value, torch.Tensor):
            by_storage.setdefault(value.untyped_storage()._cdata, []).append((name, value))
    return {"+".join(name for name, _ in found): [x for _, x in found] for found in by_storage.values()}


def _size(tensors):
    """Bytes of the elements of tensors that share a storage; one that strides of 0 repeat counts once."""
    return sum(map(distinct, {(x.storage_offset(), x.shape, x.stride()): x for x in tensors}.values()))


def distinct(x):
    return math.prod(size for size, stride in zip(x.shape, x.stride()) if stride or size == 0) * x.element_size()


@contextlib.contextmanager
def _interpreter_counts(kernels):
    import numpy as np
    from triton.runtime.interpreter import GridExecutor, InterpreterBuilder

    current, memory = [], {}
    call = GridExecutor.__call__
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store
    dot = InterpreterBuilder.create_dot

    def launch(self, *args, **kwargs):
        arguments = dict(zip(self.arg_names, args), **{k: v for k, v in kwargs.items() if k in self.arg_names})
        tensors = _named_tensors(arguments)
        kernel = Kernel(self.fn.__name__, size={name: _size(found) for name, found in tensors.items()})
        kernel.scalars = {name: x for name, x in arguments.items() if not isinstance(x, torch.Tensor)}
        kernels.append(kernel)
        if any(isinstance(x, FakeTensor) for found in tensors.values() for x in found):
            return
        memory.clear()
        for name, (x, *_) in tensors.items():
            storage = x.untyped_storage()
            size = max(storage.nbytes(), 1)
            memory[name] = (storage.data_ptr(), size, np.zeros(size, bool), np.zeros(size, bool))
        current.append(kernel)
        try:
            with _disable_current_modes():
                call(self, *args, **kwargs)
        finally:
            current.pop()

    def touch(pointers, mask, is_store):
        kernel = current[-1]
        places = pointers.data[np.broadcast_to(mask.data, pointers.data.shape).astype(bool)].astype(np.int64)
        width, left = pointers.get_element_ty().primitive_bitwidth // 8, places.size
        for name, (start, size, *seen) in memory.items():
            offsets = places[(places >= start) & (places < start + size)] - start
            if not offsets.size:
                continue
            left -= offsets.size
            new = np.unique(offsets[~seen[is_store][offsets]])
            seen[is_store][new] = True
            side = kernel.stored if is_store else kernel.loaded
            side[name] = side.get(name, 0) + new.size * width
            kernel.asked[name] = kernel.asked.get(name, 0) + offsets.size * width
        if left:
            raise AssertionError(f"{kernel.name} touches {left} elements outside its arguments")

    def masked_load(self, pointers, mask, *rest):
        touch(pointers, mask, False)
        return load(self, pointers, mask, *rest)

    def masked_store(self, pointers, value, mask, *rest):
        touch(pointers, mask, True)
        return store(self, pointers, value, mask, *rest)

    def product(self, a, b, *rest, **options):
        current[-1].flops += 2 * a.data.size * b.data.shape[-1]
        return dot(self, a, b, *rest, **options)

    counted = {"create_masked_load": masked_load, "create_masked_store": masked_store, "create_dot": product}
    with mock.patch.multiple(InterpreterBuilder, **counted), mock.patch.object(GridExecutor, "__call__", launch):
        yield


# kernels of PyTorch that move less than their arguments: allocations; what only writes; what picks rows
_FREE = {"empty", "empty_like", "new_empty", "new_empty_strided", "empty_strided", "_unsafe_view", "detach", "alias",
         "lift_fresh", "set_", "resize_", "_local_scalar_dense", "is_same_size"}  # fmt: skip
_WRITES = {"zeros", "ones", "zeros_like", "ones_like", "full", "full_like", "new_zeros", "new_ones", "new_full",
           "fill_", "zero_", "arange", "scalar_tensor"}  # fmt: skip
_PICKS = {"embedding", "index_select", "index", "gather", "nll_loss_forward"}


def _tensors(values):
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, (tuple, list)):
            yield from _tensors(value)


def _aten_kernel(function, args, kwargs, result):
    name = function.name().partition("::")[2].partition(".")[0]
    kernel = Kernel(name)
    if name in _FREE:
        return kernel
    kernel.stored["outputs"] = sum(map(distinct, _tensors([result])))
    if name in _WRITES:
        return kernel
    inputs = list(_tensors([*args, *kwargs.values()]))
    if "out" in kwargs:
        inputs = [x for x in inputs if x is not kwargs["out"]]
    if name == "copy_":
        inputs = inputs[1:]
    if name == "nll_loss_forward":
        # reads one of the V log-probabilities of each row
        kernel.loaded["inputs"] = inputs[1].numel() * (inputs[0].element_size() + inputs[1].element_size())
    elif name == "nll_loss_backward":
        # needs only the shape of the log-probabilities
        kernel.loaded["inputs"] = sum(distinct(x) for x in inputs if x.dim() < 2)
    elif name in _PICKS:
        picked = min(distinct(inputs[0]), kernel.stored["outputs"])
        kernel.loaded["inputs"] = picked + sum(map(distinct, inputs[1:]))
    else:
        kernel.loaded["inputs"] = sum(map(distinct, inputs))
    kernel.flops = _aten_flops(name, inputs)
    return kernel


def _aten_flops(name, inputs):
    if name in ("mm", "bmm", "addmm", "baddbmm"):
        # behind what is added
        a, b = inputs[-2:]
        return 2 * a.numel() * b.shape[-1]
    if name.startswith("_scaled_dot_product"):
        # scores and weighted values; backward the scores again and four gradients
        q, k = inputs[1:3] if "backward" in name else inputs[:2]
        return (10 if "backward" in name else 4) * q.numel() * k.shape[-2]
    return 0
