"""fastbert on a CPU against what people really use: ONNX Runtime, OpenVINO, torch.compile, sentence-transformers.

    python benchmarks/bench_inference.py                      all four parts, one after the other
    python benchmarks/bench_inference.py matrix               one of them: texts, classification, training or matrix
    python benchmarks/bench_inference.py matrix --threads 1   with so many threads, all libraries
    python benchmarks/bench_inference.py --warm               only compile, which takes minutes the first time

texts: all-MiniLM-L6-v2 embeds 300 verses, 5,000 titles, and single texts of 8, 32 and 128 tokens. classification: 64
texts through a model of MiniLM's width with two layers. training: BERT-small's training step. matrix: three families of
MiniLM's width (384) with two layers, so that every cell takes seconds: lengths 8, 128 and 512, one text or 32, 40 % of
the rectangle filled or all of it; a swapped model and fastbert's own, each against the fastest other library of the
same precision. A cell fails when the 95 % interval of the median ratio lies below 1.

Each part writes a file, such as inference_matrix.json. `runtimes.py` says how each library is called. Each result is
compared with transformers' in float32 before anything is timed.
"""

import contextlib
import copy
import functools
import gc
import sys
import tempfile
import time
import warnings
from pathlib import Path

import machine
import model_pairs
import record
import runtimes
import tables
import torch
from bench_models import LENGTHS, lengths_of
from model_pairs import Case, Model, checked, config_of, hidden_of_ours, load_pair, optimizer_of, padded_batch
from rounds import interval_of_median, take_turns
from runtimes import COSINE, PRECISIONS, Exported

import fastbert
from fastbert.cpu import libraries
from fastbert.training.memory import keep_freed_memory

PARTS = ("texts", "classification", "training", "matrix")
# family -> the published size that its other settings come from; they differ in their attention
FAMILIES = {"bert": "bert-base", "mpnet": "mpnet-base", "modernbert": "modernbert-base"}
# of the matrix: MiniLM's width; ModernBERT's first layer is global, its second has a window
WIDTH, LAYERS = 384, 2
SIZES = dict(hidden_size=WIDTH, num_attention_heads=12, intermediate_size=4 * WIDTH, vocab_size=8000)
TEXTS, LONGEST, FILLS = (1, 32), (8, 128, 512), (0.4, 1.0)
ROUNDS = 9
# a peer that takes so much longer than the fastest in its first turn takes no more turns
SLOWER = 1.3
# seconds of a turn: a short call is repeated until then
TURN = 0.02
# seconds between turns, in which threads of the library before stop waiting for work
PAUSE = 0.003


def own(precision, make, notes):
    """What `make(dtype)` returns, where dtype is None for float32; its warnings are added to notes."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        made = make(None if precision == "float32" else PRECISIONS[precision])
    notes += [str(warning.message) for warning in found if str(warning.message) not in notes]
    return made


def swapped(module, dtype):
    """A swapped copy of a model of transformers'."""
    module = copy.deepcopy(module)
    fastbert.swap(module, **({"dtype": dtype} if dtype else {})).raise_if_incomplete()
    return module


def loaded(cls, directory, dtype):
    return cls.from_pretrained(directory, **({"dtype": dtype} if dtype else {})).eval()


def attempted(calls, makers, precision, not_measured):
    """Add {name: call} of those that can be made here; the reason of the others goes to not_measured."""
    for name, make in makers.items():
        try:
            calls[name] = make()
        except Exception as failure:  # the others want their turn
            not_measured[f"{name}, {precision}"] = record.line_of(failure)


def right(calls, arguments, truth, precision, not_measured, what, rows=lambda x: x):
    """{name: call of no arguments} of those whose result agrees with the truth. rows: result -> a row for each text."""
    found = {}
    for name, call in calls.items():
        try:
            cosine = torch.nn.functional.cosine_similarity(rows(call(*arguments)), truth).min().item()
            if not cosine >= COSINE[precision]:
                raise ValueError(f"wrong: a cosine of {cosine:.5f} to float32, expected {COSINE[precision]} or more")
            found[name] = functools.partial(call, *arguments)
        except Exception as failure:  # the others want their turn
            not_measured[f"{name}: {what}"] = record.line_of(failure)
    return found


