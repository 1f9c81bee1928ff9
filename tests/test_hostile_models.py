"""Damaged and hostile models, checkpoints and logs: refused in one line, before anything large is built."""

import json
import time
from dataclasses import asdict, replace

import pytest
import torch
from _tiny import TINY

from encdiff import EncDiff, InputError
from encdiff.cli.support import rebuilt
from encdiff.experiments.phases import seconds_per_step, steps_done
from encdiff.files.checkpoint import load_state, load_tensors, save_tensors, step_of, tensor_shapes
from encdiff.models.autoencoder import VQAutoencoder
from encdiff.training import TrainConfig, Training
from encdiff.training.runs import CsvLog, last_row, optimizer_state

COLUMNS = ("step", "loss", "seconds")


@pytest.fixture
def folder(tmp_path):
    torch.manual_seed(0)
    EncDiff(TINY).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def changed(path, change):
    """The tensors of a file replaced by what `change` makes of them in place."""
    tensors, metadata = load_tensors(path)
    change(tensors)
    save_tensors(path, tensors, metadata)


def set_first(dtype):
    def change(tensors):
        name = next(name for name, t in tensors.items() if t.is_floating_point() and t.ndim > 1)
        tensors[name] = torch.zeros(tensors[name].shape, dtype=dtype)

    return change


def set_value(part, value):
    def change(tensors):
        next(t for name, t in tensors.items() if part in name).view(-1)[0] = value

    return change


@pytest.mark.parametrize("dtype", [torch.int64, torch.int8, torch.uint8, torch.bool, torch.complex64])
def test_tensors_of_another_kind(folder, dtype):
    changed(folder / "model.safetensors", set_first(dtype))
    with pytest.raises(InputError, match=r"model\.safetensors: .* is torch\.\w+, must be torch\.float32"):
        EncDiff.from_pretrained(folder)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_floats_of_another_precision_are_read(folder, dtype):
    changed(folder / "model.safetensors", set_first(dtype))
    assert next(EncDiff.from_pretrained(folder).parameters()).dtype == torch.float32


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("part", ["weight", "bias", "running_mean"])
def test_weights_that_are_not_finite(folder, value, part):
    changed(folder / "model.safetensors", set_value(part, value))
    with pytest.raises(InputError, match=r"model\.safetensors: .* holds NaN, infinite or impossible"):
        EncDiff.from_pretrained(folder)


def test_negative_variances_and_too_large_doubles(folder):
    model = EncDiff(TINY)
    for state in (
        {k: -torch.ones_like(v) if "running_var" in k else v for k, v in model.state_dict().items()},
        {k: v.double() * 0 + 1e300 if v.is_floating_point() else v for k, v in model.state_dict().items()},
        {k: v.int() if "num_batches" in k else v for k, v in model.state_dict().items()},
    ):
        with pytest.raises(InputError, match="x: .*(impossible|must be torch.int64)"):
            load_state(model, state, "x")


@pytest.mark.parametrize(
    "change",
    [
        dict(width=2**14, multipliers=[256, 256]),
        dict(concepts=512, bank_widths=[2**14] * 15),
        dict(transformer_depth=15, depth=7),
        dict(first_stage="vq", vq_codes=2**24, image_size=64),
        dict(feedforward=256),
        dict(token_width=2**14),
        dict(num_timesteps=10**6, concepts=4),
    ],
)
def test_a_model_that_does_not_fit_its_weights_is_never_built(folder, change, monkeypatch):
    """On meta alone: within seconds and without memory."""
    (folder / "config.json").write_text(json.dumps(asdict(TINY) | change))
    monkeypatch.setattr("encdiff.files.checkpoint.load_tensors", lambda *_: pytest.fail("the weights were read"))
    began = time.monotonic()
    with pytest.raises(InputError, match=r"model\.safetensors: does not fit this configuration"):
        EncDiff.from_pretrained(folder)
    assert time.monotonic() - began < 30


