"""N separate MLPs, one per concept: scalar i, or slice i of a vector, becomes token i."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from encdiff.errors import InputError
from encdiff.ops import _self_check
from encdiff.ops._dispatch import Implementation, Op, always
from encdiff.ops._triton import FUSED_TYPES, NAMES, has_gradient, interpreted, unavailable
from encdiff.ops._types import check_floating
from encdiff.ops.cross_attention import exact

FUSED_WIDTHS = {"a slice": 16, "the first of two hidden layers": 128, "a token": 64}  # BLOCKS in kernels/mlp_bank.py


def _elu(a: Tensor) -> Tensor:
    """ELU in place: max(a, exp(min(a, 0)) - 1)."""
    if a.requires_grad or not a.is_cpu:
        return F.elu(a, inplace=True)
    # on the CPU PyTorch takes four times as long for expm1 as for 2^x; the difference is off by half an ulp of 1
    below = (a * 1.4426950408889634).clamp_(max=0).exp2_().sub_(1)
    return a.clamp_(min=below)


# of a fresh tensor, some in place
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"elu": _elu, "silu": F.silu, "gelu": F.gelu, "relu": F.relu_}


def mlp_bank_reference(scalars, weights, biases, activation="elu"):
    """Batched matrix products over the concepts, in float32; see `mlp_bank`."""
    with exact(scalars) as dtype:
        h = _slices(scalars, weights).to(dtype).transpose(0, 1)  # (N, B, m)
        for layer, (w, b) in enumerate(zip(weights, biases, strict=True)):
            h = h if layer == 0 else ACTIVATIONS[activation](h)
            affine = torch.addcmul if h.shape[2] == 1 else torch.baddbmm  # of one number, the product needs no matrix
            h = affine(b[:, None].to(dtype), h, w.transpose(1, 2).to(dtype))
        return h.transpose(0, 1).to(scalars.dtype).reshape(*scalars.shape[:2], h.shape[2])


def mlp_bank_triton(scalars, weights, biases, activation="elu"):
    """One fused kernel forward, two backward."""
    from encdiff.kernels.mlp_bank import mlp_bank as fused

    tokens = fused(_slices(scalars, weights), list(weights), list(biases), activation)
    return tokens.reshape(*scalars.shape[:2], tokens.shape[2])


def _slices(scalars: Tensor, weights: list[Tensor]) -> Tensor:
    """(B, N, m); where the concepts share their weights (B * N, 1, m): more of the batch for the one MLP there is."""
    x = scalars[..., None] if scalars.ndim == 2 else scalars
    return x if x.shape[1] == weights[0].shape[0] else x.reshape(-1, 1, x.shape[2])


def _triton_reasons(scalars, weights, biases, activation="elu") -> list[str]:
    reasons = unavailable(scalars, "scalars")
    for name, tensors in (("scalars", [scalars]), ("weights", weights), ("biases", biases)):
        others = [str(t.dtype) for t in tensors if t.dtype not in FUSED_TYPES]
        if others:
            reasons.append(f"{name} is {others[0]}, not float32, bfloat16 or float16")
    if len({t.dtype for t in (*weights, *biases)}) > 1:
        reasons.append("weights and biases differ in dtype")
    if len(weights) == 1:
        return [*reasons, "1 layer is one batched product: nothing to fuse"]
    if len(weights) > 3:
        return [*reasons, f"{len(weights)} layers, at most 3"]
    widths = (weights[0].shape[2], weights[0].shape[1] if len(weights) == 3 else 0, weights[-1].shape[1])
    for width, (name, widest) in zip(widths, FUSED_WIDTHS.items(), strict=True):
        if width > widest:
            reasons.append(f"{name} is {width} wide, at most {widest}")
    gradients = has_gradient(scalars, *weights, *biases)
    checked = scalars, weights[0], *widths[1:], activation
    return reasons or _self_check.reasons("mlp_bank", scalars, _variant, *checked, gradients=gradients)


def _variant(scalars, weight, first, token, activation) -> tuple:
    from encdiff.kernels.mlp_bank import BLOCKS

    blocks = (next(b for b in BLOCKS[name] if b >= width) for name, width in (("F", first), ("D", token)))
    return NAMES[scalars.dtype], NAMES[weight.dtype], *blocks, activation


def _triton_doubts(scalars, *_, **__) -> list[str]:
    return interpreted(scalars)


_op = Op(
    "mlp_bank",
    [
        Implementation("triton", mlp_bank_triton, _triton_reasons, _triton_doubts),
        Implementation("reference", mlp_bank_reference, always, composite=True),
    ],
)


def mlp_bank(
    scalars: Tensor,
    weights: list[Tensor],
    biases: list[Tensor],
    activation: str = "elu",
    *,
    check: bool = False,
    impl: str | None = None,
) -> Tensor:
    """Turn every scalar into its concept token by an MLP of its own.

    Fused are banks of two or three layers within `FUSED_WIDTHS`; all others run as one batched product per layer.

    Args:
        scalars: (B, N); or (B, N, m), a slice of m numbers for each concept. Any strides; B may be 0.
        weights: one (N, out, in) per layer; the first has in = 1 (or m), each further one the out of the layer before.
            (1, out, in): the concepts share one MLP.
        biases: one (N, out), or (1, out), per layer.
        activation: between the layers: "elu" (the paper's), "silu", "gelu" or "relu".
        check: refuse scalars that are not finite. Waits for the device.
        impl: force an implementation (`encdiff.explain` lists them); None chooses.

    Returns:
        tokens (B, N, d), d the last layer's out, in the scalars' dtype.

    Raises:
        InputError: widths that do not chain, another number of concepts, another device, an unknown activation,
            a forced implementation that cannot serve; with `check`, scalars that are not finite.

    Source: arXiv 2402.09712, section 3.2.
    """
    _check_scalars(scalars, check)
    if activation not in ACTIVATIONS:
        raise InputError(f"activation is {activation!r}, must be one of {sorted(ACTIVATIONS)}")
    _check_layers(scalars, weights, biases)
    return _op(scalars, weights, biases, activation, impl=impl)


def _check_scalars(scalars: Tensor, check: bool) -> None:
    if scalars.ndim not in (2, 3):
        raise InputError(f"scalars is {tuple(scalars.shape)}, must be (B, N) or (B, N, m)")
    if not scalars.is_floating_point():
        raise InputError(f"scalars is {scalars.dtype}, must be floating point")
    check_floating(scalars=scalars)
    if check and not scalars.isfinite().all():
        count = int((~scalars.isfinite()).sum())
        raise InputError(f"scalars has {count} of {scalars.numel()} values that are not finite, must have none")


def _check_layers(scalars: Tensor, weights: list[Tensor], biases: list[Tensor]) -> None:
    if not len(weights) == len(biases) > 0:
        raise InputError(f"{len(weights)} weights and {len(biases)} biases, must be as many, and one layer at least")
    concepts, width = scalars.shape[1], scalars.shape[2] if scalars.ndim == 3 else 1
    if weights[0].shape[0] == 1:  # shared
        concepts = 1
    for i, (w, b) in enumerate(zip(weights, biases, strict=True)):
        if w.ndim != 3 or w.shape[0] != concepts or w.shape[2] != width or b.shape != w.shape[:2]:
            raise InputError(
                f"layer {i} has weight {tuple(w.shape)} and bias {tuple(b.shape)}, "
                f"must be ({concepts}, out, {width}) and ({concepts}, out)"
            )
        if w.device != scalars.device or b.device != scalars.device:
            raise InputError(f"layer {i} is on {w.device} and {b.device}, must be on scalars' device {scalars.device}")
        check_floating(**{f"layer {i}'s weight": w, f"layer {i}'s bias": b})
        width = w.shape[1]
