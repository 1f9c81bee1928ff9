"""Images from codes by DDIM (eta 0): bank, loop, first stage's decoder. `phase` is the whole loop.

`ours` is `SamplingEngine`. Latents and their decoding are compared with the published form's before anything is timed:
in images rounding alone can pick another code. An entry of `SAMPLERS` is one more candidate.
"""

import functools
from itertools import product
from unittest import mock

import torch

from bench.baselines import PAPER, SMOKE, as_exact, compiled, diffusers_unet, fresh_model, published_twin
from bench.cases import DTYPE, GPU, cases
from bench.cost import sampling_cost
from bench.published import Published
from encdiff import SamplingEngine
from encdiff.models import EncDiff

BATCHES, STEPS = ((1, 128), 20) if GPU else ((4,), 20)
DTYPES = {torch.float32: "float32", torch.bfloat16: "bf16"}


def published(model, compile, dtype, twin=None, unet=None):
    twin, device = twin or published_twin(model), model.alphas_cumprod.device.type

    def sample(scalars, x_T, steps):
        with torch.autocast(device, torch.bfloat16, enabled=dtype == torch.bfloat16):
            return twin.sample(scalars, x_T, steps, unet=unet)

    return sample


def published_compiled(model, compile, dtype, unet=None):
    twin = published_twin(model, "sdpa")
    return published(model, compile, dtype, twin, compile(twin.unet if unet is None else unet))


def diffusers(model, compile, dtype):
    return published_compiled(
        model, compile, dtype, diffusers_unet(model.config).to(model.alphas_cumprod.device).eval()
    )


def ours(model, compile, dtype):
    engines = functools.cache(lambda steps: SamplingEngine(model, precision=DTYPES[dtype], sampler="ddim", steps=steps))
    return lambda scalars, x_T, steps: engines(steps)(scalars, x_T=x_T)


SAMPLERS = {"published": published, "published_compiled": published_compiled, "diffusers": diffusers, "ours": ours}


def decides(impl, batch, dtype) -> bool:
    return impl != "diffusers" and dtype == DTYPE


@cases("impl, batch, dtype", product(SAMPLERS, BATCHES, DTYPES), decides)
def test_sampling(measure, smoke, device, batch, impl, dtype):
    config, batch, steps = (SMOKE, 2, 3) if smoke else (PAPER, batch, STEPS)
    model = fresh_model(config, device).eval()
    sample = SAMPLERS[impl](model, functools.partial(compiled, device=device, smoke=smoke), dtype)
    scalars = torch.randn(batch, config.concepts, device=device)
    x_T = torch.randn(batch, *model.latent_shape, device=device)
    if impl != "diffusers":  # which is a network of its own
        check(sample, model, dtype, scalars, x_T)
    labels = {"op": "sampling", "impl": impl, "phase": "loop", "shape": f"B={batch} steps={steps}"}
    costs = sampling_cost(config, batch, steps, dtype)
    measure(
        lambda: sample(scalars, x_T, steps), **labels, dtype=dtype, samples=batch, calls=2,
        why_not="it is a CUDA graph itself" if impl == "ours" else None, **costs,
    )  # fmt: skip


def check(sample, model, dtype, scalars, x_T, steps: int = 2) -> None:
    """Latents after a few steps, and what the decoders make of them; three calls, since ours captures at the second."""
    forms = [functools.partial(published(model, None, d), scalars, x_T, steps) for d in (torch.float32, dtype)]
    with mock.patch.multiple(EncDiff, to_images=latents), mock.patch.multiple(Published, to_images=latents):
        exact, rounded = (form() for form in forms)
        assert all(as_exact(sample(scalars, x_T, steps), rounded, exact) for _ in range(3))
    images, expected = (m.to_images(exact) for m in (model, published_twin(model)))
    assert (images - expected).norm() < 1e-2 * expected.norm()


def latents(model, x):
    """In place of a decoder."""
    return x
