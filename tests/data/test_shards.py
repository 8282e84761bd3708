"""Text -> shards: what they hold, restarts, damage, memory."""

import contextlib
import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from corpus import document_of, make_documents, small_tokenizer, write_text

from fastbert.data import shards
from fastbert.data.batches import MaskedBatches
from fastbert.data.shards import Shards, prepare
from fastbert.data.tokenizer import load_tokenizer, save_tokenizer, special_ids

ROOT = Path(__file__).resolve().parents[2]


def contents(directory):
    return {path.name: path.read_bytes() for path in sorted(Path(directory).iterdir())}


def test_shards_hold_the_text(shards, tokenizer):
    documents = make_documents(300)
    manifest = shards.manifest
    assert manifest["documents"] == 300
    assert manifest["sentences"] == sum(map(len, documents))
    assert manifest["tokens"] == sum(map(len, shards.tokens)) == shards.document_starts()[-1]
    assert manifest["dtype"] == "uint16" and all(tokens.dtype == np.uint16 for tokens in shards.tokens)
    for number in (0, 1, 150, 298, 299):
        ids = [tokenizer.encode(line, add_special_tokens=False).ids for line in documents[number]]
        assert document_of(shards, number) == ids
        a, b = shards.document_starts()[number : number + 2]
        assert b - a == sum(map(len, ids))


def test_lines_are_split_into_sentences_and_empty_ones_left_out(tmp_path, tokenizer):
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


def test_ids_with_gaps(tmp_path):
    """A vocab.txt with many equal lines has larger ids than pieces."""
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *["again"] * 66000, *"abcd", *(f"##{c}" for c in "abcd")]
    (tmp_path / "vocab.txt").write_text("".join(f"{piece}\n" for piece in pieces))
    tokenizer = load_tokenizer(tmp_path / "vocab.txt")
    text = write_text(tmp_path / "a.txt", [["ab cd again", "dd"]] * 20)
    manifest = prepare(text, tokenizer, tmp_path / "out", progress=False)
    assert (manifest["vocab_size"], manifest["dtype"]) == (len(pieces), "uint32") and tokenizer.get_vocab_size() == 14
    opened = Shards.open(tmp_path / "out")
    assert document_of(opened, 0)[0] == [pieces.index(piece) for piece in ("a", "##b", "c", "##d")] + [66004]
    for words in (True, False):
        batches = MaskedBatches(opened, max_seq_length=8, tokens_per_batch=32, whole_word_mask=words, num_workers=0)
        ids = {i for epoch in range(9) for batch in batches.epoch(epoch) for i in batch.input_ids.tolist()}
        assert ids <= set(tokenizer.get_vocab().values()) and len(ids) > 8
    # vocab.txt alone gives the same ids again
    (tmp_path / "out" / "tokenizer.json").unlink()
    assert load_tokenizer(tmp_path / "out").encode("ab cd").ids == tokenizer.encode("ab cd").ids


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
from fastbert.data import text as reading
from fastbert.data.shards import prepare
from fastbert.data.tokenizer import load_tokenizer
text, tokenizer, out, shard_tokens = sys.argv[1:]
prepare([text], load_tokenizer(tokenizer), out, shard_tokens=int(shard_tokens), num_workers=2, progress=False)
"""

# ru_maxrss would count the process that started this one, too
PEAK = """
for line in open("/proc/self/status"):
    if line.startswith("VmHWM"):
        print(line.split()[1])
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
    # a shard whose data did not survive is made again
    damaged = out / "shard-00003.tokens.npy"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    with pytest.warns(UserWarning, match="made again: shard-00003$"):
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
    message = r"out holds another preparation \(different: {}\): choose another directory or delete this one"
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


@pytest.mark.parametrize("is_one_line", [False, True], ids=["documents", "one line"])
def test_memory_does_not_grow_with_the_text(is_one_line, tmp_path, tokenizer):
    save_tokenizer(tokenizer, tmp_path / "tokenizer")
    # documents are cut at 16 MB: smaller here, so that a small text shows it
    code = PREPARE.replace("prepare(", "reading.MAX_SIZE = 1 << 18\nprepare(") + PEAK
    documents, peaks = make_documents(2000, lines=12), []
    if is_one_line:
        documents = [[" ".join(line.removesuffix(".") for document in documents for line in document)]]
    for copies in (1, 8):
        text = write_text(tmp_path / f"{copies}.txt", documents * copies)
        if is_one_line:
            Path(text).write_text(" ".join(documents[0] * copies))
        done = subprocess.run(
            [sys.executable, "-c", code, text, tmp_path / "tokenizer", tmp_path / f"out-{copies}", "100000"],
            cwd=ROOT, capture_output=True, text=True, check=True,
        )  # fmt: skip
        peaks.append(int(done.stdout) / 1024)
    assert os.path.getsize(text) > 4e6
    # one call of the tokenizer for all of the text would take some 60 times its size
    assert peaks[1] - peaks[0] < 12, f"peaks in MB: {peaks}"


