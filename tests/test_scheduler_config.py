"""`EncDiffScheduler.from_config`: what it makes of the configurations of diffusers' own classes."""

import warnings

import pytest
import torch
from _pipeline import stable_diffusion
from _schedulers import CLASSES, QUIET, SCHEDULE, assert_near, diffusers, drawing, noise_like_start, pipeline_loop

import encdiff
from encdiff import InputError
from encdiff.interop.scheduler import KINDS

EncDiffScheduler = encdiff.EncDiffScheduler
pytestmark = QUIET
SD15 = {
    "_class_name": "PNDMScheduler", "beta_end": 0.012, "beta_schedule": "scaled_linear", "beta_start": 0.00085,
    "num_train_timesteps": 1000, "set_alpha_to_one": False, "skip_prk_steps": True, "steps_offset": 1,
    "trained_betas": None, "clip_sample": False,
}  # fmt: skip
PROMPT = {
    "prompt_embeds": torch.randn(1, 5, 8, generator=drawing(2)), "negative_prompt_embeds": torch.zeros(1, 5, 8),
    "guidance_scale": 7.5, "num_inference_steps": 10, "output_type": "latent",
}  # fmt: skip


def config_of(name):
    """The one of Stable Diffusion 1.5, or of a scheduler made without arguments."""
    return SD15 if name == "SD 1.5" else getattr(diffusers, name)().config


def pair(config, sampler, **options):
    theirs = getattr(diffusers, CLASSES[sampler]).from_config(config, **options)
    return theirs, EncDiffScheduler.from_config(config, sampler=sampler, **options)


def noise_of(sampler):
    return {"generator": drawing(1)} if sampler in ("ddim", "ddpm") else {}


def test_the_classes_are_those_of_the_tests():
    assert KINDS == CLASSES


@pytest.mark.parametrize("sampler", CLASSES)
@pytest.mark.parametrize("name", ["SD 1.5", *CLASSES.values()])
def test_a_configuration_makes_what_the_class_of_the_kind_makes_of_it(name, sampler):
    theirs, ours = pair(config_of(name), sampler)
    keys = ("beta_start", "timestep_spacing", "steps_offset", "prediction_type", "clip_sample", "set_alpha_to_one")
    for key in ours.config.keys() & theirs.config.keys() & set(keys):
        assert ours.config[key] == theirs.config[key], key
    for steps in (10, 7):
        here, there = (
            pipeline_loop(scheduler, noise_like_start(), steps, **noise_of(sampler)) for scheduler in (ours, theirs)
        )
        torch.testing.assert_close(ours.timesteps.float(), theirs.timesteps.float(), rtol=0, atol=1e-3)
        assert_near(here, there)


@pytest.mark.parametrize("spacing", [{}, {"timestep_spacing": "leading"}, {"timestep_spacing": "trailing"}])
@pytest.mark.parametrize("sampler", CLASSES)
def test_a_pipeline_with_the_configuration_of_stable_diffusion(sampler, spacing):
    latents = [
        stable_diffusion(scheduler)(**PROMPT, generator=drawing(0)).images
        for scheduler in pair(SD15, sampler, **spacing)
    ]
    assert_near(latents[1], latents[0])


@pytest.mark.parametrize("sampler", ["euler", "heun"])
def test_where_a_pipeline_begins(sampler):
    theirs, ours = pair(SD15, sampler)
    for _ in range(2):  # before set_timesteps and after
        a = (theirs.sigmas.max() ** 2 + 1).rsqrt()
        assert ours.init_noise_sigma == pytest.approx(float(theirs.init_noise_sigma * a), rel=1e-6)
        assert ours.init_noise_sigma < 0.999
        theirs.set_timesteps(5), ours.set_timesteps(5)
    assert pair(SD15, sampler, timestep_spacing="leading")[1].init_noise_sigma == 1


