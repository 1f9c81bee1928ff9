"""What to edit in an EncDiff, the loop against bias, the effect on images, and `encdiff edit`."""

from dataclasses import replace
from functools import wraps

import numpy as np
import pytest
import torch
from _tiny import TINY
from PIL import Image

from encdiff import EncDiff, InputError, open_dataset
from encdiff.edit import (
    Edit,
    concept_range,
    concept_targets,
    concept_tokens,
    debias,
    factor_concepts,
    factor_targets,
    factor_tokens,
    joint_attributes,
    known_codes,
    mist,
    uce,
)
from encdiff.edit.layers import projections
from encdiff.evaluation import edit_effect
from encdiff.pictures import edited_sheet

DATA = "procedural:2,2,2,2,3,1"
OPTIONS = {"steps": 2}


@pytest.fixture
def room():
    return open_dataset(DATA, 16)


def carried(model, room) -> tuple[str, list[int]]:
    """A factor that some concepts of an untrained model carry, and these."""
    for name in ("floor hue", "wall hue", "object hue", "scale"):
        try:
            return name, factor_concepts(model, room, name)
        except InputError:
            continue
    raise AssertionError("no concept carries a factor")


# ---- tokens


def test_tokens_of_a_concept_are_the_banks(model):
    scalars = torch.randn(5, 3)
    expected = model.tokens(scalars)[:, 1]
    torch.testing.assert_close(concept_tokens(model, 1, scalars[:, 1]), expected.detach())
    assert concept_tokens(model, 2, 0.5).shape == (1, 4)


def test_a_concept_is_edited_over_its_range_and_the_others_are_kept(model, room):
    codes, factors = known_codes(model, room)
    assert codes.shape == (48, 3) and factors.shape == (48, 6)
    edited, wanted, keep = concept_targets(model, room, 1, 0.3)
    ends = torch.quantile(codes, torch.tensor([0.02, 0.98]), dim=0)
    torch.testing.assert_close(edited[[0, -1]], concept_tokens(model, 1, ends[:, 1]))
    torch.testing.assert_close(wanted, concept_tokens(model, 1, 0.3).expand(5, -1))
    torch.testing.assert_close(
        keep[[0, -1]], torch.cat([concept_tokens(model, c, ends[i, c]) for i, c in ((0, 0), (1, 2))])
    )
    assert concept_range(model, room, 1) == pytest.approx(ends[:, 1].tolist())
    assert concept_targets(model, room, 1, 0.3, keep=[2]).keep.shape == (5, 4)
    assert concept_targets(model, room, 1, 0.3, keep=[]).keep is None


def test_a_factor_is_edited_at_its_mean_codes(model, room):
    codes, factors = known_codes(model, room)
    edited, wanted, keep = factor_targets(model, room, "shape", 2, concepts=[0, 2])
    means = torch.stack([codes[torch.from_numpy(factors[:, 4] == v)].mean(0) for v in range(3)])
    expected = model.tokens(means)[:, [0, 2]].detach()
    torch.testing.assert_close(edited, expected.flatten(0, 1))
    torch.testing.assert_close(wanted, expected[2].repeat(3, 1))
    assert keep.shape == (5, 4)
    name, found = carried(model, room)
    by_name, given = (factor_targets(model, room, name.replace(" ", "_"), 1, concepts=c) for c in (None, found))
    assert torch.equal(by_name.edited, given.edited) and torch.equal(by_name.wanted, given.wanted)


@pytest.mark.parametrize("call, message", [
    (lambda m, r: concept_targets(m, r, 3, 0), r"concept is 3, must be an integer in 0..2"),
    (lambda m, r: concept_targets(m, r, 1, float("nan")), "values are .*nan.*, must be finite"),
    (lambda m, r: concept_targets(m, r, 1, 0, keep=[1]), "keep: concept 1 is edited, must be another"),
    (lambda m, r: factor_targets(m, r, "colour", 0), "factor is 'colour', must be one of floor hue, wall hue"),
    (lambda m, r: factor_targets(m, r, 2, 2), "factor is 2, must be one of floor hue"),
    (lambda m, r: factor_targets(m, "room", "shape", 2), "dataset is a str, must be a Dataset"),
    (lambda m, r: factor_targets(m, r, "shape", 2, concepts=3), r"concepts is 3, must be a list .* such as \[0, 3\]"),
    (lambda m, r: concept_targets(m, r, 1, 0, keep="0"), "keep is '0', must be a list"),
    (lambda m, r: factor_targets(m, r, "shape", 3), r"value of 'shape' is 3, must be a whole number in 0..2"),
    (lambda m, r: factor_targets(m, r, "orientation", 0), "no concept carries it; give concepts"),
    (lambda m, r: concept_targets(m, open_dataset(DATA, 32), 1, 0), "images of 32, the model takes 16"),
    (lambda m, r: concept_targets(EncDiff(replace(TINY, concept_width=2)), r, 1, 0), "its concepts are vectors"),
    (lambda m, r: concept_targets("room64", r, 1, 0), "model is a str, must be an EncDiff"),
    (lambda m, r: factor_tokens(m, torch.ones(4, 3), [0, 1], [0]), r"codes are \(4, 3\), labels \(2,\)"),
])  # fmt: skip
def test_bad_targets(model, room, call, message):
    with pytest.raises(InputError, match=message):
        call(model, room)


