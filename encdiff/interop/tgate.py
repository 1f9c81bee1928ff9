"""T-GATE for other libraries' U-Nets: converged attention is repeated, guidance that no longer acts is dropped."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from encdiff.diffusion.gate import TGate, as_tgate
from encdiff.errors import InputError
from encdiff.interop.patch import patch, state_of, unpatch
from encdiff.interop.state import Patch, features_of
from encdiff.models.unet import unet_of


@contextmanager
def tgate(unet: Any, gate: int | TGate, evaluations: int, *, guided: bool = False) -> Iterator[None]:
    """Let a U-Net sample with T-GATE (arXiv 2404.02747) while the block runs: less work, and not exact.

        with encdiff.tgate(pipe.unet, encdiff.TGate(10), evaluations=25, guided=True):
            image = pipe(prompt, num_inference_steps=25).images[0]

    Evaluations are counted, and begin anew after `evaluations`, so that several samplings fit into one block. A
    ControlNet takes one of its own: `with tgate(unet, ...), tgate(controlnet, ...)`.

    Args:
        unet: diffusers' U-Net or ControlNet, a pipeline that has one, or latent-diffusion code's U-Net; patched or not
            (then for the time of the block). Of our own model it is `EncDiff.sample(gate=...)`.
        gate: what to repeat from when on; a number gates cross-attention alone.
        evaluations: how often a sampling calls the U-Net: the number of steps; of Heun's two a step but one.
        guided: batches are the unconditional half, then the conditional one. What is kept is the mean of the two, and
            after the gate the conditional half alone is computed and given for both, which drops the guidance.

    Raises:
        InputError: a U-Net without cross-attention, a gate outside the evaluations, or a batch that changes.
    """
    chosen = as_tgate(gate)
    if chosen is None:
        raise InputError(f"gate is {gate!r}, must be a whole number or a TGate")
    if not isinstance(evaluations, int) or isinstance(evaluations, bool) or evaluations < 1:
        raise InputError(f"evaluations is {evaluations!r}, must be a whole number of at least 1")
    chosen.check(evaluations)
    unet = unet_of(unet)
    before = state_of(unet)
    if before is None:
        patch(unet)
    state = state_of(unet)
    if state is None:
        raise InputError(f"unet is a {type(unet).__name__} whose blocks cannot be gated; an EncDiff samples with gate=")
    hooks = _Hooks(state, chosen, evaluations, guided)
    handles = [
        unet.register_forward_pre_hook(hooks.before, with_kwargs=True),
        unet.register_forward_hook(hooks.after),
    ]
    try:
        yield
        if not hooks.done:
            warnings.warn(f"tgate: the {type(unet).__name__} was not called inside the block", stacklevel=3)
    finally:
        for handle in handles:
            handle.remove()
        state.compute_all()
        if before is None:
            unpatch(unet)


class _Hooks:
    """Around every evaluation of the U-Net."""

    def __init__(self, state: Patch, gate: TGate, evaluations: int, guided: bool):
        self.state, self.gate, self.evaluations, self.guided = state, gate, evaluations, guided
        self.done = 0

    def before(self, unet: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        self.done = self.done % self.evaluations + 1
        if self.done == 1:
            self.state.compute_all()
        self.state.modes = {"attn1": self.gate.own(self.done), "attn2": self.gate.cross(self.done)}
        rows = len(features_of(args, kwargs))
        if self.guided and rows % 2:
            raise InputError(f"sample has {rows} rows, must be even: with guided=True it is two halves")
        self.state.guided = self.guided
        return _second_half((args, kwargs), rows) if self._halves else (args, kwargs)

    def after(self, unet: nn.Module, args: tuple, output: Any) -> Any:
        return tree_map(lambda t: torch.cat([t, t]) if isinstance(t, Tensor) else t, output) if self._halves else output

    @property
    def _halves(self) -> bool:
        return self.guided and self.done > self.gate.gate


def _second_half(given: tuple[tuple, dict[str, Any]], rows: int) -> tuple[tuple, dict[str, Any]]:
    """Every tensor of so many rows without the first half of them."""
    return tree_map(lambda t: t[rows // 2 :] if isinstance(t, Tensor) and t.ndim and len(t) == rows else t, given)
