"""What a fine-tuning run needs before it begins: tokenizer, config, spec, score, held-out examples.

Each function raises a one-line error if something is missing or wrong.
"""

from pathlib import Path

from ..data.tokenizer import check_vocabulary, load_tokenizer, special_ids, vocabulary_size
from ..files import read_json
from ..hub import EXAMPLE
from ..model import families, hf_files, presets
from ..tasks import table
from ..tasks.examples import Spec
from ..tasks.predictor import usual_length
from ..tasks.regress import number
from ..tasks.retrieval_files import PROMPTS
from . import lora
from .example_batches import held_out

# tasks that train a model of retrieval, which share their options
RETRIEVAL = ("embed", "rerank", "sparse")


def checked_lora(config):
    """The Lora of --lora, None without. Raises ValueError for options that it does not go with."""
    if config.lora is None:
        return None
    settings = lora.parsed(config.lora)
    if config.freeze_encoder or config.layer_decay != 1:
        other = "--freeze-encoder" if config.freeze_encoder else "--layer-decay"
        raise ValueError(f"{other} does not go with --lora, which leaves the encoder as it is")
    if config.model in presets.PRESETS or config.model.endswith(".json"):
        raise ValueError(f"--lora needs a trained model: --model {config.model} has fresh weights")
    return settings


def tokenizer_and_config(config, resumed):
    """(tokenizer, EncoderConfig) of --model, a preset or a path."""
    path = Path(config.model)
    if config.model in presets.PRESETS:
        found = presets.preset(config.model)
    elif path.exists():
        found = hf_files.read_config(path / "config.json" if path.is_dir() else path)
    else:
        raise ValueError(
            f"--model {config.model}: no such directory, and no name on the hub, which has an owner, such as "
            f"{EXAMPLE}; presets are {', '.join(presets.PRESETS)}"
        )
    directory = config.tokenizer or (config.model if path.is_dir() else resumed)
    if not directory:
        raise ValueError(f"--tokenizer is missing: --model {config.model} has none")
    tokenizer = load_tokenizer(directory, as_saved=directory == resumed)
    if config.model in presets.PRESETS:
        found = families.with_vocabulary(found, vocabulary_size(tokenizer), special_ids(tokenizer).pad)
    check_vocabulary(tokenizer, found)
    if special_ids(tokenizer).pad != found.pad_token_id:
        raise ValueError(
            f"the tokenizer's [PAD] is {special_ids(tokenizer).pad}: {config.model} has a pad_token_id of "
            f"{found.pad_token_id}"
        )
    if (config.max_seq_length or 0) > found.max_length:
        raise ValueError(
            f"--max-seq-length is {config.max_seq_length}: the model {config.model} has {found.max_length} positions"
        )
    if config.dropout is not None:
        found = found.replace(hidden_dropout_prob=config.dropout, attention_probs_dropout_prob=config.dropout)
    return tokenizer, found


def spec_of(config, name, encoder_config):
    """The Spec of the task `name`, without labels."""
    columns = {}
    for column, value in (("texts", list(config.text_column)), ("label", config.label_column),
                          ("group", config.group_column)):  # fmt: skip
        if value:
            columns[column] = value
    max_length = config.max_seq_length or usual_length(config.tokenizer or config.model, encoder_config)
    stride = max_length // 4 if config.stride is None else config.stride
    if config.scheme and name != "tag":
        raise ValueError(f"--scheme goes with the task tag: it is {name}")
    if config.label_smoothing and name == "regress":
        raise ValueError("--label-smoothing goes with labels: the task regress has numbers")
    settings = {"read_as": config.scheme} if config.scheme else retrieval_settings(config, name)
    is_cut = config.truncate or name in RETRIEVAL
    return Spec(name, None, columns, max_length, stride, is_cut, config.metric, settings)


