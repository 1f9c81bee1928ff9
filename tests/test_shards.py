"""Folders of `.npy` files: written from sets of every kind, whole or not at all, and read where they lie."""

import os
import pickle
import threading

import numpy as np
import pytest
import test_celeba
import test_smallnorb
from PIL import Image
from test_cli_data import call
from test_data import Toy

from encdiff.data import Dataset, describe, open_dataset, shards
from encdiff.data.loader import Batches, read_all
from encdiff.data.sharding import parse_bytes, write_shards
from encdiff.data.shards import ShardedArrays
from encdiff.errors import InputError


class Noise(Dataset):
    """Random images; `fail` at one of them."""

    name = "noise"

    def __init__(self, count=23, size=5, fail=None):
        self.image_size, self.fail = size, fail
        self.pixels = np.random.default_rng().integers(0, 256, (count, size, size, 3), np.uint8)

    def __len__(self):
        return len(self.pixels)

    def images(self, indices):
        if self.fail in self.check_indices(indices):
            raise InputError("image 7 is bad")
        return self.pixels[indices]


def written(tmp_path, dataset, length=4, **options):
    """In files of so many images."""
    write_shards(tmp_path / "out", dataset, 128 + length * 3 * dataset.image_size**2, **options)
    return tmp_path / "out"


def same(one, other):
    everything = np.arange(len(other))
    assert len(one) == len(other) and one.factor_names == other.factor_names
    assert one.factor_sizes == other.factor_sizes and one.is_grid == other.is_grid
    assert (one.instances, one.cyclic, one.categories) == (other.instances, other.cyclic, other.categories)
    np.testing.assert_array_equal(one.images(everything), other.images(everything))
    if other.factor_sizes:
        np.testing.assert_array_equal(one.factors(everything), other.factors(everything))
        np.testing.assert_array_equal(one.labels(everything), other.labels(everything))
    assert {**describe(one), "name": ""} == {**describe(other), "name": ""}


def photos(folder):
    folder.mkdir()
    for i in range(11):
        Image.new("RGB", (9 + i, 12), (20 * i, 5, 255 - i)).save(folder / f"{i}.jpg")
    return open_dataset(folder, 6)


SETS = {
    "room": lambda folder: open_dataset("procedural:2,1,1,2,2,2", 8),
    "sprites": lambda folder: open_dataset("sprites:3,2,2,2,2", 8),
    "part": lambda folder: open_dataset("procedural", 8).select("2,1,3,1,1,2"),
    "photos": lambda folder: photos(folder / "photos"),
    "attributes": lambda folder: open_dataset(test_celeba.write(folder / "celeba", True), 8),
    "ten of each": lambda folder: open_dataset(
        test_smallnorb.write(folder / "norb", {"training": test_smallnorb.part((4, 6), 1)})
    ),
    "several of each, cyclic": lambda folder: Toy(),
}


