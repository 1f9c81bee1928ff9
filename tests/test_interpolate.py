import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from _tiny import TINY
from PIL import Image

from encdiff import EncDiff, InputError
from encdiff.data import to_uint8
from encdiff.pictures import interpolation

OPTIONS = dict(steps=2, seed=5)
DATA = "procedural:2,2,2,2,2,2"


@pytest.fixture
def folder(model, tmp_path):
    """A model folder."""
    model.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def double(model):
    """In float64, where what the size of a batch does to rounding is far below 1e-6."""
    return model.double()


def test_the_ends_are_the_reconstructions_of_both_images(double, images):
    model, images = double, images.double()
    frames = model.interpolate(images[0], images[1:2], 5, **OPTIONS)
    assert frames.shape == (5, 3, 16, 16)
    torch.testing.assert_close(frames[[0, -1]], model.reconstruct(images[:2], **OPTIONS), atol=1e-6, rtol=0)
    assert (frames[0] - frames[2]).abs().max() > 0.01, "or the test above could not fail"


def test_codes_move_in_a_straight_line(model, images, monkeypatch):
    given = []
    monkeypatch.setattr(model, "sample", lambda scalars, **_: given.append(scalars))
    model.interpolate(images[0], images[1], 4)
    a, b = (model.encode(image[None])[0].detach() for image in images[:2])
    torch.testing.assert_close(given[0], torch.stack([a, (2 * a + b) / 3, (a + 2 * b) / 3, b]))
    assert torch.equal(given[0][0], a) and torch.equal(given[0][-1], b)


def test_chosen_concepts_alone_move(double, images, monkeypatch):
    model, images = double, images.double()
    swapped = model.swap(images[1:2], images[:1], [2, 0], **OPTIONS)
    last = model.interpolate(images[0], images[1], 3, concepts=[0, 2], **OPTIONS)[-1:]
    torch.testing.assert_close(last, swapped, atol=1e-6, rtol=0)
    given = []
    monkeypatch.setattr(model, "sample", lambda scalars, **_: given.append(scalars))
    model.interpolate(images[0], images[1], 3, concepts=1)
    a, b = (model.encode(image[None])[0].detach() for image in images[:2])
    assert torch.equal(given[0][:, [0, 2]], a[[0, 2]].expand(3, 2))
    torch.testing.assert_close(given[0][:, 1], torch.stack([a[1], (a[1] + b[1]) / 2, b[1]]))


def test_the_same_image_twice_stays(double, images):
    model, images = double, images.double()
    frames = model.interpolate(images[0], images[0], 3, **OPTIONS)
    torch.testing.assert_close(frames, model.reconstruct(images[:1], **OPTIONS).expand(3, -1, -1, -1))


def test_vector_concepts_interpolate_too(images):
    model = EncDiff(replace(TINY, concept_width=2)).eval()
    frames = model.interpolate(images[0], images[1], 3, concepts=[1], **OPTIONS)
    a, b = model.encode(images[:2]).detach()
    a[1] = (a[1] + b[1]) / 2
    torch.testing.assert_close(frames[1:2], model.sample(a[None], **OPTIONS), atol=1e-6, rtol=0)


@pytest.mark.parametrize("change, message", [
    ({"frames": 1}, "frames is 1, must be an integer of at least 2"),
    ({"frames": 2.5}, "frames is 2.5, must be an integer"),
    ({"concepts": [3]}, r"concept is 3, must be an integer in 0\.\.2"),
    ({"source": torch.zeros(2, 3, 16, 16)}, r"source is \(2, 3, 16, 16\), must be one image"),
    ({"target": torch.zeros(3, 8, 8)}, r"images are \(1, 3, 8, 8\), must be \(B, 3, 16, 16\)"),
    ({"target": torch.full((3, 16, 16), torch.nan)}, "must lie in .* without NaN"),
])  # fmt: skip
def test_bad_input(model, images, change, message):
    with pytest.raises(InputError, match=message):
        model.interpolate(**{"source": images[0], "target": images[1], "frames": 3} | change)


