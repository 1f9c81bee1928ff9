"""Incompressible flow in two dimensions on the periodic unit square, as the transport of its vorticity.

dw/dt + u . grad w = nu Laplace w, where u = (dp/dy, -dp/dx) and -Laplace p = w. Pseudo-spectral: products in space,
derivatives in waves, the upper third of the waves left out so that no product folds back onto those that are kept
(Orszag's rule). Viscosity is exact, by an integrating factor; the rest goes by the classical Runge-Kutta method of
order 4.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated, NamedTuple

import numpy as np
from scipy.fft import irfft2, rfft2

from encdiff.checked import Checked, NotNegative, Positive, Range
from encdiff.errors import InputError
from encdiff.fields.grid import Grid

CFL = 0.5  # pixels that the fastest flow passes in a step; RK4 is stable to 1.35: sqrt(8) over the last wave, 2 pi / 3
STEPS = 10**6  # at most so many between two times


@dataclass(frozen=True)
class Vorticity(Checked):
    """Frames of a decaying flow from smooth random vorticity, at equal distances from time 0 to `duration`.

    At the start the vorticity is a Gaussian random field of covariance proportional to (-Laplace + tau^2)^-alpha, of
    mean 0 and of root mean square `strength` on average, in units of 1 / time.
    """

    size: Annotated[int, Range(4, 1024)] = 64
    frames: Annotated[int, Range(2, 1000)] = 20
    duration: Positive = 2.0
    viscosity: NotNegative = 1e-3
    strength: Positive = 5.0
    alpha: Annotated[float, Range(1, 16, above=True)] = 2.5
    tau: NotNegative = 7.0

    @property
    def grid(self) -> Grid:
        return Grid(("vorticity",), self.size, self.size, periodic=True)

    @property
    def times(self) -> np.ndarray:
        return np.linspace(0, self.duration, self.frames)

    def sample(self, rng: np.random.Generator) -> np.ndarray:
        """float64 (frames, 1, size, size)."""
        start = self.strength * gaussian_field(rng, self.size, self.alpha, self.tau)
        return solve(start, self.times, self.viscosity)[:, None]


class _Waves(NamedTuple):
    """Of fields (N, N) in the form of `rfft2`: factors of derivatives, and which waves are kept."""

    x: np.ndarray  # complex (1, N/2 + 1): i k
    y: np.ndarray  # complex (N, 1)
    square: np.ndarray  # float64 (N, N/2 + 1): |k|^2
    kept: np.ndarray  # bool, as square
    inverse: np.ndarray  # 1 / |k|^2, 0 for the mean


@lru_cache(maxsize=4)
def _waves(size: int) -> _Waves:
    x, y = np.arange(size // 2 + 1)[None], np.fft.fftfreq(size, 1 / size)[:, None]
    square = 4 * np.pi**2 * (x**2 + y**2)
    kept = (3 * np.abs(x) < size) & (3 * np.abs(y) < size)
    inverse = np.divide(1, square, out=np.zeros_like(square), where=square > 0)
    return _Waves(2j * np.pi * x, 2j * np.pi * y, square, kept, inverse)


def gaussian_field(rng: np.random.Generator, size: int, alpha: float, tau: float) -> np.ndarray:
    """float64 (size, size): a periodic draw of mean 0, covariance proportional to (-Laplace + tau^2)^-alpha.

    Of the waves that the solver keeps; the expected mean of its squares is 1.
    """
    waves = _waves(size)
    scale = np.where(waves.kept & (waves.square > 0), (waves.square + tau**2) ** (-alpha / 2), 0)
    twice = np.full(size // 2 + 1, 2.0)  # each wave of the half that is stored stands for two, but in this column:
    twice[0] = 1
    scale /= np.sqrt((twice * scale**2).sum()) / size
    return irfft2(rfft2(rng.standard_normal((size, size)), workers=1) * scale, (size, size), workers=1)


def solve(start: np.ndarray, times: np.ndarray, viscosity: float, cfl: float = CFL) -> np.ndarray:
    """The vorticity, float64 (T, N, N), at increasing times (T,) from 0 on; it is `start` (N, N) at time 0.

    Waves of the start above a third of N are left out. The step is `cfl` pixels of the fastest |u| + |v| at the time
    before, at most. InputError for wrong shapes and for a flow that needs more than a million steps between times.
    """
    start, times = np.asarray(start, dtype=np.float64), np.asarray(times, dtype=np.float64)
    if start.ndim != 2 or start.shape[0] != start.shape[1] or not np.isfinite(start).all():
        raise InputError(f"start {start.shape} must be (N, N) of finite numbers")
    if times.ndim != 1 or not (np.diff(times, prepend=0) >= 0).all():
        raise InputError("times must be increasing (T,), from 0 on")
    size, now, frames = len(start), 0.0, []
    state = np.where(_waves(size).kept, rfft2(start, workers=1), 0)
    for time in times:
        steps = np.ceil((time - now) * fastest(state) * size / cfl)
        if not steps <= STEPS:
            raise InputError(f"the flow needs {steps:.3g} steps to time {time:g}, must be at most {STEPS:,}")
        state, now = advance(state, time - now, max(int(steps), 1), viscosity), time
        frames.append(irfft2(state, (size, size), workers=1))
    return np.array(frames).reshape(-1, size, size)


def fastest(state: np.ndarray) -> float:
    """The greatest |u| + |v| of a flow whose vorticity has the waves (N, N/2 + 1)."""
    size, waves = len(state), _waves(len(state))
    stream = waves.inverse * state
    flow = np.stack([waves.y * stream, waves.x * stream])
    return float(np.abs(irfft2(flow, (size, size), workers=1)).sum(0).max())


def advance(state: np.ndarray, duration: float, steps: int, viscosity: float) -> np.ndarray:
    """The waves (N, N/2 + 1) of the vorticity after so many equal steps."""
    step = duration / steps
    half = np.exp(-viscosity * _waves(len(state)).square * step / 2)
    whole = half * half
    for _ in range(steps):
        a = _transport(state)
        b = _transport(half * (state + step / 2 * a))
        c = _transport(half * state + step / 2 * b)
        d = _transport(whole * state + step * half * c)
        state = whole * (state + step / 6 * a) + step / 3 * half * (b + c) + step / 6 * d
    return state


def _transport(state: np.ndarray) -> np.ndarray:
    """The waves of -u . grad w."""
    size, waves = len(state), _waves(len(state))
    stream = waves.inverse * state
    parts = np.stack([waves.y * stream, waves.x * state, waves.x * stream, waves.y * state])
    u, w_x, minus_v, w_y = irfft2(parts, (size, size), workers=1)
    return np.where(waves.kept, rfft2(minus_v * w_y - u * w_x, workers=1), 0)
