"""What the tests of schedulers share: a loop as in every pipeline of diffusers, models, and which class is which."""

from dataclasses import replace

import pytest
import torch
from _tiny import TINY

from encdiff import EncDiff
from encdiff.diffusion import menu, schedules, solvers
from encdiff.models.sample import PREDICTION_TYPES, sample_latents

diffusers = pytest.importorskip("diffusers", reason="the schedulers are those of diffusers")
QUIET = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of numpy, for the tables of diffusers

ALPHA_BAR = schedules.alphas_cumprod(schedules.make_betas("scaled_linear"))
SCHEDULE = {"beta_schedule": "scaled_linear", "beta_start": 0.0015, "beta_end": 0.0155}
CLASSES = {
    "ddim": "DDIMScheduler", "ddpm": "DDPMScheduler", "dpm-solver++": "DPMSolverMultistepScheduler",
    "unipc": "UniPCMultistepScheduler", "euler": "EulerDiscreteScheduler", "heun": "HeunDiscreteScheduler",
}  # fmt: skip
PUBLISHED = {"steps_offset": 1, "set_alpha_to_one": False}  # the timesteps and the last level of our "ddim"


def network(x, t):
    """A fixed nonlinear function of x_t and t that mixes neighbours."""
    return torch.tanh(1.3 * x.roll(1, -1) - 0.4 * x + 0.2) + 0.3 * torch.sin(t.float() / 100).view(-1, 1, 1, 1)


def noise_like_start(seed=0):
    return torch.randn(3, 2, 5, 7, generator=torch.Generator().manual_seed(seed))


def drawing(seed):
    return torch.Generator().manual_seed(seed)


def assert_near(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4 * theirs.abs().mean().item())


def pipeline_loop(scheduler, x, steps=None, denoise=network, begin=0, **options):
    """What every pipeline of diffusers does; also every x that the model saw."""
    if steps:
        scheduler.set_timesteps(steps)
    x, seen = x * scheduler.init_noise_sigma, []
    for t in scheduler.timesteps[begin:]:
        scaled = scheduler.scale_model_input(x, t)
        seen.append((scaled, scaled.clone()))
        x = scheduler.step(denoise(scaled, t.expand(len(x))), t, x, **options).prev_sample
    assert all(torch.equal(kept, copied) for kept, copied in seen), "a tensor was written over"
    return x


def model_of(prediction):
    torch.manual_seed(3)
    model = EncDiff(replace(TINY, prediction=prediction))
    for p in model.unet.parameters():
        if not p.any():  # at the start the network says nothing: its last layers are zero
            torch.nn.init.normal_(p, std=0.05)
    return model.eval()


MODELS = {prediction: model_of(prediction) for prediction in PREDICTION_TYPES}


def theirs_of(name, model, **options):
    return getattr(diffusers, name).from_config(model.scheduler_config, **options)


def latents(model, x_T, **options):
    """Not clipped, as images are."""
    with torch.no_grad():
        return sample_latents(model, model.tokens(torch.linspace(-1, 1, 6).view(2, 3)), x_T, **options)


def start(model, sampler="ddim", steps=10):
    """x_T for a name, and for its scheduler: diffusers begins Euler and Heun at sigma times noise, not sqrt(1 + ..)."""
    x_T = torch.randn(2, *model.latent_shape, generator=drawing(1))
    first = solvers.vp_levels(ALPHA_BAR, menu.timesteps(sampler, steps, 1000)[:1])[0]
    return x_T, x_T / first[1].float() if sampler in ("euler", "heun") else x_T
