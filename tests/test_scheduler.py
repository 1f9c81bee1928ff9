"""Schedulers both ways: those of diffusers sample an EncDiff, ours samples in the pipelines of diffusers."""

import copy
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from _pipeline import stable_diffusion
from _tiny import TINY

import encdiff
from encdiff import EncDiff, InputError, SamplingEngine, ops
from encdiff.diffusion import menu, samplers, schedulers, schedules, solvers
from encdiff.diffusion.edm import edm_denoiser
from encdiff.models.sample import PREDICTION_TYPES, sample_latents

diffusers = pytest.importorskip("diffusers", reason="the schedulers are those of diffusers")
EncDiffScheduler = encdiff.EncDiffScheduler
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:diffusers")  # of numpy, for its schedulers' tables

ALPHA_BAR = schedules.alphas_cumprod(schedules.make_betas("scaled_linear"))
SCHEDULE = {"beta_schedule": "scaled_linear", "beta_start": 0.0015, "beta_end": 0.0155}
CLASSES = {
    "ddim": "DDIMScheduler", "ddpm": "DDPMScheduler", "dpm-solver++": "DPMSolverMultistepScheduler",
    "unipc": "UniPCMultistepScheduler", "euler": "EulerDiscreteScheduler", "heun": "HeunDiscreteScheduler",
}  # fmt: skip
PUBLISHED = {"steps_offset": 1, "set_alpha_to_one": False}  # the timesteps and the last level of our "ddim"
PAIRS = [(s, p) for s in CLASSES for p in PREDICTION_TYPES if s not in ("euler", "heun") or p != "x0"]
pairs = pytest.mark.parametrize("sampler, prediction", PAIRS)


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


# Theirs in ours


@pairs
def test_a_scheduler_samples_as_the_sampler_of_its_kind(sampler, prediction, monkeypatch):
    model, calls = MODELS[prediction], []

    def keyed(shape, **options):
        calls.append(shape)
        return ops.normal(shape, 5, torch.arange(shape[0]), len(calls))

    monkeypatch.setattr("diffusers.schedulers.scheduling_ddpm.randn_tensor", keyed)
    scheduler = theirs_of(CLASSES[sampler], model, **(PUBLISHED if sampler == "ddim" else {}))
    x_T, scaled = start(model, sampler)
    ours = latents(model, x_T, sampler=sampler, steps=10, seed=5, sample_ids=torch.arange(2))
    assert_near(latents(model, scaled, sampler=scheduler, steps=10), ours)


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
    assert torch.allclose(other, theirs, rtol=1e-3) == (name == "LMS")


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


# Ours in theirs


def ours_of(sampler, prediction="epsilon", **options):
    return EncDiffScheduler(sampler, **SCHEDULE, prediction_type=PREDICTION_TYPES[prediction], **options)


def sample(sampler, x, prediction, **options):
    """Our sampler as a function, with noise of torch's own."""
    own = {"prediction": prediction, "generator": drawing(4)}
    if sampler == "ddim":
        return samplers.ddim(network, x, ALPHA_BAR, steps=7, **own, **options)
    if sampler == "ddpm":
        return samplers.ddpm(network, x, ALPHA_BAR, steps=7, **own)
    path = solvers.vp_path(ALPHA_BAR, menu.timesteps(sampler, 7, 1000))
    solve = {"dpm-solver++": solvers.dpm_solver_pp}.get(sampler) or getattr(solvers, sampler)
    return solve(network, x, path, **own)


@pytest.mark.parametrize("prediction", PREDICTION_TYPES)
@pytest.mark.parametrize("sampler", menu.SAMPLERS)
def test_our_scheduler_is_our_sampler_to_the_bit(sampler, prediction):
    x, scheduler = noise_like_start(), ours_of(sampler, prediction)
    theirs = pipeline_loop(scheduler, x, 7, generator=drawing(4))
    assert torch.equal(theirs, sample(sampler, x, prediction))
    assert torch.equal(pipeline_loop(scheduler, x, 7, generator=drawing(4)), theirs), "a second time"
    model, options = MODELS[prediction], {"steps": 4, "x_T": start(MODELS[prediction])[0]}
    if sampler != "ddpm":
        given = model.sample(torch.zeros(2, 3), sampler=scheduler, **options)
        assert torch.equal(given, model.sample(torch.zeros(2, 3), sampler=sampler, **options))


def test_eta_and_the_noise_of_our_scheduler():
    x, scheduler = noise_like_start(), ours_of("ddim", eta=1.0)
    ours = sample("ddim", x, "epsilon", eta=1.0)
    assert torch.equal(pipeline_loop(scheduler, x, 7, generator=drawing(4)), ours)
    each = [pipeline_loop(scheduler, x[i : i + 1], 7, generator=drawing(i)) for i in range(3)]
    assert torch.equal(pipeline_loop(scheduler, x, 7, generator=[drawing(i) for i in range(3)]), torch.cat(each))
    torch.manual_seed(6)
    keyed = pipeline_loop(scheduler, x, 7)
    torch.manual_seed(6)
    seed = int(torch.randint(2**63 - 1, ()))
    assert torch.equal(keyed, samplers.ddim(network, x, ALPHA_BAR, steps=7, eta=1.0, seed=seed))


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
    there = pipeline_loop(theirs, x / a / theirs.init_noise_sigma, begin=begin * ours.order)
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


def test_bounds_of_the_predicted_data():
    theirs = diffusers.DDIMScheduler(**SCHEDULE, clip_sample_range=0.6, **PUBLISHED)
    ours = EncDiffScheduler.from_config(theirs.config, sampler="ddim", clip_sample=True)
    x = noise_like_start()
    assert_near(pipeline_loop(ours, x, 20), pipeline_loop(theirs, x, 20, use_clipped_model_output=True))
    assert (pipeline_loop(ours_of("ddim"), x, 20) - pipeline_loop(ours, x, 20)).abs().max() > 1e-2


def test_a_schedule_without_signal_at_its_end():
    options = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    theirs = diffusers.DDIMScheduler(**SCHEDULE, prediction_type="v_prediction", clip_sample=False, **options)
    ours = ours_of("ddim", "v", set_alpha_to_one=True, **options)
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


def test_the_defaults_are_those_of_diffusers():
    """`from_config` leaves out what was a default where it comes from."""
    ours = EncDiffScheduler.from_config(diffusers.DDPMScheduler().config)
    torch.testing.assert_close(ours.alphas_cumprod.float(), diffusers.DDPMScheduler().alphas_cumprod)


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
