from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from encdiff.diffusion.schedules import (
    PUBLISHED,
    SPACINGS,
    alphas_cumprod,
    ddim_timesteps,
    ddpm_timesteps,
    flow_table,
    karras_sigmas,
    make_betas,
    spaced_timesteps,
    zero_terminal_snr,
)  # fmt: skip
from encdiff.diffusion.solvers import vp_path
from encdiff.errors import InputError

GOLDEN = np.load(Path(__file__).parent / "golden" / "schedules.npz")


@pytest.mark.parametrize("name", PUBLISHED)
def test_betas_and_alphas_of_the_published_names_equal_golden(name):
    betas = make_betas(name)
    assert betas.dtype == torch.float64
    np.testing.assert_allclose(betas, GOLDEN[f"betas:{name[4:]}"], rtol=1e-12)
    np.testing.assert_allclose(alphas_cumprod(betas), GOLDEN[f"alphas_cumprod:{name[4:]}"], rtol=1e-12)


@pytest.mark.parametrize("published,ours", PUBLISHED.items())
def test_published_names_are_aliases(published, ours):
    assert torch.equal(make_betas(published, 37, 0.002, 0.03), make_betas(ours, 37, 0.002, 0.03))


@pytest.mark.parametrize(
    "name,theirs",
    [
        ("scaled_linear", "scaled_linear"),
        ("linear", "linear"),
        ("cosine", "squaredcos_cap_v2"),
        ("sqrt", None),
        ("sigmoid", "sigmoid"),
        ("laplace", "laplace"),
    ],
)
@pytest.mark.parametrize("num_timesteps", [1000, 127])
def test_schedules_equal_diffusers(name, theirs, num_timesteps):
    diffusers = pytest.importorskip("diffusers", reason="the oracle of the schedules is diffusers")
    start, end = 0.0007, 0.0123
    trained = np.linspace(start, end, num_timesteps) ** 0.5 if theirs is None else None
    scheduler = diffusers.DDPMScheduler(
        num_timesteps, start, end, beta_schedule=theirs or "linear", trained_betas=trained
    )
    betas = make_betas(name, num_timesteps, start, end)
    np.testing.assert_allclose(betas, scheduler.betas, rtol=1e-5)
    np.testing.assert_allclose(alphas_cumprod(betas), scheduler.betas.double().neg().add(1).cumprod(0), rtol=1e-4)


@pytest.mark.parametrize("name", ["scaled_linear", "sqrt"])
def test_zero_terminal_snr_equals_diffusers(name):
    diffusers = pytest.importorskip("diffusers", reason="the oracle of the schedules is diffusers")
    betas = make_betas(name, 200)
    rescaled = zero_terminal_snr(betas)
    scheduler = diffusers.DDIMScheduler(200, trained_betas=betas.numpy(), rescale_betas_zero_snr=True)
    np.testing.assert_allclose(rescaled, scheduler.betas, rtol=2e-4)  # theirs is a float32 difference of alpha_bars
    alpha_bar = alphas_cumprod(rescaled)
    assert alpha_bar[-1] == 0 and rescaled[-1] == 1
    torch.testing.assert_close(alpha_bar[0], alphas_cumprod(betas)[0])


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("steps", [1, 7, 20, 50])
def test_spacing_equals_diffusers(spacing, steps):
    diffusers = pytest.importorskip("diffusers", reason="the oracle of the schedules is diffusers")
    scheduler = diffusers.EulerDiscreteScheduler(timestep_spacing=spacing, steps_offset=1)
    scheduler.set_timesteps(steps)
    ours = spaced_timesteps(steps, 1000, spacing, offset=1)
    if (spacing, steps) == ("linspace", 1):  # one point of NumPy's linspace is the other end
        assert ours.tolist() == [999]
        return
    np.testing.assert_allclose(ours, scheduler.timesteps, rtol=1e-6)


def test_inner_spacing_leaves_out_both_kinds_of_zero():
    assert spaced_timesteps(4, 1000, "inner").tolist() == [999, 749, 500, 250]


