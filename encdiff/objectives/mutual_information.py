"""The mutual-information term: scalars that are together standard normal, and so say as much as scalars can."""

import torch
from torch import Tensor

from encdiff.errors import InputError
from encdiff.ops._triton import autocast_off


def normal_discrepancy(scalars: Tensor) -> Tensor:
    """The squared maximum mean discrepancy of scalars (B, N), B at least 2, from N(0, I): float32, without bias.

        MMD^2 = E k(s, s') - 2 E k(s, y) + E k(y, y'),    k(a, b) = exp(-|a - b|^2 / 2N),    y, y' ~ N(0, I)

    What concerns the normal numbers is an integral, E_y k(s, y) = (N / (N + 1))^(N/2) exp(-|s|^2 / 2(N + 1)) and
    E k(y, y') = (N / (N + 2))^(N/2), so that none are drawn. It can be a little below zero.

    An InfoVAE's objective (arXiv 1706.02262), as InfoDiffusion's (arXiv 2306.08757), whose mutual information I(x; s)
    is the greatest where each image has scalars of its own; of a deterministic encoder without a KL for each image
    this term remains. Their kernels are narrower in few dimensions and wider in many: exp(-|a - b|^2 / N^2).
    """
    s = scalars.float().flatten(1)
    count, n = s.shape
    if count < 2:
        raise InputError(f"mutual_information is of the scalars of 2 images at least, not of {count}")
    squares = s.square().sum(1)
    with autocast_off(s):
        distances = (squares[:, None] + squares - 2 * s @ s.T).clamp(min=0)
    pairs = torch.exp(-distances / (2 * n))
    among = (pairs.sum() - pairs.diagonal().sum()) / (count * (count - 1))
    between = (n / (n + 1)) ** (n / 2) * torch.exp(-squares / (2 * (n + 1))).mean()
    return among - 2 * between + (n / (n + 2)) ** (n / 2)
