"""Concept edits: the closed form against its objective, and edits that are applied, undone, saved and refused."""

from dataclasses import replace

import pytest
import torch
from _tiny import TINY
from safetensors.torch import save_file
from torch import nn

from encdiff import EncDiff, InputError
from encdiff.edit import Edit, mist, solve, uce
from encdiff.edit.layers import projections

D, INNER = 6, 5


def problem():
    """A weight, edited tokens, wanted values, tokens to keep and scales of each, float64."""
    weight, edited, kept = (torch.randn(n, D, dtype=torch.float64) for n in (INNER, 3, 7))
    return weight, edited, torch.randn(3, INNER, dtype=torch.float64), kept, torch.rand(3) + 0.1, torch.rand(7) + 0.1


def objective(changed, weight, edited, wanted, kept, e, p, lam):
    fit = (e * (edited @ changed.T - wanted).square().sum(1)).sum()
    return fit + (p * ((changed - weight) @ kept.T).square().sum(0)).sum() + lam * (changed - weight).square().sum()


@pytest.mark.parametrize("lam", [0.0, 0.5])
def test_the_closed_form_is_the_least_squares_optimum(lam):
    weight, edited, wanted, kept, e, p = problem()
    changed = solve(weight, edited, wanted, kept, lam=lam, edit_scale=e, keep_scale=p).requires_grad_()
    least = objective(changed, weight, edited, wanted, kept, e, p, lam)
    (gradient,) = torch.autograd.grad(least, changed)
    assert gradient.abs().max() < 1e-10
    for size in (1e-3, 1.0):
        other = changed + size * torch.randn_like(changed)
        assert objective(other, weight, edited, wanted, kept, e, p, lam) > least


def test_it_is_the_formula_of_the_paper():
    weight, edited, wanted, kept, _, _ = problem()
    system = 0.5 * torch.eye(D, dtype=torch.float64) + edited.T @ edited + 0.2 * kept.T @ kept
    right = 0.5 * weight + wanted.T @ edited + 0.2 * (weight @ kept.T) @ kept
    expected = right @ torch.linalg.inv(system)
    torch.testing.assert_close(solve(weight, edited, wanted, kept), expected, rtol=1e-10, atol=1e-10)
    moved = (wanted - edited @ weight.T).T @ edited @ torch.linalg.solve(system, kept.T)  # of kept values, as predicted
    torch.testing.assert_close((expected - weight) @ kept.T, moved, rtol=1e-9, atol=1e-9)
    assert solve(weight.float(), edited[0], wanted[:1]).dtype == torch.float64


def test_values_that_are_there_already_change_nothing():
    weight, edited, _, kept, _, _ = problem()
    torch.testing.assert_close(solve(weight, edited, edited @ weight.T, kept), weight, rtol=1e-13, atol=1e-13)


def test_singular_systems_name_the_tokens():
    weight, edited, wanted, kept, _, _ = problem()
    with pytest.raises(InputError, match=r"lam is 0, and edited 0, .* span 3 of 6 dimensions: .* lam must be above 0"):
        solve(weight, edited, wanted, lam=0)
    kept[2], kept[3:] = -2 * edited[1], kept[0]
    with pytest.raises(InputError, match=r"span 5 of 6 .*\(edited 1 and keep 2 are collinear; keep 0 and keep 3 are"):
        solve(weight, edited, wanted, kept, lam=0)


def test_collinear_tokens_that_want_different_values_are_named():
    weight, edited, wanted, kept, _, _ = problem()
    with pytest.raises(InputError, match="^edited 1 and keep 2 are collinear, but should have different values"):
        solve(weight, edited, wanted, torch.cat([kept[:2], 3 * edited[1:2]]))
    twice = torch.cat([edited, 2 * edited[:1]])
    solve(weight, twice, torch.cat([wanted, 2 * wanted[:1]]))
    with pytest.raises(InputError, match="^edited 0 and edited 3 are collinear"):
        solve(weight, twice, torch.cat([wanted, wanted[:1]]))


