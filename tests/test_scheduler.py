"""`EncDiffScheduler`: our samplers in the pipelines of diffusers."""

import sys

import pytest
import torch
from _pipeline import classes, stable_diffusion
from _schedulers import (
    ALPHA_BAR,
    CLASSES,
    MODELS,
    PUBLISHED,
    QUIET,
    SCHEDULE,
    assert_near,
    diffusers,
    drawing,
    network,
    noise_like_start,
    pipeline_loop,
    start,
)

import encdiff
from encdiff import InputError, ops
from encdiff.diffusion import menu, samplers, solvers
from encdiff.models.sample import PREDICTION_TYPES

EncDiffScheduler = encdiff.EncDiffScheduler
pytestmark = QUIET
AS_BY_NAME = {"ddim": {"clip_sample": False, **PUBLISHED}, "ddpm": {"clip_sample": False}}  # as in `EncDiff.sample`


def ours_of(sampler, prediction="epsilon", **options):
    options = AS_BY_NAME.get(sampler, {}) | options
    return EncDiffScheduler(sampler, **SCHEDULE, prediction_type=PREDICTION_TYPES[prediction], **options)


def sample(sampler, x, prediction, **options):
    """Our sampler as a function, with noise of torch's own."""
    own = {"prediction": prediction, "generator": drawing(4)}
    if sampler == "ddim":
        return samplers.ddim(network, x, ALPHA_BAR, steps=8, **own, **options)
    if sampler == "ddpm":
        return samplers.ddpm(network, x, ALPHA_BAR, steps=8, **own)
    path = solvers.vp_path(ALPHA_BAR, menu.timesteps(sampler, 8, 1000))
    solve = {"dpm-solver++": solvers.dpm_solver_pp}.get(sampler) or getattr(solvers, sampler)
    return solve(network, x, path, **own)


@pytest.mark.parametrize("prediction", PREDICTION_TYPES)
@pytest.mark.parametrize("sampler", menu.SAMPLERS)
def test_our_scheduler_is_our_sampler_to_the_bit(sampler, prediction):
    x, scheduler = noise_like_start(), ours_of(sampler, prediction)
    theirs = pipeline_loop(scheduler, x, 8, generator=drawing(4))
    assert torch.equal(theirs, sample(sampler, x * scheduler.init_noise_sigma, prediction))
    assert torch.equal(pipeline_loop(scheduler, x, 8, generator=drawing(4)), theirs), "a second time"
    model, options = MODELS[prediction], {"steps": 4, "x_T": start(MODELS[prediction])[0]}
    if sampler != "ddpm":
        given = model.sample(torch.zeros(2, 3), sampler=scheduler, **options)
        assert torch.equal(given, model.sample(torch.zeros(2, 3), sampler=sampler, **options))


def test_eta_and_the_noise_of_our_scheduler():
    x, scheduler = noise_like_start(), ours_of("ddim", eta=1.0)
    ours = sample("ddim", x, "epsilon", eta=1.0)
    assert torch.equal(pipeline_loop(scheduler, x, 8, generator=drawing(4)), ours)
    each = [pipeline_loop(scheduler, x[i : i + 1], 8, generator=drawing(i)) for i in range(3)]
    assert torch.equal(pipeline_loop(scheduler, x, 8, generator=[drawing(i) for i in range(3)]), torch.cat(each))
    same = [drawing(5) for _ in range(8)]  # another at every step
    scheduler.set_timesteps(8)
    moved = [x]
    for t, generator in zip(scheduler.timesteps, same, strict=True):
        moved.append(scheduler.step(torch.zeros_like(x), t, moved[-1], generator=generator, return_dict=False)[0])
    states = [generator.get_state() for generator in same]
    assert all(torch.equal(state, states[0]) for state in states) and not torch.equal(states[0], drawing(5).get_state())
    torch.manual_seed(6)
    keyed = pipeline_loop(scheduler, x, 8)
    torch.manual_seed(6)
    seed = int(torch.randint(2**63 - 1, ()))
    assert torch.equal(keyed, samplers.ddim(network, x, ALPHA_BAR, steps=8, eta=1.0, seed=seed))


