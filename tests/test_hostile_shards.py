"""Damaged and hostile folders of `.npy` files: one line with the name, before anything is mapped or unpickled."""

import json
import os
import pickle

import numpy as np
import pytest
from test_shards import Noise, written

from encdiff.data import open_dataset, shards
from encdiff.errors import InputError


@pytest.fixture
def folder(tmp_path):
    return written(tmp_path, Noise(10))


def refuses(folder, words):
    with pytest.raises(InputError, match=words) as error:
        data = open_dataset(folder)
        data.images(np.arange(len(data)))
        data.factors([0]) if data.factor_sizes else None
    assert str(error.value).isprintable() and str(folder) in str(error.value) and len(str(error.value)) < 500


@pytest.mark.parametrize("length", [0, 5, 80, 127, 128, 400, 427])
def test_cut(folder, length):
    os.truncate(folder / "images-00001.npy", length)
    refuses(folder, "images-00001.npy: holds .* bytes|damaged")


def test_missing_special_and_linked_files(folder, tmp_path):
    shard = folder / "images-00002.npy"
    shard.rename(tmp_path / "elsewhere")
    refuses(folder, "images-00002.npy: no such file, but index.json names it")
    shard.symlink_to(tmp_path / "nowhere")
    refuses(folder, "no such file")
    shard.unlink()
    os.mkfifo(shard)
    refuses(folder, "images-00002.npy: is a FIFO")
    shard.unlink()
    shard.mkdir()
    refuses(folder, "no such file")
    shard.rmdir()
    shard.symlink_to(tmp_path / "elsewhere")  # as the Hub's cache has them
    assert len(open_dataset(folder).images(np.arange(10))) == 10


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((4, 5, 5, 3), np.int8), np.zeros((4, 5, 5, 3), bool), np.zeros((4, 5, 5, 3)),
        np.zeros((4, 5, 15), np.uint8), np.zeros((5, 5, 5, 3), np.uint8), np.zeros((4, 75), "V1"),
        np.asfortranarray(np.zeros((4, 5, 5, 3), np.uint8)), np.array([{}] * 300, object),
    ],
    ids=lambda a: f"{a.dtype}{a.shape}",
)  # fmt: skip
def test_other_arrays(folder, array):
    np.save(folder / "images-00001.npy", array, allow_pickle=True)
    refuses(folder, "images-00001.npy: (is .* must be uint8|holds)")


def test_nothing_is_unpickled(folder):
    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(folder / "trapped"),)

    trap = np.empty(4, object)
    trap[:] = [Trap(), "x" * 500, 0, 0]
    np.save(folder / "images-00001.npy", trap, allow_pickle=True)
    refuses(folder, "is object")
    (folder / "images-00001.npy").write_bytes(pickle.dumps([Trap(), "x" * 500]))
    refuses(folder, "damaged or foreign")
    assert not (folder / "trapped").exists()


def test_bytes_behind_the_images(folder):
    with open(folder / "images-00000.npy", "ab") as file:
        file.write(b"more")
    refuses(folder, "images-00000.npy: holds 432 bytes, which are not those")


