"""Train, save and load tokenizers (the `tokenizers` library): BERT's WordPiece, RoBERTa's byte-level BPE."""

import base64
import hashlib
import json
import re
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from ..files import read_json, write
from ..hub import local
from .text import IDEOGRAPHS, cut_line, expand, read_documents

SPECIALS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
# RoBERTa's names for them, in the same order
BPE_SPECIALS = ("<pad>", "<unk>", "<s>", "</s>", "<mask>")
PREFIX = "##"
# WordPiece makes [UNK] of a longer word, so the trainer need not see it; an ideograph is a word of its own
LONGEST_WORD = 100
_TOO_LONG = re.compile(rf"[^\W{IDEOGRAPHS}]{{{LONGEST_WORD + 1},}}")
MAX_ALPHABET = 1000
# the trainers take memory for every piece before they begin
MAX_VOCABULARY = 1 << 22


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
    if vocab_size > MAX_VOCABULARY:
        raise ValueError(f"a vocabulary of {vocab_size} is too large: expected at most {MAX_VOCABULARY}")
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
        show_progress=progress and _has_terminal(),
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
    if vocab_size > MAX_VOCABULARY:
        raise ValueError(f"a vocabulary of {vocab_size} is too large: expected at most {MAX_VOCABULARY}")
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
        show_progress=progress and _has_terminal(),
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
        # the library takes many times the memory of a line
        for part in (part for line in document for part in cut_line(line, 1 << 16)):
            batch.append(_TOO_LONG.sub(" ", part))
            size += len(part)
            if size > 1 << 16:
                yield batch
                batch, size = [], 0
    yield batch


def _has_terminal():
    """Whether the library can show its bar, of which it writes a part to stdout. Rust panics where it cannot."""
    return sys.stdout is not None and sys.stdout.isatty()


def _check_size(vocab, vocab_size, min_frequency):
    if len(vocab) < vocab_size:
        raise ValueError(
            f"a vocabulary of {vocab_size} is larger than the text supports: it gave {len(vocab)} pieces that occur "
            f"at least {min_frequency} times; expected at most {len(vocab)}"
        )


def _wordpiece(vocab, lowercase=True, strip_accents=None, chinese=True, names=SPECIALS, added=(), kind="BertTokenizer"):
    """BERT's tokenizer for a vocabulary {piece: id}.

    names: its five special tokens. added: tokens of users. kind: transformers' class for it.
    """
    tokenizer = Tokenizer(
        models.WordPiece(
            vocab, unk_token=names[1], continuing_subword_prefix=PREFIX, max_input_chars_per_word=LONGEST_WORD
        )
    )
    tokenizer.normalizer = normalizers.BertNormalizer(
        lowercase=lowercase, strip_accents=strip_accents, handle_chinese_chars=chinese
    )
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(prefix=PREFIX)
    tokenizer.add_tokens(list(added))
    missing = [name for name in names if tokenizer.token_to_id(name) is None]
    if missing:
        raise ValueError(f"it has no {missing[0]} token")
    tokenizer.post_processor = _ends(tokenizer, kind, *names[2:4])
    tokenizer.add_special_tokens([name for name in names if name not in {token.content for token in added}])
    return tokenizer


def _ends(tokenizer, kind, cls, sep):
    """What transformers' class `kind` puts around texts: the tokens `cls` and `sep`."""
    ids = [(name, tokenizer.token_to_id(name)) for name in (cls, sep)]
    missing = [name for name, i in ids if i is None]
    if missing:
        raise ValueError(f"it has no {missing[0]} token")
    if kind in ("RobertaTokenizer", "MPNetTokenizer"):
        return processors.RobertaProcessing(ids[1], ids[0], True, False)
    second = [sep, sep, "$B", sep] if kind in _TWO_BETWEEN else [sep, "$B:1", f"{sep}:1"]
    return processors.TemplateProcessing(single=[cls, "$A", sep], pair=[cls, "$A", *second], special_tokens=ids)


