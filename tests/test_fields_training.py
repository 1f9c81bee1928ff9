"""Training of field models: sensors that belong to a sample, exact resume, what a run holds."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from _fields import CONFIG, TIMED, Fields, field_model, some_sensors
from test_fields_condition import distances
from test_train import rows, stop_after

from encdiff.errors import InputError, Stopped
from encdiff.fields import FieldModel, FieldTrainConfig, FieldTraining, Grid, field_recipe, fitted_config, train_fields
from encdiff.fields.condition import make_condition
from encdiff.fields.sensors import Sensors
from encdiff.fields.training import Drawn, draw_sensors
from encdiff.files.checkpoint import load_tensors

SHORT = FieldTrainConfig(
    steps=6, batch_size=4, learning_rate=4e-3, warmup=2, log_every=2, checkpoint_every=4, observed=(0.02, 0.1)
)  # fmt: skip
TIMES = np.array([0.0, 0.5, 1.5, 3.0, 3.5])


@pytest.fixture(scope="module")
def data():
    return Fields(20)


@pytest.fixture
def undrawn(monkeypatch):
    """Trainings draw no pictures, which would take most of their time."""
    monkeypatch.setattr(FieldTraining, "picture", lambda *_: None)


def drawn(samples, config=CONFIG, recipe=SHORT, times=None) -> Drawn:
    one = [draw_sensors(config, recipe, times, (recipe.seed, i)) for i in samples]
    return Drawn(*map(np.stack, zip(*one, strict=True)))


def test_the_loss_falls_and_the_folder_is_complete(data, tmp_path):
    run, model, fields = tmp_path / "run", field_model(), torch.from_numpy(data.read(range(16)))
    told = make_condition([some_sensors(i) for i in range(16)], CONFIG)
    before = model.loss(model.standardised(fields), told, seed=9, sample_ids=torch.arange(16)).item()
    averaged = train_fields(model, data, run, replace(SHORT, steps=30, log_every=10))
    assert model.loss(model.standardised(fields), told, seed=9, sample_ids=torch.arange(16)).item() < 0.9 * before
    assert [row["step"] for row in rows(run)] == ["10", "20", "30"]
    assert [p.name for p in (run / "samples").iterdir()] == ["reconstruction-0000030.png"]
    held = {p.name for p in run.iterdir()}
    assert held == {"checkpoint.safetensors", "config.json", "log.csv", "model", "samples"}
    begun = json.loads((run / "config.json").read_text())
    assert begun["fingerprint"]["images"] == 16 and begun["fingerprint"]["channels"] == ["a", "b"]  # of 20, 4 held out
    assert begun["training"]["observed"] == [0.02, 0.1] and begun["model"]["channels"] == ["a", "b"]
    again = FieldModel.from_pretrained(run / "model")
    assert all(torch.equal(p, again.state_dict()[name]) for name, p in averaged.state_dict().items())
    assert not torch.equal(model.network.unet.out[2].weight, averaged.network.unet.out[2].weight)


@pytest.mark.parametrize(
    "kind, change, stop",
    [
        ("tokens", {}, 3),
        ("tokens", {}, 4),
        ("tokens", {"precision": "bf16"}, 3),
        ("timed", {}, 3),
        ("regression", {}, 3),
    ],
)
def test_a_resumed_run_equals_an_unbroken_one_to_the_bit(tmp_path, kind, change, stop, data, undrawn):
    config, recipe = CONFIG, replace(SHORT, **change)
    if kind == "timed":
        config, data = TIMED, Fields(10, TIMED.grid, TIMES)
    if kind == "regression":
        config = replace(CONFIG, objective="regression", condition="input")
    train_fields(field_model(config), data, tmp_path / "whole", recipe)
    with pytest.raises(Stopped, match=f"stopped after step {stop}; saved"):
        train_fields(field_model(config), data, tmp_path / "broken", recipe, on_step=stop_after(stop))
    torch.manual_seed(99)  # nothing may hang on the global generator, nor on what the model was
    train_fields(FieldModel(config), data, tmp_path / "broken", recipe, resume=True)
    whole, broken = (load_tensors(tmp_path / name / "checkpoint.safetensors")[0] for name in ("whole", "broken"))
    assert whole.keys() == broken.keys() and any(name.startswith("optimizer.") for name in whole)
    for name, tensor in whole.items():
        assert torch.equal(tensor, broken[name]), name
    strip = [[(r["step"], r["loss"], r["gradient_norm"]) for r in rows(tmp_path / n)] for n in ("whole", "broken")]
    assert strip[0] == strip[1]


def test_masters_compute_in_bfloat16():
    recipe, losses = replace(SHORT, precision="bf16"), {}
    fields = torch.from_numpy(Fields(4).read(range(4)))
    for masters, precision in ((True, "bf16"), (False, "float32")):
        training = FieldTraining(field_model(), replace(recipe, precision=precision), masters=masters)
        losses[masters] = [float(training.advance(fields, torch.arange(4))["loss"]) for _ in range(4)]
        if masters:
            assert next(training.computing.network.unet.parameters()).dtype == torch.bfloat16
    assert losses[True] == pytest.approx(losses[False], rel=2**-5) and losses[True] != losses[False]


def test_sensors_belong_to_the_sample_whatever_the_batch(data):
    """And so does the noise of what they measure."""
    recipe, seen = replace(SHORT, exact=0.0), {}

    def conditions(size):
        training, found = FieldTraining(field_model(), replace(recipe, batch_size=size)), []
        loss = training.model.loss

        def recorded(target, condition, **how):
            found.extend(torch.stack(condition[:3], 1))
            return loss(target, condition, **how)

        training.model.loss = recorded
        fields = torch.from_numpy(data.read(range(8)))
        for part in fields.split(size):
            training.advance(part, torch.arange(size))
        return torch.stack(found)

    seen = {size: conditions(size) for size in (2, 4, 8)}
    assert torch.equal(seen[2], seen[8]) and torch.equal(seen[4], seen[8])
    assert len({tuple(mask.flatten().tolist()) for mask in seen[8][:, 1]}) == 8
    assert len({float(sigma.max()) for sigma in seen[8][:, 2]}) == 8


def test_sensors_are_a_function_of_seed_and_sample():
    first, again, other = drawn([3, 4]), drawn([4, 3]), drawn([3, 4], recipe=replace(SHORT, seed=1))
    assert all(np.array_equal(a, b[::-1]) for a, b in zip(first, again, strict=True))
    assert not np.array_equal(first.nearest, other.nearest)


def test_how_many_sensors():
    """Log-uniform between the shares; half without noise, a fifth with one channel."""
    recipe = replace(SHORT, observed=(0.02, 0.2), noise=0.3)
    found = drawn(range(400), recipe=recipe)
    counts = np.array([len(set(row)) for row in found.nearest])
    low, high = round(0.02 * 256), round(0.2 * 256)
    assert counts.min() == low and counts.max() == high
    assert abs((counts < (low * high) ** 0.5).mean() - 0.5) < 5 * 0.5 / 400**0.5  # five standard errors
    assert abs((found.noise == 0).mean() - 0.5) < 5 * 0.5 / 400**0.5 and 0.25 < found.noise.max() <= np.float32(0.3)
    partial = found.measured.sum(1) == 1
    assert abs(partial.mean() - 0.2) < 5 * 0.4 / 400**0.5 and (found.measured.sum(1) >= 1).all()
    assert 0 < found.measured[partial, 0].mean() < 1


@pytest.mark.parametrize("timed", [False, True])
def test_what_is_measured_is_what_sensors_of_the_user_tell(timed):
    """Training and reconstruction describe the same sensors in the same way."""
    config = TIMED if timed else CONFIG
    data = Fields(12, config.grid, TIMES if timed else None)
    recipe, times = replace(SHORT, exact=1.0, partial=0.0), TIMES if timed else None
    training, one = FieldTraining(field_model(config), recipe, times), drawn(range(12), config, recipe, times)
    fields = training.model.standardised(torch.from_numpy(data.read(range(12))))
    fields = fields if timed else fields[:, None]
    told = training.measure(fields, Drawn(*map(torch.from_numpy, one)), 0, torch.arange(12), torch.tensor(0))
    by_hand = []
    sure = np.zeros((12, 256), dtype=bool)  # where one sensor is nearer than all others; they lie at centres
    for i, field in enumerate(data.read(range(12))):
        pixels = np.unique(one.nearest[i])
        age = np.array([one.age[i][one.nearest[i] == p][0] for p in pixels])
        frames = field.reshape(len(TIMES) if timed else 1, len(config.channels), -1)
        values = frames[one.frame[i] - age, :, pixels] if timed else frames[0][:, pixels].T
        when = TIMES[one.frame[i] - age] if timed else None
        by_hand.append(Sensors.of(config.grid.centres[pixels], values, times=when))
        ages = TIMES[one.frame[i]] - when if timed else np.zeros(len(pixels))
        apart = np.sort(distances(config.grid, config.grid.centres[pixels], ages, config.speed), axis=1)
        sure[i] = apart[:, 1] - apart[:, 0] > 1e-9
    when = [float(TIMES[frame]) for frame in one.frame] if timed else None
    expected = make_condition(by_hand, config, when)
    assert sure.mean() > 0.7
    sure = torch.from_numpy(sure).view(12, 1, 16, 16).expand_as(told.values)
    torch.testing.assert_close(told.values[sure], expected.values[sure], rtol=1e-5, atol=1e-5)
    assert torch.equal(told.mask, expected.mask) and not told.sigma.any() and not expected.sigma.any()
    if timed:
        torch.testing.assert_close(told.age[sure], expected.age[sure])
        assert 0 < told.age.max() <= 1 and len(set(one.frame.tolist())) > 1


def test_the_configuration_that_fits_the_data():
    data, timed = Fields(6), Fields(6, TIMED.grid, TIMES)
    config = fitted_config(CONFIG, data, objective="regression", condition="input")
    fields = data.read(range(5)).astype(np.float64)  # what is held out, a fifth, counts for nothing
    assert config.grid == data.grid and config.objective == "regression" and config.memory == 0
    np.testing.assert_allclose(config.mean, fields.mean((0, 2, 3)))
    np.testing.assert_allclose(config.std, fields.std((0, 2, 3)))
    assert (fitted_config(CONFIG, timed).memory, fitted_config(CONFIG, timed).speed) == (1.75, 1 / 1.75)
    assert fitted_config(TIMED, timed).memory == 2 and fitted_config(TIMED, timed).speed == 0.5
    with pytest.raises(InputError, match="fields: its samples have one frame, must have several, or no axis of time"):
        fitted_config(TIMED, Fields(6, TIMED.grid, TIMES[:1]))
    data.fields[:, 1] = 2
    with pytest.raises(InputError, match="fields: b is 2 everywhere, must vary"):
        fitted_config(CONFIG, data)


def test_refusals(data, tmp_path):
    other = Fields(20, Grid(("a", "b"), 16, 16, (0.0, 2.0, 0.0, 1.0)))
    with pytest.raises(
        InputError, match=r"fields: is of another grid than the model: domain is \(0.0, 2.0, 0.0, 1.0\), not"
    ):
        train_fields(field_model(), other, tmp_path / "run", SHORT)
    with pytest.raises(InputError, match="config is a FieldConfig, must be a FieldTrainConfig: field_recipe makes one"):
        train_fields(field_model(), data, tmp_path / "run", CONFIG)
    with pytest.raises(InputError, match="part 0:0 of fields"):
        train_fields(field_model(), data, tmp_path / "run", replace(SHORT, held_out=1.0))
    for change in ({"observed": (0.0, 0.1)}, {"observed": (0.1, float("nan"))}, {"noise": -1.0}, {"exact": 2.0}):
        with pytest.raises(InputError, match=f"{next(iter(change))} is"):
            replace(SHORT, **change)
    with pytest.raises(InputError, match=r"observed is \(0.5, 0.1\), must be the lower share, then the higher"):
        replace(SHORT, observed=(0.5, 0.1))
    with pytest.raises(InputError, match="preset 'large' is unknown, must be one of small, paper"):
        field_recipe("large")
    assert not (tmp_path / "run").exists()


def test_other_fields_do_not_continue_a_run(data, tmp_path, undrawn):
    with pytest.raises(Stopped):
        train_fields(field_model(), data, tmp_path, SHORT, on_step=stop_after(4))
    with pytest.raises(InputError, match="was begun with sha256"):
        train_fields(field_model(), Part20(), tmp_path, SHORT, resume=True)
    with pytest.raises(InputError, match=r"was begun with observed \[0.02, 0.1\], cannot be resumed with"):
        train_fields(field_model(), data, tmp_path, replace(SHORT, observed=(0.02, 0.2)), resume=True)


class Part20(Fields):
    """As many fields, but others."""

    def __init__(self):
        super().__init__(20)
        self.fields = self.fields + 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="a CUDA graph needs a GPU")
@pytest.mark.parametrize("config", [CONFIG, TIMED])
def test_a_captured_step_is_the_eager_one(config):
    data, losses = Fields(8, config.grid, TIMES if config.timed else None), {}
    fields = torch.from_numpy(data.read(range(4))).cuda()
    for engine in ("eager", "graph"):
        recipe = replace(SHORT, engine=engine)
        training = FieldTraining(field_model(config).cuda(), recipe, data.times)
        losses[engine] = [float(training.advance(fields, torch.arange(4))["loss"]) for _ in range(6)]
    assert losses["graph"] == pytest.approx(losses["eager"], rel=1e-4)
