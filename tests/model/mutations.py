"""Damaged directories of models, from a random.Random: `python tests/fuzz.py` tries many, test_mutations.py some.

`fuzz_configs`, `fuzz_modules` and `fuzz_weights` return what is wrong: each damage must load, or be refused by one line
in time.
"""

import json
import time
import warnings

import torch
from safetensors.torch import load_file, save_file
from test_families import CASES, theirs_of
from test_sentences import embedder

from fastbert.model.convert import load_by_architecture
from fastbert.model.heads import SequenceClassifier
from fastbert.model.hf_files import PICKLED_WEIGHTS, WEIGHTS
from fastbert.model.sentences import SentenceEmbedder

# what stands where something else is expected; the last is not what json writes
HOSTILE = [
    None, True, False, 0, 1, -1, 2, 3, 7, 10**9, 2**31, 2**63, 10**400, 0.5, -0.5, 1e-12, 1e308, float("nan"),
    float("inf"), "", "x", "36", "../x", "/etc/passwd", "a\0b", "\ud800", [], [1], ["x"], [[]], [{}], {}, {"0": "a"},
    {"x": None}, {"rope_type": 5}, "[" * 20,
]  # fmt: skip
# keys that a file may have besides its own
MORE_KEYS = ["new_key", "num_labels", "rope_scaling", "head_dim", "sliding_window", "layer_types", "use_residual"]
# a second is enough on a quiet machine
SECONDS = 20


def places(values, path=()):
    """The paths of all values in nested objects and arrays."""
    for key, value in values.items() if isinstance(values, dict) else enumerate(values):
        yield (*path, key)
        if isinstance(value, dict | list):
            yield from places(value, (*path, key))


def mutated(rng, values):
    """The text of a JSON file: `values` with one to three faults."""
    values = json.loads(json.dumps(values))
    if rng.random() < 0.03:
        return json.dumps(rng.choice(HOSTILE))
    if isinstance(values, dict) and rng.random() < 0.2:
        values[rng.choice(MORE_KEYS)] = rng.choice(HOSTILE)
    for _ in range(rng.randint(1, 3)):
        paths = [*places(values)]
        if not paths:
            break
        *above, key = rng.choice(paths)
        inner = values
        for step in above:
            inner = inner[step]
        if rng.random() < 0.2:
            del inner[key]
        else:
            inner[key] = rng.choice(HOSTILE)
    text = json.dumps(values)
    fate = rng.random()
    if fate < 0.05:
        return text[: rng.randrange(len(text) + 1)]
    if fate < 0.1:
        i = rng.randrange(len(text) + 1)
        return text[:i] + rng.choice(["[" * 100_000, "\0", '"', "}", "NaN", "9" * 5000]) + text[i:]
    return text


def mutated_configs(rng):
    """For ever: (case of test_families, text of its damaged config.json)."""
    while True:
        case = rng.choice([*CASES])
        config = theirs_config(case)
        yield case, mutated(rng, config)


def theirs_config(case, kept={}):  # noqa: B006
    if case not in kept:
        kept[case] = json.loads(theirs_of(case, "ForSequenceClassification").config.to_json_string(use_diff=False))
    return json.loads(json.dumps(kept[case]))


def fault_of(load):
    """None, or what is wrong with how `load` ends: it may return, or raise one line soon."""
    started = time.monotonic()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            load()
    except (ValueError, OSError) as error:
        if "\n" in str(error) or len(str(error)) > 2000:
            return f"not one line: {error}"
    except BaseException as error:
        return f"{type(error).__name__}: {error}"
    if time.monotonic() - started > SECONDS:
        return f"took {time.monotonic() - started:.0f} s"
    return None


def fuzz_configs(directory, rng, count):
    """Tries `count` damaged config.json beside whole weights. Returns [(text, fault)]."""
    faults, cases = [], mutated_configs(rng)
    for _ in range(count):
        case, text = next(cases)
        place = directory / case
        if not place.exists():
            theirs_of(case, "ForSequenceClassification").save_pretrained(place)
        (place / "config.json").write_text(text, encoding="utf-8", errors="surrogatepass")

        def load(place=place):
            SequenceClassifier.from_pretrained(place)
            load_by_architecture(place)

        if fault := fault_of(load):
            faults.append((text, fault))
    return faults