SPACINGS = [
    (sampler, spacing)
    for sampler in ("ddim", "dpm-solver++", "unipc", "euler", "heun")
    for spacing in ("leading", "trailing", "linspace", "karras")
    if sampler != "ddim" or spacing in ("leading", "trailing")  # of the others diffusers steps by T/steps, not as far
]


@pytest.mark.parametrize("begin", [0, 3], ids=["whole", "from the middle"])
@pytest.mark.parametrize("sampler, spacing", SPACINGS)
def test_our_scheduler_is_theirs_of_its_kind(sampler, spacing, begin):
    options = {**SCHEDULE, "prediction_type": "v_prediction"}
    options |= {"use_karras_sigmas": True} if spacing == "karras" else {"timestep_spacing": spacing}
    options |= {"steps_offset": int(spacing == "leading")} if sampler != "unipc" or spacing == "leading" else {}
    options |= {"clip_sample": False, "set_alpha_to_one": True} if sampler == "ddim" else {}
    theirs, ours = getattr(diffusers, CLASSES[sampler])(**options), EncDiffScheduler(sampler, **options)
    for scheduler in (theirs, ours):
        scheduler.set_timesteps(20)
        if begin and hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(begin * ours.order)
    torch.testing.assert_close(ours.timesteps.float(), theirs.timesteps.float(), rtol=1e-6, atol=1e-3)
    x, a = noise_like_start(), 1.0
    if sampler in ("euler", "heun"):  # theirs keeps x / a
        a = (theirs.sigmas[begin * ours.order] ** 2 + 1).rsqrt()
    scaled = x / a * ours.init_noise_sigma / theirs.init_noise_sigma if begin else x  # both begin with the same noise
    there = pipeline_loop(theirs, scaled, begin=begin * ours.order)
    assert_near(pipeline_loop(ours, x, begin=begin * ours.order), there)


def test_it_finds_where_a_pipeline_begins():
    for sampler, first in (("dpm-solver++", 3), ("heun", 4)):
        told, untold = ours_of(sampler), ours_of(sampler)
        for scheduler in (told, untold):
            scheduler.set_timesteps(5)
        told.set_begin_index(first)
        x = noise_like_start()
        assert torch.equal(pipeline_loop(told, x, begin=first), pipeline_loop(untold, x, begin=first))
        assert told.step_index == len(told.timesteps) and (told.begin_index, untold.begin_index) == (first, None)


@pytest.mark.parametrize("prediction", PREDICTION_TYPES.values())
@pytest.mark.parametrize("sampler", ["ddim", "ddpm", "heun"])
def test_bounds_of_the_predicted_data(sampler, prediction):
    options = {"clip_sample": True, "clip_sample_range": 0.6, "prediction_type": prediction, **SCHEDULE}
    theirs = getattr(diffusers, CLASSES[sampler])(**options)
    if sampler == "heun" and prediction == "sample":
        pytest.skip("HeunDiscreteScheduler has no prediction_type sample")
    ours, x = EncDiffScheduler.from_config(theirs.config, sampler=sampler), noise_like_start()
    free = EncDiffScheduler.from_config(theirs.config, sampler=sampler, clip_sample=False)
    bounded, there, unbounded = (
        pipeline_loop(scheduler, x, 20, **({} if sampler == "heun" else {"generator": drawing(1)}))
        for scheduler in (ours, theirs, free)
    )
    assert_near(bounded, there)
    assert (unbounded - bounded).abs().max() > 1e-2


def test_a_schedule_without_signal_at_its_end():
    options = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    theirs = diffusers.DDIMScheduler(**SCHEDULE, prediction_type="v_prediction", clip_sample=False, **options)
    ours = ours_of("ddim", "v", set_alpha_to_one=True, steps_offset=0, **options)
    assert ours.alphas_cumprod[-1] == 0
    x = noise_like_start()
    assert_near(pipeline_loop(ours, x, 10), pipeline_loop(theirs, x, 10))