def retrieval_settings(config, name):
    """The settings of the Spec of a retrieval task; {} for others. Raises ValueError for options that do not fit."""
    given = [
        one
        for one in ("loss", "scale", "pooling", "prompts", "score_range", "flops_weight")
        if getattr(config, one) is not None
    ]
    given += ["widths"] * bool(config.widths)
    if name not in RETRIEVAL:
        if given:
            raise ValueError(f"--{given[0].replace('_', '-')} goes with the tasks {', '.join(RETRIEVAL)}: it is {name}")
        return {}
    for one in ("lora", "freeze_encoder", "class_weights", "label_smoothing"):
        if getattr(config, one):
            raise ValueError(f"--{one.replace('_', '-')} does not go with --task {name}")
    losses = table.task(name).LOSSES
    if config.loss is not None and config.loss not in losses:
        raise ValueError(f"--loss is {config.loss!r}: expected one of {', '.join(losses)} for {name}")
    others = {
        "embed": {"flops_weight"}, "sparse": {"pooling", "widths", "score_range"},
        "rerank": {"pooling", "widths", "scale", "flops_weight"},
    }  # fmt: skip
    if wrong := {*given} & others[name]:
        raise ValueError(f"--{min(wrong).replace('_', '-')} does not go with --task {name}")
    settings = {
        one: getattr(config, one) for one in given if one in ("loss", "scale", "pooling", "flops_weight")
    }  # fmt: skip
    if config.widths:
        try:
            settings["widths"] = sorted({int(width) for one in config.widths for width in one.split(",")})
        except ValueError:
            raise ValueError(
                f"--widths is {','.join(config.widths)!r}: expected whole numbers, such as 64,128"
            ) from None
    if config.score_range is not None:
        low, _, high = config.score_range.partition(",")
        settings["score_range"] = [number(low), number(high)]
        if None in settings["score_range"] or not settings["score_range"][0] < settings["score_range"][1]:
            raise ValueError(f"--score-range is {config.score_range!r}: expected two numbers, such as 0,5")
        if config.loss != "cosine" and name != "rerank":
            raise ValueError("--score-range goes with --loss cosine: other losses take scores of any range")
    if prompts := _prompts(config):
        settings["prompts"] = prompts
    return settings


def _prompts(config):
    """{name: prompt} of --prompts, or of the model, with those of "query" and "document"; {} if none says something."""
    path = Path(config.model) / "config_sentence_transformers.json"
    own = read_json(path) if path.is_file() else {}
    stored = {name: text or "" for name, text in (own.get("prompts") or {}).items()}
    if config.prompts is not None:
        found = stored | PROMPTS[config.prompts]
    else:
        usual = stored.get(own.get("default_prompt_name"), "")
        document = next((stored[name] for name in ("document", "passage") if name in stored), usual)
        found = stored | {"query": stored.get("query", usual), "document": document}
    return found if any(found.values()) or config.prompts else {}


def main_score(config, task, spec):
    """The name of the main score."""
    if spec.metric is None:
        spec.metric = task.main_score(spec) if hasattr(task, "main_score") else next(iter(task.SCORES))
    if spec.metric not in task.SCORES:
        raise ValueError(f"--metric is {spec.metric!r}: expected one of {', '.join(task.SCORES)} for {spec.task}")
    if spec.metric == "f1" and spec.task == "classify" and len(spec.labels) != 2:
        raise ValueError(f"--metric f1 is that of the second of two labels: there are {len(spec.labels)}")
    return spec.metric


def hold_out(config, examples, path, say):
    """(examples to train on, held-out examples): --eval-share of them. say: is told of what is not as one expects."""
    if wrong := next((one for one in examples if isinstance(one.group, list | dict)), None):
        raise ValueError(
            f"line {wrong.number}: the group {config.group_column!r} is {str(wrong.group)[:40]!r}: expected text or a "
            "number"
        )
    seed = config.seed if config.split_seed is None else config.split_seed
    train, evaluation, rare = held_out(examples, config.eval_share, seed)
    if not evaluation or not train:
        raise ValueError(f"{path} has too few different texts to hold some out: use --eval-file, or --eval-share 0")
    for name in rare[:5]:
        say(f"the label {name!r} has too few different texts to hold one out")
    if len(rare) > 5:
        say(f"and so have {len(rare) - 5:,} more labels")
    share = len(evaluation) / len(examples)
    if abs(share - config.eval_share) > 0.2 * config.eval_share:
        why = "at least one example of each label" if share > config.eval_share else "equal texts and groups stay whole"
        say(f"{share:.1%} of the examples are held out, not {config.eval_share:.1%}: {why}")
    return train, evaluation
