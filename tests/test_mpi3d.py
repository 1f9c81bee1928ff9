"""MPI3D files: both families at full length with tiny images, told apart by length."""

import numpy as np
import pytest

from encdiff.data import open_dataset
from encdiff.data.mpi3d import MPI3D
from encdiff.errors import InputError

TOY, COMPLEX = (6, 6, 2, 3, 3, 40, 40), (4, 4, 2, 3, 3, 40, 40)


def numbered(count, size=1):
    """Images whose three channels spell their index."""
    index = np.arange(count)
    digits = np.stack([index >> 16, index >> 8, index], axis=-1).astype(np.uint8)
    return digits[:, None, None].repeat(size, 1).repeat(size, 2)


def spelled(images):
    return images[:, 0, 0].astype(int) @ [65536, 256, 1]


@pytest.mark.parametrize("sizes", [TOY, COMPLEX], ids=["toy", "complex"])
def test_factors_index_the_images(tmp_path, sizes):
    np.savez(tmp_path / "any name.npz", images=numbered(np.prod(sizes)))
    data = open_dataset(tmp_path / "any name.npz")
    assert isinstance(data, MPI3D) and data.factor_sizes == sizes and len(data) == np.prod(sizes)
    assert data.factor_names[0] == "object_color" and data.factor_names[5:] == ("first_axis", "second_axis")
    assert isinstance(data._images, np.memmap)
    factors = np.random.default_rng().integers(0, sizes, (100, 7))
    weights = [np.prod(sizes[i + 1 :], dtype=int) for i in range(7)]  # the last factor is the fastest
    np.testing.assert_array_equal(spelled(data.images(data.indices(factors))), factors @ weights)


def test_part(tmp_path):
    np.savez(tmp_path / "mpi3d.npz", images=numbered(460_800))
    data = open_dataset(f"{tmp_path / 'mpi3d.npz'}:2,4,1,3,1,5,2")
    assert data.factor_sizes == (2, 4, 1, 3, 1, 5, 2)
    last = np.array([[1, 3, 0, 2, 0, 39, 39]])  # the second colour, camera and axes at their ends
    assert spelled(data.images([len(data) - 1]))[0] == np.ravel_multi_index(last.T, COMPLEX)[0]
    assert open_dataset(data.spec).factor_sizes == data.factor_sizes


def test_smaller_images(tmp_path):
    images = np.random.default_rng(1).integers(0, 256, (460_800, 2, 2, 3), np.uint8)
    np.savez(tmp_path / "m.npz", images=images)
    np.testing.assert_array_equal(
        MPI3D(tmp_path / "m.npz", 1).images([7])[0, 0, 0], np.floor(images[7].mean((0, 1)) + 0.5)
    )
    with pytest.raises(InputError, match="must divide 2"):
        MPI3D(tmp_path / "m.npz", 64)


@pytest.mark.parametrize(
    "arrays, words",
    [
        ({"images": numbered(999)}, "999 images; MPI3D has 1036800 or 460800"),
        ({"pictures": numbered(9)}, "without images"),
        ({"images": numbered(9).astype(np.float32)}, "images are float32"),
        ({"images": numbered(9)[:, :, 0]}, r"images are uint8 \(9, 1, 3\)"),
        ({"images": np.array([{}])}, "images are object"),
    ],
    ids=["length", "key", "dtype", "shape", "objects"],
)
def test_foreign_files(tmp_path, arrays, words):
    np.savez(tmp_path / "bad.npz", **arrays)
    with pytest.raises(InputError, match=words) as error:
        MPI3D(tmp_path / "bad.npz")
    assert str(tmp_path / "bad.npz") in str(error.value) and "\n" not in str(error.value)


def test_missing_file(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        MPI3D(tmp_path / "absent.npz")
