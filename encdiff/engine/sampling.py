"""Sampling at full speed: one CUDA graph for each size of batch."""

import copy
import inspect
from typing import Any, Literal

import torch
from torch import Tensor

from encdiff.checked import check_types
from encdiff.engine.graph import Graph, unowned
from encdiff.errors import InputError
from encdiff.models import EncDiff
from encdiff.models.autoencoder import VQAutoencoder
from encdiff.models.layers import channels_last

GIVEN = ("scalars", "x_T", "token_bias")  # to each call


class SamplingEngine:
    """Images from scalars, batch after batch, at full speed.

        draw = SamplingEngine(model, precision="bf16", steps=20)
        images = draw(scalars)

    On a GPU all of it, from the bank over every step to the decoder, is one CUDA graph for each batch size, captured at
    the second call of that size; batches are filled up to a power of two, so that few graphs serve all. Elsewhere it is
    `EncDiff.sample`, and so it is with a scheduler of diffusers as `sampler`: it keeps its place on the host, where no
    graph can follow. The parameters must stay where they are: make a new engine after `model.to(...)`.

    precision: "bf16" lets bfloat16 copies of U-Net and decoder compute, as they are now. x, the bank, the search for
    the codes nearest to x0 and the images stay in float32.
    `options` are those of `EncDiff.sample`, without x_T and token_bias, which are given to the call, and progress.
    """

    def __init__(self, model: EncDiff, precision: Literal["float32", "bf16"] = "float32", **options: Any):
        check_types(model=(model, EncDiff, ""))
        if precision not in ("float32", "bf16"):
            raise InputError(f"precision is {precision!r}, must be float32 or bf16")
        known = inspect.signature(EncDiff.sample).parameters.keys() - {*GIVEN, "self", "progress"}
        if unknown := options.keys() - known:
            raise InputError(
                f"{min(unknown)} is no option of the engine, must be among {', '.join(sorted(known))}; "
                "x_T and token_bias are given to its calls"
            )
        self.model, self.options = _rounded(model) if precision == "bf16" else model, options
        self.graphs: dict[tuple, Graph] = {}

    @torch.no_grad()
    def __call__(self, scalars: Tensor, x_T: Tensor | None = None, token_bias: Tensor | None = None) -> Tensor:
        """scalars (B, N), and x_T (B, c, h, w) and token_bias (B, N) or None -> images (B, 3, S, S)."""
        inputs = dict(zip(GIVEN, (scalars, x_T, token_bias), strict=True))
        given = {name: tensor.to(scalars.device) for name, tensor in inputs.items() if tensor is not None}
        for name, tensor in given.items():
            if len(tensor) != len(scalars):
                raise InputError(f"{name} has {len(tensor)} rows, must have {len(scalars)}, one for each of scalars")
        by_name = isinstance(self.options.get("sampler", ""), str)
        if scalars.device.type != "cuda" or not len(scalars) or not by_name:
            return self._sample(**given)[0]
        bucket = 1 << (len(scalars) - 1).bit_length()
        key = bucket, *((name, tensor.shape[1:], tensor.dtype) for name, tensor in given.items())
        graph = self.graphs.setdefault(key, Graph(unowned(self._sample), warm_up=1))
        images = graph(**{name: _fill_up(tensor, bucket) for name, tensor in given.items()})[0]
        return images[: len(scalars)].clone()  # the graph's own memory is written again by its next call

    def _sample(self, scalars: Tensor, **starts: Any) -> tuple[Tensor]:
        return (self.model.sample(scalars, **starts, **self.options),)


def _rounded(model: EncDiff) -> EncDiff:
    """A copy with its U-Net and its decoder in bfloat16, channels last; all else is the model's own."""
    kept = [part for name, part in model.first_stage.named_children() if name != "decoder"]
    copied = copy.deepcopy(model, {id(part): part for part in (model.cond_stage_model, *kept)})
    channels_last(copied.unet.to(torch.bfloat16))
    if isinstance(copied.first_stage, VQAutoencoder):
        channels_last(copied.first_stage.decoder.to(torch.bfloat16))
    return copied


def _fill_up(tensor: Tensor, rows: int) -> Tensor:
    """The tensor with its last row repeated, up to so many rows."""
    return torch.cat([tensor, tensor[-1:].expand(rows - len(tensor), *tensor.shape[1:])])
