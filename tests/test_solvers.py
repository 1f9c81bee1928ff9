import numpy as np
import pytest
import torch

from encdiff import ops
from encdiff.diffusion.edm import edm_denoiser
from encdiff.diffusion.schedules import alphas_cumprod, make_betas, spaced_timesteps, zero_terminal_snr
from encdiff.diffusion.solvers import (
    PREDICTIONS,
    dpm_solver_pp,
    edm_path,
    euler,
    flow_path,
    heun,
    unipc,
    vp_karras_path,
    vp_path,
)  # fmt: skip
from encdiff.errors import InputError
from encdiff.ops import record_impls

ALPHA_BAR = alphas_cumprod(make_betas("scaled_linear"))
DIFFUSERS = {"epsilon": "epsilon", "v": "v_prediction", "x0": "sample"}
STEPS = 20
ALL = pytest.mark.parametrize("solve", [euler, heun, dpm_solver_pp, unipc])


def model(x, t):
    """A fixed nonlinear function of x_t and t that mixes neighbours."""
    return torch.tanh(1.3 * x.roll(1, -1) - 0.4 * x + 0.2) + 0.3 * torch.sin(t.float() / 100).view(-1, 1, 1, 1)


def noise_like_start(seed=0):
    return torch.randn(3, 2, 5, 7, generator=torch.Generator().manual_seed(seed))


def scheduler_of(name, prediction, **options):
    diffusers = pytest.importorskip("diffusers", reason="the oracle of the samplers is diffusers")
    made = getattr(diffusers, name)(
        beta_schedule="scaled_linear",
        beta_start=0.0015,
        beta_end=0.0155,
        prediction_type=DIFFUSERS[prediction],
        **options,
    )
    made.set_timesteps(STEPS)
    return made


def run_diffusers(scheduler, x):
    for t in scheduler.timesteps:
        scaled = scheduler.scale_model_input(x, t)
        x = scheduler.step(model(scaled, t.expand(len(x))), t, x).prev_sample
    return x


def assert_near(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4 * theirs.abs().mean().item())


@pytest.mark.parametrize("spacing,offset", [("linspace", 0), ("leading", 1), ("trailing", 0)])
@pytest.mark.parametrize("solve,name", [(euler, "EulerDiscreteScheduler"), (heun, "HeunDiscreteScheduler")])
@pytest.mark.parametrize("prediction", ["epsilon", "v"])
def test_euler_and_heun_equal_diffusers(solve, name, prediction, spacing, offset):
    scheduler = scheduler_of(name, prediction, timestep_spacing=spacing, steps_offset=offset)
    x = noise_like_start()
    path = vp_path(ALPHA_BAR, spaced_timesteps(STEPS, 1000, spacing, offset))
    theirs = run_diffusers(scheduler, x / path.a[0])  # diffusers keeps x / a
    assert_near(solve(model, x, path, prediction=prediction), theirs)


@pytest.mark.parametrize("karras", [False, True], ids=["even", "karras"])
@pytest.mark.parametrize(
    "solve,name", [(dpm_solver_pp, "DPMSolverMultistepScheduler"), (unipc, "UniPCMultistepScheduler")]
)
@pytest.mark.parametrize("prediction", DIFFUSERS)
def test_multistep_solvers_equal_diffusers(solve, name, prediction, karras):
    scheduler = scheduler_of(name, prediction, use_karras_sigmas=karras)
    x = noise_like_start()
    path = vp_karras_path(ALPHA_BAR, STEPS) if karras else vp_path(ALPHA_BAR, spaced_timesteps(STEPS, 1000, "inner"))
    assert [int(t) for t in path.time] == [int(t) for t in scheduler.timesteps]
    assert_near(solve(model, x, path, prediction=prediction), run_diffusers(scheduler, x))


