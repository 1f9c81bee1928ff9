"""The pixels of a field: which channels it has, and where its pixels lie."""

from dataclasses import dataclass

import numpy as np

from encdiff.checked import Checked, Width
from encdiff.errors import InputError


@dataclass(frozen=True)
class Grid(Checked):
    """Where the pixels of fields (C, H, W) lie; rows count y from the domain's low end, columns x.

    The centre of pixel (i, j) is x = x0 + (j + 1/2) (x1 - x0) / W, y = y0 + (i + 1/2) (y1 - y0) / H; its flat index
    is i W + j. A periodic domain begins anew where it ends.
    """

    channels: tuple[str, ...]
    height: Width
    width: Width
    domain: tuple[float, float, float, float] = (0.0, 1.0, 0.0, 1.0)  # x0, x1, y0, y1
    periodic: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        x0, x1, y0, y1 = self.domain
        if not (self.channels and len(set(self.channels)) == len(self.channels)):
            raise InputError(f"channels are {', '.join(self.channels) or 'none'}, must be at least one, each once")
        if not (np.isfinite(self.domain).all() and x0 < x1 and y0 < y1):
            raise InputError(f"domain is {self.domain}, must be x0 < x1, y0 < y1")

    def differs(self, other: "Grid") -> str:
        """What another grid has otherwise, in words; empty where they are one."""
        pairs = ((name, getattr(self, name), getattr(other, name)) for name in self.__dataclass_fields__)
        return ", ".join(f"{name} is {a}, not {b}" for name, a, b in pairs if a != b)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        return len(self.channels), self.height, self.width

    @property
    def origin(self) -> np.ndarray:
        """The domain's low corner x0, y0."""
        return np.array([self.domain[0], self.domain[2]])

    @property
    def extent(self) -> np.ndarray:
        """The domain's width and height."""
        x0, x1, y0, y1 = self.domain
        return np.array([x1 - x0, y1 - y0])

    @property
    def centres(self) -> np.ndarray:
        """x, y of every pixel's centre, float64 (H W, 2)."""
        i, j = np.divmod(np.arange(self.height * self.width), self.width)
        return self.origin + self.extent * (np.stack([j, i], axis=1) + 0.5) / [self.width, self.height]

    def cells(self, points: np.ndarray) -> np.ndarray:
        """The flat indices of the pixels that points (S, 2) of the domain lie in, int64 (S,)."""
        size = np.array([self.width, self.height])
        j, i = np.clip(np.floor((points - self.origin) / self.extent * size).astype(np.int64), 0, size - 1).T
        return i * self.width + j
