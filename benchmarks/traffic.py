"""Counted traffic: the bytes and FLOPs of every kernel that an op launches, and of plain PyTorch's kernels beside it.

    python benchmarks/traffic.py      writes benchmarks/results/traffic.{json,md,png}, and the table in kernels/NOTES.md

Nothing here is timed, and no GPU is needed: counter.py says how it counts.

A kernel takes at least its bytes over the bandwidth of memory and its FLOPs over that of matrix products, whichever is
longer; an op takes the sum over its kernels. The two ceilings are what others measured on an H200. What a kernel takes
is more: `make gpu` measures it.
"""

import argparse
import contextlib
import functools
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
from counter import BANDWIDTH, PRODUCTS, ROOT, Kernel, counting, distinct
from torch._subclasses.fake_tensor import FakeTensorMode

from fastbert import ops

RESULT = ROOT / "benchmarks" / "results" / "traffic.json"
NOTES = ROOT / "kernels" / "NOTES.md"

# of an H200
MULTIPROCESSORS = 132

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
    leaves = x, residual, weight, bias = normal(z["T"], z["D"]), normal(z["T"], z["D"]), normal(z["D"]), normal(z["D"])
    dropout = options(z)
    return lambda: ops.layer_norm(x, weight, bias, residual=residual, impl="triton", **dropout), leaves


def plain_layer_norm(z):
    leaves = x, residual, weight, bias = normal(z["T"], z["D"]), normal(z["T"], z["D"]), normal(z["D"]), normal(z["D"])
    return lambda: F.layer_norm(dropped(x, z["dropout_p"]) + residual, (z["D"],), weight, bias), leaves


def fused_bias_gelu(z):
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
    labels, leaves = head(z, z["M"])
    return lambda: ops.masked_cross_entropy(*leaves, labels, impl="triton")[0], leaves


def dense_cross_entropy(z, rows="T"):
    labels, leaves = head(z, z[rows])
    # in fp32, as under autocast
    return lambda: F.cross_entropy(F.linear(*leaves).float(), labels), leaves


def picked_cross_entropy(z):
    return dense_cross_entropy(z, "M")


def fused_pooling(z):
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
        kernel = Kernel("mm", flops=2 * a.numel() * b.shape[-1], stored={"outputs": distinct(out)})
        kernel.loaded["inputs"] = sum(distinct(x) for x in ((a, b, out) if add else (a, b)))
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
