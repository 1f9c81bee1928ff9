"""Files of the 3dshapes schema: written, read back piece by piece, and refused with the reason when bad."""

import io
import resource
import shutil
import subprocess
import sys
import zipfile

import h5py
import numpy as np
import pytest

from encdiff.data import SubGrid, procedural
from encdiff.data.procedural import FACTOR_NAMES, FACTOR_SIZES, ProceduralShapes3D
from encdiff.data.shapes3d import Shapes3D, write_shapes3d
from encdiff.data.sprites import ProceduralSprites
from encdiff.errors import InputError

GRID = (3, 2, 2, 3, 2, 3)


@pytest.fixture(scope="module")
def room():
    return ProceduralShapes3D(9, GRID)


@pytest.fixture
def file(room, tmp_path):
    path = tmp_path / "room.h5"
    write_shapes3d(path, room, batch=50)
    return path


def save(path, images, labels):
    with h5py.File(path, "w") as f:
        for key, value in (("images", images), ("labels", labels)):
            if value is not None:
                f[key] = value
    return path


def labels_of(sizes):
    axes = [np.arange(n) * 0.1 for n in sizes]
    return np.stack(np.meshgrid(*axes, indexing="ij"), -1).reshape(-1, 6)


def test_round_trip(room, file):
    data = Shapes3D(file)
    assert (data.name, data.factor_names, data.factor_sizes, data.image_size) == ("room.h5", FACTOR_NAMES, GRID, 9)
    assert len(data) == len(room) == 216
    everything = np.arange(216)
    np.testing.assert_array_equal(data.images(everything), room.images(everything))
    np.testing.assert_array_equal(data.factors(everything), room.factors(everything))
    np.testing.assert_array_equal(data.labels(everything), room.labels(everything))
    np.testing.assert_array_equal(data.indices(data.factors(everything)), everything)


def test_written_schema(file, room):
    with h5py.File(file) as f:
        assert f["images"].shape == (216, 9, 9, 3) and f["images"].dtype == np.uint8 and f["images"].chunks
        assert f["labels"].shape == (216, 6) and f["labels"].dtype == np.float64
        np.testing.assert_array_equal(f["labels"][:], room.labels(np.arange(216)))


def test_random_unsorted_repeated_indices(room, file):
    rng = np.random.default_rng()
    for count in (0, 1, 7, 100):
        indices = rng.integers(0, 216, count)
        np.testing.assert_array_equal(Shapes3D(file).images(indices), room.images(indices))


def test_reads_only_what_is_asked(file):
    class Spy:
        def __init__(self, source):
            self.source, self.shape, self.asked = source, source.shape, 0

        def __getitem__(self, key):
            self.asked += len(range(*key.indices(self.shape[0])))
            return self.source[key]

    data = Shapes3D(file)
    assert isinstance(data._images, h5py.Dataset)
    data._images = spy = Spy(data._images)
    data.images([215, 0, 7, 6, 0, 215])
    assert spy.asked == 4


def test_explicit_order_of_values_survives(tmp_path):
    room = ProceduralShapes3D(5, ((7, 1), 1, (4, 3), (6, 2), 2, (14, 0, 7)))
    write_shapes3d(tmp_path / "r.h5", room)
    np.testing.assert_array_equal(Shapes3D(tmp_path / "r.h5").labels(range(len(room))), room.labels(range(len(room))))


def test_full_grid_is_recognised(tmp_path):
    axes = procedural.factor_labels()
    labels = np.stack(np.meshgrid(*axes, indexing="ij"), -1).reshape(-1, 6)
    images = np.random.default_rng(0).integers(0, 256, (480_000, 1, 1, 3), np.uint8)
    data = Shapes3D(save(tmp_path / "3dshapes.h5", images, labels))
    assert data.factor_sizes == FACTOR_SIZES
    np.testing.assert_array_equal(data.images([479_999, 3]), images[[479_999, 3]])
    np.savez(tmp_path / "3dshapes.npz", images=images)
    unlabelled = Shapes3D(tmp_path / "3dshapes.npz")
    np.testing.assert_array_equal(unlabelled.images([77_777, 5]), images[[77_777, 5]])
    np.testing.assert_array_equal(unlabelled.labels([77_777]), data.labels([77_777]))


@pytest.mark.parametrize("keys", [("images", "labels"), ("labels", "images")])
def test_npz_is_mapped_not_loaded(room, tmp_path, keys):
    arrays = {"images": room.images(np.arange(216)), "labels": room.labels(np.arange(216))}
    np.savez(tmp_path / "room.bin.npz", **{key: arrays[key] for key in keys})
    data = Shapes3D(tmp_path / "room.bin.npz")
    assert isinstance(data._images, np.memmap) and data.factor_sizes == GRID
    np.testing.assert_array_equal(data.images([200, 3, 3, 41]), arrays["images"][[200, 3, 3, 41]])


