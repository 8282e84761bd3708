"""What the variants of op_peers.py share: why one is unavailable, compilation, the padded rectangle."""

import importlib

import torch

from fastbert.proof.op_cases import run_of


class Unavailable(Exception):
    """This variant is not available here, and why."""


class NotApplicable(Exception):
    """This variant would be the same as another one."""


def device_of(arguments):
    return next(x.device for x in arguments.values() if torch.is_tensor(x))


def gpu_library(name, arguments):
    """The module `name`, whose kernels run on GPUs only. Raises Unavailable where it is not installed or has no GPU."""
    try:
        module = importlib.import_module(name)
    except ImportError as error:
        raise Unavailable(f"not installed ({error})") from error
    gpu_only(arguments)
    return module


def no_dropout(who, arguments):
    if arguments.get("dropout_p"):
        raise Unavailable(f"{who} has no dropout")


def gpu_only(arguments, why="runs on GPUs only"):
    if device_of(arguments).type == "cpu":
        raise Unavailable(why)


def compiled(function):
    # for these shapes alone: reset torch._dynamo between cases
    return torch.compile(function, dynamic=False)


def compiled_forward(make):
    """The variant that `make` builds, its forward compiled."""

    def make_compiled(arguments):
        run = make(arguments)
        run.forward = compiled(run.forward)
        return run

    return make_compiled


class Padded:
    """The padded rectangle of packed rows: what a model without packing computes on."""

    def __init__(self, arguments):
        lengths = torch.tensor(arguments.lengths, device=device_of(arguments))
        self.S, self.lengths = max(arguments.lengths), lengths
        self.mask = torch.arange(self.S, device=lengths.device) < lengths[:, None]
        self.is_full = min(arguments.lengths) == self.S
        # None without padding: then a model without packing needs no mask either
        self.key_mask = None if self.is_full else self.mask[:, None, None, :]

    def rectangle(self, rows):
        """[T, ...] as [B, S, ...], padding 0."""
        padded = rows.new_zeros(*self.mask.shape, *rows.shape[1:])
        padded[self.mask] = rows
        return padded

    def heads_first(self, qkv):
        """q, k, v, each [B, H, S, K], of the packed projection [T, 3, H, K]."""
        return [self.unpacked(x) for x in qkv.unbind(1)]

    def unpacked(self, cotangent):
        return self.rectangle(cotangent).transpose(1, 2).contiguous()

    def packed(self, output, gradients):
        """(output [T, H, K], [gradient of the projection, [T, 3, H, K]]) of padded ones, each [B, H, S, K]."""
        rows = [x.transpose(1, 2)[self.mask] for x in (output, *gradients[:3])]
        return rows[0], [torch.stack(rows[1:], 1), *gradients[3:]]


def every_token(function, per_pick):
    """A variant that computes every token of the rectangle, as transformers' heads do; picks stand evenly in it."""

    def make(arguments):
        x = arguments[per_pick]
        M, tokens = len(x), len(arguments.lengths) * max(arguments.lengths)
        picks = torch.arange(M, device=x.device) * tokens // M
        everything = torch.randn(tokens, x.shape[1], device=x.device, dtype=x.dtype).index_copy(0, picks, x)
        wide = {**arguments, per_pick: everything}
        if "labels" in wide:
            wide["labels"] = wide["labels"].new_full((tokens,), -100).index_copy(0, picks, wide["labels"])
        run = run_of(function, wide)

        def packed(output, gradients):
            return output[picks] if output.dim() else output, [gradients[0][picks], *gradients[1:]]

        run.packed = packed
        if "labels" not in wide:
            run.unpacked = lambda cotangent: torch.zeros_like(everything).index_copy(0, picks, cotangent)
        return run

    return make
