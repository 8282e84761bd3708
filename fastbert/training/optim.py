"""Parameter groups, AdamW, learning-rate schedules, gradient clipping."""

import math

import torch

# The share of a run that the "constant" schedule spends on its final decay (Hägele et al. 2024 find 0.1 to 0.2 enough).
FINAL_DECAY = 0.2


def parameter_groups(model, weight_decay, layer_decay=1.0):
    """Groups for an optimizer: matrices have weight decay, vectors (biases, norm weights) have none.

    Every parameter that requires a gradient is in one group, a tied weight once. Source: Devlin et al. 2019, A.2.

    layer_decay below 1: the learning rate of each layer is that of the layer above it times layer_decay, the head's is
    the whole one. Groups then have a "scale", see `Run.update`. Source: Howard & Ruder 2018, 3.1.
    """
    groups = {}
    top = model.config.num_hidden_layers + 1 if layer_decay != 1 else 0
    for name, p in model.named_parameters():
        if p.requires_grad:
            depth = top if layer_decay == 1 else _depth(name, top)
            settings = {"weight_decay": weight_decay if p.dim() >= 2 else 0.0, "scale": layer_decay ** (top - depth)}
            groups.setdefault((depth, p.dim() < 2), settings | {"params": []})["params"].append(p)
    return [groups[key] for key in sorted(groups)]


def _depth(name, top):
    """The layer of a parameter: 0 the embeddings, 1 the first layer, `top` the head."""
    if not name.startswith("encoder."):
        return top
    return next((int(part) + 1 for part in name.split(".") if part.isdigit()), 0 if "embeddings" in name else top - 1)


def adamw(model, *, learning_rate, weight_decay, betas, epsilon, layer_decay=1.0):
    """AdamW (Loshchilov & Hutter 2019) over `parameter_groups`, in its fused form: one pass over all parameters."""
    groups = parameter_groups(model, weight_decay, layer_decay)
    return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, eps=epsilon, fused=True)


# A schedule maps (step, total, warmup) to the factor on the learning rate. step: what is done, total: the whole run,
# warmup: the part of it with a rising rate. All are steps, or all seconds when a run has a time budget.


def linear(step, total, warmup):
    """Up to 1 over the warm-up, then linearly down to 0."""
    return min(_rise(step, warmup), _remaining(step, total, warmup))


def cosine(step, total, warmup):
    """Up to 1 over the warm-up, then down to 0 along half a cosine."""
    return min(_rise(step, warmup), 0.5 - 0.5 * math.cos(math.pi * _remaining(step, total, warmup)))


def constant(step, total, warmup):
    """Up to 1 over the warm-up, 1 for most of the run, then linearly down to 0 over the last FINAL_DECAY of it."""
    return min(_rise(step, warmup), _remaining(step, total, max(warmup, (1 - FINAL_DECAY) * total)))


SCHEDULES = {"linear": linear, "cosine": cosine, "constant": constant}


def _rise(step, warmup):
    # + 1, so that the first step has a learning rate above 0
    return min(1.0, (step + 1) / warmup) if warmup else 1.0


def _remaining(step, total, start):
    """The remaining share of the way from `start` to `total`: 1 before `start`, 0 after `total`."""
    return min(1.0, max(0.0, (total - step) / (total - start))) if total > start else 1.0


def length(config, loader):
    """(total, warmup) of the run: in steps, or in seconds with --max-minutes."""
    if config.max_minutes is not None:
        total = 60 * config.max_minutes
    elif config.max_steps is not None:
        total = config.max_steps
    else:
        whole, part = divmod(config.epochs or 1, 1)
        batches = sum(loader.num_batches(epoch) for epoch in range(int(whole)))
        if part:
            batches += part * loader.num_batches(int(whole))
        total = max(1, math.ceil(batches / config.gradient_accumulation_steps))
    return total, config.warmup_ratio * total if config.warmup_steps is None else config.warmup_steps


def clip_gradients(parameters, max_norm):
    """Scale the gradients so that their common 2-norm is at most `max_norm`; 0 or less means no limit.

    Returns the norm before scaling, 0-dimensional. If the norm is not finite, the gradients stay as they are and the
    caller skips the step. Source: Pascanu et al. 2013.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    if max_norm > 0:
        scale = torch.where(norm.isfinite() & (norm > max_norm), max_norm / norm, 1.0)
        torch._foreach_mul_(gradients, scale)
    return norm
