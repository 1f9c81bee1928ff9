"""One training step of the paper's configuration on images at hand: encode, noise, predict, gradients, AdamW, average.

`published`: its eager step. `published_compiled`: the same with the stock fused attention, the loss under
torch.compile, fused AdamW and average. `diffusers`: its U-Net, compiled, in the place of the published one. `ours` is
`encdiff train` by default, with the latents made once for the whole run; `ours_encoding` encodes them in every step as
the others do; `ours_autocast` has no bfloat16 copy of the weights; `ours_compile` on a GPU lies in a CUDA graph too.
On a GPU the published steps are captured, their optimiser's count on the device; ours is a graph already. In bfloat16
what is left in float32 is rounded to TF32 in all of them, as `encdiff train` does. Before anything is timed, loss and
gradient are compared with the published form's on one noise.
"""

import functools
from itertools import product

import torch

from bench.baselines import PAPER, SMOKE, as_exact, compiled, diffusers_unet, fresh_model, published_twin
from bench.cases import DTYPE, GPU, cases
from bench.cost import train_step_cost
from bench.published import PublishedTraining
from encdiff.training import TrainConfig, Training

BATCHES = (128, 1024) if GPU else (16,)
DTYPES = {torch.float32: "float32", torch.bfloat16: "bf16"}
RATE = 1e-6


def published(model, precision, images, compile):
    training = PublishedTraining(published_twin(model), RATE, precision=precision, capturable=images.is_cuda)
    return functools.partial(training.advance, images)


def published_compiled(model, precision, images, compile, unet=None):
    twin = published_twin(model, "sdpa")
    if unet is not None:
        twin.model["diffusion_model"] = unet
    training = PublishedTraining(twin, RATE, compile(twin.loss), precision, fast=True, capturable=images.is_cuda)
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
PUBLISHED = ("published", "published_compiled", "diffusers")
SLOW = (*PUBLISHED[1:], "ours_compile")  # minutes to compile
ONE_DTYPE = dict.fromkeys(SLOW, DTYPE) | {"ours_autocast": torch.bfloat16}
CASES = [
    (impl, dtype, batch)
    for impl, dtype, batch in product(STEPS, DTYPES, BATCHES)
    if ONE_DTYPE.get(impl, dtype) == dtype
    and (impl not in SLOW or batch == BATCHES[0])
    and (GPU or impl not in ("ours_eager", "ours_autocast"))  # as `ours` is on a CPU
]


def decides(impl, dtype, batch) -> bool:
    most = impl in ("published", "published_compiled", "ours", "ours_encoding") and batch == BATCHES[0]
    return most and (dtype == DTYPE or (impl == "ours" and not GPU))


@cases("impl, dtype, batch", CASES, decides)
def test_train_step(measure, smoke, device, impl, dtype, batch):
    config, batch = (SMOKE, 2) if smoke else (PAPER, batch)
    model = fresh_model(config, device).train()
    images = torch.rand(batch, 3, config.image_size, config.image_size, device=device) * 2 - 1
    check(model, images[:8], dtype)
    if impl == "ours_compile":
        torch._dynamo.reset()
    step = STEPS[impl](model, DTYPES[dtype], images, functools.partial(compiled, device=device, smoke=smoke))
    labels = {"op": "train_step", "impl": impl, "phase": "step"}
    labels["shape"] = f"B={batch} {config.image_size}x{config.image_size}"
    if impl in PUBLISHED:
        why_not = None
    else:
        why_not = "its host sets the rate in every step" if impl == "ours_eager" else "it is a CUDA graph itself"
    measure(
        step, **labels, dtype=dtype, samples=batch, calls=2 if impl in PUBLISHED else 20, why_not=why_not,
        tf32=dtype == torch.bfloat16, **train_step_cost(config, batch, dtype, impl in (*PUBLISHED, "ours_encoding")),
    )  # fmt: skip


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
