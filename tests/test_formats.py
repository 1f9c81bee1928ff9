"""From a spec to a data set: names, ENCDIFF_DATA, parts, and formats told by content."""

import gzip
import io
import zipfile

import numpy as np
import pytest
import test_cars3d
import test_celeba
import test_dsprites
import test_smallnorb
from PIL import Image
from test_mpi3d import numbered

from encdiff.data import SubGrid, open_dataset
from encdiff.data.celeba import CelebA
from encdiff.data.dataset import ACCEPTED
from encdiff.data.folder import ImageFolder
from encdiff.data.formats import open_path
from encdiff.data.procedural import ProceduralShapes3D
from encdiff.data.shapes3d import Shapes3D, write_shapes3d
from encdiff.data.sprites import ProceduralSprites
from encdiff.errors import InputError


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """A folder with every set in little, under the published names."""
    root = tmp_path_factory.mktemp("data")
    write_shapes3d(root / "3dshapes.h5", ProceduralShapes3D(8, (1, 1, 1, 2, 2, 2)))
    for name, count in (("mpi3d_toy", 1_036_800), ("real3d_complicated_shapes_ordered", 460_800)):
        np.savez(root / f"{name}.npz", images=numbered(count))
    test_cars3d.archive(root / "nips2015-analogy-data.tar.gz", test_cars3d.content())
    sprites = {key: value for key, value in test_dsprites.arrays().items() if key != "metadata"}
    np.savez_compressed(root / "dsprites_ndarray_co1sh3sc6or40x32y32_64x64.npz", **sprites)
    test_smallnorb.write(root / "smallnorb", {"training": test_smallnorb.part((4, 6), 1)})
    test_celeba.write(root / "celeba", True)
    return root


NAMED = {
    "shapes3d": ("Shapes3D", (1, 1, 1, 2, 2, 2)),
    "mpi3d_toy": ("MPI3D", (6, 6, 2, 3, 3, 40, 40)),
    "mpi3d_real_complex": ("MPI3D", (4, 4, 2, 3, 3, 40, 40)),
    "cars3d": ("Cars3D", (4, 24, 3)),
    "published-cars3d": ("Cars3D", (4, 24, 3)),
    "dsprites": ("DSprites", (3, 2, 4, 3, 2)),
    "smallnorb": ("SmallNORB", (5, 2, 3, 2)),
    "celeba": ("CelebA", (2, 2, 2)),
}


@pytest.mark.parametrize("name", NAMED)
def test_bare_names_lie_in_encdiff_data(library, monkeypatch, tmp_path, name):
    monkeypatch.setenv("ENCDIFF_DATA", str(library))
    monkeypatch.chdir(tmp_path)
    data = open_dataset(name)
    assert (type(data).__name__, data.factor_sizes) == NAMED[name]
    monkeypatch.delenv("ENCDIFF_DATA")
    again = open_dataset(data.spec)
    assert (type(again).__name__, again.factor_sizes, again.name) == (*NAMED[name], data.name)
    np.testing.assert_array_equal(again.images([5, 0]), data.images([5, 0]))


@pytest.mark.parametrize("name, grid", [("cars3d", "2,3,2"), ("dsprites", "3,1,4,1,2"), ("smallnorb", "5,1,2,1")])
def test_part_of_a_named_set(library, monkeypatch, tmp_path, name, grid):
    monkeypatch.setenv("ENCDIFF_DATA", str(library))
    monkeypatch.chdir(tmp_path)
    data = open_dataset(f"{name}:{grid}", 4)
    assert isinstance(data, SubGrid) and data.image_size == 4
    assert data.factor_sizes == tuple(map(int, grid.split(",")))
    assert (
        data.spec.endswith(f":{grid}") and open_dataset(data.spec, 4).images([3]).tolist() == data.images([3]).tolist()
    )


