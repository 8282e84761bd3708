"""vocabulary_max: kernels and CPU against the reference in float64, the reference against the formula and
sentence-transformers; what is in memory.

Strides and dtypes: in the tests of all ops.
"""

import pytest
import torch
from allocations import allocations
from helpers import IMPLEMENTATIONS, assert_op_within_budget, cu_seqlens_of

from fastbert import ops, reference
from fastbert.cpu import ops as cpu
from fastbert.cpu import vocabulary_max as cpu_file
from fastbert.kernels.vocabulary_max import vocabulary_max

pytestmark = pytest.mark.usefixtures("poison")
all_ops = pytest.mark.parametrize(
    "op", [vocabulary_max, cpu.vocabulary_max, reference.vocabulary_max], ids=["kernel", "cpu", "reference"]
)
SLACK = 3


def make(lengths, D, V, device, dtype=torch.float32, bias=True):
    """The arguments of a call; rows past the last sequence; two tokens that are equal, so that their logits tie."""
    hidden, weight = torch.randn(sum(lengths) + SLACK, D), torch.randn(V, D) / D**0.5
    hidden[1:2] = hidden[:1]
    bias = torch.randn(V).to(device, dtype) if bias else None
    return hidden.to(device, dtype), weight.to(device, dtype), bias, cu_seqlens_of(lengths, device), max([*lengths, 0])


@pytest.mark.parametrize("bias", [True, False], ids=["bias", ""])
@pytest.mark.parametrize("lengths", [[5, 0, 1, 70, 13], [0, 0, 3, 0], []], ids=str)
def test_values_and_gradients(lengths, bias, device):
    assert_op_within_budget(vocabulary_max, *make(lengths, 37, 150, device, bias=bias))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision(dtype, device):
    assert_op_within_budget(vocabulary_max, *make([9, 0, 33], 96, 70, device, dtype))


@pytest.mark.parametrize("D, V", [(1, 1), (144, 65)])
def test_widths(D, V, device, monkeypatch):
    monkeypatch.setattr(cpu_file, "WORDS", 16)
    assert_op_within_budget(vocabulary_max, *make([5, 1], D, V, device))


@all_ops
def test_the_formula_of_sentence_transformers(op, device):
    """SpladePooling of masked logits: padding never wins, even where every logit of a text is negative."""
    pooling = pytest.importorskip("sentence_transformers.sparse_encoder.modules").SpladePooling()
    hidden, weight, bias, cu_seqlens, longest = make([3, 4], 8, 20, device)
    hidden[3:7] = hidden[3:4]
    bias[10:] = -50.0
    logits, mask = torch.full((2, 4, 20), 9.0, device=device), torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]], device=device)
    logits[mask.bool()] = hidden[:7] @ weight.T + bias
    wanted = pooling({"token_embeddings": logits, "attention_mask": mask})["sentence_embedding"]
    found = op(hidden, weight, bias, cu_seqlens, longest)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
    assert (found[:, 10:] == 0).all() and (found[:, :10] > 0).any()


@all_ops
def test_a_broken_hidden_state_is_seen(op, device):
    """NaN in one token makes its text's weights not finite, and no other's."""
    arguments = make([3, 4], 8, 20, device)
    arguments[0][1, 2] = float("nan")
    found = op(*arguments)
    assert not found[0].isfinite().any() and found[1].isfinite().all()


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_wrong_shapes_are_refused(impl, device):
    hidden, weight, bias, cu_seqlens, longest = make([3, 4], 8, 20, device)
    for arguments, said in (
        ((hidden, weight[:, 1:], bias, cu_seqlens, longest), r"weight has shape \[20, 7\]: expected \[20, 8\]"),
        ((hidden, weight, bias[1:], cu_seqlens, longest), r"bias has shape \[19\]"),
        ((hidden, weight, bias, cu_seqlens, 2), "max_seqlen is 2: expected at least 4"),
    ):
        with pytest.raises(ValueError, match=said):
            ops.vocabulary_max(*arguments, impl=impl)


def test_the_logits_are_never_in_memory(monkeypatch):
    """Forward and backward on a CPU: a block of words, and a few numbers for each text and word."""
    monkeypatch.setattr(cpu_file, "WORDS", 50)
    hidden, weight, bias, cu_seqlens, longest = make([40, 60, 50], 2, 1000, "cpu")
    # the gradient of the weight multiplies a sparse matrix, which cannot be counted
    leaves = [x.requires_grad_() for x in (hidden, bias)]
    counted, _ = allocations(
        lambda: torch.autograd.grad(ops.vocabulary_max(hidden, weight, bias, cu_seqlens, longest).sum(), leaves),
        hidden,
        weight,
        bias,
    )
    # int64 [150], the numbers of a maximum, beside the block
    assert counted.largest <= 50 * 150 * 4 < 150 * 1000 * 4 / 10
