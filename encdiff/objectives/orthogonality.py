"""Orthogonal effects: what two concepts change about a prediction should not overlap."""

from collections.abc import Callable

import torch
from torch import Tensor

from encdiff.errors import InputError
from encdiff.objectives.keys import PAIRS, Key

EVERY = 4  # row of a batch, or of few rows every second: the two further predictions cost half of what the first did


def orthogonality(predict: Callable[[Tensor, Tensor], Tensor], predicted: Tensor, tokens: Tensor, key: Key) -> Tensor:
    """The mean squared cosine between the effects of two concepts of an image, in [0, 1]: float32.

    Of every EVERY-th image two concepts are drawn, one after the other replaced by that of the next such image; an
    effect is the change of the prediction, d_i = v(x_t, t, tokens with s_i replaced) - v(x_t, t, tokens). Images whose
    tokens are dropped, all zero, are left out.

    Args:
        predict: (rows (R,), tokens (R, N, d)) -> predictions (R, ...) of these rows of the batch.
        predicted: (B, ...), of the whole batch, the tokens as they are.
        tokens: (B, N, d); N and B at least 2.

    Raises InputError for fewer rows.

    Source: the non-overlap penalty of arXiv 2602.05214, there on velocities that a network's output attention splits
    among factors; here it is measured, so that any network and any prediction can have it.
    """
    if len(tokens) < 2:
        raise InputError(f"orthogonality is of 2 images at least, which exchange concepts, not of {len(tokens)}")
    rows = torch.arange(0, len(tokens), min(EVERY, len(tokens) // 2), device=tokens.device)
    own, count, n = tokens[rows], len(rows), tokens.shape[1]
    drawn = key.uniform((len(tokens), 2), PAIRS)[rows]
    first = (drawn[:, 0] * n).long().clamp(max=n - 1)
    second = (first + 1 + (drawn[:, 1] * (n - 1)).long().clamp(max=n - 2)) % n
    others, each = own.roll(1, 0), torch.arange(count, device=tokens.device)
    replaced = []
    for concept in (first, second):
        mask = torch.zeros(count, n, dtype=torch.bool, device=tokens.device)
        mask[each, concept] = True
        replaced.append(torch.where(mask[:, :, None], others, own))
    changed = predict(torch.cat([rows, rows]), torch.cat(replaced)).float().flatten(1)
    a, b = (changed - predicted[rows].float().flatten(1).repeat(2, 1)).chunk(2)
    cosines = (a * b).sum(1).square() / (a.square().sum(1) * b.square().sum(1) + 1e-12)
    there = (own != 0).flatten(1).any(1)
    counts = (there & there.roll(1, 0)).float()
    return (cosines * counts).sum() / counts.sum().clamp(min=1)
