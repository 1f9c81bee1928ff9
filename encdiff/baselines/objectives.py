"""What the VAEs minimise, term by term: pure functions, in nats for each image."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from encdiff.ops._triton import autocast_off


def bernoulli(logits: Tensor, images: Tensor) -> Tensor:
    """-log p(x|z) of images (B, 3, S, S) in [0, 1], each number for itself the mean of a Bernoulli variable: (B,).

    Of grey values it is no likelihood, but the cross-entropy that Locatello et al. 2019 minimise; its least value is
    the images' own entropy, not 0.
    """
    return F.binary_cross_entropy_with_logits(logits.float(), images.float(), reduction="none").flatten(1).sum(1)


def kl(mean: Tensor, log_variance: Tensor) -> Tensor:
    """KL(N(mean, variance) || N(0, 1)) of each latent: (B, N), in nats."""
    return 0.5 * (mean.square() + log_variance.exp() - log_variance - 1)


def capacity(step: int, steps: int, most: float, rise: float) -> float:
    """C(t) before step `step` of `steps`: from 0 in a line to `most` over the first part `rise` of them.

    Source: arXiv 1804.03599, equation 8: the loss is reconstruction + gamma |KL - C|.
    """
    return most * min(1.0, step / (rise * steps))


def log_normal(z: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    """log N(z; mean, variance), number by number."""
    return -0.5 * ((z - mean).square() * (-log_variance).exp() + log_variance + math.log(2 * math.pi))


def total_correlation(z: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    """KL(q(z) || prod_l q(z_l)) from a batch: z (B, N) drawn from its posteriors (B, N).

    q(z) is taken for the mixture of the batch's own posteriors, q(z_j) = 1/B sum_i q(z_j | x_i). That is minibatch-
    weighted sampling of arXiv 1802.04942, but for a constant, which there has the size of the data: same gradient.
    """
    density = log_normal(z[:, None], mean[None], log_variance[None])  # (B, B, N): of z_j by x_i
    joint = density.sum(2).logsumexp(1)
    product = density.logsumexp(1).sum(1)
    return (joint - product).mean() + (z.shape[1] - 1) * math.log(len(z))


def dip(mean: Tensor, log_variance: Tensor | None, lambda_od: float, lambda_d: float) -> Tensor:
    """How far the codes' covariance is from the identity (arXiv 1711.00848).

    lambda_od sum_{i != j} Cov_ij^2 + lambda_d sum_i (Cov_ii - 1)^2. Cov is that of the means over the batch: DIP-I,
    equation 6. Given log-variances it is that of the codes drawn, to which the mean variance adds: DIP-II, equation 7.
    """
    centred = mean - mean.mean(0)
    with autocast_off(centred):
        covariance = centred.T @ centred / len(mean)
    variance = covariance.diagonal()
    off = covariance.square().sum() - variance.square().sum()
    if log_variance is not None:
        variance = variance + log_variance.exp().mean(0)
    return lambda_od * off + lambda_d * (variance - 1).square().sum()


def permuted(z: Tensor, keys: Tensor) -> Tensor:
    """Codes (B, N), each column in an order of its own, that of its keys (B, N): samples of prod_l q(z_l)."""
    return z.gather(0, torch.argsort(keys, dim=0, stable=True))


def discriminator_loss(joint: Tensor, product: Tensor) -> Tensor:
    """The cross-entropy of telling codes of q(z) from permuted ones, by logits (B,) of each (arXiv 1802.05983)."""
    return 0.5 * (F.softplus(-joint) + F.softplus(product)).mean()