def test_noise_and_velocity_equal_theirs():
    theirs, ours = diffusers.DDPMScheduler(**SCHEDULE), ours_of("euler")
    x0, noise, t = noise_like_start(), noise_like_start(1), torch.tensor([0, 500, 999])
    assert_near(ours.add_noise(x0, noise, t), theirs.add_noise(x0, noise, t))
    assert_near(ours.get_velocity(x0, noise, t), theirs.get_velocity(x0, noise, t))
    between = diffusers.EulerDiscreteScheduler(**SCHEDULE)
    between.set_timesteps(8), ours.set_timesteps(8)
    t = between.timesteps[2:5]
    a = (between.sigmas[2:5] ** 2 + 1).rsqrt().view(-1, 1, 1, 1)
    assert_near(ours.add_noise(x0, noise, ours.timesteps[2:5]), a * between.add_noise(x0, noise, t))


def public(config):
    return {key: value for key, value in config.items() if not key.startswith("_")}


def test_configurations_come_and_go(tmp_path):
    source = diffusers.PNDMScheduler(**SCHEDULE, prediction_type="v_prediction", skip_prk_steps=True, steps_offset=1)
    ours = EncDiffScheduler.from_config(source.config, sampler="heun")
    assert (ours.config.sampler, ours.config.prediction_type, ours.order) == ("heun", "v_prediction", 2)
    torch.testing.assert_close(ours.alphas_cumprod.float(), source.alphas_cumprod)
    ours.save_pretrained(tmp_path)
    again = EncDiffScheduler.from_pretrained(tmp_path)
    assert public(again.config) == public(ours.config)
    back = diffusers.DPMSolverMultistepScheduler.from_config(again.config)
    assert back.config.prediction_type == "v_prediction" and len(again) == 1000
    torch.testing.assert_close(back.alphas_cumprod, source.alphas_cumprod)


def test_half_precision_is_kept():
    x, scheduler = noise_like_start(), ours_of("unipc", "v")
    half = pipeline_loop(scheduler, x.half(), 7)
    assert half.dtype == torch.float16
    whole = pipeline_loop(scheduler, x, 7)
    assert (half.float() - whole).norm() < 0.01 * whole.norm()


PROMPT = {
    "prompt_embeds": torch.randn(2, 5, 8, generator=drawing(2)), "negative_prompt_embeds": torch.zeros(2, 5, 8),
    "guidance_scale": 7.5, "num_inference_steps": 5,
}  # fmt: skip


@pytest.mark.parametrize("sampler", ["dpm-solver++", "unipc"])
@pytest.mark.parametrize("given", [{}, {"image": torch.rand(2, 3, 16, 16, generator=drawing(3)), "strength": 0.6}])
def test_a_pipeline_draws_the_same(sampler, given):
    theirs = getattr(diffusers, CLASSES[sampler])(**SCHEDULE, steps_offset=1)  # or the pipeline warns
    ours, drawn = EncDiffScheduler.from_config(theirs.config, sampler=sampler), {}
    for scheduler in (theirs, ours):
        pipeline, seen = stable_diffusion(scheduler, from_image=bool(given)), []

        def note(pipeline, i, t, tensors, seen=seen):
            seen.append((i, int(t), tensors["latents"]))
            return {}

        images = pipeline(
            **PROMPT, **given, output_type="pt", generator=drawing(0), callback_on_step_end=note
        ).images  # fmt: skip
        drawn[scheduler] = images, seen
    (images, steps), (images_2, steps_2) = drawn.values()
    assert_near(images_2, images)
    assert len(steps) == (3 if given else 5)
    for (i, t, x), (i_2, t_2, x_2) in zip(steps, steps_2, strict=True):
        assert (i, t) == (i_2, t_2)
        assert_near(x_2, x)


