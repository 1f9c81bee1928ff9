import math

import pytest
import torch
from scipy import stats

from encdiff import ops
from encdiff.diffusion.edm import edm_denoiser, edm_loss, edm_preconditioning, edm_sigmas, edm_weight
from encdiff.errors import InputError

IDS = torch.arange(5)


def test_known_answers_of_the_preconditioning():
    sigma = torch.tensor([0.5, 1.2, 0.0001], dtype=torch.float64)  # sigma_data = 0.5
    c_skip, c_out, c_in, c_noise = edm_preconditioning(sigma)
    assert c_skip.tolist() == pytest.approx([0.5, 0.25 / 1.69, 1], rel=1e-6)
    assert c_out.tolist() == pytest.approx([0.5**1.5, 0.6 / 1.3, 0.0001], rel=1e-6)
    assert c_in.tolist() == pytest.approx([2**0.5, 1 / 1.3, 2], rel=1e-6)
    assert c_noise.tolist() == pytest.approx([math.log(0.5) / 4, math.log(1.2) / 4, math.log(0.0001) / 4])
    torch.testing.assert_close(edm_weight(sigma) * c_out**2, torch.ones(3).double())


def test_input_and_target_of_the_network_have_unit_variance():
    """What the preconditioning is for (eqs. 114 to 138): x0 of deviation sigma_data gives F's input and target 1."""
    n, sigma_data = 200_000, 0.3
    for sigma in (0.01, 0.3, 5.0):
        c_skip, c_out, c_in, _ = edm_preconditioning(torch.tensor([sigma]), sigma_data)
        x0, e = sigma_data * torch.randn(n), torch.randn(n)
        x = x0 + sigma * e
        assert (c_in * x).std().item() == pytest.approx(1, rel=0.01)
        assert ((x0 - c_skip * x) / c_out).std().item() == pytest.approx(1, rel=0.01)


def test_training_sigmas_are_log_normal_keyed_and_independent_of_the_noise():
    n = 100_000
    ids = torch.arange(n)
    sigma = edm_sigmas(3, ids, 7)
    assert sigma.shape == (n,) and sigma.dtype == torch.float32
    assert stats.kstest((sigma.log().double().numpy() + 1.2) / 1.2, "norm").pvalue > 1e-4
    assert torch.equal(sigma[40:50], edm_sigmas(3, ids[40:50], torch.tensor(7)))
    moved = edm_sigmas(3, ids, 7, mean=0.5, std=0.1).log()
    torch.testing.assert_close(moved, 0.5 + 0.1 * (sigma.log() + 1.2) / 1.2, rtol=1e-4, atol=1e-5)
    z = ops.normal((n, 1), 3, ids, 7)[:, 0]
    assert torch.corrcoef(torch.stack([sigma.log(), z, z.square()]))[0, 1:].abs().max() < 5 / math.sqrt(n)


def test_the_loss_equals_the_formula():
    x0, sigma, e = torch.randn(5, 2, 3, 3).double(), torch.rand(5).double() + 0.01, torch.randn(5, 2, 3, 3).double()

    def network(x, c_noise):
        assert c_noise.shape == (5,)
        return torch.sin(x) + c_noise.view(-1, 1, 1, 1)

    ours = edm_loss(network, x0, sigma, e)
    s = sigma.view(-1, 1, 1, 1)
    x, d = x0 + s * e, 0.5
    guess = d**2 / (s**2 + d**2) * x
    guess = guess + s * d / (s**2 + d**2).sqrt() * network(x / (s**2 + d**2).sqrt(), sigma.log() / 4)
    expected = ((s**2 + d**2) / (s * d) ** 2 * (guess - x0) ** 2).mean()
    torch.testing.assert_close(ours, expected)


def test_keyed_noise_and_gradients_reach_the_network():
    x0, weight = torch.randn(5, 7), torch.ones((), requires_grad=True)
    sigma = edm_sigmas(1, IDS, 2)
    keyed = edm_loss(lambda x, c: weight * x, x0, sigma, seed=1, sample_ids=IDS, draw=2)
    given = edm_loss(lambda x, c: weight * x, x0, sigma, ops.normal(x0.shape, 1, IDS, 2))
    torch.testing.assert_close(keyed, given)
    keyed.backward()
    assert weight.grad.abs() > 0


def test_a_perfect_network_has_no_loss():
    point = torch.randn(1, 2, 4).double()

    def network(x, c_noise):  # solves D = point for F
        sigma = (4 * c_noise).exp()
        c_skip, c_out, c_in, _ = (c.view(-1, 1, 1) for c in edm_preconditioning(sigma))
        return (point - c_skip * x / c_in) / c_out

    sigma = torch.tensor([0.01, 1.0, 70.0]).double()
    x = point + sigma.view(-1, 1, 1) * torch.randn(3, 2, 4).double()
    torch.testing.assert_close(edm_denoiser(network)(x, sigma), point.expand_as(x))
    assert edm_loss(network, point.expand_as(x), sigma, torch.randn(3, 2, 4).double()) < 1e-20


def test_bad_input():
    with pytest.raises(InputError, match="std is 0"):
        edm_sigmas(0, IDS, std=0)
    with pytest.raises(InputError, match="noise is None"):
        edm_loss(lambda x, c: x, torch.zeros(5, 2), torch.ones(5))
    with pytest.raises(InputError, match="t is .*one per sample of x0"):
        edm_loss(lambda x, c: x, torch.zeros(5, 2), torch.ones(4), torch.zeros(5, 2))
