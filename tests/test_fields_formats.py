"""Fields in files of others: PDEBench's HDF5, arrays of NumPy; and files that are damaged or hostile."""

import pickle

import h5py
import numpy as np
import pytest
from scipy.io import savemat

from encdiff.errors import InputError
from encdiff.fields.formats import open_fields
from encdiff.fields.grid import Grid

N, T, X, Y = 3, 4, 5, 6  # no two sizes alike, so that no axis is taken for another
RNG = np.random.default_rng(0)
NU, TENSOR = RNG.random((N, X, Y), np.float32), RNG.random((N, 1, X, Y), np.float32)
FLOW = {key: RNG.random((N, T, X, Y), np.float32) for key in ("Vx", "Vy", "density", "pressure")}
GROUP = RNG.random((N, T, Y, X, 2), np.float32)


def middles(count, low=0.0, high=1.0):
    return low + (high - low) * (np.arange(count) + 0.5) / count


COORDINATES = {"x-coordinate": middles(X, -1, 1), "y-coordinate": middles(Y, 0, 3).astype(np.float32)}
TIMES = {"t-coordinate": 0.1 * np.arange(T + 1)}


def write(path, **arrays):
    with h5py.File(path, "w") as file:
        for key, array in arrays.items():
            file[key] = array
    return path


def groups(path, data=GROUP):
    """As the generator of diffusion-reaction writes them."""
    with h5py.File(path, "w") as file:
        for i, sample in enumerate(data):
            file.create_dataset(f"{i:04}/data", data=sample, compression="lzf")
            file[f"{i:04}/grid/x"], file[f"{i:04}/grid/y"] = middles(X, -1, 1), middles(Y, -1, 1)
            file[f"{i:04}/grid/t"] = np.linspace(0, 5, T)
    return path


def turned(array):
    """Rows are y."""
    return np.swapaxes(array, -1, -2)


# ---- PDEBench


def test_darcy(tmp_path):
    data = open_fields(write(tmp_path / "a.hdf5", nu=NU, tensor=TENSOR, **COORDINATES))
    assert (len(data), data.times, data.grid.channels) == (N, None, ("permeability", "pressure"))
    np.testing.assert_allclose(data.grid.domain, (-1, 1, 0, 3), atol=1e-6)
    fields = data.read([2, 0])
    assert fields.dtype == np.float32 and fields.shape == (2, 2, Y, X)
    np.testing.assert_array_equal(fields[:, 0], turned(NU)[[2, 0]])
    np.testing.assert_array_equal(fields[:, 1], turned(TENSOR[:, 0])[[2, 0]])


def test_compressible_flow(tmp_path):
    data = open_fields(write(tmp_path / "a.h5", **FLOW, **COORDINATES, **TIMES))
    assert data.grid.channels == ("Vx", "Vy", "density", "pressure")
    np.testing.assert_allclose(data.times, [0, 0.1, 0.2, 0.3])
    fields = data.read([1])
    assert fields.shape == (1, T, 4, Y, X)
    for c, array in enumerate(FLOW.values()):
        np.testing.assert_array_equal(fields[0, :, c], turned(array[1]))


def test_groups_of_samples(tmp_path):
    data = open_fields(groups(tmp_path / "a.h5"))
    assert data.grid == Grid(("channel0", "channel1"), Y, X, data.grid.domain)
    np.testing.assert_allclose(data.grid.domain, (-1, 1, -1, 1))
    np.testing.assert_allclose(data.times, np.linspace(0, 5, T))
    np.testing.assert_array_equal(data.read([2, 0]), GROUP[[2, 0]].transpose(0, 1, 4, 2, 3))
    assert data.read([]).shape == (0, T, 2, Y, X)


def test_coordinates_may_be_missing_or_edges(tmp_path):
    assert open_fields(write(tmp_path / "a.h5", nu=NU, tensor=TENSOR)).grid.domain == (0, 1, 0, 1)
    edges = {"x-coordinate": np.linspace(0, 4, X + 1)}
    np.testing.assert_allclose(
        open_fields(write(tmp_path / "b.h5", nu=NU, tensor=TENSOR, **edges)).grid.domain[:2], (0, 4)
    )
    np.testing.assert_array_equal(open_fields(write(tmp_path / "c.h5", **FLOW)).times, np.arange(T))


