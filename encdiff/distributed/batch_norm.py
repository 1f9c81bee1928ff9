"""Batch norm whose statistics are of the rows of all processes; on any device, with its gradient."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from encdiff.distributed.processes import processes


class _BatchNorm(torch.autograd.Function):
    """y = (x - mean) rstd weight + bias over all rows and places of all processes, which hold equally many.

    Of the backward pass the sums over rows are those of all processes, too: what one process's rows do to the
    statistics is felt in the losses of the others.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        over = _over(x)
        variance, mean = torch.var_mean(x.float(), over, correction=0)
        # one exchange for both, in float64, where the square of a mean far above the deviation takes nothing away
        moments = torch.stack([mean.double(), variance.double() + mean.double().square()])
        processes().mean_(moments)
        mean, variance = moments[0].float(), (moments[1] - moments[0].square()).float()
        ctx.save_for_backward(x, weight, mean, (variance + eps).rsqrt())
        ctx.mark_non_differentiable(mean, variance)
        return F.batch_norm(x, mean, variance, weight, bias, training=False, eps=eps), mean, variance

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, rstd = ctx.saved_tensors
        over, shape = _over(x), (1, -1) + (1,) * (x.ndim - 2)
        dy = gradient.float()
        normed = (x.float() - mean.view(shape)) * rstd.view(shape)
        sums = torch.stack([dy.sum(over), (dy * normed).sum(over)])  # of bias and weight, of this process
        everywhere = sums / (x.numel() // x.shape[1])
        processes().mean_(everywhere)
        mean_dy, mean_product = (row.view(shape) for row in everywhere)
        scale = rstd if weight is None else rstd * weight
        dx = scale.view(shape) * (dy - mean_dy - normed * mean_product)
        of_weight, of_bias = (None, None) if weight is None else (sums[1].to(weight.dtype), sums[0].to(weight.dtype))
        return dx.to(x.dtype), of_weight, of_bias, None


def batch_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float = 1e-5
) -> tuple[Tensor, Tensor, Tensor]:
    """Batch norm of this process's rows x (B, C, ...), with the statistics of the rows of all processes.

    weight, bias (C,) float32, or None, both. Returns y like x, and mean and biased variance (C,) float32, which have no
    gradient. Every process must call it, with as many rows. Gradients of weight and bias are of this process's rows.
    """
    return _BatchNorm.apply(x, weight, bias, eps)


def _over(x: Tensor) -> tuple[int, ...]:
    return (0, *range(2, x.ndim))