def seconds_of(calls, rounds, most=30.0):
    """({name: seconds of a call in each round}, {name: seconds} of the peers that were too slow for more turns)."""
    turns, first = {}, {}
    for name, call in calls.items():
        began = time.perf_counter()
        call()
        times = max(1, round(TURN / (time.perf_counter() - began)))
        turns[name] = functools.partial(_again, call, times), times
        time.sleep(PAUSE)
        began = time.perf_counter()
        turns[name][0]()
        first[name] = (time.perf_counter() - began) / times
    best = min((first[name] for name in first if not record.is_ours(name)), default=0)
    slower = {name: first[name] for name in first if not record.is_ours(name) and first[name] > SLOWER * best}
    kept = {name: turn for name, (turn, _) in turns.items() if name not in slower}
    found = take_turns(kept, (rounds, rounds), most, prepare=lambda name: time.sleep(PAUSE))
    return {name: [s / turns[name][1] for s in taken] for name, taken in found.items()}, slower


def _again(call, times):
    for _ in range(times):
        call()


def row_of(facts, calls, rounds, most=30.0):
    """A row, or None where nothing of ours, or nothing else, can be timed."""
    if not any(map(record.is_ours, calls)) or all(map(record.is_ours, calls)):
        return None
    seconds, slower = seconds_of(calls, rounds, most)
    row = {**facts, "seconds": record.rounded(seconds, 7), "summary": record.summary(seconds)}
    return row | {"slower": {name: round(taken, 6) for name, taken in slower.items()}}


def named(what, precision, threads):
    return {
        "name": f"{what}, {precision}, {threads} thread{'s' * (threads > 1)}", "dtype": precision, "threads": threads,
    }  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------- texts


def encode_by(call, tokenizer):
    """texts -> vectors, by a function (ids, mask) -> hidden states: sorted by length, 32 at a time, mean, norm."""

    def encode(texts):
        encodings = tokenizer.encode_batch(texts)
        order = sorted(range(len(texts)), key=lambda i: -len(encodings[i].ids))
        vectors = torch.empty(len(texts), 0)
        for start in range(0, len(order), 32):
            group = order[start : start + 32]
            rows = [encodings[i].ids for i in group]
            ids = torch.zeros(len(rows), len(rows[0]), dtype=torch.int64)
            for row, found in zip(ids, rows):
                row[: len(found)] = torch.tensor(found)
            lengths = torch.tensor([len(found) for found in rows])
            mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
            mean = (call(ids, mask) * mask[..., None]).sum(1) / lengths[:, None]
            if not vectors.shape[1]:
                vectors = torch.empty(len(texts), mean.shape[1])
            vectors[group] = torch.nn.functional.normalize(mean, dim=-1)
        return vectors

    return encode