def test_part_of_the_misread_cars(library, monkeypatch):
    monkeypatch.setenv("ENCDIFF_DATA", str(library))
    part, right = (
        open_dataset(f"published-cars3d:{library}/nips2015-analogy-data.tar.gz:1,24,1", 8),
        open_dataset("cars3d", 8),
    )
    np.testing.assert_array_equal(part.images([5]), right.images(right.indices([[0, 5, 0]]) // 10))
    assert part.spec.startswith("published-cars3d:") and part.spec.endswith(":1,24,1")


@pytest.mark.parametrize("name", ["mpi3d_toy", "dsprites:1,1,1,1,1", "celeba:train"])
def test_named_but_absent(monkeypatch, tmp_path, name):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("ENCDIFF_DATA", raising=False)
    with pytest.raises(InputError, match="ENCDIFF_DATA must name the folder of its files"):
        open_dataset(name)
    monkeypatch.setenv("ENCDIFF_DATA", str(tmp_path))
    with pytest.raises(InputError, match=f"nor in ENCDIFF_DATA={tmp_path}"):
        open_dataset(name)


def test_files_that_lie_in_encdiff_data_itself(monkeypatch, tmp_path):
    root = test_celeba.write(tmp_path / "data", True)
    test_smallnorb.write(root, {"training": test_smallnorb.part((4, 6), 1)})
    test_cars3d.folder(root, test_cars3d.content())
    monkeypatch.setenv("ENCDIFF_DATA", str(root))
    for name in ("celeba", "smallnorb", "cars3d"):
        assert type(open_dataset(name)).__name__ == NAMED[name][0]


def test_a_colon_in_a_path_is_part_of_it(tmp_path):
    write_shapes3d(tmp_path / "room:2.h5", ProceduralShapes3D(8, (1, 1, 1, 2, 2, 2)))
    assert len(open_dataset(f"{tmp_path}/room:2.h5")) == 8
    assert len(open_dataset(f"{tmp_path}/room:2.h5:1,1,1,2,1,1")) == 2


def test_a_local_path_comes_first(library, monkeypatch, tmp_path):
    monkeypatch.setenv("ENCDIFF_DATA", str(library))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "celeba").mkdir()
    Image.new("RGB", (9, 9)).save(tmp_path / "celeba" / "x.png")
    assert isinstance(open_dataset("celeba", 4), ImageFolder)


@pytest.mark.parametrize(
    "file", ["mpi3d_toy.npz", "dsprites_ndarray_co1sh3sc6or40x32y32_64x64.npz", "nips2015-analogy-data.tar.gz"]
)
def test_names_of_files_tell_nothing(library, tmp_path, file):
    (tmp_path / "data.bin").symlink_to(library / file)
    assert type(open_dataset(tmp_path / "data.bin")) is type(open_dataset(library / file))


def test_labelled_images_of_an_mpi3d_length_are_shapes3d(tmp_path):
    sizes = (10, 10, 10, 8, 4, 15)
    labels = np.stack(np.unravel_index(np.arange(480_000), sizes), -1)[:460_800].astype(float)
    np.savez(tmp_path / "x.npz", images=numbered(460_800), labels=labels)
    with pytest.raises(InputError, match="460800 images, but its labels span a grid"):
        open_dataset(tmp_path / "x.npz")


def test_rendered_sets():
    assert isinstance(open_dataset("sprites"), ProceduralSprites)
    assert isinstance(open_dataset("procedural:1,2,3,4,4,5"), ProceduralShapes3D)


@pytest.mark.parametrize("kind", ["zip", "gzip", "tar", "empty", "text", "pickle"])
def test_foreign_files(tmp_path, kind):
    path = tmp_path / "x"
    if kind == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("notes.txt", "hello")
    elif kind == "tar":
        test_cars3d.archive(path, {"notes.txt": b"hello"})
    else:
        path.write_bytes(
            {"gzip": gzip.compress(b"hello"), "empty": b"", "text": b"hello", "pickle": b"\x80\x04K."}[kind]
        )
    with pytest.raises(InputError) as error:
        open_path(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_a_zip_of_pictures_needs_attributes(tmp_path):
    stream = io.BytesIO()
    Image.new("RGB", (9, 9)).save(stream, "jpeg")
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr("a.jpg", stream.getvalue())
    with pytest.raises(InputError, match="list_attr_celeba.txt: no such file"):
        open_dataset(tmp_path / "x.zip")


def test_damaged_npz_of_every_kind(library, tmp_path):
    for name in ("mpi3d_toy", "dsprites_ndarray_co1sh3sc6or40x32y32_64x64"):
        whole = (library / f"{name}.npz").read_bytes()
        (tmp_path / "x.npz").write_bytes(whole[: len(whole) // 2])
        with pytest.raises(InputError, match="x.npz: neither HDF5 nor npz"):
            open_dataset(tmp_path / "x.npz")


def test_every_format_is_in_the_message():
    for word in ("procedural", "sprites", ".h5", ".npz", "MPI3D", "dSprites", "Cars3D", "SmallNORB", "CelebA", "LMDB"):
        assert word in ACCEPTED


def test_any_grid_is_written_and_read_again(library, monkeypatch, tmp_path):
    monkeypatch.setenv("ENCDIFF_DATA", str(library))
    write_shapes3d(tmp_path / "mpi3d.h5", open_dataset("mpi3d_toy:2,2,1,1,1,2,2"))
    assert open_dataset(tmp_path / "mpi3d.h5").cyclic == ()
    source = open_dataset("cars3d:4,6,3", 8)
    write_shapes3d(tmp_path / "cars.h5", source)
    copy = open_dataset(tmp_path / "cars.h5")
    assert isinstance(copy, Shapes3D) and copy.factor_names == source.factor_names == ("elevation", "azimuth", "object")
    assert copy.factor_sizes == (4, 6, 3) and (copy.cyclic, copy.categories) == (("azimuth",), ("object",))
    np.testing.assert_array_equal(copy.images(np.arange(72)), source.images(np.arange(72)))
    np.testing.assert_array_equal(copy.labels(np.arange(72)), source.labels(np.arange(72)))
    for name in ("smallnorb", "celeba"):
        with pytest.raises(InputError, match="holds a grid of factors, one image of each; --shards 1GB takes any set"):
            write_shapes3d(tmp_path / "x.h5", open_dataset(name))
    assert isinstance(open_dataset("celeba"), CelebA) and not (tmp_path / "x.h5").exists()


@pytest.mark.parametrize(
    "typed, meant",
    [("3dshapes", "shapes3d"), ("Shapes3D", "shapes3d"), ("shape3d", "shapes3d"), ("dsprite", "dsprites"),
     ("procedual:5,5,5,4,4,5", "procedural"), ("CelebA", "celeba"), ("smallnorb-5x46789x9x18x6x2x96x96-training-dat",
     "smallnorb"), ("mpi3d", "mpi3d_toy|mpi3d_real"), ("cars", "cars3d")],
)  # fmt: skip
def test_a_name_that_is_nearly_right_is_answered_with_the_right_one(typed, meant, monkeypatch):
    monkeypatch.delenv("ENCDIFF_DATA", raising=False)
    with pytest.raises(InputError, match=f"did you mean ({meant})\\?"):
        open_dataset(typed)


@pytest.mark.parametrize("typed", ["photos/2024", "x.h5", "shapes3d", "quickstart"])
def test_nothing_is_suggested_for_another_name(typed, monkeypatch):
    monkeypatch.delenv("ENCDIFF_DATA", raising=False)
    with pytest.raises(InputError) as error:
        open_dataset(typed)
    assert "did you mean" not in str(error.value)
