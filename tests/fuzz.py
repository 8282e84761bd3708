"""Hostile inputs for every reader: `python tests/fuzz.py`.

    python tests/fuzz.py                             1,000 inputs for each reader
    python tests/fuzz.py configs --count 100         some readers, fewer inputs
    python tests/fuzz.py texts --only 17             one input again, with its traceback

A reader takes an input or refuses it, in time, by a ValueError or OSError of its own: that is what the command line
prints as one line with exit code 2. Anything else is a finding: another exception, which a user sees as a traceback; an
exception of Python or a library passed on as it is, which names no file; several lines; a hang; a process that dies. An
input is a function of the reader, the seed and its number. Readers work in processes of their own, whose memory is
limited.
"""

import argparse
import json
import os
import random
import re
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

from damage import mutate_bytes, mutate_file

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), *(str(ROOT / "tests" / wing) for wing in ("training", "data"))]

# seconds for one input on a busy machine, and for a process to start; bytes of memory beyond those of the libraries
LIMIT, START, MEMORY = 20, 120, 3 << 30

# ---------------------------------------------------------------------------------------------------------------------
# readers: a function that makes what it mutates, once in a folder, and one that reads an input there

TEXT = {
    "a.txt": "In the beginning.\nThe earth was without form.\n\nAnd the evening was the first day.\n" * 5,
    "a.jsonl": "".join(json.dumps({"text": f"document {i}\nwith two lines", "id": i}) + "\n" for i in range(9)),
    "a.csv": "id,text\n" + "".join(f'{i},"document {i}, ""quoted""\nand a line"\n' for i in range(9)),
}
ENCODINGS = ("utf-16", "gbk", "utf-8-sig")


def make_texts(folder):
    import gzip

    for i, (name, text) in enumerate(TEXT.items()):
        (folder / name).write_text(text, encoding="utf-8")
        (folder / f"{i}-{name}").write_text(f"{text}Zürich 東京\n", encoding=ENCODINGS[i])
        (folder / f"{name}.gz").write_bytes(gzip.compress(text.encode()))
    try:
        import pyarrow
        from pyarrow import parquet

        parquet.write_table(pyarrow.table({"id": [1, 2], "text": ["one document", "two\nlines"]}), folder / "a.parquet")
    except ImportError:
        pass


def read_texts(folder, draw):
    from fastbert.data.text import LAYOUTS, check_columns, expand, read_documents

    path = draw.choice(sorted(folder.iterdir()))
    path.write_bytes(mutate_bytes(path.read_bytes(), draw))
    files = expand([draw.choice((path, folder))])
    column = draw.choice(("text", "text", "text", "id", "", "nothing"))
    check_columns(files, column)
    for document in read_documents(files, text_column=column, layout=draw.choice(LAYOUTS)):
        assert document and all(isinstance(line, str) and line.strip() == line != "" for line in document)


# one of each family
PRESETS = (
    "bert-base", "roberta-base", "albert-base-v2", "electra-base", "distilbert-base", "mpnet-base", "deberta-base",
    "deberta-v3-base", "modernbert-base",
)  # fmt: skip
TINY = dict(vocab_size=40, hidden_size=16, num_attention_heads=2, intermediate_size=24, max_position_embeddings=20)


def tiny(preset):
    """The EncoderConfig of a preset with one layer and few columns."""
    import fastbert

    config = fastbert.preset(preset)
    sizes = {name: value[:1] for name in ("windows", "rope_thetas") if (value := getattr(config, name))}
    sizes |= {name: 4 for name in ("position_buckets", "max_relative_positions") if getattr(config, name) > 0}
    sizes["embedding_size"] = 12 if config.embedding_size else None
    return config.replace(num_hidden_layers=1, pad_token_id=0, **TINY, **sizes)


def make_configs(folder):
    import torch

    import fastbert

    for preset in PRESETS:
        fastbert.MaskedLM(tiny(preset)).save_pretrained(folder / preset)
    # one as a pickle
    place = folder / PRESETS[0]
    torch.save(fastbert.MaskedLM.from_pretrained(place).state_dict(), place / "pytorch_model.bin")
    (place / "model.safetensors").unlink()


def read_configs(folder, draw):
    import fastbert
    from fastbert.model.convert import load_by_architecture

    place = folder / draw.choice(PRESETS)
    other = [path for path in place.iterdir() if path.name != "config.json"]
    mutate_file(place / "config.json" if draw.random() < 0.8 else draw.choice(other), draw)
    if draw.random() < 0.7:
        draw.choice((fastbert.MaskedLM, fastbert.SequenceClassifier)).from_pretrained(place, allow_pickle=True)
    else:
        load_by_architecture(place)


