"""Small labelled files, and a small model to fine-tune on them."""

import csv
import json
import random

import torch

from fastbert.data.tokenizer import load_tokenizer, save_tokenizer, train_wordpiece, vocabulary_size
from fastbert.model.config import EncoderConfig
from fastbert.model.heads import MaskedLM

WORDS = {
    "cat": "chases mice in dark barns", "dog": "guards sheep on green hills", "bird": "builds nests among tall trees",
}  # fmt: skip


def sentences(count, seed=0):
    """(text, label): the label is the animal of the words, not the one that is named."""
    draw = random.Random(seed)
    names = [*WORDS]
    found = []
    for number in range(count):
        label = draw.choice(names)
        found.append((f"in year {number} the {draw.choice(names)} {WORDS[label]} every day", label))
    return found


def write_csv(path, rows, header=("text", "label")):
    with open(path, "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    return path


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def small_encoder(place, **changes):
    """A directory with a random masked-LM model and its tokenizer."""
    (place / "text.txt").write_text("\n".join(text for text, _ in sentences(300)))
    tokenizer = train_wordpiece([str(place / "text.txt")], 140, progress=False)
    torch.manual_seed(1)
    config = EncoderConfig(**{
        "vocab_size": vocabulary_size(tokenizer), "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
        "intermediate_size": 64, "max_position_embeddings": 64, **changes,
    })  # fmt: skip
    MaskedLM(config).save_pretrained(place / "encoder")
    save_tokenizer(tokenizer, place / "encoder")
    return place / "encoder"


def tokenizer_of(place):
    return load_tokenizer(place / "encoder")


def losses_of(model, loss, steps):
    """The losses of so many steps of AdamW, each from a call of loss()."""
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=1e-3), []
    for _ in range(steps):
        value = loss()
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        losses.append(value.item())
    return losses
