"""What a user could call instead of the cross-entropies. See op_peers.py."""

import inspect
import math

import peers
import torch
import torch.nn.functional as F

from fastbert.proof.op_cases import TABLE, Arguments, Run, run_of


def _unwidened_cross_entropy(arguments):
    """In half precision: logits stay in the dtype that they come in."""
    if arguments["hidden"].dtype == torch.float32:
        raise peers.NotApplicable

    def call(hidden, weight, bias, labels):
        return F.cross_entropy(F.linear(hidden, weight, bias), labels, reduction="sum")

    return run_of(call, arguments)


def _vocabulary_or_documents(cross_entropy):
    """A variant of both cross-entropies. cross_entropy(hidden, weight, bias or None, labels) gives the sum."""

    def make(arguments):
        if "query" not in arguments:
            return run_of(cross_entropy, arguments)

        def call(query, document, scale):
            # each query's own document is its label
            return cross_entropy(query * scale, document, None, torch.arange(len(query), device=query.device))

        return run_of(call, arguments)

    return make


def _linear_cross_entropy(chunked):
    """torch's own: as it is (linear, then cross_entropy), or in chunks of rows whose logits are not kept."""

    def make(arguments):
        if not hasattr(F, "linear_cross_entropy"):
            raise peers.Unavailable("this torch has no linear_cross_entropy")
        options = {}
        if chunked:
            if not hasattr(torch.nn, "LinearCrossEntropyOptions"):
                raise peers.Unavailable("this torch has no LinearCrossEntropyOptions")
            # its choice for a CPU, a handful of rows a chunk, reads the whole weight for each: many times slower
            rows = len(arguments.get("hidden", arguments.get("query")))
            size = dict(batch_chunk_size=rows) if peers.device_of(arguments).type == "cpu" else {}
            options["options"] = torch.nn.LinearCrossEntropyOptions(**size)

        def call(hidden, weight, bias, labels):
            return F.linear_cross_entropy(hidden, weight, labels, linear_bias=bias, reduction="sum", **options)

        return _vocabulary_or_documents(call)(arguments)

    return make


def _liger_cross_entropy(rows=None):
    """Liger's, in chunks of its own choice, or of about so many rows.

    It aims at logits of the size of `hidden`, which with a large vocabulary and a narrow model are chunks of 64 to 256
    rows, each of which reads and writes the weight's whole gradient.
    """

    def make(arguments):
        peers.gpu_library("liger_kernel", arguments)
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

        options = {}
        if rows is not None:
            if "chunk_mem_const" not in inspect.signature(liger_fused_linear_cross_entropy).parameters:
                raise peers.Unavailable("this version of liger_kernel has no chunk_mem_const")
            hidden, weight = (
                arguments.get(a, arguments.get(b)) for a, b in (("hidden", "query"), ("weight", "document"))
            )
            share = min(rows / len(hidden), 1.0)
            options["chunk_mem_const"] = math.ceil(share * len(weight) / weight.shape[1])

        def call(hidden, weight, bias, labels):
            return liger_fused_linear_cross_entropy(hidden, weight, labels, bias=bias, reduction="sum", **options)

        return _vocabulary_or_documents(call)(arguments)

    return make


def _cut_cross_entropy(impl):
    """Cut Cross Entropy. Where it takes no bias the bias is one more column of the weight, for free.

    A column that is one in every row of `hidden` and the bias in `weight`, and zeros up to a multiple of 64, as its
    blocks like it, stand in its arguments before any clock starts.
    """

    def make(arguments):
        from cut_cross_entropy import linear_cross_entropy

        on_a_cpu = peers.device_of(arguments).type == "cpu"
        if impl == "cce":
            peers.gpu_only(arguments)
        elif not on_a_cpu:
            raise peers.NotApplicable  # what "compiled" is
        # its own kernels drop small gradients, and those of an untrained model are small
        options = dict(impl=impl, reduction="sum", **({} if on_a_cpu else {"filter_eps": None}))
        if "query" in arguments or "bias" in inspect.signature(linear_cross_entropy).parameters:

            def call(hidden, weight, bias, labels):
                given = {} if bias is None else {"bias": bias}
                return linear_cross_entropy(hidden, weight, labels, **given, **options)

            return _vocabulary_or_documents(call)(arguments)

        hidden, weight, bias, labels = (arguments[name] for name in ("hidden", "weight", "bias", "labels"))
        D = weight.shape[1]
        run = Run(None, [_and_columns(hidden, torch.ones_like(hidden[:, 0])), _and_columns(weight, bias)])
        run.packed = lambda output, gradients: (output, [gradients[0][:, :D], gradients[1][:, :D], gradients[1][:, D]])
        run.forward = lambda: linear_cross_entropy(*run.leaves, labels, **options)
        return run

    return make


