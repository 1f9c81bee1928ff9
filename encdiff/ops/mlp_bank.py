"""N separate MLPs, one per concept: scalar i becomes token i."""

import torch
import torch.nn.functional as F
from torch import Tensor

from encdiff.errors import InputError
from encdiff.ops._dispatch import Implementation, Op, always
from encdiff.ops.cross_attention import exact

ACTIVATIONS = {"elu": F.elu, "silu": F.silu, "gelu": F.gelu, "relu": F.relu}


def mlp_bank_reference(scalars, weights, biases, activation="elu"):
    """Batched matrix products over the concepts, in float32; see `mlp_bank`."""
    with exact(scalars) as dtype:
        h = scalars.to(dtype).T[:, :, None]  # (N, B, 1)
        for layer, (w, b) in enumerate(zip(weights, biases, strict=True)):
            h = h if layer == 0 else ACTIVATIONS[activation](h)
            h = torch.baddbmm(b[:, None].to(dtype), h, w.transpose(1, 2).to(dtype))
        return h.transpose(0, 1).to(scalars.dtype)


_op = Op("mlp_bank", [Implementation("reference", mlp_bank_reference, always)])


def mlp_bank(
    scalars: Tensor,
    weights: list[Tensor],
    biases: list[Tensor],
    activation: str = "elu",
    *,
    impl: str | None = None,
) -> Tensor:
    """Turn every scalar into its concept token by an MLP of its own.

    Args:
        scalars: (B, N).
        weights: one (N, out, in) per layer; the first has in = 1, each further one the out of the layer before.
        biases: one (N, out) per layer.
        activation: between the layers: "elu" (the paper's), "silu", "gelu" or "relu".
        impl: force an implementation; None chooses.

    Returns:
        tokens (B, N, d), d the last layer's out, in the scalars' dtype.

    Raises:
        InputError: widths that do not chain, another number of concepts, an unknown activation.

    Source: arXiv 2402.09712, section 3.2.
    """
    if scalars.ndim != 2:
        raise InputError(f"scalars is {tuple(scalars.shape)}, must be (B, N)")
    if activation not in ACTIVATIONS:
        raise InputError(f"activation is {activation!r}, must be one of {sorted(ACTIVATIONS)}")
    concepts, width = scalars.shape[1], 1
    for i, (w, b) in enumerate(zip(weights, biases, strict=True)):
        if w.ndim != 3 or w.shape[0] != concepts or w.shape[2] != width or b.shape != w.shape[:2]:
            raise InputError(
                f"layer {i} has weight {tuple(w.shape)} and bias {tuple(b.shape)}, "
                f"must be ({concepts}, out, {width}) and ({concepts}, out)"
            )
        width = w.shape[1]
    return _op(scalars, weights, biases, activation, impl=impl)