def found_at(picture: Image.Image, image: torch.Tensor) -> list[tuple[int, int]]:
    """Every (row, column) of cells, in pixels, where the image lies enlarged, up to one grey level."""
    pixels = torch.from_numpy(np.array(picture)).int()
    wanted = to_uint8(image[None])[0].int().repeat_interleave(6, 0).repeat_interleave(6, 1)
    near = ((pixels[:-95, :-95] - wanted[0, 0]).abs().amax(-1) <= 1).nonzero().tolist()
    return [(y, x) for y, x in near if (pixels[y : y + 96, x : x + 96] - wanted).abs().max() <= 1]


def test_cells_are_what_the_model_interpolates(model, images, texts):
    a, b = images[:2]
    picture = interpolation(model, a, b, groups={"wall hue": [1, 2]}, columns=3, **OPTIONS)
    rows = [model.interpolate(a, b, 3, concepts=concepts, **OPTIONS) for concepts in (None, [1, 2])]
    for row, frames in enumerate(rows):
        places = [found_at(picture, image) for image in (a, *frames, b)]
        tops = [{y for y, _ in places[0]}, {y for y, _ in places[-1]}]
        assert tops[0] == tops[1] and len(tops[0]) == 2, "both originals at both rows"
        x = [sorted(x for y, x in at if y == sorted(tops[0])[row]) for at in places]
        assert all(x) and [at[0] for at in x] == sorted(at[0] for at in x)
    assert {"all concepts", "wall hue", "1, 2", "source", "0 %", "50 %", "100 %", "target"} <= {*texts}


def test_command(encdiff, folder, tmp_path, texts):
    out = tmp_path / "x" / "i.png"
    options = ["--data", DATA, "--steps", 1, "--values", 3]
    code, text = encdiff("interpolate", folder, *options, "--out", out, "--source", 3, "--target", 3)
    assert code == 0 and f"picture: {out}" in text and out.is_file()
    assert "all concepts" in texts and "these alone" not in texts
    assert encdiff("interpolate", folder, *options, "--concepts", "0,2")[0] == 0
    assert (folder / "pictures/interpolate.png").is_file() and {"these alone", "0, 2"} <= {*texts}


def test_an_evaluated_run_has_a_row_for_each_factor(encdiff, folder, texts):
    scores = {"disentanglement": 0.5, "completeness": 0.5, "informativeness_test": 0.5}
    scores["importance"] = [[0.9, 0], [0, 0.5], [0, 0.5]]
    about = {"protocol": {"name": "paper", "seed": 0}, "data": {"name": "a", "factor_names": ["size", "wall_hue"]}}
    (folder / "metrics.json").write_text(json.dumps({"trained": {"dci": scores} | about}))
    options = ["--data", DATA, "--steps", 1, "--values", 2]
    assert encdiff("interpolate", folder, *options)[0] == 0
    assert {"all concepts", "size", "wall hue", "1, 2"} <= {*texts}
    texts.clear()
    assert encdiff("interpolate", folder, *options, "--no-by-factor")[0] == 0
    assert "all concepts" in texts and "size" not in texts


@pytest.mark.parametrize("args, message", [
    (["--source", "1"], "must be given together"),
    (["--source", "1", "--target", "64"], "indices: 1..64; procedural has 0..63"),
    (["--values", "1"], "--values"),
    (["--concepts", "3"], "concept is 3, must be an integer in 0..2"),
    (["--concepts", "x"], "--concepts 'x' must be numbers such as 0,3"),
])  # fmt: skip
def test_bad_input_of_the_command(encdiff, folder, args, message):
    code, text = encdiff("interpolate", folder, "--data", DATA, "--steps", 1, *args)
    assert code == 2 and message in text and "Traceback" not in text
