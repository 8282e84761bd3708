"""SentencePiece tokenizers as ALBERT, XLM-R and DeBERTa-v3 have them in tokenizer.json: read, prepared, trained on."""

import json

import pytest
import torch
import transformers
from corpus import make_documents, write_text
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from fastbert.data.shards import Shards, prepare
from fastbert.data.tokenizer import load_tokenizer, save_tokenizer, special_ids, tokenizer_hash, word_starts
from fastbert.model import hf_files
from fastbert.model.heads import MaskedLM
from fastbert.model.sentences import SentenceEmbedder
from fastbert.tasks.fill_mask import fill_mask, load_masked_lm
from fastbert.training import log
from fastbert.training.pretrain import PretrainConfig, pretrain

# family -> pad, unk, cls, sep, mask; the ids that the published files give them, -1 for the last
FAMILIES = {
    "albert": (("<pad>", "<unk>", "[CLS]", "[SEP]", "[MASK]"), (0, 1, 2, 3, 4)),
    "xlm-roberta": (("<pad>", "<unk>", "<s>", "</s>", "<mask>"), (1, 3, 0, 2, -1)),
    "deberta-v2": (("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"), (0, 3, 1, 2, -1)),
}
PIECES = 150


def sentencepiece(family, files):
    """A Unigram tokenizer of PIECES pieces with the parts and special tokens of the family's published one."""
    names, ids = FAMILIES[family]
    pad, unk, cls, sep, mask = names
    order = [name for _, name in sorted(zip((i % 1000 for i in ids), names))]
    made = Tokenizer(models.Unigram())
    made.normalizer = normalizers.Sequence(
        [normalizers.NFKC(), *([normalizers.Lowercase()] if family == "albert" else [])]
    )
    made.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()])
    made.decoder = decoders.Metaspace()
    is_last = ids[-1] == -1
    first = order[:-1] if is_last else order
    made.train(files, trainers.UnigramTrainer(
        vocab_size=PIECES - is_last, special_tokens=first, unk_token=unk, show_progress=False,
    ))  # fmt: skip
    assert made.get_vocab_size() == PIECES - is_last
    made.add_special_tokens(order)
    second = f"{sep} {sep} $B {sep}" if family == "xlm-roberta" else f"{sep} $B:1 {sep}:1"
    made.post_processor = processors.TemplateProcessing(
        single=f"{cls} $A {sep}", pair=f"{cls} $A {second}",
        special_tokens=[(name, made.token_to_id(name)) for name in (cls, sep)],
    )  # fmt: skip
    return made


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture
def text(tmp_path):
    return write_text(tmp_path / "text.txt", make_documents(60))


@pytest.fixture
def tokenizer(family, text, tmp_path):
    """Read back from a published directory: tokenizer.json alone."""
    (tmp_path / "published").mkdir()
    sentencepiece(family, [text]).save(str(tmp_path / "published" / "tokenizer.json"))
    return load_tokenizer(tmp_path / "published")


def test_special_ids(family, tokenizer):
    assert list(special_ids(tokenizer)) == [i % PIECES for i in FAMILIES[family][1]]


def test_words_begin_with_their_blank(tokenizer):
    starts, special = word_starts(tokenizer), special_ids(tokenizer)
    assert len(starts) == PIECES
    sentence = "bada kilozuvo tefi."
    encoding = tokenizer.encode(sentence, add_special_tokens=False)
    begun = [encoding.tokens[n] for n, i in enumerate(encoding.ids) if starts[i]]
    assert len(begun) == 3 < len(encoding.ids) and all(piece.startswith("\u2581") for piece in begun)
    assert [starts[i] for i in special] == [True, False, True, True, True]
    # a letter that is not known belongs to its word
    unknown = tokenizer.encode("ba \u65e5da", add_special_tokens=False)
    assert special.unk in unknown.ids and sum(starts[i] for i in unknown.ids) == 2
    assert tokenizer.decode(encoding.ids) == sentence


