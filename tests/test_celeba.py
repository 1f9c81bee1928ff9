"""CelebA: jpgs in a folder or a zip file, attributes and partitions from their text files."""

import zipfile

import numpy as np
import pytest
from PIL import Image

from encdiff.data import open_dataset
from encdiff.data.celeba import CelebA, centre
from encdiff.errors import InputError

COUNT, NAMES = 7, ("Bald", "Male", "Smiling")
SIGNS = np.where(np.arange(21).reshape(7, 3) * 5 % 7 % 2, 1, -1)
PARTS = [0, 0, 1, 0, 2, 2, 0]
FILES = [f"{i + 1:06}.jpg" for i in range(COUNT)]


def face(i):
    """A jpg of the published size: a gradient down and across, of a brightness of its own."""
    y, x = np.mgrid[:218, :178]
    pixels = np.stack([y, x, np.full_like(x, 30 * i)], axis=-1)
    return Image.fromarray(pixels.astype(np.uint8))


def texts():
    lines = [f"{file} " + " ".join(f"{sign:2d}" for sign in row) for file, row in zip(FILES, SIGNS, strict=True)]
    attributes = "\n".join([str(COUNT), " ".join(NAMES) + " ", *lines]) + "\n"
    return {
        "list_attr_celeba.txt": attributes,
        "list_eval_partition.txt": "".join(f"{file} {part}\n" for file, part in zip(FILES, PARTS, strict=True)),
    }


def write(folder, packed, files=FILES, **changes):
    (folder / "img_align_celeba").mkdir(parents=True)
    for file in files:
        face(FILES.index(file)).save(folder / "img_align_celeba" / file, quality=95)
    if packed:
        with zipfile.ZipFile(folder / "img_align_celeba.zip", "w") as archive:
            for file in (folder / "img_align_celeba").iterdir():
                archive.write(file, f"img_align_celeba/{file.name}")
                file.unlink()
    for name, text in (texts() | {f"{k}.txt": v for k, v in changes.items()}).items():
        if text is not None:
            (folder / name).write_text(text)
    return folder


