"""Anchors: each scalar is drawn to the means of a Gaussian mixture of its own, so that its values part into groups."""

import torch
from torch import Tensor, nn

from encdiff.objectives.keys import GUMBEL, Key

MOMENTUM = 0.01  # of a batch in the mixtures
TEMPERATURE = 1.0  # of the Gumbel-softmax
LEAST = 1e-6  # share of a component that no scalar comes near


class Anchors(nn.Module):
    """A Gaussian mixture of `count` components for each of N scalars of about unit variance.

    In training mode a scalar becomes a mixture of the means by Gumbel-softmax weights, and the mixtures follow the
    scalars by expectation maximisation, a batch a step (stepwise EM); else it becomes its mean under the mixture.

    Source: Dynamic Gaussian Anchoring, arXiv 2410.23820, there of 8 to 32 components and fitted now and then.
    """

    share: Tensor  # (N, K): of all scalars, those of a component
    first: Tensor  # their mean, times the share
    second: Tensor  # their mean square, times the share

    def __init__(self, concepts: int, count: int):
        super().__init__()
        mean = torch.linspace(-2, 2, count) if count > 1 else torch.zeros(1)
        share = torch.full((count,), 1 / count)
        width = 2 / count  # half the distance of two means, nearly
        for name, values in (("share", share), ("first", share * mean), ("second", share * (mean**2 + width**2))):
            self.register_buffer(name, values.repeat(concepts, 1))

    @property
    def means(self) -> Tensor:
        """(N, K)."""
        return self.first / self.share

    @property
    def variances(self) -> Tensor:
        """(N, K), at least so much that neighbours of K evenly spread ones can still be told apart."""
        return (self.second / self.share - self.means**2).clamp(min=(0.25 / self.share.shape[1]) ** 2)

    def forward(self, scalars: Tensor, key: Key | None = None) -> Tensor:
        """Scalars (B, N) -> (B, N); in training mode, `key` keys the Gumbel noise and the mixtures follow."""
        s, means = scalars.float(), self.means
        logits = self._logits(s)
        if key is not None and self.training:
            self._follow(s.detach(), logits.detach().softmax(-1))
            u = key.uniform(tuple(logits.shape), GUMBEL)
            logits = logits - torch.log(-torch.log((u + 2**-25).clamp(max=1 - 2**-24)))
        return ((logits / TEMPERATURE).softmax(-1) * means).sum(-1).to(scalars.dtype)

    def _logits(self, s: Tensor) -> Tensor:
        """log of share times density, (B, N, K), but for a constant."""
        variances = self.variances
        return self.share.log() - 0.5 * variances.log() - 0.5 * (s[..., None] - self.means) ** 2 / variances

    @torch.no_grad()
    def _follow(self, s: Tensor, belongs: Tensor) -> None:
        for kept, seen in zip(
            (self.share, self.first, self.second),
            (belongs, belongs * s[..., None], belongs * s[..., None] ** 2),
            strict=True,
        ):
            kept.lerp_(seen.mean(0), MOMENTUM)
        low = self.share.clamp(min=LEAST) / self.share  # an abandoned component stays where it is
        for kept in (self.first, self.second, self.share):
            kept.mul_(low)