def test_compressed_npz_is_unpacked_once(room, tmp_path):
    everything, seen = np.arange(216), []
    np.savez_compressed(tmp_path / "room.npz", images=room.images(everything), labels=room.labels(everything))
    for _ in range(2):
        data = Shapes3D(tmp_path / "room.npz", progress=lambda done, total: seen.append((done, total)))
        np.testing.assert_array_equal(data.images(everything), room.images(everything))
        assert isinstance(data._images, np.memmap) and data.factor_sizes == GRID
    assert len(seen) == 1 and seen[0][0] == seen[0][1] > 216 * 9 * 9 * 3


def test_other_factors_are_named_in_the_file(tmp_path):
    sprites = SubGrid(ProceduralSprites(12), (3, 2, 4, 2, 2))
    write_shapes3d(tmp_path / "sprites.h5", sprites)
    data = Shapes3D(tmp_path / "sprites.h5")
    assert data.factor_names == ("shape", "scale", "orientation", "x", "y") and data.factor_sizes == (3, 2, 4, 2, 2)
    assert data.cyclic == ("orientation",) and data.categories == ("shape",)
    np.testing.assert_array_equal(data.images(np.arange(96)), sprites.images(np.arange(96)))
    shutil.copy(tmp_path / "sprites.h5", tmp_path / "bad.h5")
    with h5py.File(tmp_path / "bad.h5", "a") as file:
        file["labels"].attrs["factor_names"] = ["shape"] * 5
    with pytest.raises(InputError, match=r"bad\.h5: the labels' factor_names are .* must be different names"):
        Shapes3D(tmp_path / "bad.h5")


def test_smaller_images_are_block_averages(tmp_path):
    images = np.random.default_rng().integers(0, 256, (2, 12, 12, 3), np.uint8)
    path = save(tmp_path / "two.h5", images, labels_of((1, 1, 1, 1, 2, 1)))
    exact = images.reshape(2, 4, 3, 4, 3, 3).mean(axis=(2, 4))
    small = Shapes3D(path, 4)
    assert small.image_size == 4
    np.testing.assert_array_equal(small.images([1, 0]), np.floor(exact + 0.5 + 1e-9)[[1, 0]])
    for size in (5, 24, 0, -1):
        with pytest.raises(InputError, match="must divide 12"):
            Shapes3D(path, size)


def test_interruption_leaves_nothing(room, file, tmp_path):
    before = file.read_bytes()

    def stop(done, total):
        assert (total, done % 50) == (216, 0)
        if done == 150:
            raise KeyboardInterrupt

    for path in (file, tmp_path / "new.h5"):
        with pytest.raises(KeyboardInterrupt):
            write_shapes3d(path, room, batch=50, progress=stop)
    assert [p.name for p in tmp_path.iterdir()] == ["room.h5"] and file.read_bytes() == before


@pytest.mark.parametrize("share", [0.02, 0.5, 0.97])
def test_full_disk_leaves_nothing(room, file, tmp_path, share):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = file.read_bytes()
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(len(before) * share), limits[1]))
    try:
        with pytest.raises(OSError, match=r"File too large: .*room\.h5"):
            write_shapes3d(file, room, batch=50)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [p.name for p in tmp_path.iterdir()] == ["room.h5"] and file.read_bytes() == before


FULL = """
import resource, sys
import numpy as np
from encdiff.data.procedural import ProceduralShapes3D
from encdiff.data.shapes3d import write_shapes3d

class Noise(ProceduralShapes3D):
    def images(self, indices):
        return np.random.default_rng(len(indices)).integers(0, 256, (len(indices), 64, 64, 3), np.uint8)

resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), resource.RLIM_INFINITY))
try:
    write_shapes3d(sys.argv[1], Noise(64, (2, 2, 3, 3, 4, 5)), batch=100)
except OSError as error:
    print(error, end="")
"""


