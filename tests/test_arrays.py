"""Arrays in .npz files, mapped where they lie or unpacked once, and pictures made smaller."""

import os
import shutil
import zipfile
from collections import namedtuple

import numpy as np
import pytest
from PIL import Image

from encdiff.data.arrays import map_npz, npz_header, resize
from encdiff.errors import InputError

ARRAY = np.random.default_rng(5).integers(0, 256, (50, 6, 6, 3), np.uint8)


@pytest.mark.parametrize("order", [("a", "images"), ("images", "a")], ids="-".join)
def test_stored_member_is_mapped_where_it_lies(tmp_path, order):
    arrays = {"a": np.arange(7), "images": ARRAY}
    np.savez(tmp_path / "x.npz", **{key: arrays[key] for key in order})
    mapped = map_npz(tmp_path / "x.npz", "images")
    assert isinstance(mapped, np.memmap) and mapped.filename == tmp_path / "x.npz"
    np.testing.assert_array_equal(mapped, ARRAY)
    assert npz_header(tmp_path / "x.npz", "images") == (ARRAY.shape, np.uint8)
    assert os.listdir(tmp_path) == ["x.npz"]


def test_stored_member_with_an_extra_field_is_found(tmp_path):
    np.save(tmp_path / "images.npy", ARRAY)
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive:
        entry = zipfile.ZipInfo("images.npy")
        entry.extra = b"\x99\x99\x05\x00hello"
        archive.writestr(entry, (tmp_path / "images.npy").read_bytes())
    np.testing.assert_array_equal(map_npz(tmp_path / "x.npz", "images"), ARRAY)


def test_compressed_member_is_unpacked_once(tmp_path):
    np.savez_compressed(tmp_path / "x.npz", images=ARRAY)
    seen = []
    mapped = map_npz(tmp_path / "x.npz", "images", lambda done, total: seen.append((done, total)))
    unpacked = tmp_path / "x.npz.images.npy"
    np.testing.assert_array_equal(mapped, ARRAY)
    np.testing.assert_array_equal(np.load(unpacked), ARRAY)
    assert isinstance(mapped, np.memmap) and seen[-1] == (unpacked.stat().st_size,) * 2
    assert sorted(os.listdir(tmp_path)) == ["x.npz", "x.npz.images.npy"]

    def fail(done, total):
        raise AssertionError("unpacked again")

    map_npz(tmp_path / "x.npz", "images", fail)
    np.savez_compressed(tmp_path / "x.npz", images=255 - ARRAY)  # a new archive: the old unpacking is stale
    os.utime(unpacked, (0, 0))
    np.testing.assert_array_equal(map_npz(tmp_path / "x.npz", "images"), 255 - ARRAY)


def test_interrupted_unpacking_leaves_nothing(tmp_path):
    np.savez_compressed(tmp_path / "x.npz", images=ARRAY)

    def stop(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        map_npz(tmp_path / "x.npz", "images", stop)
    assert os.listdir(tmp_path) == ["x.npz"]


def test_no_room_to_unpack(tmp_path, monkeypatch):
    np.savez_compressed(tmp_path / "x.npz", images=ARRAY)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: namedtuple("Usage", "free")(ARRAY.nbytes))  # header too many
    with pytest.raises(InputError, match=r"x\.npz: is compressed, and unpacking it needs .* GiB are free"):
        map_npz(tmp_path / "x.npz", "images")
    assert os.listdir(tmp_path) == ["x.npz"]


def test_damaged_compressed_member(tmp_path):
    np.savez_compressed(tmp_path / "x.npz", images=ARRAY)
    content = bytearray((tmp_path / "x.npz").read_bytes())
    content[len(content) // 2] ^= 255
    (tmp_path / "x.npz").write_bytes(content)
    with pytest.raises(InputError, match=r"x\.npz: a damaged or foreign \.npz file"):
        map_npz(tmp_path / "x.npz", "images")
    assert os.listdir(tmp_path) == ["x.npz"]


@pytest.mark.parametrize("size", [6, 3, 2, 1])
@pytest.mark.parametrize("grey", [False, True], ids=["rgb", "grey"])
def test_resize_averages_blocks(size, grey):
    images = ARRAY[..., 0] if grey else ARRAY
    block = 6 // size
    exact = images.astype(float).reshape(50, size, block, size, block, *images.shape[3:]).mean(axis=(2, 4))
    np.testing.assert_array_equal(resize(images, size), np.floor(exact + 0.5 + 1e-9))


@pytest.mark.parametrize("grey", [False, True], ids=["rgb", "grey"])
def test_resize_to_other_sizes_is_pillows(grey):
    images = ARRAY[..., 0] if grey else ARRAY
    expected = np.asarray(Image.fromarray(images[7]).resize((4, 4), Image.Resampling.BICUBIC))
    np.testing.assert_array_equal(resize(images, 4)[7], expected)
    assert resize(images[:0], 4).shape == (0, 4, 4, *images.shape[3:])