def flip(path):
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)


def cut_short(path):
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize("damage", [flip, cut_short, Path.unlink])
@pytest.mark.parametrize("number, part", [(0, "tokens"), (1, "sentences"), (3, "documents")])
def test_damaged_shards_are_made_again(damage, number, part, tmp_path, tokenizer):
    text = write_text(tmp_path / "a.txt", make_documents(300))
    prepare([text], tokenizer, tmp_path / "out", shard_tokens=3000, progress=False)
    whole = contents(tmp_path / "out")
    damaged = tmp_path / "out" / f"shard-{number:05d}.{part}.npy"
    damage(damaged)
    with pytest.raises(ValueError, match=f"{damaged.name} (is damaged: its sha256|is missing or cannot be read)"):
        Shards.open(tmp_path / "out", verify=True)
    others = {
        path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.npy") if number != int(path.name[6:11])
    }
    assert len(others) >= 9
    with pytest.warns(UserWarning, match=f"out: damaged or missing, made again: shard-{number:05d}$"):
        prepare([text], tokenizer, tmp_path / "out", shard_tokens=3000, progress=False)
    assert contents(tmp_path / "out") == whole
    assert {path: path.stat().st_mtime_ns for path in others} == others
    # so is a tokenizer
    (tmp_path / "out" / "tokenizer.json").unlink()
    prepare([text], tokenizer, tmp_path / "out", shard_tokens=3000, progress=False)
    assert contents(tmp_path / "out") == whole
    # in a hurry, nothing is read
    damage(damaged)
    prepare([text], tokenizer, tmp_path / "out", shard_tokens=3000, progress=False, verify=False)


def test_shards_of_earlier_versions_are_made_again_as_a_whole(tmp_path, tokenizer):
    text, out = write_text(tmp_path / "a.txt", make_documents(300)), tmp_path / "out"
    prepare([text], tokenizer, out, shard_tokens=5000, progress=False)
    whole = contents(out)
    manifest = json.loads((out / "manifest.json").read_text())
    # they wrote no units and no sha256 of the text
    for record in manifest["shards"]:
        del record["units"]
    manifest["files"] = [row[:3] for row in manifest["files"]]
    (out / "manifest.json").write_text(json.dumps(manifest))
    assert prepare([text], tokenizer, out, shard_tokens=5000, progress=False) == manifest
    flip(out / "shard-00001.tokens.npy")
    with pytest.warns(UserWarning, match="made again"):
        prepare([text], tokenizer, out, shard_tokens=5000, progress=False)
    now = contents(out)
    assert {name: now[name] for name in now if name.endswith(".npy")} == {
        name: whole[name] for name in whole if name.endswith(".npy")
    }
    Shards.open(out, verify=True)


def test_text_counts_by_its_bytes(tmp_path, tokenizer):
    texts = [write_text(tmp_path / f"{name}.txt", make_documents(9, seed=i)) for i, name in enumerate("ab")]
    out = tmp_path / "out"
    manifest = prepare(texts, tokenizer, out, progress=False)
    os.utime(texts[0], (1, 1))
    assert prepare(texts, tokenizer, out, progress=False) == manifest
    os.rename(texts[0], tmp_path / "c.txt")
    moved = [str(tmp_path / "c.txt"), texts[1]]
    assert prepare(moved, tokenizer, out, progress=False) == manifest
    # the shards are whole: they do not need the text
    assert prepare(texts[1:], tokenizer, out, progress=False) == manifest
    flip(out / "shard-00000.tokens.npy")
    with (
        pytest.warns(UserWarning),
        pytest.raises(ValueError, match="some of the text is gone, so shard-00000 cannot be"),
    ):
        prepare(texts[1:], tokenizer, out, progress=False)
    # of the same size
    changed = Path(texts[1]).read_bytes()
    Path(texts[1]).write_bytes(changed[:-2] + b"?\n")
    with pytest.raises(ValueError, match=r"holds another preparation \(different: files\)"):
        prepare(moved, tokenizer, out, progress=False)


