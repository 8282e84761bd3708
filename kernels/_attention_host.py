"""Host side of all attention kernels: operands, constants, and the launch settings of `attention`."""

import math

import torch
import triton

from ._launch import INTERPRET, capability, dropout_constants, product_precision, unit_columns

DTYPES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}


def check_operands(names, *tensors):
    """Raise TypeError or ValueError where the kernels cannot take q and the other tensors (or None)."""
    given = [x for x in tensors if x is not None]
    if given[0].dtype not in DTYPES or any(x.dtype != given[0].dtype for x in given):
        dtypes = ", ".join(str(x.dtype) for x in given)
        raise TypeError(f"{names} are {dtypes}: expected one of float16, bfloat16, float32 for all")
    if given[0].shape[-1] > 128:
        raise ValueError(f"the head size is {given[0].shape[-1]}: expected at most 128")


def unpacked(q, k, v):
    """q, k and v [rows, H, K] from any packing, with the elements of a head contiguous."""
    if k is None:
        q, k, v = q.unbind(1)
    elif v is None:
        k, v = k.unbind(1)
    return unit_columns(q), unit_columns(k), unit_columns(v)


def empty_gradients(q, k, v):
    """(uninitialised gradients, packed as the arguments: a list of one to three; the same unpacked: dq, dk, dv)."""
    grads = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v) if x is not None]
    return grads, unpacked(*grads, *[None] * (3 - len(grads)))


def empty_results(q):
    """Uninitialised out [M, H, K] and log-sum-exp, fp32 [1 or 2, H, M] (see `store_lse`), for q in any packing."""
    M, H, K = q.shape[0], *q.shape[-2:]
    out = torch.empty(M, H, K, dtype=q.dtype, device=q.device)
    return out, torch.empty(2 if q.dtype == torch.float32 else 1, H, M, dtype=torch.float32, device=q.device)


def strides(*tensors):
    """Of rows and heads, for each tensor."""
    return [x.stride(d) for x in tensors for d in (0, 1)]


def scalars_of(scale, dropout_p, offset):
    """(scale, the same for exp2, offset, threshold, keep_scale)."""
    return scale, scale * math.log2(math.e), offset, *dropout_constants(dropout_p)


def constants_of(q, dropout_p):
    """The compile-time constants that all attention kernels share."""
    K = q.shape[-1]
    return dict(
        HAS_DROPOUT=dropout_constants(dropout_p)[0] > 0,
        IS_FP32=q.dtype == torch.float32,
        PRECISION=product_precision(q.dtype),
        # Triton's interpreter computes wrong results in bfloat16: convert to fp32 after loading
        UPCAST=INTERPRET and q.dtype == torch.bfloat16,
        K=K,
        BLOCK_K=max(triton.next_power_of_2(K), 16),
    )


def key_of(q, longest, *names):
    """The key for `launch`, shared by similar shapes: "bf16 K64 S512 dropout"."""
    sizes = f"K{max(triton.next_power_of_2(q.shape[-1]), 16)}", f"S{min(triton.next_power_of_2(longest), 1024)}"
    return " ".join((DTYPES[q.dtype], *sizes, *names))


def short_settings(q, most_rows, max_seqlen, is_forward):
    """(settings, candidates) if one program can take a whole sequence and head, None if that would spill."""
    block_m, block_n = (max(triton.next_power_of_2(size), 16) for size in (most_rows, max_seqlen))
    longest = max(block_m, block_n)
    is_wide, is_odd = q.shape[-1] > 64, q.shape[-1] % 8 != 0
    is_hopper = capability() >= 90
    if q.dtype == torch.float32:
        largest = 16 if is_wide else 32
    else:
        # before Hopper a backward of 128 rows spills, and so do wide and odd heads
        largest = 128 if not is_odd and (is_hopper or (is_forward and not is_wide)) else 64
    if longest > largest:
        return None
    if q.dtype == torch.float32:
        num_warps = 4
    elif longest <= 32:
        # addresses and statistics are computed by every warp, so one warp does less work in total
        num_warps = 1 if longest == 16 or is_forward else 2
    else:
        num_warps = 8 if (longest == 128 and is_hopper) or (longest == 64 and is_odd) else 4
    settings = dict(BLOCK_M=block_m, BLOCK_N=block_n, num_warps=num_warps, num_stages=1)
    if is_forward and num_warps == 8 and longest == 128 and not is_wide:
        # the compiler may use 154, and then one program fits on a multiprocessor instead of two
        settings["maxnreg"] = 128
    # forward with dropout spills at 32 rows on two warps
    others = {16: (1, 2, 4), 32: (1, 4) if is_forward else (1, 2, 4), 64: (4, 8), 128: ()}[longest]
    return settings, [settings | dict(num_warps=n) for n in (num_warps, *others)]


