from dataclasses import replace

import numpy as np
import pytest
import torch
from _tiny import TINY
from PIL import Image
from safetensors.torch import save_file

from encdiff import EncDiff, InputError, open_dataset, to_float
from encdiff.data import Dataset
from encdiff.evaluation import Direction, factor_direction, factor_labels, fit_direction, load_direction
from encdiff.pictures import edits

OPTIONS = dict(steps=2, seed=5)
DATA = "procedural:2,2,2,3,3,1"
FOUND = Direction(torch.tensor([0.5, -2.0, 0.0]), torch.tensor([1.0, 2.0, 0.0]), "ridge", 0.9, "R^2", 0.01, "scale")


def correlated(rng, n: int, size: int) -> np.ndarray:
    """Codes float32 (n, size) of different scales, offsets and correlations."""
    mixing = (np.eye(size) + 0.3 * rng.normal(size=(size, size))) * np.exp(rng.normal(size=size))
    return (rng.normal(size=(n, size)) @ mixing + 5 * rng.normal(size=size)).astype(np.float32)


@pytest.fixture
def rng():
    return np.random.default_rng(np.random.randint(2**31))


def test_a_linear_function_of_the_codes_is_found(rng):
    codes, weights = correlated(rng, 2000, 6), rng.normal(size=6)
    found = fit_direction(codes, codes @ weights + 3)
    covariance = np.cov(codes.T.astype(float), bias=True)
    expected = covariance @ weights / np.sqrt(weights @ covariance @ weights)
    np.testing.assert_allclose(found.vector, expected, rtol=1e-3, atol=1e-3 * abs(expected).max())
    np.testing.assert_allclose(found.deviations, codes.std(0), rtol=1e-4)
    assert found.vector.dtype == torch.float32 and (found.kind, found.score_name) == ("ridge", "R^2")
    assert found.score > 0.999 and abs(found.baseline) < 0.05


@pytest.mark.parametrize("along", ["pattern", "weights"])
def test_strength_1_is_one_standard_deviation_of_the_prediction(rng, along):
    codes, weights = correlated(rng, 1000, 5), rng.normal(size=5)
    found = fit_direction(codes, codes @ weights, along=along)
    np.testing.assert_allclose(found.vector.numpy() @ weights, (codes @ weights).std(), rtol=1e-3)


def test_the_weights_are_those_of_standardised_codes(rng):
    codes, weights = correlated(rng, 2000, 4), rng.normal(size=4)
    scale = codes.std(0)
    found = fit_direction(codes, codes @ weights, along="weights").vector.numpy()
    np.testing.assert_allclose(
        found / scale / np.linalg.norm(found / scale), weights * scale / np.linalg.norm(weights * scale), atol=1e-3
    )


def test_classes_part_along_the_difference_of_their_means(rng):
    """However the codes are correlated: the weights would point elsewhere."""
    mixing, labels = rng.normal(size=(5, 5)), np.arange(2000) % 2
    difference = rng.normal(size=5)
    codes = rng.normal(size=(2000, 5)) @ mixing + np.outer(labels, difference)
    found = fit_direction(codes, np.array([7, 3])[1 - labels])  # the greater is where it points
    means = codes[labels == 1].mean(0) - codes[labels == 0].mean(0)
    cosine = found.vector.numpy() @ means / np.linalg.norm(found.vector) / np.linalg.norm(means)
    assert (found.kind, found.score_name) == ("logistic", "area under the ROC curve") and cosine > 0.97, cosine


def test_scores_tell_separable_classes_from_shuffled_labels(rng):
    codes = correlated(rng, 2000, 4)
    labels = codes[:, 0] > np.median(codes[:, 0])
    assert fit_direction(codes, labels).score > 0.99
    assert abs(fit_direction(codes, labels).baseline - 0.5) < 0.1
    assert abs(fit_direction(codes, rng.permutation(labels)).score - 0.5) < 0.1


def test_the_score_is_of_rows_held_out(rng):
    """As many codes as rows: any labels are learnt by heart."""
    codes = rng.normal(size=(300, 300))
    assert fit_direction(codes, rng.integers(0, 2, 300)).score < 0.75
    assert fit_direction(codes, rng.normal(size=300)).score < 0.3