# ---- bias


def values_of(model, tokens):
    """What the first layer makes of tokens."""
    layer = next(layer for name, layer in projections(model.unet).items() if "to_v" in name)
    return tokens @ layer.weight.detach().T


def test_the_loop_ends_where_shares_are_equal(model):
    """A judge with a known answer: the share falls with the value of c along u_1 - u_0, by a straight line."""
    c, attributes = torch.randn(1, 4), torch.randn(2, 4)
    units = [v / v.norm() for v in values_of(model, attributes)]
    along = (units[1] - units[0]) / (units[1] - units[0]).norm()
    start = float(values_of(model, c)[0] @ along)

    def shares(edited):
        first = min(1.0, max(0.0, 0.9 - 0.1 * (float(values_of(edited, c)[0] @ along) - start)))
        return [first, 1 - first]

    before, seen = {n: t.clone() for n, t in model.state_dict().items()}, []
    found = debias(model, c, attributes, shares, rate=1, progress=lambda i, r: seen.append((i, r)))
    assert found.balanced and abs(found.shares[-1][0] - 0.5) < 0.05 and found.shares[0] == pytest.approx([0.9, 0.1])
    assert seen == list(enumerate(found.shares)) and 2 < len(seen) < 100
    falls = [a[0] - b[0] for a, b in zip(found.shares, found.shares[1:], strict=False)]
    assert min(falls) > 0, "each round goes on from the last"
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    found.edit.apply(model)
    assert shares(model) == pytest.approx(found.shares[-1])


def test_a_round_is_the_formula_of_the_paper(model):
    c, attributes, keep = torch.randn(1, 4), torch.randn(3, 4), torch.randn(2, 4)
    given = [0.7, 0.2, 0.1]
    found = debias(model, c, attributes, lambda _: given, keep, rounds=1, rate=0.1)
    assert not found.balanced and found.shares == [given, given]

    def wanted(weight):
        own, u = c.double() @ weight.T, attributes.double() @ weight.T
        by = 0.1 * (1 / 3 - torch.tensor(given, dtype=torch.float64))
        return own + own.norm() * (by[:, None] * u / u.norm(dim=1, keepdim=True)).sum(0, keepdim=True)

    expected = mist(model, c, wanted, keep)
    for name, weight in expected.weights.items():
        torch.testing.assert_close(found.edit.weights[name], weight)
    assert (
        repr(found) == "Debiased(Edit(mist 'debias', 7 of 14 projections), not balanced after 1 round: 0.70 0.20 0.10)"
    )
    none = debias(model, c, attributes, lambda _: given, keep, rounds=0)
    assert all(torch.equal(none.edit.weights[n], projections(model.unet)[n].weight) for n in none.edit.weights)


def test_joint_attributes_are_every_combination():
    a, b = torch.randn(2, 1, 4), torch.randn(3, 2, 4)
    edited, attributes = joint_attributes(a, b)
    assert edited.shape == (8, 4) and attributes.shape == (6, 8, 4)
    assert torch.equal(edited, torch.cat([a[:, 0], b.flatten(0, 1)]))
    for j, (first, second) in enumerate([(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)]):
        assert torch.equal(attributes[j], torch.cat([a[first].repeat(2, 1), b[second].repeat(3, 1)]))


def test_attributes_come_one_after_another():
    with pytest.raises(InputError, match=r"tokens are \['list'\], must be one torch.Tensor \(K, n, D\) after another"):
        joint_attributes([torch.randn(2, 1, 4)])


