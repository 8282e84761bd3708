"""Each op, forward and backward, against what a user would write without fastbert, at BERT-base shapes.

    pytest benchmarks/bench_ops.py                                          a table for each op
    pytest benchmarks/bench_ops.py --benchmark-json new.json                keep it; --benchmark-compare shows change

The batch is 8 sequences of 26 to 128 tokens: 60 % of its padded rectangle. A peer that needs padding gets the
rectangle, which is what it computes in a real model. Every row is checked against the reference before it is timed.
"""

import pytest
import torch
import torch.nn.functional as F

from fastbert import ops, reference

LENGTHS, S, H, K, D, FFN, V = [26, 40, 55, 70, 84, 99, 113, 128], 128, 12, 64, 768, 3072, 30522
B, T = len(LENGTHS), sum(LENGTHS)
PICKED = round(0.15 * T)


def mask_of(device):
    return torch.arange(S, device=device) < torch.tensor(LENGTHS, device=device)[:, None]


def sdpa(q, k, v, cu_seqlens, max_seqlen):
    """torch's own attention on the padded rectangle, with padding in and out: what transformers calls sdpa."""
    mask = mask_of(q.device)
    q, k, v = (x.new_zeros(B, S, H, K).masked_scatter(mask[:, :, None, None], x).transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None, :]).transpose(1, 2)[mask]


def dense_cross_entropy(hidden, weight, bias, labels):
    """Logits of every token, as the heads of transformers make them."""
    return F.cross_entropy(F.linear(hidden, weight, bias), labels, reduction="sum")


def arguments(op, device):
    """What one call takes, by name; weights [V, D] are scaled so that the loss is that of an untrained model."""

    def normal(*shape):
        return torch.randn(*shape, device=device)

    def ids(below):
        return torch.randint(below, (T,), device=device)

    if op == "attention":
        cu_seqlens = torch.tensor([0, *LENGTHS], device=device).cumsum(0).to(torch.int32)
        return dict(q=normal(T, H, K), k=normal(T, H, K), v=normal(T, H, K), cu_seqlens=cu_seqlens, max_seqlen=S)
    if op == "layer_norm":
        return dict(x=normal(T, D), weight=normal(D), bias=normal(D), residual=normal(T, D))
    if op == "bias_gelu":
        return dict(x=normal(T, FFN), bias=normal(FFN))
    if op == "gelu_layer_norm":
        return dict(x=normal(PICKED, D), bias=normal(D), weight=normal(D), ln_bias=normal(D))
    if op == "embedding":
        tables = dict(word=normal(V, D), position=normal(S, D), token_type=normal(2, D))
        places = dict(input_ids=ids(V), position_ids=ids(S), token_type_ids=ids(2))
        return dict(**places, **tables, weight=normal(D), bias=normal(D))
    labels = ids(V).masked_fill_(torch.randperm(T, device=device) >= PICKED, -100)
    return dict(hidden=normal(T, D), weight=0.02 * normal(V, D), bias=normal(V), labels=labels)


PEERS = {
    "attention": {"sdpa, padded": sdpa},
    "layer_norm": {},
    "bias_gelu": {},
    "gelu_layer_norm": {},
    "embedding": {},
    "masked_cross_entropy": {"dense": dense_cross_entropy},
}
# on a CPU without Triton's interpreter, fastbert is its reference: only the peers tell something there
ROWS = [(op, row) for op, peers in PEERS.items() for row in ("fastbert", "reference", *peers)]


@pytest.mark.parametrize(("op", "row"), ROWS, ids=[f"{op}-{row}" for op, row in ROWS])
def test_op(benchmark, device, op, row):
    function = {"fastbert": getattr(ops, op), "reference": getattr(reference, op), **PEERS[op]}[row]
    named = arguments(op, device)
    leaves = [x.requires_grad_() for x in named.values() if torch.is_tensor(x) and x.is_floating_point()]

    def forward(function):
        result = function(**named)
        return result[0] if isinstance(result, tuple) else result

    def both():
        output = forward(function)
        torch.autograd.grad(output, leaves, torch.ones_like(output))
        if device.type == "cuda":
            torch.cuda.synchronize()

    torch.testing.assert_close(forward(function), forward(getattr(reference, op)), rtol=1e-4, atol=1e-4)
    benchmark.group = op
    benchmark.extra_info.update(device=device.type, tokens=T, padded_tokens=B * S)
    benchmark.pedantic(both, rounds=10, warmup_rounds=2)
