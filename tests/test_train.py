import csv
import math
import signal
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from _tiny import TINY

from encdiff import EncDiff, InputError, ops
from encdiff.data import open_dataset, to_float
from encdiff.errors import Stopped
from encdiff.files.checkpoint import load_tensors, save_tensors
from encdiff.training import RECIPES, TrainConfig, Training, train

pytestmark = pytest.mark.usefixtures("quick_pictures")
CONFIG = TrainConfig(
    steps=6, batch_size=8, learning_rate=4e-3, warmup=2, log_every=2, checkpoint_every=4, picture_every=100
)  # fmt: skip


@pytest.fixture(scope="module")
def dataset():
    return open_dataset("procedural:2,2,2,2,2,2", TINY.image_size)


def fresh() -> EncDiff:
    torch.manual_seed(0)
    return EncDiff(TINY)


def random_batch():
    return torch.randint(256, (8, 16, 16, 3), dtype=torch.uint8), torch.arange(8)


def rows(run):
    with (run / "log.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def stop_after(step):
    """What Ctrl-C does, from inside: interrupt the loop after that step."""

    def on_step(training):
        if training.step == step:
            raise_signal()

    return on_step


def raise_signal():
    signal.raise_signal(signal.SIGINT)


def test_the_loss_falls_and_the_folder_is_complete(dataset, tmp_path):
    run, model, images = tmp_path / "run", fresh(), to_float(dataset.images(range(64)))
    before = model.loss(images, seed=0).item()
    train(model, dataset, run, replace(CONFIG, steps=60, log_every=12, picture_every=30))
    assert model.loss(images, seed=0).item() < 0.95 * before
    assert [row["step"] for row in rows(run)] == ["12", "24", "36", "48", "60"]
    assert sorted(p.name for p in run.iterdir()) == [
        "checkpoint.safetensors",
        "config.json",
        "log.csv",
        "model",
        "samples",
    ]
    assert sorted(p.name for p in (run / "samples").iterdir()) == ["swap-0000030.png", "swap-0000060.png"]
    assert EncDiff.from_pretrained(run / "model").config == TINY


@pytest.mark.parametrize("stop", [3, 4])
@pytest.mark.parametrize("change", [{}, {"precision": "bf16"}])
def test_a_resumed_run_equals_an_unbroken_one_to_the_bit(dataset, tmp_path, stop, change):
    config = replace(CONFIG, **change)
    train(fresh(), dataset, tmp_path / "whole", config)
    with pytest.raises(Stopped, match=f"stopped after step {stop}; saved .*checkpoint.safetensors"):
        train(fresh(), dataset, tmp_path / "broken", config, on_step=stop_after(stop))
    torch.manual_seed(99)  # nothing may hang on the global generator
    train(EncDiff(TINY), dataset, tmp_path / "broken", config, resume=True)
    (whole, _), (broken, meta) = (
        load_tensors(tmp_path / name / "checkpoint.safetensors") for name in ("whole", "broken")
    )
    assert meta["step"] == "6" and whole.keys() == broken.keys()
    assert any(k.startswith("optimizer.") for k in whole) and any(k.startswith("ema.") for k in whole)
    for name, tensor in whole.items():
        assert torch.equal(tensor, broken[name]), name
    strip = [
        [(r["step"], r["loss"], r["gradient_norm"]) for r in rows(tmp_path / name)] for name in ("whole", "broken")
    ]
    assert strip[0] == strip[1]


def noised(monkeypatch, dataset, run, config, model=None, **options):
    """Train, and return what the U-Net was to denoise: t and x_t of every sample, in order."""
    seen, q_sample = [], ops.q_sample

    def recorded(x0, noise, t, *args, **key):
        out = q_sample(x0, noise, t, *args, **key)
        seen.extend(zip(t.tolist(), out[0], strict=True))
        return out

    with monkeypatch.context() as patch:
        patch.setattr("encdiff.models.core.ops.q_sample", recorded)
        train(model or fresh(), dataset, run, config, **options)
    return seen


def test_noise_and_timesteps_belong_to_the_sample_whatever_the_batch(dataset, tmp_path, monkeypatch):
    def run(name, **change):
        return noised(monkeypatch, dataset, tmp_path / name, replace(CONFIG, **change))

    whole, other = run("eight", steps=6), run("sixteen", steps=3, batch_size=16)
    assert len(whole) == len(other) == 48
    assert all(t == u and torch.equal(x, y) for (t, x), (u, y) in zip(whole, other, strict=True))
    assert len({t for t, _ in whole}) > 24 and not torch.equal(whole[0][1], run("seed", steps=1, seed=1)[0][1])


SHARE = """
import sys, torch
from encdiff import ops
rank, out = int(sys.argv[1]), sys.argv[2]
ids = 6 * rank + torch.arange(6) + 10
t = ops.timesteps(100, 7, ids, 3, kind="power")
x_t, target = ops.q_sample(torch.ones(6, 2, 3), None, t, torch.linspace(0.9, 0.1, 100), seed=7, sample_ids=ids, draw=3)
torch.save({"t": t, "x_t": x_t, "target": target}, out)
"""


def test_two_processes_draw_what_one_would(tmp_path, monkeypatch):
    files = [tmp_path / f"{rank}.pt" for rank in (0, 1)]
    process = subprocess.Popen([sys.executable, "-c", SHARE, "1", str(files[1])])
    monkeypatch.setattr(sys, "argv", ["-c", "0", str(files[0])])
    exec(SHARE, {})  # this process is the other one
    assert process.wait(120) == 0
    shares = [torch.load(f, weights_only=True) for f in files]
    ids = torch.arange(12) + 10
    t = ops.timesteps(100, 7, ids, 3, kind="power")
    alphas_cumprod = torch.linspace(0.9, 0.1, 100)
    x_t, target = ops.q_sample(torch.ones(12, 2, 3), None, t, alphas_cumprod, seed=7, sample_ids=ids, draw=3)
    for name, tensor in {"t": t, "x_t": x_t, "target": target}.items():
        assert torch.equal(torch.cat([share[name] for share in shares]), tensor), name


def test_another_seed_gives_other_weights(dataset, tmp_path):
    one = train(fresh(), dataset, tmp_path / "a", replace(CONFIG, steps=1))
    other = train(fresh(), dataset, tmp_path / "b", replace(CONFIG, steps=1, seed=1))
    assert not torch.equal(one.unet.out[2].bias, other.unet.out[2].bias)


def test_ema_follows_its_formula(dataset):
    training = Training(fresh(), CONFIG)
    average = training.ema.out[2].bias.clone()
    for n in (1, 2, 3):
        training.advance(*random_batch())
        decay = min(0.9999, (1 + n) / (10 + n))
        average = decay * average + (1 - decay) * training.model.unet.out[2].bias.detach()
    torch.testing.assert_close(training.ema.out[2].bias, average)
    averaged = training.averaged_model()
    assert torch.equal(averaged.unet.out[2].bias, training.ema.out[2].bias)
    assert torch.equal(averaged.encoder[0].weight, training.model.encoder[0].weight)


def test_gradients_are_not_written_where_nothing_is_clipped(monkeypatch):
    training, written = Training(fresh(), CONFIG), []
    monkeypatch.setattr(torch, "_foreach_mul_", lambda tensors, *_: written.append(tensors))
    training.advance(*random_batch())
    assert not written


def test_learning_rate_warms_up_and_decays():
    training = Training(fresh(), replace(CONFIG, steps=12, warmup=4, decay=0.5))
    rates = []
    for training.step in range(12):
        rates.append(training.rate() / 4e-3)
    expected = [0.25, 0.5, 0.75] + [1.0] * 4 + [i / 6 for i in (5, 4, 3, 2, 1)]
    assert rates == pytest.approx(expected)
    training.step = 1
    terms = training.advance(*random_batch())
    assert training.optimizer.param_groups[0]["lr"] == terms["learning_rate"] == pytest.approx(2e-3)


def test_gradients_are_clipped():
    def change(clip):
        training = Training(fresh(), replace(CONFIG, gradient_clip=clip, warmup=1))
        norm = training.advance(*random_batch())["gradient_norm"]
        grads = math.sqrt(sum(p.grad.square().sum().item() for p in training.parameters if p.grad is not None))
        return norm.item(), grads

    norm, after = change(1e-3)
    assert norm > 1e-3 and after == pytest.approx(1e-3, rel=1e-3)
    norm, after = change(0.0)
    assert after == pytest.approx(norm, rel=1e-3)


def test_batch_of_one(dataset, tmp_path):
    train(fresh(), dataset, tmp_path / "run", replace(CONFIG, steps=2, batch_size=1, picture_every=1))
    tensors, _ = load_tensors(tmp_path / "run" / "checkpoint.safetensors")
    assert all(t.isfinite().all() for t in tensors.values())
    with pytest.raises(InputError, match="batch_size is 1, must be at least 2 for a model with normalize_scalars"):
        model = EncDiff(replace(TINY, normalize_scalars=True))
        train(model, dataset, tmp_path / "other", replace(CONFIG, batch_size=1))


def test_one_image(tmp_path):
    data = open_dataset("procedural:1,1,1,1,1,1", TINY.image_size)
    train(fresh(), data, tmp_path / "run", replace(CONFIG, steps=1, picture_every=1))
    assert (tmp_path / "run" / "model" / "model.safetensors").is_file()


def test_weights_that_are_not_finite_never_replace_a_checkpoint(dataset, tmp_path):
    def poison_then_stop(training):
        if training.step == 5:
            training.model.bank.biases[0].data.fill_(torch.nan)
            raise_signal()

    with pytest.raises(InputError, match="diverged by step 5"):
        train(fresh(), dataset, tmp_path / "run", CONFIG, on_step=poison_then_stop)
    tensors, metadata = load_tensors(tmp_path / "run" / "checkpoint.safetensors")
    assert metadata["step"] == "4" and all(t.isfinite().all() for t in tensors.values())


def test_an_interrupted_run_can_be_looked_at(dataset, tmp_path):
    with pytest.raises(Stopped):
        train(fresh(), dataset, tmp_path / "run", CONFIG, on_step=stop_after(3))
    assert EncDiff.from_pretrained(tmp_path / "run" / "model").config == TINY


def change_checkpoint(path, change):
    tensors, metadata = load_tensors(path)
    save_tensors(path, change(tensors), metadata)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t: t | {"optimizer.0.exp_avg": torch.zeros(2)}, r"optimizer.0.exp_avg \(2,\) fits no parameter"),
        (lambda t: t | {"optimizer.9999.step": torch.zeros(())}, "optimizer.9999.step .* fits no parameter"),
        (lambda t: {k: v for k, v in t.items() if "optimizer" not in k}, "state of the optimiser .* is missing"),
        (lambda t: {k: v for k, v in t.items() if k != "optimizer.0.exp_avg"}, "is missing or incomplete"),
        (lambda t: {k: v for k, v in t.items() if k != "ema.out.2.bias"}, "1 missing: out.2.bias"),
    ],
)
def test_a_checkpoint_of_another_configuration_is_refused(dataset, tmp_path, change, message):
    with pytest.raises(Stopped):
        train(fresh(), dataset, tmp_path / "run", CONFIG, on_step=stop_after(1))
    change_checkpoint(tmp_path / "run" / "checkpoint.safetensors", change)
    with pytest.raises(InputError, match=f"checkpoint.safetensors: .*{message}"):
        train(fresh(), dataset, tmp_path / "run", CONFIG, resume=True)


