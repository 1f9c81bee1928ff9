"""Images from codes by DDIM (eta 0): bank, loop, first stage's decoder. `phase` is the whole loop.

Images are compared with the published form's before anything is timed. An entry of `SAMPLERS` is one more candidate.
"""

import functools

import pytest
import torch

from bench.baselines import PAPER, SMOKE, compiled, diffusers_unet, fresh_model, published_twin
from bench.cost import sampling_cost

GPU = torch.cuda.is_available()
BATCHES, STEPS = ((1, 128), 200) if GPU else ((4,), 20)


def published(model, compile):
    return published_twin(model).sample


def published_compiled(model, compile, unet=None):
    twin = published_twin(model, "sdpa")
    return functools.partial(twin.sample, unet=compile(twin.unet if unet is None else unet))


def diffusers(model, compile):
    return published_compiled(model, compile, diffusers_unet(model.config).to(model.alphas_cumprod.device).eval())


def ours(model, compile, **options):
    return lambda scalars, x_T, steps: model.sample(scalars, x_T=x_T, sampler="ddim", steps=steps, **options)


SAMPLERS = {"published": published, "published_compiled": published_compiled, "diffusers": diffusers, "ours": ours}


@pytest.mark.parametrize("impl", SAMPLERS)
@pytest.mark.parametrize("batch", BATCHES)
def test_sampling(measure, benchmark, device, batch, impl):
    config, batch, steps = (SMOKE, 2, 3) if benchmark.disabled else (PAPER, batch, STEPS)
    model = fresh_model(config, device).eval()
    sample = SAMPLERS[impl](model, functools.partial(compiled, device=device, smoke=benchmark.disabled))
    scalars, x_T = (
        torch.randn(batch, config.concepts, device=device),
        torch.randn(batch, *model.latent_shape).to(device),
    )
    if impl != "diffusers":  # which is a network of its own
        images, expected = (f(scalars, x_T, 3) for f in (sample, published_twin(model).sample))
        assert (images - expected).norm() < 1e-2 * expected.norm()  # rounding alone can pick another code
    labels = {"op": "sampling", "impl": impl, "phase": "loop", "shape": f"B={batch} steps={steps}"}
    costs = sampling_cost(config, batch, steps, torch.float32)
    measure(lambda: sample(scalars, x_T, steps), **labels, dtype=torch.float32, samples=batch, **costs)
