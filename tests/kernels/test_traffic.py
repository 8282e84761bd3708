"""Every kernel moves what its docstring states and no more, and multiplies no more than its tiles: counted, not timed.

The counter is benchmarks/traffic.py: it sees every access of a kernel in Triton's interpreter.
"""

import json
import math
from pathlib import Path

import pytest
import torch
from helpers import cu_seqlens_of

from benchmarks import traffic
from fastbert import ops

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="counts what Triton's interpreter does")

T, D = 64, 96
UNIT = T * D * 2  # bytes of one [T, D] in fp16


def random(*shape):
    return torch.randn(shape).half().requires_grad_()


def rows_moved(kernels, smallest=UNIT):
    """Bytes that kernels load from and store to arguments of at least `smallest` bytes.

    Smaller ones, parameters and statistics, are left out: next to the rows of a real batch they are nothing.
    """
    return sum(asked for k in kernels for name, asked in k.asked.items() if k.size[name] >= smallest)


def passes(function):
    """(kernels of the forward, of the backward) of an op."""
    with traffic.counting() as forward:
        out = function()
    dout = torch.randn_like(out)
    with traffic.counting() as backward:
        out.backward(dout)
    return forward, backward


def layer_norm(dropout_p):
    options = dict(dropout_p=dropout_p, seed=torch.tensor([3])) if dropout_p else {}
    return ops.layer_norm(random(T, D), random(D), random(D), residual=random(T, D), impl="triton", **options)


def attention(lengths, H=3, K=32, **options):
    qkv, cu_seqlens = random(sum(lengths), 3, H, K), cu_seqlens_of(lengths, "cpu")
    return ops.attention(qkv, None, None, cu_seqlens, max(lengths), impl="triton", **options)


def embedding():
    ids = torch.randperm(T), torch.arange(T), torch.arange(T) % 2
    return ops.embedding(*ids, random(T, D), random(T, D), random(2, D), random(D), random(D), impl="triton")


@pytest.mark.parametrize(
    "op, forward, backward",
    [
        # q, k, v, out; then q, k, v, dout, dq, dk, dv
        pytest.param(lambda: attention([20, 1, 43]), 4, 7, id="attention"),
        # x, residual, y; then dy, x, residual, dx and, under dropout, dresidual
        pytest.param(lambda: layer_norm(0.0), 3, 4, id="layer_norm"),
        pytest.param(lambda: layer_norm(0.1), 3, 5, id="layer_norm-dropout"),
        # x, y; then dy, x, dx
        pytest.param(lambda: ops.bias_gelu(random(T, D), random(D), impl="triton"), 2, 3, id="bias_gelu"),
        pytest.param(
            lambda: ops.gelu_layer_norm(random(T, D), random(D), random(D), random(D), impl="triton"), 2, 3,
            id="gelu_layer_norm",
        ),
        pytest.param(lambda: ops.rms_norm(random(T, D), random(D), impl="triton"), 2, 3, id="rms_norm"),
        # both halves, y; then dy, and both halves of x and dx
        pytest.param(lambda: ops.gated_activation(random(T, 2 * D), impl="triton"), 3, 5, id="gated_activation"),
        # words, positions, y; then dy, words, positions, dz, dz read for each of the two tables, and both gradients
        pytest.param(embedding, 3, 8, id="embedding"),
    ],
)  # fmt: skip
def test_rows_pass_as_often_as_the_docstring_says(op, forward, backward):
    for kernels, units in zip(passes(op), (forward, backward)):
        assert units * UNIT <= rows_moved(kernels) <= 1.05 * units * UNIT


@pytest.mark.parametrize("gradients, times", [(False, 1), (True, 3)], ids=["evaluation", "training"])
def test_logits_pass_three_times(gradients, times):
    """Read for the loss; read, and written over with their gradient."""
    M, V = 16, 640
    hidden, weight, bias = random(M, 8), random(V, 8), random(V)
    labels = torch.randint(V, (M,))
    with traffic.counting() as kernels, torch.set_grad_enabled(gradients):
        ops.masked_cross_entropy(hidden, weight, bias, labels, impl="triton")
    assert times * M * V * 2 <= rows_moved(kernels, M * V * 2) <= 1.05 * times * M * V * 2