def test_kinds_of_labels(rng):
    codes, labels = correlated(rng, 100, 3), np.arange(100) % 2
    found = fit_direction(codes, labels)
    for same in (labels.astype(bool), labels.tolist(), torch.from_numpy(labels)):
        assert torch.equal(fit_direction(torch.from_numpy(codes), same).vector, found.vector)
    assert fit_direction(codes, np.arange(100) % 3).kind == "ridge"
    assert fit_direction(codes, labels, "ridge").kind == "ridge"
    vectors = fit_direction(np.repeat(codes, 2, 1).reshape(100, 3, 2), labels)
    assert vectors.vector.shape == vectors.deviations.shape == (3, 2)
    assert torch.equal(vectors.vector[:, 0], vectors.vector[:, 1])


def test_what_moves_furthest_comes_first():
    assert FOUND.ranked() == [(1, -1.0), (0, 0.5), (2, 0.0)]
    vectors = replace(FOUND, vector=torch.tensor([[3.0, 4.0], [8.0, 0.0]]), deviations=torch.ones(2, 2))
    assert vectors.ranked() == [(1, 8.0), (0, 5.0)]


@pytest.mark.parametrize("change, message", [
    ({"labels": np.ones(40)}, "labels are all 1; must hold two different values or more"),
    ({"labels": np.arange(39)}, r"labels are int64 \(39,\); must be numbers \(40,\)"),
    ({"labels": ["a"] * 40}, "must be numbers"),
    ({"labels": np.r_[np.nan, np.arange(39)]}, "labels hold NaN or numbers beyond"),
    ({"labels": np.arange(40) == 1}, "labels are 1 in 1 rows of 40; must be so in 5 or more"),
    ({"labels": np.arange(40), "kind": "logistic"}, "labels hold 40 values; kind 'logistic' is of two"),
    ({"kind": "svm"}, "kind is 'svm', must be auto, logistic or ridge"),
    ({"along": "z"}, "along is 'z', must be pattern or weights"),
    ({"codes": np.full((40, 3), np.inf)}, "codes holds NaN or infinite values"),
    ({"codes": np.full((40, 3), 1e200)}, r"codes reach 1e\+200, must lie within 1e\+30"),
    ({"codes": np.zeros((40, 3))}, "codes do not vary"),
    ({"codes": np.zeros(40)}, r"codes are \(40,\); must be \(n, N\)"),
    ({"codes": np.zeros((9, 3))}, r"codes are \(9, 3\); .* with n >= 10"),
    ({"codes": np.full((40, 3), "a")}, "codes has dtype <U1"),
])  # fmt: skip
def test_bad_codes_and_labels(rng, change, message):
    with pytest.raises(InputError, match=message):
        fit_direction(**{"codes": correlated(rng, 40, 3), "labels": np.arange(40) % 2} | change)


def test_a_file_gives_the_direction_again(tmp_path):
    FOUND.save(tmp_path / "d.safetensors")
    again = load_direction(tmp_path / "d.safetensors")
    assert torch.equal(again.vector, FOUND.vector) and torch.equal(again.deviations, FOUND.deviations)
    for name in ("kind", "score", "score_name", "baseline", "name"):
        assert getattr(again, name) == getattr(FOUND, name)


@pytest.mark.parametrize("tensors, about, message", [
    ({"vector": torch.ones(3)}, {}, "deviations"),
    ({}, {"score": ""}, "baseline|deviations"),
    ({"vector": torch.ones(2)}, {"score": "0.5"}, r"deviations is torch.float32 \(3,\)"),
    ({"vector": torch.ones(3).double()}, {}, "vector is torch.float64"),
    ({"vector": torch.tensor(1.0)}, {}, "vector is"),
    ({"vector": torch.full((3,), torch.nan)}, {}, "finite float32 numbers"),
    ({}, {"score": "nan"}, "score is nan"),
    ({}, {"kind": "magic"}, "kind is 'magic'"),
])  # fmt: skip
def test_other_files_are_named(tmp_path, tensors, about, message):
    held = {"vector": FOUND.vector, "deviations": FOUND.deviations} | tensors
    said = {"kind": "ridge", "score": "0.9", "baseline": "0", "score_name": "R^2", "name": ""} | about
    if message == "deviations":
        del held["deviations"]
    if message == "baseline|deviations":
        del said["baseline"]
    save_file(held, tmp_path / "d.safetensors", said)
    with pytest.raises(InputError, match=f"d.safetensors: not a direction that encdiff saved .*({message})"):
        load_direction(tmp_path / "d.safetensors")


