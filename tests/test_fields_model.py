"""Field models: what they give, that they keep what was measured, their loss and their files."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from _fields import CONFIG, TIMED, Fields, field_model, some_sensors

from encdiff.errors import InputError
from encdiff.fields import BASELINES, FieldModel, Sensors, sampling, scattered
from encdiff.fields.condition import make_condition
from encdiff.fields.darcy import Darcy
from encdiff.fields.equations import samples
from encdiff.fields.scores import nrmse
from encdiff.files.checkpoint import load_tensors

KINDS = [
    ("diffusion", "tokens"), ("diffusion", "input"), ("diffusion", "none"), ("regression", "tokens"),
    ("regression", "input"),
]  # fmt: skip
every_kind = pytest.mark.parametrize("objective, condition", KINDS)


def of(objective: str, condition: str, config=CONFIG) -> FieldModel:
    return field_model(replace(config, objective=objective, condition=condition))


@every_kind
@pytest.mark.parametrize("config", [CONFIG, TIMED], ids=["plain", "timed"])
def test_shapes(objective, condition, config):
    c, e = len(config.channels), 1 if objective == "regression" else 3
    times = np.arange(9.0) / 9 if config.timed else None
    model, sensors = of(objective, condition, config), some_sensors(channels=c, times=times)
    one, several = model.reconstruct(sensors, 3, steps=2), model.reconstruct([sensors] * 2, 3, steps=2)
    assert one.members.shape == (e, c, 16, 16) and several.members.shape == (2, e, c, 16, 16)
    assert one.mean.shape == (c, 16, 16) and several.mean.shape == (2, c, 16, 16)
    assert all(part.dtype == np.float32 for part in (one.members, one.mean, several.members, several.mean))
    if objective == "regression":
        assert one.spread is None and several.spread is None
    else:
        assert one.spread.shape == (c, 16, 16) and several.spread.shape == (2, c, 16, 16)
        np.testing.assert_allclose(one.spread, one.members.std(0, ddof=1), rtol=1e-6)
    assert np.isfinite(several.members).all() and not model.training


@pytest.mark.parametrize("sampler", ["heun", "euler", "dpm-solver++", "unipc"])
def test_exact_values_are_kept(sampler, monkeypatch):
    """To the bit inside the network; in the field's units but for the rounding of float32 there and back."""
    model, sensors = of("diffusion", "tokens"), some_sensors(3)
    at, told = CONFIG.grid.cells(sensors.points), make_condition([sensors], CONFIG)
    assert len(set(at)) == len(at) == 9
    kept, sample = [], sampling.sample
    monkeypatch.setattr(sampling, "sample", lambda *args, **how: kept.append(sample(*args, **how)) or kept[-1])
    members = model.reconstruct(sensors, 2, sampler=sampler, steps=6).members.reshape(2, 2, 256)
    known = told.exact.bool().expand(2, -1, -1, -1)
    assert known.sum() == 2 * 2 * 9 and torch.equal(kept[0][known], (0.5 * told.values).expand(2, -1, -1, -1)[known])
    # standardised values of up to `most` deviations are rounded to 2^-24 of themselves, values in units once more
    most, std = told.values.abs().max().item(), np.array(CONFIG.std)[:, None]
    bound = 2.0**-24 * (most * std + np.abs(sensors.values.T))
    assert (np.abs(members[:, :, at] - sensors.values.T) <= bound).all()
    others = np.delete(members, at, axis=2)
    assert others.std(0).min() > 0  # the rest is drawn


@pytest.mark.parametrize("kind", [("diffusion", "tokens"), ("diffusion", "none")])
def test_noisy_values_are_not_forced(kind):
    model, sensors = of(*kind), some_sensors(sigma=0.3)
    members = model.reconstruct(sensors, 2, steps=2).members.reshape(2, 2, 256)
    assert (members[0] != members[1]).all()


@pytest.mark.parametrize(
    "objective, condition", [("diffusion", "tokens"), ("diffusion", "none"), ("regression", "input")]
)
def test_a_member_is_the_same_in_any_batch(objective, condition):
    model, sensors = of(objective, condition), [some_sensors(0), some_sensors(1, 40)]
    whole = model.reconstruct(sensors, 3, steps=4, seed=4)
    cut = model.reconstruct(sensors, 3, steps=4, seed=4, batch_size=2)  # a batch of both fields among them
    np.testing.assert_allclose(cut.members, whole.members, rtol=1e-4, atol=5e-4)
    alone = model.reconstruct(sensors[0], 2, steps=4, seed=4)
    np.testing.assert_allclose(alone.members, whole.members[0][: len(alone.members)], rtol=1e-4, atol=5e-4)
    if objective == "diffusion":
        assert np.abs(whole.members[0, 0] - whole.members[0, 1]).max() > 0.1
        assert np.abs(model.reconstruct(sensors[0], 2, steps=4, seed=5).members - alone.members).max() > 0.1


@every_kind
def test_what_was_measured_has_an_effect(objective, condition):
    """Also far from the sensor."""
    model = of(objective, condition)
    a, b = (
        model.reconstruct(Sensors.of([[0.1, 0.1]], [[value, -3.0]], 0.2), 1, steps=2).members[0] for value in (4.0, 6.0)
    )
    assert np.abs(a - b)[:, 8:, 8:].max() > 1e-4