# These may touch less of an argument than there is: which rows of a table's gradient a level of sums writes depends on
# the ids, how many pieces of sequences are left to be joined on the lengths, as do the relative positions that occur.
SPARING = ("_segment_sum", "_pooling", "_disentangled_attention")


@pytest.mark.parametrize("case", traffic.CASES, ids=lambda case: f"{case.op}-{case.shape}")
def test_each_launch_touches_its_arguments_once(case):
    """The elements that a kernel touches are those of its arguments (of a table, the rows picked), no more, no less.

    So does what the table in NOTES.md says of full size: there the same rule is applied to the arguments.
    """
    launches = [kernel for kernels in traffic.counted(case) for kernel in kernels if kernel.size]
    assert len(launches) >= 2
    for kernel in launches:
        floor = kernel.once(kernel.loaded, kernel.stored).bytes
        assert kernel.bytes <= 1.05 * floor, kernel
        if not kernel.name.startswith(SPARING):
            assert floor <= kernel.bytes, kernel


def test_full_size_follows_from_small(monkeypatch):
    """A larger batch, counted access by access, moves the bytes that were predicted from a small one."""
    # the interpreter's, which are counted
    monkeypatch.setattr(traffic, "MULTIPROCESSORS", 4)
    for case in traffic.CASES:
        if case.op == "attention" and (case.dropout_p or case.full["S"] > 128):
            continue
        if case.op == "disentangled_attention":
            # short sequences do not have all relative positions of its tables
            continue
        larger = case.sizes("small")
        twice = [*("TMQ" if case.op != "embedding" else "TV")]
        larger = traffic.sized(larger, **{name: 2 * getattr(larger, name) for name in twice if name in case.small})
        foretold, counted = traffic.fused(case, larger), traffic.count(case.fused, larger)
        for mine, theirs in zip(foretold, counted):
            assert sum(kernel.flops for kernel in mine) == sum(kernel.flops for kernel in theirs)
            # PyTorch's own kernels are counted alike in both, but a CPU needs more of them around products
            mine, theirs = ([kernel for kernel in kernels if kernel.size] for kernels in (mine, theirs))
            assert [kernel.name for kernel in mine] == [kernel.name for kernel in theirs]
            total = sum(kernel.bytes for kernel in theirs)
            # a few percent more for pooling and embedding: see above
            assert -0.01 * total <= sum(kernel.bytes for kernel in mine) - total <= 0.08 * total, case.op


# products of one tile of scores, by kernel: forward q k, p v; backward also dout v and what makes dq, dk, dv
PRODUCTS = {
    "_attention_short_fwd_kernel": 2,
    "_attention_tiled_fwd_kernel": 2,
    "_attention_short_bwd_kernel": 5,
    "_attention_tiled_dq_kernel": 3,
    "_attention_tiled_dkdv_kernel": 4,
}


@pytest.mark.parametrize("lengths", [[20, 1, 43], [100, 7, 290]], ids=["short", "tiled"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.1], ids=["", "dropout"])
def test_attention_multiplies_tiles_that_exist(lengths, dropout_p):
    """FLOPs equal the closed form. The loop's operands are read once per tile of the others, everything else once."""
    H, K = 2, 32
    seed = torch.tensor([3]) if dropout_p else None
    forward, backward = passes(lambda: attention(lengths, H, K, dropout_p=dropout_p, seed=seed))
    launches = [kernel for kernel in (*forward, *backward) if kernel.size]
    assert {kernel.name for kernel in launches} <= set(PRODUCTS)
    row = H * K * 2
    for kernel in launches:
        tile_m, tile_n = kernel.scalars["BLOCK_M"], kernel.scalars["BLOCK_N"]
        tiles = [(math.ceil(n / tile_m), math.ceil(n / tile_n)) for n in lengths]
        scores = sum(m * n for m, n in tiles) * tile_m * tile_n
        assert kernel.flops == PRODUCTS[kernel.name] * 2 * scores * K * H

        once, by_queries, by_keys = (
            sum(n * times for n, times in zip(lengths, column)) * row
            for column in ([1] * len(tiles), [m for m, _ in tiles], [n for _, n in tiles])
        )
        floor = {
            "_attention_short_fwd_kernel": 4 * once,
            "_attention_short_bwd_kernel": 7 * once,
            # q, out; k, v
            "_attention_tiled_fwd_kernel": 2 * once + 2 * by_queries,
            # q, dout, out, dq; k, v
            "_attention_tiled_dq_kernel": 4 * once + 2 * by_queries,
            # k, v, dk, dv; q, dout
            "_attention_tiled_dkdv_kernel": 4 * once + 2 * by_keys,
        }[kernel.name]
        assert floor <= rows_moved([kernel], sum(lengths) * row) <= 1.05 * floor, kernel.name


