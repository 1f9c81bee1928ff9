"""The baseline of the benchmarks computes what ours computes, so a ratio of times is a ratio for the same work."""

import json
from pathlib import Path

import pytest
import torch
from _golden import draw, fill, load, relative_error

from bench.baselines import PAPER, SMOKE, diffusers_unet, fresh_model, published_twin
from bench.published import Published, PublishedTraining
from encdiff import EncDiff
from encdiff.diffusion import samplers

LAYOUT = Path(__file__).parent / "golden" / "checkpoint_layout.json"


@pytest.fixture(scope="module")
def ours() -> EncDiff:
    return fresh_model(SMOKE, torch.device("cpu")).eval()


def inputs(batch: int = 3) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    images = torch.rand(batch, 3, SMOKE.image_size, SMOKE.image_size) * 2 - 1
    return images, torch.randint(1000, (batch,)), torch.randn(batch, 3, 8, 8)


def test_names_and_shapes_are_those_of_the_published_checkpoints():
    with torch.device("meta"):
        state = Published(PAPER).state_dict()
    layout = json.loads(LAYOUT.read_text())
    assert {name: list(tensor.shape) for name, tensor in state.items()} == layout


def test_unet_gives_the_published_numbers():
    golden = load("unet_paper")
    unet = fill(Published(PAPER).unet, "model.diffusion_model.")
    x, tokens = draw("unet_paper:x", golden["y"].shape), draw("unet_paper:context", golden["grad_context"].shape)
    with torch.no_grad():
        y = unet(x, torch.from_numpy(golden["t"]), tokens)
    assert relative_error(y, golden["y"]) < 1e-4


@pytest.mark.parametrize("attention", ["einsum", "sdpa"])
@pytest.mark.parametrize("mode", ["eval", "train"])
def test_loss_and_gradients_are_ours(ours, attention, mode):
    ours.train(mode == "train")
    twin = published_twin(ours, attention)
    images, t, noise = inputs()
    expected, actual = ours.loss(images, t=t, noise=noise), twin.loss(images, t=t, noise=noise)
    expected.backward()
    actual.backward()
    assert relative_error(actual, expected.detach()) < 1e-5
    gradients = {name: p.grad for name, p in twin.named_parameters() if p.grad is not None}
    bank = [
        g for name, g in gradients.items() if name.startswith("cond_stage_model.net.") and name.endswith(".4.weight")
    ]
    pairs = {"bank": (torch.stack(bank), ours.bank.weights[2].grad)}  # ours is stacked
    pairs |= {n: (gradients[n], p.grad) for n, p in ours.named_parameters() if n in gradients}
    ours.zero_grad(set_to_none=True)
    assert len(pairs) > 100
    for name, (a, e) in pairs.items():  # a bias before a BatchNorm has a gradient of rounding errors alone
        assert (a - e).norm() < 1e-3 * e.norm() + 1e-6, name


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_samples_are_ours(ours, eta):
    ours.eval()
    twin, scalars, x_T = published_twin(ours), torch.randn(2, SMOKE.concepts), torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        tokens = ours.tokens(scalars)
        latents = samplers.ddim(
            lambda x_t, t: ours.denoise(x_t, t, tokens), x_T, ours.alphas_cumprod, steps=4, eta=eta,
            generator=torch.Generator().manual_seed(5),
        )  # fmt: skip
        expected = ours.to_images(latents)
    torch.manual_seed(5)  # of the noise that eta adds
    actual = twin.sample(scalars, x_T, 4, eta)
    assert expected.std() > 0.01
    assert relative_error(actual, expected) < 1e-3


def test_a_step_lowers_the_loss_and_moves_the_average(ours):
    losses = {}
    for fast in (False, True):
        torch.manual_seed(1)
        training = PublishedTraining(published_twin(ours), 1e-3, fast=fast)
        before = [p.clone() for p in training.average.parameters()]
        images = inputs(4)[0]
        losses[fast] = [training.advance(images).item() for _ in range(6)]
        moved = [not torch.equal(a, b) for a, b in zip(before, training.average.parameters(), strict=True)]
        assert any(moved) and min(losses[fast][3:]) < losses[fast][0]
    assert losses[True] == pytest.approx(losses[False], rel=1e-3)


def test_diffusers_unet_is_of_the_same_size():
    pytest.importorskip("diffusers", reason="one of the baselines is diffusers")
    with torch.device("meta"):
        unets = diffusers_unet(PAPER), Published(PAPER).unet
    theirs, published = (sum(p.numel() for p in unet.parameters()) for unet in unets)
    assert 0.8 < theirs / published < 1.2