def save_tokenizer(tokenizer, directory):
    """Write tokenizer.json, tokenizer_config.json and the vocabulary for transformers' AutoTokenizer."""
    directory = Path(directory)
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"{directory} cannot be written: {error.strerror or error}") from None
    write(directory / "tokenizer.json", tokenizer.to_str(pretty=True))
    config = {f"{name}_token": tokenizer.id_to_token(i) for name, i in special_ids(tokenizer)._asdict().items()}
    rules = json.loads(tokenizer.to_str())
    if isinstance(tokenizer.model, models.WordPiece):
        # a line for each id, an empty one for an id that no piece has
        pieces = (tokenizer.id_to_token(i) or "" for i in range(vocabulary_size(tokenizer)))
        write(directory / "vocab.txt", "".join(f"{piece}\n" for piece in pieces))
    else:
        try:
            with tempfile.TemporaryDirectory() as folder:
                contents = {Path(file).name: Path(file).read_bytes() for file in tokenizer.model.save(folder)}
        # the tokenizers library raises bare Exceptions
        except Exception as error:
            raise OSError(f"a temporary copy of the vocabulary cannot be written: {error}") from None
        for name, content in contents.items():
            write(directory / name, content)
    if isinstance(tokenizer.model, models.WordPiece) and config["cls_token"] == "[CLS]" and _is_berts(rules):
        config |= {
            "tokenizer_class": "BertTokenizer",
            "do_lower_case": rules["normalizer"]["lowercase"],
            "strip_accents": rules["normalizer"]["strip_accents"],
            "tokenize_chinese_chars": rules["normalizer"]["handle_chinese_chars"],
        }
    else:
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
        config |= {"bos_token": config["cls_token"], "eos_token": config["sep_token"]}
        if any(tokenizer.encode("a", "b").type_ids):
            # this class leaves them out unless told otherwise, and the second text of a pair would be of type 0
            config["model_input_names"] = ["input_ids", "token_type_ids", "attention_mask"]
    write(directory / "tokenizer_config.json", json.dumps(config, indent=2) + "\n")


def _is_berts(rules):
    """Whether a WordPiece tokenizer.json has nothing that transformers' BertTokenizer would not build."""
    normalizer, before, after = (rules[part] or {} for part in ("normalizer", "pre_tokenizer", "post_processor"))
    ends = [piece.get("SpecialToken", {}).get("id") for piece in after.get("single", [])]
    return (
        (normalizer.get("type"), normalizer.get("clean_text"), before.get("type"))
        == ("BertNormalizer", True, "BertPreTokenizer")
        and rules["model"]["max_input_chars_per_word"] == LONGEST_WORD
        and rules["model"]["continuing_subword_prefix"] == PREFIX
        and rules["model"]["unk_token"] == "[UNK]"
        and (ends == ["[CLS]", None, "[SEP]"] or after.get("type") == "BertProcessing")
    )


def load_tokenizer(path, *, as_saved=False, revision=None):
    """The tokenizers.Tokenizer of a directory (tokenizer.json, else vocab.txt), of one of these files, or of a name on
    the hub, at `revision`.

    It does what transformers' AutoTokenizer of the directory does: where tokenizer_config.json disagrees with
    tokenizer.json, the former counts. as_saved: tokenizer.json alone, for what `save_tokenizer` wrote.

    Raises FileNotFoundError if there is none, ValueError if it cannot be read or lacks BERT's special tokens.
    """
    file = path = local(path, revision, weights=False)
    if path.is_dir():
        file = next((path / name for name in ("tokenizer.json", "vocab.txt") if (path / name).is_file()), path)
    if not file.is_file():
        raise FileNotFoundError(f"no tokenizer in {path}: expected a folder with tokenizer.json or vocab.txt")
    try:
        settings = {} if as_saved else _settings(file.parent)
        text = file.read_text(encoding="utf-8")
        if file.name == "vocab.txt":
            vocab = {piece.rstrip(): i for i, piece in enumerate(text.removesuffix("\n").split("\n"))}
            tokenizer = _from_vocabulary(vocab, settings)
        else:
            tokenizer = _from_json(json.loads(text), settings)
    # the tokenizers library raises bare Exceptions, and where Rust panics what is none
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise ValueError(f"{file} is not a readable tokenizer: {error}") from None
    special_ids(tokenizer)
    return tokenizer


_WORDPIECE = ("BertTokenizer", "DistilBertTokenizer", "ElectraTokenizer", "MobileBertTokenizer", "MPNetTokenizer")
# the model of the classes that build a tokenizer anew, with the vocabulary of tokenizer.json
_MODELS = {
    **dict.fromkeys(_WORDPIECE, "WordPiece"),
    **dict.fromkeys(("RobertaTokenizer", "DebertaTokenizer"), "BPE"),
    **dict.fromkeys(("AlbertTokenizer", "XLMRobertaTokenizer", "DebertaV2Tokenizer"), "Unigram"),
}
# the id of <unk> in those whose vocabulary does not say it
_UNKNOWN = {"AlbertTokenizer": 1, "XLMRobertaTokenizer": 3}
# classes that put two [SEP] between the texts of a pair
_TWO_BETWEEN = ("DebertaTokenizer", "XLMRobertaTokenizer")
# transformers' class for the tokenizers of a model type, where tokenizer_config.json names none
_CLASSES = {
    "bert": "BertTokenizer",
    "electra": "BertTokenizer",
    "distilbert": "BertTokenizer",
    "mpnet": "MPNetTokenizer",
    "roberta": "RobertaTokenizer",
    "xlm-roberta": "XLMRobertaTokenizer",
    "deberta": "DebertaTokenizer",
    "deberta-v2": "DebertaV2Tokenizer",
    "albert": "AlbertTokenizer",
}