@pytest.mark.parametrize("mib", [1.5, 3.3, 5.5, 8.4])
def test_a_full_disk_ends_no_process(tmp_path, mib):
    """HDF5 ends it where it cannot write what it has held back; the file has 8.5 MiB."""
    command = [sys.executable, "-c", FULL, str(tmp_path / "x.h5"), str(int(mib * 2**20))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0 and done.stdout == f"[Errno 27] File too large: '{tmp_path}/x.h5'", done.stderr
    assert not list(tmp_path.iterdir())


def test_progress_counts_images(room, tmp_path):
    seen = []
    write_shapes3d(tmp_path / "r.h5", room, batch=100, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(100, 216), (200, 216), (216, 216)]


def test_writer_refuses(room, tmp_path):
    with pytest.raises(InputError, match="existing folder"):
        write_shapes3d(tmp_path / "no" / "r.h5", room)
    with pytest.raises(InputError, match="existing folder"):
        write_shapes3d(tmp_path, room)
    with pytest.raises(InputError, match="batch: 0"):
        write_shapes3d(tmp_path / "r.h5", room, batch=0)
    for change in ({"factor_names": (), "factor_sizes": ()}, {"is_grid": False}, {"instances": 2}):
        other = ProceduralShapes3D(4)
        vars(other).update(change)
        with pytest.raises(InputError, match="holds a grid of factors, one image of each; --shards 1GB takes any set"):
            write_shapes3d(tmp_path / "r.h5", other)
    assert not list(tmp_path.iterdir())


IMAGES, LABELS = np.zeros((8, 4, 4, 3), np.uint8), labels_of((2, 1, 2, 2, 1, 1))


@pytest.mark.parametrize(
    "images, labels, words",
    [
        (None, LABELS, "without images"),
        (IMAGES, None, "without labels"),
        (None, None, "without images and labels"),
        (IMAGES.astype(np.float32), LABELS, "images are float32"),
        (IMAGES[..., 0], LABELS, r"images are uint8 \(8, 4, 4\)"),
        (IMAGES[:, :3], LABELS, r"\(8, 3, 4, 3\)"),
        (IMAGES[..., :2], LABELS, r"\(8, 4, 4, 2\)"),
        (IMAGES[:0], LABELS, r"\(0, 4, 4, 3\)"),
        (IMAGES, LABELS[:7], r"labels are float64 \(7, 6\); must be float64 \(8, 6\)"),
        (IMAGES, LABELS[:, :5], r"\(8, 5\)"),
        (IMAGES, LABELS.astype(np.int64), "labels are int64"),
        (IMAGES, b"words", "labels are"),
        (IMAGES, np.where(LABELS == 0, np.nan, LABELS), "NaN"),
        (IMAGES[:7], LABELS[:7], "7 images, but its labels span a grid of 2 x 1 x 2 x 2 x 1 x 1"),
        (IMAGES, LABELS[[0, 1, 2, 3, 4, 6, 5, 7]], "order of a grid .* at image 5"),
        (IMAGES, LABELS[[0, 1, 2, 3, 4, 5, 6, 6]], "at image 7"),
        (IMAGES, LABELS.reshape(2, 2, 2, 6).transpose(2, 1, 0, 3).reshape(8, 6), "order of a grid"),
    ],
)
def test_foreign_h5(tmp_path, images, labels, words):
    path = save(tmp_path / "bad.h5", images, labels)
    with pytest.raises(InputError, match=words) as error:
        Shapes3D(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("part", [0.0, 0.3, 0.99])
def test_truncated_h5(file, part):
    whole = file.read_bytes()
    file.write_bytes(whole[: int(part * len(whole))])
    with pytest.raises(InputError, match="truncated") as error:
        Shapes3D(file)
    assert str(file) in str(error.value)


def test_damaged_pixels_are_named_when_read(file):
    with h5py.File(file) as f:
        chunk = f["images"].id.get_chunk_info(0)
    content = bytearray(file.read_bytes())
    content[chunk.byte_offset : chunk.byte_offset + chunk.size] = b"\xff" * chunk.size
    file.write_bytes(content)
    data = Shapes3D(file)
    with pytest.raises(InputError, match="damaged") as error:
        data.images([0])
    assert str(file) in str(error.value)


def test_missing_and_foreign_files(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        Shapes3D(tmp_path / "absent.h5")
    (tmp_path / "text.h5").write_text("not an h5 file")
    with pytest.raises(InputError, match="neither HDF5 nor npz"):
        Shapes3D(tmp_path / "text.h5")


def bad_npz(path, kind):
    if kind == "unlabelled":
        np.savez(path, images=IMAGES)
    elif kind == "no images":
        np.savez(path, pictures=IMAGES)
    elif kind == "objects":
        np.savez(path, images=np.array([{}], dtype=object))
    elif kind == "pickled labels":
        np.savez(path, images=IMAGES, labels=np.array([{}], dtype=object))
    elif kind == "fortran":
        np.savez(path, images=np.asfortranarray(IMAGES), labels=LABELS)
    elif kind == "float":
        np.savez(path, images=IMAGES.astype(float), labels=LABELS)
    else:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("images.npy", {"no header": b"nonsense", "short": _header() + b"\0" * 9}[kind])


def _header():
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(stream, {"descr": "|u1", "fortran_order": False, "shape": (8, 400, 400, 3)})
    return stream.getvalue()


@pytest.mark.parametrize(
    "kind, words",
    [
        ("unlabelled", "8 images without labels"),
        ("no images", "key `images`"),
        ("objects", "images are object"),
        ("pickled labels", "damaged or foreign"),
        ("fortran", "Fortran order"),
        ("float", "images are float64"),
        ("no header", "damaged or foreign"),
        ("short", "damaged or foreign"),
    ],
)
def test_bad_npz(tmp_path, kind, words):
    path = tmp_path / "bad.npz"
    bad_npz(path, kind)
    with pytest.raises(InputError, match=words) as error:
        Shapes3D(path)
    assert str(path) in str(error.value)


def test_truncated_npz(tmp_path):
    np.savez(tmp_path / "cut.npz", images=IMAGES, labels=LABELS)
    whole = (tmp_path / "cut.npz").read_bytes()
    (tmp_path / "cut.npz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match="truncated"):
        Shapes3D(tmp_path / "cut.npz")