@pytest.mark.parametrize("T", [1, 2, 3, 4, 7, 10, 50, 99, 250, 1000])
@pytest.mark.parametrize("spacing", SPACINGS)
def test_every_number_of_steps_gives_as_many_timesteps_that_descend(spacing, T):
    alpha_bar = alphas_cumprod(make_betas("scaled_linear", T))
    for steps in range(1, T + 1):
        t = spaced_timesteps(steps, T, spacing)
        assert len(t) == steps and 0 <= t[-1] <= t[0] < T
        path = vp_path(alpha_bar, t)  # refuses what does not descend
        assert path.time == t.tolist() and all(s < 1 for s in path.s)


def test_flow_table_and_karras_sigmas():
    table = flow_table(10, shift=1.0)
    torch.testing.assert_close(table[:, 1], torch.arange(1, 11).double() / 10)
    torch.testing.assert_close(flow_table(10, shift=3.0)[4], torch.tensor([0.25, 0.75]).double())
    assert (flow_table(10, shift=3.0).sum(1) - 1).abs().max() < 1e-15
    sigma = karras_sigmas(3, 0.002, 80.0)
    middle = ((0.002 ** (1 / 7) + 80.0 ** (1 / 7)) / 2) ** 7
    assert sigma.tolist() == pytest.approx([80.0, middle, 0.002])


def test_one_timestep():
    assert make_betas("scaled_linear", 1).tolist() == pytest.approx([0.0015])
    assert ddim_timesteps(1, 1).tolist() == [0]


@pytest.mark.parametrize("steps", [10, 50, 200])
def test_ddim_timesteps_equal_golden(steps):
    assert ddim_timesteps(steps, 1000).tolist() == GOLDEN[f"ddim_timesteps:{steps}"].tolist()


@settings(deadline=None)
@given(st.integers(1, 1500).flatmap(lambda T: st.tuples(st.integers(1, T), st.just(T))))
def test_timesteps_are_as_many_as_asked_ascending_evenly_spread_and_in_range(steps_and_T):
    steps, T = steps_and_T
    for t in (ddim_timesteps(steps, T), ddpm_timesteps(steps, T)):
        assert len(t) == steps and t[0] >= 0 and t[-1] < T
        gaps = torch.diff(torch.cat([t, t[:1] + T]))  # the last gap closes the circle
        assert gaps.min() >= 1 and gaps.max() - gaps.min() <= 1
    if T % steps == 0 and steps < T:
        assert ddim_timesteps(steps, T).tolist() == list(range(1, T + 1, T // steps))


@pytest.mark.parametrize(
    "call,says",
    [
        (lambda: make_betas("ldm:cosin"), "schedule is 'ldm:cosin'"),
        (lambda: make_betas("linear", 0), "num_timesteps is 0"),
        (lambda: make_betas("linear", 10, 0.02, 0.01), "beta_start"),
        (lambda: make_betas("sqrt", 10, 0.0, 0.01), "beta_start"),
        (lambda: make_betas("sqrt", 10, 0.1, float("nan")), "beta_start"),
        (lambda: alphas_cumprod(torch.tensor([0.1, 1.1])), "betas"),
        (lambda: alphas_cumprod(torch.full((2, 2), 0.1)), r"betas of shape \(2, 2\)"),
        (lambda: ddim_timesteps(0, 10), "steps is 0"),
        (lambda: ddim_timesteps(11, 10), "steps is 11, .* 1 to 10"),
        (lambda: ddpm_timesteps(2.5, 10), "steps is 2.5"),
        (lambda: spaced_timesteps(2, 10, "even"), "spacing is 'even'"),
        (lambda: spaced_timesteps(11, 10), "steps is 11"),
        (lambda: spaced_timesteps(10, 10, offset=1), "offset is 1"),
        (lambda: flow_table(10, -1.0), "shift is -1.0"),
        (lambda: karras_sigmas(3, 2.0, 1.0), "sigma_min"),
    ],
)
def test_bad_input(call, says):
    with pytest.raises(InputError, match=says):
        call()