def test_edit_adds_the_direction(model, images):
    vector = torch.tensor([1.0, 0.0, -0.5])
    strengths = torch.tensor([0.0, 1.0, -2.0, 0.5])
    expected = model.sample(model.encode(images) + strengths[:, None] * vector, **OPTIONS)
    assert torch.equal(model.edit(images, vector, strengths, **OPTIONS), expected)
    assert torch.equal(model.edit(images, replace(FOUND, vector=vector), strengths.tolist(), **OPTIONS), expected)
    assert torch.equal(model.edit(images, vector, 0, **OPTIONS), model.reconstruct(images, **OPTIONS))
    assert not torch.equal(model.edit(images, vector, **OPTIONS), model.reconstruct(images, **OPTIONS))


def test_edit_of_vector_concepts(images):
    model, vector = EncDiff(replace(TINY, concept_width=2)).eval(), torch.randn(3, 2)
    expected = model.sample(model.encode(images) + 2 * vector, **OPTIONS)
    assert torch.equal(model.edit(images, vector, 2, **OPTIONS), expected)


@pytest.mark.parametrize("direction, strength, message", [
    (torch.ones(4), 1, r"direction is \(4,\), must be finite numbers \(3,\)"),
    (torch.full((3,), torch.inf), 1, "must be finite numbers"),
    ("scale", 1, "direction is str"),
    (torch.ones(3), float("nan"), "strength is nan, must be a finite number"),
    (torch.ones(3), [1, 2, 3], "or 4, one for each image"),
])  # fmt: skip
def test_bad_edits(model, images, direction, strength, message):
    with pytest.raises(InputError, match=message):
        model.edit(images, direction, strength)


class Faces(Dataset):
    """Attributes, as CelebA has them."""

    name, image_size, is_grid = "faces", 16, False
    factor_names, factor_sizes, label_values = ("Bald", "Pale_Skin"), (2, 2), (np.array([-1.0, 1.0]),) * 2

    def __len__(self):
        return 20

    def images(self, indices):
        return np.zeros((len(indices), 16, 16, 3), np.uint8)

    def factors(self, indices):
        return np.stack([np.asarray(indices) % 2, np.asarray(indices) > 15], axis=1).astype(np.int64)


def test_labels_of_factors():
    room = open_dataset("procedural:2,3,2,3,3,1", 16)
    rows = np.arange(len(room))
    hue, scale, shape = (room.factors(rows)[:, i] for i in (1, 3, 4))
    values, name = factor_labels(room, rows, "scale")
    assert name == "scale" and np.array_equal(values, room.label_values[3][scale])
    values, name = factor_labels(room, rows, "scale", 1)
    assert name == "scale 1" and np.array_equal(values, scale == 1)
    values, name = factor_labels(room, rows, "wall hue", 2)
    assert name == "wall hue 2" and np.array_equal(values, hue == 2)
    assert np.array_equal(factor_labels(room, rows, "shape", 0).values, shape == 0)
    assert factor_labels(room, rows, "floor_hue").name == "floor hue 1", "of two values the second"
    values, name = factor_labels(Faces(), np.arange(20), "Pale Skin")
    assert name == "Pale Skin" and np.array_equal(values, np.arange(20) > 15)


@pytest.mark.parametrize("factor, value, message", [
    ("colour", None, "factor is 'colour', must be one of floor hue, wall hue, object hue, scale, shape, orientation"),
    ("wall_hue", None, r"value of 'wall hue' is missing, .* must be one of 0 \(0\), 1 \(0.3\), 2 \(0.6\)"),
    ("shape", 3, r"value of 'shape' is 3; must be one of 0 \(0\), 1 \(1\), 2 \(2\)"),
    ("scale", -1, r"value of 'scale' is -1; must be one of"),
    ("orientation", None, "factor 'orientation' has one value in procedural"),
])  # fmt: skip
def test_bad_factors(factor, value, message):
    with pytest.raises(InputError, match=message):
        factor_labels(open_dataset("procedural:2,3,2,3,3,1", 16), [0], factor, value)


def test_the_direction_of_a_factor_is_that_of_its_codes(model):
    room = open_dataset(DATA, 16)
    rows = np.arange(len(room))
    codes = model.encode(to_float(room.images(rows))).detach()
    calls = []
    found = factor_direction(model, room, "scale", progress=lambda *call: calls.append(call))
    expected = fit_direction(codes, room.labels(rows)[:, 3])
    torch.testing.assert_close(found.vector, expected.vector, rtol=1e-4, atol=1e-5)
    assert found.name == "scale" and calls == [(72, 72)]
    assert factor_direction(model, room, "scale", images=30, seed=1).vector.shape == (3,)
    vectors = EncDiff(replace(TINY, concept_width=2))
    assert factor_direction(vectors, room, "shape", 2).vector.shape == (3, 2) and vectors.training