def whole_modules(directory):
    """Write a directory of sentence-transformers in which everything is right. Returns {name: text} of its JSON."""
    embedder(
        prompts={"query": "query : "}, token_dense=[(36, 36, True, "Tanh")],
        dense=[(36, 8, True, "ReLU", True), "Normalize", (8, 5, False, "Identity")], truncate_dim=4,
    ).save_pretrained(directory)  # fmt: skip
    settings = json.loads((directory / "sentence_bert_config.json").read_text())
    settings |= dict(
        config_kwargs={"num_hidden_layers": 1}, processor_kwargs={"truncation_side": "left"}, model_kwargs={},
        modality_config={"text": {"method": "forward", "method_output_name": "last_hidden_state"}},
    )  # fmt: skip
    (directory / "sentence_bert_config.json").write_text(json.dumps(settings))
    # in two shards
    tensors, index = load_file(directory / WEIGHTS), {}
    for i in range(2):
        shard = dict([*tensors.items()][i::2])
        save_file(shard, directory / f"shard-{i}.safetensors")
        index |= dict.fromkeys(shard, f"shard-{i}.safetensors")
    (directory / f"{WEIGHTS}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    (directory / WEIGHTS).unlink()
    return {
        path.relative_to(directory).as_posix(): path.read_text(encoding="utf-8") for path in directory.rglob("*.json")
    }


def mutated_modules(rng, whole):
    """For ever: (name, text) of a damaged file among `whole`, {name: text}."""
    while True:
        name = rng.choice([*whole])
        if rng.random() < 0.05:
            yield name, None
        else:
            yield name, mutated(rng, json.loads(whole[name]))


def fuzz_modules(directory, rng, count):
    """Tries `count` directories of sentence-transformers with one damaged JSON file. Returns [(file, text, fault)]."""
    whole = whole_modules(directory)
    faults, cases = [], mutated_modules(rng, whole)

    def load():
        SentenceEmbedder.from_pretrained(directory).encode(["the cat sat", "a dog"])

    for _ in range(count):
        name, text = next(cases)
        path = directory / name
        if text is None:
            path.unlink()
        else:
            path.write_text(text, encoding="utf-8", errors="surrogatepass")
        if fault := fault_of(load):
            faults.append((name, text, fault))
        path.write_text(whole[name], encoding="utf-8")
    return faults


def mutated_bytes(rng, data):
    """`data` with some bytes flipped, cut off or added, mostly at its beginning, where a format has its rules."""
    data = bytearray(data)
    fate, near = rng.random(), min(len(data), rng.choice([64, 4096, len(data)]))
    if fate < 0.2:
        return bytes(data[: rng.randrange(near)])
    if fate < 0.3:
        i = rng.randrange(near)
        return bytes(data[:i] + rng.randbytes(rng.randint(1, 99)) + data[i:])
    for _ in range(rng.choice([1, 3, 30])):
        data[rng.randrange(near)] = rng.choice([0, 255, 34, 123, rng.randrange(256)])
    return bytes(data)


def fuzz_weights(directory, rng, count):
    """Tries `count` damaged files of weights, safetensors or pickles. Returns [(name, bytes, fault)]."""
    theirs = theirs_of("bert", "ForSequenceClassification")
    whole = {}
    for name in (WEIGHTS, PICKLED_WEIGHTS):
        place = directory / name.replace(".", "_")
        theirs.save_pretrained(place)
        if name == PICKLED_WEIGHTS:
            (place / WEIGHTS).unlink()
            torch.save(theirs.state_dict(), place / name)
        whole[place / name] = (place / name).read_bytes()
    faults = []
    for _ in range(count):
        path = rng.choice([*whole])
        path.write_bytes(mutated_bytes(rng, whole[path]))
        if fault := fault_of(lambda path=path: SequenceClassifier.from_pretrained(path.parent, allow_pickle=True)):
            faults.append((path.name, path.read_bytes()[:4096], fault))
    return faults
