"""SmallNORB: the binary matrix format written byte by byte, plain and packed, both parts as one grid."""

import gzip
import struct

import numpy as np
import pytest
from PIL import Image

from encdiff.data import SubGrid, open_dataset
from encdiff.data.smallnorb import SmallNORB
from encdiff.errors import InputError

TRAINING, TESTING = (4, 6), (0, 5)  # toys of each part
STEM = "smallnorb-5x46789x9x18x6x2x96x96-{}-{}.mat"


def matrix(array):
    magic = {"uint8": 0x1E3D4C55, "int32": 0x1E3D4C54}[array.dtype.name]
    dims = array.shape + (1,) * (3 - array.ndim)
    return struct.pack(f"<{2 + len(dims)}i", magic, array.ndim, *dims) + array.astype(array.dtype.str).tobytes()


def part(toys, seed, sizes=(5, 2, 3, 2), size=8):
    """cat, info and dat of one part, in random order."""
    rng = np.random.default_rng(seed)
    rows = np.stack(np.unravel_index(np.arange(np.prod(sizes) * len(toys)), (*sizes, len(toys))), 1)
    category, elevation, azimuth, lighting, toy = rng.permutation(rows).T
    info = np.stack([np.array(toys)[toy], elevation, 2 * azimuth, lighting], 1)
    dat = rng.integers(0, 256, (len(rows), 2, size, size), np.uint8)
    return {"cat": category.astype(np.int32), "info": info.astype(np.int32), "dat": dat}


@pytest.fixture(scope="module")
def parts():
    return {"training": part(TRAINING, 1), "testing": part(TESTING, 2)}


def write(folder, parts, packed=True, **changes):
    folder.mkdir(exist_ok=True)
    for name, files in parts.items():
        for kind, array in files.items():
            content = changes.get(f"{name}_{kind}", matrix(array))
            if content is not None:
                path = folder / STEM.format(name, kind)
                if packed:
                    path.with_name(path.name + ".gz").write_bytes(gzip.compress(content, 1))
                else:
                    path.write_bytes(content)
    return folder


@pytest.mark.parametrize("packed", [True, False], ids=["gz", "plain"])
def test_both_parts_make_one_grid(tmp_path, parts, packed):
    data = open_dataset(write(tmp_path / "norb", parts, packed))
    assert isinstance(data, SmallNORB) and data.factor_names == ("category", "elevation", "azimuth", "lighting")
    assert (len(data), data.factor_sizes, data.instances, data.image_size) == (240, (5, 2, 3, 2), 4, 8)
    images = data.images(np.arange(240))
    assert images.shape == (240, 8, 8, 3) and images.dtype == np.uint8
    for i, (category, elevation, azimuth, lighting) in enumerate(data.factors(np.arange(240))):
        toy = (0, 4, 5, 6)[i % 4]
        files = parts["training" if toy in TRAINING else "testing"]
        wanted = [toy, elevation, 2 * azimuth, lighting]
        (row,) = np.flatnonzero((files["cat"] == category) & (files["info"] == wanted).all(axis=1))
        np.testing.assert_array_equal(images[i], files["dat"][row, 0][..., None].repeat(3, -1))
    np.testing.assert_array_equal(data.labels([239])[0], [4, 35, 40, 1])


def test_one_part_from_one_of_its_files(tmp_path, parts):
    folder = write(tmp_path / "norb", {"training": parts["training"]})
    data = open_dataset(folder / (STEM.format("training", "dat") + ".gz"))
    assert (len(data), data.instances) == (120, 2)


