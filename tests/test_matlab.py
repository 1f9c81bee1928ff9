"""Our reader of MATLAB files beside SciPy's, and on damaged ones."""

import io
import struct
import zlib

import numpy as np
import pytest
from scipy.io import loadmat, savemat

from encdiff.data.matlab import array_of, read_arrays

HELD = {
    "im": np.random.default_rng(0).integers(0, 256, (5, 4, 3, 2), np.uint8),
    "a": np.arange(3, dtype=np.uint8),
    "one": np.uint8([[7]]),
    "five": np.arange(5, dtype=np.uint8)[None],
    "empty": np.zeros((0, 3), np.uint8),
    "real": np.linspace(0, 1, 4),
    "words": "text",
    "cells": np.array([1, "b"], dtype=object),
    "fields": {"x": 1.0, "y": "z"},
    "complex": np.array([1j]),
    "a_name_of_more_than_four_letters": np.ones((2, 2), np.uint8),
}


def saved(packed: bool) -> bytes:
    stream = io.BytesIO()
    savemat(stream, HELD, do_compression=packed)
    return stream.getvalue()


@pytest.mark.parametrize("packed", [False, True])
def test_arrays_as_scipy_reads_them(packed):
    found, theirs = read_arrays(saved(packed)), loadmat(io.BytesIO(saved(packed)))
    for name, (dtype, shape, content) in found.items():
        assert (dtype, shape) == (str(theirs[name].dtype), theirs[name].shape) or name == "complex"
        if dtype == "uint8":
            np.testing.assert_array_equal(array_of(shape, content), theirs[name])
    assert found.keys() == HELD.keys() - {"words", "cells", "fields"}


def test_files_of_another_order_of_bytes():
    shape, content = (2, 3), bytes(range(6))
    parts = [(6, struct.pack(">II", 9, 0)), (5, struct.pack(">2i", *shape)), (1, b"abcde"), (2, content)]
    body = b"".join(struct.pack(">II", kind, len(part)) + part + b"\0" * (-len(part) % 8) for kind, part in parts)
    file = b" " * 124 + b"\x01\x00MI" + struct.pack(">II", 14, len(body)) + body
    np.testing.assert_array_equal(array_of(*read_arrays(file)["abcde"][1:]), [[0, 2, 4], [1, 3, 5]])


@pytest.mark.parametrize("packed", [False, True])
def test_every_cut_and_every_wrong_word_is_a_value_error_or_a_value(packed):
    whole = saved(packed)
    for length in range(0, len(whole), 7):
        with pytest.raises(ValueError, match=r".") if length < 128 else _either():
            read_arrays(whole[:length])
    for place in range(124, len(whole) - 4, 4):
        for word in (0, 1, 5, 2**16 + 1, 2**31 - 1, 2**32 - 1):
            with _either():
                read_arrays(whole[:place] + struct.pack("<I", word) + whole[place + 4 :])


class _either:
    def __enter__(self):
        return self

    def __exit__(self, kind, error, _):
        return kind is None or issubclass(kind, ValueError)


def test_bombs_are_not_unpacked():
    bomb = zlib.compress(struct.pack("<II", 14, 2**31) + bytes(10**6))
    with pytest.raises(ValueError, match="2147483648 bytes packed in"):
        read_arrays(b" " * 124 + b"\x00\x01IM" + struct.pack("<II", 15, len(bomb)) + bomb)
