"""Where a U-Net attends to each token: recorded from the fused pass while it samples."""

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from encdiff.errors import InputError
from encdiff.interop.blocks import Patched, full_name
from encdiff.interop.patch import in_use
from encdiff.interop.patch import layers as layers_of
from encdiff.interop.state import features_of
from encdiff.models.unet import UNet, unet_of


class Maps(Mapping[str, Tensor]):
    """The attention of chosen layers to tokens, layer by layer, averaged over heads.

    `maps[layer]` is (B, h, w, N), the mean over the evaluations of the U-Net; or (evaluations, B, h, w, N) where each
    is kept. Over its N tokens every pixel has a distribution. Float32, where the U-Net is.
    """

    def __init__(self, unet: nn.Module, names: Sequence[str], each: bool):
        self.each, self.evaluations = each, 0
        self._unet, self._size = unet, (0, 0)  # of the features that it is given
        self._now: dict[str, Tensor] | None = None  # of the evaluation under way
        self._found: dict[str, list[Tensor]] = {name: [] for name in names}
        self._counts = dict.fromkeys(names, 0)

    def begin(self, unet: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """A hook before every evaluation of the U-Net."""
        if unet is self._unet:  # and not a copy, which took the hook along
            height, width = features_of(args, kwargs).shape[-2:]
            self._now, self._size = {}, (height, width)

    def take(self, name: str, attention: Tensor) -> None:
        """Attention (B, L, N), or (B, h, w, N), of a layer in the evaluation under way; of none, none."""
        if self._now is not None and name in self._found:  # checkpointed activations are computed again later
            self._now[name] = attention.detach()

    def end(self, unet: nn.Module, args: tuple, output: Any) -> None:
        """A hook after every evaluation; outside of a compiled graph, so that no number in it changes."""
        if unet is self._unet and self._now is not None:
            for name, attention in self._now.items():
                self._add(name, attention.float())
            self._now, self.evaluations = None, self.evaluations + 1

    def _add(self, name: str, attention: Tensor) -> None:
        if attention.ndim == 3:
            attention = attention.unflatten(1, _grid(attention.shape[1], *self._size))
        found = self._found[name]
        self._counts[name] += 1
        if self.each or not found:
            found.append(attention)
        elif found[0].shape != attention.shape:
            before = tuple(found[0].shape)
            raise InputError(f"{name} attends as {tuple(attention.shape)} after {before}: record one size")
        else:
            found[0] = found[0].lerp(attention, 1 / self._counts[name])

    def __getitem__(self, layer: str) -> Tensor:
        if not self._found.get(layer):
            known = ", ".join(self) or "none: no evaluation of the U-Net was recorded"
            raise InputError(f"layer {layer!r} has no map, must be one of: {known}")
        return torch.stack(self._found[layer]) if self.each else self._found[layer][0]

    def __iter__(self) -> Iterator[str]:
        return (name for name, found in self._found.items() if found)

    def __len__(self) -> int:
        return sum(map(bool, self._found.values()))

    def __repr__(self) -> str:
        shapes = ", ".join(f"{name}: {tuple(m.shape)}" for name, m in self.items())
        return f"Maps of {self.evaluations} evaluations ({shapes})"

    def __deepcopy__(self, memo: dict) -> "Maps":
        """A U-Net that is copied while it is recorded: the copy is not."""
        return self

    def mean(self, size: int | tuple[int, int] | None = None) -> Tensor:
        """(B, N, H, W): over layers and evaluations, each layer resized (bilinear) to `size`, or to the largest."""
        maps = [m.mean(0) if self.each else m for m in self.values()]
        if not maps:
            raise InputError("maps hold nothing: no evaluation of the U-Net was recorded")
        sides = (size, size) if isinstance(size, int) else size or max((m.shape[1], m.shape[2]) for m in maps)
        if len(sides) != 2 or not all(isinstance(side, int) and side > 0 for side in sides):
            raise InputError(f"size is {size!r}, must be a whole number of pixels, or (height, width)")
        resized = (F.interpolate(m.permute(0, 3, 1, 2), sides, mode="bilinear", align_corners=False) for m in maps)
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
        states = stack.enter_context(in_use(unet, "record_maps"))
        maps = Maps(unet, _chosen(unet, layers), steps == "each")
        for state in states:
            entry = _names_now(unet, state), maps
            state.maps.append(entry)
            stack.callback(state.maps.remove, entry)
        listeners = [unet.register_forward_pre_hook(maps.begin, with_kwargs=True)]
        if isinstance(unet, UNet):
            listeners += _listen_to_ours(unet, maps)
        for listener in [*listeners, unet.register_forward_hook(maps.end)]:
            stack.callback(listener.remove)
        yield maps


def _chosen(unet: nn.Module, wanted: str | Sequence[str] | None) -> list[str]:
    known = {name: layer.reasons for name, layer in layers_of(unet).items() if name.endswith("attn2")}
    parts = [""] if wanted is None else [wanted] if isinstance(wanted, str) else list(wanted)
    if not all(isinstance(part, str) for part in parts):
        raise InputError(f"layers are {wanted!r}, must be names of layers, or parts of names")
    named = [name for name in known if any(part in name for part in parts)]
    chosen = [name for name in named if not known[name]]
    if not chosen:
        why = "; ".join(f"{name}: {known[name][0]}" for name in named) or f"there are {', '.join(known)}"
        raise InputError(f"layers {wanted!r} name no cross-attention that runs by encdiff.ops: {why}")
    return chosen


def _names_now(unet: nn.Module, state: Any) -> dict[str, str]:
    """From the names that layers have in what was patched to those in what is recorded."""
    blocks = ((name, m) for name, m in unet.named_modules() if isinstance(m, Patched) and m.encdiff_patch is state)
    return {full_name(block, "attn2"): f"{name}.attn2".removeprefix(".") for name, block in blocks}


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
        if module is unet:
            if given.arguments.get("maps") is None:
                given.arguments["maps"] = []
            lists[:] = [(given.arguments["maps"], len(given.arguments["maps"]))]
        return given.args, given.kwargs

    def take(module: nn.Module, args: tuple, output: Tensor) -> None:
        if module is unet and lists:
            collected, before = lists.pop()
            for name, found in zip(names, collected[before:], strict=False):  # T-GATE repeats without attending
                maps.take(name, found)

    return [unet.register_forward_pre_hook(begin, with_kwargs=True), unet.register_forward_hook(take)]
