"""A mixture of Gaussians over codes: scikit-learn fits it, a few lines here sample it."""

import warnings
from math import prod
from typing import Any, Self

import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.mixture import GaussianMixture
from threadpoolctl import threadpool_limits
from torch import Tensor

from encdiff import ops
from encdiff.errors import InputError
from encdiff.prior.base import Prior, Progress, check_whole, flat_codes, standardised

COMPONENTS = 50
ITERATIONS = 200


class MixturePrior(Prior):
    """`weights` (K,), `means` (K, D) and lower-triangular `factors` (K, D, D) of K Gaussians, float64; D = N m.

    A component's covariance is its factor times the factor's transpose: `covariances`.
    """

    kind = "mixture"

    def __init__(self, weights: Tensor, means: Tensor, factors: Tensor, code_shape: tuple[int, ...], fitted: int):
        super().__init__(code_shape, fitted)
        self.weights, self.means, self.factors = weights, means, factors

    @classmethod
    def fit(cls, codes: Any, components: int = COMPONENTS, *, seed: int = 0, progress: Progress | None = None) -> Self:
        """Expectation-maximisation on codes (n, N) or (n, N, m), array or tensor; full covariances.

        Codes are standardised first, so that their units do not matter. `progress(done, total)` is called before
        and after. Raises InputError for codes that are not finite floats and for fewer codes than components.
        """
        check_whole(components=(components, 1, 2**20), seed=(seed, 0, 2**63))
        rows, code_shape = flat_codes(codes)
        if len(rows) < components:
            raise InputError(f"codes are {len(rows)}, must be as many as the components or more: {components}")
        report = progress or (lambda done, total: None)
        report(0, 1)
        standard, offset, scale = standardised(rows)
        mixture = GaussianMixture(components, max_iter=ITERATIONS, random_state=seed % 2**32)
        # one thread is faster, by far on busy cores; and the last of the iterations is good enough
        with threadpool_limits(1), warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            mixture.fit(standard.numpy())
        report(1, 1)
        means, covariances = (torch.from_numpy(a) for a in (mixture.means_, mixture.covariances_))
        factors = scale[:, None] * torch.linalg.cholesky(covariances)
        return cls(torch.from_numpy(mixture.weights_), offset + scale * means, factors, code_shape, len(rows))

    @property
    def title(self) -> str:
        return f"a mixture of {len(self.weights)} Gaussian{'s' * (len(self.weights) > 1)}"

    @property
    def covariances(self) -> Tensor:
        """(K, D, D)."""
        return self.factors @ self.factors.mT

    def tensors(self) -> dict[str, Tensor]:
        return {"weights": self.weights, "means": self.means, "factors": self.factors}

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor], code_shape: tuple[int, ...], fitted: int, source: str) -> Self:
        size, count = prod(code_shape), len(tensors["weights"].flatten()) if "weights" in tensors else 0
        wanted = {"weights": (count,), "means": (count, size), "factors": (count, size, size)}
        if count < 1 or {name: tuple(t.shape) for name, t in tensors.items()} != wanted:
            raise InputError(f"{source}: must hold weights (K,), means (K, {size}) and factors (K, {size}, {size})")
        if not all(t.dtype == torch.float64 and t.isfinite().all() for t in tensors.values()):
            raise InputError(f"{source}: holds numbers that are not finite or not float64; fit and save it again")
        weights = tensors["weights"]
        if (weights < 0).any() or abs(weights.sum().item() - 1) > 1e-6:
            raise InputError(f"{source}: weights must not be negative, and 1 in all; fit and save it again")
        return cls(weights, tensors["means"], tensors["factors"], code_shape, fitted)

    def _rows(self, sample_ids: Tensor, key: int) -> Tensor:
        size = self.means.shape[1]
        noise = ops.normal((len(sample_ids), size), key, sample_ids).double()
        u = ops.uniform((len(sample_ids), 1), key, sample_ids, 1)[:, 0].double()
        ends = self.weights.cumsum(0)
        chosen = torch.searchsorted(ends, u * ends[-1], right=True).clamp(max=len(ends) - 1)
        rows = torch.empty_like(noise)
        for k in chosen.unique().tolist():
            rows[chosen == k] = self.means[k] + noise[chosen == k] @ self.factors[k].T
        return rows
