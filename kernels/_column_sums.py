"""The last step of parameter gradients: one launch adds up the programs' partial sums, each in its own dtype."""

import triton
import triton.language as tl

# a program adds 64 rows of 128 bytes at a time: D = 768 gives 24 programs for each gradient
BLOCK_P, BLOCK_D = 64, 32


@triton.jit(do_not_specialize=["programs"])
def _column_sums_kernel(
    partials_ptr,
    out0_ptr, out1_ptr, out2_ptr, out3_ptr,
    programs, stride_p,
    D: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    # the sum that this program computes: the grid is (blocks of columns, sums)
    k = tl.program_id(1)
    offs_d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
    mask_d = offs_d < D
    total = tl.zeros([BLOCK_P, BLOCK_D], tl.float32)
    for start in range(0, programs, BLOCK_P):
        row = (start + tl.arange(0, BLOCK_P))[:, None]
        total += tl.load(
            partials_ptr + row.to(tl.int64) * stride_p + k * D + offs_d, mask=(row < programs) & mask_d, other=0.0
        )
    total = tl.sum(total, 0)[None, :]
    if out0_ptr is not None:
        tl.store(out0_ptr + offs_d, total, mask=mask_d & (k == 0))
    if out1_ptr is not None:
        tl.store(out1_ptr + offs_d, total, mask=mask_d & (k == 1))
    if out2_ptr is not None:
        tl.store(out2_ptr + offs_d, total, mask=mask_d & (k == 2))
    if out3_ptr is not None:
        tl.store(out3_ptr + offs_d, total, mask=mask_d & (k == 3))


def column_sums(partials, outs):
    """Write partials[:, k].sum(0) to outs[k]. partials [programs, K, D] fp32, contiguous; outs: K <= 4 tensors of D
    elements in any dtypes, or None for sums that are not needed. Without programs the sums are 0.
    """
    programs, K, D = partials.shape
    outs = (*outs, *(None,) * (4 - K))
    _column_sums_kernel[(triton.cdiv(D, BLOCK_D), K)](
        partials, *outs, programs, K * D, D=D, BLOCK_P=BLOCK_P, BLOCK_D=BLOCK_D, num_warps=4
    )
