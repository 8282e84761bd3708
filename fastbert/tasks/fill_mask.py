"""Fill in the words that [MASK] replaces."""

import torch

from .. import hub
from ..data.tokenizer import check_vocabulary, load_tokenizer, special_ids, vocabulary_size
from ..model.heads import MaskedLM
from ..packing import Batch


def load_masked_lm(directory, revision=None, dtype="fp32"):
    """(MaskedLM, tokenizers.Tokenizer) of a directory or a name on the hub, on the GPU if there is one. dtype: on a
    CPU, see `Encoder.set_dtype`."""
    directory = hub.local(directory, revision)
    if not (directory / "config.json").is_file():
        raise FileNotFoundError(f"no model in {directory}: expected a folder with config.json and model.safetensors")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        if dtype not in ("fp32", "auto"):
            raise ValueError(f"dtype is {dtype!r} on the device cuda: bf16 and int8 are for a CPU")
        dtype = "fp32"
    model = MaskedLM.from_pretrained(directory, dtype=dtype)
    tokenizer = load_tokenizer(directory)
    check_vocabulary(tokenizer, model.config)
    return model.to(device), tokenizer


@torch.no_grad()
def fill_mask(model, tokenizer, text, top_k=5):
    """The most likely words for every [MASK] (or <mask>) in `text`, from left to right.

    Returns one list per [MASK] of `top_k` pairs (word, probability), best first. Words are spelled as the tokenizer
    spells them: in WordPiece ## marks a continuation. Raises ValueError when there is no [MASK] or the text is longer
    than the model's positions.
    """
    special = special_ids(tokenizer)
    positions, vocab_size = model.config.max_length, tokenizer.get_vocab_size()
    if not 1 <= top_k <= vocab_size:
        raise ValueError(f"top_k is {top_k}: expected 1 to {vocab_size}")
    tokenizer.encode_special_tokens = False
    # a tokenizer.json may ask for padding or truncation
    tokenizer.no_truncation()
    tokenizer.no_padding()
    for mask in ("[MASK]", "<mask>"):
        text = text.replace(mask, tokenizer.id_to_token(special.mask))
    ids = torch.tensor([special.cls, *tokenizer.encode(text, add_special_tokens=False).ids, special.sep])
    rows = (ids == special.mask).nonzero()[:, 0]
    if not len(rows):
        raise ValueError("the text has no [MASK]: write it in place of the word to find")
    if len(ids) > positions:
        raise ValueError(f"the text has {len(ids)} tokens: the model has {positions} positions")
    batch = Batch(
        ids, torch.arange(len(ids)), torch.zeros_like(ids), torch.tensor([0, len(ids)], dtype=torch.int32), len(ids)
    )
    device = next(model.parameters()).device
    # the model's vocabulary may be rounded up beyond the tokenizer's
    logits = model.eval().logits(batch.to(device), rows.to(device))[:, : vocabulary_size(tokenizer)].float()
    logits[:, [i for i in range(logits.shape[1]) if tokenizer.id_to_token(i) is None]] = -torch.inf
    probabilities, words = logits.softmax(-1).topk(top_k)
    return [
        [(tokenizer.id_to_token(word), probability) for word, probability in zip(*row, strict=True)]
        for row in zip(words.tolist(), probabilities.tolist(), strict=True)
    ]