FACTORS = {
    "names": ["a", "b"], "sizes": [5, 2], "labels": [[0, 1, 2, 3, 4], [0.5, 1]], "cyclic": [], "categories": ["b"],
    "grid": True, "instances": 1,
}  # fmt: skip
LIES = {
    "version": ({"version": 2}, "version 1"),
    "no lengths": ({"lengths": []}, "lengths"),
    "lengths that are none": ({"lengths": [4, 4, -2]}, "lengths"),
    "lengths as text": ({"lengths": "4"}, "lengths"),
    "more images": ({"lengths": [4, 4, 3]}, "images-00002.npy: is uint8 .2, 5, 5, 3.; must be uint8 .3, 5, 5, 3."),
    "other cuts": ({"lengths": [3, 4, 2]}, "images-00000.npy: is uint8 .4, 5, 5, 3.; must be uint8 .3, 5, 5, 3."),
    "more files": ({"lengths": [4, 4, 2, 4]}, "images-00003.npy: no such file"),
    "terabytes": ({"lengths": [2**61, 4, 2]}, "images-00000.npy: holds 428 bytes"),
    "beyond int64": ({"lengths": [2**62, 2**62]}, "lengths"),
    "another size": ({"image_size": 6}, "holds"),
    "no size": ({"image_size": None}, "image_size is None"),
    "size 0": ({"image_size": 0}, "image_size is 0"),
    "true": ({"image_size": True}, "image_size is True"),
    "factors as text": ({"factors": "a"}, "factors is a"),
    "a grid of others": ({"factors": FACTORS | {"sizes": [5, 3], "labels": [[0] * 5, [0] * 3]}}, "a grid of 5 x 3"),
    "names twice": ({"factors": FACTORS | {"names": ["a", "a"]}}, "names is"),
    "no names": ({"factors": FACTORS | {"names": []}}, "names is"),
    "names of numbers": ({"factors": FACTORS | {"names": [1, 2]}}, "names is"),
    "a size too many": ({"factors": FACTORS | {"sizes": [5, 2, 1]}}, "sizes is"),
    "a size of 0": ({"factors": FACTORS | {"sizes": [5, 0]}}, "sizes is"),
    "labels of text": ({"factors": FACTORS | {"labels": [list("abcde"), [0, 1]]}}, "labels is"),
    "few labels": ({"factors": FACTORS | {"labels": [[0], [0, 1]]}}, "labels is"),
    "other categories": ({"factors": FACTORS | {"categories": ["c"]}}, "categories is"),
    "categories missing": ({"factors": {k: v for k, v in FACTORS.items() if k != "categories"}}, "categories is None"),
    "grid as text": ({"factors": FACTORS | {"grid": "yes"}}, "grid is yes"),
    "instances": ({"factors": FACTORS | {"instances": 0}}, "instances is 0"),
    "no factors.npy": ({"factors": FACTORS | {"grid": False}}, "factors.npy: no such file"),
}


@pytest.mark.parametrize("kind", LIES)
def test_an_index_that_lies(folder, kind):
    change, words = LIES[kind]
    index = json.loads((folder / "index.json").read_text()) | change
    (folder / "index.json").write_text(json.dumps(index))
    refuses(folder, words)


def test_an_index_that_is_cut_or_no_json(folder):
    whole = (folder / "index.json").read_text()
    for text in (whole[:60], whole[:-3], whole.replace("4", "NaN", 1), whole.replace("[", "[" * 99, 1)):
        (folder / "index.json").write_text(text)
        refuses(folder, "index.json: not JSON")
    (folder / "index.json").write_text("{}")
    assert not shards.is_sharded(folder)
    with pytest.raises(InputError, match="image_size"):
        open_dataset(folder)  # as a folder of images


@pytest.mark.parametrize(
    "array, words",
    [
        (np.full((10, 2), 2), "factors.npy: a factor lies outside"),
        (np.full((10, 2), -1), "factors.npy: a factor lies outside"),
        (np.zeros((10, 2)), "factors.npy: is float64"),
        (np.zeros((10, 3), int), "factors.npy: is int64"),
        (np.zeros((9, 2), int), "factors.npy: is int64"),
    ],
)
def test_factors_that_lie(folder, array, words):
    index = json.loads((folder / "index.json").read_text())
    index["factors"] = FACTORS | {"grid": False, "sizes": [2, 2], "labels": [[0, 1]] * 2}
    (folder / "index.json").write_text(json.dumps(index))
    np.save(folder / "factors.npy", array)
    refuses(folder, words)


def test_a_later_file_that_is_gone_is_named(folder):
    data = open_dataset(folder)
    (folder / "images-00001.npy").unlink()
    assert len(data.images([0, 3, 9])) == 3
    with pytest.raises(InputError, match="images-00001.npy: no such file"):
        data.images([4])
