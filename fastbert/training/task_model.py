"""The model that fine-tuning starts from: an encoder with a task's head, kept where it fits, else new."""

import warnings
from pathlib import Path

import torch

from ..files import read_json
from ..model import families, hf_files


def model_for(config, kind, encoder_config, fields, resumed, log):
    """The model with the task's head: the directory's own if it is for the same labels, else drawn from the seed."""
    torch.manual_seed(config.seed)
    if hasattr(kind, "start"):
        # a retrieval model: `fields` are not those of its config
        return kind.start(config.model, encoder_config, **fields)
    wanted = encoder_config.replace(**{"labels": None} | fields)
    if resumed or not Path(config.model).is_dir():
        # a checkpoint's weights are loaded later
        return kind(wanted)
    stored = read_json(Path(config.model) / "config.json")
    architecture = (stored.get("architectures") or ["none"])[0]
    same = architecture == families.family(wanted.model_type).architectures.get(kind.__name__)
    with warnings.catch_warnings():
        # of a head that is missing: the log says what comes in its place
        warnings.simplefilter("ignore")
        if same and _same_labels(encoder_config, wanted):
            model = kind.from_pretrained(config.model, **_dropouts(encoder_config))
            _reorder(model, wanted)
            log.say(f"the head of {config.model} is for the same labels: it is trained further")
        else:
            fresh = {name: value for name, value in kind(wanted).state_dict().items() if name.startswith("classifier.")}
            changes = {name: value for name, value in fields.items() if name != "num_labels"}
            model = hf_files.load_model(
                kind, config.model, head=kind.__name__, other=fresh,
                **_dropouts(encoder_config) | {"num_labels": wanted.num_labels} | changes | {"labels": wanted.labels},
            )  # fmt: skip
            if architecture.endswith(("Classification", "Answering", "Choice")):
                log.say(
                    f"the head of {config.model} ({architecture}) is for another task or other labels: it is ignored, "
                    "a new one is drawn from --seed"
                )
            else:
                log.say("the head is new: it is drawn from --seed")
    return model


def _dropouts(config):
    return {name: getattr(config, name) for name in ("hidden_dropout_prob", "attention_probs_dropout_prob")}


def _same_labels(stored, wanted):
    if wanted.labels is None:
        return stored.num_labels == wanted.num_labels == 1 or wanted.num_labels == 2 == stored.num_labels
    folded = [sorted(name.casefold() for name in config.labels or ()) for config in (stored, wanted)]
    return folded[0] == folded[1] and len(set(folded[0])) == len(folded[0])


def _reorder(model, wanted):
    """Sort the rows of a stored classifier as the wanted labels, by name."""
    if wanted.labels is not None:
        places = {name.casefold(): i for i, name in enumerate(model.config.labels)}
        rows = torch.tensor([places[name.casefold()] for name in wanted.labels])
        with torch.no_grad():
            for parameter in model.classifier.parameters():
                parameter.copy_(parameter[rows])
    model.config = wanted