@pytest.mark.parametrize("change, message", [
    ({"shares": [0.9, 0.1]}, "shares is a list, must be a function"),
    ({"edited": [1.0]}, "edited are list"),
    ({"rate": "1"}, "rate is '1', must be a number above 0"),
    ({"shares": lambda _: [0.5]}, r"shares gave \[0.5\], must give 2 numbers in 0..1"),
    ({"shares": lambda _: [0.5, 1.5]}, "must give 2 numbers"),
    ({"shares": lambda _: "many"}, "shares gave many"),
    ({"attributes": torch.randn(1, 4)}, r"attributes are \(1, 4\), must be tokens \(K, D\) or \(K, n, D\)"),
    ({"attributes": torch.randn(2, 3, 4)}, r"attributes are \(2, 3, 4\), must be finite, with 1 tokens each"),
    ({"rate": 0}, "rate is 0, must be a number above 0"),
    ({"rounds": -1}, "rounds is -1"),
    ({"method": "esd"}, "method is 'esd', must be one of mist, uce"),
])  # fmt: skip
def test_bad_loops(model, change, message):
    given = {"edited": torch.randn(4), "attributes": torch.randn(2, 4), "shares": lambda _: [0.9, 0.1]} | change
    with pytest.raises(InputError, match=message):
        debias(model, **given)


def test_a_judge_that_fails_leaves_the_model_as_it_was(model):
    before = {n: t.clone() for n, t in model.state_dict().items()}
    answers = iter([[0.9, 0.1]])
    with pytest.raises(StopIteration):
        debias(model, torch.randn(1, 4), torch.randn(2, 4), lambda _: next(answers))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


# ---- effect


def test_the_effect_of_a_true_edit_and_of_one_that_changes_another_factor(model, room, monkeypatch):
    """The drawer gives true images: after the edit with the wanted shape, and in half of them another wall."""
    edit = uce(model, torch.randn(1, 4), torch.randn(1, 4))
    first = next(iter(edit.weights)).removesuffix(".weight")
    own = model.unet.get_submodule(first).weight.detach().clone()
    truth: dict = {}
    encode = EncDiff.encode

    def remember(self, images):
        codes = encode(self, images)
        truth.update(zip(map(tuple, codes.tolist()), images, strict=True))
        return codes

    @wraps(EncDiff.sample)
    def draw(self, scalars, **_):
        images = torch.stack([truth[tuple(code)] for code in scalars.tolist()])
        if torch.equal(self.unet.get_submodule(first).weight, own):
            return images
        every = torch.from_numpy(room.images(np.arange(len(room)))).permute(0, 3, 1, 2) / 127.5 - 1
        factors = room.factors([int((every - image).abs().sum((1, 2, 3)).argmin()) for image in images])
        factors[:, 4] = 2
        factors[::2, 1] = 1 - factors[::2, 1]
        return every[room.indices(factors)]

    monkeypatch.setattr(EncDiff, "encode", remember)
    monkeypatch.setattr(EncDiff, "sample", draw)
    effect = edit_effect(model, edit, room, "shape", 2, images=16)
    assert (effect["before"]["wanted"], effect["before"]["unwanted"]) == (0, 0)
    assert (effect["after"]["wanted"], effect["after"]["unwanted"]) == (1, 0.5) and effect["images"] == 16
    assert effect["after"]["changed"] == {
        "floor hue": 0, "wall hue": 0.5, "object hue": 0, "scale": 0, "orientation": 0,
    }  # fmt: skip
    assert torch.equal(model.unet.get_submodule(first).weight, own)


@pytest.mark.parametrize("change, message", [
    ({"factor": "colour"}, "factor is 'colour'"),
    ({"value": 3}, r"value of 'shape' is 3, must be a whole number in 0..2"),
    ({"factor": "orientation", "value": 0}, "every image has value 0 of 'orientation'; there is nothing to change"),
    ({"edit": "hue"}, "edit is a str, must be an Edit"),
    ({"images": 0}, "images is 0"),
])  # fmt: skip
def test_bad_effects(model, room, change, message):
    edit = uce(model, torch.randn(1, 4), torch.randn(1, 4))
    given = {"edit": edit, "dataset": room, "factor": "shape", "value": 2} | change
    with pytest.raises(InputError, match=message):
        edit_effect(model, **given)


def test_the_picture_leaves_the_model_as_it_was(model, images, texts):
    edit = uce(model, torch.randn(1, 4), torch.randn(1, 4), name="wall blue")
    before = model.reconstruct(images, **OPTIONS)
    edited_sheet(model, edit, images[:2], **OPTIONS)
    assert {"Edited: wall blue", "0", "0.5", "1", "image 1", "image 2"} <= set(texts)
    assert torch.equal(model.reconstruct(images, **OPTIONS), before)


# ---- command