@pytest.mark.parametrize("change, message", [
    ({"edited": torch.ones(2, 4)}, r"keep are \(7, 6\), must be finite tokens \(n, 4\)"),
    ({"edited": torch.ones(3, 6, dtype=torch.int64)}, "edited are torch.int64, must be a torch.Tensor of floats"),
    ({"edited": torch.tensor([[1.0] * 5 + [torch.nan]])}, r"edited are \(1, 6\), 1 of their numbers NaN or infinite"),
    ({"edited": torch.ones(1, 77, 6)}, r"edited are \(1, 77, 6\), .*: of prompt embeddings end_of_text picks one each"),
    ({"lam": "1"}, "lam is '1', must be a number"),
    ({"edit_scale": "1"}, "edit_scale is 1, must be a number"),
    ({"edited": [1.0]}, "edited are list"),
    ({"wanted": torch.ones(2, INNER)}, r"wanted is \(2, 5\) for a weight"),
    ({"lam": -1}, "lam is -1, must be a number, at least 0"),
    ({"lam": float("nan")}, "lam is nan"),
    ({"keep_scale": [1.0, 2.0]}, r"keep_scale is \[1.0, 2.0\], must be a number, at least 0, or 7, one for each token"),
    ({"edit_scale": -1.0}, "edit_scale is -1.0"),
])  # fmt: skip
def test_bad_problems(change, message):
    weight, edited, wanted, kept, _, _ = problem()
    given = {"weight": weight, "edited": edited, "wanted": wanted, "kept": kept} | change
    with pytest.raises(InputError, match=message):
        solve(**given)


# ---- edits of our U-Net


def state(model) -> dict:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def changed(before: dict, model) -> set[str]:
    return {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}


def denoised(model, tokens, maps=None):
    x, t = torch.randn(1, 48, 4, 4, generator=torch.Generator().manual_seed(0)), torch.tensor([500])
    with torch.no_grad():
        return model.denoise(x, t, tokens, maps=maps)


def test_mist_leaves_keys_and_all_else_to_the_bit(model):
    before, c = state(model), torch.randn(2, 4)
    edit = mist(model, c, c.flip(0), torch.randn(1, 4))
    assert not changed(before, model), "nothing before apply"
    first: list = []
    denoised(model, torch.randn(1, 3, 4, generator=torch.Generator().manual_seed(1)), first)
    edit.apply(model)
    assert changed(before, model) == {f"model.diffusion_model.{name}" for name in edit.weights}
    assert all(name.endswith("attn2.to_v.weight") for name in edit.weights)
    then: list = []
    denoised(model, torch.randn(1, 3, 4, generator=torch.Generator().manual_seed(1)), then)
    assert torch.equal(first[0], then[0]) and not torch.equal(first[-1], then[-1])
    edit.undo(model)
    assert not changed(before, model)


def test_uce_edits_keys_and_values_and_reaches_them(model):
    c, wanted = torch.randn(1, 4), torch.randn(1, 4)
    edit = uce(model, c, wanted, lam=1e-9)
    own = {name: layer.weight.detach().clone() for name, layer in projections(model.unet).items()}
    assert edit.weights.keys() == own.keys() and {n.split(".")[-2] for n in own} == {"to_k", "to_v"}
    for name, weight in own.items():
        torch.testing.assert_close(c @ edit.weights[name].T, wanted @ weight.T, rtol=1e-4, atol=1e-4)


def test_the_edited_token_moves_the_output_and_another_hardly(model):
    c, kept, wanted = torch.eye(4)[:1], torch.eye(4)[1:], torch.eye(4)[1:2] * 2
    with_c, without = torch.stack([c[0], *kept[:2]])[None], kept[None]
    before = [denoised(model, tokens) for tokens in (with_c, without)]
    uce(model, c, wanted, kept, lam=1e-6, keep_scale=1).apply(model)
    moved = [(denoised(model, t) - b).norm() / b.norm() for t, b in zip((with_c, without), before, strict=True)]
    assert moved[0] > 1e-3 and moved[1] < 1e-4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_weights_are_solved_in_float64_and_restored(model, dtype):
    weight = next(iter(projections(model.unet).values())).weight.detach().clone()
    model.unet.to(dtype)
    before, c = state(model), torch.randn(1, 4)
    edit = uce(model, c, -c)
    name = next(iter(edit.weights))
    assert edit.weights[name].dtype == dtype
    expected = solve(weight.to(dtype), c, -c @ weight.to(dtype).float().T).to(dtype)
    assert torch.equal(edit.weights[name], expected)
    edit.apply(model, 0.5)
    assert changed(before, model)
    edit.undo(model)
    assert not changed(before, model)


