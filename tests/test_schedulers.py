"""Schedulers of diffusers as the sampler of an EncDiff, and of any network."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from _schedulers import (
    CLASSES,
    MODELS,
    PUBLISHED,
    QUIET,
    assert_near,
    diffusers,
    drawing,
    latents,
    network,
    noise_like_start,
    pipeline_loop,
    start,
    theirs_of,
)
from _tiny import TINY

from encdiff import EncDiff, InputError, SamplingEngine, ops
from encdiff.diffusion import schedulers, solvers
from encdiff.diffusion.edm import edm_denoiser
from encdiff.models.sample import PREDICTION_TYPES

pytestmark = QUIET
PAIRS = [(s, p) for s in CLASSES for p in PREDICTION_TYPES if s not in ("euler", "heun") or p != "x0"]


@pytest.mark.parametrize("sampler, prediction", PAIRS)
def test_a_scheduler_samples_as_the_sampler_of_its_kind(sampler, prediction, monkeypatch):
    model, calls = MODELS[prediction], []

    def keyed(shape, **options):
        calls.append(shape)
        return ops.normal(shape, 5, torch.arange(shape[0]), len(calls))

    monkeypatch.setattr("diffusers.schedulers.scheduling_ddpm.randn_tensor", keyed)
    scheduler = theirs_of(CLASSES[sampler], model, **(PUBLISHED if sampler == "ddim" else {}))
    x_T, scaled = start(model, sampler, steps=5)
    ours = latents(model, x_T, sampler=sampler, steps=5, seed=5, sample_ids=torch.arange(2))
    assert_near(latents(model, scaled, sampler=scheduler, steps=5), ours)


@pytest.mark.parametrize("name", ["EulerAncestral", "LMS", "KDPM2Ancestral"])
def test_a_scheduler_is_led_as_a_pipeline_leads_it(name):
    model, x_T = MODELS["epsilon"], start(MODELS["epsilon"])[0]
    scheduler = theirs_of(f"{name}DiscreteScheduler", model)
    tokens = model.tokens(torch.linspace(-1, 1, 6).view(2, 3))
    options = {} if name == "LMS" else {"generator": drawing(8)}
    with torch.no_grad():
        denoise = lambda x, t: model.denoise(x, t, tokens)  # noqa: E731
        theirs = pipeline_loop(copy.deepcopy(scheduler), x_T, 4, denoise, **options)
    assert_near(latents(model, x_T, sampler=scheduler, steps=4, seed=8), theirs)
    other = latents(model, x_T, sampler=scheduler, steps=4, seed=9)
    assert ((other - theirs).abs().max() < 1e-4 * theirs.abs().max()) == (name == "LMS")


COUNTS = {
    "PNDM": 14, "DEISMultistep": 5, "LCM": 5, "TCD": 5, "SASolver": 5, "DPMSolverSinglestep": 5, "KDPM2Discrete": 9,
    "HeunDiscrete": 9, "DDIMParallel": 5, "DDPM": 5,
}  # fmt: skip


def arrays(scheduler):
    return {key: v.numpy() if isinstance(v, torch.Tensor) else v for key, v in vars(scheduler).items()}


@pytest.mark.parametrize("name", COUNTS)
def test_every_scheduler_is_taken_and_not_changed(name):
    model, seen = MODELS["epsilon"], []
    scheduler = theirs_of(f"{name}Scheduler", model)
    before = copy.deepcopy(arrays(scheduler))
    options = {"sampler": scheduler, "steps": 5, "seed": 4}
    images = model.sample(torch.zeros(2, 3), **options, progress=lambda *state: seen.append(state))
    assert images.isfinite().all() and seen == [(i + 1, COUNTS[name]) for i in range(COUNTS[name])]
    assert torch.equal(images, model.sample(torch.zeros(2, 3), **options))
    np.testing.assert_equal(arrays(scheduler), before)


def test_eta_belongs_to_a_step_that_takes_it():
    model, x_T = MODELS["v"], start(MODELS["v"])[0]
    plain, noisy = (latents(model, x_T, sampler=theirs_of("DDIMScheduler", model), steps=4, eta=e) for e in (0.0, 1.0))
    assert not torch.allclose(plain, noisy, rtol=1e-2)
    with pytest.raises(InputError, match="^eta is 0.5, must be 0 for EulerDiscreteScheduler, whose step takes none$"):
        latents(model, x_T, sampler=theirs_of("EulerDiscreteScheduler", model), steps=4, eta=0.5)


def test_the_gate_counts_the_evaluations_of_a_scheduler():
    model, x_T = MODELS["epsilon"], start(MODELS["epsilon"])[0]
    options = {"sampler": theirs_of("HeunDiscreteScheduler", model), "steps": 3}
    exact = latents(model, x_T, **options)
    assert_near(latents(model, x_T, **options, gate=5), exact)
    assert not torch.allclose(latents(model, x_T, **options, gate=1), exact, rtol=1e-3)
    with pytest.raises(InputError, match="^gate is 6, must lie in 1 to 5, the evaluations of the U-Net$"):
        latents(model, x_T, **options, gate=6)


def test_every_method_and_the_engine_take_a_scheduler():
    model, scalars, images = MODELS["x0"], torch.randn(2, 3), torch.rand(2, 3, 16, 16)
    options = {"sampler": theirs_of("DEISMultistepScheduler", model), "steps": 3}
    assert torch.equal(SamplingEngine(model, **options)(scalars), model.sample(scalars, **options))
    rebuilt = model.reconstruct(images, **options)
    assert torch.equal(rebuilt, model.sample(model.encode(images), **options))
    assert torch.equal(model.swap(images, images, 1, **options), rebuilt)
    direction = torch.zeros(3)
    assert torch.equal(model.edit(images, direction, **options), rebuilt)


@pytest.mark.parametrize("schedule", ["scaled_linear", "ldm:sqrt_linear", "cosine", "sqrt"])
def test_the_configuration_of_a_model_makes_its_schedule(schedule):
    model = EncDiff(replace(TINY, schedule=schedule, num_timesteps=50))
    for name in ("DDIMScheduler", "DPMSolverMultistepScheduler"):
        made = theirs_of(name, model)
        torch.testing.assert_close(made.alphas_cumprod.double(), model.schedule, rtol=1e-4, atol=1e-7)
        assert model.sample(torch.zeros(1, 3), sampler=made, steps=4).isfinite().all()
    assert torch.equal(theirs_of("DDIMScheduler", model).timesteps, torch.arange(50).flip(0))


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_a_flow_and_an_edm_scheduler_lead_their_own_networks(shift):
    flow = schedulers.prepare(diffusers.FlowMatchEulerDiscreteScheduler(shift=shift), 8)
    x = noise_like_start()
    ours = solvers.euler(network, x, solvers.flow_path(8, shift=shift), prediction="flow")
    assert_near(schedulers.run(network, x, flow), ours)
    edm = diffusers.EDMEulerScheduler()
    theirs = schedulers.run(network, x, schedulers.prepare(edm, 8))
    first = 80 / edm.init_noise_sigma  # theirs begins at sqrt(80^2 + 1)
    ours = solvers.euler(edm_denoiser(network), 80 * x / first, solvers.edm_path(8), prediction="x0")
    assert_near(theirs, ours)


@pytest.mark.parametrize(
    "made, steps, says",
    [
        (lambda d: 7, 4, "sampler is a int, must be a name or a scheduler of diffusers: it lacks set_timesteps"),
        (lambda d: d.DDIMScheduler(), 4, "sampler has prediction_type 'epsilon', must have the model's 'sample': "),
        (lambda d: d.DDIMScheduler(500, prediction_type="sample"), 4, "sampler has num_train_timesteps 500, must have"),
        (lambda d: d.DDIMScheduler(prediction_type="sample"), 4, "sampler has other betas than the model, must have"),
        (lambda d: d.FlowMatchEulerDiscreteScheduler(), 4, "without alphas_cumprod; must be a scheduler of a DDPM"),
        (lambda d: d.RePaintScheduler(), 4, "is a RePaintScheduler, whose step needs more than output, t and x"),
        ("DDIMScheduler", 0, "steps is 0, must be a whole number of at least 1"),
        ("DDIMScheduler", 1001, "steps is 1001, which DDIMScheduler refuses: .num_inference_steps.: 1001 cannot be"),
    ],
)
def test_what_is_no_scheduler_for_the_model_is_named(made, steps, says):
    model = MODELS["x0"]
    scheduler = theirs_of(made, model) if isinstance(made, str) else made(diffusers)
    with pytest.raises(InputError, match=says) as caught:
        model.sample(torch.zeros(1, 3), sampler=scheduler, steps=steps)
    assert "\n" not in str(caught.value)


def test_a_timestep_past_the_schedule_is_named():
    scheduler = theirs_of("DDIMScheduler", MODELS["x0"], steps_offset=1)
    with pytest.raises(InputError, match="^steps is 1000, takes DDIMScheduler to timestep 1000, past .* 0 to 999$"):
        MODELS["x0"].sample(torch.zeros(1, 3), sampler=scheduler, steps=1000)
