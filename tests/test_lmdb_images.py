"""Images in an LMDB: written by the library, read by key in order, and named when damaged."""

import io
import threading

import numpy as np
import pytest
from PIL import Image

from encdiff.data import open_dataset
from encdiff.data.lmdb_images import LmdbImages
from encdiff.data.loader import Batches
from encdiff.errors import InputError

lmdb = pytest.importorskip("lmdb", reason="the optional package lmdb is not installed")

COLOURS = np.random.default_rng(4).integers(0, 256, (12, 3), np.uint8)


def encoded(colour, kind="png", size=(9, 14)):
    stream = io.BytesIO()
    Image.new("RGB", size, tuple(map(int, colour))).save(stream, kind)
    return stream.getvalue()


def write(path, values, subdir=True):
    environment = lmdb.open(str(path), map_size=2**24, subdir=subdir)
    with environment.begin(write=True) as transaction:
        for key, value in values.items():
            transaction.put(key, value)
    environment.close()
    return path


def images(count=12):
    return {f"256-{i:05}".encode(): encoded(COLOURS[i]) for i in range(count)} | {b"length": b"12"}


@pytest.mark.parametrize("subdir", [True, False], ids=["folder", "file"])
def test_values_in_the_order_of_the_keys(tmp_path, subdir):
    data = open_dataset(write(tmp_path / "faces", images(), subdir), 6)
    assert isinstance(data, LmdbImages) and (len(data), data.name, data.factor_names) == (12, "faces", ())
    found = data.images([11, 0, 3, 11])
    assert found.dtype == np.uint8 and found.shape == (4, 6, 6, 3)
    np.testing.assert_array_equal(found[:, 2, 4], COLOURS[[11, 0, 3, 11]])
    assert data.images([]).shape == (0, 6, 6, 3)


def test_one_process_may_open_it_twice_and_threads_read_it(tmp_path):
    path = write(tmp_path / "faces", images())
    one, two = open_dataset(path, 4), open_dataset(path, 8)
    assert two.images([3])[0, 7, 7].tolist() == one.images([3])[0, 0, 0].tolist() == COLOURS[3].tolist()
    threads = [threading.Thread(target=one.images, args=([i] * 20,)) for i in range(8)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    batches = Batches(one, 5, resident_gib=0)
    np.testing.assert_array_equal(batches.images(0).cpu()[:, 0, 0], COLOURS[batches.batch_indices(0)])


def test_another_file_under_the_same_name_is_another_set(tmp_path):
    path = write(tmp_path / "faces.mdb", images(), subdir=False)
    assert len(open_dataset(path, 4)) == 12
    write(tmp_path / "new.mdb", images(5), subdir=False).replace(path)
    assert len(open_dataset(path, 4)) == 5


def test_unreadable_values_are_named_by_their_key(tmp_path):
    whole = encoded(COLOURS[0], "jpeg", (64, 64))
    path = write(tmp_path / "faces", {b"a": encoded(COLOURS[1]), b"b": whole[: len(whole) // 2], b"c": b"\x80\x04K."})
    data = open_dataset(path, 4)
    data.images([0])
    for index, key in ((1, "b'b'"), (2, "b'c'")):
        with pytest.raises(InputError, match=f"faces: {key}: not a readable image"):
            data.images([0, index])


def test_refusals(tmp_path):
    path = write(tmp_path / "faces", images())
    for size in (None, 0):
        with pytest.raises(InputError, match=f"image_size: {size}; an LMDB of images needs one"):
            open_dataset(path, size)
    with pytest.raises(InputError, match="indices: 12"):
        open_dataset(path, 4).images([12])
    with pytest.raises(InputError, match="has no factors"):
        open_dataset(f"{path}:1,2", 4)
    with pytest.raises(InputError, match="an empty LMDB"):
        open_dataset(write(tmp_path / "none", {b"length": b"0"}), 4)
    with pytest.raises(InputError, match="not an LMDB"):
        LmdbImages(tmp_path, 4)


def test_cut_file(tmp_path):
    path = write(tmp_path / "faces", images())
    (path / "data.mdb").write_bytes((path / "data.mdb").read_bytes()[:100])
    with pytest.raises(InputError, match="faces: a damaged LMDB"):
        open_dataset(path, 4)


def test_missing_package(tmp_path, monkeypatch):
    path = write(tmp_path / "faces", images())
    monkeypatch.setitem(__import__("sys").modules, "lmdb", None)
    with pytest.raises(InputError, match=r"needs the package lmdb: pip install encdiff\[lmdb\]"):
        open_dataset(path, 4)