def test_strength_scales_and_nothing_is_changed_in_place(model):
    c, wanted = torch.randn(2, 4), torch.randn(2, 4)
    given = c.clone(), wanted.clone()
    edit, again = (uce(model, c, wanted) for _ in range(2))
    assert torch.equal(c, given[0]) and torch.equal(wanted, given[1])
    assert all(torch.equal(edit.weights[name], again.weights[name]) for name in edit.weights), "nothing piles up"
    own = {name: layer.weight.detach().clone() for name, layer in projections(model.unet).items()}
    edit.apply(model, 0.25)
    for name, layer in projections(model.unet).items():
        expected = own[name] + 0.25 * (edit.weights[name] - own[name])
        torch.testing.assert_close(layer.weight.detach(), expected, rtol=1e-5, atol=1e-6)
    edit.undo(model)
    edit.apply(model, 0)
    assert all(torch.equal(layer.weight, own[name]) for name, layer in projections(model.unet).items())


def test_edits_in_turn_are_undone_in_the_reverse_order(model):
    start = state(model)
    first = mist(model, torch.randn(1, 4), torch.randn(1, 4), name="first")
    stale = uce(model, torch.randn(1, 4), torch.randn(1, 4), name="stale")
    first.apply(model)
    between = state(model)
    with pytest.raises(InputError, match="edit 'stale': the weights at hand are not those that it was made of"):
        stale.apply(model)
    with pytest.raises(InputError, match="edit 'first': is already applied to this U-Net; undo it before"):
        first.apply(model)
    second = uce(model, torch.randn(1, 4), torch.randn(1, 4), name="second")
    second.apply(model)
    with pytest.raises(InputError, match="edit 'first': the weights at hand are not those that it was made of"):
        first.apply(model)
    with pytest.raises(InputError, match="edit 'first': the weights at hand are not those that it made; undo first"):
        first.undo(model)
    second.undo(model)
    assert not changed(between, model)
    first.undo(model)
    assert not changed(start, model)
    with pytest.raises(InputError, match="edit 'first': this object was not applied to this U-Net, .* keep the object"):
        first.undo(model)
    with pytest.raises(InputError, match="^this uce edit: this object was not applied"):
        uce(model, torch.randn(1, 4), torch.randn(1, 4)).undo(model)


def test_an_edit_is_shown_in_a_line(model):
    c = torch.randn(1, 4)
    assert repr(uce(model, c, -c, name="object hue 2")) == "Edit(uce 'object hue 2', 14 of 14 projections)"
    assert repr(mist(model, c, -c)) == "Edit(mist, 7 of 14 projections)"


def test_a_file_holds_the_changed_weights_and_is_read_again(model, tmp_path):
    edit, path = mist(model, torch.randn(1, 4), torch.randn(1, 4), name="hue"), tmp_path / "edit.safetensors"
    edit.save(path)
    read = Edit.load(path, model)
    assert (read.method, read.name) == ("mist", "hue") and read.weights.keys() == edit.weights.keys()
    before = state(model)
    edit.apply(model)
    after = state(model)
    edit.undo(model)
    read.apply(model)
    assert not changed(after, model)
    read.undo(model)
    assert not changed(before, model)