def make_modules(folder):
    from corpus import small_tokenizer
    from safetensors.torch import load_file, save_file

    import fastbert

    tokenizer = small_tokenizer(folder)
    config = tiny("bert-base").replace(vocab_size=tokenizer.get_vocab_size())
    dense = [(16, 12, True, "ReLU", True), "Normalize", (12, 8, False, "Identity")]
    place = folder / "model"
    fastbert.SentenceEmbedder(
        config, tokenizer, prompts={"query": "query : "}, token_dense=[(16, 16, True, "Tanh")], dense=dense,
        truncate_dim=4, normalize=True,
    ).save_pretrained(place)  # fmt: skip
    settings = place / "sentence_bert_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {
        "config_kwargs": {"num_hidden_layers": 1}, "processor_kwargs": {"truncation_side": "left"}, "model_kwargs": {},
        "modality_config": {"text": {"method": "forward", "method_output_name": "last_hidden_state"}},
    }))  # fmt: skip
    # in two shards
    tensors, shards = load_file(place / "model.safetensors"), {}
    for i in range(2):
        part = dict([*tensors.items()][i::2])
        save_file(part, place / f"shard-{i}.safetensors")
        shards |= dict.fromkeys(part, f"shard-{i}.safetensors")
    (place / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": shards}))
    (place / "model.safetensors").unlink()


def read_modules(folder, draw):
    import fastbert

    files = [path for path in sorted((folder / "model").rglob("*")) if path.is_file()]
    small = [path for path in files if path.name != "tokenizer.json" and path.suffix == ".json"]
    for _ in range(draw.choice((1, 1, 2))):
        path = draw.choice(small if draw.random() < 0.8 else files)
        if path.is_file():
            mutate_file(path, draw)
    model = fastbert.SentenceEmbedder.from_pretrained(folder / "model")
    if model.tokenizer is not None:
        vectors = model.encode(["baba dede.", "", "fifi " * 40])
        assert len(vectors) == 3


def make_manifests(folder):
    from corpus import make_documents, small_tokenizer, write_text

    from fastbert.data.shards import prepare
    from fastbert.model.hf_files import config_to_hf
    from fastbert.training.pretrain import pretrain

    tokenizer = small_tokenizer(folder)
    prepare([write_text(folder / "text.txt", make_documents(30))], tokenizer, folder / "shards", progress=False)
    config = tiny("bert-base").replace(vocab_size=tokenizer.get_vocab_size())
    (folder / "model.json").write_text(json.dumps(config_to_hf(config)))
    pretrain(run_of(folder, output_dir=str(folder / "run"), max_steps=2, save_steps=1))
    for name in ("metrics.jsonl", "README.md"):
        (folder / "run" / name).unlink(missing_ok=True)
    shutil.rmtree(folder / "run" / "tensorboard", ignore_errors=True)


def run_of(folder, **options):
    from fastbert.training.pretrain import PretrainConfig

    return PretrainConfig(
        train_file=str(folder / "shards"), model=str(folder / "model.json"), max_seq_length=16, tokens_per_batch=64,
        eval_share=0.0, num_workers=1, **options,
    )  # fmt: skip


def read_manifests(folder, draw):
    import hostile_runs

    from fastbert.data.batches import MaskedBatches
    from fastbert.data.shards import Shards
    from fastbert.files import MANIFEST
    from fastbert.training import checkpoint
    from fastbert.training.pretrain import pretrain

    kind = draw.random()
    if kind < 0.5:
        files = sorted((folder / "shards").iterdir())
        mutate_file(folder / "shards" / "manifest.json" if draw.random() < 0.7 else draw.choice(files), draw)
        # as every run opens them
        shards = Shards.open(folder / "shards", verify=True)
        next(MaskedBatches(shards, max_seq_length=16, tokens_per_batch=64, num_workers=1).epoch(0), None)
        return
    newest = max((folder / "run").glob("checkpoint-*"))
    files = [path for path in sorted(newest.rglob("*")) if path.is_file()]
    chosen = draw.choice(files if draw.random() < 0.2 else [newest / checkpoint.STATE, newest / MANIFEST])
    if chosen.name == MANIFEST and draw.random() < 0.5:
        chosen.write_text(next(hostile_runs.manifests(draw, newest)), encoding="utf-8")
    elif chosen.name == checkpoint.STATE and draw.random() < 0.5:
        state = json.loads(chosen.read_text(encoding="utf-8"))
        chosen.write_text(json.dumps(next(hostile_runs.states(draw, state))), encoding="utf-8")
    else:
        mutate_file(chosen, draw)
    if chosen.name != MANIFEST and draw.random() < 0.7:
        # what follows the checksums
        checkpoint.write_manifest(newest)
    if kind < 0.9:
        found = checkpoint.to_resume(folder / "run", True)
        checkpoint.read_state(found)
    else:
        pretrain(run_of(folder, output_dir=str(folder / "run"), max_steps=3, save_steps=10, resume=True))


def make_commands(folder):
    make_manifests(folder)
    (folder / "sentences").mkdir()
    make_modules(folder / "sentences")


# what an option without an end gets, and what every option may get
ENDLESS = ("", "x", "nan", "inf", "-inf", "-1", "0", "1e400", "0x10", "--", "\0", "½")
# what is written goes into the folder of the input
ANY = (
    *ENDLESS, "1", "2", "0.5", "1.5", "9" * 30, str(2**31), str(2**63), "1e-400", "true", "null", "[]", ".", "text.txt",
    "shards", "nowhere/at/all", "/dev/null", "/proc/self/mem", "*", "a" * 5000, "-", "--help", "\u00fc", "\ud800",
)  # fmt: skip


def read_commands(folder, draw):
    call(command_line(folder, draw), folder)


def command_line(folder, draw):
    """The arguments of a command that would work, or ends soon, with one to three of them changed."""

    from fastbert import cli

    text, shards, model, sentences = (str(folder / x) for x in ("text.txt", "shards", "model.json", "sentences/model"))
    new = str(folder / "new")
    commands = {
        "pretrain": ["--train-file", shards, "--model", model, "--output-dir", new, "--max-steps", "1",
                     "--max-seq-length", "16", "--tokens-per-batch", "64", "--eval-share", "0"],
        "tokenizer train": [text, "--output-dir", new, "--vocab-size", "100"],
        "prepare": [text, "--tokenizer", shards, "--output-dir", new, "--num-workers", "1"],
        "fill-mask": ["--model", str(folder / "run"), "a [MASK] b."],
        "convert": [sentences, new],
        "finetune": ["--model", "nowhere", "--train-file", "nowhere.csv", "--output-dir", new],
        "predict": ["--model", "nowhere", "--text", "a"],
        "evaluate": ["--model", "nowhere", "--input", "nowhere.csv"],
        "doctor": ["--arch", "sm_0"],
        "": [],
    }  # fmt: skip
    name = draw.choice(list(commands))
    arguments = [*name.split(), *commands[name]]
    # compiling takes long
    known = [option for option in parameters_of(cli.main, name.split()) if option != "--compile"]
    for _ in range(draw.choice((1, 1, 2, 3))):
        kind = draw.random()
        at = draw.randint(0, len(arguments))
        if kind < 0.45 and known:
            option = draw.choice(known)
            endless = ("step", "epoch", "minute", "accumulation", "worker", "seconds", "batch", "vocab", "length")
            arguments += [option, draw.choice(ENDLESS if any(word in option for word in endless) else ANY)]
        elif kind < 0.6 and len(arguments) > 1:
            # the value of an option that is there
            at = draw.randrange(1, len(arguments))
            before = arguments[at - 1]
            counts = before.startswith("--") and before.split("-")[2] in ("max", "tokens", "vocab", "num")
            arguments[at] = draw.choice(ENDLESS if counts else ANY)
        elif kind < 0.75 and arguments:
            del arguments[min(at, len(arguments) - 1)]
        elif kind < 0.9:
            arguments.insert(at, draw.choice(ANY))
        else:
            draw.shuffle(arguments)
    return arguments


def call(arguments, folder):
    """Run the command line there. Raises AssertionError unless it works, or is refused in one line."""
    from click.testing import CliRunner

    from fastbert import cli

    here = os.getcwd()
    os.chdir(folder)
    try:
        done = CliRunner().invoke(cli.main, arguments, prog_name="fastbert")
    finally:
        os.chdir(here)
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    lines = [line for line in done.stderr.splitlines() if not line.startswith("fastbert: warning: ")]
    # a group of commands without one shows its help
    is_refused = len(lines) == 1 and lines[0].startswith("fastbert: error: ") or arguments in ([], ["tokenizer"])
    if done.exit_code and not (done.exit_code in (1, 2) and is_refused):
        said = done.stderr.replace(str(folder), "")[-200:]
        raise AssertionError(f"exit code {done.exit_code}, said {said!r}: {arguments}")


def parameters_of(command, path):
    import click

    for name in path:
        command = command.commands[name]
    context = click.Context(command)
    return [parameter.opts[0] for parameter in command.get_params(context) if parameter.opts[0].startswith("--")]


READERS = {name: (globals()[f"make_{name}"], globals()[f"read_{name}"])
           for name in ("texts", "configs", "modules", "manifests", "commands")}  # fmt: skip

# ---------------------------------------------------------------------------------------------------------------------
# reading


class Hang(BaseException):
    """Not an Exception, so that no reader takes it for one of its own."""


def read_all(reader, numbers, seed=0, limit=LIMIT, begins=lambda number: None):
    """Iterate over (number, finding) of inputs: what is wrong with how each is read, in words, or None."""
    make, read = READERS[reader]

    def hang(*_):
        raise Hang(f"not read in {limit} s")

    before = signal.signal(signal.SIGALRM, hang)
    try:
        with tempfile.TemporaryDirectory() as directory:
            made, folder = Path(directory) / "made", Path(directory) / "input"
            made.mkdir()
            make(made)
            for number in numbers:
                begins(number)
                shutil.copytree(made, folder)
                signal.alarm(limit)
                try:
                    finding = one(read, folder, random.Random(f"{reader} {seed} {number}"))
                finally:
                    signal.alarm(0)
                yield number, finding
                shutil.rmtree(folder, ignore_errors=True)
    finally:
        signal.signal(signal.SIGALRM, before)


def one(read, folder, draw):
    """What is wrong with how an input is read, in words; None if nothing is."""
    try:
        read(folder, draw)
    except (Exception, Hang) as error:
        # of a library's errors that are ValueErrors too (UnicodeDecodeError, JSONDecodeError, ArrowInvalid) none names
        # the file: they are to be caught
        if type(error) is ValueError or isinstance(error, OSError | FloatingPointError):
            return None if "\n" not in str(error) else f"not one line: {str(error)[:200]!r}"
        frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "/fastbert/" in frame.filename]
        place = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
        return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}{place}"
    return None


