"""The data path: text to tokens against the tokenizers library alone, and the loader against what a model consumes.

    python benchmarks/bench_data.py                         under a minute on two cores
    python benchmarks/bench_data.py --quick                 less text, a small model: does it run?

prepare     text files to shards on disk, against the tokenizers library alone on the same lines in memory, on all
            cores, in batches. `prepare` also reads, splits sentences, checks and writes. Both must give the same
            tokens. The ratio can be 1 at best.
loader      masked, packed batches for each objective, one thread, against the training step of a model. The loader must
            never be the bottleneck.
in a run    steps with the loader working beside them, against the same steps on batches that are in memory.

The text is that of benchmarks/demo.py. On a CPU the model is small, so it consumes tokens fast; on a GPU it is
BERT-base in bfloat16. Rounds take turns. Writes data.json; benchmarks/report.py shows it.
"""

import functools
import os
import shutil
import statistics
import tempfile
import time
from itertools import islice
from pathlib import Path
from unittest import mock

import demo
import machine
import numpy as np
import record
import tables
import torch

import fastbert
from fastbert.data.batches import MaskedBatches
from fastbert.data.sequences import OBJECTIVES
from fastbert.data.shards import Shards, prepare
from fastbert.data.tokenizer import train_wordpiece
from fastbert.model.heads import MaskedLM
from fastbert.training import optim
from fastbert.training.step_sums import accumulate

# lines in a batch for the tokenizers library: faster than 5,000, and than all at once
BATCH = 1000


def row_of(name, tokens, seconds, against, other_tokens, other_seconds):
    """A row: the median rates of both, and the first's over the second's."""
    ours, theirs = (round(n / statistics.median(s)) for n, s in ((tokens, seconds), (other_tokens, other_seconds)))
    who = "fastbert" if name == "prepare" else name
    return {
        "name": name, "tokens": tokens, "tokens_per_s": ours, "against": against, "against_tokens": other_tokens,
        "against_tokens_per_s": theirs, "ratio": round(ours / theirs, 3),
        "seconds": record.rounded({who: seconds, against: other_seconds}, 5),
    }  # fmt: skip


def timed(call):
    start = time.perf_counter()
    result = call()
    return time.perf_counter() - start, result


def prepare_row(files, tokenizer, work, rounds):
    """`prepare` against `encode_batch_fast` on the same lines in memory."""
    lines = [line for file in files for line in file.read_text(encoding="utf-8").split("\n") if line.strip()]
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True

    def alone():
        # the library uses all cores by itself; all lines in one batch take longer
        return [
            encoding.ids
            for start in range(0, len(lines), BATCH)
            for encoding in tokenizer.encode_batch_fast(lines[start : start + BATCH], add_special_tokens=False)
        ]

    def ours(round_):
        return prepare(files, tokenizer, work / f"shards-{round_}", progress=False)

    with mock.patch.dict(os.environ, TOKENIZERS_PARALLELISM="true"):
        ids, manifest = alone(), ours("first")
        shards = Shards.open(work / "shards-first")
        if not np.array_equal(np.concatenate(shards.tokens), np.concatenate(ids)):
            raise AssertionError("prepare and the tokenizers library give different tokens")
        del ids
        seconds, other = [], []
        for i in range(rounds):
            calls = [(seconds, functools.partial(ours, i)), (other, alone)]
            for times, call in calls[:: -1 if i % 2 else 1]:
                times.append(timed(call)[0])
            shutil.rmtree(work / f"shards-{i}")
    tokens = manifest["tokens"]
    row = row_of("prepare", tokens, seconds, "tokenizers alone", tokens, other)
    return row | {"text_mb": round(sum(file.stat().st_size for file in files) / 1e6, 2)}, shards