def test_text_that_changes_while_it_is_read_is_no_preparation(tmp_path, tokenizer, monkeypatch):
    text = tmp_path / "a.txt"
    write_text(text, make_documents(3))
    read = shards.read_documents

    def slow(*arguments, **more):
        yield from read(*arguments, **more)
        text.write_bytes(text.read_bytes()[::-1])

    monkeypatch.setattr(shards, "read_documents", slow)
    with pytest.raises(ValueError, match="a.txt changed while it was read"):
        prepare([text], tokenizer, tmp_path / "out", progress=False)
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_a_full_disk_is_one_line_and_leaves_no_half_file(tmp_path, tokenizer):
    text = write_text(tmp_path / "a.txt", make_documents(300))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    whole = tmp_path / "whole"
    prepare([text], tokenizer, whole, shard_tokens=5000, progress=False)
    try:
        for size, name in ((12_000, "shard-00000.tokens.npy"), (1000, "tokenizer.json")):
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
            with pytest.raises(OSError, match=f"{name} cannot be written: File too large") as caught:
                prepare([text], tokenizer, tmp_path / str(size), shard_tokens=5000, progress=False)
            assert "\n" not in str(caught.value)
            assert not [*(tmp_path / str(size)).glob("*.tmp"), *(tmp_path / str(size)).glob(name)]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    for directory in (tmp_path / "12000", tmp_path / "1000"):
        prepare([text], tokenizer, directory, shard_tokens=5000, progress=False)
        assert contents(directory) == contents(whole)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda m: m["shards"][1].update(name="../shard-00001"), "names the shard '../shard-00001': expected"),
        (lambda m: m["shards"][0]["sha256"].update(tokens=None), "shard-00000 has no sha256 of its tokens"),
        (lambda m: m["shards"][0].update(sha256=None), "shard-00000 has no sha256 of its tokens"),
        (lambda m: m["shards"][0].update(tokens=True), "tokens is True, expected a count"),
        (lambda m: m.update(tokens=7), "tokens is 7, its shards have"),
        (lambda m: m.update(vocab_size=-1), "vocab_size is -1, expected a count"),
        (lambda m: m.update(tokenizer=None), "tokenizer is None, expected a sha256"),
        (lambda m: m.update(files=[["a", 1]]), "files is no list of text files"),
        (lambda m: m.update(shards=[]), "it names no shards"),
        (lambda m: m.update(shards=[3]), "the record of shard 0 is no object"),
    ],
)  # fmt: skip
def test_odd_manifests(change, message, tmp_path, tokenizer):
    text, out = write_text(tmp_path / "a.txt", make_documents(60)), tmp_path / "out"
    manifest = prepare([text], tokenizer, out, shard_tokens=1000, progress=False)
    change(manifest)
    (out / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=message):
        Shards.open(out)


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
    fails(one, "shard-00000.tokens.npy is missing or cannot be read", verify=True)
    two = fresh("other type")
    path = two / "shard-00000.sentences.npy"
    np.save(path, np.load(path).astype(np.float32))
    fails(two, "shard-00000.sentences.npy has float32")
    np.save(path, np.load(path).astype(np.int64) + 1)
    fails(two, "shard-00000.sentences.npy is damaged: it does not end where the shard does")
    three = fresh("shorter")
    np.save(three / "shard-00000.documents.npy", np.arange(3))
    fails(three, r"has int64 \(3,\): the manifest says 21 entries")
    save_tokenizer(small_tokenizer(tmp_path, 140), fresh("tokenizer"))
    fails(tmp_path / "tokenizer", "holds another tokenizer than the one its shards were made with")
    five = fresh("manifest")
    for written, message in (
        ("{", "manifest.json cannot be read"),
        ("[]", "manifest.json holds no JSON object"),
        ('{"format": 99}', "manifest.json has format 99: expected 1"),
        ('{"format": 1}', "manifest.json is damaged: files is no list"),
    ):
        (five / "manifest.json").write_text(written)
        fails(five, message)


def units_without_end(records):
    records[-1]["units"] = 10**9


def units_that_fall(records):
    records[0]["units"] = records[1]["units"] + 1


def hash_of_another(records):
    records[2]["sha256"]["sentences"] = "0" * 64


@pytest.mark.parametrize("wrong", [units_without_end, units_that_fall, hash_of_another])
def test_a_record_that_is_wrong_loses_no_text(wrong, tmp_path, tokenizer):
    text = write_text(tmp_path / "a.txt", make_documents(300))
    prepare([text], tokenizer, tmp_path / "out", shard_tokens=3000, progress=False)
    whole, path = contents(tmp_path / "out"), tmp_path / "out" / "manifest.json"
    manifest = json.loads(path.read_text())
    wrong(manifest["shards"])
    path.write_text(json.dumps(manifest))
    flip(tmp_path / "out" / "shard-00001.tokens.npy")
    # a manifest that contradicts itself is made again as a whole, without a warning
    with contextlib.nullcontext() if wrong is units_that_fall else pytest.warns(UserWarning, match="made again"):
        prepare([text], tokenizer, tmp_path / "out", shard_tokens=3000, progress=False)
    assert contents(tmp_path / "out") == whole
