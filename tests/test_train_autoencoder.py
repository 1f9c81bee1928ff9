"""Training of the first stage: it learns, resumes to the bit, stops on request, and refuses what it cannot use."""

import csv
import signal
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from encdiff.data import Dataset, to_float
from encdiff.errors import InputError, Stopped
from encdiff.files.checkpoint import load_tensors, save_tensors
from encdiff.models.autoencoder import VQAutoencoder
from encdiff.training import AutoencoderTrainConfig, train_autoencoder
from encdiff.training.autoencoder import AutoencoderTraining, PatchDiscriminator, adaptive_weight, hinge_loss

CONFIG = AutoencoderTrainConfig(
    steps=20, batch_size=8, learning_rate=2e-3, disc_layers=2, log_every=5, checkpoint_every=8, picture_every=10
)
PLAIN = replace(CONFIG, discriminator=False)


class Blocks(Dataset):
    """Random pictures of four flat 8x8 blocks."""

    name, image_size = "blocks", 16

    def __init__(self, count: int = 40):
        colours = np.random.RandomState(1).randint(0, 256, (count, 2, 2, 3)).astype(np.uint8)
        self.pictures = colours.repeat(8, 1).repeat(8, 2)

    def __len__(self) -> int:
        return len(self.pictures)

    def images(self, indices) -> np.ndarray:
        return self.pictures[self.check_indices(indices)]


def tiny(multipliers=(1,)) -> VQAutoencoder:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return VQAutoencoder(width=32, multipliers=multipliers, depth=1, codebook_size=64)


@torch.no_grad()
def distance(model: VQAutoencoder, data: Dataset) -> float:
    images = to_float(torch.from_numpy(data.images(np.arange(len(data)))))
    return (model(images)[0] - images).abs().mean().item()


def stop_after(monkeypatch, step: int, signum: int) -> None:
    advance = AutoencoderTraining.advance

    def advance_then_signal(self, images, indices):
        terms = advance(self, images, indices)
        if self.step == step:
            signal.raise_signal(signum)
        return terms

    monkeypatch.setattr(AutoencoderTraining, "advance", advance_then_signal)


