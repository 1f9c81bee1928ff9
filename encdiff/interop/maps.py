"""Where a U-Net attends to each token: recorded from the fused pass while it samples."""

import inspect
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from encdiff.errors import InputError
from encdiff.interop.patch import layers as layers_of
from encdiff.interop.patch import patch, state_of, unpatch
from encdiff.interop.state import features_of
from encdiff.models.unet import UNet, unet_of


class Maps:
    """The attention of chosen layers to tokens, layer by layer, averaged over heads.

    `maps[layer]` is (B, h, w, N), the mean over the evaluations of the U-Net; or (evaluations, B, h, w, N) where each
    is kept. Over its N tokens every pixel has a distribution. Float32, where the U-Net is.
    """

    def __init__(self, names: Sequence[str], each: bool):
        self.names, self.each = tuple(names), each
        self.evaluations = 0
        self._found: dict[str, list[Tensor]] = {name: [] for name in names}
        self._size = (0, 0)  # of the features that the U-Net is given
        self._counts = dict.fromkeys(names, 0)

    def wants(self, name: str) -> bool:
        return name in self._found

    def begin(self, unet: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """A hook before every evaluation of the U-Net."""
        height, width = features_of(args, kwargs).shape[-2:]
        self.evaluations, self._size = self.evaluations + 1, (height, width)

    def take(self, name: str, attention: Tensor) -> None:
        """Attention (B, L, N), or (B, h, w, N), of a layer."""
        attention = attention.detach().float()
        if attention.ndim == 3:
            attention = attention.unflatten(1, _grid(attention.shape[1], *self._size))
        found = self._found[name]
        self._counts[name] += 1
        if self.each or not found:
            found.append(attention)
        elif found[0].shape != attention.shape:
            raise InputError(
                f"{name} attends as {tuple(attention.shape)} after {tuple(found[0].shape)}: record one size"
            )
        else:
            found[0].lerp_(attention, 1 / self._counts[name])

    def __getitem__(self, layer: str) -> Tensor:
        if not self._found.get(layer):
            known = (
                ", ".join(name for name, found in self._found.items() if found) or "none: no evaluation was recorded"
            )
            raise InputError(f"layer {layer!r} has no map, must be one of: {known}")
        return torch.stack(self._found[layer]) if self.each else self._found[layer][0]

    def __iter__(self) -> Iterator[str]:
        return (name for name, found in self._found.items() if found)

    def __len__(self) -> int:
        return sum(map(bool, self._found.values()))

    def mean(self, size: int | tuple[int, int] | None = None) -> Tensor:
        """(B, N, H, W): over layers and evaluations, each layer resized (bilinear) to `size`, or to the largest."""
        maps = [self[name].mean(0) if self.each else self[name] for name in self]
        if not maps:
            raise InputError("maps hold nothing: no evaluation of the U-Net was recorded")
        wanted = size or max((m.shape[1], m.shape[2]) for m in maps)
        resized = (F.interpolate(m.permute(0, 3, 1, 2), wanted, mode="bilinear", align_corners=False) for m in maps)
        return torch.stack(list(resized)).mean(0)


@contextmanager
def record_maps(
    unet: Any, *, layers: str | Sequence[str] | None = None, steps: Literal["mean", "each"] = "mean"
) -> Iterator[Maps]:
    """Record where a U-Net's cross-attention looks while the block runs.

        with encdiff.record_maps(pipe.unet) as maps:
            image = pipe(prompt).images[0]
        maps.mean()[1, 5]  # of the fifth token; a guided batch has the empty prompt first, the prompt second

    A pass that also gives the maps replaces the usual one; memory is that of the maps, whatever the number of steps.

    Args:
        unet: patched or not (then for the time of the block), a pipeline that has one, or our own `EncDiff`.
        layers: of the layers' names in `encdiff.explain(unet)` those that contain this, or one of these; None: all.
        steps: "mean" adds up while it samples; "each" keeps every evaluation.

    Raises:
        InputError: a U-Net without cross-attention, or no layer of such a name that runs by our ops.
    """
    if steps not in ("mean", "each"):
        raise InputError(f"steps is {steps!r}, must be 'mean' or 'each'")
    unet = unet_of(unet)
    with ExitStack() as stack:
        ours = isinstance(unet, UNet)
        if not ours and state_of(unet) is None:
            patch(unet)
            stack.callback(unpatch, unet)
        maps = Maps(_chosen(unet, layers), steps == "each")
        stack.callback(unet.register_forward_pre_hook(maps.begin, with_kwargs=True).remove)
        if ours:
            for handle in _listen_to_ours(unet, maps):
                stack.callback(handle.remove)
        if (state := state_of(unet)) is not None:
            state.maps = maps
            stack.callback(setattr, state, "maps", None)
        yield maps


def _chosen(unet: nn.Module, wanted: str | Sequence[str] | None) -> list[str]:
    known = {name: layer.reasons for name, layer in layers_of(unet).items() if name.endswith("attn2")}
    parts = [""] if wanted is None else [wanted] if isinstance(wanted, str) else list(wanted)
    named = [name for name in known if any(part in name for part in parts)]
    chosen = [name for name in named if not known[name]]
    if not chosen:
        why = "; ".join(f"{name}: {known[name][0]}" for name in named) or f"there are {', '.join(known)}"
        raise InputError(f"layers {wanted!r} name no cross-attention that runs by encdiff.ops: {why}")
    return chosen


def _grid(positions: int, height: int, width: int) -> tuple[int, int]:
    """Height and width of so many positions of a feature map that was halved some times, rounding up."""
    h, w = height, width
    while h * w > positions and (h, w) != (1, 1):
        h, w = -(-h // 2), -(-w // 2)
    return (h, w) if h * w == positions else (1, positions)


def _listen_to_ours(unet: UNet, maps: Maps) -> list[Any]:
    """Our U-Net puts maps into a list that it is given, one for each block that attends, in the blocks' order."""
    signature, names = inspect.signature(unet.forward), [n for n in layers_of(unet) if n.endswith("attn2")]
    lists: list[tuple[list[Tensor], int]] = []

    def begin(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        given = signature.bind(*args, **kwargs)
        if given.arguments.get("maps") is None:
            given.arguments["maps"] = []
        lists.append((given.arguments["maps"], len(given.arguments["maps"])))
        return given.args, given.kwargs

    def take(module: nn.Module, args: tuple, output: Tensor) -> None:
        collected, before = lists.pop()
        for name, found in zip(names, collected[before:], strict=False):  # T-GATE repeats outputs without attending
            if maps.wants(name):
                maps.take(name, found)

    return [unet.register_forward_pre_hook(begin, with_kwargs=True), unet.register_forward_hook(take)]
