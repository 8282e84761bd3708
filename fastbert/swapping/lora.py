"""transformers' own model of a task, which an adapter of peft is trained on."""

from torch import nn

from .mechanism import swap


def encoder_on_meta(values):
    """transformers' encoder of these contents of a config.json, without memory."""
    import torch
    import transformers

    with torch.device("meta"):
        return transformers.AutoModel.from_config(transformers.AutoConfig.for_model(**values))


def plain_model(values, architecture, tensors):
    """transformers' model `architecture`. values: the contents of its config.json. tensors: {its name: tensor}, all."""
    import transformers

    model = getattr(transformers, architecture)(transformers.AutoConfig.for_model(**values))
    model.load_state_dict(tensors)
    return model


def linear_layers(model, head):
    """The names that the encoder's linear layers have inside their parents, sorted. head: modules outside of it."""
    found = {
        name.rpartition(".")[2]
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and not any(name == one or name.startswith(f"{one}.") for one in head)
    }
    return sorted(found)


def swapped_in_place(model):
    swap(model)
    return model