# Against a discriminator from step 0 the distance falls more slowly.
@pytest.mark.parametrize("config,fraction", [(CONFIG, 0.9), (PLAIN, 0.8)], ids=["discriminator", "plain"])
def test_training_lowers_the_distance_and_fills_the_run_folder(tmp_path, config, fraction):
    data, model = Blocks(), tiny((1, 1))
    before = distance(model, data)
    trained = train_autoencoder(model, data, tmp_path / "run", config)
    assert trained is model and not model.training
    assert distance(model, data) < fraction * before
    assert distance(VQAutoencoder.from_pretrained(tmp_path / "run/model"), data) == distance(model, data)
    with (tmp_path / "run/log.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == ("step", *AutoencoderTraining.TERMS, "images_per_second", "seconds")
    assert [row["step"] for row in rows] == ["5", "10", "15", "20"]
    assert all((float(row["discriminator"]) > 0) == config.discriminator for row in rows)
    assert all(1 <= float(row["codes_used"]) <= 64 for row in rows)
    assert sorted(p.name for p in (tmp_path / "run/samples").iterdir()) == [
        "reconstruction-0000010.png",
        "reconstruction-0000020.png",
    ]
    with Image.open(tmp_path / "run/samples/reconstruction-0000020.png") as picture:
        assert picture.size == (8 * 16, 2 * 16)


@pytest.mark.parametrize(
    "config,signum", [(CONFIG, signal.SIGINT), (PLAIN, signal.SIGTERM)], ids=["discriminator ctrl-c", "plain sigterm"]
)
def test_stopped_and_resumed_equals_unbroken_to_the_bit(tmp_path, monkeypatch, config, signum):
    config = replace(config, steps=9, disc_start=3)
    train_autoencoder(tiny(), Blocks(), tmp_path / "whole", config)
    with monkeypatch.context() as patch:
        stop_after(patch, 5, signum)
        with pytest.raises(Stopped, match="after step 5.*--resume"):
            train_autoencoder(tiny(), Blocks(), tmp_path / "broken", config)
    other = VQAutoencoder(width=32, multipliers=(1,), depth=1, codebook_size=64)
    train_autoencoder(other, Blocks(), tmp_path / "broken", config, resume=True)
    whole, broken = (load_tensors(tmp_path / run / "checkpoint.safetensors") for run in ("whole", "broken"))
    assert whole[1]["step"] == broken[1]["step"] == "9"
    assert whole[0].keys() == broken[0].keys()
    assert any(name.startswith("discriminator") for name in whole[0]) == config.discriminator
    for name, tensor in whole[0].items():
        assert torch.equal(tensor, broken[0][name]), name


def test_discriminator_starts_when_told(tmp_path):
    config = replace(CONFIG, steps=4, disc_start=2, log_every=1)
    train_autoencoder(tiny(), Blocks(), tmp_path / "run", config)
    with (tmp_path / "run/log.csv").open(newline="") as file:
        assert [float(row["discriminator"]) > 0 for row in csv.DictReader(file)] == [False, False, True, True]


def test_fitted_codebook_is_used(tmp_path):
    used = {}
    for fit in (True, False):
        run, model = tmp_path / str(fit), tiny()
        train_autoencoder(model, Blocks(), run, replace(PLAIN, steps=1, log_every=1, fit_codebook=fit))
        with (run / "log.csv").open(newline="") as file:
            used[fit] = float(next(csv.DictReader(file))["codes_used"])
    assert used[False] < 32 <= used[True]


def test_generator_step_leaves_the_discriminator_its_weights_and_the_reverse():
    training = AutoencoderTraining(tiny(), replace(CONFIG, learning_rate=8e-5))
    images = torch.rand(4, 3, 16, 16) * 2 - 1
    terms, _ = training._autoencoder_terms(images, training.discriminator)
    terms["loss"].backward()
    assert all(p.grad is None and p.requires_grad for p in training.discriminator.parameters())
    assert training.model.encoder.conv_in.weight.grad.abs().sum() > 0
    fidelity, total = terms["l1"] + terms["codebook"], terms["loss"]
    weight = adaptive_weight(*_fresh_losses(training, images))
    torch.testing.assert_close(total, fidelity + 0.75 * weight * terms["adversarial"], rtol=1e-3, atol=1e-5)


def _fresh_losses(training, images):
    reconstruction, _, _ = training.model(images)
    last = training.model.decoder.conv_out.weight
    return (reconstruction - images).abs().mean(), -training.discriminator(reconstruction).mean(), last


def test_adaptive_weight_is_the_ratio_of_gradient_norms():
    w = torch.randn(5, requires_grad=True)
    a, b = torch.randn(5), torch.randn(5)
    torch.testing.assert_close(adaptive_weight(w @ a, w @ b, w), a.norm() / (b.norm() + 1e-4))
    assert adaptive_weight(1e9 * (w @ a), w @ b, w) == 1e4


def test_hinge_loss_by_hand():
    assert hinge_loss(torch.tensor([2.0, 0.0]), torch.tensor([-3.0, 1.0, 0.5])).item() == pytest.approx(
        0.5 * (1 / 2 + 3.5 / 3)
    )


@pytest.mark.parametrize("layers,size,patches", [(1, 6, 1), (2, 16, 2), (3, 24, 1), (3, 64, 6)])
def test_discriminator_gives_one_logit_per_patch(layers, size, patches):
    assert PatchDiscriminator(layers, width=8)(torch.zeros(2, 3, size, size)).shape == (2, 1, patches, patches)


@pytest.mark.parametrize("log_every", [1, 100], ids=["seen in the loss", "seen in the weights"])
def test_divergence_is_reported_and_the_checkpoint_kept(tmp_path, log_every):
    wild = replace(PLAIN, steps=8, learning_rate=1e30, checkpoint_every=1, log_every=log_every)
    with pytest.raises(InputError, match="diverged by step 2: lower the learning rate"):
        train_autoencoder(tiny(), Blocks(), tmp_path / "run", wild)
    tensors, metadata = load_tensors(tmp_path / "run/checkpoint.safetensors")
    assert metadata == {"step": "1"} and all(v.isfinite().all() for v in tensors.values())


def test_other_runs_are_not_continued(tmp_path):
    run = tmp_path / "run"
    train_autoencoder(tiny(), Blocks(), run, replace(PLAIN, steps=1))
    with pytest.raises(InputError, match="multipliers"):
        train_autoencoder(tiny((1, 1)), Blocks(), run, PLAIN, resume=True)
    with pytest.raises(InputError, match="discriminator"):
        train_autoencoder(tiny(), Blocks(), run, CONFIG, resume=True)
    with pytest.raises(InputError, match="holds something"):
        train_autoencoder(tiny(), Blocks(), run, PLAIN)
    tensors, metadata = load_tensors(run / "checkpoint.safetensors")
    with pytest.raises(InputError, match="checkpoint.safetensors: .*missing"):
        AutoencoderTraining(tiny(), CONFIG).load(tensors, metadata, run / "checkpoint.safetensors")
    save_tensors(run / "checkpoint.safetensors", tensors)
    with pytest.raises(InputError, match="names no step"):
        train_autoencoder(tiny(), Blocks(), run, PLAIN, resume=True)


def test_wrong_configurations_touch_no_folder(tmp_path):
    run = tmp_path / "run"
    with pytest.raises(InputError, match="disc_layers is 3: needs images of at least 24, not 16"):
        train_autoencoder(tiny(), Blocks(), run, replace(CONFIG, disc_layers=3))
    with pytest.raises(InputError, match="multiple of 32"):
        train_autoencoder(tiny((1,) * 6), Blocks(), run, PLAIN)
    with pytest.raises(InputError, match="holds no images"):
        train_autoencoder(tiny(), Blocks(0), run, PLAIN)
    with pytest.raises(InputError, match="^lpips_weights: "):
        train_autoencoder(tiny(), Blocks(), run, replace(PLAIN, lpips_weights=str(tmp_path / "absent.pth")))
    assert not run.exists()
    for wrong in (
        {"steps": 0},
        {"batch_size": 0},
        {"learning_rate": float("nan")},
        {"precision": "fp16"},
        {"seed": -1},
    ):
        with pytest.raises(InputError, match=next(iter(wrong))):
            replace(CONFIG, **wrong)


def test_bf16_autocast_trains(tmp_path):
    data, model = Blocks(), tiny()
    before = distance(model, data)
    train_autoencoder(model, data, tmp_path / "run", replace(CONFIG, steps=8, disc_start=6, precision="bf16"))
    assert distance(model, data) < before
    assert all(p.dtype == torch.float32 for p in model.parameters())
