"""MIST and UCE: what is edited, and what it should become."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from encdiff.edit.closed_form import Scale, check_consistent, check_tokens, update
from encdiff.edit.edit import Edit
from encdiff.edit.layers import KEYS, VALUES, projections, token_width
from encdiff.errors import InputError
from encdiff.models.unet import unet_of

Values = Callable[[Tensor], Tensor]  # a weight (inner, D) -> the values v* (n, inner), both float64
METHODS = {"mist": (VALUES,), "uce": (KEYS, VALUES)}  # the projections that each edits


def mist(
    unet: Any,
    edited: Tensor,
    wanted: Tensor | Values,
    keep: Tensor | None = None,
    *,
    lam: float = 0.5,
    edit_scale: Scale = 1.0,
    keep_scale: Scale = 0.2,
    name: str = "",
    names: Sequence[str] | None = None,
) -> Edit:
    """An edit of the values alone, after which edited tokens give the wanted values and those to keep their own.

    Keys, and with them what the first cross-attention attends to, stay as they are to the bit. The model is unchanged
    until `Edit.apply`.

    Args:
        unet: with cross-attention `attn2`: an `EncDiff` or its U-Net, a pipeline of diffusers or its U-Net.
        edited: tokens (n, D) or (D,): prompt embeddings, or concept tokens.
        wanted: tokens (n, D), or one (D,) for all: v* = W wanted. Or a function of a layer's weight (inner, D) to the
            values v* (n, inner), float64.
        keep: tokens (m, D) whose values should stay; None: none.
        lam, edit_scale, keep_scale: see `solve`; the defaults are the paper's.
        name: what the edit is called in errors and in its file.
        names: of the edited tokens and then of those to keep, (n + m,), for errors. None: by index.

    Raises:
        InputError: no cross-attention, tokens of another width, layers wrapped by PEFT, fused or quantised, and what
            `solve` refuses.

    Source: arXiv 2403.19738.
    """
    scales = {"lam": lam, "edit_scale": edit_scale, "keep_scale": keep_scale}
    return edit_by("mist", unet, edited, wanted, keep, name=name, names=names, **scales)


def uce(
    unet: Any,
    edited: Tensor,
    wanted: Tensor | Values,
    keep: Tensor | None = None,
    *,
    lam: float = 0.5,
    edit_scale: Scale = 1.0,
    keep_scale: Scale = 0.2,
    name: str = "",
    names: Sequence[str] | None = None,
) -> Edit:
    """`mist` of keys and values: tokens that are edited are also attended to as the wanted ones were.

    Source: unified concept editing, arXiv 2308.14761.
    """
    scales = {"lam": lam, "edit_scale": edit_scale, "keep_scale": keep_scale}
    return edit_by("uce", unet, edited, wanted, keep, name=name, names=names, **scales)


@torch.no_grad()
def edit_by(
    method: str, unet: Any, edited: Tensor, wanted: Tensor | Values, keep: Tensor | None = None, *, name: str = "",
    names: Sequence[str] | None = None, **scales: Any,
) -> Edit:  # fmt: skip
    """The edit of one of `METHODS`, by name."""
    if method not in METHODS:
        raise InputError(f"method is {method!r}, must be one of {', '.join(METHODS)}")
    unet = unet_of(unet)
    layers = projections(unet, METHODS[method])
    width, device = token_width(layers), next(iter(layers.values())).weight.device
    c = check_tokens(edited, "edited", width).to(device)
    kept = c[:0] if keep is None else check_tokens(keep, "keep", width).to(device)
    values = wanted if callable(wanted) else _values_of(wanted, len(c), width, device)
    found = update(c, kept if len(kept) else None, names=names, **scales)
    weights: dict[str, Tensor] = {}
    for place, layer in layers.items():
        weight = layer.weight.detach().double()
        target = values(weight)
        changed = found(weight, target)
        if not weights:  # tokens that contradict each other do so in every layer
            check_consistent(c, target, kept, kept @ weight.T, names)
        weights[place] = changed.to(layer.weight.dtype)
        if not weights[place].isfinite().all():
            raise InputError(f"{place}: the edit leaves the range of {layer.weight.dtype}; take a greater lam")
    return Edit.of(unet, weights, method, name)


def _values_of(wanted: Tensor, count: int, width: int, device: torch.device) -> Values:
    tokens = check_tokens(wanted, "wanted", width).to(device)
    if len(tokens) not in (1, count):
        raise InputError(f"wanted are {len(tokens)} tokens, must be 1 or {count}, one for each edited token")
    return lambda weight: (tokens @ weight.T).expand(count, -1)