def test_edm_euler_equals_diffusers():
    diffusers = pytest.importorskip("diffusers", reason="the oracle of the samplers is diffusers")
    scheduler = diffusers.EDMEulerScheduler()
    scheduler.set_timesteps(STEPS)
    x = 80 * noise_like_start()
    assert_near(euler(edm_denoiser(model), x, edm_path(STEPS), prediction="x0"), run_diffusers(scheduler, x))


@pytest.mark.parametrize("churn", [0.0, 5.0, 40.0], ids=["algorithm 1", "algorithm 2", "much churn"])
def test_edm_heun_equals_the_paper(churn):
    denoise, sigma = edm_denoiser(model), [*edm_path(STEPS).time, 0.0]
    x, ids, stage, least, most = noise_like_start().double() * 80, torch.tensor([4, 1, 7]), 0, 0.05, 50.0
    theirs = x
    for now, then in zip(sigma, sigma[1:], strict=False):
        gamma = min(churn / STEPS, 2**0.5 - 1) if least <= now <= most else 0.0
        if gamma:
            stage += 1
            e = ops.normal(x.shape, 3, ids, stage).double()
            theirs = theirs + ((now * (1 + gamma)) ** 2 - now**2) ** 0.5 * 1.003 * e
            now *= 1 + gamma
        slope = (theirs - denoise(theirs, torch.full((3,), now))) / now
        ahead = theirs + (then - now) * slope
        if then > 0:
            ahead = theirs + (then - now) * (slope + (ahead - denoise(ahead, torch.full((3,), then))) / then) / 2
        theirs = ahead
        stage += 2
    stochastic = {"churn": churn, "churn_range": (least, most), "churn_noise": 1.003, "seed": 3, "sample_ids": ids}
    assert_near(heun(denoise, x, edm_path(STEPS), prediction="x0", **stochastic), theirs)


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("solve,name", [(euler, "Euler"), (heun, "Heun")])
def test_flow_equals_diffusers(solve, name, shift):
    diffusers = pytest.importorskip("diffusers", reason="the oracle of the samplers is diffusers")
    scheduler = getattr(diffusers, f"FlowMatch{name}DiscreteScheduler")(shift=shift)
    scheduler.set_timesteps(STEPS)
    theirs = x = noise_like_start()
    for t in scheduler.timesteps:
        theirs = scheduler.step(model(theirs, t.expand(3)), t, theirs).prev_sample
    assert_near(solve(model, x, flow_path(STEPS, shift=shift), prediction="flow"), theirs)


PATHS = {
    "vp": vp_path(ALPHA_BAR, spaced_timesteps(12, 1000, "trailing")),
    "edm": edm_path(12),
    "flow": flow_path(12, shift=2.0),
}


