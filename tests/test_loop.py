import pytest
import torch

from encdiff import ops
from encdiff.diffusion.edm import edm_denoiser
from encdiff.diffusion.loop import Walk, run
from encdiff.diffusion.menu import stages as stages_of
from encdiff.diffusion.samplers import ddim, ddim_invert, ddpm, ddpm_coefficients
from encdiff.diffusion.schedules import alphas_cumprod, make_betas, spaced_timesteps
from encdiff.diffusion.solvers import dpm_solver_pp, edm_path, euler, heun, unipc, vp_path
from encdiff.errors import InputError

ALPHA_BAR = alphas_cumprod(make_betas("scaled_linear"))
PATH = vp_path(ALPHA_BAR, spaced_timesteps(6, 1000, "inner"))
IDS = torch.tensor([5, 2**32 - 1, 0])


def model(x, t):
    return torch.tanh(1.3 * x.roll(1, -1) - 0.4 * x + 0.2) + 0.3 * torch.sin(t.float() / 100).view(-1, 1, 1, 1)


def start():
    return torch.randn(3, 2, 5, 7)


SAMPLERS = {
    "ddim": lambda d, x, **o: ddim(d, x, ALPHA_BAR, steps=6, **o),
    "ddim eta": lambda d, x, **o: ddim(d, x, ALPHA_BAR, steps=6, eta=0.7, **o),
    "ddpm": lambda d, x, **o: ddpm(d, x, ALPHA_BAR, steps=6, **o),
    "inversion": lambda d, x, **o: ddim_invert(d, x, ALPHA_BAR, steps=6, **o),
    "euler": lambda d, x, **o: euler(d, x, PATH, **o),
    "heun": lambda d, x, **o: heun(d, x, PATH, **o),
    "edm churn": lambda d, x, **o: heun(edm_denoiser(d), 80 * x, edm_path(6), prediction="x0", churn=9.0, **o),
    "dpm-solver++": lambda d, x, **o: dpm_solver_pp(d, x, PATH, **o),
    "unipc": lambda d, x, **o: unipc(d, x, PATH, **o),
}
samplers = pytest.mark.parametrize("sample", SAMPLERS.values(), ids=SAMPLERS)
guided = pytest.mark.parametrize("sample", [SAMPLERS[name] for name in SAMPLERS if name != "edm churn"])


@samplers
def test_a_sample_is_the_same_in_any_batch(sample):
    x = start()
    whole = sample(model, x, seed=2**64 - 1, sample_ids=IDS)
    for cut in (1, 2):
        parts = [sample(model, x[s], seed=2**64 - 1, sample_ids=IDS[s]) for s in (slice(cut), slice(cut, None))]
        assert torch.equal(whole, torch.cat(parts))
    assert torch.equal(whole.flip(0), sample(model, x.flip(0), seed=2**64 - 1, sample_ids=IDS.flip(0)))


@samplers
def test_the_noise_of_a_stochastic_sampler_follows_seed_and_ids(sample, request):
    x = start()
    first = sample(model, x, seed=1, sample_ids=IDS)
    stochastic = request.node.callspec.id in ("ddim eta", "ddpm", "edm churn")
    for other in (sample(model, x, seed=2, sample_ids=IDS), sample(model, x, seed=1)):
        assert torch.allclose(first, other) != stochastic


@samplers
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_writing_over_its_own_tensors_changes_nothing(sample, dtype):
    """With a callback every tensor is a fresh one."""
    x, seen = start().to(dtype), []
    kept = x.clone()
    options = {"seed": 1, "clip": 2.0}
    plain = sample(model, x, **options)
    assert torch.equal(x, kept)
    assert torch.equal(plain, sample(model, x, callback=lambda *a: seen.append((a, a[2].clone())), **options))
    assert len({a[2].data_ptr() for a, _ in seen}) == len(seen)
    assert all(torch.equal(a[2], copy) for a, copy in seen)


@samplers
def test_the_loop_allocates_two_x_however_many_steps(sample):
    x, places = start(), set()

    def denoise(x, t):
        places.add(x.data_ptr())
        return model(x, t)

    if sample is SAMPLERS["edm churn"]:
        pytest.skip("edm_denoiser scales x for its network")
    sample(denoise, x)
    assert x.data_ptr() in places and len(places) <= 3  # the caller's, and the two that take turns


