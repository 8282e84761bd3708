"""Tiny runs for the tests of training: a text, a model's config, short runs, and how to compare and to stop them."""

import json
import multiprocessing
import os
import random
import signal

import torch
from safetensors.torch import load_file

from fastbert.data.shards import prepare
from fastbert.data.tokenizer import save_tokenizer, train_wordpiece
from fastbert.packing import Batch
from fastbert.training import card, checkpoint, log, pretrain
from fastbert.training.pretrain import PretrainConfig

MODEL = {
    "model_type": "bert", "vocab_size": 200, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "intermediate_size": 64, "max_position_embeddings": 64,
}  # fmt: skip
WORDS = {
    "cat": "chases mice in dark barns", "dog": "guards sheep on green hills", "bird": "builds nests among tall trees",
    "fish": "follows currents under grey ice", "horse": "carries riders over stone bridges",
}  # fmt: skip


def documents(count):
    draw = random.Random(0)
    return [
        "".join(f"every day the {name} {WORDS[name]} .\n" for name in draw.choices(list(WORDS), k=draw.randint(1, 6)))
        for _ in range(count)
    ]


def prepared(place, texts, vocab_size):
    """Writes text.txt, a tokenizer and shards of it into a directory."""
    (place / "text.txt").write_text("\n".join(texts))
    tokenizer = train_wordpiece([str(place / "text.txt")], vocab_size, progress=False)
    save_tokenizer(tokenizer, place / "tokenizer")
    prepare([str(place / "text.txt")], tokenizer, place / "shards", progress=False)


def short_run(place):
    """Options of a run with dropout and accumulation, whose 12 steps pass the end of an epoch."""
    return {
        "train_file": place / "shards", "model": place / "model.json",
        "max_seq_length": 24, "tokens_per_batch": 192, "gradient_accumulation_steps": 2, "max_steps": 12,
        "learning_rate": 3e-3, "logging_steps": 5, "eval_steps": 4, "save_steps": 100, "eval_share": 0.1, "seed": 7,
    }  # fmt: skip


def run(options, **changes):
    return pretrain.pretrain(PretrainConfig(**options | changes))


def training_rows(directory):
    return [row for row in log.read_metrics(directory) if not log.is_evaluation(row)]


def rows_without_times(directory):
    timing = ("elapsed", "tokens_per_second", "examples_per_second", "memory_mb")
    return [{k: v for k, v in row.items() if k not in timing} for row in log.read_metrics(directory)]


def assert_same_tensors(one, other):
    tensors = [load_file(file) for file in (one, other)]
    assert tensors[0].keys() == tensors[1].keys() and tensors[0]
    for key, value in tensors[0].items():
        assert torch.equal(value, tensors[1][key]), key


def assert_same_run(one, other, step=12):
    """The same parameters, optimizer state and figures, bit for bit."""
    for name in (checkpoint.MODEL, checkpoint.OPTIMIZER):
        assert_same_tensors(*(directory / f"checkpoint-{step}" / name for directory in (one, other)))
    assert rows_without_times(one) == rows_without_times(other)


def draw_nothing(patch):
    """TensorBoard and the picture take longer than a short run."""
    patch.setattr(log, "_tensorboard", lambda *_: None)
    patch.setattr(card, "learning_curve", lambda *_: None)


def stop_in(monkeypatch, name, call, *signals, script=pretrain):
    """Signals, SIGTERM by default, arrive in call number `call` of the function `name` of pretrain.py or `script`."""
    real, calls = getattr(script, name), [0]

    def function(*args, **kwargs):
        calls[0] += 1
        if calls[0] == call:
            for number in signals or [signal.SIGTERM]:
                os.kill(os.getpid(), number)
        return real(*args, **kwargs)

    monkeypatch.setattr(script, name, function)


def checkpoints(directory):
    return sorted(path.name for path in directory.glob("checkpoint-*"))


def cut(batch, groups):
    """The sequences of a batch as several batches, `groups` sequences each."""
    starts, parts, at = batch.cu_seqlens.tolist(), [], 0
    for size in groups:
        first, last = starts[at], starts[at + size]
        here = (batch.picks >= first) & (batch.picks < last)
        parts.append(Batch(
            batch.input_ids[first:last], batch.position_ids[first:last], batch.token_type_ids[first:last],
            batch.cu_seqlens[at : at + size + 1] - first, batch.max_seqlen,
            labels=batch.labels[first:last], picks=batch.picks[here] - first,
            pair_labels=None if batch.pair_labels is None else batch.pair_labels[at : at + size],
            draws=None if batch.draws is None else batch.draws[here],
        ))  # fmt: skip
        at += size
    assert at == len(starts) - 1
    return parts


def alone_and_in_two_processes(options, directory):
    """The directories of a run with two micro-batches a step, and of one by two processes with one micro-batch each."""
    options = options | {"dropout": 0.0, "max_steps": 3, "logging_steps": 3, "gradient_accumulation_steps": 1}
    one, two = directory / "one", directory / "two"
    run(options, output_dir=one, gradient_accumulation_steps=2)
    in_two_processes(run, options | {"output_dir": two}, directory / "rendezvous")
    return one, two


def in_two_processes(run, options, rendezvous):
    """`run(options)` by two processes."""
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=worker, args=(run, rank, 2, rendezvous, options)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0]


def worker(run, rank, world_size, file, options):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=world_size)
    run(options)
    torch.distributed.destroy_process_group()


def write_model(place, name="model.json", **changes):
    (place / name).write_text(json.dumps(MODEL | changes))
    return place / name