class Eater:
    """A model that trains on packed batches, as `pretrain` does."""

    def __init__(self, config, device, bf16):
        torch.manual_seed(0)
        self.device, self.bf16 = device, bf16
        self.model = MaskedLM(config).to(device).train()
        self.optimizer = optim.adamw(
            self.model, learning_rate=1e-4, weight_decay=0.01, betas=(0.9, 0.98), epsilon=1e-6
        )  # fmt: skip

    def eat(self, batches):
        """Steps over batches; how many tokens they had. Ends when the device has done them."""
        tokens = 0
        for batch in batches:
            batch.seed = torch.tensor([1])
            tokens += accumulate(self.model, [batch], bf16=self.bf16)["tokens"]
            optim.clip_gradients(self.model.parameters(), 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return tokens


def loader_of(shards, length, tokens, objective="mlm", workers=1, **options):
    return MaskedBatches(
        shards, max_seq_length=length, tokens_per_batch=tokens, objective=objective, capacity=True, num_workers=workers,
        **options,
    )  # fmt: skip


def drained(loader, count):
    """(seconds for the next `count` batches of an epoch, their tokens)."""
    seconds, batches = timed(lambda: list(islice(loader.epoch(1), count)))
    return seconds, sum(int(batch.cu_seqlens[-1]) for batch in batches)


def loader_rows(shards, device, rounds, quick):
    """The loader of each objective against the model, then the model with and without the loader beside it."""
    if device.type == "cuda":
        preset, length, tokens, count, bf16 = "bert-base", 128, 65536, 12, True
    else:
        preset, length, tokens, count, bf16 = "bert-mini", 128, 8192, 4, demo.bf16_is_faster()
    if quick:
        preset, tokens, count = "bert-tiny", 1024, 2
    config = fastbert.preset(preset).replace(vocab_size=shards.manifest["vocab_size"])
    eater = Eater(config, device, bf16)
    what = f"{preset}, training in {'bf16' if bf16 else 'fp32'}"
    loader = loader_of(shards, length, tokens)
    count = min(count, loader.num_batches(0), loader.num_batches(1))
    kept = list(islice(loader.epoch(0), count))
    eater.eat(kept[:2])
    kinds = {"loader, mlm": {}, "loader, mlm, whole words": {"whole_word_mask": True}}
    kinds |= {f"loader, {objective}": {"objective": objective} for objective in OBJECTIVES if objective != "mlm"}
    loaders = {name: loader_of(shards, length, tokens, **options) for name, options in kinds.items()}
    for one in loaders.values():
        # plans the epoch, and warms up
        drained(one, 1)
    trained, beside, made = [], [], {name: [] for name in loaders}
    made_tokens = {}
    for _ in range(rounds):
        trained.append(timed(lambda: eater.eat(kept))[0])
        beside.append(timed(lambda: eater.eat(islice(loader.epoch(0), count)))[0])
        for name, one in loaders.items():
            # many batches, because the loader's thread is slow to start
            number = min(4 * count, one.num_batches(1))
            seconds, made_tokens[name] = drained(one, number)
            made[name].append(seconds)
    real = sum(int(batch.cu_seqlens[-1]) for batch in kept)
    rows = [row_of(name, made_tokens[name], made[name], what, real, trained) for name in loaders]
    rows.append(row_of(f"{what}, with the loader beside it", real, beside, "batches in memory", real, trained))
    return rows


def main(arguments=None):
    parser = machine.parser(__doc__)
    parser.add_argument("--rounds", type=int, help="default: 5, with --quick 2")
    parser.add_argument("--quick", action="store_true", help="little text, a small model: does it run?")
    options = parser.parse_args(arguments)
    device = machine.device()
    file = (options.output or machine.folder(device)) / "data.json"
    rounds = options.rounds or (2 if options.quick else 5)
    pieces = 500 if options.quick else 16000
    result = record.new(device, {"rounds": rounds, "quick": options.quick, "pieces": pieces})
    with tempfile.TemporaryDirectory() as directory:
        work = Path(directory)
        demo.write_text(work / "text")
        files = sorted((work / "text").glob("*.txt"))
        if options.quick:
            for text in files:
                text.write_text(text.read_text(encoding="utf-8")[:60_000], encoding="utf-8")
        tokenizer = train_wordpiece(files, pieces)
        row, shards = prepare_row(files, tokenizer, work, rounds)
        result["rows"] = [row, *loader_rows(shards, device, rounds, options.quick)]
    record.save(result, file)
    print(f"{tables.data_table(result)}\n\n{tables.data_line(result)}\nwritten to {file}")


if __name__ == "__main__":
    main()
