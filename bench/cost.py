"""The least that a whole model must move and compute, by formula: what a measurement is held against.

FLOP: multiply-adds times two of the published form's forward pass, counted by PyTorch's own counter on shapes alone;
with gradients three times that.

Bytes of a forward pass: every convolution, attention and feed-forward layer (and the time embedding's linear layers)
reads its input, its context and its weights once and writes its output once; whatever stands between them (norms,
activations, residuals, the softmax, the gate) is taken as fused into them. With gradients three times that: the
backward pass reads inputs, weights and upstream gradients and writes two kinds of gradients. An optimiser step adds
for AdamW 7 values of float32 per trained parameter (reads parameter, gradient, two moments; writes three) and 2 per
averaged one (reads the average, writes it; the parameter is at hand).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from bench import published, published_first_stage
from bench.published import Published
from encdiff.models import EncDiffConfig

UNITS = (published.Attention, published.FeedForward, published_first_stage.AttnBlock)
LAYERS = (nn.Conv2d, nn.Linear)


class Work(NamedTuple):
    """Of one forward pass: weights read once for a batch; activations moved and FLOP for each sample."""

    weights: int
    activations: int
    flops: int

    def cost(self, batch: int, dtype: torch.dtype, passes: int = 1) -> dict[str, int]:
        values = self.weights + batch * self.activations
        return {"bytes": passes * values * dtype.itemsize, "flops": passes * batch * self.flops}


def unet_cost(config: EncDiffConfig, batch: int, phase: str, dtype: torch.dtype) -> dict[str, int]:
    """Of one evaluation of the U-Net: `phase` forward or forward_backward. Bytes with values of `dtype`."""
    return _works(config)["unet"].cost(batch, dtype, 3 if phase == "forward_backward" else 1)


def train_step_cost(config: EncDiffConfig, batch: int, dtype: torch.dtype, first_stage: bool = True) -> dict[str, int]:
    """Of one training step: first stage (unless latents are at hand), encoder, bank, U-Net, gradients, AdamW, EMA."""
    works, model = _works(config), _on_meta(config)
    parts = [works["unet"].cost(batch, dtype, 3), works["tokens"].cost(batch, dtype, 3)]
    if first_stage:
        parts.append(works["encode"].cost(batch, dtype))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    averaged = sum(p.numel() for p in model.unet.parameters())
    state = {"bytes": 4 * (7 * trained + 2 * averaged), "flops": 0}
    return {what: sum(part[what] for part in (*parts, state)) for what in ("bytes", "flops")}


def sampling_cost(config: EncDiffConfig, batch: int, steps: int, dtype: torch.dtype) -> dict[str, int]:
    """Of `steps` evaluations of the U-Net and one decoding; the bank is small beside them."""
    unet, decode = (_works(config)[part].cost(batch, dtype) for part in ("unet", "decode"))
    return {what: steps * unet[what] + decode[what] for what in ("bytes", "flops")}


@lru_cache
@torch.no_grad()
def _works(config: EncDiffConfig) -> dict[str, Work]:
    model, side = _on_meta(config), config.image_size // config.downsampling
    with torch.device("meta"):
        images, latents = torch.zeros(1, 3, config.image_size, config.image_size), torch.zeros(1, 3, side, side)
        t, tokens = torch.zeros(1), torch.zeros(1, config.concepts, config.token_width)
    return {
        "unet": _count(model.unet, lambda: model.unet(latents, t, tokens)),
        "tokens": _count(model.cond_stage_model, lambda: model.tokens(images)),
        "encode": _count(model.first_stage_model, lambda: model.first_stage_model.encode(images)),
        "decode": _count(model.first_stage_model, lambda: model.first_stage_model.decode(latents)),
    }


def _count(module: nn.Module, run: Callable[[], Tensor]) -> Work:
    """Of a module called by `run` on one sample."""
    with FlopCounterMode(display=False) as counter, _moved(module) as moved:
        run()
    return Work(sum(w for w, _ in moved), sum(a for _, a in moved), counter.get_total_flops())


@contextmanager
def _moved(module: nn.Module) -> Iterator[list[tuple[int, int]]]:
    """Collects (weights, activations) that each unit and each layer outside a unit reads and writes."""
    moved: list[tuple[int, int]] = []

    def count(unit: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        moved.append((sum(p.numel() for p in unit.parameters()), sum(t.numel() for t in (*args, output))))

    units = [m for m in module.modules() if isinstance(m, UNITS)]
    inside = {id(m) for unit in units for m in unit.modules()}
    layers = [m for m in module.modules() if isinstance(m, LAYERS) and id(m) not in inside]
    handles = [m.register_forward_hook(count) for m in (*units, *layers)]
    try:
        yield moved
    finally:
        for handle in handles:
            handle.remove()


@lru_cache
def _on_meta(config: EncDiffConfig) -> Published:
    with torch.device("meta"):
        return Published(config)
