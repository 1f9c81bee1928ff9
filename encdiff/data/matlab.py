"""One array of bytes out of a MATLAB file, version 5: SciPy's reader ends the process on some damaged ones.

Only what Cars3D's files are made of is read: arrays of numbers at the top, plain or packed by zlib. Nothing is
allocated that the file cannot hold.
"""

from __future__ import annotations

import math
import struct
import zlib
from collections.abc import Iterator

import numpy as np

HEAD, TAG = 128, 8  # bytes before the first element, and before an element's content
MATRIX, COMPRESSED = 14, 15
CLASSES = {
    6: "float64", 7: "float32", 8: "int8", 9: "uint8", 10: "int16", 11: "uint16", 12: "int32", 13: "uint32",
    14: "int64", 15: "uint64",
}  # fmt: skip
TIGHTEST = 1032  # zlib makes at most so many bytes of one
MOST = 2**28  # bytes of an array that is still unpacked


def read_arrays(content: bytes) -> dict[str, tuple[str, tuple[int, ...], memoryview]]:
    """Type, shape and bytes (of uint8, in Fortran order) of each array by name; ValueError for a damaged file."""
    if len(content) < HEAD or content[126:128] not in (b"IM", b"MI"):
        raise ValueError("no header of version 5")
    order = "<" if content[126:128] == b"IM" else ">"
    found = {}
    for kind, body in _elements(memoryview(content)[HEAD:], order):
        if kind == COMPRESSED:
            ((kind, body),) = _elements(_unpacked(body, order), order)
        if kind == MATRIX and (matrix := _matrix(body, order)):
            name, form, shape, data = matrix
            found[name] = form, shape, data
    return found


def array_of(shape: tuple[int, ...], content: memoryview) -> np.ndarray:
    """uint8 of that shape."""
    return np.frombuffer(content, np.uint8).reshape(shape, order="F")


def _unpacked(body: memoryview, order: str) -> memoryview:
    """One packed element, no more of it than its own beginning declares."""
    stream = zlib.decompressobj()
    try:
        head = stream.decompress(body, TAG)
        size = struct.unpack(f"{order}II", head)[1]
        if size > min(TIGHTEST * len(body), MOST):
            raise ValueError(f"{size} bytes packed in {len(body)}")
        rest = stream.decompress(stream.unconsumed_tail, size) if size else b""
    except (zlib.error, struct.error) as error:
        raise ValueError(str(error)) from None
    return memoryview(head + rest)


def _elements(content: memoryview, order: str) -> Iterator[tuple[int, memoryview]]:
    """Kind and bytes of the elements that lie one behind the other."""
    at = 0
    while at < len(content):
        kind, size = struct.unpack_from(f"{order}II", content, at) if len(content) >= at + TAG else (0, len(content))
        start, end = at + TAG, at + TAG + size
        if kind >> 16:  # a small one, inside of its own tag
            start, end, kind = at + 4, at + 4 + (kind >> 16), kind & 0xFFFF
            if end > at + TAG:
                raise ValueError("a small element of more than 4 bytes")
        if end > len(content):
            raise ValueError("an element ends behind the file")
        yield kind, content[start:end]
        at = max(at + TAG, end if kind == COMPRESSED else end + -(end - at) % 8)


def _matrix(body: memoryview, order: str) -> tuple[str, str, tuple[int, ...], memoryview] | None:
    """Name, type, shape and bytes of an array; of other types than uint8 no bytes, of what is no numbers None."""
    parts = _elements(body, order)
    try:
        dtype = CLASSES.get(struct.unpack_from(f"{order}I", next(parts)[1])[0] & 0xFF)
        if dtype is None:
            return None
        dimensions, name = (next(parts)[1] for _ in range(2))
        shape = struct.unpack(f"{order}{len(dimensions) // 4}i", dimensions)
        if dtype != "uint8":
            return bytes(name).decode("latin-1"), dtype, shape, memoryview(b"")
        content = next(parts)[1]
    except (StopIteration, struct.error):
        raise ValueError("an array that is cut short") from None
    if min(shape, default=-1) < 0 or math.prod(shape) != len(content):
        raise ValueError(f"{len(content)} bytes for an array of shape {shape}")
    return bytes(name).decode("latin-1"), dtype, shape, content
