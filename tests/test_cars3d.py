"""Cars3D: MATLAB files in an archive or a folder, in the order of the list, and the published misreading by name."""

import io
import tarfile
from itertools import product

import numpy as np
import pytest
from scipy.io import savemat

from encdiff.data import open_dataset
from encdiff.data.cars3d import Cars3D
from encdiff.errors import InputError

NAMES = ["car_007_mesh", "car_100_mesh", "car_002_mesh"]  # the list's order is none of a folder's


def car(seed, size=8):
    return np.random.default_rng(seed).integers(0, 256, (size, size, 3, 24, 4), np.uint8)


CARS = {name: car(seed) for seed, name in enumerate(NAMES)}


def mat(**arrays):
    stream = io.BytesIO()
    savemat(stream, arrays, do_compression=True)
    return stream.getvalue()


def content(**changes):
    files = {f"data/cars/{name}.mat": mat(im=im) for name, im in CARS.items()}
    files["data/cars/list.txt"] = "\n".join(NAMES).encode() + b"\n"
    files["data/sprites/list.txt"] = b"other things of the archive\n"
    files["data/sprites/sprite_1.mat"] = b"not read"
    return {name: data for name, data in (files | changes).items() if data is not None}


def archive(path, files):
    with tarfile.open(path, "w:gz") as tar:
        for name, data in files.items():
            entry = tarfile.TarInfo(f"./{name}")
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    return path


def folder(path, files):
    for name, data in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(data)
    return path


@pytest.fixture(params=["archive", "folder", "data", "cars"])
def path(request, tmp_path):
    if request.param == "archive":
        return archive(tmp_path / "any.tgz", content())
    return folder(tmp_path, content()) / {"folder": "", "data": "data", "cars": "data/cars"}[request.param]


def test_index_is_elevation_azimuth_object(path):
    data = open_dataset(path, 8)
    assert isinstance(data, Cars3D) and data.name == "cars3d"
    assert data.factor_names == ("elevation", "azimuth", "object") and data.factor_sizes == (4, 24, 3)
    images = data.images(np.arange(288))
    for i, (elevation, azimuth, thing) in enumerate(product(range(4), range(24), range(3))):
        np.testing.assert_array_equal(images[i], CARS[NAMES[thing]][..., azimuth, elevation])
    np.testing.assert_array_equal(data.labels([287])[0], [3, 345, 2])


def test_resized_to_64_by_default(tmp_path):
    im = car(9, 128)
    files = content(**{"data/cars/car_100_mesh.mat": mat(im=im), "data/cars/list.txt": b"car_100_mesh.mat"})
    data = open_dataset(folder(tmp_path, files))
    assert data.image_size == 64 and len(data) == 96
    exact = im[..., 5, 2].reshape(64, 2, 64, 2, 3).mean(axis=(1, 3))
    np.testing.assert_array_equal(data.images(data.indices([[2, 5, 0]]))[0], np.floor(exact + 0.5))


def test_published_misalignment_only_by_name(path):
    right, wrong = open_dataset(path, 8), open_dataset(f"published-cars3d:{path}", 8)
    indices = np.random.default_rng().integers(0, 288, 50)
    np.testing.assert_array_equal(wrong.images(indices), right.images(indices // 10))
    np.testing.assert_array_equal(wrong.factors(indices), right.factors(indices))
    assert wrong.name == "published-cars3d" and (wrong.images([287]) != right.images([287])).any()
    assert open_dataset(wrong.spec, 8).published_misalignment and not open_dataset(right.spec, 8).published_misalignment


def test_progress(tmp_path):
    seen = []
    open_dataset(folder(tmp_path / "f", content()), 8, lambda done, total: seen.append((done, total)))
    assert seen == [(1, 3), (2, 3), (3, 3)]
    seen.clear()
    file = archive(tmp_path / "a.tgz", content())
    open_dataset(file, 8, lambda done, total: seen.append((done, total)))
    assert seen[-1] == (file.stat().st_size,) * 2


@pytest.mark.parametrize("how", [archive, folder], ids=["archive", "folder"])
@pytest.mark.parametrize(
    "changes, words",
    [
        ({"car_100_mesh.mat": None}, "car_100_mesh.mat"),
        ({"car_100_mesh.mat": mat(im=car(1).astype(np.float32))}, r"car_100_mesh.mat: im is float32"),
        ({"car_100_mesh.mat": mat(im=car(1)[..., :3])}, r"must be uint8 \(size, size, 3, 24, 4\)"),
        ({"car_100_mesh.mat": mat(im=car(1)[:5])}, r"im is uint8 \(5, 8, 3, 24, 4\)"),
        ({"car_100_mesh.mat": mat(picture=car(1))}, "car_100_mesh.mat: a MATLAB file without `im`"),
        ({"car_100_mesh.mat": mat(im=car(1))[:700]}, "car_100_mesh.mat: not a readable MATLAB file"),
        ({"car_100_mesh.mat": b"text"}, "car_100_mesh.mat: not a readable MATLAB file"),
        ({"car_100_mesh.mat": b""}, "car_100_mesh.mat: not a readable MATLAB file"),
        ({"list.txt": b""}, "list.txt: 0 names"),
        ({"list.txt": b"car_007_mesh\ncar_007_mesh\n"}, "list.txt: 2 names, 1 different"),
        ({"list.txt": None}, "list.txt"),
    ],
    ids=["missing", "dtype", "views", "oblong", "key", "cut", "text", "empty", "nothing", "twice", "no list"],
)
def test_bad_files(tmp_path, how, changes, words):
    path = how(tmp_path / "cars.x", content(**{f"data/cars/{name}": data for name, data in changes.items()}))
    with pytest.raises(InputError, match=words) as error:
        Cars3D(path, 8)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("share", [0.1, 0.6, 0.99])
def test_truncated_archive(tmp_path, share):
    path = archive(tmp_path / "cars.tar.gz", content())
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(InputError, match="damaged or truncated archive") as error:
        open_dataset(path, 8)
    assert str(path) in str(error.value)


def test_bad_arguments(tmp_path):
    with pytest.raises(InputError, match="no such file or folder"):
        Cars3D(tmp_path / "absent")
    with pytest.raises(InputError, match="image_size: 0"):
        Cars3D(folder(tmp_path, content()), 0)
