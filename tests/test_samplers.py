from pathlib import Path

import numpy as np
import pytest
import torch

from encdiff import ops
from encdiff.diffusion.samplers import ddim, ddim_coefficients, ddim_invert, ddim_rows, ddpm, ddpm_coefficients
from encdiff.diffusion.schedules import alphas_cumprod, ddim_timesteps, ddpm_timesteps, make_betas
from encdiff.errors import InputError
from encdiff.ops._dispatch import record_impls
from encdiff.ops.noise import PREDICTIONS, q_sample

GOLDEN = np.load(Path(__file__).parent / "golden" / "schedules.npz")
ALPHA_BAR = alphas_cumprod(make_betas("scaled_linear"))
DIFFUSERS = {"epsilon": "epsilon", "v": "v_prediction", "x0": "sample"}
CLIPS = pytest.mark.parametrize("clip", [None, 0.6], ids=["no-clip", "clip"])
predictions = pytest.mark.parametrize("prediction", PREDICTIONS)


def model(x, t):
    """A fixed nonlinear function of x_t and t that mixes neighbours."""
    return torch.tanh(1.3 * x.roll(1, -1) - 0.4 * x + 0.2) + 0.3 * torch.sin(t / 100).view(-1, 1, 1, 1)


def noise_like_start(seed=0):
    return torch.randn(3, 2, 5, 7, generator=torch.Generator().manual_seed(seed))


def scheduler_of(name, prediction, clip, **options):
    diffusers = pytest.importorskip("diffusers", reason="the oracle of the samplers is diffusers")
    return getattr(diffusers, name)(
        beta_schedule="scaled_linear", beta_start=0.0015, beta_end=0.0155, prediction_type=DIFFUSERS[prediction],
        clip_sample=clip is not None, clip_sample_range=clip or 1.0, timestep_spacing="leading", **options,
    )  # fmt: skip


def key_noise(monkeypatch, seed):
    """Make diffusers draw the noise that ours draws at the same step."""
    calls = []

    def keyed(shape, **options):
        calls.append(shape)
        return ops.normal(shape, seed, torch.arange(shape[0]), len(calls))

    for name in ("ddim", "ddpm"):
        module = pytest.importorskip(f"diffusers.schedulers.scheduling_{name}", reason="the oracle is diffusers")
        monkeypatch.setattr(module, "randn_tensor", keyed)


def run_diffusers(scheduler, x, steps=20, **options):
    scheduler.set_timesteps(steps)
    for t in scheduler.timesteps:
        x = scheduler.step(model(x, t.expand(len(x))), t, x, **options).prev_sample
    return x


@pytest.mark.parametrize("steps", [10, 50, 200])
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_ddim_rows_equal_golden(steps, eta):
    rows = torch.stack(ddim_rows(ALPHA_BAR, ddim_timesteps(steps, 1000), eta))
    assert rows.dtype == torch.float64
    np.testing.assert_allclose(rows, GOLDEN[f"ddim:{steps}:{eta}"], rtol=1e-12)


@CLIPS
@predictions
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_ddim_equals_diffusers(prediction, eta, clip, monkeypatch):
    key_noise(monkeypatch, 5)
    scheduler = scheduler_of("DDIMScheduler", prediction, clip, steps_offset=1, set_alpha_to_one=False)
    x_T = noise_like_start()
    ours = ddim(model, x_T, ALPHA_BAR, steps=20, eta=eta, prediction=prediction, clip=clip, seed=5)
    theirs = run_diffusers(scheduler, x_T, eta=eta, use_clipped_model_output=True)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4 * theirs.abs().mean().item())


@CLIPS
@predictions
def test_ddpm_equals_diffusers(prediction, clip, monkeypatch):
    key_noise(monkeypatch, 6)
    x_T = noise_like_start()
    ours = ddpm(model, x_T, ALPHA_BAR, steps=20, prediction=prediction, clip=clip, seed=6)
    theirs = run_diffusers(scheduler_of("DDPMScheduler", prediction, clip), x_T)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4 * theirs.abs().mean().item())


@predictions
def test_ddim_inversion_equals_diffusers(prediction):
    x0 = noise_like_start()
    ours = ddim_invert(model, x0, ALPHA_BAR, steps=20, prediction=prediction)
    scheduler = scheduler_of("DDIMInverseScheduler", prediction, None, steps_offset=1, set_alpha_to_one=False)
    torch.testing.assert_close(ours, run_diffusers(scheduler, x0), rtol=1e-4, atol=1e-4)