@pytest.mark.parametrize(
    "arrays, words",
    [
        ({"nu": NU, "tensor": TENSOR[:2]}, r"nu \(3, 5, 6\) and tensor \(2, 1, 5, 6\); must be \(n, X, Y\)"),
        ({"nu": NU, "tensor": TENSOR[:, 0]}, r"tensor is float32 \(3, 5, 6\); must be numbers \(n, c, x, y\)"),
        ({"nu": NU.astype(complex), "tensor": TENSOR}, "nu are complex128"),
        ({"nu": NU.astype("S4"), "tensor": TENSOR}, "nu are .S4"),
        ({"nu": NU[:0], "tensor": TENSOR[:0]}, r"nu is float32 \(0, 5, 6\)"),
        (FLOW | {"Vy": FLOW["Vy"][:, :2]}, "Vx, Vy, density, pressure are of shapes .* must be of one"),
        ({"nu": NU, "tensor": TENSOR, "x-coordinate": middles(7)}, "x-coordinate must be 5 or 6 increasing numbers"),
        ({"nu": NU, "tensor": TENSOR, "y-coordinate": middles(Y) ** 2}, "y-coordinate must be equally far apart"),
        ({"nu": NU, "tensor": TENSOR, "y-coordinate": middles(Y)[::-1]}, "y-coordinate must be 6 or 7 increasing"),
        ({"nu": NU, "tensor": TENSOR, "x-coordinate": NU}, r"x-coordinate is float32 \(3, 5, 6\)"),
        (FLOW | {"t-coordinate": np.zeros(T)}, "t-coordinate must be 4 or 5 increasing"),
        ({"u": NU}, "an HDF5 file of u; must hold nu and tensor"),
        ({}, "an HDF5 file of nothing; must hold"),
        ({"0000": NU}, "0000/data is not there; must be numbers"),
    ],
)
def test_foreign_hdf5(tmp_path, arrays, words):
    with pytest.raises(InputError, match=rf"a\.h5: {words}"):
        open_fields(write(tmp_path / "a.h5", **arrays))


def test_groups_of_other_shapes(tmp_path):
    path = groups(tmp_path / "a.h5")
    with h5py.File(path, "r+") as file:
        del file["0001/data"]
        file["0001/data"] = GROUP[1, :2]
    data = open_fields(path)
    with pytest.raises(InputError, match=r"a\.h5: 0001/data is \(2, 6, 5, 2\), must be \(4, 6, 5, 2\) as the first"):
        data.read([0, 1])


def test_links_are_not_followed(tmp_path):
    secret, path = groups(tmp_path / "secret.h5"), tmp_path / "a.h5"
    for links in (
        {"0000": h5py.ExternalLink("secret.h5", "0000")},
        {"0000/data": h5py.ExternalLink("secret.h5", "0000/data")},
        {"nu": h5py.ExternalLink("secret.h5", "0000/data"), "tensor": TENSOR},
        {"0000/data": GROUP[0], "0000/grid": h5py.ExternalLink("secret.h5", "0000/grid")},
    ):
        with pytest.raises(InputError, match=r"a\.h5: .* (is a link|is no group of the file itself), must be"):
            open_fields(write(path, **links))
    assert len(open_fields(secret)) == N


def test_nan_is_named_by_its_sample(tmp_path):
    bad = GROUP.copy()
    bad[1, 0, 0, 0, 0] = np.nan
    with pytest.raises(InputError, match=r"a\.h5: sample 1 holds NaN or infinity"):
        open_fields(groups(tmp_path / "a.h5", bad)).read([0, 1])
    np.save(tmp_path / "b.npy", np.full((2, 1, 3, 3), 1e300))
    with pytest.raises(InputError, match=r"b\.npy: sample 0 holds NaN or infinity"):
        open_fields(tmp_path / "b.npy").read([1, 0])