def test_a_run_is_resumed_on_its_own_data_only(dataset, tmp_path):
    with pytest.raises(Stopped):
        train(fresh(), dataset, tmp_path / "run", CONFIG, on_step=stop_after(1))
    other = open_dataset("procedural:3,3,1,1,1,1", TINY.image_size)
    with pytest.raises(InputError, match="was begun with images 64, cannot be resumed with 9"):
        train(fresh(), other, tmp_path / "run", CONFIG, resume=True)


def test_steps_are_fixed_where_they_shape_the_learning_rate(dataset, tmp_path):
    config = replace(CONFIG, decay=0.5)
    with pytest.raises(Stopped):
        train(fresh(), dataset, tmp_path / "run", config, on_step=stop_after(1))
    with pytest.raises(InputError, match="was begun with steps 6, cannot be resumed with 9"):
        train(fresh(), dataset, tmp_path / "run", replace(config, steps=9), resume=True)


def test_a_torn_log_is_mended(dataset, tmp_path):
    with pytest.raises(Stopped):
        train(fresh(), dataset, tmp_path / "run", CONFIG, on_step=stop_after(4))
    with (tmp_path / "run" / "log.csv").open("a") as file:
        file.write("5,0.3")
    train(fresh(), dataset, tmp_path / "run", CONFIG, resume=True)
    assert [row["step"] for row in rows(tmp_path / "run")] == ["2", "4", "6"]


