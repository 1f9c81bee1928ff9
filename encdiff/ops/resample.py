"""Half and twice the resolution: the mean of 2x2 positions, and the nearest one."""

from typing import Literal, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from encdiff.errors import InputError
from encdiff.ops import _self_check
from encdiff.ops._attention import exact
from encdiff.ops._dispatch import Implementation, Op, always
from encdiff.ops._triton import FUSED_TYPES, NAMES, has_gradient, interpreted, unavailable
from encdiff.ops._types import check_floating

Kind = Literal["down", "up"]


def resample_reference(x, kind, *, beside=None):
    """The formula in float32, whatever the storage type; see `resample`."""
    return _each(_reference, x, kind, beside)


def _reference(x: Tensor, kind: Kind) -> Tensor:
    with exact(x) as dtype:
        if kind == "up":
            return x[:, :, :, None, :, None].expand(-1, -1, -1, 2, -1, 2).flatten(4).flatten(2, 3)
        H, W = (n // 2 for n in x.shape[2:])
        cells = x[:, :, : 2 * H, : 2 * W].unflatten(3, (W, 2)).unflatten(2, (H, 2))
        return cells.to(dtype).mean((3, 5)).to(x.dtype)


def resample_native(x, kind, *, beside=None):
    """PyTorch's average pooling, and its interpolation."""
    return _each(_native, x, kind, beside)


def _native(x: Tensor, kind: Kind) -> Tensor:
    return F.avg_pool2d(x, 2) if kind == "down" else F.interpolate(x, scale_factor=2.0, mode="nearest")


def _each(run, x, kind, beside):
    return run(x, kind) if beside is None else (run(x, kind), run(beside, kind))


def resample_triton(x, kind, *, beside=None):
    """One kernel forward, one backward, for both tensors at once."""
    from encdiff.kernels.resample import resample_down, resample_up

    maps, (H, W) = [x] if beside is None else [x, beside], x.shape[2:]
    y = resample_down(maps, 0.25) if kind == "down" else resample_up(maps, 2 * H, 2 * W, 1.0)
    return y[0] if beside is None else tuple(y)


def _triton_reasons(x, kind, *, beside=None) -> list[str]:
    reasons = unavailable(x)
    if x.dtype not in FUSED_TYPES:
        reasons.append(f"x is {x.dtype}, not float32, bfloat16 or float16")
    if beside is not None and beside.dtype != x.dtype:
        reasons.append(f"beside is {beside.dtype}, x is {x.dtype}")
    B, _, H, W = x.shape
    if B * H * W * (1 if kind == "down" else 4) >= 2**31:
        reasons.append("the larger map has 2^31 positions or more")
    return reasons or _self_check.reasons("resample", x, _variant, x, kind, gradients=has_gradient(x, beside))


def _variant(x, kind) -> tuple:
    from encdiff.kernels.resample import VECTOR

    return NAMES[x.dtype], kind, x.shape[1] % VECTOR.value == 0


def _triton_doubts(x, kind, *, beside=None) -> list[str]:
    doubts = interpreted(x)
    for name, t in {"x": x, "beside": beside}.items():
        if t is not None and not t.is_contiguous(memory_format=torch.channels_last):
            doubts.append(f"{name} is not channels-last")
    return doubts


_op = Op(
    "resample",
    [
        Implementation("triton", resample_triton, _triton_reasons, _triton_doubts),
        Implementation("native", resample_native, always, composite=True),
        Implementation("reference", resample_reference, always, composite=True),
    ],
)


@overload
def resample(x: Tensor, kind: str, *, beside: None = ..., impl: str | None = ...) -> Tensor: ...


@overload
def resample(x: Tensor, kind: str, *, beside: Tensor, impl: str | None = ...) -> tuple[Tensor, Tensor]: ...


def resample(
    x: Tensor, kind: str, *, beside: Tensor | None = None, impl: str | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    """Halve the resolution by the mean of 2x2 positions, or double it by the nearest one.

    Args:
        x: (B, C, H, W), any strides; B may be 0.
        kind: "down" (a last row or column of an odd size is dropped; H and W at least 2) or "up".
        beside: another tensor of x's shape, resampled by the same launch.
        impl: force an implementation (`encdiff.explain` lists them); None chooses.

    Returns:
        y in x's dtype: (B, C, H // 2, W // 2) or (B, C, 2 H, 2 W); with `beside` the pair (y, the same of it).
        Channels-last where x is, and wherever the fused kernel ran.

    Raises:
        InputError: another kind, shapes that do not fit, other devices, or a forced implementation that cannot serve.
    """
    _check(x, kind, beside)
    return _op(x, kind, beside=beside, impl=impl)


def _check(x: Tensor, kind: str, beside: Tensor | None) -> None:
    if kind not in ("down", "up"):
        raise InputError(f"kind is {kind!r}, must be 'down' or 'up'")
    check_floating(x=x, beside=beside)
    least = 2 if kind == "down" else 1
    if x.ndim != 4 or min(x.shape[2:]) < least or x.shape[1] < 1:
        raise InputError(f"x is {tuple(x.shape)}, must be (B, C, H, W) with H and W at least {least} to go {kind}")
    if beside is None:
        return
    if beside.shape != x.shape:
        raise InputError(f"beside is {tuple(beside.shape)}, must be {tuple(x.shape)} as x")
    if beside.device != x.device:
        raise InputError(f"beside is on {beside.device}, must be on x's device {x.device}")