def work(reader, numbers, seed):
    """Read inputs in this process, whose memory is limited from now on. Writes a line of JSON for each to stdout."""
    import resource

    import torch

    report = os.fdopen(os.dup(1), "w", buffering=1)
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
    torch.set_num_threads(1)

    def begins(number):
        if number == numbers[0]:
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY, resource.RLIM_INFINITY))
        print(json.dumps({"begins": number}), file=report)

    try:
        for number, finding in read_all(reader, numbers, seed, begins=begins):
            print(json.dumps({"ends": number, "finding": finding}), file=report)
    except Exception:
        # not of an input: nothing could be made, or the memory does not do for a report
        print(json.dumps({"failed": traceback.format_exc()}), file=report)


# ---------------------------------------------------------------------------------------------------------------------


def findings(reader, count, seed=0):
    """[(number, finding)] of the inputs 0 to count - 1 of a reader, which are read in processes that may die."""
    found, first = [], 0
    while first < count:
        command = [sys.executable, __file__, reader, "--count", str(count), "--seed", str(seed), "--from", str(first)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        begun, row = None, {}
        # twice the time: what hangs in Python ends itself
        while select.select([process.stdout], [], [], START if begun is None else 2 * LIMIT)[0]:
            line = process.stdout.readline()
            if not line:
                break
            row = json.loads(line)
            begun = row.get("begins", begun)
            if row.get("finding"):
                found.append((row["ends"], row["finding"]))
        is_late = process.poll() is None and "begins" in row
        process.kill()
        process.communicate()
        if begun is None:
            raise RuntimeError(f"{reader}: {row.get('failed', 'nothing was read')}")
        if "begins" in row:
            found.append((begun, "hangs outside of Python" if is_late else f"kills the process: {process.returncode}"))
        elif "failed" in row:
            # at this input or while the next was made
            found.append((begun, row["failed"]))
        first = begun + 1
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("readers", nargs="*", help=f"of {', '.join(READERS)}; default: all")
    parser.add_argument("--count", type=int, default=1000, help="inputs for each reader")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="one input alone, with its traceback")
    parser.add_argument("--from", type=int, dest="first", help=argparse.SUPPRESS)
    options = parser.parse_args()
    for reader in options.readers:
        if reader not in READERS:
            parser.error(f"{reader} is unknown: expected some of {', '.join(READERS)}")
    if options.first is not None:
        return work(options.readers[0], range(options.first, options.count), options.seed)
    if options.only is not None:
        make, read = READERS[options.readers[0]]
        with tempfile.TemporaryDirectory() as directory:
            make(Path(directory))
            return read(Path(directory), random.Random(f"{options.readers[0]} {options.seed} {options.only}"))
    failed = False
    for reader in options.readers or READERS:
        began = time.monotonic()
        found = findings(reader, options.count, options.seed)
        failed |= bool(found)
        print(f"{reader}: {options.count} inputs, {len(found)} findings, {time.monotonic() - began:.0f} s", flush=True)
        kinds = {}
        for number, finding in found:
            kinds.setdefault(re.sub(r"\d+", "0", finding), []).append((number, finding))
        for same in sorted(kinds.values(), key=len, reverse=True):
            print(f"    {len(same):4} x {same[0][1]}    (--only {same[0][0]})", flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
