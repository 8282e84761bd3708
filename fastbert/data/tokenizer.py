"""Train, save and load tokenizers (the `tokenizers` library): BERT's WordPiece, RoBERTa's byte-level BPE."""

import hashlib
import json
import re
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from .text import expand, read_documents

SPECIALS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
# RoBERTa's names for them, in the same order
BPE_SPECIALS = ("<pad>", "<unk>", "<s>", "</s>", "<mask>")
PREFIX = "##"
# WordPiece makes [UNK] of a longer word, so the trainer need not see it; an ideograph is a word of its own
LONGEST_WORD = 100
_TOO_LONG = re.compile(rf"[^\W\u3400-\u9fff\uf900-\ufaff]{{{LONGEST_WORD + 1},}}")
MAX_ALPHABET = 1000


class SpecialIds(NamedTuple):
    """The ids of [PAD], [UNK], [CLS], [SEP] and [MASK], or of <pad>, <unk>, <s>, </s> and <mask>."""

    pad: int
    unk: int
    cls: int
    sep: int
    mask: int


def train_wordpiece(
    files, vocab_size=30522, *, text_column="text", layout="auto", lowercase=True, min_frequency=2, progress=True
):
    """Train a BERT tokenizer on text files of any type that `fastbert.data.text.read_documents` reads.

    The special tokens have the ids of bert-base-uncased: [PAD] 0, [UNK] 100, [CLS] 101, [SEP] 102, [MASK] 103, with
    [unused0] to [unused98] at 1 to 99. A vocabulary of less than 1000 has no unused tokens: the five have ids 0 to 4.
    lowercase=False trains a cased tokenizer. The same text always gives the same vocabulary with the same ids.

    Returns a tokenizers.Tokenizer. Raises ValueError when the text has fewer pieces than vocab_size, or when its
    letters alone are more.
    """
    files = expand(files)
    specials = list(SPECIALS)
    if vocab_size >= 1000:
        specials[1:1] = [f"[unused{i}]" for i in range(99)]
    # The trainer numbers letters in the order of a hash table, which differs between runs, and breaks ties between
    # merges by these numbers. With the alphabet as "special tokens" the numbers are fixed, and so is the vocabulary.
    blank = _wordpiece({token: i for i, token in enumerate(specials)}, lowercase)
    letters = Counter()
    for batch in _batches(files, text_column, layout):
        letters.update(blank.normalizer.normalize_str("\n".join(batch)))
    letters = {letter: count for letter, count in letters.items() if not letter.isspace()}
    alphabet = sorted(sorted(letters, key=lambda letter: (-letters[letter], letter))[:MAX_ALPHABET])
    inside = [PREFIX + letter for letter in alphabet if len(blank.pre_tokenizer.pre_tokenize_str(f"a{letter}")) == 1]
    if len(specials) + len(alphabet) + len(inside) > vocab_size:
        raise ValueError(
            f"a vocabulary of {vocab_size} is too small: special tokens and the letters of this text alone are "
            f"{len(specials) + len(alphabet) + len(inside)}"
        )
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size,
        min_frequency=min_frequency,
        special_tokens=specials + alphabet + inside,
        initial_alphabet=alphabet,
        limit_alphabet=len(alphabet),
        show_progress=progress,
    )
    blank.train_from_iterator(_batches(files, text_column, layout), trainer)
    vocab = blank.get_vocab()
    _check_size(vocab, vocab_size, min_frequency)
    return _wordpiece(vocab, lowercase)


