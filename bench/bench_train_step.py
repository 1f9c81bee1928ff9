"""One training step of the paper's configuration on images at hand: encode, noise, predict, gradients, AdamW, average.

`published`: its eager step. `published_compiled`: the same with the stock fused attention, the loss under
torch.compile, fused AdamW and average. `diffusers`: its U-Net, compiled, in the place of the published one. `ours` is
`encdiff train` by default, with the latents made once for the whole run; `ours_encoding` encodes them in every step as
the others do; `ours_autocast` has no bfloat16 copy of the weights; `ours_compile` on a GPU lies in a CUDA graph too.
Before anything is timed, loss and gradient are compared with the published form's on one noise.
"""

import functools

import pytest
import torch

from bench.baselines import PAPER, SMOKE, as_exact, compiled, diffusers_unet, fresh_model, published_twin
from bench.cost import train_step_cost
from bench.published import PublishedTraining
from encdiff.train import TrainConfig, Training

GPU = torch.cuda.is_available()
BATCHES = (128, 1024) if GPU else (16,)
DTYPES = {torch.float32: "float32", torch.bfloat16: "bf16"}
RATE = 1e-6


def published(model, precision, images, compile):
    training = PublishedTraining(published_twin(model), RATE, precision=precision)
    return functools.partial(training.advance, images)


def published_compiled(model, precision, images, compile, unet=None):
    twin = published_twin(model, "sdpa")
    if unet is not None:
        twin.model["diffusion_model"] = unet
    training = PublishedTraining(twin, RATE, compile(twin.loss), precision, fast=True)
    return functools.partial(training.advance, images)


def diffusers(model, precision, images, compile):
    return published_compiled(model, precision, images, compile, diffusers_unet(model.config).to(images.device))


def ours(model, precision, images, compile, encoding=False, masters=None, **options):
    config = TrainConfig(batch_size=len(images), learning_rate=RATE, warmup=0, precision=precision, **options)
    training = Training(model, config, masters)
    training.latents = None if encoding else model.to_latents(images)
    uint8 = ((images + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()
    indices = torch.arange(len(images), device=images.device)
    return lambda: training.advance(uint8, indices)


STEPS = {
    "published": published,
    "published_compiled": published_compiled,
    "diffusers": diffusers,
    "ours": ours,
    "ours_encoding": functools.partial(ours, encoding=True),
    "ours_autocast": functools.partial(ours, masters=False),
    "ours_eager": functools.partial(ours, engine="eager"),
    "ours_compile": functools.partial(ours, engine="compile"),
    "ours_checkpoint": functools.partial(ours, checkpoint_activations=True),
}
SLOW = ("published_compiled", "diffusers", "ours_compile")  # minutes to compile
CASES = [(impl, dtype, batch) for impl in STEPS for dtype in DTYPES for batch in BATCHES
         if impl not in SLOW or ((dtype == torch.bfloat16) == GPU and batch == BATCHES[0])]  # fmt: skip


@pytest.mark.parametrize("impl, dtype, batch", CASES, ids=str)
def test_train_step(measure, benchmark, device, impl, dtype, batch):
    if impl in ("ours_eager", "ours_autocast") and not GPU:
        pytest.skip("on a CPU `ours` is eager and under autocast")
    if impl == "ours_autocast" and dtype != torch.bfloat16:
        pytest.skip("it is of bfloat16")
    if impl == "ours_compile" and benchmark.disabled:
        pytest.skip("compiling takes longer than a smoke test may")
    config, batch = (SMOKE, 2) if benchmark.disabled else (PAPER, batch)
    model = fresh_model(config, device).train()
    images = torch.rand(batch, 3, config.image_size, config.image_size, device=device) * 2 - 1
    check(model, images[:8], dtype)
    step = STEPS[impl](
        model, DTYPES[dtype], images, functools.partial(compiled, device=device, smoke=benchmark.disabled)
    )
    for _ in range(5):  # compiles, and captures graphs
        step()
    labels = {
        "op": "train_step",
        "impl": impl,
        "phase": "step",
        "shape": f"B={batch} {config.image_size}x{config.image_size}",
    }
    costs = train_step_cost(
        config, batch, dtype, impl in ("published", "published_compiled", "diffusers", "ours_encoding")
    )
    measure(step, **labels, dtype=dtype, samples=batch, **costs)


def check(model, images, dtype) -> None:
    """Ours and the published form: one gradient of the image encoder, through everything, on the same noise."""
    t = torch.arange(len(images), device=images.device) * 100
    noise = torch.randn(len(images), *model.latent_shape, device=images.device)

    def gradient(model, dtype):
        with torch.autocast(images.device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
            loss = model.loss(images, t=t, noise=noise)
        return torch.autograd.grad(loss, model.cond_stage_model["encoder"][-1].weight)[0]

    twin = published_twin(model)
    assert as_exact(gradient(model, dtype), gradient(twin, dtype), gradient(twin, torch.float32))
