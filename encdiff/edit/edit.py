"""An edit: weights that take the place of a U-Net's own, and give it back to the bit."""

import hashlib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from numbers import Real
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from encdiff.edit.layers import projections
from encdiff.errors import InputError
from encdiff.files.checkpoint import load_tensors, save_tensors
from encdiff.models.unet import unet_of

ABOUT = ("method", "name", "layers", "shapes", "original")  # what a file says of itself
FORMAT = "encdiff edit 1"
LONGEST = 200  # characters of a name
STRONGEST = 1e6  # of a strength, of either sign
Weights = dict[str, Tensor]


@dataclass(frozen=True, eq=False, repr=False)
class Edit:
    """New weights for projections of one U-Net; `mist`, `uce` and `debias` make it, none changes the model.

    `weights`: (inner, D) by their names in its state dict, in its dtype. `method` and `name` say what was done;
    `layers`, `shapes` and `original` are how many projections the U-Net has, and digests of their names and shapes and
    of the weights that the edit was made of.
    """

    weights: Weights
    method: str
    name: str
    layers: int
    shapes: str
    original: str
    _before: WeakKeyDictionary[nn.Module, tuple[Weights, str]] = field(default_factory=WeakKeyDictionary)

    @classmethod
    def of(cls, unet: nn.Module, weights: Weights, method: str, name: str = "") -> "Edit":
        """The edit that puts these weights into this U-Net."""
        if not isinstance(name, str) or len(name) > LONGEST:
            given = f"{len(name)} characters long" if isinstance(name, str) else f"a {type(name).__name__}"
            raise InputError(f"name is {given}, must be a text of at most {LONGEST} characters")
        layers = projections(unet)
        return cls(weights, method, name, len(layers), _digest_of_shapes(layers), _digest(_own(layers, weights)))

    def __repr__(self) -> str:
        said = self.method + (f" {self.name!r}" if self.name else "")
        return f"Edit({said}, {len(self.weights)} of {self.layers} projections)"

    def apply(self, unet: Any, strength: float = 1.0) -> None:
        """Give the U-Net, or that of a model or pipeline, its new weights W + strength (W' - W), in place.

        InputError, before anything is changed, unless its weights are to the bit those that the edit was made of.
        """
        if not isinstance(strength, Real) or not abs(strength) <= STRONGEST:  # false for NaN
            bounds = f"{-STRONGEST:,.0f} to {STRONGEST:,.0f}"
            raise InputError(f"strength is {strength!r:.80}, must be a number from {bounds}; 1 is the whole edit")
        unet = unet_of(unet)
        layers = self._layers(unet)
        before = _own(layers, self.weights)
        if _digest(before) != self.original:
            if unet in self._before and _digest(before) == self._before[unet][1]:
                raise InputError(f"{self._said}: is already applied to this U-Net; undo it before you apply it anew")
            raise InputError(
                f"{self._said}: the weights at hand are not those that it was made of (another model or dtype, "
                "or an edit was applied in between); make it anew from this U-Net"
            )
        after = {name: self._at(name, weight, strength) for name, weight in before.items()}
        self._before[unet] = before, _digest(after)
        _write(layers, after)

    def undo(self, unet: Any) -> None:
        """Give the U-Net back the weights that it had before `apply`, to the bit.

        InputError unless its weights are to the bit those that this edit made: of several edits the last is undone
        first.
        """
        unet = unet_of(unet)
        if unet not in self._before:
            raise InputError(
                f"{self._said}: this object was not applied to this U-Net, so it has nothing to undo; keep the object "
                "whose `apply` was called, and call `undo` of that"
            )
        layers, (before, after) = self._layers(unet), self._before[unet]
        if _digest(_own(layers, self.weights)) != after:
            raise InputError(
                f"{self._said}: the weights at hand are not those that it made; undo first what came after it"
            )
        _write(layers, before)
        del self._before[unet]

    def save(self, path: str | Path) -> None:
        """Write a safetensors file of the changed weights alone, whole or not at all, that `Edit.load` reads.

        InputError for a folder that is not there.
        """
        _check_path(path, "edit.save(path)")
        if not (folder := Path(path).parent).is_dir():
            raise InputError(f"{path}: {folder} is no folder; make it first")
        about = {name: str(getattr(self, name)) for name in ABOUT}
        save_tensors(path, self.weights, {"format": FORMAT, **about})

    @classmethod
    def load(cls, path: str | Path, unet: Any = None) -> "Edit":
        """The edit that `save` wrote; InputError, naming the file, for anything else.

        With a U-Net also for one that the edit does not fit; without it `apply` says so, naming the edit.
        """
        _check_path(path, "Edit.load(path, model)")
        weights, about = load_tensors(path)
        about = {name: about[name] for name in (*ABOUT, "format") if name in about}
        whole = len(about) > len(ABOUT) and all(len(text) <= LONGEST for text in about.values())
        if about.pop("format", None) != FORMAT or not whole or not weights:
            raise InputError(f"{path}: not an edit that encdiff saved")
        if not re.fullmatch("[0-9]{1,6}", about["layers"]) or not all(map(_is_weight, weights.values())):
            raise InputError(f"{path}: not an edit that encdiff saved, or damaged; its weights must be finite matrices")
        edit = cls(weights, about["method"], about["name"], int(about["layers"]), about["shapes"], about["original"])
        if unet is not None:
            edit._layers(unet_of(unet), str(path))
        return edit

    @property
    def _said(self) -> str:
        """What errors call it."""
        return f"edit {self.name!r}" if self.name else f"this {self.method} edit"

    def _layers(self, unet: nn.Module, source: str = "") -> dict[str, nn.Linear]:
        """The layers of the U-Net that the edit is of; InputError, naming `source`, where it is of another U-Net."""
        layers, source = projections(unet), source or self._said
        for name, weight in self.weights.items():
            if name not in layers:
                raise InputError(f"{source}: is of a U-Net that has {name[:200]!r}, which this one lacks")
            here = layers[name].weight
            if here.shape != weight.shape or here.dtype != weight.dtype:
                raise InputError(
                    f"{source}: is of a U-Net whose {name} is {tuple(weight.shape)} {weight.dtype}, here it is "
                    f"{tuple(here.shape)} {here.dtype}"
                )
        if len(layers) != self.layers or _digest_of_shapes(layers) != self.shapes:
            raise InputError(
                f"{source}: is of a U-Net whose {self.layers} projections have other names or shapes than the "
                f"{len(layers)} here"
            )
        return {name: layers[name] for name in self.weights}

    def _at(self, name: str, before: Tensor, strength: float) -> Tensor:
        after = self.weights[name].to(before.device)
        if strength == 1:
            return after
        moved = before.double() + strength * (after.double() - before.double())
        return moved.to(before.dtype)