def _and_columns(x, column):
    return torch.cat((x, column[:, None], x.new_zeros(len(x), -(x.shape[1] + 1) % 64)), 1)


def _quack_cross_entropy(arguments):
    """QuACK's, in chunks of rows. It takes no bias, whole eights of rows, and is at its best in 128s of words."""
    peers.gpu_library("quack", arguments)
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    def call(hidden, weight, bias, labels):
        return chunked_linear_cross_entropy(hidden, weight, labels, reduction="sum")

    if "query" in arguments:
        return _vocabulary_or_documents(call)(arguments)
    hidden, weight, bias, labels = (arguments[name] for name in ("hidden", "weight", "bias", "labels"))
    (M, D), V = hidden.shape, len(weight)
    # fill up with rows without a label and words without probability
    weight = _with_rows(_and_columns(weight, bias), -V % 128)
    weight[V:, D] = _NEVER
    run = Run(None, [_with_rows(_and_columns(hidden, torch.ones_like(hidden[:, 0])), -M % 8), weight])
    labels = F.pad(labels, (0, -M % 8), value=-100)
    run.packed = lambda output, grads: (output, [grads[0][:M, :D], grads[1][:V, :D], grads[1][:V, D]])
    run.forward = lambda: call(*run.leaves, None, labels)
    return run


# a logit whose probability is 0 in every dtype
_NEVER = -1e4


def _with_rows(x, count):
    return torch.cat((x, x.new_zeros(count, *x.shape[1:])))


def whole_64s(make):
    """The variant with the vocabulary filled up to a multiple of 64 words, as one does for tensor cores.

    BERT's 30,522 are no multiple of 8: rows of logits are not aligned then, and libraries fall back to slower products.
    """

    def wide(arguments):
        peers.gpu_only(arguments, "on a CPU it makes no difference")
        V = len(arguments["weight"])
        more = -V % 64
        if not more:
            raise peers.NotApplicable
        weight, bias = _with_rows(arguments["weight"], more), F.pad(arguments["bias"], (0, more), value=_NEVER)
        run = make(Arguments({**arguments, "weight": weight, "bias": bias}, arguments.lengths))
        run.packed = lambda output, gradients: (output, [gradients[0], *(x[:V] for x in gradients[1:])])
        return run

    return wide


CROSS_ENTROPIES = {
    "torch linear_cross_entropy": _linear_cross_entropy(chunked=False),
    "torch linear_cross_entropy, chunked": _linear_cross_entropy(chunked=True),
    "liger": _liger_cross_entropy(),
    "liger, large chunks": _liger_cross_entropy(4096),
    "cut_cross_entropy": _cut_cross_entropy("cce"),
    "cut_cross_entropy, compiled": _cut_cross_entropy("torch_compile"),
    "quack": _quack_cross_entropy,
}
PEERS = {
    "masked_cross_entropy": {
        "eager, every token": peers.every_token(TABLE["masked_cross_entropy"].plain, "hidden"),
        "eager, not widened": _unwidened_cross_entropy,
        "eager, whole 64s": whole_64s(lambda arguments: run_of(TABLE["masked_cross_entropy"].plain, arguments)),
        **CROSS_ENTROPIES,
        **{
            f"{name}, whole 64s": whole_64s(CROSS_ENTROPIES[name])
            for name in ("torch linear_cross_entropy, chunked", "liger, large chunks")
        },
    },
    "contrastive_cross_entropy": CROSS_ENTROPIES,
}
