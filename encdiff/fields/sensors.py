"""What was measured: where, which channels, how exactly, and when."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from encdiff.errors import InputError
from encdiff.fields.grid import Grid

MOST = 1e30  # of values and sigma: what float32 holds, and the square of what float64 does


def merging(which: np.ndarray, sigma: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The weights (S,) by which values of a group become one, by inverse variances, and its sigma (groups,).

    `which` (S,) is each one's group; where some are exact (sigma 0) these alone count. Weights of a group add up to 1.
    """
    least = np.full(which.max() + 1, np.inf)
    np.minimum.at(least, which, sigma)
    with np.errstate(invalid="ignore"):  # relative to the group's least: no square overflows
        weights = np.where(least[which] > 0, (least[which] / sigma) ** 2, sigma == 0)
    total = np.bincount(which, weights)
    return weights / total[which], least / np.sqrt(total)


@dataclass(frozen=True)
class Sensors:
    """S measurements of a field's C channels.

    Attributes:
        points: float64 (S, 2), x and y in the units of the grid's domain.
        values: float64 (S, C) in the field's units; NaN: this channel is not measured there.
        sigma: float64 (S, C), the standard deviation of each value's noise; 0: exact.
        times: float64 (S,), when each was measured; None: all at the time of the field.
        lines: int64 (S,), the line of the file that each is from, for errors.
        source: the file's name, for errors.
    """

    points: np.ndarray
    values: np.ndarray
    sigma: np.ndarray
    times: np.ndarray | None = None
    lines: np.ndarray | None = None
    source: str = "sensors"

    @classmethod
    def of(cls, points, values, sigma=0.0, times=None) -> "Sensors":
        """From arrays, or what becomes one: points (S, 2), values (S,) or (S, C), sigma and times of a shape that fits.

        Raises InputError for shapes that do not fit.
        """
        points, values, sigma = (np.asarray(a, dtype=np.float64) for a in (points, values, sigma))
        if values.ndim == 1:
            values, sigma = values[:, None], sigma[..., None]
        if points.ndim != 2 or points.shape[1] != 2 or values.ndim != 2 or len(values) != len(points):
            raise InputError(f"points {points.shape} and values {values.shape} must be (S, 2) and (S, C)")
        try:
            sigma = np.broadcast_to(sigma, values.shape).copy()
            times = None if times is None else np.broadcast_to(np.asarray(times, float), len(points)).copy()
        except ValueError:
            raise InputError(f"sigma and times must be numbers, or fit values {values.shape}") from None
        return cls(points, values, sigma, times)

    def __len__(self) -> int:
        return len(self.points)

    def select(self, which: np.ndarray) -> "Sensors":
        """Those of a mask or of indices (S',)."""
        parts: dict[str, Any] = {name: getattr(self, name) for name in ("points", "values", "sigma", "times", "lines")}
        parts = {name: None if part is None else part[which] for name, part in parts.items()}
        return replace(self, **parts)

    def joined(self, other: "Sensors") -> "Sensors":
        """These and others, of which either both have times or none."""
        if (self.times is None) != (other.times is None):
            raise InputError(f"{self.source} and {other.source}: one has times, must be both or none")
        times = None if self.times is None or other.times is None else np.concatenate([self.times, other.times])
        pairs = ((self.points, other.points), (self.values, other.values), (self.sigma, other.sigma))
        points, values, sigma = map(np.concatenate, pairs)
        return Sensors(points, values, sigma, times, source=self.source)

    def until(self, time: float, memory: float = np.inf) -> "Sensors":
        """Those measured at that time or at most `memory` before; InputError where there are none."""
        if self.times is None:
            return self
        if not (before := self.times <= time).any():
            raise InputError(f"time is {time:g}, before the first of {self.source} at {self.times.min():g}")
        last = self.times[before].max()
        if not (found := before & (time - self.times <= memory * (1 + 1e-9))).any():  # of times that were rounded
            raise InputError(
                f"time is {time:g}, the last of {self.source} before is at {last:g}; the model remembers {memory:g}"
            )
        return self.select(found)

    def check(self, grid: Grid) -> None:
        """InputError, naming the first at fault, unless these are measurements of a field on this grid."""
        channels = len(grid.channels)
        if not len(self):
            raise InputError(f"{self.source}: holds no sensors, must hold at least one")
        if self.values.shape[1] != channels:
            raise InputError(
                f"{self.source}: has values of {self.values.shape[1]} channels, must be {channels}: "
                + ", ".join(grid.channels)
            )
        x0, x1, y0, y1 = grid.domain
        for axis, name, low, high in ((0, "x", x0, x1), (1, "y", y0, y1)):
            at = self.points[:, axis]
            why = f"must lie in {low:g} to {high:g}; are the units those of the model's domain?"
            self.refuse(
                ~((at >= low) & (at <= high)), lambda s, at=at, name=name, why=why: f"{name} is {at[s]:g}, {why}"
            )
        measured = ~np.isnan(self.values)
        self.refuse(~measured.any(1), lambda s: "has no value, must have one of at least one channel")
        large = np.abs(self.values) > MOST
        self.refuse(
            large.any(1), lambda s: f"value is {self.values[s][large[s]][0]:g}, must lie in {-MOST:g} to {MOST:g}"
        )
        wrong = measured & ~((self.sigma >= 0) & (self.sigma <= MOST))
        self.refuse(
            wrong.any(1), lambda s: f"sigma is {self.sigma[s][wrong[s]][0]:g}, must be 0 or more, at most {MOST:g}"
        )
        if (t := self.times) is not None:
            self.refuse(~np.isfinite(t), lambda s, t=t: f"t is {t[s]:g}, must be finite")
        self._refuse_contradictions(measured)

    def _refuse_contradictions(self, measured: np.ndarray) -> None:
        """Two exact values of one channel at one place and time must be one."""
        times = np.zeros(len(self)) if self.times is None else self.times
        for c in range(self.values.shape[1]):
            exact = np.flatnonzero(measured[:, c] & (self.sigma[:, c] == 0))
            order = exact[np.lexsort((times[exact], *self.points[exact].T))]
            here, there = order[:-1], order[1:]
            same = (self.points[here] == self.points[there]).all(1) & (times[here] == times[there])
            other = np.full(len(self), -1)
            bad = same & (self.values[here, c] != self.values[there, c])
            other[there[bad]] = here[bad]
            self.refuse(
                other >= 0,
                lambda s, c=c, other=other: (
                    f"value is {self.values[s, c]!s}, on {self._place(other[s])} at the same place and time "
                    f"{self.values[other[s], c]!s}; both cannot be exact (sigma 0)"
                ),
            )

    def refuse(self, wrong: np.ndarray, said: Callable[..., str]) -> None:
        """InputError for the first of those that are wrong (S,), with its place and what is said of it."""
        if wrong.any():
            s = int(np.argmax(wrong))
            raise InputError(f"{self.source}, {self._place(s)}: {said(s)}")

    def _place(self, s: int) -> str:
        return f"line {self.lines[s]}" if self.lines is not None else f"sensor {s}"
