"""What T-GATE saves and what it changes: `python -m bench.tgate multiply-adds`, `... time`, `... error`.

Multiply-adds are counted by PyTorch on U-Nets without memory (the meta device), of Stable Diffusion's shapes; times are
of a smaller U-Net with random weights, whose images nobody would look at; errors are of our own model's images.
"""

import argparse
from collections.abc import Callable, Iterator
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import encdiff
from bench.clock import called
from encdiff import EncDiff, TGate, open_dataset, to_float
from encdiff.metrics.counterfactual import nearest

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EVALUATIONS, GATE = 25, 10  # the paper's
STEPS, GATES = 20, (1, 2, 3, 4, 6, 8, 10, 12, 15, 18, 20)
SD15: dict[str, Any] = dict(sample_size=64, cross_attention_dim=768)
SDXL: dict[str, Any] = dict(
    sample_size=128, cross_attention_dim=2048, attention_head_dim=(5, 10, 20), use_linear_projection=True,
    block_out_channels=(320, 640, 1280), transformer_layers_per_block=(1, 2, 10), addition_embed_type="text_time",
    addition_time_embed_dim=256, projection_class_embeddings_input_dim=2816,
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
)  # fmt: skip
SMALL = SD15 | dict(sample_size=16, block_out_channels=(128, 256, 512, 512))
WAYS = {
    "every evaluation whole": None,
    "self-attention spared": (TGate(EVALUATIONS), False),
    "cross-attention gated": (TGate(GATE, self_every=1), False),
    "both": (TGate(GATE), False),
    "both, guidance dropped": (TGate(GATE), True),
}


def unet_of(config: dict[str, Any], device: str) -> tuple[nn.Module, dict[str, Any]]:
    """diffusers' U-Net and the arguments of a guided image."""
    diffusers = pytest.importorskip("diffusers", reason="the U-Nets are diffusers'")
    side = config["sample_size"]
    with torch.device(device):
        torch.manual_seed(0)
        unet = diffusers.UNet2DConditionModel(**config).eval()
        given = dict(sample=torch.randn(2, 4, side, side), timestep=torch.ones(()))
        given["encoder_hidden_states"] = torch.randn(2, 77, config["cross_attention_dim"])
        if "addition_embed_type" in config:
            given["added_cond_kwargs"] = {"text_embeds": torch.randn(2, 1280), "time_ids": torch.randn(2, 6)}
    return unet, given


@torch.no_grad()
def sampled(config: dict[str, Any], device: str, way: tuple[TGate, bool] | None, measured: Callable) -> float:
    """What `measured(run)` says of a sampling's evaluations."""
    unet, given = unet_of(config, device)
    encdiff.patch(unet, self_attention=True)

    def run() -> None:
        for _ in range(EVALUATIONS):
            unet(**given)

    if way is None:
        return measured(run)
    with encdiff.tgate(unet, way[0], EVALUATIONS, guided=way[1]):
        return measured(run)


def multiply_adds(run: Callable[[], None]) -> float:
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops() / 2


def seconds(run: Callable[[], None]) -> float:
    """Of a sampling, the median of three after one that warms up."""
    return called(run, torch.device(DEVICE), calls=3, warm_up=1)


def rows_of(configs: dict[str, dict[str, Any]], device: str, measured: Callable, unit: str) -> Iterator[str]:
    yield f"| of {EVALUATIONS} evaluations, gate {GATE} | " + " | ".join(f"{name}, {unit} |" for name in configs)
    yield "|---|" + "---|---|" * len(configs)
    whole: dict[str, float] = {}
    for name, way in WAYS.items():
        cells = []
        for of, config in configs.items():
            value = sampled(config, device, way, measured)
            whole.setdefault(of, value)
            cells.append(f"{value / (1e12 if unit == 'T' else 1):.2f} | {100 * value / whole[of]:.0f} %")
        yield f"| {name} | " + " | ".join(cells) + " |"


@torch.no_grad()
def of_model(name: str, images: int) -> Iterator[tuple[float, float]]:
    """Of our own model's gated images beside the same without a gate: decibels, and the share that reads the same."""
    model = EncDiff.from_pretrained(name).eval()
    room = open_dataset("procedural:5,5,5,4,4,5", model.config.image_size)
    every, true = np.arange(len(room)), room.images(np.arange(len(room)))
    chosen = np.random.default_rng(0).choice(every, images, replace=False)
    codes = model.encode(to_float(room.images(chosen)))
    exact = model.sample(codes, steps=STEPS)

    def read(drawn: Tensor) -> np.ndarray:
        return room.factors(nearest(drawn, [true]))

    before = read(exact)
    for gate in GATES:
        drawn = model.sample(codes, steps=STEPS, gate=TGate(gate))
        yield decibels(drawn / 2, exact / 2), float((read(drawn) == before).all(1).mean())


def decibels(actual: Tensor, exact: Tensor) -> float:
    return float(-10 * torch.log10((actual - exact).square().mean() + 1e-12))


def errors(names: list[str], images: int, plot: str | None) -> Iterator[str]:
    """A table of all, and a plot."""
    found = {name: list(of_model(name, images)) for name in names}
    lines = {name: [decibel for decibel, _ in rows] for name, rows in found.items()}
    yield f"| gate, of {STEPS} | " + " | ".join(f"{name}, dB | same factors" for name in names) + " |"
    yield "|---|" + "---|---|" * len(names)
    for i, gate in enumerate(GATES):
        cells = [f"{found[name][i][0]:.1f} | {100 * found[name][i][1]:.0f} %" for name in names]
        yield f"| {gate} | " + " | ".join(cells) + " |"
    if plot:
        figure, axes = plt.subplots(figsize=(6.4, 3.6), layout="constrained")
        for name, values in lines.items():
            axes.plot(GATES, values, marker="o", label=name)
        axes.set(xlabel=f"gate, of {STEPS} evaluations", ylabel="PSNR against no gate, dB", xlim=(0, STEPS))
        axes.legend()
        figure.savefig(plot, dpi=110)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.tgate", description=__doc__)
    parser.add_argument("what", choices=("multiply-adds", "time", "error"))
    parser.add_argument("models", nargs="*", default=["room64", "room32", "quickstart"])
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--plot", help="a PNG of the errors")
    given = parser.parse_args(arguments)
    if given.what == "multiply-adds":
        rows = rows_of({"SD 1.5": SD15, "SDXL": SDXL}, "meta", multiply_adds, "T")
    elif given.what == "time":
        rows = rows_of({"small": SMALL}, DEVICE, seconds, "s")
    else:
        rows = errors(given.models, given.images, given.plot)
    for row in rows:
        print(row, flush=True)


if __name__ == "__main__":
    main()