@pytest.fixture
def folder(model, tmp_path):
    model.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_the_command_writes_an_edit_that_is_drawn_again(encdiff, folder, tmp_path):
    options = ["--data", DATA, "--steps", 1, "--images", 2]
    code, text = encdiff("edit", folder, "--concept", 1, "--as", 0.5, "--method", "mist", *options)
    made = folder / "pictures" / "edit-concept-1-as-0.5.safetensors"
    assert code == 0 and "mist of 7 of 14 projections, 5 tokens edited, 10 kept" in text
    assert f"edit: {made}" in text and f"picture: {made.with_suffix('.png')}" in text
    assert "in the data its scalar goes from " in text
    picture = made.with_suffix(".png").read_bytes()
    code, text = encdiff("edit", folder, "--apply", made, *options)
    assert code == 0 and "edit:" not in text
    again = made.with_name(f"{made.stem}-again.png")
    with Image.open(made.with_suffix(".png")) as first, Image.open(again) as second:
        assert "Concept 1 at 0.5; in the data its" in first.info["Description"]
        assert np.array_equal(np.asarray(first)[-280:], np.asarray(second)[-280:]), "all but the caption"
    code, text = encdiff("edit", folder, "--apply", made, "--seed", 1, *options)
    assert code == 0 and f"picture: {made.with_name(f'{made.stem}-again-1.png')}" in text
    assert made.with_suffix(".png").read_bytes() == picture
    model = EncDiff.from_pretrained(folder)
    edit = Edit.load(made, model)
    edit.apply(model)
    assert (edit.method, edit.name) == ("mist", "concept 1 as 0.5")


def test_the_command_of_a_factor_counts_its_effect(encdiff, folder, room, tmp_path):
    out, (factor, _) = tmp_path / "e.safetensors", carried(EncDiff.from_pretrained(folder), room)
    options = ["--judge", "--data", DATA, "--steps", 1, "--images", 3, "--out", out]
    code, text = encdiff("edit", folder, "--factor", factor, "--as", 1, *options)
    assert code == 0 and "before: " in text and "% of 3 images wanted" in text and Edit.load(out).method == "uce"
    with Image.open(out.with_suffix(".png")) as picture:
        caption = picture.info["Description"]
    column = room.factor_names.index(factor.replace(" ", "_"))
    assert f"Value 1 of {factor}, of 0..1, {room.label_values[column][1]:.4g} in the data." in caption
    assert "Judged at strength 1: " in caption and "before the edit: " in caption


@pytest.mark.parametrize("args, message", [
    (["--as", "1"], "one of --concept, --factor and --apply must be given"),
    (["--concept", "1", "--factor", "shape", "--as", "1"], "only one of --concept, --factor and --apply must be given"),
    (["--concept", "1"], "--as must be given with --concept and --factor"),
    (["--apply", "x", "--as", "1"], "left out with --apply"),
    (["--apply", "x", "--as", "3", "--factor", "shape"], "only one of --concept, --factor and --apply"),
    (["--concept", "1", "--as", "500"], "--as 500: concept 1 has learnt no such value, in the data its scalar goes"),
    (["--concept", "1", "--as", "nan"], "--as nan: concept 1 has learnt no such value"),
    (["--factor", "shape", "--as", "inf"], "--as inf: must be a whole number"),
    (["--concept", "1", "--as", "1", "--strength", "1e9"], "--strength 1e+09: must be a number from -1,000,000 to"),
    (["--apply", "x", "--strength", "nan"], "--strength nan: must be"),
    (["--apply", "x", "--keep", "1"], "--keep must be left out with --apply"),
    (["--apply", "none.safetensors"], "none.safetensors: no such file"),
    (["--apply", "{weights}"], "model.safetensors: not an edit that encdiff saved"),
    (["--concept", "1", "--as", "1", "--judge"], "--judge must be left out without --factor"),
    (["--factor", "shape", "--as", "0.5"], "--as 0.5: must be a whole number"),
    (["--factor", "shape", "--as", "7"], "value of 'shape' is 7, must be a whole number in 0..2"),
    (["--concept", "5", "--as", "1"], "concept is 5, must be an integer in 0..2"),
    (["--concept", "1", "--as", "1", "--keep", "a"], "--keep 'a' must be numbers"),
    (["--concept", "1", "--as", "1", "--out", "x.png"], "--out x.png: must end in .safetensors"),
    (["--concept", "1", "--as", "1", "--out", "{weights}"], "is no edit and would be overwritten"),
])  # fmt: skip
def test_bad_input_of_the_command(encdiff, folder, args, message):
    given = [arg.format(weights=folder / "model.safetensors") for arg in args]
    code, text = encdiff("edit", folder, "--data", DATA, "--steps", 1, *given)
    assert code == 2 and message in text and "Traceback" not in text
    assert text.strip().startswith("error: "), "and nothing before"