def test_files_of_others_and_damaged_ones_are_refused(model, tmp_path):
    path = tmp_path / "edit.safetensors"
    mist(model, torch.randn(1, 4), torch.randn(1, 4)).save(path)
    wider = EncDiff(replace(TINY, width=32))
    with pytest.raises(
        InputError, match=r"edit.safetensors: is of a U-Net whose .*to_v.weight is \(16, 4\) .*\(32, 4\)"
    ):
        Edit.load(path, wider)
    with pytest.raises(InputError, match=r"edit.safetensors: is of a U-Net that has .*, which this one lacks"):
        Edit.load(path, EncDiff(replace(TINY, attention_levels=(1,))))
    deeper = EncDiff(replace(TINY, transformer_depth=2))
    with pytest.raises(
        InputError, match=r"edit.safetensors: is of a U-Net whose 14 projections have other names .* 28"
    ):
        Edit.load(path, deeper)
    other = EncDiff(TINY)
    with pytest.raises(InputError, match="not those that it was made of"):
        Edit.load(path, other).apply(other)
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(InputError, match="edit.safetensors: not a whole safetensors file"):
        Edit.load(path)
    save_file({"x": torch.ones(2, 2)}, path)
    with pytest.raises(InputError, match="edit.safetensors: not an edit that encdiff saved"):
        Edit.load(path)
    about = {name: "1" for name in ("method", "name", "layers", "shapes", "original")} | {"format": "encdiff edit 1"}
    save_file({"x": torch.ones(2, 2)}, path, about | {"name": "x" * 300})
    with pytest.raises(InputError, match="edit.safetensors: not an edit that encdiff saved"):
        Edit.load(path)
    save_file({"x\n": torch.ones(2, 2)}, path, about)
    with pytest.raises(InputError, match=r"is of a U-Net that has 'x\\n', which"):
        Edit.load(path, model)
    save_file({"x": torch.full((2, 2), torch.nan)}, path, about)
    with pytest.raises(InputError, match="weights must be finite matrices"):
        Edit.load(path)
    with pytest.raises(InputError, match="none.safetensors: no such file"):
        Edit.load(tmp_path / "none.safetensors")
    with pytest.raises(InputError, match=r"path is a EncDiff, must be a file's name: Edit.load\(path, model\)"):
        Edit.load(model, path)


def test_an_edit_is_saved_in_a_folder_that_is_there(model, tmp_path):
    edit = mist(model, torch.randn(1, 4), torch.randn(1, 4))
    with pytest.raises(InputError, match="none/edit.safetensors: .*none is no folder; make it first"):
        edit.save(tmp_path / "none" / "edit.safetensors")
    with pytest.raises(InputError, match="path is a EncDiff, must be a file's name"):
        edit.save(model)


class Adapter(nn.Module):
    """As PEFT wraps a layer."""

    def __init__(self, layer):
        super().__init__()
        self.base_layer = layer

    def forward(self, x):
        return self.base_layer(x)


def test_what_cannot_be_edited_is_said(model):
    c = torch.randn(1, 4)
    with pytest.raises(InputError, match="unet: this UNet has no cross-attention"):
        uce(EncDiff(replace(TINY, conditioning="adagn")), c, c)
    with pytest.raises(InputError, match="unet is a str, must be a U-Net, or a model or pipeline"):
        uce("room64", c, c)
    with pytest.raises(InputError, match=r"edited are \(1, 5\), must be finite tokens \(n, 4\)"):
        uce(model, torch.randn(1, 5), c)
    with pytest.raises(InputError, match="wanted are 2 tokens, must be 1 or 3"):
        uce(model, torch.randn(3, 4), torch.randn(2, 4))
    with pytest.raises(InputError, match="'red' and 'blue' are collinear, but should have different values"):
        uce(model, torch.stack([c[0], 2 * c[0]]), torch.randn(2, 4), names=["red", "blue"])
    with pytest.raises(InputError, match="names are 1, must be 2"):
        uce(model, torch.randn(2, 4), c, names=["red"])
    for strength in (float("nan"), "1", 1e9):
        with pytest.raises(InputError, match=r"strength is .*, must be a number from -1,000,000 to 1,000,000"):
            uce(model, c, 2 * c).apply(model, strength)
    with pytest.raises(InputError, match="name is a int, must be a text"):
        uce(model, c, 2 * c, name=3)
    attention = model.unet.attending[0].attn2
    attention.to_v = Adapter(attention.to_v)
    with pytest.raises(InputError, match=r"attn2.to_v: is wrapped by an adapter \(PEFT\); merge or unload it"):
        uce(model, c, c)
    attention.to_v = nn.Identity()
    with pytest.raises(InputError, match="attn2.to_v: is a Identity, must be a linear layer"):
        uce(model, c, c)


def test_float16_that_would_overflow_is_refused(model):
    model.unet.to(torch.float16)
    with pytest.raises(InputError, match="the edit leaves the range of torch.float16"):
        uce(model, torch.randn(1, 4), torch.randn(1, 4) * 1e7)
