from dataclasses import replace

import numpy as np
import pytest
import torch
from _tiny import TINY
from PIL import Image

from encdiff import EncDiff, InputError, open_dataset
from encdiff.data import to_float, to_uint8
from encdiff.pictures import (
    attention_picture,
    concept_groups,
    concept_labels,
    encode_images,
    factor_paths,
    factor_traversal,
    save_png,
    swap_grid,
    traversal,
)

OPTIONS = dict(steps=2, seed=5)


def places(picture: Image.Image, image: torch.Tensor, cell: int = 96) -> list[tuple[int, int]]:
    """Every (row, column) in pixels where the image (3, S, S), enlarged, lies in the picture, up to one grey level."""
    wanted = to_uint8(image[None])[0].numpy().astype(int).repeat(cell // image.shape[-1], 0)
    wanted = wanted.repeat(cell // image.shape[-1], 1)
    pixels = np.asarray(picture).astype(int)
    corners = np.abs(pixels[: 1 - cell, : 1 - cell] - wanted[0, 0]).max(-1) <= 1
    corners &= np.abs(pixels[cell - 1 :, cell - 1 :] - wanted[-1, -1]).max(-1) <= 1
    found = [tuple(at) for at in np.argwhere(corners).tolist()]
    return [(y, x) for y, x in found if np.abs(pixels[y : y + cell, x : x + cell] - wanted).max() <= 1]


def test_swap_cells_are_what_the_model_swaps(model, images, texts):
    source, target = images[:2], images[2:]
    picture = swap_grid(model, source, target, groups={"wall hue": [1], "rest": [0, 2]}, **OPTIONS)
    columns = [
        source, target, model.reconstruct(target, **OPTIONS),
        model.swap(source, target, [1], **OPTIONS), model.swap(source, target, [0, 2], **OPTIONS),
    ]  # fmt: skip
    at = [[places(picture, image) for image in column] for column in columns]
    assert all(len(found) == 1 for column in at for found in column)
    corners = np.array(at)[:, :, 0]  # (columns, pairs, 2)
    assert (np.diff(corners[..., 1], axis=0) >= 96).all() and (np.diff(corners[..., 0], axis=1) >= 96).all()
    assert np.ptp(corners[..., 0], axis=0).max() == np.ptp(corners[..., 1], axis=1).max() == 0
    assert {"source", "target", "reconstructed", "wall hue", "concept 1", "rest", "0, 2", "pair 1", "pair 2"} <= {
        *texts
    }


def test_the_true_image_stands_beside_each_swap(model, images, texts):
    source, target, true = images[:1], images[1:2], images[2:3]
    groups, truth = {"wall hue": [1], "rest": [0, 2]}, {"wall hue": true}
    picture = swap_grid(model, source, target, groups=groups, truth=truth, **OPTIONS)
    swapped, beside = places(picture, model.swap(source, target, [1], **OPTIONS)[0])[0], places(picture, true[0])[0]
    assert beside[0] == swapped[0] and 96 <= beside[1] - swapped[1] <= 104
    assert texts.count("true") == 1 and "the true image" in " ".join(texts)


def test_a_factor_is_traversed_by_all_its_concepts_through_the_data(model, texts):
    room = open_dataset("procedural:3,2,2,2,4,3", 16)
    index = int(room.indices([[2, 0, 1, 0, 1, 1]])[0])
    paths = factor_paths(room, index, {"shape": [0, 2], "floor hue": [1]}, columns=3)
    assert list(paths) == ["floor hue", "shape"] and paths["floor hue"].place == 1.0 and paths["shape"].place == 0.25
    rows = room.indices([[2, 0, 1, 0, k, 1] for k in (0, 2, 3)])  # three of four values, both ends among them
    assert paths["shape"].images.equal(to_float(room.images(rows)))
    own = to_float(room.images([index]))
    picture = factor_traversal(model, own[0], paths, **OPTIONS)
    codes = encode_images(model, own).repeat(3, 1)
    codes[:, [0, 2]] = encode_images(model, paths["shape"].images)[:, [0, 2]]
    drawn = [places(picture, image)[0] for image in model.sample(codes, **OPTIONS)]
    true = [places(picture, image)[-1] for image in paths["shape"].images]
    assert [x for _, x in drawn] == [x for _, x in true] and all(
        t[0] - d[0] == 100 for t, d in zip(true, drawn, strict=True)
    )
    assert texts.count("true") == 2 and {"first", "last", "shape", "0, 2", "floor hue"} <= {*texts}
    for message, call in {
        "groups are hue; none is a factor of procedural": lambda: factor_paths(room, index, {"hue": [0]}),
        "columns is 1, must be at least 2": lambda: factor_paths(room, index, {"shape": [0]}, columns=1),
        "paths are none": lambda: factor_traversal(model, own[0], {}),
        "concept is 3, must be an integer in 0..2": lambda: factor_traversal(
            model, own[0], factor_paths(room, index, {"floor_hue": [3]})
        ),
        r"truth of a is \(1, 3, 8, 8\), must be \(1, 3, 16, 16\)": lambda: swap_grid(
            model, own, own, groups={"a": [0]}, truth={"a": torch.zeros(1, 3, 8, 8)}, **OPTIONS
        ),
    }.items():
        with pytest.raises(InputError, match=message):
            call()


def test_the_mode_survives_an_error(model):
    model.train()
    with pytest.raises(InputError):
        encode_images(model, torch.zeros(1, 3, 5, 5))
    assert model.training


def test_unchosen_strips_are_in_the_order_of_their_effect(model, images, texts):
    codes = torch.randn(50, TINY.concepts) * torch.tensor([0.1, 3.0, 1.0])
    picture = traversal(model, images[0], codes, columns=2, **OPTIONS)
    own, changes, tops = model.reconstruct(images[:1], **OPTIONS), [], []
    for concept in range(TINY.concepts):
        low, high = np.quantile(codes[:, concept].numpy(), [0.02, 0.98])
        strip = model.traverse(images[0], concept, [low, high], **OPTIONS)
        changes.append(float((strip - own).abs().mean()))
        tops.append(min(y for y, _ in places(picture, strip[1])))
    assert np.argsort(tops).tolist() == np.argsort(changes)[::-1].tolist()
    assert "change the image most" in " ".join(texts)


def test_without_groups_every_concept_has_a_column(model, images, texts):
    picture = swap_grid(model, images[:1], images[1:2], **OPTIONS)
    for concept in range(TINY.concepts):
        assert f"concept {concept}" in texts
        assert places(picture, model.swap(images[:1], images[1:2], concept, **OPTIONS)[0])


def test_many_concepts_wrap_into_panels(images, texts):
    picture = swap_grid(EncDiff(replace(TINY, concepts=20)), images[:1], images[1:2], steps=1)
    assert picture.width < 1500 and all(texts.count(f"concept {c}") == 1 for c in range(20))
    assert len(places(picture, images[0])) == len(places(picture, images[1])) == 2  # each panel shows the pair again


def test_traversal_cells_are_what_the_model_traverses(model, images, texts):
    codes = torch.randn(50, TINY.concepts)
    picture = traversal(model, images[0], codes, columns=3, labels={2: "hue", 0: "size"}, **OPTIONS)
    assert places(picture, images[0], 192) and places(picture, model.reconstruct(images[:1], **OPTIONS)[0], 192)
    tops = []
    for concept in (2, 0):
        low, high = np.quantile(codes[:, concept].numpy(), [0.02, 0.98])
        strip = model.traverse(images[0], concept, [low, (low + high) / 2, high], **OPTIONS)
        (y0, x0), (y1, x1), (y2, x2) = (places(picture, image)[0] for image in strip)
        assert y0 == y1 == y2 and x0 + 96 <= x1 and x1 + 96 <= x2
        tops.append(y0)
    assert len({*tops}) == 2
    assert {"original", "reconstructed", "low", "high", "hue", "concept 2", "size", "concept 0"} <= {*texts}
    assert "concept 1" not in texts and "Not shown: 1 that tells little of any factor." in " ".join(texts)


def test_dot_marks_the_own_value(model, images):
    own = encode_images(model, images[:1])
    spread = torch.linspace(-1, 1, 101)[:, None]
    for offset, order in ((0.9, -1), (-0.9, 1)):  # codes above the own value put it low, codes below put it high
        plain = np.asarray(traversal(model, images[0], own + spread, concepts=[0], **OPTIONS)).astype(int)
        moved = np.asarray(traversal(model, images[0], own + spread + offset, concepts=[0], **OPTIONS)).astype(int)
        at = [np.argwhere((picture == (217, 72, 15)).all(-1))[:, 1].mean() for picture in (plain, moved)]
        assert order * (at[1] - at[0]) > 150


def test_inverted_traversal_starts_from_the_image(model, images):
    codes = encode_images(model, images)
    picture = traversal(model, images[0], codes, invert=True, **OPTIONS)
    expected = model.reconstruct(images[:1], x_T=model.invert(images[:1], 2), sampler="ddim", **OPTIONS)
    assert places(picture, expected[0], 192)
    assert not places(picture, model.reconstruct(images[:1], **OPTIONS)[0], 192)


def test_attention_is_brightest_where_the_map_is_greatest(model, images, texts):
    picture = attention_picture(model, images[:2], labels={1: "shape", 0: "hue", 2: "size"}, steps=2)
    y, x = places(picture, images[0])[0]
    pixels = np.asarray(picture).astype(int)
    maps = model.attention_maps(images[:2], steps=2)[0]
    cells = [pixels[y : y + 96, x + 118 + 100 * i : x + 214 + 100 * i].sum(-1) for i in range(TINY.concepts)]
    brightness = np.stack([cell.reshape(16, 6, 16, 6).mean((1, 3)) for cell in cells])
    shown = np.corrcoef(brightness.ravel(), maps[[1, 0, 2]].numpy().ravel())[0, 1]  # as the labels order them
    assert shown > 0.8, shown
    assert {"image", "image 1", "image 2", "shape", "concept 1", "0 %", f"{100 * _greatest(model, images):.0f} %"} <= {
        *texts
    }


def _greatest(model: EncDiff, images: torch.Tensor) -> float:
    return model.attention_maps(images[:2], steps=2).max().item()


def test_chosen_concepts_alone_are_shown(model, images, texts):
    attention_picture(model, images[:1], concepts=[2], steps=1)
    traversal(model, images[0], torch.randn(9, 3), concepts=[2], **OPTIONS)
    assert texts.count("concept 2") == 2 and not {"concept 0", "concept 1"} & {*texts}


def test_concepts_are_grouped_by_the_factor_they_carry():
    importance = [[0.9, 0.0], [0.05, 0.5], [0.0, 0.45], [0.3, 0.3], [0.01, 0.0]]
    groups = concept_groups(importance, ["wall_hue", "shape"])
    assert groups == {"wall hue": [0, 3], "shape": [1, 2]}
    assert concept_labels(groups) == {0: "wall hue", 3: "wall hue", 1: "shape", 2: "shape"}
    assert concept_groups(np.zeros((3, 2)), ["a", "b"]) == {}
    with pytest.raises(InputError, match=r"importance is \(5, 2\), must be \(N, 3\)"):
        concept_groups(importance, ["a", "b", "c"])


def test_encoding_keeps_the_mode(model, images):
    expected = model.encode(images).detach()
    model.train()
    torch.testing.assert_close(encode_images(model, images), expected)
    assert model.training


@pytest.mark.parametrize("size, cell", [(16, 96), (32, 96), (64, 128), (128, 128), (256, 192)])
def test_cells_of_any_image_size(size, cell):
    config = replace(TINY, image_size=size, patch=size // 4)
    image = torch.zeros(1, 3, size, size)
    picture = np.asarray(swap_grid(EncDiff(config), image, image, groups={"a": [0]}, steps=1))
    rows, columns = np.nonzero((picture == 128).all(-1))
    assert np.ptp(rows) + 1 >= cell and (picture[rows.min() :][:cell, columns.min() :][:, :cell] == 128).all()
    assert (picture[rows.min() : rows.min() + cell, columns.min() + cell] == 255).all()


def test_a_long_label_is_wrapped_not_cut(model, images, texts):
    swap_grid(model, images[:1], images[1:2], groups={"colour of the ceiling lamp": [0]}, **OPTIONS)
    assert {"colour of the", "ceiling lamp"} <= {*texts}


def test_saving_replaces_whole(tmp_path, monkeypatch, model, images):
    path, picture = tmp_path / "p.png", swap_grid(model, images[:1], images[1:2], **OPTIONS)
    save_png(picture, path)
    with Image.open(path) as saved:
        assert np.array_equal(np.asarray(saved), np.asarray(picture)) and saved.text["Title"] == "Swapping concepts"
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
    with pytest.raises(InputError, match=r"concept is -1, must be an integer in 0\.\.2"):
        attention_picture(model, images[:1], concepts=[-1])
    with pytest.raises(InputError, match="concepts are none"):
        traversal(model, images[0], torch.zeros(2, 3), concepts=[])
    with pytest.raises(InputError, match="columns is 1"):
        traversal(model, images[0], torch.zeros(2, 3), columns=1)
    for codes in (torch.zeros(2, 4), torch.zeros(0, 3), torch.full((2, 3), torch.nan)):
        with pytest.raises(InputError, match=r"codes are .*, must be finite numbers \(n, 3\)"):
            traversal(model, images[0], codes)
    with pytest.raises(InputError, match=r"images are \(1, 3, 8, 8\)"):
        attention_picture(EncDiff(TINY), torch.zeros(1, 3, 8, 8))
