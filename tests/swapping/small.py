"""What the tests of the swap share: tiny models of transformers, a batch for them, comparisons, and fresh processes."""

import os
import re
import subprocess
import sys
from pathlib import Path

import torch
import transformers

ROOT = Path(__file__).resolve().parents[2]
SPECIALS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
WORDS = re.findall(r"\S+", "the cat sat on a mat and then it ran far away from that dog . who where is was in by one")
V = len(SPECIALS + WORDS)
S, D = 11, 32
LENGTHS = (11, 4, 7)


def tiny(kind="BertForMaskedLM", **options):
    """A model of random weights in evaluation mode, without dropout. kind: its class, or the name of the class."""
    cls = getattr(transformers, kind) if isinstance(kind, str) else kind
    family = cls.config_class.model_type
    sizes = dict(
        vocab_size=V, hidden_size=D, num_hidden_layers=2, num_attention_heads=4, intermediate_size=37,
        max_position_embeddings=40, num_labels=3, pad_token_id=0, hidden_dropout_prob=0.0, attention_dropout=0.0,
        attention_probs_dropout_prob=0.0, embedding_dropout=0.0, mlp_dropout=0.0, dropout=0.0, embedding_size=D,
        hidden_dim=37,
    )  # fmt: skip
    if family == "modernbert":
        sizes |= dict(bos_token_id=2, eos_token_id=3, cls_token_id=2, sep_token_id=3)
    if family.startswith("deberta"):
        sizes |= dict(relative_attention=True, pos_att_type=["c2p", "p2c"], position_buckets=8)
    torch.manual_seed(0)
    model = cls(cls.config_class(**{**sizes, **options})).eval()
    for parameter in model.parameters():
        # norms keep their weights near 1, so that texts stay apart
        parameter.data += 0.2 * torch.randn_like(parameter)
    return model


def batch(gaps=False):
    """Texts of 11, 4 and 7 tokens. gaps: the second has a padding token in its midst."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(5, V, (len(LENGTHS), S), generator=generator)
    mask = (torch.arange(S) < torch.tensor(LENGTHS)[:, None]).long()
    if gaps:
        mask[1, 2] = 0
    picked = (torch.rand(ids.shape, generator=generator) < 0.4) & mask.bool()
    return dict(input_ids=ids * mask, attention_mask=mask, labels=torch.where(picked, ids, -100))


def is_swapped(module):
    return hasattr(type(module), "replaces")


def logits(model):
    """In evaluation mode, at the real places of `batch()`."""
    inputs = batch()
    return model.eval()(**inputs).logits.detach()[inputs["attention_mask"].bool()]


def gradients(model, inputs=None):
    model.zero_grad()
    model(**(inputs or batch())).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_close(got, expected, where=None, tolerance=1e-5):
    """tolerance: of the largest value, at least 1."""
    got, expected = (x if where is None else x[where] for x in (got, expected))
    assert got.dtype == expected.dtype and got.shape == expected.shape
    assert (got - expected).abs().max() <= tolerance * max(1.0, expected.abs().max().item())


def assert_same_gradients(got, expected, tolerance=1e-5):
    # an embedding without a gradient and one with zeros are the same only to an optimizer without momentum
    assert got.keys() == expected.keys()
    for name, gradient in expected.items():
        assert (got[name] - gradient).abs().max() <= tolerance, name


def start(code, *arguments, **environment):
    """Python code in a fresh process that finds this library."""
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", code, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": path, **environment},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def output(process):
    out, error = process.communicate(timeout=240)
    assert process.returncode == 0, error
    return out.strip()
