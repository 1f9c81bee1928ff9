"""One step of AdamW over flat buffers, with the average of the weights and their bfloat16 copy."""

import torch
from torch import Tensor

from encdiff.errors import InputError
from encdiff.ops import _self_check
from encdiff.ops._dispatch import Implementation, Op, always
from encdiff.ops._triton import FUSED_TYPES, NAMES, interpreted, unavailable
from encdiff.ops._types import check_floating


def adamw_reference(
    master, gradient, exp_avg, exp_avg_sq, schedule, average=None, weights=None, scale=None, *,
    betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01,
):  # fmt: skip
    """The formulas in the master's type, tensor by tensor; see `adamw`."""
    rate, follow, bias1, bias2 = schedule.to(master.dtype).unbind()
    g = gradient.to(master.dtype)
    g = g if scale is None else g * scale.to(master.dtype)
    exp_avg.lerp_(g, 1 - betas[0])
    exp_avg_sq.mul_(betas[1]).addcmul_(g, g, value=1 - betas[1])
    step = exp_avg / (exp_avg_sq.sqrt() / bias2.sqrt() + eps)
    master.mul_(1 - rate * weight_decay).sub_(step * (rate / bias1))
    if average is not None:
        average.lerp_(master[: len(average)], follow)
    if weights is not None:
        weights.copy_(master)


def adamw_triton(
    master, gradient, exp_avg, exp_avg_sq, schedule, average=None, weights=None, scale=None, *,
    betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01,
):  # fmt: skip
    """One launch."""
    from encdiff.kernels.adamw import adamw as fused

    fused(master, gradient, exp_avg, exp_avg_sq, schedule, average, weights, scale, *betas, eps, weight_decay)


def _triton_reasons(
    master, gradient, exp_avg, exp_avg_sq, schedule, average=None, weights=None, scale=None, **_
) -> list[str]:
    reasons = unavailable(master, "master")
    if master.dtype != torch.float32 or schedule.dtype != torch.float32:
        reasons.append(f"master and schedule are {master.dtype} and {schedule.dtype}, not float32")
    for name, t in (("gradient", gradient), ("weights", weights)):
        if t is not None and t.dtype not in FUSED_TYPES:
            reasons.append(f"{name} is {t.dtype}, not float32, bfloat16 or float16")
    reasons += [f"{t.dtype} is not served" for t in (gradient, weights) if t is not None and t.dtype not in NAMES]
    return reasons or _self_check.reasons("adamw", master, _variant, master, gradient, average, weights, scale)


def _variant(master, gradient, average, weights, scale) -> tuple:
    sizes, copy = [len(t) for t in (master, average) if t is not None], weights is not None and NAMES[weights.dtype]
    aligned = all(size % 16 == 0 for size in sizes)
    return NAMES[gradient.dtype], copy or "none", average is not None, scale is not None, aligned


def _triton_doubts(master, *_, **__) -> list[str]:
    return interpreted(master)


_op = Op(
    "adamw",
    [
        Implementation("triton", adamw_triton, _triton_reasons, _triton_doubts),
        Implementation("reference", adamw_reference, always, composite=True),
    ],
)


@torch.no_grad()
def adamw(
    master: Tensor,
    gradient: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    schedule: Tensor,
    average: Tensor | None = None,
    weights: Tensor | None = None,
    scale: Tensor | None = None,
    *,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.01,
    impl: str | None = None,
) -> None:
    """One step of `torch.optim.AdamW`, in place, then average += follow (master - average) and weights = master.

    Unlike the other ops it writes its inputs: all but gradient, schedule and scale. What changes from step to step is
    read from the device, so that a captured CUDA graph follows it.

    Args:
        master: (n,) float32, the weights (float64 too in the reference, moments and average then likewise).
        gradient: (n,) bfloat16, float16 or float32.
        exp_avg, exp_avg_sq: (n,) in the master's dtype, the moments.
        schedule: (4,) float32: learning rate, follow = 1 - decay of the average, 1 - beta1^t and 1 - beta2^t for the
            t-th step from 1 on.
        average: (k,), k <= n, in the master's dtype, of the first k weights; or None.
        weights: (n,) bfloat16 or float16, the rounded copy that computes; or None.
        scale: (), multiplies the gradient: that of clipping; None: 1.
        betas, eps, weight_decay: as in `torch.optim.AdamW`.
        impl: force an implementation (`encdiff.explain` lists them); None chooses.

    Raises:
        InputError: shapes, dtypes, layouts or devices that do not fit, or a forced implementation that cannot serve.

    Source: arXiv 1711.05101, algorithm 2; the moments' bias as in arXiv 1412.6980.
    """
    _check(master, gradient, exp_avg, exp_avg_sq, schedule, average, weights, scale)
    _op(
        master, gradient, exp_avg, exp_avg_sq, schedule, average, weights, scale,
        betas=betas, eps=eps, weight_decay=weight_decay, impl=impl,
    )  # fmt: skip


Shapes = dict[str, tuple[Tensor | None, tuple[int | None, ...]]]  # of each argument, and what it must be


def _check(master, gradient, exp_avg, exp_avg_sq, schedule, average, weights, scale) -> None:
    if master.ndim != 1 or not master.is_floating_point():
        raise InputError(f"master is {tuple(master.shape)} of {master.dtype}, must be (n,) of floating point")
    n, k = len(master), None if average is None else min(average.numel(), len(master))
    moments: Shapes = {
        "exp_avg": (exp_avg, (n,)),
        "exp_avg_sq": (exp_avg_sq, (n,)),
        "average": (average, (k,)),
    }
    others: Shapes = {
        "gradient": (gradient, (n,)),
        "weights": (weights, (n,)),
        "schedule": (schedule, (4,)),
    }
    others["scale"] = (scale, ())
    check_floating(master=master, **{name: t for name, (t, _) in (moments | others).items()})
    for name, (t, shape) in (moments | others).items():
        if t is None:
            continue
        if tuple(t.shape) != shape:
            raise InputError(f"{name} is {tuple(t.shape)}, must be {shape} for master ({n},)")
        if t.device != master.device or not t.is_contiguous():
            raise InputError(f"{name} is on {t.device}, must be contiguous on master's {master.device}")
        if name in moments and t.dtype != master.dtype:
            raise InputError(f"{name} is {t.dtype}, must be of master's {master.dtype}")