def test_impossible_layers_name_the_configuration(folder):
    for change in (dict(heads=5), dict(groups=7), dict(image_size=48), dict(schedule="none"), dict(beta_end=3.0)):
        (folder / "config.json").write_text(json.dumps(asdict(TINY) | change))
        with pytest.raises(InputError, match=r"^\S*config\.json: "):
            EncDiff.from_pretrained(folder)


def test_first_stages_are_checked_alike(tmp_path):
    VQAutoencoder(32, (1,), 1, codebook_size=8).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for change, words in (
        ({"width": 2**31}, "width is 2147483648"),
        ({"width": "32"}, "width is '32'"),
        ({"multipliers": 3}, "multipliers is 3"),
        ({"wings": 1}, "unknown entries wings"),
        ({"width": 33}, "multiples of 32"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(InputError, match=rf"config\.json: .*{words}"):
            VQAutoencoder.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config | {"width": 2**13, "codebook_size": 2**24}))
    with pytest.raises(InputError, match="does not fit this configuration"):
        VQAutoencoder.from_pretrained(tmp_path)


# ---- the published layout


def published(tmp_path, change):
    EncDiff(TINY).save_published(tmp_path / "m.ckpt")
    content = torch.load(tmp_path / "m.ckpt", weights_only=True)
    change(content["state_dict"])
    torch.save(content, tmp_path / "m.ckpt")
    return tmp_path / "m.ckpt"


def as_kind(kind):
    def change(state):
        name = next(k for k, v in state.items() if k.startswith("model.") and v.ndim == 2)
        make = {
            "sparse": lambda t: t.to_sparse(),
            "quantized": lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8),
            "on meta": lambda t: t.to("meta"),
            "complex": lambda t: t.to(torch.complex64),
            "nested": lambda t: torch.nested.nested_tensor([t, t]),
            "nested, jagged": lambda t: torch.nested.nested_tensor([t, t], layout=torch.jagged),
        }[kind]
        state[name] = make(state[name])

    return change


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["sparse", "quantized", "on meta", "complex", "nested", "nested, jagged"])
def test_unusual_tensors(tmp_path, kind):
    with pytest.raises(InputError, match=r"m\.ckpt: (.* must be a plain tensor of numbers|not a whole checkpoint)"):
        EncDiff.load_published(published(tmp_path, as_kind(kind)), TINY, ema=False)


@pytest.mark.parametrize(
    "scale", [torch.ones(3), torch.tensor(float("nan")), torch.tensor(-1.0), torch.tensor(0), torch.tensor(1j)]
)
def test_scales_that_are_none(tmp_path, scale):
    with pytest.raises(InputError, match=r"m\.ckpt: scale_factor is .* must be a number above 0"):
        EncDiff.load_published(published(tmp_path, lambda s: s.update(scale_factor=scale)), TINY)


def test_a_tensor_that_repeats_one_number_for_ever(tmp_path):
    def change(state):
        name = next(k for k in state if k.startswith("model."))
        state[name] = torch.zeros(1).expand(10**12)

    with pytest.raises(InputError, match=r"of another shape: .*1000000000000"):
        EncDiff.load_published(published(tmp_path, change), TINY, ema=False)


# ---- checkpoints of runs


@pytest.fixture(scope="module")
def trained():
    torch.manual_seed(0)
    training = Training(EncDiff(TINY), TrainConfig(steps=2, batch_size=2))
    training.advance(torch.randint(256, (2, 16, 16, 3), dtype=torch.uint8), torch.arange(2))
    return training


@pytest.mark.parametrize("step", ["\u00b2", "\u0663", "-1", "1e3", "", " 1", "9" * 40])
def test_steps_are_ascii_digits(step, tmp_path, trained):
    with pytest.raises(InputError, match="x: names no step"):
        step_of({"step": step}, "x")
    save_tensors(tmp_path / "checkpoint.safetensors", {"x": torch.zeros(1)}, {"step": step})
    with pytest.raises(InputError, match=r"checkpoint\.safetensors: names no step"):
        steps_done(tmp_path)


