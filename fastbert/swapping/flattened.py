"""What runs in place of HuggingFace's models whose flattened batches need care: positions, or a refusal."""

import torch

from .steps import Replacement, by_name


def first_positions(position_ids, cu_seqlens):
    """The position of the first token of each sequence in a flattened batch; of an empty one at the end, the last's."""
    return position_ids.flatten()[cu_seqlens[:-1].long().clamp(max=position_ids.numel() - 1)]


class RobertaModel(Replacement):
    """Flattened batches: their collator counts positions from 0, this family's table from `padding_idx + 1`."""

    RUNS = {"attention": "positions of flattened batches counted from padding_idx + 1"}

    def forward(self, *args, **kwargs):
        kwargs = by_name(self, args, kwargs)
        cu_seqlens, position_ids = kwargs.get("cu_seq_lens_q"), kwargs.get("position_ids")
        if cu_seqlens is not None and position_ids is not None:
            starts = first_positions(position_ids, cu_seqlens)
            offset = self.config.pad_token_id + 1
            kwargs["position_ids"] = torch.where((starts == 0).any(), position_ids + offset, position_ids)
        return super().forward(**kwargs)


class MPNetModel(Replacement):
    """And DeBERTa: their attention knows no flattened sequences."""

    RUNS = {"attention": "refuses flattened sequences, which the original mixes"}

    def forward(self, *args, **kwargs):
        refuse_flattened(self, kwargs)
        return super().forward(*args, **kwargs)


def refuse_flattened(model, kwargs):
    """Raises ValueError for flattened sequences given to a model, with a head or without, that would mix them."""
    if kwargs.get("cu_seq_lens_q") is not None and isinstance(model.base_model, MPNetModel):
        raise ValueError(f"cu_seq_lens_q is given: {type(model).__name__} would mix the sequences, pad them")
