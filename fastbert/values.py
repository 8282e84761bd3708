"""Checks of the values of tensors, which must not wait for a GPU."""

import itertools

import torch


def check_ids(name: str, ids: torch.Tensor, rows: int, ignore_index: int | None = None) -> None:
    """Raise ValueError if `ids` are no integers, or if one is neither 0 .. rows - 1 nor `ignore_index`; see `check`."""
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise ValueError(f"{name} are of {ids.dtype}: expected integers")
    expected = f"expected 0 to {rows - 1}" + ("" if ignore_index is None else f", or {ignore_index} for none")
    if ids.is_meta or not ids.numel():
        return
    is_known = ids.clamp(0, rows - 1) == ids
    if ignore_index is not None:
        is_known |= ids == ignore_index
    if torch.compiler.is_compiling() or not _is_readable(ids):
        check(is_known, f"{name} outside [0, {rows}): {expected}")
    elif not is_known.all():
        raise ValueError(f"{name} hold {int(ids[~is_known][0])}: {expected}")


def check(is_right: torch.Tensor, error: str) -> None:
    """Raise ValueError(error) unless all of `is_right` is true.

    On a GPU and in compiled code the device asserts it, so that nothing waits for the values.
    """
    if torch.compiler.is_compiling() or is_right.is_cuda:
        torch._assert_async(is_right.all(), error)
    elif _is_readable(is_right) and not is_right.all():
        raise ValueError(error)


def _is_readable(x):
    """Whether the host can read the values of x at once: in its memory, neither fake nor batched by torch.func."""
    return x.device.type == "cpu" and type(x) is torch.Tensor and not torch._C._functorch.is_functorch_wrapped_tensor(x)


def check_sequences(cu_seqlens, rows, max_seqlen, name="cu_seqlens"):
    """Raises ValueError unless the sequences follow one another within the rows and none is longer than max_seqlen.

    On a CPU only: on a GPU the host would have to wait for the values.
    """
    if cu_seqlens.dim() != 1 or len(cu_seqlens) == 0:
        raise ValueError(f"{name} has shape {tuple(cu_seqlens.shape)}: expected [B + 1]")
    if torch.compiler.is_compiling() or not _is_readable(cu_seqlens):
        return
    starts = cu_seqlens.tolist()
    lengths = [end - start for start, end in itertools.pairwise(starts)]
    if starts[0] != 0 or starts[-1] > rows or min(lengths, default=0) < 0:
        raise ValueError(f"{name} runs from {starts[0]} to {starts[-1]}: expected 0 to at most {rows} rows, ascending")
    if max_seqlen is not None and max(lengths, default=0) > max_seqlen:
        name = name.replace("cu_seqlens", "max_seqlen")
        raise ValueError(
            f"{name} is {max_seqlen}: expected at least {max(lengths)}, the length of the longest sequence"
        )
