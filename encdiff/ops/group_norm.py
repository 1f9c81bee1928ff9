"""GroupNorm with what follows it in a U-Net: y = SiLU(GN(x) (1 + scale) + shift)."""

from functools import cache
from typing import Any, Literal, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from encdiff.errors import InputError
from encdiff.ops import _self_check
from encdiff.ops._attention import exact
from encdiff.ops._dispatch import Implementation, Op, always, is_transformed
from encdiff.ops._norms import beside_or_with_input
from encdiff.ops._triton import FUSED_TYPES, NAMES, autocast_dtype, has_gradient, interpreted, unavailable
from encdiff.ops._types import check_floating

FUSED_CHANNELS = 64  # of one group: the last of BLOCK_D in kernels/group_norm.py
CENTRED_POSITIONS = 64  # from here on PyTorch's own is slower for channels-last features on the CPU


@cache
def representatives() -> dict:
    """Tile of kernels/group_norm.py -> one (positions, channels, groups) for all that take it, the narrowest first."""
    from encdiff.kernels._group_norm_tile import BLOCK_D, COLUMNS, WIDTHS, Tile

    lengths = (*COLUMNS, max(COLUMNS) + 1)
    found: dict = {}
    for D in (*WIDTHS, *(d - 1 for d in BLOCK_D)):
        for L in lengths:
            found.setdefault(Tile.of(L, 8 * D, 8), (L, 8 * D, 8))
    return found


def group_norm_reference(x, weight, bias, groups, eps=1e-5, *, scale=None, shift=None, silu=False, x_bias=None):
    """The formula in float32, whatever the storage type; see `group_norm`."""
    with exact(x) as dtype:
        weight, bias, scale, shift = (None if p is None else p.to(dtype) for p in (weight, bias, scale, shift))
        h = _biased(x.to(dtype), x_bias).unflatten(1, (groups, -1))
        variance, mean = torch.var_mean(h, (2, 3, 4), correction=0, keepdim=True)
        h = ((h - mean) * (variance + eps).rsqrt()).flatten(1, 2)
        h = h * weight[:, None, None] + bias[:, None, None]
        return _modulate(h, scale, shift, silu).to(x.dtype)


def _biased(x: Tensor, x_bias: Tensor | None) -> Tensor:
    return x if x_bias is None else x + x_bias.to(x.dtype)[:, None, None]


def group_norm_native(x, weight, bias, groups, eps=1e-5, *, scale=None, shift=None, silu=False, x_bias=None):
    """PyTorch's GroupNorm, then the rest, in the storage type."""
    h = torch.group_norm(_biased(x, x_bias), groups, weight, bias, eps)
    if not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last):
        h = h.contiguous(memory_format=torch.channels_last)  # on a GPU it is not; elsewhere this is h itself
    y = _modulate(h, scale, shift, silu)
    return y if autocast_dtype(x) is not None else y.to(x.dtype)  # a wider scale or shift widens h


def _native_reasons(x, weight, bias, *_, **__) -> list[str]:
    """PyTorch takes one type, on a CPU also parameters in float32 beside narrower features."""
    wide = x.is_cpu and x.itemsize == 2 and weight.dtype == bias.dtype == torch.float32
    one = x.dtype == weight.dtype == bias.dtype
    types = f"x, weight and bias are {x.dtype}, {weight.dtype} and {bias.dtype}"
    return [] if one or wide or autocast_dtype(x) is not None else [types]


def _modulate(h: Tensor, scale: Tensor | None, shift: Tensor | None, silu: bool) -> Tensor:
    scale, shift = (None if p is None else p[:, :, None, None] for p in (scale, shift))
    if scale is not None:
        h = h * (1 + scale) if shift is None else torch.addcmul(shift, h, 1 + scale)
    elif shift is not None:
        h = h + shift
    return F.silu(h) if silu else h


