"""What a user could call instead of the ops on rows: LayerNorm, GELU, embeddings, pooling. See op_peers.py."""

import peers
import torch
import torch.nn.functional as F

from fastbert.proof.op_cases import TABLE, Run, floating, run_of


def _pooling_eager(arguments):
    padded = peers.Padded(arguments)
    run = Run(None, [padded.rectangle(arguments["hidden"])])
    run.packed = lambda output, gradients: (output, [gradients[0][padded.mask]])
    weights = padded.mask[:, :, None].to(arguments["hidden"].dtype)
    run.forward = lambda: TABLE["pooling"].plain(*run.leaves, weights)
    return run


def _pooling_segments(arguments):
    """A mean of each sequence's packed rows, by torch's own reduction of segments: no padding."""
    lengths = torch.tensor(arguments.lengths, device=peers.device_of(arguments))
    run = Run(None, [arguments["hidden"]])
    run.forward = lambda: F.normalize(torch.segment_reduce(run.leaves[0], "mean", lengths=lengths, axis=0), dim=-1)
    return run


def _vocabulary_max_eager(arguments):
    padded = peers.Padded(arguments)
    run = Run(None, [padded.rectangle(arguments["hidden"]), arguments["weight"], arguments["bias"]])
    run.packed = lambda output, gradients: (output, [gradients[0][padded.mask], *gradients[1:]])
    mask = padded.mask[:, :, None].to(arguments["hidden"].dtype)
    run.forward = lambda: TABLE["vocabulary_max"].plain(*run.leaves, mask)
    return run


def _in_the_rectangle(op, *per_token):
    """Plain PyTorch on padding too, as in a model without packing. per_token: arguments with a row a token."""

    def make(arguments):
        padded = peers.Padded(arguments)
        if padded.is_full:
            raise peers.NotApplicable
        wide = {name: padded.rectangle(x) if name in per_token else x for name, x in arguments.items()}
        run = run_of(TABLE[op].plain, wide)
        names = list(floating(arguments))

        def packed(output, gradients):
            rows = [x[padded.mask] if name in per_token else x for name, x in zip(names, gradients)]
            return output[padded.mask], rows

        run.packed, run.unpacked = packed, padded.rectangle
        return run

    return make


def _liger_layer_norm(arguments):
    peers.gpu_library("liger_kernel", arguments)
    from liger_kernel.transformers.functional import liger_layer_norm

    def call(x, weight, bias, residual, dropout_p=0.0, seed=None, offset=0):
        return liger_layer_norm(F.dropout(x, dropout_p) + residual, weight, bias, 1e-12)

    return run_of(call, arguments)


def _flash_attn_layer_norm(arguments):
    peers.gpu_library("flash_attn", arguments)
    from flash_attn.ops.triton.layer_norm import layer_norm_fn

    def call(x, weight, bias, residual, dropout_p=0.0, seed=None, offset=0):
        return layer_norm_fn(x, weight, bias, residual=residual, eps=1e-12, dropout_p=dropout_p)

    return run_of(call, arguments)


def _torch_rms_norm(arguments):
    return run_of(lambda x, weight: F.rms_norm(x, x.shape[-1:], weight, 1e-6), arguments)


def _liger_rms_norm(arguments):
    peers.gpu_library("liger_kernel", arguments)
    from liger_kernel.transformers.functional import liger_rms_norm

    return run_of(lambda x, weight: liger_rms_norm(x, weight, 1e-6), arguments)


PEERS = {
    "layer_norm": {
        "eager, padded": _in_the_rectangle("layer_norm", "x", "residual"),
        "liger": _liger_layer_norm,
        "flash_attn": _flash_attn_layer_norm,
    },
    "bias_gelu": {"eager, padded": _in_the_rectangle("bias_gelu", "x")},
    "rms_norm": {"torch rms_norm": _torch_rms_norm, "liger": _liger_rms_norm},
    "embedding": {
        "eager, padded": _in_the_rectangle("embedding", "input_ids", "position_ids", "token_type_ids"),
    },
    "gelu_layer_norm": {"eager, every token": peers.every_token(TABLE["gelu_layer_norm"].plain, "x")},
    "pooling": {
        "eager": _pooling_eager,
        "compiled": peers.compiled_forward(_pooling_eager),
        "torch segment_reduce": _pooling_segments,
    },
    "vocabulary_max": {
        "eager": _vocabulary_max_eager,
        "compiled": peers.compiled_forward(_vocabulary_max_eager),
    },
}
