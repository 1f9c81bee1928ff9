"""Data sets in other processes: pickled without what is open, and opened again there."""

import os
import pickle
from multiprocessing import get_context

import numpy as np
import pytest
import test_celeba
import test_dsprites
import test_lmdb_images
from PIL import Image
from test_mpi3d import numbered
from torch.utils.data import DataLoader

from encdiff.data import open_dataset
from encdiff.data.procedural import ProceduralShapes3D
from encdiff.data.shapes3d import write_shapes3d
from encdiff.data.sharding import write_shards
from encdiff.errors import InputError


class Rows:
    """Images of some data sets, one after the other, as PyTorch's loaders take them."""

    def __init__(self, datasets):
        self.rows = [(dataset, i) for dataset in datasets for i in range(len(dataset))]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> np.ndarray:
        dataset, index = self.rows[row]
        return dataset.images([index])[0]


def h5(folder):
    write_shapes3d(folder / "room.h5", ProceduralShapes3D(8, (1, 1, 1, 2, 2, 2)))
    return open_dataset(folder / "room.h5")


def lmdb(folder):
    pytest.importorskip("lmdb", reason="the optional package lmdb is not installed")
    return open_dataset(test_lmdb_images.write(folder / "faces", test_lmdb_images.images()), 8)


def celeba(folder):
    return open_dataset(test_celeba.write(folder / "celeba", True), 8)


def npz(folder):
    sprites = {key: value for key, value in test_dsprites.arrays().items() if key != "metadata"}
    np.savez_compressed(folder / "dsprites.npz", **sprites)
    return open_dataset(folder / "dsprites.npz")


def files(folder):
    for i in range(8):
        Image.new("RGB", (9, 9), (30 * i, 0, 0)).save(folder / f"{i}.png")
    return open_dataset(folder, 8)


def shards(folder):
    write_shards(folder / "shards", ProceduralShapes3D(8, (1, 1, 1, 2, 2, 2)), 700)
    return open_dataset(folder / "shards")


KINDS = [h5, lmdb, celeba, npz, files, shards]


@pytest.fixture(params=KINDS, ids=lambda make: make.__name__)
def dataset(request, tmp_path):
    return request.param(tmp_path)


def test_a_copy_opens_the_file_again_from_any_folder(dataset, tmp_path, monkeypatch):
    pickled, everything = pickle.dumps(dataset), np.arange(len(dataset))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    copy = pickle.loads(pickled)
    np.testing.assert_array_equal(copy.images(everything), dataset.images(everything))
    assert (len(copy), copy.name, copy.factor_sizes) == (len(dataset), dataset.name, dataset.factor_sizes)


def test_a_part_and_a_relative_path_too(tmp_path, monkeypatch):
    h5(tmp_path)
    monkeypatch.chdir(tmp_path)
    whole, part = open_dataset("room.h5"), open_dataset("room.h5:1,1,1,2,1,1")
    pickled = pickle.dumps([whole, part])
    monkeypatch.chdir(os.sep)
    for before, after in zip((whole, part), pickle.loads(pickled), strict=True):
        np.testing.assert_array_equal(after.images([1, 0]), before.images([1, 0]))


def test_images_stay_in_their_file(tmp_path):
    """Millions of pixels are not sent to a worker."""
    np.savez(tmp_path / "mpi3d.npz", images=numbered(460_800))
    assert len(pickle.dumps(open_dataset(tmp_path / "mpi3d.npz"))) < 10_000


@pytest.mark.parametrize("kind", [h5, lmdb, celeba, npz, shards])
def test_a_file_that_is_gone_is_named(kind, tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    pickled = pickle.dumps(kind(folder))
    folder.rename(tmp_path / "other")
    with pytest.raises((InputError, FileNotFoundError), match=str(folder)) as error:
        pickle.loads(pickled).images([0])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("start", ["spawn", "forkserver", "fork"])
def test_workers_read(start, tmp_path):
    datasets = [kind(tmp_path) for kind in (h5, lmdb, celeba, shards)]
    batches = DataLoader(Rows(datasets), 3, num_workers=2, multiprocessing_context=start)
    found = np.concatenate([batch.numpy() for batch in batches])
    expected = [dataset.images(np.arange(len(dataset))) for dataset in datasets]
    np.testing.assert_array_equal(found, np.concatenate(expected))


@pytest.mark.parametrize("kind", [h5, lmdb, celeba, npz, shards])
def test_forked_processes_do_not_disturb_one_another(kind, tmp_path):
    dataset = kind(tmp_path)
    expected = dataset.images(np.arange(len(dataset)))  # what is open here, they have too
    workers = [get_context("fork").Process(target=read_often, args=(dataset, expected, seed)) for seed in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0, 0, 0]


def read_often(dataset, expected, seed):
    for indices in np.random.default_rng(seed).integers(0, len(dataset), (300, 3)):
        assert np.array_equal(dataset.images(indices), expected[indices])