def test_what_is_saved_is_read_by_transformers(tokenizer, tmp_path):
    save_tokenizer(tokenizer, tmp_path / "saved")
    assert tokenizer_hash(load_tokenizer(tmp_path / "saved")) == tokenizer_hash(tokenizer)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "saved")
    for sentence in ("bada kilozuvo, tefi.", "", "  Ünknown 日本"):
        assert theirs(sentence)["input_ids"] == tokenizer.encode(sentence).ids
    pair, own = theirs("ba", "da"), tokenizer.encode("ba", "da")
    assert pair["input_ids"] == own.ids
    assert pair.get("token_type_ids", [0] * len(own.ids)) == own.type_ids
    assert [theirs.pad_token_id, theirs.unk_token_id, theirs.cls_token_id, theirs.sep_token_id,
            theirs.mask_token_id] == list(special_ids(tokenizer))  # fmt: skip


def small_config(family, vocab_size, tokenizer):
    """The contents of a config.json: two layers of 32."""
    config = hf_files.config_from_hf(dict(
        model_type=family, vocab_size=vocab_size, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=48, max_position_embeddings=64, pad_token_id=special_ids(tokenizer).pad,
        **(dict(embedding_size=16) if family == "albert" else {}),
        **(dict(relative_attention=True, pos_att_type=["p2c", "c2p"], position_buckets=8, share_att_key=True,
                norm_rel_ebd="layer_norm", position_biased_input=False) if family == "deberta-v2" else {}),
    ))  # fmt: skip
    return hf_files.config_to_hf(config)


def test_prepared_and_pretrained_on(family, tokenizer, text, tmp_path, monkeypatch):
    # its import takes seconds
    monkeypatch.setattr(log, "_tensorboard", lambda *_: None)
    prepare([text], tokenizer, tmp_path / "shards", progress=False)
    shards = Shards.open(tmp_path / "shards")
    assert tokenizer_hash(shards.tokenizer) == tokenizer_hash(tokenizer)
    documents = make_documents(60)
    pieces = sum(len(tokenizer.encode(line, add_special_tokens=False).ids) for lines in documents for line in lines)
    assert shards.manifest["tokens"] == pieces

    (tmp_path / "model.json").write_text(json.dumps(small_config(family, PIECES, tokenizer)))
    options = dict(
        train_file=tmp_path / "shards", model=tmp_path / "model.json", max_seq_length=24, tokens_per_batch=256,
        learning_rate=3e-3, logging_steps=1, eval_steps=100, whole_word_mask=True, dropout=0.0,
    )  # fmt: skip
    pretrain(PretrainConfig(**options, output_dir=tmp_path / "run", max_steps=12))
    losses = [row["loss"] for row in log.read_metrics(tmp_path / "run") if "loss" in row]
    assert losses[-1] < losses[0] - 0.1
    model, again = load_masked_lm(tmp_path / "run")
    assert tokenizer_hash(again) == tokenizer_hash(tokenizer)
    (guesses,) = fill_mask(model, again, "bada [MASK], tefi.")
    assert len(guesses) == 5 and all(0 < probability < 1 for _, probability in guesses)
    theirs, info = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / "run", output_loading_info=True)
    assert not any(info.values()), info
    ids = torch.tensor([tokenizer.encode("bada kilozuvo, tefi.").ids])
    assert (theirs.eval()(ids).logits - model.cpu()(ids).logits).abs().max() < 1e-4


def test_more_pieces_than_embeddings_is_one_clear_line(family, tokenizer, text, tmp_path):
    def refuses(call):
        with pytest.raises(ValueError, match=rf"the tokenizer has {PIECES} pieces: .* a vocab_size of 149") as caught:
            call()
        assert "\n" not in str(caught.value)

    config = small_config(family, PIECES - 1, tokenizer)
    (tmp_path / "model.json").write_text(json.dumps(config))
    options = dict(train_file=text, model=tmp_path / "model.json", output_dir=tmp_path / "run", max_seq_length=24)
    refuses(lambda: pretrain(PretrainConfig(**options, tokenizer=tmp_path / "published")))

    model = MaskedLM(hf_files.config_from_hf(config))
    model.save_pretrained(tmp_path / "model")
    tokenizer.save(str(tmp_path / "model" / "tokenizer.json"))
    refuses(lambda: load_masked_lm(tmp_path / "model"))
    refuses(lambda: SentenceEmbedder.from_pretrained(tmp_path / "model"))
    refuses(lambda: SentenceEmbedder(model.config, tokenizer))