@pytest.mark.parametrize("kind", SETS)
def test_every_kind_comes_back(tmp_path, kind):
    dataset = SETS[kind](tmp_path)
    folder = written(tmp_path, dataset, 7)
    again = open_dataset(folder)
    assert isinstance(again, ShardedArrays) and again.name == "out" and again.spec == str(folder)
    same(again, dataset)
    assert len(list(folder.glob("images-*.npy"))) == -(-len(dataset) // 7)


def test_a_part_of_it(tmp_path):
    dataset = SETS["room"](tmp_path)
    folder = written(tmp_path, dataset)
    same(open_dataset(f"{folder}:1,1,1,2,1,2"), dataset.select("1,1,1,2,1,2"))


@pytest.mark.parametrize("count, length", [(23, 1), (23, 4), (23, 23), (23, 100), (24, 8), (1, 1), (60, 7)])
def test_files_hold_what_numpy_reads(tmp_path, count, length, monkeypatch):
    monkeypatch.setattr("encdiff.data.sharding.BATCH", 3 * 75)  # three images
    seen, data = [], Noise(count)
    folder = written(tmp_path, data, length, progress=lambda done, total: seen.append((done, total)))
    files = [folder / f"images-{i:05}.npy" for i in range(-(-count // length))]
    assert sorted(folder.iterdir()) == [*files, folder / "index.json"]
    assert all(file.stat().st_size <= 128 + length * 75 for file in files)
    arrays = [np.load(file) for file in files]
    assert all(len(array) == length for array in arrays[:-1])
    np.testing.assert_array_equal(np.concatenate(arrays), data.pixels)
    assert seen[-1] == (count, count) and [done for done, _ in seen] == sorted({done for done, _ in seen})


@pytest.mark.parametrize("open_files", [1, 3, 128])
def test_any_indices_in_any_order(tmp_path, open_files, monkeypatch):
    monkeypatch.setattr(shards, "OPEN", open_files)
    data, rng = Noise(61, 7), np.random.default_rng()
    again = ShardedArrays(written(tmp_path, data))
    for size in (0, 1, 5, 200):
        indices = rng.integers(61, size=size)
        found = again.images(indices)
        assert found.dtype == np.uint8 and found.shape == (size, 7, 7, 3)
        np.testing.assert_array_equal(found, data.pixels[indices])
    assert again._map.cache_info().currsize == min(open_files, 16)
    np.testing.assert_array_equal(read_all(again), data.pixels)
    for bad in ([61], [-1], [0.5], [[1]]):
        with pytest.raises(InputError, match="indices"):
            again.images(bad)


def test_reduced(tmp_path):
    data = Noise(9, 6)
    again = open_dataset(written(tmp_path, data), 3)
    assert again.image_size == 3
    blocks = data.pixels.reshape(9, 3, 2, 3, 2, 3).mean((2, 4))
    np.testing.assert_array_equal(again.images(np.arange(9)), np.floor(blocks + 0.5))
    for size in (0, 4, 12):
        with pytest.raises(InputError, match=f"image_size: {size}; must divide 6"):
            open_dataset(tmp_path / "out", size)


def test_pickled_without_its_pixels_and_read_by_threads(tmp_path, monkeypatch):
    data = Noise(400, 16)
    written(tmp_path, data, 30)
    monkeypatch.chdir(tmp_path)
    again = open_dataset("out")
    again.images(np.arange(400))
    pickled = pickle.dumps(again)
    assert len(pickled) < 3000
    monkeypatch.chdir(os.sep)
    copy, wrong = pickle.loads(pickled), []

    def read(seed):
        for indices in np.random.default_rng(seed).integers(400, size=(50, 9)):
            wrong.extend(indices[(copy.images(indices) != data.pixels[indices]).any((1, 2, 3))])

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert not wrong


def test_batches_of_it(tmp_path, monkeypatch):
    monkeypatch.setattr("encdiff.data.readahead._cores", lambda: 3)
    data = Noise(50)
    batches = Batches(ShardedArrays(written(tmp_path, data)), 40, 3, resident_gib=0)
    for step in (0, 1, 2, 9, 3):
        images, indices = batches.batch(step)
        np.testing.assert_array_equal(images, data.pixels[indices.numpy()])
    assert batches._ahead.threads == 1, "copies alone gain nothing by more"


# ---- written whole or not at all


def test_a_failure_leaves_nothing_or_what_was_there(tmp_path):
    with pytest.raises(InputError, match="image 7 is bad"):
        written(tmp_path, Noise(fail=7))
    assert not list(tmp_path.iterdir())
    first = Noise()
    written(tmp_path, first)
    with pytest.raises(InputError, match="image 7 is bad"):
        written(tmp_path, Noise(30, fail=7), overwrite=True)
    assert os.listdir(tmp_path) == ["out"]
    same(open_dataset(tmp_path / "out"), first)


def test_overwritten_by_a_smaller_one_even_of_itself(tmp_path):
    first, second = Noise(23), Noise(5, 3)
    written(tmp_path, first, 1)
    with pytest.raises(InputError, match="out: exists already; use --overwrite"):
        written(tmp_path, second)
    written(tmp_path, open_dataset(tmp_path / "out"), 9, overwrite=True)
    same(open_dataset(tmp_path / "out"), first)
    written(tmp_path, second, overwrite=True)
    same(open_dataset(tmp_path / "out"), second)
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("kind", ["file", "folder", "folder with an index", "link", "dangling link"])
def test_foreign_places_are_refused(tmp_path, kind):
    out = tmp_path / "out"
    if kind == "file":
        out.write_text("mine")
    elif kind.startswith("folder"):
        out.mkdir()
        (out / ("index.json" if "index" in kind else "thesis.tex")).write_text('{"format": "of mine"}')
    else:
        (tmp_path / "there").mkdir()
        out.symlink_to(tmp_path / ("there" if kind == "link" else "nowhere"))
    before = sorted(tmp_path.rglob("*"))
    for overwrite in (False, True):
        with pytest.raises(InputError, match="out: is there, and no folder of shards"):
            written(tmp_path, Noise(), overwrite=overwrite)
    assert sorted(tmp_path.rglob("*")) == before


def test_other_refusals(tmp_path):
    with pytest.raises(InputError, match="files of 202 bytes; must be at least 203"):
        write_shards(tmp_path / "out", Noise(), 202)
    with pytest.raises(InputError, match="holds no images"):
        write_shards(tmp_path / "out", Noise(0), 10**6)
    with pytest.raises(InputError, match="must be a name in an existing folder"):
        write_shards(tmp_path / "missing" / "out", Noise(), 10**6)


# ---- the command


def test_convert(tmp_path):
    source = photos(tmp_path / "photos")
    command = ("convert", tmp_path / "photos", tmp_path / "out", "--image-size", 6, "--shards")
    code, text = call(*command, "400B")
    assert code == 0 and "11 images" in text
    same(open_dataset(tmp_path / "out"), source)
    assert len(os.listdir(tmp_path / "out")) == 7, "two images of 108 bytes behind 128 of header in each"
    with pytest.raises(InputError, match="exists already"):
        call(*command, "1GB")
    assert call(*command, "1GB", "--overwrite")[0] == 0 and len(os.listdir(tmp_path / "out")) == 2
    code, text = call("info", tmp_path / "out")
    assert code == 0 and "11 images of 6x6" in text and "no labels" in text
    with pytest.raises(InputError, match="out: must end in .h5"):
        call("convert", tmp_path / "photos", tmp_path / "out", "--image-size", 6)


@pytest.mark.parametrize(
    "text, size",
    [("1GB", 10**9), ("500MB", 5 * 10**8), ("64MiB", 2**26), ("1.5kb", 1500), (" 2 TiB ", 2**41), ("7B", 7)],
)
def test_sizes(text, size):
    assert parse_bytes(text) == size


@pytest.mark.parametrize(
    "text", ["", "1", "GB", "-1GB", "0GB", "0.1B", "1XB", "1IB", "1e9B", "1G", "9999999999TB", "٣GB"]
)
def test_bad_sizes(text):
    with pytest.raises(InputError, match="--shards .* must be a size of files such as 1GB") as error:
        call("convert", "nowhere", "out", f"--shards={text}")
    assert "\n" not in str(error.value)