def group_norm_centred(x, weight, bias, groups, eps=1e-5, *, scale=None, shift=None, silu=False, x_bias=None):
    """Sums over positions, channels innermost; weight, bias, scale and shift in one multiply-add."""
    h = _biased(x, x_bias).flatten(2).transpose(1, 2)  # (B, H W, C): a view of channels-last features
    d = h - _group_means(h.mean(1), groups)[:, None]
    gain = (_group_means(d.square().mean(1), groups) + eps).rsqrt() * weight
    offset = bias.expand_as(gain)
    if scale is not None:
        gain, offset = gain * (1 + scale), offset * (1 + scale)
    if shift is not None:
        offset = offset + shift
    y = torch.addcmul(offset[:, None], d, gain[:, None])
    y = F.silu(y, inplace=not y.requires_grad) if silu else y
    return y.transpose(1, 2).unflatten(2, x.shape[2:]).to(x.dtype)


def _group_means(v: Tensor, groups: int) -> Tensor:
    """(B, C) -> (B, C): the mean over its group for each channel."""
    grouped = v.unflatten(1, (groups, -1))
    return grouped.mean(2, keepdim=True).expand_as(grouped).flatten(1)


def group_norm_triton(
    x, weight, bias, groups, eps=1e-5, *, scale=None, shift=None, silu=False, x_bias=None, with_input=False
):
    """One fused kernel forward, two backward; `with_input`: the pair (y, x), whose gradients add up in the kernel."""
    from encdiff.kernels.group_norm import GroupNormAndInput, group_norm

    fused = beside_or_with_input(x, (weight, bias, x_bias), with_input, GroupNormAndInput, group_norm)
    h = x.flatten(2).transpose(1, 2)  # (B, H W, C): a view of channels-last features
    outputs = fused(h, weight, bias, scale, shift, x_bias, groups, eps, silu)
    maps = [t.transpose(1, 2).unflatten(2, x.shape[2:]) for t in outputs[: 1 + with_input]]
    return tuple(maps) if with_input else maps[0]


def _triton_reasons(
    x, weight, bias, groups, eps=1e-5, *, scale=None, shift=None, silu=False, x_bias=None, with_input=False
) -> list[str]:
    reasons = unavailable(x)
    tensors = {"x": x, "weight": weight, "bias": bias, "scale": scale, "shift": shift, "x_bias": x_bias}
    for name, t in tensors.items():
        if t is not None and t.dtype not in FUSED_TYPES:
            reasons.append(f"{name} is {t.dtype}, not float32, bfloat16 or float16")
    if x.shape[1] // groups > FUSED_CHANNELS:
        reasons.append(f"a group has {x.shape[1] // groups} channels, at most {FUSED_CHANNELS}")
    if x[:1].numel() >= 2**31:
        reasons.append("a sample has 2^31 elements or more")
    gradients = has_gradient(*tensors.values())
    flags = scale is not None, shift is not None, silu, x_bias is not None, with_input
    return reasons or _self_check.reasons("group_norm", x, _variant, x, weight, groups, flags, gradients=gradients)


def _variant(x, weight, groups, flags) -> tuple:
    from encdiff.kernels.group_norm import Tile

    tile = Tile.of(x.shape[2] * x.shape[3], x.shape[1], groups)
    return NAMES[x.dtype], NAMES[weight.dtype], *representatives()[tile], *flags


def _triton_doubts(x, *_, **__) -> list[str]:
    return interpreted(x)


def _centred_doubts(x, weight, bias, groups, eps=1e-5, *, scale=None, shift=None, x_bias=None, **_) -> list[str]:
    if is_transformed(x, weight, bias, scale, shift, x_bias):
        return ["under torch.func or forward mode, where its layout cannot always be asked"]
    doubts = [] if x.device.type == "cpu" else [f"x is on {x.device.type}"]
    if x.dtype != torch.float32:
        doubts.append(f"x is {x.dtype}: differences would be rounded to it")
    if x.is_contiguous() or not x.is_contiguous(memory_format=torch.channels_last):
        doubts.append("x is not channels-last")
    if x.shape[2] * x.shape[3] < CENTRED_POSITIONS:
        doubts.append(f"fewer than {CENTRED_POSITIONS} positions")
    if has_gradient(x, weight, bias, scale, shift, x_bias):
        doubts.append("its gradients take longer")
    return doubts


_op = Op(
    "group_norm",
    [
        Implementation("triton", group_norm_triton, _triton_reasons, _triton_doubts),
        Implementation("centred", group_norm_centred, always, _centred_doubts, composite=True),
        Implementation("native", group_norm_native, _native_reasons),
        Implementation("reference", group_norm_reference, always, composite=True),
    ],
)