@guided
def test_guidance_mixes_the_pair(sample):
    x, w = start(), 2.5

    def unconditional(x, t):
        return 0.5 * model(x.flip(-1), t)

    def pair(x, t):
        return model(x, t), unconditional(x, t)

    def mixed(x, t):
        return unconditional(x, t) + w * (model(x, t) - unconditional(x, t))

    torch.testing.assert_close(sample(pair, x, guidance=w, seed=1), sample(mixed, x, seed=1), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(sample(pair, x, guidance=1.0, seed=1), sample(model, x, seed=1), rtol=1e-4, atol=1e-4)
    for denoise, options in ((pair, {}), (model, {"guidance": w}), (lambda x, t: (x, x, x), {"guidance": w})):
        with pytest.raises(InputError, match=r"denoise returned .* must return .* pair"):
            sample(denoise, x, **options)


@pytest.mark.parametrize("name", ["DDIMScheduler", "DPMSolverMultistepScheduler", "UniPCMultistepScheduler"])
def test_the_dynamic_threshold_equals_diffusers(name):
    diffusers = pytest.importorskip("diffusers", reason="the oracle of the samplers is diffusers")
    ddim_only = {"clip_sample": False, "steps_offset": 1, "set_alpha_to_one": False, "timestep_spacing": "leading"}
    scheduler = getattr(diffusers, name)(
        beta_schedule="scaled_linear", beta_start=0.0015, beta_end=0.0155, thresholding=True, sample_max_value=1e9,
        dynamic_thresholding_ratio=0.9, **(ddim_only if name == "DDIMScheduler" else {}),
    )  # fmt: skip
    scheduler.set_timesteps(20)
    theirs = x = start()
    extra = {"use_clipped_model_output": True} if name == "DDIMScheduler" else {}
    for t in scheduler.timesteps:
        theirs = scheduler.step(model(theirs, t.expand(3)), t, theirs, **extra).prev_sample
    options, limits = {"clip": 1.0, "quantile": 0.9}, []
    if name == "DDIMScheduler":
        ours = ddim(model, x, ALPHA_BAR, steps=20, **options)
    else:
        solve = dpm_solver_pp if name.startswith("DPM") else unipc
        ours = solve(model, x, vp_path(ALPHA_BAR, spaced_timesteps(20, 1000, "inner")), **options)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4 * theirs.abs().mean().item())
    ddim(model, x, ALPHA_BAR, steps=20, callback=lambda i, t, x, x0: limits.append(x0.abs().max()), **options)
    assert max(limits) <= 1


def test_the_noise_is_that_of_ops_normal():
    x, seed = start(), 9
    a, b = ALPHA_BAR[[1, 501]]
    ours = ddim(lambda x, t: torch.zeros_like(x), x, ALPHA_BAR, steps=2, eta=1.0, seed=seed, sample_ids=IDS)
    for before, after, draw in ((b, a, 1), (a, ALPHA_BAR[0], 2)):
        sigma = ((1 - after) / (1 - before) * (1 - before / after)).sqrt()
        x = (after / before).sqrt() * x + sigma * ops.normal(x.shape, seed, IDS, draw)
    torch.testing.assert_close(ours, x.float())


def test_a_generator_draws_from_torchs_own_stream():
    x, e = start(), torch.randn(3, 2, 5, 7, generator=torch.Generator().manual_seed(4))
    ours = ddpm(lambda x, t: x, x, ALPHA_BAR, steps=2, prediction="x0", generator=torch.Generator().manual_seed(4))
    seen = []
    ddpm(lambda x, t: x, x, ALPHA_BAR, steps=2, prediction="x0", seed=0, callback=lambda *a: seen.append(a[2]))
    table = ddpm_coefficients(ALPHA_BAR, torch.tensor([0, 500]), "x0")[1]
    once = (table[2] + table[3]) * x + table[4] * e
    torch.testing.assert_close(ours, once.float())  # the last step returns x0, here its input
    assert not torch.allclose(seen[1], ours)
    with pytest.raises(InputError, match="generator and seed are both given"):
        ddpm(model, x, ALPHA_BAR, steps=2, seed=3, generator=torch.Generator())


def test_a_walk_is_the_loop():
    x, stages, calls = start(), stages_of("unipc", ALPHA_BAR, 5), 0
    walk = Walk(x, stages, seed=1)
    while (time := walk.time) is not None:
        assert time.shape == (3,) and time.dtype == torch.int64 and walk.calls == calls
        walk.advance(model(walk.x, time))
        calls += 1
    assert calls == 5 and torch.equal(walk.x, run(model, x, stages))


def test_an_unknown_option_is_refused():
    with pytest.raises(TypeError, match="churn"):
        euler(model, start(), PATH, churn=1.0)