def train_bpe(files, vocab_size=50265, *, text_column="text", layout="auto", min_frequency=2, progress=True):
    """Train a byte-level BPE tokenizer like RoBERTa's. It can encode any text and keeps case.

    The special tokens have the ids of roberta-base: <s> 0, <pad> 1, </s> 2, <unk> 3, and <mask> the last id. The same
    text always gives the same vocabulary. Returns a tokenizers.Tokenizer. Raises ValueError when the text has fewer
    pieces than vocab_size. Source: Radford et al. 2019, section 2.2.
    """
    files = expand(files)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    if vocab_size < len(letters) + len(BPE_SPECIALS):
        raise ValueError(
            f"a vocabulary of {vocab_size} is too small: the bytes and the special tokens are "
            f"{len(letters) + len(BPE_SPECIALS)}"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 1,
        min_frequency=min_frequency,
        special_tokens=["<s>", "<pad>", "</s>", "<unk>", *letters],
        show_progress=progress,
    )
    tokenizer.train_from_iterator(_batches(files, text_column, layout), trainer)
    vocab = tokenizer.get_vocab()
    _check_size([*vocab, "<mask>"], vocab_size, min_frequency)
    # a new tokenizer: the letters were special tokens for the trainer only
    merges = [tuple(pair) for pair in json.loads(tokenizer.to_str())["model"]["merges"]]
    made = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>"))
    made.pre_tokenizer, made.decoder = tokenizer.pre_tokenizer, tokenizer.decoder
    made.post_processor = processors.RobertaProcessing(
        ("</s>", 2), ("<s>", 0), trim_offsets=True, add_prefix_space=False
    )
    made.add_special_tokens(["<s>", "<pad>", "</s>", "<unk>"])
    # includes the blank before it, so that the next piece starts a word
    made.add_special_tokens([AddedToken("<mask>", lstrip=True)])
    return made


def _batches(files, text_column, layout):
    """Lists of lines, about 64 KB each, without words that are too long for a vocabulary."""
    batch, size = [], 0
    for document in read_documents(files, text_column=text_column, layout=layout):
        for line in document:
            batch.append(_TOO_LONG.sub(" ", line))
            size += len(line)
            if size > 1 << 16:
                yield batch
                batch, size = [], 0
    yield batch


def _check_size(vocab, vocab_size, min_frequency):
    if len(vocab) < vocab_size:
        raise ValueError(
            f"a vocabulary of {vocab_size} is larger than the text supports: it gave {len(vocab)} pieces that occur "
            f"at least {min_frequency} times; expected at most {len(vocab)}"
        )


def _wordpiece(vocab, lowercase):
    """BERT's tokenizer for a vocabulary {piece: id} that holds the five special tokens."""
    tokenizer = Tokenizer(
        models.WordPiece(
            vocab, unk_token="[UNK]", continuing_subword_prefix=PREFIX, max_input_chars_per_word=LONGEST_WORD
        )
    )
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(prefix=PREFIX)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", vocab["[CLS]"]), ("[SEP]", vocab["[SEP]"])],
    )
    tokenizer.add_special_tokens(list(SPECIALS))
    return tokenizer


def save_tokenizer(tokenizer, directory):
    """Write tokenizer.json, tokenizer_config.json and the vocabulary for transformers' AutoTokenizer."""
    directory = Path(directory)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        tokenizer.save(str(directory / "tokenizer.json"))
        config = {f"{name}_token": tokenizer.id_to_token(i) for name, i in special_ids(tokenizer)._asdict().items()}
        if isinstance(tokenizer.model, models.WordPiece):
            vocab = tokenizer.get_vocab()
            pieces = sorted(vocab, key=vocab.get)
            (directory / "vocab.txt").write_text("".join(f"{piece}\n" for piece in pieces), encoding="utf-8")
            rules = json.loads(tokenizer.to_str()).get("normalizer") or {}
            config |= {
                "tokenizer_class": "BertTokenizer",
                "do_lower_case": rules.get("lowercase", False),
                "strip_accents": rules.get("strip_accents"),
                "tokenize_chinese_chars": rules.get("handle_chinese_chars", True),
            }
        else:
            tokenizer.model.save(str(directory))
            config |= {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "bos_token": config["cls_token"],
                "eos_token": config["sep_token"],
            }
        text = json.dumps(config, indent=2) + "\n"
        (directory / "tokenizer_config.json").write_text(text, encoding="utf-8")
    except OSError as error:
        raise OSError(f"{directory} cannot be written: {error.strerror or error}") from None


