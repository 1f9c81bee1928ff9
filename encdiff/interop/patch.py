"""`patch`: our attention in another library's U-Net, in place; `unpatch` restores it."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import nn

from encdiff import ops
from encdiff.errors import InputError
from encdiff.interop.blocks import ATTENTIONS, Patched, full_name, is_served, original, patched_class, reasons
from encdiff.interop.state import Patch
from encdiff.models.attention import TransformerBlock
from encdiff.models.unet import unet_of


class Layer(NamedTuple):
    """One attention of a U-Net."""

    heads: int
    width: int  # of a head
    reasons: list[str]  # why it stays with its library; empty: it runs by our ops


class Layers(dict[str, Layer]):
    """Every attention by its name; prints as a table."""

    def __str__(self) -> str:
        names = max(map(len, self))
        rows = (
            f"  {name:{names}}  {layer.heads:>3} x {layer.width:<4} {'; '.join(layer.reasons) or 'encdiff.ops'}"
            for name, layer in self.items()
        )
        served = sum(not layer.reasons for layer in self.values())
        return "\n".join([f"{served} of {len(self)} attentions run by encdiff.ops", *rows])

    __repr__ = __str__


def patch(unet: Any, *, self_attention: bool = False, impl: str | None = None) -> Layers:
    """Let the cross-attentions of a U-Net run by `encdiff.ops`, with LayerNorm and residual in the same op; in place.

    Weights are neither copied nor renamed: `state_dict`, `save_pretrained`, `deepcopy`, LoRA and `torch.compile` go on
    as before. A prompt's keys and values are computed once while the same tensor is given, as a pipeline does in every
    step (not under `torch.compile`, nor for inference tensors or with gradients). After a write to weights by `.data`
    call `patch` again.

    Args:
        unet: diffusers' `UNet2DConditionModel` or `ControlNetModel`, a pipeline for its U-Net, or whatever holds blocks
            of diffusers' or latent-diffusion code's class `BasicTransformerBlock`. Our own U-Net runs by the ops as it
            is.
        self_attention: `attn1`, too.
        impl: force an implementation of the ops (`encdiff.explain("cross_attention")` lists them); None chooses.

    Returns:
        the attentions by name, printed as a table: which run by our ops, and why the others stay with their library.
        A layer that gets LoRA, an IP-Adapter, quantisation or a hook later goes back to its library by itself, and
        forth; `encdiff.explain(unet)` is the table as of now.

    Raises:
        InputError: something that has no cross-attention.
    """
    if impl is not None:
        with ops.use_impl(impl):  # or it says that there is none
            pass
    _check_idle(unet)
    state = Patch(self_attention, impl)
    for name, block in _attending(unet).items():
        cls = patched_class(original(block))
        if cls is not None and not isinstance(block, TransformerBlock):  # which is ours
            block.__class__ = cls
            block.encdiff_patch, block.encdiff_name = state, name
            for which in ATTENTIONS:
                if getattr(block, which) is not None:
                    is_served(block, which, full_name(block, which))
    return layers(unet)


def unpatch(unet: Any) -> None:
    """Undo `patch`; a U-Net that is not patched stays as it is."""
    _check_idle(unet)
    for block in _attending(unet).values():
        if isinstance(block, Patched):
            del block.encdiff_patch, block.encdiff_name
            block.__class__ = original(block)


def layers(unet: Any) -> Layers:
    """Every attention of a U-Net, and what speaks against our ops there as of now."""
    found = Layers()
    for name, block in _attending(unet).items():
        for which in ATTENTIONS:
            if (attn := getattr(block, which, None)) is not None:
                inner = attn.to_q.out_features if hasattr(attn.to_q, "out_features") else len(attn.to_q.weight)
                found[f"{name}.{which}".removeprefix(".")] = Layer(
                    attn.heads, inner // attn.heads, _reasons(block, which)
                )
    return found


def explain(op: Any, *args: Any, **kwargs: Any) -> str:
    """Say what would run: of an op for these arguments (`encdiff.ops.explain`), or in each attention of a U-Net."""
    module = isinstance(op, nn.Module) or isinstance(getattr(op, "unet", None), nn.Module)
    return str(layers(op)) if module else ops.explain(op, *args, **kwargs)


def states_of(unet: Any) -> list[Patch]:
    """What `patch` left: one for each call of it."""
    states = [block.encdiff_patch for block in unet_of(unet).modules() if isinstance(block, Patched)]
    return list({id(state): state for state in states}.values())


@contextmanager
def in_use(unet: nn.Module, by: str) -> Iterator[list[Patch]]:
    """The states of a U-Net, patched for the time of the block if it is not; meanwhile nobody patches or unpatches."""
    before = states_of(unet)
    if not before:
        patch(unet)
    states = states_of(unet)
    for state in states:
        state.users.append(by)
    try:
        yield states
    finally:
        for state in states:
            state.users.remove(by)
        if not before:
            unpatch(unet)


def _check_idle(unet: Any) -> None:
    if users := [user for state in states_of(unet) for user in state.users]:
        raise InputError(f"unet is in use by a block of {users[0]}, must be patched or unpatched before it or after it")


def _reasons(block: nn.Module, which: str) -> list[str]:
    if isinstance(block, TransformerBlock):
        return []
    if isinstance(block, Patched):
        return reasons(block, which)
    return [
        "it is not patched" if patched_class(original(block)) else f"blocks of class {type(block).__name__} are unknown"
    ]


def _attending(unet: Any) -> dict[str, Any]:
    """The transformer blocks by name, our own among them."""
    unet = unet_of(unet)
    blocks = {name: module for name, module in unet.named_modules() if _is_block(module)}
    if not any(getattr(block, "attn2", None) is not None for block in blocks.values()):
        raise InputError(f"unet is a {type(unet).__name__}, must have cross-attention: transformer blocks with attn2")
    return blocks


def _is_block(module: nn.Module) -> bool:
    if isinstance(module, (TransformerBlock, Patched)):
        return True
    parts = "attn1", "norm1", "norm3", "ff"
    weights = "to_q", "to_k", "to_v", "to_out", "heads"
    return all(hasattr(module, part) for part in parts) and all(hasattr(module.attn1, name) for name in weights)
