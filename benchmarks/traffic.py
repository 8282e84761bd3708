"""Counted traffic: the bytes and FLOPs of every kernel that an op launches, and of plain PyTorch's kernels beside it.

    python benchmarks/traffic.py      writes benchmarks/results/traffic.{json,md,png}, and the table in kernels/NOTES.md

Nothing here is timed, and no GPU is needed. Three things are counted:

- A Triton kernel, in Triton's interpreter, access by access: which elements of which argument it loads and stores, how
  often, and the FLOPs of its matrix products. Distinct elements are what must cross the memory bus however good the
  caches are; "asked" is what the programs ask for, from any cache.
- A kernel of PyTorch, in eager mode: the bytes of the tensors it takes and returns. Views are free. That is the least
  it can move: LayerNorm's backward, several kernels in truth, counts as one that reads its inputs once.
- The same two at full size, on tensors without data. What a launch moves there follows from its arguments: a kernel
  moves each of them once, as was seen where it was counted, but for the rows that it picks from a table.

A kernel takes at least its bytes over the bandwidth of memory and its FLOPs over that of matrix products, whichever is
longer; an op takes the sum over its kernels. The two ceilings are what others measured on an H200. What a kernel takes
is more: `make gpu` measures it.
"""

import argparse
import contextlib
import functools
import importlib
import json
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path

# before anything imports triton
if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "1"
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "benchmarks" / "results" / "traffic.json"
NOTES = ROOT / "kernels" / "NOTES.md"

# an H200: bytes a second of a large copy, FLOPs a second of a large bf16 product, multiprocessors
BANDWIDTH, PRODUCTS, MULTIPROCESSORS = 4.3e12, 788e12, 132

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
    views = {(x.storage_offset(), x.shape, x.stride()): x for x in tensors}
    return sum(_distinct(x) for x in views.values())


def _distinct(x):
    elements = 1
    for size, stride in zip(x.shape, x.stride()):
        elements *= size if stride or size == 0 else 1
    return elements * x.element_size()


@contextlib.contextmanager
def _interpreter_counts(kernels):
    import numpy as np
    from triton.runtime.interpreter import GridExecutor, InterpreterBuilder

    current, memory = [], {}
    call = GridExecutor.__call__
    load, store, dot = (
        getattr(InterpreterBuilder, f"create_{what}") for what in ("masked_load", "masked_store", "dot")
    )

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

    patches = {"create_masked_load": masked_load, "create_masked_store": masked_store, "create_dot": product}
    try:
        GridExecutor.__call__ = launch
        for name, function in patches.items():
            setattr(InterpreterBuilder, name, function)
        yield
    finally:
        GridExecutor.__call__ = call
        for name, function in zip(patches, (load, store, dot)):
            setattr(InterpreterBuilder, name, function)


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
    outputs = [x for x in _tensors([result])]
    kernel.stored["outputs"] = sum(_distinct(x) for x in outputs)
    if name in _WRITES:
        return kernel
    inputs = list(_tensors([*args, *kwargs.values()]))
    if "out" in kwargs:
        inputs = [x for x in inputs if x is not kwargs["out"]]
    if name == "copy_":
        inputs = inputs[1:]
    if name == "nll_loss_forward":
        # one of the V log-probabilities of each row
        kernel.loaded["inputs"] = inputs[1].numel() * (inputs[0].element_size() + inputs[1].element_size())
    elif name == "nll_loss_backward":
        # the log-probabilities only say the shape
        kernel.loaded["inputs"] = sum(_distinct(x) for x in inputs if x.dim() < 2)
    elif name in _PICKS:
        picked = min(_distinct(inputs[0]), kernel.stored["outputs"])
        kernel.loaded["inputs"] = picked + sum(_distinct(x) for x in inputs[1:])
    else:
        kernel.loaded["inputs"] = sum(_distinct(x) for x in inputs)
    kernel.flops = _aten_flops(name, inputs)
    return kernel


def _aten_flops(name, inputs):
    if name in ("mm", "bmm"):
        a, b = inputs[:2]
        return 2 * a.numel() * b.shape[-1]
    if name in ("addmm", "baddbmm"):
        a, b = inputs[1:3]
        return 2 * a.numel() * b.shape[-1]
    if name.startswith("_scaled_dot_product"):
        # scores and weighted values; backward the scores again and four gradients
        q, k = inputs[1:3] if "backward" in name else inputs[:2]
        return (10 if "backward" in name else 4) * q.numel() * k.shape[-2]
    return 0


