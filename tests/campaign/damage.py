"""How files are damaged: at random, also inside of what is packed, so that checksums do not hide the rest."""

import gzip
import io
import json
import random
import re
import struct
import zipfile
import zlib

NUMBERS = (0, 1, -1, 2**7, 2**8 - 1, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**63 - 1, 2**64 - 1)
WORDS = (
    "0", "-1", "1e999", "NaN", "-Infinity", "null", "true", "[]", "{}", '""', '"x"', "9" * 400, "1e-320", "0.5",
    "2147483648",
    "\u00b2", "[[[[", "\ufeff", "\x00", "\n\n", "4294967296", "1" * 5000, '{"a":1,"a":2}',
)  # fmt: skip


def damaged(content: bytes, rng: random.Random) -> bytes:
    """The content with one to four faults."""
    inner = _inside(content, rng) if rng.random() < 0.6 else None
    if inner is not None:
        return inner
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        content = rng.choice(FAULTS)(content, rng)
    return content


def _place(content: bytes, rng: random.Random) -> int:
    """Somewhere, more often where headers and tables are."""
    length = len(content)
    return min(
        rng.choice((rng.randrange(64), rng.randrange(512), length - 1 - rng.randrange(256), rng.randrange(length + 1))),
        length,
    ) % (length + 1)


def _bit(content: bytes, rng: random.Random) -> bytes:
    at = min(_place(content, rng), len(content) - 1)
    return content[:at] + bytes([content[at] ^ (1 << rng.randrange(8))]) + content[at + 1 :] if content else b"\x01"


def _number(content: bytes, rng: random.Random) -> bytes:
    at, width = _place(content, rng), rng.choice((1, 2, 4, 8))
    value = (rng.choice(NUMBERS) + rng.randrange(-2, 3)) % 2 ** (8 * width)
    return content[:at] + value.to_bytes(width, rng.choice(("little", "big"))) + content[at + width :]


def _cut(content: bytes, rng: random.Random) -> bytes:
    return content[: rng.choice((_place(content, rng), len(content) // 2, 0, 60))]


def _drop(content: bytes, rng: random.Random) -> bytes:
    at = _place(content, rng)
    return content[:at] + content[at + rng.randrange(1, 64) :]


def _repeat(content: bytes, rng: random.Random) -> bytes:
    at, length = _place(content, rng), rng.choice((1, 8, 64, 4096))
    return content[:at] + content[at : at + length] * rng.choice((2, 3, 50)) + content[at + length :]


def _blank(content: bytes, rng: random.Random) -> bytes:
    at, length = _place(content, rng), rng.choice((4, 16, 512, 4096))
    return content[:at] + rng.choice((b"\0", b"\xff")) * length + content[at + length :]


def _noise(content: bytes, rng: random.Random) -> bytes:
    at, length = _place(content, rng), rng.choice((2, 8, 64))
    return content[:at] + rng.randbytes(length) + content[at + length :]


def _move(content: bytes, rng: random.Random) -> bytes:
    at, of, length = _place(content, rng), _place(content, rng), rng.choice((1, 4, 8, 64, 512))
    return content[:at] + content[of : of + length] + content[at + length :]


def _word(content: bytes, rng: random.Random) -> bytes:
    """Another word in place of a number or name of a text."""
    found = list(re.finditer(rb'"[^"\n]{0,40}"|-?[0-9][0-9.e+-]*|[a-zA-Z_]{3,}', content[:100_000]))
    if not found:
        return _noise(content, rng)
    start, end = rng.choice(found).span()
    return content[:start] + rng.choice(WORDS).encode() + content[end:]


FAULTS = (_bit, _bit, _number, _number, _number, _cut, _drop, _repeat, _blank, _noise, _move, _word, _word)


def _inside(content: bytes, rng: random.Random) -> bytes | None:
    """Damage what is packed in the content, and pack it again; None where nothing is."""
    if content[:2] == b"\x1f\x8b":
        return gzip.compress(damaged(gzip.decompress(content), rng), 1)
    if content[:4] == b"PK\x03\x04":
        return _in_zip(content, rng)
    if content[:4] == b"\x89PNG":
        return _in_png(content, rng)
    if content[8:9] == b"{" and len(content) > 8 + (length := struct.unpack("<Q", content[:8])[0]):
        header = damaged(content[8 : 8 + length], rng)
        return struct.pack("<Q", len(header)) + header + content[8 + length :]
    return _in_json(content, rng) if content[:1] in b"{[" and content else None


def _in_zip(content: bytes, rng: random.Random) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(out, "w") as new:
        members = old.infolist()
        hit = rng.choice([m for m in members if m.filename.endswith((".pkl", ".npy", ".jpg"))])
        for member in members:
            inner = old.read(member)
            new.writestr(member, damaged(inner, rng) if member is hit else inner)
    return out.getvalue()


def _in_png(content: bytes, rng: random.Random) -> bytes:
    """Damage one chunk, and give it the checksum that it then needs; pixels are damaged unpacked."""
    chunks, at = [], 8
    while at + 12 <= len(content):
        length = struct.unpack(">I", content[at : at + 4])[0]
        chunks.append((content[at + 4 : at + 8], content[at + 8 : at + 8 + length]))
        at += 12 + length
    hit = rng.randrange(len(chunks))
    kind, body = chunks[hit]
    chunks[hit] = kind, zlib.compress(damaged(zlib.decompress(body), rng)) if kind == b"IDAT" else damaged(body, rng)
    packed = (struct.pack(">I", len(b)) + k + b + struct.pack(">I", zlib.crc32(k + b)) for k, b in chunks)
    return content[:8] + b"".join(packed)


def _in_json(content: bytes, rng: random.Random) -> bytes:
    """Another value of any type in one place."""
    try:
        root = json.loads(content)
    except ValueError:
        return content[:-1]
    places, todo = [], [root]
    while todo:
        node = todo.pop()
        for key in node if isinstance(node, dict) else range(len(node)):
            places.append((node, key))
            todo += [node[key]] if isinstance(node[key], (dict, list)) else []
    node, key = rng.choice(places)
    others = (None, True, -1, 0, 2**31, 2**63, 1e308, 1e-320, "x", [], {}, [1] * 17, [[1]], {"a": 1}, "9" * 30, 10**25)
    node[key] = rng.choice(others)
    return json.dumps(root).encode()