def _settings(folder):
    """What the files beside a tokenizer say about it: tokenizer_config.json, its class, the tokens that were added."""

    def read(name):
        return read_json(folder / name) if (folder / name).is_file() else {}

    model, settings = read("config.json"), read("tokenizer_config.json")
    added = settings.get("added_tokens_decoder")
    if added is None:
        settings |= read("special_tokens_map.json")
        added = {
            i: {"content": content, "special": content in map(_content, settings.values())}
            for content, i in read("added_tokens.json").items()
        }
        added = {i: token | {"normalized": not token["special"]} for i, token in added.items()} or None
    settings["added"] = added
    named = settings["is_named"] = settings.get("tokenizer_class") or model.get("tokenizer_class")
    named = named or _CLASSES.get(model.get("model_type"))
    # transformers does not believe what ModernBERT's directories say
    settings["class"] = None if model.get("model_type") == "modernbert" else str(named or "").removesuffix("Fast")
    return settings


def _content(token):
    """The text of a special token, which is a string or an object in the files."""
    return token.get("content") if isinstance(token, dict) else token


def _added_tokens(settings):
    tokens = sorted((settings.get("added") or {}).items(), key=lambda item: int(item[0]))
    return [AddedToken(**{key: value for key, value in token.items() if key != "id"}) for _, token in tokens]


def _names(kind, settings):
    """The five special tokens by the settings, else those of transformers' class `kind`."""
    usual = {
        "MPNetTokenizer": ("<pad>", "[UNK]", *BPE_SPECIALS[2:]),
        "AlbertTokenizer": ("<pad>", "<unk>", *SPECIALS[2:]),
    }
    names = usual.get(kind, BPE_SPECIALS if kind in ("RobertaTokenizer", "XLMRobertaTokenizer") else SPECIALS)
    parts = ("pad", "unk", "bos", "eos", "mask") if kind == "XLMRobertaTokenizer" else SpecialIds._fields
    return [_content(settings.get(f"{part}_token")) or name for part, name in zip(parts, names, strict=True)]


def _from_vocabulary(vocab, settings):
    """The tokenizer of a vocab.txt."""
    kind = settings.get("class") or "BertTokenizer"
    if kind not in (*_WORDPIECE, "PreTrainedTokenizer"):
        raise ValueError(f"a vocab.txt of the class {kind}, expected one of {', '.join(_WORDPIECE)}")
    names = _names(kind, settings)
    tokenizer = _wordpiece(
        vocab,
        settings.get("do_lower_case", True),
        settings.get("strip_accents"),
        settings.get("tokenize_chinese_chars", True),
        names,
        _added_tokens(settings),
        kind,
    )
    _add_special_tokens(tokenizer, settings, names)
    return tokenizer


