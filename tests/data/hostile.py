"""Text files and manifests as nobody should write them, for the tests and for fuzzing: pure functions of a seed."""

import copy
import csv
import gzip
import io
import json
import random

from corpus import make_documents

ODD_VALUES = [
    None, True, -1, 0, 1, 1.5, 2**31, 2**63, 10**30, float("nan"), float("inf"), "", "x", "../x", "/etc/passwd",
    "a\0b", "\ud800", "1", [], [[]], [None], {}, {"a": None},
]  # fmt: skip
PIECES = [
    b"", b"\0", b"\0" * 50, b"\n", b"\r", b"\r\n\r\n", b'"', b'"""', b",", b",,,,", b"{", b"[" * 3000, b"\\",
    b"\\ud800", b"\xff", b"\xfe\xff", b"\xff\xfe", b"\xef\xbb\xbf", b"\xed\xa0\x80", b"\xf4\x90\x80\x80", b"\xc2\x85",
    b"\x1a", b"PAR1", b"\x1f\x8b\x08", b"9" * 5000, b"1e999", b"NaN", "\u2028\u200b\u0301\ufffd\U0001f600".encode(),
    b" " * 3000, b"word" * 3000,
]  # fmt: skip
ENCODINGS = ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-be", "latin-1", "gbk"]


def _well_formed(kind, draw):
    """The content of a small file of a kind, as bytes."""
    texts = ["\n".join(document) for document in make_documents(draw.randint(1, 6), seed=draw.random())]
    texts.append('Zürich, "zwei" 東京\tñ')
    if kind == "txt":
        text = "\n\n".join(texts)
    elif kind == "jsonl":
        text = "".join(
            json.dumps({"id": i, "text": t}, ensure_ascii=draw.random() < 0.5) + "\n" for i, t in enumerate(texts)
        )
    elif kind == "csv":
        file = io.StringIO()
        csv.writer(file).writerows([["id", "text"], *enumerate(texts)])
        text = file.getvalue()
    else:
        import pyarrow as pa
        import pyarrow.parquet as pq

        file = io.BytesIO()
        columns = draw.choice([texts, [None] * len(texts), [*texts[:-1], None]])
        pq.write_table(pa.table({"id": range(len(texts)), "text": pa.array(columns, pa.string())}), file)
        return file.getvalue()
    return text.encode(draw.choice(ENCODINGS), "replace")


def texts(seed, count):
    """Yields `count` pairs (file name, content in bytes): well-formed files with up to six faults."""
    draw = random.Random(seed)
    for number in range(count):
        kind = draw.choice(["txt", "txt", "jsonl", "csv", "parquet"])
        data = bytearray(_well_formed(kind, draw))
        for _ in range(draw.randint(0, 6)):
            place = draw.randint(0, len(data))
            fault = draw.choice(["flip", "cut", "insert", "insert", "insert", "repeat", "drop"])
            if fault == "flip" and data:
                data[min(place, len(data) - 1)] ^= 1 << draw.randint(0, 7)
            elif fault == "cut":
                del data[place:]
            elif fault == "insert":
                data[place:place] = draw.choice(PIECES)
            elif fault == "repeat":
                data[place:place] = data[place : place + 200] * 3
            else:
                del data[place : place + draw.randint(1, 20)]
        name = f"{number}.{kind}"
        if kind != "parquet" and draw.random() < 0.2:
            name, data = f"{name}.gz", bytearray(gzip.compress(data))
            if draw.random() < 0.5:
                data[draw.randint(0, len(data) - 1)] ^= 1 << draw.randint(0, 7)
                del data[draw.randint(1, len(data)) :]
        yield name, bytes(data)


def _places(value, path=()):
    """The path of every value inside a JSON value."""
    if path:
        yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from _places(inner, (*path, key))


def manifests(manifest, seed, count):
    """Yields `count` contents of a JSON file, as bytes: `manifest`, a dict, with one to three odd values."""
    draw = random.Random(seed)
    places = list(_places(manifest))
    yield b"[" * 200_000
    yield b'{"a":' * 100_000
    for _ in range(count - 2):
        changed = copy.deepcopy(manifest)
        for _ in range(draw.randint(1, 3)):
            *outer, key = draw.choice(places)
            inside = changed
            try:
                for step in outer:
                    inside = inside[step]
                if draw.random() < 0.2:
                    del inside[key]
                else:
                    inside[key] = draw.choice(ODD_VALUES)
            except (TypeError, LookupError):
                # an earlier change took the place away
                continue
        data = bytearray(json.dumps(changed).encode())
        if draw.random() < 0.1:
            data[draw.randint(0, len(data) - 1)] ^= 1 << draw.randint(0, 7)
        yield bytes(data)