@pytest.mark.parametrize("packed", [False, True], ids=["folder", "zip"])
def test_images_and_attributes(tmp_path, packed):
    folder = write(tmp_path / "celeba", packed)
    for spec in [folder, folder / "list_attr_celeba.txt"] + [folder / "img_align_celeba.zip"] * packed:
        data = open_dataset(spec)
        assert isinstance(data, CelebA) and (len(data), data.image_size, data.name) == (7, 64, "celeba")
        assert data.factor_names == NAMES and data.factor_sizes == (2, 2, 2) and not data.is_grid
        factors = data.factors([6, 0, 3])
        assert factors.dtype == np.int64
        np.testing.assert_array_equal(factors, (SIGNS[[6, 0, 3]] + 1) // 2)
        np.testing.assert_array_equal(data.labels([6, 0]), SIGNS[[6, 0]])
        images = data.images([4, 1, 4])
        assert images.shape == (3, 64, 64, 3) and images.dtype == np.uint8
        np.testing.assert_array_equal(images[0], images[2])
        np.testing.assert_allclose(images[:2, ..., 2].mean((1, 2)), [120, 30], atol=2)


def test_resize_then_centre_crop():
    # 178 x 218 becomes 96 x 117, of which columns 16..79 and rows 26..89 remain
    image = centre(face(0), 64).astype(float)
    columns, rows = (np.arange(16, 80) + 0.5) * 178 / 96 - 0.5, (np.arange(26, 90) + 0.5) * 218 / 117 - 0.5
    np.testing.assert_allclose(image[..., 1], np.broadcast_to(columns, (64, 64)), atol=1)
    np.testing.assert_allclose(image[..., 0], np.broadcast_to(rows[:, None], (64, 64)), atol=1)
    assert centre(face(0), 32).shape == (32, 32, 3)


@pytest.mark.parametrize("partition, members", [("train", [0, 1, 3, 6]), ("valid", [2]), ("test", [4, 5])])
@pytest.mark.parametrize("packed", [False, True], ids=["folder", "zip"])
def test_partitions(tmp_path, packed, partition, members):
    folder = write(tmp_path / "celeba", packed)
    everything, part = open_dataset(folder, 16), open_dataset(f"{folder}:{partition}", 16)
    assert len(part) == len(members) and part.name == f"celeba:{partition}" and len(everything) == 7
    indices = np.arange(len(members))
    np.testing.assert_array_equal(part.factors(indices), everything.factors(members))
    np.testing.assert_array_equal(part.images(indices), everything.images(members))
    assert len(open_dataset(part.spec, 16)) == len(CelebA(folder, 16, partition)) == len(members)


@pytest.mark.parametrize(
    "spec, words",
    [(":5,5", "celeba:5,5: must be celeba:train, celeba:valid, celeba:test"), (":all", "celeba:all: must be")],
)
def test_unknown_partition(tmp_path, spec, words):
    with pytest.raises(InputError, match=words):
        open_dataset(str(write(tmp_path / "celeba", False)) + spec)


def attributes(old, new):
    return texts()["list_attr_celeba.txt"].replace(old, new, 1)


@pytest.mark.parametrize("packed", [False, True], ids=["folder", "zip"])
@pytest.mark.parametrize(
    "changes, words",
    [
        ({"list_attr_celeba": attributes("7", "9")}, "7 images follow '9' and 3 names"),
        ({"list_attr_celeba": attributes("Male", "Bald")}, "list_attr_celeba.txt: 7 images follow"),
        ({"list_attr_celeba": ""}, "0 images follow"),
        ({"list_attr_celeba": "7"}, "0 images follow '7' and 0 names"),
        ({"list_attr_celeba": attributes("000003.jpg", "000003.jpg  1")}, "list_attr_celeba.txt: line 5 must hold"),
        ({"list_attr_celeba": attributes("000003.jpg -1", "000003.jpg 0").replace("g  1", "g 0")}, "must hold a file"),
        ({"list_attr_celeba": attributes("000003.jpg", "000033.jpg")}, "holds no 000033.jpg, but list_attr_celeba.txt"),
        ({"list_attr_celeba": None}, "list_attr_celeba.txt: no such file"),
        ({"files": FILES[:5]}, "holds no 000006.jpg"),
        ({"list_eval_partition": None}, "list_eval_partition.txt: no such file"),
        ({"list_eval_partition": "000001.jpg 0\n000002.jpg 5\n"}, "list_eval_partition.txt: line 2"),
        ({"list_eval_partition": "000001.jpg 0\n"}, "list_eval_partition.txt: says nothing of 000002.jpg"),
        ({"list_eval_partition": "".join(f"{f} 1\n" for f in FILES)}, "names no train image"),
    ],
    ids=[
        "count",
        "names",
        "empty",
        "line",
        "long",
        "zero",
        "unknown",
        "none",
        "lost",
        "no parts",
        "part",
        "gap",
        "no image",
    ],
)
def test_bad_files(tmp_path, packed, changes, words):
    folder = write(tmp_path / "celeba", packed, **changes)
    with pytest.raises(InputError, match=words) as error:
        CelebA(folder, 16, "train")
    assert str(folder) in str(error.value) and "\n" not in str(error.value)


def test_no_images(tmp_path):
    folder = write(tmp_path / "celeba", True)
    (folder / "img_align_celeba.zip").unlink()
    with pytest.raises(InputError, match="holds neither img_align_celeba"):
        CelebA(folder)
    with pytest.raises(InputError, match="image_size: 0"):
        CelebA(folder, 0)


def test_damaged_images_are_named(tmp_path):
    folder = write(tmp_path / "celeba", False)
    (folder / "img_align_celeba" / "000002.jpg").write_bytes(b"no picture")
    with pytest.raises(InputError, match=r"celeba: 000002\.jpg: not a readable image"):
        CelebA(folder, 16).images([0, 1])
    folder = write(tmp_path / "packed", True)
    content = bytearray((folder / "img_align_celeba.zip").read_bytes())
    at = content.index(b"img_align_celeba/000002.jpg") + 300
    content[at : at + 50] = bytes(50)
    (folder / "img_align_celeba.zip").write_bytes(content)
    with pytest.raises(InputError, match=r"000002\.jpg is damaged"):
        CelebA(folder, 16).images([0, 1])
