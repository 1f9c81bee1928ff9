"""dSprites files: the published schema in little, with a pickle that must never be loaded."""

import os
import zipfile

import numpy as np
import pytest

from encdiff.data import open_dataset
from encdiff.data.dsprites import DSprites
from encdiff.errors import InputError

SIZES = (1, 3, 2, 4, 3, 2)


def arrays(sizes=SIZES, size=8):
    axes = [np.arange(1.0), np.arange(1.0, 4), np.linspace(0.5, 1, sizes[2]), np.linspace(0, 2 * np.pi, sizes[3])]
    axes = [axis[:n] for axis, n in zip(axes, sizes, strict=False)] + [np.linspace(0, 1, n) for n in sizes[4:]]
    count = int(np.prod(sizes))
    return {
        "metadata": np.array(Bomb(), dtype=object),
        "imgs": np.random.default_rng(2).integers(0, 2, (count, size, size), np.uint8),
        "latents_classes": np.stack(np.unravel_index(np.arange(count), sizes), -1).astype(np.int64),
        "latents_values": np.stack(np.meshgrid(*axes, indexing="ij"), -1).reshape(count, -1),
    }


class Bomb:
    """Leaves a folder behind when unpickled."""

    def __reduce__(self):
        return os.mkdir, (os.environ["BOMB"],)


@pytest.fixture(autouse=True)
def bomb(tmp_path, monkeypatch):
    monkeypatch.setenv("BOMB", str(tmp_path / "unpickled"))
    yield
    assert not (tmp_path / "unpickled").exists()


@pytest.mark.parametrize("save", [np.savez_compressed, np.savez], ids=["compressed", "stored"])
def test_published_schema(tmp_path, save):
    content = arrays()
    save(tmp_path / "sprites.npz", **content)
    data = open_dataset(tmp_path / "sprites.npz")
    assert isinstance(data, DSprites) and len(data) == 144 and data.image_size == 8
    assert dict(zip(data.factor_names, data.factor_sizes, strict=True)) == {
        "shape": 3, "scale": 2, "orientation": 4, "x": 3, "y": 2,
    }  # fmt: skip
    indices = np.random.default_rng().integers(0, 144, 30)
    images = data.images(indices)
    assert images.shape == (30, 8, 8, 3) and images.dtype == np.uint8
    np.testing.assert_array_equal(images, 255 * content["imgs"][indices][..., None].repeat(3, -1))
    np.testing.assert_array_equal(data.factors(indices), content["latents_classes"][indices, 1:])
    np.testing.assert_array_equal(data.labels(indices), content["latents_values"][indices, 1:])


def test_the_bomb_is_live(tmp_path):
    np.savez(tmp_path / "x.npz", **arrays())
    with np.load(tmp_path / "x.npz", allow_pickle=True) as content:
        content["metadata"]
    assert (tmp_path / "unpickled").is_dir()
    (tmp_path / "unpickled").rmdir()


def test_smaller_images_and_a_part(tmp_path):
    content = arrays()
    np.savez(tmp_path / "x.npz", **content)
    small = open_dataset(f"{tmp_path / 'x.npz'}:2,1,2,3,1", 4)
    exact = 255 * content["imgs"][48 + 12].reshape(4, 2, 4, 2).mean(axis=(1, 3))  # shape 1, orientation 2
    np.testing.assert_array_equal(small.images(small.indices([[1, 0, 1, 0, 0]]))[0, ..., 1], np.floor(exact + 0.5))


@pytest.mark.parametrize(
    "change, words",
    [
        ({"imgs": None}, "without imgs"),
        ({"latents_classes": None}, "without latents_classes"),
        ({"latents_values": None}, "without latents_values"),
        ({"imgs": lambda a: a.astype(float)}, "images are float64"),
        ({"imgs": lambda a: a[..., None]}, r"\(144, 8, 8, 1\)"),
        ({"imgs": lambda a: a[:100]}, r"latents_values are float64 \(144, 6\); must be float64 \(100, 6\)"),
        ({"imgs": lambda a: a[:, :7]}, r"\(144, 7, 8\)"),
        ({"latents_values": lambda a: np.roll(a, 1, axis=0)}, "latents_values leave the order of a grid"),
        ({"latents_values": lambda a: a.astype(np.float32)}, "latents_values are float32"),
        ({"latents_values": lambda a: np.where(a == 3, np.inf, a)}, "NaN or infinity"),
        ({"latents_classes": lambda a: a[:, ::-1]}, "latents_classes leave the order of a grid"),
        ({"latents_classes": lambda a: a.astype(float)}, "latents_classes are float64"),
        ({"latents_classes": lambda a: a[:5]}, r"latents_classes are int64 \(5, 6\)"),
    ],
)
def test_foreign_files(tmp_path, change, words):
    content = arrays()
    for key, altered in change.items():
        content[key] = altered and altered(content[key])
    np.savez(tmp_path / "bad.npz", **{key: value for key, value in content.items() if value is not None})
    with pytest.raises(InputError, match=words) as error:
        DSprites(tmp_path / "bad.npz")
    assert str(tmp_path / "bad.npz") in str(error.value) and "\n" not in str(error.value)


def test_two_colours(tmp_path):
    content = arrays((1, 2, 2, 4, 3, 2))
    content = {k: np.concatenate([v, v]) if v.ndim else v for k, v in content.items()}
    content["latents_values"][48 * 2 :, 0] += 1
    np.savez(tmp_path / "bad.npz", **content)
    with pytest.raises(InputError, match="2 colours"):
        DSprites(tmp_path / "bad.npz")


def test_grey_levels_are_refused_when_read(tmp_path):
    content = arrays()
    content["imgs"][77, 3, 3] = 200
    np.savez(tmp_path / "bad.npz", **content)
    data = DSprites(tmp_path / "bad.npz")
    data.images([76])
    with pytest.raises(InputError, match=r"bad\.npz: imgs hold 200; dSprites has 0 and 1 only"):
        data.images([76, 77])


def test_truncated(tmp_path):
    np.savez(tmp_path / "x.npz", **arrays())
    whole = (tmp_path / "x.npz").read_bytes()
    (tmp_path / "x.npz").write_bytes(whole[:3000])
    with pytest.raises(InputError, match=r"x\.npz: .*truncated"):
        open_dataset(tmp_path / "x.npz")
    assert not zipfile.is_zipfile(tmp_path / "x.npz")