def _add_special_tokens(tokenizer, settings, names):
    """Add the special tokens that the settings name, and `names`, as far as they are not there."""
    more = settings.get("extra_special_tokens") or settings.get("additional_special_tokens") or []
    named = (settings.get(f"{part}_token") for part in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
    there = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    # transformers adds whatever a key ending in _token names
    others = (x for key, x in settings.items() if key.endswith("_token") and isinstance(x, str | dict))
    for token in (*filter(None, named), *names, *others, *(more.values() if isinstance(more, dict) else more)):
        if (content := _content(token)) not in there:
            there.add(content)
            values = {key: value for key, value in token.items() if key != "__type"} if isinstance(token, dict) else {}
            tokenizer.add_special_tokens([AddedToken(**values) if values else content])
    tokenizer.encode_special_tokens = bool(settings.get("split_special_tokens"))


def _from_json(rules, settings):
    """The tokenizer of a tokenizer.json, with what transformers' class sets anew."""
    kind, added = settings.get("class"), _added_tokens(settings)
    model = rules["model"].get("type") or type(Tokenizer.from_str(json.dumps(rules)).model).__name__
    if model != _MODELS.get(kind, model) and not settings["is_named"]:
        kind = None
    elif model != _MODELS.get(kind, model):
        raise ValueError(
            f"it holds a {model} model, but the class {kind} has {_MODELS[kind]}: "
            "name the class PreTrainedTokenizerFast in tokenizer_config.json"
        )
    is_rebuilt, is_berts, is_bytes = kind in _MODELS, kind in _WORDPIECE, _MODELS.get(kind) == "BPE"
    names = _names(kind, settings)
    if is_berts:
        rules["model"] |= dict(
            unk_token=names[1], continuing_subword_prefix=PREFIX, max_input_chars_per_word=LONGEST_WORD
        )
    elif is_bytes:
        rules["model"] |= dict(
            dropout=None, unk_token=None, continuing_subword_prefix="", end_of_word_suffix="", fuse_unk=False,
            byte_fallback=False, ignore_merges=False,
        )  # fmt: skip
    elif kind in _UNKNOWN:
        rules["model"] |= dict(unk_id=_UNKNOWN[kind], byte_fallback=False)
    tokenizer = Tokenizer.from_str(
        json.dumps(rules | {"added_tokens": []} if is_rebuilt and settings.get("added_tokens_decoder") else rules)
    )
    # ignores those that are there
    tokenizer.add_tokens(added)
    _add_special_tokens(tokenizer, settings, names if is_rebuilt else [])
    if is_berts:
        tokenizer.normalizer = normalizers.BertNormalizer(
            lowercase=settings.get("do_lower_case", True),
            strip_accents=settings.get("strip_accents"),
            handle_chinese_chars=settings.get("tokenize_chinese_chars", True),
        )
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    elif is_bytes:
        tokenizer.normalizer = None
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=settings.get("add_prefix_space", False))
    elif kind == "XLMRobertaTokenizer":
        tokenizer.normalizer = next(iter(_precompiled(rules["normalizer"])), None)
    elif kind == "AlbertTokenizer":
        quotes = [normalizers.Replace("``", '"'), normalizers.Replace("''", '"')]
        accents = [] if settings.get("keep_accents", False) else [normalizers.NFKD(), normalizers.StripAccents()]
        case = [normalizers.Lowercase()] if settings.get("do_lower_case", True) else []
        tokenizer.normalizer = normalizers.Sequence([*quotes, *accents, *case, *_precompiled(rules["normalizer"])])
    elif kind == "DebertaV2Tokenizer":
        case = [normalizers.Lowercase()] if settings.get("do_lower_case", False) else []
        blanks = normalizers.Replace(Regex(r"\s{2,}|[\n\r\t]"), " ")
        end = normalizers.Strip(left=False, right=True)
        tokenizer.normalizer = normalizers.Sequence([*case, blanks, normalizers.NFC(), end])
        marks = [pre_tokenizers.Punctuation("isolated")] if settings.get("split_by_punct", False) else []
        scheme = "always" if settings.get("add_prefix_space", True) else "first"
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*marks, pre_tokenizers.Metaspace(prepend_scheme=scheme)])
    if kind in _UNKNOWN:
        scheme = "always" if settings.get("add_prefix_space", True) else "never"
        words = pre_tokenizers.Metaspace(prepend_scheme=scheme)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), words])
    if is_rebuilt:
        # whatever the settings name, ALBERT has these
        ends = SPECIALS[2:4] if kind == "AlbertTokenizer" else names[2:4]
        tokenizer.post_processor = _ends(tokenizer, kind, *ends)
    return tokenizer


def _precompiled(normalizer):
    """SentencePiece's own normalizer in the JSON of a normalizer, if it is there."""
    parts = (normalizer or {}).get("normalizers", [normalizer or {}])
    maps = [part["precompiled_charsmap"] for part in parts if part.get("type") == "Precompiled"]
    return [normalizers.Precompiled(base64.b64decode(table)) for table in maps]


def special_ids(tokenizer):
    """SpecialIds of a tokenizer, by BERT's or RoBERTa's names. Raises ValueError if one of the five is missing."""
    ids = []
    for names in zip(SPECIALS, BPE_SPECIALS):
        ids.append(next((i for i in map(tokenizer.token_to_id, names) if i is not None), None))
        if ids[-1] is None:
            raise ValueError(f"the tokenizer has no {names[0]} token: expected the vocabulary of an encoder")
    return SpecialIds(*ids)


def vocabulary_size(tokenizer):
    """The largest id plus 1. `Tokenizer.get_vocab_size` is less where ids have gaps."""
    return max(tokenizer.get_vocab().values(), default=-1) + 1


def check_vocabulary(tokenizer, config):
    """Raises ValueError if the tokenizer has ids without an embedding in a model of `config`."""
    pieces = vocabulary_size(tokenizer)
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
    pieces = [tokenizer.id_to_token(i) or "" for i in range(vocabulary_size(tokenizer))]
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
