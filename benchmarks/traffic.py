"""Counted traffic: the bytes and FLOPs of every kernel that an op launches, and of plain PyTorch's kernels beside it.

    python benchmarks/traffic.py      writes benchmarks/results/traffic.json, and the table in kernels/NOTES.md

Nothing is timed, and no GPU is needed: counter.py says how it counts. A kernel takes at least its bytes over the
bandwidth of memory or its FLOPs over the rate of matrix products, whichever is longer; an op takes the sum over its
kernels. Both ceilings are what others measured on an H200.
"""

import argparse
import contextlib
import functools
import json
import os
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from unittest import mock

# before anything imports triton
if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "1"
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.nn.functional as F
from counter import BANDWIDTH, PRODUCTS, ROOT, Kernel, counting, distinct
from torch._subclasses.fake_tensor import FakeTensorMode

from fastbert import ops
from fastbert.proof import op_cases
from fastbert.proof.op_cases import TABLE, Tensors, run_of

RESULT = ROOT / "benchmarks" / "results" / "traffic.json"
NOTES = ROOT / "kernels" / "NOTES.md"

# of an H200
MULTIPROCESSORS = 132

DROPOUT = 0.1


def sized(z, **changes):
    """The sizes with these changed: sequences of one length, S."""
    S = changes.pop("S", z.S)
    z = replace(z, **changes)
    return replace(z, lengths=(min(S, z.T),) * max(z.T // S, 1))


# BERT-base; 16,384 tokens, of which 15 % are picked for the loss
FULL = replace(op_cases.Case("attention", "bert-base", (128,) * 128).sizes, P=512)


def called(op, function, z):
    """(function to call, the tensors that want gradients) of anything with the op's own arguments."""
    arguments = TABLE[op].arguments(z, Tensors(z, "cpu"))
    if op == "embedding":
        # every token a word of its own: what real text repeats comes from cache
        arguments["input_ids"] = torch.randperm(z.V)[: z.T]
        arguments |= {f"{name}_ids": torch.arange(z.T) % n for name, n in (("position", z.P), ("token_type", 2))}
    run = run_of(function, arguments)
    return run.forward, run.leaves


def plain(op):
    return lambda z: called(op, TABLE[op].plain, z)


def rectangle(z, *tables):
    """[B, S, H, K], the projections of a model without packing, thrice; and tables of these shapes."""
    new = Tensors(z, "cpu")
    shapes = *[(len(z.lengths), z.S, z.H, z.K)] * 3, *tables
    return [new.normal(*shape).requires_grad_() for shape in shapes]


def on_heads(attend, z, *tables):
    """A call of attend(q, k, v, ...) with views [B, H, S, K] of projections; its result [T, H * K]."""
    leaves = rectangle(z, *tables)

    def call():
        views = [x.transpose(1, 2) for x in leaves[:3]]
        return attend(*views, *leaves[3:]).transpose(1, 2).reshape(z.T, -1)

    return call, leaves


def softmax_attention(z):
    return on_heads(functools.partial(TABLE["attention"].plain, dropout_p=z.dropout_p), z)


def sdpa(z):
    return on_heads(F.scaled_dot_product_attention, z)


def gathered_attention(z):
    index = torch.zeros(1, 1, z.S, z.S, dtype=torch.int64)
    attend = functools.partial(TABLE["disentangled_attention"].plain, c2p=index, p2c=index)
    return on_heads(attend, z, *[(2 * z.R, z.H, z.K)] * 2)


def gelu_alone(z):
    x = Tensors(z, "cpu").normal(z.T, z.F).requires_grad_()
    # a linear layer adds its bias inside the product; its gradient is a pass over dx all the same
    x.register_hook(lambda dx: (dx.sum(0), dx)[1])
    return lambda: F.gelu(x), [x]


def dense_cross_entropy(z):
    return plain("masked_cross_entropy")(replace(z, M=z.T))


def masked_mean(z):
    # a batch that happens to need no padding
    hidden = Tensors(z, "cpu").normal(len(z.lengths), z.S, z.D).requires_grad_()
    weights = torch.ones(*hidden.shape[:2], 1, dtype=z.dtype)
    return lambda: TABLE["pooling"].plain(hidden, weights), [hidden]


@dataclass(eq=False)
class Case:
    """A line of the table: an op at a size, and what plain PyTorch would run instead.

    plain: {name: function of the sizes that gives (function to call, the tensors that want gradients)}. small: sizes
    at which the interpreter counts. full: what differs from FULL.
    """

    op: str
    shape: str
    plain: dict
    small: dict
    full: dict = field(default_factory=dict)
    dropout_p: float = 0.0

    def sizes(self, which):
        return sized(FULL, dropout_p=self.dropout_p, **self.full, **(self.small if which == "small" else {}))

    def fused(self, z):
        return called(self.op, functools.partial(getattr(ops, self.op), impl="triton"), z)


def attention_case(S, dropout_p):
    plain = {"softmax": softmax_attention, "sdpa": sdpa} if dropout_p == 0.0 else {"softmax": softmax_attention}
    name = f"S = {S}" + (", dropout" if dropout_p else "")
    return Case("attention", name, plain, dict(T=S, H=1, D=64), dict(S=S), dropout_p)


add_norm = {"dropout, add, layer_norm": plain("layer_norm")}
CASES = [
    *(attention_case(S, p) for S in (128, 512) for p in (0.0, DROPOUT)),
    *(
        Case("disentangled_attention", f"S = {S}", {"gathers, softmax": gathered_attention},
             dict(T=S, H=1, D=64), dict(S=S))
        for S in (128, 256)
    ),
    Case("layer_norm", "residual", add_norm, dict(T=32)),
    Case("layer_norm", "residual, dropout", add_norm, dict(T=32), dropout_p=DROPOUT),
    Case("bias_gelu", "F = 3072", {"add, gelu": plain("bias_gelu"), "gelu alone": gelu_alone}, dict(T=16)),
    Case("gelu_layer_norm", "M = 2458", {"add, gelu, layer_norm": plain("gelu_layer_norm")}, dict(M=32)),
    Case("rms_norm", "D = 768", {"as in transformers": plain("rms_norm")}, dict(T=32)),
    Case("gated_activation", "F = 3072", {"gelu, product": plain("gated_activation")}, dict(T=16)),
    # three chunks of sorted ids
    Case("embedding", "dropout", {"lookups, layer_norm, dropout": plain("embedding")},
         dict(T=136, D=256, V=150, P=100), dropout_p=DROPOUT),
    Case(
        "masked_cross_entropy", "M = 2458",
        {"logits of all tokens": dense_cross_entropy, "logits of picked rows": plain("masked_cross_entropy")},
        dict(M=16, V=640, D=16),
    ),
    Case("pooling", "mean, L2, S = 128", {"mask, sum, normalize": masked_mean}, dict(T=256, D=256)),
    Case("contrastive_cross_entropy", "4096 x 8192", {"scores, cross_entropy": plain("contrastive_cross_entropy")},
         dict(Q=16, N=640, D=16)),
]  # fmt: skip


def _dropout_on_a_gpu(x, dropout_p):
    # one kernel that also writes a mask of bytes
    return torch.native_dropout(x, dropout_p, True)[0] if dropout_p else x


def count(make, sizes, fake=False):
    """(kernels of the forward, kernels of the backward) of one call."""
    with mock.patch.object(F, "dropout", _dropout_on_a_gpu), FakeTensorMode() if fake else contextlib.nullcontext():
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
        kernel = Kernel("mm", flops=2 * a.numel() * b.shape[-1], stored={"outputs": distinct(out)})
        kernel.loaded["inputs"] = sum(distinct(x) for x in ((a, b, out) if add else (a, b)))
        counting.active[-1].append(kernel)
        return out

    modules = [module for name, module in list(sys.modules.items()) if name.startswith("fastbert.kernels.")]
    with contextlib.ExitStack() as stack:
        for module in modules:
            if hasattr(module, "multiprocessors"):
                stack.enter_context(mock.patch.object(module, "multiprocessors", lambda: MULTIPROCESSORS))
        stack.enter_context(mock.patch.object(cross_entropy, "product", product))
        yield


def fused(case, sizes):
    """(kernels of the forward, of the backward) of an op at `sizes`, from what was counted at the case's small ones."""
    small = case.sizes("small")
    # products of a tile belong to one sequence and head, of equal length in both
    scale = sizes.T * sizes.H // (small.T * small.H)
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
    sums = {what: sum(getattr(kernel, what) for kernel in kernels) for what in ("bytes", "flops", "seconds")}
    return {**sums, "kernels": len(kernels)}


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
        "dtype": str(FULL.dtype).removeprefix("torch."),
        "sizes": {letter: getattr(FULL, letter) for letter in "TSDHKFVPMQNR"},
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


BEGIN, END = "<!-- traffic.py writes this table -->\n", "<!-- until here -->\n"


def main():
    argparse.ArgumentParser(description=__doc__.split("\n")[0]).parse_args()
    result = measure()
    RESULT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    notes = NOTES.read_text(encoding="utf-8")
    before, rest = notes.split(BEGIN)
    NOTES.write_text(before + BEGIN + markdown(result) + END + rest.split(END)[1], encoding="utf-8")
    print(markdown(result), end="")


if __name__ == "__main__":
    main()
