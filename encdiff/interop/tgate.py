"""T-GATE for other libraries' U-Nets: converged attention is repeated, guidance that no longer acts is dropped."""

import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from encdiff.diffusion.gate import TGate, as_tgate
from encdiff.errors import InputError
from encdiff.interop.patch import in_use, states_of
from encdiff.interop.state import Patch, features_of, prompt_of
from encdiff.models.unet import unet_of


@contextmanager
def tgate(
    unet: Any, gate: int | TGate, evaluations: int | None = None, *, guided: bool | None = None
) -> Iterator[None]:
    """Let a U-Net sample with T-GATE (arXiv 2404.02747) while the block runs: less work, and not exact.

        with encdiff.tgate(pipe, encdiff.TGate(10)):
            image = pipe(prompt, num_inference_steps=25).images[0]

    A block may hold several samplings: a new one begins after so many evaluations, with another prompt tensor, and
    after one that failed. A ControlNet takes one of its own: `with tgate(pipe, 10), tgate(pipe.controlnet, 10, 25)`.

    Args:
        unet: a pipeline of diffusers, its U-Net or ControlNet, or latent-diffusion code's U-Net; patched or not (then
            for the time of the block). Of our own model it is `EncDiff.sample(gate=...)`.
        gate: what to repeat from when on; a number gates cross-attention alone.
        evaluations: how often a sampling calls the U-Net. None: a pipeline knows; for a U-Net it must be given: its
            steps; of Heun's two for each but one, of PNDM's one or nine more, of image to image what strength leaves.
        guided: batches are the unconditional half, then the conditional one. What is kept is the mean of the two, and
            after the gate the conditional half alone is computed and given for both, which drops the guidance. None:
            as the pipeline does, for a U-Net False.

    Raises:
        InputError: a U-Net without cross-attention or with an open `tgate`, a gate outside the evaluations, a batch
            that changes. What it cannot know is warned of: a block that ends in the middle of a sampling.
    """
    chosen = as_tgate(gate)
    if chosen is None:
        raise InputError(f"gate is {gate!r}, must be a whole number or a TGate")
    pipeline, unet = unet, unet_of(unet)
    if evaluations is None and not hasattr(type(pipeline), "num_timesteps"):
        raise InputError("evaluations is None, must be given for a U-Net; a pipeline knows them")
    if evaluations is not None and (type(evaluations) is not int or evaluations < 1):
        raise InputError(f"evaluations is {evaluations!r}, must be a whole number of at least 1")
    if evaluations is not None:
        chosen.check(evaluations)
    if any("tgate" in state.users for state in states_of(unet)):
        raise InputError("unet is in use by a block of tgate, must have one at a time")
    with ExitStack() as stack:
        states = stack.enter_context(in_use(unet, "tgate"))
        if not states:
            raise InputError(
                f"unet is a {type(unet).__name__} that cannot be gated here; an EncDiff samples with gate="
            )
        hooks = _Hooks(pipeline, unet, states, chosen, evaluations, guided)
        stack.callback(hooks.compute_all)
        stack.callback(unet.register_forward_pre_hook(hooks.before, with_kwargs=True).remove)
        stack.callback(unet.register_forward_hook(hooks.after).remove)
        yield
        hooks.warn()


class _Hooks:
    """Around every evaluation of the U-Net."""

    def __init__(
        self, pipeline: Any, unet: nn.Module, states: list[Patch], gate: TGate, of: int | None, guided: bool | None
    ):
        self.pipeline, self.unet, self.states, self.gate = pipeline, unet, states, gate
        self.given, self.guided = (of, guided), False
        self.done = self.evaluations = 0
        self.prompt: Any = None  # held, so that no other takes its memory
        self.mark: Any = None
        self.under_way = False

    def __deepcopy__(self, memo: dict) -> "_Hooks":
        """A U-Net that is copied while it is gated: the copy is not."""
        return self

    def before(self, unet: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        if unet is not self.unet:
            return args, kwargs
        prompt = prompt_of(args, kwargs)
        if self.done == self.evaluations or self.under_way or _mark(prompt) != self.mark:
            self._begin(prompt)
        self.done, self.under_way = self.done + 1, True
        rows = len(features_of(args, kwargs))
        if self.guided and rows % 2:
            raise InputError(f"sample has {rows} rows, must be even: with guided=True it is two halves")
        for state in self.states:
            state.modes = {"attn1": self.gate.own(self.done), "attn2": self.gate.cross(self.done)}
            state.guided = self.guided
        return _second_half((args, kwargs), rows) if self._halves else (args, kwargs)

    def after(self, unet: nn.Module, args: tuple, output: Any) -> Any:
        if unet is not self.unet:
            return output
        self.under_way = False
        return tree_map(lambda t: torch.cat([t, t]) if isinstance(t, Tensor) else t, output) if self._halves else output

    def compute_all(self) -> None:
        for state in self.states:
            state.compute_all()

    def warn(self) -> None:
        said = f"tgate: the {type(self.unet).__name__}"
        if not self.done:
            warnings.warn(f"{said} was not called inside the block", stacklevel=5)
        elif self.done < self.evaluations:
            warnings.warn(f"{said} was called {self.done} times, not {self.evaluations} as was said", stacklevel=5)

    def _begin(self, prompt: Any) -> None:
        """A new sampling: nothing is kept, and a pipeline says how it samples."""
        self.compute_all()
        evaluations, guided = self.given
        self.evaluations = self.pipeline.num_timesteps if evaluations is None else evaluations
        self.gate.check(self.evaluations)
        guides = getattr(self.pipeline, "do_classifier_free_guidance", None)
        if guided and guides is False:
            raise InputError("guided is True, must be False for a pipeline that samples without guidance")
        self.guided = bool(guides) if guided is None else guided
        self.done, self.prompt, self.mark = 0, prompt, _mark(prompt)

    @property
    def _halves(self) -> bool:
        return self.guided and self.done > self.gate.gate


def _mark(prompt: Any) -> Any:
    """What tells a prompt from another: its memory, which nobody else has while it is alive, and what was written."""
    if not isinstance(prompt, Tensor):
        return id(prompt)
    return prompt.data_ptr(), prompt.shape, None if prompt.is_inference() else prompt._version


def _second_half(given: tuple[tuple, dict[str, Any]], rows: int) -> tuple[tuple, dict[str, Any]]:
    """Every tensor of so many rows without the first half of them."""
    return tree_map(lambda t: t[rows // 2 :] if isinstance(t, Tensor) and t.ndim and len(t) == rows else t, given)
