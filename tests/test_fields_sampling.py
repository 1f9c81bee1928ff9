"""Fields that agree with measurements: against the exact posterior of a Gaussian field."""

import numpy as np
import pytest
import torch

from encdiff.diffusion.edm import edm_preconditioning
from encdiff.errors import InputError
from encdiff.fields import sampling
from encdiff.ops.philox import normal

SIDE = 4


def covariance() -> torch.Tensor:
    """Of a smooth field of SIDE x SIDE pixels with deviation 0.5, float64."""
    at = torch.cartesian_prod(torch.arange(SIDE), torch.arange(SIDE)).double()
    return 0.25 * torch.exp(-(torch.cdist(at, at) ** 2) / 4) + 1e-3 * torch.eye(SIDE**2, dtype=torch.float64)


def posterior(cov: torch.Tensor, known: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and covariance of the field given some of its pixels."""
    gain = cov[:, known] @ torch.linalg.inv(cov[known][:, known])
    return gain @ values, cov - gain @ cov[known]


def exact_denoiser(mean: torch.Tensor, cov: torch.Tensor):
    """E[x0 | x] of x = x0 + sigma e, for a Gaussian field."""

    def denoise(x, sigma):
        flat = x.double().flatten(1)
        s2 = float(sigma[0]) ** 2
        gain = cov @ torch.linalg.inv(cov + s2 * torch.eye(len(cov), dtype=torch.float64))
        return (mean + (flat - mean) @ gain.T).to(x.dtype).view_as(x)

    return denoise


@pytest.mark.parametrize("sampler", ["heun", "dpm-solver++"])
def test_an_ensemble_is_the_exact_posterior_of_a_gaussian_field(sampler):
    """The model knows the posterior; re-imposed pixels and the solver must leave it as it is."""
    cov, known = covariance(), torch.tensor([0, 6, 13])
    values = torch.tensor([0.7, -0.4, 0.2], dtype=torch.float64)
    mean, spread = posterior(cov, known, values)
    count = 4000
    full, mask = torch.zeros(SIDE**2), torch.zeros(SIDE**2, dtype=torch.bool)
    full[known], mask[known] = values.float(), True
    shape = (count, 1, SIDE, SIDE)
    options = {"values": full.view(1, 1, SIDE, SIDE).expand(shape), "known": mask.view(1, 1, SIDE, SIDE).expand(shape)}
    found = sampling.sample(
        exact_denoiser(mean, spread), shape, sampler=sampler, steps=40, sigma_min=0.002, seed=3, **options
    )
    found = found.flatten(1).double()
    assert (found[:, known] == values.float().double()).all(), "to the bit"
    free = ~mask
    # five standard errors of a mean and a covariance over `count` draws
    deviation = spread.diagonal().sqrt()[free]
    assert ((found.mean(0) - mean)[free].abs() < 5 * deviation / count**0.5 + 2e-3).all()
    error = (np.cov(found[:, free].T.numpy()) - spread[free][:, free].numpy()) / np.outer(deviation, deviation)
    assert abs(error).max() < 5 * (2 / count) ** 0.5 + 0.02


def test_steps_converge_to_the_probability_flow():
    """Of one start, more steps of Heun come nearer to the exact flow of a Gaussian field, in second order."""
    cov = covariance()
    denoise = exact_denoiser(torch.zeros(SIDE**2, dtype=torch.float64), cov)
    start = sampling.SIGMA_MAX * normal((1, 1, SIDE, SIDE), 1, torch.arange(1)).double().flatten(1)
    values, vectors = torch.linalg.eigh(cov)
    shrink = ((values + 1e-12) / (values + sampling.SIGMA_MAX**2)).sqrt()  # of each direction, from sigma_max to 0
    exact = (start @ vectors * shrink) @ vectors.T
    errors = []
    for steps in (10, 20, 40):
        x = sampling.sample(denoise, (1, 1, SIDE, SIDE), sampler="heun", steps=steps, sigma_min=0.002, seed=1)
        errors.append(float((x.flatten(1).double() - exact).abs().max()))
    assert errors[0] > 2.5 * errors[1] > 6 * errors[2], errors


def test_guidance_is_exact_for_white_data():
    """Data without correlations, measured with noise: posterior mean and deviation of a measured pixel are known."""
    sigma_data, noise, value, count = 0.5, 0.3, 0.8, 4000
    shape = (count, 1, 2, 2)
    mask = torch.tensor([[1.0, 0.0], [0.0, 0.0]]).expand(shape)

    def denoise(x, sigma):
        skip = edm_preconditioning(sigma, sigma_data)[0]
        return skip.view(-1, 1, 1, 1) * x

    guided = sampling.guided(denoise, value * mask, mask, torch.full(shape, noise), sigma_data)
    found = sampling.sample(guided, shape, steps=40, sigma_min=0.002, seed=0).double()
    precision = 1 / sigma_data**2 + 1 / noise**2
    mean, deviation = value / noise**2 / precision, precision**-0.5
    measured, free = found[:, 0, 0, 0], found[:, 0, 1, 1]
    assert abs(measured.mean() - mean) < 5 * deviation / count**0.5 + 2e-3
    assert abs(measured.std() / deviation - 1) < 5 / (2 * count) ** 0.5 + 0.01
    assert abs(free.mean()) < 5 * sigma_data / count**0.5
    assert abs(free.std() / sigma_data - 1) < 5 / (2 * count) ** 0.5 + 0.01


def test_too_few_steps_for_heun_are_refused():
    with pytest.raises(InputError, match="steps is 5, must be at least 6 for heun; the other samplers take fewer"):
        sampling.sample(lambda x, sigma: x, (1, 1, 2, 2), sampler="heun", steps=5)


def test_an_unknown_sampler_is_refused():
    with pytest.raises(InputError, match="sampler is 'ddim', must be one of heun"):
        sampling.sample(lambda x, sigma: x, (1, 1, 2, 2), sampler="ddim")
