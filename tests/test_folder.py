"""A folder of images: order, cropping, and the file named when one cannot be read."""

import numpy as np
import pytest
from PIL import Image

from encdiff.data.folder import ImageFolder
from encdiff.errors import InputError


def plain(path, colour, size=(20, 20), mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, colour).save(path)
    return path


def test_natural_recursive_order(tmp_path):
    names = ["2.png", "10.PNG", "a/img9.jpg", "a/img10.jpeg", "b/c/1.webp"]
    for name in np.random.default_rng().permutation(names):
        plain(tmp_path / name, (10, 20, 30))
    plain(tmp_path / ".hidden.png", (0, 0, 0))
    plain(tmp_path / ".cache" / "x.png", (0, 0, 0))
    (tmp_path / "notes.txt").write_text("not an image")
    (tmp_path / "folder.png").mkdir()
    data = ImageFolder(tmp_path, 8)
    assert [f.relative_to(tmp_path).as_posix() for f in data.files] == names
    assert (len(data), data.factor_names, data.factor_sizes, data.image_size) == (5, (), (), 8)
    assert data.name == tmp_path.name


def test_pixels_by_index(tmp_path):
    rng = np.random.default_rng()
    colours = rng.integers(0, 256, (12, 3))
    for i, colour in enumerate(colours):
        plain(tmp_path / f"{i}.png", tuple(colour.tolist()), size=(int(rng.integers(5, 40)), int(rng.integers(5, 40))))
    indices = np.array([11, 0, 11, 5])
    images = ImageFolder(tmp_path, 7).images(indices)
    assert images.shape == (4, 7, 7, 3) and images.dtype == np.uint8
    np.testing.assert_array_equal(images, np.broadcast_to(colours[indices][:, None, None], images.shape))
    assert ImageFolder(tmp_path, 7).images([]).shape == (0, 7, 7, 3)


@pytest.mark.parametrize("wide", [True, False])
def test_shorter_side_then_centre(tmp_path, wide):
    pixels = np.zeros((10, 30, 3), np.uint8)
    pixels[:, 10:20] = np.random.default_rng().integers(0, 256, (10, 10, 3))
    pixels[:, :10], pixels[:, 20:] = 255, 128
    Image.fromarray(pixels if wide else pixels.transpose(1, 0, 2)).save(tmp_path / "x.png")
    image = ImageFolder(tmp_path, 10).images([0])[0]
    np.testing.assert_array_equal(image if wide else image.transpose(1, 0, 2), pixels[:, 10:20])


@pytest.mark.parametrize("mode, colour, rgb", [("L", 90, 90), ("RGBA", (9, 9, 9, 0), 9), ("1", 1, 255), ("P", 0, 0)])
def test_other_modes_become_rgb(tmp_path, mode, colour, rgb):
    plain(tmp_path / "x.png", colour, mode=mode)
    assert (ImageFolder(tmp_path, 5).images([0]) == rgb).all()


def test_turned_upright(tmp_path):
    pixels = np.zeros((16, 16, 3), np.uint8)
    pixels[:8] = 255  # white above
    exif = Image.Exif()
    exif[0x0112] = 3  # stored upside down
    Image.fromarray(pixels).save(tmp_path / "x.jpg", exif=exif, quality=95)
    image = ImageFolder(tmp_path, 16).images([0])[0]
    assert image[12:].min() > 240 and image[:4].max() < 15


def test_unreadable_image_is_named(tmp_path):
    rng = np.random.default_rng(0)
    good = tmp_path / "0.png"
    Image.fromarray(rng.integers(0, 256, (30, 30, 3), np.uint8)).save(good)
    (tmp_path / "1.png").write_bytes(good.read_bytes()[:900])
    (tmp_path / "2.jpg").write_text("not an image")
    (tmp_path / "3.webp").write_bytes(b"")
    Image.fromarray(rng.integers(0, 65536, (30, 30), np.uint16)).save(tmp_path / "4.png")
    data = ImageFolder(tmp_path, 8)
    data.images([0])
    for index, name in enumerate(["1.png", "2.jpg", "3.webp", "4.png"], start=1):
        with pytest.raises(InputError, match=name) as error:
            data.images([0, index])
        assert "\n" not in str(error.value)


def test_refusals(tmp_path):
    with pytest.raises(InputError, match="no images"):
        ImageFolder(tmp_path, 8)
    with pytest.raises(InputError, match="no such folder"):
        ImageFolder(tmp_path / "absent", 8)
    plain(tmp_path / "x.png", (1, 2, 3))
    for size in (None, 0, -3):
        with pytest.raises(InputError, match="image_size"):
            ImageFolder(tmp_path, size)
    data = ImageFolder(tmp_path, 8)
    for call in (data.factors, data.indices):
        with pytest.raises(InputError, match="has no factors"):
            call([0])
    with pytest.raises(InputError, match="indices: 1"):
        data.images([1])


def test_linked_folders_are_followed_each_folder_once(tmp_path):
    root, other = tmp_path / "photos", tmp_path / "other"
    for path in (root / "a" / "1.png", other / "2.png", other / "deep" / "3.png"):
        plain(path, (1, 2, 3))
    (other / "deep" / "back").symlink_to(other)  # a loop inside
    (root / "a" / "up").symlink_to(root)  # and one to where it began
    (root / ".hidden").symlink_to(other)
    (root / "linked").symlink_to(other)
    (root / "twice").symlink_to(other / "deep")
    (root / "broken").symlink_to(tmp_path / "nowhere")
    (root / "4.png").symlink_to(other / "2.png")
    names = [file.relative_to(root).as_posix() for file in ImageFolder(root, 8).files]
    assert names == ["4.png", "a/1.png", "linked/2.png", "linked/deep/3.png"]
    (tmp_path / "start").symlink_to(root)
    assert len(ImageFolder(tmp_path / "start", 8)) == 4