def test_a_refusal_keeps_the_run_that_was_to_be_overwritten(dataset, tmp_path, monkeypatch):
    train(fresh(), dataset, tmp_path / "run", replace(CONFIG, steps=1))
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)  # as if it were not installed
    with pytest.raises(InputError, match="tensorboard .--tensorboard. is not installed"):
        train(fresh(), dataset, tmp_path / "run", CONFIG, overwrite=True, tensorboard=True)
    assert load_tensors(tmp_path / "run" / "checkpoint.safetensors")[1]["step"] == "1"


def test_a_latent_scale_is_fitted_for_a_learnt_first_stage_and_kept(tmp_path):
    config = replace(TINY, first_stage="vq", vq_width=32, vq_multipliers=(1, 1), vq_codes=8, image_size=8, groups=8)
    data = open_dataset("procedural:2,1,1,1,1,1", 8)
    torch.manual_seed(0)
    model = EncDiff(config)
    with pytest.raises(Stopped):
        train(model, data, tmp_path / "run", replace(CONFIG, batch_size=2), on_step=stop_after(1))
    scale = model.config.scaling_factor
    with torch.no_grad():
        assert model.to_latents(to_float(data.images([0, 1]))).std().item() == pytest.approx(1, rel=1e-4)
    resumed = train(EncDiff(config), data, tmp_path / "run", replace(CONFIG, batch_size=2), resume=True)
    assert resumed.config.scaling_factor == scale != 1
    assert EncDiff.from_pretrained(tmp_path / "run" / "model").config.scaling_factor == scale