def texts(threads, precisions, result, quick):
    spec = model_pairs.minilm()
    if spec is None:
        result["not_measured"]["texts"] = "MiniLM's weights or the verses are not installed: make bench fetches both"
        return
    from sentence_transformers import SentenceTransformer
    from tokenizers import Tokenizer
    from transformers import AutoModel

    missing, notes = result["not_measured"], result["settings"]["notes"]
    tokenizer = Tokenizer.from_file(str(spec / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.enable_truncation(256)
    every = model_pairs.verses(5000)
    # as many words as have so many tokens, specials included
    words = " ".join(every).split()
    single = {n: next(t for t in prefixes(words) if len(tokenizer.encode(t).ids) >= n) for n in (8, 32, 128)}
    batches = {f"one text of {n} tokens": [text] for n, text in single.items()}
    batches["300 verses"] = every[::16][: 20 if quick else 300]
    if not quick and threads == max(result["settings"]["threads"]):
        batches["5,000 titles of six words"] = [" ".join(verse.split()[:6]) for verse in every]
    with tempfile.TemporaryDirectory() as folder:
        exported = Exported(AutoModel.from_pretrained(spec).eval(), Path(folder), lambda out: out.last_hidden_state)
        truth = encode_by(runtimes.by_transformers(exported, "float32", threads), tokenizer)
        for precision in precisions:
            calls = {}

            def st(dtype=None, is_swapped=True, precision=precision):
                model = SentenceTransformer(str(spec), device="cpu")
                if is_swapped:
                    fastbert.swap(model, **({"dtype": dtype} if dtype else {})).raise_if_incomplete()
                elif precision == "bfloat16":
                    model.bfloat16()
                return functools.partial(model.encode, convert_to_tensor=True, show_progress_bar=False)

            def ours(dtype):
                model = loaded(fastbert.SentenceEmbedder, spec, dtype)
                return functools.partial(model.encode, convert_to_tensor=True)

            makers = {
                "fastbert": lambda: own(precision, ours, notes),  # noqa: B023
                "sentence-transformers, swapped": lambda: own(precision, st, notes),  # noqa: B023
            }
            if precision != "int8":
                makers["sentence-transformers"] = functools.partial(st, None, False)
            for peer in runtimes.peers(precision, missing, but=("transformers",)):
                make = functools.partial(peer.make, exported, precision, threads)
                makers[peer.name] = functools.partial(lambda make: encode_by(make(), tokenizer), make)
            attempted(calls, makers, precision, missing)
            for what, batch in batches.items():
                facts, expected = named(f"{what} to vectors", precision, threads), truth(batch)
                correct = right(calls, (batch,), expected, precision, missing, facts["name"], lambda x: x.float())
                yield row_of(facts, correct, ROUNDS if len(batch) == 1 else 3, 90.0)


def prefixes(words):
    for i in range(1, len(words)):
        yield " ".join(words[:i])


# --------------------------------------------------------------------------------------------------- classification


def classification(threads, precisions, result, quick):
    from transformers import AutoConfig, AutoModelForSequenceClassification

    missing, notes = result["not_measured"], result["settings"]["notes"]
    config = AutoConfig.for_model("bert", num_hidden_layers=LAYERS, num_labels=3, **SIZES)
    torch.manual_seed(0)
    theirs = AutoModelForSequenceClassification.from_config(config).eval()
    # of random weights the logits hardly depend on the text
    theirs.classifier.weight.data.mul_(20)
    lengths = lengths_of(8 if quick else 64, 48, 0.6)
    batch = padded_batch(fastbert.EncoderConfig(vocab_size=8000), lengths, 0.0)
    arguments = batch["input_ids"], batch["attention_mask"]

    @torch.inference_mode()
    def called(module, ids, mask):
        return module(input_ids=ids, attention_mask=mask).logits

    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        exported = Exported(theirs, Path(folder), lambda out: out.logits)
        for precision in precisions:
            makers = {
                "fastbert": lambda: functools.partial(
                    called,
                    own(precision, functools.partial(loaded, fastbert.SequenceClassifier, folder), notes),  # noqa: B023
                ),
                "swapped": lambda: functools.partial(
                    called,
                    own(precision, functools.partial(swapped, theirs), notes),  # noqa: B023
                ),
            }
            for peer in runtimes.peers(precision, missing):
                makers[peer.name] = functools.partial(peer.make, exported, precision, threads)
            calls = {}
            attempted(calls, makers, precision, missing)
            facts = named(f"{len(lengths)} texts of at most 48 tokens to 3 labels", precision, threads)
            calls = right(calls, arguments, called(theirs, *arguments), precision, missing, facts["name"])
            yield row_of(facts, calls, ROUNDS)


# --------------------------------------------------------------------------------------------------------- training


def training(threads, precisions, result, quick):
    names = "transformers", "transformers compiled", "swapped", "fastbert"
    torch._inductor.config.cpp.threads = threads
    torch._dynamo.reset()
    device, lengths = torch.device("cpu"), LENGTHS["text, 60 % fill"]
    preset = "bert-tiny" if quick else "bert-small"
    case = Case("training", preset, lengths, "train", implementations=names)
    model = Model(preset, None, device)
    calls, _ = checked(model, case, device, result["not_measured"])
    # each with the optimizer that it has trained with
    for name in calls:
        module = model.module(name, case)
        model.optimizers.setdefault(id(module), optimizer_of(module))
    shape = case.name.partition(", ")[2].removesuffix(", float32")
    yield row_of(named(f"a training step of {preset}, {shape}", "float32", threads), calls, ROUNDS)


# ----------------------------------------------------------------------------------------------------------- matrix


def config_in_matrix(family):
    config = config_of(FAMILIES[family], LAYERS)
    sizes = SIZES | ({"intermediate_size": 576} if family == "modernbert" else {})
    return config.replace(**sizes, pad_token_id=min(config.pad_token_id, 1))


def lengths_in_matrix(count, longest, fill):
    """One text alone fills its share of the rectangle that its server pads to."""
    return (max(round(fill * longest), 2),) if count == 1 else lengths_of(count, longest, fill)


def matrix(threads, precisions, result, quick):
    for family in list(FAMILIES)[: 1 if quick else None]:
        with tempfile.TemporaryDirectory() as folder:
            yield from _matrix_of(family, folder, threads, precisions, result, quick)
        gc.collect()


def _matrix_of(family, folder, threads, precisions, result, quick):
    missing, notes, config = result["not_measured"], result["settings"]["notes"], config_in_matrix(family)
    theirs, ours, attention = load_pair(config, folder)
    base = theirs.eval().base_model
    exported = Exported(base, Path(folder), lambda out: out.last_hidden_state, attention)

    @torch.inference_mode()
    def by_swapped(module, ids, mask):
        return module(input_ids=ids, attention_mask=None if mask.all() else mask).last_hidden_state.float()

    def by_ours(module, ids, mask):
        return hidden_of_ours(module, {"input_ids": ids, **({} if mask.all() else {"attention_mask": mask})}).float()

    for precision in precisions:
        makers = {
            "fastbert": lambda: functools.partial(
                by_ours,
                own(precision, lambda dtype: loaded(type(ours), folder, dtype), notes),  # noqa: B023
            ),
            "swapped": lambda: functools.partial(by_swapped, own(precision, lambda dtype: swapped(base, dtype), notes)),  # noqa: B023
        }
        for peer in runtimes.peers(precision, missing):
            makers[peer.name] = functools.partial(peer.make, exported, precision, threads)
        calls = {}
        attempted(calls, makers, f"{family}, {precision}", missing)
        for count in (1, 4) if quick else TEXTS:
            for longest in (8, 16) if quick else LONGEST:
                for fill in FILLS:
                    lengths = lengths_in_matrix(count, longest, fill)
                    batch = padded_batch(config, lengths, 0.0)
                    ids, mask = batch["input_ids"], batch["attention_mask"]
                    if count == 1:
                        empty = longest - ids.shape[1]
                        ids = torch.nn.functional.pad(ids, (0, empty), value=config.pad_token_id)
                        mask = torch.nn.functional.pad(mask, (0, empty))

                    def mean(hidden, mask=mask):
                        return (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)

                    facts = named(f"{family}, {count} x {longest}, {fill:.0%} fill", precision, threads)
                    truth = mean(by_swapped(base, ids, mask))
                    found = right(calls, (ids, mask), truth, precision, missing, facts["name"], mean)
                    facts |= dict(family=family, sequences=count, length=longest, fill=fill)
                    row = row_of(facts, found, ROUNDS, 60.0)
                    yield row and row | {"cells": cells_of(row)}


def cells_of(row):
    """{ours: against the fastest other library: its name, the median of ratios, their 95 % interval, whether it
    fails}."""
    seconds, found = row["seconds"], {}
    best = min((x for x in seconds if not record.is_ours(x)), key=lambda name: row["summary"][name]["median_s"])
    for name in filter(record.is_ours, seconds):
        ratios = [theirs / ours for theirs, ours in zip(seconds[best], seconds[name])]
        low, high = interval_of_median(ratios)
        found[name] = {
            "best": best, "ratio": round(record.ratio(seconds[best], seconds[name]), 3),
            "interval": [round(low, 3), round(high, 3)], "fails": high < 1,
        }  # fmt: skip
    return found


# -------------------------------------------------------------------------------------------------------------- main


def line_of(row):
    """A row in one line."""
    ours = [name for name in row["seconds"] if record.is_ours(name)]
    first, others = record.ours_of(row["seconds"]), []
    for name, figures in row["summary"].items():
        is_loss = figures["times_fastbert"] < 1 and name not in ours
        if name != first:
            others.append(f"{name} {figures['times_fastbert']:.2f}x{' (a loss)' * is_loss}")
    others += [f"{name} {taken / row['summary'][first]['median_s']:.1f}x" for name, taken in row["slower"].items()]
    failed = [f"{name} FAILS against {cell['best']}" for name, cell in row.get("cells", {}).items() if cell["fails"]]
    mine = tables.duration(row["summary"][first]["median_s"])
    return "; ".join([f"{row['name']}: {first} {mine}; against it {', '.join(others)}", *failed])


def main(arguments=None):
    parser = machine.parser(__doc__)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"some of {', '.join(PARTS)}; default: all")
    parser.add_argument("--threads", nargs="+", type=int, help="default: 1 and all, in the matrix all")
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=["float32"], help="default: float32")
    parser.add_argument("--warm", action="store_true", help="only export and compile, and time nothing")
    parser.add_argument("--quick", action="store_true", help="small shapes: whether it runs, not how fast")
    options = parser.parse_args(arguments)
    if unknown := set(options.parts) - set(PARTS):
        parser.error(f"{', '.join(sorted(unknown))}: expected some of {', '.join(PARTS)}")
    device, failures, every = torch.device("cpu"), [], torch.get_num_threads()
    folder, kept = options.output or machine.folder(device), keep_freed_memory()
    for part in options.parts or PARTS:
        threads = options.threads or ([every] if part == "matrix" else sorted({1, every}))
        torch.set_num_threads(max(threads))
        result = record.new(device, {
            "rounds": ROUNDS, "memory_kept": kept, "threads": threads, "quick": options.quick, "notes": [],
            "versions": runtimes.versions(), "slower": f"left out after a turn of more than {SLOWER} times the fastest",
        })  # fmt: skip
        result["not_measured"] |= (
            {
                "sentence-transformers' backends for ONNX Runtime and OpenVINO": "optimum is not installed; the same "
                "runtimes are measured without it"
            }
            if part == "texts"
            else {}
        )
        for count in threads:
            torch.set_num_threads(count)
            # what compiles runs in the first call, before anything is timed
            with _untimed() if options.warm else contextlib.nullcontext():
                try:
                    for row in globals()[part](count, options.precisions, result, options.quick):
                        if row and not options.warm:
                            result["rows"].append(row)
                            print(line_of(row), flush=True)
                            record.save(result, folder / f"inference_{part}.json")
                except Exception as failure:  # the other parts want their turn
                    failures.append(part)
                    print(f"{part}: FAILED: {record.line_of(failure)}", flush=True)
        # which library multiplies, by class
        result["settings"]["products"] = libraries.chosen()
        if not options.warm:
            record.save(result, folder / f"inference_{part}.json")
            for name, reason in result["not_measured"].items():
                print(f"not measured: {name}: {reason}")
            for note in result["settings"]["notes"]:
                print(f"note: {note}")
            failing = [cell for row in result["rows"] for cell in row.get("cells", {}).values()]
            failed = f", {sum(cell['fails'] for cell in failing)} of {len(failing)} cells fail" if failing else ""
            print(f"{len(result['rows'])} rows written to {folder / f'inference_{part}.json'}{failed}")
    torch.set_num_threads(every)
    if failures:
        sys.exit(1)


@contextlib.contextmanager
def _untimed():
    global row_of
    before, row_of = row_of, lambda *arguments: None
    try:
        yield
    finally:
        row_of = before


if __name__ == "__main__":
    main()