@ALL
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_a_perfect_model_leads_to_the_point(solve, path, prediction):
    point, x, path = noise_like_start(1)[:1].double(), noise_like_start().double(), PATHS[path]
    if prediction == "epsilon" and path.a[0] == 0:
        with pytest.raises(InputError, match="pure noise"):
            solve(model, x, path, prediction=prediction)
        return
    if path.a[0] == 0 and solve in (dpm_solver_pp, unipc):
        path = path._replace(a=[1e-3, *path.a[1:]])  # log(a/s) must exist

    def denoise(x, t):
        i = min(range(len(path.time)), key=lambda j: abs(path.time[j] - t[0].item()))
        a, s = path.a[i], path.s[i]
        e = (x - a * point) / s
        return {"epsilon": e, "v": a * e - s * point, "x0": point.expand_as(x), "flow": e - point}[prediction]

    ours = solve(denoise, x, path, prediction=prediction)
    torch.testing.assert_close(ours, point.expand_as(x), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("solve,order", [(euler, 1), (heun, 2), (dpm_solver_pp, 2), (unipc, 2)])
def test_order_of_convergence(solve, order):
    """Data N(0, 0.5^2): the flow of the exact x0 is known, so halving the step must divide the error by 2^order."""
    start = torch.ones(1, 1, dtype=torch.float64)
    errors = []
    for steps in (40, 80):
        t = torch.linspace(900, 300, steps + 1, dtype=torch.float64)
        path = vp_path(ALPHA_BAR, t)
        inner = path._replace(time=path.time[:-1], a=path.a[:-1], s=path.s[:-1], scale=path.scale[:-1])
        spread = [(0.25 * a * a + s * s) ** 0.5 for a, s in zip(inner.a, inner.s, strict=True)]

        def denoise(x, t, inner=inner, spread=spread):
            i = min(range(len(inner.time)), key=lambda j: abs(inner.time[j] - t[0].item()))
            return 0.25 * inner.a[i] / spread[i] ** 2 * x

        x = solve(denoise, start, inner, prediction="x0")
        errors.append(abs(x.item() - spread[-1] / spread[0]))
    rate = np.log2(errors[0] / errors[1])
    assert rate > order - 0.35, errors


def test_stages_and_calls():
    seen = []
    x = noise_like_start()
    path = vp_path(ALPHA_BAR, spaced_timesteps(4, 1000, "leading", 1))
    with record_impls() as ran:
        heun(model, x, path, callback=lambda i, t, x_t, x0: seen.append((i, t)))
    assert seen == [(0, 751), (1, 501), (2, 501), (3, 251), (4, 251), (5, 1), (6, 1)]
    assert [op for op, _ in ran] == ["step"] * 7
    assert unipc(model, x.bfloat16(), path, clip=1.0).dtype == torch.bfloat16
    assert unipc(model, x, path, clip=0.5).abs().max() <= 0.5


def test_zero_terminal_snr_samples_from_pure_noise():
    alpha_bar = alphas_cumprod(zero_terminal_snr(make_betas("scaled_linear")))
    with pytest.raises(InputError, match="descend"):
        vp_path(alpha_bar, torch.tensor([1.0, 5.0]))
    path = vp_path(ALPHA_BAR, spaced_timesteps(8, 1000, "trailing"))
    assert path.time[0] == 999 and path.s[-1] == 0 and path.a[-1] == 1


@ALL
def test_bad_input(solve):
    path = flow_path(4)
    for call, says in [
        (lambda: solve(model, noise_like_start(), path, prediction="score"), "prediction is 'score'"),
        (lambda: solve(model, noise_like_start(), path, prediction="epsilon"), "pure noise"),
        (lambda: heun(model, noise_like_start(), PATHS["vp"], churn=1.0), "churn is 1.0, must be positive, on a path"),
        (lambda: heun(model, noise_like_start(), PATHS["edm"], churn=-1.0), "churn is -1.0"),
        (lambda: flow_path(0), "steps is 0"),
        (lambda: flow_path(3, shift=0), "shift is 0"),
        (lambda: edm_path(3, sigma_min=0), "sigma_min"),
        (lambda: vp_path(ALPHA_BAR, torch.tensor([1000.0])), "descend within 0 to 999"),
    ]:
        with pytest.raises(InputError, match=says):
            call()


@pytest.mark.parametrize("solve", [euler, dpm_solver_pp, unipc])
def test_pure_noise_at_the_first_level(solve):
    """A schedule with zero terminal SNR: a model that knows x0 is brought to it, from v and from x0."""
    alpha_bar = alphas_cumprod(zero_terminal_snr(make_betas("scaled_linear")))
    path = vp_path(alpha_bar, spaced_timesteps(8, 1000, "trailing"))
    assert path.a[0] == 0 and path.s[0] == 1
    x0, noise = torch.randn(2, 3, 4), torch.randn(2, 3, 4)

    def v(x, t):
        a = alpha_bar[t].sqrt().view(-1, 1, 1).float()
        s = (1 - a * a).sqrt()
        return (a * (x - a * x0) / s - s * x0).float()

    for denoise, prediction in ((v, "v"), (lambda x, t: x0, "x0")):
        torch.testing.assert_close(solve(denoise, noise, path, prediction=prediction), x0, rtol=0, atol=1e-4)
    with pytest.raises(InputError, match="pure noise, without a slope for Heun"):
        heun(v, noise, path, prediction="v")