@pytest.mark.parametrize("scale", ["x", "nan", "inf", "-1", "0", "", None, "1e300"])
def test_scaling_factors(scale, trained):
    metadata = {"step": "1"} | ({} if scale is None else {"scaling_factor": scale})
    with pytest.raises(InputError, match="^file: scaling_factor is .*, must be a number above 0"):
        trained.load(trained.tensors(), metadata, "file")


@pytest.mark.parametrize("index", ["\u00b2", "\u0663", "-1", "999999", "00", "+0", "9" * 30, ""])
def test_names_of_the_optimiser(index, trained):
    tensors = trained.tensors() | {f"optimizer.{index}.step": torch.tensor(1.0)}
    with pytest.raises(InputError, match="^file: optimizer.* fits no parameter"):
        optimizer_state(trained.parameters, tensors, "file")


@pytest.mark.parametrize(
    "key, value",
    [
        ("step", torch.tensor(float("nan"))),
        ("step", torch.tensor(-1.0)),
        ("step", torch.tensor(1.5)),
        ("step", torch.tensor(1)),
        ("exp_avg", float("inf")),
        ("exp_avg_sq", -1.0),
    ],
)
def test_moments_that_cannot_be(key, value, trained):
    tensors = trained.tensors()
    name = f"optimizer.0.{key}"
    tensors[name] = value if isinstance(value, torch.Tensor) else torch.full_like(tensors[name], value)
    with pytest.raises(InputError, match=f"^file: {name} holds no finite numbers"):
        optimizer_state(trained.parameters, tensors, "file")


def test_a_run_is_rebuilt_only_where_its_checkpoint_fits(trained, tmp_path):
    save_tensors(tmp_path / "checkpoint.safetensors", trained.tensors(), {"step": "1", "scaling_factor": "1.0"})
    assert rebuilt(tmp_path, TINY).config == TINY
    large = replace(TINY, width=2**14, multipliers=(256, 256))
    with pytest.raises(InputError, match=r"checkpoint\.safetensors: does not fit this configuration"):
        rebuilt(tmp_path, large)
    with pytest.raises(InputError, match="no such file"):
        rebuilt(tmp_path / "none", TINY)
    shapes, metadata = tensor_shapes(tmp_path / "checkpoint.safetensors")
    assert metadata["step"] == "1" and shapes == {k: tuple(v.shape) for k, v in trained.tensors().items()}


@pytest.mark.parametrize(
    "tail",
    [
        b"\xff\xfe\n",
        b"2,0.5\n",
        b"2,x,1\n",
        b"\xc2\xb2,1,1\n",
        b"2,1,nan\n",
        b"\0,\0\n",
        b"2.0,1,1\n",
        b'"' + b"x" * 200_000,
    ],
)
def test_logs_end_where_they_are_damaged(tmp_path, tail):
    path = tmp_path / "log.csv"
    path.write_bytes(b"step,loss,seconds\n1,0.5,3.0\n" + tail)
    if b"x,1" not in tail:  # the others read no loss
        assert last_row(path) == (1, 3.0) and seconds_per_step(tmp_path) == 3.0
    log = CsvLog(path, COLUMNS, step=9)
    assert log.seconds == 3.0 and path.read_text().split() == ["step,loss,seconds", "1,0.5,3.0"]


@pytest.mark.parametrize(
    "content", [b"", b"\xff\xfe", b"step,seconds\n", b"step,seconds\n0,1\n", b"a,b\n1,2\n", b"\0" * 99]
)
def test_logs_without_a_row(tmp_path, content):
    (tmp_path / "log.csv").write_bytes(content)
    with pytest.raises(InputError, match=r"log\.csv: holds no row of a training"):
        seconds_per_step(tmp_path)
    assert CsvLog(tmp_path / "log.csv", COLUMNS, step=3).seconds == 0