def test_a_window_visits_only_the_tiles_inside_it():
    """Of 8 x 8 tiles of 64 and a window of 40 positions, those beside the diagonal: less work, forward and backward."""
    wide, narrow = (passes(lambda w=w: attention([512], 1, 32, window=w)) for w in (None, 40))
    for all_tiles, some in zip(wide, narrow):
        flops = [sum(kernel.flops for kernel in kernels) for kernels in (all_tiles, some)]
        assert 0 < flops[1] <= 0.5 * flops[0]


def test_every_kernel_is_counted_above():
    """The table would say nothing of a kernel that no case launches."""
    launched = {k.name for case in traffic.CASES for p in traffic.counted(case) for k in p}
    for path in sorted(Path(traffic.ROOT / "kernels").glob("[!_]*.py")):
        if path.stem == "vocabulary_max":
            # its programs read the weight again for each text, which no full size follows from: not in the table yet
            continue
        text = path.read_text(encoding="utf-8")
        kernels = {line.split("(")[0].removeprefix("def ") for line in text.splitlines() if line.startswith("def _")}
        kernels = {name for name in kernels if name.endswith("_kernel")}
        assert kernels <= launched, f"{path.name}: {sorted(kernels - launched)}"


def test_the_counter_sees_repeated_and_outside_accesses():
    """Bytes asked for twice count twice, elements once; an access outside all arguments is an error."""
    import triton
    import triton.language as tl

    @triton.jit
    def _twice_kernel(x_ptr, y_ptr, n):
        offsets = tl.arange(0, 16)
        x = tl.load(x_ptr + offsets, mask=offsets < n) + tl.load(x_ptr + offsets, mask=offsets < n)
        tl.store(y_ptr + offsets, x, mask=offsets < n)

    x, y = torch.ones(10), torch.empty(10)
    with traffic.counting() as kernels:
        _twice_kernel[(3,)](x, y, 10)
    (kernel,) = kernels
    assert (kernel.loaded, kernel.stored) == ({"x_ptr": 40}, {"y_ptr": 40})
    assert kernel.asked == {"x_ptr": 240, "y_ptr": 120}
    with traffic.counting(), pytest.raises(Exception, match="_twice_kernel touches .* outside its arguments"):
        _twice_kernel[(1,)](x, y[:9].clone(), 10)


def test_plain_kernels_count_inputs_and_outputs():
    x = torch.zeros(6, 8)
    with traffic.counting() as kernels:
        y = x.T.reshape(-1).expand(3, 48) + x.new_ones(1)
        y.add_(1)
        torch.mm(x, x.T)
    assert [(k.name, k.bytes) for k in kernels] == [
        ("clone", 2 * 192), ("new_ones", 4), ("add", 192 + 4 + 3 * 192), ("add_", 2 * 3 * 192), ("mm", 2 * 192 + 144),
    ]  # fmt: skip
    assert kernels[-1].flops == 2 * 6 * 6 * 8


def test_the_table_in_the_notes_is_what_is_counted():
    result = json.loads(traffic.RESULT.read_text(encoding="utf-8"))
    assert traffic.markdown(result) in traffic.NOTES.read_text(encoding="utf-8")
    now = traffic.measure()
    again = "run python benchmarks/traffic.py: the kernels move other bytes than its results say"
    assert [(row["op"], row["shape"], row["against"]) for row in result["rows"]] == [
        (row["op"], row["shape"], row["against"]) for row in now["rows"]
    ], again
    for old, new in zip(result["rows"], now["rows"]):
        for which in ("fastbert", "plain"):
            for what in ("bytes", "flops", "seconds"):
                assert traffic.both(new[which], what) == pytest.approx(traffic.both(old[which], what), rel=0.02), again