@overload
def group_norm(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float = ..., *, scale: Tensor | None = ...,
    shift: Tensor | None = ..., silu: bool = ..., x_bias: Tensor | None = ..., with_input: Literal[False] = ...,
    impl: str | None = ...,
) -> Tensor: ...  # fmt: skip


@overload
def group_norm(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float = ..., *, scale: Tensor | None = ...,
    shift: Tensor | None = ..., silu: bool = ..., x_bias: None = ..., with_input: Literal[True], impl: str | None = ...,
) -> tuple[Tensor, Tensor]: ...  # fmt: skip


def group_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    eps: float = 1e-5,
    *,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    silu: bool = False,
    x_bias: Tensor | None = None,
    with_input: bool = False,
    impl: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Normalise each group of channels of each sample to mean 0 and variance 1, then scale, shift and activate.

    Args:
        x: (B, C, H, W) in any memory format; B may be 0.
        weight, bias: (C,).
        groups: divides C.
        eps: added to the variance.
        scale, shift: (B, C); None: 0.
        silu: apply x * sigmoid(x) last.
        x_bias: (C,), added to x first: the bias of the convolution that made x without it; not beside `with_input`.
        with_input: return (y, x): where a residual goes on from that x, its gradient is added without a launch.
        impl: force an implementation (`encdiff.explain` lists them); None chooses.

    Returns:
        y (B, C, H, W) in x's dtype; channels-last where x is, and wherever the fused kernel ran.

    Raises:
        InputError: shapes that do not fit, other devices, or a forced implementation that cannot serve.

    Source: arXiv 1803.08494; scale and shift: arXiv 2105.05233, section 3.
    """
    _check(x, weight, bias, groups, scale, shift, x_bias)
    arguments = (x, weight, bias, groups, eps)
    options: dict[str, Any] = dict(scale=scale, shift=shift, silu=silu, impl=impl)
    if not with_input:
        return _op(*arguments, **options, x_bias=x_bias)
    if x_bias is not None:
        raise InputError("with_input is True, must be False where x_bias is given: x alone is no input of its norm")
    fused = has_gradient(x) and _op.choose(*arguments, **options, with_input=True).name == "triton"
    return _op(*arguments, **options, with_input=True) if fused else (_op(*arguments, **options), x)


def norm_takes_bias(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float = 1e-5, **options: Any) -> bool:
    """Whether `group_norm(h, weight, bias, groups, eps, x_bias=..., **options)` is the fused kernel's.

    Of features h that a convolution is to make of x (B, I, H, W), of the same positions: its bias is free there, and
    costs a launch elsewhere. A compiler fuses it itself.
    """
    if torch.compiler.is_compiling() or is_transformed(x, weight, bias, *options.values()):
        return False
    h = x.new_empty((), dtype=autocast_dtype(x) or x.dtype).expand(len(x), len(weight), *x.shape[2:])
    return _op.fuses(h, weight, bias, groups, eps, x_bias=weight, **options)


def _check(x, weight, bias, groups, scale, shift, x_bias) -> None:
    if x.ndim != 4 or not x.is_floating_point():
        raise InputError(f"x is {tuple(x.shape)} of {x.dtype}, must be (B, C, H, W) of floating point")
    batch, channels = x.shape[:2]
    if groups < 1 or channels % groups:
        raise InputError(f"groups {groups} must divide the {channels} channels of x")
    check_floating(x=x, weight=weight, bias=bias, scale=scale, shift=shift, x_bias=x_bias)
    shapes: dict[str, tuple[Tensor | None, tuple]] = {"weight": (weight, (channels,)), "bias": (bias, (channels,))}
    shapes |= {
        "scale": (scale, (batch, channels)),
        "shift": (shift, (batch, channels)),
        "x_bias": (x_bias, (channels,)),
    }
    for name, (t, shape) in shapes.items():
        if t is not None and tuple(t.shape) != shape:
            raise InputError(f"{name} is {tuple(t.shape)}, must be {shape} for x {tuple(x.shape)}")
        if t is not None and t.device != x.device:
            raise InputError(f"{name} is on {t.device}, must be on x's device {x.device}")
