"""Darcy flow, -div(a grad u) = f on the unit square with u = 0 on its border, through a medium of two permeabilities.

The medium is the one that neural operators are compared on (arXiv 2010.08895): a Gaussian random field, cut at 0.
Finite volumes: unknowns at the pixels' centres, half a pixel from the border, with the harmonic mean of the
permeabilities on the face between two pixels, which is exact where the medium jumps there.
"""

from dataclasses import dataclass
from typing import Annotated

import numpy as np
from scipy.fft import idctn
from scipy.sparse import diags_array
from scipy.sparse.linalg import spsolve

from encdiff.checked import Checked, NotNegative, Positive, Range
from encdiff.errors import InputError
from encdiff.fields.grid import Grid


@dataclass(frozen=True)
class Darcy(Checked):
    """Fields of permeability, `low` or `high`, and the pressure that a source of 1 everywhere gives.

    `alpha` and `tau` are those of `gaussian_field`, whose negative parts become `low`.
    """

    size: Annotated[int, Range(4, 1024)] = 64
    low: Positive = 3.0
    high: Positive = 12.0
    alpha: Annotated[float, Range(1, 16, above=True)] = 2.0
    tau: NotNegative = 3.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.low > self.high:
            raise InputError(f"low and high are {self.low:g} and {self.high:g}, must be the lower, then the higher")

    @property
    def grid(self) -> Grid:
        return Grid(("permeability", "pressure"), self.size, self.size)

    @property
    def times(self) -> None:
        """The flow is steady."""

    def sample(self, rng: np.random.Generator) -> np.ndarray:
        """float64 (2, size, size)."""
        field = gaussian_field(rng, self.size, self.alpha, self.tau)
        permeability = np.where(field < 0, self.low, self.high)
        return np.stack([permeability, solve(permeability)])


def gaussian_field(rng: np.random.Generator, size: int, alpha: float, tau: float) -> np.ndarray:
    """float64 (size, size): a draw of mean 0 and covariance (-Laplace + tau^2)^-alpha on the unit square.

    The Laplace operator has no flux through the border; its constant function is left out, as in the published
    generator. Finite for alpha > 1.
    """
    k = np.pi * np.arange(size)
    eigenvalues = k[:, None] ** 2 + k**2 + tau**2
    eigenvalues[0, 0] = np.inf
    # the orthonormal cosines of vectors are those of functions divided by the square root of the pixels' number
    return size * idctn(rng.standard_normal((size, size)) * eigenvalues ** (-alpha / 2), norm="ortho")


def solve(permeability: np.ndarray, source: float | np.ndarray = 1.0) -> np.ndarray:
    """The pressure, float64 (H, W), that a source, one number or (H, W), gives with a permeability (H, W).

    InputError for a permeability that is not above 0 and finite everywhere, of less than 2 x 2 pixels, or of another
    shape than the source.
    """
    a = np.asarray(permeability, dtype=np.float64)
    if a.ndim != 2 or min(a.shape) < 2 or not (np.isfinite(a) & (a > 0)).all():
        raise InputError(f"permeability {a.shape} must be (H, W), 2 or more each, of finite numbers above 0")
    if np.shape(source) not in ((), a.shape) or not np.isfinite(source).all():
        raise InputError(f"source {np.shape(source)} must be finite, one number or {a.shape}")
    height, width = a.shape
    # through a face flows its conductance times the difference of pressures: a (length of face) / (distance)
    across, up = a * width / height, a * height / width
    right, above = _harmonic(across[:, :-1], across[:, 1:]), _harmonic(up[:-1], up[1:])
    diagonal = np.zeros_like(a)
    for part, conductance in (
        (np.s_[:, :-1], right), (np.s_[:, 1:], right), (np.s_[:-1], above), (np.s_[1:], above),
        (np.s_[:, 0], 2 * across[:, 0]), (np.s_[:, -1], 2 * across[:, -1]),
        (np.s_[0], 2 * up[0]), (np.s_[-1], 2 * up[-1]),
    ):  # fmt: skip
        diagonal[part] += conductance
    right = np.pad(right, ((0, 0), (0, 1))).ravel()[:-1]  # the last pixel of a row is no neighbour of the next row's
    bands = [diagonal.ravel(), -right, -right, -above.ravel(), -above.ravel()]
    matrix = diags_array(bands, offsets=[0, 1, -1, width, -width], format="csc")
    matrix.eliminate_zeros()
    flow = np.broadcast_to(np.asarray(source, dtype=np.float64) / a.size, a.shape)
    return spsolve(matrix, flow.ravel(), permc_spec="MMD_AT_PLUS_A").reshape(a.shape)


def _harmonic(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return 2 * a * b / (a + b)
