from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from encdiff.diffusion.schedules import PUBLISHED, alphas_cumprod, ddim_timesteps, ddpm_timesteps, make_betas
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
    [("scaled_linear", "scaled_linear"), ("linear", "linear"), ("cosine", "squaredcos_cap_v2"), ("sqrt", None)],
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
    ],
)
def test_bad_input(call, says):
    with pytest.raises(InputError, match=says):
        call()