def test_cells_are_what_the_model_edits(model, images):
    asked = []
    picture = edits(model, images[:2], FOUND, strengths=[-1, 0], progress=lambda *call: asked.append(call), **OPTIONS)
    assert asked == [(1, 2), (2, 2)] and "scale" in picture.info["Title"]
    assert "R^2 0.900 on images held out, 0.010 with shuffled labels" in picture.info["Description"]
    pixels = np.asarray(picture).astype(int)
    for i, image in enumerate(images[:2]):
        cells = model.edit(image.expand(2, -1, -1, -1), FOUND, [-1, 0], **OPTIONS)
        places = []
        for cell in (image, *cells):
            wanted = ((cell.permute(1, 2, 0) + 1) * 127.5).round().int().numpy().repeat(6, 0).repeat(6, 1)
            near = np.argwhere(abs(pixels[:-95, :-95] - wanted[0, 0]).max(-1) <= 1)
            places += [(y, x) for y, x in near if abs(pixels[y : y + 96, x : x + 96] - wanted).max() <= 1]
        assert len(places) == 3 and len({y for y, _ in places}) == 1, (i, places)
        assert [x for _, x in places] == sorted(x for _, x in places)
    assert edits(model, images[:1], FOUND.vector, strengths=[1], **OPTIONS).info["Title"] == "Along a direction"
    with pytest.raises(InputError, match="both must be at least 1"):
        edits(model, images[:0], FOUND)


@pytest.fixture
def folder(model, tmp_path):
    """A model folder."""
    model.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_command_fits_and_applies_again(encdiff, folder, tmp_path):
    options = ["--steps", 1, "--strengths", 3, "--images", 2]
    code, text = encdiff("direction", folder, "--data", DATA, "--factor", "wall hue", *options)
    assert code == 0 and "wall hue 1: area under the ROC curve" in text and "concept standard deviations" in text
    made = folder / "pictures" / "direction-wall-hue-1.png"
    assert f"picture: {made}" in text and f"direction: {made.with_suffix('.safetensors')}" in text
    again = tmp_path / "again.png"
    given = ["--file", made.with_suffix(".safetensors"), "--out", again]
    code, text = encdiff("direction", folder, "--data", DATA, *given, *options)
    assert code == 0 and "direction:" not in text and not again.with_suffix(".safetensors").exists()
    with Image.open(made) as first, Image.open(again) as second:
        assert np.array_equal(np.asarray(first), np.asarray(second))
    code, text = encdiff(
        "direction", folder, "--data", DATA, "--factor", "scale", "--out", tmp_path / "s.png", *options
    )
    assert code == 0 and "scale: R^2" in text
    assert load_direction(tmp_path / "s.safetensors").name == "scale"


@pytest.mark.parametrize("args, message", [
    ([], "either --factor, with or without --value, or --file must be given"),
    (["--factor", "scale", "--file", "x"], "either --factor"),
    (["--file", "x", "--value", "1"], "either --factor"),
    (["--file", "none.safetensors"], "none.safetensors: no such file"),
    (["--factor", "colour"], "factor is 'colour', must be one of floor hue, wall hue"),
    (["--factor", "shape"], "value of 'shape' is missing, but the factor has no order; must be one of 0 (0), 1 (1)"),
    (["--factor", "shape", "--value", "3"], "value of 'shape' is 3; must be one of"),
    (["--factor", "scale", "--strengths", "1"], "--strengths"),
    (["--factor", "scale", "--out", "d.safetensors"], "--out d.safetensors: must be a picture"),
    (["--factor", "scale", "--data", "{photos}"], "has no factors, which a direction is fitted to"),
    (["--file", "{other}"], "direction is (5,), must be finite numbers (3,), one for each code"),
])  # fmt: skip
def test_bad_input_of_the_command(encdiff, folder, tmp_path, args, message):
    photos, other = tmp_path / "photos", tmp_path / "other.safetensors"
    photos.mkdir()
    for i in range(4):
        Image.new("RGB", (16, 16)).save(photos / f"{i}.png")
    replace(FOUND, vector=torch.ones(5), deviations=torch.ones(5)).save(other)
    given = [a.format(photos=photos, other=other) for a in args]
    data = [] if "--data" in given else ["--data", DATA]
    code, text = encdiff("direction", folder, *data, "--steps", 1, *given)
    assert code == 2 and message in text and "Traceback" not in text
