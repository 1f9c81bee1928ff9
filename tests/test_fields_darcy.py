"""Darcy flow: manufactured solutions, a medium that jumps, and the balance of what flows."""

import numpy as np
import pytest

from encdiff.errors import InputError
from encdiff.fields.darcy import Darcy, gaussian_field, solve

PI = np.pi


def centres(height, width):
    """x and y of the pixels, each (height, width)."""
    return np.meshgrid((np.arange(width) + 0.5) / width, (np.arange(height) + 0.5) / height)


def orders(errors):
    return np.log2(np.array(errors[:-1]) / errors[1:])


def smooth(height, width):
    """Permeability, source and pressure, worked out by hand."""
    x, y = centres(height, width)
    a = 2 + np.sin(2 * PI * x) * np.cos(PI * y)
    a_x, a_y = 2 * PI * np.cos(2 * PI * x) * np.cos(PI * y), -PI * np.sin(2 * PI * x) * np.sin(PI * y)
    u = np.sin(PI * x) * np.sin(2 * PI * y)
    u_x, u_y = PI * np.cos(PI * x) * np.sin(2 * PI * y), 2 * PI * np.sin(PI * x) * np.cos(2 * PI * y)
    return a, -(a_x * u_x + a_y * u_y - 5 * PI**2 * a * u), u


def jump(height, width):
    """As `smooth`, with permeability 1 for x < 1/2 and 5 beyond: the flow of one dimension, times sin(pi y).

    g solves -(a g')' = 1: g = (-x^2 / 2 + c x) / a on the left, (-x^2 / 2 + c x + d) / a on the right.
    """
    x, y = centres(height, width)
    left, right = 1.0, 5.0
    # g is continuous at 1/2 and 0 at 1, the flow a g' is continuous by the same c
    c = (1 / left / 8 + 3 / right / 8) / (1 / left / 2 + 1 / right / 2)
    a = np.where(x < 0.5, left, right)
    g = np.where(x < 0.5, -(x**2) / 2 + c * x, -(x**2) / 2 + c * x + 1 / 2 - c) / a
    return a, (1 + a * PI**2 * g) * np.sin(PI * y), g * np.sin(PI * y)


@pytest.mark.parametrize("case", [smooth, jump])
def test_order_of_convergence_is_2(case):
    greatest, square = [], []
    for size in (16, 32, 64):
        a, source, u = case(size, size * 3 // 2)
        error = solve(a, source) - u
        greatest.append(np.abs(error).max())
        square.append(np.sqrt((error**2).mean()))
    assert (orders(square) > 1.95).all() and (orders(square) < 2.1).all(), square
    assert (orders(greatest) > 1.85).all(), greatest
    assert square[-1] < 5e-4


def test_what_the_source_gives_leaves_through_the_border():
    rng = np.random.default_rng(5)
    a, source = rng.choice([3.0, 12.0], (24, 40)), rng.uniform(0, 2, (24, 40))
    u, (height, width) = solve(a, source), a.shape
    flow = 2 * (a * u)  # from a pixel's centre over half a pixel, through one face of its width
    out = (flow[:, 0] + flow[:, -1]).sum() * width / height + (flow[0] + flow[-1]).sum() * height / width
    assert abs(out - source.mean()) < 1e-10


def test_symmetries():
    a = np.random.default_rng(6).uniform(1, 5, (9, 14))
    u = solve(a)
    np.testing.assert_allclose(solve(a.T), u.T, rtol=1e-10)
    np.testing.assert_allclose(solve(a[::-1]), u[::-1], rtol=1e-10)
    np.testing.assert_allclose(solve(4 * a, 2), u / 2, rtol=1e-10)


def test_covariance_of_the_random_field():
    """Against the sum over cosines, within five standard errors of the draws' own covariance."""
    size, alpha, tau, count = 8, 2.0, 3.0, 4000
    rng = np.random.default_rng(7)
    draws = np.stack([gaussian_field(rng, size, alpha, tau) for _ in range(count)]).reshape(count, -1)
    x = (np.arange(size) + 0.5) / size
    waves = [np.ones(size)] + [np.sqrt(2) * np.cos(PI * k * x) for k in range(1, size)]
    exact = np.zeros((size**2, size**2))
    for k in range(size):
        for m in range(size):
            if k or m:
                wave = np.outer(waves[k], waves[m]).ravel()
                exact += np.outer(wave, wave) * (PI**2 * (k**2 + m**2) + tau**2) ** -alpha
    error = np.sqrt((exact**2 + np.outer(exact.diagonal(), exact.diagonal())) / count)
    assert (np.abs(draws.T @ draws / count - exact) < 5 * error).all()
    assert np.abs(draws.mean(1)).max() < 1e-14


def test_samples():
    darcy = Darcy(size=16)
    a, u = darcy.sample(np.random.default_rng(1))
    assert darcy.grid.shape == (2, 16, 16) and darcy.times is None
    assert set(np.unique(a)) == {3.0, 12.0} and (u > 0).all()
    np.testing.assert_array_equal(u, solve(a))
    shares = [(Darcy(size=8).sample(np.random.default_rng(i))[0] == 12).mean() for i in range(100)]
    assert abs(np.mean(shares) - 0.5) < 5 * np.std(shares) / 10


@pytest.mark.parametrize(
    "a", [np.zeros((4, 4)), np.full((4, 4), np.nan), np.ones(4), np.ones((1, 4)), -np.ones((4, 4))]
)
def test_refuses_permeabilities(a):
    with pytest.raises(InputError, match="^permeability "):
        solve(a)


def test_refuses_sources_and_settings():
    with pytest.raises(InputError, match=r"^source \(3,\) must be finite, one number or \(4, 4\)"):
        solve(np.ones((4, 4)), np.ones(3))
    with pytest.raises(InputError, match="^source "):
        solve(np.ones((4, 4)), np.nan)
    with pytest.raises(InputError, match="^low is 0.0, must be a number above 0"):
        Darcy(low=0.0)