def _check_path(path: Any, call: str) -> None:
    if not isinstance(path, str | os.PathLike):
        raise InputError(f"path is a {type(path).__name__}, must be a file's name: {call}")


def _is_weight(tensor: Tensor) -> bool:
    return tensor.ndim == 2 and tensor.is_floating_point() and bool(tensor.float().isfinite().all())


def _own(layers: Mapping[str, nn.Linear], names: Mapping[str, Any]) -> Weights:
    """Copies of the U-Net's own weights of these names."""
    return {name: layers[name].weight.detach().clone() for name in names}


@torch.no_grad()
def _write(layers: Mapping[str, nn.Linear], weights: Weights) -> None:
    for name, weight in weights.items():
        layers[name].weight.copy_(weight)  # in place: captured graphs and optimisers hold the same memory


def _digest(weights: Weights) -> str:
    """Of names, dtypes and bits."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        weight = weights[name].detach().cpu().contiguous()
        digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}\n".encode())
        digest.update(weight.view(torch.uint8).numpy().data)
    return digest.hexdigest()[:32]


def _digest_of_shapes(layers: Mapping[str, nn.Linear]) -> str:
    text = "\n".join(f"{name} {tuple(layer.weight.shape)}" for name, layer in sorted(layers.items()))
    return hashlib.sha256(text.encode()).hexdigest()[:32]