def test_what_a_pipeline_corrects_in_a_configuration_is_corrected():
    """Stable Diffusion's sets clip_sample False and steps_offset 1 where an old configuration has neither."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        drawn = []
        for scheduler in (diffusers.DDIMScheduler(**SCHEDULE), EncDiffScheduler("ddim", **SCHEDULE)):
            drawn.append(stable_diffusion(scheduler)(**PROMPT, generator=drawing(0)).images)
    assert_near(drawn[1], drawn[0])


def test_ours_hands_on_what_it_was_given():
    back = diffusers.DDIMScheduler.from_config(EncDiffScheduler.from_config(SD15, sampler="unipc").config)
    assert (back.config.clip_sample, back.config.set_alpha_to_one, back.config.steps_offset) == (False, False, 1)
    assert back.config.timestep_spacing == "leading", "a default of ours is none of theirs"


def test_bounds_are_only_where_the_class_has_them():
    config = dict(SD15, clip_sample=True)
    assert [s for s in CLASSES if EncDiffScheduler.from_config(config, sampler=s).config.clip_sample] == [
        "ddim", "ddpm", "heun",
    ]  # fmt: skip
    asked = EncDiffScheduler.from_config(config, sampler="euler", clip_sample=True)
    assert asked.config.clip_sample and EncDiffScheduler.from_config(asked.config).config.clip_sample


@pytest.mark.parametrize(
    "config, says",
    [
        ({"_class_name": "FlowMatchHeunDiscreteScheduler"}, "config is of FlowMatchHeunDiscreteScheduler, must be of"),
        ({"_class_name": "EDMEulerScheduler"}, "config is of EDMEulerScheduler, must be of a scheduler with betas"),
        ("FlowMatchEulerDiscreteScheduler", "config is with shift and without betas, must be of"),
        ("EDMDPMSolverMultistepScheduler", "config is with sigma_data and without betas, must be of"),
        ("ScoreSdeVeScheduler", "config is with sigma_max and without betas, must be of"),
        ({"shift": 3.0}, "config is with shift and without betas, must be of a scheduler with betas"),
        ({"sigma_data": 0.5, "sigma_max": 80.0}, "config is with sigma_data and without betas, must be of"),
    ],
)
def test_a_configuration_without_betas_is_refused(config, says):
    with pytest.raises(InputError, match=f"^{says}") as caught:
        EncDiffScheduler.from_config(config_of(config) if isinstance(config, str) else config, sampler="euler")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "sampler, options, says",
    [
        ("dpm-solver++", {"thresholding": True, "sample_max_value": 2.0}, "thresholding=True"),
        ("ddim", {"thresholding": True}, "thresholding=True"),
        ("dpm-solver++", {"algorithm_type": "sde-dpmsolver++"}, "algorithm_type='sde-dpmsolver++'"),
        ("heun", {"use_exponential_sigmas": True}, "use_exponential_sigmas=True"),
        ("unipc", {"use_beta_sigmas": True}, "use_beta_sigmas=True"),
        ("euler", {"final_sigmas_type": "sigma_min"}, "final_sigmas_type='sigma_min'"),
        ("ddpm", {"variance_type": "fixed_large"}, "variance_type='fixed_large'"),
        ("unipc", {"solver_order": 3, "solver_type": "bh1"}, "solver_order=3, solver_type='bh1'"),
    ],
)
def test_what_is_not_followed_is_said_once(sampler, options, says):
    with pytest.warns(UserWarning) as caught:
        EncDiffScheduler.from_config(SD15 | options, sampler=sampler)
    assert len(caught) == 1 and caught[0].filename == __file__
    assert str(caught[0].message) == f"EncDiffScheduler does not follow {says}, which {CLASSES[sampler]} does"


@pytest.mark.parametrize("sampler", CLASSES)
def test_what_is_followed_is_not_warned_of(sampler):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        EncDiffScheduler.from_config(SD15 | {"solver_type": "midpoint", "sample_max_value": 2.0}, sampler=sampler)
        for name in CLASSES.values():
            written = {key: value for key, value in config_of(name).items() if key != "_use_default_values"}
            EncDiffScheduler.from_config(written, sampler=sampler)