def test_a_pipeline_is_saved_and_loaded_with_our_scheduler(tmp_path):
    ours = ours_of("unipc", steps_offset=1)
    stable_diffusion(ours).save_pretrained(tmp_path)
    none = dict.fromkeys(("text_encoder", "tokenizer", "feature_extractor", "safety_checker", "image_encoder"))
    loaded = classes()[False].from_pretrained(tmp_path, **none).scheduler
    assert isinstance(loaded, EncDiffScheduler) and public(loaded.config) == public(
        ours_of("unipc", steps_offset=1).config
    )


@pytest.mark.parametrize(
    "options, says",
    [
        ({"sampler": "lms"}, "sampler is 'lms', must be one of dpm-solver"),
        ({"prediction_type": "flow_prediction"}, "prediction_type is 'flow_prediction', must be one of epsilon, v_pr"),
        ({"timestep_spacing": "even"}, "timestep_spacing is 'even', must be one of None, leading, trailing, linspace"),
        ({"eta": 0.5}, "eta is 0.5, must be 0 for sampler 'dpm-solver\\+\\+'"),
        ({"sampler": "ddim", "eta": -1.0}, "eta is -1.0, must lie in 0 to 1"),
        ({"sampler": "ddpm", "use_karras_sigmas": True}, "karras is True, must be False for sampler 'ddpm'"),
        ({"beta_schedule": "quadratic"}, "schedule is 'quadratic', must be one of"),
        ({"beta_end": 2.0}, "beta_start, beta_end are 0.0001, 2.0"),
        ({"trained_betas": [0.1, 1.5]}, "betas of shape \\(2,\\) must be one-dimensional, every one in"),
    ],
)
def test_wrong_options_are_named(options, says):
    with pytest.raises(InputError, match=says):
        EncDiffScheduler(**options)


def test_wrong_steps_are_named():
    x, scheduler = noise_like_start(), ours_of("heun")
    with pytest.raises(InputError, match="^step is called before set_timesteps, must come after it$"):
        scheduler.step(x, 999, x)
    for steps in (0, 1001):
        with pytest.raises(InputError, match=f"^steps is {steps}, must be a whole number from 1 to 1000"):
            scheduler.set_timesteps(steps)
    scheduler.set_timesteps(2)
    with pytest.raises(InputError, match="^timestep is 500, begin_index None; must be where a step begins"):
        scheduler.step(x, 500, x)
    scheduler.set_begin_index(1)
    with pytest.raises(InputError, match="^timestep is 999, begin_index 1; must be where a step begins"):
        scheduler.step(x, 999, x)
    pipeline_loop(scheduler, x, 2)
    with pytest.raises(InputError, match="^step was called 3 times, which were all; call set_timesteps before"):
        scheduler.step(x, 0, x)
    scheduler.set_timesteps(2)
    scheduler.step(x, 999, x)
    with pytest.raises(InputError, match="^timestep is 999, must be 0, the next of timesteps$"):
        scheduler.step(x, torch.tensor(999), x)
    with pytest.raises(InputError, match=r"^model_output is .* \(3, 1, 5, 7\)"):
        scheduler.step(x[:, :1], 0, x)
    with pytest.raises(InputError, match="^timesteps span 1000 to 1000, must lie in 0 to 999$"):
        scheduler.add_noise(x, x, torch.tensor([1000.0]))


def test_without_diffusers_the_line_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers.configuration_utils", None)
    monkeypatch.delitem(sys.modules, "encdiff.interop.scheduler")
    with pytest.raises(ImportError, match=r"^EncDiffScheduler needs the package diffusers: pip install encdiff\["):
        _ = encdiff.EncDiffScheduler


def test_no_gradients_and_one_pass_for_each_stage():
    x, scale = noise_like_start(), torch.ones((), requires_grad=True)
    for sampler, passes in (("dpm-solver++", 4), ("unipc", 7), ("heun", 7)):
        with ops.record_impls() as ran:
            ours = pipeline_loop(ours_of(sampler), x, 4, lambda x, t: scale * network(x, t))
        assert [op for op, _ in ran] == ["step"] * passes and not ours.requires_grad