def test_a_loss_that_is_not_finite_ends_the_run_and_keeps_the_checkpoint(dataset, tmp_path):
    def poison(training):
        if training.step == 5:
            training.model.bank.biases[0].data.fill_(torch.nan)

    with pytest.raises(InputError, match="training diverged by step 6: lower the learning rate.*the loss is nan"):
        train(fresh(), dataset, tmp_path / "run", CONFIG, on_step=poison)
    tensors, metadata = load_tensors(tmp_path / "run" / "checkpoint.safetensors")
    assert metadata["step"] == "4" and all(t.isfinite().all() for t in tensors.values())


def test_existing_folders(dataset, tmp_path):
    run = tmp_path / "run"
    train(fresh(), dataset, run, replace(CONFIG, steps=1))
    with pytest.raises(InputError, match="holds something already; continue it with resume=True"):
        train(fresh(), dataset, run, CONFIG)
    assert load_tensors(run / "checkpoint.safetensors")[1]["step"] == "1"
    with pytest.raises(InputError, match="was begun with learning_rate 0.004, cannot be resumed with 0.1"):
        train(fresh(), dataset, run, replace(CONFIG, learning_rate=0.1), resume=True)
    train(fresh(), dataset, run, replace(CONFIG, steps=2), resume=True)  # made longer
    assert load_tensors(run / "checkpoint.safetensors")[1]["step"] == "2"
    train(fresh(), dataset, run, replace(CONFIG, steps=1), overwrite=True)
    assert load_tensors(run / "checkpoint.safetensors")[1]["step"] == "1"
    (run / "thesis.tex").write_text("precious")
    with pytest.raises(InputError, match="will not overwrite a folder that also holds thesis.tex"):
        train(fresh(), dataset, run, CONFIG, overwrite=True)
    with pytest.raises(InputError, match="no checkpoint to resume"):
        train(fresh(), dataset, tmp_path / "none", CONFIG, resume=True)
    assert not (tmp_path / "none").exists()
    with pytest.raises(InputError, match="images of 16, the model takes 32"):
        train(EncDiff.from_preset("quickstart"), dataset, tmp_path / "other", CONFIG)
    assert not (tmp_path / "other").exists()


