"""What a user could call instead of each op: plain PyTorch, PyTorch's own fused functions, other libraries.

A variant is a function from a case's Arguments to a Run (fastbert/proof/op_cases.py), in the strongest setting that was
found for it (README.md lists those). It raises Unavailable, with the reason, where it cannot be had, and NotApplicable
where it would be another one over again. peers.py has what they share, and three files the variants by subject.
"""

import contextlib
from importlib import metadata

import peers
import peers_attention
import peers_cross_entropy
import peers_rows
import record

from fastbert import ops
from fastbert.proof.op_cases import TABLE, run_of

PEERS = peers_attention.PEERS | peers_rows.PEERS | peers_cross_entropy.PEERS


# what the variants import, by the names that they are installed by
LIBRARIES = (
    "cut-cross-entropy", "disentangled-flash", "flash-attn", "flash-attn-3", "flash-attn-4", "flashdeberta",
    "liger-kernel", "quack-kernels", "xformers",
)  # fmt: skip


def installed():
    """{library: version} of those that are there."""
    found = {}
    for name in LIBRARIES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def variants(op):
    """{name: function from a case's Arguments to a Run}, fastbert first. It may raise Unavailable or NotApplicable."""
    plain = TABLE[op].plain
    return {
        "fastbert": lambda arguments: run_of(getattr(ops, op), arguments),
        "eager": lambda arguments: run_of(plain, arguments),
        "compiled": lambda arguments: run_of(peers.compiled(plain), arguments),
        # the attentions and pooling have their own of both, on the rectangle
        **PEERS.get(op, {}),
    }


def build(make, arguments):
    """The variant's Run; Unavailable, with the reason, where it cannot be had."""
    try:
        return make(arguments)
    except ImportError as error:
        raise peers.Unavailable(f"not installed ({error})") from error
    except (RuntimeError, AttributeError, TypeError) as error:
        raise peers.Unavailable(record.line_of(error)) from error