# BERT-base; 16,384 tokens, of which 15 % are picked for the loss
FULL = dict(T=16384, S=128, D=768, H=12, K=64, F=3072, V=30522, P=512, M=2458, Q=4096, N=8192, R=256)
DTYPE = torch.bfloat16
DROPOUT = 0.1


def normal(*shape):
    return torch.randn(*shape).to(DTYPE).requires_grad_()


def dropped(x, dropout_p):
    # what F.dropout runs on a GPU: one kernel that also writes a mask of bytes
    return torch.native_dropout(x, dropout_p, True)[0] if dropout_p else x


def options(z):
    return dict(dropout_p=z["dropout_p"], seed=torch.zeros(1, dtype=torch.int64)) if z["dropout_p"] else {}


def fused_attention(z):
    from fastbert import ops

    qkv, cu_seqlens = normal(z["T"], 3, z["H"], z["K"]), torch.arange(z["T"] // z["S"] + 1, dtype=torch.int32) * z["S"]
    dropout = options(z)
    return lambda: ops.attention(qkv, None, None, cu_seqlens, z["S"], impl="triton", **dropout), [qkv]


def heads(z):
    """q, k, v [B, H, S, K] as views of the projections, which are [B, S, H, K]."""
    leaves = [normal(z["T"] // z["S"], z["S"], z["H"], z["K"]) for _ in range(3)]
    return leaves, lambda: [x.transpose(1, 2) for x in leaves]


def softmax_attention(z):
    leaves, views = heads(z)

    def attend():
        q, k, v = views()
        p = torch.softmax(q @ k.transpose(2, 3) * z["K"] ** -0.5, -1)
        return (dropped(p, z["dropout_p"]) @ v).transpose(1, 2).reshape(z["T"], -1)

    return attend, leaves


def sdpa(z):
    leaves, views = heads(z)
    return lambda: F.scaled_dot_product_attention(*views()).transpose(1, 2).reshape(z["T"], -1), leaves


def fused_disentangled_attention(z):
    from fastbert import ops

    leaves = [normal(z["T"], 3, z["H"], z["K"]), *(normal(2 * z["R"], z["H"], z["K"]) for _ in range(2))]
    cu_seqlens = torch.arange(z["T"] // z["S"] + 1, dtype=torch.int32) * z["S"]
    positions = dict(position_buckets=z["R"], max_relative_positions=512)
    return lambda: ops.disentangled_attention(
        leaves[0], None, None, *leaves[1:], cu_seqlens, z["S"], impl="triton", **positions
    ), leaves


def plain_disentangled_attention(z):
    # as in transformers: the products with all positions of the table, then a gather into the scores
    leaves, views = heads(z)
    pos_key, pos_query = (normal(z["H"], 2 * z["R"], z["K"]) for _ in range(2))
    index = torch.zeros(z["S"], z["S"], dtype=torch.int64).expand(z["T"] // z["S"], z["H"], -1, -1)

    def attend():
        q, k, v = views()
        scores = q @ k.transpose(2, 3)
        scores = scores + (q @ pos_key.transpose(1, 2)).gather(-1, index)
        scores = scores + (k @ pos_query.transpose(1, 2)).gather(-1, index).transpose(2, 3)
        return (torch.softmax(scores * (3 * z["K"]) ** -0.5, -1) @ v).transpose(1, 2).reshape(z["T"], -1)

    return attend, [*leaves, pos_key, pos_query]


def fused_layer_norm(z):
    from fastbert import ops

    leaves = x, residual, weight, bias = normal(z["T"], z["D"]), normal(z["T"], z["D"]), normal(z["D"]), normal(z["D"])
    dropout = options(z)
    return lambda: ops.layer_norm(x, weight, bias, residual=residual, impl="triton", **dropout), leaves


def plain_layer_norm(z):
    leaves = x, residual, weight, bias = normal(z["T"], z["D"]), normal(z["T"], z["D"]), normal(z["D"]), normal(z["D"])
    return lambda: F.layer_norm(dropped(x, z["dropout_p"]) + residual, (z["D"],), weight, bias), leaves


def fused_bias_gelu(z):
    from fastbert import ops

    leaves = x, bias = normal(z["T"], z["F"]), normal(z["F"])
    return lambda: ops.bias_gelu(x, bias, impl="triton"), leaves


def plain_bias_gelu(z):
    leaves = x, bias = normal(z["T"], z["F"]), normal(z["F"])
    return lambda: F.gelu(x + bias), leaves


def gelu_alone(z):
    x = normal(z["T"], z["F"])
    # a linear layer adds its bias inside the product; its gradient is a pass over dx all the same
    x.register_hook(lambda dx: (dx.sum(0), dx)[1])
    return lambda: F.gelu(x), [x]


def fused_gelu_layer_norm(z):
    from fastbert import ops

    leaves = x, bias, weight, ln_bias = normal(z["M"], z["D"]), *(normal(z["D"]) for _ in range(3))
    return lambda: ops.gelu_layer_norm(x, bias, weight, ln_bias, impl="triton"), leaves


def plain_gelu_layer_norm(z):
    leaves = x, bias, weight, ln_bias = normal(z["M"], z["D"]), *(normal(z["D"]) for _ in range(3))
    return lambda: F.layer_norm(F.gelu(x + bias), (z["D"],), weight, ln_bias), leaves


def ids_and_tables(z):
    # every token a word of its own: what real text repeats comes from cache
    ids = torch.randperm(z["V"])[: z["T"]], torch.arange(z["T"]) % z["P"], torch.arange(z["T"]) % 2
    return ids, [normal(z["V"], z["D"]), normal(z["P"], z["D"]), normal(2, z["D"]), normal(z["D"]), normal(z["D"])]


def fused_embedding(z):
    from fastbert import ops

    (ids, leaves), dropout = ids_and_tables(z), options(z)
    return lambda: ops.embedding(*ids, *leaves, impl="triton", **dropout), leaves


def plain_embedding(z):
    ids, leaves = ids_and_tables(z)

    def embed():
        x = F.embedding(ids[0], leaves[0]) + F.embedding(ids[2], leaves[2]) + F.embedding(ids[1], leaves[1])
        return dropped(F.layer_norm(x, (z["D"],), *leaves[3:]), z["dropout_p"])

    return embed, leaves


def head(z, rows):
    return torch.arange(rows) % z["V"], [normal(rows, z["D"]), normal(z["V"], z["D"]), normal(z["V"])]


def fused_cross_entropy(z):
    from fastbert import ops

    labels, leaves = head(z, z["M"])
    return lambda: ops.masked_cross_entropy(*leaves, labels, impl="triton")[0], leaves


def dense_cross_entropy(z, rows="T"):
    labels, leaves = head(z, z[rows])
    # in fp32, as under autocast
    return lambda: F.cross_entropy(F.linear(*leaves).float(), labels), leaves


def picked_cross_entropy(z):
    return dense_cross_entropy(z, "M")


def fused_pooling(z):
    from fastbert import ops

    hidden, cu_seqlens = normal(z["T"], z["D"]), torch.arange(z["T"] // z["S"] + 1, dtype=torch.int32) * z["S"]
    return lambda: ops.pooling(hidden, cu_seqlens, normalize=True, impl="triton"), [hidden]


def plain_pooling(z):
    # as in sentence-transformers, on a batch that happens to need no padding
    hidden = normal(z["T"] // z["S"], z["S"], z["D"])
    mask = torch.ones(hidden.shape[:2], dtype=torch.int64)

    def pool():
        wide = mask.unsqueeze(-1).expand(hidden.shape).to(hidden.dtype)
        return F.normalize((hidden * wide).sum(1) / wide.sum(1).clamp(min=1e-9))

    return pool, [hidden]


def fused_contrastive(z):
    from fastbert import ops

    leaves = query, document = normal(z["Q"], z["D"]), normal(z["N"], z["D"])
    return lambda: ops.contrastive_cross_entropy(query, document, scale=20.0, impl="triton")[0], leaves


def plain_contrastive(z):
    leaves = query, document = normal(z["Q"], z["D"]), normal(z["N"], z["D"])
    return lambda: F.cross_entropy((query @ document.T).float() * 20.0, torch.arange(z["Q"])), leaves


@dataclass(eq=False)
class Case:
    """One line of the table: an op at a size, and what plain PyTorch would run instead.

    fused, plain: functions of the sizes that give (function to call, the tensors that want gradients). small: sizes
    at which the interpreter counts. full: what differs from FULL.
    """

    op: str
    shape: str
    fused: object
    plain: dict
    small: dict
    full: dict = field(default_factory=dict)
    dropout_p: float = 0.0

    def sizes(self, which):
        return {**FULL, "dropout_p": self.dropout_p, **(self.full if which == "full" else {**self.full, **self.small})}


def attention_case(S, dropout_p):
    plain = {"softmax": softmax_attention, "sdpa": sdpa} if dropout_p == 0.0 else {"softmax": softmax_attention}
    name = f"S = {S}" + (", dropout" if dropout_p else "")
    return Case("attention", name, fused_attention, plain, dict(T=S, H=1), dict(S=S), dropout_p)


CASES = [
    *(attention_case(S, p) for S in (128, 512) for p in (0.0, DROPOUT)),
    *(
        Case(
            "disentangled_attention", f"S = {S}", fused_disentangled_attention,
            {"gathers, softmax": plain_disentangled_attention}, dict(T=S, H=1), dict(S=S),
        )
        for S in (128, 256)
    ),
    Case("layer_norm", "residual", fused_layer_norm, {"dropout, add, layer_norm": plain_layer_norm}, dict(T=32)),
    Case(
        "layer_norm", "residual, dropout", fused_layer_norm, {"dropout, add, layer_norm": plain_layer_norm},
        dict(T=32), dropout_p=DROPOUT,
    ),
    Case(
        "bias_gelu", "F = 3072", fused_bias_gelu, {"add, gelu": plain_bias_gelu, "gelu alone": gelu_alone}, dict(T=16)
    ),
    Case(
        "gelu_layer_norm", "M = 2458", fused_gelu_layer_norm,
        {"add, gelu, layer_norm": plain_gelu_layer_norm}, dict(M=32),
    ),
    # three chunks of sorted ids
    Case("embedding", "dropout", fused_embedding, {"lookups, layer_norm, dropout": plain_embedding},
         dict(T=136, D=256, V=150, P=100), dropout_p=DROPOUT),
    Case(
        "masked_cross_entropy", "M = 2458", fused_cross_entropy,
        {"logits of all tokens": dense_cross_entropy, "logits of picked rows": picked_cross_entropy},
        dict(M=16, V=640, D=16),
    ),
    Case("pooling", "mean, L2, S = 128", fused_pooling, {"mask, sum, normalize": plain_pooling}, dict(T=256, D=256)),
    Case(
        "contrastive_cross_entropy", "4096 x 8192", fused_contrastive,
        {"scores, cross_entropy": plain_contrastive}, dict(Q=16, N=640, D=16),
    ),
]  # fmt: skip


def count(make, sizes, fake=False):
    """(kernels of the forward, kernels of the backward) of one call."""
    with FakeTensorMode() if fake else contextlib.nullcontext():
        function, leaves = make(sizes)
        with counting() as forward:
            out = function()
        dout = torch.empty_like(out).fill_(1)
        with counting() as backward:
            torch.autograd.grad(out, leaves, dout)
    return forward, backward


@functools.cache
def counted(case):
    """`count` of a case at its small sizes, access by access."""
    return count(case.fused, case.sizes("small"))


@contextlib.contextmanager
def as_on_device():
    """Launchers see the H200's multiprocessors, not the interpreter's four, and products that give fp32 sums."""
    from fastbert.kernels import cross_entropy

    def product(out, a, b, add=False):
        # one call of the library on a GPU; a CPU widens a and b before and copies after
        kernel = Kernel("mm", flops=2 * a.numel() * b.shape[-1], stored={"outputs": _distinct(out)})
        kernel.loaded["inputs"] = sum(_distinct(x) for x in ((a, b, out) if add else (a, b)))
        counting.active[-1].append(kernel)
        return out

    modules = [sys.modules[name] for name in list(sys.modules) if name.startswith("fastbert.kernels.")]
    replaced = [(module, "multiprocessors") for module in modules if hasattr(module, "multiprocessors")]
    replaced.append((cross_entropy, "_product"))
    kept = [getattr(*place) for place in replaced]
    try:
        for place in replaced:
            setattr(*place, product if place[1] == "_product" else lambda: MULTIPROCESSORS)
        yield
    finally:
        for place, function in zip(replaced, kept):
            setattr(*place, function)


def fused(case, sizes):
    """(kernels of the forward, of the backward) of an op at `sizes`, from what was counted at the case's small ones."""
    small = case.sizes("small")
    # products of a tile belong to one sequence and head, of equal length in both
    scale = sizes["T"] * sizes["H"] // (small["T"] * small["H"])
    small_passes = counted(case)
    with as_on_device():
        passes = count(case.fused, sizes, fake=True)
    for kernels, seen in zip(passes, small_passes):
        for i, kernel in enumerate(kernels):
            same = [other for other in seen if other.name == kernel.name and other.size]
            if kernel.size:
                assert same, f"{kernel.name} runs at full size only: the small one does not stand for it"
                loaded, stored = ({n for other in same for n, x in getattr(other, side).items() if x}
                                  for side in ("loaded", "stored"))  # fmt: skip
                kernels[i] = kernel.once(loaded, stored)
                kernels[i].flops = same[0].flops * scale
    return passes


def summary(kernels):
    return {
        "bytes": sum(kernel.bytes for kernel in kernels),
        "flops": sum(kernel.flops for kernel in kernels),
        "seconds": sum(kernel.seconds for kernel in kernels),
        "kernels": len(kernels),
    }


def measure():
    """All rows of the table, as plain numbers."""
    rows = []
    for case in CASES:
        sizes = case.sizes("full")
        ours = dict(zip(("forward", "backward"), map(summary, fused(case, sizes))))
        for name, make in case.plain.items():
            theirs = dict(zip(("forward", "backward"), map(summary, count(make, sizes, fake=True))))
            rows.append({"op": case.op, "shape": case.shape, "fastbert": ours, "against": name, "plain": theirs})
    return {
        "what": "counted, not timed: bytes and FLOPs of every kernel over the ceilings of an H200",
        "ceilings": {"bytes_per_second": BANDWIDTH, "flops_per_second": PRODUCTS, "multiprocessors": MULTIPROCESSORS},
        "dtype": str(DTYPE).removeprefix("torch."),
        "sizes": FULL,
        "rows": rows,
    }


def both(passes, what):
    return sum(one[what] for one in passes.values())


def markdown(result):
    """The table that stands in kernels/NOTES.md."""
    lines = [
        "| op | shape | MB fwd, bwd | GFLOP | floor, µs | plain PyTorch | MB fwd, bwd | floor, µs | ratio |",
        "|---|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip

    def cells(passes):
        megabytes, microseconds = (
            [passes[one][what] * factor for one in ("forward", "backward")]
            for what, factor in (("bytes", 1e-6), ("seconds", 1e6))
        )
        return "{:.0f}, {:.0f}".format(*megabytes), "{:.1f}, {:.1f}".format(*microseconds)

    for row in result["rows"]:
        ours, theirs = cells(row["fastbert"]), cells(row["plain"])
        ratio = both(row["plain"], "seconds") / both(row["fastbert"], "seconds")
        gflop = both(row["fastbert"], "flops") / 1e9
        lines.append(
            f"| {row['op']} | {row['shape']} | {ours[0]} | {f'{gflop:.0f}' if gflop else ''} | {ours[1]} "
            f"| {row['against']} | {theirs[0]} | {theirs[1]} | {ratio:.1f} |"
        )
    return "\n".join(lines) + "\n"


def plot(result, path):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = result["rows"][::-1]
    figure, axes = pyplot.subplots(figsize=(9, 0.45 * len(rows) + 1.2))
    for shift, which, color in ((0.2, "fastbert", "tab:blue"), (-0.2, "plain", "tab:gray")):
        microseconds = [both(row[which], "seconds") * 1e6 for row in rows]
        places = [i + shift for i in range(len(rows))]
        bars = axes.barh(
            places, microseconds, 0.4, color=color, label={"plain": "plain PyTorch, eager"}.get(which, which)
        )
        axes.bar_label(bars, [f"{x:.0f}" for x in microseconds], padding=2, fontsize=7)
    axes.set_yticks(
        range(len(rows)), [f"{row['op']} ({row['shape']})\nagainst {row['against']}" for row in rows], fontsize=7
    )
    axes.set_xscale("log")
    axes.set_xlabel("µs, forward and backward: the least that an H200 needs. Counted, not timed")
    axes.set_title(
        f"Floors from counted traffic: BERT-base, {result['sizes']['T']:,} tokens, {result['dtype']}", fontsize=9
    )
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110, metadata={"Software": None})


def report(result):
    """The same table as a page of the benchmarks' results, with its plot."""
    page = (
        "# Floors from counted traffic\n\n"
        "**Counted, not timed**: the least time that an H200 needs for each op (4.3 TB/s, 788 TFLOP/s), beside plain\n"
        f"PyTorch's: BERT-base, {result['dtype']}, {result['sizes']['T']:,} tokens. How it is counted stands in "
        "[the notes](../../kernels/NOTES.md#floors).\n\n"
        f"{markdown(result)}\n![the same as bars](traffic.png)\n"
    )
    RESULT.with_suffix(".md").write_text(page, encoding="utf-8")


BEGIN, END = "<!-- traffic.py writes this table -->\n", "<!-- until here -->\n"


def main():
    argparse.ArgumentParser(description=__doc__.split("\n")[0]).parse_args()
    result = measure()
    RESULT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    plot(result, RESULT.with_suffix(".png"))
    notes = NOTES.read_text(encoding="utf-8")
    before, rest = notes.split(BEGIN)
    NOTES.write_text(before + BEGIN + markdown(result) + END + rest.split(END)[1], encoding="utf-8")
    report(result)
    print(markdown(result), end="")


if __name__ == "__main__":
    main()
