"""What the VAEs minimise, against torch.distributions, closed forms and float64."""

import numpy as np
import pytest
import torch
from _vaes import OBJECTIVES, tiny
from torch.distributions import Bernoulli, Normal, kl_divergence

from encdiff.baselines import VAE, objectives
from encdiff.baselines.network import Discriminator
from encdiff.errors import InputError


def images(count=7, size=16):
    return torch.rand(count, 3, size, size) * 2 - 1


def terms(model, x, seed=3, **given):
    if model.config.objective == "anneal":
        given.setdefault("capacity", torch.tensor(2.5))
    return model.terms(x, seed=seed, sample_ids=torch.arange(len(x)) + 11, draw=2, **given)


def test_kl_and_densities_are_those_of_torch():
    mean, log_variance, z = torch.randn(3, 5, 7, dtype=torch.float64)
    q = Normal(mean, (log_variance / 2).exp())
    known = kl_divergence(q, Normal(torch.zeros_like(mean), torch.ones_like(mean)))
    torch.testing.assert_close(objectives.kl(mean, log_variance), known)
    torch.testing.assert_close(objectives.log_normal(z, mean, log_variance), q.log_prob(z))


def test_bernoulli_is_the_cross_entropy_of_every_number():
    logits, x = torch.randn(3, 3, 4, 4), torch.rand(3, 3, 4, 4)
    p = Bernoulli(logits=logits)
    known = -(x * p.log_prob(torch.ones_like(x)) + (1 - x) * p.log_prob(torch.zeros_like(x))).sum((1, 2, 3))
    torch.testing.assert_close(objectives.bernoulli(logits, x), known)


@pytest.mark.parametrize("correlation", [0.0, 0.6, 0.9])
def test_total_correlation_is_that_of_a_gaussian(correlation):
    """Means drawn so that the mixture of all posteriors is N(0, R): its total correlation is -log det(R) / 2."""
    n, variance, count = 3, 0.05, 2000
    r = (1 - correlation) * torch.eye(n) + correlation * torch.ones(n, n)
    means = torch.distributions.MultivariateNormal(torch.zeros(n), r - variance * torch.eye(n))
    mean = means.sample((count,))
    log_variance = torch.full_like(mean, variance).log()
    z = mean + variance**0.5 * torch.randn_like(mean)
    found, known = objectives.total_correlation(z, mean, log_variance), -0.5 * torch.logdet(r)
    assert abs(found - known) < 0.12, (found, known)  # the batch for the population: a few hundredths too much


def test_total_correlation_has_the_gradient_without_its_constant():
    """disentanglement_lib leaves it out: log q(z_j) up to log B."""
    mean = torch.randn(6, 4, requires_grad=True)
    z = mean + 0.5 * torch.randn(6, 4)
    density = Normal(mean[None], torch.ones(())).log_prob(z[:, None])
    theirs = (density.sum(2).logsumexp(1) - density.logsumexp(1).sum(1)).mean()
    ours = objectives.total_correlation(z, mean, torch.zeros(6, 4))
    torch.testing.assert_close(ours - theirs, torch.tensor(3 * np.log(6), dtype=torch.float32))
    (a,), (b,) = (torch.autograd.grad(f, mean, retain_graph=True) for f in (ours, theirs))
    torch.testing.assert_close(a, b)


@pytest.mark.parametrize("second", [False, True])
def test_dip_is_the_distance_of_the_covariance_from_the_identity(second):
    mean, log_variance = torch.randn(2, 9, 5)
    mean = mean + 3  # the mean must not count
    cov = np.cov(mean.double().numpy(), rowvar=False, bias=True)
    if second:
        cov += np.diag(np.exp(log_variance.double().numpy()).mean(0))
    off = cov - np.diag(np.diag(cov))
    known = 0.7 * (off**2).sum() + 2.5 * ((np.diag(cov) - 1) ** 2).sum()
    found = objectives.dip(mean, log_variance if second else None, 0.7, 2.5)
    assert float(found) == pytest.approx(known, rel=1e-4)


def test_capacity_rises_in_a_line_and_stays():
    found = [objectives.capacity(step, 12, 8.0, 0.5) for step in (0, 1, 3, 6, 7, 12)]
    assert found == pytest.approx([0, 8 / 6, 4, 8, 8, 8])