def load_tokenizer(path):
    """The tokenizers.Tokenizer of a directory (tokenizer.json, else vocab.txt) or of one of these files.

    Raises FileNotFoundError if there is none, ValueError if it cannot be read or lacks BERT's special tokens.
    """
    path = Path(path)
    file = path
    if path.is_dir():
        file = next((path / name for name in ("tokenizer.json", "vocab.txt") if (path / name).is_file()), path)
    if not file.is_file():
        raise FileNotFoundError(f"no tokenizer in {path}: expected a folder with tokenizer.json or vocab.txt")
    try:
        text = file.read_text(encoding="utf-8")
        if file.name != "vocab.txt":
            tokenizer = Tokenizer.from_str(text)
        else:
            config = file.with_name("tokenizer_config.json")
            config = json.loads(config.read_text(encoding="utf-8")) if config.is_file() else {}
            pieces = text.removesuffix("\n").split("\n")
            vocab = {piece.removesuffix("\r"): i for i, piece in enumerate(pieces)}
            tokenizer = _wordpiece(vocab, config.get("do_lower_case", True))
    except KeyError as error:
        raise ValueError(f"{file} has no {error.args[0]} token: expected a BERT vocabulary") from None
    # the tokenizers library raises bare Exceptions
    except Exception as error:
        raise ValueError(f"{file} is not a readable tokenizer: {error}") from None
    special_ids(tokenizer)
    return tokenizer


def special_ids(tokenizer):
    """SpecialIds of a tokenizer, by BERT's or RoBERTa's names. Raises ValueError if one of the five is missing."""
    ids = []
    for names in zip(SPECIALS, BPE_SPECIALS):
        ids.append(next((i for i in map(tokenizer.token_to_id, names) if i is not None), None))
        if ids[-1] is None:
            raise ValueError(f"the tokenizer has no {names[0]} token: expected the vocabulary of an encoder")
    return SpecialIds(*ids)


def check_vocabulary(tokenizer, config):
    """Raises ValueError if the tokenizer has ids without an embedding in a model of `config`."""
    pieces = max(tokenizer.get_vocab().values(), default=-1) + 1
    if pieces > config.vocab_size:
        raise ValueError(f"the tokenizer has {pieces} pieces: the model has a vocab_size of {config.vocab_size}")


def tokenizer_hash(tokenizer):
    """sha256 (hex) of the tokenizer's JSON without truncation and padding, which do not change a text's ids."""
    rules = json.loads(tokenizer.to_str())
    for setting in ("truncation", "padding"):
        rules.pop(setting, None)
    return hashlib.sha256(json.dumps(rules, sort_keys=True).encode()).hexdigest()


def word_starts(tokenizer):
    """A list of bool by id: whether the piece begins a word.

    In WordPiece these are the pieces without its prefix. In byte-level BPE and SentencePiece they are the pieces that
    start with a blank, and the special tokens except the unknown one. Raises ValueError for other tokenizers.
    """
    pieces = [tokenizer.id_to_token(i) or "" for i in range(tokenizer.get_vocab_size())]
    if isinstance(tokenizer.model, models.WordPiece):
        prefix = tokenizer.model.continuing_subword_prefix
        return [not piece.startswith(prefix) for piece in pieces]
    blank = {"ByteLevel": "\u0120", "Metaspace": "\u2581"}.get(type(tokenizer.decoder).__name__)
    if blank is None:
        raise ValueError(
            f"whole words are not known for a {type(tokenizer.model).__name__} tokenizer with the decoder "
            f"{type(tokenizer.decoder).__name__}: expected WordPiece, byte-level BPE or SentencePiece"
        )
    ids = special_ids(tokenizer)
    special = set(ids) - {ids.unk}
    return [piece.startswith(blank) or i in special for i, piece in enumerate(pieces)]
