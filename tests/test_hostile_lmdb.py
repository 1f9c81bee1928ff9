"""LMDBs that are cut or changed: mapped by the library only once the whole tree is known to lie in the file."""

import os
import random
import struct
import subprocess
import sys

import pytest
from test_lmdb_images import COLOURS, encoded, write

from encdiff.data.lmdb_check import check_lmdb
from encdiff.data.lmdb_images import LmdbImages, _errors
from encdiff.errors import InputError

lmdb = pytest.importorskip("lmdb", reason="the optional package lmdb is not installed")


@pytest.fixture
def database(tmp_path):
    """Short and long values, several levels of pages."""
    values = {f"{i:04}".encode(): encoded(COLOURS[i % 12]) * (1 + 200 * (i % 50 == 0)) for i in range(600)}
    return write(tmp_path / "faces", values)


def read(path):
    data = LmdbImages(path, 4)
    return data.images(range(len(data)))


@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 0.5, 0.9, 0.999])
def test_cut(database, share):
    """In a process of its own: half a file used to end it with SIGBUS."""
    file = database / "data.mdb"
    os.truncate(file, int(share * file.stat().st_size))
    code = (
        "import sys; from encdiff.data import open_dataset; from encdiff.errors import InputError\n"
        f"try: d = open_dataset({str(database)!r}, 4); d.images(range(len(d)))\n"
        "except InputError as error: sys.exit(f'said: {error}')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "said: " in done.stderr and "faces" in done.stderr


@pytest.mark.parametrize("entries", [0, 1, 3, 400])
@pytest.mark.parametrize("deleted", [0, 3])
def test_whole_ones_pass(tmp_path, entries, deleted):
    path = write(tmp_path / "x", {f"{i:04}".encode(): b"v" * (i * 37 % 9000) for i in range(entries)})
    with lmdb.open(str(path), map_size=2**24) as environment, environment.begin(write=True) as transaction:
        for i in range(0, entries, 5)[:deleted]:
            transaction.delete(f"{i:04}".encode())
    check_lmdb(path, path / "data.mdb")


@pytest.mark.parametrize(
    "at, value, words",
    [
        (16, 1, "header of version|not an LMDB"),
        (20, 7, "header of version 7"),
        (40, 3, "pages of 3 bytes"),
        (4096 + 20, 7, "header of version 7"),
        (4096 + 40, 512, "two sizes of pages"),
    ],
)
def test_headers(database, at, value, words):
    with open(database / "data.mdb", "r+b") as file:
        file.seek(at)
        file.write(struct.pack("<I", value))
    with pytest.raises(InputError, match=words):
        read(database)


def test_a_page_in_a_circle_and_values_that_reach_outside(database):
    file = database / "data.mdb"
    whole, said = file.read_bytes(), set()
    rng = random.Random(0)
    for _ in range(300):
        content = bytearray(whole)
        page = rng.randrange(2, len(whole) // 4096) * 4096
        struct.pack_into("<H", content, page + rng.randrange(0, 400, 2), rng.choice((0, 1, 2, 5, 2**15, 2**16 - 1)))
        file.write_bytes(content)
        try:
            check_lmdb(database, file)
        except InputError as error:
            said.add(str(error).split("(")[1].split(")")[0].rstrip("0123456789"))
    assert len(said) > 5, said


def test_every_error_of_the_library_names_the_file(tmp_path):
    for kind in (lmdb.Error, lmdb.CorruptedError, lmdb.PageNotFoundError, lmdb.MemoryError, lmdb.BadTxnError):
        with pytest.raises(InputError, match="x: a damaged LMDB"), _errors(tmp_path / "x"):
            raise kind("MDB")


def test_keys_out_of_order(database, monkeypatch):
    data = LmdbImages(database, 4)
    data._keys[3] = b"nothing"
    with pytest.raises(InputError, match="b'nothing': not a readable image"):
        data.images([3])