def exact_model(point, prediction, seen):
    """What a perfect model says when all data are one point; notes the timesteps it is asked for."""

    def denoise(x, t):
        assert t.shape == (len(x),) and t.dtype == torch.int64
        seen.append(t[0].item())
        a = ALPHA_BAR[t].view(-1, 1, 1, 1)
        noise = (x - a.sqrt() * point) / (1 - a).sqrt()
        return q_sample(point.expand_as(x), noise, t, ALPHA_BAR, prediction)[1]

    return denoise


@predictions
@pytest.mark.parametrize("steps", [1, 7, 20, 1000])
def test_ddim_brings_a_perfect_model_to_the_point(prediction, steps):
    x_T, point, seen = noise_like_start().double(), noise_like_start(1)[:1].double(), []
    x = ddim(exact_model(point, prediction, seen), x_T, ALPHA_BAR, steps=steps, prediction=prediction)
    assert seen == ddim_timesteps(steps, 1000).flip(0).tolist()
    a_T, a_0 = ALPHA_BAR[seen[0]], ALPHA_BAR[0]  # the noise stays what it was at the start, its share shrinks
    noise = (x_T - a_T.sqrt() * point) / (1 - a_T).sqrt()
    torch.testing.assert_close(x, a_0.sqrt() * point + (1 - a_0).sqrt() * noise, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("steps", [1, 7, 1000])
def test_inversion_undoes_ddim_where_the_model_says_the_same_both_ways(steps):
    x_T, point = noise_like_start().double(), noise_like_start(1)[:1].double()
    denoise, options = exact_model(point, "x0", []), {"steps": steps, "prediction": "x0"}
    x = ddim(denoise, x_T, ALPHA_BAR, **options)
    torch.testing.assert_close(ddim_invert(denoise, x, ALPHA_BAR, **options), x_T, rtol=1e-9, atol=1e-9)


@predictions
@pytest.mark.parametrize("steps", [1, 7, None])
def test_ddpm_brings_a_perfect_model_to_the_point(prediction, steps):
    x_T, point, seen = noise_like_start().double(), noise_like_start(1)[:1].double(), []
    x = ddpm(exact_model(point, prediction, seen), x_T, ALPHA_BAR, steps=steps, prediction=prediction)
    assert seen == ddpm_timesteps(steps or 1000, 1000).flip(0).tolist()
    torch.testing.assert_close(x, point.expand_as(x), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("sample", [ddpm, lambda *a, **k: ddim(*a, eta=1.0, **k)], ids=["ddpm", "ddim"])
def test_noisy_samplers_draw_the_data_distribution(sample):
    mean, std, n = 0.8, 0.5, 40_000  # x0 ~ N(mean, std^2): E[x0 | x_t] is linear

    def denoise(x, t):
        a = ALPHA_BAR[t[0]].item()
        gain = a**0.5 * std**2 / (a * std**2 + 1 - a)
        return mean + gain * (x - a**0.5 * mean)

    x_T = ops.normal((1, n), 3, torch.tensor([0]))
    x = sample(denoise, x_T, ALPHA_BAR, steps=1000, prediction="x0", seed=3)
    assert x.mean().item() == pytest.approx(mean, abs=5 * std / n**0.5)
    assert x.std().item() == pytest.approx(std, rel=0.02)  # steps of finite length shrink it a little


@predictions
def test_ddim_with_eta_1_is_ddpm(prediction):
    timesteps = ddim_timesteps(40, 1000)
    ours = ddim_coefficients(ALPHA_BAR, timesteps, 1.0, prediction)[1:]  # the first steps end at different alpha_bar
    torch.testing.assert_close(ours, ddpm_coefficients(ALPHA_BAR, timesteps, prediction)[1:], rtol=1e-10, atol=1e-13)


def test_callback_sees_each_step_and_the_x0_it_predicts():
    x_T, seen = noise_like_start(), []
    x = ddim(model, x_T, ALPHA_BAR, steps=4, prediction="v", clip=0.6, callback=lambda *a: seen.append(a))
    assert [(i, t) for i, t, _, _ in seen] == [(0, 751), (1, 501), (2, 251), (3, 1)]
    assert torch.equal(seen[0][2], x_T)
    for _, t, x_t, x0 in seen:  # kept, so the loop must not have written over them
        a = ALPHA_BAR[t].item()
        output = model(x_t, torch.full((3,), t))
        torch.testing.assert_close(x0, (a**0.5 * x_t - (1 - a) ** 0.5 * output).clamp(-0.6, 0.6))
    assert torch.equal(x, ddim(model, x_T, ALPHA_BAR, steps=4, prediction="v", clip=0.6))


def test_without_a_seed_the_global_generator_gives_one():
    x_T = noise_like_start()
    torch.manual_seed(8)
    first, other = (ddim(model, x_T, ALPHA_BAR, steps=5, eta=1.0) for _ in range(2))
    torch.manual_seed(8)
    assert torch.equal(first, ddim(model, x_T, ALPHA_BAR, steps=5, eta=1.0)) and not torch.allclose(first, other)
    state = torch.get_rng_state()
    assert torch.equal(ddim(model, x_T, ALPHA_BAR, steps=5), ddim(model, x_T, ALPHA_BAR, steps=5, seed=1))
    assert torch.equal(torch.get_rng_state(), state), "eta 0 draws nothing"


@pytest.mark.parametrize("sample", [ddpm, lambda *a, **k: ddim(*a, eta=1.0, **k)], ids=["ddpm", "ddim"])
def test_a_seed_keys_the_noise_by_sample_and_step(sample):
    x_T, ids = noise_like_start(), torch.tensor([5, 9, 2])
    whole = sample(model, x_T, ALPHA_BAR, steps=4, seed=3, sample_ids=ids)
    parts = [sample(model, x_T[i : i + 1], ALPHA_BAR, steps=4, seed=3, sample_ids=ids[i : i + 1]) for i in range(3)]
    assert torch.equal(whole, torch.cat(parts))
    assert not torch.allclose(whole, sample(model, x_T, ALPHA_BAR, steps=4, seed=4, sample_ids=ids))


def test_no_gradients_input_kept_and_step_op_used():
    x_T, scale = noise_like_start(), torch.ones((), requires_grad=True)
    kept = x_T.clone()
    with record_impls() as ran:
        x = ddpm(lambda x, t: scale * model(x, t), x_T, ALPHA_BAR.float(), steps=3)
    assert [op for op, _ in ran] == ["step"] * 3
    assert not x.requires_grad and torch.equal(x_T, kept)


def test_bfloat16_stays_near_float32():
    x_T = noise_like_start()
    x = ddim(model, x_T.bfloat16(), ALPHA_BAR, steps=10, prediction="v")
    expected = ddim(model, x_T, ALPHA_BAR, steps=10, prediction="v")
    assert x.dtype == torch.bfloat16
    assert (x.float() - expected).norm() < 0.03 * expected.norm()


def test_schedules_that_reach_pure_noise_need_v_or_x0():
    alpha_bar = torch.linspace(0.99, 0.0, 50, dtype=torch.float64)
    assert ddpm(model, noise_like_start(), alpha_bar, prediction="v").isfinite().all()
    with pytest.raises(InputError, match="too near 0"):
        ddpm(model, noise_like_start(), alpha_bar, prediction="epsilon")


@pytest.mark.parametrize(
    "options,says",
    [
        ({"steps": 0}, "steps is 0"),
        ({"steps": 1001}, "steps is 1001, .* 1 to 1000"),
        ({"eta": -0.1}, "eta is -0.1"),
        ({"eta": 30.0}, "eta is 30.0"),
        ({"eta": float("nan")}, "eta is nan"),
        ({"prediction": "score"}, "prediction is 'score'"),
        ({"clip": -1.0}, "clip is -1.0"),
        ({"alphas_cumprod": torch.ones(1000)}, r"alphas_cumprod \(1000,\) .* \[0, 1\)"),
        ({"alphas_cumprod": ALPHA_BAR[:, None]}, r"alphas_cumprod \(1000, 1\)"),
        ({"denoise": lambda x, t: x[:, :1]}, r"model_output .*\(3, 1, 5, 7\)"),
        ({"x_T": torch.zeros(3, 2, 5, 7, dtype=torch.int64)}, "x_t is torch.int64"),
    ],
)
def test_bad_input(options, says):
    arguments = {"denoise": model, "x_T": noise_like_start(), "alphas_cumprod": ALPHA_BAR} | options
    with pytest.raises(InputError, match=says):
        ddim(**arguments)
