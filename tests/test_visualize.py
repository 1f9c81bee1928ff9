import numpy as np
import pytest
import torch
from _tiny import TINY
from PIL import Image

from encdiff import EncDiff, InputError
from encdiff.data import to_uint8
from encdiff.visualize import (
    CELL,
    GAP,
    LABEL,
    _extent,
    attention_picture,
    compose,
    concept_groups,
    concept_labels,
    encode_images,
    save_png,
    swap_grid,
    traversal,
)


def cells(picture: Image.Image, rows: list[str], columns: int, size: int = 16) -> np.ndarray:
    """Cut a picture with these row labels back into its images: (rows, columns, size, size, 3)."""
    pixels, step = np.asarray(picture), CELL + GAP
    left = max(_extent(label, LABEL)[0] for label in rows) + 2 * GAP
    top, rows = pixels.shape[0] - step * len(rows), len(rows)
    out = np.empty((rows, columns, size, size, 3), np.uint8)
    for j in range(rows):
        for i in range(columns):
            cell = pixels[top + j * step : top + j * step + CELL, left + i * step : left + i * step + CELL]
            out[j, i] = cell[CELL // size // 2 :: CELL // size, CELL // size // 2 :: CELL // size]
    return out


def pixels(batch: torch.Tensor) -> np.ndarray:
    return to_uint8(batch).numpy()


def test_swap_cells_are_what_the_model_swaps(model, images):
    source, target = images[:2], images[2:]
    shown = cells(
        swap_grid(model, source, target, groups={"a": [1], "b": [0, 2]}, steps=2, seed=5), ["pair 1", "pair 2"], 5
    )
    options = dict(steps=2, seed=5)
    expected = [
        source, target, model.reconstruct(target, **options),
        model.swap(source, target, [1], **options), model.swap(source, target, [0, 2], **options),
    ]  # fmt: skip
    for column, picture in enumerate(expected):
        assert np.abs(shown[:, column].astype(int) - pixels(picture)).max() <= 1, column


def test_without_groups_every_concept_has_a_column(model, images):
    picture = swap_grid(model, images[:1], images[1:2], steps=1)
    assert picture.width >= (3 + TINY.concepts) * (CELL + GAP)


def test_traversal_cells_are_what_the_model_traverses(model, images):
    codes = torch.randn(50, TINY.concepts)
    picture = traversal(model, images[0], codes, columns=3, labels={2: "hue"}, steps=2, seed=5)
    shown = cells(picture, ["concept 2\nhue", "concept 0", "concept 1"], 4)
    assert np.array_equal(shown[0, 0], pixels(images[:1])[0])
    for row, concept in enumerate((2, 0, 1)):  # the labelled one first
        low, high = np.quantile(codes[:, concept].numpy(), [0.02, 0.98])
        expected = pixels(model.traverse(images[0], concept, [low, (low + high) / 2, high], steps=2, seed=5))
        assert np.abs(shown[row, 1:].astype(int) - expected).max() <= 1, concept


def test_attention_picture_shows_each_map_over_its_image(model, images):
    shown = cells(attention_picture(model, images[:2], steps=2), ["", ""], 1 + TINY.concepts)
    assert np.array_equal(shown[:, 0], pixels(images[:2]))
    maps = model.attention_maps(images[:2], steps=2)
    for j in range(2):
        for i in range(TINY.concepts):
            brightness = shown[j, 1 + i].sum(-1)
            y, x = np.unravel_index(int(maps[j, i].argmax()), (16, 16))
            assert brightness[y, x] > np.median(brightness)


def test_concepts_are_grouped_by_the_factor_they_carry():
    importance = [[0.9, 0.0], [0.05, 0.5], [0.0, 0.45], [0.3, 0.3], [0.01, 0.0]]
    groups = concept_groups(importance, ["wall_hue", "shape"])
    assert groups == {"wall hue": [0], "shape": [1, 2]} | {}
    assert concept_labels(groups) == {0: "wall hue", 1: "shape", 2: "shape"}
    assert concept_groups(np.zeros((3, 2)), ["a", "b"]) == {}
    with pytest.raises(InputError, match=r"importance is \(5, 2\), must be \(N, 3\)"):
        concept_groups(importance, ["a", "b", "c"])


def test_encoding_keeps_the_mode(model, images):
    expected = model.encode(images).detach()
    model.train()
    torch.testing.assert_close(encode_images(model, images), expected)
    assert model.training


@pytest.mark.parametrize("size, cell", [(16, 96), (32, 96), (64, 128), (128, 128)])
def test_small_images_are_enlarged_by_a_whole_factor(size, cell):
    picture = compose([[torch.zeros(3, size, size), None]], ["a", "b"], ["row"], "t")
    assert picture.height > cell and picture.width >= 2 * (cell + GAP)
    assert (np.asarray(picture) == 128).all(-1).sum() == cell * cell


def test_a_long_label_is_wrapped_not_cut():
    one, long = (compose([[torch.zeros(3, 16, 16)]], [label], [""], "t") for label in ("a", "a b " * 20))
    assert long.height > one.height and long.width == one.width


def test_saving_replaces_whole(tmp_path, monkeypatch):
    path = tmp_path / "p.png"
    save_png(Image.new("RGB", (2, 2)), path)
    with Image.open(path) as picture:
        assert picture.size == (2, 2)
    before = path.read_bytes()

    def fail(self, file, **_):
        file.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", fail)
    with pytest.raises(OSError, match="No space left"):
        save_png(Image.new("RGB", (3, 3)), path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_bad_input(model, images):
    with pytest.raises(InputError, match="must have one shape"):
        swap_grid(model, images[:1], images[:2])
    with pytest.raises(InputError, match=r"concept is 3, must be an integer in 0\.\.2"):
        swap_grid(model, images[:1], images[1:2], groups={"x": [3]})
    with pytest.raises(InputError, match="columns is 1"):
        traversal(model, images[0], torch.zeros(2, 3), columns=1)
    with pytest.raises(InputError, match=r"images are \(1, 3, 8, 8\)"):
        attention_picture(EncDiff(TINY), torch.zeros(1, 3, 8, 8))
