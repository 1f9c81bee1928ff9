"""Damaged and hostile files of Cars3D, SmallNORB and CelebA: sizes that headers declare, texts, members of archives."""

import gzip
import io
import struct
import tarfile

import numpy as np
import pytest
from PIL import Image
from test_hostile_data import archive, flip, refuses

from encdiff.data.cars3d import Cars3D
from encdiff.data.celeba import CelebA
from encdiff.data.smallnorb import SmallNORB
from encdiff.errors import InputError


def test_archives_that_are_cut_or_lie(tmp_path):
    noise = np.random.default_rng(0).bytes(1000)
    path = tmp_path / "cars.tar.gz"
    with tarfile.open(path, "w:gz") as out:
        entry = tarfile.TarInfo("cars/list.txt")
        entry.size = len(noise)
        out.addfile(entry, io.BytesIO(noise))
    whole = path.read_bytes()
    for length in (12, 60, 300, len(whole) - 50):
        path.write_bytes(whole[:length])
        refuses(path, "truncated")
    entry.size = 2**50
    path.write_bytes(gzip.compress(entry.tobuf() + bytes(2048)))
    refuses(path, "holds 1125899906842624 bytes")
    with pytest.raises(InputError, match="holds 1125899906842624 bytes"):
        Cars3D(path)


def matrix(shape, magic=0x1E3D4C55, content=b""):
    return struct.pack(f"<{2 + max(3, len(shape))}i", magic, len(shape), *shape, *[1] * (3 - len(shape))) + content


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "gz"])
@pytest.mark.parametrize(
    "shape, words",
    [
        ((2**31 - 1, 2, 96, 96), "bytes are missing|truncated"),
        ((4, 2, 2**20, 2**20), "bytes are missing"),
        ((4, 2, 0, 0), "images of size 0"),
        ((0, 2, 8, 8), r"must be uint8 \(n, 2"),
    ],
)
def test_smallnorb_headers(tmp_path, shape, words, packed):
    ints = 0x1E3D4C54
    files = {"dat": matrix(shape), "cat": matrix((4,), ints, bytes(16)), "info": matrix((4, 4), ints, bytes(64))}
    for kind, content in files.items():
        name = f"x-{kind}.mat{'.gz' * packed}"
        (tmp_path / name).write_bytes(gzip.compress(content) if packed else content)
    with pytest.raises(InputError, match=words):
        SmallNORB(tmp_path)


def test_smallnorb_labels_that_fill_no_grid(tmp_path):
    ints, rows = 0x1E3D4C54, 3000
    labels = np.arange(5 * rows, dtype="<i4")
    (tmp_path / "x-dat.mat").write_bytes(matrix((rows, 2, 1, 1), content=bytes(2 * rows)))
    (tmp_path / "x-cat.mat").write_bytes(matrix((rows,), ints, labels[:rows].tobytes()))
    (tmp_path / "x-info.mat").write_bytes(matrix((rows, 4), ints, labels[rows:].tobytes()))
    with pytest.raises(InputError, match="3000 images in a grid of 3000 x 3000 x 3000 x 3000"):
        SmallNORB(tmp_path)


def celeba(folder, attributes, partition="1.jpg 0\n2.jpg 2\n"):
    for i in (1, 2):
        Image.new("RGB", (20, 24), (50 * i, 0, 0)).save(folder / f"{i}.jpg")
    (folder / "list_attr_celeba.txt").write_bytes(attributes.encode())
    (folder / "list_eval_partition.txt").write_bytes(partition.encode())
    return folder


@pytest.mark.parametrize("mark", ["", "\ufeff"], ids=["plain", "with a byte order mark"])
@pytest.mark.parametrize("end", ["", "\n", "\n\n\n", "\r\n  \r\n"])
def test_celeba_texts_with_blank_ends_and_marks(tmp_path, mark, end):
    celeba(tmp_path, f"{mark}2\nOld Young\n1.jpg 1 -1\n2.jpg -1 1{end}", f"{mark}1.jpg 0\n2.jpg 2{end}")
    data = CelebA(tmp_path, 8)
    assert data.factors([0, 1]).tolist() == [[1, 0], [0, 1]] and data.factor_names == ("Old", "Young")
    assert len(CelebA(tmp_path, 8, "test")) == 1


def test_celeba_texts_that_declare_a_table_of_terabytes(tmp_path):
    names = " ".join(map(str, range(200_000)))
    celeba(tmp_path, f"200000\n{names}\n" + "x\n" * 200_000)
    with pytest.raises(InputError, match="too short for 200000 images of 200000 attributes"):
        CelebA(tmp_path, 8)


def test_celeba_zip_members(tmp_path):
    celeba(tmp_path, "1\nYoung\n1.jpg 1\n")
    packed = archive(tmp_path / "img_align_celeba.zip", {"img_align_celeba/1.jpg": (tmp_path / "1.jpg").read_bytes()})
    for i in (1, 2):
        (tmp_path / f"{i}.jpg").unlink()
    assert CelebA(tmp_path, 8).images([0]).shape == (1, 8, 8, 3)
    for offset, value, words in ((8, 1, "is encrypted"), (10, 97, "has compression 97")):
        whole = packed.read_bytes()
        flip(packed, offset, value)
        with pytest.raises(InputError, match=words):
            CelebA(tmp_path, 8).images([0])
        packed.write_bytes(whole)


def test_a_foreign_name_cannot_break_the_line(tmp_path):
    celeba(tmp_path, "1\nYoung\n\x1b[2Jx.jpg 1\n")
    with pytest.raises(InputError, match=r"holds no \\x1b\[2Jx\.jpg") as error:
        CelebA(tmp_path, 8)
    assert str(error.value).isprintable()