def test_progress_and_refusals():
    model, told = field_model(), []
    model.reconstruct(some_sensors(), 5, steps=1, batch_size=2, progress=lambda *how: told.append(how))
    assert told == [(2, 5), (4, 5), (5, 5)]
    with pytest.raises(InputError, match="ensemble and batch_size are 0 and 64, must be at least 1"):
        model.reconstruct(some_sensors(), 0)
    with pytest.raises(InputError, match="sampler is 'ddim', must be one of heun"):
        model.reconstruct(some_sensors(), 1, sampler="ddim")
    with pytest.raises(InputError, match="has values of 1 channels, must be 2"):
        model.reconstruct(some_sensors(channels=1))
    with pytest.raises(InputError, match="condition is 'none', must be 'tokens' or 'input'"):
        replace(CONFIG, objective="regression", condition="none")
    with pytest.raises(InputError, match="fields of 20x16 must be a multiple of 8 for token_patch"):
        replace(CONFIG, height=20, token_patch=8)
    with pytest.raises(InputError, match="mean has 1 numbers, must have 2"):
        replace(CONFIG, mean=(0.0,))


def test_units():
    model, fields = field_model(), torch.from_numpy(Fields(3).read([0, 1, 2]))
    inside = model.standardised(fields)
    by_hand = (fields.numpy().astype(np.float64) - np.array(CONFIG.mean)[:, None, None]) / [[[2.0]], [[0.5]]]
    np.testing.assert_allclose(inside, by_hand, rtol=1e-6)
    np.testing.assert_allclose(model.in_units(inside), fields, rtol=1e-6)


@every_kind
def test_gradients_reach_every_part(objective, condition):
    model = of(objective, condition)
    fields = model.standardised(torch.from_numpy(Fields(2).read([0, 1])))
    told = make_condition([some_sensors(0), some_sensors(1, sigma=0.1)], model.config)
    model.loss(fields, told, seed=0, sample_ids=torch.arange(2)).backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().max() > 0]
    assert not without
    assert any(name.startswith("network.encoder.") for name, _ in model.named_parameters()) == (condition == "tokens")


def seen(model, monkeypatch, told, fields):
    """What the network is given in place of the fields, scaled back to sigma_data times them and noise."""
    given = []

    def recorded(x, c_noise, *_):
        sigma = (4 * c_noise / 1000).exp().view(-1, 1, 1, 1)
        given.append((x * (sigma**2 + 0.25).sqrt(), sigma))
        return torch.zeros_like(x)

    monkeypatch.setattr(model.network, "forward", recorded)
    model.loss(fields, told, seed=0, sample_ids=torch.arange(2))
    return given[0]


@pytest.mark.parametrize("condition", ["tokens", "none"])
def test_what_is_known_has_no_noise_in_training(condition, monkeypatch):
    """A model without a condition is not told what is known, and learns the noise everywhere."""
    model = of("diffusion", condition)
    fields = model.standardised(torch.from_numpy(Fields(2).read([0, 1])))
    sensors = Sensors.of([[0.1, 0.1], [0.9, 0.9]], np.ones((2, 2)), [[0, 0], [0.1, 0.1]])
    told = make_condition([sensors] * 2, model.config)
    x, sigma = seen(model, monkeypatch, told, fields)
    noise, known = (x - fields / 2) / sigma, told.exact.bool()
    assert known.sum() == 4
    if condition == "tokens":
        torch.testing.assert_close(x[known], fields[known] / 2)
        assert noise[~known].std() == pytest.approx(1, abs=0.1)
    else:
        assert noise[known].abs().min() > 1e-3 and noise.std() == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("objective, condition", [("diffusion", "tokens"), ("regression", "input")])
def test_files(objective, condition, tmp_path):
    model, sensors = of(objective, condition), some_sensors()
    model.save_pretrained(tmp_path / "float32")
    model.save_pretrained(tmp_path / "float16", torch.float16)
    again, rounded = (FieldModel.from_pretrained(tmp_path / name) for name in ("float32", "float16"))
    assert again.config == rounded.config == model.config and not again.training
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor)
        assert torch.equal(rounded.state_dict()[name], tensor.half().float()), name
    tensors = load_tensors(tmp_path / "float16" / "model.safetensors")[0]
    assert all(tensor.dtype == torch.float16 for tensor in tensors.values())
    found, same = (m.reconstruct(sensors, 2, steps=2).members for m in (model, again))
    assert np.array_equal(found, same)
    assert {p.dtype for p in rounded.parameters()} == {torch.float32}


def test_models_of_other_kinds_are_refused(tmp_path, model):
    from encdiff import EncDiff

    field_model().save_pretrained(tmp_path / "fields")
    model.save_pretrained(tmp_path / "concepts")
    with pytest.raises(InputError, match="config.json: is of no model of fields; `encdiff fields train` makes one"):
        FieldModel.from_pretrained(tmp_path / "concepts")
    with pytest.raises(InputError, match="is of no model of fields"):
        FieldModel.from_pretrained("quickstart")
    with pytest.raises(InputError, match="config.json: is of a model of fields, must be of an EncDiff"):
        EncDiff.from_pretrained(tmp_path / "fields")
    with pytest.raises(InputError, match="nowhere: no such folder") as error:
        FieldModel.from_pretrained("nowhere")
    assert "quickstart" not in str(error.value)
    with pytest.raises(InputError, match=r"nowhere: no such folder; must be one, a model .*\(quickstart, room32, room"):
        EncDiff.from_pretrained("nowhere")


def test_the_packaged_model_beats_kriging_and_the_nearest_sensor():
    """Flows of another seed than its training's, 41 exact sensors."""
    model = FieldModel.from_pretrained("darcy64")
    truth = samples(Darcy(64), 77, 0, 2)
    sensors = scattered(truth, model.config.grid, 0.01, seed=5)
    error = nrmse(model.reconstruct(sensors, 6).mean, truth).mean(0)
    for name in ("nearest", "kriging"):
        plain = np.stack([BASELINES[name](one, model.config.grid).mean(0) for one in sensors])
        assert (error < nrmse(plain, truth).mean(0)).all(), name