def test_permuted_columns_hold_the_same_numbers_each_in_its_own_order():
    z, keys = torch.randn(40, 6), torch.rand(40, 6)
    found = objectives.permuted(z, keys)
    assert torch.equal(found.sort(0).values, z.sort(0).values)
    orders = torch.argsort(keys, dim=0)
    assert all(torch.equal(found[:, i], z[orders[:, i], i]) for i in range(6))
    assert not torch.equal(orders[:, 0], orders[:, 1])


@pytest.mark.parametrize("correlation", [0.0, 0.8])
def test_a_discriminator_learns_the_density_ratio(correlation):
    """Of Gaussian codes: E log q(z) / prod q(z_l) is their total correlation, -log(1 - r^2) / 2 of two."""
    d = Discriminator(2, 32, 2)
    optimizer = torch.optim.Adam(d.parameters(), 5e-3)

    def draw(count):
        a, b = torch.randn(2, count)
        return torch.stack([a, correlation * a + (1 - correlation**2) ** 0.5 * b], 1)

    for _ in range(300):
        z = draw(512)
        loss = objectives.discriminator_loss(d(z), d(objectives.permuted(z, torch.rand(512, 2))))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    z, known = draw(4000), -0.5 * np.log(1 - correlation**2)
    assert d(z, fixed=True).mean().item() == pytest.approx(known, abs=0.12)
    assert loss.item() == pytest.approx(np.log(2), abs=0.03) if correlation == 0 else loss.item() < 0.6


def test_gradients_do_not_cross_between_the_vae_and_its_discriminator():
    model, x = VAE(tiny("factor")), images()
    found = terms(model, x)
    for name, parts, apart in (
        ("total_correlation", model.image_encoder, model.discriminator),
        ("discriminator", model.discriminator, model.image_encoder),
    ):
        model.zero_grad()
        found[name].backward(retain_graph=True)
        assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in parts.parameters()), name
        assert all(p.grad is None or not p.grad.any() for p in apart.parameters()), name
    model.zero_grad()
    (found["reconstruction"] + found["kl"].sum()).backward()
    assert all(p.grad is None for p in model.discriminator.parameters())


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_loss_is_the_sum_that_its_paper_gives(objective):
    model, x = VAE(tiny(objective)), images()
    found, c = terms(model, x), model.config
    kl = found["kl"].sum()
    known = {
        "beta": lambda: 4 * kl,
        "anneal": lambda: 1000 * abs(kl - 2.5),
        "tc": lambda: kl + 5 * found["total_correlation"],
        "factor": lambda: kl + c.gamma * found["total_correlation"] + found["discriminator"],
        "dip-i": lambda: kl + found["dip"],
        "dip-ii": lambda: kl + found["dip"],
    }[objective]()
    torch.testing.assert_close(found["loss"], found["reconstruction"] + known)
    mean, log_variance = model.posterior(x)  # in training mode, of the same batch
    torch.testing.assert_close(found["kl"], objectives.kl(mean, log_variance).mean(0))
    if "dip" in found:
        spread = log_variance if objective == "dip-ii" else None
        torch.testing.assert_close(found["dip"], objectives.dip(mean, spread, c.lambda_od, c.lambda_d))


def test_noise_is_of_the_key_and_nothing_else():
    model, x = VAE(tiny()).eval(), images()
    whole, torch_state = terms(model, x), torch.get_rng_state()
    torch.manual_seed(5)
    assert torch.equal(terms(model, x)["loss"], whole["loss"])
    assert not torch.equal(terms(model, x, seed=4)["reconstruction"], whole["reconstruction"])
    torch.set_rng_state(torch_state)
    parts = [model.terms(x[i : i + 1], seed=3, sample_ids=torch.tensor([11 + i]), draw=2) for i in range(len(x))]
    mean = torch.stack([part["reconstruction"] for part in parts]).mean()
    torch.testing.assert_close(mean, whole["reconstruction"])  # a sample's noise is its own, whatever the batch


def test_anneal_needs_its_capacity():
    with pytest.raises(
        InputError, match=r"^capacity is None, must be C\(t\), a scalar tensor, for objective 'anneal'$"
    ):
        terms(VAE(tiny("anneal")), images(), capacity=None)
