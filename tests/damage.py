"""Damage to files: JSON values that nobody expects, and bytes that are cut, flipped, repeated or inserted."""

import json

VALUES = (
    None, True, False, -1, 0, 1, 2, 0.5, -0.0, 1e9, 10**9, 2**31, 2**63, 10**400, float("nan"), float("inf"), 1e-320,
    "", "0", "x", "nan", "\0", "\ud800", "..", "../../etc/passwd", "/etc/passwd", "C:\\x", "a" * 5000, [], {}, [None],
    [[]], ["x", 1], {"x": None}, {"": {}}, [0] * 1000,
)  # fmt: skip
TEXTS = (
    b"\xff\xfe", b"\xef\xbb\xbf", b"\xfe\xff\0", b"\0", b"\0\0\0", b"\xc3", b"\xf0\x9f\x98", b"\xed\xa0\x80", b"\r",
    b"\x1a", b'"', b'""', b"'", b",", b",,,,", b"\t", b"{", b"}", b"[" * 3000, b"\\u", b"\\ud800", b"null", b"NaN",
    b"-1", b"1e999", b"\n\n\n", b" " * 70000, b"a" * 70000, "\u2028\u0085\u200b".encode(), "\ufdfa".encode() * 50,
)  # fmt: skip


def nested(value, path=()):
    """The places of a JSON value: tuples of keys."""
    yield path
    if isinstance(value, dict | list):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield from nested(value[key], (*path, key))


def mutate_json(value, draw):
    """A JSON value with one to three places replaced, dropped, added or swapped."""
    value = json.loads(json.dumps(value))
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        places = list(nested(value))
        path = draw.choice(places)
        if not path:
            # the whole document, now and then
            if draw.random() < 0.2:
                return draw.choice(VALUES)
            continue
        holder = value
        for key in path[:-1]:
            holder = holder[key]
        kind, key = draw.random(), path[-1]
        if kind < 0.6:
            holder[key] = draw.choice(VALUES)
        elif kind < 0.75:
            del holder[key]
        elif kind < 0.85 and isinstance(holder, dict):
            holder[draw.choice(("x", "", key + " ", key.upper()))] = draw.choice(VALUES)
        else:
            # what stands elsewhere in the same document
            other = value
            for step in draw.choice(places):
                other = other[step]
            holder[key] = json.loads(json.dumps(other))
    return value


def mutate_bytes(data, draw):
    """Bytes that are cut, flipped, repeated or have something hostile in them."""
    for _ in range(draw.choice((1, 1, 2, 5))):
        at = draw.randint(0, len(data))
        kind = draw.random()
        if kind < 0.15:
            data = data[:at]
        elif kind < 0.35 and data:
            at = min(at, len(data) - 1)
            data = data[:at] + bytes([data[at] ^ 1 << draw.randrange(8)]) + data[at + 1 :]
        elif kind < 0.5:
            end = draw.randint(at, min(len(data), at + 200))
            data = data[:at] + data[at:end] * draw.choice((0, 2, 50)) + data[end:]
        else:
            data = data[:at] + draw.choice(TEXTS) + data[at:]
    return data


def mutate_file(path, draw):
    """Damage a file as JSON or as bytes, or take it away, or put something else in its place."""
    kind, value = draw.random(), None
    if path.suffix == ".json" and kind < 0.75:
        try:
            value = json.dumps(mutate_json(json.loads(path.read_text(encoding="utf-8")), draw))
        except (ValueError, RecursionError):
            # damaged before: as bytes
            kind = 0.8
    if value is not None:
        path.write_text(value)
    elif kind < 0.92:
        path.write_bytes(mutate_bytes(path.read_bytes(), draw))
    else:
        path.unlink()
        if draw.random() < 0.5:
            path.mkdir()