# (kernel, operands are fp32, head size is over 64): (BLOCK_M, BLOCK_N, warps, stages)
# chosen from the compiler's reports (no spills on sm_80 and sm_90: NOTES.md), not from times on a device
_TILES = {
    ("fwd", False, False): (128, 64, 8, 3),
    ("fwd", False, True): (128, 64, 8, 2),
    ("fwd", True, False): (64, 32, 8, 1),
    ("fwd", True, True): (32, 16, 8, 1),
    ("dq", False, False): (64, 64, 4, 2),
    ("dq", False, True): (64, 32, 4, 2),
    ("dq", True, False): (32, 32, 8, 1),
    ("dq", True, True): (16, 16, 8, 1),
    ("dkdv", False, False): (64, 64, 4, 2),
    ("dkdv", False, True): (64, 64, 8, 2),
    ("dkdv", True, False): (32, 64, 8, 1),
    ("dkdv", True, True): (16, 32, 8, 1),
}
# before Hopper operands are in registers, which leaves fewer for the tiles
_TILES_BEFORE_HOPPER = {
    ("fwd", False, True): (128, 32, 8, 2),
    ("dq", False, False): (64, 32, 4, 2),
    ("dq", False, True): (128, 32, 8, 2),
    ("dkdv", False, False): (64, 32, 4, 2),
    ("dkdv", True, False): (32, 32, 8, 1),
}
# candidates for tuning, in 16 bits with head sizes up to 64; True: IS_TRANSPOSED
_CANDIDATES = {
    "fwd": [(128, 64, 8, 3), (128, 64, 8, 2), (64, 64, 4, 3), (64, 64, 4, 2), (128, 128, 8, 2)],
    "dq": [(64, 64, 4, 2), (64, 64, 4, 3), (64, 32, 4, 2), (128, 64, 8, 2), (128, 32, 8, 2)],
    "dkdv": [(64, 64, 4, 2), (64, 64, 4, 1), (64, 32, 4, 2), (128, 64, 8, 2)],
    "dkdv transposed": [(64, 64, 4, 2, True), (32, 64, 4, 2, True)],
}


def tiled_settings(kernel, q, most_rows, constants):
    """(settings, candidates) of one of the three tiled kernels."""
    is_fp32 = q.dtype == torch.float32
    # elements of a head size such as 59 are loaded one by one, and their addresses take as many registers as wide rows
    is_wide = q.shape[-1] > 64 or q.shape[-1] % 8 != 0
    has_dropout, has_window = constants["HAS_DROPOUT"], constants["HAS_WINDOW"]
    tile = _TILES[kernel, is_fp32, is_wide]
    if capability() < 90:
        tile = _TILES_BEFORE_HOPPER.get((kernel, is_fp32, is_wide), tile)
    candidates = [] if is_fp32 or is_wide else _CANDIDATES[kernel]
    if not (is_fp32 or is_wide):
        if kernel == "fwd" and (most_rows <= 64 or has_dropout or has_window):
            # few query rows, as in a last layer that only computes picked rows; or the dropout mask takes registers; or
            # rows that are far apart see different keys
            tile = (64, 64, 4, 3)
        elif kernel == "dkdv" and has_dropout and has_window:
            tile = (64, 32, 4, 2)
            candidates = [tile, (128, 64, 8, 2)]
        elif kernel == "dkdv" and not has_dropout:
            candidates = candidates + _CANDIDATES["dkdv transposed"]
            if capability() == 90:
                tile = (64, 64, 4, 2, True)
    elif kernel == "dkdv" and not is_fp32 and q.shape[-1] % 8 != 0:
        tile = (32, 64, 8, 2)

    def settings(block_m, block_n, num_warps, num_stages, is_transposed=False):
        made = dict(BLOCK_M=block_m, BLOCK_N=block_n, num_warps=num_warps, num_stages=num_stages)
        if kernel == "dkdv":
            # Hopper multiplies 64 rows of a warpgroup at a time; only pipelined loops leave products in flight
            is_async = capability() == 90 and not is_fp32 and block_n % 64 == 0 and num_stages > 1
            made |= dict(IS_TRANSPOSED=is_transposed, WAIT_DK=is_async and not is_transposed)
        else:
            # with large operands, two copies of the loop's body would share them in registers and spill
            made["PEEL"] = not (is_fp32 or is_wide)
        return made

    default = settings(*tile)
    if kernel == "fwd" and tile[:3] == (64, 64, 4) and has_dropout and capability() >= 90:
        # the compiler uses 174, and then two programs fit on a multiprocessor instead of three
        default["maxnreg"] = 168
    return default, [default, *(settings(*x) for x in candidates)]


def query_tiles(M, B, max_seqlen_q, BLOCK_M):
    """(tiles of query rows, whether that is per sequence or for all sequences): see `_sequence_of_program`."""
    if max_seqlen_q >= 0:
        return max(triton.cdiv(max_seqlen_q, BLOCK_M), 1), True
    return M // BLOCK_M + B, False
