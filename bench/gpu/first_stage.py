"""The first stage of the block `paper`: a VQ autoencoder of the paper's shape, trained against the clock."""

import time
from collections.abc import Callable

import torch
from torch import Tensor

from bench.gpu.lab import Lab
from bench.gpu.room import Room
from encdiff.data import to_float
from encdiff.engine import Graph
from encdiff.models.autoencoder import VQAutoencoder
from encdiff.training import AutoencoderTrainConfig
from encdiff.training.autoencoder import AutoencoderTraining


def train(lab: Lab, seconds: float) -> dict:
    """A VQ autoencoder of the paper's shape, trained for so long on L1 and its codebook; kept in OUT/first_stage."""
    torch.manual_seed(0)
    room, c = Room(lab), lab.config
    model = VQAutoencoder(c.vq_width, c.vq_multipliers, c.vq_depth, codebook_size=c.vq_codes).to(lab.device)
    batch, rate = (4 if lab.cpu else 128), 6e-4
    config = AutoencoderTrainConfig(
        batch_size=batch, learning_rate=rate, discriminator=False, precision="float32" if lab.cpu else "bf16"
    )
    training = AutoencoderTraining(model.to(memory_format=torch.channels_last), config)
    generator = torch.Generator().manual_seed(0)

    def draw() -> Tensor:
        return room.pixels[torch.randint(len(room), (batch,), generator=generator).to(lab.device)]

    training.begin(to_float(torch.cat([draw() for _ in range(4)])))
    step, learning_rate = graphed(training, lab)
    began, log, steps, done = time.monotonic(), [], 0, 0.0
    while done < 1:
        learning_rate.fill_(rate * min(1.0, (steps + 1) / 100, 2.5 * (1 - done) + 0.02))  # falls over the last part
        l1, used = step(images=draw())
        steps += 1
        if steps % 100 == 0 or lab.cpu:
            log.append([steps, time.monotonic() - began, float(l1), float(used)])
        done = (time.monotonic() - began) / seconds
    log.append([steps, time.monotonic() - began, float(l1), float(used)])
    model.eval().save_pretrained(lab.out / "first_stage")
    training.picture(to_float(torch.cat([draw()[:8]])), lab.out)
    lab.save("first_stage", {"log": log, "batch": batch, "seconds": seconds})
    return {"steps": steps, "l1": log[-1][2], "codes_used": log[-1][3]}


def graphed(training: AutoencoderTraining, lab: Lab) -> tuple[Callable[..., tuple[Tensor, Tensor]], Tensor]:
    """A step of the autoencoder alone, on a GPU one graph; and its learning rate, on the device."""
    rate = torch.zeros((), device=lab.device)
    parameters = list(training.model.parameters())
    optimizer = torch.optim.Adam(parameters, rate, (0.5, 0.9), capturable=not lab.cpu, fused=not lab.cpu)

    def work(images: Tensor) -> tuple[Tensor, Tensor]:
        optimizer.zero_grad(set_to_none=True)
        with training._autocast():
            terms, _ = training._autoencoder_terms(to_float(images), judge=None)
        terms["loss"].backward()
        optimizer.step()
        return terms["l1"].detach(), terms["codes_used"]

    return (work if lab.cpu else Graph(work)), rate
