"""The flow of vorticity: exact decay, exact transport at the start, what it conserves, and its order in time."""

import numpy as np
import pytest
from scipy.fft import irfft2, rfft2

from encdiff.errors import InputError
from encdiff.fields.vorticity import Vorticity, advance, fastest, gaussian_field, solve

PI = np.pi


def centres(size):
    return np.meshgrid(*[(np.arange(size) + 0.5) / size] * 2)


def random(size, seed=3, strength=5.0):
    return strength * gaussian_field(np.random.default_rng(seed), size, 2.5, 7.0)


def energy(vorticity):
    """Mean of |u|^2 / 2, by a sum over waves."""
    size = len(vorticity)
    k = 2 * PI * np.fft.fftfreq(size, 1 / size)
    square = k[:, None] ** 2 + k**2
    square[0, 0] = np.inf
    return (np.abs(np.fft.fft2(vorticity)) ** 2 / square).sum() / size**4 / 2


def test_taylor_green_vortices_decay_exactly():
    x, y = centres(32)
    start, times, viscosity = np.sin(4 * PI * x) * np.sin(4 * PI * y), np.array([0.0, 0.3, 1.0]), 0.01
    exact = start * np.exp(-2 * (4 * PI) ** 2 * viscosity * times)[:, None, None]
    np.testing.assert_allclose(solve(start, times, viscosity), exact, atol=1e-13)


def test_transport_at_the_start():
    """Of cos(2 pi x) + cos(4 pi y), whose flow is u = -sin(4 pi y) / 4 pi, v = sin(2 pi x) / 2 pi."""
    x, y = centres(24)
    w = np.cos(2 * PI * x) + np.cos(4 * PI * y)
    u, v = -np.sin(4 * PI * y) / (4 * PI), np.sin(2 * PI * x) / (2 * PI)
    rate = u * 2 * PI * np.sin(2 * PI * x) + v * 4 * PI * np.sin(4 * PI * y)
    step = 1e-5
    found = np.diff(solve(w, np.array([0, step]), 0.0), axis=0)[0] / step
    np.testing.assert_allclose(found, rate, atol=1e-4)
    assert fastest(rfft2(w)) == pytest.approx((np.abs(u) + np.abs(v)).max())


def test_mean_vorticity_is_conserved():
    frames = solve(random(16) + 3, np.linspace(0, 1, 4), 1e-3)
    np.testing.assert_allclose(frames.mean((1, 2)), 3, rtol=1e-12)


def test_without_viscosity_energy_and_enstrophy_are_conserved():
    """But for the Runge-Kutta method's own loss, which falls by 2^5 where the step is halved."""
    start = random(32)
    ends = [irfft2(advance(rfft2(start), 0.5, n, 0.0), start.shape) for n in (40, 80, 160)]
    assert np.abs(ends[-1] - start).max() > 5, "the flow moved"
    loss = [1 - (end**2).mean() / (start**2).mean() for end in ends]
    order = np.log2(np.array(loss[:-1]) / loss[1:])
    assert (order > 4.8).all() and (order < 5.2).all(), loss
    assert abs(loss[-1]) < 1e-8 and abs(1 - energy(ends[-1]) / energy(start)) < 1e-10


def test_viscosity_takes_energy():
    """The rate is 2 nu (enstrophy / 2), the mean of w^2 times nu."""
    frames = solve(random(32), np.array([0.2, 0.2 + 1e-4]), 1e-2)
    rate = (energy(frames[1]) - energy(frames[0])) / 1e-4
    assert rate == pytest.approx(-1e-2 * (frames**2).mean(), rel=1e-5)


def test_order_in_time_is_4():
    start, size = rfft2(random(24)), 24
    exact = advance(start, 0.5, 640, 1e-3)
    errors = [np.abs(irfft2(advance(start, 0.5, n, 1e-3) - exact, (size, size))).max() for n in (40, 80, 160)]
    order = np.log2(np.array(errors[:-1]) / errors[1:])
    assert (order > 3.8).all() and (order < 4.3).all(), errors


def test_a_finer_step_changes_little():
    times = np.array([0, 1.0])
    coarse, fine = (solve(random(32), times, 1e-3, cfl)[1] for cfl in (0.5, 0.1))
    assert np.abs(coarse - fine).max() < 1e-4 * np.abs(fine).max()


def test_mean_square_of_the_random_field():
    rng = np.random.default_rng(4)
    squares = [(gaussian_field(rng, 16, 2.5, 7.0) ** 2).mean() for _ in range(400)]
    assert abs(np.mean(squares) - 1) < 5 * np.std(squares) / 20


def test_samples():
    flow = Vorticity(size=16, frames=4, duration=0.3)
    frames = flow.sample(np.random.default_rng(1))
    assert frames.shape == (4, 1, 16, 16) and flow.grid.periodic
    np.testing.assert_allclose(flow.times, [0, 0.1, 0.2, 0.3])
    start = 5 * gaussian_field(np.random.default_rng(1), 16, 2.5, 7.0)
    np.testing.assert_allclose(frames[0, 0], start, atol=1e-12)
    np.testing.assert_allclose(frames[:, 0], solve(frames[0, 0], flow.times, 1e-3), atol=1e-10)


def test_refusals():
    start = random(8)
    with pytest.raises(InputError, match=r"^start \(8, 7\) must be \(N, N\)"):
        solve(start[:, :7], np.array([0.0]), 0.0)
    for times in ([1.0, 0.5], [-1.0], [[0.0]], [np.nan]):
        with pytest.raises(InputError, match="^times must be increasing"):
            solve(start, np.array(times), 0.0)
    with pytest.raises(InputError, match=r"^the flow needs .* steps to time 1e\+09, must be at most 1,000,000"):
        solve(start, np.array([1e9]), 0.0)
    with pytest.raises(InputError, match="^frames is 1, must be"):
        Vorticity(frames=1)