def test_a_full_disk_keeps_the_older_checkpoint(dataset, tmp_path, monkeypatch):
    train(fresh(), dataset, tmp_path / "run", replace(CONFIG, steps=2))
    before = (tmp_path / "run" / "checkpoint.safetensors").read_bytes()

    def full(tensors, path, metadata=None):
        path.write_bytes(b"half of it")
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr("encdiff.files.checkpoint.save_file", full)
    with pytest.raises(OSError, match="No space left"):
        train(fresh(), dataset, tmp_path / "run", CONFIG, resume=True)
    assert (tmp_path / "run" / "checkpoint.safetensors").read_bytes() == before
    assert not [p for p in (tmp_path / "run").iterdir() if p.name.startswith(".")]


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(steps=0), "steps is 0, must be an integer at least 1"),
        (dict(batch_size=0), "batch_size is 0, must be an integer at least 1"),
        (dict(learning_rate=0.0), "learning_rate is 0.0, must be a number above 0"),
        (dict(decay=1.5), "decay is 1.5, must be a number in 0..1"),
        (dict(precision="fp8"), "precision is 'fp8', must be"),
        (dict(seed=-1), "seed is -1, must be"),
        (dict(timesteps="often"), "timesteps is 'often', must be one of 'uniform', 'logit-normal', 'power'"),
        (dict(gradient_clip=-1.0), "gradient_clip is -1.0, must be a number at least 0"),
        (dict(betas=(0.9, 1.0)), "betas is"),
        (dict(warmup=-5), "warmup is -5"),
        (dict(ema=2.0), "ema is 2.0"),
        (dict(steps=True), "steps is True, must be an integer"),
    ],
)
def test_bad_configurations(change, message):
    with pytest.raises(InputError, match=message):
        Training(fresh(), replace(CONFIG, **change)).advance(*random_batch())


def test_recipes_are_named_like_the_models():
    from encdiff import PRESETS

    assert RECIPES.keys() == PRESETS.keys()
    with pytest.raises(InputError, match="preset 'best' is unknown"):
        TrainConfig.from_preset("best")


def test_the_learning_rate_follows_the_batch_size_unless_given():
    paper = RECIPES["shapes3d"]
    assert TrainConfig.from_preset("shapes3d", batch_size=4).learning_rate == pytest.approx(2e-6 * 4)
    assert TrainConfig.from_preset("shapes3d", batch_size=4, learning_rate=1.0).learning_rate == 1.0
    assert TrainConfig.from_preset("shapes3d") == paper
