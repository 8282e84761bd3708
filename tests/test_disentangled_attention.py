"""DeBERTa's attention: the reference against transformers' modules, the kernels against the reference."""

import pytest
import torch

from fastbert import reference

H, K = 2, 8
D = H * K


def theirs_v1(lengths, types, max_relative_positions, **_):
    """transformers' module of DeBERTa v1, and the arguments after q, k, v that mean the same."""
    from transformers import DebertaConfig
    from transformers.models.deberta.modeling_deberta import DisentangledSelfAttention

    config = DebertaConfig(
        hidden_size=D, num_attention_heads=H, pos_att_type=types, relative_attention=True,
        max_relative_positions=max_relative_positions, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return DisentangledSelfAttention(config)


def theirs_v2(lengths, types, max_relative_positions, position_buckets, share_att_key):
    from transformers import DebertaV2Config
    from transformers.models.deberta_v2.modeling_deberta_v2 import DisentangledSelfAttention

    config = DebertaV2Config(
        hidden_size=D, num_attention_heads=H, pos_att_type=types, relative_attention=True,
        max_relative_positions=max_relative_positions, position_buckets=position_buckets, share_att_key=share_att_key,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return DisentangledSelfAttention(config)


def projected(module, x, embeddings):
    """q, k, v [T, H, K] of packed x [T, D], and both tables [2 * span, H, K], by a module's own parameters."""
    if hasattr(module, "in_proj"):
        q, k, v = module.in_proj(x).unflatten(-1, (H, 3 * K)).chunk(3, -1)
        q, v = q + module.q_bias.view(H, K), v + module.v_bias.view(H, K)
        project_key, project_query = getattr(module, "pos_proj", None), getattr(module, "pos_q_proj", None)
    else:
        q, k, v = (f(x).unflatten(-1, (H, K)) for f in (module.query_proj, module.key_proj, module.value_proj))
        project_key, project_query = getattr(module, "pos_key_proj", None), getattr(module, "pos_query_proj", None)
        if module.share_att_key:
            project_key, project_query = module.key_proj, module.query_proj
    project_key = project_key if "c2p" in module.pos_att_type else None
    project_query = project_query if "p2c" in module.pos_att_type else None
    tables = [f and f(embeddings).unflatten(-1, (H, K)) for f in (project_key, project_query)]
    return q, k, v, *tables


@pytest.mark.parametrize("types", [["c2p", "p2c"], ["c2p"], ["p2c"]], ids="-".join)
@pytest.mark.parametrize(
    "version, options",
    [
        ("v1", dict(max_relative_positions=512)),
        ("v1", dict(max_relative_positions=9)),
        ("v2", dict(max_relative_positions=64, position_buckets=-1, share_att_key=False)),
        ("v2", dict(max_relative_positions=512, position_buckets=256, share_att_key=True)),
        ("v2", dict(max_relative_positions=40, position_buckets=8, share_att_key=True)),
        ("v2", dict(max_relative_positions=30, position_buckets=16, share_att_key=False)),
    ],
    ids=["v1", "v1-clamped", "v2-no-buckets", "v3", "log buckets", "log buckets, clamped"],
)
def test_transformers_gives_the_same(version, options, types):
    """Values and the gradients of all parameters, of x and of the position embeddings, on a padded batch."""
    lengths = [1, 17, 50, 133] if options["max_relative_positions"] < 512 else [40, 3]
    module = {"v1": theirs_v1, "v2": theirs_v2}[version](lengths, types, **options)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    buckets = options.get("position_buckets", 0)
    span = buckets if buckets > 0 else options["max_relative_positions"]
    B, S = len(lengths), max(lengths)
    is_token = torch.arange(S) < torch.tensor(lengths)[:, None]
    x, embeddings = torch.randn(sum(lengths), D), torch.randn(2 * span, D)
    dout = torch.randn(sum(lengths), D)

    def run(ours):
        leaves = [x.clone().requires_grad_(), embeddings.clone().requires_grad_()]
        if ours:
            cu_seqlens = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
            out = reference.disentangled_attention(
                *projected(module, *leaves), cu_seqlens, S, position_buckets=buckets,
                max_relative_positions=options["max_relative_positions"],
            ).flatten(1)  # fmt: skip
        else:
            padded = torch.zeros(B, S, D).masked_scatter(is_token[..., None], leaves[0])
            mask = (is_token[:, None, :] & is_token[:, :, None])[:, None]
            positions = relative_positions(module, S)
            out = module(padded, mask, relative_pos=positions, rel_embeddings=leaves[1])[0][is_token]
        parameters = list(module.parameters())
        grads = torch.autograd.grad(out, leaves + parameters, dout, allow_unused=True)
        return out, *(torch.zeros_like(p) if g is None else g for p, g in zip(leaves + parameters, grads))

    for got, want in zip(run(True), run(False), strict=True):
        assert (got - want).abs().max() <= 1e-5 * max(1.0, want.abs().max().item())


def relative_positions(module, S):
    """What transformers' encoders hand to every layer."""
    if hasattr(module, "in_proj"):
        from transformers.models.deberta.modeling_deberta import build_relative_position

        return build_relative_position(torch.empty(S, 1), torch.empty(S, 1))
    from transformers.models.deberta_v2.modeling_deberta_v2 import build_relative_position

    return build_relative_position(
        torch.empty(S, 1), torch.empty(S, 1), module.position_buckets, module.max_relative_positions
    )


@pytest.mark.parametrize("buckets", [4, 8, 32, 50, 256])
@pytest.mark.parametrize("max_relative_positions", [30, 128, 512, 1024])
def test_buckets_are_those_of_transformers(buckets, max_relative_positions):
    from transformers.models.deberta_v2.modeling_deberta_v2 import build_relative_position

    if max_relative_positions <= buckets:
        pytest.skip("fewer positions than buckets")
    S = 700
    table = torch.empty(S, 1)
    want = build_relative_position(table, table, buckets, max_relative_positions)[0] + buckets
    got = reference.relative_index(S, buckets, max_relative_positions)
    positions = torch.arange(S)
    assert torch.equal(got[positions[:, None] - positions + S - 1], want.clamp(0, 2 * buckets - 1))