def test_damaged_hdf5(tmp_path):
    content = groups(tmp_path / "a.h5").read_bytes()
    for size in (len(content) - 1, len(content) // 2, 600):
        (tmp_path / "a.h5").write_bytes(content[:size])
        with pytest.raises(InputError, match=r"a\.h5: "):
            open_fields(tmp_path / "a.h5").read([0, 1, 2])


# ---- arrays of NumPy


@pytest.mark.parametrize("dtype", [np.float16, np.float32, ">f8", np.int16, np.uint8])
@pytest.mark.parametrize("order", ["C", "F"])
def test_npy(tmp_path, dtype, order):
    array = np.asarray(RNG.uniform(0, 200, (N, 2, Y, X)), dtype, order=order)
    np.save(tmp_path / "a.npy", array)
    data = open_fields(tmp_path / "a.npy")
    assert data.grid == Grid(("channel0", "channel1"), Y, X) and data.times is None
    np.testing.assert_array_equal(data.read([2, 1, 2]), array[[2, 1, 2]].astype(np.float32))


def test_npy_of_frames_and_of_one_channel(tmp_path):
    frames = RNG.random((N, T, 2, Y, X))
    np.save(tmp_path / "a.npy", frames)
    data = open_fields(tmp_path / "a.npy")
    np.testing.assert_array_equal(data.times, np.arange(T))
    np.testing.assert_array_equal(data.read([1]), frames[[1]].astype(np.float32))
    np.save(tmp_path / "height.npy", frames[:, 0, 0])
    data = open_fields(tmp_path / "height.npy")
    assert data.grid.channels == ("height",) and data.read([0]).shape == (1, 1, Y, X)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_a_channel_for_each_array(tmp_path, save):
    x, y = RNG.random((2, N, Y, X), np.float32)
    (tmp_path / "pairs").mkdir()
    np.save(tmp_path / "pairs" / "x.npy", x)
    np.save(tmp_path / "pairs" / "y.npy", y)
    (tmp_path / "pairs" / "README").write_text("of whom it is")
    save(tmp_path / "pairs.npz", x=x, y=y)
    for path in (tmp_path / "pairs", tmp_path / "pairs.npz"):
        data = open_fields(path)
        assert data.grid.channels == ("x", "y") and data.name == path.name
        np.testing.assert_array_equal(data.read([2, 0]), np.stack([x, y], 1)[[2, 0]])


def test_content_decides_not_the_name(tmp_path):
    np.save(tmp_path / "a.npy", TENSOR)
    (tmp_path / "a.npy").rename(tmp_path / "a.h5")
    assert len(open_fields(tmp_path / "a.h5")) == N


def test_the_folder_of_data(tmp_path, monkeypatch):
    np.save(tmp_path / "a.npy", TENSOR)
    monkeypatch.setenv("ENCDIFF_DATA", str(tmp_path))
    data = open_fields("a.npy")
    assert data.spec == str(tmp_path / "a.npy") and len(open_fields("a.npy:1:3")) == 2
    with pytest.raises(InputError, match=f"data 'b.npy': not found here nor in ENCDIFF_DATA={tmp_path}; must be"):
        open_fields("b.npy")


@pytest.mark.parametrize(
    "array, words",
    [
        (np.zeros((2, 3)), r"is float64 \(2, 3\); must be \(n, C, H, W\)"),
        (np.zeros((2, 40, 3, 3)), "has 40 channels, must have at most 16"),
        (np.zeros((0, 1, 3, 3)), "none of 0 length"),
        (np.zeros((2, 1, 3, 3), complex), "is complex128"),
        (np.full((2, 1, 3, 3), "a"), "is <U1"),
        (np.zeros((2, 1, 3, 3), [("a", "f4")]), "must be an array of numbers"),
    ],
)
def test_foreign_npy(tmp_path, array, words):
    np.save(tmp_path / "a.npy", array)
    with pytest.raises(InputError, match=rf"a\.npy: .*{words}"):
        open_fields(tmp_path / "a.npy")


class Trap:
    def __reduce__(self):
        return pytest.fail, ("unpickled",)


def test_nothing_is_unpickled(tmp_path):
    array = np.empty((1, 1, 2, 2), object)
    array[:] = Trap()
    np.save(tmp_path / "a.npy", array, allow_pickle=True)
    np.savez(tmp_path / "a.npz", x=array)
    (tmp_path / "b.npy").write_bytes(pickle.dumps(Trap()))
    for name in ("a.npy", "a.npz", "b.npy"):
        with pytest.raises(InputError, match=name):
            open_fields(tmp_path / name)


def test_damaged_npy(tmp_path):
    path = tmp_path / "a.npy"
    np.save(path, TENSOR)
    content = path.read_bytes()
    for damaged in (content[:-1], content + b"x", content[:20], content[:6], content.replace(b"(3, 1", b"(9, 1")):
        path.write_bytes(damaged)
        with pytest.raises(InputError, match=r"a\.npy: "):
            open_fields(path)
    huge = content.replace(b"(3, 1, 5, 6), }", b"(4294967296, 4294967296, 4294967296, 6)")
    path.write_bytes(huge[:128].replace(b"6)", b"6),}").ljust(127) + b"\n" + content[128:])
    with pytest.raises(InputError, match=r"a\.npy: "):
        open_fields(path)


def test_pairs_that_do_not_fit(tmp_path):
    np.save(tmp_path / "x.npy", NU)
    np.save(tmp_path / "y.npy", NU[:2])
    with pytest.raises(InputError, match=r"holds x \(3, 5, 6\), y \(2, 5, 6\); must hold .npy files of one shape"):
        open_fields(tmp_path)
    np.savez(tmp_path / "a.npz", x=TENSOR, y=TENSOR)
    with pytest.raises(InputError, match=r"a\.npz: holds x \(3, 1, 5, 6\), y .* must hold arrays of one shape"):
        open_fields(tmp_path / "a.npz")
    np.savez(tmp_path / "b.npz", x=np.asfortranarray(NU))
    with pytest.raises(InputError, match=r"b\.npz: x is in Fortran order"):
        open_fields(tmp_path / "b.npz")
    (tmp_path / "none").mkdir()
    with pytest.raises(InputError, match="none: holds no .npy files, must hold 1 to 16"):
        open_fields(tmp_path / "none")


def test_other_files(tmp_path):
    (tmp_path / "a.txt").write_text("x,y,value\n")
    with pytest.raises(InputError, match=r"a\.txt: holds no fields .*; must be a file that `encdiff fields render`"):
        open_fields(tmp_path / "a.txt")
    savemat(tmp_path / "a.mat", {"coeff": NU})
    with pytest.raises(InputError, match=r"a\.mat: is a MATLAB file, must be .npy"):
        open_fields(tmp_path / "a.mat")
    with pytest.raises(InputError, match="data 'nowhere': not found here; must be"):
        open_fields("nowhere")
