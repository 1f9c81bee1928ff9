"""Flow: its path, its samplers, its network that tells x0; and guidance."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from _tiny import TINY, shaken

from encdiff import EncDiff, InputError
from encdiff.diffusion import menu, samplers, schedules
from encdiff.diffusion.loop import run
from encdiff.models.config import OBJECTIVES
from encdiff.pictures import swap_grid, traversal

FLOW = replace(TINY, **OBJECTIVES["flow"])
GUIDED = replace(TINY, **OBJECTIVES["guided"])


# flow: the path and its samplers, by an oracle that knows the answer


@pytest.mark.parametrize("sampler", menu.SOLVERS)
@pytest.mark.parametrize("steps", [1, 2, 7, 1000])
def test_samplers_of_a_flow_go_where_its_velocity_leads(sampler, steps):
    x0, T = torch.randn(3, 2, 4, 5, dtype=torch.float64), 1000
    times = []

    def velocity(x, t):
        times.append(float(t[0]))
        s = ((t.double() + 1) / T)[:, None, None, None]
        return (x - x0) / s

    stages = menu.stages(sampler, schedules.flow_table(T), steps, prediction="flow")
    found = run(velocity, torch.randn_like(x0), stages)
    assert torch.allclose(found, x0, atol=1e-9)
    assert times[0] == T - 1 and times == sorted(times, reverse=True)
    levels = np.unique(np.round(np.array(times) + 1, 6))
    assert np.allclose(levels, T * np.arange(1, steps + 1) / steps)  # evenly, each level once, or twice by Heun


def test_a_flow_is_followed_back():
    T, x0 = 200, torch.randn(2, 3, 4, 4, dtype=torch.float64)
    velocity = lambda x, t: 0.3 * x + (t.double() / T)[:, None, None, None]  # noqa: E731
    x_T = samplers.flow_invert(velocity, x0, T, steps=200)
    back = run(velocity, x_T, menu.stages("euler", schedules.flow_table(T), 200, prediction="flow"))
    assert (back - x0).abs().max() < 0.01 * (x_T - x0).abs().max()


def test_a_model_of_flow_samples_swaps_and_inverts(images):
    model = shaken(FLOW)
    for sampler in menu.SOLVERS:
        assert model.reconstruct(images, sampler=sampler, steps=3).isfinite().all()
    gated = model.swap(images, images.flip(0), 0, steps=4, gate=2)
    assert gated.shape == images.shape and not torch.equal(gated, model.swap(images, images.flip(0), 0, steps=4))
    assert model.attention_maps(images, steps=2).sum(1).allclose(torch.ones(len(images), 16, 16), atol=1e-4)
    model = shaken(replace(FLOW, flow_output="velocity"))
    with torch.no_grad():
        for parameter in model.unet.out[-1].parameters():
            parameter.mul_(0.05)  # a field so gentle that steps follow it
    x_T = model.invert(images, steps=40)
    back = model.reconstruct(images, x_T=x_T, sampler=model.inverts_by, steps=40)
    assert (back - images).abs().mean() < 0.02 < (model.reconstruct(images, sampler="euler") - images).abs().mean()


def test_a_velocity_is_made_of_x0(monkeypatch):
    model, x0 = shaken(FLOW), torch.randn(4, *EncDiff(FLOW).latent_shape)
    monkeypatch.setattr(model.unet, "forward", lambda x, *_: x0)
    t, noise, tokens = torch.tensor([49, 200, 700, 999]), torch.randn_like(x0), torch.zeros(4, 3, 4)
    s = ((t + 1) / 1000)[:, None, None, None]
    assert torch.allclose(model.denoise((1 - s) * x0 + s * noise, t, tokens), noise - x0, atol=1e-4)
    x_t = 0.99 * x0 + 0.01 * noise  # so little noise that x0 is not divided out of it
    assert torch.allclose(model.denoise(x_t, t * 0 + 9, tokens), 0.01 / 0.05 * (noise - x0), atol=1e-5)
    plain = shaken(replace(FLOW, flow_output="velocity"))
    monkeypatch.setattr(plain.unet, "forward", lambda x, *_: x0)
    assert torch.equal(plain.denoise(x_t, t, tokens), x0)


def test_samplers_of_a_schedule_are_refused_for_a_flow(images):
    model = shaken(FLOW)
    for sampler in ("ddim", "ddpm"):
        with pytest.raises(
            InputError, match=f"^sampler is '{sampler}', of a DDPM schedule; a model that predicts flow"
        ):
            model.reconstruct(images, sampler=sampler)
    with pytest.raises(InputError, match="^prediction is 'flow', which has no schedule of DDPM"):
        _ = model.scheduler_config
    with pytest.raises(InputError, match="^prediction is 'flow', which the published code does not have"):
        model.save_published("never")
    with pytest.raises(InputError, match="^steps is 0, must be a whole number from 1 to 1000"):
        model.reconstruct(images, steps=0)


# guidance


def test_guidance_goes_so_far_from_what_there_is_without_concepts(images):
    model, w = shaken(replace(GUIDED, prediction="x0")), 2.7
    scalars, x = model.encode(images), torch.randn(len(images), *model.latent_shape)
    t = torch.full((len(images),), 999)
    tokens = model.tokens(scalars)
    own, without = model.denoise(x, t, tokens), model.denoise(x, t, torch.zeros_like(tokens))
    found = model.sample(scalars, x_T=x, sampler="euler", steps=1, guidance=w)
    assert torch.allclose(found, model.to_images(without + w * (own - without)), atol=1e-5)
    assert not torch.allclose(found, model.to_images(own), atol=0.05)
    plain = model.sample(scalars, x_T=x, steps=3)
    assert torch.equal(model.sample(scalars, x_T=x, steps=3, guidance=1), plain)
    assert not torch.allclose(model.sample(scalars, x_T=x, steps=3, guidance=3, gate=2), plain, atol=1e-3)


@pytest.mark.parametrize("guidance", [float("nan"), -1, "2", None])
def test_guidance_is_a_number(guidance, images):
    with pytest.raises(InputError, match="^guidance is .*, must be a number from 0 to 1000; 1 is without$"):
        shaken(GUIDED).reconstruct(images, guidance=guidance)


def test_guidance_needs_a_model_that_was_trained_for_it(images):
    with pytest.raises(InputError, match="^guidance is 2, must be 1: the model was trained with token_dropout 0"):
        shaken(TINY).reconstruct(images, guidance=2)


def test_pictures_are_guided(images, monkeypatch):
    model, seen = shaken(GUIDED), []
    sample = model.sample
    monkeypatch.setattr(model, "sample", lambda *given, **by: seen.append(by["guidance"]) or sample(*given, **by))
    swap_grid(model, images[:1], images[1:2], steps=1, guidance=3.0)
    traversal(model, images[0], model.encode(images), steps=1, columns=2, guidance=3.0)
    assert seen and set(seen) == {3.0}
