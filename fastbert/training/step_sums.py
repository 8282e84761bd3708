"""The arithmetic of a step: its gradient, sums over micro-batches and processes, and figures of these sums."""

import torch

from . import processes


def accumulate(model, batches, *, bf16=False):
    """Add the gradient of one step's loss to the model's gradients. batches: the micro-batches, packing.Batch each.

    Each loss of the model is summed over its labels and divided once, by the number of labels in all micro-batches of
    all processes. So it does not matter how a step is split into micro-batches. Without a label there is no gradient.
    Returns sums over the micro-batches of all processes: tokens, capacity (rows, filled or not), and those of `add`.
    """
    device = next(model.parameters()).device
    labels = [model.label_counts(batch) for batch in batches]
    names = [*labels[0]]
    tokens, capacity, *counts = processes.total(
        sum(int(batch.cu_seqlens[-1]) for batch in batches), sum(len(batch.input_ids) for batch in batches),
        *(sum(one[name] for one in labels) for name in names),
    )  # fmt: skip
    counts, sums = dict(zip(names, counts, strict=True)), {}
    if any(counts.values()):
        for batch in batches:
            output = forward(model, batch, device, bf16)
            output.divided(counts).backward()
            add(sums, output.losses)
        processes.add_gradients(model)
        # waits for the device, as the gradient norm does; nothing else in a step waits
        sums = dict(zip(sums, processes.total(*torch.stack([*sums.values()]).tolist()), strict=True))
    counts = {column(name, "count"): count for name, count in counts.items()}
    return sums | counts | {"tokens": tokens, "capacity": capacity}


def forward(model, batch, device, bf16=False):
    """The model's Output on `device` for a micro-batch on the CPU."""
    if device.type != "cpu":
        batch = batch.pin_memory().to(device, non_blocking=True)
    with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
        return model(batch)


def column(name, what):
    """The name of a figure of the loss `name` in sums, checkpoints and the log. Masked tokens have no prefix."""
    return what if name == "mlm" else f"{name}_{what}"


def losses_in(sums):
    """The names of the losses in sums."""
    return [name.removesuffix("count").rstrip("_") or "mlm" for name in sums if name.endswith("count")]


def add(sums, losses):
    """Add an Output's losses to `sums`, {column: float64 tensor}: loss, count, correct, and other counts."""
    for name, loss in losses.items():
        parts = {"loss": loss.sum, "count": loss.count, "correct": loss.correct, **loss.more}
        for what, value in parts.items():
            if value is not None:
                key = column(name, what)
                sums[key] = sums.get(key, 0) + value.detach().double()


def figures(sums):
    """Figures for the log from sums: each mean loss and accuracy.

    Replaced-token detection has two more: the share of replaced tokens that were found, and the accuracy of always
    answering "original".
    """
    found = {}
    for name in losses_in(sums):
        loss, count, correct, replaced = (
            sums.get(column(name, what), 0) for what in ("loss", "count", "correct", "replaced")
        )
        if name == "mlm":
            found |= {
                "loss": loss / max(count, 1), "masked_accuracy": correct / max(count, 1), "picked_tokens": int(count)
            }  # fmt: skip
        elif count:
            found[f"{name}_loss"] = loss / count
            if column(name, "correct") in sums:
                found[f"{name}_accuracy"] = correct / count
            if name == "rtd":
                found["rtd_baseline_accuracy"] = 1 - replaced / count
                found["rtd_recall"] = sums["rtd_found"] / max(replaced, 1)
    return found