def test_sizes_that_do_not_divide(tmp_path, parts):
    folder = write(tmp_path / "norb", {"training": parts["training"]})
    whole, small = SmallNORB(folder), SmallNORB(folder, 5)
    expected = Image.fromarray(whole.images([17])[0, ..., 0]).resize((5, 5), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(small.images([17])[0, ..., 2], np.asarray(expected))


def test_part_of_the_grid_keeps_every_toy(tmp_path, parts):
    data = SmallNORB(write(tmp_path / "norb", parts))
    few = SubGrid(data, (2, 1, 3, 1))
    assert len(few) == 24 and few.instances == 4
    indices = np.arange(24)
    full = data.indices(few.factors(indices)) + indices % 4  # the first values of every factor
    np.testing.assert_array_equal(few.images(indices), data.images(full))


def test_progress(tmp_path, parts):
    seen = []
    SmallNORB(write(tmp_path / "norb", parts), progress=lambda done, total: seen.append((done, total)))
    assert seen == [(120, 120), (120, 120)]


def bad(array, **edit):
    """The bytes of a matrix with 4-byte header words replaced."""
    content = bytearray(matrix(array))
    for word, value in edit.items():
        struct.pack_into("<i", content, 4 * int(word[1:]), value)
    return bytes(content)


@pytest.mark.parametrize("packed", [True, False], ids=["gz", "plain"])
@pytest.mark.parametrize(
    "kind, change, words",
    [
        ("cat", lambda a: None, "training-cat.mat: no such file"),
        ("info", lambda a: None, "training-info.mat: no such file"),
        ("dat", lambda a: matrix(a)[:-9], r"training-dat.mat\S*: truncated; 9 bytes are missing"),
        ("dat", lambda a: matrix(a)[:17], r"training-dat.mat\S*: truncated"),
        ("dat", lambda a: matrix(a) + b"x", r"training-dat.mat\S*: goes on behind"),
        ("dat", lambda a: matrix(a[:, :1].repeat(3, 1)), r"uint8 \(120, 3, 8, 8\); must be uint8 \(n, 2, size, size\)"),
        ("dat", lambda a: matrix(a[..., :7]), r"\(120, 2, 8, 7\)"),
        ("dat", lambda a: matrix(a.astype(np.int32)), "int32"),
        ("dat", lambda a: bad(a, w1=9), "and 9; must be a SmallNORB matrix"),
        ("dat", lambda a: bad(a, w2=-4), "must not be negative"),
        ("cat", lambda a: bad(a, w0=0x1E3D4C51), r"training-cat.mat\S*: begins with 0x1e3d4c51"),
        ("cat", lambda a: matrix(a[:-1]), r"training-cat.mat\S*: \(119,\); must be \(120,\)"),
        ("cat", lambda a: matrix(a[:, None]), r"training-cat.mat\S*: int32 \(120, 1\); must be int32 \(n,\)"),
        ("info", lambda a: matrix(a[:, :3].copy()), r"training-info.mat\S*: \(120, 3\); must be \(120, 4\)"),
        ("info", lambda a: matrix(a.astype(np.uint8)), r"training-info.mat\S*: uint8"),
        ("info", lambda a: matrix(np.where(a == 4, 2, a).astype(np.int32)), "images of each combination in a grid of"),
        ("info", lambda a: matrix((a * [0, 1, 1, 1]).astype(np.int32)), "some toy has two images of one combination"),
    ],
)
def test_bad_files(tmp_path, parts, packed, kind, change, words):
    content = change(parts["training"][kind])
    folder = write(tmp_path / "norb", parts, packed, **{f"training_{kind}": content})
    with pytest.raises(InputError, match=words) as error:
        SmallNORB(folder)
    assert str(folder) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("keep", [0.5, 0.98])
def test_truncated_gzip(tmp_path, parts, keep):
    folder = write(tmp_path / "norb", parts)
    path = folder / (STEM.format("testing", "dat") + ".gz")
    whole = path.read_bytes()
    path.write_bytes(whole[: int(keep * len(whole))])
    with pytest.raises(InputError, match="testing-dat.mat.gz: .*truncated"):
        SmallNORB(folder)


def test_bad_arguments(tmp_path, parts):
    with pytest.raises(InputError, match="holds no"):
        SmallNORB(tmp_path)
    with pytest.raises(InputError, match="image_size: 0"):
        SmallNORB(write(tmp_path / "norb", parts), 0)
