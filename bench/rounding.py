"""What a decoder in bfloat16 does to images, in levels of 8 bits, beside what the U-Net's rounding does. Without a GPU.

    OMP_NUM_THREADS=2 python -m bench.rounding --steps 200     # of a first stage trained for so long: minutes

The paper's first stage learns the procedural room by L1 and its codebook, images that it has not seen are encoded,
and their latents decoded in each way. Then the packaged models sample in both precisions.
"""

import argparse
import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from bench.baselines import PAPER
from encdiff import EncDiff, SamplingEngine
from encdiff.data import open_dataset, to_float
from encdiff.models.autoencoder import VQAutoencoder
from encdiff.models.layers import channels_last
from encdiff.pretrained import FOLDER
from encdiff.training.autoencoder import AutoencoderTrainConfig, AutoencoderTraining

LEVEL = 2 / 255  # of images in [-1, 1]


class LastExact(nn.Module):
    """The last convolution in float32, behind layers in bfloat16."""

    def __init__(self, last: nn.Module):
        super().__init__()
        self.last = copy.deepcopy(last).float()

    def forward(self, x: Tensor) -> Tensor:
        return self.last(x.float())


def first_stage(steps: int, batch: int = 16) -> tuple[VQAutoencoder, Tensor]:
    """Trained, and images (64, 3, 64, 64) that it has not seen."""
    torch.manual_seed(0)
    data = open_dataset("procedural:5,5,5,4,4,5", PAPER.image_size)
    order = torch.randperm(len(data))
    model = VQAutoencoder(PAPER.vq_width, PAPER.vq_multipliers, PAPER.vq_depth, codebook_size=PAPER.vq_codes)
    config = AutoencoderTrainConfig(steps=steps, batch_size=batch, learning_rate=6e-4, discriminator=False)
    training = AutoencoderTraining(model, config)
    training.begin(to_float(data.images(order[:256])))
    for step in range(steps):
        rows = order[torch.arange(step * batch, (step + 1) * batch) % (len(order) - 64)]
        measured = training.advance(torch.as_tensor(data.images(rows)), rows)
    print(f"after {steps} steps:", {name: round(float(value), 4) for name, value in measured.items()})
    return model.eval(), to_float(data.images(order[-64:]))


def ways(model: VQAutoencoder) -> dict[str, Callable[[Tensor], Tensor]]:
    rounded = copy.deepcopy(model)
    channels_last(rounded.decoder.to(torch.bfloat16))
    mixed = copy.deepcopy(rounded)
    mixed.decoder.conv_out = LastExact(model.decoder.conv_out)
    return {
        "decoder in bfloat16": rounded.decode,
        "its last convolution in float32": mixed.decode,
        "float32, codes searched by rounded latents": lambda z: model.decode(z.bfloat16().float()),
    }


def difference(images: Tensor, exact: Tensor) -> str:
    levels = (images.clamp(-1, 1) - exact.clamp(-1, 1)).abs() / LEVEL
    rounded = ((images.clamp(-1, 1) / LEVEL).round() != (exact.clamp(-1, 1) / LEVEL).round()).float().mean()
    return f"{levels.mean():.3f} on average, {levels.max():.2f} at most; {rounded:.1%} of 8-bit values change"


def compare(model: VQAutoencoder, images: Tensor) -> None:
    z = model.encode(images)
    exact = model.decode(z)
    for name, decode in ways(model).items():
        print(f"{name:44} {difference(decode(z), exact)}")
    moved = (model.quantize.nearest(z) != model.quantize.nearest(z.bfloat16())).float().mean()
    print(f"{'codes that rounded latents change':44} {moved:.2%}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=200)
    model, images = first_stage(parser.parse_args().steps)
    with torch.no_grad():
        compare(model, images)
    for name in sorted(folder.name for folder in FOLDER.iterdir() if (folder / "config.json").exists()):
        packaged = EncDiff.from_pretrained(name)
        scalars = torch.randn(8, *packaged.config.code_shape, generator=torch.Generator().manual_seed(0))
        drawn = SamplingEngine(packaged, precision="bf16")(scalars)
        print(f"{name + ', U-Net in bfloat16':44} {difference(drawn, packaged.sample(scalars))}", flush=True)


if __name__ == "__main__":
    main()
