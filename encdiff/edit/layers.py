"""The projections of a U-Net's cross-attentions: by the names that diffusers and ours share."""

import torch.nn as nn
from torch import Tensor

from encdiff.errors import InputError

KEYS, VALUES = "to_k", "to_v"


def projections(unet: nn.Module, kinds: tuple[str, ...] = (KEYS, VALUES)) -> dict[str, nn.Linear]:
    """The layers of these kinds of every cross-attention, by the names of their weights.

    These are `attn2` and, where it attends to tokens too, `attn1`.
    InputError for a U-Net without cross-attention, and for layers whose weight is not all there is: wrapped by PEFT,
    fused with others, quantised.
    """
    found = {}
    for place, attention in unet.named_modules():
        last = place.rpartition(".")[2]
        if last not in ("attn1", "attn2") or not hasattr(attention, KEYS) or not hasattr(attention, VALUES):
            continue
        if not getattr(attention, "is_cross_attention", last == "attn2"):  # diffusers says so, ours has it in attn2
            continue
        if getattr(attention, "fused_projections", False):
            raise InputError(f"{place}: its projections are fused; call unfuse_qkv_projections() before an edit")
        for kind in kinds:
            found[f"{place}.{kind}.weight"] = _linear(getattr(attention, kind), f"{place}.{kind}")
    if not found:
        raise InputError(f"unet: this {type(unet).__name__} has no cross-attention (attn2.to_k, attn2.to_v) to edit")
    return found


def token_width(layers: dict[str, nn.Linear]) -> int:
    """D, which all layers must share."""
    widths = {layer.in_features for layer in layers.values()}
    if len(widths) > 1:
        raise InputError(f"unet: its cross-attentions take tokens of widths {sorted(widths)}, must be one width")
    return widths.pop()


def end_of_text(embeddings: Tensor, input_ids: Tensor, eos_token_id: int = 49407) -> Tensor:
    """The end-of-text token's embedding (B, D), by which MIST edits a prompt.

    embeddings (B, T, D) of a text encoder, input_ids (B, T) int64 of its tokenizer; eos_token_id is CLIP's. It is the
    first of its kind, since CLIP's padding has the same id.
    """
    if embeddings.ndim != 3 or input_ids.shape != embeddings.shape[:2]:
        shapes = f"{tuple(embeddings.shape)} and input_ids {tuple(input_ids.shape)}"
        raise InputError(f"embeddings are {shapes}, must be (B, T, D) and (B, T)")
    ends = input_ids == eos_token_id
    if not ends.any(1).all():
        raise InputError(f"input_ids: a prompt has no {eos_token_id}, must end in eos_token_id")
    first = ends.int().argmax(1)
    return embeddings[range(len(first)), first.to(embeddings.device)]


def _linear(layer: nn.Module, name: str) -> nn.Linear:
    if hasattr(layer, "base_layer"):
        raise InputError(f"{name}: is wrapped by an adapter (PEFT); merge or unload it before an edit")
    if not isinstance(layer, nn.Linear) or not layer.weight.is_floating_point():
        raise InputError(f"{name}: is a {type(layer).__name__}, must be a linear layer with floating point weights")
    return layer
