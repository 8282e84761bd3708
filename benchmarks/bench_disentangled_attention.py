"""DeBERTa's attention: fastbert's op against transformers' eager DisentangledSelfAttention (DeBERTa v2 and v3).

    python benchmarks/bench_disentangled_attention.py                      4 sequences of 64, 128, 256 and 512 tokens
    python benchmarks/bench_disentangled_attention.py --dtype bfloat16     on a GPU
    python benchmarks/bench_disentangled_attention.py --lengths 128 --dropout 0.1

DeBERTa-base: 12 heads of 64, 256 buckets over 512 positions, both position terms. Only attention is timed: the module's
projections are replaced by their results, the same tensors that fastbert's op gets. Each length twice, without padding
and with 60 % of the padded rectangle filled. Both results are compared before any clock starts. Calls alternate (A B,
B A, A B, ...) in one process, so that whatever else the machine does falls on both alike. Runs on the GPU if there is
one, else on the CPU, where fastbert is its reference implementation.
"""

import argparse
import json
import os
import statistics
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ["HF_HUB_OFFLINE"] = "1"

from transformers import DebertaV2Config  # noqa: E402
from transformers.models.deberta_v2.modeling_deberta_v2 import (  # noqa: E402
    DisentangledSelfAttention,
    build_relative_position,
)

from fastbert import ops  # noqa: E402

H, K, BUCKETS, POSITIONS = 12, 64, 256, 512


class Given(torch.nn.Module):
    """Stands for a projection whose result is known."""

    def __init__(self, result):
        super().__init__()
        self.result = result

    def forward(self, _):
        return self.result


def calls(S, fill, sequences, dtype, dropout_p, device):
    """name -> (function that returns the real rows of attention's output, the tensors it depends on)."""
    lengths = torch.full((sequences,), S)
    if fill < 1.0:
        lengths = (S * torch.linspace(2 * fill - 1, 1.0, sequences)).round().long()
    is_token = (torch.arange(S) < lengths[:, None]).to(device)
    padded = [torch.randn(sequences, S, H * K, device=device, dtype=dtype).requires_grad_() for _ in range(3)]
    packed = [x.detach()[is_token].unflatten(-1, (H, K)).requires_grad_() for x in padded]
    tables = [torch.randn(2 * BUCKETS, H, K, device=device, dtype=dtype).requires_grad_() for _ in range(2)]

    config = DebertaV2Config(
        hidden_size=H * K, num_attention_heads=H, relative_attention=True, pos_att_type=["c2p", "p2c"],
        position_buckets=BUCKETS, max_relative_positions=POSITIONS, attention_probs_dropout_prob=dropout_p,
    )  # fmt: skip
    module = DisentangledSelfAttention(config).to(device)
    for name, result in zip(("query_proj", "key_proj", "value_proj"), padded):
        setattr(module, name, Given(result))
    for name, table in zip(("pos_key_proj", "pos_query_proj"), tables):
        setattr(module, name, Given(table.view(1, 2 * BUCKETS, H * K)))
    # what the encoder makes once for all layers
    positions = build_relative_position(padded[0], padded[0], BUCKETS, POSITIONS)
    mask = (is_token[:, None, :] & is_token[:, :, None])[:, None]
    embeddings = torch.empty(2 * BUCKETS, 0, device=device)
    cu_seqlens = torch.cat((torch.zeros(1, dtype=torch.int64), lengths.cumsum(0))).to(device, torch.int32)
    seed = torch.tensor([7], device=device)

    def theirs():
        return module(padded[0], mask, relative_pos=positions, rel_embeddings=embeddings)[0]

    def ours():
        return ops.disentangled_attention(
            *packed, *tables, cu_seqlens, S, position_buckets=BUCKETS, max_relative_positions=POSITIONS,
            dropout_p=dropout_p, seed=seed,
        )  # fmt: skip

    if dropout_p == 0.0:
        tolerance = 1e-4 if dtype == torch.float32 else 5e-2
        torch.testing.assert_close(ours().flatten(1), theirs()[is_token], rtol=tolerance, atol=tolerance)
    return {"fastbert": (ours, packed + tables), "transformers": (theirs, padded + tables)}, int(lengths.sum())


def seconds(function, leaves, with_backward, device):
    start = time.perf_counter()
    with torch.set_grad_enabled(with_backward):
        out = function()
    if with_backward:
        torch.autograd.grad(out, leaves, torch.ones_like(out))
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[64, 128, 256, 512])
    parser.add_argument("--sequences", type=int, default=4)
    parser.add_argument("--dtype", choices=["float32", "float16", "bfloat16"], default="float32")
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--json", type=Path, help="also write the rows here")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows = []
    print(f"{device.type}, {options.dtype}, {options.sequences} sequences, dropout {options.dropout}; median ms")
    print(f"{'length':>6} {'fill':>5} {'pass':>9} {'fastbert':>9} {'transformers':>13} {'ratio':>6}")
    for S in options.lengths:
        for fill in (1.0, 0.6):
            pair, tokens = calls(S, fill, options.sequences, getattr(torch, options.dtype), options.dropout, device)
            for with_backward in (False, True):
                times = {name: [] for name in pair}
                for i in range(options.rounds + 2):
                    for name in sorted(pair, reverse=i % 2 == 1):
                        times[name].append(seconds(*pair[name], with_backward, device))
                ms = {name: 1000 * statistics.median(values[2:]) for name, values in times.items()}
                row = dict(length=S, fill=fill, tokens=tokens, backward=with_backward, **ms)
                rows.append(row)
                print(
                    f"{S:6d} {fill:5.0%} {'both' if with_backward else 'forward':>9} {ms['fastbert']:9.2f} "
                    f"{ms['transformers']:13.2f} {ms['transformers'] / ms['fastbert']:6.2f}"
                )
    if options.json:
        about = dict(device=device.type, dtype=options.dtype, torch=torch.__version__, threads=torch.get_num_threads())
        options.json.write_text(json.dumps(dict(about=about, rows=rows), indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
